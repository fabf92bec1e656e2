"""The description of one call. The public functions check it once and hand it down unchanged.

A call with the same layout as an earlier legal one is recognised by a key, and is not checked again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import reduce, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from grjca_kernels import keeping
from grjca_kernels import problem as problems
from grjca_kernels.modes import autocast_dtype, undisturbed
from grjca_kernels.native import likeness
from grjca_kernels.problem import Gates, Layer, Linear, Problem

P = ParamSpec("P")
R = TypeVar("R")


class Call(NamedTuple):
    """The inputs and the destinations of a computation: everything that a backend's ``forward(call)`` receives.

    ``features`` are X_m [B, L, d_m] of any strides, ``parameters`` are in the order of :func:`problem.flatten`, and
    ``lengths`` [B] and ``seed`` [] are int64; with dropout there is always a seed. A forward fills ``outputs`` Y_m [B,
    L, d_m], ``iterates`` [T, B, L, d] and, unless empty, ``gates`` [B, L, ways]. A backward reads the iterates.
    ``likeness`` is that of the features and parameters, or None unless all of them are plain tensors.
    """

    problem: Problem
    features: Sequence[Tensor]
    parameters: Sequence[Tensor]
    lengths: Tensor | None = None
    seed: Tensor | None = None
    concat: bool = False
    return_gates: bool = False
    return_iterates: bool = False
    backend: str = "auto"
    likeness: Any = None
    keep: str = "auto"
    outputs: Sequence[Tensor] = ()
    iterates: Any = None
    gates: Sequence[Tensor] = ()
    kept: Tensor | None = None


class Gradients(NamedTuple):
    """The gradients that a backend's ``backward(call, gradients)`` reads and fills: one entry per modality, except in
    ``parameters``.

    The first three are inputs with the shapes of what the forward filled (iterates as [T, B, L, d_m]); None counts as
    zero. The backward fills those of ``features`` and ``parameters`` that are not None.
    """

    outputs: Sequence[Tensor | None]
    iterates: Sequence[Tensor | None]
    gates: Sequence[Tensor | None]
    features: Sequence[Tensor | None]
    parameters: Sequence[Tensor | None]


# ---- the public entry


def describe(
    features: Sequence[Tensor],
    layers: Sequence[Layer],
    gates: Gates = (),
    *,
    iterations: int | None = None,
    gating: str = "flat",
    form: str = "released",
    dropout: float = 0.0,
    temperature: float = 0.1,
    normalize: bool = False,
    joint: str = "projected",
    lengths: Tensor | None = None,
    seed: Tensor | int | None = None,
    concat: bool = False,
    return_gates: bool = False,
    return_iterates: bool = False,
    keep: str = "auto",
    backend: str = "auto",
) -> Call:
    """Check the arguments of :func:`grjca_kernels.gated_rjca`, cast them if autocast is on, and describe the call.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was passed.
    """
    options = (
        iterations,
        gating,
        form,
        dropout,
        temperature,
        normalize,
        joint,
        concat,
        return_gates,
        return_iterates,
        keep,
    )

    def check() -> Problem:
        problems.check_structure(features, layers, gates)
        problems.check_options(concat=concat, return_gates=return_gates, return_iterates=return_iterates)
        problems.check_choice("keep", keep, keeping.CHOICES)
        return problems.check(features, layers, gates, parameters, options[:7], reduced)

    walk = _walk(features, layers, gates)
    if walk is None:
        problems.check_structure(features, layers, gates)
    parameters, nesting = walk or (problems.flatten(layers, gates), None)
    features, parameters, reduced = _autocast(features, parameters)
    alike = nesting and likeness([*features, *parameters])
    problem = once(alike and (alike, nesting, reduced, options, tuple(map(type, options))), check)  # 1 == True == 1.0
    if lengths is not None:
        problems.check_lengths(lengths, problem.batch, features[0])
        if type(lengths) is Tensor and undisturbed((lengths,)):
            lengths = known_lengths(problem, lengths)
        else:
            alike = None  # PyTorch gives the operator the tensor behind this one, so the call must go through it
    if isinstance(seed, Tensor) and not (type(seed) is Tensor and undisturbed((seed,))):
        alike = None
    seed = _drawn_seed(problem, seed, features[0]) if seed is not None or problem.dropout else None
    return Call(problem, features, parameters, lengths, seed, *options[7:10], backend, alike, keep)


def answers(describe: Callable[P, Call]) -> Callable[[Callable[[Call], Any]], Callable[P, Any]]:
    """Turn ``answer(call)`` into a function with the arguments of ``describe``."""

    def decorate(answer: Callable[[Call], Any]) -> Callable[P, Any]:
        @wraps(answer)
        def described(*arguments: P.args, **options: P.kwargs) -> Any:
            return answer(describe(*arguments, **options))

        described.__annotations__ = {**describe.__annotations__, "return": "Any"}
        described.__signature__ = inspect.signature(describe).replace(return_annotation="Any")  # type: ignore[attr-defined]
        return described

    return decorate


def flat_problem(features: Sequence[Tensor], parameters: Sequence[Tensor], settings: Sequence[Any]) -> Problem:
    """Check an operator's call, whose parameters are one list; ``settings`` are those of :class:`Problem`."""
    alike = likeness([*features, *parameters])
    key = alike and (alike, len(features), tuple(settings), tuple(map(type, settings)))
    return once(key, lambda: problems.check_flat(features, parameters, settings))


