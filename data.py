"""Objects to learn from: the procedural `shapes`, real data sets, depth views, weak and strong views of both.

Coordinates are right-handed, z up, float32; every cloud is centred and scaled into the unit sphere.
Angles are in radians. N objects, P points, V views.
"""
import hashlib
import math
import os
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

MODELNET10 = tuple("bathtub,bed,chair,desk,dresser,monitor,night stand,sofa,table,toilet".split(","))


@contextmanager
def one_line_errors():
    """What a user can put right (ValueError, OSError) ends a script with one line and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


@dataclass
class Objects:
    """A split of a data set. points (N, P, 3); labels (N,) or None; images: None where views are rendered."""
    points: Tensor
    labels: Tensor | None
    class_names: list[str]
    name: str
    split: str
    images: list | None = None

    def __len__(self):
        return len(self.points)


def to_unit_sphere(points: Tensor) -> Tensor:
    """Centre each cloud on its mean, scale its farthest point to norm 1. (N, P, 3) -> (N, P, 3).

    Raises: ValueError where coordinates are not finite or all points of a cloud coincide, naming the object.
    """
    bad = ~torch.isfinite(points).flatten(1).all(dim=1)
    if bad.any():
        raise ValueError(f"object {int(bad.nonzero()[0])} has NaN or infinite coordinates; repair it")
    points = points - points.mean(dim=1, keepdim=True)
    radius = points.norm(dim=-1).amax(dim=1)
    if (radius == 0).any():
        raise ValueError(f"all points of object {int((radius == 0).nonzero()[0])} coincide; repair its file")
    return points / radius[:, None, None]


# -----------------------------------------------------------------------------------------------------------
# shapes: ten classes of furniture, each a short program of solids. Lengths are roughly metres, the front
# faces -y.

def part(kind: str, centre, size, tilt=(0.0, 0.0, 0.0), taper=1.0) -> tuple:
    """One solid: kind box, tube (elliptic, top = taper x bottom), ball or bowl (lower half of a ball); full
    extents `size`, turned by `tilt` about x, y, z around its centre."""
    return kind, centre, size, tilt, taper


box, tube, ball, bowl = (partial(part, kind) for kind in ("box", "tube", "ball", "bowl"))


def pick(rng, *options):
    """One of the options, all equally likely."""
    return options[rng.integers(len(options))]


def four_legs(rng, w, d, h, thick, inset=0.0) -> list:
    """Legs under the corners of a w x d top at height h: square or round, straight, tapered or splayed."""
    kind, taper = pick(rng, "box", "tube"), rng.uniform(1.0, 2.0)
    splay = rng.uniform(0, 0.2) * pick(rng, 0, 1)
    x, y = w / 2 - thick / 2 - inset, d / 2 - thick / 2 - inset
    return [part(kind, (sx * x, sy * y, h / 2), (thick, thick, h), (sy * splay, -sx * splay, 0), taper)
            for sx in (-1, 1) for sy in (-1, 1)]


def pedestal(rng, h, reach) -> list:
    """A central column on a disc or on three to five spokes."""
    column = [tube((0, 0, h / 2), (u := rng.uniform(0.04, 0.14), u, h), taper=rng.uniform(0.6, 1.4))]
    if rng.random() < 0.5:
        return column + [tube((0, 0, 0.02), (2 * reach, 2 * reach, 0.04), taper=rng.uniform(0.3, 1))]
    spokes = rng.integers(3, 6)
    return column + [box((reach / 2 * math.cos(a), reach / 2 * math.sin(a), 0.04), (reach, 0.05, 0.05),
                         (0, 0, a))
                     for a in 2 * math.pi * np.arange(spokes) / spokes]


def drawers(rng, w, d, h, rows, columns, z0=0.0, x0=0.0) -> list:
    """A cabinet standing on z0 with rows x columns of drawer fronts, some with knobs or bars."""
    out = [box((x0, 0, z0 + h / 2), (w, d, h))]
    proud, gap, handle = rng.uniform(0.005, 0.03), rng.uniform(0.01, 0.04), pick(rng, "none", "ball", "box")
    for i in range(rows):
        for j in range(columns):
            x, z = x0 + w * ((j + 0.5) / columns - 0.5), z0 + h * (i + 0.5) / rows
            out.append(box((x, -d / 2 - proud / 2, z), (w / columns - gap, proud, h / rows - gap)))
            if handle != "none":
                wide = 0.04 if handle == "ball" else 0.3 * w / columns
                out.append(part(handle, (x, -d / 2 - proud - 0.02, z), (wide, 0.04, 0.03)))
    return out


def back_rest(rng, w, h, y, z, thick) -> list:
    """A leaning back from height z up: panel, vertical or horizontal slats in a frame, or curved."""
    lean, style = -rng.uniform(0, 0.3), rng.integers(4)
    c = (0, y - math.sin(lean) * h / 2, z + h / 2)
    if style == 0:
        return [part(pick(rng, "box", "box", "tube"), c, (w, thick, h), (lean, 0, 0))]
    if style == 3:
        angles = np.linspace(-0.7, 0.7, 5)
        return [box((w * 0.6 * math.sin(a), y - 0.25 * w * (1 - math.cos(a)) * 2, z + h / 2),
                     (0.24 * w, thick, h), (lean, 0, -a)) for a in angles]
    n = rng.integers(2, 7)
    out = [box((s * (w - 0.04) / 2, *c[1:]), (0.04, thick, h), (lean, 0, 0)) for s in (-1, 1)]
    for t in (np.arange(n) + 0.5) / n - 0.5:
        if style == 1:
            out.append(box((t * w, *c[1:]), (w / n * 0.35, thick * 0.7, h), (lean, 0, 0)))
        else:
            out.append(box((0, c[1] - math.sin(lean) * t * h, c[2] + t * h), (w, thick * 0.7, h / n * 0.45),
                           (lean, 0, 0)))
    return out + [box((0, c[1] - math.sin(lean) * h / 2, z + h), (w, thick, 0.06), (lean, 0, 0))]


def chair(rng):
    u = rng.uniform
    w, d, seat, thick = u(0.4, 0.65), u(0.4, 0.65), u(0.36, 0.52), u(0.03, 0.14)
    out = [part(pick(rng, "box", "box", "tube"), (0, 0, seat), (w, d, thick))]
    out += back_rest(rng, w * u(0.8, 1), u(0.3, 0.8), d / 2 - 0.03, seat, u(0.03, 0.1))
    base = rng.integers(5)
    if base <= 1:
        out += four_legs(rng, w, d, seat, u(0.025, 0.07))
        if rng.random() < 0.4:
            out += [box((s * w * 0.42, 0, seat * u(0.2, 0.6)), (0.03, d, 0.03)) for s in (-1, 1)]
    elif base == 2:
        out += pedestal(rng, seat, u(0.22, 0.36))
    elif base == 3:  # sled: a loop on each side
        for s in (-1, 1):
            out += [tube((s * w * 0.46, y * d * 0.45, seat / 2), (0.035, 0.035, seat)) for y in (-1, 1)]
            out.append(box((s * w * 0.46, 0, 0.02), (0.035, d, 0.035)))
    else:
        out.append(box((0, 0, seat / 2), (w * u(0.8, 1), d * u(0.8, 1), seat)))
    if rng.random() < (0.8 if base == 4 else 0.4):
        high, thin = u(0.15, 0.3), u(0.03, 0.14)
        for s in (-1, 1):
            out.append(box((s * w / 2, 0, seat + high), (thin, d * u(0.7, 1), u(0.03, 0.08))))
            out.append(box((s * w / 2, -d * u(0.1, 0.4), seat + high / 2),
                           (thin * 0.8, 0.05 if base < 4 else d, high)))
    return out


def sofa(rng):
    u = rng.uniform
    w, d, seat, arm, back = u(1.1, 2.5), u(0.75, 1.05), u(0.32, 0.48), u(0.08, 0.32), u(0.3, 0.55)
    foot, n = u(0.0, 0.15), rng.integers(1, 5)
    out = [box((0, 0, (seat + foot) / 2), (w, d, seat - foot))]
    out += [box((0, d / 2 - 0.1, seat + back / 2), (w, u(0.12, 0.3), back), (-u(0, 0.2), 0, 0))]
    if rng.random() < 0.88:
        high, round_arm = u(0.1, 0.32), rng.random() < 0.3
        for s in (-1, 1):
            out.append(box((s * (w - arm) / 2, 0, foot + (seat + high - foot) / 2),
                           (arm, d, seat + high - foot)))
            if round_arm:
                out.append(tube((s * (w - arm) / 2, 0, seat + high), (arm * 1.2, arm * 1.2, d),
                                (math.pi / 2, 0, 0)))
    inner, soft = w - 2 * arm, u(0.08, 0.2)
    for x in inner * ((np.arange(n) + 0.5) / n - 0.5):
        if rng.random() < 0.9:
            out.append(box((x, -0.05, seat + soft / 2), (inner / n * 0.96, d * 0.75, soft)))
        if rng.random() < 0.6:
            out.append(part(pick(rng, "box", "ball"), (x, d / 2 - 0.25, seat + soft + 0.15),
                            (inner / n * 0.9, 0.18, 0.35), (-0.2, 0, 0)))
    if foot > 0.05:
        out += four_legs(rng, w, d, foot, u(0.04, 0.1))
    if rng.random() < 0.22:  # L-shape
        s, long = pick(rng, -1, 1), u(0.6, 1.2)
        out.append(box((s * (w / 2 - d / 2), -d / 2 - long / 2, seat / 2 + soft / 2), (d, long, seat + soft)))
        if rng.random() < 0.5:
            out.append(box((s * (w / 2 - 0.08), -d / 2 - long / 2, seat + back / 2), (0.18, long, back)))
    return out


def table(rng):
    u = rng.uniform
    w, d, h, thick = u(0.6, 2.2), u(0.5, 1.1), pick(rng, u(0.35, 0.55), u(0.65, 0.8)), u(0.02, 0.09)
    round_top = rng.random() < 0.35
    if round_top or rng.random() < 0.2:
        w = d * u(0.95, 1.1 if rng.random() < 0.7 else 1.8)
    out = [part("tube" if round_top else "box", (0, 0, h), (w, d, thick))]
    inset, base = (0.2 * min(w, d) if round_top else u(0, 0.12)), rng.integers(6)
    if base <= 2:
        out += four_legs(rng, w, d, h, u(0.03, 0.11), inset)
    elif base == 3:
        out += pedestal(rng, h, u(0.25, 0.45) * d)
        if w > 1.5 * d:
            out = out[:1] + [part(k, (c[0] + s * w / 4, *c[1:]), *rest) for k, c, *rest in out[1:]
                             for s in (-1, 1)]
    elif base == 4:
        out += [box((s * (w * 0.45 - inset), 0, h / 2), (u(0.03, 0.1), d * u(0.6, 0.98), h)) for s in (-1, 1)]
    else:
        lean = u(0.3, 0.6)
        out += [box((s * w * 0.4, 0, h / 2), (0.05, 0.06, h / math.cos(lean)), (t * lean, 0, 0))
                for s in (-1, 1) for t in (-1, 1)]
        out.append(box((0, 0, h / 2), (w * 0.8, 0.05, 0.06)))
    if base <= 2 and rng.random() < 0.5:
        out.append(box((0, 0, h - thick / 2 - 0.05),
                       (w - 2 * inset - 0.06, d - 2 * inset - 0.06, u(0.05, 0.14))))
    if rng.random() < 0.25:
        out.append(box((0, 0, h * u(0.15, 0.45)), (0.8 * (w - 2 * inset), 0.8 * (d - 2 * inset), 0.03)))
    return out


def desk(rng):
    u = rng.uniform
    w, d, h = u(1.0, 2.0), u(0.5, 0.9), u(0.68, 0.82)
    out = [box((0, 0, h), (w, d, u(0.02, 0.07)))]
    supports = [pick(rng, "drawers", "drawers", "panel", "legs") for _ in range(2)]
    if supports == ["legs", "legs"]:
        supports[rng.integers(2)] = "drawers"
    for s, support in zip((-1, 1), supports):
        if support == "drawers":
            wide = u(0.22, 0.38) * w
            top = h if rng.random() < 0.7 else h * 0.45
            out += drawers(rng, wide, d * 0.92, top * 0.96, rng.integers(2, 5), 1, h - top,
                           s * (w - wide) / 2)
            if top < h:
                out += [box((s * w * 0.47, y * d * 0.42, h / 2), (0.05, 0.05, h)) for y in (-1, 1)]
        elif support == "panel":
            out.append(box((s * (w / 2 - 0.04), 0, h / 2), (u(0.02, 0.07), d * u(0.8, 1), h)))
        else:
            out += [box((s * w * 0.47, y * d * 0.42, h / 2), (0.05, 0.05, h)) for y in (-1, 1)]
    if rng.random() < 0.65:
        high = h * u(0.4, 0.95)
        out.append(box((0, d / 2 - 0.05, h - high / 2), (w * 0.95, 0.03, high)))
    if rng.random() < 0.3:  # L-shape
        s, long, deep = pick(rng, -1, 1), u(0.5, 1.1), u(0.4, 0.6)
        out.append(box((s * (w - deep) / 2, -d / 2 - long / 2, h), (deep, long, 0.04)))
        out.append(box((s * (w - deep) / 2, -d / 2 - long + 0.05, h / 2), (deep * 0.95, u(0.03, 0.4), h)))
    if rng.random() < 0.35:  # hutch
        high, deep, n = u(0.3, 0.8), u(0.2, 0.32), rng.integers(2, 5)
        out += [box((x, d / 2 - deep / 2, h + high / 2), (0.03, deep, high))
                for x in np.linspace(-w / 2, w / 2, n)]
        out += [box((0, d / 2 - deep / 2, h + z), (w, deep, 0.03)) for z in (high, high * u(0.4, 0.6))]
        out += [box((0, d / 2 - 0.02, h + high / 2), (w, 0.02, high))] * int(rng.random() < 0.6)
    if rng.random() < 0.2:
        out.append(box((u(-0.2, 0.2) * w, -d * 0.35, h - 0.1), (0.5, 0.3, 0.02)))
    return out


def dresser(rng):
    u = rng.uniform
    w, d = u(0.5, 1.7), u(0.38, 0.6)
    h, foot = (u(0.9, 1.7) if w < 0.9 else u(0.65, 1.3)), pick(rng, 0.0, u(0.04, 0.2))
    out = drawers(rng, w, d, h - foot, rng.integers(3, 7), rng.integers(1, 4 if w > 0.9 else 3), foot)
    if foot:
        out += four_legs(rng, w, d, foot, u(0.04, 0.1))
    if rng.random() < 0.6:
        out.append(box((0, 0, h), (w * 1.05, d * 1.08, 0.04)))
    if rng.random() < 0.25:  # mirror
        high, wide = u(0.5, 0.9), w * u(0.5, 0.95)
        out.append(part(pick(rng, "box", "ball"), (0, d / 2 - 0.04, h + high / 2), (wide, 0.05, high)))
    return out


def night_stand(rng):
    u = rng.uniform
    w, d, h = u(0.38, 0.68), u(0.34, 0.56), u(0.42, 0.75)
    foot = pick(rng, 0.0, u(0.04, 0.15), u(0.15, 0.5) * h)
    style = rng.integers(4)
    if style <= 2:
        out = drawers(rng, w, d, (h - foot), rng.integers(1, 4), 1, foot)
    else:  # a drawer above an open shelf
        out = drawers(rng, w, d, h * 0.3, 1, 1, h * 0.7)
        out += [box((s * (w / 2 - 0.02), 0, h * 0.35), (0.03, d, h * 0.7)) for s in (-1, 1)]
        out += [box((0, 0, h * u(0.08, 0.35)), (w, d, 0.03)), box((0, d / 2, h * 0.35), (w, 0.02, h * 0.7))]
    if foot and style <= 2:
        out += four_legs(rng, w, d, foot, u(0.03, 0.08))
        if foot > 0.15 and rng.random() < 0.4:
            out.append(box((0, 0, foot * 0.3), (w * 0.95, d * 0.95, 0.03)))
    if rng.random() < 0.7:
        out.append(box((0, 0, h), (w * u(1, 1.15), d * u(1, 1.15), u(0.02, 0.05))))
    if rng.random() < 0.07:  # a lamp with its shade
        out += [tube((0, 0, h + 0.15), (0.04, 0.04, 0.3)),
                tube((0, 0, h + 0.35), (0.28, 0.28, 0.2), taper=0.6)]
    return out


def monitor(rng):
    u = rng.uniform
    w = u(0.35, 0.75)
    h, thick, lift = w / u(1.2, 1.9), u(0.015, 0.08), u(0.06, 0.25)
    lean, middle = u(-0.05, 0.2), lift + h / 2
    out = [box((0, 0, middle), (w, thick, h), (-lean, 0, 0))]
    if rng.random() < 0.5:
        rim = u(0.01, 0.04)
        out += [box((s * (w - rim) / 2, -thick / 2, middle), (rim, 0.03, h)) for s in (-1, 1)]
        out += [box((0, -thick / 2, middle + s * (h - rim) / 2), (w, 0.03, rim)) for s in (-1, 1)]
    back = rng.random()
    if back < 0.25:  # a tube screen
        deep = u(0.2, 0.4)
        out.append(box((0, deep * 0.25, middle), (w * 0.97, deep * 0.5, h * 0.97)))
        out.append(tube((0, deep * 0.7, middle), (w * 0.9, h * 0.9, deep * 0.5), (-math.pi / 2, 0, 0),
                        u(0.5, 0.8)))
    elif back < 0.5:
        out.append(part(pick(rng, "box", "ball"), (0, thick, middle - 0.02),
                        (w * u(0.4, 0.8), thick * 2, h * u(0.4, 0.7))))
    if rng.random() < 0.06:
        return out
    out.append(part(pick(rng, "box", "tube"), (0, thick / 2 + 0.02, lift / 2 + h * 0.15),
                    (u(0.03, 0.15), u(0.02, 0.06), lift + h * 0.3), (u(-0.2, 0.1), 0, 0)))
    wide, deep, high = w * u(0.35, 0.7), u(0.14, 0.28), u(0.01, 0.04)
    if rng.random() < 0.8:
        out.append(part(pick(rng, "box", "tube"), (0, 0.02, high / 2), (wide, deep, high), taper=u(0.6, 1)))
    else:
        out += [box((s * wide / 4, -deep / 4, 0.015), (wide / 2, 0.04, 0.03), (0, 0, s * 0.6))
                for s in (-1, 1)]
    return out


def bathtub(rng):
    u = rng.uniform
    w, d, h, wall = u(1.3, 2.0), u(0.65, 1.0), u(0.38, 0.7), u(0.03, 0.12)
    style, foot = rng.integers(4), 0.0
    if style == 0:  # straight walls around a flat floor
        out = [box((s * (w - wall) / 2, 0, h / 2), (wall, d, h), (0, -s * u(0, 0.2), 0)) for s in (-1, 1)]
        out += [box((0, s * (d - wall) / 2, h / 2), (w, wall, h)) for s in (-1, 1)]
        out += [box((0, 0, h * u(0.08, 0.3)), (w, d, 0.03))]
    elif style == 1:  # an oval basin let into a box
        out = [bowl((0, 0, h), (w * 0.88, d * 0.85, 1.7 * h))]
        out += [box((0, s * d / 2, h / 2), (w, 0.03, h)) for s in (-1, 1)]
        out += [box((s * w / 2, 0, h / 2), (0.03, d, h)) for s in (-1, 1)]
        out += [box((0, s * d * 0.46, h), (w, d * 0.1, 0.02)) for s in (-1, 1)]
        out += [box((s * w * 0.465, 0, h), (w * 0.08, d, 0.02)) for s in (-1, 1)]
    else:  # free-standing: a double shell, on feet or on a plinth
        foot = u(0.05, 0.18) * pick(rng, 0, 1)
        out = [bowl((0, 0, h + foot), (w, d, 2 * h)), bowl((0, 0, h + foot), (w - wall, d - wall, 1.8 * h))]
        plinth = [tube((0, 0, 0.1 * h), (w * 0.6, d * 0.6, 0.2 * h))]
        out += four_legs(rng, w * 0.6, d * 0.6, foot + 0.2 * h, 0.06) if foot else plinth
        if style == 3:
            out.append(bowl((-w * 0.3, 0, h * 1.25 + foot), (w * 0.38, d * 0.95, h)))
    if rng.random() < 0.4:
        out.append(tube((w * 0.42, 0, h + foot + 0.08), (0.04, 0.04, 0.18)))
        out.append(tube((w * 0.38, 0, h + foot + 0.16), (0.03, 0.03, 0.14), (0, math.pi / 2, 0)))
    return out


def bed(rng):
    u = rng.uniform
    w, d, base, soft = u(0.85, 2.0), u(1.85, 2.25), u(0.12, 0.4), u(0.12, 0.32)
    out = [box((0, 0, base + soft / 2), (w * 0.97, d * 0.97, soft))]
    legs = rng.random() < 0.5
    out += [box((0, 0, base * (0.75 if legs else 0.5)), (w, d, base * (0.5 if legs else 1.0)))]
    if legs:
        out += four_legs(rng, w, d, base, u(0.05, 0.12))
    if rng.random() < 0.85:
        high, thick = u(0.25, 0.9), u(0.04, 0.14)
        if rng.random() < 0.7:
            out.append(box((0, d / 2, (base + soft + high) / 2),
                           (w * u(0.98, 1.2), thick, base + soft + high)))
            if rng.random() < 0.25:
                out.append(tube((0, d / 2, base + soft + high), (w * 0.9, 0.5 * high, thick),
                                (math.pi / 2, 0, 0)))
        else:
            out += back_rest(rng, w, high + soft, d / 2, base, thick)
    if rng.random() < 0.45:
        high = u(0.05, 0.4)
        out.append(box((0, -d / 2, (base + soft + high) / 2), (w, u(0.04, 0.1), base + soft + high)))
    n = 1 if w < 1.2 else 2
    for x in w * ((np.arange(n) + 0.5) / n - 0.5):
        if rng.random() < 0.8:
            out.append(part(pick(rng, "ball", "box"), (x, d * 0.38, base + soft + 0.05),
                            (w / n * 0.8, 0.38, 0.14), (u(-0.4, 0), 0, 0)))
    if rng.random() < 0.4:  # a cover hanging down the sides
        out.append(box((0, -d * 0.12, base + soft * 0.6), (w * 1.04, d * 0.74, soft * 1.1)))
    extra = rng.random()
    if extra < 0.12:  # bunk
        up = u(0.9, 1.2)
        out += [box((0, 0, base + up), (w, d, u(0.1, 0.25)))] + four_legs(rng, w, d, base + up + 0.3, 0.07)
    elif extra < 0.24:  # four posts, with or without a frame
        up = u(1.2, 2.0)
        out += [tube((s * w / 2, t * d / 2, up / 2), (0.07, 0.07, up)) for s in (-1, 1) for t in (-1, 1)]
        if extra < 0.2:
            out += [box((s * w / 2, 0, up), (0.05, d, 0.05)) for s in (-1, 1)]
            out += [box((0, s * d / 2, up), (w, 0.05, 0.05)) for s in (-1, 1)]
    elif extra < 0.36:  # with its night stands
        out += [box((s * (w / 2 + 0.3), d / 2 - 0.25, 0.25), (0.45, 0.4, 0.5)) for s in (-1, 1)]
    return out


def toilet(rng):
    u = rng.uniform
    w, d, h = u(0.34, 0.44), u(0.42, 0.56), u(0.36, 0.46)
    out = [bowl((0, 0, h), (w, d, 2 * h * u(0.5, 0.9)))]
    if rng.random() < 0.85:
        foot = pick(rng, "tube", "tube", "box")
        out.append(part(foot, (0, 0.05, h * 0.35), (w * u(0.5, 0.85), d * u(0.6, 0.95), h * 0.7),
                        taper=u(0.7, 1.2)))
    out.append(tube((0, 0, h + 0.015), (w * 1.04, d * 1.02, 0.03)))
    if rng.random() < 0.45:  # the lid stands open
        out.append(tube((0, d / 2, h + d * 0.45), (w, d * 0.95, 0.025), (math.pi / 2 - u(0.0, 0.3), 0, 0)))
    elif rng.random() < 0.7:
        out.append(tube((0, 0, h + 0.045), (w, d, 0.03)))
    if rng.random() < 0.85:
        wide, deep, high = w * u(0.9, 1.4), u(0.14, 0.24), u(0.28, 0.45)
        low = h - u(0, 0.12)
        out.append(box((0, d / 2 + deep / 2, low + high / 2), (wide, deep, high), taper=1))
        out.append(box((0, d / 2 + deep / 2, low + high), (wide * 1.06, deep * 1.1, 0.035)))
        out.append(box((0, d / 2, h * 0.5), (w * u(0.4, 0.8), deep, h)))
        if rng.random() < 0.3:
            out.append(ball((wide * 0.35, d / 2 - 0.02, low + high * 0.85), (0.06, 0.04, 0.03)))
    return out


# In MODELNET10's order.
PROGRAMS = (bathtub, bed, chair, desk, dresser, monitor, night_stand, sofa, table, toilet)


def turn(x, y, z) -> np.ndarray:
    """Rotations about x, then y, then z. Angles (...,) -> matrices (..., 3, 3)."""
    x, y, z = np.broadcast_arrays(x, y, z)
    zero, one = np.zeros_like(x, float), np.ones_like(x, float)
    rx = np.stack([one, zero, zero, zero, np.cos(x), -np.sin(x), zero, np.sin(x), np.cos(x)], -1)
    ry = np.stack([np.cos(y), zero, np.sin(y), zero, one, zero, -np.sin(y), zero, np.cos(y)], -1)
    rz = np.stack([np.cos(z), -np.sin(z), zero, np.sin(z), np.cos(z), zero, zero, zero, one], -1)
    rx, ry, rz = (r.reshape(*x.shape, 3, 3) for r in (rx, ry, rz))
    return rz @ ry @ rx


def sample_parts(parts: list, count: int, rng) -> np.ndarray:
    """Points spread over the surfaces of all parts by (nearly) equal area. -> (count, 3)"""
    kinds = np.array([p[0] for p in parts])
    centre, half = np.array([p[1] for p in parts], float), np.array([p[2] for p in parts], float) / 2
    rotation, taper = turn(*np.array([p[3] for p in parts], float).T), np.array([p[4] for p in parts], float)
    a, b, c = half.T
    side = 2 * np.pi * np.sqrt((a * a + b * b) / 2) * (1 + taper) * c
    ball = 4 * np.pi * (((a * b) ** 1.6 + (a * c) ** 1.6 + (b * c) ** 1.6) / 3) ** (1 / 1.6)
    area = np.select([kinds == "box", kinds == "tube", kinds == "ball"],
                     [8 * (a * b + b * c + a * c), side + np.pi * a * b * (1 + taper ** 2), ball], ball / 2)
    which = rng.choice(len(parts), count, p=area / area.sum())
    uniform, choice = rng.uniform(-1, 1, (count, 3)), rng.random(count)
    # box: push one coordinate to a face, chosen by the area of the three pairs
    faces = np.stack([b * c, a * c, a * b], -1)[which]
    face = (choice[:, None] > np.cumsum(faces, -1) / faces.sum(-1, keepdims=True)).sum(-1).clip(0, 2)
    cube = uniform.copy()
    cube[np.arange(count), face] = np.where(uniform[np.arange(count), face] < 0, -1, 1)
    # tube: on the mantle, or on one of the two discs
    angle, t = np.pi * uniform[:, 0], taper[which]
    mantle = choice < (side / np.maximum(side + np.pi * a * b * (1 + taper ** 2), 1e-12))[which]
    top = np.where(uniform[:, 1] < 2 * t ** 2 / (1 + t ** 2) - 1, 1.0, -1.0)
    z = np.where(mantle, uniform[:, 2], top)
    radius = np.where(mantle, 1, np.sqrt((uniform[:, 2] + 1) / 2)) * (1 + (t - 1) * (z + 1) / 2)
    shell = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], -1)
    # ball: a direction, scaled; bowl: folded below its rim
    ring = np.sqrt(np.maximum(0, 1 - uniform[:, 2] ** 2))
    sphere = np.stack([ring * np.cos(angle), ring * np.sin(angle), uniform[:, 2]], -1)
    sphere[:, 2] = np.where(kinds[which] == "bowl", -np.abs(sphere[:, 2]), sphere[:, 2])
    kind = kinds[which, None]
    local = np.select([kind == "box", kind == "tube"], [cube, shell], sphere) * half[which]
    return centre[which] + np.einsum("nij,nj->ni", rotation[which], local)


def seen_from(points: Tensor, azimuths: Tensor, elevations: Tensor) -> Tensor:
    """What a depth camera sees of clouds (B, P, 3) from each of V directions (B, V). -> (B, V, P) bool

    Seen is a point at most 0.15 behind the nearest one of its cell of a 20 x 20 depth map.
    """
    u, v, depth = project(points, azimuths, elevations)
    cell = ((v * 0.499 + 0.5) * 20).long() * 20 + ((u * 0.499 + 0.5) * 20).long()
    nearest = depth.new_full((*azimuths.shape, 400), -2.0).scatter_reduce(2, cell, depth, "amax")
    return depth > nearest.gather(2, cell) - 0.15


def scan(points: Tensor, count: int, seed: int) -> Tensor:
    """A scan: one-sided, stretched, noisy, some floor and clutter. (N, P, 3) -> (N, count, 3).

    A hand-held scanner looks from three directions of an arc of 2 radians; what none of them sees, a quarter
    of the points, is lost: the far side, and what lies inside. Floor reaches beyond the object, which is the
    smaller for it in the unit sphere. Deterministic in `seed`; P well above `count`.
    """
    random = torch.Generator().manual_seed(seed)
    n = len(points)

    def draw(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=random)

    points = to_unit_sphere(points * draw(0.9, 1.1, 1, 3))
    azimuths = draw(0, 2 * math.pi, 1) + torch.tensor([-1.0, 0.0, 1.0])
    seen = seen_from(points, azimuths, draw(0.1, 0.9, 3)).any(dim=1)
    seen |= draw(0, 1, points.shape[1]) < 0.02  # a few from elsewhere, as real scans have
    kept = torch.multinomial(seen.float(), count, replacement=True, generator=random)
    points = points.gather(1, kept[..., None].expand(-1, -1, 3))
    points = points + draw(0.0, 0.01, 1, 1) * torch.randn(points.shape, generator=random)
    floor = points.amin(dim=1, keepdim=True)[..., 2] - 0.01
    flat = torch.cat([draw(-0.73, 0.73, count, 2), floor[..., None].expand(-1, count, 1)], dim=-1)
    lump = draw(-0.7, 0.7, 1, 3) + draw(0.05, 0.15, 1, 1) * torch.randn(n, count, 3, generator=random)
    kind = draw(0, 1, count)
    share_floor, share_lump = draw(0, 0.05, 1), draw(0, 0.03, 1)
    points = torch.where((kind < share_floor)[..., None], flat, points)
    return to_unit_sphere(torch.where((kind > 1 - share_lump)[..., None], lump, points))


def sample_shapes(count: int, seed: int, domain: str = "source", points: int = 1024) -> Objects:
    """The procedural set: object i is of class i mod 10. Needs no file; the same for a seed everywhere.

    domain "source": clean, whole objects. "target": the same programs as a scanner sees them (see scan).
    Every object stands upright, turned by any yaw. Labels of the target are for evaluation only.
    """
    if domain not in ("source", "target"):
        raise ValueError(f"domain {domain!r}; one of source, target")
    dense = points if domain == "source" else 3 * points
    clouds = np.empty((count, dense, 3), np.float32)
    for i in range(count):
        rng = np.random.default_rng([seed, domain == "target", i])
        cloud = sample_parts(PROGRAMS[i % len(PROGRAMS)](rng), dense, rng) * rng.uniform(0.85, 1.15, 3)
        clouds[i] = cloud @ turn(0, 0, rng.uniform(0, 2 * np.pi)).T
    clouds = to_unit_sphere(torch.from_numpy(clouds))
    if domain == "target":
        clouds = scan(clouds, points, seed)
    return Objects(clouds, torch.arange(count) % len(PROGRAMS), list(MODELNET10), "shapes", domain)


# -----------------------------------------------------------------------------------------------------------
# Depth views

def project(points: Tensor, azimuths: Tensor, elevations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthographic camera coordinates: right, up, towards the camera, each (B, V, P), from points (B, P, 3).

    azimuths, elevations (B, V): where the camera stands; azimuth 0 looks along +y, from -y.
    """
    x, y, z = (c.unsqueeze(1) for c in points.unbind(-1))  # (B, 1, P)
    sin_a, cos_a = azimuths.sin().unsqueeze(-1), azimuths.cos().unsqueeze(-1)
    sin_e, cos_e = elevations.sin().unsqueeze(-1), elevations.cos().unsqueeze(-1)
    right = cos_a * x + sin_a * y
    away = cos_a * y - sin_a * x
    return right, cos_e * z + sin_e * away, sin_e * z - cos_e * away


