"""How the files of published data sets lie, and what is in them. N objects of P points.

What is returned goes into data.Objects. What a user's own files may be says support/files.py.
"""
import hashlib
import io
import json
import os
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from support import UserError, write_whole
from support.files import LAYOUT, find_photographs, read_lines, reading, to_z_up

FEWER_POINTS = "--points 2048 reads modelnet40_ply_hdf5_2048 instead"

# Classes in the order of the labels.
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
# Folder -> class. The folder of the remote control is `remote`.
CO3D = {name.removesuffix(" control").replace(" ", ""): name for name in CO3D_NAMES}


def read_modelnet_h5(folder: Path, split: str) -> dict:
    """ModelNet40 in the official h5 layout, 2,048 points an object.

    -> points, labels, class_names, names
    """
    lines = read_lines(folder / "shape_names.txt", LAYOUT)
    class_names = [line.replace("_", " ") for line in lines]
    listed = folder / f"{split}_files.txt"
    # The list has paths of its authors' machine.
    files = [folder / Path(line).name for line in read_lines(listed, LAYOUT)]
    clouds, labels, names = zip(*(read_h5(file, len(class_names)) for file in files))
    names = None if None in names else sum(names, [])
    with reading(listed, "expected files of equally many points"):
        points, labels = torch.cat(clouds), torch.cat(labels)
    return dict(points=points, labels=labels, class_names=class_names, names=names)


def read_resampled(folder: Path, split: str, cache: Path) -> dict:
    """ModelNet40 as `modelnet40_normal_resampled` has it, 10,000 points an object.

    -> points, labels, class_names, names. The points of a file are in the order of farthest
    point sampling: in both files that were looked at, the first k are further apart than k
    random ones, for k = 256 to 8,192. So the first 8,192 are farthest points, as ULIP's
    protocol takes, and the same every time.
    """
    folders = read_lines(folder / "modelnet40_shape_names.txt", FEWER_POINTS)
    listed = folder / f"modelnet40_{split}.txt"
    names = read_lines(listed, FEWER_POINTS)
    with reading(listed, "expected names CLASS_NUMBER of classes in modelnet40_shape_names.txt"):
        labels = [folders.index(name.rpartition("_")[0]) for name in names]

    # Text takes a minute or two, so it is read once, into one file beside the folder, or in
    # `cache` where that cannot be written. Another list of names makes another file.
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
    points, labels, names = read_h5(path, len(folders))
    class_names = [name.replace("_", " ") for name in folders]
    return dict(points=points, labels=labels, class_names=class_names, names=names)


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
            if clouds is None:
                # Filled in place: the set is 1.2 GB, and should not be in memory twice.
                clouds = np.empty((len(files), len(x), 3), np.float32)
            if len(x) != clouds.shape[1]:
                raise ValueError(f"it has {len(x)} points, the others {clouds.shape[1]}")
            clouds[i] = np.stack([-x, z, y], axis=1)
    return clouds


def read_h5(path: Path, classes: int) -> tuple[Tensor, Tensor, list | None]:
    """Clouds (N, P, 3), labels (N,) and, if there are any, names of an h5 file.

    Clouds in PointNet's own files are y up and are turned. The normals that these files hold
    tell them from others.
    Raises: UserError naming the file and what it holds instead.
    """
    with reading(path, "expected data (N, P, 3) and label; fetch it again", LAYOUT), open_h5(path) as file:
        points = file["data"][:]
        # Far from the origin float32 has too few digits, so clouds are centred before.
        if points.dtype.itemsize > 4:
            points = points - points.mean(axis=1, keepdims=True)
        clouds = torch.from_numpy(points.astype(np.float32, copy=False))
        labels = torch.from_numpy(file["label"][:].reshape(-1).astype(np.int64))
        names = [name.decode() for name in file["name"]] if "name" in file else None
        # PointNet's files have their names beside them.
        names_file = path.with_name(f"{path.stem[:-1]}_{path.stem[-1]}_id2file.json")
        if names is None and names_file.is_file():
            names = [Path(name).stem for name in json.loads(names_file.read_bytes())]
        if "normal" in file:
            clouds = to_z_up(clouds, "y")

        counts = {len(clouds), len(labels), len(labels if names is None else names)}
        if clouds.shape[2:] != (3,) or len(counts) > 1:
            contents = f"data {tuple(clouds.shape)}, {len(labels)} labels"
            raise ValueError(contents if names is None else f"{contents}, {len(names)} names")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise UserError(f"{path} has the label {wrong[0]}, expected 0 to {classes - 1}; fetch it again")
    return clouds, labels, names


def open_h5(path: Path) -> h5py.File:
    """An h5 file to read. Without a lock, which not all file systems know."""
    return h5py.File(path, locking=False)


def find_redwood(folder: Path, split: str) -> dict:
    """Redwood's scans: meshes/ID.ply or points/ID.npy; images/ID/*.jpg; categories.json maps a
    class to its ids. Scans without a mesh are left out.

    -> points: the files; labels, names, images
    """
    listed = folder / "categories.json"
    tool = f"github.com/isl-org/redwood-3dscan fetches it; {LAYOUT}"
    label_of = {}
    with reading(listed, "expected class -> ids", tool):
        ids = json.loads(listed.read_bytes())
        for label, class_name in enumerate(REDWOOD):
            label_of |= dict.fromkeys(ids[class_name], label)

    # A mesh wins over points of the same scan.
    files = {file.stem: file for file in [*folder.glob("points/*.npy"), *folder.glob("meshes/*.ply")]}
    names = [scan_id for scan_id in label_of if scan_id in files and in_split(scan_id, split)]
    if not names:
        raise FileNotFoundError(f"no mesh of a listed id in {folder / 'meshes'}; {tool}")
    labels = [label_of[name] for name in names]
    images = find_photographs(folder / "images", names)
    return dict(points=[files[name] for name in names], labels=labels, names=names, images=images)


def find_co3d(folder: Path, split: str) -> dict:
    """CO3D's sequences: CATEGORY/SEQUENCE/{pointcloud.ply, images/*.jpg}. Those without a cloud
    are left out.

    -> points: the files; labels, names, images
    """
    files, labels = [], []
    for label, category in enumerate(CO3D):
        clouds = sorted((folder / category).glob("*/pointcloud.ply"))
        clouds = [file for file in clouds if in_split(file.parent.name, split)]
        files += clouds
        labels += [label] * len(clouds)
    if not files:
        raise FileNotFoundError(f"no {folder}/CATEGORY/SEQUENCE/pointcloud.ply; "
                                f"github.com/facebookresearch/co3d fetches them; {LAYOUT}")
    names = [file.parent.name for file in files]
    images = [sorted((file.parent / "images").glob("*.jpg")) for file in files]
    return dict(points=files, labels=labels, names=names, images=images if any(images) else None)


def in_split(name: str, split: str) -> bool:
    """Whether an object is of a fixed split, 80 % train and 20 % test by a hash of its name."""
    # The lists of the paper are not published. 51 of 256 is 20 %.
    is_test = hashlib.sha256(name.encode()).digest()[0] < 51
    return is_test == (split == "test")
