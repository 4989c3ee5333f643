"""Accuracy, names and pictures: of a trained checkpoint, of a zero-shot start, of single files.

    python eval.py --checkpoint runs/shapes-tiny/last.pt                # on the data it was trained for
    python eval.py --model ulip2 --classes "mug,bowl,desk lamp" scans/*.ply
    python eval.py --dataset modelnet40 --preview sheet.png             # what the models see of a data set
"""
import argparse
import json
import os
import sys
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
from support.files import UP, class_key, clean_class_names, composed, read_lines, read_objects, to_z_up
from support.information import information
from support.parallel import gather_embedded
from support.pictures import draw_grid, plot_confusion
from support.results import (MODALITIES, embeddings_npz, name_objects, predictions_csv, table,
                             warn_of_unknown_names)
from support.starts import STARTS, read_start, start_file


# ------ Embed, predict, accuracy ----------------------------------------------------------------------------
@torch.no_grad()
def embed(model: CrossMoST, objects: Objects, views: int | None = None, batch_size: int = 64) -> dict:
    """Logits and features of all objects, on the CPU.

    The inputs are fixed, so that evaluating twice gives the same numbers: image logits
    are the mean over the views of `fixed_images`, and clouds are taken as they are. Every
    module of the model ends in the mode (training or not) it came in.

    Args:
        views: depth views or photographs of an object; None: six, or all photographs.
    Returns:
        image_logits, point_logits (N, C) and image_features, point_features (N, E).
    Raises:
        UserError: the model names other classes than the objects have.
    """
    refuse_other_classes(model, objects)
    device = model.logit_scale.device
    size = model.visual.image_size[0]
    # A student's frozen modules are in eval mode while the rest trains (Deviation D12), so that
    # `model.train()` at the end would be wrong.
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    fields = "image_logits", "point_logits", "image_features", "point_features"
    parts = {field: [] for field in fields}
    done = 0
    # disable=None: a bar only where a person looks on.
    with tqdm(total=len(objects), desc="evaluating", leave=False, disable=None) as bar:
        # (b, V, 3, H, W). Parts are of any size: with photographs they are single objects.
        for images in fixed_images(objects, views, size, batch_size, device):
            points = objects.points[done:done + len(images)].to(device)
            outputs = model(model.normalise(images), points)
            for field in fields:
                parts[field].append(getattr(outputs, field).cpu())
            done += len(images)
            bar.update(len(images))
    for module in in_training:
        module.training = True
    return {field: torch.cat(parts[field]) for field in fields}


def refuse_other_classes(model: CrossMoST, objects: Objects):
    """Raises: UserError where the model's classes are not the objects', in the same order."""
    names, known = list(objects.class_names), list(model.class_names)
    # The authors' trained file has no class names: read_start numbers its classes.
    numbers = [str(k) for k in range(len(names))]
    if known not in (names, numbers):
        raise UserError(f"{objects.name} has the classes {names[:4]} ..., the model {known[:4]} ...; "
                        "evaluate a checkpoint on the data set it was trained for")


