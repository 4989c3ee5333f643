"""What is practical: files, layouts, fetching, starts, pictures, tools. CPU, no network, no weights."""
import argparse
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import unicodedata
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock, call

import filelock
import h5py
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import trimesh
from PIL import Image

try:
    import resource  # not on Windows
except ImportError:
    resource = None

import data
import eval as evaluation
import model as models
import train
from model import CrossMoST, build_model, farthest_point_sample, group_points, load_checkpoint
from support import (UserError, fetch, files, furniture, lock, parallel, pictures, published, resume, starts,
                     workers)
from support.transduction import similar_objects, transduced_labels
from test_crossmost import (CLOUD, HERE, LEANING, MODELNET, NAMES, assert_refused,  # noqa: F401
                            finished, inputs, needs_gpu, options, randomise, same, small_clip,
                            small_flags, write_own, write_pictures, write_ulip)
from tools import make_tables, measure_speed, pretrain


# ------ names from all objects together ---------------------------------------------------------------------
def clusters_with_wrong_texts(noise=0.1):
    """40 objects of name 0, 40 of name 1, none of name 2, and texts that name some of them wrongly.

    Returns the teacher's probabilities (80, 3), features of both modalities (80, 8), texts (3, 8), labels."""
    def directions(*degrees):
        angles = torch.tensor(degrees).deg2rad()
        return F.pad(torch.stack([angles.cos(), angles.sin()], dim=1), (0, 6))
    labels = torch.arange(80) // 40
    noisy = torch.randn(2, 80, 8, generator=torch.Generator().manual_seed(0))
    image, point = F.normalize(directions(0, 40)[labels] + noise * noisy, dim=-1)
    # The border between the first two texts runs through the objects of name 1. No object bears the third
    # text, which points to between the two clusters, but away from the plane they lie in.
    texts = directions(10, 70, 20)
    texts[2] = 0.7 * texts[2] + (1 - 0.7 ** 2) ** 0.5 * torch.eye(8)[4]
    return (4 * (image + point) @ texts.T).softmax(dim=-1), image, point, texts, labels


def test_objects_named_together_are_right_where_their_texts_are_not_and_an_absent_name_gets_none():
    *given, labels = clusters_with_wrong_texts()
    assert 0.5 < (given[0].argmax(dim=-1) == labels).double().mean() < 0.9
    for neighbours in (0, 3):
        z = transduced_labels(*given, neighbours=neighbours, temperature=5)  # of 8 dimensions, not of 512
        assert torch.equal(z.argmax(dim=-1), labels)
        assert z[:, 2].sum() < 1 and (z.sum(dim=-1) - 1).abs().max() < 1e-5


def test_naming_together_knows_no_order_and_no_parts_and_with_nothing_to_tell_it_is_the_teacher():
    probs, image, point, texts, _ = clusters_with_wrong_texts(noise=0.3)
    named = partial(transduced_labels, texts=texts, temperature=5)
    z = named(probs, image, point)
    assert (z - probs).abs().max() > 0.5  # else what follows would say little
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    assert (named(probs[order], image[order], point[order]) - z[order]).abs().max() < 1e-4
    assert all((named(probs, image, point, part=part) - z).abs().max() < 1e-4 for part in (1, 7, 80))
    unmoved = transduced_labels(probs, image, point, texts, neighbours=0, temperature=math.inf)
    assert (unmoved - probs).abs().max() < 1e-6
    for few in (1, 2):  # fewer objects than neighbours
        assert named(probs[:few], image[:few], point[:few]).isfinite().all()


def test_a_neighbour_votes_by_its_similarity_in_both_directions():
    # In the plane at 0, 10, 30 and 100 degrees; the one neighbour of each: 1, 0, 1 and 2.
    angles = torch.tensor([0.0, 10.0, 30.0, 100.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1).expand(2, 4, 2)
    w = torch.zeros(4, 4, dtype=torch.float64)
    for i, j, between in ((0, 1, 10), (1, 0, 10), (2, 1, 20), (3, 2, 70)):
        w[i, j] = math.cos(math.radians(between))
    z = torch.rand(4, 3)
    for part in (1, 3, 4):
        votes = similar_objects(features, 1, part) @ z
        assert (votes - (w + w.T) @ z.double()).abs().max() < 1e-6


# ------ the GPU's kernel ------------------------------------------------------------------------------------
def test_the_gpus_kernel_chooses_the_points_the_loop_chooses(tmp_path):
    """Triton's interpreter runs it on a CPU. It has to be asked for before Triton is imported."""
    pytest.importorskip("triton")
    (tmp_path / "compare.py").write_text(textwrap.dedent("""
        import torch
        from model import farthest_point_kernel, farthest_point_sample, launch_farthest_points
        kernel = farthest_point_kernel(torch.device("cpu"))
        for size in ((3, 64, 20), (2, 100, 40), (1, 2049, 9), (1, 1, 1), (2, 7, 7), (2, 33, 1)):
            batch, total, count = size
            torch.manual_seed(total)
            cloud = torch.randn(batch, total, 3)
            turned = torch.randn(batch, 3, total).transpose(1, 2)  # not contiguous
            for points in (cloud, turned, (2 * cloud).round(), cloud.round().clamp(-1, 1), 0 * cloud):  # ties
                chosen = launch_farthest_points(kernel, points, count)
                assert torch.equal(chosen, farthest_point_sample(points, count)), size
        print("equal")
    """))
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, tmp_path / "compare.py"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.stdout == "equal\n" and "warning" not in ran.stderr, ran.stderr[-2000:]


def test_the_loop_takes_the_first_of_equally_far_points_and_the_place_of_a_kernel_that_is_not_there(
        monkeypatch, capsys):
    corners = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]]]).repeat(1, 40, 1)
    # Four corners, forty times each, are equally far; at last every point lies on one of the chosen.
    assert farthest_point_sample(corners, 6).tolist() == [[0, 1, 2, 3, 4, 0]]
    monkeypatch.setitem(sys.modules, "triton", None)  # as on Windows
    assert models.farthest_point_kernel.__wrapped__(torch.device("cpu")) is None
    assert "slower (ModuleNotFoundError" in capsys.readouterr().err


@needs_gpu
@pytest.mark.parametrize("total, count", [(2048, 512), (2048, 64), (8192, 512), (10000, 64), (100, 100)])
def test_on_a_gpu_one_launch_chooses_the_points_the_loop_chooses(monkeypatch, total, count):
    clouds = data.to_unit_sphere(data.sample_shapes(32, 0, points=total).points).cuda()
    assert models.farthest_point_kernel(clouds.device)
    for points in (clouds, (20 * clouds).round()):  # and with ties
        chosen = farthest_point_sample(points, count)
        assert torch.equal(chosen.cpu(), farthest_point_sample(points.cpu(), count))
        with monkeypatch.context() as patch:
            patch.setattr(models, "farthest_point_kernel", lambda device: None)
            assert torch.equal(chosen, farthest_point_sample(points, count))


# ------ starts ----------------------------------------------------------------------------------------------
def test_a_ulip_file_is_a_complete_start_whichever_numpy_wrote_it(tmp_path):
    image, text, state = write_ulip(tmp_path / "ulip.pt")
    ours, our_text = models.load_start(tmp_path / "ulip.pt", groups=16, group_size=8)
    images, points = torch.randn(3, 3, 32, 32), inputs()[1]
    expected = image.forward_features(images)[:, 0] @ state["image_projection"]
    assert torch.allclose(ours.eval().visual(images)[0], expected, rtol=1e-4, atol=1e-5)
    tokens = open_clip.tokenize(["a night stand.", "a chair"])
    assert torch.allclose(our_text.tower(tokens), text(tokens), rtol=1e-4, atol=1e-5)
    # A hidden patch keeps its value: the mask token without the bias that moved into the positions.
    patches = image.patch_embed(images) * 0
    blind = image.norm(image.blocks(image._pos_embed(patches)))[:, 0] @ state["image_projection"]
    hidden = ours.visual(images, torch.ones(3, 16, dtype=torch.bool))[0]
    assert torch.allclose(hidden, blind, rtol=1e-4, atol=1e-5)
    # These weights know clouds that are y up; ours are z up.
    assert torch.equal(ours.group(points).centres, group_points(points[..., [1, 2, 0]], 16, 8).centres)
    assert ours.architecture["mean"] == list(open_clip.constants.IMAGENET_MEAN)
    with zipfile.ZipFile(tmp_path / "ulip.pt") as file:
        members = {name: file.read(name) for name in file.namelist()}
    for module in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        members["ulip/data.pkl"] = re.sub(rb"numpy\.\w+\.multiarray", module, members["ulip/data.pkl"])
        content = starts.read_file(write_zip(tmp_path / "either.pt", members))
        assert content["best_acc1"] == 60.3 and content["args"].lr == 1 and content["kinds"] == [np.float32]


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(str(name), content)
    return path


