"""Cross-modal self-training (Cross-MoST, arXiv 2404.10146): a zero-shot start, then training without labels.

    python train.py                                          # procedural objects, small start, no download
    python train.py --dataset modelnet10 --model tiny
"""
import argparse
import copy
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import Timeout
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from data import (DATASETS, MODELNET10, Objects, dataset_row, draw_views, load_dataset, random_yaw,
                  sample_shapes, training_photographs)
from eval import (assess, embed, pseudo_label_quality, read_log, table, to_probs, top_one,
                  write_predictions)
from losses import (RULES, Evidence, cross_modal_alignment_loss, fairness_loss, masked_terms,
                    name_alignment_loss, self_training_loss)
from model import (TEMPLATES, CrossMoST, PointEncoder, build_model, hide_groups, hide_patches,
                   parameter_groups, plain_image_tower, precision_for, random_tiny, teacher_momentum,
                   train_mode, update_teacher)
from support import UserError, write_whole
from support.command_line import (COUNT, SHARE, WEIGHT, add_data_options, add_device_options, number,
                                  one_line_errors, option_parser, words)
from support.fetch import lock
from support.parallel import (gather_embedded, join_processes, leader, my_part, rank, whole_batch, with_ddp,
                              without_ddp, world_size)
from support.pictures import plot_curves
from support.resume import CODE, TrainingState, plain_options
from support.starts import STARTS, read_file, read_start, save_file, save_start, start_file
from support.transduction import transduced_labels

# ------ Recipes: which values hold for a data set and a start ----------------------------------------------
# The small start is trained for hundreds of steps instead of thousands, so its learning rate is larger. Its
# confidences are low, so the threshold is lower. It has 4 x 4 patches: few are hidden, and painting them back
# weighs little. The temperature is CLIP's. The other weights and the momentum were chosen by measuring on
# `shapes` and ModelNet10.
SMALL = dict(epochs=3, batch_size=32, lr=2e-3, layer_decay=1.0, momentum=0.999, points=1024, views=12,
             threshold=[0.6], mask_ratio=0.1, w_fair=2.0, w_mim=0.1, w_mpm=0.1, w_gl=0.02,
             cross_temperature=0.07, precision="fp32", eval_every=2)

# Scans look unlike what the small start has seen. Therefore more epochs, a teacher that follows the student
# faster, and a larger `fairness` weight: in the first epochs many names are wrong.
SMALL_ON_SCANS = dict(SMALL, epochs=6, momentum=0.98, w_fair=4.0)

# A user's folder mostly holds a few hundred objects: more passes make enough steps.
SMALL_ON_FOLDER = dict(SMALL, epochs=20)

# `together`: epochs between two namings of all training objects. A run that continues in between takes the
# names from last.pt.
RENEW_EVERY = 5

# Options that do not change what is computed: a run may continue with other values of these.
NO_EFFECT_ON_RESULTS = ("out", "cache", "data_root", "download", "resume", "device", "log_every",
                        "eval_every", "compile", "grad_checkpointing", "stage")

# Options that name the data, the start and the seed. They are no changes of the method.
DATA_AND_START = ("dataset", "domain", "model", "pretrained", "start_checkpoint", "pretrain_epochs",
                  "precision", "seed")
SAVE_EVERY = 60  # seconds between two saves, at the ends of epochs

# What a run writes into OUT; one that starts over removes it first.
LEFT_BY_A_RUN = ("last.pt", "log.jsonl", "results.json", "curves.png", "predictions.csv",
                 "predictions-start.csv")


def recipe_of(given: dict) -> dict:
    """The values that hold in place of the original's: {option: (value, where it comes from)}.

    given: the options of the command line. Later layers win over earlier ones; what the command line gives
    wins over all of them (parse_args).
    """
    dataset = given.get("dataset", "shapes")
    in_file = read_start(given["start_checkpoint"])["options"] if "start_checkpoint" in given else {}
    model = given.get("model") or in_file.get("model") or ("tiny" if dataset == "shapes" else "ulip2")
    row = dataset_row(dataset)
    is_folder = dataset not in DATASETS
    uses_both = given.get("modalities", "both") == "both"
    is_scanned = given.get("domain") == "target" or (dataset == "shapes" and "domain" not in given)

    layers = [("data set", row)]
    if given.get("labels") == "separate" or not uses_both:
        layers.append(("data set, without joint labels", {"threshold": row["separate"]}))
    # A model of open_clip's has no values of its own: its clouds are cut as those of `crossmost`.
    layers.append(("start", STARTS.get(model, STARTS["crossmost"])))
    if model == "tiny":
        small = SMALL_ON_FOLDER if is_folder else SMALL_ON_SCANS if is_scanned else SMALL
        layers.append(("small start's recipe", small))
    if is_folder and "shares" not in given:
        # A pull towards equal shares is wrong where most objects are chairs.
        layers.append(("folder without --shares", {"w_fair": 0.0}))
    if is_folder and uses_both:
        # Naming all objects at once assumes no shares either (measured: assets/folders.md).
        layers.append(("folder", {"labels": "together"}))
    rule = given.get("labels", "together" if is_folder and uses_both else "joint")
    if rule == "together":
        layers.append(("labels together", {"threshold": [0.8]}))
    file_values = {key: in_file[key] for key in ("points", "groups", "group_size") if in_file.get(key)}
    layers.append(("start's file", file_values))

    recipe = {"model": (model, "start's file" if in_file.get("model") else "data set")}
    for source, values in layers:
        recipe |= {option: (value, source) for option, value in values.items()}
    return recipe


