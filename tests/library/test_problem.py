"""Every refusal: ValueError or TypeError that names the argument, what was expected and what came."""

import math

import pytest
import torch
from pytest import mark, param
from torch import Tensor

import grjca_kernels
from assertions import refused
from cases import BACKENDS, Case, describe, make
from grjca_kernels import GatedRJCAFused, Layer, Linear, reference
from grjca_kernels import problem as problems

CASE = Case("legal", 2, 4, (5, 3), 2, "flat")
ENTRIES = {"gated_rjca": grjca_kernels.gated_rjca, "reference.gated_rjca": reference.gated_rjca}


def legal(case: Case = CASE) -> dict:
    """Arguments of gated_rjca by name."""
    inputs = make(case, torch.float32)
    layers, gates = list(inputs.layers), [list(gate) for gate in inputs.gates]
    return {"features": inputs.features, "layers": layers, "gates": gates, "lengths": inputs.lengths, **case.options}


def edited(linear: Linear, weight=None, bias=None) -> Linear:
    return Linear(
        linear.weight if weight is None else weight(linear.weight), linear.bias if bias is None else bias(linear.bias)
    )


def edit_layer(arguments: dict, group: str, change, t: int = 1, m: int = 1) -> None:
    layer = arguments["layers"][t]
    if group == "query":
        arguments["layers"][t] = layer._replace(query=change(layer.query))
    else:
        linears = list(getattr(layer, group))
        linears[m] = change(linears[m])
        arguments["layers"][t] = layer._replace(**{group: tuple(linears)})


@pytest.fixture(autouse=True, scope="module")
def a_legal_call_came_before():
    """What is like it is not checked again, so every refusal below is of a call that only seems to be."""
    for form in problems.FORMS:
        arguments = legal(Case("legal", 2, 4, (5, 3), 2, "flat", form, lengths=(4, 2)))
        for lengths in (None, arguments.pop("lengths")):
            grjca_kernels.gated_rjca(**arguments, lengths=lengths)


# ---- features

FEATURES = [
    param(lambda x: x[0], 2, ValueError, "3 dimensions", "2", id="rank 2"),
    param(lambda x: x[None], 2, ValueError, "3 dimensions", "4", id="rank 4"),
    param(lambda x: x[:, :0], 1, ValueError, "L >= 1", "[2, 0, 5]", id="no frames"),
    param(lambda x: x[..., :0], 1, ValueError, "d >= 1", "[2, 4, 0]", id="no width"),
    param(lambda x: x[:1], 2, ValueError, "[2, 4]", "[1, 4]", id="batch"),
    param(lambda x: x[:, :3], 2, ValueError, "[2, 4]", "[2, 3]", id="length"),
    param(lambda x: x.int(), 1, TypeError, "torch.float32", "torch.int32", id="integers"),
    param(lambda x: x.cfloat(), 1, TypeError, "torch.float32", "torch.complex64", id="complex"),
    param(lambda x: x.double(), 2, TypeError, "torch.float32", "torch.float64", id="another dtype"),
    param(lambda x: x.half(), 2, TypeError, "torch.float32", "torch.float16", id="half"),
    param(lambda x: x.to("meta"), 2, ValueError, "cpu", "meta", id="another device"),
    param(lambda x: x.to("meta"), 1, ValueError, "meta", "cpu", id="another device first"),
    param(lambda x: x.numpy(), 1, TypeError, "a tensor", "ndarray", id="numpy"),
    param(lambda x: x.tolist(), 2, TypeError, "a tensor", "list", id="list"),
    param(lambda x: None, 2, TypeError, "a tensor", "NoneType", id="None"),
    param(lambda x: x.to_sparse(), 1, TypeError, "dense", "sparse", id="sparse"),
    param(
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), 1, TypeError, "dense", "jagged", id="jagged"
    ),
    param(lambda x: torch.nested.nested_tensor(list(x)), 2, TypeError, "dense", "nested", id="nested"),
]


@mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@mark.parametrize("change, position, error, expected, came", FEATURES)
def test_a_bad_feature(entry, change, position, error, expected, came):
    arguments = legal()
    arguments["features"][position - 1] = change(arguments["features"][position - 1])
    name = "audio" if came == "cpu" else ("visual", "audio")[position - 1]  # the second is said to differ
    refused(error, name, lambda: entry(**arguments), expected, came)


def test_features_of_three_modalities_are_named_by_number():
    arguments = legal(Case("three", widths=(2, 3, 4)))
    arguments["features"][2] = arguments["features"][2][0]
    refused(ValueError, "features[2]", lambda: grjca_kernels.gated_rjca(**arguments))


@mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@mark.parametrize(
    "features, error, came",
    [
        (lambda x: x[:1], ValueError, "1"),
        (lambda x: x[:1] * 5, ValueError, "5"),
        (lambda x: x[:0], ValueError, "0"),
        (lambda x: x[0], TypeError, "Tensor"),
        (lambda x: None, TypeError, "NoneType"),
        (lambda x: iter(x), TypeError, "iterator"),
    ],
    ids=["one", "five", "none", "a tensor", "None", "an iterator"],
)
def test_a_bad_collection_of_features(entry, features, error, came):
    arguments = legal()
    arguments["features"] = features(arguments["features"])
    refused(error, "features", lambda: entry(**arguments), came)


@mark.parametrize("changed, name", [("visual", "layers[0].query.weight"), ("audio", "layers[0].query.weight")])
def test_a_width_that_the_weights_do_not_have(changed, name):
    arguments = legal()
    m = ("visual", "audio").index(changed)
    arguments["features"][m] = torch.randn(2, 4, 6)
    refused(ValueError, name, lambda: grjca_kernels.gated_rjca(**arguments), "expected shape", "got [8, 8]")


def test_a_length_that_the_weights_do_not_have():
    arguments = legal()
    arguments["features"] = [torch.randn(2, 6, 5), torch.randn(2, 6, 3)]
    refused(ValueError, "layers[0].key[0].weight", lambda: grjca_kernels.gated_rjca(**arguments), "[6, 6]", "[4, 4]")


# ---- parameters


@mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@mark.parametrize("group", ["query", "key", "value", "output"])
@mark.parametrize(
    "change, error, suffix",
    [
        (lambda x: edited(x, weight=lambda w: w[:-1]), ValueError, ".weight"),
        (lambda x: edited(x, weight=lambda w: w[None]), ValueError, ".weight"),
        (lambda x: edited(x, weight=lambda w: w.double()), TypeError, ".weight"),
        (lambda x: edited(x, weight=lambda w: w.to("meta")), ValueError, ".weight"),
        (lambda x: edited(x, weight=lambda w: w.tolist()), TypeError, ".weight"),
        (lambda x: edited(x, bias=lambda b: b[:-1]), ValueError, ".bias"),
        (lambda x: edited(x, bias=lambda b: b.half()), TypeError, ".bias"),
        (lambda x: edited(x, bias=lambda b: 0.0), TypeError, ".bias"),
        (lambda x: Linear(x.weight), TypeError, ".bias"),
        (lambda x: x.weight, TypeError, ""),
        (lambda x: (x.weight, x.bias, None), TypeError, ""),
    ],
    ids=[
        "weight: shape", "weight: rank", "weight: dtype", "weight: device", "weight: list",
        "bias: shape", "bias: dtype", "bias: number", "bias: absent", "a tensor", "three things",
    ],
)  # fmt: skip
def test_a_bad_parameter(entry, group, change, error, suffix):
    arguments = legal()
    edit_layer(arguments, group, change)
    name = f"layers[1].{group}{'' if group == 'query' else '[1]'}{suffix}"
    refused(error, name, lambda: entry(**arguments))


def set_gate(change):
    return lambda gates: gates[1].__setitem__(0, change(gates[1][0]))


