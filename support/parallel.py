"""Several GPUs: torchrun's processes share each batch. Without torchrun there is one, which has all of it."""
import atexit
import os
import re
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import Timeout
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from support import UserError, lock


def join_processes():
    """Started by torchrun: become one of its processes, with a GPU of its own.
    Raises: UserError where there are fewer GPUs than processes.
    """
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():  # one alone may be left over
        return
    if torch.cuda.is_available():
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(f"torchrun started process {local_rank + 1}, but there are {gpus} GPUs; use "
                            f"--nproc-per-node={gpus}")
        torch.cuda.set_device(local_rank)  # `cuda` is this one from now on
    try:
        dist.init_process_group(timeout=timedelta(hours=1))  # a full-size evaluation takes minutes
    except (RuntimeError, ValueError) as error:
        raise UserError(f"torchrun's processes cannot find each other ({str(error).splitlines()[0]}); name a "
                        "network interface: GLOO_SOCKET_IFNAME=lo, or NCCL_SOCKET_IFNAME=lo") from error
    atexit.register(dist.destroy_process_group)
    if not leader():
        sys.stdout = open(os.devnull, "w")


@contextmanager
def only_writer(out: Path):
    """To hold (`with`) while a run writes to a folder. Raises: UserError where another process does."""
    if not leader():
        yield
        return
    try:
        with lock(out / "last.pt", timeout=0):
            yield
    except Timeout as error:
        raise UserError(f"another process writes to {out}; wait, or name another --out") from error


@contextmanager
def lost_processes_are_one_line():
    """What is raised where the other end of a connection is gone becomes a UserError.

    The errors of gloo and NCCL have no type of their own.
    """
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not re.search("gloo|NCCL|onnection", str(error)):
            raise
        raise UserError("another of torchrun's processes has ended; what it printed says why. The same "
                        "command goes on from the last saved epoch") from error


def rank() -> int:
    """This process's number, 0 where it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def leader() -> bool:
    """Whether this process writes: the only one, or torchrun's first."""
    return rank() == 0


def with_ddp(student):
    """Under torchrun the student whose gradients are averaged over the processes during the backward pass."""
    if not dist.is_initialized():
        return student
    # static_graph: the same parameters get a gradient at every step, and those of a term of
    # weight 0 never do.
    return DistributedDataParallel(student, static_graph=True)


def without_ddp(student):
    """The model that with_ddp was given."""
    return student.module if isinstance(student, DistributedDataParallel) else student


def my_part(batch: Tensor) -> Tensor:
    """This process's part of a batch of indices (B,) -> (B / processes,)."""
    return batch.chunk(world_size())[rank()]


def whole_batch(part: Tensor) -> Tensor:
    """The whole batch (B, ...) of the processes' equal parts, in order, with gradient (Deviation D25).

    Each process computes the same loss from the whole batch, and keeps the gradient of its own part. The mean
    that DistributedDataParallel takes over the processes divides that gradient by their number, so it is
    multiplied by it first.
    """
    if not dist.is_initialized():
        return part
    parts = [torch.empty_like(part) for _ in range(world_size())]
    dist.all_gather(parts, part.detach().contiguous())
    parts[rank()] = part
    whole = torch.cat(parts)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: world_size() * gradient)
    return whole


def gather_embedded(embed, model, objects, views: int | None) -> dict:
    """What embed() returns of all objects; under torchrun each process embeds its part of them."""
    if len(objects) < world_size() or not dist.is_initialized():
        return embed(model, objects, views)
    # Consecutive parts, so that joining them restores the objects' order.
    part = torch.arange(len(objects)).tensor_split(world_size())[rank()]
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, embed(model, objects.pick(part), views))
    return {name: torch.cat([embedded[name] for embedded in gathered]) for name in gathered[0]}
