"""Sharded weights, as a run saves them: each rank's shard of every parameter.

A shard is flat: W ranks have shards of ceil(numel / W) elements. Concatenated in rank order and cut to numel
they are the flattened parameter. Therefore any number of ranks can read what another number wrote.

A checkpoint also has averages of the weights. An average of another length is a weighted sum of those that
the run kept (posthoc_ema.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svd_ds.small_files import read_json
from svd_ds.tensor_files import TensorRef, is_finite, open_tensors
from svd_ds.weights.manifest import check_checkpoint, files_by_folder
from svd_ds.weights.posthoc_ema import Profile, posthoc_weights
from svd_ds.weights.restarts import complete_checkpoints, newest_checkpoint, read_manifest_or_none

NETWORKS = ("unet", "decoder")
"""Networks that a run may train, by the name of their folder in a checkpoint."""
KEPT_AVERAGES = "averages"
"""Folder of a run for the averages of checkpoints that were removed."""
DAMAGED_SUFFIX = ".damaged"
"""Suffix of the folder name of a damaged checkpoint, which is kept but not used any more."""
MAX_MISFIT = 0.1
"""Largest misfit of an average that is computed from others, as a share of the wanted profile's norm."""


@dataclass(frozen=True)
class WeightedSum:
    """Weighted sum of elements `start` to `stop` of a parameter over several checkpoints, not read yet."""

    weights: tuple[float, ...]
    parameters: tuple[list[TensorRef], ...]
    """The parameter's shards in each checkpoint; the checkpoints may have different numbers of ranks."""
    start: int
    stop: int

    @property
    def path(self) -> Path:
        """File of the last summand, for messages."""
        return self.parameters[-1][0].path

    @property
    def name(self) -> str:
        """Name of the parameter."""
        return self.parameters[-1][0].name

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start,)

    def read(self) -> Tensor:
        """Read the summands and add them, in float32; elements after the parameter's end are zero."""
        total = torch.zeros(self.shape)
        for weight, shards in zip(self.weights, self.parameters, strict=True):
            part = read_range(shards, self.start, self.stop)
            total[: len(part)] += weight * part
        return total


def read_range(shards: Sequence[TensorRef], start: int, stop: int) -> Tensor:
    """Read elements `start` to `stop` of concatenated shards; fewer if the shards end earlier."""
    found, first = [], 0
    for ref in shards:
        (length,) = ref.shape
        if start < first + length and first < stop:
            found.append(ref.file.get_slice(ref.name)[max(start - first, 0) : stop - first])
        first += length
    return torch.cat(found) if found else torch.empty(0)


