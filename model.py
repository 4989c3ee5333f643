"""Both encoders, token masking, the shared classifier, the moving-average teacher, and starts to load.

B batch, P points, G point groups, S points per group, L image patches, D token width, E joint embedding,
C classes, V views. Token masks are bool, True = hidden (replaced by a learnt mask token). Parameter names are
those of the published checkpoints, so that loading is strict; only SLIP's image tower is renamed."""
import argparse
import codecs
import io
import math
import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer, VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import UserError, fetch_published


class Groups(NamedTuple):
    """Point clouds cut into local groups: neighbourhoods (B, G, S, 3) centred on centres (B, G, 3)."""
    neighbourhoods: Tensor
    centres: Tensor


def farthest_point_sample(points: Tensor, count: int) -> Tensor:
    """Greedy farthest points, starting at point 0 (Deviation D20). (B, P, 3) -> (B, count) int64 indices.
    No index repeats while distinct points are left. Raises: UserError if count is not in 1..P."""
    if not 0 < count <= points.shape[1]:
        raise UserError(f"cannot take {count} farthest of {points.shape[1]} points; lower --groups")
    chosen = torch.zeros(len(points), count, dtype=torch.long, device=points.device)
    distance = points.new_full(points.shape[:2], float("inf"))
    planes = points.transpose(1, 2).contiguous()  # (B, 3, P): long rows are many times faster
    for i in range(1, count):
        last = planes.gather(2, chosen[:, i - 1, None, None].expand(-1, 3, -1))  # (B, 3, 1)
        x, y, z = (planes - last).square_().unbind(dim=1)
        distance = torch.minimum(distance, x + y + z)
        chosen[:, i] = distance.max(dim=1).indices  # argmax() takes twice as long on a CPU
    return chosen


def group_points(points: Tensor, groups: int, group_size: int) -> Groups:
    """Farthest-point centres and their nearest points, relative to the centre. (B, P, 3) -> Groups.
    Raises: UserError if a cloud has fewer points than groups or group_size."""
    if group_size > points.shape[1]:
        raise UserError(f"cannot group {group_size} points of {points.shape[1]}; lower --group-size")
    centres = points.gather(1, farthest_point_sample(points, groups)[..., None].expand(-1, -1, 3))
    nearest = torch.cdist(centres, points).topk(group_size, largest=False).indices  # (B, G, S)
    flat = points.gather(1, nearest.flatten(1)[..., None].expand(-1, -1, 3))
    return Groups(flat.view(*nearest.shape, 3) - centres.unsqueeze(2), centres)


def hide_patches(batch: int, grid: int, ratio: float, device: torch.device) -> Tensor:
    """Hide random cells of an image, drawn anew per image [mim]. -> (B, grid * grid) bool
    Cells are 2 x 2 patches, single ones where the grid is odd or tiny. ratio in [0, 1] is rounded up to whole
    cells: of 14 x 14 patches ceil(0.3 x 49) = 15 cells of 49."""
    cell = 2 if grid % 2 == 0 and grid > 4 else 1
    side = grid // cell
    count = math.ceil(ratio * side * side)
    order = torch.rand(batch, side * side, device=device).argsort(dim=1)
    cells = (order < count).view(batch, side, side)
    return cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2).flatten(1)


def hide_groups(centres: Tensor, ratio: float) -> Tensor:
    """Hide a random centre and its nearest ones, U(ratio, ratio + 0.1) of G, drawn anew per cloud [mpm].
    centres (B, G, 3) -> (B, G) bool"""
    batch, total, _ = centres.shape
    seed = torch.randint(total, (batch, 1, 1), device=centres.device).expand(-1, -1, 3)
    nearest = (centres - centres.gather(1, seed)).square().sum(dim=-1).argsort(dim=1)
    count = (ratio + 0.1 * torch.rand(batch, 1, device=centres.device)) * total
    among_them = torch.arange(total, device=centres.device) < count.long()  # (B, G), by nearness
    return torch.zeros_like(among_them).scatter(1, nearest, among_them)


