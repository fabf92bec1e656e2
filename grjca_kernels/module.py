"""The drop-in module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from grjca_kernels import problem as problems
from grjca_kernels import recognition, reference, released
from grjca_kernels.backends import CHOICES
from grjca_kernels.functional import NO_SCRIPT, gated_rjca, refuse_tracing
from grjca_kernels.gates import ScoreGate, TemporalGate, mix
from grjca_kernels.keeping import CHOICES as KEEP
from grjca_kernels.problem import Gates, Layer
from grjca_kernels.projections import Gathered, as_linear

MODALITIES = ("visual", "audio", "third", "fourth")
OUTPUTS = ("pair", "concat", "iterates")
BY_PYTORCH = ("temporal", "score")
"""Gatings whose gates are PyTorch's own layers; see gates.py."""


class GatedRJCAFused(nn.Module):
    """Gated recursive joint cross-attention of two to four modalities (GRJCA, HGRJCA, DCA, RJCA, RJCMA, TAGF).

    Args:
        dim_visual, dim_audio: d_v and d_a; or, as ``dim_visual`` alone, the widths of two to four modalities.
        length: L, the frames of a sequence: W_k mixes time and is [L, L]. Pad shorter ones and pass ``lengths``.
        iterations: T, 1 to 16.
        gating: "none" (RJCA, RJCMA), "dynamic" (DCA), "flat" (GRJCA), "hierarchical" (HGRJCA), "temporal" (TAGF: an
            LSTM over the iterates) or "score" (TAGF's simple gate). The last two mix by PyTorch, without a relu.
        form: "released" (the authors' code) or "paper" (no W_q, biases, output relu, tanh around V C, or dropout).
        joint: "projected", J = X W_q^T + b_q, or "raw", J = X (RJCMA); the paper form has no W_q.
        dropout: p on C and U while training; the paper form has none.
        gate_dropout: p within the gates of "temporal", while training.
        temperature: tau of the gates.
        normalize: divide every frame by its L2 norm first.
        share_weights: one set of iteration parameters for all T.
        output: "pair" for (Y_v, Y_a, ...), "concat" for [B, L, d], or, with gating="none", "iterates" for
            ([X_v^1, ..., X_v^T], [X_a^1, ..., X_a^T], ...).
        keep: what a forward saves for its backward: "least" (the iterates alone), "most", or "auto", a choice by shape.
        backend: "auto", "cuda", "triton", "cpu" or "reference".
        device, dtype: the device and dtype of the parameters.

    Parameters are initialised as the authors' are: xavier_uniform weights, zero biases. ``load_state_dict`` also takes
    the authors' names. The projections are torch.nn.Linear that only hold weights: neither their forward nor its hooks
    are ever called.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was passed.
    """

    def __init__(
        self,
        dim_visual: int | Sequence[int],
        dim_audio: int | None = None,
        length: int | None = None,
        *,
        iterations: int = 2,
        gating: str = "flat",
        form: str = "released",
        joint: str = "projected",
        dropout: float = 0.6,
        gate_dropout: float = 0.1,
        temperature: float = 0.1,
        normalize: bool = False,
        share_weights: bool = False,
        output: str = "pair",
        keep: str = "auto",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dims, self.length = _sizes(dim_visual, dim_audio, length)
        if len(self.dims) > 2 and type(self) is GatedRJCAFused:
            self.__class__ = _OfSeveral
        problems.check_choice("output", output, OUTPUTS)
        problems.check_choice("gating", gating, (*problems.GATINGS, *BY_PYTORCH))
        if output == "iterates" and gating != "none":
            raise ValueError(f"output: expected 'pair' or 'concat' with gating={gating!r}, got 'iterates'.")
        problems.check_choice("keep", keep, KEEP)
        problems.check_choice("backend", backend, CHOICES)
        if dtype is not None and dtype not in problems.DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, problems.DTYPES))}, got {dtype}.")
        self.iterations = iterations
        self.gating = gating
        self.form = form
        self.joint = joint
        self.dropout = dropout
        self.temperature = temperature
        self.normalize = normalize
        self.share_weights = share_weights
        self.output = output
        self.keep = keep
        self.backend = backend
        settings = {name: getattr(self, name) for name in problems.SETTINGS if name != "gating"}
        problems.check_options(**settings, share_weights=share_weights)
        problems.check_options(gate_dropout=gate_dropout)
        self.dropout, self.temperature = float(dropout), float(temperature)
        if form == "paper":
            self.joint = "raw"

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=form == "released", device=device, dtype=dtype)

        def gates(d_m: int) -> list[nn.Module]:
            if gating == "temporal":
                return [TemporalGate(d_m, gate_dropout, device, dtype)]
            if gating == "score":
                return [ScoreGate(d_m, device, dtype)]
            return [linear(d_m, n) for n in problems.gate_ways(gating, iterations)]

        by_name = dict(zip(MODALITIES, self.dims, strict=False))
        self.layers = nn.ModuleList(
            _Iteration(by_name, self.length, linear, projected=self.joint == "projected")
            for _ in range(1 if share_weights else iterations)
        )
        self.gates = nn.ModuleDict({name: nn.ModuleList(gates(d_m)) for name, d_m in by_name.items()})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise weights with xavier_uniform and biases with zero, as in the authors' code."""
        for module in self.modules():
            if isinstance(module, (TemporalGate, ScoreGate)):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
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
        """Fuse ``visual`` [B, L, d_v] and ``audio`` [B, L, d_a]; frames beyond ``lengths`` [B] are absent.

        A module of three or four modalities takes as many tensors, and ``lengths`` by keyword.

        Returns (Y_v, Y_a, ...), their concatenation, or the iterates, followed by one dict if extras were requested:
        ``gates``, per modality [B, L, ways] (a tuple of them for "hierarchical", None for "none"); ``iterates``, per
        modality [T, B, L, d_m].
        """
        return self._fuse((visual, audio), lengths, return_gates, return_iterates)

    def _fuse(
        self, features: tuple[Tensor, ...], lengths: Tensor | None, return_gates: bool, return_iterates: bool
    ) -> Any:
        refuse_tracing()
        if len(features) != len(self.dims):
            raise TypeError(f"features: expected {len(self.dims)} tensors, one per modality, got {len(features)}.")
        for m, (x, d_m) in enumerate(zip(features, self.dims, strict=True)):
            if not isinstance(x, Tensor) or x.is_nested or x.dim() != 3:
                continue  # refused below
            if x.shape[1] != self.length or x.shape[2] != d_m:
                self._refuse_shape(m, x)
        by_pytorch, of_iterates = self.gating in BY_PYTORCH, self.output == "iterates"
        found = gated_rjca(
            features,
            *self.parameters_by_role(),
            iterations=self.iterations,
            gating="none" if by_pytorch else self.gating,
            form=self.form,
            joint=self.joint,
            dropout=self.dropout if self.training else 0.0,
            temperature=self.temperature,
            normalize=self.normalize,
            lengths=lengths,
            concat=self.output == "concat" and not by_pytorch,
            return_gates=return_gates,
            return_iterates=return_iterates or by_pytorch or of_iterates,
            keep=self.keep,
            backend=self.backend,
        )
        if by_pytorch:
            return self._mixed(features, lengths, found[-1]["iterates"], return_gates, return_iterates)
        if of_iterates:
            iterates = tuple([*x.unbind()] for x in found[-1]["iterates"])
            extras = {name: value for name, value in found[-1].items() if name != "iterates" or return_iterates}
            return reference.with_extras(iterates, extras, concat=False)
        return found

    @property
    def _by_pytorch(self) -> bool:
        return self.gating in BY_PYTORCH

    def _refuse_shape(self, m: int, x: Tensor) -> NoReturn:
        name, d_m = problems.modality_names(len(self.dims))[m], self.dims[m]
        if x.shape[1] == d_m and x.shape[2] <= self.length:
            advice = f"features stand last: pass {name}.transpose(1, 2)"
        elif x.shape[2] != d_m:
            option = ("dim_visual", "dim_audio")[m] if len(self.dims) == 2 else f"entry {m} of the widths"
            advice = f"{option} sets the width when the module is made"
        elif x.shape[1] < self.length:
            advice = f"pad shorter sequences to L = {self.length} and pass their true `lengths`"
        else:
            advice = f"cut longer sequences into windows of L = {self.length} frames, which W_k mixes"
        raise ValueError(f"{name}: expected shape [B, {self.length}, {d_m}], got {list(x.shape)}; {advice}.")

    def _mixed(
        self,
        features: Sequence[Tensor],
        lengths: Tensor | None,
        iterates: Sequence[Tensor],
        return_gates: bool,
        return_iterates: bool,
    ) -> Any:
        """Return the result where PyTorch's layers are the gates."""
        present = reference.presence(self.length, lengths)
        outputs, values = [], []
        for name, x, after in zip(self.gates, features, iterates, strict=True):
            x = reference.initial(self.normalize, x, present).to(after.dtype)
            (gate,) = cast(nn.ModuleList, self.gates[name])
            y, value = mix(gate, (x, *after), self.temperature, present)
            outputs.append(y)
            values.append(value)
        extras: dict[str, Any] = {"gates": tuple(values)} if return_gates else {}
        if return_iterates:
            extras["iterates"] = tuple(iterates)
        concat = self.output == "concat"
        return reference.with_extras([torch.cat(outputs, dim=-1)] if concat else outputs, extras, concat)

    def parameters_by_role(self) -> tuple[tuple[Layer, ...], Gates]:
        """Return the parameters as :func:`grjca_kernels.gated_rjca` takes them: ``layers, gates``."""
        if torch.compiler.is_compiling():
            return self._by_role()
        if self._gathered is None or not self._gathered.hold(self):
            used = [self.layers] if self._by_pytorch else [self.layers, self.gates]
            self._gathered = Gathered.of(self, used, *self._by_role())
        return self._gathered.layers, self._gathered.gates

    _gathered: Gathered | None = None
    keep = "auto"  # for modules that were pickled before the option existed

    def _by_role(self) -> tuple[tuple[Layer, ...], Gates]:
        layers = tuple(cast(_Iteration, layer).as_layer() for layer in self.layers)
        if self._by_pytorch:
            return layers, ()
        names = MODALITIES[: len(self.dims)]
        gates = tuple(tuple(as_linear(gate) for gate in cast(nn.ModuleList, self.gates[name])) for name in names)
        return layers, gates

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the gathered parameters, which a copy gathers for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_gathered"}

    @classmethod
    def from_released(
        cls,
        source: nn.Module | Mapping[str, Tensor],
        *,
        prefix: str | None = None,
        ignore: Iterable[str] = (),
        check: bool = True,
        keep_parameters: bool = False,
        **overrides: Any,
    ) -> GatedRJCAFused:
        """Build the module from the authors' block, with its weights.

        Args:
            source: their module (GRJCA, HGRJCA, DCA's block, RJCMA, TAGF, DCNLayer), or its state_dict, or that of a
                whole model.
            prefix: where the block is in the state_dict, e.g. "GRJCA."; found if None.
            ignore: the beginnings of the names of parameters that have no effect on the output.
            check: run a copy of a source module, and this one, in float64 on a small random batch with random weights;
                take the options with which both compute the same, and refuse a module if there are none.
            keep_parameters: use the Parameters of ``source``, a module, instead of copies of them, so that an optimiser
                that holds them continues to train them, with its state.
            **overrides: any other argument of the constructor: output, normalize, joint, dropout, backend, device, ...

        L, the widths, T and the gating are read from the shapes. A module also determines the mode, dropout, dtype,
        device and which Parameters are frozen; running it shows what it normalises, whether it projects J and what it
        returns. For a state_dict these are assumed to be as in the authors' code: dropout 0.6, inputs normalised for
        "flat", "hierarchical", "temporal" and "score", J raw for more than two modalities, output "concat" and, for a
        bare DCNLayer, "pair". One warning names the parameters known to have no effect on the output.

        Raises:
            ValueError: naming the key that is missing, unknown or has the wrong shape; for a module that computes
                something else; for a state_dict with T = 1 that may be GRJCA's or DCA's, without ``normalize``.
            TypeError: for ``keep_parameters`` with a state_dict, or with another device or dtype.
        """
        problems.check_options(keep_parameters=keep_parameters, check=check)
        overrides = {name: value for name, value in overrides.items() if value is not None}
        found = released.read(source, prefix, ignore)
        config, block = found.config, found.block

        def build(options: Mapping[str, Any], weights: Mapping[str, Tensor], assign: bool = False) -> GatedRJCAFused:
            device = torch.device(options["device"])
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the initial draws are overwritten
                module = cls(**options)
            released.load(module, weights, found.theirs, assign)
            return module

        if block is not None and check:
            names = {ours: theirs.removeprefix(found.prefix) for ours, theirs in found.theirs.items()}
            config |= recognition.recognise(block, config, overrides, names, build)
        elif block is not None:
            config |= recognition.declared(block, overrides)
        elif not found.certain and "normalize" not in overrides:
            raise ValueError(
                "normalize: expected True (GRJCA) or False (DCA), for at T = 1 their weights look alike, got None."
            )
        config.update(overrides)
        alike = config["iterations"] == 1 and config["gating"] in ("flat", "dynamic")
        if alike and (block is not None or not found.certain) and "gating" not in overrides:
            config["gating"] = "flat" if config["normalize"] else "dynamic"
        kept = released.parameters(source, found.theirs, overrides) if keep_parameters else found.weights
        module = build(config, kept, keep_parameters)
        if block is not None:
            released.take_over(module, cast(nn.Module, source), found.theirs)
            module.train(block.training)
        return module

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        released.rename(self, state_dict, prefix)  # so that checkpoints of the authors' models load as they are
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __prepare_scriptable__(self) -> None:
        """Refuse torch.jit.script, which calls this."""
        raise RuntimeError(NO_SCRIPT)

    def to_released(self) -> dict[str, Tensor]:
        """Return the weights under the authors' names, with the ``coattn.`` of their blocks unless there are no gates.

        This inverts :meth:`from_released`. Like ``state_dict``, the result shares memory with the parameters, except
        where a projection is parametrized, pruned or adapted: there it holds the effective weights.

        Raises:
            ValueError: for the paper form, which the authors' modules cannot hold.
        """
        return released.write(self)

    def extra_repr(self) -> str:
        """Return the settings that ``print(module)`` shows."""
        names = ("length", *problems.SETTINGS, "share_weights", "output", "keep", "backend")
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{', '.join(map(str, self.dims)) if len(self.dims) == 2 else [*self.dims]}, {settings}"


