"""The operators ``grjca::forward`` and ``grjca::backward``: schema, shapes, allocation, differentiation, FLOPs.

Both are functional and know no backend: the name of one is an argument, and its row in backends.py does the work on
tensors allocated here. A new backend therefore registers nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import flop_registry, shape_wrapper

from grjca_kernels import flops, shapes
from grjca_kernels.backends import TABLE, constant_when_compiled
from grjca_kernels.shapes import Gates, Layer, Problem

_OPTIONS = (
    "int iterations, str gating, str form, float dropout, float temperature, bool normalize, bool shared, "
    "bool concat, bool return_gates, str backend"
)
_PLAIN = (Tensor, torch.nn.Parameter)
_library = torch.library.Library("grjca", "DEF")
_library.define(
    f"forward(Tensor[] features, Tensor[] parameters, Tensor? lengths, Tensor? seed, {_OPTIONS}) -> Tensor[]"
)
_library.define(
    "backward(Tensor?[] grads, Tensor[] features, Tensor[] parameters, Tensor? lengths, Tensor? seed, Tensor iterates, "
    f"bool[] needed, {_OPTIONS}) -> Tensor[]"
)


def gated_rjca(
    problem: Problem,
    features: Sequence[Tensor],
    layers: Sequence[Layer],
    gates: Gates,
    lengths: Tensor | None,
    seed: Tensor | None,
    *,
    concat: bool,
    return_gates: bool,
    backend: str,
) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """Run a checked call on ``backend``: outputs (one if ``concat``), iterates and gate values, each per modality."""
    options = (
        problem.iterations,
        problem.gating,
        problem.form,
        problem.dropout,
        problem.temperature,
        problem.normalize,
        problem.shared,
        concat,
        return_gates,
        backend,
    )
    parameters = shapes.flatten(layers, gates)
    if torch.compiler.is_compiling():  # traced as one operator, whose own gradient is GatedRJCA
        results = torch.ops.grjca.forward(list(features), parameters, lengths, seed, *options)
    else:  # torch.func needs to see the autograd.Function itself
        _check_plain(*features, *parameters)
        results = GatedRJCA.apply((len(features),), lengths, seed, options, *features, *parameters)
    count = 1 if concat else len(features)
    values: list[Any] = [None] * len(features)
    if return_gates and problem.gate_ways:
        values = list(results[count + 1 :])
    if return_gates and problem.gating == "hierarchical":
        values = [value.split(problem.gate_ways, dim=-1) for value in values]
    iterates = results[count].split(problem.widths, dim=-1)
    return list(results[:count]), list(iterates), values


def _check_plain(*tensors: Tensor) -> None:
    """Refuse tensors that have no memory of their own: sharded, quantised."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
            raise TypeError(
                f"gated_rjca: expected plain tensors, got a {type(tensor).__name__} of shape {list(tensor.shape)}. The "
                "kernels read memory: make a plain tensor of it, use backend='reference', or, with FSDP2, apply "
                "fully_shard to the whole block and not to its projections."
            )


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast is set to for this device type, or None where it is off or does not exist."""
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


@constant_when_compiled  # PyTorch 2.4 cannot trace it
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# ---- forward


def _problem(
    features: Sequence[Tensor], parameters: Sequence[Tensor], lengths: Tensor | None, options: tuple
) -> Problem:
    """Checks a raw call of the operator as strictly as the public function does: kernels are handed addresses."""
    iterations, gating, form, dropout, temperature, normalize, _ = options[:7]
    problem = _described([x.shape for x in features], options)
    if len(parameters) != shapes.parameter_count(problem):
        raise ValueError(
            f"parameters: expected {shapes.parameter_count(problem)} tensors in the order of shapes.flatten(), "
            f"got {len(parameters)}."
        )
    layers, gates = shapes.unflatten(problem, parameters)
    return shapes.check(
        list(features),
        layers,
        gates,
        iterations=iterations,
        gating=gating,
        form=form,
        dropout=dropout,
        temperature=temperature,
        normalize=normalize,
        lengths=lengths,
    )


def _described(shapes_of_features: Sequence[Sequence[int]], options: tuple) -> Problem:
    """As it would be if the call were legal."""
    iterations, gating, form, dropout, temperature, normalize, shared = options[:7]
    return Problem(
        batch=shapes_of_features[0][0],
        length=shapes_of_features[0][1],
        widths=tuple(shape[2] for shape in shapes_of_features),
        iterations=iterations,
        gating=gating,
        form=form,
        dropout=dropout,
        temperature=temperature,
        normalize=normalize,
        shared=shared,
    )


def _empty_results(problem: Problem, features: Sequence[Tensor], options: tuple) -> list[Tensor]:
    concat, return_gates = options[7:9]
    like, widths = features[0], problem.widths
    frames = (problem.batch, problem.length)
    outputs = [like.new_empty((*frames, width)) for width in ((problem.width,) if concat else widths)]
    iterates = like.new_empty((problem.iterations, *frames, problem.width))
    ways = sum(problem.gate_ways) if return_gates else 0
    return [*outputs, iterates, *(like.new_empty((*frames, ways)) for _ in widths if ways)]


@torch.library.register_fake("grjca::forward", lib=_library)
def _forward_fake(features, parameters, lengths, seed, *options):  # type: ignore[no-untyped-def]
    return _empty_results(_problem(features, parameters, lengths, options), features, options)


def _forward(features, parameters, lengths, seed, *options):  # type: ignore[no-untyped-def]
    problem = _problem(features, parameters, lengths, options)
    results = _empty_results(problem, features, options)
    outputs, iterates, gates = _parts(problem, results, concat=options[7])
    run = TABLE[options[9]].forward
    run(problem, features, parameters, lengths, seed, outputs, iterates, gates)  # type: ignore[misc]
    return results


def _parts(problem: Problem, results: Sequence[Any], concat: bool) -> tuple[list[Any], Any, list[Any]]:
    """Outputs per modality (views of the concatenation), the iterates, and the gates; an absent gradient stays None."""
    count = 1 if concat else len(problem.widths)
    outputs = list(results[:count])
    if concat:
        outputs = [None] * len(problem.widths) if outputs[0] is None else list(outputs[0].split(problem.widths, dim=-1))
    return outputs, results[count], list(results[count + 1 :])


# ---- backward


def _needed_gradients(features: Sequence[Tensor], parameters: Sequence[Tensor], needed: Sequence[bool]) -> list[Any]:
    """One contiguous tensor for every feature and parameter whose gradient is needed, None for the others."""
    tensors = [*features, *parameters]
    return [tensor.new_empty(tensor.shape) if wanted else None for tensor, wanted in zip(tensors, needed, strict=True)]


@torch.library.register_fake("grjca::backward", lib=_library)
def _backward_fake(grads, features, parameters, lengths, seed, iterates, needed, *_):  # type: ignore[no-untyped-def]
    return [gradient for gradient in _needed_gradients(features, parameters, needed) if gradient is not None]


def _backward(grads, features, parameters, lengths, seed, iterates, needed, *options):  # type: ignore[no-untyped-def]
    problem = _problem(features, parameters, lengths, options)
    gradients = _needed_gradients(features, parameters, needed)
    grad_outputs, grad_iterates, grad_gates = _parts(problem, grads, concat=options[7])
    TABLE[options[9]].backward(  # type: ignore[misc]
        problem,
        features,
        parameters,
        lengths,
        seed,
        iterates,
        grad_outputs,
        [] if grad_iterates is None else list(grad_iterates.split(problem.widths, dim=-1)),
        grad_gates,
        gradients[: len(features)],
        gradients[len(features) :],
    )
    return [gradient for gradient in gradients if gradient is not None]


for _device in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _device)
    _library.impl("backward", _backward, _device)


# ---- differentiation

_WAY_OUT = "backend='reference' has it, for PyTorch differentiates that any number of times, in any way."


class _OnceDifferentiable(torch.autograd.Function):
    """What is refused of both functions, in a sentence."""

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        raise RuntimeError(
            "gated_rjca: the kernels have no vmap. Make the mapped dimension part of the batch, or use "
            "backend='reference'."
        )

    @staticmethod
    def jvp(ctx, *tangents):  # type: ignore[no-untyped-def]
        raise RuntimeError(f"gated_rjca: the kernels have no forward-mode derivative. {_WAY_OUT}")


class GatedRJCA(_OnceDifferentiable):
    """``grjca::forward`` with ``grjca::backward`` as its gradient. Saves the arguments and the iterates only."""

    @staticmethod
    def forward(counts, lengths, seed, options, *tensors):  # type: ignore[no-untyped-def]
        features, parameters = list(tensors[: counts[0]]), list(tensors[counts[0] :])
        return tuple(torch.ops.grjca.forward(features, parameters, lengths, seed, *options))

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        counts, lengths, seed, options, *tensors = inputs
        iterates = output[1 if options[7] else counts[0]]
        ctx.counts, ctx.options = counts, options
        ctx.save_for_backward(lengths, seed, iterates, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        lengths, seed, iterates, *tensors = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[4:])
        count = ctx.counts[0]
        if not any(needed) or all(grad is None for grad in grads):
            return (None,) * (4 + len(tensors))
        computed = iter(
            GatedRJCAGradient.apply((len(grads), count), lengths, seed, iterates, needed, ctx.options, *grads, *tensors)
        )
        return (None, None, None, None, *(next(computed) if wanted else None for wanted in needed))


class GatedRJCAGradient(_OnceDifferentiable):
    """``grjca::backward``, with a gradient that says that there is none."""

    @staticmethod
    def forward(counts, lengths, seed, iterates, needed, options, *tensors):  # type: ignore[no-untyped-def]
        grads, rest = list(tensors[: counts[0]]), tensors[counts[0] :]
        features, parameters = list(rest[: counts[1]]), list(rest[counts[1] :])
        return tuple(torch.ops.grjca.backward(grads, features, parameters, lengths, seed, iterates, needed, *options))

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        raise RuntimeError(f"gated_rjca: the kernels have no second derivative. {_WAY_OUT}")


for _function in (GatedRJCA, GatedRJCAGradient):  # or apply() would work the signature out at every call
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _forward_autograd(features, parameters, lengths, seed, *options):  # type: ignore[no-untyped-def]
    if _differentiable(*features, *parameters):
        return list(GatedRJCA.apply((len(features),), lengths, seed, options, *features, *parameters))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.grjca.forward(features, parameters, lengths, seed, *options)


def _backward_autograd(  # type: ignore[no-untyped-def]
    grads, features, parameters, lengths, seed, iterates, needed, *options
):
    if _differentiable(*grads, *features, *parameters):
        counts = (len(grads), len(features))
        return list(
            GatedRJCAGradient.apply(counts, lengths, seed, iterates, needed, options, *grads, *features, *parameters)
        )
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.grjca.backward(grads, features, parameters, lengths, seed, iterates, needed, *options)


_library.impl("forward", _forward_autograd, "Autograd")
_library.impl("backward", _backward_autograd, "Autograd")


# ---- FLOPs, for torch.utils.flop_counter.FlopCounterMode


def _forward_flops(features, parameters, lengths, seed, *options, **_):  # type: ignore[no-untyped-def]
    return flops.forward(_described(features, options))


def _backward_flops(  # type: ignore[no-untyped-def]
    grads, features, parameters, lengths, seed, iterates, needed, *options, **_
):
    return flops.backward(_described(features, options), needed)


# Not register_flop_formula: PyTorch 2.4's enters operators that are not its own under a name it does not look for.
flop_registry[torch.ops.grjca.forward] = shape_wrapper(_forward_flops)
flop_registry[torch.ops.grjca.backward] = shape_wrapper(_backward_flops)
