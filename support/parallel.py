"""Several GPUs: torchrun's processes share each batch. Without torchrun every function here does nothing."""
import atexit
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from support import UserError


def join_processes():
    """Started by torchrun: become one of its processes, with a GPU of its own.
    Raises: UserError where there are fewer GPUs than processes.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    if torch.cuda.is_available():
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(f"torchrun started process {local_rank + 1}, but there are {gpus} GPUs; use "
                            f"--nproc-per-node={gpus}")
        torch.cuda.set_device(local_rank)  # `cuda` is this one from now on
    dist.init_process_group(timeout=timedelta(hours=1))  # a full-size evaluation takes minutes
    atexit.register(dist.destroy_process_group)
    if not leader():
        sys.stdout = open(os.devnull, "w")


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


class GatherBatch(torch.autograd.Function):
    """The whole batch (B, ...) of the processes' equal parts, in order, with gradient (Deviation D25).

    Each process computes the same loss from the whole batch. Backward adds up the processes' gradients of a
    part, which makes them (number of processes) times too large. DistributedDataParallel takes the mean over
    the processes, which divides by that number again.
    """

    @staticmethod
    def forward(ctx, part: Tensor) -> Tensor:
        gathered = [torch.empty_like(part) for _ in range(world_size())]
        dist.all_gather(gathered, part.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def whole_batch(part: Tensor) -> Tensor:
    """GatherBatch under torchrun; otherwise the part is the whole batch."""
    return GatherBatch.apply(part) if dist.is_initialized() else part


def gather_embedded(embed, model, objects, views: int | None) -> dict:
    """What embed() returns of all objects; under torchrun each process embeds its part of them."""
    if not dist.is_initialized():
        return embed(model, objects, views)
    # Consecutive parts, so that joining them restores the objects' order.
    part = torch.arange(len(objects)).tensor_split(world_size())[rank()]
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, embed(model, objects.pick(part), views))
    return {name: torch.cat([embedded[name] for embedded in gathered]) for name in gathered[0]}
