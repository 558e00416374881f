"""Cases of the benchmarks, from the command line: networks, clips and inputs."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svd_ds.model.unet import PIXELS_PER_LATENT, UNetConfig

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""x, c_noise, context and scalars of `UNet.forward`."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """Network, clip and precision of one line of a table; height and width are in pixels."""

    widths: tuple[int, ...]
    num_frames: int
    height: int
    width: int
    num_tokens: int
    dtype: str
    recompute: str = "none"
    batch: int | None = 1
    """Clips of a step; None: the largest number that fits the GPU."""

    @property
    def clip(self) -> str:
        """Frames and size, as in 14 x 256x384."""
        return f"{self.num_frames} x {self.height}x{self.width}"

    @property
    def config(self) -> UNetConfig:
        """Config of the network: transformers at all levels but the last, as in the released one."""
        levels = len(self.widths)
        attends = tuple(level < max(levels - 1, 1) for level in range(levels))
        return UNetConfig(widths=self.widths, attention_levels=attends, num_frames=self.num_frames)

    def inputs(self, device: torch.device) -> Inputs:
        """Draw inputs of the network, the same at each call."""
        size = (self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT)
        config, batch = self.config, self.batch or 1
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, device=device, generator=generator)

        latents = draw(self.num_frames, config.in_channels, *size).to(DTYPES[self.dtype])
        context = draw(self.num_tokens, config.context_width).to(DTYPES[self.dtype])
        scalars = torch.tensor([6.0, 127.0, 0.02], device=device).expand(batch, -1)
        return latents, draw(), context, scalars


def add_case_options(
    parser: argparse.ArgumentParser, *, size: str, frames: int, tokens: str, dtype: str
) -> None:
    """Add the options of `read_cases`; the arguments are their defaults."""
    add = parser.add_argument
    add(
        "--size",
        default=size,
        help=f"[FRAMESx]HEIGHTxWIDTH in pixels; like tokens and dtype, several with commas; {size}",
    )
    add("--frames", type=int, default=frames, help=f"frames of a clip; default {frames}")
    add("--widths", default="64,128,256,256", help="channels at each level; default 64,128,256,256")
    add("--tokens", default=tokens, help=f"context tokens; default {tokens}")
    add("--dtype", default=dtype, help=f"fp32, bf16 or both; default {dtype}")


def read_cases(arguments: argparse.Namespace, counts: Iterable[str], **common: Any) -> list[Case]:
    """Make a case of every combination of size, tokens and dtype.

    Args:
        arguments: the parsed options.
        counts: names of further options that must be at least 1.
        common: further fields of all cases.

    Raises:
        ValueError: an option is invalid.
    """
    widths, tokens = read_numbers("widths", arguments.widths), read_numbers("tokens", arguments.tokens)
    for name in ("frames", *counts):
        if (number := getattr(arguments, name)) < 1:
            raise ValueError(f"--{name} is {number}: it must be at least 1")
    dtypes = arguments.dtype.split(",")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"--dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    cases = []
    for size, num_tokens, dtype in itertools.product(arguments.size.split(","), tokens, dtypes):
        sides = read_numbers("size", size, "x")
        multiple = PIXELS_PER_LATENT * 2 ** (len(widths) - 1)
        *frames, height, width = sides if len(sides) in (2, 3) else (0, 1, 1)
        if height % multiple or width % multiple:
            raise ValueError(f"--size is {size!r}: it must be HEIGHTxWIDTH, multiples of {multiple} pixels")
        num_frames = frames[0] if frames else arguments.frames
        cases.append(Case(widths, num_frames, height, width, num_tokens, dtype, **common))
    return cases


def read_numbers(name: str, text: str, separator: str = ",") -> tuple[int, ...]:
    """Parse the numbers of an option.

    Raises:
        ValueError: one of them is not a positive integer.
    """
    parts = text.split(separator)
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--{name} is {text!r}: it must be positive integers, separated by {separator!r}")
    return tuple(map(int, parts))
