from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from svd_ds.training import tracker as module
from svd_ds.training.evaluate import Measured
from svd_ds.training.folder import RunFolder
from svd_ds.training.metrics import LoggerConfig, Metrics, StepMetrics
from svd_ds.training.tracker import Tracker, open_tracker
from svd_ds.training.usage import WAITS, Speed


class Recorder:
    """Stands for wandb's Run."""

    def __init__(self) -> None:
        self.axes: dict[str, str | None] = {}
        self.rows: list[dict[str, Any]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.rows.append({"exit": exit_code})


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr("svd_ds.training.metrics.open_tracker", lambda *_: Tracker(found, pytest.fail))
    return found


def test_every_row_is_told_at_our_step(recorder: Recorder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({}, step=0)
    numbers = StepMetrics(3, 24, 0.5, 1e-3, 1.0, 4.0, 2.0, dict.fromkeys(WAITS, 0.25), terms={"lpips": 0.1})
    tags = {"a": "spatial", "b": "temporal"}
    with Metrics(folder, LoggerConfig(), {}, 5, 0, Speed(1e12, 1e13), tags) as metrics:
        metrics.log(numbers)
        metrics.log_evaluation(3, 24, Measured("set", 4, [1.0], [0.5], [0.6], [2.0], [0.5, 0.7], [2.0, 3.0]))
        metrics.log_weights(3, {"a": torch.arange(100.0), "b": torch.ones(3), "x.lora.b": torch.ones(2)})
    assert recorder.axes == {"train/step": None, "*": "train/step"}
    step, evaluation, weights, end = recorder.rows
    assert {row["train/step"] for row in recorder.rows[:3]} == {3}
    assert step["train/data_s"] == 0.25 and step["train/lpips"] == 0.1
    assert step["train/mfu"] == pytest.approx(0.4)
    assert step["train/memory_gib"] > 0
    shares = [share for name, share in step.items() if name.startswith("train/goodput/")]
    assert len(shares) == 6
    assert evaluation["evaluation/loss/sigma-0"] == 0.5 and evaluation["evaluation/loss/frame-1"] == 0.7
    counts = {name: sum(it.histogram) for name, it in weights.items() if name != "train/step"}
    assert counts == {"weights/spatial": 100, "weights/temporal": 3, "weights/adapter": 2}
    assert end == {"exit": 0}


def test_a_run_that_fails_says_so(recorder: Recorder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({}, step=0)
    with pytest.raises(RuntimeError), Metrics(folder, LoggerConfig(), {}, 5, 0):
        raise RuntimeError("lost")
    assert recorder.rows == [{"exit": 1}]


# --- the real client, and a server that is there, leaves, or never was

SERVER = Path(__file__).parents[2] / "cluster" / "wandb_server.py"


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    """A folder for a run of W&B's client, which knows nothing of other tests', and its patience short."""
    wandb.teardown()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(module, "START_S", 3)
    monkeypatch.setattr(module, "FINISH_S", 2)
    folder = RunFolder(tmp_path / "run")
    folder.open({}, step=0)
    yield folder
    wandb.teardown()


@pytest.fixture
def server(client: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen]:
    """The stand-in, where the client looks for W&B."""
    port_file = tmp_path / "port"
    process = subprocess.Popen([sys.executable, str(SERVER), "127.0.0.1", str(port_file)])
    while not port_file.exists():
        assert process.poll() is None
        time.sleep(0.05)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port_file.read_text()}")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    yield process
    process.kill()
    process.wait()


def opened(folder: RunFolder, mode: str, told: list[str]) -> Tracker | None:
    return open_tracker(folder, mode, "p", None, {"a": 1}, told.append, lambda: told.append("stop"))


@pytest.mark.slow
def test_a_run_that_is_stopped_in_wandb_is_asked_and_not_interrupted(
    client: RunFolder, server: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")
    told: list[str] = []
    tracker = opened(client, "auto", told)
    assert tracker is not None
    urllib.request.urlopen(f"{os.environ['WANDB_BASE_URL']}/stop/{tracker.run.id}")
    deadline = time.monotonic() + 60
    while not told:
        assert time.monotonic() < deadline
        tracker.log({"step": 1})
        time.sleep(0.2)
    tracker.finish(failed=False)
    assert told == ["stop"]


@pytest.mark.slow
def test_a_server_that_leaves_holds_the_end_up_no_longer_than_it_may(
    client: RunFolder, server: subprocess.Popen
) -> None:
    told: list[str] = []
    tracker = opened(client, "auto", told)
    assert tracker is not None and not tracker.run.offline
    tracker.log({"step": 1, "loss": 0.5})
    server.kill()
    tracker.log({"step": 2, "loss": 0.5})
    started = time.monotonic()
    tracker.finish(failed=False)
    assert time.monotonic() - started < 10
    assert len(told) == 1 and "warning: W&B is lost (TimeoutError: " in told[0], told


def test_a_client_that_dies_is_told_once_and_training_goes_on(client: RunFolder) -> None:
    told: list[str] = []
    tracker = opened(client, "offline", told)
    assert tracker is not None
    for core in core_processes():
        os.kill(core, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not told:
        assert time.monotonic() < deadline
        tracker.log({"step": 1})
    tracker.log_evaluation(3, Measured("set", 4, [1.0], [0.5], [0.6], [2.0], [0.5, 0.7], [2.0, 3.0]))
    tracker.finish(failed=False)
    assert len(told) == 1 and "warning: W&B is lost (ConnectionResetError: " in told[0], told


def core_processes() -> list[int]:
    """Of W&B's client, which are children of this process."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    found = [int(child) for child in children if "wandb-core" in Path(f"/proc/{child}/comm").read_text()]
    assert found
    return found


@pytest.mark.parametrize("key", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_where_it_cannot_be_online_it_is_offline(
    key: bool, client: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    told: list[str] = []
    tracker = opened(client, "online", told)
    assert tracker is not None and tracker.run.offline
    tracker.log({"step": 1})
    tracker.finish(failed=False)
    assert len(list(client.path.glob("wandb/offline-run-*"))) == 1
    assert len(told) == 1 and "warning: W&B cannot be used online (" in told[0], told
    assert told[0].endswith("this run is logged offline in its folder wandb/")


def test_where_it_cannot_be_at_all_a_run_goes_on(client: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(**_: object) -> None:
        raise wandb.errors.errors.WandbCoreNotAvailableError("no binary")

    monkeypatch.setattr(wandb, "init", absent)
    told: list[str] = []
    assert opened(client, "online", told) is None
    assert ["no binary" in line for line in told] == [True, True]


def test_a_mode_that_is_none_is_refused(client: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "onlin")
    for mode in ("auto", "offline"):
        with pytest.raises(ValueError, match=r"WANDB_MODE is 'onlin': choose online, offline, disabled"):
            opened(client, mode, [])
