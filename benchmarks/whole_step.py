"""What the fused block gains in a training step of the whole model: ``python -m benchmarks.whole_step``.

A step is what grjca.training.train does with a batch: the authors' model, the CCC loss, backward, Adam. Eager, whose
dropout is PyTorch's own, and fused take turns, each training on. ``marked`` tells how the block is timed within a step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import NamedTuple

import numpy
import torch
from torch import Tensor, nn

from benchmarks import gate
from benchmarks.cases import ROTATED, THREADS, provenance
from benchmarks.row_files import ROOT, Row, file_of, is_known, keep, read, remove, state_of
from grjca import environment
from grjca.config import ModelConfig, TrainConfig
from grjca.measure import saved_bytes
from grjca.model.audiovisual import AudioVisualModel
from grjca.model.eager import GatedRJCAEager
from grjca.training.losses import ccc_loss
from tolerances import check_draws, largest, length

RESULTS = ROOT / "benchmarks" / "results" / "whole_step"
SOURCES = (
    *("grjca_kernels/*.py", "csrc/*.*", "csrc/cpu/*", "setup.py", "python/grjca/*.py", "tests/support/tolerances.py"),
    *(f"benchmarks/{name}.py" for name in ("cases", "gate", "memory", "roofline", "row_files", "whole_step")),
)
"""What a time on a processor depends on: a dirty tree has no commit of its own, so sources are compared as well."""

CONFIG = ModelConfig()
LENGTH = TrainConfig.window
FUSIONS = ("grjca", "hgrjca")
BACKENDS = {"eager": "eager", "fused": "auto"}
PARTS = ("rest_forward", "block_forward", "block_backward", "rest_backward", "optimizer")
SEED = TrainConfig.seed
WARM_UP, FEWEST, MOST = 2, 5, 200  # rounds
GATE_BATCH = 4  # of the check: in float64, and making the reference's masks takes long
RESAMPLES = 10_000


class Batch(NamedTuple):
    """What grjca.training.train gets from its loader."""

    visual: Tensor
    audio: Tensor
    lengths: Tensor
    label: Tensor
    mask: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(*(x.to(dtype) if x.is_floating_point() else x for x in self))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_step", description="Time whole training steps.")
    parser.add_argument("--batch", type=int, default=TrainConfig.batch_size, help="windows of a step (default 12)")
    parser.add_argument("--minutes", type=float, default=4, help="of measuring, all fusions together (default 4)")
    arguments = parser.parse_args(argv)
    if arguments.batch < 1 or not arguments.minutes > 0:
        parser.error("expected --batch of 1 or more and --minutes above 0.")
    torch.set_num_threads(THREADS)
    path, code = file_of(RESULTS, provenance()), 0
    for fusion in FUSIONS:
        place = described(fusion, arguments.batch, arguments.minutes)
        if is_known(read(path), place):
            print(f"{place['row']}: measured already")
            continue
        try:
            measured = measure(fusion, arguments.batch, 60 * arguments.minutes / len(FUSIONS))
        except AssertionError as failure:
            remove(path, place["row"])
            print(f"{place['row']}: no time, for eager and fused differ. {failure}", file=sys.stderr)
            code = 1
        else:
            keep(path, {**place, **measured, **provenance()})
            print(f"{place['row']}: {measured['speedup']:.2f}x")
    if rows := read(path):
        print(table(rows))
    return code


# ---- the step


def described(fusion: str, batch: int, minutes: float) -> Row:
    """What a row is about."""
    model = json.loads(json.dumps(asdict(CONFIG)))  # as it is read back: tuples are lists there
    return {
        "row": f"{fusion} B={batch}",
        "fusion": fusion,
        "batch": batch,
        "length": LENGTH,
        "dim_visual": CONFIG.encoders["visual"][-1],
        "dim_audio": CONFIG.encoders["audio"][-1],
        "dtype": "float32",
        "backend": environment.backend_used("auto", "cpu"),
        "settings": {"minutes": minutes, "model": model},
        "source": source(),
    }


def make_model(fusion: str, implementation: str, *, shared_masks: bool = False) -> AudioVisualModel:
    """The model in training mode, with the weights that SEED gives."""
    torch.manual_seed(SEED)
    model = AudioVisualModel(CONFIG, fusion=fusion, length=LENGTH, backend=BACKENDS[implementation])
    if isinstance(model.fusion, GatedRJCAEager):
        model.fusion.shared_masks = shared_masks  # PyTorch's own dropout is faster: the masks are for the gate alone
    return model.train()


def make_batch(size: int, seed: int) -> Batch:
    """Windows without a gap: random features and labels."""
    generator = torch.Generator().manual_seed(seed)
    visual, audio = (torch.randn(size, LENGTH, width, generator=generator) for width in CONFIG.widths.values())
    label = 2 * torch.rand(size, LENGTH, generator=generator) - 1
    return Batch(visual, audio, torch.full((size,), LENGTH), label, torch.ones(size, LENGTH, dtype=torch.bool))


def loss_of(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    values = model(batch.visual, batch.audio, batch.lengths)
    return values, ccc_loss(values, batch.label, batch.mask)


@contextmanager
def marked(block: nn.Module) -> Iterator[list[float]]:
    """The times at which the block was entered and left, forward and then backward, of one step at a time.

    Four hooks read the clock, and two identities, which copy nothing, hold those of the backward: some microseconds.
    On a processor autograd runs in one thread, what was computed last first. So between the gradient of the block's
    output and those of its inputs, everything of the block and nothing else runs, gradients of its parameters included.
    """
    times: list[float] = []

    def note(*_: object) -> None:
        times.append(time.perf_counter())

    handles = [
        block.register_forward_pre_hook(note),
        block.register_forward_hook(note),
        block.register_full_backward_pre_hook(note),
        block.register_full_backward_hook(note),
    ]
    try:
        yield times
    finally:
        for handle in handles:
            handle.remove()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, marks: list[float]) -> dict[str, float]:
    """Seconds of each of PARTS in one training step; together they are the step."""
    marks.clear()
    start = time.perf_counter()
    _, loss = loss_of(model, batch)
    forward = time.perf_counter()
    optimizer.zero_grad()
    cleared = time.perf_counter()
    loss.backward()
    backward = time.perf_counter()
    optimizer.step()
    end = time.perf_counter()
    entered, left, entered_back, left_back = marks
    block_forward, block_backward = left - entered, left_back - entered_back
    return {
        "rest_forward": forward - start - block_forward,
        "block_forward": block_forward,
        "block_backward": block_backward,
        "rest_backward": backward - cleared - block_backward,
        "optimizer": cleared - forward + end - backward,
    }


def measure(fusion: str, batch: int, seconds: float) -> Row:
    """Check, and then time for so many ``seconds``, unless FEWEST rounds take longer.

    Raises:
        AssertionError: if the two do not agree; then nothing is timed.
    """
    check(fusion, batch)
    models = {name: make_model(fusion, name) for name in BACKENDS}
    batches = [make_batch(batch, seed) for seed in range(ROTATED)]
    saved = {name: saved_bytes(lambda m=m: loss_of(m, batches[0]), m.parameters()) for name, m in models.items()}
    optimizers = {
        name: torch.optim.Adam(model.parameters(), TrainConfig.learning_rate, weight_decay=TrainConfig.weight_decay)
        for name, model in models.items()
    }
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    with ExitStack() as stack:
        marks = {name: stack.enter_context(marked(model.fusion)) for name, model in models.items()}
        deadline = time.perf_counter() + seconds
        for turn in range(WARM_UP + MOST):
            if turn >= WARM_UP + FEWEST and time.perf_counter() > deadline:
                break
            for name in list(models)[:: 1 if turn % 2 else -1]:  # neither is always the one that finds warm caches
                sample = step(models[name], optimizers[name], batches[turn % ROTATED], marks[name])
                if turn >= WARM_UP:
                    samples[name].append(sample)
    return {"rounds": len(samples["eager"]), **summary(samples), "saved_bytes": saved}


# ---- the gate


def check(fusion: str, batch: int) -> None:
    """AssertionError unless values, loss and gradients of the fused model are as exact as tolerances.py asks.

    Eager in float64 is the truth, eager in float32 the yardstick, all with one seed and the masks of the fused block.
    As in :mod:`benchmarks.gate`, gradients that fail are computed anew with other batches, where relus that rounding
    has flipped are others, and mistakes are the same.
    """
    fused, failing = make_model(fusion, "fused"), []
    for attempt in range(1 + gate.RETRIES):
        data = make_batch(min(batch, GATE_BATCH), attempt)
        truth, draws = expected(fusion, data)
        ours, failures = run(fused, data), {}
        for name in failing or truth:
            size = largest if name in ("values", "loss") else length
            try:
                check_draws(name, ours[name], truth[name], [draw[name] for draw in draws], size)
            except AssertionError as failure:
                failures[name] = failure
        if not failures:
            return
        failing = list(failures)
        if not failing[0].startswith("d "):
            break  # no relu makes values jump
    raise failures[failing[0]]


def expected(fusion: str, data: Batch) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Eager in float64, and draws of its errors in float32: at the weights, and half an ulp away."""
    truth = run(make_model(fusion, "eager", shared_masks=True).double(), data.to(torch.float64))
    eager, draws = make_model(fusion, "eager", shared_masks=True), []
    for draw in range(gate.DRAWS):
        draws.append(run(eager, data))
        gate.nudge(eager, draw)
    return truth, draws


