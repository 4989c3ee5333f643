"""Objects to learn from: depth views, weak and strong views, photographs, data sets.

Coordinates are right-handed, z up, float32. Every cloud is centred and scaled into the
unit sphere. Angles are in radians. N objects, B batch, P points, V views.
"""
import math
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from support import UserError
from support.fetch import fetch, unpack
from support.files import (find_photographs, mostly_photographed, read_folder, read_objects,
                           read_photograph, to_z_up)
from support.furniture import PROGRAMS, rotate_about_xyz, sample_furniture
from support.published import (CO3D, REDWOOD, SCANOBJECTNN, find_co3d, find_redwood, read_h5,
                               read_modelnet_h5, read_resampled)
from support.workers import in_workers


@dataclass
class Objects:
    """A split of a data set: N clouds of P points, and what is known of each object.

    points: (N, P, 3) float32, cast from any numbers. A loader may give the list of the N
        files instead.
    labels: (N,) int64 numbers of the true classes, cast too, or None.
    names: what the objects are called. Without names they are called by their numbers.
    images: for each object the list of its photographs. None: depth views are rendered.
    """

    points: Tensor
    labels: Tensor | None
    class_names: list[str]
    name: str = ""
    split: str = "train"
    names: list[str] | None = None
    images: list | None = None

    def __post_init__(self):
        is_list = isinstance(self.points, list)
        are_files = is_list and all(isinstance(one, Path) for one in self.points)
        if not are_files:
            # By way of NumPy, which is fast with lists of arrays.
            if is_list:
                self.points = np.asarray(self.points)
            self.points = torch.as_tensor(self.points, dtype=torch.float32)
        if self.labels is not None:
            self.labels = torch.as_tensor(self.labels, dtype=torch.int64)
        self.names = self.names or [str(i) for i in range(len(self.points))]

    def __len__(self):
        return len(self.points)

    def pick(self, index: Tensor) -> "Objects":
        """The objects of these numbers (n,), in this order."""
        return replace(
            self,
            points=self.points[index],
            labels=None if self.labels is None else self.labels[index],
            names=[self.names[i] for i in index],
            images=self.images and [self.images[i] for i in index],
        )


def to_unit_sphere(points: Tensor, names: list | None = None, up: str = "z") -> Tensor:
    """Turn clouds upright, centre each on its mean, scale its farthest point to norm 1.

    points (N, P, 3) -> a new tensor (N, P, 3) float32. up: the axis that points upwards
    in `points` (see UP of support/files.py). names: of the objects, for messages.
    Raises: UserError naming an object whose coordinates are not finite, or all the same.
    """
    names = names or range(len(points))
    unit = torch.empty(points.shape, device=points.device)
    # In parts, because a large set is in memory twice here, and three times is too much.
    for start in range(0, len(points), 64):
        part = to_z_up(points[start:start + 64], up)
        refuse_degenerate(part, names[start:start + 64])
        # Centred before it becomes float32, which lacks the digits of places on a map.
        part = part - part.mean(dim=1, keepdim=True)
        radius = part.norm(dim=-1).amax(dim=1)
        unit[start:start + 64] = part / radius[:, None, None]
    return unit


def refuse_degenerate(points: Tensor, names):
    """Raises: UserError for clouds (N, P, 3) that are not finite, or have no extent."""
    low, high = points.aminmax(dim=1)  # (N, 3), NaN where a coordinate is
    is_finite = (low.isfinite() & high.isfinite()).all(dim=1)
    is_point = (low == high).all(dim=1)
    problems = {"NaN or infinite coordinates": ~is_finite, "all its points in one place": is_point}
    for problem, has_problem in problems.items():
        if has_problem.any():
            name = names[has_problem.int().argmax().item()]
            raise UserError(f"object {name} has {problem}; repair or remove its file")


# ------ Depth views -----------------------------------------------------------------------------------------
@torch.no_grad()
def render_depth_views(points: Tensor, azimuths: Tensor, elevations: Tensor, size: int) -> Tensor:
    """Depth maps of clouds, in PointCLIP V2's recipe: quantise, densify, smooth, squeeze
    (arXiv 2211.11682).

    points (B, P, 3) in the unit sphere, z up; azimuths, elevations (B, V) or (1, V).
    Returns (B, V, 3, size, size) without gradient: near = 1, far = 0.2, background = 0.
    """
    # At most 1.6 sqrt(P) cells a side, because a surface has holes in a finer grid.
    grid = min(size, int(1.6 * points.shape[1] ** 0.5))
    image = quantise(points, azimuths, elevations, grid)
    image = smooth(densify(image))
    if grid != size:
        image = F.interpolate(image.unsqueeze(1), (size, size), mode="bilinear", align_corners=False)

    views = azimuths.shape[1]
    image = image.clamp(0, 1).view(len(points), views, 1, size, size)
    # The channels of CLIP's images are equal here.
    return image.expand(-1, -1, 3, -1, -1)


