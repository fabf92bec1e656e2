"""The operators ``grjca::forward`` and ``grjca::backward``: schema, checks, differentiation, FLOPs.

Both are functional and independent of the backend: its name is an argument, and its row in backends.py does the work,
so a new backend registers nothing. In plain eager mode no operator is needed, and :func:`run` calls the functions of
execution.py directly, as the operator does.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import flop_registry, shape_wrapper

from grjca_kernels import flops, keeping
from grjca_kernels.backends import TABLE
from grjca_kernels.call import Call, flat_problem, known_lengths, once
from grjca_kernels.execution import (
    Wanted,
    backward_now,
    check_incoming,
    forward_now,
    kept_pieces,
    new_gradients,
    new_results,
)
from grjca_kernels.modes import undisturbed
from grjca_kernels.native import likeness
from grjca_kernels.problem import Problem, check_choice, check_lengths, check_seed

_SETTINGS = [field for field in fields(Problem)[3:] if field.default is MISSING]
_LATER = fields(Problem)[3 + len(_SETTINGS) :]  # added after programs had been exported
_OPTIONS = ", ".join(
    [f"{field.type} {field.name}" for field in _SETTINGS]
    + ["bool concat, bool return_gates, str backend"]
    + [f"{field.type} {field.name}={field.default!r}" for field in _LATER]
)
_library = torch.library.Library("grjca", "DEF")
_library.define(
    f"forward(Tensor[] features, Tensor[] parameters, Tensor? lengths, Tensor? seed, {_OPTIONS}) -> Tensor[]"
)
_library.define(
    "backward(Tensor?[] grads, Tensor[] features, Tensor[] parameters, Tensor? lengths, Tensor? seed, Tensor iterates, "
    f"bool[] needed, {_OPTIONS}, Tensor? kept=None) -> Tensor[]"
)


def _options(wanted: Wanted) -> tuple[Any, ...]:
    """Return the options in the order in which the operators take them."""
    settings, later = wanted.problem.settings[: len(_SETTINGS)], wanted.problem.settings[len(_SETTINGS) :]
    return (*settings, wanted.concat, wanted.return_gates, wanted.backend, *later)


def run(call: Call, backend: str) -> tuple[list[Tensor], list[Any], list[Any]]:
    """Return the outputs (one if ``concat``), and, if the call wants them, iterates and gate values per modality."""
    problem, count = call.problem, 1 if call.concat else len(call.features)
    directly = call.likeness is not None and undisturbed(call.features, call.parameters)
    tensors = (*call.features, *call.parameters)
    differentiable = _differentiable(tensors)
    if differentiable and not _exporting():
        pieces = kept_pieces(problem, call.keep, backend, call.features[0].dtype, directly)
        problem = replace(problem, keep=pieces)
    wanted = Wanted(problem, call.concat, call.return_gates, backend, call.likeness, directly)
    if directly:
        if differentiable:
            results = _apply(wanted, call.lengths, call.seed, *tensors)
        else:
            results = forward_now(wanted, *call[1:5])
    elif torch.compiler.is_compiling():  # traced as one operator, whose own gradient is GatedRJCA
        results = torch.ops.grjca.forward(
            list(call.features), list(call.parameters), call.lengths, call.seed, *_options(wanted)
        )
    else:
        _check_plain(tensors)
        results = GatedRJCA.apply(wanted, call.lengths, call.seed, *tensors)
    iterates: list[Any] = []
    values: list[Any] = [None] * len(call.features)
    if call.return_iterates:
        iterates = list(results[count].split(problem.widths, dim=-1))
    if call.return_gates and problem.gate_ways:
        values = list(results[count + 1 :][: len(problem.widths)])
        if problem.gating == "hierarchical":
            values = [value.split(problem.gate_ways, dim=-1) for value in values]
    return list(results[:count]), iterates, values


_exporting = getattr(torch.compiler, "is_exporting", bool)
"""Whether a program without gradients is being exported; older versions of PyTorch lack the function, and bool() is
False."""


def _check_plain(tensors: Sequence[Tensor]) -> None:
    """Refuse tensors without memory of their own, such as sharded or quantised ones."""
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            raise TypeError(
                f"gated_rjca: expected plain tensors, got a {type(tensor).__name__} of shape {list(tensor.shape)}. The "
                "kernels read memory: make a plain tensor of it, use backend='reference', or, with FSDP2, apply "
                "fully_shard to the whole block and not to its projections."
            )


def _differentiable(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


# ---- the operators


def _split(options: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Split the options into the settings of Problem, and concat, return_gates and backend.

    PyTorch omits options that have their default value.
    """
    first, rest, later = options[: len(_SETTINGS)], options[len(_SETTINGS) :][:3], options[len(_SETTINGS) + 3 :]
    return (*first, *later, *(field.default for field in _LATER[len(later) :])), rest