def parse_args(argv=None) -> argparse.Namespace:
    """All options of a run, and three things about them.

    sources: {option: where its value comes from}. changed: {option: value} of the method's options that are
    other than the defaults for this data set and start. changes: the same as a sentence.
    """
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    # argparse gives a default only to attributes that are missing. All begin as None here, so what is not
    # None afterwards was typed. The data set and the start decide the defaults of the rest.
    options = list(vars(parser.parse_args([])))
    typed = argparse.Namespace(**dict.fromkeys(options))
    parser.parse_args([word for word in argv if word not in ("-h", "--help")], typed)
    given = {option: value for option, value in vars(typed).items() if value is not None}

    recipe = {option: value for option, value in recipe_of(given).items() if option in options}
    parser.set_defaults(**{option: value for option, (value, _) in recipe.items()})
    args = parser.parse_args(argv)
    args.sources = {option: source for option, (_, source) in recipe.items()}
    args.sources |= dict.fromkeys(given, "command line")

    differing = {option: value for option, value in plain_options(args).items()
                 if option in given and value != parser.get_default(option)
                 and option not in NO_EFFECT_ON_RESULTS}
    args.changed = {option: value for option, value in differing.items() if option not in DATA_AND_START}
    args.changes = ", ".join(f"{flag(option)} {words(args.changed[option])} instead of "
                             f"{words(parser.get_default(option))}" for option in args.changed)
    if args.out is None:
        args.out = Path("runs", run_name(args, differing))
    return args


def make_parser() -> argparse.ArgumentParser:
    """Every option, with the original code's value as its default where it has one."""
    parser = option_parser(__doc__.splitlines()[0])

    group = parser.add_argument_group("data").add_argument
    group("--dataset", default="shapes", help=f"{', '.join(DATASETS)}, or a folder of your own")
    add_data_options(group)
    group("--templates", choices=sorted(TEMPLATES), help="texts around a class name")

    group = parser.add_argument_group("start").add_argument
    group("--model", help=f"zero-shot start: {', '.join(STARTS)}, or an open_clip name")
    group("--pretrained", help="open_clip's weights of --model: a tag or a file")
    group("--start-checkpoint", type=Path, help="the start's file, of any family, instead of its own")
    group("--pretrain-epochs", type=COUNT,
          help="make a new start instead of taking a finished one: passes over its objects")
    group("--groups", type=COUNT, help="point groups per cloud")
    group("--group-size", type=COUNT, help="points per group")
    group("--cache", type=Path, default=Path("cache"), help="folder of fetched and pre-trained starts")

    group = parser.add_argument_group("method").add_argument
    group("--modalities", choices=("both", "image", "point"), default="both", help="what is trained")
    rules = "; ".join(f"{name}: {rule.purpose}" for name, rule in RULES.items())
    group("--labels", choices=tuple(RULES), default="joint",
          help=f"joint-label: who names the objects; in a folder of your own `together`. {rules}")
    group("--threshold", type=SHARE, nargs="+", help="joint-label: confidence to exceed; two if separate")
    group("--point-weight", type=WEIGHT, help="joint-label: factor on the point confidence")
    group("--w-fair", type=WEIGHT, default=1.0, help="fairness: weight; a weight of 0 leaves its term out")
    group("--shares", type=WEIGHT, nargs="+", help="fairness: roughly how many objects of each class")
    group("--w-mim", type=WEIGHT, default=1.0, help="mim: weight")
    group("--w-mpm", type=WEIGHT, default=1.0, help="mpm: weight")
    group("--w-gl", type=WEIGHT, default=0.2, help="gl-align: weight, of both modalities")
    group("--w-cross", type=WEIGHT, default=1.0, help="cross-align: weight")
    group("--cross-temperature", type=number(1e-3), default=1.0, help="cross-align: divisor of similarities")
    group("--point-target", choices=("tokens", "points"), default="tokens", help="mpm: what is reconstructed")
    group("--mask-ratio", type=SHARE, default=0.3, help="share of patches and groups hidden; 0 hides nothing")
    group("--momentum", type=SHARE, default=0.9998,
          help="ema: the teacher's momentum from step 400 on; 0.99 at the first step")

    group = parser.add_argument_group("optimisation").add_argument
    group("--epochs", type=COUNT, default=200, help="passes over the training objects")
    group("--batch-size", type=COUNT, default=128, help="objects per step, of all GPUs together")
    group("--lr", type=WEIGHT, default=2e-5,
          help="peak learning rate of a batch of 256; a batch of 128 gets half of it")
    group("--weight-decay", type=WEIGHT, default=0.05, help="AdamW, not on 1-D parameters")
    group("--layer-decay", type=SHARE, default=0.65, help="factor on lr per image block, from the last on")
    group("--warmup-epochs", type=WEIGHT, default=1.0, help="epochs of linear warm-up")
    group("--freeze", nargs="*", default=[f"point_encoder.{name}" for name in PointEncoder.frozen_by_default],
          help="modules or parameters that are not trained; without a name all are")

    group = parser.add_argument_group("run").add_argument
    group("--stage", choices=("pretrain", "train"), default="train", help="pretrain: only make the start")
    group("--out", type=Path,
          help="results folder (default: runs/DATASET-MODEL and what differs from the defaults)")
    group("--seed", type=number(0, 2 ** 32, int), default=0, help="of a new start, views, order and masks")
    group("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue OUT/last.pt")
    add_device_options(group)
    group("--compile", action="store_true",
          help="compile the encoders' blocks: the first step is slow, later ones are faster")
    group("--grad-checkpointing", action="store_true", help="less memory: compute image blocks twice")
    group("--eval-every", type=number(0, convert=int), default=5,
          help="epochs between evaluations of the teacher; 0: only at the end")
    group("--log-every", type=COUNT, default=10, help="steps per line of log.jsonl")
    return parser


