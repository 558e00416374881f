"""The watchdog's settings. That it ends ranks that hang is tested in tests/distributed/test_watchdog.py."""

from __future__ import annotations

import pytest

from svd_ds.training.watchdog import WatchdogConfig


@pytest.mark.parametrize("wrong", [{"minutes": -1.0}, {"minutes": 10.0, "first_minutes": 5.0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"watchdog\.minutes is"):
        WatchdogConfig(**wrong)
