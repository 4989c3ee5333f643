"""The model: two encoders, token masking, the shared classifier, the moving-average teacher, loading.

A *start* is the zero-shot model that training begins from.

Dimensions: B batch, P points, G point groups, S points per group, L image patches, D width of a
transformer's tokens, E joint embedding, C classes, V views.
Masks are bool; True = hidden: the token is replaced by a learnt one.

Parameters have the names of the published checkpoints, so that these load strictly. support.starts renames
the few that differ: the image tower of SLIP (in ULIP's files), the image projection, the text tower.
"""
import math
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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
    """Clouds cut into local groups: neighbourhoods (B, G, S, 3) relative to their centres (B, G, 3)."""

    neighbourhoods: Tensor
    centres: Tensor


def group_points(points: Tensor, groups: int, group_size: int) -> Groups:
    """Cut clouds into groups: farthest points as centres, and the points nearest to each. (B, P, 3) -> Groups

    Raises: UserError if a cloud has fewer points than `groups` or `group_size`.
    """
    if group_size > points.shape[1]:
        raise UserError(f"cannot group {group_size} points of {points.shape[1]}; lower --group-size")

    chosen = farthest_point_sample(points, groups)  # (B, G)
    centres = points.gather(1, chosen[..., None].expand(-1, -1, 3))

    nearest = torch.cdist(centres, points).topk(group_size, largest=False).indices  # (B, G, S)
    neighbours = points.gather(1, nearest.flatten(1)[..., None].expand(-1, -1, 3))
    neighbourhoods = neighbours.view(*nearest.shape, 3) - centres.unsqueeze(2)
    return Groups(neighbourhoods, centres)


def farthest_point_sample(points: Tensor, count: int) -> Tensor:
    """Choose points greedily, each the farthest from all before it. (B, P, 3) -> (B, count) int64 indices

    The first is point 0 (Deviation D20); of equally far points that of the lowest index is taken. No index
    repeats while distinct points are left. Raises: UserError if count is not in 1..P.
    """
    if not 0 < count <= points.shape[1]:
        raise UserError(f"cannot take {count} farthest of {points.shape[1]} points; lower --groups")

    kernel = farthest_point_kernel(points.device) if points.is_cuda else None
    if kernel:
        return launch_farthest_points(kernel, points, count)

    chosen = torch.zeros(len(points), count, dtype=torch.long, device=points.device)
    distance = points.new_full(points.shape[:2], float("inf"))  # squared, to the nearest chosen point
    planes = points.transpose(1, 2).contiguous()  # (B, 3, P): long rows are many times faster

    for i in range(1, count):
        newest = planes.gather(2, chosen[:, i - 1, None, None].expand(-1, 3, -1))  # (B, 3, 1)
        x, y, z = (planes - newest).square_().unbind(dim=1)
        distance = torch.minimum(distance, x + y + z)
        chosen[:, i] = distance.max(dim=1).indices  # argmax() takes twice as long on a CPU
    return chosen


def hide_patches(batch: int, grid: int, ratio: float, device: torch.device) -> Tensor:
    """Hide random cells of each image [mim]. -> (B, grid * grid) bool

    A cell is 2 x 2 patches, or one patch where the grid is odd or tiny. ratio, in [0, 1], of all cells is
    rounded up: of 14 x 14 patches ceil(0.3 x 49) = 15 cells of 49 are hidden.
    """
    cell = 2 if grid % 2 == 0 and grid > 4 else 1
    side = grid // cell
    count = math.ceil(ratio * side * side)

    order = torch.rand(batch, side * side, device=device).argsort(dim=1)
    cells = (order < count).view(batch, side, side)
    return cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2).flatten(1)


def hide_groups(centres: Tensor, ratio: float) -> Tensor:
    """Hide a random group of each cloud and those nearest to it [mpm]. (B, G, 3) -> (B, G) bool

    The share of hidden groups is drawn for each cloud from U(ratio, ratio + 0.1).
    """
    batch, total, _ = centres.shape
    first = torch.randint(total, (batch, 1, 1), device=centres.device).expand(-1, -1, 3)  # for gather
    by_distance = (centres - centres.gather(1, first)).square().sum(dim=-1).argsort(dim=1)

    count = (ratio + 0.1 * torch.rand(batch, 1, device=centres.device)) * total
    is_near = torch.arange(total, device=centres.device) < count.long()  # (B, G), in the order by_distance
    return torch.zeros_like(is_near).scatter(1, by_distance, is_near)


