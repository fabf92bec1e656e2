"""The launches: from tensors to running kernels."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice, repeat
from operator import mod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from grjca_kernels import dropout
from grjca_kernels.call import Call
from grjca_kernels.call import Gradients as CallGradients
from grjca_kernels.modes import allows_tf32
from grjca_kernels.problem import Problem, refuse_memory
from grjca_kernels.triton_kernels import launch_config
from grjca_kernels.triton_kernels.arguments import Arguments, Gradients, Outputs, Scalars, Shape, View
from grjca_kernels.triton_kernels.backward import backward_kernel
from grjca_kernels.triton_kernels.forward import forward_kernel


def forward(call: Call) -> None:
    """Fill the results that the call wants."""
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
    """Return views of gradients; an absent one becomes a view of its feature, of which nothing is read."""
    both = zip(gradients, features, strict=True)
    return tuple([_new_view((x, *x.stride(), 0)) if gradient is None else view(gradient) for gradient, x in both])


def or_new(wanted: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the wanted tensors, with unused memory in place of None."""
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if gradient is None else gradient
        for gradient, x in zip(wanted, tensors, strict=True)
    ]


def view(x: Tensor) -> View:
    return _new_view((x, *x.stride(), 1))


_new_view = partial(tuple.__new__, View)  # takes a third of the time of View with its defaults


# ---- state shared by similar calls


class Prepared(NamedTuple):
    """A launch, its arguments that stay constant, and compiled kernels that only lack addresses, by everything else
    they depend on."""

    launch: launch_config.Launch
    shape: Shape
    scalars: Scalars
    waiting: dict[Any, Any]


def prepare(call: Call, **options: bool) -> Prepared:
    """Return the state shared by calls like this one; ``options`` are those of launch_config.launch."""
    device, lengths = device_of(call.iterates), call.lengths is not None
    tf32 = call.problem.reduced or allows_tf32()
    return _prepare(call.problem, call.iterates.dtype, device, tf32=tf32, lengths=lengths, **options)


@functools.lru_cache(maxsize=512)
def _prepare(problem: Problem, dtype: torch.dtype, device: launch_config.Device, **options: bool) -> Prepared:
    launch = launch_config.launch(problem, dtype, device, **options)
    shape = Shape(
        length_parts=problem.length // launch.constants.length_step,
        width=problem.width,
        widths=problem.widths,
        chunk_unspecialized=2 * launch.chunk + 1,
        unit=launch_config.unit(problem, launch.chunk),
        gate_values=launch.gate_values,
        gradients=launch.gradients,
        parts_unspecialized=2 * (launch.parts + 1) + 1,
        key_gradients=launch.key_gradients,
        key_parts_odd=2 * (launch.key_parts + 1) + 1,
    )
    scalars = Scalars(
        key_scale=1 / math.sqrt(problem.width),
        temperature=problem.temperature,
        threshold_unspecialized=2 * dropout.threshold(problem.dropout) + 1,
        kept=1 / (1 - problem.dropout),
    )
    return Prepared(launch, shape, scalars, {})


def gather(call: Call, prepared: Prepared) -> Arguments:
    """Return the arguments of both directions, with new workspaces."""
    launch, iterates = prepared.launch, call.iterates
    return Arguments(
        shape=prepared.shape,
        scalars=prepared.scalars,
        features=tuple(map(view, call.features)),
        parameters=tuple(map(Tensor.contiguous, call.parameters)),
        lengths=call.lengths,
        seed=call.seed,
        iterates=iterates,
        batch_unspecialized=2 * call.problem.batch + 1,
        activation_workspace=iterates.new_empty(launch.activation_workspace),
        fp32_workspace=iterates.new_empty(launch.fp32_workspace, dtype=torch.float32),
        bits=iterates.new_empty(launch.bits, dtype=torch.uint8) if launch.bits else None,
    )


# ---- launches


def run(kernel: Any, prepared: Prepared, arguments: Arguments, others: Any, batch: int) -> None:
    """Run all steps in one cooperative launch, on the current stream of the tensors' device."""
    device = arguments.iterates.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        try:
            run_steps(kernel, prepared, arguments, others, batch, 0, prepared.launch.steps)
        except RuntimeError as error:
            if "cooperative" not in str(error).lower():
                raise
            raise RuntimeError(
                f"grjca_kernels: {device} refuses a launch whose programs wait for one another ({error}): all "
                f"{prepared.launch.programs} of them must fit on it at once. Free it of other processes, or choose "
                "backend='cuda' or 'reference'."
            ) from error


ALIGNED = 16
"""The alignment of addresses in bytes; for others Triton would compile a separate kernel."""


