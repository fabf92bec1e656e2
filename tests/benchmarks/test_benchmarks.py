"""The figures that are published: what is counted, what is refused, and the memory that is promised."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gate, gpu, ledger, report
from benchmarks.cases import IMPLEMENTATIONS, Problem, flop, tanhs
from grjca.measure import SHAPES, Shape, alternate, saved_bytes
from grjca.model.eager import GatedRJCAEager
from grjca_kernels import GatedRJCAFused, backends, cuda, native
from grjca_kernels.problem import Problem as Described

SMALL = Shape(9, 6, 5, 2, 3, "flat", normalize=True)


def test_saved_bytes():
    x = torch.randn(10, 4, requires_grad=True)
    weight = torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(lambda: x + 1) == 0
    assert saved_bytes(lambda: x.exp()) == 160  # its result
    assert saved_bytes(lambda: x.sin() + x.cos()) == 160  # x, once
    assert saved_bytes(lambda: x[:2].sin()) == 160  # a view keeps all of it alive
    assert saved_bytes(lambda: x @ weight) == 160 + 64
    assert saved_bytes(lambda: x @ weight.t(), [weight]) == 160
    assert saved_bytes(lambda: x.exp().exp()) == 320
    with torch.no_grad():
        assert saved_bytes(lambda: x.exp()) == 0


def test_saved_bytes_leaves_backward_intact():
    x = torch.randn(5, requires_grad=True)
    results = []
    saved_bytes(lambda: results.append(x.exp()))
    results[0].sum().backward()
    assert torch.equal(x.grad, x.exp())


def test_alternate():
    order = []
    times = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert all(len(of_call) == 2 and min(of_call) >= 0 for of_call in times.values())


@pytest.mark.skipif(backends()["cpu"] is not None, reason="the promise is that of the kernels")
@pytest.mark.parametrize(("name", "ratio"), [("abaw", 6), ("clip", 20)])
def test_memory_that_is_promised(name, ratio):
    """The share of the activations at least; every one of them grows with B, so a small B will do."""
    shape = replace(SHAPES[name], batch=2)
    inputs = shape.inputs(0, requires_grad=True)
    saved = {}
    for kind, options in ((GatedRJCAEager, {}), (GatedRJCAFused, {"keep": "least"})):
        block = shape.block(kind, **options)
        saved[kind] = saved_bytes(lambda block=block: block(*inputs), block.parameters())
    assert saved[GatedRJCAFused] * ratio <= saved[GatedRJCAEager]
    frames = shape.batch * shape.length * (shape.dim_visual + shape.dim_audio) * 4
    assert saved[GatedRJCAFused] <= (1 + shape.iterations) * frames + 8  # X^0 to X^T and the seed of the masks


@pytest.mark.parametrize("gating", ["none", "dynamic", "flat", "hierarchical"])
@pytest.mark.parametrize("normalize", [False, True])
def test_eager_is_the_reference(gating, normalize):
    """In float64, where a mistake cannot hide behind rounding."""
    problem = Problem(replace(SMALL, gating=gating, normalize=normalize, iterations=3))
    results = [
        gate.run(problem.block(kind, dropout=0.0, dtype=torch.float64, **options), problem, torch.float64)
        for kind, options in ((GatedRJCAEager, {}), (GatedRJCAFused, {"backend": "reference"}))
    ]
    torch.testing.assert_close(results[0].output, results[1].output, rtol=0, atol=1e-12)
    for kind, vector in results[1].gradients.items():
        torch.testing.assert_close(results[0].gradients[kind], vector, rtol=0, atol=1e-11 * float(vector.abs().max()))


def test_gate_lets_right_ones_pass():
    problem = Problem(SMALL)
    for name in ("eager", "fused"):
        gate.check_forward(IMPLEMENTATIONS[name](problem), problem)
        gate.check_training(IMPLEMENTATIONS[name](problem, dropout=0.0), problem)
    gate.check_training(IMPLEMENTATIONS["fused"](problem, dropout=0.6), problem, 0.6)


class Slightly(torch.autograd.Function):
    """Multiplies the value, or the gradient, by nearly 1."""

    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.gradient = gradient
        return x * value

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.gradient, None, None


@pytest.mark.parametrize(("value", "gradient"), [(1.0001, 1.0), (1.0, 1.0001), (float("nan"), 1.0)])
def test_gate_fails_wrong_ones(value, gradient):
    class Wrong(GatedRJCAFused):
        def forward(self, visual, audio):
            return Slightly.apply(super().forward(visual, audio), value, gradient)

    problem = Problem(SMALL)
    with pytest.raises(AssertionError, match="is allowed"):
        gate.check_training(problem.block(Wrong, dropout=0.0), problem)
    if value != 1:
        with pytest.raises(AssertionError, match="output"):
            gate.check_forward(problem.block(Wrong), problem)


def test_gate_fails_other_masks():
    class Wrong(GatedRJCAFused):
        def forward(self, visual, audio):
            torch.rand(1)
            return super().forward(visual, audio)

    problem = Problem(SMALL)
    with pytest.raises(AssertionError, match="is allowed"):
        gate.check_training(problem.block(Wrong, dropout=0.6), problem, 0.6)


# ---- what a forward costs


@pytest.mark.parametrize("gating", ["none", "dynamic", "flat", "hierarchical"])
def test_counts_are_those_of_pytorch(gating, monkeypatch):
    shape, counted = replace(SMALL, gating=gating, iterations=3), []
    tanh = torch.tanh
    monkeypatch.setattr(torch, "tanh", lambda x: (counted.append(x.numel()), tanh(x))[1])
    block = shape.block(GatedRJCAFused, backend="reference")
    with torch.no_grad(), FlopCounterMode(display=False) as mode:
        block.eval()(*shape.inputs(0))
    assert flop(shape) == mode.get_total_flops() and tanhs(shape) == sum(counted)


# ---- report


def case(implementation, times, **extra):
    described = {"device": "A CPU (R)", "threads": 2, "dtype": "float32", "torch": "2", "commit": "abc"}
    return {
        "stats": {"data": times},
        "extra_info": {
            "shape": "abaw",
            "batch": 12,
            "pass": "step",
            "implementation": implementation,
            **described,
            **extra,
        },
    }


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A repository in which the report can write, and a file of pytest-benchmark."""
    measured = tmp_path / "measured.json"
    cases = [
        case("eager", [0.3, 0.1, 0.2], saved_bytes=6_000_000),
        case("fused", [0.1, 0.1], saved_bytes=1_000_000, peak_bytes=2_000_000),
    ]
    measured.write_text(json.dumps({"benchmarks": cases}))
    paths = {"ROOT": ".", "RESULTS": "results", "README": "README.md", "TIMES": "TIMES.md", "DETAILS": "DETAILS.md"}
    for name, path in paths.items():
        monkeypatch.setattr(report, name, tmp_path / path)
    for name in ("README.md", "TIMES.md", "DETAILS.md"):
        (tmp_path / name).write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    return tmp_path, measured


