"""Captions by models from local folders, under the names that the paper's mixture has
(conf/experiment/captions.yaml).

    coca        of the middle frame, by any image-to-text model of transformers
    video_blip  of frames spread over the clip, by one that takes several: a chat model, or GIT
    llm         one sentence of those two, by any causal language model

The paper's are CoCa, VideoBLIP and a lightweight language model (arXiv 2311.15127, section 3.1). Decoding
is greedy: the same clip gets the same caption.
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

from svd_ds.curate.measure import read_pictures
from svd_ds.curate.models import load
from svd_ds.curate.raw import RawFile
from svd_ds.curate.stages import Place
from svd_ds.curate.table import Known, Row

COLUMNS = {"id": pa.string(), "caption": pa.string()}
PROMPTS = {
    "coca": "Describe this picture in one sentence.",
    "video_blip": "These are frames of one video, in order. Describe what happens in it in one sentence.",
    "llm": "Join two descriptions of one video into one sentence. Add nothing.\n1. {}\n2. {}\nSentence:",
}


@dataclass(frozen=True)
class CaptionSettings:
    folder: str
    prompt: str
    num_frames: int = 1
    """Shown to the model, spread over the clip; 1: the middle one."""
    max_tokens: int = 60
    device: str = "cpu"


def caption_frames(settings: CaptionSettings, file: RawFile, known: Known, place: Place) -> Iterator[Row]:
    """A caption of each clip's frames; none where the model has nothing to say."""
    captioner = load_captioner(settings)
    for clip in known["clips"]:
        num_frames = clip["end_frame"] - clip["start_frame"]
        places = (np.arange(settings.num_frames) + 0.5) / settings.num_frames * num_frames
        frames = read_pictures(place.out / clip["media"], sorted(set(places.astype(int).tolist())))
        yield {"id": clip["id"], "caption": captioner.describe(frames) or None}


def merge_captions(settings: CaptionSettings, file: RawFile, known: Known, place: Place) -> Iterator[Row]:
    """One caption of two; none where there are not two."""
    captioner = load_merger(settings)
    seen = {row["id"]: row["caption"] for row in known["caption_video_blip"]}
    for row in known["caption_coca"]:
        first, second = row["caption"], seen.get(row["id"])
        merged = captioner.answer(settings.prompt.format(first, second)) if first and second else None
        yield {"id": row["id"], "caption": merged or None}


@dataclass(frozen=True)
class Captioner:
    """A model that writes text, with what prepares its input."""

    network: Any
    processor: Any
    settings: CaptionSettings

    def describe(self, frames: Sequence[np.ndarray]) -> str:
        """Text about uint8 RGB frames, (H, W, 3) each."""
        pictures = [Image.fromarray(frame) for frame in frames]
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image", "image": picture} for picture in pictures]
            return self._chat([*content, {"type": "text", "text": self.settings.prompt}])
        inputs = self.processor(images=pictures, return_tensors="pt")
        if self.settings.num_frames > 1:
            inputs["pixel_values"] = inputs["pixel_values"].unsqueeze(0)  # GIT: one video of several frames
        return self._generate(inputs, num_given=0)

    def answer(self, prompt: str) -> str:
        """Text that follows a prompt."""
        if getattr(self.processor, "chat_template", None):
            return self._chat(prompt)
        inputs = self.processor(prompt, return_tensors="pt")
        return self._generate(inputs, num_given=inputs["input_ids"].shape[1])

    def _chat(self, content: Any) -> str:
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return self._generate(inputs, num_given=inputs["input_ids"].shape[1])

    @torch.no_grad()
    def _generate(self, inputs: Any, num_given: int) -> str:
        """`num_given` tokens of the output repeat the input."""
        inputs = inputs.to(self.network.device)
        tokens = self.network.generate(**inputs, max_new_tokens=self.settings.max_tokens, do_sample=False)
        text = self.processor.batch_decode(tokens[:, num_given:], skip_special_tokens=True)[0]
        return " ".join(text.split())


@cache
def load_captioner(settings: CaptionSettings) -> Captioner:
    """One a process. Raises ValueError where it is to see several frames and takes one."""
    network, processor = load(
        "AutoModelForImageTextToText", "AutoProcessor", settings.folder, settings.device
    )
    takes_several = getattr(processor, "chat_template", None) or getattr(
        network.config, "num_image_with_embedding", None
    )
    if settings.num_frames > 1 and not takes_several:
        raise ValueError(
            f"the captioner in {settings.folder} takes 1 picture, and is to see {settings.num_frames}"
        )
    return Captioner(network, processor, settings)


@cache
def load_merger(settings: CaptionSettings) -> Captioner:
    """One a process."""
    network, tokenizer = load("AutoModelForCausalLM", "AutoTokenizer", settings.folder, settings.device)
    return Captioner(network, tokenizer, settings)
