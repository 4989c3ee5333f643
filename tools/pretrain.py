"""Make a start: align a Point-BERT with a CLIP, as ULIP does [pretrain] (arXiv 2212.05171).

    OMP_NUM_THREADS=1 python -m tools.pretrain --into tiny.pt    # as assets/tiny.pt, a quarter of an hour
    CLIP="--model ViT-B-16-quickgelu --pretrained openai"
    python -m tools.pretrain $CLIP --dataset modelnet40 --into clip.pt
    python -m tools.pretrain $CLIP --dataset shapenet55 --epochs 300 --into ulip.pt

`tiny`: all three towers are trained, on procedural objects and their names. Any other model is a CLIP of
open_clip's: its towers are frozen, and only the point encoder beside it is trained. It sees procedural
objects with names, and the clouds of --dataset without names; or those of shapenet55 with their names, and
nothing else. The file holds all three towers: train.py and eval.py take it as --start-checkpoint.

shapenet55 is Point-BERT's ShapeNet-55: data/ShapeNet-55/{train,test}.txt and data/shapenet_pc/*.npy, by hand
after the form at https://huggingface.co/datasets/ShapeNet/ShapeNetCore.

Another CPU or number of threads rounds differently, which training amplifies: expect a slightly different
start. Until it is done FILE.last.pt lies beside FILE.pt, from which the same command goes on.
"""
import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from data import (DATASETS, Objects, dataset_row, draw_views, load_dataset, random_yaw, sample_shapes,
                  to_unit_sphere)
from losses import cross_modal_alignment_loss, masked_terms, name_alignment_loss
from model import (TEMPLATES, embed_names, hide_groups, hide_patches, open_clip_start, precision_for,
                   random_tiny, unit_norm)
from support import UserError
from support.command_line import (COUNT, add_data_options, add_device_options, number, one_line_errors,
                                  option_parser, plain_options)
from support.files import read_lines, read_objects, reading
from support.provenance import provenance
from support.resume import CODE_OF_STARTS, identity_of
from support.starts import STARTS, read_file, save_file, save_start

# Of `tiny`, and of a point encoder beside a CLIP (whose batch, learning rate and weight decay are ULIP's).
RECIPES = {
    "tiny": dict(objects=12000, epochs=10, batch_size=32, lr=1e-3, weight_decay=0.05, points=1024, views=12,
                 precision="fp32"),
    "clip": dict(objects=4000, epochs=12, batch_size=64, lr=5e-4, weight_decay=0.1),
}
SAVE_EVERY = 60  # seconds between two saves, at the ends of epochs
# Options with which an interrupted making may go on changed.
NO_EFFECT_ON_START = ("into", "data_root", "download", "device")


def parse_args(argv=None) -> argparse.Namespace:
    """All options; what the line leaves open follows from the model and the data set."""
    parser = option_parser("make a start: align a Point-BERT with a CLIP, as ULIP does")
    add = parser.add_argument
    add("--into", type=Path, required=True, help="FILE.pt, which must not be there yet")
    add("--model", default="tiny", help="tiny, or the open_clip name of a CLIP")
    add("--pretrained", help="open_clip's weights of --model: a tag or a file")
    add("--dataset", default="shapes", help=f"{', '.join(DATASETS)}, shapenet55, or a folder of your own")
    add_data_options(add)
    add("--templates", choices=sorted(TEMPLATES), help="texts around a class name")
    add("--groups", type=COUNT, help="point groups per cloud")
    add("--group-size", type=COUNT, help="points per group")
    add("--epochs", type=COUNT, help="passes over the objects")
    add("--seed", type=number(0, 2 ** 32, int), default=0, help="of weights, objects and views")
    add_device_options(add)

    # --help, which needs no --into, comes second: it shows the defaults of what was asked.
    argv = sys.argv[1:] if argv is None else argv
    words = [word for word in argv if word not in ("-h", "--help")]
    asked = parser.parse_args([*words, "--into", "any.pt"])
    of_data = SHAPENET55_ROW if asked.dataset == "shapenet55" else dataset_row(asked.dataset)
    recipe = {**of_data, **STARTS.get(asked.model, STARTS["crossmost"]), **recipe_of(asked.model)}
    parser.set_defaults(**{option: value for option, value in recipe.items() if option in asked})
    return parser.parse_args(argv)


def recipe_of(model: str) -> dict:
    """The row of RECIPES for a --model."""
    return RECIPES["tiny" if model == "tiny" else "clip"]


