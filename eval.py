"""Accuracy, names, tables and pictures: of a trained checkpoint, a zero-shot start, single files, many runs.

    python eval.py --checkpoint runs/shapes-tiny/last.pt                # on the data it was trained for
    python eval.py --model ulip2 --classes "mug,bowl,desk lamp" scans/*.ply
    python eval.py --dataset modelnet40 --preview sheet.png             # what the models see of a data set"""
import argparse
import csv
import errno
import json
import math
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import (DATASETS, UP, Objects, UserError, dataset_row, draw_views, fixed_images, load_dataset,
                  load_files, read_lines, training_photographs)
from model import (OTHER_GROUPS, STARTS, TEMPLATES, CrossMoST, build_model, describe_start, group_points,
                   hide_groups, hide_patches, load_checkpoint, start_file, whole_file)

matplotlib.use("Agg")  # draws into files; no screen needed
import matplotlib.pyplot as plt  # noqa: E402

MODALITIES = ("image", "point", "joint")


@torch.no_grad()
def embed(model: CrossMoST, objects: Objects, views: int | None = None, batch_size: int = 64) -> dict:
    """image_logits, point_logits (N, C), image_features, point_features (N, E) of all objects, on the CPU.

    Inputs are fixed: an image's are the mean over `views` (6) depth views, or over all photographs, at most
    `views`; the cloud is taken as it is. Raises: UserError where the model's classes are not the objects'."""
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


def predict(model: CrossMoST, objects: Objects, views: int | None = None) -> dict[str, Tensor]:
    """Class probabilities of every object: {"image", "point", "joint"}, each (N, C), on the CPU."""
    return to_probs(embed(model, objects, views))


def evaluate(model: CrossMoST, objects: Objects, views: int | None = None) -> dict:
    """What accuracy returns. Raises: UserError if the objects have no labels or other classes."""
    if objects.labels is None:
        raise UserError(f"{objects.name} has no labels; accuracy cannot be measured")
    return accuracy(predict(model, objects, views), objects)


def accuracy(probs: dict[str, Tensor], objects: Objects) -> dict:
    """Top-1 in percent: {"image", "point", "joint", "per_class": {name: {"image", ...}}} of probabilities."""
    correct = {name: (p.argmax(dim=-1) == objects.labels).double() for name, p in probs.items()}
    per_class = {}
    for k, name in enumerate(objects.class_names):
        if (objects.labels == k).any():
            per_class[name] = {m: percent(correct[m][objects.labels == k].mean()) for m in MODALITIES}
    return {**{m: percent(correct[m].mean()) for m in MODALITIES}, "per_class": per_class}


def percent(share) -> float:
    """A share in [0, 1] as a percentage with two decimals."""
    return round(100 * float(share), 2)


def opinions(probs: dict[str, Tensor], class_names: list[str]) -> dict:
    """What can be said without labels, in percent: the agreement of the two modalities, and the share of the
    objects that bears each name."""
    named = {m: p.argmax(dim=-1) for m, p in probs.items()}
    shares = named["joint"].bincount(minlength=len(class_names)).double() / len(named["joint"])
    return {"agreement": percent((named["image"] == named["point"]).double().mean()),
            "shares": {name: percent(share) for name, share in zip(class_names, shares)}}


def predict_by_cache(model: CrossMoST, unlabelled: Objects, objects: Objects, views: int | None = None,
                     shots: int = 16, sharpness: float = 5.5) -> dict[str, Tensor]:
    """A rival without training: a cache of confident objects, after Point-Cache (arXiv 2503.12150).

    The `shots` unlabelled objects of each predicted class with the highest joint confidence are its keys;
    logits_m + s sum_k exp(-sharpness (1 - f_m . f_mk)) onehot(y_k) / shots, in each modality m, with the
    model's logit scale s. shots and sharpness are Tip-Adapter's (arXiv 2111.03930). Returns as predict."""
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


# -----------------------------------------------------------------------------------------------------------
# Tables

