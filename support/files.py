"""Files of a user's own: one object, one photograph, a folder of them, and the names of its classes.

A file is read as this page describes it, or refused in a line that says what was found and what to do.
Nothing is guessed and nothing repaired: a cloud that was read wrongly would be named with confidence.

**An object** is a cloud of points, or a mesh, from whose surface points are drawn by area. A mesh file
without faces is a cloud. Extensions may be in upper case.

- Text (.txt .xyz .csv .pts .asc): one row of numbers a point. Between them stand blanks, tabs, commas or
  semicolons; they have decimal points, no decimal commas and no separators of thousands. Lines that begin
  with # or // are remarks. One line above the rows may name the columns, also as a remark: then those called
  x, y and z are read, wherever they stand. (A remark of as many words as there are columns is taken for
  their names.) Or one line says how many rows follow. Other titles and closing words are refused.
- Without names a table is read only if it cannot be anything else: x y z, alone or followed by colours
  (r g b or r g b a, from 0 to 255, or bytes divided by 255), by normals (of length 1), or by colours and
  normals. In .pts there may be an intensity before the colours. All other tables are refused until their
  columns are named, and so are those that begin with whole numbers (counts, labels, pixels, voxels), with
  equal steps, with colours or with normals.
- NumPy (.npy): an array (N, 3), also (1, N, 3) or with more columns, to which the same applies; or an
  array with fields x, y and z.
- PLY, OFF (also with its counts beside the word OFF, as in ModelNet) and STL, as text or binary, and OBJ.
  Faces may have any number of corners, but no notches.
- glTF (.gltf .glb): triangles, wherever the scene puts them, but not compressed, quantised, posed by a
  skeleton, or instanced. Its y points up, by its standard. In all other files the axis `up` does.
- Refused in all formats: coordinates that are NaN or infinite; points that mark gaps, as 0 0 0 or -9999 do;
  float32 so far from 0 that the digits are lost (float64 keeps them, also on a map); faces without area, or
  that leave out more than a tenth of the points; a mesh as text whose last line does not end.

**A photograph** is .jpg .png .webp .bmp or .tif, of 8 bits a colour. It is turned as its camera noted.
What is transparent becomes grey.

**A folder** holds classes.txt and the objects: train/CLASS/OBJECT.ply and test/CLASS/OBJECT.ply, or without
labels train/OBJECT.ply. Photographs lie in views/OBJECT/, or are called views/OBJECT.jpg. A folder of the
class may stand around them (views/CLASS/OBJECT/), and must where two classes have an OBJECT of one name.
An object without any photograph gets a depth view. Pictures whose names say depth, mask, normal or the like
are refused, since all are taken for photographs. Hidden files are passed over, also files of other kinds, but
a warning counts these.

**classes.txt** has the name of one class a line, as UTF-8, in the order of the labels. Names are made of
letters, digits, blanks, `_` (which becomes a blank), hyphens and apostrophes, and two must not differ in
upper case alone. A folder CLASS may differ from its name in upper case, and in blanks and `_`.
"""
import io
import json
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import plyfile
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from support import UserError

LAYOUT = 'README, "Data sets", says what goes there'
PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# The axis that points up in a file -> which of its axes become x, y, z, and their signs. No mirror image.
UP = {"z": ([0, 1, 2], [1, 1, 1]), "y": ([2, 0, 1], [1, 1, 1]), "-y": ([0, 2, 1], [1, 1, -1])}


@contextmanager
def reading(path: Path, repair: str, missing: str = LAYOUT):
    """To read a file under (`with`): what its parser raises becomes a UserError of one line that names it.

    `repair` is the advice where the error gives none, `missing` that where there is no such file.
    Raises: FileNotFoundError if it is not there. Other errors of the system stay what they are.
    """
    if not path.exists():
        raise FileNotFoundError(f"no {path}; {missing}")
    try:
        with open(path, "rb") as file:
            if file.read(39) == b"version https://git-lfs.github.com/spec":
                raise ValueError("it only points to the file, which git-lfs keeps; run `git lfs pull`")
        yield
    except Exception as error:  # parsers of many formats, each with errors of its own
        if isinstance(error, OSError) and error.filename:
            raise
        problem = " ".join(str(error).split()) or repr(error)
        if isinstance(error, KeyError):
            problem = f"it lacks {problem}"
        advice = "" if "; " in problem else f"; {repair}"  # our own errors say what to do
        raise UserError(f"cannot read {path}: {problem}{advice}") from error