def test_report(published):
    folder, measured = published
    assert report.main([str(measured)]) == 0
    rows = json.loads((folder / "results" / "a-cpu-r-2-threads.json").read_text())
    assert [(row["implementation"], row["ms"], row["rounds"]) for row in rows] == [("eager", 200, 3), ("fused", 100, 2)]
    assert rows[0]["ms_p20"] == 140 and rows[0]["ms_p80"] == 260 and rows[0]["commit"] == "abc"
    text = (folder / "TIMES.md").read_text()
    assert "| abaw, B = 12 | float32 | step | 200 | 100 | 2.0x | 2.0x |\n" in text
    assert text.startswith("before\n<!-- results -->\n") and text.endswith("\n<!-- /results -->\nafter\n")
    assert "old" not in text
    assert "| abaw, B = 12 | float32 | step | 6 | 1 | 2 |\n" in (folder / "DETAILS.md").read_text()


def test_the_forward_within_a_training_step_is_a_row_of_its_own(published):
    folder, measured = published
    cases = [
        case("eager", [0.3], saved_bytes=6_000_000, forward_seconds=[0.2]),
        case("compiled", [0.25], forward_seconds=[0.15], formulation="strong"),
        case("fused", [0.1, 0.1], saved_bytes=1_000_000, forward_seconds=[0.05, 0.03]),
    ]
    measured.write_text(json.dumps({"benchmarks": cases}))
    assert report.main([str(measured)]) == 0
    rows = json.loads((folder / "results" / "a-cpu-r-2-threads.json").read_text())
    assert [(row["pass"], row["ms"], "saved_bytes" in row) for row in rows if row["implementation"] == "fused"] == [
        ("training forward", 40, False),
        ("step", 100, True),
    ]
    text = (folder / "TIMES.md").read_text()
    assert "| float32 | training forward | 200 | 150\\* | 40 | 5.0x | 3.8x |\n" in text
    assert "| float32 | step | 300 | 250\\* | 100 | 3.0x | 2.5x |\n\n\\*: of the strong formulation" in text


