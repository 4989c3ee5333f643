"""Farthest points on a GPU: one kernel for a whole cloud.

The loop of model.farthest_point_sample launches several small kernels a round, and a GPU mostly waits for
them. One H100 took 58 to 93 ms for a batch of 128 (512 of 2,048 points), twice in a step; one kernel with the
loop inside took 0.29 ms. The loop stays the reference: the kernel has to choose the same indices.
"""
import sys
from functools import cache

import torch
from torch import Tensor


@cache
def farthest_point_kernel(device: torch.device):
    """The kernel, or None where it cannot be had: Triton is missing on Windows, and needs a C compiler."""
    try:
        import triton
        global tl  # the kernel looks for it among the globals
        import triton.language as tl

        @triton.jit
        def kernel(points, chosen, total, count, BLOCK: tl.constexpr):
            # One program a cloud; the points and their distances stay in registers.
            cloud = tl.program_id(0).to(tl.int64)
            points += cloud * total * 3
            chosen += cloud * count
            index = tl.arange(0, BLOCK)
            real = index < total
            x = tl.load(points + 3 * index, mask=real, other=0.0)
            y = tl.load(points + 3 * index + 1, mask=real, other=0.0)
            z = tl.load(points + 3 * index + 2, mask=real, other=0.0)
            distance = tl.where(real, float("inf"), -1.0)  # squared; what fills up the block is never chosen

            newest = 0
            for i in range(1, count):
                dx = x - tl.load(points + 3 * newest)
                dy = y - tl.load(points + 3 * newest + 1)
                dz = z - tl.load(points + 3 * newest + 2)
                distance = tl.minimum(distance, dx * dx + dy * dy + dz * dz)
                newest = tl.argmax(distance, axis=0, tie_break_left=True)
                tl.store(chosen + i, newest)

        launch_farthest_points(kernel, torch.zeros(1, 2, 3, device=device), 2)
    except Exception as error:  # of the import, or whatever its compiler raises
        print(f"warning: farthest points are found one launch at a time, which is slower ({error!r})",
              file=sys.stderr)
        return None
    return kernel


def launch_farthest_points(kernel, points: Tensor, count: int) -> Tensor:
    """farthest_point_sample by the kernel."""
    batch, total, _ = points.shape
    chosen = torch.zeros(batch, count, dtype=torch.long, device=points.device)
    block = 1 << (total - 1).bit_length()  # the next power of two
    with torch.cuda.device_of(points):
        # No fused multiply-add: it rounds differently from the loop, and might then choose another of two
        # tied points. 8 points a thread, at most 16 warps.
        kernel[(batch,)](points.contiguous(), chosen, total, count, BLOCK=block, enable_fp_fusion=False,
                         num_warps=min(16, max(1, block // 256)))
    return chosen
