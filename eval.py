"""Accuracy, names, tables and pictures: of a trained checkpoint, a zero-shot start, single files, many runs.

    python eval.py --checkpoint runs/shapes-tiny/last.pt                # on the data it was trained for
    python eval.py --model ulip2 --classes "mug,bowl,desk lamp" scans/*.ply
    python eval.py --dataset modelnet40 --preview sheet.png             # what the models see of a data set"""
import argparse
import csv
import json
import math
import os
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from data import (DATASETS, UP, Objects, UserError, dataset_row, draw_views, fixed_images, load_dataset,
                  load_files, read_lines, reading, training_photographs)
from model import (STARTS, TEMPLATES, CrossMoST, build_model, load_checkpoint, read_start, start_file,
                   whole_file)

MODALITIES = ("image", "point", "joint")


@torch.no_grad()
def embed(model: CrossMoST, objects: Objects, views: int | None = None, batch_size: int = 64) -> dict:
    """image_logits, point_logits (N, C), image_features, point_features (N, E) of all objects, on the CPU.
    Inputs are fixed: the views of fixed_images, over which an image's are the mean, and the cloud as it is.
    Raises: UserError where the model's classes are not the objects'."""
    numbers = [str(k) for k in range(len(objects.class_names))]  # a published file has no names of classes
    if list(model.class_names) not in (list(objects.class_names), numbers):
        raise UserError(f"{objects.name} has {objects.class_names[:4]}, the model {model.class_names[:4]}"
                        "; evaluate it on the data set it was trained for (a start: --start-checkpoint)")
    device, was_training, parts, at = model.logit_scale.device, model.training, [], 0
    model.eval()
    for images in fixed_images(objects, views, model.visual.image_size[0], batch_size, device):
        points = objects.points[at:at + len(images)].to(device)
        at += len(images)
        out = model(model.normalise(images), points)
        parts.append({name: value.cpu() for name, value in vars(out).items()})
    model.train(was_training)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def to_probs(logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """Class probabilities (N, C) from embed()'s logits: image, point, and joint, the mean of the two."""
    image, point = logits["image_logits"].softmax(dim=-1), logits["point_logits"].softmax(dim=-1)
    return {"image": image, "point": point, "joint": (image + point) / 2}


def evaluate(model: CrossMoST, objects: Objects, views: int | None = None,
             predictions: Path | None = None) -> dict:
    """What assess says of the model's probabilities. predictions: a file for write_predictions."""
    probs = to_probs(embed(model, objects, views))
    write_whole(predictions, write_predictions, objects, probs)
    return assess(probs, objects)


def write_whole(path: Path | None, write, *given):
    """Make the file `path`, whole or not at all, by write(temporary name, *given); nothing for None."""
    if path:
        with whole_file(path) as temporary:
            write(temporary, *given)


def assess(probs: dict[str, Tensor], objects: Objects) -> dict:
    """What probabilities (N, C) tell, in percent: "agreement" of image and point, "shares" of joint names;
    with labels top-1 accuracy "image", "point", "joint", and "per_class": {name: {"image", ...}}."""
    def percent(hits: Tensor) -> float:
        return round(100 * hits.double().mean().item(), 2)
    named = {m: p.argmax(dim=-1) for m, p in probs.items()}
    found = {"agreement": percent(named["image"] == named["point"]),
             "shares": {name: percent(named["joint"] == k) for k, name in enumerate(objects.class_names)}}
    if objects.labels is not None:
        correct = {m: named[m] == objects.labels for m in MODALITIES}
        found |= {m: percent(correct[m]) for m in MODALITIES}
        found["per_class"] = {
            objects.class_names[k]: {m: percent(correct[m][objects.labels == k]) for m in MODALITIES}
            for k in objects.labels.unique().tolist()}
    return found


def top_one(found: dict) -> dict | None:
    """Of what assess returns the accuracy alone; None without labels."""
    return {m: found[m] for m in MODALITIES} if "joint" in found else None


def predict_by_cache(model: CrossMoST, unlabelled: Objects, objects: Objects, views: int | None = None,
                     shots: int = 16, sharpness: float = 5.5) -> dict[str, Tensor]:
    """A rival without training, after Point-Cache (arXiv 2503.12150); probabilities as to_probs returns them.
    logits_m + s sum_k exp(-sharpness (1 - f_m . f_mk)) onehot(y_k) / shots, in each modality m, with the
    model's logit scale s. The keys k are of each predicted class the `shots` unlabelled objects of highest
    joint confidence. shots and sharpness are Tip-Adapter's (arXiv 2111.03930)."""
    cached, out = embed(model, unlabelled, views), embed(model, objects, views)
    confidence, labels = to_probs(cached)["joint"].max(dim=-1)
    by_confidence = confidence.argsort(descending=True)
    keys = torch.cat([by_confidence[labels[by_confidence] == k][:shots]
                      for k in range(len(model.class_names))])
    names = F.one_hot(labels[keys], len(model.class_names)).float()
    for m in ("image", "point"):
        similarity = out[f"{m}_features"] @ cached[f"{m}_features"][keys].T
        nearness = (-sharpness * (1 - similarity)).exp()
        out[f"{m}_logits"] += model.logit_scale.exp().item() * nearness @ names / shots
    return to_probs(out)


# ------ Tables ----------------------------------------------------------------------------------------------
def table(results: dict, every_class_of: str | None = None) -> str:
    """The closing table: a row for each of zero_shot, cache, student, teacher that `results` has accuracy of;
    below it the mean over classes, and every class, of one of these."""
    what = f"{results['dataset']} {results['split']}, {results['objects']} objects"
    rows = {key.replace("_", "-"): results[key] for key in ("zero_shot", "cache", "student", "teacher")
            if "joint" in (results.get(key) or ())}
    if not rows:
        return f"{what} without labels"
    if every_class_of:
        per_class = results[every_class_of]["per_class"]
        mean = {m: statistics.mean(row[m] for row in per_class.values()) for m in MODALITIES}
        rows |= {f"{every_class_of.replace('_', '-')}, mean over classes": mean, **per_class}
    lines = [f"top-1 %, {what}".ljust(44) + "".join(m.rjust(8) for m in MODALITIES)]
    lines += [label.ljust(44) + "".join(f"{row[m]:8.1f}" for m in MODALITIES) for label, row in rows.items()]
    return "\n".join(lines)


def collect(folder: Path, assets: Path) -> str:
    """Gather FOLDER/**/results.json into ASSETS/results.json, and their tables into ASSETS/tables.md.
    Returns the short table. Raises: UserError or OSError for files that are not as they should be."""
    runs = {}
    for path in sorted(folder.glob("**/results.json")):
        with reading(path, "expected results of train.py or eval.py --rival, each kind once; remove it"):
            run = json.loads(path.read_text())
            if run["zero_shot"]:  # else there were no labels
                tables([run])
                if runs.setdefault((run["dataset"], setting(run), run["seed"]), run) is not run:
                    raise ValueError("another run there has its options and seed")
    if not runs:
        raise FileNotFoundError(f"no results.json with accuracy in {folder}; README, Ablations, makes some")
    short, full = tables([*runs.values()])
    write_whole(assets / "tables.md", Path.write_text, full)
    write_whole(assets / "results.json", Path.write_text, json.dumps([*runs.values()], indent=0))
    return short


def setting(run: dict) -> str:
    """What sets a run apart from the method with its defaults, as options."""
    if "cache" in run:
        return "`eval.py --rival`"
    words = []
    for key, value in run["changed"].items():
        words += ["--" + key.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    return f"`{' '.join(words)}`" if words else "Cross-MoST"


def tables(runs: list[dict]) -> tuple[str, str]:
    """Many runs as Markdown: a short table (joint accuracy, a column for each data set), and a document with
    a whole table for each data set. A row is a setting, a cell start -> end over its seeds.
    gap: how much of the way from a run's start to its ceiling, --labels truth with its seed, was made."""
    def markdown(cells):
        return f"| {' | '.join(cells)} |"
    commits = ", ".join(sorted({run.get("commit", "unknown") for run in runs}))
    full = [f"# Results\n\nMade by `python eval.py --runs FOLDER` from runs of commit {commits}.",
            "Top-1 accuracy in percent: zero-shot start -> teacher after the last epoch, mean ± standard\n"
            "deviation over seeds. gap: the share of the way from the start to `--labels truth`, joint."]
    settings = list(dict.fromkeys(["Cross-MoST", *map(setting, runs)]))
    columns = [["joint top-1, %: start -> end (gap)", "---", *settings]]
    for name in dict.fromkeys(run["dataset"] for run in runs):
        own = [run for run in runs if run["dataset"] == name]
        ceiling = {run["seed"]: run["teacher"]["joint"] for run in own if setting(run) == "`--labels truth`"}
        heads = f"{name}, {own[0]['objects']} objects", *MODALITIES, "gap", "student, joint", "joint by seed"
        full += ["", markdown(heads), markdown(["---"] * len(heads))]
        columns.append([name, "---"])
        for label in settings:
            found = [run for run in own if setting(run) == label]
            if not found:
                columns[-1].append("")
                continue
            start = [run["zero_shot"] for run in found]
            end = [run.get("teacher") or run["cache"] for run in found]
            cells = [f"{mean_and_std(start, m)} -> {mean_and_std(end, m)}" for m in MODALITIES]
            way = [(b["joint"] - a["joint"]) / (ceiling[run["seed"]] - a["joint"])
                   for run, a, b in zip(found, start, end) if run["seed"] in ceiling]
            gap = f"{100 * statistics.mean(way):.0f} %" if way else ""
            students = mean_and_std([run["student"] for run in found if "student" in run], "joint")
            by_seed = ", ".join(f"{run['seed']}: {b['joint']:.1f}" for run, b in zip(found, end))
            full.append(markdown([label, *cells, gap, students, by_seed]))
            columns[-1].append(f"{cells[2]} ({gap})" if gap else cells[2])
    return "\n".join(map(markdown, zip(*columns))), "\n".join(full) + "\n"


def mean_and_std(found: list[dict], modality: str) -> str:
    """mean ± standard deviation over seeds; of one seed just its value, of none nothing."""
    values = [row[modality] for row in found]
    mean = f"{statistics.mean(values):.1f}" if values else ""
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def pseudo_label_quality(log_path: Path, epochs: int) -> dict:
    """Coverage and accuracy, percent, of the last epoch's pseudo-labels; accuracy None without labels."""
    rows = [row for row in map(json.loads, log_path.read_text().splitlines())
            if row.get("epoch") == epochs and "coverage" in row]
    shares = [(row["coverage"], row["coverage"] * (row["label_accuracy"] or 0)) for row in rows]
    kept, right = np.average(shares, axis=0, weights=[row["steps"] for row in rows]).tolist()
    known = kept > 0 and rows[0]["label_accuracy"] is not None
    return {"coverage": round(100 * kept, 2), "accuracy": round(100 * right / kept, 2) if known else None}


# ------ Predictions and embeddings --------------------------------------------------------------------------
def name_objects(objects: Objects, probs: dict[str, Tensor]) -> list[list[str]]:
    """Each object's name, joint class and its probability, either modality's, and whether these agree."""
    rows = [[name] for name in objects.names]
    for m in ("joint", "image", "point"):
        for row, confidence, k in zip(rows, *probs[m].max(dim=-1)):
            row += [objects.class_names[k], f"{confidence:.4f}"]
    return [[*row, "yes" if row[3] == row[5] else "no"] for row in rows]


def write_predictions(path: Path, objects: Objects, probs: dict[str, Tensor]):
    """A CSV file with a line for each object."""
    head = "object class confidence image image_confidence point point_confidence agree".split()
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head, *name_objects(objects, probs)])


