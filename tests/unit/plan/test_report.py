"""Text and JSON of a plan: numbers, marks, and every assumption."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from svd_ds.compose import compose
from svd_ds.plan import report as module
from svd_ds.plan.hardware import GIB, Calibration, Cluster
from svd_ds.plan.planner import Plan, ProfileFn, make_plan
from svd_ds.plan.report import as_json, as_text


@pytest.fixture
def plan(profile_fn: ProfileFn, cluster: Cluster) -> Plan:
    return make_plan(compose(["batch.size=224", "batch.micro=2"]), cluster, profile_fn, price=2.0)


def test_text_has_parts_table_step_and_cost(plan: Plan) -> None:
    text = as_text(plan)
    memory = plan.shapes[0].option.memory
    for words in (
        "batch 224 on 16 x a100-80 (2 nodes), bf16; 1,000,000,000 parameters",
        f"{memory.total / GIB:.2f}  of 79.15: fits",
        "at the peak, in backward: block a",
        "frozen networks",
        "best that fits: batch.micro=",
        "all-gather 3.75 GB, reduce-scatter 3.75 GB per rank; 7.5 GB into each node",
        "with the latent cache",
        "bound by the GPU",
        " USD",
    ):
        assert words in text, words


def test_table_marks_what_fits(plan: Plan) -> None:
    rows = [line.split() for line in as_text(plan).splitlines()]
    start = rows.index(["micro", "none", "blocks", "attention", "full"])
    assert rows[start + 1][0] == "1" and [word for word in rows[start + 1] if word in "*~x"] == ["*"] * 4
    assert rows[start + 2][2] == "x", "two clips without recomputation"
    assert rows[start + 4][0] == "14" and "~" in rows[start + 4]


def test_offloading_is_shown_where_more_fits_with_it(
    plan: Plan, profile_fn: ProfileFn, cluster: Cluster
) -> None:
    assert "with parallel.offload_optimizer=true" not in as_text(plan)
    smaller = replace(cluster, gpu=replace(cluster.gpu, memory_gib=69.5))
    assert "with parallel.offload_optimizer=true" in as_text(make_plan(plan.config, smaller, profile_fn))


def test_every_assumption_is_printed(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    text = as_text(plan).partition("assumptions\n")[2]
    for words in (
        "312 TFLOP/s", "products 70%", "bandwidth 80%", "4 us", "not calibrated", "NVLink", "--interconnect",
        "CUDA context", "fragmentation", "host: (", "not counted: checkpoints"
    ):  # fmt: skip
        assert words in text, words
    monkeypatch.setattr(module, "CALIBRATIONS", (Calibration("a100-80", 1.0, 1.2, "Training on A100s"),))
    assert "calibrated by Training on A100s" in as_text(plan) and "not calibrated" not in as_text(plan)


def test_json_is_one_document_with_the_same_numbers(plan: Plan) -> None:
    document = json.loads(json.dumps(as_json(plan)))
    (shape,) = document["shapes"]
    memory = plan.shapes[0].option.memory
    assert shape["memory"]["total"] == memory.total and shape["memory"]["parts"] == memory.parts
    assert shape["speed"]["step_s"] == plan.shapes[0].option.speed.step_s
    assert document["cost"]["money"] == plan.cost.money
    assert len(document["options"]) == len(plan.options) and document["best"].startswith("batch.micro=")
    assert document["assumptions"] == module.assumptions(plan)


def test_buckets_have_a_row_each(profile_fn: ProfileFn, cluster: Cluster) -> None:
    words = ["batch.size=64", "data.num_frames=14", "data.height=64", "data.width=64"]
    words.append("+data.buckets={14x64x64: 2, 14x128x128: 4}")
    text = as_text(make_plan(compose(words), cluster, profile_fn))
    assert "step of 14x64x64" in text and "step of 14x128x128" in text
    assert "the buckets have equally many steps" in text and "micro " not in text
