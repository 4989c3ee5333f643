"""Files of the user's own: clouds, meshes, photographs, class names, and the folder they lie in.

A file is read as its author meant it, or refused with what was found: a wrong guess would be named with
confidence. The readers return float64, because coordinates on a map do not fit float32 until centred.
"""
import codecs
import csv
import io
import json
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from support import UserError

# A loader takes (root, split, points, download) and returns Objects as they lie in the files: their `points`
# are clouds (N, P, 3), at least as large as asked for if there are such, or the list of the N files to read
# them from. `download` allows it to fetch what is missing.
LAYOUT = 'README, "Data sets", says what goes there'
FEWER_POINTS = "--points 2048 reads modelnet40_ply_hdf5_2048 instead"

# ------ Files of single objects ----------------------------------------------------------------------------
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

# ------ Clouds as text -------------------------------------------------------------------------------------
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

# ------ Meshes ---------------------------------------------------------------------------------------------
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

# ------ Photographs ----------------------------------------------------------------------------------------
PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


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

# ------ Many files -----------------------------------------------------------------------------------------
def read_folder(folder: Path, split: str) -> dict:
    """A folder of the user's own: classes.txt, {train,test}/[CLASS/]OBJECT.EXT, views/OBJECT/*.jpg if any.
    Without class folders there are no labels. An object is called OBJECT, or CLASS/OBJECT where objects of
    two classes have one name.

    Returns points: the files; labels: the number of each one's class, or None; class_names; names; images:
    each one's photographs, or None.
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
    labels = [label_of[class_key(owner)] for owner in owners] or None

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
    return {"points": files, "labels": labels, "class_names": class_names, "names": names, "images": images}


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

# ------ Class names ----------------------------------------------------------------------------------------
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

# ------ Text files -----------------------------------------------------------------------------------------
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
