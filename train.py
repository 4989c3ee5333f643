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
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
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
from eval import (COUNT, DEVICE, MODALITIES, SHARE, WEIGHT, accuracy, add_data_options, evaluate, number,
                  one_line_errors, opinions, option_parser, out_of_memory, plot_curves, predict,
                  pseudo_label_quality, table, usable_device, write_predictions)
from losses import (cross_modal_alignment_loss, fairness_loss, masked_terms, name_alignment_loss,
                    pseudo_labels, self_training_loss)
from model import (GROUPS, OTHER_GROUPS, STARTS, TEMPLATES, CrossMoST, Groups, Output, build_model,
                   describe_start, hide_groups, hide_patches, parameter_groups, random_tiny, read_file,
                   save_file, save_start, start_file, teacher_momentum, train_mode, update_teacher,
                   whole_file)

# The original code's values. What a data set has of its own, DATASETS, comes before them.
PAPER = dict(epochs=200, batch_size=128, lr=2e-5, layer_decay=0.65, momentum=0.9998,
             mask_ratio=0.3, w_fair=1.0, w_mim=1.0, w_mpm=1.0, w_gl=0.2, cross_temperature=1.0,
             precision="auto")
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
    """What holds in a run where its options do not say otherwise: the paper's values, then the data set's,
    then the start's."""
    start = describe_start(chosen.start_checkpoint) if chosen.start_checkpoint else {}
    model = chosen.model or start.get("model") or ("tiny" if chosen.dataset == "shapes" else "ulip2")
    row = {key: value for key, value in dataset_row(chosen.dataset).items() if key not in ("load", "up")}
    separate = row.pop("separate")
    row["threshold"] = [row["threshold"]]
    if chosen.labels == "separate" or chosen.modalities != "both":
        row["threshold"] = list(separate)
    values = {**PAPER, **row, **GROUPS.get(model, OTHER_GROUPS)}
    if model == "tiny":
        values |= TINY
        if chosen.dataset not in DATASETS:
            values |= TINY_ON_FOLDER
        elif (chosen.domain or chosen.dataset) in ("target", "shapes"):
            values |= TINY_ON_SCANS
    if chosen.dataset not in DATASETS and not chosen.shares:
        values["w_fair"] = 0.0  # a pull towards equal shares is wrong where most objects are chairs
    values |= {key: start[key] for key in ("points", "groups", "group_size") if key in start}
    return {"model": model, "out": Path("runs", f"{Path(chosen.dataset).name}-{model.replace('/', '-')}"),
            **values}


def parse_args(argv=None) -> argparse.Namespace:
    """All options, with the defaults of defaults_of for the data set and the start that `argv` names; in
    `changed` those of the method that are others than these defaults."""
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
    group("--threshold", type=SHARE, nargs="+",
          help="joint-label: confidence to exceed; with --labels separate one of images and one of points")
    group("--point-weight", type=WEIGHT, help="joint-label: factor on the point confidence")
    group("--w-fair", type=WEIGHT, help="fairness: weight; 0 removes it, as for all weights")
    group("--shares", type=WEIGHT, nargs="+",
          help="fairness: how many objects of each class you expect, roughly, in the classes' order")
    group("--w-mim", type=WEIGHT, help="mim: weight")
    group("--w-mpm", type=WEIGHT, help="mpm: weight")
    group("--w-gl", type=WEIGHT, help="gl-align: weight, of both modalities")
    group("--w-cross", type=WEIGHT, default=1.0, help="cross-align: weight")
    group("--cross-temperature", type=number(1e-3), help="cross-align: divisor of the similarities")
    group("--point-target", choices=("tokens", "points"), default="tokens", help="mpm: what is reconstructed")
    group("--mask-ratio", type=SHARE, help="share of patches and of groups hidden; 0 hides nothing")
    group("--momentum", type=SHARE, help="ema: momentum after 400 steps, from 0.99 at the first")
    group = parser.add_argument_group("optimisation").add_argument
    group("--epochs", type=COUNT, help="passes over the training objects")
    group("--batch-size", type=COUNT, help="objects per step")
    group("--lr", type=WEIGHT, help="peak learning rate for a batch of 256")
    group("--weight-decay", type=WEIGHT, default=0.05, help="AdamW, not on 1-D parameters")
    group("--layer-decay", type=SHARE, help="factor on the learning rate for each image block below the last")
    group("--warmup-epochs", type=WEIGHT, default=1.0, help="epochs of linear warm-up")
    group("--freeze", nargs="*", default=["point_encoder.encoder"], help="parameters not trained, by prefix")
    group = parser.add_argument_group("run").add_argument
    group("--stage", choices=("pretrain", "train"), default="train", help="pretrain: only make the start")
    group("--out", type=Path, help="results folder (default: runs/DATASET-MODEL)")
    group("--seed", type=number(0, 2 ** 32, int), default=0, help="of a new start, views, order and masks")
    group("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue OUT/last.pt")
    group("--device", type=usable_device, default=DEVICE, help="where to compute")
    group("--precision", choices=("auto", "bf16", "fp32"),
          help="of the networks; auto: the faster one here, kept by the whole run")
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


