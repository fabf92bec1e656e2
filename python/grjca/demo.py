"""``grjca demo``: one small model, trained with the eager and with the fused block; then the cost of each block."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from tqdm import tqdm

from grjca.eager import GatedRJCAEager
from grjca.losses import ccc_loss
from grjca.measure import SHAPES, Shape, alternate, saved_bytes, threads
from grjca.metrics import ccc
from grjca.model import AudioVisualModel
from grjca.synthetic import Sequences, sequences
from grjca_kernels import GatedRJCAFused, backends

TARGETS = ("valence", "arousal")
BLOCKS: dict[str, type[GatedRJCAFused]] = {"eager": GatedRJCAEager, "fused": GatedRJCAFused}

# The blocks round differently, and training amplifies that a thousandfold (the first steps of Adam follow the sign of a
# gradient, however small). By how much is measured: it is the distance of the eager curve from the same training in
# float64. The distance between eager and fused is another draw of it; of 24 seeds the worst was 2.8 times as large.
ROUNDING_FACTOR = 8
FEW_ULP = 4  # of a loss of 1: below this, distances are the rounding of the loss itself

COST_SHAPES = {"abaw": SHAPES["abaw"], "clip": replace(SHAPES["clip"], batch=16)}  # at B = 64 eager fills 4 GB
COST_DROPOUT = 0.6


@dataclass(frozen=True)
class Settings:
    """Sizes of the training that is compared."""

    train: int = 64
    held_out: int = 32
    length: int = 120
    features: tuple[int, int] = (48, 32)
    widths: tuple[int, int] = (48, 24)
    hidden: int = 32
    batch: int = 16
    epochs: int = 15
    learning_rate: float = 1e-3
    seed: int = 0

    @property
    def steps(self) -> int:
        """Of one training."""
        return self.epochs * (self.train // self.batch)


@dataclass(frozen=True)
class Run:
    """One training of one model."""

    losses: list[float]
    """of every step"""
    held_out: float
    """CCC on sequences not trained on"""


def build(kind: type[GatedRJCAFused], settings: Settings) -> AudioVisualModel:
    """The model around a block of ``kind``; the initial weights depend on the seed alone.

    Without dropout in the fusion: PyTorch's masks and those of the fused block differ, and so would the curves.
    """
    torch.manual_seed(settings.seed)
    shape = Shape(settings.length, *settings.widths, 2, settings.batch, "flat", normalize=True)
    return AudioVisualModel(
        *settings.features, shape.block(kind, dropout=0.0), widths=settings.widths, hidden=settings.hidden
    )


def train(
    model: AudioVisualModel, data: Sequences, target: int, settings: Settings, tick: Callable[[], object]
) -> list[float]:
    """Adam on 1 - CCC of one target; the loss of every step. ``tick`` is called after each."""
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    order = torch.Generator().manual_seed(settings.seed)
    losses = []
    model.train()
    for _ in range(settings.epochs):
        shuffled = torch.randperm(settings.train, generator=order)
        for batch in shuffled[: settings.train // settings.batch * settings.batch].split(settings.batch):
            loss = ccc_loss(model(data.visual[batch], data.audio[batch]), data.labels[batch, :, target])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            tick()
    return losses


def run(
    kind: type[GatedRJCAFused],
    dtype: torch.dtype,
    data: Sequences,
    target: int,
    settings: Settings,
    tick: Callable[[], object] = lambda: None,
) -> Run:
    """Train with a block of ``kind`` in ``dtype``, then score the held-out sequences."""
    data = Sequences(*(tensor.to(dtype) for tensor in data))
    model = build(kind, settings).to(dtype)
    losses = train(model, data.part(0, settings.train), target, settings, tick)
    held_out = data.part(settings.train, settings.train + settings.held_out)
    model.eval()
    with torch.no_grad():
        prediction = model(held_out.visual, held_out.audio)
    return Run(losses, ccc(prediction, held_out.labels[..., target]))


@dataclass(frozen=True)
class Comparison:
    """Eager and fused in float32, and eager in float64, from which the first differs by rounding alone."""

    eager: Run
    fused: Run
    exact: Run

    @property
    def difference(self) -> float:
        """Largest, over the steps, between the losses of eager and fused."""
        return distance(self.eager, self.fused)

    @property
    def tolerance(self) -> float:
        """How far apart rounding can bring them."""
        return ROUNDING_FACTOR * max(distance(self.eager, self.exact), FEW_ULP * torch.finfo(torch.float32).eps)


def distance(a: Run, b: Run) -> float:
    """Largest difference between the losses at any step; NaN if there is one in either."""
    return float((torch.tensor(a.losses).double() - torch.tensor(b.losses).double()).abs().max())


def compare_training(
    settings: Settings,
    target: int,
    tick: Callable[[], object] = lambda: None,
    fused: type[GatedRJCAFused] = GatedRJCAFused,
) -> Comparison:
    """The three trainings of one target, ``3 * settings.steps`` ticks."""
    data = sequences(settings.train + settings.held_out, settings.length, *settings.features, seed=settings.seed)
    with threads(1):  # so small a model gains nothing from more, and on a busy machine they wait for each other
        return Comparison(
            eager=run(GatedRJCAEager, torch.float32, data, target, settings, tick),
            fused=run(fused, torch.float32, data, target, settings, tick),
            exact=run(GatedRJCAEager, torch.float64, data, target, settings, tick),
        )


@dataclass(frozen=True)
class Cost:
    """Of a block at one shape."""

    seconds: float
    """median of forward + backward"""
    saved: int
    """bytes"""


def compare_cost(shape: Shape, repetitions: int) -> dict[str, Cost]:
    """A training step of the fusion block by itself, with dropout, for each of :data:`BLOCKS`."""
    inputs = [shape.inputs(seed, requires_grad=True) for seed in range(2)]
    blocks = {name: shape.block(kind, dropout=COST_DROPOUT) for name, kind in BLOCKS.items()}
    gradient = torch.randn(shape.batch, shape.length, shape.dim_visual + shape.dim_audio)
    turn = 0

    def step(block: GatedRJCAFused) -> None:
        nonlocal turn
        turn += 1
        block(*inputs[turn // len(BLOCKS) % len(inputs)]).backward(gradient)

    times = alternate({name: partial(step, block) for name, block in blocks.items()}, repetitions)
    return {
        name: Cost(statistics.median(times[name]), saved_bytes(partial(block, *inputs[0]), block.parameters()))
        for name, block in blocks.items()
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the sub-command."""
    parser.add_argument(
        "--seed", type=int, default=Settings.seed, help="of data, weights and batches (default %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=positive, default=Settings.epochs, help="of each training (default %(default)s)"
    )
    parser.add_argument(
        "--repetitions", type=positive, default=7, help="of each time that is measured (default %(default)s)"
    )