def main(argv=None):
    """Train a start into a file. Labels of the data set that it is for are never used."""
    args = parse_args(argv)
    if args.into.exists():
        raise UserError(f"{args.into} is there already; name another --into, or remove it")
    if args.model in STARTS and args.model != "tiny":
        raise UserError(f"{args.model} is a finished start; --model takes tiny, or a CLIP's name")

    objects = objects_to_see(args)
    model, text = untrained(args, objects.class_names)
    last_path = args.into.with_suffix(".last.pt")
    align(model, text, objects, args, last_path)

    model.classifier = None
    made_by = {"code": CODE_OF_STARTS, **provenance(args.device)}
    save_start(model, text, plain_options(args) | made_by, args.into)
    last_path.unlink(missing_ok=True)
    print(f"the start is {args.into}; give it as --start-checkpoint")


def objects_to_see(args) -> Objects:
    """The objects that a start is trained on; the label -1 says that one has no name."""
    if args.dataset == "shapenet55":
        return load_shapenet55(args.data_root, args.points)
    count = recipe_of(args.model)["objects"]
    named = sample_shapes(count, seed=1000 + args.seed, points=args.points)
    if args.model == "tiny":
        return named

    target = load_dataset(args.dataset, args.data_root, "train", args.points, args.domain,
                          args.download, args.up)
    clouds = torch.cat([named.points, target.points])
    labels = torch.cat([named.labels, torch.full((len(target),), -1)])
    return Objects(clouds, labels, named.class_names)


def untrained(args, class_names: list[str]) -> tuple:
    """The model, and its text tower. Beside a CLIP the point encoder alone will be trained."""
    point = {"groups": args.groups, "group_size": args.group_size}
    if args.model == "tiny":
        model, text = random_tiny(args.seed, **point)
    else:
        model, text = open_clip_start(args.model, args.pretrained, args.seed, **point)
        names = embed_names(text.to(args.device), class_names, TEMPLATES[args.templates])
        model.set_classifier(names, class_names)
        model.visual.requires_grad_(False).eval()
    model.precision = precision_for(args.precision, args.device)
    return model.to(args.device), text.to(args.device)