# -----------------------------------------------------------------------------------------------------------
# One step

def train_step(student, teacher, views, optimizer, step, total_steps, args, truth=None):
    """One update of the student, then of the teacher. Returns the detached terms and the labels used.

    `views` holds images and point clouds only; `truth` is None but for the oracle, --labels truth."""
    for group in optimizer.param_groups:
        warmup, share = int(args.warmup_epochs * total_steps / args.epochs), args.batch_size / 256
        group["lr"] = group["scale"] * learning_rate(step, total_steps, warmup, args.lr * share, 1e-6 * share)

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
    image_probs = point_probs = None
    if args.labels != "truth":
        images = points = None
        if args.modalities != "point":
            images = teacher.normalise(my_share(views["weak_image"]))
        if args.modalities != "image":
            points = my_share(views["weak_points"])
        with networks_precision(args):
            out = whole_batch(teacher(images, points))
        if images is not None:
            image_probs = out.image_logits.softmax(dim=-1)
        if points is not None:
            point_probs = out.point_logits.softmax(dim=-1)
    rule = "separate" if args.modalities != "both" and args.labels == "joint" else args.labels
    thresholds = args.threshold[0], args.threshold[-1]
    return pseudo_labels(rule, image_probs, point_probs, thresholds, args.point_weight, truth)


