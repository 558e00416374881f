"""Raw files through the first stages, for tests."""

from __future__ import annotations

from pathlib import Path

from svd_ds.curate import clips, cuts, probe
from svd_ds.curate.clips import ClipSettings
from svd_ds.curate.cuts import CutSettings
from svd_ds.curate.raw import name_files
from svd_ds.curate.stages import Place, work_on
from svd_ds.curate.table import Known, Row


def known_of(path: Path, settings: ClipSettings, out: Path) -> tuple[Known, list[Row]]:
    """What the stages up to the clips find in a file, and the clips' rows; errors are rows."""
    (file,) = name_files([path.name], [path])
    place = Place(out, out / "clips")
    known = {"probe": work_on(probe.probe, None, place, (file, {}))}
    if "error" not in known["probe"][-1]:
        known["cuts"] = work_on(cuts.find_shots, CutSettings(), place, (file, known))
        shots = {**known, "cuts": [row for row in known["cuts"] if "error" not in row]}
        return known, work_on(clips.cut_clips, settings, place, (file, shots))
    return known, known["probe"]
