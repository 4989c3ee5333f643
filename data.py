"""Objects to learn from: depth views, weak and strong views, photographs, data sets, the procedural `shapes`.

Coordinates are right-handed, z up, float32; every cloud is centred and scaled into the unit sphere.
Angles are in radians. N objects, B batch, P points, V views.
"""
import codecs
import copy
import csv
import difflib
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import unicodedata
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm


class UserError(Exception):
    """What a user can put right. It ends train.py and eval.py with this one line and exit code 2."""


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
def draw_views(points: Tensor, size: int, photographs: tuple | None = None) -> dict[str, Tensor]:
    """Weak [joint-label] and strong views [self-training] of clouds (B, P, 3) for one training step.

    Images (B, 3, size, size) are the pair `photographs` that training_photographs gives, or else two crops
    of one random depth view. Deviation D22: a depth map has no colours for the original's RandAugment, and
    its smaller crops would lose the object.
    """
    if photographs is None:
        image = random_view(points, size)
        grey = image[:, :1]  # the three channels of a depth view are equal: crop one
        weak = random_crop(grey, 0.85, aspect=1, flip=0).expand_as(image)
        strong = random_crop(grey, 0.6, aspect=4 / 3, flip=0.5).expand_as(image)
    else:
        weak, strong = (images.to(points.device, non_blocking=True) for images in photographs)
    return {"weak_image": weak, "strong_image": strong,
            "weak_points": weak_points(points), "strong_points": strong_points(points)}


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


def rotate_about_xyz(points: Tensor, angles: Tensor) -> Tensor:
    """Rotate clouds about x, then y, then z. points (B, P, 3), angles (B, 3) -> (B, P, 3)"""
    # Turn the three axes, not the points: one matrix product then turns all points.
    axes = torch.eye(3, dtype=angles.dtype, device=angles.device).expand(len(angles), 3, 3)
    for axis in range(3):
        sin, cos = angles[:, axis, None].sin(), angles[:, axis, None].cos()
        fixed, a, b = axes.roll(-axis, -1).unbind(-1)
        axes = torch.stack([fixed, cos * a - sin * b, sin * a + cos * b], dim=-1).roll(axis, -1)
    return points @ axes.to(points.dtype)


# ------ Photographs -----------------------------------------------------------------------------------------
PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class Photographs(Dataset):
    """Photographs or renderings of objects, decoded and cropped, as uint8; depth views may be floats.

    Item i with a `seed` is a pair (3, size, size) of one photograph of object i: the weak image (random crop
    [joint-label]) and the strong one (crop of 0.3 to 1, flip, RandAugment of magnitude 9 [self-training];
    Deviation D22). Without a seed it is the centre crops (V, 3, size, size) of all its photographs, or of
    `views` evenly spaced ones. An object that has no photograph gets depth views.
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

    def __getitem__(self, i):
        paths, points = self.objects.images[i], self.objects.points[i:i + 1]
        if self.seed is None:
            if not paths:
                return fixed_views(points, self.views or 6, self.size)[0]
            chosen = evenly_spaced(paths, self.views or len(paths))
            return torch.stack([self.still(read_photograph(path)) for path in chosen])

        # The same views after a resume, and other ones for each object. torch takes seeds below 2^64.
        torch.manual_seed((self.seed * 1_000_003 + i) % 2 ** 64)
        if paths:
            image = read_photograph(paths[torch.randint(len(paths), ())])
        else:
            image = (255 * random_view(points, self.size)[0]).byte()
        return self.weak(image), self.strong(image)


def read_photograph(path: Path) -> Tensor:
    """A picture as a person sees it on the screen: upright, opaque, 8 bits a colour. -> (3, H, W) uint8

    A camera's note of how it was held (EXIF) is obeyed. Depths beyond 8 bits are scaled by their own range.
    What is transparent becomes mid-grey, on which neither a white nor a black object vanishes.
    Raises: UserError naming the file.
    """
    with reading(path, "replace or remove it"):
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode[0] in "IF":  # grey of 16 or 32 bits, or float: convert() would clip it to white
            grey = np.asarray(image, np.float64)
            low, high = np.nanmin(grey), np.nanmax(grey)
            grey = np.nan_to_num((grey - low) / max(high - low, 1e-12))
            image = Image.fromarray((255 * grey).round().astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            ground = Image.new("RGBA", image.size, (128, 128, 128, 255))
            image = Image.alpha_composite(ground, image.convert("RGBA"))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def evenly_spaced(items: list, count: int) -> list:
    """`count` evenly spaced items, the first and the last among them; all if there are no more."""
    chosen = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[k] for k in chosen]


def load_in_workers(photographs: Photographs, batches: list):
    """Items of Photographs in batches of these indices, decoded by worker processes; in [0, 1], float32.
    Raises: UserError naming a picture that cannot be read, or where shared memory is too small.
    """
    # Each item travels alone: batches of pictures would not fit the 64 MB of shared memory that Docker gives.
    # Without a generator of its own a DataLoader draws from the global one, and a resumed run would differ.
    ahead = 2 if photographs.seed is None else 16  # a batch in all; in evaluation an item is many pictures
    loader = DataLoader(photographs, batch_sampler=[[i] for batch in batches for i in batch],
                        num_workers=min(8, os.cpu_count()), prefetch_factor=ahead,
                        generator=torch.Generator())
    try:
        items = iter(loader)
        for batch in batches:
            parts = [copy.deepcopy(next(items)) for _ in batch]  # a copy leaves shared memory free again
            if torch.is_tensor(parts[0]):
                yield to_unit_range(torch.cat(parts))
            else:
                yield [to_unit_range(torch.cat(images)) for images in zip(*parts)]
    except UserError as error:  # a worker's error comes with its whole traceback as the text
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from None
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise UserError("the processes that decode photographs found shared memory (/dev/shm) full; "
                        "start the container with more, as `docker run --shm-size 2g`") from error


def to_unit_range(images: Tensor) -> Tensor:
    """Bytes as floats in [0, 1], as torchvision's ToDtype scales them; floats stay."""
    return images if images.is_floating_point() else images.float().mul_(1 / 255)


def training_photographs(objects: Objects, batches: tuple, size: int, seed: int):
    """For each batch of indices its weak and strong images, or None where views are rendered."""
    if objects.images is None:
        return [None] * len(batches)
    return load_in_workers(Photographs(objects, size, seed), [index.tolist() for index in batches])


def fixed_images(objects: Objects, views: int | None, size: int, batch_size: int, device):
    """Evaluation's images of all objects in order, in parts (b, V, 3, size, size) (Deviation D15).

    With photographs: all of an object's, or at most `views` of them, one object a part. Without: `views`
    depth views of each object, 6 by default.
    """
    if objects.images is None:
        for points in objects.points.split(batch_size):
            yield fixed_views(points.to(device), views or 6, size)
    else:
        photographs = Photographs(objects, size, views=views)
        for images in load_in_workers(photographs, [[i] for i in range(len(objects))]):
            yield images.to(device)


# ------ Data sets -------------------------------------------------------------------------------------------
# A loader takes (root, split, points, download) and returns Objects as they lie in the files: their `points`
# are clouds (N, P, 3), at least as large as asked for if there are such, or the list of the N files to read
# them from. `download` allows it to fetch what is missing.
LAYOUT = 'README, "Data sets", says what goes there'
FEWER_POINTS = "--points 2048 reads modelnet40_ply_hdf5_2048 instead"

# Classes in the order of the labels. Of CO3D: folder -> class. Of ShapeNet-55: WordNet number -> class.
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


def load_modelnet(root: Path, split: str, points: int, download: bool, classes=None,
                  depth_only=False) -> Objects:
    """ModelNet40, or some of its classes.

    More than 2,048 points come from `modelnet40_normal_resampled`, as in the original, fewer from the
    official h5 files. `depth_only` (the original's "ModelNet40-depth") always reads these, and no pictures.
    Pictures are those in a `views` folder inside either. Deviation D24: without them depth views are
    rendered, where the original has shaded pictures.
    """
    if points > 2048 and not depth_only:
        archive, folder, read = "modelnet40-8192", root / "modelnet40_normal_resampled", read_resampled
    else:
        archive, folder, read = "modelnet40", root / "modelnet40_ply_hdf5_2048", read_modelnet_h5
    if not folder.exists():
        unpack(fetch_published(archive, root, download), folder)
    objects = read(folder, split)
    print(f"reading {folder}: {len(objects)} {split} objects of {objects.points.shape[1]} points", flush=True)
    unnamed = objects.names == [str(i) for i in range(len(objects))]
    if classes is not None:
        objects = only_classes(objects, classes)
    if depth_only:
        return objects

    views = folder / "views"
    if unnamed and views.is_dir():
        raise UserError(f"{folder} has views, but no names of objects; expected h5 `name` or *_id2file.json")
    objects.images = find_photographs(views, objects.names)
    if objects.images is None:
        say_once(f"no {views}: depth views are rendered; the original uses shaded pictures")
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


def read_resampled(folder: Path, split: str) -> Objects:
    """ModelNet40 as `modelnet40_normal_resampled` has it, 10,000 points an object.

    The points of a file are in the order of farthest point sampling: in both files that were looked at, the
    first k are further apart than k random ones, for k = 256 to 8,192. So the first 8,192 are farthest
    points, as ULIP's protocol takes, and the same every time.
    Text files are slow: they are read once, into a cache file beside the folder.
    """
    class_names = read_lines(folder / "modelnet40_shape_names.txt", FEWER_POINTS)
    listed = folder / f"modelnet40_{split}.txt"
    names = read_lines(listed, FEWER_POINTS)
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    with reading(listed, "expected names CLASS_NUMBER of classes in modelnet40_shape_names.txt"):
        labels = [label_of[name.rpartition("_")[0]] for name in names]

    cache = folder.with_name(f"{folder.name}-{split}.h5")
    with lock(cache):
        if not cache.exists() or read_names(cache) != names:
            cache_resampled(cache, folder, names, labels)
    clouds, labels, names = read_h5(cache, len(class_names))
    return Objects(clouds, labels, [name.replace("_", " ") for name in class_names], names=names)


def read_names(cache: Path) -> list[str]:
    """The names of the objects in an h5 file of ours."""
    with reading(cache, "remove it, and it is made again"), h5py.File(cache) as file:
        return [name.decode() for name in file["name"]]


