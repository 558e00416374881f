"""Averages of the weights: power functions and constant decays."""

from __future__ import annotations

import pytest
import torch

from svd_ds.training.ema import EMAConfig, ShardEMA


def test_power_average_weighs_the_past_by_a_power_function() -> None:
    """The average of n steps has the weights t^gamma, whose relative standard deviation is the length."""
    num_steps, batch = 2000, 4
    profile = EMAConfig(lengths=(0.10,), decays=())
    shards = {"w": torch.zeros(num_steps, dtype=torch.float64)}
    ema = ShardEMA(profile, shards)
    for step in range(num_steps):
        shards["w"].zero_()
        shards["w"][step] = (
            1.0  # after the last step, entry t of the average is the weight that step t has in it
        )
        ema.update(shards, (step + 1) * batch, batch)
    weights = ema.shards("power-0.100")["w"]
    times = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    mean = (weights * times).sum()
    assert weights.sum() == pytest.approx(1.0)
    assert ((weights * (times - mean) ** 2).sum().sqrt()).item() == pytest.approx(0.10, rel=0.01)


def test_constant_decay() -> None:
    shards = {"w": torch.ones(3)}
    ema = ShardEMA(EMAConfig(lengths=(), decays=(0.9,)), shards)
    shards["w"].fill_(2.0)
    ema.update(shards, samples=100, batch=10)
    assert ema.shards("decay-0.9")["w"].tolist() == pytest.approx([1.1] * 3)


def test_load_restores_the_shards() -> None:
    shards = {"a": torch.randn(3), "b": torch.randn(2)}
    ema = ShardEMA(EMAConfig(lengths=(0.05,)), shards)
    stored = {name: value.clone() for name, value in ema.shards("power-0.050").items()}
    ema.update({name: value + 1 for name, value in shards.items()}, samples=8, batch=4)
    assert not torch.equal(ema.shards("power-0.050")["a"], stored["a"])
    ema.load("power-0.050", stored)
    assert torch.equal(ema.shards("power-0.050")["a"], stored["a"])


@pytest.mark.parametrize("config", [{"lengths": (0.5,)}, {"decays": (1.0,)}, {"lengths": ()}])
def test_config_out_of_range_is_refused(config: dict) -> None:
    with pytest.raises(ValueError, match="ema"):
        EMAConfig(**config)


def test_names_have_all_digits_of_the_length() -> None:
    assert EMAConfig(lengths=(0.05, 0.0125)).names == ("power-0.050", "power-0.0125")
