"""Variable length, and live signals"""

import pytest
import torch
from pytest import mark

from family import D_A, D_V, L
from grjca_kernels import GatedRJCAFused


def block(**options) -> GatedRJCAFused:
    torch.manual_seed(0)
    return GatedRJCAFused(D_V, D_A, L, gating="hierarchical", output="concat", **options).double().eval()


def sequences(lengths) -> list[list[torch.Tensor]]:
    """Per modality, per sample [n, d_m]."""
    return [[torch.randn(n, d_m, dtype=torch.float64) for n in lengths] for d_m in (D_V, D_A)]


def test_padded_batch():
    """`pad_sequence` and `lengths`: what stands in the padding, NaN included, changes nothing and gets gradient 0"""
    lengths = torch.tensor([L, 2, 1, 0])
    clean = [torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in sequences(lengths.tolist())]
    dirty = [x.clone() for x in clean]
    for b, n in enumerate(lengths):
        for x in dirty:
            x[b, n:] = torch.nan
    dirty = [x.requires_grad_() for x in dirty]
    y = block()(*dirty, lengths)
    assert torch.equal(y, block()(*clean, lengths))
    y.square().sum().backward()
    for b, n in enumerate(lengths):
        assert not y[b, n:].any() and all(not x.grad[b, n:].any() for x in dirty)
        assert all(x.grad[b].isfinite().all() for x in dirty)


@mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested(layout):
    """`torch.nested`: refused with a sentence that says how to pad it, and doing so works"""
    lengths = [3, L, 1]
    pieces = sequences(lengths)
    nested = [torch.nested.nested_tensor(x, layout=layout) for x in pieces]
    with pytest.raises(TypeError, match=r"visual: expected a strided \(dense\).*to_padded_tensor.*lengths"):
        block()(*nested)
    with pytest.raises(TypeError, match=r"audio: expected a strided"):
        block()(torch.zeros(3, L, D_V).double(), nested[1])
    try:
        padded = [torch.nested.to_padded_tensor(x, 0.0, (3, L, d)) for x, d in zip(nested, (D_V, D_A), strict=True)]
    except NotImplementedError:
        pytest.skip("this PyTorch cannot pad jagged tensors")
    given = nested[0].offsets().diff() if layout is torch.jagged else torch.tensor(lengths)
    y = block()(*padded, lengths=given)
    for b, n in enumerate(lengths):
        alone = [torch.nn.functional.pad(x[b], (0, 0, 0, L - n))[None] for x in pieces]
        torch.testing.assert_close(y[b], block()(*alone, lengths=torch.tensor([n]))[0])


def test_whole_window_counts():
    """A frame's output depends on the whole window, later frames too, so a live signal needs windows"""
    x = [piece[0][None].requires_grad_() for piece in sequences([L])]
    y = block()(*x)
    (y[:, 0]).sum().backward()
    assert all(tensor.grad.abs().sum(-1).gt(0).all() for tensor in x)


def test_live_signal():
    """A live signal by a sliding window: docs/block.md's loop gives the newest of each, and starts with `lengths`"""
    module, frames = block(), 3 * L
    visual, audio = (torch.randn(frames, d_m, dtype=torch.float64) for d_m in (D_V, D_A))
    window = [torch.zeros(1, L, d_m, dtype=torch.float64) for d_m in (D_V, D_A)]
    live = []
    for n, frame in enumerate(zip(visual, audio, strict=True)):
        for x, new in zip(window, frame, strict=True):
            if n >= L:
                x[:, :-1] = x[:, 1:].clone()
            x[:, min(n, L - 1)] = new
        lengths = torch.tensor([min(n + 1, L)])
        live.append(module(*window, lengths)[0, lengths[0] - 1])
    for n in range(frames):
        first = max(0, n + 1 - L)
        piece = [x[first : n + 1][None] for x in (visual, audio)]
        padded = [torch.nn.functional.pad(x, (0, 0, 0, L - x.shape[1])) for x in piece]
        expected = module(*padded, torch.tensor([n + 1 - first]))[0, n - first]
        torch.testing.assert_close(live[n], expected, rtol=0, atol=0)