def write_embeddings(path: Path, embedded: dict, model: CrossMoST, objects: Objects):
    """An .npz file: what embed returns, the classifier, class names, objects' names and labels (-1: none)."""
    labels = torch.full((len(objects),), -1) if objects.labels is None else objects.labels
    with open(path, "wb") as file:
        np.savez_compressed(file, **embedded, classifier=model.classifier.detach().cpu(), labels=labels,
                            class_names=np.array(objects.class_names), names=np.array(objects.names))


# ------ Pictures --------------------------------------------------------------------------------------------
def plot_curves(picture: Path, log_path: Path, zero_shot: dict | None):
    """Accuracy of the teacher by epoch with its zero-shot lines; coverage and accuracy of pseudo-labels."""
    rows = [json.loads(line) for line in log_path.read_text().splitlines()]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row for row in rows if "teacher" in row]
    # Okabe and Ito's colours, safe for colour-blind eyes.
    for name, colour in {"image": "#0072B2", "point": "#D55E00", "joint": "#000000"}.items():
        if zero_shot:
            left.axhline(zero_shot[name], color=colour, linestyle=":", linewidth=1)
        left.plot([row["epoch"] for row in epochs], [row["teacher"][name] for row in epochs], color=colour,
                  label=name, marker="o", markersize=3)
    left.set(xlabel="epoch", ylabel="test top-1, %", title="teacher (dotted: zero-shot)")
    for key, colour in {"coverage": "#009E73", "label_accuracy": "#CC79A7"}.items():
        known = [row for row in rows if row.get(key) is not None]
        right.plot([row["step"] for row in known], [100 * row[key] for row in known], color=colour,
                   label=key.replace("_", " "))
    right.set(xlabel="step", ylabel="%", ylim=(0, 102), title="pseudo-labels")
    for axes in (left, right):
        axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(picture, format="png", dpi=100)


