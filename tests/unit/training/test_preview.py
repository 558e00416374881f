"""Previews on three ranks: the files of one rank, gathered on rank 0 alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from svd_ds.batch import Batch
from svd_ds.parallel.env import Env
from svd_ds.run_folder import RunFolder
from svd_ds.training.preview import PreviewClips, Previews
from tests.forked import fork_server

FRAMES, SIZE = 3, 16
CLIP_BYTES = FRAMES * 3 * SIZE * SIZE


def clips(number: int) -> Batch:
    frames = torch.randint(256, (number, FRAMES, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    ordinals = tuple(range(number))
    return Batch(tuple(map(str, ordinals)), ordinals, frames.to(torch.uint8), ("",) * number, {})


class Render:
    """PreviewFn that returns the negative of each clip, shifted by its index, and counts its calls."""

    def __init__(self) -> None:
        self.num_clips = 0

    def __call__(self, net: Callable[..., Tensor], batch: Batch, indices: Sequence[int]) -> Tensor:
        self.num_clips += len(batch)
        shift_B1111 = torch.tensor(indices).view(-1, 1, 1, 1, 1) * 0.1
        return 1 - batch.frames_BTCHW / 127.5 + shift_B1111


def make(folder: Path, rank: int, world: int, number: int) -> dict[str, Any]:
    """Make previews on this rank; return the bytes that it sent and received, and what it holds."""
    moved = {"sent": 0, "received": 0}
    send, recv = dist.send, dist.recv

    def count_send(tensor: Tensor, dst: int) -> None:
        moved["sent"] += tensor.nbytes
        send(tensor, dst)

    def count_recv(tensor: Tensor, src: int) -> None:
        moved["received"] += tensor.nbytes
        recv(tensor, src)

    def all_gather(*_: Any) -> None:
        raise AssertionError("videos are gathered on every rank")

    cpu, render = torch.device("cpu"), Render()
    part = PreviewClips.divide(clips(number), rank, world)
    previews = Previews(
        clips=part,
        preview_fn=render,
        metrics={"difference": lambda made, real: (made.float() - real.float()).abs().mean().item()},
        fps=5.0,
        folder=RunFolder(folder),
        env=replace(Env.read({}), rank=rank, world=world, device=cpu),
    )
    engine: Any = SimpleNamespace(weights=lambda shards: nullcontext())
    ema: Any = SimpleNamespace(shards=lambda name: {}, config=SimpleNamespace(names=["first"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "send", count_send)
        patch.setattr(dist, "recv", count_recv)
        patch.setattr(dist, "all_gather", all_gather)
        made = previews.make(7, engine, ema)
    held = part.clips.frames_BTCHW.nbytes + (0 if part.real_BTCHW is None else part.real_BTCHW.nbytes)
    return moved | {"rendered": render.num_clips, "held": held, "made": made is not None}


def run_rank(folder: str, rank: int, world: int, number: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    result = make(Path(folder), rank, world, number)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def on_ranks(folder: Path, world: int, number: int) -> list[dict[str, Any]]:
    folder.mkdir()
    server = fork_server()
    ranks = [
        server.Process(target=run_rank, args=(str(folder), rank, world, number)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in RunFolder(folder).samples(7).iterdir()}


@pytest.fixture(scope="module")
def two_videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("previews") / "three"
    yield folder, on_ranks(folder, world=3, number=2)


def test_ranks_write_the_files_of_one_rank(
    two_videos: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    alone = on_ranks(tmp_path / "one", world=1, number=2)
    assert [rank["made"] for rank in alone] == [True]
    found = files(two_videos[0])
    assert found == files(tmp_path / "one")
    assert found.keys() == {"video-0.mp4", "video-1.mp4", "contact_sheet.png", "measures.json"}


def test_only_what_is_shown_is_sent_and_only_to_rank_0(
    two_videos: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, (first, second, third) = two_videos
    assert (first["sent"], first["received"]) == (0, CLIP_BYTES), "its own clip is there already"
    assert (second["sent"], second["received"]) == (CLIP_BYTES, 0)
    assert (third["sent"], third["received"]) == (0, 0), "its clip is a copy of the last one"
    assert [rank["held"] for rank in (first, second, third)] == [3 * CLIP_BYTES, CLIP_BYTES, CLIP_BYTES]
    assert [rank["rendered"] for rank in (first, second, third)] == [1, 1, 1], (
        "all run the network equally often"
    )


@pytest.mark.parametrize(("number", "world"), [(1, 1), (4, 2), (5, 3), (2, 5), (7, 3)])
def test_every_clip_is_shown_once_and_in_order(number: int, world: int) -> None:
    parts = [PreviewClips.divide(clips(number), rank, world) for rank in range(world)]
    shown = [part.indices[: part.counts[rank]] for rank, part in enumerate(parts)]
    assert [index for indices in shown for index in indices] == list(range(number))
    assert len({len(part.clips) for part in parts}) == 1 and len({part.counts for part in parts}) == 1
