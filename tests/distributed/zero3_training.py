"""Training under ZeRO-3 equals plain torch, whatever is frozen, offloaded, recomputed or discarded."""

from __future__ import annotations

from typing import Any

import torch

from svd_ds.model.lora import LoraConfig
from svd_ds.model.unet import UNet, parameter_tags
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.recompute import apply_recompute
from svd_ds.parallel.zero import ZeroConfig, deepspeed_config
from svd_ds.parallel.zero_leaf_modules import largest_leaf_module
from tests.distributed.zero3_harness import (
    ACCUMULATION,
    RATES,
    SMALL,
    Ranks,
    assert_close,
    gathered,
    loss_of,
    micro_batches,
    optimizer_groups,
    output_of,
    plain_training,
    plain_unet,
    random_adapters,
    random_weights,
)
from tests.fake_streams import fake_streams
from tests.host_reads import HostReads


def check_no_rank_holds_the_model(ranks: Ranks) -> None:
    """A step gathers at most two blocks and one parameter; construction gathers nothing."""
    config = deepspeed_config(ZeroConfig(), precision="bf16", gradient_clip=1.0)
    with Engine.sharded_init(config, ranks.mpu):
        unet = UNet(SMALL)
    sizes = {name: tensor.numel() for name, tensor in random_weights().items()}
    for name, parameter in unet.named_parameters():
        assert parameter.numel() == 0, f"{name} is not partitioned"
        assert parameter.ds_tensor.numel() == -(-sizes[name] // ranks.env.world)
        assert parameter.ds_tensor.dtype == torch.bfloat16

    blocks = unet.blocks()
    apply_recompute(unet, blocks, "blocks")
    groups = optimizer_groups(unet, tuple(RATES), [])
    engine = Engine(unet, groups, config, ranks.mpu, leaves=blocks.values())
    held: list[int] = []

    def count(*_: object) -> None:
        gathered = (p.ds_status.name != "NOT_AVAILABLE" for p in unet.parameters())
        held.append(sum(size for size, here in zip(sizes.values(), gathered, strict=True) if here))

    for block in blocks.values():
        block.register_forward_hook(count)
        block.register_full_backward_hook(count)
    unet.register_forward_hook(count)
    # DeepSpeed learns the order of the blocks in the first step, and gathers ahead from the second on.
    ranks.train(engine, range(3))
    largest = largest_leaf_module(blocks.values())
    assert largest < max(held) <= 2 * largest + max(sizes.values()) < sum(sizes.values()), (held, largest)
    with torch.no_grad():
        output_of(engine, micro_batches(0, 1)[0][0])
    count()
    assert held[-1] == 0, "a forward pass alone leaves parameters gathered"


def check_recomputation_changes_no_bit(ranks: Ranks) -> None:
    kept = ranks.engine(recompute="none")
    wanted = ranks.train(kept, range(2))
    for policy in ("blocks", "attention", "full"):
        recomputed = ranks.engine(recompute=policy)
        assert ranks.train(recomputed, range(2)) == wanted, policy
        shards = recomputed.local_shards()
        assert all(torch.equal(shard, shards[name]) for name, shard in kept.local_shards().items()), policy


def check_frozen_parameters_stay_and_the_others_train_as_in_plain_torch(ranks: Ranks) -> None:
    engine = ranks.engine(trained=("temporal",))
    wanted, unet = plain_training(3, ranks.env.world, trained=("temporal",))
    for (loss, norm), (wanted_loss, wanted_norm) in zip(ranks.train(engine, range(3)), wanted, strict=True):
        assert abs(loss - wanted_loss) < 1e-5 * wanted_loss
        assert abs(norm - wanted_norm) < 1e-4 * wanted_norm
    tags = parameter_tags(unet)
    assert set(engine.local_shards()) == {name for name in tags if tags[name] == "temporal"}
    assert_close(gathered(engine), unet, 2e-5)
    batch = micro_batches(9, 1)[0][0]
    with torch.no_grad():
        torch.testing.assert_close(output_of(engine, batch), output_of(unet, batch), rtol=1e-4, atol=1e-4)


def check_adapters_alone_train_as_in_plain_torch(ranks: Ranks) -> None:
    lora = LoraConfig(rank=2, alpha=4.0, target="attention")
    trained = ("spatial", "temporal")
    engine = ranks.engine(trained=trained, lora=lora)
    wanted, unet = plain_training(2, ranks.env.world, trained, lora)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(ranks.train(engine, range(2)), wanted, strict=True):
        assert abs(loss - wanted_loss) < 1e-5 * wanted_loss
        assert abs(norm - wanted_norm) < 1e-4 * wanted_norm
    assert engine.local_shards().keys() == random_adapters(lora).keys()
    assert_close(gathered(engine), unet, 2e-5)
    weights, frozen = random_weights(), engine.frozen_shards()
    assert frozen.keys() == weights.keys()
    for name, shard in frozen.items():
        assert torch.equal(engine.gather(name, shard), weights[name]), name


def check_steps_may_differ_in_their_number_of_micro_batches(ranks: Ranks) -> None:
    """The gradient is the mean over the micro-batches that the step has."""
    engine, world = ranks.shared_engine(), ranks.env.world
    for step, number in ((20, 1), (30, 3)):
        batches = [
            [batch for s in (step, step + 1) for batch in micro_batches(s, world)[rank]][:number]
            for rank in range(world)
        ]
        before = gathered(engine)
        unet = plain_unet(before)
        torch.stack([loss_of(unet, batch) for part in batches for batch in part]).mean().backward()
        squares = [p.grad.square().sum() for p in unet.parameters() if p.grad is not None]
        plain_norm = torch.stack(squares).sum().sqrt().item()
        for batch in batches[ranks.env.rank]:
            engine.backward(loss_of(engine, batch), number)
        assert abs(engine.gradient_norm() - plain_norm) < 1e-4 * plain_norm
        engine.step(RATES)
        after = gathered(engine)
        assert any(not torch.equal(after[name], before[name]) for name in before)


def check_gradient_norm_has_the_bits_of_deepspeeds_and_reads_nothing(ranks: Ranks) -> None:
    engine = ranks.shared_engine()
    for micro_batch in micro_batches(0, ranks.env.world)[ranks.env.rank]:
        engine.backward(loss_of(engine, micro_batch), ACCUMULATION)
    with HostReads() as reads:
        norms, norm = engine._group_norms(), engine.gradient_norm()
    assert reads.places == [], reads.places
    with HostReads() as reads:
        expected = type(engine._zero)._get_norm_groups(engine._zero)
    assert reads.places, "DeepSpeed's own function copies a constant for each group"
    assert [x.dtype for x in norms] == [x.dtype for x in expected] == [torch.float64] * len(norms)
    assert all(torch.equal(x, y) for x, y in zip(norms, expected, strict=True))
    assert norm.shape == () and norm.item() == torch.linalg.vector_norm(torch.stack(expected)).item()
    engine.discard_gradients()


def check_fast_host_loops_change_no_bit(ranks: Ranks) -> None:
    assert_same_bits(ranks, precision="bf16")


def check_fast_host_loops_change_no_bit_whatever_is_trained_and_kept(ranks: Ranks) -> None:
    assert_same_bits(ranks)
    assert_same_bits(ranks, precision="bf16", reduce_dtype="bf16", persistence_threshold=0)
    assert_same_bits(ranks, recompute="full", reduce_bucket=5000, prefetch_bucket=0)
    assert_same_bits(ranks, trained=("temporal",), max_reuse_distance=100_000)
    assert_same_bits(ranks, lora=LoraConfig(rank=2), precision="bf16")


def check_fast_host_loops_change_no_bit_of_an_offloaded_optimizer(ranks: Ranks) -> None:
    assert_same_bits(ranks, offload_optimizer=True)


def assert_same_bits(ranks: Ranks, **options: Any) -> None:
    """Train with and without the replacement of DeepSpeed's loops; losses, norms and shards are equal."""
    fast, own = (ranks.engine(**options, fast_host_loops=flag) for flag in (True, False))
    assert fast._replaced and not own._replaced
    dtype = torch.bfloat16 if options.get("precision") == "bf16" else torch.float32
    assert ranks.train(fast, range(4), dtype) == ranks.train(own, range(4), dtype)
    pairs = [(fast.local_shards(), own.local_shards()), (fast.frozen_shards(), own.frozen_shards())]
    pairs += [(fast.moments()[name], own.moments()[name]) for name in fast.moments()]
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def check_step_reads_at_most_one_number_on_the_host(ranks: Ranks) -> None:
    """The places of DeepSpeed that remain, with docs/gpu.md; the norm is read by the caller."""
    engine = ranks.engine()
    # DeepSpeed compares its traces among the ranks in the first passes.
    ranks.train(engine, range(3))
    batches = micro_batches(0, ranks.env.world)[ranks.env.rank]

    def places(known: bool) -> list[str]:
        with HostReads() as reads:
            for micro_batch in batches:
                engine.backward(loss_of(engine, micro_batch), ACCUMULATION)
            norm = engine.gradient_norm()
        numbers = (norm.item(),) if known else ()
        with reads:
            engine.step(RATES, *numbers)
        return reads.places

    assert places(known=True) == []
    assert places(known=False) == ["utils.py:is_invalid_grad_norm"]


def check_shards_are_written_between_earlier_and_later_gathers(ranks: Ranks) -> None:
    """The streams of a GPU are ordered around each place that writes shards."""
    engine = ranks.engine()
    calls: list[str] = []
    engine._streams, _ = fake_streams(calls)
    wanted = ["compute waits for gather", "gather waits for compute"]
    ranks.train(engine, range(1))
    assert calls == wanted
    engine.load_full(random_weights().items())
    assert calls == 2 * wanted
    with engine.weights(engine.local_shards()):
        assert calls == 3 * wanted
    assert calls == 4 * wanted


def check_step_with_a_nonfinite_gradient_changes_nothing(ranks: Ranks) -> None:
    for precision in ("fp32", "bf16"):
        engine = ranks.shared_engine(precision)
        ranks.train(engine, range(1))
        before = {name: shard.clone() for name, shard in engine.local_shards().items()}
        for micro_batch in micro_batches(0, ranks.env.world)[ranks.env.rank]:
            loss = loss_of(engine, micro_batch)
            engine.backward(loss * (float("nan") if ranks.env.rank == 0 else 1), ACCUMULATION)
        assert engine.gradient_norm() == float("inf")
        engine.step(RATES)
        assert all(torch.equal(shard, before[name]) for name, shard in engine.local_shards().items())
        ((_, norm),) = ranks.train(engine, range(1))
        assert 0 < norm < float("inf")
        assert all(shard.isfinite().all() for shard in engine.local_shards().values())


def check_discarded_gradients_leave_no_trace(ranks: Ranks, **zero: bool) -> None:
    """Discard gradients of more micro-batches than a step has, of fewer, and of none between two steps."""
    engine, world = ranks.engine(**zero), ranks.env.world
    wanted = ranks.train(ranks.engine(**zero), range(2))
    history = ranks.train(engine, range(1))
    for steps in (range(10, 12), range(12, 13)):
        batches = [batch for step in steps for batch in micro_batches(step, world)[ranks.env.rank]]
        batches = batches[: 2 * len(steps) - 1]
        for batch in batches:
            engine.backward(loss_of(engine, batch), ACCUMULATION)
        unet = plain_unet({name: engine.gather(name, shard) for name, shard in engine.local_shards().items()})
        losses = [
            loss_of(unet, batch)
            for rank in range(world)
            for batch in [b for step in steps for b in micro_batches(step, world)[rank]][: len(batches)]
        ]
        torch.stack(losses).mean().backward()
        squares = [p.grad.square().sum() for p in unet.parameters() if p.grad is not None]
        plain_norm = torch.stack(squares).sum().sqrt().item()
        assert abs(engine.gradient_norm() - plain_norm) < 1e-4 * plain_norm
        engine.discard_gradients()
    engine.discard_gradients()
    assert history + ranks.train(engine, range(1, 2)) == wanted


def check_offloaded_optimizer_discards_gradients_too(ranks: Ranks) -> None:
    check_discarded_gradients_leave_no_trace(ranks, offload_optimizer=True)
