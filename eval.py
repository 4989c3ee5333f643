"""Accuracy, predictions, tables and pictures: of a trained checkpoint, of a zero-shot start, of many runs.

    python eval.py --checkpoint runs/shapes-tiny/last.pt                 # on the data it was trained for
    python eval.py --model ulip2 --dataset modelnet40 --classes "chair,mug,desk lamp" --predictions named.csv
    python eval.py --dataset modelnet40 --preview sheet.png              # what the models see of a data set
"""
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
                  read_lines, training_photographs)
from model import (OTHER_GROUPS, PUBLISHED, TEMPLATES, CrossMoST, build_model, describe_start,
                   group_points, hide_groups, hide_patches, load_checkpoint, published_start, whole_file)

matplotlib.use("Agg")  # draws into files; no screen needed
import matplotlib.pyplot as plt  # noqa: E402

MODALITIES = ("image", "point", "joint")
# Safe for colour-blind eyes: Okabe and Ito's.
COLOURS = {"image": "#0072B2", "point": "#D55E00", "joint": "#000000"}


@torch.no_grad()
def embed(model: CrossMoST, objects: Objects, views: int | None = None, batch_size: int = 64) -> dict:
    """Logits (N, C) and features (N, E) of every object: {"image": (logits, features), "point": ...}, on the
    CPU, from fixed inputs.

    image: the mean over `views` (6) fixed depth views or over all photographs, at most `views`; point: of the
    cloud as it is.
    """
    device, size = model.logit_scale.device, model.visual.image_size[0]
    was_training = model.training
    model.eval()
    image, point = [], []
    for images in fixed_images(objects, views, size, batch_size, device):
        out = model(model.normalise(images), None)
        image.append((out.image_logits.cpu(), out.image_features.cpu()))
    for points in objects.points.split(batch_size):
        out = model(None, points.to(device))
        point.append((out.point_logits.cpu(), out.point_features.cpu()))
    model.train(was_training)
    return {"image": tuple(map(torch.cat, zip(*image))), "point": tuple(map(torch.cat, zip(*point)))}


def to_probs(image_logits: Tensor, point_logits: Tensor) -> dict[str, Tensor]:
    """Class probabilities (N, C) of the modalities, and joint: the mean of the two."""
    image, point = image_logits.softmax(dim=-1), point_logits.softmax(dim=-1)
    return {"image": image, "point": point, "joint": (image + point) / 2}


def predict(model: CrossMoST, objects: Objects, views: int | None = None) -> dict[str, Tensor]:
    """Class probabilities of every object: {"image", "point", "joint"}, each (N, C), on the CPU."""
    out = embed(model, objects, views)
    return to_probs(out["image"][0], out["point"][0])


def predict_by_cache(model: CrossMoST, unlabelled: Objects, objects: Objects, views: int | None = None,
                     shots: int = 16, sharpness: float = 5.5) -> dict[str, Tensor]:
    """A rival without training: a cache of confident objects, after Point-Cache (arXiv 2503.12150).

    The `shots` unlabelled objects of each predicted class with the highest joint confidence are its keys;
    logits_m + s sum_k exp(-sharpness (1 - f_m . f_mk)) onehot(y_k) / shots, in each modality m, with the
    model's logit scale s. shots and sharpness are Tip-Adapter's (arXiv 2111.03930). Returns as predict.
    """
    cached, out = embed(model, unlabelled, views), embed(model, objects, views)
    confidence, labels = to_probs(cached["image"][0], cached["point"][0])["joint"].max(dim=-1)
    keys = torch.cat([(labels == k).nonzero()[:, 0][confidence[labels == k].argsort(descending=True)[:shots]]
                      for k in range(len(unlabelled.class_names))])
    names, logits = F.one_hot(labels[keys], len(unlabelled.class_names)).float(), {}
    for m, (zero_shot, features) in out.items():
        near = features @ cached[m][1][keys].T
        near = (-sharpness * (1 - near)).exp()
        logits[m] = zero_shot + model.logit_scale.exp().item() * near @ names / shots
    return to_probs(logits["image"], logits["point"])


