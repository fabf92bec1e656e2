"""Named problems, the tensors that make them, and one way to run an implementation on them.

Weights are scaled until the scores K J / sqrt(d) spread over the whole of tanh and the gates' logits over the whole of
softmax: near zero both are almost linear and hide mistakes, far out both are constant and hide them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grjca.model.eager import GatedRJCAEager
from grjca_kernels import GatedRJCAFused, Layer, Linear, cpu, reference
from grjca_kernels import problem as problems
from grjca_kernels.call import Call
from grjca_kernels.call import describe as describe_call

BACKENDS = ("reference", "cpu") if cpu.why_not() is None else ("reference",)
SCORES, LOGITS = 1.5, 1.5  # root mean squares: |C| up to 1, gates between 0 and 1
SEED = 0x1234_5678_9ABC_DEF0 - 2**63  # of the masks: negative, and nothing in it is a zero


@dataclass(frozen=True)
class Case:
    """A problem. The defaults are small, odd, and have d_v != d_a."""

    name: str
    batch: int = 2
    length: int = 7
    widths: tuple[int, ...] = (5, 3)
    iterations: int = 2
    gating: str = "flat"
    form: str = "released"
    joint: str = "projected"
    normalize: bool = False
    dropout: float = 0.0
    temperature: float = 0.1
    lengths: tuple[int, ...] | None = None
    shared: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of gated_rjca, all but the tensors."""
        names = ("iterations", "gating", "form", "joint", "normalize", "dropout", "temperature")
        return {**{name: getattr(self, name) for name in names}, "seed": SEED}

    @property
    def projected(self) -> bool:
        """Return whether there is a W_q."""
        return self.form == "released" and self.joint == "projected"


def cases() -> Iterator[Case]:
    for form in problems.FORMS:
        for gating in problems.GATINGS:
            yield Case(f"{form}-{gating}", form=form, gating=gating)
            for iterations in (1, 3, 4, 8):
                if (form == "released") == (iterations in (1, 3, 8)):
                    yield Case(
                        f"{form}-{gating}-T{iterations}", 1, 4, (3, 4), iterations=iterations, form=form, gating=gating
                    )
    yield Case("empty", batch=0)
    yield Case("empty-lengths", batch=0, gating="hierarchical", lengths=(), dropout=0.5, normalize=True)
    yield Case("one-sample", batch=1)
    yield Case("one-frame", length=1)
    yield Case("one-of-all", 1, 1, (1, 1), gating="hierarchical")
    yield Case("width-one", widths=(1, 6), gating="hierarchical", normalize=True)
    yield Case("width-one-second", widths=(4, 1), form="paper")
    yield Case("one-block-and-more", 2, 19, (140, 33), gating="hierarchical")
    yield Case("one-block-and-more-dropout", 1, 33, (33, 140), gating="dynamic", dropout=0.6, normalize=True)
    yield Case("many-terms", 1, 5, (261, 2))
    yield Case("many-rows", 3, 131, (6, 17), normalize=True, lengths=(131, 90, 130))
    yield Case("three-modalities", widths=(5, 2, 4), gating="hierarchical", dropout=0.3, lengths=(3, 7))
    yield Case("four-modalities", widths=(1, 3, 2, 4), iterations=1, shared=True, normalize=True)
    yield Case("normalize", normalize=True)
    yield Case("normalize-paper", normalize=True, form="paper", gating="dynamic")
    yield Case("lengths", 5, 9, lengths=(4, 0, 1, 9, 8), gating="hierarchical")
    yield Case("lengths-paper", 5, 9, lengths=(4, 0, 1, 9, 8), form="paper")
    yield Case("lengths-normalize-dropout", 5, 18, lengths=(9, 0, 1, 18, 17), normalize=True, dropout=0.6)
    yield Case("all-absent", 2, 5, lengths=(0, 0))
    yield Case("dropout", 3, 21, (9, 14), dropout=0.6)
    yield Case("dropout-most", 2, 9, (9, 4), dropout=0.9, gating="dynamic")
    yield Case("dropout-ignored-by-paper", dropout=0.6, form="paper", gating="none")
    yield Case("shared", iterations=3, shared=True, gating="hierarchical")
    yield Case("shared-paper", iterations=4, shared=True, form="paper", gating="flat")
    yield Case("shared-dropout-lengths", 3, 9, iterations=2, shared=True, dropout=0.4, lengths=(9, 2, 5))
    yield Case("warm", temperature=3.0, gating="hierarchical")
    for gating in problems.GATINGS:
        yield Case(f"raw-{gating}", gating=gating, joint="raw")
    yield Case("raw-paper", joint="raw", form="paper")
    yield Case("raw-blocks", 2, 35, (70, 33), 3, "none", joint="raw", dropout=0.4, lengths=(35, 12), normalize=True)
    yield Case("raw-shared", 2, 9, (3, 4, 2), 3, joint="raw", shared=True, dropout=0.3)
    yield Case("T16-hierarchical", 1, 3, (2, 3), 16, "hierarchical")
    yield Case("T16-flat", 1, 3, (2, 3), 16, joint="raw", lengths=(2,))
    yield Case("T16-four-modalities", 1, 2, (2, 1, 1, 2), 16, "hierarchical", dropout=0.2)


