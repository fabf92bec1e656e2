"""The Triton kernels in Triton's interpreter, from outside: what they compute, read and write.

There a tile is 16 x 16 x 16 and the grid one program. Time goes with the number of tiles, whatever they hold, so large
problems get large tiles. test_triton_phases.py looks inside.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from pytest import fixture, importorskip, mark
from torch import Tensor

importorskip("triton", minversion="3.6")
from assertions import LAYOUTS, assert_same, assert_same_results, backward
from behaviour import (
    check_absent_frames,
    check_all_is_written,
    check_bad_number,
    check_large_float16,
    check_strides,
    check_subsets_of_gradients,
    check_subsets_of_incoming_gradients,
    check_twice,
)
from cases import BY_NAME, SEED, Case, Result, call, cotangents, make, run
from grjca_kernels import GatedRJCAFused, gated_rjca, triton_kernels
from grjca_kernels import problem as problems
from grjca_kernels.triton_kernels import division, launch_config
from tolerances import check_rule

pytestmark = [
    mark.skipif(not triton_kernels.interpreted(), reason="not in Triton's interpreter: test_gpu.py tests a GPU"),
    mark.usefixtures("interpreter"),
]
NAN, INF = float("nan"), float("inf")
ALL = Case("all", 2, 4, (2, 3), 2, "hierarchical", normalize=True, dropout=0.3, lengths=(4, 2))
"""All options together."""
MOST = replace(ALL, name="most", gating="flat")
"""The same in half the time."""
PLAIN = Case("plain", 2, 3, (3, 2), 1, "dynamic")

DATAFLOWS = ["streamed", "stored"]

function = partial(gated_rjca, backend="triton")


@fixture
def stored(monkeypatch):
    """C is stored, however few the frames."""
    monkeypatch.setattr(launch_config, "STREAM_FRAMES", 0)


@fixture(params=DATAFLOWS)
def dataflow(request):
    if request.param == "stored":
        request.getfixturevalue("stored")


@fixture
def set_tiles(monkeypatch):
    """Tiles of other sizes."""
    of_config = launch_config.tiles

    def set_to(m: int, n: int, k: int) -> None:
        monkeypatch.setattr(launch_config, "tiles", lambda *arguments: replace(of_config(*arguments), m=m, n=n, k=k))

    return set_to


@fixture
def set_chunk(monkeypatch):
    """So many samples pass through the workspace together."""
    return lambda n: monkeypatch.setattr(division, "chunk_of", lambda *_: n)


def in_one_dataflow(*, streamed: list, stored: list):
    """Parameters "dataflow, case": every option is there in both dataflows, in some case."""
    found = [(name, case) for name, cases in zip(DATAFLOWS, (streamed, stored), strict=True) for case in cases]
    return mark.parametrize("dataflow, case", found, indirect=["dataflow"], ids=str)


def check(case: Case, dtype: torch.dtype = torch.float32, **options) -> None:
    check_rule(run(function, case, make(case, dtype)), case, dtype, **options)


# ---- against the reference


@mark.parametrize("dataflow, form, gating", [
    (DATAFLOWS[(i + j) % 2], form, gating)
    for i, form in enumerate(problems.FORMS) for j, gating in enumerate(problems.GATINGS)
], indirect=["dataflow"])  # fmt: skip
@mark.sampled(5)
def test_every_gating_and_form(dataflow, form, gating):
    """Every gating and form in every dataflow too, but not all three together."""
    check(Case(f"{form}-{gating}", 2, 3, (3, 2), 2, gating, form))


RAW = Case("raw", 2, 3, (2, 3), 2, "hierarchical", joint="raw", dropout=0.3, lengths=(3, 2))


@in_one_dataflow(
    streamed=[
        BY_NAME["empty-lengths"],
        BY_NAME["one-of-all"],
        Case("three-modalities", 2, 3, (1, 2, 4), 1, "flat", dropout=0.3, lengths=(2, 3)),
        Case("four-modalities-paper", 1, 2, (2, 1, 1, 3), 1, "flat", "paper"),
        Case("lengths", 3, 4, (2, 3), 1, "flat", lengths=(0, 4, 1)),
        Case("shared", 2, 3, (2, 3), 2, "none", dropout=0.6, shared=True),
        RAW,
        ALL,
    ],
    stored=[
        BY_NAME["width-one-second"],
        Case("four-modalities", 1, 2, (1, 3, 2, 1), 2, "dynamic", shared=True, normalize=True),
        Case("lengths-paper", 2, 4, (2, 3), 2, "dynamic", "paper", lengths=(3, 0)),
        Case("raw-shared", 2, 3, (2, 1, 2), 2, "none", joint="raw", shared=True),
        Case("shared-paper", 1, 3, (2, 3), 3, "none", "paper", shared=True),
        RAW,
        ALL,
    ],
)
@mark.sampled(6)
def test_options(dataflow, case):
    check(case)


@mark.parametrize("case", [
    Case("released-dynamic-T8", 1, 2, (1, 2), 8, "dynamic"),
    Case("released-flat-T16", 1, 1, (2, 1), 16, "flat", joint="raw"),
    Case("paper-none-T5", 1, 2, (1, 2), 5, "none", "paper"),
    Case("released-hierarchical-T4", 1, 2, (1, 2), 4, "hierarchical"),
], ids=str)  # fmt: skip
@mark.sampled(2)
def test_many_iterations(case):
    check(case)


def test_the_most_ways():
    case = Case("paper-hierarchical-T16", 1, 1, (1, 1), 16, "hierarchical", "paper")
    check_rule(Result(call(function, case, make(case, torch.float32)), {}), case, torch.float32, gradients=False)


@mark.parametrize("case", [
    Case("a-tile", 1, 16, (16, 16), 1, "none"),
    Case("more-than-a-tile", 1, 17, (17, 3), 1, "dynamic", dropout=0.4),
    Case("rows-across-samples", 3, 11, (3, 2), 1, "flat", normalize=True),
    Case("terms-of-several-tiles", 1, 2, (33, 1), 1, "none", "paper"),
    Case("three-modalities-of-tiles", 1, 2, (15, 18, 16), 1, "none"),
], ids=str)  # fmt: skip
@mark.sampled(4)
def test_tiles(case, dataflow):
    check(case)


@mark.parametrize("length", [launch_config.STREAM_FRAMES, launch_config.STREAM_FRAMES + 1])
def test_where_the_dataflows_meet(length):
    """The longest sequence that is streamed, and the shortest that is not."""
    check(Case(f"frames-{length}", 2, length, (2, 3), 1, "none", dropout=0.5, lengths=(length, length - 1)))


def test_more_frames_than_ever_are_streamed():
    check(Case("long", 1, 70, (1, 2), 1, "none"))


@mark.parametrize("dataflow, m, n, k", [
    *((name, *tile) for name in DATAFLOWS for tile in ((32, 16, 32), (16, 32, 16))), ("stored", 64, 64, 32)
], indirect=["dataflow"])  # fmt: skip
@mark.sampled(2)
def test_tiles_of_other_sizes(dataflow, m, n, k, set_tiles):
    """More rows than columns and fewer, in both dataflows; more than one tile of whichever size."""
    set_tiles(m, n, k)
    check(Case("tiles", 2, 17, (5, 34), 1, "none", dropout=0.4, lengths=(17, 3)))


@mark.parametrize("case", [
    Case("many-columns", 1, 33, (17, 70), 1, "dynamic", normalize=True, dropout=0.6),
    Case("many-rows", 2, 67, (6, 17), 1, "none", lengths=(67, 40)),
    Case("many-terms", 1, 5, (133, 2), 1, "none"),
], ids=str)  # fmt: skip
@mark.sampled(1)
def test_large_problems(case, set_tiles):
    """A tile or two and a rest."""
    set_tiles(64, 64, 64)
    check(case)


@mark.parametrize("case", [
    Case("chunks", 3, 3, (2, 3), 1, "dynamic", normalize=True, dropout=0.3, lengths=(2, 0, 3)),
    Case("chunks-shared-paper", 3, 2, (2, 3), 2, "none", "paper", shared=True),
], ids=str)  # fmt: skip
@mark.sampled(2)
def test_chunks(case, set_chunk, dataflow):
    """Of two samples and of one."""
    set_chunk(2)
    check(case)


@mark.parametrize("case", [
    Case("parts", 3, 17, (3, 2), 1, "dynamic"),
    Case("parts-raw", 3, 9, (3, 2), 1, "flat", joint="raw"),
    Case("parts-shared-paper", 3, 9, (3, 2), 2, "none", "paper", shared=True),
], ids=str)  # fmt: skip
def test_parts_of_the_rows(case, monkeypatch, set_chunk):
    """Three parts, of which the last is smaller or empty, in chunks of two samples and one; of W_k one part."""
    monkeypatch.setattr(division, "parts_of", lambda *_: 3)
    monkeypatch.setattr(division, "key_parts_of", lambda *_: 1)
    set_chunk(2)
    check(case)


@mark.parametrize(
    "dataflow, parts, key_parts",
    [("streamed", 0, 3), ("streamed", 2, 5), ("stored", 2, 5), ("stored", 2, 0)],
    indirect=["dataflow"],
)
@mark.sampled(2)
def test_parts_of_the_samples(dataflow, parts, key_parts, monkeypatch):
    """The sums of W_k have parts of their own, of which some may be empty."""
    monkeypatch.setattr(division, "parts_of", lambda *_: parts)
    monkeypatch.setattr(division, "key_parts_of", lambda *_: key_parts)
    check(Case("key-parts", 4, 3, (17, 2), 1, "dynamic", lengths=(3, 1, 0, 2)))


# ---- dtypes


@in_one_dataflow(
    streamed=[MOST, Case("widths", 1, 5, (33, 2), 1, "none")],
    stored=[MOST, Case("paper-flat", 1, 4, (3, 4), 2, "flat", "paper")],
)
def test_values_of_float16(dataflow, case):
    check(case, torch.float16, gradients=False)


@mark.parametrize("case, frames", [
    (Case("released-none-0.4", 4, 64, (40, 24), 2, "none", dropout=0.4), 0),
    (Case("released-none", 4, 64, (40, 24), 1, "none"), 64),
    (Case("paper-none", 4, 64, (40, 24), 2, "none", "paper", normalize=True), 64),
], ids=str)  # fmt: skip
@mark.sampled(1)
def test_gradients_of_float16(case, frames, set_tiles, monkeypatch):
    """Large enough that many relu change sides by rounding: on a small problem one of them decides."""
    set_tiles(64, 64, 64)
    monkeypatch.setattr(launch_config, "STREAM_FRAMES", frames)
    check(case, torch.float16)


@mark.parametrize("dtype, reason", [(torch.bfloat16, "bfloat16 products wrongly"), (torch.float64, "no float64")])
def test_a_dtype_is_refused_with_its_reason(dtype, reason):
    with pytest.raises(RuntimeError, match=rf"'triton' cannot run: .*{reason}.*Choose another, or backend='auto'"):
        call(function, PLAIN, make(PLAIN, dtype))


@mark.parametrize("name", ["plain", "normalize", "paper"])
def test_large_features_of_float16(name, dataflow):
    """Our float16 result is finite wherever PyTorch's is."""
    form = "paper" if name == "paper" else "released"
    check_large_float16(function, Case(name, 1, 5, (6, 3), 2, "dynamic", form, normalize=name == "normalize"))


