"""Every small file of a run folder, truncated, emptied, zeroed, with one bit flipped, and deleted: a restart
repairs it, or ends with a sentence that names it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from svd_ds.data.cursor import Cursor
from svd_ds.data.quarantine import Fault, Quarantine
from svd_ds.evaluation.runs import read_run
from svd_ds.jobs.outcome import FINISHED, JobOutcome
from svd_ds.jobs.requeue import record_queued_restart
from svd_ds.run_folder import RunFolder
from svd_ds.training.progress import Progress
from svd_ds.training.retention import acquire
from svd_ds.training.usage import OVERHEADS, Goodput
from svd_ds.weights.restarts import read_restarts, restarts_damage

CONFIG = {"batch": {"size": 4}, "optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "note": None}
FILES = [
    "config.yaml",
    "logs/config.yaml",
    "metrics.jsonl",
    "evaluation.jsonl",
    "logs/skipped.jsonl",
    "logs/quarantine.jsonl",
    "logs/restarts.jsonl",
    "logs/outcome.json",
    "state.json",
]


NOT_REPAIRED = {"logs/restarts.jsonl", "state.json"}
"""Files whose damage may end a restart; the others never do."""


@pytest.fixture
def intact(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.open(CONFIG, step=0)
    times = {"step_s": 1.0, **{f"{kind}_s": 0.5 for kind in OVERHEADS}}
    rows = [{"step": step, "samples": 4 * step, "loss": 0.5, **times} for step in (1, 2, 3)]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = {"sigma": [1.0], "loss": [0.5], "loss_average": [0.4], "grad_norm": [2.0]}
    folder.evaluation.write_text(json.dumps({"step": 2, "samples": 8, "clips": 4, **measured}) + "\n")
    folder.skipped.write_text('{"step": 2, "fault": "the loss is nan", "clips": ["a"]}\n')
    Quarantine(1.0, 9, folder.quarantine).add([Fault("a", "s.tar", "cut")], step=1, write=True)
    for _ in range(2):
        record_queued_restart(folder, 7, limit=9)
        acquire(folder.checkpoints, step=0)
    ended = {"kind": FINISHED, "rank": 0, "message": "", "restart_id": [0, 0]}
    (folder.logs / "outcome.json").write_text(json.dumps(ended))
    (tmp_path / "state.json").write_text(Progress(Cursor("set", 7), 3, 12).as_json())
    return folder


def restart(folder: RunFolder) -> None:
    """Read and repair all files, in the order of a restart of the run."""
    record_queued_restart(folder, 7, limit=9)
    JobOutcome.read(folder)
    Progress.read(folder.path / "state.json")
    folder.check_config_matches(CONFIG)
    restarts_damage(folder.checkpoints)
    acquire(folder.checkpoints, step=3)
    assert read_restarts(folder.checkpoints)[-1].step == 3
    folder.open(CONFIG, step=3)
    folder.metrics.touch()
    Quarantine(1.0, 9, folder.quarantine)
    Goodput.from_run_folder(folder)
    read_run(folder.path)


def damages(content: bytes) -> Iterator[bytes | None]:
    yield None
    yield b""
    yield bytes(len(content))
    drawn = random.Random(0)
    for _ in range(5):
        yield content[: drawn.randrange(len(content))]
        zeroed = drawn.randrange(len(content))
        yield content[:zeroed] + bytes(len(content) - zeroed)
        at = drawn.randrange(len(content))
        yield content[:at] + bytes([content[at] ^ 1 << drawn.randrange(8)]) + content[at + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_repaired_or_named(intact: RunFolder, name: str) -> None:
    contents = {path: path.read_bytes() for path in intact.path.rglob("*") if path.is_file()}
    file = intact.path / name
    for damage in damages(contents[file]):
        for path in [path for path in intact.path.rglob("*") if path.is_file()]:
            path.unlink()
        for path, content in contents.items():
            path.write_bytes(content)
        if damage is None:
            file.unlink()
        else:
            file.write_bytes(damage)
        try:
            restart(intact)
        except (ValueError, OSError) as error:
            assert name in NOT_REPAIRED and str(file) in str(error), (damage, error)
            continue
        restart(intact)
        assert RunFolder(intact.path).check_config_matches(CONFIG) is None