class MiniPointNet(nn.Module):
    """Tokens of point groups: MLP, max, [global, local], MLP, max. (B, G, S, 3) -> (B, G, token_width)."""
    def __init__(self, stem: list[int], token_width: int, channels: int):
        super().__init__()
        a, b, c = stem
        self.first_conv = nn.Sequential(
            nn.Conv1d(channels, a, 1), nn.BatchNorm1d(a), nn.ReLU(), nn.Conv1d(a, b, 1))
        self.second_conv = nn.Sequential(
            nn.Conv1d(2 * b, c, 1), nn.BatchNorm1d(c), nn.ReLU(), nn.Conv1d(c, token_width, 1))

    def forward(self, neighbourhoods: Tensor) -> Tensor:
        local = self.first_conv(neighbourhoods.flatten(0, 1).transpose(1, 2))  # (B G, b, S)
        whole = local.amax(dim=2, keepdim=True).expand_as(local)
        tokens = self.second_conv(torch.cat([whole, local], dim=1)).amax(dim=2)
        return tokens.unflatten(0, neighbourhoods.shape[:2])


class PointEncoder(nn.Module):
    """Point-BERT [point-encoder] (arXiv 2111.14819), with what masked modelling adds to it.

    Hidden groups are replaced by mask_token; position embeddings are added before every block. lm_head
    predicts the hidden groups [mpm]; proj maps CLS and tokens into the joint space for [gl-align]."""
    def __init__(self, embed_dim: int, width: int = 384, layers: int = 12, heads: int = 6, groups: int = 64,
                 group_size: int = 32, stem: tuple = (128, 256, 512), token_width: int = 256,
                 channels: int = 3, drop_path: float = 0.1, target: str = "tokens"):
        super().__init__()
        self.groups, self.group_size, self.channels, self.target = groups, group_size, channels, target
        self.encoder = MiniPointNet(stem, token_width, channels)
        self.reduce_dim = nn.Linear(token_width, width)
        self.cls_token, self.cls_pos, self.mask_token = (
            nn.Parameter(torch.zeros(1, 1, width)) for _ in range(3))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        stack = [Block(width, heads, drop_path=drop_path * i / max(1, layers - 1), norm_layer=nn.LayerNorm)
                 for i in range(layers)]
        self.blocks = nn.ModuleDict({"blocks": nn.ModuleList(stack)})
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width ** -0.5)
        self.lm_head = nn.Linear(width, width if target == "tokens" else 3 * group_size)
        for parameter in (self.cls_token, self.cls_pos, self.mask_token):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, groups: Groups, hidden: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns features (B, 2D) = [CLS, max over tokens], tokens (B, G, D), tokens before masking."""
        # ULIP-2's colour model takes 0.4 for each channel of a cloud without colours.
        neighbourhoods = F.pad(groups.neighbourhoods, (0, self.channels - 3), value=0.4)
        group_tokens = self.reduce_dim(self.encoder(neighbourhoods))
        tokens = group_tokens
        if hidden is not None:
            tokens = torch.where(hidden.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        position = torch.cat([self.cls_pos.expand(len(x), -1, -1), self.pos_embed(groups.centres)], dim=1)
        for block in self.blocks["blocks"]:
            x = block(x + position)
        x = self.norm(x)
        return torch.cat([x[:, 0], x[:, 1:].amax(dim=1)], dim=-1), x[:, 1:], group_tokens


class ImageEncoder(VisionTransformer):
    """CLIP's vision transformer [image-encoder] with MUST's additions (arXiv 2206.02967).

    Hidden patches become mask_token_embedding; ln_patch normalises the patch tokens that come out, decoder
    paints them back to pixels [mim]. With nothing hidden the features are open_clip's. SLIP's tower, in the
    ULIP files, has no ln_pre and an epsilon of its own."""
    def __init__(self, embed_dim: int, image_size: int, patch_size: int, width: int, layers: int, heads: int,
                 mlp_ratio: float = 4.0, quick_gelu: bool = False, ln_pre: bool = True, eps: float = 1e-5):
        super().__init__(image_size, patch_size, width, layers, heads, mlp_ratio, output_dim=embed_dim,
                         no_ln_pre=not ln_pre, norm_layer=partial(LayerNorm, eps=eps),
                         act_layer=QuickGELU if quick_gelu else nn.GELU)
        self.mask_token_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.ln_patch = LayerNorm(width)
        self.decoder = nn.Sequential(nn.Conv2d(width, 3 * patch_size ** 2, 1), nn.PixelShuffle(patch_size))
        nn.init.trunc_normal_(self.mask_token_embedding, std=0.02)

    def forward(self, images: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns features (B, E), not normalised, and patch tokens (B, L, D) before ln_patch."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B, L, D)
        if hidden is not None:
            patches = torch.where(hidden.unsqueeze(-1), self.mask_token_embedding.to(patches.dtype), patches)
        x = torch.cat([self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1), patches], dim=1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        for block in self.transformer.resblocks:
            if self.transformer.grad_checkpointing:
                x = checkpoint(image_block, block, x, use_reentrant=False)
            else:
                x = image_block(block, x)
        return self.ln_post(x[:, 0]) @ self.proj, x[:, 1:]


def image_block(block: nn.Module, x: Tensor) -> Tensor:
    """One of open_clip's blocks. (B, 1 + L, D) -> the same. Its nn.MultiheadAttention transposes the tokens;
    where the weight needs no gradient (the teacher), bfloat16 on a CPU then copies it for every token. Here
    each projection is one product."""
    attention = block.attn
    projected = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = projected.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(query, key, value)  # (B, heads, 1 + L, D / heads)
    x = x + attention.out_proj(attended.transpose(1, 2).flatten(2))
    return x + block.mlp(block.ln_2(x))


class CrossMoST(nn.Module):
    """Both encoders and the one classifier they share; student and teacher are two of these.

    image, point: arguments of the encoders; class_names: one per column of the classifier; mean, std: of the
    pixels the image encoder was trained on; up: the upright axis the point encoder was trained with.
    CrossMoST(**architecture) is such a model again."""
    def __init__(self, embed_dim: int, image: dict, point: dict, class_names: list[str] = (),
                 mean: tuple = OPENAI_DATASET_MEAN, std: tuple = OPENAI_DATASET_STD, up: str = "z"):
        super().__init__()
        self.architecture = {"embed_dim": embed_dim, "image": dict(image), "point": dict(point), "up": up,
                             "mean": list(mean), "std": list(std), "class_names": list(class_names)}
        self.visual = ImageEncoder(embed_dim, **image)
        self.point_encoder = PointEncoder(embed_dim, **point)
        features = 2 * self.point_encoder.cls_token.shape[-1]
        self.pc_projection = nn.Parameter(torch.randn(features, embed_dim) * features ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # 0.07: CLIP's initial temperature
        self.classifier = nn.Parameter(torch.zeros(embed_dim, len(class_names))) if class_names else None
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def class_names(self) -> list[str]:
        return self.architecture["class_names"]

    def set_classifier(self, embeddings: Tensor, class_names: list[str] | None = None):
        """Column k = embedding of class k [classifier]. embeddings (C, E), made unit norm here."""
        self.architecture["class_names"] = list(class_names or range(len(embeddings)))
        self.classifier = nn.Parameter(F.normalize(embeddings.detach().float(), dim=-1).T.contiguous())

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] -> the units the image encoder was trained on. (..., 3, H, W)"""
        return (images - self.pixel_mean) / self.pixel_std

    def group(self, points: Tensor) -> Groups:
        """Cut clouds (B, P, 3), z up, into the point encoder's groups, in its own axes; without gradient."""
        if self.architecture["up"] == "y":
            points = points[..., [1, 2, 0]]
        with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
            return group_points(points.float(), self.point_encoder.groups, self.point_encoder.group_size)

    def logits(self, features: Tensor) -> Tensor:
        """s f phi, in float32. (B, E) unit norm -> (B, C)"""
        with torch.autocast(features.device.type, enabled=False):
            return self.logit_scale.float().exp() * features.float() @ self.classifier.float()

    def forward(self, images: Tensor | None, points: Tensor | Groups | None,
                image_hidden: Tensor | None = None, point_hidden: Tensor | None = None) -> SimpleNamespace:
        """Features and logits of both modalities, and what the masked losses need where something is hidden.

        images: (B, 3, H, W) normalised pixels, or (B, V, 3, H, W): logits of V views averaged. Or None.
        points: (B, P, 3) clouds in the unit sphere, z up, or what group() made of them. Or None.
        image_hidden: (B, L) bool, point_hidden: (B, G) bool; True = replaced by the mask token.
        Returns image_features, point_features (B, E) unit norm; with a classifier image_logits, point_logits
        (B, C); where patches are hidden image_tokens (B, L, E) unit norm and image_pixels (B, 3, H, W); where
        groups are hidden point_cls (B, E) and point_tokens (B, G, E) unit norm, point_prediction and
        point_target (B, G, D), or (B, G, S, 3) with target "points"."""
        out, encoder = SimpleNamespace(), self.point_encoder
        if images is not None:
            features, tokens = self.visual(images.reshape(-1, *images.shape[-3:]), image_hidden)
            features = F.normalize(features.float(), dim=-1).view(*images.shape[:-3], -1)  # (B, [V,] E)
            mean = features if images.dim() == 4 else features.mean(dim=1)
            if self.classifier is not None:
                out.image_logits = self.logits(mean)  # linear in f: the mean over views of the logits
            out.image_features = F.normalize(mean, dim=-1)
            if image_hidden is not None:
                tokens = self.visual.ln_patch(tokens)
                out.image_tokens = F.normalize((tokens @ self.visual.proj).float(), dim=-1)
                grid = tokens.transpose(1, 2).unflatten(2, self.visual.grid_size)  # (B, D, rows, columns)
                out.image_pixels = self.visual.decoder(grid)
        if points is not None:
            groups = points if isinstance(points, Groups) else self.group(points)
            features, tokens, group_tokens = encoder(groups, point_hidden)
            out.point_features = F.normalize((features @ self.pc_projection).float(), dim=-1)
            if self.classifier is not None:
                out.point_logits = self.logits(out.point_features)
            if point_hidden is not None:
                cls, _ = features.chunk(2, dim=-1)
                out.point_cls = F.normalize((cls @ encoder.proj).float(), dim=-1)
                out.point_tokens = F.normalize((tokens @ encoder.proj).float(), dim=-1)
                out.point_prediction, out.point_target = encoder.lm_head(tokens), group_tokens.detach()
                if encoder.target == "points":
                    out.point_target = groups.neighbourhoods
                    out.point_prediction = out.point_prediction.view_as(groups.neighbourhoods)
        return out


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float):
    """theta_T <- m theta_T + (1 - m) theta_S for parameters; buffers are copied [ema]."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
    for ours, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        ours.copy_(theirs)


def teacher_momentum(step: int, final: float) -> float:
    """m = 0.99 + (final - 0.99) min(1, step / 400) [ema]. It must be slow from the first step on."""
    return 0.99 + (final - 0.99) * min(1, step / 400)


def parameter_groups(model: CrossMoST, weight_decay: float, layer_decay: float, freeze: list[str]) -> list:
    """One group per (learning-rate scale, weight decay), without frozen parameters: they lose requires_grad.

    scale = layer_decay^(layers + 1 - i) in the image encoder: i = 0 for its embeddings, b + 1 for block b; 1
    elsewhere. No weight decay on 1-D parameters. Raises: UserError where a prefix in `freeze` is of no
    parameter, or none is left to train."""
    named, layers, groups = dict(model.named_parameters()), len(model.visual.transformer.resblocks), {}
    strange = [prefix for prefix in freeze if not any(name.startswith(prefix) for name in named)]
    if strange:
        raise UserError(f"--freeze: no parameter begins with {strange}; model.named_parameters() lists them")
    for name, parameter in named.items():
        parameter.requires_grad_(not name.startswith(tuple(freeze)))
        scale = 1.0
        if name.startswith("visual.transformer.resblocks."):
            scale = layer_decay ** (layers - int(name.split(".")[3]))
        elif name.startswith(("visual.conv1", "visual.class_emb", "visual.positional", "visual.mask_token",
                              "visual.ln_pre")):
            scale = layer_decay ** (layers + 1)
        decay = 0.0 if parameter.ndim == 1 else weight_decay
        if parameter.requires_grad:
            groups.setdefault((scale, decay), []).append(parameter)
    if not groups:
        raise UserError(f"--freeze {' '.join(freeze)} leaves nothing to train")
    return [{"params": parameters, "scale": scale, "weight_decay": decay}
            for (scale, decay), parameters in groups.items()]


def train_mode(student: CrossMoST, freeze: list[str]):
    """Training mode, but frozen modules stay in eval mode: their BatchNorm must not move (Deviation D12)."""
    student.train()
    for name, module in student.named_modules():
        if name.startswith(tuple(freeze)):
            module.eval()


# ------ Class names to classifier ---------------------------------------------------------------------------
TEMPLATES = {
    "depth": ("a depth map of a {}.", "a depth image of one {}.", "a {} seen by a depth camera.",
              "a grey rendering of a {}.", "a photo of a {}."),
    "photo": ("a photo of a {}.", "a photo of one {}.", "a picture of a {}.", "a cropped photo of a {}.",
              "a close-up photo of a {}."),
    "3d": ("a 3D model of a {}.", "a rendering of a {}.", "a CAD model of a {}.", "a white {}, untextured."),
    "points": ("a point cloud of a {}.", "a point cloud model of a {}.", "a scan of a {}."),
    "openai": tuple(t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES) + ("a point cloud model of a {}.",),
}


class TextEncoder(nn.Module):
    """CLIP's text tower (open_clip's) with its tokenizer. fixed_tokens: token embeddings are random numbers,
    always the same, that are not trained."""
    def __init__(self, embed_dim: int, quick_gelu: bool = False, fixed_tokens: bool = False, **sizes):
        super().__init__()
        own = dict(embed_dim=embed_dim, quick_gelu=quick_gelu, fixed_tokens=fixed_tokens)
        self.architecture = own | sizes
        activation = QuickGELU if quick_gelu else nn.GELU
        self.tower = TextTransformer(output_dim=embed_dim, act_layer=activation, **sizes)
        self.tokenize = open_clip.SimpleTokenizer(context_length=self.tower.context_length)
        if fixed_tokens:  # enough to tell names apart, and 3.2 M numbers that need no place in a file
            table = self.tower.token_embedding.requires_grad_(False).weight
            numbers = np.random.RandomState(0).standard_normal(table.shape)  # the same in every NumPy
            table.data.copy_(torch.from_numpy(0.02 * numbers))

    def forward(self, texts: list[str]) -> Tensor:
        """Unit-norm features (n, E) of n texts."""
        tokens = self.tokenize(texts).to(self.tower.positional_embedding.device)
        return F.normalize(self.tower(tokens).float(), dim=-1)


@torch.no_grad()
def embed_names(text: TextEncoder, class_names: list[str], templates: tuple[str, ...]) -> Tensor:
    """Class embeddings (C, E) [classifier]: normalised mean over the templates of a name's text features."""
    features = [text([template.format(name) for template in templates]).mean(dim=0) for name in class_names]
    return F.normalize(torch.stack(features), dim=-1)


