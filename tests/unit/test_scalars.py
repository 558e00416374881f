"""The registry of scalar conditions."""

from __future__ import annotations

import math
from typing import Any

import pytest

from svd_ds import scalars
from svd_ds.data.sample import NUMBERS, REQUIRED_FIELDS, Sample
from svd_ds.scalars import RESERVED_FIELDS, SCALARS, ClipProperties, Scalar, clip_scalars, register


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of a test end with it."""
    for name in ("_scalars", "_sample_fields"):
        for key in (before := dict(getattr(scalars, name))):
            monkeypatch.setitem(getattr(scalars, name), key, before[key])
    added = ("zoom", "duration", "light")
    for name in added:
        for registered in (scalars._scalars, scalars._sample_fields):
            monkeypatch.setitem(registered, name, Scalar(name, 0, 1))
            del registered[name]


CLIP = ClipProperties(fps=8.0, num_frames=4, motion_bucket=30.0)


def test_released_scalars_come_first_in_the_order_of_the_public_weights() -> None:
    assert tuple(SCALARS)[:3] == scalars.RELEASED_SCALARS == ("fps", "motion_bucket", "augmentation")
    assert [SCALARS[name].offset for name in scalars.RELEASED_SCALARS] == [-1, 0, 0], "fps - 1"


def test_values_come_from_the_clip_the_sample_or_a_default() -> None:
    register(Scalar("zoom", low=0.5, high=4, sample_field="zoom"))
    register(Scalar("light", low=0, high=1, sample_field="light", sample_default=0.5))
    register(Scalar("duration", low=0, high=100, compute=lambda clip: clip.num_frames / clip.fps))
    found = clip_scalars(CLIP, {"zoom": 2.0, "elevation": -5.0}.get)
    assert found == {
        "fps": 8.0,
        "motion_bucket": 30.0,
        "elevation": -5.0,
        "zoom": 2.0,
        "light": 0.5,
        "duration": 0.5,
    }, "the objective draws the augmentation"
    assert math.isnan(clip_scalars(CLIP, {}.get)["zoom"])


def test_number_of_the_sample_may_be_a_field_or_an_annotation() -> None:
    sample = Sample("a", 0, {}, 4, 8.0, 16, 16, 0.1, scalars={"zoom": 2.0}, annotations={"aesthetic": 5.0})
    assert [sample.number(name) for name in ("zoom", "aesthetic", "motion", "pan")] == [2.0, 5.0, 0.1, None]
    assert sample.as_row()["zoom"] == 2.0 and "scalars" not in sample.as_row()


def test_fields_of_every_sample_are_reserved() -> None:
    assert {*Sample.__dataclass_fields__} <= {*RESERVED_FIELDS} and {*NUMBERS} <= {*REQUIRED_FIELDS}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"name": "fps"}, "a scalar cannot be named 'fps': the name is taken or is not an identifier"),
        ({"name": "context"}, "a scalar cannot be named 'context'"),
        ({"name": "f/s"}, "a scalar cannot be named 'f/s'"),
        ({"sample_field": "elevation"}, "scalar zoom cannot have the sample field 'elevation': it is taken"),
        ({"sample_field": "captions"}, "scalar zoom cannot have the sample field 'captions'"),
        ({"sample_field": "zoom", "compute": lambda clip: 1.0}, "has a sample field and is computed"),
        ({"low": 4}, "scalar zoom has low 4: it must be below high, 4"),
        ({"sampling_default": 5}, "scalar zoom has the default 5: it must be at least 0 and at most 4"),
        ({"sample_field": "zoom", "sample_default": math.nan}, "has the default nan"),
    ],
)
def test_wrong_registrations_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        register(Scalar(**{"name": "zoom", "low": 0, "high": 4} | fields))
    assert "zoom" not in SCALARS
