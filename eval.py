"""Accuracy, names and pictures: of a trained checkpoint, of a zero-shot start, of single files.

    python eval.py --checkpoint runs/shapes-tiny/last.pt                # on the data it was trained for
    python eval.py --model ulip2 --classes "mug,bowl,desk lamp" scans/*.ply
    python eval.py --dataset modelnet40 --preview sheet.png             # what the models see of a data set
"""
import argparse
import csv
import io
import json
import os
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import (DATASETS, Objects, dataset_row, draw_views, fixed_images, load_dataset, to_unit_sphere,
                  training_photographs)
from model import TEMPLATES, CrossMoST, build_model, load_checkpoint, precision_for
from support import UserError, write_whole
from support.command_line import add_data_options, add_device_options, one_line_errors, option_parser
from support.files import class_key, clean_class_names, printable, read_lines, read_object
from support.pictures import draw_grid, plot_confusion
from support.resume import CODE
from support.starts import STARTS, read_start, start_file

# The three predictions in every table: either modality's own, and "joint", the mean of the two probabilities.
# How training merges the two into a pseudo-label is in losses.py.
MODALITIES = ("image", "point", "joint")

# ------ Embed, predict, accuracy ---------------------------------------------------------------------------
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


def classify(model: CrossMoST, clouds, points: int = 1024, views: int | None = None) -> tuple[list, Tensor]:
    """Name clouds as they are, of any place and scale, for example in a notebook.

    Args:
        clouds: (P, 3) arrays or tensors, z up: a list of any numbers of points, or a batch (N, P, 3).
        points: a cloud of more points is thinned to this many; best the number the model was trained with.
        views: how many depth views are rendered of each; None: six.
    Returns:
        The N names, and the joint probabilities (N, C) in the order of model.class_names.
    Raises:
        UserError: a cloud has another shape, too few points for the model's groups, coordinates that are not
            finite, or all its points in one place.
    """
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
    """Everything that probabilities (N, C) tell of a model, in percent.

    Returns:
        "agreement": how many objects image and point name alike.
        "shares": {class name: how many objects the joint prediction names so}.
        With labels also top-1 accuracy "image", "point", "joint", and the same of the classes that occur,
        "per_class": {class name: {"image", "point", "joint"}}.
    """
    def percent(hits: Tensor) -> float:
        return round(100 * hits.double().mean().item(), 2)

    named = {modality: p.argmax(dim=-1) for modality, p in probs.items()}
    figures = {
        "agreement": percent(named["image"] == named["point"]),
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

# ------ The closing table ----------------------------------------------------------------------------------
def table(results: dict, every_class_of: str | None = None) -> str:
    """The closing table: a row for each of zero_shot, student and teacher that `results` has accuracy of.

    every_class_of: one of these; its mean over classes and a row for each class follow.
    """
    title = f"{results['dataset']} {results['split']}, {results['objects']} objects"
    rows = {}
    for which in ("zero_shot", "student", "teacher"):
        if "joint" in (results.get(which) or ()):
            rows[which.replace("_", "-")] = results[which]
    if not rows:
        return f"{title} without labels"

    if every_class_of:
        per_class = results[every_class_of]["per_class"]
        mean = {modality: statistics.mean(accuracy[modality] for accuracy in per_class.values())
                for modality in MODALITIES}
        rows[f"{every_class_of.replace('_', '-')}, mean over classes"] = mean
        rows |= per_class

    # 44 columns and three of 8: the table fits into a terminal of 80.
    lines = [f"top-1 %, {title}".ljust(44) + "".join(modality.rjust(8) for modality in MODALITIES)]
    for label, accuracy in rows.items():
        lines.append(label.ljust(44) + "".join(f"{accuracy[modality]:8.1f}" for modality in MODALITIES))
    return "\n".join(lines)

# ------ Predictions and embeddings -------------------------------------------------------------------------
def name_objects(objects: Objects, probs: dict[str, Tensor]) -> list[dict]:
    """The line of predictions.csv for each object: joint class and probability, either modality's, whether
    these two agree, and the true class where there are labels."""
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
        if objects.labels is not None:
            lines[-1]["true"] = objects.class_names[objects.labels[i]]
    return lines


def predictions_csv(objects: Objects, probs: dict[str, Tensor]) -> bytes:
    """A CSV file with a line for each object, see `name_objects`."""
    lines = name_objects(objects, probs)
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

# ------ What the models see --------------------------------------------------------------------------------
def plot_gallery(probs: dict[str, Tensor], objects: Objects, count: int = 12) -> bytes:
    """View and cloud of objects that are named wrongly or in two ways, evenly spaced over all of these."""
    lines = name_objects(objects, probs)
    doubtful = [i for i, line in enumerate(lines)
                if line["agree"] == "no" or line["class"] != line.get("true", line["class"])]
    spaced = torch.linspace(0, len(doubtful) - 1, min(count, len(doubtful))).long()
    chosen = torch.tensor(doubtful).long()[spaced]

    cells = []
    for i, images in zip(chosen.tolist(), fixed_images(objects.pick(chosen), 1, 224, 1, "cpu")):
        text = "image: {image} {image_confidence}\npoint: {point} {point_confidence}".format(**lines[i])
        cells.append((images[0, 0], f"is {lines[i]['true']}\n{text}" if "true" in lines[i] else text))
        cells.append((objects.points[i], ""))
    title = f"{len(doubtful)} of {len(objects)} objects are named wrongly or in two ways"
    return draw_grid(cells, 8, title)


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

# ------ The command line -----------------------------------------------------------------------------------
def parse_args(argv=None) -> argparse.Namespace:
    parser = option_parser(__doc__.splitlines()[0])

    group = parser.add_argument_group("what").add_argument
    group("--checkpoint", type=Path, help="a last.pt of train.py, or the authors' trained file")
    group("--model", help=f"or a zero-shot start: {', '.join(STARTS)}, or an open_clip name, whose point "
                          "encoder is untrained")
    group("--pretrained", help="open_clip's weights of --model: a tag or a file")
    group("--start-checkpoint", type=Path, help="the start's file, of any family")
    group("--templates", choices=sorted(TEMPLATES), help="texts around a class name of a start")
    group("--classes", help="names for a start instead of the data set's: \"a,b,c\" or a file, a name a line")
    group("--cache", type=Path, default=Path("cache"), help="folder of fetched starts")
    group("--preview", type=Path, help="FILE.png: no model, only draw what the models see of --dataset")

    group = parser.add_argument_group("on (if not given: as the checkpoint was trained)").add_argument
    group("files", nargs="*", type=Path, help="single objects to name")
    group("--dataset", help=f"{', '.join(DATASETS)}, or a folder of your own")
    group("--split", choices=("train", "test"), default="test", help="which of its splits")
    add_data_options(group)
    add_device_options(group)
    parser.set_defaults(data_root=None, precision=None)  # to know what is given

    group = parser.add_argument_group("into").add_argument
    group("--predictions", type=Path, help="FILE.csv: each object's name, and those of image and point")
    group("--embeddings", type=Path, help="FILE.npz: features, logits, classifier")
    group("--confusion", type=Path, help="FILE.png: the confusion matrix")
    group("--gallery", type=Path, help="FILE.png: objects named wrongly or in two ways")
    group("--json", type=Path, help="FILE.json: all figures")
    return parser.parse_args(argv)


def main(argv=None) -> dict | None:
    """Evaluate student and teacher of a checkpoint, or a start; print the table, write what is asked for.

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
    report(args, results, which, objects, probs)
    if args.embeddings:
        write_whole(args.embeddings, embeddings_npz(embedded, model, objects))
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
        rename(objects, read_lines(Path(args.classes)) if is_file else args.classes.split(","))
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


def report(args, results: dict, which: str, objects: Objects, probs: dict[str, Tensor]):
    """Print the table, or each file's names; write the files that the command line asks for."""
    if args.files:
        for line in name_objects(objects, probs):
            print("{object}: {class} {confidence} (image: {image} {image_confidence}, "
                  "point: {point} {point_confidence})".format(**line))
    else:
        print(table(results, every_class_of=which))
    if args.predictions:
        write_whole(args.predictions, predictions_csv(objects, probs))
    if args.confusion:
        title = f"{objects.name} {objects.split}, joint, % of a class"
        named = probs["joint"].argmax(dim=-1)
        write_whole(args.confusion, plot_confusion(objects.labels, named, objects.class_names, title))
    if args.gallery:
        write_whole(args.gallery, plot_gallery(probs, objects))
    if args.json:
        write_whole(args.json, json.dumps(results, indent=1).encode() + b"\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
