"""The whole model: face and voice networks, followed by the model of grjca.model.audiovisual."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from grjca.backbones import CROP, PATCH, PICTURE, STAGES, Network, crop
from grjca.errors import UserError
from grjca.modalities import MODALITIES
from grjca.model.audiovisual import AudioVisualModel

Statistics = Literal["batch", "frozen"]


class WholeModel(nn.Module):
    """Predicts valence or arousal of every frame from pictures of the face and log-mel patches of the voice.

    Args:
        model: the model that predicts from features; its modalities are visual and audio.
        backbones: the networks of :func:`grjca.backbones.make`, by modality. No part of them is trained before
            :meth:`release`.
        statistics: "batch", as the authors do: in training, all parts of the networks, frozen ones too, normalise by
            batch statistics, update their running statistics and apply dropout. "frozen": all parts, released ones
            too, stay in evaluation mode, so that the features of a frame depend only on that frame and chunks change
            nothing; a released normalisation trains its weight and bias.
        chunk: number of frames that pass through the networks at once, in chunks of about equal size; 0 passes the
            whole batch. In training, the activations of released parts are then recomputed in the backward pass, chunk
            by chunk. With "batch", statistics are those of a chunk, and every chunk updates the running statistics.

    Frozen parts before the first released one build no graph and save no activations. The networks are called part by
    part: hooks on a network do not run, those on its parts do.

    Raises:
        UserError: if a setting is invalid; the message names it.
    """

    backbones: Any
    """A ModuleDict of :class:`grjca.backbones.Network`."""

    def __init__(
        self,
        model: AudioVisualModel,
        backbones: Mapping[str, Network],
        *,
        statistics: Statistics = "batch",
        chunk: int = 0,
    ) -> None:
        super().__init__()
        given = {name: backbones[name].outputs for name in MODALITIES}
        if model.widths != given:
            raise UserError(f"modalities: expected those of the networks, {given}, got {model.widths}.")
        if statistics not in ("batch", "frozen"):
            raise UserError(f"statistics: expected batch or frozen, got {statistics!r}.")
        if chunk < 0:
            raise UserError(f"chunk: expected a number of frames, or 0 for all at once, got {chunk}.")
        self.model = model
        self.backbones = nn.ModuleDict({name: backbones[name] for name in MODALITIES})
        self.statistics, self.chunk = statistics, chunk
        self.release(0)
        self.train(self.training)

    def release(self, stage: int) -> None:
        """Make stages 1 to ``stage`` of :data:`grjca.backbones.STAGES` trainable, and freeze the rest of the networks.

        Raises:
            ValueError: if the stage is not from 0 to 3, or a network of other sizes does not have it.
        """
        for name, network in self.backbones.items():
            stages = STAGES[network.size]
            if not 0 <= stage <= len(stages):
                raise ValueError(f"stage: expected 0 to {len(stages)}, got {stage}.")
            prefixes = [f"{prefix}." for of in stages[:stage] for prefix in of[name]]
            keys = dict(network.named_parameters())
            for prefix in prefixes:
                if not any(key.startswith(prefix) for key in keys):
                    raise ValueError(f"stage: expected {prefix}* in the {name} network, got none of this name.")
            for key, parameter in keys.items():
                parameter.requires_grad_(key.startswith(tuple(prefixes)))

    def train(self, mode: bool = True) -> WholeModel:
        """Set the training mode. With frozen ``statistics``, the networks stay in evaluation mode."""
        super().train(mode)
        if self.statistics == "frozen":
            self.backbones.eval()
        return self

    def forward(
        self,
        faces: Tensor,
        patches: Tensor,
        lengths: Tensor | None = None,
        *,
        return_gates: bool = False,
        offsets: Tensor | None = None,
        flip: Tensor | None = None,
    ) -> Any:
        """Return a value from -1 to 1 for every frame, [B, L].

        Args:
            faces: uint8 [B, L, 48, 48, 3], or [B, L, 3, 40, 40] as :func:`grjca.backbones.crop` returns them.
            patches: floating-point [B, L, 96, 64].
            lengths: [B] integers, 0 <= length <= L. Frames beyond are absent and do not pass through the networks.
            return_gates: as in :meth:`grjca.model.audiovisual.AudioVisualModel.forward`.
            offsets, flip: [B, 2] and [B], as for :func:`grjca.backbones.crop`.

        Raises:
            ValueError, TypeError: if an argument is wrong; the message names it, what was expected and what came.
        """
        self._check(faces, patches)
        present = None if lengths is None else self.model._presence(lengths, faces)
        if faces.dtype == torch.uint8:
            faces = crop(faces, offsets, flip)
        elif offsets is not None or flip is not None:
            raise ValueError("offsets, flip: expected none, because faces are cropped already.")
        inputs = {"visual": faces, "audio": patches}
        features = [self._features(name, inputs[name], present) for name in self.model.widths]
        return self.model(*features, lengths=lengths, return_gates=return_gates)

    def _features(self, name: str, x: Tensor, present: Tensor | None) -> Tensor:
        """Compute features: [B, L, ...] -> [B, L, d] in the dtype of the model, 0 where a frame is absent."""
        dtype = next(self.model.parameters()).dtype
        if present is None:
            return self._encoded(name, x.flatten(0, 1)).to(dtype).unflatten(0, x.shape[:2])
        encoded = self._encoded(name, x[present]).to(dtype)
        return encoded.new_zeros(*x.shape[:2], encoded.shape[-1]).index_put((present,), encoded)

    def _encoded(self, name: str, x: Tensor) -> Tensor:
        """Run the network on frames: [n, ...] -> [n, d]."""
        network = self.backbones[name]
        x = x.to(next(network.parameters()).dtype)
        if not len(x):
            return x.new_zeros(0, network.outputs)
        parts = network.parts()
        first = len(parts)
        if torch.is_grad_enabled():
            first = next((i for i, part in enumerate(parts) if _is_trained(part)), first)
        frozen, released = nn.Sequential(*parts[:first]), nn.Sequential(*parts[first:])
        encoded = []
        for piece in x.tensor_split(math.ceil(len(x) / (self.chunk or len(x)))):
            with torch.no_grad():
                piece = frozen(piece)
            encoded.append(_recomputed(released, piece) if self.chunk and first < len(parts) else released(piece))
        return torch.cat(encoded)

    def _check(self, faces: Tensor, patches: Tensor) -> None:
        length = self.model.length
        raw = faces.dtype == torch.uint8
        frame = (PICTURE, PICTURE, 3) if raw else (3, CROP, CROP)
        if not (raw or faces.is_floating_point()) or faces.shape[1:] != (length, *frame):
            raise ValueError(
                f"faces: expected uint8 [B, {length}, {PICTURE}, {PICTURE}, 3] or floating [B, {length}, 3, {CROP}, "
                f"{CROP}], got {faces.dtype} {list(faces.shape)}."
            )
        if not patches.is_floating_point() or patches.shape != (len(faces), length, *PATCH):
            raise ValueError(
                f"patches: expected floating {[len(faces), length, *PATCH]}, got {patches.dtype} {list(patches.shape)}."
            )


def _is_trained(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _recomputed(part: nn.Module, x: Tensor) -> Tensor:
    """Compute ``part(x)``, saving only ``x`` for the backward pass."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _on_copies_of_buffers(part)

    result: Tensor = checkpoint(part, x, use_reentrant=False, context_fn=contexts)
    return result


