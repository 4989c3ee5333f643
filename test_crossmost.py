"""What a fork can break: the method and the run. CPU, no network, no weights; two and a half minutes."""
import argparse
import copy
import csv
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image
from pytest import approx
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import eval as evaluation
import model as models
import train
from losses import (RULES, cross_modal_alignment_loss, fairness_loss, global_local_alignment_loss,
                    joint_pseudo_labels, masked_image_loss, masked_point_loss, masked_terms,
                    name_alignment_loss, pseudo_labels, self_training_loss)
from model import (CrossMoST, build_model, farthest_point_sample, group_points, hide_groups,
                   hide_patches, load_checkpoint, update_teacher)
from support import UserError, command_line, parallel, provenance, resume, starts
from support.results import what_is_known
from tools import pretrain

# Two processes of one thread each run the tests faster than one process of two threads.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "shared" / "golden"
MODELNET = HERE.parent / "shared" / "data" / "modelnet40_ply_hdf5_2048"
README = (HERE / "README.md").read_text(encoding="utf-8")
NAMES = list(data.MODELNET10)
DEPTH = models.TEMPLATES["depth"]
TINY_START = starts.start_file("tiny", None)
# Long along x, shorter along y, thin along z, denser towards the origin: no two axes, no two ends are alike.
LEANING = (np.random.default_rng(0).random((500, 3)) ** [1, 2, 3] * [4, 2, 1]).astype(np.float32)
CLOUD = data.to_unit_sphere(torch.from_numpy(LEANING[None, :64]))

parametrize = pytest.mark.parametrize
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="needs the original code's outputs")


# ------ small objects, models and runs ----------------------------------------------------------------------
def tiny(seed=0, **point) -> CrossMoST:
    """An untrained model of the real kind, in eval mode: its BatchNorm statistics are worth nothing."""
    return build_model("tiny", NAMES, DEPTH, seed=seed, **point)


def shipped(names=NAMES) -> CrossMoST:
    """The small start that is in the repository."""
    return build_model("tiny", names, DEPTH, start_checkpoint=TINY_START)


def inputs(batch=4, points=128):
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 64, 64)
    return images, data.to_unit_sphere(torch.randn(batch, points, 3))


def one_hidden(tokens):
    """Of each of four objects token 5 is hidden. Of 16 patches these are the pixels 16..31."""
    return torch.arange(tokens).expand(4, -1) == 5


def options(*argv):
    return train.parse_args(["--dataset", "shapes", *argv])


def views_and_labels(count=8, points=128):
    """Training views of some objects, and their classes as pseudo-labels that are all kept."""
    views = data.draw_views(data.sample_shapes(count, 0, points=points).points, 64)
    labels = torch.arange(count) % 10, torch.ones(count, dtype=torch.bool)
    return views, {"image": labels, "point": labels}


def write_own(folder, labelled=True) -> Path:
    """A folder of objects of one's own, 128 points each, in folders of their classes or without."""
    for split, count, seed in (("train", 48, 1), ("test", 20, 2)):
        objects = data.sample_shapes(count, seed, points=128)
        for i, label in enumerate(objects.labels):
            name = NAMES[label].replace(" ", "_") if labelled else ""
            inside = folder / split / name
            inside.mkdir(parents=True, exist_ok=True)
            np.save(inside / f"{split}{i}.npy", objects.points[i])
    (folder / "classes.txt").write_text("\n".join(NAMES).replace(" ", "_"))
    return folder


def write_pictures(folder, *names, size=(40, 30)):
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        Image.new("RGB", size, (20 * k % 256, 100, 200)).save(folder / name)


def small_flags(folder, *more) -> list[str]:
    """Options of a run of seconds into folder/out. Objects and start are made if they are not in `folder`."""
    own, start = folder / "own", folder / "start.pt"
    if not start.exists():
        write_own(own)
        small = models.load_start(TINY_START, groups=8, group_size=8)
        starts.save_start(*small, {}, start)
    flags = ["--dataset", own, "--data-root", folder, "--points", 128, "--views", 2, "--device", "cpu"]
    flags += ["--start-checkpoint", start, "--batch-size", 16, "--epochs", 2, "--threshold", 0.12]
    flags += ["--w-fair", 2, "--labels", "joint", "--up", "z", "--out", folder / "out"]
    return [*map(str, [*flags, *more])]


