"""What a run or an evaluation says and leaves, as text or as the bytes of a file.

The table, a line for each object, the files of predictions and embeddings, the end of a log, and a
warning of names that a start does not know. `figures` are what eval.assess returns.
"""
import csv
import difflib
import io
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support.files import class_key

# The three predictions in every table: either modality's own, and "joint", the mean of the two
# probabilities.
MODALITIES = ("image", "point", "joint")


def table(title: str, rows: dict[str, dict], every_class_of: str | None = None) -> str:
    """The closing table: for each row top-1 accuracy, where there are labels, and information.

    rows: name -> figures. every_class_of: a row; its mean over classes and a row for each class
    follow.
    """
    rows = dict(rows)
    per_class = rows[every_class_of].get("per_class") if every_class_of else None
    if per_class:
        # Every class counts the same.
        mean = {modality: statistics.mean(accuracy[modality] for accuracy in per_class.values())
                for modality in MODALITIES}
        rows |= {f"{every_class_of}, mean over classes": mean, **per_class}

    # 42 columns, three of 8 and one of 13 fit into a terminal of 80.
    has_labels = any("joint" in figures for figures in rows.values())
    heads = MODALITIES if has_labels else ()
    title = f"top-1 %, {title}" if has_labels else f"{title} without labels"
    lines = [title.ljust(42) + "".join(head.rjust(8) for head in heads) + "information".rjust(13)]
    for label, figures in rows.items():
        line = label.ljust(42) + "".join(f"{figures[modality]:8.1f}" for modality in heads)
        told = figures.get("information")
        lines.append(line if told is None else f"{line}{told:13.2f}")
    return "\n".join(lines)


def top_one(figures: dict) -> dict | None:
    """The accuracy alone; None without labels."""
    return {modality: figures[modality] for modality in MODALITIES} if "joint" in figures else None


def in_short(figures: dict) -> dict:
    """The figures without those of single classes."""
    single = ("shares", "per_class")
    return {name: value for name, value in figures.items() if name not in single}


def what_is_known(results: dict) -> list[str]:
    """Sentences on a run's pseudo-labels, and without labels on whether it helped.

    results: what results.json holds.
    """
    quality, agreement = results["pseudo_label"], results["agreement"]
    rightly = ""
    if quality["accuracy"] is not None:
        rightly = f", {quality['accuracy']} % of these rightly"
    sentences = [
        f"in the last epoch {quality['coverage']} % of the pseudo-labels were sure enough to train "
        f"on{rightly}",
        f"image and point agree on {agreement['start']} % of the objects before training, "
        f"{agreement['teacher']} % after"]
    if results["teacher"] is not None:
        return sentences

    told = results["information"]
    rise = told["teacher"] - told["start"]
    sentences.append(f"their names tell each other {told['start']:.2f} nats before training, "
                     f"{told['teacher']:.2f} after: {meaning_of(rise)}")
    before, after = results["shares"]["start"], results["shares"]["teacher"]
    changed = [name for name in before if abs(after[name] - before[name]) >= 0.5]
    changed.sort(key=lambda name: -abs(after[name] - before[name]))
    if changed:
        listed = [f"{name} {before[name]:.0f} -> {after[name]:.0f}" for name in changed[:10]]
        sentences.append(f"names whose share changed most, before -> after, %: {', '.join(listed)}")
    return sentences


def meaning_of(rise: float) -> str:
    """What a rise of the information in nats has meant for accuracy, as far as it was measured."""
    # assets/information.md, "Did it help?": 131 runs that had labels to judge them, on objects that
    # all had one of the names.
    if rise >= 0.3:
        return "in all 36 measured runs with such a rise accuracy had risen, too"
    if rise >= 0.1:
        return "of 39 measured runs with such a rise 7 had lost accuracy"
    return "too small a rise to judge by, as of 56 such measured runs 19 had lost accuracy"


# ------ A line for each object ------------------------------------------------------------------------------
def name_objects(objects, probs: dict[str, Tensor], start: tuple | None = None) -> list[dict]:
    """The line of predictions.csv for each object.

    It has the joint class and its probability, either modality's, whether these two agree, the
    start's joint class and probability, and the true class where there are labels.
    start: the start's joint confidence and label (N,), (N,), where it is known.
    """
    columns = {"object": objects.names}

    def add(name: str, confidence_name: str, confidence: Tensor, labels: Tensor):
        columns[name] = [objects.class_names[k] for k in labels.tolist()]
        columns[confidence_name] = [f"{share:.4f}" for share in confidence.tolist()]

    add("class", "confidence", *probs["joint"].max(dim=-1))
    add("image", "image_confidence", *probs["image"].max(dim=-1))
    add("point", "point_confidence", *probs["point"].max(dim=-1))
    pairs = zip(columns["image"], columns["point"])
    columns["agree"] = ["yes" if image == point else "no" for image, point in pairs]
    if start is not None:
        add("start", "start_confidence", *start)
    if objects.labels is not None:
        columns["true"] = [objects.class_names[k] for k in objects.labels.tolist()]
    return [dict(zip(columns, line)) for line in zip(*columns.values())]


def predictions_csv(lines: list[dict]) -> bytes:
    """A CSV file of the lines of `name_objects`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=lines[0])
    writer.writeheader()
    writer.writerows(lines)
    # The name of a file that is no UTF-8 is written as it is.
    return text.getvalue().encode("utf-8", "surrogateescape")


def embeddings_npz(embedded: dict, model, objects) -> bytes:
    """An .npz file: what `embed` returns, classifier, class names, objects' names, labels (-1: none)."""
    labels = torch.full((len(objects),), -1) if objects.labels is None else objects.labels
    file = io.BytesIO()
    np.savez_compressed(
        file, **embedded, classifier=model.classifier.detach().cpu(), labels=labels,
        class_names=np.array(objects.class_names), names=np.array(objects.names))
    return file.getvalue()


# ------ The end of a log ------------------------------------------------------------------------------------
def read_log(path: Path) -> list[dict]:
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pseudo_label_quality(lines: list[dict], epochs: int) -> dict:
    """Coverage and accuracy of the last epoch's pseudo-labels, percent; accuracy None without labels.

    lines: of log.jsonl.
    """
    lines = [line for line in lines if line.get("epoch") == epochs and "coverage" in line]
    # A line is a mean over its steps, which are fewer in an epoch's last line.
    steps = [line["steps"] for line in lines]
    shares = [(line["coverage"], line["coverage"] * (line["label_accuracy"] or 0)) for line in lines]
    coverage, correct = np.average(shares, axis=0, weights=steps).tolist()
    is_known = lines[0]["label_accuracy"] is not None and coverage > 0
    accuracy = round(100 * correct / coverage, 2) if is_known else None
    return {"coverage": round(100 * coverage, 2), "accuracy": accuracy}


# ------ Names that a start does not know --------------------------------------------------------------------
def warn_of_unknown_names(class_names: list[str], known: tuple[str, ...]):
    """Say on stderr which names the small start does not know, and which it may know."""
    unknown = [name for name in class_names if class_key(name) not in known]
    if not unknown:
        return
    listed = []
    for name in unknown[:5]:
        close = difflib.get_close_matches(class_key(name), known, 1)
        listed.append(f"{name} (did you mean {close[0]}?)" if close else name)
    print(f"warning: the small start knows {', '.join(known)} only; {len(unknown)} of "
          f"{len(class_names)} names are others: {', '.join(listed)}. Expect little of these, "
          "or take --model ulip2", file=sys.stderr)
