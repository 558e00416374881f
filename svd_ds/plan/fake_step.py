"""One training step on fake tensors: the assembly of a run, with the project's own networks and objectives.

    batch -> draws -> CLIP -> VAE -> conditioner -> network -> loss -> backward -> AdamW -> EMA

What differs from a run: frozen networks have shapes and no weights (fake_networks.py), ZeRO-3 is counted
(fake_engine.py), and Triton and fused attention are stand-ins (fake_kernels.py).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from svd_ds.batch import Batch, Clip
from svd_ds.config import RunConfig
from svd_ds.inputs import Inputs
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner
from svd_ds.model.ops.attention import FLASH
from svd_ds.model.perceptual import Perceptual
from svd_ds.model.unet import parameter_tags
from svd_ds.parallel.env import Env
from svd_ds.parallel.local_norm import LocalNorm
from svd_ds.plan.fake_engine import FakeEngine, one_rank, recomputing
from svd_ds.plan.fake_kernels import counted_by
from svd_ds.plan.fake_networks import build_autoencoder, build_conditioner, made_on, move_stray_parameters
from svd_ds.plan.tracker import StepTracker
from svd_ds.sample import frozen_folder
from svd_ds.scalars import SCALARS
from svd_ds.tasks import Task, read_task
from svd_ds.training.ema import ShardEMA
from svd_ds.training.gradients import GradientComputation
from svd_ds.training.objectives.base import Objective
from svd_ds.training.objectives.decoder import DecoderObjective
from svd_ds.training.objectives.diffusion import DiffusionObjective, PreparedBatch
from svd_ds.training.optim import group_lrs, parameter_groups


@dataclass(frozen=True)
class StepRun:
    """One step that was run under a tracker."""

    tracker: StepTracker
    encoders: StepTracker
    """Tracker of the run in which the encoders ran: of this one, or of an earlier one with as many clips."""
    kept: list[int]
    """Indices of the storages between forward and backward pass."""


class FakeStep:
    """The networks of a run on fake tensors, and its training step.

    Args:
        config: settings of the run.
        device: cuda with fake_cuda.load, or the CPU.
        precision: bf16 or fp32.
        fake: False runs the step on real tensors, on a CPU: the tracker's result can then be compared with
            the allocator's.
    """

    def __init__(self, config: RunConfig, device: torch.device, precision: str, fake: bool = True) -> None:
        self.config = config = _without_packages(config)
        self.device, self.fake = device, fake
        self.mode: Any = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        with self.mode:
            self.autoencoder, self.conditioner = self._frozen()
            self.task = self._task(precision)
            with made_on(device, self.dtype):
                self.network = self.task.build()
            move_stray_parameters(self.network, device, self.dtype)
            self.trained = _trained_parameters(config, self.network, self.task)
            self.engine = FakeEngine(
                self.network,
                self.network.blocks(),
                self.trained,
                device,
                (config.optim.beta1, config.optim.beta2),
                config.parallel.offload_optimizer,
            )
            self.ema = ShardEMA(config.ema, self.engine.local_shards())
        self._encoded: dict[int, tuple[PreparedBatch, StepTracker]] = {}
        """Clips of the micro-batch -> what the frozen networks made of it, and the tracker of that run."""

    @property
    def frozen_networks(self) -> list[nn.Module]:
        """Frozen networks on the device."""
        networks = [self.autoencoder.network]
        if self.conditioner is not None and self.conditioner.encoder is not None:
            networks.append(self.conditioner.encoder.network)
        objective = self.task.objective
        if isinstance(objective, DecoderObjective) and objective.perceptual is not None:
            networks.append(objective.perceptual)
        return networks

    def run(self, policy: str, clips: int = 1) -> StepRun:
        """Run one step with one micro-batch. A UNet's encoders run only in the first call.

        Args:
            policy: recompute policy.
            clips: clips of the micro-batch.
        """
        objective, network = self.task.objective, self.network
        # A module whose inputs need no gradient: torch warns that its hook runs early.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        with self.mode, recomputing(network, network.blocks(), policy), one_rank():
            tracker = StepTracker(self.device, self._constants())
            self.engine.tracker = tracker
            if isinstance(objective, DiffusionObjective):
                objective = self._encoding_once(objective, tracker)
            host = objective.draw(Batch.from_clips([self._clip(ordinal) for ordinal in range(clips)]))
            gradients = GradientComputation(
                cast(Any, self.engine), objective, LocalNorm(network), rank=0, device=self.device
            )
            with tracker if self.fake else nullcontext(), counted_by(tracker), self._labelled(tracker, clips):
                self._step(objective, gradients, host)
        _, encoders = self._encoded.get(clips, (None, tracker))
        return StepRun(tracker, encoders, self.engine.kept)

    def _step(self, objective: Objective, gradients: GradientComputation, host: Batch) -> None:
        """Take a step, as training/loop.py does; the batch is copied as by training/prefetch.py."""
        batch = host.to(self.device)
        self.engine.tracker.adopt(_tensors_of(batch))  # On a CPU nothing is copied.
        found = gradients.compute([batch])
        numbers = found.numbers
        self.engine.step(group_lrs(self.config.optim, self.config.optim.lr))
        objective.end_step(numbers.terms)
        self.ema.update(self.engine.local_shards(), 2 * len(host), len(host))

    def _frozen(self) -> tuple[Autoencoder, Conditioner | None]:
        config, path = self.config, frozen_folder(self.config.frozen.path)
        autoencoder = build_autoencoder(path, config.frozen.chunk, self.device, self.dtype)
        if config.task != "unet":
            return autoencoder, None
        cached = config.data.latents
        return autoencoder, build_conditioner(config.conditioning, path, self.device, self.dtype, cached)

    def _task(self, precision: str) -> Task:
        config = self.config
        has_perceptual = config.task == "decoder" and config.loss.perceptual is not None
        if has_perceptual:
            # The file with its weights need not be there yet.
            loss = replace(config.loss, perceptual=None, perceptual_heads=None)
            config = replace(config, loss=loss)
        env = Env(0, 1, 0, 1, "127.0.0.1", 0, self.device, "gloo")
        fields = {entry.name: None for entry in dataclasses.fields(Inputs)}
        given = {
            "autoencoder": self.autoencoder,
            "conditioner": self.conditioner,
            "precision": precision,
            "resume": Path("checkpoint"),  # The weights of no file are read.
        }
        inputs = Inputs(**cast(Any, fields | given))
        with made_on(self.device, torch.float32):
            task = read_task(config, env, inputs)
            if has_perceptual:
                perceptual = Perceptual().eval().requires_grad_(False)
                cast(DecoderObjective, task.objective).perceptual = perceptual
        return task

    def _constants(self) -> Iterator[Tensor]:
        for network in (self.network, *self.frozen_networks):
            yield from network.parameters()
            yield from network.buffers()
        yield from self.engine.state_tensors()
        for averages in self.ema.averages.values():
            yield from averages
        objective = self.task.objective
        if isinstance(objective, DecoderObjective) and objective.discriminator is not None:
            yield from objective.discriminator.parameters.values()
            yield from (p.grad for p in objective.discriminator.parameters.values() if p.grad is not None)

    def _clip(self, ordinal: int) -> Clip:
        config = self.config
        data, context = config.data, config.conditioning.context
        frames, cached = data.num_frames, data.latents and config.task == "unet"
        moments_TMhw = context_LD = None
        if cached:
            cell = self.autoencoder.downsampling
            size = (2 * self.autoencoder.latent_channels, data.height // cell, data.width // cell)
            moments_TMhw = torch.empty(frames, *size, dtype=torch.float16)
            assert self.conditioner is not None
            if context != "none":
                tokens = config.conditioning.num_tokens
                context_LD = torch.empty(tokens, self.conditioner.context_width, dtype=torch.float16)
        num_read = (2 if config.conditioning.uses_last_frame else 1) if cached else frames
        frames_TCHW = torch.empty(num_read, 3, data.height, data.width, dtype=torch.uint8)
        scalars = {name: 1.0 for name, scalar in SCALARS.items() if not scalar.is_drawn}
        still = data.image_share > 0
        # The ordinal is beyond loss.adversarial_start, so that the whole loss is computed.
        ordinal += config.loss.adversarial_start
        return Clip(str(ordinal), ordinal, frames_TCHW, "", scalars, moments_TMhw, context_LD, still)

    def _encoding_once(self, objective: DiffusionObjective, tracker: StepTracker) -> DiffusionObjective:
        """Return the objective with a `prepare` that runs once for each size of the micro-batch."""

        def prepare(batch: Batch) -> PreparedBatch:
            if len(batch) not in self._encoded:
                self._encoded[len(batch)] = (DiffusionObjective.prepare(objective, batch), tracker)
            prepared, encoders = self._encoded[len(batch)]
            if encoders is not tracker:
                tracker.adopt(_tensors_of(prepared))
            return prepared

        kept = replace(objective)
        object.__setattr__(kept, "prepare", prepare)
        return kept

    @contextmanager
    def _labelled(self, tracker: StepTracker, clips: int) -> Iterator[None]:
        """Tell the tracker while the frozen networks run."""
        autoencoder, encoder = self.autoencoder, self.autoencoder.network.encoder
        encode = autoencoder.encode

        def count_chunk(*_: Any) -> None:
            tracker.chunks += 1

        def tracked_encode(frames: Tensor) -> Tensor:
            chunk = min(autoencoder.chunk, len(frames))
            with tracker.module("vae"), tracker.encoding(chunk, len(frames) // clips):
                moments = encode(frames)
            tracker.set_per_clip(moments)
            return moments

        handle = encoder.register_forward_pre_hook(count_chunk)
        autoencoder.encode = tracked_encode  # type: ignore[method-assign]
        handles = [handle]
        for network in self.frozen_networks[1:]:
            handles += _labelled_network(network, tracker)
        try:
            yield
        finally:
            del autoencoder.encode
            for handle in handles:
                handle.remove()


def _without_packages(config: RunConfig) -> RunConfig:
    """Replace backends that must be installed by ones with the same memory: the GPU node has them."""
    model = config.model
    backends: dict[str, Any] = {
        name: "sdpa" for name in ("spatial_attention", "temporal_attention") if getattr(model, name) in FLASH
    }
    return replace(config, model=replace(model, **backends))


def _trained_parameters(config: RunConfig, network: nn.Module, task: Task) -> list[str]:
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    tags = {name: tag for name, tag in parameter_tags(network).items() if task.is_trainable(name)}
    groups = parameter_groups(tags, shapes, config.optim)
    return [name for group in groups for name in group.parameter_names]


def _labelled_network(network: nn.Module, tracker: StepTracker) -> list[Any]:
    def enter(*_: Any) -> None:
        tracker.modules.append("perceptual" if isinstance(network, Perceptual) else "clip")

    def leave(*_: Any) -> None:
        tracker.modules.pop()

    return [network.register_forward_pre_hook(enter), network.register_forward_hook(leave)]


def _tensors_of(value: Any) -> Iterator[Tensor]:
    for entry in dataclasses.fields(value):
        part = getattr(value, entry.name)
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, dict):
            yield from part.values()
        elif dataclasses.is_dataclass(part):
            yield from _tensors_of(part)