def small_run(folder, *more) -> dict:
    """What main() returns of a run of seconds. Curves take a third of it: only `finished` has some."""
    with patch.object(train, "plot_curves", lambda *_: b""):
        return train.main(small_flags(folder, *more))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of one finished small run, for tests that only read it, and what main() returned.

    Its paths were relative. Whoever reads it does so from another folder.
    """
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        return folder, train.main(small_flags(Path()))


@pytest.fixture(scope="session")
def photographed(tmp_path_factory):
    """The same as `finished`, of objects that have photographs. Few to test: they are seen one by one."""
    folder = tmp_path_factory.mktemp("photographed")
    small_flags(folder)
    for file in sorted((folder / "own/test").rglob("*.npy"))[6:]:
        file.unlink()
    for file in (folder / "own").rglob("*.npy"):
        write_pictures(folder / "own/views" / file.stem, "a.png", "b.jpg")
    return folder, small_run(folder)


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory):
    """The name of an open_clip model: ViT-S-32-alt with two layers, which takes a quarter of its time."""
    config = open_clip.get_model_config("ViT-S-32-alt")
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 2
    file = tmp_path_factory.mktemp("clip") / "ViT-two-layers.json"
    file.write_text(json.dumps(config))
    open_clip.add_model_config(file)
    return file.stem


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
             if not key.startswith(("mask_token", "proj", "lm_head"))}
    state |= {"pc_projection": torch.randn(128, embed), "logit_scale": torch.tensor(3.0)}
    if towers:
        state |= {f"visual.{key}": value for key, value in image.state_dict().items()}
        state |= {"image_projection": torch.randn(128, embed), **text.state_dict()}
    also = {"args": argparse.Namespace(lr=1), "best_acc1": np.float64(60.3), "kinds": [np.dtype("f4")]}
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, **also}, path)
    return image, text, state


# ------ what tests ask --------------------------------------------------------------------------------------
def assert_refused(says, action, *given, **more) -> str:
    """`action` ends in an error that a script shows as one line, and that says so."""
    with pytest.raises((UserError, OSError), match=says) as refused:
        action(*given, **more)
    return str(refused.value)


def rows_of(path) -> list[dict]:
    """The lines of a CSV file, or those of a log."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [*csv.DictReader(lines)] if path.suffix == ".csv" else [*map(json.loads, lines)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_near(computed, golden):
    """Each is, within 1e-5 of its largest number, what the original code computed."""
    for name, value in computed.items():
        expected = torch.as_tensor(golden[name])
        assert (value - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def weights(out, which="student"):
    return torch.load(out / "last.pt", map_location="cpu", weights_only=True)[which]


def outcome(out):
    """All that a run leaves but for durations and the log's first line, to compare two."""
    results = json.loads((out / "results.json").read_text())
    _, *rows = rows_of(out / "log.jsonl")
    for timed in (results, *rows):
        timed.pop("seconds", None)
        timed.pop("objects_per_second", None)
    return results, rows, rows_of(out / "predictions.csv"), {path.name for path in out.iterdir()}


def assert_equal(a, b):
    assert outcome(a) == outcome(b)
    for which in ("student", "teacher"):
        assert same(weights(a, which), weights(b, which))


# ------ pseudo-labels, losses, groups, masks ----------------------------------------------------------------
def test_the_surer_modality_names_an_object_and_a_tie_takes_one_of_the_two():
    image = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    point = torch.tensor([[0.2, 0.8], [0.95, 0.05]])
    # 0.95 * 0.6 < 0.6
    for weight, named, kept in ((1.0, [0, 0], [True, True]), (0.6, [0, 1], [True, False])):
        labels, keep = joint_pseudo_labels(image, point, 0.84, weight)
        assert labels.tolist() == named and keep.tolist() == kept
    two, three = F.one_hot(torch.tensor([[2], [3]]), 8).float()
    assert joint_pseudo_labels(three, two, 0.5)[0].item() in (2, 3)  # not their sum
    # A higher threshold only removes objects, and labels follow the order of the batch.
    image, point = torch.rand(2, 50, 6).softmax(-1)
    labels, low = joint_pseudo_labels(image, point, 0.2)
    high = joint_pseudo_labels(image, point, 0.22)[1]
    assert not (high & ~low).any() and high.sum() < low.sum()
    order = torch.randperm(50)
    assert torch.equal(joint_pseudo_labels(image[order], point[order], 0.2)[0], labels[order])


@parametrize("rule, modalities, thresholds, expected", [  # of each modality its labels, and which are kept
    ("separate", "image point", [0.84, 0.94], [([0, 0], [1, 0]), ([1, 0], [0, 1])]),
    ("mean", "image point", [0.6], 2 * [([0, 0], [0, 1])]),
    ("agree", "image point", [0.5], 2 * [([0, 0], [0, 1])]),
    ("joint", "image point", [0.91], 2 * [([0, 0], [0, 1])]),
    ("joint", "image", [0.84, 0.9], [([0, 0], [1, 0])]),
    ("joint", "point", [0.84, 0.9], [([1, 0], [0, 1])])])
def test_every_label_rule_does_what_its_name_says(rule, modalities, thresholds, expected):
    probs = {"image": torch.tensor([[0.90, 0.08, 0.02], [0.70, 0.20, 0.10]]),
             "point": torch.tensor([[0.10, 0.85, 0.05], [0.95, 0.03, 0.02]])}
    probs = {modality: probs[modality] for modality in modalities.split()}
    given = pseudo_labels(rule, probs, thresholds)
    assert given.keys() == probs.keys()
    assert [(labels.tolist(), keep.tolist()) for labels, keep in given.values()] == expected


def test_a_rule_without_a_branch_is_an_error_and_not_joint():
    probs = {"image": torch.eye(2), "point": torch.eye(2)}
    with pytest.raises(ValueError, match="mine has no branch"):
        pseudo_labels("mine", probs, [0.5])


def test_self_training_counts_kept_objects_only_and_by_their_weight():
    keep = torch.tensor([True, True, False])
    loss = self_training_loss(torch.zeros(3, 40), torch.tensor([0, 5, 39]), keep)
    assert loss.item() == approx(math.log(40))
    logits, labels = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    costs = F.cross_entropy(logits, labels, reduction="none")
    for chosen, expected in ((keep, costs[:2].mean()),
                             (torch.tensor([0.5, 1, 0]), (0.5 * costs[0] + costs[1]) / 1.5)):
        assert torch.allclose(self_training_loss(logits, labels, chosen), expected)
    nothing = self_training_loss(logits, labels, keep & False)
    nothing.backward()
    assert nothing.item() == 0 and logits.grad.abs().max() == 0


def test_fairness_is_least_where_the_mean_has_the_expected_shares():
    fair = fairness_loss(100 * torch.eye(5))  # each object sure of another class
    assert fair.item() == approx(math.log(5), abs=1e-4) and fairness_loss(torch.randn(7, 5)) > fair
    all_of_one = 500 * torch.eye(5)[:1].expand(6, 5)
    assert fair < fairness_loss(all_of_one) < 1000
    shares = torch.tensor([0.75, 0.25])
    entropy = torch.special.entr(shares).sum().item()
    assert fairness_loss(shares.log().expand(6, 2), [3.0, 1.0]).item() == approx(entropy)
    assert fairness_loss(torch.zeros(6, 2), [3.0, 1.0]).item() > entropy


def test_alignment_costs_what_the_docstrings_say():
    features = torch.eye(6)
    for temperature in (1.0, 0.07):
        expected = 2 * math.log(1 + 5 * math.exp(-1 / temperature))
        loss = cross_modal_alignment_loss(features, features, temperature)
        assert loss.item() == approx(expected, rel=1e-4, abs=1e-5)
        assert cross_modal_alignment_loss(features, features.roll(1, 0), temperature) > expected
    # Two objects of one name: the name is no negative of itself.
    labels, features = torch.tensor([0, 0, 1, 2]), F.normalize(torch.randn(4, 3), dim=-1)
    similar = 2 * features  # to the names, which are unit vectors
    own = similar[range(4), labels]
    to_names = similar.exp().sum(dim=1).log() - own
    to_objects = similar.exp().sum(dim=0).log()[labels] - own
    loss = name_alignment_loss(features, torch.eye(3), labels, torch.tensor(2.0))
    assert torch.allclose(loss, (to_names + to_objects).mean() / 2)


@parametrize("batch, ratio", [(1, 0.2), (4, 0.2), (4, 0.9)])
def test_an_error_of_one_everywhere_costs_one(batch, ratio):
    images, tokens = torch.randn(batch, 3, 64, 64), torch.randn(batch, 16, 6)
    hidden = torch.rand(batch, 16).argsort(dim=1) < 16 * ratio
    assert masked_image_loss(images + 1, images, hidden).item() == approx(1, abs=1e-5)
    assert masked_point_loss(tokens + 1, tokens, hidden).item() == approx(1, abs=1e-5)
    # Points that lie far apart, in the other order.
    cloud = 100 * torch.arange(8.0).view(8, 1).expand(batch, 16, 8, 3)
    shifted = (cloud + torch.tensor([1.0, 0, 0])).flip(2)
    assert masked_point_loss(shifted, cloud, hidden).item() == approx(1, abs=1e-4)


def test_losses_see_hidden_tokens_only_and_the_target_gets_no_gradient():
    images, hidden = torch.randn(4, 3, 64, 64), one_hidden(16)
    worse = images + 9
    worse[:, :, 16:32, 16:32] -= 9
    assert masked_image_loss(worse, images, hidden).item() == approx(0, abs=1e-5)
    worse[:, :, 20, 20] += 1
    assert masked_image_loss(worse, images, hidden).item() > 1e-3
    prediction, target = (torch.randn(4, 16, 6, requires_grad=True) for _ in range(2))
    masked_point_loss(prediction, target, hidden).backward()
    assert target.grad is None and torch.equal(prediction.grad.any(dim=-1), hidden)
    cls, tokens = F.normalize(torch.randn(4, 1, 8), dim=-1), F.normalize(torch.randn(4, 16, 8), dim=-1)
    tokens[:2, 5:6], tokens[2:, 5:6] = cls[:2], -cls[2:]  # squared distances 0 and 4
    for tokens[0, 0] in (tokens[0, 0].clone(), -cls[0, 0]):  # which is visible
        loss = global_local_alignment_loss(cls[:, 0], tokens, hidden)
        assert loss.item() == approx(2, abs=1e-5)
    assert global_local_alignment_loss(cls[:, 0], tokens, hidden & False).item() == 0


def test_groups_equal_brute_force_and_follow_a_translation():
    points = torch.randn(2, 60, 3)
    for cloud, chosen in zip(points, farthest_point_sample(points, 12)):
        expected = [0]
        while len(expected) < 12:
            nearest = (cloud[:, None] - cloud[expected]).square().sum(dim=-1).amin(dim=1)
            expected.append(nearest.argmax().item())
        assert chosen.tolist() == expected and len(set(expected)) == 12
    near, centres = group_points(points, 12, 5)
    distances = (points[:, None] - centres[:, :, None]).norm(dim=-1).sort(dim=-1).values
    assert torch.allclose(near.norm(dim=-1).sort(dim=-1).values, distances[..., :5], atol=1e-5)
    moved, moved_centres = group_points(points + 3, 12, 5)
    assert torch.allclose(near, moved, atol=1e-5) and torch.allclose(centres + 3, moved_centres, atol=1e-5)
    assert_refused("--groups", group_points, points, 61, 6)
    assert_refused("--group-size", group_points, points, 6, 61)


def test_masks_are_blocks_of_the_asked_size():
    cells = hide_patches(50, 14, 0.3, "cpu").view(50, 7, 2, 7, 2)
    assert (cells.flatten(1).sum(dim=1) == 60).all()  # 15 of 49 cells of 2 x 2 patches
    assert (cells.any(4).any(2) == cells.all(4).all(2)).all() and not torch.equal(cells[0], cells[1])
    centres = torch.randn(50, 64, 3)
    hidden = hide_groups(centres, 0.3)
    counts = hidden.sum(dim=1)
    assert counts.min() >= 19 and counts.max() <= 25 and len(counts.unique()) > 3
    for cloud, mask in zip(centres, hidden):  # contiguous: a ball around one of the hidden centres
        distance = torch.cdist(cloud[mask], cloud)
        assert any(row[mask].max() < row[~mask].min() for row in distance)


# ------ encoders, teacher, learning rates -------------------------------------------------------------------
def test_equal_blocks_are_compiled_once_and_compute_the_same_or_a_line_says_why_not(capsys):
    # Each block of the point encoder has a drop-path rate of its own.
    model, given, graphs = tiny(drop_path=0.1).train(), inputs(), []
    torch.manual_seed(1)
    before = model(*given)
    blocks = model.visual.through_block, model.point_encoder.through_block
    with patch.object(torch, "compile", side_effect=RuntimeError("no compiler\nat all")):
        model.compile_blocks()
    assert (model.visual.through_block, model.point_encoder.through_block) == blocks
    assert re.fullmatch(r"warning: --compile has no effect.*\(no compiler\)\n", capsys.readouterr().err)

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    with patch.object(torch, "compile", partial(torch.compile, backend=count)):
        model.compile_blocks()
    torch.manual_seed(1)
    after = model(*given)
    assert len(graphs) == 4  # a probe, an image block, a point block, the mini-PointNet
    for name in ("image_logits", "point_logits"):
        assert torch.allclose(getattr(before, name), getattr(after, name), atol=1e-4)


@parametrize("quick_gelu", [False, True])
def test_with_nothing_hidden_the_image_encoder_is_open_clips(quick_gelu):
    """That of SLIP is timm's: see the test of ULIP's files."""
    torch.manual_seed(0)
    image = dict(image_size=32, patch_size=8, width=64, layers=2, head_width=32)
    text = dict(width=32, heads=2, layers=1, vocab_size=100)
    clip = open_clip.CLIP(24, image, text, quick_gelu=quick_gelu).eval()
    encoder = models.ImageEncoder(24, 32, 8, 64, 2, 2, quick_gelu=quick_gelu).eval()
    assert not encoder.load_state_dict(clip.visual.state_dict(), strict=False).unexpected_keys
    images, nothing = torch.randn(3, 3, 32, 32), torch.zeros(3, 16, dtype=torch.bool)
    for hidden in (None, nothing):
        assert torch.equal(encoder(images, hidden)[0], clip.encode_image(images))


def test_what_is_hidden_does_not_reach_the_features_and_points_have_no_order():
    model, (images, points) = tiny(), inputs()
    other = images.clone()
    other[:, :, 16:32, 16:32] = 7
    groups = model.group(points)
    hidden = one_hidden(16), hide_groups(groups.centres, 0.3)
    near = torch.where(hidden[1][..., None, None], 5.0, groups.neighbourhoods)
    a = model(images, groups, *hidden)
    b = model(other, models.Groups(near, groups.centres), *hidden)
    assert torch.equal(a.image_features, b.image_features)
    assert torch.equal(a.point_features, b.point_features)
    assert torch.allclose(a.image_tokens.norm(dim=-1), torch.ones(4, 16), atol=1e-5)
    assert torch.allclose(model.classifier.norm(dim=0), torch.ones(10), atol=1e-5)
    order = [0, *range(127, 0, -1)]  # 0 starts the sampling
    one, two = model(images, points), model(other, points[:, order])
    assert torch.allclose(one.point_features, two.point_features, atol=1e-5)
    assert not torch.equal(one.image_features, two.image_features)  # what is not hidden does
    both = model(torch.stack([images, other], dim=1), None).image_logits  # two views
    assert torch.allclose(both, (one.image_logits + two.image_logits) / 2, atol=1e-4)
    model.classifier = None
    assert model(None, points).point_logits is None


def test_the_precision_is_of_the_networks_only_and_goes_with_a_copy():
    model, (images, points) = tiny(), inputs()
    half = copy.deepcopy(model)
    half.precision = torch.bfloat16
    half = copy.deepcopy(half)  # as a teacher of its student
    assert half.state_dict().keys() == model.state_dict().keys()
    given = images, points, one_hidden(16), one_hidden(32)
    exact, rounded = model(*given)._asdict(), half(*given)._asdict()
    for name, value in exact.items():
        assert 0 < (value - rounded[name].float()).abs().max() < 0.3, name
        is_result = "features" in name or "logits" in name
        assert not is_result or rounded[name].dtype == torch.float32
    logits = half.logit_scale.exp() * rounded["point_features"] @ half.classifier
    assert torch.equal(logits, rounded["point_logits"])
    with torch.autocast("cpu", torch.bfloat16):  # else 14 names of 200 are others
        assert same(half.group(points)._asdict(), model.group(points)._asdict())
    given, terms = views_and_labels(), []
    for student in (model, half):
        torch.manual_seed(0)
        terms.append(train.student_terms(student, *given, options()))
    for name, value in terms[0].items():
        assert terms[1][name].dtype == torch.float32
        assert terms[1][name].item() == approx(value.item(), rel=0.05)


def test_the_precision_is_the_asked_one_and_auto_is_what_the_gpu_has(monkeypatch):
    run = train.begin(options("--precision", "bf16"), data.sample_shapes(2, 0, points=128))
    assert run.student.precision == run.teacher.precision == torch.bfloat16
    assert run.identity["precision"] == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, device, gpu_has_it, expected in (
            ("fp32", "cuda", True, torch.float32), ("bf16", "cpu", False, torch.bfloat16),
            ("auto", "cpu", True, torch.float32), ("auto", "cuda:0", True, torch.bfloat16),
            ("auto", "cuda:0", False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_has_it)
        assert models.precision_for(name, torch.device(device)) == expected


class MeanEncoder(torch.nn.Module):
    """A fork's point encoder: two linear layers; features [global token, its square, its cube]."""

    frozen_by_default = ("into",)

    def __init__(self, embed_dim, width, groups, group_size, target="tokens"):
        super().__init__()
        self.groups, self.group_size, self.target = groups, group_size, target
        self.out_width = 3 * width
        self.into, self.lm_head = torch.nn.Linear(3, width), torch.nn.Linear(width, width)
        self.proj = torch.nn.Parameter(torch.randn(width, embed_dim))

    def forward(self, groups, hidden=None):
        before = tokens = self.into(groups.neighbourhoods.mean(dim=2) + groups.centres)
        if hidden is not None:
            tokens = tokens * ~hidden[..., None]
        whole = tokens.mean(dim=1)
        return torch.cat([whole, whole ** 2, whole ** 3], dim=-1), tokens, before


def test_another_point_encoder_needs_no_more_than_the_contract_says():
    with patch.object(models, "PointEncoder", MeanEncoder):
        model = CrossMoST(24, starts.TINY["image"], dict(width=8, groups=6, group_size=5))
    (images, points), hidden = inputs(), one_hidden(6)
    out = model(images, points, None, hidden)
    whole = model.point_encoder(model.group(points), hidden)[0][:, :8]
    assert torch.equal(out.point_cls, F.normalize(whole @ model.point_encoder.proj, dim=-1))
    assert out.point_prediction.shape == out.point_target.shape == (4, 6, 8)
    groups = models.parameter_groups(model, 0.1, 0.9, ["point_encoder.into"])
    assert sum(len(group["params"]) for group in groups) == len([*model.parameters()]) - 2


@parametrize("channels", [3, 6])
@parametrize("training", [False, True])
def test_the_mini_pointnet_on_rows_is_that_of_convolutions(channels, training):
    rows = randomise(models.MiniPointNet([32, 64, 96], 48, channels)).train(training)
    convolutions, groups = copy.deepcopy(rows), torch.randn(3, 8, 16, channels)
    tokens = rows(groups)
    local = convolutions.first_conv(groups.flatten(0, 1).transpose(1, 2))
    whole = local.amax(dim=2, keepdim=True).expand_as(local)
    expected = convolutions.second_conv(torch.cat([whole, local], dim=1)).amax(dim=2).unflatten(0, (3, 8))
    assert tokens.shape == (3, 8, 48)
    assert (tokens - expected).abs().max() <= (1e-5 if training else 4e-7)
    for ours, theirs in zip(rows.buffers(), convolutions.buffers()):  # BatchNorm's statistics
        assert torch.allclose(ours, theirs, atol=1e-6)
    weight = torch.randn_like(tokens)
    (tokens * weight).sum().backward(), (expected * weight).sum().backward()
    for (name, ours), theirs in zip(rows.named_parameters(), convolutions.parameters()):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3), name


@parametrize("target", ["tokens", "points"])
def test_what_is_trained_gets_a_gradient_and_what_is_frozen_stays(target):
    args, student = options("--mask-ratio", "0.3"), tiny(target=target)
    models.parameter_groups(student, 0.05, 1.0, args.freeze)
    models.train_mode(student, args.freeze)
    before = {name: value.clone() for name, value in student.named_buffers()}  # the mini-PointNet's BatchNorm
    torch.manual_seed(0)
    sum(train.student_terms(student, *views_and_labels(16, 256), args).values()).backward()
    assert student.training and same(before, dict(student.named_buffers()))
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


def test_the_teacher_is_a_moving_average_with_copied_buffers():
    teacher, student = tiny(0), tiny(1)
    before = {k: v.clone() for k, v in teacher.named_parameters()}
    student.point_encoder.encoder.first_conv[1].running_mean += 3
    update_teacher(teacher, student, 1.0)
    assert same(before, dict(teacher.named_parameters()))
    assert same(dict(teacher.named_buffers()), dict(student.named_buffers()))
    update_teacher(teacher, student, 0.75)
    mean = 0.75 * before["visual.conv1.weight"] + 0.25 * student.visual.conv1.weight
    assert torch.allclose(teacher.visual.conv1.weight, mean, atol=1e-6)
    update_teacher(teacher, student, 0.0)
    for ours, theirs in zip(teacher.parameters(), student.parameters()):
        assert torch.allclose(ours, theirs)
    momenta = [models.teacher_momentum(step, 0.9998) for step in (0, 200, 400, 9999)]
    assert momenta == approx([0.99, 0.9949, 0.9998, 0.9998])


@needs_golden
def test_encoders_and_losses_compute_what_the_original_code_computes():
    golden = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "official_tiny.npz").items()}
    images, image_hidden, point_hidden = (golden[k] for k in ("images", "image_hidden", "point_hidden"))
    model = load_checkpoint(GOLDEN / "official_tiny.pt", groups=16, group_size=8, heads=3)
    model.set_classifier(torch.ones(7, 24))
    model.classifier.data = golden["classifier"]
    groups = group_points(golden["points"], 16, 8)  # these points are in the network's own axes
    assert torch.equal(groups.centres, golden["group_centres"])
    out, masked = model(images, groups), model(images, groups, image_hidden, point_hidden)
    terms = masked_terms(masked, images, image_hidden, point_hidden)
    # D1, D2: with the mask token as target, summed over channels, divided by the batch, mpm is the original's
    target = model.point_encoder.mask_token.expand_as(masked.point_prediction)
    mpm = masked_point_loss(masked.point_prediction, target, point_hidden) * 48 / 4
    features = masked.image_features, masked.point_features
    assert_near({
        "image_patch_tokens_masked": model.visual.ln_patch(model.visual(images, image_hidden)[1]),
        "point_features": model.point_encoder(groups)[0],
        "point_features_masked": model.point_encoder(groups, point_hidden)[0],
        "group_tokens": masked.point_target,
        "image_logits": out.image_logits, "point_logits": out.point_logits,
        "image_logits_masked": masked.image_logits, "point_logits_masked": masked.point_logits,
        "loss_gl_align_image": terms["gl_image"], "loss_gl_align_point": terms["gl_point"],
        "loss_fair_image": fairness_loss(masked.image_logits),
        "loss_fair_point": fairness_loss(masked.point_logits),
        "loss_cross_align_no_temperature": cross_modal_alignment_loss(*features),
        "loss_mim_original": terms["mim"] * 3 / 17,  # D3: it divides by 17 tokens where there are 3 channels
        "loss_mpm_original": mpm}, golden)


