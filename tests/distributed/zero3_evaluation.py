"""Evaluation under ZeRO-3 equals plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from svd_ds.batch import Batch, Clip
from svd_ds.diffusion.noise import NoiseConfig, build_noise_schedule
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner, ConditionerConfig
from svd_ds.model.unet import UNet
from svd_ds.sample import TINY
from svd_ds.training.ema import EMAConfig, ShardEMA
from svd_ds.training.evaluate import Evaluation, EvaluationConfig, FixedSet, as_eval_objective, sigma_in_bin
from svd_ds.training.objectives.diffusion import DiffusionObjective
from tests.distributed.zero3_harness import Ranks, gathered, plain_unet


def gradient_norm(unet: UNet, loss: Tensor) -> float:
    unet.zero_grad()
    loss.backward()
    gradients = [p.grad.flatten() for p in unet.parameters() if p.grad is not None]
    return torch.cat(gradients).norm().item()


def check_evaluation_equals_plain_torch_and_leaves_no_trace(ranks: Ranks) -> None:
    """Three clips on two ranks: one rank has a clip that does not count."""
    engine, env = ranks.engine(), ranks.env
    frames = torch.randint(0, 256, (4, 3, 3, 16, 16), generator=torch.Generator().manual_seed(5))
    clips = Batch.from_clips(
        [
            Clip(f"c{i}", i, x.to(torch.uint8), "", {"fps": 6.0, "motion_bucket": 100.0})
            for i, x in enumerate(frames)
        ]
    )
    config = ConditionerConfig(context="none", context_width=16, concat="ends")
    diffusion = DiffusionObjective(
        build_noise_schedule(NoiseConfig(), 16, 16),
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
            sigma_B = torch.tensor([sigma_in_bin(s, (i + 0.5) / 3) for i in range(3)])
            errors_BT = as_eval_objective(diffusion).errors(unet, known, sigma_B)
            assert abs(errors_BT.mean().item() - loss) < 1e-5 * loss, (s, loss)
            frame_errors.append(errors_BT.detach().mean(dim=0))
            if scale == 1.0:
                norm = gradient_norm(unet, errors_BT.mean())
                assert abs(measured.grad_norm[s] - norm) < 1e-4 * norm, (s, norm)
        if scale == 1.0:
            assert len(measured.grad_norm_by_frame) == known.x0_BTChw.shape[1]
            sigma_B = torch.tensor([sigma_in_bin(i, (i + 0.5) / 3) for i in range(3)])
            for t, found in enumerate(measured.grad_norm_by_frame):
                norm = gradient_norm(
                    unet, as_eval_objective(diffusion).errors(unet, known, sigma_B)[:, t].mean()
                )
                assert abs(found - norm) < 1e-4 * norm, (t, norm)
            by_frame = torch.stack(frame_errors).mean(dim=0)
            torch.testing.assert_close(by_frame, torch.tensor(measured.loss_by_frame), rtol=1e-5, atol=0)
