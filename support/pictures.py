"""Pictures, each as the bytes of a PNG file: curves, a confusion matrix, a grid of views and clouds.

Class names are anybody's: parse_math=False keeps matplotlib from reading "$5 and $10" as a formula.
"""
import io
import math
import sys
import warnings

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from torch import Tensor

# Fonts for names in Chinese, Japanese or Korean, of which whatever is installed is used.
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "SimHei",
             "Microsoft YaHei", "PingFang SC", "Arial Unicode MS")


def png(figure: Figure) -> bytes:
    """The bytes of the figure's file."""
    installed = {font.name for font in fontManager.ttflist}
    families = ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]
    for text in figure.findobj(Text):
        text.set_fontfamily(families)
    buffer = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(buffer, format="png", dpi=100)
    if any("Glyph" in str(warning.message) for warning in caught):
        print("warning: no font here has all letters of the names; install one, for example Noto Sans CJK",
              file=sys.stderr)
    return buffer.getvalue()


def plot_curves(lines: list[dict], start: dict) -> bytes:
    """The teacher by epoch, beginning with the start, and the pseudo-labels by step.

    With labels the left panel is accuracy; without, what image and point tell each other and how often they
    agree. lines: of log.jsonl. start: what eval.assess says of it.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    evaluated = [{"epoch": 0, "teacher": start}, *(line for line in lines if "teacher" in line)]

    def by_epoch(axes, key: str, **style):
        axes.plot([line["epoch"] for line in evaluated], [line["teacher"][key] for line in evaluated],
                  marker="o", markersize=3, **style)

    # Okabe and Ito's colours, safe for colour-blind eyes.
    if "joint" in start:
        for modality, colour in {"image": "#0072B2", "point": "#D55E00", "joint": "#000000"}.items():
            left.axhline(start[modality], color=colour, linestyle=":", linewidth=1)
            by_epoch(left, modality, color=colour, label=modality)
        left.set(ylabel="test top-1, %", title="teacher (dotted: zero-shot)")
    else:
        by_epoch(left, "information", color="#0072B2", label="information, nats")
        most = math.log(len(start["shares"]))  # if both gave each name equally often, and always the same
        left.set(ylabel="nats", ylim=(0, most), title="teacher: what image and point tell each other")
    left.set(xlabel="epoch")
    left.xaxis.get_major_locator().set_params(integer=True)

    steps = [line for line in lines if "coverage" in line]
    curves = {"coverage": ("#009E73", [line["coverage"] for line in steps])}
    if all(line["label_accuracy"] is not None for line in steps):
        curves["label accuracy"] = "#CC79A7", [line["label_accuracy"] for line in steps]
    # exp(entropy) names, used equally often, would be as even.
    curves["names in use"] = "#E69F00", [math.exp(line["entropy"]) / len(line["named"]) for line in steps]
    for label, (colour, shares) in curves.items():
        right.plot([line["step"] for line in steps], [100 * share for share in shares], color=colour,
                   label=label)
    if "joint" not in start and steps:
        steps_per_epoch = steps[-1]["step"] / steps[-1]["epoch"]
        right.plot([line["epoch"] * steps_per_epoch for line in evaluated],
                   [line["teacher"]["agreement"] for line in evaluated], color="#56B4E9", marker="o",
                   markersize=3, label="image and point agree")
    right.set(xlabel="step", ylabel="%", ylim=(0, 102), title="pseudo-labels")

    for axes in (left, right):
        axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return png(figure)


def plot_confusion(labels: Tensor, named: Tensor, names: list[str], title: str) -> bytes:
    """Percent of each class (row) that was given each name (column), from numbers of classes (N,) and (N,).

    Of up to 100 classes every name and every number is written. Of more the picture stays as large (3,500
    pixels), cells shrink, and every n-th name is written.
    """
    count = len(names)
    # Each pair of true and predicted class is one number, so that all pairs are counted at once.
    cells = torch.bincount(labels * count + named, minlength=count * count)
    matrix = 100 * F.normalize(cells.view(count, count).double(), p=1)

    side = 0.32 * min(count, 100)  # inches: 0.32 hold a number of two digits
    figure = Figure(figsize=(2.5 + side, 2 + side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=100)
    ticks = range(0, count, math.ceil(count / 100))
    axes.set_xticks(ticks, [names[k] for k in ticks], rotation=90, parse_math=False)
    axes.set_yticks(ticks, [names[k] for k in ticks], parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(title, parse_math=False)

    if count <= 100:
        for i, j in (matrix >= 0.5).nonzero().tolist():
            axes.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if matrix[i, j] > 55 else "black")
    return png(figure)


def draw_grid(cells: list, columns: int, title: str | None = None) -> bytes:
    """Images (3, H, W) and clouds (P, 3), each with its title, row by row."""
    rows = math.ceil(len(cells) / columns)
    figure = Figure(figsize=(1.9 * columns, 2.3 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    for place, (item, text) in enumerate(cells, start=1):
        is_cloud = item.dim() == 2
        axes = figure.add_subplot(rows, columns, place, projection="3d" if is_cloud else None)
        if is_cloud:
            axes.scatter(*item.T, s=1, c=item[:, 2], linewidths=0)
            axes.set(aspect="equal")
        else:
            axes.imshow(item.permute(1, 2, 0).clamp(0, 1).numpy())
        axes.axis("off")
        drawable = text.encode("utf-8", "replace").decode()  # names of files need not be UTF-8
        axes.set_title(drawable, fontsize=8, loc="left", parse_math=False)
    return png(figure)