@needs_golden
def test_a_start_of_ulip_computes_what_ulips_code_computes():
    golden = np.load(GOLDEN / "ulip_tiny.npz")
    model, text = models.load_start(GOLDEN / "ulip_tiny.pt", groups=16, group_size=8, heads=3)
    images, points, tokens = (torch.from_numpy(golden[k]) for k in ("images", "points", "tokens"))
    names = [f"a point cloud model of a {name}." for name in golden["class_names"]]
    assert torch.equal(text.tokenize(names), tokens)
    features = model.eval().point_encoder(group_points(points, 16, 8))[0]
    assert_near({"image_features": model.visual(images)[0], "text_features": text.tower(tokens),
                 "point_features": features @ model.pc_projection}, golden)


def test_learning_rates_of_the_full_size_model_decay_by_image_layer():
    added = tuple(key.removeprefix("point_encoder.") for key in starts.MAY_BE_MISSING)
    with torch.device("meta"):
        image = dict(image_size=224, patch_size=16, width=768, layers=12, heads=12)
        model = CrossMoST(512, image, {}, NAMES)
        ulip2 = models.PointEncoder(1280, layers=18, channels=6)
    for encoder, size in ((model.point_encoder, 21_858_816), (ulip2, 32_499_072)):
        published = [p.numel() for n, p in encoder.named_parameters() if not n.startswith(added)]
        assert sum(published) == size
    found = {}
    for group in models.parameter_groups(model, 0.05, 0.65, ["point_encoder.encoder"]):
        for parameter in group["params"]:
            found[id(parameter)] = group["lr_scale"], group["weight_decay"]
    for name, parameter in model.named_parameters():
        layer, block = 13, re.match(r"visual\.transformer\.resblocks\.(\d+)\.", name)
        if block:
            layer = int(block[1]) + 1
        elif re.match(r"visual\.(conv1|class_emb|positional_emb|mask_token_emb|ln_pre)", name):
            layer = 0
        is_trained = not name.startswith("point_encoder.encoder.")
        assert parameter.requires_grad == is_trained == (id(parameter) in found), name
        if is_trained:
            decay = 0 if parameter.ndim == 1 else 0.05  # logit_scale is 0-D: the original decays it
            assert found[id(parameter)] == (approx(0.65 ** (13 - layer)), decay), name


def test_the_learning_rate_warms_up_and_falls_to_a_twentieth():
    args = options("--lr", "2", "--batch-size", "128", "--epochs", "10", "--warmup-epochs", "1")
    rate = [train.learning_rate(step, 100, args) for step in range(100)]
    assert rate[0] == approx(0.1) and rate[9] == rate[10] == 1.0  # of a batch of 256: half
    assert rate[99] == approx(0.05)  # of the peak, as 1e-6 of 2e-5
    assert rate[:11] == sorted(rate[:11]) and rate[10:] == sorted(rate[10:], reverse=True)
    args.lr = 0.0
    assert {train.learning_rate(step, 100, args) for step in range(100)} == {0.0}


@parametrize("name, threshold, apart, point_weight", [
    ("modelnet10", 0.84, [0.84, 0.84], 0.9), ("modelnet40", 0.84, [0.8, 0.82], 0.9),
    ("modelnet40-depth", 0.84, [0.84, 0.84], 0.9), ("co3d", 0.84, [0.8, 0.82], 0.9),
    ("redwood", 0.82, [0.82, 0.82], 1), ("scanobjectnn-obj-only", 0.82, [0.8, 0.82], 1),
    ("scanobjectnn-with-bg", 0.82, [0.6, 0.6], 1), ("scanobjectnn-hardest", 0.82, [0.6, 0.6], 1)])
def test_the_defaults_are_the_originals(name, threshold, apart, point_weight):
    """Here those of a data set, and what the README's table, which is tested below, does not have."""
    args = train.parse_args(["--dataset", name])
    assert (args.threshold, args.point_weight, args.model) == ([threshold], point_weight, "ulip2")
    assert train.parse_args(["--dataset", name, "--labels", "separate"]).threshold == apart
    others = args.weight_decay, args.warmup_epochs, args.groups, args.group_size
    assert others == (0.05, 1, 512, 32)


# ------ views -----------------------------------------------------------------------------------------------
def one_view(points, size, azimuth=0.0):
    """What a camera in front of a cloud (P, 3), or turned by `azimuth`, sees: (size, size)."""
    azimuth, zero = torch.full((1, 1), azimuth), torch.zeros(1, 1)
    return data.render_depth_views(points[None], azimuth, zero, size)[0, 0, 0]


