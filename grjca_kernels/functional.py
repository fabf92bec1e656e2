"""The functional form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grjca_kernels import ops, reference, shapes
from grjca_kernels.backends import choose
from grjca_kernels.shapes import Gates, Layer, Linear

NO_SCRIPT = (
    "grjca_kernels: torch.jit can neither script nor trace the kernels. torch.compile speeds a model up with them, and "
    "torch.export and torch.onnx.export save it."
)


def refuse_tracing() -> None:
    """Refuse a call in torch.jit.trace, except where ONNX is made by it."""
    if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():  # type: ignore[attr-defined]
        raise RuntimeError(NO_SCRIPT)


def gated_rjca(
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
    lengths: Tensor | None = None,
    seed: Tensor | int | None = None,
    concat: bool = False,
    return_gates: bool = False,
    return_iterates: bool = False,
    backend: str = "auto",
) -> Any:
    """Gated recursive joint cross-attention of M = 2 to 4 modalities (arXiv 2503.12261, equations in ``operator.md``).

    Args:
        features: per modality X_m [B, L, d_m], visual first; float32, float64, bfloat16 or float16, any strides.
        layers: parameters of each iteration, or of one that all share. Same dtype and device as the features.
        gates: per modality its gates: none, one of 2 ways ("dynamic"), one of T + 1 ("flat"), or stages 1..T of t + 1
            ways and a last one of T ("hierarchical").
        iterations: T, 1 to 8; needed only where one layer is shared.
        gating: "none" (RJCA), "dynamic" (DCA), "flat" (GRJCA) or "hierarchical" (HGRJCA).
        form: "released" (the authors' code) or "paper" (no W_q, biases, output relu, tanh around V C, or dropout).
        dropout: p, 0 <= p < 1, on C and U. There is no training flag: pass 0 to evaluate. The paper form has none.
        temperature: tau of the gates.
        normalize: divide every frame of every modality by its L2 norm first.
        lengths: [B] integers, 0 <= length <= L; frames beyond are absent: never read, and 0 in outputs and gradients.
            On GPUs kernels do not wait to check the values: those outside count as the nearer of 0 and L.
        seed: of the dropout masks; drawn from PyTorch's generator if None.
        concat: one output [B, L, d] instead of one per modality.
        return_gates: append {"gates": per modality [B, L, ways]; a tuple of them, stage 1..T then last, if
            hierarchical; None without gates}.
        return_iterates: append {"iterates": per modality X^1..X^T, [T, B, L, d_m]}.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; see :func:`grjca_kernels.backends`.

    Returns:
        (Y_1, ..., Y_M), each [B, L, d_m], or Y [B, L, d]; followed by one dict if extras were asked for. All of it is
        differentiable, once; twice with backend="reference".

    Raises:
        ValueError, TypeError: for anything outside the above, before anything runs.
        RuntimeError: if a named backend cannot run, with its reason.
    """
    refuse_tracing()
    shapes.check_structure(features, layers, gates)
    for name, flag in (("concat", concat), ("return_gates", return_gates), ("return_iterates", return_iterates)):
        shapes.check_flag(name, flag)
    features, layers, gates = _autocast(features, layers, gates)
    problem = shapes.check(
        features,
        layers,
        gates,
        iterations=iterations,
        gating=gating,
        form=form,
        dropout=dropout,
        temperature=temperature,
        normalize=normalize,
        lengths=lengths,
        seed=seed,
    )
    chosen = "reference" if torch.onnx.is_in_onnx_export() else choose(backend, features[0])
    seed = reference.draw_seed(problem, seed, features[0].device)
    gates = gates if problem.gate_ways else ()
    if chosen == "reference":
        outputs, iterates, values = reference.forward(problem, features, layers, gates, lengths, seed)
        return reference.assemble(outputs, iterates, values, concat, return_gates, return_iterates)
    outputs, iterates, values = ops.gated_rjca(
        problem,
        features,
        layers,
        gates,
        lengths,
        seed,
        concat=concat,
        return_gates=return_gates,
        backend=chosen,
    )
    return reference.assemble(outputs, iterates, values, concat, return_gates, return_iterates)


def _autocast(
    features: Sequence[Tensor], layers: Sequence[Layer], gates: Gates
) -> tuple[Sequence[Tensor], Sequence[Layer], Gates]:
    """Features and parameters in autocast's dtype, where it is on; float64 is left alone, as torch's operators do."""
    dtype = ops.autocast_dtype(features[0].device.type)
    if dtype is None or any(x.dtype == torch.float64 for x in (*features, *shapes.flatten(layers, gates))):
        return features, layers, gates

    def cast(given: Linear) -> Linear:
        return Linear(given.weight.to(dtype), None if given.bias is None else given.bias.to(dtype))

    return (
        [x.to(dtype) for x in features],
        [Layer(layer[0] and cast(layer[0]), *(tuple(map(cast, group)) for group in layer[1:])) for layer in layers],
        tuple(tuple(map(cast, group)) for group in gates),
    )