# ------ One object
def read_object(path: Path, points: int, max_points: int | None = None, up: str = "z") -> np.ndarray:
    """Points of a cloud, or of a mesh's surface by area, upright, centred on their mean. -> (P, 3) float32

    The same file always gives the same points: choices are random, seeded by its name. A mesh gives
    `max_points` (default: `points`), a cloud that many at most. `up` is the axis that points upwards in the
    file, but in glTF y does, by its standard.
    Raises: UserError naming the file and what is wrong with it.
    """
    suffix, max_points = path.suffix.lower(), max_points or points
    random = np.random.default_rng(zlib.crc32(os.fsencode(path.stem)))
    with reading(path, "export it again, for example as .ply", "expected the file of an object"):
        if suffix not in READERS:
            raise ValueError(f"it is none of {' '.join(READERS)}; convert it, for example to .ply")
        cloud, polygons = READERS[suffix](path)
        cloud = np.array(cloud, np.float64)  # float32 is too coarse for places on a map
        refuse_strange(cloud)
        if len(polygons):
            triangles = cut_polygons(cloud, polygons)
            cloud = sample_surface(cloud, triangles, max_points, random)
        else:
            refuse_marks_of_gaps(cloud)
    if len(cloud) < points:
        raise UserError(f"{path} has {len(cloud)} points, --points is {points}; lower it")

    cloud = torch.from_numpy(cloud - cloud.mean(axis=0))
    is_gltf = READERS[suffix] is read_gltf
    cloud = to_z_up(cloud, "y" if is_gltf else up).numpy().astype(np.float32)
    if len(cloud) > max_points:
        cloud = cloud[random.choice(len(cloud), max_points, replace=False)]
    return cloud


def to_z_up(points: Tensor, up: str) -> Tensor:
    """Rotate clouds (..., 3) whose axis `up` points upwards so that z does; no mirror image."""
    axes, signs = UP[up]
    return points if up == "z" else points[..., axes] * points.new_tensor(signs)


def refuse_strange(points: np.ndarray):
    """Raises: ValueError where points, or the vertices of a mesh, cannot be those (N, 3) of one object."""
    if len(points) == 0 or points.shape[1:] != (3,):
        raise ValueError("it holds no points of three coordinates; export it again")
    columns = points.T.copy()  # along rows NumPy is ten times as fast
    distances = np.abs(columns)
    farthest = distances.max()  # NaN where a coordinate is
    if not farthest < 1e30:  # float32 ends at 3e38, the squares of a norm at 1e19
        count = (~(distances < 1e30)).any(axis=0).sum()
        raise ValueError(f"{count} of its {len(points)} points have NaN or infinite coordinates; remove them")
    extent = np.ptp(columns, axis=1).max()
    if extent == 0:
        raise ValueError("it has all its points in one place; export it again")

    # Far from 0, numbers that went through float32 (or float16) have left a staircase of the object.
    for kind in (np.float16, np.float32):
        if farthest > np.finfo(kind).max / 2:
            continue
        step = np.spacing(kind(farthest))
        if extent < 100 * step and (points == points.astype(kind)).all():
            raise ValueError(f"it is {extent:.3g} long, in steps of {step:.3g}: {kind.__name__} is too "
                             "coarse so far from 0; subtract an offset before saving")


def refuse_marks_of_gaps(cloud: np.ndarray):
    """Raises: ValueError where some of these points (N, 3) only say that a sensor saw nothing there, or fill
    up an array. In the unit sphere they would shrink the object.
    """
    columns = cloud.T.copy()
    is_zero = (columns == 0).all(axis=0)
    is_last = (columns == columns[:, -1:]).all(axis=0)
    offsets = columns - np.median(columns, axis=1)[:, None]
    distances = np.linalg.norm(offsets, axis=0)
    is_far = distances > 50 * np.median(distances)  # as -9999 is

    few = max(1, len(cloud) / 100)
    marks = [(is_zero, 0, "are 0 0 0"), (is_last, few, "are the same"),
             (is_far, 0, "lie fifty times as far from its middle as half of them")]
    for is_mark, most, what in marks:
        if is_mark.sum() > most:
            raise ValueError(f"{is_mark.sum()} of its {len(cloud)} points {what}, as where a sensor saw "
                             "nothing; remove them")


# ------ Clouds. Their readers return points (N, 3) and no polygons.
def read_npy(path: Path):
    """A NumPy array (N, 3 or more), also (1, N, 3), or with fields x, y, z."""
    array = np.asarray(np.load(path, allow_pickle=False))
    has_fields = array.dtype.names
    if has_fields:
        array = stack_fields(array)
    elif array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.ndim != 2 or array.shape[1] > 16 or array.dtype.kind not in "fiu":
        raise ValueError(f"it holds {array.dtype} of shape {array.shape}, expected numbers (N, 3); save one "
                         "cloud a file, and each point as a row, with numpy.save")
    table = array.astype(np.float64)
    if not has_fields:
        refuse_other_columns(table)
    return table[:, :3], []


