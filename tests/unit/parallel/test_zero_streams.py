"""Order of the streams of ZeRO-3, with streams that note what waits for what."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from svd_ds.parallel.zero_streams import ZeroStreams
from tests.fake_streams import fake_streams


def test_shards_are_written_between_earlier_gathers_and_later_ones() -> None:
    calls: list[str] = []
    ordered, _ = fake_streams(calls)
    with ordered.writing_shards():
        calls.append("write")
    assert calls == ["compute waits for gather", "write", "gather waits for compute"]


def test_order_holds_behind_an_error() -> None:
    calls: list[str] = []
    ordered, _ = fake_streams(calls)
    with pytest.raises(OSError), ordered.writing_shards():
        raise OSError
    assert calls[-1] == "gather waits for compute"


def test_computation_waits_for_the_reduction_in_place_of_the_host() -> None:
    calls: list[str] = []
    ordered, zero = fake_streams(calls)
    zero.reduce_and_partition_stream.synchronize()
    ordered.let_host_run_ahead()
    zero.reduce_and_partition_stream.synchronize()
    assert calls == ["the host waits for reduce", "compute waits for reduce"]


def test_cpus_have_no_streams() -> None:
    offload = SimpleNamespace(_DeepSpeedZeRoOffload__allgather_stream=None)
    zero = SimpleNamespace(parameter_offload=offload, reduce_and_partition_stream=None)
    ordered = ZeroStreams(zero, lambda: pytest.fail("a CPU has no streams"))
    ordered.let_host_run_ahead()
    with ordered.writing_shards():
        pass
    assert zero.reduce_and_partition_stream is None
