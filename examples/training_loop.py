"""The fused block in a model and a training loop of your own, without the package grjca.

    python examples/training_loop.py [STEPS]

Two recurrent encoders, the block, and a head that predicts valence for every frame; the loss is 1 - CCC. The data are
drawn here: face and voice each see the target through noise, and now and then one of them sees nothing of it.
"""

import sys

import torch
from torch import Tensor, nn

from grjca_kernels import GatedRJCAFused

LENGTH, BATCH = 100, 16


class Model(nn.Module):
    """Features of face [B, L, 20] and voice [B, L, 12] -> valence [B, L]."""

    def __init__(self) -> None:
        super().__init__()
        self.face = nn.GRU(20, 32, batch_first=True)
        self.voice = nn.GRU(12, 16, batch_first=True)
        self.fusion = GatedRJCAFused(32, 16, LENGTH, gating="hierarchical", output="concat", dropout=0.1)
        self.head = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 1), nn.Tanh())

    def forward(self, face: Tensor, voice: Tensor) -> Tensor:
        """Predict every frame."""
        return self.head(self.fusion(self.face(face)[0], self.voice(voice)[0])).squeeze(-1)


def ccc(x: Tensor, y: Tensor) -> Tensor:
    """The concordance correlation coefficient of all frames (Lin, 1989)."""
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    return 2 * covariance / (x.var(correction=0) + y.var(correction=0) + (x.mean() - y.mean()).square())


def draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a batch: a smooth target, and what face and voice show of it."""
    steps = torch.randn(BATCH, LENGTH, generator=generator).cumsum(dim=1)
    target = torch.tanh(steps / 5)
    features = []
    for width in (20, 12):
        seen = torch.rand(BATCH, LENGTH // 10, 1, generator=generator).gt(0.3).repeat_interleave(10, dim=1)
        noise = torch.randn(BATCH, LENGTH, width, generator=generator)
        features.append(target[..., None] * seen * torch.linspace(-1, 1, width) + 0.3 * noise)
    return features[0], features[1], target


def main(steps: str = "60") -> float:
    """Train, and return the CCC on data that the model has not seen."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(int(steps)):
        face, voice, target = (x.to(device) for x in draw(generator))
        loss = 1 - ccc(model(face, voice), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        face, voice, target = (x.to(device) for x in draw(generator))
        result = float(ccc(model(face, voice), target))
    print(f"CCC of a new batch: {result:.2f}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
