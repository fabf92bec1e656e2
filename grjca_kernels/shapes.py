"""What a legal problem is. Every refusal of bad input is worded here, before anything is computed.

Letters are those of ``operator.md``: B batch, L sequence length, M modalities of widths d_m, d their sum, T iterations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMS = ("released", "paper")
GATINGS = ("none", "dynamic", "flat", "hierarchical")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_ITERATIONS = 8
MODALITIES = (2, 4)  # fewest and most


class Linear(NamedTuple):
    """y = x W^T + b with ``weight`` [out, in] and ``bias`` [out], as in torch.nn.Linear."""

    weight: Tensor
    bias: Tensor | None = None


class Layer(NamedTuple):
    """Parameters of one iteration; the tuples hold one entry per modality, visual first.

    ``query`` is W_q [d, d] (None in the paper form), ``key`` W_k,m [L, L], ``value`` W_v,m [d_m, d_m], ``output`` W_h,m
    [d_m, d].
    """

    query: Linear | None
    key: tuple[Linear, ...]
    value: tuple[Linear, ...]
    output: tuple[Linear, ...]


Gates = tuple[tuple[Linear, ...], ...]
"""Per modality the gates in the order stage 1..T, final ("hierarchical"), one gate ("flat", "dynamic") or none."""


@dataclass(frozen=True)
class Problem:
    """All of a call that is not a tensor. :func:`check` builds it, so holding one means that the input was legal."""

    batch: int
    length: int
    widths: tuple[int, ...]
    iterations: int
    gating: str
    form: str
    dropout: float
    temperature: float
    normalize: bool
    shared: bool

    @property
    def width(self) -> int:
        """d, the width of the joint features."""
        return sum(self.widths)

    @property
    def released(self) -> bool:
        return self.form == "released"

    @property
    def gate_ways(self) -> tuple[int, ...]:
        return gate_ways(self.gating, self.iterations)


def gate_ways(gating: str, iterations: int) -> tuple[int, ...]:
    """Number of ways of each gate of one modality, in the order of :data:`Gates`."""
    if gating == "hierarchical":
        return (*range(2, iterations + 2), iterations)
    return {"none": (), "dynamic": (2,), "flat": (iterations + 1,)}[gating]


def modality_names(count: int) -> tuple[str, ...]:
    """Names used in messages."""
    return ("visual", "audio") if count == 2 else tuple(f"features[{m}]" for m in range(count))


# ---- options


def check_options(
    *, iterations: int, gating: str, form: str, dropout: float, temperature: float, backend: str | None = None
) -> None:
    """Refuse options outside the contract with ValueError or TypeError."""
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations: expected an int from 1 to {MAX_ITERATIONS}, got {iterations!r}.")
    if not 1 <= iterations <= MAX_ITERATIONS:
        raise ValueError(f"iterations: expected 1 to {MAX_ITERATIONS}, got {iterations}.")
    check_choice("gating", gating, GATINGS)
    check_choice("form", form, FORMS)
    check_number("dropout", dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability p with 0 <= p < 1, got {dropout}.")
    check_number("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a ``value`` that is not one of ``choices``."""
    listed = ", ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {listed}, got {value!r}.")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}.")


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Refuse a ``value`` that is not a bool: "no" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}.")


def check_size(name: str, value: object) -> None:
    """Refuse a width or length that is not a positive int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a positive int, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value}.")


# ---- tensors


MOST_REMEMBERED = 512
_legal: dict[Any, Problem] = {}


def check(
    features: Sequence[Tensor],
    layers: Sequence[Layer],
    gates: Gates,
    *,
    seed: Tensor | int | None = None,
    **options: Any,
) -> Problem:
    """Check one call and describe it. One that is like an earlier and legal one is only compared with that.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if torch.compiler.is_compiling():
        return _check(features, layers, gates, seed=seed, **options)
    call = features, layers, gates, seed if isinstance(seed, Tensor) else type(seed)
    try:
        key = _likeness(call), *((name, _likeness(value)) for name, value in options.items())
        problem = _legal.get(key)
    except TypeError:  # a size that is a symbol cannot be looked up
        return _check(features, layers, gates, seed=seed, **options)
    if problem is None:
        problem = _check(features, layers, gates, seed=seed, **options)
        if len(_legal) >= MOST_REMEMBERED:
            _legal.clear()
        _legal[key] = problem
    return problem


