"""What a run trains, and to what end: what differs between training the UNet and training the decoder.

Each task is one function here, from a run's config and inputs to a Task. The rest of the trainer knows none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from svd_ds.config import RunConfig
from svd_ds.diffusion.noise import build_noise
from svd_ds.inputs import Inputs
from svd_ds.model.lora import add_lora, is_adapter
from svd_ds.model.unet import UNet
from svd_ds.training.checkpoint import Settings
from svd_ds.training.objective import Objective
from svd_ds.training.preview import Render, Sampling
from svd_ds.training.step import Diffusion


@dataclass(frozen=True)
class Task:
    """What a run trains."""

    build: Callable[[], UNet]
    """Makes the network with all that is put on it."""
    learns: Callable[[str], bool]
    """Whether the parameter of a name may learn; its tag's rate decides further."""
    settings: Settings
    """What a checkpoint says of the network."""
    objective: Objective
    render: Render
    """Makes the previews."""


def unet_task(config: RunConfig, inputs: Inputs) -> Task:
    """Diffusion (arXiv 2311.15127 section D): the UNet, or adapters on it."""
    assert inputs.conditioner is not None, "a UNet is conditioned"

    def build() -> UNet:
        unet = UNet(config.model)
        add_lora(unet, config.lora)
        return unet

    adapters = {"lora.json": asdict(config.lora)} if config.lora.rank else {}
    return Task(
        build=build,
        learns=is_adapter if config.lora.rank else lambda name: True,
        settings={"config.json": asdict(config.model), **adapters},
        objective=Diffusion(
            noise=build_noise(config.noise, config.data.height, config.data.width),
            offset_noise=config.noise.offset_noise,
            autoencoder=inputs.autoencoder,
            conditioner=inputs.conditioner,
            seed=config.run.seed,
        ),
        render=Sampling(config.sampling, inputs.autoencoder, inputs.conditioner),
    )
