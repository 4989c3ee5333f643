"""The model: encoders, token masking, shared classifier, teacher, loading.

A *start* is the zero-shot model that training begins from.

Dimensions: B batch, P points, G point groups, S points per group, L image patches,
D width of a transformer's tokens, E joint embedding, C classes, V views.
Masks are bool. True means hidden: a learnt token replaces the token.

Parameters have the published checkpoints' names. support.starts renames what differs.
"""
import math
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer, VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support import UserError
from support.farthest_points import farthest_point_kernel, launch_farthest_points
from support.starts import STARTS, TINY, read_start


# ------ Groups and masks ------------------------------------------------------------------------------------
class Groups(NamedTuple):
    """Clouds cut into local groups."""

    neighbourhoods: Tensor  # (B, G, S, 3), relative to the centre of the group
    centres: Tensor  # (B, G, 3)


def group_points(points: Tensor, groups: int, group_size: int) -> Groups:
    """Cut clouds (B, P, 3) at farthest points, each with the points nearest to it.

    Raises: UserError if a cloud has fewer points than `groups` or `group_size`.
    """
    total = points.shape[1]
    if group_size > total:
        raise UserError(f"cannot group {group_size} points of {total}; lower --group-size")

    chosen = farthest_point_sample(points, groups)
    centres = take_points(points, chosen)  # (B, G, 3)
    distance = torch.cdist(centres, points)
    nearest = distance.topk(group_size, largest=False).indices  # (B, G, S)
    neighbours = take_points(points, nearest.flatten(1)).view(*nearest.shape, 3)
    return Groups(neighbours - centres.unsqueeze(2), centres)


def take_points(points: Tensor, indices: Tensor) -> Tensor:
    """Each cloud's points at its indices. (B, P, 3), (B, n) -> (B, n, 3)"""
    # gather wants an index for every coordinate.
    return points.gather(1, indices[..., None].expand(-1, -1, 3))


def farthest_point_sample(points: Tensor, count: int) -> Tensor:
    """Indices of points, each the farthest from all before it. (B, P, 3) -> (B, count) int64

    Of equally far points the lowest index is taken. None repeats while distinct points are
    left. Raises: UserError if count is not in 1..P.
    """
    batch, total, _ = points.shape
    if not 0 < count <= total:
        raise UserError(f"cannot take {count} farthest of {total} points; lower --groups")

    kernel = farthest_point_kernel(points.device) if points.is_cuda else None
    if kernel:
        return launch_farthest_points(kernel, points, count)

    # The first is point 0 (Deviation D20).
    chosen = torch.zeros(batch, count, dtype=torch.long, device=points.device)
    # Squared distance of each point to the nearest that is chosen.
    distance = points.new_full((batch, total), float("inf"))
    # (B, 3, P), because long rows are many times faster.
    planes = points.transpose(1, 2).contiguous()

    for i in range(1, count):
        index = chosen[:, i - 1, None, None].expand(-1, 3, -1)
        newest = planes.gather(2, index)  # (B, 3, 1)
        x, y, z = (planes - newest).square_().unbind(dim=1)
        distance = torch.minimum(distance, x + y + z)
        # Not argmax(), which takes twice as long on a CPU.
        chosen[:, i] = distance.max(dim=1).indices
    return chosen


def hide_patches(batch: int, grid: int, ratio: float, device: torch.device) -> Tensor:
    """Hide random cells of each image [mim]. -> (B, grid * grid) bool

    ratio, in [0, 1], is rounded up: of 49 cells in 14 x 14 patches ceil(0.3 x 49) = 15.
    """
    # 2 x 2 patches are the original's cells of 32 pixels; an odd or tiny grid has cells of one.
    cell = 2 if grid % 2 == 0 and grid > 4 else 1
    side = grid // cell
    count = math.ceil(ratio * side * side)

    # A random rank for each cell: those of the lowest ranks are hidden.
    rank = torch.rand(batch, side * side, device=device).argsort(dim=1)
    cells = (rank < count).view(batch, side, side)
    return cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2).flatten(1)


def hide_groups(centres: Tensor, ratio: float) -> Tensor:
    """Hide a random group of each cloud and its nearest ones [mpm]. (B, G, 3) -> (B, G) bool"""
    batch, total, _ = centres.shape
    first = torch.randint(total, (batch, 1), device=centres.device)
    difference = centres - take_points(centres, first)
    by_distance = difference.square().sum(dim=-1).argsort(dim=1)

    # Each cloud's share is from U(ratio, ratio + 0.1). The original's is U(0.3, 0.4).
    share = ratio + 0.1 * torch.rand(batch, 1, device=centres.device)
    count = (share * total).long()
    # In the order of by_distance; scatter puts each group back in its place.
    is_near = torch.arange(total, device=centres.device) < count  # (B, G)
    return torch.zeros_like(is_near).scatter(1, by_distance, is_near)


