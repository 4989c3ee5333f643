"""Cross-modal self-training (Cross-MoST, arXiv 2404.10146): a start, then training without labels.

    python train.py                                       # furniture made by programs, on a CPU
    python train.py --dataset modelnet10 --model tiny
"""
import argparse
import copy
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import (DATASETS, MODELNET10, Objects, dataset_name, dataset_row, draw_views,
                  load_dataset, training_photographs)
from eval import assess, axis_hint, embed, to_probs
from losses import (RULES, cross_modal_alignment_loss, fairness_loss, masked_terms, pseudo_labels,
                    self_training_loss)
from model import (TEMPLATES, CrossMoST, PointEncoder, build_model, hide_groups, hide_patches,
                   parameter_groups, plain_towers, precision_for, teacher_momentum, train_mode,
                   update_teacher)
from support import UserError, write_whole
from support.command_line import (COUNT, SHARE, WEIGHT, add_data_options, add_device_options,
                                  as_options, number, one_line_errors, option_parser, path_of,
                                  plain_options)
from support.parallel import (gather_embedded, join_processes, leader, lost_processes_are_one_line,
                              my_part, only_writer, rank, whole_batch, with_ddp, without_ddp,
                              world_size)
from support.pictures import plot_curves
from support.provenance import peak_memory, provenance
from support.results import (in_short, name_objects, predictions_csv, pseudo_label_quality, read_log,
                             table, top_one, what_is_known, warn_of_unknown_names)
from support.resume import CODE, Run, identity_of, load, remove_earlier_run, save
from support.starts import STARTS, read_start, start_file
from support.transduction import transduced_labels
from support.workers import refuse_broken_photographs

# ------ Options: which values hold for a data set and a start -----------------------------------------------
# The small start is trained for hundreds of steps instead of thousands, so its learning rate is
# larger. Its confidences are low, so the threshold of `joint` is lower. It has 4 x 4 patches: few
# are hidden, and painting them back weighs little. The temperature is CLIP's. The other weights
# and the momentum were chosen by measuring on `shapes` and ModelNet10.
SMALL = dict(
    epochs=3, batch_size=32, lr=2e-3, layer_decay=1.0, momentum=0.999, points=1024, views=12,
    threshold=[0.6], mask_ratio=0.1, w_fair=2.0, w_mim=0.1, w_mpm=0.1, w_gl=0.02,
    cross_temperature=0.07, precision="fp32", eval_every=2)
# Scans look unlike what the small start has seen. Therefore more epochs, a teacher that follows
# the student faster, and more fairness: in the first epochs many names are wrong.
SMALL_ON_SCANS = dict(epochs=6, momentum=0.98, w_fair=4.0)
# A user's folder mostly holds a few hundred objects: more passes make enough steps.
SMALL_ON_FOLDER = dict(epochs=20)

# A run may continue with other values of these. Some of them change how sums are rounded.
NO_EFFECT_ON_RESULTS = ("out", "cache", "data_root", "download", "resume", "device", "log_every",
                        "eval_every", "compile", "grad_checkpointing")
# These name the data, the start and the seed. They are no changes of the method.
DATA_AND_START = ("dataset", "domain", "model", "pretrained", "start_checkpoint", "precision",
                  "seed")

# Epochs between two namings of all training objects by `--labels together`.
RENEW_EVERY = 5
# Seconds between two saves, at the ends of epochs.
SAVE_EVERY = 60