# ------ Starts: a model without classifier, and the text tower that names classes for it --------------------
# Starts by name, and how each cuts a cloud, as in its training. Files of our own say it themselves. Any other
# name is a plain vision transformer of open_clip.
GROUPS = {"tiny": dict(groups=32, group_size=16), "ulip2": dict(groups=512, group_size=32),
          "ulip1": dict(groups=512, group_size=32), "crossmost": dict(groups=64, group_size=32)}
OTHER_GROUPS = GROUPS["crossmost"]
STARTS = tuple(GROUPS)
# A CLIP and a Point-BERT small enough to pre-train on a CPU in a minute or two.
TINY = {
    "embed_dim": 128,
    "image": dict(image_size=64, patch_size=16, width=96, layers=4, heads=3),
    "point": dict(GROUPS["tiny"], width=96, layers=4, heads=3, stem=[32, 64, 96], token_width=64,
                  drop_path=0.0),
    "text": dict(fixed_tokens=True, context_length=20, width=64, heads=2, layers=2),
}
# What self-training adds to published towers: random where a file lacks it.
MAY_BE_MISSING = ("visual.mask_token_embedding", "visual.ln_patch.", "visual.decoder.",
                  "point_encoder.mask_token", "point_encoder.proj", "point_encoder.lm_head.")
