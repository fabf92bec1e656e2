"""What is described once and then recognised: never something else, in whatever way it has become that."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest import fixture, mark
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from assertions import refused
from cases import BACKENDS, Case, make
from grjca_kernels import GatedRJCAFused, Linear, gated_rjca, native, reference
from grjca_kernels import call as calls
from grjca_kernels.call import describe

B, L, D_V, D_A = 2, 4, 5, 3
Change = Callable[[GatedRJCAFused], Any]


@fixture(params=["exchange", "methods"], autouse=True)
def how_tensors_are_seen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By DLPack's exchange API, or as with a torch that has none yet; nothing is remembered from before."""
    exchanges = request.param == "exchange"
    if exchanges and not native._exchanges:
        pytest.skip("this torch has no exchange API")
    monkeypatch.setattr(calls, "_legal", {})
    monkeypatch.setattr(native, "_exchanges", exchanges)
    if native.library is not None:
        native.library.use_tensors(Tensor, nn.Parameter, exchanges)
    yield
    monkeypatch.undo()
    if native.library is not None:
        native.library.use_tensors(Tensor, nn.Parameter, native._exchanges)


# ---- the parameters of a module that has been called


def block(**options: Any) -> GatedRJCAFused:
    torch.manual_seed(0)
    return GatedRJCAFused(D_V, D_A, L, dropout=0.0, **options)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(B, L, d_m, generator=generator).to(dtype) for d_m in (D_V, D_A))


def outcome(module: GatedRJCAFused, x: tuple[Tensor, ...]) -> Any:
    """Outputs and gradients, or the error."""
    module.zero_grad()
    try:
        y = module(*x)
        if any(t.requires_grad for t in y):
            sum(t.float().square().sum() for t in y).backward()
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error), str(error)
    return [*y, *(parameter.grad for parameter in module.parameters())]


def anew(module: GatedRJCAFused, x: tuple[Tensor, ...]) -> Any:
    """The same by a module that has gathered nothing, and a memory that holds nothing."""
    module._gathered = None
    calls._legal.clear()
    return outcome(module, x)


def assign(module: GatedRJCAFused) -> None:
    module.layers[1].key["audio"].weight = nn.Parameter(torch.randn(L, L))


def elsewhere(module: GatedRJCAFused) -> None:
    module.layers[0].query.weight = nn.Parameter(torch.empty(D_V + D_A, D_V + D_A, device="meta"))


def another_projection(module: GatedRJCAFused) -> None:
    module.layers[0].value["visual"] = nn.Linear(D_V, D_V)


def another_iteration(module: GatedRJCAFused) -> None:
    module.layers[1] = copy.deepcopy(module.layers[0])


def other_layers(module: GatedRJCAFused) -> None:
    module.layers = copy.deepcopy(module.layers)[::1]
    module.layers[0].query.weight.data.mul_(2)


def tied(module: GatedRJCAFused) -> None:
    module.layers[1].query = module.layers[0].query


def data(change: Callable[[Tensor], Tensor], name: str = "layers.0.query.weight") -> Change:
    def by_data(module: GatedRJCAFused) -> None:
        parameter = module.get_parameter(name)
        parameter.data = change(parameter.data)

    return by_data


def hidden(module: GatedRJCAFused) -> None:
    vars(module.layers[0].query)["weight"] = torch.randn(D_V + D_A, D_V + D_A)


def of_another_class(module: GatedRJCAFused) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module.layers[0].query.__class__ = Doubled


def of_another_module(name: str, entry: str) -> Change:
    """Replaces a dictionary itself, as unpickling and DeepSpeed's ZeRO do."""

    def replace(module: GatedRJCAFused) -> None:
        setattr(module.get_submodule(name), entry, dict(getattr(block().get_submodule(name), entry)))

    return replace


def unpickled_into(module: GatedRJCAFused) -> None:
    module.layers[0].query.__setstate__(nn.Linear(D_V + D_A, D_V + D_A).__dict__)


def stepped(module: GatedRJCAFused) -> None:
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def normed_by_hooks(module: GatedRJCAFused) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(module.layers[0].query).weight_g.data.mul_(2)


def normed(module: GatedRJCAFused) -> None:
    parametrizations.weight_norm(module.layers[0].query).parametrizations.weight.original0.data.mul_(2)


def normed_and_back(module: GatedRJCAFused) -> None:
    normed(module)
    outcome(module, inputs())
    parametrize.remove_parametrizations(module.layers[0].query, "weight")


