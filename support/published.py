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

from support import write_whole
from support.files import LAYOUT, find_photographs, read_lines, reading, to_z_up

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
    lines = read_lines(folder / "shape_names.txt")
    class_names = [line.replace("_", " ") for line in lines]
    # The list has paths of its authors' machine.
    listed = read_lines(folder / f"{split}_files.txt")
    files = [folder / Path(line).name for line in listed]
    clouds, labels, names = zip(*(read_h5(file, len(class_names)) for file in files))
    return dict(points=torch.cat(clouds), labels=torch.cat(labels), class_names=class_names,
                names=sum(names, []))


def read_resampled(folder: Path, split: str, cache: Path) -> dict:
    """ModelNet40 as `modelnet40_normal_resampled` has it, 10,000 points an object.

    -> points, labels, class_names, names. The points of a file are in the order of farthest
    point sampling: in both files that were looked at, the first k are further apart than k
    random ones, for k = 256 to 8,192. So the first 8,192 are farthest points, as ULIP's
    protocol takes, and the same every time.
    """
    folders = read_lines(folder / "modelnet40_shape_names.txt")
    class_names = [name.replace("_", " ") for name in folders]
    listed = folder / f"modelnet40_{split}.txt"
    names = read_lines(listed)
    folder_of = [name.rpartition("_")[0] for name in names]
    with reading(listed, "expected names CLASS_NUMBER of classes in modelnet40_shape_names.txt"):
        labels = [folders.index(name) for name in folder_of]

    # Text takes a minute or two, so it is read once, into one file beside the folder, or in
    # `cache` where that cannot be written. Another list of names makes another file.
    version = hashlib.sha256(listed.read_bytes()).hexdigest()[:8]
    path = folder.parent / f"{folder.name}-{split}-{version}.npy"
    if not path.exists() and not os.access(folder.parent, os.W_OK):
        path = cache / path.name
    if not path.exists():
        texts = [folder / owner / f"{name}.txt" for owner, name in zip(folder_of, names)]
        buffer = io.BytesIO()
        np.save(buffer, read_texts(texts))
        write_whole(path, buffer.getbuffer())
    with reading(path, "remove it, and it is made again"):
        clouds = np.load(path)
    return dict(points=clouds, labels=labels, class_names=class_names, names=names)


def read_texts(files: list[Path]) -> np.ndarray:
    """Clouds (N, P, 3) of files of lines x,y,z,nx,ny,nz; from y up to z up, as in h5 files."""
    clouds = []
    for path in tqdm(files, "reading ModelNet's text once", unit="object", disable=None):
        with reading(path, "expected lines x,y,z,nx,ny,nz; fetch it again"):
            x, y, z = np.loadtxt(path, np.float32, delimiter=",", usecols=(0, 1, 2), ndmin=2).T
            if clouds and len(x) != len(clouds[0]):
                raise ValueError(f"it has {len(x)} points, the others {len(clouds[0])}")
        clouds.append(np.stack([-x, z, y], axis=1))
    return np.stack(clouds)


def read_h5(path: Path, classes: int) -> tuple[Tensor, Tensor, list[str]]:
    """Clouds (N, P, 3), labels (N,) and names of an h5 file; no names where it holds none.

    Raises: UserError naming the file and what it holds instead.
    """
    with reading(path, "expected data (N, P, 3) and label; fetch it again"):
        # Without a lock, which not all file systems know.
        with h5py.File(path, locking=False) as file:
            clouds = torch.from_numpy(file["data"][:]).float()
            labels = torch.from_numpy(file["label"][:]).long().flatten()
            names = [name.decode() for name in file.get("name", [])]
            # PointNet's own files have their names beside them.
            listed = path.with_name(f"{path.stem[:-1]}_{path.stem[-1]}_id2file.json")
            if not names and listed.is_file():
                names = [Path(name).stem for name in json.loads(listed.read_bytes())]
            # They are y up. Only they hold normals.
            if "normal" in file:
                clouds = to_z_up(clouds, "y")

        counts = {len(clouds), len(labels), len(names or labels)}
        if clouds.shape[2:] != (3,) or len(counts) > 1:
            contents = f"data {tuple(clouds.shape)}, {len(labels)} labels, {len(names)} names"
            raise ValueError(contents)
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise ValueError(f"it has the label {wrong[0]}, expected 0 to {classes - 1}; fetch it again")
    return clouds, labels, names


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
    return dict(
        points=[files[name] for name in names],
        labels=[label_of[name] for name in names],
        names=names,
        images=find_photographs(folder / "images", names),
    )


def find_co3d(folder: Path, split: str) -> dict:
    """CO3D's sequences: CATEGORY/SEQUENCE/{pointcloud.ply, images/*.jpg}. Those without a cloud
    are left out.

    -> points: the files; labels, names, images
    """
    files, labels = [], []
    for label, category in enumerate(CO3D):
        for file in sorted((folder / category).glob("*/pointcloud.ply")):
            if in_split(file.parent.name, split):
                files.append(file)
                labels.append(label)
    if not files:
        raise FileNotFoundError(f"no {folder}/CATEGORY/SEQUENCE/pointcloud.ply; "
                                f"github.com/facebookresearch/co3d fetches them; {LAYOUT}")
    names = [file.parent.name for file in files]
    images = [sorted((file.parent / "images").glob("*.jpg")) for file in files]
    return dict(points=files, labels=labels, names=names, images=images if any(images) else None)


def in_split(name: str, split: str) -> bool:
    """Whether an object is of a fixed split, 80 % train, 20 % test by a hash of its name (Deviation D27)."""
    # 51 of 256 is 20 %.
    is_test = hashlib.sha256(name.encode()).digest()[0] < 51
    return is_test == (split == "test")
