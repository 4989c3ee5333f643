"""Accuracy, names and pictures: of a trained checkpoint, of a zero-shot start, of single files.

    python eval.py --checkpoint runs/shapes-tiny/last.pt                # on the data it was trained for
    python eval.py --model ulip2 --classes "mug,bowl,desk lamp" scans/*.ply
    python eval.py --dataset modelnet40 --preview sheet.png             # what the models see of a data set
"""
import argparse
import csv
import difflib
import io
import json
import os
import statistics
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import (DATASETS, MODELNET10, Objects, dataset_name, dataset_row, draw_views, evenly_spaced,
                  fixed_images, load_dataset, to_unit_sphere, training_photographs)
from model import TEMPLATES, CrossMoST, build_model, load_checkpoint, precision_for
from support import UserError, write_whole
from support.command_line import (add_data_options, add_device_options, one_line_errors, option_parser,
                                  path_of)
from support.files import (UP, class_key, clean_class_names, printable, read_lines, read_object,
                           to_z_up)
from support.pictures import draw_grid, plot_confusion
from support.resume import CODE
from support.starts import STARTS, read_start, start_file

# The three predictions in every table: either modality's own, and "joint", the mean of the two probabilities.
# How training merges the two into a pseudo-label is in losses.py.
MODALITIES = ("image", "point", "joint")


# ------ Embed, predict, accuracy ----------------------------------------------------------------------------
@torch.no_grad()
def embed(model: CrossMoST, objects: Objects, views: int | None = None, batch_size: int = 64) -> dict:
    """Logits and features of all objects, on the CPU.

    The inputs are fixed, so that evaluating twice gives the same numbers: image logits are the mean over the
    views of `fixed_images`, and clouds are taken as they are. Every module of the model ends in the mode
    (training or not) it came in.

    Args:
        views: how many depth views or photographs an object has; None: six, or all its photographs.
    Returns:
        image_logits, point_logits (N, C) and image_features, point_features (N, E), by these names.
    Raises:
        UserError: the model names other classes than the objects have.
    """
    refuse_other_classes(model, objects)
    device = model.logit_scale.device
    size = model.visual.image_size[0]
    batches = []
    done = 0  # objects; images come in parts of any size: photographs one object at a time
    # disable=None: a bar only where a person looks on.
    bar = tqdm(total=len(objects), desc="evaluating", unit="object", leave=False, disable=None)
    with evaluation_mode(model), bar:
        for images in fixed_images(objects, views, size, batch_size, device):
            points = objects.points[done:done + len(images)].to(device)
            done += len(images)
            outputs = model(model.normalise(images), points)
            given = {name: value for name, value in outputs._asdict().items() if value is not None}
            batches.append({name: value.cpu() for name, value in given.items()})
            bar.update(len(images))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def refuse_other_classes(model: CrossMoST, objects: Objects):
    """Raises: UserError where the model's classes are not the objects' classes, in the same order."""
    # The authors' trained file has no class names: read_start numbers its classes.
    numbers = [str(k) for k in range(len(objects.class_names))]
    if list(model.class_names) not in (list(objects.class_names), numbers):
        raise UserError(f"{objects.name} has the classes {objects.class_names[:4]} ..., the model "
                        f"{model.class_names[:4]} ...; evaluate a checkpoint on the data set it was trained "
                        "for, or give a start as --start-checkpoint")


