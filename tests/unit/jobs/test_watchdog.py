"""Settings of the watchdog. tests/distributed/test_watchdog.py tests that it ends ranks that hang."""

from __future__ import annotations

from datetime import timedelta

import pytest

from svd_ds.jobs.watchdog import WatchdogConfig


@pytest.mark.parametrize("wrong", [{"minutes": -1.0}, {"minutes": 10.0, "first_minutes": 5.0}])
def test_invalid_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"watchdog\.(first_)?minutes is"):
        WatchdogConfig(**wrong)


def test_collectives_wait_longer_than_the_watchdog() -> None:
    assert WatchdogConfig(minutes=45.0, first_minutes=60.0).collective_timeout > timedelta(minutes=60)
    assert WatchdogConfig(minutes=0.0).collective_timeout == timedelta(days=1), "the watchdog is off"
