"""An engine around a small UNet on each rank, and the same training in plain torch as its reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from svd_ds.model.lora import LoraConfig, add_lora
from svd_ds.model.unet import UNet, UNetConfig, parameter_tags
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import Env
from svd_ds.parallel.groups import ModelParallelUnit
from svd_ds.parallel.recompute import apply_recompute
from svd_ds.parallel.zero import ZeroConfig, deepspeed_config

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
"""Large, so that Adam makes no full steps along gradients that are only rounding errors."""
NO_LORA = LoraConfig(rank=0)


class Ranks:
    """Builds and trains engines on this rank."""

    def __init__(self, env: Env, mpu: ModelParallelUnit, folder: str) -> None:
        self.folder = folder
        self.env = env
        self.mpu = mpu
        self._shared: dict[str, Engine] = {}

    def shared_engine(self, precision: str = "fp32") -> Engine:
        """Engine with the weights of `random_weights` and any optimizer state, made once per precision."""
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
        """New engine around the small UNet with the weights of `random_weights`."""
        settings = ZeroConfig(**{"persistence_threshold": 1000, "reduce_bucket": 100_000} | zero)
        config = deepspeed_config(settings, precision=precision, gradient_clip=GRADIENT_CLIP)
        with Engine.sharded_init(config, self.mpu):
            unet = UNet(SMALL)
            adapters = add_lora(unet, lora)
        apply_recompute(unet, unet.blocks(), recompute)
        groups = optimizer_groups(unet, trained, adapters)
        engine = Engine(
            unet, groups, config, self.mpu, leaves=unet.blocks().values(), betas=BETAS, eps=EPS,
            fast_host_loops=settings.fast_host_loops,
        )  # fmt: skip
        assert engine.notes == []
        engine.load_full((random_weights() | random_adapters(lora)).items())
        return engine

    def train(
        self, engine: Engine, steps: range, dtype: torch.dtype = torch.float32
    ) -> list[tuple[float, float]]:
        """Train, and return the mean loss of all ranks and the gradient norm of each step."""
        history = []
        for step in steps:
            total = torch.zeros(())
            for micro_batch in micro_batches(step, self.env.world)[self.env.rank]:
                loss = loss_of(engine, micro_batch)
                engine.backward(loss, ACCUMULATION)
                total += loss.detach()
            norm = engine.gradient_norm().item()
            engine.step(RATES)
            dist.all_reduce(total)
            history.append((total.item() / (ACCUMULATION * self.env.world), norm))
        return history


def optimizer_groups(unet: UNet, trained: tuple[str, ...], adapters: list[str]) -> list[dict]:
    parameters, tags = dict(unet.named_parameters()), parameter_tags(unet)
    names = adapters or list(parameters)
    return [
        {
            "name": tag,
            "params": [parameters[name] for name in names if tags[name] == tag],
            "weight_decay": WEIGHT_DECAY,
        }
        for tag in trained
    ]


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    """Weights that no layer multiplies by zero and that bfloat16 cannot represent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in UNet(SMALL).named_parameters()}
    return {
        name: (torch.randn(shape, generator=generator) * 0.08 + (name.endswith("weight") and len(shape) == 1))
        for name, shape in shapes.items()
    }


def random_adapters(lora: LoraConfig) -> dict[str, Tensor]:
    """Adapters whose zero-initialised halves are random too."""
    unet, generator = UNet(SMALL), torch.Generator().manual_seed(3)
    names = add_lora(unet, lora)
    shapes = {name: parameter.shape for name, parameter in unet.named_parameters()}
    return {name: torch.randn(shapes[name], generator=generator) * 0.3 for name in names}


def plain_unet(weights: dict[str, Tensor]) -> UNet:
    unet = UNet(SMALL)
    unet.load_state_dict(weights)
    return unet


def micro_batches(step: int, world: int) -> list[list[dict[str, Tensor]]]:
    """Inputs of a step, indexed by rank, then by micro-batch."""
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
    """Reference for `Ranks.train`: the same steps in plain torch, all micro-batches in one process."""
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


def gathered(engine: Engine) -> dict[str, Tensor]:
    return {name: engine.gather(name, shard) for name, shard in engine.local_shards().items()}


def assert_close(ours: dict[str, Tensor], theirs: UNet, tolerance: float) -> None:
    wanted = dict(theirs.named_parameters())
    worst = max((ours[name] - wanted[name].detach()).abs().max().item() for name in ours)
    assert worst < tolerance, f"weights differ by {worst}"
