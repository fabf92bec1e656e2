"""The module: what it takes, what it returns, how it is kept; and the table of backends."""

import copy
import inspect
import io
import pickle
from functools import partial

import pytest
import torch
from pytest import fixture, mark
from torch import nn

import grjca_kernels
from cases import BACKENDS
from grjca_kernels import GatedRJCAFused, backends, cpu, gated_rjca, native, reference
from grjca_kernels import problem as problems

B, L, D_V, D_A, T = 2, 4, 5, 3, 3
build = partial(GatedRJCAFused, D_V, D_A, L, iterations=T)


@fixture
def x():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, L, d_m, generator=generator) for d_m in (D_V, D_A))


def same(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- surface


def test_public_names():
    assert set(grjca_kernels.__all__) >= {"GatedRJCAFused", "gated_rjca", "backends", "reference"}
    assert all(hasattr(grjca_kernels, name) for name in grjca_kernels.__all__)


def test_the_reference_has_the_signature_of_the_functional_form():
    ours, theirs = (inspect.signature(function).parameters for function in (reference.gated_rjca, gated_rjca))
    assert list(ours) == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in ours if name != "backend")


def test_defaults_are_those_of_the_issue():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(GatedRJCAFused).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert defaults == {
        "iterations": 2,
        "gating": "flat",
        "form": "released",
        "dropout": 0.6,
        "temperature": 0.1,
        "normalize": False,
        "share_weights": False,
        "output": "pair",
        "backend": "auto",
        "device": None,
        "dtype": None,
    }


# ---- parameters


@mark.parametrize("share_weights", [False, True])
@mark.parametrize("gating", problems.GATINGS)
@mark.parametrize("form", problems.FORMS)
def test_parameters(form, gating, share_weights):
    module = build(form=form, gating=gating, share_weights=share_weights)
    biases, d = form == "released", D_V + D_A
    layer = d * (d + 1) * biases + sum(
        rows * (columns + biases) for d_m in (D_V, D_A) for rows, columns in ((L, L), (d_m, d_m), (d_m, d))
    )
    ways = sum(problems.gate_ways(gating, T))
    expected = layer * (1 if share_weights else T) + ways * (D_V + D_A + 2 * biases)
    assert sum(parameter.numel() for parameter in module.parameters()) == expected


def test_initial_values_are_the_authors():
    torch.manual_seed(0)
    for name, parameter in build(gating="hierarchical").named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        else:
            bound = (6 / sum(parameter.shape)) ** 0.5  # xavier_uniform
            assert 0.5 * bound < float(parameter.detach().abs().max()) <= bound, name


def test_reset_parameters_draws_again():
    module = build()
    before = copy.deepcopy(module.state_dict())
    module.reset_parameters()
    assert not any(torch.equal(value, before[key]) for key, value in module.state_dict().items() if "weight" in key)


@mark.parametrize("dtype", problems.DTYPES, ids=str)
def test_device_and_dtype(dtype):
    module = build(dtype=dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert {parameter.device.type for parameter in build(device="meta").parameters()} == {"meta"}
    x = torch.randn(B, L, D_V, dtype=dtype), torch.randn(B, L, D_A, dtype=dtype)
    assert all(y.dtype == dtype for y in module(*x))


def test_to_and_half_follow_nn_module(x):
    module = build(dropout=0.0)
    same(module.double().float()(*x), module(*x))
    assert module.bfloat16()(*(tensor.bfloat16() for tensor in x))[0].dtype == torch.bfloat16


# ---- forward


@mark.parametrize("backend", BACKENDS)
@mark.parametrize("gating", problems.GATINGS)
@mark.parametrize("output", ["pair", "concat"])
def test_shapes_of_what_comes_back(backend, gating, output, x):
    module = build(gating=gating, output=output, backend=backend)
    count = 1 if output == "concat" else 2
    plain = module.eval()(*x)
    outputs = [plain] if count == 1 else list(plain)
    assert [list(y.shape) for y in outputs] == ([[B, L, D_V + D_A]] if count == 1 else [[B, L, D_V], [B, L, D_A]])
    for flags in ({"return_gates": True}, {"return_iterates": True}, {"return_gates": True, "return_iterates": True}):
        *same_outputs, extras = module(*x, **flags)
        same(same_outputs, outputs)
        assert set(extras) == {name.removeprefix("return_") for name in flags}
        if "gates" in extras:
            check_gates(gating, extras["gates"])
        if "iterates" in extras:
            assert [list(states.shape) for states in extras["iterates"]] == [[T, B, L, D_V], [T, B, L, D_A]]


def check_gates(gating: str, gates) -> None:
    assert len(gates) == 2
    for of_modality in gates:
        if gating == "none":
            assert of_modality is None
        elif gating == "hierarchical":
            assert [list(gate.shape) for gate in of_modality] == [[B, L, n] for n in (2, 3, 4, 3)]
        else:
            assert list(of_modality.shape) == [B, L, 2 if gating == "dynamic" else T + 1]
    for gate in (leaf for leaf in torch.utils._pytree.tree_leaves(gates) if leaf is not None):
        torch.testing.assert_close(gate.sum(-1), torch.ones(B, L))


def test_concat_is_the_pair_side_by_side(x):
    module = build().eval()
    pair = module(*x)
    module.output = "concat"
    same(module(*x), torch.cat(pair, dim=-1))


def test_the_last_iterate_is_the_output_without_gates(x):
    *outputs, extras = build(gating="none").eval()(*x, return_iterates=True)
    same(outputs, [states[-1] for states in extras["iterates"]])


def test_shared_weights_are_one_set_for_all_iterations(x):
    shared = build(share_weights=True).eval()
    separate = build().eval()
    for t in range(T):
        separate.layers[t].load_state_dict(shared.layers[0].state_dict())
    separate.gates.load_state_dict(shared.gates.state_dict())
    torch.testing.assert_close(shared(*x), separate(*x), rtol=0, atol=0)


def test_lengths_by_position_and_by_name(x):
    module, lengths = build().eval(), torch.tensor([2, 4])
    same(module(*x, lengths), module(*x, lengths=lengths))


def test_the_module_is_the_function(x):
    module = build(normalize=True, gating="hierarchical", temperature=0.3).eval()
    layers, gates = module.parameters_by_role()
    options = {"gating": "hierarchical", "normalize": True, "temperature": 0.3}
    same(module(*x), gated_rjca(x, layers, gates, **options))


# ---- keeping


def test_state_dict_round_trip(x):
    module, other = build(gating="hierarchical").eval(), build(gating="hierarchical").eval()
    assert other.load_state_dict(module.state_dict()) == ([], [])
    same(other(*x), module(*x))
    assert list(module.state_dict()) == [name for name, _ in module.named_parameters()]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: torch.load(saved(module), weights_only=False),
}


