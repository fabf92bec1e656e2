"""The launch configuration: a pure function of the problem, the dtype and the device. Nothing is tuned at run time.

The compile-time values (:class:`Constants`) never depend on B, and on L only through whether it is small and the power
of two that divides it, so all batches of a model run the same two binaries. None of the choices below has been measured
on a GPU: they follow from counts, and from the registers and shared memory that the compiler reports.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from grjca_kernels.problem import Problem, expected_linears
from grjca_kernels.triton_kernels import division

KIB = 1024


@dataclass(frozen=True)
class Device:
    """The properties of the hardware on which a configuration may depend."""

    kind: str  # "cuda", "hip", or "interpreter"
    capability: int  # 80, 90, 100, ...; 0 where there is none
    multiprocessors: int
    shared_memory: int  # bytes that one program may use
    ptxas: tuple[int, int] = (0, 0)  # version of the assembler that Triton uses for it
    unfenced: bool = False  # Triton does not fence what cp.async writes before a tensor core reads it


INTERPRETER = Device("interpreter", 0, 1, 1 << 30)


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles: powers of two, at least 16, as ``tl.dot`` requires.

    m x n is the tile of a product, and k its step along the sum. A tile of a streamed C has m columns (of J) and c
    rows. A tile of a gradient of weights is w x w.
    """

    m: int
    n: int
    k: int
    c: int
    w: int
    warps: int
    stages: int
    programs: int = 1  # programs per multiprocessor


@dataclass(frozen=True)
class Constants:
    """The compile-time constants: the attributes of the kernels' ``C``."""

    iterations: int
    layers: int
    modalities: int
    released: bool
    projected: bool
    gating: str
    gates: int
    ways: int
    normalize: bool
    dropout: bool
    lengths: bool
    return_gates: bool
    precision: str  # precision of products: "tf32" means tensor cores, for any dtype
    approximate_tanh: bool
    called: bool
    hip: bool
    fence: bool
    stream: bool
    length_step: int
    block_m: int
    block_n: int
    block_k: int
    block_c: int
    block_w: int
    block_l: int
    block_key: int
    block_time: int
    block_frames: int
    block_columns: int
    block_ways: int
    slot_joint: int
    slot_key: int
    slot_value: int
    slot_initial: int
    slot_hidden: int
    slot_d_attended: int
    slot_d_update: int
    slot_d_value: int
    slot_d_joint: int
    slot_d_key: int
    slot_d_state: int
    slots: int
    correlations: int
    most_registers: int
    layer_parameters: int
    backward_phases: int
    weights: bool
    d_iterates: bool


@dataclass(frozen=True)
class Launch:
    """One launch: its compile-time constants, the grid, and the sizes of the workspaces."""

    device: Device
    constants: Constants
    tiles: Tiles
    programs: int
    chunk: int  # samples that pass through the workspace together
    steps: int  # phases, with a grid barrier between every two
    activation_workspace: int  # elements in the dtype of the features
    bits: int  # bytes of the dropout masks
    gate_values: int  # elements of float32
    gradients: int  # elements of all parameters but W_k and b_k
    parts: int  # parts of the rows, with separate sums of gradients of weights; 0: each is one sum
    key_gradients: int  # elements of all W_k and b_k
    key_parts: int  # parts of the samples, with separate sums of those

    @property
    def fp32_workspace(self) -> int:
        """The number of float32 elements in all."""
        return self.gate_values + self.parts * self.gradients + self.key_parts * self.key_gradients

    @property
    def reduced(self) -> bool:
        """Return whether the last step adds the sums of parts."""
        return self.parts + self.key_parts > 0


STREAM_FRAMES = 32
"""The longest sequence whose C is streamed.

C is d / L times as large as an activation, but streaming recomputes it for every block of frames: once up to this
length, where one block holds all frames.
"""


def streams(problem: Problem) -> bool:
    """Return whether C is streamed rather than stored."""
    return problem.length <= STREAM_FRAMES


MIXED = 1024
"""The elements of K that a warp computes in one task where C is streamed: sums are short, and small tasks would
wait."""