# ------ The point encoder -----------------------------------------------------------------------------------
class MiniPointNet(nn.Module):
    """Turns each group of points into a token: MLP, max, [global, local], MLP, max.

    The parameters are those of convolutions with a kernel of one point, as in the published files. They are
    applied to rows of points: the same in about 0.6 x the time, as the maxima then read memory in order.
    stem: widths of the three hidden layers. channels: of a point, 3 or with colours 6.
    """

    def __init__(self, stem: list[int], token_width: int, channels: int):
        super().__init__()
        first, local, second = stem
        self.first_conv = nn.Sequential(
            nn.Conv1d(channels, first, 1), nn.BatchNorm1d(first), nn.ReLU(inplace=True),
            nn.Conv1d(first, local, 1))
        self.second_conv = nn.Sequential(
            nn.Conv1d(2 * local, second, 1), nn.BatchNorm1d(second), nn.ReLU(inplace=True),
            nn.Conv1d(second, token_width, 1))

    def forward(self, neighbourhoods: Tensor) -> Tensor:
        """Returns tokens (B, G, token_width) of neighbourhoods (B, G, S, channels)."""
        batch, groups, size, _ = neighbourhoods.shape
        conv, norm, relu, last_conv = self.first_conv
        rows = relu(norm(conv_as_linear(conv, neighbourhoods.flatten(0, 2))))  # (B G S, first)
        local = conv_as_linear(last_conv, rows)  # (B G S, local)
        whole = local.unflatten(0, (-1, size)).amax(dim=1)  # (B G, local)

        # The product with [global, local] as two: the global part is the same for all points of a group.
        conv, norm, relu, last_conv = self.second_conv
        whole_weight, local_weight = conv.weight.squeeze(-1).chunk(2, dim=1)
        rows = F.linear(local, local_weight, conv.bias).unflatten(0, (-1, size))
        rows += F.linear(whole, whole_weight).unsqueeze(1)  # (B G, S, second)
        rows = relu(norm(rows.flatten(0, 1)))
        return conv_as_linear(last_conv, rows).unflatten(0, (batch, groups, size)).amax(dim=2)


def conv_as_linear(conv: nn.Conv1d, rows: Tensor) -> Tensor:
    """A convolution with a kernel of one, over rows of channels. (N, in) -> (N, out)"""
    return F.linear(rows, conv.weight.squeeze(-1), conv.bias)