def run_name(args, differing: dict) -> str:
    """The results folder's name: data set, start, and what differs from the defaults.

    The options stand in the parser's order, so that one command always has one folder.
    """
    parts = [Path(args.dataset).name, args.model.replace("/", "-")]
    for option, value in differing.items():
        if option not in ("dataset", "model"):
            value = Path(value).stem if option == "start_checkpoint" else words(value)
            parts += [flag(option).lstrip("-"), value.replace("/", "-").replace(" ", "-")]
    name = "-".join(parts)
    if len(name) > 120:  # file systems allow 255; many --shares would not fit
        name = f"{name[:110]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def flag(option: str) -> str:
    """w_cross -> --w-cross"""
    return "--" + option.replace("_", "-")


def print_settings(args):
    """One line per source: the values that hold for this run, and where they come from."""
    by_source = {"default": []}  # the original code's value, where it has one
    for option, value in plain_options(args).items():
        if option not in NO_EFFECT_ON_RESULTS and value is not None:
            by_source.setdefault(args.sources.get(option, "default"), []).append(
                f"{option} {words(value)}")
    print("settings, by where they come from:")
    for source, values in by_source.items():
        print(f"  {source}: {', '.join(values)}")

# ------ One step -------------------------------------------------------------------------------------------
def train_step(student, teacher, views, optimizer, step, total_steps, args, truth=None, transduced=None):
    """One update of the student, then of the teacher. Returns the detached terms and the labels used.

    `views` holds images and point clouds only. True labels enter for the oracle alone (`--labels truth`).

    Args:
        student: CrossMoST, or under torchrun its DistributedDataParallel.
        views: what draw_views returns of this process's objects (b = B / number of processes).
        step, total_steps: this step's number from 0, and how many the run has.
        truth: (B,) true labels, or None.
        transduced: (B, C) the rows of transduced_labels for these objects, or None.
    Returns:
        terms: {name: value} of the total `loss`, each term before weighting, and the learning rate `lr`.
        labels: {modality: (labels (B,), keep (B,))}.
    """
    rate = learning_rate(step, total_steps, args)
    for group in optimizer.param_groups:
        group["lr"] = group["lr_scale"] * rate

    # The teacher sees the weak views and names the objects [joint-label].
    labels = teacher_labels(teacher, views, args, truth, transduced)

    # The student must agree from the strong, masked views, align its modalities and repaint what was hidden.
    # A term of weight 0 is left out of the sum, but still logged. One without a weight here is an error.
    weights = {"self_image": 1, "self_point": 1, "fair_image": args.w_fair, "fair_point": args.w_fair,
               "mim": args.w_mim, "mpm": args.w_mpm, "gl_image": args.w_gl, "gl_point": args.w_gl,
               "cross": args.w_cross}
    terms = student_terms(student, views, labels, args)
    loss = sum(weights[name] * term for name, term in terms.items() if weights[name])

    # The student makes a step, and the teacher follows it slowly [ema].
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    update_teacher(teacher, without_ddp(student), teacher_momentum(step, args.momentum))

    detached = {name: term.detach() for name, term in terms.items()}
    return {"loss": loss.detach(), **detached, "lr": rate}, labels


