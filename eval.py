"""Accuracy, names and pictures: of a trained checkpoint, of a zero-shot start, of single files.

    python eval.py --checkpoint runs/shapes-tiny/last.pt                # on the data it was trained for
    python eval.py --model ulip2 --classes "mug,bowl,desk lamp" scans/*.ply
    python eval.py --dataset modelnet40 --preview sheet.png             # what the models see of a data set
"""
import argparse
import json
import os
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
from support.files import UP, class_key, clean_class_names, printable, read_lines, read_object, to_z_up
from support.information import information
from support.pictures import draw_grid, plot_confusion
from support.results import (MODALITIES, embeddings_npz, name_objects, predictions_csv, table,
                             warn_of_unknown_names)
from support.resume import CODE
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
    batches = []
    done = 0  # objects
    # disable=None: a bar only where a person looks on.
    bar = tqdm(total=len(objects), desc="evaluating", unit="object", leave=False, disable=None)
    with evaluation_mode(model), bar:
        for images in fixed_images(objects, views, size, batch_size, device):
            # Images come in parts of any size: photographs one object at a time.
            points = objects.points[done:done + len(images)].to(device)
            done += len(images)
            outputs = model(model.normalise(images), points)._asdict()
            # Nothing is hidden here, so that the fields of [mim] and [mpm] are None.
            present = {name: value for name, value in outputs.items() if value is not None}
            batches.append({name: value.cpu() for name, value in present.items()})
            bar.update(len(images))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def refuse_other_classes(model: CrossMoST, objects: Objects):
    """Raises: UserError where the model's classes are not the objects', in the same order."""
    named = list(model.class_names)
    # The authors' trained file has no class names: read_start numbers its classes.
    numbers = [str(k) for k in range(len(objects.class_names))]
    if named not in (list(objects.class_names), numbers):
        raise UserError(f"{objects.name} has the classes {objects.class_names[:4]} ..., the model "
                        f"{model.class_names[:4]} ...; evaluate a checkpoint on the data set it was "
                        "trained for, or give a start as --start-checkpoint")


@contextmanager
def evaluation_mode(model: torch.nn.Module):
    """Every module in eval mode, and afterwards each in its own mode again.

    A student's frozen modules are in eval mode while the rest trains (Deviation D12), so
    that `model.train()` at the end would be wrong.
    """
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


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
    random = np.random.default_rng(0)
    ready = [prepare(cloud, i, points, random) for i, cloud in enumerate(clouds)]

    probs = torch.empty(len(clouds), len(model.class_names))
    # Clouds of one size go through the model together.
    for size in {len(cloud) for cloud in ready}:
        index = [i for i, cloud in enumerate(ready) if len(cloud) == size]
        same_size = torch.stack([ready[i] for i in index])
        objects = Objects(same_size, None, model.class_names)
        probs[index] = to_probs(embed(model, objects, views))["joint"]
    return [model.class_names[k] for k in probs.argmax(dim=-1).tolist()], probs


def prepare(cloud, number: int, points: int, random: np.random.Generator) -> Tensor:
    """A user's cloud (P, 3) in the unit sphere, thinned to at most `points` points."""
    # float64, because coordinates on a map (UTM) need the digits.
    cloud = torch.as_tensor(cloud, dtype=torch.float64, device="cpu")
    if cloud.dim() != 2 or cloud.shape[1] != 3:
        raise UserError(f"cloud {number} has the shape {tuple(cloud.shape)}; expected a list of (points, 3)")
    if len(cloud) > points:
        cloud = cloud[random.choice(len(cloud), points, replace=False)]
    return to_unit_sphere(cloud[None], [number])[0].float()


# ------ What can be said without labels ---------------------------------------------------------------------
# In nats. Measured on thousands of folders that stood upright (assets/information.md): of
# those with 20 objects or more and several kinds of them, less than one in a hundred
# seemed to have another axis up.
CLEARLY_MORE = 0.2


