"""The operators as PyTorch sees them: schema, fakes, autograd, autocast, torch.compile, torch.func."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from pytest import mark
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cases import (
    BACKENDS,
    BY_NAME,
    EVERYTHING,
    Case,
    Inputs,
    call,
    cotangents,
    eager_module,
    forward_arguments,
    make,
)
from grjca_kernels import GatedRJCAFused, cpu, gated_rjca, ops, reference
from tolerances import check_draws
from tolerances import length as norm

pytestmark = mark.skipif("cpu" not in BACKENDS, reason=str(cpu.why_not()))
native = partial(gated_rjca, backend="cpu")

CASES = [
    EVERYTHING,
    BY_NAME["released-flat"],
    BY_NAME["released-none"],
    BY_NAME["paper-dynamic"],
    BY_NAME["paper-none"],
    BY_NAME["three-modalities"],
    BY_NAME["shared-dropout-lengths"],
    BY_NAME["raw-hierarchical"],
    BY_NAME["empty"],
]


def backward_arguments(case: Case, inputs: Inputs, missing=(), **options) -> tuple:
    """Arguments of grjca::backward, as the forward leaves them."""
    arguments = forward_arguments(case, inputs, **options)
    with torch.no_grad():
        results = torch.ops.grjca.forward(*arguments)
    grads = [None if i in missing else gradient for i, gradient in enumerate(cotangents(results))]
    features, parameters, lengths, seed, *rest = arguments
    iterates = results[1 if options.get("concat") else len(features)]
    needed = [i % 3 != 1 for i in range(len(features) + len(parameters))]
    return grads, features, parameters, lengths, seed, iterates, needed, *rest


# ---- registration


@mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@mark.parametrize("concat, return_gates", [(False, True), (True, False)])
@mark.parametrize("case", CASES, ids=str)
@mark.sampled(12)
def test_opcheck_forward(case, concat, return_gates, dtype):
    arguments = forward_arguments(case, make(case, dtype), concat, return_gates)
    torch.library.opcheck(torch.ops.grjca.forward.default, arguments)


@mark.parametrize("case", CASES[:4], ids=str)
def test_opcheck_forward_with_gradients(case):
    torch.library.opcheck(torch.ops.grjca.forward.default, forward_arguments(case, make(case).leaves()))


@mark.parametrize("missing", [(), (0,), (1, 2)])
@mark.parametrize("concat", [False, True])
@mark.parametrize("case", CASES, ids=str)
@mark.sampled(12)
def test_opcheck_backward(case, concat, missing):
    arguments = backward_arguments(case, make(case), missing, concat=concat)
    torch.library.opcheck(torch.ops.grjca.backward.default, arguments)


@mark.parametrize("strided", [False, True])
@mark.parametrize("case", CASES, ids=str)
def test_fakes_are_exact(case, strided):
    """Shape, strides, dtype and device of what really comes back."""
    inputs = make(case, torch.float32)
    if strided:
        inputs = replace(inputs, features=[x.mT.contiguous().mT for x in inputs.features])
    calls = [
        (torch.ops.grjca.forward, forward_arguments(case, inputs, concat, gates))
        for concat in (False, True)
        for gates in (False, True)
    ]
    calls += [(torch.ops.grjca.backward, backward_arguments(case, inputs, concat=concat)) for concat in (False, True)]
    for operator, arguments in calls:
        real = operator(*arguments)
        mode = FakeTensorMode()
        with mode:
            fake = operator(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
        assert len(fake) == len(real)
        for a, b in zip(fake, real, strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


@mark.parametrize("case", CASES, ids=str)
def test_results_do_not_overlap(case):
    """Functional operators return new memory."""
    inputs = make(case)
    results = torch.ops.grjca.forward(*forward_arguments(case, inputs))
    storages = [x.untyped_storage().data_ptr() for x in (*results, *inputs.features, *inputs.parameters) if x.numel()]
    assert len(set(storages)) == len(storages)


def test_a_raw_call_is_checked_too():
    features, parameters, *rest = forward_arguments(EVERYTHING, make(EVERYTHING))
    with pytest.raises(ValueError, match=r"parameters: expected \d+ tensors .*got"):
        torch.ops.grjca.forward(features, parameters[:-1], *rest)
    with pytest.raises(ValueError, match=r"layers\[0\]\.query\.weight: expected shape"):
        torch.ops.grjca.forward(features, [parameters[1], *parameters[1:]], *rest)
    for backend in ("reference", "auto", "nosuch"):
        with pytest.raises(ValueError, match=f"backend: expected .*got '{backend}'"):
            torch.ops.grjca.forward(features, parameters, *rest[:-1], backend)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: it computes on cuda tensors"):
        torch.ops.grjca.forward(features, parameters, *rest[:-1], "cuda")


def test_a_raw_backward_is_checked_too():
    grads, *given, iterates, needed = backward_arguments(EVERYTHING, make(EVERYTHING))[:7]
    options = backward_arguments(EVERYTHING, make(EVERYTHING))[7:]
    for changed, iterates_of, expected in (
        ([grads[0][:1], *grads[1:]], iterates, r"grads\[0\]: expected \["),
        ([grads[0].float(), *grads[1:]], iterates, r"grads\[0\]: .*got .*torch\.float32"),
        (grads[:-1], iterates, r"grads: expected \d+ of them or None"),
        (grads, iterates[1:], r"iterates: expected \["),
    ):
        with pytest.raises(ValueError, match=expected):
            torch.ops.grjca.backward(changed, *given, iterates_of, needed, *options)
    with pytest.raises(ValueError, match="needed: expected"):
        torch.ops.grjca.backward(grads, *given, iterates, needed[:-1], *options)


# ---- which way a call takes


@pytest.fixture
def ways(monkeypatch):
    """What calls go through: a letter for every forward and backward that computed; d is directly, o an operator."""
    found = []

    def noting(name):
        compute = getattr(ops, name)

        def noted(wanted, *given):
            found.append("d" if wanted.directly else "o")
            return compute(wanted, *given)

        monkeypatch.setattr(ops, name, noted)

    noting("forward_now")
    noting("backward_now")
    return found


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **options or {})


DIRECT = {
    "plain": nullcontext,
    "anomaly": torch.autograd.detect_anomaly,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "profiler": torch.profiler.profile,
    "hooks on saved tensors": partial(torch.autograd.graph.saved_tensors_hooks, lambda x: x, lambda x: x),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "default device": partial(torch.device, "cpu"),
    "deterministic": partial(torch.random.fork_rng, devices=[]),
}
BY_OPERATOR = {
    "dispatch mode": Dispatched,
    "FLOP": partial(FlopCounterMode, display=False),
    "function mode": BaseTorchFunctionMode,
    "forward-mode": torch.autograd.forward_ad.dual_level,
}


@pytest.fixture
def small():
    """A module, its inputs, and a step with it: all results."""
    torch.manual_seed(0)
    module = GatedRJCAFused(5, 3, 4, backend="cpu", gating="hierarchical", dropout=0.4)
    x = torch.randn(2, 4, 5), torch.randn(2, 4, 3)

    def all_of_it():
        torch.manual_seed(1)
        return step(module, x, [torch.ones(2, 4, 5), torch.ones(2, 4, 3)])

    return module, x, all_of_it


@mark.filterwarnings("ignore:Anomaly Detection")
@mark.parametrize("context", DIRECT)
def test_plain_calls_go_directly(context, ways, small):
    with DIRECT[context]():
        small[2]()
    assert ways == ["d", "d"]


@mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients_go_directly(context, ways, small):
    module, x, _ = small
    with context():
        module(*x)
    assert ways == ["d"]


@mark.parametrize("reentrant", [False, True])
def test_checkpoints_go_directly(reentrant, ways, small):
    module, x, _ = small
    leaves = [tensor.clone().requires_grad_() for tensor in x]
    outputs = checkpoint(module, *leaves, use_reentrant=reentrant)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert ways == ["d"] * 3


@mark.parametrize("context", BY_OPERATOR)
def test_who_looks_at_operators_gets_them_and_the_same_bits(context, ways, small):
    expected = small[2]()
    ways.clear()
    with BY_OPERATOR[context]():
        found = small[2]()
    off = context == "function mode" and "d" in ways  # within what it has seen, but not with PyTorch 2.4
    assert ways == ["o", "d" if off else "o"]
    assert all(map(torch.equal, found, expected))


@mark.parametrize("mode", ["dispatch mode", "FLOP"])
def test_a_mode_that_comes_with_the_backward_sees_an_operator(mode, ways, small):
    module, x, _ = small
    outputs = module(*x)
    with BY_OPERATOR[mode]():
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert ways == ["d", "o"]


@mark.parametrize("case", CASES, ids=str)
def test_both_ways_give_the_same_bits(case, ways):
    found = []
    for context in (nullcontext, Dispatched):
        inputs = make(case, torch.float32).leaves()
        with context():
            values = [*call(native, case, inputs).values()]
            given = torch.autograd.grad(values, inputs.features + inputs.parameters, cotangents(values))
        found.append([*values, *given])
    assert ways == ["d", "d", "o", "o"]
    assert all(map(torch.equal, *found))


def test_gradients_that_stand_for_others_go_by_the_operator(ways, small):
    """A lazy negation's memory holds other values than the tensor shows."""
    module, x, _ = small
    outputs = module(*x)
    g = torch.randn(2, 4, 5)
    by_operator = torch.autograd.grad(outputs[0], [*module.parameters()], g._neg_view(), retain_graph=True)
    directly = torch.autograd.grad(outputs[0], [*module.parameters()], -g)
    assert ways == ["d", "o", "d"]
    assert all(map(torch.equal, by_operator, directly))


