"""A run resumes after its inputs were moved, under any key, and is refused if their content changed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from svd_ds.compose import compose
from svd_ds.contents import source_fingerprint
from svd_ds.data.writer import ShardWriter
from svd_ds.inputs import Inputs, read_inputs
from svd_ds.model.unet import UNet
from svd_ds.parallel.env import Env
from svd_ds.sample import TINY
from svd_ds.weights.io import save_unet
from svd_ds.weights.source import open_weights
from tests.videos import encode, moving_square, sample_metadata

CPU = replace(Env.read({}), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a run reads: data sets one, two, other; frozen parts; weights."""
    folder = tmp_path_factory.mktemp("places")
    for name, seed in (("one", 0), ("two", 5), ("other", 9)):
        writer = ShardWriter(folder / name)
        for i in range(4):
            frames = moving_square(8, height=64, width=80, seed=seed + i)
            writer.add(f"{name}{i}", "mp4", encode(frames), sample_metadata(frames, motion=0.1 * (i + 1)))
        writer.close()
    shutil.copytree(TINY, folder / "frozen")
    shutil.copytree(TINY, folder / "other-frozen")
    vae = folder / "other-frozen/vae/diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 0.5 for name, tensor in load_file(vae).items()}, vae, {"format": "pt"})
    for name, seed in (("weights", 0), ("other-weights", 1)):
        torch.manual_seed(seed)
        save_unet(UNet(compose(["debug=tiny"]).model), folder / f"{name}.safetensors", "original")
    return folder


MIXTURE = "data.mixture={{{{{{0}}/one:{},{{0}}/{}:1}}}}"
CASES = {
    "data.path": ("data.path={}/one", "data.path={}/other", "fingerprint"),
    "data.mixture": (MIXTURE.format(3, "two"), MIXTURE.format(3, "other"), "fingerprint"),
    "its weights": (MIXTURE.format(3, "two"), MIXTURE.format(2, "two"), r"one \(2\) and"),
    "frozen.path": ("frozen.path={}/frozen", "frozen.path={}/other-frozen", "frozen.path.vae has the"),
    "init.from": (
        "init.from={}/weights.safetensors",
        "init.from={}/other-weights.safetensors",
        "from has the",
    ),
}


def begin(run: Path, places: Path, word: str, resume: Path | None = None) -> Inputs:
    """Read the inputs of a restart; write the run folder and the state of a checkpoint."""
    data = f"data.path={places}/one"
    config = compose(["debug=tiny", "evaluation.clips=2", data, f"run.dir={run}", word.format(places)])
    inputs = read_inputs(config, CPU, resume)
    inputs.folder.open(config.as_dict() | {"contents": inputs.contents, "code": {}}, step=0)
    (run / "state").mkdir(exist_ok=True)
    (run / "state" / "state.json").write_text(inputs.progress.as_json())
    return inputs


@pytest.mark.parametrize("case", CASES)
def test_moved_weights_are_accepted_and_replaced_ones_are_not(
    places: Path, tmp_path: Path, case: str
) -> None:
    word, other, message = CASES[case]
    begin(tmp_path / "run", places, word)
    moved = tmp_path / "moved"
    shutil.copytree(places, moved)
    resume = tmp_path / "run" / "state"
    again = begin(tmp_path / "run", moved, word, resume)
    assert begin(tmp_path / "run", places, word, resume).contents == again.contents
    with pytest.raises(ValueError, match=message):
        begin(tmp_path / "run", moved, other, resume)


def test_fixed_set_is_the_same_after_its_data_moved(places: Path, tmp_path: Path) -> None:
    shutil.copytree(places / "other", tmp_path / "held-out")
    paths = (places / "other", tmp_path / "held-out", places / "two")
    sets = [begin(tmp_path / "run", places, f"evaluation.path={path}").fixed_set for path in paths]
    there, moved, other = (found.data for found in sets if found is not None)
    assert there == moved != other


def test_weights_replaced_in_place_are_refused(places: Path, tmp_path: Path) -> None:
    shutil.copytree(places / "frozen", tmp_path / "parts")
    begin(tmp_path / "run", places, f"frozen.path={tmp_path / 'parts'}")
    shutil.rmtree(tmp_path / "parts")
    shutil.copytree(places / "other-frozen", tmp_path / "parts")
    with pytest.raises(ValueError, match=r"frozen\.path\.vae has the fingerprint '\w+' there and '\w+' here"):
        begin(tmp_path / "run", places, f"frozen.path={tmp_path / 'parts'}", tmp_path / "run/state")


def test_weights_that_a_run_started_from_are_not_needed_when_it_resumes(places: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    shutil.copyfile(places / "weights.safetensors", weights)
    before = begin(tmp_path / "run", places, f"init.from={weights}")
    weights.unlink()
    resume = tmp_path / "run" / "state"
    assert begin(tmp_path / "run", places, f"init.from={weights}", resume).contents == before.contents
    for word in (f"init.from={tmp_path}/elsewhere.safetensors", "init.from=null"):
        with pytest.raises(ValueError, match=r"init\.from has the fingerprint '\w+' there and 'none' here"):
            begin(tmp_path / "run", places, word, resume)


def test_weights_that_changed_before_the_first_checkpoint_are_read_again(
    places: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "weights.safetensors"
    shutil.copyfile(places / "weights.safetensors", weights)
    before = begin(tmp_path / "run", places, f"init.from={weights}").contents
    shutil.copyfile(places / "other-weights.safetensors", weights)
    after = begin(tmp_path / "run", places, f"init.from={weights}").contents
    assert after["init"] != before["init"]
    stored = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert stored["contents"] == after


@pytest.mark.parametrize("key", ["frozen.path", "init.from"])
def test_run_without_recorded_contents_is_compared_by_its_paths(
    places: Path, tmp_path: Path, key: str
) -> None:
    word, other, _ = CASES[key]
    inputs = begin(tmp_path / "run", places, word)
    stored = yaml.safe_load(inputs.folder.config.read_text())
    del stored["contents"]
    for path in (inputs.folder.config, inputs.folder.config_copy):
        path.write_text(yaml.safe_dump(stored, explicit_end=True))
    assert begin(tmp_path / "copy", places, word).contents == inputs.contents
    with pytest.raises(ValueError, match=f"belongs to another config: {key} is"):
        begin(tmp_path / "run", places, other)


def test_fingerprint_names_weights(places: Path) -> None:
    one = source_fingerprint(open_weights(places / "weights.safetensors", None))
    assert one != source_fingerprint(open_weights(places / "other-weights.safetensors", None))
    assert len(one) == 12 and one == source_fingerprint(open_weights(places / "weights.safetensors", "raw"))