# ---- memory


@fixture
def poisoned():
    """New memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@mark.parametrize("case", [MOST, Case("tile", 1, 17, (17, 2), 1, "none", "paper", lengths=(9,))], ids=str)
@mark.sampled(1)
def test_uninitialised_memory_is_not_read(case, dataflow, request, monkeypatch, set_chunk):
    monkeypatch.setattr(division, "parts_of", lambda *_: 2)
    set_chunk(1)
    inputs = make(case, torch.float32)
    clean = run(function, case, inputs)
    request.getfixturevalue("poisoned")
    assert_same_results(run(function, case, inputs), clean)
    for name, value in {**clean.values, **clean.gradients}.items():
        assert value.isfinite().all(), name


@mark.parametrize("case, dtype", [
    (ALL, torch.float16), (Case("tile", 1, 17, (17, 2), 1, "flat", "paper"), torch.float32)
], ids=str)  # fmt: skip
def test_all_is_written_and_nothing_else(case, dtype, dataflow, monkeypatch, set_chunk):
    from grjca_kernels.triton_kernels import launch

    set_chunk(1)
    gather, workspaces = launch.gather, []

    def guard(x: Tensor) -> Tensor:
        workspaces.append(torch.full((x.numel() + 2 * 4096,), NAN, dtype=x.dtype))
        return workspaces[-1][4096:-4096]

    def guarded(*arguments):
        a = gather(*arguments)
        return a._replace(activation_workspace=guard(a.activation_workspace), fp32_workspace=guard(a.fp32_workspace))

    monkeypatch.setattr(launch, "gather", guarded)
    check_all_is_written(launch.forward, launch.backward, case, dtype)
    assert len(workspaces) == 4
    for around in workspaces:
        assert around[:4096].isnan().all() and around[-4096:].isnan().all(), "the workspace is overrun"


# ---- strides


@mark.parametrize("name", ["transposed", "part of a cat", "every second column", "batch last", "one number for all"])
@mark.sampled(2)
def test_strides(name):
    """Of features, and of incoming gradients."""
    check_strides(function, MOST, LAYOUTS[name])


def test_strides_of_parameters():
    inputs = make(MOST, torch.float32)
    strided = inputs.map(lambda x: x if x.dim() == 3 else torch.stack([x, x + NAN], dim=-1)[..., 0])
    assert not all(parameter.is_contiguous() for parameter in strided.parameters)
    incoming, results = None, []
    for given in (inputs, strided):
        leaves = given.map(lambda x: x.detach().requires_grad_())
        values = call(function, MOST, leaves)
        incoming = incoming or cotangents([*values.values()])
        results.append(backward(values, leaves, incoming))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_concatenation_is_the_outputs_side_by_side():
    inputs = make(MOST, torch.float32).leaves()
    arguments, options = (inputs.features, inputs.layers, inputs.gates), {**MOST.options, "lengths": inputs.lengths}
    y, pair = function(*arguments, **options, concat=True), function(*arguments, **options)
    assert torch.equal(y, torch.cat(pair, dim=-1))
    gradient = torch.randn_like(y)
    ours = torch.autograd.grad(y, inputs.features, gradient)
    theirs = torch.autograd.grad(pair, inputs.features, gradient.split(MOST.widths, dim=-1))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@mark.parametrize("unaligned", ["features", "parameters", "lengths and seed"])
@mark.sampled(2)
def test_addresses_that_are_not_aligned(unaligned, monkeypatch):
    """Parts of other tensors: they give the same, and kernels see multiples of 16 bytes all the same."""
    from grjca_kernels.triton_kernels import launch

    case, seen, addressed = replace(MOST, dropout=0.3), [], launch._addressed

    def behind(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    def noting(*arguments):
        found = addressed(*arguments)
        seen.append([address % launch.ALIGNED for address in found[2]])
        return found

    monkeypatch.setattr(launch, "_addressed", noting)
    inputs = make(case, torch.float32)
    expected = run(function, case, inputs)
    if unaligned == "features":
        changed = inputs.map(lambda x: behind(x) if x.dim() == 3 else x)
    elif unaligned == "parameters":
        changed = inputs.map(lambda x: x if x.dim() == 3 else behind(x))
    else:
        changed = replace(inputs, lengths=behind(inputs.lengths))
    without, seen = seen[-1], []
    seed = behind(torch.tensor([SEED]))[0] if unaligned == "lengths and seed" else SEED
    assert_same_results(run(function, case, changed, seed=seed), expected)
    assert seen[0] != seen[1], "the forward's arguments, and what the kernel is given"
    assert seen[-1] == without, "a kernel for other alignments"


def test_a_refused_launch_says_what_to_do(monkeypatch):
    from grjca_kernels.triton_kernels import launch

    class Refused:
        def __getitem__(self, grid):
            return self

        def __call__(self, *arguments, **options):
            assert options["launch_cooperative_grid"]
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

    monkeypatch.setattr(launch, "forward_kernel", Refused())
    expected = r"refuses a launch whose programs wait for one another \(Triton Error.*choose backend='cuda' or 'ref"
    with pytest.raises(RuntimeError, match=expected):
        call(function, PLAIN, make(PLAIN, torch.float32))


def test_the_barrier_counts_from_zero_in_memory_of_its_own(monkeypatch):
    """Nothing is kept between calls: a CUDA graph's pool of memory has no room for that."""
    from grjca_kernels.triton_kernels import launch

    counters = []

    class Noting:
        def __getitem__(self, grid):
            return lambda *arguments, **options: counters.append(arguments[5].clone())

    monkeypatch.setattr(launch, "forward_kernel", Noting())
    for _ in range(2):
        call(function, PLAIN, make(PLAIN, torch.float32))
    assert [counter.tolist() for counter in counters] == [[0], [0]]
    assert not any(isinstance(value, Tensor) for value in vars(launch).values())
    assert not [name for name, value in vars(launch).items() if isinstance(value, dict) and not name.startswith("__")]


