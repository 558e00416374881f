"""Every backend computes the same attention, in any strides, at any batch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from svd_ds.model.ops import attention as module
from svd_ds.model.ops import fused
from svd_ds.model.ops.attention import attention
from svd_ds.model.ops.fused import triton_installed


def draw(*shape: int, keys: int | None = None) -> list[torch.Tensor]:
    lengths = (shape[-3], keys or shape[-3], keys or shape[-3])
    return [torch.randn(*shape[:-3], length, *shape[-2:], requires_grad=True) for length in lengths]


@pytest.mark.parametrize("keys", [None, 1, 77])
def test_every_backend_equals_the_formula_in_double_precision(keys: int | None) -> None:
    q, k, v = draw(3, 14, 2, 32, keys=keys)

    def results(backend: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
        out = attention(*inputs, backend)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    exact = results("reference", *(tensor.double() for tensor in (q, k, v)))
    assert all(tensor.dtype == torch.float64 for tensor in exact)
    for backend in ("reference", "sdpa", "short", "auto"):
        for expected, found in zip(exact, results(backend, q, k, v), strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_reference_equals_the_formula() -> None:
    q, k, v = (t.detach() for t in draw(1, 5, 1, 4))
    weights = torch.softmax(q[0, :, 0] @ k[0, :, 0].T / 2, dim=-1)
    torch.testing.assert_close(attention(q, k, v, "reference")[0, :, 0], weights @ v[0, :, 0])


@pytest.mark.parametrize("clips", [1, 3])
def test_strided_views_of_clips_give_outputs_in_time_order(clips: int) -> None:
    qkv = torch.randn(clips, 5, 6, 3, 2, 8)  # clips, frames, pixels
    q, k, v = qkv.transpose(1, 2).unbind(3)
    out = attention(q, k, v, "sdpa")
    expected = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), "reference")
    torch.testing.assert_close(out.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)
    if clips > 1:
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("clips", [None, 2])
def test_batch_above_the_kernel_limit_is_split(clips: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.MAX_BATCH == 65_535
    monkeypatch.setattr(module, "MAX_BATCH", 30)
    rows = 37
    q, k, v = (torch.randn(*((clips,) if clips else ()), rows, 2, 1, 2) for _ in range(3))
    seen = []

    def kernel(*qkv: torch.Tensor) -> torch.Tensor:
        seen.append(qkv[0].shape[0])
        return module._reference(*qkv)

    monkeypatch.setitem(module.KERNELS, "sdpa", kernel)
    out = attention(q, k, v, "sdpa")
    assert seen == [30, 7] * (clips or 1)
    expected = module._reference(q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4)).view(q.shape)
    torch.testing.assert_close(out, expected)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Any], None]]:
    """Install a package of a name for one test."""

    def install(name: str, package: Any) -> None:
        monkeypatch.setitem(sys.modules, name, package)
        module.import_flash.cache_clear()

    module.import_flash.cache_clear()
    yield install
    module.import_flash.cache_clear()


@pytest.mark.parametrize(
    ("backend", "package", "content", "reason"),
    [
        ("flash_attn", "flash_attn", None, r"import of flash_attn halted"),
        ("flash_attn", "flash_attn", ModuleType("flash_attn"), r"cannot import name 'flash_attn_func'"),
        ("flash_attn_3", "flash_attn_interface", None, r"import of flash_attn_interface halted"),
    ],
    ids=["not there", "another package of that name", "FlashAttention-3"],
)
def test_package_that_cannot_be_imported_is_refused_with_the_reason(
    backend: str, package: str, content: Any, reason: str, packages: Callable[[str, Any], None]
) -> None:
    packages(package, content)
    with pytest.raises(
        ValueError, match=rf"{backend}, which cannot be imported \(.*{reason}.*choose auto or"
    ):
        attention(*draw(1, 2, 1, 2), backend)


def test_wheel_for_another_torch_is_imported_once(
    monkeypatch: pytest.MonkeyPatch, packages: Callable[[str, Any], None], tmp_path: Path
) -> None:
    (tmp_path / "flash_attn.py").write_text("print('imported')\nraise OSError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        error = module.import_flash("flash_attn")
        assert isinstance(error, OSError) and "undefined symbol" in str(error)
    assert module.import_flash.cache_info().misses == 1


@pytest.mark.parametrize(
    ("backend", "package"), [("flash_attn", "flash_attn"), ("flash_attn_3", "flash_attn_interface")]
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attn_is_called_with_torchs_determinism(
    backend: str,
    package: str,
    deterministic: bool,
    packages: Callable[[str, Any], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def flash_attn_func(*qkv: torch.Tensor, deterministic: bool) -> Any:
        calls.append(deterministic)
        out = module._reference(*qkv)
        return (out, torch.zeros(1)) if backend == "flash_attn_3" else out

    packages(package, SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    qkv = draw(2, 5, 1, 8)
    torch.testing.assert_close(module.KERNELS[backend](*qkv), module._reference(*qkv))
    assert calls == [deterministic]
    # On a CPU it is refused, not called.
    with pytest.raises(ValueError, match=f"{backend}, which needs half precision on a GPU"):
        attention(*qkv, backend)


@pytest.mark.parametrize(
    ("backend", "is_cuda", "dtype", "num_keys", "expected"),
    [
        ("auto", True, torch.bfloat16, 14, "sdpa"),
        ("auto", False, torch.bfloat16, 14, "short"),
        ("auto", False, torch.bfloat16, 1536, "sdpa"),
        (("flash_attn_3", "sdpa"), True, torch.bfloat16, 1536, "flash_attn_3"),
        (("flash_attn_3", "sdpa"), True, torch.float32, 1536, "sdpa"),
        (("triton", "sdpa"), True, torch.float16, 14, "sdpa"),
    ],
)
def test_first_backend_that_supports_the_tensors_is_used(
    backend: Any,
    is_cuda: bool,
    dtype: torch.dtype,
    num_keys: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "triton_installed", lambda: False)
    q = SimpleNamespace(is_cuda=is_cuda, dtype=dtype)
    assert module._choose(backend, q, torch.empty(1, num_keys, 1, 8)) == expected  # type: ignore[arg-type]


def test_configured_triton_backend_refuses_unsupported_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(1, 3, 1, 16, keys=5)
    expected = {
        False: "triton, which is not installed",
        True: r"5 keys for 3 queries in torch\.float32 on cpu",
    }
    for installed in {False, triton_installed()}:
        monkeypatch.setattr(fused, "triton_installed", lambda installed=installed: installed)
        with pytest.raises(ValueError, match=expected[installed]):
            attention(q, k, v, "triton")


def test_short_backend_computes_scores_in_float32() -> None:
    q, k, v = (4 * torch.randn(8, 14, 2, 64) for _ in range(3))
    exact = attention(q.bfloat16().double(), k.bfloat16().double(), v.bfloat16().double(), "reference")
    found = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), "short")
    error = (found.double() - exact).norm() / exact.norm()
    assert error < 2.0**-8, "no more than the rounding of the result"