class PointEncoder(nn.Module):
    """Point-BERT [point-encoder] (arXiv 2111.14819), with what masked modelling adds to it.

    Hidden groups are replaced by mask_token. lm_head predicts what was hidden [mpm]: with target "points" the
    group's points; with "tokens" its token after reduce_dim. No gradient reaches that token, but it moves as
    reduce_dim is trained; only the mini-PointNet is frozen. proj maps CLS and tokens into the joint space
    [gl-align]. CrossMoST.forward applies both. width is D; token_width is the mini-PointNet's output, which
    reduce_dim maps to D.
    """

    frozen_by_default = ("encoder",)  # the mini-PointNet, as in the original (Deviation D12)

    def __init__(self, embed_dim: int, width: int = 384, layers: int = 12, heads: int = 6, groups: int = 64,
                 group_size: int = 32, stem: tuple = (128, 256, 512), token_width: int = 256,
                 channels: int = 3, drop_path: float = 0.1, target: str = "tokens"):
        super().__init__()
        self.groups, self.group_size, self.channels, self.target = groups, group_size, channels, target
        self.out_width = 2 * width

        self.encoder = MiniPointNet(stem, token_width, channels)
        self.reduce_dim = nn.Linear(token_width, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))

        # Blocks are dropped in training, the later the more often.
        rates = [drop_path * i / max(1, layers - 1) for i in range(layers)]
        stack = [Block(width, heads, drop_path=rate, norm_layer=nn.LayerNorm) for rate in rates]
        self.blocks = nn.ModuleDict({"blocks": nn.ModuleList(stack)})  # published keys read blocks.blocks.i
        self.norm = nn.LayerNorm(width)

        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width ** -0.5)
        self.lm_head = nn.Linear(width, width if target == "tokens" else 3 * group_size)
        for parameter in (self.cls_token, self.cls_pos, self.mask_token):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.through_block = point_block  # or compiled, see CrossMoST.compile_blocks

    def forward(self, groups: Groups, hidden: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns features (B, 2D) = [CLS, max over tokens], tokens (B, G, D), and tokens before masking."""
        # ULIP-2's colour model was trained with 0.4 for each channel of a cloud without colours.
        neighbourhoods = F.pad(groups.neighbourhoods, (0, self.channels - 3), value=0.4)
        group_tokens = self.reduce_dim(self.encoder(neighbourhoods))

        tokens = group_tokens
        if hidden is not None:
            tokens = torch.where(hidden.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        position = torch.cat([self.cls_pos.expand(len(x), -1, -1), self.pos_embed(groups.centres)], dim=1)

        for block in self.blocks["blocks"]:
            # Drop-path is drawn here instead of in the block, see point_block.
            factors = [drop(torch.ones_like(x[:, :1, :1])) for drop in (block.drop_path1, block.drop_path2)]
            # The position is added before every block, as the published weights were trained.
            x = self.through_block(block, x + position, *factors)
        x = self.norm(x)
        features = torch.cat([x[:, 0], x[:, 1:].amax(dim=1)], dim=-1)
        return features, x[:, 1:], group_tokens


def point_block(block: nn.Module, x: Tensor, attention_factor: Tensor, mlp_factor: Tensor) -> Tensor:
    """Compute one of timm's blocks, without layer scale. (B, 1 + G, D) -> the same

    Drop-path leaves out a branch of random objects: the factors (B, 1, 1) are 0 there, 1 / (1 - rate) for the
    others, and 1 in eval mode. They are arguments because every block has its own rate. A compiler takes the
    rate for a constant, and would compile each block separately.
    """
    x = x + attention_factor * block.attn(block.norm1(x))
    return x + mlp_factor * block.mlp(block.norm2(x))


# ------ The image encoder -----------------------------------------------------------------------------------
class ImageEncoder(VisionTransformer):
    """CLIP's vision transformer [image-encoder] (open_clip's) with MUST's additions (arXiv 2206.02967).

    Hidden patches become mask_token_embedding. ln_patch and decoder are only held here: CrossMoST.forward
    applies them to the patch tokens, to paint hidden patches back to pixels [mim]. With nothing hidden the
    features are open_clip's, to the bit.
    ln_pre and eps: the image tower of SLIP, in ULIP's files, has no ln_pre and an epsilon of 1e-6.
    """

    def __init__(self, embed_dim: int, image_size: int, patch_size: int, width: int, layers: int, heads: int,
                 mlp_ratio: float = 4.0, quick_gelu: bool = False, ln_pre: bool = True, eps: float = 1e-5):
        super().__init__(image_size, patch_size, width, layers, heads, mlp_ratio, output_dim=embed_dim,
                         no_ln_pre=not ln_pre, norm_layer=partial(LayerNorm, eps=eps),
                         act_layer=QuickGELU if quick_gelu else nn.GELU)
        self.mask_token_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.ln_patch = LayerNorm(width)
        self.decoder = nn.Sequential(nn.Conv2d(width, 3 * patch_size ** 2, 1), nn.PixelShuffle(patch_size))
        nn.init.trunc_normal_(self.mask_token_embedding, std=0.02)
        self.through_block = image_block  # or compiled, see CrossMoST.compile_blocks

    def forward(self, images: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns features (B, E), not normalised, and patch tokens (B, L, D) before ln_patch."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B, L, D)
        if hidden is not None:
            mask_token = self.mask_token_embedding.to(patches.dtype)
            patches = torch.where(hidden.unsqueeze(-1), mask_token, patches)

        cls_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([cls_token, patches], dim=1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))

        for block in self.transformer.resblocks:
            if self.transformer.grad_checkpointing:
                x = checkpoint(self.through_block, block, x, use_reentrant=False)
            else:
                x = self.through_block(block, x)
        return self.ln_post(x[:, 0]) @ self.proj, x[:, 1:]


def image_block(block: nn.Module, x: Tensor) -> Tensor:
    """Compute one of open_clip's blocks. (B, 1 + L, D) -> the same

    Same result as the block's own forward, but each projection is one matrix product. open_clip's own
    attention is slow in bfloat16 on CPUs where weights need no gradient (the teacher's): it copies them for
    every token.
    """
    attention = block.attn
    projected = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = projected.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(query, key, value)  # (B, heads, 1 + L, D / heads)
    x = x + attention.out_proj(attended.transpose(1, 2).flatten(2))
    return x + block.mlp(block.ln_2(x))


# ------ The model -------------------------------------------------------------------------------------------
class Outputs(NamedTuple):
    """What CrossMoST returns, None where a modality is not given, nothing is hidden or no class is named."""

    image_features: Tensor | None = None  # (B, E), unit norm
    point_features: Tensor | None = None  # (B, E), unit norm
    image_logits: Tensor | None = None  # (B, C)
    point_logits: Tensor | None = None  # (B, C)

    # Where patches are hidden.
    image_tokens: Tensor | None = None  # (B, L, E), unit norm
    image_pixels: Tensor | None = None  # (B, 3, H, W), the repainted image in normalised pixels

    # Where groups are hidden.
    point_cls: Tensor | None = None  # (B, E), unit norm
    point_tokens: Tensor | None = None  # (B, G, E), unit norm
    point_prediction: Tensor | None = None  # (B, G, D); with target "points" (B, G, S, 3)
    point_target: Tensor | None = None  # of the same shape


class CrossMoST(nn.Module):
    """Both encoders and the one classifier they share. Student and teacher are two of these.

    image, point: arguments of the encoders. class_names: one per column of the classifier. mean, std: of the
    pixels the image encoder was trained on. up: the axis that pointed upwards where the point encoder was
    trained. CrossMoST(**architecture) is a model of the same sizes again.

    What a fork's own encoder has to have:
        visual(images, hidden) -> features (B, E), patch tokens (B, L, D). Attributes: image_size and
            grid_size, two numbers each; ln_patch; proj (D, E); decoder: (B, D, rows, columns) -> pixels
            (B, 3, H, W); transformer.resblocks, over which parameter_groups lets the learning rate decay;
            set_grad_checkpointing(bool).
        point_encoder(groups, hidden) -> features (B, out_width), of which the first D are the global (CLS)
            token; tokens (B, G, D); tokens before masking, which are what is to be predicted. Attributes:
            groups, group_size and target, as given; proj (D, E); lm_head: tokens -> prediction; out_width.
            Of its class: frozen_by_default, names of modules that are not trained unless asked for; train.py
            reads them from the class called PointEncoder. The encoder is built with embed_dim, groups,
            group_size, target, and its own sizes, which TINY or a start's file gives.
        For --compile also through_block of either, the function that computes a block, and the module
            point_encoder.encoder.
    """

    def __init__(self, embed_dim: int, image: dict, point: dict, class_names: list[str] = (),
                 mean: tuple = OPENAI_DATASET_MEAN, std: tuple = OPENAI_DATASET_STD, up: str = "z"):
        super().__init__()
        self.architecture = {"embed_dim": embed_dim, "image": dict(image), "point": dict(point), "up": up,
                             "mean": list(mean), "std": list(std), "class_names": list(class_names)}
        self.visual = ImageEncoder(embed_dim, **image)
        self.point_encoder = PointEncoder(embed_dim, **point)

        features = self.point_encoder.out_width
        self.pc_projection = nn.Parameter(torch.randn(features, embed_dim) * features ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # 0.07: CLIP's initial temperature
        self.classifier = nn.Parameter(torch.zeros(embed_dim, len(class_names))) if class_names else None

        self.precision = torch.float32  # or torch.bfloat16: of the encoders, in training and evaluation alike
        self.trained_with = {}  # options of the file it was loaded from: points and views, which eval.py takes

        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def class_names(self) -> list[str]:
        return self.architecture["class_names"]

    def set_classifier(self, embeddings: Tensor, class_names: list[str] | None = None):
        """Make column k the embedding of class k [classifier]. embeddings (C, E) are made unit norm here."""
        self.architecture["class_names"] = list(class_names or map(str, range(len(embeddings))))
        self.classifier = nn.Parameter(F.normalize(embeddings.detach().float(), dim=-1).T.contiguous())

    def normalise(self, images: Tensor) -> Tensor:
        """Turn pixels in [0, 1] into the units the image encoder was trained on. (..., 3, H, W)"""
        return (images - self.pixel_mean) / self.pixel_std

    def group(self, points: Tensor) -> Groups:
        """Cut clouds (B, P, 3), z up, into the point encoder's groups, in its own axes. Without gradient."""
        if self.architecture["up"] == "y":
            points = points[..., [1, 2, 0]]  # a rotation, no mirror image: the inverse of data.UP["y"]
        with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
            return group_points(points.float(), self.point_encoder.groups, self.point_encoder.group_size)

    def logits(self, features: Tensor) -> Tensor:
        """s f phi, in float32: scale s, features f (B, E) of unit norm, classifier phi (E, C). -> (B, C)"""
        with torch.autocast(features.device.type, enabled=False):
            return self.logit_scale.float().exp() * features.float() @ self.classifier.float()

    def forward(self, images: Tensor | None, points: Tensor | Groups | None,
                image_hidden: Tensor | None = None, point_hidden: Tensor | None = None) -> Outputs:
        """Features and logits of both modalities, and what the masked losses need where something is hidden.

        Args:
            images: (B, 3, H, W) normalised pixels; or (B, V, 3, H, W), whose V logits are averaged; or None.
            points: (B, P, 3) clouds in the unit sphere, z up; or what group() made of them; or None.
            image_hidden, point_hidden: (B, L) and (B, G) bool, True = replaced by the mask token.
        """
        out = SimpleNamespace()
        with self.in_precision():
            # Images.
            if images is not None:
                per_view, patches = self.visual(images.reshape(-1, *images.shape[-3:]), image_hidden)
                per_view = F.normalize(per_view.float(), dim=-1).view(*images.shape[:-3], -1)  # (B, [V,] E)
                mean = per_view if images.dim() == 4 else per_view.mean(dim=1)
                if self.classifier is not None:
                    out.image_logits = self.logits(mean)  # linear in f: the mean over views of the logits
                out.image_features = F.normalize(mean, dim=-1)

            # Points.
            if points is not None:
                groups = points if isinstance(points, Groups) else self.group(points)
                encoded, tokens, group_tokens = self.point_encoder(groups, point_hidden)  # encoded: CLS first
                out.point_features = F.normalize((encoded @ self.pc_projection).float(), dim=-1)
                if self.classifier is not None:
                    out.point_logits = self.logits(out.point_features)

            # What hidden tokens predict.
            if image_hidden is not None:
                patches = self.visual.ln_patch(patches)
                out.image_tokens = F.normalize((patches @ self.visual.proj).float(), dim=-1)
                grid = patches.transpose(1, 2).unflatten(2, self.visual.grid_size)  # (B, D, rows, columns)
                out.image_pixels = self.visual.decoder(grid)
            if point_hidden is not None:
                encoder = self.point_encoder
                cls = encoded[:, :len(encoder.proj)]
                out.point_cls = F.normalize((cls @ encoder.proj).float(), dim=-1)
                out.point_tokens = F.normalize((tokens @ encoder.proj).float(), dim=-1)
                rebuild_points = encoder.target == "points"
                out.point_target = groups.neighbourhoods if rebuild_points else group_tokens.detach()
                out.point_prediction = encoder.lm_head(tokens).view_as(out.point_target)
        return Outputs(**vars(out))

    def compile_blocks(self):
        """Compile the mini-PointNet, and the function through_block of either encoder.

        Equal blocks share one compilation. For ViT-B/16 and Point-BERT it took 23 s of the first step on one
        H200; with whole encoders compiled an H100 had made no step after 140 s. Where nothing can be
        compiled, a line on stderr says so, and the blocks stay as they are.
        """
        try:
            torch.compile(torch.sin)(self.logit_scale.detach())
        except Exception as error:  # each kind of compiler has errors of its own
            reason = str(error).strip().splitlines()[0]
            print(f"warning: --compile has no effect, this machine cannot compile ({reason})", file=sys.stderr)
            return
        self.visual.through_block = torch.compile(self.visual.through_block)
        self.point_encoder.through_block = torch.compile(self.point_encoder.through_block)
        self.point_encoder.encoder.compile()

    def in_precision(self):
        """The autocast context of the encoders. Grouping and logits switch it off; losses are outside."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.logit_scale.device.type, self.precision)


def precision_for(name: str, device: str | torch.device) -> torch.dtype:
    """What --precision means on a device; auto is bfloat16 on a GPU that supports it, and else float32."""
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
    fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return {"auto": torch.bfloat16 if fast else torch.float32,
            "bf16": torch.bfloat16,
            "fp32": torch.float32}[name]


# ------ Training: the teacher, and what the optimizer is given ----------------------------------------------
@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float):
    """theta_T <- m theta_T + (1 - m) theta_S for parameters; buffers are copied [ema]."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
    for teacher_buffer, student_buffer in zip(teacher.buffers(), student.buffers(), strict=True):
        teacher_buffer.copy_(student_buffer)


def teacher_momentum(step: int, final: float) -> float:
    """m = 0.99 + (final - 0.99) min(1, step / 400) [ema]. final: the momentum from step 400 on.

    The teacher is slow from the first step on, because its labels count from the first step on: a fast one
    would copy the student's first mistakes. 0.99 and 400 are the original's, however long the run.
    """
    return 0.99 + (final - 0.99) * min(1, step / 400)


def parameter_groups(model: CrossMoST, weight_decay: float, layer_decay: float,
                     freeze: list[str]) -> list[dict]:
    """Sort the parameters for an optimizer, one group for each pair of "lr_scale" and "weight_decay".

    lr_scale = layer_decay^n, where n counts the image encoder's layers from the parameter's own to its
    output. With twelve blocks: 1 in the last block, 12 in the first, 13 in the embeddings. Every other
    parameter has n = 0. Vectors have no weight decay; the 0-D logit_scale has, as in the original.
    freeze: names of parameters or modules, see is_below; these lose requires_grad and are in no group.
    Raises: UserError where no parameter or module has a name in freeze, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for module in freeze:
        if not any(is_below(name, [module]) for name in parameters):
            raise UserError(f"--freeze {module}: no parameter or module has this name; give whole names, as "
                            "visual or point_encoder.encoder (model.named_parameters() lists them)")

    layers = len(model.visual.transformer.resblocks)
    optimizer_groups = {}
    for name, parameter in parameters.items():
        parameter.requires_grad_(not is_below(name, freeze))
        if parameter.requires_grad:
            lr_scale = layer_decay ** layers_above(name, layers)
            decay = 0.0 if parameter.ndim == 1 else weight_decay
            optimizer_groups.setdefault((lr_scale, decay), []).append(parameter)

    if not optimizer_groups:
        raise UserError(f"--freeze {' '.join(freeze)} leaves nothing to train")
    return [{"params": members, "lr_scale": lr_scale, "weight_decay": decay}
            for (lr_scale, decay), members in optimizer_groups.items()]


def is_below(name: str, modules: list[str]) -> bool:
    """Whether a dotted name is one of `modules` or part of one: visual.proj is part of visual, not of vis."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


IMAGE_EMBEDDINGS = ("visual.conv1", "visual.class_emb", "visual.positional", "visual.mask_token",
                    "visual.ln_pre")


def layers_above(name: str, layers: int) -> int:
    """Count the layers of the image encoder from a parameter to its output; 0 for a parameter of no layer."""
    if name.startswith(IMAGE_EMBEDDINGS):
        return layers + 1
    if name.startswith("visual.transformer.resblocks."):
        return layers - int(name.split(".")[3])
    return 0


def train_mode(student: CrossMoST, freeze: list[str]):
    """Set training mode, but eval mode for frozen modules: their BatchNorm must not move (Deviation D12)."""
    student.train()
    for name, module in student.named_modules():
        if is_below(name, freeze):
            module.eval()


# ------ Class names to classifier ---------------------------------------------------------------------------
TEMPLATES = {
    "depth": ("a depth map of a {}.", "a depth image of one {}.", "a {} seen by a depth camera.",
              "a grey rendering of a {}.", "a photo of a {}."),
    "photo": ("a photo of a {}.", "a photo of one {}.", "a picture of a {}.", "a cropped photo of a {}.",
              "a close-up photo of a {}."),
    "3d": ("a 3D model of a {}.", "a rendering of a {}.", "a CAD model of a {}.", "a white {}, untextured."),
    "points": ("a point cloud of a {}.", "a point cloud model of a {}.", "a scan of a {}."),
    "openai": (*(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
               "a point cloud model of a {}."),
}


class TextEncoder(nn.Module):
    """CLIP's text tower (open_clip's) with its tokenizer.

    sizes: further arguments of open_clip's TextTransformer. fixed_tokens: the token embeddings are random
    numbers, always the same, and are not trained. That is enough to tell names apart, and files need not
    hold them.
    """

    def __init__(self, embed_dim: int, quick_gelu: bool = False, fixed_tokens: bool = False, **sizes):
        super().__init__()
        self.architecture = dict(embed_dim=embed_dim, quick_gelu=quick_gelu, fixed_tokens=fixed_tokens,
                                 **sizes)
        activation = QuickGELU if quick_gelu else nn.GELU
        self.tower = TextTransformer(output_dim=embed_dim, act_layer=activation, **sizes)
        self.tokenize = open_clip.SimpleTokenizer(context_length=self.tower.context_length)
        if fixed_tokens:
            embedding = self.tower.token_embedding.requires_grad_(False).weight
            numbers = np.random.RandomState(0).standard_normal(embedding.shape)  # the same in every NumPy
            embedding.data.copy_(torch.from_numpy(0.02 * numbers))

    def forward(self, texts: list[str]) -> Tensor:
        """Returns features (n, E), unit norm, of n texts."""
        tokens = self.tokenize(texts).to(self.tower.positional_embedding.device)
        return F.normalize(self.tower(tokens).float(), dim=-1)


@torch.no_grad()
def embed_names(text: TextEncoder, class_names: list[str], templates: tuple[str, ...]) -> Tensor:
    """Average each name's text features over the templates [classifier]. -> (C, E), unit norm"""
    texts = [template.format(name) for name in class_names for template in templates]
    tokens = text.tokenize(texts).unflatten(0, (len(class_names), len(templates)))  # (C, templates, length)
    features = []
    for part in tokens.split(math.ceil(256 / len(templates))):  # about 256 texts at once
        of_texts = text_features(text.tower, part.flatten(0, 1))
        features.append(of_texts.unflatten(0, part.shape[:2]).mean(dim=1))
    return F.normalize(torch.cat(features), dim=-1)


def text_features(tower: nn.Module, tokens: Tensor) -> Tensor:
    """Features (n, E), unit norm, of the tokens (n, length) of n texts: the tower's own, but faster.

    CLIP's tower answers at the end token, the largest number, and sees only what stands before it. Texts are
    short, so the empty places behind them are left out.
    """
    device = next(tower.parameters()).device
    ends = tokens.argmax(dim=-1)
    length = ends.max().item() + 1
    x = tower.token_embedding(tokens[:, :length].to(device)) + tower.positional_embedding[:length]
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    x = tower.ln_final(x[torch.arange(len(x), device=device), ends.to(device)])
    return F.normalize((x @ tower.text_projection).float(), dim=-1)


# ------ Starts: a model without classifier, and the text tower that names classes for it --------------------
def build_model(name: str, class_names: list[str], templates: tuple[str, ...], pretrained: str | None = None,
                start_checkpoint: str | Path | None = None, seed: int = 0, device: str | torch.device = "cpu",
                **point) -> CrossMoST:
    """Build a zero-shot start with one classifier column per class name, in eval mode, on `device`.

    Args:
        name: one of STARTS, or a model of open_clip's, which lends its towers to a file without them.
        templates: texts with {} for a class name.
        pretrained: open_clip's weights of `name`: a tag or a file.
        start_checkpoint: a file of any family, see read_start. Without it `tiny`, and the point encoder
            beside an open_clip model, are random, from `seed`.
        point: arguments of the PointEncoder.
    Raises: UserError for an unknown name, or a file that does not fit or cannot name classes.
    """
    if name in STARTS and (pretrained or name != "tiny" and not start_checkpoint):
        raise UserError(f"--model {name} is one file; use --start-checkpoint FILE, no --pretrained")

    if start_checkpoint:
        # The authors' start is beside OpenAI's CLIP, whose text tower its file may lack.
        lenders = {"crossmost": ("ViT-B-16-quickgelu", "openai")}
        lender = lenders.get(name, None if name in STARTS else (name, pretrained))
        model, text = load_start(start_checkpoint, lender, **point)
    elif name == "tiny":
        model, text = random_tiny(seed, **point)
    else:
        model, text = open_clip_start(name, pretrained, seed, **point)
    if text is None:
        raise UserError(f"{start_checkpoint} holds no text tower to name classes with; add the open_clip "
                        "name of its CLIP, --model and --pretrained")

    text.to(device)
    model.set_classifier(embed_names(text, class_names, templates), class_names)
    return model.to(device).eval()


def random_tiny(seed: int, **point) -> tuple[CrossMoST, TextEncoder]:
    """An untrained small CLIP with its small Point-BERT. point: arguments of the PointEncoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CrossMoST(TINY["embed_dim"], TINY["image"], {**TINY["point"], **point})
        return model, TextEncoder(TINY["embed_dim"], **TINY["text"])


def open_clip_start(name: str, pretrained: str | None, seed: int = 0,
                    **point) -> tuple[CrossMoST, TextEncoder]:
    """An open_clip model's image tower beside an untrained Point-BERT, and its text tower.

    Raises: UserError as plain_towers, or where the weights are out of reach.
    """
    embed_dim, image_sizes, text_sizes = plain_towers(name, pretrained)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            clip = open_clip.create_model(name, pretrained, force_custom_text=True)  # a text tower of its own
        except Exception as error:  # of the hub, of the network, of the file: each has its own type
            raise UserError(f"cannot get the weights {pretrained!r} of {name} ({str(error)[:150]}); fetch "
                            "them once with a connection, or name a file: --pretrained FILE") from error
        pixels = clip.visual.preprocess_cfg
        model = CrossMoST(embed_dim, image_sizes, point, mean=pixels["mean"], std=pixels["std"])
        text = TextEncoder(embed_dim, **text_sizes).requires_grad_(False).eval()

    load_strictly(model.visual, clip.visual.state_dict(), name, ("mask_token_emb", "ln_patch.", "decoder."))
    load_strictly(text.tower, clip.text.state_dict(), name)
    model.logit_scale.data.copy_(clip.logit_scale)
    return model, text


def plain_towers(name: str, pretrained: str | None) -> tuple[int, dict, dict]:
    """E, and the arguments of ImageEncoder and TextEncoder, for an open_clip model. Needs no weights.

    Raises: UserError for an unknown name, towers that are no plain transformers, and weights that were
    trained with another activation: open_clip would only warn of these.
    """
    config = open_clip.get_model_config(name)
    if config is None:
        raise UserError(f"unknown model {name!r}; one of {', '.join(STARTS)}, ViT-B-16-quickgelu ...")

    image, text = config["vision_cfg"], config["text_cfg"]
    extras = set(image) - {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
    extras |= set(text) - {"context_length", "vocab_size", "width", "heads", "layers"}
    if extras or not isinstance(image["layers"], int):  # a ResNet has a list of layers
        raise UserError(f"{name}'s towers are no plain transformers {sorted(extras)}; take a ViT-...")

    quick_gelu = config.get("quick_gelu", False)
    weights = open_clip.get_pretrained_cfg(name, pretrained or "")
    if weights and weights.get("quick_gelu", False) != quick_gelu:
        other = name.removesuffix("-quickgelu") if quick_gelu else f"{name}-quickgelu"
        raise UserError(f"the {pretrained} weights of {name} {'lack' if quick_gelu else 'need'} QuickGELU; "
                        f"use {other}")

    heads = image["width"] // image.pop("head_width", 64)
    return config["embed_dim"], {**image, "heads": heads, "quick_gelu": quick_gelu}, \
        {**text, "quick_gelu": quick_gelu}


def load_checkpoint(path: str | Path, which: str = "teacher", **point) -> CrossMoST:
    """The teacher, or the "student", of a file of any family, in eval mode.

    point: groups, group_size and heads of the PointEncoder, in place of the file's.
    """
    model, _ = load_start(path, None, which, **point)
    return model.eval()


def load_start(path: str | Path, lender: tuple | None = None, which: str = "teacher",
               **point) -> tuple[CrossMoST, TextEncoder | None]:
    """Load model and text tower of a file of any family; None for a text tower that is not there.

    lender: name and weights of the open_clip model that lends its towers to a file without. point: arguments
    of the PointEncoder in place of the file's. The head that predicts the hidden groups is new where `target`
    differs from the file's, or, with target "points", where group_size does.
    Raises: UserError, see read_start and load_strictly.
    """
    content = read_start(path, which)
    architecture, state, may_be_missing = content["architecture"], content["model"], content["may_be_missing"]

    lacks_image, clip_text = architecture["image"] is None, None
    if lender and (lacks_image or "text" not in content):
        clip, clip_text = open_clip_start(*lender)
    elif lacks_image:
        raise UserError(f"{path} holds a point encoder only; add --model with the open_clip name of its "
                        "CLIP (ULIP-2 with colours: ViT-bigG-14 --pretrained laion2b_s39b_b160k)")
    if lacks_image:
        state |= {key: value for key, value in clip.state_dict().items() if key.startswith("visual.")}
        architecture |= {key: clip.architecture[key] for key in ("image", "mean", "std")}

    of_file = {"target": "tokens", **architecture["point"]}
    point = {**of_file, **point}
    other_size = point["target"] == "points" and point["group_size"] != of_file["group_size"]
    if point["target"] != of_file["target"] or other_size:  # the file's head predicts something else
        state = {key: value for key, value in state.items() if not key.startswith("point_encoder.lm_head.")}
        may_be_missing += ("point_encoder.lm_head.",)

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of what the file lacks
            model = CrossMoST(**{**architecture, "point": point})
            text = TextEncoder(**content["text_architecture"]) if "text" in content else clip_text
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:  # sizes that cannot be
        raise UserError(f"cannot build the model of {path}: {error!r}; check the point encoder's sizes if "
                        "you gave any, else get or make the file again") from error

    load_strictly(model, state, path, may_be_missing)
    model.trained_with = content["options"]
    if "text" in content:
        remade = ("tower.token_embedding.",) if text.architecture["fixed_tokens"] else ()
        load_strictly(text, content["text"], path, remade)
    return model, text


def load_strictly(module: nn.Module, state: dict, path: str | Path, may_be_missing: tuple[str, ...] = ()):
    """Load `state` strictly, but for parameters that begin with one of `may_be_missing`.

    Raises: UserError with the keys that are missing, left over or of another shape.
    """
    kept = {key: value for key, value in module.state_dict().items() if key.startswith(may_be_missing)}
    try:
        module.load_state_dict(kept | state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit: {str(error)[:500]}; an encoder of your own needs a start of "
                        "its own, which python -m tools.pretrain makes") from error