def render_depth_views(points: Tensor, azimuths: Tensor, elevations: Tensor, size: int) -> Tensor:
    """Depth maps in PointCLIP V2's recipe: quantise, densify, smooth, squeeze (arXiv 2211.11682).

    The nearest point of each grid cell wins, holes are filled by a max-pool, edges smoothed by a Gaussian;
    grey, near = bright (1), far = 0.2, background 0. The grid is as fine as the cloud allows, about 1.6
    sqrt(P) cells.

    Args: points (B, P, 3) in the unit sphere, z up; azimuths, elevations (B, V) radians; size: pixels.
    Returns: (B, V, 3, size, size) in [0, 1], without gradient.
    """
    batch, views, total = len(points), azimuths.shape[1], points.shape[1]
    grid = min(size, int(1.6 * total ** 0.5))
    with torch.no_grad():
        u, v, depth = project(points, azimuths, elevations)
        column = ((u * 0.48 + 0.5) * grid).long().clamp(0, grid - 1)  # 0.48: a thin margin
        row = ((0.5 - v * 0.48) * grid).long().clamp(0, grid - 1)
        bright = 0.6 + 0.4 * depth.clamp(-1, 1)
        image = points.new_zeros(batch, views, grid * grid)
        image = image.scatter_reduce(2, row * grid + column, bright, "amax")
        image = F.max_pool2d(image.view(-1, 1, grid, grid), 3, stride=1, padding=1)
        kernel = image.new_tensor([0.25, 0.5, 0.25])
        image = F.conv2d(image, kernel.view(1, 1, 1, 3), padding=(0, 1))
        image = F.conv2d(image, kernel.view(1, 1, 3, 1), padding=(1, 0))
        if grid != size:
            image = F.interpolate(image, (size, size), mode="bilinear", align_corners=False)
    return image.clamp(0, 1).view(batch, views, 1, size, size).expand(-1, -1, 3, -1, -1)