def _likeness(value: Any) -> Any:
    """All of an argument that its check looks at; equal for no two of which only one is legal."""
    if isinstance(value, Tensor):
        return value.is_nested or value.shape, value.dtype, value.device, value.layout  # a nested one may have no shape
    if isinstance(value, (tuple, list)):
        return type(value), *map(_likeness, value)
    return type(value), value


def _check(
    features: Sequence[Tensor],
    layers: Sequence[Layer],
    gates: Gates,
    *,
    iterations: int | None = None,
    gating: str = "flat",
    form: str = "released",
    dropout: float = 0.0,
    temperature: float = 0.1,
    normalize: bool = False,
    lengths: Tensor | None = None,
    seed: Tensor | int | None = None,
) -> Problem:
    check_structure(features, layers, gates)
    check_flag("normalize", normalize)
    total = len(layers) if iterations is None else iterations
    check_options(iterations=total, gating=gating, form=form, dropout=dropout, temperature=temperature)
    if len(layers) != 1 and len(layers) != total:  # not `in`: PyTorch 2.4 compiles that wrongly where total is symbolic
        raise ValueError(f"layers: expected {total} of them (one per iteration) or 1 (shared), got {len(layers)}.")

    batch, length, widths = _check_features(features)
    problem = Problem(
        batch=batch,
        length=length,
        widths=widths,
        iterations=total,
        gating=gating,
        form=form,
        dropout=float(dropout) if form == "released" else 0.0,
        temperature=float(temperature),
        normalize=normalize,
        shared=len(layers) == 1,
    )
    like = features[0]
    names = modality_names(len(features))
    for name, given, shape in _expected_parameters(problem, layers, gates):
        _check_parameter(name, given, shape, like, names[0])
    if lengths is not None:
        _check_lengths_tensor(lengths, batch, like)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed: expected one int64 value, got {seed.dtype} of shape {list(seed.shape)}.")
        if seed.device != like.device:
            raise ValueError(f"seed: expected device {like.device}, as {names[0]} has, got {seed.device}.")
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed: expected an int, an int64 tensor of one value or None, got {seed!r}.")
    return problem


def check_structure(features: Sequence[Tensor], layers: Sequence[Layer], gates: Gates) -> None:
    """Refuse arguments that are not the nested sequences of tensors they should be, whatever the tensors hold."""
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"features: expected a sequence of tensors, one per modality, got {_kind(features)}.")
    if not MODALITIES[0] <= len(features) <= MODALITIES[1]:
        raise ValueError(f"features: expected {MODALITIES[0]} to {MODALITIES[1]} modalities, got {len(features)}.")
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
    """Refuse lengths outside 0..L. Reads the values, so it is called where they are known."""
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
        if x.dtype != first.dtype:
            raise TypeError(f"{name}: expected dtype {first.dtype}, as {names[0]} has, got {x.dtype}.")
        if x.device != first.device:
            raise ValueError(f"{name}: expected device {first.device}, as {names[0]} has, got {x.device}.")
    return first.shape[0], first.shape[1], tuple(x.shape[2] for x in features)


_Expected = tuple[str, Tensor | None, tuple[int, ...] | None]  # name, tensor, its shape or None for "must be absent"