def run_steps(
    kernel: Any, prepared: Prepared, arguments: Arguments, others: Any, batch: int, first: int, last: int
) -> None:
    """Run steps first <= step < last, on the current device.

    The first time, Triton inspects every argument, and finds or compiles a kernel. From then on, for the same strides,
    that kernel receives addresses directly.
    """
    launch, device = prepared.launch, arguments.iterates.device
    counter = torch.zeros(1, dtype=torch.int32, device=device)  # for the grid barrier
    given, to, found, numbers = _addressed(arguments, others)
    if any(map(mod, found, repeat(ALIGNED))):
        arguments = aligned(arguments)
        given, to, found, numbers = _addressed(arguments, others)
    key = (device, *map(mod, found, repeat(ALIGNED)), *numbers)
    if key in prepared.waiting:
        prepared.waiting[key](given, to, batch, first, last, counter.data_ptr(), launch.constants)
        return
    compiled = kernel[(launch.programs,)](
        arguments, others, batch, first, last, counter, launch.constants, **options(launch)
    )
    if compiled is not None:  # the interpreter compiles none
        prepared.waiting[key] = compiled[(launch.programs, 1, 1)]


def aligned(a: Arguments) -> Arguments:
    """Return the arguments with copies of inputs whose address is not a multiple of 16 bytes, as in views."""

    def copied(x: Tensor) -> Tensor:
        return x if x.data_ptr() % ALIGNED == 0 else x.clone()

    return a._replace(
        features=tuple([view(copied(x.data)) for x in a.features]),
        parameters=tuple(map(copied, a.parameters)),
        lengths=None if a.lengths is None else copied(a.lengths),
        seed=None if a.seed is None else copied(a.seed),
    )


def _addressed(a: Arguments, to: Outputs | Gradients) -> tuple[Any, Any, list[int], list[Any]]:
    """Return both with addresses in place of tensors, the addresses, and the numbers that may differ between such
    calls."""
    parts, rest, single = (
        (a.features, *to[:4]),
        to[4:],
        [a.lengths, a.seed, a.iterates, a.activation_workspace, a.fp32_workspace, a.bits],
    )
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
    given = (a.shape, a.scalars, features, of_call, lengths, seed, iterates, a.batch_unspecialized, *workspace)
    return given, (*others, steps, of_gradients) if rest else tuple(others), found, [steps, *numbers]


def _check_memory(tensors: Sequence[Tensor]) -> None:
    for i, x in enumerate(tensors):
        if x.numel() and not x.data_ptr():
            refuse_memory("tensors given to kernels", i, x)


def options(launch: launch_config.Launch) -> dict[str, Any]:
    """Return Triton's compile options. It fuses multiplications and additions by default only up to 3.9."""
    chosen: dict[str, Any] = {
        "num_warps": launch.tiles.warps,
        "num_stages": launch.tiles.stages,
        "enable_fp_fusion": True,
        "launch_cooperative_grid": True,
    }
    if launch.constants.most_registers:
        chosen["maxnreg"] = launch.constants.most_registers
        if launch.device.ptxas >= REMATERIALISING_PTXAS:
            chosen["ptx_options"] = "--register-usage-level=0"
    return chosen


REMATERIALISING_PTXAS = (13, 0)
"""The first assembler that by default keeps values in registers that it could recompute, and then spills some. With
that of CUDA 12.8 it is the other way round."""


@functools.cache
def _device(index: int) -> launch_config.Device:
    properties = torch.cuda.get_device_properties(index)
    device = launch_config.Device(
        kind="hip" if torch.version.hip else "cuda",
        capability=0 if torch.version.hip else properties.major * 10 + properties.minor,
        multiprocessors=properties.multi_processor_count,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", 64 * launch_config.KIB),
    )
    return device if device.kind == "hip" else as_compiled(device)


def as_compiled(device: launch_config.Device) -> launch_config.Device:
    """Return an Nvidia device with its assembler in Triton: from 3.9 on, that of CUDA 13 for Hopper and later."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    release = re.search(r"release (\d+)\.(\d+)", get_ptxas_version(device.capability))
    ptxas = (int(release[1]), int(release[2])) if release else (0, 0)
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return replace(device, ptxas=ptxas, unfenced=device.capability // 10 in (9, 10, 11) and version < FENCED)


FENCED = (3, 7)
"""The first Triton with a fence between cp.async and the tensor cores of Hopper and later."""


def device_of(x: Tensor) -> launch_config.Device:
    return launch_config.INTERPRETER if x.device.type == "cpu" else _device(x.device.index)