def fixed_views(points: Tensor, views: int, size: int) -> Tensor:
    """Evaluation's views: azimuths evenly around, elevation 0.4. (B, P, 3) -> (B, V, 3, size, size)"""
    azimuths = (torch.arange(views, device=points.device) + 0.5) * (2 * math.pi / views)
    azimuths = azimuths.expand(len(points), -1)
    return render_depth_views(points, azimuths, torch.full_like(azimuths, 0.4), size)


def random_view(points: Tensor, size: int) -> Tensor:
    """One view of each object from anywhere around it, slightly below to well above. -> (B, 3, size, size)"""
    azimuth = torch.rand(len(points), 1, device=points.device) * (2 * math.pi)
    elevation = torch.rand(len(points), 1, device=points.device) * 1.1 - 0.1
    return render_depth_views(points, azimuth, elevation, size)[:, 0]


# -----------------------------------------------------------------------------------------------------------
# Weak and strong views, drawn anew per object on the objects' device. Inputs are left untouched.

def crop(images: Tensor, low: float, flip: bool) -> Tensor:
    """Random resized crop: an area share U(low, 1), aspect 3/4 to 4/3, and perhaps a mirror image."""
    n, device = len(images), images.device
    area = low + (1 - low) * torch.rand(n, device=device)
    aspect = torch.exp((2 * torch.rand(n, device=device) - 1) * math.log(4 / 3) * (low < 0.8))
    w, h = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x, y = ((1 - s) * (2 * torch.rand(n, device=device) - 1) for s in (w, h))
    mirror = torch.where(torch.rand(n, device=device) < 0.5 * flip, -1.0, 1.0)
    zero = torch.zeros_like(w)
    matrix = torch.stack([w * mirror, zero, x, zero, h, y], dim=-1).view(n, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def weak_image(images: Tensor) -> Tensor:
    """A slight random crop [joint-label]. (B, 3, H, W) in [0, 1] -> the same"""
    return crop(images, 0.85, flip=False)


def strong_image(images: Tensor) -> Tensor:
    """Random resized crop (0.6 to 1) and flip of a depth view from anywhere [self-training] (Deviation D22).

    RandAugment's colour operations have no meaning in a depth map, and a smaller crop loses the object.
    (B, 3, H, W) in [0, 1] -> the same
    """
    return crop(images, 0.6, flip=True)


def rotate(points: Tensor, angles: Tensor) -> Tensor:
    """Turn clouds about x, then y, then z. points (B, P, 3), angles (B, 3)."""
    for axis in range(3):
        sin, cos = angles[:, axis, None].sin(), angles[:, axis, None].cos()
        a, b = points[..., (axis + 1) % 3], points[..., (axis + 2) % 3]
        turned = list(points.unbind(-1))
        turned[(axis + 1) % 3], turned[(axis + 2) % 3] = cos * a - sin * b, sin * a + cos * b
        points = torch.stack(turned, dim=-1)
    return points


def weak_points(points: Tensor) -> Tensor:
    """Scale U(0.9, 1.1), small rotation about all axes (sigma 0.06, at most 0.18) [joint-label]. (B, P, 3)"""
    n, device = len(points), points.device
    angles = (0.06 * torch.randn(n, 3, device=device)).clamp(-0.18, 0.18)
    return rotate(points, angles) * (0.9 + 0.2 * torch.rand(n, 1, 1, device=device))


def strong_points(points: Tensor) -> Tensor:
    """Scale U(0.5, 2), any yaw, shift U(-0.5, 0.5) x extent, jitter, dropout up to 0.875 [self-training].

    Jitter: sigma 0.01, at most 0.05. A dropped point becomes the cloud's first, so that P stays. (B, P, 3)
    """
    n, total, _ = points.shape
    device = points.device
    yaw = torch.zeros(n, 3, device=device)
    yaw[:, 2] = 2 * math.pi * torch.rand(n, device=device)
    points = rotate(points, yaw) * (0.5 + 1.5 * torch.rand(n, 1, 1, device=device))
    extent = points.amax(dim=1, keepdim=True) - points.amin(dim=1, keepdim=True)
    points = points + extent * (torch.rand(n, 1, 3, device=device) - 0.5)
    points = points + (0.01 * torch.randn(points.shape, device=device)).clamp(-0.05, 0.05)
    dropped = torch.rand(n, total, 1, device=device) < 0.875 * torch.rand(n, 1, 1, device=device)
    return torch.where(dropped, points[:, :1], points)


def draw_views(points: Tensor, size: int) -> dict[str, Tensor]:
    """Weak and strong views of clouds (B, P, 3); both images come from one random depth view of an object."""
    images = random_view(points, size)
    return {"weak_image": weak_image(images), "strong_image": strong_image(images),
            "weak_points": weak_points(points), "strong_points": strong_points(points)}


# -----------------------------------------------------------------------------------------------------------
# Downloads

HUGGING_FACE = "https://huggingface.co/datasets/"
ULIP2 = "ULIP-2-PointBERT-8k-xyz-pc-slip_vit_b-objaverse-pretrained.pt"
# sha256 None: not published; recorded beside the file when it is fetched, and checked from then on.
DOWNLOADS = {
    "ulip2": dict(file=ULIP2, sha256=None, terms="BSD-3-Clause, 8k-point Objaverse model of ULIP-2",
                  urls=[f"{HUGGING_FACE}SFXX/ulip/resolve/main/ULIP-2/pretrained_models/{ULIP2}"]),
    "ulip1": dict(file="checkpoint_pointbert.pt", sha256=None, terms="BSD-3-Clause, ULIP-1 on ShapeNet-55",
                  urls=[HUGGING_FACE + "SFXX/ulip/resolve/main/ULIP-1/pretrained_models/"
                        "ckpt_zero-sho_classification/checkpoint_pointbert.pt"]),
    "modelnet40": dict(file="modelnet40_ply_hdf5_2048.zip", terms="435 MB, for academic research only",
                       sha256="07670e237db72ece0f723b9abb571534c9ad655a6456b389646587dc72bb8bae",
                       urls=["https://shapenet.cs.stanford.edu/media/modelnet40_ply_hdf5_2048.zip",
                             f"{HUGGING_FACE}Msun/modelnet40/resolve/main/modelnet40_ply_hdf5_2048.zip"]),
}


def download(name: str, root: str | Path, allowed: bool = True) -> Path:
    """The file DOWNLOADS[name] under `root`, fetched if it is not there; its sha256 is checked every time.

    What a broken connection left (FILE.part) is continued; each address is tried three times in turn. The
    file gets its name once it is whole and right.
    Raises: ValueError that names the file, where to put it, and what went wrong at each address.
    """
    row, reasons = DOWNLOADS[name], {}
    path = Path(root) / row["file"]
    part, recorded = path.with_name(path.name + ".part"), path.with_name(path.name + ".sha256")
    if not path.exists():
        if not allowed:
            raise ValueError(f"{path} is missing; put it there, or leave out --no-download")
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"fetching {path.name} ({row['terms']}) into {root}", flush=True)
    for url in row["urls"] * 3:
        if path.exists():
            break
        try:
            fetch(url, part)
            if row["sha256"] and sha256(part) != row["sha256"]:
                part.unlink()
                raise ValueError("wrong sha256")
            if not row["sha256"]:
                recorded.write_text(sha256(part))
            os.replace(part, path)
        except (OSError, ValueError, HTTPException) as error:
            reasons[url] = str(error)
    if not path.exists():
        failed = ", ".join(f"{url}: {reason}" for url, reason in reasons.items())
        raise ValueError(f"cannot fetch {path.name} ({failed}); fetch it yourself and put it at {path}")
    expected = row["sha256"] or (recorded.read_text() if recorded.exists() else None)
    if expected and sha256(path) != expected:
        raise ValueError(f"{path} has changed since it was fetched (sha256); delete it to fetch it again")
    return path


