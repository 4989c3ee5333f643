"""Properties of the method and of the run. CPU, no network, no weights; a few minutes on two cores."""
import argparse
import hashlib
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
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import eval as evaluation
import model as models
import train
from data import UserError
from losses import (cross_modal_alignment_loss, fairness_loss, global_local_alignment_loss,
                    joint_pseudo_labels, masked_image_loss, masked_point_loss, name_alignment_loss,
                    pseudo_labels, self_training_loss)
from model import (CrossMoST, build_model, farthest_point_sample, group_points, hide_groups, hide_patches,
                   load_checkpoint, update_teacher)

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "shared" / "golden"
MODELNET = HERE.parent / "shared" / "data" / "modelnet40_ply_hdf5_2048"
NAMES = list(data.MODELNET10)
# Long along x, shorter along y, thin along z, denser towards the origin: no two axes, no two ends are alike.
LEANING = (np.random.default_rng(0).random((500, 3)) ** [1, 2, 3] * [4, 2, 1]).astype(np.float32)


def tiny(seed=0, **point) -> CrossMoST:
    """An untrained model of the real kind; without BatchNorm statistics worth the name, so in eval mode."""
    return build_model("tiny", NAMES, models.TEMPLATES["depth"], seed=seed, **point)


def inputs(batch=4, points=128):
    torch.manual_seed(0)
    return torch.randn(batch, 3, 64, 64), data.to_unit_sphere(torch.randn(batch, points, 3))


def options(*argv):
    return train.parse_args(["--dataset", "shapes", *argv])


def views_and_labels(count=8, points=128):
    """Training views of some objects, and their classes as pseudo-labels that are all kept."""
    views = data.draw_views(data.sample_shapes(count, 0, points=points).points, 64)
    labels = torch.arange(count) % 10, torch.ones(count, dtype=torch.bool)
    return views, {"image": labels, "point": labels}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------ pseudo-labels, losses

def test_the_more_confident_modality_names_the_object_and_a_tie_takes_one_of_the_two():
    image = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    point = torch.tensor([[0.2, 0.8], [0.95, 0.05]])
    labels, keep = joint_pseudo_labels(image, point, 0.84)
    assert labels.tolist() == [0, 0] and keep.tolist() == [True, True]
    labels, keep = joint_pseudo_labels(image, point, 0.84, point_weight=0.6)  # 0.95 * 0.6 < 0.6: the image
    assert labels.tolist() == [0, 1] and keep.tolist() == [True, False]
    two, three = F.one_hot(torch.tensor([[2], [3]]), 8).float()
    assert joint_pseudo_labels(three, two, 0.5)[0].item() in (2, 3)  # not their sum
    with pytest.raises(ValueError, match="need equal"):
        joint_pseudo_labels(image, point[:1], 0.5)


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
    separate = pseudo_labels("separate", image, point, (0.84, 0.94))
    assert separate["image"][0].tolist() == [0, 0] and separate["image"][1].tolist() == [True, False]
    assert separate["point"][0].tolist() == [1, 0] and separate["point"][1].tolist() == [False, True]
    alone = pseudo_labels("separate", None, point, (0.0, 0.9))
    assert alone.keys() == {"point"} and alone["point"][1].tolist() == [False, True]
    truth = torch.tensor([2, 1])
    for labels, keep in pseudo_labels("truth", None, None, (1, 1), truth=truth).values():
        assert torch.equal(labels, truth) and keep.all()
    assert pseudo_labels("agree", image, point, (0.5, 0.5))["image"][1].tolist() == [False, True]
    labels, keep = pseudo_labels("mean", image, point, (0.6, 0.6))["point"]
    assert labels.tolist() == [0, 0] and keep.tolist() == [False, True]
    with pytest.raises(ValueError, match="unknown rule"):
        pseudo_labels("guess", image, point, (0.5, 0.5))


