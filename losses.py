"""Every formula of the method, one function per tag, no state. Losses are computed in float32.

B batch, C classes, E joint embedding, L tokens (image patches or point groups), S points per group."""
import torch
import torch.nn.functional as F
from torch import Tensor


def joint_pseudo_labels(image_probs: Tensor, point_probs: Tensor, threshold: float,
                        point_weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Merge the teacher's two predictions into one label per object [joint-label].

    s_I = max p_I, s_P = w_P max p_P;  y = argmax of the modality with the larger s;
    keep = max(s_I, s_P) > tau. An exact tie goes to the image (Deviation D5).

    Args:
        image_probs, point_probs: (B, C) teacher probabilities for the weak views, rows sum to 1.
        threshold: tau, the confidence in [0, 1] an object must exceed to be trained on.
        point_weight: w_P, the factor on the point confidence before the two are compared.
    Returns:
        labels: (B,) int64 class index, set for every object.
        keep: (B,) bool, True where the winning confidence is above the threshold.
    Raises: ValueError if the two inputs differ in shape."""
    if image_probs.shape != point_probs.shape:
        raise ValueError(f"need equal (B, C): images {image_probs.shape}, points {point_probs.shape}")
    image_confidence, image_label = image_probs.max(dim=-1)
    point_confidence, point_label = point_probs.max(dim=-1)
    point_confidence = point_weight * point_confidence
    labels = torch.where(point_confidence > image_confidence, point_label, image_label)
    return labels, torch.maximum(image_confidence, point_confidence) > threshold


def pseudo_labels(rule: str, image_probs: Tensor | None, point_probs: Tensor | None,
                  thresholds: tuple[float, float], point_weight: float = 1.0,
                  truth: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """The labels and keep each modality trains on, by the rule of `--labels`.

    joint     joint_pseudo_labels: the more confident modality names the object (the method)
    mean      argmax of the mean of the two probability vectors, kept where that mean exceeds the threshold
    agree     joint, but kept only where both modalities name the same class
    separate  each modality its own argmax and confidence (Deviation D14), also where only one is given
    truth     the true labels, all kept: an oracle, the ceiling of what better pseudo-labels could bring

    image_probs, point_probs: (B, C), rows sum to 1, or None. thresholds: of images and of points; where both
    share a label the first. truth: (B,), for the oracle only.
    Returns {"image": (labels (B,), keep (B,)), "point": (labels, keep)}. Raises: ValueError, unknown rule."""
    if rule == "separate":
        labelled = {}
        for name, probs, threshold in zip(("image", "point"), (image_probs, point_probs), thresholds):
            if probs is not None:
                confidence, labels = probs.max(dim=-1)
                labelled[name] = labels, confidence > threshold
        return labelled
    if rule == "truth":
        labels, keep = truth, torch.ones_like(truth, dtype=torch.bool)
    elif rule == "mean":
        confidence, labels = ((image_probs + point_probs) / 2).max(dim=-1)
        keep = confidence > thresholds[0]
    elif rule in ("joint", "agree"):
        labels, keep = joint_pseudo_labels(image_probs, point_probs, thresholds[0], point_weight)
        if rule == "agree":
            keep = keep & (image_probs.argmax(dim=-1) == point_probs.argmax(dim=-1))
    else:
        raise ValueError(f"unknown rule {rule!r}; one of joint, mean, agree, separate, truth")
    return {"image": (labels, keep), "point": (labels, keep)}


def self_training_loss(logits: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
    """Cross-entropy in nats, averaged over the kept objects [self-training].

    sum_i keep_i * -log p_i[y_i] / sum_i keep_i.  Zero, not NaN, when none is kept (Deviation D8).
    logits (B, C), labels (B,) int64, keep (B,) bool -> scalar."""
    per_object = F.cross_entropy(logits.float(), labels, reduction="none")  # (B,)
    return (per_object * keep).sum() / keep.sum().clamp(min=1)


def fairness_loss(logits: Tensor, shares: list[float] | None = None) -> Tensor:
    """Cross-entropy of the batch's mean prediction against the names' expected shares, in nats [fairness].

    -sum_k q_k log( mean_batch softmax(l) )_k.  It keeps the student from naming everything alike: it is least
    where the mean prediction is q. logits (B, C) -> scalar. shares: q times any number; else q = 1/C."""
    # Through log-sum-exp, so that a class nobody predicts costs much but not infinity.
    log_mean = logits.float().log_softmax(dim=-1).logsumexp(dim=0) - torch.tensor(float(len(logits))).log()
    if shares is None:
        return -log_mean.mean()
    expected = torch.tensor(shares, device=logits.device)
    return -(expected / expected.sum() * log_mean).sum()


def cross_modal_alignment_loss(image_features: Tensor, point_features: Tensor,
                               temperature: float = 1.0) -> Tensor:
    """Pull the two views of an object together, push those of different objects apart [cross-align].

    A = f_P f_I^T / temperature (B x B);  CE(A, identity) + CE(A^T, identity), each a mean over B objects, in
    nats. The method has no temperature (1) and no `keep` here. Features (B, E), unit norm -> scalar; if they
    are aligned and orthogonal: 2 log(1 + (B-1) exp(-1/temperature)). Half of it is ULIP's InfoNCE."""
    similarity = point_features.float() @ image_features.float().T / temperature
    own = torch.arange(len(similarity), device=similarity.device)
    return F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)


