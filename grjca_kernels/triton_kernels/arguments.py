"""The arguments of the kernels. Triton passes a NamedTuple by its fields, so the kernels use these names too."""

from __future__ import annotations

from typing import Any, NamedTuple


class View(NamedTuple):
    """A tensor [B, L, n] of any strides; ``given`` is 0 if the caller passed none, and it then counts as zeros."""

    data: Any
    sample: int
    frame: int
    column: int
    given: int = 1


class Shape(NamedTuple):
    """The sizes. L is ``length_parts`` times ``config.length_step``, which shows Triton how rows of W_k are aligned.

    Triton compiles a new kernel for a number that is 1 or a multiple of 16. Numbers that depend on B are therefore
    stored as 2 n + 1, which is always odd, and 1 only for n = 0.
    """

    length_parts: int
    width: int
    widths: tuple[int, ...]
    chunk_unspecialized: int  # samples that pass through the workspace together
    unit: int  # elements of one activation [chunk, L, d] in the workspace
    gate_values: int  # elements of ``fp32_workspace`` before the gradients
    gradients: int  # elements of all parameters but W_k and b_k
    parts_unspecialized: int  # parts of the rows, summed separately; n is one more than the count, so n = 1 means none
    key_gradients: int  # elements of all W_k and b_k
    key_parts_odd: int  # as above for parts of the samples, summed separately for W_k


class Scalars(NamedTuple):
    """Numbers on which no compilation depends."""

    key_scale: float  # 1 / sqrt(d)
    temperature: float
    threshold_unspecialized: int  # 2 t + 1, as above: a 16-bit draw below t is dropped
    kept: float  # 1 / (1 - p)


class Arguments(NamedTuple):
    """The arguments of both directions. ``parameters`` are in the order of problem.flatten."""

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
    """The tensors that the forward fills; ``gates`` is empty unless requested."""

    outputs: tuple[View, ...]
    gates: tuple[View, ...]


class Gradients(NamedTuple):
    """The tensors that the backward reads and fills."""

    outputs: tuple[View, ...]
    gates: tuple[View, ...]
    iterates: tuple[View, ...]
    features: tuple[View, ...]
    iterates_steps: tuple[int, ...]
    parameters: tuple[Any, ...]