def test_only_kept_objects_count_and_none_kept_costs_zero_with_zero_gradient():
    keep = torch.tensor([True, True, False])
    loss = self_training_loss(torch.zeros(3, 40), torch.tensor([0, 5, 39]), keep)
    assert loss.item() == pytest.approx(math.log(40))
    logits, labels = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    kept = F.cross_entropy(logits[:2], labels[:2])
    assert torch.allclose(self_training_loss(logits, labels, keep), kept)
    loss = self_training_loss(logits, labels, keep & False)
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


def test_masked_losses_see_hidden_content_only_and_the_target_carries_no_gradient():
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
    prediction, target = torch.randn(2, 2, 16, 6, requires_grad=True).unbind(0)
    target.retain_grad()
    masked_point_loss(prediction, target, hidden).backward()
    assert target.grad is None


def test_a_name_many_objects_bear_is_no_negative_of_itself():
    names, labels = torch.eye(3), torch.tensor([0, 0, 1, 2])
    features, cost = F.normalize(torch.randn(4, 3), dim=-1), 0
    similar = (2 * features @ names.T).tolist()
    for row, k in zip(similar, labels.tolist()):  # object to names, then its name to all objects
        cost += math.log(sum(map(math.exp, row))) - row[k]
        cost += math.log(sum(math.exp(other[k]) for other in similar)) - row[k]
    loss = name_alignment_loss(features, names, labels, torch.tensor(2.0)).item()
    assert loss == pytest.approx(cost / 8, abs=1e-5)


# --------------------------------------------------------------------------------------------- groups, masks

def test_farthest_points_and_neighbours_equal_brute_force_and_follow_a_translation():
    points = torch.randn(2, 60, 3)
    for cloud, chosen in zip(points, farthest_point_sample(points, 12)):
        expected = [0]
        while len(expected) < 12:
            nearest = (cloud[:, None] - cloud[expected]).square().sum(dim=-1).amin(dim=1)
            expected.append(nearest.argmax().item())
        assert chosen.tolist() == expected and len(set(expected)) == 12
    near, centres = group_points(points, 12, 5)
    distances = torch.cdist(centres, points).sort(dim=-1).values[..., :5]
    assert torch.allclose(near.norm(dim=-1).sort(dim=-1).values, distances, atol=1e-5)
    moved, moved_centres = group_points(points + 3, 12, 5)
    assert torch.allclose(near, moved, atol=1e-5) and torch.allclose(centres + 3, moved_centres, atol=1e-5)
    for sizes, flag in (((61, 6), "--groups"), ((6, 61), "--group-size")):
        with pytest.raises(UserError, match=flag):
            group_points(points, *sizes)


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


# ----------------------------------------------------------------------------------------- encoders, teacher

@pytest.mark.parametrize("quick_gelu, theirs, ours", [
    (False, {}, {}), (True, {}, {}),
    (False, dict(no_ln_pre=True, norm_kwargs=dict(eps=1e-6)), dict(ln_pre=False, eps=1e-6))])  # SLIP's
def test_with_nothing_hidden_the_image_encoder_is_open_clips(quick_gelu, theirs, ours):
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(image_size=32, patch_size=8, width=64, layers=2, head_width=32, **theirs)
    text = open_clip.CLIPTextCfg(width=32, heads=2, layers=1, vocab_size=100)
    clip = open_clip.CLIP(24, vision, text, quick_gelu=quick_gelu).eval()
    encoder = models.ImageEncoder(24, 32, 8, 64, 2, 2, quick_gelu=quick_gelu, **ours).eval()
    assert not encoder.load_state_dict(clip.visual.state_dict(), strict=False).unexpected_keys
    images, nothing = torch.randn(3, 3, 32, 32), torch.zeros(3, 16, dtype=torch.bool)
    for hidden in (None, nothing):
        assert torch.equal(encoder(images, hidden)[0], clip.encode_image(images))


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


def test_points_have_no_order_and_views_of_an_object_average_their_logits():
    model = tiny()
    images, points = inputs()
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(127)])  # 0 starts the sampling
    features = model(None, points).point_features
    assert torch.allclose(features, model(None, points[:, order]).point_features, atol=1e-5)
    stacked = torch.stack([images, images.flip(-1)], dim=1)
    expected = (model(images, None).image_logits + model(images.flip(-1), None).image_logits) / 2
    assert torch.allclose(model(stacked, None).image_logits, expected, atol=1e-4)


