"""Reading and writing the authors' checkpoints: their parameter names (operator.md, last section) and ours.

Their 1 and "video" are our visual, their 2 and "audio" our audio, their 3 and "text" our third modality.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from grjca_kernels.projections import as_linear

if TYPE_CHECKING:
    from grjca_kernels.module import GatedRJCAFused

THEIRS = {"visual": "video", "audio": "audio", "third": "text", "fourth": "fourth"}
_FIRST_KEY = "dcn_layers.0.dense_coattn.query_linear.weight"
_FIRST = re.compile(rf"((?:.+?\.)??)((?:coattn\.)?){re.escape(_FIRST_KEY)}")
_GATE = re.compile(r"(video|audio|text)_\w*(gating_fc_layer|gate_mlp|temporal_encoder)")
_DEAD = re.compile(r"vregressor\.|aregressor\.|Joint\.")
_METADATA = "grjca_gating"  # key in the state_dict's metadata: at T = 1 the shapes do not tell "flat" from "dynamic"
_SETTINGS = "grjca_settings"  # another key: settings that no shape shows
_TOLD = ("joint", "temperature", "normalize")
_LSTM = [
    f"rnn.{kind}_{part}_l0{way}" for way in ("", "_reverse") for kind in ("weight", "bias") for part in ("ih", "hh")
]
_ALIKE = {  # blocks with similar keys that compute something else, by a part of a key
    "affine_a": "JCA, which has no V and transposes C",
}


class Source(NamedTuple):
    """A block of the authors, as far as its names and shapes show."""

    config: dict[str, Any]  # arguments of GatedRJCAFused that they determine
    weights: dict[str, Tensor]  # under our names
    theirs: dict[str, str]  # our name -> theirs, with the prefix
    prefix: str
    block: nn.Module | None  # the module, if the source is one
    certain: bool  # whether ``normalize`` is known rather than guessed


def names(modalities: Iterable[str], iterations: int, gating: str, inner: str) -> Iterator[tuple[str, str]]:
    """Yield (our name, the authors' name) of every parameter; ``inner``, "coattn." or "", precedes their iterations."""
    modalities = tuple(modalities)

    def linear(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
        yield from ((f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias"))

    for t in range(iterations):
        ours, theirs = f"layers.{t}", f"{inner}dcn_layers.{t}"
        yield from linear(f"{ours}.query", f"{theirs}.dense_coattn.query_linear")
        for m, name in enumerate(modalities):
            yield from linear(f"{ours}.key.{name}", f"{theirs}.dense_coattn.key{m + 1}_linear")
            yield from linear(f"{ours}.value.{name}", f"{theirs}.dense_coattn.value{m + 1}_linear")
            yield from linear(f"{ours}.output.{name}", f"{theirs}.linears.{m}.0")
    suffixes: tuple[str, ...] = {"dynamic": ("",), "flat": ("",)}.get(gating, ())
    if gating == "hierarchical":
        suffixes = (*(f"_stage{t + 1}" for t in range(iterations)), "_stage")
    for name in modalities:
        ours, theirs = f"gates.{name}", THEIRS[name]
        for g, suffix in enumerate(suffixes):
            yield from linear(f"{ours}.{g}", f"{theirs}_gating_fc_layer{suffix}")
        if gating == "temporal":
            for parameter in ("init_hidden", *_LSTM, "linear.weight", "linear.bias"):
                yield f"{ours}.0.{parameter}", f"{theirs}_temporal_encoder.{parameter}"
        if gating == "score":
            yield from linear(f"{ours}.0.hidden", f"{theirs}_gate_mlp.0")
            yield from linear(f"{ours}.0.score", f"{theirs}_gate_mlp.2")


def read(source: nn.Module | Mapping[str, Tensor], prefix: str | None, ignore: Iterable[str]) -> Source:
    """Read a block by its names and shapes; every entry must be known to act, known to be unused, or is refused."""
    if isinstance(source, nn.Module):
        state = cast("Mapping[str, Tensor]", source.state_dict())
    elif isinstance(source, Mapping):
        state = source
    else:
        raise TypeError(f"source: expected a module or a state_dict, got {type(source).__name__}.")
    asked, (prefix, inner) = prefix, _find(state, prefix)
    beside = prefix.removesuffix(".").rpartition(".")
    above = f"{beside[0]}." if beside[0] else ""
    gates = [key for key in state if key.startswith(above) and _GATE.match(key, len(above))]
    if asked is None and prefix and not inner and gates:
        raise ValueError(
            f"source: expected gates beside 'coattn', got {gates[0]!r} beside {prefix!r}, and they would be lost. "
            f"Rename the keys, or load the recursion alone by prefix={prefix!r}."
        )
    block = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    module = source.get_submodule(prefix.rstrip(".")) if isinstance(source, nn.Module) else None
    numbered = re.compile(rf"{re.escape(inner)}dcn_layers\.(\d+)\.")
    iterations = 1 + max(int(match.group(1)) for key in block if (match := numbered.match(key)))
    attention = f"{inner}dcn_layers.0.dense_coattn"
    count = next(n for n in (4, 3, 2) if n == 2 or f"{attention}.key{n}_linear.weight" in block)
    modalities = tuple(THEIRS)[:count]
    metadata = getattr(state, "_metadata", None) or {}
    told = {name: value for name, value in metadata.get(_SETTINGS, {}).items() if name in _TOLD}
    named_grjca = "GRJCA" in type(module).__name__ + prefix
    gating, certain = _gating(block, prefix, iterations, metadata.get(_METADATA), named_grjca)
    known = dict(names(modalities, iterations, gating, inner))
    _refuse_unknown(block, known.values(), len(modalities), prefix, ignore)
    missing = [prefix + theirs for theirs in known.values() if theirs not in block]
    if missing:
        raise ValueError(f"source: expected the key {missing[0]!r} ({len(missing)} keys are missing), got none.")
    wrong = [theirs for theirs in known.values() if not isinstance(block[theirs], Tensor)]
    if wrong:
        raise TypeError(f"source[{prefix + wrong[0]!r}]: expected a tensor, got {type(block[wrong[0]]).__name__}.")
    weights = {ours: block[theirs] for ours, theirs in known.items()}
    theirs = {ours: prefix + theirs for ours, theirs in known.items()}
    sizes = [f"layers.0.value.{name}.weight" for name in modalities] + ["layers.0.key.visual.weight"]
    for ours in sizes:
        if weights[ours].dim() != 2:
            raise ValueError(f"source[{theirs[ours]!r}]: expected 2 dimensions, got shape {list(weights[ours].shape)}.")
    *widths, length = (weights[ours].shape[0] for ours in sizes)
    of_keys = [weights[f"layers.0.key.{name}.weight"].shape for name in modalities]
    if of_keys == [(d_m, d_m) for d_m in widths] and len({*widths}) > 1:
        raise ValueError(
            f"source[{theirs[sizes[-1]]!r}]: expected W_k [L, L], which mixes frames, got {list(of_keys[0])} and "
            f"{list(of_keys[1])}, the widths of the features. This is the DCNLayer of MultiFPE, another operator."
        )
    first = weights["layers.0.query.weight"]
    for ours, weight in weights.items():
        if (weight.dtype, weight.device) != (first.dtype, first.device):
            raise ValueError(
                f"source[{theirs[ours]!r}]: expected {first.dtype} on {first.device}, as the first weight has, got "
                f"{weight.dtype} on {weight.device}; convert one of them."
            )
    config = {
        "dim_visual": widths if len(widths) > 2 else widths[0],
        "dim_audio": None if len(widths) > 2 else widths[1],
        "length": length,
        "iterations": iterations,
        "gating": gating,
        "joint": "raw" if len(widths) > 2 else "projected",
        "output": "concat" if inner or gating != "none" else "pair",
        "normalize": gating in ("flat", "hierarchical", "temporal", "score"),
        "dtype": first.dtype,
        "device": first.device,
    } | told
    return Source(config, weights, theirs, prefix, module, certain or "normalize" in told)


def parameters(source: object, theirs: Mapping[str, str], overrides: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the Parameters of ``source`` themselves, under our names."""
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


def take_over(module: GatedRJCAFused, source: nn.Module, theirs: Mapping[str, str]) -> None:
    """Freeze and tie the parameters that are frozen and tied in ``source``."""
    held = dict(source.named_parameters(remove_duplicate=False))
    first: dict[int, nn.Parameter] = {}
    for ours, parameter in [*module.named_parameters(remove_duplicate=False)]:
        original = held.get(theirs.get(ours, ""))
        if original is None:
            continue
        parameter.requires_grad_(original.requires_grad)
        if (tied := first.setdefault(id(original), parameter)) is not parameter:
            _assign(module, ours, tied)


def _assign(module: nn.Module, name: str, parameter: Tensor) -> None:
    path, _, kind = name.rpartition(".")
    setattr(module.get_submodule(path), kind, parameter)


def load(
    module: GatedRJCAFused, weights: Mapping[str, Tensor], theirs: Mapping[str, str], assign: bool = False
) -> None:
    """Copy or assign ``weights`` into ``module``; refuse a wrong shape, under the authors' name."""
    expected = module.state_dict()
    if module.joint == "raw":
        weights = {ours: weight for ours, weight in weights.items() if ".query." not in ours}
    if expected.keys() != weights.keys():
        differing = sorted(expected.keys() ^ weights.keys())[0]
        raise ValueError(
            f"source: its weights do not fit the requested gating={module.gating!r}, form={module.form!r}, "
            f"joint={module.joint!r}, iterations={module.iterations}, share_weights={module.share_weights}; "
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
    for ours, parameter in weights.items():  # load_state_dict(assign=True) would unfreeze
        _assign(module, ours, parameter)


def rename(module: GatedRJCAFused, state: dict[str, Any], prefix: str) -> None:
    """Rename the authors' keys under ``prefix`` in a state_dict to ours, and drop those that do not affect the
    output."""
    found = [inner for inner in ("coattn.", "") if f"{prefix}{inner}{_FIRST_KEY}" in state]
    if not found or module.form != "released" or module.share_weights:
        return
    dead = _dead(len(module.dims))
    for key in [key for key in state if key.startswith(prefix) and dead.match(key, len(prefix))]:
        del state[key]
    for ours, theirs in names(module.gates, module.iterations, module.gating, found[0]):
        if (key := f"{prefix}{theirs}") in state:
            weight = state.pop(key)
            if module.joint == "projected" or ".query." not in ours:
                state[f"{prefix}{ours}"] = weight


def write(module: GatedRJCAFused) -> dict[str, Tensor]:
    """Invert :func:`read`.

    Shared weights are written once per iteration. A W_q that the authors' modules hold but do not use is written as the
    identity, with which a module that did use it would compute the same.
    """
    if module.form != "released":
        raise ValueError(
            "to_released: expected form='released', got form='paper', which has no biases; "
            "the authors' modules cannot hold it."
        )
    result: OrderedDict[str, Tensor] = OrderedDict()
    for ours, theirs in names(
        module.gates, module.iterations, module.gating, "" if module.gating == "none" else "coattn."
    ):
        if module.share_weights:
            ours = re.sub(r"^layers\.\d+", "layers.0", ours)
        result[theirs] = _value(module, ours).detach()
    settings = {name: getattr(module, name) for name in _TOLD}
    result._metadata = {_METADATA: module.gating, _SETTINGS: settings}  # type: ignore[attr-defined]
    return result


def _value(module: GatedRJCAFused, name: str) -> Tensor:
    path, _, kind = name.rpartition(".")
    if module.joint == "raw" and path.endswith(".query"):
        like, width = next(module.parameters()), sum(module.dims)
        options = {"device": like.device, "dtype": like.dtype}
        return torch.eye(width, **options) if kind == "weight" else torch.zeros(width, **options)  # type: ignore[call-overload]
    owner = module.get_submodule(path)
    if path.startswith("layers") or module.gating not in ("temporal", "score"):
        return cast(Tensor, getattr(as_linear(owner), kind))
    return cast(Tensor, getattr(owner, kind))


def _find(state: Mapping[str, Any], prefix: str | None) -> tuple[str, str]:
    """Return the prefix of the block, and "coattn." or "" for what follows it."""
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
        for part, what in _ALIKE.items():
            alike = [key for key in state if part in str(key)]
            if alike:
                raise ValueError(
                    f"source: expected a block of the family, got {alike[0]!r} of {what}: another operator."
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


def _gating(
    block: Mapping[str, Any], prefix: str, iterations: int, recorded: str | None, named_grjca: bool
) -> tuple[str, bool]:
    """Return the gating and whether it is certain.

    At T = 1, GRJCA and DCA have the same shapes but normalise different inputs.
    """
    starts = {"temporal": "video_temporal_encoder.", "score": "video_gate_mlp."}
    for gating, start in starts.items():
        if any(key.startswith(start) for key in block):
            return gating, True
    gates = [key for key in block if re.match("(video|audio)_gating_fc_layer", key)]
    if not gates:
        return "none", True
    if any("_stage" in key for key in gates):
        return "hierarchical", True
    key = next((key for key in gates if key.endswith("weight")), None)
    if key is None:
        return "flat", True  # its keys are missing, as read() will report
    ways = block[key].shape[0]
    if ways == 2 and iterations == 1:
        return recorded or ("flat" if named_grjca else "dynamic"), named_grjca or recorded is not None
    if ways == iterations + 1:
        return "flat", True
    if ways == 2:
        return "dynamic", True
    raise ValueError(
        f"source[{prefix + key!r}]: expected 2 rows (DCA) or T + 1 = {iterations + 1} (GRJCA), got {ways}."
    )


def _dead(modalities: int) -> re.Pattern[str]:
    """Return a pattern for the parameters that the authors' blocks hold but never use."""
    return re.compile(_DEAD.pattern + ("|text_gating_fc_layer" if modalities == 2 else ""))


def _refuse_unknown(
    block: Mapping[str, Any], known: Iterable[str], modalities: int, prefix: str, ignore: Iterable[str]
) -> None:
    """Refuse unknown parameters that may act; name the unused ones in one warning."""
    dead, starts = _dead(modalities), (ignore,) if isinstance(ignore, str) else tuple(ignore)
    unused = [key for key in block if key not in {*known}]
    unknown = [key for key in unused if not dead.match(key) and not (prefix + key).startswith(starts)]
    if unknown:
        listed = ", ".join(repr(prefix + key) for key in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise ValueError(
            f"source: expected the keys of a block of the family, got {len(unknown)} besides: {listed}. What they do "
            "would be lost. If the block's output does not depend on them, pass the beginnings of their names as "
            "`ignore`, or a `prefix` under which the block stands alone."
        )
    named = [prefix + key for key in unused if dead.match(key)]
    if named:
        warnings.warn(f"from_released ignored keys without effect on the output: {', '.join(named)}.", stacklevel=4)
