"""The losses and the label rules: functions without state. Losses are computed in float32.

B batch, C classes, E joint embedding, L image patches, G point groups, S points per group,
D width of a transformer's tokens.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def joint_pseudo_labels(image_probs: Tensor, point_probs: Tensor, threshold: float,
                        point_weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Merge the teacher's two predictions into one label per object [joint-label].

    s_I = max p_I, s_P = w_P max p_P;  y = argmax of the modality with the larger s;
    keep = max(s_I, s_P) > tau. An exact tie goes to the image (Deviation D5).

    Args:
        image_probs: (B, C) teacher probabilities for the weak images, rows sum to 1.
        point_probs: (B, C) the same for the weak point clouds.
        threshold: tau, the confidence in [0, 1] an object must exceed to be trained on.
        point_weight: w_P, the factor on the point confidence before the two are compared.
    Returns:
        labels: (B,) int64 class index, set for every object.
        keep: (B,) bool, True where the winning confidence is above the threshold.
    Raises:
        ValueError: the two inputs differ in shape.
    """
    if image_probs.shape != point_probs.shape:
        raise ValueError(f"need equal (B, C): images {image_probs.shape}, points {point_probs.shape}")

    image_confidence, image_label = image_probs.max(dim=-1)
    point_confidence, point_label = point_probs.max(dim=-1)
    point_confidence = point_weight * point_confidence

    # Not >=: at a tie the image names the object.
    labels = torch.where(point_confidence > image_confidence, point_label, image_label)
    keep = torch.maximum(image_confidence, point_confidence) > threshold
    return labels, keep


def self_training_loss(logits: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
    """Cross-entropy in nats, averaged over the kept objects [self-training].

    sum_i keep_i * -log p_i[y_i] / max(1, sum_i keep_i).  Zero, not NaN, when none is kept (Deviation D8).

    Args:
        logits: (B, C) of the student.
        labels: (B,) int64 pseudo-labels.
        keep: (B,) bool, True = trained on; or weights in [0, 1].
    """
    per_object = F.cross_entropy(logits.float(), labels, reduction="none")  # (B,)
    # clamp: without any kept object this is 0 / 1, and the run goes on.
    return (per_object * keep).sum() / keep.sum().clamp(min=1)


def fairness_loss(logits: Tensor, shares: list[float] | None = None) -> Tensor:
    """Cross-entropy of the batch's mean prediction against the names' expected shares, in nats [fairness].

    -sum_k q_k log( mean_batch softmax(l) )_k.  It keeps the student from giving every object the same name,
    and is least where the mean prediction equals q.

    Args:
        logits: (B, C) of the student.
        shares: how many objects of each name are expected, in any unit. q is made from it; without it
            q = 1/C, as in the method.
    """
    # log(mean) through log-sum-exp: a class nobody predicts then costs much, but not infinity.
    log_mean = logits.float().log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))  # (C,)
    if shares is None:
        return -log_mean.mean()
    expected = torch.tensor(shares, device=logits.device)
    expected = expected / expected.sum()
    return -(expected * log_mean).sum()


def cross_modal_alignment_loss(image_features: Tensor, point_features: Tensor,
                               temperature: float = 1.0) -> Tensor:
    """Pull image and point feature of an object together, push those of others apart [cross-align].

    A = f_P f_I^T / temperature (B x B);  CE(A, identity) + CE(A^T, identity), each a mean over B, in nats.

    The method uses temperature 1 and all objects, kept or not. ULIP's InfoNCE is half of this loss. Where
    features of an object are equal and those of different objects orthogonal, it costs
    2 log(1 + (B - 1) exp(-1 / temperature)). Features are (B, E), of unit norm.
    """
    similarity = point_features.float() @ image_features.float().T / temperature  # (B, B)
    itself = torch.arange(len(similarity), device=similarity.device)
    return F.cross_entropy(similarity, itself) + F.cross_entropy(similarity.T, itself)


