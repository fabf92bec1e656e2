"""What a forward keeps for its backward: the same bits whatever that is, chosen by a rule, and of a known size."""

import copy
import gc
import pickle
import random
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from pytest import fixture, mark
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cases as benchmark
from benchmarks.baselines import GatedRJCAStrong
from cases import BY_NAME, EVERYTHING, Case, Inputs, cotangents, describe, forward_arguments, make, run
from grjca.measure import SHAPES, Shape, saved_bytes, threads
from grjca_kernels import GatedRJCAFused, cpu, execution, flops, gated_rjca, keeping, memory, native, ops
from grjca_kernels import problem as problems
from grjca_kernels.backends import TABLE
from grjca_kernels.keeping import CHOICES, CORRELATION, HIDDEN, JOINT, KEY, SIGNS, VALUE

needs_native = mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
fused = partial(gated_rjca, backend="cpu")
ALL = JOINT | KEY | VALUE | HIDDEN | CORRELATION | SIGNS
PAIRED = "avx512bf16"
"""The instruction set that takes bfloat16 alone."""


def described(shape: Shape, **options) -> problems.Problem:
    """The problem of a shape, without dropout."""
    settings = (shape.iterations, shape.gating, "released", 0.0, 0.1, shape.normalize, False)
    return problems.Problem(shape.batch, shape.length, (shape.dim_visual, shape.dim_audio), *settings, **options)


@fixture
def tight(monkeypatch):
    """Nothing is kept beyond half of what the eager block saves, so that "auto" has to choose of small shapes too."""
    monkeypatch.setattr(keeping, "ALLOWED", 0)
    keeping.choose_once.cache_clear()
    yield
    keeping.choose_once.cache_clear()


# ---- the same bits

TWO, THREE, FOUR = (40, 24), (33, 7, 20), (24, 16, 9, 5)
SAME = [
    Case("flat-dropout", 3, 16, TWO, 2, "flat", normalize=True, dropout=0.4, lengths=(16, 0, 9)),
    Case("four-hierarchical", 1, 70, FOUR, 2, "hierarchical", dropout=0.3),
    Case("three-paper", 3, 16, THREE, 2, "flat", "paper", lengths=(3, 16, 15)),
    Case("shared-dynamic", 3, 5, THREE, 3, "dynamic", shared=True, dropout=0.2),
    Case("raw-four", 1, 16, FOUR, 2, "none", joint="raw", dropout=0.4),
    Case("raw-three-shared", 3, 5, THREE, 3, "hierarchical", joint="raw", shared=True, lengths=(5, 1, 2)),
    Case("paper-shared", 1, 5, TWO, 2, "hierarchical", "paper", shared=True, normalize=True),
    Case("long", 1, 131, TWO, 1, "none", dropout=0.1),
]
CHUNKS = Case("chunks", 4000, 16, (33, 5), 1, dropout=0.2)
"""More samples than the kernels walk at once."""


def ways(*dtypes):
    """Pairs of an instruction set and a dtype that it takes."""
    return [
        (name, dtype)
        for name in cpu.instruction_sets()
        for dtype in dtypes
        if name != PAIRED or dtype == torch.bfloat16
    ]


def assert_same(found, expected, of: str) -> None:
    for name, value in {**expected.values, **expected.gradients}.items():
        assert torch.equal({**found.values, **found.gradients}[name], value), f"{name} with {of}"


@needs_native
@mark.parametrize("name, dtype", ways(*problems.DTYPES), ids=str)
@mark.parametrize("case", SAME, ids=str)
@mark.sampled(40)
def test_what_is_kept_changes_no_bit(case, name, dtype, tight):
    inputs = make(case, dtype)
    with cpu.instruction_set(name):
        expected = run(fused, case, inputs, keep="least")
        for keep, count in (("auto", 1), ("most", 1), ("least", 2), ("auto", 2), ("most", 2)):
            with threads(count):
                assert_same(run(fused, case, inputs, keep=keep), expected, f"{keep} on {count} threads")


@needs_native
@mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_of_many_chunks_changes_no_bit(dtype):
    inputs = make(CHUNKS, dtype)
    with threads(2):
        assert_same(run(fused, CHUNKS, inputs, keep="most"), run(fused, CHUNKS, inputs, keep="least"), "most")


