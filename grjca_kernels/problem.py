"""Problem descriptions. Every refusal of bad input is worded here, before anything is computed.

The letters are those of ``operator.md``: B batch, L sequence length, M modalities of widths d_m, d their sum, T
iterations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

FORMS = ("released", "paper")
GATINGS = ("none", "dynamic", "flat", "hierarchical")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
JOINTS = ("projected", "raw")
MAX_ITERATIONS = 16
MODALITIES = (2, 4)  # the fewest and the most modalities


class Linear(NamedTuple):
    """The linear map y = x W^T + b with ``weight`` [out, in] and ``bias`` [out], as in torch.nn.Linear."""

    weight: Tensor
    bias: Tensor | None = None


class Layer(NamedTuple):
    """The parameters of one iteration; the tuples hold one entry per modality, visual first.

    ``query`` is W_q [d, d] (None where J is raw), ``key`` W_k,m [L, L], ``value`` W_v,m [d_m, d_m], ``output`` W_h,m
    [d_m, d].
    """

    query: Linear | None
    key: tuple[Linear, ...]
    value: tuple[Linear, ...]
    output: tuple[Linear, ...]


Gates = tuple[tuple[Linear, ...], ...]
"""The gates of each modality: stages 1..T and then the final gate ("hierarchical"), one gate ("flat", "dynamic") or
none."""

SETTINGS = ("iterations", "gating", "form", "dropout", "temperature", "normalize", "joint")


@dataclass(frozen=True)
class Problem:
    """Everything about a call except its tensors. :func:`check` builds it, for legal input only."""

    batch: int
    length: int
    widths: tuple[int, ...]
    iterations: int
    gating: str
    form: str
    dropout: float  # 0 in the paper form
    temperature: float
    normalize: bool
    shared: bool
    joint: str = "projected"  # "raw" in the paper form
    reduced: bool = False  # whether float32 products may be as coarse as autocast's: autocast is on
    keep: int = 0  # what the forward saves for the backward besides X^t: bits from keeping.py

    @property
    def width(self) -> int:
        """d, the width of the joint features."""
        return sum(self.widths)

    @property
    def settings(self) -> tuple[Any, ...]:
        """All fields except the sizes, in the order of their declaration."""
        p = self
        return (
            p.iterations, p.gating, p.form, p.dropout, p.temperature, p.normalize, p.shared, p.joint, p.reduced,
            p.keep,
        )  # fmt: skip

    @property
    def released(self) -> bool:
        return self.form == "released"

    @property
    def projected(self) -> bool:
        """Return whether the problem has a W_q."""
        return self.released and self.joint == "projected"

    @property
    def gate_ways(self) -> tuple[int, ...]:
        return gate_ways(self.gating, self.iterations)


def gate_ways(gating: str, iterations: int) -> tuple[int, ...]:
    """Return the number of ways of each gate of one modality, in the order of :data:`Gates`."""
    if gating == "hierarchical":
        return (*range(2, iterations + 2), iterations)
    return {"none": (), "dynamic": (2,), "flat": (iterations + 1,)}[gating]


def modality_names(count: int) -> tuple[str, ...]:
    """Return the modality names that messages use."""
    return ("visual", "audio") if count == 2 else tuple(f"features[{m}]" for m in range(count))


# ---- options


_CHOICES = {"gating": GATINGS, "form": FORMS, "joint": JOINTS}
_NUMBERS = {
    "dropout": ("a probability p with 0 <= p < 1", lambda p: 0 <= p < 1),
    "gate_dropout": ("a probability p with 0 <= p < 1", lambda p: 0 <= p < 1),
    "temperature": ("a finite number above 0", lambda tau: 0 < tau < math.inf),
}


def check_options(**options: Any) -> None:
    """Refuse options that are out of range (ValueError) or of the wrong type (TypeError), by name."""
    for name, value in options.items():
        if name in _CHOICES:
            check_choice(name, value, _CHOICES[name])
        elif name in _NUMBERS:
            expected, holds = _NUMBERS[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {value!r}.")
            if not holds(value):
                raise ValueError(f"{name}: expected {expected}, got {value}.")
        elif name == "iterations":
            check_size(name, value, MAX_ITERATIONS)
        elif not isinstance(value, bool):  # the string "no" would count as true
            raise TypeError(f"{name}: expected True or False, got {value!r}.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a ``value`` that is not one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_size(name: str, value: object, most: int | None = None) -> None:
    """Refuse a value that is not a positive int, or that exceeds ``most``."""
    expected = "a positive int" if most is None else f"an int from 1 to {most}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected {expected}, got {value!r}.")
    if value < 1 or (most is not None and value > most):
        raise ValueError(f"{name}: expected {expected}, got {value}.")


# ---- tensors


def check(
    features: Sequence[Tensor],
    layers: Sequence[Layer],
    gates: Gates,
    parameters: Sequence[Tensor],
    settings: tuple[Any, ...],
    reduced: bool,
) -> Problem:
    """Check all the arguments that make up a problem, and describe it.

    ``layers`` and ``gates`` must have passed :func:`check_structure`. ``parameters`` are those that :func:`flatten`
    returns for them, possibly cast. ``settings`` are the :data:`SETTINGS`, with None for iterations to be inferred;
    ``reduced`` is that of :class:`Problem`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was passed.
    """
    options = {name: value for name, value in zip(SETTINGS, settings, strict=True)}
    total = options["iterations"] = len(layers) if options["iterations"] is None else options["iterations"]
    check_options(**options)
    if len(layers) != 1 and len(layers) != total:  # not `in`: PyTorch 2.4 miscompiles that when total is symbolic
        raise ValueError(f"layers: expected {total} of them (one per iteration) or 1 (shared), got {len(layers)}.")
    if options["form"] == "paper":
        options.update(joint="raw", dropout=0.0)
    options["dropout"], options["temperature"] = float(options["dropout"]), float(options["temperature"])
    problem = Problem(*_check_features(features), **options, reduced=reduced, shared=len(layers) == 1)
    _check_presence(problem, layers, gates)
    for (name, shape), given in zip(expected_tensors(problem), parameters, strict=True):
        _check_parameter(name, given, shape, features[0], modality_names(len(features))[0])
    return problem


def check_flat(features: Sequence[Tensor], parameters: Sequence[Tensor], settings: Sequence[Any]) -> Problem:
    """Check a call whose parameters are one list, in the order of :func:`flatten`.

    ``settings`` are the fields of :class:`Problem` from iterations on.
    """
    _check_modalities(features)
    options = dict(zip([field.name for field in fields(Problem)[3:]], settings, strict=True))
    keep = options.pop("keep")  # the operator checks this one, because it knows the pieces
    check_options(**options)
    problem = Problem(*_check_features(features), **options)
    count = sum(1 for _ in expected_tensors(problem))
    if len(parameters) != count:
        raise ValueError(f"parameters: expected {count} tensors in the order of flatten(), got {len(parameters)}.")
    chosen = tuple(options[name] for name in SETTINGS)
    checked = check(features, *unflatten(problem, parameters), parameters, chosen, problem.reduced)
    return replace(checked, keep=keep)


def check_structure(features: Sequence[Tensor], layers: Sequence[Layer], gates: Gates) -> None:
    """Refuse arguments that are not the expected nested sequences of tensors; the tensors themselves are not
    checked."""
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"features: expected a sequence of tensors, one per modality, got {_kind(features)}.")
    _check_modalities(features)
    for name, x in zip(modality_names(len(features)), features, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor [B, L, d], got {_kind(x)}.")
        if x.is_nested:
            raise TypeError(
                f"{name}: expected a strided (dense) tensor, got a nested one (layout {x.layout}); pad it, by "
                "torch.nested.to_padded_tensor(x, 0.0, (B, L, d)), and pass lengths=x.offsets().diff()."
            )
    if isinstance(layers, Tensor) or not isinstance(layers, Sequence) or len(layers) == 0:
        raise TypeError(f"layers: expected Layers in a sequence, one per iteration or one shared, got {_kind(layers)}.")
    for t, layer in enumerate(layers):
        if not isinstance(layer, tuple) or len(layer) != 4:
            raise TypeError(f"layers[{t}]: expected a Layer(query, key, value, output), got {_kind(layer)}.")
        if layer[0] is not None:
            _check_linear(f"layers[{t}].query", layer[0])
        for kind, group in zip(("key", "value", "output"), layer[1:], strict=True):
            _check_group(f"layers[{t}].{kind}", group, len(features))
    if isinstance(gates, Tensor) or not isinstance(gates, Sequence):
        raise TypeError(f"gates: expected a sequence of gates per modality, got {_kind(gates)}.")
    for m, group in enumerate(gates):
        _check_group(f"gates[{m}]", group, None)


def _check_modalities(features: Sequence[Tensor]) -> None:
    if not MODALITIES[0] <= len(features) <= MODALITIES[1]:
        raise ValueError(f"features: expected {MODALITIES[0]} to {MODALITIES[1]} modalities, got {len(features)}.")


def _kind(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def _check_group(name: str, group: object, count: int | None) -> None:
    if not isinstance(group, (tuple, list)):
        raise TypeError(f"{name}: expected a tuple of Linear, got {_kind(group)}.")
    if count is not None and len(group) != count:
        raise ValueError(f"{name}: expected {count} Linear, one per modality, got {len(group)}.")
    for i, linear in enumerate(group):
        _check_linear(f"{name}[{i}]", linear)


def _check_linear(name: str, linear: object) -> None:
    if not isinstance(linear, tuple) or len(linear) != 2:
        raise TypeError(f"{name}: expected a Linear(weight, bias), got {_kind(linear)}.")
    if not isinstance(linear[0], Tensor):
        raise TypeError(f"{name}.weight: expected a tensor, got {_kind(linear[0])}.")
    if linear[1] is not None and not isinstance(linear[1], Tensor):
        raise TypeError(f"{name}.bias: expected a tensor or None, got {_kind(linear[1])}.")


def check_lengths_values(lengths: Tensor, length: int) -> None:
    """Refuse lengths outside 0..L. This reads the values, so call it only where they are available."""
    if lengths.numel() and not (int(lengths.min()) >= 0 and int(lengths.max()) <= length):
        raise ValueError(
            f"lengths: expected values from 0 to L = {length}, got {int(lengths.min())} to {int(lengths.max())}."
        )


def _check_features(features: Sequence[Tensor]) -> tuple[int, int, tuple[int, ...]]:
    names = modality_names(len(features))
    for name, x in zip(names, features, strict=True):
        if x.layout is not torch.strided:
            raise TypeError(
                f"{name}: expected a strided (dense) tensor, got layout {x.layout}; make it one by x.to_dense()."
            )
        if x.dim() != 3:
            raise ValueError(
                f"{name}: expected 3 dimensions [B, L, d], got {x.dim()} in a tensor of shape {list(x.shape)}."
            )
        if x.dtype not in DTYPES:
            listed = ", ".join(str(dtype) for dtype in DTYPES)
            raise TypeError(f"{name}: expected one of {listed}, got {x.dtype}.")
        if x.shape[1] < 1 or x.shape[2] < 1:
            raise ValueError(f"{name}: expected L >= 1 and d >= 1, got shape {list(x.shape)}.")
    first = features[0]
    for name, x in zip(names[1:], features[1:], strict=True):
        if x.shape[0] != first.shape[0] or x.shape[1] != first.shape[1]:
            raise ValueError(
                f"{name}: expected the batch and length of {names[0]}, {list(first.shape[:2])}, "
                f"got {list(x.shape[:2])} in a tensor of shape {list(x.shape)}."
            )
        _check_like(name, x, first, names[0])
    return first.shape[0], first.shape[1], tuple(x.shape[2] for x in features)


def _check_presence(problem: Problem, layers: Sequence[Layer], gates: Gates) -> None:
    """Refuse a missing or superfluous W_q or bias, and a wrong number of gates."""
    for t, layer in enumerate(layers):
        if problem.projected and layer[0] is None:
            raise TypeError(f"layers[{t}].query: expected a Linear(weight, bias), got None; joint='raw' has none.")
        if not problem.projected and layer[0] is not None:
            where = "with joint='raw'" if problem.released else "in the paper form"
            raise ValueError(f"layers[{t}].query: expected None {where}, which has no W_q, got a Linear.")
    ways, count = problem.gate_ways, len(problem.widths)
    if len(gates) != count and (ways or len(gates) > 0):
        raise ValueError(f"gates: expected {count} entries, one per modality, got {len(gates)}.")
    for m, group in enumerate(gates):
        if len(group) != len(ways):
            raise ValueError(f"gates[{m}]: expected {len(ways)} gates for gating={problem.gating!r}, got {len(group)}.")
    for (name, rows, _), linear in zip(expected_linears(problem), every_linear(layers, gates), strict=True):
        if problem.released and linear[1] is None:
            raise TypeError(f"{name}.bias: expected a tensor of shape {[rows]}, got None.")
        if not problem.released and linear[1] is not None:
            raise ValueError(f"{name}.bias: expected None in the paper form, which has no biases, got a tensor.")


def expected_linears(problem: Problem) -> Iterator[tuple[str, int, int]]:
    """Yield the name, rows and columns of every linear map of a problem, in the order of :func:`flatten`."""
    length, width = problem.length, problem.width
    for t in range(1 if problem.shared else problem.iterations):
        if problem.projected:
            yield f"layers[{t}].query", width, width
        for kind in ("key", "value", "output"):
            for m, d_m in enumerate(problem.widths):
                rows, columns = {"key": (length, length), "value": (d_m, d_m), "output": (d_m, width)}[kind]
                yield f"layers[{t}].{kind}[{m}]", rows, columns
    for m, d_m in enumerate(problem.widths):
        for g, rows in enumerate(problem.gate_ways):
            yield f"gates[{m}][{g}]", rows, d_m


def expected_tensors(problem: Problem) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every weight and bias."""
    for name, rows, columns in expected_linears(problem):
        yield f"{name}.weight", (rows, columns)
        if problem.released:
            yield f"{name}.bias", (rows,)


