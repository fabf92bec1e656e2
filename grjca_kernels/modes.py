"""PyTorch's state around a call: TF32, autocast, and the modes and transforms that must see every operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack as _function_modes
from torch.utils._device import DeviceContext

F = TypeVar("F", bound=Callable[..., object])


def constant_when_compiled(function: F) -> F:
    """Make torch.compile call ``function`` once and treat its result as a constant.

    This keeps it from tracing how devices and the environment are looked up. It does the same as
    torch.compiler.assume_constant_result, but without the 1.5 seconds that importing the compiler takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def allows_tf32() -> bool:
    """Return whether PyTorch's settings let float32 products of CUDA tensors use TF32."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.backends.cuda.matmul.allow_tf32 if precision is None else precision == "tf32"


_AUTOCAST = {name for name in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(name)}


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return autocast's dtype for this device type, or None if autocast is off or not available."""
    if device not in _AUTOCAST or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def undisturbed(tensors: Iterable[Tensor], parameters: Iterable[Tensor] = ()) -> bool:
    """Return whether kernels may read the memory of plain tensors without asking PyTorch.

    Dispatch modes (FakeTensorMode, FlopCounterMode, tracing), function modes other than a default device, torch.func,
    forward-mode derivatives and the compiler must see operators. Lazily negated tensors and lazy zeros do not have
    their values in memory.
    """
    return not (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or (torch._C._len_torch_function_stack() and any(type(mode) is not DeviceContext for mode in _function_modes()))
        or torch._C._are_functorch_transforms_active()
        or any(map(Tensor.is_neg, chain(tensors, parameters)))
        or any(map(Tensor._is_zerotensor, tensors))
    )
