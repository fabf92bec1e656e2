"""The compiled library: whether it is there, and what it tells of tensors and problems."""

from __future__ import annotations

import functools
from dataclasses import astuple
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from grjca_kernels.problem import Problem

INTERFACE = 5
"""Of csrc/bindings.cpp: an editable install notices by it that its Python files have moved on."""

library: Any = None
missing: str | None = None
"""Why the library cannot be used, or None."""
try:
    import grjca_kernels._native as library
except ModuleNotFoundError:
    missing = "its native code was not built; install a C++17 compiler, and nvcc for GPUs, then this package again."
except ImportError as error:
    missing = f"its native code does not load ({error}); install this package again."
else:
    if getattr(library, "interface", 0) != INTERFACE:
        missing = "its native code is older than its Python files; install this package again."

_PLAIN = {Tensor, torch.nn.Parameter}
_exchanges = missing is None and library.use_tensors(Tensor, torch.nn.Parameter, True)
"""Whether torch shows tensors to C++ by DLPack's exchange API, as it does from 2.11 on."""
_shape, _dtype, _device, _layout = map(attrgetter, ("shape", "dtype", "device", "layout"))


def likeness(tensors: list[Tensor]) -> Any:
    """The dtype and device of all and the shape of each, equal only where these are; None unless all are plain tensors
    of one dtype and device, which have memory and sizes that are numbers."""
    if torch.compiler.is_compiling():
        return None
    if _exchanges:
        return library.likeness(tensors)
    if not _PLAIN.issuperset(map(type, tensors)):
        return None
    try:
        of_all = {*map(_dtype, tensors)}, {*map(_device, tensors)}, {*map(_layout, tensors)}
        key = (*(one for (one,) in of_all), *map(_shape, tensors))
        return None if key[1].type == "meta" or key[2] is not torch.strided else key
    except (RuntimeError, ValueError):  # a nested tensor has no shape; there are two of what should be one
        return None


@functools.lru_cache(maxsize=512)
def problem_of(problem: Problem, dtype: torch.dtype) -> Any:
    """The problem in the library's words."""
    return library.Problem(str(dtype).removeprefix("torch."), *astuple(problem))