BAD_GATES = [
    param(set_gate(lambda gate: edited(gate, weight=lambda w: w[:-1])), ValueError, "gates[1][0].weight", id="weight"),
    param(set_gate(lambda gate: edited(gate, bias=lambda b: b[:-1])), ValueError, "gates[1][0].bias", id="bias"),
    param(set_gate(lambda gate: None), TypeError, "gates[1][0]", id="no linear"),
    param(lambda gates: gates[1].append(gates[1][0]), ValueError, "gates[1]", id="too many"),
    param(lambda gates: gates[0].clear(), ValueError, "gates[0]", id="too few"),
    param(lambda gates: gates.pop(), ValueError, "gates", id="one modality"),
    param(lambda gates: gates.clear(), ValueError, "gates", id="none"),
    param(lambda gates: gates.__setitem__(0, None), TypeError, "gates[0]", id="None"),
]


@mark.parametrize("autocast", [False, True])
@mark.parametrize("change, error, name", BAD_GATES)
def test_bad_gates(autocast, change, error, name):
    arguments = legal()
    change(arguments["gates"])
    with torch.autocast("cpu", enabled=autocast):
        refused(error, name, lambda: grjca_kernels.gated_rjca(**arguments))


@mark.parametrize("autocast", [False, True])
def test_gates_that_are_not_a_sequence(autocast):
    with torch.autocast("cpu", enabled=autocast):
        refused(TypeError, "gates", lambda: grjca_kernels.gated_rjca(**{**legal(), "gates": None}), "NoneType")


def test_gates_where_there_are_none():
    refused(ValueError, "gates[0]", lambda: grjca_kernels.gated_rjca(**{**legal(), "gating": "none"}), "0 gates", "1")


BAD_LAYERS = [
    param(lambda layers: [], (TypeError, ValueError), "layers", id="none"),
    param(lambda layers: None, TypeError, "layers", id="None"),
    param(lambda layers: layers[0].query, TypeError, "layers[0]", id="a linear"),
    param(lambda layers: [layers[0], None], TypeError, "layers[1]", id="no layer"),
    param(lambda layers: layers * 2, ValueError, "layers", id="four"),
    param(lambda layers: [layers[0]._replace(query=None), layers[1]], TypeError, "layers[0].query", id="no query"),
    param(
        lambda layers: [layers[0], layers[1]._replace(key=layers[1].key[:1])], ValueError, "layers[1].key", id="one key"
    ),
    param(
        lambda layers: [layers[0]._replace(value=None)] * 2, (TypeError, ValueError), "layers[0].value", id="no value"
    ),
    param(lambda layers: [layers[0]._replace(value=(None, None))] * 2, TypeError, "layers[0].value[0]", id="no linear"),
]


@mark.parametrize("autocast", [False, True])
@mark.parametrize("layers, error, name", BAD_LAYERS)
def test_bad_layers(autocast, layers, error, name):
    arguments = legal()
    arguments["layers"] = layers(arguments["layers"])
    with torch.autocast("cpu", enabled=autocast):
        refused(error, name, lambda: grjca_kernels.gated_rjca(**arguments))


def test_the_paper_form_has_neither_query_nor_biases():
    released, paper = legal(), legal(Case("paper", 2, 4, (5, 3), form="paper"))
    query, biased = released["layers"][0].query, released["layers"][0].value
    with_query = {**paper, "layers": [layer._replace(query=query) for layer in paper["layers"]]}
    refused(ValueError, "layers[0].query", lambda: grjca_kernels.gated_rjca(**with_query), "None", "Linear")
    with_bias = {**paper, "layers": [layer._replace(value=biased) for layer in paper["layers"]]}
    refused(ValueError, "layers[0].value[0].bias", lambda: grjca_kernels.gated_rjca(**with_bias), "None", "a tensor")


# ---- options