def test_a_checkpoint_of_a_stranger_runs_no_code_and_what_does_not_fit_is_named_with_its_keys(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    torch.save({"architecture": Evil(), "teacher": {}}, tmp_path / "evil.pt")
    whole = (tmp_path / "evil.pt").read_bytes()
    torch.save({"weights": 1}, tmp_path / "other.pt")
    torch.save({"folder": HERE}, tmp_path / "foreign.pt")
    for name, content, says in (
            ("evil.pt", None, r" holds \w+\.system, which could run code"),
            ("nowhere.pt", None, "; a run's checkpoint is OUT/last.pt, and README"),
            ("foreign.pt", None, r" holds pathlib\.\S*Path, which"), ("other.pt", None, "no known family"),
            ("cut.pt", whole[:200], " is no checkpoint, or only a part"), ("empty.pt", b"", " is no checkpo"),
            ("README.md", b"# A project", " is no checkpoint")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        said = assert_refused(f"{name}.*{says}", load_checkpoint, tmp_path / name)
        assert "weights_only" not in said  # torch's advice to load unsafely
    np.save(tmp_path / "evil.npy", np.array([Evil()]), allow_pickle=True)
    assert_refused("evil.npy", files.read_object, tmp_path / "evil.npy", 1)
    assert not (tmp_path / "ran").exists()
    state, cut = write_ulip(tmp_path / "ulip.pt")[2], dict(groups=16, group_size=8)
    for key, value, says in (("ppat.transformer.layers.0.w", torch.zeros(1), "OpenShape's"),
                             ("point_encoder.trans2embed.weight", torch.zeros(1), "Uni3D's"),
                             ("pc_projection", torch.zeros(64, 32), "mismatch for pc_projection"),
                             ("visual.extra", torch.zeros(1), "Unexpected key.*visual.extra"),
                             ("point_encoder.norm.bias", None, "Missing key.*norm.bias"),
                             ("point_encoder.reduce_dim.weight", None, "no known family")):
        odd = {k: v for k, v in {**state, key: value}.items() if v is not None}
        torch.save({"state_dict": odd}, tmp_path / "odd.pt")
        assert_refused(f"(?s)odd.pt.*{says}", load_checkpoint, tmp_path / "odd.pt", **cut)


def test_the_cross_most_start_and_its_trained_checkpoint_load(tmp_path, finished):
    image = dict(image_size=32, patch_size=8, width=64, layers=2, heads=1, quick_gelu=True)
    model = randomise(CrossMoST(32, image, dict(width=64, layers=3, heads=1, token_width=32)))
    state = {**model.state_dict()}
    state["image_projection"] = state.pop("visual.proj")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "random.pt")
    cut = dict(groups=16, group_size=8)
    start = load_checkpoint(tmp_path / "random.pt", **cut)
    assert same(start.state_dict(), model.state_dict()) and start.classifier is None
    for classes in (7, 10):
        state["classifier"] = torch.randn(32, classes)
        student = {**state, "logit_scale": torch.tensor(9.0)}
        torch.save({"model": student, "model_ema": state}, tmp_path / f"{classes}.pth")
    load = partial(load_checkpoint, tmp_path / "7.pth", **cut)
    assert load(which="student").logit_scale == 9 != load().logit_scale and len(load().class_names) == 7
    argv = [*small_flags(finished[0])[:8], "--checkpoint"]  # its data, 128 points, two views
    assert_refused("evaluate a checkpoint on the data set", evaluation.main, [*argv, str(tmp_path / "7.pth")])
    found = evaluation.main([*argv, str(tmp_path / "10.pth")])  # it has numbers for names
    assert set(found["teacher"]["per_class"]) == set(NAMES)


def test_an_open_clip_model_lends_its_towers_to_a_file_without(tmp_path, small_clip):
    write_ulip(tmp_path / "rgb.pt", channels=6, embed=256, towers=False)
    assert_refused("point encoder only", load_checkpoint, tmp_path / "rgb.pt")
    point = dict(groups=16, group_size=8)
    clip, text = models.open_clip_start(small_clip, None, **point)
    model = build_model(small_clip, ["mug"], models.TEMPLATES["3d"], None, tmp_path / "rgb.pt", **point)
    assert same(model.visual.state_dict(), clip.visual.state_dict()) and model.point_encoder.channels == 6
    torch.manual_seed(0)  # which stands for trained weights
    theirs = open_clip.create_model(small_clip, None, force_custom_text=True).visual.state_dict()
    assert all(torch.equal(model.visual.state_dict()[name], value) for name, value in theirs.items())
    names = models.embed_names(text, ["mug"], models.TEMPLATES["3d"])
    assert torch.allclose(model.classifier.T, names, atol=1e-6)
    groups = model.group(inputs()[1])
    coloured = torch.cat([groups.neighbourhoods, torch.full_like(groups.neighbourhoods, 0.4)], dim=-1)
    tokens = model.point_encoder.reduce_dim(model.point_encoder.encoder(coloured))
    assert torch.allclose(model.point_encoder(groups)[2], tokens, atol=1e-5)


def test_names_are_embedded_in_batches_as_one_by_one_where_the_model_is(monkeypatch, small_clip):
    text, templates = models.random_tiny(0)[1].eval(), models.TEMPLATES["openai"]
    names = [f"{a} {b}" for a in NAMES for b in ("", "lamp", "made of very old wood, with handles")]
    one_by_one = [F.normalize(text([t.format(name) for t in templates]).mean(dim=0), dim=0) for name in names]
    assert torch.allclose(models.embed_names(text, names, templates), torch.stack(one_by_one), atol=1e-6)
    _, clip = models.open_clip_start(small_clip, None)
    tokens = clip.tokenize(["a chair", "a point cloud model of a night stand."])
    assert torch.allclose(models.text_features(clip.tower, tokens), F.normalize(clip.tower(tokens), dim=-1),
                          atol=1e-6)
    embed = Mock(return_value=torch.rand(10, 128))  # which sees the tower where the model is to be
    monkeypatch.setattr(models, "embed_names", embed)
    model = build_model("tiny", NAMES, templates, device="meta")
    there = [*model.parameters(), *model.buffers(), *embed.call_args.args[0].tower.parameters()]
    assert {value.device.type for value in there} == {"meta"}


# ------ fetching, locks -------------------------------------------------------------------------------------
def test_a_file_comes_from_the_first_source_that_gives_it_or_one_line_says_what_to_do(tmp_path, monkeypatch):
    path, gone, right = (tmp_path / name for name in ("to/toy.bin", "gone", "right"))
    right.write_text("right")
    hub = Mock(return_value=right)  # a file in its own cache
    monkeypatch.setattr(fetch, "hf_hub_download", hub)
    row = dict(file="toy.bin", sources=[("a/b", "c/file", "main"), gone.as_uri(), right.as_uri()],
               terms="free", sha256=hashlib.sha256(b"right").hexdigest())
    monkeypatch.setitem(fetch.FILES, "toy", row)
    fetch_toy = partial(fetch.fetch, "toy", path.parent)
    assert_refused("toy.bin is missing; leave out --no-download, or save", fetch_toy, allowed=False)
    assert fetch_toy() == right  # what the hub's cache has needs no network
    assert hub.call_args == call("a/b", "c/file", repo_type="dataset", revision="main", local_files_only=True)
    hub.side_effect = OSError("not in the cache")
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "get_hf_file_metadata", Mock(side_effect=OSError("out of reach")))
        assert fetch_toy() == path and path.read_text() == "right"
        assert fetch_toy(allowed=False) == path  # it is there now
        path.unlink()
        right.write_text("wrong")
        assert_refused(f"out of reach.*gone.*invalid hash.*save https.*a/b/blob/main/c/file as {path}, or "
                       "name the folder that has it with --data-root", fetch_toy)
    assert not path.exists()
    monkeypatch.undo()
    monkeypatch.setattr(fetch.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(fetch.constants, "ENDPOINT", "https://mirror.org")
    began = time.perf_counter()
    for name, says in (("ulip2", "offline mode.*save https://mirror.org/datasets/SFXX/ulip/.* as "
                                 f"{tmp_path}/ULIP.*with --cache; .*--model tiny"),
                       ("scanobjectnn", f"OFFLINE is set.*as {tmp_path}/h5_files.zip.*--data-root")):
        said = assert_refused(says, fetch.fetch, name, tmp_path)
        assert "\n" not in said and "('" not in said
    assert time.perf_counter() - began < 5  # five retries took half a minute


def test_an_archive_is_unpacked_once_inside_its_folder_and_whole_or_not_at_all(tmp_path, monkeypatch):
    folder, broken = tmp_path / "root/set", tmp_path / "broken.zip"
    members = {f"set/{k}.txt": str(k) for k in range(300)} | {"../out.txt": "2", "set/../../out.txt": "3"}
    odd = write_zip(tmp_path / "odd.zip", members)
    broken.write_bytes(odd.read_bytes()[:60])
    assert_refused("cannot unpack .*broken.zip", fetch.unpack, broken, folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", None)  # as if the process ended before
        assert_refused("TypeError", fetch.unpack, odd, folder)
    assert not folder.exists() and not list(tmp_path.rglob("*.txt"))
    with ThreadPoolExecutor() as pool:  # the second thread waits, and finds it there
        assert [*pool.map(fetch.unpack, 2 * [odd], 2 * [folder])] == [None, None]
    assert (folder / "1.txt").read_text() == "1"
    assert all(folder in path.parents for path in tmp_path.rglob("*.txt"))
    (tmp_path / "link").symlink_to("/tmp")
    for name, inside, says in (("root/set", "../out", "Outside"), ("link", "set/link", "Absolute"),
                               ("root/set", "set", None)):
        with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as file:
            file.add(tmp_path / name, inside)
        unpack = partial(fetch.unpack, tmp_path / "all.tar.gz", tmp_path / "new/set")
        if says:
            assert_refused(f"cannot unpack .*all.tar.gz.*{says}", unpack)
        else:
            monkeypatch.delattr(tarfile, "data_filter")  # an old Python
            assert_refused("take Python 3.11.4 or newer, or unpack it by hand", unpack)
            monkeypatch.undo()
            unpack()
        assert (tmp_path / "new/set/1.txt").exists() == (says is None) and not (tmp_path / "new/out").exists()


@pytest.mark.skipif(not MODELNET.exists(), reason="needs the real ModelNet40")
def test_the_real_modelnet_has_its_counts_and_stands_upright_also_resampled():
    forty, ten = (data.load_dataset(name, MODELNET.parent, "test") for name in ("modelnet40", "modelnet10"))
    assert (len(forty), len(forty.class_names), len(ten), ten.class_names) == (2468, 40, 908, NAMES)
    assert forty.labels.bincount().max() == 100 and len(ten.names) == 908
    assert (ten.points[ten.labels == 8][..., 2] > 0).float().mean() > 0.55  # most of a table is its top
    low, high = forty.points[forty.labels == 0].aminmax(dim=1)
    assert (high - low).mean(dim=0).argmin() == 2  # and aeroplanes are flat
    for path in (MODELNET.parent / "samples/normal_resampled").iterdir():
        same_object = forty.points[forty.names.index(path.stem)]
        cloud = data.to_unit_sphere(torch.from_numpy(published.read_texts([path], "")[:, :8192]))[0]
        far = [torch.cdist(same_object, turned).amin(dim=1).mean() for turned in (
            cloud, cloud * torch.tensor([-1, -1, 1]), cloud[:, [1, 0, 2]] * torch.tensor([1, -1, 1]))]
        assert cloud.shape == (8192, 3) and far[0] < 0.03 and far[0] == min(far)


def test_objects_cast_what_a_loader_gives_and_keep_the_digits_of_a_far_away_set(tmp_path):
    for points in (CLOUD.double(), CLOUD.double().numpy(), CLOUD.tolist(), list(CLOUD.numpy()), list(CLOUD)):
        objects = data.Objects(points, np.array([1], np.uint8), ["a", "b"])
        assert torch.equal(objects.points, CLOUD) and objects.points.dtype == torch.float32
        assert torch.equal(objects.labels, torch.tensor([1])) and objects.labels.dtype == torch.int64
    far = LEANING[None, :64].astype(np.float64) + [4e5, 5.5e6, 300]  # metres of a map: float32 has halves
    assert torch.allclose(data.to_unit_sphere(torch.from_numpy(far)), CLOUD, atol=1e-6)
    with h5py.File(tmp_path / "far.h5", "w") as file:
        file.update(data=far, label=[0])
    clouds = published.read_h5(tmp_path / "far.h5", 1)[0]
    assert clouds.dtype == torch.float32 and torch.allclose(data.to_unit_sphere(clouds), CLOUD, atol=1e-5)


@pytest.mark.parametrize("error", [NotImplementedError("no flock here"), OSError(30, "Read-only disk")])
def test_a_lock_that_the_file_system_does_not_know_is_one_line(tmp_path, monkeypatch, error):
    monkeypatch.setattr(filelock.FileLock, "acquire", Mock(side_effect=error))
    for held in (lock(tmp_path / "set"), parallel.only_writer(tmp_path / "out")):
        assert_refused(f"cannot lock {tmp_path}.* .*; choose a folder on another disk", held.__enter__)


# ------ furniture -------------------------------------------------------------------------------------------
def test_shapes_are_the_same_for_a_seed_and_made_of_surfaces_and_a_scan_is_one_sided():
    for domain in ("source", "target"):
        a, b, c = (data.sample_shapes(20, seed, domain, points=300) for seed in (5, 5, 6))
        assert torch.equal(a.points, b.points) and not torch.equal(a.points, c.points)
        assert a.points.shape == (20, 300, 3) and a.labels.tolist() == [i % 10 for i in range(20)]
        assert torch.allclose(a.points.norm(dim=-1).amax(dim=1), torch.ones(20), atol=1e-5)
        assert torch.allclose(a.points.mean(dim=1), torch.zeros(20, 3), atol=1e-5)
    for kind, above in (("box", 0.5), ("tube", 0.5), ("ball", 0.5), ("bowl", 0.0)):
        solid = furniture.part(kind, (0, 0, 5), (2, 2, 2))
        points = furniture.sample_parts(solid, 4000, np.random.default_rng(0)) - [0, 0, 5]
        flat, up = np.hypot(*points.T[:2]), np.abs(points[:, 2])
        radius = {"box": np.abs(points).max(axis=1), "tube": np.maximum(flat, up)}
        assert np.allclose(radius.get(kind, np.hypot(flat, up)), 1)
        assert (points[:, 2] > 1e-9).mean() == pytest.approx(above, abs=0.04)
    torch.manual_seed(0)
    shell = F.normalize(torch.randn(20, 6000, 3), dim=-1)
    angle = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.5]])
    outer, inner = data.seen_from(torch.cat([shell[:1], 0.5 * shell[:1]], dim=1), *angle).split(6000, dim=2)
    depth = data.project(shell[:1], *angle)[2]  # a camera sees the near half of a sphere
    assert outer[depth > 0.5].all() and not outer[depth < -0.2].any() and inner.float().mean() < 0.02
    low, high = data.scan(shell, 2000, seed=0).aminmax(dim=1)  # its mean is 0
    assert ((low + high) / 2)[:, :2].norm(dim=-1).mean() > 0.07  # a whole sphere's middle lies in its mean


@pytest.mark.parametrize("domain, expected", [("source", "6da010e89ddf9284"), ("target", "b0bea5ac40c31780")])
def test_shapes_are_the_same_with_every_numpy(domain, expected):
    """Equal to the bit with 1.26.4, 2.0.2, 2.2.6 and 2.4.6. Rounded here: other processors differ in the last
    digits of a sine. If this fails, NumPy's Generator draws other numbers, and tables and tiny.pt are old."""
    points = data.sample_shapes(10, 0, domain, points=64).points[:, :16]
    thousandths = (points * 1000).round().to(torch.int32).numpy()
    assert hashlib.sha256(thousandths.tobytes()).hexdigest()[:16] == expected, np.__version__