def test_depth_views_show_up_as_up_and_near_as_bright():
    near_high = torch.tensor([[0.5, -0.9, 0.5]]).expand(50, 3)  # right of, in front of, above the centre
    view, behind = one_view(near_high, 32), one_view(near_high, 32, math.pi)
    row, column = divmod(view.argmax().item(), 32)
    assert row < 16 < column and behind.argmax().item() % 32 < 16
    assert view.min() == 0 and 0 < behind.max() < view.max() <= 1
    turned = data.rotate_about_xyz(near_high[None], torch.tensor([[0, 0, 0.7]]))[0]
    assert torch.allclose(one_view(turned, 32, 0.7), view, atol=1e-5)  # turn the object, or the camera
    cloud = torch.tensor([[0.0, -0.8, 0.0], [0.0, 0.8, 0.0]])
    near, far, both, turned = (one_view(cloud[30 * order], 16) for order in ([0, 0], [1, 1], [0, 1], [1, 0]))
    assert near.max() > far.max() > 0  # the nearest point of a cell wins
    assert torch.equal(both, near) and torch.equal(turned, near)


def test_depth_views_have_faces_without_holes_and_gaps_stay_open():
    torch.manual_seed(0)
    front = torch.rand(512, 3) * 1.4 - 0.7
    box = torch.cat([front, front]) * torch.tensor([1.0, 0, 1])
    box[:512, 1], box[512:, 1] = -0.6, 0.6  # 0.84 bright in front, 0.36 behind
    face = one_view(box, 64)
    assert face[16:48, 16:48].min() > 0.83 and face[:2].max() == 0
    edge = one_view(box[:512], 32)[16].unique()  # no resizing
    assert edge[0] == 0 and 0.2 < edge[1] < 0.3 and 0.6 < edge[2] < 0.7 and edge[-1] > 0.83  # 1/4, 3/4
    posts = front * torch.tensor([0.3, 0.3, 1]) + torch.tensor([0.4, 0, 0]) * torch.randn(512, 1).sign()
    gap = one_view(posts, 64)
    assert gap[16:48, 31:33].max() == 0 and gap[16:48, 44].min() > 0.4


def test_views_are_new_in_range_and_strong_ones_zoom_and_shift_more_than_weak_ones():
    torch.manual_seed(0)
    clouds = data.sample_shapes(200, 0, points=200).points
    before = clouds.clone()
    views = data.draw_views(clouds, 64)
    assert torch.equal(clouds, before)
    seen, filled = data.random_view(clouds, 64).bool().float().mean(), []
    for image in (views["weak_image"], views["strong_image"]):
        assert image.shape == (200, 3, 64, 64) and 0 <= image.min() and image.max() <= 1
        filled.append(image.bool().float().mean() / seen)
    assert 1.02 < filled[0] < 1.15 < filled[1] < 1.4  # crops of 0.85 to 1 and of 0.6 to 1 of the area
    ratio, strong = views["weak_points"].norm(dim=-1) / clouds.norm(dim=-1), views["strong_points"]
    assert (ratio.std(dim=1) < 1e-4).all() and 0.89 < ratio.min() < ratio.max() < 1.11  # rotation, one scale
    low, high = strong.aminmax(dim=1)
    assert 0.2 < ((low + high) / 2 / (high - low)).abs().median() < 0.35  # U(-0.5, 0.5) of the extent
    dropped = (strong == strong[:, :1]).all(dim=-1).float().mean(dim=1)
    assert dropped.max() <= 0.95 and dropped.std() > 0.1


# ------ training --------------------------------------------------------------------------------------------
def changed(change):
    """While it is held, train.py's objects have other values in the fields that change(objects) gives."""
    def load(*given, **more):
        objects = data.load_dataset(*given, **more)
        return replace(objects, **change(objects))
    return patch.object(train, "load_dataset", load)


def at_step(monkeypatch, number, action) -> list:
    """action(student, terms) after the step of this number, and a save after every epoch.

    Returns the strong images of all steps, to be looked at after the run.
    """
    real, seen = train.train_step, []

    def step(student, teacher, views, *more):
        terms, labels = real(student, teacher, views, *more)
        seen.append(views["strong_image"])
        if len(seen) == number:
            action(student, terms)
        return terms, labels
    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    return seen


def ctrl_c(*_):
    raise KeyboardInterrupt


def evaluations(out):
    """The log's lines on the teacher."""
    return [row for row in rows_of(out / "log.jsonl") if "teacher" in row]


@parametrize("kind", ["finished", "photographed"])
def test_true_labels_do_not_touch_training(tmp_path, request, kind):
    folder, _ = request.getfixturevalue(kind)
    for name, relabel in (("flipped", lambda labels: labels.flip(0)), ("none", lambda labels: None)):
        out = tmp_path / name
        with changed(lambda objects: {"labels": relabel(objects.labels)}):
            results = small_run(folder, "--out", out, "--eval-every", 1)
        assert same(weights(folder / "out"), weights(out))
        rows = evaluations(out)
        assert [row["epoch"] for row in rows] == [1, 2]
        for row in rows:
            assert {"agreement", "information"} <= row["teacher"].keys()
            assert ("joint" in row["teacher"]) == (name == "flipped")
    assert results["zero_shot"] is None and results["pseudo_label"]["accuracy"] is None


def test_only_the_oracle_learns_from_true_labels_and_needs_them(tmp_path, finished):
    oracle = ["--out", tmp_path, "--labels", "truth"]
    small_run(finished[0], *oracle)
    assert not same(weights(finished[0] / "out"), weights(tmp_path))
    with changed(lambda objects: {"labels": None}):
        assert_refused("truth needs true labels, own has none", small_run, finished[0], *oracle)


def test_a_folder_is_named_from_all_its_objects_together(tmp_path, monkeypatch, finished):
    own = ["--dataset", str(tmp_path)]
    for more, expected in ((["--model", "tiny"], ("together", [0.8], 0.0)),
                           (["--modalities", "image"], ("joint", [0.82, 0.82], 0.0)),
                           (["--shares", "1", "2"], ("together", [0.8], 1.0))):
        args = train.parse_args([*own, *more])
        assert (args.labels, args.threshold, args.w_fair) == expected
    monkeypatch.setattr(train, "RENEW_EVERY", 2)
    run = partial(small_run, finished[0], "--labels", "together", "--epochs", 3, "--eval-every", 2, "--out")

    def named(out):
        """How many objects were named each time."""
        with patch.object(train, "transduced_labels", wraps=train.transduced_labels) as naming:
            run(out)
        return [len(call.args[0]) for call in naming.call_args_list]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert named(whole) == [48, 48]  # all training objects, at the beginning and after two epochs
    assert [row["epoch"] for row in evaluations(whole)] == [2, 3]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        at_step(patched, 5, ctrl_c)  # in the second epoch, whose names come from the first
        run(parts)
    assert named(parts) == [48]
    assert_equal(whole, parts)


def test_a_run_that_stops_and_goes_on_equals_one_that_does_not(tmp_path, monkeypatch, photographed):
    """With photographs. Without them it is killed, see below."""
    folder, out = photographed[0], tmp_path / "out"
    images = at_step(monkeypatch, 5, ctrl_c)  # in the middle of the second epoch
    with pytest.raises(KeyboardInterrupt):
        small_run(folder, "--out", out)
    for image in images:  # coloured, so they are no depth views
        assert (image[:, 0] != image[:, 2]).any()
    saved = starts.read_file(out / "last.pt")
    assert saved["epoch"] == 1
    starts.save_file(saved | {"seconds": 1000.0}, out / "last.pt")
    with open(out / "log.jsonl", "a") as log:
        log.write("a line a killed process left behind")
    results = small_run(folder, "--out", out, "--grad-checkpointing")
    assert results["seconds"] > 1000  # of all processes
    assert_equal(folder / "out", out)


def test_a_run_continues_only_with_its_own_options_data_and_code(tmp_path, finished):
    folder, out = finished[0], tmp_path / "out"
    shutil.copytree(folder / "out", out)
    other_scans = changed(lambda objects: {"points": objects.points.flip(1)})
    other_names = changed(lambda objects: {"class_names": ["pouffe", *NAMES[1:]]})
    edited = patch.object(resume, "CODE", "edited")
    for change, says in (
            (other_scans, "the training objects are others. Give what it was begun with"),
            (other_names, "the class names are others"),
            (edited, "the code was edited since. .* --no-resume starts over"),
            (FileLock(out / ".last.pt.lock"), f"another process writes to {out};")):
        with change:
            assert_refused(says, small_run, folder, "--out", out)
    for says, *more in (("it was begun with --w-cross 1, now --w-cross 0. Give", "--w-cross", "0"),
                        ("begun with no --shares, now --shares 1 2", "--shares", *"1211111111")):
        assert_refused(says, small_run, folder, "--out", out, *more)
    assert_equal(folder / "out", out)  # which no refused run has touched
    small_run(folder, "--out", out)  # it began with relative paths, which mean the same
    assert_equal(folder / "out", out)


def test_a_run_goes_on_without_photographs_that_are_gone_and_not_with_new_ones(
        tmp_path, capsys, photographed):
    folder, out = photographed[0], shutil.copytree(photographed[0] / "out", tmp_path / "out")
    first, second, new = (folder / "own/views" / name for name in (
        "train0/a.png", "train1/a.png", "train2/new.png"))
    kept = {path: path.read_bytes() for path in (first, second)}
    try:
        first.unlink()
        small_run(folder, "--out", out)
        assert "1 photographs are gone since" in capsys.readouterr().out
        second.rename(new)
        assert_refused("there are other photographs", small_run, folder, "--out", out)
    finally:
        new.unlink(missing_ok=True)
        for path, content in kept.items():
            path.write_bytes(content)


def test_starting_over_removes_what_a_run_left_and_nothing_that_is_a_users_own(
        tmp_path, monkeypatch, finished):
    folder, out = finished[0], tmp_path / "out"
    shutil.copytree(folder / "out", out)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        at_step(patched, 1, ctrl_c)
        small_run(folder, "--out", out, "--no-resume", "--w-cross", "0")
    assert {path.name for path in out.iterdir()} == {"log.jsonl", ".last.pt.lock"}
    small_run(folder, "--out", out)  # nothing of the stopped ablation is in it
    assert_equal(folder / "out", out)
    for name in ("results.json", "predictions.csv", "log.jsonl"):
        theirs = tmp_path / f"with-{name}" / name
        theirs.parent.mkdir()
        theirs.write_text('{"mine": 1}')
        assert_refused(f"{theirs} is there, and no run of train.py has written it; name another --out",
                       small_run, folder, "--out", theirs.parent)
        assert theirs.read_text() == '{"mine": 1}'


@parametrize("given, name", [
    ("", "shapes-tiny"), ("--seed 1 --w-cross 0", "shapes-tiny-w-cross-0-seed-1"),
    ("--w-cross 0 --seed 1", "shapes-tiny-w-cross-0-seed-1"),
    ("--w-cross 1 --lr 2e-3 --device cpu", "shapes-tiny"),
    ("--dataset modelnet10 --model tiny --domain target", "modelnet10-tiny-domain-target"),
    ("--dataset co3d --labels separate --threshold 0.5 0.6", "co3d-ulip2-labels-separate-threshold-0.5-0.6")])