TEXT_KEYS = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
TIMM_NAMES = {"patch_embed.proj.weight": "conv1.weight", "cls_token": "class_embedding",
              "pos_embed": "positional_embedding", "visual.norm.": "visual.ln_post.",
              "visual.blocks.": "visual.transformer.resblocks.", ".norm1.": ".ln_1.", ".norm2.": ".ln_2.",
              ".qkv.": ".in_proj_", ".attn.proj.": ".attn.out_proj.", ".fc1.": ".c_fc.", ".fc2.": ".c_proj."}


def start_file(name: str, cache: Path, allowed: bool = True) -> Path:
    """A start's file: tiny's in the repository, crossmost's put there by hand, others' fetched if missing."""
    if name == "tiny":
        return Path(__file__).parent / "assets" / "tiny.pt"
    if name == "crossmost":
        return cache / "ulip-june11-checkpoint_best.pt"
    return fetch_published(name, cache, allowed)


def build_model(name: str, class_names: list[str], templates: tuple[str, ...], pretrained: str | None = None,
                start_checkpoint: str | Path | None = None, seed: int = 0, **point) -> CrossMoST:
    """A zero-shot start with one classifier column per class name, in eval mode.

    name: one of STARTS, or an open_clip model; pretrained: its tag, or a file. templates: texts with {} for a
    class name. start_checkpoint: see read_start; without it `tiny`, and the point encoder beside an open_clip
    model, are random, from `seed`. point: arguments of the PointEncoder.
    Raises: UserError for an unknown name, or a file that does not fit or cannot name classes."""
    if name in STARTS and (pretrained or name != "tiny" and not start_checkpoint):
        raise UserError(f"--model {name} is one file; use --start-checkpoint FILE, no --pretrained")
    model = text = None
    if name not in STARTS:
        model, text = open_clip_start(name, pretrained, seed, **point)
    elif not start_checkpoint:
        model, text = random_tiny(seed, **point)
    if start_checkpoint:
        model, own_text = load_start(start_checkpoint, model, **point)
        text = own_text or text
    if text is None and name == "crossmost":
        _, text = open_clip_start("ViT-B-16-quickgelu", "openai")
    if text is None:
        raise UserError(f"{start_checkpoint} holds no text tower to name classes with; add the open_clip "
                        "name of its CLIP, --model and --pretrained")
    model.set_classifier(embed_names(text, class_names, templates), class_names)
    return model.eval()


