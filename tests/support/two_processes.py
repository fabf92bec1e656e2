"""The two processes that test_distributed.py compares with one: run ``two_processes.py RANK FOLDER`` twice."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).parents[2]
    sys.path[:0] = [str(root), str(root / "tests" / "support")]

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from family import D_A, D_V, L
from grjca_kernels import GatedRJCAFused
from hosts import LSTMModel, batches

WORLD, STEPS, SIZE = 2, 3, 4
Outcome = dict[str, Tensor]


def host() -> nn.Module:
    torch.manual_seed(0)
    block = GatedRJCAFused(D_V, D_A, L, gating="hierarchical", normalize=True, output="concat", dropout=0.0)
    return LSTMModel(block).double()


def train(model: nn.Module, share: slice = slice(None), *, clip: bool = False) -> list[float]:
    """Train on this process's share of each batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for batch in batches(STEPS, SIZE):
        video, audio, target = (x[share] for x in batch)
        loss = F.mse_loss(model(video, audio).to(target.dtype), target)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    return losses


def one_process(**options: bool) -> Outcome:
    model = host()
    train(model, **options)
    return {name: value.detach() for name, value in model.state_dict().items()}


def ddp(share: slice, **options: bool) -> Outcome:
    model = DistributedDataParallel(host(), **options)
    train(model, share)
    return model.module.state_dict()


def fsdp2(share: slice, **options: bool) -> Outcome:
    from torch.distributed.fsdp import fully_shard

    model = host()
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    fully_shard(model.fusion, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    train(model, share, clip=True)
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def fsdp2_mixed(share: slice) -> Outcome:
    """bfloat16 in the block, float32 for the parameters."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = host().float()
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    fully_shard(model.fusion, mesh=mesh, mp_policy=half)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for video, audio, target in [*batches(1, 8, torch.float32)] * 20:
        optimizer.zero_grad()
        loss = F.mse_loss(model(video[share], audio[share]), target[share])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": torch.tensor(losses), **{name: value.full_tensor() for name, value in model.state_dict().items()}}


def sharded_projection(share: slice) -> Outcome:
    from torch.distributed.fsdp import fully_shard

    model = host()
    fully_shard(model.fusion.layers[0].query, mesh=dist.device_mesh.init_device_mesh("cpu", (WORLD,)))
    try:
        train(model, share)
    except TypeError as error:
        return {"words": torch.tensor(list(str(error).encode()))}
    return {}


JOBS: dict[str, Callable[[slice], Outcome]] = {
    "ddp": ddp,
    "ddp-static": partial(ddp, static_graph=True, gradient_as_bucket_view=True),
    "fsdp2": fsdp2,
    "fsdp2-kept": partial(fsdp2, reshard_after_forward=False),
    "fsdp2-mixed": fsdp2_mixed,
    "sharded-projection": sharded_projection,
}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    per_process = SIZE // WORLD
    share = slice(rank * per_process, (rank + 1) * per_process)
    outcomes: dict[str, Outcome | str] = {}
    for name, job in JOBS.items():
        try:
            outcomes[name] = copy.deepcopy(job(share))
        except Exception as error:  # each is a test of its own
            outcomes[name] = f"{type(error).__name__}: {error}"
    torch.save(outcomes, folder / f"outcomes-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(int(sys.argv[1]), Path(sys.argv[2]))
