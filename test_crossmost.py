"""Properties of the method and of the run. CPU, no network, no weights; a few minutes on two cores."""
import argparse
import contextlib
import hashlib
import http.server
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import trimesh
from PIL import Image

import data
import eval as evaluation
import model as models
import train
from data import UserError
from losses import (cross_modal_alignment_loss, fairness_loss, global_local_alignment_loss,
                    joint_pseudo_labels,
                    masked_image_loss, masked_point_loss, name_alignment_loss, pseudo_labels,
                    self_training_loss)
from model import (CrossMoST, build_model, farthest_point_sample, group_points, hide_groups, hide_patches,
                   load_checkpoint, update_teacher)

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "shared" / "golden"
MODELNET = HERE.parent / "shared" / "data" / "modelnet40_ply_hdf5_2048"
NAMES = list(data.MODELNET10)


def tiny(seed=0, **point) -> CrossMoST:
    """An untrained model of the real kind; without BatchNorm statistics worth the name, so in eval mode."""
    return build_model("tiny", NAMES, models.TEMPLATES["depth"], seed=seed, **point)


def inputs(batch=4, points=128, seed=0):
    torch.manual_seed(seed)
    return torch.randn(batch, 3, 64, 64), data.to_unit_sphere(torch.randn(batch, points, 3))


def options(*argv):
    return train.parse_args(["--dataset", "shapes", *argv])


# ------------------------------------------------------------------------------------------------ joint-label

def test_the_more_confident_modality_names_the_object():
    image = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    point = torch.tensor([[0.2, 0.8], [0.95, 0.05]])
    labels, keep = joint_pseudo_labels(image, point, 0.84)
    assert labels.tolist() == [0, 0] and keep.tolist() == [True, True]
    labels, keep = joint_pseudo_labels(image, point, 0.84,
                                       point_weight=0.6)  # 0.95 * 0.6 < 0.6: the image wins
    assert labels.tolist() == [0, 1] and keep.tolist() == [True, False]


def test_a_tie_takes_one_of_the_two_labels_and_not_their_sum():
    image = F.one_hot(torch.tensor([3]), 8).float()
    labels, _ = joint_pseudo_labels(image, F.one_hot(torch.tensor([2]), 8).float(), 0.5)
    assert labels.item() in (2, 3)


def test_raising_the_threshold_only_removes_objects_and_batch_order_does_not_matter():
    image, point = torch.rand(2, 50, 6).softmax(-1).unbind(0)
    _, low = joint_pseudo_labels(image, point, 0.2)
    labels, high = joint_pseudo_labels(image, point, 0.22)
    assert not (high & ~low).any() and high.sum() < low.sum()
    order = torch.randperm(50)
    assert torch.equal(joint_pseudo_labels(image[order], point[order], 0.2)[0], labels[order])


def test_every_label_rule_does_what_its_name_says():
    image = torch.tensor([[0.90, 0.08, 0.02], [0.70, 0.20, 0.10]])
    point = torch.tensor([[0.10, 0.85, 0.05], [0.95, 0.03, 0.02]])
    separate = pseudo_labels("separate", image, point, (0.84, 0.84))
    assert separate["image"][0].tolist() == [0, 0] and separate["image"][1].tolist() == [True, False]
    assert separate["point"][0].tolist() == [1, 0] and separate["point"][1].tolist() == [True, True]
    apart = pseudo_labels("separate", image, point, (0.5, 0.9))
    assert apart["image"][1].tolist() == [True, True] and apart["point"][1].tolist() == [False, True]
    alone = pseudo_labels("separate", None, point, (0.0, 0.9))
    assert alone.keys() == {"point"} and alone["point"][1].tolist() == [False, True]
    truth = torch.tensor([2, 1])
    assert all(torch.equal(label, truth) and keep.all()
               for label, keep in pseudo_labels("truth", None, None, (1, 1), truth=truth).values())
    assert pseudo_labels("agree", image, point, (0.5, 0.5))["image"][1].tolist() == [False, True]
    labels, keep = pseudo_labels("mean", image, point, (0.6, 0.6))["point"]
    assert labels.tolist() == [0, 0] and keep.tolist() == [False, True]
    with pytest.raises(ValueError, match="unknown rule"):
        pseudo_labels("guess", image, point, (0.5, 0.5))
    with pytest.raises(ValueError, match="need equal"):
        joint_pseudo_labels(image, point[:1], 0.5)


# ------------------------------------------------------------------------------------------------ losses

def test_uniform_logits_cost_log_of_the_class_count():
    loss = self_training_loss(torch.zeros(3, 40), torch.tensor([0, 5, 39]), torch.tensor([True, True, False]))
    assert loss.item() == pytest.approx(math.log(40))


def test_only_kept_objects_count_and_none_kept_costs_zero_with_zero_gradient():
    logits = torch.randn(4, 5, requires_grad=True)
    labels, keep = torch.tensor([0, 1, 2, 3]), torch.tensor([True, False, True, False])
    assert torch.allclose(self_training_loss(logits, labels, keep),
                          F.cross_entropy(logits[[0, 2]], labels[[0, 2]]))
    loss = self_training_loss(logits, labels, torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


def test_fairness_is_least_at_a_uniform_mean_and_survives_a_class_nobody_predicts():
    fair = fairness_loss(100 * torch.eye(5))  # each object sure of another class: the mean is uniform
    assert fair.item() == pytest.approx(math.log(5), abs=1e-4)
    assert fairness_loss(torch.randn(7, 5)).item() > math.log(5)
    collapsed = torch.zeros(6, 5)
    collapsed[:, 0] = 500
    assert math.log(5) < fairness_loss(collapsed).item() < 1000


@pytest.mark.parametrize("temperature", [1.0, 0.07])
def test_aligned_orthogonal_pairs_cost_what_the_docstring_says(temperature):
    features = torch.eye(6)
    expected = 2 * math.log(1 + 5 * math.exp(-1 / temperature))
    loss = cross_modal_alignment_loss(features, features, temperature).item()
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert cross_modal_alignment_loss(features, features.roll(1, 0), temperature) > expected


def test_global_local_alignment_is_a_mean_over_hidden_tokens_only():
    cls, tokens = F.normalize(torch.randn(2, 8), dim=-1), F.normalize(torch.randn(2, 5, 8), dim=-1)
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    hidden[0, 1] = hidden[1, 2] = True
    tokens[0, 1], tokens[1, 2] = cls[0], -cls[1]  # squared distances 0 and 4
    assert global_local_alignment_loss(cls, tokens, hidden).item() == pytest.approx(2.0, abs=1e-5)
    tokens[0, 0] = -cls[0]
    assert global_local_alignment_loss(cls, tokens, hidden).item() == pytest.approx(2.0, abs=1e-5)
    assert global_local_alignment_loss(cls, tokens, hidden & False).item() == 0


@pytest.mark.parametrize("batch, ratio", [(1, 0.2), (4, 0.2), (4, 0.9)])
def test_an_error_of_one_everywhere_costs_one(batch, ratio):
    images, tokens = torch.randn(batch, 3, 64, 64), torch.randn(batch, 16, 6)
    hidden = torch.rand(batch, 16).argsort(dim=1) < 16 * ratio
    assert masked_image_loss(images + 1, images, hidden).item() == pytest.approx(1, abs=1e-5)
    assert masked_point_loss(tokens + 1, tokens, hidden).item() == pytest.approx(1, abs=1e-5)
    cloud = 100 * torch.arange(8.0).view(8, 1).expand(8, 3).expand(batch, 16, 8, 3)
    shifted = cloud + torch.tensor([1.0, 0, 0])
    assert masked_point_loss(shifted.flip(2), cloud, hidden).item() == pytest.approx(1, abs=1e-4)  # any order


def test_masked_losses_see_hidden_content_and_nothing_else():
    images = torch.randn(2, 3, 64, 64)
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[:, 5] = True  # row 1, column 1: pixels 16..31
    worse = images.clone()
    worse[:, :, :16] += 9
    worse[:, :, 32:] += 9
    assert masked_image_loss(worse, images, hidden).item() == 0
    worse[:, :, 20, 20] += 1
    assert masked_image_loss(worse, images, hidden).item() > 0
    with pytest.raises(ValueError, match="do not tile"):
        masked_image_loss(images, images, hidden[:, :15])


def test_the_masked_point_target_carries_no_gradient():
    prediction, target = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)
    masked_point_loss(prediction, target, torch.ones(2, 4, dtype=torch.bool)).backward()
    assert target.grad is None and prediction.grad.abs().sum() > 0


def test_a_name_many_objects_bear_is_no_negative_of_itself():
    names, labels = torch.eye(3), torch.tensor([0, 0, 1, 2])
    features, cost = F.normalize(torch.randn(4, 3), dim=-1), 0
    similar = (2 * features @ names.T).tolist()
    for row, k in zip(similar, labels.tolist()):  # object to names, then its name to all objects
        cost += math.log(sum(map(math.exp, row))) - row[k]
        cost += math.log(sum(math.exp(other[k]) for other in similar)) - row[k]
    loss = name_alignment_loss(features, names, labels, torch.tensor(2.0)).item()
    assert loss == pytest.approx(cost / 8, abs=1e-5)
    scale = torch.tensor(50.0)
    assert name_alignment_loss(names[labels], names, labels, scale).item() == pytest.approx(math.log(2) / 4,
                                                                                            abs=1e-3)


# ------------------------------------------------------------------------------------------------ point
# groups, masks

def test_farthest_points_and_neighbours_equal_brute_force():
    points = torch.randn(2, 60, 3)
    for cloud, chosen in zip(points, farthest_point_sample(points, 12)):
        expected = [0]
        while len(expected) < 12:
            expected.append(max(range(60), key=lambda i: min(((cloud[i] - cloud[j]) ** 2).sum().item()
                                                             for j in expected)))
        assert chosen.tolist() == expected and len(set(expected)) == 12
    near, centres = group_points(points, 12, 5)
    for b in range(2):
        for g in range(12):
            distance = (points[b] - centres[b, g]).norm(dim=-1).sort().values[:5]
            assert torch.allclose(near[b, g].norm(dim=-1).sort().values, distance, atol=1e-5)


def test_grouping_follows_a_translation():
    points = torch.randn(2, 60, 3)
    near, centres = group_points(points, 8, 6)
    moved, moved_centres = group_points(points + 3, 8, 6)
    assert torch.allclose(near, moved, atol=1e-5) and torch.allclose(centres + 3, moved_centres, atol=1e-5)
    with pytest.raises(UserError, match="--groups"):
        group_points(points, 61, 6)


def test_masks_hide_the_documented_share():
    cells = hide_patches(50, 14, 0.3, "cpu")
    assert cells.shape == (50, 196) and (cells.sum(1) == 60).all()  # 15 of 49 cells of 2 x 2 patches
    cells = cells.view(50, 7, 2, 7, 2)
    assert (cells.any(4).any(2) == cells.all(4).all(2)).all()
    assert not torch.equal(cells[0], cells[1])
    centres = torch.randn(50, 64, 3)
    hidden = hide_groups(centres, 0.3)
    assert hidden.sum(1).min() >= 19 and hidden.sum(1).max() <= 25 and len(set(hidden.sum(1).tolist())) > 3
    for cloud, mask in zip(centres, hidden):  # contiguous: a ball around one of the hidden centres
        distance = torch.cdist(cloud[mask], cloud)
        assert any(row[mask].max() < row[~mask].min() for row in distance)


# ------------------------------------------------------------------------------------------------ encoders,
# teacher

def test_with_nothing_hidden_the_image_encoder_is_open_clips():
    torch.manual_seed(0)
    slip = dict(no_ln_pre=True, norm_kwargs=dict(eps=1e-6))
    ours_slip = dict(ln_pre=False, eps=1e-6)
    for quick_gelu, extra, ours in ((False, {}, {}), (True, {}, {}), (False, slip, ours_slip)):
        vision = dict(image_size=32, patch_size=8, width=64, layers=2, head_width=32, **extra)
        clip = open_clip.CLIP(24, open_clip.CLIPVisionCfg(**vision),
                              open_clip.CLIPTextCfg(width=32, heads=2, layers=1,
                                                    vocab_size=100), quick_gelu=quick_gelu).eval()
        ours = models.ImageEncoder(24, 32, 8, 64, 2, 2, quick_gelu=quick_gelu, **ours).eval()
        missing = ours.load_state_dict(clip.visual.state_dict(), strict=False)
        assert not missing.unexpected_keys
        images = torch.randn(3, 3, 32, 32)
        theirs = clip.encode_image(images)
        assert torch.allclose(ours(images)[0], theirs, rtol=0, atol=1e-6)
        nothing = torch.zeros(3, 16, dtype=torch.bool)
        assert torch.allclose(ours(images, nothing)[0], theirs, rtol=0, atol=1e-6)


