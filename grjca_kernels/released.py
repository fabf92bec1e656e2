"""The authors' checkpoints, in and out: their parameter names (operator.md, last section) and those of GatedRJCAFused.

Their 1 and "video" is our visual, their 2 and "audio" our audio.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from grjca_kernels.projections import as_linear

if TYPE_CHECKING:
    from grjca_kernels.module import GatedRJCAFused

_FIRST_KEY = "dcn_layers.0.dense_coattn.query_linear.weight"
_FIRST = re.compile(rf"(.*?)((?:coattn\.)?){re.escape(_FIRST_KEY)}")
_DEAD = re.compile(r"text_gating_fc_layer|vregressor\.|aregressor\.|Joint\.")
_METADATA = "grjca_gating"  # key in the state_dict's metadata: at T = 1 the shapes do not tell "flat" from "dynamic"


def names(iterations: int, gating: str, inner: str) -> Iterator[tuple[str, str]]:
    """(our name, the authors') of every Linear; ``inner`` is "coattn." or "" and stands before their iterations."""
    for t in range(iterations):
        ours, theirs = f"layers.{t}", f"{inner}dcn_layers.{t}"
        yield f"{ours}.query", f"{theirs}.dense_coattn.query_linear"
        for m, name in enumerate(("visual", "audio")):
            yield f"{ours}.key.{name}", f"{theirs}.dense_coattn.key{m + 1}_linear"
            yield f"{ours}.value.{name}", f"{theirs}.dense_coattn.value{m + 1}_linear"
            yield f"{ours}.output.{name}", f"{theirs}.linears.{m}.0"
    suffixes = {"none": (), "dynamic": ("",), "flat": ("",)}.get(
        gating, (*(f"_stage{t + 1}" for t in range(iterations)), "_stage")
    )
    for name, theirs in (("visual", "video"), ("audio", "audio")):
        for g, suffix in enumerate(suffixes):
            yield f"gates.{name}.{g}", f"{theirs}_gating_fc_layer{suffix}"


def read(
    source: nn.Module | Mapping[str, Tensor], prefix: str | None
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Arguments of GatedRJCAFused that the weights fix, the weights under our names, and our name -> theirs."""
    if isinstance(source, nn.Module):
        label, state = type(source).__name__, cast("Mapping[str, Tensor]", source.state_dict())
    elif isinstance(source, Mapping):
        label, state = "", source
    else:
        raise TypeError(f"source: expected a module or a state_dict, got {type(source).__name__}.")
    prefix, inner = _find(state, prefix)
    block = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    numbered = re.compile(rf"{re.escape(inner)}dcn_layers\.(\d+)\.")
    iterations = 1 + max(int(match.group(1)) for key in block if (match := numbered.match(key)))
    metadata = getattr(state, "_metadata", None) or {}
    gating = _gating(block, prefix, iterations, metadata.get(_METADATA), named_grjca="GRJCA" in label + prefix)

    ours_to_theirs = {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in names(iterations, gating, inner)
        for kind in ("weight", "bias")
    }
    missing = [prefix + theirs for theirs in ours_to_theirs.values() if theirs not in block]
    if missing:
        raise ValueError(f"source: expected the key {missing[0]!r} ({len(missing)} keys are missing), got none.")
    wrong = [theirs for theirs in ours_to_theirs.values() if not isinstance(block[theirs], Tensor)]
    if wrong:
        raise TypeError(f"source[{prefix + wrong[0]!r}]: expected a tensor, got {type(block[wrong[0]]).__name__}.")
    _note_unused(block, set(ours_to_theirs.values()), prefix)

    weights = {ours: block[theirs] for ours, theirs in ours_to_theirs.items()}
    sizes = {}
    for argument, ours in (
        ("dim_visual", "layers.0.value.visual.weight"),
        ("dim_audio", "layers.0.value.audio.weight"),
        ("length", "layers.0.key.visual.weight"),
    ):
        if weights[ours].dim() != 2:
            raise ValueError(
                f"source[{prefix + ours_to_theirs[ours]!r}]: expected 2 dimensions, "
                f"got shape {list(weights[ours].shape)}."
            )
        sizes[argument] = weights[ours].shape[0]
    config = {
        **sizes,
        "iterations": iterations,
        "gating": gating,
        "output": "concat" if inner or gating != "none" else "pair",
        "normalize": gating in ("flat", "hierarchical"),
        "dtype": weights["layers.0.query.weight"].dtype,
        "device": weights["layers.0.query.weight"].device,
    }
    return config, weights, {ours: prefix + theirs for ours, theirs in ours_to_theirs.items()}


def parameters(source: object, theirs: Mapping[str, str], overrides: Mapping[str, Any]) -> dict[str, Tensor]:
    """The Parameters of ``source`` themselves, under our names."""
    if not isinstance(source, nn.Module):
        raise TypeError(f"keep_parameters: expected a module as source, got {type(source).__name__}.")
    for name in ("device", "dtype"):
        if name in overrides:
            raise TypeError(f"keep_parameters: expected no {name}, which is that of the parameters, got one.")
    held = dict(source.named_parameters(remove_duplicate=False))
    missing = [name for name in theirs.values() if name not in held]
    if missing:
        raise TypeError(f"keep_parameters: expected source.{missing[0]} to be a Parameter, got another tensor.")
    return {ours: held[name] for ours, name in theirs.items()}


def load(
    module: GatedRJCAFused, weights: Mapping[str, Tensor], theirs: Mapping[str, str], assign: bool = False
) -> None:
    """Copy ``weights`` into ``module``, or put them there; a wrong shape is refused under the authors' name."""
    expected = module.state_dict()
    if expected.keys() != weights.keys():
        differing = sorted(expected.keys() ^ weights.keys())[0]
        raise ValueError(
            f"source: its weights do not fit the requested gating={module.gating!r}, form={module.form!r}, "
            f"iterations={module.iterations}, share_weights={module.share_weights}; "
            f"the first that differs is {differing!r}."
        )
    for ours, tensor in weights.items():
        if tensor.shape != expected[ours].shape:
            raise ValueError(
                f"source[{theirs[ours]!r}]: expected shape {list(expected[ours].shape)}, got {list(tensor.shape)}."
            )
    if not assign:
        module.load_state_dict(weights)
        return
    for ours, parameter in weights.items():  # load_state_dict(assign=True) would make frozen ones trainable
        path, _, kind = ours.rpartition(".")
        setattr(module.get_submodule(path), kind, parameter)


def rename(module: GatedRJCAFused, state: dict[str, Any], prefix: str) -> None:
    """Bring the authors' names under ``prefix`` in a state_dict to ours, and drop what has no effect on the output."""
    found = [inner for inner in ("coattn.", "") if f"{prefix}{inner}{_FIRST_KEY}" in state]
    if not found or module.form != "released" or module.share_weights:
        return
    for key in [key for key in state if key.startswith(prefix) and _DEAD.match(key, len(prefix))]:
        del state[key]
    for ours, theirs in names(module.iterations, module.gating, found[0]):
        for kind in ("weight", "bias"):
            if (key := f"{prefix}{theirs}.{kind}") in state:
                state[f"{prefix}{ours}.{kind}"] = state.pop(key)


def write(module: GatedRJCAFused) -> dict[str, Tensor]:
    """The inverse of :func:`read`. Shared weights are written once for every iteration."""
    if module.form != "released":
        raise ValueError(
            "to_released: expected form='released', got form='paper', which has no biases; "
            "the authors' modules cannot hold it."
        )
    result: OrderedDict[str, Tensor] = OrderedDict()
    for ours, theirs in names(module.iterations, module.gating, "" if module.gating == "none" else "coattn."):
        if module.share_weights:
            ours = re.sub(r"^layers\.\d+", "layers.0", ours)
        weight, bias = as_linear(module.get_submodule(ours))
        assert bias is not None
        result |= {f"{theirs}.weight": weight.detach(), f"{theirs}.bias": bias.detach()}
    result._metadata = {_METADATA: module.gating}  # type: ignore[attr-defined]
    return result


def _find(state: Mapping[str, Any], prefix: str | None) -> tuple[str, str]:
    """The prefix of the block, and "coattn." or "" for what follows it."""
    found = {match.group(1): match.group(2) for key in state if (match := _FIRST.fullmatch(str(key)))}
    wanted = f"[coattn.]{_FIRST_KEY}"
    if prefix is None:
        if len(found) == 1:
            return next(iter(found.items()))
        if found:
            listed = ", ".join(repr(name) for name in sorted(found))
            raise ValueError(
                f"prefix: expected a choice, because the source holds several blocks, at {listed}; got None."
            )
        some = ", ".join(repr(str(key)) for key in list(state)[:3])
        raise ValueError(
            f"source: expected a key that ends in {wanted!r}, got {len(state)} keys ({some}, ...). "
            "If it is a checkpoint, pass the state_dict inside it."
        )
    for candidate in (prefix, f"{prefix}."):
        if candidate in found:
            return candidate, found[candidate]
    listed = ", ".join(repr(name) for name in sorted(found)) or "nowhere"
    raise ValueError(f"prefix: expected where a block stands ({listed}), got {prefix!r}.")


def _gating(block: Mapping[str, Any], prefix: str, iterations: int, recorded: str | None, named_grjca: bool) -> str:
    gates = [key for key in block if re.match("(video|audio)_gating_fc_layer", key)]
    if not gates:
        return "none"
    if any("_stage" in key for key in gates):
        return "hierarchical"
    key = next((key for key in gates if key.endswith("weight")), None)
    if key is None:
        return "flat"  # and its keys are missing, as read() will say
    ways = block[key].shape[0]
    if ways == 2 and iterations == 1:
        return recorded or ("flat" if named_grjca else "dynamic")
    if ways == iterations + 1:
        return "flat"
    if ways == 2:
        return "dynamic"
    raise ValueError(
        f"source[{prefix + key!r}]: expected 2 rows (DCA) or T + 1 = {iterations + 1} (GRJCA), got {ways}."
    )


def _note_unused(block: Mapping[str, Any], used: set[str], prefix: str) -> None:
    unused = [key for key in block if key not in used]
    dead = [prefix + key for key in unused if _DEAD.match(key)]
    other = [prefix + key for key in unused if not _DEAD.match(key)]
    notes = []
    if dead:
        notes.append(f"without effect on the output: {', '.join(dead)}")
    if other:
        notes.append(f"not part of the fusion block: {', '.join(other)}")
    if notes:
        warnings.warn(f"from_released ignored keys {'; '.join(notes)}.", stacklevel=4)