def test_the_classifier_holds_unit_columns_in_class_order_and_is_missed_by_name():
    model = tiny()
    assert torch.allclose(model.classifier.norm(dim=0), torch.ones(10), atol=1e-5)
    model.set_classifier(torch.randn(3, 128), ["a", "b", "c"])
    assert model.class_names == ["a", "b", "c"] and model(*inputs()).point_logits.shape == (4, 3)
    out = CrossMoST(models.TINY["embed_dim"], models.TINY["image"], models.TINY["point"])(*inputs())
    assert out.image_features.shape == (4, 128)
    with pytest.raises(AttributeError, match="set_classifier"):
        out.image_logits


@pytest.mark.parametrize("target", ["tokens", "points"])
def test_every_trainable_parameter_gets_a_finite_gradient_that_is_not_zero(target):
    args, student = options("--mask-ratio", "0.3"), tiny(target=target).train()
    models.parameter_groups(student, 0.05, 1.0, args.freeze)
    torch.manual_seed(0)
    sum(train.student_terms(student, *views_and_labels(16, 256), args).values()).backward()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name


def test_the_teacher_is_a_moving_average_with_copied_buffers():
    teacher, student = tiny(0), tiny(1)
    before = {k: v.clone() for k, v in teacher.named_parameters()}
    student.point_encoder.encoder.first_conv[1].running_mean += 3
    update_teacher(teacher, student, 1.0)
    assert same(before, dict(teacher.named_parameters()))
    assert same(dict(teacher.named_buffers()), dict(student.named_buffers()))
    update_teacher(teacher, student, 0.75)
    after, theirs = teacher.visual.conv1.weight, student.visual.conv1.weight
    assert torch.allclose(after, 0.75 * before["visual.conv1.weight"] + 0.25 * theirs, atol=1e-6)
    update_teacher(teacher, student, 0.0)
    assert all(torch.allclose(a, b) for a, b in zip(teacher.parameters(), student.parameters()))
    momenta = [models.teacher_momentum(step, 0.9998) for step in (0, 200, 400, 9999)]
    assert momenta == pytest.approx([0.99, 0.9949, 0.9998, 0.9998])


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs the reference outputs of the original code")
def test_the_encoders_and_losses_compute_what_the_original_code_computes():
    golden = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "official_tiny.npz").items()}
    image_hidden, point_hidden = golden["image_hidden"], golden["point_hidden"]
    model = load_checkpoint(GOLDEN / "official_tiny.pt", 16, 8, point_heads=3)
    model.set_classifier(torch.ones(7, 24))
    model.classifier.data = golden["classifier"]
    groups = group_points(golden["points"], 16, 8)  # these points are in the network's own axes
    out = model(golden["images"], groups)
    masked = model(golden["images"], groups, image_hidden, point_hidden)
    assert torch.equal(groups.centres, golden["group_centres"])
    image_aligned = global_local_alignment_loss(masked.image_features, masked.image_tokens, image_hidden)
    point_aligned = global_local_alignment_loss(masked.point_cls, masked.point_tokens, point_hidden)
    painted = masked_image_loss(masked.image_pixels, golden["images"], image_hidden)
    computed = {
        "image_patch_tokens_masked": model.visual.ln_patch(model.visual(golden["images"], image_hidden)[1]),
        "point_features": model.point_encoder(groups)[0],
        "point_features_masked": model.point_encoder(groups, point_hidden)[0],
        "group_tokens": masked.point_target,
        "image_logits": out.image_logits, "point_logits": out.point_logits,
        "image_logits_masked": masked.image_logits, "point_logits_masked": masked.point_logits,
        "loss_gl_align_image": image_aligned, "loss_gl_align_point": point_aligned,
        "loss_fair_image": fairness_loss(masked.image_logits),
        "loss_fair_point": fairness_loss(masked.point_logits),
        "loss_cross_align_no_temperature":
            cross_modal_alignment_loss(masked.image_features, masked.point_features),
        "loss_mim_original": painted * 3 / 17}  # D3: it divides by its 17 tokens where there are 3 channels
    for name, value in computed.items():
        assert (value - golden[name]).abs().max() <= 1e-5 * golden[name].abs().max(), name
    # D1, D2: with the mask token as target, summed over channels, divided by the batch, it is the original's
    target = model.point_encoder.mask_token.expand_as(masked.point_prediction)
    ours = masked_point_loss(masked.point_prediction, target, point_hidden)
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