def replace_hidden(tokens: Tensor, hidden: Tensor | None, mask_token: Tensor) -> Tensor:
    """Put the learnt mask token in place of hidden ones. (B, L, D), (B, L) -> (B, L, D)"""
    if hidden is None:
        return tokens
    return torch.where(hidden.unsqueeze(-1), mask_token.to(tokens.dtype), tokens)


# ------ The point encoder -----------------------------------------------------------------------------------
class MiniPointNet(nn.Module):
    """Turns each group of points into a token: MLP, max, [global, local], MLP, max.

    stem: widths of the three hidden layers. channels: of a point, 3 or with colours 6.
    """

    def __init__(self, stem: list[int], token_width: int, channels: int):
        super().__init__()
        first, local, second = stem
        self.first_conv = point_mlp(channels, first, local)
        self.second_conv = point_mlp(2 * local, second, token_width)

    def forward(self, neighbourhoods: Tensor) -> Tensor:
        """Returns tokens (B, G, token_width) of neighbourhoods (B, G, S, channels)."""
        batch, groups, size, _ = neighbourhoods.shape
        conv, norm, relu, last_conv = self.first_conv
        rows = conv_as_linear(conv, neighbourhoods.flatten(0, 2))
        rows = relu(norm(rows))  # (B G S, first)
        local = conv_as_linear(last_conv, rows)  # (B G S, local)
        whole = local.unflatten(0, (-1, size)).amax(dim=1)  # (B G, local)

        # The product with [global, local] is computed as two, because the global part is the
        # same for all points of a group.
        conv, norm, relu, last_conv = self.second_conv
        whole_weight, local_weight = conv.weight.squeeze(-1).chunk(2, dim=1)
        rows = F.linear(local, local_weight, conv.bias).unflatten(0, (-1, size))
        rows += F.linear(whole, whole_weight).unsqueeze(1)  # (B G, S, second)
        rows = relu(norm(rows.flatten(0, 1)))
        rows = conv_as_linear(last_conv, rows)  # (B G S, token_width)
        return rows.unflatten(0, (batch, groups, size)).amax(dim=2)


def point_mlp(channels: int, hidden: int, out: int) -> nn.Sequential:
    """Two layers on single points, in the published layout."""
    return nn.Sequential(nn.Conv1d(channels, hidden, 1), nn.BatchNorm1d(hidden),
                         nn.ReLU(inplace=True), nn.Conv1d(hidden, out, 1))


def conv_as_linear(conv: nn.Conv1d, rows: Tensor) -> Tensor:
    """A convolution with a kernel of one, on rows of channels. (N, in) -> (N, out)"""
    # Rows take about 0.6 x the time, because the maxima after them read memory in order.
    return F.linear(rows, conv.weight.squeeze(-1), conv.bias)


