"""Every member of the family, swapped: the same weights give the same output, or there is a clear no.

Their modules are those of family.py, written from the equations; what is written in this file on top of them computes
something else.
"""

import copy
import random
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import mark
from torch import Tensor, nn

import family
from cases import BACKENDS, FULL_SIZE, golden, golden_weights
from family import DCA, GRJCA, HGRJCA, TAGF, DCNLayer, load
from grjca_kernels import GatedRJCAFused
from tolerances import check_close, check_draws
from tolerances import length as norm

L, WIDTHS, THREE = 4, (5, 3), (5, 3, 4)
OPTIONS = ("iterations", "gating", "joint", "normalize", "output", "dropout")


def options(iterations=2, gating="none", joint="projected", normalize=False, output="pair", dropout=0.6):
    return dict(zip(OPTIONS, (iterations, gating, joint, normalize, output, dropout), strict=True))


FAMILY = {
    "RJCA": (lambda: DCNLayer(), options()),
    "RJCA, p": (lambda: DCNLayer(p=0.4), options(dropout=0.4)),
    "RJCA, raw J": (lambda: DCNLayer(raw=True), options(joint="raw")),
    "RJCA, lists": (lambda: DCNLayer(lists=True, p=0.0), options(output="iterates", dropout=0.0)),
    "RJCA, T = 16": (lambda: DCNLayer(iterations=16), options(16)),
    "RJCMA": (lambda: DCNLayer(THREE, raw=True, p=0.3), options(joint="raw", dropout=0.3)),
    "RJCMA, projected": (lambda: DCNLayer(THREE), options()),
    "RJCMA, lists": (lambda: DCNLayer(THREE, raw=True, lists=True), options(joint="raw", output="iterates")),
    "DCA": (lambda: DCA(3), options(3, "dynamic", output="concat")),
    "DCA, raw J": (lambda: DCA(3, raw=True), options(3, "dynamic", "raw", output="concat")),
    "DCA, T = 1": (lambda: DCA(1), options(1, "dynamic", output="concat")),
    "GRJCA": (lambda: GRJCA(p=0.3), options(2, "flat", normalize=True, output="concat", dropout=0.3)),
    "GRJCA, raw J": (lambda: GRJCA(raw=True), options(2, "flat", "raw", True, "concat")),
    "GRJCA, T = 1": (lambda: GRJCA(1), options(1, "flat", normalize=True, output="concat")),
    "HGRJCA": (lambda: HGRJCA(3), options(3, "hierarchical", normalize=True, output="concat")),
    "TAGF": (lambda: TAGF(), options(2, "temporal", normalize=True, output="concat")),
    "TAGF, raw J, T = 4": (lambda: TAGF(4, raw=True), options(4, "temporal", "raw", True, "concat")),
    "TAGF, simple gate": (lambda: TAGF(simple=True), options(2, "score", normalize=True, output="concat")),
}
"""What their module is, and what is to be found out of it."""
every = mark.parametrize("name", FAMILY)


def read(module: GatedRJCAFused) -> dict:
    return {name: getattr(module, name) for name in OPTIONS}


def features(dims, dtype=torch.float64, batch=3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, L, d_m, generator=generator, dtype=torch.float64).to(dtype) for d_m in dims]


def tensors(returned) -> list[Tensor]:
    """All that a block returned, one after another."""
    return [returned] if isinstance(returned, Tensor) else [x for of in returned for x in tensors(of)]


class Host(nn.Module):
    """A small model around a block."""

    def __init__(self, block: nn.Module, dims) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(d_m, d_m) for d_m in dims)
        self.GRJCA = block
        self.head = nn.Linear(sum(dims), 1)

    def forward(self, *x: Tensor) -> Tensor:
        found = self.GRJCA(*(encoder(of) for encoder, of in zip(self.encoders, x, strict=True)))
        if isinstance(found, (tuple, list)):
            found = torch.cat([of[-1] + of[0] if isinstance(of, list) else of for of in found], dim=-1)
        return self.head(found)


def dims_of(block: nn.Module) -> tuple[int, ...]:
    return THREE if hasattr(getattr(block, "coattn", block).dcn_layers[0].dense_coattn, "key3_linear") else WIDTHS