def fetch(url: str, part: Path):
    """Fetch a URL into `part`, going on where `part` ends. Raises: OSError if it ends early."""
    have = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urlopen(request, timeout=60)
    except HTTPError as error:
        if error.code == 416:  # `part` is no beginning of this file
            part.unlink()
        raise
    with response, open(part, "ab" if response.status == 206 else "wb") as file:
        size = int(response.headers.get("Content-Length", 0)) + file.tell()
        with tqdm(total=size, initial=file.tell(), unit="B", unit_scale=True, desc=part.stem) as bar:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
        if file.tell() < size:
            raise OSError(f"broken off at {file.tell()} of {size} bytes")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def extract(archive: Path, root: Path):
    """Unpack a zip inside `root`. Raises: ValueError for a member outside, before anything is written."""
    root = Path(root).resolve()
    with zipfile.ZipFile(archive) as file:
        for member in file.namelist():
            if not (root / member).resolve().is_relative_to(root):
                raise ValueError(f"{archive}: member {member} leaves its folder; fetch the archive again")
        file.extractall(root)


# -----------------------------------------------------------------------------------------------------------
# Data sets

def load_shapes(root: Path, split: str, points: int, domain: str) -> Objects:
    """2,000 train or 500 test objects of the procedural set, by default as a scanner sees them."""
    return sample_shapes(*{"train": (2000, 1), "test": (500, 2)}[split], domain, points)


