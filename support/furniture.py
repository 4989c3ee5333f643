"""The procedural data set `shapes`: ten classes of furniture, each a short program of solids.

Lengths are roughly metres, the front faces -y. A piece of furniture is a list of parts; + joins pieces.
The order of the random draws is part of the data: a line moved here makes other objects.
"""
import math
from functools import partial

import numpy as np
import torch
from torch import Tensor


# ------ Pieces ----------------------------------------------------------------------------------------------
def part(kind: str, centre, size, tilt=(0.0, 0.0, 0.0), taper=1.0) -> list:
    """A piece of one solid, a list of one part.

    kind: box, tube (elliptic), ball, or bowl (the lower half of a ball).
    centre: (x, y, z), or its height z alone in the middle. size: its full extents.
    tilt: turns about x, y, z around its centre.
    taper: how wide the top of a box or tube is, as a share of its bottom.
    """
    if not isinstance(centre, tuple):
        centre = (0, 0, centre)
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
    side, end = box(z, (thick, d, high)), box(z, (w, thick, high))
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
    corner = (w - thick) / 2, (d - thick) / 2, h / 2
    leg = kind(corner, (thick, thick, h), (splay, -splay, 0), taper)
    return mirrored(leg, *CORNERS)


def pedestal(u, h, reach) -> list:
    """A central column on a disc or on four or six spokes."""
    n, thick = u.integers(2, 4), u(0.04, 0.14)
    disc = tube(0.02, (2 * reach, 2 * reach, 0.04), taper=u(0.3, 1))
    spokes = [box(0.04, (2 * reach, 0.05, 0.05), (0, 0, math.pi * i / n)) for i in range(n)]
    column = tube(h / 2, (thick, thick, h), taper=u(0.6, 1.4))
    return column + u.pick(disc, sum(spokes, []))


def drawers(u, w, d, h, rows, columns, x=0.0, z=0.0) -> list:
    """A cabinet standing on z with rows x columns of drawer fronts, some with knobs or bars."""
    proud, gap, middle = u(0.005, 0.03), u(0.01, 0.04), z + h / 2
    grip = x, -d / 2 - proud - 0.02, middle
    front = box((x, -(d + proud) / 2, middle), (w / columns - gap, proud, h / rows - gap))
    knob, bar = ball(grip, (0.04, 0.04, 0.03)), box(grip, (0.3 * w / columns, 0.04, 0.03))
    front += u.pick([], knob, bar)
    fronts = row(row(front, columns, x=w / columns), rows, z=h / rows)
    return box((x, 0, middle), (w, d, h)) + fronts


def back_rest(u, w, h, y, z, thick) -> list:
    """A leaning back from height z up: a panel, upright or level slats, or curved."""
    n, lean = u.integers(2, 7), u(0, 0.3)
    centre, tilt, over = (0, y + lean * h / 2, z + h / 2), (-lean, 0, 0), lean * h
    panel = u.pick(box, box, tube)(centre, (w, thick, h), tilt)
    posts = row(box(centre, (0.04, thick, h), tilt), 2, x=w - 0.04)
    posts += box((0, y + over, z + h), (w, thick, 0.06), tilt)
    upright = row(box(centre, (0.35 * w / n, 0.7 * thick, h), tilt), n, x=w / n)
    level = row(box(centre, (w, 0.7 * thick, 0.45 * h / n), tilt), n, y=over / n, z=h / n)
    curve = []
    for a in np.linspace(-0.7, 0.7, 5):
        on_arc = 0.6 * w * math.sin(a), y - 0.5 * w * (1 - math.cos(a)), z + h / 2
        curve += box(on_arc, (0.24 * w, thick, h), (-lean, 0, -a))
    return u.pick(panel, posts + upright, posts + level, curve)