def parse_args(argv=None) -> argparse.Namespace:
    """All options of a run; `changed` holds those of the method that are not at their defaults."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    # The data set and the start decide the defaults, so the line is parsed once more when these
    # are known. Only then --help is answered, to show them.
    asked = parser.parse_args([word for word in argv if word not in ("-h", "--help")])
    recipe = recipe_of(asked)
    # `load` and `separate` of a data set's row are no options.
    known = {option: recipe[option] for option in recipe if option in asked}
    parser.set_defaults(**known)
    args = parser.parse_args(argv)

    differing = {option: value for option, value in vars(args).items()
                 if value != parser.get_default(option) and option not in NO_EFFECT_ON_RESULTS}
    args.changed = {option: value for option, value in differing.items()
                    if option not in DATA_AND_START}
    if args.out is None:
        shown = {option: value.stem if isinstance(value, Path) else value
                 for option, value in differing.items() if option not in ("dataset", "model")}
        name = f"{Path(args.dataset).name} {args.model} {as_options(shown)}"
        # 200: file systems allow 255 bytes.
        args.out = Path("runs", re.sub(r"[^\w.+]+", "-", name).strip("-")[:200])
    return args


def recipe_of(asked: argparse.Namespace) -> dict:
    """The defaults that hold for a data set and a start in place of the original's.

    asked: the options, of which most that are not given are None. A later layer wins.
    """
    is_folder = asked.dataset not in DATASETS
    trains_both = asked.modalities == "both"
    in_file = {}
    if asked.start_checkpoint:
        in_file = read_start(asked.start_checkpoint)["options"]
    usual_model = "tiny" if asked.dataset == "shapes" else "ulip2"
    model = asked.model or in_file.get("model") or usual_model
    # Naming all objects at once assumes no shares of the names (measured: assets/folders.md).
    usual_labels = "together" if is_folder and trains_both else "joint"
    labels = asked.labels or usual_labels

    # The data set's row, with the thresholds of its label rule.
    recipe = {**dataset_row(asked.dataset), "model": model, "labels": usual_labels}
    if labels == "separate" or not trains_both:
        recipe["threshold"] = recipe["separate"]
    # The start. A CLIP of open_clip's has no row: its clouds are cut as those of `crossmost`.
    recipe |= STARTS.get(model, STARTS["crossmost"])
    if model == "tiny":
        is_scanned = asked.domain == "target" or (asked.dataset == "shapes" and not asked.domain)
        recipe |= SMALL
        if is_folder:
            recipe |= SMALL_ON_FOLDER
        elif is_scanned:
            recipe |= SMALL_ON_SCANS
    if is_folder:
        # Nobody knows its axis: see start_over.
        recipe["up"] = None
    if is_folder and not asked.shares:
        # A pull towards equal shares is wrong where most objects are chairs.
        recipe["w_fair"] = 0.0
    if labels == "together":
        recipe["threshold"] = [0.8]
    # The file of a start says how its clouds were cut.
    sizes = ("points", "groups", "group_size")
    recipe |= {option: in_file[option] for option in sizes if option in in_file}
    return recipe


def make_parser() -> argparse.ArgumentParser:
    """Every option, with the original code's value as its default where it has one (README: D25)."""
    parser = option_parser("Cross-modal self-training (Cross-MoST, arXiv 2404.10146)")
    yes_or_no = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--dataset", type=dataset_name, default="shapes",
        help=f"{', '.join(DATASETS)}, or a folder of your own")
    add_data_options(add)
    add("--templates", choices=sorted(TEMPLATES), help="texts around a class name")

    add = parser.add_argument_group("start").add_argument
    add("--model", help=f"zero-shot start: {', '.join(STARTS)}, or an open_clip name")
    add("--pretrained", help="open_clip's weights of --model: a tag or a file")
    add("--start-checkpoint", type=path_of, help="the start's file, instead of its own")
    add("--groups", type=COUNT, help="point groups per cloud")
    add("--group-size", type=COUNT, help="points per group")
    add("--cache", type=path_of, default=Path("cache"), help="folder of fetched starts")

    add = parser.add_argument_group("method").add_argument
    add("--modalities", choices=("both", "image", "point"), default="both", help="what is trained")
    rules = "; ".join(f"{name}: {sentence}" for name, sentence in RULES.items())
    add("--labels", choices=tuple(RULES),
        help=f"joint-label: who names the objects (own folder: together). {rules}")
    add("--threshold", type=SHARE, nargs="+", help="joint-label: confidence to exceed")
    add("--point-weight", type=WEIGHT, help="joint-label: factor on the point confidence")
    add("--w-fair", type=WEIGHT, default=1.0, help="fairness: weight; 0 leaves a term out")
    add("--shares", type=WEIGHT, nargs="+", help="fairness: roughly the objects of each class")
    add("--w-mim", type=WEIGHT, default=1.0, help="mim: weight")
    add("--w-mpm", type=WEIGHT, default=1.0, help="mpm: weight")
    add("--w-gl", type=WEIGHT, default=0.2, help="gl-align: weight, of both modalities")
    add("--w-cross", type=WEIGHT, default=1.0, help="cross-align: weight")
    add("--cross-temperature", type=number(1e-3), default=1.0,
        help="cross-align: divisor of similarities")
    add("--point-target", choices=("tokens", "points"), default="tokens",
        help="mpm: what is reconstructed")
    add("--mask-ratio", type=SHARE, default=0.3,
        help="mim, mpm: share of patches and groups hidden; 0 hides nothing")
    add("--momentum", type=SHARE, default=0.9998,
        help="ema: the teacher's momentum from step 400 on; 0.99 at the first step")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=COUNT, default=200, help="passes over the training objects")
    add("--batch-size", type=COUNT, default=128, help="objects per step, of all GPUs")
    add("--lr", type=WEIGHT, default=2e-5,
        help="peak learning rate of a batch of 256; a batch of 128 gets half of it")
    add("--weight-decay", type=WEIGHT, default=0.05, help="AdamW, not on 1-D parameters")
    add("--layer-decay", type=SHARE, default=0.65,
        help="factor on lr per image block, from the last on")
    add("--warmup-epochs", type=WEIGHT, default=1.0, help="epochs of linear warm-up")
    frozen = [f"point_encoder.{name}" for name in PointEncoder.frozen_by_default]
    add("--freeze", nargs="*", default=frozen,
        help="modules or parameters that are not trained; without a name all are")

    add = parser.add_argument_group("run").add_argument
    add("--out", type=path_of,
        help="results folder (default: runs/DATASET-MODEL and what differs from the defaults)")
    add("--seed", type=number(0, 2 ** 32, int), default=0, help="of views, order and masks")
    add("--resume", action=yes_or_no, default=True, help="continue OUT/last.pt")
    add_device_options(add)
    add("--compile", action=yes_or_no, default=False,
        help="compile the encoders' blocks: the first step is slow, later ones are faster")
    add("--grad-checkpointing", action=yes_or_no, default=False,
        help="less memory: compute image blocks twice")
    add("--eval-every", type=number(0, convert=int), default=5,
        help="epochs between evaluations of the teacher; 0: only at the end")
    add("--log-every", type=COUNT, default=10, help="steps per line of log.jsonl")
    return parser