def test_what_differs_from_the_defaults_is_in_the_folders_name(given, name):
    assert train.parse_args(given.split()).out == Path("runs", name)


def test_a_folder_has_one_name_and_is_no_data_set(tmp_path, monkeypatch):
    scans = tmp_path / "scans"
    (scans / "shapes").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    for inside, written in ((tmp_path, "./scans/"), (scans, "."), (HERE, str(scans)), (HERE, "~/scans")):
        monkeypatch.chdir(inside)
        args = train.parse_args([f"--dataset={written}", "--out=~/x"])
        assert (args.dataset, args.out) == (str(scans), tmp_path / "x")
        assert train.parse_args(["--dataset", written]).out == Path("runs/scans-ulip2")
    monkeypatch.chdir(scans)
    assert options().dataset == "shapes"
    (scans / "shapes/classes.txt").write_text("mug\ncup\n")
    says = "shapes is a data set, and a folder here, too; give ./shapes for"
    for script in (train, evaluation):
        assert_refused(says, script.parse_args, ["--dataset", "shapes"])
    assert train.parse_args(["--dataset", "./shapes"]).dataset == str(scans / "shapes")


def test_what_was_changed_is_said_first_and_last(tmp_path, capfd, finished):
    changes = ["--w-cross", "0", "--seed", "3", "--epochs", "1"]
    small_run(finished[0], "--out", tmp_path / "out", *changes)
    said, errors = capfd.readouterr()
    assert "self-training" not in errors  # a bar is only for a terminal
    assert "warning" not in errors  # the small start knows these names, Night_Stand too
    lines = said.splitlines()
    assert lines[0] == lines[-1] and re.search("own with tiny, seed 3, .*--w-cross 0", lines[0])
    pasted = shlex.split(lines[1].removeprefix("all settings: python train.py "))
    made, again = (vars(train.parse_args(argv)) for argv in (small_flags(finished[0], *changes), pasted))
    assert {option for option in made if made[option] != again[option]} <= {*train.NO_EFFECT_ON_RESULTS}


# ------ processes: killed, stopped, several -----------------------------------------------------------------
# Python needs seconds to import torch. A server of multiprocessing does it once, and each process begins as
# a copy of it. It does not import our modules: they ask for a GPU, and whoever has asked must not be copied.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "timm", "open_clip", "h5py", "trimesh", "matplotlib.pyplot"])


def start_process(said, function, *given, **environment):
    """Start function(*given) in a process of one thread, without a GPU, that prints into the file `said`."""
    with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        forkserver.ensure_running()
    process = SERVER.Process(target=as_a_script, args=(said, environment, function, given))
    process.start()
    return process


def as_a_script(said, environment, function, given):
    with open(said, "w") as file:
        for output in (1, 2):
            os.dup2(file.fileno(), output)
    os.environ |= environment
    with command_line.one_line_errors():
        function(*given)


def train_and_save_often(argv):
    train.SAVE_EVERY = 0
    train.main(argv)


# train.py whose photographs are slow, so that their workers live for two seconds.
SLOW = """
import sys, time, data, train
from support.command_line import one_line_errors
read = data.TrainingPhotographs.__getitem__
data.TrainingPhotographs.__getitem__ = lambda photographs, i: time.sleep(0.1) or read(photographs, i)
with one_line_errors():
    train.main(sys.argv[1:])
"""


def script_in_training(said, out, *command):
    """A Popen of Python with this command, which prints into `said`, when it has logged a step in `out`."""
    with open(said, "w") as file:
        run = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, cwd=HERE)
    log = out / "log.jsonl"
    while run.poll() is None and not (log.exists() and "loss" in log.read_text()):
        time.sleep(0.05)
    return run


def test_a_run_killed_at_any_moment_continues_to_the_bit(tmp_path):
    """KILLS=50 kills more often. A run that gets to its end is compared and begins anew."""
    moments, kills, last = random.Random(0), 0, int(os.environ.get("KILLS", 2))
    whole, parts, said = tmp_path / "whole", tmp_path / "parts", tmp_path / "said"
    log = parts / "log.jsonl"
    # A line of the log for each step: whoever is killed within an epoch leaves lines that have to go.
    flags = small_flags(tmp_path, "--epochs", 6, "--log-every", 1, "--out")
    start = partial(start_process, said, train_and_save_often)
    run = start([*flags, str(whole)])
    run.join()
    assert run.exitcode == 0, said.read_text()
    duration = json.loads((whole / "results.json").read_text())["seconds"]
    while kills < last or parts.exists():
        before = log.stat().st_mtime if log.exists() else 0
        run = start([*flags, str(parts)])
        if kills < last:
            while run.is_alive() and not (log.exists() and log.stat().st_mtime > before):
                time.sleep(0.01)
            time.sleep(moments.uniform(0, duration / 2))
            run.kill()
        run.join()
        assert run.exitcode in (0, -signal.SIGKILL), said.read_text()
        kills += run.exitcode != 0
        if run.exitcode == 0:
            assert_equal(whole, parts)
            shutil.rmtree(parts)


@parametrize("sent, after, code, says", [  # after: how many seconds the workers have lived
    (signal.SIGINT, 0, 130, "stopped; the same command goes on from what was saved"),
    (signal.SIGINT, 0.5, 130, "stopped; the same command goes on from what was saved"),
    (signal.SIGKILL, 0.5, 2, "error: a process that decodes photographs has ended")])
def test_a_run_with_photographs_ends_in_a_line_and_leaves_no_worker(
        tmp_path, photographed, sent, after, code, says):
    """Ctrl-C goes to all processes, too little memory ends one worker."""
    said, out = tmp_path / "said", tmp_path / "out"
    flags = small_flags(photographed[0], "--epochs", 1000, "--eval-every", 0, "--out", out)
    run = script_in_training(said, out, "-c", SLOW, *flags)
    children, workers = Path(f"/proc/{run.pid}/task/{run.pid}/children"), ""
    while run.poll() is None and not (workers and workers == children.read_text()):
        workers = children.read_text()
        time.sleep(after)
    ended = [int(pid) for pid in workers.split()]
    for pid in ended[:1] if sent == signal.SIGKILL else [*ended, run.pid]:
        with suppress(ProcessLookupError):  # a worker may have ended by itself
            os.kill(pid, sent)
    with suppress(subprocess.TimeoutExpired):
        run.wait(30)
    run.kill()
    text, until = said.read_text(), time.monotonic() + 10
    assert run.wait() == code and "Traceback" not in text, text
    assert text.splitlines()[-1].startswith(says), text
    for stat in [Path(f"/proc/{pid}/stat") for pid in ended]:
        while stat.exists() and ") Z " not in stat.read_text():  # Z: it has ended
            assert time.monotonic() < until
            time.sleep(0.1)