def load_modelnet(root: Path, split: str, points: int, fetch_missing: bool = False,
                  classes: tuple | None = None) -> Objects:
    """ModelNet40, or ten of its classes, in the official h5 layout (z up). The first `points` of each cloud.

    Raises: ValueError naming the file that is missing, unreadable or not as documented.
    """
    folder = Path(root) / "modelnet40_ply_hdf5_2048"
    if fetch_missing and not folder.exists():
        extract(download("modelnet40", root), Path(root))
    names = [line.strip().replace("_", " ") for line in read_lines(folder / "shape_names.txt")]
    clouds, labels = [], []
    for line in read_lines(folder / f"{split}_files.txt"):
        path = folder / Path(line.strip()).name  # the list holds paths of the machine it was made on
        try:
            with h5py.File(path) as file:
                clouds.append(file["data"][:, :points])
                labels.append(file["label"][:].reshape(-1))
        except (OSError, KeyError) as error:
            raise ValueError(f"cannot read {path}: {error}; expected data and label; fetch it again")
        if clouds[-1].shape[1] < points:
            raise ValueError(f"{path} has {clouds[-1].shape[1]} points, --points is {points}; lower it")
    clouds, labels = torch.from_numpy(np.concatenate(clouds)), torch.from_numpy(np.concatenate(labels)).long()
    if labels.max() >= len(names):
        raise ValueError(f"label {int(labels.max())} in {folder}, but shape_names.txt has {len(names)} names")
    if classes is not None:
        index = torch.tensor([list(classes).index(name) if name in classes else -1 for name in names])
        clouds, labels, names = clouds[index[labels] >= 0], index[labels][index[labels] >= 0], list(classes)
    return Objects(to_unit_sphere(clouds.float()), labels, names, "", split)


