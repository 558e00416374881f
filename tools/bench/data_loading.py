"""Measure the loading of clips: from the latent cache, by decoding, and by a bare PyAV loop."""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path

import av
import torch

from svd_ds.cli import keep_freed_memory, run_cli
from svd_ds.data.batching import BatchConfig, BatchSplit
from svd_ds.data.clips import ClipDraws, Timing
from svd_ds.data.config import DataConfig
from svd_ds.data.latents import MEMBER
from svd_ds.data.loader import Loader
from svd_ds.data.schedule import Schedule
from svd_ds.data.shards import Index

EXAMPLE = """example:
  python tools/encode.py data/mine data/mine-latents --size 320x576
  python tools/bench/data_loading.py data/mine-latents --shape 14x320x576 --fps 6

The loaders take turns, A B C A B C ..., in one process and thread. CPU time is measured, without waiting for
files. The output has medians of the times and of the ratios turn by turn, these with the smallest and the
largest. The bare loop opens the same files, seeks to the same frames and decodes them to RGB, without crop,
resize and caption."""


def main() -> None:
    keep_freed_memory()
    arguments = parse_arguments()
    torch.set_num_threads(1)
    num_frames, height, width = map(int, arguments.shape.split("x"))
    decoded = DataConfig(
        str(arguments.shards), num_frames, height, width, fps=arguments.fps, crop="center", num_workers=0
    )
    loaders: dict[str, Iterator[object]] = {
        "decoding": load_clips(decoded),
        "bare PyAV": decode_frames(decoded),
    }
    if any(MEMBER in sample.members for sample in Index.load(arguments.shards).samples()):
        loaders = {"latent cache": load_clips(replace(decoded, latents=True)), **loaders}
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for clips in loaders.values():
        next(clips)
    for _ in range(arguments.rounds):
        for name, clips in loaders.items():
            seconds[name].append(timed(partial(load, clips, arguments.clips)))
    for name, times in seconds.items():
        clips_per_s = arguments.clips / statistics.median(times)
        print(f"{name:>14}: {clips_per_s:8.2f} clips/s   {1000 / clips_per_s:8.2f} ms a clip")
    reached = ratio(seconds["bare PyAV"], seconds["decoding"], ".0%")
    print(f"decoding reaches {reached} of the bare loop")
    if "latent cache" in loaders:
        gain = ratio(seconds["decoding"], seconds["latent cache"], ".1f")
        print(f"the latent cache gives {gain} times decoding")


def ratio(seconds: list[float], others: list[float], form: str) -> str:
    """Format the ratios of two loaders' times, turn by turn: median, smallest and largest."""
    ratios = [one / other for one, other in zip(seconds, others, strict=True)]
    return f"{statistics.median(ratios):{form}} ({min(ratios):{form}} to {max(ratios):{form}})"


def load_clips(config: DataConfig) -> Iterator[object]:
    """Load clips as training does, one at a time."""
    return iter(Loader(config, seed=0, rank=0, world=1, batch=BatchConfig(1)))


def decode_frames(config: DataConfig) -> Iterator[object]:
    """Decode the frames of the same clips with PyAV alone."""
    loader = Loader(config, seed=0, rank=0, world=1, batch=BatchConfig(1))
    (index,) = loader.sources[0].buckets
    order = Schedule([[index.shard_sizes]], [1.0], BatchSplit(1, 1, (1,)), seed=0)
    for ordinal in count():
        _, _, number = next(order.samples(ordinal))
        sample = index.sample(number)
        draw = ClipDraws.draw(0, ordinal).start
        timing = Timing.choose(sample.num_frames, sample.fps, config.num_frames, config.fps, draw)
        wanted = timing.frame_numbers(config.num_frames)
        frames = []
        with av.open(io.BytesIO(index.read(sample, sample.media)), mode="r") as container:
            stream = container.streams.video[0]
            assert stream.average_rate is not None and stream.time_base is not None
            stream.thread_count = 1
            container.seek(int(wanted[0] / (stream.average_rate * stream.time_base)), stream=stream)
            for frame in container.decode(stream):
                assert frame.pts is not None
                number = round(frame.pts * stream.time_base * stream.average_rate)
                if number in wanted:
                    frames.append(frame.reformat(format="rgb24", threads=1).to_ndarray())
                if number >= wanted[-1]:
                    break
        yield frames


def load(clips: Iterator[object], num_clips: int) -> None:
    """Load the next `num_clips` clips."""
    for _ in islice(clips, num_clips):
        pass


def timed(action: Callable[[], object]) -> float:
    """Measure the CPU time of an action, of all threads, in seconds; other users hardly change it."""
    started = time.process_time()
    action()
    return time.process_time() - started


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "shards",
        type=Path,
        metavar="SHARDS",
        help="folder of shards, with latents (tools/encode.py) or without",
    )
    add("--shape", default="14x320x576", metavar="TxHxW", help="shape of the clips; default: %(default)s")
    add("--fps", type=float, default=6.0, help="frames a second of the clips; default: %(default)s")
    add("--clips", type=int, default=20, metavar="N", help="clips of a round; default: %(default)s")
    add("--rounds", type=int, default=5, metavar="N", help="number of rounds; default: %(default)s")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