# ------ layouts of data sets --------------------------------------------------------------------------------
def write_h5(path, labels, clouds=1, **more):
    """An h5 file of LEANING times `clouds`, larger from object to object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    larger = np.arange(1, len(labels) + 1, dtype="f4")[:, None, None]
    with h5py.File(path, "w") as file:
        file.update(data=LEANING[:64] * larger * clouds, label=np.array(labels), **more)


def write_modelnet(root):
    folder = root / "modelnet40_ply_hdf5_2048"
    for split, files_of_split in {"train": "01", "test": "0"}.items():
        names = [f"ply_data_{split}{number}.h5" for number in files_of_split]
        for name in names:
            write_h5(folder / name, np.arange(12)[:, None] % 11)
        (folder / f"{split}_files.txt").write_text("".join(f"data/any/{name}\n" for name in names))
    (folder / "shape_names.txt").write_text("\n".join(["airplane", *NAMES]).replace(" ", "_"))
    return folder


def test_modelnet_is_read_in_the_h5_layout_and_pointnets_own_files_are_turned_and_named(tmp_path):
    folder = write_modelnet(tmp_path)
    load = partial(data.load_dataset, root=tmp_path, split="test", points=50)
    ten, plain, scanned = load("modelnet10"), load("modelnet40"), load("modelnet10", domain="target")
    assert plain.points.shape == (12, 50, 3) and plain.labels.tolist() == [*range(11), 0]
    assert ten.class_names == NAMES and ten.labels.tolist() == list(range(10))  # without two airplanes
    assert scanned.name == "modelnet10-target" and not torch.equal(scanned.points, ten.points)
    assert_refused("has 64 points, --points is 65; lower it", load, "modelnet40", points=65)
    (folder / "views").mkdir()
    assert_refused("views has no picture of any object", load, "modelnet40")  # they have no names
    listed = json.dumps([f"airplane/plane_{i}.ply" for i in range(12)])
    (folder / "ply_data_test_0_id2file.json").write_text(listed)
    assert load("modelnet40-depth").names[3] == "plane_3" and plain.names[3] == "3"
    write_h5(folder / "ply_data_test0.h5", np.arange(12) % 11, normal=np.zeros((12, 64, 3)),
             name=[f"object_{i}".encode() for i in range(12)])
    for i in range(12):
        write_pictures(folder / f"views/airplane/object_{i}", "v0.png", "v1.png")
    objects, ten = load("modelnet40"), load("modelnet10")
    assert torch.allclose(objects.points, plain.points[..., [2, 0, 1]], atol=1e-6)
    assert objects.names[3] == "object_3" and [len(paths) for paths in objects.images] == [2] * 12
    assert load("modelnet40-depth").images is None
    assert ten.names == [f"object_{i}" for i in range(1, 11)] and len(ten.images) == 10
    assert_named_if_broken(folder / "ply_data_test0.h5", lambda path: published.read_h5(path, 11)[0][0])


def assert_named_if_broken(path, read):
    """Cut off or changed anywhere, a file is read or an error names it. Ten thousand were tried once."""
    chance, whole = np.random.default_rng(0), np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(20):
        broken = whole.copy()
        broken[chance.integers(len(broken), size=4)] = chance.integers(256, size=4)
        path.write_bytes(broken[:chance.integers(2 * len(broken))].tobytes())
        try:
            read(path)
        except (UserError, OSError) as error:
            assert path.name in str(error)


def write_resampled(root):
    """modelnet40_normal_resampled, 2,100 points an object: LEANING's likes, larger from object to object."""
    folder = root / "modelnet40_normal_resampled"
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    names = {"train": ["airplane_0001", "night_stand_0001", "night_stand_0002"],
             "test": ["bed_0516", "airplane_7"]}
    for split, listed in names.items():
        (folder / f"modelnet40_{split}.txt").write_text("\n".join(listed) + "\n")
        for k, name in enumerate(listed):
            owner = folder / name.rpartition("_")[0]
            owner.mkdir(exist_ok=True)
            cloud = chance.random((2100, 6)) ** [1, 2, 3, 1, 1, 1] * [4, 2, 1, 1, 1, 1] * (k + 1)
            np.savetxt(owner / f"{name}.txt", cloud, "%.6f", delimiter=",")
    (folder / "modelnet40_shape_names.txt").write_text("\n".join(["airplane", *NAMES]).replace(" ", "_"))
    return folder


@pytest.mark.parametrize("inside", ["modelnet40_normal_resampled", "."])
def test_8192_points_of_modelnet_are_fetched_once_and_read_once(tmp_path, monkeypatch, capsys, inside):
    made, root = write_resampled(tmp_path / "made"), tmp_path / "root"
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as file:
        file.add(made, inside)
    hub = Mock(return_value=str(tmp_path / "all.tar.gz"))
    monkeypatch.setattr(fetch, "get_hf_file_metadata", Mock())
    monkeypatch.setattr(fetch, "hf_hub_download", hub)
    load, folder = partial(data.load_dataset, root=root, points=2100), root / "modelnet40_normal_resampled"
    train, test = load("modelnet40", split="train"), load("modelnet40", split="test")
    ten = load("modelnet10", split="train")
    assert hub.call_count == 1 and hub.call_args.args[0] == "Pointcept/modelnet40_normal_resampled-compressed"
    assert train.names == ["airplane_0001", "night_stand_0001", "night_stand_0002"]
    assert test.names == ["bed_0516", "airplane_7"] and test.class_names == ["airplane", *NAMES]
    assert train.labels.tolist() == [0, 7, 7] and test.labels.tolist() == [2, 0]
    assert ten.labels.tolist() == [6, 6] and ten.class_names == NAMES and ten.names == train.names[1:]
    x, y, z = torch.from_numpy(np.loadtxt(made / "bed/bed_0516.txt", delimiter=",")).T[:3]
    expected = data.to_unit_sphere(torch.stack([-x, z, y], dim=1)[None])[0]
    assert torch.allclose(test.points[0], expected, atol=1e-5) and torch.equal(ten.points, train.points[1:])
    assert "fetching modelnet40_normal_resampled.tar.gz (1.6 GB" in capsys.readouterr().out
    for owner in ("airplane", "bed", "night_stand"):  # what was read once is not read again
        shutil.rmtree(folder / owner)
    write_pictures(folder / "views/bed/bed_0516", "shaded_v001.png")
    again = load("modelnet40", split="test", download=False)
    assert torch.equal(again.points, test.points) and [len(paths) for paths in again.images] == [1, 0]
    assert_refused("modelnet40_ply_hdf5_2048.zip is missing; leave out --no-download, or save https", load,
                   "modelnet40-depth", split="test", download=False)
    write_modelnet(root)  # up to 2,048 points, and always for depth views
    assert load("modelnet40", split="test", points=64).points.shape == (12, 64, 3)
    assert_refused("modelnet40-depth has 64 points", load, "modelnet40-depth", split="test")


def test_what_was_read_is_cached_whole_or_not_at_all_beside_its_folder_or_elsewhere(tmp_path, monkeypatch):
    folder, cache = write_resampled(tmp_path), tmp_path / "cache"
    load = partial(data.load_dataset, "modelnet40", tmp_path, "test", 2100, download=False, cache=cache)
    for file, content, says in (
            ("bed/bed_0516.txt", None, "no .*bed_0516.txt; --points 2048 reads modelnet40_ply_hdf5_2048"),
            ("bed/bed_0516.txt", "1,2,3\n1,2\n", "cannot read .*bed_0516.txt.*; expected lines x,y,z"),
            ("airplane/airplane_7.txt", "1,2,3\n", "cannot read .*_7.txt: it has 1 points, the others 2100"),
            ("modelnet40_test.txt", "sofa-1\n", "cannot read .*_test.txt.*; expected names CLASS_NUMBER")):
        whole = (folder / file).read_text()
        (folder / file).unlink() if content is None else (folder / file).write_text(content)
        assert_refused(says, load)
        assert not list(tmp_path.rglob("*.h5"))
        (folder / file).write_text(whole)
    assert load().names == ["bed_0516", "airplane_7"] and len(list(tmp_path.glob("*.h5"))) == 1
    (folder / "modelnet40_test.txt").write_text("airplane_7\n")  # another list is another cache
    assert load().names == ["airplane_7"]
    monkeypatch.setattr(os, "access", lambda *_: False)  # a folder that may only be read
    (folder / "modelnet40_test.txt").write_text("bed_0516\n")
    assert load().names == ["bed_0516"] and len(list(cache.glob("*.h5"))) == 1
    shutil.rmtree(folder / "bed")  # what was read once is not read again
    assert load().names == ["bed_0516"]


def test_redwood_and_co3d_are_read_as_their_authors_tools_leave_them(tmp_path):
    ids = [f"{i:05d}" for i in range(60)]
    for folder in ("redwood/points", "redwood/meshes"):
        (tmp_path / folder).mkdir(parents=True)
    np.save(tmp_path / "redwood/points/00000.npy", LEANING[:64])
    cloud = trimesh.PointCloud(LEANING[:64])
    categories = {name: ids[k::9] for k, name in enumerate(data.REDWOOD)} | {"amp": ["7"]}
    (tmp_path / "redwood/categories.json").write_text(json.dumps(categories))
    for one in [*ids[1:-1], "7"]:  # without the first, which is a cloud, and the last; the amp is no class
        cloud.export(tmp_path / f"redwood/meshes/{one}.ply")
    for one in ids[::2]:
        write_pictures(tmp_path / "redwood/images" / one, "1.jpg", "2.jpg")
    for category in data.CO3D:
        for k in (0, 1):
            write_pictures(tmp_path / f"co3d/{category}/{category}_{k}/images", "a.jpg")
            cloud.export(tmp_path / f"co3d/{category}/{category}_{k}/pointcloud.ply")
    y_down = CLOUD[..., [0, 2, 1]] * torch.tensor([1, 1, -1])
    for name, count, classes, shots, stood, named in (
            ("redwood", 59, 9, {0, 2}, y_down, lambda name: data.REDWOOD[int(name) % 9]),
            ("co3d", 84, 42, {1}, y_down, lambda name: data.CO3D[name.split("_")[0]])):
        both = [data.load_dataset(name, tmp_path, split, 64) for split in ("train", "test")]
        assert len({*both[0].names, *both[1].names}) == count and len(both[0]) > len(both[1]) > 0
        for objects in both:
            assert [objects.class_names[k] for k in objects.labels] == list(map(named, objects.names))
            assert len(objects.class_names) == classes
            assert torch.allclose(objects.points, stood.expand(len(objects), -1, -1), atol=1e-5)
            for one, paths in zip(objects.names, objects.images or ()):
                assert len(paths) in shots and all(one in path.parts for path in paths)


def test_missing_data_sets_are_fetched_checked_unpacked_and_read(tmp_path, monkeypatch, capsys):
    root, made, top = tmp_path / "root", tmp_path / "made", tmp_path / "made/scanobjectnn/h5_files"
    write_modelnet(made / "modelnet40")
    for k, (folder, suffix) in enumerate((("main_split_nobg", ""), ("main_split", ""),
                                          ("main_split", "_augmentedrot_scale75"))):
        for part, count in (("training", 30 + k), ("test", 15 + k)):
            write_h5(top / folder / f"{part}_objectdataset{suffix}.h5", np.arange(count) % 15)
    for key in ("modelnet40", "scanobjectnn"):
        archive = Path(shutil.make_archive(tmp_path / key, "zip", made / key))
        changed = dict(sources=[archive.as_uri()], sha256=None)
        monkeypatch.setitem(fetch.FILES, key, fetch.FILES[key] | changed)
    for name, counts in (("modelnet40", (24, 12)), ("scanobjectnn-obj-only", (30, 15)),
                         ("scanobjectnn-with-bg", (31, 16)), ("scanobjectnn-hardest", (32, 17))):
        train, test = (data.load_dataset(name, root, split, points=64) for split in ("train", "test"))
        assert (len(train), len(test)) == counts
    assert test.labels.tolist() == [*range(15), 0, 1]
    assert test.class_names[:2] == ["bag", "bin"] and test.class_names[14] == "toilet"
    assert torch.allclose(test.points, CLOUD[..., [2, 0, 1]].expand(17, -1, -1), atol=1e-5)  # its y was up
    said = capsys.readouterr().out
    assert all(fetch.FILES[key]["terms"] in said for key in ("modelnet40", "scanobjectnn"))


@pytest.mark.parametrize("name, file, content, says", [  # in place of a file: None is nothing
    ("redwood", "", None, "no .*categories.json; github.com/isl-org/redwood-3dscan fetches"),
    ("co3d", "", None, "no .*pointcloud.ply; github.com/facebookresearch/co3d fetches"),
    ("scanobjectnn-hardest", "", None, "h5_files.zip is missing; leave out --no-download, or save http"),
    ("scanobjectnn-hardest", "../scanobjectnn/h5_files/a", b"x", "no .*test_objectdataset_augm.*_scale75.h5"),
    ("modelnet40", "shape_names.txt", None, "no .*shape_names.txt; README, \"Data sets\""),
    ("modelnet40", "test_files.txt", b"\n", "cannot read .*test_files.txt: it is empty"),
    ("modelnet40", "ply_data_test0.h5", dict(labels=[0, 200]), "has the label 200, expected 0 to 10"),
    ("modelnet40", "ply_data_test0.h5", dict(labels=[3, -1]), "has the label -1, expected 0 to 10"),
    ("modelnet40", "ply_data_test0.h5", dict(labels=[1], clouds=np.nan), "object 0 has NaN"),
    ("modelnet40", "ply_data_test0.h5", dict(labels=[1], clouds=0), "object 0 has all its points in one"),
    ("modelnet40", "ply_data_test_0_id2file.json", b'["a/1.txt", "a/2.txt"]',
     r"data \(12, 64, 3\), 12 labels, 2 names; expected")])
def test_bad_data_is_refused_by_its_name_and_with_advice(tmp_path, name, file, content, says):
    folder = write_modelnet(tmp_path) if name == "modelnet40" else tmp_path / name
    if isinstance(content, dict):
        write_h5(folder / file, **content)
    elif content is not None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    elif file:
        (folder / file).unlink()
    assert_refused(says, data.load_dataset, name, tmp_path, "test", 64, download=False)


# ------ files of a user's own: contents ---------------------------------------------------------------------
SOME = LEANING[:60].astype(np.float64).round(4)
FAR = 0.2 * SOME + [356789.4, 5812345.6, 41.2]  # metres on a map, where a float32 has steps of 0.5 m
TWO_BOXES = "two unit boxes, 5 apart"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def digits(values, form=".4f"):
    """Numbers (N, columns) as cells of text."""
    return [[f"{value:{form}}" for value in row] for row in np.asarray(values).reshape(len(values), -1)]


POINT = digits(SOME)
COMMA = [[cell.replace(".", ",") for cell in row] for row in POINT]
THOUSANDS = digits(1e4 * SOME + 5e4, ",.3f")  # 51,234.567
COLOURS = [[str(7 * i % 256), "180", "20"] for i in range(60)]
COUNT = [[str(i)] for i in range(60)]
CLOCK = [[f"{i + math.sin(i) / 3:.3f}"] for i in range(60)]
SHARE = digits(np.random.default_rng(1).random(60))  # as an intensity from 0 to 1
OTHER = digits(7 * np.random.default_rng(2).random(60))  # nothing tells this column from a coordinate
UNIT = digits(F.normalize(torch.randn(60, 3, generator=torch.Generator().manual_seed(3)), dim=1), ".6f")


