"""The watchdog's settings. That it ends ranks that hang is tested in tests/distributed/test_watchdog.py."""

from __future__ import annotations

from datetime import timedelta

import pytest

from svd_ds.jobs.watchdog import WatchdogConfig


@pytest.mark.parametrize("wrong", [{"minutes": -1.0}, {"minutes": 10.0, "first_minutes": 5.0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"watchdog\.(first_)?minutes is"):
        WatchdogConfig(**wrong)


def test_the_watchdog_speaks_before_a_wait_for_another_rank_ends() -> None:
    assert WatchdogConfig(minutes=45.0, first_minutes=60.0).patience > timedelta(minutes=60)
    assert WatchdogConfig(minutes=0.0).patience == timedelta(days=1), "nobody asked for an end"
