"""CLIP, the aesthetic head and the captioners, with untrained models of the real classes in local folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from svd_ds.curate.captions import PROMPTS, CaptionSettings, load_captioner, load_merger
from svd_ds.curate.embed import CLIPModelSettings, load_clip_model, read_aesthetic_head
from svd_ds.curate.pipeline import (
    CurationSettings,
    annotate,
    list_refused,
    progress_bar,
    write_curated_shards,
)
from svd_ds.curate.raw import find_raw_files
from svd_ds.curate.select import ClipRecord
from svd_ds.curate.stages import Runner
from tests.videos import moving_square, write_video

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    name: VISION[name]
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folder of each model, as transformers saves it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    assets = Path(__file__).parents[3] / "svd_ds" / "assets" / "tiny_svd" / "tokenizer"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(assets), local_files_only=True)
    pictures = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    marks = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    words = {"vocab_size": len(tokenizer), **TEXT, **marks}
    git = transformers.GitConfig(
        vision_config=VISION, max_position_embeddings=256, num_image_with_embedding=4, **words
    )
    blip = transformers.BlipConfig(
        vision_config=VISION,
        text_config={**words, "encoder_hidden_size": 32, "sep_token_id": tokenizer.eos_token_id},
    )
    clip = transformers.CLIPConfig(text_config=words, vision_config=VISION, projection_dim=16)
    made = {
        "clip": (transformers.CLIPModel(clip), transformers.CLIPProcessor(pictures, tokenizer)),
        "blip": (
            transformers.BlipForConditionalGeneration(blip),
            transformers.BlipProcessor(pictures, tokenizer),
        ),
        "git": (transformers.GitForCausalLM(git), transformers.GitProcessor(pictures, tokenizer)),
        "llama": (transformers.LlamaForCausalLM(transformers.LlamaConfig(**words)), tokenizer),
    }
    for name, (network, processor) in made.items():
        network.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return {name: str(root / name) for name in made}


def frames(number: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (number, 48, 64, 3), dtype=np.uint8))


def test_embeddings_equal_transformers(folders: dict[str, str]) -> None:
    model = load_clip_model(CLIPModelSettings(folders["clip"]))
    embeddings = model.embed_frames(frames(3))
    assert embeddings.shape == (3, 16)
    assert embeddings.norm(dim=-1) == pytest.approx(torch.ones(3).numpy(), abs=1e-5)
    network = transformers.CLIPModel.from_pretrained(folders["clip"], local_files_only=True).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folders["clip"], local_files_only=True)
    with torch.no_grad():
        inputs = processor(text=["a red car"], images=frames(1), return_tensors="pt")
        expected = network(**inputs).logits_per_image / network.logit_scale.exp()
    cosine = model.embed_frames(frames(1)) @ model.embed_texts(["a red car"]).T
    assert cosine.item() == pytest.approx(expected.item(), abs=1e-5)
    long = model.embed_texts(["word " * 300])
    assert long.shape == (1, 16), "captions are cut to what CLIP takes"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_head_may_have_several_layers(folders: dict[str, str], tmp_path: Path, suffix: str) -> None:
    first, second = torch.nn.Linear(16, 4), torch.nn.Linear(4, 1)
    path = tmp_path / f"head{suffix}"
    tensors = torch.nn.Sequential(first, torch.nn.Dropout(), second).state_dict()
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    model = load_clip_model(CLIPModelSettings(folders["clip"], str(path)))
    embeddings = model.embed_frames(frames(3))
    assert model.aesthetic(embeddings) == pytest.approx(second(first(embeddings)).mean().item(), abs=1e-5)


def test_aesthetic_head_of_another_width_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    torch.save(torch.nn.Linear(768, 1).state_dict(), path)
    with pytest.raises(ValueError, match=r"takes embeddings of width 768, but CLIP in .* has width 16"):
        load_clip_model(CLIPModelSettings(folders["clip"], str(path)))
    torch.save({"weight": torch.ones(3, 16), "bias": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="must hold linear layers that end in one number"):
        read_aesthetic_head(path)
    with pytest.raises(FileNotFoundError, match="there are no weights"):
        read_aesthetic_head(tmp_path / "gone.pth")


def test_captioners_see_their_frames_and_are_deterministic(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = load_captioner(CaptionSettings(folders["blip"], PROMPTS["coca"], max_tokens=8))
    video = load_captioner(CaptionSettings(folders["git"], PROMPTS["video_blip"], num_frames=4, max_tokens=8))
    assert image.describe(frames(1)) == image.describe(frames(1)) != ""
    assert video.describe(frames(4)) == video.describe(frames(4)) != ""
    inputs, generate = [], video.network.generate
    monkeypatch.setattr(video.network, "generate", lambda **given: inputs.append(given) or generate(**given))
    video.describe(frames(4))
    assert inputs[0]["pixel_values"].shape == (1, 4, 3, 32, 32)
    with pytest.raises(ValueError, match="takes 1 picture, but num_frames is 4"):
        load_captioner(CaptionSettings(folders["blip"], PROMPTS["video_blip"], num_frames=4))


def test_merger_does_not_repeat_its_prompt(folders: dict[str, str]) -> None:
    merger = load_merger(CaptionSettings(folders["llama"], PROMPTS["llm"], max_tokens=8))
    question = PROMPTS["llm"].format("a dog", "a dog runs")
    answer = merger.answer(question)
    assert answer and "Join two descriptions" not in answer


@pytest.fixture(scope="module")
def annotated(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[ClipRecord]:
    """Two videos, one with a caption file, processed by all models."""
    root = tmp_path_factory.mktemp("annotated")
    write_video(root / "raw" / "captioned.mp4", moving_square(50, seed=1), fps=25)
    write_video(root / "raw" / "uncaptioned.mp4", moving_square(50, seed=2), fps=25)
    (root / "raw" / "captioned.txt").write_text("a square moves")
    head = root / "head.pth"
    torch.save(torch.nn.Linear(16, 1).state_dict(), head)
    settings = CurationSettings(
        clip_model=CLIPModelSettings(folders["clip"], str(head)),
        coca=CaptionSettings(folders["blip"], PROMPTS["coca"], max_tokens=8),
        video_blip=CaptionSettings(folders["git"], PROMPTS["video_blip"], num_frames=4, max_tokens=8),
        llm=CaptionSettings(folders["llama"], PROMPTS["llm"], max_tokens=8),
    )
    with (
        progress_bar() as progress,
        Runner(find_raw_files(root / "raw", root / "out"), root / "out", 0, progress) as runner,
    ):
        annotate(runner, settings)
        assert list_refused(runner) == []
        return write_curated_shards(runner, settings, root / "out" / "shards")


def test_every_model_fills_its_column(annotated: list[ClipRecord]) -> None:
    captioned, uncaptioned = annotated
    assert set(captioned.captions) == {"text", "coca", "video_blip", "llm"}
    assert set(uncaptioned.captions) == {"coca", "video_blip", "llm"}, (
        "the file name is no caption if there are real ones"
    )
    assert captioned.captions["text"] == "a square moves"
    for clip in annotated:
        assert clip.annotations["aesthetic"] is not None and clip.annotations["text_area"] is None
        assert -1 <= (clip.annotations["clip_similarity"] or 9) <= 1
        assert np.array(clip.embeddings).shape == (3, 16)
    json.dumps([clip.captions for clip in annotated])
