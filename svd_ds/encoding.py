"""Caches of a data set for training: latents and CLIP embeddings, stored next to the pixels in the shards.

Ranks share the shards without communication: each writes its own shards atomically, and the rank that finds
that all shards are written writes the index. An interrupted run is therefore resumed with any number of
ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svd_ds.data import clip_embeddings, latents
from svd_ds.data.clips import covers, read_frames
from svd_ds.data.members import ReadMember
from svd_ds.data.quarantine import (
    REFUSED,
    Fault,
    Quarantine,
    describe_error,
    is_out_of_memory,
    refused_csv_lines,
)
from svd_ds.data.reader import read_captions
from svd_ds.data.shards import INDEX_NAME, Index, Sample, Shard
from svd_ds.data.writer import complete_members, pack_shard, remove_shards, shard_name, write_index
from svd_ds.fsync_io import replace_bytes
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.clip_encoders import ImageEncoder, TextEncoder
from svd_ds.small_files import read_json
from svd_ds.video import from_uint8

CACHED = (latents.MEMBER, clip_embeddings.MEMBER)
SETTINGS_NAME = "encoding.json"
"""File in the output folder with the settings of its latents and embeddings."""


@dataclass(frozen=True)
class Encoders:
    """Frozen networks of a training, and the origins that their outputs are marked with."""

    autoencoder: Autoencoder
    image: ImageEncoder | None
    text: TextEncoder | None
    origin: latents.LatentsOrigin
    embeddings_origin: clip_embeddings.EmbeddingsOrigin

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the encoded frames."""
        return self.origin.height, self.origin.width

    def encode(self, read: ReadMember, sample: Sample) -> dict[str, bytes]:
        """Encode the frames and captions of a sample.

        Args:
            read: reads a member of the sample.
            sample: entry of the index.

        Returns:
            Extension -> content of the members to add to the sample.

        Raises:
            ValueError: the sample is unreadable, or an output is not finite.
        """
        frames_TCHW = read_frames(read(sample.media), range(sample.num_frames), self.size)
        pixels_TCHW = from_uint8(frames_TCHW)
        members = {
            latents.MEMBER: latents.pack(self.autoencoder.encode(pixels_TCHW), frames_TCHW, self.origin)
        }
        if self.image is not None or self.text is not None:
            image_TD = None if self.image is None else self._embed_frames(self.image, pixels_TCHW)
            texts_LD = {}
            if self.text is not None:
                captions = read_captions(read, sample)
                texts_LD = dict(zip(captions, self.text(list(captions.values())), strict=True))
            members[clip_embeddings.MEMBER] = clip_embeddings.pack(image_TD, texts_LD, self.embeddings_origin)
        return members

    def _embed_frames(self, encoder: ImageEncoder, pixels_TCHW: Tensor) -> Tensor:
        chunks = pixels_TCHW.split(self.autoencoder.chunk)
        return torch.cat([encoder(chunk)[:, 0] for chunk in chunks])


