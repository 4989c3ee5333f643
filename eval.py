"""Accuracy of a trained checkpoint, and the curves of a run.

    python eval.py --checkpoint runs/shapes-tiny/last.pt --dataset shapes
"""
import argparse
import csv
import json
import statistics
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor

from data import (DATASETS, UP, Objects, draw_views, fixed_images, load_dataset, one_line_errors,
                  training_photographs)
from model import CrossMoST, group_points, hide_groups, hide_patches, load_checkpoint

matplotlib.use("Agg")  # draws into files; no screen needed
import matplotlib.pyplot as plt  # noqa: E402

MODALITIES = ("image", "point", "joint")


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

    Raises: ValueError if the objects have no labels or other classes than the model's, in this order.
    """
    if objects.labels is None:
        raise ValueError(f"{objects.name} has no labels; accuracy cannot be measured")
    if list(objects.class_names) != list(model.class_names):
        raise ValueError(f"{objects.name} has {objects.class_names[:4]}, the model {model.class_names[:4]}"
                         "; evaluate it on the data set it was trained for")
    return accuracy(predict(model, objects, views), objects)


def accuracy(probs: dict[str, Tensor], objects: Objects) -> dict:
    """What evaluate returns, of probabilities (N, C)."""
    correct = {name: (p.argmax(dim=-1) == objects.labels).double() for name, p in probs.items()}
    per_class = {}
    for k, name in enumerate(objects.class_names):
        if (objects.labels == k).any():
            per_class[name] = {m: percent(correct[m][objects.labels == k].mean()) for m in MODALITIES}
    return {**{m: percent(correct[m].mean()) for m in MODALITIES}, "per_class": per_class}


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


def summary(runs: list[dict]) -> str:
    """Many runs' results as Markdown: a table for each data set, a row for each setting, over its seeds.

    Accuracy is the teacher's; gap: the share of the way from the start to the ceiling, --labels truth.
    """
    lines = []
    for name in dict.fromkeys(run["dataset"] for run in runs):
        rows, ceiling = {"zero-shot start": {}, "Cross-MoST": {}}, {}
        for run in (run for run in runs if run["dataset"] == name):
            flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in run["changed"].items())
            right, seed = run.get("teacher") or run["cache"], run["seed"]
            rows.setdefault(f"`{flags}`" if flags else "Cross-MoST", {})[seed] = right
            rows["zero-shot start"][seed] = run["zero_shot"]
            if run["changed"] == {"labels": "truth"}:
                ceiling[seed] = right["joint"]
        lines += ["", f"| {name}, {run['objects']} objects | image | point | joint | gap | joint by seed |",
                  "|---|---|---|---|---|---|"]
        for label, seeds in rows.items():
            start = rows["zero-shot start"]
            ways = [(right["joint"] - start[seed]["joint"]) / (ceiling[seed] - start[seed]["joint"])
                    for seed, right in seeds.items() if seed in ceiling]
            cells = [mean_and_std([right[m] for right in seeds.values()]) for m in MODALITIES]
            cells.append(f"{100 * statistics.mean(ways):.0f} %" if ways else "")
            cells.append(", ".join(f"{right['joint']:.1f}" for _, right in sorted(seeds.items())))
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines[1:])


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
    # Okabe and Ito's colours: safe for colour-blind eyes.
    colours = {"image": "#0072B2", "point": "#D55E00", "joint": "#000000"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    epochs = [row for row in rows if "teacher" in row]
    for name, colour in colours.items():
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
                x, y, z = items[row].T.numpy()
                axes.scatter(x, y, z, s=1, c=z, cmap="viridis", linewidths=0)
                axes.set(aspect="equal")
                axes.view_init(20, -60)
            axes.axis("off")
            label = objects.names[i] if objects.names else str(i)
            label = label if objects.labels is None else objects.class_names[objects.labels[i]]
            axes.set_title(label if column == 0 else title if row == 0 else "", fontsize=9)
    figure.savefig(picture, dpi=80)
    plt.close(figure)
    print(f"{len(objects)} objects of {objects.name} {objects.split}, {len(points)} of them in {picture}")


def collect(folder: Path, file: Path) -> str:
    """Gather FOLDER/*/results.json into one file, sorted, and return their summary."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))]
    if not runs:
        raise FileNotFoundError(f"no {folder}/*/results.json; make them as in README, Results")
    file.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
    return summary(runs)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a last.pt of train.py, or the authors' trained file")
    parser.add_argument("--runs", type=Path, help="instead: gather the results of all runs in this folder")
    parser.add_argument("--json", type=Path, default=Path("assets/results.json"), help="into this file")
    parser.add_argument("--dataset", default="shapes", help=f"{', '.join(DATASETS)}: a folder of your own")
    parser.add_argument("--split", choices=("train", "test"), default="test", help="which of its splits")
    parser.add_argument("--data-root", type=Path, default=Path("data"),
                        help="folder that holds the data sets")
    parser.add_argument("--domain", choices=("source", "target"), help="as it is, or as a scanner sees it")
    parser.add_argument("--points", type=int, default=1024, help="points per cloud")
    parser.add_argument("--up", choices=sorted(UP), help="axis that points upwards in the files")
    parser.add_argument("--views", type=int, help="depth views (6) or photographs (all) to average")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where")
    return parser.parse_args(argv)


def main(argv=None) -> dict | None:
    """Evaluate student and teacher of a checkpoint; print the table, return it as a dictionary."""
    args = parse_args(argv)
    if args.runs:
        return print(collect(args.runs, args.json))
    if not args.checkpoint:
        raise ValueError("nothing to evaluate; name a --checkpoint, or --runs to gather")
    objects = load_dataset(args.dataset, args.data_root, args.split, args.points, args.domain, up=args.up)
    results = {"dataset": objects.name, "split": objects.split, "objects": len(objects)}
    for which in ("student", "teacher"):
        model = load_checkpoint(args.checkpoint, which=which).to(args.device)
        if model.class_names == [str(k) for k in range(len(objects.class_names))]:
            model.architecture["class_names"] = objects.class_names  # a published file has numbers only
        results[which] = evaluate(model, objects, args.views)
    print(table(results))
    width = max(map(len, objects.class_names)) + 2
    print("teacher, by class".ljust(max(width, 44)) + "".join(name.rjust(8) for name in MODALITIES))
    for name, row in results["teacher"]["per_class"].items():
        print(name.ljust(max(width, 44)) + "".join(f"{row[m]:8.1f}" for m in MODALITIES))
    return results


if __name__ == "__main__":
    with one_line_errors():
        main()
