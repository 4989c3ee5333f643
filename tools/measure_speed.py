"""The speed of a training step, whole and by part, with the options of train.py.

    python -m tools.measure_speed                                 # the default run's step
    python -m tools.measure_speed --model ViT-B-16-quickgelu --batch-size 4   # random weights

Training sees depth views here, also where there are photographs, which other processes decode.
"""
import statistics
import time
import timeit
from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import train
from data import load_dataset
from eval import embed
from model import train_mode
from support.command_line import one_line_errors
from support.provenance import provenance

REPEATS = 10  # of which the median counts; one before them compiles and fills caches


def main(argv=None) -> dict:
    """Print and return seconds by name, a step's work in TFLOP, and the device's TFLOP/s."""
    args = train.parse_args(argv)
    device = args.device
    objects = load_dataset(args.dataset, args.data_root, "train", args.points, args.domain,
                           args.download, args.up, args.cache)
    run = train.begin(args, objects)
    train_mode(run.student, args.freeze)
    batch = objects.pick(torch.arange(args.batch_size) % len(objects))
    points = batch.points.to(device)

    rounds = []
    for _ in range(1 + REPEATS):
        rounds.append({
            "step": seconds_of(device, whole_step, run, points, args),
            **parts_of_a_step(run, points, args),
            "evaluation": seconds_of(device, embed, run.teacher, batch, args.views)})
    median = {}
    for name in rounds[0]:
        median[name] = statistics.median(seconds[name] for seconds in rounds[1:])

    # The counter does not see into compiled code.
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        whole_step(run, points, args)
    tflop = counter.get_total_flops() / 1e12  # a multiplication and an addition each count
    product = product_speed(device, run.student.precision)
    report(median, tflop, product, run.student.precision, args)
    return {"seconds": median, "tflop": tflop, "product": product}


def now(device: str) -> float:
    """The time in seconds, after all that the device was told to do is done."""
    if "cuda" in device:
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(device: str, function, *given) -> float:
    began = now(device)
    function(*given)
    return now(device) - began


def whole_step(run, points: Tensor, args):
    """One training step, from clouds to the teacher's update."""
    views = train.draw_views(points, run.student.visual.image_size[0])
    given = None
    if args.labels in ("together", "truth"):  # which do not ask the teacher at each step
        labels = torch.zeros(len(points), dtype=torch.long, device=args.device)
        given = labels, torch.ones_like(labels, dtype=torch.bool)
    train.train_step(run.student, run.teacher, views, run.optimizer, 1, 1000, args, given)


def parts_of_a_step(run, points: Tensor, args) -> dict[str, float]:
    """Seconds of the parts of one step. A part inside of another counts for itself alone."""
    parts = [
        ("views", train, "draw_views"),
        ("grouping", run.teacher, "group"),
        ("grouping", run.student, "group"),
        ("teacher", run.teacher, "forward"),
        ("student, forward", run.student, "forward"),
        ("student, backward", Tensor, "backward"),
        ("optimizer", run.optimizer, "step"),
        ("moving average", train, "update_teacher"),
    ]
    seconds = {part: 0.0 for part, _, _ in parts}
    with ExitStack() as stack:
        for part, owner, name in parts:
            clocked = with_clock(getattr(owner, name), part, seconds, args.device)
            stack.enter_context(patch.object(owner, name, clocked))
        whole_step(run, points, args)
    return seconds


def with_clock(function, part: str, seconds: dict[str, float], device: str):
    """The function, which also adds its time to seconds[part], without that of parts inside."""
    def clocked(*given, **options):
        before, began = sum(seconds.values()), now(device)
        result = function(*given, **options)
        inside = sum(seconds.values()) - before
        seconds[part] += now(device) - began - inside
        return result
    return clocked


def product_speed(device: str, precision: torch.dtype) -> float:
    """TFLOP/s of the device's own matrix product, the best of five."""
    side = 8192 if "cuda" in device else 1024
    square = torch.ones(side, side, device=device, dtype=precision)
    seconds = timeit.repeat(lambda: F.linear(square, square)[0, 0].item(), number=1, repeat=5)
    return 2 * side ** 3 / 1e12 / min(seconds)


def report(seconds: dict[str, float], tflop: float, product: float, precision: torch.dtype, args):
    """Print what was measured, each part also as a share of the step."""
    parts = dict(seconds)
    step, evaluation = parts.pop("step"), parts.pop("evaluation")
    parts["labels, losses and the rest"] = step - sum(parts.values())

    batch, memory = args.batch_size, ""
    if "cuda" in args.device:
        memory = f", {torch.cuda.max_memory_allocated(args.device) / 2 ** 30:.1f} GiB"
    made_by = ", ".join(f"{key} {value}" for key, value in provenance(args.device).items())
    compiled = ", compiled" if args.compile else ""
    print(f"{args.model}, batch {batch}, {args.groups} groups, {args.points} points, "
          f"{precision}{compiled}; {made_by}")
    print(f"step: {1000 * step:.1f} ms, {batch / step:.1f} objects/s{memory}")
    speed = tflop / step
    print(f"work: {speed:.2f} TFLOP/s, {100 * speed / product:.0f} % of a matrix product's "
          f"{product:.2f}")
    for part, value in parts.items():
        print(f"  {part:28}{1000 * value:9.1f} ms{100 * value / step:6.0f} %")
    print(f"evaluation: {1000 * evaluation / batch:.1f} ms an object")


if __name__ == "__main__":
    with one_line_errors():
        main()
