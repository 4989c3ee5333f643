"""Cross-modal self-training (Cross-MoST, arXiv 2404.10146): a zero-shot start, then training without labels.

    python train.py                                          # procedural objects, small start, no download
    python train.py --dataset modelnet10 --model tiny"""
import argparse
import atexit
import copy
import hashlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import timeit
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import Timeout
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import (DATASETS, Objects, UserError, dataset_row, draw_views, load_dataset, lock, random_yaw,
                  sample_shapes, training_photographs)
from eval import (CODE, COUNT, DEVICE, SHARE, WEIGHT, add_data_options, evaluate, number, one_line_errors,
                  option_parser, plot_curves, pseudo_label_quality, table, top_one, usable_device,
                  write_whole)
from losses import (cross_modal_alignment_loss, fairness_loss, masked_terms, name_alignment_loss,
                    pseudo_labels, self_training_loss)
from model import (GROUPS, OTHER_GROUPS, STARTS, TEMPLATES, CrossMoST, Groups, build_model, hide_groups,
                   hide_patches, parameter_groups, random_tiny, read_file, read_start, save_file, save_start,
                   start_file, teacher_momentum, train_mode, update_teacher)

# `tiny` is trained for hundreds of steps, not 10^5: a larger step, a lower threshold (its confidences are
# low); of its 4 x 4 patches few are hidden, and repainting them weighs little.
TINY = dict(epochs=3, batch_size=32, lr=2e-3, layer_decay=1.0, momentum=0.999, points=1024, views=12,
            threshold=[0.6], mask_ratio=0.1, w_fair=2.0, w_mim=0.1, w_mpm=0.1, w_gl=0.02,
            cross_temperature=0.07, precision="fp32")
# `tiny` on what a scanner sees is far from its start: the teacher follows sooner and longer, and `fairness`
# weighs more against the many wrong names of the first epochs (measured on `shapes`).
TINY_ON_SCANS = dict(epochs=10, momentum=0.99, w_fair=4.0)
TINY_ON_FOLDER = dict(epochs=20)  # mostly a few hundred objects: more passes make enough steps
MAY_CHANGE_ON_RESUME = ("out", "cache", "data_root", "download", "resume", "device", "log_every", "compile",
                        "grad_checkpointing", "benchmark", "stage")
NOT_THE_METHOD = (*MAY_CHANGE_ON_RESUME, "dataset", "model", "seed", "domain", "pretrain_epochs",
                  "start_checkpoint", "precision")


def defaults_of(chosen: argparse.Namespace) -> dict:
    """What holds for a data set and a start, in place of the original code's values that parse_args has."""
    start = read_start(chosen.start_checkpoint)["options"] if chosen.start_checkpoint else {}
    model = chosen.model or start.get("model") or ("tiny" if chosen.dataset == "shapes" else "ulip2")
    values = dataset_row(chosen.dataset) | GROUPS.get(model, OTHER_GROUPS)
    if chosen.labels == "separate" or chosen.modalities != "both":
        values["threshold"] = values["separate"]
    if model == "tiny":
        values |= TINY
        if chosen.dataset not in DATASETS:
            values |= TINY_ON_FOLDER
        elif (chosen.domain or chosen.dataset) in ("target", "shapes"):
            values |= TINY_ON_SCANS
    if chosen.dataset not in DATASETS and not chosen.shares:
        values["w_fair"] = 0.0  # a pull towards equal shares is wrong where most objects are chairs
    values |= {key: start[key] for key in ("points", "groups", "group_size") if start.get(key)}
    return {"model": model, "out": Path("runs", f"{Path(chosen.dataset).name}-{model.replace('/', '-')}"),
            **{key: value for key, value in values.items() if key in vars(chosen)}}


