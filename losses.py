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
        image_probs: p_I, (B, C) teacher probabilities for the weak images, rows sum to 1.
        point_probs: p_P, (B, C) the same for the weak point clouds.
        threshold: tau, the confidence in [0, 1] an object must exceed to be trained on.
        point_weight: w_P, the factor on the point confidence before the two are compared.
    Returns:
        labels: y, (B,) int64 class index, set for every object.
        keep: (B,) bool, True where the winning confidence is above the threshold.
    Raises: ValueError if the two inputs differ in shape.
    """
    if image_probs.shape != point_probs.shape:
        raise ValueError(f"need equal (B, C): images {image_probs.shape}, points {point_probs.shape}")
    image_confidence, image_label = image_probs.max(dim=-1)
    point_confidence, point_label = point_probs.max(dim=-1)
    # The weight changes who names the object and whether it is kept, never what a cloud is named.
    point_score = point_weight * point_confidence

    # Not >=, because at a tie the image names the object.
    point_wins = point_score > image_confidence
    labels = torch.where(point_wins, point_label, image_label)
    keep = torch.maximum(image_confidence, point_score) > threshold
    return labels, keep


def self_training_loss(logits: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
    """Cross-entropy in nats, averaged over the kept objects [self-training].

    sum_i keep_i * -log p_i[y_i] / max(1, sum_i keep_i).
    It is zero, not NaN, where no object is kept (Deviation D8).

    Args:
        logits: (B, C) of the student.
        labels: (B,) int64 pseudo-labels.
        keep: (B,) bool, True = trained on; or weights in [0, 1].
    """
    per_object = F.cross_entropy(logits.float(), labels, reduction="none")
    return mean_where(per_object, keep)


def mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen values: sum_i v_i chosen_i / max(1, sum_i chosen_i)."""
    # Without the clamp 0 / 0 would be NaN, and the run would end. Weights in [0, 1] that sum to
    # less than 1 give their weighted sum.
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def fairness_loss(logits: Tensor, shares: list[float] | None = None) -> Tensor:
    """Keep the student from giving every object the same name [fairness]. In nats.

    -sum_k q_k log( mean_batch softmax(l) )_k: the cross-entropy of the batch's mean prediction
    against the expected shares q of the names. It is least where the two are equal.

    Args:
        logits: (B, C) of the student.
        shares: how many objects of each name are expected, in any unit. They are divided by
            their sum to give q. Without them q = 1/C, as in the method.
    """
    # log(mean) through log-sum-exp, because a class that nobody predicts must cost much, but not
    # infinity.
    log_probs = logits.float().log_softmax(dim=-1)
    log_mean = log_probs.logsumexp(dim=0) - math.log(len(logits))  # (C,)
    # The method expects all names equally often.
    if shares is None:
        return -log_mean.mean()
    expected = torch.tensor(shares, device=logits.device)
    expected = expected / expected.sum()
    return -(expected * log_mean).sum()


def cross_modal_alignment_loss(image_features: Tensor, point_features: Tensor,
                               temperature: float = 1.0) -> Tensor:
    """Pull the two features of an object together, push those of others apart [cross-align].

    A = f_P f_I^T / temperature (B x B);  CE(A, identity) + CE(A^T, identity), each a mean
    over B, in nats. Features are (B, E), of unit norm.

    The method uses temperature 1 and all objects, kept or not. ULIP's InfoNCE is half of this
    loss. Where the features of one object are equal, and those of different objects orthogonal,
    the loss is 2 log(1 + (B - 1) exp(-1 / temperature)).
    """
    similarity = point_features.float() @ image_features.float().T / temperature
    # Row i and column i belong to object i, so the right answers are the diagonal.
    itself = torch.arange(len(similarity), device=similarity.device)
    return F.cross_entropy(similarity, itself) + F.cross_entropy(similarity.T, itself)


