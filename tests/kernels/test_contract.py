"""Every line of "What must always hold" in operator.md, for every backend that runs here."""

import copy
import gc
from dataclasses import replace
from functools import partial

import pytest
import torch
from pytest import fixture, mark
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from assertions import LAYOUTS, assert_same, assert_same_results, backward
from cases import BACKENDS, BY_NAME, CASES, EVERYTHING, SEED, Case, Inputs, Result, call, cotangents, make, run
from grjca.measure import threads
from grjca_kernels import GatedRJCAFused, cpu, gated_rjca, native
from grjca_kernels import problem as problems
from tolerances import check_close, check_float64

NAN, INF = float("nan"), float("inf")
needs_native = mark.skipif("cpu" not in BACKENDS, reason=str(cpu.why_not()))


@fixture(params=BACKENDS)
def function(request):
    return partial(gated_rjca, backend=request.param)


# ---- strides

STRIDED_CASES = [EVERYTHING, BY_NAME["released-dynamic"], BY_NAME["paper-none"], BY_NAME["one-block-and-more"]]


@needs_native
@mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@mark.parametrize("case", STRIDED_CASES, ids=str)
def test_strides_of_inputs(case, layout, dtype):
    inputs = make(case, dtype)
    strided = [layout(x) for x in inputs.features]
    results = []
    for features in (strided, [x.contiguous() for x in strided]):
        leaves = replace(inputs, features=[x.detach().requires_grad_() for x in features])  # keeps the strides
        values = call(partial(gated_rjca, backend="cpu"), case, leaves)
        gradients = torch.autograd.grad([*values.values()], leaves.features, cotangents([*values.values()]))
        results.append(Result(values, dict(zip("va", gradients, strict=True))))
    assert any(a.stride() != b.stride() for a, b in zip(strided, features, strict=True))
    assert_same_results(*results)


@mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@mark.parametrize("case", STRIDED_CASES, ids=str)
@needs_native
def test_strides_of_incoming_gradients(case, layout, dtype):
    inputs = make(case, dtype).leaves()
    values = call(partial(gated_rjca, backend="cpu"), case, inputs)
    strided = [layout(gradient) for gradient in cotangents([*values.values()])]
    ours = backward(values, inputs, strided)
    assert all(gradient.isfinite().all() for gradient in ours)
    torch.testing.assert_close(ours, backward(values, inputs, [x.contiguous() for x in strided]), rtol=0, atol=0)


@mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_of_the_gradient_of_a_concatenation(function, layout):
    inputs = make(EVERYTHING).leaves()
    arguments = (inputs.features, inputs.layers, inputs.gates)
    y = function(*arguments, **EVERYTHING.options, lengths=inputs.lengths, concat=True)
    pair = function(*arguments, **EVERYTHING.options, lengths=inputs.lengths)
    assert torch.equal(y, torch.cat(pair, dim=-1))
    gradient = layout(torch.randn_like(y))
    ours = torch.autograd.grad(y, inputs.features, gradient)
    theirs = torch.autograd.grad(pair, inputs.features, gradient.split(EVERYTHING.widths, dim=-1))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@needs_native
def test_strides_of_parameters():
    inputs = make(EVERYTHING)
    strided = inputs.map(lambda x: x if x.dim() == 3 else torch.stack([x, x + NAN], dim=-1)[..., 0])
    assert not all(parameter.is_contiguous() for parameter in strided.parameters)
    native = partial(gated_rjca, backend="cpu")
    assert_same(call(native, EVERYTHING, strided), call(native, EVERYTHING, inputs))


def test_a_sum_sends_back_a_gradient_without_strides(function):
    inputs = make(EVERYTHING).leaves()
    y = function(inputs.features, inputs.layers, inputs.gates, **EVERYTHING.options, concat=True)
    expected = torch.autograd.grad(y, inputs.parameters, torch.ones_like(y), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), inputs.parameters), expected, rtol=0, atol=0)


# ---- lengths


