"""The trainer as a user starts it: two ranks, real shards, killed and resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from PIL import Image

from svd_ds.data.shards import Index
from svd_ds.train import main as train_main
from svd_ds.weights.io import load_unet
from tests.distributed.conftest import RunRanks
from tests.forked import ForkedRanks
from tests.runs import metrics
from tests.signals import handle_as_in_the_foreground

ROOT = Path(__file__).parents[2]
STEPS = 8


def settings(shards: Path, run: Path) -> tuple[str, ...]:
    folders = (f"data.path={shards}", f"run.dir={run}")
    return ("debug=tiny", *folders, f"run.steps={STEPS}", "checkpoint.every=2", "evaluation.every=0")


def command(shards: Path, run: Path, *overrides: str) -> list[str]:
    launcher = [sys.executable, str(ROOT / "tools/launch.py"), "-n", "2", "--"]
    return [*launcher, *settings(shards, run), *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}


Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def train(run_ranks: RunRanks) -> Train:
    """train(shards, run, *overrides) trains on two forked ranks to the end."""

    def start(shards: Path, run: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
        return run_ranks(None, *settings(shards, run), *overrides, WANDB_MODE="disabled")

    return start


@pytest.fixture(scope="module")
def killed_and_resumed(
    train: Train, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Folder of a run that was killed with SIGKILL and resumed, and the output of the resumed run."""
    run = tmp_path_factory.mktemp("runs") / "killed"
    evaluated = "evaluation.every=3"
    first = subprocess.Popen(
        command(shards, run, evaluated),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not (run / "checkpoints/step-0000004/COMPLETE").exists():
        assert first.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    _, errors = first.communicate(timeout=60)
    assert errors == "", "imports and a healthy run print no warning"
    second = train(shards, run, evaluated)
    assert second.returncode == 0, second.stderr
    return run, second.stdout


def test_killed_run_resumes_and_counts_every_step_once(killed_and_resumed: tuple[Path, str]) -> None:
    run, printed = killed_and_resumed
    assert "resuming at step " in printed
    assert [row["step"] for row in metrics(run)] == list(range(1, STEPS + 1))
    assert [row["samples"] for row in metrics(run)] == [12 * step for step in range(1, STEPS + 1)]


def test_killed_run_has_the_losses_of_an_uninterrupted_run(
    killed_and_resumed: tuple[Path, str], train: Train, shards: Path, tmp_path: Path
) -> None:
    """Previews and evaluations do not change the losses."""
    uninterrupted = train(shards, tmp_path / "uninterrupted", "sampling.every=1000000")
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in metrics(killed_and_resumed[0])] == [
            row[key] for row in metrics(tmp_path / "uninterrupted")
        ]


def test_every_evaluation_is_logged_once(killed_and_resumed: tuple[Path, str]) -> None:
    run, printed = killed_and_resumed
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, STEPS]
    assert len({row["set"] for row in rows}) == 1
    for row in rows:
        assert [len(row[key]) for key in ("sigma", "loss", "loss_average", "grad_norm")] == [10] * 4
        assert len(row["loss_by_frame"]) == 6
    assert f"step {STEPS}  fixed set: loss " in printed


