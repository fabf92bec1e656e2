"""Verdicts of the self-check: what is remembered of them, what is said, and where a check may run."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytest import fixture, mark
from test_verification import CPU, ROW, checked, failing, forward_with
from torch._subclasses.fake_tensor import FakeTensorMode

import grjca_kernels
from cases import EVERYTHING, call, make
from grjca_kernels import gated_rjca, triton_kernels, verdicts, verification
from grjca_kernels.backends import TABLE, _first_that_can

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
pytestmark = mark.skipif(ROW.why_not() is not None, reason=str(ROW.why_not()))


def test_records_exist():
    for name, file in verdicts.RECORDS.items():
        assert name in (RESULTS / file).read_text()


# ---- on demand


def test_a_report_prints_every_tensor_and_a_verdict(capsys, monkeypatch):
    assert grjca_kernels.self_check("cpu", "cpu")
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert verdict == "The cpu kernels passed on the CPU." and len(lines) == 3 * (17 + 11)
    monkeypatch.setitem(TABLE, "cpu", forward_with(lambda outputs, iterates, gates: outputs[0].neg_()))
    assert not grjca_kernels.self_check("cpu")
    printed = capsys.readouterr().out
    assert "Y[0]" in printed and "FAILED" in printed
    assert printed.splitlines()[-1].startswith("The cpu kernels failed on the CPU. L = 6, float32, Y[0]: error")
    monkeypatch.setitem(TABLE, "cpu", replace(ROW, forward=failing))
    assert not grjca_kernels.self_check("cpu", CPU)
    assert "in failing" in capsys.readouterr().out  # the traceback


def test_what_cannot_run_cannot_be_checked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not torch.cuda.is_available():
        reason = re.escape(triton_kernels.why_not())
        with pytest.raises(RuntimeError, match=rf"no backend for GPUs can run here.*triton: {reason}"):
            grjca_kernels.self_check()
        with pytest.raises(RuntimeError, match=f"'triton' cannot be checked: {reason}"):
            grjca_kernels.self_check("triton")
    with pytest.raises(
        RuntimeError, match="'cpu' cannot be checked: it computes on cpu tensors, and these are on cuda"
    ):
        grjca_kernels.self_check("cpu", "cuda")
    with pytest.raises(ValueError, match="expected one of 'cuda', 'triton', 'cpu', got 'reference'"):
        grjca_kernels.self_check("reference")


# ---- remembered; a GPU is pretended, and its kernels are the CPU's


@fixture
def gpu(monkeypatch, tmp_path):
    """A GPU of an unknown type: its properties, whether a graph is captured on it, and how many checks were run."""
    state = SimpleNamespace(capturing=False, checks=0, folder=tmp_path)
    state.properties = SimpleNamespace(name="Test GPU", major=9, minor=0, multi_processor_count=4)
    real = verification.check

    def check(row, device, dtype, *options):
        assert device == torch.device("cuda", 0)
        state.checks += 1
        return real(row, CPU, dtype, *options)

    monkeypatch.setattr(verification, "check", check)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: state.properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    state.restart = functools.partial(restart, monkeypatch)
    state.restart()
    return state


def restart(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(verdicts, "_verdicts", {})
    verdicts.say.cache_clear()
    verdicts.key_of.cache_clear()


@fixture(autouse=True)
def no_key_stays():
    yield
    verdicts.key_of.cache_clear()


def passed(row=ROW, dtype=torch.float32, index=None, reduced=False) -> bool:
    return verdicts.passed(row, "cuda", index, dtype, reduced)


WRONG = forward_with(lambda outputs, iterates, gates: outputs[0].neg_())


@mark.parametrize("row", [ROW, WRONG], ids=["right", "wrong"])
def test_one_check_for_a_device_and_dtype(gpu, row):
    for _ in range(2):
        assert passed(row) == passed(row, index=0) == (row is ROW)
        assert gpu.checks == 1
        gpu.restart()
    passed(row, torch.bfloat16)
    assert gpu.checks == 2
    for _ in range(2):
        assert passed(row, reduced=True) == (row is ROW) and gpu.checks == 3


@mark.parametrize("change", ["torch", "device", "sources", "precision"])
def test_another_version_is_checked_again(gpu, change, monkeypatch):
    passed()
    gpu.restart()
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "0")
    elif change == "device":
        gpu.properties.name = "Another GPU"
    elif change == "sources":
        monkeypatch.setattr(verdicts, "sources", lambda: "0")
    else:
        monkeypatch.setattr(verification, "precision", lambda *of: "float32 with TF32")
    passed()
    assert gpu.checks == 2


def test_tf32_is_another_precision():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert verification.precision(torch.float32) == "float32 with TF32"
        assert verification.precision(torch.float16) == "float16"
        torch.set_float32_matmul_precision("highest")
        assert verification.precision(torch.float32) == "float32"
        assert verification.precision(torch.float32, reduced=True) == "float32 with TF32"
    finally:
        torch.set_float32_matmul_precision(before)


@mark.parametrize("content", [b"", b"\xff\x00", b"[1", b"[]", b"{}", b'{"key": 1, "reason": null}', b"{" * 100_000])
def test_a_damaged_file_says_nothing(gpu, content):
    passed()
    (file,) = (gpu.folder / "grjca_kernels").iterdir()
    good = file.read_bytes()
    file.write_bytes(content)
    gpu.restart()
    assert passed() and gpu.checks == 2
    assert file.read_bytes() == good


def test_a_file_must_give_a_reason_or_none(gpu):
    passed()
    (file,) = (gpu.folder / "grjca_kernels").iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "reason": 7}))
    gpu.restart()
    assert passed() and gpu.checks == 2


def test_without_a_place_to_write_it_is_checked_by_every_process(gpu):
    (gpu.folder / "grjca_kernels").write_text("in the way")
    assert passed() and passed() and gpu.checks == 1
    gpu.restart()
    assert passed() and gpu.checks == 2


def test_without_a_home(gpu, monkeypatch):
    def home():
        raise RuntimeError("no home")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", home)
    assert passed() and passed() and gpu.checks == 1


def test_an_exception_is_forgotten_with_the_process(gpu):
    assert not passed(replace(ROW, forward=failing)) and not passed(replace(ROW, forward=failing))
    assert gpu.checks == 1
    gpu.restart()
    assert passed() and gpu.checks == 2


def test_a_file_is_whole_or_not_there(gpu, monkeypatch):
    """A write that is cut short leaves nothing behind, and the check is not lost for this process."""

    def full(path, text):
        with open(path, "w") as file:
            file.write(text[:10])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    assert passed() and passed() and gpu.checks == 1
    assert list((gpu.folder / "grjca_kernels").iterdir()) == []


def test_threads_share_one_check(gpu):
    results = []
    threads = [threading.Thread(target=lambda: results.append(passed())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4 and gpu.checks == 1


def test_a_record_needs_no_check(gpu, monkeypatch, caplog):
    monkeypatch.setitem(verdicts.RECORDS, "Test GPU", "test-gpu.json")
    assert passed(WRONG) and gpu.checks == 0 and caplog.messages == []


# ---- what "auto" does and says


def auto() -> str:
    return _first_that_can("cuda", 0, torch.float32)


@fixture
def unproven(gpu, monkeypatch):
    """Puts a row in the place of Triton's."""

    def put(row):
        named = replace(row, name="triton", why_not=lambda: None, refuses=lambda device, dtype: None, unproven=True)
        monkeypatch.setitem(TABLE, "triton", named)

    return put


