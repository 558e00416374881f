"""tools/bench/train_step.py from the command line, at a tiny size; and what the released network costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svd_ds.model.unet import UNet
from tests.unit.tools.conftest import TOOLS

Bench = Callable[..., int]


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS / "bench"))


@pytest.fixture
def bench(run_tool: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return partial(run_tool, "bench/train_step.py")


@pytest.fixture
def tiny() -> Any:
    from cases import Case

    return Case(
        widths=(64,), num_frames=2, height=32, width=48, num_tokens=3, dtype="fp32", recompute="blocks"
    )


@pytest.mark.slow
def test_table_has_a_row_for_each_case(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--size", "16x16", "--frames", "2", "--widths", "64", "--pairs", "1")
    assert bench(*size, "--tokens", "3,1", "--dtype", "fp32") == 0
    machine, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert "GFLOP/s in fp32" in machine
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:4] for row in cells] == [["2 x 16x16", tokens, "fp32", "1"] for tokens in ("3", "1")]
    assert all(len(row) == len(head.strip("|").split("|")) for row in cells)
    assert all(float(row[4]) >= 0 and float(row[6].split()[0]) > 0 for row in cells)


def test_both_networks_agree_and_take_turns(tiny: Any) -> None:
    from against_diffusers import measure

    turns = []
    result = measure(tiny, 2, torch.device("cpu"), lambda: turns.append("pair"))
    assert 0 < result.difference < 1e-5
    assert len(result.seconds) == len(result.ratios) == len(turns) == 2
    assert result.ratios[0] == result.seconds[0][1] / result.seconds[0][0]
    weights = sum(parameter.nbytes for parameter in UNet(tiny.config).parameters())
    assert all(3 * weights < peak < 20 * weights for peak in result.peak_bytes)
    assert result.largest_batch is None


def test_step_updates_moments_and_keeps_the_weights(tiny: Any) -> None:
    from against_diffusers import build_networks, output_difference, set_memory_format
    from timed_network import TimedNetwork

    device = torch.device("cpu")
    network, public = build_networks(tiny, device)
    inputs = tiny.inputs(device)
    for side in (network, set_memory_format(public, "channels_last")):
        timed_network = TimedNetwork(side)
        timed_network.step(inputs)
        state = timed_network.optimizer.state
        assert all(state[parameter]["exp_avg"].isfinite().all() for parameter in side.parameters())
        assert state[side.conv_in.weight]["exp_avg"].any()
        weights = sum(parameter.nbytes for parameter in side.parameters())
        assert 3 * weights <= timed_network.held_bytes() < 3.01 * weights
    assert output_difference(network, public, inputs) < 1e-5


def test_half_precision_step_updates_float32_masters(tiny: Any) -> None:
    from timed_network import TimedNetwork

    network = UNet(tiny.config).bfloat16()
    torch.nn.init.ones_(network.conv_out.bias)
    timed_network = TimedNetwork(network)
    timed_network.optimizer.param_groups[0]["lr"] = 1e-5  # below the resolution of bfloat16
    before = network.conv_out.bias.clone()
    for _ in range(2):
        timed_network.step(replace(tiny, dtype="bf16").inputs(torch.device("cpu")))
    names = [name for name, _ in network.named_parameters()]
    master = dict(zip(names, timed_network.masters, strict=True))["conv_out.bias"]
    assert master.dtype == torch.float32
    assert not torch.equal(master, before.float())
    assert torch.equal(network.conv_out.bias, master.bfloat16())
    weights = sum(parameter.nbytes for parameter in network.parameters())
    assert timed_network.held_bytes() >= 7 * weights, "the weights, and three float32 copies of their size"


@pytest.mark.parametrize(
    "room", [0, 1, pytest.param(5, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_largest_batch_is_found(tiny: Any, room: int) -> None:
    from against_diffusers import find_largest_batch
    from timed_network import TimedNetwork

    class Small(TimedNetwork):
        def step(self, inputs: Any) -> float:
            if len(inputs[0]) > room:
                raise torch.cuda.OutOfMemoryError
            return 1.0

    case = replace(tiny, batch=None)
    assert find_largest_batch(case, Small(torch.nn.Linear(1, 1)), torch.device("cpu")) == room


def test_size_may_have_its_own_number_of_frames() -> None:
    from cases import read_cases
    from train_step import RELEASED

    arguments = SimpleNamespace(**RELEASED, frames=14, tokens="1")
    assert [case.clip for case in read_cases(arguments, ())][-2:] == ["14 x 576x1024", "25 x 576x1024"]


def test_networks_with_different_outputs_are_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import against_diffusers

    build = against_diffusers.build_networks

    def spoiled(*arguments: Any) -> Any:
        network, public = build(*arguments)
        torch.nn.init.zeros_(network.conv_out.weight)
        return network, public

    monkeypatch.setattr(against_diffusers, "build_networks", spoiled)
    with pytest.raises(AssertionError, match="the outputs differ by"):
        against_diffusers.measure(replace(tiny, recompute="none"), 1, torch.device("cpu"), lambda: None)


def test_released_network_needs_fewer_operations_than_diffusers(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """Operations at 14 x 256x384: diffusers needs 7.70 TFLOP for 77 context tokens and 6.27 for one."""
    assert bench("--flops") == 0
    rows = [row.strip("|").split("|") for row in capsys.readouterr().out.splitlines()[2:]]
    (tokens, ours, theirs), (one, ours_one, theirs_one) = [[float(cell) for cell in row[1:]] for row in rows]
    assert (tokens, theirs, one, theirs_one) == (77, 7.7, 1, 6.27)
    assert ours <= 6.4
    assert ours_one <= 6.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--full",), "--full needs a GPU"),
        (("--batch", "largest"), "--batch largest needs a GPU"),
        (("--size", "256x100"), "--size is '256x100': it must be HEIGHTxWIDTH, multiples of 64 pixels"),
        (("--size", "256"), "--size is '256'"),
        (("--tokens", "77,0"), "--tokens is '77,0': it must be positive integers"),
        (("--dtype", "fp8"), "--dtype is 'fp8': it must be one of fp32, bf16"),
        (("--pairs", "0"), "--pairs is 0"),
        (("--widths", "60", "--pairs", "1"), "model.widths has 60"),
    ],
)
def test_invalid_option_is_one_sentence(
    bench: Bench, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert bench(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