def parse_args(argv=None) -> argparse.Namespace:
    """All options, by default the original code's values and over them defaults_of; in `changed` those of the
    method that are others."""
    parser = option_parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("data").add_argument
    group("--dataset", default="shapes", help=f"{', '.join(DATASETS)}, or a folder of your own")
    add_data_options(group)
    group("--templates", choices=sorted(TEMPLATES), help="texts around a class name")
    group = parser.add_argument_group("start").add_argument
    group("--model", help=f"zero-shot start: {', '.join(STARTS)}, or an open_clip name")
    group("--pretrained", help="open_clip's weights of --model: a tag or a file")
    group("--start-checkpoint", type=Path, help="the start's file, of any family, instead of its own")
    group("--pretrain-epochs", type=COUNT, help="make a start of one's own: passes over procedural objects")
    group("--groups", type=COUNT, help="point groups per cloud")
    group("--group-size", type=COUNT, help="points per group")
    group("--cache", type=Path, default=Path("cache"), help="folder of fetched and pre-trained starts")
    group = parser.add_argument_group("method").add_argument
    group("--modalities", choices=("both", "image", "point"), default="both", help="what is trained")
    group("--labels", choices=("joint", "mean", "separate", "agree", "truth"), default="joint",
          help="joint-label: who names the objects; truth is an oracle that uses the real labels")
    group("--threshold", type=SHARE, nargs="+", help="joint-label: confidence to exceed; two if separate")
    group("--point-weight", type=WEIGHT, help="joint-label: factor on the point confidence")
    group("--w-fair", type=WEIGHT, default=1.0, help="fairness: weight; 0 removes it, as for all weights")
    group("--shares", type=WEIGHT, nargs="+", help="fairness: roughly how many objects of each class")
    group("--w-mim", type=WEIGHT, default=1.0, help="mim: weight")
    group("--w-mpm", type=WEIGHT, default=1.0, help="mpm: weight")
    group("--w-gl", type=WEIGHT, default=0.2, help="gl-align: weight, of both modalities")
    group("--w-cross", type=WEIGHT, default=1.0, help="cross-align: weight")
    group("--cross-temperature", type=number(1e-3), default=1.0, help="cross-align: divisor of similarities")
    group("--point-target", choices=("tokens", "points"), default="tokens", help="mpm: what is reconstructed")
    group("--mask-ratio", type=SHARE, default=0.3, help="share of patches and groups hidden; 0 hides nothing")
    group("--momentum", type=SHARE, default=0.9998, help="ema: after 400 steps, from 0.99 at the first")
    group = parser.add_argument_group("optimisation").add_argument
    group("--epochs", type=COUNT, default=200, help="passes over the training objects")
    group("--batch-size", type=COUNT, default=128, help="objects per step")
    group("--lr", type=WEIGHT, default=2e-5, help="peak learning rate for a batch of 256")
    group("--weight-decay", type=WEIGHT, default=0.05, help="AdamW, not on 1-D parameters")
    group("--layer-decay", type=SHARE, default=0.65, help="factor on lr for each image block below the last")
    group("--warmup-epochs", type=WEIGHT, default=1.0, help="epochs of linear warm-up")
    group("--freeze", nargs="*", default=["point_encoder.encoder"], help="parameters not trained, by prefix")
    group = parser.add_argument_group("run").add_argument
    group("--stage", choices=("pretrain", "train"), default="train", help="pretrain: only make the start")
    group("--out", type=Path, help="results folder (default: runs/DATASET-MODEL)")
    group("--seed", type=number(0, 2 ** 32, int), default=0, help="of a new start, views, order and masks")
    group("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue OUT/last.pt")
    group("--device", type=usable_device, default=DEVICE, help="where to compute")
    group("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: the faster one here")
    group("--compile", action="store_true", help="compile the encoders (minutes at first, then faster)")
    group("--grad-checkpointing", action="store_true", help="less memory: compute image blocks twice")
    group("--benchmark", action="store_true", help="time a step, and leave")
    group("--log-every", type=COUNT, default=10, help="steps per line of log.jsonl")
    argv = sys.argv[1:] if argv is None else argv
    chosen, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    parser.set_defaults(**defaults_of(chosen))
    args = parser.parse_args(argv)
    args.changed = {key: value for key, value in plain_options(args, NOT_THE_METHOD).items()
                    if value != parser.get_default(key)}
    return args


# ------ One step --------------------------------------------------------------------------------------------
def train_step(student, teacher, views, optimizer, step, total_steps, args, truth=None):
    """One update of the student, then of the teacher. Returns the detached terms and the labels used.

    `views` holds images and point clouds only; `truth` is None but for the oracle, --labels truth."""
    warmup, share = int(args.warmup_epochs * total_steps / args.epochs), args.batch_size / 256
    rate = learning_rate(step, total_steps, warmup, args.lr * share, 1e-6 * share)
    for group in optimizer.param_groups:
        group["lr"] = group["scale"] * rate

    # The teacher sees the weak views and names the objects [joint-label].
    labels = teacher_labels(teacher, views, args, truth)

    # The student must agree from the strong, masked views, align its modalities and repaint what was hidden.
    weights = {"self_image": 1, "self_point": 1, "fair_image": args.w_fair, "fair_point": args.w_fair,
               "mim": args.w_mim, "mpm": args.w_mpm, "gl_image": args.w_gl, "gl_point": args.w_gl,
               "cross": args.w_cross}
    terms = student_terms(student, views, labels, args)
    loss = sum(weights[name] * term for name, term in terms.items() if weights[name])
    terms = {name: term.detach() for name, term in {"loss": loss, **terms}.items()}

    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    sum_gradients(student)
    optimizer.step()
    update_teacher(teacher, student, teacher_momentum(step, args.momentum))
    return terms, labels