# ------ The ten programs ------------------------------------------------------------------------------------
def bathtub(u):
    w, d, h, wall, foot = u(1.3, 2.0), u(0.65, 1.0), u(0.4, 0.8), u(0.03, 0.12), u(0.05, 0.18)
    deep = 2 * (h - foot)
    trough = frame(w, d, h / 2, h, wall) + box(h * u(0.08, 0.3), (w, d, 0.03))
    sunk = frame(w, d, h / 2, h, wall) + frame(w, d, h, 0.02, 0.1)
    sunk += bowl(h, (0.9 * w, 0.9 * d, deep))
    shell = bowl(h, (w, d, deep)) + bowl(h, (w - wall, d - wall, 0.9 * deep))
    shell += u.perhaps(0.5, bowl((-0.3 * w, 0, 1.25 * h), (0.38 * w, 0.95 * d, h)))
    plinth = tube(0.15 * h, (0.6 * w, 0.6 * d, 0.3 * h))
    claws = four_legs(u, 0.6 * w, 0.6 * d, foot + 0.2 * h, 0.06)
    tap = tube((0.42 * w, 0, h + 0.08), (0.04, 0.04, 0.18))
    tap += box((0.38 * w, 0, h + 0.16), (0.14, 0.03, 0.03))
    return u.pick(trough, sunk, shell + plinth, shell + claws) + u.perhaps(0.4, tap)


def bed(u):
    w, d, base, soft, n = u(0.85, 2.0), u(1.85, 2.25), u(0.12, 0.4), u(0.12, 0.32), u.integers(1, 3)
    top, head, foot, up = base + soft, u(0.25, 0.9), u(0.05, 0.4), u(1.0, 2.0)
    legs = box(0.75 * base, (w, d, 0.5 * base)) + four_legs(u, w, d, base, u(0.05, 0.12))
    board = box((0, d / 2, (top + head) / 2), (w * u(0.98, 1.2), u(0.04, 0.14), top + head))
    arch = board + tube((0, d / 2, top + head), (0.9 * w, 0.5 * head, 0.08), (math.pi / 2, 0, 0))
    end = box((0, -d / 2, (top + foot) / 2), (w, u(0.04, 0.1), top + foot))
    pillow = u.pick(ball, box)(
        (0, 0.38 * d, top + 0.05), (0.8 * w / n, 0.38, 0.14), (u(-0.4, 0), 0, 0))
    cover = box((0, -0.12 * d, base + 0.6 * soft), (1.04 * w, 0.74 * d, 1.1 * soft))
    bunk = box(base + 1, (w, d, u(0.1, 0.25))) + four_legs(u, w, d, base + 1.3, 0.07)
    posts = four_legs(u, w, d, up, 0.07) + u.perhaps(0.7, frame(w, d, up, 0.05, 0.05))
    stands = row(box((0, d / 2 - 0.25, 0.25), (0.45, 0.4, 0.5)), 2, x=w + 0.6)
    mattress = box(base + soft / 2, (0.97 * w, 0.97 * d, soft))
    plinth = box(base / 2, (w, d, base))
    return (mattress + u.perhaps(0.4, cover) + u.pick(legs, plinth) + u.perhaps(0.45, end)
            + u.perhaps(0.85, u.pick(board, board, arch, back_rest(u, w, head + soft, d / 2, base, 0.08)))
            + u.perhaps(0.8, row(pillow, n, x=w / n)) + u.perhaps(0.36, u.pick(bunk, posts, stands)))


def chair(u):
    w, d, seat, thin, high = u(0.4, 0.65), u(0.4, 0.65), u(0.36, 0.52), u(0.03, 0.14), u(0.15, 0.3)
    legs = four_legs(u, w, d, seat, u(0.025, 0.07))
    bars = row(box(seat * u.pick(0.04, u(0.2, 0.6)), (0.035, d, 0.035)), 2, x=0.85 * w)
    block = box(seat / 2, (w * u(0.8, 1), d * u(0.8, 1), seat))
    arm = box(seat + high, (thin, d * u(0.7, 1), u(0.03, 0.08)))
    arm += box((0, -0.25 * d, seat + high / 2), (0.8 * thin, d * u.pick(0.1, 0.5), high))
    return (u.pick(box, box, tube)(seat, (w, d, u(0.03, 0.14)))
            + u.perhaps(0.45, row(arm, 2, x=w))
            + back_rest(u, w * u(0.8, 1), u(0.3, 0.8), d / 2 - 0.03, seat, u(0.03, 0.1))
            + u.pick(legs, legs + bars, pedestal(u, seat, u(0.22, 0.36)), block))