def _expected_parameters(problem: Problem, layers: Sequence[Layer], gates: Gates) -> Iterator[_Expected]:
    def linear(name: str, given: Linear | None, rows: int, columns: int) -> Iterator[_Expected]:
        if given is None:
            raise TypeError(f"{name}: expected a Linear(weight, bias), got None.")
        yield f"{name}.weight", given[0], (rows, columns)
        yield f"{name}.bias", given[1], (rows,) if problem.released else None

    length, width, count = problem.length, problem.width, len(problem.widths)
    for t, layer in enumerate(layers):
        if problem.released:
            yield from linear(f"layers[{t}].query", layer[0], width, width)
        elif layer[0] is not None:
            raise ValueError(f"layers[{t}].query: expected None in the paper form, which has no W_q, got a Linear.")
        for kind, group in zip(("key", "value", "output"), layer[1:], strict=True):
            for m, d_m in enumerate(problem.widths):
                rows, columns = {"key": (length, length), "value": (d_m, d_m), "output": (d_m, width)}[kind]
                yield from linear(f"layers[{t}].{kind}[{m}]", group[m], rows, columns)
    ways = problem.gate_ways
    if not ways and len(gates) == 0:
        return
    if len(gates) != count:
        raise ValueError(f"gates: expected {count} entries, one per modality, got {len(gates)}.")
    for m, d_m in enumerate(problem.widths):
        if len(gates[m]) != len(ways):
            raise ValueError(
                f"gates[{m}]: expected {len(ways)} gates for gating={problem.gating!r}, got {len(gates[m])}."
            )
        for g, rows in enumerate(ways):
            yield from linear(f"gates[{m}][{g}]", gates[m][g], rows, d_m)


def _check_parameter(name: str, given: Tensor | None, shape: tuple[int, ...] | None, like: Tensor, first: str) -> None:
    if shape is None:
        if given is not None:
            raise ValueError(f"{name}: expected None in the paper form, which has no biases, got a tensor.")
        return
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {list(shape)}, got {type(given).__name__}.")
    if given.dim() != len(shape) or any(size != expected for size, expected in zip(given.shape, shape, strict=True)):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(given.shape)}.")
    if given.dtype != like.dtype:
        raise TypeError(
            f"{name}: expected dtype {like.dtype}, as {first} has, got {given.dtype}; "
            "convert one of them or run under torch.autocast."
        )
    if given.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, as {first} has, got {given.device}.")


def _check_lengths_tensor(lengths: Tensor, batch: int, like: Tensor) -> None:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths: expected an integer tensor [B], got {type(lengths).__name__}.")
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected an integer dtype, got {lengths.dtype}.")
    if lengths.dim() != 1 or lengths.shape[0] != batch:
        raise ValueError(f"lengths: expected shape [B] = [{batch}], got {list(lengths.shape)}.")
    if lengths.device != like.device:
        raise ValueError(f"lengths: expected device {like.device}, as the features have, got {lengths.device}.")


# ---- the flat order in which operators take parameters


def flatten(layers: Sequence[Layer], gates: Gates) -> list[Tensor]:
    """Parameters as one list: per iteration W_q, b_q, then key, value, output (per modality W, b); then the gates."""
    groups = [
        linear
        for layer in layers
        for linear in (*(() if layer[0] is None else (layer[0],)), *layer[1], *layer[2], *layer[3])
    ]
    groups += [linear for modality in gates for linear in modality]
    return [tensor for linear in groups for tensor in linear if tensor is not None]


def parameter_count(problem: Problem) -> int:
    """Length of that list."""
    modalities = len(problem.widths)
    layers = 1 if problem.shared else problem.iterations
    linears = layers * (3 * modalities + problem.released) + modalities * len(problem.gate_ways)
    return linears * (2 if problem.released else 1)


def unflatten(problem: Problem, parameters: Sequence[Tensor]) -> tuple[tuple[Layer, ...], Gates]:
    """Inverse of :func:`flatten`."""
    tensors = iter(parameters)
    count = len(problem.widths)

    def linear() -> Linear:
        return Linear(next(tensors), next(tensors) if problem.released else None)

    def linears(n: int) -> tuple[Linear, ...]:
        return tuple(linear() for _ in range(n))

    layers = tuple(
        Layer(linear() if problem.released else None, linears(count), linears(count), linears(count))
        for _ in range(1 if problem.shared else problem.iterations)
    )
    gates = tuple(linears(len(problem.gate_ways)) for _ in range(count))
    return layers, gates