def evaluate(model: CrossMoST, objects: Objects, views: int | None = None) -> dict:
    """Top-1 accuracy in percent: {"image", "point", "joint", "per_class": {name: {"image", ...}}}.

    Raises: UserError if the objects have no labels or other classes than the model's, in this order.
    """
    if objects.labels is None:
        raise UserError(f"{objects.name} has no labels; accuracy cannot be measured")
    check_names(model, objects)
    return accuracy(predict(model, objects, views), objects)


def check_names(model: CrossMoST, objects: Objects):
    """Raises: UserError if the model's classes are not the objects', in this order."""
    if list(objects.class_names) != list(model.class_names):
        raise UserError(f"{objects.name} has {objects.class_names[:4]}, the model {model.class_names[:4]}"
                        "; evaluate it on the data set it was trained for (a start: --start-checkpoint)")


def accuracy(probs: dict[str, Tensor], objects: Objects) -> dict:
    """What evaluate returns, of probabilities (N, C)."""
    correct = {name: (p.argmax(dim=-1) == objects.labels).double() for name, p in probs.items()}
    per_class = {}
    for k, name in enumerate(objects.class_names):
        if (objects.labels == k).any():
            per_class[name] = {m: percent(correct[m][objects.labels == k].mean()) for m in MODALITIES}
    return {**{m: percent(correct[m].mean()) for m in MODALITIES}, "per_class": per_class}


def per_class_mean(found: dict) -> dict:
    """The mean over classes of what accuracy() found, percent."""
    return {m: round(statistics.mean(row[m] for row in found["per_class"].values()), 2) for m in MODALITIES}


def write_predictions(path: Path, objects: Objects, probs: dict[str, Tensor]) -> float:
    """A CSV file with a line for each object: the joint class and its probability, either modality's, and
    whether these two agree. An object without a name is its number. Returns their agreement, percent."""
    names = objects.names or [str(i) for i in range(len(objects))]
    best = {m: p.max(dim=-1) for m, p in probs.items()}
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["object", "class", "confidence", "image", "image_confidence", "point",
                       "point_confidence", "agree"])
        for i, name in enumerate(names):
            opinions = [(objects.class_names[best[m].indices[i]], f"{best[m].values[i]:.4f}")
                        for m in ("joint", "image", "point")]
            agree = "yes" if opinions[1][0] == opinions[2][0] else "no"
            rows.writerow([name, *(cell for opinion in opinions for cell in opinion), agree])
    return percent((best["image"].indices == best["point"].indices).double().mean())


def percent(share) -> float:
    """A share in [0, 1] as a percentage with two decimals."""
    return round(100 * float(share), 2)


def table(results: dict) -> str:
    """The closing table: one row for each of zero-shot, student, teacher that `results` holds."""
    if not any(results.get(key) for key in ("zero_shot", "student", "teacher")):
        return f"{results['dataset']} {results['split']}, {results['objects']} objects without labels"
    rows = [f"top-1 %, {results['dataset']} {results['split']}, {results['objects']} objects".ljust(44)
            + "".join(name.rjust(8) for name in MODALITIES)]
    for key, label in (("zero_shot", "zero-shot"), ("cache", "confident-sample cache"),
                       ("student", "student"), ("teacher", "teacher")):
        if results.get(key):
            rows.append(label.ljust(44) + "".join(f"{results[key][name]:8.1f}" for name in MODALITIES))
    return "\n".join(rows)


