"""The timed cases: every shape by every implementation, all with the same weights and inputs."""

from __future__ import annotations

import itertools
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import GatedRJCAStrong
from grjca.measure import Shape
from grjca.model.eager import GatedRJCAEager
from grjca_kernels import GatedRJCAFused, flops
from grjca_kernels import problem as problems

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THREADS = torch.get_num_threads()
DROPOUT = 0.6
ROTATED = 4  # sets of inputs that take turns
SCORES = 1.5  # root mean square of K J / sqrt(d): the whole of tanh, which near zero is linear and hides mistakes

Call = Callable[[Sequence[Tensor]], list[Tensor]]
"""Takes the two inputs. Returns the output, followed in a training step by the gradients of inputs and parameters."""


@dataclass(frozen=True)
class Problem:
    """A shape with its tensors; what ``dtype`` holds of them is what float64 computes with too."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def block(self, kind: type[GatedRJCAFused], **options: Any) -> GatedRJCAFused:
        """A block with the weights of this problem."""
        block = self.shape.block(kind, **{"dtype": self.dtype, "device": self.device, **options})
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
        return {name: value.to(self.device, self.dtype) for name, value in block.state_dict().items()}

    @cached_property
    def inputs(self) -> list[tuple[Tensor, Tensor]]:
        return [self.input(seed) for seed in range(ROTATED)]

    def input(self, seed: int) -> tuple[Tensor, Tensor]:
        visual, audio = (x.to(self.device, self.dtype).requires_grad_() for x in self.shape.inputs(seed))
        return visual, audio

    @cached_property
    def gradient(self) -> Tensor:
        """The gradient of the output, [B, L, d]."""
        generator = torch.Generator().manual_seed(ROTATED)
        size = (self.shape.batch, self.shape.length, self.shape.dim_visual + self.shape.dim_audio)
        return torch.randn(size, generator=generator).to(self.device, self.dtype)

    def call(self, implementation: str, training: bool, **options: Any) -> Call:
        """One of IMPLEMENTATIONS: a training step, or a forward in eval mode without autograd."""
        return IMPLEMENTATIONS[implementation](self, training, **options)

    def in_turns(self, call: Call) -> Callable[[], list[Tensor]]:
        """``call`` on the sets of inputs, one after the other."""
        turns = itertools.cycle(self.inputs)
        return lambda: call(next(turns))


# ---- implementations


def plain(block: nn.Module, gradient: Tensor | None = None) -> Call:
    """Run a training step if there is a ``gradient`` of the output, else a forward."""
    block.train(gradient is not None)
    parameters = list(block.parameters())

    def call(x: Sequence[Tensor]) -> list[Tensor]:
        if gradient is None:
            with torch.no_grad():
                return [block(*x)]
        y = block(*x)
        return [y.detach(), *torch.autograd.grad(y, [*x, *parameters], gradient)]

    return call


def of_block(problem: Problem, training: bool, *, kind: type[GatedRJCAFused], **options: Any) -> Call:
    return plain(problem.block(kind, **options), problem.gradient if training else None)


def _compiled(problem: Problem, training: bool, **options: Any) -> Call:
    """The strong formulation by torch.compile, on a GPU with CUDA graphs.

    mode="max-autotune" took seven seconds for each product of a training step, and chose MKL's in all cases seen.
    """
    mode = "reduce-overhead" if problem.device == "cuda" else None
    block = torch.compile(problem.block(GatedRJCAStrong, **options), mode=mode, dynamic=False)
    call = plain(block, problem.gradient if training else None)

    def marked(x: Sequence[Tensor]) -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return call(x)

    return marked


def _graph(problem: Problem, training: bool, **options: Any) -> Call:
    """A CUDA graph, captured once; inputs are copied in at every call, as torch.compile does it with its own."""
    call, static = of_block(problem, training, **options), problem.input(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(static)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = call(static)

    def replay(x: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            torch._foreach_copy_(static, x)
        captured.replay()
        return results

    return replay


OURS = {"triton": "triton", "cuda": "cuda"} if DEVICE == "cuda" else {"fused": "auto"}
"""The fused block, and the backend that computes it. Its dropout masks are those of the reference."""
PLAIN: dict[str, dict[str, Any]] = {
    "eager": {"kind": GatedRJCAEager},
    "strong": {"kind": GatedRJCAStrong},
    **{name: {"kind": GatedRJCAFused, "backend": backend} for name, backend in OURS.items()},
}
"""The constructors of the blocks that run eagerly."""
IMPLEMENTATIONS: dict[str, Callable[..., Call]] = {
    **{name: partial(of_block, **options) for name, options in PLAIN.items()},
    "compiled": _compiled,
}
if DEVICE == "cuda":
    IMPLEMENTATIONS |= {f"{name}-graph": partial(_graph, **PLAIN[name]) for name in ("eager", *OURS)}


# ---- what a forward costs


def flop(shape: Shape) -> int:
    """Return the floating-point operations of the matrix products of a forward."""
    widths = (shape.dim_visual, shape.dim_audio)
    options = (shape.iterations, shape.gating, "released", 0.0, 1.0, shape.normalize, False)
    return flops.forward(problems.Problem(shape.batch, shape.length, widths, *options))


def tanhs(shape: Shape) -> int:
    """Values of tanh that a forward needs: C [d, d] and V C [L, d] for each modality."""
    width = shape.dim_visual + shape.dim_audio
    return shape.batch * shape.iterations * (width**2 + 2 * shape.length * width)


# ---- where it is measured


def machine() -> dict[str, str | int]:
    """Return the machine, versions and commit of a measurement."""
    from grjca import environment  # here, because it takes psutil, and blocks do not

    return {
        "device": torch.cuda.get_device_name(0) if DEVICE == "cuda" else environment.processor(),
        "threads": THREADS,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def where() -> str:
    """The same in a line, with the commit."""
    from grjca import environment

    about = machine()
    return f"{about['device']}, {about['threads']} threads, torch {about['torch']}, commit {environment.commit()}"