def saved(module: nn.Module) -> io.BytesIO:
    memory = io.BytesIO()
    torch.save(module, memory)
    memory.seek(0)
    return memory


@mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies(copied, x):
    module = build(gating="dynamic", output="concat", temperature=0.2).eval()
    other = copied(module)
    same(other(*x), module(*x))
    assert repr(other) == repr(module)
    with torch.no_grad():
        other.layers[0].query.weight.add_(1)
    assert not torch.equal(other(*x), module(*x))


def test_repr_tells_the_settings():
    text = repr(build(gating="hierarchical", temperature=0.25, backend="reference"))
    for part in (
        "5, 3",
        "length=4",
        "iterations=3",
        "gating='hierarchical'",
        "temperature=0.25",
        "backend='reference'",
    ):
        assert part in text


def test_it_learns(x):
    """A few steps of an optimiser lower the loss: parameters and gradients belong together."""
    torch.manual_seed(0)
    module = build(dropout=0.1)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = sum((y - 1).square().mean() for y in module(*x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# ---- backends


def test_the_table_of_backends():
    table = backends()
    assert list(table) == ["cuda", "triton", "cpu", "reference"]
    assert table["reference"] is None
    assert all(reason is None or (isinstance(reason, str) and len(reason) > 20) for reason in table.values())
    assert (table["cpu"] is None) == bool(cpu.instruction_sets())


@mark.parametrize("name", ["cuda", "triton", "cpu"])
def test_a_backend_that_cannot_run_says_why(name, x, monkeypatch):
    reason = backends()[name]
    if reason is None:
        pytest.skip(f"{name} runs here")
    with pytest.raises(RuntimeError) as caught:
        build(backend=name)(*x)
    assert repr(name) in str(caught.value) and reason in str(caught.value) and "auto" in str(caught.value)
    monkeypatch.setenv("GRJCA_BACKEND", name)
    with pytest.raises(RuntimeError) as by_default:
        build()(*x)
    assert reason in str(by_default.value)


def test_without_native_code_the_reference_runs(x, monkeypatch):
    module = build().eval()
    monkeypatch.setattr(native, "library", None)
    monkeypatch.setattr(native, "_exchanges", False)
    monkeypatch.setattr(native, "missing", "the native code is not installed.")
    assert "not installed" in backends()["cpu"] and cpu.instruction_sets() == []
    expected = build(backend="reference").eval()
    expected.load_state_dict(module.state_dict())
    same(module(*x), expected(*x))
    with pytest.raises(RuntimeError, match="not installed"):
        build(backend="cpu")(*x)


def test_the_environment_sets_the_default(x, monkeypatch):
    used = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *arguments: used.append(1) or forward(*arguments))
    module = build().eval()
    monkeypatch.delenv("GRJCA_BACKEND", raising=False)
    module(*x)
    assert bool(used) == ("cpu" not in BACKENDS)
    used.clear()
    monkeypatch.setenv("GRJCA_BACKEND", "reference")
    module(*x)
    assert used
    used.clear()
    monkeypatch.setenv("GRJCA_BACKEND", "")
    module(*x)
    assert bool(used) == ("cpu" not in BACKENDS)
    if "cpu" in BACKENDS:  # what is named counts
        monkeypatch.setenv("GRJCA_BACKEND", "reference")
        module.backend = "cpu"
        module(*x)
        assert not used


def test_an_unknown_backend_in_the_environment_is_named(x, monkeypatch):
    monkeypatch.setenv("GRJCA_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"GRJCA_BACKEND: expected one of .* got 'gpu'"):
        build()(*x)


def test_a_projection_that_is_replaced_is_refused_not_passed_over():
    module = GatedRJCAFused(3, 2, 4)
    module.layers[0].query = torch.nn.Sequential(module.layers[0].query, torch.nn.Linear(5, 5))
    with pytest.raises(TypeError, match=r"expected its projections to be torch\.nn\.Linear, got Sequential"):
        module(torch.randn(2, 4, 3), torch.randn(2, 4, 2))


def test_a_parametrized_projection_is_seen():
    class Half(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    module = GatedRJCAFused(3, 2, 4).eval()
    x = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    halved = copy.deepcopy(module)
    with torch.no_grad():
        halved.layers[1].query.weight /= 2
    torch.nn.utils.parametrize.register_parametrization(module.layers[1].query, "weight", Half())
    for ours, expected in zip(module(*x), halved(*x), strict=True):
        assert torch.equal(ours, expected)
    sum(y.sum() for y in module(*x)).backward()
    assert module.layers[1].query.parametrizations.weight.original.grad is not None
