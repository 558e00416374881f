"""Subsets for the question which threshold serves best, as arXiv 2311.15127 section E.2.2 asks it.

Of each annotation, the worst 12.5, 25 or 50 per cent are left out, one annotation at a time; identical
models are trained on the subsets and ranked by votes (tools/elo.py). A subset is a Hydra config that goes
beside +experiment=curation: the shards stay as they are, and conditions choose among their samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from svd_ds.curate.select import ANNOTATIONS, DUPLICATE, UNREADABLE
from svd_ds.data.filters import number_of, satisfies
from svd_ds.data.shards import INDEX_NAME, Index
from svd_ds.fsync_io import replace_bytes

SHARES = (12.5, 25.0, 50.0)
"""Per cent that are left out; beside them stands the whole."""
HIGH_IS_WORSE = ("text_area",)
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
    name: str
    conditions: tuple[str, ...]
    num_kept: int


def write_subsets(out: Path) -> tuple[list[Subset], list[str]]:
    """Write OUT/thresholds/subset/NAME.yaml, and return the subsets, and one sentence for each annotation
    that not all clips have: its quantiles are those of the clips that have it, and the others are left out.

    Raises FileNotFoundError where OUT was not curated, ValueError where conditions have chosen its shards.
    """
    table = out / "clips.parquet"
    if not table.is_file() or not (out / "shards" / INDEX_NAME).is_file():
        raise FileNotFoundError(f"{out} holds no curated clips: tools/curate.py RAW {out} makes them")
    reasons = pq.read_table(table, columns=["reason"])["reason"].drop_null().to_pylist()
    by_condition = [reason for reason in reasons if not reason.startswith((DUPLICATE, UNREADABLE))]
    if by_condition:
        raise ValueError(
            f"{len(by_condition)} clips of {out} are not in its shards, because of conditions like "
            f"{by_condition[0].split(':')[0]!r}: thresholds are compared on shards made without --where"
        )
    index = Index.load(out / "shards")
    samples = list(index.samples())
    subsets = [Subset("none", (), len(samples))]
    notes = []
    told = {name for sample in samples for name in sample.annotations} - {*ANNOTATIONS}
    for name in ("motion", *ANNOTATIONS, *sorted(told)):
        lacking = sum(number_of(sample, name) is None for sample in samples)
        if lacking == len(samples):
            notes.append(f"{name}: no subsets, no clip has it")
            continue
        if lacking:
            notes.append(f"{name}: {lacking} of {len(samples)} clips lack it and are in none of its subsets")
        for share in SHARES:
            worse = f"{name}<=q{100 - share:g}" if name in HIGH_IS_WORSE else f"{name}>=q{share:g}"
            keep = satisfies([worse], index)
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