def _check_parameter(name: str, given: object, shape: tuple[int, ...], like: Tensor, first: str) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {list(shape)}, got {type(given).__name__}.")
    if given.dim() != len(shape) or any(size != expected for size, expected in zip(given.shape, shape, strict=True)):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(given.shape)}.")
    _check_like(name, given, like, first, "; convert one of them or run under torch.autocast")


def _check_like(name: str, x: Tensor, like: Tensor, first: str, advice: str = "") -> None:
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype}, as {first} has, got {x.dtype}{advice}.")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, as {first} has, got {x.device}.")


def refuse_memory(what: str, index: int, x: Tensor) -> NoReturn:
    """Refuse a tensor that turned out to have no memory when its address was taken. C++ calls this too."""
    if x.layout is not torch.strided:
        raise TypeError(
            f"{what}[{index}]: expected a strided tensor, got layout {x.layout}; make it one by x.to_dense()."
        )
    raise ValueError(
        f"{what}[{index}]: expected a tensor with memory, got one of shape {list(x.shape)} whose storage was freed. "
        "Sharding frees parameters between calls, and has to gather those of the whole block before one."
    )


def check_seed(seed: object, like: Tensor) -> None:
    """Refuse a seed that is neither an int nor one int64 value on the device of ``like``."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed: expected one int64 value, got {seed.dtype} of shape {list(seed.shape)}.")
        if seed.device != like.device:
            raise ValueError(f"seed: expected device {like.device}, as the features have, got {seed.device}.")
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, an int64 tensor of one value or None, got {seed!r}.")


def check_lengths(lengths: Tensor, batch: int, like: Tensor) -> None:
    """Refuse lengths that are not an integer tensor [B] on the device of ``like``."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths: expected an integer tensor [B], got {type(lengths).__name__}.")
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected an integer dtype, got {lengths.dtype}.")
    if lengths.dim() != 1 or lengths.shape[0] != batch:
        raise ValueError(f"lengths: expected shape [B] = [{batch}], got {list(lengths.shape)}.")
    if lengths.device != like.device:
        raise ValueError(f"lengths: expected device {like.device}, as the features have, got {lengths.device}.")


