"""The replacements of DeepSpeed's loops over ranks have its bits, and leave alone what they do not know."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svd_ds.parallel import engine as _engine  # chooses DeepSpeed's accelerator  # noqa: F401
from svd_ds.parallel import zero_host_cost
from svd_ds.parallel.shard_copies import cut, join, own_shards
from svd_ds.parallel.zero_host_cost import (
    KNOWN,
    SCATTER,
    AllGatherCoalescedHandle,
    ZeroParamStatus,
    finiteness_known,
    replace_host_loops,
    source_digest,
    stage3,
)
from tests.unit.parallel.test_shard_copies import NUM_RANKS, SHAPES, tensors_of

FP32 = torch.float32


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_gradients_are_cut_as_deepspeed_cuts_them(num_ranks: int, shapes: list[tuple[int, ...]]) -> None:
    for rank in {0, num_ranks // 2, num_ranks - 1}:
        for dtype, sum_dtype in ((FP32, FP32), (torch.bfloat16, FP32), (FP32, torch.bfloat16)):
            gradients = tensors_of(shapes, dtype)
            matrix = cut([x.clone() for x in gradients], num_ranks, sum_dtype).div_(num_ranks)
            ours = own_shards(matrix[rank], [x.numel() for x in gradients], rank, num_ranks)
            copies = [x.to(sum_dtype, copy=True) for x in gradients]
            sent, theirs = zero_host_cost._their_scatter(copies, rank, num_ranks)
            assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
            sizes = [x.shape for x in gradients]
            pairs = zip(join(matrix, sizes), join(sent.view(num_ranks, -1), sizes), strict=True)
            assert all(torch.equal(x, y) for x, y in pairs), "what other ranks get"


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_parameters_are_joined_as_deepspeed_joins_them(num_ranks: int, shapes: list[tuple[int, ...]]) -> None:
    for dtype in (FP32, torch.bfloat16):
        tensors = tensors_of(shapes, dtype)
        matrix, sizes = cut(tensors, num_ranks, dtype), [tensor.shape for tensor in tensors]
        pairs = zip(join(matrix, sizes), zero_host_cost._their_join(matrix, sizes), strict=True)
        assert all(torch.equal(x, y) and x.shape == y.shape for x, y in pairs)


def test_installed_deepspeed_is_the_known_one() -> None:
    assert KNOWN[zero_host_cost.deepspeed.__version__] == source_digest()


class Sharded:
    """Parameter as DeepSpeed shards it, on rank 1 of 3."""

    def __init__(self, ds_id: int, shape: tuple[int, ...], dtype: torch.dtype = FP32) -> None:
        self.ds_id, self.ds_shape, self.ds_numel = ds_id, torch.Size(shape), torch.Size(shape).numel()
        shard: Any = torch.full((-(-self.ds_numel // 3),), float(ds_id), dtype=dtype)
        shard.ds_numel = shard.numel()
        self.ds_tensor = shard
        self.ds_process_group = GROUP
        self.ds_zero_partition_rank, self.ds_zero_partition_world_size = 1, 3
        self.ds_status = ZeroParamStatus.NOT_AVAILABLE
        self.original_calls: list[Any] = []
        self.all_gather_coalesced = self.original

    def original(self, parameters: Any, safe_mode: bool = False, quantize: bool = False) -> str:
        self.original_calls.append((list(parameters), safe_mode, quantize))
        return "DeepSpeed's handle"

    def ds_summary(self) -> str:
        return f"parameter {self.ds_id}"


GROUP: Any = object()


@pytest.fixture
def parameters() -> list[Any]:
    return [Sharded(2, (4, 5)), Sharded(1, (7,)), Sharded(3, (3,))]


@pytest.fixture(autouse=True)
def _nvtx() -> Iterator[None]:
    """Ranges are a global setting of DeepSpeed."""
    before = zero_host_cost.nvtx.enable_nvtx
    yield
    zero_host_cost.nvtx.enable_nvtx = before


def optimizer(**changes: Any) -> Any:
    plain = {"gradient_predivide_factor": 1.0, "all2all_process_group": None}
    return SimpleNamespace(**plain | {"gradient_accumulation_dtype": FP32} | changes)


def replace(parameters: list[Any], zero: Any, *settings: str) -> str | None:
    return replace_host_loops(parameters, zero, settings, list)


@pytest.mark.parametrize(
    ("settings", "changes", "reason"),
    [
        (("zero_quantized_weights",), {}, "zero_quantized_weights is set"),
        (("offload_optimizer", "zero_hpz_partition_size"), {}, "zero_hpz_partition_size is set"),
        ((), {"gradient_predivide_factor": 2.0}, "gradients are divided or quantised"),
        ((), {"all2all_process_group": {}}, "gradients are divided or quantised"),
    ],
)
def test_settings_that_are_not_handled_are_left_to_deepspeed(
    parameters: list[Any], settings: tuple[str, ...], changes: dict[str, Any], reason: str
) -> None:
    zero = optimizer(**changes)
    assert replace(parameters, zero, *settings) == reason
    assert all(parameter.all_gather_coalesced == parameter.original for parameter in parameters)
    assert not hasattr(zero, SCATTER)


def test_other_versions_and_changed_sources_are_left_to_deepspeed(
    parameters: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(zero_host_cost.deepspeed, "__version__", "0.20.0")
        assert replace(parameters, optimizer()) == "DeepSpeed is 0.20.0, and not 0.19.8"
    with monkeypatch.context() as patch:
        patch.setattr(stage3, "is_invalid_grad_norm", lambda norm: False)
        assert replace(parameters, optimizer()) == "DeepSpeed 0.19.8 has been changed"
    with monkeypatch.context() as patch:

        def no_source(function: Any) -> str:
            raise OSError

        patch.setattr(zero_host_cost.inspect, "getsource", no_source)
        assert replace(parameters, optimizer()) == "DeepSpeed 0.19.8 is installed without its source"
    with monkeypatch.context() as patch:
        patch.setattr(zero_host_cost, "join", lambda matrix, shapes: [x + 1 for x in join(matrix, shapes)])
        assert replace(parameters, optimizer()) == "DeepSpeed 0.19.8 gives other bits"
    assert replace(parameters, optimizer()) is None


def test_parameters_of_several_groups_or_data_types_are_left_to_deepspeed(parameters: list[Any]) -> None:
    half = [*parameters, Sharded(4, (2,), torch.bfloat16)]
    assert replace(half, optimizer()) == "parameters have several data types"
    parameters[0].ds_process_group = object()
    assert replace(parameters, optimizer()) == "parameters are sharded over several groups"


def test_example_draws_nothing_from_the_global_generator(parameters: list[Any]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert replace(parameters, optimizer()) is None
    assert torch.equal(before, torch.get_rng_state())


def gather(parameters: list[Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begin a gather in which rank r has r times the values of rank 1."""

    def all_gather(own: torch.Tensor, flat: torch.Tensor, group: Any) -> Any:
        assert group is GROUP
        rows = flat.view(3, -1)
        assert own.data_ptr() == rows[1].data_ptr()
        rows[0], rows[2] = 0 * own, 2 * own
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(zero_host_cost.partition_parameters, "_dist_allgather_fn", all_gather)
    return parameters[0].all_gather_coalesced(parameters, quantize=False)


