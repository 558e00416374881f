"""A run configures its GPU before it reads or computes anything."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from svd_ds import run
from svd_ds.compose import compose
from svd_ds.parallel.env import Env


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_run_configures_its_gpu_so(
    deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Configured(Exception):
        pass

    def configure_gpu(device: Any, **settings: Any) -> None:
        raise Configured(settings)

    monkeypatch.setattr(run, "configure_gpu", configure_gpu)
    monkeypatch.setattr(run, "process_group", lambda *arguments: nullcontext())
    config = compose(["debug=tiny", f"run.dir={tmp_path}", f"deterministic={str(deterministic).lower()}"])
    with pytest.raises(Configured) as configured:
        run.run(config, Env.read({}))
    assert configured.value.args == ({"deterministic": deterministic, "fixed_shapes": True},)
