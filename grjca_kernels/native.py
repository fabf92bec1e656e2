"""The compiled library: whether it can be used, and what it says about tensors and problems."""

from __future__ import annotations

import functools
from dataclasses import astuple
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from grjca_kernels.problem import Problem

INTERFACE = 5
"""The interface version in csrc/bindings.cpp; it shows when an editable install's library is older than its Python
files."""

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
"""Whether torch shows tensors to C++ through DLPack's exchange API, as it does since 2.11."""
_shape, _dtype, _device, _layout = map(attrgetter, ("shape", "dtype", "device", "layout"))


def likeness(tensors: list[Tensor]) -> Any:
    """Return a key of the common dtype and device and of every shape, so that equal keys mean equal layouts.

    The result is None unless all are plain tensors with memory, one dtype, one device and sizes that are numbers.
    """
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
    except (RuntimeError, ValueError):  # a nested tensor has no shape; dtypes, devices or layouts differ
        return None


@functools.lru_cache(maxsize=512)
def problem_of(problem: Problem, dtype: torch.dtype) -> Any:
    """Return the library's description of ``problem``."""
    return library.Problem(str(dtype).removeprefix("torch."), *astuple(problem))
