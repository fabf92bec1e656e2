"""Fused gated recursive joint cross-attention of audio-visual features, specified in ``operator.md`` beside this
file."""

import torch as _torch

from grjca_kernels import reference
from grjca_kernels import verdicts as _verdicts
from grjca_kernels.backends import TABLE as _TABLE
from grjca_kernels.backends import backends
from grjca_kernels.dropout import scaled_mask as dropout_mask
from grjca_kernels.functional import gated_rjca
from grjca_kernels.module import GatedRJCAFused
from grjca_kernels.problem import Layer, Linear
from grjca_kernels.problem import check_choice as _check_choice

__version__ = "0.1.0"
__all__ = ["GatedRJCAFused", "Layer", "Linear", "backends", "dropout_mask", "gated_rjca", "reference", "self_check"]


def self_check(backend: str | None = None, device: _torch.device | str | int | None = None) -> bool:
    """Check a backend's kernels on this machine: small problems, forward and backward, against float64.

    ``backend="auto"`` does this once per dtype on a type of GPU without a committed test record. A direct call checks
    float32, bfloat16 and float16 anew, whatever was remembered, and "auto" follows the new result. On a GPU with Triton
    it takes minutes, most of them for compiling.

    Args:
        backend: a backend with kernels: any name in :func:`backends` except "reference"; by default the GPU backends
            that can run here.
        device: where to check; by default the current GPU, or the CPU if the backend computes there.

    Returns:
        True if all checks passed. The function prints the error and the bound of every tensor, and a verdict.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for a backend that cannot run here, with its reason.
    """
    if backend is not None:
        _check_choice("backend", backend, [name for name, row in _TABLE.items() if name != "reference"])
        return _verdicts.report(_TABLE[backend], device)
    of_gpus = [row for row in _TABLE.values() if row.unproven]
    running = [row for row in of_gpus if row.why_not() is None]
    if not running:
        reasons = " ".join(f"{row.name}: {row.why_not()}" for row in of_gpus)
        raise RuntimeError(f"self_check: no backend for GPUs can run here. {reasons}")
    return all([_verdicts.report(row, device) for row in running])
