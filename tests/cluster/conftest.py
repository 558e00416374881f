"""A real Slurm and a fake W&B server, once per test session; tests are skipped where these cannot run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
CONTROL = "10.77.0.1"
"""Address of the host that jobs are submitted from, in the cluster's own network."""


def missing() -> str | None:
    """Return why a cluster cannot run here; None if it can."""
    if os.geteuid() != 0:
        return "a test cluster needs root, for a network a node"
    programs = [name for name in ("slurmctld", "slurmd", "munged", "ip") if shutil.which(name) is None]
    if programs:
        return f"{', '.join(programs)} is not installed (apt-get install slurm-wlm munge iproute2)"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else None


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    """Poll `condition` until it is true; return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.2)
    return value


class Cluster:
    """A cluster of three nodes, one of them spare: jobs are submitted for two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "CLUSTER_DIR": str(folder),
            "CLUSTER_NODES": "3",
            "PYTHONPATH": str(ROOT),
            "SVD_DS_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
            "SVD_DS_JOB_OPTIONS": "--no-preflight",
        }

    def control(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run cluster.sh. Its daemons outlive it: a pipe as its output would stay open."""
        return subprocess.run([str(HERE / "cluster.sh"), *arguments], env=self.environment, check=True)

    def run(self, *command: str, **environment: str) -> str:
        """Run a command on the host that jobs are submitted from; return its output."""
        ended = subprocess.run(
            [str(HERE / "cluster.sh"), "exec", *command],
            env={**self.environment, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout + ended.stderr

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """Submit a job script on two nodes, one CPU rank each; return the id of the job."""
        shape = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
        output = f"--output={self.folder}/job-%j.out"
        printed = self.run(
            "sbatch", "--parsable", *shape, output, *options, script, *arguments, **environment
        )
        return printed.strip()

    def output(self, job: str) -> str:
        path = self.folder / f"job-{job}.out"
        return path.read_text() if path.exists() else ""

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", job)))

    def nodes(self, job: str) -> list[str]:
        """Return the nodes of a running job."""
        return self.run("scontrol", "show", "hostnames", self.job(job)["NodeList"]).split()

    def lose_a_node(self, job: str, index: int = -1) -> None:
        """Switch off one node of a running job, and on again once the job has restarted without it. Slurm
        kills processes of the job on a node that is switched on again."""
        node = self.nodes(job)[index]
        restarts = self.job(job)["Restarts"]
        self.control("kill", node)

        def has_restarted() -> bool:
            now = self.job(job)
            return now["JobState"] == "RUNNING" and now["Restarts"] != restarts

        wait_until(has_restarted, "the job to restart on other nodes")
        self.control("start", node)

    def run_on_node(self, node: str, *command: str) -> None:
        """Run a command in the mount namespace of a node."""
        first = (self.folder / "pid" / node).read_text().strip()
        inner = Path(f"/proc/{first}/task/{first}/children").read_text().split()[0]
        subprocess.run(["nsenter", f"--target={inner}", "--mount", *command], check=True)

    def wait(self, job: str, seconds: float = 240) -> dict[str, str]:
        """Wait for the end of a job; return its fields."""
        wait_until(lambda: self.job(job)["JobState"] in ENDED, f"the end of job {job}", seconds)
        return self.job(job)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.control("up")
        yield cluster
    finally:
        cluster.control("down")


class WandbServer:
    """The fake server, and `run_client`, which runs a command where the server can be reached."""

    def __init__(self, address: str, run_client: Callable[..., str], folder: Path) -> None:
        self.address = address
        self.run_client = run_client
        home = {name: str(folder) for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR")}
        self.environment = {
            **home,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "WANDB_BASE_URL": address,
            "WANDB_API_KEY": "k" * 40,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_MODE": "online",
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",
        }

    def ask(self, path: str) -> dict[str, Any]:
        """GET a path: state, or stop/RUN."""
        read = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode())"
        return json.loads(self.run_client(sys.executable, "-c", read, f"{self.address}/{path}"))

    def sweep(self, file: Path) -> str:
        """Register a sweep file; return its ENTITY/PROJECT/SWEEP."""
        printed = self.run_client("wandb", "sweep", str(file), **self.environment)
        return printed.split("wandb agent ")[1].split()[0]


def run_locally(*command: str, **environment: str) -> str:
    """Run a command on this machine; return its stdout and stderr."""
    ended = subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return ended.stdout + ended.stderr


def serve(
    run_client: Callable[..., str], host: str, command: list[str], folder: Path
) -> Iterator[WandbServer]:
    port_file = folder / "port"
    server = subprocess.Popen([*command, sys.executable, str(HERE / "wandb_server.py"), host, str(port_file)])
    try:
        wait_until(port_file.exists, "the fake W&B server", 30)
        yield WandbServer(f"http://{host}:{port_file.read_text()}", run_client, folder)
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def wandb_server(tmp_path: Path) -> Iterator[WandbServer]:
    """A server for clients on this machine."""
    yield from serve(run_locally, "127.0.0.1", [], tmp_path)


@pytest.fixture
def wandb_server_of_cluster(cluster: Cluster, tmp_path: Path) -> Iterator[WandbServer]:
    """A server for clients on the nodes of the cluster and on the host that jobs are submitted from."""
    command = [str(HERE / "cluster.sh"), "exec"]
    yield from serve(cluster.run, CONTROL, ["env", f"CLUSTER_DIR={cluster.folder}", *command], tmp_path)