@needs_native
@mark.parametrize("name, dtype", ways(torch.float32, torch.bfloat16), ids=str)
@mark.parametrize("case", [SAME[0], SAME[1], BY_NAME["raw-shared"], BY_NAME["lengths-paper"]], ids=str)
def test_any_pieces_change_no_bit(case, name, dtype, monkeypatch):
    """All subsets of those that there are, not only those that are ever chosen."""
    inputs = make(case, dtype)
    most = keeping.choose(describe(case, inputs), "most", dtype)
    with cpu.instruction_set(name):
        expected = None
        for bits in range(ALL + 1):
            if bits & ~most:
                continue
            monkeypatch.setattr(ops, "kept_pieces", lambda *_, bits=bits: bits)
            found = run(fused, case, inputs)
            expected = expected or found
            assert_same(found, expected, f"the bits {bits}")


@needs_native
@mark.parametrize("case", [EVERYTHING, BY_NAME["lengths-paper"], BY_NAME["raw-blocks"]], ids=str)
def test_a_second_backward_finds_what_was_kept(case):
    leaves = make(case, torch.float32).leaves()
    tensors = leaves.features + leaves.parameters
    options = {**case.options, "lengths": leaves.lengths, "keep": "most"}
    outputs = fused(leaves.features, leaves.layers, leaves.gates, **options)
    first, second = (
        torch.autograd.grad(outputs, tensors, cotangents(outputs), retain_graph=True, materialize_grads=True)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


# ---- what is chosen

CHOSEN = {
    ("abaw", torch.float32): ALL - VALUE,
    ("abaw", torch.bfloat16): ALL - HIDDEN,
    ("clip", torch.float32): ALL - CORRELATION,
    ("clip", torch.bfloat16): ALL - CORRELATION,
    ("light", torch.float32): ALL - HIDDEN,
    ("light", torch.bfloat16): ALL - HIDDEN,
    ("long", torch.float32): ALL - VALUE,
    ("long", torch.bfloat16): ALL - VALUE,
}


def pieces(problem: problems.Problem) -> dict[int, tuple[int, int]]:
    """Elements of each piece of a sample and iteration, and multiply-adds that it saves; signs aside."""
    length, d, widths = problem.length, problem.width, problem.widths
    found = {
        JOINT: (length * d, length * d * d),
        KEY: (length * d, sum(length * length * d_m for d_m in widths)),
        VALUE: (length * d, sum(length * d_m * d_m for d_m in widths)),
        HIDDEN: (len(widths) * length * d, sum(length * d_m * d for d_m in widths)),
        CORRELATION: (d * d, sum(length * d_m * d for d_m in widths)),
    }
    return found if problem.projected else {bit: of for bit, of in found.items() if bit != JOINT}


def total(of: dict[int, tuple[int, int]], bits: int) -> tuple[int, int]:
    """Elements and multiply-adds of several pieces."""
    chosen = [of[bit] for bit in of if bits & bit]
    return sum(elements for elements, _ in chosen), sum(saves for _, saves in chosen)


@mark.parametrize("name, dtype", CHOSEN, ids=str)
def test_the_choice_of_the_shapes_that_matter(name, dtype):
    assert keeping.choose(described(SHAPES[name]), "auto", dtype) == CHOSEN[name, dtype]


def random_problem(draw: random.Random) -> problems.Problem:
    form, joint = draw.choice([("released", "projected"), ("released", "raw"), ("paper", "raw")])
    widths = tuple(draw.choice((1, 5, 16, 64, 100, 129, 512)) for _ in range(draw.randint(2, 4)))
    sizes = draw.choice((0, 1, 3, 12, 64)), draw.choice((1, 8, 9, 16, 70, 300, 1024)), widths
    settings = draw.randint(1, 4), draw.choice(problems.GATINGS), form, 0.0, 0.1, draw.random() < 0.5, False
    return problems.Problem(*sizes, *settings, joint=joint)


@mark.parametrize("dtype", problems.DTYPES, ids=str)
def test_no_other_pieces_that_fit_save_more(dtype):
    draw = random.Random(0)
    several = [described(shape) for shape in SHAPES.values()] + [random_problem(draw) for _ in range(40)]
    for problem in several:
        of = pieces(problem)
        states = (problem.iterations + 1) * problem.length * problem.width
        half = keeping._eager(problem, dtype.itemsize) / 2

        def fits(bits, problem=problem, of=of, states=states, half=half):
            elements = problem.iterations * total(of, bits)[0] * (2 if dtype == torch.float16 else 1)
            return (
                bits == 0
                or states + elements <= half
                or 0 < problem.batch * elements * dtype.itemsize <= keeping.ALLOWED
            )

        signs = SIGNS if problem.released else 0
        chosen = keeping.choose(problem, "auto", dtype)
        if not problem.batch:  # of any size
            assert chosen == keeping.all_pieces(problem) & ~(keeping.HIDDEN | keeping.CORRELATION)
            assert states + problem.iterations * total(of, chosen - signs)[0] <= half
            continue
        assert chosen & SIGNS == signs and fits(chosen - signs) | (dtype == torch.float16), problem
        if dtype == torch.float16:  # whose states are not float32, so that what fits is reckoned otherwise
            continue
        best = max(
            total(of, sum(bits))[1]
            for count in range(len(of) + 1)
            for bits in combinations(of, count)
            if fits(sum(bits))
        )
        assert total(of, chosen)[1] == best, problem


@mark.parametrize("dtype", problems.DTYPES, ids=str)
def test_least_and_most(dtype):
    draw = random.Random(1)
    for problem in [random_problem(draw) for _ in range(20)]:
        most = ALL if problem.projected else ALL - JOINT
        most = most if problem.released else most - SIGNS
        assert keeping.choose(problem, "least", dtype) == 0
        assert keeping.choose(problem, "most", dtype) == most
        assert keeping.choose(problem, "auto", dtype) & ~most == 0


def test_the_choice_knows_nothing_but_shape_and_dtype():
    """The choice depends on neither the threads, the instruction set, nor earlier calls."""
    problem = described(SHAPES["abaw"])
    expected = keeping.choose(problem, "auto", torch.bfloat16)
    with threads(2):
        assert keeping.choose(replace(problem, keep=ALL), "auto", torch.bfloat16) == expected
    if cpu.instruction_sets():
        with cpu.instruction_set("baseline"):
            assert keeping.choose(problem, "auto", torch.bfloat16) == expected


@needs_native
@mark.parametrize("name, dtype", ways(*problems.DTYPES), ids=str)
def test_the_bytes_are_those_of_the_native_code(name, dtype):
    draw = random.Random(2)
    with cpu.instruction_set(name):
        for _ in range(60):
            problem = random_problem(draw)
            keep = draw.randint(0, ALL) & keeping.choose(problem, "most", dtype)
            problem = replace(problem, keep=keep)
            expected = native.library.cpu_kept_bytes(native.problem_of(problem, dtype), name)
            assert keeping.kept_bytes(problem, cpu.held(dtype)) == expected, problem


# ---- the memory that it takes


def saved(kind: type[GatedRJCAFused], shape: Shape, **options) -> int:
    """Bytes that a forward saves, in float32."""
    problem = benchmark.Problem(shape)
    block, inputs = problem.block(kind, **options).train(), problem.input(0)
    return saved_bytes(lambda: block(*inputs), block.parameters())


ABAW = replace(SHAPES["abaw"], length=75, dim_visual=64, dim_audio=32)
"""All sizes but the batch are a quarter of the real ones."""


@needs_native
@mark.parametrize("dropout", [0.0, benchmark.DROPOUT])
@mark.parametrize("shape", [ABAW, replace(ABAW, gating="none", iterations=3), replace(ABAW, batch=3)], ids=str)
def test_at_most_half_of_what_the_strong_eager_block_saves(shape, dropout, tight):
    least, auto = (saved(GatedRJCAFused, shape, dropout=dropout, keep=keep) for keep in ("least", "auto"))
    assert least < auto <= saved(GatedRJCAStrong, shape, dropout=dropout) / 2


@needs_native
def test_at_most_half_at_full_size():
    strong, ours = (saved(kind, SHAPES["abaw"], dropout=0.0) for kind in (GatedRJCAStrong, GatedRJCAFused))
    assert strong / 4 < ours <= strong / 2


@needs_native
def test_least_saves_features_and_iterates_alone():
    width = ABAW.dim_visual + ABAW.dim_audio
    one = ABAW.batch * ABAW.length * width * 4
    assert saved(GatedRJCAFused, ABAW, dropout=0.0, keep="least") == (1 + ABAW.iterations) * one
    assert saved(GatedRJCAFused, ABAW, dropout=0.5, keep="least") == (1 + ABAW.iterations) * one + 8  # the seed
    problem = described(ABAW)
    kept = keeping.kept_bytes(replace(problem, keep=ALL), 4)
    assert saved(GatedRJCAFused, ABAW, dropout=0.0, keep="most") == (1 + ABAW.iterations) * one + kept


@needs_native
@mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_where_there_is_no_backward(context, monkeypatch):
    monkeypatch.setattr(keeping, "kept_bytes", lambda *_: pytest.fail("something is kept"))
    module = GatedRJCAFused(5, 3, 4, keep="most", backend="cpu")
    with context():
        module(torch.randn(2, 4, 5), torch.randn(2, 4, 3))


@needs_native
@mark.parametrize("use", [lambda y: None, lambda y: y.sum().backward()], ids=["unused", "after its backward"])
def test_what_is_kept_ends_with_its_graph(use, monkeypatch):
    """Memory is freed immediately, not at the next garbage collection."""
    blocks = []
    monkeypatch.setattr(memory, "_unused", blocks)
    module = GatedRJCAFused(64, 32, 75, keep="most", output="concat", backend="cpu")
    inputs = torch.randn(2, 75, 64), torch.randn(2, 75, 32)
    gc.disable()
    try:
        y = module(*inputs)
        before = len(blocks)
        use(y)
        del y
        assert len(blocks) > before
        count = len(blocks)
        for _ in range(3):
            use(module(*inputs))
        assert len(blocks) == count
    finally:
        gc.enable()


# ---- who takes which


@mark.parametrize("backend", ["triton", "cuda"])
def test_most_is_refused_of_backends_that_keep_nothing(backend):
    problem = described(ABAW)
    with pytest.raises(ValueError, match=f"keep: expected 'auto' or 'least' with backend '{backend}'.*got 'most'"):
        execution.kept_pieces(problem, "most", backend, torch.float32, True)
    for keep in ("auto", "least"):
        assert execution.kept_pieces(problem, keep, backend, torch.float32, True) == 0


@mark.parametrize(
    "keep, error", [("all", ValueError), ("", ValueError), (63, TypeError), (None, TypeError), (True, TypeError)]
)
def test_another_word_is_refused_by_its_name(keep, error):
    inputs = make(EVERYTHING, torch.float32)
    expected = f"keep: expected one of 'auto', 'least', 'most', got {keep!r}"
    with pytest.raises(error, match=expected):
        gated_rjca(inputs.features, inputs.layers, inputs.gates, **EVERYTHING.options, keep=keep)
    with pytest.raises(error, match=expected):
        GatedRJCAFused(5, 3, 4, keep=keep)


@mark.parametrize("keep", CHOICES)
def test_the_reference_takes_all_of_them(keep):
    inputs = make(EVERYTHING)
    expected = run(partial(gated_rjca, backend="reference"), EVERYTHING, inputs)
    assert_same(run(partial(gated_rjca, backend="reference"), EVERYTHING, inputs, keep=keep), expected, keep)


# ---- PyTorch


@fixture
def module():
    torch.manual_seed(0)
    return GatedRJCAFused(5, 3, 9, gating="hierarchical", normalize=True, dropout=0.0, keep="most", backend="cpu")


FEATURES = torch.linspace(-1, 1, 90).reshape(2, 9, 5), torch.linspace(1, -2, 54).reshape(2, 9, 3)


def gradients(module, function=None) -> list[torch.Tensor]:
    """Outputs and all gradients of a step."""
    leaves = [x.clone().requires_grad_() for x in FEATURES]
    outputs = (module if function is None else function)(*leaves)
    found = torch.autograd.grad(outputs, [*leaves, *module.parameters()], cotangents(outputs))
    return [*(y.detach() for y in outputs), *found]


@needs_native
@mark.parametrize("dynamic", [False, True])
def test_compiled(module, dynamic):
    expected = gradients(module)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert all(map(torch.equal, gradients(module, compiled), expected))


@needs_native
@mark.parametrize("reentrant", [False, True])
def test_checkpointed(module, reentrant):
    expected = gradients(module)
    leaves = [x.clone().requires_grad_() for x in FEATURES]
    outputs = checkpoint(module, *leaves, use_reentrant=reentrant)
    torch.autograd.backward(outputs, cotangents(outputs))
    found = [*(y.detach() for y in outputs), *(x.grad for x in (*leaves, *module.parameters()))]
    assert all(map(torch.equal, found, expected))


def elsewhere(x: torch.Tensor) -> torch.Tensor:
    """A copy that begins at no multiple of a vector, as what is read from a file may."""
    offset = 3 * x.element_size()
    memory = torch.empty(x.nbytes + offset, dtype=torch.uint8)
    return memory[offset:].view(x.dtype).view(x.shape).copy_(x)


@needs_native
@mark.parametrize(
    "context",
    [
        torch.autograd.graph.save_on_cpu,
        partial(torch.autograd.graph.saved_tensors_hooks, torch.clone, torch.clone),
        partial(torch.autograd.graph.saved_tensors_hooks, lambda x: x, elsewhere),
        partial(torch.autograd.graph.saved_tensors_hooks, lambda x: x.numpy(force=True), torch.from_numpy),
    ],
    ids=["save_on_cpu", "clones", "elsewhere", "numpy"],
)
def test_hooks_that_copy_what_is_saved(module, context):
    expected = gradients(module)
    with context():
        found = gradients(module)
    assert all(map(torch.equal, found, expected))


@needs_native
def test_torch_func(module):
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(of):
        return sum(y.square().sum() for y in torch.func.functional_call(module, of, FEATURES))

    found = torch.func.grad(loss)(parameters)
    loss(dict(module.named_parameters())).backward()
    for name, parameter in module.named_parameters():
        assert torch.equal(found[name], parameter.grad), name


@needs_native
def test_a_second_derivative_is_refused(module):
    leaves = [x.clone().requires_grad_() for x in FEATURES]
    (first,) = torch.autograd.grad(module(*leaves)[0].sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def kept_arguments(case: Case, inputs: Inputs, keep: int) -> tuple:
    """Arguments of grjca::forward that keeps these pieces."""
    given = forward_arguments(case, inputs)
    return (*given, *("projected", False, keep)[len(given) - WITH_BACKEND :])


WITH_BACKEND = 14
"""Arguments of grjca::forward up to the backend, after which come those that programs may leave out."""


def backward_arguments(case: Case, inputs: Inputs, keep: int) -> tuple[list, torch.Tensor]:
    """Arguments of grjca::backward up to what was kept, and what was."""
    given = kept_arguments(case, inputs, keep)
    *results, kept = torch.ops.grjca.forward(*given)
    features, parameters, lengths, seed, *options = given
    grads, needed = [*cotangents(results), None], [True] * (len(features) + len(parameters))
    return [grads, features, parameters, lengths, seed, results[len(features)], needed, *options], kept


OPERATORS = [EVERYTHING, BY_NAME["raw-hierarchical"], BY_NAME["empty"]]


@fixture
def filled():
    """New memory is filled, for between what is kept there are gaps that nobody writes, and opcheck compares all."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@needs_native
@mark.parametrize("keep", [KEY, ALL - JOINT])
@mark.parametrize("case", OPERATORS, ids=str)
@mark.sampled(2)
def test_opcheck(case, keep, filled):
    torch.library.opcheck(torch.ops.grjca.forward.default, kept_arguments(case, make(case), keep))
    leaves = make(case, torch.float32).leaves()
    torch.library.opcheck(torch.ops.grjca.forward.default, kept_arguments(case, leaves, keep))
    given, kept = backward_arguments(case, make(case), keep)
    torch.library.opcheck(torch.ops.grjca.backward.default, (*given, kept))


@needs_native
@mark.parametrize(
    "spoiled, expected",
    [
        (lambda kept: kept[:-1], r"kept\[0\]: expected a contiguous tensor of the size of the problem"),
        (lambda kept: kept[:0], r"kept\[0\]: expected a contiguous tensor of the size of the problem"),
        (lambda kept: torch.cat([kept, kept]), r"kept\[0\]: expected a contiguous tensor of the size of the problem"),
        (lambda kept: None, "kept: expected the tensor that the forward filled, got None"),
    ],
    ids=["short", "empty", "long", "none"],
)
def test_another_kept_is_refused(spoiled, expected):
    given, kept = backward_arguments(EVERYTHING, make(EVERYTHING), ALL)
    torch.ops.grjca.backward(*given, kept)
    with pytest.raises(ValueError, match=expected):
        torch.ops.grjca.backward(*given, spoiled(kept))


@needs_native
def test_what_another_instruction_set_has_kept_is_refused_where_its_size_differs():
    """In bfloat16, only the instruction set that rounds operands keeps them rounded."""
    if PAIRED not in cpu.instruction_sets():
        pytest.skip("this processor has no such instruction set.")
    with cpu.instruction_set(PAIRED):
        given, kept = backward_arguments(EVERYTHING, make(EVERYTHING, torch.bfloat16), ALL)
    with cpu.instruction_set("baseline"), pytest.raises(ValueError, match=r"kept\[0\]: expected"):
        torch.ops.grjca.backward(*given, kept)


@needs_native
@mark.parametrize("keep", [-1, ALL + 1, 1 << 20])
def test_bits_of_no_piece_are_refused(keep):
    with pytest.raises(ValueError, match=f"keep: expected bits of {ALL}, got {keep}"):
        torch.ops.grjca.forward(*kept_arguments(EVERYTHING, make(EVERYTHING), keep))


@needs_native
def test_pieces_that_a_problem_does_not_have_are_refused():
    raw = BY_NAME["raw-hierarchical"]
    with pytest.raises(ValueError, match="keep: expected bits of"):
        torch.ops.grjca.forward(*kept_arguments(raw, make(raw), JOINT))


@mark.skipif(TABLE["triton"].why_not() is not None, reason="no Triton here")
def test_an_operator_of_a_backend_that_keeps_nothing_refuses_bits():
    given = list(kept_arguments(EVERYTHING, make(EVERYTHING, torch.float32), KEY))
    given[given.index("cpu")] = "triton"
    with pytest.raises((ValueError, RuntimeError), match=r"keep: backend 'triton' keeps|cannot run"):
        torch.ops.grjca.forward(*given)


# ---- FLOPs


@mark.parametrize("options", [{}, {"shared": True, "iterations": 3}, {"joint": "raw"}, {"form": "paper"}], ids=str)
def test_each_piece_saves_its_products(options):
    options = {"joint": "raw", **options} if options.get("form") == "paper" else options
    case = Case("one", **options)
    problem = describe(case, inputs := make(case))
    needed = [True] * (len(inputs.features) + len(inputs.parameters))
    anew = flops.backward(problem, needed)
    of, most = pieces(problem), keeping.choose(problem, "most", torch.float32)
    if problem.released:
        of[SIGNS] = 0, problem.length * problem.width**2
    assert sum(of) == most
    for bit, (_, saves) in of.items():
        kept = flops.backward(replace(problem, keep=bit), needed)
        assert anew - kept == 2 * problem.batch * problem.iterations * saves, bit
    all_saved = 2 * problem.batch * problem.iterations * sum(saves for _, saves in of.values())
    assert anew - flops.backward(replace(problem, keep=most), needed) == all_saved
    assert flops.forward(replace(problem, keep=most)) == flops.forward(problem)


@needs_native
@mark.skipif(torch.__version__.startswith("2.4."), reason="PyTorch 2.4 cannot count within autograd.grad")
def test_the_counter_of_flop_sees_less(tight):
    counts = {}
    for keep in CHOICES:
        module = GatedRJCAFused(50, 30, 20, iterations=3, backend="cpu", dropout=0.0, keep=keep)
        outputs = module(torch.randn(2, 20, 50, requires_grad=True), torch.randn(2, 20, 30))
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(outputs, cotangents(outputs))
        counts[keep] = counter.get_total_flops()
    assert counts["most"] < counts["auto"] < counts["least"]


# ---- the module


@mark.parametrize("keep", CHOICES)
def test_the_module_shows_it_and_copies_have_it(keep):
    module = GatedRJCAFused(5, 3, 4, keep=keep)
    assert f"keep={keep!r}" in repr(module)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.keep == keep and f"keep={keep!r}" in repr(copied)


def test_a_module_from_before_there_was_a_choice():
    module = GatedRJCAFused(5, 3, 9)
    del module.__dict__["keep"]
    old = pickle.loads(pickle.dumps(module))
    assert old.keep == "auto" and "keep='auto'" in repr(old)
    assert all(map(torch.equal, gradients(old.eval()), gradients(GatedRJCAFused.eval(module))))
