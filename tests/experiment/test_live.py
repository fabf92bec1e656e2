"""Refusals of a live stream. test_footage_to_values.py compares its values with those of windows."""

import numpy as np
import pytest
import torch

import arrays
import small
from grjca import backbones
from grjca.live import Live
from grjca.model.audiovisual import AudioVisualModel
from grjca.model.whole import WholeModel


def from_features(dtype=torch.float32):
    torch.manual_seed(0)
    return AudioVisualModel(small.MODEL, fusion="grjca", length=4).to(dtype)


def frame():
    return torch.randn(6), torch.randn(5)


@pytest.mark.parametrize("every", [0, -1, 2.5, 2.0, "2", None])
def test_frames_between_values_are_a_whole_number(every):
    with pytest.raises(ValueError, match=r"every: expected a whole number of frames above 0, got .+\."):
        Live(from_features(), every=every)
    assert Live(from_features(), every=np.int64(2)).every == 2


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e39])
def test_a_frame_of_numbers_that_are_not_finite_is_refused(number):
    """Such a frame is refused, as it is in files, and the stream continues as if it had not come."""
    live, untouched = Live(from_features()), Live(from_features())
    visual, audio = frame()
    with pytest.raises(ValueError, match=r"frame: expected finite numbers, got others for audio; leave the frame out"):
        live.push(visual, np.array([0, 0, number, 0, 0]))
    assert live.push(visual, audio) == untouched.push(visual, audio)


def test_patches_that_are_not_finite_are_refused():
    networks = {name: backbones.make(name, "small") for name in ("visual", "audio")}
    whole = WholeModel(AudioVisualModel(arrays.MODEL, fusion="grjca", length=4), networks)
    with pytest.raises(ValueError, match="got others for audio"):
        Live(whole).push(torch.zeros(48, 48, 3, dtype=torch.uint8), torch.full((96, 64), torch.nan))


@pytest.mark.parametrize("wrong", [(None,), (None, None), ("a", "b"), ([1, [2]], 3), (frame()[0], object())])
def test_what_is_no_array_is_refused(wrong):
    with pytest.raises(TypeError, match=r"frame: expected tensors or arrays of numbers for visual, audio, got \w+"):
        Live(from_features()).push(*wrong)


@pytest.mark.parametrize("wrong", [(), frame()[:1], (*frame(), frame()[0]), frame()[::-1]])
def test_other_modalities_are_refused(wrong):
    with pytest.raises(ValueError, match=r"frame: expected visual, audio of shapes \[\[6\], \[5\]\], got \["):
        Live(from_features()).push(*wrong)