def rows(*columns, between=",", head="", tail=""):
    """Columns of cells side by side as text, below a head and above a tail."""
    lines = [between.join(sum(cells, [])) for cells in zip(*columns)]
    return "\n".join([*([head] if head else []), *lines, tail])


def fields(**columns):
    """A structured array."""
    array = np.zeros(60, [(name, np.asarray(values).dtype) for name, values in columns.items()])
    for name, values in columns.items():
        array[name] = values
    return array


BOX = trimesh.creation.box((1, 1, 1))
QUADS = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
TWO = np.concatenate([BOX.vertices, BOX.vertices + [5, 0, 0]])
FACES = QUADS + [[corner + 8 for corner in face] for face in QUADS]
MIXED = BOX.faces.tolist() + FACES[6:]
TRIANGLES = np.concatenate([BOX.faces, BOX.faces + 8])


def obj(vertices, faces=(), tail=""):
    text = "".join("v {:.6f} {:.6f} {:.6f}\n".format(*vertex) for vertex in vertices)
    return text + "".join("f " + " ".join(str(i + 1) for i in face) + "\n" for face in faces) + tail


def off(vertices=TWO, faces=FACES, head="OFF\n", more=""):
    text = f"{head}{len(vertices)} {len(faces)} 0\n"
    text += "".join("{:.6f} {:.6f} {:.6f}{}\n".format(*vertex, more) for vertex in vertices)
    return text + "".join(" ".join(map(str, [len(face), *face])) + "\n" for face in faces)


def ply(faces, kind="binary_little_endian", vertices=TWO, element="face", comment=b"", count=None):
    """A PLY file of vertices and polygons."""
    head = f"element vertex {count or len(vertices)}\n"
    head += "property double x\nproperty double y\nproperty double z\n"
    head += f"element {element} {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    if kind == "ascii":
        lines = [*vertices, *([len(face), *face] for face in faces)]
        body = "".join(" ".join(map(str, line)) + "\n" for line in lines).encode()
    else:
        order = "<" if "little" in kind else ">"
        body = np.asarray(vertices).astype(f"{order}f8").tobytes()
        body += b"".join(bytes([len(face)]) + np.array(face, f"{order}i4").tobytes() for face in faces)
    return b"ply\nformat " + kind.encode() + b" 1.0\ncomment " + comment + b"\n" + head.encode() + body


def stl(binary=True, triangles=TRIANGLES, vertices=TWO):
    mesh = trimesh.Trimesh(vertices, triangles, process=False)
    return mesh.export(file_type="stl" if binary else "stl_ascii")


def glb(needs=None, change=lambda tree: None, **of_accessors):
    """Two unit boxes as .glb, its y up, whose JSON was edited."""
    raw = trimesh.Scene(trimesh.Trimesh(TWO[:, [1, 2, 0]], TRIANGLES, process=False)).export(file_type="glb")
    size = int.from_bytes(raw[12:16], "little")
    tree = json.loads(raw[20:20 + size])
    change(tree)
    tree["extensionsRequired"] = [needs] if needs else []
    for accessor in tree["accessors"]:
        for key, value in of_accessors.items():
            accessor.pop(key, None) if value is None else accessor.update({key: value})
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    total, length = ((len(raw) - size + len(text)).to_bytes(4, "little"), len(text).to_bytes(4, "little"))
    return raw[:8] + total + length + raw[16:20] + text + raw[20 + size:]


def test_what_points_upwards_in_a_file_is_along_z_without_a_mirror_image_and_areas_are_even(tmp_path):
    np.save(tmp_path / "a.npy", SOME)
    upright = files.read_object(tmp_path / "a.npy", 60)
    for up, axis, sign in (("z", 2, 1), ("y", 1, 1), ("-y", 1, -1)):
        turn = np.linalg.lstsq(upright, files.read_object(tmp_path / "a.npy", 60, up=up), rcond=None)[0]
        assert turn[axis] == pytest.approx([0, 0, sign], abs=1e-4) and np.linalg.det(turn) > 0.99
    tall = trimesh.creation.box((1, 4, 2))  # 4 upwards, as its axis y
    tall.export(tmp_path / "a.obj")
    trimesh.Scene(tall).export(tmp_path / "b.glb")
    for up, tallest in (("y", [2, 2]), ("z", [1, 2])):  # `up` is of the other formats
        clouds = files.read_objects([tmp_path / "a.obj", tmp_path / "b.glb"], 500, 500, up)
        assert np.ptp(clouds, axis=1).argmax(axis=1).tolist() == tallest
    corners, random = np.array([[0.0, 0, 0], [3, 0, 0], [0, 3, 0]]), np.random.default_rng(0)
    points = files.sample_surface(corners, np.array([[0, 1, 2]]), 20_000, random)
    assert points.mean(axis=0) == pytest.approx([1, 1, 0], abs=0.02)
    assert (points[:, :2] > 1).all(axis=1).mean() == pytest.approx(1 / 9, abs=0.01)  # of nine equal triangles