def cache_resampled(cache: Path, folder: Path, names: list[str], labels: list[int]):
    """Read a text file for each name, in parallel, into one h5 file. It appears whole, or not at all."""
    files = [folder / name.rpartition("_")[0] / f"{name}.txt" for name in names]
    part = cache.with_name(f".{cache.name}.part")
    workers = ProcessPoolExecutor(min(8, os.cpu_count()), initializer=end_with_parent)
    try:
        with h5py.File(part, "w") as file:
            clouds = workers.map(read_resampled_text, files, chunksize=16)
            bar = tqdm(clouds, f"reading {folder.name} once", len(files), unit="object", disable=None)
            data = None
            for i, cloud in enumerate(bar):
                if data is None:
                    data = file.create_dataset("data", (len(files), *cloud.shape), np.float32)
                if cloud.shape != data.shape[1:]:
                    raise UserError(f"{files[i]} has {len(cloud)} points, {files[0]} has {data.shape[1]}; "
                                    "expected equally many; fetch it again")
                data[i] = cloud
            file.update(label=labels, name=[name.encode() for name in names])
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # before the rename, for the case that the power fails
        os.replace(part, cache)
    finally:
        workers.shutdown(cancel_futures=True)  # a bad file or Ctrl-C need not wait for the other files
        part.unlink(missing_ok=True)


def end_with_parent():
    """In a worker process: leave Ctrl-C to the parent, and end when it ends, even if it is killed. Otherwise
    the worker would wait for work for ever, and may hold the lock that it inherits.
    """
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()


def read_resampled_text(path: Path) -> np.ndarray:
    """Points (P, 3) of a file of lines x,y,z,nx,ny,nz; from y up to z up, as in h5 files."""
    with reading(path, "expected lines x,y,z,nx,ny,nz; fetch it again", FEWER_POINTS):
        x, y, z = np.loadtxt(path, np.float32, delimiter=",", usecols=(0, 1, 2), ndmin=2).T
    return np.stack([-x, z, y], axis=1)


@lru_cache
def say_once(line: str):
    """Print a line that holds for both splits of a data set."""
    print(line, flush=True)


def only_classes(objects: Objects, classes: tuple[str, ...]) -> Objects:
    """The objects of some classes, which become all there are, in the order given."""
    new_label = [classes.index(name) if name in classes else -1 for name in objects.class_names]
    labels = torch.tensor(new_label)[objects.labels]
    objects = replace(objects, labels=labels, class_names=list(classes))
    return objects.pick((labels >= 0).nonzero()[:, 0])


def load_scanobjectnn(root: Path, split: str, _points, download: bool, part="main_split",
                      suffix="") -> Objects:
    """ScanObjectNN, one of its variants: real indoor scans in its authors' h5 files."""
    folder = root / "scanobjectnn" / "h5_files"
    if not folder.exists():
        archive = fetch_published("scanobjectnn", root, download)
        unpack(archive, folder, DOWNLOADS["scanobjectnn"]["members"])
    file_of = {"train": f"training_objectdataset{suffix}.h5", "test": f"test_objectdataset{suffix}.h5"}
    clouds, labels, _ = read_h5(folder / part / file_of[split], len(SCANOBJECTNN))
    return Objects(clouds, labels, SCANOBJECTNN)


def read_h5(path: Path, classes: int) -> tuple[Tensor, Tensor, list | None]:
    """Clouds (N, P, 3), labels (N,) and, if there are any, names of an h5 file.

    Clouds in PointNet's own files are y up and are turned; such files are told by the normals they hold.
    Raises: UserError naming the file and what it holds instead.
    """
    with reading(path, "expected data (N, P, 3) and label; fetch it again", LAYOUT), h5py.File(path) as file:
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
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"label {labels.max()} in {path}, but there are {classes} classes; fetch it again")
    return clouds, labels, names


def load_redwood(root: Path, split: str, _points, _download) -> Objects:
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


def load_co3d(root: Path, split: str, _points, _download) -> Objects:
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


def load_shapenet55(root: Path, split: str, _points, _download) -> Objects:
    """Point-BERT's ShapeNet-55, for pre-training: ShapeNet-55/{train,test}.txt, shapenet_pc/*.npy."""
    listed = root / "ShapeNet-55" / f"{split}.txt"
    names = read_lines(listed, "needs ShapeNet's form: https://huggingface.co/datasets/ShapeNet/ShapeNetCore")
    label_of = {synset: label for label, synset in enumerate(SHAPENET55)}
    with reading(listed, "expected names that begin with the WordNet number of one of the 55 classes"):
        labels = torch.tensor([label_of[name.split("-")[0]] for name in names])
    files = [root / "shapenet_pc" / name for name in names]
    return Objects(files, labels, list(SHAPENET55.values()), names=names)


def load_folder(folder: Path, split: str) -> Objects:
    """A folder of the user's own: classes.txt, {train,test}/[CLASS/]OBJECT.EXT, views/OBJECT/*.jpg if any.
    Without class folders there are no labels. An object is called OBJECT, or CLASS/OBJECT where objects of
    two classes have one name.
    """
    listed, inside = folder / "classes.txt", folder / split
    class_names = clean_class_names(read_lines(listed), str(listed))
    files = find_objects(inside)
    if not files:
        raise FileNotFoundError(f"no objects in {inside}; expected files {' '.join(CLOUDS + MESHES)}")

    owners = [file.parent.name for file in files if file.parent != inside]
    label_of = {class_key(name): label for label, name in enumerate(class_names)}
    unknown = sorted({printable(owner) for owner in owners if class_key(owner) not in label_of})
    if unknown or 0 < len(owners) < len(files):
        raise UserError(f"{inside} has objects in {unknown or 'folders and outside'}; "
                        f"expected folders named as in {listed}, or none at all")
    labels = torch.tensor([label_of[class_key(owner)] for owner in owners]) if owners else None

    has_views = (folder / "views").is_dir()
    names = [printable(file.stem) for file in files]
    if labels is not None and not has_views and len(set(names)) < len(names):
        # They are numbered anew in each class.
        names = [f"{printable(file.parent.name)}/{name}" for file, name in zip(files, names)]
    repeated = [name for name, count in Counter(map(composed, names)).items() if count > 1]
    if repeated:
        raise UserError(f"two objects of {inside} are called {repeated[0]}; rename one")
    images = None
    if has_views:
        other = folder / {"train": "test", "test": "train"}[split]
        others = [file.stem for file in files_below(other) if file.suffix.lower() in CLOUDS + MESHES]
        shared = sorted({*map(composed, names)} & {*map(composed, others)})
        if shared:
            raise UserError(f"{shared[0]} is an object of {inside} and of {other}, so its pictures could be "
                            "of either; rename one")
        images = find_photographs(folder / "views", names, others)
    return Objects(files, labels, class_names, names=names, images=images)


def find_objects(inside: Path) -> list[Path]:
    """The files below a folder that are clouds or meshes; one line on stderr counts the others. A .txt beside
    a mesh of its name is a caption.
    """
    files, ignored = [], Counter()
    every_file = files_below(inside)
    meshes = {file.with_suffix("") for file in every_file if file.suffix.lower() in MESHES}
    for file in every_file:
        suffix = file.suffix.lower()
        if suffix in CLOUDS + MESHES and not (suffix == ".txt" and file.with_suffix("") in meshes):
            files.append(file)
        else:
            ignored[suffix or "without extension"] += 1
    if ignored:
        noun = "file" if ignored.total() == 1 else "files"
        print(f"warning: ignored {ignored.total()} {noun} in {inside}: {listed_counts(ignored)}; convert "
              "what is an object, for example to .ply", file=sys.stderr)
    return files


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
    "shapenet55": dict(CAD, load=load_shapenet55, up="y", templates="3d", points=8192),
}


def dataset_row(name: str) -> dict:
    """The row of DATASETS for a data set. A user's folder usually holds scans, so it has ScanObjectNN's
    points, threshold and point weight. It is z up, and has texts of photographs if it has `views`.
    """
    templates = "photo" if (Path(name) / "views").is_dir() else "depth"
    return DATASETS.get(name) or dict(SCANS, up="z", separate=[0.82, 0.82], templates=templates)


def load_dataset(name: str, root: str | Path, split: str, points: int = 1024, domain: str | None = None,
                 download: bool = True, up: str | None = None) -> Objects:
    """Objects of a data set, or of a user's folder: z up, in the unit sphere, `points` points a cloud.

    name: one of DATASETS, or a folder. root: the folder that holds the data sets. split: "train" or "test".
    domain: "target" shows objects as a scanner would see them (see scan), "source" as they are; None is what
    the data set usually is: `shapes` scanned, all others as they are.
    download: fetch what is missing and needs no form. up: the axis that points upwards in the files.
    Raises: UserError or OSError for data that are missing or wrong.
    """
    folder = Path(name)
    if name not in DATASETS and not folder.is_dir():
        close = difflib.get_close_matches(name.lower(), DATASETS, 1)
        question = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown data set {name!r}; {question}There are {', '.join(DATASETS)}, "
                        "and any folder of your own")
    if name == "shapes":
        count, seed = {"train": (2000, 1), "test": (500, 2)}[split]
        objects = sample_shapes(count, seed, domain or "target", points)
        differs = domain == "source"
    else:
        if name not in DATASETS and not (folder / split).is_dir():
            split = "train"  # a folder without `test` is tested on what it is trained on
        objects = load_clouds(name, Path(root), split, points, domain == "target", download, up)
        differs = domain == "target"
    objects.name = f"{folder.name}-{domain}" if differs else folder.name
    objects.split = split
    return objects


def load_clouds(name: str, root: Path, split: str, points: int, scanned: bool, download: bool,
                up: str | None) -> Objects:
    """Objects of files, upright in the unit sphere, as they are or as a scanner would see them."""
    row = dataset_row(name)
    if name in DATASETS:
        objects = row["load"](root, split, points, download)
    else:
        objects = load_folder(Path(name), split)
    max_points = 3 * points if scanned else points  # a scan draws from what it sees, with replacement
    up = up or row["up"]
    if isinstance(objects.points, list):
        objects.points = read_objects(objects.points, points, max_points, up)
        up = "z"  # each file was turned by itself: glTF's standard says what points upwards in it
    available = objects.points.shape[1]
    if available < points:
        raise UserError(f"{name} has {available} points, --points is {points}; lower it")
    objects.points = to_unit_sphere(objects.points[:, :max_points], objects.names, up)
    if scanned:
        objects.points = scan(objects.points, points, seed=("train", "test").index(split))
    return objects


# ------ Files of single objects -----------------------------------------------------------------------------
# A file is read as its author meant it, or refused with what was found: a wrong guess would be named with
# confidence. The readers return float64, because coordinates on a map do not fit float32 until centred.
UP = {"z": ([0, 1, 2], [1, 1, 1]), "y": ([2, 0, 1], [1, 1, 1]), "-y": ([0, 2, 1], [1, 1, -1])}
GLTF = (".glb", ".gltf")
MESHES = (".off", ".obj", ".ply", ".stl", *GLTF)
CLOUDS = (".npy", ".txt", ".xyz", ".csv")