def student_terms(student: CrossMoST, views: dict, labels: dict, args) -> dict[str, Tensor]:
    """Every term of the loss, by name, from the student's strong and masked views."""
    images = points = image_hidden = point_hidden = None
    if args.modalities != "point":
        images = student.normalise(views["strong_image"])
        if args.mask_ratio > 0:
            grid = student.visual.grid_size[0]
            image_hidden = hide_patches(len(images), grid, args.mask_ratio, images.device)
    if args.modalities != "image":
        points = student.group(views["strong_points"])
        if args.mask_ratio > 0:
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
    """Both networks in bfloat16 with --precision bf16; features, logits and losses stay in float32. `auto` is
    settled before the first step (settled_precision)."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16")


# -----------------------------------------------------------------------------------------------------------
# The loop

def self_train(run: "Run", objects: Objects, test: Objects, args):
    """The loop. Ctrl-C and SIGTERM let the step finish, save, and leave with exit code 130 or 143."""
    per_epoch = max(1, len(objects) // args.batch_size)
    total, size = args.epochs * per_epoch, run.student.visual.image_size[0]
    points, truth = objects.points.to(run.device), objects.labels
    truth = None if truth is None else truth.to(run.device)
    train_mode(run.student, args.freeze)
    bar = tqdm(total=total, initial=run.step, desc="self-training", unit="step", disable=not leader())
    with bar, stops_caught() as caught:
        while run.step < total and not caught:
            epoch, at = divmod(run.step, per_epoch)
            shuffle = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
            batches = torch.randperm(len(points), generator=shuffle).split(args.batch_size)[at:per_epoch]
            photographs = training_photographs(objects, batches, size, shuffle.initial_seed())
            for index, pictures in zip(batches, photographs):
                index = index.to(run.device)
                real = None if truth is None else truth[index]
                views = draw_views(points[index], size, pictures)
                terms, labels = train_step(run.student, run.teacher, views, run.optimizer, run.step, total,
                                           args, real if args.labels == "truth" else None)
                run.count_step(terms, labels, real)
                bar.update()
                if run.step % args.log_every == 0 or run.step % per_epoch == 0:
                    row = run.flush(epoch + 1)
                    bar.set_postfix(loss=f"{row['loss']:.2f}", coverage=f"{row['coverage']:.2f}")
                if caught:
                    break
            if run.step % per_epoch == 0 and test.labels is not None and leader():
                found = evaluate(run.teacher, test, args.views)
                run.log(epoch=epoch + 1, step=run.step, teacher={name: found[name] for name in MODALITIES})
            run.save()
    if caught:
        sys.exit(128 + caught[0])


@contextmanager
def stops_caught():
    """A list that Ctrl-C and SIGTERM fill, so that the step can finish."""
    caught = []
    stops = () if dist.is_initialized() else (signal.SIGINT, signal.SIGTERM)  # processes would stop apart
    before = {stop: signal.signal(stop, lambda number, _: caught.append(number)) for stop in stops}
    try:
        yield caught
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)


class Run:
    """What a run needs to go on to the bit: models, optimiser, step, random state, log position, sums."""

    def __init__(self, student, teacher, optimizer, args):
        self.student, self.teacher, self.optimizer, self.device = student, teacher, optimizer, args.device
        self.path, self.log_path = args.out / "last.pt", args.out / "log.jsonl"
        self.options = plain_options(args)
        self.step, self.sums, self.count, self.last, self.before = 0, {}, 0, {}, None
        self.seconds_before, self.began = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of this process and, up to what they saved, of those it continues."""
        return self.seconds_before + time.perf_counter() - self.began

    def log(self, **row):
        if not leader():
            return
        with open(self.log_path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def count_step(self, terms: dict, labels: dict, truth: Tensor | None):
        """Add up terms and, class by class, names given and, where the truth is known, rightly given; shares
        of the objects, modalities averaged."""
        classes = self.student.classifier.shape[1]
        given = {m: F.one_hot(label, classes) * keep[:, None] for m, (label, keep) in labels.items()}
        values = {**terms, "named": torch.stack([*given.values()]).double().mean(dim=(0, 1))}
        if truth is not None:
            correct = [given[m] * (label == truth)[:, None] for m, (label, _) in labels.items()]
            values["correct"] = torch.stack(correct).double().mean(dim=(0, 1))
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
        """Log the means since the last line and return them; starts new sums."""
        self.check()
        means = {name: total / self.count for name, total in self.sums.items()}
        named, correct = means.pop("named"), means.pop("correct", None)
        kept, known = named.sum().clamp(min=1e-12), correct is not None
        row = {"coverage": named.sum(), "entropy": torch.special.entr(named / kept).sum(), "named": named,
               "label_accuracy": correct.sum() / kept if known else None,
               "label_accuracy_by_class": correct / named.clamp(min=1e-12) if known else None, **means}
        row = {name: value if value is None else value.tolist() for name, value in row.items()}
        self.log(epoch=epoch, step=self.step, steps=self.count, **row)
        self.sums, self.count = {}, 0
        return row

    def save(self):
        self.check()
        if not leader():
            return
        counters = ("options", "step", "sums", "count", "before", "seconds")
        save_file({**{name: getattr(self, name).state_dict() for name in ("student", "teacher", "optimizer")},
                   **{key: getattr(self, key) for key in counters},
                   "architecture": self.student.architecture, "log_bytes": self.log_path.stat().st_size,
                   "code": CODE, "random": torch.get_rng_state(),
                   "cuda_random": torch.cuda.get_rng_state(self.device) if "cuda" in self.device else None},
                  self.path)

    def load(self):
        """Go back to last.pt. Raises: UserError where it was made with other options or other code."""
        saved = read_file(self.path, "student", "teacher", "optimizer", "random", "options", "log_bytes")
        changed = {key: f"{saved['options'].get(key)} -> {value}" for key, value in self.options.items()
                   if saved["options"].get(key) != value}
        if changed:
            raise UserError(f"{self.path} was made with other options ({changed}); use the same, "
                            "another --out, or --no-resume to start over")
        if saved.get("code") != CODE:
            raise UserError(f"{self.path} was made by other code than is here now; --no-resume starts over, "
                            "another --out keeps it")
        try:
            names = saved["architecture"]["class_names"]
            if names != self.student.class_names:
                raise ValueError(f"it is of the classes {names}, the data have {self.student.class_names}")
            for name in ("student", "teacher", "optimizer"):
                getattr(self, name).load_state_dict(saved[name])
            for name in ("step", "sums", "count", "before"):
                setattr(self, name, saved[name])
            self.seconds_before = saved["seconds"]
            torch.set_rng_state(saved["random"])
            if "cuda" in self.device:
                torch.cuda.set_rng_state(saved["cuda_random"], self.device)
        except Exception as error:  # a broken file in any way
            raise UserError(f"cannot continue {self.path}: {error}; --no-resume starts over") from error
        with open(self.log_path, "a") as file:  # forget lines written after the checkpoint
            file.truncate(min(saved["log_bytes"], self.log_path.stat().st_size))


def plain_options(args, may_change: tuple = MAY_CHANGE_ON_RESUME) -> dict:
    """Options as a file can keep them, without those that may be others when a run continues."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in sorted(vars(args).items())
            if key not in may_change}


# Read now: the files may change while a run lasts. A fork's run does not go on from what other code did.
CODE = hashlib.sha256(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in (
    "losses", "model", "data", "eval", "train"))).hexdigest()


# -----------------------------------------------------------------------------------------------------------
# A whole run

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
    run = Run(student, teacher, optimizer, args)
    run.options["objects"] = len(objects)
    if args.benchmark:
        return benchmark(run, objects, args)
    results = {"dataset": objects.name, "split": test.split, "objects": len(test),
               "classes": len(test.class_names), "model": args.model, "start": start.stem, "seed": args.seed,
               "epochs": args.epochs, "changed": args.changed, "commit": provenance(args.device)["commit"]}
    if args.stage == "pretrain":
        probs = predict(student, test, args.views)
        results["zero_shot"] = accuracy(probs, test) if test.labels is not None else None
        print(f"{table(results)}\nthe start is {start}")
        return results
    with sole_use(run.path) if leader() else nullcontext():
        train_and_score(run, objects, test, args, results)
    return results


def settled_precision(args) -> str:
    """--precision, where `auto` becomes bf16 or fp32 once for the whole run: what OUT/last.pt was begun with,
    else bfloat16 on a GPU that computes in it, and on a CPU that multiplies 1.3 times as fast in it."""
    if args.precision != "auto":
        return args.precision
    last = args.out / "last.pt"
    if args.resume and not args.benchmark and last.exists():
        return read_file(last, "options")["options"].get("precision")  # None by other code: load() refuses it
    if torch.device(args.device).type == "cuda":
        fast, why = torch.cuda.is_bf16_supported(including_emulation=False), "what this GPU computes in"
    else:
        gain = bfloat16_gain()
        fast, why = gain >= 1.3, f"a product in bfloat16 is {gain:.1f} x as fast as in float32 on this CPU"
    chosen = "bf16" if fast else "fp32"
    print(f"--precision auto: {chosen}, {why}")
    return chosen


def bfloat16_gain(repeats: int = 5) -> float:
    """How many times as fast as in float32 this CPU multiplies matrices of ViT-B's shape in bfloat16, the
    best of `repeats`; measured by torchrun's first process for all."""
    seconds = {torch.float32: [], torch.bfloat16: []}
    for kind in [*seconds] * repeats:
        tokens, weight = torch.ones(512, 768, dtype=kind), torch.ones(3072, 768, dtype=kind)
        began = time.perf_counter()
        F.linear(tokens, weight)
        seconds[kind].append(time.perf_counter() - began)
    gain = torch.tensor(min(seconds[torch.float32]) / min(seconds[torch.bfloat16]))
    if dist.is_initialized():
        dist.broadcast(gain, 0)
    return gain.item()


def sole_use(path: Path):
    """A lock to hold (`with`). Raises: UserError where another process has it."""
    try:
        return lock(path, timeout=0).acquire()
    except Timeout as error:
        raise UserError(f"another process writes to {path.parent}; wait for it, or name another --out"
                        ) from error


def refuse_contradictions(args, objects: Objects):
    """Raises: UserError for options that do not go together, or not with the data."""
    if args.labels == "truth" and objects.labels is None:
        raise UserError(f"--labels truth needs labels, {objects.name} has none; use --labels joint")
    if args.labels in ("mean", "agree") and args.modalities != "both":
        raise UserError(f"--labels {args.labels} needs both modalities; drop it, or --modalities")
    if args.stage == "pretrain" and (args.start_checkpoint or args.model in STARTS[1:]):
        raise UserError(f"{args.start_checkpoint or args.model} is a finished start; drop --stage pretrain")
    if len(args.threshold) > 2 or len(args.threshold) == 2 and (
            args.labels != "separate" and args.modalities == "both"):
        raise UserError("--threshold takes one value; two, of images and of points, go with --labels "
                        "separate")
    if args.shares and (len(args.shares) != len(objects.class_names) or not sum(args.shares)):
        raise UserError(f"--shares has {args.shares}; expected {len(objects.class_names)} numbers, not all "
                        f"0, for {', '.join(objects.class_names)}")
    batch = min(args.batch_size, len(objects))
    if dist.is_initialized() and batch % dist.get_world_size():
        raise UserError(f"{dist.get_world_size()} processes cannot share a batch of {batch} objects; choose "
                        "--batch-size or their number otherwise")


def train_and_score(run: Run, objects: Objects, test: Objects, args, results: dict):
    """Score the start, train, score again: into `results`, the standard output and OUT."""
    torch.manual_seed(args.seed)
    if args.resume and run.path.exists():
        run.load()
        print(f"continuing {run.path} at step {run.step}")
    elif leader():
        run.log_path.write_text("")
        trainable = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
        run.log(options=plain_options(args, ()), start=results["start"], train=len(objects), test=len(test),
                trainable=trainable, **provenance(args.device))
        probs, run.before = score(run.student, test, args)
        write_names(probs, test, args)
    results["zero_shot"] = run.before and run.before["accuracy"]
    print(table(results))
    shown = (*TINY, "groups", "group_size", "point_weight", "templates")
    print("settings:", ", ".join(f"{name} {getattr(args, name)}" for name in shown))
    try:
        self_train(run, objects, test, args)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory at --batch-size {args.batch_size}; lower it, --groups or --points, "
                        "or add --grad-checkpointing") from error
    if not leader():
        return
    _, student = score(run.student, test, args)
    probs, after = score(run.teacher, test, args)
    results |= {"student": student["accuracy"], "teacher": after["accuracy"],
                "teacher_per_class": after["per_class"],
                "agreement": {"start": run.before["agreement"], "teacher": after["agreement"]},
                "shares": {"start": run.before["shares"], "teacher": after["shares"]},
                "pseudo_label": pseudo_label_quality(run.log_path, args.epochs),
                "seconds": round(run.seconds, 1)}
    write_names(probs, test, args)
    zero_shot = results["zero_shot"]
    for name, write in {"curves.png": lambda path: plot_curves(run.log_path, path, zero_shot),
                        "results.json": lambda path: path.write_text(json.dumps(results, indent=1))}.items():
        with whole_file(args.out / name) as path:
            write(path)
    print(f"\n{table(results)}\npseudo-labels of the last epoch, %: {results['pseudo_label']}")
    print_opinions(run.before, after)
    print(f"a name for each object: {args.out / 'predictions.csv'}")