def desk(u):
    w, d, h, wide, long = u(1.0, 2.0), u(0.5, 0.9), u(0.68, 0.82), u(0.25, 0.6), u(0.5, 1.1)
    x, y, deep, high = 0.47 * w, -(d + long) / 2, u(0.35, 0.6), u(0.3, 0.8)
    legs = row(box((x, 0, h / 2), (0.05, 0.05, h)), 2, y=0.84 * d)
    panel = box((x, 0, h / 2), (u(0.02, 0.07), d * u(0.8, 1), h))
    tall = drawers(u, wide, 0.92 * d, 0.96 * h, u.integers(2, 5), 1, (w - wide) / 2)
    hung = drawers(u, wide, 0.92 * d, 0.43 * h, u.integers(1, 4), 1, (w - wide) / 2, 0.55 * h)
    hung += legs
    wing = box(((w - deep) / 2, y, h), (deep, long, 0.04))
    wing += box(((w - deep) / 2, y - 0.4 * long, h / 2), (0.95 * deep, u(0.03, 0.4) * long, h))
    hutch = row(box((0, d / 2 - 0.13, h + high / 2), (0.03, 0.26, high)), 3, x=w / 2 - 0.02)
    hutch += row(box((0, d / 2 - 0.13, h + 0.75 * high), (w, 0.26, 0.03)), 2, z=high / 2)
    right = u.pick(tall, tall, hung) + u.perhaps(0.3, wing)
    left = u.pick(tall, hung, panel, legs)
    apron = box((0, d / 2 - 0.05, h * u(0.55, 0.8)), (0.95 * w, 0.03, 0.4 * h))
    whole = box(h, (w, d, u(0.02, 0.07))) + right + mirrored(left, LEFT)
    whole += u.perhaps(0.65, apron) + u.perhaps(0.35, hutch)
    return mirrored(whole, u.pick(LEFT, RIGHT))


def dresser(u):
    w, d, foot, high = u(0.5, 1.7), u(0.38, 0.6), u.pick(0.01, u(0.04, 0.2)), u(0.5, 0.9)
    wide = w > 0.9
    h, columns = u(0.65, 1.3) if wide else u(0.9, 1.7), u.integers(1, 4 if wide else 3)
    glass = u.pick(box, ball)((0, d / 2 - 0.04, h + high / 2), (w * u(0.5, 0.95), 0.05, high))
    top = u.perhaps(0.6, box(h, (1.05 * w, 1.08 * d, 0.04)))
    legs = four_legs(u, w, d, foot, u(0.04, 0.1))
    chest = drawers(u, w, d, h - foot, u.integers(3, 7), columns, z=foot)
    return legs + top + chest + u.perhaps(0.25, glass)


def monitor(u):
    w, thick, lift, deep = u(0.35, 0.75), u(0.015, 0.08), u(0.06, 0.25), u(0.2, 0.4)
    h = w / u(1.2, 1.9)
    middle = lift + h / 2
    cathode = box((0, 0.25 * deep, middle), (0.97 * w, 0.5 * deep, 0.97 * h))
    cathode += tube((0, 0.7 * deep, middle), (0.9 * w, 0.9 * h, 0.5 * deep), (-math.pi / 2, 0, 0), 0.7)
    bulge = u.pick(box, ball)(
        (0, thick, middle - 0.02), (w * u(0.4, 0.8), 2 * thick, h * u(0.4, 0.7)))
    neck = u.pick(box, tube)(
        (0, thick / 2 + 0.02, lift / 2 + 0.15 * h),
        (u(0.03, 0.15), u(0.02, 0.06), lift + 0.3 * h), (u(-0.2, 0.1), 0, 0))
    foot = u.pick(box, tube)(
        (0, 0.02, 0.015), (w * u(0.35, 0.7), u(0.14, 0.28), 0.03), taper=u(0.6, 1))
    screen = box(middle, (w, thick, h), (u(-0.2, 0.05), 0, 0))
    return screen + u.pick(cathode, bulge, [], []) + u.perhaps(0.94, neck + foot)