@torch.no_grad()
def teacher_labels(teacher: CrossMoST, views: dict, args, truth: Tensor | None = None,
                   transduced: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """The rule of `--labels` applied to the teacher's predictions for weak images and clouds.

    Returns {modality: (labels (B,), keep (B,))} of the whole batch. A modality that is not trained gives no
    probabilities, and the teacher is asked only by rules that need it.
    """
    image_probs = point_probs = None
    if RULES[args.labels].needs_teacher:
        images = None if args.modalities == "point" else teacher.normalise(views["weak_image"])
        points = None if args.modalities == "image" else views["weak_points"]
        out = teacher(images, points)
        if images is not None:
            image_probs = whole_batch(out.image_logits).softmax(dim=-1)
        if points is not None:
            point_probs = whole_batch(out.point_logits).softmax(dim=-1)
    evidence = Evidence(image_probs, point_probs, args.threshold, args.point_weight, truth=truth,
                        transduced=transduced)
    return RULES[args.labels].label(evidence)


def student_terms(student, views: dict, labels: dict, args) -> dict[str, Tensor]:
    """Every term of the loss, by name, from the student's strong and masked views.

    self-training, fairness and cross-align see the whole batch, also under torchrun; the masked terms are
    means over this process's own share.
    """
    model = without_ddp(student)
    images = None if args.modalities == "point" else model.normalise(views["strong_image"])
    groups = None  # cut here, because the mask needs their centres
    if args.modalities != "image":
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

    The peak is lr x --batch-size / 256, also where there are fewer objects than that: the original's 2e-5 is
    4e-5 for its 512 objects, and 1e-5 for our 128 (Deviation D25). The first step uses peak / warm-up steps,
    because a rate of 0 would waste it (Deviation D26). A run as long as its warm-up ends at the peak, a
    shorter one below it. peak / 20 is the original's ratio, 1e-6 of 2e-5.
    """
    peak = args.lr * args.batch_size / 256
    warmup_steps = int(args.warmup_epochs * total_steps / args.epochs)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    floor = peak / 20
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2

# ------ The loop -------------------------------------------------------------------------------------------
def self_train(state: "TrainingState", objects: Objects, test: Objects, args):
    """Train from the last saved epoch to the end; log, evaluate and save on the way."""
    batch_size = min(args.batch_size, len(objects))
    steps_per_epoch = len(objects) // batch_size
    total_steps = args.epochs * steps_per_epoch
    image_size = state.student.visual.image_size[0]
    points = objects.points.to(args.device)
    student = with_ddp(state.student)
    train_mode(state.student, args.freeze)

    per_epoch = steps_per_epoch * batch_size
    bar = tqdm(total=args.epochs * per_epoch, initial=state.epoch * per_epoch, desc="self-training",
               unit="object", unit_scale=True, disable=not leader())
    interval, interval_began, last_save = [], time.perf_counter(), time.perf_counter()
    for epoch in range(state.epoch, args.epochs):
        if RULES[args.labels].needs_transduced and epoch % RENEW_EVERY == 0:
            state.transduced = name_together(state.teacher, objects, args)
            interval_began = time.perf_counter()  # naming is not training

        step = epoch * steps_per_epoch
        for batch, part, pictures in batches_of_epoch(epoch, objects, batch_size, image_size, args):
            views = draw_views(points[part.to(args.device)], image_size, pictures)
            truth = None if objects.labels is None else objects.labels[batch].to(args.device)
            transduced = None if state.transduced is None else state.transduced[batch].to(args.device)
            oracle = truth if RULES[args.labels].needs_truth else None
            terms, labels = train_step(student, state.teacher, views, state.optimizer, step, total_steps,
                                       args, oracle, transduced)
            interval.append((step, terms, labels, truth))
            step += 1
            bar.update(batch_size)

            # Reading a value waits for a GPU, so values are read once per interval.
            if step % args.log_every == 0 or step % steps_per_epoch == 0:
                means = interval_means(interval, len(objects.class_names))
                speed = interval_speed(len(interval), batch_size, time.perf_counter() - interval_began)
                write_log(args, epoch=epoch + 1, step=step, **speed, **means)
                bar.set_postfix(loss=f"{means['loss']:.2f}", coverage=f"{means['coverage']:.2f}")
                interval, interval_began = [], time.perf_counter()

        is_last = epoch + 1 == args.epochs
        is_due = args.eval_every > 0 and (epoch + 1) % args.eval_every == 0 and not is_last
        if is_due and test.labels is not None:  # after the last epoch train_and_score does it
            accuracy = top_one(evaluate_all(state.teacher, test, args))
            write_log(args, epoch=epoch + 1, step=step, teacher=accuracy)
            interval_began = time.perf_counter()
        state.epoch = epoch + 1
        if is_last or time.perf_counter() - last_save > SAVE_EVERY:
            state.save()
            last_save = interval_began = time.perf_counter()
    bar.close()


def batches_of_epoch(epoch: int, objects: Objects, batch_size: int, image_size: int, args):
    """Shuffled batches of an epoch; what does not fill a batch is left out.

    Returns for each batch its indices (B,), the part of them that is this process's, and that part's
    photographs. All random numbers of an epoch follow from the seed and its number, so that a continued run
    computes the same as one that never stopped. Processes shuffle alike, then each draws its own.
    """
    # Large odd factors keep the seeds of other runs, epochs and processes apart.
    epoch_seed = args.seed * 100_003 + epoch
    torch.manual_seed(epoch_seed)
    batches = torch.randperm(len(objects)).split(batch_size)[:len(objects) // batch_size]

    process_seed = epoch_seed * 1_009 + rank()
    torch.manual_seed(process_seed)
    parts = [my_part(batch) for batch in batches]
    return zip(batches, parts, training_photographs(objects, parts, image_size, process_seed))


def interval_speed(steps: int, batch_size: int, seconds: float) -> dict:
    """How many steps a line of the log is about, and how fast they were."""
    speed = steps * batch_size / seconds
    return {"steps": steps, "seconds": round(seconds, 3), "objects_per_second": round(speed, 1)}


def interval_means(interval: list, classes: int) -> dict:
    """One line of the log: means over an interval of steps, each (step, terms, labels, truth).

    coverage: kept labels / all labels.
    label_accuracy: right labels / kept labels; None without true labels.
    named: for each name, kept labels with that name / all labels.
    entropy: of the names among the kept labels, in nats.
    Raises: UserError with the step, counted from 1 as in log.jsonl, and all terms where a loss is not finite.
    """
    losses = torch.stack([terms["loss"] for _, terms, _, _ in interval])
    if not losses.isfinite().all():
        first_bad = losses.isfinite().tolist().index(False)
        step, terms, _, _ = interval[first_bad]
        values = {name: float(value) for name, value in terms.items()}
        raise UserError(f"the loss is not finite at step {step + 1}: {values}; lower --lr, or look at the "
                        "data; last.pt is of an earlier epoch, if there was one")

    _, first_terms, _, first_truth = interval[0]
    row = {}
    for name in first_terms:
        values = [torch.as_tensor(terms[name]).double() for _, terms, _, _ in interval]
        row[name] = torch.stack(values).mean().item()

    given, right, total = torch.zeros(classes), 0, 0
    for _, _, labels, truth in interval:
        for label, keep in labels.values():
            given += label[keep].bincount(minlength=classes).cpu()
            total += len(label)
            if truth is not None:
                right += (label == truth)[keep].sum().item()
    kept = given.sum().item()
    row["coverage"] = kept / total
    row["label_accuracy"] = None if first_truth is None else right / max(kept, 1)
    row["named"] = (given / total).tolist()
    row["entropy"] = torch.special.entr(given / max(kept, 1)).sum().item()
    return row


def write_log(args, **row):
    """Add a line to OUT/log.jsonl."""
    if leader():
        with open(args.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def evaluate_all(model: CrossMoST, objects: Objects, args, predictions: Path | None = None) -> dict:
    """What assess() says of a model; under torchrun each process embeds its part of the objects.

    predictions: a file, into which the leader writes a name for each object; None writes nothing.
    """
    probs = to_probs(gather_embedded(embed, model, objects, args.views))
    if leader() and predictions is not None:
        write_whole(predictions, write_predictions, objects, probs)
    return assess(probs, objects)


def name_together(teacher: CrossMoST, objects: Objects, args) -> Tensor:
    """What transduced_labels makes of the teacher's predictions for all training objects [together].

    In place of the names' texts stand the columns of the teacher's classifier. They are the texts at first,
    and are trained like all other weights. Returns (N, C) probabilities, on the CPU.
    """
    embedded = gather_embedded(embed, teacher, objects, args.views)
    texts = F.normalize(teacher.classifier.detach().float(), dim=0).T.cpu()
    probs = to_probs(embedded)["joint"]
    return transduced_labels(probs, embedded["image_features"], embedded["point_features"], texts)

# ------ A whole run ----------------------------------------------------------------------------------------
def main(argv=None) -> dict:
    """Run all of it. Returns what it writes to OUT/results.json."""
    join_processes()  # before anything opens a context on a GPU
    args = parse_args(argv)
    refuse_contradictions(args)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32; bfloat16 is the fast way

    objects, test = (load_dataset(args.dataset, args.data_root, split, args.points, args.domain,
                                  args.download, args.up) for split in ("train", "test"))
    refuse_wrong_data(args, objects)
    start = find_start(args, objects)
    if args.stage == "pretrain":
        print(f"the start is {start}")
        return {"start": str(start)}

    state = build_state(args, objects, start)
    try:
        only_writer = lock(state.path, timeout=0) if leader() else nullcontext()
        with only_writer:
            return train_and_score(state, objects, test, args, start)
    except Timeout as error:
        raise UserError(f"another process writes to {args.out}; wait, or name another --out") from error
    except KeyboardInterrupt:
        kept = "no epoch is saved yet; the same command begins again"
        if state.path.exists():
            kept = f"{state.path} holds the last saved epoch; the same command goes on from it"
        raise KeyboardInterrupt(f"stopped; {kept}") from None
    except RuntimeError as error:
        # What gloo and NCCL raise where the other end of a connection is gone has no type of its own.
        if dist.is_initialized() and any(word in str(error) for word in ("gloo", "NCCL", "onnection")):
            raise UserError("another of torchrun's processes has ended; what it printed says why. The same "
                            "command goes on from the last saved epoch") from error
        raise


def refuse_contradictions(args):
    """Raises: UserError for options that do not go together. No data are needed to see that."""
    rule, both = RULES[args.labels], args.modalities == "both"
    if rule.needs_both and not both:
        raise UserError(f"--labels {args.labels} needs both modalities; drop it, or --modalities")
    is_finished = args.start_checkpoint or (args.model in STARTS and args.model != "tiny")
    if is_finished and (args.stage == "pretrain" or args.pretrain_epochs):
        raise UserError(f"{args.start_checkpoint or args.model} is a finished start; drop --stage pretrain "
                        "and --pretrain-epochs")
    if args.pretrained and args.model in STARTS:
        raise UserError(f"--model {args.model} is one file; use --start-checkpoint FILE, no --pretrained")
    if args.model not in STARTS:
        plain_image_tower(args.model, args.pretrained)
    if args.dataset == "shapenet55" and args.stage == "train" and args.model in STARTS:
        raise UserError("shapenet55 is for making starts; add --stage pretrain, or take another --dataset")
    if len(args.threshold) > (2 if args.labels == "separate" or not both else 1):
        raise UserError("--threshold takes one value; two, image's and point's, go with --labels separate")
    if args.shares and not sum(args.shares):
        raise UserError("--shares are all 0; expected a number for each class, not all of them 0")
    if args.out.is_file():
        raise UserError(f"--out {args.out} is a file; name a folder")


def refuse_wrong_data(args, objects: Objects):
    """Raises: UserError for options that do not go with these objects. Warns where they fit badly."""
    classes = objects.class_names
    if RULES[args.labels].needs_truth and objects.labels is None:
        raise UserError(f"--labels {args.labels} needs true labels, {objects.name} has none; use --labels "
                        "joint")
    if args.shares and len(args.shares) != len(classes):
        raise UserError(f"--shares has {len(args.shares)} numbers; expected {len(classes)}, for "
                        f"{', '.join(classes)}")
    batch = min(args.batch_size, len(objects))
    if batch % world_size():
        raise UserError(f"{world_size()} processes cannot share a batch of {batch} objects; "
                        "change --batch-size")
    if batch < args.batch_size:
        print(f"--batch-size is {args.batch_size}, there are {batch} objects: each step takes all of them")
    unknown = [name for name in classes if name not in MODELNET10]
    if args.model == "tiny" and unknown:
        print(f"warning: the small start knows ten kinds of furniture only; {len(unknown)} of "
              f"{len(classes)} names are others ({', '.join(unknown[:3])}); expect little, or take "
              "--model ulip2", file=sys.stderr)


def build_state(args, objects: Objects, start: Path) -> "TrainingState":
    """Student, teacher and optimizer of a run that begins."""
    student = build_model(args.model, objects.class_names, TEMPLATES[args.templates], args.pretrained, start,
                          device=args.device, groups=args.groups, group_size=args.group_size,
                          target=args.point_target)
    student.precision = precision_for(args.precision, args.device)
    student.visual.set_grad_checkpointing(args.grad_checkpointing)
    # The teacher begins as the student, and no gradient ever reaches it.
    teacher = copy.deepcopy(student).requires_grad_(False)
    groups = parameter_groups(student, args.weight_decay, args.layer_decay, args.freeze)
    # lr 0: train_step sets each group's rate at every step. The betas are the original's.
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    if args.compile:
        student.compile_blocks()
        teacher.compile_blocks()
    return TrainingState(student, teacher, optimizer, args, objects, NO_EFFECT_ON_RESULTS)


def train_and_score(state: TrainingState, objects: Objects, test: Objects, args, start: Path) -> dict:
    """Score the start, train, score again. Returns the results; they and the names are written to OUT."""
    changes = args.changes or "no option of the method changed"
    headline = f"{objects.name} with {args.model}, seed {args.seed}, {changes}"
    print(headline)
    print_settings(args)
    if args.resume and state.path.exists():
        state.load()
        print(f"continuing {state.path} after epoch {state.epoch}")
    else:
        begin(state, objects, test, args, start)
    results = {"dataset": objects.name, "split": test.split, "objects": len(test),
               "classes": len(test.class_names), "model": args.model, "start": start.stem,
               "seed": args.seed, "epochs": args.epochs,
               "pretrain_epochs": args.pretrain_epochs,
               "precision": state.identity["precision"], "changed": args.changed, "code": CODE,
               "commit": provenance(args.device)["commit"], "zero_shot": top_one(state.zero_shot)}
    print(table(results))
    print_reported(args)

    self_train(state, objects, test, args)

    # The last epoch counts, whatever its accuracy: no label chooses an epoch (Deviation D15).
    student = evaluate_all(state.student, test, args)
    teacher = evaluate_all(state.teacher, test, args, args.out / "predictions.csv")
    if top_one(teacher):
        write_log(args, epoch=args.epochs, teacher=top_one(teacher))
    results |= {"student": top_one(student), "teacher": top_one(teacher),
                "teacher_per_class": teacher.get("per_class"),
                "agreement": {"start": state.zero_shot["agreement"], "teacher": teacher["agreement"]},
                "shares": {"start": state.zero_shot["shares"], "teacher": teacher["shares"]},
                "seconds": round(state.seconds(), 1), "gpu_gib": peak_memory(args.device)}
    if not leader():
        return results
    lines = read_log(state.log_path)
    results["pseudo_label"] = pseudo_label_quality(lines, args.epochs)
    write_whole(args.out / "curves.png", plot_curves, lines, results["zero_shot"])
    write_whole(args.out / "results.json", Path.write_text, json.dumps(results, indent=1))
    print(f"\n{table(results)}\npseudo-labels of the last epoch, %: {results['pseudo_label']}")
    print_changes(state.zero_shot, teacher, len(objects))
    print(f"a name for each object: {args.out / 'predictions.csv'}\n{headline}")
    return results


def begin(state: TrainingState, objects: Objects, test: Objects, args, start: Path):
    """Remove what an earlier run left in OUT, begin the log, and score the start."""
    if leader():
        args.out.mkdir(parents=True, exist_ok=True)
        # A folder with parts of two runs would mix up their numbers.
        for name in LEFT_BY_A_RUN:
            (args.out / name).unlink(missing_ok=True)
        trainable = sum(p.numel() for group in state.optimizer.param_groups for p in group["params"])
        write_log(args, options=state.options, sources=args.sources, start=start.stem, train=len(objects),
                  test=len(test), trainable=trainable, code=CODE, **provenance(args.device))
    state.zero_shot = evaluate_all(state.student, test, args, args.out / "predictions-start.csv")


def print_reported(args):
    """What a start's authors report on this data set, so that a wrong set-up is seen before it trains."""
    reported = STARTS.get(args.model, {}).get("reported")
    if reported and reported["dataset"] == args.dataset:
        print(f"{args.model}'s authors report {reported['point']} for points ({reported['measured']}; "
              f"{reported['source']}); far below that, look at eval.py --preview, and at --up")


def print_changes(start: dict, teacher: dict, objects: int):
    """Say without labels what training changed, and warn where that was seen to do harm.

    How far to trust the warning (measured: assets/folders.md): with `--labels joint` and no `fairness` 10 of
    30 runs did harm and 11 were warned, 8 of these rightly. Wrong --shares do harm that it does not see. Of
    90 runs with a folder's defaults 5 did a little harm, and none of these was warned. Little agreement
    before training means many errors, but training rarely added to them.
    """
    print(f"image and point agree on {start['agreement']} % of the objects before training, "
          f"{teacher['agreement']} % after")
    changes = {name: (share, teacher["shares"][name]) for name, share in start["shares"].items()}
    largest = sorted(changes, key=lambda name: -abs(changes[name][1] - changes[name][0]))[:20]
    of_which = "each name" if len(largest) == len(changes) else "the twenty names that changed most"
    listed = [f"{name} {before:.0f} -> {after:.0f}"
              for name, (before, after) in changes.items() if name in largest]
    print(f"share of {of_which}, before -> after, %: {', '.join(listed)}")

    def entropy(opinion: dict) -> float:
        return torch.special.entr(torch.tensor([*opinion["shares"].values()]) / 100).sum().item()
    agree_less = teacher["agreement"] < start["agreement"] - 1
    fewer_names = entropy(teacher) < entropy(start) - 0.1
    signs = {"image and point agree on fewer objects than before": agree_less,
             "a few names have taken the place of others": fewer_names}
    seen = [sign for sign, is_seen in signs.items() if is_seen]
    if seen:
        print(f"warning: {', and '.join(seen)}: training may have done harm. Compare "
              "predictions-start.csv with predictions.csv; list only names that occur, or say roughly how "
              "many objects of each there are (--shares)", file=sys.stderr)
    if start["agreement"] < 65:
        print("image and point agreed on few objects before training: expect errors. Rough numbers of "
              "objects for each name help most (--shares)")
    if objects < 64:
        print(f"{objects} objects make few steps: a change of one or two objects is chance")


def provenance(device: str) -> dict:
    """Versions, commit and device, for the first line of the log."""
    name = torch.cuda.get_device_name(device) if "cuda" in device else f"{os.cpu_count()} CPU cores"
    # --no-optional-locks: git writes nothing there.
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True,
                                   check=True)
        commit = described.stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = "unknown"
    return {"python": sys.version.split()[0], "torch": str(torch.__version__),
            "open_clip": open_clip.__version__, "commit": commit, "device": name}


