"""Order between the streams of the GPU that ZeRO-3 uses. On CPUs there are no streams, and nothing to order.

The computation has its stream, and DeepSpeed one each for gathering shards and for reducing gradients.
DeepSpeed 0.19.8 lets the computation wait for the other two, and the reduction for the computation. It does
not let gathering wait for the computation, which writes the shards (the only wait is line 415 of
deepspeed/runtime/zero/partitioned_param_coordinator.py): it relies on the host waiting for the device
somewhere in between. Here the order is explicit, so that the host may run ahead of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class ZeroStreams:
    """Streams of one engine.

    Args:
        zero: DeepSpeed's ZeRO-3 optimiser.
        current_stream: returns the stream of the computation.
    """

    def __init__(self, zero: Any, current_stream: Callable[[], Any]) -> None:
        self._current = current_stream
        # Both are None on CPUs.
        self._gather = vars(zero.parameter_offload)["_DeepSpeedZeRoOffload__allgather_stream"]
        self._reduce = zero.reduce_and_partition_stream

    @contextmanager
    def writing_shards(self) -> Iterator[None]:
        """Let what is computed inside the context write shards: between earlier gathers and later ones."""
        if self._gather is None:
            yield
            return
        self._current().wait_stream(self._gather)
        try:
            yield
        finally:
            self._gather.wait_stream(self._current())

    def let_host_run_ahead(self) -> None:
        """Let the computation wait for the reduction after a backward pass, in place of the host.

        DeepSpeed calls `synchronize` there (deepspeed/runtime/zero/stage3.py, line 1414), and the device is
        idle while the host prepares the next forward pass. With an offloaded optimiser the host must wait,
        because it reads the gradients.
        """
        if self._reduce is not None:
            self._reduce.synchronize = lambda: self._current().wait_stream(self._reduce)