def to_z_up(points: Tensor, up: str) -> Tensor:
    """Rotate clouds (N, P, 3) whose axis `up` points upwards so that z does; no mirror image."""
    axes, signs = UP[up]
    return points if up == "z" else points[..., axes] * points.new_tensor(signs)


def read_object(path: Path, points: int, max_points: int | None = None, up: str = "z") -> np.ndarray:
    """Points of a cloud, or of a mesh's surface by area, upright, centred on their mean. -> (P, 3) float32

    The same file always gives the same points: choices are random, seeded by the file's name. A mesh gives
    `max_points` (default: `points`), a cloud that many at most. `up` is the axis that points upwards in the
    file, but in glTF y does, by its standard.
    Raises: UserError naming the file and what is wrong with it.
    """
    suffix, max_points = path.suffix.lower(), max_points or points
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the files in it, or give it as --dataset")
    if suffix not in CLOUDS + MESHES:
        raise UserError(f"{path} is not of a format that is read ({' '.join(CLOUDS + MESHES)}); convert it, "
                        "for example to .ply")
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to a file that is not there; mend or remove it")

    random = np.random.default_rng(zlib.crc32(os.fsencode(path.stem)))
    with reading(path, "repair or remove it"):
        if suffix in MESHES:
            cloud = read_mesh(path, max_points, random)
        else:
            cloud = read_npy(path) if suffix == ".npy" else read_text(path)
            refuse_coarse_steps(cloud)
        if len(cloud) == 0:
            raise ValueError("it holds no points")
        if not (np.abs(cloud) < 1e30).all():  # float32 ends at 3e38, the squares of a norm at 1e19
            count = (~(np.abs(cloud) < 1e30)).any(axis=1).sum()
            raise ValueError(f"{count} of its {len(cloud)} points have NaN or infinite coordinates")
        if (cloud == cloud[0]).all():
            raise ValueError("it has all its points in one place")
        refuse_points_that_mark_gaps(cloud)
    if len(cloud) < points:
        raise UserError(f"{path} has {len(cloud)} points, --points is {points}; lower it")

    cloud = cloud - cloud.mean(axis=0)
    cloud = to_z_up(torch.from_numpy(cloud), "y" if suffix in GLTF else up).numpy().astype(np.float32)
    return cloud if len(cloud) <= max_points else cloud[random.choice(len(cloud), max_points, replace=False)]


def refuse_coarse_steps(points: np.ndarray):
    """Raises: ValueError where coordinates (N, 3) far from 0 went through float32, which left a staircase."""
    if len(points) == 0 or not (np.abs(points) < 1e30).all():
        return  # refused later, for what it is
    extent = np.ptp(points, axis=0).max()
    step = np.spacing(np.float32(np.abs(points).max()))  # between two numbers of float32
    if 0 < extent < 100 * step and (points == points.astype(np.float32)).all():
        raise ValueError(f"it is {extent:.3g} long, and its coordinates have steps of {step:.3g}: float32 is "
                         "too coarse so far from 0; subtract an offset before saving")


def refuse_points_that_mark_gaps(cloud: np.ndarray):
    """Raises: ValueError where points (N, 3) are none of the object's: 0 0 0, or -9999, where a sensor saw
    nothing. In the unit sphere they would shrink the object.
    """
    zeros = (cloud == 0).all(axis=1).sum()
    if zeros > max(1, len(cloud) / 100):
        raise ValueError(f"{zeros} of its {len(cloud)} points are 0 0 0, as where a sensor saw nothing; "
                         "remove them")
    distance = np.linalg.norm(cloud - np.median(cloud, axis=0), axis=1)
    strays = (distance > 50 * np.median(distance)).sum()
    if 0 < np.median(distance) and strays:
        raise ValueError(f"{strays} of its {len(cloud)} points lie fifty times as far from its middle as "
                         "half of them; remove them")


def read_npy(path: Path) -> np.ndarray:
    """A NumPy array of one cloud: (N, 3 or more), (1, N, 3), organised (H, W, 3), or with fields x, y, z."""
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("it is an .npz archive; save one array with numpy.save")
    if array.dtype.names:
        fields = {name.lower(): name for name in array.dtype.names}
        if not {"x", "y", "z"} <= fields.keys():
            raise ValueError(f"it has fields {', '.join(array.dtype.names)}, expected x, y, z")
        array = np.stack([array[fields[axis]] for axis in "xyz"], axis=-1)
        array = array.reshape(-1, 3)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"it holds {array.dtype}, expected numbers")
    if array.dtype == np.uint8:
        raise ValueError("it holds bytes, as colours and pictures do; save coordinates as float32")

    shape, cloud = array.shape, array.astype(np.float64)
    if len(shape) == 3 and (1 in shape[:2] or shape[2] >= 3 and is_one_cloud(cloud[..., :3])):
        cloud = cloud.reshape(-1, shape[2])
    if cloud.ndim != 2 or cloud.shape[1] < 3:
        raise ValueError(f"its shape is {shape}, expected one cloud (N, 3); save each of several to a file")
    if 3 <= len(cloud) < cloud.shape[1]:
        raise ValueError(f"its shape is {shape}, expected (N, 3): it looks transposed")
    if cloud.shape[1] > 32:
        raise ValueError(f"its shape is {shape}, expected (N, 3) and a few more columns")
    if cloud.shape[1] > 3:
        refuse_other_columns(cloud[:, :3], cloud.shape[1])
    return cloud[:, :3]


def is_one_cloud(grid: np.ndarray) -> bool:
    """Whether an array (H, W, 3) is one organised cloud, and not H clouds of W points.

    In the picture of a depth camera neighbours are near: steps along and across the rows are small. A cloud
    that was only reshaped has rows like random samples of it, so that the mean of a row of W points has 1/W
    of the variance of all, in x and in x^2. Of separate clouds each has a mean and a spread of its own.
    """
    if not np.isfinite(grid).all():
        return True  # refused later, for what it is
    extent = np.ptp(grid.reshape(-1, 3), axis=0).max()
    steps = [np.median(np.abs(np.diff(grid, axis=axis)).max(axis=-1)) for axis in (0, 1)]
    if max(steps) < 0.05 * extent:
        return True
    moments = np.concatenate([grid, (grid - grid.mean(axis=(0, 1))) ** 2], axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):  # a flat cloud: 0 / 0, which is refused
        ratio = moments.mean(axis=1).var(axis=0) * grid.shape[1] / moments.var(axis=(0, 1))
    return bool(((0.4 < ratio) & (ratio < 2)).all())


# ------ Clouds as text
# A number with commas between thousands, and one with a decimal comma.
ENGLISH = re.compile(r"[-+]?(\d+|[1-9]\d{0,2}(,\d{3})+)?(\.\d*)?(e[-+]?\d+)?", re.IGNORECASE)
GERMAN = re.compile(r"[-+]?(\d+|[1-9]\d{0,2}(\.\d{3})+)?(,\d*)?(e[-+]?\d+)?", re.IGNORECASE)
# A header that begins with one of these names angles, normals, colours, a number, or north before east, which
# would be a mirror image; not x, y, z.
NOT_X = {"n", "north", "northing", "lat", "latitude", "lon", "longitude", "r", "range", "azimuth", "theta",
         "nx", "red", "i", "id", "index"}
NUMBER = re.compile(r"[-+]?[\d.,]*\d[\d.,]*(e[-+]?\d+)?|nan|[-+]?inf", re.IGNORECASE)


