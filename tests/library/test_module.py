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
from grjca_kernels.backends import TABLE

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
        "joint": "projected",
        "dropout": 0.6,
        "gate_dropout": 0.1,
        "temperature": 0.1,
        "normalize": False,
        "share_weights": False,
        "output": "pair",
        "keep": "auto",
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
    reason = TABLE[name].refusal("cpu", torch.float32)
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


@mark.parametrize("backend", BACKENDS)
@mark.parametrize("gating", [*problems.GATINGS, "temporal", "score"])
def test_another_default_device(backend, gating):
    """Nothing is made there: with the device "meta" whatever is would show."""
    module = GatedRJCAFused(5, 3, 4, gating=gating, normalize=True, dropout=0.3, backend=backend)
    x, lengths = [torch.randn(2, 4, 5), torch.randn(2, 4, 3)], torch.tensor([4, 2])
    found = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        with torch.device(device):
            y = module(*x, lengths)
            found.append(
                [*y, *torch.autograd.grad(sum(of.square().sum() for of in y), module.parameters(), allow_unused=True)]
            )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if b is not None)


@mark.parametrize("gating", ["temporal", "score"])
def test_gates_by_pytorch(gating):
    """Absent frames have no influence, NaN in them included; gates are shares; extras as for other gatings."""
    module = GatedRJCAFused(5, 3, 4, gating=gating, normalize=True, dropout=0.0, dtype=torch.float64).eval()
    lengths = torch.tensor([4, 0, 2])
    x = [torch.randn(3, 4, d_m, dtype=torch.float64) for d_m in (5, 3)]
    broken = [of.clone() for of in x]
    for of in broken:
        of[1] = torch.nan
        of[2, 2:] = torch.inf
    results = []
    for given in (x, broken):
        given = [of.requires_grad_() for of in given]
        *y, extras = module(*given, lengths, return_gates=True, return_iterates=True)
        gradients = torch.autograd.grad(sum(of.square().sum() for of in y), [*given, *module.parameters()])
        results.append([*y, *extras["gates"], *extras["iterates"], *gradients])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and b.isfinite().all()
    assert [of.shape for of in results[0][2:6]] == [(3, 4, 3), (3, 4, 3), (2, 3, 4, 5), (2, 3, 4, 3)]
    present = torch.arange(4) < lengths[:, None]
    torch.testing.assert_close(results[0][2].sum(-1), present.double())
    joined = GatedRJCAFused(
        5, 3, 4, gating=gating, normalize=True, dropout=0.0, dtype=torch.float64, output="concat"
    ).eval()
    joined.load_state_dict(module.state_dict())
    assert torch.equal(joined(*x, lengths), torch.cat(results[0][:2], dim=-1))
    assert [of.shape for of in module(*(of[:0] for of in x))] == [(0, 4, 5), (0, 4, 3)]


@mark.parametrize("backend", BACKENDS)
@mark.parametrize("count", [2, 3, 4])
def test_iterates_as_the_output(backend, count):
    dims = (5, 3, 2, 4)[:count]
    module = GatedRJCAFused(
        dims, length=4, iterations=3, gating="none", joint="raw", output="iterates", backend=backend
    ).eval()
    x = [torch.randn(2, 4, d_m) for d_m in dims]
    lists, extras = module(*x, return_iterates=True)[:-1], module(*x, return_iterates=True)[-1]
    assert [type(of) for of in lists] == [list] * count and [len(of) for of in lists] == [3] * count
    assert all(torch.equal(torch.stack(of), iterates) for of, iterates in zip(lists, extras["iterates"], strict=True))
    module.output = "pair"
    assert all(torch.equal(of[-1], y) for of, y in zip(lists, module(*x), strict=True))


@mark.parametrize("count", [3, 4])
@mark.parametrize("gating", ["none", "hierarchical", "temporal"])
def test_more_modalities(count, gating):
    dims = (5, 3, 2, 4)[:count]
    module = GatedRJCAFused(dims, length=4, gating=gating, dtype=torch.float64).eval()
    x, lengths = [torch.randn(2, 4, d_m, dtype=torch.float64) for d_m in dims], torch.tensor([3, 4])
    y = module(*x, lengths=lengths)
    assert [of.shape for of in y] == [of.shape for of in x] and repr(module).startswith("GatedRJCAFused(")
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(copied, GatedRJCAFused) and all(map(torch.equal, copied(*x, lengths=lengths), y))
    with pytest.raises(TypeError, match=f"features: expected {count} tensors, one per modality, got 2"):
        module(*x[:2])


SIZES = [
    ((4, 3), {}, TypeError, "length: expected a positive int, got None"),
    (([4],), {"length": 3}, ValueError, "dim_visual: expected 2 to 4 widths, got 1"),
    (([4, 0, 2],), {"length": 3}, ValueError, r"dim_visual\[1\]: expected a positive int, got 0"),
    (([4, 2], 3), {"length": 3}, TypeError, r"dim_audio: expected None beside the widths \[4, 2\], got 3"),
    (("43",), {"length": 3}, TypeError, "dim_visual: expected a positive int, got '43'"),
    ((4, 3, 2), {"output": "iterates"}, ValueError, "output: expected 'pair' or 'concat' with gating='flat'"),
    ((4, 3, 2), {"joint": "both"}, ValueError, "joint: expected one of 'projected', 'raw', got 'both'"),
    ((4, 3, 2), {"gate_dropout": 1.0}, ValueError, "gate_dropout: expected a probability"),
]


@mark.parametrize("sizes, options, error, message", SIZES)
def test_what_cannot_be_made(sizes, options, error, message):
    with pytest.raises(error, match=message):
        GatedRJCAFused(*sizes, **options)


@mark.parametrize(
    "shape, advice",
    [
        ((2, 5, 4), r"features stand last: pass visual\.transpose\(1, 2\)"),
        ((2, 4, 6), "dim_visual sets the width when the module is made"),
        ((2, 3, 5), r"pad shorter sequences to L = 4 and pass their true `lengths`"),
        ((2, 9, 5), "cut longer sequences into windows of L = 4 frames"),
    ],
)
def test_what_to_do_about_a_wrong_shape(shape, advice):
    with pytest.raises(ValueError, match=rf"visual: expected shape \[B, 4, 5\], got .*{advice}"):
        GatedRJCAFused(5, 3, 4)(torch.randn(shape), torch.randn(2, 4, 3))