def quantise(points: Tensor, azimuths: Tensor, elevations: Tensor, grid: int) -> Tensor:
    """The brightness of the nearest point in each cell. -> (B * V, grid, grid), 0 where none is"""
    right, up, towards = project(points, azimuths, elevations)
    # 0.48 instead of 0.5 leaves a thin margin around the unit sphere.
    column = ((right * 0.48 + 0.5) * grid).long().clamp(0, grid - 1)
    row = ((0.5 - up * 0.48) * grid).long().clamp(0, grid - 1)
    brightness = 0.6 + 0.4 * towards.clamp(-1, 1)

    views = azimuths.shape[1]
    image = points.new_zeros(len(points), views, grid * grid)
    image = image.scatter_reduce(2, row * grid + column, brightness, "amax")
    return image.view(-1, grid, grid)


def project(points: Tensor, azimuths: Tensor, elevations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthographic camera coordinates of clouds: to the right, up, and towards the camera.

    points (B, P, 3); azimuths, elevations (B, V) say where the camera stands. Azimuth 0
    is at -y and looks along +y. Returns three tensors (B, V, P).
    """
    x, y, z = points.unsqueeze(1).unbind(-1)  # each (B, 1, P)
    sin_a, cos_a = azimuths.sin().unsqueeze(-1), azimuths.cos().unsqueeze(-1)
    sin_e, cos_e = elevations.sin().unsqueeze(-1), elevations.cos().unsqueeze(-1)

    # The azimuth turns about z, then the elevation about the axis to the right.
    right = cos_a * x + sin_a * y
    away = cos_a * y - sin_a * x
    up = cos_e * z + sin_e * away
    towards = sin_e * z - cos_e * away
    return right, up, towards


def densify(image: Tensor) -> Tensor:
    """Fill holes of up to four cells by a closing; the object stays one cell wider. (n, H, W)"""
    # One axis after the other: on a CPU two 1-D pools are much faster than a 2-D one.
    for _ in range(2):
        padded = F.pad(image, (2, 2))
        image = F.max_pool1d(padded, 5, 1).transpose(1, 2)
    # The least of three cells is the greatest of their negatives.
    for _ in range(2):
        padded = F.pad(-image, (1, 1))
        image = -F.max_pool1d(padded, 3, 1).transpose(1, 2)
    return image


def smooth(image: Tensor) -> Tensor:
    """Convolve with a Gaussian (1/4, 1/2, 1/4) along either axis. (n, H, W)"""
    for _ in range(2):
        padded = F.pad(image, (1, 1))
        before, after = padded[..., :-2], padded[..., 2:]
        image = (0.25 * before + 0.5 * image + 0.25 * after).transpose(1, 2)
    return image


def fixed_views(points: Tensor, views: int, size: int) -> Tensor:
    """Evaluation's views: azimuths evenly around, elevation 0.4. -> (B, V, 3, size, size)"""
    # Half a step on, so that no view is exactly from the front.
    steps = torch.arange(views, device=points.device)[None] + 0.5  # (1, V)
    azimuths = steps * (2 * math.pi / views)
    return render_depth_views(points, azimuths, torch.full_like(azimuths, 0.4), size)


def random_view(points: Tensor, size: int) -> Tensor:
    """One view of each object from around it, slightly below to well above. -> (B, 3, size, size)"""
    count, device = len(points), points.device
    azimuths = torch.rand(count, 1, device=device) * (2 * math.pi)
    elevations = torch.rand(count, 1, device=device) * 1.1 - 0.1
    return render_depth_views(points, azimuths, elevations, size)[:, 0]


# ------ Weak and strong views -------------------------------------------------------------------------------
# Drawn anew for each object, on the device the objects are on. Inputs are left untouched.
def draw_views(points: Tensor, size: int, photographs: tuple | None = None) -> dict[str, Tensor]:
    """Weak [joint-label] and strong views [self-training] of clouds (B, P, 3) for one step.

    Images (B, 3, size, size) are `photographs`, a pair of training_photographs, or else two
    crops of one random depth view. Strong clouds have as many points as weak ones
    (Deviation D7).
    """
    if photographs is None:
        weak, strong = depth_crops(points, size)
    else:
        weak, strong = (images.to(points.device, non_blocking=True) for images in photographs)
    # The weak cloud first, because the order of the random draws decides a run.
    return {"weak_image": weak, "strong_image": strong,
            "weak_points": weak_points(points), "strong_points": strong_points(points)}


def depth_crops(points: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The weak and the strong crop of one random depth view of each cloud: (B, 3, size, size).

    Deviation D22: a depth map has no colours for the original's RandAugment, and its
    smaller crops would lose the object. The weak crop is scaled a little, too.
    """
    image = random_view(points, size)
    # The three channels of a depth view are equal, so that one crop does for them.
    grey = image[:, :1]
    weak = random_crop(grey, 0.85, aspect=1, flip=0)
    strong = random_crop(grey, 0.6, aspect=4 / 3, flip=0.5)
    return weak.expand_as(image), strong.expand_as(image)


def random_crop(images: Tensor, smallest: float, aspect: float, flip: float) -> Tensor:
    """Random resized crops, mirrored with probability `flip`. (B, channels, H, W) -> the same

    The share of the area is U(smallest, 1). The aspect ratio is aspect^U(-1, 1).
    """
    count, device = len(images), images.device

    def signed() -> Tensor:
        return 2 * torch.rand(count, device=device) - 1

    area = smallest + (1 - smallest) * torch.rand(count, device=device)
    ratio = torch.exp(signed() * math.log(aspect))
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    # affine_grid's coordinates: the image is -1 to 1, and x, y is the middle of the crop.
    x = (1 - width) * signed()
    y = (1 - height) * signed()
    mirror = torch.where(torch.rand(count, device=device) < flip, -1.0, 1.0)

    zero = torch.zeros_like(width)
    rows = torch.stack([width * mirror, zero, x, zero, height, y], dim=-1)
    grid = F.affine_grid(rows.view(count, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def weak_points(points: Tensor) -> Tensor:
    """Weak clouds [joint-label]: scaled by U(0.9, 1.1), turned a little about all axes. (B, P, 3)"""
    count, device = len(points), points.device
    # Clipped at three sigma, 10 degrees.
    angles = (0.06 * torch.randn(count, 3, device=device)).clamp(-0.18, 0.18)
    scale = 0.9 + 0.2 * torch.rand(count, 1, 1, device=device)
    return rotate_about_xyz(points, angles) * scale


def strong_points(points: Tensor) -> Tensor:
    """Strong clouds [self-training]: any yaw, scaled by U(0.5, 2), shifted by U(-0.5, 0.5) of
    their extent, jitter of sigma 0.01 (at most 0.05), and a share U(0, 0.875) of the
    points dropped. (B, P, 3) -> (B, P, 3)

    Deviation D6: the original's crop never acts and is left out.
    """
    count, device = len(points), points.device
    points = random_yaw(points) * (0.5 + 1.5 * torch.rand(count, 1, 1, device=device))
    low, high = points.aminmax(dim=1, keepdim=True)
    shift = torch.rand(count, 1, 3, device=device) - 0.5
    points = points + (high - low) * shift
    jitter = 0.01 * torch.randn(points.shape, device=device)
    points = points + jitter.clamp(-0.05, 0.05)

    # A dropped point becomes the cloud's first, so that P stays.
    chance = torch.rand(count, points.shape[1], 1, device=device)
    share = 0.875 * torch.rand(count, 1, 1, device=device)
    return torch.where(chance < share, points[:, :1], points)


def random_yaw(points: Tensor) -> Tensor:
    """Rotate each cloud about the upright axis by any angle. (B, P, 3) -> (B, P, 3)"""
    count, device = len(points), points.device
    angles = torch.zeros(count, 3, device=device)
    angles[:, 2] = 2 * math.pi * torch.rand(count, device=device)
    return rotate_about_xyz(points, angles)


# ------ Photographs -----------------------------------------------------------------------------------------
class TrainingPhotographs(Dataset):
    """Item i: the weak and the strong image (3, size, size) of object i, as arrays.

    They are of one of its photographs, in bytes: a random crop [joint-label], and a crop of 0.3
    to 1, flip, RandAugment [self-training]. An object without photographs has the crops of a
    depth view, in floats.
    """

    def __init__(self, objects: Objects, size: int, seed: int):
        # Imported here: depth views do not need torchvision's 160 MB and its second.
        from torchvision.transforms import v2
        self.objects, self.size, self.seed = objects, size, seed
        bicubic = v2.InterpolationMode.BICUBIC
        self.weak = v2.Compose([v2.Resize(size, bicubic), v2.RandomCrop(size)])
        self.strong = v2.Compose([
            v2.RandomResizedCrop(size, (0.3, 1.0), interpolation=bicubic),
            v2.RandomHorizontalFlip(),
            # Deviation D22: torchvision's magnitude 9 turns by 9 degrees, the original's by 27.
            v2.RandAugment(2, 9),
        ])

    def __getitem__(self, i: int) -> list[np.ndarray]:
        # A seed of its own for each object, so that a resumed run draws the same views.
        # torch takes seeds below 2^64.
        torch.manual_seed((self.seed * 1_000_003 + i) % 2 ** 64)
        paths = self.objects.images[i]
        if not paths:
            weak, strong = depth_crops(self.objects.points[i:i + 1], self.size)
            return [weak[0].numpy(), strong[0].numpy()]
        image = read_photograph(paths[torch.randint(len(paths), ())])
        return [self.weak(image).numpy(), self.strong(image).numpy()]


class EvaluationPhotographs(Dataset):
    """Item i: the fixed images (V, 3, size, size) of object i, as an array.

    They are centre crops of all its photographs, or of `views` evenly spaced ones, in bytes. An
    object without photographs has `views` depth views, 6 by default, in floats.
    """

    def __init__(self, objects: Objects, size: int, views: int | None):
        from torchvision.transforms import v2
        self.objects, self.size, self.views = objects, size, views
        bicubic = v2.InterpolationMode.BICUBIC
        self.crop = v2.Compose([v2.Resize(size, bicubic), v2.CenterCrop(size)])

    def __getitem__(self, i: int) -> np.ndarray:
        paths = self.objects.images[i]
        if not paths:
            points = self.objects.points[i:i + 1]
            return fixed_views(points, self.views or 6, self.size)[0].numpy()
        chosen = evenly_spaced(paths, self.views or len(paths))
        return np.stack([self.crop(read_photograph(path)).numpy() for path in chosen])


def evenly_spaced(items: list, count: int) -> list:
    """`count` evenly spaced items with the first and the last; all if there are no more."""
    chosen = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[k] for k in chosen]


def to_unit_range(image: np.ndarray) -> Tensor:
    """Bytes as floats in [0, 1], as torchvision's ToDtype scales them; floats stay."""
    image = torch.from_numpy(image)
    return image if image.is_floating_point() else image.float().mul_(1 / 255)


def training_photographs(objects: Objects, batches: list[Tensor], size: int, seed: int):
    """For each batch of indices its weak and strong images, or None where views are rendered."""
    if objects.images is None:
        yield from [None] * len(batches)
        return
    indices = torch.cat(tuple(batches)).tolist()
    pairs = in_workers(TrainingPhotographs(objects, size, seed), indices, ahead=16)
    # Workers end at once, also where training is interrupted.
    with closing(pairs):
        for batch in batches:
            weak, strong = zip(*[next(pairs) for _ in batch])
            yield (torch.stack([to_unit_range(image) for image in weak]),
                   torch.stack([to_unit_range(image) for image in strong]))


def fixed_images(objects: Objects, views: int | None, size: int, batch_size: int, device):
    """Evaluation's images of all objects in order, in parts (b, V, 3, size, size).

    With photographs: all of an object's, or at most `views` of them, one object a part.
    Without: `views` depth views of each object, 6 by default (Deviation D15).
    """
    if objects.images is None:
        for points in objects.points.split(batch_size):
            yield fixed_views(points.to(device), views or 6, size)
        return
    stills = EvaluationPhotographs(objects, size, views)
    for images in in_workers(stills, list(range(len(objects)))):
        yield to_unit_range(images)[None].to(device)


# ------ Data sets -------------------------------------------------------------------------------------------
# A loader takes (root, split, points, download, cache) and returns Objects as they lie in the
# files: `points` are clouds (N, P, 3), at least as large as asked for if there are such, or the list
# of N files. It may fetch what is missing if `download`, and write to the folder `cache`.

# In the order of the labels.
MODELNET10 = (
    "bathtub", "bed", "chair", "desk", "dresser", "monitor", "night stand", "sofa", "table", "toilet")


def load_modelnet(root: Path, split: str, points: int, download: bool, cache: Path, classes=None,
                  depth_only=False) -> Objects:
    """ModelNet40, or some of its classes.

    More than 2,048 points come from `modelnet40_normal_resampled`, as in the original,
    fewer from the official h5 files. Pictures are those in a `views` folder inside either.
    Deviation D24: without them depth views are rendered, where the original has shaded
    pictures. depth_only: the original's "ModelNet40-depth", of h5 files without pictures.
    """
    is_resampled = points > 2048 and not depth_only
    folder = root / ("modelnet40_normal_resampled" if is_resampled else "modelnet40_ply_hdf5_2048")
    if not folder.exists():
        unpack(fetch("modelnet40-8192" if is_resampled else "modelnet40", root, download), folder)
    read = partial(read_resampled, cache=cache) if is_resampled else read_modelnet_h5
    objects = Objects(**read(folder, split))
    if classes is not None:
        objects = only_classes(objects, classes)
    if not depth_only:
        objects.images = find_photographs(folder / "views", objects.names)
    return objects


def only_classes(objects: Objects, classes: tuple[str, ...]) -> Objects:
    """The objects of some classes, which become all there are, in the order given."""
    # -1: of another class.
    new_label = [classes.index(name) if name in classes else -1 for name in objects.class_names]
    labels = torch.tensor(new_label)[objects.labels]
    objects = replace(objects, labels=labels, class_names=list(classes))
    return objects.pick((labels >= 0).nonzero()[:, 0])


def load_scanobjectnn(root: Path, split: str, _points, download: bool, _cache, part="main_split",
                      suffix="") -> Objects:
    """ScanObjectNN, one of its variants: real indoor scans in its authors' h5 files."""
    folder = root / "scanobjectnn" / "h5_files"
    if not folder.exists():
        unpack(fetch("scanobjectnn", folder.parent, download), folder)
    kind = {"train": "training", "test": "test"}[split]
    path = folder / part / f"{kind}_objectdataset{suffix}.h5"
    clouds, labels, _ = read_h5(path, len(SCANOBJECTNN))
    return Objects(clouds, labels, SCANOBJECTNN)


def load_redwood(root: Path, split: str, _points, _download, _cache) -> Objects:
    """Redwood's scans of nine classes, which its authors' tool fetches."""
    return Objects(class_names=REDWOOD, **find_redwood(root / "redwood", split))


def load_co3d(root: Path, split: str, _points, _download, _cache) -> Objects:
    """CO3D v2, 42 categories, which its authors' tool fetches."""
    return Objects(class_names=list(CO3D.values()), **find_co3d(root / "co3d", split))


# One row per data set.
#     load: its loader
#     up: the axis that points up in its files. ScanObjectNN's is from issue 33 of its
#         repository. Redwood and CO3D lie as a camera saw them, roughly y down.
#     templates: the texts around its names
# The rest is what the original code trains it with (it has no `shapes`):
#     points: of a cloud
#     threshold, point_weight: of joint-label
#     separate: the thresholds of images and points for `--labels separate`
#     epochs, batch_size: where they are not those of most sets
CAD = dict(up="z", templates="depth", points=2048, threshold=[0.84], separate=[0.84, 0.84], point_weight=0.9)
SCANS = dict(up="y", templates="depth", points=2048, threshold=[0.82], separate=[0.6, 0.6], point_weight=1.0)
PHOTO = dict(SCANS, up="-y", templates="photo", points=8192)
WITHOUT_BACKGROUND = partial(load_scanobjectnn, part="main_split_nobg")
HARDEST = partial(load_scanobjectnn, suffix="_augmentedrot_scale75")
DATASETS = {
    "shapes": dict(CAD, point_weight=1.0),
    "modelnet10": dict(CAD, load=partial(load_modelnet, classes=MODELNET10), points=8192),
    "modelnet40": dict(CAD, load=load_modelnet, separate=[0.8, 0.82], points=8192),
    "modelnet40-depth": dict(CAD, load=partial(load_modelnet, depth_only=True)),
    "scanobjectnn-obj-only": dict(SCANS, load=WITHOUT_BACKGROUND, separate=[0.8, 0.82]),
    "scanobjectnn-with-bg": dict(SCANS, load=load_scanobjectnn),
    "scanobjectnn-hardest": dict(SCANS, load=HARDEST),
    "redwood": dict(PHOTO, load=load_redwood, separate=[0.82, 0.82], batch_size=64),
    "co3d": dict(PHOTO, load=load_co3d, threshold=[0.84], separate=[0.8, 0.82],
                 point_weight=0.9, epochs=150),
}


def dataset_name(text: str) -> str:
    """What --dataset names: one of DATASETS, or a folder, which becomes an absolute path.

    Raises: UserError where it could be either.
    """
    folder = Path(text).expanduser()
    if text not in DATASETS:
        return str(folder.resolve()) if folder.is_dir() else text
    if (folder / "classes.txt").exists():
        raise UserError(f"--dataset {text} is a data set, and a folder here, too; give ./{text} "
                        "for the folder, or rename it")
    return text


def dataset_row(name: str) -> dict:
    """The row of DATASETS for a data set, or what holds for a user's folder."""
    if name in DATASETS:
        return DATASETS[name]
    # A folder usually holds scans, so it has points, threshold and weight of SCANS.
    templates = "photo" if mostly_photographed(Path(name)) else "depth"
    return dict(SCANS, up="z", separate=[0.82, 0.82], templates=templates)


def load_dataset(name: str, root: str | Path, split: str, points: int = 1024, domain: str | None = None,
                 download: bool = True, up: str | None = None, cache: str | Path = "cache") -> Objects:
    """Objects of a data set, or of a user's folder: z up, in the unit sphere.

    name: one of DATASETS, or a folder. root: the folder that holds the data sets.
    split: "train" or "test". points: how many each cloud has.
    domain: "target" shows objects as a scanner would see them (see scan), "source" as
        they are. None: `shapes` is scanned, all others are as they are.
    download: fetch what is missing and needs no form. up: the axis that points upwards in
        the files. cache: a folder for what cannot be written beside the data.
    Raises: UserError or OSError for data that are missing or wrong.
    """
    folder = Path(name)
    if name not in DATASETS and not folder.is_dir():
        raise UserError(f"there is no folder {name}, and no data set of this name; the data sets "
                        f"are {', '.join(DATASETS)}")
    usual = "target" if name == "shapes" else "source"
    domain = domain or usual
    if name == "shapes":
        count, seed = {"train": (2000, 1), "test": (500, 2)}[split]
        objects = sample_shapes(count, seed, domain, points)
    else:
        # A folder without `test` is tested on what it is trained on.
        if name not in DATASETS and not (folder / split).is_dir():
            split = "train"
        scanned = domain == "target"
        objects = load_clouds(name, Path(root), split, points, scanned, download, up, Path(cache))
    objects.name = folder.name if domain == usual else f"{folder.name}-{domain}"
    objects.split = split
    return objects


def load_clouds(name: str, root: Path, split: str, points: int, scanned: bool, download: bool,
                up: str | None, cache: Path) -> Objects:
    """Objects of files, upright in the unit sphere, as they are or as a scanner would see them."""
    row = dataset_row(name)
    if name in DATASETS:
        objects = row["load"](root, split, points, download, cache)
    else:
        objects = Objects(**read_folder(Path(name), split))
    # A scan draws with replacement from what it sees.
    max_points = 3 * points if scanned else points
    up = up or row["up"]
    if isinstance(objects.points, list):
        clouds = read_objects(objects.points, points, max_points, up)
        objects.points = torch.as_tensor(clouds)
        # Each file was turned by itself: glTF's standard says what points upwards in it.
        up = "z"
    available = objects.points.shape[1]
    if available < points:
        raise UserError(f"{name} has {available} points, --points is {points}; lower it")
    # The first points of ModelNet's text are farthest points, see read_resampled.
    objects.points = to_unit_sphere(objects.points[:, :max_points], objects.names, up)
    if scanned:
        seed = {"train": 0, "test": 1}[split]
        objects.points = scan(objects.points, points, seed)
    return objects


# ------ shapes: the procedural set, as it is or scanned -----------------------------------------------------
def sample_shapes(count: int, seed: int, domain: str = "source", points: int = 1024) -> Objects:
    """The procedural set, the same for a seed.

    Object i is of class i mod 10, upright, turned by any yaw. domain: "source" is clean,
    whole objects, "target" the same programs as a scanner sees them (see scan).
    """
    scanned = domain == "target"
    # A scan loses points, so it begins with more.
    dense = 3 * points if scanned else points
    clouds, angles = torch.empty(count, dense, 3), torch.zeros(count, 3)
    for i in range(count):
        cloud, yaw = sample_furniture(i % len(PROGRAMS), dense, [seed, scanned, i])
        clouds[i] = torch.from_numpy(cloud)
        angles[i, 2] = yaw
    clouds = rotate_about_xyz(to_unit_sphere(clouds), angles)
    if scanned:
        clouds = scan(clouds, points, seed)
    labels = torch.arange(count) % len(PROGRAMS)
    return Objects(clouds, labels, list(MODELNET10), "shapes")


def scan(points: Tensor, count: int, seed: int) -> Tensor:
    """A scan: one-sided, stretched, noisy, with some floor and clutter. (N, P, 3) -> (N, count, 3)

    A hand-held scanner looks from three directions of an arc of 2 radians. What none of
    them sees is lost, about a quarter of the points. Points are drawn with replacement
    from what is left. Floor makes the object smaller in the unit sphere.
    """
    random = torch.Generator().manual_seed(seed)
    draw = partial(uniform, random, len(points))
    points = to_unit_sphere(points * draw(0.9, 1.1, 1, 3))
    # Three directions, one radian apart.
    azimuths = draw(0, 2 * math.pi, 1) + torch.tensor([-1.0, 0.0, 1.0])
    elevations = draw(0.1, 0.9, 3)
    seen = seen_from(points, azimuths, elevations).any(dim=1)
    # A few points come from elsewhere, as in real scans.
    seen |= draw(0, 1, points.shape[1]) < 0.02

    # With P = 3 x count few points repeat.
    kept = torch.multinomial(seen.float(), count, replacement=True, generator=random)
    points = points.gather(1, kept[..., None].expand(-1, -1, 3))
    sigma = draw(0.0, 0.01, 1, 1)
    points = points + sigma * torch.randn(points.shape, generator=random)
    return to_unit_sphere(with_floor_and_clutter(points, random))


def uniform(random: torch.Generator, objects: int, low: float, high: float, *shape: int) -> Tensor:
    """Random numbers U(low, high). -> (objects, *shape)"""
    return low + (high - low) * torch.rand(objects, *shape, generator=random)


def seen_from(points: Tensor, azimuths: Tensor, elevations: Tensor) -> Tensor:
    """What depth cameras in directions (B, V) see of clouds (B, P, 3). -> (B, V, P) bool

    A camera has 20 x 20 cells. A point is seen if it lies at most 0.15 behind the nearest
    one of its cell.
    """
    right, up, towards = project(points, azimuths, elevations)
    row = ((up * 0.499 + 0.5) * 20).long()
    column = ((right * 0.499 + 0.5) * 20).long()
    cell = row * 20 + column
    # -2 is behind all points of the unit sphere.
    nothing = towards.new_full((*azimuths.shape, 400), -2.0)
    nearest = nothing.scatter_reduce(2, cell, towards, "amax")
    return towards > nearest.gather(2, cell) - 0.15


def with_floor_and_clutter(points: Tensor, random: torch.Generator) -> Tensor:
    """Turn up to 5 % of the points into floor, up to 3 % into a lump of clutter. (N, P, 3)"""
    objects, count = points.shape[:2]
    draw = partial(uniform, random, objects)
    floor_xy = draw(-0.73, 0.73, count, 2)
    floor_z = points[..., 2:].amin(dim=1, keepdim=True) - 0.01
    floor = torch.cat([floor_xy, floor_z.expand(-1, count, -1)], dim=-1)
    middle, size = draw(-0.7, 0.7, 1, 3), draw(0.05, 0.15, 1, 1)
    lump = middle + size * torch.randn(objects, count, 3, generator=random)

    # Each point draws one lot: a low one makes it floor, a high one clutter.
    lot = draw(0, 1, count)
    is_floor = lot < draw(0, 0.05, 1)
    is_lump = lot > 1 - draw(0, 0.03, 1)
    points = torch.where(is_floor[..., None], floor, points)
    return torch.where(is_lump[..., None], lump, points)
