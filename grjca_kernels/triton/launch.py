"""From tensors to launches."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from grjca_kernels import config, dropout
from grjca_kernels.precision import allows_tf32
from grjca_kernels.shapes import Problem
from grjca_kernels.triton.arguments import Arguments, Gradients, Outputs, Scalars, Shape, View
from grjca_kernels.triton.backward import backward_kernel
from grjca_kernels.triton.forward import forward_kernel


def forward(
    problem: Problem,
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    lengths: Tensor | None,
    seed: Tensor | None,
    outputs: Sequence[Tensor],
    iterates: Tensor,
    gates: Sequence[Tensor],
) -> None:
    """Fill ``outputs`` [B, L, d_m], ``iterates`` [T, B, L, d] and, unless empty, ``gates`` [B, L, ways]."""
    if problem.batch == 0:
        return
    launch = config.forward(
        problem,
        iterates.dtype,
        device_of(iterates),
        tf32=allows_tf32(),
        lengths=lengths is not None,
        return_gates=bool(gates),
    )
    arguments = gather(problem, launch, features, parameters, lengths, seed, iterates)
    to = Outputs(tuple(view(y) for y in outputs), tuple(view(g) for g in gates))
    run(forward_kernel, launch, arguments, to, problem.batch)


def backward(
    problem: Problem,
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    lengths: Tensor | None,
    seed: Tensor | None,
    iterates: Tensor,
    grad_outputs: Sequence[Tensor | None],
    grad_iterates: Sequence[Tensor | None],
    grad_gates: Sequence[Tensor | None],
    grad_features: Sequence[Tensor | None],
    grad_parameters: Sequence[Tensor | None],
) -> None:
    """Fill ``grad_features`` and ``grad_parameters`` where not None; incoming gradients that are None are zero."""
    if problem.batch == 0:
        for gradient in grad_parameters:
            if gradient is not None:
                gradient.zero_()
        return
    weights = any(gradient is not None for gradient in grad_parameters)
    launch = config.backward(
        problem,
        iterates.dtype,
        device_of(iterates),
        tf32=allows_tf32(),
        lengths=lengths is not None,
        weights=weights,
        d_iterates=any(gradient is not None for gradient in grad_iterates),
    )
    arguments = gather(problem, launch, features, parameters, lengths, seed, iterates)
    of_iterates = grad_iterates or [None] * len(features)
    wanted = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if gradient is None else gradient
        for gradient, x in zip(grad_features, features, strict=True)
    ]
    to = Gradients(
        outputs=incoming(grad_outputs, features),
        iterates=incoming([None if g is None else g[0] for g in of_iterates], features),
        iterates_steps=tuple(0 if g is None else g.stride(0) for g in of_iterates),
        gates=incoming(grad_gates or [None] * len(features), features),
        features=tuple(view(gradient) for gradient in wanted),
        parameters=tuple(
            torch.empty_like(parameter, memory_format=torch.contiguous_format) if gradient is None else gradient
            for gradient, parameter in zip(grad_parameters, parameters, strict=True)
        )
        if weights
        else (),
    )
    run(backward_kernel, launch, arguments, to, problem.batch)


def incoming(gradients: Sequence[Tensor | None], features: Sequence[Tensor]) -> tuple[View, ...]:
    """Views of gradients; one that is absent is a feature of which nothing is read."""
    return tuple(
        view(x)._replace(given=0) if gradient is None else view(gradient)
        for gradient, x in zip(gradients, features, strict=True)
    )


def run(kernel: Any, launch: config.Launch, arguments: Arguments, others: Any, batch: int) -> None:
    """All steps in one cooperative launch, on the current stream of the tensors' device.

    Where the driver refuses it, since something else holds a part of the GPU, every step becomes a launch of its own.
    """
    device = arguments.iterates.device

    def call(first: int, last: int, together: bool) -> None:
        kernel[(launch.programs,)](
            arguments, others, batch, first, last, counter(device), launch.constants, **options(launch, together)
        )

    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if device not in _apart:
            try:
                return call(0, launch.steps, True)
            except RuntimeError as error:
                if "cooperative" not in str(error).lower():
                    raise
                _apart.add(device)
                warnings.warn(
                    f"grjca_kernels: {device} refuses one launch for all phases ({error}); each phase is launched "
                    "alone from now on, with the same results but slower. Are other processes using this GPU?",
                    stacklevel=2,
                )
        for step in range(launch.steps):
            call(step, step + 1, False)


_apart: set[torch.device] = set()
"""Devices on which every phase is launched alone."""


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


def gather(
    problem: Problem,
    launch: config.Launch,
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    lengths: Tensor | None,
    seed: Tensor | None,
    iterates: Tensor,
) -> Arguments:
    """Arguments of both directions, with new workspaces."""
    return Arguments(
        shape=Shape(
            length_parts=problem.length // launch.constants.length_step,
            width=problem.width,
            widths=problem.widths,
            chunk_odd=2 * launch.chunk + 1,
            unit=config.unit(problem, launch.chunk),
            gate_values=launch.gate_values,
            gradients=launch.gradients,
            parts_odd=2 * (launch.parts + 1) + 1,
        ),
        scalars=Scalars(
            key_scale=1 / math.sqrt(problem.width),
            temperature=problem.temperature,
            threshold=dropout.threshold(problem.dropout),
            kept=1 / (1 - problem.dropout),
        ),
        features=tuple(view(x) for x in features),
        parameters=tuple(parameter.contiguous() for parameter in parameters),
        lengths=lengths,
        lengths_step=0 if lengths is None else lengths.stride(0),
        seed=seed,
        iterates=iterates,
        batch_odd=2 * problem.batch + 1,
        work=iterates.new_empty(launch.work),
        wide=iterates.new_empty(launch.wide, dtype=torch.float32),
        bits=iterates.new_empty(launch.bits, dtype=torch.uint8) if launch.bits else None,
    )


def view(x: Tensor) -> View:
    return View(x, *x.stride())


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