def mean_and_std(values: list[float]) -> str:
    """mean ± standard deviation over seeds; of one value just that."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if values[1:] else "")


def row_label(run: dict) -> str:
    """What sets a run apart from the method with its defaults, as options."""
    if "cache" in run:
        return "`eval.py --rival`"
    words = []
    for key, value in run["changed"].items():
        words += ["--" + key.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    return f"`{' '.join(words)}`" if words else "Cross-MoST"


def summary(runs: list[dict]) -> str:
    """Many runs' results as Markdown: a table for each data set, a row for each setting, over its seeds.

    Accuracy is the teacher's. The first row is the start of the runs with the defaults; a setting with another
    start is preceded by it. gap, where there is a ceiling, --labels truth: the share of the way
    from a run's own start to it.
    """
    tables = []
    for name in dict.fromkeys(run["dataset"] for run in runs):
        rows = {"Cross-MoST": {}}
        for run in (run for run in runs if run["dataset"] == name):
            rows.setdefault(row_label(run), {})[run["seed"]] = run
        ceiling, first = rows.get("`--labels truth`", {}), {}
        for seeds in rows.values():
            first = {**seeds, **first}  # of each seed the run with the defaults, if there is one
        heads = [f"{name}, {run['objects']} objects", *MODALITIES, *["gap"] * bool(ceiling), "joint by seed"]
        lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads),
                 table_row("zero-shot start", first, "zero_shot", ceiling)]
        for label, seeds in rows.items():
            own_start = {seed: run for seed, run in seeds.items() if run["start"] != first[seed]["start"]}
            if own_start:
                lines.append(table_row(f"start of {label}", own_start, "zero_shot", ceiling))
            if seeds:
                lines.append(table_row(label, seeds, "end", ceiling))
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def table_row(label: str, seeds: dict, which: str, ceiling: dict) -> str:
    """One line of summary(): the runs' accuracy by modality, their "zero_shot" or their "end", over seeds."""
    ends = {seed: run.get("teacher") or run["cache"] for seed, run in seeds.items()}
    shown = {seed: run["zero_shot"] if which == "zero_shot" else ends[seed] for seed, run in seeds.items()}
    cells = [mean_and_std([found[m] for found in shown.values()]) for m in MODALITIES]
    gaps = []
    for seed in seeds.keys() & ceiling.keys():
        start, top = seeds[seed]["zero_shot"]["joint"], ceiling[seed]["teacher"]["joint"]
        gaps.append((shown[seed]["joint"] - start) / (top - start))
    if ceiling:
        cells.append(f"{100 * statistics.mean(gaps):.0f} %" if gaps else "")
    cells.append(", ".join(f"{found['joint']:.1f}" for _, found in sorted(shown.items())))
    return f"| {label} | {' | '.join(cells)} |"


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