@contextmanager
def evaluation_mode(model: torch.nn.Module):
    """Every module in eval mode, and afterwards each in its own mode again.

    A student's frozen modules are in eval mode while the rest trains (Deviation D12), so that
    `model.train()` at the end would be wrong.
    """
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def to_probs(logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """Class probabilities (N, C) from embed()'s logits: image, point, and joint, the mean of the two."""
    image = logits["image_logits"].softmax(dim=-1)
    point = logits["point_logits"].softmax(dim=-1)
    return {"image": image, "point": point, "joint": (image + point) / 2}


def classify(model: CrossMoST, clouds, points: int | None = None,
             views: int | None = None) -> tuple[list, Tensor]:
    """Name clouds as they are, of any place and scale, for example in a notebook.

    Args:
        clouds: (P, 3) arrays or tensors, z up: a list of any numbers of points, or a batch (N, P, 3).
        points: a cloud of more points is thinned to this many; None: as many as the model was trained with.
        views: how many depth views are rendered of each; None: as many as the model was trained with.
    Returns:
        The N names, and the joint probabilities (N, C) in the order of model.class_names.
    Raises:
        UserError: a cloud has another shape, too few points for the model's groups, coordinates that are not
            finite, or all its points in one place.
    """
    points = points or model.trained_with.get("points", 1024)
    views = views or model.trained_with.get("views")
    random = np.random.default_rng(0)
    of_size = {}  # number of points -> [(which cloud, cloud in the unit sphere)]
    for i, cloud in enumerate(clouds):
        cloud = torch.as_tensor(cloud, dtype=torch.float64, device="cpu")  # UTM coordinates need the digits
        if cloud.dim() != 2 or cloud.shape[1] != 3:
            raise UserError(f"cloud {i} has the shape {tuple(cloud.shape)}; expected a list of (points, 3)")
        if len(cloud) > points:
            cloud = cloud[random.choice(len(cloud), points, replace=False)]
        of_size.setdefault(len(cloud), []).append((i, to_unit_sphere(cloud[None], [i]).float()))

    # Clouds of one size go through the model together.
    probs = torch.empty(len(clouds), len(model.class_names))
    for numbered in of_size.values():
        index, same_size = zip(*numbered)
        objects = Objects(torch.cat(same_size), None, model.class_names)
        probs[list(index)] = to_probs(embed(model, objects, views))["joint"]
    return [model.class_names[k] for k in probs.argmax(dim=-1).tolist()], probs


def evaluate(model: CrossMoST, objects: Objects, views: int | None = None) -> dict:
    """What `assess` says of the model's probabilities."""
    return assess(to_probs(embed(model, objects, views)), objects)


def assess(probs: dict[str, Tensor], objects: Objects) -> dict:
    """Everything that probabilities (N, C) tell of a model; shares of objects in percent.

    Returns:
        "agreement": how many objects image and point name alike.
        "information": how much image's and point's names tell each other, in nats.
        "shares": {class name: how many objects the joint prediction names so}.
        With labels also top-1 accuracy "image", "point", "joint", and the same of the classes that occur,
        "per_class": {class name: {"image", "point", "joint"}}.
    """
    def percent(hits: Tensor) -> float:
        return round(100 * hits.double().mean().item(), 2)

    named = {modality: p.argmax(dim=-1) for modality, p in probs.items()}
    figures = {
        "agreement": percent(named["image"] == named["point"]),
        "information": round(information(named["image"], named["point"], len(objects.class_names)), 3),
        "shares": {name: percent(named["joint"] == k) for k, name in enumerate(objects.class_names)},
    }
    if objects.labels is None:
        return figures

    correct = {modality: named[modality] == objects.labels for modality in MODALITIES}
    figures |= {modality: percent(correct[modality]) for modality in MODALITIES}
    figures["per_class"] = {}
    for k in objects.labels.unique().tolist():
        of_class = objects.labels == k
        accuracy = {modality: percent(correct[modality][of_class]) for modality in MODALITIES}
        figures["per_class"][objects.class_names[k]] = accuracy
    return figures


def information(image_names: Tensor, point_names: Tensor, classes: int) -> float:
    """The mutual information of two namings (N,) of the same objects, in nats: beyond the paper.

    I = sum_kl t_kl log( t_kl / (t_k. t_.l) ), where t_kl is the share of objects that image calls k and point
    calls l. It is log C at most. Two witnesses that err independently, given the object, tell each other most
    when both tell the truth (arXiv 1802.08887); if all objects have one name, they agree and tell nothing.
    Estimated from N objects, I is too large by about (C - 1)^2 / 2N. Therefore the mean over 20 shuffles of
    the pairs is subtracted, and names that have nothing to do with each other give about 0.
    """
    def of_pairs(point_names: Tensor) -> float:
        counts = torch.bincount(image_names * classes + point_names, minlength=classes ** 2)
        together = counts.view(classes, classes).double() / len(point_names)
        apart = together.sum(dim=1, keepdim=True) * together.sum(dim=0)
        # xlogy: a pair of names that does not occur counts 0.
        return (torch.xlogy(together, together) - torch.xlogy(together, apart)).sum().item()

    random = torch.Generator().manual_seed(0)
    shuffled = [point_names[torch.randperm(len(point_names), generator=random)] for _ in range(20)]
    return of_pairs(point_names) - statistics.mean(map(of_pairs, shuffled))


def top_one(figures: dict) -> dict | None:
    """The accuracy alone of what `assess` returns; None without labels."""
    return {modality: figures[modality] for modality in MODALITIES} if "joint" in figures else None


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

    accuracy = None
    if coverage > 0 and any(line["label_accuracy"] is not None for line in lines):
        accuracy = round(100 * correct / coverage, 2)
    return {"coverage": round(100 * coverage, 2), "accuracy": accuracy}


# ------ What can be said without labels ---------------------------------------------------------------------
# In nats. Measured on thousands of folders that stood upright (assets/information.md): of those with 20
# objects or more and several kinds of them, less than one in a hundred seemed to have another axis up.
CLEARLY_MORE = 0.2


def axis_hint(model: CrossMoST, objects: Objects, embed_all=embed) -> str | None:
    """What to say of objects whose files seem to have another axis up than they were read with, else None.

    Compares how much image and point tell each other if z, y, or -y points up, on at most 100 objects and two
    views of each. objects: read as z up. embed_all: embed, or what shares it between processes.
    """
    if len(objects) < 20:
        return None
    shown = objects.pick(torch.tensor(evenly_spaced(list(range(len(objects))), 100)))
    told = {}
    for up in UP:
        turned = replace(shown, points=to_z_up(shown.points, up))
        probs = to_probs(embed_all(model, turned, 2))
        told[up] = assess(probs, turned)["information"]
    best = max(told, key=told.get)
    if told[best] - told["z"] < CLEARLY_MORE:
        return None
    listed = ", ".join(f"{value:.2f} with {up}" for up, value in told.items())
    return (f"the objects seem to lie on their side: image and point tell each other {listed} up (in nats, "
            f"more is better); give --up={best}, or --up z to keep them as they are")


def warn_of_unknown_names(class_names: list[str]):
    """Say which names the small start does not know, and which it may know."""
    unknown = [name for name in class_names if class_key(name) not in MODELNET10]
    if not unknown:
        return
    guesses = {name: difflib.get_close_matches(class_key(name), MODELNET10, 1) for name in unknown[:5]}
    listed = [f"{name} (did you mean {guess[0]}?)" if guess else name for name, guess in guesses.items()]
    print(f"warning: the small start knows ten kinds of furniture only ({', '.join(MODELNET10)}); "
          f"{len(unknown)} of {len(class_names)} names are others: {', '.join(listed)}. Expect little of "
          "these, or take --model ulip2", file=sys.stderr)


# ------ The closing table -----------------------------------------------------------------------------------
def table(title: str, rows: dict[str, dict], every_class_of: str | None = None) -> str:
    """The closing table. A row is what `assess` says: top-1 accuracy where there are labels, and information.

    every_class_of: a row; its mean over classes and a row for each class follow.
    """
    rows = dict(rows)
    per_class = rows[every_class_of].get("per_class") if every_class_of else None
    if per_class:
        mean = {modality: statistics.mean(accuracy[modality] for accuracy in per_class.values())
                for modality in MODALITIES}
        rows |= {f"{every_class_of}, mean over classes": mean, **per_class}

    # 42 columns, three of 8 and one of 13: the table fits into a terminal of 80.
    has_labels = any("joint" in figures for figures in rows.values())
    heads = MODALITIES if has_labels else ()
    title = f"top-1 %, {title}" if has_labels else f"{title} without labels"
    lines = [title.ljust(42) + "".join(head.rjust(8) for head in heads) + "information".rjust(13)]
    for label, figures in rows.items():
        line = label.ljust(42) + "".join(f"{figures[modality]:8.1f}" for modality in heads)
        told = figures.get("information")
        lines.append(line if told is None else f"{line}{told:13.2f}")
    return "\n".join(lines)


# ------ Predictions and embeddings --------------------------------------------------------------------------
def name_objects(objects: Objects, probs: dict[str, Tensor], start: tuple | None = None) -> list[dict]:
    """The line of predictions.csv for each object: joint class and probability, either modality's, whether
    these two agree, the start's joint class and probability, and the true class where there are labels.

    start: the start's joint confidence and label (N,), (N,), where it is known.
    """
    confidences = {modality: probs[modality].amax(dim=-1).tolist() for modality in MODALITIES}
    names = {modality: [objects.class_names[k] for k in probs[modality].argmax(dim=-1).tolist()]
             for modality in MODALITIES}
    lines = []
    for i, name in enumerate(objects.names):
        lines.append({
            "object": name,
            "class": names["joint"][i],
            "confidence": f"{confidences['joint'][i]:.4f}",
            "image": names["image"][i],
            "image_confidence": f"{confidences['image'][i]:.4f}",
            "point": names["point"][i],
            "point_confidence": f"{confidences['point'][i]:.4f}",
            "agree": "yes" if names["image"][i] == names["point"][i] else "no",
        })
        if start is not None:
            lines[-1]["start"] = objects.class_names[start[1][i]]
            lines[-1]["start_confidence"] = f"{start[0][i]:.4f}"
        if objects.labels is not None:
            lines[-1]["true"] = objects.class_names[objects.labels[i]]
    return lines


def predictions_csv(lines: list[dict]) -> bytes:
    """A CSV file of the lines of `name_objects`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=lines[0])
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().encode("utf-8", "surrogateescape")  # a file's name that is no UTF-8, as it is


def embeddings_npz(embedded: dict, model: CrossMoST, objects: Objects) -> bytes:
    """An .npz file: what `embed` returns, the classifier, class names, objects' names, labels (-1: none)."""
    labels = torch.full((len(objects),), -1) if objects.labels is None else objects.labels
    file = io.BytesIO()
    np.savez_compressed(file, **embedded, classifier=model.classifier.detach().cpu(), labels=labels,
                        class_names=np.array(objects.class_names), names=np.array(objects.names))
    return file.getvalue()


# ------ What the models see ---------------------------------------------------------------------------------
def gallery(lines: list[dict], objects: Objects, count: int = 12) -> bytes:
    """View and cloud of the objects one should look at, evenly spaced over all of these.

    They are those that image and point name differently, and with labels those that are named wrongly.
    lines: of name_objects.
    """
    doubtful = [i for i, line in enumerate(lines)
                if line["agree"] == "no" or line["class"] != line.get("true", line["class"])]
    chosen = torch.tensor(evenly_spaced(doubtful, count)).long()

    cells = []
    for i, images in zip(chosen.tolist(), fixed_images(objects.pick(chosen), 1, 224, 1, "cpu")):
        opinions = [f"{who}: {lines[i][name]} {lines[i][confidence]}" for who, name, confidence in (
            ("joint", "class", "confidence"), ("image", "image", "image_confidence"),
            ("point", "point", "point_confidence"))]
        cells.append((images[0, 0], "\n".join([lines[i]["object"], *opinions])))
        cells.append((objects.points[i], f"is {lines[i]['true']}" if "true" in lines[i] else ""))
    why = "image and point disagree" if objects.labels is None else "named wrongly, or in two ways"
    return draw_grid(cells, 6, f"{len(doubtful)} of {len(objects)} objects: {why}")


def preview(objects: Objects, size: int = 224, count: int = 8) -> bytes:
    """A sheet of objects: cloud, one evaluation view, weak and strong views."""
    torch.manual_seed(0)  # the same sheet each time
    spaced = torch.linspace(0, len(objects) - 1, min(count, len(objects))).long()
    shown = objects.pick(spaced)
    stills = [images[:, 0] for images in fixed_images(shown, None, size, count, "cpu")]
    photographs = next(iter(training_photographs(shown, (torch.arange(len(shown)),), size, seed=0)))
    views = draw_views(shown.points, size, photographs)
    columns = {"cloud": shown.points, "evaluation": torch.cat(stills), **views}

    cells = []
    for i in range(len(shown)):
        name = shown.names[i] if shown.labels is None else shown.class_names[shown.labels[i]]
        for title, items in columns.items():
            cells.append((items[i], f"{name}\n{title}" if title == "cloud" else title))
    return draw_grid(cells, len(columns))


# ------ The command line ------------------------------------------------------------------------------------
def parse_args(argv=None) -> argparse.Namespace:
    parser = option_parser("accuracy, names and pictures of a checkpoint, a zero-shot start, single files")

    group = parser.add_argument_group("what").add_argument
    group("--checkpoint", type=path_of, help="a last.pt of train.py, or the authors' trained file")
    group("--model", help=f"or a zero-shot start: {', '.join(STARTS)}, or an open_clip name, whose point "
                          "encoder is untrained")
    group("--pretrained", help="open_clip's weights of --model: a tag or a file")
    group("--start-checkpoint", type=path_of, help="the start's file, of any family")
    group("--templates", choices=sorted(TEMPLATES), help="texts around a class name of a start")
    group("--classes", help="names for a start instead of the data set's: \"a,b,c\" or a file, a name a line")
    group("--cache", type=path_of, default=Path("cache"), help="folder of fetched starts")
    group("--preview", type=path_of, help="FILE.png: no model, only draw what the models see of --dataset")

    group = parser.add_argument_group("on (if not given: as the checkpoint was trained)").add_argument
    group("files", nargs="*", type=path_of, help="single objects to name")
    group("--dataset", type=dataset_name, help=f"{', '.join(DATASETS)}, or a folder of your own")
    group("--split", choices=("train", "test"), default="test", help="which of its splits")
    add_data_options(group)
    add_device_options(group)
    parser.set_defaults(data_root=None, precision=None)  # to know what is given

    group = parser.add_argument_group("into").add_argument
    group("--predictions", type=path_of, help="FILE.csv: each object's name, and those of image and point")
    group("--embeddings", type=path_of, help="FILE.npz: features, logits, classifier")
    group("--confusion", type=path_of, help="FILE.png: the confusion matrix")
    group("--gallery", type=path_of, help="FILE.png: objects named wrongly or in two ways")
    group("--json", type=path_of, help="FILE.json: all figures")
    return parser.parse_args(argv)


def main(argv=None) -> dict | None:
    """Evaluate student and teacher of a checkpoint, or a start; write what is asked for, print the table.

    Returns the figures of each by name; None for --preview.
    """
    args = parse_args(argv)
    refuse_contradictions(args)
    path = args.checkpoint or args.start_checkpoint
    if args.model in STARTS and not (path or args.preview):
        path = start_file(args.model, args.cache, args.download)
    saved = read_start(path) if path else {"options": {}, "architecture": {"class_names": []}}
    made_by = saved.get("identity", {}).get("code", CODE)
    if made_by != CODE:
        print(f"note: {path} was trained by other code ({made_by}, now {CODE}); figures may have changed",
              file=sys.stderr)

    chosen = as_trained(args, saved["options"])
    objects = load_objects(args, chosen, saved["architecture"]["class_names"])
    if args.preview:
        write_whole(args.preview, preview(objects))
        print(f"{args.preview} shows some of the {len(objects)} {objects.split} objects of {objects.name}")
        return None
    if args.confusion and objects.labels is None:
        raise UserError("--confusion needs labels, of classes that are all among the names")
    if chosen["model"] == "tiny":
        warn_of_unknown_names(objects.class_names)

    results = {"dataset": objects.name, "split": objects.split, "objects": len(objects)}
    if args.checkpoint:
        student = load_model("student", args, chosen, path, objects.class_names)
        results["student"] = evaluate(student, objects, chosen["views"])

    # Names, embeddings and pictures are the teacher's, or the start's.
    which = "teacher" if args.checkpoint else "zero_shot"
    model = load_model(which, args, chosen, path, objects.class_names)
    embedded = embed(model, objects, chosen["views"])
    probs = to_probs(embedded)
    results[which] = assess(probs, objects)
    lines = name_objects(objects, probs)

    # Files first: whoever reads what is printed may close the pipe.
    if args.embeddings:
        write_whole(args.embeddings, embeddings_npz(embedded, model, objects))
    write_files(args, results, objects, probs, lines)
    if args.files:
        for line in lines:
            print("{object}: {class} {confidence} (image: {image} {image_confidence}, "
                  "point: {point} {point_confidence})".format(**line))
    else:
        title = f"{objects.name} {objects.split}, {len(objects)} objects"
        rows = {name.replace("_", "-"): figures for name, figures in results.items() if type(figures) is dict}
        print(table(title, rows, which.replace("_", "-")))
        is_own_folder = chosen["dataset"] not in DATASETS
        hint = axis_hint(model, objects) if is_own_folder and chosen["up"] is None else None
        if hint:
            print(f"note: {hint}", file=sys.stderr)
    if len(objects) < len(args.files):
        raise UserError(f"only {len(objects)} of {len(args.files)} files could be read, see above")
    return results


def refuse_contradictions(args):
    """Raises: UserError for options that do not go together."""
    if args.checkpoint and (args.start_checkpoint or args.model or args.classes):
        raise UserError("--model, --start-checkpoint and --classes are of a start; drop these, or "
                        "--checkpoint: it only knows the classes it was trained for")
    if not (args.preview or args.checkpoint or args.start_checkpoint or args.model):
        raise UserError("nothing to evaluate; name a --checkpoint, or a start as --model")
    if args.files and args.dataset:
        raise UserError("name single files or a --dataset, not both")
    if args.model and args.model not in STARTS and not (args.pretrained or args.preview):
        raise UserError(f"--model {args.model} without --pretrained is random; add the weights' tag or file")


def as_trained(args, trained: dict) -> dict:
    """Fill in what the command line leaves open: model, data set, how clouds are read, precision.

    `trained` holds the options of the checkpoint or start; it is empty where no file was given. From it come
    - always: model, data set, points, views;
    - only on the data set it was trained on: domain, up;
    - only of a checkpoint: data root and precision, because a start was perhaps made on another machine.
    Where neither the command line nor the file names a data set, it is `shapes`, for single files, too: they
    get its upright axis and its points.
    """
    dataset = args.dataset or trained.get("dataset", "shapes")
    row = dataset_row(dataset)
    on_this_data_set = trained if dataset == trained.get("dataset") else {}
    of_checkpoint = trained if args.checkpoint else {}
    return {
        "dataset": dataset,
        "model": args.model or trained.get("model"),
        "data_root": args.data_root or Path(of_checkpoint.get("data_root", "data")),
        "domain": args.domain or on_this_data_set.get("domain"),
        "up": args.up or on_this_data_set.get("up"),
        "points": args.points or trained.get("points") or row["points"],
        "views": args.views or trained.get("views"),
        "precision": args.precision or of_checkpoint.get("precision", "auto"),
    }


def load_objects(args, chosen: dict, trained_names: list[str]) -> Objects:
    """The files or the data set asked for, under the class names asked for."""
    if args.files:
        up = chosen["up"] or dataset_row(chosen["dataset"])["up"]
        objects = load_files(args.files, chosen["points"], up)
        objects.class_names = trained_names if args.checkpoint else []  # a start has no classes yet
    else:
        objects = load_dataset(chosen["dataset"], chosen["data_root"], args.split, chosen["points"],
                               chosen["domain"], args.download, chosen["up"], args.cache)
    if args.classes:
        is_file = os.path.isfile(args.classes)  # Path.is_file raises for a long list of names
        names = read_lines(Path(args.classes)) if is_file else args.classes.split(",")
        rename(objects, [name.strip() for name in names])
    if not (objects.class_names or args.preview):
        raise UserError("a start names files by --classes \"mug,bowl,...\"; add it")
    return objects


def load_files(files: list[Path], points: int, up: str) -> Objects:
    """Single objects without labels. Of each file that cannot be read a line on stderr says why."""
    clouds, names = [], []
    for path in files:
        try:
            cloud = torch.from_numpy(read_object(path, points, up=up))[None]
            clouds.append(to_unit_sphere(cloud, [path]))
            names.append(printable(str(path)))
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
    if not clouds:
        raise UserError(f"none of {len(files)} files could be read")
    return Objects(torch.cat(clouds), None, [], "files", names=names)


def rename(objects: Objects, names: list[str]):
    """Give the objects' classes other names. Labels stay where every true class is among the names.

    Raises: UserError for names that are empty, equal, or no names alone (clean_class_names).
    """
    names = clean_class_names(names, "--classes")
    keys = [class_key(name) for name in names]
    # A label is an index: it goes where its name goes.
    if objects.labels is not None and {class_key(name) for name in objects.class_names} <= set(keys):
        index = torch.tensor([keys.index(class_key(name)) for name in objects.class_names])
        objects.labels = index[objects.labels]
    else:
        objects.labels = None
    objects.class_names = names


def load_model(which: str, args, chosen: dict, path: Path | None, class_names: list[str]) -> CrossMoST:
    """The "student" or "teacher" of a checkpoint, or the "zero_shot" start for the class names."""
    if which == "zero_shot":
        templates = TEMPLATES[args.templates or dataset_row(chosen["dataset"])["templates"]]
        model = build_model(chosen["model"], class_names, templates, args.pretrained, path,
                            device=args.device)
    else:
        model = load_checkpoint(path, which=which)
    model.precision = precision_for(chosen["precision"], args.device)
    return model.to(args.device)


def write_files(args, results: dict, objects: Objects, probs: dict[str, Tensor], lines: list[dict]):
    """Write the files that the command line asks for, and say so."""
    files = {}
    if args.predictions:
        files[args.predictions] = predictions_csv(lines)
    if args.confusion:
        title = f"{objects.name} {objects.split}, joint, % of a class"
        named = probs["joint"].argmax(dim=-1)
        files[args.confusion] = plot_confusion(objects.labels, named, objects.class_names, title)
    if args.gallery:
        files[args.gallery] = gallery(lines, objects)
    if args.json:
        files[args.json] = json.dumps(results, indent=1).encode() + b"\n"
    for path, content in files.items():
        write_whole(path, content)
        print(f"{path} is written", file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        main()