@torch.no_grad()
def teacher_labels(teacher: CrossMoST, views: dict, args, truth: Tensor | None) -> dict:
    """(labels, keep) for each trained modality, from the teacher's weak views [joint-label]."""
    probs = {"image": None, "point": None}
    if args.labels != "truth":
        images = None if args.modalities == "point" else teacher.normalise(my_share(views["weak_image"]))
        points = None if args.modalities == "image" else my_share(views["weak_points"])
        with networks_precision(args):
            out = whole_batch(teacher(images, points))
        for modality in ("image", "point") if args.modalities == "both" else (args.modalities,):
            probs[modality] = getattr(out, f"{modality}_logits").softmax(dim=-1)
    rule = "separate" if args.modalities != "both" and args.labels == "joint" else args.labels
    thresholds = args.threshold[0], args.threshold[-1]
    return pseudo_labels(rule, *probs.values(), thresholds, args.point_weight, truth)


def student_terms(student: CrossMoST, views: dict, labels: dict, args) -> dict[str, Tensor]:
    """Every term of the loss, by name, from the student's strong and masked views."""
    images = None if args.modalities == "point" else student.normalise(views["strong_image"])
    points = None if args.modalities == "image" else student.group(views["strong_points"])
    image_hidden = point_hidden = None
    if images is not None and args.mask_ratio > 0:
        grid = student.visual.grid_size[0]
        image_hidden = hide_patches(len(images), grid, args.mask_ratio, images.device)
    if points is not None and args.mask_ratio > 0:
        point_hidden = hide_groups(points.centres, args.mask_ratio)
    with networks_precision(args):
        out = whole_batch(student(*map(my_share, (images, points, image_hidden, point_hidden))))
    terms = masked_terms(out, images, image_hidden, point_hidden)
    for modality in ("image", "point") if args.modalities == "both" else (args.modalities,):
        logits = getattr(out, f"{modality}_logits")
        terms[f"self_{modality}"] = self_training_loss(logits, *labels[modality])
        terms[f"fair_{modality}"] = fairness_loss(logits, args.shares)
    if args.modalities == "both":
        features = out.image_features, out.point_features
        terms["cross"] = cross_modal_alignment_loss(*features, args.cross_temperature)
    return terms


def learning_rate(step: int, total: int, warmup: int, peak: float, floor: float) -> float:
    """Linear warm-up from 0 to peak, then a cosine to floor at the last step."""
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, total - 1 - warmup)
    return floor + (peak - floor) * (1 + math.cos(math.pi * min(1, done))) / 2


