"""The parts of the GPU benchmarks that need no GPU: stages, the estimate, and the names of the steps."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gpu
from grjca.measure import SHAPES, Shape
from grjca_kernels import cuda, native
from grjca_kernels.problem import Problem
from grjca_kernels.triton_kernels import launch_config

needs_nvcc = pytest.mark.skipif(not hasattr(native.library, "CudaLaunch"), reason="built without nvcc")


def test_stages(capsys):
    """First what tells whether the kernels are right and fast; whatever is asked of one backend is asked of both."""
    assert gpu.main(["--list"]) == 0
    names = [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:5] == ["doctor", "self-check-cuda", "self-check-triton", "tests-cuda", "benchmarks"]
    assert {"tests-triton", "memcheck-cuda", "memcheck-triton", "phases", "full"} < {*names}
    with pytest.raises(SystemExit):
        gpu.main(["--only", "nothing"])


def test_a_stage_that_hangs_or_fails_costs_no_more_than_itself(capfd):
    hanging, failing, fine = (["-c", code] for code in ("import time; time.sleep(100)", "exit(3)", "print('here')"))
    assert [gpu.run("a", (seconds, code)) for seconds, code in ((1, hanging), (60, failing), (60, fine))] == [0, 0, 1]
    said = capfd.readouterr().out
    assert "a: failed, with nothing within 1 s" in said and "failed, with 3" in said and "here\n---- a: passed" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_nothing_is_run(capsys):
    assert gpu.main([]) == 2 and "PyTorch sees no GPU" in capsys.readouterr().err
    phases = pytest.importorskip("benchmarks.gpu_phases")
    with pytest.raises(SystemExit, match="expected a GPU"):
        phases.main([])


@needs_nvcc
def test_the_estimate(capsys):
    """A table for every cell, pass and backend, and in each a line for every phase."""
    assert gpu.main(["--estimate"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("ESTIMATES by count")
    for name in ("abaw B=12 forward, cuda", "abaw B=12 forward, triton", "long B=8 backward, triton"):
        assert f"\n{name}: " in said
    heads = [line for line in said.splitlines() if line.endswith(" us") and "B=" in line]
    assert len(heads) == 24 and all(float(line.split()[-2]) > 0 for line in heads)
    assert said.count("\nreduce ") + said.count("\ninitial_backward ") >= 12


# ---- benchmarks.gpu_phases


def described(shape, form="released"):
    widths = (shape.dim_visual, shape.dim_audio)
    common = (shape.length, widths, shape.iterations, shape.gating, form, 0.5, 0.1, shape.normalize, False)
    return Problem(shape.batch, *common)


@pytest.fixture
def gpu_phases():
    pytest.importorskip("triton", minversion="3.6")
    from benchmarks import gpu_phases

    return gpu_phases


@pytest.mark.parametrize("name", ["abaw", "clip", "light"])
@pytest.mark.parametrize("form", ["released", "paper"])
def test_every_step_of_triton_has_a_name(name, form, gpu_phases):
    device, common = launch_config.Device("cuda", 90, 132, 227 * 1024), {"tf32": False, "lengths": False}
    for batch, backward in ((1, False), (64, False), (1, True), (64, True)):
        problem = described(replace(SHAPES[name], batch=batch), form)
        with gpu_phases.chunks_of(5):
            launch = launch_config.launch(
                problem, torch.bfloat16, device, backward=backward, weights=backward, **common
            )
        assert launch.chunk == min(5, batch)
        assert len(gpu_phases.step_names(launch, backward)) == launch.steps


def plan_of(shape, backward, resident, form="released"):
    options = {"tf32": False, "backward": backward, "weights": backward}
    return cuda.plan(described(shape, form), torch.float16, resident, **options).plan()


@needs_nvcc
@pytest.mark.parametrize("name", ["abaw", "clip", "light"])
@pytest.mark.parametrize("form", ["released", "paper"])
def test_every_step_of_cuda_has_a_name(name, form, gpu_phases):
    shape = SHAPES[name]
    for batch, backward in ((1, False), (64, False), (1, True), (64, True)):
        plan = plan_of(replace(shape, batch=batch), backward, resident=264, form=form)
        streamed, reduced = bool(plan["streamed"]), plan["parts"] > 0
        names = gpu_phases.names_of_steps(
            plan["all_steps"], shape.iterations, form == "released", streamed, backward, reduced
        )
        assert len(names) == plan["all_steps"]


@needs_nvcc
def test_what_the_sanitizer_runs_reaches_every_kind_of_launch(gpu_phases):
    """If csrc/cuda/plan.h chooses otherwise, gpu_phases.RESIDENT wants other numbers."""
    forward, backward = (
        [
            plan_of(Shape(frames, 48, 24, 2, 80, "flat", normalize=True), direction, resident)
            for frames in (16, 40)
            for resident in gpu_phases.RESIDENT
        ]
        for direction in (False, True)
    )
    assert any(plan["chunks"] > plan["teams"] for plan in forward)
    assert any(plan["teams"] > 1 and plan["team_blocks"] > 1 for plan in forward)
    assert any(plan["chunks"] > 1 for plan in backward) and any(plan["parts"] > 1 for plan in backward)
    assert {plan["streamed"] for plan in forward} == {0, 1}


def test_steps_are_added_over_chunks(gpu_phases):
    assert gpu_phases.added(["a", "b", "a"], [1.0, 2.0, 4.0]) == {"a": 5.0, "b": 2.0}
    assert gpu_phases.is_ours("grjca::cuda::forward") and not gpu_phases.is_ours("cublas")