# ---- tensors of a call


def _autocast(features: Sequence[Tensor], parameters: list[Any]) -> tuple[Sequence[Tensor], list[Any], bool]:
    """Cast features and parameters to the dtype of the features if autocast is on.

    The last value returned is whether that dtype is float32, whose products may then be as coarse as those of
    autocast's dtype. Residuals and outputs thus keep the dtype of the features, as with torch's operators. float64 is
    left alone.
    """
    if autocast_dtype(features[0].device.type) is None:
        return features, parameters, False
    tensors = [x for x in (*features, *parameters) if isinstance(x, Tensor)]
    if any(x.dtype == torch.float64 for x in tensors):
        return features, parameters, False
    dtype = reduce(torch.promote_types, [x.dtype for x in features if isinstance(x, Tensor)])

    def cast(given: Any) -> Any:
        return given.to(dtype) if isinstance(given, Tensor) else given

    if any(x.dtype != dtype for x in tensors):
        features, parameters = [cast(x) for x in features], [cast(x) for x in parameters]
    return features, parameters, dtype == torch.float32


def known_lengths(problem: Problem, lengths: Tensor) -> Tensor:
    """Return the lengths as contiguous int64. On the CPU this is a checked copy, so that later changes cannot affect
    it."""
    on_cpu = lengths.device.type == "cpu"
    if on_cpu and problem.batch and not lengths.data_ptr():
        problems.refuse_memory("lengths", 0, lengths)  # the copy itself would crash
    lengths = lengths.to(torch.int64, copy=on_cpu).contiguous()
    if on_cpu:
        problems.check_lengths_values(lengths, problem.length)
    return lengths


def _drawn_seed(problem: Problem, seed: Tensor | int | None, like: Tensor) -> Tensor | None:
    """Return the seed as one int64 on the device of ``like``, or None without dropout.

    If ``seed`` is None, PyTorch's generator draws it.
    """
    if seed is not None:
        problems.check_seed(seed, like)
    if problem.dropout == 0:
        return None
    if isinstance(seed, Tensor):
        return seed.reshape(())
    if seed is not None:
        word = seed & (2**64 - 1)
        return torch.full((), word - 2**64 if word >= 2**63 else word, dtype=torch.int64, device=like.device)
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=like.device)


# ---- recognising calls

MOST_REMEMBERED = 512
_legal: dict[Any, Any] = {}


def once(key: Any, check: Callable[[], R]) -> R:
    """Return the cached result of ``check`` for ``key``, or run it; without a key (None) always run it.

    The key must hold everything that ``check`` looks at.
    """
    try:
        if key and key in _legal:
            return _legal[key]
    except TypeError:  # an option that is not hashable
        key = None
    found = check()
    if key:
        if len(_legal) >= MOST_REMEMBERED:
            _legal.clear()
        _legal[key] = found
    return found


class Layers(tuple[Layer, ...]):
    """A tuple of layers that caches its own traversal, for callers that pass the same layers repeatedly."""

    walk: tuple[Gates, Any] | None = None


def _walk(features: Any, layers: Any, gates: Any) -> tuple[list[Tensor], Any] | None:
    """Return the parameters as one list, and the nesting as far as a check looks at it.

    The result is None while tracing, and for unusual structures that need a full check.
    """
    if torch.compiler.is_compiling() or type(features) not in (list, tuple):
        return None
    if not features or not isinstance(features[0], Tensor):
        return None
    if type(layers) is Layers and layers.walk and layers.walk[0] is gates:
        return layers.walk[1]
    try:
        linears = problems.every_linear(layers, gates)
        nesting = [len(features), type(layers), type(gates)]
        for query, *groups in layers:
            nesting += (query is None, *((type(group), len(group)) for group in groups))
        nesting += ((type(group), len(group)) for group in gates)
        if not {Layer, Linear, tuple}.issuperset(map(type, (*layers, *linears))) or {*map(len, linears)} != {2}:
            return None
    except (TypeError, ValueError):  # something is not a tuple that should be one
        return None
    walk = [x for linear in linears for x in linear if x is not None], tuple(nesting)
    if type(layers) is Layers and type(gates) is tuple:
        layers.walk = gates, walk
    return walk
