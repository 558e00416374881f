"""Kernels that the machine cannot run are refused, or replaced on all ranks, before the network is built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svd_ds import tasks
from svd_ds.compose import compose
from svd_ds.model.layers import FeedForward, SelfAttention
from svd_ds.model.ops.trial import KernelChoice
from svd_ds.tasks import choose_kernels_on_all_ranks, read_task

CPU: Any = SimpleNamespace(device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "all_gather_objects", lambda items: items)
    monkeypatch.setattr(tasks, "raise_on_all_ranks", lambda action: action())


@pytest.mark.parametrize("site", ["spatial_attention", "temporal_attention"])
def test_flash_attn_on_a_cpu_is_refused_by_its_key(site: str) -> None:
    config = compose(["debug=tiny", f"model.{site}=flash_attn"])
    with pytest.raises(ValueError, match=rf"^model.{site} is flash_attn, which cannot be used on .*: it "):
        choose_kernels_on_all_ranks(config, CPU, "fp32")


def test_triton_on_a_cpu_is_refused_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "run_trials", lambda *arguments: {"fused": "this is a CPU"})
    config = compose(["debug=tiny", "model.kernels=triton"])
    with pytest.raises(
        ValueError, match=r"^model.kernels is triton, which cannot be used on .*: this is a CPU"
    ):
        choose_kernels_on_all_ranks(config, CPU, "fp32")


def test_fault_of_another_rank_changes_the_kernels_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = {"fused": "", "triton": "", "sdpa": ""}
    monkeypatch.setattr(tasks, "run_trials", lambda *arguments: fine)
    others = [("node7", fine | {"triton": "no compiler"})]
    monkeypatch.setattr(tasks, "all_gather_objects", lambda items: items + others)
    config = compose(["debug=tiny"])
    choice = choose_kernels_on_all_ranks(config, CPU, "bf16")
    assert (choice.kernels, choice.attention) == ("triton", ("sdpa",))
    assert "node7: no compiler" in choice.notes[0]
    inputs: Any = SimpleNamespace(conditioner="any", autoencoder="any", weights=None)
    task = read_task(config, CPU, inputs, choice)
    assert task.notes == choice.notes
    assert task.settings["config.json"]["temporal_attention"] == "auto", "the checkpoint keeps what was set"
    with torch.device("meta"):
        network = task.build()
    assert {m.backend for m in network.modules() if isinstance(m, SelfAttention)} == {("sdpa",)}
    assert {m.kernels for m in network.modules() if isinstance(m, FeedForward)} == {"triton"}


def test_decoder_has_no_kernels_to_choose() -> None:
    config = compose(["debug=tiny", "task=decoder"])
    assert choose_kernels_on_all_ranks(config, CPU, "fp32") == KernelChoice()


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_without_a_trial_the_network_has_the_kernels_of_the_config(kernels: str) -> None:
    config = compose(["debug=tiny", f"model.kernels={kernels}", "model.temporal_attention=sdpa"])
    inputs: Any = SimpleNamespace(conditioner="any", autoencoder="any", weights=None)
    with torch.device("meta"):
        network = read_task(config, CPU, inputs).build()
    assert {m.kernels for m in network.modules() if isinstance(m, FeedForward)} == {kernels}
    assert "sdpa" in {m.backend for m in network.modules() if isinstance(m, SelfAttention)}
