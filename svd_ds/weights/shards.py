"""Files of weights that a run saves: the ranks' slices of each parameter, and which of them is wanted.

A slice is flat: the slices of W ranks, each of ceil(numel / W) elements, joined in order and cut to numel are
the flattened parameter. So any number of ranks can read what another number wrote.

Beside the weights themselves a checkpoint has averages of them; a length that it has not is blended of those
that the run kept (averages.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from svd_ds.small_files import check_regular, read_json
from svd_ds.weights.manifest import check_checkpoint, folders_of
from svd_ds.weights.posthoc_ema import Profile, posthoc_weights
from svd_ds.weights.restarts import complete_checkpoints, newest_checkpoint, read_manifest_or_none

NETWORKS = ("unet", "decoder")
"""What a run may train, as its checkpoints call it."""
KEPT_AVERAGES = "averages"
"""Folder of a run: what stays of checkpoints whose averages are kept."""
SET_ASIDE = ".damaged"
"""Suffix of the folder name of a checkpoint that is kept but not used any more."""
MAX_MISFIT = 0.1
"""An average whose profile would miss the wanted one by a larger share is refused."""


@dataclass(frozen=True)
class TensorRef:
    """A tensor in an open file."""

    path: Path
    file: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


@dataclass(frozen=True)
class WeightedSum:
    """A slice of a weighted sum: elements `start` to `stop` of a parameter in several checkpoints."""

    weights: tuple[float, ...]
    parameters: tuple[list[TensorRef], ...]
    """Its slices in each checkpoint, which other numbers of ranks may have saved."""
    start: int
    stop: int

    @property
    def path(self) -> Path:
        return self.parameters[-1][0].path

    @property
    def name(self) -> str:
        return self.parameters[-1][0].name

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start,)

    def read(self) -> Tensor:
        total = torch.zeros(self.shape)
        for weight, pieces in zip(self.weights, self.parameters, strict=True):
            part = read_range(pieces, self.start, self.stop)
            total[: len(part)] += weight * part
        return total


def read_range(pieces: Sequence[TensorRef], start: int, stop: int) -> Tensor:
    """Elements `start` to `stop` of joined slices, as far as there are any."""
    found, first = [], 0
    for piece in pieces:
        (length,) = piece.shape
        if start < first + length and first < stop:
            found.append(piece.file.get_slice(piece.name)[max(start - first, 0) : stop - first])
        first += length
    return torch.cat(found) if found else torch.empty(0)


class WeightShards:
    """A folder of slices, of which any range of any parameter is read from the files that hold it."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where a rank's file is missing."""
        self._paths = _files_of_ranks(folder)
        self._open: dict[int, dict[str, TensorRef]] = {}

    def read(self, name: str, numel: int, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened parameter, which has `numel`; zero beyond its end.

        Raises:
            ValueError: the files have no such parameter, or a value in it is not finite.
        """
        if start >= numel:
            return torch.zeros(stop - start)
        each, end = -(-numel // len(self._paths)), min(stop, numel)
        first = start // each
        pieces = [self._piece(rank, name, each) for rank in range(first, -(-end // each))]
        found = read_range(pieces, start - first * each, end - first * each)
        if not is_finite(found):
            raise ValueError(f"{pieces[0].path} is damaged: {name} has a value that is not finite")
        return torch.nn.functional.pad(found, (0, stop - start - len(found)))

    def _piece(self, rank: int, name: str, each: int) -> TensorRef:
        path = self._paths[rank]
        if rank not in self._open:
            self._open[rank] = tensors_of(path)
        piece = self._open[rank].get(name)
        if piece is None:
            raise ValueError(f"{path} lacks {name}, which this run's network has")
        if piece.shape != (each,):
            raise ValueError(
                f"{path} has {piece.shape[0]} elements of {name}, and of this run's network it would have "
                f"{each}"
            )
        return piece


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # One pass that allocates nothing: both ends are NaN where any element is. isfinite is far slower.
    return values.numel() == 0 or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def rank_file_name(rank: int, world: int) -> str:
    """The file of one rank's slices."""
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def network_of(path: Path) -> str | None:
    """Which of NETWORKS a checkpoint, or a run's newest, holds; None where `path` is neither."""
    if (path / "checkpoints").is_dir():
        path = newest_checkpoint(path)
    manifest = read_manifest_or_none(path)
    # By the manifest, so that a checkpoint whose files are missing is still known for what it is.
    folders = {Path(name).parts[0] for name in manifest.files} if manifest else set()
    return next(
        (name for name in NETWORKS if name in folders or any((path / name).glob("rank-*.safetensors"))), None
    )


def open_checkpoint(
    path: Path, network: str, which: str | None
) -> tuple[dict[str, dict[str, Any]], dict[str, Sequence[TensorRef | WeightedSum]]]:
    """What a checkpoint, or a run's newest, says of its network, file by file; parameter -> its slices.

    Every file that is read is verified first. Only what is trained has an average: with one, the other
    parameters are the weights' own.

    Args:
        which: raw; an average by its name; a relative length, as in 0.07, that need not be among them.
            Default: the first average.

    Raises:
        ValueError: it is not complete, or damaged, or lacks the average and what it could be made of, or is
            of another network.
    """
    if (path / "checkpoints").is_dir():
        path = newest_checkpoint(path)
    folders = folders_of(path)
    if (held := network_of(path)) != network:
        raise ValueError(f"{path} holds a {held}, and not a {network}")
    averages = sorted(name.removeprefix("ema-") for name in folders if name.startswith("ema-"))
    which = which or next(iter(averages), "raw")
    check_checkpoint(path, [*folders[network], *folders.get(f"ema-{which}", ())])
    pieces: dict[str, Sequence[TensorRef | WeightedSum]] = {**_slices_of(path / network)}
    if which in averages:
        pieces |= _slices_of(path / f"ema-{which}")
    elif (length := _length(which)) is not None:
        pieces |= _blended(path, length)
    elif which != "raw":
        raise ValueError(
            f"the checkpoint {path} has {', '.join(['raw', *averages])}, and no {which!r}; a length in "
            "(0, 0.28] would be made of its averages"
        )
    texts = [path / name for name in folders[network] if name.endswith(".json")]
    settings = {text.name: read_json(text) for text in texts}
    return settings, pieces


def join_shards(pieces: Sequence[TensorRef | WeightedSum], shape: torch.Size) -> Tensor:
    """The parameter of `shape` whose flat slices these are, the last of them padded."""
    return torch.cat([piece.read() for piece in pieces])[: shape.numel()].view(shape)


def tensors_of(path: Path) -> dict[str, TensorRef]:
    """Every tensor in a safetensors file, by name. ValueError where it is none."""
    check_regular(path)
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {_other_kind(path) or error}") from None
    return {name: TensorRef(path, file, name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _other_kind(path: Path) -> str | None:
    """What a file that is no safetensors file is known to be by its first bytes."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer in place of the weights; fetch them with git lfs pull"
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "it is a pickle of PyTorch, which is not read, as it could run code"
    if head.lstrip()[:1] == b"<":
        return "it is an HTML page"
    return None


def _length(which: str) -> float | None:
    """The relative length that a text names, in (0, 0.28]; None where it is none."""
    try:
        length = float(which)
    except ValueError:
        return None
    return length if 0 < length <= 0.28 else None


def _blended(checkpoint: Path, length: float) -> dict[str, list[WeightedSum]]:
    """Trained parameter -> the average of `length` up to a checkpoint, of what its run kept till then."""
    wanted = Profile(_samples(checkpoint), length)
    run = checkpoint.parent.parent
    moments = [
        # What has no state was being moved there when its run was killed.
        *sorted(state.parent for state in (run / KEPT_AVERAGES).glob("step-*/state.json")),
        *complete_checkpoints(checkpoint.parent).values(),
        checkpoint,
    ]
    # Of a moment that is there twice the later counts: the run may have gone on from an earlier step.
    kept = {
        Profile(samples, float(folder.name.removeprefix("ema-power-"))): folder
        for moment in moments
        if (samples := _samples(moment)) <= wanted.samples
        for folder in (moment / name for name in sorted(folders_of(moment)) if name.startswith("ema-power-"))
    }
    if not kept:
        raise ValueError(
            f"{checkpoint} has no power-function average, of which one of {length} could be made"
        )
    weights, misfit = posthoc_weights(list(kept), wanted)
    if misfit > MAX_MISFIT:
        raise ValueError(
            f"the {len(kept)} averages that {run} kept give one of length {length} with an error of "
            f"{misfit:.0%}, and at most {MAX_MISFIT:.0%} is allowed: keep more by checkpoint.keep_averages"
        )
    for folder in kept.values():
        check_checkpoint(folder.parent, folders_of(folder.parent)[folder.name])
    slices = [_slices_of(folder) for folder in kept.values()]
    blended: dict[str, list[WeightedSum]] = {}
    for name, newest in slices[-1].items():
        first = 0
        for piece in newest:
            (size,) = piece.shape
            parameters = tuple(each[name] for each in slices)
            blended.setdefault(name, []).append(WeightedSum(tuple(weights), parameters, first, first + size))
            first += size
    return blended


def _samples(moment: Path) -> int:
    check_checkpoint(moment, ["state.json"])
    return int(read_json(moment / "state.json")["samples"])


def _slices_of(folder: Path) -> dict[str, list[TensorRef]]:
    """Name -> the ranks' slices in order."""
    pieces: dict[str, list[TensorRef]] = {}
    for file in _files_of_ranks(folder):
        for name, piece in tensors_of(file).items():
            pieces.setdefault(name, []).append(piece)
    return pieces


def _files_of_ranks(folder: Path) -> list[Path]:
    """The ranks' files in a folder of a checkpoint, in order: those that the manifest lists.

    Other files of ranks may lie there, such as those of a checkpoint that was copied over this one.
    """
    names = folders_of(folder.parent).get(folder.name, [])
    files = sorted(folder.parent / name for name in names if name.endswith(".safetensors"))
    ranks = int(files[0].stem.rpartition("-")[2]) if files else 0
    present = [file for file in files if file.exists()]
    if not present or len(present) != ranks:
        raise ValueError(f"{folder} has the files of {len(present)} ranks out of {ranks}")
    return present
