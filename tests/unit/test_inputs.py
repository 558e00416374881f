"""What a run reads, with a latent cache: whose latents it takes, and what its previews show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svd_ds.config import compose
from svd_ds.data.latents import MEMBER, Origin, pack
from svd_ds.data.writer import ShardWriter
from svd_ds.inputs import read_inputs
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.parallel.env import Env
from svd_ds.sample import TINY
from tests.videos import about, encode, moving_square


def write(folder: Path, autoencoder: str) -> None:
    frames = moving_square(6, height=64, width=64)
    moments = torch.zeros(6, 8, 8, 8)
    writer = ShardWriter(folder)
    writer.add(
        "a", "mp4", encode(frames), about(frames), {MEMBER: pack(moments, Origin(64, 64, autoencoder))}
    )
    writer.close()


def test_latents_of_another_autoencoder_are_refused_with_both(tmp_path: Path) -> None:
    data = [f"data.path={tmp_path / 'data'}", "data.latents=true", "data.crop=center"]
    config = compose(["debug=tiny", f"run.dir={tmp_path / 'run'}", *data])
    env = replace(Env.read({}), device=torch.device("cpu"))
    ours = Autoencoder.load(TINY).fingerprint()

    write(tmp_path / "data", ours)
    inputs = read_inputs(config, env)
    batch, _ = next(iter(inputs.loader))
    assert batch.frames_BTCHW.shape[1] == 1 and batch.num_frames == 4
    assert inputs.preview_clips.frames_BTCHW.shape[1] == 4, "a preview shows all frames beside its own"

    (tmp_path / "data" / "index.jsonl").unlink()
    write(tmp_path / "data", "0123456789ab")
    with pytest.raises(ValueError, match=f"the autoencoder 0123456789ab, and the one in tiny is {ours}"):
        read_inputs(config, env)
