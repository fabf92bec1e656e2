"""The authors' checkpoints, in and out. Of their modules only the attribute names stand here."""

from collections import OrderedDict

import pytest
import torch
from pytest import mark, param
from torch import nn

from cases import GOLDEN, golden, golden_weights
from family import D_A, D_V, DCA, GRJCA, HGRJCA, D, DCNLayer, L, load
from grjca_kernels import GatedRJCAFused
from tolerances import check_close


class GRJCAWithLeftovers(GRJCA):
    """The block with the further modules that the released files hold."""

    dead = (("text", 7),)

    def __init__(self) -> None:
        super().__init__()
        self.vregressor = nn.Sequential(nn.Linear(D, 2), nn.ReLU(), nn.Linear(2, 1))
        self.aregressor = nn.Sequential(nn.Linear(D, 2), nn.ReLU(), nn.Linear(2, 1))
        self.Joint = nn.LSTM(D, 4, 2)


SOURCES = {
    "GRJCA": (GRJCA, "flat"),
    "HGRJCA": (HGRJCA, "hierarchical"),
    "DCA": (DCA, "dynamic"),
    "DCNLayer": (DCNLayer, "none"),
}


def assert_same_weights(a: GatedRJCAFused, b: GatedRJCAFused) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key


# ---- in


@mark.parametrize("as_module", [True, False])
@mark.parametrize("name", SOURCES)
def test_what_is_read_from_the_shapes(name, as_module):
    cls, gating = SOURCES[name]
    theirs = cls(iterations=3)
    ours = load(theirs if as_module else theirs.state_dict())
    assert (ours.dims, ours.length, ours.iterations, ours.gating) == ((D_V, D_A), L, 3, gating)
    assert ours.form == "released" and ours.dropout == 0.6 and ours.temperature == 0.1 and not ours.share_weights
    assert ours.normalize == (gating in ("flat", "hierarchical"))
    assert ours.output == ("pair" if name == "DCNLayer" else "concat")
    assert ours.layers[2].query.weight.data_ptr() != theirs.state_dict().popitem()[1].data_ptr()


@mark.parametrize("name", SOURCES)
def test_every_weight_stands_in_its_place(name):
    theirs = SOURCES[name][0](iterations=2)
    ours, inner = load(theirs), theirs if name == "DCNLayer" else theirs.coattn
    for t, layer in enumerate(ours.layers):
        attention, linears = inner.dcn_layers[t].dense_coattn, inner.dcn_layers[t].linears
        pairs = [(layer.query, attention.query_linear)]
        for m, modality in enumerate(("visual", "audio")):
            pairs.append((layer.key[modality], getattr(attention, f"key{m + 1}_linear")))
            pairs.append((layer.value[modality], getattr(attention, f"value{m + 1}_linear")))
            pairs.append((layer.output[modality], linears[m][0]))
        for mine, original in pairs:
            assert torch.equal(mine.weight, original.weight) and torch.equal(mine.bias, original.bias)
    if name == "DCNLayer":
        return
    for modality, original in (("visual", "video"), ("audio", "audio")):
        for gate, (suffix, ways) in zip(ours.gates[modality], theirs.ways(2), strict=True):
            assert gate.out_features == ways
            assert torch.equal(gate.weight, getattr(theirs, f"{original}_gating_fc_layer{suffix}").weight)


@mark.parametrize("name", GOLDEN)
@mark.parametrize("prefix", ["", "GRJCA.", "module.HGRJCA.", "model.fusion.block."])
def test_the_authors_weights_under_any_prefix(name, prefix):
    state = {prefix + key: value for key, value in golden_weights(name).items()}
    numbers = golden(name)
    y = load(state).eval()(numbers["visual"], numbers["audio"])
    check_close("output", y.detach(), numbers["output"])


@mark.parametrize("prefix", ["GRJCA.", "module.HGRJCA."])
def test_a_whole_model(prefix):
    theirs = GRJCA()
    state = {f"{prefix}{key}": value for key, value in theirs.state_dict().items()}
    state |= {
        "visual.conv.weight": torch.zeros(3, 3),
        "predictor.weight": torch.zeros(1),
        "audio.bn.num_batches": torch.tensor(3),
    }
    assert_same_weights(load(state), load(theirs))
    assert_same_weights(load(state, prefix=prefix), load(theirs))
    assert_same_weights(load(state, prefix=prefix.removesuffix(".")), load(theirs))


