"""Replacements of parts of ZeRO-3 in which DeepSpeed costs the host time for every parameter and rank.

DeepSpeed cuts each gradient into a slice for each rank, and joins each parameter from them, in Python: for
the UNet's 1,332 parameters on 64 ranks some 170,000 slices a micro-batch, which take longer than the GPU's
work (docs/benchmarks.md, "ZeRO-3 host cost"). Replaced are, with the same bits:

| DeepSpeed's | here |
| --- | --- |
| `all_gather_coalesced`, `AllGatherCoalescedHandle` | `_gather`, `_Gather`: one copy a parameter |
| `__avg_scatter_grads`, `reduce_scatter_coalesced` | `_reduce_scatter`: one copy a gradient |
| `_get_norm_groups`, which `step` computes anew | the norms of `Engine.gradient_norm` |
| `is_invalid_grad_norm`, by which `step` reads a norm | `finiteness_known`: the caller has read it |
| NVTX ranges around its functions | none |

They are replaced in one engine's objects, not in DeepSpeed's classes (but for the last two, which are
global), and only where DeepSpeed is a version in KNOWN, its source is unchanged, and an example has the same
bits. What goes over the network is the same, so a rank where DeepSpeed's own functions stay works together
with one where they are replaced. Quantised and secondary shards, several groups and offloaded parameters are
left to DeepSpeed; no setting of ours leads to them.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.comm import coalesced_collectives
from deepspeed.runtime.zero import partition_parameters, stage3
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus
from deepspeed.utils import nvtx
from torch import Tensor, nn

from svd_ds.parallel.shard_copies import cut, join, own_shards, shard_size

KNOWN = {"0.19.8": "de7b0ec530419f04"}
"""Version of DeepSpeed -> digest of the functions that are replaced, see `source_digest`."""
NOT_HANDLED = (
    "offload_param",
    "stage3_allgather_sequential",
    "stage3_use_all_reduce_for_fetch_params",
    "zero_hpz_partition_size",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
)
"""Settings of DeepSpeed with which its own functions stay."""
SCATTER = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
Optimizer = stage3.DeepSpeedZeroOptimizer_Stage3


def replace_host_loops(
    parameters: Iterable[nn.Parameter],
    zero: Any,
    settings: Iterable[str],
    group_norms: Callable[[], list[Tensor]],
) -> str | None:
    """Replace DeepSpeed's loops over parameters and ranks in an engine.

    Args:
        parameters: all parameters of the module, sharded.
        zero: DeepSpeed's ZeRO-3 optimiser.
        settings: names of the ZeRO settings in use.
        group_norms: returns the gradient norm of each parameter group, as `_get_norm_groups` of DeepSpeed.

    Returns:
        Why DeepSpeed's own functions stay; None if they are replaced.
    """
    parameters, settings = list(parameters), set(settings)
    if reason := _reason_against(parameters, zero, settings):
        return reason
    replaced: Any
    for replaced in parameters:
        replaced.all_gather_coalesced = partial(_gather, replaced.all_gather_coalesced)
    setattr(zero, SCATTER, partial(_reduce_scatter, zero))
    if "offload_optimizer" not in settings:
        # An offloaded optimiser clips on the host, with norms that DeepSpeed has there.
        zero._get_norm_groups = group_norms
    nvtx.enable_nvtx = False
    return None


@contextmanager
def finiteness_known(finite: bool) -> Iterator[None]:
    """Tell DeepSpeed's step whether the gradient is finite, so that it does not read the norm."""
    original = stage3.is_invalid_grad_norm
    stage3.is_invalid_grad_norm = lambda norm: not finite
    try:
        yield
    finally:
        stage3.is_invalid_grad_norm = original


def source_digest() -> str:
    """Return a digest of the source of all functions of DeepSpeed that are replaced.

    Raises:
        OSError: DeepSpeed is installed without its source.
    """
    functions = (
        partition_parameters.Init._convert_to_deepspeed_param,
        AllGatherCoalescedHandle.wait,
        coalesced_collectives.reduce_scatter_coalesced,
        getattr(Optimizer, SCATTER),
        Optimizer._get_norm_groups,
        Optimizer.get_grad_norm_direct,
        Optimizer.step,
        stage3.is_invalid_grad_norm,
    )
    source = "".join(inspect.getsource(_undecorated(function)) for function in functions)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _reason_against(parameters: Sequence[Any], zero: Any, settings: set[str]) -> str | None:
    version = deepspeed.__version__
    if version not in KNOWN:
        return f"DeepSpeed is {version}, and not {' or '.join(KNOWN)}"
    try:
        if source_digest() != KNOWN[version]:
            return f"DeepSpeed {version} has been changed"
    except OSError:
        return f"DeepSpeed {version} is installed without its source"
    if unknown := sorted(settings.intersection(NOT_HANDLED)):
        return f"{unknown[0]} is set"
    if zero.gradient_predivide_factor != 1.0 or zero.all2all_process_group is not None:
        return "gradients are divided or quantised"
    first = parameters[0]
    if any(p.ds_process_group is not first.ds_process_group for p in parameters):
        return "parameters are sharded over several groups"
    if len({p.ds_tensor.dtype for p in parameters}) > 1:
        return "parameters have several data types"
    ranks = first.ds_zero_partition_rank, first.ds_zero_partition_world_size
    device = first.ds_tensor.device
    if not all(_same_on_an_example(*ranks, dtype, device) for dtype in (torch.bfloat16, torch.float32)):
        return f"DeepSpeed {version} gives other bits"
    return None


