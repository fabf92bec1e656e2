"""Fuse face, voice and text, with sequences of different lengths in a batch.

python examples/three_modalities.py
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from grjca_kernels import GatedRJCAFused

WIDTHS, LENGTH = {"face": 64, "voice": 32, "text": 48}, 50


def main() -> None:
    """Run a batch forward and backward, and print what each sequence relied on."""
    torch.manual_seed(0)
    fusion = GatedRJCAFused(list(WIDTHS.values()), length=LENGTH, gating="flat", output="concat")
    lengths = torch.tensor([50, 31, 7])
    batch = []
    for width in WIDTHS.values():
        padded = pad_sequence([torch.randn(int(n), width) for n in lengths], batch_first=True)
        batch.append(padded.requires_grad_())

    fused, extras = fusion(*batch, lengths=lengths, return_gates=True)
    print(f"fused: {tuple(fused.shape)}; frames beyond a sequence's length come out as 0")
    for name, gates in zip(WIDTHS, extras["gates"], strict=True):
        shares = torch.stack([of[:n].mean(dim=0) for of, n in zip(gates, lengths, strict=True)])
        rounded = [[round(share, 2) for share in of] for of in shares.tolist()]
        print(f"{name}: mean weights of X^0, X^1 and X^2 per sequence: {rounded}")

    fused.square().sum().backward()
    print("gradients:", {name: tuple(x.grad.shape) for name, x in zip(WIDTHS, batch, strict=True)})


if __name__ == "__main__":
    main()