def run_two_processes(folder, function, *given) -> str:
    """Run function(*given) in two processes, as under torchrun. Returns what the first prints."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    said = [folder / f"said-{rank}" for rank in "01"]
    started = [start_process(said[rank], function, *given, MASTER_ADDR="localhost", MASTER_PORT=port,
                             WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]
    for process in started:
        process.join(300)
        process.kill()  # where it waits for one that has failed
    assert [process.exitcode for process in started] == [0, 0], [file.read_text() for file in said]
    return said[0].read_text()


def three_steps(views, out):
    """From the small start, on the whole views in a file, by any number of processes."""
    parallel.join_processes()
    args = options("--mask-ratio", "0", "--batch-size", "16", "--threshold", "0.3", "--lr", "1")
    views = {name: parallel.my_part(view) for name, view in torch.load(views).items()}
    student, teacher = shipped(), shipped()
    # Not AdamW: its first steps are as long where a gradient is nothing but rounding.
    optimizer = torch.optim.SGD(models.parameter_groups(student, 0.05, 1.0, args.freeze), lr=0.0)
    train.train_mode(student, args.freeze)
    several = parallel.with_ddp(student)
    for step in range(3):
        terms, _ = train.train_step(several, teacher, views, optimizer, step, 30, args)
    if parallel.leader():
        saved = {"student": student.state_dict(), "teacher": teacher.state_dict(), "terms": terms}
        torch.save(saved, out)


def test_two_processes_make_the_steps_of_one(tmp_path):
    """Exactly where nothing random is drawn: on fixed views, without masks."""
    views = tmp_path / "views"
    torch.manual_seed(0)
    torch.save(data.draw_views(data.sample_shapes(16, 0, points=256).points, 64), views)
    three_steps(views, tmp_path / "one")
    run_two_processes(tmp_path, three_steps, views, tmp_path / "two")
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    start = starts.read_file(TINY_START)["model"]
    for which in ("student", "teacher"):
        moved = max((one[which][name] - start[name]).abs().max() for name in start)
        apart = max((one[which][name] - two[which][name]).abs().max() for name in start)
        assert apart < 1e-5 and moved > 50 * apart, which
    for name, value in one["terms"].items():
        assert float(two["terms"][name]) == approx(float(value), rel=1e-4), name


def test_two_processes_train_evaluate_and_continue_as_one_does(tmp_path, finished):
    folder, alone = finished
    flags = small_flags(folder, "--out", tmp_path / "out", "--labels", "together")
    for _ in range(2):  # the second finds the first's checkpoint
        said = run_two_processes(tmp_path, train.main, flags)
    assert "continuing" in said
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["zero_shot"] == alone["zero_shot"]  # each process embedded half of the objects
    for modality in evaluation.MODALITIES:  # 15 %: 3 of 20 objects
        assert abs(results["teacher"][modality] - alone["teacher"][modality]) <= 15
    assert len(rows_of(tmp_path / "out/predictions.csv")) == 20


def test_processes_end_together_and_with_one_line_of_ours(tmp_path, finished):
    said, out = tmp_path / "said", tmp_path / "out"
    flags = small_flags(finished[0], "--out", out, "--epochs", 1000)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = script_in_training(said, out, *torchrun, HERE / "train.py", *flags)
    workers = subprocess.check_output(["pgrep", "-P", str(run.pid)], text=True).split()
    os.kill(int(workers[1]), signal.SIGTERM)
    assert run.wait(60) != 0
    lines = said.read_text().splitlines()
    assert not any("train.py\", line" in line for line in lines)  # no traceback of ours
    assert sum("another of torchrun's processes has ended" in line for line in lines) == 1


def test_what_torchrun_asks_for_and_cannot_be_is_one_line(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")  # which something left there
    parallel.join_processes()
    assert not parallel.dist.is_initialized()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 1):
        assert_refused("process 2, but there are 1 GPUs; use --nproc-per-node=1", parallel.join_processes)
    with patch.object(parallel.dist, "init_process_group", side_effect=ValueError("gloo\nno eth0")):
        assert_refused("cannot find each other .gloo.; name a network interface", parallel.join_processes)
    objects = data.sample_shapes(20, 0, points=8)
    for module in (train, parallel):
        monkeypatch.setattr(module, "world_size", lambda: 3)
    for batch, shared in (("16", 16), ("63", 20)):
        args = options("--batch-size", batch)
        assert_refused(f"cannot share a batch of {shared} ", train.refuse_wrong_data, args, objects)
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    two = objects.pick(torch.arange(2))  # fewer than processes: each embeds them all
    assert parallel.gather_embedded(lambda *given: given, "model", two, 6) == ("model", two, 6)


def test_processes_shuffle_alike_and_each_draws_its_own(monkeypatch):
    seen, objects = [], data.sample_shapes(20, 0, points=8)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    for rank in (0, 1):
        for module in (train, parallel):
            monkeypatch.setattr(module, "rank", lambda: rank)
        _, batches, parts = zip(*train.batches_of_epoch(3, objects, 8, 64, options()))
        seen.append((torch.stack(batches), torch.stack(parts), torch.rand(1)))
    (batches, first, drawn), (same_batches, second, also_drawn) = seen
    assert torch.equal(batches, same_batches)
    assert torch.equal(batches, torch.cat([first, second], dim=1))
    assert drawn != also_drawn


# ------ errors in one line ----------------------------------------------------------------------------------
@parametrize("asked, says", [
    ("--shares 0 0", "--shares are all 0"),
    ("--shares 1 2", "--shares has 2 numbers; expected 10, for bathtub, bed"),
    ("--model nonsense", "unknown model 'nonsense'; one of tiny, "),
    ("--model RN50", "RN50's towers are no plain transformers"),
    ("--model tiny --pretrained openai", "--model tiny is one file; drop --pretrained"),
    ("--modalities image --labels together", "--labels together needs both modalities"),
    ("--threshold 0.5 0.6", "--threshold takes one value; two, image's and point's, go with"),
    ("--freeze visual nothing", "--freeze nothing: no parameter or module has this name"),
    ("--freeze visua", "--freeze visua: no parameter or module has this name; give whole names"),
    ("--start-checkpoint nowhere.pt", "there is no file nowhere.pt; a run's checkpoint is OUT/last.pt, and"),
    ("--dataset nowhere", "there is no folder nowhere, and no data set of this name; the data sets are shap"),
    ("--out file", "--out file is a file; name a folder"),
    ("--batch-size 0", r"argument --batch-size: 0 is not in \[1, inf\]"),
    ("--lr nan", "argument --lr: nan is not in"),
    ("--momentum 1.5", r"argument --momentum: 1.5 is not in \[0, 1\]"),
    ("--cross-temperature 0", "argument --cross-temperature: 0 is not in"),
    ("--epochs two", "argument --epochs: invalid int value: 'two'"),
    ("--device abacus", "argument --device: cannot compute on 'abacus': Expected one of cpu"),
    ("--device mps", "argument --device: 'mps' is not supported; use cpu or cuda")])
def test_options_that_cannot_be_or_go_together_are_one_line(
        tmp_path, monkeypatch, capsys, finished, asked, says):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    if not re.search("--freeze|--shares 1|--dataset", asked):  # all else needs no data to be refused
        monkeypatch.setattr(train, "load_dataset", Mock(side_effect=AssertionError("read")))
    with pytest.raises(SystemExit) as ended, command_line.one_line_errors():
        small_run(finished[0], "--out", "out", *asked.split())
    said, = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and re.search(f"error: .*{says}", said) and not Path("out").exists()


@parametrize("error, says", [
    (UserError("no such data"), "no such data"), (OSError(28, "No space left"), "No space left"),
    (UserError("2 files are bad:\n  a: no\n\tpoints\n  b"), "2 files are bad:\n  a: no points\n  b"),
    (torch.OutOfMemoryError("much"), "lower --points"),
    (MemoryError("much"), "lower --points"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "lower --points"),
    (RuntimeError("DataLoader worker (pid 1) is killed by signal"), "a process that decodes photographs has"),
    (ValueError("a fork's own"), None), (RuntimeError("CUDA error: an illegal memory access"), None),
    (RuntimeError("elements of the written-to tensor refer to a single memory location"), None)])
def test_what_a_user_can_put_right_is_one_line_and_a_bug_keeps_its_traceback(capsys, error, says):
    with pytest.raises(SystemExit if says else type(error)), command_line.one_line_errors():
        raise error
    said = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{says}.*\n", said) if says else said == ""


@parametrize("script, option", [("train", "--start-checkpoint"), ("eval", "--checkpoint")])
def test_a_script_ends_in_one_line(tmp_path, monkeypatch, capsys, script, option):
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"not a checkpoint")
    monkeypatch.setattr(sys, "argv", [script, option, str(bad)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(HERE / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 2
    assert re.fullmatch(f"error: {bad} is no checkpoint.*\n", capsys.readouterr().err)


def test_a_script_ends_well_on_ctrl_c_and_a_closed_pipe(tmp_path, monkeypatch, capsys, finished):
    terminal = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit) as ended, command_line.one_line_errors():
        print("\udcff")  # a name that cannot be printed
        raise KeyboardInterrupt
    terminal.flush()
    assert ended.value.code == 130 and terminal.buffer.getvalue() == b"\\udcff\n"
    # Below what the terminal shows of Ctrl-C.
    assert capsys.readouterr().err.startswith("\nstopped; the same command goes on")
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does, before anything is printed
    monkeypatch.setattr(sys, "stdout", open(writer, "w", buffering=1))
    checkpoint, file = finished[0] / "out/last.pt", tmp_path / "json"
    with command_line.one_line_errors():
        evaluation.main(["--checkpoint", str(checkpoint), "--json", str(file)])
    assert file.exists() and "error" not in capsys.readouterr().err


def test_scripts_run_in_any_locale_and_without_docstrings(tmp_path, finished):
    own, names = tmp_path / "own", ["Büro_stuhl", "椅子"]
    for split, name in itertools.product(("train", "test"), names):
        (own / split / name).mkdir(parents=True)
        np.save(own / split / name / f"{split}_ü_{names.index(name)}.npy", LEANING[:128])
    (own / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    script = """import sys, train, eval
from support.command_line import one_line_errors
with one_line_errors():
    train.main(sys.argv[1:])
    eval.main(["--checkpoint", "out/last.pt", "--predictions", "names.csv"])
    train.main(["--help"])"""
    flags = small_flags(finished[0], "--dataset", own, "--out", "out", "--batch-size", 2, "--epochs", 1)
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    environment = {**os.environ, **ascii_only, "PYTHONPATH": str(HERE)}
    run = subprocess.run([sys.executable, "-OO", "-c", script, *flags], cwd=tmp_path, env=environment,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("2 of 2 names are others: ") == 2  # both scripts say so
    assert r"B\xfcro stuhl" in run.stdout and "--batch-size BATCH_SIZE" in run.stdout
    assert {row["class"] for row in rows_of(tmp_path / "names.csv")} <= {"Büro stuhl", "椅子"}


# ------ one step --------------------------------------------------------------------------------------------
def one_step(*argv):
    """The terms of one training step, and the student after it."""
    torch.manual_seed(0)
    args, student = options("--batch-size", "8", *argv), tiny().train()
    optimizer = torch.optim.AdamW(models.parameter_groups(student, 0.05, 1.0, args.freeze), lr=0.0)
    views, _ = views_and_labels()
    terms, _ = train.train_step(student, tiny(), views, optimizer, 2, 10, args)
    return terms, student


def test_the_teacher_names_the_objects_and_not_the_student():
    views, args = views_and_labels()[0], options("--batch-size", "8", "--threshold", "0.1")
    student, teacher = tiny(0).train(), tiny(1)
    expected = train.teacher_labels(teacher, views, args)
    optimizer = torch.optim.AdamW(models.parameter_groups(student, 0.05, 1.0, args.freeze), lr=0.0)
    _, labels = train.train_step(student, teacher, views, optimizer, 2, 10, args)
    for modality, (named, kept) in expected.items():
        assert torch.equal(labels[modality][0], named) and torch.equal(labels[modality][1], kept)
    assert not torch.equal(named, train.teacher_labels(tiny(0), views, args)["image"][0])


def test_a_weight_of_zero_removes_its_term():
    args, (whole, _) = options(), one_step()
    for flag, *gone in (("w_fair", "fair_image", "fair_point"), ("w_mim", "mim"), ("w_mpm", "mpm"),
                        ("w_gl", "gl_image", "gl_point"), ("w_cross", "cross")):
        assert all(whole[name] > 0 for name in gone)
        without, _ = one_step("--" + flag.replace("_", "-"), "0")
        weighed = getattr(args, flag) * sum(whole[name] for name in gone)
        removed = whole["loss"] - without["loss"]
        assert removed.item() == approx(weighed.item(), rel=1e-2, abs=1e-5), flag


@parametrize("modality, absent, idle", [("image", "point", "point_encoder"), ("point", "image", "visual")])
def test_a_single_modality_trains_only_itself(modality, absent, idle):
    terms, student = one_step("--modalities", modality, "--threshold", "0")
    assert f"self_{modality}" in terms and f"self_{absent}" not in terms and "cross" not in terms
    assert all(parameter.grad is None for parameter in getattr(student, idle).parameters())


def test_evaluating_leaves_modules_in_their_mode():
    student = tiny()
    models.train_mode(student, ["point_encoder.encoder"])
    modes = {name: module.training for name, module in student.named_modules()}
    evaluation.evaluate(student, data.sample_shapes(2, 0, points=128), views=1)
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert set(modes.values()) == {True, False}


def spoil_loss(student, terms):
    terms["loss"] = terms["loss"] / 0


def spoil_weight(student, terms):
    student.pc_projection.data[0, 0] = math.inf


@parametrize("spoil, step, says", [
    (spoil_loss, 5, "the loss is not finite at step 5: .*'self_image': [0-9].*'cross': [0-9]"),
    # By the last step of an epoch, and no loss has shown it yet.
    (spoil_weight, 6, "weights are not finite after epoch 2; lower --lr, .*last.pt is of an earlier epoch")])
def test_what_is_not_finite_is_named_and_the_last_checkpoint_stays(
        tmp_path, monkeypatch, finished, spoil, step, says):
    at_step(monkeypatch, step, spoil)
    assert_refused(says, small_run, finished[0], "--out", tmp_path)
    assert starts.read_file(tmp_path / "last.pt")["epoch"] == 1
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_one_batch_overfits():
    torch.manual_seed(0)
    args, student, history = options("--mask-ratio", "0.3"), tiny(groups=8, group_size=8).train(), []
    optimizer = torch.optim.AdamW(models.parameter_groups(student, 0.0, 1.0, []), lr=1e-3)
    views, labels = views_and_labels(10, 64)
    for _ in range(50):
        terms = train.student_terms(student, views, labels, args)
        loss = terms["self_image"] + terms["self_point"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) / 5 < 0.3 * history[0]


def test_the_log_tells_names_given_and_how_many_rightly(monkeypatch):
    truth = torch.tensor([0, 0, 1, 9])
    image = torch.tensor([0, 1, 1, 9]), torch.tensor([True, True, True, False])
    point = truth, torch.tensor([True, False, False, False])
    step = 0, {"loss": torch.tensor(2.0), "lr": 0.1}, {"image": image, "point": point}, truth
    row = train.interval_means([step], 10)
    assert row["coverage"] == 0.5 and row["label_accuracy"] == 0.75 and row["loss"] == 2  # 4 of 8, 3 of 4
    assert row["named"] == [0.25, 0.25, *[0] * 8] and row["entropy"] == approx(math.log(2))
    assert row["lr"] == approx(0.1)  # a number that is no tensor
    nothing = 0, {"loss": torch.tensor(1.0)}, {"image": (truth, truth < 0)}, None
    row = train.interval_means([nothing, nothing], 10)
    assert row["coverage"] == row["entropy"] == 0 and row["label_accuracy"] is None
    # A fork's rule may weigh its labels.
    monkeypatch.setitem(RULES, "mine", "weighed by half its confidence")
    assert options("--labels", "mine").labels == "mine"
    halves = 0, {"loss": torch.tensor(1.0)}, {"image": (truth, torch.full((4,), 0.5))}, truth
    row = train.interval_means([halves], 10)
    assert row["coverage"] == 0.5 and row["label_accuracy"] == 1


# ------ on a GPU --------------------------------------------------------------------------------------------
def test_on_a_gpu_nothing_mixes_devices_or_waits_for_a_value(tmp_path, monkeypatch):
    """On torch's fake CUDA tensors, which need no GPU and raise at both."""
    randint = torch.randint  # a single one is a template's number: a fake tensor has none, on the CPU either
    monkeypatch.setattr(torch, "randint", lambda top, size, **more: randint(top, size, **more) if size else 0)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    monkeypatch.setattr(models, "farthest_point_kernel", lambda device: None)  # it needs real memory
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.rand(2, device="cuda:0").argsort()
        except (NotImplementedError, RuntimeError, AssertionError) as error:
            pytest.skip(f"this torch cannot: {error}")
        with torch.device("cuda:0"):
            model, text = models.random_tiny(0, groups=8, group_size=8)
            model.set_classifier(torch.rand(10, 128), NAMES)
            points = torch.rand(4, 128, 3)
        views = data.draw_views(points, 64)
        for argv in ("--labels mean", "--labels separate", "--labels agree",
                     "--modalities image", "--modalities point", "--modalities both"):
            args = options("--out", str(tmp_path), *argv.split())
            given = train.teacher_labels(model, views, args)
            terms = train.student_terms(model, views, given, args)
            assert {term.device.type for term in terms.values()} == {"cuda"}
        still = model.normalise(data.fixed_views(points, 2, 64))
        assert model(still, points).image_logits.shape == (4, 10)
        for label in (3, -1):  # a number a fake tensor knows
            for tower in (text, None):
                loss = pretrain.pretrain_loss(model, tower, points[:1], torch.tensor([label]), NAMES)
                assert loss.device.type == "cuda"