CLOUD_OBJ = obj(SOME)
ELL = [[0, 0, 0], [3, 0, 0], [3, 1, 0], [1, 1, 0], [1, 3, 0], [0, 3, 0]]
BOWTIE = [[0, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0]]
FEW = [[i, i + 1, i + 2] for i in range(0, 57, 3)]
SEVERAL = LEANING[:100].reshape(2, 50, 3)
# A name, what is in the file, and what comes of it: the points of a cloud, TWO_BOXES, or what is said.
CASES = [
    # Text that is read.
    ("commas.txt", rows(POINT), SOME),
    ("blanks.xyz", rows(POINT, between="   "), SOME),
    ("commas and blanks.TXT", rows(POINT, between=" , "), SOME),
    ("tabs.csv", rows(POINT, between="\t"), SOME),
    ("lines of Windows.txt", rows(POINT).replace("\n", "\r\n"), SOME),
    ("index of pandas.csv", rows(COUNT, POINT, head=",x,y,z"), SOME),
    ("quoted names.csv", rows(COUNT, POINT, between=";", head='"id";"X";"Y";"Z"'), SOME),
    ("colours first, named.txt", rows(COLOURS, POINT, between=" ", head="# R G B X Y Z"), SOME),
    ("other order, named.txt", rows(digits(SOME[:, ::-1]), head="z,y,x"), SOME),
    ("units.csv", rows(OTHER, POINT, head="t (s),X [m],Y [m],Z [m]"), SOME),
    ("CloudCompare, named first.txt", rows(COLOURS, POINT, head="//R,G,B,X,Y,Z\n60"), SOME),
    ("colours unnamed.txt", rows(POINT, COLOURS, between=" "), SOME),
    ("MeshLab.xyz", rows(POINT, UNIT, between=" "), SOME),
    ("count.txt", rows(POINT, between=" ", head="60"), SOME),
    ("count below a remark.txt", rows(POINT, between=" ", head="# made in June 2024\n60 3"), SOME),
    ("remarks.txt", rows(POINT[:9], tail="# 1, 2, 3\n// 4\n" + rows(POINT[9:])), SOME),
    ("columns said.txt", rows(OTHER, POINT, between=" ", head="# columns: i x y z"), SOME),
    ("UTF-8 mark.csv", b"\xef\xbb\xbf" + rows(COUNT, POINT, head="id,x,y,z").encode(), SOME),
    ("Latin-1 remark.txt", ("# Gr\xf6\xdfe\n" + rows(POINT)).encode("latin1"), SOME),
    ("exponents.txt", rows(digits(SOME, ".8e")), SOME),
    ("on a map.xyz", rows(digits(FAR, ".6f"), between=" "), 0.2 * SOME),
    # Text whose columns may be others.
    ("counted.txt", rows(COUNT, POINT), "seem to begin with a count"),
    ("counted in steps.txt", rows([[f"{0.05 * i:.2f}"] for i in range(60)], POINT), "begin with a count"),
    ("counted and shuffled.txt", rows([[str(17 * i % 60)] for i in range(60)], POINT), "count or label"),
    ("counted by R.txt", rows(COUNT, POINT, between=" ", head='"x" "y" "z"'), "rows have 4 columns"),
    ("colours first.txt", rows(COLOURS, POINT), "begin with colours"),
    ("colours 0 to 1.txt", rows(SHARE, SHARE[::-1], SHARE, POINT), "an intensity or colours"),
    ("one normal.txt", rows([["0.0", "0.6", "-0.8"]] * 60, POINT), "begin with"),
    ("normals first.txt", rows(UNIT, POINT), "begin with normals"),
    ("intensity first.txt", rows(SHARE, POINT), "an intensity or colours"),
    ("time first.txt", rows(CLOCK, POINT), "begin with a (time|count)"),
    ("time of day.txt", rows([[f"{977.7 * i % 3600:.1f}"] for i in range(60)], POINT), "a count or label"),
    ("label.txt", rows([["3"]] * 60, POINT), "begin with a count or label"),
    ("labels.txt", rows([[str(i // 20)] for i in range(60)], POINT), "begin with a count or label"),
    ("two columns.txt", rows([row[:2] for row in POINT]), "2 columns, expected x y z"),
    ("a picture.txt", rows(*[digits(np.random.default_rng(i).random(60)) for i in range(40)]), "40 columns"),
    # Text with names of others, and first lines.
    ("other names.txt", rows([["0.5"]] * 60, POINT, head="t,px,py,pz"), "calls its columns t, px, py, pz"),
    ("three words.txt", rows(POINT, head="# made by hand"), "made, by, hand; call .* or remove the line"),
    ("normals named.txt", rows(POINT, head="nx ny nz", between=" "), "nx, ny, nz; call"),
    ("too few names.txt", rows(POINT, POINT, head="x,y,z"), "its first line is 'x,y,z', its rows have 6"),
    ("names twice.txt", rows(POINT, POINT, head="x,y,z,x,y,z"), "columns x, y, z, x, y, z; call"),
    ("two headers.txt", rows(COUNT, POINT, head="scan 7\nid,X,Y,Z"), "could not convert"),
    ("title.txt", rows(POINT, head="2024-05-06 10:11:12 1.0", between=" "), "first line is '2024"),
    ("numbered columns.csv", rows(POINT, head="0,1,2"), "first line '0,1,2' has whole numbers"),
    ("matrix.txt", rows(POINT, head="61 3", between=" "), "first line '61 3' has whole numbers"),
    ("a PCD.txt", rows(POINT, head="FIELDS x y z\nSIZE 4 4 4\nCOUNT 1 1 1", between=" "), "not convert"),
    # Numbers that mean two things, gaps, ends.
    ("decimal commas.csv", rows(COMMA, between=";"), "convert string '0,.*with decimal points"),
    ("decimal commas, commas.txt", rows(COMMA), "begin with colours|a count or label"),
    ("decimal commas, named.txt", rows(COMMA, head="x,y,z"), "its rows have 6 columns"),
    ("thousands.txt", rows(THOUSANDS, between=" "), "decimal points"),
    ("thousands, commas.txt", rows(THOUSANDS), "begin with a count or label"),
    ("words.txt", rows([["C"]] * 60, POINT, between=" "), "convert string 'C'"),
    ("closing words.txt", rows(POINT, between=" ", tail="end of file\n"), "convert string 'end'"),
    ("row cut off.txt", rows(POINT, tail="0.1,0.2"), "number of columns changed from 3 to 2"),
    ("two tables.txt", rows(POINT[:29]) + rows(POINT, POINT), "number of columns changed"),
    ("no x at first.txt", rows(POINT, head="x,y,z\n,1.5,2.5"), "convert string ''"),
    ("NA.txt", rows(POINT, tail="NA,1.5,2.5\n" + rows(POINT)), "convert string 'NA'"),
    ("nan.txt", rows(POINT, tail="nan,1.5,2.5"), "1 of its 61 points have NaN or infinite"),
    ("-9999.txt", rows(POINT + [["-9999"] * 3]), "1 of its 61 points lie fifty times as far"),
    ("prose.txt", "hello world, a chair\n" * 60, "convert string|calls its columns"),
    ("empty.txt", "", "holds no rows"),
    ("zero bytes.txt", rows(POINT) + "\0" * 99, "zero bytes, so it is no text"),
    ("UTF-16.txt", rows(POINT).encode("utf-16"), "zero bytes, so it is no text in UTF-8"),
    ("not fetched.ply", POINTER, "run `git lfs pull`"),
    # Arrays.
    ("plain.npy", SOME, SOME),
    ("capitals.NPY", SOME.astype(">f4"), SOME),
    ("one of one.npy", SOME[None], SOME),
    ("more columns.npy", np.hstack([SOME, SOME]), SOME),
    ("whole.npy", (1000 * SOME).astype(np.int16), (1000 * SOME).astype(np.int16)),
    ("fields.npy", fields(i=SOME[:, 0], X=SOME[:, 0], Y=SOME[:, 1], Z=SOME[:, 2]), SOME),
    ("on a map.npy", FAR, 0.2 * SOME),
    ("organised.npy", LEANING.reshape(20, 25, 3), r"shape \(20, 25, 3\), expected numbers \(N, 3\)"),
    ("several.npy", SEVERAL, r"\(2, 50, 3\)"),
    ("transposed.npy", SOME.T, r"60 columns"),
    ("flat.npy", SOME.ravel(), r"\(180,\)"),
    ("bool.npy", SOME > 1, "holds bool"),
    ("complex.npy", SOME + 1j, "complex128"),
    ("bytes.npy", (255 * LEANING / 4).astype(np.uint8), "holds uint8"),
    ("a picture.npy", np.random.default_rng(0).random((60, 40)), "40 columns, expected x y z and a few"),
    ("zeros.npy", np.vstack([SOME, 0 * SOME[:2]]), "2 of its 62 points are 0 0 0"),
    ("filled up.npy", np.vstack([SOME, 0 * SOME[:2] - 1]), "2 of its 62 points are -1 -1 -1"),
    ("coarse.npy", FAR.astype(np.float32), "steps of 0.5: float32 is too coarse"),
    ("coarse halves.npy", (SOME + 900).astype(np.float16), "steps of 0.5: float16 is too coarse"),
    ("no z.npy", fields(X=SOME[:, 0], Y=SOME[:, 1]), "fields x, y, expected x, y, z"),
    ("x twice.npy", fields(x=SOME[:, 0], X=SOME[:, 0], y=SOME[:, 1], z=SOME[:, 2]), "fields x, x, y, z"),
    ("empty.npy", np.zeros((0, 3)), "holds no points"),
    ("one place.npy", np.ones((60, 3)), "colours|one place"),
    ("too large.npy", SOME * 1e33, "NaN or infinite"),
    ("counted.npy", np.hstack([np.array(COUNT, float), SOME]), "begin with a count"),
    ("small.npy", SOME[:20], "small.npy has 20 points, --points is 60; lower"),
    # Meshes of many programs.
    ("blocks.obj", obj(TWO[:8], [[i - 9 for i in face] for face in QUADS])
     + obj(TWO[8:], [[i - 9 for i in face] for face in QUADS]), TWO_BOXES),
    ("slashes.obj", re.sub(r"(?<=\d)(?= \d+|\n)", "/1/1", obj([], FACES)) + obj(TWO), TWO_BOXES),
    ("Latin-1.obj", b"usemtl gr\xfcn\n" + obj(TWO, FACES).encode(), TWO_BOXES),
    ("UTF-8 mark.obj", b"\xef\xbb\xbf" + obj(TWO, FACES).encode(), TWO_BOXES),
    ("tabs.OBJ", obj(TWO, FACES).replace(" ", "\t"), TWO_BOXES),
    ("continued.obj", obj(TWO, FACES).replace(" 4 3", " \\\n4 3"), TWO_BOXES),
    ("colours.obj", obj(TWO).replace("\n", " 0.5 0.5 0.5\n") + obj([], FACES), TWO_BOXES),
    ("points.obj", CLOUD_OBJ, SOME),
    ("plain.off", off(), TWO_BOXES),
    ("beside the word.OFF", off(head="OFF"), TWO_BOXES),
    ("colours.off", off(head="COFF\n", more=" 200 10 10 255"), TWO_BOXES),
    ("remarks.off", "# 1 2 3\n" + off(), TWO_BOXES),
    ("points.off", off(SOME, []), SOME),
    ("mixed.ply", ply(MIXED), TWO_BOXES),
    ("mixed big.ply", ply(MIXED, "binary_big_endian"), TWO_BOXES),
    ("mixed text.ply", ply(MIXED, "ascii"), TWO_BOXES),
    ("triangles.PLY", ply(TRIANGLES), TWO_BOXES),
    ("comment.ply", ply(FACES, comment="Größe".encode("latin1")), TWO_BOXES),
    ("texture.ply", re.sub(rb"(?<=indices\n)", b"property list uchar float texcoord\n", ply([], "ascii"))
     .replace(b"face 0", b"face 24") + b"".join(b"3 %d %d %d 2 .5 7\n" % tuple(f) for f in TRIANGLES),
     TWO_BOXES),
    ("points.ply", ply([], vertices=SOME), SOME),
    ("on a map.ply", ply([], vertices=FAR), 0.2 * SOME),
    ("binary.stl", stl(), TWO_BOXES),
    ("called solid.STL", b"solid" + stl()[5:], TWO_BOXES),
    ("text.stl", b"solid M\xf6bel\n" + stl(False).split("\n", 1)[1].encode(), TWO_BOXES),
    ("two solids.stl", stl(False, BOX.faces) + "\n" + stl(False, BOX.faces + 8), TWO_BOXES),
    ("plain.glb", glb(), TWO_BOXES),
    ("harmless.glb", glb("KHR_materials_unlit"), TWO_BOXES),
    # What is no surface, or cannot be told.
    ("one face.obj", CLOUD_OBJ + "f 1 2 3\n", "its faces join only 3 of its 60 points; export"),
    ("one face often.obj", CLOUD_OBJ + "f 1 2 3\n" * 40, "join only 3"),
    ("lines.obj", CLOUD_OBJ + "l 1 2 3\n", "lines or curves and no faces"),
    ("from 0.obj", CLOUD_OBJ + "f 0 1 2\n", "none of its 60"),
    ("beyond.obj", CLOUD_OBJ + "f 1 2 99\n", "none of its 60"),
    ("before.obj", CLOUD_OBJ + "f -1 -2 -99\n", "none of its 60"),
    ("short vertex.obj", CLOUD_OBJ + "v 1\n", "inhomogeneous"),
    ("no area.obj", "v 0 0 0\nv 1 1 1\nv 2 2 2\nf 1 2 3\n", "its faces have no area"),
    ("nothing.obj", "# nothing\n", "no points"),
    ("nan.obj", "v 0 0 0\nv 1 0 0\nv nan 1 0\nf 1 2 3\n", "1 of its 3 points have NaN"),
    ("decimal commas.obj", obj(TWO, FACES).replace(".", ","), "convert string to float: '-0,5"),
    ("notch.obj", obj(np.roll(ELL, 1, axis=0), [range(6)]), "of 6 corners have notches; export"),
    ("bow tie.obj", obj(BOWTIE, [range(4)]), "faces of 4 corners have notches"),
    ("strips.ply", ply(FEW, element="tristrips", vertices=SOME), "tristrips; export it as triangles"),
    ("edges.ply", ply(FEW, element="edge", vertices=SOME), "edge; export it as triangles"),
    ("other faces.ply", ply(FEW, element="triangle", vertices=SOME), "triangle; export it as triangles"),
    ("one face.ply", ply(FEW[:1], vertices=SOME), "join only 3 of its 60"),
    ("cut off.ply", ply([], "ascii", vertices=SOME, count=99), "but has 60 rows"),
    ("cut off binary.ply", ply(FEW, vertices=SOME)[:-9], "early end"),
    ("too many.ply", ply(FEW, vertices=SOME, count=10 ** 12), "more than its .* bytes can hold"),
    ("no header.ply", b"ply\n", "no PLY header"),
    ("no vertices.ply", ply(FEW).replace(b"element vertex", b"element points"), "no element called vertex"),
    ("cut off.off", off()[:-20], "but has|a face|convert"),
    ("more rows.off", off() + "3 0 1 2\n", "but has 29 rows"),
    ("columns.off", off(more=" 200 10 10"), "points have 6 numbers, expected 3"),
    ("bare.off", off(head=""), "does not begin with OFF"),
    ("cut off.stl", stl()[:400], "cut off"),
    ("cut off text.stl", stl(False)[:600], "cut off"),
    ("second cut off.stl", stl(False) + "\n" + stl(False)[:600], "cut off"),
    ("six corners.stl", stl(False).replace("vertex", "vertex 0 0 0\nvertex", 3), "neither the length"),
    ("on a map.stl", stl(vertices=TWO + [356789.4, 5812345.6, 0]), "6 long, in steps of 0.5: float32"),
    ("draco.glb", glb("KHR_draco_mesh_compression"), "KHR_draco_mesh_compression"),
    ("quantised.glb", glb("KHR_mesh_quantization"), "KHR_mesh_quantization"),
    ("whole numbers.glb", glb(componentType=5122, normalized=True), "quantised"),
    ("sparse.glb", glb(sparse={}), "sparse"),
    ("elsewhere.glb", glb(bufferView=None), "not within the bounds it declares"),
    ("no bounds.glb", glb(min=None), "it lacks 'min'"),
    ("fans.glb", glb(change=lambda tree: tree["meshes"][0]["primitives"][0].update(mode=6)), "fans; export"),
    ("points.glb", glb(change=lambda tree: tree["meshes"][0]["primitives"][0].update(mode=0)), "points, l"),
    ("skeleton.glb", glb(change=lambda tree: tree.update(skins=[{"joints": [0]}])), "skeleton"),
    ("posed.glb", glb(change=lambda tree: tree["meshes"][0].update(weights=[0.0, 0.5])), "morph targets"),
    ("instances.glb", glb("EXT_mesh_gpu_instancing"), "EXT_mesh_gpu_instancing"),
    ("no scene.glb", glb(change=lambda tree: tree.update(nodes=[], scenes=[{"nodes": []}])), "no points"),
    ("deep.gltf", "[" * 100_000, "recursion"),
    ("unknown.pcd", rows(POINT), "it is none of .npy .txt .*; convert it"),
]


def write(path, content):
    if isinstance(content, np.ndarray):
        with open(path, "wb") as file:
            np.save(file, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("name, content, outcome", CASES, ids=[name for name, _, _ in CASES])
def test_a_file_is_read_right_or_refused(tmp_path, name, content, outcome):
    path = tmp_path / name
    write(path, content)
    if outcome is TWO_BOXES:
        points = files.read_object(path, 2000)
        size = np.ptp(points, axis=0)
        assert np.allclose(np.sort(size), [1, 1, 6], atol=0.02)
        assert abs((points[:, size.argmax()] > 0).mean() - 0.5) < 0.05  # in both boxes
    elif isinstance(outcome, str):
        message = assert_refused(outcome, files.read_object, path, 60)
        assert str(path) in message and "\n" not in message and "; " in message  # says what to do
    else:
        points = files.read_object(path, 60)
        assert points.dtype == np.float32
        assert np.allclose(points, outcome - outcome.mean(axis=0), atol=2e-6 * np.abs(outcome).max())


@pytest.mark.parametrize("extension", files.READERS)
def test_objects_of_every_format_are_read_the_same_every_time_or_named(tmp_path, extension):
    path, half = tmp_path / f"object{extension}", np.array([2, 1, 0.5])
    is_mesh = extension in (".off", ".obj", ".ply", ".stl", ".glb", ".gltf")
    if extension in (".glb", ".gltf"):  # a scene: a unit box and how it is stretched; its y is up
        scene, half = trimesh.Scene(), half[[2, 0, 1]]
        scene.add_geometry(BOX, transform=np.diag([4, 2, 1, 1]))
        for name, content in trimesh.exchange.gltf.export_gltf(scene, embed_buffers=True).items():
            (tmp_path / name).write_bytes(content)
        scene.export(path) if extension == ".glb" else os.replace(tmp_path / "model.gltf", path)
    elif is_mesh:
        trimesh.creation.box((4, 2, 1)).export(path)
    else:
        write(path, LEANING if extension == ".npy" else rows(digits(LEANING, ".6f"), between=" "))
    points = files.read_object(path, 2000 if is_mesh else 200)
    assert np.array_equal(points, files.read_object(path, len(points))) and points.dtype == np.float32
    if is_mesh:  # on the surface of the box: six faces by their area
        low, high = points.min(axis=0), points.max(axis=0)
        away = np.abs(np.abs(points - (low + high) / 2) / half - 1)
        assert np.allclose(high - low, 2 * half, atol=0.02) and away.min(axis=1).max() < 0.02
        assert 1000 < (away[:, half.argmin()] < 0.005).sum() < 1300  # 8 of 14
    else:
        away = np.linalg.norm(points[:, None] - (LEANING - LEANING.mean(axis=0)), axis=-1)
        assert away.min(axis=1).max() < 1e-4 and len(set(away.argmin(axis=1))) == 200  # chosen, none twice
    assert_named_if_broken(path, lambda path: files.read_object(path, 64))


def test_clouds_of_a_folder_have_one_size_and_all_bad_files_are_named_at_once(tmp_path):
    for i, count in enumerate((64, 70, 200)):
        np.save(tmp_path / f"{i}.npy", LEANING[:count])
    good = sorted(tmp_path.iterdir())
    clouds = files.read_objects(good, 60, 100, "z")
    assert clouds.shape == (3, 64, 3) and clouds.dtype == np.float32
    assert np.array_equal(clouds[0], files.read_object(good[0], 60, 100))
    bad = [tmp_path / f"bad{i}.ply" for i in range(12)]
    for path in bad:
        path.write_text("no")
    os.symlink("/nowhere", tmp_path / "gone.npy")
    says = r"13 of 16 files cannot be used:(\n  cannot read .*bad\d+.ply: .*){10}\n  and 3 more"
    assert_refused(says, files.read_objects, [*good, *bad, tmp_path / "gone.npy"], 60, 100, "z")
    assert_refused("^no .*gone.npy", files.read_objects, [*good, tmp_path / "gone.npy"], 60, 100, "z")
    (tmp_path / "folder.ply").mkdir()
    assert_refused("folder.ply is a folder, expected a file", files.read_object, tmp_path / "folder.ply", 60)


# ------ names of classes, folders, photographs --------------------------------------------------------------
@pytest.mark.parametrize("content, outcome", [
    (b"\xef\xbb\xbfmug\r\nnight_stand  \r\n\r\n", ["mug", "night stand"]),
    ("Bu\u0308ro\nStuhl  alt\nकुर्सी".encode(), ["B\xfcro", "Stuhl alt", "कुर्सी"]),
    (b"3d printer\n2-seater\nPainter's easel", ["3d printer", "2-seater", "Painter's easel"]),
    (b"thing 1\nthing 2\nmug", ["thing 1", "thing 2", "mug"]),
    (b"Mug\ncup\nmug", "one to the text tower"),
    (b"night_stand\nnight stand", "one to the text tower"),
    ("Bu\u0308ro\nb\xfcro".encode(), "one to the text tower"),
    ("m\u200bug\ncup".encode(), r"has 'm\\u200bug'; expected the name of a class alone"),
    (b"# classes\nmug\ncup", "has '# classes'; expected"),
    (b"0 mug\n1 cup", "has '0 mug'; expected"),
    (b"1. mug\n2. cup", "has '1. mug'; expected"),
    (b"mug 17\ncup 4", "has a number in each line, as 'mug 17'"),
    (b"0-mug\n1-cup", "has a number in each line"),
    (b"n02747177 bin\nmug", "has 'n02747177 bin'; expected"),
    (b"Name\nmug\ncup", "has 'Name'; expected"),
    (b"mug\t1\ncup\t2", r"has 'mug\\t1'; expected"),
    (b"'mug'\n'cup'", "expected the name"),
    (b"- mug\n- cup", "has '- mug'; expected"),
    (b"mug, cup", "has 'mug, cup'; expected"),
    (b"5$ mug\n{0}", r"has '5\$ mug'; expected"),
    (b"mug\n", "two or more different"),
    (b"\n", "it is empty; README"),
    ("K\xfchlschrank\nmug".encode("latin1"), "save lines of text as UTF-8"),
    ("mug\ncup\n".encode("utf-16-le"), "no text in UTF-8"),
    (POINTER, "git lfs pull")])
def test_names_of_classes_are_kept_as_given_or_refused(tmp_path, content, outcome):
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    def read():
        return files.clean_class_names(files.read_lines(path), str(path))
    if isinstance(outcome, str):
        assert_refused(f"classes.txt.*{outcome}", read)
    else:
        assert read() == outcome


# Folders. A place -> a cloud, a picture (None), or text; "links to" another place.
CLOUDS = {f"{split}/{name}/{split}{name}.npy": SOME for split in ("train", "test") for name in ("mug", "cup")}
PICTURE = np.add.outer(np.arange(30) * 3, np.arange(40) * 2)[..., None] + [10, 60, 0]  # no two sides alike


def make_folder(folder, places):
    for place, content in {"classes.txt": "mug\ncup\n", **places}.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in files.PHOTOGRAPHS and content is None:
            Image.fromarray(PICTURE.astype(np.uint8)).save(path)
        elif isinstance(content, str) and content.startswith("links to "):
            os.symlink(folder / content.removeprefix("links to "), path)
        else:
            write(path, content)
    return folder


def pictures_of(found, folder):
    """Where the pictures of each object lie."""
    return found["images"] and [[str(path.relative_to(folder / "views")) for path in paths]
                                for paths in found["images"]]


BOTH = {f"train/{name}.npy": SOME for name in ("Chair", "Chair.001", "0001", "mask_2")} | {
    "test/seen.npy": SOME}


@pytest.mark.parametrize("places, outcome", [
    # Pictures of the training objects 0001, Chair.001, Chair and mask_2.
    ({"views/Chair.png": None, "views/Chair.001.png": None, "views/Chair.002.png": None},
     [[], ["Chair.001.png"], ["Chair.png"], []]),
    ({"views/0001/b.JPG": None, "views/0001/0002.webp": None, "views/0001/._b.jpg": b"x",
      "views/0001/a.heic": b"x"}, [["0001/0002.webp", "0001/b.JPG"], [], [], []]),
    ({"views/new/0001/a.png": None, "views/new/Chair.tif": None, "views/0001/rgb/0001.png": None},
     [["new/0001/a.png"], [], ["new/Chair.tif"], []]),
    ({"views/mask_2/a.png": None, "views/mask_2.png": None}, [[], [], [], ["mask_2/a.png", "mask_2.png"]]),
    ({"views/seen/a.png": None}, [[], [], [], []]),  # the other split has pictures
    ({"views/0001/depth_1.png": None}, "0001/depth_1.png is called as a map of depth, a mask"),
    ({"views/masks/0001.png": None}, "masks/0001.png is called as"),
    ({"views/0001_front.png": None}, r"no picture of any object; expected .*views/.*/\*.jpg"),
    ({"views/0001/a.txt": "x"}, "no picture of any object")])
def test_a_picture_belongs_to_the_object_its_folder_or_itself_is_called(tmp_path, capsys, places, outcome):
    folder = make_folder(tmp_path, {**BOTH, **places})
    if isinstance(outcome, str):
        assert_refused(outcome, files.read_folder, folder, "train")
        return
    train, _ = files.read_folder(folder, "train"), files.read_folder(folder, "test")
    assert train["names"] == ["0001", "Chair.001", "Chair", "mask_2"]
    assert pictures_of(train, folder) == outcome
    assert capsys.readouterr().err.count("no picture of") == 1  # once for both splits


def test_names_of_files_are_of_any_bytes_and_other_kinds_are_counted(tmp_path, capsys):
    two = unicodedata.normalize("NFD", "Büro")  # umlauts may be composed or not
    make_folder(tmp_path, {
        "classes.txt": "Büro_stuhl\nTisch\n", "train/tisch/a.npy": SOME,
        f"train/{two}_Stuhl/{two}.npy": SOME, "views/Büro/1.png": None, f"views/{two}/2.png": None,
        "train/a.pcd": "x", "train/b.PCD": "x", "train/tisch/c.las": "x"})
    with open(os.fsencode(tmp_path) + b"/train/tisch/m\xf6bel.npy", "wb") as file:
        np.save(file, SOME)
    found = files.read_folder(tmp_path, "train")
    assert found["class_names"] == ["Büro stuhl", "Tisch"] and found["labels"] == [0, 1, 1]
    assert [len(paths) for paths in found["images"]] == [2, 0, 0]
    assert found["names"] == ["Büro", "a", "m\ufffdbel"] and "\n".join(found["names"]).encode()
    assert files.read_objects(found["points"], 60, 60, "z").shape == (3, 60, 3)
    assert re.search("ignored 3 files in .*train: 2 .pcd, 1 .las; convert", capsys.readouterr().err)
    (tmp_path / "classes.txt").unlink()
    assert_refused("^no .*classes.txt; README", files.read_folder, tmp_path, "train")


@pytest.mark.parametrize("places, outcome", [
    (CLOUDS, dict(names=["testcup", "testmug"], labels=[1, 0], images=None, class_names=["mug", "cup"])),
    ({"test/a.npy": SOME, "test/b.PLY": ply([])}, dict(names=["a", "b"], labels=None)),
    # Numbered anew in each class.
    ({"test/mug/1.npy": SOME, "test/cup/1.npy": SOME, "views/mug/1/a.png": None, "views/cup/1.png": None},
     dict(names=["cup/1", "mug/1"], labels=[1, 0], images=[["cup/1.png"], ["mug/1/a.png"]])),
    # Links are followed, but not upwards; hidden files are skipped, captions no objects.
    ({"store/1.npy": SOME, "test/mug": "links to store", "test/cup/loop": "links to test",
      "test/cup/2.npy": "links to store/1.npy", "test/cup/._2.npy": b"x", "test/__MACOSX/3.npy": b"x",
      "test/.checkpoints/4.npy": b"x"}, dict(names=["2", "1"], labels=[1, 0])),
    ({"test/mug/1.off": off(), "test/mug/1.txt": "a mug"}, dict(names=["1"])),
    ({"test/cup/deeper/mug/1.npy": SOME, "test/cup/2.npy": SOME}, dict(names=["2", "1"], labels=[1, 0])),
    # Refused.
    ({**CLOUDS, "test/mugs/1.npy": SOME}, r"objects in \['mugs'\]; expected folders named as in"),
    ({**CLOUDS, "test/1.npy": SOME}, "objects in folders and outside"),
    ({"test/mug/1.npy": SOME, "test/mug/1.xyz": rows(POINT)}, "two objects of .*test are called mug/1"),
    ({"test/1.npy": SOME, "test/1.xyz": rows(POINT)}, "two objects of .*test are called 1; rename"),
    ({"test/mug/1.npy": SOME, "train/cup/1.npy": SOME, "views/1/a.png": None}, "1 is an object of .* and of"),
    ({"train/a.npy": SOME, "test/a.pcd": "x"}, "no objects in .*test; expected files .npy"),
    ({"classes.txt": "mug\nmug\n"}, "two or more different names")])
def test_a_folder_is_read_right_or_refused(tmp_path, places, outcome):
    make_folder(tmp_path, places)
    if isinstance(outcome, str):
        assert_refused(outcome, files.read_folder, tmp_path, "test")
        return
    found = files.read_folder(tmp_path, "test")
    found["images"] = pictures_of(found, tmp_path)
    assert {key: found[key] for key in outcome} == outcome and len(found["points"]) == len(found["names"])


def photograph(mode="RGB", pixels=PICTURE.astype(np.uint8), hidden=None, size=None, **options):
    """A function from a path to nothing that saves a picture there, parts of it `hidden`, or cut off."""
    def save(path):
        picture = Image.fromarray(pixels).convert(mode) if mode else Image.fromarray(pixels)
        if hidden is not None:  # its hidden colours stay in the file
            picture.putalpha(Image.fromarray(np.uint8(255 * ~hidden)))
        picture.save(path, **options, **({"lossless": True, "exact": True} if path.suffix == ".webp" else {}))
        path.write_bytes(path.read_bytes()[:size])
    return save


def turned(orientation):
    """PICTURE as a camera stores it that was held otherwise."""
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's numbers of transpositions
    picture = Image.fromarray(PICTURE.astype(np.uint8))
    exif = picture.getexif()
    exif[0x0112] = orientation
    stored = picture.transpose(Image.Transpose(turns[orientation])) if orientation in turns else picture
    return lambda path: stored.save(path, exif=exif)


HIDDEN = np.tile(np.arange(40) >= 20, (30, 1))


SEEN = np.where(HIDDEN[..., None], 128, PICTURE)
GREY = PICTURE[..., 0]


@pytest.mark.parametrize("name, save, outcome", [
    *((f"{orientation}.png", turned(orientation), PICTURE) for orientation in range(1, 9)),
    ("a.bmp", photograph(), PICTURE), ("cmyk.tif", photograph("CMYK"), PICTURE),
    *((name, photograph(hidden=HIDDEN), SEEN) for name in ("rgba.png", "rgba.tiff", "rgba.webp")),
    ("hole.png", photograph("P", np.full((30, 40), 7, np.uint8), transparency=7), np.full((30, 40, 3), 128)),
    *((name, photograph(None, GREY.astype("u2")), "more than 8 bits") for name in ("16.png", "16.tif")),
    ("float.tif", photograph(None, GREY.astype("f4")), "more than 8 bits"),
    ("cut.bmp", photograph(size=2000), "; replace or remove it"),
    ("page.jpg", lambda path: path.write_bytes(b"<html>"), "cannot identify image.*; replace or remove it"),
    ("bomb.png", lambda path: Image.new("1", (20_000, 20_000)).save(path), "exceeds limit"),
    ("pointer.jpg", lambda path: path.write_bytes(POINTER), "git lfs pull")])
def test_photographs_are_read_as_a_person_sees_them_or_refused(tmp_path, name, save, outcome):
    path = tmp_path / name
    save(path)
    if isinstance(outcome, str):
        assert_refused(f"cannot read .*{name}: .*{outcome}", files.read_photograph, path)
    else:
        image = files.read_photograph(path)
        assert image.dtype == torch.uint8 and image.shape == (3, 30, 40)
        assert np.abs(image.permute(1, 2, 0).numpy() - outcome).max() <= 1


def test_a_folder_of_ones_own_is_read_with_and_without_labels_and_set_upright(tmp_path, monkeypatch):
    named, bare = str(write_own(tmp_path / "named")), str(write_own(tmp_path / "bare", labelled=False))
    shutil.rmtree(tmp_path / "bare/test")
    write_pictures(tmp_path / "bare/views/train0", "1.png", "2.jpg")
    load, scan = partial(data.load_dataset, root=tmp_path, split="test"), Mock(wraps=data.scan)
    objects = load(named, points=64)
    assert objects.class_names == NAMES and [k // 2 for k in range(20)] == objects.labels.tolist()
    assert objects.names[:2] == ["test0", "test10"] and (objects.name, objects.split) == ("named", "test")
    turned = load(named, points=64, up=options("--up=-y").up)
    assert torch.allclose(turned.points, files.to_z_up(objects.points, "-y"), atol=1e-5)
    objects = load(bare, points=64)
    assert objects.labels is None and len(objects) == 48 and objects.split == "train"
    assert [len(paths) for paths in objects.images] == [2] + [0] * 47
    assert [data.dataset_row(root)["templates"] for root in (bare, named)] == ["depth", "depth"]
    for i in range(1, 25):  # now most objects have a photograph
        write_pictures(tmp_path / "bare/views", f"train{i}.png")
    assert data.dataset_row(bare)["templates"] == "photo"
    monkeypatch.setattr(data, "scan", scan)
    for points, most in ((32, 96), (100, 128)):  # a scan loses points: more of a file are read than asked for
        assert load(named, points=points, domain="target").points.shape == (20, points, 3)
        assert scan.call_args.args[0].shape == (20, most, 3)


def test_photographs_and_depth_views_take_one_path_and_come_from_workers_as_bytes_in_order(
        tmp_path, monkeypatch):
    objects = data.sample_shapes(8, 0, points=64)
    write_pictures(tmp_path, *[f"{k}.png" for k in range(5)])
    objects.images = [[tmp_path / f"{k}.png" for k in range(5)]] + [[]] * 7
    item = data.Photographs(objects, 32, seed=2**32)
    assert [image.dtype for image in item[0]] == [np.uint8] * 2
    assert [image.dtype for image in item[3]] == [np.float32] * 2  # rendered
    # As long as a folder for temporary files may be: sockets in it would have too long a path.
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 100)))
    (tmp_path / ("x" * 100)).mkdir()
    draw = partial(data.training_photographs, objects, torch.arange(8).split(5), 32)
    batches, again, other = [*draw(1)], [*draw(1)], [*draw(2)]
    assert [len(weak) for weak, _ in batches] == [5, 3] and not batches[0][0].is_shared()
    (weak, strong), *_ = batches
    assert torch.equal(strong, again[0][1]) and not torch.equal(strong, other[0][1])
    for i, image in enumerate(torch.cat([strong for _, strong in batches])):
        assert torch.equal(image, data.to_unit_range(data.Photographs(objects, 32, seed=1)[i][1]))
    views = data.draw_views(objects.points[:5], 32, (weak, strong))
    assert strong.shape == weak.shape == (5, 3, 32, 32) and 0 <= strong.min() <= strong.max() <= 1
    assert torch.equal(views["weak_image"], weak) and weak[0, 2].mean() == pytest.approx(200 / 255, abs=0.01)
    assert torch.equal(weak[1, 0], weak[1, 1])  # a depth view is grey
    for count, reds in ((None, [0, 20, 40, 60, 80]), (2, [0, 80])):
        stills = list(data.fixed_images(objects, count, 32, 4, "cpu"))
        assert stills[0][0, :, 0, 0, 0].mul(255).round().tolist() == reds  # all its photographs, or some
        assert [len(images[0]) for images in stills[1:]] == [count or 6] * 7  # and depth views


def test_an_object_without_photographs_is_augmented_as_depth_views_are_everywhere(tmp_path):
    objects = data.sample_shapes(20, 0, points=512)
    write_pictures(tmp_path, "0.png")
    objects.images = [[tmp_path / "0.png"]] + [[]] * 19
    pair, = data.training_photographs(objects, (torch.arange(20),), 64, 0)
    torch.manual_seed(0)
    for mine, usual in zip(pair, data.depth_crops(objects.points, 64)):
        assert (mine[1:, 0] == mine[1:, 2]).all()  # no colours
        # An object covers about as much of its picture as of any depth view.
        covered, usually = ((images[1:] > 0.1).double().mean().item() for images in (mine, usual))
        assert covered == pytest.approx(usually, rel=0.1)


def test_a_broken_photograph_is_named_in_one_line(tmp_path):
    objects, photo = data.sample_shapes(4, 0, points=64), tmp_path / "1.png"
    write_pictures(tmp_path, "0.png", "1.png", "2.png")
    objects.images = [[tmp_path / f"{i}.png"] for i in range(3)] + [[]]
    whole, paths = photo.read_bytes(), [path for paths in objects.images for path in paths]
    photo.write_bytes(b"no picture")
    for images in (data.training_photographs(objects, torch.arange(4).split(3), 32, 0),
                   data.fixed_images(objects, None, 32, 4, "cpu")):
        assert_refused("^cannot read .*1.png: [^\n]*; replace or remove it$", list, images)
    assert not multiprocessing.active_children()
    refuse = partial(workers.refuse_broken_photographs, paths)
    assert_refused("^1 of 3 photographs cannot be read:\n  cannot read .*1.png", refuse, whole=True)
    photo.write_bytes(whole[:60])  # its header is whole
    refuse(whole=False)
    assert_refused("1 of 3", refuse, whole=True)


# ------ tools: starts are made ------------------------------------------------------------------------------
def make_start(folder, *argv) -> tuple[Path, dict]:
    """A start of few small clouds, and its parameters."""
    argv = ["--points", "64", "--groups", "8", "--group-size", "8", *argv]
    pretrain.main(["--into", str(folder / "start.pt"), *argv])
    return folder / "start.pt", starts.read_file(folder / "start.pt")["model"]


def test_a_start_in_the_making_continues_logs_its_speed_and_refuses_what_is_not_finite(tmp_path, monkeypatch):
    recipe = dict(objects=40, epochs=3, batch_size=8, lr=1e-3, weight_decay=0.05)
    monkeypatch.setattr(pretrain, "RECIPES", {"tiny": recipe})
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 0)
    real = pretrain.pretrain_loss
    def make(folder, *argv, stop=None, spoil=None):
        steps = []
        def loss(*given):
            steps.append(1)
            if len(steps) == stop:
                raise KeyboardInterrupt
            return real(*given) * (math.inf if len(steps) == spoil else 1)
        monkeypatch.setattr(pretrain, "pretrain_loss", loss)
        path, state = make_start(folder, *argv)
        return len(steps), state, path
    steps, whole, path = make(tmp_path / "whole")
    rows = [json.loads(line) for line in path.with_suffix(".log.jsonl").read_text().splitlines()]
    assert steps == 15 and [row["step"] for row in rows] == [5, 10, 15] and rows[0]["objects_per_second"] > 0
    assert not path.with_suffix(".last.pt").exists()
    assert_refused("start.pt is there already", make, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "parts", stop=8)  # in the second of three epochs
    assert_refused("was begun with other options, data or code", make, tmp_path / "parts", "--seed", "1")
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "CODE_OF_STARTS", "edited")
        assert_refused("was begun with other options, data or code", make, tmp_path / "parts")
    steps, parts, _ = make(tmp_path / "parts")
    assert steps == 10 and same(whole, parts)
    assert_refused("loss of pre-training is not finite at step 5", make, tmp_path / "spoilt", spoil=2)


def test_a_point_encoder_is_aligned_to_a_frozen_clip_with_the_targets_clouds(
        tmp_path, monkeypatch, small_clip):
    name, point, loss = small_clip, dict(groups=8, group_size=8), Mock(wraps=pretrain.pretrain_loss)
    own, targets = data.sample_shapes(8, 0, points=64), data.sample_shapes(20, 3, points=64)
    recipe = dict(objects=8, epochs=1, batch_size=4, lr=1e-3, weight_decay=0.1)
    for what, value in (("pretrain_loss", loss), ("sample_shapes", lambda *_, **__: own),
                        ("load_dataset", lambda *_: targets), ("RECIPES", {"clip": recipe})):
        monkeypatch.setattr(pretrain, what, value)
    assert_refused(f"python -m tools.pretrain --model {name} --into", train.main, ["--model", name])
    path, _ = make_start(tmp_path, "--model", name, "--device", "cpu")
    # Eight procedural objects with their names, and with them the target's twenty clouds, without.
    clouds, labels = (torch.cat([step.args[k] for step in loss.call_args_list]) for k in (2, 3))
    assert labels.sort().values.tolist() == [-1] * 20 + list(range(8))
    assert len(clouds[:, 0, 0].unique()) == 28  # none twice
    before, text = models.open_clip_start(name, None, 0, **point)
    after, kept_text = models.load_start(path)
    for frozen, kept in ((before.visual, after.visual), (text, kept_text)):
        rounded = {name: value.half().float() for name, value in frozen.state_dict().items()}
        assert same(rounded, kept.state_dict())
    assert not torch.equal(before.pc_projection, after.pc_projection)
    assert not torch.equal(before.point_encoder.lm_head.weight, after.point_encoder.lm_head.weight)
    # The file is a whole start: it needs no open_clip name, and trains as any other.
    args = train.parse_args(["--dataset", str(tmp_path), "--start-checkpoint", str(path)])
    assert (args.model, args.points, args.groups, args.group_size) == (name, 64, 8, 8)
    monkeypatch.setattr(open_clip, "create_model", Mock(side_effect=AssertionError))
    assert build_model(args.model, NAMES, models.TEMPLATES["depth"], None, path).class_names == NAMES


def test_shapenet_is_read_as_point_berts_authors_left_it(tmp_path):
    (tmp_path / "shapenet_pc").mkdir()
    np.save(tmp_path / "shapenet_pc/03001627-a.npy", LEANING)
    (tmp_path / "ShapeNet-55").mkdir()
    (tmp_path / "ShapeNet-55/train.txt").write_text("03001627-a.npy\n")
    objects = pretrain.load_shapenet55(tmp_path, 500)
    assert objects.class_names[objects.labels[0]] == "chair" and len(objects.class_names) == 55
    turned = data.to_unit_sphere(torch.from_numpy(LEANING[None]), up="y")
    assert torch.allclose(objects.points, turned, atol=1e-6)
    (tmp_path / "ShapeNet-55/train.txt").write_text("99-a.npy\n")
    assert_refused("expected names that begin with the WordNet number", pretrain.load_shapenet55, tmp_path, 9)
    args = pretrain.parse_args(["--into", "x", "--dataset", "shapenet55", "--model", "ViT-B-32"])
    assert (args.points, args.up, args.templates) == (8192, "y", "3d")


# ------ pictures and tables ---------------------------------------------------------------------------------
def test_curves_show_what_there_is_and_begin_with_the_start(monkeypatch):
    monkeypatch.setattr(pictures, "png", lambda figure: figure)
    for accuracy, start, labels in (
            (None, {}, ({"information, nats"}, {"coverage", "names in use", "image and point agree"})),
            (0.7, dict(image=1.0, point=2.0, joint=3.0),
             ({"image", "point", "joint"}, {"coverage", "names in use", "label accuracy"}))):
        start = {"agreement": 60.0, "information": 0.5, "shares": {"mug": 0.5, "cup": 0.5}, **start}
        step = dict(epoch=2, step=6, coverage=0.5, label_accuracy=accuracy, entropy=1.0, named=[0.25] * 4)
        axes = pictures.plot_curves([step, dict(epoch=2, step=6, teacher=start)], start).axes
        for panel, expected in zip(axes, labels):
            drawn = {line.get_label() for line in panel.lines if not line.get_label().startswith("_")}
            assert drawn == expected == {text.get_text() for text in panel.get_legend().texts}
        assert all([*line.get_xdata()] == [0, 2] for line in axes[0].lines if line.get_label() in labels[0])


def test_the_gallery_names_objects_one_should_look_at_and_who_says_what(monkeypatch):
    objects = data.Objects(CLOUD.expand(3, -1, -1), None, ["mug", "cup"], names=["x", "y", "z"])
    probs = {"image": torch.eye(2)[[0, 0, 1]], "point": torch.eye(2)[[0, 1, 1]]}
    lines = partial(evaluation.name_objects, objects, probs | {"joint": sum(probs.values()) / 2})
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "draw_grid", lambda *given: given)
        cells, _, title = evaluation.gallery(lines(), objects)
        said = "y\njoint: mug 0.5000\nimage: mug 1.0000\npoint: cup 1.0000"
        assert [text for _, text in cells] == [said, ""]
        assert title == "1 of 3 objects: image and point disagree"
        objects.labels = torch.tensor([1, 0, 1])
        cells, _, title = evaluation.gallery(lines(), objects)
        assert [text.split("\n")[0] for _, text in cells] == ["x", "is cup", "y", "is mug"]
        assert title == "2 of 3 objects: named wrongly, or in two ways"
    nothing = objects.pick(torch.tensor([2]))
    evaluation.gallery(lines()[2:], nothing)  # of nothing it is empty


def test_a_confusion_of_any_number_of_classes_and_names_is_a_picture_of_bounded_size(capsys):
    # A broken formula, many names, letters of another font.
    for names in (["$0^$", "$1^$"], [f"name {k}" for k in range(130)], ["椅子", "桌子"]):
        labels = torch.arange(len(names))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            drawn = pictures.plot_confusion(labels, labels.roll(-1), names, "$\\x$")
        size = Image.open(io.BytesIO(drawn)).size
        assert max(size) < 3700 and min(size) > min(250, 32 * len(names))
    assert capsys.readouterr().err.count("\n") <= 1  # where no font has these letters


def test_the_cache_rival_borrows_names_from_confident_neighbours(monkeypatch):
    # Two classes; test object 2 is named wrongly, but lies beside confident objects of class 1.
    features = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), dim=-1)
    zero_shot = torch.tensor([[4.0, 0.0], [3.0, 0.0], [0.0, 4.0], [0.0, 3.0]])
    test = F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.2, 0.9]]), dim=-1)
    given = {4: (zero_shot, features), 3: (torch.tensor([[4.0, 0.0], [0.0, 4.0], [0.3, 0.0]]), test)}
    unlabelled, asked = (data.Objects(torch.zeros(n, 1, 3), None, ["a", "b"]) for n in (4, 3))
    model = argparse.Namespace(class_names=["a", "b"], logit_scale=torch.tensor(2.66))
    monkeypatch.setattr(make_tables, "embed", lambda model, objects, views: {
        f"{m}_{what}": value.clone() for m in ("image", "point")
        for what, value in zip(("logits", "features"), given[len(objects)])})
    probs = make_tables.predict_by_cache(model, unlabelled, asked, shots=2)
    assert all(probs[m].argmax(dim=1).tolist() == [0, 1, 1] for m in ("image", "point", "joint"))