def test_hidden_patches_and_groups_do_not_reach_the_features():
    model = tiny()
    images, points = inputs()
    image_hidden = torch.zeros(4, 16, dtype=torch.bool)
    image_hidden[:, 5] = True
    other = images.clone()
    other[:, :, 16:32, 16:32] = 7
    groups = model.group(points)
    point_hidden = hide_groups(groups.centres, 0.3)
    changed = torch.where(point_hidden[..., None, None], 5.0, groups.neighbourhoods)
    a = model(images, groups, image_hidden, point_hidden)
    b = model(other, models.Groups(changed, groups.centres), image_hidden, point_hidden)
    assert torch.equal(a.image_features, b.image_features) and torch.equal(a.point_features, b.point_features)
    assert not torch.equal(model(other, groups).image_features, model(images, groups).image_features)
    assert torch.allclose(a.image_tokens.norm(dim=-1), torch.ones(4, 16), atol=1e-5)


def test_the_point_encoder_ignores_the_order_of_points():
    model = tiny()
    _, points = inputs()
    shuffled = torch.cat([points[:, :1], points[:, 1:][:, torch.randperm(127)]],
                         dim=1)  # point 0 starts the sampling
    assert torch.allclose(model(None, points).point_features, model(None, shuffled).point_features, atol=1e-5)


def test_views_of_an_object_average_their_logits():
    model = tiny()
    images, _ = inputs()
    stacked = torch.stack([images, images.flip(-1)], dim=1)
    expected = (model(images, None).image_logits + model(images.flip(-1), None).image_logits) / 2
    assert torch.allclose(model(stacked, None).image_logits, expected, atol=1e-4)


def test_asking_for_what_was_not_computed_says_what_is_missing():
    model = CrossMoST(models.TINY["embed_dim"], models.TINY["image"], models.TINY["point"]).eval()
    out = model(*inputs())
    assert out.image_features.shape == (4, 128)
    with pytest.raises(AttributeError, match="set_classifier"):
        out.image_logits


def test_the_classifier_holds_unit_columns_in_class_order():
    model = tiny()
    assert torch.allclose(model.classifier.norm(dim=0), torch.ones(10), atol=1e-5)
    model.set_classifier(torch.randn(3, 128), ["a", "b", "c"])
    assert model.class_names == ["a", "b", "c"] and model(*inputs()).point_logits.shape == (4, 3)


@pytest.mark.parametrize("target", ["tokens", "points"])
def test_every_trainable_parameter_gets_a_finite_gradient_that_is_not_zero(target):
    args = options("--mask-ratio", "0.3")
    student, teacher = tiny(target=target).train(), tiny(target=target)
    models.parameter_groups(student, 0.05, 1.0, args.freeze)
    torch.manual_seed(0)
    clouds = data.sample_shapes(16, 0, points=256).points
    views = data.draw_views(clouds, 64)
    labels = {m: (torch.arange(16) % 10, torch.ones(16, dtype=torch.bool)) for m in ("image", "point")}
    sum(train.student_terms(student, views, labels, args).values()).backward()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name


def test_the_teacher_is_a_moving_average_with_copied_buffers():
    teacher, student = tiny(0), tiny(1)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student.point_encoder.encoder.first_conv[1].running_mean += 3
    update_teacher(teacher, student, 1.0)
    for name, value in teacher.named_parameters():
        assert torch.equal(value, before[name])
    for ours, theirs in zip(teacher.buffers(), student.buffers()):
        assert torch.equal(ours, theirs)
    update_teacher(teacher, student, 0.75)
    name = "visual.conv1.weight"
    assert torch.allclose(teacher.state_dict()[name], 0.75 * before[name] + 0.25 * student.state_dict()[name],
                          atol=1e-6)
    update_teacher(teacher, student, 0.0)
    assert all(torch.allclose(a, b) for a, b in zip(teacher.parameters(), student.parameters()))
    momenta = [models.teacher_momentum(step, 0.9998) for step in (0, 200, 400, 9999)]
    assert momenta == pytest.approx([0.99, 0.9949, 0.9998, 0.9998])


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs the reference outputs of the original code")
def test_the_encoders_and_losses_compute_what_the_original_code_computes():
    golden = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "official_tiny.npz").items()}
    model = load_checkpoint(GOLDEN / "official_tiny.pt", 16, 8, point_heads=3)
    model.set_classifier(torch.ones(7, 24))
    model.classifier.data = golden["classifier"]
    groups = group_points(golden["points"], 16, 8)  # these points are in the network's own axes
    out = model(golden["images"], groups)
    masked = model(golden["images"], groups, golden["image_hidden"], golden["point_hidden"])
    assert torch.equal(groups.centres, golden["group_centres"])
    patches = model.visual.ln_patch(model.visual(golden["images"], golden["image_hidden"])[1])
    computed = {
        "image_patch_tokens_masked": patches, "point_features": model.point_encoder(groups)[0],
        "point_features_masked": model.point_encoder(groups, golden["point_hidden"])[0],
        "group_tokens": masked.point_target,
        "image_logits": out.image_logits, "point_logits": out.point_logits,
        "image_logits_masked": masked.image_logits, "point_logits_masked": masked.point_logits,
        "loss_gl_align_image": global_local_alignment_loss(masked.image_features, masked.image_tokens,
                                                           golden["image_hidden"]),
        "loss_gl_align_point": global_local_alignment_loss(masked.point_cls, masked.point_tokens,
                                                           golden["point_hidden"]),
        "loss_fair_image": fairness_loss(masked.image_logits),
        "loss_fair_point": fairness_loss(masked.point_logits),
        "loss_cross_align_no_temperature": cross_modal_alignment_loss(masked.image_features,
                                                                      masked.point_features),
        # D3: the original divides by its 17 tokens where there are 3 channels
        "loss_mim_original": masked_image_loss(masked.image_pixels, golden["images"],
                                               golden["image_hidden"]) * 3 / 17}
    for name, value in computed.items():
        assert (value - golden[name]).abs().max() <= 1e-5 * golden[name].abs().max(), name
    # D1, D2: with the mask token as target, summed over channels, divided by the batch, it is the original's
    target = model.point_encoder.mask_token.expand_as(masked.point_prediction)
    ours = masked_point_loss(masked.point_prediction, target, golden["point_hidden"])
    assert (ours * 48 / 4 / golden["loss_mpm_original"]).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs the reference outputs of the original code")
def test_a_ulip_file_computes_what_the_original_code_computes():
    golden = {k: v for k, v in np.load(GOLDEN / "ulip_tiny.npz").items()}
    model, text = models.load_start(GOLDEN / "ulip_tiny.pt", groups=16, group_size=8, heads=3)
    model.eval()
    images, points = torch.from_numpy(golden["images"]), torch.from_numpy(golden["points"])
    tokens = text.tokenize([f"a point cloud model of a {name}." for name in golden["class_names"]])
    assert torch.equal(tokens, torch.from_numpy(golden["tokens"]))
    computed = {"image_features": model.visual(images)[0], "text_features": text.tower(tokens),
                "point_features": model.point_encoder(group_points(points, 16, 8))[0] @ model.pc_projection}
    for name, value in computed.items():
        expected = torch.from_numpy(golden[name])
        assert (value - expected).abs().max() <= 1e-5 * expected.abs().max(), name


# ------------------------------------------------------------------------------------------------ starts

def randomise(module):
    """Random values everywhere, biases and BatchNorm statistics too, so that nothing can be forgotten."""
    torch.manual_seed(0)
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "var" in key else 0.1 * torch.randn_like(value))
    return module.eval()


def write_ulip(path, channels=3, embed=32, towers=True):
    """A small file in ULIP's layout; returns the modules of other libraries whose weights are in it."""
    image = randomise(timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=0))
    text = randomise(open_clip.transformer.TextTransformer(
        width=64, heads=1, layers=2, output_dim=embed, act_layer=open_clip.transformer.QuickGELU))
    point = randomise(models.PointEncoder(embed, 64, 3, 1, 16, 8, token_width=32, channels=channels))
    state = {f"point_encoder.{key}": value for key, value in point.state_dict().items()
             if key not in ("mask_token", "proj") and not key.startswith("lm_head")}
    state |= {"pc_projection": torch.randn(128, embed), "logit_scale": torch.tensor(3.0)}
    if towers:
        state |= {f"visual.{key}": value for key, value in image.state_dict().items()}
        state |= {"image_projection": torch.randn(128, embed), **text.state_dict()}
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3,
                "args": argparse.Namespace(lr=1)}, path)
    return image, text, state


def test_a_ulip_file_is_a_complete_start(tmp_path):
    image, text, state = write_ulip(tmp_path / "ulip.pt")
    ours, our_text = models.load_start(tmp_path / "ulip.pt", groups=16, group_size=8)
    images, points = torch.randn(3, 3, 32, 32), data.to_unit_sphere(torch.randn(3, 60, 3))
    expected = image.forward_features(images)[:, 0] @ state["image_projection"]
    assert torch.allclose(ours.eval().visual(images)[0], expected, rtol=1e-4, atol=1e-5)
    tokens = open_clip.tokenize(["a night stand.", "a chair"])
    assert torch.allclose(our_text.tower(tokens), text(tokens), rtol=1e-4, atol=1e-5)
    # A hidden patch keeps its value: the mask token without the bias that moved into the positions.
    hidden = torch.ones(3, 16, dtype=torch.bool)
    patches = image.patch_embed(images) * 0
    blind = image.norm(image.blocks(image._pos_embed(patches)))[:, 0] @ state["image_projection"]
    assert torch.allclose(ours.visual(images, hidden)[0], blind, rtol=1e-4, atol=1e-5)
    # These weights know clouds that are y up; ours are z up.
    turned = models.group_points(points[..., [1, 2, 0]], 16, 8).centres
    assert torch.equal(ours.group(points).centres, turned)
    model = build_model("ulip1", NAMES, models.TEMPLATES["points"], None, tmp_path / "ulip.pt", groups=16,
                        group_size=8)
    assert model(images, points).point_logits.shape == (3, 10)
    assert model.architecture["mean"] == list(open_clip.constants.IMAGENET_MEAN)


def test_the_cross_most_start_and_its_trained_checkpoint_load(tmp_path, monkeypatch):
    image = dict(image_size=32, patch_size=8, width=64, layers=2, heads=1, quick_gelu=True)
    model = randomise(CrossMoST(32, image, dict(width=64, layers=3, heads=1, token_width=32)))
    state = {**model.state_dict()}
    state["image_projection"] = state.pop("visual.proj")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "start.pt")
    start = load_checkpoint(tmp_path / "start.pt", 16, 8)
    assert same(start.state_dict(), model.state_dict()) and start.classifier is None
    state["classifier"] = torch.randn(32, 7)
    student = {**state, "logit_scale": torch.tensor(9.0)}
    torch.save({"model": student, "model_ema": state}, tmp_path / "trained.pth")
    trained = load_checkpoint(tmp_path / "trained.pth", 16, 8)
    assert len(trained.class_names) == 7 and torch.equal(trained.classifier, state["classifier"])
    assert load_checkpoint(tmp_path / "trained.pth", 16, 8, which="student").logit_scale == 9
    assert trained.logit_scale == state["logit_scale"] != 9
    out = trained(*(inputs()[0][..., :32, :32], inputs()[1]))
    assert out.image_logits.shape == out.point_logits.shape == (4, 7)
    with pytest.raises(UserError, match="evaluate it on the data set"):
        evaluation.main(["--checkpoint", str(tmp_path / "trained.pth"), "--points", "128", "--views", "1"])
    path = tmp_path / "ten.pth"
    torch.save({"model": state | {"classifier": torch.randn(32, 10)}}, path)
    ten = load_checkpoint(path, which="student")
    monkeypatch.setattr(evaluation, "load_checkpoint", lambda path, which: ten)
    results = evaluation.main(["--checkpoint", str(path), "--points", "128", "--views", "1"])
    assert set(results["teacher"]["per_class"]) == set(NAMES)


def test_an_open_clip_model_lends_its_towers_to_a_file_without(tmp_path):
    write_ulip(tmp_path / "rgb.pt", channels=6, embed=256, towers=False)
    with pytest.raises(UserError, match="point encoder only"):
        load_checkpoint(tmp_path / "rgb.pt")
    point = dict(groups=16, group_size=8)
    clip, text = models.open_clip_start("ViT-S-32-alt", None, **point)
    model = build_model("ViT-S-32-alt", ["mug"], models.TEMPLATES["3d"], None, tmp_path / "rgb.pt", **point)
    assert same(model.visual.state_dict(), clip.visual.state_dict()) and model.point_encoder.channels == 6
    names = models.embed_names(text, ["mug"], models.TEMPLATES["3d"])
    assert torch.allclose(model.classifier.T, names, atol=1e-6)
    points = inputs()[1]
    groups = model.group(points)
    coloured = torch.cat([groups.neighbourhoods, torch.full_like(groups.neighbourhoods, 0.4)], dim=-1)
    tokens = model.point_encoder.reduce_dim(model.point_encoder.encoder(coloured))
    assert torch.allclose(model.point_encoder(groups)[2], tokens, atol=1e-5)


@pytest.mark.parametrize("name, says", [("nonsense", "unknown model"), ("ulip2", "start-checkpoint"),
                                        ("RN50", "no plain vision transformer")])
def test_a_start_that_cannot_be_is_refused(name, says):
    with pytest.raises(UserError, match=says):
        build_model(name, NAMES, models.TEMPLATES["3d"])


