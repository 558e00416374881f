"""What the benchmarks time, as their command lines name it: networks, clips, inputs."""

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
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One line of the table. Height and width are pixels; batch None: the largest that fits the GPU."""

    widths: tuple[int, ...]
    num_frames: int
    height: int
    width: int
    num_tokens: int
    dtype: str
    recompute: str = "none"
    batch: int | None = 1

    @property
    def clip(self) -> str:
        return f"{self.num_frames} x {self.height}x{self.width}"

    @property
    def config(self) -> UNetConfig:
        levels = len(self.widths)
        attends = tuple(level < max(levels - 1, 1) for level in range(levels))
        return UNetConfig(widths=self.widths, attention_levels=attends, num_frames=self.num_frames)

    def inputs(self, device: torch.device) -> Inputs:
        """Latents with their conditioning, noise level, context and scalars: what both networks take."""
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
    """The options that `read_cases` reads, and what they are where they are not given."""
    add = parser.add_argument
    add(
        "--size",
        default=size,
        help=f"[FRAMESx]HEIGHTxWIDTH in pixels; like tokens and dtype, several with commas; {size}",
    )
    add("--frames", type=int, default=frames, help=f"default {frames}")
    add("--widths", default="64,128,256,256", help="channels at each level; default 64,128,256,256")
    add("--tokens", default=tokens, help=f"of the context; default {tokens}")
    add("--dtype", default=dtype, help=f"default {dtype}")


def read_cases(arguments: argparse.Namespace, counts: Iterable[str], **common: Any) -> list[Case]:
    """Every combination of size, tokens and dtype.

    counts: further options that must be at least 1; common: further fields of each case.
    """
    widths, tokens = read_numbers("widths", arguments.widths), read_numbers("tokens", arguments.tokens)
    for name in ("frames", *counts):
        if (number := getattr(arguments, name)) < 1:
            raise ValueError(f"--{name} is {number}: it must be at least 1")
    dtypes = arguments.dtype.split(",")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"--dtype is {dtype!r}: choose {' or '.join(DTYPES)}")
    cases = []
    for size, num_tokens, dtype in itertools.product(arguments.size.split(","), tokens, dtypes):
        sides = read_numbers("size", size, "x")
        multiple = PIXELS_PER_LATENT * 2 ** (len(widths) - 1)
        *frames, height, width = sides if len(sides) in (2, 3) else (0, 1, 1)
        if height % multiple or width % multiple:
            raise ValueError(f"--size is {size!r}: give HEIGHTxWIDTH, multiples of {multiple} pixels here")
        num_frames = frames[0] if frames else arguments.frames
        cases.append(Case(widths, num_frames, height, width, num_tokens, dtype, **common))
    return cases


def read_numbers(name: str, text: str, separator: str = ",") -> tuple[int, ...]:
    parts = text.split(separator)
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--{name} is {text!r}: give whole numbers from 1, with {separator!r} between them")
    return tuple(map(int, parts))
