"""Comparisons that several tests make, and the ways in which a tensor can lie in memory."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cases import Inputs, Result

NAN = float("nan")
SENTENCE = re.compile(r"(?P<name>[\w.\[\]]+): expected .+ got .+\.", re.DOTALL)

LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "part of a cat": lambda x: torch.cat([x + NAN, x, x + NAN], dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every second column": lambda x: torch.stack([x, x + NAN], dim=-1).flatten(-2)[..., ::2],
    "every second frame": lambda x: torch.stack([x, x + NAN], dim=-2).flatten(-3, -2)[..., ::2, :],
    "batch last": lambda x: x.movedim(-3, -1).contiguous().movedim(-1, -3),
    "one sample for all": lambda x: x[..., :1, :, :].expand_as(x),
    "one frame for all": lambda x: x[..., :1, :].expand_as(x),
    "one column for all": lambda x: x[..., :1].expand_as(x),
    "one number for all": lambda x: x[..., :1, :1, :1].expand_as(x),
}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit; a NaN is a NaN."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(
            value, b[name], rtol=0, atol=0, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_same_results(a: Result, b: Result) -> None:
    assert_same(a.values, b.values)
    assert_same(a.gradients, b.gradients)


def backward(values: dict[str, Tensor], inputs: Inputs, incoming: list[Tensor]) -> list[Tensor]:
    return list(
        torch.autograd.grad([*values.values()], inputs.features + inputs.parameters, incoming, retain_graph=True)
    )


def refused(error: type[Exception], name: str, call: Callable[[], object], *parts: str) -> None:
    """``call()`` raises ``error`` with a sentence about the argument ``name`` that contains ``parts``."""
    with pytest.raises(error) as caught:
        call()
    sentence = SENTENCE.match(str(caught.value))
    assert sentence, f"not a sentence about an argument: {caught.value}"
    assert sentence["name"] == name
    for part in parts:
        assert part in str(caught.value)