def result(seed=0, joint=60.0, **more) -> dict:
    """A results.json."""
    after = {"image": 10.0, "point": 20.0, "joint": joint}
    row = {"dataset": "toys", "objects": 7, "model": "tiny", "start": "tiny", "precision": "fp32",
           "commit": "1234567", "seed": seed, "changed": {},
           "zero_shot": {"image": 1.0, "point": 2.0, "joint": 50.0}}
    return {**row, "accuracy" if "rival" in more else "teacher": after, **more}


def test_tables_average_seeds_and_measure_how_much_of_the_gap_to_true_labels_was_closed(tmp_path):
    runs = [result(rival="cache", joint=55.0)]
    for seed, joint, ceiling in ((0, 60.0, 70.0), (1, 66.0, 90.0)):
        runs += [result(seed, joint), result(seed, ceiling, changed={"labels": "truth"})]
    short, document = make_tables.tables(runs)
    assert short.splitlines() == [
        "| joint top-1, %: start -> end (gap) | toys |", "| --- | --- |",
        "| Cross-MoST | 50.0 ± 0.0 -> 63.0 ± 4.2 (45 %) |",  # 10/20, 16/40
        "| `--labels truth` | 50.0 ± 0.0 -> 80.0 ± 14.1 (100 %) |",
        "| cache, no training | 50.0 -> 55.0 (25 %) |"]
    lines = document.splitlines()
    assert lines[-5].startswith("| toys, 7 objects | image | point |") and lines[-3:] == [
        f"| {row} | 1.0{spread} -> 10.0{spread} | 2.0{spread} -> 20.0{spread} | {rest} |"
        for row, spread, rest in (
            ("Cross-MoST", " ± 0.0", "50.0 ± 0.0 -> 63.0 ± 4.2 | 45 % |  | 0: 60.0, 1: 66.0"),
            ("`--labels truth`", " ± 0.0", "50.0 ± 0.0 -> 80.0 ± 14.1 | 100 % |  | 0: 70.0, 1: 90.0"),
            ("cache, no training", "", "50.0 -> 55.0 | 25 % |  | 0: 55.0"))]
    assert {"- model: tiny", "- precision: fp32", "- commit: 1234567"} <= set(lines)
    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text))
        return make_tables.gather(tmp_path)
    assert_refused("no results.json with accuracy below", make_tables.gather, tmp_path)
    for count, name, content in ((1, "toys/a/seed-0", result()), (2, "toys/a/seed-1", result(1)),
                                 (2, "toys/b", result(zero_shot=None)), (2, "", "{")):
        assert len(write(f"{name}/results.json".lstrip("/"), content)) == count
    for broken, says in ((result(), "another run there has its options"), ("{", ""), ("[1]", ""),
                         ('{"zero_shot": 1}', "")):
        assert_refused(f"cannot read .*c/results.json: .*{says}", write, "toys/c/results.json", broken)