def test_report_check(published, capsys):
    folder, measured = published
    report.main([str(measured)])
    assert report.main(["--check"]) == 0
    page = folder / "TIMES.md"
    page.write_text(page.read_text().replace("200", "20"))
    assert report.main(["--check"]) == 1
    assert "| 20 |" in page.read_text()  # a check repairs nothing
    assert report.main(["--render"]) == 0 and "| 200 |" in page.read_text() and report.main(["--check"]) == 0
    page.write_text("no markers")
    assert report.main(["--check"]) == 1
    page.unlink()
    assert report.main(["--check"]) == 1
    assert "TIMES.md" in capsys.readouterr().err


def test_no_gpu_yet_is_a_state_that_the_check_accepts(published):
    folder, measured = published
    report.main([str(measured)])
    assert not list((folder / "results").glob("*.jsonl"))
    assert report.main(["--check"]) == 0


# ---- GPUs; every figure here is invented

GPU = {"device": "A GPU", "driver": "1", "torch": "2", "triton": "3", "commit": "abc", "source": "s1"}


def gpu_row(implementation, ms, shape="abaw", batch=12, what="forward", **others):
    place = {"shape": shape, "batch": batch, "pass": what, "dtype": "bfloat16", "implementation": implementation}
    row = f"{shape} B={batch} bfloat16 {implementation} {what}"
    return {"row": row, "kind": "time", **place, "device_ms": ms, **GPU, **others}


def test_verdicts():
    memory = [
        gpu_row(how, 0, kind="memory", bytes=bytes, row=f"abaw B=12 memory {how}")
        for how, bytes in (("eager", 600), ("fused", 101))
    ]
    rows = [
        gpu_row("eager", 1.3),
        gpu_row("fused", 0.2),
        gpu_row("compiled", 0.2),
        gpu_row("fused-graph", 0.16),
        *memory,
    ]
    found = {row["goal"]: row for row in ledger.verdicts([*rows, *memory])}
    assert len(found) == len(ledger.GOALS)
    assert found["abaw B=12 forward: 6x faster than eager"]["verdict"] == "met"
    assert found["abaw B=12 forward: 1.5x faster than compiled"]["verdict"] == "missed by 17 %"
    assert found["abaw B=12 memory: 6x smaller than eager"]["verdict"] == "missed by 0.99 %"
    assert found["clip B=64 forward: 5x faster than eager"]["verdict"] == "not measured"
    assert {row["verdict"] for row in ledger.verdicts([])} == {"not measured"}


def test_verdicts_on_the_cuda_kernels():
    rows = [
        gpu_row("eager", 1.0, process="1"),
        gpu_row("fused", 0.16, process="1"),
        gpu_row("cuda", 0.1, process="1"),
        gpu_row("compiled", 0.2, process="1"),
        gpu_row("cuda-graph", 0.1, process="2"),
        gpu_row("cuda", 0.16, batch=64, GFLOP=60.0, Gtanh=0.05),
        gpu_row("cuda", 0.1, shape="clip", batch=128, GFLOP=39.0, Gtanh=0.2),
        {"row": "ceiling matrix bfloat16", "TFLOP/s": 750.0},
        {"row": "ceiling tanh.approx.f32", "G/s": 5000.0},
        {"row": "host time of a call, cuda", "forward us": 20.0},
    ]
    found = {row["goal"]: (row["shown"], row["verdict"]) for row in ledger.verdicts(rows)}
    assert found["abaw B=12 forward: cuda 1.5x faster than fused"] == ("1.60x", "met")
    assert found["abaw B=12 forward: cuda 8x faster than eager"] == ("10.00x", "met")
    of_two = ("2.00x, from two processes", "missed by 20 %")
    assert found["abaw B=12 forward: cuda 2.5x faster than compiled"] == of_two
    assert found["abaw B=64 forward: cuda at 40 % of the ceiling matrix bfloat16"] == ("50 %", "met")
    assert found["clip B=128 forward: cuda at 50 % of the ceiling tanh.approx.f32"] == ("40 %", "missed by 20 %")
    assert found["host time of a forward: cuda at most 15 us"] == ("20 us", "missed by 25 %")
    assert found["abaw B=12 training: cuda 5x faster than eager"] == ("", "not measured")


