"""Recognition of the authors' blocks by running a copy, where names and shapes are not enough.

The copy is in float64 on the CPU, with random weights large enough that tanh and softmax are neither linear nor
constant, so the result does not depend on how far the block is trained. Its outputs, and its gradients for the inputs
and all weights, are compared with those of GatedRJCAFused with the same weights. The block itself is never run.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from grjca_kernels import reference
from grjca_kernels.call import describe
from grjca_kernels.problem import SETTINGS, Linear

if TYPE_CHECKING:
    from grjca_kernels.module import GatedRJCAFused

BATCH = 2
SPREAD = 1.5
"""The root mean square of the arguments of tanh and softmax."""
BOUND = 1e-6
"""The largest allowed difference relative to the largest value: rounding causes 1e-12, another formula 1e-2."""
CHOICES: dict[str, tuple[Any, ...]] = {"joint": ("projected", "raw"), "normalize": (False, True)}
"""Options that do not change names or shapes."""
NO_CHECK = "pass check=False to leave this comparison out"


class Found(NamedTuple):
    """The results of a block.

    They are which ``output`` of GatedRJCAFused it returns, all its values, and the gradients for its inputs and
    parameters.
    """

    output: str
    values: list[Tensor]
    of_inputs: list[Tensor] | None
    of_parameters: dict[str, Tensor]


@torch.inference_mode(False)
def recognise(
    block: nn.Module,
    config: Mapping[str, Any],
    fixed: Mapping[str, Any],
    names: Mapping[str, str],
    build: Callable[[Mapping[str, Any], Mapping[str, Tensor]], GatedRJCAFused],
) -> dict[str, Any]:
    """Return the options, besides ``config``, with which GatedRJCAFused computes what ``block`` does.

    Options in ``fixed`` are not searched. ``names`` maps our parameter names to those in the block; ``build`` makes the
    module from options and weights.

    Raises:
        ValueError: if the block cannot be copied or run, if no choice reproduces it, or if its dropout differs.
    """
    choices = {name: (fixed[name],) if name in fixed else values for name, values in CHOICES.items()}
    with _generators_kept():
        probe, x = _copy_of(block, names.values()), _features(config)
        output = _run(probe, x).output
        error, options = math.inf, {**config}
        for values in product(*choices.values()):
            tried = {**dict(zip(choices, values, strict=True)), "output": output}
            found = _error_of(probe, x, {**config, **fixed, **tried}, names, build)
            if found <= error:
                error, options = found, tried
            if error <= BOUND:
                break
        if not error <= BOUND:
            said = ", ".join(f"{name}={options[name]!r}" for name in CHOICES)
            raise ValueError(
                f"source: expected a {type(block).__name__} that computes what its weights say, but on a random batch, "
                f"with random weights, it differs from GatedRJCAFused by {error:.2g} of the largest value, at best "
                f"({said}), where {BOUND} is allowed. It is another operator, or is set up otherwise: pass what "
                f"differs (temperature, ...), or {NO_CHECK}."
            )
        dropout = declared(probe, fixed) if "dropout" in fixed else _dropout(probe, x, len(x) * config["iterations"])
    return {**dropout, **options}


def _error_of(
    probe: nn.Module,
    x: Sequence[Tensor],
    options: Mapping[str, Any],
    names: Mapping[str, str],
    build: Callable[[Mapping[str, Any], Mapping[str, Tensor]], GatedRJCAFused],
) -> float:
    """Return the difference between the block and GatedRJCAFused with these options, both with suitably scaled
    weights."""
    like = {"backend": "reference", "dtype": torch.float64, "device": "cpu"}
    held = _held(probe)
    ours = build({**options, **like}, {of: held[name] for of, name in names.items()}).eval()
    _spread(ours, x)
    with torch.no_grad():
        for of, parameter in ours.named_parameters():
            held[names[of]].copy_(parameter)
        for of, parameter in ours.named_parameters():  # if the block ties weights, the last one counts
            parameter.copy_(held[names[of]])
    ids = [id(held[name]) for name in names.values()]
    alone = {of: name for of, name in names.items() if ids.count(id(held[name])) == 1}
    error = _error(_run(probe, x), _run(ours, x), alone)
    if error <= BOUND:  # repeat for large frames, some of them 0
        far = [10 * of.index_fill(1, torch.tensor([0], device="cpu"), 0) for of in x]
        error = max(error, _error(_run(probe, far), _run(ours, far), None))
    return error


# ---- the copy


def _copy_of(block: nn.Module, names: Iterable[str]) -> nn.Module:
    """Return a copy in evaluation mode, with random weights of the usual size; tied weights stay tied."""
    try:
        probe = copy.deepcopy(block).to("cpu", torch.float64).eval()
    except Exception as error:
        raise ValueError(
            f"source: expected a block that can be copied to the CPU and run there, but that raised "
            f"{type(error).__name__}: {error} To load the weights as they are, {NO_CHECK}."
        ) from error
    generator = torch.Generator().manual_seed(1)
    buffers = dict(probe.named_buffers())
    for tensor in (*probe.parameters(), *(buffers[name] for name in names if name in buffers)):
        if tensor.is_floating_point():
            size = math.sqrt(tensor.shape[-1]) if tensor.dim() > 1 else 3
            tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu") / size
    return probe.requires_grad_(True)


def _held(probe: nn.Module) -> dict[str, Tensor]:
    return {**dict(probe.named_buffers()), **dict(probe.named_parameters(remove_duplicate=False))}


def _features(config: Mapping[str, Any]) -> list[Tensor]:
    widths = config["dim_visual"]
    widths = [*widths] if isinstance(widths, Sequence) else [widths, config["dim_audio"]]
    generator, size = torch.Generator().manual_seed(0), (BATCH, config["length"])
    return [torch.randn(*size, d_m, generator=generator, dtype=torch.float64, device="cpu") for d_m in widths]


@torch.no_grad()
def _spread(module: GatedRJCAFused, x: Sequence[Tensor]) -> None:
    """Scale the weights until tanh and softmax receive values of about 1."""
    layers, gates = module.parameters_by_role()
    settings = {name: getattr(module, name) for name in SETTINGS}
    settings.update(gating=module.gating if gates else "none", dropout=0.0)
    problem = describe(x, layers, gates, **settings).problem

    def scale(linear: Linear, found: Tensor) -> None:
        for tensor in linear:
            if tensor is not None:
                tensor.mul_(SPREAD / found.square().mean().sqrt().clamp_min(1e-30))

    states = [reference.initial(problem.normalize, x_m, None) for x_m in x]
    for t in range(problem.iterations):
        layer = layers[0 if problem.shared else t]
        joint = torch.cat(states, dim=-1)
        joint = joint if layer.query is None else reference.linear(joint, layer.query)
        for m, x_m in enumerate(states):
            key = reference.linear(x_m.mT, layer.key[m])
            scale(layer.key[m], key @ joint / math.sqrt(problem.width))
            _, value, correlation, *_ = reference.attend(problem, x_m, joint, m, layer, t, None, None)
            scale(layer.value[m], value @ correlation)
        states = reference.iterate(problem, states, layer, t, None, None)
    for x_m, of_modality in zip(states, gates, strict=False):
        for gate in of_modality:
            scale(gate, reference.linear(x_m, gate) / problem.temperature)


# ---- running


@contextmanager
def _generators_kept() -> Iterator[None]:
    pythons, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False), torch.enable_grad():
            yield
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)


def _run(block: nn.Module, x: Sequence[Tensor]) -> Found:
    x = [of.detach().clone().requires_grad_() for of in x]
    try:
        returned = block(*x)
    except Exception as error:
        raise ValueError(
            f"source: expected a block that takes {' and '.join(str(list(of.shape)) for of in x)}, but its forward "
            f"raised {type(error).__name__}: {error} To load the weights as they are, {NO_CHECK}."
        ) from error
    output, values = _taken_apart(returned, x)
    weighted = [(value * _cotangent(value)).sum() for value in values if value.requires_grad]
    parameters = {name: of for name, of in block.named_parameters() if of.requires_grad}
    if not weighted:
        return Found(output, values, None, {})
    gradients = torch.autograd.grad(sum(weighted), [*x, *parameters.values()], allow_unused=True)  # type: ignore[arg-type]
    found = [
        torch.zeros_like(of) if g is None else g for of, g in zip([*x, *parameters.values()], gradients, strict=True)
    ]
    return Found(output, values, found[: len(x)], dict(zip(parameters, found[len(x) :], strict=True)))


def _taken_apart(returned: Any, x: Sequence[Tensor]) -> tuple[str, list[Tensor]]:
    """Return which ``output`` the returned value is, and its tensors."""
    shapes, count = [of.shape for of in x], len(x)
    if isinstance(returned, Tensor) and returned.shape == (*shapes[0][:2], sum(shape[2] for shape in shapes)):
        return "concat", [returned]
    if isinstance(returned, (tuple, list)) and len(returned) == count:
        if [getattr(of, "shape", None) for of in returned] == shapes:
            return "pair", [*returned]
        if all(isinstance(of, (tuple, list)) for of in returned):
            iterates = [one for of in returned for one in of]
            expected = [shape for of, shape in zip(returned, shapes, strict=True) for _ in of]
            if len({len(of) for of in returned}) == 1 and [getattr(of, "shape", None) for of in iterates] == expected:
                return "iterates", iterates
    raise ValueError(
        f"source: expected a block that returns its outputs, their concatenation, or lists of the iterates, got "
        f"{_kind(returned)}. To load the weights as they are, {NO_CHECK}."
    )


def _kind(returned: Any) -> str:
    if isinstance(returned, Tensor):
        return f"a tensor of shape {list(returned.shape)}"
    if isinstance(returned, (tuple, list)):
        return f"a {type(returned).__name__} of {', '.join(map(_kind, returned)) or 'nothing'}"
    return f"a {type(returned).__name__}"


def _cotangent(value: Tensor) -> Tensor:
    """Return the random weights of the values in a loss."""
    generator = torch.Generator().manual_seed(value.numel())
    return torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu")


def _error(theirs: Found, ours: Found, names: Mapping[str, str] | None) -> float:
    """Return the largest difference relative to the largest value of its kind; compare gradients only with
    ``names``."""
    if len(theirs.values) != len(ours.values) or theirs.of_inputs is None or ours.of_inputs is None:
        return math.inf
    errors = [_difference(*pair) for pair in zip(theirs.values, ours.values, strict=True)]
    if names is not None:
        errors += [_difference(*pair) for pair in zip(theirs.of_inputs, ours.of_inputs, strict=True)]
        size = max(float(g.abs().max()) for g in ours.of_parameters.values())
        for name, gradient in ours.of_parameters.items():
            if names.get(name) in theirs.of_parameters:  # the others are tied, or buffers
                errors.append(_difference(theirs.of_parameters[names[name]], gradient, size * 1e-3))
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def _difference(a: Tensor, b: Tensor, least: float = 1e-30) -> float:
    if a.numel() == 0:
        return 0.0
    return float((a.detach() - b.detach()).abs().max() / max(float(b.detach().abs().max()), least))


# ---- dropout

_SAYING = ("dropout", "dropout_p", "dropout_rate", "drop", "p")
"""Attribute names that may hold a p."""


def _dropout(probe: nn.Module, x: Sequence[Tensor], attentions: int) -> dict[str, float]:
    """Return p of C and U, and p of the gates.

    They come from the modules that drop when the block runs, or from attributes without which nothing is dropped. Any
    other difference between training and evaluation is refused, because it would be lost.
    """
    modules = {name: of for name, of in probe.named_modules() if isinstance(of, _DropoutNd) and of.p > 0}
    calls = dict.fromkeys(modules, 0)

    def count(name: str) -> Callable[..., None]:
        def called(*_: Any) -> None:
            calls[name] += 1

        return called

    hooks = [of.register_forward_hook(count(name)) for name, of in modules.items()]
    still = _run(probe, x).values
    for hook in hooks:
        hook.remove()
    acting = {name: of for name, of in modules.items() if calls[name]}
    recursion = {name: float(of.p) for name, of in acting.items() if "dcn_layers" in name}
    gates = {name: float(of.p) for name, of in acting.items() if "temporal_encoder" in name}
    others = [name for name in acting if name not in recursion and name not in gates]
    others += [name for name in (*recursion, *gates) if type(acting[name]) is not nn.Dropout]
    for of in modules.values():
        of.p = 0.0
    if not _same_in_training(probe, x, still):
        said = {
            f"{name}.{attribute}".lstrip("."): (of, attribute, value)
            for name, of in probe.named_modules()
            for attribute in _SAYING
            if isinstance(value := vars(of).get(attribute), float) and 0 < value < 1 and not isinstance(of, _DropoutNd)
        }
        for of, attribute, _ in said.values():
            setattr(of, attribute, 0.0)
        if not said or not _same_in_training(probe, x, still):
            raise ValueError(
                "dropout: expected p, which no module of source says, though in training source does not compute "
                "what it does in evaluation, got None."
            )
        recursion |= {name: value for name, (*_, value) in said.items() if "temporal_encoder" not in name}
        gates |= {name: value for name, (*_, value) in said.items() if "temporal_encoder" in name}
    elif recursion and sum(calls[name] for name in recursion) != 2 * attentions:
        others += [f"{', '.join(recursion)}, {sum(calls[name] for name in recursion)} times in a call"]
    if others:
        raise ValueError(
            f"dropout: expected a source that drops elements of C and U ({2 * attentions} times in a call) and in its "
            f"temporal gates, got {'; '.join(others)}. Pass dropout to have that of GatedRJCAFused."
        )
    return {"dropout": _one("C and U", recursion), "gate_dropout": _one("the gates", gates)}


def _same_in_training(probe: nn.Module, x: Sequence[Tensor], still: Sequence[Tensor]) -> bool:
    found = _run(probe.train(), x).values
    probe.eval()
    return len(found) == len(still) and all(_difference(*pair) < 1e-12 for pair in zip(found, still, strict=True))


def _one(what: str, said: Mapping[str, float]) -> float:
    if len({*said.values()}) > 1:
        listed = ", ".join(f"{p} in {name}" for name, p in said.items())
        raise ValueError(f"source: expected one dropout for {what}, got {listed}; pass dropout.")
    return next(iter(said.values()), 0.0)


def declared(block: nn.Module, fixed: Container[str]) -> dict[str, float]:
    """Return what the Dropout modules of a block say without running it, 0 where there are none; skip ``fixed``
    options."""
    said = {name: of.p for name, of in block.named_modules() if isinstance(of, nn.Dropout)}
    parts = {"dropout": ("C and U", "dcn_layers"), "gate_dropout": ("the gates", "temporal_encoder")}
    return {
        option: _one(what, {name: p for name, p in said.items() if part in name})
        for option, (what, part) in parts.items()
        if option not in fixed
    }