@pytest.mark.parametrize("key, value, says", [
    ("model", "ulip2", "model ulip2"), ("start", "other", "start other"),
    ("precision", "bf16", "precision bf16"), ("start", "tiny-seed-1", "start each seed's own")])
def test_runs_of_other_models_starts_or_precisions_have_a_row_of_their_own(key, value, says):
    ceiling = result(1, 70.0, changed={"labels": "truth"})
    _, _, *rows = make_tables.tables([result(0), result(1, 90.0, **{key: value}), ceiling])[0].splitlines()
    (_,), (row,) = ([row for row in rows if joint in row] for joint in ("60.0", "90.0"))
    assert says in row and "%" not in row  # the ceiling is not this run's
    # Starts that were made for each seed are one setting, whichever commit made the runs.
    seeds = [result(seed, start=f"tiny-seed-{seed}", commit=f"c{seed}") for seed in range(3)]
    assert len(make_tables.tables(seeds)[0].splitlines()) == 3
    assert "- commit: c0, c1, c2" in make_tables.tables(seeds)[1]
    assert len(make_tables.tables([*seeds, result(3, start="tiny-seed-0")])[0].splitlines()) == 4


def test_a_table_of_ones_own_is_one_command_that_can_be_stopped_and_continued(
        tmp_path, monkeypatch, capsys, finished):
    small = "--dataset toys --points 128 --views 2 --batch-size 16 --epochs 1 --device cpu"
    shutil.copytree(finished[0] / "own", tmp_path / "toys")
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/tables")
    start = starts.read_file(finished[0] / "start.pt") | {"options": {"code": resume.CODE_OF_STARTS}}
    starts.save_file(start, make_tables.start_path(0, folder))
    argv = ["--rows", "", "--labels nonsense", "--data", small, "--seeds", "0", "--jobs", "1"]
    ours, wrong = make_tables.planned_runs(["", "--labels nonsense"], [small], [0], False, folder)
    done = make_tables.results_path(folder, ours)
    # A run that was begun and stopped continues. One that fails is named, and stops no other.
    train.main([*ours.options.split(), "--out", str(done.parent)])
    done.unlink()
    assert_refused(f"1 runs failed.*{wrong.name}", make_tables.main, [*argv, "--rivals", "--into", "shown"])
    said = capsys.readouterr().out
    assert f"{ours.name} done, 1 remain" in said
    assert "continuing" in done.with_name("output.txt").read_text() and done.exists()
    assert "cache, no training" in said and "named together, no training" in said
    assert (folder / "tables.md").read_text() == Path("shown/tables.md").read_text()
    assert "invalid choice" in (folder / wrong.name / "output.txt").read_text()
    # What is done is not run again, and a start that other code made is not taken.
    make_tables.main([*argv[:2], *argv[3:]])
    assert "done" not in capsys.readouterr().out
    monkeypatch.setattr(make_tables, "CODE_OF_STARTS", "edited")
    assert_refused("seed-0.pt was made by other code", make_tables.main, argv)