# ------ One step --------------------------------------------------------------------------------------------
def train_step(student, teacher, views, optimizer, step, total_steps, args, given=None):
    """One update of the student, then of the teacher. Returns terms and labels.

    `views` holds images and point clouds only. True labels enter for the oracle alone
    (`--labels truth`).

    Args:
        student: CrossMoST, or under torchrun its DistributedDataParallel.
        views: what draw_views returns of this process's objects.
        step, total_steps: this step's number from 0, and how many the run has.
        given: labels and keep (B,) of the whole batch, if it was named before the step.
    Returns:
        terms: {name: value} of the total `loss`, each term before weighting, detached, and
            the learning rate `lr`.
        labels: {modality: (labels (B,), keep (B,))} of the objects of all processes.
    """
    rate = learning_rate(step, total_steps, args)
    for group in optimizer.param_groups:
        group["lr"] = group["lr_scale"] * rate

    # The teacher sees the weak views and names the objects [joint-label].
    if given is None:
        labels = teacher_labels(teacher, views, args)
    else:
        labels = {"image": given, "point": given}

    # The student must agree from the strong, masked views, align its modalities and repaint
    # what was hidden. A term of weight 0 is left out of the sum, but still logged. One without
    # a weight here is an error.
    weights = {"self_image": 1, "self_point": 1,
               "fair_image": args.w_fair, "fair_point": args.w_fair,
               "mim": args.w_mim, "mpm": args.w_mpm,
               "gl_image": args.w_gl, "gl_point": args.w_gl,
               "cross": args.w_cross}
    terms = student_terms(student, views, labels, args)
    loss = sum(weights[name] * term for name, term in terms.items() if weights[name])

    # The student makes a step, and the teacher follows it slowly [ema].
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    momentum = teacher_momentum(step, args.momentum)
    update_teacher(teacher, without_ddp(student), momentum)

    detached = {name: term.detach() for name, term in terms.items()}
    return {"loss": loss.detach(), **detached, "lr": rate}, labels


