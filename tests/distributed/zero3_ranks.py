"""What each rank of test_zero3.py runs: the engine around a small UNet, against plain torch in one process.

    zero3_ranks.py RESULTS CHECK ...

Every rank goes through the checks named and writes RESULTS/rank-R.json: check -> traceback or null.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from svd_ds.batch import Batch, Clip
from svd_ds.data.cursor import Cursor
from svd_ds.diffusion.noise import NoiseConfig, build_noise
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner, ConditionerConfig
from svd_ds.model.lora import LoraConfig, add_lora
from svd_ds.model.unet import UNet, UNetConfig, parameter_tags
from svd_ds.parallel.collectives import SharedError
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import Env, init, shutdown
from svd_ds.parallel.groups import ModelParallelUnit, ParallelDims, create_groups, destroy_groups
from svd_ds.parallel.recompute import apply_recompute
from svd_ds.parallel.zero import ZeroConfig, deepspeed_config
from svd_ds.parallel.zero_leaf_modules import largest_leaf_module
from svd_ds.sample import TINY
from svd_ds.training.checkpoint import Checkpoints
from svd_ds.training.ema import EMAConfig, ShardEMA
from svd_ds.training.evaluate import Evaluation, EvaluationConfig, FixedSet, as_eval_objective, sigma_at
from svd_ds.training.objectives.base import Objective
from svd_ds.training.objectives.diffusion import DiffusionObjective
from svd_ds.training.progress import Progress
from svd_ds.training.retention import CheckpointConfig
from svd_ds.weights.shards import WeightShards

SMALL = UNetConfig(
    in_channels=9,
    masked=True,
    widths=(32,),
    num_layers=1,
    attention_levels=(True,),
    context_width=16,
    head_width=16,
    scalar_width=8,
)
ACCUMULATION = 2
MICRO_BATCH = 2
GRADIENT_CLIP = 0.05
RATES = {"spatial": 1e-3, "temporal": 2e-3, "embedding": 5e-4, "condition": 4e-4}
WEIGHT_DECAY = 0.1
BETAS = (0.8, 0.95)
EPS = 1e-4
"""Large, or Adam makes steps of the rounding errors of gradients that are nothing else."""
NO_LORA = LoraConfig(rank=0)


class Ranks:
    """This rank's place, and how to build an engine on it."""

    def __init__(self, env: Env, mpu: ModelParallelUnit, folder: str) -> None:
        self.folder = folder
        self.env = env
        self.mpu = mpu
        self._shared: dict[str, Engine] = {}

    def shared_engine(self, precision: str = "fp32") -> Engine:
        """An engine for checks that do not mind what it did before, with the weights of `random_weights`."""
        if precision not in self._shared:
            self._shared[precision] = self.engine(precision)
        self._shared[precision].load_full(random_weights().items())
        return self._shared[precision]

    def engine(
        self,
        precision: str = "fp32",
        recompute: str = "blocks",
        trained: tuple[str, ...] = tuple(RATES),
        lora: LoraConfig = NO_LORA,
        **zero: int | bool | str,
    ) -> Engine:
        """An engine around the small UNet with the weights of `random_weights`."""
        config = deepspeed_config(
            ZeroConfig(persistence_threshold=1000, reduce_bucket=100_000, **zero),
            precision=precision,
            gradient_clip=GRADIENT_CLIP,
        )
        with Engine.sharded_init(config, self.mpu):
            unet = UNet(SMALL)
            adapters = add_lora(unet, lora)
        apply_recompute(unet, unet.blocks(), recompute)
        groups = optimizer_groups(unet, trained, adapters)
        engine = Engine(unet, groups, config, self.mpu, leaves=unet.blocks().values(), betas=BETAS, eps=EPS)
        engine.load_full((random_weights() | random_adapters(lora)).items())
        return engine

    def train(
        self, engine: Engine, steps: range, dtype: torch.dtype = torch.float32
    ) -> list[tuple[float, float]]:
        """Loss over all ranks and gradient norm of each step."""
        history = []
        for step in steps:
            total = torch.zeros(())
            for micro_batch in micro_batches(step, self.env.world)[self.env.rank]:
                loss = loss_of(engine, micro_batch)
                engine.backward(loss, ACCUMULATION)
                total += loss.detach()
            norm = engine.gradient_norm()
            engine.step(RATES)
            dist.all_reduce(total)
            history.append((total.item() / (ACCUMULATION * self.env.world), norm))
        return history


