"""Both encoders, token masking, the shared classifier, the moving-average teacher, and starts to load.

B batch, P points, G point groups, S points per group, L image patches, D token width, E joint embedding,
C classes, V views. Token masks are bool, True = hidden (replaced by a learnt mask token).
Parameter names are those of the published checkpoints, so that loading is strict and needs no table.
"""
import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer, VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

# A CLIP and a Point-BERT small enough to pre-train on a CPU in a minute or two.
TINY = {
    "embed_dim": 128,
    "image": {"image_size": 64, "patch_size": 16, "width": 96, "layers": 4, "heads": 3},
    "point": {"width": 96, "layers": 4, "heads": 3, "groups": 32, "group_size": 16, "stem": [32, 64, 96],
              "token_width": 64, "drop_path": 0.0},
    "text": {"context_length": 20, "width": 64, "heads": 2, "layers": 2},
}
TEMPLATES = {
    "depth": ("a depth map of a {}.", "a depth image of one {}.", "a {} seen by a depth camera.",
              "a grey rendering of a {}.", "a photo of a {}."),
    "photo": ("a photo of a {}.", "a photo of one {}.", "a picture of a {}.", "a cropped photo of a {}.",
              "a close-up photo of a {}."),
    "3d": ("a 3D model of a {}.", "a rendering of a {}.", "a CAD model of a {}.", "a white {}, untextured."),
    "points": ("a point cloud of a {}.", "a point cloud model of a {}.", "a scan of a {}."),
    "openai": tuple(t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES) + ("a point cloud model of a {}.",),
}


class Groups(NamedTuple):
    """Point clouds cut into local groups: neighbourhoods (B, G, S, 3) centred on centres (B, G, 3)."""
    neighbourhoods: Tensor
    centres: Tensor


def farthest_point_sample(points: Tensor, count: int) -> Tensor:
    """Greedy farthest points, starting at point 0 (Deviation D20). (B, P, 3) -> (B, count) int64 indices.

    Each step takes the point farthest from all taken so far; no index repeats while distinct points are left.
    Raises: ValueError if count is not in 1..P.
    """
    if not 0 < count <= points.shape[1]:
        raise ValueError(f"cannot take {count} farthest of {points.shape[1]} points; lower --groups")
    chosen = torch.zeros(len(points), count, dtype=torch.long, device=points.device)
    distance = points.new_full(points.shape[:2], float("inf"))
    for i in range(1, count):
        last = points.gather(1, chosen[:, i - 1, None, None].expand(-1, -1, 3))  # (B, 1, 3)
        distance = torch.minimum(distance, (points - last).square().sum(dim=-1))
        chosen[:, i] = distance.argmax(dim=1)
    return chosen


def group_points(points: Tensor, groups: int, group_size: int) -> Groups:
    """Farthest-point centres and their nearest points, relative to the centre. (B, P, 3) -> Groups.

    Raises: ValueError if a cloud has fewer points than groups or group_size.
    """
    if group_size > points.shape[1]:
        raise ValueError(f"cannot group {group_size} points of {points.shape[1]}; lower --group-size")
    centres = points.gather(1, farthest_point_sample(points, groups)[..., None].expand(-1, -1, 3))
    nearest = torch.cdist(centres, points).topk(group_size, largest=False).indices  # (B, G, S)
    flat = points.gather(1, nearest.flatten(1)[..., None].expand(-1, -1, 3))
    return Groups(flat.view(*nearest.shape, 3) - centres.unsqueeze(2), centres)


def hide_patches(batch: int, grid: int, ratio: float, device: torch.device) -> Tensor:
    """Hide random square cells of an image [mim]: (B, grid * grid) bool, drawn anew per image.

    Cells are 2 x 2 patches (32 px at 224 px and patch 16: 7 x 7 cells, ceil(0.3 x 49) = 15 hidden), single
    patches where the grid is odd or tiny. ratio in [0, 1] is rounded up to whole cells.
    """
    cell = 2 if grid % 2 == 0 and grid > 4 else 1
    side = grid // cell
    count = -int(-ratio * side * side // 1)
    order = torch.rand(batch, side * side, device=device).argsort(dim=1)
    cells = (order < count).view(batch, side, side)
    return cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2).flatten(1)