@torch.no_grad()
def teacher_labels(teacher: CrossMoST, views: dict, args) -> dict[str, tuple[Tensor, Tensor]]:
    """What `--labels` makes of the teacher's predictions for the weak views.

    Returns {modality: (labels (B,), keep (B,))} of the modalities that are trained.
    """
    images = points = None
    if args.modalities != "point":
        images = teacher.normalise(views["weak_image"])
    if args.modalities != "image":
        points = views["weak_points"]

    out = teacher(images, points)
    # (B, C) of the whole batch, also under torchrun.
    probs = {}
    if images is not None:
        probs["image"] = whole_batch(out.image_logits).softmax(dim=-1)
    if points is not None:
        probs["point"] = whole_batch(out.point_logits).softmax(dim=-1)
    return pseudo_labels(args.labels, probs, args.threshold, args.point_weight)


def student_terms(student, views: dict, labels: dict, args) -> dict[str, Tensor]:
    """Every term of the loss, by name, from the student's strong and masked views.

    self-training, fairness and cross-align see the whole batch, also under torchrun; the masked
    terms are means over this process's own share.
    """
    model = without_ddp(student)
    images = groups = None
    if args.modalities != "point":
        images = model.normalise(views["strong_image"])
    if args.modalities != "image":
        # Here, because masks need their centres.
        groups = model.group(views["strong_points"])

    # Masks are drawn anew for each object and step [mim, mpm].
    image_hidden = point_hidden = None
    if images is not None and args.mask_ratio > 0:
        grid = model.visual.grid_size[0]
        image_hidden = hide_patches(len(images), grid, args.mask_ratio, images.device)
    if groups is not None and args.mask_ratio > 0:
        point_hidden = hide_groups(groups.centres, args.mask_ratio)

    out = student(images, groups, image_hidden, point_hidden)
    terms = masked_terms(out, images, image_hidden, point_hidden)
    if images is not None:
        logits = whole_batch(out.image_logits)
        terms["self_image"] = self_training_loss(logits, *labels["image"])
        terms["fair_image"] = fairness_loss(logits, args.shares)
    if groups is not None:
        logits = whole_batch(out.point_logits)
        terms["self_point"] = self_training_loss(logits, *labels["point"])
        terms["fair_point"] = fairness_loss(logits, args.shares)
    if images is not None and groups is not None:
        features = whole_batch(out.image_features), whole_batch(out.point_features)
        terms["cross"] = cross_modal_alignment_loss(*features, args.cross_temperature)
    return terms


def learning_rate(step: int, total_steps: int, args) -> float:
    """Linear warm-up, then a cosine from the peak down to peak / 20 at the last step.

    The peak is lr x --batch-size / 256, also where there are fewer objects than that: the
    original's 2e-5 is 4e-5 for its 512 objects, and 1e-5 for our 128 (Deviation D25). The first
    step uses peak / warm-up steps, because a rate of 0 would waste it (Deviation D26).
    """
    peak = args.lr * args.batch_size / 256
    warmup_steps = int(args.warmup_epochs * total_steps / args.epochs)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    # The original's ratio: 1e-6 of 2e-5.
    floor = peak / 20
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