def read_text(path: Path) -> np.ndarray:
    """x, y, z of a table: the columns that its header names so, else the first three. -> (N, 3) float64

    Comments (# // %), a title, a count of the points and closing words may stand around the rows. Numbers
    have a decimal point, or a decimal comma where nothing else can be meant.
    """
    lines = [line.strip() for line in decode(path.read_bytes(), "replace").splitlines()]
    lines = [line for line in lines if line]
    table = [line for line in lines if not line.startswith(("#", "//", "%"))]
    if not table:
        raise ValueError("it holds no numbers")
    between = delimiter_of(table[len(table) // 2])
    width = len(split_row(table[len(table) // 2], between))

    start = next((k for k, line in enumerate(table) if is_row(split_row(line, between), width)), None)
    if start is None:
        raise ValueError("it has no line of three numbers")
    above = [split_row(line, between) for line in table[:start]]
    above = [cells for cells in above if len(cells) >= 3 and all(map(NUMBER.fullmatch, cells))]
    if len(above) > 1 or any("." in cell for cells in above for cell in cells):  # one line may hold counts
        raise ValueError(f"its first rows have {len(above[0])} columns, later ones have {width}")
    headers = lines[:lines.index(table[start])]
    body = table[start:]
    while is_remark(split_row(body[-1], between), width):
        body.pop()  # "end of file"
    if re.match(rf"{len(body) - 1}\b(?![.,]\d)", body[0]):
        body.pop(0)  # how many points follow

    named = named_columns(headers, between, width)
    columns = named or [0, 1, 2]
    try:  # five times faster, where nothing is left to understand
        if between == "," and not any("." in line for line in body):
            raise ValueError("may be decimal commas")
        cloud = np.loadtxt(body, delimiter=None if between == " " else between, ndmin=2)[:, columns]
    except ValueError:
        cloud = read_cells(body, between, width, columns)
    if named is None:
        refuse_other_columns(cloud, width)
    return cloud


def decode(raw: bytes, errors: str = "strict") -> str:
    """The text of UTF-8 or UTF-16, with or without a byte-order mark. errors: "replace" reads text of other
    encodings, too, for files in which only ASCII matters.
    """
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16")
    if b"\0" in raw:  # no text but UTF-16 holds zero bytes; that of ASCII has one in every pair
        for encoding in ("utf-16-le", "utf-16-be"):
            text = raw.decode(encoding, "replace")
            if text.isascii() and "\0" not in text:
                return text
        raise ValueError("it holds zero bytes, so it is no text")
    return raw.decode("utf-8-sig", errors)


def delimiter_of(line: str) -> str:
    """What stands between the columns of this row: a semicolon, tab, comma, or blank."""
    if ";" in line:
        return ";"
    if line.count("\t") >= 2:
        return "\t"
    words = line.split()
    is_decimal = len(words) >= 3 and all(
        NUMBER.fullmatch(word) and word[0] != "," and word[-1] != "," for word in words[:3])
    return " " if is_decimal or "," not in line else ","


def split_rows(lines: list[str], between: str):
    """The cells of each line, without quotes and blanks around them."""
    if between == " ":
        lines = [line.replace("\t", " ") for line in lines]
    if any("#" in line for line in lines):
        lines = [line.split("#")[0].strip() for line in lines]
    return csv.reader(lines, delimiter=between, skipinitialspace=True)


def split_row(line: str, between: str) -> list[str]:
    """The cells of one line."""
    return [cell.strip() for cell in next(split_rows([line], between), [])]


def is_row(cells: list[str], width: int) -> bool:
    """Whether these are cells of points, and not of a header: at least three numbers, or gaps for numbers."""
    numbers = sum(bool(NUMBER.fullmatch(cell)) for cell in cells)
    return len(cells) == width and numbers > 0 and numbers + cells.count("") >= 3


def is_remark(cells: list[str], width: int) -> bool:
    """Whether these are words after the points, and not a row that was cut off."""
    return not is_row(cells, width) and any(cell and not NUMBER.fullmatch(cell) for cell in cells)


def named_columns(headers: list[str], between: str, width: int) -> list[int] | None:
    """Which columns the header calls x, y, z; None where there is no header, so that the first three count.
    Raises: ValueError where a header names other things, or one of these twice.
    """
    unknown = None
    for lines_below, line in enumerate(reversed(headers)):
        by_cells, by_words = header_readings(line, between, width)
        # Further up, words may be those of a title. With commas between them they are names.
        is_header = lines_below == 0 or (between != " " and len(by_cells) == width)
        for names in (by_cells, by_words):
            if names == ["x", "y", "z"] and between == "," and width == 6:
                raise ValueError("its header names 3 columns, its rows have 6; write decimal points, or name "
                                 "all columns")
            if len(names) != width:
                continue
            if {"x", "y", "z"} <= set(names):
                if any(names.count(axis) > 1 for axis in "xyz"):
                    raise ValueError(f"its header names x, y or z twice: {', '.join(names)}")
                return [names.index(axis) for axis in "xyz"]
            # Just three columns are x, y, z whatever they are called, but for what NOT_X lists.
            if (is_header and width > 3) or names[0] in NOT_X:
                unknown = unknown or names
    if unknown:
        raise ValueError(f"its header names {', '.join(unknown)}; call the columns of coordinates x, y, z")
    return None


def header_readings(line: str, between: str, width: int) -> list[list[str]]:
    """The names in a line above the points, split as its rows are, and split at blanks and any separator.

    '# X [m]; "Y" [m]; Z [m]' -> x, y, z.
    """
    line = re.sub(r"^fields\s+", "", line.lstrip("#/% "), flags=re.IGNORECASE)  # as .pcd writes it
    line = re.sub(r"\s*(\[[^]]*\]|\([^)]*\))", "", line)  # units
    readings = []
    for words in (split_row(line, between), re.split(r"[,;\s]+", line)):
        names = [word.strip("\"' ").lower() for word in words]
        if len(names) == width + 1 and not names[-1]:  # a separator at the end
            names.pop()
        readings.append(names)
    return readings


def read_cells(lines: list[str], between: str, width: int, columns: list[int]) -> np.ndarray:
    """Three columns of a table with quotes, words or commas in its cells, or with an error to be named."""
    cells = []
    for number, row in enumerate(split_rows(lines, between), start=1):
        if len(row) != width:
            raise ValueError(f"row {number} has {len(row)} columns, others have {width}")
        cells += [row[column] for column in columns]
    return to_numbers(cells, comma_between=between == ",").reshape(-1, 3)


def to_numbers(cells: list[str], comma_between: bool) -> np.ndarray:
    """Numbers of cells x, y, z, x, ...; commas in them are understood where all can mean only one thing."""
    if comma_between and not any("." in cell for cell in cells):
        if any(re.fullmatch(r"[-+]?0\d+|-0", cell) for cell in cells):
            raise ValueError("commas stand within numbers and between them; separate columns by semicolons")
    if any("," in cell for cell in cells):
        is_english = all(ENGLISH.fullmatch(cell) for cell in cells)
        is_german = all(GERMAN.fullmatch(cell) for cell in cells)
        if is_english == is_german:
            raise ValueError("commas in its numbers may be decimal or of thousands; write decimal points")
        thousands, point = (",", ".") if is_english else (".", ",")
        cells = [cell.replace(thousands, "").replace(point, ".") for cell in cells]
    try:
        return np.array(list(map(float, cells)))
    except ValueError:
        at, cell = next((at, cell.strip()) for at, cell in enumerate(cells) if not is_float(cell))
        what = f"{cell!r} as" if cell else "no"
        raise ValueError(f"point {at // 3 + 1} has {what} {'xyz'[at % 3]}, expected a number") from None


def is_float(cell: str) -> bool:
    """Whether Python reads a number here."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def refuse_other_columns(first: np.ndarray, width: int):
    """Raises: ValueError where the first three of `width` columns (N, 3) cannot be coordinates."""
    advice = "; name the columns of coordinates x, y, z in a first line"
    whole = (first == first.round()).all(axis=0)
    column, count = first[:, 0], len(first)
    steps = np.diff(column)
    if count > 3 and np.isfinite(column).all():
        is_even = steps[0] != 0 and np.allclose(steps, steps[0], rtol=1e-3, atol=0)
        is_number = whole[0] and len(np.unique(column)) == count
        if is_even or is_number and ((steps > 0).all() or np.ptp(column) < 2 * count):
            raise ValueError(f"its first column counts the rows{advice}")
    if whole.all() and first.min() >= 0 and first.max() <= 255:
        raise ValueError(f"its first three columns look like colours, whole numbers from 0 to 255{advice}")
    if width >= 6 and np.allclose(np.linalg.norm(first, axis=1), 1, atol=1e-3):
        raise ValueError(f"its first three columns look like normals, of length 1{advice}")
    if count > 3 and (np.ptp(column) == 0 or whole[0] and not whole[1:].any()):
        raise ValueError(f"its first column looks like a label{advice}")


# ------ Meshes
def read_mesh(path: Path, count: int, random) -> np.ndarray:
    """`count` points on a mesh's surface, by area, and the loose points of a glTF.
    A file without faces is a cloud of its points. -> (N, 3) float64
    """
    suffix, loose = path.suffix.lower(), np.empty((0, 3))
    if suffix in GLTF:
        vertices, faces, loose = read_gltf(path)
    elif suffix == ".stl":
        vertices, faces = read_stl(path)
    elif suffix == ".ply":
        vertices, faces = read_ply(path.read_bytes())
    else:
        text = decode(path.read_bytes(), "replace")
        vertices, faces = read_obj(text) if suffix == ".obj" else read_off(text)
    if len(faces) == 0:
        return np.concatenate([vertices, loose])

    refuse_wrong_vertices(faces, len(vertices))
    refuse_coarse_steps(vertices)
    is_joined = np.zeros(len(vertices), bool)
    is_joined[faces] = True
    joined = is_joined.sum()
    if joined < len(vertices) / 2 and suffix not in GLTF:  # meshes of one glTF share their vertices
        raise ValueError(f"its {len(faces)} faces join only {joined} of its {len(vertices)} points; export "
                         "the mesh alone, or the points without faces")
    return np.concatenate([sample_surface(vertices, faces, count, random), loose])


def sample_surface(vertices: np.ndarray, faces: np.ndarray, count: int, random) -> np.ndarray:
    """`count` points on triangles, by their area. vertices (V, 3), faces (F, 3) -> (count, 3)
    Raises: ValueError where the triangles have no area, or NaN or infinite coordinates.
    """
    import trimesh  # here: only meshes need it
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    corners = mesh.triangles.reshape(-1, 3)
    if not np.isfinite(corners).all():
        raise ValueError("its faces have NaN or infinite coordinates")
    if mesh.area <= 1e-9 * np.ptp(corners, axis=0).max() ** 2:
        raise ValueError("its faces have no area; export points as a cloud, without faces")
    return trimesh.sample.sample_surface(mesh, count, seed=random)[0]


def read_gltf(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices and triangles of all meshes of a glTF scene, where it puts them, and the points of its clouds.
    Raises: ValueError that names what trimesh would read as zeros, or skip.
    """
    import trimesh
    raw = path.read_bytes()
    tree = json.loads(raw[20:20 + int.from_bytes(raw[12:16], "little")] if raw[:4] == b"glTF" else raw)
    harmless = ("KHR_materials", "KHR_texture", "KHR_lights", "KHR_xmp", "EXT_texture", "MSFT_texture")
    for name in tree.get("extensionsRequired", []):
        if not name.startswith(harmless):
            raise ValueError(f"it needs the glTF extension {name}, which is not read; export it without "
                             "compression, quantisation and instances")
    posed = [mesh for mesh in tree.get("meshes", []) if any(mesh.get("weights", []))]
    if tree.get("skins") or posed or "EXT_mesh_gpu_instancing" in tree.get("extensionsUsed", []):
        raise ValueError("it holds a skeleton, morph targets or instances; export it as it stands, as one "
                         "mesh")
    for mesh in tree.get("meshes", []):
        for primitive in mesh["primitives"]:
            used = [primitive["attributes"]["POSITION"], primitive.get("indices")]
            position, *indices = [tree["accessors"][k] for k in used if k is not None]
            if position["componentType"] != 5126:  # the standard's number of float32
                raise ValueError("its coordinates are quantised (KHR_mesh_quantization); export floats")
            if any("bufferView" not in accessor or "sparse" in accessor for accessor in (position, *indices)):
                raise ValueError("its coordinates are compressed or sparse; export them plainly")
            if primitive.get("mode") == 6:
                raise ValueError("it holds triangle fans; export triangles")

    scene = trimesh.load(path, file_type=path.suffix[1:].lower(), process=False, skip_materials=True)
    parts = scene.dump() if isinstance(scene, trimesh.Scene) else [scene]
    meshes = [part for part in parts if isinstance(part, trimesh.Trimesh)]
    clouds = [part.vertices for part in parts if isinstance(part, trimesh.PointCloud)]
    mesh = trimesh.util.concatenate(meshes) if meshes else trimesh.Trimesh()
    return mesh.vertices, mesh.faces, np.concatenate([np.empty((0, 3)), *clouds])


def read_stl(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) and triangles (F, 3) of an STL file, of all its solids."""
    import trimesh
    raw = path.read_bytes()
    is_binary = len(raw) == 84 + 50 * int.from_bytes(raw[80:84], "little")
    if not is_binary:
        is_text = b"\0" not in raw or raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = decode(raw, "replace") if is_text else ""
        if not text.rstrip().rpartition("\n")[2].lstrip().lower().startswith("endsolid"):
            raise ValueError("it has not the length it declares, nor endsolid at its end; it was cut off")
        raw = text.encode("ascii", "replace")  # names of solids come in all encodings
    mesh = trimesh.load(io.BytesIO(raw), file_type="stl", process=False)
    mesh = mesh.to_mesh() if isinstance(mesh, trimesh.Scene) else mesh
    if len(getattr(mesh, "faces", ())) == 0:
        raise ValueError("it holds no triangles; export it again")
    return mesh.vertices, mesh.faces


def read_ply(raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) and triangles (F, 3) of a PLY file."""
    import trimesh
    end = raw.find(b"end_header")
    if not raw.startswith(b"ply") or end < 0:
        raise ValueError("it has no PLY header")
    header = re.sub(rb"[\x80-\xff]", b"?", raw[:end])  # comments come in all encodings
    raw = header + raw[end:]
    elements = re.findall(r"^element\s+(\w+)\s+(\d+)", header.decode(), re.MULTILINE)
    counts = {name: int(count) for name, count in elements}
    if "vertex" not in counts:
        raise ValueError("it has no element called vertex; export it as a cloud or as triangles")
    if counts.get("tristrips"):
        raise ValueError("it holds triangle strips; export it as triangles")
    if counts.get("edge") and not counts.get("face"):
        raise ValueError("it holds edges and no faces; export it as triangles")
    try:
        # fix_texture: it would split vertices where the corners of faces have texture coordinates.
        mesh = trimesh.load(io.BytesIO(raw), file_type="ply", process=False, skip_materials=True,
                            fix_texture=False)
        vertices, faces = mesh.vertices, getattr(mesh, "faces", np.empty((0, 3), np.int64))
        if len(faces) > counts.get("face", 0):  # cut up by trimesh, which does not look for notches
            vertices, faces = read_mixed_ply(raw)
    except Exception:  # triangles and quads mixed, or a file that plyfile's message names better
        vertices, faces = read_mixed_ply(raw)
    if len(vertices) != counts.get("vertex", 0) or len(faces) < counts.get("face", 0):
        raise ValueError(f"it declares {counts}, but holds {len(vertices)} points and {len(faces)} faces")
    return vertices, faces


def read_mixed_ply(raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """As read_ply, slower, but for faces of different numbers of corners, as Blender exports them."""
    import plyfile
    file = plyfile.PlyData.read(io.BytesIO(raw))
    vertices = np.stack([file["vertex"][axis] for axis in "xyz"], axis=-1).astype(np.float64)
    names = [one.name for element in file.elements if element.name == "face" for one in element.properties]
    name = next((name for name in ("vertex_indices", "vertex_index") if name in names), None)
    return vertices, fan(list(file["face"][name]) if name else [], vertices)


def read_obj(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) and triangles (F, 3) of Wavefront's OBJ, whatever its groups and materials. An index
    counts from 1, a negative one backwards from the last vertex *so far*.
    """
    vertices, polygons, has_lines = [], [], False
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        words = line.split()
        keyword = words[0] if words else ""
        if keyword == "v":
            vertices.append(line.split(None, 1)[1])
        elif keyword == "f":
            words = line.split("#")[0].split()[1:]
            corners = [int(word.split("/", 1)[0]) for word in words]
            polygons.append([i - 1 if i >= 0 else len(vertices) + i for i in corners])
        elif keyword in ("l", "curv", "surf"):
            has_lines = True
    if has_lines and not polygons:
        raise ValueError("it holds lines or curves and no faces; export it as triangles")
    vertices = coordinates(vertices)
    return vertices, fan(polygons, vertices)


def read_off(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) and triangles (F, 3) of an OFF file, also of one whose counts touch the word OFF, as in
    ModelNet.
    """
    text = re.sub(r"#.*", "", text)
    header = re.match(r"\s*(?:(?:ST)?C?N?OFF)?\s*(\d+)\s+(\d+)", text, re.IGNORECASE)
    if header is None:
        raise ValueError("it has no header, expected OFF and the numbers of points and faces")
    count, faces = int(header[1]), int(header[2])
    lines = [line for line in text[header.end():].splitlines()[1:] if line.strip()]
    polygons, is_whole = [], len(lines) >= count + faces
    for line in lines[count:count + faces]:
        corners, *words = line.split()
        polygons.append([int(word) for word in words[:int(corners)]])
        is_whole = is_whole and len(words) >= int(corners)
    if not is_whole:
        raise ValueError(f"it declares {count} points and {faces} faces, but holds fewer; it was cut off")
    vertices = coordinates(lines[:count])
    return vertices, fan(polygons, vertices)


def coordinates(lines: list[str]) -> np.ndarray:
    """The first three numbers of each line. -> (N, 3) float64"""
    return np.loadtxt(lines, usecols=(0, 1, 2), ndmin=2) if lines else np.empty((0, 3))


def fan(polygons: list, vertices: np.ndarray) -> np.ndarray:
    """Triangles (F, 3) of polygons: one corner with each two that follow one another.

    It is the first corner from which no triangle is turned over, so that a notch stays open.
    Raises: ValueError where there is no such corner, or a corner is no vertex.
    """
    if all(len(polygon) == 3 for polygon in polygons):
        return np.array(polygons, np.int64).reshape(-1, 3)
    refuse_wrong_vertices(np.array([i for polygon in polygons for i in polygon]), len(vertices))
    triangles = [np.empty((0, 3), np.int64)]
    for corners in sorted({len(polygon) for polygon in polygons} - {0, 1, 2}):
        left = np.array([polygon for polygon in polygons if len(polygon) == corners], np.int64)
        for _ in range(corners):
            fans = np.stack([left[:, [0, k, k + 1]] for k in range(1, corners - 1)], axis=1)
            first, second, third = np.moveaxis(vertices[fans], 2, 0)  # each (F, corners - 2, 3)
            normals = np.cross(second - first, third - first)
            normal = normals.sum(axis=1, keepdims=True)  # the polygon's, the same from every corner
            along = (normals * normal).sum(axis=-1) / (normal**2).sum(axis=-1).clip(min=1e-300)
            is_right = ~(along < -1e-6).any(axis=1)  # NaN is refused later, for what it is
            triangles.append(fans[is_right].reshape(-1, 3))
            left = np.roll(left[~is_right], -1, axis=1)
        if len(left):
            raise ValueError(f"a face of {corners} corners has notches; export triangles")
    return np.concatenate(triangles)


def refuse_wrong_vertices(corners: np.ndarray, count: int):
    """Raises: ValueError where corners of faces name none of `count` vertices."""
    if not 0 <= corners.min() <= corners.max() < count:
        wrong = corners.min() if corners.min() < 0 else corners.max()
        raise ValueError(f"a face names vertex {wrong} (from 0), but there are {count}")


# ------ Many files
def read_objects(files: list[Path], points: int, max_points: int, up: str) -> Tensor:
    """Clouds of one size, at least `points` and at most `max_points`, one of each file. -> (N, P, 3)
    Raises: UserError that names all files that cannot be read, ten at most.
    """
    clouds, problems = [], []
    for path in tqdm(files, "reading", unit="object", disable=None):  # None: only where a person looks on
        try:
            clouds.append(read_object(path, points, max_points, up))
        except (UserError, OSError) as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"{len(problems)} of {len(files)} files cannot be used:{listed}{more}")

    count, random = min(map(len, clouds)), np.random.default_rng(0)
    clouds = [cloud if len(cloud) == count else cloud[random.choice(len(cloud), count, replace=False)]
              for cloud in clouds]
    return torch.from_numpy(np.stack(clouds))


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


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted, through links; without hidden ones and what systems leave there."""
    def is_meant(name: str) -> bool:
        return not name.startswith(".") and name not in ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir")

    def is_loop(place: str, name: str) -> bool:
        above, linked = os.path.realpath(place), os.path.realpath(os.path.join(place, name))
        return (above + os.sep).startswith(linked + os.sep)

    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if is_meant(name) and not is_loop(place, name)]
        files += [Path(place, name) for name in names if is_meant(name)]
    return sorted(files)


def printable(name: str) -> str:
    """The name of a file in characters that can be written; bytes that are no UTF-8 become U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")


def find_photographs(folder: Path, names: list[str], others: list[str] = ()) -> list | None:
    """A sorted list of each object's photographs, None without the folder.

    A picture belongs to the object that one of the folders around it is called, or else to that with the
    longest name that its own name begins with: Chair.001.png to Chair.001, not to Chair. `others` are names
    of objects of the other split, whose pictures may lie there, too. Maps of depth, masks and normals beside
    the photographs are skipped, where a folder or file is called so.
    """
    if not folder.is_dir():
        return None
    paths_of = {composed(name): [] for name in [*names, *others]}
    ignored = Counter()
    for path in files_below(folder):
        owner = owner_of(path.relative_to(folder), paths_of)
        if owner is None:
            continue
        if path.suffix.lower() in PHOTOGRAPHS:
            paths_of[owner].append(path)
        else:
            ignored[path.suffix.lower() or "without extension"] += 1

    missing = [name for name in names if not paths_of[composed(name)]]
    unread = f"; {listed_counts(ignored)} there are not read, convert them to .jpg" if ignored else ""
    if len(missing) == len(names):
        raise UserError(f"{folder} has no picture of any object; expected {folder / names[0]}/*.jpg{unread}")
    if missing:
        print(f"warning: {folder} has no picture of {len(missing)} of {len(names)} objects, for example "
              f"{missing[0]}; they get a rendered depth view{unread}", file=sys.stderr)
    return [paths_of[composed(name)] for name in names]


# What pictures show that are no photographs, in the names of folders and files.
MAPS = {"depth", "depths", "mask", "masks", "normal", "normals", "albedo", "seg", "segmentation", "alpha"}


def owner_of(path: Path, names) -> str | None:
    """Which of these objects a picture belongs to; None for pictures of others and for maps beside them."""
    *folders, file = [composed(part) for part in path.parts]
    ends = [match.start() for match in re.finditer(r"[._ -]|$", file)]
    candidates = [*reversed(folders), *(file[:end] for end in reversed(ends))]
    owner = next((name for name in candidates if name in names), None)
    stem = Path(file).stem
    rest = stem.removeprefix(owner or "")
    kinds = re.split("[._ -]", rest.lower())
    if rest == stem and len(kinds) == 1:
        kinds = []  # a picture that is only called mask.png may be of a mask
    for folder in folders:
        kinds += re.split("[._ -]", folder.lower()) if folder != owner else []
    return None if MAPS & {*kinds} else owner


def composed(name: str) -> str:
    """A name with its accents composed (Unicode NFC), as not all systems write it."""
    return unicodedata.normalize("NFC", printable(name))


def listed_counts(counts: Counter) -> str:
    """As "10 .pcd, 2 .las"."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


# ------ Class names
def clean_class_names(names: list[str], where: str) -> list[str]:
    """Class names for the text tower: composed (NFC), with single blanks for `_` and for runs of blanks,
    without marks that nobody sees.
    Raises: UserError where there are fewer than two, or two that the tower sees as one, or other than names.
    """
    cleaned = []
    for name in names:
        seen = "".join(mark for mark in composed(name) if unicodedata.category(mark) != "Cf")  # as a BOM
        cleaned.append(" ".join(seen.replace("_", " ").split()))
    wrong = [name for name, as_given in zip(cleaned, names)
             if not name or name[0] in "#['\"" or name[-1] in ",;]'\"" or name.startswith("- ")
             or " #" in name or "\t" in as_given.strip()]
    numbered = r"\d+[.,:;)\s].*|.*[,;:]\s*\d+"
    if wrong or all(re.fullmatch(numbered, name) for name in cleaned):
        raise UserError(f"{where} has {(wrong or cleaned)[0]!r}; expected a class name alone, without "
                        "quotes, numbers, columns and comments")
    keys = [class_key(name) for name in cleaned]
    twice = [name for name, key in zip(cleaned, keys) if keys.count(key) > 1]
    if twice or len(cleaned) < 2:
        problem = f"{twice[:4]}, which are one to the text tower" if twice else cleaned
        raise UserError(f"{where} has {problem}; expected two or more different names")
    return cleaned


def class_key(name: str) -> str:
    """What is compared of a class name: the text tower reads lower case, folders may have `_` for a blank."""
    return " ".join(composed(name).replace("_", " ").lower().split())


# ------ Text files
def read_lines(path: Path, missing: str = LAYOUT) -> list[str]:
    """Lines of a text file that has to be there and say something, without empty ones."""
    with reading(path, "expected lines of text, saved as UTF-8", missing):
        lines = [line.strip() for line in decode(path.read_bytes()).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty; {LAYOUT}")
    return lines


@contextmanager
def reading(path: Path, repair: str, missing: str = LAYOUT):
    """To read a file under (`with`): whatever its parser raises becomes a UserError that names it.
    Raises: FileNotFoundError if it is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; {missing}")
    try:
        yield
    except Exception as error:  # parsers of many formats, each with errors of its own
        problem = str(error) or repr(error)
        advice = "" if "; " in problem else f"; {repair}"  # our own errors say what to do
        raise UserError(f"cannot read {path}: {problem}{advice}") from error


# ------ Fetching: the hub's copy first, then plain addresses ------------------------------------------------
ULIP2 = "ULIP-2-PointBERT-8k-xyz-pc-slip_vit_b-objaverse-pretrained.pt"
# file: its place below the folder `option` (--data-root if none is named). terms: said before it is fetched.
# sources: addresses, or (data set of the Hugging Face hub, file in it, revision). otherwise: what else helps.
# sha256, and members (sha256 of files inside an archive): where several public projects agree on them.
DOWNLOADS = {
    "ulip2": dict(
        file=ULIP2,
        terms="BSD-3-Clause, 8k-point Objaverse model of ULIP-2",
        option="--cache",
        sources=[("SFXX/ulip", f"ULIP-2/pretrained_models/{ULIP2}", None)]),
    "ulip1": dict(
        file="checkpoint_pointbert.pt",
        terms="BSD-3-Clause, ULIP-1 on ShapeNet-55",
        option="--cache",
        sources=[("SFXX/ulip",
                  "ULIP-1/pretrained_models/ckpt_zero-sho_classification/checkpoint_pointbert.pt", None)]),
    # No sha256 is published. The md5 of one public loader (46ed374f8ef5f7504ec4870298772ac2) is of no named
    # revision: a renewed archive would be refused for nothing. read_resampled checks lists and files instead.
    "modelnet40-8192": dict(
        file="modelnet40_normal_resampled.tar.gz",
        terms="1.6 GB, 7 GB unpacked, for academic research only",
        sources=[("Pointcept/modelnet40_normal_resampled-compressed", "modelnet40_normal_resampled.tar.gz",
                  None),
                 "https://shapenet.cs.stanford.edu/media/modelnet40_normal_resampled.zip"],
        otherwise=FEWER_POINTS),
    "modelnet40": dict(
        file="modelnet40_ply_hdf5_2048.zip",
        terms="435 MB, for academic research only",
        sources=[("Msun/modelnet40", "modelnet40_ply_hdf5_2048.zip",
                  "d5dc795541800feeb7a4b3bd3142729a0d2adf7a"),
                 "https://shapenet.cs.stanford.edu/media/modelnet40_ply_hdf5_2048.zip"],
        sha256="07670e237db72ece0f723b9abb571534c9ad655a6456b389646587dc72bb8bae"),
    "scanobjectnn": dict(
        file="scanobjectnn/h5_files.zip",
        terms="for research: hkust-vgd.github.io/scanobjectnn",
        sources=["http://hkust-vgd.ust.hk/scanobjectnn/h5_files.zip",
                 "https://github.com/ma-xu/pointMLP-pytorch/releases/download/dataset/h5_files.zip"],
        members={
            "h5_files/main_split/training_objectdataset.h5":
                "d334dd3e44556606b0c38560a6a2ed6b191c2e2fe6588f22e3f154d5cbdf3cb1",
            "h5_files/main_split/test_objectdataset.h5":
                "4465e207202fe9375e3c58d2e13bf44bddc1baa1fcb6b123b82f99e55353e22e",
            "h5_files/main_split/test_objectdataset_augmentedrot_scale75.h5":
                "f23822ee2f1e1d18331e91334d74adb10c8718d72d503bfa76ebe0a9348a7ea1",
            "h5_files/main_split_nobg/test_objectdataset.h5":
                "b7176ebd4b8f2218c8cca84b59617d96f5145d864924cc930b36eaf55931c9e1"}),
}


def fetch_published(name: str, folder: Path, allowed: bool = True) -> Path:
    """The file DOWNLOADS[name] in `folder`; if it is not there, from the first source that gives it.

    Raises: UserError, one line: what went wrong at each source, where the file is, where to put it.
    """
    row = DOWNLOADS[name]
    path = folder / row["file"]
    if path.exists():
        return path
    pages = [source if isinstance(source, str) else hub_page(*source) for source in row["sources"]]
    by_hand = (f"save {pages[0]} as {path}, or name the folder that has it with "
               f"{row.get('option', '--data-root')}; "
               + row.get("otherwise", "--dataset shapes --model tiny needs no file"))
    if not allowed:
        raise UserError(f"{path} is missing; leave out --no-download, or {by_hand}")

    print(f"fetching {path.name} ({row['terms']})", flush=True)
    reasons = []
    with lock(path):
        if path.exists():  # another process fetched it
            return path
        for source, page in zip(row["sources"], pages):
            try:
                return fetch(source, path, row.get("sha256"))
            except Exception as error:  # the hub, the network and the file system have many types of errors
                reason = (str(error).strip() or repr(error)).splitlines()[0]
                reasons.append(f"{page.split('/')[2]}: {reason[:200]}")
    raise UserError(f"cannot fetch {path.name} ({'; '.join(reasons)}); {by_hand}")


def hub_page(data_set: str, file: str, revision: str | None) -> str:
    """The address where a person finds a file of the Hugging Face hub."""
    return f"https://huggingface.co/datasets/{data_set}/blob/{revision or 'main'}/{file}"


def fetch(source: str | tuple, path: Path, sha256: str | None) -> Path:
    """A file from an address, to `path`, or from the Hugging Face hub, in the hub's own cache.

    Raises: whatever went wrong, at once where there is no network or HF_HUB_OFFLINE forbids to use it.
    ValueError or RuntimeError for bytes of another sha256, which are not kept.
    """
    if isinstance(source, str):
        refuse_if_offline()
        torch.hub.download_url_to_file(source, str(path), hash_prefix=sha256)
        return path

    data_set, file, revision = source
    place = dict(repo_type="dataset", revision=revision)
    try:  # one question before: without a network hf_hub_download asks for half a minute
        refuse_if_offline()
        get_hf_file_metadata(hf_hub_url(data_set, file, **place), timeout=10)
    except Exception as no_answer:
        try:
            cached = Path(hf_hub_download(data_set, file, **place, local_files_only=True))
        except OSError:  # nor is it in the cache
            raise no_answer from None
    else:
        cached = Path(hf_hub_download(data_set, file, **place))
    if sha256 and hashlib.sha256(cached.read_bytes()).hexdigest() != sha256:
        cached.resolve().unlink()
        raise ValueError("wrong sha256")
    return cached


def refuse_if_offline():
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")


def lock(path: Path, timeout: float = -1) -> FileLock:
    """To hold (`with`) while `path` is made: another process waits, or raises filelock.Timeout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"), timeout)


def unpack(archive: Path, folder: Path, members: dict | None = None):
    """Unpack a zip or tar.gz of `folder`, or of what goes into it. The folder appears whole, or not at all.

    members: sha256 of files in the archive.
    Raises: UserError naming an archive that is broken, or not its authors'.
    """
    part = folder.with_name(f".{folder.name}.part")
    with lock(folder):
        if folder.exists():
            return
        shutil.rmtree(part, ignore_errors=True)  # a killed process left it
        try:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as file:
                    file.extractall(part)  # strips `..`
            else:
                with tarfile.open(archive) as file:
                    file.extractall(part, filter="data")  # refuses `..`, links to the outside, devices
            for name, sha256 in (members or {}).items():
                if hashlib.sha256((part / name).read_bytes()).hexdigest() != sha256:
                    raise ValueError(f"{name} is not its authors' (sha256)")
            inner = part / folder.name
            os.replace(inner if inner.is_dir() else part, folder)
        except Exception as error:  # archives break in many ways, each with a type of its own
            raise UserError(f"cannot unpack {archive}: {error!r}; to fetch it again, remove it") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


# ------ shapes: ten classes of furniture, each a short program of solids ------------------------------------
# Lengths are roughly metres, the front faces -y. A piece of furniture is a list of parts; + joins pieces.
# The order of the random draws is part of the data: a line moved here makes other objects.
def part(kind: str, centre, size, tilt=(0.0, 0.0, 0.0), taper=1.0) -> list:
    """A piece of one solid, a list of one part.

    kind: box, tube (elliptic), ball, or bowl (the lower half of a ball). size: its full extents. tilt: turns
    about x, y, z around its centre. taper: how wide the top of a box or tube is, as a share of its bottom.
    """
    return [(kind, centre, size, tilt, taper)]


box, tube, ball, bowl = (partial(part, kind) for kind in ("box", "tube", "ball", "bowl"))
LEFT, RIGHT, CORNERS = (-1, 1), (1, 1), ((1, 1), (1, -1), (-1, 1), (-1, -1))


def mirrored(piece: list, *places) -> list:
    """The piece at each place: as it stands (1, 1), mirrored to the left (-1, 1), to the front (1, -1)."""
    return [(kind, (s * x, t * y, z), size, (t * a, s * b, s * t * c), taper)
            for s, t in places for kind, (x, y, z), size, (a, b, c), taper in piece]


def row(piece: list, n: int, x=0.0, y=0.0, z=0.0) -> list:
    """n copies, each a step (x, y, z) from the last; their middle is where the piece stood."""
    return [(kind, (cx + i * x, cy + i * y, cz + i * z), *rest)
            for i in np.arange(n) - (n - 1) / 2 for kind, (cx, cy, cz), *rest in piece]


def frame(w, d, z, high, thick) -> list:
    """Four boards around a w x d rectangle, centred at height z."""
    side, end = box((0, 0, z), (thick, d, high)), box((0, 0, z), (w, thick, high))
    return row(side, 2, x=w - thick) + row(end, 2, y=d - thick)


class Chance(np.random.Generator):
    """u(low, high) draws a number, u.pick one of several things, u.perhaps a piece or nothing."""

    __call__ = np.random.Generator.uniform

    def pick(self, *options):
        return options[self.integers(len(options))]

    def perhaps(self, chance: float, piece: list) -> list:
        return piece if self.random() < chance else []


def four_legs(u, w, d, h, thick) -> list:
    """Legs at the corners of a w x d top at height h: square or round, straight, tapered or splayed."""
    kind, splay, taper = u.pick(box, tube), u.pick(0.0, u(0.0, 0.2)), u(1, 2)
    leg = kind(((w - thick) / 2, (d - thick) / 2, h / 2), (thick, thick, h), (splay, -splay, 0), taper)
    return mirrored(leg, *CORNERS)


def pedestal(u, h, reach) -> list:
    """A central column on a disc or on four or six spokes."""
    n, thick = u.integers(2, 4), u(0.04, 0.14)
    disc = tube((0, 0, 0.02), (2 * reach, 2 * reach, 0.04), taper=u(0.3, 1))
    spokes = [box((0, 0, 0.04), (2 * reach, 0.05, 0.05), (0, 0, math.pi * i / n)) for i in range(n)]
    return tube((0, 0, h / 2), (thick, thick, h), taper=u(0.6, 1.4)) + u.pick(disc, sum(spokes, []))


def drawers(u, w, d, h, rows, columns, x=0.0, z=0.0) -> list:
    """A cabinet standing on z with rows x columns of drawer fronts, some with knobs or bars."""
    proud, gap, middle = u(0.005, 0.03), u(0.01, 0.04), z + h / 2
    grip = x, -d / 2 - proud - 0.02, middle
    front = box((x, -(d + proud) / 2, middle), (w / columns - gap, proud, h / rows - gap))
    front += u.pick([], ball(grip, (0.04, 0.04, 0.03)), box(grip, (0.3 * w / columns, 0.04, 0.03)))
    return box((x, 0, middle), (w, d, h)) + row(row(front, columns, x=w / columns), rows, z=h / rows)


def back_rest(u, w, h, y, z, thick) -> list:
    """A leaning back from height z up: a panel, upright or level slats, or curved."""
    n, lean = u.integers(2, 7), u(0, 0.3)
    centre, tilt, over = (0, y + lean * h / 2, z + h / 2), (-lean, 0, 0), lean * h
    panel = u.pick(box, box, tube)(centre, (w, thick, h), tilt)
    posts = row(box(centre, (0.04, thick, h), tilt), 2, x=w - 0.04)
    posts += box((0, y + over, z + h), (w, thick, 0.06), tilt)
    upright = row(box(centre, (0.35 * w / n, 0.7 * thick, h), tilt), n, x=w / n)
    level = row(box(centre, (w, 0.7 * thick, 0.45 * h / n), tilt), n, y=over / n, z=h / n)
    curve = [box((0.6 * w * math.sin(a), y - 0.5 * w * (1 - math.cos(a)), z + h / 2),
                 (0.24 * w, thick, h), (-lean, 0, -a)) for a in np.linspace(-0.7, 0.7, 5)]
    return u.pick(panel, posts + upright, posts + level, sum(curve, []))


def bathtub(u):
    w, d, h, wall, foot = u(1.3, 2.0), u(0.65, 1.0), u(0.4, 0.8), u(0.03, 0.12), u(0.05, 0.18)
    deep = 2 * (h - foot)
    trough = frame(w, d, h / 2, h, wall) + box((0, 0, h * u(0.08, 0.3)), (w, d, 0.03))
    sunk = frame(w, d, h / 2, h, wall) + frame(w, d, h, 0.02, 0.1) + bowl((0, 0, h), (0.9 * w, 0.9 * d, deep))
    shell = bowl((0, 0, h), (w, d, deep)) + bowl((0, 0, h), (w - wall, d - wall, 0.9 * deep))
    shell += u.perhaps(0.5, bowl((-0.3 * w, 0, 1.25 * h), (0.38 * w, 0.95 * d, h)))  # raised at one end
    plinth = tube((0, 0, 0.15 * h), (0.6 * w, 0.6 * d, 0.3 * h))
    claws = four_legs(u, 0.6 * w, 0.6 * d, foot + 0.2 * h, 0.06)
    tap = tube((0.42 * w, 0, h + 0.08), (0.04, 0.04, 0.18)) + box((0.38 * w, 0, h + 0.16), (0.14, 0.03, 0.03))
    return u.pick(trough, sunk, shell + plinth, shell + claws) + u.perhaps(0.4, tap)


def bed(u):
    w, d, base, soft, n = u(0.85, 2.0), u(1.85, 2.25), u(0.12, 0.4), u(0.12, 0.32), u.integers(1, 3)
    top, head, foot, up = base + soft, u(0.25, 0.9), u(0.05, 0.4), u(1.0, 2.0)
    legs = box((0, 0, 0.75 * base), (w, d, 0.5 * base)) + four_legs(u, w, d, base, u(0.05, 0.12))
    board = box((0, d / 2, (top + head) / 2), (w * u(0.98, 1.2), u(0.04, 0.14), top + head))
    arch = board + tube((0, d / 2, top + head), (0.9 * w, 0.5 * head, 0.08), (math.pi / 2, 0, 0))
    end = box((0, -d / 2, (top + foot) / 2), (w, u(0.04, 0.1), top + foot))
    pillow = u.pick(ball, box)((0, 0.38 * d, top + 0.05), (0.8 * w / n, 0.38, 0.14), (u(-0.4, 0), 0, 0))
    cover = box((0, -0.12 * d, base + 0.6 * soft), (1.04 * w, 0.74 * d, 1.1 * soft))
    bunk = box((0, 0, base + 1), (w, d, u(0.1, 0.25))) + four_legs(u, w, d, base + 1.3, 0.07)
    posts = four_legs(u, w, d, up, 0.07) + u.perhaps(0.7, frame(w, d, up, 0.05, 0.05))
    stands = row(box((0, d / 2 - 0.25, 0.25), (0.45, 0.4, 0.5)), 2, x=w + 0.6)
    return (box((0, 0, base + soft / 2), (0.97 * w, 0.97 * d, soft)) + u.perhaps(0.4, cover)
            + u.pick(legs, box((0, 0, base / 2), (w, d, base))) + u.perhaps(0.45, end)
            + u.perhaps(0.85, u.pick(board, board, arch, back_rest(u, w, head + soft, d / 2, base, 0.08)))
            + u.perhaps(0.8, row(pillow, n, x=w / n)) + u.perhaps(0.36, u.pick(bunk, posts, stands)))


def chair(u):
    w, d, seat, thin, high = u(0.4, 0.65), u(0.4, 0.65), u(0.36, 0.52), u(0.03, 0.14), u(0.15, 0.3)
    legs = four_legs(u, w, d, seat, u(0.025, 0.07))
    bars = row(box((0, 0, seat * u.pick(0.04, u(0.2, 0.6))), (0.035, d, 0.035)), 2, x=0.85 * w)
    block = box((0, 0, seat / 2), (w * u(0.8, 1), d * u(0.8, 1), seat))
    arm = box((0, 0, seat + high), (thin, d * u(0.7, 1), u(0.03, 0.08)))
    arm += box((0, -0.25 * d, seat + high / 2), (0.8 * thin, d * u.pick(0.1, 0.5), high))
    return (u.pick(box, box, tube)((0, 0, seat), (w, d, u(0.03, 0.14))) + u.perhaps(0.45, row(arm, 2, x=w))
            + back_rest(u, w * u(0.8, 1), u(0.3, 0.8), d / 2 - 0.03, seat, u(0.03, 0.1))
            + u.pick(legs, legs + bars, pedestal(u, seat, u(0.22, 0.36)), block))


def desk(u):
    w, d, h, wide, long = u(1.0, 2.0), u(0.5, 0.9), u(0.68, 0.82), u(0.25, 0.6), u(0.5, 1.1)
    x, y, deep, high = 0.47 * w, -(d + long) / 2, u(0.35, 0.6), u(0.3, 0.8)
    legs = row(box((x, 0, h / 2), (0.05, 0.05, h)), 2, y=0.84 * d)
    panel = box((x, 0, h / 2), (u(0.02, 0.07), d * u(0.8, 1), h))
    tall = drawers(u, wide, 0.92 * d, 0.96 * h, u.integers(2, 5), 1, (w - wide) / 2)
    hung = drawers(u, wide, 0.92 * d, 0.43 * h, u.integers(1, 4), 1, (w - wide) / 2, 0.55 * h) + legs
    wing = box(((w - deep) / 2, y, h), (deep, long, 0.04))
    wing += box(((w - deep) / 2, y - 0.4 * long, h / 2), (0.95 * deep, u(0.03, 0.4) * long, h))
    hutch = row(box((0, d / 2 - 0.13, h + high / 2), (0.03, 0.26, high)), 3, x=w / 2 - 0.02)
    hutch += row(box((0, d / 2 - 0.13, h + 0.75 * high), (w, 0.26, 0.03)), 2, z=high / 2)
    right, left = u.pick(tall, tall, hung) + u.perhaps(0.3, wing), u.pick(tall, hung, panel, legs)
    apron = box((0, d / 2 - 0.05, h * u(0.55, 0.8)), (0.95 * w, 0.03, 0.4 * h))
    whole = box((0, 0, h), (w, d, u(0.02, 0.07))) + right + mirrored(left, LEFT)
    return mirrored(whole + u.perhaps(0.65, apron) + u.perhaps(0.35, hutch), u.pick(LEFT, RIGHT))


def dresser(u):
    w, d, foot, high = u(0.5, 1.7), u(0.38, 0.6), u.pick(0.01, u(0.04, 0.2)), u(0.5, 0.9)
    wide = w > 0.9
    h, columns = u(0.65, 1.3) if wide else u(0.9, 1.7), u.integers(1, 4 if wide else 3)
    glass = u.pick(box, ball)((0, d / 2 - 0.04, h + high / 2), (w * u(0.5, 0.95), 0.05, high))
    top = u.perhaps(0.6, box((0, 0, h), (1.05 * w, 1.08 * d, 0.04)))
    legs = four_legs(u, w, d, foot, u(0.04, 0.1))
    return legs + top + drawers(u, w, d, h - foot, u.integers(3, 7), columns, z=foot) + u.perhaps(0.25, glass)


def monitor(u):
    w, thick, lift, deep = u(0.35, 0.75), u(0.015, 0.08), u(0.06, 0.25), u(0.2, 0.4)
    h = w / u(1.2, 1.9)
    middle = lift + h / 2
    cathode = box((0, 0.25 * deep, middle), (0.97 * w, 0.5 * deep, 0.97 * h))
    cathode += tube((0, 0.7 * deep, middle), (0.9 * w, 0.9 * h, 0.5 * deep), (-math.pi / 2, 0, 0), 0.7)
    bulge = u.pick(box, ball)((0, thick, middle - 0.02), (w * u(0.4, 0.8), 2 * thick, h * u(0.4, 0.7)))
    neck = u.pick(box, tube)((0, thick / 2 + 0.02, lift / 2 + 0.15 * h),
                             (u(0.03, 0.15), u(0.02, 0.06), lift + 0.3 * h), (u(-0.2, 0.1), 0, 0))
    foot = u.pick(box, tube)((0, 0.02, 0.015), (w * u(0.35, 0.7), u(0.14, 0.28), 0.03), taper=u(0.6, 1))
    return (box((0, 0, middle), (w, thick, h), (u(-0.2, 0.05), 0, 0)) + u.pick(cathode, bulge, [], [])
            + u.perhaps(0.94, neck + foot))


def night_stand(u):
    w, d, h = u(0.38, 0.68), u(0.34, 0.56), u(0.42, 0.75)
    foot = u.pick(0.01, u(0.04, 0.15), u(0.15, 0.5) * h)
    chest = drawers(u, w, d, h - foot, u.integers(1, 4), 1, z=foot) + four_legs(u, w, d, foot, u(0.03, 0.08))
    shelf = drawers(u, w, d, 0.3 * h, 1, 1, z=0.7 * h) + box((0, d / 2, 0.35 * h), (w, 0.02, 0.7 * h))
    shelf += row(box((0, 0, 0.35 * h), (0.03, d, 0.7 * h)), 2, x=w)
    board = box((0, 0, h * u(0.05, 0.35)), (0.97 * w, 0.97 * d, 0.03))
    top = box((0, 0, h), (w * u(1, 1.15), d * u(1, 1.15), u(0.02, 0.05)))
    lamp = tube((0, 0, h + 0.15), (0.04, 0.04, 0.3)) + tube((0, 0, h + 0.35), (0.28, 0.28, 0.2), taper=0.6)
    return u.pick(chest, chest, chest + board, shelf + board) + u.perhaps(0.7, top) + u.perhaps(0.07, lamp)


def sofa(u):
    w, d, seat, foot, soft = u(1.1, 2.5), u(0.75, 1.05), u(0.32, 0.48), u(0.02, 0.15), u(0.08, 0.2)
    arm, back, high, long, n = u(0.08, 0.32), u(0.3, 0.55), u(0.1, 0.32), u(0.6, 1.2), u.integers(1, 5)
    inner, y = w - 2 * arm, -(d + long) / 2
    side = box((0, 0, (foot + seat + high) / 2), (arm, d, seat + high - foot))
    side += u.perhaps(0.3, tube((0, 0, seat + high), (1.2 * arm, 1.2 * arm, d), (math.pi / 2, 0, 0)))
    cushion = box((0, -0.05, seat + soft / 2), (0.96 * inner / n, 0.75 * d, soft))
    pillow = u.pick(box, ball)((0, d / 2 - 0.25, seat + soft + 0.15), (0.9 * inner / n, 0.18, 0.35))
    chaise = box(((w - d) / 2, y, (seat + soft) / 2), (d, long, seat + soft))
    return (box((0, 0, (seat + foot) / 2), (w, d, seat - foot)) + four_legs(u, w, d, foot, u(0.04, 0.1))
            + box((0, d / 2 - 0.1, seat + back / 2), (w, u(0.12, 0.3), back), (u(-0.2, 0), 0, 0))
            + row(u.perhaps(0.9, cushion) + u.perhaps(0.6, pillow), n, x=inner / n)
            + u.perhaps(0.9, row(side, 2, x=w - arm)) + u.perhaps(0.2, mirrored(chaise, u.pick(LEFT, RIGHT))))


def table(u):
    d, h, thick, lean = u(0.5, 1.1), u.pick(u(0.35, 0.55), u(0.65, 0.8)), u(0.02, 0.09), u(0.3, 0.6)
    oblong, inset = u(0.6, 2.2), u(0, 0.12)
    top, w, inset = u.pick((box, oblong, inset), (box, oblong, 0), (box, d * u(0.95, 1.6), inset),
                           (tube, d, 0.2 * d), (tube, d * u(1, 1.5), 0.2 * d))
    inner, across = w - 2 * inset, d - 2 * inset
    legs = four_legs(u, inner, across, h, u(0.03, 0.11))
    legs += u.perhaps(0.5, box((0, 0, h - thick / 2 - 0.05), (inner - 0.06, across - 0.06, u(0.05, 0.14))))
    column = row(pedestal(u, h, u(0.25, 0.45) * d), 2 if w > 1.5 * d else 1, x=w / 2)
    panels = row(box((0, 0, h / 2), (u(0.03, 0.1), d * u(0.6, 0.98), h)), 2, x=0.95 * inner)
    trestle = box((0.4 * w, 0, h / 2), (0.05, 0.06, h / math.cos(lean)), (lean, 0, 0))
    trestle = mirrored(trestle, *CORNERS) + box((0, 0, h / 2), (0.8 * w, 0.05, 0.06))
    shelf = box((0, 0, h * u(0.15, 0.45)), (0.8 * inner, 0.8 * across, 0.03))
    base = u.pick(legs, legs, legs, column, panels, trestle)
    return top((0, 0, h), (w, d, thick)) + base + u.perhaps(0.25, shelf)


def toilet(u):
    w, d, h, ajar = u(0.34, 0.44), u(0.42, 0.56), u(0.36, 0.46), u(0.0, 0.3)
    wide, deep, high, low = w * u(0.9, 1.4), u(0.14, 0.24), u(0.28, 0.45), h - u(0, 0.12)
    foot = u.pick(tube, tube, box)((0, 0.05, 0.35 * h), (w * u(0.5, 0.85), d * u(0.6, 0.95), 0.7 * h),
                                   taper=u(0.7, 1.2))
    open_lid = tube((0, d / 2, h + 0.45 * d), (w, 0.95 * d, 0.025), (math.pi / 2 - ajar, 0, 0))
    lid = u.pick(open_lid, tube((0, 0, h + 0.045), (w, d, 0.03)))
    cistern = box((0, (d + deep) / 2, low + high / 2), (wide, deep, high))
    cistern += box((0, (d + deep) / 2, low + high), (1.06 * wide, 1.1 * deep, 0.035))
    cistern += box((0, d / 2, h / 2), (w * u(0.4, 0.8), deep, h))
    return (bowl((0, 0, h), (w, d, 2 * h * u(0.5, 0.9))) + tube((0, 0, h + 0.015), (1.04 * w, 1.02 * d, 0.03))
            + u.perhaps(0.85, foot) + u.perhaps(0.85, lid) + u.perhaps(0.85, cistern))


PROGRAMS = bathtub, bed, chair, desk, dresser, monitor, night_stand, sofa, table, toilet  # MODELNET10's order


def sample_parts(parts: list, count: int, rng) -> np.ndarray:
    """Points spread over the surfaces of all parts by nearly equal area. -> (count, 3)"""
    kind, centre, size, tilt, taper = (np.array(values) for values in zip(*parts))
    # Half extents multiplied in pairs. 8 x their sum is a box's surface, 2 pi x it a tube's, 4/3 pi x it a
    # ball's, and half of that a bowl's; nearly so for elliptic ones.
    faces = size[:, [1, 0, 0]] * size[:, [2, 2, 1]] / 4
    scale = {"box": 8.0, "tube": 2 * math.pi, "ball": 4 / 3 * math.pi, "bowl": 2 / 3 * math.pi}
    area = faces.sum(axis=1) * (1 + taper) / 2 * [scale[k] for k in kind]
    which = rng.choice(len(parts), count, p=area / area.sum())

    # A box: one coordinate moves to a face. The least of three waiting times chooses it by its area.
    spread = rng.uniform(-1, 1, (count, 3))
    face = (rng.exponential(size=(count, 3)) / faces[which]).argmin(axis=1)[:, None]
    cube = np.where(np.arange(3) == face, np.sign(spread), spread)

    # A tube: its upper and lower face are discs, the others mantle. A ball is rings, a bowl its lower ones.
    angle = rng.uniform(0, 2 * math.pi, (count, 1))
    circle = np.hstack([np.cos(angle), np.sin(angle)])
    disc = circle * np.where(face == 2, np.sqrt(rng.random((count, 1))), 1)
    ring = circle * np.sqrt(1 - spread[:, 2:] ** 2)

    kind = kind[which, None]
    width = 1 + (taper[which, None] - 1) * (cube[:, 2:] + 1) / 2
    flat = np.select([kind == "box", kind == "tube"], [cube[:, :2] * width, disc * width], ring)
    z = np.select([kind == "ball", kind == "bowl"], [spread[:, 2:], -np.abs(spread[:, 2:])], cube[:, 2:])
    points = np.hstack([flat, z]) * size[which] / 2
    axes = rotate_about_xyz(torch.eye(3, dtype=torch.float64), torch.from_numpy(tilt)).numpy()
    return centre[which] + np.einsum("ni,nij->nj", points, axes[which])


def sample_shapes(count: int, seed: int, domain: str = "source", points: int = 1024) -> Objects:
    """The procedural set, the same for a seed: object i is of class i mod 10, upright, turned by any yaw.

    domain "source": clean, whole objects. "target": the same programs as a scanner sees them (see scan).
    NumPy promises equal numbers in all versions only for PCG64's bits, not for what Generator makes of them:
    the clouds are equal to the bit with NumPy 1.26, 2.0, 2.2 and 2.4, and a test would see a change.
    """
    scanned = domain == "target"
    dense = {"source": points, "target": 3 * points}[domain]
    clouds, angles = torch.empty(count, dense, 3), torch.zeros(count, 3)
    for i in range(count):
        rng = Chance(np.random.PCG64([seed, scanned, i]))
        cloud = sample_parts(PROGRAMS[i % len(PROGRAMS)](rng), dense, rng) * rng.uniform(0.85, 1.15, 3)
        clouds[i] = torch.from_numpy(cloud)
        angles[i, 2] = rng.uniform(0, 2 * math.pi)
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