class PointEncoder(nn.Module):
    """Point-BERT [point-encoder] (arXiv 2111.14819), with what masked modelling adds.

    width: D. stem, token_width: of the mini-PointNet, whose tokens reduce_dim maps to D.
    target: what is predicted of a hidden group: its "points", or its token ("tokens").
    """

    # The mini-PointNet, as in the original. There its BatchNorm moves all the same (Deviation D12).
    frozen_by_default = ("encoder",)

    def __init__(self, embed_dim: int, width: int = 384, layers: int = 12, heads: int = 6,
                 groups: int = 64, group_size: int = 32, stem: tuple = (128, 256, 512),
                 token_width: int = 256, channels: int = 3, drop_path: float = 0.1,
                 target: str = "tokens"):
        super().__init__()
        self.groups, self.group_size = groups, group_size
        self.channels, self.target = channels, target
        self.out_width = 2 * width  # CLS and maximum
        self.encoder = MiniPointNet(stem, token_width, channels)
        self.reduce_dim = nn.Linear(token_width, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        # 128 is Point-BERT's hidden width, whatever D is.
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))

        # Blocks are dropped in training, the later the more often.
        rates = [drop_path * i / max(1, layers - 1) for i in range(layers)]
        stack = [Block(width, heads, drop_path=rate, norm_layer=nn.LayerNorm) for rate in rates]
        # A dict around the list, because published keys read blocks.blocks.i.
        self.blocks = nn.ModuleDict({"blocks": nn.ModuleList(stack)})
        self.norm = nn.LayerNorm(width)

        # CrossMoST.encode_points applies these two: proj maps CLS and tokens into the joint space
        # [gl-align], lm_head predicts hidden groups [mpm].
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width ** -0.5)
        predicted = width if target == "tokens" else 3 * group_size
        self.lm_head = nn.Linear(width, predicted)
        for parameter in (self.cls_token, self.cls_pos, self.mask_token):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.through_block = point_block  # or compiled, see CrossMoST.compile_blocks

    def forward(self, groups: Groups,
                hidden: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns features (B, 2D), tokens (B, G, D), and tokens before masking."""
        # ULIP-2's colour model was trained with 0.4 in each channel of clouds without colours.
        neighbourhoods = F.pad(groups.neighbourhoods, (0, self.channels - 3), value=0.4)
        group_tokens = self.reduce_dim(self.encoder(neighbourhoods))

        masked = replace_hidden(group_tokens, hidden, self.mask_token)
        cls_token = self.cls_token.expand(len(masked), -1, -1)
        x = torch.cat([cls_token, masked], dim=1)
        cls_pos = self.cls_pos.expand(len(x), -1, -1)
        position = torch.cat([cls_pos, self.pos_embed(groups.centres)], dim=1)

        for block in self.blocks["blocks"]:
            attention_factor = drop_factor(block.drop_path1, x)
            mlp_factor = drop_factor(block.drop_path2, x)
            # The position is added before every block, as the published weights were trained.
            x = self.through_block(block, x + position, attention_factor, mlp_factor)
        x = self.norm(x)
        cls, tokens = x[:, 0], x[:, 1:]
        features = torch.cat([cls, tokens.amax(dim=1)], dim=-1)  # (B, 2D)
        return features, tokens, group_tokens


def drop_factor(drop_path: nn.Module, x: Tensor) -> Tensor:
    """What drop-path multiplies a branch of a block by. (B, 1 + G, D) -> (B, 1, 1)"""
    # 0 for random objects, 1 / (1 - rate) for the others, 1 in eval mode.
    return drop_path(torch.ones_like(x[:, :1, :1]))


def point_block(block: nn.Module, x: Tensor, attention_factor: Tensor,
                mlp_factor: Tensor) -> Tensor:
    """Compute one of timm's blocks, without layer scale. (B, 1 + G, D) -> the same"""
    # Every block has its own rate of drop-path. A compiler takes the rate for a constant, and
    # would compile each block separately. Therefore the factors are arguments.
    x = x + attention_factor * block.attn(block.norm1(x))
    return x + mlp_factor * block.mlp(block.norm2(x))


# ------ The image encoder -----------------------------------------------------------------------------------
class ImageEncoder(VisionTransformer):
    """CLIP's vision transformer [image-encoder], with MUST's additions (arXiv 2206.02967).

    With nothing hidden the features are open_clip's, to the bit.
    ln_pre, eps: SLIP's image tower, in ULIP's files, has no ln_pre and an epsilon of 1e-6.
    """

    def __init__(self, embed_dim: int, image_size: int, patch_size: int, width: int, layers: int,
                 heads: int, mlp_ratio: float = 4.0, quick_gelu: bool = False, ln_pre: bool = True,
                 eps: float = 1e-5):
        activation = QuickGELU if quick_gelu else nn.GELU
        norm = partial(LayerNorm, eps=eps)
        super().__init__(image_size, patch_size, width, layers, heads, mlp_ratio,
                         output_dim=embed_dim, no_ln_pre=not ln_pre,
                         norm_layer=norm, act_layer=activation)
        self.mask_token_embedding = nn.Parameter(torch.zeros(1, 1, width))
        # CrossMoST.encode_images applies these two: ln_patch before patches are compared with CLS
        # [gl-align] or painted, the decoder to paint hidden ones back to pixels [mim].
        self.ln_patch = LayerNorm(width)
        pixels = 3 * patch_size ** 2
        self.decoder = nn.Sequential(nn.Conv2d(width, pixels, 1), nn.PixelShuffle(patch_size))
        nn.init.trunc_normal_(self.mask_token_embedding, std=0.02)
        self.through_block = image_block  # or compiled, see CrossMoST.compile_blocks

    def forward(self, images: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns features (B, E), not of unit norm, and patch tokens (B, L, D)."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B, L, D)
        patches = replace_hidden(patches, hidden, self.mask_token_embedding)
        cls_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([cls_token, patches], dim=1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))

        for block in self.transformer.resblocks:
            if self.transformer.grad_checkpointing:
                x = checkpoint(self.through_block, block, x, use_reentrant=False)
            else:
                x = self.through_block(block, x)
        cls, patches = x[:, 0], x[:, 1:]
        return self.ln_post(cls) @ self.proj, patches


def image_block(block: nn.Module, x: Tensor) -> Tensor:
    """Compute one of open_clip's blocks. (B, 1 + L, D) -> the same"""
    # The block's own forward gives the same result. It is slow in bfloat16 on CPUs where weights
    # need no gradient (the teacher's), because it copies them for every token. Here each
    # projection is one matrix product.
    attention = block.attn
    projected = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    by_head = projected.unflatten(2, (3, attention.num_heads, -1))
    # Each is (B, heads, 1 + L, D / heads).
    query, key, value = by_head.permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(query, key, value)
    x = x + attention.out_proj(attended.transpose(1, 2).flatten(2))
    return x + block.mlp(block.ln_2(x))


# ------ The model -------------------------------------------------------------------------------------------
class Outputs(NamedTuple):
    """What CrossMoST returns.

    A field is None where its modality was not given, nothing of it was hidden, or there is no
    classifier.
    """

    image_features: Tensor | None = None  # (B, E), unit norm
    point_features: Tensor | None = None  # (B, E), unit norm
    image_logits: Tensor | None = None  # (B, C)
    point_logits: Tensor | None = None  # (B, C)
    # Where patches are hidden.
    image_tokens: Tensor | None = None  # (B, L, E), unit norm
    image_pixels: Tensor | None = None  # (B, 3, H, W), in normalised units
    # Where groups are hidden.
    point_cls: Tensor | None = None  # (B, E), unit norm
    point_tokens: Tensor | None = None  # (B, G, E), unit norm
    point_prediction: Tensor | None = None  # (B, G, D); with target "points" (B, G, S, 3)
    point_target: Tensor | None = None  # of the same shape


class CrossMoST(nn.Module):
    """Both encoders and the classifier they share. Student and teacher are two of these.

    image, point: arguments of the encoders.
    class_names: one per column of the classifier.
    mean, std: of the image encoder's pixels. up: the axis that is up to the point encoder.

    A fork's own encoders need
        visual(images, hidden) -> features (B, E), patch tokens (B, L, D)
            .image_size, .grid_size: two numbers each
            .ln_patch, .proj (D, E)
            .decoder: (B, D, rows, columns) -> pixels (B, 3, H, W)
            .transformer.resblocks: the learning rate decays over these blocks
            .set_grad_checkpointing(bool)
        point_encoder(groups, hidden) -> features (B, out_width), of which the first D
                are CLS; tokens (B, G, D); tokens before masking, the target
            .groups, .group_size, .target: as given, like embed_dim and sizes of its own,
                which TINY or the start's file has
            .out_width, .proj (D, E), .lm_head: tokens -> prediction
            .frozen_by_default: names of modules not trained unless asked for; train.py
                reads it from the class, whose name stays PointEncoder
        for --compile, .through_block of both, which computes a block, and the module
            point_encoder.encoder.
    """

    def __init__(self, embed_dim: int, image: dict, point: dict, class_names: list[str] = (),
                 mean: tuple = OPENAI_DATASET_MEAN, std: tuple = OPENAI_DATASET_STD, up: str = "z"):
        super().__init__()
        # CrossMoST(**architecture) is a model of the same sizes.
        self.architecture = dict(
            embed_dim=embed_dim, image=dict(image), point=dict(point), up=up,
            mean=list(mean), std=list(std), class_names=list(class_names))
        self.visual = ImageEncoder(embed_dim, **image)
        self.point_encoder = PointEncoder(embed_dim, **point)

        features = self.point_encoder.out_width
        self.pc_projection = nn.Parameter(torch.randn(features, embed_dim) * features ** -0.5)
        # 0.07 is CLIP's initial temperature.
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        columns = torch.zeros(embed_dim, len(class_names))
        self.classifier = nn.Parameter(columns) if class_names else None

        # Of the encoders, in training and evaluation alike. It may be torch.bfloat16.
        self.precision = torch.float32
        # Options of the file it was loaded from, of which eval.py takes points and views.
        self.trained_with = {}
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def class_names(self) -> list[str]:
        return self.architecture["class_names"]

    def set_classifier(self, embeddings: Tensor, class_names: list[str] | None = None):
        """Make column k the embedding (C, E) of class k, of unit norm [classifier]."""
        numbers = map(str, range(len(embeddings)))
        self.architecture["class_names"] = list(class_names or numbers)
        self.classifier = nn.Parameter(unit_norm(embeddings.detach()).T.contiguous())

    def normalise(self, images: Tensor) -> Tensor:
        """Turn pixels (..., 3, H, W) in [0, 1] into the units of the image encoder."""
        return (images - self.pixel_mean) / self.pixel_std

    def group(self, points: Tensor) -> Groups:
        """Cut clouds (B, P, 3), z up, into the point encoder's groups, in its own axes."""
        if self.architecture["up"] == "y":
            # A rotation, no mirror image: the inverse of UP["y"] in support/files.py.
            points = points[..., [1, 2, 0]]
        encoder = self.point_encoder
        with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
            return group_points(points.float(), encoder.groups, encoder.group_size)

    def forward(self, images: Tensor | None, points: Tensor | Groups | None,
                image_hidden: Tensor | None = None, point_hidden: Tensor | None = None) -> Outputs:
        """Features and logits of both modalities, and what the masked losses need.

        Args, each may be None:
            images: normalised pixels (B, 3, H, W), or (B, V, 3, H, W) to average V logits.
            points: clouds (B, P, 3) in the unit sphere, z up, or what group() made of them.
            image_hidden, point_hidden: (B, L) and (B, G) bool, True = replaced.
        """
        fields = {}
        is_mixed = self.precision != torch.float32
        # Autocast is for the encoders alone: grouping and logits switch it off.
        with torch.autocast(self.logit_scale.device.type, self.precision, is_mixed):
            if images is not None:
                fields |= self.encode_images(images, image_hidden)
            if points is not None:
                fields |= self.encode_points(points, point_hidden)
        return Outputs(**fields)

    def encode_images(self, images: Tensor, hidden: Tensor | None) -> dict[str, Tensor]:
        """f_I = norm(CLS V_I) [image-encoder], and with hidden patches (B, L) [mim, gl-align]."""
        # To the encoder every view is an image: (B, V, 3, H, W) -> (B V, 3, H, W).
        views = images.reshape(-1, *images.shape[-3:])
        per_view, patches = self.visual(views, hidden)
        features = unit_norm(per_view).view(*images.shape[:-3], -1)  # (B, [V,] E)
        if images.dim() == 5:
            features = features.mean(dim=1)
        # Logits are linear in f: those of the mean are the mean of the views' own.
        fields = {"image_logits": self.logits(features), "image_features": unit_norm(features)}
        if hidden is not None:
            patches = self.visual.ln_patch(patches)
            fields["image_tokens"] = unit_norm(patches @ self.visual.proj)
            # (B, L, D) -> (B, D, rows, columns).
            grid = patches.transpose(1, 2).unflatten(2, self.visual.grid_size)
            fields["image_pixels"] = self.visual.decoder(grid)
        return fields

    def encode_points(self, points: Tensor | Groups, hidden: Tensor | None) -> dict[str, Tensor]:
        """f_P = norm([CLS, max over tokens] V_P) [point-encoder], and with hidden groups (B, G)
        [mpm, gl-align].
        """
        encoder = self.point_encoder
        groups = points if isinstance(points, Groups) else self.group(points)
        encoded, tokens, group_tokens = encoder(groups, hidden)
        features = unit_norm(encoded @ self.pc_projection)
        fields = {"point_logits": self.logits(features), "point_features": features}
        if hidden is not None:
            cls = encoded[:, :len(encoder.proj)]  # it stands first
            fields["point_cls"] = unit_norm(cls @ encoder.proj)
            fields["point_tokens"] = unit_norm(tokens @ encoder.proj)
            rebuilds_points = encoder.target == "points"
            # Tokens to rebuild get no gradient. They move all the same, as reduce_dim is trained.
            target = groups.neighbourhoods if rebuilds_points else group_tokens.detach()
            fields["point_target"] = target
            fields["point_prediction"] = encoder.lm_head(tokens).view_as(target)
        return fields

    def logits(self, features: Tensor) -> Tensor | None:
        """s f phi, in float32: scale s, features f (B, E), classifier phi. -> (B, C)"""
        if self.classifier is None:
            return None
        with torch.autocast(features.device.type, enabled=False):
            scale = self.logit_scale.float().exp()
            return scale * features.float() @ self.classifier.float()

    def compile_blocks(self):
        """Compile the mini-PointNet, and the function through_block of either encoder."""
        try:
            torch.compile(torch.sin)(self.logit_scale.detach())
        # Each kind of compiler has errors of its own.
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            warning = f"--compile has no effect, this machine cannot compile ({reason})"
            print(f"warning: {warning}", file=sys.stderr)
            return
        # Blocks, because equal ones share one compilation: for ViT-B/16 and Point-BERT it took
        # 23 s of the first step on one H200. With whole encoders compiled, an H100 had made no
        # step after 140 s.
        for encoder in (self.visual, self.point_encoder):
            encoder.through_block = torch.compile(encoder.through_block)
        self.point_encoder.encoder.compile()


def unit_norm(features: Tensor) -> Tensor:
    """Scale vectors to length 1, in float32. (..., E) -> the same"""
    return F.normalize(features.float(), dim=-1)


def precision_for(name: str, device: str | torch.device) -> torch.dtype:
    """What --precision means. auto: bfloat16 on a GPU that supports it, else float32."""
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
    # A GPU that only emulates bfloat16 does not support it.
    is_fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    auto = torch.bfloat16 if is_fast else torch.float32
    return {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


# ------ Training: the teacher, and what the optimizer is given ----------------------------------------------
@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float):
    """theta_T <- m theta_T + (1 - m) theta_S for parameters; buffers are copied [ema]."""
    # One call for all parameters: on a GPU, one for each would be hundreds of launches.
    old, new = list(teacher.parameters()), list(student.parameters())
    torch._foreach_lerp_(old, new, 1 - momentum)
    for buffer, new_buffer in zip(teacher.buffers(), student.buffers(), strict=True):
        buffer.copy_(new_buffer)


def teacher_momentum(step: int, final: float) -> float:
    """m = 0.99 + (final - 0.99) min(1, step / 400): final from step 400 on [ema]."""
    # The teacher is slow from the first step, because its labels count from the first step: a
    # fast one would copy the student's first mistakes. 0.99 and 400 are the original's, however
    # long the run.
    return 0.99 + (final - 0.99) * min(1, step / 400)


def parameter_groups(model: CrossMoST, weight_decay: float, layer_decay: float,
                     freeze: list[str]) -> list[dict]:
    """Sort parameters into groups of one "lr_scale" and "weight_decay" each.

    lr_scale = layer_decay^n, where layers_above counts n.
    freeze: names of parameters or modules, which lose requires_grad and are in no group.
    Raises: UserError where nothing has a name of freeze, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for module in freeze:
        if not any(is_below(name, [module]) for name in names):
            raise UserError(f"--freeze {module}: no parameter or module has this name; give whole "
                            "names, as visual or point_encoder.encoder")

    layers = len(model.visual.transformer.resblocks)
    members = {}
    for name, parameter in model.named_parameters():
        is_trained = not is_below(name, freeze)
        parameter.requires_grad_(is_trained)
        if is_trained:
            lr_scale = layer_decay ** layers_above(name, layers)
            # Vectors have none. The 0-D logit_scale has, as in the original.
            decay = 0.0 if parameter.ndim == 1 else weight_decay
            members.setdefault((lr_scale, decay), []).append(parameter)
    if not members:
        raise UserError(f"--freeze {' '.join(freeze)} leaves nothing to train")
    return [{"params": parameters, "lr_scale": lr_scale, "weight_decay": decay}
            for (lr_scale, decay), parameters in members.items()]


def is_below(name: str, modules: list[str]) -> bool:
    """Whether a dotted name is one of `modules` or part of one."""
    # The dots, because visual.proj is part of visual, but not of vis.
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


IMAGE_EMBEDDINGS = ("visual.conv1", "visual.class_embedding", "visual.positional_embedding",
                    "visual.mask_token_embedding", "visual.ln_pre")


def layers_above(name: str, layers: int) -> int:
    """Count the image encoder's layers from a parameter to the output; 0 if it is in none.

    With twelve blocks: 1 in the last block, 12 in the first, 13 in the embeddings.
    """
    if name.startswith(IMAGE_EMBEDDINGS):
        return layers + 1
    if name.startswith("visual.transformer.resblocks."):
        return layers - int(name.split(".")[3])
    return 0


def train_mode(student: CrossMoST, freeze: list[str]):
    """Set training mode, but eval mode for frozen modules (Deviation D12)."""
    student.train()
    for name, module in student.named_modules():
        # BatchNorm's statistics must not move either.
        if is_below(name, freeze):
            module.eval()


# ------ Class names to classifier ---------------------------------------------------------------------------
# The original has 64 texts around a name (Deviation D23).
OPENAI_TEMPLATES = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
TEMPLATES = {
    "depth": ("a depth map of a {}.", "a depth image of one {}.", "a {} seen by a depth camera.",
              "a grey rendering of a {}.", "a photo of a {}."),
    "photo": ("a photo of a {}.", "a photo of one {}.", "a picture of a {}.",
              "a cropped photo of a {}.", "a close-up photo of a {}."),
    "3d": ("a 3D model of a {}.", "a rendering of a {}.", "a CAD model of a {}.",
           "a white {}, untextured."),
    "points": ("a point cloud of a {}.", "a point cloud model of a {}.", "a scan of a {}."),
    "openai": (*OPENAI_TEMPLATES, "a point cloud model of a {}."),
}


class TextEncoder(nn.Module):
    """CLIP's text tower (open_clip's) with its tokenizer.

    fixed_tokens: the token embeddings are random numbers, always the same, and not trained.
    sizes: further arguments of open_clip's TextTransformer.
    """

    def __init__(self, embed_dim: int, quick_gelu: bool = False, fixed_tokens: bool = False,
                 **sizes):
        super().__init__()
        self.architecture = dict(
            embed_dim=embed_dim, quick_gelu=quick_gelu, fixed_tokens=fixed_tokens, **sizes)
        activation = QuickGELU if quick_gelu else nn.GELU
        self.tower = TextTransformer(output_dim=embed_dim, act_layer=activation, **sizes)
        self.tokenize = open_clip.SimpleTokenizer(context_length=self.tower.context_length)
        # Fixed tokens are enough to tell names apart, and files need not hold them.
        if fixed_tokens:
            embedding = self.tower.token_embedding.requires_grad_(False).weight
            # RandomState draws the same numbers in every version of NumPy.
            numbers = np.random.RandomState(0).standard_normal(embedding.shape)
            embedding.data.copy_(torch.from_numpy(0.02 * numbers))

    def forward(self, texts: list[str]) -> Tensor:
        """Features (n, E), unit norm, of n texts: the tower's own but for rounding, and faster."""
        # CLIP's tower answers at the end token, which has the largest number, and sees only what
        # stands before it. Texts are short, so the empty places behind their ends are left out.
        tower, device = self.tower, self.tower.positional_embedding.device
        tokens = self.tokenize(texts)
        ends = tokens.argmax(dim=-1)
        length = ends.max().item() + 1
        tokens, ends = tokens[:, :length].to(device), ends.to(device)
        x = tower.token_embedding(tokens) + tower.positional_embedding[:length]
        x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        x = tower.ln_final(x[torch.arange(len(x), device=device), ends])
        return unit_norm(x @ tower.text_projection)