# ------ The loop --------------------------------------------------------------------------------------------
def self_train(run: Run, objects: Objects, test: Objects, args):
    """Train from the last saved epoch to the end; log, evaluate and save on the way."""
    batch_size = min(args.batch_size, len(objects))
    steps_per_epoch = len(objects) // batch_size
    total_steps = args.epochs * steps_per_epoch
    image_size = run.student.visual.image_size[0]
    # (N, P, 3). All clouds are on the device, so that a step copies none.
    points = objects.points.to(args.device)
    student = with_ddp(run.student)
    train_mode(run.student, args.freeze)
    if args.labels == "truth":
        run.given = objects.labels, torch.ones(len(objects), dtype=torch.bool)

    # disable=None: a bar only where a person looks on.
    bar = tqdm(total=total_steps, initial=run.epoch * steps_per_epoch, desc="self-training",
               unit="step", disable=None if leader() else True)
    last_save = time.perf_counter()
    for epoch in range(run.epoch, args.epochs):
        if args.labels == "together" and epoch % RENEW_EVERY == 0:
            run.given = name_together(run.teacher, objects, args)

        step = epoch * steps_per_epoch
        interval, began = [], time.perf_counter()
        batches = batches_of_epoch(epoch, objects, batch_size, image_size, args)
        for photographs, batch, part in batches:
            views = draw_views(points[part.to(args.device)], image_size, photographs)
            given = None
            if run.given is not None:
                given = [value[batch].to(args.device) for value in run.given]
            terms, labels = train_step(student, run.teacher, views, run.optimizer, step,
                                       total_steps, args, given)
            # For the log only.
            truth = None
            if objects.labels is not None:
                truth = objects.labels[batch].to(args.device)
            interval.append((step, terms, labels, truth))
            step += 1
            bar.update()

            # Reading a value waits for a GPU, so values are read once per interval.
            if step % args.log_every == 0 or step % steps_per_epoch == 0:
                refuse_non_finite(interval)
                means = interval_means(interval, len(objects.class_names))
                seconds = time.perf_counter() - began
                speed = len(interval) * batch_size / seconds
                write_log(args.out, epoch=epoch + 1, step=step, steps=len(interval),
                          seconds=round(seconds, 3), objects_per_second=round(speed, 1), **means)
                bar.set_postfix(loss=f"{means['loss']:.2f}", coverage=f"{means['coverage']:.2f}")
                interval, began = [], time.perf_counter()

        run.epoch = epoch + 1
        # The last epoch is evaluated by train_and_score.
        is_last = run.epoch == args.epochs
        is_due = args.eval_every and run.epoch % args.eval_every == 0
        if is_due and not is_last:
            _, figures = score(run.teacher, test, args)
            write_log(args.out, epoch=run.epoch, step=step, teacher=in_short(figures))
        if is_last or time.perf_counter() - last_save > SAVE_EVERY:
            save(run, args.out)
            last_save = time.perf_counter()
    bar.close()


def batches_of_epoch(epoch: int, objects: Objects, batch_size: int, image_size: int, args):
    """Shuffled batches of an epoch; what does not fill a batch is left out.

    Yields for each batch the photographs of this process's part of it, its indices (B,), and those
    of the part. All random numbers of an epoch follow from the run's seed and the epoch's number, so
    that a continued run computes the same. Processes shuffle alike, then each draws its own.
    """
    # Large odd factors keep the seeds of other runs, epochs and processes apart.
    epoch_seed = args.seed * 100_003 + epoch
    torch.manual_seed(epoch_seed)
    count = len(objects) // batch_size
    batches = torch.randperm(len(objects)).split(batch_size)[:count]

    process_seed = epoch_seed * 1_009 + rank()
    torch.manual_seed(process_seed)
    parts = [my_part(batch) for batch in batches]
    photographs = training_photographs(objects, parts, image_size, process_seed)
    # zip asks its first argument first. So it reaches the photographs' end, and their workers
    # stop here, where Ctrl-C still counts.
    return zip(photographs, batches, parts)


