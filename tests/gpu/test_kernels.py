"""Attention backends and custom layers on a GPU agree with float64 in values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from svd_ds.model.layers import choose_kernels
from svd_ds.model.ops.attention import (
    FLASH,
    KERNELS,
    MAX_BATCH,
    MAX_SHORT_KEYS,
    attention,
    self_attention,
    unavailable,
)
from svd_ds.model.ops.fused import conv, geglu, group_norm_silu, triton_installed
from svd_ds.model.ops.trial import FUSED, KernelSettings, choose, run_trials
from svd_ds.model.unet import UNet, UNetConfig
from svd_ds.parallel.gpu_settings import configure_gpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Norm of the difference over norm."""
SHAPES = {
    "pixels of a frame": ((4, 1536, 5, 64), 1536),
    "text": ((2, 21504, 5, 64), 77),
    "frames of a pixel": ((2, 1536, 14, 5, 64), 14),
    "two frames": ((1, 96, 2, 2, 32), 2),
    "a batch past the limit": ((MAX_BATCH + 9, 8, 1, 64), 8),
}
NORMS = {
    "frames at 320x576": (14, 40 * 72, 320),
    "a clip at 576x1024": (1, 14 * 72 * 128, 320),
    "joined with a skip": (14, 20 * 36, 1920),
    "the lowest level": (28, 5 * 9, 2560),
    "a clip at the lowest level": (2, 14 * 5 * 9, 1280),
}
"""Shapes in the released network: frames or clips, positions, channels."""


BACKENDS = [*KERNELS, "triton"]
GPU = torch.device("cuda", 0)


def skip_unless_it_runs(backend: str, dtype: torch.dtype) -> None:
    """Skip a backend that is not installed, or is made for other GPUs."""
    if reason := unavailable(backend, GPU, dtype):
        pytest.skip(f"{backend} {reason}")
    if backend == "flash_attn_3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("flash_attn_3 is for Hopper")


@pytest.fixture(params=["triton", "torch"])
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and not triton_installed():
        pytest.skip("Triton is not installed")
    return request.param