class WeightShards:
    """A folder of the ranks' shards, from which any range of a parameter can be read."""

    def __init__(self, folder: Path) -> None:
        """Open a folder of a checkpoint.

        Raises:
            ValueError: the file of a rank is missing.
        """
        self._paths = _rank_files(folder)
        self._open: dict[int, dict[str, TensorRef]] = {}

    def read(self, name: str, numel: int, start: int, stop: int) -> Tensor:
        """Read elements `start` to `stop` of a flattened parameter.

        Args:
            name: the parameter.
            numel: number of its elements; elements from `numel` on are returned as zeros.
            start: the first element to read.
            stop: the element after the last one to read.

        Raises:
            ValueError: the files have no such parameter, or a value in it is not finite.
        """
        if start >= numel:
            return torch.zeros(stop - start)
        length, end = -(-numel // len(self._paths)), min(stop, numel)
        first = start // length
        shards = [self._open_shard(rank, name, length) for rank in range(first, -(-end // length))]
        found = read_range(shards, start - first * length, end - first * length)
        if not is_finite(found):
            raise ValueError(f"{shards[0].path} is damaged: {name} has a value that is not finite")
        return torch.nn.functional.pad(found, (0, stop - start - len(found)))

    def _open_shard(self, rank: int, name: str, length: int) -> TensorRef:
        path = self._paths[rank]
        if rank not in self._open:
            self._open[rank] = open_tensors(path)
        ref = self._open[rank].get(name)
        if ref is None:
            raise ValueError(f"{path} lacks {name}, which this run's network has")
        if ref.shape != (length,):
            raise ValueError(
                f"{path} has {ref.shape[0]} elements of {name}: for this run's network it must have {length}"
            )
        return ref


def rank_file_name(rank: int, world: int) -> str:
    """Return the name of the file of one rank's shards."""
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def checkpoint_network(path: Path) -> str | None:
    """Return the one of NETWORKS that a checkpoint holds.

    Args:
        path: a checkpoint, or a run, which means its newest checkpoint.

    Returns:
        None if `path` is neither.
    """
    if (path / "checkpoints").is_dir():
        path = newest_checkpoint(path)
    manifest = read_manifest_or_none(path)
    # The manifest names the folder even if its files are missing.
    folders = {Path(name).parts[0] for name in manifest.files} if manifest else set()
    return next(
        (name for name in NETWORKS if name in folders or any((path / name).glob("rank-*.safetensors"))), None
    )


def open_checkpoint(
    path: Path, network: str, which: str | None
) -> tuple[dict[str, dict[str, Any]], dict[str, Sequence[TensorRef | WeightedSum]]]:
    """Open the weights of a checkpoint; every file that is read is verified first.

    Only trained parameters have an average: with one, the frozen parameters come from the weights themselves.

    Args:
        path: a checkpoint, or a run, which means its newest checkpoint.
        network: one of NETWORKS.
        which: `raw`; the name of an average; or a relative length such as 0.07, for which an average is
            computed from those that the run kept. Default: the first average.

    Returns:
        Name -> content of each JSON file of the network, and parameter -> its shards.

    Raises:
        ValueError: the checkpoint is not complete or damaged, has another network, or has neither the average
            nor others from which it can be computed.
    """
    if (path / "checkpoints").is_dir():
        path = newest_checkpoint(path)
    folders = files_by_folder(path)
    if (held := checkpoint_network(path)) != network:
        raise ValueError(f"{path} holds a {held}, and not a {network}")
    averages = sorted(name.removeprefix("ema-") for name in folders if name.startswith("ema-"))
    which = which or next(iter(averages), "raw")
    check_checkpoint(path, [*folders[network], *folders.get(f"ema-{which}", ())])
    shards: dict[str, Sequence[TensorRef | WeightedSum]] = {**_open_shards(path / network)}
    if which in averages:
        shards |= _open_shards(path / f"ema-{which}")
    elif (length := _parse_length(which)) is not None:
        shards |= _blend_averages(path, length)
    elif which != "raw":
        raise ValueError(
            f"the checkpoint {path} has no weights {which!r}: they must be one of "
            f"{', '.join(['raw', *averages])}, or a length in (0, 0.28]"
        )
    texts = [path / name for name in folders[network] if name.endswith(".json")]
    settings = {text.name: read_json(text) for text in texts}
    return settings, shards


def join_shards(shards: Sequence[TensorRef | WeightedSum], shape: torch.Size) -> Tensor:
    """Read and concatenate the flat shards of a parameter of `shape`, without the padding at their end."""
    return torch.cat([ref.read() for ref in shards])[: shape.numel()].view(shape)


def _parse_length(which: str) -> float | None:
    """Parse a relative length in (0, 0.28]; None if the text is not one."""
    try:
        length = float(which)
    except ValueError:
        return None
    return length if 0 < length <= 0.28 else None


def _blend_averages(checkpoint: Path, length: float) -> dict[str, list[WeightedSum]]:
    """Compute the average of `length` at a checkpoint from the averages that its run kept until then.

    Returns:
        Trained parameter -> shards of the average.
    """
    wanted = Profile(_samples(checkpoint), length)
    run = checkpoint.parent.parent
    snapshots = [
        # Without state.json the folder is incomplete: its run was killed while moving it there.
        *sorted(state.parent for state in (run / KEPT_AVERAGES).glob("step-*/state.json")),
        *complete_checkpoints(checkpoint.parent).values(),
        checkpoint,
    ]
    # If two snapshots have the same number of samples the later one counts: the run may have resumed from an
    # earlier step.
    kept = {
        Profile(samples, float(folder.name.removeprefix("ema-power-"))): folder
        for snapshot in snapshots
        if (samples := _samples(snapshot)) <= wanted.samples
        for folder in (
            snapshot / name for name in sorted(files_by_folder(snapshot)) if name.startswith("ema-power-")
        )
    }
    if not kept:
        raise ValueError(
            f"{checkpoint} has no power-function averages, from which one of length {length} could be "
            "computed"
        )
    weights, misfit = posthoc_weights(list(kept), wanted)
    if misfit > MAX_MISFIT:
        raise ValueError(
            f"the {len(kept)} averages that {run} kept give one of length {length} with an error of "
            f"{misfit:.0%}, and at most {MAX_MISFIT:.0%} is allowed: keep more by checkpoint.keep_averages"
        )
    for folder in kept.values():
        check_checkpoint(folder.parent, files_by_folder(folder.parent)[folder.name])
    averages = [_open_shards(folder) for folder in kept.values()]
    blended: dict[str, list[WeightedSum]] = {}
    for name, newest in averages[-1].items():
        first = 0
        for ref in newest:
            (size,) = ref.shape
            parameters = tuple(average[name] for average in averages)
            blended.setdefault(name, []).append(WeightedSum(tuple(weights), parameters, first, first + size))
            first += size
    return blended


def _samples(snapshot: Path) -> int:
    """Read the number of samples that the run had seen at a checkpoint or at kept averages."""
    check_checkpoint(snapshot, ["state.json"])
    return int(read_json(snapshot / "state.json")["samples"])


def _open_shards(folder: Path) -> dict[str, list[TensorRef]]:
    """Return parameter name -> the ranks' shards in order."""
    shards: dict[str, list[TensorRef]] = {}
    for file in _rank_files(folder):
        for name, ref in open_tensors(file).items():
            shards.setdefault(name, []).append(ref)
    return shards


def _rank_files(folder: Path) -> list[Path]:
    """List the ranks' files in a folder of a checkpoint, in rank order.

    Only files that the manifest lists count. The folder may have others, such as those of a checkpoint that
    was copied over this one.
    """
    names = files_by_folder(folder.parent).get(folder.name, [])
    files = sorted(folder.parent / name for name in names if name.endswith(".safetensors"))
    ranks = int(files[0].stem.rpartition("-")[2]) if files else 0
    present = [file for file in files if file.exists()]
    if not present or len(present) != ranks:
        raise ValueError(f"{folder} has the files of {len(present)} ranks out of {ranks}")
    return present