def load_modelnet10(root: Path, split: str, points: int, fetch_missing: bool = False) -> Objects:
    """The ten classes of ModelNet10 out of the ModelNet40 files: 3,991 train, 908 test."""
    return load_modelnet(root, split, points, fetch_missing, MODELNET10)


# WordNet numbers and names of ShapeNetCore's 55 classes, in label order.
SHAPENET55 = dict(entry.split(" ", 1) for entry in (
    "02691156 airplane,02747177 trash bin,02773838 bag,02801938 basket,02808440 bathtub,02818832 bed,"
    "02828884 bench,02843684 birdhouse,02871439 bookshelf,02876657 bottle,02880940 bowl,02924116 bus,"
    "02933112 cabinet,02942699 camera,02946921 can,02954340 cap,02958343 car,02992529 cell phone,"
    "03001627 chair,03046257 clock,03085013 keyboard,03207941 dishwasher,03211117 display,03261776 earphone,"
    "03325088 faucet,03337140 file cabinet,03467517 guitar,03513137 helmet,03593526 jar,03624134 knife,"
    "03636649 lamp,03642806 laptop,03691459 loudspeaker,03710193 mailbox,03759954 microphone,"
    "03761084 microwave,03790512 motorbike,03797390 mug,03928116 piano,03938244 pillow,03948459 pistol,"
    "03991062 flowerpot,04004475 printer,04074963 remote control,04090263 rifle,04099429 rocket,"
    "04225987 skateboard,04256520 sofa,04330267 stove,04379243 table,04401088 telephone,04460130 tower,"
    "04468005 train,04530566 watercraft,04554684 washer").split(","))