def plot_curves(log_file: Path, picture: Path, zero_shot: dict | None):
    """Accuracy of the teacher by epoch with its zero-shot lines; coverage and accuracy of pseudo-labels."""
    rows = [json.loads(line) for line in log_file.read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    epochs = [row for row in rows if "teacher" in row]
    for name, colour in COLOURS.items():
        if zero_shot:
            left.axhline(zero_shot[name], color=colour, linestyle=":", linewidth=1)
        left.plot([row["epoch"] for row in epochs], [row["teacher"][name] for row in epochs], color=colour,
                  label=name, marker="o", markersize=3)
    left.set(xlabel="epoch", ylabel="test top-1, %", title="teacher (dotted: zero-shot)")
    if epochs:
        left.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    steps = [row for row in rows if "coverage" in row]
    right.plot([row["step"] for row in steps], [100 * row["coverage"] for row in steps], color="#009E73",
               label="coverage")
    if any(row.get("label_accuracy") is not None for row in steps):
        right.plot([row["step"] for row in steps], [100 * (row["label_accuracy"] or 0) for row in steps],
                   color="#CC79A7", label="accuracy of the kept")
    right.set(xlabel="step", ylabel="%", ylim=(0, 102), title="pseudo-labels")
    if steps:
        right.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(picture, dpi=120)
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
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def named_oddly(probs: dict[str, Tensor], objects: Objects) -> Tensor:
    """Indices of the objects that are named wrongly or on which the modalities disagree."""
    names = {m: p.argmax(dim=-1) for m, p in probs.items()}
    odd = names["image"] != names["point"]
    if objects.labels is not None:
        odd |= names["joint"] != objects.labels
    return odd.nonzero()[:, 0]


def plot_gallery(probs: dict[str, Tensor], objects: Objects, picture: Path, count: int = 12):
    """View and cloud of objects that are named oddly, with both opinions; spread evenly over all of them."""
    named, odd = {m: p.max(dim=-1) for m, p in probs.items()}, named_oddly(probs, objects)
    chosen = odd[torch.linspace(0, len(odd) - 1, min(count, len(odd))).long()].tolist()
    images = objects.images and [objects.images[i] for i in chosen]
    some = Objects(objects.points[chosen], None, [], images=images)
    views = [images[0, 0] for images in fixed_images(some, 1, 224, 1, "cpu")]
    rows = max(1, -(-len(chosen) // 4))
    figure = plt.figure(figsize=(15, 2.4 * rows + 0.4), layout="constrained")
    figure.suptitle(f"{objects.name} {objects.split}: {len(odd)} of {len(objects)} are named wrongly or in "
                    "two ways")
    for at, i in enumerate(chosen):
        axes = figure.add_subplot(rows, 8, 2 * at + 1)
        axes.imshow(views[at].permute(1, 2, 0).clamp(0, 1).numpy())
        axes.axis("off")
        says = [f"{m}: {objects.class_names[named[m].indices[i]]} {named[m].values[i]:.2f}"
                for m in ("image", "point")]
        if objects.labels is not None:
            says.insert(0, f"is {objects.class_names[objects.labels[i]]}")
        axes.set_title("\n".join(says), fontsize=8, loc="left")
        axes = figure.add_subplot(rows, 8, 2 * at + 2, projection="3d")
        draw_cloud(axes, objects.points[i])
    figure.savefig(picture, dpi=80)
    plt.close(figure)


def draw_cloud(axes, points: Tensor):
    """One cloud (P, 3) in a 3-D plot, coloured by height."""
    x, y, z = points.T.numpy()
    axes.scatter(x, y, z, s=1, c=z, cmap="viridis", linewidths=0)
    axes.set(aspect="equal")
    axes.view_init(20, -60)
    axes.axis("off")


def write_embeddings(path: Path, out: dict, model: CrossMoST, objects: Objects):
    """An .npz file: image and point features (N, E), their logits (N, C), the classifier (E, C), its names,
    the objects' names and labels (-1: none). It opens with numpy.load(path), no pickle."""
    labels = torch.full((len(objects),), -1) if objects.labels is None else objects.labels
    names = objects.names or [str(i) for i in range(len(objects))]
    with open(path, "wb") as file:
        np.savez_compressed(file, image=out["image"][1], point=out["point"][1], image_logits=out["image"][0],
                            point_logits=out["point"][0], classifier=model.classifier.detach().cpu(),
                            class_names=np.array(objects.class_names), names=np.array(names), labels=labels)


def preview(objects: Objects, picture: Path, size: int = 224, count: int = 8):
    """A sheet of objects: cloud, one evaluation view, weak and strong views, and the strong ones masked."""
    torch.manual_seed(0)
    index = torch.linspace(0, len(objects) - 1, min(count, len(objects))).long()
    points = objects.points[index]
    some = Objects(points, None, [], images=objects.images and [objects.images[i] for i in index])
    stills = [images[:, 0] for images in fixed_images(some, None, size, len(points), "cpu")]
    batches = (torch.arange(len(points)),)
    views = draw_views(points, size, next(iter(training_photographs(some, batches, size, seed=0))))
    hidden = hide_patches(len(points), size // 16, 0.3, "cpu").view(len(points), 1, size // 16, size // 16)
    masked = views["strong_image"].where(F.interpolate((~hidden).float(), size=size) > 0, torch.tensor(0.5))
    neighbourhoods, centres = group_points(views["strong_points"], 64, 32)
    kept = ~hide_groups(centres, 0.3)
    columns = {"cloud": points, "evaluation view": torch.cat(stills), "weak image": views["weak_image"],
               "strong image": views["strong_image"], "masked image": masked,
               "weak points": views["weak_points"], "strong points": views["strong_points"],
               "masked points": [(n + c[:, None])[k].flatten(0, 1)
                                 for n, c, k in zip(neighbourhoods, centres, kept)]}
    figure = plt.figure(figsize=(1.9 * len(columns), 2 * len(points)), layout="constrained")
    for row, i in enumerate(index.tolist()):
        for column, (title, items) in enumerate(columns.items()):
            flat = items[row].shape[0] == 3
            axes = figure.add_subplot(len(points), len(columns), row * len(columns) + column + 1,
                                      projection=None if flat else "3d")
            if flat:
                axes.imshow(items[row].permute(1, 2, 0).clamp(0, 1).numpy())
            else:
                draw_cloud(axes, items[row])
            axes.axis("off")
            label = objects.names[i] if objects.names else str(i)
            label = label if objects.labels is None else objects.class_names[objects.labels[i]]
            axes.set_title(label if column == 0 else title if row == 0 else "", fontsize=9)
    figure.savefig(picture, dpi=80)
    plt.close(figure)


def collect(folder: Path, file: Path) -> str:
    """Gather FOLDER/*/results.json into one file, sorted, and return their summary."""
    runs = {}
    for path in sorted(folder.glob("*/results.json")):
        try:
            run = json.loads(path.read_text())
            if not (run.get("teacher") or run.get("cache")):  # no labels
                print(f"{path} has no accuracy to compare", file=sys.stderr)
                continue
            summary([run])
            other = runs.setdefault((run["dataset"], row_label(run), run["seed"]), run)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no results.json of train.py or eval.py: {error!r}; "
                            "run it again, or remove it") from error
        if other is not run:
            raise UserError(f"{path} has the options and seed of another run there; move one elsewhere")
    if not runs:
        raise FileNotFoundError(f"no {folder}/*/results.json with accuracy; README, Ablations, makes some")
    with whole_file(file) as temporary:
        temporary.write_text("[\n" + ",\n".join(map(json.dumps, runs.values())) + "\n]\n")
    return summary([*runs.values()])


# -----------------------------------------------------------------------------------------------------------
# The command line, and what train.py shares of it

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def out_of_memory(error: BaseException) -> bool:
    """Python's, CUDA's, or torch's CPU allocator's. Other errors that speak of memory are bugs."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator: can't allocate memory" in str(error))


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


def parse_args(argv=None):
    parser = option_parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("what").add_argument
    group("--checkpoint", type=Path, help="a last.pt of train.py, or the authors' trained file")
    group("--model", help="or a zero-shot start: ulip2, ulip1, crossmost, an open_clip name; tiny has a file")
    group("--pretrained", help="open_clip's weights of --model: a tag or a file")
    group("--start-checkpoint", type=Path, help="the start's file, of any family")
    group("--templates", choices=sorted(TEMPLATES), help="texts around a class name of a start")
    group("--classes", help="names for a start instead of the data set's: \"a,b,c\" or a file, a name a line")
    group("--cache", type=Path, default=Path("cache"), help="folder of fetched starts")
    group("--runs", type=Path, help="nothing of these: gather the results of all runs in this folder")
    group("--preview", type=picture_file, help="nothing of these: draw what the models see of --dataset")
    group = parser.add_argument_group("on (if not given: what the checkpoint was trained on)").add_argument
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
    group("--json", type=Path, help="FILE.json: all figures (--runs: assets/results.json)")
    return parser.parse_args(argv)


def rename(objects: Objects, names: list[str]):
    """Name the objects' classes otherwise. Labels stay where every true class is among the names."""
    names, before = [name.strip() for name in names], objects.class_names
    if len(set(names)) < len(names) or "" in names:
        raise UserError(f"--classes has a name twice, or an empty one: {names}")
    known = objects.labels is not None and set(before) <= set(names)
    objects.labels = torch.tensor([names.index(name) for name in before])[objects.labels] if known else None
    objects.class_names = names


def load_trained(path: Path, objects: Objects) -> dict[str, CrossMoST]:
    """{"student", "teacher"} of a checkpoint. Raises: UserError where its classes are not the objects'."""
    models = {which: load_checkpoint(path, which=which) for which in ("student", "teacher")}
    for model in models.values():
        if model.class_names == [str(k) for k in range(len(objects.class_names))]:
            model.architecture["class_names"] = list(objects.class_names)  # a published file has numbers only
        check_names(model, objects)
    return models


def main(argv=None) -> dict | None:
    """Evaluate student and teacher of a checkpoint, or a start; print the tables, return them."""
    args = parse_args(argv)
    if args.runs:
        return print(collect(args.runs, args.json or Path("assets/results.json")))
    start = args.start_checkpoint
    if args.model in PUBLISHED and not (start or args.checkpoint):
        start = published_start(args.model, args.cache, args.download is not False)
    if args.checkpoint and (args.start_checkpoint or args.model):
        raise UserError("both a checkpoint and a start are named; drop --checkpoint, or --start-checkpoint "
                        "and --model")
    if not (args.preview or args.checkpoint or start or args.model not in (None, "tiny")):
        raise UserError("nothing to evaluate; name a --checkpoint, a --model (of tiny the file that train.py "
                        "left in cache/, with --start-checkpoint), or --runs to gather")
    known = describe_start(args.checkpoint or start) if args.checkpoint or start else OTHER_GROUPS
    objects = load_objects(args, known)
    if args.preview:
        with whole_file(args.preview) as path:
            preview(objects, path)
        return print(f"{len(objects)} objects of {objects.name} {objects.split}, a few of them in "
                     f"{args.preview}")
    results = {"dataset": objects.name, "split": objects.split, "objects": len(objects)}
    if args.checkpoint:
        if args.classes:
            raise UserError(f"{args.checkpoint} can only name the classes it was trained for; for --classes "
                            "name a start: --model or --start-checkpoint")
        models = load_trained(args.checkpoint, objects)
    else:
        templates = TEMPLATES[args.templates or dataset_row(args.dataset)["templates"]]
        sizes = {key: known[key] for key in ("groups", "group_size")}
        models = {"zero_shot": build_model(args.model or known.get("model", ""), objects.class_names,
                                           templates, args.pretrained, start, **sizes)}
        results |= {"start": Path(start or args.model).stem, "seed": known.get("options", {}).get("seed", 0)}
    for which, model in models.items():
        embedded = embed(model.to(args.device), objects, args.views)
        probs = to_probs(embedded["image"][0], embedded["point"][0])
        if objects.labels is not None:
            results[which] = accuracy(probs, objects)
    if args.rival:
        results["cache"] = score_rival(args, model, objects, known)
    print(table(results))
    if objects.labels is not None:
        show_details(which, results[which])
    if args.confusion and objects.labels is None:
        raise UserError("--confusion needs labels, of classes that are all among the names")
    if args.gallery and not len(named_oddly(probs, objects)):
        print(f"no {args.gallery}: every object is named rightly, and by both modalities alike")
        args.gallery = None
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
    return results


def load_objects(args, known: dict, split: str | None = None) -> Objects:
    """The objects asked for. On the data set a checkpoint was trained on, options not given are its own; the
    size of the clouds is its own on any data set."""
    trained = known.get("options", {})
    if args.dataset in (None, trained.get("dataset")):
        args.dataset = trained.get("dataset", "shapes")
        for key in ("domain", "up", "views"):
            if getattr(args, key) is None:
                setattr(args, key, trained.get(key))
    points = args.points or known.get("points") or dataset_row(args.dataset)["points"]
    objects = load_dataset(args.dataset, args.data_root, split or args.split, points, args.domain,
                           args.download, args.up)
    if args.classes:
        is_file = Path(args.classes).is_file()
        rename(objects, read_lines(Path(args.classes)) if is_file else args.classes.split(","))
    return objects


def score_rival(args, start: CrossMoST, objects: Objects, known: dict) -> dict:
    """Accuracy of predict_by_cache, from the training objects, without their labels."""
    if args.checkpoint or objects.labels is None:
        raise UserError("--rival scores a start, --start-checkpoint or --model, on objects with labels")
    probs = predict_by_cache(start, load_objects(args, known, "train"), objects, args.views)
    return {m: accuracy(probs, objects)[m] for m in MODALITIES}


def show_details(which: str, found: dict):
    """Print the mean over classes, and every class, in percent."""
    width = max(44, *(len(name) + 2 for name in found["per_class"]))
    rows = {f"{which}, mean over classes": per_class_mean(found), **found["per_class"]}
    for name, row in rows.items():
        print(name.ljust(width) + "".join(f"{row[m]:8.1f}" for m in MODALITIES))


if __name__ == "__main__":
    with one_line_errors():
        main()