def to_probs(logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """Class probabilities (N, C) from embed()'s logits: image, point, and joint, their mean."""
    image = logits["image_logits"].softmax(dim=-1)
    point = logits["point_logits"].softmax(dim=-1)
    # The mean is evaluation's. How training merges the two [joint-label] is in losses.py.
    return {"image": image, "point": point, "joint": (image + point) / 2}


def evaluate(model: CrossMoST, objects: Objects, views: int | None = None) -> dict:
    """What `assess` says of the model's probabilities."""
    return assess(to_probs(embed(model, objects, views)), objects)


def assess(probs: dict[str, Tensor], objects: Objects) -> dict:
    """Everything that probabilities (N, C) tell of a model; shares of objects in percent.

    Returns:
        "agreement": how many objects image and point name alike.
        "information": how much image's and point's names tell each other, in nats.
        "shares": {class name: how many objects the joint prediction names so}.
        With labels also top-1 accuracy "image", "point", "joint", and the same of the
        classes that occur, "per_class": {class name: {"image", "point", "joint"}}.
    """
    def percent(hits: Tensor) -> float:
        return round(100 * hits.double().mean().item(), 2)

    classes = objects.class_names
    # Numbers of classes (N,), by modality.
    named = {modality: p.argmax(dim=-1) for modality, p in probs.items()}
    told = information(named["image"], named["point"], len(classes))
    figures = {
        "agreement": percent(named["image"] == named["point"]),
        "information": round(told, 3),
        "shares": {name: percent(named["joint"] == k) for k, name in enumerate(classes)},
    }
    if objects.labels is None:
        return figures

    correct = {modality: named[modality] == objects.labels for modality in MODALITIES}
    figures |= {modality: percent(correct[modality]) for modality in MODALITIES}
    # A class without objects has no accuracy.
    figures["per_class"] = {}
    for k in objects.labels.unique().tolist():
        of_class = objects.labels == k
        accuracy = {modality: percent(correct[modality][of_class]) for modality in MODALITIES}
        figures["per_class"][classes[k]] = accuracy
    return figures


# ------ Clouds from a notebook ------------------------------------------------------------------------------
def classify(model: CrossMoST, clouds, points: int | None = None,
             views: int | None = None) -> tuple[list, Tensor]:
    """Name clouds as they are, of any place and scale, for example in a notebook.

    Args:
        clouds: a list of (P, 3) arrays or tensors of any P, z up, or a batch (N, P, 3).
        points: larger clouds are thinned to this many; None: as many as in training.
        views: how many depth views are rendered of each; None: as many as in training.
    Returns:
        The N names, and the joint probabilities (N, C) in the order of model.class_names.
    Raises:
        UserError: a cloud has another shape, too few points for the model's groups,
            coordinates that are not finite, or all its points in one place.
    """
    points = points or model.trained_with.get("points", 1024)
    views = views or model.trained_with.get("views")
    # The same points each time.
    random = np.random.default_rng(0)
    probs = []
    # One by one, because clouds of different sizes make no batch.
    for i, cloud in enumerate(clouds):
        # float64, because coordinates on a map (UTM) need the digits.
        cloud = torch.as_tensor(cloud, dtype=torch.float64, device="cpu")
        if cloud.dim() != 2 or cloud.shape[1] != 3:
            raise UserError(f"cloud {i} has the shape {tuple(cloud.shape)}; expected a list "
                            "of (points, 3)")
        if len(cloud) > points:
            cloud = cloud[random.choice(len(cloud), points, replace=False)]
        objects = Objects(to_unit_sphere(cloud[None], [i]), None, model.class_names)
        probs.append(to_probs(embed(model, objects, views))["joint"])
    probs = torch.cat(probs)
    return [model.class_names[k] for k in probs.argmax(dim=-1).tolist()], probs


# ------ What can be said without labels ---------------------------------------------------------------------
def axis_hint(model: CrossMoST, objects: Objects) -> str | None:
    """What to say of objects that seem to have another axis up than z, as they were read.

    Compares how much image and point tell each other if z, y, or -y points up, from two
    views of each object. None: nothing seems wrong.
    """
    # Fewer tell too little, and more than 100 only take longer.
    if len(objects) < 20:
        return None
    shown = objects.pick(torch.tensor(evenly_spaced(range(len(objects)), 100)))
    told = {}
    for up in UP:
        turned = replace(shown, points=to_z_up(shown.points, up))
        probs = to_probs(gather_embedded(embed, model, turned, 2))
        told[up] = assess(probs, turned)["information"]
    best = max(told, key=told.get)
    # 0.2 nats: measured on thousands of folders that stood upright (assets/information.md). Of
    # those with 20 objects or more and several kinds of them, less than one in a hundred seemed
    # to have another axis up.
    if told[best] - told["z"] < 0.2:
        return None
    listed = ", ".join(f"{value:.2f} with {up}" for up, value in told.items())
    return ("the objects seem to lie on their side: image and point tell each other "
            f"{listed} up (in nats, more is better); give --up={best}, or --up z to keep them")


# ------ What the models see ---------------------------------------------------------------------------------
def gallery(lines: list[dict], objects: Objects, count: int = 12) -> bytes:
    """View and cloud of the objects one should look at, evenly spaced over all of these.

    They are those that image and point name differently, and with labels those that are
    named wrongly. lines: of name_objects.
    """
    doubtful = []
    for i, line in enumerate(lines):
        is_wrong = line["class"] != line.get("true", line["class"])
        if is_wrong or line["agree"] == "no":
            doubtful.append(i)
    chosen = evenly_spaced(doubtful, count)
    shown = objects.pick(torch.tensor(chosen).long())

    cells = []
    for i, images in zip(chosen, fixed_images(shown, 6, 224, 1, "cpu")):
        line = lines[i]
        opinions = ("{object}\njoint: {class} {confidence}\nimage: {image} {image_confidence}\n"
                    "point: {point} {point_confidence}").format(**line)
        cells.append((images[0, 0], opinions))
        cells.append((objects.points[i], f"is {line['true']}" if "true" in line else ""))
    reason = "image and point disagree" if objects.labels is None else "named wrongly, or in two ways"
    title = f"{len(doubtful)} of {len(objects)} objects: {reason}"
    # Three objects a row.
    return draw_grid(cells, 6, title)


def preview(objects: Objects, size: int = 224, count: int = 8) -> bytes:
    """A sheet of objects: cloud, one evaluation view, weak and strong views."""
    # The same sheet each time.
    torch.manual_seed(0)
    shown = objects.pick(torch.tensor(evenly_spaced(range(len(objects)), count)))
    stills = [images[:, 0] for images in fixed_images(shown, None, size, count, "cpu")]
    one_batch = (torch.arange(len(shown)),)
    # None where views are rendered.
    photographs = next(iter(training_photographs(shown, one_batch, size, seed=0)))
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
    parser = option_parser("Accuracy, names and pictures of a checkpoint or a zero-shot start")

    add = parser.add_argument_group("what").add_argument
    add("--checkpoint", type=path_of, help="a last.pt of train.py, or the authors' trained file")
    add("--model", help=f"or a zero-shot start: {', '.join(STARTS)}, or an open_clip name, whose "
                        "point encoder is untrained")
    add("--pretrained", help="open_clip's weights of --model: a tag or a file")
    add("--start-checkpoint", type=path_of, help="the start's file, of any family")
    add("--templates", choices=sorted(TEMPLATES), help="texts around a class name of a start")
    add("--classes", help="other names for a start: \"a,b,c\", or a file with a name a line")
    add("--cache", type=path_of, default=Path("cache"), help="folder of fetched starts")
    add("--preview", type=path_of, help="FILE.png: only draw what the models see of --dataset")

    add = parser.add_argument_group("on (if not given: as it was trained)").add_argument
    add("files", nargs="*", type=path_of, help="single objects to name")
    add("--dataset", type=dataset_name, help=f"{', '.join(DATASETS)}, or a folder of your own")
    add("--split", choices=("train", "test"), default="test", help="which of its splits")
    add_data_options(add)
    add_device_options(add)
    # as_trained fills these two in, too.
    parser.set_defaults(data_root=None, precision=None)

    add = parser.add_argument_group("into").add_argument
    add("--predictions", type=path_of, help="FILE.csv: a name for each object, by each modality")
    add("--embeddings", type=path_of, help="FILE.npz: features, logits, classifier")
    add("--confusion", type=path_of, help="FILE.png: the confusion matrix")
    add("--gallery", type=path_of, help="FILE.png: objects named wrongly or in two ways")
    add("--json", type=path_of, help="FILE.json: all figures")
    return parser.parse_args(argv)


def main(argv=None) -> dict | None:
    """Evaluate student and teacher of a checkpoint, or a start.

    Writes what is asked for and prints the table. Returns the figures of each by name;
    None for --preview.
    """
    args = parse_args(argv)
    refuse_contradictions(args)
    path = args.checkpoint or args.start_checkpoint
    # A preview needs no start, but the small one, which is here, says how many points it takes.
    needs_start = not args.preview or args.model == "tiny"
    if args.model in STARTS and needs_start and not path:
        path = start_file(args.model, args.cache, args.download)
    saved = read_start(path) if path else {"options": {}, "architecture": {"class_names": []}}
    args = as_trained(args, saved["options"])
    objects = load_objects(args, saved["architecture"]["class_names"])
    title = f"{objects.name} {objects.split}, {len(objects)} objects"
    if args.preview:
        write_whole(args.preview, preview(objects))
        print(f"{args.preview} shows some of {title}")
        return None

    figures = {}
    for which in ("student", "teacher") if args.checkpoint else ("zero-shot",):
        model = load_model(which, args, path, objects.class_names)
        embedded = embed(model, objects, args.views)
        probs = to_probs(embedded)
        figures[which] = assess(probs, objects)
    # Names, embeddings and pictures are of the last of these: the teacher's, or the start's.
    lines = name_objects(objects, probs)
    results = {"dataset": objects.name, "split": objects.split, "objects": len(objects)}
    results |= {name.replace("-", "_"): of_model for name, of_model in figures.items()}

    # Files first, because whoever reads what is printed may close the pipe.
    write_files(args, results, objects, model, embedded, lines)
    if args.files:
        for line in lines:
            print("{object}: {class} {confidence} (image: {image} {image_confidence}, "
                  "point: {point} {point_confidence})".format(**line))
    else:
        print(table(title, figures, which))
    # Published data sets have a known axis, folders only where somebody said it.
    is_known = args.dataset in DATASETS or args.up
    hint = None if is_known else axis_hint(model, objects)
    if hint:
        print(f"note: {hint}", file=sys.stderr)
    return results


def refuse_contradictions(args):
    """Raises: UserError for options that do not go together."""
    is_start = args.start_checkpoint or args.model
    if args.checkpoint and (is_start or args.classes):
        raise UserError("--model, --start-checkpoint and --classes are of a start; drop these, or "
                        "--checkpoint: it only knows the classes it was trained for")
    if not (args.preview or args.checkpoint or is_start):
        raise UserError("nothing to evaluate; name a --checkpoint, or a start as --model")
    is_plain = args.model and args.model not in STARTS
    if args.model in STARTS and args.pretrained:
        raise UserError(f"--model {args.model} is one file; drop --pretrained")
    if is_plain and not (args.pretrained or args.preview):
        raise UserError(f"--model {args.model} without --pretrained is random; add the weights' tag "
                        "or file")


def as_trained(args, trained: dict) -> argparse.Namespace:
    """The options; those that the command line leaves open are as the model was trained.

    trained: the options of the checkpoint's or the start's file, empty where there is none.
    """
    chosen = argparse.Namespace(**vars(args))
    # Single files without a checkpoint, too, are read as those of `shapes`: its axis and points.
    chosen.dataset = args.dataset or trained.get("dataset", "shapes")
    chosen.model = args.model or trained.get("model")
    chosen.views = args.views or trained.get("views")
    usual_points = dataset_row(chosen.dataset)["points"]
    chosen.points = args.points or trained.get("points") or usual_points
    # These two are of the data set it was trained on.
    if chosen.dataset == trained.get("dataset"):
        chosen.domain = args.domain or trained.get("domain")
        chosen.up = args.up or trained.get("up")
    # These two only of a checkpoint: a start was perhaps made on another machine.
    of_checkpoint = trained if args.checkpoint else {}
    chosen.data_root = args.data_root or Path(of_checkpoint.get("data_root", "data"))
    chosen.precision = args.precision or of_checkpoint.get("precision", "auto")
    return chosen


def load_objects(args, trained_names: list[str]) -> Objects:
    """The files or the data set asked for, under the class names asked for."""
    if args.files:
        up = args.up or dataset_row(args.dataset)["up"]
        clouds = read_objects(args.files, args.points, args.points, up)
        names = [composed(str(path)) for path in args.files]
        # A start has no classes yet.
        classes = trained_names if args.checkpoint else []
        points = to_unit_sphere(torch.from_numpy(clouds), names)
        objects = Objects(points, None, classes, "files", names=names)
    else:
        objects = load_dataset(args.dataset, args.data_root, args.split, args.points, args.domain,
                               args.download, args.up, args.cache)
    if args.classes:
        # Not Path.is_file, which raises for a long list of names.
        is_file = os.path.isfile(args.classes)
        names = read_lines(Path(args.classes)) if is_file else args.classes.split(",")
        rename(objects, [name.strip() for name in names])

    if not (objects.class_names or args.preview):
        raise UserError("a start does not know which names to choose from; add --classes \"mug,bowl\"")
    if args.confusion and objects.labels is None:
        raise UserError("--confusion needs labels, of classes that are all among the names")
    if args.model == "tiny":
        warn_of_unknown_names(objects.class_names, MODELNET10)
    return objects


def rename(objects: Objects, names: list[str]):
    """Give the objects' classes other names. Labels stay where every true class is among them.

    Raises: UserError for names that clean_class_names refuses: empty or equal ones.
    """
    names = clean_class_names(names, "--classes")
    keys = [class_key(name) for name in names]
    keys_before = [class_key(name) for name in objects.class_names]
    # A label is an index: it goes where its name goes.
    if objects.labels is not None and set(keys_before) <= set(keys):
        index = torch.tensor([keys.index(key) for key in keys_before])
        objects.labels = index[objects.labels]
    else:
        objects.labels = None
    objects.class_names = names


def load_model(which: str, args, path: Path | None, class_names: list[str]) -> CrossMoST:
    """The "student" or "teacher" of a checkpoint, or the "zero-shot" start for the class names."""
    # A checkpoint holds its classifier, a start gets one from the texts of the class names.
    if args.checkpoint:
        model = load_checkpoint(path, which)
    else:
        templates = TEMPLATES[args.templates or dataset_row(args.dataset)["templates"]]
        model = build_model(args.model, class_names, templates, args.pretrained, path,
                            device=args.device)
    model.precision = precision_for(args.precision, args.device)
    return model.to(args.device)


def write_files(args, results: dict, objects: Objects, model: CrossMoST, embedded: dict,
                lines: list[dict]):
    """Write the files that are asked for. embedded, lines: of embed and name_objects."""
    files = {}
    if args.predictions:
        files[args.predictions] = predictions_csv(lines)
    if args.embeddings:
        files[args.embeddings] = embeddings_npz(embedded, model, objects)
    if args.confusion:
        title = f"{objects.name} {objects.split}, joint, % of a class"
        named = to_probs(embedded)["joint"].argmax(dim=-1)
        names = objects.class_names
        files[args.confusion] = plot_confusion(objects.labels, named, names, title)
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
