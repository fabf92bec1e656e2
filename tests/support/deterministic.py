"""The inputs and weights that data/backbones.npz was computed from: numbers that are a pure function of their names."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn


def uniform(shape: tuple[int, ...], key: str, scale: float = 1.0) -> Tensor:
    """float64 within (-scale, scale): splitmix64 of the index in the flattened tensor."""
    seed = 0
    for byte in key.encode():
        seed = (seed * 1099511628211 + byte + 0x9E3779B9) % (1 << 64)
    with np.errstate(over="ignore"):
        z = (np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(seed)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z ^= z >> np.uint64(shift)
            z *= np.uint64(factor)
        z ^= z >> np.uint64(31)
    u = (z >> np.uint64(11)).astype(np.float64) / float(1 << 53)
    return torch.from_numpy(((2 * u - 1) * scale).reshape(shape))


def fill(network: nn.Module, key: str) -> None:
    """Give ``network``, in float64, the weights and buffers that belong to its names."""
    for place, module in network.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            with torch.no_grad():
                tensor.copy_(_value(module, name, tuple(tensor.shape), f"{key}/{place}.{name}"))


def _value(module: nn.Module, name: str, shape: tuple[int, ...], key: str) -> Tensor:
    if name == "num_batches_tracked":
        return torch.tensor(7)
    if name == "running_var":
        return 1 + uniform(shape, key, 0.3)
    if name == "running_mean":
        return uniform(shape, key, 0.1)
    if isinstance(module, nn.PReLU):
        return 0.25 + uniform(shape, key, 0.1)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return float(name == "weight") + uniform(shape, key, 0.2)
    return uniform(shape, key, 1.2 * (3 / math.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1)