def score(model: CrossMoST, test: Objects, args) -> tuple[dict, dict]:
    """Probabilities, and what they tell: accuracy (None without labels), agreement, shares."""
    probs = predict(model, test, args.views)
    found = accuracy(probs, test) if test.labels is not None else {}
    return probs, {"per_class": found.pop("per_class", None), "accuracy": found or None,
                   **opinions(probs, test.class_names)}


def write_names(probs: dict, test: Objects, args):
    with whole_file(args.out / "predictions.csv") as path:
        write_predictions(path, test, probs)


def print_opinions(before: dict, after: dict):
    """Say without labels what training changed, and warn where that was seen to do harm."""
    print(f"image and point agree on {before['agreement']} % of the objects before training, "
          f"{after['agreement']} % after")
    shares = [f"{name} {share:.0f} -> {after['shares'][name]:.0f}"
              for name, share in before["shares"].items()]
    print("share of each name before -> after, %:", ", ".join(shares))
    entropy = [torch.special.entr(torch.tensor([*row["shares"].values()]) / 100).sum().item()
               for row in (before, after)]
    signs = {"image and point agreed on few objects before training": before["agreement"] < 65,
             "they agree on fewer objects than before": after["agreement"] < before["agreement"] - 1,
             "a few names have taken the place of others": entropy[1] < entropy[0] - 0.1}
    if any(signs.values()):
        said = ", and ".join(sign for sign, seen in signs.items() if seen)
        print(f"warning: {said}: training may have done harm. Look at the names; list only names that occur, "
              "or say roughly how many objects of each there are (--shares)", file=sys.stderr)


