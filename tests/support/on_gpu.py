"""Helpers of the tests on a GPU: tensors there and back, the rule by the GPU's own yardsticks, graphs and profiles.

**The rule on a GPU.** Tensors are made on the CPU, copied, and the results are copied back, so that truth and yardstick
are those of the other backends: the reference in float64, and what it computes on the CPU in the dtype. That is
stricter than a GPU's own eager, whose products may be summed in pieces that are rounded to 16 bits. Two exceptions:

*Full sizes* take truth and yardstick from PyTorch on the GPU, in float64 and in the dtype, for the sake of time.

*TF32* is a dtype of its own, with an ulp of 2^-10, that exists only in the operands of products. Its yardstick is the
reference in float32 in which every operand of a product is cut to the 10 bits that the tensor cores read, on inputs
perturbed by half an ulp of TF32. cuBLAS under the same setting would not do: for small or odd matrices it may take
kernels that do not use TF32, and then has the error of float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cases import Case, Inputs, Result, make, run
from grjca_kernels import reference, verification
from tolerances import DRAWS, check_draws, joined, largest, length

DEVICE = torch.device("cuda")
TF32_ULP = 2.0**-10

# ---- moving


def copied_to(value: Any, device: torch.device) -> Any:
    """Whatever a call takes or returns, with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: copied_to(of_name, device) for name, of_name in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(copied_to(part, device) for part in value))
    if isinstance(value, list | tuple):
        return type(value)(copied_to(part, device) for part in value)
    return value


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, a gated_rjca, for tensors of the CPU."""

    def there_and_back(*arguments: Any, **options: Any) -> Any:
        return copied_to(function(*copied_to(arguments, DEVICE), **copied_to(options, DEVICE)), torch.device("cpu"))

    return there_and_back


def to_device(inputs: Inputs) -> Inputs:
    """Leaves on the device."""
    there = inputs.map(lambda x: x.detach().to(DEVICE).requires_grad_())
    return replace(there, lengths=copied_to(inputs.lengths, DEVICE))


# ---- the rule


def check(
    result: Result, truth: Result, draws: tuple[Result, ...], ulp: float | None = None, gradients: bool = True
) -> None:
    """The rule, by a truth and a yardstick of one's own."""
    for name, value in truth.values.items():
        check_draws(name, result.values[name], value, [draw.values[name] for draw in draws], largest, ulp)
    if gradients:
        of_ours, of_draws = joined(result.gradients), [joined(draw.gradients) for draw in draws]
        ulp = torch.finfo(result.values["Y[0]"].dtype).eps if ulp is None else ulp
        for kind, vector in joined(truth.gradients).items():
            check_draws(f"d {kind}", of_ours[kind], vector, [draw[kind] for draw in of_draws], length, ulp)


class CutOperands(verification.CutOperands):
    """Counts them, too."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def cut(self, x):
        self.count += 1
        return super().cut(x)


def draw(inputs: Inputs, seed: int, ulp: float) -> Inputs:
    """Inputs perturbed by half an ulp, up or down; by none for the first draw."""
    generator = torch.Generator().manual_seed(seed)

    def move(x: Tensor) -> Tensor:
        signs = torch.randint(2, x.shape, generator=generator) * 2 - 1
        return (x.double() * (1 + signs * ulp / 2)).to(x.dtype)

    return inputs.map(move) if seed else inputs


@lru_cache(maxsize=64)
def cut_draws(case: Case) -> tuple[Result, ...]:
    """The yardstick of TF32."""
    inputs, draws = make(case, torch.float32), []
    for seed in range(DRAWS):
        with CutOperands() as mode:
            draws.append(run(reference.gated_rjca, case, draw(inputs, seed, TF32_ULP)))
        assert mode.count >= 18 * case.iterations or not case.batch, "products that this does not see"
    return tuple(draws)


@lru_cache(maxsize=1)
def large(case: Case, dtype: torch.dtype) -> tuple[Result, tuple[Result, ...]]:
    """Truth and yardstick on the device; eager sums in float32, as the contract asks, while it makes the yardstick."""
    inputs, theirs = make(case, dtype), on_device(reference.gated_rjca)
    settings, ulp = torch.backends.cuda.matmul, torch.finfo(dtype).eps
    settings.allow_bf16_reduced_precision_reduction = settings.allow_fp16_reduced_precision_reduction = False
    draws = tuple(run(theirs, case, draw(inputs, seed, ulp)) for seed in range(DRAWS))
    settings.allow_bf16_reduced_precision_reduction = settings.allow_fp16_reduced_precision_reduction = True
    return run(theirs, case, inputs.to(torch.float64), rounded=dtype), draws


# ---- what ran


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def kernels_of(call: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """Return the names of the kernels that ran on the GPU, without those that clear memory."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        result = call()
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return result, Counter(name for name in on_gpu if not name.startswith("Memset"))