def global_local_alignment_loss(cls_features: Tensor, token_features: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared distance of hidden tokens to their object's global feature [gl-align].

    sum over hidden tokens of ||t - g||^2 / their number; 0 to 4 for unit vectors, 0 if none is hidden.
    cls_features g (B, E), token_features t (B, L, E); hidden (B, L) bool, True = was masked -> scalar."""
    distance = (token_features.float() - cls_features.float().unsqueeze(1)).square().sum(dim=-1)  # (B, L)
    return (distance * hidden).sum() / hidden.sum().clamp(min=1)


def masked_image_loss(prediction: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """Mean absolute error over hidden pixels and channels [mim] (Deviation D3: the divisor).

    prediction, images (B, 3, H, W) in normalised pixel units; hidden (B, L) bool, True = patch was masked,
    L = a square grid of patches in row order -> scalar. Zero if none is hidden."""
    grid = int(hidden.shape[1] ** 0.5)
    if grid * grid != hidden.shape[1] or images.shape[-1] % grid:
        raise ValueError(f"{hidden.shape[1]} patches do not tile an image of {tuple(images.shape[-2:])}")
    patch = images.shape[-1] // grid
    pixels = hidden.view(-1, 1, grid, grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    error = (prediction.float() - images.float()).abs() * pixels
    return error.sum() / (pixels.sum() * images.shape[1]).clamp(min=1)


def masked_point_loss(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Reconstruct the hidden point groups [mpm] (Deviations D1: what is the target, D2: the divisor).

    Target tokens (B, G, D): mean absolute error over hidden groups and D. Target points (B, G, S, 3): Chamfer
    distance, the mean of the nearest squared distances over hidden groups and both directions, in the unit
    sphere's units. hidden (B, G) bool, True = was masked -> scalar. The target carries no gradient."""
    target = target.detach().float()
    if target.dim() == 3:
        error = (prediction.float() - target).abs().mean(dim=-1)  # (B, G)
    else:
        distance = (prediction.float().unsqueeze(-2) - target.unsqueeze(-3)).square().sum(dim=-1)
        error = (distance.amin(dim=-1).mean(dim=-1) + distance.amin(dim=-2).mean(dim=-1)) / 2
    return (error * hidden).sum() / hidden.sum().clamp(min=1)


def masked_terms(out, images: Tensor, image_hidden: Tensor | None,
                 point_hidden: Tensor | None) -> dict[str, Tensor]:
    """mim, mpm and gl-align, by name, of whichever modality has something hidden; `out` of CrossMoST."""
    terms = {}
    if image_hidden is not None:
        terms["mim"] = masked_image_loss(out.image_pixels, images, image_hidden)
        terms["gl_image"] = global_local_alignment_loss(out.image_features, out.image_tokens, image_hidden)
    if point_hidden is not None:
        terms["mpm"] = masked_point_loss(out.point_prediction, out.point_target, point_hidden)
        terms["gl_point"] = global_local_alignment_loss(out.point_cls, out.point_tokens, point_hidden)
    return terms


def name_alignment_loss(features: Tensor, names: Tensor, labels: Tensor, logit_scale: Tensor) -> Tensor:
    """ULIP's InfoNCE against text, a name counted once however many objects bear it (Deviation D21).

    CE(s f t^T, own name) and, the other way, every object of a name as its positive; the mean of the two, in
    nats. features f (B, E), names t (C, E), unit norm; labels (B,) index names; logit_scale s -> scalar."""
    logits = logit_scale * features.float() @ names.float().T  # (B, C)
    to_object = -logits.log_softmax(dim=0).gather(1, labels[:, None]).mean()
    return (F.cross_entropy(logits, labels) + to_object) / 2