# ---------------------------------------------------------------------------------------------------- starts

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
                "args": argparse.Namespace(lr=1), "best_acc1": np.float64(60.3), "kinds": [np.dtype("f4")]}, path)
    return image, text, state


def test_a_ulip_file_is_a_complete_start(tmp_path):
    image, text, state = write_ulip(tmp_path / "ulip.pt")
    ours, our_text = models.load_start(tmp_path / "ulip.pt", groups=16, group_size=8)
    images, points = torch.randn(3, 3, 32, 32), inputs()[1]
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
    assert torch.equal(ours.group(points).centres, group_points(points[..., [1, 2, 0]], 16, 8).centres)
    model = build_model("ulip1", NAMES, models.TEMPLATES["points"], None, tmp_path / "ulip.pt", groups=16,
                        group_size=8)
    assert model.architecture["mean"] == list(open_clip.constants.IMAGENET_MEAN)
    assert model(images, points[:3]).point_logits.shape == (3, 10)


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numbers_of_numpy_1_and_2_in_a_published_file_are_read(tmp_path, module):
    write_ulip(tmp_path / "ulip.pt")
    with zipfile.ZipFile(tmp_path / "ulip.pt") as file:
        members = {name: file.read(name) for name in file.namelist()}
    members["ulip/data.pkl"] = re.sub(rb"numpy\.\w+\.multiarray", module, members["ulip/data.pkl"])
    content = models.read_file(write_zip(tmp_path / "either.pt", members))
    assert content["best_acc1"] == 60.3 and content["args"].lr == 1 and content["kinds"] == [np.float32]


def test_a_checkpoint_of_a_stranger_runs_no_code_and_broken_ones_are_named(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    torch.save({"architecture": Evil(), "teacher": {}}, tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "evil.pt").read_bytes()[:200])
    torch.save({"weights": 1}, tmp_path / "other.pt")
    np.save(tmp_path / "evil.npy", np.array([Evil()]), allow_pickle=True)
    for name in ("evil.pt", "cut.pt", "other.pt", "evil.npy"):
        with pytest.raises(UserError, match=name):
            data.read_object(tmp_path / name, 1) if "npy" in name else load_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_checkpoint(tmp_path / "nowhere.pt")


def test_the_cross_most_start_and_its_trained_checkpoint_load(tmp_path):
    image = dict(image_size=32, patch_size=8, width=64, layers=2, heads=1, quick_gelu=True)
    model = randomise(CrossMoST(32, image, dict(width=64, layers=3, heads=1, token_width=32)))
    state = {**model.state_dict()}
    state["image_projection"] = state.pop("visual.proj")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "start.pt")
    start = load_checkpoint(tmp_path / "start.pt", 16, 8)
    assert same(start.state_dict(), model.state_dict()) and start.classifier is None
    for classes in (7, 10):
        state["classifier"] = torch.randn(32, classes)
        student = {**state, "logit_scale": torch.tensor(9.0)}
        torch.save({"model": student, "model_ema": state}, tmp_path / f"{classes}.pth")
    trained = load_checkpoint(tmp_path / "7.pth", 16, 8)
    assert len(trained.class_names) == 7 and trained.logit_scale == state["logit_scale"] != 9
    assert load_checkpoint(tmp_path / "7.pth", 16, 8, which="student").logit_scale == 9
    assert trained(inputs()[0][..., :32, :32], None).image_logits.shape == (4, 7)
    argv = ["--points", "128", "--views", "1", "--checkpoint"]
    with pytest.raises(UserError, match="evaluate it on the data set"):
        evaluation.main([*argv, str(tmp_path / "7.pth")])
    found = evaluation.main([*argv, str(tmp_path / "10.pth")])  # it has numbers for names
    assert set(found["teacher"]["per_class"]) == set(NAMES)


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
    groups = model.group(inputs()[1])
    coloured = torch.cat([groups.neighbourhoods, torch.full_like(groups.neighbourhoods, 0.4)], dim=-1)
    tokens = model.point_encoder.reduce_dim(model.point_encoder.encoder(coloured))
    assert torch.allclose(model.point_encoder(groups)[2], tokens, atol=1e-5)


