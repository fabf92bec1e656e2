"""Fused gated recursive joint cross-attention of audio-visual features. Its contract: ``operator.md``, beside this."""

from grjca_kernels import reference
from grjca_kernels.backends import backends
from grjca_kernels.dropout import scaled_mask as dropout_mask
from grjca_kernels.functional import gated_rjca
from grjca_kernels.module import GatedRJCAFused
from grjca_kernels.shapes import Layer, Linear

__version__ = "0.1.0"
__all__ = ["GatedRJCAFused", "Layer", "Linear", "backends", "dropout_mask", "gated_rjca", "reference"]