def pruned(module: GatedRJCAFused) -> None:
    prune.l1_unstructured(module.layers[0].query, "weight", amount=0.5)


def pruned_for_good(module: GatedRJCAFused) -> None:
    pruned(module)
    outcome(module, inputs())
    prune.remove(module.layers[0].query, "weight")


def loaded(assign: bool) -> Change:
    def load(module: GatedRJCAFused) -> None:
        state = {name: value + 1 for name, value in module.state_dict().items()}
        module.load_state_dict(state, assign=assign)

    return load


def swapped(module: GatedRJCAFused) -> None:
    other = nn.Parameter(torch.randn(D_V + D_A, D_V + D_A))
    torch.utils.swap_tensors(module.layers[0].query.weight, other)


def converted_by_swapping(module: GatedRJCAFused) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def freed(module: GatedRJCAFused) -> None:
    module.layers[1].output["audio"].weight.untyped_storage().resize_(0)


def freed_and_filled(module: GatedRJCAFused) -> None:
    weight = module.layers[1].output["audio"].weight
    values, size = weight.detach().clone() * 2, weight.untyped_storage().nbytes()
    weight.untyped_storage().resize_(0)
    outcome(module, inputs())
    weight.untyped_storage().resize_(size)
    weight.data.copy_(values)


CHANGES: dict[str, Change] = {
    "stepped by an optimiser": stepped,
    "another Parameter": assign,
    "another projection": another_projection,
    "another iteration": another_iteration,
    "other layers": other_layers,
    "a projection tied to another": tied,
    "an iteration more": lambda module: module.layers.append(copy.deepcopy(module.layers[0])),
    "a gate more": lambda module: module.gates["audio"].append(nn.Linear(D_A, 3)),
    "a gate less": lambda module: module.gates["audio"].pop(0),
    "a projection replaced by a Sequential": lambda module: setattr(module.layers[0], "query", nn.Sequential()),
    "other data": data(lambda x: x * 2),
    "data of another dtype": data(torch.Tensor.double),
    "data of another shape": data(lambda x: x[:-1].clone()),
    "a part of its own data": data(lambda x: x[:-1]),
    "its own data with another shape": data(lambda x: x.view(4, -1)),
    "its own data transposed": data(lambda x: x.t()),
    "data of other strides": data(lambda x: torch.stack([x, x + 1], dim=-1)[..., 0]),
    "a Parameter on another device": elsewhere,
    "data with a lazy negation": data(torch._neg_view),
    "a bias with a lazy negation": data(torch._neg_view, "gates.audio.0.bias"),
    "transposed in place": lambda module: module.layers[0].query.weight.data.t_(),
    "resized": lambda module: module.layers[0].query.weight.data.resize_(3, 3),
    "set": lambda module: module.layers[0].query.weight.data.set_(torch.randn(7)),
    "double": lambda module: module.double(),
    "half, and bfloat16 in the memory that was float32": lambda module: module.half().bfloat16(),
    "there and back": lambda module: module.half().float(),
    "to the meta device": lambda module: module.to("meta"),
    "to_empty": lambda module: module.to("meta").to_empty(device="cpu").reset_parameters(),
    "swapped": swapped,
    "converted by swapping": converted_by_swapping,
    "freed": freed,
    "freed and filled again": freed_and_filled,
    "hidden by an attribute": hidden,
    "of another class": of_another_class,
    "unpickled into": unpickled_into,
    "other parameters": of_another_module("gates.audio.0", "_parameters"),
    "other projections": of_another_module("layers.1.key", "_modules"),
    "other iterations": of_another_module("layers", "_modules"),
    "other modules": of_another_module("", "_modules"),
    "weight_norm": normed,
    "weight_norm and back": normed_and_back,
    "weight_norm by hooks": normed_by_hooks,
    "pruned": pruned,
    "pruned for good": pruned_for_good,
    "loaded": loaded(assign=False),
    "loaded by assignment": loaded(assign=True),
    "frozen": lambda module: module.requires_grad_(False),
    "partly frozen": lambda module: module.layers[0].requires_grad_(False),
    "another temperature": lambda module: setattr(module, "temperature", 0.5),
    "another gating": lambda module: setattr(module, "gating", "none"),
}


@mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_module_has_become_is_seen(change):
    module = block()
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    for dtype in dtypes:  # all of it is known, and the module goes on as float32
        outcome(module.to(dtype), inputs(dtype))
    outcome(module.to(torch.float32), inputs())
    change(module)
    found = [outcome(module, inputs(dtype)) for dtype in dtypes]
    for dtype, ours in zip(dtypes, found, strict=True):
        expected = anew(module, inputs(dtype))
        assert type(ours) is type(expected), (ours, expected)
        if isinstance(expected, tuple):
            assert ours == expected
        else:
            torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@mark.parametrize("change", ["stepped by an optimiser", "other data", "loaded", "frozen", "half, and bfloat16"])
def test_what_changes_nothing_is_not_gathered_again(change):
    module = block()
    outcome(module, inputs())
    gathered = module._gathered
    assert gathered is not None and gathered.modules is not None
    next(of for name, of in CHANGES.items() if name.startswith(change))(module)
    dtype = module.layers[0].query.weight.dtype
    assert isinstance(outcome(module, inputs(dtype)), list) and module._gathered is gathered


def test_for_the_time_of_a_functional_call():
    module, x = block(), inputs()
    before = module(*x)
    others = {name: parameter.detach() * 2 for name, parameter in module.named_parameters()}
    twice = block()
    twice.load_state_dict(others)
    for given in (others, {name: nn.Parameter(value) for name, value in others.items()}):
        torch.testing.assert_close(torch.func.functional_call(module, given, x), twice(*x), rtol=0, atol=0)
        torch.testing.assert_close(module(*x), before, rtol=0, atol=0)


def replica(module: GatedRJCAFused) -> GatedRJCAFused:
    """As DataParallel makes one: its dictionaries are copies, and its parameters other tensors."""
    modules = {of: of._replicate_for_data_parallel() for of in module.modules()}
    for of, copied in modules.items():
        for name, child in of._modules.items():
            setattr(copied, name, modules[child])
        for name, parameter in of._parameters.items():
            copied._parameters[name] = nn.Parameter(parameter.detach() * 2)
    return modules[module]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "a replica": replica,
}


@mark.filterwarnings("ignore:Calling .zero_grad")
@mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_gathers_for_itself(copied):
    module, x = block(), inputs()
    module(*x)
    other = copied(module)
    assert "_gathered" not in pickle.loads(pickle.dumps(vars(copy.deepcopy(module))))
    with torch.no_grad():
        other.layers[0].query.weight.add_(1)
    ours, theirs = other(*x), module(*x)
    torch.testing.assert_close(ours, tuple(anew(other, x)[:2]), rtol=0, atol=0)
    assert not torch.equal(ours[0], theirs[0])


# ---- calls


CASE = Case("legal", 2, 4, (5, 3), 2, "flat", dropout=0.5)


def arguments() -> dict[str, Any]:
    of = make(CASE, torch.float32)
    return {"features": of.features, "layers": of.layers, "gates": of.gates, **CASE.options}


def test_a_call_that_is_like_one_before_is_not_checked(monkeypatch):
    describe(**arguments())
    monkeypatch.setattr(calls.problems, "check", None)
    assert describe(**arguments()).problem.batch == 2
    batch = {"features": [x[:1] for x in arguments()["features"]]}
    with pytest.raises(TypeError, match="NoneType"):
        describe(**{**arguments(), **batch})


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(calls, "MOST_REMEMBERED", 3)
    given = arguments()
    for batch in range(1, 9):
        features = [x[:1].expand(batch, -1, -1) for x in given["features"]]
        assert describe(**{**given, "features": features}).problem.batch == batch
        assert 1 <= len(calls._legal) <= 3
    before = dict(calls._legal)
    describe(**{**given, "features": features})
    assert calls._legal == before


@mark.parametrize("value", [True, 1.0, "1"], ids=repr)
def test_equal_is_not_alike(value):
    """1 == True == 1.0, and only one of them counts iterations."""
    of = make(Case("one", 2, 4, (5, 3), 1, "flat"), torch.float32)
    given = {"features": of.features, "layers": of.layers, "gates": of.gates}
    assert describe(**given, iterations=1).problem.iterations == 1
    refused(TypeError, "iterations", lambda: describe(**given, iterations=value))
    refused(TypeError, "seed", lambda: describe(**given, iterations=1, seed=value))
    refused(TypeError, "gating", lambda: describe(**given, iterations=1, gating=[value]))