def axis_hint(model: CrossMoST, objects: Objects, embed_all=embed) -> str | None:
    """What to say of objects that seem to have another axis up than they were read with.

    Compares how much image and point tell each other if z, y, or -y points up, on at most
    100 objects and two views of each. None: nothing seems wrong.
    objects: read as z up. embed_all: embed, or what shares it between processes.
    """
    # Fewer objects tell too little, and more than 100 only take longer.
    if len(objects) < 20:
        return None
    numbers = list(range(len(objects)))
    shown = objects.pick(torch.tensor(evenly_spaced(numbers, 100)))
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
    for i, images in zip(chosen, fixed_images(shown, 1, 224, 1, "cpu")):
        line = lines[i]
        opinions = ("{object}\njoint: {class} {confidence}\nimage: {image} {image_confidence}\n"
                    "point: {point} {point_confidence}").format(**line)
        cells.append((images[0, 0], opinions))
        cells.append((objects.points[i], f"is {line['true']}" if "true" in line else ""))
    why = "image and point disagree" if objects.labels is None else "named wrongly, or in two ways"
    return draw_grid(cells, 6, f"{len(doubtful)} of {len(objects)} objects: {why}")


def preview(objects: Objects, size: int = 224, count: int = 8) -> bytes:
    """A sheet of objects: cloud, one evaluation view, weak and strong views."""
    # The same sheet each time.
    torch.manual_seed(0)
    spaced = torch.linspace(0, len(objects) - 1, min(count, len(objects))).long()
    shown = objects.pick(spaced)
    stills = [images[:, 0] for images in fixed_images(shown, None, size, count, "cpu")]
    one_batch = (torch.arange(len(shown)),)
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
    parser = option_parser("accuracy, names and pictures of a checkpoint, a zero-shot start, single files")

    group = parser.add_argument_group("what").add_argument
    group("--checkpoint", type=path_of, help="a last.pt of train.py, or the authors' trained file")
    group("--model", help=f"or a zero-shot start: {', '.join(STARTS)}, or an open_clip name, whose "
                          "point encoder is untrained")
    group("--pretrained", help="open_clip's weights of --model: a tag or a file")
    group("--start-checkpoint", type=path_of, help="the start's file, of any family")
    group("--templates", choices=sorted(TEMPLATES), help="texts around a class name of a start")
    group("--classes", help="names for a start instead of the data set's: \"a,b,c\" or a file, a name a line")
    group("--cache", type=path_of, default=Path("cache"), help="folder of fetched starts")
    group("--preview", type=path_of, help="FILE.png: no model, only draw what the models see of --dataset")

    group = parser.add_argument_group("on (data, if not given: as the checkpoint was trained)").add_argument
    group("files", nargs="*", type=path_of, help="single objects to name")
    group("--dataset", type=dataset_name, help=f"{', '.join(DATASETS)}, or a folder of your own")
    group("--split", choices=("train", "test"), default="test", help="which of its splits")
    add_data_options(group)
    add_device_options(group)
    # as_trained fills these two in, too.
    parser.set_defaults(data_root=None, precision=None)

    group = parser.add_argument_group("into").add_argument
    group("--predictions", type=path_of, help="FILE.csv: each object's name, and those of image and point")
    group("--embeddings", type=path_of, help="FILE.npz: features, logits, classifier")
    group("--confusion", type=path_of, help="FILE.png: the confusion matrix")
    group("--gallery", type=path_of, help="FILE.png: objects named wrongly or in two ways")
    group("--json", type=path_of, help="FILE.json: all figures")
    return parser.parse_args(argv)


def main(argv=None) -> dict | None:
    """Evaluate student and teacher of a checkpoint, or a start.

    Writes what is asked for and prints the table. Returns the figures of each by name;
    None for --preview.
    """
    args = parse_args(argv)
    refuse_contradictions(args)
    path, saved = read_asked(args)
    chosen = as_trained(args, saved["options"])
    objects = load_objects(args, chosen, saved["architecture"]["class_names"])
    if args.preview:
        write_whole(args.preview, preview(objects))
        print(f"{args.preview} shows some of the {len(objects)} {objects.split} objects of {objects.name}")
        return None
    if args.confusion and objects.labels is None:
        raise UserError("--confusion needs labels, of classes that are all among the names")
    if chosen["model"] == "tiny":
        warn_of_unknown_names(objects.class_names, MODELNET10)

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

    # Files first, because whoever reads what is printed may close the pipe.
    if args.embeddings:
        write_whole(args.embeddings, embeddings_npz(embedded, model, objects))
    write_files(args, results, objects, probs, lines)
    if args.files:
        print_names(lines)
    else:
        print_figures(results, objects, which)
    # Published data sets have a known axis, folders only where somebody said it.
    is_unsaid = chosen["dataset"] not in DATASETS and chosen["up"] is None
    hint = axis_hint(model, objects) if is_unsaid and not args.files else None
    if hint:
        print(f"note: {hint}", file=sys.stderr)
    if len(objects) < len(args.files):
        raise UserError(f"only {len(objects)} of {len(args.files)} files could be read, see above")
    return results


