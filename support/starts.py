"""Files of starts: every family's layout is turned into a dict in that of our own. No model is built here."""
import argparse
import codecs
import io
import math
from pathlib import Path

import numpy as np
import torch
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD
from torch import nn

from support import UserError, write_whole
from support.fetch import fetch


# ------ Starts and their files ------------------------------------------------------------------------------
# Each start by its --model name: how clouds were cut into groups in its training, which a file made here says
# itself. Any other name is a plain vision transformer of open_clip.
STARTS = {
    "tiny": dict(groups=32, group_size=16),
    "ulip2": dict(groups=512, group_size=32),
    "ulip1": dict(groups=512, group_size=32),
    "crossmost": dict(groups=64, group_size=32),
}
USUAL_GROUPS = STARTS["crossmost"]  # of a file that does not say

# A CLIP and a Point-BERT small enough to pre-train on one CPU core in a quarter of an hour.
TINY = {
    "embed_dim": 128,
    "image": dict(image_size=64, patch_size=16, width=96, layers=4, heads=3),
    "point": dict(STARTS["tiny"], width=96, layers=4, heads=3, stem=[32, 64, 96], token_width=64,
                  drop_path=0.0),
    "text": dict(fixed_tokens=True, context_length=20, width=64, heads=2, layers=2),
}


def start_file(name: str, cache: Path, allowed: bool = True) -> Path:
    """Find a start's file, or fetch one of ULIP's where that is allowed."""
    if name == "tiny":
        return Path(__file__).parents[1] / "assets" / "tiny.pt"
    if name == "crossmost":  # put there by hand
        return cache / "ulip-june11-checkpoint_best.pt"
    return fetch(name, cache, allowed)


def read_start(path: str | Path, which: str = "teacher") -> dict:
    """Read a file of any family into the layout of our own starts.

    Families: our own starts and `last.pt`; ULIP-1 and ULIP-2 (image tower of SLIP, text tower, Point-BERT);
    ULIP-2 with colours (Point-BERT only); Cross-MoST's start and its trained file.
    Returns:
        model, architecture: of the CrossMoST; architecture["image"] is None where there is no image tower.
        text, text_architecture: of the TextEncoder; most files have one.
        may_be_missing: beginnings of parameters that the family lacks.
        options: "model", "groups", "group_size"; of a file of our own all that made it ("points" ...).
    Raises: UserError for any other file.
    """
    content = read_file(path)
    try:
        if "architecture" not in content:
            content = published_start(content, which)
        point = content["architecture"]["point"]
        point |= {**USUAL_GROUPS, **point}  # what the file does not say
        options = {"model": "tiny", **content.get("options", {})}
        options |= {key: point[key] for key in USUAL_GROUPS}
        state = content["model"] if "model" in content else content[which]
        return {"may_be_missing": (), **content, "options": options, "model": state}
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is broken, or of no known family, as OpenShape's and Uni3D's: {error!r}, "
                        f"found {list(content)[:4]}; get or make it again") from error


# ------ Each family's layout --------------------------------------------------------------------------------
# What self-training adds to published towers: random where a file lacks it.
MAY_BE_MISSING = ("visual.mask_token_embedding", "visual.ln_patch.", "visual.decoder.",
                  "point_encoder.mask_token", "point_encoder.proj", "point_encoder.lm_head.")
TEXT_KEYS = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


