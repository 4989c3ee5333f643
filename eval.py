"""Accuracy of a trained checkpoint, and the curves of a run.

    python eval.py --checkpoint runs/shapes-tiny/last.pt --dataset shapes
"""
import argparse
import json
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from data import DATASETS, Objects, fixed_views, load_dataset, one_line_errors
from model import CrossMoST, load_checkpoint

matplotlib.use("Agg")  # draws into files; no screen needed
import matplotlib.pyplot as plt  # noqa: E402

MODALITIES = ("image", "point", "joint")


@torch.no_grad()
def predict(model: CrossMoST, objects: Objects, views: int = 6, batch_size: int = 64) -> dict[str, Tensor]:
    """Class probabilities of every object, each (N, C), on the CPU, from fixed inputs.

    image: softmax of the mean logits of `views` fixed depth views; point: of the cloud as it is; joint: the
    mean of the two.
    """
    device, size = model.logit_scale.device, model.visual.image_size[0]
    was_training = model.training
    model.eval()
    probs = {"image": [], "point": []}
    for points in objects.points.split(batch_size):
        points = points.to(device)
        out = model(model.normalise(fixed_views(points, views, size)), points)
        probs["image"].append(out.image_logits.softmax(dim=-1).cpu())
        probs["point"].append(out.point_logits.softmax(dim=-1).cpu())
    model.train(was_training)
    probs = {name: torch.cat(parts) for name, parts in probs.items()}
    return {**probs, "joint": (probs["image"] + probs["point"]) / 2}


def evaluate(model: CrossMoST, objects: Objects, views: int = 6) -> dict:
    """Top-1 accuracy in percent: {"image", "point", "joint", "per_class": {name: {"image", ...}}}.

    Raises: ValueError if the objects have no labels or other classes than the model's, in this order.
    """
    if objects.labels is None:
        raise ValueError(f"{objects.name} has no labels; accuracy cannot be measured")
    if list(objects.class_names) != list(model.class_names):
        raise ValueError(f"{objects.name} has {objects.class_names[:4]}, the model {model.class_names[:4]}"
                         "; evaluate it on the data set it was trained for")
    correct = {name: (probs.argmax(dim=-1) == objects.labels).double()
               for name, probs in predict(model, objects, views).items()}
    per_class = {}
    for k, name in enumerate(objects.class_names):
        if (objects.labels == k).any():
            per_class[name] = {m: percent(correct[m][objects.labels == k].mean()) for m in MODALITIES}
    return {**{m: percent(correct[m].mean()) for m in MODALITIES}, "per_class": per_class}


def percent(share) -> float:
    """A share in [0, 1] as a percentage with two decimals."""
    return round(100 * float(share), 2)


def table(results: dict) -> str:
    """The closing table: one row for each of zero-shot, student, teacher that `results` holds."""
    rows = [f"top-1 %, {results['dataset']} {results['split']}, {results['objects']} objects".ljust(44)
            + "".join(name.rjust(8) for name in MODALITIES)]
    for key, label in (("zero_shot", "zero-shot"), ("student", "student"), ("teacher", "teacher")):
        if results.get(key):
            rows.append(label.ljust(44) + "".join(f"{results[key][name]:8.1f}" for name in MODALITIES))
    return "\n".join(rows)


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
                   color="#CC79A7",
                   label="accuracy of the kept")
    right.set(xlabel="step", ylabel="%", ylim=(0, 102), title="pseudo-labels")
    if steps:
        right.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True,
                        help="a last.pt of train.py, or the authors' trained file")
    parser.add_argument("--dataset", choices=sorted(DATASETS), default="shapes",
                        help="objects to evaluate on")
    parser.add_argument("--split", choices=("train", "test"), default="test", help="which of its splits")
    parser.add_argument("--data-root", type=Path, default=Path("data"),
                        help="folder that holds the data sets")
    parser.add_argument("--domain", choices=("source", "target"), help="as it is, or as a scanner sees it")
    parser.add_argument("--points", type=int, default=1024, help="points per cloud")
    parser.add_argument("--views", type=int, default=6, help="fixed depth views whose logits are averaged")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to compute")
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    """Evaluate student and teacher of a checkpoint; print the table, return it as a dictionary."""
    args = parse_args(argv)
    objects = load_dataset(args.dataset, args.data_root, args.split, args.points, args.domain)
    results = {"dataset": objects.name, "split": args.split, "objects": len(objects)}
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
