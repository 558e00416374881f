"""Check, before any rank of a job starts, that the run fits its GPUs."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace

from svd_ds.config import RunConfig
from svd_ds.plan.fit import FITS
from svd_ds.plan.hardware import GIB, GPUS, Cluster, Gpu, match_gpu
from svd_ds.plan.planner import DoesNotFitError, ProfileFn, make_plan

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
QUERY_TIMEOUT_S = 60.0


def query_gpu() -> Gpu:
    """Return the GPU of this machine; for an unknown model only its memory is right.

    Raises:
        OSError: the driver does not answer.
    """
    try:
        ended = subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise OSError(f"nvidia-smi has not answered in {QUERY_TIMEOUT_S:.0f} s") from None
    if ended.returncode:
        raise OSError(f"nvidia-smi: {(ended.stderr or ended.stdout).strip()}")
    return parse_gpu(ended.stdout.partition("\n")[0])


def parse_gpu(line: str) -> Gpu:
    """Return the GPU of a line of `QUERY`, such as "NVIDIA A100-SXM4-80GB, 81920".

    Raises:
        ValueError: the line has another form.
    """
    name, _, mib = line.rpartition(",")
    if not mib.strip().isdigit():
        raise ValueError(f"nvidia-smi reports {line!r}, which is not NAME, MEMORY")
    memory_gib = int(mib) / 1024
    known = match_gpu(name, memory_gib)
    if known is not None and abs(known.memory_gib - memory_gib) < 0.1 * memory_gib:
        return known
    # Only the memory decides whether the run fits.
    return replace(GPUS["a100-80"], name=name.strip(), memory_gib=memory_gib)


def check_fits(config: RunConfig, gpu: Gpu, ranks: int, gpus_per_node: int, profile_fn: ProfileFn) -> str:
    """Check that a run fits its GPUs.

    Returns:
        A sentence on the planned memory.

    Raises:
        DoesNotFitError: the tensors of a step need more memory than a GPU has; the message says what fits.
    """
    cluster = Cluster(gpu, ranks, gpus_per_node, gpu.node_network)
    try:
        plan = make_plan(config, cluster, profile_fn, [config.recompute])
        plan.check_fits()
    except DoesNotFitError:
        # Once more with every policy, to say what fits.
        plan = make_plan(config, cluster, profile_fn)
        plan.check_fits()
    memory = plan.peak.option.memory
    line = (
        f"plan: {memory.allocated / GIB:.1f} GiB of tensors, {memory.total / GIB:.1f} in all, of the "
        f"{gpu.memory_gib:.1f} GiB of {gpu.name}"
    )
    return line if plan.peak.option.verdict == FITS else f"warning: {line}: it may run out of memory"


class PlannedJob:
    """Plan of a job's run, made in a thread while the nodes are checked.

    A plan that fails must not stop the job: it is reported in a note.
    """

    def __init__(self, check: Callable[[], str]) -> None:
        """
        Args:
            check: calls `check_fits`.
        """
        self._line = ""
        self._refusal: DoesNotFitError | None = None
        self._thread = threading.Thread(target=self._run, args=(check,), name="plan", daemon=True)
        self._thread.start()

    def _run(self, check: Callable[[], str]) -> None:
        try:
            self._line = check()
        except DoesNotFitError as error:
            self._refusal = error
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self._line = f"note: the run starts without a plan of its memory: {reason}"

    def wait(self, is_stopped: Callable[[], bool]) -> str:
        """Wait for the plan, and return a sentence on it; empty if the job was asked to end meanwhile.

        Raises:
            DoesNotFitError: the run does not fit.
        """
        while self._thread.is_alive() and not is_stopped():
            self._thread.join(0.2)
        if self._refusal is not None:
            raise self._refusal
        return self._line