def provenance(device: str) -> dict:
    """Versions, commit and device, for the first line of the log."""
    name = torch.cuda.get_device_name(device) if "cuda" in device else f"{os.cpu_count()} CPU cores"
    git = f"git --no-optional-locks -C '{Path(__file__).parent}'"  # writes nothing there
    commit = subprocess.getoutput(f"{git} describe --always --dirty")
    return {"python": sys.version.split()[0], "torch": str(torch.__version__),
            "open_clip": open_clip.__version__, "commit": commit, "device": name}


# -----------------------------------------------------------------------------------------------------------
# Pre-training of a start

PRETRAIN_VERSION = 2  # raised when what follows, the procedural objects or the small networks change
# Objects, passes, batch, peak learning rate, weight decay; of `tiny`, and of a point encoder beside a CLIP
# (ULIP's).
PRETRAIN = {"tiny": (12000, 10, 32, 1e-3, 0.05), "clip": (4000, 12, 64, 5e-4, 0.1)}


def find_start(args, target: Objects) -> Path:
    """The start's file: the one named, in the repository, fetched, or pre-trained here. The latter is kept in
    --cache, under a hash of the options that made it and, where the target's clouds were used, of these."""
    own = args.pretrain_epochs or args.stage == "pretrain" or args.dataset == "shapenet55"
    if args.start_checkpoint or args.model in STARTS and not (args.model == "tiny" and own):
        return args.start_checkpoint or start_file(args.model, args.cache, args.download is not False)
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
        parameters = [p for part in (model, text) for p in part.parameters() if p.requires_grad]
    else:
        model, text = build_model(args.model, source.class_names, TEMPLATES[args.templates], args.pretrained,
                                  seed=args.seed, **point).to(device).train(), None
        model.visual.requires_grad_(False).eval()
        parameters = [*model.point_encoder.parameters(), model.pc_projection, model.logit_scale]
        if not shapenet:
            clouds = torch.cat([clouds, target.points])
            labels = torch.cat([labels, torch.full((len(target),), -1)])
    torch.manual_seed(args.seed)
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    passes = args.pretrain_epochs or passes
    batches = [index for _ in range(passes)
               for index in torch.randperm(len(clouds)).split(batch) if len(index) == batch]
    schedule = OneCycleLR(optimizer, lr, len(batches), pct_start=0.05, cycle_momentum=False)
    bar = tqdm(batches, f"pre-training {args.model}", unit="step")
    for step, index in enumerate(bar):
        loss = pretrain_loss(model, text, clouds[index].to(device), labels[index], source.class_names)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:  # reading it makes a GPU wait
            bar.set_postfix(loss=f"{loss.item():.2f}")
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