def test_auto_uses_what_passes_and_says_so_once(unproven, gpu, caplog):
    unproven(ROW)
    assert [auto(), auto()] == ["triton", "triton"]
    (message,) = caplog.messages
    assert message.startswith(
        "the triton kernels have no test record for float32 on Test GPU; backend='auto' now checks"
    )
    gpu.restart()
    caplog.clear()
    assert auto() == "triton" and caplog.messages == []


def test_auto_takes_the_next_after_a_failure_and_says_why_once(unproven, gpu, caplog):
    unproven(WRONG)
    assert [auto(), auto()] == ["reference", "reference"]
    _, message = caplog.messages
    assert "does not use the triton kernels for float32 on Test GPU" in message and "Y[0]: error" in message
    assert "self_check('triton')" in message and caplog.records[1].name == "grjca_kernels"
    gpu.restart()
    caplog.clear()
    assert auto() == "reference" and caplog.messages == [message]


def test_nothing_is_checked_during_capture(unproven, gpu, caplog):
    unproven(ROW)
    gpu.capturing = True
    assert [auto(), auto()] == ["reference", "reference"] and gpu.checks == 0
    (message,) = caplog.messages
    assert "a CUDA graph is being captured" in message and "self_check('triton')" in message
    gpu.capturing = False
    assert auto() == "triton" and gpu.checks == 1
    gpu.restart()
    gpu.capturing = True
    assert auto() == "triton" and gpu.checks == 1  # from the file