def stack_fields(array: np.ndarray) -> np.ndarray:
    """The fields x, y, z of a structured array. -> (N, 3)"""
    axes = [array[array.dtype.names[number]] for number in find_axes(array.dtype.names)]
    return np.stack(axes, axis=-1).reshape(-1, 3)


def find_axes(names: list[str]) -> list[int]:
    """Which of the columns of these names are called x, y and z.
    Raises: ValueError where not each is, once.
    """
    names = [name.lower() for name in names]
    if any(names.count(axis) != 1 for axis in "xyz"):
        raise ValueError(f"it calls its columns {', '.join(names)}; call those of coordinates x, y, z, "
                         "or remove the line of names")
    return [names.index(axis) for axis in "xyz"]


# What leads to the names of columns, as in "columns: x y z", and their units, as in "x [m]".
NOT_NAMES = re.compile(r"^.*:|^(fields|columns|format|header|data|points)\s|\[.*?\]|\(.*?\)", re.IGNORECASE)
LETTERS = re.compile("[a-df-z]", re.IGNORECASE)  # those of words, not of 1e-5


def read_text(path: Path):
    """A table of numbers between blanks, tabs, commas or semicolons.

    x, y, z are the columns that a line above the rows calls so, else the first three.
    """
    text = path.read_bytes().decode("utf-8-sig", "replace")  # remarks come in all encodings
    lines = list(filter(None, map(str.strip, text.splitlines())))
    rows = [line for line in lines if not line.startswith(("#", "//"))]
    if len(rows) < 2:
        raise ValueError("it holds no rows of numbers; export it again")
    between = next((mark for mark in ";," if mark in rows[-1]), None)  # None: blanks and tabs

    above = lines[:lines.index(rows[0])]
    cells = [cell.strip() for cell in rows[0].split(between)]
    if LETTERS.search(rows[0]):
        above.append(rows.pop(0))
    elif all(map(str.isdecimal, cells)):
        if cells[0] != str(len(rows) - 1):  # "2048 3" above a matrix, "0,1,2" above columns
            raise ValueError(f"its first line {rows[0]!r} has whole numbers; remove it if it is no point, "
                             "else write x y z above it")
        rows.pop(0)

    table = load_table(rows, between)
    for line in filter(LETTERS.search, reversed(above)):
        words = NOT_NAMES.sub("", line.lstrip("#/ ")).strip()
        between = next((mark for mark in ";,\t" if mark in words), None)
        names = [word.strip(" \"'") for word in words.split(between)]
        if len(names) == table.shape[1]:
            return table[:, find_axes(names)], []
        if not line.startswith(("#", "//")):
            raise ValueError(f"its first line is {line!r}, its rows have {table.shape[1]} columns; name "
                             "them all there, those of coordinates x, y, z")
    if path.suffix.lower() == ".pts" and table.shape[1] == 7:
        table = np.delete(table, 3, axis=1)  # x y z intensity r g b
    refuse_other_columns(table)
    return table[:, [0, 1, 2]], []


def load_table(rows: list[str], between: str | None = None) -> np.ndarray:
    """The numbers in rows of text. -> (N, columns) float64"""
    try:
        return np.loadtxt(rows, delimiter=between, quotechar='"', ndmin=2)
    except ValueError as error:
        problem = str(error).split(";")[0].rstrip(".")  # what follows is advice to programmers
        raise ValueError(f"{problem}; save rows of equally many numbers, with decimal points, as UTF-8, and "
                         "no other lines") from None


def refuse_other_columns(table: np.ndarray):
    """Raises: ValueError unless a table (N, columns) without names must be x y z, alone or before colours,
    normals, or both.
    """
    first, others = table[:, :3], table[:, 3:]
    if len(table) < 2 or not np.isfinite(first).all():
        return  # refused later, for what it is
    if are_normals(others[:, -3:]):
        others = others[:, :-3]
    are_coordinates_first = first.shape[1] == 3 and not are_colours(first) and not are_normals(first)
    are_known_behind = others.shape[1] == 0 or are_colours(others)

    column, steps = table[:, 0], np.diff(table[:, 0])
    is_count = (column == column.round()).all() or np.ptp(steps) < 1e-3 * abs(steps[0])
    if is_count or not are_coordinates_first or not are_known_behind:
        raise ValueError(f"its {table.shape[1]} columns may be others than x y z, colours and normals, or "
                         "begin with a count, label or pixel; save x y z alone, less their mean, or name the "
                         "columns in a first line")