def table(results: dict, every_class_of: str | None = None) -> str:
    """The closing table: a row for each of zero_shot, cache, student, teacher that `results` holds; below it
    the mean over classes, and every class, of one of these."""
    what = f"{results['dataset']} {results['split']}, {results['objects']} objects"
    rows = {key.replace("_", "-"): results[key] for key in ("zero_shot", "cache", "student", "teacher")
            if results.get(key)}
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
        try:
            run = json.loads(path.read_text())
            if not (run.get("teacher") or run.get("cache")):
                continue  # no labels, nothing to compare
            tables([run])
            other = runs.setdefault((run["dataset"], setting(run), run["seed"]), run)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no results.json of train.py or eval.py: {error!r}; "
                            "run it again, or remove it") from error
        if other is not run:
            raise UserError(f"{path} has the options and seed of another run there; move one elsewhere")
    if not runs:
        raise FileNotFoundError(f"no results.json with accuracy below {folder}; README, Results, makes some")
    short, full = tables([*runs.values()])
    for name, text in (("tables.md", full), ("results.json", json.dumps([*runs.values()], indent=0))):
        with whole_file(assets / name) as temporary:
            temporary.write_text(text)
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
    """Many runs as Markdown: the short table (joint accuracy and gap, a column for each data set), and a
    document with a table for each data set. Rows are settings, in the order of `runs`, over their seeds.

    gap: the share of the way from a run's own start to its ceiling, --labels truth, in joint accuracy."""
    sets, labels = {}, dict.fromkeys(["zero-shot start", "Cross-MoST", *map(setting, runs)])
    for run in runs:
        run = {**run, "end": run.get("teacher") or run["cache"]}
        sets.setdefault(run["dataset"], {}).setdefault(setting(run), {})[run["seed"]] = run
    commits = ", ".join(sorted({run.get("commit", "unknown") for run in runs}))
    full = [f"# Results\n\nMade by `python eval.py --runs FOLDER` from runs of commit {commits}.",
            "Top-1 accuracy in percent after the last epoch, mean ± standard deviation over seeds; of the "
            "teacher,\nwhere it is not said. gap: the share of the way from the start to `--labels truth`."]
    cells = {label: [] for label in labels}
    for name, settings in sets.items():
        objects = next(run["objects"] for run in runs if run["dataset"] == name)
        heads = [f"{name}, {objects} objects", *MODALITIES, "gap", "start, joint", "student, joint",
                 "joint by seed"]
        full += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for label in labels:
            of_start = label == "zero-shot start"
            seeds = settings.get("Cross-MoST" if of_start else label, {})
            starts = [run["zero_shot"] for run in seeds.values()]
            ends = starts if of_start else [run["end"] for run in seeds.values()]
            students = [] if of_start else [run["student"] for run in seeds.values() if "student" in run]
            share = "" if of_start else gap(seeds, settings.get("`--labels truth`", {}))
            joint = mean_and_std(ends)
            cells[label].append(f"{joint} ({share})" if share else joint)
            if seeds:
                by_seed = ", ".join(f"{seed}: {end['joint']:.1f}" for seed, end in zip(seeds, ends))
                row = (label, mean_and_std(ends, "image"), mean_and_std(ends, "point"), joint, share,
                       mean_and_std(starts), mean_and_std(students), by_seed)
                full.append(f"| {' | '.join(row)} |")
    short = [["joint top-1, % (gap)", *sets], ["---"] * (1 + len(sets))]
    short += [[label, *row] for label, row in cells.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in short), "\n".join(full) + "\n"


def gap(seeds: dict, ceiling: dict) -> str:
    shares = []
    for seed in seeds.keys() & ceiling.keys():
        start = seeds[seed]["zero_shot"]["joint"]
        shares.append((seeds[seed]["end"]["joint"] - start) / (ceiling[seed]["end"]["joint"] - start))
    return f"{100 * statistics.mean(shares):.0f} %" if shares else ""


def mean_and_std(found: list[dict], modality: str = "joint") -> str:
    """mean ± standard deviation over seeds; of one seed just its value, of none nothing."""
    values = [row[modality] for row in found]
    mean = f"{statistics.mean(values):.1f}" if values else ""
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def pseudo_label_quality(log_path: Path, epochs: int) -> dict:
    """Coverage and accuracy, percent, of the last epoch's pseudo-labels; accuracy None without labels."""
    rows = [row for row in map(json.loads, log_path.read_text().splitlines()[1:])
            if row.get("epoch") == epochs and "coverage" in row]
    steps = sum(row["steps"] for row in rows)
    kept = sum(row["steps"] * row["coverage"] for row in rows)
    right = [row["steps"] * row["coverage"] * row["label_accuracy"]
             for row in rows if row["label_accuracy"] is not None]
    return {"coverage": percent(kept / steps) if steps else None,
            "accuracy": percent(sum(right) / kept) if right and kept else None}


# -----------------------------------------------------------------------------------------------------------
# Predictions and embeddings

