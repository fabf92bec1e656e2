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

# ---- the CUDA C++ kernels; built without nvcc, the module has only the first two

cuda_architectures: str

def cuda_why_not() -> str | None: ...
def cuda_resident(dtype: str, tf32: bool, backward: bool, device: int) -> int: ...

class CudaLaunch:
    def __init__(self, *, problem: Problem, tf32: bool, backward: bool, weights: bool, resident: int) -> None: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def counters(self) -> int: ...
    def plan(self) -> dict[str, int]: ...
    def forward(
        self,
        *,
        features: Sequence[Strided],
        parameters: Sequence[int],
        lengths: int,
        seed: int,
        iterates: int,
        outputs: Sequence[Strided],
        gates: Sequence[Strided],
        workspace: int,
        counters: int,
        stream: int,
        device: int,
        together: bool,
    ) -> bool: ...
    def backward(
        self,
        *,
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
        counters: int,
        stream: int,
        device: int,
        together: bool,
    ) -> bool: ...