def random_tiny(seed: int, **point) -> tuple[CrossMoST, TextEncoder]:
    """An untrained small CLIP with its small Point-BERT."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CrossMoST(TINY["embed_dim"], TINY["image"], {**TINY["point"], **point})
        return model, TextEncoder(TINY["embed_dim"], **TINY["text"])


def open_clip_start(name: str, pretrained: str | None, seed: int = 0, **point) -> tuple[CrossMoST, nn.Module]:
    """An open_clip model's image and text tower beside an untrained Point-BERT. Raises: UserError for an
    unknown name, an image tower that is no plain ViT, weights of another activation, or out of reach."""
    config, weights = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, pretrained or "")
    if config is None:
        raise UserError(f"unknown model {name!r}; one of {', '.join(STARTS)}, ViT-B-16-quickgelu ...")
    image, quick_gelu = config["vision_cfg"], config.get("quick_gelu", False)
    odd = set(image) - {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
    if odd or not isinstance(image["layers"], int):
        raise UserError(f"{name}'s image tower is no plain vision transformer {sorted(odd)}; take a ViT-...")
    if weights and weights.get("quick_gelu", False) != quick_gelu:  # open_clip would only warn
        raise UserError(f"the {pretrained} weights of {name} {'lack' if quick_gelu else 'need'} QuickGELU; "
                        f"use {name.removesuffix('-quickgelu') if quick_gelu else name + '-quickgelu'}")
    image |= {"heads": image["width"] // image.pop("head_width", 64), "quick_gelu": quick_gelu}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            clip = open_clip.create_model(name, pretrained).requires_grad_(False).eval()
        except Exception as error:  # of the hub, of the network, of the file: each has its own type
            raise UserError(f"cannot get the weights {pretrained!r} of {name} ({str(error)[:150]}); fetch "
                            "them once with a connection, or name a file: --pretrained FILE") from error
        pixels = clip.visual.preprocess_cfg
        model = CrossMoST(config["embed_dim"], image, point, mean=pixels["mean"], std=pixels["std"])
    load_strictly(model.visual, clip.visual.state_dict(), name, ("mask_token_emb", "ln_patch.", "decoder."))
    model.logit_scale.data.copy_(clip.logit_scale)
    clip.visual = None  # its weights are copied: ViT-bigG's are 7 GB
    tokenize = open_clip.get_tokenizer(name)
    return model, lambda texts: F.normalize(clip.encode_text(tokenize(texts)).float(), dim=-1)


def load_strictly(module: nn.Module, state: dict, path: str | Path, may_be_missing: tuple[str, ...] = ()):
    """Load `state` strictly, but for parameters that begin with one of `may_be_missing`.
    Raises: UserError with the keys that are missing, left over or of another shape."""
    kept = {key: value for key, value in module.state_dict().items() if key.startswith(may_be_missing)}
    try:
        module.load_state_dict(kept | state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit: {str(error)[:500]}") from error


def load_checkpoint(path: str | Path, groups: int | None = None, group_size: int | None = None,
                    point_heads: int | None = None, which: str = "teacher") -> CrossMoST:
    """The teacher, or the "student", of a file of any family, in eval mode. Numbers replace the file's."""
    point = {"groups": groups, "group_size": group_size, "heads": point_heads}
    model, _ = load_start(path, None, which, **{key: value for key, value in point.items() if value})
    return model.eval()


