"""CRAFT: names of the published tensors, boxes from score maps, share of a frame covered by text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from svd_ds.curate.craft import Craft, find_boxes
from svd_ds.curate.text import TextSettings, text_area


def test_tensors_have_the_names_and_shapes_of_the_published_weights() -> None:
    network = Craft()
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert sum(parameter.numel() for parameter in network.parameters()) == 20_770_466
    assert shapes["basenet.slice1.10.weight"] == (128, 128, 3, 3)
    assert shapes["basenet.slice4.38.running_var"] == (512,)
    assert shapes["basenet.slice5.1.weight"] == (1024, 512, 3, 3)
    assert shapes["upconv1.conv.0.weight"] == (512, 1536, 1, 1)
    assert shapes["conv_cls.8.bias"] == (2,)
    assert network.eval()(torch.zeros(1, 3, 64, 96)).shape == (1, 2, 32, 48)


def test_linked_letters_are_one_box_and_faint_letters_none() -> None:
    letters, links = np.zeros((40, 80), dtype=np.float32), np.zeros((40, 80), dtype=np.float32)
    letters[10:16, 10:16] = letters[10:16, 20:26] = 0.9
    links[12:14, 14:22] = 0.9
    letters[30:36, 60:66] = 0.6
    letters[2:4, 2:4] = 0.9
    (corners,) = find_boxes(letters, links, 0.7)
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    assert 8 <= left <= 10 and 8 <= top <= 10 and 25 <= right <= 27 and 15 <= bottom <= 17
    links[:] = 0
    assert len(find_boxes(letters, links, 0.7)) == 2 and len(find_boxes(letters, links, 0.5)) == 3


@pytest.mark.parametrize(("score", "share"), [(1.0, 1.0), (0.6, 0.0)])
def test_text_area_is_the_share_of_the_frame(tmp_path: Path, score: float, share: float) -> None:
    """A network with the same score in every cell, saved like the authors' from several GPUs."""
    network = Craft()
    last = network.conv_cls[-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([score, 0.0])
    path = tmp_path / "craft.pth"
    torch.save({f"module.{name}": tensor for name, tensor in network.state_dict().items()}, path)
    settings = TextSettings(str(path), side=40)
    frame = np.zeros((20, 50, 3), dtype=np.uint8)
    assert text_area(frame, settings) == pytest.approx(share, abs=0.1)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError, match=r"other\.pth is not a file of CRAFT weights: \d+ names differ, such as basenet"
    ):
        TextSettings(str(path))