@needs_gpu
def test_a_step_on_a_gpu_is_that_of_a_cpu(monkeypatch):
    views, args = views_and_labels()[0], options("--batch-size", "8", "--threshold", "0.1")
    image_hidden = hide_patches(8, 4, 0.3, "cpu")
    point_hidden = torch.rand(8, 32).argsort(dim=1) < 10
    monkeypatch.setattr(train, "hide_patches", lambda *given: image_hidden.to(given[-1]))
    monkeypatch.setattr(train, "hide_groups", lambda centres, ratio: point_hidden.to(centres.device))
    terms = {}
    for device in ("cpu", "cuda"):
        student, teacher = tiny().to(device), tiny().to(device)
        groups = models.parameter_groups(student, 0.05, 1.0, args.freeze)
        optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        given = {name: view.to(device) for name, view in views.items()}
        terms[device], _ = train.train_step(student, teacher, given, optimizer, 2, 10, args)
    for name, value in terms["cpu"].items():
        assert float(terms["cuda"][name]) == approx(float(value), abs=1e-4), name


@needs_gpu
def test_a_stopped_run_on_a_gpu_nearly_equals_one_that_was_not(tmp_path, monkeypatch, finished):
    """Nearly: the backward pass of attention adds in no fixed order there."""
    run = partial(small_run, finished[0], "--device", "cuda", "--out")
    run(tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        at_step(patched, 5, ctrl_c)
        run(tmp_path / "parts")
    run(tmp_path / "parts")
    start = starts.read_file(finished[0] / "start.pt")["model"]
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    moved = sum((whole[name] - start[name]).abs().sum() for name in start)
    apart = sum((whole[name] - parts[name]).abs().sum() for name in start)
    assert moved > 100 * apart


# ------ results ---------------------------------------------------------------------------------------------
def test_a_commit_is_that_of_these_files_or_unknown(tmp_path, monkeypatch):
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    # In a repository of their own, and beside another project's files.
    for root, expected in ((tmp_path, "[0-9a-f]{7,40}"), (tmp_path / "inside", "unknown")):
        (root / "support").mkdir(parents=True)
        monkeypatch.setattr(provenance, "__file__", str(root / "support/provenance.py"))
        assert re.fullmatch(expected, provenance.commit())
    for error in (OSError("no git"), subprocess.CalledProcessError(128, "git")):
        monkeypatch.setattr(subprocess, "run", Mock(side_effect=error))
        assert provenance.commit() == "unknown"


@parametrize("accuracy, rise, said, meaning", [
    (None, 0.4, "sure enough to train on", "in all .* accuracy had risen"),
    (75.0, 0.2, "sure enough to train on, 75.0 % of these rightly", "7 had lost accuracy"),
    (None, 0.05, "sure enough to train on", "too small a rise to judge by")])
def test_a_run_without_labels_ends_with_what_can_be_known(accuracy, rise, said, meaning):
    after = {f"name {i}": 9.0 - i / 100 for i in range(1000)}
    labels, agree, information, shares = what_is_known({
        "teacher": None, "agreement": {"start": 60.0, "teacher": 80.0},
        "shares": {"start": dict.fromkeys(after, 0.1), "teacher": after},
        "pseudo_label": {"coverage": 50.0, "accuracy": accuracy},
        "information": {"start": 0.5, "teacher": 0.5 + rise}})
    assert labels.endswith("50.0 % of the pseudo-labels were " + said)
    assert re.search("60.0 % .* before training, 80.0 % after", agree)
    assert re.search(f"0.50 nats before training, {0.5 + rise:.2f} after: .*{meaning}", information)
    assert shares.count("->") == 11 and "name 0 0 -> 9" in shares  # one in the heading


def test_information_is_what_the_names_of_the_modalities_tell_each_other():
    told, random = partial(evaluation.information, classes=10), torch.Generator().manual_seed(0)
    names = torch.arange(40) % 10
    shuffled = [names[torch.randperm(40, generator=random)] for _ in range(50)]
    assert abs(sum(told(names, others) for others in shuffled) / 50) < 0.05
    names = torch.arange(5000) % 10
    assert told(names, names) == approx(math.log(10), abs=0.01)
    is_kept = torch.rand(5000, generator=random) < 0.5
    noisy = torch.where(is_kept, names, names[torch.randperm(5000)])
    renamed = torch.randperm(10)[noisy]
    assert 0.3 < told(names, noisy) < 1
    assert told(names, renamed) == approx(told(names, noisy))
    assert told(0 * names, 0 * names) == approx(0)  # and yet they agree
    assert told(names.clamp(max=4), noisy.clamp(max=4)) < told(names, noisy)


def test_objects_that_lie_on_their_side_stop_a_run(tmp_path, monkeypatch, capsys, finished):
    model, upright = shipped(), data.sample_shapes(40, 0, points=512)
    lying = replace(upright, points=upright.points[..., [1, 2, 0]])  # as in files whose y points up
    few = lying.pick(torch.arange(19))
    assert evaluation.axis_hint(model, upright) is None and evaluation.axis_hint(model, few) is None
    assert re.search("lie on their side: .*; give --up=y, or --up z to", evaluation.axis_hint(model, lying))
    hint, flags = Mock(return_value="they lie"), small_flags(finished[0], "--out", tmp_path / "out")
    for script in (train, evaluation):
        monkeypatch.setattr(script, "axis_hint", hint)
    at = flags.index("--up")
    assert_refused("they lie", train.main, flags[:at] + flags[at + 2:])
    assert not list(tmp_path.glob("out/*.csv"))
    evaluation.main(flags[:12])
    assert "note: they lie" in capsys.readouterr().err and hint.call_count == 2  # not in `finished`


def test_a_run_leaves_its_results(finished):
    out, results = finished[0] / "out", finished[1]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {path.name for path in out.iterdir()} == {*resume.LEFT_BY_A_RUN, ".last.pt.lock"}
    assert results["objects"] == 20 and results["pseudo_label"]["coverage"] > 0
    assert results["changed"] == {"up": "z", "points": 128, "batch_size": 16, "epochs": 2, "views": 2,
                                  "labels": "joint", "threshold": [0.12], "w_fair": 2.0}
    first, *rows = rows_of(out / "log.jsonl")
    assert {"options", "torch", "commit", "device", "start", "train"} <= first.keys()
    steps = [row for row in rows if "steps" in row]
    assert [row["step"] for row in steps] == [3, 6] and [row["epoch"] for row in rows] == [1, 2, 2]
    for row in steps:
        assert row["lr"] > 0 and row["seconds"] > 0 and row["objects_per_second"] > 0


def test_eval_repeats_a_runs_results_on_any_data_set(tmp_path, finished):
    (folder, results), names = finished, tmp_path / "names.csv"

    def evaluate(*argv):
        return evaluation.main([*map(str, argv), "--predictions", str(names)])
    trained, predicted = ["--checkpoint", folder / "out/last.pt"], rows_of(folder / "out/predictions.csv")
    said_by_start = [(row.pop("start"), row.pop("start_confidence")) for row in predicted]
    sibling = shutil.copytree(folder / "own", tmp_path / "sibling")  # its clouds have the run's 128 points
    other = ["--dataset", sibling, "--views", 2, "--data-root", tmp_path]
    for flags in ([], other):  # without flags, the data are found from any folder
        figures = evaluate(*trained, *flags)
        assert rows_of(names) == predicted
        for which in ("student", "teacher"):
            assert results[which].items() <= figures[which].items()
    evaluate(*small_flags(folder)[:12])  # the start
    assert [(row["class"], row["confidence"]) for row in rows_of(names)] == said_by_start
    cloud = sorted(folder.glob("own/test/*/*.npy"))[0]  # with the points and views of the run, not the usual
    (name,), probs = evaluation.classify(load_checkpoint(trained[1]), [np.load(cloud)])
    evaluate(*trained, cloud)
    row, = rows_of(names)
    assert row["class"] == name and float(row["confidence"]) == approx(probs.max().item(), abs=1e-4)
    write_ulip(tmp_path / "ulip.pt")
    other += ["--start-checkpoint", tmp_path / "ulip.pt", "--points", 128]
    assert_refused("cannot take 512 farthest of 128", evaluate, *other)  # its own number of groups


def test_predictions_say_who_holds_what():
    image = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3]])
    point = torch.tensor([[0.7, 0.2, 0.1], [0.9, 0.0, 0.1], [0.0, 0.4, 0.6]])
    objects = data.Objects(torch.zeros(3, 1, 3), None, ["a", "b", "c"], names=["x", "y", "z, w"])
    probs = {"image": image, "point": point, "joint": (image + point) / 2}
    figures = evaluation.assess(probs, objects)
    figures.pop("information")
    assert figures == {"agreement": 33.33, "shares": {"a": 66.67, "b": 0.0, "c": 33.33}}

    def written(*start):
        return evaluation.predictions_csv(evaluation.name_objects(objects, probs, *start)).splitlines()
    head = b"object,class,confidence,image,image_confidence,point,point_confidence,agree"
    assert written() == [head, b"x,a,0.8000,a,0.9000,a,0.7000,yes", b"y,a,0.5000,b,0.8000,a,0.9000,no",
                         b'"z, w",c,0.4500,a,0.4000,c,0.6000,no']
    objects.labels = torch.tensor([0, 0, 2])
    objects.names = ["x", "\udcff", "z"]  # a file's name that is no UTF-8
    start = torch.tensor([0.5, 0.25, 1]), torch.tensor([2, 1, 0])
    assert written(start)[:3] == [
        head + b",start,start_confidence,true", b"x,a,0.8000,a,0.9000,a,0.7000,yes,c,0.5000,a",
        b"\xff,a,0.5000,b,0.8000,a,0.9000,no,b,0.2500,a"]
    assert evaluation.assess(probs, objects)["per_class"] == {
        name: {"image": image, "point": 100.0, "joint": 100.0} for name, image in (("a", 50.0), ("c", 0.0))}


