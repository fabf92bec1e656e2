"""``grjca doctor``: check which backends run here, their results and speed, and whether a data folder is valid."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from grjca import environment
from grjca.config import GATING, DoctorConfig
from grjca.data.videos import problems
from grjca.errors import UserError, printable
from grjca.measure import EAGER_FACTOR, FEW_ULP, SHAPES, Shape, alternate
from grjca.model.eager import GatedRJCAEager
from grjca_kernels import GatedRJCAFused, backends

FLOAT64 = 1e-11  # allowed difference in float64: an ulp of 2e-16, times the terms of a sum, 1 / tau and saturation
SMALL = Shape(24, 12, 8, 2, 3)
LENGTHS = (24, 17, 5)  # frames of each sample of SMALL
WEIGHT_SEED, INPUT_SEED = 1, 2
SPEED = SHAPES["abaw"]
DROPOUT, REPETITIONS = 0.6, 3
FEW_SAMPLES = 2  # batch of a timed step in bfloat16


@dataclass(frozen=True)
class Error:
    """Relative error of a float32 result against the reference in float64, or a bound on it."""

    forward: float
    gradient: float

    def exceeds(self, bound: Error) -> bool:
        """Return whether either error is above its bound, or NaN."""
        return not (self.forward <= bound.forward and self.gradient <= bound.gradient)


def doctor(config: DoctorConfig) -> int:
    """Print the report; return 1 if a backend is wrong, the native one cannot run, or the data has problems, else 0."""
    print(_machine())
    wrong = [*_check_backends(config.speed)]
    if config.speed and environment.has_amx() and backends()["cpu"] is None:
        print(f"\n{_compare_bfloat16()}")
    if config.data is not None:
        wrong += _check_data(config)
    print()
    for problem in wrong:
        print(f"PROBLEM: {printable(problem)}")
    if not wrong:
        print("No problems.")
    return 1 if wrong else 0


def _machine() -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions().items())
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    lines = [versions, f"CPU: {environment.processor()}, {cores}"]
    if torch.cuda.is_available():
        lines += [f"GPU: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    else:
        lines.append("GPU: none that PyTorch can use")
    return "\n".join(lines)


# ---- backends


def _check_backends(speed: bool) -> list[str]:
    """Print which backends run, their errors and times; return what is wrong."""
    wrong = []
    for name, reason in backends().items():
        if reason is not None:
            print(f"{name} cannot run: {reason}")
        if reason is not None and name == "cpu":
            wrong.append(f"the native CPU backend cannot run, and the slow reference takes its place: {reason}")
    for device in environment.devices():
        wrong += _check_device(device, speed)
    return wrong


def _check_device(device: str, speed: bool) -> list[str]:
    """Print errors and times of the backends that compute on one device type; return what is wrong."""
    wrong = []
    try:
        print(f"\nOn {device}, auto takes {environment.backend_used('auto', device)}.")
    except UserError as refused:
        wrong.append(f"auto, on {device}: {refused}")
    names = [name for name, reason in backends(device).items() if reason is None]
    apart = eager_apart(device)
    if not apart <= FLOAT64:
        wrong.append(f"eager, on {device}: {apart:.1e} from the reference in float64, {FLOAT64:.0e} is allowed.")
    errors, bound = errors_of(names, device)
    seconds = times(names, device) if speed else {}
    print(_table(errors, bound, seconds))
    for name, error in errors.items():
        if name != "eager" and error.exceeds(bound):
            wrong.append(
                f"{name}, on {device}: wrong by {error.forward:.1e} (forward) and {error.gradient:.1e} (gradient), "
                f"{bound.forward:.1e} and {bound.gradient:.1e} are allowed; install grjca-kernels again, or use "
                "--backend reference, and report it."
            )
    return wrong


def _table(errors: Mapping[str, Error], bound: Error, seconds: Mapping[str, float]) -> str:
    lines = [f"{'backend':<12}{'error, float32':^22}" + (f"{'forward + backward':>22}" if seconds else "")]
    lines.append(f"{'':<12}{'forward':>11}{'gradient':>11}" + (f"{'ms':>13}{'speed':>9}" if seconds else ""))
    for name, error in errors.items():
        time = f"{seconds[name] * 1e3:>13.1f}{seconds['eager'] / seconds[name]:>8.2f}x" if seconds else ""
        lines.append(f"{name:<12}{error.forward:>11.1e}{error.gradient:>11.1e}{time}")
    lines.append(f"{'allowed':<12}{bound.forward:>11.1e}{bound.gradient:>11.1e}")
    if seconds:
        size = f"{SPEED.batch} x {SPEED.length} x ({SPEED.dim_visual} + {SPEED.dim_audio})"
        lines.append(f"Median of {REPETITIONS}, GRJCA on {size}, T = {SPEED.iterations}, dropout {DROPOUT}.")
    return "\n".join(lines)


# ---- errors


def errors_of(names: list[str], device: str) -> tuple[dict[str, Error], Error]:
    """Return the errors of eager and of these backends in float32, over all kinds of gating, and their bound."""
    exact = {gating: run("reference", gating, torch.float64, "cpu") for gating in GATING.values()}

    def error(name: str) -> Error:
        pairs = [(run(name, gating, torch.float32, device), exact[gating]) for gating in exact]
        values, gradients = (
            [_apart(ours, truth) for one in pairs for ours, truth in zip(one[0][part], one[1][part], strict=True)]
            for part in (0, 1)
        )
        return Error(_rms(values), _rms(gradients))

    errors = {name: error(name) for name in ("eager", *names)}
    few = FEW_ULP * torch.finfo(torch.float32).eps
    eager = errors["eager"]
    return errors, Error(EAGER_FACTOR * eager.forward + few, EAGER_FACTOR * eager.gradient + few)


def eager_apart(device: str) -> float:
    """Return the largest relative difference of eager from the reference, both in float64."""
    return max(
        _apart(ours, truth)
        for gating in GATING.values()
        for part in zip(
            run("eager", gating, torch.float64, device), run("reference", gating, torch.float64, "cpu"), strict=True
        )
        for ours, truth in zip(*part, strict=True)
    )


def run(name: str, gating: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return the output and all gradients of a small case, as float64 on the CPU.

    Weights and inputs are representable in float32, so that all dtypes start from equal numbers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(WEIGHT_SEED)
        block = _block(Shape(**vars(SMALL) | {"gating": gating, "normalize": gating != "none"}), name, dropout=0.0)
        with torch.no_grad():
            for parameter in block.parameters():
                if parameter.dim() == 1:  # biases start at 0, which would hide errors
                    parameter.normal_(std=0.3)
    block = block.to(device, dtype)
    features = [x.detach().to(device, dtype).requires_grad_() for x in SMALL.inputs(INPUT_SEED)]
    output = block(*features, torch.tensor(LENGTHS, device=device))
    incoming = torch.randn(output.shape, generator=torch.Generator().manual_seed(INPUT_SEED)).to(output)
    gradients = torch.autograd.grad(output, [*features, *block.parameters()], incoming)
    return [output.detach().cpu().double()], [gradient.cpu().double() for gradient in gradients]


def _apart(ours: Tensor, truth: Tensor) -> float:
    """Relative L2 difference: relu makes single elements of a gradient jump, so tensors are compared as vectors."""
    return float((ours - truth).norm() / truth.norm())


def _rms(values: list[float]) -> float:
    """Root mean square of many errors, since a single one may be small by chance."""
    return math.sqrt(statistics.fmean(value**2 for value in values))


# ---- speed


def times(
    names: list[str], device: str, batch: int | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Time a training step of the fusion alone with eager and with these backends, in seconds."""
    shape = SPEED if batch is None else replace(SPEED, batch=batch)
    blocks = {name: _block(shape, name, dropout=DROPOUT).to(device, dtype) for name in ("eager", *names)}
    features = [x.detach().to(device, dtype).requires_grad_() for x in shape.inputs(INPUT_SEED)]
    incoming = torch.randn(shape.batch, shape.length, shape.dim_visual + shape.dim_audio, device=device, dtype=dtype)

    def step(block: GatedRJCAFused) -> None:
        block(*features).backward(incoming)
        if device == "cuda":
            torch.cuda.synchronize()

    calls: dict[str, Callable[[], object]] = {name: partial(step, block) for name, block in blocks.items()}
    return {name: statistics.median(seconds) for name, seconds in alternate(calls, REPETITIONS).items()}