# -----------------------------------------------------------------------------------------------------------
# Several GPUs: torchrun's processes share each batch

def join_processes():
    """Started by torchrun: become one of its processes, with a GPU of its own."""
    if "LOCAL_RANK" not in os.environ:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # `cuda` is this one from now on
    # The others wait while the first evaluates: longer than the ten minutes that are usual.
    dist.init_process_group(timeout=timedelta(days=1))
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


def whole_batch(out: Output) -> Output:
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
    if dist.is_initialized():
        for parameter in student.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)


# -----------------------------------------------------------------------------------------------------------
# Benchmark

def benchmark(run: Run, objects: Objects, args) -> dict:
    """Print the median seconds of a step, objects per second, the share of the device's own matrix product in
    the same precision, and the memory. Photographs are decoded before. Returns the figures."""
    gpu, size = "cuda" in args.device, run.student.visual.image_size[0]
    some = objects.pick(torch.arange(args.batch_size) % len(objects))
    points = some.points.to(args.device)
    truth = torch.zeros(len(some), dtype=torch.long, device=args.device) if args.labels == "truth" else None
    pictures = next(iter(training_photographs(some, (torch.arange(len(some)),), size, seed=0)))
    train_mode(run.student, args.freeze)

    def step():
        views = draw_views(points, size, pictures)
        train_step(run.student, run.teacher, views, run.optimizer, 0, 1000, args, truth)

    from torch.utils.benchmark import Timer  # here: on a machine without CUDA it says so on stderr

    def seconds(part):
        timer = Timer("part()", globals={"part": part}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=3).median  # it waits for the GPU
    step()
    took = seconds(step)
    with FlopCounterMode(display=False) as counter:
        step()
    work = counter.get_total_flops() / 1e12
    kind = torch.bfloat16 if networks_precision(args)._enabled else torch.float32
    square = torch.randn(*[8192 if gpu else 2048] * 2, device=args.device, dtype=kind)
    peak = 2 * len(square) ** 3 / 1e12 / seconds(lambda: square @ square)
    print(f"{args.model}, batch {len(some)}, {kind}{', compiled' * args.compile}, {provenance(args.device)}")
    print(f"{1000 * took:.1f} ms a step, {len(some) / took:.1f} objects/s, {work / took:.2f} TFLOP/s, "
          f"{100 * work / took / peak:.0f} % of a matrix product's {peak:.2f}"
          + f", {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" * gpu)
    return {"step": took, "tflop": work, "peak": peak}


if __name__ == "__main__":
    with one_line_errors():
        main()