def optimizer_groups(unet: UNet, trained: tuple[str, ...], adapters: list[str]) -> list[dict]:
    parameters, tags = dict(unet.named_parameters()), parameter_tags(unet)
    learns = adapters or list(parameters)
    return [
        {
            "name": tag,
            "params": [parameters[name] for name in learns if tags[name] == tag],
            "weight_decay": WEIGHT_DECAY,
        }
        for tag in trained
    ]


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    """Weights under which every layer does something, zero-initialised ones too. No bfloat16 holds them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in UNet(SMALL).named_parameters()}
    return {
        name: (torch.randn(shape, generator=generator) * 0.08 + (name.endswith("weight") and len(shape) == 1))
        for name, shape in shapes.items()
    }


def random_adapters(lora: LoraConfig) -> dict[str, Tensor]:
    """Adapters that do something, the zero-initialised halves too."""
    unet, generator = UNet(SMALL), torch.Generator().manual_seed(3)
    names = add_lora(unet, lora)
    shapes = {name: parameter.shape for name, parameter in unet.named_parameters()}
    return {name: torch.randn(shapes[name], generator=generator) * 0.3 for name in names}


def gradient_norm(unet: UNet, loss: Tensor) -> float:
    unet.zero_grad()
    loss.backward()
    gradients = [p.grad.flatten() for p in unet.parameters() if p.grad is not None]
    return torch.cat(gradients).norm().item()


def plain_unet(weights: dict[str, Tensor]) -> UNet:
    unet = UNet(SMALL)
    unet.load_state_dict(weights)
    return unet


def micro_batches(step: int, world: int) -> list[list[dict[str, Tensor]]]:
    """The clips of a step, [rank][micro-batch]."""
    generator = torch.Generator().manual_seed(1000 + step)

    def draw(*shape: int) -> Tensor:
        return torch.randn(MICRO_BATCH, *shape, generator=generator)

    def micro_batch() -> dict[str, Tensor]:
        x = draw(3, 9, 4, 4)
        x[:, :, -1] = torch.tensor([1.0, 0, 1]).view(3, 1, 1)
        inputs = {"x": x, "noise": draw(), "context": draw(5, 16), "scalars": draw(3)}
        return inputs | {"target": draw(3, 4, 4, 4)}

    return [[micro_batch() for _ in range(ACCUMULATION)] for _ in range(world)]


def output_of(net: Callable[..., Tensor], batch: dict[str, Tensor]) -> Tensor:
    return net(batch["x"], batch["noise"], batch["context"], batch["scalars"], None)


def loss_of(net: Callable[..., Tensor], batch: dict[str, Tensor]) -> Tensor:
    return (output_of(net, batch).float() - batch["target"]).square().mean()


def plain_training(
    num_steps: int, world: int, trained: tuple[str, ...] = tuple(RATES), lora: LoraConfig = NO_LORA
) -> tuple[list[tuple[float, float]], UNet]:
    """What `Ranks.train` must reproduce: the same steps in plain torch, all clips on one rank."""
    unet = plain_unet(random_weights())
    groups = optimizer_groups(unet, trained, add_lora(unet, lora))
    unet.load_state_dict(random_adapters(lora), strict=False)
    groups = [group | {"lr": RATES[group["name"]]} for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    parameters = [parameter for group in groups for parameter in group["params"]]
    history = []
    for step in range(num_steps):
        losses = [loss_of(unet, batch) for rank in micro_batches(step, world) for batch in rank]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history, unet


def shared_folder(ranks: Ranks) -> str:
    """A new temporary folder, the same on every rank."""
    folder = [tempfile.mkdtemp(dir=ranks.folder) if ranks.env.rank == 0 else None]
    dist.broadcast_object_list(folder)
    return folder[0]


class NoObjective(Objective):
    """For checkpoints of an engine alone."""

    def loss(self, net: Callable[..., Tensor], batch: Batch) -> Tensor:
        raise AssertionError("nobody learns from it")


class Saved:
    """The checkpoints of an engine, in a folder of their own."""

    def __init__(self, ranks: Ranks) -> None:
        self.store = Checkpoints(Path(shared_folder(ranks)), CheckpointConfig(), ranks.env, "unet")
        self.store.start_session(0)

    def save(self, engine: Engine, step: int = 1) -> None:
        """Begin to; `store.finish` ends it."""
        ema = ShardEMA(EMAConfig(), engine.local_shards())
        self.store.save(Progress(Cursor(step, ""), step), engine, ema, NoObjective(), {})

    def load(self, engine: Engine) -> Engine:
        """Put the newest into a fresh engine."""
        self.store.finish()
        path = self.store.latest()
        assert path is not None
        self.store.load(path, engine, ShardEMA(EMAConfig(), engine.local_shards()), NoObjective())
        return engine


def gathered(engine: Engine) -> dict[str, Tensor]:
    return {name: engine.gather(name, shard) for name, shard in engine.local_shards().items()}


def assert_close(ours: dict[str, Tensor], theirs: UNet, tolerance: float) -> None:
    wanted = dict(theirs.named_parameters())
    worst = max((ours[name] - wanted[name].detach()).abs().max().item() for name in ours)
    assert worst < tolerance, f"weights differ by {worst}"


def check_no_rank_holds_the_model(ranks: Ranks) -> None:
    """Neither when it is built nor in a step, in which two blocks and a parameter are gathered at most."""
    config = deepspeed_config(ZeroConfig(), precision="bf16", gradient_clip=1.0)
    with Engine.sharded_init(config, ranks.mpu):
        unet = UNet(SMALL)
    sizes = {name: tensor.numel() for name, tensor in random_weights().items()}
    for name, parameter in unet.named_parameters():
        assert parameter.numel() == 0, f"{name} is whole"
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


def check_equals_plain_torch_and_resumes_bitwise(ranks: Ranks) -> None:
    engine = ranks.engine()
    wanted, unet = plain_training(5, ranks.env.world)
    before = ranks.train(engine, range(3))
    saved = Saved(ranks)
    saved.save(engine)
    after = ranks.train(engine, range(3, 5))
    for (loss, norm), (wanted_loss, wanted_norm) in zip(before + after, wanted, strict=True):
        assert abs(loss - wanted_loss) < 1e-5 * wanted_loss, (before + after, wanted)
        assert abs(norm - wanted_norm) < 1e-4 * wanted_norm, (before + after, wanted)
        assert norm > GRADIENT_CLIP, "clipping is not exercised"
    assert_close(gathered(engine), unet, 2e-5)

    resumed = saved.load(ranks.engine())
    assert ranks.train(resumed, range(3, 5)) == after, "a resumed run differs"
    final = resumed.local_shards()
    assert all(torch.equal(shard, final[name]) for name, shard in engine.local_shards().items())


def check_recomputation_changes_nothing(ranks: Ranks) -> None:
    kept = ranks.engine(recompute="none")
    wanted = ranks.train(kept, range(2))
    for policy in ("blocks", "attention", "full"):
        recomputed = ranks.engine(recompute=policy)
        assert ranks.train(recomputed, range(2)) == wanted, policy
        shards = recomputed.local_shards()
        assert all(torch.equal(shard, shards[name]) for name, shard in kept.local_shards().items()), policy


def check_bf16_has_exact_master_weights_and_resumes_bitwise(ranks: Ranks) -> None:
    engine, weights = ranks.shared_engine("bf16"), random_weights()
    masters = gathered(engine)
    assert all(torch.equal(masters[name], weights[name]) for name in weights), (
        "loading rounds the master weights"
    )
    batch = micro_batches(0, 1)[0][0]
    with torch.no_grad():
        output = output_of(engine, batch)
        wanted = output_of(plain_unet(weights).to(torch.bfloat16), batch)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, wanted)

    history, (wanted_history, _) = ranks.train(engine, range(3)), plain_training(3, ranks.env.world)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(history, wanted_history, strict=True):
        assert abs(loss - wanted_loss) < 0.02 * wanted_loss, (history, wanted_history)
        assert abs(norm - wanted_norm) < 0.1 * wanted_norm, (history, wanted_history)
    moved = gathered(engine)
    assert all(not torch.equal(moved[name], weights[name]) for name in weights), "a parameter never moved"

    saved = Saved(ranks)
    saved.save(engine)
    resumed = saved.load(ranks.engine("bf16"))
    assert ranks.train(resumed, range(3, 5)) == ranks.train(engine, range(3, 5)), "a resumed run differs"


def check_weights_loaded_in_the_middle_are_used(ranks: Ranks) -> None:
    engine, batch = ranks.shared_engine(), micro_batches(7, 1)[0][0]
    ranks.train(engine, range(1))
    weights = random_weights(seed=1)
    assert engine.load_full(weights.items()) == []
    with torch.no_grad():
        torch.testing.assert_close(output_of(engine, batch), output_of(plain_unet(weights), batch))
    without_last = list(random_weights(seed=2).items())[:-1]
    assert engine.load_full(without_last) == list(weights)[-1:]


def check_borrowed_weights_are_given_back(ranks: Ranks) -> None:
    for precision in ("fp32", "bf16"):
        engine, batch = ranks.shared_engine(precision), micro_batches(7, 1)[0][0]
        ranks.train(engine, range(1))
        own = {name: shard.clone() for name, shard in engine.local_shards().items()}
        with torch.no_grad():
            before = output_of(engine, batch)
            with engine.weights({name: 0.5 * shard for name, shard in own.items()}):
                during = output_of(engine, batch)
            after = output_of(engine, batch)
        halved = plain_unet({name: 0.5 * engine.gather(name, shard) for name, shard in own.items()})
        with torch.no_grad():
            wanted = output_of(halved.to(before.dtype), batch)
        torch.testing.assert_close(during, wanted)
        assert torch.equal(before, after)
        assert all(torch.equal(shard, own[name]) for name, shard in engine.local_shards().items())
        ranks.train(engine, range(1))


def check_a_save_that_fails_on_one_rank_ends_it_on_all(ranks: Ranks) -> None:
    engine, saved = ranks.shared_engine(), Saved(ranks)
    saved.save(engine, step=1)
    saved.store.finish()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.env.rank == ranks.env.world - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        saved.save(engine, step=2)
        saved.store.finish()
    except SharedError as error:
        assert "step-0000002" in str(error), error
    else:
        raise AssertionError("nobody noticed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    dist.barrier()
    assert sorted(path.name for path in saved.store.folder.glob("step-*")) == ["step-0000001"]


def check_frozen_parts_stay_and_the_rest_learns_right(ranks: Ranks) -> None:
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


def check_frozen_parts_are_saved_as_they_came_and_resumed(ranks: Ranks) -> None:
    """Computing in bfloat16 rounds no weight that is not trained: not in memory, nor in a checkpoint."""
    weights, tags = random_weights(), parameter_tags(plain_unet(random_weights()))
    lora = LoraConfig(rank=2, alpha=4.0, target="attention")
    for trained, adapters in ((("temporal",), NO_LORA), (("spatial", "temporal"), lora)):
        engine = ranks.engine("bf16", trained=trained, lora=adapters)
        ranks.train(engine, range(1))
        saved, resumed = Saved(ranks), ranks.engine("bf16", trained=trained, lora=adapters)
        saved.save(engine)
        resumed.load_full(random_weights(seed=1).items())
        saved.load(resumed)
        files = WeightShards(saved.store.folder / "step-0000001" / "unet")
        for name, shard in resumed.frozen_shards().items():
            assert torch.equal(resumed.gather(name, shard), weights[name]), name
            numel = weights[name].numel()
            assert torch.equal(files.read(name, numel, 0, numel), weights[name].flatten()), name
        learns = random_adapters(adapters) or {name for name in weights if tags[name] in trained}
        assert engine.local_shards().keys() == set(learns)
        assert engine.frozen_shards().keys() == weights.keys() - set(learns)
        assert ranks.train(resumed, range(1, 3)) == ranks.train(engine, range(1, 3)), "a resumed run differs"


def check_adapters_learn_alone_and_right(ranks: Ranks) -> None:
    lora = LoraConfig(rank=2, alpha=4.0, target="attention")
    trained = ("spatial", "temporal")
    engine = ranks.engine(trained=trained, lora=lora)
    wanted, unet = plain_training(2, ranks.env.world, trained, lora)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(ranks.train(engine, range(2)), wanted, strict=True):
        assert abs(loss - wanted_loss) < 1e-5 * wanted_loss
        assert abs(norm - wanted_norm) < 1e-4 * wanted_norm
    assert engine.local_shards().keys() == random_adapters(lora).keys()
    assert_close(gathered(engine), unet, 2e-5)
    weights = random_weights()
    for name, shard in engine.frozen_shards().items():
        assert torch.equal(engine.gather(name, shard), weights[name]), name


def check_wrong_weights_are_refused(ranks: Ranks) -> None:
    engine = ranks.shared_engine()
    name, tensor = next(iter(random_weights().items()))
    for stream, words in (
        ([("no.such.weight", tensor)], ["no.such.weight"]),
        ([(name, torch.zeros(3, 1))], [name, "(3, 1)", str(tuple(tensor.shape))]),
    ):
        try:
            engine.load_full(stream)
        except ValueError as error:
            assert all(word in str(error) for word in words), error
        else:
            raise AssertionError("not refused")


def check_a_gradient_that_is_not_finite_changes_nothing(ranks: Ranks) -> None:
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


def check_forgotten_gradients_leave_no_trace(ranks: Ranks, **zero: bool) -> None:
    """More micro-batches than a step has, fewer, and none are forgotten between two steps."""
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


def check_steps_may_differ_in_their_micro_batches(ranks: Ranks) -> None:
    """As buckets do: the gradient is the mean over those that the step has, and the step is taken."""
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


def check_evaluation_equals_plain_torch_and_leaves_no_trace(ranks: Ranks) -> None:
    """Three clips on two ranks: one of them has a clip that does not count."""
    engine, env = ranks.engine(), ranks.env
    frames = torch.randint(0, 256, (4, 3, 3, 16, 16), generator=torch.Generator().manual_seed(5))
    clips = Batch.from_clips(
        [Clip(f"c{i}", i, x.to(torch.uint8), "", 6.0, 100.0) for i, x in enumerate(frames)]
    )
    config = ConditionerConfig(context="none", context_width=16, concat="ends")
    diffusion = DiffusionObjective(
        build_noise(NoiseConfig(), 16, 16),
        0.1,
        Autoencoder.load(TINY),
        Conditioner.load(config, TINY),
        seed=4,
    )
    own = clips.select(range(env.rank, 4, env.world))
    evaluation = Evaluation(
        EvaluationConfig(clips=3), FixedSet("data", own), 1, as_eval_objective(diffusion), env
    )
    history = ranks.train(engine, range(1))
    ema = ShardEMA(EMAConfig(), {name: 0.5 * shard for name, shard in engine.local_shards().items()})
    measured = evaluation.measure(engine, ema)
    weights = gathered(engine)
    history += ranks.train(engine, range(1, 2))
    assert history == ranks.train(ranks.engine(), range(2)), "training saw the evaluation"

    known = as_eval_objective(diffusion).prepare(clips.select(range(3)))
    for scale, losses in ((1.0, measured.loss), (0.5, measured.loss_average)):
        unet, frame_errors = plain_unet({name: scale * value for name, value in weights.items()}), []
        for s, loss in enumerate(losses):
            sigma_B = torch.tensor([sigma_at(s, (i + 0.5) / 3) for i in range(3)])
            errors_BT = as_eval_objective(diffusion).errors(unet, known, sigma_B)
            assert abs(errors_BT.mean().item() - loss) < 1e-5 * loss, (s, loss)
            frame_errors.append(errors_BT.detach().mean(dim=0))
            if scale == 1.0:
                norm = gradient_norm(unet, errors_BT.mean())
                assert abs(measured.grad_norm[s] - norm) < 1e-4 * norm, (s, norm)
        if scale == 1.0:
            assert len(measured.grad_norm_by_frame) == known.x0_BTChw.shape[1]
            sigma_B = torch.tensor([sigma_at(i, (i + 0.5) / 3) for i in range(3)])
            for t, found in enumerate(measured.grad_norm_by_frame):
                norm = gradient_norm(
                    unet, as_eval_objective(diffusion).errors(unet, known, sigma_B)[:, t].mean()
                )
                assert abs(found - norm) < 1e-4 * norm, (t, norm)
            by_frame = torch.stack(frame_errors).mean(dim=0)
            torch.testing.assert_close(by_frame, torch.tensor(measured.loss_by_frame), rtol=1e-5, atol=0)


def check_offloaded_optimizer_forgets_too(ranks: Ranks) -> None:
    check_forgotten_gradients_leave_no_trace(ranks, offload_optimizer=True)


def check_offloaded_optimizer_equals_plain_torch_and_resumes_bitwise(ranks: Ranks) -> None:
    wanted, unet = plain_training(3, ranks.env.world)
    engine = ranks.engine(offload_optimizer=True)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(ranks.train(engine, range(3)), wanted, strict=True):
        assert abs(loss - wanted_loss) < 1e-5 * wanted_loss
        assert abs(norm - wanted_norm) < 1e-4 * wanted_norm
    assert_close(gathered(engine), unet, 2e-5)
    saved = Saved(ranks)
    saved.save(engine)
    resumed = saved.load(ranks.engine(offload_optimizer=True))
    assert ranks.train(resumed, range(3, 5)) == ranks.train(engine, range(3, 5)), "a resumed run differs"


def checks() -> Iterator[tuple[str, Callable[[Ranks], None]]]:
    for name, value in globals().items():
        if name.startswith("check_"):
            yield name.removeprefix("check_"), value


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    env = Env.read()
    init(env, timeout=timedelta(seconds=60))
    ranks = Ranks(env, create_groups(ParallelDims(env.world)), folder)
    results = {}
    for name, check in checks():
        if name in names:
            torch.manual_seed(env.rank)
            try:
                check(ranks)
                results[name] = None
            except Exception:
                results[name] = traceback.format_exc()
    Path(folder, f"rank-{env.rank}.json").write_text(json.dumps(results))
    destroy_groups()
    shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