def refuse_non_finite(interval: list):
    """Raises: UserError with the step, counted from 1, and all terms where a loss is not finite."""
    for step, terms, _, _ in interval:
        if not terms["loss"].isfinite():
            values = {name: float(value) for name, value in terms.items()}
            raise UserError(f"the loss is not finite at step {step + 1}: {values}; lower --lr, "
                            "or look at the data")


def interval_means(interval: list, classes: int) -> dict:
    """One line of the log: means over an interval of steps, each (step, terms, labels, truth).

    coverage: kept labels / all labels. Where a rule gives weights, a label counts by its weight.
    label_accuracy: right labels / kept labels; None without true labels.
    named: for each name, kept labels with that name / all labels.
    entropy: of the names among the kept labels, in nats.
    """
    _, first_terms, _, first_truth = interval[0]
    row = {}
    for name in first_terms:
        values = [torch.as_tensor(terms[name]).double() for _, terms, _, _ in interval]
        row[name] = torch.stack(values).mean().item()

    kept_per_name, right, total = torch.zeros(classes), 0, 0
    for _, _, labels, truth in interval:
        for label, keep in labels.values():
            kept_per_name += label.bincount(keep.float(), minlength=classes).cpu()
            total += len(label)
            if truth is not None:
                right += ((label == truth) * keep).sum().item()
    kept = kept_per_name.sum().item()
    row["coverage"] = kept / total
    row["label_accuracy"] = None if first_truth is None else right / max(kept, 1)
    row["named"] = (kept_per_name / total).tolist()
    row["entropy"] = torch.special.entr(kept_per_name / max(kept, 1)).sum().item()
    return row


