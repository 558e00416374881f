"""slurm/curate.sh on a real Slurm: parts of an array, the job that needs all of them, and a repetition."""

from __future__ import annotations

from pathlib import Path

import pytest

from svd_ds.data.shards import Index
from tests.cluster.conftest import Cluster
from tests.curation import real_shots
from tests.videos import write_video


def curate(cluster: Cluster, raw: Path, out: Path, *numbers: int) -> list[str]:
    """Submit some of two parts, and the job that depends on them, as the header of the script says.

    Returns:
        The output of each part.
    """
    arguments = (str(raw), str(out), "--shortest", "1s", "--text-model", "none")
    logs = raw.parent / "%A-%a.out"
    one = ("--nodes=1",)
    array = f"--array={','.join(map(str, numbers))}"
    parts = cluster.submit(
        "slurm/curate.sh", *arguments, "--part", "%a/2", options=(*one, array, f"--output={logs}")
    )
    last = cluster.submit("slurm/curate.sh", *arguments, options=(*one, f"--dependency=afterok:{parts}"))
    ended = cluster.wait(last)
    outputs = [(raw.parent / f"{parts}-{task}.out").read_text() for task in numbers]
    assert ended["JobState"] == "COMPLETED", (*outputs, cluster.output(last))
    return outputs


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_array_divides_the_files_and_repetition_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    raw, out, shots = tmp_path / "raw", tmp_path / "out", real_shots()
    for name in ("man", "rabbit", "street1"):
        write_video(raw / f"{name}.mp4", shots[name][:30], fps=25)
    (raw / "text.mp4").write_text("no video")
    outputs = curate(cluster, raw, out, 0, 1)
    assert [f"part {part}/2 is done, 2 of 4 files" in text for part, text in enumerate(outputs)] == [
        True,
        True,
    ]
    assert len(Index.load(out / "shards")) == 3
    assert "text.mp4" in (out / "refused.csv").read_text()
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert any(path.suffix == ".parquet" for path in files)
    assert "part 1/2 is done, 2 of 4 files" in curate(cluster, raw, out, 1)[0]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