def peak_memory(device: str) -> float | None:
    """GiB of GPU memory at most, None on a CPU."""
    return round(torch.cuda.max_memory_allocated(device) / 2 ** 30, 1) if "cuda" in device else None

# ------ Pre-training of a start ----------------------------------------------------------------------------
# Of `tiny`, and of a point encoder beside an open_clip model (batch, lr and weight decay are ULIP's).
PRETRAIN = {"tiny": dict(objects=12000, passes=10, batch=32, lr=1e-3, weight_decay=0.05),
            "clip": dict(objects=4000, passes=12, batch=64, lr=5e-4, weight_decay=0.1)}


def find_start(args, objects: Objects) -> Path:
    """The start's file: the one named, in the repository, fetched, or pre-trained here.

    What is pre-trained is kept in --cache under a hash of the options that made it and, where the clouds of
    the training objects were used, of these. One that other code made is used all the same; load_start says
    so. Raises: UserError where a start cannot be had.
    """
    makes_tiny = args.model == "tiny" and (args.pretrain_epochs or args.stage == "pretrain"
                                           or args.dataset == "shapenet55")
    if args.start_checkpoint or (args.model in STARTS and not makes_tiny):
        path = args.start_checkpoint or start_file(args.model, args.cache, args.download)
    else:
        path = args.cache / f"{args.model.replace('/', '-')}-{pretraining_key(args, objects)}.pt"
        with lock(path):
            if not path.exists():
                pretrain(args, objects, path)
    return path


