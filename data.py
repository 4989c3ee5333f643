"""Objects to learn from: depth views, weak and strong views, photographs, data sets, the procedural `shapes`.

Coordinates are right-handed, z up, float32; every cloud is centred and scaled into the unit sphere.
Angles are in radians. N objects, B batch, P points, V views.
"""
import difflib
import hashlib
import io
import json
import math
import os
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from support import UserError, write_whole
from support.fetch import fetch, unpack
from support.files import (LAYOUT, find_photographs, mostly_photographed, read_folder, read_lines,
                           read_objects, read_photograph, reading, to_z_up)
from support.furniture import PROGRAMS, rotate_about_xyz, sample_furniture
from support.workers import in_workers


@dataclass
class Objects:
    """A split of a data set: N clouds of P points, and what is known of each object.

    points: (N, P, 3) float32, cast from any numbers; a loader may give the list of the N files instead.
    labels: (N,) int64 numbers of the true classes, cast too, or None.
    names: what the objects are called; their numbers, where nobody named them.
    images: for each object the list of its photographs, or None where depth views are rendered.
    """

    points: Tensor
    labels: Tensor | None
    class_names: list[str]
    name: str = ""
    split: str = "train"
    names: list[str] | None = None
    images: list | None = None

    def __post_init__(self):
        are_files = isinstance(self.points, list) and all(isinstance(one, Path) for one in self.points)
        if not are_files:
            points = self.points if isinstance(self.points, Tensor) else np.asarray(self.points)
            self.points = torch.as_tensor(points, dtype=torch.float32)
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
    """Turn clouds upright, centre each on its mean, scale its farthest point to norm 1. A new tensor.

    points (N, P, 3) -> (N, P, 3) float32. `up` is the axis that points upwards in `points` (see UP), `names`
    are the objects' for messages. Clouds in float64 are centred before they become float32: the digits of
    coordinates far from the origin, as on a map, would not fit.
    Raises: UserError naming an object whose coordinates are not finite, or whose points all coincide.
    """
    unit = torch.empty(points.shape, device=points.device)
    for start in range(0, len(points), 64):  # in parts: a large set is in memory twice, and no third time
        part = to_z_up(points[start:start + 64], up)
        low, high = part.aminmax(dim=1)  # NaN where a coordinate is
        problems = {
            "NaN or infinite coordinates": ~(low.isfinite() & high.isfinite()).all(dim=1),
            "all its points in one place": (low == high).all(dim=1),
        }
        for problem, has_problem in problems.items():
            if has_problem.any():
                i = start + has_problem.int().argmax().item()
                raise UserError(f"object {names[i] if names else i} has {problem}; repair or remove its file")

        part = part - part.mean(dim=1, keepdim=True)
        radius = part.norm(dim=-1).amax(dim=1)
        unit[start:start + 64] = part / radius[:, None, None]
    return unit