def load_shapenet55(root: Path, split: str, points: int, fetch_missing: bool = False) -> Objects:
    """Point-BERT's ShapeNet-55 for pre-training: ShapeNet-55/{train,test}.txt, shapenet_pc/SYNSET-ID.npy.

    The files are y up. A fixed random choice of `points` of each cloud.
    Raises: ValueError naming the file that is missing, unreadable or of an unknown class.
    """
    clouds, labels, synsets = [], [], list(SHAPENET55)
    for i, line in enumerate(read_lines(Path(root) / "ShapeNet-55" / f"{split}.txt")):
        path = Path(root) / "shapenet_pc" / line.strip()
        try:
            cloud = np.load(path, mmap_mode="r", allow_pickle=False)
            labels.append(synsets.index(path.name.split("-")[0]))
            chosen = np.random.default_rng(i).choice(len(cloud), points, replace=False)
            clouds.append(cloud[np.sort(chosen)][:, [2, 0, 1]].astype(np.float32))
        except (OSError, ValueError, IndexError) as error:
            raise ValueError(f"cannot read {path}: {error}; expected SYNSET-ID.npy, {points} points or more")
    clouds = to_unit_sphere(torch.from_numpy(np.stack(clouds)))
    return Objects(clouds, torch.tensor(labels), list(SHAPENET55.values()), "", split)