def pretraining_key(args, objects: Objects) -> str:
    """A hash of all that a pre-trained start depends on, but the code."""
    made_by = {name: getattr(args, name) for name in ("model", "pretrained", "pretrain_epochs", "groups",
                                                      "group_size", "seed", "points", "precision")}
    if args.model != "tiny" or args.dataset == "shapenet55":
        clouds = hashlib.sha256(objects.points.contiguous().numpy()).hexdigest()
        made_by |= {"templates": args.templates, "objects": objects.name, "clouds": clouds}
    return hashlib.sha256(json.dumps([PRETRAIN, made_by]).encode()).hexdigest()[:16]


def pretrain(args, objects: Objects, path: Path):
    """Train a start into a file [pretrain]. Labels of the data set that it is for are never used.

    `tiny`: all three towers, on procedural objects and their names.
    An open_clip model: only the point encoder, towards the frozen towers (ULIP). It sees procedural objects
    with names, and the training objects' clouds without names.
    `--dataset shapenet55` replaces both kinds of objects; its names are used.
    Beside `path` lie a log, a line per 100 steps, and a file to continue from after a pass.
    """
    model, text, clouds, labels, class_names = pretraining_material(args, objects)
    values = PRETRAIN["tiny" if text else "clip"]
    passes, batch = args.pretrain_epochs or values["passes"], values["batch"]
    parameters = [p for part in (model, text) if part for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, values["lr"], betas=(0.9, 0.98),
                                  weight_decay=values["weight_decay"], fused=True)
    steps_per_pass = len(clouds) // batch
    total_steps = passes * steps_per_pass
    schedule = OneCycleLR(optimizer, values["lr"], total_steps, pct_start=0.05, cycle_momentum=False)

    last_path, log_path = path.with_suffix(".last.pt"), path.with_suffix(".log.jsonl")
    parts = {"model": model, "text": text, "optimizer": optimizer, "schedule": schedule}
    parts = {name: part for name, part in parts.items() if part}
    first = resume_pretraining(parts, last_path)
    bar = tqdm(total=total_steps, initial=first * steps_per_pass, desc=f"pre-training {args.model}",
               unit="step")
    last_save, losses, began = time.perf_counter(), [], time.perf_counter()
    for done in range(first, passes):
        torch.manual_seed(args.seed * 100_003 + done)
        for index in torch.randperm(len(clouds)).split(batch)[:steps_per_pass]:
            loss = pretrain_loss(model, text, clouds[index].to(args.device), labels[index], class_names)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            bar.update()
            if len(losses) == 100 or bar.n % steps_per_pass == 0:
                log_pretraining(log_path, bar.n, losses, len(losses) * batch / (time.perf_counter() - began))
                losses, began = [], time.perf_counter()
        if time.perf_counter() - last_save > SAVE_EVERY:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_file({**states, "passes": done + 1, "code": CODE}, last_path)
            last_save = began = time.perf_counter()
    bar.close()

    model.classifier = None
    made_by = {"pretrain_epochs": passes, "code": CODE, **provenance(args.device)}
    save_start(model, text, plain_options(args) | made_by, path)
    last_path.unlink(missing_ok=True)