CASES = tuple(cases())
BY_NAME = {case.name: case for case in CASES}
EVERYTHING = Case("everything", 3, 11, (6, 9), 3, "hierarchical", normalize=True, dropout=0.3, lengths=(11, 4, 10))
"""All options together, for the tests of one property."""

FULL_SIZE = {
    "GRJCA": Case("GRJCA", 4, 300, (256, 128), gating="flat", normalize=True),
    "HGRJCA": Case("HGRJCA", 2, 300, (256, 128), gating="hierarchical", normalize=True),
    "DCA": Case("DCA", 2, 16, (512, 512), gating="dynamic"),
    "RJCA": Case("RJCA", 2, 16, (512, 512), gating="none"),
    "RJCMA": Case("RJCMA", 2, 300, (256, 128, 128), gating="none", joint="raw"),
    "TAGF": Case("TAGF", 2, 300, (256, 128), gating="none", normalize=True),
}
"""The authors' blocks as they are trained, but for the batch; of TAGF the recursion."""


def spread(cases: Sequence[Case], ways: Sequence[Any]) -> list[tuple[Case, Any]]:
    """Every case in one of the ways: in that which has seen the fewest of the pairs of properties that the case has."""
    seen: dict[Any, set[Any]] = {way: set() for way in ways}
    found = []
    for case in cases:
        pairs = set(combinations(_properties(case).items(), 2))
        way = min(ways, key=lambda way: len(pairs & seen[way]))
        seen[way] |= pairs
        found.append((case, way))
    return found


def _properties(case: Case) -> dict[str, Any]:
    names = ("form", "gating", "iterations", "joint", "normalize", "shared")
    of_sizes = {"modalities": len(case.widths), "stored": case.length > 32, "tiles": max(case.widths) > 32}
    options = {"dropout": case.dropout > 0, "lengths": case.lengths is not None}
    return {name: getattr(case, name) for name in names} | of_sizes | options


# ---- tensors