def prepare_output(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Create `out`, or check that it can be resumed; all ranks call it with the same settings.

    Args:
        out: folder of the new shards.
        settings: name -> JSON value that all shards in `out` share.
        overwrite: remove the shards in `out`.

    Raises:
        ValueError: `out` holds other shards, or shards of other settings, and `overwrite` is false.
    """
    settings_file = out / SETTINGS_NAME
    if overwrite:
        remove_shards(out)
        (out / REFUSED).unlink(missing_ok=True)
    elif settings_file.exists():
        existing = read_json(settings_file)
        for name, value in settings.items():
            if existing.get(name) != value:
                raise ValueError(
                    f"{out} holds latents whose {name} is {existing.get(name)}, but here it is {value}: "
                    "choose another folder, or --overwrite them"
                )
        _remove_damaged_index(out)
        return
    elif (out / INDEX_NAME).exists():
        raise ValueError(f"{out} already holds shards: choose another folder, or --overwrite them")
    out.mkdir(parents=True, exist_ok=True)
    replace_bytes(settings_file, json.dumps(settings).encode())


def _remove_damaged_index(out: Path) -> None:
    """Remove an index that a power cut left empty or truncated, so that it is written again."""
    if (out / INDEX_NAME).exists():
        try:
            Index.load(out)
        except (ValueError, OSError):
            (out / INDEX_NAME).unlink(missing_ok=True)


def encode_shards(
    source: Index,
    out: Path,
    encoders: Encoders,
    rank: int,
    world: int,
    refused: Quarantine,
    advance: Callable[[int], None],
) -> None:
    """Write this rank's shards, except those that exist.

    Samples that cannot be encoded are left out and listed in REFUSED. Shards without samples are written too,
    so that the index has as many shards as the source.

    Args:
        source: index without damaged lines (`Index.drop_damaged`).
        out: folder of the new shards.
        encoders: the frozen networks.
        rank: this rank.
        world: number of ranks.
        refused: samples that are refused already, and the maximum share of refused samples.
        advance: called with the number of samples that are done.

    Raises:
        ValueError: more samples are unreadable than `refused` allows; the message names shard and sample.
        OSError: a shard cannot be read or written.
    """
    grouped = groupby(source.samples(), key=lambda sample: sample.shard)
    shards = ((number, list(group)) for number, group in grouped)
    upcoming = next(shards, None)
    for number in range(len(source.shards)):
        samples: list[Sample] = []
        if upcoming is not None and upcoming[0] == number:
            samples, upcoming = upcoming[1], next(shards, None)
        path = out / shard_name(number)
        if number % world != rank:
            continue
        if complete_members(path) is not None:
            advance(len(samples))
            continue
        faults: list[Fault] = []
        packed = pack_shard(_encoded(source, samples, encoders, faults, refused, advance))
        append_refused(out, faults)
        replace_bytes(path, packed)


def _encoded(
    source: Index,
    samples: list[Sample],
    encoders: Encoders,
    faults: list[Fault],
    refused: Quarantine,
    advance: Callable[[int], None],
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (id, members) of each sample of a shard that can be encoded; add the others to `faults`."""
    for sample in samples:
        try:
            with source.open(sample) as read:
                contents = {member: read(member) for member in sample.members if member not in CACHED}
                read_captions(read, sample)  # A sample with unreadable captions is refused.
                if covers((sample.height, sample.width), encoders.size):
                    contents |= encoders.encode(read, sample)
            yield sample.id, contents
        except (OSError, AssertionError):
            raise
        except Exception as error:
            # RuntimeError is torch's error for a failure of the device.
            if is_out_of_memory(error) or isinstance(error, RuntimeError):
                raise
            shard = source.folder.location(source.shards[sample.shard].name)
            faults.append(Fault(sample.id, shard, describe_error(error)))
            refused.add(faults)
        advance(1)


def append_refused(out: Path, faults: Sequence[Fault]) -> None:
    """Append the faults that are not yet listed to the file that all ranks share, in whole lines."""
    path = out / REFUSED
    listed = path.read_text().splitlines(keepends=True) if path.exists() else []
    if faults and (new := [line for line in refused_csv_lines(faults) if line not in listed]):
        with open(path, "a", newline="") as file:
            file.write("".join(new))


def count_uncaptioned(index: Index) -> int:
    """Count the samples of an encoded index without a caption, or with empty captions only."""
    count = 0
    for sample in index.samples():
        with index.open(sample) as read:
            count += not any(read_captions(read, sample).values())
    return count


def write_index_if_complete(source: Index, out: Path) -> bool:
    """Write the index if all shards exist.

    Returns:
        False if other ranks are still writing.

    Raises:
        ValueError: no sample was encoded.
    """
    numbers = range(len(source.shards))
    paths = [out / shard_name(number) for number in numbers]
    members = [found for path in paths if (found := complete_members(path)) is not None]
    if len(members) < len(paths):
        return False
    samples = [
        replace(sample, members=members[sample.shard][sample.id])
        for sample in source.samples()
        if sample.id in members[sample.shard]
    ]
    if not any(latents.MEMBER in sample.members for sample in samples):
        raise ValueError(f"none of the {len(source)} samples could be encoded; {out / REFUSED} says why")
    shards = [
        Shard(path.name, path.stat().st_size, len(found)) for path, found in zip(paths, members, strict=True)
    ]
    write_index(out, shards, samples, source.motion_map)
    return True