@mark.parametrize("lazily", [torch._neg_view, lambda x: torch._efficientzerotensor(x.shape)], ids=["negated", "zero"])
def test_features_that_stand_for_others_go_by_the_operator(lazily, ways, small):
    module, x, _ = small
    found = []
    for given in ([lazily(of) for of in x], [lazily(of).clone() for of in x]):
        torch.manual_seed(0)
        outputs = module(*given)
        found.append([*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), module.parameters())])
    assert ways == ["o", "o", "d", "d"]
    assert all(map(torch.equal, *found))


def test_what_traces_and_fakes_sees_operators(ways, small):
    module, x, _ = small
    module.eval()
    traced = make_fx(module)(*x)
    names = [str(node.target) for node in traced.graph.nodes]
    assert names.count("grjca.forward.default") == 1 and set(ways) <= {"o"}
    ways.clear()
    assert all(map(torch.equal, traced(*x), module(*x)))
    ways.clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = module(*map(mode.from_tensor, x))
    assert [y.shape for y in fakes] == [tensor.shape for tensor in x] and not ways


def test_torch_func_and_the_compiler_see_operators(ways, small):
    module, x, _ = small
    module.eval()
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    torch.func.grad(functional_loss(module, x))(parameters)
    assert ways == ["o", "o"]
    ways.clear()
    torch.compiler.reset()
    step(torch.compile(module, fullgraph=True, backend="aot_eager"), x, [torch.ones(2, 4, 5), torch.ones(2, 4, 3)])
    assert ways == ["o", "o"]