def load_start(path: str | Path, clip: CrossMoST | None = None, which: str = "teacher",
               **point) -> tuple[CrossMoST, TextEncoder | None]:
    """Model and text tower (None where there is none) of a file of any family. clip: lends its image tower to
    a file without. point: arguments of the PointEncoder in place of the file's; for another `target` the head
    that predicts it is new. Raises: UserError, see read_start and load_strictly."""
    content = read_start(path, which)
    architecture, state, may_be_missing = content["architecture"], content["model"], content["may_be_missing"]
    if architecture["image"] is None:
        if clip is None:
            raise UserError(f"{path} holds a point encoder only; add --model with the open_clip name of its "
                            "CLIP (ULIP-2 with colours: ViT-bigG-14 --pretrained laion2b_s39b_b160k)")
        state |= {key: value for key, value in clip.state_dict().items() if key.startswith("visual.")}
        architecture |= {key: clip.architecture[key] for key in ("image", "mean", "std")}
    point = {"target": "tokens", **architecture["point"], **point}
    if point["target"] != architecture["point"].get("target", "tokens"):
        state = {key: value for key, value in state.items() if not key.startswith("point_encoder.lm_head.")}
        may_be_missing += ("point_encoder.lm_head.",)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of what the file lacks
            model = CrossMoST(**architecture | {"point": point})
            text = TextEncoder(**content["text_architecture"]) if "text" in content else None
    except Exception as error:  # sizes that cannot be, each in its own way
        raise UserError(f"{path} is broken: {error!r}; get or make it again") from error
    load_strictly(model, state, path, may_be_missing)
    made_by = content["options"]
    if "commit" in made_by:  # a start of our own
        print(f"start {path}: --pretrain-epochs {made_by['pretrain_epochs']} --seed {made_by['seed']}, "
              f"commit {made_by['commit']}, torch {made_by['torch']}")
    if text:
        remade = ("tower.token_embedding.",) if text.architecture["fixed_tokens"] else ()
        load_strictly(text, content["text"], path, remade)
    return model, text