def run(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Values, loss, and the gradients, one vector per kind."""
    model.zero_grad()
    torch.manual_seed(SEED)
    values, loss = loss_of(model, batch)
    loss.backward()
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        first, _, rest = name.partition(".")
        kind = f"d {first} {gate.kind(rest)}" if first == "fusion" else f"d {first}"
        parts.setdefault(kind, []).append(parameter.grad.flatten())
    gradients = {kind: torch.cat(vectors) for kind, vectors in parts.items()}
    return {"values": values.detach(), "loss": loss.detach(), **gradients}


# ---- figures


def summary(samples: Mapping[str, Sequence[Mapping[str, float]]]) -> Row:
    """Times in milliseconds, shares of the step, and what is gained, from seconds of PARTS."""
    row: Row = {}
    for name, of_steps in samples.items():
        ms = {part: numpy.array([1e3 * sample[part] for sample in of_steps]) for part in PARTS}
        whole, block = sum(ms.values()), ms["block_forward"] + ms["block_backward"]
        times = {"step": whole, "block": block, **ms}
        row[name] = {f"{part}_ms": percentiles(values) for part, values in times.items()}
        row[name]["block_share"] = percentiles(block / whole)
    for name, parts in (("speedup", PARTS), ("block_speedup", PARTS[1:3])):
        eager, fused = (numpy.array([sum(s[part] for part in parts) for s in samples[how]]) for how in BACKENDS)
        row[name] = rounded(float(numpy.median(eager) / numpy.median(fused)))
        row[f"{name}_95"] = [rounded(bound) for bound in interval(eager, fused)]
    return row


def interval(eager: numpy.ndarray, fused: numpy.ndarray) -> tuple[float, float]:
    """95 % of the ratio of medians, by bootstrap over rounds: a slow moment strikes both times of a round."""
    from scipy.stats import bootstrap

    def ratio(a: numpy.ndarray, b: numpy.ndarray, axis: int = -1) -> numpy.ndarray:
        return numpy.median(a, axis=axis) / numpy.median(b, axis=axis)

    options = {"paired": True, "vectorized": True, "n_resamples": RESAMPLES, "method": "percentile"}
    found = bootstrap((eager, fused), ratio, random_state=numpy.random.default_rng(0), **options)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def percentiles(values: numpy.ndarray | Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th."""
    found = numpy.percentile(values, [20, 50, 80])
    return {name: rounded(float(value)) for name, value in zip(("p20", "p50", "p80"), found, strict=True)}


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def table(rows: Sequence[Row]) -> str:
    """Markdown: whole steps, what the block takes of them, and what is gained."""
    first = rows[0]
    heads = ["model", "step: eager", "fused", "speedup (95 %)", "block in it: eager", "fused", "speedup"]
    heads += ["share of the block: eager", "fused", "Adam", "saved MB: eager", "fused"]
    lines = [
        f"A training step of the whole model: {first['device']}, {first['threads']} threads, {first['dtype']}, "
        f"torch {first['torch']}, {commits(rows)}; medians in milliseconds, from p20 to p80 in brackets.",
        "",
        f"| {' | '.join(heads)} |",
        "|---|" + "--:|" * (len(heads) - 1),
    ]
    for row in rows:
        eager, fused = row["eager"], row["fused"]
        low, high = row["speedup_95"]
        cells = [f"{row['fusion']}, B = {row['batch']}", _spread(eager["step_ms"]), _spread(fused["step_ms"])]
        cells += [f"{row['speedup']:.2f}x ({low:.2f} to {high:.2f})"]
        cells += [_spread(eager["block_ms"]), _spread(fused["block_ms"]), f"{row['block_speedup']:.2f}x"]
        cells += [f"{100 * how['block_share']['p50']:.0f} %" for how in (eager, fused)]
        cells += [f"{fused['optimizer_ms']['p50']:.3g}"]
        cells += [f"{row['saved_bytes'][name] / 1e6:.0f}" for name in BACKENDS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def commits(rows: Sequence[Row]) -> str:
    found = list(dict.fromkeys(row["commit"] for row in rows))
    return f"commit{'s' * (len(found) > 1)} {', '.join(found)}"


def _spread(times: Mapping[str, float]) -> str:
    p20, p50, p80 = (f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in map(times.get, times))
    return f"{p50} ({p20} to {p80})"


def source() -> str:
    """The state of what a time depends on."""
    return state_of(SOURCES, ROOT)


if __name__ == "__main__":
    sys.exit(main())