def test_a_whole_model_as_a_module():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(3, 3)
            self.GRJCA = GRJCA(1)

    model = Model()
    ours = load(model)
    assert ours.gating == "flat" and ours.iterations == 1
    assert_same_weights(ours, load(model.GRJCA))


def test_several_blocks_need_a_prefix():
    state = {f"{name}.{key}": value for name in ("first", "second") for key, value in GRJCA().state_dict().items()}
    with pytest.raises(ValueError, match=r"prefix: expected .*'first\.', 'second\.'"):
        load(state)
    assert load(state, prefix="second").gating == "flat"


def test_a_prefix_that_is_not_there():
    with pytest.raises(ValueError, match=r"prefix: expected where a block stands \('GRJCA\.'\), got 'HGRJCA'"):
        load({f"GRJCA.{key}": value for key, value in GRJCA().state_dict().items()}, prefix="HGRJCA")


@mark.parametrize("kind", ["a module", "a state_dict", "a whole model"])
def test_dead_keys_are_named_in_one_warning(kind):
    theirs = GRJCAWithLeftovers()
    prefix = "GRJCA." if kind == "a whole model" else ""
    source = theirs if kind == "a module" else {f"{prefix}{key}": value for key, value in theirs.state_dict().items()}
    with pytest.warns(UserWarning) as caught:
        ours = GatedRJCAFused.from_released(source)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    dead = [key for key in theirs.state_dict() if key.startswith(("text_", "vregressor.", "aregressor.", "Joint."))]
    assert len(dead) >= 12 and all(prefix + key in text for key in dead)
    assert "coattn" not in text and "video_gating" not in text
    plain = GRJCA()
    plain.load_state_dict(theirs.state_dict(), strict=False)
    assert_same_weights(ours, load(plain))


@mark.parametrize("gating, iterations", [("flat", 1), ("dynamic", 1)])
def test_two_ways_at_one_iteration(gating, iterations):
    """The shapes don't tell GRJCA from DCA there; the name does, and what to_released noted."""
    theirs = {"flat": GRJCA, "dynamic": DCA}[gating](iterations)
    ours = load(theirs)
    assert ours.gating == gating and ours.normalize == (gating == "flat")
    assert load(ours.to_released()).gating == gating
    with pytest.raises(ValueError, match=r"normalize: expected True \(GRJCA\) or False \(DCA\)"):
        load(dict(theirs.state_dict()))
    for normalize, read in ((True, "flat"), (False, "dynamic")):
        assert load(dict(theirs.state_dict()), normalize=normalize).gating == read
    assert load({f"GRJCA.{key}": value for key, value in theirs.state_dict().items()}).gating == "flat"


def test_overrides():
    ours = load(GRJCA(), dropout=0.1, temperature=0.5, normalize=False, output="pair", backend="reference", check=False)
    assert (ours.dropout, ours.temperature, ours.normalize) == (0.1, 0.5, False)
    assert (ours.output, ours.backend) == ("pair", "reference")
    assert load(DCA(), normalize=True, check=False).normalize
    assert load(GRJCA(), dtype=torch.float64).layers[0].query.weight.dtype == torch.float64
    assert load(GRJCA(1), gating="dynamic").gating == "dynamic"


def test_the_dtype_of_the_weights_is_kept():
    assert load(GRJCA().bfloat16()).layers[0].query.weight.dtype == torch.bfloat16


# ---- refusals


@mark.parametrize(
    "override, value", [("iterations", 3), ("gating", "hierarchical"), ("form", "paper"), ("share_weights", True)]
)
def test_an_override_that_the_weights_do_not_fit(override, value):
    with pytest.raises(ValueError, match=f"source: .*{override}={value!r}"):
        load(GRJCA(), **{override: value})


@mark.parametrize("override, value", [("length", 5), ("dim_audio", 4)])
def test_a_size_that_the_weights_do_not_have(override, value):
    with pytest.raises(ValueError, match=r"source\['coattn\..*'\]: expected shape .*got"):
        load(GRJCA(), **{override: value})


