"""The host side of the CUDA C++ kernels, without a GPU: who may use them, the plan of a launch, what is launched."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from pytest import fixture, mark

from cases import Case, described, make
from grjca_kernels import backends, cuda, gated_rjca, native
from grjca_kernels import problem as problems
from grjca_kernels.backends import TABLE
from grjca_kernels.call import Gradients
from grjca_kernels.problem import Layer, Linear, Problem

if TYPE_CHECKING:
    from grjca_kernels._native import PhaseCost

PROBLEM = Problem(3, 5, (4, 2), 2, "flat", "released", 0.0, 0.1, False, False)
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
BUILT = native.missing is None and bool(native.library.cuda_architectures)
needs_nvcc = mark.skipif(not BUILT, reason="built without nvcc")
without_gpu = mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: test_gpu.py")


# ---- who may use them


@without_gpu
def test_without_a_gpu_it_says_why():
    reason = backends()["cuda"]
    assert reason is not None and reason == cuda.why_not()
    assert ("NVIDIA driver" in reason) if BUILT else ("nvcc" in reason)
    x = [torch.randn(2, 3, 4) for _ in range(2)]

    def linears(rows, columns):
        return tuple(Linear(torch.randn(rows, columns)) for _ in x)

    layer = Layer(None, linears(3, 3), linears(4, 4), linears(4, 8))
    with pytest.raises(
        RuntimeError, match="backend 'cuda' cannot run: it computes on cuda tensors, and these are on cpu"
    ):
        gated_rjca(x, [layer], iterations=1, gating="none", form="paper", backend="cuda")


def test_reasons(monkeypatch):
    library = SimpleNamespace(cuda_why_not=lambda: None, cuda_architectures="80;90")
    monkeypatch.setattr(native, "library", library)
    monkeypatch.setattr(native, "missing", "the native code was not built.")
    assert cuda.why_not() == "the native code was not built."
    monkeypatch.setattr(native, "missing", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.why_not() == "PyTorch sees no GPU."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "8.0 (Ampere) or later, and this one has 7.5" in str(cuda.why_not())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert cuda.why_not() is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "AMD" in str(cuda.why_not())


@mark.parametrize(
    "architectures, runs, refused",
    [
        ("80;90", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)], [(7, 5)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("86", [(8, 6), (8, 9), (9, 0)], [(8, 0)]),
        ("100f;80", [(8, 0), (10, 0), (12, 0)], []),
    ],
)
def test_which_chips_a_build_runs_on(architectures, runs, refused):
    assert [cuda._why_not_on(capability, architectures) for capability in runs] == [None] * len(runs)
    assert all(cuda._why_not_on(capability, architectures) for capability in refused)


def test_what_to_do_on_another_chip():
    assert "GRJCA_CUDA_ARCHITECTURES=80" in str(cuda._why_not_on((8, 0), "90a"))


def test_what_it_refuses():
    assert "these are on cpu" in str(cuda.refusal("cpu", torch.float32))
    assert "no float64" in str(cuda.refusal("cuda", torch.float64))
    assert all(cuda.refusal("cuda", dtype) is None for dtype in problems.DTYPES if dtype != torch.float64)
    assert TABLE["cuda"].unproven, "no GPU has run it"


# ---- the plan


@some.composite
def any_problem(draw) -> Problem:
    widths = draw(some.lists(some.integers(1, 1024), min_size=2, max_size=4).map(tuple))
    return Problem(
        draw(some.integers(1, 512)), draw(some.integers(1, 40) | some.integers(1, 2048)), widths,
        draw(some.integers(1, problems.MAX_ITERATIONS)), draw(some.sampled_from(problems.GATINGS)),
        draw(some.sampled_from(problems.FORMS)), draw(some.sampled_from([0.0, 0.5])), 0.1, draw(some.booleans()),
        draw(some.booleans()), draw(some.sampled_from(problems.JOINTS)),
    )  # fmt: skip


def plan(problem: Problem, precision: str, resident: int, backward: bool, weights: bool) -> dict[str, int]:
    tf32, dtype = precision == "tf32", "float32" if precision == "tf32" else precision
    launch = cuda.plan(problem, getattr(torch, dtype), resident, tf32=tf32, backward=backward, weights=weights)
    numbers = launch.plan()
    assert launch.workspace_bytes == numbers["workspace_bytes"]
    check_table(launch.table(), numbers, problem, backward)
    return numbers


def check_table(table: list[PhaseCost], p: dict[str, int], problem: Problem, backward: bool) -> None:
    """Every step is in it, with tiles that the kernel has, and costs something."""
    rounds = -(-p["chunks"] // p["teams"])
    assert sum(row.times for row in table) == p["all_steps"]
    assert table[0].phase == "initial" and table[0].times == rounds
    assert [row.phase for row in table if row.phase == "reduce"] == ["reduce"] * (p["parts"] > 0)
    for row in table:
        tiled = row.phase not in ("initial", "gate", "gates_backward", "initial_backward", "reduce")
        assert row.columns in ((64, 128) if tiled else (0,))
        assert (64 <= row.rows <= p["rows"] and row.rows % 16 == 0) if tiled else row.rows == 0
        assert 0 < row.microseconds < 1e8 and row.bytes > 0 and 1 <= row.turns <= row.tasks


def up(n: int, to: int) -> int:
    return -(-n // to) * to


def check_plan(problem: Problem, p: dict[str, int], precision: str, resident: int, backward: bool, weights: bool):
    assert p["bytes"] == (4 if "32" in precision else 2)
    assert p["width"] == problem.width and p["frames"] == up(problem.length, 16)
    # Blocks are all resident, or the barrier would wait forever; teams are of equal size.
    assert 1 <= p["blocks"] == p["teams"] * p["team_blocks"] <= resident
    assert 1 <= p["teams"] <= p["chunks"]
    # Every sample belongs to one chunk, and every chunk to one team in one round. The backward has one team.
    assert (p["chunks"] - 1) * p["chunk"] < problem.batch <= p["chunks"] * p["chunk"]
    rounds, rest = divmod(p["all_steps"], p["steps"])
    assert rounds == -(-p["chunks"] // p["teams"]) and rest == (backward and p["parts"] > 0)
    assert p["teams"] == 1 or not backward
    assert p["steps"] >= problem.iterations * p["phases"] + 2
    # With few frames, a task of K takes several samples, so that there is about one such task for every block.
    assert (p["key_samples"] > 0) == bool(p["streamed"]) == (problem.length <= 32)
    if p["streamed"]:
        of_columns = sum(up(width, 128) // 128 for width in problem.widths)
        samples = up(p["chunk"], p["key_samples"]) // p["key_samples"]
        assert of_columns * samples < p["team_blocks"] + of_columns
    # Regions of the workspace: one after another, aligned for copies of 16 bytes, all inside.
    rows = p["chunk"] * p["frames"]
    ways = rows * len(problem.widths) * sum(problem.gate_ways)
    square = 0 if p["streamed"] else p["chunk"] * problem.width**2 * p["bytes"]
    assert p["slot"] >= rows * problem.width
    regions = [(0, p["slots.count"] * p["slot"] * p["bytes"]), (p["correlations"], square)]
    if backward:
        regions += [(p["d_scores"], square), (p["values"], 4 * ways), (p["d_logits"], ways * p["bytes"])]
    ends = [*(begin for begin, _ in regions[1:]), p["team_bytes"]]
    for (begin, size), end in zip(regions, ends, strict=True):
        assert begin % 16 == 0 and begin + size <= end
    assert p["team_bytes"] % 16 == 0 and p["teams"] * p["team_bytes"] <= p["gradients_at"]
    assert p["gradients_at"] + 4 * p["parts"] * p["gradients"] <= p["counters_at"]
    assert p["counters_at"] % 4 == 0 and p["counters_at"] + 4 * (p["teams"] + 1) <= p["workspace_bytes"]
    if backward and weights:
        assert p["gradients"] >= parameters(problem)
    else:
        assert p["parts"] == 0


def parameters(problem: Problem) -> int:
    """Elements of all of them."""
    d, length, released = problem.width, problem.length, problem.released

    def linear(rows: int, columns: int) -> int:
        return rows * (columns + released)

    layer = linear(d, d) * problem.projected
    layer += sum(linear(length, length) + linear(d_m, d_m) + linear(d_m, d) for d_m in problem.widths)
    gates = sum(linear(ways, d_m) for ways in problem.gate_ways for d_m in problem.widths)
    return layer * (1 if problem.shared else problem.iterations) + gates


@needs_nvcc
@settings(deadline=None, print_blob=True, max_examples=300)
@given(
    any_problem(),
    some.sampled_from(PRECISIONS),
    some.sampled_from([1, 3, 72, 216, 264, 296]),
    some.booleans(),
    some.booleans(),
)
def test_any_plan(problem, precision, resident, backward, weights):
    p = plan(problem, precision, resident, backward, weights)
    check_plan(problem, p, precision, resident, backward, weights)
    assert plan(problem, precision, resident, backward, weights) == p, "no pure function"


@needs_nvcc
@mark.parametrize("backward", [False, True])
@mark.parametrize("length", [1, 32, 33, 2048])
@mark.parametrize("batch", [1, 2, 131, 512])
@mark.parametrize("widths", [(1, 1), (1, 1024), (1024,) * 4, (512, 512), (256, 128)], ids=str)
def test_plans_at_the_corners(widths, batch, length, backward):
    for gating in ("none", "hierarchical"):
        problem = Problem(batch, length, widths, 16, gating, "released", 0.5, 0.1, True, False)
        for resident in (1, 264):
            p = plan(problem, "bfloat16", resident, backward, True)
            check_plan(problem, p, "bfloat16", resident, backward, True)


@needs_nvcc
def test_a_plan_that_cannot_be_is_refused():
    for change, dtype, resident, sharing, said in (
        ({"batch": 0}, torch.float32, 3, 2, "at least one sample"),
        ({}, torch.float32, 0, 2, "at least one block"),
        ({}, torch.float32, 3, 0, "at least one block"),
        ({}, torch.float64, 3, 2, "no float64"),
    ):
        with pytest.raises(ValueError, match=said):
            cuda.plan(replace(PROBLEM, **change), dtype, resident, sharing, tf32=False, backward=False, weights=False)


HEADLINE = Problem(12, 300, (256, 128), 2, "flat", "released", 0.1, 0.1, True, False)


@needs_nvcc
@mark.parametrize("backward", [False, True])
def test_blocks_that_have_a_multiprocessor_to_themselves_cost_less(backward):
    """As on sm_86 and sm_89, whose shared memory holds one block; there are then as many multiprocessors as blocks."""

    def costs(resident, sharing):
        launch = cuda.plan(HEADLINE, torch.bfloat16, resident, sharing, tf32=False, backward=backward, weights=backward)
        return sum(row.times * row.microseconds for row in launch.table())

    assert costs(84, 1) < 0.8 * costs(84, 2), "84 multiprocessors, and 42"
    assert costs(168, 2) < costs(84, 1), "two blocks of a multiprocessor wait at the same time"
    assert costs(1, 1) == costs(1, 2), "there is one multiprocessor either way"


def test_a_launch_is_planned_for_the_device_that_was_asked(monkeypatch):
    planned = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "_resident", lambda *of: (84, 1))
    monkeypatch.setattr(cuda, "plan", lambda problem, dtype, *blocks, **options: planned.append(blocks))
    cuda._launch.__wrapped__(PROBLEM, torch.float32, False, 0, False, False)
    assert planned == [(84, 1)]


# ---- what is launched; the device is pretended


@fixture
def device(monkeypatch):
    """The CPU in the place of a GPU: launches are kept instead of started."""
    state = SimpleNamespace(started=[], stream=7, planned=[])

    def start(*arguments):
        *tensors, resources, together = arguments
        state.started.append(SimpleNamespace(tensors=tensors, resources=resources, together=together))

    def launch_of(*arguments, **options):
        state.planned.append(options)
        return SimpleNamespace(workspace_bytes=100, forward=start, backward=start)

    monkeypatch.setattr(cuda, "launch_of", launch_of)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: state.stream, raising=False)
    return state


CASE = Case("small", 3, 5, (4, 2))
CALL = described(CASE, make(CASE, torch.float32), iterates=torch.empty(2, 3, 5, 6))


def test_what_a_launch_is_given(device):
    none = [None, None]
    wanted = Gradients(none, none, none, none, [torch.empty(1)])
    cuda.forward(CALL)
    cuda.backward(CALL, wanted)
    cuda.backward(CALL, wanted._replace(parameters=none))
    forward, backward, _ = device.started
    assert forward.tensors == [CALL] and backward.tensors[0] is CALL and backward.tensors[1] is wanted
    workspace, stream, _ = forward.resources
    assert workspace and stream == 7 and forward.together
    assert [options["weights"] for options in device.planned] == [False, True, False]


def test_nothing_on_the_device_outlives_a_call(device):
    """CUDA graphs of torch.compile refuse what is kept in their pool and that they do not know."""
    before = {id(value) for value in gc.get_objects() if issubclass(type(value), torch.Tensor)}
    cuda.forward(CALL)
    device.started.clear()
    gc.collect()
    assert all(id(value) in before for value in gc.get_objects() if issubclass(type(value), torch.Tensor))


@needs_nvcc
def test_what_a_forward_at_the_headline_shape_costs_by_count():
    """The estimates that README and CHANGELOG give, of an H200; no GPU has confirmed them."""
    for batch, length, widths, backward, most in (
        (12, 300, (256, 128), False, 100),
        (12, 300, (256, 128), True, 332),
        (128, 16, (512, 512), False, 232),
    ):
        gating = "none" if length == 16 else "flat"
        problem = Problem(batch, length, widths, 2, gating, "released", 0.1, 0.1, length != 16, False)
        launch = cuda.plan(problem, torch.bfloat16, 264, tf32=False, backward=backward, weights=backward)
        assert sum(row.times * row.microseconds for row in launch.table()) <= most


# ---- the tensors


@needs_nvcc
def test_a_launch_is_of_one_direction():
    launch = cuda.plan(PROBLEM, torch.float32, 3, tf32=False, backward=False, weights=False)
    none = [None, None]
    gradients = Gradients(none, none, none, none, [None] * len(CALL.parameters))
    with pytest.raises(ValueError, match="planned for the forward"):
        launch.backward(CALL, gradients, (0, 0, 0), True)


@needs_nvcc
@without_gpu
def test_what_the_runtime_says_is_a_sentence():
    with pytest.raises(RuntimeError, match=r"CUDA: choosing the device failed: .* \(cudaError\w+\)\. "):
        native.library.cuda_resident("bfloat16", False, True, 0)