def test_a_goal_has_rows_that_decide_it():
    """Of the same names as the plan's."""
    planned = {row for _, plan in gpu.stages().values() for row in plan}
    for goal in ledger.GOALS:
        assert planned >= {*goal.rows}, goal


def test_whatever_is_measured_of_triton_is_measured_of_cuda():
    """But other configurations, and slow tests: there is nothing to compile."""
    plans = {name: plan for name, (_, plan) in gpu.stages().items()}
    of_triton = {row for name, plan in plans.items() if name not in ("variants", "slow tests triton") for row in plan}
    for row in of_triton:
        assert row.replace("fused", "cuda").replace("triton", "cuda") in of_triton


def test_a_first_hour():
    """What comes first, and that each stage fits into a command of 10 minutes."""
    plans = gpu.stages()
    first = [
        "installed",
        "self-check cuda",
        "self-check triton",
        "phases",
        "abaw",
        "clip",
        "compiled abaw B=12 forward",
    ]
    assert [*plans][:10] == [*first, "sanitizer", "tests cuda", "tests triton"]
    assert max(most for most, _ in plans.values()) <= 540
    assert [row.removeprefix("self-check cuda ") for row in plans["self-check cuda"][1]] == [*gpu.LAUNCHES]
    for name, (_, plan) in plans.items():
        compiled = [row for row in plan if " compiled " in row]
        assert not compiled or (len(plan) == 1 and name.startswith("compiled")), "one compilation for a stage"
    rows = [row for _, plan in plans.values() for row in plan]
    assert len(rows) == len({*rows})
    for name, batch in (("abaw", 12), ("abaw", 64), ("clip", 64), ("clip", 128)):
        assert {f"{name} B={batch} phases {how}" for how in gpu.KERNELS} <= {*plans["phases"][1]}


def test_the_plan_names_what_there_is():
    pytest.importorskip("triton", minversion="3.6")
    from benchmarks import ceilings, gpu_parts

    planned = {row for _, plan in gpu.stages().values() for row in plan}
    assert {f"ceiling {name}" for name in ceilings.CEILINGS} <= planned
    assert {f"abaw B=12 variant {name} training" for name in gpu_parts.VARIANTS} <= planned
    assert {*gpu.KERNELS.values()} <= {*backends()}


def test_a_stage_goes_on_where_it_stopped(tmp_path, capsys):
    path, calls, broken = tmp_path / "results" / "gpu.jsonl", [], [True]

    def fine():
        calls.append("fine")
        return {"device_ms": 1.0}

    def fails():
        calls.append("fails")
        if broken[0]:
            raise AssertionError("an error of 1, 0 is allowed")
        return {"device_ms": 2.0}

    def run(source):
        plan = {"a": fine, "b": fails, "c": fine}
        return gpu.run_stage("stage", plan, path, lambda: {"source": source}, lambda: {"clocks.sm": "1980"})

    assert run("s1") == 1 and calls == ["fine", "fails", "fine"]
    assert [row["row"] for row in ledger.read(path)] == ["a", "b", "c"]
    assert ledger.read(path)[1]["error"].startswith("AssertionError") and "device_ms" not in ledger.read(path)[1]
    broken[0] = False
    assert run("s1") == 0 and calls[3:] == ["fails"], "only what failed is tried again"
    assert {row["row"] for row in ledger.current(ledger.read(path))} == {"a", "b", "c"}
    with path.open("a") as file:
        file.write('{"row": "half')  # killed while it wrote
    assert ledger.done(ledger.read(path), "s1") == {"a", "b", "c"}
    path.write_text(path.read_text() + "\n")
    assert run("s2") == 0 and calls[4:] == ["fine", "fails", "fine"], "other sources are measured anew"
    assert len(ledger.current(ledger.read(path))) == 3
    assert ledger.read(path)[0]["clocks"] == {"clocks.sm": "1980"}


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="GPUs are measured on Linux")
def test_a_stage_ends_with_the_run_that_started_it(tmp_path):
    """However that ends: what went on alone would take the GPU from the next run."""
    note = tmp_path / "stage"
    stage = "import os; from benchmarks.gpu import end_with; print(os.getpid(), flush=True); end_with(os.getppid())"
    run = (
        "import subprocess, sys; "
        f"subprocess.Popen([sys.executable, '-c', {stage!r}], start_new_session=True, stdout=open({str(note)!r}, 'w'))"
        ".wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", run], cwd=ledger.ROOT)
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text().endswith("\n")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    while alive(int(note.read_text())):
        assert time.monotonic() < deadline, "the stage goes on"
        time.sleep(0.05)


