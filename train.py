"""Cross-modal self-training (Cross-MoST, arXiv 2404.10146): a start, its zero-shot accuracy, training without labels.

    python train.py                                          # procedural objects, small start, no download
    python train.py --dataset modelnet10 --model tiny
"""
import argparse
import hashlib
import inspect
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import losses
import model as models
from data import DATASETS, Objects, draw_views, load_dataset, one_line_errors, sample_shapes
from eval import evaluate, percent, plot_curves, table
from losses import (cross_modal_alignment_loss, fairness_loss, global_local_alignment_loss, masked_image_loss,
                    masked_point_loss, name_alignment_loss, pseudo_labels, self_training_loss)
from model import (TEMPLATES, CrossMoST, build_model, embed_names, hide_groups, hide_patches, random_tiny, read_file,
                   save_file, update_teacher)

# The optimiser that suits a start. `tiny` is trained here in minutes: a smaller batch, a larger step, a quicker teacher.
RECIPES = {
    "tiny": dict(epochs=8, batch_size=64, lr=4e-4, layer_decay=1.0, momentum=0.999, points=1024),
}


def parse_args(argv=None) -> argparse.Namespace:
    """All options. The data set's and the start's rows of defaults (DATASETS, RECIPES) fill in what is not given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("data").add_argument
    group("--dataset", choices=sorted(DATASETS), default="shapes", help="objects to adapt to, without their labels")
    group("--data-root", type=Path, default=Path("data"), help="folder that holds the data sets")
    group("--domain", choices=("source", "target"), help="objects as they are, or as a scanner sees them")
    group("--points", type=int, help="points per cloud")
    group("--views", type=int, default=6, help="fixed depth views averaged in evaluation")
    group("--templates", choices=sorted(TEMPLATES), help="texts around a class name")
    group = parser.add_argument_group("start").add_argument
    group("--model", choices=sorted(RECIPES), default="tiny", help="the zero-shot start")
    group("--start-checkpoint", type=Path, help="a start's own file, instead of pre-training one")
    group("--pretrain-epochs", type=int, default=6, help="passes over the 4,000 source objects of pre-training")
    group("--groups", type=int, default=32, help="point groups per cloud")
    group("--group-size", type=int, default=16, help="points per group")
    group("--cache", type=Path, default=Path("cache"), help="folder of pre-trained starts")
    group = parser.add_argument_group("method").add_argument
    group("--modalities", choices=("both", "image", "point"), default="both", help="what is trained")
    group("--labels", choices=("joint", "mean", "separate", "agree", "truth"), default="joint",
          help="joint-label: who names the objects; truth is an oracle that uses the real labels")
    group("--threshold", type=float, help="joint-label: confidence to exceed")
    group("--point-weight", type=float, help="joint-label: factor on the point confidence")
    group("--w-fair", type=float, default=1.0, help="fairness: weight; 0 removes it, as for all weights")
    group("--w-mim", type=float, default=1.0, help="mim: weight")
    group("--w-mpm", type=float, default=1.0, help="mpm: weight")
    group("--w-gl", type=float, default=0.2, help="gl-align: weight, of both modalities")
    group("--w-cross", type=float, default=1.0, help="cross-align: weight")
    group("--cross-temperature", type=float, default=1.0, help="cross-align: divisor of the similarities")
    group("--point-target", choices=("tokens", "points"), default="tokens", help="mpm: what is reconstructed")
    group("--mask-ratio", type=float, default=0.3, help="share of patches and of groups hidden; 0 hides nothing")
    group("--momentum", type=float, help="ema: momentum after 400 steps, from 0.99 at the first")
    group = parser.add_argument_group("optimisation").add_argument
    group("--epochs", type=int, help="passes over the training objects")
    group("--batch-size", type=int, help="objects per step")
    group("--lr", type=float, help="peak learning rate for a batch of 256")
    group("--weight-decay", type=float, default=0.05, help="AdamW, not on 1-D parameters")
    group("--layer-decay", type=float, help="factor on the learning rate for each image block below the last")
    group("--warmup-epochs", type=float, default=1.0, help="epochs of linear warm-up")
    group("--freeze", nargs="*", default=["point_encoder.encoder"], help="parameters not trained, by prefix")
    group = parser.add_argument_group("run").add_argument
    group("--stage", choices=("pretrain", "train"), default="train", help="pretrain stops after the zero-shot start")
    group("--out", type=Path, help="results folder (default: runs/DATASET-MODEL)")
    group("--seed", type=int, default=0, help="of the start, the views, the order and the masks")
    group("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue from OUT/last.pt if it exists")
    group("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    group("--log-every", type=int, default=10, help="steps per line of log.jsonl")
    chosen = parser.parse_known_args([a for a in (sys.argv[1:] if argv is None else argv) if a not in ("-h", "--help")])[0]
    row = {key: value for key, value in DATASETS[chosen.dataset].items() if key != "load"}
    parser.set_defaults(**row, **RECIPES[chosen.model], out=Path("runs") / f"{chosen.dataset}-{chosen.model}")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------
# The zero-shot start

def pretrain_tiny(args, device) -> Path:
    """Pre-train image, point and text tower together on procedural objects; returns the cached file of the start.

    ULIP's losses [pretrain], with the image tower trained too: half the InfoNCE of each pair of modalities. The file's
    name is a hash of everything that made it: settings, seed, code, versions and kind of device.
    """
    made_by = [args.pretrain_epochs, args.groups, args.group_size, args.seed, args.points, args.point_target,
               models.TINY, TEMPLATES["depth"], torch.__version__, torch.device(device).type,
               inspect.getsource(pretrain_tiny), inspect.getsource(data), inspect.getsource(models), inspect.getsource(losses)]
    path = args.cache / f"tiny-{hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:16]}.pt"
    if path.exists():
        return path
    batch, peak, count = 64, 1e-3, 4000
    source = sample_shapes(count, seed=1000 + args.seed, points=args.points)
    model, text = random_tiny(args.seed, groups=args.groups, group_size=args.group_size, target=args.point_target)
    model, text = model.to(device).train(), text.to(device).train()
    torch.manual_seed(args.seed)
    optimizer = torch.optim.AdamW([*model.parameters(), *text.parameters()], lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    steps = args.pretrain_epochs * (count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    bar = tqdm(total=steps, desc="pre-training the tiny start", unit="step")
    for _ in range(args.pretrain_epochs):
        for index in torch.randperm(count)[:count // batch * batch].view(-1, batch):
            points, labels = source.points[index].to(device), source.labels[index].to(device)
            points = data.rotate(points, 2 * math.pi * torch.rand(batch, 3, device=device) * points.new_tensor([0, 0, 1]))
            views = draw_views(points, model.visual.image_size[0])
            strong = torch.rand(2, batch, 1, 1, device=device) < 0.5
            images = torch.where(strong[0, ..., None], views["strong_image"], views["weak_image"])
            out = model(model.normalise(images), torch.where(strong[1], views["strong_points"], views["weak_points"]))
            template = TEMPLATES["depth"][torch.randint(len(TEMPLATES["depth"]), ())]
            names = text([template.format(name) for name in source.class_names])
            scale = model.logit_scale.exp()
            loss = (name_alignment_loss(out.image_features, names, labels, scale)
                    + name_alignment_loss(out.point_features, names, labels, scale)
                    + cross_modal_alignment_loss(out.image_features, out.point_features, 1 / scale) / 2) / 2
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.2f}")
    bar.close()
    save_file({"architecture": model.architecture, "model": model.state_dict(), "text_architecture": text.architecture,
               "text": text.state_dict()}, path)
    return path


# ---------------------------------------------------------------------------------------------------------------
# Optimiser and schedules

def parameter_groups(model: CrossMoST, weight_decay: float, layer_decay: float, freeze: list[str]) -> list[dict]:
    """One group per (learning-rate scale, weight decay); frozen parameters lose requires_grad and are left out.

    scale = layer_decay^(layers + 1 - i) in the image encoder: i = 0 for its embeddings, b + 1 for block b; 1 elsewhere.
    No weight decay on 1-D parameters.
    """
    layers, groups = len(model.visual.transformer.resblocks), {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(freeze)))
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if name.startswith("visual.transformer.resblocks."):
            scale = layer_decay ** (layers - int(name.split(".")[3]))
        elif name.startswith(("visual.conv1", "visual.class_emb", "visual.positional", "visual.mask_token", "visual.ln_pre")):
            scale = layer_decay ** (layers + 1)
        decay = 0.0 if parameter.ndim == 1 else weight_decay
        groups.setdefault((scale, decay), {"params": [], "scale": scale, "weight_decay": decay})["params"].append(parameter)
    return list(groups.values())


def learning_rate(step: int, total: int, warmup: int, peak: float, floor: float) -> float:
    """Linear warm-up from 0 to peak, then a cosine to floor at the last step."""
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, total - 1 - warmup)
    return floor + (peak - floor) * (1 + math.cos(math.pi * min(1, done))) / 2


def teacher_momentum(step: int, final: float) -> float:
    """m = 0.99 + (final - 0.99) min(1, step / 400) [ema]. It must be slow from the first step on."""
    return 0.99 + (final - 0.99) * min(1, step / 400)


# ---------------------------------------------------------------------------------------------------------------
# Self-training

@torch.no_grad()
def name_objects(teacher: CrossMoST, views: dict, args, truth: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
    """(labels, keep) for each trained modality, from the teacher's weak views [joint-label]."""
    if args.labels == "truth":
        everything = torch.ones_like(truth, dtype=torch.bool)
        return {"image": (truth, everything), "point": (truth, everything)}
    out = teacher(teacher.normalise(views["weak_image"]) if args.modalities != "point" else None,
                  views["weak_points"] if args.modalities != "image" else None)
    if args.modalities != "both":
        probs = (out.image_logits if args.modalities == "image" else out.point_logits).softmax(dim=-1)
        return pseudo_labels("separate", probs, probs, args.threshold)
    return pseudo_labels(args.labels, out.image_logits.softmax(dim=-1), out.point_logits.softmax(dim=-1),
                         args.threshold, args.point_weight)


