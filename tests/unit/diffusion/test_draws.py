"""Draws depend on the clip and on nothing else."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from svd_ds import batch as batch_module
from svd_ds.batch import Draws
from svd_ds.diffusion import draws as draws_module
from svd_ds.diffusion.draws import NUM_SIGNALS, draw
from svd_ds.scalars import signal_names

LATENT, GIVEN = (3, 4, 5, 6), (1, 3, 40, 48)


def tensors(draws: Draws) -> dict[str, Tensor]:
    return {field.name: getattr(draws, field.name) for field in fields(draws)}


def test_draws_do_not_depend_on_how_the_batch_is_split() -> None:
    ordinals = [7, 0, 1_000_000_007, 3]
    whole = tensors(draw(5, ordinals, LATENT, GIVEN))
    parts = [tensors(draw(5, part, LATENT, GIVEN)) for part in ([7], [0, 1_000_000_007], [3])]
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([part[name] for part in parts])), name


def test_every_number_changes_with_seed_and_ordinal() -> None:
    base = tensors(draw(5, [7], LATENT, GIVEN))
    # 2^32 apart: a 32-bit seed would repeat.
    for other in (
        draw(6, [7], LATENT, GIVEN),
        draw(5, [8], LATENT, GIVEN),
        draw(5, [7 + 2**32], LATENT, GIVEN),
    ):
        for name, value in tensors(other).items():
            assert (value != base[name]).float().mean() > 0.99, name


def test_draws_have_their_shapes_and_distributions() -> None:
    draws = draw(0, range(2000), (1, 1, 2, 2), (1, 1, 2, 2))
    assert draws.u_B.shape == (2000,) and draws.drop_BN.shape == (2000, NUM_SIGNALS)
    assert draws.noise_BTChw.shape == (2000, 1, 1, 2, 2) and draws.noise_BTChw.dtype == torch.float32
    assert draws.given_noise_BKCHW.shape == (2000, 1, 1, 2, 2)
    assert draws.u_B.min() > 0 and draws.u_B.max() < 1
    for uniform in (draws.u_B, draws.drop_BN):
        assert abs(uniform.mean() - 0.5) < 0.03 and abs(uniform.std() - 12**-0.5) < 0.01
    for normal in (
        draws.augmentation_B,
        draws.noise_BTChw,
        draws.posterior_noise_BTChw,
        draws.given_noise_BKCHW,
    ):
        assert abs(normal.mean()) < 0.08 and abs(normal.std() - 1) < 0.06


def test_shape_of_conditioning_frames_does_not_change_other_draws() -> None:
    one, other = tensors(draw(5, [7], LATENT, GIVEN)), tensors(draw(5, [7], LATENT, (2, 4, 5, 6)))
    assert one.pop("given_noise_BKCHW").shape != other.pop("given_noise_BKCHW").shape
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_offset_noise_is_one_number_per_channel_and_changes_no_other_draw() -> None:
    plain = tensors(draw(1, [2, 3], LATENT, GIVEN))
    moved = tensors(draw(1, [2, 3], LATENT, GIVEN, offset_noise=0.5))
    offset = moved.pop("noise_BTChw") - plain.pop("noise_BTChw")
    torch.testing.assert_close(offset, offset[:, :1, :, :1, :1].expand_as(offset))
    assert len(offset[:, 0, :, 0, 0].unique()) == 8 and offset.abs().min() > 0
    for name, value in plain.items():
        assert torch.equal(value, moved[name]), name


def test_signal_beyond_the_reserved_columns_changes_no_other_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tensors(draw(1, [2, 3], LATENT, GIVEN, offset_noise=0.5))
    names = (*signal_names(), *(f"new{i}" for i in range(5)))
    for module in (draws_module, batch_module):
        monkeypatch.setattr(module, "signal_names", lambda: names)
    draws = draw(1, [2, 3], LATENT, GIVEN, offset_noise=0.5)
    more = tensors(draws)
    found = more.pop("drop_BN")
    assert found.shape == (2, len(names)) and len(found.unique()) == 2 * len(names) > 2 * NUM_SIGNALS
    assert torch.equal(found[:, :NUM_SIGNALS], plain.pop("drop_BN"))
    assert all(torch.equal(value, more[name]) for name, value in plain.items())
    assert draws.drop("new4", 1.0).all() and not draws.drop("new4", 0.0).any()


def test_order_of_the_signals_is_fixed() -> None:
    """Another order would drop other conditions, and change the losses of every run."""
    assert signal_names()[:6] == ("context", "concat", "fps", "motion_bucket", "augmentation", "elevation")
