"""The weights with which a projection computes, even if it is parametrized, pruned or adapted by LoRA.

The kernels read weights and never call the projections, so anything that would act in such a call must be found here,
or refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat
from operator import attrgetter, eq, is_
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from grjca_kernels.call import Layers
from grjca_kernels.problem import Gates, Layer, Linear, flatten

_RECOMPUTE = (BasePruningMethod, SpectralNorm, WeightNorm)  # these recompute weights in hooks before the forward


def as_linear(projection: nn.Module) -> Linear:
    """Return the weight and bias with which ``projection`` is y = x W^T + b, differentiable in their sources.

    ``projection`` is a torch.nn.Linear, possibly parametrized or pruned, or one wrapped by peft's LoRA.

    Raises:
        TypeError: if its forward is not known to be that of a Linear.
        ValueError: for LoRA that weights cannot express: dropout while training, DoRA, a bias of its own.
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
    """Return the weight and bias of a peft LoraLayer."""
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
    """A module's parameters by role, with everything needed to see that the module still computes with them.

    Anything that replaces a parameter (assignment, another submodule, parametrize, prune, LoRA, functional_call, FSDP)
    changes a dictionary on the path to it, or replaces the dictionary (unpickling, ZeRO), so :meth:`hold` walks that
    path again. A changed shape, dtype, device or memory of a parameter is not seen here, but where its tensor is read.
    """

    layers: tuple[Layer, ...]
    gates: Gates
    modules: dict[str, Any] | None  # the block's own (a replica has others); None: gather at every call
    containers: tuple[nn.Module, ...] = ()
    projections: tuple[nn.Module, ...] = ()
    held: tuple[Any, ...] = ()  # by the block, the containers and the projections
    sizes: tuple[int, ...] = ()  # number of attributes per projection: one more would hide a parameter

    @classmethod
    def of(cls, block: nn.Module, used: Iterable[nn.Module], layers: tuple[Layer, ...], gates: Gates) -> Gathered:
        """Gather what ``block``, a GatedRJCAFused, holds in the children ``used``, if all are torch.nn.Linear."""
        layers, parameters = Layers(layers), flatten(layers, gates)
        modules = [module for child in used for module in child.modules()]
        projections = tuple(module for module in modules if type(module) is nn.Linear)
        containers = tuple(module for module in modules if type(module) is not nn.Linear)
        known = {nn.ModuleList, nn.ModuleDict, *map(type, block.layers)}  # type: ignore[arg-type]
        own = {id(parameter) for projection in projections for parameter in projection._parameters.values()}
        if (
            any(type(parameter) is not nn.Parameter for parameter in parameters)
            or not own.issuperset(map(id, parameters))
            or not known.issuperset(map(type, containers))
        ):
            return cls(layers, gates, None)
        held = (*_contents(block._modules, containers, projections),)
        return cls(layers, gates, block._modules, containers, projections, held, (*map(len, map(vars, projections)),))

    def hold(self, block: nn.Module) -> bool:
        """Return whether ``block`` still computes with these parameters."""
        modules = self.modules
        return (
            modules is not None
            and modules is block._modules
            and all(map(is_, _contents(modules, self.containers, self.projections), self.held))
            and all(map(eq, map(len, map(vars, self.projections)), self.sizes))
            and all(map(is_, map(type, self.projections), repeat(nn.Linear)))
        )


def _contents(of_block: dict[str, Any], containers: Iterable[nn.Module], projections: Iterable[nn.Module]) -> Any:
    """Return the modules and parameters in the order of the dictionaries that hold them, and an end mark."""
    dictionaries = chain((of_block,), map(_modules, containers), map(_parameters, projections))
    return chain(chain.from_iterable(map(dict.values, dictionaries)), (_END,))


_modules, _parameters = map(attrgetter, ("_modules", "_parameters"))
_END = object()