def night_stand(u):
    w, d, h = u(0.38, 0.68), u(0.34, 0.56), u(0.42, 0.75)
    foot = u.pick(0.01, u(0.04, 0.15), u(0.15, 0.5) * h)
    chest = drawers(u, w, d, h - foot, u.integers(1, 4), 1, z=foot)
    chest += four_legs(u, w, d, foot, u(0.03, 0.08))
    shelf = drawers(u, w, d, 0.3 * h, 1, 1, z=0.7 * h)
    shelf += box((0, d / 2, 0.35 * h), (w, 0.02, 0.7 * h))
    shelf += row(box(0.35 * h, (0.03, d, 0.7 * h)), 2, x=w)
    board = box(h * u(0.05, 0.35), (0.97 * w, 0.97 * d, 0.03))
    top = box(h, (w * u(1, 1.15), d * u(1, 1.15), u(0.02, 0.05)))
    lamp = tube(h + 0.15, (0.04, 0.04, 0.3)) + tube(h + 0.35, (0.28, 0.28, 0.2), taper=0.6)
    body = u.pick(chest, chest, chest + board, shelf + board)
    return body + u.perhaps(0.7, top) + u.perhaps(0.07, lamp)


def sofa(u):
    w, d, seat, foot, soft = u(1.1, 2.5), u(0.75, 1.05), u(0.32, 0.48), u(0.02, 0.15), u(0.08, 0.2)
    arm, back, high, long, n = u(0.08, 0.32), u(0.3, 0.55), u(0.1, 0.32), u(0.6, 1.2), u.integers(1, 5)
    inner, y = w - 2 * arm, -(d + long) / 2
    side = box((foot + seat + high) / 2, (arm, d, seat + high - foot))
    rolled = tube(seat + high, (1.2 * arm, 1.2 * arm, d), (math.pi / 2, 0, 0))
    side += u.perhaps(0.3, rolled)
    cushion = box((0, -0.05, seat + soft / 2), (0.96 * inner / n, 0.75 * d, soft))
    pillow = u.pick(box, ball)((0, d / 2 - 0.25, seat + soft + 0.15), (0.9 * inner / n, 0.18, 0.35))
    chaise = box(((w - d) / 2, y, (seat + soft) / 2), (d, long, seat + soft))
    return (box((seat + foot) / 2, (w, d, seat - foot)) + four_legs(u, w, d, foot, u(0.04, 0.1))
            + box((0, d / 2 - 0.1, seat + back / 2), (w, u(0.12, 0.3), back), (u(-0.2, 0), 0, 0))
            + row(u.perhaps(0.9, cushion) + u.perhaps(0.6, pillow), n, x=inner / n)
            + u.perhaps(0.9, row(side, 2, x=w - arm))
            + u.perhaps(0.2, mirrored(chaise, u.pick(LEFT, RIGHT))))


def table(u):
    d, h, thick, lean = u(0.5, 1.1), u.pick(u(0.35, 0.55), u(0.65, 0.8)), u(0.02, 0.09), u(0.3, 0.6)
    oblong, inset = u(0.6, 2.2), u(0, 0.12)
    top, w, inset = u.pick(
        (box, oblong, inset), (box, oblong, 0), (box, d * u(0.95, 1.6), inset),
        (tube, d, 0.2 * d), (tube, d * u(1, 1.5), 0.2 * d))
    inner, across = w - 2 * inset, d - 2 * inset
    legs = four_legs(u, inner, across, h, u(0.03, 0.11))
    apron = box(h - thick / 2 - 0.05, (inner - 0.06, across - 0.06, u(0.05, 0.14)))
    legs += u.perhaps(0.5, apron)
    column = row(pedestal(u, h, u(0.25, 0.45) * d), 2 if w > 1.5 * d else 1, x=w / 2)
    panels = row(box(h / 2, (u(0.03, 0.1), d * u(0.6, 0.98), h)), 2, x=0.95 * inner)
    strut = box((0.4 * w, 0, h / 2), (0.05, 0.06, h / math.cos(lean)), (lean, 0, 0))
    trestle = mirrored(strut, *CORNERS) + box(h / 2, (0.8 * w, 0.05, 0.06))
    shelf = box(h * u(0.15, 0.45), (0.8 * inner, 0.8 * across, 0.03))
    base = u.pick(legs, legs, legs, column, panels, trestle)
    return top(h, (w, d, thick)) + base + u.perhaps(0.25, shelf)