def read_lines(path: Path) -> list[str]:
    """Lines of a text file that has to be there."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; README, Data, says what goes there")
    return path.read_text().splitlines()


# One row per data set: loader, default domain and templates, the original code's threshold and point weight,
# and what it wants otherwise than `tiny`'s recipe: `shapes` is far from that start, so its teacher follows
# sooner and longer, and `fairness` weighs more against the many wrong names of the first epochs.
DATASETS = {
    "shapes": dict(load=load_shapes, domain="target", templates="depth", threshold=0.84, point_weight=1.0,
                   tiny=dict(epochs=10, momentum=0.99, w_fair=4.0)),
    "modelnet10": dict(load=load_modelnet10, domain="source", templates="depth", threshold=0.84,
                       point_weight=0.9),
    "modelnet40": dict(load=load_modelnet, domain="source", templates="depth", threshold=0.84,
                       point_weight=0.9),
    "shapenet55": dict(load=load_shapenet55, domain="source", templates="3d", threshold=0.84,
                       point_weight=0.9),
}


def load_dataset(name: str, root: str | Path, split: str, points: int = 1024,
                 domain: str | None = None, fetch_missing: bool = False) -> Objects:
    """Objects of a data set's split ("train" or "test"), z up, in the unit sphere.

    domain "target" shows a real set as a scanner would (see scan); None takes the data set's own.
    fetch_missing: fetch what is not there and may be fetched without a form.
    Raises: ValueError for a name that is not in DATASETS, and for what the loaders find wrong.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; one of {', '.join(DATASETS)}")
    row = DATASETS[name]
    domain = domain or row["domain"]
    if name == "shapes":
        objects = load_shapes(Path(root), split, points, domain)
    else:
        objects = row["load"](Path(root), split, points, fetch_missing)
        if domain == "target":
            objects.points = scan(objects.points, points, seed=("train", "test").index(split))
    objects.name = name if domain == row["domain"] else f"{name}-{domain}"
    return objects
