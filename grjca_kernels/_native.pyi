# Signatures of csrc/bindings.cpp.
from collections.abc import Sequence

Strided = tuple[int, ...] | None  # address; strides of sample, frame and column, in elements

class Problem:
    def __init__(
        self,
        *,
        batch: int,
        length: int,
        widths: Sequence[int],
        iterations: int,
        gating: str,
        form: str,
        dtype: str,
        dropout: float,
        temperature: float,
        normalize: bool,
        shared: bool,
    ) -> None: ...

def instruction_sets() -> list[str]: ...
def cpu_workspace(problem: Problem, backward: bool, threads: int, instruction_set: str | None) -> int: ...
def cpu_forward(
    *,
    problem: Problem,
    features: Sequence[Strided],
    parameters: Sequence[int],
    lengths: int,
    seed: int,
    iterates: int,
    outputs: Sequence[Strided],
    gates: Sequence[Strided],
    workspace: int,
    threads: int,
    instruction_set: str | None,
) -> None: ...
def cpu_backward(
    *,
    problem: Problem,
    features: Sequence[Strided],
    parameters: Sequence[int],
    lengths: int,
    seed: int,
    iterates: int,
    grad_outputs: Sequence[Strided],
    grad_iterates: Sequence[Strided],
    grad_iterates_steps: Sequence[int],
    grad_gates: Sequence[Strided],
    grad_features: Sequence[Strided],
    grad_parameters: Sequence[int],
    workspace: int,
    threads: int,
    instruction_set: str | None,
) -> None: ...