def are_colours(columns: np.ndarray) -> bool:
    """Whether these (N, columns) are r g b or r g b a: bytes, or bytes divided by 255."""
    largest = columns.max()
    if columns.shape[1] not in (3, 4) or not (columns.min() >= 0 and largest <= 255):
        return False
    scaled = columns if largest > 1 else 255 * columns
    return np.abs(scaled - scaled.round()).max() < 0.02


def are_normals(columns: np.ndarray) -> bool:
    """Whether nearly all of these (N, columns) are directions in space, of length 1."""
    lengths = np.linalg.norm(columns.T.copy(), axis=0)
    has_length_1 = np.abs(lengths - 1) < 0.01
    return columns.shape[1] == 3 and has_length_1.mean() > 0.9


# ------ Meshes. Their readers return vertices (V, 3) and polygons: the numbers, from 0, of the vertices at
# their corners, as a list of lists or an array (F, corners). Without polygons the vertices are a cloud.
def cut_polygons(vertices: np.ndarray, polygons) -> np.ndarray:
    """Triangles (F, 3) of polygons: their first corner with each two that follow one another.
    Raises: ValueError where corners are no vertices (V, 3), or triangles would fill notches of polygons.
    """
    groups = [polygons]  # an array has equally many corners in all rows
    if not isinstance(polygons, np.ndarray) or polygons.ndim == 1:
        sizes = sorted({len(polygon) for polygon in polygons} - {0, 1, 2})
        groups = [[polygon for polygon in polygons if len(polygon) == size] for size in sizes]

    triangles = [np.empty((0, 3), np.int64)]
    for group in groups:
        group = np.array(group, np.int64)  # (F, corners)
        if group.min() < 0 or group.max() >= len(vertices):
            raise ValueError(f"its faces join points that are none of its {len(vertices)}; export it again")
        fans = np.stack([group[:, [0, k, k + 1]] for k in range(1, group.shape[1] - 1)])
        if len(fans) > 1:  # triangles that fill a notch are turned over
            normals = normals_of(vertices, fans)  # (corners - 2, F, 3)
            areas = np.linalg.norm(normals, axis=-1)
            whole = normals.sum(axis=0)  # the polygon's, the same however it is cut
            is_turned = (normals * whole).sum(axis=-1) <= 0
            if areas[is_turned].sum() > 0.01 * areas.sum():  # a few bent faces do no harm
                raise ValueError(f"its faces of {len(fans) + 2} corners have notches; export triangles")
        triangles += [*fans]
    return np.concatenate(triangles)