OPTIONS = [
    ("iterations", 0, ValueError),
    ("iterations", 17, ValueError),
    ("iterations", -1, ValueError),
    ("iterations", True, TypeError),
    ("iterations", 2.0, TypeError),
    ("iterations", "2", TypeError),
    ("gating", "gated", ValueError),
    ("gating", "Flat", ValueError),
    ("gating", None, TypeError),
    ("gating", 1, TypeError),
    ("form", "draft", ValueError),
    ("form", None, TypeError),
    ("dropout", 1, ValueError),
    ("dropout", 1.0, ValueError),
    ("dropout", 1.5, ValueError),
    ("dropout", -0.1, ValueError),
    ("dropout", math.nan, ValueError),
    ("dropout", "half", TypeError),
    ("dropout", None, TypeError),
    ("dropout", True, TypeError),
    ("temperature", 0, ValueError),
    ("temperature", -0.1, ValueError),
    ("temperature", math.inf, ValueError),
    ("temperature", math.nan, ValueError),
    ("temperature", None, TypeError),
    ("temperature", "cold", TypeError),
]
LABELS = [f"{name}={value!r}" for name, value, _ in OPTIONS]


@mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@mark.parametrize("name, value, error", OPTIONS, ids=LABELS)
def test_a_bad_option(entry, name, value, error):
    if (name, value) == ("iterations", None):
        return
    refused(error, name, lambda: entry(**{**legal(), name: value}), repr(value))


@mark.parametrize("name, value, error", OPTIONS, ids=LABELS)
def test_a_bad_option_of_the_module(name, value, error):
    refused(error, name, lambda: GatedRJCAFused(5, 3, 4, **{name: value}), repr(value))


@mark.parametrize("backend, error", [("gpu", ValueError), ("", ValueError), (3, TypeError)])
def test_an_unknown_backend(backend, error):
    calls = (
        lambda: grjca_kernels.gated_rjca(**legal(), backend=backend),
        lambda: GatedRJCAFused(5, 3, 4, backend=backend),
    )
    for call in calls:
        refused(error, "backend", call, "'cpu'", repr(backend))


@mark.parametrize("output, error", [("tuple", ValueError), (None, TypeError)])
def test_an_unknown_output(output, error):
    refused(error, "output", lambda: GatedRJCAFused(5, 3, 4, output=output), "'concat'", repr(output))


@mark.parametrize("position, name", [(0, "dim_visual"), (1, "dim_audio"), (2, "length")])
@mark.parametrize(
    "size, error", [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)]
)
def test_a_bad_size(position, name, size, error):
    sizes = [5, 3, 4]
    sizes[position] = size
    refused(error, name, lambda: GatedRJCAFused(*sizes), repr(size))


def test_a_bad_dtype_of_the_module():
    refused(TypeError, "dtype", lambda: GatedRJCAFused(5, 3, 4, dtype=torch.int64), "torch.float32", "torch.int64")


# ---- lengths and seed


@mark.parametrize("backend", BACKENDS)
@mark.parametrize(
    "lengths, error, parts",
    [
        (torch.tensor([4, 5]), ValueError, ("L = 4", "5")),
        (torch.tensor([-1, 4]), ValueError, ("0", "-1")),
        (torch.tensor([4, 2**40]), ValueError, ("L = 4", str(2**40))),
        (torch.tensor([4, 200], dtype=torch.uint8), ValueError, ("L = 4", "200")),
        (torch.tensor([4.0, 2.0]), TypeError, ("integer", "torch.float32")),
        (torch.tensor([True, False]), TypeError, ("integer", "torch.bool")),
        (torch.tensor([1j, 2]), TypeError, ("integer", "torch.complex64")),
        (torch.tensor([4]), ValueError, ("[2]", "[1]")),
        (torch.tensor([4, 4, 4]), ValueError, ("[2]", "[3]")),
        (torch.tensor([[4], [4]]), ValueError, ("[2]", "[2, 1]")),
        (torch.tensor(4), ValueError, ("[2]", "[]")),
        ([4, 4], TypeError, ("tensor", "list")),
        (4, TypeError, ("tensor", "int")),
        (torch.tensor([4, 4], device="meta"), ValueError, ("cpu", "meta")),
    ],
    ids=str,
)
def test_bad_lengths(backend, lengths, error, parts):
    refused(
        error, "lengths", lambda: grjca_kernels.gated_rjca(**{**legal(), "lengths": lengths}, backend=backend), *parts
    )


@mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_lengths_of_any_integer_dtype(dtype):
    lengths = torch.tensor([4, 2], dtype=dtype)
    y, _ = grjca_kernels.gated_rjca(**{**legal(), "lengths": lengths})
    assert not y[1, 2:].any()


@mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@mark.parametrize(
    "seed, error",
    [
        (1.0, TypeError),
        (True, TypeError),
        ("1", TypeError),
        (torch.tensor(1.0), TypeError),
        (torch.tensor(1, dtype=torch.int32), TypeError),
        (torch.tensor([1, 2]), TypeError),
        (torch.tensor(1, device="meta"), ValueError),
    ],
    ids=str,
)
def test_a_bad_seed(entry, seed, error):
    refused(error, "seed", lambda: entry(**{**legal(), "dropout": 0.5, "seed": seed}))


# ---- the module's own inputs


@mark.parametrize("shape, position", [((2, 4, 6), 0), ((2, 4, 4), 1), ((2, 3, 5), 0), ((2, 5, 3), 1)])
def test_a_module_names_the_input_of_a_wrong_shape(shape, position):
    inputs: list[Tensor] = [torch.randn(2, 4, 5), torch.randn(2, 4, 3)]
    inputs[position] = torch.randn(shape)
    expected = f"[B, 4, {(5, 3)[position]}]"
    refused(
        ValueError, ("visual", "audio")[position], lambda: GatedRJCAFused(5, 3, 4)(*inputs), expected, str(list(shape))
    )


def test_a_module_of_another_dtype_says_what_to_do():
    module = GatedRJCAFused(5, 3, 4).double()
    refused(TypeError, "layers[0].query.weight", lambda: module(torch.randn(2, 4, 5), torch.randn(2, 4, 3)), "autocast")


# ---- what is legal


@mark.parametrize("gating", problems.GATINGS)
@mark.parametrize("form", problems.FORMS)
@mark.parametrize("joint", problems.JOINTS)
@mark.parametrize("shared", [False, True])
def test_flatten_and_unflatten_are_inverse(gating, form, joint, shared):
    case = Case("flat", iterations=3, gating=gating, form=form, joint=joint, shared=shared)
    inputs = make(case)
    problem = describe(case, inputs)
    flat = problems.flatten(inputs.layers, inputs.gates)
    assert [list(x.shape) for x in flat] == [list(shape) for _, shape in problems.expected_tensors(problem)]
    layers, gates = problems.unflatten(problem, flat)
    assert all(isinstance(layer, Layer) for layer in layers)
    again = problems.flatten(layers, gates)
    assert len(again) == len(flat) and all(a is b for a, b in zip(again, flat, strict=True))


@mark.parametrize("gating, ways", [("none", ()), ("dynamic", (2,)), ("flat", (4,)), ("hierarchical", (2, 3, 4, 3))])
def test_gate_ways(gating, ways):
    assert problems.gate_ways(gating, 3) == ways


@mark.parametrize("name", ["normalize", "concat", "return_gates", "return_iterates"])
def test_flags_are_bools(name):
    refused(TypeError, name, lambda: grjca_kernels.gated_rjca(**(legal() | {name: "no"})), "'no'")


@mark.parametrize("name", ["normalize", "share_weights"])
def test_flags_of_the_module_are_bools(name):
    refused(TypeError, name, lambda: GatedRJCAFused(3, 2, 4, **{name: 1}), "1")