def read_start(path: str | Path, which: str = "teacher") -> dict:
    """A file of any family in the layout of our own starts: "model", its "architecture" (image None where the
    file has no image tower), of most "text" and "text_architecture"; what "may_be_missing"; and "options":
    "model", "groups", "group_size", of a file of our own all that made it ("points", "views" ...).

    Families: our own starts and `last.pt`; ULIP-1, ULIP-2 (SLIP image tower, text tower, Point-BERT); ULIP-2
    with colours (Point-BERT only); Cross-MoST's start and trained file. Raises: UserError for any other."""
    content = read_file(path)
    try:
        if "architecture" not in content:
            content = published_start(content, which, path)
        point = content["architecture"]["point"]
        options = {"model": "tiny", **content.get("options", {})}
        for key, usual in OTHER_GROUPS.items():
            options[key] = point.setdefault(key, usual)
        state = content["model"] if "model" in content else content[which]
        return {"may_be_missing": (), **content, "options": options, "model": state}
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is broken, or of no known family: {error!r}, found {list(content)[:4]}; "
                        "get or make it again") from error


def published_start(content: dict, which: str, path: str | Path) -> dict:
    """Another family's file for read_start: keys renamed, sizes read off the shapes."""
    for name in ("model_ema" if which == "teacher" else "model", "model", "state_dict"):
        content = content.get(name, content)
    state = {key.removeprefix("module."): value for key, value in content.items()}
    for family, sign in {"OpenShape": "ppat.", "Uni3D": "trans2embed"}.items():
        if any(sign in key for key in state):
            raise UserError(f"{path} is {family}'s, another network than Point-BERT; README, Starts")
    text = {f"tower.{key}": state.pop(key) for key in list(state) if key.startswith(TEXT_KEYS)}
    slip = "visual.cls_token" in state
    if slip:
        state = from_timm(state)
    if "image_projection" in state:
        state["visual.proj"] = state.pop("image_projection")
    embed_dim, image = state["pc_projection"].shape[1], None
    if "visual.conv1.weight" in state:
        width, _, _, patch = state["visual.conv1.weight"].shape
        image_size = patch * math.isqrt(len(state["visual.positional_embedding"]) - 1)
        image = dict(image_size=image_size, patch_size=patch, quick_gelu=not slip, ln_pre=not slip,
                     eps=1e-6 if slip else 1e-5, **sizes(state, "visual.transformer.resblocks.", width))
    first, second, third = (state[f"point_encoder.encoder.{layer}.weight"]
                            for layer in ("first_conv.0", "first_conv.3", "second_conv.0"))
    width, token_width = state["point_encoder.reduce_dim.weight"].shape
    point = dict(stem=[len(first), len(second), len(third)], channels=first.shape[1], token_width=token_width,
                 **sizes(state, "point_encoder.blocks.blocks.", width),
                 **GROUPS["ulip2" if slip or image is None else "crossmost"])
    classes = state["classifier"].shape[1] if "classifier" in state else 0
    pixels = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD) if slip else {}
    architecture = dict(embed_dim=embed_dim, image=image, point=point, up="y",
                        class_names=[str(k) for k in range(classes)], **pixels)
    start = {"model": state, "architecture": architecture, "may_be_missing": MAY_BE_MISSING,
             "options": {"model": "ulip2" if slip else "crossmost"}}
    if text:
        words, width = text["tower.token_embedding.weight"].shape
        length = len(text["tower.positional_embedding"])
        start["text"] = text
        start["text_architecture"] = dict(
            embed_dim=embed_dim, quick_gelu=True, vocab_size=words, context_length=length,
            **sizes(text, "tower.transformer.resblocks.", width))
    return start