def test_a_step_is_measured_by_part_and_less_training_is_less_work(tmp_path, monkeypatch, capsys, finished):
    monkeypatch.setattr(measure_speed, "REPEATS", 1)
    out = ["--out", str(tmp_path / "out"), "--batch-size", "4"]
    both, points, oracle = (
        measure_speed.main([*small_flags(finished[0]), *out, *more])
        for more in ((), ("--modalities", "point"), ("--labels", "truth")))
    said = capsys.readouterr().out
    for part in ("step", "views", "grouping", "teacher", "student, forward", "student, backward", "optimizer",
                 "moving average", "evaluation", "objects/s", "% of a matrix product", "GiB"):
        assert part in said
    assert min(both["seconds"].values()) > 0 and min(both["product"], both["memory"]) > 0
    assert points["tflop"] < 0.7 * both["tflop"]
    assert oracle["tflop"] < 0.9 * both["tflop"]  # it asks no teacher
    assert not (tmp_path / "out").exists()


def test_every_row_of_the_tables_differs_from_the_default_by_just_its_options():
    for row, data_sets in make_tables.ROWS.items():
        for data_set in data_sets:
            args = train.parse_args(f"{data_set} {row} --model tiny --eval-every 0".split())
            label = make_tables.options_label({"changed": args.changed})
            assert label == (f"`{row}`" if row else "Cross-MoST"), data_set
    runs = make_tables.planned_runs([*make_tables.ROWS, "--w-gl 1"], None, [0, 1], True, Path("x"))
    assert len({run.name for run in runs}) == len(runs) > 2 * len(make_tables.ROWS)


def test_stopping_the_tables_stops_their_runs(tmp_path, monkeypatch):
    launch = Mock(side_effect=lambda *_: subprocess.Popen(["sleep", "60"]))
    monkeypatch.setattr(make_tables, "launch", lambda *_: started.append(launch()) or started[-1])
    monkeypatch.setattr(make_tables.time, "sleep", Mock(side_effect=KeyboardInterrupt))
    started = []
    with pytest.raises(KeyboardInterrupt):
        make_tables.in_processes(dict.fromkeys("abc"), tmp_path, 2)
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2


@pytest.mark.skipif(not (HERE / "assets/tables.md").exists(), reason="no tables yet")
def test_the_tables_are_those_of_the_recorded_runs():
    runs = json.loads((HERE / "assets/results.json").read_text())
    short, document = make_tables.tables(runs)
    assert (HERE / "assets/tables.md").read_text(encoding="utf-8") == document
    rows = {line for line in (HERE / "README.md").read_text().splitlines()
            if re.match(r"\| (Cross-MoST|`--[^`]*`|.*, no training) \|.* -> ", line)}
    assert len(rows) >= 4 and rows <= set(short.splitlines())


# ------ code, saving ----------------------------------------------------------------------------------------
def test_the_code_s_hash_changes_with_what_code_does_and_not_with_what_it_says(tmp_path):
    assert resume.code_hash(HERE, resume.HASHED) == resume.CODE
    def hash_of(text):
        (tmp_path / "code.py").write_text(text, encoding="utf-8")
        return resume.code_hash(tmp_path, ("code",))
    for module in {*resume.HASHED, *resume.HASHED_OF_STARTS}:
        text = (HERE / f"{module}.py").read_text(encoding="utf-8")
        assert hash_of(text) != hash_of(text + "\nEDITED = True\n"), module
    code = '"""One."""\nimport math\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\n' \
        '        return {}  # four\n'
    before = hash_of(code.format("1 + 1"))
    for said, other in (("One", "1"), ("Two", "2"), ("Three", "\\n3"), ("# four", "# 4"),
                        ("1 + 1", "(1 +  1)")):
        assert hash_of(code.format("1 + 1").replace(said, other)) == before
    for does in ("1 + 2", "1 - 1", "'1 + 1'", "1 + 1.0", "None"):
        assert hash_of(code.format(does)) != before


def test_a_sheet_of_a_data_set_is_drawn_and_other_code_is_said(tmp_path, monkeypatch, capsys, finished):
    monkeypatch.setattr(evaluation, "preview", partial(evaluation.preview, count=2))  # eight take seconds
    sheet, last = tmp_path / "sheet", tmp_path / "last.pt"
    for argv in (["--dataset", str(finished[0] / "own"), "--points", "100"], ["--domain", "source"]):
        evaluation.main([*argv, "--preview", str(sheet)])
        assert Image.open(sheet).size[0] > 800
        sheet.unlink()
    objects = replace(data.sample_shapes(1, 0, points=128), labels=None, names=["no UTF-8: \udcff"])
    evaluation.preview(objects, size=32)
    saved = starts.read_file(finished[0] / "out/last.pt")
    for code, lines in ((resume.CODE, 0), ("0ther", 1)):
        starts.save_file({**saved, "identity": {**saved["identity"], "code": code}}, last)
        capsys.readouterr()
        evaluation.main(["--checkpoint", str(last)])
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines and all("was trained by other code (0ther, now " in line for line in said)


def test_the_ground_knows_no_script_nothing_stands_on_the_roof_and_imports_run_in_no_circle():
    scripts = ["losses", "model", "data", "eval", "train"]
    imported = {}
    for path in [*HERE.glob("*.py"), *HERE.glob("support/*.py"), *HERE.glob("tools/*.py")]:
        if not path.name.startswith("test_"):
            name = ".".join(path.relative_to(HERE).with_suffix("").parts).removesuffix(".__init__")
            found = re.findall(r"^ *(?:from|import) ([\w.]+)(?: import (.*))?", path.read_text("utf-8"), re.M)
            imported[name] = {module for module, _ in found}
            for module, ones in found:
                imported[name] |= {f"{module}.{one}" for one in re.findall(r"\w+", ones)}
    assert {*scripts, "support", "support.files", "tools.make_tables"} <= imported.keys()
    for name, others in imported.items():
        imported[name] = others = others & imported.keys()
        assert not name.startswith("support") or others.isdisjoint(scripts), name
        assert not any(other.startswith("tools") for other in others), name
    while imported:  # take away what stands on nothing that is left
        free = [name for name, others in imported.items() if not others & imported.keys() - {name}]
        assert free, imported
        imported = {name: others for name, others in imported.items() if name not in free}


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path, much = tmp_path / "x.pt", {"a": torch.zeros(1 << 18), "b": torch.zeros(1 << 10)}
    starts.save_file({"a": 0}, path)
    with open(path, "rb") as old:
        starts.save_file({"a": 1}, path)
        assert torch.load(old) == {"a": 0}  # the new one took its name, and did not overwrite it
    for content in ({"a": 2}, much) if Path("/dev/full").exists() else ():
        (tmp_path / ".x.pt").symlink_to("/dev/full")
        assert_refused("No space left on device: '.*/x.pt'", starts.save_file, content, path)
    if resource:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        for size in (0, 1000, 1 << 19, 1 << 20, (1 << 20) + 2000):  # head, middle, end
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            try:
                assert_refused("File too large: '.*/x.pt'", starts.save_file, much, path)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(5, "Input/output error")))
    assert_refused("error: '.*/x.pt'", starts.save_file, {"a": 2}, path)
    assert starts.read_file(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]