def alive(pid):
    """A process that nobody has waited for yet is dead too."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text() if Path("/proc/self/stat").exists() else ""
        os.kill(pid, 0)
    except OSError:
        return False
    return ") Z " not in status


def test_a_source_that_changes_has_another_name(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    file = tmp_path / "benchmarks" / "gpu.py"
    file.write_text("a")
    before = ledger.source(tmp_path)
    assert ledger.source(tmp_path) == before
    file.write_text("b")
    assert ledger.source(tmp_path) != before


def test_a_dry_run(tmp_path, capsys):
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "none.jsonl")]) == 0
    out = capsys.readouterr().out
    order = ("installed cuda", "self-check cuda", "abaw B=12 phases cuda", "abaw B=12 bfloat16 cuda forward")
    order += (
        "abaw B=12 bfloat16 compiled forward",
        "sanitizer memcheck cuda",
        "tests cuda",
        "tests triton",
        "variants",
    )
    assert [*order] == sorted(order, key=out.index)
    assert "not measured" in out and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_nothing_is_timed(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "gpu.jsonl")]) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--only", "nothing"])


def test_what_is_not_installed_is_an_error_in_words(monkeypatch):
    import grjca_kernels

    monkeypatch.setattr(grjca_kernels, "backends", lambda: {"cuda": "it was built without nvcc.", "triton": None})
    plan = gpu.stages()["installed"][1]
    assert plan["installed triton"]() == {"kind": "installed", "backend": "triton"}
    with pytest.raises(RuntimeError, match=r"the cuda backend cannot run here, .*: it was built without nvcc\."):
        plan["installed cuda"]()


class Stages:
    """In place of subprocess.Popen: what a process of a stage would do, and how it would end."""

    pid = 2**22 + 1  # of no process

    def __init__(self, out, ends):
        self.out, self.ends, self.ran = out, ends, []

    def __call__(self, command, **options):
        self.name = command[command.index("--stage") + 1]
        assert command[command.index("--out") + 1] == str(self.out)
        self.ran.append(self.name)
        return self

    def wait(self, seconds=None):
        end = self.ends.get(self.name, 0)
        if end is None and seconds is not None:
            raise subprocess.TimeoutExpired(self.name, seconds)
        return end


def test_a_run_goes_on_after_a_stage_that_hangs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu.jsonl"
    stages = Stages(out, {"b": None, "c": -11})
    monkeypatch.setattr(gpu.subprocess, "Popen", stages)
    chosen = {name: (most, {name: dict}) for name, most in (("a", 1), ("b", 1), ("long", 1000), ("c", 1), ("d", 1))}
    assert gpu.run_all(chosen, out, "abc", 60)
    assert stages.ran == ["a", "b", "c", "d"] and "no time for long" in capsys.readouterr().out
    assert [(row["row"], row["error"]) for row in ledger.read(out)] == [
        ("stage b", "did not end within 1 s"),
        ("stage c", "ended with -11"),
    ]


def test_a_run_ends_where_kernels_are_missing(tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu.jsonl"
    stages = Stages(out, {"installed": 1})
    monkeypatch.setattr(gpu.subprocess, "Popen", stages)
    assert not gpu.run_all({"installed": (1, {"a": dict}), "abaw": (1, {"b": dict})}, out, "abc", 60)
    assert stages.ran == ["installed"] and "Not all that was to be measured is installed" in capsys.readouterr().out


def test_a_self_check_that_hangs_in_one_precision(tmp_path, monkeypatch):
    def logged(command, log, seconds):
        precision = next(name for name in gpu.PRECISIONS if repr(name) in command[-1])
        assert "'cuda'" in command[-1] and "'in one launch'" in command[-1] and log == tmp_path / "gpu.log"
        said = {"tf32": "an error\ntf32: L = 20, Y[0]: error 1, 0.1 is allowed.", "float16": "a finding"}
        return None, said.get(precision, f"a finding\n{precision}: passed\n")

    monkeypatch.setattr(gpu, "logged", logged)
    row = gpu.stages(tmp_path / "gpu.log")["self-check cuda"][1]["self-check cuda in one launch"]()
    assert row["failed"] == {
        "float16": "no verdict within 60 s",
        "tf32": "L = 20, Y[0]: error 1, 0.1 is allowed.",
    }


def pytest_of(tmp_path, source, seconds, monkeypatch):
    """The row of tests in a file of their own, and the log."""
    file, log = tmp_path / "test_of_these.py", tmp_path / "gpu.log"
    file.write_text(source)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 1)
    return gpu.tests("", "", seconds, log, str(file)), log.read_text()


ENDS = """
import os, pytest