def networks_precision(args) -> torch.autocast:
    """Both networks in bfloat16 with --precision bf16; features, logits and losses stay in float32."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")


# ------ The loop --------------------------------------------------------------------------------------------
def self_train(run: "Run", objects: Objects, test: Objects, args):
    """The loop. Ctrl-C and SIGTERM let the step finish, save, and leave with exit code 130 or 143."""
    per_epoch = max(1, len(objects) // args.batch_size)
    total, size = args.epochs * per_epoch, run.student.visual.image_size[0]
    points = objects.points.to(run.device)
    train_mode(run.student, args.freeze)
    bar = tqdm(total=total, initial=run.step, desc="self-training", unit="step", disable=not leader())
    with bar, stops_caught() as caught:
        for epoch in range(run.step // per_epoch, args.epochs):
            shuffle = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
            batches = torch.randperm(len(points), generator=shuffle).split(args.batch_size)
            batches = batches[run.step % per_epoch:per_epoch]
            photographs = training_photographs(objects, batches, size, shuffle.initial_seed())
            for index, pictures in zip(batches, photographs):
                views = draw_views(points[index.to(run.device)], size, pictures)
                truth = None if objects.labels is None else objects.labels[index].to(run.device)
                terms, labels = train_step(run.student, run.teacher, views, run.optimizer, run.step, total,
                                           args, truth if args.labels == "truth" else None)
                run.count_step(terms, labels, truth)
                bar.update()
                if run.step % args.log_every == 0 or run.step % per_epoch == 0:
                    row = run.flush(epoch + 1)
                    bar.set_postfix(loss=f"{row['loss']:.2f}", coverage=f"{row['coverage']:.2f}")
                if caught:
                    break
            if run.step % per_epoch == 0 and test.labels is not None and leader():
                found = evaluate(run.teacher, test, args.views)
                run.log(epoch=epoch + 1, step=run.step, teacher=top_one(found))
            run.save()
            if caught:
                sys.exit(128 + caught[0])


@contextmanager
def stops_caught():
    """A list that Ctrl-C and SIGTERM fill, so that the step can finish."""
    caught = []
    stops = () if dist.is_initialized() else (signal.SIGINT, signal.SIGTERM)  # processes would stop apart
    with ExitStack() as undo:
        for stop in stops:
            before = signal.signal(stop, lambda number, _: caught.append(number))
            undo.callback(signal.signal, stop, before)
        yield caught


class Run:
    """What a run needs to go on to the bit, and what it was made by: options, classes, objects and code."""
    def __init__(self, student: CrossMoST, teacher: CrossMoST, optimizer, args, objects: int):
        self.student, self.teacher, self.optimizer, self.device = student, teacher, optimizer, args.device
        self.path, self.log_path = args.out / "last.pt", args.out / "log.jsonl"
        own = {"classes": student.class_names, "objects": objects, "code": CODE}
        self.options = plain_options(args) | own
        self.step, self.sums, self.count, self.last, self.before = 0, {}, 0, {}, None
        self.began = time.perf_counter()  # earlier by what the processes took that this one continues

    def log(self, **row):
        if leader():
            with open(self.log_path, "a") as file:
                file.write(json.dumps(row) + "\n")

    def count_step(self, terms: dict, labels: dict, truth: Tensor | None):
        """Add up terms and, as shares of the objects, each name and the right ones; modalities averaged."""
        classes = self.student.classifier.shape[1]
        given = [F.one_hot(label, classes) * keep[:, None] for label, keep in labels.values()]
        values = {**terms, "named": torch.stack(given).double().mean(dim=(0, 1))}
        if truth is not None:
            correct = [keep & (label == truth) for label, keep in labels.values()]
            values["correct"] = torch.stack(correct).double().mean()
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.double()
        self.check()  # the step before: waiting for this one would leave the device idle
        self.last, self.step, self.count = terms, self.step + 1, self.count + 1

    def check(self):
        """Raises: UserError where the last step's loss is not finite."""
        if self.last and not torch.isfinite(self.last["loss"]):
            terms = {name: term.item() for name, term in self.last.items()}
            raise UserError(f"loss is not finite at step {self.step - 1}: {terms}; lower --lr, or look at "
                            f"the data; {self.path} is of the last whole epoch, if there was one")

    def flush(self, epoch: int) -> dict:
        """Log the means since the last line, and return them."""
        self.check()
        means = {name: total / self.count for name, total in self.sums.items()}
        correct, coverage = means.pop("correct", None), means["named"].sum()
        kept = coverage.clamp(min=1e-12)
        means |= {"coverage": coverage, "entropy": torch.special.entr(means["named"] / kept).sum()}
        row = {name: value.tolist() for name, value in means.items()}
        row["label_accuracy"] = None if correct is None else (correct / kept).item()
        self.log(epoch=epoch, step=self.step, steps=self.count, **row)
        self.sums, self.count = {}, 0
        return row

    def save(self):
        self.check()
        if not leader():
            return
        states = {name: getattr(self, name).state_dict() for name in ("student", "teacher", "optimizer")}
        counters = {name: getattr(self, name) for name in ("options", "step", "sums", "count", "before")}
        save_file({**states, **counters, "architecture": self.student.architecture,
                   "log_bytes": self.log_path.stat().st_size, "seconds": time.perf_counter() - self.began,
                   "random": torch.get_rng_state(),
                   "cuda_random": torch.cuda.get_rng_state(self.device) if "cuda" in self.device else None},
                  self.path)

    def load(self):
        """Go back to last.pt. Raises: UserError where it is broken, or was made by other options or code."""
        saved = read_file(self.path)
        try:
            changed = {key: f"{saved['options'].get(key)} -> {value}" for key, value in self.options.items()
                       if saved["options"].get(key) != value}
            if changed:
                raise ValueError(f"it was made with other options, data or code ({changed})")
            for name in ("student", "teacher", "optimizer"):
                getattr(self, name).load_state_dict(saved[name])
            for name in ("step", "sums", "count", "before"):
                setattr(self, name, saved[name])
            self.began -= saved["seconds"]
            torch.set_rng_state(saved["random"])
            if "cuda" in self.device:
                torch.cuda.set_rng_state(saved["cuda_random"], self.device)
            whole = min(saved["log_bytes"], self.log_path.stat().st_size)
            os.truncate(self.log_path, whole)  # forget lines written after the checkpoint
        except Exception as error:  # a broken file in any way
            raise UserError(f"cannot continue {self.path}: {error}; use the same, another --out, or "
                            "--no-resume to start over") from error


