"""The functional interface."""

from __future__ import annotations

from typing import Any

import torch

from grjca_kernels import ops, reference
from grjca_kernels.backends import choose
from grjca_kernels.call import Call, answers, describe

NO_SCRIPT = (
    "grjca_kernels: torch.jit can neither script nor trace the kernels. torch.compile speeds a model up with them, and "
    "torch.export and torch.onnx.export save it."
)


def refuse_tracing() -> None:
    """Refuse a call in torch.jit.trace, except during ONNX export."""
    if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():  # type: ignore[attr-defined]
        raise RuntimeError(NO_SCRIPT)


@answers(describe)
def gated_rjca(call: Call) -> Any:
    """Compute gated recursive joint cross-attention of M = 2 to 4 modalities (arXiv 2503.12261, see ``operator.md``).

    Args:
        features: per modality X_m [B, L, d_m], visual first; float32, float64, bfloat16 or float16, any strides.
        layers: the parameters of each iteration, or of one layer that all share. Same dtype and device as the features.
        gates: the gates of each modality: none, one of 2 ways ("dynamic"), one of T + 1 ("flat"), or stages 1..T of
            t + 1 ways and a last one of T ("hierarchical").
        iterations: T, 1 to 16; needed only where one layer is shared.
        gating: "none" (RJCA), "dynamic" (DCA), "flat" (GRJCA) or "hierarchical" (HGRJCA).
        form: "released" (the authors' code) or "paper" (no W_q, biases, output relu, tanh around V C, or dropout).
        joint: "projected", J = [X_1, ..., X_M] W_q^T + b_q, or "raw", J = [X_1, ..., X_M], as in RJCMA and the paper
            form; a Layer's query is then None.
        dropout: p, 0 <= p < 1, on C and U. There is no training flag: pass 0 to evaluate. The paper form has none.
        temperature: tau of the gates.
        normalize: divide every frame of every modality by its L2 norm first.
        lengths: [B] integers, 0 <= length <= L; frames beyond are absent: never read, and 0 in outputs and gradients.
            On GPUs the values are not checked, to avoid a wait: those out of range count as the nearer of 0 and L.
        seed: the seed of the dropout masks; drawn from PyTorch's generator if None.
        concat: one output [B, L, d] instead of one per modality.
        return_gates: append {"gates": per modality [B, L, ways]; a tuple of them, stage 1..T then last, if
            hierarchical; None without gates}.
        return_iterates: append {"iterates": per modality X^1..X^T, [T, B, L, d_m]}.
        keep: what a forward saves for its backward: "least" (X^t alone), "most" (also J, K, V, H, C and the sign of U,
            in several times the memory), or "auto", the pieces that save the most work within half the memory of an
            eager block, a function of shape and dtype. Results do not depend on it. Only "cpu" saves more than the
            least, and only "cpu" takes "most"; "reference" leaves it to autograd.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; see :func:`grjca_kernels.backends`.

    Returns:
        (Y_1, ..., Y_M), each [B, L, d_m], or Y [B, L, d]; followed by one dict if extras were requested. All of it is
        differentiable once, or twice with backend="reference". Under torch.autocast it keeps the features' dtype.

    Raises:
        ValueError, TypeError: for anything outside the above, before any computation.
        RuntimeError: if a named backend cannot run, with its reason.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        refuse_tracing()
        if torch.onnx.is_in_onnx_export():
            return reference.answer(call)
    backend = choose(call.backend, call.features[0], call.problem.reduced)
    if backend == "reference":
        return reference.answer(call)
    return reference.assemble(call, *ops.run(call, backend))