def _compare_bfloat16() -> str:
    """Measure which backend is fastest in bfloat16 on a processor with AMX, and say which to use."""
    seconds = times(["cpu", "reference"], "cpu", FEW_SAMPLES, torch.bfloat16)
    fastest = min(seconds, key=seconds.__getitem__)
    shown = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in seconds.items())
    advice = "keep --backend auto."
    if fastest != "cpu":
        advice = f"with --precision bf16 use --backend {fastest}, or stay in float32."
        if seconds["reference"] < seconds["cpu"]:
            advice += ' A block of your own takes backend="reference" for that.'
    return (
        "This processor multiplies tiles of bfloat16 (AMX), which PyTorch uses and the native kernels do not. A "
        f"training step of the fusion on {FEW_SAMPLES} samples of bfloat16 takes {shown}: {fastest} is the fastest, so "
        f"{advice}"
    )


def _block(shape: Shape, name: str, *, dropout: float) -> GatedRJCAFused:
    if name == "eager":
        return shape.block(GatedRJCAEager, dropout=dropout, gate_dropout=0.0)
    return shape.block(GatedRJCAFused, dropout=dropout, gate_dropout=0.0, backend=name)


# ---- data


def _check_data(config: DoctorConfig) -> list[str]:
    """Print what a data folder holds; return what is wrong with it."""
    assert config.data is not None
    found = problems(config.data, widths=config.widths, kind=config.source, progress=True)
    print(f"\nData in {config.data}")
    for folder in found.folders:
        print(folder)
    print(f"{'split':<10}{'videos':>8}{'frames':>10}{'invalid':>10}")
    for name, split in found.splits.items():
        print(f"{name:<10}{split.videos:>8}{split.frames:>10}{split.invalid_share:>10.1%}")
    for note in found.notes:
        print(f"Note: {printable(note)}")
    return found.problems
