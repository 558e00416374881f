"""Parameter groups and learning rate schedules."""

from __future__ import annotations

import pytest

from svd_ds.training.optim import TAGS, OptimConfig, group_lrs, learning_rate, parameter_groups

PARAMETERS = {"a.weight": "spatial", "a.bias": "spatial", "t.weight": "temporal", "e.weight": "embedding"}
SHAPES = {"a.weight": (4, 4), "a.bias": (4,), "t.weight": (4, 4), "e.weight": (4, 4)}


def test_groups_split_by_tag_and_decay() -> None:
    groups = {g.name: g for g in parameter_groups(PARAMETERS, SHAPES, OptimConfig(weight_decay=0.1))}
    assert groups["spatial"].parameter_names == ("a.weight",)
    assert groups["spatial"].weight_decay == 0.1
    assert groups["spatial-no-decay"].parameter_names == ("a.bias",)
    assert groups["spatial-no-decay"].weight_decay == 0


def test_every_group_has_its_multiple_of_the_peak_lr() -> None:
    config = OptimConfig(temporal_lr_scale=2.0, embedding_lr_scale=0.0)
    lrs = group_lrs(config, 1e-3)
    groups = parameter_groups(PARAMETERS, SHAPES, config)
    found = {group.name: lrs[group.name] for group in groups}
    assert found == {"spatial": 1e-3, "spatial-no-decay": 1e-3, "temporal": 2e-3}


def test_lr_scale_zero_freezes() -> None:
    groups = parameter_groups(PARAMETERS, SHAPES, OptimConfig(spatial_lr_scale=0, temporal_lr_scale=0))
    assert [g.parameter_names for g in groups] == [("e.weight",)]
    with pytest.raises(ValueError, match=r"optim.spatial_lr_scale, .* are all 0"):
        OptimConfig(**{f"{tag}_lr_scale": 0.0 for tag in TAGS})


def test_warmup_rises_to_the_peak_from_the_first_step_on() -> None:
    config = OptimConfig(lr=1e-3, warmup_samples=100)
    assert learning_rate(config, 10, 1000) == pytest.approx(1e-4)
    assert learning_rate(config, 100, 1000) == 1e-3
    assert learning_rate(config, 900, 1000) == 1e-3


def test_cosine_ends_at_final_lr_scale() -> None:
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_samples=100, final_lr_scale=0.1)
    assert learning_rate(config, 100, 1100) == pytest.approx(1.0)
    assert learning_rate(config, 600, 1100) == pytest.approx(0.55)
    assert learning_rate(config, 1100, 1100) == pytest.approx(0.1)
    assert learning_rate(config, 5000, 1100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("field", "value"), [("schedule", "linear"), ("gradient_clip", 0.0)], ids=lambda part: str(part)
)
def test_config_out_of_range_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"optim.{field} is {value!r}"):
        OptimConfig(**{field: value})  # type: ignore[arg-type]