# ---- the flat order in which kernels take parameters


def every_linear(layers: Sequence[Layer], gates: Gates) -> list[Linear]:
    """Return per iteration W_q (if there is one), key, value and output, then the gates of each modality."""
    found: list[Linear] = []
    for query, key, value, output in layers:
        if query is not None:
            found.append(query)
        found += (*key, *value, *output)
    for group in gates:
        found += group
    return found


def flatten(layers: Sequence[Layer], gates: Gates) -> list[Tensor]:
    """Return the weights and biases of :func:`every_linear` as one list."""
    return [tensor for linear in every_linear(layers, gates) for tensor in linear if tensor is not None]


def unflatten(problem: Problem, parameters: Sequence[Tensor]) -> tuple[tuple[Layer, ...], Gates]:
    """Invert :func:`flatten`."""
    tensors = iter(parameters)
    count = len(problem.widths)

    def linear() -> Linear:
        return Linear(next(tensors), next(tensors) if problem.released else None)

    def group(n: int) -> tuple[Linear, ...]:
        return tuple(linear() for _ in range(n))

    layers = tuple(
        Layer(linear() if problem.projected else None, group(count), group(count), group(count))
        for _ in range(1 if problem.shared else problem.iterations)
    )
    return layers, tuple(group(len(problem.gate_ways)) for _ in range(count))
