"""LoRA by peft"""

import copy

import pytest
import torch
from pytest import mark
from torch import nn

from grjca_kernels import GatedRJCAFused
from grjca_kernels.projections import as_linear
from hosts import batches, build, train

peft = pytest.importorskip("peft")
pytestmark = mark.uses("peft")

TARGETS = ["query", "key.visual", "value.audio", "output.visual", "gates.audio.0"]


def host() -> nn.Module:
    model = build("BiLSTM, DCA")
    model.fusion = GatedRJCAFused.from_released(model.fusion, dropout=0.0)
    return model


def adapted(model: nn.Module, **options) -> nn.Module:
    """Give the adapters weights that have an effect, as after a training."""
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, **options)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def outputs(model: nn.Module) -> torch.Tensor:
    video, audio, _ = next(batches(1))
    return model(video, audio)


def test_trained():
    """LoRA on any of its projections and gates: adapters alone are trained, as if each projection were called"""
    model = adapted(host())
    merged = copy.deepcopy(model).merge_and_unload()
    assert not torch.allclose(outputs(model), outputs(host()))
    torch.testing.assert_close(outputs(model), outputs(merged), rtol=1e-10, atol=1e-12)
    for module in model.modules():  # and the same by a call of each wrapped projection
        if hasattr(module, "lora_A"):
            eye = torch.eye(module.in_features, dtype=torch.float64)
            weight, bias = as_linear(module)
            torch.testing.assert_close(eye @ weight.T + bias, module(eye))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = train(model, torch.optim.Adam(model.parameters(), lr=0.05), [*batches(1)] * 15)
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def test_kept(tmp_path):
    """Adapters switched off, merged in place, unmerged, saved and loaded; `to_released` writes the adapted weights"""
    model = adapted(host())
    expected, without = outputs(model), outputs(host())
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model), without, rtol=1e-12, atol=1e-12)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model), expected)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(host(), tmp_path, autocast_adapter_dtype=False).double()
    assert torch.equal(outputs(again), expected)
    again.base_model.model.fusion = GatedRJCAFused.from_released(again.base_model.model.fusion.to_released())
    torch.testing.assert_close(outputs(again.eval()), outputs(model.eval()))


REFUSED = {
    "lora_dropout": ({"lora_dropout": 0.1}, "lora_dropout while training"),
    "dora": ({"use_dora": True}, "DoRA"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
}


@mark.parametrize("options, words", REFUSED.values(), ids=REFUSED)
def test_refused(options, words):
    """What no weight can express is refused with a sentence: LoRA's own dropout in training, DoRA, `lora_bias`"""
    model = adapted(host(), **options)
    with pytest.raises(ValueError, match=rf"LoRA adapter 'default'.*{words}.*merge the adapter"):
        outputs(model)
    merged = model.eval().merge_and_unload()
    assert outputs(merged).isfinite().all()