def without_dropout(block: nn.Module) -> nn.Module:
    for of in block.modules():
        if isinstance(of, nn.Dropout):
            of.p = 0.0
    return block


# ---- the same


@every
@mark.parametrize("training, keep", [(False, False), (True, True)])
def test_swapped_in_a_host_model(name, training, keep):
    """Outputs, and the gradients of all parameters, block and host."""
    block = without_dropout(FAMILY[name][0]().double())
    theirs = Host(block, dims_of(block)).double().train(training)
    ours = copy.deepcopy(theirs)
    ours.GRJCA = load(ours.GRJCA, keep_parameters=keep)
    assert read(ours.GRJCA) == {**FAMILY[name][1], "dropout": 0.0}
    keys = {parameter.data_ptr(): key for key, parameter in ours.GRJCA.to_released().items()}
    found = []
    for model in (theirs, ours):
        x = [of.requires_grad_() for of in features(dims_of(block))]
        y = model(*x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        found.append(
            [
                y.detach(),
                *(of.grad for of in x),
                *(p.grad for p in (*model.encoders.parameters(), *model.head.parameters())),
            ]
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1, float(b.abs().max())))
    expected = {key: parameter.grad for key, parameter in theirs.GRJCA.named_parameters()}
    for parameter in ours.GRJCA.parameters():
        b = expected[keys[parameter.data_ptr()]]
        b = torch.zeros_like(parameter) if b is None else b
        torch.testing.assert_close(parameter.grad, b, rtol=0, atol=1e-12 * max(1, float(b.abs().max())))


@every
@mark.parametrize("training, dtype", [(False, torch.float32), (True, torch.bfloat16)], ids=str)
def test_what_is_taken_over(name, training, dtype):
    source = FAMILY[name][0]().to(dtype).train(training)
    frozen = [parameter.requires_grad_(i % 3 != 0) for i, parameter in enumerate(source.parameters())][::3]
    for keep in (False, True):
        ours = load(source, keep_parameters=keep)
        assert read(ours) == FAMILY[name][1] and ours.dims == dims_of(source) and ours.length == L
        assert ours.training is training and all(of.training is training for of in ours.modules())
        assert {p.dtype for p in ours.parameters()} == {dtype}
        names = {value.data_ptr(): key for key, value in ours.to_released().items()}
        theirs = dict(source.named_parameters())
        for parameter in ours.parameters():
            assert parameter.requires_grad == theirs[names[parameter.data_ptr()]].requires_grad
    assert frozen


@mark.parametrize("size", [(2, (256, 128), 300), (2, (512, 512), 16)], ids=str)
@mark.sampled(1)
def test_what_is_told_apart_at_full_size(size):
    torch.manual_seed(0)
    for raw in (False, True):
        for kind in (GRJCA, DCA)[:: 1 if raw else -1][:1]:
            assert load(kind(*size, raw=raw)).joint == ("raw" if raw else "projected")


@mark.parametrize("name", ["rjcma", "tagf"])
@mark.parametrize("as_module", [True, False])
@mark.parametrize("backend", BACKENDS)
def test_the_numbers_of_the_authors(name, as_module, backend):
    theirs, weights = golden(name), golden_weights(name)
    block = DCNLayer((24, 16, 12), 20, raw=True) if name == "rjcma" else TAGF(widths=(24, 16), length=20)
    block.double().eval().load_state_dict(weights)
    module = load(block if as_module else weights, backend=backend, output="concat").eval()
    x = [theirs[key].clone().requires_grad_() for key in ("visual", "audio", "text") if key in theirs]
    output = module(*x)
    (output * theirs["cotangent"]).sum().backward()
    check_close("output", output.detach(), theirs["output"])
    for key, of in zip(("visual", "audio", "text"), x, strict=False):
        check_close(f"grad/{key}", of.grad, theirs[f"grad/{key}"])
    released = {value.data_ptr(): key for key, value in module.to_released().items()}
    gradients = {f"grad/{released[p.data_ptr()]}": p.grad for p in module.parameters()}
    assert {*gradients} == {key for key in theirs if key.startswith("grad/")} - {
        f"grad/{key}" for key in ("visual", "audio", "text")
    }
    for key, gradient in gradients.items():
        check_close(key, gradient, theirs[key])


