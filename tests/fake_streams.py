"""Streams that note what waits for what, in place of a GPU's."""

from __future__ import annotations

from types import SimpleNamespace

from svd_ds.parallel.zero_streams import ZeroStreams


class FakeStream:
    """Stream that notes its calls in a list which it shares with others."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def wait_stream(self, other: FakeStream) -> None:
        self.calls.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.calls.append(f"the host waits for {self.name}")


def fake_streams(calls: list[str]) -> tuple[ZeroStreams, SimpleNamespace]:
    """Return streams that note their calls, and what stands for DeepSpeed's ZeRO-3 optimiser."""
    gather, reduce, compute = (FakeStream(name, calls) for name in ("gather", "reduce", "compute"))
    offload = SimpleNamespace(_DeepSpeedZeRoOffload__allgather_stream=gather)
    zero = SimpleNamespace(parameter_offload=offload, reduce_and_partition_stream=reduce)
    return ZeroStreams(zero, lambda: compute), zero