def plain_options(args, may_change: tuple = MAY_CHANGE_ON_RESUME) -> dict:
    """Options as a file can keep them, without those that may be others when a run continues."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in sorted(vars(args).items())
            if key not in may_change}


# ------ A whole run -----------------------------------------------------------------------------------------
def main(argv=None) -> dict:
    """Run all of it. Returns what it writes to OUT/results.json."""
    join_processes()  # before anything opens a context on a GPU
    args = parse_args(argv)
    args.precision = settled_precision(args)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32; bfloat16 is the fast way
    objects, test = (load_dataset(args.dataset, args.data_root, split, args.points, args.domain,
                                  args.download, args.up) for split in ("train", "test"))
    refuse_contradictions(args, objects)
    untrained = args.benchmark and args.model not in STARTS  # as fast as any other
    start = None if untrained else find_start(args, objects)
    if args.stage == "pretrain":
        print(f"the start is {start}")
        return {"start": str(start)}
    student = build_model(args.model, objects.class_names, TEMPLATES[args.templates], args.pretrained, start,
                          groups=args.groups, group_size=args.group_size, target=args.point_target)
    student = student.to(args.device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    groups = parameter_groups(student, args.weight_decay, args.layer_decay, args.freeze)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    if args.compile:
        for part in (student.visual, student.point_encoder, teacher.visual, teacher.point_encoder):
            part.compile()
    student.visual.set_grad_checkpointing(args.grad_checkpointing)
    run = Run(student, teacher, optimizer, args, len(objects))
    if args.benchmark:
        return benchmark(run, objects, args)
    try:
        with lock(run.path, timeout=0) if leader() else nullcontext():
            return train_and_score(run, objects, test, args, start)
    except Timeout as error:
        raise UserError(f"another process writes to {args.out}; wait, or name another --out") from error


def settled_precision(args) -> str:
    """--precision, where `auto` becomes bf16 or fp32 once for the whole run: what OUT/last.pt was begun with,
    else bfloat16 where the device multiplies matrices at least 1.3 times as fast in it."""
    if args.precision != "auto":
        return args.precision
    last = args.out / "last.pt"
    if args.resume and not args.benchmark and last.exists():
        return read_file(last).get("options", {}).get("precision")  # None by other code: load() refuses it
    fast, exact = (product_speed(args.device, kind) for kind in (torch.bfloat16, torch.float32))
    gain = torch.tensor(fast / exact)
    if dist.is_initialized():
        dist.broadcast(gain, 0)  # the first process measures for all
    chosen = "bf16" if gain >= 1.3 else "fp32"
    print(f"--precision auto: {chosen}, a product in bfloat16 is {gain:.1f} x as fast as in float32 here")
    return chosen


def product_speed(device: str, kind: torch.dtype) -> float:
    """TFLOP/s of the device's own matrix product, on a CPU in ViT-B's shape, the best of five."""
    rows, inner, columns = (8192, 8192, 8192) if "cuda" in device else (512, 768, 3072)
    tokens, weight = (torch.ones(n, inner, device=device, dtype=kind) for n in (rows, columns))
    seconds = timeit.repeat(lambda: F.linear(tokens, weight)[0, 0].item(), number=1, repeat=5)
    return 2 * rows * inner * columns / 1e12 / min(seconds)


def refuse_contradictions(args, objects: Objects):
    """Raises: UserError for options that do not go together, or not with the data."""
    both, classes = args.modalities == "both", objects.class_names
    if args.labels == "truth" and objects.labels is None:
        raise UserError(f"--labels truth needs labels, {objects.name} has none; use --labels joint")
    if args.labels in ("mean", "agree") and not both:
        raise UserError(f"--labels {args.labels} needs both modalities; drop it, or --modalities")
    if args.stage == "pretrain" and (args.start_checkpoint or args.model in STARTS[1:]):
        raise UserError(f"{args.start_checkpoint or args.model} is a finished start; drop --stage pretrain")
    if len(args.threshold) > (2 if args.labels == "separate" or not both else 1):
        raise UserError("--threshold takes one value; two, image's and point's, go with --labels separate")
    if args.shares and (len(args.shares) != len(classes) or not sum(args.shares)):
        raise UserError(f"--shares has {args.shares}; expected numbers, not all 0, for {', '.join(classes)}")
    batch = min(args.batch_size, len(objects))
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if batch % processes:
        raise UserError(f"{processes} processes cannot share a batch of {batch} objects; change --batch-size")


def train_and_score(run: Run, objects: Objects, test: Objects, args, start: Path) -> dict:
    """Score the start, train, score again. Returns the results; they and the names are written to OUT."""
    torch.manual_seed(args.seed)
    names = args.out / "predictions.csv"
    if args.resume and run.path.exists():
        run.load()
        print(f"continuing {run.path} at step {run.step}")
    elif leader():
        run.log_path.write_text("")
        trainable = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
        run.log(options=plain_options(args, ()), start=start.stem, train=len(objects), test=len(test),
                trainable=trainable, **provenance(args.device))
        run.before = evaluate(run.student, test, args.views, names)
    results = {"dataset": objects.name, "split": test.split, "objects": len(test),
               "classes": len(test.class_names), "model": args.model, "start": start.stem, "seed": args.seed,
               "pretrain_epochs": args.pretrain_epochs, "precision": args.precision, "code": CODE,
               "epochs": args.epochs, "changed": args.changed, "commit": provenance(args.device)["commit"],
               "zero_shot": run.before and top_one(run.before)}
    print(table(results))
    shown = (*TINY, "groups", "group_size", "point_weight", "templates")
    print("settings:", ", ".join(f"{name} {getattr(args, name)}" for name in shown))
    self_train(run, objects, test, args)
    if not leader():
        return results
    student, teacher = evaluate(run.student, test, args.views), evaluate(run.teacher, test, args.views, names)
    results |= {"student": top_one(student), "teacher": top_one(teacher),
                "teacher_per_class": teacher.get("per_class"),
                "agreement": {"start": run.before["agreement"], "teacher": teacher["agreement"]},
                "shares": {"start": run.before["shares"], "teacher": teacher["shares"]},
                "pseudo_label": pseudo_label_quality(run.log_path, args.epochs),
                "seconds": round(time.perf_counter() - run.began, 1)}
    write_whole(args.out / "curves.png", plot_curves, run.log_path, results["zero_shot"])
    write_whole(args.out / "results.json", Path.write_text, json.dumps(results, indent=1))
    print(f"\n{table(results)}\npseudo-labels of the last epoch, %: {results['pseudo_label']}")
    print_opinions(run.before, teacher)
    print(f"a name for each object: {names}")
    return results


def print_opinions(before: dict, after: dict):
    """Say without labels what training changed, and warn where that was seen to do harm."""
    print(f"image and point agree on {before['agreement']} % of the objects before training, "
          f"{after['agreement']} % after")
    print("share of each name before -> after, %:", ", ".join(
        f"{name} {share:.0f} -> {after['shares'][name]:.0f}" for name, share in before["shares"].items()))
    entropy = [torch.special.entr(torch.tensor([*row["shares"].values()]) / 100).sum()
               for row in (before, after)]
    signs = {"image and point agreed on few objects before training": before["agreement"] < 65,
             "they agree on fewer objects than before": after["agreement"] < before["agreement"] - 1,
             "a few names have taken the place of others": entropy[1] < entropy[0] - 0.1}
    said = ", and ".join(sign for sign, seen in signs.items() if seen)
    if said:
        print(f"warning: {said}: training may have done harm. Look at the names; list only names that occur, "
              "or say roughly how many objects of each there are (--shares)", file=sys.stderr)


def provenance(device: str) -> dict:
    """Versions, commit and device, for the first line of the log."""
    name = torch.cuda.get_device_name(device) if "cuda" in device else f"{os.cpu_count()} CPU cores"
    git = f"git --no-optional-locks -C '{Path(__file__).parent}'"  # writes nothing there
    commit = subprocess.getoutput(f"{git} describe --always --dirty")
    return {"python": sys.version.split()[0], "torch": str(torch.__version__),
            "open_clip": open_clip.__version__, "commit": commit, "device": name}


# ------ Pre-training of a start -----------------------------------------------------------------------------
PRETRAIN_VERSION = 2  # raised when what follows, the procedural objects or the small networks change
# Objects, passes, batch, peak learning rate, weight decay: of `tiny`, and of a point encoder alone (ULIP's).
PRETRAIN = {"tiny": (12000, 10, 32, 1e-3, 0.05), "clip": (4000, 12, 64, 5e-4, 0.1)}


def find_start(args, target: Objects) -> Path:
    """The start's file: the one named, in the repository, fetched, or pre-trained here. The latter is kept in
    --cache, under a hash of the options that made it and, where the target's clouds were used, of these."""
    own = args.pretrain_epochs or args.stage == "pretrain" or args.dataset == "shapenet55"
    if args.start_checkpoint or args.model in STARTS and not (args.model == "tiny" and own):
        return args.start_checkpoint or start_file(args.model, args.cache, args.download)
    made_by = {key: getattr(args, key) for key in ("model", "pretrained", "pretrain_epochs", "groups",
                                                   "group_size", "seed", "points")}
    if args.model != "tiny" or args.dataset == "shapenet55":
        clouds = hashlib.sha256(target.points.numpy().tobytes()).hexdigest()
        made_by |= {"templates": args.templates, "up": args.up, "data_root": str(args.data_root.resolve()),
                    "target": target.name, "clouds": clouds}
    key = json.dumps([PRETRAIN_VERSION, PRETRAIN, made_by])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = args.cache / f"{args.model.replace('/', '-')}-{digest}.pt"
    with lock(path):
        if not path.exists():
            pretrain(args, target, args.device, path)
    return path


