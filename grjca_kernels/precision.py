"""Whether products of float32 may use TF32 on GPUs, as PyTorch is set."""

from __future__ import annotations

import torch


def allows_tf32() -> bool:
    """Whether PyTorch's settings let float32 products of CUDA tensors use TF32."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.backends.cuda.matmul.allow_tf32 if precision is None else precision == "tf32"