def assert_agrees(run: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> None:
    """`run` on the GPU in `dtype` against `run` in float64: the result and every gradient."""
    inputs = [tensor.to("cuda", dtype) for tensor in inputs]
    found, wanted = (
        [tensor.to(precision).requires_grad_() for tensor in inputs] for precision in (dtype, torch.float64)
    )
    ours, exact = run(*found), run(*wanted)
    gradient = torch.randn_like(ours)
    pairs = zip(
        [ours, *torch.autograd.grad(ours, found, gradient)],
        [exact, *torch.autograd.grad(exact, wanted, gradient.double())],
        strict=True,
    )
    for number, (one, other) in enumerate(pairs):
        error = ((one.double() - other).norm() / other.norm()).item()
        assert error < TOLERANCE[dtype], (number, error)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_agrees_with_float64(backend: str, shape: str, dtype: torch.dtype) -> None:
    skip_unless_it_runs(backend, dtype)
    queries, num_keys = SHAPES[shape]
    if backend == "triton" and not queries[-3] == num_keys <= MAX_SHORT_KEYS:
        pytest.skip("triton takes few tokens alone")
    keys = (*queries[:-3], num_keys, *queries[-2:])

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, "reference" if q.dtype == torch.float64 else backend)

    assert_agrees(run, [torch.randn(queries), torch.randn(keys), torch.randn(keys)], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_self_attention_of_a_projection_agrees_with_float64(backend: str, dtype: torch.dtype) -> None:
    skip_unless_it_runs(backend, dtype)

    def run(qkv: Tensor) -> Tensor:
        # Clips, frames and pixels: attention over time reads them through a transposed view.
        return self_attention(qkv.transpose(1, 2), "reference" if qkv.dtype == torch.float64 else backend)

    assert_agrees(run, [torch.randn(2, 14, 96, 3, 5, 64)], dtype)


@pytest.fixture
def _deterministic() -> Iterator[None]:
    configure_gpu(GPU, deterministic=True, fixed_shapes=True)
    yield
    configure_gpu(GPU, deterministic=False, fixed_shapes=False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_attention_gives_the_same_bits(backend: str) -> None:
    """Many blocks of keys add to each gradient of the queries: without determinism their order varies."""
    skip_unless_it_runs(backend, torch.bfloat16)
    tokens = 14 if backend == "triton" else 2304
    qkv = torch.randn(4, tokens, 3, 5, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    gradient = torch.randn(4, tokens, 5, 64, dtype=torch.bfloat16, device="cuda")
    results = []
    for _ in range(4):
        out = self_attention(qkv, backend)
        results.append((out, *torch.autograd.grad(out, qkv, gradient)))
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("_deterministic")
def test_deterministic_network_gives_the_same_bits(kernels: str) -> None:
    """No operation of the network is refused by torch.use_deterministic_algorithms."""
    config = UNetConfig(widths=(64, 128), attention_levels=(True, True), num_layers=1, context_width=64)
    with torch.device("cuda"):
        unet = UNet(config).bfloat16()
        inputs = (torch.randn(2, 14, 8, 32, 48), torch.randn(2), torch.randn(2, 77, 64), torch.rand(2, 3))
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    choose_kernels(unet, kernels)
    results = []
    for _ in range(2):
        unet.zero_grad()
        y = unet(*inputs)
        y.square().sum().backward()
        results.append([y.detach(), *(parameter.grad for parameter in unet.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_kernels_of_auto_pass_their_trials(dtype: torch.dtype) -> None:
    settings = KernelSettings("auto", {"model.spatial_attention": "auto"}, head_width=64)
    report = run_trials(settings, GPU, dtype)
    assert set(report) - set(FLASH) == {FUSED, "triton", "sdpa"}
    assert not any(report.values()), report
    assert choose(settings, [("here", report)]).kernels == "triton"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", NORMS)
def test_group_norm_agrees_with_float64(kernels: str, shape: str, silu: bool, dtype: torch.dtype) -> None:
    channels = NORMS[shape][2]
    inputs = [torch.randn(NORMS[shape]) + 1, torch.randn(channels), torch.randn(channels)]
    assert_agrees(lambda x, w, b: group_norm_silu(x, w, b, 32, 1e-5, silu, kernels), inputs, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [1280, 5120])
def test_geglu_agrees_with_float64(kernels: str, width: int, dtype: torch.dtype) -> None:
    assert_agrees(lambda proj: geglu(proj, kernels), [torch.randn(14, 720, 2 * width)], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_convolution_agrees_with_float64(dtype: torch.dtype) -> None:
    inputs = [torch.randn(3, 32, 48, 64), torch.randn(96, 3, 3, 64), torch.randn(96)]
    assert_agrees(lambda x, w, b: conv(x, w, b, 1, (1, 1)), inputs, dtype)


def test_same_input_gives_the_same_bits(kernels: str) -> None:
    inputs = [torch.randn(1, 14 * 40 * 72, 320), torch.randn(320), torch.randn(320)]
    inputs = [tensor.bfloat16().cuda().requires_grad_() for tensor in inputs]
    gradient = torch.randn_like(inputs[0])
    results = []
    for _ in range(2):
        y = group_norm_silu(*inputs, 32, 1e-5, True, kernels)
        results.append([y, *torch.autograd.grad(y, inputs, gradient)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_triton_kernels_run_on_a_gpu_that_is_not_the_current_one() -> None:
    if not triton_installed() or torch.cuda.device_count() < 2:
        pytest.skip("needs Triton and two GPUs")
    results = []
    for device in ("cuda:0", "cuda:1"):
        x = torch.linspace(-3, 3, 2 * 50 * 64).view(2, 50, 64).to(device).requires_grad_()
        y = geglu(group_norm_silu(x, x[0, 0], x[0, 1], 32, 1e-5, True, "triton"), "triton")
        results.append([y, *torch.autograd.grad(y.sum(), x)])
    assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("layer", ["norm", "geglu"])
def test_tensors_of_more_than_2_31_elements_are_indexed_correctly(layer: str) -> None:
    """The last unit, after 2^31 elements, equals the unit on its own."""
    if not triton_installed() or torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs Triton and 40 GiB of GPU memory")
    weight, bias = torch.randn(2, 256, dtype=torch.bfloat16, device="cuda")

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = (
            geglu(x, "triton")
            if layer == "geglu"
            else group_norm_silu(x, weight, bias, 32, 1e-5, True, "triton")
        )
        return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]

    whole = torch.randn(3, 2**22 + 9, 256, dtype=torch.bfloat16, device="cuda")
    assert whole.numel() > 2**31
    for found, alone in zip(run(whole), run(whole[2:].clone()), strict=True):
        assert torch.equal(found[2:], alone)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_network_agrees_with_float64(kernels: str, dtype: torch.dtype) -> None:
    config = UNetConfig(widths=(64, 128), attention_levels=(True, True), num_layers=1, context_width=64)
    unet = UNet(config)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    inputs = (torch.randn(2, 6, 8, 16, 24), torch.randn(2), torch.randn(2, 7, 64), torch.rand(2, 3) * 10)
    with torch.no_grad():
        exact = unet.double()(*(tensor.double() for tensor in inputs))
        choose_kernels(unet, kernels)
        found = unet.to("cuda", dtype)(*(tensor.cuda() for tensor in inputs))
    error = ((found.cpu().double() - exact).norm() / exact.norm()).item()
    assert error < 5 * TOLERANCE[dtype], error


def test_released_network_is_the_same_with_triton_and_torch_kernels() -> None:
    if not triton_installed():
        pytest.skip("Triton is not installed")
    with torch.device("cuda"):
        unet = UNet(UNetConfig())
        inputs = (torch.randn(1, 4, 8, 16, 24), torch.randn(1), torch.randn(1, 1, 1024), torch.rand(1, 3))
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    results = []
    for kernels in ("triton", "torch"):
        choose_kernels(unet, kernels)
        y = unet(*inputs)
        y.square().sum().backward()
        # Queries to one token have no gradient.
        grads = [parameter.grad for parameter in unet.parameters() if parameter.grad is not None]
        results.append([y.detach(), torch.cat([grad.flatten() for grad in grads])])
        unet.zero_grad()
    for tritons, torchs in zip(*results, strict=True):
        assert 0 < ((tritons - torchs).norm() / torchs.norm()).item() < 1e-4