def pretrain(args, target: Objects, device, path: Path):
    """Align the modalities of a start without labels of the target, into a file in half precision [pretrain].

    `tiny`: image, point and text tower together, on procedural objects. An open_clip model: the point encoder
    to the frozen towers (ULIP), on procedural objects with their names and the target's clouds without.
    ShapeNet-55 as the target lends its names too."""
    tiny, shapenet = args.model == "tiny", args.dataset == "shapenet55"
    count, passes, batch, lr, weight_decay = PRETRAIN["tiny" if tiny else "clip"]
    source = target if shapenet else sample_shapes(count, seed=1000 + args.seed, points=args.points)
    clouds, labels = source.points, source.labels
    point = {"groups": args.groups, "group_size": args.group_size}
    if tiny:
        model, text = (part.to(device).train() for part in random_tiny(args.seed, **point))
    else:
        model, text = build_model(args.model, source.class_names, TEMPLATES[args.templates], args.pretrained,
                                  seed=args.seed, **point).to(device).train(), None
        model.visual.requires_grad_(False).eval()
        if not shapenet:
            clouds = torch.cat([clouds, target.points])
            labels = torch.cat([labels, torch.full((len(target),), -1)])
    parameters = [p for part in (model, text) if part for p in part.parameters() if p.requires_grad]
    torch.manual_seed(args.seed)
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    passes = args.pretrain_epochs or passes
    batches = [index for _ in range(passes)
               for index in torch.randperm(len(clouds)).split(batch) if len(index) == batch]
    schedule = OneCycleLR(optimizer, lr, len(batches), pct_start=0.05, cycle_momentum=False)
    for index in tqdm(batches, f"pre-training {args.model}", unit="step"):
        loss = pretrain_loss(model, text, clouds[index].to(device), labels[index], source.class_names)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    model.classifier = None
    save_start(model, text, {**plain_options(args), "pretrain_epochs": passes, **provenance(device)}, path)


