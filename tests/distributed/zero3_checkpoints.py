"""Checkpoints of an engine resume bitwise, and a save that fails on one rank fails on all."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from svd_ds.batch import Batch
from svd_ds.data.cursor import Cursor
from svd_ds.model.lora import LoraConfig
from svd_ds.model.unet import parameter_tags
from svd_ds.parallel.collectives import SharedError
from svd_ds.parallel.engine import Engine
from svd_ds.training.checkpoint import Checkpoints
from svd_ds.training.ema import EMAConfig, ShardEMA
from svd_ds.training.objectives.base import Objective
from svd_ds.training.progress import Progress
from svd_ds.training.retention import CheckpointConfig
from svd_ds.weights.shards import WeightShards
from tests.distributed.zero3_harness import (
    GRADIENT_CLIP,
    NO_LORA,
    Ranks,
    assert_close,
    gathered,
    micro_batches,
    output_of,
    plain_training,
    plain_unet,
    random_adapters,
    random_weights,
)


def shared_folder(ranks: Ranks) -> str:
    """Create a temporary folder, the same on every rank."""
    folder = [tempfile.mkdtemp(dir=ranks.folder) if ranks.env.rank == 0 else None]
    dist.broadcast_object_list(folder)
    return folder[0]


class NoObjective(Objective):
    """Objective without state, for checkpoints of an engine alone."""

    def draw(self, batch: Batch) -> Batch:
        raise AssertionError("no test draws for this loss")

    def loss(self, net: Callable[..., Tensor], batch: Batch) -> Tensor:
        raise AssertionError("no test computes this loss")


class CheckpointFolder:
    """Checkpoints of an engine in a new folder, the same on all ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self.store = Checkpoints(Path(shared_folder(ranks)), CheckpointConfig(), ranks.env, "unet")
        self.store.start_session(0)

    def save(self, engine: Engine, step: int = 1) -> None:
        """Begin a save; `store.finish` completes it."""
        ema = ShardEMA(EMAConfig(), engine.local_shards())
        self.store.save(Progress(Cursor(step, ""), step), engine, ema, NoObjective(), {})

    def load(self, engine: Engine) -> Engine:
        """Load the newest checkpoint into a fresh engine."""
        self.store.finish()
        path = self.store.latest()
        assert path is not None
        self.store.load(path, engine, ShardEMA(EMAConfig(), engine.local_shards()), NoObjective())
        return engine


def check_equals_plain_torch_and_resumes_bitwise(ranks: Ranks) -> None:
    engine = ranks.engine()
    wanted, unet = plain_training(5, ranks.env.world)
    before = ranks.train(engine, range(3))
    saved = CheckpointFolder(ranks)
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

    saved = CheckpointFolder(ranks)
    saved.save(engine)
    resumed = saved.load(ranks.engine("bf16"))
    assert ranks.train(resumed, range(3, 5)) == ranks.train(engine, range(3, 5)), "a resumed run differs"


def check_offloaded_optimizer_equals_plain_torch_and_resumes_bitwise(ranks: Ranks) -> None:
    wanted, unet = plain_training(3, ranks.env.world)
    engine = ranks.engine(offload_optimizer=True)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(ranks.train(engine, range(3)), wanted, strict=True):
        assert abs(loss - wanted_loss) < 1e-5 * wanted_loss
        assert abs(norm - wanted_norm) < 1e-4 * wanted_norm
    assert_close(gathered(engine), unet, 2e-5)
    saved = CheckpointFolder(ranks)
    saved.save(engine)
    resumed = saved.load(ranks.engine(offload_optimizer=True))
    assert ranks.train(resumed, range(3, 5)) == ranks.train(engine, range(3, 5)), "a resumed run differs"


def check_frozen_parameters_are_saved_unrounded_and_resumed(ranks: Ranks) -> None:
    """Computation in bfloat16 rounds no frozen weight, in memory or in a checkpoint."""
    weights, tags = random_weights(), parameter_tags(plain_unet(random_weights()))
    lora = LoraConfig(rank=2, alpha=4.0, target="attention")
    for trained, adapters in ((("temporal",), NO_LORA), (("spatial", "temporal"), lora)):
        engine = ranks.engine("bf16", trained=trained, lora=adapters)
        ranks.train(engine, range(1))
        saved, resumed = CheckpointFolder(ranks), ranks.engine("bf16", trained=trained, lora=adapters)
        saved.save(engine)
        resumed.load_full(random_weights(seed=1).items())
        saved.load(resumed)
        files = WeightShards(saved.store.folder / "step-0000001" / "unet")
        for name, shard in resumed.frozen_shards().items():
            assert torch.equal(resumed.gather(name, shard), weights[name]), name
            numel = weights[name].numel()
            assert torch.equal(files.read(name, numel, 0, numel), weights[name].flatten()), name
        trained_names = set(random_adapters(adapters) or (name for name in weights if tags[name] in trained))
        assert engine.local_shards().keys() == trained_names
        assert engine.frozen_shards().keys() == weights.keys() - trained_names
        assert ranks.train(resumed, range(1, 3)) == ranks.train(engine, range(1, 3)), "a resumed run differs"


def check_save_that_fails_on_one_rank_fails_on_all(ranks: Ranks) -> None:
    engine, saved = ranks.shared_engine(), CheckpointFolder(ranks)
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
        raise AssertionError("the save succeeded")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    dist.barrier()
    assert sorted(path.name for path in saved.store.folder.glob("step-*")) == ["step-0000001"]