def test_a_check_on_demand_counts(unproven, gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    monkeypatch.setattr(verification, "check", lambda *arguments: verification.Verdict("it is wrong."))
    unproven(ROW)
    assert not grjca_kernels.self_check("triton", "cuda:0")
    assert capsys.readouterr().out.startswith("The triton kernels failed on Test GPU. it is wrong.")
    monkeypatch.undo()
    assert [json.loads(file.read_text())["reason"] for file in (gpu.folder / "grjca_kernels").iterdir()] == [
        "it is wrong."
    ] * 4


def test_auto_never_takes_the_interpreter(gpu):
    assert not verdicts.passed(ROW, "cpu", None, torch.float32) and gpu.checks == 0


# ---- where it may run


def modes():
    yield "no_grad", torch.no_grad()
    yield "inference", torch.inference_mode()
    yield "autocast", torch.autocast("cpu", torch.bfloat16)
    yield "meta", torch.device("meta")
    yield "fake", FakeTensorMode()


@mark.parametrize("mode", [mode for _, mode in modes()], ids=[name for name, _ in modes()])
def test_no_mode_of_the_caller_reaches_it(mode):
    with mode:
        assert checked(ROW) == ""


def test_no_default_of_the_caller_reaches_it():
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        assert checked(ROW) == ""
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


def test_no_random_number_is_drawn(gpu):
    before = torch.random.get_rng_state()
    assert passed()
    assert torch.equal(torch.random.get_rng_state(), before)


@mark.parametrize("transform", [torch.func.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_within_transforms(transform):
    def f(x):
        assert checked(ROW) == ""
        return x.sum()

    transform(f)(torch.ones(3))


def test_while_compiling(gpu, monkeypatch):
    """torch.compile asks with fake tensors; the check computes with real ones, once."""

    @torch.compiler.assume_constant_result
    def first_that_can(*arguments):
        assert passed()
        return "cpu"

    monkeypatch.setattr(sys.modules["grjca_kernels.backends"], "_first_that_can", first_that_can)
    case = replace(EVERYTHING, dropout=0.0)
    inputs = make(case, torch.float32)

    def f():
        return call(gated_rjca, case, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")()
    assert gpu.checks == 1
    for name, value in f().items():
        assert torch.equal(compiled[name], value), name


# ---- CUDA is left alone where tensors are on the CPU

IN_A_WORKER = """
import torch
from torch.utils.data import DataLoader
from grjca_kernels import GatedRJCAFused, backends, native

def asked(*arguments, **options):
    raise AssertionError("CUDA was asked")

for name in ("is_available", "init", "_lazy_init", "current_device", "device_count", "get_device_capability"):
    setattr(torch.cuda, name, asked)
for name in ("get_device_properties", "is_current_stream_capturing"):
    setattr(torch.cuda, name, asked)
native.library.cuda_why_not = asked

class Samples:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        said = {}
        for name in ("auto", "cpu", "reference", "cuda", "triton"):
            try:
                block = GatedRJCAFused(3, 2, 4, backend=name)
                said[name] = str(block(torch.randn(1, 4, 3), torch.randn(1, 4, 2))[0].isfinite().all().item())
            except RuntimeError as error:
                said[name] = str(error)
        said["next"] = next(name for name, reason in backends("cpu").items() if reason is None)
        return said

for workers, context in ((1, "fork"), (0, None)):
    print(*DataLoader(Samples(), batch_size=None, num_workers=workers, multiprocessing_context=context))
"""


@mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_nothing_is_asked_of_cuda_for_tensors_of_the_cpu():
    """CUDA would be initialised, and raise in the forked workers of a DataLoader."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment.pop("GRJCA_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-c", IN_A_WORKER], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    refused = "cannot run: it computes on cuda tensors, and these are on cpu."
    for line in done.stdout.splitlines():
        said = ast.literal_eval(line)
        assert said["auto"] == said["cpu"] == said["reference"] == "True" and said["next"] == "cpu"
        assert refused in said["cuda"] and refused in said["triton"]
    assert len(done.stdout.splitlines()) == 2