def toilet(u):
    w, d, h, ajar = u(0.34, 0.44), u(0.42, 0.56), u(0.36, 0.46), u(0.0, 0.3)
    wide, deep, high, low = w * u(0.9, 1.4), u(0.14, 0.24), u(0.28, 0.45), h - u(0, 0.12)
    foot = u.pick(tube, tube, box)(
        (0, 0.05, 0.35 * h), (w * u(0.5, 0.85), d * u(0.6, 0.95), 0.7 * h), taper=u(0.7, 1.2))
    open_lid = tube((0, d / 2, h + 0.45 * d), (w, 0.95 * d, 0.025), (math.pi / 2 - ajar, 0, 0))
    lid = u.pick(open_lid, tube(h + 0.045, (w, d, 0.03)))
    cistern = box((0, (d + deep) / 2, low + high / 2), (wide, deep, high))
    cistern += box((0, (d + deep) / 2, low + high), (1.06 * wide, 1.1 * deep, 0.035))
    cistern += box((0, d / 2, h / 2), (w * u(0.4, 0.8), deep, h))
    basin = bowl(h, (w, d, 2 * h * u(0.5, 0.9))) + tube(h + 0.015, (1.04 * w, 1.02 * d, 0.03))
    return basin + u.perhaps(0.85, foot) + u.perhaps(0.85, lid) + u.perhaps(0.85, cistern)


# In MODELNET10's order.
PROGRAMS = bathtub, bed, chair, desk, dresser, monitor, night_stand, sofa, table, toilet


# ------ Points on their surfaces ----------------------------------------------------------------------------
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
    waiting = rng.exponential(size=(count, 3)) / faces[which]
    face = waiting.argmin(axis=1)[:, None]
    cube = np.where(np.arange(3) == face, np.sign(spread), spread)

    # A tube: its upper and lower face are discs, the others mantle. A ball is rings, a bowl its lower ones.
    angle = rng.uniform(0, 2 * math.pi, (count, 1))
    circle = np.hstack([np.cos(angle), np.sin(angle)])
    disc = circle * np.where(face == 2, np.sqrt(rng.random((count, 1))), 1)
    ring = circle * np.sqrt(1 - spread[:, 2:] ** 2)

    kind = kind[which, None]
    width = 1 + (taper[which, None] - 1) * (cube[:, 2:] + 1) / 2
    flat = np.select([kind == "box", kind == "tube"], [cube[:, :2] * width, disc * width], ring)
    z = spread[:, 2:]
    z = np.select([kind == "ball", kind == "bowl"], [z, -np.abs(z)], cube[:, 2:])
    points = np.hstack([flat, z]) * size[which] / 2
    axes = rotate_about_xyz(torch.eye(3, dtype=torch.float64), torch.from_numpy(tilt)).numpy()
    return centre[which] + np.einsum("ni,nij->nj", points, axes[which])


def sample_furniture(kind: int, points: int, seed: list[int]) -> tuple[np.ndarray, float]:
    """One object of the class PROGRAMS[kind], the same for a seed: a cloud (points, 3), a yaw to turn it by.

    NumPy promises equal numbers in all versions only for PCG64's bits, not for what Generator makes of them:
    the clouds are equal to the bit with NumPy 1.26, 2.0, 2.2 and 2.4, and a test would see a change.
    """
    rng = Chance(np.random.PCG64(seed))
    cloud = sample_parts(PROGRAMS[kind](rng), points, rng) * rng.uniform(0.85, 1.15, 3)
    return cloud, rng.uniform(0, 2 * math.pi)


def rotate_about_xyz(points: Tensor, angles: Tensor) -> Tensor:
    """Rotate clouds about x, then y, then z. points (B, P, 3), angles (B, 3) -> (B, P, 3)"""
    # Turn the three axes, not the points: one matrix product then turns all points.
    axes = torch.eye(3, dtype=angles.dtype, device=angles.device).expand(len(angles), 3, 3)
    for axis in range(3):
        sin, cos = angles[:, axis, None].sin(), angles[:, axis, None].cos()
        fixed, a, b = axes.roll(-axis, -1).unbind(-1)
        axes = torch.stack([fixed, cos * a - sin * b, sin * a + cos * b], dim=-1).roll(axis, -1)
    return points @ axes.to(points.dtype)