def test_first(): pass
def test_that_hangs(): os._exit(1)  # as pytest-timeout ends a process, by --timeout-method=thread
@pytest.mark.skip
def test_skipped(): pass
@pytest.mark.parametrize("name", ["a b", "c"])
def test_wrong(name): assert name == "a b"
def test_last(): pass
"""


def test_a_test_that_hangs_costs_itself(tmp_path, monkeypatch):
    row, log = pytest_of(tmp_path, ENDS, 120, monkeypatch)
    assert row == {"kind": "tests", "passed": 3, "failed": ["test_that_hangs", "test_wrong[c]"], "skipped": 1}
    assert "test_last" in log


def test_what_passed_before_the_time_was_up_is_recorded(tmp_path, monkeypatch):
    source = "import time\ndef test_first(): pass\ndef test_that_hangs(): time.sleep(1000)\n"
    row, log = pytest_of(tmp_path, source, 20, monkeypatch)
    assert row == {"kind": "tests", "passed": 1, "failed": [], "skipped": 0, "error": "cut off after 20 s"}
    assert "test_first" in log


def test_what_a_command_says_is_in_the_log(tmp_path):
    log = tmp_path / "gpu.log"
    log.write_text("before\n")
    code = "import os, sys; print(os.environ['A'], flush=True); sys.exit(3)"
    assert gpu.logged([sys.executable, "-c", code], log, 60, A="b") == (3, "b\n")
    code = "import time; print('here', flush=True); time.sleep(1000)"
    assert gpu.logged([sys.executable, "-c", code], log, 5) == (None, "here\n")
    assert log.read_text() == "before\nb\nhere\n"


def test_report_of_a_gpu(published):
    folder, measured = published
    report.main([str(measured)])
    stale = gpu_row("fused", 9.0, source="s0", commit="old")
    for row in (stale, gpu_row("eager", 1.3), *map(gpu_row, ("fused", "fused-graph", "cuda"), (0.2, 0.1, 0.13))):
        ledger.append(folder / "results" / "a-gpu.jsonl", row)
    assert report.main(["--check"]) == 1
    assert report.main([str(measured)]) == 0 and report.main(["--check"]) == 0
    text = (folder / "TIMES.md").read_text()
    assert "| abaw, B = 12 | forward | bfloat16 | 1.3 |  |  | 0.2 | 0.1 | 0.13 |  | 6.5x | 10.0x |  |  |" in text
    assert "| abaw B=12 forward: 6x faster than eager | 6.50x | met |" in text
    assert "commit abc" in text and "commit old" not in text


@pytest.mark.parametrize("name", ["abaw", "clip", "light"])
@pytest.mark.parametrize("form", ["released", "paper"])
def test_every_step_has_a_name(name, form):
    pytest.importorskip("triton", minversion="3.6")
    from benchmarks import gpu_parts
    from grjca_kernels.triton_kernels import launch_config

    shape = SHAPES[name]
    widths = (shape.dim_visual, shape.dim_audio)
    for batch in (1, 64):
        problem = Described(
            batch, shape.length, widths, shape.iterations, shape.gating, form, 0.0, 0.1, shape.normalize, False
        )
        device, common = launch_config.Device("cuda", 90, 132, 227 * 1024), {"tf32": False, "lengths": False}
        with gpu_parts.variant({"chunk": 5}):
            forward, backward = (
                launch_config.launch(problem, torch.bfloat16, device, backward=backward, weights=backward, **common)
                for backward in (False, True)
            )
        assert forward.chunk == min(5, batch) and backward.chunk == min(5, batch)
        assert len(gpu_parts.step_names(forward, False)) == forward.steps
        assert len(gpu_parts.step_names(backward, True)) == backward.steps


@pytest.mark.skipif(not hasattr(native.library, "CudaLaunch"), reason="built without nvcc")
@pytest.mark.parametrize("name", ["abaw", "clip", "light"])
@pytest.mark.parametrize("form", ["released", "paper"])
def test_every_step_of_cuda_has_a_name(name, form):
    pytest.importorskip("triton", minversion="3.6")
    from benchmarks import gpu_parts

    shape = SHAPES[name]
    for batch, backward in ((1, False), (64, False), (1, True), (64, True)):
        plan = plan_of(replace(shape, batch=batch), backward, resident=264, form=form)
        streamed, reduced = bool(plan["streamed"]), plan["parts"] > 0
        names = gpu_parts.names_of_steps(
            plan["all_steps"], shape.iterations, form == "released", streamed, backward, reduced
        )
        assert len(names) == plan["all_steps"]


def plan_of(shape, backward, resident, form="released"):
    widths = (shape.dim_visual, shape.dim_audio)
    common = (shape.length, widths, shape.iterations, shape.gating, form, 0.5, 0.1, shape.normalize, False)
    problem = Described(shape.batch, *common)
    return cuda.plan(problem, torch.float16, resident, tf32=False, backward=backward, weights=backward).plan()


@pytest.mark.skipif(not hasattr(native.library, "CudaLaunch"), reason="built without nvcc")
def test_what_the_sanitizers_run_reaches_every_kind_of_launch():
    """If csrc/cuda/plan.h chooses otherwise, gpu_parts.RESIDENT wants other numbers."""
    pytest.importorskip("triton", minversion="3.6")
    from benchmarks import gpu_parts

    forward, backward = (
        [
            plan_of(Shape(frames, 48, 24, 2, 80, "flat", normalize=True), direction, resident)
            for frames in (16, 40)
            for resident in gpu_parts.RESIDENT
        ]
        for direction in (False, True)
    )
    assert any(plan["chunks"] > plan["teams"] for plan in forward)
    assert any(plan["teams"] > 1 and plan["team_blocks"] > 1 for plan in forward)
    assert any(plan["chunks"] > 1 for plan in backward) and any(plan["parts"] > 1 for plan in backward)
    assert {plan["streamed"] for plan in forward} == {0, 1}


def test_ceilings_in_the_interpreter():
    """That the small kernels run at all; their times here say nothing."""
    pytest.importorskip("triton", minversion="3.6")
    if not triton_is_interpreted():
        pytest.skip("on a GPU they are measured")
    from benchmarks import ceilings

    def timer(call):
        call()
        return 1.0

    assert ceilings.tanh_rate(timer, False, device="cpu", programs=1, repeats=1)["ms"] == 1
    assert ceilings.barrier(timer, device="cpu", programs=1, count=2)["us"] == 0
    assert ceilings.launch(timer, True, device="cpu", programs=1)["device us"] == 100


def triton_is_interpreted():
    from grjca_kernels.triton_kernels import interpreted

    return interpreted()


@pytest.mark.skipif(not report.README.exists(), reason="needs the sources")
def test_the_readme_is_that_of_the_rows():
    """By the command, which finds its modules without pytest's help."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    result = subprocess.run(command, cwd=report.ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


COMMANDS = ["report", "host", "whole_step", "roofline", "scaling", "compare", "counted", "plots", "gpu"]
HELP = """
import os, runpy, sys
import torch  # once, for it takes longer than a command
for name in sys.argv[1:]:
    if not os.fork():
        sys.argv[1:] = ["--help"]
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
        sys.exit()
    _, status = os.wait()
    print("status", status, end="\\0", flush=True)
"""


@pytest.fixture(scope="module")
def said_for_help() -> dict[str, str]:
    """Of every command, each in a process that has no module but PyTorch."""
    result = subprocess.run([sys.executable, "-c", HELP, *COMMANDS], cwd=report.ROOT, capture_output=True, text=True)
    *said, rest = result.stdout.split("\0")
    assert not rest, result.stderr
    return dict(zip(COMMANDS, said, strict=True))


@pytest.mark.skipif(not report.README.exists(), reason="needs the sources")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="benchmarks are measured on Linux")
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_commands(name, said_for_help):
    said = said_for_help[name]
    assert "usage:" in said and said.endswith("status 0")
