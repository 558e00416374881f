"""Untrained parts of svd_ds/assets/tiny_svd: UNet, scheduler, CLIP encoders, tokenizer."""

from __future__ import annotations

from diffusers import EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

WIDTH = 64
"""Width of the context: text embeddings and image tokens."""
WORDS = (
    "a the of on in at to and with is are by from over under up down man woman person people dog cat car "
    "road street city tree water sky sun night day light red green blue white black video photo camera shot "
    "close view moving walking running talking riding playing standing slow fast through near small large"
)
"""Words that are single tokens; the tokenizer splits all others into bytes."""


def unet() -> UNetSpatioTemporalConditionModel:
    """Build the smallest UNet of the public class, one level of 32 channels, with random weights."""
    return UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("CrossAttnUpBlockSpatioTemporal",),
        block_out_channels=(32,),
        layers_per_block=1,
        num_attention_heads=(1,),
        cross_attention_dim=WIDTH,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=3 * 32,
        sample_size=16,
        num_frames=14,
    )


def scheduler() -> EulerDiscreteScheduler:
    """Build the scheduler of the public SVD."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        prediction_type="v_prediction",
        sigma_min=0.002,
        sigma_max=700.0,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )


def image_encoder() -> CLIPVisionModelWithProjection:
    """Build an image encoder with random weights, for 224 pixels: diffusers' pipeline resizes to that."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=224,
            patch_size=16,
            hidden_act="gelu",
        )
    )


def tokenizer() -> CLIPTokenizer:
    """Build a tokenizer like CLIP's. Ids: bytes, bytes that end a word, merged pairs, start, end."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in WORDS.split():
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge, pieces = (pieces[0], pieces[1]), [pieces[0] + pieces[1], *pieces[2:]]
            if merge not in merges:
                merges.append(merge)
    vocabulary += ["".join(merge) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    # The signature declares strings; the code takes pairs.
    return CLIPTokenizer(
        vocab=ids,
        merges=merges,  # type: ignore[arg-type]
        model_max_length=77,
    )


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build a text encoder of width WIDTH with random weights for a tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