def align(model, text, objects: Objects, args, last_path: Path):
    """Train the model, and `tiny`'s text tower; go on from the last saved epoch if there is one."""
    recipe = recipe_of(args.model)
    steps_per_epoch = len(objects) // recipe["batch_size"]
    total_steps = args.epochs * steps_per_epoch
    # A CLIP's towers need no gradient.
    parameters = [p for p in (*model.parameters(), *text.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, recipe["lr"], betas=(0.9, 0.98),
                                  weight_decay=recipe["weight_decay"], fused=True)
    schedule = OneCycleLR(optimizer, recipe["lr"], total_steps, pct_start=0.05,
                          cycle_momentum=False)

    parts = {"model": model, "text": text, "optimizer": optimizer, "schedule": schedule}
    made_by = identity_of(plain_options(args), NO_EFFECT_ON_START, objects, model.precision)
    made_by["code"] = CODE_OF_STARTS
    first = go_on(parts, last_path, made_by)
    bar = tqdm(total=total_steps, initial=first * steps_per_epoch,
               desc=f"pre-training {args.model}", unit="step")
    trained_text = text if args.model == "tiny" else None
    last_save = time.perf_counter()
    for epoch in range(first, args.epochs):
        torch.manual_seed(args.seed * 100_003 + epoch)
        losses = []
        batches = torch.randperm(len(objects)).split(recipe["batch_size"])
        for index in batches[:steps_per_epoch]:
            points = objects.points[index].to(args.device)
            labels = objects.labels[index]
            loss = pretrain_loss(model, trained_text, points, labels, objects.class_names)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            bar.update()

        # Once per epoch, because reading a value waits for a GPU.
        mean = torch.stack(losses).mean().item()
        bar.set_postfix(loss=f"{mean:.3f}")
        if not math.isfinite(mean):
            raise UserError(f"the loss of pre-training is not finite at step {bar.n}; look at "
                            "the data")
        if time.perf_counter() - last_save > SAVE_EVERY:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_file({**states, "epochs": epoch + 1, "made_by": made_by}, last_path)
            last_save = time.perf_counter()
    bar.close()


def go_on(parts: dict, last_path: Path, made_by: dict) -> int:
    """Go back to the last saved epoch. Returns how many are done, 0 where none is saved."""
    if not last_path.exists():
        return 0
    saved = read_file(last_path)
    if saved.get("made_by") != made_by:
        raise UserError(f"{last_path} was begun with other options, data or code; remove it to "
                        "begin anew, or name another --into")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["epochs"]


def pretrain_loss(model, text, points, labels, class_names) -> Tensor:
    """Half the sum of three InfoNCEs (point-image, image-text, point-text), and masked modelling [pretrain].

    points: (B, P, 3). labels: (B,) on the CPU, index into class_names, -1 where there is no name.
    text: the text tower to train. Without it the image tower and the names (the classifier's columns) stay
    fixed, so there is no image-text term.
    """
    batch, device = len(points), points.device

    # In each modality a random half of the objects is seen strongly augmented.
    views = draw_views(random_yaw(points), model.visual.image_size[0])
    use_strong = torch.rand(2, batch, 1, 1, device=device) < 0.5
    strong_image, strong_points = use_strong[0].unsqueeze(-1), use_strong[1]  # (B, 1, 1, 1), (B, 1, 1)
    images = model.normalise(torch.where(strong_image, views["strong_image"], views["weak_image"]))
    groups = model.group(torch.where(strong_points, views["strong_points"], views["weak_points"]))

    # In each modality a random quarter of the objects is masked: 30 % of the patches (only where the image
    # tower trains), 30 to 40 % of the groups.
    is_masked = torch.rand(2, batch, 1, device=device) < 0.25
    image_hidden = None
    if text is not None:
        image_hidden = hide_patches(batch, model.visual.grid_size[0], 0.3, device) & is_masked[0]
    point_hidden = hide_groups(groups.centres, 0.3) & is_masked[1]
    out = model(images, groups, image_hidden, point_hidden)

    scale = model.logit_scale.exp()
    alignment = cross_modal_alignment_loss(out.image_features, out.point_features, 1 / scale) / 2

    # The rows that have a name are found on the CPU, because nonzero() would wait for a GPU.
    rows = (labels >= 0).nonzero()[:, 0]
    row_labels, rows = labels[rows].to(device), rows.to(device)
    if text is not None:
        template = TEMPLATES["depth"][torch.randint(len(TEMPLATES["depth"]), ())]
        # Not text(texts), which rounds otherwise: tiny.pt was made with the whole tower.
        tokens = text.tokenize([template.format(name) for name in class_names]).to(device)
        names = unit_norm(text.tower(tokens))
        alignment = alignment + name_alignment_loss(out.image_features[rows], names, row_labels, scale)
    else:
        names = model.classifier.detach().T
    if len(rows):
        alignment = alignment + name_alignment_loss(out.point_features[rows], names, row_labels, scale)

    terms = masked_terms(out, images, image_hidden, point_hidden)
    weights = {"mim": 0.1, "mpm": 0.1, "gl_image": 0.02, "gl_point": 0.02}
    return alignment / 2 + sum(weights[name] * term for name, term in terms.items())


# ------ ShapeNet-55 -----------------------------------------------------------------------------------------
# Its classes in the order of the labels: WordNet number -> name.
SHAPENET55 = {
    "02691156": "airplane", "02747177": "trash bin", "02773838": "bag", "02801938": "basket",
    "02808440": "bathtub", "02818832": "bed", "02828884": "bench", "02843684": "birdhouse",
    "02871439": "bookshelf", "02876657": "bottle", "02880940": "bowl", "02924116": "bus",
    "02933112": "cabinet", "02942699": "camera", "02946921": "can", "02954340": "cap", "02958343": "car",
    "02992529": "cell phone", "03001627": "chair", "03046257": "clock", "03085013": "keyboard",
    "03207941": "dishwasher", "03211117": "display", "03261776": "earphone", "03325088": "faucet",
    "03337140": "file cabinet", "03467517": "guitar", "03513137": "helmet", "03593526": "jar",
    "03624134": "knife", "03636649": "lamp", "03642806": "laptop", "03691459": "loudspeaker",
    "03710193": "mailbox", "03759954": "microphone", "03761084": "microwave", "03790512": "motorbike",
    "03797390": "mug", "03928116": "piano", "03938244": "pillow", "03948459": "pistol",
    "03991062": "flowerpot", "04004475": "printer", "04074963": "remote control", "04090263": "rifle",
    "04099429": "rocket", "04225987": "skateboard", "04256520": "sofa", "04330267": "stove",
    "04379243": "table", "04401088": "telephone", "04460130": "tower", "04468005": "train",
    "04530566": "watercraft", "04554684": "washer"}
SHAPENET55_ROW = dict(points=8192, templates="3d", up="y")


def load_shapenet55(root: Path, points: int) -> Objects:
    """The training objects of Point-BERT's ShapeNet-55: ShapeNet-55/train.txt and shapenet_pc/*.npy."""
    listed = root / "ShapeNet-55" / "train.txt"
    names = read_lines(listed, "needs ShapeNet's form: https://huggingface.co/datasets/ShapeNet/ShapeNetCore")
    label_of = {synset: label for label, synset in enumerate(SHAPENET55)}
    with reading(listed, "expected names that begin with the WordNet number of one of the 55 classes"):
        labels = [label_of[name.split("-")[0]] for name in names]
    clouds = read_objects([root / "shapenet_pc" / name for name in names], points, points, "y")
    clouds = to_unit_sphere(torch.from_numpy(clouds), names)
    return Objects(clouds, labels, list(SHAPENET55.values()), "shapenet55", names=names)


if __name__ == "__main__":
    with one_line_errors():
        main()
