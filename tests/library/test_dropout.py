"""The mask, against its definition in plain integers and against what randomness owes."""

import itertools
import math

import pytest
import torch
from pytest import mark

from cases import SEED
from grjca_kernels import dropout

HALF, FULL = 16, 32


def philox4x32(counter: tuple[int, ...], key: tuple[int, int], rounds: int) -> tuple[int, ...]:
    """Salmon et al., SC 2011, section 4.3."""
    low = 2**FULL - 1
    for _ in range(rounds):
        product0, product1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = (
            (product1 >> FULL) ^ counter[1] ^ key[0],
            product1 & low,
            (product0 >> FULL) ^ counter[3] ^ key[1],
            product0 & low,
        )
        key = ((key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low)
    return counter


# Published with Random123, for seven rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


def signed(key: tuple[int, int]) -> torch.Tensor:
    word = key[0] | key[1] << FULL
    return torch.tensor(word - 2**64 if word >= 2**63 else word)


@mark.parametrize("counter, key, expected", KNOWN)
def test_known_answers(counter, key, expected):
    assert philox4x32(counter, key, 7) == expected
    words = dropout.philox(tuple(torch.tensor(word) for word in counter), signed(key))
    assert tuple(int(word) for word in words) == expected


def test_random_answers():
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(2**FULL, (4, 50), generator=generator)
    for key in [(1, 2), (2**FULL - 1, 7), (3, 2**31)]:
        words = torch.stack(dropout.philox(tuple(counters), signed(key)))
        expected = [philox4x32(tuple(column.tolist()), key, dropout.ROUNDS) for column in counters.T]
        assert words.T.tolist() == [list(words) for words in expected]


@mark.parametrize("iteration, modality, site", [(0, 0, 0), (7, 3, 1), (1, 2, 0)])
@mark.parametrize("p", [0.25, 0.6])
def test_definition(iteration, modality, site, p):
    """Rows beyond the first group of eight, columns beyond any vector, several samples."""
    seed, (samples, rows, columns) = torch.tensor(SEED), (2, 19, 35)
    mask = dropout.keep_mask(seed, p, iteration=iteration, modality=modality, site=site, shape=(samples, rows, columns))
    key = (SEED & 0xFFFFFFFF, SEED >> FULL & 0xFFFFFFFF)
    for b, r, c in itertools.product(range(samples), range(rows), range(columns)):
        word = philox4x32((c, r // 8, b, iteration | modality << 8 | site << 16), key, 7)[r % 8 // 2]
        draw = word >> HALF if r % 2 else word & 0xFFFF
        assert bool(mask[b, r, c]) == (draw >= math.floor(p * 65536 + 0.5))


def keep(p: float = 0.5, seed: int = SEED, iteration=0, modality=0, site=0, shape=(4, 64, 512)) -> torch.Tensor:
    return dropout.keep_mask(torch.tensor(seed), p, iteration=iteration, modality=modality, site=site, shape=shape)


@mark.parametrize("p", [0.01, 0.3, 0.5, 0.6, 0.9, 0.999])
def test_rate(p):
    mask = keep(p)
    deviation = math.sqrt(p * (1 - p) / mask.numel())
    assert abs(1 - float(mask.double().mean()) - p) < 5 * deviation + 2**-17  # p is taken in steps of 2^-16


def test_extremes():
    assert keep(0.0).all()
    assert keep(2**-18).all()
    assert dropout.threshold(1 - 1e-9) == 65535
    assert keep(1 - 1e-9, shape=(64, 64, 512)).any()


PAIRS = {
    "sites": (keep(), keep(site=1)),
    "iterations": (keep(), keep(iteration=1)),
    "modalities": (keep(), keep(modality=1)),
    "seeds": (keep(), keep(seed=SEED + 1)),
    "high words of seeds": (keep(), keep(seed=SEED ^ 1 << 40)),
    "samples": (keep()[1:], keep()[:-1]),
    "rows": (keep()[:, 1:], keep()[:, :-1]),
    "rows of neighbouring groups": (keep()[:, 8:], keep()[:, :-8]),
    "columns": (keep()[..., 1:], keep()[..., :-1]),
    "iteration and modality": (keep(iteration=1), keep(modality=1)),
    "rows and columns": (keep(shape=(2, 64, 64)), keep(shape=(2, 64, 64)).mT),
}


@mark.parametrize("a, b", PAIRS.values(), ids=PAIRS)
def test_independence(a, b):
    """Two independent masks agree in half of their places."""
    agreement = float((a == b).double().mean())
    assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(a.numel()), agreement


def test_a_larger_mask_begins_with_the_smaller():
    """An element's fate depends on its place alone: padding and batching change nothing."""
    assert torch.equal(keep(shape=(4, 64, 512))[:2, :13, :7], keep(shape=(2, 13, 7)))


@mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scale(dtype):
    mask = keep(0.6)
    scaled = dropout.scaled_mask(
        torch.tensor(SEED), 0.6, iteration=0, modality=0, site=0, shape=(4, 64, 512), dtype=dtype
    )
    assert scaled.dtype == dtype
    assert torch.equal(scaled != 0, mask)
    kept = scaled[mask]
    assert (kept == kept[0]).all()
    assert float(kept[0]) == pytest.approx(2.5, rel=torch.finfo(dtype).eps)
