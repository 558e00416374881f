"""Conditioning signals: values, shapes, and independent drops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    _resize_with_antialiasing,
)
from transformers import CLIPTextModel, CLIPTokenizer

import svd_ds
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.clip_encoders import preprocess_frames, resize_antialiased
from svd_ds.model.conditioner import Conditioner, ConditionerConfig

TINY = Path(svd_ds.__file__).parent / "assets" / "tiny_svd"
TEXT = ConditionerConfig(context="text", concat="none", scalars=("fps", "motion_bucket"))
ENDS = ConditionerConfig(context="ends", concat="ends")


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return Autoencoder.load(TINY)


@pytest.fixture(scope="module")
def conditioner() -> Conditioner:
    return Conditioner.load(ConditionerConfig(), TINY)


def inputs(num_clips: int = 3, **changes) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "first_frame": torch.rand(num_clips, 3, 32, 48, generator=generator) * 2 - 1,
        "captions": [f"clip {i}" for i in range(num_clips)],
        "num_frames": 5,
        "scalars": {
            "fps": torch.tensor([7.0, 12.0, 25.0])[:num_clips],
            "motion_bucket": torch.tensor([0.0, 127.0, 255.0])[:num_clips],
            "augmentation": torch.tensor([0.02, 0.1, 0.5])[:num_clips],
            "elevation": torch.tensor([-5.0, 10.0, 30.0])[:num_clips],
        },
        "noise": torch.randn(num_clips, 1, 3, 32, 48, generator=generator),
    } | changes


@pytest.fixture(scope="module")
def interpolator() -> Conditioner:
    return Conditioner.load(ENDS, TINY)


def ends(autoencoder: Autoencoder, **changes) -> dict:
    """`inputs` with a last frame, and noise of the shape that goes with both ends."""
    shape = Conditioner(ENDS).noise_shape(autoencoder, 32, 48)
    generator = torch.Generator().manual_seed(1)
    more = {
        "last_frame": torch.rand(3, 3, 32, 48, generator=generator) * 2 - 1,
        "noise": torch.randn(3, *shape, generator=generator),
    }
    return inputs(**more | changes)


def test_shapes_and_widths(conditioner, autoencoder):
    cond = conditioner(autoencoder, **inputs())
    assert cond.context_BLD.shape == (3, 1, conditioner.context_width) == (3, 1, 64)
    assert (
        cond.concat_BTChw.shape == (3, 5, conditioner.concat_channels(autoencoder), 4, 6) == (3, 5, 4, 4, 6)
    )
    assert cond.scalars_BS.shape == (3, conditioner.num_scalars) == (3, 3)
    assert {cond.context_BLD.dtype, cond.concat_BTChw.dtype, cond.scalars_BS.dtype} == {torch.float32}


def test_scalars_are_raw_with_one_taken_from_the_frame_rate(conditioner, autoencoder):
    scalars = conditioner(autoencoder, **inputs()).scalars_BS
    assert torch.equal(scalars, torch.tensor([[6, 0, 0.02], [11, 127, 0.1], [24, 255, 0.5]]))


def test_concat_is_the_posterior_mean_of_the_noised_frame_not_scaled(conditioner, autoencoder):
    given = inputs()
    concat = conditioner(autoencoder, **given).concat_BTChw
    noised = given["first_frame"] + given["scalars"]["augmentation"].view(3, 1, 1, 1) * given["noise"][:, 0]
    with torch.no_grad():
        mean = autoencoder.network.encode(noised).latent_dist.mean
    torch.testing.assert_close(concat, mean[:, None].expand_as(concat), rtol=1e-4, atol=1e-4)


def test_concat_is_an_expanded_view_of_one_frame(conditioner, autoencoder):
    assert conditioner(autoencoder, **inputs()).concat_BTChw.stride(1) == 0


def test_image_token_comes_from_the_clean_frame(conditioner, autoencoder):
    quiet = conditioner(autoencoder, **inputs())
    noisy_scalars = inputs()["scalars"] | {"augmentation": torch.full((3,), 5.0)}
    noisy = conditioner(autoencoder, **inputs(scalars=noisy_scalars))
    assert torch.equal(quiet.context_BLD, noisy.context_BLD)
    assert not torch.allclose(quiet.concat_BTChw, noisy.concat_BTChw)


def test_batch_equals_its_clips_one_by_one(conditioner, autoencoder):
    given = inputs()
    whole = conditioner(autoencoder, **given)
    for i in range(3):
        one = {
            name: value[i : i + 1] for name, value in given.items() if name not in ("num_frames", "scalars")
        }
        one["scalars"] = {name: value[i : i + 1] for name, value in given["scalars"].items()}
        alone = conditioner(autoencoder, num_frames=given["num_frames"], **one)
        torch.testing.assert_close(alone.context_BLD[0], whole.context_BLD[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.concat_BTChw[0], whole.concat_BTChw[i], rtol=1e-4, atol=1e-4)
        assert torch.equal(alone.scalars_BS[0], whole.scalars_BS[i])


def test_dropped_signals_are_zero_clip_by_clip_and_independently(conditioner, autoencoder):
    full = conditioner(autoencoder, **inputs())
    drop_context, drop_concat = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    cond = conditioner(autoencoder, **inputs(), drop_context=drop_context, drop_concat=drop_concat)
    assert cond.context_BLD[0].abs().max() == 0 and cond.concat_BTChw[1].abs().max() == 0
    assert torch.equal(cond.context_BLD[1:], full.context_BLD[1:])
    assert torch.equal(cond.concat_BTChw[[0, 2]], full.concat_BTChw[[0, 2]])
    assert torch.equal(cond.scalars_BS, full.scalars_BS)


def test_scalars_are_dropped_one_by_one(conditioner, autoencoder):
    full = conditioner(autoencoder, **inputs())
    drop = {"motion_bucket": torch.tensor([True, False, False]), "fps": torch.tensor([False, False, True])}
    cond = conditioner(autoencoder, **inputs(), drop_scalars=drop)
    assert cond.scalars_BS.isnan().tolist() == [[False, True, False], [False] * 3, [True, False, False]]
    kept = ~cond.scalars_BS.isnan()
    assert torch.equal(cond.scalars_BS[kept], full.scalars_BS[kept])


def test_dropped_signals_equal_the_unconditional_branch_of_guidance(conditioner, autoencoder):
    everything = torch.ones(3, dtype=torch.bool)
    dropped = conditioner(autoencoder, **inputs(), drop_context=everything, drop_concat=everything)
    unconditional = conditioner(autoencoder, **inputs()).unconditional()
    for name in ("context_BLD", "concat_BTChw", "scalars_BS"):
        assert torch.equal(getattr(dropped, name), getattr(unconditional, name)), name


@pytest.mark.parametrize("size", [(576, 1024), (128, 192), (225, 301)])
def test_frames_are_resized_for_the_clip_model_as_in_the_public_pipeline(size):
    frames = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(
        resize_antialiased(frames, 224), _resize_with_antialiasing(frames, (224, 224)), rtol=1e-4, atol=1e-5
    )


def test_pixels_are_normalised_for_the_clip_model():
    white = preprocess_frames(torch.ones(1, 3, 16, 16), 8)[0, :, 4, 4]
    torch.testing.assert_close(
        white,
        (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073]))
        / torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )


@torch.no_grad()
def test_text_embeddings_equal_transformers_padded_to_77(autoencoder):
    conditioner = Conditioner.load(TEXT, TINY)
    captions = ["a man in a car", "word " * 200, ""]
    cond = conditioner(autoencoder, **inputs(captions=captions))
    words = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    ids = words(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    network = CLIPTextModel.from_pretrained(TINY / "text_encoder", dtype=torch.float32)
    torch.testing.assert_close(cond.context_BLD, network(ids).last_hidden_state)
    assert cond.context_BLD.shape == (3, 77, conditioner.context_width)
    assert cond.concat_BTChw is None and conditioner.concat_channels(autoencoder) == 0
    assert torch.equal(cond.scalars_BS, torch.tensor([[6.0, 0], [11, 127], [24, 255]]))
    dropped = conditioner(autoencoder, **inputs(), drop_context=torch.tensor([False, True, False]))
    assert dropped.context_BLD[1].abs().max() == 0 < dropped.context_BLD[0].abs().max()


def test_context_without_a_signal_is_a_zero_token(autoencoder):
    config = ConditionerConfig(context="none", concat="none", scalars=(), context_width=32)
    conditioner = Conditioner.load(config, TINY)
    cond = conditioner(autoencoder, **inputs())
    assert torch.equal(cond.context_BLD, torch.zeros(3, 1, 32))
    assert cond.scalars_BS.shape == (3, 0) and cond.concat_BTChw is None


def test_both_ends_are_two_tokens_of_the_clean_frames(interpolator, conditioner, autoencoder):
    given = ends(autoencoder)
    tokens = interpolator(autoencoder, **given).context_BLD
    assert tokens.shape == (3, 2, interpolator.context_width)
    for token, frame in enumerate(("first_frame", "last_frame")):
        alone = conditioner(autoencoder, **inputs(first_frame=given[frame])).context_BLD
        torch.testing.assert_close(tokens[:, token : token + 1], alone)


def test_first_and_last_frame_are_concatenated_with_a_mask(interpolator, autoencoder):
    given = ends(autoencoder, num_frames=5)
    concat = interpolator(autoencoder, **given).concat_BTChw
    assert concat.shape == (3, 5, interpolator.concat_channels(autoencoder), 4, 6) == (3, 5, 5, 4, 6)
    assert torch.equal(concat[:, :, 4], torch.tensor([1.0, 0, 0, 0, 1]).view(5, 1, 1).expand(3, 5, 4, 6))
    assert not concat[:, 1:-1].any()
    for place, frame in enumerate(("first_frame", "last_frame")):
        clean = autoencoder.encode(given[frame])[:, :4]
        noise = given["noise"][:, place] * given["scalars"]["augmentation"].view(3, 1, 1, 1)
        found = concat[:, -place, :4] * autoencoder.scaling_factor
        torch.testing.assert_close(found, clean * autoencoder.scaling_factor + noise, rtol=1e-4, atol=1e-4)


def test_dropped_ends_equal_the_unconditional_branch_of_guidance(interpolator, autoencoder):
    """No frame is given then, the mask says: a masked network has its embedding on all of them."""
    everything = torch.ones(3, dtype=torch.bool)
    given = ends(autoencoder)
    dropped = interpolator(autoencoder, **given, drop_context=everything, drop_concat=everything)
    unconditional = interpolator(autoencoder, **given).unconditional()
    for name in ("context_BLD", "concat_BTChw", "scalars_BS"):
        assert torch.equal(getattr(dropped, name), getattr(unconditional, name)), name
    assert not dropped.concat_BTChw[:, :, 4].any()
    one = interpolator(autoencoder, **given, drop_concat=torch.tensor([False, True, False]))
    assert one.concat_BTChw.flatten(1).any(dim=1).tolist() == [True, False, True]


def test_ends_need_a_last_frame_and_one_between(interpolator, autoencoder):
    with pytest.raises(ValueError, match="last_frame must be given"):
        interpolator(autoencoder, **inputs())
    with pytest.raises(ValueError, match=r"num_frames is 2: .* it must be at least 3"):
        interpolator(autoencoder, **ends(autoencoder, num_frames=2))


def test_elevation_in_degrees_is_the_last_scalar(conditioner, autoencoder):
    config = ConditionerConfig(scalars=("fps", "motion_bucket", "augmentation", "elevation"))
    scalars = Conditioner(config, conditioner.encoder)(autoencoder, **inputs()).scalars_BS
    assert torch.equal(scalars[:, :3], conditioner(autoencoder, **inputs()).scalars_BS)
    assert scalars[:, 3].tolist() == [-5, 10, 30]


def test_scalar_without_a_value_is_refused_by_config_key(conditioner, autoencoder):
    config = ConditionerConfig(scalars=("fps", "elevation"))
    scalars = {name: value for name, value in inputs()["scalars"].items() if name != "elevation"}
    with pytest.raises(ValueError, match=r"names elevation: sampling\.scalars\.elevation must be given"):
        Conditioner(config, conditioner.encoder)(autoencoder, **inputs(scalars=scalars))


def test_outputs_have_no_autograd_graph(conditioner, autoencoder):
    given = inputs()
    given["first_frame"].requires_grad_()
    cond = conditioner(autoencoder, **given)
    assert not cond.context_BLD.requires_grad and not cond.concat_BTChw.requires_grad
    assert not any(parameter.requires_grad for parameter in conditioner.encoder.network.parameters())


def test_augmentation_sigma_is_log_normal():
    sigma = ConditionerConfig().augmentation_sigma(torch.tensor([-1.0, 0.0, 2.0]))
    torch.testing.assert_close(sigma.log(), torch.tensor([-3.5, -3.0, -2.0]))


def test_drop_rates_depend_on_the_kind_of_context():
    image = ConditionerConfig(drop_context=0.2, drop_text=0.3, drop_concat=0.4)
    assert (image.context_drop_rate, image.concat_drop_rate) == (0.2, 0.4)
    assert (TEXT.context_drop_rate, TEXT.concat_drop_rate) == (0.15, 0.0)
    assert (ENDS.context_drop_rate, ENDS.concat_drop_rate) == (0.1, 0.1)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"context": "audio"}, "context is 'audio': it must be one of image, ends"),
        ({"concat": "mask"}, "concat is 'mask': it must be one of image"),
        ({"scalars": ("fps", "colour")}, "colour"),
        ({"scalars": ("fps", "fps")}, "no name may occur twice"),
        ({"concat": "none"}, "there is no frame that gets noise"),
        ({"context": "none"}, "context_width is None"),
        ({"context_width": 8}, "context_width is 8"),
        ({"drop_context": 1.5}, "drop_context is 1.5"),
        ({"drop_concat": -0.1}, "drop_concat is -0.1"),
        ({"drop_scalars": {"fps": 2.0}}, r"drop_scalars\.fps is 2.0"),
        ({"drop_scalars": {"elevation": 0.1}}, "drop_scalars names elevation: it must be one of fps"),
        ({"augmentation_std": -1.0}, "augmentation_std is -1.0"),
    ],
)
def test_contradictory_config_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        ConditionerConfig(**fields)


def test_folder_without_the_encoder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image_encoder/config\.json"):
        Conditioner.load(ConditionerConfig(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"text_encoder/config\.json"):
        Conditioner.load(TEXT, tmp_path)