def test_an_unknown_override():
    with pytest.raises(TypeError, match="heads"):
        load(GRJCA(), heads=8)


FIRST = "dcn_layers.0.dense_coattn.query_linear.weight"  # by which a block is found
KEYS = [
    (name, key) for name in SOURCES for key in SOURCES[name][0](iterations=2).state_dict() if not key.endswith(FIRST)
]


@mark.parametrize("prefix", ["", "model.GRJCA."])
@mark.parametrize("name, key", KEYS)
def test_a_key_that_is_missing_is_named(name, key, prefix):
    state = {
        prefix + other: value for other, value in SOURCES[name][0](iterations=2).state_dict().items() if other != key
    }
    with pytest.raises(ValueError) as caught:
        load(state)
    assert f"'{prefix}{key}'" in str(caught.value)


@mark.parametrize("name", SOURCES)
def test_a_block_that_is_not_found(name):
    state = {
        key: value for key, value in SOURCES[name][0](iterations=2).state_dict().items() if not key.endswith(FIRST)
    }
    with pytest.raises(ValueError, match=rf"source: expected a key that ends in '.*{FIRST}'"):
        load(state)


@mark.parametrize("name, key", KEYS)
def test_a_wrong_shape_is_named(name, key):
    state = dict(SOURCES[name][0](iterations=2).state_dict())
    state[key] = torch.cat([state[key], state[key]])
    with pytest.raises(ValueError) as caught:
        load(state)
    text = str(caught.value)
    assert "source['" in text and "expected" in text and "got" in text
    if "0.dense_coattn.key1" not in key and "0.dense_coattn.value" not in key:  # the sizes are read from those
        assert f"source['{key}']" in text and str(state[key].shape[0]) in text


def test_a_wrong_shape_at_the_first_key_is_named():
    state = dict(GRJCA().state_dict())
    key = "coattn.dcn_layers.0.dense_coattn.query_linear.weight"
    state[key] = state[key][:-1]
    with pytest.raises(
        ValueError, match=r"source\['coattn\.dcn_layers\.0\.dense_coattn\.query_linear\.weight'\]: .*got \[7, 8\]"
    ):
        load(state)


@mark.parametrize("ways", [1, 4])
def test_a_gate_of_a_wrong_number_of_ways(ways):
    state = dict(GRJCA().state_dict())
    state["video_gating_fc_layer.weight"] = torch.zeros(ways, D_V)
    with pytest.raises(ValueError, match=rf"source\['video_gating_fc_layer\.weight'\]: expected .*got {ways}"):
        load(state)


NO_BLOCKS = [
    param(None, TypeError, "NoneType", id="None"),
    param([], TypeError, "list", id="list"),
    param("grjca.pt", TypeError, "str", id="path"),
    param({}, ValueError, "0 keys", id="empty"),
    param({"state_dict": GRJCA().state_dict(), "epoch": 3}, ValueError, "state_dict", id="checkpoint"),
    param(nn.Linear(2, 2), ValueError, "weight", id="other module"),
]


@mark.parametrize("source, error, part", NO_BLOCKS)
def test_what_is_no_block(source, error, part):
    with pytest.raises(error, match="source") as caught:
        load(source)
    assert part in str(caught.value)


@mark.parametrize("value, error, part", [(0.0, TypeError, "float"), (torch.tensor(0.0), ValueError, "2 dimensions")])
def test_a_weight_that_is_no_matrix(value, error, part):
    key = "coattn.dcn_layers.0.dense_coattn.key1_linear.weight"
    with pytest.raises(error, match=part) as caught:
        load({**GRJCA().state_dict(), key: value})
    assert f"source['{key}']" in str(caught.value)


# ---- out


