"""The weights by which a projection computes, whatever its owner did to it: parametrized, pruned, adapted by LoRA.

The kernels read weights and never call the projections, so what acts in a call has to be found here, or refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from grjca_kernels.shapes import Linear

_RECOMPUTE = (BasePruningMethod, SpectralNorm, WeightNorm)  # they do so as hooks before the projection's forward


def as_linear(projection: nn.Module) -> Linear:
    """Weight and bias with which ``projection`` is y = x W^T + b, differentiable in what they are made of.

    ``projection`` is a torch.nn.Linear, parametrized or pruned as may be, or one that peft's LoRA has wrapped.

    Raises:
        TypeError: if its forward is not known to be that of a Linear.
        ValueError: for LoRA that no weights express: dropout while training, DoRA, a bias of its own.
    """
    if isinstance(projection, nn.Linear) and type(projection).forward is nn.Linear.forward:
        for hook in projection._forward_pre_hooks.values():
            if isinstance(hook, _RECOMPUTE):
                hook(projection, None)
        return Linear(projection.weight, projection.bias)
    if hasattr(projection, "lora_A") and hasattr(projection, "get_delta_weight"):
        return _adapted(projection)
    raise TypeError(
        f"GatedRJCAFused: expected its projections to be torch.nn.Linear, got {type(projection).__qualname__}. The "
        "kernels read weights and never call the projections: merge what was added into the weights, or use "
        "torch.nn.utils.parametrize or LoRA of peft, which they see."
    )


def _adapted(layer: Any) -> Linear:
    """Of a LoraLayer of peft."""
    weight, bias = as_linear(layer.base_layer)
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its own forward does
        weight, bias = as_linear(layer.base_layer)
    if layer.disable_adapters or layer.merged:
        return Linear(weight, bias)
    for name in layer.active_adapters:
        if name in layer.lora_A:
            _check_adapter(layer, name)
            delta: Tensor = layer.get_delta_weight(name)
            weight = weight + delta.to(weight.dtype)
    return Linear(weight, bias)


def _check_adapter(layer: Any, name: str) -> None:
    drops = isinstance(layer.lora_dropout[name], nn.Dropout) and layer.training and layer.lora_dropout[name].p > 0
    others = {
        "lora_dropout while training": drops,
        "DoRA or another variant": name in getattr(layer, "lora_variant", ()) or layer.use_dora.get(name, False),
        "lora_bias": getattr(layer, "lora_bias", {}).get(name, False),
    }
    found = [what for what, present in others.items() if present]
    if found:
        raise ValueError(
            f"GatedRJCAFused: LoRA adapter {name!r}: expected one that adds to the weight and no more, got "
            f"{' and '.join(found)}. The kernels read the sum of the weights and never call the adapter; set "
            "lora_dropout=0, use_dora=False, lora_bias=False, or merge the adapter."
        )
