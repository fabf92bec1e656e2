"""What is timed: blocks of the shapes that matter, by each implementation, all with one set of weights and inputs."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import cast

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import FORMULATIONS
from grjca.measure import Shape
from grjca_kernels import GatedRJCAFused, flops
from grjca_kernels import problem as problems

THREADS = torch.get_num_threads()
DROPOUT = 0.6
WARM_UPS = 2  # calls before those that are timed
ROTATED = 4  # sets of inputs that take turns
SCORES = 1.5  # root mean square of K J / sqrt(d): the whole of tanh, which near zero is linear and hides mistakes

IMPLEMENTATIONS: dict[str, Callable[..., nn.Module]] = {
    "eager": lambda problem, **options: problem.block(FORMULATIONS["eager"], **options),
    "strong": lambda problem, **options: problem.block(FORMULATIONS["strong"], **options),
    "compiled": lambda problem, **options: compiled(problem, **options),
    "fused": lambda problem, **options: problem.block(GatedRJCAFused, **options),
}


def compiled(problem: Problem, formulation: str = "eager", **options: object) -> nn.Module:
    """One of the formulations by torch.compile.

    Not with mode="max-autotune": on a loaded processor it took about seven seconds for each product of a training step,
    did not end within five minutes that the default mode shared, and took MKL's product in all four cases seen.
    """
    return cast(nn.Module, torch.compile(problem.block(FORMULATIONS[formulation], **options), dynamic=False))


@dataclass(frozen=True)
class Problem:
    """A shape with its tensors; what ``dtype`` holds of them is what float64 computes with too."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    seed: int = 0  # of the first inputs; weights do not depend on it

    def block(self, kind: type[GatedRJCAFused], **options: object) -> GatedRJCAFused:
        """A block with the weights of this problem."""
        block = self.shape.block(kind, **{"dtype": self.dtype, **options})
        block.load_state_dict(self.weights)
        return block

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        torch.manual_seed(0)
        block = self.shape.block(GatedRJCAFused)
        x = [F.normalize(x[:2], dim=-1) if self.shape.normalize else x[:2] for x in self.shape.inputs(0)]
        with torch.no_grad():
            for layer in block.parameters_by_role()[0]:
                joint = F.linear(torch.cat(x, dim=-1), *layer.query)
                for x_m, key in zip(x, layer.key, strict=True):
                    scores = F.linear(x_m.mT, *key) @ joint / math.sqrt(joint.shape[-1])
                    key.weight.mul_(SCORES / scores.square().mean().sqrt())
        return {name: value.to(self.dtype) for name, value in block.state_dict().items()}

    @cached_property
    def inputs(self) -> list[tuple[Tensor, Tensor]]:
        return [self.input(self.seed + i) for i in range(ROTATED)]

    def input(self, seed: int) -> tuple[Tensor, Tensor]:
        visual, audio = (x.to(self.dtype).requires_grad_() for x in self.shape.inputs(seed))
        return visual, audio

    @cached_property
    def gradient(self) -> Tensor:
        """Of the output, [B, L, d]."""
        generator = torch.Generator().manual_seed(ROTATED)
        size = (self.shape.batch, self.shape.length, self.shape.dim_visual + self.shape.dim_audio)
        return torch.randn(size, generator=generator).to(self.dtype)


def flop(shape: Shape) -> int:
    """Of the products of a forward."""
    widths = (shape.dim_visual, shape.dim_audio)
    options = (shape.iterations, shape.gating, "released", 0.0, 1.0, shape.normalize, False)
    return flops.forward(problems.Problem(shape.batch, shape.length, widths, *options))


def tanhs(shape: Shape) -> int:
    """Values of tanh that a forward needs: C [d, d] and V C [L, d] for each modality."""
    width = shape.dim_visual + shape.dim_audio
    return shape.batch * shape.iterations * (width**2 + 2 * shape.length * width)


VARYING = frozenset({"commit", "clock_mhz"})
"""What may differ between rows that are otherwise of the same."""


@lru_cache
def provenance() -> dict[str, str | int | float | None]:
    """Where and with what a time was measured."""
    return {
        "commit": _commit(),
        "device": _cpu("model name") or platform.processor() or platform.machine(),
        "clock_mhz": _clock(),
        "threads": THREADS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _clock() -> float | None:
    """Of the first core, now; a virtual machine shows the nominal one. None where the system does not say."""
    clock = _cpu("cpu MHz")
    return float(clock) if clock else None


def _cpu(entry: str) -> str:
    """What /proc/cpuinfo says of the first core; empty where there is no such entry, or no such file."""
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(entry):
                return line.partition(":")[2].strip()
    return ""