@mark.parametrize("share_weights", [False, True])
@mark.parametrize("iterations", [1, 2, 3, 4])
@mark.parametrize("gating", ["none", "dynamic", "flat", "hierarchical"])
def test_round_trip(gating, iterations, share_weights):
    ours = GatedRJCAFused(D_V, D_A, L, iterations=iterations, gating=gating, share_weights=share_weights)
    again = load(ours.to_released())
    assert (again.gating, again.iterations) == (gating, iterations)
    assert {**again.to_released()}.keys() == ours.to_released().keys()
    for key, value in ours.to_released().items():
        assert torch.equal(value, again.to_released()[key]), key
    if not share_weights:
        assert_same_weights(ours, again)
    x = torch.randn(2, L, D_V), torch.randn(2, L, D_A)
    options = {"normalize": False, "output": "pair"}
    torch.testing.assert_close(load(ours.to_released(), **options).eval()(*x), ours.eval()(*x), rtol=0, atol=0)


@mark.parametrize("name", SOURCES)
def test_their_modules_take_it_back(name):
    theirs, other = SOURCES[name][0](iterations=3), SOURCES[name][0](iterations=3)
    assert other.load_state_dict(load(theirs).to_released()) == ([], [])
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_what_goes_out_is_a_state_dict(tmp_path):
    """to_released shares memory, and its result survives torch.save with weights_only."""
    ours = GatedRJCAFused(D_V, D_A, L)
    state = ours.to_released()
    assert isinstance(state, OrderedDict)
    assert {value.data_ptr() for value in state.values()} == {parameter.data_ptr() for parameter in ours.parameters()}
    torch.save(state, tmp_path / "block.pt")
    assert_same_weights(load(torch.load(tmp_path / "block.pt", weights_only=True)), ours)


def test_the_paper_form_cannot_go_out():
    with pytest.raises(ValueError, match=r"to_released: expected form='released', got form='paper'"):
        GatedRJCAFused(D_V, D_A, L, form="paper").to_released()


# ---- the Parameters themselves, and the authors' names in load_state_dict


@mark.parametrize("name", SOURCES)
def test_parameters_are_kept(name):
    source = SOURCES[name][0]()
    held = {id(parameter) for parameter in source.parameters()}
    module = load(source, keep_parameters=True)
    assert {id(parameter) for parameter in module.parameters()} == held
    assert_same_weights(module, load(source))
    source.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in load(source, keep_parameters=True).parameters())


def test_parameters_that_are_tied_stay_so():
    source = GRJCA()
    source.coattn.dcn_layers[1].linears[0][0].weight = source.coattn.dcn_layers[0].linears[0][0].weight
    module = load(source, keep_parameters=True)
    assert module.layers[0].output["visual"].weight is module.layers[1].output["visual"].weight


@mark.parametrize(
    "source, options, part",
    [
        (lambda: GRJCA().state_dict(), {}, "expected a module as source, got OrderedDict"),
        (GRJCA, {"dtype": torch.float64}, "expected no dtype"),
        (GRJCA, {"device": "meta"}, "expected no device"),
    ],
    ids=["state_dict", "dtype", "device"],
)
def test_parameters_that_cannot_be_kept(source, options, part):
    with pytest.raises(TypeError, match=f"keep_parameters: {part}"):
        load(source(), keep_parameters=True, **options)


def test_a_buffer_is_no_parameter():
    source = GRJCA()
    query = source.coattn.dcn_layers[0].dense_coattn.query_linear
    weight = query.weight.detach()
    del query.weight
    query.register_buffer("weight", weight)
    with pytest.raises(TypeError, match=r"source\.coattn.*query_linear\.weight to be a Parameter"):
        load(source, keep_parameters=True)


@mark.parametrize("name", SOURCES)
def test_load_state_dict_takes_their_names(name):
    source = SOURCES[name][0]()
    module = load(SOURCES[name][0]())
    state = source.state_dict()
    before = list(state)
    assert module.load_state_dict(state) == ([], [])
    assert_same_weights(module, load(source))
    assert list(state) == before  # the caller's own is left alone


def test_load_state_dict_takes_what_has_no_effect_for_nothing():
    module = load(GRJCA())
    assert module.load_state_dict(GRJCAWithLeftovers().state_dict()) == ([], [])
    unknown = {**GRJCA().state_dict(), "coattn.other.weight": torch.zeros(2)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*coattn\.other\.weight"):
        module.load_state_dict(unknown)


def test_load_state_dict_of_another_gating_is_refused():
    with pytest.raises(RuntimeError, match=r"Missing key.*gates\.visual"):
        load(GRJCA()).load_state_dict(HGRJCA().state_dict())