def hide_groups(centres: Tensor, ratio: float) -> Tensor:
    """Hide one contiguous block of point groups [mpm]: (B, G, 3) centres -> (B, G) bool.

    A random centre and its nearest ones, U(ratio, ratio + 0.1) of G, drawn anew per cloud.
    """
    batch, total, _ = centres.shape
    seed = torch.randint(total, (batch, 1, 1), device=centres.device).expand(-1, -1, 3)
    rank = (centres - centres.gather(1, seed)).square().sum(dim=-1).argsort(dim=1).argsort(dim=1)
    count = ((ratio + 0.1 * torch.rand(batch, 1, device=centres.device)) * total).long() if ratio > 0 else 0
    return rank < count


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
        # A 1 x 1 convolution is a linear map of each point: one large product beats many small ones,
        # and the global half of [global, local] needs multiplying only once per group.
        batch, groups, size, channels = neighbourhoods.shape
        conv1, norm1, relu, conv2, conv3, norm2, _, conv4 = *self.first_conv, *self.second_conv
        local = per_point(conv2, relu(norm1(per_point(conv1, neighbourhoods.reshape(-1, channels)))))
        whole = local.view(batch * groups, size, -1).amax(dim=1)  # (B G, b)
        on_whole, on_local = conv3.weight[..., 0].split(whole.shape[-1], dim=1)
        whole = F.linear(whole, on_whole).repeat_interleave(size, dim=0)
        mixed = F.linear(local, on_local, conv3.bias) + whole
        tokens = per_point(conv4, relu(norm2(mixed)))
        return tokens.view(batch, groups, size, -1).amax(dim=2)


def per_point(conv: nn.Conv1d, points: Tensor) -> Tensor:
    """Apply a kernel-1 convolution to points (n, channels)."""
    return F.linear(points, conv.weight[..., 0], conv.bias)


