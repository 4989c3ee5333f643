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


@torch.no_grad()
def transduced_labels(probs: Tensor, image_features: Tensor, point_features: Tensor, names: Tensor,
                      neighbours: int = 3, alpha: float = 1.0, temperature: float = 50.0,
                      rounds: int = 10, part: int = 1024) -> Tensor:
    """Name all objects together, from what the teacher says of each [together] (StatA, arXiv 2501.03729).

    Each name has a Gaussian in each modality. It begins at the name's text and moves towards the objects that
    bear the name, as far as there are any: so an absent name stays at its text, and no shares are assumed.

    start:   z = p,  mu_mk = t_k,  s_mk = S_m = sum_ik p_ik (f_mi - t_k)^2 / N
    names:   z_ik ~ p_ik exp( (1/T) [ sum_m sum_d ( -(f_mid - mu_mkd)^2 / (2 s_mkd) - log(s_mkd) / 2 )
                                + (50 / 2k) sum_j (w_ij + w_ji) z_jk ] ),  rows sum to 1; five times
    moves:   n_k = objects whose largest z is k;  b_k = n_k / (alpha + n_k)
             mu_mk = norm( b_k norm(mean_z f_m) + (1 - b_k) t_k )
             s_mk = b_k mean_z (f_m - mu_mk)^2 + (1 - b_k) (S_m + (t_k - mu_mk)^2)

    w_ij is the similarity of i and its k nearest j, the mean of both modalities', and else 0. Names and moves
    take turns, `rounds` times. Squares of vectors are by dimension d.

    probs p: (N, C), the teacher's joint probabilities. image_features, point_features f: (N, E), and names t:
    (C, E), of unit norm. neighbours k; 0 leaves their votes out. temperature T: 50 is StatA's, at 512
    dimensions; infinity leaves p as it is. part: so many objects seek their neighbours at once; part x N
    similarities are in memory.
    Returns z (N, C), float32, rows sum to 1: label and confidence are its largest. The order of the objects
    does not matter.
    """
    probs, texts = probs.float(), names.float()
    features = torch.stack([image_features, point_features]).float()  # (2, N, E)
    neighbours = min(neighbours, len(probs) - 1)
    edges = neighbour_edges(features, neighbours, part) if neighbours > 0 else None

    spread = expected_square(features, probs / len(probs), texts).sum(dim=1, keepdim=True)  # (2, 1, E)
    spread = spread.clamp(min=1e-8)  # a dimension in which all are alike
    z, means, variances = probs, texts, spread
    for _ in range(rounds):
        fit = log_density(features, means, variances).sum(dim=0)  # (N, C)
        for _ in range(5):
            votes = neighbour_votes(z, *edges) * (25 / neighbours) if edges else 0
            z = (probs.log() + (fit + votes) / temperature).softmax(dim=-1)

        bearers = F.one_hot(z.argmax(dim=-1), len(texts)).sum(dim=0)
        trust = (bearers / (alpha + bearers))[:, None]  # (C, 1)
        weights = z / z.sum(dim=0).clamp(min=1e-30)  # columns sum to 1
        moved = F.normalize(weights.T @ features, dim=-1)  # (2, C, E)
        means = F.normalize(trust * moved + (1 - trust) * texts, dim=-1)
        variances = (trust * expected_square(features, weights, means)
                     + (1 - trust) * (spread + (texts - means).square()))
    return z


def log_density(features: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Of features (2, N, E) under each name's Gaussian (2, C, E), without the constant -> (2, N, C)."""
    means, precision = means.expand(2, -1, -1), (1 / variances).expand(2, *means.shape[-2:])
    square = (features.square() @ precision.mT - 2 * features @ (means * precision).mT
              + (means.square() * precision).sum(dim=-1)[:, None])
    return -(square - precision.log().sum(dim=-1)[:, None]) / 2


def expected_square(features: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    """sum_i weights_ik (f_mi - centre_k)^2 by dimension, through moments, without N x C x E numbers.
    features (2, N, E), weights (N, C), centres (2, C, E) or (C, E) -> (2, C, E)"""
    square = (weights.T @ features.square() - 2 * centres * (weights.T @ features)
              + centres.square() * weights.sum(dim=0)[:, None])
    return square.clamp(min=0)


def neighbour_edges(features: Tensor, neighbours: int, part: int) -> tuple[Tensor, Tensor, Tensor]:
    """The symmetric matrix w_ij + w_ji, sparse: columns and values row after row, and where each row begins.
    features (2, N, E), of which `part` at a time are compared with all."""
    both = torch.cat(features.unbind(), dim=1)  # the product of two rows is the sum of both similarities
    nearest, similarity = [], []
    for at, some in zip(range(0, len(both), part), both.split(part)):
        to_all = some @ both.T / 2
        to_all[torch.arange(len(some)), torch.arange(at, at + len(some))] = -torch.inf  # not itself
        values, index = to_all.topk(neighbours, dim=1)
        nearest.append(index)
        similarity.append(values)
    nearest, values = torch.cat(nearest).flatten(), torch.cat(similarity).flatten()
    itself = torch.arange(len(both), device=both.device).repeat_interleave(neighbours)
    rows, order = torch.cat([itself, nearest]).sort(stable=True)
    begins = torch.searchsorted(rows, torch.arange(len(both), device=both.device))
    return torch.cat([nearest, itself])[order], values.repeat(2)[order], begins


def neighbour_votes(z: Tensor, columns: Tensor, values: Tensor, begins: Tensor) -> Tensor:
    """The sparse matrix of neighbour_edges times z (N, C). embedding_bag adds in one order, also on a GPU."""
    return F.embedding_bag(columns, z, begins, mode="sum", per_sample_weights=values)


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
