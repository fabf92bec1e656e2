"""The kernels on a GPU: the contract, and what only a GPU shows (streams, graphs, launches, memory).

Every test runs for each backend, but for a few at the end of a section that name theirs. With Triton it is compiling
that takes the time; what needs kernels of its own is marked slow.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import fixture, mark, param
from torch import Tensor

import grjca_kernels
from assertions import LAYOUTS, assert_same, assert_same_results
from cases import BY_NAME, CASES, EVERYTHING, FULL_SIZE, Case, Result, call, cotangents, make, run
from grjca.measure import SHAPES
from grjca_kernels import GatedRJCAFused, cuda, gated_rjca, native
from grjca_kernels import problem as problems
from grjca_kernels.backends import TABLE
from on_gpu import DEVICE, TF32_ULP, captured, check, copied_to, cut_draws, kernels_of, large, on_device, to_device
from tolerances import check_rule, exact

pytestmark = [mark.gpu, mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HALVES = (torch.bfloat16, torch.float16)
MANY, SECONDS = 1000, 240  # launches in a row, and after how long they count as hanging
BACKENDS = ("cuda", "triton")


def usable(name: str) -> str:
    """``name``; or the test is skipped, with the reason, where that backend cannot run.

    What was built for CUDA and finds a GPU of PyTorch's must run: then a reason is a failure.
    """
    reason = grjca_kernels.backends()[name]
    if reason is not None:
        built = name == "cuda" and getattr(native.library, "cuda_architectures", "")
        if built and not torch.version.hip and torch.cuda.get_device_capability() >= (8, 0):
            pytest.fail(f"{name} was built for {built}, and yet: {reason}")
        pytest.skip(f"{name}: {reason}")
    return name


@fixture(params=BACKENDS)
def backend(request):
    return usable(request.param)


@fixture
def function(backend):
    return partial(gated_rjca, backend=backend)


@fixture
def ours(function):
    """The same for tensors of the CPU."""
    return on_device(function)


# ---- against the reference

FIRST = ("released-flat", "paper-hierarchical", "released-none", "lengths-normalize-dropout", "one-block-and-more")
ORDERED = [param(case, marks=[] if case.name in FIRST else mark.slow, id=case.name) for case in CASES]
STATISTICAL = [
    Case(f"{form}-{gating}-{p}", 8, frames, (40, 24), 2, gating, form, dropout=p, normalize=p == 0)
    for form, p, frames in (("released", 0.0, 48), ("released", 0.4, 48), ("paper", 0.0, 48), ("released", 0.4, 24))
    for gating in problems.GATINGS
]
"""Large enough that many relu change sides by rounding: on a small problem one of them decides a gradient."""
LARGE = [param(case, marks=[] if i % 5 == 1 else mark.slow, id=case.name) for i, case in enumerate(STATISTICAL)]


@mark.parametrize("case", ORDERED)
def test_float32(ours, case):
    check_rule(run(ours, case, make(case, torch.float32)), case, torch.float32)


@mark.parametrize("dtype", HALVES, ids=str)
@mark.parametrize("case", ORDERED)
def test_values_of_sixteen_bits(ours, case, dtype):
    check_rule(run(ours, case, make(case, dtype)), case, dtype, gradients=False)


@mark.parametrize("dtype", HALVES, ids=str)
@mark.parametrize("case", LARGE)
def test_gradients_of_sixteen_bits(ours, case, dtype):
    check_rule(run(ours, case, make(case, dtype)), case, dtype)


@fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@mark.parametrize("case", ORDERED)
def test_values_of_tf32(ours, case, tf32):
    result = run(ours, case, make(case, torch.float32))
    check(result, exact(case, torch.float32), cut_draws(case), TF32_ULP, gradients=False)


@mark.parametrize("case", LARGE)
def test_gradients_of_tf32(ours, case, tf32):
    result = run(ours, case, make(case, torch.float32))
    check(result, exact(case, torch.float32), cut_draws(case), TF32_ULP)
    torch.set_float32_matmul_precision("highest")
    assert not torch.equal(run(ours, case, make(case, torch.float32)).values["Y[0]"], result.values["Y[0]"])


SPECIFIED = [
    Case("abaw", 12, 300, (256, 128), gating="flat", normalize=True),
    Case("clip", 64, 16, (512, 512), gating="none"),
    Case("light", 32, 300, (128, 64), 3, gating="flat"),
    Case("long", 8, 1024, (512, 512), gating="flat"),
]


@mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@mark.parametrize("case", [*FULL_SIZE.values(), *SPECIFIED], ids=str)
def test_full_sizes(ours, case, dtype):
    check(run(ours, case, make(case, dtype)), *large(case, dtype))


@mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@mark.parametrize("name", ["GRJCA", "RJCA"])
def test_cuda_and_triton_agree(name, dtype):
    """As near to each other as the rule asks of each to the truth; with dropout, so their masks are the same."""
    case = replace(FULL_SIZE[name], dropout=0.6)
    of_cuda, of_triton = (
        run(on_device(partial(gated_rjca, backend=usable(each))), case, make(case, dtype)) for each in BACKENDS
    )
    truth, draws = large(case, dtype)

    def apart(a: dict[str, Tensor], b: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value + (a[name].double() - b[name].double()) for name, value in truth.items()}

    values = apart(of_cuda.values, of_triton.values, truth.values)
    gradients = apart(of_cuda.gradients, of_triton.gradients, truth.gradients)
    check(Result(values, gradients), truth, draws, torch.finfo(dtype).eps)


# ---- dropout


@mark.parametrize("p", [0.1, 0.6])
@mark.parametrize("frames", [5, 33])
def test_the_mask_of_the_output_is_that_of_the_contract(function, p, frames):
    """With W_h = 0 and b_h = 1, U is the mask itself."""
    case = Case("mask", 3, frames, (9, 70), 1, "none", dropout=p)
    inputs = to_device(make(case, torch.float32))
    with torch.no_grad():
        for x in inputs.features:
            x.zero_()
        for output in inputs.layers[0].output:
            output.weight.zero_()
            output.bias.fill_(1)
    for seed in (0, -1, 2**40 + 3):
        values = call(function, case, inputs, seed=seed)
        for m, d_m in enumerate(case.widths):
            size = (case.batch, frames, d_m)
            mask = grjca_kernels.dropout_mask(
                torch.tensor(seed), p, iteration=0, modality=m, site=1, shape=size, dtype=torch.float32
            )
            assert torch.equal(values[f"Y[{m}]"].detach().cpu(), mask)


@mark.parametrize("frames", [16, 40])
def test_the_mask_of_the_correlation_is_that_of_the_contract(ours, frames):
    """One element of C that is kept instead of dropped shows far above the rounding of float32."""
    case = Case("masks", 2, frames, (19, 45), 2, "flat", dropout=0.6)
    check_rule(run(ours, case, make(case, torch.float32)), case, torch.float32)


# ---- one block, for what no number shows

WIDTHS = (48, 32)
LENGTHS = pytest.mark.parametrize("frames", [16, 40], ids=["streamed", "stored"])


def make_block(backend: str, frames: int, **options: Any) -> GatedRJCAFused:
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "dtype": torch.float16, "device": DEVICE, **options}
    return GatedRJCAFused(*WIDTHS, frames, normalize=True, output="concat", backend=backend, **settings)


@fixture
def block(backend):
    return partial(make_block, backend)


def features(frames: int, batch: int = 3, seed: int = 0, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, frames, width, generator=generator) for width in WIDTHS]
    return [x.to(DEVICE, dtype).requires_grad_() for x in made]


def step(module: Any, x: list[Tensor], *arguments: Any) -> list[Tensor]:
    """The output and all gradients, by one forward and one backward."""
    leaves = [*x, *module.parameters()]
    y = module(*x, *arguments)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def equal(a: list[Tensor], b: list[Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@LENGTHS
def test_bits_repeat(block, frames):
    module, x = block(frames), features(frames, batch=37)
    expected = step(module, x)
    for _ in range(20):
        equal(step(module, x), expected)


@LENGTHS
def test_no_synchronisation(block, frames):
    """Neither lengths nor seeds are read by the host."""
    module, x = block(frames, dropout=0.5), features(frames)
    lengths = torch.tensor([frames, 0, 5], device=DEVICE)
    step(module, x, lengths)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step(module, x, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite().all() for value in result)


@contextmanager
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@LENGTHS
def test_uninitialised_memory_is_not_read(block, frames):
    module, x = block(frames), features(frames)
    expected = step(module, x)
    with unwritten_memory_is_nan():
        equal(step(module, x), expected)


@mark.parametrize("name", [param(name, marks=mark.slow if i > 2 else []) for i, name in enumerate(LAYOUTS)])
@mark.parametrize("case", [EVERYTHING], ids=str)
def test_strides(function, case, name):
    """Of inputs, and of incoming gradients."""
    inputs, layout = to_device(make(case, torch.float16)), LAYOUTS[name]
    strided, results = [layout(x.detach()) for x in inputs.features], []
    for arrange in (lambda x: x, torch.Tensor.contiguous):
        leaves = replace(inputs, features=[arrange(x).detach().requires_grad_() for x in strided])
        values = call(function, case, leaves)
        incoming = [arrange(layout(dy.to(DEVICE))) for dy in cotangents([*values.values()])]
        gradients = torch.autograd.grad([*values.values()], [*leaves.features, *leaves.parameters], incoming)
        results.append(Result(values, {str(i): gradient for i, gradient in enumerate(gradients)}))
    assert any(a.stride() != a.contiguous().stride() for a in strided)
    assert_same_results(*results)


@mark.parametrize("name", ["released-hierarchical", "normalize", "one-block-and-more"])
@mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_bad_number_stays_in_its_sample(ours, name, poison):
    case = replace(BY_NAME[name], batch=4)
    clean = make(case, torch.float32)
    dirty = clean.map(torch.clone)
    dirty.features[1][1, 2, 0] = poison
    expected, result = run(ours, case, clean), run(ours, case, dirty)
    for of_expected, of_result in ((expected.values, result.values), (expected.gradients, result.gradients)):
        names = [key for key in of_result if not key.startswith(("d layers", "d gates"))]
        kept, given = ({n: v[n].movedim(-3, 0)[[0, 2, 3]] for n in names} for v in (of_expected, of_result))
        assert_same(given, kept)
    if poison != poison:
        assert all(result.values[f"Y[{m}]"][1].isnan().any() for m in range(len(case.widths)))


def test_autocast(block, monkeypatch):
    """Residuals and outputs stay float32; products may be those of TF32."""
    module, x = block(40, dtype=torch.float32), features(40, dtype=torch.float32)
    with torch.autocast(DEVICE.type, torch.float16):
        y = module(*x)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    expected = module(*x)
    assert y.dtype == torch.float32 and torch.equal(y.detach(), expected.detach())


def test_auto_takes_kernels_that_pass_their_self_check(backend, block, monkeypatch):
    """Were it not for the other backend, which may come first."""
    for other in {*BACKENDS} - {backend}:
        monkeypatch.delitem(TABLE, other)
    assert grjca_kernels.backends(DEVICE)[backend] is None
    module, x = block(40), features(40)
    expected = step(module, x)
    module.backend = "auto"
    equal(step(module, x), expected)


# ---- streams and devices


@LENGTHS
def test_any_stream(block, frames):
    module, x = block(frames), features(frames)
    expected = step(module, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = step(module, x)
    stream.synchronize()
    equal(result, expected)


def test_two_streams_at_once(block):
    """Each launch wants every multiprocessor, and spins until it has them."""
    module, inputs = block(40), [features(40, batch, seed=batch) for batch in (2, 9)]
    expected = [step(module, x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    results: list[list[list[Tensor]]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(30):
        for x, stream, of_stream in zip(inputs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                of_stream.append(step(module, x))
    torch.cuda.synchronize()
    for of_stream, of_one in zip(results, expected, strict=True):
        for result in of_stream:
            equal(result, of_one)


@mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one(function):
    case = EVERYTHING
    inputs = to_device(make(case, torch.float32))
    there = inputs.map(lambda x: x.detach().to("cuda:1"))
    there = replace(there, lengths=inputs.lengths.to("cuda:1"))
    assert_same(copied_to(call(function, case, there), DEVICE), call(function, case, inputs))


# ---- graphs and torch.compile


def copy(to: list[Tensor], x: list[Tensor]) -> None:
    with torch.no_grad():
        for destination, source in zip(to, x, strict=True):
            destination.copy_(source)


@LENGTHS
def test_a_graph_of_both_passes(block, frames):
    module, static = block(frames), features(frames)
    graph, result = captured(lambda: step(module, static))
    for seed in (1, 2, 1):
        copy(static, features(frames, seed=seed))
        graph.replay()
        equal(result, step(module, features(frames, seed=seed)))


def test_a_graph_replayed_on_other_streams(block):
    module, static = block(40), features(40)
    graph, result = captured(lambda: step(module, static))
    expected = step(module, static)
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.replay()
        torch.cuda.synchronize()
        equal(result, expected)


def test_a_graph_draws_new_masks(block):
    module, x = block(40, dropout=0.5), features(40)
    graph, (y, *_) = captured(lambda: step(module, x))
    drawn = []
    for seed in (3, None, 3):
        if seed is not None:
            torch.cuda.manual_seed(seed)
        graph.replay()
        drawn.append(y.clone())
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


@mark.parametrize("loading", ["LAZY", "EAGER"])
def test_the_first_call_of_a_process_within_a_capture(loading):
    """Of the CUDA C++ kernels, which are loaded then. Triton's are compiled before, by a call."""
    code = (
        "import torch\n"
        "from grjca_kernels import GatedRJCAFused\n"
        "module = GatedRJCAFused(24, 16, 40, backend='cuda', device='cuda').eval()\n"
        "x = torch.randn(2, 40, 24, device='cuda'), torch.randn(2, 40, 16, device='cuda')\n"
        "torch.cuda.synchronize()\n"
        "graph = torch.cuda.CUDAGraph()\n"
        "with torch.no_grad():\n"
        "    with torch.cuda.graph(graph):\n"
        "        captured = module(*x)\n"
        "    graph.replay()\n"
        "    assert all(map(torch.equal, captured, module(*x)))\n"
    )
    usable("cuda")
    environment = os.environ | {"CUDA_MODULE_LOADING": loading}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_make_graphed_callables(block):
    plain, static = block(40), features(40)
    graphed = torch.cuda.make_graphed_callables(block(40), tuple(static))
    for seed in (1, 2):
        x = features(40, seed=seed)
        equal([value.clone() for value in step(graphed, x)], step(plain, x))