class PointEncoder(nn.Module):
    """Point-BERT [point-encoder] (arXiv 2111.14819), with what masked modelling adds to it.

    Hidden groups are replaced by mask_token; position embeddings are added before every block. lm_head
    predicts the hidden groups [mpm]; proj maps CLS and tokens into the joint space for [gl-align].
    """

    def __init__(self, embed_dim: int, width: int = 384, layers: int = 12, heads: int = 6, groups: int = 64,
                 group_size: int = 32, stem: tuple = (128, 256, 512), token_width: int = 256,
                 channels: int = 3,
                 drop_path: float = 0.1, target: str = "tokens"):
        super().__init__()
        self.groups, self.group_size, self.target = groups, group_size, target
        self.encoder = MiniPointNet(stem, token_width, channels)
        self.reduce_dim = nn.Linear(token_width, width)
        self.cls_token, self.cls_pos, self.mask_token = (
            nn.Parameter(torch.zeros(1, 1, width)) for _ in range(3))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        rates = torch.linspace(0, drop_path, layers).tolist()
        blocks = [Block(width, heads, drop_path=rate, norm_layer=nn.LayerNorm) for rate in rates]
        self.blocks = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width ** -0.5)
        self.lm_head = nn.Linear(width, width if target == "tokens" else 3 * group_size)
        for parameter in (self.cls_token, self.cls_pos, self.mask_token):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, groups: Groups, hidden: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns features (B, 2D) = [CLS, max over tokens], tokens (B, G, D), tokens before masking."""
        group_tokens = self.reduce_dim(self.encoder(groups.neighbourhoods))
        tokens = group_tokens
        if hidden is not None:
            tokens = torch.where(hidden.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        cls_position = self.cls_pos.expand(len(tokens), -1, -1)
        position = torch.cat([cls_position, self.pos_embed(groups.centres)], dim=1)
        for block in self.blocks["blocks"]:
            x = block(x + position)
        x = self.norm(x)
        return torch.cat([x[:, 0], x[:, 1:].amax(dim=1)], dim=-1), x[:, 1:], group_tokens


class ImageEncoder(VisionTransformer):
    """CLIP's vision transformer [image-encoder] with MUST's additions (arXiv 2206.02967).

    Hidden patches are replaced by mask_token_embedding before position embeddings; ln_patch normalises the
    patch tokens that come out; decoder paints them back to pixels [mim]. With nothing hidden the features are
    open_clip's.
    """

    def __init__(self, embed_dim: int, image_size: int, patch_size: int, width: int, layers: int, heads: int,
                 quick_gelu: bool = False):
        super().__init__(image_size, patch_size, width, layers, heads, mlp_ratio=4.0, output_dim=embed_dim,
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
        x = self.transformer(self.ln_pre(x + self.positional_embedding.to(x.dtype)))
        return self.ln_post(x[:, 0]) @ self.proj, x[:, 1:]

    def paint(self, tokens: Tensor) -> Tensor:
        """Patch tokens after ln_patch (B, L, D) -> pixels (B, 3, H, W)."""
        return self.decoder(tokens.transpose(1, 2).unflatten(2, self.grid_size))


class Output(SimpleNamespace):
    """What a forward pass computed, by name. Asking for what it did not compute raises AttributeError."""

    def __getattr__(self, name):
        raise AttributeError(f"no {name!r} here: logits need set_classifier() first, a modality its input, "
                             "and the masked fields a hidden mask")


class CrossMoST(nn.Module):
    """Both encoders and the one classifier they share; student and teacher are two of these.

    Args: embed_dim E; image, point: keyword arguments of ImageEncoder and PointEncoder; class_names: one per
    column of the classifier, which is empty until set_classifier; mean, std: of the pixels the image encoder
    was trained on. The dictionary `architecture` rebuilds the model: CrossMoST(**architecture).
    """

    def __init__(self, embed_dim: int, image: dict, point: dict, class_names: list[str] = (),
                 mean: tuple = open_clip.OPENAI_DATASET_MEAN, std: tuple = open_clip.OPENAI_DATASET_STD):
        super().__init__()
        self.architecture = {"embed_dim": embed_dim, "image": dict(image), "point": dict(point),
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
        columns = F.normalize(embeddings.detach().float(), dim=-1).T
        self.classifier = nn.Parameter(columns.clone(memory_format=torch.contiguous_format))

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] -> the units the image encoder was trained on. (..., 3, H, W)"""
        return (images - self.pixel_mean) / self.pixel_std

    def group(self, points: Tensor) -> Groups:
        """Cut clouds (B, P, 3) into the point encoder's groups; without gradient."""
        with torch.no_grad():
            return group_points(points.float(), self.point_encoder.groups, self.point_encoder.group_size)

    def logits(self, features: Tensor) -> Tensor:
        """s f phi, in float32. (B, E) unit norm -> (B, C)"""
        return self.logit_scale.float().exp() * features.float() @ self.classifier.float()

    def forward(self, images: Tensor | None, points: Tensor | Groups | None,
                image_hidden: Tensor | None = None, point_hidden: Tensor | None = None) -> Output:
        """Features and logits of both modalities, and what the masked losses need where something is hidden.

        Args:
            images: (B, 3, H, W) normalised pixels, or (B, V, 3, H, W): logits of V views averaged. Or None.
            points: (B, P, 3) clouds in the unit sphere, z up, or what group() made of them. Or None.
            image_hidden: (B, L) bool, point_hidden: (B, G) bool; True = replaced by the mask token.
        Returns:
            image_features, point_features (B, E) unit norm; image_logits, point_logits (B, C);
            where patches are hidden image_tokens (B, L, E) unit norm and image_pixels (B, 3, H, W);
            where groups are hidden point_cls (B, E), point_tokens (B, G, E) unit norm, point_prediction and
            point_target (B, G, D), or (B, G, S, 3) with target "points".
        """
        out = Output()
        if images is not None:
            self._forward_images(out, images, image_hidden)
        if points is not None:
            groups = points if isinstance(points, Groups) else self.group(points)
            self._forward_points(out, groups, point_hidden)
        return out

    def _forward_images(self, out: Output, images: Tensor, hidden: Tensor | None):
        features, tokens = self.visual(images.flatten(0, -4), hidden)
        features = F.normalize(features.float(), dim=-1).view(*images.shape[:-3], -1)  # (B, E) or (B, V, E)
        mean = features if images.dim() == 4 else features.mean(dim=1)
        if self.classifier is not None:
            out.image_logits = self.logits(mean)  # linear in f: the mean over views of the logits
        out.image_features = F.normalize(mean, dim=-1)
        if hidden is not None:
            tokens = self.visual.ln_patch(tokens)
            out.image_tokens = F.normalize((tokens @ self.visual.proj).float(), dim=-1)
            out.image_pixels = self.visual.paint(tokens)

    def _forward_points(self, out: Output, groups: Groups, hidden: Tensor | None):
        encoder = self.point_encoder
        features, tokens, group_tokens = encoder(groups, hidden)
        out.point_features = F.normalize((features @ self.pc_projection).float(), dim=-1)
        if self.classifier is not None:
            out.point_logits = self.logits(out.point_features)
        if hidden is not None:
            cls = features[:, :tokens.shape[-1]]
            out.point_cls = F.normalize((cls @ encoder.proj).float(), dim=-1)
            out.point_tokens = F.normalize((tokens @ encoder.proj).float(), dim=-1)
            out.point_prediction, out.point_target = encoder.lm_head(tokens), group_tokens.detach()
            if encoder.target == "points":
                out.point_target = groups.neighbourhoods
                out.point_prediction = out.point_prediction.view_as(groups.neighbourhoods)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float):
    """theta_T <- m theta_T + (1 - m) theta_S for parameters; buffers are copied [ema]."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
    for ours, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        ours.copy_(theirs)


def teacher_momentum(step: int, final: float) -> float:
    """m = 0.99 + (final - 0.99) min(1, step / 400) [ema]. It must be slow from the first step on."""
    return 0.99 + (final - 0.99) * min(1, step / 400)


def parameter_groups(model: CrossMoST, weight_decay: float, layer_decay: float,
                     freeze: list[str]) -> list[dict]:
    """One group per (learning-rate scale, weight decay); frozen parameters lose requires_grad and are left
    out.

    scale = layer_decay^(layers + 1 - i) in the image encoder: i = 0 for its embeddings, b + 1 for block b; 1
    elsewhere. No weight decay on 1-D parameters.
    """
    layers, groups = len(model.visual.transformer.resblocks), {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(freeze)))
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if name.startswith("visual.transformer.resblocks."):
            scale = layer_decay ** (layers - int(name.split(".")[3]))
        elif name.startswith(("visual.conv1", "visual.class_emb", "visual.positional", "visual.mask_token",
                              "visual.ln_pre")):
            scale = layer_decay ** (layers + 1)
        decay = 0.0 if parameter.ndim == 1 else weight_decay
        groups.setdefault((scale, decay), {"params": [], "scale": scale,
                                           "weight_decay": decay})["params"].append(parameter)
    return list(groups.values())


def train_mode(student: CrossMoST, freeze: list[str]):
    """Training mode, but frozen modules stay in eval mode: their BatchNorm must not move (Deviation D12)."""
    student.train()
    for name, module in student.named_modules():
        if name.startswith(tuple(freeze)):
            module.eval()


# -----------------------------------------------------------------------------------------------------------
# Class names to classifier, and files

class TextEncoder(nn.Module):
    """CLIP's text tower (open_clip's) with its tokenizer: class names to classifier columns."""

    def __init__(self, embed_dim: int, **sizes):
        super().__init__()
        self.architecture = {"embed_dim": embed_dim, **sizes}
        self.tower = TextTransformer(output_dim=embed_dim, **sizes)
        self.tokenize = open_clip.SimpleTokenizer(context_length=self.tower.context_length)

    def forward(self, texts: list[str]) -> Tensor:
        """Unit-norm features (n, E) of n texts."""
        tokens = self.tokenize(texts).to(self.tower.positional_embedding.device)
        return F.normalize(self.tower(tokens).float(), dim=-1)


@torch.no_grad()
def embed_names(text: TextEncoder, class_names: list[str], templates: tuple[str, ...]) -> Tensor:
    """Class embeddings (C, E) [classifier]: normalised mean over the templates of a name's text features."""
    features = [text([template.format(name) for template in templates]).mean(dim=0) for name in class_names]
    return F.normalize(torch.stack(features), dim=-1)


