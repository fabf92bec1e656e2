"""The launch configuration over what is supported: everything legal, nothing overlapping, nothing that recompiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from cases import CASES, Case, describe, make
from compiled import HARDWARE, NAMED, PRECISIONS
from grjca_kernels import problem as problems
from grjca_kernels.problem import Problem
from grjca_kernels.triton_kernels import division, launch_config
from grjca_kernels.triton_kernels.launch_config import Constants, Launch

DEVICES = {name: hardware.device for name, hardware in HARDWARE.items()} | {"interpreter": launch_config.INTERPRETER}
WIDTHS = some.one_of(some.integers(1, 1024), some.sampled_from((1, 16, 64, 128, 256, 512, 1024)))

PROBLEMS = some.builds(
    Problem,
    batch=some.integers(1, 512),
    length=some.one_of(some.integers(1, 2048), some.integers(1, 2 * launch_config.STREAM_FRAMES)),
    widths=some.lists(WIDTHS, min_size=2, max_size=4).map(tuple),
    iterations=some.integers(1, problems.MAX_ITERATIONS),
    gating=some.sampled_from(problems.GATINGS),
    form=some.sampled_from(problems.FORMS),
    dropout=some.sampled_from((0.0, 0.6)),
    temperature=some.just(0.1),
    normalize=some.booleans(),
    shared=some.booleans(),
    joint=some.sampled_from(problems.JOINTS),
)
examples = partial(settings, deadline=None, print_blob=True)
OVER_ALL = given(PROBLEMS, some.sampled_from(sorted(PRECISIONS)), some.sampled_from(sorted(DEVICES)), some.booleans())


def launches(problem: Problem, precision: str, device: str, flag: bool) -> tuple[Launch, Launch]:
    """Forward and backward. ``flag``: lengths, gates, gradients of iterates and of weights."""
    dtype, tf32 = PRECISIONS[precision]
    where = DEVICES[device]
    return (
        launch_config.launch(problem, dtype, where, backward=False, tf32=tf32, lengths=flag, return_gates=flag),
        launch_config.launch(
            problem, dtype, where, backward=True, tf32=tf32, lengths=flag, weights=flag, d_iterates=flag
        ),
    )


@examples(max_examples=300)
@OVER_ALL
def test_launches_are_legal(problem: Problem, precision: str, device: str, flag: bool) -> None:
    for launch in launches(problem, precision, device, flag):
        c, tiles = launch.constants, launch.tiles
        blocks = [tiles.m, tiles.n, tiles.k, c.block_m, c.block_n, c.block_k, c.block_l, c.block_frames]
        for block in [*blocks, c.block_c, c.block_w, c.block_key, c.block_time, c.block_columns, c.block_ways]:
            assert block >= 16 and block & (block - 1) == 0
        assert c.block_ways >= max(problem.gate_ways, default=0)
        assert tiles.warps in (1, 2, 4, 8) and tiles.stages >= 1 and tiles.programs >= 1
        assert not c.stream or c.block_l >= problem.length, "a block must hold all frames of what is streamed"
        assert problem.length % c.length_step == 0
        assert launch.programs == tiles.programs * DEVICES[device].multiprocessors
        assert 1 <= launch.chunk <= problem.batch
        assert c.precision == ("ieee" if precision == "float32" else "tf32")
        assert not c.approximate_tanh or precision in ("bfloat16", "float16")


@examples(max_examples=300)
@OVER_ALL
def test_a_multiprocessor_holds_its_programs(problem: Problem, precision: str, device: str, flag: bool) -> None:
    """By the tiles that a product has in flight, which is most of shared memory; test_triton_compiled.py has it all."""
    if device == "interpreter":
        return
    hardware, size = HARDWARE[device], PRECISIONS[precision][0].itemsize
    for launch in launches(problem, precision, device, flag):
        c, tiles = launch.constants, launch.tiles
        shared = tiles.stages * (c.block_m + c.block_n) * c.block_k * size
        assert shared <= hardware.device.shared_memory
        assert tiles.programs * (shared + hardware.reserved) <= hardware.shared
        assert tiles.programs * tiles.warps * hardware.warp <= hardware.threads


@examples(max_examples=100)
@OVER_ALL
def test_phases_are_called_where_triton_can(problem: Problem, precision: str, device: str, flag: bool) -> None:
    for launch in launches(problem, precision, device, flag):
        c = launch.constants
        in_tensor_memory = device == "sm_100" and max(c.block_m, c.block_w) >= 64
        assert c.called == (device != "gfx942" and not in_tensor_memory)


@pytest.mark.parametrize("ptxas, inlined", [((12, 8), False), ((13, 2), False), ((13, 3), True), ((14, 0), True)])
def test_phases_are_inlined_where_wgmma_would_wait(ptxas: tuple[int, int], inlined: bool) -> None:
    for name, dtype, wgmma in (
        ("sm_90", torch.bfloat16, True),
        ("sm_90", torch.float32, False),
        ("sm_80", torch.bfloat16, False),
    ):
        device = replace(DEVICES[name], ptxas=ptxas)
        for case in NAMED:
            for backward in (False, True):
                problem = named(case.name, case.batch)
                launch = launch_config.launch(problem, dtype, device, backward=backward, tf32=False, lengths=False)
                assert launch.constants.called != (inlined and wgmma)


@examples(max_examples=100)
@OVER_ALL
def test_batches_and_lengths_share_what_is_compiled(problem: Problem, precision: str, device: str, flag: bool) -> None:
    of_length: dict[tuple[object, ...], tuple[Constants, ...]] = {}
    for length in (1, 2, 16, 17, 20, 24, 31, 32, 33, 34, 48, 64, 65, 300, 304, 1000, 1024, 2047):
        alike = set()
        for batch in (1, 2, 3, 12, 64, 511):
            both = launches(replace(problem, batch=batch, length=length), precision, device, flag)
            alike.add(tuple(launch.constants for launch in both))
        assert len(alike) == 1, f"another batch, another kernel, at L = {length}"
        (constants,) = alike
        key = tuple((c.stream, c.block_l, c.length_step) for c in constants)
        assert of_length.setdefault(key, constants) == constants


# ---- the workspace


@dataclass(frozen=True)
class Phase:
    """What a phase reads and writes of the workspace. ``in_place`` is read and written tile by tile."""

    reads: Sequence[str]
    writes: Sequence[str]
    in_place: Sequence[str] = ()


def forward_phases(c: Constants) -> Iterator[Phase]:
    """The steps of triton/forward.py for one chunk."""
    yield Phase([], ["initial"])
    for t in range(c.iterations):
        yield from computed(c, t)
        yield Phase(["hidden", state(t)], [state(t + 1)])
    yield Phase([state(t) for t in range(c.iterations + 1)], [])


def computed(c: Constants, t: int) -> Iterator[Phase]:
    """The phases from X^t to H."""
    joint = "joint" if c.projected else state(t)
    yield Phase([state(t)], ["joint", "value", "key"] if c.projected else ["value", "key"])
    if c.stream:
        yield Phase([joint, "key", "value"], ["hidden"])
    else:
        yield Phase([joint, "key"], ["correlation"])
        yield Phase(["value", "correlation"], ["hidden"])


def backward_phases(c: Constants) -> Iterator[Phase]:
    """The steps of triton/backward.py for one chunk."""
    states = [state(t) for t in range(c.iterations + 1)]
    yield Phase([], ["initial"])
    yield Phase(states, [d_state(c.iterations), "d_logits"])
    for t in reversed(range(c.iterations)):
        joint = "joint" if c.projected else state(t)
        d_update = "d_update" if c.released else d_state(t + 1)
        projected, *others = computed(c, t)
        yield Phase([*projected.reads, *states, "d_logits"], [*projected.writes, d_state(t)])
        yield from others
        if c.released:
            yield Phase(["hidden", d_state(t + 1)], ["d_update"])
        yield Phase([d_update, "hidden"], ["d_attended"])
        if c.stream:
            reads = [joint, "key", "value", "d_attended"]
            yield Phase(reads, ["d_value", "d_key", "d_joint"], in_place=[d_state(t)])
        else:
            yield Phase(["d_attended", "correlation", "value"], ["d_value", "d_score"])
            yield Phase(["key", joint, "d_score"], ["d_joint", "d_key"])
        reads = ["d_value", "d_joint", "d_key", d_state(t + 1), state(t)]
        yield Phase(reads, [], in_place=[d_state(t)])
    yield Phase(["initial", d_state(0)], [])


def state(t: int) -> str:
    return "initial" if t == 0 else f"X^{t}"  # all but the first are the caller's


def d_state(t: int) -> str:
    return f"d_state{t}"


def places(launch: Launch, problem: Problem) -> dict[str, tuple[int, int]]:
    """First element of every buffer of the workspace, and the one after its last."""
    c, rows = launch.constants, launch.chunk * problem.length
    unit = launch_config.unit(problem, launch.chunk)
    activation, square = rows * problem.width, launch.chunk * problem.width**2
    sizes = {
        **dict.fromkeys(("joint", "key", "value", "initial"), activation),
        **dict.fromkeys(("d_update", "d_value", "d_joint", "d_key"), activation),
        **dict.fromkeys(("hidden", "d_attended"), activation * c.modalities),
    }
    found = {name: (getattr(c, f"slot_{name}") * unit, size) for name, size in sizes.items()}
    found |= {d_state(t): ((c.slot_d_state + t % 2) * unit, activation) for t in range(c.iterations + 1)}
    found["correlation"] = c.slots * unit, square
    found["d_score"] = c.slots * unit + square, square
    found["d_logits"] = c.slots * unit + c.correlations * square, rows * c.modalities * c.ways
    return {name: (begin, begin + size) for name, (begin, size) in found.items()}


def check_workspace(phases: Sequence[Phase], at: dict[str, tuple[int, int]], size: int) -> None:
    """What is written lies in the workspace, beside all that is read in the same phase or later but written before."""
    alive: set[str] = set()
    for phase in reversed(phases):
        touched = [name for name in (*phase.writes, *phase.in_place) if name in at]
        alive -= set(phase.writes)
        alive |= set(phase.reads) | set(phase.in_place)
        for name in touched:
            begin, end = at[name]
            assert begin >= 0 and end <= size, f"{name} ends at {end} of {size}"
            for other in (alive | set(touched)) - {name}:
                assert other not in at or end <= at[other][0] or at[other][1] <= begin, f"{name} destroys {other}"
    assert not {name for name in alive if name in at}, "read before it is written"


@examples(max_examples=300)
@OVER_ALL
def test_the_workspace_holds_what_is_alive(problem: Problem, precision: str, device: str, flag: bool) -> None:
    both = zip(launches(problem, precision, device, flag), (forward_phases, backward_phases), strict=True)
    for launch, phases_of in both:
        phases, chunks = list(phases_of(launch.constants)), -(-problem.batch // launch.chunk)
        assert launch.steps == chunks * len(phases) + launch.reduced, "the reduction comes once"
        check_workspace(phases, places(launch, problem), launch.activation_workspace)
        values = launch.chunk * problem.length * len(problem.widths) * sum(problem.gate_ways)
        assert launch.gate_values >= values and launch.gate_values % 64 == 0
        assert launch_config.unit(problem, launch.chunk) % 64 == 0, "activations are aligned"


def test_an_overlap_is_found() -> None:
    """The check above on a layout that is wrong."""
    phases = [Phase([], ["a"]), Phase(["a"], ["b"]), Phase(["a", "b"], [])]
    check_workspace(phases, {"a": (0, 4), "b": (4, 8)}, 8)
    for at, size in (({"a": (0, 4), "b": (3, 7)}, 8), ({"a": (0, 4), "b": (4, 8)}, 7)):
        with pytest.raises(AssertionError):
            check_workspace(phases, at, size)
    with pytest.raises(AssertionError, match="before"):
        check_workspace(phases[1:], {"a": (0, 4), "b": (4, 8)}, 8)


# ---- gradients of the weights


@pytest.mark.parametrize("case", [case for case in CASES if case.batch], ids=str)
def test_every_parameter_has_room(case: Case) -> None:
    """Linear maps one after another, each at a multiple of 16, a gate as if it had 16 ways, or 32."""
    inputs = make(case, torch.float32)
    keys = [linear for layer in inputs.layers for linear in layer.key]
    linears = [
        *(layer.query for layer in inputs.layers if layer.query is not None),
        *(linear for layer in inputs.layers for group in (layer.value, layer.output) for linear in group),
    ]
    of_keys, elements = ([sum(x.numel() for x in y if x is not None) for y in of] for of in (keys, linears))
    block = 16 if case.iterations < 16 else 32
    elements += [block * (gate.weight.shape[1] + (gate.bias is not None)) for of_m in inputs.gates for gate in of_m]
    problem = describe(case, inputs)
    assert launch_config.parameter_elements(problem) == sum(-(-n // 16) * 16 for n in elements)
    assert launch_config.key_elements(problem) == sum(-(-n // 16) * 16 for n in of_keys)
    assert (len(elements) + len(keys)) * (2 if case.form == "released" else 1) == len(inputs.parameters)


@examples(max_examples=300)
@OVER_ALL
def test_parts_of_the_rows(problem: Problem, precision: str, device: str, flag: bool) -> None:
    forward, backward = launches(problem, precision, device, flag)
    assert not forward.reduced and forward.fp32_workspace == forward.gate_values
    if not flag:
        assert not backward.reduced and backward.fp32_workspace == backward.gate_values
        return
    rows = backward.chunk * problem.length
    assert 0 <= backward.parts <= division.MOST_PARTS and 0 <= backward.key_parts <= division.MOST_KEY_PARTS
    assert backward.parts <= 1 or rows // backward.parts >= division.FEWEST_ROWS
    assert backward.key_parts <= backward.chunk
    if 0 in (backward.parts, backward.key_parts):
        assert backward.chunk == problem.batch and backward.constants.layers == problem.iterations, "not one sum"
    of_parts = backward.parts * launch_config.parameter_elements(problem)
    assert backward.fp32_workspace == backward.gate_values + of_parts + backward.key_parts * launch_config.key_elements(
        problem
    )


H100 = DEVICES["sm_90"]


def named(name: str, batch: int) -> Problem:
    case = next(case for case in NAMED if case.name == name)
    return Problem(
        batch, case.length, case.widths, case.iterations, case.gating, case.form, case.dropout, case.temperature,
        case.normalize, case.shared, case.joint,
    )  # fmt: skip


@pytest.mark.parametrize("batch", [12, 31, 64, 512])
def test_the_sum_of_w_k_is_as_long_as_the_others(batch: int) -> None:
    """With few frames W_k has one tile for each modality: as one sum it would be the last task of the grid by far."""
    problem = named("clip", batch)
    launch = launch_config.launch(problem, torch.bfloat16, H100, backward=True, tf32=False, lengths=False, weights=True)
    rows = launch.chunk * problem.length / max(1, launch.parts)
    samples = -(-launch.chunk // launch.key_parts)
    assert samples * max(problem.widths) <= max(1.5 * rows, max(problem.widths))
    assert launch.key_parts * launch_config.key_elements(problem) * 4 <= 2**20, "bytes of its sums"


# ---- chunks


@examples(max_examples=300)
@OVER_ALL
def test_chunks_are_alike(problem: Problem, precision: str, device: str, flag: bool) -> None:
    """And no larger than need be to keep the grid busy, twice over."""
    for launch in launches(problem, precision, device, flag):
        chunks = -(-problem.batch // launch.chunk)
        assert launch.chunk == -(-problem.batch // chunks)
        columns = sum(-(-d // launch.tiles.n) for d in (problem.width, *problem.widths, *problem.widths))
        tasks = (launch.chunk - 0.5) * problem.length / launch.tiles.m * columns
        assert launch.chunk == 1 or tasks <= 2 * division.WAVES * launch.programs


def test_chunks_leave_few_programs_idle() -> None:
    """Of the H100's 132, in every phase: three samples of "long" would be 192 tasks, which are two rounds."""
    problem = named("long", 8)
    launch = launch_config.launch(problem, torch.bfloat16, H100, backward=False, tf32=False, lengths=False)
    assert launch.chunk in (2, 4)
    for phase in division.phases_of(problem, launch.tiles, launch.constants.stream, launch.chunk):
        tasks = sum(tasks for tasks, _ in phase)
        assert tasks / launch.programs / -(-tasks // launch.programs) > 0.95
    for name in ("abaw", "clip", "light", "long"):
        for batch in (8, 12, 31, 64, 100, 512):
            problem = named(name, batch)
            launch = launch_config.launch(problem, torch.bfloat16, H100, backward=False, tf32=False, lengths=False)
            chosen = division.rounds(problem, launch.tiles, launch.programs, launch.constants.stream, launch.chunk)
            for chunk in {1, launch.chunk // 2, launch.chunk // 3 + 1} - {0}:
                assert chosen <= division.rounds(problem, launch.tiles, launch.programs, launch.constants.stream, chunk)
