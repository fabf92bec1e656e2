"""Trainers"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from pytest import mark

from family import D_A, D_V, L
from grjca_kernels import GatedRJCAFused
from hosts import AUDIO, VISUAL, LSTMModel, batches


def host() -> LSTMModel:
    torch.manual_seed(0)
    return LSTMModel(GatedRJCAFused(D_V, D_A, L, normalize=True, output="concat", dropout=0.2))


@mark.uses("accelerate")
@mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision, tmp_path):
    """`accelerate`: prepare, mixed precision, gradient accumulation, clipping, state saved and loaded"""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the test before
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = host()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    data = torch.utils.data.DataLoader([*batches(1, dtype=torch.float32)] * 40, batch_size=None)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    losses = []
    for video, audio, target in data:
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(video, audio), target)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    accelerator.save_state(tmp_path)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path)
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)


@mark.uses("lightning")
@mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_lightning(precision, tmp_path):
    """Lightning: `Trainer.fit`, mixed precision, model summary, checkpoint saved and loaded"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning
        from lightning.pytorch.utilities.model_summary import ModelSummary

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = host()
            self.losses: list[float] = []
            self.example_input_array = (torch.randn(2, L, VISUAL), torch.randn(2, L, AUDIO))

        def forward(self, video, audio):
            return self.model(video, audio)

        def training_step(self, batch, _):
            video, audio, target = batch
            loss = F.mse_loss(self(video, audio), target)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.02)

    task = Task()
    summary = str(ModelSummary(task, max_depth=-1))
    assert "GatedRJCAFused" in summary
    data = torch.utils.data.DataLoader([*batches(1, dtype=torch.float32)] * 30, batch_size=None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, precision=precision, default_root_dir=tmp_path, **quiet
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(task, data)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        again = Task.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert task.losses[-1] < 0.7 * task.losses[0]
    torch.testing.assert_close(again.state_dict(), task.state_dict(), check_dtype=False)


def test_wrapper_subclass_is_refused():
    """Tensor subclasses without memory of their own, as quantised weights: refused with a sentence"""
    two = pytest.importorskip("torch.testing._internal.two_tensor")
    block = GatedRJCAFused(D_V, D_A, L)
    x = [torch.randn(2, L, d_m) for d_m in (D_V, D_A)]
    with pytest.raises(TypeError, match=r"expected plain tensors, got a TwoTensor.*backend='reference'"):
        block(two.TwoTensor(x[0], x[0]), x[1])