def resume_pretraining(parts: dict, last_path: Path) -> int:
    """Go back to the last saved pass. Returns how many are done, 0 without a file or with other code's."""
    if not last_path.exists():
        return 0
    saved = read_file(last_path)
    if saved["code"] != CODE:
        return 0
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["passes"]


def pretraining_material(args, objects: Objects) -> tuple:
    """Model, text tower to train (None: the names are fixed), clouds, labels (-1: no name), class names."""
    tiny, shapenet = args.model == "tiny", args.dataset == "shapenet55"
    count = PRETRAIN["tiny" if tiny else "clip"]["objects"]
    source = objects if shapenet else sample_shapes(count, seed=1000 + args.seed, points=args.points)
    clouds, labels = source.points, source.labels
    point = {"groups": args.groups, "group_size": args.group_size}
    if tiny:
        model, text = random_tiny(args.seed, **point)
        text = text.to(args.device).train()
    else:
        model = build_model(args.model, source.class_names, TEMPLATES[args.templates], args.pretrained,
                            seed=args.seed, device=args.device, **point)
        text = None
        if not shapenet:
            clouds = torch.cat([clouds, objects.points])
            labels = torch.cat([labels, torch.full((len(objects),), -1)])
    model = model.to(args.device).train()
    if not tiny:
        model.visual.requires_grad_(False).eval()
    model.precision = precision_for(args.precision, args.device)
    return model, text, clouds, labels, source.class_names