def write_predictions(path: Path, objects: Objects, probs: dict[str, Tensor]):
    """A CSV file with a line for each object: the joint class and its probability, either modality's, and
    whether these two agree."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["object", "class", "confidence", "image", "image_confidence", "point",
                       "point_confidence", "agree"])
        for name, said in said_of_each(objects, probs):
            cells = [cell for m in ("joint", "image", "point") for cell in (said[m][0], f"{said[m][1]:.4f}")]
            rows.writerow([name, *cells, "yes" if said["image"][0] == said["point"][0] else "no"])


def said_of_each(objects: Objects, probs: dict[str, Tensor]) -> list:
    """[(name of the object, {modality: (class name, probability)})]"""
    best = {m: p.max(dim=-1) for m, p in probs.items()}
    return [(name, {m: (objects.class_names[best[m].indices[i]], best[m].values[i].item()) for m in best})
            for i, name in enumerate(objects.names)]


def write_embeddings(path: Path, embedded: dict, model: CrossMoST, objects: Objects):
    """An .npz file: what embed returns, the classifier (E, C), its names, the objects' names and labels (-1:
    none). It opens with numpy.load(path), no pickle."""
    labels = torch.full((len(objects),), -1) if objects.labels is None else objects.labels
    with open(path, "wb") as file:
        np.savez_compressed(file, **embedded, classifier=model.classifier.detach().cpu(), labels=labels,
                            class_names=np.array(objects.class_names), names=np.array(objects.names))


# -----------------------------------------------------------------------------------------------------------
# Pictures

def plot_curves(log_file: Path, picture: Path, zero_shot: dict | None):
    """Accuracy of the teacher by epoch with its zero-shot lines; coverage and accuracy of pseudo-labels."""
    rows = [json.loads(line) for line in log_file.read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    epochs = [row for row in rows if "teacher" in row]
    # Okabe and Ito's colours, safe for colour-blind eyes.
    for name, colour in {"image": "#0072B2", "point": "#D55E00", "joint": "#000000"}.items():
        if zero_shot:
            left.axhline(zero_shot[name], color=colour, linestyle=":", linewidth=1)
        left.plot([row["epoch"] for row in epochs], [row["teacher"][name] for row in epochs], color=colour,
                  label=name, marker="o", markersize=3)
    left.set(xlabel="epoch", ylabel="test top-1, %", title="teacher (dotted: zero-shot)")
    steps = [row for row in rows if "coverage" in row]
    at = [row["step"] for row in steps]
    right.plot(at, [100 * row["coverage"] for row in steps], color="#009E73", label="coverage")
    if any(row.get("label_accuracy") is not None for row in steps):
        right.plot(at, [100 * (row["label_accuracy"] or 0) for row in steps], color="#CC79A7",
                   label="accuracy of the kept")
    right.set(xlabel="step", ylabel="%", ylim=(0, 102), title="pseudo-labels")
    for axes in (left, right):
        if axes.lines:
            axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def plot_confusion(probs: Tensor, objects: Objects, picture: Path):
    """Percent of each class (row) that was given each name (column)."""
    count, names = len(objects.class_names), objects.class_names
    pairs = objects.labels * count + probs.argmax(dim=-1)
    matrix = torch.bincount(pairs, minlength=count * count).view(count, count).double()
    matrix = 100 * matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    figure, axes = plt.subplots(figsize=(2.5 + 0.32 * count, 2 + 0.32 * count), layout="constrained")
    axes.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(count), names, rotation=90)
    axes.set_yticks(range(count), names)
    axes.set(xlabel="predicted", ylabel="true", title=f"{objects.name} {objects.split}, joint, % of a class")
    for i, j in (matrix >= 0.5).nonzero().tolist():
        axes.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=7,
                  color="white" if matrix[i, j] > 55 else "black")
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def plot_gallery(probs: dict[str, Tensor], objects: Objects, picture: Path, count: int = 12):
    """View and cloud of objects that are named wrongly or in two ways, evenly spaced over all of these."""
    named = {m: p.argmax(dim=-1) for m, p in probs.items()}
    odd = named["image"] != named["point"]
    if objects.labels is not None:
        odd |= named["joint"] != objects.labels
    odd = odd.nonzero()[:, 0]
    chosen = odd[torch.linspace(0, len(odd) - 1, min(count, len(odd))).long()]
    some, said, cells = objects.pick(chosen), said_of_each(objects, probs), []
    for i, images, cloud in zip(chosen.tolist(), fixed_images(some, 1, 224, 1, "cpu"), some.points):
        lines = [f"{m}: {said[i][1][m][0]} {said[i][1][m][1]:.2f}" for m in ("image", "point")]
        if objects.labels is not None:
            lines.insert(0, f"is {objects.class_names[objects.labels[i]]}")
        cells += [(images[0, 0], "\n".join(lines)), (cloud, "")]
    draw_grid(cells, 8, picture, f"{objects.name} {objects.split}: {len(odd)} of {len(objects)} objects are "
              "named wrongly or in two ways")


def draw_grid(cells: list, columns: int, picture: Path, title: str | None = None):
    """Images (3, H, W) and clouds (P, 3), each with its title, row by row."""
    rows = math.ceil(len(cells) / columns)
    figure = plt.figure(figsize=(1.9 * columns, 2.3 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    for at, (item, text) in enumerate(cells):
        axes = figure.add_subplot(rows, columns, at + 1, projection="3d" if item.dim() == 2 else None)
        if item.dim() == 2:
            x, y, z = item.T.numpy()
            axes.scatter(x, y, z, s=1, c=z, cmap="viridis", linewidths=0)
            axes.set(aspect="equal")
            axes.view_init(20, -60)
        else:
            axes.imshow(item.permute(1, 2, 0).clamp(0, 1).numpy())
        axes.axis("off")
        axes.set_title(text, fontsize=8, loc="left")
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def preview(objects: Objects, picture: Path, size: int = 224, count: int = 8):
    """A sheet of objects: cloud, one evaluation view, weak and strong views, and the strong ones masked."""
    torch.manual_seed(0)
    some = objects.pick(torch.linspace(0, len(objects) - 1, min(count, len(objects))).long())
    count, grid = len(some), size // 16
    stills = [images[:, 0] for images in fixed_images(some, None, size, count, "cpu")]
    photographs = next(iter(training_photographs(some, (torch.arange(count),), size, seed=0)))
    views = draw_views(some.points, size, photographs)
    visible = ~hide_patches(count, grid, 0.3, "cpu").view(count, 1, grid, grid)
    visible = F.interpolate(visible.float(), size=size) > 0
    neighbourhoods, centres = group_points(views["strong_points"], 64, 32)
    placed = neighbourhoods + centres[:, :, None]
    masked = [points[kept].flatten(0, 1) for points, kept in zip(placed, ~hide_groups(centres, 0.3))]
    columns = {"cloud": some.points, "evaluation view": torch.cat(stills), "weak image": views["weak_image"],
               "strong image": views["strong_image"],
               "masked image": views["strong_image"].where(visible, torch.tensor(0.5)),
               "weak points": views["weak_points"], "strong points": views["strong_points"],
               "masked points": masked}
    cells = []
    for row in range(count):
        name = some.names[row] if some.labels is None else some.class_names[some.labels[row]]
        for title, items in columns.items():
            cells.append((items[row], f"{name}\n{title}" if title == "cloud" else title))
    draw_grid(cells, len(columns), picture)


# -----------------------------------------------------------------------------------------------------------
# The command line

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
    group("--preview", type=picture_file, help="nothing of these: draw what the models see of --dataset")
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
    group("--confusion", type=picture_file, help="FILE.png: the confusion matrix")
    group("--gallery", type=picture_file, help="FILE.png: objects named wrongly or in two ways")
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
    start = args.start_checkpoint
    if args.model in STARTS and not start:
        start = start_file(args.model, args.cache, args.download is not False)
    path = args.checkpoint or start
    known = describe_start(path) if path else OTHER_GROUPS
    objects, unreadable = load_objects(args, known)
    if args.preview:
        with whole_file(args.preview) as picture:
            preview(objects, picture)
        return print(f"some of {objects.name} {objects.split}'s {len(objects)} objects: {args.preview}")
    results = {"dataset": objects.name, "split": objects.split, "objects": len(objects)}
    if args.checkpoint:
        models = {which: load_checkpoint(args.checkpoint, which=which) for which in ("student", "teacher")}
    else:
        templates = TEMPLATES[args.templates or dataset_row(args.dataset)["templates"]]
        sizes = {key: known[key] for key in ("groups", "group_size")}
        models = {"zero_shot": build_model(args.model or known.get("model", ""), objects.class_names,
                                           templates, args.pretrained, start, **sizes)}
        results |= {"start": Path(start or args.model).stem, "seed": known.get("options", {}).get("seed", 0)}
    if objects.labels is None and (args.confusion or args.rival):
        raise UserError("--confusion and --rival need labels, of classes that are all among the names")
    for which, model in models.items():
        embedded = embed(model.to(args.device), objects, args.views)
        probs = to_probs(embedded)
        if objects.labels is not None:
            results[which] = accuracy(probs, objects)
    if args.rival:
        unlabelled, _ = load_objects(args, known, "train")
        results["cache"] = accuracy(predict_by_cache(model, unlabelled, objects, args.views), objects)
    if args.files:
        for name, said in said_of_each(objects, probs):
            print(f"{name}: {said['joint'][0]} {said['joint'][1]:.2f} (image: {said['image'][0]} "
                  f"{said['image'][1]:.2f}, point: {said['point'][0]} {said['point'][1]:.2f})")
    else:
        print(table(results, which if objects.labels is not None else None))
    write_files(args, results, probs, embedded, model, objects)
    if unreadable:
        raise UserError(f"{unreadable} of {len(args.files)} files could not be read, see above")
    return results


def load_objects(args, known: dict, split: str | None = None) -> tuple[Objects, int]:
    """The objects asked for, and how many files could not be read (each was named on stderr).

    On the data set a checkpoint was trained on, options not given are its own; points and views are its own
    on any data set."""
    trained, unreadable = known.get("options", {}), 0
    if args.dataset in (None, trained.get("dataset")):
        args.dataset = trained.get("dataset", "shapes")
        args.domain = args.domain or trained.get("domain")
        args.up = args.up or trained.get("up")
    args.views = args.views or known.get("views")
    row = dataset_row(args.dataset)
    points = args.points or known.get("points") or row["points"]
    if args.files:
        objects, unreadable = load_files(args.files, points, args.up or row["up"])
        objects.class_names = known.get("class_names", [])
    else:
        objects = load_dataset(args.dataset, args.data_root, split or args.split, points, args.domain,
                               args.download, args.up)
    if args.classes:
        is_file = Path(args.classes).is_file()
        rename(objects, read_lines(Path(args.classes)) if is_file else args.classes.split(","))
    if not (objects.class_names or args.preview):
        raise UserError("a start names files by --classes \"mug,bowl,...\"; add it")
    return objects, unreadable


def rename(objects: Objects, names: list[str]):
    """Name the objects' classes otherwise. Labels stay where every true class is among the names."""
    names, before = [name.strip() for name in names], objects.class_names
    if len(set(names)) < len(names) or "" in names:
        raise UserError(f"--classes has a name twice, or an empty one: {names}")
    known = objects.labels is not None and set(before) <= set(names)
    objects.labels = torch.tensor([names.index(name) for name in before])[objects.labels] if known else None
    objects.class_names = names