def pretrain_loss(model, text, points, labels, class_names) -> Tensor:
    """Half the InfoNCE image-text, point-text and point-image, and a little masked modelling. (B, P, 3)

    labels (B,) on the CPU: index of the name, -1 where there is none. Without a `text` tower to train the
    names are the classifier's columns, and the image tower is taken as it is."""
    batch, device = len(points), points.device
    named = (labels >= 0).nonzero()[:, 0]  # on the CPU, so that nothing waits for a GPU
    views = draw_views(random_yaw(points), model.visual.image_size[0])
    strong = torch.rand(2, batch, 1, 1, device=device) < 0.5
    images = model.normalise(torch.where(strong[0, ..., None], views["strong_image"], views["weak_image"]))
    groups = model.group(torch.where(strong[1], views["strong_points"], views["weak_points"]))
    masked = torch.rand(2, batch, 1, device=device) < 0.25
    image_hidden = hide_patches(batch, model.visual.grid_size[0], 0.3, device) & masked[0] if text else None
    point_hidden = hide_groups(groups.centres, 0.3) & masked[1]
    out = model(images, groups, image_hidden, point_hidden)
    named, labels, scale = named.to(device), labels[named].to(device), model.logit_scale.exp()
    aligned = cross_modal_alignment_loss(out.image_features, out.point_features, 1 / scale) / 2
    if text:
        template = TEMPLATES["depth"][torch.randint(len(TEMPLATES["depth"]), ())]
        names = text([template.format(name) for name in class_names])
        aligned = aligned + name_alignment_loss(out.image_features[named], names, labels, scale)
    else:
        names = model.classifier.detach().T
    if len(named):
        aligned = aligned + name_alignment_loss(out.point_features[named], names, labels, scale)
    terms = masked_terms(out, images, image_hidden, point_hidden)
    weights = {"mim": 0.1, "mpm": 0.1, "gl_image": 0.02, "gl_point": 0.02}
    return aligned / 2 + sum(weights[name] * term for name, term in terms.items())