@mark.parametrize("nest", [list, lambda group: list(map(tuple, group)), lambda group: [*map(list, group)]])
def test_nesting_is_looked_at(nest):
    """A Linear may be any tuple of two, and groups may be lists; a list of two is no Linear."""
    given = arguments()
    expected = gated_rjca(**given)
    layer = given["layers"][1]
    given["layers"] = (given["layers"][0], layer._replace(key=nest(layer.key)))
    if isinstance(given["layers"][1].key[0], tuple):
        torch.testing.assert_close(gated_rjca(**given), expected, rtol=0, atol=0)
    else:
        refused(TypeError, "layers[1].key[0]", lambda: gated_rjca(**given))


def test_one_thing_too_many_does_not_make_up_for_one_that_is_missing():
    given = arguments()
    first, second = given["layers"]
    third = Linear(second.key[0].weight, None), (second.key[1].weight, second.key[1].bias, second.key[0].bias)
    given["layers"] = first, second._replace(key=third)
    refused(TypeError, "layers[1].key[1]", lambda: gated_rjca(**given))


def test_lengths_are_copied_when_they_are_checked():
    lengths = torch.tensor([3, 2])
    described = describe(**arguments(), lengths=lengths)
    lengths.fill_(99)
    assert described.lengths.tolist() == [3, 2]


@mark.skipif("cpu" not in BACKENDS, reason="no kernels here")
@mark.parametrize("what", ["features[1]", "parameters[3]", "grad", "iterates", "one that is needed in the backward"])
def test_memory_that_is_not_there_is_not_read(what):
    of = make(CASE, torch.float32).leaves()
    given = {**arguments(), "features": of.features, "layers": of.layers, "gates": of.gates, "backend": "cpu"}
    freed = {"features[1]": of.features[1], "parameters[3]": of.parameters[3]}.get(what)
    if freed is not None:
        freed.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=rf"{what[:-3]}\[\d\]: expected a tensor with memory, got one of shape"):
            gated_rjca(**given)
        return
    y, _, extras = gated_rjca(**given, return_iterates=True)
    gradient = torch.ones_like(y)
    needed = {"grad": gradient, "iterates": extras["iterates"][0]}.get(what, of.parameters[5])
    needed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="expected a tensor with memory, got one of shape"):
        y.backward(gradient)


@mark.skipif("cpu" not in BACKENDS, reason="no kernels here")
def test_a_parameter_that_changes_its_dtype_before_the_backward_is_refused():
    of = make(CASE, torch.float32).leaves()
    y, _ = gated_rjca(of.features, of.layers, of.gates, **CASE.options, backend="cpu")
    of.parameters[4].data = of.parameters[4].data.half()
    with pytest.raises(TypeError, match=r"layers\[0\]\.key\[1\]\.weight: expected dtype torch.float32"):
        y.sum().backward()


@mark.skipif("cpu" not in BACKENDS, reason="no kernels here")
def test_what_hooks_on_saved_tensors_return_is_looked_at():
    of = make(CASE, torch.float32).leaves()
    given = {"layers": of.layers, "gates": of.gates, **CASE.options, "backend": "cpu"}
    for back, error in (
        (lambda x: x[..., :-1], "expected"),
        (torch.Tensor.double, None),
    ):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x, back=back: x if x.dim() < 2 else back(x)):
            y, _ = gated_rjca(of.features, **given)
        with pytest.raises((TypeError, ValueError), match=error):
            y.sum().backward()
        y, _ = gated_rjca(of.features, **given)
        y.sum().backward()  # which is remembered
    with torch.autograd.graph.save_on_cpu():
        y, _ = gated_rjca(of.features, **given)
    y.sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x if x.dim() < 3 else x.mT.contiguous().mT):
        y, _ = gated_rjca(of.features, **given)
    y.sum().backward()
    expected = of.leaves()
    reference.gated_rjca(expected.features, expected.layers, expected.gates, **CASE.options)[0].sum().backward()
    torch.testing.assert_close(of.features[0].grad / 4, expected.features[0].grad)


@mark.skipif("cpu" not in BACKENDS, reason="no kernels here")
def test_gradients_of_another_shape_are_refused_of_a_node_that_is_called_by_hand():
    """Autograd looks at the shapes of gradients; whoever calls a node goes around that."""
    of = make(CASE, torch.float32).leaves()
    y, _ = gated_rjca(of.features, of.layers, of.gates, **CASE.options, keep="least", backend="cpu")
    node, others = y.grad_fn, [None] * 2
    node.apply(torch.ones_like(y), *others)
    with pytest.raises(ValueError, match=r"grads\[0\]: expected \["):
        node.apply(torch.ones(1, 1, 1), *others)