@mark.parametrize("form", problems.FORMS)
@mark.parametrize("gating", problems.GATINGS)
@mark.parametrize("n", [1, 4, 9])
def test_a_length_is_a_shorter_sample(function, form, gating, n):
    case = Case("longer", 1, 9, (5, 3), 3, gating, form, normalize=n == 4, lengths=(n,))
    inputs = make(case)

    def cut(linear):
        return type(linear)(linear.weight[:n, :n], None if linear.bias is None else linear.bias[:n])

    layers = tuple(layer._replace(key=tuple(map(cut, layer.key))) for layer in inputs.layers)
    shorter = Inputs([x[:, :n] for x in inputs.features], layers, inputs.gates, None)
    longer = run(function, case, inputs)
    leaves = shorter.leaves()
    values = call(function, replace(case, length=n, lengths=None), leaves)
    for name in values:
        assert not longer.values[name][..., n:, :].any(), f"{name}: absent frames are not zero"
    expected = {name: value.detach() for name, value in values.items()}
    present = {name: value[..., :n, :] for name, value in longer.values.items()}
    incoming = [gradient[..., :n, :] for gradient in cotangents([*longer.values.values()])]
    gradients = dict(zip(longer.gradients, backward(values, leaves, incoming), strict=True))
    cut_gradients = {}
    for name, gradient in longer.gradients.items():
        index = tuple(slice(size) for size in gradients[name].shape)
        cut_gradients[name] = gradient[index].clone()
        gradient[index] = 0
        assert not gradient.any(), f"{name}: a gradient reaches what is absent"
    check_float64(Result(present, cut_gradients), Result(expected, gradients))


def test_no_frames_at_all(function):
    case = Case("absent", 3, 5, (4, 2), gating="hierarchical", dropout=0.4, lengths=(0, 0, 0), normalize=True)
    inputs = make(case)
    for x in inputs.features:
        x.fill_(NAN)
    result = run(function, case, inputs)
    for name, value in {**result.values, **result.gradients}.items():
        assert not value.any(), name


@mark.parametrize("garbage", [NAN, INF, -INF, 1e300])
@mark.parametrize("name", ["lengths", "lengths-paper", "lengths-normalize-dropout", "shared-dropout-lengths"])
def test_what_stands_in_absent_rows_reaches_nothing(function, name, garbage):
    case = BY_NAME[name]
    clean = make(case)
    dirty = clean.map(torch.clone)
    for b, n in enumerate(case.lengths):
        for x in dirty.features:
            x[b, n:] = garbage
    result = run(function, case, dirty)
    assert_same_results(result, run(function, case, clean))
    for value in [*result.values.values(), *result.gradients.values()]:
        assert value.isfinite().all()
    for b, n in enumerate(case.lengths):
        for value in result.values.values():
            assert not value.select(-3, b)[..., n:, :].any()
        for m in range(len(case.widths)):
            assert not result.gradients[f"d features[{m}]"][b, n:].any()


@mark.parametrize("name", ["lengths", "lengths-paper", "lengths-normalize-dropout"])
def test_gradients_that_arrive_in_absent_rows_reach_nothing(function, name):
    case = BY_NAME[name]
    inputs = make(case).leaves()
    values = call(function, case, inputs)
    incoming = cotangents([*values.values()])
    expected = backward(values, inputs, incoming)
    for gradient in incoming:
        for b, n in enumerate(case.lengths):
            gradient.select(-3, b)[..., n:, :] = NAN
    torch.testing.assert_close(backward(values, inputs, incoming), expected, rtol=0, atol=0)


# ---- repeatability


@needs_native
@mark.parametrize("dtype", problems.DTYPES, ids=str)
@mark.parametrize("case", [EVERYTHING, BY_NAME["many-rows"], BY_NAME["one-block-and-more-dropout"]], ids=str)
def test_bits_do_not_depend_on_the_run_or_on_threads(case, dtype):
    inputs = make(case, dtype)
    first = run(partial(gated_rjca, backend="cpu"), case, inputs)
    for count in (1, 2, 3, 2, 5):
        with threads(count):
            assert_same_results(run(partial(gated_rjca, backend="cpu"), case, inputs), first)


@needs_native
def test_bits_do_not_depend_on_threads_where_there_is_much_to_share():
    case = Case("wide", 9, 70, (96, 80), 2, "hierarchical", dropout=0.5, lengths=(70, 3, 9, 70, 0, 65, 31, 32, 33))
    inputs = make(case, torch.float32)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(partial(gated_rjca, backend="cpu"), case, inputs))
    assert_same_results(results[1], results[0])
    assert_same_results(results[2], results[0])


@needs_native
def test_a_sample_does_not_depend_on_its_batch():
    """Not promised, but so cheap to have: padding a batch changes no bit of the others."""
    case = Case("batch", 5, 13, (9, 6), gating="hierarchical", normalize=True)
    inputs = make(case)
    native = partial(gated_rjca, backend="cpu")
    one = replace(inputs, features=[x[3:4] for x in inputs.features])
    whole, alone = call(native, case, inputs), call(native, replace(case, batch=1), one)
    assert_same({name: value.narrow(-3, 3, 1) for name, value in whole.items()}, alone)


# ---- NaN and Inf