def test_gathered_parameters_are_the_shards_of_all_ranks(
    parameters: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert replace(parameters, optimizer()) is None
    handle = gather(parameters, monkeypatch)
    assert all(parameter.ds_status == ZeroParamStatus.INFLIGHT for parameter in parameters)
    handle.wait()
    handle.wait()
    for parameter in parameters:
        assert parameter.ds_status == ZeroParamStatus.AVAILABLE
        n = parameter.ds_tensor.numel()
        values = [rank * parameter.ds_id for rank in range(3) for _ in range(n)][: parameter.ds_numel]
        assert parameter.data.reshape(-1).tolist() == values
        assert parameter.data.shape == parameter.ds_shape
    assert not parameters[0].original_calls


def test_memory_of_a_gather_is_kept_for_the_stream_that_copies_it(
    parameters: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSpeed does for each slice: a call on CUDA, or a reference where the caller waits."""
    recorded: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(stream))
    assert replace(parameters, optimizer()) is None
    gpu = SimpleNamespace(is_synchronized_device=lambda: False, current_stream=lambda: "stream")
    monkeypatch.setattr(zero_host_cost, "get_accelerator", lambda: gpu)
    monkeypatch.setattr(AllGatherCoalescedHandle, "data_buffer", [])
    gather(parameters, monkeypatch).wait()
    assert recorded == ["stream"] and AllGatherCoalescedHandle.data_buffer == []
    for parameter in parameters:
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
    gather(parameters, monkeypatch).wait(handle_dependency=False)
    assert recorded == ["stream"] and len(AllGatherCoalescedHandle.data_buffer) == 1


def test_single_parameters_and_quantised_gathers_are_left_to_deepspeed(parameters: list[Any]) -> None:
    assert replace(parameters, optimizer()) is None
    first = parameters[0]
    assert first.all_gather_coalesced([first]) == "DeepSpeed's handle"
    assert first.all_gather_coalesced(parameters, quantize=True) == "DeepSpeed's handle"
    assert first.all_gather_coalesced(parameters, safe_mode=True) == "DeepSpeed's handle"
    ordered = sorted(parameters, key=lambda parameter: parameter.ds_id)
    assert first.original_calls == [([first], False, False), (ordered, False, True), (ordered, True, False)]


def test_offloaded_optimizer_keeps_deepspeeds_norms(parameters: list[Any]) -> None:
    zero, offloaded = optimizer(), optimizer()
    assert replace(parameters, zero) is None and hasattr(zero, "_get_norm_groups")
    assert replace(parameters, offloaded, "offload_optimizer") is None
    assert hasattr(offloaded, SCATTER) and not hasattr(offloaded, "_get_norm_groups")


def test_answer_about_the_norm_holds_inside_the_context_alone() -> None:
    original, norm = stage3.is_invalid_grad_norm, torch.tensor(1.0)
    with finiteness_known(False):
        assert stage3.is_invalid_grad_norm(norm)
    with finiteness_known(True):
        assert not stage3.is_invalid_grad_norm(norm)
    assert stage3.is_invalid_grad_norm is original
