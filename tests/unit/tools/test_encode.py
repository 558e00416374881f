"""tools/encode.py: shards with latents, which give the same losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

from svd_ds.data import clip_embeddings
from svd_ds.data.batching import BatchConfig
from svd_ds.data.cached_tensors import TensorFile
from svd_ds.data.config import DataConfig
from svd_ds.data.latents import MEMBER, LatentsOrigin, read_origin
from svd_ds.data.loader import Loader
from svd_ds.data.shards import Index, Sample
from svd_ds.data.writer import ShardWriter
from svd_ds.diffusion.noise import NoiseConfig, build_noise_schedule
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner, ConditionerConfig
from svd_ds.model.unet import UNet
from svd_ds.sample import TINY
from svd_ds.training.objectives.diffusion import DiffusionObjective
from tests.networks import SMALL
from tests.videos import encode as encode_video
from tests.videos import moving_square, sample_metadata

SIZE = "32x48"
UNET = replace(SMALL, attention_levels=(True, True), context_width=64)
Encode = Callable[..., tuple[int, str, str]]


@pytest.fixture
def encode(tool_output: Encode) -> Encode:
    return partial(tool_output, "encode.py")


@dataclass
class EncoderSpy:
    """Counts the calls of the real encoder, and interrupts one as a user does."""

    num_frames: list[int]
    """Number of frames of each call."""
    interrupt_at: int | None = None
    """Number of the call that is interrupted."""


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> EncoderSpy:
    encoder, real = EncoderSpy([]), Autoencoder.encode

    def counted(self: Autoencoder, frames_NCHW: torch.Tensor) -> torch.Tensor:
        if len(encoder.num_frames) == encoder.interrupt_at:
            raise KeyboardInterrupt
        encoder.num_frames.append(len(frames_NCHW))
        return real(self, frames_NCHW)

    monkeypatch.setattr(Autoencoder, "encode", counted)
    return encoder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of two moving squares each; the last sample is too small."""
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, samples_per_shard=2)
    for number in range(4):
        height = 40 if number < 3 else 24
        frames = moving_square(10, height=height, width=64, seed=number)
        writer.add(f"s{number}", "mp4", encode_video(frames), sample_metadata(frames, motion=0.1 * number))
    writer.close()
    return folder


def read_sample_origin(index: Index, sample: Sample) -> LatentsOrigin:
    with index.open(sample) as read:
        return read_origin(TensorFile(partial(read, MEMBER), MEMBER))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_copy_has_all_members_of_the_source(encode: Encode, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    code, stdout, err = encode(shards, out, "--size", SIZE)
    assert code == 0, err
    assert "4 clips, 3 of them with latents of 32x48 pixels" in stdout

    source, copy = Index.load(shards), Index.load(out)
    assert copy.motion_map == source.motion_map and copy.shard_sizes == source.shard_sizes
    for before, after in zip(source.samples(), copy.samples(), strict=True):
        assert (MEMBER in after.members) == (before.id != "s3")
        assert all(source.read(before, member) == copy.read(after, member) for member in before.members)

    autoencoder = Autoencoder.load(TINY)
    assert read_sample_origin(copy, copy.sample(0)).autoencoder == autoencoder.fingerprint()


@pytest.mark.parametrize(
    ("context", "concat"), [("image", "image"), ("ends", "image"), ("ends", "ends"), ("text", "image")]
)
def test_losses_are_the_same_with_and_without_the_cache(
    encode: Encode, shards: Path, tmp_path: Path, context: str, concat: str
) -> None:
    out = tmp_path / "latents"
    assert encode(shards, out, "--size", SIZE)[0] == 0
    autoencoder, config = Autoencoder.load(TINY), ConditionerConfig(context=context, concat=concat)
    encoded = Conditioner.load(config, TINY)
    unet = UNet(replace(UNET, in_channels=9, masked=True) if concat == "ends" else UNET)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def losses(
        path: Path, latents: bool, conditioner: Conditioner, cached_context: str | None
    ) -> torch.Tensor:
        diffusion = DiffusionObjective(
            noise=build_noise_schedule(NoiseConfig(), 32, 48),
            offset_noise=0.0,
            autoencoder=autoencoder,
            conditioner=conditioner,
            seed=0,
        )
        data = DataConfig(str(path), 3, 32, 48, fps=12, crop="center", latents=latents, num_workers=0)
        loader = Loader(
            data, 0, 0, 1, BatchConfig(2), context=cached_context, read_last_frame=config.uses_last_frame
        )
        assert loader.context == cached_context
        batches = [batch for batch, _ in islice(loader, 4)]
        assert all((batch.context_BLD is not None) == (cached_context is not None) for batch in batches)
        with torch.no_grad():
            return torch.cat([diffusion.loss(unet, batch) for batch in batches])

    decoded = losses(shards, False, encoded, None)
    without_clip = Conditioner(config, cached_width=encoded.context_width)
    cached = losses(out, True, without_clip, context)
    assert decoded.std() > 0.01 * decoded.mean(), "losses that differ from clip to clip"
    # bfloat16 keeps 8 bits: 2 ** -8 is 4e-3.
    torch.testing.assert_close(cached, decoded, rtol=4e-3, atol=0)
    assert not torch.equal(cached, decoded), "the cache was read: float16 and JPEG round"
    torch.testing.assert_close(losses(out, True, encoded, None), decoded, rtol=4e-3, atol=0)


@pytest.mark.parametrize("worlds", [(3,), (2, 1)])
def test_several_ranks_write_the_same_files_as_one(
    encode: Encode, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worlds: tuple[int, ...]
) -> None:
    reference, out = tmp_path / "reference", tmp_path / "out"
    assert encode(shards, reference, "--size", SIZE)[0] == 0
    for run, world in enumerate(worlds):
        # In the first of two runs the last rank is missing.
        for rank in range(world - (run < len(worlds) - 1)):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world))
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            monkeypatch.setenv("MASTER_PORT", "1")
            code, _, err = encode(shards, out, "--size", SIZE)
            assert code == 0, err
        assert (out / "index.jsonl").exists() == (run == len(worlds) - 1)
    assert files(out) == files(reference)