def refuse_contradictions(args):
    """Raises: UserError for options that do not go together."""
    is_start = args.start_checkpoint or args.model
    if args.checkpoint and (is_start or args.classes):
        raise UserError("--model, --start-checkpoint and --classes are of a start; drop these, or "
                        "--checkpoint: it only knows the classes it was trained for")
    if not (args.preview or args.checkpoint or is_start):
        raise UserError("nothing to evaluate; name a --checkpoint, or a start as --model")
    if args.files and args.dataset:
        raise UserError("name single files or a --dataset, not both")
    is_plain = args.model and args.model not in STARTS
    if is_plain and not (args.pretrained or args.preview):
        raise UserError(f"--model {args.model} without --pretrained is random; add the weights' tag "
                        "or file")


def read_asked(args) -> tuple[Path | None, dict]:
    """The file of the checkpoint or start asked for, if it has one, and what the file holds."""
    path = args.checkpoint or args.start_checkpoint
    if args.model in STARTS and not (path or args.preview):
        path = start_file(args.model, args.cache, args.download)
    if path is None:
        return None, {"options": {}, "architecture": {"class_names": []}}
    saved = read_start(path)
    made_by = saved.get("identity", {}).get("code", CODE)
    if made_by != CODE:
        print(f"note: {path} was trained by other code ({made_by}, now {CODE}); figures may have "
              "changed", file=sys.stderr)
    return path, saved


def as_trained(args, trained: dict) -> dict:
    """Fill in what the command line leaves open: model, data set, how clouds are read, precision.

    `trained` holds the options of the checkpoint or start, or nothing where no file was
    given. From it come
    - always: model, data set, points, views;
    - only on the data set it was trained on: domain, up;
    - only of a checkpoint: data root and precision, because a start was perhaps made on
      another machine.
    Where neither the command line nor the file names a data set, it is `shapes`, for
    single files, too: they get its upright axis and its points.
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
        # A start has no classes yet.
        objects.class_names = trained_names if args.checkpoint else []
    else:
        objects = load_dataset(chosen["dataset"], chosen["data_root"], args.split, chosen["points"],
                               chosen["domain"], args.download, chosen["up"], args.cache)
    if args.classes:
        # Not Path.is_file, which raises for a long list of names.
        is_file = os.path.isfile(args.classes)
        names = read_lines(Path(args.classes)) if is_file else args.classes.split(",")
        rename(objects, [name.strip() for name in names])
    if not (objects.class_names or args.preview):
        raise UserError("a start names files by --classes \"mug,bowl,...\"; add it")
    return objects


def load_files(files: list[Path], points: int, up: str) -> Objects:
    """Single objects without labels. Of each file that cannot be read a line on stderr says why."""
    clouds, names = [], []
    # One by one, because a broken file should not keep the others from being named.
    for path in files:
        try:
            cloud = torch.from_numpy(read_object(path, points, up=up))
            clouds.append(to_unit_sphere(cloud[None], [path]))
            names.append(printable(str(path)))
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
    if not clouds:
        raise UserError(f"none of {len(files)} files could be read")
    return Objects(torch.cat(clouds), None, [], "files", names=names)


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


def load_model(which: str, args, chosen: dict, path: Path | None, class_names: list[str]) -> CrossMoST:
    """The "student" or "teacher" of a checkpoint, or the "zero_shot" start for the class names."""
    # A checkpoint holds its classifier, a start gets one from the texts of the class names.
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
    # All are made before the first is written, so that an error leaves none of them.
    for path, content in files.items():
        write_whole(path, content)
        print(f"{path} is written", file=sys.stderr)


def print_names(lines: list[dict]):
    """Print what each single file was named. lines: of name_objects."""
    for line in lines:
        print("{object}: {class} {confidence} (image: {image} {image_confidence}, "
              "point: {point} {point_confidence})".format(**line))


def print_figures(results: dict, objects: Objects, which: str):
    """Print the closing table, with every class of the model `which`."""
    title = f"{objects.name} {objects.split}, {len(objects)} objects"
    of_models = {name: figures for name, figures in results.items() if isinstance(figures, dict)}
    rows = {name.replace("_", "-"): figures for name, figures in of_models.items()}
    print(table(title, rows, which.replace("_", "-")))


if __name__ == "__main__":
    with one_line_errors():
        main()
