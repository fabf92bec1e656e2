"""Load the authors' block from a checkpoint into the fused module, and see that it computes the same, and how fast.

    python examples/swap.py [CHECKPOINT.pth]

CHECKPOINT is the state_dict of a whole model, or of its block alone; without it, the example writes one first. In your
own code, the swap is the one line with ``from_released``. Given a module instead of a state_dict, it also runs a copy
of that module, and refuses what it does not reproduce.
"""

import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch

from grjca_kernels import GatedRJCAFused


def write_checkpoint(path: Path) -> None:
    """Write a checkpoint that has the authors' names and sizes, under the prefix that the block has in their model."""
    block = GatedRJCAFused(256, 128, 300, gating="flat", normalize=True, output="concat")
    torch.save({f"GRJCA.{key}": value for key, value in block.to_released().items()}, path)


def main(checkpoint: str | None = None) -> None:
    """Load the block, compare it with the reference, and time both."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(checkpoint or f"{folder}/best.pth")
        if checkpoint is None:
            write_checkpoint(path)
        weights = torch.load(path, weights_only=True, map_location="cpu")
    fused = GatedRJCAFused.from_released(weights).eval()
    plain = GatedRJCAFused.from_released(weights, backend="reference").eval()
    print(f"{fused.gating} gates, T = {fused.iterations}, L = {fused.length}, widths {fused.dims}")

    features = [torch.randn(4, fused.length, width) for width in fused.dims]
    seconds = {}
    outputs = {}
    with torch.no_grad():
        for name, block in (("plain PyTorch", plain), ("fused", fused)):
            outputs[name] = block(*features)  # the first call allocates
            start = perf_counter()
            for _ in range(5):
                block(*features)
            seconds[name] = (perf_counter() - start) / 5
    difference = max(
        float((a - b).abs().max())
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in outputs.values()), strict=True)
    )
    print(f"largest difference: {difference:.1e}")
    print(", ".join(f"{name}: {1000 * value:.1f} ms" for name, value in seconds.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