def test_weights_of_another_activation_or_out_of_reach_are_refused(monkeypatch):
    with pytest.raises(UserError, match="use ViT-B-16-quickgelu"):
        build_model("ViT-B-16", NAMES, models.TEMPLATES["3d"], "openai")
    with pytest.raises(UserError, match="use --start-checkpoint"):
        build_model("tiny", NAMES, models.TEMPLATES["3d"], "openai")
    with pytest.raises(UserError, match="--pretrained FILE"):
        build_model("ViT-S-32-alt", NAMES, models.TEMPLATES["3d"], "/nowhere.pt")


@pytest.mark.parametrize("change, says", [
    ({"ppat.transformer.layers.0.w": torch.zeros(1)}, "OpenShape's"),
    ({"point_encoder.trans2embed.weight": torch.zeros(1)}, "Uni3D's"),
    ({"pc_projection": torch.zeros(64, 32)}, r"pc_projection \(64, 32\) for \(128, 32\)"),
    ({"visual.extra": torch.zeros(1)}, "1 left over .*extra"),
    ({"point_encoder.norm.bias": None}, "1 missing .*norm.bias"),
    ({"point_encoder.reduce_dim.weight": None}, "no known family")])
def test_a_file_that_does_not_fit_is_named_with_its_keys(tmp_path, change, says):
    state = write_ulip(tmp_path / "ulip.pt")[2] | change
    torch.save({"state_dict": {k: v for k, v in state.items() if v is not None}}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=f"odd.pt.*{says}"):
        load_checkpoint(tmp_path / "odd.pt", 16, 8)


def test_full_size_models_have_the_published_sizes():
    with torch.device("meta"):
        encoders = [models.PointEncoder(512), models.PointEncoder(1280, layers=18, channels=6)]
    added = tuple(key.removeprefix("point_encoder.") for key in models.MAY_BE_MISSING)
    sizes = [sum(p.numel() for n, p in e.named_parameters() if not n.startswith(added)) for e in encoders]
    assert sizes == [21_858_816, 32_499_072]
    assert sum(p.numel() for p in encoders[0].parameters()) == 22_203_648
    assert len(encoders[0].state_dict()) == 164