def test_samples_that_cannot_be_encoded_are_left_out_and_listed(encode: Encode, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "shards", samples_per_shard=2)
    frames = moving_square(4)
    for number in range(5):
        content = encode_video(frames)
        writer.add(
            f"s{number}",
            "mp4",
            content[: len(content) // 2] if number == 2 else content,
            sample_metadata(frames),
        )
    writer.close()
    out = tmp_path / "out"
    code, _, err = encode(tmp_path / "shards", out, "--size", SIZE, "--max-refused", "0.3")
    assert code == 0, err
    assert [sample.id for sample in Index.load(out).samples()] == ["s0", "s1", "s3", "s4"]
    refused = (out / "refused.csv").read_text().splitlines()
    assert refused[0] == "sample,shard,reason" and len(refused) == 2 and refused[1].startswith("s2,")
    assert (
        len(Loader(DataConfig(str(out), 3, 32, 48, crop="center", latents=True), 0, 0, 1, BatchConfig(2)))
        == 4
    )


def test_option_no_clip_stores_no_clip_embeddings(encode: Encode, shards: Path, tmp_path: Path) -> None:
    assert encode(shards, tmp_path / "out", "--size", SIZE, "--no-clip")[0] == 0
    samples = list(Index.load(tmp_path / "out").samples())
    assert [clip_embeddings.MEMBER in sample.members for sample in samples] == [False] * 4


def test_interrupted_run_resumes_with_the_unfinished_shard(
    encode: Encode, encoder: EncoderSpy, shards: Path, tmp_path: Path
) -> None:
    reference, out = tmp_path / "reference", tmp_path / "out"
    assert encode(shards, reference, "--size", SIZE)[0] == 0
    assert encoder.num_frames == [10, 10, 10]

    encoder.num_frames, encoder.interrupt_at = [], 2
    assert encode(shards, out, "--size", SIZE)[0] == 130
    assert sorted(files(out)) == ["encoding.json", "shard-00000.tar"], "one complete shard, no index"
    first = (out / "shard-00000.tar").stat()

    encoder.num_frames, encoder.interrupt_at = [], None
    assert encode(shards, out, "--size", SIZE)[0] == 0
    assert encoder.num_frames == [10], "only the second shard"
    assert files(out) == files(reference)
    assert (out / "shard-00000.tar").stat() == first

    encoder.num_frames = []
    assert "4 clips, 3 of them with latents" in encode(shards, out, "--size", SIZE)[1]
    assert encoder.num_frames == [], "nothing is repeated"


def test_other_settings_in_the_same_folder_are_refused_with_both_values(
    encode: Encode, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert encode(shards, out, "--size", "16x24")[0] == 0
    before = files(out)
    code, _, err = encode(shards, out, "--size", SIZE)
    assert code == 2 and "whose height is 16, but here it is 32" in err
    code, _, err = encode(shards, out, "--size", "16x24", "--precision", "bf16")
    assert code == 2 and "whose precision is fp32, but here it is bf16" in err
    assert files(out) == before
    assert encode(shards, out, "--size", SIZE, "--overwrite")[0] == 0
    index = Index.load(out)
    assert read_sample_origin(index, index.sample(0)).height == 32
    # Latents of another size are replaced in a copy of a copy.
    again = tmp_path / "again"
    assert encode(out, again, "--size", "16x24")[0] == 0
    index = Index.load(again)
    assert [read_sample_origin(index, sample).height for sample in index.samples()] == [16] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "out", "--size", SIZE), "there is no data folder"),
        (("shards", "shards", "--size", SIZE, "--overwrite"), "SHARDS and OUT are both "),
        (("shards", "out", "--size", "64x64"), "none of the 4 samples in"),
        (("shards", "out", "--size", "30x40"), "frames are 30x40, but"),
        (("shards", "out", "--size", SIZE, "--frozen", "nowhere"), "neither a folder nor a hub id"),
    ],
)
def test_mistakes_end_in_one_sentence(
    encode: Encode, shards: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    before = files(shards)
    named = {"shards": shards, "out": tmp_path / "out", "nowhere": tmp_path / "nowhere"}
    code, _, err = encode(*(named.get(argument, argument) for argument in arguments))
    assert code == 2 and message in err and "Traceback" not in err
    assert files(shards) == before and not (tmp_path / "out").exists()


def test_sample_that_cannot_be_decoded_is_named(encode: Encode, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "shards")
    writer.add("bad", "mp4", b"no video at all", sample_metadata(moving_square(4)))
    writer.close()
    code, _, err = encode(tmp_path / "shards", tmp_path / "out", "--size", SIZE, "--max-refused", "0")
    assert (
        code == 2 and "sample bad of" in err and "shard-00000.tar cannot be read: the file cannot be" in err
    )
    code, _, err = encode(tmp_path / "shards", tmp_path / "out", "--size", SIZE)
    assert code == 2 and "none of the 1 samples could be encoded" in err


@pytest.mark.parametrize("damage", [b"", b"\0" * 512, None])
def test_files_damaged_by_a_power_cut_are_written_again(
    encode: Encode, encoder: EncoderSpy, shards: Path, tmp_path: Path, damage: bytes | None
) -> None:
    out = tmp_path / "out"
    assert encode(shards, out, "--size", SIZE)[0] == 0
    intact = files(out)
    for name in ("shard-00000.tar", "index.jsonl"):
        (out / name).write_bytes(intact[name][: len(intact[name]) // 2] if damage is None else damage)
    encoder.num_frames = []
    code, _, err = encode(shards, out, "--size", SIZE)
    assert code == 0, err
    assert encoder.num_frames == [10, 10], "only the damaged shard"
    assert files(out) == intact


def test_damaged_index_lines_are_left_out_and_listed(encode: Encode, tmp_path: Path) -> None:
    writer, frames = ShardWriter(tmp_path / "shards", samples_per_shard=2), moving_square(4)
    for number in range(6):
        writer.add(f"s{number}", "mp4", encode_video(frames), sample_metadata(frames))
    writer.close()
    index = tmp_path / "shards" / "index.jsonl"
    lines = index.read_bytes().splitlines()
    # All lines of the second shard, so that no sample of it is left.
    lines[3], lines[4] = b"{", lines[4].replace(b'"num_frames": 4', b'"num_frames": "four"')
    index.write_bytes(b"".join(line + b"\n" for line in lines))

    out = tmp_path / "out"
    code, stdout, err = encode(tmp_path / "shards", out, "--size", SIZE, "--max-refused", "0.4")
    assert code == 0, err
    assert f"2 of 6 samples cannot be read: {out / 'refused.csv'} says why" in stdout
    refused = (out / "refused.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in refused] == ["sample", "line 4", "line 5"]
    assert "num_frames is 'four'" in refused[2]
    assert [sample.id for sample in Index.load(out).samples()] == ["s0", "s1", "s4", "s5"]
    before = files(out)
    assert encode(tmp_path / "shards", out, "--size", SIZE, "--max-refused", "0.4")[0] == 0
    assert files(out) == before
    code, _, err = encode(tmp_path / "shards", tmp_path / "no", "--size", SIZE, "--max-refused", "0.1")
    assert code == 2 and "line 5 of" in err and "--max-refused=0.1 allows 1" in err


def test_clips_without_a_caption_are_counted(encode: Encode, tmp_path: Path) -> None:
    writer, frames = ShardWriter(tmp_path / "shards"), moving_square(4)
    for number, captions in enumerate(({"text": "a"}, {"text": ""}, {"text": " "}, {"a": "", "b": "b"})):
        writer.add(
            f"s{number}", "mp4", encode_video(frames), sample_metadata(frames) | {"captions": captions}
        )
    writer.close()
    code, stdout, err = encode(tmp_path / "shards", tmp_path / "out", "--size", SIZE)
    assert code == 0, err
    assert "2 of 4 clips have no caption, which text-to-video needs" in stdout


def test_sample_with_unreadable_captions_is_refused_with_option_no_clip_too(
    encode: Encode, tmp_path: Path
) -> None:
    writer, frames = ShardWriter(tmp_path / "shards"), moving_square(4)
    for number in range(2):
        captions = None if number else {"text": "a"}
        writer.add(
            f"s{number}", "mp4", encode_video(frames), sample_metadata(frames) | {"captions": captions}
        )
    writer.close()
    code, stdout, err = encode(tmp_path / "shards", tmp_path / "out", "--size", SIZE, "--no-clip")
    assert code == 0, err
    assert "1 of 2 samples cannot be read" in stdout
    assert "s1," in (tmp_path / "out" / "refused.csv").read_text()