def save_file(content: dict, path: Path):
    """torch.save that leaves either the old file or the whole new one: temporary name, fsync, rename."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path: str | Path, *needed: str) -> dict:
    """Tensors and plain values of a checkpoint; nothing in it is run (weights_only).

    Raises: FileNotFoundError, or ValueError if it is unreadable or lacks one of the `needed` keys.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for each way a file can be broken
        raise ValueError(f"cannot read checkpoint {path}: {str(error).splitlines()[0][:200]}") from error
    if not isinstance(content, dict) or any(key not in content for key in needed):
        found = list(content)[:5] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} is no checkpoint of this project: found {found}, expected {list(needed)}")
    return content


def load_checkpoint(path: str | Path, which: str = "teacher") -> CrossMoST:
    """The teacher (or "student") of a `last.pt`, in eval mode, with its classifier and class names."""
    content = read_file(path, "architecture", which)
    model = CrossMoST(**content["architecture"])
    model.load_state_dict(content[which])
    return model.eval()


def build_model(name: str, class_names: list[str], templates: tuple[str, ...],
                start_checkpoint: str | Path | None = None, seed: int = 0, **point) -> CrossMoST:
    """A zero-shot start with one classifier column per class name, in eval mode.

    Args:
        name: "tiny". start_checkpoint: file written by pre-training; without one the weights are random, from
        `seed`.
        templates: texts with {} for the name. point: PointEncoder arguments that replace the start's own.
    Raises: ValueError for an unknown name or a file that does not fit.
    """
    if name != "tiny":
        raise ValueError(f"unknown model {name!r}; one of tiny")
    model, text = load_start(start_checkpoint) if start_checkpoint else random_tiny(seed, **point)
    model.set_classifier(embed_names(text.eval(), class_names, templates), class_names)
    return model.eval()


def random_tiny(seed: int, **point) -> tuple[CrossMoST, TextEncoder]:
    """An untrained small CLIP with its small Point-BERT."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CrossMoST(TINY["embed_dim"], TINY["image"], {**TINY["point"], **point})
        return model, TextEncoder(TINY["embed_dim"], **TINY["text"])


def load_start(path: str | Path) -> tuple[CrossMoST, TextEncoder]:
    """A pre-trained start: encoders without classifier, and the text tower that names classes for them."""
    content = read_file(path, "architecture", "model", "text_architecture", "text")
    model, text = CrossMoST(**content["architecture"]), TextEncoder(**content["text_architecture"])
    model.load_state_dict(content["model"])
    text.load_state_dict(content["text"])
    return model, text
