"""Logging to W&B, with a recorder and with the real client."""

from __future__ import annotations

import os
import signal
import socket
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

from svd_ds.run_folder import RunFolder
from svd_ds.training import tracker as module
from svd_ds.training.evaluate import EvalResult
from svd_ds.training.fault_cause import FaultCause
from svd_ds.training.metrics import LoggerConfig, Metrics
from svd_ds.training.null_metrics import StepMetrics
from svd_ds.training.tracker import Tracker, open_tracker
from svd_ds.training.usage import OVERHEADS, MfuCounter


class Recorder:
    """Stub of wandb's Run."""

    def __init__(self) -> None:
        self.axes: dict[str, str | None] = {}
        self.rows: list[dict[str, Any]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def alert(self, title: str, text: str) -> None:
        self.rows.append({title: text})

    def finish(self, exit_code: int) -> None:
        self.rows.append({"exit": exit_code})


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr("svd_ds.training.metrics.open_tracker", lambda *_: Tracker(found, pytest.fail))
    return found


def test_every_row_is_logged_at_our_step(recorder: Recorder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({}, step=0)
    numbers = StepMetrics(
        3, 24, 0.5, 1e-3, 1.0, 4.0, 2.0, dict.fromkeys(OVERHEADS, 0.25), terms={"lpips": 0.1}
    )
    tags = {"a": "spatial", "b": "temporal"}
    with Metrics(folder, LoggerConfig(), {}, 5, 0, MfuCounter(1e12, 1e13), tags) as metrics:
        metrics.log(numbers)
        metrics.log_evaluation(
            3, 24, EvalResult("set", 4, [1.0], [0.5], [0.6], [2.0], [0.5, 0.7], [2.0, 3.0])
        )
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


def test_failing_hardware_is_an_alert_and_bad_data_is_not(recorder: Recorder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({}, step=0)
    message = "rank 1 on node7 computed a loss of nan, then 0.5, from the same clips"
    with Metrics(folder, LoggerConfig(), {}, 5, 0) as metrics:
        metrics.log_fault(
            3, "the loss is nan", ["a"], FaultCause(False, "computing it again gives the same numbers")
        )
        metrics.log_fault(4, "the loss is nan", ["a"], FaultCause(True, message, {"node7": ""}), taken=True)
    assert recorder.rows == [{"failing hardware": f"step 4: the loss is nan; {message}"}, {"exit": 0}]


def test_failed_run_has_exit_code_1(recorder: Recorder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({}, step=0)
    with pytest.raises(RuntimeError), Metrics(folder, LoggerConfig(), {}, 5, 0):
        raise RuntimeError("lost")
    assert recorder.rows == [{"exit": 1}]


# --- the real client, with a server that answers, dies, or does not exist

SERVER = Path(__file__).parents[2] / "cluster" / "wandb_server.py"


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    """Run folder for W&B's client, isolated from other tests, with short timeouts."""
    wandb.teardown()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(module, "INIT_TIMEOUT_S", 3)
    monkeypatch.setattr(module, "FINISH_TIMEOUT_S", 2)
    folder = RunFolder(tmp_path / "run")
    folder.open({}, step=0)
    yield folder
    wandb.teardown()


@pytest.fixture
def server(client: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen]:
    """Stand-in for the W&B server, with the client configured for it."""
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


def opened(folder: RunFolder, mode: str, lines: list[str]) -> Tracker | None:
    return open_tracker(folder, mode, "p", None, {"a": 1}, lines.append, lambda: lines.append("stop"))


@pytest.mark.slow
def test_run_stopped_in_wandb_is_asked_to_stop_and_not_interrupted(
    client: RunFolder, server: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")
    lines: list[str] = []
    tracker = opened(client, "auto", lines)
    assert tracker is not None
    urllib.request.urlopen(f"{os.environ['WANDB_BASE_URL']}/stop/{tracker.run.id}")
    deadline = time.monotonic() + 60
    while not lines:
        assert time.monotonic() < deadline
        tracker.log({"step": 1})
        time.sleep(0.2)
    tracker.finish(failed=False)
    assert lines == ["stop"]


@pytest.mark.slow
def test_dead_server_delays_the_end_at_most_by_the_timeout(
    client: RunFolder, server: subprocess.Popen
) -> None:
    lines: list[str] = []
    tracker = opened(client, "auto", lines)
    assert tracker is not None and not tracker.run.offline
    tracker.log({"step": 1, "loss": 0.5})
    server.kill()
    tracker.log({"step": 2, "loss": 0.5})
    started = time.monotonic()
    tracker.finish(failed=False)
    assert time.monotonic() - started < 10
    assert len(lines) == 1 and "warning: W&B is lost (TimeoutError: " in lines[0], lines


def test_dead_client_is_reported_once_and_training_continues(client: RunFolder) -> None:
    lines: list[str] = []
    tracker = opened(client, "offline", lines)
    assert tracker is not None
    for core in core_processes():
        os.kill(core, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not lines:
        assert time.monotonic() < deadline
        tracker.log({"step": 1})
    tracker.log_evaluation(3, EvalResult("set", 4, [1.0], [0.5], [0.6], [2.0], [0.5, 0.7], [2.0, 3.0]))
    tracker.finish(failed=False)
    assert len(lines) == 1 and "warning: W&B is lost (ConnectionResetError: " in lines[0], lines


def core_processes() -> list[int]:
    """Return the ids of the processes of W&B's client, children of this process."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    found = [int(child) for child in children if "wandb-core" in Path(f"/proc/{child}/comm").read_text()]
    assert found
    return found


@pytest.mark.parametrize("key", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_run_is_offline_if_it_cannot_be_online(
    key: bool, client: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    lines: list[str] = []
    tracker = opened(client, "online", lines)
    assert tracker is not None and tracker.run.offline
    tracker.log({"step": 1})
    tracker.finish(failed=False)
    assert len(list(client.path.glob("wandb/offline-run-*"))) == 1
    assert len(lines) == 1 and "warning: W&B cannot be used online (" in lines[0], lines
    assert lines[0].endswith("this run is logged offline in its folder wandb/")


def test_run_continues_without_wandb(client: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(**_: object) -> None:
        raise wandb.errors.errors.WandbCoreNotAvailableError("no binary")

    monkeypatch.setattr(wandb, "init", absent)
    lines: list[str] = []
    assert opened(client, "online", lines) is None
    assert ["no binary" in line for line in lines] == [True, True]


def test_unknown_wandb_mode_is_refused(client: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "onlin")
    for mode in ("auto", "offline"):
        with pytest.raises(
            ValueError, match=r"WANDB_MODE is 'onlin': it must be one of online, offline, disabled"
        ):
            opened(client, mode, [])


# --- credentials, as the client finds them

KEY = "a" * 40


def netrc_entry(path: Path, machine: str, mode: int = 0o600) -> None:
    path.write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
    path.chmod(mode)


@pytest.fixture
def home(tmp_path: Path, client: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Home folder without credentials; any network connection fails the test."""
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".config"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / ".config/wandb"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    return tmp_path


def settings_file(home: Path, **values: str) -> None:
    path = home / ".config/wandb/settings"
    path.parent.mkdir(parents=True)
    path.write_text("".join(["[default]\n", *(f"{name} = {value}\n" for name, value in values.items())]))


@pytest.mark.parametrize("machine", ["api.wandb.ai", "api.forge.coreweave.com"])
@pytest.mark.parametrize("mode", [0o600, 0o644])
@pytest.mark.parametrize("name", [".netrc", "secrets"])
def test_key_in_a_netrc_file_means_online(
    home: Path, monkeypatch: pytest.MonkeyPatch, machine: str, mode: int, name: str
) -> None:
    netrc_entry(home / name, machine, mode)
    if name != ".netrc":
        monkeypatch.setenv("NETRC", str(home / name))
    assert module._resolve_mode("auto") == "online"


@pytest.mark.parametrize("url", ["http://127.0.0.1:8099", "https://wandb.example.org", "http://host:80/"])
def test_key_of_an_own_server_means_online_only_there(
    home: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    netrc_entry(home / ".netrc", url.removesuffix("/").partition("//")[2])
    assert module._resolve_mode("auto") == "offline"
    wandb.teardown()
    monkeypatch.setenv("WANDB_BASE_URL", url)
    assert module._resolve_mode("auto") == "online"


def test_server_of_the_settings_file_is_used(home: Path) -> None:
    settings_file(home, base_url="http://127.0.0.1:8099")
    netrc_entry(home / ".netrc", "127.0.0.1:8099")
    assert module._resolve_mode("auto") == "online"


def test_wandb_offline_in_the_settings_file_is_respected(home: Path) -> None:
    settings_file(home, mode="offline")
    netrc_entry(home / ".netrc", "api.wandb.ai")
    assert module._resolve_mode("auto") == "offline"


def test_key_in_the_environment_means_online(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._resolve_mode("auto") == "offline"
    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    assert module._resolve_mode("auto") == "online", "wandb.init reports the invalid key"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert module._resolve_mode("auto") == "online"


@pytest.mark.parametrize("content", ["", "machine\n", "machine api.wandb.ai login user\n", "\0\0"])
def test_netrc_file_without_a_key_means_offline(home: Path, content: str) -> None:
    (home / ".netrc").write_text(content)
    assert module._resolve_mode("auto") == "offline"


def test_status_of_an_offline_run_has_the_sync_command(client: RunFolder) -> None:
    with Metrics(client, LoggerConfig(wandb="offline"), {}, 5, 0) as metrics:
        status = metrics.wandb_status()
        (folder,) = client.path.glob("wandb/offline-run-*")
        assert status == f"W&B: offline; after `wandb login`, `wandb sync {folder}` uploads it"
    with Metrics(client, LoggerConfig(wandb="disabled"), {}, 5, 0) as metrics:
        assert metrics.wandb_status() == "W&B: disabled"


def test_status_of_an_online_run_has_its_url() -> None:
    run = Recorder()
    run.offline, run.url = False, "https://wandb.example.org/me/p/runs/1"
    assert Tracker(run, pytest.fail).status() == "W&B: online, https://wandb.example.org/me/p/runs/1"


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff\xfe", b"a b", b"x" * 200, b"../up"])
@pytest.mark.parametrize("known", [False, True])
def test_damaged_run_id_is_recovered(client: RunFolder, content: bytes, known: bool) -> None:
    (client.logs / "wandb-run-id").write_bytes(content)
    if known:
        for name in ("run-20260101_000000-first", "offline-run-20260102_000000-second", "latest-run"):
            (client.path / "wandb" / name).mkdir(parents=True)
    lines: list[str] = []
    found = module._run_id(client, lines.append)
    assert (found == "second") == known
    assert "wandb-run-id is damaged" in lines[0] and "wandb-run-id.damaged-1" in lines[0]
    assert module._run_id(client, pytest.fail) == found
