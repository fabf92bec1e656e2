"""Export"""

import inspect
import io
import subprocess
import sys

import pytest
import torch
from pytest import mark
from torch import nn
from torch.export import Dim

from cases import BACKENDS
from family import D_A, D_V, L
from grjca_kernels import GatedRJCAFused
from hosts import AUDIO, VISUAL, LSTMModel

BATCH = {0: Dim("batch", min=2, max=64)}


def block(**options) -> GatedRJCAFused:
    torch.manual_seed(0)
    return GatedRJCAFused(D_V, D_A, L, output="concat", **options).eval()


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, L, D_V), torch.randn(batch, L, D_A)


def test_export(tmp_path):
    """`torch.export`, any batch size, saved and loaded in a new process; the program keeps the fused operator"""
    module, x = block(), inputs()
    program = torch.export.export(module, x, dynamic_shapes=(BATCH, BATCH))
    x = inputs(7)
    expected = module(*x)
    torch.testing.assert_close(program.module()(*x), expected, rtol=0, atol=0)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((x, expected.detach()), tmp_path / "expected.pt")
    code = (
        "import sys, torch, grjca_kernels; program = torch.export.load(sys.argv[1]); x, y = torch.load(sys.argv[2]); "
        "torch.testing.assert_close(program.module()(*x).detach(), y, rtol=0, atol=0); print('same')"
    )
    command = [sys.executable, "-c", code, tmp_path / "program.pt2", tmp_path / "expected.pt"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.strip() == "same", result.stderr
    assert ("grjca.forward" in str(program.graph)) == ("cpu" in BACKENDS)


def test_export_of_training():
    """`torch.export` of a module in training: the exported program has the gradients of the module"""
    module, x = block(dropout=0.0).train(), inputs()
    program = torch.export.export(module, x)
    exported = program.module()
    for function in (module, exported):
        function(*x).square().sum().backward()
    expected = dict(module.named_parameters())
    for name, parameter in exported.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=0)


needs_exporter = mark.skipif(
    "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters, reason="this PyTorch has an older exporter"
)


def run_onnx(program, arguments) -> torch.Tensor:
    import onnx
    import onnxruntime

    memory = io.BytesIO()
    program.save(memory)
    onnx.checker.check_model(memory.getvalue())
    session = onnxruntime.InferenceSession(memory.getvalue(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (y,) = session.run(None, {name: x.numpy() for name, x in zip(names, arguments, strict=True)})
    return torch.from_numpy(y)


@needs_exporter
@mark.uses("onnx", "onnxscript", "onnxruntime")
@mark.parametrize("gating, with_lengths", [("none", True), ("dynamic", False), ("flat", False), ("hierarchical", True)])
@mark.sampled(1)
def test_onnx(gating, with_lengths):
    """ONNX, exported through the reference whatever the backend, any batch size: the same numbers by onnxruntime"""
    module = block(gating=gating, normalize=True)

    def arguments(batch):
        return (*inputs(batch), *([torch.randint(L + 1, (batch,))] if with_lengths else []))

    shapes = tuple({0: Dim("batch")} for _ in arguments(2))
    program = torch.onnx.export(module, arguments(3), dynamo=True, dynamic_shapes=shapes, verbose=False)
    for batch in (3, 8):
        x = arguments(batch)
        torch.testing.assert_close(run_onnx(program, x), module(*x).detach(), rtol=1e-5, atol=1e-5)


@needs_exporter
@mark.uses("onnx", "onnxscript", "onnxruntime")
def test_onnx_of_a_model():
    """ONNX of a whole model: BiLSTMs, the block, a head"""
    model = LSTMModel(block(dropout=0.5)).eval()
    x = torch.randn(3, L, VISUAL), torch.randn(3, L, AUDIO)
    program = torch.onnx.export(model, x, dynamo=True, verbose=False)
    torch.testing.assert_close(run_onnx(program, x), model(*x).detach(), rtol=1e-5, atol=1e-5)


@mark.parametrize("call", [torch.jit.script, lambda module: torch.jit.trace(module, inputs())], ids=["script", "trace"])
@mark.filterwarnings("ignore:.*torch.jit")
def test_jit_is_refused(call):
    """`torch.jit.script` and `trace`: refused with a sentence that names `torch.compile` and `torch.export`"""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fusion = block()

        def forward(self, visual, audio):
            return self.fusion(visual, audio) * 2

    for module in (block(), Model()):
        with pytest.raises(RuntimeError, match=r"torch\.jit can neither script nor trace.*compile.*torch\.export"):
            call(module)
