"""From tensors to launches."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import chain, islice, repeat
from operator import mod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from grjca_kernels import config, dropout
from grjca_kernels.call import Call
from grjca_kernels.call import Gradients as CallGradients
from grjca_kernels.modes import allows_tf32
from grjca_kernels.problem import Problem, refuse_memory
from grjca_kernels.triton.arguments import Arguments, Gradients, Outputs, Scalars, Shape, View
from grjca_kernels.triton.backward import backward_kernel
from grjca_kernels.triton.forward import forward_kernel


def forward(call: Call) -> None:
    """Fill what the call wants."""
    prepared = prepare(call, backward=False, return_gates=bool(call.gates))
    to = Outputs(tuple(map(view, call.outputs)), tuple(map(view, call.gates)))
    run(forward_kernel, prepared, gather(call, prepared), to, call.problem.batch)


def backward(call: Call, gradients: CallGradients) -> None:
    """Fill the gradients that are wanted."""
    features, of_iterates = call.features, gradients.iterates
    weights = any(gradient is not None for gradient in gradients.parameters)
    d_iterates = any(gradient is not None for gradient in of_iterates)
    prepared = prepare(call, backward=True, weights=weights, d_iterates=d_iterates)
    to = Gradients(
        outputs=incoming(gradients.outputs, features),
        gates=incoming(gradients.gates, features),
        iterates=incoming([None if g is None else g[0] for g in of_iterates], features),
        features=tuple(map(view, or_new(gradients.features, features))),
        iterates_steps=tuple([0 if g is None else g.stride(0) for g in of_iterates]),
        parameters=tuple(or_new(gradients.parameters, call.parameters)) if weights else (),
    )
    run(backward_kernel, prepared, gather(call, prepared), to, call.problem.batch)


def incoming(gradients: Sequence[Tensor | None], features: Sequence[Tensor]) -> tuple[View, ...]:
    """Views of gradients; one that is absent is a feature of which nothing is read."""
    both = zip(gradients, features, strict=True)
    return tuple([_new_view((x, *x.stride(), 0)) if gradient is None else view(gradient) for gradient, x in both])


def or_new(wanted: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """What is wanted; and where nothing is, memory at which nobody looks."""
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if gradient is None else gradient
        for gradient, x in zip(wanted, tensors, strict=True)
    ]


def view(x: Tensor) -> View:
    return _new_view((x, *x.stride(), 1))


_new_view = partial(tuple.__new__, View)  # in a third of the time that View takes with its defaults


# ---- what stays the same from call to call


class Prepared(NamedTuple):
    """A launch; what kernels are told of it; and compiled kernels that wait for addresses, by all else they rely on."""

    launch: config.Launch
    shape: Shape
    scalars: Scalars
    waiting: dict[Any, Any]


def prepare(call: Call, **options: bool) -> Prepared:
    """What stays the same for calls like this one; ``options`` are those of config.launch."""
    device, lengths = device_of(call.iterates), call.lengths is not None
    tf32 = call.problem.reduced or allows_tf32()
    return _prepare(call.problem, call.iterates.dtype, device, tf32=tf32, lengths=lengths, **options)


@functools.lru_cache(maxsize=512)
def _prepare(problem: Problem, dtype: torch.dtype, device: config.Device, **options: bool) -> Prepared:
    launch = config.launch(problem, dtype, device, **options)
    shape = Shape(
        length_parts=problem.length // launch.constants.length_step,
        width=problem.width,
        widths=problem.widths,
        chunk_odd=2 * launch.chunk + 1,
        unit=config.unit(problem, launch.chunk),
        gate_values=launch.gate_values,
        gradients=launch.gradients,
        parts_odd=2 * (launch.parts + 1) + 1,
    )
    scalars = Scalars(
        key_scale=1 / math.sqrt(problem.width),
        temperature=problem.temperature,
        threshold=dropout.threshold(problem.dropout),
        kept=1 / (1 - problem.dropout),
    )
    return Prepared(launch, shape, scalars, {})


def gather(call: Call, prepared: Prepared) -> Arguments:
    """Arguments of both directions, with new workspaces."""
    launch, iterates = prepared.launch, call.iterates
    return Arguments(
        shape=prepared.shape,
        scalars=prepared.scalars,
        features=tuple(map(view, call.features)),
        parameters=tuple(map(Tensor.contiguous, call.parameters)),
        lengths=call.lengths,
        seed=call.seed,
        iterates=iterates,
        batch_odd=2 * call.problem.batch + 1,
        work=iterates.new_empty(launch.work),
        wide=iterates.new_empty(launch.wide, dtype=torch.float32),
        bits=iterates.new_empty(launch.bits, dtype=torch.uint8) if launch.bits else None,
    )


# ---- launches


def run(kernel: Any, prepared: Prepared, arguments: Arguments, others: Any, batch: int) -> None:
    """All steps in one cooperative launch, on the current stream of the tensors' device.

    Where the driver refuses it, since something else holds a part of the GPU, every step becomes a launch of its own.
    """
    device, steps = arguments.iterates.device, prepared.launch.steps
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        start = partial(_start, kernel, prepared, arguments, others, batch, counter(device))
        if device not in _apart:
            try:
                return start(0, steps, True)
            except RuntimeError as error:
                if "cooperative" not in str(error).lower():
                    raise
                _apart.add(device)
                warnings.warn(
                    f"grjca_kernels: {device} refuses one launch for all phases ({error}); each phase is launched "
                    "alone from now on, with the same results but slower. Are other processes using this GPU?",
                    stacklevel=2,
                )
        for step in range(steps):
            start(step, step + 1, False)


_apart: set[torch.device] = set()
"""Devices on which every phase is launched alone."""

ALIGNED = 16
"""Bytes of which an address is a multiple, or Triton compiles another kernel for it."""


def _start(
    kernel: Any,
    prepared: Prepared,
    arguments: Arguments,
    others: Any,
    batch: int,
    counter: Tensor,
    first: int,
    last: int,
    together: bool,
) -> None:
    """Steps first <= step < last.

    The first time, Triton looks at every argument, and finds or compiles a kernel. From then on, for the same strides,
    that kernel is given addresses, and nobody looks.
    """
    launch = prepared.launch
    given, to, found, numbers = _addressed(arguments, others)
    key = None if any(map(mod, found, repeat(ALIGNED))) else (counter.device, together, *numbers)
    if key in prepared.waiting:
        prepared.waiting[key](given, to, batch, first, last, counter.data_ptr(), launch.constants)
        return
    compiled = kernel[(launch.programs,)](
        arguments, others, batch, first, last, counter, launch.constants, **options(launch, together)
    )
    if key is not None and compiled is not None:  # the interpreter compiles none
        prepared.waiting[key] = compiled[(launch.programs, 1, 1)]


def _addressed(a: Arguments, to: Outputs | Gradients) -> tuple[Any, Any, list[int], list[Any]]:
    """Both with addresses for tensors; these addresses; and the numbers that two calls alike may have otherwise."""
    parts, rest, single = (a.features, *to[:4]), to[4:], [a.lengths, a.seed, a.iterates, a.work, a.wide, a.bits]
    views = [*chain.from_iterable(parts)]
    steps, parameters = rest or ((), ())
    tensors = [*[x[0] for x in views], *a.parameters, *parameters, *[x for x in single if x is not None]]
    found = [*map(Tensor.data_ptr, tensors)]
    if not all(found):
        _check_memory(tensors)
    numbers = [x[1:] for x in views]
    addresses = iter(found)
    viewed = iter([(next(addresses), *strides) for strides in numbers])
    features, *others = [tuple(islice(viewed, len(part))) for part in parts]
    of_call, of_gradients = tuple(islice(addresses, len(a.parameters))), tuple(islice(addresses, len(parameters)))
    lengths, seed, iterates, *workspace = [None if x is None else next(addresses) for x in single]
    given = (a.shape, a.scalars, features, of_call, lengths, seed, iterates, a.batch_odd, *workspace)
    return given, (*others, steps, of_gradients) if rest else tuple(others), found, [steps, *numbers]


def _check_memory(tensors: Sequence[Tensor]) -> None:
    for i, x in enumerate(tensors):
        if x.numel() and not x.data_ptr():
            refuse_memory("tensors given to kernels", i, x)


def options(launch: config.Launch, together: bool = True) -> dict[str, Any]:
    """What Triton is told beside the arguments. Fusing multiplications and additions is its default up to 3.9 only."""
    chosen: dict[str, Any] = {
        "num_warps": launch.tiles.warps,
        "num_stages": launch.tiles.stages,
        "enable_fp_fusion": True,
        "launch_cooperative_grid": together,
    }
    if launch.constants.most_registers:
        chosen["maxnreg"] = launch.constants.most_registers
        if NEW_PTXAS and launch.device.capability >= 90:
            chosen["ptx_options"] = "--register-usage-level=0"
    return chosen


NEW_PTXAS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
"""From 3.9 on Triton compiles for Hopper and later with a ptxas of CUDA 13, which by default spends registers on what
it could compute again, and then spills some. With the one of CUDA 12.8 it is the other way round."""

_counters: dict[tuple[torch.device, int], Tensor] = {}


def counter(device: torch.device) -> Tensor:
    """The grid barrier's counter: one for each stream, since kernels of two streams may run at once.

    It is 0, or 2^31, between launches. A graph under capture gets its own, which it clears at every replay: it may be
    replayed on any stream.
    """
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[key]


@functools.cache
def _device(index: int) -> config.Device:
    properties = torch.cuda.get_device_properties(index)
    return config.Device(
        kind="hip" if torch.version.hip else "cuda",
        capability=0 if torch.version.hip else properties.major * 10 + properties.minor,
        multiprocessors=properties.multi_processor_count,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", 64 * config.KIB),
    )


def device_of(x: Tensor) -> config.Device:
    return config.INTERPRETER if x.device.type == "cpu" else _device(x.device.index)