@pytest.mark.parametrize("name, pretrained, says", [
    ("nonsense", None, "unknown model"), ("ulip2", None, "start-checkpoint"),
    ("RN50", None, "no plain vision transformer"), ("ViT-B-16", "openai", "use ViT-B-16-quickgelu"),
    ("tiny", "openai", "use --start-checkpoint"), ("ViT-S-32-alt", "/nowhere.pt", "--pretrained FILE")])
def test_a_start_that_cannot_be_is_refused(name, pretrained, says):
    with pytest.raises(UserError, match=says):
        build_model(name, NAMES, models.TEMPLATES["3d"], pretrained)


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


def test_learning_rates_decay_by_image_layer_and_the_mini_pointnet_is_frozen():
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
        decay = 0 if parameter.ndim == 1 else 0.05  # logit_scale is 0-D: the original decays it
        assert of[id(parameter)] == (pytest.approx(0.65 ** (13 - layer)), decay), name
    student = tiny()
    models.train_mode(student, ["point_encoder.encoder"])
    statistics = student.point_encoder.encoder.first_conv[1].running_mean
    before = statistics.clone()
    student(*inputs())
    assert student.training and torch.equal(statistics, before)


@pytest.mark.parametrize("name, threshold, apart, point_weight", [
    ("modelnet10", 0.84, [0.84, 0.84], 0.9), ("modelnet40", 0.84, [0.8, 0.82], 0.9),
    ("modelnet40-depth", 0.84, [0.84, 0.84], 0.9), ("co3d", 0.84, [0.8, 0.82], 0.9),
    ("redwood", 0.82, [0.82, 0.82], 1), ("scanobjectnn-obj-only", 0.82, [0.8, 0.82], 1),
    ("scanobjectnn-with-bg", 0.82, [0.6, 0.6], 1), ("scanobjectnn-hardest", 0.82, [0.6, 0.6], 1)])
def test_the_defaults_are_the_original_s(name, threshold, apart, point_weight):
    args = train.parse_args(["--dataset", name])
    assert (args.threshold, args.point_weight, args.model) == ([threshold], point_weight, "ulip2")
    assert train.parse_args(["--dataset", name, "--labels", "separate"]).threshold == apart
    method = (args.lr, args.layer_decay, args.weight_decay, args.momentum, args.mask_ratio, args.w_fair,
              args.w_mim, args.w_mpm, args.w_gl, args.w_cross, args.cross_temperature, args.warmup_epochs)
    assert method == (2e-5, 0.65, 0.05, 0.9998, 0.3, 1, 1, 1, 0.2, 1, 1, 1)
    assert args.epochs == (150 if name == "co3d" else 200) and (args.batch_size == 64) == (name == "redwood")
    assert (args.groups, args.group_size) == (512, 32)


# -------------------------------------------------------------------------------------------------- fetching