@torch.no_grad()
def embed_names(text: TextEncoder, class_names: list[str], templates: tuple[str, ...]) -> Tensor:
    """Mean of each name's text features over the templates [classifier]. -> (C, E), unit norm"""
    features = []
    # About 256 texts at once bound the memory.
    at_once = math.ceil(256 / len(templates))
    for first in range(0, len(class_names), at_once):
        names = class_names[first:first + at_once]
        texts = [template.format(name) for name in names for template in templates]
        of_texts = text(texts).unflatten(0, (len(names), len(templates)))
        features.append(of_texts.mean(dim=1))
    return unit_norm(torch.cat(features))


# ------ Starts: a model without classifier, and the text tower that names classes for it --------------------
# What describes a tower that is a plain transformer.
PLAIN = {"image_size", "patch_size", "head_width", "mlp_ratio", "width", "layers", "heads",
         "context_length", "vocab_size"}


def build_model(name: str, class_names: list[str], templates: tuple[str, ...],
                pretrained: str | None = None, start_checkpoint: str | Path | None = None,
                seed: int = 0, device: str | torch.device = "cpu", **point) -> CrossMoST:
    """Build a zero-shot start with one classifier column per class name, in eval mode.

    Args:
        name: one of STARTS, or a model of open_clip's.
        templates: texts with {} for a class name.
        pretrained: open_clip's weights of `name`: a tag or a file.
        start_checkpoint: a file of any family, see read_start. Without it `tiny`, and the
            point encoder beside an open_clip model, are random, from `seed`.
        point: arguments of the PointEncoder.
    Raises: UserError for an unknown name, or a file that does not fit or cannot name classes.
    """
    # The open_clip model that lends towers to a file without them.
    lender = None if name in STARTS else (name, pretrained)
    if name == "crossmost":
        # It is beside OpenAI's CLIP, and its file may lack the text tower.
        lender = "ViT-B-16-quickgelu", "openai"

    if start_checkpoint:
        model, text = load_start(start_checkpoint, lender, **point)
    elif name == "tiny":
        model, text = random_tiny(seed, **point)
    else:
        model, text = open_clip_start(name, pretrained, seed, **point)
    if text is None:
        raise UserError(f"{start_checkpoint} holds no text tower to name classes with; add the "
                        "open_clip name of its CLIP, --model and --pretrained")

    text.to(device)
    model.set_classifier(embed_names(text, class_names, templates), class_names)
    return model.to(device).eval()


