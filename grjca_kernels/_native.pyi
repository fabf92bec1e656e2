# Signatures of csrc/bindings.cpp.
from typing import Any

from torch import Tensor

from grjca_kernels.call import Call, Gradients

interface: int

class Problem:
    def __init__(self, dtype: str, *problem: Any) -> None: ...

def use_tensors(tensor: type, parameter: type, exchange: bool) -> bool: ...
def likeness(tensors: list[Tensor]) -> bytes | None: ...
def instruction_sets() -> list[str]: ...
def cpu_workspace(problem: Problem, backward: bool, threads: int, instruction_set: str | None) -> int: ...

Host = tuple[Tensor, int, str | None]  # workspace, threads, instruction set

def cpu_forward(problem: Problem, call: Call, host: Host) -> None: ...
def cpu_backward(problem: Problem, call: Call, gradients: Gradients, host: Host) -> None: ...

# ---- the CUDA C++ kernels; built without nvcc, the module has only the first two

cuda_architectures: str

def cuda_why_not() -> str | None: ...
def cuda_resident(dtype: str, tf32: bool, backward: bool, device: int) -> tuple[int, int]: ...

Device = tuple[int, int, int]  # workspace, stream, device

class PhaseCost:
    """csrc/grjca.h; estimates of csrc/cuda/costs.h."""

    phase: str
    rows: int
    columns: int
    times: float
    tasks: float
    turns: float
    trips: float
    bytes: float
    microseconds: float

def cost_table(
    problem: Problem,
    *,
    backward: bool,
    weights: bool,
    programs: int,
    multiprocessors: int,
    chunk: int,
    rows: int,
    columns: int,
    tile_weights: int,
    parts: int,
    key_parts: int,
) -> list[PhaseCost]: ...

class CudaLaunch:
    def __init__(
        self, *, problem: Problem, tf32: bool, backward: bool, weights: bool, resident: int, sharing: int
    ) -> None: ...
    @property
    def workspace_bytes(self) -> int: ...
    def plan(self) -> dict[str, int]: ...
    def table(self) -> list[PhaseCost]: ...
    def forward(self, call: Call, device: Device, together: bool) -> None: ...
    def backward(self, call: Call, gradients: Gradients, device: Device, together: bool) -> None: ...