@mark.parametrize("mode", [None, "reduce-overhead"])
def test_torch_compile(block, mode):
    module = block(40)
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for seed in (1, 2, 3, 4):
        x = features(40, seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        equal([value.clone() for value in step(compiled, x)], step(module, x))


# ---- launches and memory


def assert_one_kernel(ran: Counter[str], direction: str) -> None:
    assert sum(ran.values()) == 1 and direction in next(iter(ran)), ran


@LENGTHS
def test_one_kernel_forward_and_one_backward(block, frames):
    module, x = block(frames), features(frames)
    lengths = torch.tensor([frames, 1, 5], device=DEVICE)
    leaves = [*x, *module.parameters()]
    gradient = torch.ones_like(module(*x, lengths))
    step(module, x, lengths)
    y, forward = kernels_of(lambda: module(*x, lengths))
    assert_one_kernel(forward, "forward")
    _, backward = kernels_of(lambda: torch.autograd.grad(y, leaves, gradient))
    assert_one_kernel(backward, "backward")


@LENGTHS
def test_steps_that_are_launched_alone_give_the_same_bits(backend, block, frames):
    """Nobody waits for anybody then: the barrier of the grid does what the end of a launch does."""
    pytest.importorskip("triton")
    from benchmarks.gpu_phases import one_launch_per_step

    module, x = block(frames), features(frames, batch=37)
    expected = step(module, x)
    with one_launch_per_step(backend):
        result, ran = kernels_of(lambda: step(module, x))
    equal(result, expected)
    for direction in ("forward", "backward"):
        assert sum(count for name, count in ran.items() if direction in name) > 3, ran


@fixture
def too_many_blocks(backend, monkeypatch):
    """Launches of more blocks than the GPU can hold at once, as where another process holds a part of it."""
    if backend == "cuda":
        resident = cuda._resident

        def too_many(*of: Any) -> tuple[int, int]:
            blocks, sharing = resident(*of)
            return 8 * blocks, sharing

        monkeypatch.setattr(cuda, "_resident", too_many)
        cuda._launch.cache_clear()
        yield
        cuda._launch.cache_clear()
    else:
        from grjca_kernels.triton_kernels import launch

        prepare = launch.prepare

        def crowded(*arguments: Any, **options: Any) -> Any:
            prepared = prepare(*arguments, **options)
            return prepared._replace(launch=replace(prepared.launch, programs=64 * prepared.launch.programs))

        monkeypatch.setattr(launch, "prepare", crowded)
        yield


def test_a_launch_that_the_driver_refuses_is_an_error(block, too_many_blocks):
    """The call raises an error and does not hang."""
    with pytest.raises(RuntimeError, match=r"cooperative|wait for one another"):
        step(block(40), features(40, 64))


@LENGTHS
def test_batches_and_lengths_share_a_kernel_of_triton(frames):
    from grjca_kernels.triton_kernels.backward import backward_kernel
    from grjca_kernels.triton_kernels.forward import forward_kernel

    def compiled() -> list[int]:
        return [
            len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in (forward_kernel, backward_kernel)
        ]

    def use(size: int, batch: int, present: int) -> None:
        step(make_block(usable("triton"), size), features(size, batch), torch.full((batch,), present, device=DEVICE))

    use(frames, 2, 1)
    before = compiled()
    for size, batch, present in ((frames, 1, 0), (frames, 3, 5), (frames, 64, frames), (frames, 400, 7)):
        use(size, batch, present)
        assert compiled() == before, f"compiled anew for B = {batch}"
    if frames > 32:
        use(frames + 16 * 8, 5, 9)
        assert compiled() == before, "compiled anew for another L"


@fixture
def workspaces(backend, monkeypatch):
    """Bytes of the workspaces that launches of bfloat16 ask for from now on."""
    noted: list[int] = []

    def noting(module: Any, name: str, size: Callable[[Any], int]) -> None:
        original = getattr(module, name)

        def planned(*arguments: Any, **options: Any) -> Any:
            launch = original(*arguments, **options)
            noted.append(size(launch))
            return launch

        monkeypatch.setattr(module, name, planned)

    if backend == "cuda":
        noting(cuda, "launch_of", lambda launch: launch.workspace_bytes)
    else:
        from grjca_kernels.triton_kernels import launch as of_triton

        noting(
            of_triton,
            "prepare",
            lambda of: 2 * of.launch.activation_workspace + of.launch.bits + 4 * of.launch.fp32_workspace,
        )
    return noted


@mark.parametrize("name", ["abaw", "clip"])
def test_memory(backend, name, workspaces):
    """Beside what is returned, saved and the workspaces of the launch configuration, nothing is allocated."""
    shape = SHAPES[name]
    module = shape.block(GatedRJCAFused, backend=backend, dropout=0.0, device=DEVICE, dtype=torch.bfloat16)
    x = [value.detach().to(DEVICE, torch.bfloat16).requires_grad_() for value in shape.inputs(0)]
    step(module, x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = step(module, x)
    peak = torch.cuda.max_memory_allocated() - before
    activation = 2 * shape.batch * shape.length * (shape.dim_visual + shape.dim_audio)
    gradients = sum(2 * value.numel() for value in results[1:])
    expected = gradients + (2 + shape.iterations) * activation + max(workspaces)  # Y and its gradient, the iterates
    assert peak <= expected + 512 * (len(results) + 8), f"{peak} bytes instead of {expected}"


def many_launches(backend: str, count: int) -> None:
    """Batches of all sizes, in a process that may be killed."""
    module = make_block(backend, 40)
    inputs = {batch: features(40, batch, seed=batch) for batch in (1, 2, 3, 5, 8, 64)}
    expected = {batch: step(module, x) for batch, x in inputs.items()}
    for i in range(count):
        batch = [*inputs][i * 5 // 3 % len(inputs)]
        result = step(module, inputs[batch])
        if i % 50 == 0:
            equal(result, expected[batch])
    torch.cuda.synchronize()
    print("all came back")


def test_many_launches_do_not_hang(backend):
    folder = Path(__file__).parent
    call = f"test_gpu.many_launches({backend!r}, {MANY})"
    paths = [str(folder), str(folder.parent / "support")]
    code = f"import sys; sys.path[:0] = {paths!r}; import test_gpu; {call}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder.parents[1], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all came back" in done.stdout