def random_tiny(seed: int, **point) -> tuple[CrossMoST, TextEncoder]:
    """An untrained small CLIP with its small Point-BERT. point: its arguments."""
    embed_dim = TINY["embed_dim"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CrossMoST(embed_dim, TINY["image"], {**TINY["point"], **point})
        text = TextEncoder(embed_dim, **TINY["text"])
    return model, text


def open_clip_start(name: str, pretrained: str | None, seed: int = 0,
                    **point) -> tuple[CrossMoST, TextEncoder]:
    """An open_clip model's image tower beside an untrained Point-BERT; its text tower.

    Raises: UserError as plain_towers, or where the weights are out of reach.
    """
    embed_dim, image_sizes, text_sizes = plain_towers(name, pretrained)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            # force_custom_text makes the text tower a module of its own.
            clip = open_clip.create_model(name, pretrained, force_custom_text=True)
        # The hub, the network and the file have types of their own.
        except Exception as error:
            raise UserError(
                f"cannot get the weights {pretrained!r} of {name} ({str(error)[:150]}); fetch "
                "them once with a connection, or name a file: --pretrained FILE") from error
        pixels = clip.visual.preprocess_cfg
        model = CrossMoST(embed_dim, image_sizes, point, mean=pixels["mean"], std=pixels["std"])
        text = TextEncoder(embed_dim, **text_sizes)
    text.requires_grad_(False).eval()

    added_here = ("mask_token_embedding", "ln_patch.", "decoder.")
    load_strictly(model.visual, clip.visual.state_dict(), name, added_here)
    load_strictly(text.tower, clip.text.state_dict(), name)
    model.logit_scale.data.copy_(clip.logit_scale)
    return model, text


def plain_towers(name: str, pretrained: str | None) -> tuple[int, dict, dict]:
    """E, and arguments of ImageEncoder and TextEncoder, of an open_clip model.

    Raises: UserError for an unknown name, and towers that are no plain transformers.
    """
    config = open_clip.get_model_config(name)
    if config is None:
        files = ", ".join(STARTS)
        raise UserError(f"unknown model {name!r}; one of {files}, each a file, or of open_clip's, "
                        "as ViT-B-16-quickgelu")

    image, text = config["vision_cfg"], config["text_cfg"]
    has_extras = {*image, *text} - PLAIN
    is_resnet = isinstance(image.get("layers"), list)
    if has_extras or is_resnet:
        raise UserError(f"{name}'s towers are no plain transformers; take a ViT-...")

    # The activation is that of the weights. Where they differ, open_clip only warns.
    weights = open_clip.get_pretrained_cfg(name, pretrained or "") or config
    image["quick_gelu"] = text["quick_gelu"] = weights.get("quick_gelu", False)
    # 64: CLIP's width of a head, where the file says nothing.
    image["heads"] = image["width"] // image.pop("head_width", 64)
    return config["embed_dim"], image, text


def load_checkpoint(path: str | Path, which: str = "teacher", **point) -> CrossMoST:
    """The teacher, or the "student", of a file of any family, in eval mode.

    point: groups, group_size and heads of the PointEncoder, in place of the file's.
    """
    model, _ = load_start(path, which=which, **point)
    return model.eval()


def load_start(path: str | Path, lender: tuple | None = None, which: str = "teacher",
               **point) -> tuple[CrossMoST, TextEncoder | None]:
    """Load model and text tower, or None without one, of a file of any family.

    lender: the open_clip model, as name and weights, of towers that the file lacks.
    point: arguments of the PointEncoder in place of the file's.
    Raises: UserError, see read_start and load_strictly.
    """
    content = read_start(path, which)
    text = borrow_towers(content, lender, path)
    sizes, state = content["architecture"]["point"], content["model"]
    target = sizes.get("target", "tokens")
    sizes |= point
    # The head that predicts hidden groups is new where the file's predicts something else.
    if point.get("target", target) != target:
        head = "point_encoder.lm_head."
        content["may_be_missing"] += (head,)
        state = {key: state[key] for key in state if not key.startswith(head)}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of what the file lacks
        model = CrossMoST(**content["architecture"])
        if "text" in content:
            text = TextEncoder(**content["text_architecture"])

    load_strictly(model, state, path, content["may_be_missing"])
    model.trained_with = content["options"]
    if "text" in content:
        # The TextEncoder has made fixed token embeddings itself.
        remade = ("tower.token_embedding.",) if text.architecture["fixed_tokens"] else ()
        load_strictly(text, content["text"], path, remade)
    return model, text


def borrow_towers(content: dict, lender: tuple | None, path: str | Path) -> TextEncoder | None:
    """Put the lender's image tower where there is none. Returns its text tower."""
    architecture = content["architecture"]
    lacks_image = architecture["image"] is None
    if lacks_image and not lender:
        raise UserError(
            f"{path} holds a point encoder only; add --model with the open_clip name of its CLIP "
            "(ULIP-2 with colours: ViT-bigG-14 --pretrained laion2b_s39b_b160k)")
    is_whole = not lacks_image and "text" in content
    if is_whole or not lender:
        return None

    clip, text = open_clip_start(*lender)
    if lacks_image:
        for key in ("image", "mean", "std"):
            architecture[key] = clip.architecture[key]
        for key, value in clip.visual.state_dict().items():
            content["model"][f"visual.{key}"] = value
    return text


def load_strictly(module: nn.Module, state: dict, path: str | Path,
                  may_be_missing: tuple[str, ...] = ()):
    """Load `state` strictly, but for keys that begin with one of `may_be_missing`.

    Raises: UserError with the keys that are missing, left over or of another shape.
    """
    kept = module.state_dict()
    kept = {key: kept[key] for key in kept if key.startswith(may_be_missing)}
    try:
        module.load_state_dict(kept | state)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit: {str(error)[:500]}; python -m tools.pretrain makes a start "
            "of an encoder of your own") from error
