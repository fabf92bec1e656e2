"""What a block of the authors computes, where names and shapes do not tell: found by running it.

It runs once, on a small random batch in evaluation mode, and what it returns and sends back is compared with what
GatedRJCAFused makes of its weights. Nothing of it is changed: not its modes, buffers, gradients, nor any generator.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from grjca_kernels.modes import allows_tf32

if TYPE_CHECKING:
    from grjca_kernels.module import GatedRJCAFused

BATCH = 2
CHOICES: dict[str, tuple[Any, ...]] = {"joint": ("projected", "raw"), "normalize": (False, True)}
"""Options that leave names and shapes as they are."""
NO_CHECK = "pass check=False to leave this comparison out"


class Found(NamedTuple):
    """What a block returns: which ``output`` of GatedRJCAFused that is, all of it, and the gradients by its inputs."""

    output: str
    values: list[Tensor]
    gradients: list[Tensor] | None
    projects: bool | None  # whether the values depend on a W_q, where there is one to ask


@torch.inference_mode(False)
def recognise(
    block: nn.Module,
    config: Mapping[str, Any],
    fixed: Mapping[str, Any],
    build: Callable[[Mapping[str, Any]], GatedRJCAFused],
) -> dict[str, Any]:
    """The options beside ``config`` with which GatedRJCAFused computes what ``block`` does; those in ``fixed`` are not
    chosen any more.

    ``build`` makes the module of an option, in float64 and with the weights of the block.

    Raises:
        ValueError: if the block cannot be run, if no choice reproduces it, or if several do.
    """
    dtype, device = config["dtype"], torch.device(config["device"])
    if dtype.itemsize < 4:  # rounding would hide what is to be told apart
        block, dtype = copy.deepcopy(block).float(), torch.float32
    x = _features(config, dtype, device)
    with _untouched(block, device):
        found = _run(block, x)
    chosen: dict[str, Any] = {}
    if config.get("dropout", 0.0) is None:
        with _untouched(block, device, training=True):
            in_training = _run(block, x)
        if not all(map(torch.equal, found.values, in_training.values)):
            raise ValueError(
                "dropout: expected p, which no module of source says, though it drops in training, got None."
            )
        chosen = {"dropout": 0.0}
    choices = {name: (fixed[name],) if name in fixed else values for name, values in CHOICES.items()}
    errors: list[tuple[float, dict[str, Any]]] = []
    for values in product(*choices.values()):
        options = {**dict(zip(choices, values, strict=True)), "output": found.output}
        probe = {"backend": "reference", "dtype": torch.float64, "device": device}
        ours = build({**config, **fixed, **chosen, **options, **probe}).eval()
        errors.append((_error(found, _run(ours, [of.detach().double() for of in x])), options))
    errors.sort(key=lambda pair: pair[0])
    bound = _bound(dtype, device)
    (error, options), others = errors[0], errors[1:]
    if not error <= bound:
        raise ValueError(
            f"source: expected a {type(block).__name__} that computes what its weights say, but on a random batch it "
            f"differs from GatedRJCAFused by {error:.2g} of the largest value, at best ({_said(options)}), where "
            f"rounding explains {bound:.2g}. It is another operator, or is set up otherwise: pass what differs "
            f"(temperature, ...), or {NO_CHECK}."
        )
    eps = torch.finfo(dtype).eps
    for other, alike in others:
        if other > max(4 * error, 4 * eps):
            continue
        names = [name for name in choices if alike[name] != options[name]]
        if (
            names == ["joint"] and error <= 100 * eps and found.projects is not None
        ):  # W_q changes nothing, or is unused
            options["joint"] = "projected" if found.projects else "raw"
            continue
        raise ValueError(
            f"source: expected a {type(block).__name__} that running tells apart, but on a random batch it differs "
            f"from GatedRJCAFused with {_said(options)} by {error:.2g} of the largest value, and with "
            f"{_said(alike)} by {other:.2g}. Pass {' and '.join(names)}, or {NO_CHECK}."
        )
    return {**chosen, **options}


def dropout_of(block: nn.Module) -> float | None:
    """p, as modules and attributes of the block's recursion say; None if none does.

    Raises:
        ValueError: if they differ.
    """
    recursion = {name: of for name, of in block.named_modules() if "dcn_layers" in name}
    found = {of.p: name for name, of in recursion.items() if isinstance(of, nn.Dropout)}
    for name, of in recursion.items():
        for attribute in ("dropout", "dropout_p", "p"):
            p = vars(of).get(attribute)
            if isinstance(p, float) and not isinstance(of, nn.Dropout):
                found[p] = f"{name}.{attribute}"
    if len(found) > 1:
        listed = ", ".join(f"{p} in {name}" for p, name in found.items())
        raise ValueError(f"source: expected one dropout for C and U, got {listed}; pass dropout.")
    return next(iter(found), None)


def gate_dropout_of(block: nn.Module) -> float:
    """The same, of the gates of TAGF."""
    encoders = [of for name, of in block.named_modules() if "temporal_encoder" in name]
    return next((of.p for of in encoders if isinstance(of, nn.Dropout)), 0.0)


def _features(config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    widths = config["dim_visual"]
    widths = [*widths] if isinstance(widths, Sequence) else [widths, config["dim_audio"]]
    generator = torch.Generator().manual_seed(0)

    def normal(width: int) -> Tensor:
        x = torch.randn(BATCH, config["length"], width, generator=generator, dtype=torch.float64, device="cpu")
        return x.to(device, dtype).requires_grad_()

    return [normal(width) for width in widths]


@contextmanager
def _untouched(block: nn.Module, device: torch.device, training: bool = False) -> Iterator[None]:
    """In evaluation mode, or training; modes, buffers and generators are put back."""
    modes = [(of, of.training) for of in block.modules()]
    frozen = [parameter for parameter in block.parameters() if not parameter.requires_grad]
    buffers = [(buffer, buffer.detach().clone()) for buffer in block.buffers()]
    devices = [device] if device.type == "cuda" else []
    try:
        for of, _ in modes:
            of.training = training
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for of, before in modes:
            of.training = before
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)


def _run(block: nn.Module, x: Sequence[Tensor]) -> Found:
    x = [of.detach().clone().requires_grad_() for of in x]
    device = x[0].device.type
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        try:
            returned = block(*x)
        except Exception as error:
            raise ValueError(
                f"source: expected a block that takes {' and '.join(str(list(of.shape)) for of in x)}, but its forward "
                f"raised {type(error).__name__}: {error} To load the weights as they are, {NO_CHECK}."
            ) from error
        output, values = _taken_apart(returned, x)
        weighted = [(value * _weights(value)).sum() for value in values if value.requires_grad]
        if not weighted:
            return Found(output, values, None, None)
        queries = [weight for name, weight in block.named_parameters() if name.endswith("query_linear.weight")]
        gradients = torch.autograd.grad(sum(weighted), [*x, *queries], allow_unused=True)  # type: ignore[arg-type]
    of_x = [torch.zeros_like(of) if g is None else g for of, g in zip(x, gradients, strict=False)]
    projects = any(g is not None for g in gradients[len(x) :]) if queries else None
    return Found(output, values, of_x, projects)


def _taken_apart(returned: Any, x: Sequence[Tensor]) -> tuple[str, list[Tensor]]:
    """Which ``output`` it is, and its tensors."""
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


def _weights(value: Tensor) -> Tensor:
    """Numbers that are the same for every dtype."""
    generator = torch.Generator().manual_seed(value.numel())
    return torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu").to(value)


def _error(found: Found, ours: Found) -> float:
    """The largest difference, as a part of the largest value; infinite where even the shapes differ.

    Of gradients it is the median difference: where a relu is near 0, rounding decides whether one passes.
    """
    if len(found.values) != len(ours.values):
        return math.inf

    def difference(a: Tensor, b: Tensor) -> Tensor:
        return (a.detach().double() - b.detach()).abs() / b.detach().abs().max().clamp_min(1e-30)

    errors = [difference(*pair).max() for pair in zip(found.values, ours.values, strict=True)]
    if found.gradients is not None and ours.gradients is not None:
        errors += [difference(*pair).median() for pair in zip(found.gradients, ours.gradients, strict=True)]
    worst = float(torch.stack(errors).max())
    return math.inf if math.isnan(worst) else worst


def _bound(dtype: torch.dtype, device: torch.device) -> float:
    """Half of the digits, or of float64 all but four."""
    tf32 = device.type == "cuda" and dtype == torch.float32 and allows_tf32()
    eps = 2**-10 if tf32 else torch.finfo(dtype).eps
    return min(math.sqrt(eps), 1e4 * eps)


def _said(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={options[name]!r}" for name in CHOICES)