def normals_of(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Normals of triangles, twice as long as their areas. vertices (V, 3), triangles (..., 3) -> (..., 3)"""
    first, second, third = np.moveaxis(vertices[triangles], -2, 0)
    return np.cross(second - first, third - first)


def sample_surface(vertices: np.ndarray, triangles: np.ndarray, count: int, random) -> np.ndarray:
    """`count` points on triangles (F, 3) of vertices (V, 3), by their area. -> (count, 3)
    Raises: ValueError where these are not the surface of what has these vertices.
    """
    is_joined = np.zeros(len(vertices), bool)
    is_joined[triangles] = True
    joined = is_joined.sum()
    if joined < 0.9 * len(vertices):
        raise ValueError(f"its faces join only {joined} of its {len(vertices)} points; export the mesh "
                         "alone, or the points without faces")
    areas = np.linalg.norm(normals_of(vertices, triangles), axis=1)
    if areas.sum() <= 1e-9 * np.ptp(vertices, axis=0).max() ** 2:
        raise ValueError("its faces have no area; export points as a cloud, without faces")

    chosen = random.choice(len(triangles), count, p=areas / areas.sum())
    first, second, third = vertices[triangles[chosen]].swapaxes(0, 1)
    # Two cuts of the line from 0 to 1 leave three shares, one for each corner, which spreads points evenly.
    low, high = np.sort(random.random((2, count, 1)), axis=0)
    return low * first + (high - low) * second + (1 - high) * third


def read_obj(path: Path):
    """Wavefront's OBJ, whatever its groups and materials. An index counts from 1, a negative one backwards
    from the last vertex so far.
    """
    vertices, polygons = [], []
    text = path.read_bytes().decode("utf-8-sig", "replace")  # names come in all encodings
    refuse_open_end(text)
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        keyword, *words = line.split("#")[0].split() or [""]
        if keyword == "v":
            vertices.append([float(word) for word in words[:3]])
        elif keyword == "f":
            corners = [int(word.split("/")[0]) for word in words]
            polygons.append([i - 1 if i >= 0 else len(vertices) + i for i in corners])
    if not polygons and re.search(r"^\s*(l|curv|surf)\s", text, re.MULTILINE):
        raise ValueError("it holds lines or curves and no faces; export triangles")
    return vertices, polygons


def read_off(path: Path):
    """OFF, also where the counts touch the word OFF, as in ModelNet."""
    text = re.sub("#.*", "", path.read_bytes().decode("utf-8-sig", "replace"))
    header = re.match(r"\s*(C?N?|ST)OFF\s*(\d+)\s+(\d+)(\s+\d+)?\s*\n", text, re.IGNORECASE)
    if header is None:
        raise ValueError("it does not begin with OFF and the numbers of points and faces; export it again")
    columns = None if header[1] else 3  # COFF and others have colours, normals or a texture, too
    table, polygons = read_rows(text[header.end():], int(header[2]), int(header[3]), columns)
    return table[:, :3], polygons


def read_rows(text: str, vertices: int, faces: int, columns: int | None):
    """A table (V, columns) of so many vertices, one a row, and polygons, one a row below: how many corners
    it has, and which.
    """
    refuse_open_end(text)
    rows = [line for line in text.splitlines() if line.strip()]
    if len(rows) != vertices + faces or not vertices:
        raise ValueError(f"it declares {vertices} points and {faces} faces, but has {len(rows)} rows; it "
                         "was cut off, or holds more; export it again")
    polygons = []
    for row in rows[vertices:]:
        size, *words = row.split()
        corners = [int(word) for word in words[:int(size)]]
        if len(corners) != int(size):
            raise ValueError(f"it has a face {row!r}; it was cut off; export it again")
        polygons.append(corners)
    table = load_table(rows[:vertices])
    if columns and table.shape[1] != columns:
        raise ValueError(f"its points have {table.shape[1]} numbers, expected {columns}; export it again")
    return table, polygons


def refuse_open_end(text: str):
    """Raises: ValueError where a mesh may be cut off within its last number, as "f 1 2 3" of "f 1 2 34"."""
    if not text.endswith(("\n", "\r")):
        raise ValueError("its last line does not end, as in a file that was cut off; export it again, or "
                         "add a line break")


def read_stl(path: Path):
    """STL, binary or as text, all its solids."""
    raw = path.read_bytes()
    if len(raw) == 84 + 50 * int.from_bytes(raw[80:84], "little"):
        triangle = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("colour", "<u2")])
        corners = np.frombuffer(raw, triangle, offset=84)["corners"].reshape(-1, 3)
    else:
        text = raw.decode("latin1").lower()  # names of solids come in all encodings
        corners = re.findall(r"^\s*vertex\s+(\S+)\s+(\S+)\s+(\S+)", text, re.MULTILINE)
        last_line = text.rstrip().rpartition("\n")[2].strip()
        if not last_line.startswith("endsolid") or len(corners) != 3 * text.count("endfacet"):
            raise ValueError("it has neither the length it declares nor triangles up to endsolid; it was "
                             "cut off; export it again")
    return corners, np.arange(len(corners)).reshape(-1, 3)


# Headers of text whose rows are as those of OFF: points, then faces that begin with their corners.
PLAIN_PLY = re.compile(r"ply\s+format ascii 1.0\s+element vertex \d+\s+((?:property\s+\w+\s+\w+\s+)+)"
                       r"(?:element face \d+\s+property list \w+ \w+ vertex_ind(?:ex|ices)\s+"
                       r"(?:property .*\s+)*)?")


def read_ply(path: Path):
    """PLY, its faces of any numbers of corners."""
    raw = path.read_bytes()
    head, end, body = raw.partition(b"end_header")
    text = head.decode("ascii", "replace")  # comments come in all encodings
    lines = [line for line in text.splitlines() if not line.startswith(("comment", "obj_info"))]
    header = "\n".join([*lines, ""])
    elements = re.findall(r"^element\s+(\S+)\s+(\d+)", header, re.MULTILINE)
    counts = {name: int(count) for name, count in elements}
    if not end or "vertex" not in counts:
        raise ValueError("it has no PLY header with an element called vertex; export a cloud, or triangles")
    if max(counts.values()) > len(raw):
        raise ValueError(f"it declares {counts}, more than its {len(raw)} bytes can hold; export it again")
    others = {name for name in counts if counts[name]} - {"vertex", "face", "camera", "range_grid"}
    if "tristrips" in others or others and not counts.get("face"):
        raise ValueError(f"it holds {', '.join(others)}; export it as triangles, or as a cloud")

    plain = PLAIN_PLY.fullmatch(header)
    if plain:  # plyfile takes four times as long
        names = plain[1].split()[2::3]
        rows = body.decode("latin1")
        table, polygons = read_rows(rows, counts["vertex"], counts.get("face", 0), len(names))
        return table[:, find_axes(names)], polygons

    source = path
    if not head.isascii():  # which plyfile refuses, even in comments
        source = io.BytesIO(text.encode("ascii", "replace") + end + body)
    try:  # triangles need no loop
        sizes = {"vertex_indices": 3, "vertex_index": 3}
        file = plyfile.PlyData.read(source, known_list_len={"face": sizes})
    except plyfile.PlyParseError:
        file = plyfile.PlyData.read(source)
    vertices = stack_fields(np.asarray(file["vertex"].data))
    if not counts.get("face"):
        return vertices, []
    faces = np.asarray(file["face"].data)
    is_short = "vertex_index" in faces.dtype.names
    return vertices, faces["vertex_index" if is_short else "vertex_indices"]


def read_gltf(path: Path):
    """All meshes of a glTF scene, where it puts them.

    What trimesh cannot decode it leaves out or reads as zeros. That shows in the bounds of each part, which
    glTF demands to be written beside it.
    """
    import trimesh  # here: it is slow to import, and only glTF needs it
    raw = path.read_bytes()
    tree = json.loads(raw[20:20 + int.from_bytes(raw[12:16], "little")] if raw[:4] == b"glTF" else raw)
    declared = gltf_bounds(tree)

    scene = trimesh.load(path, file_type=path.suffix[1:].lower(), process=False, skip_materials=True)
    parts = [part.vertices for part in scene.geometry.values()]
    found = [[part.min(axis=0), part.max(axis=0)] for part in parts]
    if len(found) != len(declared) or not np.allclose(found, declared, atol=1e-3 * np.ptp(declared)):
        raise ValueError("its points are not within the bounds it declares; export one plain mesh")
    mesh = trimesh.util.concatenate(scene.dump())
    mesh.remove_unreferenced_vertices()  # its parts may share vertices
    return mesh.vertices, mesh.faces


def gltf_bounds(tree: dict) -> list:
    """The least and the greatest coordinates of each part of a glTF scene, from its JSON.
    Raises: ValueError where trimesh would skip something or read it wrongly within these bounds.
    """
    meshes, accessors = tree.get("meshes", []), tree.get("accessors", [])
    parts = [part for mesh in meshes for part in mesh["primitives"]]
    positions = [accessors[part["attributes"]["POSITION"]] for part in parts]
    extensions = str(tree.get("extensionsRequired")) + str(tree.get("extensionsUsed"))

    is_packed = re.search("compression|quantization|instancing", extensions)
    has_weights = any(any(one.get("weights", [])) for one in meshes + tree.get("nodes", []))
    are_triangles = parts and all(part.get("mode", 4) in (4, 5) for part in parts)  # 5: strips of them
    are_floats = all(position["componentType"] == 5126 for position in positions)  # the number of float32
    is_sparse = any("sparse" in accessor for accessor in accessors)
    if is_packed or has_weights or tree.get("skins") or is_sparse or not are_triangles or not are_floats:
        raise ValueError("it is compressed, quantised, sparse, instanced, posed by a skeleton or morph "
                         "targets, or not of triangles; export it as it stands, as one plain mesh")
    return [[position["min"], position["max"]] for position in positions]


READERS = {".npy": read_npy, ".txt": read_text, ".xyz": read_text, ".csv": read_text, ".pts": read_text,
           ".asc": read_text, ".off": read_off, ".obj": read_obj, ".ply": read_ply, ".stl": read_stl,
           ".glb": read_gltf, ".gltf": read_gltf}


# ------ Many objects
def read_objects(files: list[Path], points: int, max_points: int, up: str) -> np.ndarray:
    """Clouds of one size, from `points` to `max_points` points, one of each file. -> (N, P, 3) float32
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
    for i, cloud in enumerate(clouds):
        if len(cloud) > count:
            clouds[i] = cloud[random.choice(len(cloud), count, replace=False)]
    return np.stack(clouds)


# ------ Photographs
def read_photograph(path: Path, only_header: bool = False) -> Tensor | None:
    """A picture as a person sees it on the screen: upright, opaque, 8 bits a colour. -> (3, H, W) uint8

    A camera's note of how it was held (EXIF) is obeyed. What is transparent becomes mid-grey, on which
    neither a white nor a black object vanishes. only_header: decode nothing, and return None.
    Raises: UserError naming the file.
    """
    with reading(path, "replace or remove it"), Image.open(path) as stored:
        if stored.mode[0] in "IF":  # Pillow's names of grey with 16 bits, 32 bits, or floats
            raise ValueError("it has more than 8 bits, as maps of depth have; replace it by a photograph")
        if only_header:
            return None
        image = ImageOps.exif_transpose(stored)
        if "A" in image.getbands() or "transparency" in image.info:
            ground = Image.new("RGBA", image.size, (128, 128, 128, 255))
            image = Image.alpha_composite(ground, image.convert("RGBA"))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


# What pictures show that are no photographs, as their names say.
MAPS = re.compile("depth|mask|normal|albedo|segm|silhouette|disparity|alpha", re.IGNORECASE)


def find_photographs(folder: Path, names: list[str], others: list[str] = ()) -> list | None:
    """A sorted list of each object's photographs, empty where it has none; None without the folder.

    Those of the object A lie in folder/A or folder/CLASS/A, or are called so: folder/A.jpg. `others` are
    the names of objects of the other split, whose pictures lie in the same folder.
    Raises: UserError where there is no picture of any object, or one of a map.
    """
    if not folder.is_dir():
        return None
    pictures = {composed(name): [] for name in [*names, *others]}
    for path in files_below(folder):
        place = path.relative_to(folder)
        owner = owner_of(place, pictures)
        if owner is None or path.suffix.lower() not in PHOTOGRAPHS:
            continue
        if MAPS.search(composed(str(place)).replace(owner, "")):
            raise UserError(f"{path} is called as a map of depth, a mask or the like is, but pictures in "
                            f"{folder} are taken for photographs; keep others elsewhere")
        pictures[owner].append(path)

    missing = [name for name, paths in pictures.items() if not paths]
    if len(missing) == len(pictures):
        raise UserError(f"{folder} has no picture of any object; expected {folder / missing[0]}/*.jpg (or "
                        f"{' '.join(PHOTOGRAPHS)})")
    if missing:
        say_once(f"warning: {folder} has no picture of {len(missing)} of {len(pictures)} objects, for "
                 f"example {min(missing)}; they get a rendered depth view")
    return [pictures[composed(name)] for name in names]


def owner_of(place: Path, names) -> str | None:
    """Which of these objects a file at this place in the folder of photographs belongs to, if any."""
    *folders, own = composed(str(place.with_suffix(""))).split(os.sep)
    candidates = ["/".join(folders), *folders[-1:]]  # its folder, CLASS/A or A
    if len(folders) <= 1:
        candidates += ["/".join([*folders, own]), own]  # or itself
    return next((name for name in candidates if name in names), None)


@lru_cache
def say_once(line: str):
    """A line on stderr, but not again when the other split is read."""
    print(line, file=sys.stderr)


# ------ Folders of objects
def read_folder(folder: Path, split: str) -> dict:
    """A folder of the user's own: classes.txt, {train,test}/[CLASS/]OBJECT.EXT, views/OBJECT/*.jpg if any.

    -> points: the objects' files; labels: the numbers of their classes, None without class folders;
    class_names; names: OBJECT, or CLASS/OBJECT where two classes have one of the same name; images: a list
    of photographs for each, or None without the folder views.
    Raises: UserError where these do not fit together, FileNotFoundError where some are missing.
    """
    listed, inside, views = folder / "classes.txt", folder / split, folder / "views"
    names_wanted = "write the names that you expect into it, one a line"
    class_names = clean_class_names(read_lines(listed, names_wanted), str(listed))
    files = objects_below(inside)
    ignored = Counter(file.suffix.lower() for file in {*files_below(inside)} - {*files})
    if ignored:
        listed = ", ".join(f"{count} {suffix}" for suffix, count in ignored.most_common())
        say_once(f"warning: ignored {ignored.total()} files in {inside}: {listed}; convert what is an "
                 "object, for example to .ply")
    if not files:
        raise FileNotFoundError(f"no objects in {inside}; expected files {' '.join(READERS)}")
    labels = find_labels(files, inside, class_names)
    names, others = object_names(files, inside), []
    if views.is_dir():
        other = folder / {"train": "test", "test": "train"}[split]
        others = object_names(objects_below(other), other)
        mine, theirs = ({name.split("/")[-1] for name in group} for group in (names, others))
        if mine & theirs:
            raise UserError(f"{min(mine & theirs)} is an object of {inside} and of {other}, so its pictures "
                            "could be of either; rename one")
    images = find_photographs(views, names, others)
    return dict(points=files, labels=labels, class_names=class_names, names=names, images=images)


def mostly_photographed(folder: Path) -> bool:
    """Whether most training objects of a folder have a photograph in its folder views."""
    inside = folder / "train"
    names = object_names(objects_below(inside), inside)
    if not names or not (folder / "views").is_dir():
        return False
    images = find_photographs(folder / "views", names)
    return sum(map(bool, images)) > len(names) / 2


def find_labels(files: list[Path], inside: Path, class_names: list[str]) -> list[int] | None:
    """The number of each file's class; None where all files lie in the folder `inside` itself.
    Raises: UserError where files lie in folders that are no classes, or only some lie in folders.
    """
    label_of = {class_key(name): label for label, name in enumerate(class_names)}
    owners = [composed(file.parent.name) for file in files if file.parent != inside]
    unknown = sorted({owner for owner in owners if class_key(owner) not in label_of})
    if unknown or 0 < len(owners) < len(files):
        raise UserError(f"{inside} has objects in {unknown or 'folders and outside'}; expected folders "
                        f"named as in {inside.parent / 'classes.txt'}, or none at all")
    return [label_of[class_key(owner)] for owner in owners] or None


def object_names(files: list[Path], inside: Path) -> list[str]:
    """What objects are called: as their files, and where two are called the same, with their folders.
    Raises: UserError where that is the same, too.
    """
    names = [composed(file.stem) for file in files]
    if len({*names}) < len(names):  # they are numbered anew in each class
        names = [composed(file.relative_to(inside).with_suffix("").as_posix()) for file in files]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"two objects of {inside} are called {twice[0]}; rename one")
    return names