def test_learning_rates_of_the_full_size_model_by_name():
    with torch.device("meta"):
        model = CrossMoST(512, dict(image_size=224, patch_size=16, width=768, layers=12, heads=12), {},
                          class_names=list(map(str, range(40))))
    groups = models.parameter_groups(model, 0.05, 0.65, ["point_encoder.encoder"])
    of = {id(p): (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        if name.startswith("point_encoder.encoder."):
            assert id(parameter) not in of and not parameter.requires_grad
            continue
        layer = 13
        if block := re.match(r"visual\.transformer\.resblocks\.(\d+)\.", name):
            layer = int(block[1]) + 1
        elif re.match(r"visual\.(conv1|class_emb|positional_emb|mask_token_emb|ln_pre)", name):
            layer = 0
        decay = 0 if parameter.ndim == 1 else 0.05
        assert of[id(parameter)] == (pytest.approx(0.65 ** (13 - layer)), decay), name


# ------------------------------------------------------------------------------------------------ fetching

class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` under any path but /gone; /wrong serves other bytes."""
    content, asked = bytes(range(256)) * 400, []

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/gone":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(b"x" * len(self.content) if self.path == "/wrong" else self.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def address(monkeypatch):
    """Of a local server; the hub is out of reach."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.asked = []
    monkeypatch.setattr(data, "hf_hub_download", no_hub)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def no_hub(*_, **__):
    raise OSError("no hub here")


def stub_hub(content, asked):
    def hf_hub_download(data_set, file, repo_type, revision, local_dir):
        asked.append((data_set, file, repo_type, revision))
        path = Path(local_dir) / file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        return str(path)
    return hf_hub_download


def test_a_file_comes_from_the_hub_first_and_from_a_plain_address_second(tmp_path, monkeypatch, address):
    sha256, hub, asked = hashlib.sha256(Server.content).hexdigest(), ("a/b", "c/file.bin", "main"), []
    data.fetch(tmp_path / "plain.bin", [f"{address}/gone", f"{address}/good"], sha256, hub)
    assert (tmp_path / "plain.bin").read_bytes() == Server.content and Server.asked == ["/gone", "/good"]
    monkeypatch.setattr(data, "hf_hub_download", stub_hub(Server.content, asked))
    for _ in range(2):  # the second time it is there: nothing is asked
        data.fetch(tmp_path / "hub.bin", [f"{address}/good"], sha256, hub)
    assert asked == [("a/b", "c/file.bin", "dataset", "main")] and len(Server.asked) == 2
    assert (tmp_path / "hub.bin").read_bytes() == Server.content
    monkeypatch.setattr(data, "hf_hub_download", stub_hub(b"other", asked))
    data.fetch(tmp_path / "wrong.bin", [f"{address}/good"], sha256, hub)
    assert (tmp_path / "wrong.bin").read_bytes() == Server.content
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".lock"}


def test_what_cannot_be_fetched_leaves_nothing_and_names_its_place(tmp_path, monkeypatch, address):
    monkeypatch.setitem(data.DOWNLOADS, "toy", dict(
        file="toy.bin", hub=("a/b", "toy.bin", None), terms="free", sha256="0" * 64,
        urls=[f"{address}/gone", f"{address}/wrong"]))
    with pytest.raises(UserError, match=f"no hub here.*404.*invalid hash.*put it at {tmp_path}/toy.bin$"):
        data.fetch_published("toy", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".toy.bin.lock"]
    with pytest.raises(UserError, match="toy.bin is missing; put it there"):
        data.fetch_published("toy", tmp_path, allowed=False)


def test_a_file_that_two_want_is_fetched_once(tmp_path, address):
    both = [threading.Thread(target=data.fetch, args=(tmp_path / "a", [f"{address}/good"])) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert Server.asked == ["/good"] and (tmp_path / "a").read_bytes() == Server.content


def write_zip(path, **members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def test_an_archive_is_unpacked_inside_its_folder_and_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    odd = write_zip(tmp_path / "odd.zip", **{"set/a.txt": "1", "../out.txt": "2", "set/../../out.txt": "3"})
    broken = tmp_path / "broken.zip"
    broken.write_bytes(odd.read_bytes()[:60])
    for archive, members in ((broken, None), (odd, {"set/a.txt": "0" * 64})):
        with pytest.raises(UserError, match=f"cannot unpack .*{archive.name}"):
            data.unpack([archive], folder, members=members)
    with pytest.raises(UserError, match="killed"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        data.unpack([odd], folder)
    assert not folder.exists() and not list(tmp_path.rglob("*.txt"))
    (tmp_path / ".set.part").mkdir()  # left by a killed process
    (tmp_path / ".set.part/half.txt").write_text("1")
    data.unpack([odd], folder)
    assert [path.name for path in folder.iterdir()] == ["a.txt"]
    assert not (tmp_path / "out.txt").exists() and not (tmp_path.parent / "out.txt").exists()
    data.unpack([broken], folder)  # it is there: nothing is unpacked
    data.unpack([odd], tmp_path / "some", lambda names: names[:1])
    assert [path.name for path in (tmp_path / "some").rglob("*.txt")] == ["a.txt"]


# ------------------------------------------------------------------------------------------------ data and
# views

def test_shapes_are_the_same_for_a_seed_and_lie_in_the_unit_sphere():
    for domain in ("source", "target"):
        a, b, c = (data.sample_shapes(20, seed, domain, points=300) for seed in (5, 5, 6))
        assert torch.equal(a.points, b.points) and not torch.equal(a.points, c.points)
        assert a.points.shape == (20, 300, 3) and a.labels.tolist() == [i % 10 for i in range(20)]
        assert torch.allclose(a.points.norm(dim=-1).amax(dim=1), torch.ones(20), atol=1e-5)
        assert torch.allclose(a.points.mean(dim=1), torch.zeros(20, 3), atol=1e-5)
    assert data.sample_shapes(3, 5).class_names == NAMES


@pytest.mark.parametrize("kind, area_above", [("box", 1 / 2), ("tube", 1 / 2), ("ball", 1 / 2),
                                              ("bowl", 0.0)])
def test_points_of_a_solid_lie_on_its_surface(kind, area_above):
    solid = data.part(kind, (0, 0, 5), (2, 2, 2))
    points = data.sample_parts([solid], 4000, np.random.default_rng(0)) - [0, 0, 5]
    radius = {"box": np.abs(points).max(1), "tube": np.maximum(np.hypot(*points.T[:2]), np.abs(points[:, 2]))}
    assert np.allclose(radius.get(kind, np.linalg.norm(points, axis=1)), 1)
    assert (points[:, 2] > 1e-9).mean() == pytest.approx(area_above, abs=0.04)


def test_a_camera_sees_the_near_half_of_a_sphere_and_nothing_inside():
    torch.manual_seed(0)
    shell = F.normalize(torch.randn(1, 6000, 3), dim=-1)
    angle = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.5]])
    seen = data.seen_from(torch.cat([shell, 0.5 * shell], dim=1), *angle)
    depth = data.project(shell, *angle)[2]
    outer, inner = seen.split(6000, dim=2)
    assert outer[depth > 0.5].all() and not outer[depth < -0.2].any() and inner.float().mean() < 0.02


def test_a_scan_is_one_sided():
    torch.manual_seed(0)
    scanned = data.scan(F.normalize(torch.randn(20, 9000, 3), dim=-1), 3000, seed=0)
    centred = scanned - (scanned.amax(dim=1, keepdim=True) + scanned.amin(dim=1, keepdim=True)) / 2
    sector = ((torch.atan2(centred[..., 1], centred[..., 0]) / math.pi + 1) * 6).long().clamp(0, 11)
    share = F.one_hot(sector, 12).float().mean(dim=1).sort(dim=1).values
    # Of a whole sphere the emptiest quarter around would hold about as much as the fullest.
    assert (share[:, :3].sum(dim=1) / share[:, -3:].sum(dim=1)).mean() < 0.5
    furniture = data.sample_shapes(40, 0, points=2000).points
    azimuths = torch.tensor([[-1.0, 0.0, 1.0]]).expand(40, -1)
    lost = ~data.seen_from(furniture, azimuths, torch.full_like(azimuths, 0.5)).any(dim=1)
    assert 0.15 < lost.float().mean() < 0.45


def test_depth_views_show_up_as_up_right_as_right_and_near_as_bright():
    near_high = torch.tensor([[[0.5, -0.9, 0.5]]]).expand(1, 50,
                                                          3)  # right of, in front of and above the centre
    zero = torch.zeros(1, 1)
    view = data.render_depth_views(near_high, zero, zero, 32)[0, 0, 0]
    row, column = divmod(view.argmax().item(), 32)
    assert row < 16 < column
    behind = data.render_depth_views(near_high, zero + math.pi, zero, 32)[0, 0, 0]
    assert behind.argmax().item() % 32 < 16 and view.max() > behind.max() > 0
    assert view.min() == 0 and view.max() <= 1
    turned = data.rotate_about_xyz(near_high, torch.tensor([[0, 0, 0.7]]))  # turning the object is turning the camera
    assert torch.allclose(data.render_depth_views(turned, zero + 0.7, zero, 32)[0, 0, 0], view, atol=1e-5)


def test_the_nearest_point_of_a_cell_wins():
    cloud = torch.tensor([[[0.0, -0.8, 0.0], [0.0, 0.8, 0.0]]]).repeat(1, 30, 1)
    zero = torch.zeros(1, 1)
    both = data.render_depth_views(cloud, zero, zero, 16)
    assert torch.equal(both, data.render_depth_views(cloud.flip(1), zero, zero, 16))
    near, far = (data.render_depth_views(cloud[:, [i] * 60], zero, zero, 16) for i in (0, 1))
    assert torch.equal(both, near) and near.max() > far.max() > 0


def test_a_face_has_no_holes_and_a_gap_stays_open():
    torch.manual_seed(0)
    front = torch.rand(512, 3) * 1.4 - 0.7
    box = torch.cat([front, front]) * torch.tensor([1.0, 0, 1])
    box[:512, 1], box[512:, 1] = -0.6, 0.6  # 0.84 bright in front, 0.36 behind
    zero = torch.zeros(1, 1)
    face = data.render_depth_views(box[None], zero, zero, 64)[0, 0, 0]
    assert face[16:48, 16:48].min() > 0.83 and face[:2].max() == 0
    edge = data.render_depth_views(box[None, :512], zero, zero, 32)[0, 0, 0, 16].unique()  # no resizing
    assert edge[0] == 0 and 0.2 < edge[1] < 0.3 and 0.6 < edge[2] < 0.7 and edge[-1] > 0.83  # 1/4, 3/4
    posts = front * torch.tensor([0.3, 0.3, 1]) + torch.tensor([0.4, 0, 0]) * torch.randn(512, 1).sign()
    gap = data.render_depth_views(posts[None], zero, zero, 64)[0, 0, 0]
    assert gap[16:48, 31:33].max() == 0 and gap[16:48, 44].min() > 0.4


def test_views_are_new_arrays_of_the_same_shape_and_stay_in_range():
    torch.manual_seed(0)
    clouds = data.sample_shapes(10, 0, points=200).points
    before = clouds.clone()
    views = data.draw_views(clouds, 64)
    assert torch.equal(clouds, before)
    for name in ("weak_image", "strong_image"):
        assert views[name].shape == (10, 3, 64, 64) and 0 <= views[name].min() and views[name].max() <= 1
    ratio = views["weak_points"].norm(dim=-1) / clouds.norm(dim=-1)
    assert (ratio.std(dim=1) < 1e-4).all()  # a rotation and one scale
    assert ratio.min() > 0.89 and ratio.max() < 1.11
    strong = views["strong_points"]
    assert strong.shape == clouds.shape and torch.isfinite(strong).all()
    dropped = (strong == strong[:, :1]).all(dim=-1).float().mean(dim=1)
    assert dropped.max() <= 0.95 and dropped.std() > 0.1


def test_a_strong_view_zooms_and_shifts_more_than_a_weak_one():
    torch.manual_seed(0)
    clouds = data.sample_shapes(200, 0, points=200).points
    views = data.draw_views(clouds, 64)
    seen = data.random_view(clouds, 64).bool().float().mean()
    weak, strong = (views[name].bool().float().mean() / seen for name in ("weak_image", "strong_image"))
    assert 1.02 < weak < 1.15 < strong < 1.4  # crops of 0.85 to 1 and of 0.6 to 1 of the area
    low, high = views["strong_points"].aminmax(dim=1)
    assert 0.2 < ((low + high) / 2 / (high - low)).abs().median() < 0.35  # U(-0.5, 0.5) of the extent


def write_modelnet(root, per_file=12, points=64):
    folder = root / "modelnet40_ply_hdf5_2048"
    folder.mkdir()
    names = sorted(["airplane", "bathtub", "night_stand", "toilet", "bed", "chair", "desk", "dresser",
                    "monitor", "sofa", "table"])
    (folder / "shape_names.txt").write_text("\n".join(names) + "\n")
    rng = np.random.default_rng(0)
    for split, files in (("train", 2), ("test", 1)):
        listed = [f"data/modelnet40_ply_hdf5_2048/ply_data_{split}{i}.h5" for i in range(files)]
        (folder / f"{split}_files.txt").write_text("\n".join(listed) + "\n")
        for line in listed:
            with h5py.File(folder / Path(line).name, "w") as file:
                file["data"] = rng.normal(size=(per_file, points, 3)).astype(np.float32)
                file["label"] = (np.arange(per_file)[:, None] % 11).astype(np.uint8)
    return folder


def test_modelnet_is_read_in_the_h5_layout(tmp_path):
    write_modelnet(tmp_path)
    forty = data.load_dataset("modelnet40", tmp_path, "train", points=50)
    assert forty.points.shape == (24, 50, 3) and forty.labels.max() == 10
    assert forty.class_names[0] == "airplane"
    ten = data.load_dataset("modelnet10", tmp_path, "test", points=64)
    assert len(ten) == 10 and ten.class_names == NAMES  # twelve objects, two of them airplanes
    assert [ten.class_names[k] for k in ten.labels] == ["bathtub", "bed", "chair", "desk", "dresser",
                                                        "monitor",
                                                        "night stand", "sofa", "table", "toilet"]
    scanned = data.load_dataset("modelnet10", tmp_path, "test", points=64, domain="target")
    assert scanned.name == "modelnet10-target" and not torch.equal(scanned.points, ten.points)


@pytest.mark.skipif(not MODELNET.exists(), reason="needs the real ModelNet40")
def test_the_real_modelnet_has_its_counts_and_stands_upright():
    forty = data.load_dataset("modelnet40", MODELNET.parent, "test")
    ten = data.load_dataset("modelnet10", MODELNET.parent, "test")
    assert (len(forty), len(forty.class_names), len(ten), ten.class_names) == (2468, 40, 908, NAMES)
    assert forty.labels.bincount().sort().values.tolist()[-1] == 100 and len(ten.names) == 908
    tables = ten.points[ten.labels == NAMES.index("table")]
    assert (tables[..., 2] > 0).float().mean() > 0.55  # most of a table is its top
    airplanes = forty.points[forty.labels == 0]
    assert (airplanes.amax(dim=1) - airplanes.amin(dim=1)).mean(dim=0).argmin() == 2  # and planes are flat


def write_h5(path, labels, points=64, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["data"] = LEANING[:points] * np.arange(1, len(labels) + 1, dtype=np.float32)[:, None, None]
        file["label"] = np.array(labels)
        for key, value in more.items():
            file[key] = value


# Long along x, shorter along y, thin along z, denser towards the origin: no two axes, no two ends are alike.
LEANING = (np.random.default_rng(0).random((500, 3)) ** [1, 2, 3] * [4, 2, 1]).astype(np.float32)


def turned(cloud, axes, signs=(1, 1, 1)):
    return data.to_unit_sphere(torch.from_numpy(cloud[None][..., axes]) * torch.tensor(signs))


@pytest.mark.parametrize("up, axes, signs", [("z", [0, 1, 2], [1, 1, 1]), ("y", [2, 0, 1], [1, 1, 1]),
                                             ("-y", [0, 2, 1], [1, 1, -1])])
def test_clouds_are_turned_upright_and_not_mirrored(up, axes, signs):
    axis, direction = "xyz".index(up[-1]), -1.0 if up[0] == "-" else 1.0
    points = torch.eye(3)[None]
    stood = data.to_z_up(points, up)[0]
    assert stood[axis].tolist() == [0, 0, direction]  # what pointed upwards now points along z
    assert torch.linalg.det(stood) == pytest.approx(1.0)  # a rotation
    assert torch.equal(stood, points[0][:, axes] * torch.tensor(signs))


@pytest.mark.parametrize("name, file, counts", [
    ("scanobjectnn-obj-only", "main_split_nobg/{}_objectdataset.h5", (30, 15)),
    ("scanobjectnn-with-bg", "main_split/{}_objectdataset.h5", (30, 15)),
    ("scanobjectnn-hardest", "main_split/{}_objectdataset_augmentedrot_scale75.h5", (45, 30))])
def test_scanobjectnn_is_read_in_its_layout(tmp_path, name, file, counts):
    for split, count in zip(("training", "test"), counts):
        write_h5(tmp_path / "scanobjectnn/h5_files" / file.format(split), np.arange(count) % 15)
    for split, count in zip(("train", "test"), counts):
        objects = data.load_dataset(name, tmp_path, split, points=64)
        assert len(objects) == count and objects.split == split and objects.labels[14] == 14
        assert objects.class_names[:3] == ["bag", "bin", "box"] and objects.class_names[14] == "toilet"
        assert torch.allclose(objects.points[:1], turned(LEANING[:64], [2, 0, 1]), atol=1e-5)  # y was up
        assert torch.allclose(objects.points.norm(dim=-1).amax(dim=1), torch.ones(count), atol=1e-5)


def test_pointnets_own_modelnet_files_are_turned_and_named(tmp_path):
    folder = write_modelnet(tmp_path)
    plain = data.load_dataset("modelnet40", tmp_path, "test", points=64)
    (folder / "views").mkdir()
    with pytest.raises(UserError, match="has views, but no names"):
        data.load_dataset("modelnet40", tmp_path, "test", points=64)
    listed = folder / "ply_data_test_0_id2file.json"
    listed.write_text(json.dumps([f"airplane/plane_{i}.ply" for i in range(12)]))
    assert data.load_dataset("modelnet40-depth", tmp_path, "test", points=64).names[3] == "plane_3"
    with h5py.File(folder / "ply_data_test0.h5", "a") as file:
        file["normal"] = np.zeros((12, 64, 3), np.float32)
        file["name"] = [f"object_{i}".encode() for i in range(12)]
    write_pictures(folder / "views/airplane/test", *[f"object_{i // 2}.obj_v{i % 2}.png" for i in range(24)])
    turned_ones = data.load_dataset("modelnet40", tmp_path, "test", points=64)
    assert torch.allclose(turned_ones.points, plain.points[..., [2, 0, 1]], atol=1e-6)
    assert turned_ones.names[3] == "object_3" and plain.names is None
    objects = data.load_dataset("modelnet40", tmp_path, "test", points=64)
    assert [len(paths) for paths in objects.images] == [2] * 12
    assert objects.images[7][1].name == "object_7.obj_v1.png"
    assert data.load_dataset("modelnet40-depth", tmp_path, "test", points=64).images is None
    ten = data.load_dataset("modelnet10", tmp_path, "test", points=64)  # without the airplanes, 0 and 11
    assert ten.names == [f"object_{i}" for i in range(1, 11)] and len(ten.images) == 10


def write_pictures(folder, *names, size=(40, 30)):
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        Image.new("RGB", size, (20 * k % 256, 100, 200)).save(folder / name)


def test_redwood_is_read_by_its_categories(tmp_path):
    folder, ids = tmp_path / "redwood", [f"{i:05d}" for i in range(60)]
    (folder / "meshes").mkdir(parents=True)
    (folder / "points").mkdir()
    categories = {name: ids[k::9] for k, name in enumerate(data.REDWOOD)} | {"amp": ["77777"]}
    (folder / "categories.json").write_text(json.dumps(categories))
    for name in ids[:-1]:  # the last one has no mesh
        trimesh.creation.box((4, 2, 1)).export(folder / f"meshes/{name}.ply")
    np.save(folder / "points/00003.npy", LEANING)
    for name in ids:
        write_pictures(folder / f"images/{name}/rgb", "a.jpg", "b.jpg")
    both = [data.load_dataset("redwood", tmp_path, split, points=64) for split in ("train", "test")]
    assert sorted(both[0].names + both[1].names) == ids[:-1] and len(both[0]) > len(both[1]) > 3
    one = next(objects for objects in both if "00003" in objects.names)
    at = one.names.index("00003")
    assert one.class_names[one.labels[at]] == "bench"
    assert [f"{p.parents[1].name}/{p.name}" for p in one.images[at]] == ["00003/a.jpg", "00003/b.jpg"]
    extent = one.points[at - 1].amax(dim=0) - one.points[at - 1].amin(dim=0)
    assert extent.argsort().tolist() == [1, 2, 0]  # -y, the height of 2, is z now


def test_co3d_is_read_by_sequence_with_words_for_names(tmp_path):
    for category in ("bench", "teddybear", "plant"):
        for sequence in range(8):
            folder = tmp_path / "co3d" / category / f"{category}_{sequence}"
            write_pictures(folder / "images", "frame1.jpg", "frame2.jpg")
            trimesh.PointCloud(LEANING).export(folder / "pointcloud.ply")
    both = [data.load_dataset("co3d", tmp_path, split, points=64) for split in ("train", "test")]
    assert len(both[0]) + len(both[1]) == 24 and len(both[0]) > len(both[1]) > 0
    assert not set(both[0].names) & set(both[1].names) and len(both[0].class_names) == 42
    for objects in both:
        words = {"bench": "bench", "teddybear": "teddy bear", "plant": "plant"}
        named = [objects.class_names[k] for k in objects.labels]
        assert named == [words[name.split("_")[0]] for name in objects.names]
        assert all(len(paths) == 2 for paths in objects.images)


def write_folder(root, classes=("mug", "night_stand"), labelled=True, count=4, test=True):
    root.mkdir()
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    for split in ("train", "test")[:1 + test]:
        for k, name in enumerate(classes):
            folder = root / split / name if labelled else root / split
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                np.save(folder / f"{split}{k}{i}.npy", LEANING * (1 + i))
    return root


@pytest.mark.parametrize("extension", data.CLOUDS + data.MESHES)
def test_objects_of_every_format_are_read_the_same_every_time(tmp_path, extension):
    path = tmp_path / f"object{extension}"
    header = {".csv": "x,y,z,r"}.get(extension, "")
    box = trimesh.creation.box((4, 2, 1))
    if extension == ".glb":  # a scene: a unit box and how it is stretched
        scene = trimesh.Scene()
        scene.add_geometry(trimesh.creation.box((1, 1, 1)), transform=np.diag([4, 2, 1, 1]))
        scene.export(path)
    elif extension in data.MESHES:
        box.export(path)
        if extension == ".off":  # ModelNet's one-line header
            path.write_text(path.read_text().replace("OFF\n", "OFF", 1))
    elif extension == ".npy":
        np.save(path, LEANING)
    else:
        np.savetxt(path, np.hstack([LEANING, LEANING[:, :1]]), delimiter="," if extension == ".csv" else " ",
                   header=header, comments="")
    points = data.read_object(path, 200)
    assert points.shape == (200, 3) and np.array_equal(points, data.read_object(path, 200))
    if extension in data.MESHES:  # on the surface of the box: six faces by their area
        assert np.allclose(np.ptp(points, axis=0), [1, 4, 2] if extension == ".glb" else [4, 2, 1], atol=0.1)
        half = np.array([0.5, 2, 1] if extension == ".glb" else [2, 1, 0.5])
        assert np.allclose((np.abs(points) / half).max(axis=1), 1, atol=1e-5)
        assert 80 < (np.abs(np.abs(points) / half - 1) < 1e-5)[:, half.argmin()].sum() < 148  # 8 of 14
    else:
        away = np.linalg.norm(points[:, None] - LEANING[None], axis=-1)
        assert away.min(axis=1).max() < 1e-4 and len(set(away.argmin(axis=1))) == 200  # chosen, none twice


def test_a_folder_of_ones_own_is_read_with_and_without_labels(tmp_path):
    named = write_folder(tmp_path / "named")
    objects = data.load_dataset(str(named), tmp_path, "test", points=64)
    assert objects.labels.tolist() == [0] * 4 + [1] * 4 and objects.class_names == ["mug", "night stand"]
    assert objects.names[0] == "test00" and objects.name == "named" and objects.split == "test"
    assert torch.allclose(objects.points.norm(dim=-1).amax(dim=1), torch.ones(8), atol=1e-5)
    assert options("--up=-y").up == "-y"
    lying = data.load_dataset(str(named), tmp_path, "test", points=64, up="y")
    assert torch.allclose(lying.points, objects.points[..., [2, 0, 1]], atol=1e-6)
    bare = write_folder(tmp_path / "bare", labelled=False, test=False)
    write_pictures(bare / "views/train00", "1.png", "2.jpg")
    objects = data.load_dataset(str(bare), tmp_path, "test", points=64)
    assert objects.labels is None and len(objects) == 8 and objects.split == "train"
    assert [len(paths) for paths in objects.images] == [2] + [0] * 7
    assert [data.dataset_row(str(root))["templates"] for root in (bare, named)] == ["photo", "depth"]


def test_photographs_and_depth_views_take_one_path(tmp_path):
    root = write_folder(tmp_path / "own", labelled=False)
    write_pictures(root / "views/train00", *[f"{k}.png" for k in range(5)])
    objects = data.load_dataset(str(root), tmp_path, "train", points=64)
    batches = torch.arange(8).split(4)
    weak, strong = next(iter(data.training_photographs(objects, batches, 32, seed=1)))
    again = next(iter(data.training_photographs(objects, batches[:1], 32, seed=1)))
    other = next(iter(data.training_photographs(objects, batches[:1], 32, seed=2)))
    assert torch.equal(strong, again[1]) and not torch.equal(strong, other[1])
    views = data.draw_views(objects.points[:4], 32, (weak, strong))
    for name in ("weak_image", "strong_image"):
        assert views[name].shape == (4, 3, 32, 32) and 0 <= views[name].min() <= views[name].max() <= 1
    assert torch.equal(views["weak_image"], weak) and weak[0, 2].mean() == pytest.approx(200 / 255, abs=0.01)
    assert torch.equal(weak[1, 0], weak[1, 1])  # a depth view is grey
    stills = list(data.fixed_images(objects, None, 32, 4, "cpu"))
    assert [len(images[0]) for images in stills] == [5] + [6] * 7  # all its photographs, or six depth views
    assert stills[0][0, :, 0, 0, 0].mul(255).round().tolist() == [0, 20, 40, 60, 80]
    few = next(iter(data.fixed_images(objects, 2, 32, 4, "cpu")))
    assert few[0, :, 0, 0, 0].mul(255).round().tolist() == [0, 80]


def test_redwood_and_co3d_are_fetched_piece_by_piece(tmp_path, monkeypatch):
    fetched = []

    def fetch(path, urls, expected=None):
        fetched.append(urls[0].rsplit("/", 1)[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            lists = {"categories": {name: ["1"] if name == "sign" else [] for name in data.REDWOOD},
                     "meshes": ["1", "2"],
                     "co3d_sha256": {"singlesequence": {f"bench_00{k}.zip": "f" * 64 for k in (0, 1)}}}
            path.write_text(json.dumps(lists[path.stem]))
        elif path.suffix == ".ply":
            trimesh.creation.box((4, 2, 1)).export(path)
        else:
            assert expected == (None if path.stem == "1" else "f" * 64)
            with zipfile.ZipFile(path, "w") as file:
                for i in range(50):
                    file.writestr(f"rgb/{i:03d}.jpg" if path.stem == "1" else
                                  f"{path.stem[:-4]}/seq{path.stem}/images/{i}.jpg", b"")
                file.writestr(f"{path.stem[:-4]}/seq{path.stem}/pointcloud.ply", b"")
                file.writestr("depth/1.png", b"")
        return path
    monkeypatch.setattr(data, "fetch", fetch)
    data.fetch_redwood(tmp_path / "redwood")
    assert fetched == ["categories.json", "meshes.json", "1.ply", "1.zip"]
    frames = sorted(path.name for path in (tmp_path / "redwood/images/1").rglob("*.*"))
    assert len(frames) == 24 and frames[0] == "000.jpg" and frames[-1] == "049.jpg"
    data.fetch_co3d(tmp_path / "co3d", "bench")
    assert fetched[4:] == ["co3d_sha256.json", "bench_000_singlesequence.zip", "bench_001_singlesequence.zip"]
    assert {path.name for path in (tmp_path / "co3d/bench").iterdir()} == {"seqbench_000", "seqbench_001"}
    for folder in ("redwood", "co3d"):
        assert not list((tmp_path / folder).glob("*.zip")) and not list((tmp_path / folder).rglob("*.part"))


@pytest.mark.parametrize("name", ["modelnet40", "scanobjectnn-obj-only"])
def test_a_missing_data_set_is_fetched_checked_unpacked_and_read(tmp_path, monkeypatch, capsys, name,
                                                                 address):
    made, root, row = tmp_path / "made", tmp_path / "root", name.split("-")[0]
    made.mkdir()
    published = dict(data.DOWNLOADS[row])
    if row == "modelnet40":
        folder = write_modelnet(made)
        assert published["hub"][0] == "Msun/modelnet40" and published["urls"]
    else:
        folder = made / "h5_files"
        for member in (*published["members"], "h5_files/main_split_nobg/training_objectdataset.h5"):
            write_h5(made / member, np.arange(15))
        published["members"] = {member: data.sha256_of(made / member) for member in published["members"]}
    files = {str(file.relative_to(made)): file.read_bytes() for file in folder.rglob("*.*")}
    monkeypatch.setattr(Server, "content", write_zip(tmp_path / "a.zip", **files).read_bytes())
    published |= {"urls": [f"{address}/good"], "sha256": hashlib.sha256(Server.content).hexdigest()}
    monkeypatch.setitem(data.DOWNLOADS, row, published)
    with pytest.raises(FileNotFoundError, match="README, Data"):
        data.load_dataset(name, root, "test", points=64, download=False)
    capsys.readouterr()
    objects = data.load_dataset(name, root, "test", points=64)
    assert published["terms"] in capsys.readouterr().out  # said before it is fetched
    again = data.load_dataset(name, root, "test", points=64, download=False)
    assert torch.equal(objects.points, again.points)
    assert len(objects) == (12 if row == "modelnet40" else 15)


def run_script(*argv, script="train.py"):
    return subprocess.run([sys.executable, HERE / script, *map(str, argv)], capture_output=True, text=True,
                          cwd=HERE)


def spoil_h5(key, change):
    def spoil(root):
        path = write_modelnet(root) / "ply_data_test0.h5"
        with h5py.File(path, "a") as file:
            if change is None or isinstance(change, np.dtype):
                del file[key]
            if isinstance(change, np.dtype):  # a type by this name, no array
                file[key] = change
            elif change is not None:
                file[key][3] = change
        return "modelnet40"
    return spoil


def spoil_file(path, content=None, **folder):
    """A folder of one's own with one file replaced by `content`, bytes, an array, or None to remove it."""
    def spoil(root):
        own = write_folder(root / "own", **folder)
        (own / path).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            (own / path).unlink()
        elif isinstance(content, bytes):
            (own / path).write_bytes(content)
        else:
            np.save(own / path, content, allow_pickle=True)
        return str(own)
    return spoil


def truncated(root):
    path = write_modelnet(root) / "ply_data_test0.h5"
    path.write_bytes(path.read_bytes()[:900])
    return "modelnet40"


def beside_modelnet(name, content):
    def write(root):
        (write_modelnet(root) / name).write_bytes(content)
        return "modelnet40"
    return write


OBJECT = "test/mug/test00.npy"
BAD_DATA = {  # what is wrong -> (makes it and names the data set, what the one line says)
    "no such data set": (lambda root: "modelnet41", "unknown data set 'modelnet41'.*folder of your own"),
    "no files": (lambda root: "modelnet40", "no .*shape_names.txt; README, Data"),
    "no form filled": (lambda root: "shapenet55", "no .*ShapeNet-55/test.txt.*form: https://huggingface"),
    "not fetched": (lambda root: "redwood", "no .*categories.json; --download fetches"),
    "not fetched either": (lambda root: "co3d", "no .*pointcloud.ply; --download fetches.*8.9 GB, CC BY-NC"),
    "no variant": (lambda root: "scanobjectnn-hardest", "no .*test_objectdataset_augmentedrot_scale75.h5"),
    "truncated h5": (truncated, "cannot read .*ply_data_test0.h5"),
    "h5 without labels": (spoil_h5("label", None), "cannot read .*ply_data_test0.h5.*label"),
    "h5 with a type for data": (spoil_h5("data", np.dtype("f4")), "cannot read .*ply_data_test0.h5"),
    "h5 with a label out of range": (spoil_h5("label", 200), "label 200 in .*but there are 11 classes"),
    "NaN in h5": (spoil_h5("data", np.nan), "object 3 has NaN"),
    "one point in h5": (spoil_h5("data", 1.0), "all points of object 3 coincide"),
    "no files listed": (beside_modelnet("test_files.txt", b"\n"), "test_files.txt is empty"),
    "names of other objects": (beside_modelnet("ply_data_test_0_id2file.json", b'["a/1.txt", "a/2.txt"]'),
                               r"data \(12, 64, 3\), 12 labels, 2 names; expected"),
    "no class names": (spoil_file("classes.txt"), "no .*own/classes.txt"),
    "names in no known letters": (spoil_file("classes.txt", b"\xff\xfea\nb"), "cannot read .*classes.txt"),
    "a class twice": (spoil_file("classes.txt", b"mug\nmug\n"), "two or more different names"),
    "a class not listed": (spoil_file("test/cup/a.npy", LEANING), r"objects in \['cup'\]; expected folders"),
    "objects in folders and outside": (spoil_file("test/a.npy", LEANING), "objects in .*folders and outside"),
    "no objects": (spoil_file("classes.txt", b"mug\nnight_stand", count=0), "no objects in .*own/test"),
    "a name twice": (spoil_file("test/night_stand/test00.npy", LEANING), "two objects .*called test00"),
    "too few points": (spoil_file(OBJECT, LEANING[:20]), "test00.npy has 20 points, --points is 64; lower"),
    "an infinite coordinate": (spoil_file(OBJECT, LEANING * np.inf), "test00.npy has NaN or infinite"),
    "one point again and again": (spoil_file(OBJECT, LEANING * 0 + 1), "all points of .*test00.npy coincide"),
    "two columns": (spoil_file(OBJECT, LEANING[:, :2]), "cannot read .*test00.npy.*2 columns"),
    "pickled objects": (spoil_file(OBJECT, np.array([{}])), "cannot read .*test00.npy"),
    "an empty file": (spoil_file(OBJECT, b""), "cannot read .*test00.npy"),
    "a text without numbers": (spoil_file("test/mug/a.xyz", b"hello\n"), "cannot read .*a.xyz"),
    "a broken mesh": (spoil_file("test/mug/a.off", b"OFF\n9 9 0\n1 2 3\n"), "cannot read .*a.off"),
    "a broken ply": (spoil_file("test/mug/a.ply", b"ply\nformat ascii 1.0\n"), "cannot read .*a.ply"),
    "views of nobody": (spoil_file("views/stranger/a.png", b"x"), "no picture of any object.*views/test00"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_is_one_line_that_names_it_and_exit_code_2(tmp_path, capsys, what):
    make, says = BAD_DATA[what]
    name = make(tmp_path)
    with pytest.raises(SystemExit) as ended, evaluation.one_line_errors():
        data.load_dataset(name, tmp_path, "test", points=64, download=False)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and re.match(f"error: .*{says}", lines[0]), lines


def test_no_broken_file_is_read_wrongly_or_ends_in_a_traceback(tmp_path):
    """A few cuts and changed bytes of each kind of file; ten thousand were tried once."""
    chance, box, cloud = random.Random(0), trimesh.creation.box((4, 2, 1)), tmp_path / "a.txt"
    readers = {f"box{extension}": lambda path: data.read_object(path, 64) for extension in data.MESHES}
    for name in readers:
        box.export(tmp_path / name)
    np.savetxt(cloud, LEANING)
    readers |= {name: lambda path: data.read_object(path, 64) for name in ("a.npy", "a.txt")}
    np.save(tmp_path / "a.npy", LEANING)
    modelnet = write_modelnet(tmp_path)
    readers |= {f"{modelnet.name}/ply_data_test0.h5": lambda path: data.read_h5(path, 64, 64, 11)[0][0],
                "a.zip": lambda path: data.unpack([path], tmp_path / f"out{chance.random()}")}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("hello.txt", "hello " * 40)
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (20, 20), (200, 100, 9)).save(tmp_path / name)
        objects = data.Objects(torch.zeros(1, 64, 3), None, [], images=[[tmp_path / name]])
        readers[name] = lambda _, photographs=data.Photographs(objects, 16, 1): photographs[0]
    refused = 0
    for name, read in readers.items():
        path = tmp_path / name
        whole = path.read_bytes()
        for _ in range(30):
            broken = bytearray(whole[:chance.choice([len(whole), chance.randrange(len(whole))])])
            for _ in range(min(4, len(broken))):
                broken[chance.randrange(len(broken))] = chance.randrange(256)
            path.write_bytes(broken)
            try:
                found = read(path)
            except (UserError, OSError) as error:
                assert path.name in str(error)
                refused += 1
            else:
                assert not isinstance(found, np.ndarray) or found.shape == (64, 3)
    assert refused > 10 * len(readers)


def test_a_picture_that_is_none_ends_evaluation_in_one_line(tmp_path, capsys):
    own = spoil_file("views/test00/a.png", b"not a picture")(tmp_path)
    objects = data.load_dataset(own, tmp_path, "test", points=64)
    for images in (data.fixed_images(objects, None, 32, 4, "cpu"),
                   data.training_photographs(objects, torch.arange(8).split(4), 32, 0)):
        with pytest.raises(UserError) as error:
            next(iter(images))
        assert re.fullmatch("cannot read .*a.png: cannot identify .*; replace or remove it", str(error.value))
    (tmp_path / "own/views/test00/a.png").write_bytes(bytes.fromhex(  # what Pillow calls a SyntaxError
        "89504e470d0a1a0a0000000d494844520000001400000014080200000002eb8a5a0000001d49444154789c63e4e4e464"
        "20173091ad7354f3a8e651cda3f848dff24fcfaf39473265b989b28b2d8af2ed9db88d14eb0f5323e1a9a21900e48a00"
        "43d3a4d7520000000049454e44ae426082"))
    with pytest.raises(UserError, match="cannot read .*a.png: broken PNG file"):
        next(iter(data.fixed_images(objects, None, 32, 4, "cpu")))


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path):
    done = run_script("--dataset", "modelnet10", "--no-download", "--data-root", tmp_path, "--out",
                      tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("error: no ") and done.stderr.count("\n") == 1
    assert "shape_names.txt" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    done = run_script("--checkpoint", tmp_path / "bad.pt", script="eval.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "bad.pt" in done.stderr


def test_a_sheet_of_a_data_set_is_drawn(tmp_path):
    own = write_folder(tmp_path / "own")
    for argv in (["--dataset", str(own), "--points", "500", "--split", "test"], ["--domain", "source"]):
        picture = tmp_path / "sheet.png"
        evaluation.main([*argv, "--preview", str(picture), "--data-root", str(tmp_path)])
        assert Image.open(picture).size[0] > 800
        picture.unlink()


# ------------------------------------------------------------------------------------------------ training

def small_run(tmp_path, monkeypatch, *argv, train_count=48):
    """train.main on a few small objects from an untrained start, so that a run takes seconds."""
    start = tmp_path / "start.pt"
    if not start.exists():
        write_start(start)

    def load(split, points, domain):
        return data.sample_shapes({"train": train_count, "test": 20}[split], len(split), domain, points)
    monkeypatch.setattr(data, "load_shapes", load)
    return train.main(["--start-checkpoint", str(start), "--points", "128", "--batch-size", "16", "--epochs",
                       "2",
                       "--views", "2", "--threshold", "0.12", "--out", str(tmp_path / "out"), *argv])


def write_start(path):
    model, text = models.random_tiny(0, groups=8, group_size=8)
    models.save_file({"architecture": model.architecture, "model": model.state_dict(),
                      "text_architecture": text.architecture, "text": text.state_dict()}, path)
    return model


def small_flags(folder, *more):
    """Options of a small run on a folder of 42 objects, for processes of their own."""
    for i, cloud in enumerate(data.sample_shapes(42, 0, points=128).points):
        path = folder / "own" / ("train" if i < 40 else "test") / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, cloud.numpy())
    (folder / "own/classes.txt").write_text("\n".join(NAMES))
    write_start(folder / "start.pt")
    return [*map(str, ["--dataset", folder / "own", "--model", "tiny", "--start-checkpoint",
                       folder / "start.pt", "--groups", 8, "--group-size", 8, "--points", 128, "--views", 1,
                       "--batch-size", 8, "--threshold", 0.12, "--device", "cpu", *more])]


def weights(path, which="student"):
    return torch.load(path, weights_only=True)[which]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_seconds(results):
    return {key: value for key, value in results.items() if key != "seconds"}


def test_true_labels_do_not_touch_training(tmp_path, monkeypatch):
    small_run(tmp_path, monkeypatch, "--out", str(tmp_path / "a"))
    sample = data.sample_shapes

    def permuted(count, seed, *rest):
        objects = sample(count, seed, *rest)
        objects.labels = objects.labels.flip(0)
        return objects
    monkeypatch.setattr(data, "sample_shapes", permuted)
    small_run(tmp_path, monkeypatch, "--out", str(tmp_path / "b"))
    assert same(weights(tmp_path / "a/last.pt"), weights(tmp_path / "b/last.pt"))
    small_run(tmp_path, monkeypatch, "--out", str(tmp_path / "c"), "--labels", "truth")
    assert not same(weights(tmp_path / "a/last.pt"), weights(tmp_path / "c/last.pt"))  # the oracle does


def test_objects_without_labels_train_just_the_same(tmp_path, monkeypatch):
    small_run(tmp_path, monkeypatch, "--out", str(tmp_path / "a"))
    sample = data.sample_shapes

    def unlabelled(count, seed, *rest):
        objects = sample(count, seed, *rest)
        objects.labels = None
        return objects
    monkeypatch.setattr(data, "sample_shapes", unlabelled)
    results = small_run(tmp_path, monkeypatch, "--out", str(tmp_path / "b"))
    assert same(weights(tmp_path / "a/last.pt"), weights(tmp_path / "b/last.pt"))
    assert results["zero_shot"] is None and results["pseudo_label"]["accuracy"] is None


def test_a_folder_without_labels_trains_to_predictions_with_photographs_or_without(tmp_path, monkeypatch):
    own = write_folder(tmp_path / "own", labelled=False, test=False, count=10)
    argv = ("--dataset", str(own), "--model", "tiny", "--data-root", str(tmp_path), "--threshold", "0.4",
            "--templates", "depth")
    plain = small_run(tmp_path, monkeypatch, *argv, "--out", str(tmp_path / "plain"))
    for k in range(2):
        for i in range(10):
            write_pictures(own / f"views/train{k}{i}", "a.png", "b.jpg")
    step, seen = train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda student, teacher, views, *rest: (
        seen.append(views) or step(student, teacher, views, *rest)))
    results = small_run(tmp_path, monkeypatch, *argv, "--out", str(tmp_path / "out"))
    for name in ("weak_image", "strong_image"):  # in colour: what is trained on are the photographs
        assert all((views[name][:, 0] != views[name][:, 2]).any() for views in seen) and seen
    assert results["zero_shot"] is None and "teacher" in results and results["objects"] == 20
    rows = [line.split(",") for line in (tmp_path / "out/predictions.csv").read_text().splitlines()]
    assert rows[0][:3] == ["object", "class", "confidence"] and rows[0][-1] == "agree" and len(rows) == 21
    assert {row[1] for row in rows[1:]} <= {"mug", "night stand"} and {len(row) for row in rows} == {8}
    share = sum(row[-1] == "yes" for row in rows[1:]) / 20
    assert results["agreement"] == pytest.approx(100 * share)
    assert plain["agreement"] is not None
    again = small_run(tmp_path, monkeypatch, *argv, "--out", str(tmp_path / "again"))
    assert without_seconds(again) == without_seconds(results)  # workers or not, the same views


def test_predictions_say_who_holds_what_and_whether_they_agree(tmp_path):
    image = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3]])
    point = torch.tensor([[0.7, 0.2, 0.1], [0.9, 0.0, 0.1], [0.0, 0.4, 0.6]])
    objects = data.Objects(torch.zeros(3, 1, 3), None, ["a", "b", "c"], names=["x", "y", "z, w"])
    probs = {"image": image, "point": point, "joint": (image + point) / 2}
    agreement = evaluation.write_predictions(tmp_path / "p.csv", objects, probs)
    rows = (tmp_path / "p.csv").read_text().splitlines()
    assert rows[1:] == ["x,a,0.8000,a,0.9000,a,0.7000,yes", "y,a,0.5000,b,0.8000,a,0.9000,no",
                        '"z, w",c,0.4500,a,0.4000,c,0.6000,no'] and agreement == pytest.approx(33.33)


def test_the_cache_rival_borrows_names_from_confident_neighbours(monkeypatch):
    # Two classes; test object 2 is named wrongly, but lies beside confident objects of class 1.
    features = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), dim=-1)
    zero_shot = torch.tensor([[4.0, 0.0], [3.0, 0.0], [0.0, 4.0], [0.0, 3.0]])
    unlabelled = data.Objects(torch.zeros(4, 1, 3), None, ["a", "b"], name="train")
    asked = data.Objects(torch.zeros(3, 1, 3), None, ["a", "b"], name="test")
    test = F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.2, 0.9]]), dim=-1)
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0], [0.3, 0.0]])
    given = {"train": (zero_shot, features), "test": (logits, test)}
    monkeypatch.setattr(evaluation, "embed", lambda model, objects, views: {
        "image": given[objects.name], "point": given[objects.name]})
    probs = evaluation.predict_by_cache(tiny(), unlabelled, asked, shots=2)
    assert logits.argmax(dim=1).tolist() == [0, 1, 0]
    for m in ("image", "point", "joint"):
        assert probs[m].argmax(dim=1).tolist() == [0, 1, 1], m


def test_a_run_that_stops_and_goes_on_equals_one_that_does_not(tmp_path, monkeypatch):
    whole = small_run(tmp_path, monkeypatch, "--out", str(tmp_path / "whole"))
    real, calls = train.train_step, []

    def interrupt(*args, **kwargs):  # Ctrl-C in the middle of the second epoch
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)
    monkeypatch.setattr(train, "train_step", interrupt)
    with pytest.raises(SystemExit) as stopped:
        small_run(tmp_path, monkeypatch, "--out", str(tmp_path / "parts"))
    assert stopped.value.code == 130 and torch.load(tmp_path / "parts/last.pt",
                                                    weights_only=True)["step"] == 5
    with open(tmp_path / "parts/log.jsonl", "a") as log:
        log.write("a line a killed process left behind")
    parts = small_run(tmp_path, monkeypatch, "--out", str(tmp_path / "parts"))
    assert without_seconds(parts) == without_seconds(whole)
    for which in ("student", "teacher"):
        assert same(weights(tmp_path / "whole/last.pt", which), weights(tmp_path / "parts/last.pt", which))
    lines = [(tmp_path / name / "log.jsonl").read_text().splitlines()[1:] for name in ("whole", "parts")]
    assert lines[0] == lines[1]
    with pytest.raises(UserError, match="other options.*seed"):
        small_run(tmp_path, monkeypatch, "--out", str(tmp_path / "parts"), "--seed", "3")


def test_a_run_does_not_continue_on_other_data(tmp_path):
    flags = small_flags(tmp_path, "--epochs", 1, "--out", tmp_path / "out")
    train.main(flags)
    (tmp_path / "own/classes.txt").write_text("\n".join(["pouffe", *NAMES[1:]]))
    with pytest.raises(UserError, match="cannot continue .*last.pt: .*classes .*'bathtub'.*'pouffe'"):
        train.main(flags)
    (tmp_path / "own/train/0.npy").unlink()
    with pytest.raises(UserError, match="other options.*objects.*40 -> 39"):
        train.main(flags)


def test_a_run_killed_at_any_moment_continues_to_the_bit(tmp_path):
    """KILLS=50 kills more often. A run that gets to its end is compared and begins anew."""
    moments, kills, whole = random.Random(0), 0, tmp_path / "whole"
    command = [sys.executable, HERE / "train.py", *small_flags(tmp_path, "--epochs", 8, "--log-every", 3)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", whole], check=True, capture_output=True, env=env)
    parts, last = tmp_path / "parts", int(os.environ.get("KILLS", 3))
    while kills < last or parts.exists():
        run = subprocess.Popen([*command, "--out", parts], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env=env)
        if kills < last:
            log = parts / "log.jsonl"
            before = log.stat().st_mtime if log.exists() else 0
            while run.poll() is None and not (log.exists() and log.stat().st_mtime > before):
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 2))
            run.kill()
        code, said = run.wait(), run.stderr.read()
        assert code in (0, -signal.SIGKILL), said
        kills += code != 0
        if (parts / "last.pt").exists():
            models.read_file(parts / "last.pt", "student", "teacher", "optimizer", "log_bytes")
        if code == 0:
            for which in ("student", "teacher"):
                assert same(weights(whole / "last.pt", which), weights(parts / "last.pt", which))
            ends = [(without_seconds(json.loads((out / "results.json").read_text())),
                     (out / "log.jsonl").read_text().splitlines()[1:], (out / "predictions.csv").read_text(),
                     {path.name for path in out.iterdir()}) for out in (whole, parts)]
            assert ends[0] == ends[1]
            shutil.rmtree(parts)


def test_two_runs_do_not_write_to_one_folder(tmp_path, monkeypatch):
    with train.sole_use(tmp_path / "out"), pytest.raises(UserError, match="another process writes to .*out;"):
        small_run(tmp_path, monkeypatch)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]
    small_run(tmp_path, monkeypatch)


REFUSED = {  # options -> what the one line says
    "--modalities image --labels agree": "--labels agree needs both modalities",
    "--labels truth": "--labels truth needs labels, own has none",
    "--stage pretrain": "start.pt is a finished start; drop --stage pretrain",
    "--threshold 0.5 0.6": "--threshold takes one value; two, of images and of points, go with --labels sep",
    "--freeze visual nothing": r"no parameter begins with \['nothing'\]",
    "--freeze visual p c logit": "leaves nothing to train",
    "--batch-size 0": r"argument --batch-size: 0 is not in \[1, inf\]",
    "--lr nan": "argument --lr: nan is not in",
    "--momentum 1.5": r"argument --momentum: 1.5 is not in \[0, 1\]",
    "--cross-temperature 0": "argument --cross-temperature: 0 is not in",
    "--epochs two": "argument --epochs: invalid int value: 'two'",
    "--device abacus": "argument --device: cannot compute on 'abacus': Expected one of cpu",
    "--device mps": "argument --device: 'mps' is not supported; use cpu or cuda",
    "--templates poem": "argument --templates: invalid choice: 'poem'",
}


@pytest.mark.parametrize("asked", REFUSED)
def test_options_that_cannot_be_or_contradict_each_other_are_one_line(tmp_path, capsys, asked):
    with pytest.raises(SystemExit) as ended, evaluation.one_line_errors():
        train.main(small_flags(tmp_path, "--out", tmp_path / "out", *asked.split()))
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(said) == 1 and re.search(f"error: .*{REFUSED[asked]}", said[0]), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_names_the_batch_size_and_what_to_lower(tmp_path, monkeypatch, capsys, error):
    def fill_up(*_):
        raise error
    monkeypatch.setattr(train, "train_step", fill_up)
    with pytest.raises(SystemExit) as ended, evaluation.one_line_errors():
        small_run(tmp_path, monkeypatch)
    assert ended.value.code == 2
    assert "error: out of memory at --batch-size 16; lower it, --groups or" in capsys.readouterr().err


def test_a_run_leaves_its_results_and_eval_repeats_them(tmp_path, monkeypatch):
    results = small_run(tmp_path, monkeypatch)
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {p.name for p in out.iterdir()} == {"last.pt", "log.jsonl", "results.json", "curves.png",
                                               "predictions.csv", ".lock"}
    assert results["objects"] == 20 and results["pseudo_label"]["coverage"] > 0
    assert results["changed"] == {"points": 128, "batch_size": 16, "epochs": 2, "views": 2, "threshold": [0.12]}
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert {"options", "torch", "commit", "device", "start", "train"} <= first.keys()
    again = [evaluation.main(["--checkpoint", str(out / "last.pt")]) for _ in range(2)]
    assert again[0] == again[1]
    for which in ("student", "teacher"):
        assert {m: again[0][which][m] for m in results[which]} == results[which]


def test_eval_names_a_start_by_any_words_and_writes_all_it_knows(tmp_path, monkeypatch):
    small_run(tmp_path, monkeypatch)
    files = {name: tmp_path / name for name in ("predictions", "embeddings", "json")}
    files |= {name: tmp_path / f"{name}.png" for name in ("confusion", "gallery")}
    flags = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    start = ["--start-checkpoint", str(tmp_path / "start.pt")]
    both = evaluation.main(["--checkpoint", str(tmp_path / "out/last.pt"), *flags])
    assert {"student", "teacher"} <= both.keys()
    assert json.loads(files["json"].read_text()) == json.loads(json.dumps(both))
    kept = np.load(files["embeddings"])  # refuses pickle
    model = load_checkpoint(tmp_path / "out/last.pt")
    logits = model.logit_scale.exp().item() * kept["point"] @ kept["classifier"]
    assert np.allclose(logits, kept["point_logits"], atol=1e-4) and len(kept["labels"]) == 20
    named = [line.split(",")[5] for line in files["predictions"].read_text().splitlines()[1:]]
    assert named == [kept["class_names"][k] for k in logits.argmax(axis=1)]
    for picture in ("confusion", "gallery"):
        image = np.asarray(Image.open(files[picture]).convert("L"))
        assert min(image.shape) > 300 and image.std() > 5
    # Other words in another order: the same accuracy where all true names are among them, none where not.
    where = ["--points", "128", "--views", "2"]
    plain = evaluation.main([*start, *where])
    backwards = evaluation.main([*start, *where, "--classes", ", ".join(reversed(NAMES))])
    assert backwards["zero_shot"]["per_class"] == plain["zero_shot"]["per_class"]
    (tmp_path / "names.txt").write_text("mug\nlamp\n")
    found = evaluation.main([*start, *where, "--classes", str(tmp_path / "names.txt"), *flags[:2]])
    assert "zero_shot" not in found and {"mug", "lamp"} >= {
        line.split(",")[1] for line in files["predictions"].read_text().splitlines()[1:]}
    trained = ["--checkpoint", str(tmp_path / "out/last.pt")]
    for refused, says in (([*trained, "--classes", "mug"], "can only name the classes"),
                          ([*start, "--classes", "mug,mug"], "twice"), ([], "nothing to evaluate"),
                          ([*start, "--classes", "mug", "--confusion", "c.png"], "needs labels")):
        with pytest.raises(UserError, match=says):
            evaluation.main([*refused, *where])


@pytest.mark.parametrize("flag, gone", [("--w-fair", ["fair_image", "fair_point"]), ("--w-mim", ["mim"]),
                                        ("--w-mpm", ["mpm"]), ("--w-gl",
                                                               ["gl_image", "gl_point"]), ("--w-cross",
                                                                                           ["cross"])])
def test_a_weight_of_zero_removes_its_term(flag, gone):
    def terms(weight):
        torch.manual_seed(0)
        args = options("--batch-size", "8", flag, str(weight))
        student, teacher = tiny().train(), tiny()
        optimizer = torch.optim.AdamW(models.parameter_groups(student, 0.05, 1.0, args.freeze), lr=0.0)
        views = data.draw_views(data.sample_shapes(8, 0, points=128).points, 64)
        return train.train_step(student, teacher, views, optimizer, 0, 10, args)[0]
    whole, without = terms(0.5), terms(0)
    assert all(whole[name] > 0 for name in gone)
    assert (whole["loss"] - without["loss"]).item() == pytest.approx(0.5 * sum(whole[n] for n in gone).item(),
                                                                     abs=1e-4)


@pytest.mark.parametrize("modality, absent", [("image", "point"), ("point", "image")])
def test_a_single_modality_trains_only_itself(modality, absent):
    torch.manual_seed(0)
    args = options("--modalities", modality, "--batch-size", "8", "--threshold", "0")
    student, teacher = tiny().train(), tiny()
    optimizer = torch.optim.AdamW(models.parameter_groups(student, 0.05, 1.0, args.freeze), lr=0.0)
    views = data.draw_views(data.sample_shapes(8, 0, points=128).points, 64)
    terms, _ = train.train_step(student, teacher, views, optimizer, 2, 10, args)
    assert f"self_{modality}" in terms and f"self_{absent}" not in terms and "cross" not in terms
    idle = student.visual if absent == "image" else student.point_encoder
    assert all(parameter.grad is None for parameter in idle.parameters())


def test_a_loss_that_is_not_finite_stops_with_the_step_and_every_term(tmp_path, monkeypatch):
    small_run(tmp_path, monkeypatch)
    before = (tmp_path / "out/last.pt").read_bytes()
    monkeypatch.setattr(train, "fairness_loss", lambda logits: logits.sum() / 0)
    with pytest.raises(UserError, match="not finite at step 0: .*'self_image': [0-9].*'cross': [0-9]"):
        small_run(tmp_path, monkeypatch, "--no-resume")
    assert (tmp_path / "out/last.pt").read_bytes() == before
    real = train.train_step

    def interrupt(*args, **kwargs):  # by Ctrl-C, in the very step that spoils the weights
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)
    monkeypatch.setattr(train, "train_step", interrupt)
    with pytest.raises(UserError, match="not finite at step 0"):
        small_run(tmp_path, monkeypatch, "--no-resume")
    assert (tmp_path / "out/last.pt").read_bytes() == before


def test_bfloat16_is_for_the_networks_only():
    student, views = tiny(), data.draw_views(data.sample_shapes(8, 0, points=128).points, 64)
    names = {m: (torch.arange(8), torch.ones(8, dtype=torch.bool)) for m in ("image", "point")}

    def terms(precision):
        torch.manual_seed(0)
        return train.student_terms(student, views, names, options("--precision", precision))
    exact, fast = terms("fp32"), terms("bf16")
    assert all(term.dtype == torch.float32 for term in fast.values())
    assert all(fast[name].item() == pytest.approx(exact[name].item(), rel=0.05) for name in exact)
    assert any(fast[name] != exact[name] for name in exact)
    with train.networks_precision(options("--precision", "bf16")):
        groups = student.group(views["weak_points"])
        assert student.logits(torch.ones(1, 128)).dtype == groups.centres.dtype == torch.float32


def test_the_gain_of_bfloat16_is_a_quotient_of_two_times(monkeypatch):
    clock = [0.0]

    def linear(tokens, weight):
        assert tokens.dtype == weight.dtype
        clock[0] += 3 if tokens.dtype == torch.float32 else 2
    monkeypatch.setattr(train.F, "linear", linear)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    assert train.bfloat16_gain() == 1.5


def test_auto_is_settled_by_the_gain_once_for_a_run_and_its_continuation(tmp_path, monkeypatch, capsys):
    auto, used, real = ("--precision", "auto", "--device", "cpu"), set(), train.networks_precision

    def noted(args):
        used.add(args.precision)
        return real(args)
    monkeypatch.setattr(train, "networks_precision", noted)
    for gain, precision in ((1.29, "fp32"), (1.31, "bf16")):
        monkeypatch.setattr(train, "bfloat16_gain", lambda: gain)
        assert train.settled_precision(options(*auto, "--out", str(tmp_path / "none"))) == precision
    small_run(tmp_path, monkeypatch, *auto)
    assert used == {"bf16"} and "--precision auto: bf16, a product" in capsys.readouterr().out
    monkeypatch.setattr(train, "bfloat16_gain", lambda: 0.5)
    small_run(tmp_path, monkeypatch, *auto)  # another choice would be refused
    assert train.settled_precision(options(*auto, "--out", str(tmp_path / "out"))) == "bf16"
    assert train.settled_precision(options(*auto, "--out", str(tmp_path / "out"), "--no-resume")) == "fp32"
    with pytest.raises(UserError, match="other options.*precision.*bf16 -> fp32"):
        small_run(tmp_path, monkeypatch, "--precision", "fp32")


def test_gradient_checkpointing_changes_memory_only():
    def gradients(checkpointing):
        torch.manual_seed(0)
        student = tiny().train()
        student.visual.set_grad_checkpointing(checkpointing)
        student(torch.randn(2, 3, 64, 64), None).image_logits.square().sum().backward()
        return student.visual.conv1.weight.grad
    assert torch.equal(gradients(False), gradients(True))


def test_the_benchmark_times_a_step_and_counts_its_products(tmp_path, monkeypatch, capsys):
    found = small_run(tmp_path, monkeypatch, "--benchmark")
    assert not (tmp_path / "out").exists()
    assert min(found.values()) > 0
    assert "objects/s" in capsys.readouterr().out
    narrow = small_run(tmp_path, monkeypatch, "--benchmark", "--modalities", "point")
    assert 0 < narrow["tflop"] < found["tflop"]


def test_two_processes_equal_one(tmp_path):
    flags = small_flags(tmp_path, "--epochs", 1, "--warmup-epochs", 0, "--lr", "4e-3", "--out")
    train.main([*flags, str(tmp_path / "one")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, HERE / "train.py", *flags, tmp_path / "two"], check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    for which in ("student", "teacher"):
        one, two = (weights(tmp_path / out / "last.pt", which) for out in ("one", "two"))
        assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-4) for name in one)
    assert not same(one, weights(tmp_path / "start.pt", "model"))
    logs = [[json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()[1:]]
            for out in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        numbers = [name for name, value in one.items() if isinstance(value, (int, float, list))]
        assert {"loss", "fair_image", "cross", "named"} <= set(numbers)
        assert all(two[name] == pytest.approx(one[name], rel=1e-4) for name in numbers)


def test_one_batch_overfits():
    torch.manual_seed(0)
    args = options("--mask-ratio", "0.3")
    student = tiny().train()
    optimizer = torch.optim.AdamW(models.parameter_groups(student, 0.0, 1.0, []), lr=1e-3)
    views = data.draw_views(data.sample_shapes(10, 0, points=256).points, 64)
    labels = {m: (torch.arange(10), torch.ones(10, dtype=torch.bool)) for m in ("image", "point")}
    history = []
    for _ in range(120):
        terms = train.student_terms(student, views, labels, args)
        loss = terms["self_image"] + terms["self_point"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) / 5 < 0.3 * history[0]


def test_the_log_tells_names_given_and_how_many_rightly_class_by_class(tmp_path):
    args = options("--out", str(tmp_path))
    run = train.Run(tiny(), None, None, args, "cpu")
    truth = torch.tensor([0, 0, 1, 9])
    image = torch.tensor([0, 1, 1, 9]), torch.tensor([True, True, True, False])
    point = torch.tensor([0, 0, 1, 9]), torch.tensor([True, False, False, False])
    run.count_step({"loss": torch.tensor(2.0)}, {"image": image, "point": point}, truth)
    run.flush(1)
    row = json.loads((tmp_path / "log.jsonl").read_text())
    assert row["coverage"] == 0.5 and row["label_accuracy"] == 0.75 and row["loss"] == 2  # 4 of 8, 3 of 4
    assert row["named"] == [0.25, 0.25, *[0] * 8] and row["entropy"] == pytest.approx(math.log(2))
    assert row["label_accuracy_by_class"][:2] == [1.0, 0.5]
    run.count_step({"loss": torch.tensor(1.0)}, {"image": (truth, truth < 0)}, None)
    run.flush(1)
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1])
    assert row["coverage"] == row["entropy"] == 0 and row["label_accuracy"] is None


def test_learning_rates_decay_by_image_layer_and_the_mini_pointnet_is_frozen():
    student = tiny()
    groups = models.parameter_groups(student, 0.05, 0.65, ["point_encoder.encoder"])
    of = {id(p): (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = dict(student.named_parameters())
    assert of[id(named["visual.conv1.weight"])] == (pytest.approx(0.65 ** 5), 0.05)
    assert of[id(named["visual.transformer.resblocks.0.mlp.c_fc.weight"])] == (pytest.approx(0.65 ** 4), 0.05)
    assert of[id(named["visual.transformer.resblocks.3.mlp.c_fc.bias"])] == (pytest.approx(0.65), 0.0)
    assert of[id(named["visual.proj"])] == (1.0, 0.05) and of[id(named["classifier"])] == (1.0, 0.05)
    assert of[id(named["logit_scale"])] == (1.0, 0.05)  # 0-D: the original decays it
    assert of[id(named["point_encoder.blocks.blocks.0.attn.qkv.weight"])] == (1.0, 0.05)
    assert not any(id(p) in of for n, p in named.items() if n.startswith("point_encoder.encoder."))
    models.train_mode(student, ["point_encoder.encoder"])
    statistics = student.point_encoder.encoder.first_conv[1].running_mean.clone()
    student(*inputs())
    assert student.training and torch.equal(student.point_encoder.encoder.first_conv[1].running_mean,
                                            statistics)


def test_the_learning_rate_warms_up_and_ends_at_its_floor():
    rate = [train.learning_rate(step, 100, 10, 1.0, 0.05) for step in range(100)]
    assert rate[0] == 0 and rate[10] == 1.0 and rate[99] == pytest.approx(0.05)
    assert all(a < b for a, b in zip(rate[:10], rate[1:11])) and all(a > b
                                                                     for a, b in zip(rate[10:], rate[11:]))


def test_pretraining_is_cached_by_what_made_it(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "sample_shapes", lambda count, seed, points: data.sample_shapes(count, seed,
                                                                                               points=64))
    monkeypatch.setattr(train, "PRETRAIN", {"tiny": (64, 32, 1e-3, 0.05)})
    args = options("--cache", str(tmp_path), "--pretrain-epochs", "1", "--points", "64")
    path = train.find_start(args, None)
    written = path.stat().st_mtime_ns
    assert train.find_start(args, None) == path and path.stat().st_mtime_ns == written
    other = options("--cache", str(tmp_path), "--pretrain-epochs", "1", "--points", "64", "--seed", "1")
    assert train.find_start(other, None) != path
    model = build_model("tiny", NAMES, models.TEMPLATES["depth"], start_checkpoint=path)
    assert not model.training and model.class_names == NAMES


def test_a_point_encoder_is_aligned_to_a_frozen_clip_with_the_targets_clouds(tmp_path, monkeypatch):
    name, sample = "ViT-S-32-alt", data.sample_shapes
    monkeypatch.setattr(train, "sample_shapes", lambda count, seed, points: sample(count, seed, points=64))
    monkeypatch.setattr(train, "PRETRAIN", {"clip": (8, 4, 1e-3, 0.1)})
    args = options("--model", name, "--cache", str(tmp_path), "--pretrain-epochs", "1", "--points", "64",
                   "--groups", "8", "--group-size", "8")
    named, paired = [], []
    monkeypatch.setattr(train, "name_alignment_loss",
                        lambda *given: named.extend(given[2].tolist()) or name_alignment_loss(*given))
    monkeypatch.setattr(train, "cross_modal_alignment_loss",
                        lambda *given: paired.append(len(given[0])) or cross_modal_alignment_loss(*given))
    path = train.find_start(args, sample(12, 3, points=64))
    # Eight procedural objects with their names, and with the target's twelve clouds without.
    assert sorted(named) == list(range(8)) and sum(paired) == 20
    point = dict(groups=8, group_size=8)
    before = models.open_clip_start(name, None, args.seed, **point)[0]
    after = build_model(name, NAMES, models.TEMPLATES["depth"], None, path, args.seed, **point)
    assert same(before.visual.state_dict(), after.visual.state_dict())
    assert not torch.equal(before.pc_projection, after.pc_projection)
    assert not torch.equal(before.point_encoder.lm_head.weight, after.point_encoder.lm_head.weight)


def test_shapenet_is_read_by_its_lists_turned_upright_and_named(tmp_path):
    (tmp_path / "ShapeNet-55").mkdir()
    (tmp_path / "shapenet_pc").mkdir()
    (tmp_path / "ShapeNet-55/train.txt").write_text("03001627-a.npy\n02691156-b.npy\n")
    cloud = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32) * [1, 9, 3]  # tall along y
    for name in ("03001627-a", "02691156-b"):
        np.save(tmp_path / f"shapenet_pc/{name}.npy", cloud)
    objects = data.load_dataset("shapenet55", tmp_path, "train", points=50)
    assert objects.points.shape == (2, 50, 3) and len(objects.class_names) == 55
    assert [objects.class_names[k] for k in objects.labels] == ["chair", "airplane"]
    extent = objects.points[0].std(dim=0)
    assert extent[2] > extent[0] > extent[1]  # up is z, ShapeNet's z is x
    np.save(tmp_path / "shapenet_pc/02691156-b.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match="02691156-b.npy"):
        data.load_dataset("shapenet55", tmp_path, "train", points=50)


# ------------------------------------------------------------------------------------------------ files,
# documents

def test_a_checkpoint_of_a_stranger_runs_no_code_and_broken_ones_are_named(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    torch.save({"architecture": Evil(), "teacher": {}}, tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "evil.pt").read_bytes()[:200])
    np.save(tmp_path / "evil.npy", np.array([Evil()]), allow_pickle=True)
    with pytest.raises(UserError, match="evil.npy"):
        data.read_object(tmp_path / "evil.npy", 1)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    for name in ("evil.pt", "cut.pt", "other.pt"):
        with pytest.raises(UserError, match=name):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_checkpoint(tmp_path / "nowhere.pt")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    models.save_file({"a": 0}, tmp_path / "x.pt")
    before = (tmp_path / "x.pt").read_bytes()
    with open(tmp_path / "x.pt", "rb") as old:
        models.save_file({"a": 1}, tmp_path / "x.pt")
        assert old.read() == before  # the new one took its name, and did not overwrite it
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        models.save_file({"a": 2}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True) == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_readme_tags_deviations_and_flags_agree_with_the_code():
    readme = (HERE / "README.md").read_text()
    code = "".join((HERE / f"{name}.py").read_text() for name in ("losses", "model", "data", "eval", "train"))
    cited, rows = set(re.findall(r"Deviations? (D\d+)", code)), set(re.findall(r"^\| (D\d+) ", readme, re.M))
    assert cited and cited <= rows, cited - rows
    tags = {"image-encoder", "point-encoder", "classifier", "ema", "joint-label", "self-training", "fairness",
            "mim", "mpm",
            "gl-align", "cross-align", "pretrain"}
    assert set(re.findall(r"\[([a-z]+(?:-[a-z]+)?)\]", code)) & tags == tags
    for tag in tags:
        assert f"`{tag}`" in readme, tag
    for flag in re.findall(r'"(--[a-z-]+)"', code):
        assert flag == "--help" or f"`{flag}" in readme, flag
    for module, name in re.findall(r"`(losses|model|data|train)\.(?!py)(\w+)", readme):
        assert hasattr(sys.modules[module], name), f"{module}.{name}"


def test_readme_defaults_are_those_of_the_code():
    readme = (HERE / "README.md").read_text()
    recipe = readme.split("### The tiny recipe")[1].split("\n## ")[0]
    numbers = {float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", recipe)}
    tiny, paper = train.RECIPES["tiny"], {**train.PAPER, "threshold": 0.84}
    method = ("epochs", "batch_size", "lr", "layer_decay", "momentum", "threshold", "mask_ratio", "w_fair",
              "w_mim", "w_mpm", "w_gl", "cross_temperature")
    assert {tiny[key] for key in method} | set(train.FAR.values()) <= numbers
    assert {paper[key] for key in method[2:]} <= numbers
    rows = {"ModelNet": "modelnet40", "ScanObjectNN": "scanobjectnn-hardest", "Redwood": "redwood",
            "CO3D": "co3d", "a folder": "PATH"}
    for label, name in rows.items():
        row = data.DATASETS[name]
        cells = f"{row['threshold']:g}, {row['point_weight']:g}", row["templates"], row["up"]
        assert re.search(rf"^\| {label}" + "".join(rf".* \| {cell}" for cell in cells), readme, re.M), label


def test_a_summary_averages_seeds_and_measures_the_way_to_the_ceiling(tmp_path):
    def run(seed, joint, changed, start=50.0, **more):
        (tmp_path / "runs" / f"{seed}{len(list(tmp_path.rglob('*.json')))}").mkdir(parents=True)
        accuracy = {"image": 10.0, "point": 20.0, "joint": joint}
        row = {"dataset": "toys", "objects": 7, "seed": seed, "changed": changed, "zero_shot":
               {"image": 1.0, "point": 2.0, "joint": start}, **(more or {"teacher": accuracy})}
        out = tmp_path / "runs" / f"{seed}{len(list(tmp_path.rglob('*.json')))}"
        (out / "results.json").write_text(json.dumps(row))
    for seed, joint, ceiling in ((0, 60.0, 70.0), (1, 66.0, 90.0)):
        run(seed, joint, {})
        run(seed, ceiling, {"labels": "truth"})
    run(0, 0.0, {"stage": "cache"}, cache={"image": 3.0, "point": 4.0, "joint": 55.0})
    lines = evaluation.collect(tmp_path / "runs", tmp_path / "all.json").splitlines()
    assert lines[2:] == [
        "| zero-shot start | 1.0 ± 0.0 | 2.0 ± 0.0 | 50.0 ± 0.0 | 0 % | 50.0, 50.0 |",
        "| Cross-MoST | 10.0 ± 0.0 | 20.0 ± 0.0 | 63.0 ± 4.2 | 45 % | 60.0, 66.0 |",  # 10/20, 16/40
        "| `--labels truth` | 10.0 ± 0.0 | 20.0 ± 0.0 | 80.0 ± 14.1 | 100 % | 70.0, 90.0 |",
        "| `--stage cache` | 3.0 | 4.0 | 55.0 | 25 % | 55.0 |"]
    assert "toys, 7 objects" in lines[0] and len(json.loads((tmp_path / "all.json").read_text())) == 5
    run(0, None, {}, teacher=None)  # without labels: left out
    assert evaluation.collect(tmp_path / "runs", tmp_path / "all.json").splitlines() == lines
    run(1, 99.0, {})
    with pytest.raises(UserError, match="results.json has the options and seed of another run there; move"):
        evaluation.collect(tmp_path / "runs", tmp_path / "all.json")
    other = tmp_path / "broken/x/results.json"
    other.parent.mkdir(parents=True)
    for broken in ("{", "[1]", '{"teacher": 1}'):
        other.write_text(broken)
        with pytest.raises(UserError, match="x/results.json is no results.json of train.py"):
            evaluation.collect(tmp_path / "broken", tmp_path / "all.json")


def test_the_results_tables_are_those_of_the_recorded_runs():
    for name in ("results", "ablations"):
        runs = json.loads((HERE / f"assets/{name}.json").read_text())
        assert evaluation.summary(runs) in (HERE / "README.md").read_text()


def test_the_readme_s_diff_applies():
    diff = (HERE / "README.md").read_text().split("```diff\n")[1].split("```")[0].splitlines()
    code = (HERE / "train.py").read_text()
    for line in diff:
        assert line[0] == "+" or code.count(line[1:] + "\n") == 1, line
    after = code.replace(diff[0][1:] + "\n", "\n".join(line[1:] for line in diff[:3]) + "\n")
    after = after.replace(diff[4][1:], diff[5][1:])
    compile(after, "train.py", "exec")


def test_line_budgets_hold():
    budget = {"losses": 200, "model": 670, "data": 1430, "eval": 525, "train": 660,
              "test_crossmost": 1930}
    for name, lines in budget.items():
        text = (HERE / f"{name}.py").read_text().splitlines()
        assert len(text) <= lines and max(map(len, text)) <= 110, name