@cache
def full_size(name):
    """Features, what a block makes of them in float32 and in float64, and the block swapped."""
    torch.manual_seed(0)
    case = FULL_SIZE[name]
    block = without_dropout(
        DCNLayer(case.widths, case.length, raw=True)
        if name == "RJCMA"
        else TAGF(2, widths=case.widths, length=case.length)
    )
    x = [torch.randn(2, case.length, d_m) for d_m in case.widths]
    with torch.no_grad():
        truth = copy.deepcopy(block).double()(*(of.double() for of in x))
        return x, tensors(block(*x)), tensors(truth), load(block)


@mark.parametrize("name", ["RJCMA", "TAGF"])
@mark.parametrize("backend", BACKENDS)
@mark.sampled(1)
def test_full_size(name, backend):
    """Blocks as they are trained, in float32, within the error rule: twice what their own module is off by."""
    x, theirs, truth, ours = full_size(name)
    ours.backend = backend
    found = tensors(ours(*x))
    for i, (y, eager, exact) in enumerate(zip(found, theirs, truth, strict=True)):
        check_draws(f"Y[{i}]", y.detach(), exact, [eager], norm)


# ---- back


@every
def test_back_to_their_names(name):
    source = FAMILY[name][0]()
    ours = load(source)
    other = FAMILY[name][0]()
    other.load_state_dict(ours.to_released())
    x = features(ours.dims, torch.float32)
    for a, b in zip(tensors(other.eval()(*x)), tensors(source.eval()(*x)), strict=True):
        assert torch.equal(a, b)
    again = load(other)
    again.load_state_dict(source.state_dict())
    assert all(map(torch.equal, again.state_dict().values(), ours.state_dict().values()))