def global_local_alignment_loss(cls_features: Tensor, token_features: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared distance of hidden tokens to their object's global feature [gl-align].

    sum over hidden tokens of ||t - g||^2 / their number: 0 to 4 for unit vectors, 0 if none is hidden.

    Args:
        cls_features: g, (B, E), unit norm.
        token_features: t, (B, L, E) or (B, G, E), unit norm.
        hidden: (B, L) or (B, G) bool, True = was masked.
    """
    distance = (token_features.float() - cls_features.float().unsqueeze(1)).square().sum(dim=-1)  # (B, L)
    return (distance * hidden).sum() / hidden.sum().clamp(min=1)


def masked_image_loss(prediction: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """Mean absolute error over hidden pixels and channels [mim] (Deviation D3: the divisor).

    Args:
        prediction, images: (B, 3, H, W) in normalised pixel units.
        hidden: (B, L) bool, True = patch was masked; L is a square grid of patches in row order.
    Returns:
        A scalar, 0 if no patch is hidden.
    Raises:
        ValueError: the patches do not tile the image.
    """
    grid = math.isqrt(hidden.shape[1])
    if grid * grid != hidden.shape[1] or images.shape[-1] % grid:
        raise ValueError(f"{hidden.shape[1]} patches do not tile an image of {tuple(images.shape[-2:])}")

    # From patches to pixels: (B, L) -> (B, 1, H, W).
    patch = images.shape[-1] // grid
    hidden_pixels = hidden.view(-1, 1, grid, grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)

    error = (prediction.float() - images.float()).abs() * hidden_pixels
    channels = images.shape[1]
    return error.sum() / (hidden_pixels.sum() * channels).clamp(min=1)


def masked_point_loss(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Reconstruct the hidden point groups [mpm] (Deviations D1: what is rebuilt, D2: the divisor).

    Tokens, (B, G, D): mean absolute error over hidden groups and D. Points, (B, G, S, 3): Chamfer
    distance, the mean of the nearest squared distances over hidden groups and both directions, in
    squared units of the unit sphere. The target carries no gradient.

    Args:
        prediction, target: both tokens, or both points.
        hidden: (B, G) bool, True = was masked.
    """
    target = target.detach().float()
    if target.dim() == 3:
        error = (prediction.float() - target).abs().mean(dim=-1)  # (B, G)
    else:
        # Chamfer: every point to the nearest of the other set, in both directions.
        difference = prediction.float().unsqueeze(-2) - target.unsqueeze(-3)  # (B, G, S, S, 3)
        distance = difference.square().sum(dim=-1)
        to_target = distance.amin(dim=-1).mean(dim=-1)
        to_prediction = distance.amin(dim=-2).mean(dim=-1)
        error = (to_target + to_prediction) / 2
    return (error * hidden).sum() / hidden.sum().clamp(min=1)


def masked_terms(out, images: Tensor, image_hidden: Tensor | None,
                 point_hidden: Tensor | None) -> dict[str, Tensor]:
    """mim, mpm and gl-align by name, of each modality that has something hidden.

    out: what CrossMoST returns; images: (B, 3, H, W) normalised; masks: (B, L) and (B, G) bool, or None.
    """
    terms = {}
    if image_hidden is not None:
        terms["mim"] = masked_image_loss(out.image_pixels, images, image_hidden)
        terms["gl_image"] = global_local_alignment_loss(out.image_features, out.image_tokens, image_hidden)
    if point_hidden is not None:
        terms["mpm"] = masked_point_loss(out.point_prediction, out.point_target, point_hidden)
        # A cloud's global feature is CLS alone here, without the maximum over tokens, and has its own
        # projection (point_encoder.proj), as in the original.
        terms["gl_point"] = global_local_alignment_loss(out.point_cls, out.point_tokens, point_hidden)
    return terms


def name_alignment_loss(features: Tensor, texts: Tensor, labels: Tensor, logit_scale: Tensor) -> Tensor:
    """ULIP's InfoNCE against text, but a name is one candidate, however many objects bear it (Deviation D21).

    With logits s f t^T. Object to name: CE(logits, y). Name to object: -log softmax over the batch, at each
    object's own name, mean over objects. The result is the mean of both, in nats.

    Args:
        features: f, (B, E), unit norm.
        texts: t, (C, E), unit norm, one for each name.
        labels: y, (B,) int64 index into the names.
        logit_scale: s.
    """
    logits = logit_scale * features.float() @ texts.float().T  # (B, C)
    object_to_name = F.cross_entropy(logits, labels)
    name_to_object = -logits.log_softmax(dim=0).gather(1, labels[:, None]).mean()
    return (object_to_name + name_to_object) / 2


# ------ Who names the objects: `--labels` -------------------------------------------------------------------
# Each rule in a sentence. `together` and `truth` name all objects at once, outside the training step; the
# others ask the teacher at each step, through pseudo_labels.
RULES = {
    "joint": "the label of the surer modality (the method)",
    "mean": "the label of the mean probabilities",
    "agree": "joint, kept only where both say the same",
    "separate": "each modality its own",
    "together": "from all objects named at once, every few epochs",
    "truth": "the true labels: an oracle, the ceiling",
}


def pseudo_labels(rule: str, probs: dict[str, Tensor], thresholds: list[float],
                  point_weight: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """Label a batch by a rule of RULES that asks the teacher at each step [joint-label].

    Args:
        probs: {"image": p_I, "point": p_P}, the teacher's probabilities (B, C) of the weak views. Where only
            one modality is trained it stands alone, and every rule gives that one's own label.
        thresholds: tau, the confidence to exceed. Two are those of images and of points, for labels of their
            own (Deviation D14); one is of both.
        point_weight: w_P of joint_pseudo_labels.
    Returns:
        {modality: (labels (B,) int64, keep (B,) bool)} of the modalities in `probs`. A rule of a fork's own
        may return weights in [0, 1] as `keep`.
    """
    if rule == "separate" or len(probs) == 1:
        taus = {"image": thresholds[0], "point": thresholds[-1]}
        labelled = {}
        for modality, p in probs.items():
            confidence, labels = p.max(dim=-1)
            labelled[modality] = labels, confidence > taus[modality]
        return labelled

    threshold = thresholds[0]
    if rule == "mean":
        confidence, labels = ((probs["image"] + probs["point"]) / 2).max(dim=-1)
        keep = confidence > threshold
    else:
        labels, keep = joint_pseudo_labels(probs["image"], probs["point"], threshold, point_weight)
    if rule == "agree":
        same_name = probs["image"].argmax(dim=-1) == probs["point"].argmax(dim=-1)
        keep = keep & same_name
    return {"image": (labels, keep), "point": (labels, keep)}