def write_files(args, results: dict, probs: dict, embedded: dict, model: CrossMoST, objects: Objects):
    """Every file asked for."""
    write = {"predictions": lambda path: write_predictions(path, objects, probs),
             "embeddings": lambda path: write_embeddings(path, embedded, model, objects),
             "confusion": lambda path: plot_confusion(probs["joint"], objects, path),
             "gallery": lambda path: plot_gallery(probs, objects, path),
             "json": lambda path: path.write_text(json.dumps(results, indent=1) + "\n")}
    for name, into in write.items():
        if path := getattr(args, name):
            with whole_file(path) as temporary:
                into(temporary)
            print(f"wrote {path}")


# -----------------------------------------------------------------------------------------------------------
# What train.py shares of it

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def out_of_memory(error: BaseException) -> bool:
    """Python's, CUDA's, or torch's CPU allocator's. Other errors that speak of memory are bugs."""
    of_allocator = "DefaultCPUAllocator: can't allocate memory" in str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and of_allocator)


@contextmanager
def one_line_errors():
    """What a user can put right (UserError, OSError, too little memory) ends a script with one line and exit
    code 2. Every other error is a bug, and keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, (UserError, OSError)) and not out_of_memory(error):
            raise
        full = "; make room: what was saved before is whole" * (getattr(error, "errno", 0) == errno.ENOSPC)
        print("error:", (" ".join(str(error).split()) or "out of memory") + full, file=sys.stderr)
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


def picture_file(name: str) -> Path:
    """An argparse type: a picture's file, a PNG where the name has no suffix."""
    path = Path(name) if Path(name).suffix else Path(name + ".png")
    if path.suffix.lower() not in (".png", ".jpg", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"cannot draw a {path.suffix} file; use .png, .jpg, .pdf or .svg")
    return path


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