def plot_confusion(picture: Path, probs: Tensor, objects: Objects):
    """Percent of each class (row) that was given each name (column)."""
    count, names = len(objects.class_names), objects.class_names
    truth, named = (F.one_hot(k, count).double() for k in (objects.labels, probs.argmax(dim=-1)))
    matrix = 100 * F.normalize(truth.T @ named, p=1)
    figure = Figure(figsize=(2.5 + 0.32 * count, 2 + 0.32 * count), layout="constrained")
    axes = figure.subplots()
    axes.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(count), names, rotation=90)
    axes.set_yticks(range(count), names)
    axes.set(xlabel="predicted", ylabel="true", title=f"{objects.name} {objects.split}, joint, % of a class")
    for i, j in (matrix >= 0.5).nonzero().tolist():
        axes.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=7,
                  color="white" if matrix[i, j] > 55 else "black")
    figure.savefig(picture, format="png", dpi=100)


def plot_gallery(picture: Path, probs: dict[str, Tensor], objects: Objects, count: int = 12):
    """View and cloud of objects that are named wrongly or in two ways, evenly spaced over all of these."""
    rows, cells = name_objects(objects, probs), []
    truth = None if objects.labels is None else [objects.class_names[k] for k in objects.labels]
    odd = [k for k, row in enumerate(rows) if row[-1] == "no" or truth and row[1] != truth[k]]
    chosen = torch.tensor(odd).long()[torch.linspace(0, len(odd) - 1, min(count, len(odd))).long()]
    for k, images in zip(chosen.tolist(), fixed_images(objects.pick(chosen), 1, 224, 1, "cpu")):
        text = "image: {3} {4}\npoint: {5} {6}".format(*rows[k])
        cells.append((images[0, 0], f"is {truth[k]}\n{text}" if truth else text))
        cells.append((objects.points[k], ""))
    draw_grid(picture, cells, 8, f"{len(odd)} of {len(objects)} objects are named wrongly or in two ways")