@pytest.mark.slow
def test_run_rolls_back_once_and_then_ends_on_all_ranks_when_it_diverges(
    train: Train, shards: Path, tmp_path: Path
) -> None:
    """At such a rate no step after the second one is finite, whatever its clips. The run does
    not roll back to the second checkpoint, which no taken step follows."""
    run = tmp_path / "run"
    bounds = ("guard.window=2", "guard.max_skips=1", "guard.max_rollbacks=1")
    ended = train(shards, run, *bounds, "optim.lr=100", "checkpoint.every=1")
    assert ended.returncode == 2, ended.stdout
    assert (
        "step 4  rolled back to the checkpoint of step 1; the data continues with new clips" in ended.stdout
    )
    reported = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(reported) == 1, ended.stderr
    assert (
        "2 steps in a row were out of bounds, more than guard.max_skips=1, and the run has rolled"
        in reported[0]
    )
    assert "Traceback" not in ended.stderr
    skipped = [json.loads(line) for line in (run / "logs/skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in skipped] == [3, 4, 3, 4]
    clips = [tuple(row["clips"]) for row in skipped]
    assert len(clips[0]) == 12, "the clips of both ranks"
    assert len(set(clips)) == 4, "no batch is seen again"
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    assert metrics(run)[-1]["skipped"] == 4


def test_run_folder_is_as_documented(killed_and_resumed: tuple[Path, str]) -> None:
    run, printed = killed_and_resumed
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "report.html",
        "logs",
        "evaluation.jsonl",
    }
    checkpoint = run / "checkpoints" / f"step-{STEPS:07d}"
    for slices in ("unet", "adam-exp_avg", "adam-exp_avg_sq", "ema-power-0.050", "ema-power-0.100"):
        assert len(list(checkpoint.glob(f"{slices}/rank-*-of-00002.safetensors"))) == 2, "one a rank"
    video = run / "samples" / f"step-{STEPS:07d}" / "video-0.mp4"
    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 6
    with Image.open(video.with_name("contact_sheet.png")) as sheet:
        assert sheet.width > sheet.height > 64
    report = (run / "report.html").read_text()
    assert "<svg" in report
    assert "data:video/mp4;base64," in report
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)""", report), "self-contained: it loads nothing"
    assert str(run / "report.html") in printed


def test_weights_and_averages_are_read_without_the_engine(killed_and_resumed: tuple[Path, str]) -> None:
    run, _ = killed_and_resumed
    raw, average = load_unet(run, which="raw"), load_unet(run, which="power-0.050")
    different = [
        name
        for (name, one), other in zip(raw.named_parameters(), average.parameters(), strict=True)
        if not one.equal(other)
    ]
    assert len(different) > len(list(raw.parameters())) / 2


def start_endless_run(shards: Path, run: Path) -> subprocess.Popen[str]:
    """Start a run without end, and return after its first step."""
    process = subprocess.Popen(
        command(shards, run, "run.steps=100000", "checkpoint.every=100000", "sampling.every=100000"),
        env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=handle_as_in_the_foreground,
    )  # fmt: skip
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step 1/"))
    return process


def test_sigterm_leaves_a_checkpoint_of_the_last_step(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    endless = ("run.steps=100000", "checkpoint.every=100000", "sampling.every=100000")
    arguments = (*settings(shards, run), *endless)
    ranks = ForkedRanks(None, arguments, tmp_path / "output", WANDB_MODE="disabled")
    while not metrics(run):
        assert ranks.is_running(), ranks.wait()
        time.sleep(0.05)
    ranks.send_signal(signal.SIGTERM)
    ended = ranks.wait()
    assert ended.returncode == 0, ended.stderr
    assert "stopped at step" in ended.stdout
    last = metrics(run)[-1]["step"]
    assert (run / f"checkpoints/step-{last:07d}/COMPLETE").exists()


@pytest.mark.slow
def test_run_continues_after_its_console_closes_and_saves_on_ctrl_c(shards: Path, tmp_path: Path) -> None:
    """Example: `launch.py ... | head`, which closes the pipe of standard output after step 1."""
    run = tmp_path / "unread"
    process = start_endless_run(shards, run)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    reached, deadline = metrics(run)[-1]["step"], time.monotonic() + 120
    # Each tenth step is printed.
    while metrics(run)[-1]["step"] < reached + 12:
        assert process.poll() is None, "the run ended with its console"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, reported = process.communicate(timeout=120)
    assert (process.returncode, reported) == (130, "")
    last = metrics(run)[-1]["step"]
    assert (run / f"checkpoints/step-{last:07d}/COMPLETE").exists()
    assert f"stopped at step {last} as asked" in (run / "logs/train.log").read_text()
    kind = json.loads((run / "logs/outcome.json").read_text())["kind"]
    assert kind == "interrupted"


def sentence(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line of a run that was refused, without a traceback."""
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1, ended.stderr
    return lines[0]


def test_truncated_shard_is_named_and_all_ranks_stop(train: Train, shards: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    shard = broken / "shard-00001.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: size // 2])
    line = sentence(train(broken, tmp_path / "run"))
    assert all(part in line for part in ("shard-00001.tar", str(size), str(size // 2)))


def test_clip_that_cannot_be_decoded_ends_every_rank(train: Train, shards: Path, tmp_path: Path) -> None:
    """One rank alone reads the clip, in the middle of the run; the other must not wait forever."""
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    sample = next(sample for sample in Index.load(broken).samples() if sample.id == "clip07")
    offset, size = sample.members["mp4"]
    with open(broken / Index.load(broken).shards[sample.shard].name, "r+b") as shard:
        shard.seek(offset)
        shard.write(bytes(size))
    never = ("run.steps=1000", "checkpoint.every=1000", "sampling.every=1000")
    ended = train(broken, tmp_path / "run", "data.max_quarantined=0", *never)
    assert ended.returncode == 2
    reported = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(reported) == 1, ended.stderr
    assert "sample clip07 of" in reported[0]
    assert "Traceback" not in ended.stderr


def test_batch_that_cannot_be_split_is_refused(train: Train, shards: Path, tmp_path: Path) -> None:
    assert "batch.size 3 cannot be split over 2 ranks; start 1 or 3" in sentence(
        train(shards, tmp_path, "batch.size=3")
    )


def test_folder_of_another_config_is_refused(
    killed_and_resumed: tuple[Path, str], train: Train, shards: Path
) -> None:
    line = sentence(train(shards, killed_and_resumed[0], "optim.lr=0.5"))
    assert "belongs to another config" in line
    assert "optim.lr is 0.001 there and 0.5 here" in line


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.learning_rate=1", ["learning_rate"]),
        ("+experiment=stage9", ["stage9"]),
        ("data.path=nowhere", ["nowhere"]),
        ("data.height=60", ["data.height is 60", "16"]),
        ("model.context_width=48", ["48", "64"]),
        ("frozen.path=conf", ["conf", "vae"]),
        ("init.from=README.md", ["README.md"]),
        ("init.from=svd_ds/assets/tiny_svd/vae", ["tiny_svd/vae"]),
    ],
)
def test_bad_input_is_one_sentence(
    shards: Path,
    tmp_path: Path,
    override: str,
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One rank started by hand, in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", ["train", *settings(shards, tmp_path / "run"), override])
    with pytest.raises(SystemExit) as ended:
        train_main()
    assert ended.value.code == 2
    reported = capsys.readouterr().err.strip().splitlines()
    assert len(reported) == 1, reported
    assert reported[0].startswith("error: ")
    assert all(part in reported[0] for part in parts), reported[0]