class _Gather:
    """Gather under way: DeepSpeed's AllGatherCoalescedHandle, without quantisation and secondary shards."""

    def __init__(self, handle: Any, parameters: Sequence[Any], matrix: Tensor) -> None:
        self._handle, self._parameters, self._matrix = handle, parameters, matrix
        self._complete = False

    def wait(self, handle_dependency: bool = True) -> None:
        """Wait for the gather, and give the parameters their values."""
        if self._complete:
            return
        self._handle.wait()
        tensors = join(self._matrix, [parameter.ds_shape for parameter in self._parameters])
        for parameter, tensor in zip(self._parameters, tensors, strict=True):
            assert parameter.ds_status == ZeroParamStatus.INFLIGHT, parameter.ds_summary()
            parameter.data = tensor
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self._complete = True
        if get_accelerator().is_synchronized_device():
            return
        # The memory may be reused only after the copies. DeepSpeed says so of each slice of the one memory.
        if handle_dependency:
            self._matrix.record_stream(get_accelerator().current_stream())
        else:
            AllGatherCoalescedHandle.data_buffer.append([self._matrix])


@torch.no_grad()
def _gather(
    original: Callable[..., Any], parameters: Iterable[Any], safe_mode: bool = False, quantize: bool = False
) -> Any:
    """Begin to gather parameters; `original` is DeepSpeed's function."""
    parameters = sorted(parameters, key=lambda parameter: parameter.ds_id)
    if len(parameters) < 2 or safe_mode or quantize or parameters[0].ds_zero_partition_world_size == 1:
        # A single parameter is gathered in place. The others concern no engine of ours.
        return original(parameters, safe_mode=safe_mode, quantize=quantize)
    for parameter in parameters:
        assert parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE, parameter.ds_summary()
        parameter.ds_status = ZeroParamStatus.INFLIGHT
    first = parameters[0]
    shards = [parameter.ds_tensor for parameter in parameters]
    matrix = shards[0].new_empty(first.ds_zero_partition_world_size, sum(shard.ds_numel for shard in shards))
    own = matrix[first.ds_zero_partition_rank]
    torch.cat(shards, out=own)
    handle = partition_parameters._dist_allgather_fn(own, matrix.view(-1), first.ds_process_group)
    return _Gather(handle, parameters, matrix)


@torch.no_grad()
def _reduce_scatter(zero: Any, parameters: Sequence[Any], dtype: torch.dtype) -> list[Tensor]:
    """Average the gradients of parameters over the ranks, and return this rank's shard of each."""
    first = parameters[0]
    group, rank = first.ds_process_group, first.ds_zero_partition_rank
    num_ranks = first.ds_zero_partition_world_size
    matrix = cut([parameter.grad for parameter in parameters], num_ranks, dtype)
    matrix.div_(num_ranks)
    coalesced_collectives._torch_reduce_scatter_fn(matrix.view(-1), matrix[rank], group=group)
    own = matrix[rank].to(zero.gradient_accumulation_dtype)
    return own_shards(own, [parameter.ds_numel for parameter in parameters], rank, num_ranks)


def _same_on_an_example(rank: int, num_ranks: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether DeepSpeed's functions and those here move the same bits, without any communication."""
    shapes = [torch.Size(shape) for shape in ((7,), (num_ranks, 3), (1,), (5, num_ranks + 1), (3, 4, 5))]
    generator = torch.Generator(device).manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]
    sent, theirs = _their_scatter(tensors, rank, num_ranks)
    matrix = cut(tensors, num_ranks, dtype).div_(num_ranks)
    ours = own_shards(matrix[rank], [tensor.numel() for tensor in tensors], rank, num_ranks)
    same = all(torch.equal(x, y) for x, y in zip(theirs, ours, strict=True))
    # Joined, the matrices have no padding, which is undefined.
    pairs = zip(join(sent.view(num_ranks, -1), shapes), join(matrix, shapes), strict=True)
    same &= all(torch.equal(x, y) for x, y in pairs)
    pairs = zip(_their_join(matrix, shapes), join(matrix, shapes), strict=True)
    return same and all(torch.equal(x, y) and x.shape == y.shape for x, y in pairs)


def _their_scatter(tensors: list[Tensor], rank: int, num_ranks: int) -> tuple[Tensor, list[Tensor]]:
    """Return what DeepSpeed's reduce-scatter would send, and its result if other ranks sent zeros."""
    sent: list[Tensor] = []

    def send(sent_tensor: Tensor, received: Tensor, group: Any = None) -> None:
        sent.append(sent_tensor)

    function = _undecorated(coalesced_collectives.reduce_scatter_coalesced)
    ranks = SimpleNamespace(get_rank=lambda group: rank, get_world_size=lambda group: num_ranks)
    changed = {"dist": ranks, "_torch_reduce_scatter_fn": send}
    shards = FunctionType(function.__code__, function.__globals__ | changed)(tensors, None)
    return sent[0], shards


def _their_join(matrix: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return the tensors that DeepSpeed joins from a matrix of shards."""
    parameters = []
    for shape in shapes:
        shard = SimpleNamespace(ds_numel=shard_size(shape.numel(), len(matrix)), dtype=matrix.dtype)
        status = ZeroParamStatus.INFLIGHT
        parameters.append(
            SimpleNamespace(ds_tensor=shard, ds_numel=shape.numel(), ds_shape=shape, ds_status=status)
        )
    handle: Any = SimpleNamespace(wait=lambda: None)
    AllGatherCoalescedHandle(handle, parameters, list(matrix), len(matrix)).wait()
    return [parameter.data for parameter in parameters]


def _undecorated(function: Any) -> FunctionType:
    """Return the function inside DeepSpeed's and torch's decorators."""
    while function.__closure__ and (inner := inspect.getclosurevars(function).nonlocals.get("func")):
        function = inner
    return function