def positive(text: str) -> int:
    """A count on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}.")
    return int(text)


def main(arguments: argparse.Namespace) -> int:
    """Run the demo; 1 if the curves differ by more than rounding, else 0."""
    settings = Settings(seed=arguments.seed, epochs=arguments.epochs)
    return demonstrate(settings, COST_SHAPES, arguments.repetitions)


def demonstrate(settings: Settings, shapes: dict[str, Shape], repetitions: int) -> int:
    """The demo at any size."""
    reason = backends()["cpu"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, float32")
    if reason:
        print(f"The fused block runs on the slow reference: {reason}")
    with tqdm(total=3 * settings.steps * len(TARGETS) + len(shapes), leave=False, dynamic_ncols=True) as bar:
        comparisons = {}
        for target, name in enumerate(TARGETS):
            bar.set_description(f"training: {name}")
            comparisons[name] = compare_training(settings, target, bar.update)
        costs = {}
        for name, shape in shapes.items():
            bar.set_description(f"measuring: {name}")
            costs[name] = compare_cost(shape, repetitions)
            bar.update()
    print(training_report(comparisons, settings))
    print(cost_report(costs, shapes, repetitions))
    agree = all(c.difference <= c.tolerance for c in comparisons.values())
    print("The two blocks train alike." if agree else "FAILED: the curves differ by more than rounding explains.")
    return 0 if agree else 1


def training_report(comparisons: dict[str, Comparison], settings: Settings) -> str:
    """The curves side by side, how far apart they are, and the scores."""
    lines = [
        "",
        f"Training one model per target on {settings.train} synthetic sequences of {settings.length} frames, "
        f"{settings.steps} steps, with either block.",
        "Dropout is off here: the blocks draw different masks, so that with it the curves could not agree.",
        "",
        "loss, 1 - CCC" + "".join(f"{name:>20}" for name in comparisons),
        "        epoch" + f"{'eager':>12}{'fused':>8}" * len(comparisons),
    ]
    per_epoch = settings.steps // settings.epochs
    curves = [run.losses for c in comparisons.values() for run in (c.eager, c.fused)]
    for epoch in sorted({round(i * (settings.epochs - 1) / 9) for i in range(10)}):
        means = [statistics.mean(losses[epoch * per_epoch : (epoch + 1) * per_epoch]) for losses in curves]
        lines.append(f"{epoch + 1:>13}" + "".join(f"{mean:>{8 + 4 * (i % 2 == 0)}.4f}" for i, mean in enumerate(means)))
    lines += [
        "",
        "CCC of " + f"{settings.held_out} held-out sequences, and the largest difference of the losses at any step:",
    ]
    lines += [
        f"  {name}: eager {c.eager.held_out:.4f}, fused {c.fused.held_out:.4f}; "
        f"curves {c.difference:.1e} apart, rounding explains {c.tolerance:.1e}"
        for name, c in comparisons.items()
    ]
    return "\n".join(lines)


def cost_report(costs: dict[str, dict[str, Cost]], shapes: dict[str, Shape], repetitions: int) -> str:
    """Time and memory of the block, a row per shape."""
    lines = [
        "",
        f"The fusion block alone, forward + backward with dropout {COST_DROPOUT}, median of {repetitions}:",
        "",
        f"{'shape':<32}{'time of a step':^26}{'saved for the backward':^28}",
        f"{'':<32}" + f"{'eager':>9}{'fused':>10}{'':7}" + f"{'eager':>10}{'fused':>10}",
    ]
    for name, cost in costs.items():
        shape, eager, fused = shapes[name], cost["eager"], cost["fused"]
        label = f"{name} {shape.batch} x {shape.length} x ({shape.dim_visual} + {shape.dim_audio})"
        time = f"{eager.seconds * 1e3:>6.0f} ms{fused.seconds * 1e3:>7.0f} ms{eager.seconds / fused.seconds:>6.1f}x"
        memory = f"{eager.saved / 1e6:>7.1f} MB{fused.saved / 1e6:>7.1f} MB{eager.saved / fused.saved:>6.1f}x"
        lines.append(f"{label:<32}{time}{memory}")
    return "\n".join([*lines, ""])