def student_terms(student: CrossMoST, views: dict, labels: dict, args) -> dict[str, Tensor]:
    """Every term of the loss, by name, from the student's strong and masked views."""
    images = points = image_hidden = point_hidden = None
    if args.modalities != "point":
        images = student.normalise(views["strong_image"])
        if args.mask_ratio > 0:
            image_hidden = hide_patches(len(images), student.visual.grid_size[0], args.mask_ratio, images.device)
    if args.modalities != "image":
        points = student.group(views["strong_points"])
        if args.mask_ratio > 0:
            point_hidden = hide_groups(points.centres, args.mask_ratio)
    out, terms = student(images, points, image_hidden, point_hidden), {}
    if images is not None:
        terms["self_image"] = self_training_loss(out.image_logits, *labels["image"])
        terms["fair_image"] = fairness_loss(out.image_logits)
        if image_hidden is not None:
            terms["mim"] = masked_image_loss(out.image_pixels, images, image_hidden)
            terms["gl_image"] = global_local_alignment_loss(out.image_features, out.image_tokens, image_hidden)
    if points is not None:
        terms["self_point"] = self_training_loss(out.point_logits, *labels["point"])
        terms["fair_point"] = fairness_loss(out.point_logits)
        if point_hidden is not None:
            terms["mpm"] = masked_point_loss(out.point_prediction, out.point_target, point_hidden)
            terms["gl_point"] = global_local_alignment_loss(out.point_cls, out.point_tokens, point_hidden)
    if args.modalities == "both":
        terms["cross"] = cross_modal_alignment_loss(out.image_features, out.point_features, args.cross_temperature)
    return terms