@contextmanager
def _on_copies_of_buffers(module: nn.Module) -> Iterator[None]:
    """Replace buffers by temporary copies, so that recomputation does not update running statistics again."""
    owned = [(of, name, buffer) for of in module.modules() for name, buffer in of.named_buffers(recurse=False)]
    for of, name, buffer in owned:
        setattr(of, name, buffer.clone())
    try:
        yield
    finally:
        for of, name, buffer in owned:
            setattr(of, name, buffer)


class _Counted(TorchDispatchMode):
    """Counts the bytes of new tensors that operators make inside it."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in before}
        self.alive = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def activation_bytes(whole: WholeModel, batch: int) -> int:
    """Peak memory of a training step on ``batch`` full windows, in bytes, without weights and Adam's moments.

    The meta device counts activations, their gradients and those of the weights without computing anything. Workspaces
    of convolutions and memory that an allocator holds back are not counted. On a CPU, a process grew by 3.8 GiB in a
    step of the authors' batch with stage 3 and chunks of 300, of which 1.8 are counted.

    Values for the authors' batch, 12 windows of 300 frames, in float32, in GiB:

    ==========================  =====  =====  =====  =====
    stages released             0      1      2      3
    ==========================  =====  =====  =====  =====
    all at once                 9.4    10.0   14.8   21.3
    chunks of 1200 frames       3.3    3.5    3.7    4.6
    chunks of 600 frames        1.8    2.0    2.1    2.7
    chunks of 300 frames        1.0    1.2    1.4    1.8
    chunks of 100 frames        0.6    0.8    1.0    1.2
    weights and Adam's moments  0.5    0.6    0.8    1.2
    ==========================  =====  =====  =====  =====
    """
    memo = {
        id(tensor): nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else torch.empty_like(tensor, device="meta")
        for tensor in [*whole.parameters(), *whole.buffers()]
    }
    twin = copy.deepcopy(whole, memo)
    length = whole.model.length
    with _Counted([*twin.parameters(), *twin.buffers()]) as counted:
        faces = torch.empty(batch, length, PICTURE, PICTURE, 3, dtype=torch.uint8, device="meta")
        patches = torch.empty(batch, length, *PATCH, dtype=torch.float16, device="meta")
        twin(faces, patches).sum().backward()
    return counted.most