@mark.parametrize("context", [nullcontext, BaseTorchFunctionMode])
def test_a_profile_shows_each_direction_once(context, small):
    with context(), torch.profiler.profile() as profile:
        small[2]()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["grjca::forward"] == counts["grjca::backward"] == 1


# ---- derivatives


@mark.parametrize("case", [
    Case("all", 2, 3, (2, 1), 2, "hierarchical", normalize=True, dropout=0.3, lengths=(3, 2)),
    Case("paper", 1, 3, (1, 2), 2, "flat", "paper"),
    Case("shared", 1, 2, (2, 2), 3, "dynamic", shared=True),
], ids=str)  # fmt: skip
def test_gradcheck(case):
    inputs = make(case).leaves()

    def function(*tensors):
        remaining = iter(tensors)
        return tuple(call(native, case, inputs.map(lambda _: next(remaining))).values())

    assert torch.autograd.gradcheck(function, (*inputs.features, *inputs.parameters))


def functional_loss(module, x):
    def loss(parameters):
        return sum(y.square().sum() for y in torch.func.functional_call(module, parameters, x))

    return loss


def test_torch_func_grad():
    module = GatedRJCAFused(5, 3, 4, backend="cpu", dtype=torch.float64).eval()
    x = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    loss = functional_loss(module, x)
    gradients, value = torch.func.grad_and_value(loss)(parameters)
    expected = loss(dict(module.named_parameters()))
    expected.backward()
    assert torch.equal(value, expected.detach())
    for name, parameter in module.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


# ---- autocast


@mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@mark.parametrize("features", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, features):
    """As if parameters had the dtype of the features; the gradients come in the dtypes of the parameters."""
    inputs = make(EVERYTHING, torch.float32)
    inputs = replace(inputs, features=[x.to(features) for x in inputs.features])
    mixed, cast = inputs.leaves(), inputs.to(features).leaves()
    with torch.autocast("cpu", dtype):
        values = call(native, EVERYTHING, mixed)
    expected = call(native, EVERYTHING, cast)
    assert all(torch.equal(value, expected[name]) and value.dtype == features for name, value in values.items())
    incoming = cotangents([*expected.values()])
    ours = torch.autograd.grad([*values.values()], mixed.features + mixed.parameters, incoming)
    theirs = torch.autograd.grad([*expected.values()], cast.features + cast.parameters, incoming)
    for x, a, b in zip(mixed.features + mixed.parameters, ours, theirs, strict=True):
        assert a.dtype == x.dtype and torch.equal(a, b.to(x.dtype))