CONTENT = bytes(range(256)) * 400


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Of a folder that holds the files `good` and `wrong`; the hub is out of reach."""
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "good").write_bytes(CONTENT)
    (folder / "wrong").write_bytes(CONTENT[1:])
    use_hub(monkeypatch, None)
    return folder.as_uri()


def use_hub(monkeypatch, content):
    """A hub that gives `content` for any file, or is out of reach; returns the list of what it is asked."""
    asked = []

    def hf_hub_download(data_set, file, repo_type, revision, local_dir):
        asked.append((data_set, file, repo_type, revision))
        if content is None:
            raise OSError("no hub here")
        path = Path(local_dir) / file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        return str(path)
    monkeypatch.setattr(data, "hf_hub_download", hf_hub_download)
    return asked


def test_a_file_comes_from_the_hub_first_and_from_a_plain_address_second(tmp_path, monkeypatch, address):
    sha256, hub, to = hashlib.sha256(CONTENT).hexdigest(), ("a/b", "c/file.bin", "main"), tmp_path / "to"
    data.fetch(to / "plain.bin", [f"{address}/gone", f"{address}/good"], sha256, hub)
    asked = use_hub(monkeypatch, CONTENT)
    for _ in range(2):  # the second time it is there: nothing is asked
        data.fetch(to / "hub.bin", [f"{address}/gone"], sha256, hub)
    assert asked == [("a/b", "c/file.bin", "dataset", "main")]
    use_hub(monkeypatch, b"other")
    data.fetch(to / "wrong.bin", [f"{address}/good"], sha256, hub)
    assert {path.read_bytes() for path in to.glob("*.bin")} == {CONTENT}
    assert {path.suffix for path in to.iterdir()} == {".bin", ".lock"}


def test_what_cannot_be_fetched_leaves_nothing_and_names_its_place(tmp_path, monkeypatch, address):
    monkeypatch.setitem(data.DOWNLOADS, "toy", dict(
        file="to/toy.bin", hub=("a/b", "toy.bin", None), terms="free", sha256="0" * 64,
        urls=[f"{address}/gone", f"{address}/wrong"]))
    with pytest.raises(UserError, match=f"no hub.*gone.*invalid hash.*put it at {tmp_path}/to/toy.bin$"):
        data.fetch_published("toy", tmp_path)
    assert [path.name for path in (tmp_path / "to").iterdir()] == [".toy.bin.lock"]
    with pytest.raises(UserError, match="toy.bin is missing; put it there"):
        data.fetch_published("toy", tmp_path, allowed=False)


def test_a_file_that_two_want_is_fetched_once(tmp_path, monkeypatch, address):
    real, asked = torch.hub.download_url_to_file, []
    monkeypatch.setattr(torch.hub, "download_url_to_file",
                        lambda *given, **more: asked.append(time.sleep(0.1)) or real(*given, **more))
    both = [threading.Thread(target=data.fetch, args=(tmp_path / "a", [f"{address}/good"])) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(asked) == 1 and (tmp_path / "a").read_bytes() == CONTENT


def test_an_archive_is_unpacked_inside_its_folder_and_whole_or_not_at_all(tmp_path, monkeypatch):
    root = tmp_path / "root"
    folder = root / "set"
    odd = write_zip(tmp_path / "odd.zip", {"set/a.txt": "1", "../out.txt": "2", "set/../../out.txt": "3"})
    broken = tmp_path / "broken.zip"
    broken.write_bytes(odd.read_bytes()[:60])
    for archive, members in ((broken, None), (odd, {"set/a.txt": "0" * 64})):
        with pytest.raises(UserError, match=f"cannot unpack .*{archive.name}"):
            data.unpack([archive], folder, members=members)
    with pytest.raises(UserError, match="disk"), monkeypatch.context() as patch:
        patch.setattr(data.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        data.unpack([odd], folder)
    assert not folder.exists() and not list(tmp_path.rglob("*.txt"))
    (root / ".set.part").mkdir()  # left by a killed process
    (root / ".set.part/half.txt").write_text("1")
    data.unpack([odd], folder)
    assert (folder / "a.txt").read_text() == "1" and not list(tmp_path.rglob("half.txt"))
    assert all(folder in path.parents for path in tmp_path.rglob("*.txt"))
    data.unpack([broken], folder)  # it is there: nothing is unpacked
    data.unpack([odd], root / "some", lambda names: names[:1])
    assert [path.name for path in (root / "some").rglob("*.txt")] == ["a.txt"]


