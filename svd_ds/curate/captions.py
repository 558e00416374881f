"""Captions by models from local folders, named as in the paper's mixture (conf/experiment/captions.yaml).

    coca        caption of the middle frame, by any image-to-text model of transformers
    video_blip  caption of frames spread over the clip, by a model that takes several: a chat model, or GIT
    llm         one sentence that merges those two, by any causal language model

The paper uses CoCa, VideoBLIP and a lightweight language model (arXiv 2311.15127, section 3.1). Decoding is
greedy: the same clip gets the same caption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from svd_ds.curate.measure import read_clip_frames
from svd_ds.curate.models import load_pretrained
from svd_ds.curate.raw import RawFile
from svd_ds.curate.stages import StageContext
from svd_ds.curate.table import Row, RowsByStage

COLUMNS = {"id": pa.string(), "caption": pa.string()}
PROMPTS = {
    "coca": "Describe this picture in one sentence.",
    "video_blip": "These are frames of one video, in order. Describe what happens in it in one sentence.",
    "llm": "Join two descriptions of one video into one sentence. Add nothing.\n1. {}\n2. {}\nSentence:",
}


@dataclass(frozen=True)
class CaptionSettings:
    """A captioning model and its input."""

    folder: str
    """Local folder of the model, as transformers saves it."""
    prompt: str
    num_frames: int = 1
    """Number of frames shown to the model, spread over the clip; 1 is the middle frame."""
    max_tokens: int = 60
    device: str = "cpu"


def caption_frames(
    settings: CaptionSettings, file: RawFile, inputs: RowsByStage, context: StageContext
) -> Iterator[Row]:
    """Yield a caption of each clip's frames; None if the model generates no text."""
    captioner = load_captioner(settings)
    for clip in inputs["clips"]:
        num_frames = clip["end_frame"] - clip["start_frame"]
        centres = (np.arange(settings.num_frames) + 0.5) / settings.num_frames * num_frames
        numbers = sorted(set(centres.astype(int).tolist()))
        frames = read_clip_frames(context.out / clip["media"], numbers)
        yield {"id": clip["id"], "caption": captioner.describe(frames) or None}


def merge_captions(
    settings: CaptionSettings, file: RawFile, inputs: RowsByStage, context: StageContext
) -> Iterator[Row]:
    """Yield one caption merged from two; None if a clip does not have both."""
    captioner = load_merger(settings)
    video_captions = {row["id"]: row["caption"] for row in inputs["caption_video_blip"]}
    for row in inputs["caption_coca"]:
        first, second = row["caption"], video_captions.get(row["id"])
        merged = captioner.answer(settings.prompt.format(first, second)) if first and second else None
        yield {"id": row["id"], "caption": merged or None}


@dataclass(frozen=True)
class Captioner:
    """A model that generates text, with its processor."""

    network: Any
    processor: Any
    settings: CaptionSettings

    def describe(self, frames: Sequence[np.ndarray]) -> str:
        """Generate text about uint8 RGB frames, each (H, W, 3)."""
        pictures = [Image.fromarray(frame) for frame in frames]
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image", "image": picture} for picture in pictures]
            return self._chat([*content, {"type": "text", "text": self.settings.prompt}])
        inputs = self.processor(images=pictures, return_tensors="pt")
        if self.settings.num_frames > 1:
            inputs["pixel_values"] = inputs["pixel_values"].unsqueeze(0)  # GIT: one video of several frames
        return self._generate(inputs, num_input_tokens=0)

    def answer(self, prompt: str) -> str:
        """Generate text that continues a prompt."""
        if getattr(self.processor, "chat_template", None):
            return self._chat(prompt)
        inputs = self.processor(prompt, return_tensors="pt")
        return self._generate(inputs, num_input_tokens=inputs["input_ids"].shape[1])

    def _chat(self, content: Any) -> str:
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return self._generate(inputs, num_input_tokens=inputs["input_ids"].shape[1])

    @torch.no_grad()
    def _generate(self, inputs: Any, num_input_tokens: int) -> str:
        """Generate text and drop the first `num_input_tokens` tokens, which repeat the input."""
        inputs = inputs.to(self.network.device)
        tokens = self.network.generate(**inputs, max_new_tokens=self.settings.max_tokens, do_sample=False)
        text = self.processor.batch_decode(tokens[:, num_input_tokens:], skip_special_tokens=True)[0]
        return " ".join(text.split())


@cache
def load_captioner(settings: CaptionSettings) -> Captioner:
    """Load an image-to-text model, once per process.

    Raises:
        ValueError: `settings.num_frames` is above 1 and the model takes one picture.
    """
    network, processor = load_pretrained(
        "AutoModelForImageTextToText", "AutoProcessor", settings.folder, settings.device
    )
    takes_several = getattr(processor, "chat_template", None) or getattr(
        network.config, "num_image_with_embedding", None
    )
    if settings.num_frames > 1 and not takes_several:
        raise ValueError(
            f"the captioner in {settings.folder} takes 1 picture, but num_frames is {settings.num_frames}"
        )
    return Captioner(network, processor, settings)


@cache
def load_merger(settings: CaptionSettings) -> Captioner:
    """Load a causal language model, once per process."""
    network, tokenizer = load_pretrained(
        "AutoModelForCausalLM", "AutoTokenizer", settings.folder, settings.device
    )
    return Captioner(network, tokenizer, settings)