# ------ Depth views -----------------------------------------------------------------------------------------
def project(points: Tensor, azimuths: Tensor, elevations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthographic camera coordinates of clouds: to the right, up, and towards the camera.

    points (B, P, 3); azimuths, elevations (B, V) say where the camera stands. Azimuth 0 is at -y and looks
    along +y. Returns three tensors (B, V, P).
    """
    x, y, z = (coordinate.unsqueeze(1) for coordinate in points.unbind(-1))  # (B, 1, P)
    sin_a, cos_a = azimuths.sin().unsqueeze(-1), azimuths.cos().unsqueeze(-1)
    sin_e, cos_e = elevations.sin().unsqueeze(-1), elevations.cos().unsqueeze(-1)

    right = cos_a * x + sin_a * y
    away = cos_a * y - sin_a * x
    up = cos_e * z + sin_e * away
    towards = sin_e * z - cos_e * away
    return right, up, towards


@torch.no_grad()
def render_depth_views(points: Tensor, azimuths: Tensor, elevations: Tensor, size: int) -> Tensor:
    """Depth maps of clouds, in PointCLIP V2's recipe: quantise, densify, smooth, squeeze (arXiv 2211.11682).

    points (B, P, 3) in the unit sphere, z up; azimuths, elevations (B, V) or (1, V).
    Returns (B, V, 3, size, size) without gradient: near = 1, far = 0.2, background = 0.
    """
    batch, views = len(points), azimuths.shape[1]
    # A grid of 1.6 sqrt(P) cells a side: finer, and a surface would have holes between its points.
    grid = min(size, int(1.6 * points.shape[1] ** 0.5))

    # Quantise: the nearest point of each cell wins.
    right, up, towards = project(points, azimuths, elevations)
    column = ((right * 0.48 + 0.5) * grid).long().clamp(0, grid - 1)  # 0.48 leaves a thin margin
    row = ((0.5 - up * 0.48) * grid).long().clamp(0, grid - 1)
    brightness = 0.6 + 0.4 * towards.clamp(-1, 1)
    image = points.new_zeros(batch, views, grid * grid)
    image = image.scatter_reduce(2, row * grid + column, brightness, "amax").view(-1, grid, grid)

    # Densify: a closing fills holes of up to four cells; the object stays one cell wider. One axis after the
    # other, because on a CPU two 1-D pools are much faster than a 2-D one.
    for _ in range(2):
        image = F.max_pool1d(F.pad(image, (2, 2)), 5, 1).transpose(1, 2)
    for _ in range(2):
        image = -F.max_pool1d(F.pad(-image, (1, 1)), 3, 1).transpose(1, 2)

    # Smooth with a Gaussian (1/4, 1/2, 1/4), again one axis after the other.
    for _ in range(2):
        padded = F.pad(image, (1, 1))
        image = (0.25 * padded[..., :-2] + 0.5 * image + 0.25 * padded[..., 2:]).transpose(1, 2)

    if grid != size:
        image = F.interpolate(image.unsqueeze(1), (size, size), mode="bilinear", align_corners=False)
    return image.clamp(0, 1).view(batch, views, 1, size, size).expand(-1, -1, 3, -1, -1)


def fixed_views(points: Tensor, views: int, size: int) -> Tensor:
    """Evaluation's views: azimuths evenly around, elevation 0.4. (B, P, 3) -> (B, V, 3, size, size)"""
    azimuths = (torch.arange(views, device=points.device)[None] + 0.5) * (2 * math.pi / views)
    return render_depth_views(points, azimuths, torch.full_like(azimuths, 0.4), size)


def random_view(points: Tensor, size: int) -> Tensor:
    """One view of each object from anywhere around it, slightly below to well above. -> (B, 3, size, size)"""
    azimuth = torch.rand(len(points), 1, device=points.device) * (2 * math.pi)
    elevation = torch.rand(len(points), 1, device=points.device) * 1.1 - 0.1
    return render_depth_views(points, azimuth, elevation, size)[:, 0]


# ------ Weak and strong views -------------------------------------------------------------------------------
# Drawn anew for each object, on the device the objects are on. Inputs are left untouched.
# Drawn anew for each object, on the device the objects are on. Inputs are left untouched.
def draw_views(points: Tensor, size: int, photographs: tuple | None = None) -> dict[str, Tensor]:
    """Weak [joint-label] and strong views [self-training] of clouds (B, P, 3) for one training step.

    Images (B, 3, size, size) are the pair `photographs` that training_photographs gives, or else two crops
    of one random depth view.
    """
    if photographs is None:
        weak, strong = depth_crops(points, size)
    else:
        weak, strong = (images.to(points.device, non_blocking=True) for images in photographs)
    return {"weak_image": weak, "strong_image": strong,
            "weak_points": weak_points(points), "strong_points": strong_points(points)}


def depth_crops(points: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The weak and the strong crop of one random depth view of each cloud. Two of (B, 3, size, size)

    Deviation D22: a depth map has no colours for the original's RandAugment, and its smaller crops would lose
    the object.
    """
    image = random_view(points, size)
    grey = image[:, :1]  # the three channels of a depth view are equal: crop one
    weak = random_crop(grey, 0.85, aspect=1, flip=0).expand_as(image)
    strong = random_crop(grey, 0.6, aspect=4 / 3, flip=0.5).expand_as(image)
    return weak, strong


def random_crop(images: Tensor, smallest: float, aspect: float, flip: float) -> Tensor:
    """Random resized crops: share of the area U(smallest, 1), aspect ratio 1/aspect to aspect (uniform in
    its logarithm), mirrored with probability `flip`. (B, channels, H, W) -> the same shape
    """
    count, device = len(images), images.device
    area = smallest + (1 - smallest) * torch.rand(count, device=device)
    ratio = torch.exp((2 * torch.rand(count, device=device) - 1) * math.log(aspect))
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    x = (1 - width) * (2 * torch.rand(count, device=device) - 1)
    y = (1 - height) * (2 * torch.rand(count, device=device) - 1)
    mirror = torch.where(torch.rand(count, device=device) < flip, -1.0, 1.0)

    zero = torch.zeros_like(width)
    matrix = torch.stack([width * mirror, zero, x, zero, height, y], dim=-1).view(count, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def weak_points(points: Tensor) -> Tensor:
    """Weak clouds [joint-label]: scaled by U(0.9, 1.1), and turned a little about all axes (sigma 0.06, at
    most 0.18). (B, P, 3) -> (B, P, 3)
    """
    count, device = len(points), points.device
    angles = (0.06 * torch.randn(count, 3, device=device)).clamp(-0.18, 0.18)
    return rotate_about_xyz(points, angles) * (0.9 + 0.2 * torch.rand(count, 1, 1, device=device))


def strong_points(points: Tensor) -> Tensor:
    """Strong clouds [self-training]: any yaw, scaled by U(0.5, 2), shifted by U(-0.5, 0.5) of their extent,
    jitter of sigma 0.01 (at most 0.05), and a share U(0, 0.875) of the points dropped.

    A dropped point becomes the cloud's first, so that P stays. The original's crop never acts and is left out
    (Deviation D6). (B, P, 3) -> (B, P, 3)
    """
    count, device = len(points), points.device
    points = random_yaw(points) * (0.5 + 1.5 * torch.rand(count, 1, 1, device=device))
    low, high = points.aminmax(dim=1, keepdim=True)
    points = points + (high - low) * (torch.rand(count, 1, 3, device=device) - 0.5)
    points = points + (0.01 * torch.randn(points.shape, device=device)).clamp(-0.05, 0.05)

    chance = torch.rand(count, points.shape[1], 1, device=device)
    dropped = chance < 0.875 * torch.rand(count, 1, 1, device=device)
    return torch.where(dropped, points[:, :1], points)


def random_yaw(points: Tensor) -> Tensor:
    """Rotate each cloud about the upright axis by any angle. (B, P, 3) -> (B, P, 3)"""
    angles = torch.zeros(len(points), 3, device=points.device)
    angles[:, 2] = 2 * math.pi * torch.rand(len(points), device=points.device)
    return rotate_about_xyz(points, angles)


# ------ Photographs -----------------------------------------------------------------------------------------
class Photographs(Dataset):
    """Images of objects of which some have photographs, as arrays of bytes, or of floats where rendered.

    Item i with a `seed` is the weak and the strong image (3, size, size) of one photograph of object i: a
    random crop [joint-label], and a crop of 0.3 to 1, flip, RandAugment of magnitude 9 [self-training]
    (Deviation D22). Without a seed it is the centre crops (V, 3, size, size) of all its photographs, or of
    `views` evenly spaced ones. An object that has no photograph has depth views, treated as everywhere.
    """

    def __init__(self, objects: Objects, size: int, seed: int | None = None, views: int | None = None):
        from torchvision.transforms import v2  # here: 160 MB and a second that depth views do not need
        self.objects, self.size, self.seed, self.views = objects, size, seed, views
        bicubic = v2.InterpolationMode.BICUBIC
        self.weak = v2.Compose([v2.Resize(size, bicubic), v2.RandomCrop(size)])
        self.still = v2.Compose([v2.Resize(size, bicubic), v2.CenterCrop(size)])
        self.strong = v2.Compose([
            v2.RandomResizedCrop(size, (0.3, 1.0), interpolation=bicubic),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(2, 9),
        ])

    def __getitem__(self, i: int):
        paths, points = self.objects.images[i], self.objects.points[i:i + 1]
        if self.seed is None:
            if not paths:
                return fixed_views(points, self.views or 6, self.size)[0].numpy()
            chosen = evenly_spaced(paths, self.views or len(paths))
            return np.stack([self.still(read_photograph(path)).numpy() for path in chosen])

        # The same views after a resume, and other ones for each object. torch takes seeds below 2^64.
        torch.manual_seed((self.seed * 1_000_003 + i) % 2 ** 64)
        if not paths:
            return [image[0].numpy() for image in depth_crops(points, self.size)]
        image = read_photograph(paths[torch.randint(len(paths), ())])
        return [self.weak(image).numpy(), self.strong(image).numpy()]


def evenly_spaced(items: list, count: int) -> list:
    """`count` evenly spaced items, the first and the last among them; all if there are no more."""
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
    items = in_workers(Photographs(objects, size, seed), torch.cat(tuple(batches)).tolist(), ahead=16)
    with closing(items):
        for batch in batches:
            pairs = [next(items) for _ in batch]
            yield [torch.stack([to_unit_range(image) for image in images]) for images in zip(*pairs)]


def fixed_images(objects: Objects, views: int | None, size: int, batch_size: int, device):
    """Evaluation's images of all objects in order, in parts (b, V, 3, size, size) (Deviation D15).

    With photographs: all of an object's, or at most `views` of them, one object a part. Without: `views`
    depth views of each object, 6 by default.
    """
    if objects.images is None:
        for points in objects.points.split(batch_size):
            yield fixed_views(points.to(device), views or 6, size)
    else:
        for images in in_workers(Photographs(objects, size, views=views), list(range(len(objects)))):
            yield to_unit_range(images)[None].to(device)


# ------ Data sets -------------------------------------------------------------------------------------------
# A loader takes (root, split, points, download, cache) and returns Objects as they lie in the files: their
# `points` are clouds (N, P, 3), at least as large as asked for if there are such, or the list of the N files
# to read them from. `download` allows it to fetch what is missing; `cache` is a folder it may write to.
FEWER_POINTS = "--points 2048 reads modelnet40_ply_hdf5_2048 instead"

# Classes in the order of the labels. Of CO3D: folder -> class.
MODELNET10 = (
    "bathtub", "bed", "chair", "desk", "dresser", "monitor", "night stand", "sofa", "table", "toilet")
SCANOBJECTNN = [
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow",
    "sink", "sofa", "toilet"]
REDWOOD = [
    "chair", "table", "trash container", "bench", "plant", "sign", "bicycle", "motorcycle", "sofa"]
CO3D_NAMES = [
    "bench", "skateboard", "backpack", "laptop", "cup", "umbrella", "teddy bear", "bowl", "cake", "toy plane",
    "remote control", "orange", "toaster", "couch", "apple", "bottle", "donut", "hair dryer", "hydrant",
    "toy train", "pizza", "motorcycle", "suitcase", "banana", "toilet", "sandwich", "keyboard", "mouse",
    "toy truck", "handbag", "broccoli", "wine glass", "microwave", "baseball glove", "book", "carrot", "ball",
    "bicycle", "chair", "stop sign", "vase", "plant"]
CO3D = {name.removesuffix(" control").replace(" ", ""): name for name in CO3D_NAMES}


def load_modelnet(root: Path, split: str, points: int, download: bool, cache: Path, classes=None,
                  depth_only=False) -> Objects:
    """ModelNet40, or some of its classes.

    More than 2,048 points come from `modelnet40_normal_resampled`, as in the original, fewer from the
    official h5 files. `depth_only` (the original's "ModelNet40-depth") always reads these, and no pictures.
    Pictures are those in a `views` folder inside either. Deviation D24: without them depth views are
    rendered, where the original has shaded pictures.
    """
    is_resampled = points > 2048 and not depth_only
    folder = root / ("modelnet40_normal_resampled" if is_resampled else "modelnet40_ply_hdf5_2048")
    if not folder.exists():
        unpack(fetch("modelnet40-8192" if is_resampled else "modelnet40", root, download), folder)

    objects = read_resampled(folder, split, cache) if is_resampled else read_modelnet_h5(folder, split)
    if classes is not None:
        objects = only_classes(objects, classes)
    if not depth_only:
        objects.images = find_photographs(folder / "views", objects.names)
    return objects


def read_modelnet_h5(folder: Path, split: str) -> Objects:
    """ModelNet40 in the official h5 layout, 2,048 points an object."""
    class_names = [line.replace("_", " ") for line in read_lines(folder / "shape_names.txt", LAYOUT)]
    listed = folder / f"{split}_files.txt"
    files = [folder / Path(line).name for line in read_lines(listed, LAYOUT)]  # paths of its authors' machine
    clouds, labels, names = zip(*(read_h5(file, len(class_names)) for file in files))
    names = None if None in names else sum(names, [])
    with reading(listed, "expected files of equally many points"):
        return Objects(torch.cat(clouds), torch.cat(labels), class_names, names=names)


def read_resampled(folder: Path, split: str, cache: Path) -> Objects:
    """ModelNet40 as `modelnet40_normal_resampled` has it, 10,000 points an object.

    The points of a file are in the order of farthest point sampling: in both files that were looked at, the
    first k are further apart than k random ones, for k = 256 to 8,192. So the first 8,192 are farthest
    points, as ULIP's protocol takes, and the same every time.
    Text takes a minute or two. It is read once, into one file beside the folder, or in `cache` where that
    cannot be written.
    """
    class_names = read_lines(folder / "modelnet40_shape_names.txt", FEWER_POINTS)
    listed = folder / f"modelnet40_{split}.txt"
    names = read_lines(listed, FEWER_POINTS)
    with reading(listed, "expected names CLASS_NUMBER of classes in modelnet40_shape_names.txt"):
        labels = [class_names.index(name.rpartition("_")[0]) for name in names]

    places = [place / f"{folder.name}-{split}.h5" for place in (folder.parent, cache)]
    path = next((place for place in places if place.exists() and names_in(place) == names), None)
    if path is None:
        path = places[0] if os.access(folder.parent, os.W_OK) else places[1]
        texts = [folder / name.rpartition("_")[0] / f"{name}.txt" for name in names]
        clouds = read_texts(texts, f"reading {folder.name} once")
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file.update(data=clouds, label=labels, name=[name.encode() for name in names])
        write_whole(path, buffer.getbuffer())
    clouds, labels, names = read_h5(path, len(class_names))
    return Objects(clouds, labels, [name.replace("_", " ") for name in class_names], names=names)


def names_in(path: Path) -> list[str]:
    """The names of the objects in an h5 file that read_resampled made."""
    with reading(path, "remove it, and it is made again"), open_h5(path) as file:
        return [name.decode() for name in file["name"]]


def read_texts(files: list[Path], purpose: str) -> np.ndarray:
    """Clouds (N, P, 3) of files of lines x,y,z,nx,ny,nz; from y up to z up, as in h5 files."""
    clouds = None
    for i, path in enumerate(tqdm(files, purpose, unit="object", disable=None)):
        with reading(path, "expected lines x,y,z,nx,ny,nz; fetch it again", FEWER_POINTS):
            x, y, z = np.loadtxt(path, np.float32, delimiter=",", usecols=(0, 1, 2), ndmin=2).T
            if clouds is None:  # filled in place: the set is 1.2 GB, and should not be in memory twice
                clouds = np.empty((len(files), len(x), 3), np.float32)
            if len(x) != clouds.shape[1]:
                raise ValueError(f"it has {len(x)} points, the others {clouds.shape[1]}")
            clouds[i] = np.stack([-x, z, y], axis=1)
    return clouds


def only_classes(objects: Objects, classes: tuple[str, ...]) -> Objects:
    """The objects of some classes, which become all there are, in the order given."""
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
    file_of = {"train": f"training_objectdataset{suffix}.h5", "test": f"test_objectdataset{suffix}.h5"}
    clouds, labels, _ = read_h5(folder / part / file_of[split], len(SCANOBJECTNN))
    return Objects(clouds, labels, SCANOBJECTNN)


def read_h5(path: Path, classes: int) -> tuple[Tensor, Tensor, list | None]:
    """Clouds (N, P, 3), labels (N,) and, if there are any, names of an h5 file.

    Clouds in PointNet's own files are y up and are turned; such files are told by the normals they hold.
    Raises: UserError naming the file and what it holds instead.
    """
    with reading(path, "expected data (N, P, 3) and label; fetch it again", LAYOUT), open_h5(path) as file:
        points = file["data"][:]
        if points.dtype.itemsize > 4:  # far from the origin float32 has too few digits: centre before
            points = points - points.mean(axis=1, keepdims=True)
        clouds = torch.from_numpy(points.astype(np.float32, copy=False))
        labels = torch.from_numpy(file["label"][:].reshape(-1).astype(np.int64))
        names = [name.decode() for name in file["name"]] if "name" in file else None
        names_file = path.with_name(f"{path.stem[:-1]}_{path.stem[-1]}_id2file.json")  # PointNet's names
        if names is None and names_file.is_file():
            names = [Path(name).stem for name in json.loads(names_file.read_bytes())]
        if "normal" in file:
            clouds = to_z_up(clouds, "y")

        sizes = {len(clouds), len(labels), len(labels if names is None else names)}
        if clouds.shape[2:] != (3,) or len(sizes) > 1:
            contents = f"data {tuple(clouds.shape)}, {len(labels)} labels"
            raise ValueError(contents if names is None else f"{contents}, {len(names)} names")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise UserError(f"{path} has the label {wrong[0]}, expected 0 to {classes - 1}; fetch it again")
    return clouds, labels, names


def open_h5(path: Path) -> h5py.File:
    """An h5 file to read. Without a lock, which not all file systems know."""
    return h5py.File(path, locking=False)


def load_redwood(root: Path, split: str, _points, _download, _cache) -> Objects:
    """Redwood's scans of nine classes, which its authors' tool fetches. Scans without a mesh are left out.

    redwood/meshes/ID.ply or points/ID.npy; images/ID/*.jpg; categories.json maps a class to its ids.
    """
    folder = root / "redwood"
    listed = folder / "categories.json"
    tool = "github.com/isl-org/redwood-3dscan fetches it; " + LAYOUT
    with reading(listed, "expected class -> ids", tool):
        ids = json.loads(listed.read_bytes())
        labels = {scan_id: label for label, class_name in enumerate(REDWOOD) for scan_id in ids[class_name]}
    files = {file.stem: file for file in [*folder.glob("points/*.npy"), *folder.glob("meshes/*.ply")]}
    names = [scan_id for scan_id in labels if scan_id in files and in_split(scan_id, split)]
    if not names:
        raise FileNotFoundError(f"no mesh of a listed id in {folder / 'meshes'}; {tool}")
    return Objects([files[name] for name in names], torch.tensor([labels[name] for name in names]), REDWOOD,
                   names=names, images=find_photographs(folder / "images", names))


def load_co3d(root: Path, split: str, _points, _download, _cache) -> Objects:
    """CO3D v2, which its authors' tool fetches: co3d/CATEGORY/SEQUENCE/{pointcloud.ply, images/*.jpg} of 42
    categories. Sequences without a cloud are left out.
    """
    files, labels = [], []
    for label, category in enumerate(CO3D):
        clouds = sorted((root / "co3d" / category).glob("*/pointcloud.ply"))
        clouds = [file for file in clouds if in_split(file.parent.name, split)]
        files += clouds
        labels += [label] * len(clouds)
    if not files:
        raise FileNotFoundError(f"no {root / 'co3d'}/CATEGORY/SEQUENCE/pointcloud.ply; "
                                f"github.com/facebookresearch/co3d fetches them; {LAYOUT}")
    images = [sorted((file.parent / "images").glob("*.jpg")) for file in files]
    return Objects(files, torch.tensor(labels), list(CO3D.values()),
                   names=[file.parent.name for file in files], images=images if any(images) else None)


def in_split(name: str, split: str) -> bool:
    """Whether a fixed split, 80 % train and 20 % test by a hash of the name, puts an object there. The lists
    of the paper are not published.
    """
    is_test = hashlib.sha256(name.encode()).digest()[0] < 51  # of 256
    return is_test == (split == "test")


# One row per data set. `load`: its loader. `up`: the axis that points up in its files (ScanObjectNN: issue 33
# of its repository; Redwood and CO3D lie as a camera saw them, y down, roughly). `templates`: the texts
# around its names. The rest is what the original code trains it with: points per cloud, thresholds of
# joint-label and of images and points apart, point weight, and epochs and batch size where they differ from
# all others'.
CAD = dict(up="z", templates="depth", points=2048, threshold=[0.84], separate=[0.84, 0.84], point_weight=0.9)
SCANS = dict(up="y", templates="depth", points=2048, threshold=[0.82], separate=[0.6, 0.6], point_weight=1.0)
PHOTO = dict(SCANS, up="-y", templates="photo", points=8192)
DATASETS = {
    "shapes": dict(CAD, point_weight=1.0),
    "modelnet10": dict(CAD, load=partial(load_modelnet, classes=MODELNET10), points=8192),
    "modelnet40": dict(CAD, load=load_modelnet, separate=[0.8, 0.82], points=8192),
    "modelnet40-depth": dict(CAD, load=partial(load_modelnet, depth_only=True)),
    "scanobjectnn-obj-only": dict(
        SCANS, load=partial(load_scanobjectnn, part="main_split_nobg"), separate=[0.8, 0.82]),
    "scanobjectnn-with-bg": dict(SCANS, load=load_scanobjectnn),
    "scanobjectnn-hardest": dict(SCANS, load=partial(load_scanobjectnn, suffix="_augmentedrot_scale75")),
    "redwood": dict(PHOTO, load=load_redwood, separate=[0.82, 0.82], batch_size=64),
    "co3d": dict(
        PHOTO, load=load_co3d, threshold=[0.84], separate=[0.8, 0.82], point_weight=0.9, epochs=150),
}


def dataset_name(text: str) -> str:
    """What --dataset names: one of DATASETS, or a folder, which becomes an absolute path.

    Raises: UserError where it could be either.
    """
    folder = Path(text).expanduser()
    if text in DATASETS:
        if (folder / "classes.txt").exists():
            raise UserError(f"--dataset {text} is a data set, and a folder here, too; give ./{text} for the "
                            "folder, or rename it")
        return text
    return str(folder.resolve()) if folder.is_dir() else text


def dataset_row(name: str) -> dict:
    """The row of DATASETS for a data set. A user's folder usually holds scans, so it has ScanObjectNN's
    points, threshold and point weight. It is z up, and has texts of photographs if most objects have such.
    """
    if name in DATASETS:
        return DATASETS[name]
    templates = "photo" if mostly_photographed(Path(name)) else "depth"
    return dict(SCANS, up="z", separate=[0.82, 0.82], templates=templates)


def load_dataset(name: str, root: str | Path, split: str, points: int = 1024, domain: str | None = None,
                 download: bool = True, up: str | None = None, cache: str | Path = "cache") -> Objects:
    """Objects of a data set, or of a user's folder: z up, in the unit sphere, `points` points a cloud.

    name: one of DATASETS, or a folder. root: the folder that holds the data sets. split: "train" or "test".
    domain: "target" shows objects as a scanner would see them (see scan), "source" as they are; None is what
    the data set usually is: `shapes` scanned, all others as they are.
    download: fetch what is missing and needs no form. up: the axis that points upwards in the files. cache: a
    folder for what cannot be written beside the data.
    Raises: UserError or OSError for data that are missing or wrong.
    """
    folder = Path(name)
    if name not in DATASETS and not folder.is_dir():
        close = difflib.get_close_matches(name.lower(), DATASETS, 1)
        question = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"there is no folder {name}, and no data set of this name; {question}The data sets "
                        f"are {', '.join(DATASETS)}")
    if name == "shapes":
        count, seed = {"train": (2000, 1), "test": (500, 2)}[split]
        objects = sample_shapes(count, seed, domain or "target", points)
        differs = domain == "source"
    else:
        if name not in DATASETS and not (folder / split).is_dir():
            split = "train"  # a folder without `test` is tested on what it is trained on
        objects = load_clouds(name, Path(root), split, points, domain == "target", download, up, Path(cache))
        differs = domain == "target"
    objects.name = f"{folder.name}-{domain}" if differs else folder.name
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
    max_points = 3 * points if scanned else points  # a scan draws from what it sees, with replacement
    up = up or row["up"]
    if isinstance(objects.points, list):
        objects.points = torch.as_tensor(read_objects(objects.points, points, max_points, up))
        up = "z"  # each file was turned by itself: glTF's standard says what points upwards in it
    available = objects.points.shape[1]
    if available < points:
        raise UserError(f"{name} has {available} points, --points is {points}; lower it")
    objects.points = to_unit_sphere(objects.points[:, :max_points], objects.names, up)
    if scanned:
        objects.points = scan(objects.points, points, seed=("train", "test").index(split))
    return objects


# ------ shapes: the procedural set, as it is or scanned -----------------------------------------------------
def sample_shapes(count: int, seed: int, domain: str = "source", points: int = 1024) -> Objects:
    """The procedural set, the same for a seed: object i is of class i mod 10, upright, turned by any yaw.

    domain "source": clean, whole objects. "target": the same programs as a scanner sees them (see scan).
    """
    scanned = domain == "target"
    dense = {"source": points, "target": 3 * points}[domain]
    clouds, angles = torch.empty(count, dense, 3), torch.zeros(count, 3)
    for i in range(count):
        cloud, yaw = sample_furniture(i % len(PROGRAMS), dense, [seed, scanned, i])
        clouds[i] = torch.from_numpy(cloud)
        angles[i, 2] = yaw
    clouds = rotate_about_xyz(to_unit_sphere(clouds), angles)
    if scanned:
        clouds = scan(clouds, points, seed)
    return Objects(clouds, torch.arange(count) % len(PROGRAMS), list(MODELNET10), "shapes", domain)


def scan(points: Tensor, count: int, seed: int) -> Tensor:
    """A scan: one-sided, stretched, noisy, with some floor and clutter. (N, P, 3) -> (N, count, 3)

    A hand-held scanner looks from three directions of an arc of 2 radians. What none of them sees is lost,
    about a quarter of the points. Points are drawn with replacement from what is left: with P = 3 x count few
    repeat. Floor makes the object smaller in the unit sphere.
    """
    random = torch.Generator().manual_seed(seed)
    objects = len(points)

    def draw(low, high, *shape):
        return low + (high - low) * torch.rand(objects, *shape, generator=random)

    points = to_unit_sphere(points * draw(0.9, 1.1, 1, 3))
    azimuths = draw(0, 2 * math.pi, 1) + torch.tensor([-1.0, 0.0, 1.0])
    seen = seen_from(points, azimuths, draw(0.1, 0.9, 3)).any(dim=1)
    seen |= draw(0, 1, points.shape[1]) < 0.02  # a few from elsewhere, as real scans have
    kept = torch.multinomial(seen.float(), count, replacement=True, generator=random)
    points = points.gather(1, kept[..., None].expand(-1, -1, 3))
    points = points + draw(0.0, 0.01, 1, 1) * torch.randn(points.shape, generator=random)

    # Up to 5 % of the points become floor below the object, up to 3 % one lump of clutter.
    floor_z = points.amin(dim=1, keepdim=True)[..., 2] - 0.01
    floor = torch.cat([draw(-0.73, 0.73, count, 2), floor_z[..., None].expand(-1, count, 1)], dim=-1)
    lump = draw(-0.7, 0.7, 1, 3)
    lump = lump + draw(0.05, 0.15, 1, 1) * torch.randn(objects, count, 3, generator=random)
    lot = draw(0, 1, count)
    floor_share, lump_share = draw(0, 0.05, 1), draw(0, 0.03, 1)
    points = torch.where((lot < floor_share)[..., None], floor, points)
    points = torch.where((lot > 1 - lump_share)[..., None], lump, points)
    return to_unit_sphere(points)


def seen_from(points: Tensor, azimuths: Tensor, elevations: Tensor) -> Tensor:
    """What a depth camera sees of clouds (B, P, 3) from each of V directions (B, V). -> (B, V, P) bool

    A point is seen if it lies at most 0.15 behind the nearest one of its cell of a 20 x 20 depth map.
    """
    right, up, towards = project(points, azimuths, elevations)
    cell = ((up * 0.499 + 0.5) * 20).long() * 20 + ((right * 0.499 + 0.5) * 20).long()
    nearest = towards.new_full((*azimuths.shape, 400), -2.0).scatter_reduce(2, cell, towards, "amax")
    return towards > nearest.gather(2, cell) - 0.15