@mark.parametrize("backend", BACKENDS)
@mark.parametrize("output", ["pair", "concat"])
def test_autocast_of_a_float32_module_with_half_activations(backend, output):
    module = GatedRJCAFused(5, 3, 4, backend=backend, output=output, dropout=0.0)
    x = torch.randn(2, 4, 5).bfloat16(), torch.randn(2, 4, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(*x)
    y = y if output == "concat" else y[0]
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.dtype == torch.float32 for gradient in gradients)


@mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_float64_alone(backend):
    function = partial(gated_rjca, backend=backend)
    inputs = make(EVERYTHING)
    with torch.autocast("cpu", torch.bfloat16):
        values = call(function, EVERYTHING, inputs)
    expected = call(function, EVERYTHING, inputs)
    assert all(torch.equal(value, expected[name]) for name, value in values.items())


@mark.parametrize("backend", BACKENDS)
@mark.parametrize("features", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_error_is_no_more_than_that_of_eager_pytorch(features, backend):
    case = replace(EVERYTHING, dropout=0.0, normalize=False, lengths=None)
    inputs = make(case, torch.float32)
    module, _ = eager_module(case, inputs)
    x = [of.to(features) for of in inputs.features]
    exact = call(reference.gated_rjca, case, make(case))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = module(*x)
        ours = gated_rjca(x, inputs.layers, inputs.gates, backend=backend, **case.options)
    for m, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype == features
        check_draws(f"Y[{m}]", a, exact[f"Y[{m}]"], [b], norm)


def test_autocast_that_is_off_changes_nothing():
    inputs = make(EVERYTHING, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert call(native, EVERYTHING, inputs)["Y[0]"].dtype == torch.float32


# ---- torch.compile


def step(module: torch.nn.Module, x: tuple[Tensor, ...], incoming: list[Tensor], lengths=None) -> list[Tensor]:
    module.zero_grad()
    leaves = [tensor.clone().requires_grad_() for tensor in x]
    outputs = module(*leaves) if lengths is None else module(*leaves, lengths)
    torch.autograd.backward(outputs, incoming)
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    return [*(y.detach() for y in outputs), *(leaf.grad for leaf in leaves), *gradients]


@mark.parametrize("gating, with_lengths", [("flat", False), ("hierarchical", True)])
def test_compile_without_graph_breaks(gating, with_lengths):
    torch.compiler.reset()
    module = GatedRJCAFused(5, 3, 4, gating=gating, normalize=True, backend="cpu", dropout=0.0)
    x = torch.randn(2, 4, 5), torch.randn(2, 4, 3)
    incoming = cotangents(x)
    lengths = torch.tensor([4, 2]) if with_lengths else None
    expected = step(module, x, incoming, lengths)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, x, incoming, lengths), expected, rtol=0, atol=0)


def test_compile_with_dropout():
    torch.compiler.reset()
    module = GatedRJCAFused(5, 3, 4, backend="cpu", dropout=0.5)
    x = torch.randn(2, 4, 5), torch.randn(2, 4, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    first, second = compiled(*x)[0], compiled(*x)[0]
    torch.manual_seed(0)
    assert torch.equal(compiled(*x)[0], first) and not torch.equal(first, second)


@mark.parametrize("dynamic", [None, True])
@mark.sampled(1)
def test_compile_of_another_batch(dynamic):
    torch.compiler.reset()
    module = GatedRJCAFused(5, 3, 4, backend="cpu").eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 4, 5), torch.randn(batch, 4, 3)
        torch.testing.assert_close(compiled(*x), module(*x), rtol=0, atol=0)


def test_export():
    module = GatedRJCAFused(5, 3, 4, backend="cpu").eval()
    x = torch.randn(2, 4, 5), torch.randn(2, 4, 3)
    program = torch.export.export(module, x)
    torch.testing.assert_close(program.module()(*x), module(*x), rtol=0, atol=0)


@mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
def test_vmap_is_refused_with_a_way_out():
    block = GatedRJCAFused(3, 2, 4, gating="none").eval()
    visual, audio = torch.randn(5, 2, 4, 3), torch.randn(5, 2, 4, 2)
    with pytest.raises(RuntimeError, match=r"no vmap.*backend='reference'"):
        torch.vmap(block)(visual, audio)
    expected = block(visual.flatten(0, 1), audio.flatten(0, 1))
    block.backend = "reference"
    for mapped, flat in zip(torch.vmap(block)(visual, audio), expected, strict=True):
        torch.testing.assert_close(mapped.flatten(0, 1), flat)
