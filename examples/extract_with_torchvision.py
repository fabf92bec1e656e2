"""Features of faces by a network of torchvision, in the place of IR-50; sound goes through VGGish as always.

    python examples/extract_with_torchvision.py DATA OUT [WEIGHTS.pth]

DATA is what ``grjca prepare`` has written, and OUT becomes a data folder. Train on it by

    grjca train --data OUT --target valence --out RUN --model.modalities "visual:512, audio:128"

WEIGHTS is a state_dict of torchvision's ResNet-18, as https://pytorch.org/vision/stable/models.html offers; without it,
weights are random. The project's tests run this file where torchvision is not installed, as far as the sentence that
says so; the rest has not been run. :func:`grjca.model.extract.extract` is tested with plain functions instead.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from grjca.config import ExtractConfig
from grjca.model.extract import extract

MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def main(data: str, out: str, weights: str | None = None) -> int:
    """Extract, and return the exit code."""
    try:
        from torchvision.models import resnet18
    except ModuleNotFoundError:
        sys.exit("This example needs torchvision, which is not installed: pip install torchvision.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = resnet18()
    if weights is not None:
        network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    network.fc = torch.nn.Identity()
    network.to(device).eval()

    def faces(pictures: Tensor) -> Tensor:
        """uint8 [n, 48, 48, 3] -> [n, 512]."""
        x = (pictures / 255 - MEAN.to(device)) / DEVIATION.to(device)
        return network(torch.nn.functional.interpolate(x.movedim(-1, 1), size=224, mode="bilinear"))

    return extract(ExtractConfig(data=Path(data), out=Path(out), device=device), networks={"visual": faces})


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