def draw_grid(picture: Path, cells: list, columns: int, title: str | None = None):
    """Images (3, H, W) and clouds (P, 3), each with its title, row by row."""
    rows = math.ceil(len(cells) / columns)
    figure = Figure(figsize=(1.9 * columns, 2.3 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    for at, (item, text) in enumerate(cells):
        axes = figure.add_subplot(rows, columns, at + 1, projection="3d" if item.dim() == 2 else None)
        if item.dim() == 2:
            axes.scatter(*item.T, s=1, c=item[:, 2], linewidths=0)
            axes.set(aspect="equal")
        else:
            axes.imshow(item.permute(1, 2, 0).clamp(0, 1).numpy())
        axes.axis("off")
        axes.set_title(text, fontsize=8, loc="left")
    figure.savefig(picture, format="png", dpi=100)


def preview(picture: Path, objects: Objects, size: int = 224, count: int = 8):
    """A sheet of objects: cloud, one evaluation view, weak and strong views."""
    torch.manual_seed(0)
    some = objects.pick(torch.linspace(0, len(objects) - 1, min(count, len(objects))).long())
    stills = [images[:, 0] for images in fixed_images(some, None, size, count, "cpu")]
    photographs = next(iter(training_photographs(some, (torch.arange(len(some)),), size, seed=0)))
    views = draw_views(some.points, size, photographs)
    names = some.names if some.labels is None else [some.class_names[k] for k in some.labels]
    columns = {"cloud": some.points, "evaluation": torch.cat(stills), **views}
    cells = [(items[row], f"{name}\n{title}" if title == "cloud" else title)
             for row, name in enumerate(names) for title, items in columns.items()]
    draw_grid(picture, cells, len(columns))


# ------ The command line ------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = option_parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("what").add_argument
    group("--checkpoint", type=Path, help="a last.pt of train.py, or the authors' trained file")
    group("--model", help=f"or a zero-shot start: {', '.join(STARTS)}, or an open_clip name")
    group("--pretrained", help="open_clip's weights of --model: a tag or a file")
    group("--start-checkpoint", type=Path, help="the start's file, of any family")
    group("--templates", choices=sorted(TEMPLATES), help="texts around a class name of a start")
    group("--classes", help="names for a start instead of the data set's: \"a,b,c\" or a file, a name a line")
    group("--cache", type=Path, default=Path("cache"), help="folder of fetched starts")
    group("--runs", type=Path, help="nothing of these: gather all results below this folder")
    group("--preview", type=Path, help="FILE.png: nothing of these: draw what the models see of --dataset")
    group = parser.add_argument_group("on (if not given: what the checkpoint was trained on)").add_argument
    group("files", nargs="*", type=Path, help="single objects to name")
    group("--dataset", help=f"{', '.join(DATASETS)}, or a folder of your own")
    group("--split", choices=("train", "test"), default="test", help="which of its splits")
    add_data_options(group)
    group("--device", type=usable_device, default=DEVICE, help="where to compute")
    group = parser.add_argument_group("into").add_argument
    group("--rival", action="store_true", help="score a rival of a start, too: a cache of confident objects")
    group("--predictions", type=Path, help="FILE.csv: every object's name, confidence, either opinion")
    group("--embeddings", type=Path, help="FILE.npz: features, logits, classifier")
    group("--confusion", type=Path, help="FILE.png: the confusion matrix")
    group("--gallery", type=Path, help="FILE.png: objects named wrongly or in two ways")
    group("--json", type=Path, help="FILE.json: all figures")
    return parser.parse_args(argv)


def main(argv=None) -> dict | None:
    """Evaluate student and teacher of a checkpoint, or a start; print the tables, return them."""
    args = parse_args(argv)
    if args.runs:
        return print(collect(args.runs, Path("assets")))
    if args.checkpoint and (args.start_checkpoint or args.model or args.classes or args.rival):
        raise UserError("--model, --start-checkpoint, --classes and --rival are of a start; drop these, or "
                        "--checkpoint: it only knows the classes it was trained for")
    if not (args.preview or args.checkpoint or args.start_checkpoint or args.model):
        raise UserError("nothing to evaluate; name a --checkpoint, a --model, or --runs to gather")
    if args.files and args.dataset:
        raise UserError("name single files or a --dataset, not both")
    path = args.checkpoint or args.start_checkpoint
    if args.model in STARTS and not path:
        path = start_file(args.model, args.cache, args.download is not False)
    known = read_start(path) if path else {"options": {}, "architecture": {"class_names": []}}
    objects = load_objects(args, known, args.split)
    if args.preview:
        write_whole(args.preview, preview, objects)
        return print(f"some of {objects.name} {objects.split}'s {len(objects)} objects: {args.preview}")
    if objects.labels is None and (args.confusion or args.rival):
        raise UserError("--confusion and --rival need labels, of classes that are all among the names")
    results = {"dataset": objects.name, "split": objects.split, "objects": len(objects)}
    if args.checkpoint:
        models = {which: load_checkpoint(path, which=which) for which in ("student", "teacher")}
    else:
        templates = TEMPLATES[args.templates or dataset_row(args.dataset)["templates"]]
        name = args.model or known["options"]["model"]
        models = {"zero_shot": build_model(name, objects.class_names, templates, args.pretrained, path)}
        results |= {"start": Path(path or name).stem, "seed": known["options"].get("seed", 0)}
    for which, model in models.items():
        embedded = embed(model.to(args.device), objects, args.views)
        probs = to_probs(embedded)
        results[which] = assess(probs, objects)
    if args.rival:
        unlabelled = load_objects(args, known, "train")
        results["cache"] = assess(predict_by_cache(model, unlabelled, objects, args.views), objects)
    if args.files:
        for row in name_objects(objects, probs):
            print("{}: {} {} (image: {} {}, point: {} {})".format(*row))
    else:
        print(table(results, which))
    write_whole(args.predictions, write_predictions, objects, probs)
    write_whole(args.embeddings, write_embeddings, embedded, model, objects)
    write_whole(args.confusion, plot_confusion, probs["joint"], objects)
    write_whole(args.gallery, plot_gallery, probs, objects)
    write_whole(args.json, Path.write_text, json.dumps(results, indent=1) + "\n")
    if len(objects) < len(args.files):
        raise UserError(f"only {len(objects)} of {len(args.files)} files could be read, see above")
    return results


def load_objects(args, known: dict, split: str) -> Objects:
    """The objects asked for. On the data set a checkpoint was trained on, options not given are its own;
    points and views are its own on any data set."""
    own = known["options"]
    if args.dataset in (None, own.get("dataset")):
        args.dataset = own.get("dataset", "shapes")
        args.domain = args.domain or own.get("domain")
        args.up = args.up or own.get("up")
    args.views = args.views or own.get("views")
    row = dataset_row(args.dataset)
    points = args.points or own.get("points") or row["points"]
    if args.files:
        objects = load_files(args.files, points, args.up or row["up"])
        objects.class_names = known["architecture"]["class_names"]
    else:
        objects = load_dataset(args.dataset, args.data_root, split, points, args.domain, args.download,
                               args.up)
    if args.classes:
        is_file = os.path.isfile(args.classes)  # Path.is_file refuses a long list as a name too long
        rename(objects, read_lines(Path(args.classes)) if is_file else args.classes.split(","))
    if not (objects.class_names or args.preview):
        raise UserError("a start names files by --classes \"mug,bowl,...\"; add it")
    return objects


def rename(objects: Objects, names: list[str]):
    """Name the objects' classes otherwise. Labels stay where every true class is among the names."""
    names, before = [name.strip() for name in names], objects.class_names
    if len(set(names)) < len(names) or "" in names:
        raise UserError(f"--classes has a name twice, or an empty one: {names}")
    known = objects.labels is not None and set(before) <= set(names)
    objects.labels = torch.tensor([names.index(name) for name in before])[objects.labels] if known else None
    objects.class_names = names


# ------ Command lines, train.py's as well -------------------------------------------------------------------
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def one_line_errors():
    """What a user can put right (UserError, OSError, too little memory) ends a script with one line and exit
    code 2. Every other error is a bug, and keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        said = " ".join(str(error).split())
        # By type, or by what torch's CPU allocator says: other errors that speak of memory are bugs.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator: can't" in said:
            said = ("out of memory; lower --batch-size, --groups or --points, or add --grad-checkpointing: "
                    + said)
        elif not isinstance(error, (UserError, OSError)):
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)


def number(low: float, high: float = math.inf, kind: type = float):
    """An argparse type: a finite number in [low, high]."""
    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value
    parse.__name__ = kind.__name__  # argparse prints it
    return parse


COUNT, SHARE, WEIGHT = number(1, kind=int), number(0, 1), number(0)


def usable_device(name: str) -> str:
    """An argparse type: cpu, cuda or cuda:N, where torch can compute here."""
    try:
        if torch.device(name).type not in ("cpu", "cuda"):  # Apple's mps has no float64, for one
            raise argparse.ArgumentTypeError(f"{name!r} is not supported; use cpu or cuda")
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot compute on {name!r}: {str(error).split('. ')[0][:100]}")
    return name


def option_parser(purpose: str) -> argparse.ArgumentParser:
    """Shows defaults; says what is wrong in one line, without forty options' usage before it."""
    return argparse.ArgumentParser(description=purpose, usage=argparse.SUPPRESS,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def add_data_options(add):
    """What both scripts ask of the data; `add` is the add_argument of a parser or a group."""
    add("--data-root", type=Path, default=Path("data"), help="folder that holds the data sets")
    add("--download", action=argparse.BooleanOptionalAction, help="fetch all that is missing, or nothing")
    add("--domain", choices=("source", "target"), help="objects as they are, or as a scanner sees them")
    add("--up", choices=sorted(UP), help="axis that points upwards in the files (down: --up=-y)")
    add("--points", type=COUNT, help="points per cloud")
    add("--views", type=COUNT, help="evaluation: depth views (6) or photographs (all) averaged")


if __name__ == "__main__":
    with one_line_errors():
        main()