def sizes(state: dict, prefix: str, width: int) -> dict:
    """Of a published transformer whose numbered blocks have this prefix; heads are 64 wide."""
    blocks = {key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)}
    return dict(width=width, layers=len(blocks), heads=width // 64)


def from_timm(state: dict) -> dict:
    """SLIP's image tower, in timm's names -> open_clip's. The bias of its patch embedding moves into the
    patches' positions, and out of the mask token, so that a hidden patch keeps its value."""
    out = {}
    for key, value in state.items():
        if key.startswith("visual."):
            for theirs, ours in TIMM_NAMES.items():
                key = key.replace(theirs, ours)
        out[key] = value
    bias = out.pop("visual.patch_embed.proj.bias")
    out["visual.class_embedding"] = out["visual.class_embedding"].flatten()
    out["visual.positional_embedding"] = out["visual.positional_embedding"][0]
    out["visual.positional_embedding"][1:] += bias
    out["visual.mask_token_embedding"] = -bias.view(1, 1, -1)
    return out


# ------ Files -----------------------------------------------------------------------------------------------
def save_start(model: CrossMoST, text: TextEncoder | None, options: dict, path: Path):
    """A start's file, in half precision, with the options that made it."""
    def halved(module):
        return {key: value.half() if value.is_floating_point() else value
                for key, value in module.state_dict().items() if not key.startswith("tower.token_embedding.")}
    content = {"architecture": {**model.architecture, "class_names": []}, "model": halved(model)}
    if text:
        content |= {"text_architecture": text.architecture, "text": halved(text)}
    save_file({**content, "options": options}, path)


@contextmanager
def whole_file(path: Path):
    """A temporary name to write to. `path` is then the whole new file, or what it was: fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")  # a killed process's is overwritten by the next
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_file(content: dict, path: Path):
    """torch.save of a whole file."""
    buffer = io.BytesIO()  # torch.save to a full disk does not raise OSError
    torch.save(content, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_file(path: str | Path) -> dict:
    """Tensors and plain values of a checkpoint; nothing in it is run (weights_only).
    Raises: FileNotFoundError, or UserError if it is no such file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}; README, Starts, says where to get which")
    # Published files hold options and accuracies: a Namespace and NumPy scalars, of NumPy 1 or 2.
    numbers = [type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]]
    scalar, _ = np.float64(0).__reduce__()
    harmless = [argparse.Namespace, codecs.encode, np.dtype, *numbers,
                (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(harmless):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises a different type for each way a file can be broken
        raise UserError(f"cannot read checkpoint {path}: {str(error)[:200]}") from error
