"""The execution of a checked call: allocate what a backend fills, and pass it to the backend's functions.

Both the operators of ops.py and the direct path around them come here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grjca_kernels import keeping, memory
from grjca_kernels.backends import TABLE
from grjca_kernels.call import Call, Gradients
from grjca_kernels.problem import Problem


class Wanted(NamedTuple):
    """Everything about a call except its tensors.

    ``directly`` says that nothing stands between the call and the memory of its tensors.
    """

    problem: Problem
    concat: bool
    return_gates: bool
    backend: str
    likeness: Any = None  # that of the features and parameters when they were checked
    directly: bool = False


def kept_pieces(problem: Problem, keep: str, backend: str, dtype: torch.dtype, directly: bool) -> int:
    """Return the bits that ``keep`` means to a backend."""
    held = TABLE[backend].held
    if held is not None and directly:
        return keeping.choose_once(problem, keep, dtype, held(dtype))
    if held is not None:  # the batch may be a symbol
        return keeping.choose(replace(problem, batch=0), keep, dtype, held(dtype))
    if keep == "most":
        raise ValueError(
            f"keep: expected 'auto' or 'least' with backend {backend!r}, which keeps X^t alone, got 'most'."
        )
    return 0


def result_shapes(problem: Problem, concat: bool, return_gates: bool) -> list[tuple[int, ...]]:
    """Return the shapes of the outputs, the iterates and the gate values."""
    frames, width = (problem.batch, problem.length), problem.width
    ways = sum(problem.gate_ways) if return_gates else 0
    shapes = [(*frames, d_m) for d_m in ((width,) if concat else problem.widths)]
    return [*shapes, (problem.iterations, *frames, width), *[(*frames, ways)] * (len(problem.widths) if ways else 0)]


def new_results(wanted: Wanted, like: Tensor) -> list[Tensor]:
    problem = wanted.problem
    results = [like.new_empty(shape) for shape in result_shapes(problem, wanted.concat, wanted.return_gates)]
    if problem.keep:
        held = TABLE[wanted.backend].held
        if held is None:
            raise ValueError(f"keep: backend {wanted.backend!r} keeps X^t alone, got {problem.keep} instead of 0.")
        size = keeping.kept_bytes(problem, held(like.dtype))
        results.append(memory.take(size) if wanted.directly else like.new_empty(size, dtype=torch.uint8))
    return results


def new_gradients(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Any]:
    """Return a new contiguous tensor for every feature and parameter whose gradient is needed, and None for the
    others."""
    new = torch.empty_like if all(map(Tensor.is_contiguous, tensors)) else _new_contiguous
    return [new(tensor) if wanted else None for tensor, wanted in zip(tensors, needed, strict=True)]


_new_contiguous = partial(torch.empty_like, memory_format=torch.contiguous_format)


def _parts(problem: Problem, results: Sequence[Any], concat: bool) -> tuple[list[Any], Any, list[Any]]:
    """Return the outputs per modality (views of the concatenation), the iterates, and the gates.

    An absent gradient stays None.
    """
    none, count = [None] * len(problem.widths), 1 if concat else len(problem.widths)
    outputs = list(results[:count])
    if concat:
        outputs = none if outputs[0] is None else list(outputs[0].split(problem.widths, dim=-1))
    gates = list(results[count + 1 :])
    return outputs, results[count], gates[:-1] if problem.keep else gates


def _compute(name: str, wanted: Wanted, row: Any, *given: Any) -> None:
    """Run a backend's function; in profiles the direct path gets ``name``, which operators show anyway."""
    profiled = wanted.directly and torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    with torch.profiler.record_function(name) if profiled else nullcontext():
        row(*given)


def forward_now(
    wanted: Wanted,
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    lengths: Tensor | None,
    seed: Tensor | None,
) -> list[Tensor]:
    """Return the results of a checked call."""
    problem = wanted.problem
    results = new_results(wanted, features[0])
    outputs, iterates, gates = _parts(problem, results, wanted.concat)
    kept = results[-1] if problem.keep else None
    call = Call(
        problem, features, parameters, lengths, seed, outputs=outputs, iterates=iterates, gates=gates, kept=kept
    )
    if problem.batch:
        _compute("grjca::forward", wanted, TABLE[wanted.backend].forward, call)
    return results


def backward_now(
    wanted: Wanted,
    grads: Sequence[Tensor | None],
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    lengths: Tensor | None,
    seed: Tensor | None,
    iterates: Tensor,
    needed: Sequence[bool],
    kept: Tensor | None,
) -> list[Any]:
    """Return the gradient of every feature and parameter, or None where it is not needed."""
    problem, count = wanted.problem, len(features)
    none: list[None] = [None] * count
    of_outputs, of_iterates, of_gates = _parts(problem, grads, wanted.concat)
    of_iterates = none if of_iterates is None else of_iterates.split(problem.widths, dim=-1)
    computed = new_gradients((*features, *parameters), needed)
    gradients = Gradients(of_outputs, of_iterates, of_gates or none, computed[:count], computed[count:])
    if problem.batch:
        # Hooks on saved tensors, and Inductor, may have changed their layout.
        if kept is not None and (not kept.is_contiguous() or kept.data_ptr() % keeping.LINE):
            kept = kept.clone(memory_format=torch.contiguous_format)
        call = Call(problem, features, parameters, lengths, seed, iterates=iterates.contiguous(), kept=kept)
        _compute("grjca::backward", wanted, TABLE[wanted.backend].backward, call, gradients)
    else:
        for gradient in gradients.parameters:
            if gradient is not None:
                gradient.zero_()
    return computed


def check_incoming(wanted: Wanted, grads: Sequence[Tensor | None], iterates: Tensor, like: Tensor) -> None:
    """Refuse gradients and iterates that do not match the results."""
    shapes = result_shapes(wanted.problem, wanted.concat, wanted.return_gates)
    count = len(shapes) + bool(wanted.problem.keep)  # the saved activations come last and have no gradient
    if len(grads) != count:
        raise ValueError(f"grads: expected {count} of them or None, one for each result, got {len(grads)}.")
    named = [(f"grads[{i}]", grad, shape) for i, (grad, shape) in enumerate(zip(grads, shapes, strict=False))]
    named.append(("iterates", iterates, shapes[1 if wanted.concat else len(wanted.problem.widths)]))
    for name, x, shape in named:
        if x is not None and (x.shape != shape or x.dtype != like.dtype or x.device != like.device):
            raise ValueError(
                f"{name}: expected {list(shape)} of {like.dtype} on {like.device}, as the features have it, got "
                f"{list(x.shape)} of {x.dtype} on {x.device}."
            )
