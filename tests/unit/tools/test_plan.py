"""tools/plan.py: the plan of a command line. Profiles are made up, except in the tests of real steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from svd_ds.compose import compose
from svd_ds.plan.hardware import GIB
from svd_ds.plan.step_profile import ProfileRequest
from svd_ds.training.usage import unet_forward_flops
from tests.profiles import record_requests
from tests.unit.tools.conftest import ToolResult

PlanTool = Callable[..., ToolResult]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ProfileRequest]:
    """All requests for profiles, which are answered with made-up ones."""
    return record_requests(monkeypatch)


def test_overrides_and_options_may_be_mixed(tool_output: PlanTool, asked: list[ProfileRequest]) -> None:
    words = ["+experiment=stage3_i2v_xt", "--gpus", 64, "batch.micro=2", "--gpu", "h100-80", "run.steps=7"]
    code, out, err = tool_output("plan.py", *words)
    assert (code, err) == (0, "")
    assert out.startswith("stage3_i2v_xt: 25x576x1024, batch 768 on 64 x h100-80 (8 nodes), bf16")
    assert "with batch.micro=2 recompute=" in out and "run of 7 steps" in out
    assert {request.policy for request in asked} == {"none", "blocks", "attention", "full"}


def test_required_paths_may_be_left_out(tool_output: PlanTool, asked: list[ProfileRequest]) -> None:
    for experiment in ("stage2", "camera_lora", "temporal_decoder"):
        code, _, err = tool_output("plan.py", f"+experiment={experiment}", "recompute=full", "--gpus", 16)
        assert (code, err) == (0, ""), experiment
    assert {request.config["frozen"]["path"] for request in asked} == {"planned"}, "not the tiny models"
    tool_output("plan.py", "+experiment=stage2", "frozen.path=mine", "--gpus", 16)
    assert asked[-1].config["frozen"]["path"] == "mine"


def test_json_is_the_only_output(tool_output: PlanTool, asked: list[ProfileRequest]) -> None:
    code, out, err = tool_output(
        "plan.py", "+experiment=stage2", "recompute=full", "--gpus", 64, "--json", "--price", 2
    )
    document = json.loads(out)
    assert (code, err, document["name"]) == (0, "", "stage2")
    assert document["cost"]["money"] == pytest.approx(2 * document["cost"]["gpu_hours"])


def test_interconnect_replaces_the_assumed_network(
    tool_output: PlanTool, asked: list[ProfileRequest]
) -> None:
    words = ("plan.py", "+experiment=stage2", "--gpus", 64, "--json")
    fast, slow = (
        json.loads(tool_output(*words, *more).out)["shapes"][0]["speed"]
        for more in ([], ["--interconnect", 0.5])
    )
    assert slow["bound"] == "communication" and slow["step_s"] > 5 * fast["step_s"]


def test_run_that_does_not_fit_has_a_plan_and_code_2(
    tool_output: PlanTool, asked: list[ProfileRequest]
) -> None:
    words = ["+experiment=stage3_i2v", "batch.micro=4", "recompute=none", "--gpus", 64]
    code, out, err = tool_output("plan.py", *words)
    assert code == 2 and "does not fit" in out and err.count("\n") == 1
    assert "batch.micro=4 recompute=none needs 166.9 GiB of tensors" in err and "has 79.15 GiB" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "0 is not a whole number above 0"),
        (["--gpus", "8", "--price", "nan"], "nan is not a number above 0"),
        (["--gpus", "8", "--gpu", "v100"], "--gpu is v100: it must be one of a100-80"),
        (["--gpus", "8", "batch.micor=1"], "micor"),
        (["--gpus", "7", "batch.size=8"], "batch.size 8 cannot be split over 7 ranks"),
        (["--gpus", "8", "-m"], "unrecognized arguments: -m"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(
    tool_output: PlanTool, asked: list[ProfileRequest], words: list[str], message: str
) -> None:
    code, _, err = tool_output("plan.py", *words)
    assert code == 2 and message in err and "Traceback" not in err


def test_small_run_is_planned_from_its_real_step(tool_output: PlanTool) -> None:
    """One process, which runs four policies of a step on fake tensors."""
    code, out, err = tool_output(
        "plan.py", "+experiment=stage3_i2v", "debug=tiny", "batch.micro=auto", "--gpus", 2, "--json"
    )
    assert (code, err) == (0, "")
    document = json.loads(out)
    (shape,) = document["shapes"]
    assert shape["micro"] == 6, "all of a rank's clips fit"
    kept = {
        o["settings"]: o["tensors"] for o in document["options"] if o["settings"].startswith("batch.micro=6 ")
    }
    assert kept["batch.micro=6 recompute=none"] > kept["batch.micro=6 recompute=blocks"]
    assert 0 < shape["speed"]["mfu"] < 1


@pytest.mark.slow
def test_full_size_plan_is_in_line_with_the_audit(tool_output: PlanTool) -> None:
    """SVD-XT on 64 A100: 15.7 GiB of tensors, and 2.53 s a clip."""
    started = time.process_time()
    words = ["+experiment=stage3_i2v_xt", "batch.micro=1", "--gpus", 64, "--gpu", "a100-80"]
    document = json.loads(tool_output("plan.py", *words, "recompute=blocks", "--json").out)
    # Other processes count, too; a busy machine must not fail the test.
    assert time.process_time() - started < 60
    (shape,) = document["shapes"]
    memory = shape["memory"]
    assert shape["verdict"] == "fits"
    assert memory["tensors"] / GIB == pytest.approx(15.7, rel=0.05)
    assert 5 * GIB < sum(memory["allowance"].values()) < 8 * GIB
    assert memory["peak"] == "backward: decoder.11.transformer"
    assert memory["kept"] / GIB == pytest.approx(4.34, rel=0.03)
    assert shape["speed"]["gpu_s"] == pytest.approx(2.53, rel=0.05)
    config = compose(words[:1], placeholder="planned")
    forward = unet_forward_flops(config.model, 25, 576, 1024, config.conditioning.num_tokens)
    mfu = 3 * forward * shape["speed"]["clips_per_s"] / (64 * 312e12)
    assert shape["speed"]["mfu"] == pytest.approx(mfu, rel=0.01), "as svd_ds.training.usage counts"
    code, _, err = tool_output("plan.py", *words, "recompute=none")
    assert code == 2 and "recompute=none needs 88." in err and "a100-80 has 79.15 GiB" in err
    small = [*words[:2], "--gpus", 8, "--gpu", "4090", "recompute=blocks", "--json"]
    best = json.loads(tool_output("plan.py", *small).out)["best"]
    assert best is not None and best.endswith("parallel.offload_optimizer=true")