# ---- lengths, NaN and Inf


@mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
def test_lengths_of_any_integers(dtype):
    case = replace(PLAIN, lengths=(3, 1))
    inputs = make(case, torch.float32)
    expected = call(function, case, inputs)
    assert_same(call(function, case, replace(inputs, lengths=inputs.lengths.to(dtype))), expected)


@mark.parametrize("step", [0, 3])
def test_lengths_of_any_stride(step):
    case = replace(PLAIN, lengths=(2, 2) if step == 0 else (2, 3))
    inputs = make(case, torch.float32)
    around = torch.full((4,), 99)
    around[::3] = inputs.lengths
    lengths = around[:1].expand(2) if step == 0 else around[::3]
    assert lengths.stride() == (step,)
    assert_same_results(run(function, case, replace(inputs, lengths=lengths)), run(function, case, inputs))


@mark.parametrize("case, garbage", [(MOST, NAN), (replace(MOST, form="paper", lengths=(0, 3)), INF)], ids=str)
@mark.sampled(2)
def test_what_stands_in_absent_rows_reaches_nothing(case, garbage, dataflow):
    check_absent_frames(function, case, garbage)


@mark.parametrize("case, poison", [
    (Case("released", 2, 4, (2, 3), 2, "flat", normalize=True, dropout=0.3), NAN),
    (Case("paper", 2, 5, (3, 2), 1, "none", "paper"), NAN),
    (Case("infinite", 2, 5, (3, 2), 1, "dynamic", "paper"), INF),
], ids=str)  # fmt: skip
def test_a_bad_number_stays_in_its_sample(case, poison, dataflow):
    check_bad_number(function, case, poison)