@mark.parametrize("poison", [NAN, INF, -INF])
@mark.parametrize("modality", [0, 1])
@mark.parametrize(
    "name", ["dropout", "released-hierarchical", "paper-flat", "normalize", "shared", "one-block-and-more"]
)
def test_a_bad_number_stays_in_its_sample(function, name, modality, poison):
    case = replace(BY_NAME[name], batch=4)
    clean = make(case)
    dirty = clean.map(torch.clone)
    dirty.features[modality][1, 2, 0] = poison
    expected, result = run(function, case, clean), run(function, case, dirty)
    others = [0, 2, 3]

    def of(values: dict[str, Tensor], samples: list[int]) -> dict[str, Tensor]:
        return {name: value.movedim(-3, 0)[samples] for name, value in values.items()}

    def features(result: Result) -> dict[str, Tensor]:
        return {f"d {m}": result.gradients[f"d features[{m}]"] for m in range(len(case.widths))}

    assert_same(of(result.values, others), of(expected.values, others))
    assert_same(of(features(result), others), of(features(expected), others))
    if poison != poison:  # and it does not vanish there
        same_places = run(partial(gated_rjca, backend="reference"), case, dirty)
        for ours, theirs in ((result.values, same_places.values), (features(result), features(same_places))):
            for name, value in ours.items():
                assert torch.equal(value.isnan(), theirs[name].isnan()), name
        assert result.values["Y[0]"][1].isnan().any() and result.values["Y[1]"][1].isnan().any()


def test_a_bad_gradient_stays_in_its_sample(function):
    case = replace(BY_NAME["dropout"], batch=4)
    inputs = make(case).leaves()
    values = call(function, case, inputs)
    incoming = cotangents([*values.values()])
    expected = backward(values, inputs, incoming)[:2]
    incoming[0][1, 2, 0] = NAN
    ours = backward(values, inputs, incoming)[:2]
    for gradient, clean in zip(ours, expected, strict=True):
        assert torch.equal(gradient[[0, 2, 3]], clean[[0, 2, 3]])
        assert gradient[1].isnan().any()


# ---- refusals before anything runs


@needs_native
def test_nothing_is_launched_for_bad_input(monkeypatch):
    def launched(*_):
        raise AssertionError("launched")

    monkeypatch.setattr(native.library, "cpu_forward", launched)
    inputs = make(EVERYTHING, torch.float32)
    arguments = (inputs.features, inputs.layers, inputs.gates)
    bad = [{"lengths": torch.tensor([1, 2, 12])}, {"dropout": 1.0}, {"iterations": 2}, {"temperature": -1.0}]
    for options in bad:
        with pytest.raises(ValueError):
            gated_rjca(*arguments, **{**EVERYTHING.options, **options}, backend="cpu")
    with pytest.raises(AssertionError, match="launched"):
        gated_rjca(*arguments, **EVERYTHING.options, backend="cpu")


@needs_native
def test_tensors_are_not_moved_to_another_device():
    inputs = make(EVERYTHING, torch.float32).map(lambda x: x.to("meta"))
    arguments = (inputs.features, inputs.layers, inputs.gates)
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run: it computes on cpu tensors, and these are on meta"):
        gated_rjca(*arguments, **EVERYTHING.options, backend="cpu")
    for y, x in zip(gated_rjca(*arguments, **EVERYTHING.options), inputs.features, strict=True):
        assert y.device == x.device and y.shape == x.shape


# ---- what is written and saved