def global_local_alignment_loss(cls_features: Tensor, token_features: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared distance of hidden tokens to their object's global feature [gl-align].

    sum over hidden tokens of ||t - g||^2 / their number: 0 to 4, and 0 if none is hidden.

    Args:
        cls_features: g, (B, E), unit norm.
        token_features: t, (B, L, E) or (B, G, E), unit norm.
        hidden: (B, L) or (B, G) bool, True = was masked.
    """
    # All tokens of an object have one global feature: (B, L, E) - (B, 1, E).
    difference = token_features.float() - cls_features.float().unsqueeze(1)
    distance = difference.square().sum(dim=-1)  # (B, L) or (B, G)
    return mean_where(distance, hidden)


def masked_image_loss(prediction: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """Mean absolute error over hidden pixels and channels [mim] (Deviation D3: the divisor).

    It is 0 if no patch is hidden.

    Args:
        prediction, images: (B, 3, H, W) in normalised pixel units.
        hidden: (B, L) bool, True = patch was masked. L is a square grid, in row order.
    """
    # From patches to pixels: (B, L) -> (B, 1, H, W).
    grid = math.isqrt(hidden.shape[1])
    patch = images.shape[-1] // grid
    cells = hidden.view(-1, 1, grid, grid)
    hidden_pixels = cells.repeat_interleave(patch, 2).repeat_interleave(patch, 3)

    error = (prediction.float() - images.float()).abs()
    # Expanded, so that a hidden pixel counts once for each of its channels.
    return mean_where(error, hidden_pixels.expand_as(error))


def masked_point_loss(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Reconstruct the hidden point groups [mpm] (Deviations D1: what is rebuilt, D2: the divisor).

    Tokens, (B, G, D), are reduce_dim's output before masking: mean absolute error over hidden
    groups and D. Points, (B, G, S, 3): mean
    Chamfer distance of the hidden groups. The target carries no gradient.

    Args:
        prediction, target: both tokens, or both points.
        hidden: (B, G) bool, True = was masked.
    """
    prediction, target = prediction.float(), target.detach().float()
    if target.dim() == 3:  # tokens
        error = (prediction - target).abs().mean(dim=-1)  # (B, G)
    else:
        error = chamfer_distance(prediction, target)
    return mean_where(error, hidden)


def chamfer_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance to the nearest point of the other set, over both directions.

    Twice (B, G, S, 3) -> (B, G), in squared units of the unit sphere.
    """
    # Every predicted point against every point of the target: (B, G, S, S, 3).
    difference = prediction.unsqueeze(-2) - target.unsqueeze(-3)
    distance = difference.square().sum(dim=-1)
    to_target = distance.amin(dim=-1).mean(dim=-1)
    to_prediction = distance.amin(dim=-2).mean(dim=-1)
    return (to_target + to_prediction) / 2


def masked_terms(out, images: Tensor, image_hidden: Tensor | None,
                 point_hidden: Tensor | None) -> dict[str, Tensor]:
    """mim, mpm and gl-align by name, of each modality that has something hidden.

    out: what CrossMoST returns. images: (B, 3, H, W), normalised. Masks: (B, L), (B, G) bool.
    """
    terms = {}
    if image_hidden is not None:
        terms["mim"] = masked_image_loss(out.image_pixels, images, image_hidden)
        terms["gl_image"] = global_local_alignment_loss(
            out.image_features, out.image_tokens, image_hidden)
    if point_hidden is not None:
        terms["mpm"] = masked_point_loss(out.point_prediction, out.point_target, point_hidden)
        # A cloud's global feature here is CLS alone, without the maximum over tokens. It has a
        # projection of its own (point_encoder.proj), as in the original.
        terms["gl_point"] = global_local_alignment_loss(
            out.point_cls, out.point_tokens, point_hidden)
    return terms


def name_alignment_loss(features: Tensor, texts: Tensor, labels: Tensor, logit_scale: Tensor) -> Tensor:
    """ULIP's InfoNCE against text, but a name is one candidate, however many objects bear it
    (Deviation D21).

    Logits are s f t^T. Object to name: CE(logits, y). Name to object: -log softmax over the
    batch, at each object's own name, mean over objects. The loss is the mean of both, in nats.

    Args:
        features: f, (B, E), unit norm.
        texts: t, (C, E), unit norm, one for each name.
        labels: y, (B,) int64 index into the names.
        logit_scale: s.
    """
    logits = logit_scale * features.float() @ texts.float().T  # (B, C)
    object_to_name = F.cross_entropy(logits, labels)
    # dim 0: the objects of the batch compete for each name.
    log_probs = logits.log_softmax(dim=0)
    name_to_object = -log_probs.gather(1, labels[:, None]).mean()
    return (object_to_name + name_to_object) / 2


# ------ Who names the objects: `--labels` -------------------------------------------------------------------
# `together` and `truth` name all objects at once, outside the training step. The others ask the
# teacher at each step, through pseudo_labels.
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
    """Label a batch by one of RULES [joint-label]; `together` and `truth` never come here.

    Args:
        probs: {"image": p_I, "point": p_P}, the teacher's probabilities (B, C) of the weak views.
            Where one modality is trained it stands alone, and every rule gives its own label.
        thresholds: tau, the confidence to exceed: one for both modalities, or one for images
            and one for points where each has labels of its own (Deviation D14).
        point_weight: w_P of joint_pseudo_labels.
    Returns:
        {modality: (labels (B,) int64, keep (B,) bool)} of the modalities in `probs`. A fork's
        own rule may return weights in [0, 1] as `keep`.
    """
    if rule == "separate" or len(probs) == 1:
        return separate_labels(probs, thresholds)

    image_probs, point_probs = probs["image"], probs["point"]
    threshold = thresholds[0]
    if rule == "joint":
        labels, keep = joint_pseudo_labels(image_probs, point_probs, threshold, point_weight)
    elif rule == "mean":
        confidence, labels = ((image_probs + point_probs) / 2).max(dim=-1)
        keep = confidence > threshold
    elif rule == "agree":
        labels, keep = joint_pseudo_labels(image_probs, point_probs, threshold, point_weight)
        # Each modality's own name counts here, however unsure it is.
        keep &= image_probs.argmax(dim=-1) == point_probs.argmax(dim=-1)
    else:
        raise ValueError(f"--labels {rule} has no branch in pseudo_labels")
    return {"image": (labels, keep), "point": (labels, keep)}


def separate_labels(probs: dict[str, Tensor],
                    thresholds: list[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each modality's own most probable name (Deviation D14)."""
    # [-1], because a single threshold is that of both.
    taus = {"image": thresholds[0], "point": thresholds[-1]}
    labelled = {}
    for modality, modality_probs in probs.items():
        confidence, labels = modality_probs.max(dim=-1)
        labelled[modality] = labels, confidence > taus[modality]
    return labelled