def log_pretraining(log_path: Path, step: int, losses: list[Tensor], speed: float):
    """Add a line to a start's log. Raises: UserError where a loss is not finite."""
    loss = torch.stack(losses).mean().item()
    if not math.isfinite(loss):
        raise UserError(f"the loss of pre-training is not finite at step {step}; look at the data")
    row = {"step": step, "loss": loss, "objects_per_second": round(speed, 1)}
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(log_path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def pretrain_loss(model, text, points, labels, class_names) -> Tensor:
    """Half the sum of three InfoNCEs (point-image, image-text, point-text), and masked modelling [pretrain].

    points: (B, P, 3). labels: (B,) on the CPU, index into class_names, -1 where there is no name.
    text: the text tower to train. Without it the image tower and the names (the classifier's columns) stay
    fixed, so there is no image-text term.
    """
    batch, device = len(points), points.device

    # In each modality a random half of the objects is seen strongly augmented.
    views = draw_views(random_yaw(points), model.visual.image_size[0])
    use_strong = torch.rand(2, batch, 1, 1, device=device) < 0.5
    strong_image, strong_points = use_strong[0].unsqueeze(-1), use_strong[1]  # (B, 1, 1, 1), (B, 1, 1)
    images = model.normalise(torch.where(strong_image, views["strong_image"], views["weak_image"]))
    groups = model.group(torch.where(strong_points, views["strong_points"], views["weak_points"]))

    # In each modality a random quarter of the objects is masked: 30 % of the patches (only where the image
    # tower trains), 30 to 40 % of the groups.
    is_masked = torch.rand(2, batch, 1, device=device) < 0.25
    image_hidden = None
    if text is not None:
        image_hidden = hide_patches(batch, model.visual.grid_size[0], 0.3, device) & is_masked[0]
    point_hidden = hide_groups(groups.centres, 0.3) & is_masked[1]
    out = model(images, groups, image_hidden, point_hidden)

    scale = model.logit_scale.exp()
    alignment = cross_modal_alignment_loss(out.image_features, out.point_features, 1 / scale) / 2

    # The rows that have a name are found on the CPU, because nonzero() would wait for a GPU.
    rows = (labels >= 0).nonzero()[:, 0]
    row_labels, rows = labels[rows].to(device), rows.to(device)
    if text is not None:
        template = TEMPLATES["depth"][torch.randint(len(TEMPLATES["depth"]), ())]
        names = text([template.format(name) for name in class_names])
        alignment = alignment + name_alignment_loss(out.image_features[rows], names, row_labels, scale)
    else:
        names = model.classifier.detach().T
    if len(rows):
        alignment = alignment + name_alignment_loss(out.point_features[rows], names, row_labels, scale)

    terms = masked_terms(out, images, image_hidden, point_hidden)
    weights = {"mim": 0.1, "mpm": 0.1, "gl_image": 0.02, "gl_point": 0.02}
    return alignment / 2 + sum(weights[name] * term for name, term in terms.items())


if __name__ == "__main__":
    with one_line_errors():
        main()
