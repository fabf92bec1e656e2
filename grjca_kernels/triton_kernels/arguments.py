"""What the kernels are given. Triton passes a NamedTuple by its fields, so these names are the kernels' names too."""

from __future__ import annotations

from typing import Any, NamedTuple


class View(NamedTuple):
    """A tensor [B, L, n] of any strides; ``given`` is 0 where the caller passed none, and it then counts as zeros."""

    data: Any
    sample: int
    frame: int
    column: int
    given: int = 1


class Shape(NamedTuple):
    """L is ``length_parts`` times ``config.length_step``: Triton sees then by how much rows of W_k are aligned.

    Triton compiles anew for a number that is 1 or divides by 16. So numbers that follow from B stand here doubled, plus
    1: always odd, and 1 only for 0.
    """

    length_parts: int
    width: int
    widths: tuple[int, ...]
    chunk_unspecialized: int  # samples that pass through the workspace together
    unit: int  # elements of one activation [chunk, L, d] in the workspace
    gate_values: int  # elements of ``fp32_workspace`` before the gradients
    gradients: int  # elements of all parameters but W_k and b_k
    parts_unspecialized: int  # of the rows, whose sums are formed apart; one more than there are, so 1 means none
    key_gradients: int  # elements of all W_k and b_k
    key_parts_odd: int  # the same of the samples, whose sums for W_k are formed apart


class Scalars(NamedTuple):
    """Numbers that no compilation depends on."""

    key_scale: float  # 1 / sqrt(d)
    temperature: float
    threshold_unspecialized: int  # 2 t + 1, as above: a 16-bit draw below t is dropped
    kept: float  # 1 / (1 - p)


class Arguments(NamedTuple):
    """Of both directions. ``parameters`` stand in the order of problem.flatten."""

    shape: Shape
    scalars: Scalars
    features: tuple[View, ...]
    parameters: tuple[Any, ...]
    lengths: Any  # [B], int64 and contiguous, or None
    seed: Any  # one int64, or None
    iterates: Any  # [T, B, L, d]
    batch_unspecialized: int
    activation_workspace: Any  # activations, in the dtype of the features
    fp32_workspace: Any  # float32: gate values, and the partial sums of the weights' gradients
    bits: Any  # bytes of the dropout masks, or None


class Outputs(NamedTuple):
    """What the forward fills; ``gates`` is empty unless they are asked for."""

    outputs: tuple[View, ...]
    gates: tuple[View, ...]


class Gradients(NamedTuple):
    """What the backward reads and fills."""

    outputs: tuple[View, ...]
    gates: tuple[View, ...]
    iterates: tuple[View, ...]
    features: tuple[View, ...]
    iterates_steps: tuple[int, ...]
    parameters: tuple[Any, ...]