class Choice(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tiles
    stored: Tiles  # the backward that stores C
    streamed: Tiles  # the backward that streams it


INTERPRETED = Tiles(16, 16, 16, 16, 16, 4, 1)
ODD, ODD_SINGLE = Tiles(32, 32, 32, 16, 32, 4, 2, programs=2), Tiles(16, 32, 16, 16, 16, 4, 1, programs=2)
"""The tiles where a width is not a multiple of 16: for 16-bit types, and for float32."""


def _choice(*tiles: tuple[int, ...]) -> Choice:
    return Choice(*(Tiles(*one) for one in tiles))


TILES = {  # (family, products); m n k c w warps stages per kernel; "odd length": no row of W_k is aligned
    ("sm_80", "half"): _choice((128, 128, 32, 64, 64, 8, 4), (128, 64, 64, 64, 64, 8, 3), (128, 64, 64, 32, 64, 8, 3)),
    ("sm_80", "tf32"): _choice((128, 64, 32, 32, 64, 8, 3), (128, 64, 32, 32, 64, 8, 3), (64, 64, 32, 16, 64, 8, 3)),
    ("sm_80", "single"): _choice((128, 128, 16, 32, 64, 8, 1), (128, 64, 16, 32, 64, 8, 1), (64, 64, 16, 16, 64, 8, 1)),
    ("sm_90", "half"): _choice(
        (128, 128, 64, 64, 64, 8, 4), (128, 128, 64, 64, 128, 8, 4), (128, 128, 64, 64, 128, 8, 4)
    ),
    ("sm_90", "tf32"): _choice(*3 * [(128, 64, 32, 32, 64, 8, 4)]),
    ("sm_90", "single"): _choice((128, 128, 16, 32, 64, 8, 1), (128, 64, 16, 32, 64, 8, 1), (32, 32, 16, 16, 32, 8, 1)),
    ("sm_100", "half"): _choice((128, 64, 64, 64, 64, 8, 3), (64, 64, 64, 64, 64, 8, 3), (64, 64, 64, 32, 64, 8, 3)),
    ("sm_100", "half, odd length"): _choice(
        (128, 64, 64, 64, 64, 8, 3), (32, 128, 64, 32, 32, 8, 3), (64, 64, 64, 32, 64, 8, 3)
    ),
    ("sm_100", "tf32"): _choice((128, 64, 32, 32, 64, 8, 3), (32, 128, 32, 32, 32, 8, 3), (32, 128, 32, 32, 32, 8, 3)),
    ("sm_100", "tf32, odd length"): _choice(*3 * [(32, 128, 32, 32, 32, 8, 3)]),
    ("sm_100", "single"): _choice((32, 128, 16, 32, 32, 8, 1), (32, 128, 16, 32, 32, 8, 1), (32, 64, 16, 16, 32, 8, 1)),
    ("small", "half"): _choice((128, 128, 32, 32, 64, 8, 3), (128, 64, 32, 32, 64, 8, 3), (128, 64, 32, 32, 64, 8, 3)),
    ("small", "tf32"): _choice((128, 64, 32, 32, 64, 8, 2), (128, 64, 32, 32, 64, 8, 2), (32, 32, 32, 32, 32, 8, 2)),
    ("small", "single"): _choice((128, 128, 16, 32, 64, 8, 1), (128, 64, 16, 32, 64, 8, 1), (64, 64, 16, 16, 64, 8, 1)),
    ("hip", "half"): _choice(*3 * [(64, 64, 64, 64, 64, 4, 2)]),
    ("hip", "tf32"): _choice(*3 * [(32, 32, 32, 32, 32, 4, 1)]),
    ("hip", "single"): _choice(*3 * [(32, 32, 32, 32, 32, 4, 1)]),
}
"""Tiles with which no kernel spills a register, or on Hopper more than 40 bytes; test_triton_compiled.py checks that.
(With four modalities and unshared layers, the backward may still spill some bytes once per task: 8 with T = 8, 400 with
T = 16.)

The tiles are large because operands come from L2: a 64 x 64 tile does 32 FLOP per byte of bfloat16, a 128 x 128 tile
64. For the 790 TFLOP/s of an H200 that takes 25 or 12 TB/s, and its L2 delivers neither. "small" means the chips with
100 KiB of shared memory.
"""


def aligned(problem: Problem) -> bool:
    """Return whether rows of activations begin at multiples of 16 bytes."""
    return all(d_m % 16 == 0 for d_m in problem.widths)


def tiles(problem: Problem, dtype: torch.dtype, tf32: bool, device: Device, backward: bool) -> Tiles:
    """Return the tile sizes.

    The kernel loads every element from its own address if rows do not begin at multiples of 16 bytes, which takes
    registers. With an odd L this concerns only the rows of W_k.
    """
    if device.kind == "interpreter":
        return INTERPRETED
    products = "half" if dtype != torch.float32 else "tf32" if tf32 else "single"
    family = {80: "sm_80", 90: "sm_90", 100: "sm_100", 103: "sm_100"}.get(device.capability, "small")
    family = device.kind if device.kind == "hip" else family
    if not aligned(problem):
        odd = ODD if products == "half" else ODD_SINGLE
        return replace(odd, stages=1, programs=1) if family == "hip" else odd
    found = TILES[family, products]
    if problem.length % 4:
        found = TILES.get((family, products + ", odd length"), found)
    return found.forward if not backward else found.streamed if streams(problem) else found.stored


INLINING_PTXAS = (13, 3)
"""The first assembler with which phases are inlined on Hopper; an older one may reuse registers that wgmma still
reads."""

TENSOR_MEMORY, TENSOR_MEMORY_ROWS = (10, 11), 64
"""The major capabilities on which Triton puts products into tensor memory, and the fewest rows of such a product."""


def calls(device: Device, tile: Tiles, precision: str) -> bool:
    """Return whether phases are called rather than inlined; each called function has all registers to itself.

    In such a function Triton cannot use tensor memory; for AMD, arguments beyond some number would go to memory. On
    Hopper, ptxas makes it wait for every wgmma (its remark C7510).
    """
    tensor_memory = device.capability // 10 in TENSOR_MEMORY and max(tile.m, tile.w) >= TENSOR_MEMORY_ROWS
    wgmma = precision == "tf32" and tile.m >= 64
    waiting = device.capability == 90 and device.ptxas >= INLINING_PTXAS and wgmma
    return device.kind != "hip" and not tensor_memory and not waiting


def constants(
    problem: Problem,
    dtype: torch.dtype,
    device: Device,
    *,
    tf32: bool,
    lengths: bool,
    return_gates: bool = False,
    backward: bool = False,
    weights: bool = False,
    d_iterates: bool = False,
) -> tuple[Constants, Tiles]:
    """Return the compile-time constants and the tiles for a problem."""
    stream = streams(problem)
    frames = max(16, 1 << (problem.length - 1).bit_length()) if stream else 0
    tile = tiles(problem, dtype, tf32, device, backward)
    columns = tile.n if aligned(problem) else 16
    rows, columns = (32, 128 if backward or dtype == torch.float32 else 256) if tile.warps == 8 else (16, columns)
    modalities, released = len(problem.widths), problem.released
    precision = "tf32" if dtype != torch.float32 or tf32 else "ieee"
    overlay = not stream and not backward  # K and J are dead when H is written
    hidden = 0 if overlay else 4
    value = max(2, modalities) if overlay else 1
    d_attended, d_update = 4 + modalities, 4 + 2 * modalities
    forward_slots = value + 2 if overlay else 4 + modalities
    return Constants(
        iterations=problem.iterations,
        layers=1 if problem.shared else problem.iterations,
        modalities=modalities,
        released=released,
        projected=problem.projected,
        gating=problem.gating,
        gates=len(problem.gate_ways),
        ways=sum(problem.gate_ways),
        normalize=problem.normalize,
        dropout=problem.dropout > 0,
        lengths=lengths,
        return_gates=return_gates,
        precision=precision,
        approximate_tanh=dtype != torch.float32 and device.kind == "cuda",
        called=calls(device, tile, precision),
        hip=device.kind == "hip",
        fence=device.unfenced,
        stream=stream,
        length_step=next(step for step in (16, 8, 4, 2, 1) if problem.length % step == 0),
        block_m=tile.m,
        block_n=tile.n,
        block_k=tile.k,
        block_c=tile.c,
        block_w=division.weight_block(problem, tile, device.multiprocessors * tile.programs),
        block_l=frames if stream else tile.m,
        block_key=max(tile.n, MIXED * tile.warps // frames) if stream else tile.n,
        block_time=frames if stream else tile.k,
        block_frames=rows,
        block_columns=columns,
        block_ways=ways_block(problem),
        slot_joint=0,
        slot_key=1 if overlay else 2,
        slot_value=value,
        slot_initial=value + 1 if overlay else 3,
        slot_hidden=hidden,
        slot_d_attended=d_attended,
        slot_d_update=d_update,
        slot_d_value=d_update,  # d_update is dead when d V is written, and H when d J and d K are
        slot_d_joint=hidden,
        slot_d_key=hidden + 1,
        slot_d_state=d_update + 1,
        slots=d_update + 3 if backward else forward_slots,
        correlations=0 if stream else 1 + backward,
        most_registers=255 if device.kind == "cuda" else 0,
        layer_parameters=(2 if released else 1) * (3 * modalities + problem.projected),
        backward_phases=(5 if stream else 7) + released,
        weights=weights,
        d_iterates=d_iterates,
    ), tile


def launch(
    problem: Problem, dtype: torch.dtype, device: Device, *, backward: bool, weights: bool = False, **flags: bool
) -> Launch:
    """Return the launch of one direction.

    ``weights`` says whether the gradient of any parameter is wanted; ``flags`` are those of :func:`constants`.
    """
    compiled, tile = constants(problem, dtype, device, backward=backward, weights=weights, **flags)
    programs = device.multiprocessors * tile.programs
    chunk = division.chunk_of(problem, tile, programs, compiled.stream)
    chunks, phases = -(-problem.batch // chunk), 3 if compiled.stream else 4
    parts = division.parts_of(problem, compiled.block_w, programs, chunk) if weights else 0
    key_parts = division.key_parts_of(problem, chunk, parts) if weights else 0
    steps = problem.iterations * (compiled.backward_phases if backward else phases) + 2 + backward
    d_logits = chunk * problem.length * len(problem.widths) * sum(problem.gate_ways) * backward
    return Launch(
        device=device,
        constants=compiled,
        tiles=tile,
        programs=programs,
        chunk=chunk,
        steps=chunks * steps + (parts + key_parts > 0),
        activation_workspace=compiled.slots * unit(problem, chunk)
        + compiled.correlations * chunk * problem.width**2
        + d_logits,
        bits=mask_bytes(problem, compiled, chunk),
        gate_values=gate_values(problem, chunk),
        gradients=parameter_elements(problem) if weights else 0,
        parts=parts,
        key_gradients=key_elements(problem) if weights else 0,
        key_parts=key_parts,
    )


def mask_bytes(problem: Problem, compiled: Constants, chunk: int) -> int:
    """Return the bytes of one iteration's dropout masks: a bit for every element of U, and of C where that is
    stored."""
    rows = -(-problem.length // 8)
    if not compiled.stream:
        rows += sum(-(-d_m // 8) for d_m in problem.widths)
    return chunk * rows * problem.width if compiled.dropout else 0


def gate_values(problem: Problem, chunk: int) -> int:
    """Return the number of gate values of a chunk, rounded up so that the data after them is aligned."""
    return -(-chunk * problem.length * len(problem.widths) * sum(problem.gate_ways) // 64) * 64


def parameter_elements(problem: Problem) -> int:
    """Return the gradient elements of all parameters except W_k and b_k.

    Each linear map begins at a multiple of 16, and a gate takes a whole block.
    """
    sizes = [
        (ways_block(problem) if name.startswith("gates") else rows) * (columns + problem.released)
        for name, rows, columns in expected_linears(problem)
        if ".key" not in name
    ]
    return sum(-(-size // 16) * 16 for size in sizes)


def key_elements(problem: Problem) -> int:
    """Return the gradient elements of all W_k and b_k, laid out as in :func:`parameter_elements`."""
    maps = (1 if problem.shared else problem.iterations) * len(problem.widths)
    return maps * -(-problem.length * (problem.length + problem.released) // 16) * 16


def ways_block(problem: Problem) -> int:
    """Return a power of two that holds the ways of any gate, at most T + 1, and the fewest columns of a product."""
    return 16 if problem.iterations < 16 else 32


def unit(problem: Problem, chunk: int) -> int:
    """Return the elements of one activation of a chunk, rounded up so that the next one is aligned."""
    return -(-chunk * problem.length * problem.width // 64) * 64