def test_an_unused_projection_is_written_as_one_that_changes_nothing():
    source = DCNLayer(raw=True).double()
    using = DCNLayer().double().eval()
    using.load_state_dict(load(source).to_released())
    x = features(WIDTHS)
    for a, b in zip(using(*x), source.eval()(*x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ---- from a state_dict


@every
def test_from_a_state_dict(name):
    """What shapes do not tell is that of the authors' code, or an argument."""
    source, found = FAMILY[name]
    source = source().double().eval()
    differing = {"dropout": found["dropout"]}
    if found["joint"] != ("raw" if dims_of(source) == THREE else "projected"):
        differing["joint"] = found["joint"]
    if found["output"] == "iterates":
        differing["output"] = "iterates"
    if found["iterations"] == 1:
        differing["normalize"] = found["normalize"]
    plain = {name: value for name, value in differing.items() if name == "normalize"}
    assert load(source.state_dict(), **plain).dropout == 0.6
    ours = load(source.state_dict(), **differing)
    assert read(ours) == found and ours.training
    x = features(ours.dims)
    for a, b in zip(tensors(ours.eval()(*x)), tensors(source(*x)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_one_iteration_with_two_ways_needs_a_word():
    state = GRJCA(1).state_dict()
    with pytest.raises(ValueError, match=r"normalize: expected True \(GRJCA\) or False \(DCA\).*T = 1"):
        load(state)
    assert load(state, normalize=True).normalize


# ---- something else


class Softmax(family.Attention):
    def forward(self, *x: Tensor) -> list[Tensor]:
        joint = self.query_linear(torch.cat(x, dim=-1))
        keys = [getattr(self, f"key{m}_linear")(of.transpose(1, 2)) for m, of in enumerate(x, 1)]
        values = [getattr(self, f"value{m}_linear")(of) for m, of in enumerate(x, 1)]
        pairs = zip(values, keys, strict=True)
        return [F.relu(torch.tanh(v @ torch.softmax(k @ joint / joint.shape[-1] ** 0.5, dim=-1))) for v, k in pairs]


class Detached(family.Attention):
    """The same output, and another gradient."""

    def forward(self, *x: Tensor) -> list[Tensor]:
        return [of.detach() for of in super().forward(*x)]


def with_attention(kind: type[nn.Module]) -> nn.Module:
    block = DCNLayer()
    for layer in block.dcn_layers:
        layer.dense_coattn = kind(WIDTHS, L, 0.6, False)
    return block


class OtherTemperature(GRJCA):
    def gate(self, name, suffix, x, choices):
        values = torch.softmax(getattr(self, f"{name}_gating_fc_layer{suffix}")(x), dim=-1)
        return F.relu((torch.stack(choices, dim=-1) * values.unsqueeze(-2)).sum(dim=-1))


class NoRelu(GRJCA):
    def gate(self, name, suffix, x, choices):
        values = torch.softmax(getattr(self, f"{name}_gating_fc_layer{suffix}")(x) / 0.1, dim=-1)
        return (torch.stack(choices, dim=-1) * values.unsqueeze(-2)).sum(dim=-1)


class NormalisedOnce(GRJCA):
    def forward(self, visual, audio):
        self.normalize = False
        return super().forward(F.normalize(visual, dim=-1), audio)


class AudioFirst(GRJCA):
    def forward(self, visual, audio):
        return super().forward(visual, audio).roll(3, dims=-1)


class WithInput(DCNLayer):
    def forward(self, *x):
        return tuple([of, *after] for of, after in zip(x, super().forward(*x), strict=True))


class Dict(GRJCA):
    def forward(self, visual, audio):
        return {"fused": super().forward(visual, audio)}


class Transposed(GRJCA):
    def forward(self, visual, audio):
        return super().forward(visual.transpose(1, 2), audio.transpose(1, 2))


OTHERS = {
    "softmax": (lambda: with_attention(Softmax), "differs from GatedRJCAFused by"),
    "detached": (lambda: with_attention(Detached), "differs from GatedRJCAFused by"),
    "another temperature": (OtherTemperature, "differs from GatedRJCAFused by"),
    "no relu": (NoRelu, "differs from GatedRJCAFused by"),
    "one modality normalised": (NormalisedOnce, "differs from GatedRJCAFused by"),
    "audio first": (AudioFirst, "differs from GatedRJCAFused by"),
    "iterates with the input": (lambda: WithInput(lists=True), "differs from GatedRJCAFused by|got"),
    "a dict": (Dict, "got a dict"),
    "features first": (Transposed, "its forward raised"),
}


@mark.parametrize("name", OTHERS)
@mark.parametrize("dtype", [torch.float32], ids=str)
def test_another_computation_is_refused(name, dtype):
    build, part = OTHERS[name]
    source = build().to(dtype)
    with pytest.raises(ValueError, match=f"source: .*(?:{part})") as caught:
        load(source)
    assert "check=False" in str(caught.value)
    assert load(source, check=False).gating in ("none", "flat")


@mark.parametrize("option", [{"normalize": False}, {"joint": "raw"}, {"temperature": 0.5}], ids=str)
def test_an_option_that_is_not_the_block_s_is_refused(option):
    with pytest.raises(ValueError, match="differs from GatedRJCAFused by") as caught:
        load(GRJCA(), **option)
    assert "check=False" in str(caught.value)
    assert load(OtherTemperature(), temperature=1.0).temperature == 1.0


def test_a_projection_that_changes_nothing_yet():
    source = DCNLayer()
    for layer in source.dcn_layers:
        nn.init.eye_(layer.dense_coattn.query_linear.weight)
        nn.init.zeros_(layer.dense_coattn.query_linear.bias)
    assert load(source).joint == "projected"
    for layer in source.dcn_layers:
        layer.dense_coattn.raw = True
    assert load(source).joint == "raw"
    for attention in (layer.dense_coattn for layer in source.dcn_layers):
        weight = attention.query_linear.weight.detach()
        del attention.query_linear.weight
        attention.query_linear.register_buffer("weight", weight)
    assert load(source).joint == "raw"


class NoTanh(family.Attention):
    """The block without its second tanh: near zero the results agree."""

    def forward(self, *x: Tensor) -> list[Tensor]:
        joint = self.query_linear(torch.cat(x, dim=-1))
        found = []
        for m, of in enumerate(x, 1):
            key = getattr(self, f"key{m}_linear")(of.mT)
            correlation = self.drop(torch.tanh(key @ joint / joint.shape[-1] ** 0.5))
            found.append(F.relu(getattr(self, f"value{m}_linear")(of) @ correlation))
        return found


def test_weights_that_hide_a_difference():
    """Small ones, at which tanh is linear; gates that are 0, whose temperature does not show; a relu that is dead."""
    source = with_attention(NoTanh)
    other = OtherTemperature()
    dead = with_attention(Softmax)
    for block in (source, other, dead):
        for name, parameter in block.named_parameters():
            if block is source:
                parameter.data.mul_(1e-3)
            elif "gating" in name or "linears" in name:
                nn.init.zeros_(parameter)
        with pytest.raises(ValueError, match="differs from GatedRJCAFused by"):
            load(block)


def test_no_gradients_are_another_computation():
    class NoGradients(GRJCA):
        forward = torch.no_grad()(GRJCA.forward)

    with pytest.raises(ValueError, match="differs from GatedRJCAFused by"):
        load(NoGradients())


def test_what_is_tied_stays_so():
    source = DCNLayer(iterations=3)
    for i in (1, 2):
        source.dcn_layers[i] = source.dcn_layers[0]
    source.dcn_layers[0].dense_coattn.key2_linear = source.dcn_layers[0].dense_coattn.key1_linear
    ours = load(source)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in source.parameters())
    assert ours.layers[2].key["audio"].weight is ours.layers[0].key["visual"].weight


def test_gates_beside_a_recursion_of_another_name():
    state = {key.replace("coattn.dcn", "attention.dcn"): value for key, value in GRJCA().state_dict().items()}
    with pytest.raises(
        ValueError, match=r"gates beside 'coattn', got 'video_gating_fc_layer\.weight' beside 'attention\.'"
    ):
        load(state)
    assert load(state, prefix="attention.").gating == "none"


def test_weights_of_several_dtypes():
    source = GRJCA()
    source.video_gating_fc_layer.double()
    with pytest.raises(ValueError, match=r"source\['video_gating_fc_layer\.weight'\]: expected torch\.float32 on cpu"):
        load(source)


@mark.parametrize(
    "key", ["audio_gate.weight", "coattn.dcn_layers.0.norm.weight", "scale", "text_temporal_encoder.linear.weight"]
)
def test_a_key_that_may_act_is_refused_by_name_and_first(key):
    state = {**GRJCA().state_dict(), key: torch.ones(2)}
    del state["coattn.dcn_layers.1.linears.0.0.weight"]
    with pytest.raises(ValueError, match=rf"source: .*besides: '{key}'\. .*ignore"):
        load(state)
    state = {**GRJCA().state_dict(), key: torch.ones(2)}
    assert load(state, ignore=[key]).gating == "flat"


def test_a_gate_is_never_dropped():
    state = {**TAGF().state_dict(), **GRJCA().state_dict()}
    with pytest.raises(ValueError, match=r"besides: 'video_gating_fc_layer\.weight'"):
        load(state)


def test_others_that_look_alike_are_refused_by_name():
    state = {"affine_a.weight": torch.ones(2, 2), "W_a.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"'affine_a\.weight' of JCA"):
        load(state)
    state = DCNLayer().state_dict()
    for t in range(2):
        for m, d_m in enumerate(WIDTHS, 1):
            state[f"dcn_layers.{t}.dense_coattn.key{m}_linear.weight"] = torch.ones(d_m, d_m)
            state[f"dcn_layers.{t}.dense_coattn.key{m}_linear.bias"] = torch.ones(d_m)
    with pytest.raises(ValueError, match="MultiFPE"):
        load(state)


# ---- dropout


def test_two_values_of_p_are_refused():
    source = DCNLayer(p=0.3)
    source.dcn_layers[1].dense_coattn.drop.p = 0.4
    with pytest.raises(ValueError, match=r"one dropout for C and U, got 0\.3 in .*, 0\.4 in "):
        load(source)
    assert load(source, dropout=0.35).dropout == 0.35


class Functional(family.Attention):
    """Drops, and no module says so."""

    rate = 0.5

    def forward(self, *x: Tensor) -> list[Tensor]:
        return [F.dropout(of, self.rate, self.training) for of in super().forward(*x)]


def test_a_block_without_dropout_modules():
    source = DCNLayer()
    for layer in source.dcn_layers:
        layer.dense_coattn.drop = nn.Identity()
        layer.linears = nn.ModuleList(nn.Sequential(linear[0], nn.ReLU()) for linear in layer.linears)
    assert load(source).dropout == 0.0
    for layer in source.dcn_layers:
        layer.dense_coattn.__class__ = Functional
    with pytest.raises(ValueError, match="dropout: expected p, which no module of source says"):
        load(source)
    assert load(source, dropout=0.5).dropout == 0.5


class Dropped(GRJCA):
    """Drops its output too, which no attention does."""

    def __init__(self) -> None:
        super().__init__(p=0.0)
        self.drop = nn.Dropout(0.5)

    def forward(self, visual, audio):
        return self.drop(super().forward(visual, audio))


def only_updates() -> nn.Module:
    block = DCNLayer()
    for layer in block.dcn_layers:
        layer.dense_coattn.drop = nn.Identity()
    return block


def by_channel() -> nn.Module:
    block = DCNLayer()
    for layer in block.dcn_layers:
        layer.dense_coattn.drop = nn.Dropout1d(0.6)
    return block


@mark.parametrize("build", [Dropped, only_updates, by_channel])
def test_dropout_elsewhere_is_refused(build):
    with pytest.raises(ValueError, match="dropout: expected a source that drops elements of C and U"):
        load(build())
    assert load(build(), dropout=0.2).dropout == 0.2


def test_a_dropout_that_is_never_called_does_not_count():
    source = DCNLayer(p=0.0)
    source.dcn_layers[0].unused = nn.Dropout(0.6)
    assert load(source).dropout == 0.0


class ByAttribute(family.Attention):
    dropout_p = 0.3

    def forward(self, *x: Tensor) -> list[Tensor]:
        return [F.dropout(of, self.p, self.training) for of in super().forward(*x)]


def test_p_of_an_attribute():
    source = with_attention(ByAttribute)
    for layer in source.dcn_layers:
        layer.dense_coattn.drop.p = 0.0
        layer.dense_coattn.p = 0.3
        for linear in layer.linears:
            linear[2].p = 0.3
    assert load(source).dropout == 0.3


def test_dropout_of_the_temporal_gate():
    assert isinstance(load(TAGF(gate_p=0.3)).gates["audio"][0].dropout, nn.Dropout)
    assert load(TAGF(gate_p=0.3)).gates["audio"][0].dropout.p == 0.3


# ---- running changes nothing


class WithState(GRJCA):
    """Draws from every generator, counts its calls in a buffer, and has a statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, visual, audio):
        torch.rand(1)
        self.calls += 1
        return super().forward(visual, audio)


def test_running_leaves_everything_as_it_was():
    source = WithState()
    source.train()
    source.coattn.eval()
    source.coattn.dcn_layers[0].train()
    modes = [of.training for of in source.modules()]
    for parameter in source.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    state, pythons, numpys = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with torch.inference_mode():
        ours = load(source)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == pythons
    assert (np.random.get_state()[1] == numpys).all()
    assert [of.training for of in source.modules()] == modes and source.calls == 0
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in source.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert load(source).joint == ours.joint


# ---- what our own files say


@mark.parametrize(
    "options",
    [
        {"gating": "flat", "temperature": 0.5},
        {"gating": "temporal", "temperature": 0.5, "normalize": True},
        {"gating": "none", "normalize": True, "joint": "raw"},
        {"gating": "dynamic", "iterations": 1},
    ],
    ids=str,
)
def test_there_and_back(options, tmp_path):
    """What no shape tells stands beside the weights, also in a file."""
    ours = GatedRJCAFused(5, 3, L, **options)
    torch.save(ours.to_released(), tmp_path / "theirs.pt")
    again = load(torch.load(tmp_path / "theirs.pt", weights_only=True), output="pair").eval()
    x = features(WIDTHS, torch.float32)
    assert all(map(torch.equal, again(*x), ours.eval()(*x)))


def test_three_projected_modalities_there_and_back():
    ours = load(DCNLayer(THREE))
    assert load(ours.to_released()).joint == "projected"


def test_the_gate_s_dropout_beside_a_given_one():
    assert load(TAGF(gate_p=0.3), dropout=0.0).gates["visual"][0].dropout.p == 0.3
    assert load(TAGF(gate_p=0.3), gate_dropout=0.2).gates["visual"][0].dropout.p == 0.2