def _checked(
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    lengths: Tensor | None,
    seed: Tensor | None,
    options: tuple[Any, ...],
) -> Wanted:
    """Check a raw call as strictly as the public function does, because kernels receive addresses."""
    settings, (concat, return_gates, backend) = _split(options)
    check_choice("backend", backend, [name for name, row in TABLE.items() if row.forward is not None])
    problem = flat_problem(features, parameters, settings)
    if problem.keep & ~(pieces := keeping.all_pieces(problem)):
        raise ValueError(f"keep: expected bits of {pieces}, got {problem.keep}.")
    if lengths is not None:
        check_lengths(lengths, problem.batch, features[0])
    if seed is not None:
        check_seed(seed, features[0])
    return Wanted(problem, concat, return_gates, backend)


def _real(wanted: Wanted, like: Tensor, lengths: Tensor | None, seed: Tensor | None) -> Any:
    """Check that the backend can run, and the values of the lengths.

    Return lengths and seed; a missing seed becomes 0 if dropout needs one.
    """
    reason = TABLE[wanted.backend].refuses(like.device.type, like.dtype)
    if reason is not None:
        raise RuntimeError(f"backend {wanted.backend!r} cannot run: {reason}")
    if seed is None and wanted.problem.dropout:
        seed = like.new_zeros((), dtype=torch.int64)
    return None if lengths is None else known_lengths(wanted.problem, lengths), seed


@torch.library.register_fake("grjca::forward", lib=_library)
def _forward_fake(features, parameters, lengths, seed, *options):
    return new_results(_checked(features, parameters, lengths, seed, options), features[0])


def _forward(features, parameters, lengths, seed, *options):
    wanted = _checked(features, parameters, lengths, seed, options)
    return forward_now(wanted, features, parameters, *_real(wanted, features[0], lengths, seed))


