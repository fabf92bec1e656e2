"""The drop-in module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from grjca_kernels import problem as problems
from grjca_kernels import released
from grjca_kernels.backends import CHOICES
from grjca_kernels.functional import NO_SCRIPT, gated_rjca, refuse_tracing
from grjca_kernels.problem import Gates, Layer
from grjca_kernels.projections import Gathered, as_linear

MODALITIES = ("visual", "audio")
OUTPUTS = ("pair", "concat")


class GatedRJCAFused(nn.Module):
    """Gated recursive joint cross-attention of visual and audio features (GRJCA, HGRJCA, DCA, RJCA; arXiv 2503.12261).

    Args:
        dim_visual, dim_audio: d_v and d_a.
        length: L, the frames of a sequence: W_k mixes time and is [L, L]. Pad shorter ones and pass ``lengths``.
        iterations: T, 1 to 8.
        gating: "none" (RJCA), "dynamic" (DCA), "flat" (GRJCA) or "hierarchical" (HGRJCA).
        form: "released" (the authors' code) or "paper" (no W_q, biases, output relu, tanh around V C, or dropout).
        dropout: p on C and U while training; the paper form has none.
        temperature: tau of the gates.
        normalize: divide every frame by its L2 norm first.
        share_weights: one set of iteration parameters for all T.
        output: "pair" for (Y_v, Y_a) or "concat" for [B, L, d_v + d_a].
        backend: "auto", "cuda", "triton", "cpu" or "reference".
        device, dtype: of the parameters.

    Parameters start as the authors' do: xavier_uniform weights, zero biases. ``load_state_dict`` takes the authors'
    names too. The projections are torch.nn.Linear that hold weights: their forward and hooks on it are never called.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        dim_visual: int,
        dim_audio: int,
        length: int,
        *,
        iterations: int = 2,
        gating: str = "flat",
        form: str = "released",
        dropout: float = 0.6,
        temperature: float = 0.1,
        normalize: bool = False,
        share_weights: bool = False,
        output: str = "pair",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim_visual", dim_visual), ("dim_audio", dim_audio), ("length", length)):
            problems.check_size(name, size)
        problems.check_choice("output", output, OUTPUTS)
        problems.check_choice("backend", backend, CHOICES)
        if dtype is not None and dtype not in problems.DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, problems.DTYPES))}, got {dtype}.")
        self.dims = (dim_visual, dim_audio)
        self.length = length
        self.iterations = iterations
        self.gating = gating
        self.form = form
        self.dropout = dropout
        self.temperature = temperature
        self.normalize = normalize
        self.share_weights = share_weights
        self.output = output
        self.backend = backend
        problems.check_options(**{name: getattr(self, name) for name in (*problems.SETTINGS, "share_weights")})
        self.dropout, self.temperature = float(dropout), float(temperature)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=form == "released", device=device, dtype=dtype)

        self.layers = nn.ModuleList(
            _Iteration(self.dims, length, linear, joint=form == "released")
            for _ in range(1 if share_weights else iterations)
        )
        ways = problems.gate_ways(gating, iterations)
        self.gates = nn.ModuleDict(
            {name: nn.ModuleList(linear(d_m, n) for n in ways) for name, d_m in zip(MODALITIES, self.dims, strict=True)}
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """xavier_uniform weights and zero biases, as in the authors' code."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        visual: Tensor,
        audio: Tensor,
        lengths: Tensor | None = None,
        *,
        return_gates: bool = False,
        return_iterates: bool = False,
    ) -> Any:
        """Fuse ``visual`` [B, L, d_v] and ``audio`` [B, L, d_a]; ``lengths`` [B] marks frames beyond as absent.

        Returns (Y_v, Y_a) or their concatenation, followed by one dict if extras were asked for: ``gates``, per
        modality [B, L, ways] (a tuple of them for "hierarchical", None for "none"); ``iterates``, per modality
        [T, B, L, d_m].
        """
        refuse_tracing()
        for name, x, d_m in zip(MODALITIES, (visual, audio), self.dims, strict=True):
            if not isinstance(x, Tensor) or x.is_nested or x.dim() != 3:
                continue  # refused below
            if x.shape[1] != self.length or x.shape[2] != d_m:
                raise ValueError(
                    f"{name}: expected shape [B, {self.length}, {d_m}], got {list(x.shape)}; "
                    f"pad shorter sequences to L = {self.length} and pass their true `lengths`."
                )
        return gated_rjca(
            (visual, audio),
            *self.parameters_by_role(),
            iterations=self.iterations,
            gating=self.gating,
            form=self.form,
            dropout=self.dropout if self.training else 0.0,
            temperature=self.temperature,
            normalize=self.normalize,
            lengths=lengths,
            concat=self.output == "concat",
            return_gates=return_gates,
            return_iterates=return_iterates,
            backend=self.backend,
        )

    def parameters_by_role(self) -> tuple[tuple[Layer, ...], Gates]:
        """The parameters as :func:`grjca_kernels.gated_rjca` takes them: ``layers, gates``."""
        if torch.compiler.is_compiling():
            return self._by_role()
        if self._gathered is None or not self._gathered.hold(self):
            self._gathered = Gathered.of(self, *self._by_role())
        return self._gathered.layers, self._gathered.gates

    _gathered: Gathered | None = None

    def _by_role(self) -> tuple[tuple[Layer, ...], Gates]:
        layers = tuple(cast(_Iteration, layer).as_layer() for layer in self.layers)
        gates = tuple(tuple(as_linear(gate) for gate in cast(nn.ModuleList, self.gates[name])) for name in MODALITIES)
        return layers, gates

    def __getstate__(self) -> dict[str, Any]:
        """Without what has been gathered, which a copy gathers for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_gathered"}

    @classmethod
    def from_released(
        cls,
        source: nn.Module | Mapping[str, Tensor],
        *,
        prefix: str | None = None,
        normalize: bool | None = None,
        output: str | None = None,
        keep_parameters: bool = False,
        **overrides: Any,
    ) -> GatedRJCAFused:
        """The module with the weights of the authors' block.

        Args:
            source: their module (GRJCA, HGRJCA, DCA's block, DCNLayer), or a state_dict of it or of a whole model.
            prefix: where the block stands in the state_dict, e.g. "GRJCA."; found if None.
            normalize: default True for "flat" and "hierarchical" gating, else False, as in their code.
            output: default "concat", and "pair" for a bare DCNLayer.
            keep_parameters: take over the very Parameters of ``source``, a module, instead of copies of them, so that
                an optimiser that holds them trains on, with its state.
            **overrides: any other argument of the constructor that the weights don't fix: dropout, backend, device, ...

        L, the widths, T and the gating are read from the shapes. At T = 1 a gate of two ways is "flat" under the name
        GRJCA and "dynamic" otherwise; the two differ in the default of ``normalize`` only. Parameters without effect on
        the output are ignored and named in one warning.

        Raises:
            ValueError: naming the key that is missing or has the wrong shape.
            TypeError: for ``keep_parameters`` with a state_dict, or with another device or dtype.
        """
        problems.check_options(keep_parameters=keep_parameters)
        config, weights, theirs = released.read(source, prefix)
        chosen = {"normalize": normalize, "output": output}
        config.update({name: value for name, value in chosen.items() if value is not None}, **overrides)
        if keep_parameters:
            weights = released.parameters(source, theirs, overrides)
        module = cls(**config)
        released.load(module, weights, theirs, assign=keep_parameters)
        return module

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        released.rename(self, state_dict, prefix)  # so that checkpoints of the authors' models load as they are
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __prepare_scriptable__(self) -> None:
        """Called by torch.jit.script."""
        raise RuntimeError(NO_SCRIPT)

    def to_released(self) -> dict[str, Tensor]:
        """The weights under the authors' names, with the ``coattn.`` of their blocks unless there are no gates.

        The inverse of :meth:`from_released`. Like ``state_dict`` it shares memory with the parameters, except where a
        projection is parametrized, pruned or adapted: there it holds the weights that count.

        Raises:
            ValueError: for the paper form, which the authors' modules cannot hold.
        """
        return released.write(self)

    def extra_repr(self) -> str:
        """The settings, as ``print(module)`` shows them."""
        names = ("length", *problems.SETTINGS, "share_weights", "output")
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{self.dims[0]}, {self.dims[1]}, {settings}, backend={self.backend!r}"


class _Iteration(nn.Module):
    """Holds the parameters of one iteration; computes nothing."""

    def __init__(self, dims: tuple[int, ...], length: int, linear: Any, joint: bool) -> None:
        super().__init__()
        width = sum(dims)
        self.query = linear(width, width) if joint else None
        by_name = dict(zip(MODALITIES, dims, strict=True))
        self.key = nn.ModuleDict({name: linear(length, length) for name in by_name})
        self.value = nn.ModuleDict({name: linear(d_m, d_m) for name, d_m in by_name.items()})
        self.output = nn.ModuleDict({name: linear(width, d_m) for name, d_m in by_name.items()})

    def as_layer(self) -> Layer:
        groups = (tuple(as_linear(group[name]) for name in MODALITIES) for group in (self.key, self.value, self.output))
        return Layer(None if self.query is None else as_linear(self.query), *groups)