# ------ Several GPUs: torchrun's processes share each batch -------------------------------------------------
def join_processes():
    """Started by torchrun: become one of its processes, with a GPU of its own."""
    if "LOCAL_RANK" not in os.environ:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # `cuda` is this one from now on
    dist.init_process_group(timeout=timedelta(days=1))  # the others wait while the first evaluates
    atexit.register(dist.destroy_process_group)
    if not leader():
        sys.stdout = open(os.devnull, "w")


def leader() -> bool:
    """Whether this process writes: the only one, or torchrun's first."""
    return not dist.is_initialized() or dist.get_rank() == 0


def my_share(batch):
    """Under torchrun this process's part of a whole batch (a tensor, or Groups); otherwise all of it."""
    if batch is None or not dist.is_initialized():
        return batch
    if isinstance(batch, Groups):
        return Groups(*map(my_share, batch))
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def whole_batch(out):
    """Under torchrun the outputs of all processes, in order: losses see the whole batch. Gradient flows into
    this process's own part only, which makes each process's gradient its share of the whole one."""
    if dist.is_initialized():
        for name, own in vars(out).items():
            parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, own.detach().contiguous())
            parts[dist.get_rank()] = own
            setattr(out, name, torch.cat(parts))
    return out


def sum_gradients(student: CrossMoST):
    """Under torchrun the sum of the processes' shares of the gradient."""
    for parameter in student.parameters() if dist.is_initialized() else ():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)


# ------ Benchmark -------------------------------------------------------------------------------------------
def benchmark(run: Run, objects: Objects, args) -> dict:
    """Print and return a step's median seconds, its work, and how fast the device multiplies matrices in the
    same precision. Photographs are decoded before."""
    size = run.student.visual.image_size[0]
    some = objects.pick(torch.arange(args.batch_size) % len(objects))
    points, truth = some.points.to(args.device), torch.zeros(len(some), dtype=torch.long, device=args.device)
    pictures = next(iter(training_photographs(some, (torch.arange(len(some)),), size, seed=0)))
    train_mode(run.student, args.freeze)

    def step():
        views = draw_views(points, size, pictures)
        terms, _ = train_step(run.student, run.teacher, views, run.optimizer, 0, 1000, args, truth)
        terms["loss"].item()  # waits for a GPU
    took = statistics.median(timeit.repeat(step, number=1, repeat=11)[1:])  # the first one compiles
    with FlopCounterMode(display=False) as counter:
        step()
    work = counter.get_total_flops() / 1e12
    kind = torch.bfloat16 if args.precision == "bf16" else torch.float32
    peak = product_speed(args.device, kind)
    print(f"{args.model}, batch {len(some)}, {kind}{', compiled' * args.compile}, {provenance(args.device)}")
    print(f"{1000 * took:.1f} ms a step, {len(some) / took:.1f} objects/s, {work / took:.2f} TFLOP/s, "
          f"{100 * work / took / peak:.0f} % of a matrix product's {peak:.2f}; "
          f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB of GPU memory")
    return {"step": took, "tflop": work, "peak": peak}


if __name__ == "__main__":
    with one_line_errors():
        main()