def train_step(student, teacher, views, optimizer, step, total_steps, args, truth=None):
    """One update of the student, then of the teacher. Returns the detached terms and the labels it trained on.

    `views` holds images and point clouds only; `truth` is None but for the oracle, --labels truth.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["scale"] * learning_rate(step, total_steps, int(args.warmup_epochs * total_steps / args.epochs),
                                                     args.lr * args.batch_size / 256, 1e-6 * args.batch_size / 256)

    # The teacher sees the weak views and names the objects [joint-label].
    labels = name_objects(teacher, views, args, truth)

    # The student must agree from the strong, masked views, align its modalities and repaint what was hidden.
    weights = {"self_image": 1, "self_point": 1, "fair_image": args.w_fair, "fair_point": args.w_fair, "mim": args.w_mim,
               "mpm": args.w_mpm, "gl_image": args.w_gl, "gl_point": args.w_gl, "cross": args.w_cross}
    terms = student_terms(student, views, labels, args)
    loss = sum(weights[name] * term for name, term in terms.items() if weights[name])
    terms = {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}
    if not torch.isfinite(loss):
        raise ValueError(f"loss is not finite at step {step}: { {name: term.item() for name, term in terms.items()} }; "
                         "lower --lr, or look at the data")

    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    update_teacher(teacher, student, teacher_momentum(step, args.momentum))
    return terms, labels


def train_mode(student: CrossMoST, freeze: list[str]):
    """Training mode, but frozen modules stay in eval mode: their BatchNorm must not move (Deviation D12)."""
    student.train()
    for name, module in student.named_modules():
        if name.startswith(tuple(freeze)):
            module.eval()


def measure(terms: dict, labels: dict, truth: Tensor | None) -> dict[str, Tensor]:
    """Sums for the log: terms, kept and, where the truth is known, correctly named (modalities averaged)."""
    sums = {name: term.double() for name, term in terms.items()}
    sums["kept"] = sum(keep.double().mean() for _, keep in labels.values()) / len(labels)
    if truth is not None:
        right = [(keep & (label == truth)).double().mean() for label, keep in labels.values()]
        sums["right"] = sum(right) / len(right)
    return sums


class Run:
    """What a run needs to go on to the bit: both models, optimiser, step, random state, log position, running sums."""

    def __init__(self, student, teacher, optimizer, args, device):
        self.student, self.teacher, self.optimizer, self.device = student, teacher, optimizer, device
        self.path, self.log_path = args.out / "last.pt", args.out / "log.jsonl"
        self.options = {key: str(value) for key, value in sorted(vars(args).items())
                        if key not in ("out", "cache", "data_root", "resume", "device", "stage", "log_every")}
        self.step, self.sums, self.count, self.zero_shot, self.seconds = 0, {}, 0, None, 0.0

    def log(self, **row):
        """Append one JSON line."""
        with open(self.log_path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def flush(self, epoch: int):
        """Log the means since the last line; starts new sums."""
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        kept, right = means.pop("kept"), means.pop("right", None)
        accuracy = None if right is None else right / kept if kept else 0.0
        self.log(epoch=epoch, step=self.step, steps=self.count, coverage=kept, label_accuracy=accuracy, **means)
        self.sums, self.count = {}, 0

    def save(self):
        random = {"cpu": torch.get_rng_state()}
        if torch.device(self.device).type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        save_file({"architecture": self.student.architecture, "student": self.student.state_dict(),
                   "teacher": self.teacher.state_dict(), "optimizer": self.optimizer.state_dict(), "random": random,
                   "options": self.options, "step": self.step, "sums": self.sums, "count": self.count,
                   "zero_shot": self.zero_shot, "seconds": self.seconds,
                   "log_bytes": self.log_path.stat().st_size}, self.path)

    def load(self):
        """Go back to last.pt. Raises: ValueError where it was made with other options."""
        saved = read_file(self.path, "student", "teacher", "optimizer", "random", "options", "log_bytes")
        changed = {key: f"{saved['options'].get(key)} -> {value}" for key, value in self.options.items()
                   if saved["options"].get(key) != value}
        if changed:
            raise ValueError(f"{self.path} was made with other options ({changed}); use the same, another --out, or "
                             "--no-resume to start over")
        self.student.load_state_dict(saved["student"])
        self.teacher.load_state_dict(saved["teacher"])
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"]["cpu"])
        if "cuda" in saved["random"] and torch.device(self.device).type == "cuda":
            torch.cuda.set_rng_state(saved["random"]["cuda"])
        self.step, self.sums, self.count = saved["step"], saved["sums"], saved["count"]
        self.zero_shot, self.seconds = saved["zero_shot"], saved["seconds"]
        with open(self.log_path, "a") as file:  # forget lines written after the checkpoint
            file.truncate(min(saved["log_bytes"], self.log_path.stat().st_size))


@contextmanager
def finish_step_on_signal():
    """Ctrl-C and SIGTERM set [0] of the yielded list, for the loop to finish its step, save and leave."""
    caught = []
    before = {s: signal.signal(s, lambda number, frame: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def self_train(run: Run, objects: Objects, test: Objects, args):
    """The loop: every epoch a new order, a log line per interval, the teacher's accuracy, a checkpoint."""
    per_epoch = max(1, len(objects) // args.batch_size)
    total, size = args.epochs * per_epoch, run.student.visual.image_size[0]
    points = objects.points.to(run.device)
    truth = None if objects.labels is None else objects.labels.to(run.device)
    started = time.perf_counter() - run.seconds
    bar = tqdm(total=total, initial=run.step, desc="self-training", unit="step")
    train_mode(run.student, args.freeze)
    with finish_step_on_signal() as caught:
        while run.step < total:
            epoch, at = divmod(run.step, per_epoch)
            order = torch.randperm(len(points), generator=torch.Generator().manual_seed(args.seed * 100_003 + epoch))
            for index in order.split(args.batch_size)[at:per_epoch]:
                index = index.to(run.device)
                real = None if truth is None else truth[index]
                terms, labels = train_step(run.student, run.teacher, draw_views(points[index], size), run.optimizer,
                                           run.step, total, args, real if args.labels == "truth" else None)
                run.step, run.count, run.seconds = run.step + 1, run.count + 1, time.perf_counter() - started
                for name, value in measure(terms, labels, real).items():
                    run.sums[name] = run.sums.get(name, 0) + value
                bar.update()
                bar.set_postfix(loss=f"{terms['loss'].item():.2f}", coverage=f"{float(run.sums['kept']) / run.count:.2f}")
                if run.step % args.log_every == 0 or run.step % per_epoch == 0:
                    run.flush(epoch + 1)
                if caught:
                    run.save()
                    bar.close()
                    sys.exit(128 + caught[0])
            if test.labels is not None:
                accuracy = evaluate(run.teacher, test, args.views)
                run.log(epoch=epoch + 1, step=run.step, teacher={name: accuracy[name] for name in ("image", "point", "joint")})
            run.save()
    bar.close()


def pseudo_label_quality(log_path: Path, epochs: int) -> dict:
    """Coverage and accuracy, in percent, of the labels trained on in the last epoch; accuracy None without labels."""
    rows = [row for row in map(json.loads, log_path.read_text().splitlines()[1:]) if row.get("epoch") == epochs and "coverage" in row]
    steps = sum(row["steps"] for row in rows)
    kept = sum(row["steps"] * row["coverage"] for row in rows)
    right = [row["steps"] * row["coverage"] * row["label_accuracy"] for row in rows if row["label_accuracy"] is not None]
    return {"coverage": percent(kept / steps) if steps else None, "accuracy": percent(sum(right) / kept) if right and kept else None}


def provenance(device: str) -> dict:
    """Versions, commit and device, for the first line of the log."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.processor() or platform.machine()
    return {"python": platform.python_version(), "torch": torch.__version__, "open_clip": open_clip.__version__,
            "commit": git.stdout.strip() or None, "device": f"{device}: {name}, {os.cpu_count()} cores"}


def main(argv=None) -> dict:
    """Run all of it. Returns what it writes to OUT/results.json."""
    args, began = parse_args(argv), time.perf_counter()
    objects = load_dataset(args.dataset, args.data_root, "train", args.points, args.domain)
    test = load_dataset(args.dataset, args.data_root, "test", args.points, args.domain)
    start = args.start_checkpoint or pretrain_tiny(args, args.device)
    student = build_model(args.model, objects.class_names, TEMPLATES[args.templates], start, args.seed).to(args.device)
    teacher = build_model(args.model, objects.class_names, TEMPLATES[args.templates], start, args.seed).to(args.device)
    teacher.requires_grad_(False)
    groups = parameter_groups(student, args.weight_decay, args.layer_decay, args.freeze)
    run = Run(student, teacher, torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999)), args, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    results = {"dataset": objects.name, "split": "test", "objects": len(test), "classes": len(test.class_names),
               "model": args.model, "start": start.stem, "seed": args.seed, "epochs": args.epochs}
    if args.resume and run.path.exists():
        run.load()
        print(f"continuing {run.path} at step {run.step}")
    else:
        run.log_path.write_text("")
        run.log(options={key: str(value) for key, value in vars(args).items()}, start=start.stem, train=len(objects),
                test=len(test), trainable=sum(p.numel() for g in groups for p in g["params"]), **provenance(args.device))
        run.zero_shot = evaluate(student, test, args.views) if test.labels is not None else None
    results["zero_shot"] = run.zero_shot and {name: run.zero_shot[name] for name in ("image", "point", "joint")}
    print(table(results))
    if args.stage == "train":
        print({name: getattr(args, name) for name in ("threshold", "point_weight", "templates", "epochs", "lr", "momentum")})
        self_train(run, objects, test, args)
        for name, model in (("student", student), ("teacher", teacher)):
            accuracy = evaluate(model, test, args.views) if test.labels is not None else None
            results[name] = accuracy and {key: accuracy[key] for key in ("image", "point", "joint")}
        results["teacher_per_class"] = accuracy and accuracy["per_class"]
        results["pseudo_label"] = pseudo_label_quality(run.log_path, args.epochs)
        plot_curves(run.log_path, args.out / "curves.png", results["zero_shot"])
        print("\n" + table(results))
        print("pseudo-labels of the last epoch: ", results["pseudo_label"])
    results["seconds"] = round(time.perf_counter() - began, 1)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    with one_line_errors():
        main()