def published_start(content: dict, which: str) -> dict:
    """Another family's file for read_start: keys are renamed, sizes are read off the shapes."""
    # Files nest their weights under one of these names; get() leaves a dict without the name as it is.
    for name in ("model_ema" if which == "teacher" else "model", "model", "state_dict"):
        content = content.get(name, content)
    state = {key.removeprefix("module."): value for key, value in content.items()}
    text = {f"tower.{key}": state.pop(key) for key in list(state) if key.startswith(TEXT_KEYS)}

    slip = "visual.cls_token" in state  # SLIP's image tower, so the file is one of ULIP's
    if slip:
        state = from_timm(state)
    if "image_projection" in state:
        state["visual.proj"] = state.pop("image_projection")
    embed_dim = state["pc_projection"].shape[1]
    image = image_sizes(state, slip) if "visual.conv1.weight" in state else None
    groups = STARTS["ulip2" if slip or image is None else "crossmost"]
    point = {**point_sizes(state), **groups}
    classes = state["classifier"].shape[1] if "classifier" in state else 0
    numbers = [str(k) for k in range(classes)]

    architecture = dict(embed_dim=embed_dim, image=image, point=point, up="y", class_names=numbers)
    if slip:
        architecture |= dict(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    start = {"model": state, "architecture": architecture, "may_be_missing": MAY_BE_MISSING,
             "options": {"model": "ulip2" if slip else "crossmost"}}
    if text:
        # Published text towers have CLIP's words and length, which are open_clip's defaults.
        width = len(text["tower.ln_final.weight"])
        blocks = block_sizes(text, "tower.transformer.resblocks.", width)
        start |= {"text": text, "text_architecture": dict(embed_dim=embed_dim, quick_gelu=True, **blocks)}
    return start


def image_sizes(state: dict, slip: bool) -> dict:
    """Arguments of the ImageEncoder, of a published file's shapes."""
    width, _, _, patch = state["visual.conv1.weight"].shape
    grid = math.isqrt(len(state["visual.positional_embedding"]) - 1)  # without the position of CLS
    blocks = block_sizes(state, "visual.transformer.resblocks.", width)
    of_family = dict(quick_gelu=not slip, ln_pre=not slip, eps=1e-6 if slip else 1e-5)
    return dict(image_size=patch * grid, patch_size=patch, **of_family, **blocks)


def point_sizes(state: dict) -> dict:
    """Arguments of the PointEncoder, of a published file's shapes."""
    layers = ("first_conv.0", "first_conv.3", "second_conv.0")
    weights = [state[f"point_encoder.encoder.{layer}.weight"] for layer in layers]
    stem, channels = [len(weight) for weight in weights], weights[0].shape[1]
    width, token_width = state["point_encoder.reduce_dim.weight"].shape
    blocks = block_sizes(state, "point_encoder.blocks.blocks.", width)
    return dict(stem=stem, channels=channels, token_width=token_width, **blocks)


def block_sizes(state: dict, prefix: str, width: int) -> dict:
    """Sizes of a transformer whose numbered blocks have this prefix; published heads are 64 wide."""
    blocks = {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}
    return dict(width=width, layers=len(blocks), heads=max(1, width // 64))


TIMM_NAMES = {
    "patch_embed.proj.weight": "conv1.weight", "cls_token": "class_embedding",
    "pos_embed": "positional_embedding", "visual.norm.": "visual.ln_post.",
    "visual.blocks.": "visual.transformer.resblocks.", ".norm1.": ".ln_1.", ".norm2.": ".ln_2.",
    ".qkv.": ".in_proj_", ".attn.proj.": ".attn.out_proj.", ".fc1.": ".c_fc.", ".fc2.": ".c_proj.",
}


def from_timm(state: dict) -> dict:
    """Rename SLIP's image tower from timm's names to open_clip's.

    open_clip's patch embedding has no bias, so SLIP's is added to the patches' positions. Hidden patches have
    these positions, too, so the mask token starts at minus the bias: together they are the plain position.
    """
    renamed = {}
    for key, value in state.items():
        if key.startswith("visual."):
            for timm_name, open_clip_name in TIMM_NAMES.items():
                key = key.replace(timm_name, open_clip_name)
        renamed[key] = value

    bias = renamed.pop("visual.patch_embed.proj.bias")
    renamed["visual.class_embedding"] = renamed["visual.class_embedding"].flatten()
    renamed["visual.positional_embedding"] = renamed["visual.positional_embedding"][0]
    renamed["visual.positional_embedding"][1:] += bias
    renamed["visual.mask_token_embedding"] = -bias.view(1, 1, -1)
    return renamed


# ------ Reading and writing ---------------------------------------------------------------------------------
def save_start(model: nn.Module, text: nn.Module | None, options: dict, path: Path):
    """Write a start's file: a CrossMoST and its TextEncoder in half precision, and what made them."""
    architecture = {**model.architecture, "class_names": []}
    content = {"architecture": architecture, "model": halved(model.state_dict()), "options": options}
    if text:
        state = text.state_dict()
        if text.architecture["fixed_tokens"]:
            del state["tower.token_embedding.weight"]  # TextEncoder makes it again
        content |= {"text_architecture": text.architecture, "text": halved(state)}
    save_file(content, path)


def halved(state: dict) -> dict:
    """Weights in half precision; whole numbers stay."""
    return {key: value.half() if value.is_floating_point() else value for key, value in state.items()}


def save_file(content: dict, path: Path):
    """torch.save, whole or not at all. Raises: OSError, where the disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer())


def read_file(path: str | Path) -> dict:
    """Read tensors and plain values of a checkpoint. Nothing in it is run (weights_only).

    Raises: FileNotFoundError, or UserError if it is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; a run's checkpoint is OUT/last.pt, and README, "
                                "Starts, says where to get the file of a start")
    # Published files hold options and accuracies: a Namespace and NumPy scalars, of NumPy 1 or 2.
    dtypes = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"]}
    scalar, _ = np.float64(0).__reduce__()
    harmless = [argparse.Namespace, codecs.encode, np.dtype, *dtypes,
                (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(harmless):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises a different type for each way a file can be broken
        if "DefaultCPUAllocator: can't" in str(error):  # too little memory: the file may be whole
            raise
        # torch's own message is left out, because it advises to load such a file unsafely.
        raise UserError(f"{path} is no checkpoint, or only a part of one, or holds more than tensors and "
                        "plain values, which could run code; get or make it again") from error