def test_eval_writes_all_it_knows(tmp_path, finished):
    last, files = finished[0] / "out/last.pt", {}
    argv = ["--checkpoint", str(last)]
    for name in ("predictions", "embeddings", "json", "confusion", "gallery"):
        files[name] = tmp_path / f"{name}.csv"
        argv += [f"--{name}", str(files[name])]
    both = evaluation.main(argv)
    assert {"student", "teacher"} <= both.keys()
    assert json.loads(files["json"].read_text()) == json.loads(json.dumps(both))
    kept, model = np.load(files["embeddings"]), load_checkpoint(last)  # it refuses pickle
    logits = model.logit_scale.exp().item() * kept["point_features"] @ kept["classifier"]
    assert np.allclose(logits, kept["point_logits"], atol=1e-4) and len(kept["labels"]) == 20
    named = [row["point"] for row in rows_of(files["predictions"])]
    assert named == [kept["class_names"][k] for k in logits.argmax(axis=1)]
    for picture in ("confusion", "gallery"):
        image = np.asarray(Image.open(files[picture]).convert("L"))
        assert min(image.shape) > 300 and image.std() > 5


def test_eval_names_a_start_by_any_words(tmp_path, finished):
    start = [*small_flags(finished[0])[:12], "--up", "z"]
    # Other words in another order: the same accuracy where all true names are among them, none where not.
    backwards = evaluation.main([*start, "--classes", ", ".join(reversed(NAMES))])
    assert backwards["zero_shot"]["per_class"] == evaluation.main(start)["zero_shot"]["per_class"]
    words, names = tmp_path / "names.txt", tmp_path / "names.csv"
    words.write_text("mug\nlamp\n")
    figures = evaluation.main([*start, "--classes", str(words), "--predictions", str(names)])
    assert "joint" not in figures["zero_shot"]
    assert {row["class"] for row in rows_of(names)} <= {"mug", "lamp"}
    far = ["--dataset", "modelnet10", "--data-root", str(tmp_path), "--no-download"]
    for says, *refused in (("only knows the classes", "--checkpoint", "last.pt", "--classes", "mug"),
                           ("one to the text tower", *start, "--classes", "mug,Mug"),
                           ("nothing to evaluate",), ("--no-download", "--model", "tiny", *far),
                           ("needs labels", *start, "--classes", "mug,lamp", "--confusion", "x.png")):
        assert_refused(says, evaluation.main, refused)


@parametrize("asked, expected", [  # data set, data root, domain, up, precision
    ("--checkpoint last.pt", ("modelnet10", Path("/far"), "target", "y", "bf16")),
    ("--checkpoint last.pt --dataset modelnet40", ("modelnet40", Path("/far"), None, None, "bf16")),
    ("--checkpoint last.pt --data-root here --up z --domain source --precision fp32",
     ("modelnet10", Path("here"), "source", "z", "fp32")),
    # Not where the start was made.
    ("--start-checkpoint start.pt", ("modelnet10", Path("data"), "target", "y", "auto"))])
def test_a_checkpoint_is_evaluated_as_it_was_trained(asked, expected):
    trained = {"dataset": "modelnet10", "data_root": "/far", "domain": "target", "points": 99, "up": "y",
               "precision": "bf16"}
    chosen = evaluation.as_trained(evaluation.parse_args(asked.split()), trained)
    names = "dataset", "data_root", "domain", "up", "precision"
    assert tuple(getattr(chosen, name) for name in names) == expected and chosen.points == 99


def test_clouds_as_they_are_are_named_from_a_notebook():
    model = shipped([*NAMES[:3], "toilet"])
    chair, bed = data.sample_shapes(3, 0, points=2048).points[[2, 1]]
    far_bed = 0.8 * bed[:1500].double().numpy() + [4e6, 5e5, 3e2]  # at UTM coordinates
    named, probs = evaluation.classify(model, [chair, far_bed, 3 * chair[:1024] - 7, chair[:1024]])
    assert named == ["chair", "bed", "chair", "chair"] and probs.shape == (4, 4)
    assert (probs.amax(dim=1) > 0.9).all() and torch.allclose(probs[2], probs[3], atol=1e-3)
    batch, _ = evaluation.classify(model, torch.stack([chair, bed]).numpy(), points=2048, views=2)
    assert batch == ["chair", "bed"]
    for cloud, says in ((chair[:, :2], r"cloud 0 has the shape \(2048, 2\)"),
                        (chair / 0, "object 0 has NaN"),
                        (torch.ones(2000, 3), "object 0 has all its points in one place")):
        assert_refused(says, evaluation.classify, model, [cloud])
    assert_refused("expected a list", evaluation.classify, model, chair)


def test_the_start_in_the_repository_names_files_or_says_which_are_broken(tmp_path, capsys):
    chair, broken, empty = (tmp_path / name for name in ("chair.npy", "broken.obj", "empty.txt"))
    assert TINY_START.stat().st_size < 3e6
    known = starts.read_start(TINY_START)["options"]  # what made it
    assert {"seed", "commit", "torch", "code"} <= known.keys()
    assert (known["model"], known["points"], known["groups"]) == ("tiny", 1024, 32)
    np.save(chair, data.sample_shapes(3, 0).points[2])
    broken.write_text("hello\n")
    empty.touch()
    asked = ["--model", "tiny", "--classes", "chair,toillet", "--device", "cpu"]
    assert evaluation.main([*asked, str(chair)])["objects"] == 1
    said = capsys.readouterr()
    assert re.fullmatch(rf"{chair}: chair [01]\.\d{{4}} \(image: .*, point: chair .*\)\n", said.out)
    assert "toillet (did you mean toilet?)" in said.err
    bad = [str(broken), str(empty)]
    says = f"2 of 3 files cannot be used:\n  cannot read {broken}: .*\n  cannot read {empty}"
    assert_refused(says, evaluation.main, [*asked, str(chair), *bad])
    assert_refused("--classes", evaluation.main, ["--model", "tiny", str(chair)])


# ------ documents -------------------------------------------------------------------------------------------


def test_the_readme_agrees_with_the_code():
    files = [*HERE.glob("*.py"), *HERE.glob("support/*.py"), *HERE.glob("tools/*.py")]
    code = "".join(file.read_text(encoding="utf-8") for file in files if "test_" not in file.name)
    cited, rows = set(re.findall(r"\bD\d+\b", code)), set(re.findall(r"^\| (D\d+) ", README, re.M))
    assert cited and cited <= rows, cited - rows
    for tag in ("image-encoder", "point-encoder", "classifier", "ema", "joint-label", "self-training", "mim",
                "fairness", "mpm", "gl-align", "cross-align", "pretrain"):
        assert f"[{tag}]" in code and f"`{tag}`" in README, tag
    flags = set(re.findall(r'\("(--[a-z-]+)"', code)) | {"--help"}
    named = " ".join(re.findall(r"(?:`(?=--)|train\.py|eval\.py|tools\.\w+)([^`\n]*)", README))
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", named):
        assert flag in flags or flag.replace("--no-", "--") in flags, flag
    for module, name in re.findall(r"`(losses|model|data|eval|train)\.(?!py)(\w+)", README):
        assert hasattr(sys.modules[module], name), f"{module}.{name}"


def test_the_readmes_diff_applies_to_train_py():
    source = (HERE / "train.py").read_text()
    diff = README.split("```diff\n")[1].split("```")[0].splitlines(keepends=True)
    added = [line[1:] for line in diff if line[0] == "+"]
    if all(line in source for line in added):
        return  # a fork that has applied it
    above = ""
    for line in diff:
        sign, text = line[0], line[1:]
        if sign == "+":  # below the line before
            source = source.replace(above, above + text)
        assert source.count(text) == 1, text
        above = text
    for line in diff:
        if line[0] == "-":
            source = source.replace(line[1:], "")
    compile(source, "train.py", "exec")


def test_the_readmes_hyper_parameters_are_the_defaults():
    table = README.split("### Hyper-parameters")[1].split("\n## ")[0]
    columns = [train.parse_args(argv.split()) for argv in (
        "--dataset modelnet40", "--dataset modelnet10 --model tiny", "--dataset shapes")]
    named = set()
    for line in re.findall(r"^\| (`--.*) \|$", table, re.M):
        head, *cells = line.split(" | ")
        names = re.findall(r"`--([a-z-]+)`", head.split(";")[0])
        named |= set(names)
        for cell, args in zip(cells, columns, strict=True):
            values = [getattr(args, name.replace("-", "_")) for name in names]
            values = [value[0] if isinstance(value, list) else value for value in values]
            written = re.findall(r"[0-9.]+(?:e-[0-9]+)?", cell)
            written = written[-1:] if "`shapes`" in cell else written[:len(values)]
            assert cell == "the same" or [*map(float, written)] == values, (head, cell)
    assert len(named) == 14
    for argv, option, said in ((["--dataset", str(HERE), "--model", "tiny"], "epochs", "own folder {}"),
                               (["--dataset", "co3d"], "epochs", "CO3D {}"),
                               (["--dataset", "redwood"], "batch_size", "Redwood {}")):
        assert said.format(getattr(train.parse_args(argv), option)) in table