class _OfSeveral(GatedRJCAFused):
    """A GatedRJCAFused of three or four modalities, which takes its features as ``*features``."""

    def forward(  # type: ignore[override]
        self,
        *features: Tensor,
        lengths: Tensor | None = None,
        return_gates: bool = False,
        return_iterates: bool = False,
    ) -> Any:
        return self._fuse(features, lengths, return_gates, return_iterates)

    def _get_name(self) -> str:
        return GatedRJCAFused.__name__


def _sizes(dim_visual: int | Sequence[int], dim_audio: int | None, length: int | None) -> tuple[tuple[int, ...], int]:
    """Return the widths and L."""
    if isinstance(dim_visual, Sequence) and not isinstance(dim_visual, str):
        if dim_audio is not None:
            raise TypeError(f"dim_audio: expected None beside the widths {dim_visual}, got {dim_audio!r}.")
        fewest, most = problems.MODALITIES
        if not fewest <= len(dim_visual) <= most:
            raise ValueError(f"dim_visual: expected {fewest} to {most} widths, got {len(dim_visual)}.")
        dims = {f"dim_visual[{m}]": width for m, width in enumerate(dim_visual)}
    else:
        dims = {"dim_visual": dim_visual, "dim_audio": dim_audio}  # type: ignore[dict-item]
    for name, size in (*dims.items(), ("length", length)):
        problems.check_size(name, size)
    return tuple(dims.values()), cast(int, length)


class _Iteration(nn.Module):
    """The parameters of one iteration; this module computes nothing."""

    def __init__(self, dims: Mapping[str, int], length: int, linear: Any, projected: bool) -> None:
        super().__init__()
        width = sum(dims.values())
        self.query = linear(width, width) if projected else None
        self.key = nn.ModuleDict({name: linear(length, length) for name in dims})
        self.value = nn.ModuleDict({name: linear(d_m, d_m) for name, d_m in dims.items()})
        self.output = nn.ModuleDict({name: linear(width, d_m) for name, d_m in dims.items()})

    def as_layer(self) -> Layer:
        names = MODALITIES[: len(self.key)]
        groups = (tuple(as_linear(group[name]) for name in names) for group in (self.key, self.value, self.output))
        return Layer(None if self.query is None else as_linear(self.query), *groups)
