"""A decoder trained as a user does it, in this process: one rank, two steps, stopped between them."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder

from svd_ds.data.writer import ShardWriter
from svd_ds.jobs.signals import SIGNALS
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.sample import TINY
from svd_ds.train import main as train_main
from svd_ds.weights.decoder import load_decoder
from svd_ds.weights.io import load_unet
from tests.runs import metrics
from tests.videos import encode, moving_square, sample_metadata

ROOT = Path(__file__).parents[2]
SMALL = (
    "+experiment=temporal_decoder", "debug=tiny", "data.height=32", "data.width=32", "data.num_frames=2",
    "batch.size=2", "loss.adversarial_start=2", "loss.discriminator_width=4",
)  # fmt: skip
Train = Callable[..., int]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """train(run, *overrides) is the command's exit code; the process is afterwards as it was."""
    shards = tmp_path_factory.mktemp("data") / "shards"
    writer = ShardWriter(shards)
    for i in range(4):
        frames = moving_square(4, height=32, width=32, seed=i)
        writer.add(f"clip{i}", "mp4", encode(frames), sample_metadata(frames))
    writer.close()
    before, argv, folder = dict(os.environ), sys.argv, os.getcwd()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def run(run: Path, *overrides: str) -> int:
        sys.argv = ["train", *SMALL, f"data.path={shards}", f"run.dir={run}", *overrides]
        try:
            train_main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    os.environ["WANDB_MODE"] = "disabled"
    os.chdir(ROOT)
    yield run
    os.chdir(folder)
    sys.argv = argv
    os.environ.clear()
    os.environ.update(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def resumed(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "resumed"
    assert train(run, "run.steps=1") == 0
    assert train(run, "run.steps=2") == 0
    return run


def test_resumed_decoder_run_equals_an_uninterrupted_one(train: Train, resumed: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "uninterrupted", "run.steps=2") == 0
    keys = ("loss", "grad_norm", "reconstruction", "adversarial", "discriminator")
    first, second = metrics(resumed)
    assert "discriminator" not in first and "discriminator" in second
    assert {key: second[key] for key in keys} == {
        key: metrics(tmp_path / "uninterrupted")[1][key] for key in keys
    }
    uninterrupted, ours = load_decoder(tmp_path / "uninterrupted"), load_decoder(resumed)
    assert all(a.equal(b) for a, b in zip(uninterrupted.parameters(), ours.parameters(), strict=True))


def test_decoder_run_writes_checkpoints_previews_and_a_report(resumed: Path) -> None:
    checkpoint = resumed / "checkpoints" / "step-0000002"
    names = {path.name for path in checkpoint.iterdir()}
    assert names >= {"COMPLETE", "decoder", "objective.safetensors", "ema-power-0.050", "adam-exp_avg"}
    samples = resumed / "samples" / "step-0000002"
    assert {path.name for path in samples.iterdir()} == {"video-0.mp4", "contact_sheet.png", "measures.json"}
    assert 10 < json.loads((samples / "measures.json").read_text())["psnr"] < 60
    log = (resumed / "logs" / "train.log").read_text()
    assert "loss.perceptual is null: the loss has no perceptual term" in log
    assert "psnr" in log
    report = (resumed / "report.html").read_text()
    assert all(title in report for title in ("Reconstruction", "Discriminator", "psnr ")), "curves and PSNR"
    assert "Perceptual distance" not in report


@torch.no_grad()
def test_decoder_run_converts_to_a_pipeline_with_its_decoder_as_vae(
    resumed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "tools" / "convert.py"), run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    assert convert(resumed, tmp_path / "out", "--layout", "diffusers", "--ema", "raw") == 0
    theirs: Any = AutoencoderKLTemporalDecoder.from_pretrained(tmp_path / "out", subfolder="vae")
    decoder, latents = load_decoder(resumed, "raw"), torch.randn(1, 2, 4, 4, 4)
    frames = theirs.decode(latents[0], num_frames=2).sample
    assert torch.allclose(frames, decoder(latents)[0], atol=1e-5)
    initial = Autoencoder.load(TINY).network.decode(latents[0], num_frames=2).sample
    assert not torch.allclose(frames, initial, atol=1e-3), "training changed the decoder"
    assert Autoencoder.load(tmp_path / "out").fingerprint() == Autoencoder.load(TINY).fingerprint()
    assert (tmp_path / "out" / "image_encoder").is_dir(), "frozen.path=OUT has every part"

    assert convert(resumed, tmp_path / "svd.safetensors", "--layout", "original") == 2
    assert "is a decoder: it needs --layout diffusers and --frozen" in capsys.readouterr().err


def test_decoder_and_unet_checkpoints_are_refused_in_place_of_each_other(
    train: Train, resumed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="holds a decoder, and not a unet"):
        load_unet(resumed)
    checkpoint = resumed / "checkpoints" / "step-0000002"
    assert train(tmp_path / "unet", "task=unet", f"run.resume={checkpoint}") == 2
    assert "is a checkpoint of a decoder, and this run trains a unet" in capsys.readouterr().err
    assert train(tmp_path / "other", f"init.from={resumed}") == 2
    assert "init.from is" in capsys.readouterr().err
    assert train(tmp_path / "none", "frozen.path=conf") == 2
    assert "conf has no vae/config.json" in capsys.readouterr().err