def objects_below(folder: Path) -> list[Path]:
    """The clouds and meshes below a folder."""
    return [file for file in files_below(folder) if file.suffix.lower() in READERS]


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted, through links; without hidden ones."""
    files = []
    for path in folder.iterdir() if folder.is_dir() else []:
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            files.append(path)
        elif not folder.resolve().is_relative_to(path.resolve()):  # a link upwards would never end
            files += files_below(path)
    return sorted(files)


def composed(name: str) -> str:
    """A name with its accents composed (Unicode NFC), as not all systems write it, in characters that can
    be written: bytes that are no UTF-8 become U+FFFD.
    """
    # Not os.fsencode: a locale without UTF-8 cannot encode the names of classes.
    printable = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return unicodedata.normalize("NFC", printable)


# ------ Class names
# Numbers before a name, but not "3d printer"; WordNet's numbers; what stands above a list.
NO_NAME = re.compile(r"\d+([ _]|$)|.*\d{5}|(class|classes|labels?|names?|category)$", re.IGNORECASE)


def clean_class_names(names: list[str], where: str) -> list[str]:
    """Class names for the text tower, written as they are given, but with single blanks, also for `_`.
    Raises: UserError where there are fewer than two, two that the tower sees as one, or other than names.
    """
    for name in names:
        kinds = [unicodedata.category(mark)[0] for mark in name]  # L: letters, M: their accents, N: digits
        are_allowed = all(kind in "LMN" or mark in " _-'\u2019" for kind, mark in zip(kinds, name))
        if not are_allowed or not name[:1].isalnum() or NO_NAME.match(name):
            raise UserError(f"{where} has {name!r}; expected the name of a class alone, of letters, digits, "
                            "blanks, hyphens and apostrophes, with no number before it")
    if all(re.search(r"^\d|\s\d+$", name) for name in names):
        raise UserError(f"{where} has a number in each line, as {names[0]!r}; expected names alone "
                        "(boeing-747, not boeing 747)")
    keys = [class_key(name) for name in names]
    twice = [name for name, key in zip(names, keys) if keys.count(key) > 1]
    if twice or len(names) < 2:
        problem = f"{twice[:4]}, which are one to the text tower" if twice else names
        raise UserError(f"{where} has {problem}; expected two or more different names")
    return [" ".join(composed(name).replace("_", " ").split()) for name in names]


def class_key(name: str) -> str:
    """What is compared of a class name: the text tower reads lower case, folders may have `_` for blanks."""
    return " ".join(composed(name).replace("_", " ").lower().split())


# ------ Text files
def read_lines(path: Path, missing: str = LAYOUT) -> list[str]:
    """Lines of a text file that has to be there and say something, without empty ones."""
    with reading(path, "save lines of text as UTF-8", missing):
        text = path.read_bytes().decode("utf-8-sig")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"it is empty; {missing}")
    return lines