@dataclass(frozen=True)
class Inputs:
    features: list[Tensor]
    layers: tuple[Layer, ...]
    gates: problems.Gates
    lengths: Tensor | None

    @property
    def parameters(self) -> list[Tensor]:
        return problems.flatten(self.layers, self.gates)

    def map(self, f: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with f applied to every feature and parameter, in the order of problems.flatten."""

        def linear(given: Linear | None) -> Any:
            return given and Linear(*(None if x is None else f(x) for x in given))

        features = [f(x) for x in self.features]
        layers = tuple(
            Layer(linear(layer.query), *(tuple(map(linear, group)) for group in layer[1:])) for layer in self.layers
        )
        return Inputs(features, layers, tuple(tuple(map(linear, group)) for group in self.gates), self.lengths)

    def to(self, dtype: torch.dtype) -> Inputs:
        return self.map(lambda x: x.detach().to(dtype))

    def leaves(self) -> Inputs:
        """Copies that require gradients."""
        return self.map(lambda x: x.detach().clone().requires_grad_())


def describe(case: Case, inputs: Inputs) -> problems.Problem:
    """All of the case that is not a tensor."""
    return described(case, inputs).problem


def described(case: Case, inputs: Inputs, **filled: Any) -> Call:
    """The case as a backend is given it; ``filled`` are the tensors that it fills."""
    options = {**case.options, "lengths": inputs.lengths}
    return describe_call(inputs.features, inputs.layers, inputs.gates, **options)._replace(**filled)


def make(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    """Random tensors of the case, the same in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    width, biased = sum(case.widths), case.form == "released"

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def linear(out: int, features: int, gain: float = 1.0) -> Linear:
        return Linear(normal(out, features) * gain / math.sqrt(features), normal(out) * 0.3 if biased else None)

    layers = tuple(
        Layer(
            linear(width, width) if case.projected else None,
            tuple(linear(case.length, case.length) for _ in case.widths),
            tuple(linear(d_m, d_m) for d_m in case.widths),
            tuple(linear(d_m, width, 0.5) for d_m in case.widths),
        )
        for _ in range(1 if case.shared else case.iterations)
    )
    ways = problems.gate_ways(case.gating, case.iterations)
    gates = tuple(tuple(linear(n, d_m) for n in ways) for d_m in case.widths)
    features = [normal(case.batch, case.length, d_m) for d_m in case.widths]
    lengths = None if case.lengths is None else torch.tensor(case.lengths, dtype=torch.int64)
    inputs = Inputs(features, layers, gates, lengths)
    _scale_scores(case, inputs)
    return inputs.to(dtype)


def _scale_scores(case: Case, inputs: Inputs) -> None:
    """Scale W_k, b_k and the gates, in place, as the module docstring promises."""
    described = describe(case, inputs)
    present = reference.presence(described.length, inputs.lengths)
    x = [reference.initial(described.normalize, x, present) for x in inputs.features]
    for t in range(case.iterations):
        layer = inputs.layers[0 if case.shared else t]
        joint = torch.cat(x, dim=-1)
        joint = joint if layer.query is None else reference.linear(joint, layer.query)
        for x_m, key in zip(x, layer.key, strict=True):
            scores = reference.linear(x_m.mT, key) @ joint / math.sqrt(described.width)
            _scale(key, scores, SCORES, shrink_only=case.shared and t > 0)
        x = reference.iterate(described, x, layer, t, present, None)
    for x_m, of_modality in zip(x, inputs.gates, strict=True):
        for gate in of_modality:
            _scale(gate, reference.linear(x_m, gate) / case.temperature, LOGITS)


def _scale(parameters: Linear, value: Tensor, target: float, shrink_only: bool = False) -> None:
    """Bring the root mean square of ``value``, which is linear in ``parameters``, to ``target``."""
    size = float(value.square().mean().sqrt()) if value.numel() else 0.0
    if size == 0 or (shrink_only and size < target):
        return
    for parameter in parameters:
        if parameter is not None:
            parameter.mul_(target / size)


# ---- running


@dataclass(frozen=True)
class Result:
    """Everything a call returned, and every gradient, by name."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]


def call(function: Callable[..., Any], case: Case, inputs: Inputs, **options: Any) -> dict[str, Tensor]:
    """Outputs, iterates and gate values of ``function``, a gated_rjca, by name."""
    *outputs, extras = function(
        inputs.features,
        inputs.layers,
        inputs.gates,
        lengths=inputs.lengths,
        return_gates=True,
        return_iterates=True,
        **{**case.options, **options},
    )
    named = {f"Y[{m}]": y for m, y in enumerate(outputs)}
    named.update({f"X[{m}]": x for m, x in enumerate(extras["iterates"])})
    for m, values in enumerate(extras["gates"]):
        if values is not None:
            stages = values if isinstance(values, tuple) else (values,)
            named.update({f"G[{m}][{g}]": value for g, value in enumerate(stages)})
    return named


def cotangents(values: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Incoming gradients: the same numbers for every dtype that can hold them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype) for value in values]


def run(
    function: Callable[..., Any], case: Case, inputs: Inputs, rounded: torch.dtype | None = None, **options: Any
) -> Result:
    """Forward and backward. ``rounded``: a dtype to which incoming gradients are rounded first."""
    leaves = inputs.leaves()
    values = call(function, case, leaves, **options)
    incoming = cotangents(list(values.values()))
    if rounded is not None:
        incoming = [gradient.to(rounded).to(gradient.dtype) for gradient in incoming]
    names = [f"features[{m}]" for m in range(len(leaves.features))] + parameter_names(case)
    tensors = leaves.features + leaves.parameters
    gradients = torch.autograd.grad(list(values.values()), tensors, incoming, materialize_grads=True)
    return Result(
        {name: value.detach() for name, value in values.items()},
        {f"d {name}": gradient for name, gradient in zip(names, gradients, strict=True)},
    )


def parameter_names(case: Case) -> list[str]:
    """Names in the order of problems.flatten."""
    kinds = ("weight", "bias") if case.form == "released" else ("weight",)
    linears = []
    for t in range(1 if case.shared else case.iterations):
        linears += [f"layers[{t}].query"] * case.projected
        linears += [
            f"layers[{t}].{group}[{m}]" for group in ("key", "value", "output") for m in range(len(case.widths))
        ]
    ways = problems.gate_ways(case.gating, case.iterations)
    linears += [f"gates[{m}][{g}]" for m in range(len(case.widths)) for g in range(len(ways))]
    return [f"{linear}.{kind}" for linear in linears for kind in kinds]


HALVES = (torch.bfloat16, torch.float16)
STATISTICAL = [
    Case(f"{form}-{gating}-{p}", 8, 48, (40, 24), 2, gating, form, dropout=p, normalize=p == 0)
    for form, p in (("released", 0.0), ("released", 0.4), ("paper", 0.0))
    for gating in problems.GATINGS
]

# ---- the authors' numbers

GOLDEN = ("grjca", "hgrjca", "dca")


DATA = Path(__file__).parent / "data"


def golden(name: str) -> dict[str, Tensor]:
    """``data/<name>.npz`` in float64: visual, audio, cotangent, output, weight/<authors' key>, grad/<authors' key>."""
    with np.load(DATA / f"{name}.npz") as archive:
        return {key: torch.from_numpy(archive[key]).double() for key in archive.files}


def golden_weights(name: str) -> dict[str, Tensor]:
    """The state_dict of the authors' block."""
    return {key.removeprefix("weight/"): value for key, value in golden(name).items() if key.startswith("weight/")}


def golden_results(name: str, backend: str) -> tuple[Result, Result]:
    """Return what ``backend`` computes from the weights of a golden file, and the golden output."""
    theirs = golden(name)
    module = GatedRJCAFused.from_released(golden_weights(name), backend=backend).eval()
    features = [theirs[key].clone().requires_grad_() for key in ("visual", "audio")]
    parameters = problems.flatten(*module.parameters_by_role())
    output = module(*features)
    gradients = torch.autograd.grad(output, features + parameters, theirs["cotangent"])
    keys = {value.data_ptr(): f"grad/{key}" for key, value in module.to_released().items()}
    expected = ["grad/visual", "grad/audio"] + [keys[parameter.data_ptr()] for parameter in parameters]
    assert sorted(expected) == sorted(key for key in theirs if key.startswith("grad/"))
    case = Case(name, iterations=module.iterations, gating=module.gating)
    names = [f"d {name}" for name in ("features[0]", "features[1]", *parameter_names(case))]
    ours = Result({"Y": output.detach()}, dict(zip(names, gradients, strict=True)))
    return ours, Result({"Y": theirs["output"]}, {n: theirs[key] for n, key in zip(names, expected, strict=True)})


def eager_module(case: Case, inputs: Inputs) -> tuple[GatedRJCAEager, list[Tensor]]:
    """The eager module with the parameters of ``inputs``, to evaluate, and its own in the order of problems.flatten."""
    names = ("iterations", "gating", "joint", "normalize", "temperature")
    options = {name: getattr(case, name) for name in names}
    module = GatedRJCAEager(case.widths, length=case.length, dtype=inputs.features[0].dtype, **options).eval()
    parameters = problems.flatten(*module.parameters_by_role())
    with torch.no_grad():
        for parameter, value in zip(parameters, inputs.parameters, strict=True):
            parameter.copy_(value)
    return module, parameters


def forward_arguments(case: Case, inputs: Inputs, concat=False, return_gates=True) -> tuple:
    """Arguments of grjca::forward."""
    seed = torch.tensor(SEED) if case.dropout and case.form == "released" else None
    options = (case.iterations, case.gating, case.form, case.dropout if seed is not None else 0.0, case.temperature)
    flags = (case.normalize, case.shared, concat, return_gates, "cpu")
    later = ("raw",) if case.joint == "raw" else ()  # programs that were exported before it name none
    return inputs.features, inputs.parameters, inputs.lengths, seed, *options, *flags, *later