# ---- repeatability; which gradients


def test_the_same_bits_every_time():
    inputs = make(MOST, torch.float32)
    assert_same_results(run(function, MOST, inputs), run(function, MOST, inputs))


def test_backward_twice_and_inputs_are_not_written():
    check_twice(function, MOST)


def test_any_subset_of_incoming_gradients():
    check_subsets_of_incoming_gradients(function, MOST)


def test_any_subset_of_gradients():
    check_subsets_of_gradients(function, replace(MOST, iterations=1))


# ---- as PyTorch sees it


def test_compile_without_graph_breaks():
    torch.compiler.reset()
    module = GatedRJCAFused(3, 2, 3, iterations=1, normalize=True, backend="triton", dropout=0.0)
    x, lengths = (torch.randn(2, 3, 3), torch.randn(2, 3, 2)), torch.tensor([3, 2])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for called in (module, compiled):
        module.zero_grad()
        leaves = [tensor.clone().requires_grad_() for tensor in x]
        outputs = called(*leaves, lengths)
        torch.autograd.backward(outputs, cotangents(outputs))
        gradients = [parameter.grad for parameter in module.parameters()]
        results.append([*(y.detach() for y in outputs), *(leaf.grad for leaf in leaves), *gradients])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_opcheck():
    inputs = make(PLAIN, torch.float32)
    options = (PLAIN.iterations, PLAIN.gating, PLAIN.form, 0.5, PLAIN.temperature, False, False, False, True, "triton")
    arguments = (inputs.features, inputs.parameters, None, torch.tensor(SEED))
    torch.library.opcheck(torch.ops.grjca.forward.default, (*arguments, *options))
    results = torch.ops.grjca.forward(*arguments, *options)
    needed = [i % 3 != 1 for i in range(len(inputs.features) + len(inputs.parameters))]
    gradients = [None, *cotangents(results)[1:]]
    torch.library.opcheck(
        torch.ops.grjca.backward.default, (gradients, *arguments, results[len(inputs.features)], needed, *options)
    )


def test_the_mask_is_that_of_the_cpu_backend(dataflow):
    """Both are within the rule of the same numbers, which another mask is far from."""
    case = Case("dropout", 3, 9, (9, 4), 1, "none", dropout=0.6)
    check(case)
    check_rule(run(partial(gated_rjca, backend="cpu"), case, make(case, torch.float32)), case, torch.float32)
    other = run(function, replace(case, name="other"), make(case, torch.float32), seed=SEED + 1)
    with pytest.raises(AssertionError):
        check_rule(other, case, torch.float32)
