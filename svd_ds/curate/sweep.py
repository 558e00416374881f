"""Subset configs for choosing thresholds, as in arXiv 2311.15127, section E.2.2.

For one annotation at a time the worst 12.5, 25 or 50 per cent of the clips are left out; identical models are
trained on the subsets and ranked by human votes (tools/elo.py). A subset is a Hydra config that is combined
with +experiment=curation: the shards are unchanged, and conditions select the samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from svd_ds.curate.select import ANNOTATIONS, DUPLICATE, UNREADABLE
from svd_ds.data.filters import select_samples
from svd_ds.data.shards import INDEX_NAME, Index
from svd_ds.fsync_io import replace_bytes

SHARES = (12.5, 25.0, 50.0)
"""Percentages that are left out; the full set is the baseline."""
HIGH_IS_WORSE = ("text_area",)
"""Annotations of which the highest values are left out."""
GROUP = "subset"
CONFIG = """\
# @package _global_
# {num_kept} of the {num_clips} clips in the shards; written by tools/curate.py sweep-thresholds.
#   python -m svd_ds.train --config-dir {folder} +experiment=curation +{group}={name} ...
name: curation-{name}
data:
  path: {path}
  where: [{conditions}]
"""


@dataclass(frozen=True)
class Subset:
    """A subset of the curated clips."""

    name: str
    conditions: tuple[str, ...]
    num_kept: int


def write_subsets(out: Path) -> tuple[list[Subset], list[str]]:
    """Write OUT/thresholds/subset/NAME.yaml for each subset.

    Returns:
        The subsets, and one sentence for each annotation that some clips lack: its quantiles are taken over
        the clips that have it, and the others are left out.

    Raises:
        FileNotFoundError: OUT has no curated clips.
        ValueError: its shards were already filtered by conditions.
    """
    table = out / "clips.parquet"
    if not table.is_file() or not (out / "shards" / INDEX_NAME).is_file():
        raise FileNotFoundError(f"{out} holds no curated clips: tools/curate.py RAW {out} makes them")
    reasons = pq.read_table(table, columns=["reason"])["reason"].drop_null().to_pylist()
    removed = [reason for reason in reasons if not reason.startswith((DUPLICATE, UNREADABLE))]
    if removed:
        raise ValueError(
            f"{len(removed)} clips of {out} are not in its shards, because of conditions like "
            f"{removed[0].split(':')[0]!r}: thresholds are compared on shards made without --where"
        )
    index = Index.load(out / "shards")
    samples = list(index.samples())
    subsets = [Subset("none", (), len(samples))]
    notes = []
    others = {name for sample in samples for name in sample.annotations} - {*ANNOTATIONS}
    for name in ("motion", *ANNOTATIONS, *sorted(others)):
        lacking = sum(sample.number(name) is None for sample in samples)
        if lacking == len(samples):
            notes.append(f"{name}: no subsets, because no clip has it")
            continue
        if lacking:
            notes.append(f"{name}: {lacking} of {len(samples)} clips lack it and are in none of its subsets")
        for share in SHARES:
            worse = f"{name}<=q{100 - share:g}" if name in HIGH_IS_WORSE else f"{name}>=q{share:g}"
            keep = select_samples([worse], index)
            subsets.append(Subset(f"{name}-{share:g}", (worse,), sum(map(keep, samples))))
    folder = out / "thresholds" / GROUP
    folder.mkdir(parents=True, exist_ok=True)
    for subset in subsets:
        text = CONFIG.format(
            num_kept=subset.num_kept,
            num_clips=len(samples),
            folder=folder.parent,
            group=GROUP,
            name=subset.name,
            path=(out / "shards").resolve(),
            conditions=", ".join(f'"{condition}"' for condition in subset.conditions),
        )
        replace_bytes(folder / f"{subset.name}.yaml", text.encode())
    return subsets, notes
