"""The speed of a training step, whole and by part, with the options of train.py.

    python -m tools.measure_speed                                                  # the default run's step
    python -m tools.measure_speed --model ViT-B-16-quickgelu --batch-size 4        # full size, random weights
"""
import resource
import statistics
import time
import timeit

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import train
from data import draw_views, load_dataset, training_photographs
from eval import embed
from model import hide_groups, hide_patches, train_mode, update_teacher
from support.command_line import one_line_errors
from support.provenance import provenance

REPEATS = 10  # of which the median counts; one before them compiles and fills caches


def main(argv=None) -> dict:
    """Print and return seconds by name, a step's work in TFLOP, the device's TFLOP/s, and memory in GiB."""
    args = train.parse_args(argv)
    objects = load_dataset(args.dataset, args.data_root, "train", args.points, args.domain, args.download,
                           args.up, args.cache)
    run = train.begin(args, objects)
    train_mode(run.student, args.freeze)

    batch = objects.pick(torch.arange(args.batch_size) % len(objects))
    points = batch.points.to(args.device)
    # Photographs are decoded before: this takes the CPU's workers, not the device.
    size = run.student.visual.image_size[0]
    photographs = next(iter(training_photographs(batch, (torch.arange(len(batch)),), size, seed=0)))

    rounds = []
    for _ in range(1 + REPEATS):
        seconds = {"step": whole_step(run, points, photographs, args)}
        seconds |= parts_of_a_step(run, points, photographs, args)
        began = now(args.device)
        embed(run.teacher, batch, args.views)
        seconds["evaluation"] = now(args.device) - began
        rounds.append(seconds)
    median = {name: statistics.median(seconds[name] for seconds in rounds[1:]) for name in rounds[0]}

    speed = {
        "seconds": median,
        "tflop": work(run, points, photographs, args),
        "product": product_speed(args.device, run.student.precision),
        "memory": memory(args.device),
    }
    report(speed, len(batch), run.student.precision, args)
    return speed


def now(device: str) -> float:
    """The time in seconds, after all that the device was told to do is done."""
    if "cuda" in device:
        torch.cuda.synchronize(device)
    return time.perf_counter()


def whole_step(run, points, photographs, args) -> float:
    """Seconds of one training step, from clouds to the teacher's update."""
    began = now(args.device)
    views = draw_views(points, run.student.visual.image_size[0], photographs)
    given = None
    if args.labels in ("together", "truth"):  # which do not ask the teacher at each step
        labels = torch.zeros(len(points), dtype=torch.long, device=args.device)
        given = labels, torch.ones_like(labels, dtype=torch.bool)
    train.train_step(run.student, run.teacher, views, run.optimizer, 1, 1000, args, given)
    return now(args.device) - began


def parts_of_a_step(run, points, photographs, args) -> dict[str, float]:
    """Seconds of a step's parts, in their order. Labels and losses are left out: `report` gives the rest."""
    student, teacher = run.student, run.teacher
    seconds, last = {}, now(args.device)

    def lap(part: str):
        nonlocal last
        seconds[part] = now(args.device) - last
        last += seconds[part]

    views = draw_views(points, student.visual.image_size[0], photographs)
    lap("views")

    weak_groups = strong_groups = weak_images = strong_images = image_hidden = point_hidden = None
    if args.modalities != "image":
        weak_groups = teacher.group(views["weak_points"])
        strong_groups = student.group(views["strong_points"])
        if args.mask_ratio:
            point_hidden = hide_groups(strong_groups.centres, args.mask_ratio)
    lap("grouping, twice")

    if args.modalities != "point":
        weak_images = teacher.normalise(views["weak_image"])
        strong_images = student.normalise(views["strong_image"])
        grid = student.visual.grid_size[0]
        if args.mask_ratio:
            image_hidden = hide_patches(len(points), grid, args.mask_ratio, points.device)
    with torch.no_grad():
        teacher(weak_images, weak_groups)
    lap("teacher")

    outputs = student(strong_images, strong_groups, image_hidden, point_hidden)
    lap("student, forward")

    run.optimizer.zero_grad(set_to_none=True)
    trained = [output for output in outputs if output is not None and output.requires_grad]
    sum(output.float().mean() for output in trained).backward()
    lap("student, backward")

    run.optimizer.step()
    lap("optimizer")

    update_teacher(teacher, student, 1.0)
    lap("moving average")
    return seconds


def work(run, points, photographs, args) -> float:
    """TFLOP of a step: matrix products and attention, a multiplication and an addition each counted."""
    # The counter does not see into compiled code.
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        whole_step(run, points, photographs, args)
    return counter.get_total_flops() / 1e12


def product_speed(device: str, precision: torch.dtype) -> float:
    """TFLOP/s of the device's own matrix product, the best of five; on a CPU one of ViT-B's shape."""
    rows, inner, columns = (8192, 8192, 8192) if "cuda" in device else (512, 768, 3072)
    tokens = torch.ones(rows, inner, device=device, dtype=precision)
    weight = torch.ones(columns, inner, device=device, dtype=precision)
    seconds = timeit.repeat(lambda: F.linear(tokens, weight)[0, 0].item(), number=1, repeat=5)
    return 2 * rows * inner * columns / 1e12 / min(seconds)


def memory(device: str) -> float:
    """GiB at most so far: of the GPU what torch allocated, without a GPU what the process had."""
    if "cuda" in device:
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # Linux counts in KiB


def report(speed: dict, batch: int, precision: torch.dtype, args):
    """Print what was measured, each part also as a share of the step."""
    seconds = dict(speed["seconds"])
    step, evaluation = seconds.pop("step"), seconds.pop("evaluation")
    seconds["labels, losses and the rest"] = step - sum(seconds.values())
    performed = speed["tflop"] / step
    made_by = ", ".join(f"{key} {value}" for key, value in provenance(args.device).items())
    print(f"{args.model}, batch {batch}, {args.groups} groups, {args.points} points, {precision}"
          f"{', compiled' if args.compile else ''}; {made_by}")
    print(f"step: {1000 * step:.1f} ms, {batch / step:.1f} objects/s, {speed['memory']:.1f} GiB")
    print(f"work: {performed:.2f} TFLOP/s, {100 * performed / speed['product']:.0f} % of a matrix product's "
          f"{speed['product']:.2f}")
    for part, value in seconds.items():
        print(f"  {part:28}{1000 * value:9.1f} ms{100 * value / step:6.0f} %")
    print(f"evaluation: {1000 * evaluation / batch:.1f} ms an object")


if __name__ == "__main__":
    with one_line_errors():
        main()