def test_inputs_are_not_written(function):
    inputs = make(EVERYTHING)
    kept = inputs.map(torch.clone)
    leaves = inputs.map(lambda x: x.requires_grad_())
    values = call(function, EVERYTHING, leaves)
    incoming = cotangents([*values.values()])
    arrived, returned = copy.deepcopy(incoming), {name: value.detach().clone() for name, value in values.items()}
    backward(values, leaves, incoming)
    for a, b in zip(leaves.features + leaves.parameters, kept.features + kept.parameters, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(inputs.lengths, torch.tensor(EVERYTHING.lengths))
    torch.testing.assert_close(incoming, arrived, rtol=0, atol=0)
    assert_same({name: value.detach() for name, value in values.items()}, returned)


@needs_native
@mark.parametrize("concat", [False, True])
@mark.parametrize("keep", ["least", "most"])
@mark.parametrize("case", [EVERYTHING, BY_NAME["paper-none"]], ids=str)
def test_only_arguments_iterates_and_what_is_to_be_kept_are_saved(case, keep, concat):
    inputs = make(case, torch.float32).leaves()
    arguments = {x.untyped_storage().data_ptr() for x in (*inputs.features, *inputs.parameters)}
    extra: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in arguments:
            extra.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        options = {**case.options, "lengths": inputs.lengths, "concat": concat, "keep": keep}
        gated_rjca(inputs.features, inputs.layers, inputs.gates, **options)
    iterates = [x for x in extra if x.is_floating_point()]
    assert [list(x.shape) for x in iterates] == [[case.iterations, case.batch, case.length, sum(case.widths)]]
    others = [x for x in extra if x.dtype == torch.int64]
    assert sum(x.numel() for x in others) <= 1 + case.batch  # the seed, the lengths
    assert [x.dtype for x in extra if x.dtype not in (torch.float32, torch.int64)] == [torch.uint8] * (keep == "most")


@needs_native
def test_no_tensor_is_kept_on_the_side():
    """Checks the places that the hooks above do not see."""

    def alive() -> dict[int, Tensor]:
        gc.collect()
        return {id(x): x for x in gc.get_objects() if issubclass(type(x), Tensor)}

    inputs = make(EVERYTHING, torch.float32).leaves()
    before = alive()
    options = {**EVERYTHING.options, "concat": True, "keep": "least", "backend": "cpu"}
    y = gated_rjca(inputs.features, inputs.layers, inputs.gates, **options)
    new = [x for key, x in alive().items() if key not in before]
    assert y.requires_grad and all(x is y or x.numel() == 1 for x in new)  # one is the seed


def test_a_saved_tensor_that_was_changed_is_noticed(function):
    inputs = make(EVERYTHING).leaves()
    values = call(function, EVERYTHING, inputs)
    with torch.no_grad():
        inputs.layers[1].value[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(values, inputs, cotangents([*values.values()]))


@mark.parametrize("case", [EVERYTHING, BY_NAME["paper-dynamic"]], ids=str)
def test_backward_twice(function, case):
    inputs = make(case).leaves()
    values = call(function, case, inputs)
    incoming = cotangents([*values.values()])
    torch.testing.assert_close(backward(values, inputs, incoming), backward(values, inputs, incoming), rtol=0, atol=0)


def test_gradients_accumulate():
    module = GatedRJCAFused(5, 3, 4).eval()
    x = torch.randn(2, 4, 5), torch.randn(2, 4, 3)
    once, twice = [], []
    for gradients, times in ((once, 1), (twice, 2)):
        module.zero_grad()
        for _ in range(times):
            sum(y.sum() for y in module(*x)).backward()
        gradients += [parameter.grad.clone() for parameter in module.parameters()]
    torch.testing.assert_close(twice, [2 * gradient for gradient in once], rtol=0, atol=0)


# ---- derivatives of derivatives


@needs_native
def test_a_second_derivative_is_refused_with_the_way_out():
    inputs = make(EVERYTHING).leaves()
    values = call(partial(gated_rjca, backend="cpu"), EVERYTHING, inputs)
    incoming = cotangents([*values.values()])
    first = torch.autograd.grad([*values.values()], inputs.features, incoming, create_graph=True)
    torch.testing.assert_close([g.detach() for g in first], backward(values, inputs, incoming)[:2], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs.features)


def test_the_reference_has_second_derivatives():
    case = Case("second", 1, 2, (2, 1), 1, "flat")
    inputs = make(case).leaves()

    def function(*features):
        return gated_rjca(features, inputs.layers, inputs.gates, **case.options, backend="reference")

    assert torch.autograd.gradgradcheck(function, inputs.features)


# ---- which gradients


def test_any_subset_of_gradients(function):
    inputs = make(EVERYTHING)
    everything = run(function, EVERYTHING, inputs)
    names = list(everything.gradients)
    groups = [
        [i for i, name in enumerate(names) if kind in name] for kind in ("features", "query", "key", "output", "gates")
    ]
    for wanted in [[0], [1], [2], [3], [len(names) - 1], *groups]:
        index = iter(range(len(names)))
        leaves = inputs.map(lambda x, i=index, w=wanted: x.clone().requires_grad_(next(i) in w))
        values = call(function, EVERYTHING, leaves)
        tensors = leaves.features + leaves.parameters
        reached = [
            (y, dy) for y, dy in zip(values.values(), cotangents([*values.values()]), strict=True) if y.requires_grad
        ]
        torch.autograd.backward(*zip(*reached, strict=True))
        for i, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
            assert (tensor.grad is not None) == (i in wanted), name
            if i in wanted:
                check_close(name, tensor.grad, everything.gradients[name])


@mark.parametrize("arriving", ["Y[0]", "Y[1]", "X[0]", "X[1]", "G[0][1]", "G[1][3]"])
def test_any_subset_of_incoming_gradients(function, arriving):
    inputs = make(EVERYTHING).leaves()
    values = call(function, EVERYTHING, inputs)
    incoming = dict(zip(values, cotangents([*values.values()]), strict=True))
    tensors = inputs.features + inputs.parameters
    ours = torch.autograd.grad(values[arriving], tensors, incoming[arriving], retain_graph=True, materialize_grads=True)
    zeros = [incoming[name] if name == arriving else torch.zeros_like(value) for name, value in values.items()]
    torch.testing.assert_close(list(ours), backward(values, inputs, zeros), rtol=0, atol=0)


@needs_native
@mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_graph_where_none_is_wanted(context):
    inputs = make(EVERYTHING).leaves()
    native = partial(gated_rjca, backend="cpu")
    with context():
        values = call(native, EVERYTHING, inputs)
    assert not any(value.requires_grad for value in values.values())
    assert_same(values, {name: value.detach() for name, value in call(native, EVERYTHING, inputs).items()})


# ---- dropout and randomness


def model(backend: str, **options) -> tuple[GatedRJCAFused, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = tuple(torch.randn(3, 9, d_m, generator=generator, dtype=torch.float64) for d_m in (6, 4))
    module = GatedRJCAFused(6, 4, 9, backend=backend, dtype=torch.float64, **options)
    return module, x


@mark.parametrize("backend", BACKENDS)
def test_evaluation_has_no_dropout_and_draws_nothing(backend):
    module, x = model(backend, dropout=0.6)
    before = torch.get_rng_state()
    a, b = module.eval()(*x), module(*x)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    module.dropout = 0.0
    torch.testing.assert_close(a, module.train()(*x), rtol=0, atol=0)
    assert torch.equal(before, torch.get_rng_state())


@mark.parametrize("backend", BACKENDS)
def test_training_drops_by_pytorchs_generator(backend):
    module, x = model(backend, dropout=0.6)
    torch.manual_seed(3)
    first, second = module(*x), module(*x)
    torch.manual_seed(3)
    torch.testing.assert_close(module(*x), first, rtol=0, atol=0)
    torch.testing.assert_close(module(*x), second, rtol=0, atol=0)
    assert not torch.equal(first[0], second[0])


def test_all_backends_drop_the_same():
    results = []
    for backend in BACKENDS:
        torch.manual_seed(1)  # also of the weights
        module, x = model(backend, dropout=0.6, gating="hierarchical")
        with torch.no_grad():
            results.append(Result(dict(zip("va", module(*x), strict=True)), {}))
    for result in results[1:]:
        check_float64(result, results[0])


def test_a_seed_of_any_sign_and_form(function):
    inputs = make(EVERYTHING)
    of = partial(call, function, EVERYTHING, inputs)
    for seed in (0, 1, SEED, 2**63, 2**64 - 1):
        word = seed - 2**64 if seed >= 2**63 else seed
        assert_same(of(seed=seed), of(seed=torch.tensor(word)))
        assert_same(of(seed=seed), of(seed=torch.tensor([word])))
    assert_same(of(seed=-1), of(seed=2**64 - 1))
    assert not torch.equal(of(seed=0)["Y[0]"], of(seed=1)["Y[0]"])


@mark.parametrize("reentrant", [False, True])
@mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend, reentrant):
    module, x = model(backend, dropout=0.6)
    gradients = []
    for wrapped in (False, True):
        module.zero_grad()
        torch.manual_seed(5)
        leaves = [tensor.clone().requires_grad_() for tensor in x]
        outputs = checkpoint(module, *leaves, use_reentrant=reentrant) if wrapped else module(*leaves)
        torch.rand(1)  # the generator moves on before the backward
        torch.autograd.backward(outputs, cotangents(outputs))
        gradients.append([leaf.grad for leaf in leaves] + [parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


# ---- any size


@mark.parametrize("case", [case for case in CASES if case.batch == 0], ids=str)
def test_an_empty_batch(function, case):
    result = run(function, case, make(case))
    for name, value in result.values.items():
        assert value.numel() == 0 and value.shape[-3] == 0, name
    for name, gradient in result.gradients.items():
        assert not gradient.any(), name


@needs_native
@mark.parametrize("gating", problems.GATINGS)
@mark.parametrize("iterations", range(1, problems.MAX_ITERATIONS + 1))
def test_any_number_of_iterations(gating, iterations):
    case = Case("iterations", 2, 3, (2, 3), iterations, gating)
    inputs = make(case)
    check_float64(*(run(partial(gated_rjca, backend=backend), case, inputs) for backend in ("cpu", "reference")))
