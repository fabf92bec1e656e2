"""The weights by which a projection computes, whatever its owner did to it: parametrized, pruned, adapted by LoRA.

The kernels read weights and never call the projections, so what acts in a call has to be found here, or refused.
"""

from __future__ import annotations

from itertools import repeat
from operator import eq, getitem, is_
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from grjca_kernels.call import Layers
from grjca_kernels.problem import Gates, Layer, Linear, flatten

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


class Gathered(NamedTuple):
    """Parameters by role, and all by which one sees that they still are what the module computes with.

    Whatever puts another tensor in the place of a parameter (assignment, another submodule, parametrize, prune, LoRA,
    functional_call, FSDP) does so in a dictionary on the way to it, or replaces the dictionary (unpickling, ZeRO), so
    each is asked for what it held. That a parameter has another shape, dtype, device or memory is not seen here, but
    where its tensor is looked at.
    """

    layers: tuple[Layer, ...]
    gates: Gates
    modules: dict[str, Any] | None  # of the block itself, which a replica has not; None: to be gathered at every call
    owners: tuple[nn.Module, ...] = ()
    names: tuple[str, ...] = ()
    owned: tuple[dict[str, Any], ...] = ()
    dictionaries: tuple[dict[str, Any], ...] = ()
    keys: tuple[str, ...] = ()
    held: tuple[Any, ...] = ()
    sized: tuple[dict[str, Any], ...] = ()  # another entry would be a layer or gate more, or hide a parameter
    sizes: tuple[int, ...] = ()
    projections: tuple[nn.Module, ...] = ()

    @classmethod
    def of(cls, block: nn.Module, layers: tuple[Layer, ...], gates: Gates) -> Gathered:
        """What ``block``, a GatedRJCAFused, holds now, if all its weights are Parameters of torch.nn.Linear."""
        layers, parameters = Layers(layers), flatten(layers, gates)
        if any(type(parameter) is not nn.Parameter for parameter in parameters):
            return cls(layers, gates, None)
        modules = [*block.modules()]
        projections = tuple(module for module in modules if type(module) is nn.Linear)
        own = {id(parameter) for projection in projections for parameter in projection._parameters.values()}
        known = {block, *block.layers, *projections}  # type: ignore[misc]
        others = [module for module in modules if module not in known]
        if not own.issuperset(map(id, parameters)) or not {nn.ModuleList, nn.ModuleDict}.issuperset(map(type, others)):
            return cls(layers, gates, None)
        entries = [(of._modules, *item) for of in modules for item in of._modules.items()]
        entries += [(of._parameters, *item) for of in projections for item in of._parameters.items()]  # type: ignore[misc]
        dictionaries, keys, held = zip(*entries, strict=True)
        owns = [(of, "_modules", of._modules) for of in modules[1:] if of._modules]
        owns += [(of, "_parameters", of._parameters) for of in projections]  # type: ignore[misc]
        sized = (*(module._modules for module in modules), *map(vars, projections))
        seen = (*zip(*owns, strict=True), dictionaries, keys, held, sized, tuple(map(len, sized)), projections)
        return cls(layers, gates, block._modules, *seen)

    def hold(self, block: nn.Module) -> bool:
        """Whether they are what ``block`` computes with."""
        try:
            return (
                self.modules is block._modules
                and all(map(is_, map(getattr, self.owners, self.names), self.owned))
                and all(map(is_, map(getitem, self.dictionaries, self.keys), self.held))
                and all(map(eq, map(len, self.sized), self.sizes))
                and all(map(is_, map(type, self.projections), repeat(nn.Linear)))
            )
        except KeyError:
            return False