def _all_options(options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the options with the defaults that PyTorch omitted."""
    missing = len(_SETTINGS) + 3 + len(_LATER) - len(options)
    return (*options, *(field.default for field in _LATER[len(_LATER) - missing :]))


def _without_kept(options: tuple[Any, ...]) -> tuple[tuple[Any, ...], Tensor | None]:
    """Return the options of a backward, and the saved activations, which follow them."""
    count = len(_SETTINGS) + 3 + len(_LATER)
    return options[:count], options[count] if len(options) > count else None


def _checked_backward(grads, features, parameters, lengths, seed, iterates, needed, options) -> Wanted:
    wanted = _checked(features, parameters, lengths, seed, options)
    if len(needed) != len(features) + len(parameters):
        raise ValueError(f"needed: expected one for each of the features and parameters, got {len(needed)}.")
    check_incoming(wanted, grads, iterates, features[0])
    return wanted


@torch.library.register_fake("grjca::backward", lib=_library)
def _backward_fake(grads, features, parameters, lengths, seed, iterates, needed, *options):
    options, _ = _without_kept(options)
    _checked_backward(grads, features, parameters, lengths, seed, iterates, needed, options)
    return [gradient for gradient in new_gradients((*features, *parameters), needed) if gradient is not None]


def _backward(grads, features, parameters, lengths, seed, iterates, needed, *options):
    options, kept = _without_kept(options)
    wanted = _checked_backward(grads, features, parameters, lengths, seed, iterates, needed, options)
    # PyTorch materialises lazy negations and zeros for operators, but not in lists with None.
    grads = [grad.clone() if grad is not None and (grad.is_neg() or grad._is_zerotensor()) else grad for grad in grads]
    lengths, seed = _real(wanted, features[0], lengths, seed)
    gradients = backward_now(wanted, grads, features, parameters, lengths, seed, iterates, needed, kept)
    return [gradient for gradient in gradients if gradient is not None]


for _device in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _device)
    _library.impl("backward", _backward, _device)


# ---- differentiation

_WAY_OUT = "backend='reference' has it, for PyTorch differentiates that any number of times, in any way."


class _OnceDifferentiable(torch.autograd.Function):
    """Base class that refuses vmap and forward-mode derivatives with a clear message."""

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(
            "gated_rjca: the kernels have no vmap. Make the mapped dimension part of the batch, or use "
            "backend='reference'."
        )

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(f"gated_rjca: the kernels have no forward-mode derivative. {_WAY_OUT}")


class GatedRJCA(_OnceDifferentiable):
    """The forward, with the backward as its gradient. It saves the arguments, the iterates and the kept activations."""

    @staticmethod
    def forward(wanted, lengths, seed, *tensors):
        count = len(wanted.problem.widths)
        features, parameters = tensors[:count], tensors[count:]
        if wanted.directly:
            return tuple(forward_now(wanted, features, parameters, lengths, seed))
        return tuple(torch.ops.grjca.forward(features, parameters, lengths, seed, *_options(wanted)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.wanted, lengths, seed, *tensors = inputs
        iterates = output[1 if ctx.wanted.concat else len(ctx.wanted.problem.widths)]
        kept = output[-1] if ctx.wanted.problem.keep else None
        if kept is not None:
            ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(lengths, seed, iterates, kept, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        needed, wanted, count = ctx.needs_input_grad[3:], ctx.wanted, len(ctx.wanted.problem.widths)
        given = [grad for grad in grads if grad is not None]
        if not any(needed) or not given:
            return (None,) * (3 + len(needed))
        lengths, seed, iterates, kept, *tensors = ctx.saved_tensors
        features, parameters = tensors[:count], tensors[count:]
        # A parameter's data may have been replaced since, and hooks on saved tensors may have returned others.
        as_checked = wanted.likeness is not None and likeness(tensors) == wanted.likeness
        plain = undisturbed((*given, iterates, *features), parameters)
        fit = likeness([*given, iterates, features[0]]) if plain else None
        if torch.is_grad_enabled() or not as_checked or fit is None:
            arguments = (len(grads), count), lengths, seed, iterates, list(needed), _options(wanted), kept
            found = iter(GatedRJCAGradient.apply(*arguments, *grads, *tensors))
            return (None, None, None, *(next(found) if wanted else None for wanted in needed))
        key = fit, (*map(is_, grads, repeat(None)),), wanted.likeness, _options(wanted)
        once(key, lambda: check_incoming(wanted, grads, iterates, features[0]))
        now = wanted._replace(directly=True)
        return (
            None,
            None,
            None,
            *backward_now(now, grads, features, parameters, lengths, seed, iterates, needed, kept),
        )


_apply = super(torch.autograd.Function, GatedRJCA).apply  # skips torch.func, which undisturbed() excludes


class GatedRJCAGradient(_OnceDifferentiable):
    """``grjca::backward``, whose own gradient is an error: there is no second derivative."""

    @staticmethod
    def forward(counts, lengths, seed, iterates, needed, options, kept, *tensors):
        grads, rest = list(tensors[: counts[0]]), tensors[counts[0] :]
        features, parameters = list(rest[: counts[1]]), list(rest[counts[1] :])
        return tuple(
            torch.ops.grjca.backward(grads, features, parameters, lengths, seed, iterates, needed, *options, kept)
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"gated_rjca: the kernels have no second derivative. {_WAY_OUT}")


def _forward_autograd(features, parameters, lengths, seed, *options):
    if _differentiable((*features, *parameters)):
        wanted = Wanted(_described(features, options), *_split(options)[1])
        return list(GatedRJCA.apply(wanted, lengths, seed, *features, *parameters))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.grjca.forward(features, parameters, lengths, seed, *options)


def _backward_autograd(grads, features, parameters, lengths, seed, iterates, needed, *options):
    if _differentiable((*grads, *features, *parameters)):
        counts, (rest, kept) = (len(grads), len(features)), _without_kept(options)
        given = counts, lengths, seed, iterates, needed, _all_options(rest), kept
        return list(GatedRJCAGradient.apply(*given, *grads, *features, *parameters))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.grjca.backward(grads, features, parameters, lengths, seed, iterates, needed, *options)


_library.impl("forward", _forward_autograd, "Autograd")
_library.impl("backward", _backward_autograd, "Autograd")


# ---- FLOPs, for torch.utils.flop_counter.FlopCounterMode


def _described(features: Sequence[Any], options: tuple[Any, ...]) -> Problem:
    """Return the problem of features, or of their shapes, assuming that the call is legal."""
    sizes = [getattr(x, "shape", x) for x in features]
    return Problem(sizes[0][0], sizes[0][1], tuple(size[2] for size in sizes), *_split(options)[0])


def _forward_flops(features, parameters, lengths, seed, *options, **_):
    return flops.forward(_described(features, options))


def _backward_flops(grads, features, parameters, lengths, seed, iterates, needed, *options, **_):
    return flops.backward(_described(features, _without_kept(options)[0]), needed)


# Not register_flop_formula: in PyTorch 2.4 it registers custom operators under a name that is never looked up.
flop_registry[torch.ops.grjca.forward] = shape_wrapper(_forward_flops)
flop_registry[torch.ops.grjca.backward] = shape_wrapper(_backward_flops)