def write_log(out: Path, **row):
    """Add a line to OUT/log.jsonl.

    The first line of a run holds options, versions, commit and device. A line of means follows
    every --log-every steps, with these keys:
        epoch, step, steps: the first two count from 1; how many steps the line averages.
        loss, and each term before weighting: self_image, fair_image, mim, gl_image, cross ...
        coverage, label_accuracy, named, entropy: of pseudo-labels, see interval_means.
        lr, seconds, objects_per_second: learning rate, and the speed of training alone.
    A line with `teacher` follows every --eval-every epochs and at the end: its accuracy on the
    test objects, if they have labels, and agreement and information, see eval.assess. Nothing
    is chosen by it.
    """
    if leader():
        with open(out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def score(model: CrossMoST, objects: Objects, args) -> tuple[dict, dict]:
    """Probabilities (N, C) of each modality, and what `assess` says of them."""
    # Under torchrun each process embeds its part of the objects.
    probs = to_probs(gather_embedded(embed, model, objects, args.views))
    return probs, assess(probs, objects)


def name_together(teacher: CrossMoST, objects: Objects, args) -> tuple[Tensor, Tensor]:
    """Name all training objects at once [together]. -> labels and keep (N,), on the CPU

    In place of the names' texts in transduced_labels stand the columns of the teacher's
    classifier. They are the texts at first, and are trained like all other weights.
    """
    embedded = gather_embedded(embed, teacher, objects, args.views)
    columns = teacher.classifier.detach().float()
    texts = F.normalize(columns, dim=0).T.cpu()
    features = embedded["image_features"], embedded["point_features"]
    teacher_probs = to_probs(embedded)["joint"]
    confidence, labels = transduced_labels(teacher_probs, *features, texts).max(dim=-1)
    return labels, confidence > args.threshold[0]


# ------ A whole run -----------------------------------------------------------------------------------------
def main(argv=None) -> dict:
    """Run all of it. Returns what it writes to OUT/results.json."""
    # Before anything opens a context on a GPU.
    join_processes()
    args = parse_args(argv)
    refuse_contradictions(args)
    # float32 is float32; bfloat16 is the fast way.
    torch.backends.cudnn.allow_tf32 = False
    objects, test = [
        load_dataset(args.dataset, args.data_root, split, args.points, args.domain,
                     args.download, args.up, args.cache)
        for split in ("train", "test")]
    refuse_wrong_data(args, objects)
    run = begin(args, objects)
    with only_writer(args.out), lost_processes_are_one_line():
        return train_and_score(run, objects, test, args)


def refuse_contradictions(args):
    """Raises: UserError for options that do not go together, which needs no data to see."""
    trains_both = args.modalities == "both"
    if args.labels == "together" and not trains_both:
        raise UserError("--labels together needs both modalities; drop it, or --modalities")
    takes_two = args.labels == "separate" or not trains_both
    if len(args.threshold) > (2 if takes_two else 1):
        raise UserError("--threshold takes one value; two, image's and point's, go with "
                        "--labels separate")
    if args.shares and not sum(args.shares):
        raise UserError("--shares are all 0; expected a number for each class, not all of them 0")
    if args.out.is_file():
        raise UserError(f"--out {args.out} is a file; name a folder")
    if args.model in STARTS and args.pretrained:
        raise UserError(f"--model {args.model} is one file; drop --pretrained")
    if args.model in STARTS:
        return
    # Raises for what is no CLIP of plain transformers.
    plain_towers(args.model, args.pretrained)
    if not args.start_checkpoint:
        raise UserError(
            f"--model {args.model} has no point encoder; make a start with python -m "
            f"tools.pretrain --model {args.model} --into FILE, then give --start-checkpoint FILE")


def refuse_wrong_data(args, objects: Objects):
    """Raises: UserError for options that do not go with these objects. Warns of bad fits."""
    classes, batch = objects.class_names, min(args.batch_size, len(objects))
    if args.labels == "truth" and objects.labels is None:
        raise UserError(f"--labels truth needs true labels, {objects.name} has none; use "
                        "--labels joint")
    if args.shares and len(args.shares) != len(classes):
        raise UserError(f"--shares has {len(args.shares)} numbers; expected {len(classes)}, "
                        f"for {', '.join(classes)}")
    if batch % world_size():
        raise UserError(f"{world_size()} processes cannot share a batch of {batch} objects; "
                        "change --batch-size")
    if args.model == "tiny":
        warn_of_unknown_names(classes, MODELNET10)
    if objects.images:
        count = sum(bool(paths) for paths in objects.images)
        print(f"{count} of {len(objects)} training objects have photographs, the others get "
              f"depth views; the texts around the names are --templates {args.templates}")


def begin(args, objects: Objects) -> Run:
    """Student, teacher and optimizer of a run that begins."""
    start = args.start_checkpoint
    if start is None and args.model in STARTS:
        start = start_file(args.model, args.cache, args.download)
    student = build_model(
        args.model, objects.class_names, TEMPLATES[args.templates], args.pretrained, start,
        device=args.device, groups=args.groups, group_size=args.group_size,
        target=args.point_target)
    student.precision = precision_for(args.precision, args.device)
    student.visual.set_grad_checkpointing(args.grad_checkpointing)
    # The teacher begins as the student, and no gradient ever reaches it. It stays in the eval mode
    # that build_model gives; the student alone is set to training, in self_train.
    teacher = copy.deepcopy(student).requires_grad_(False)
    parameters = parameter_groups(student, args.weight_decay, args.layer_decay, args.freeze)
    # lr 0: train_step sets each group's rate at every step. The betas are the original's.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.999), fused=True)
    if args.compile:
        student.compile_blocks()
        teacher.compile_blocks()

    options = plain_options(args)
    identity = identity_of(options, NO_EFFECT_ON_RESULTS, objects, student.precision)
    return Run(student, teacher, optimizer, options, identity, began=time.perf_counter())


def train_and_score(run: Run, objects: Objects, test: Objects, args) -> dict:
    """Score the start, train, score again. Returns the results, which are written to OUT."""
    changed = as_options(args.changed) or "no option of the method changed"
    headline = f"{objects.name} with {args.model}, seed {args.seed}, {changed}"
    print(f"{headline}\nall settings: python train.py {as_options(run.options)}")
    last = args.out / "last.pt"
    if args.resume and last.exists():
        load(run, args.out)
        print(f"continuing {last} after epoch {run.epoch}")
    else:
        start_over(run, objects, test, args)
    title = f"{test.name} {test.split}, {len(test)} objects"
    print(table(title, {"zero-shot": run.zero_shot}))

    self_train(run, objects, test, args)

    # The last epoch counts, whatever its accuracy: no label chooses an epoch (Deviation D15).
    _, student_figures = score(run.student, test, args)
    probs, teacher_figures = score(run.teacher, test, args)
    write_log(args.out, epoch=args.epochs, teacher=in_short(teacher_figures))
    results = results_of(run, objects, test, student_figures, teacher_figures, args)
    if leader():
        lines = read_log(args.out / "log.jsonl")
        results["pseudo_label"] = pseudo_label_quality(lines, args.epochs)
        named = name_objects(test, probs, run.start_named)
        write_whole(args.out / "predictions.csv", predictions_csv(named))
        write_whole(args.out / "curves.png", plot_curves(lines, run.zero_shot))
        write_whole(args.out / "results.json", json.dumps(results, indent=1).encode())
        rows = {"zero-shot": run.zero_shot, "student": student_figures, "teacher": teacher_figures}
        print(f"\n{table(title, rows)}")
        print("\n".join(what_is_known(results)))
        print(f"a name for each object: {args.out / 'predictions.csv'}\n{headline}")
    return results


def start_over(run: Run, objects: Objects, test: Objects, args):
    """Look at the data, remove an earlier run from OUT, begin the log, score the start."""
    of_objects = (objects.images or []) + (test.images or [])
    pictures = sorted({path for paths in of_objects for path in paths})
    if leader() and pictures:
        refuse_broken_photographs(pictures, whole=args.dataset not in DATASETS)
    # Nobody said how a folder's objects stand.
    hint = axis_hint(run.student, objects) if args.up is None else None
    if hint:
        raise UserError(hint)
    if leader():
        remove_earlier_run(args.out)
        trainable = sum(p.numel() for p in run.student.parameters() if p.requires_grad)
        write_log(args.out, options=run.options, start=start_name(args), train=len(objects),
                  test=len(test), trainable=trainable, code=CODE, **provenance(args.device))
    probs, run.zero_shot = score(run.student, test, args)
    run.start_named = tuple(probs["joint"].max(dim=-1))


def start_name(args) -> str:
    """What results call a start: its --model name, or its file's."""
    return args.start_checkpoint.stem if args.start_checkpoint else args.model


def results_of(run: Run, objects: Objects, test: Objects, student_figures: dict,
               teacher_figures: dict, args) -> dict:
    """What OUT/results.json holds, from what `assess` says of student and teacher."""
    results = {
        "dataset": objects.name,
        "split": test.split,
        "objects": len(test),
        "classes": len(test.class_names),
        "model": args.model,
        "start": start_name(args),
        "seed": args.seed,
        "epochs": args.epochs,
        "precision": run.identity["precision"],
        "changed": args.changed,
        "code": CODE,
        "commit": provenance(args.device)["commit"],
        "zero_shot": top_one(run.zero_shot),
        "student": top_one(student_figures),
        "teacher": top_one(teacher_figures),
        "teacher_per_class": teacher_figures.get("per_class"),
        "seconds": round(run.seconds(), 1),
        "gpu_gib": peak_memory(args.device),
    }
    figures = {"start": run.zero_shot, "student": student_figures, "teacher": teacher_figures}
    for key in ("agreement", "information", "shares"):
        results[key] = {who: of_model[key] for who, of_model in figures.items()}
    return results


if __name__ == "__main__":
    with one_line_errors():
        main()
