"""What is practical: files, layouts, fetching, starts, pictures, tools. CPU, no network, no weights."""
import argparse
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import unicodedata
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock, call

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
from support import UserError, fetch, files, furniture, pictures, resume, starts
from support.transduction import similar_objects, transduced_labels
from test_crossmost import (CLOUD, HERE, LEANING, MODELNET, NAMES, assert_refused, finished,  # noqa: F401
                            inputs, options, randomise, same, small_clip, small_flags, write_own,
                            write_pictures, write_ulip)
from tools import make_tables, measure_speed, pretrain


# ------ names from all objects together ---------------------------------------------------------------------
def clusters_with_wrong_texts(noise=0.1):
    """40 objects of name 0, 40 of name 1, none of name 2, and texts that name some of them wrongly.

    Returns the teacher's probabilities (80, 3), features of both modalities (80, 8), texts (3, 8), labels."""
    def directions(*degrees):
        angles = torch.tensor(degrees).deg2rad()
        return F.pad(torch.stack([angles.cos(), angles.sin()], dim=1), (0, 6))

    labels = torch.arange(80) // 40
    random = torch.Generator().manual_seed(0)
    noisy = directions(0, 40)[labels] + noise * torch.randn(2, 80, 8, generator=random)
    image, point = F.normalize(noisy, dim=-1)
    # The border between the first two texts runs through the objects of name 1. No object bears the third
    # text, which points to between the two clusters, but away from the plane they lie in.
    texts = directions(10, 70, 20)
    texts[2] = 0.7 * texts[2] + (1 - 0.7 ** 2) ** 0.5 * torch.eye(8)[4]
    probs = (4 * (image + point) @ texts.T).softmax(dim=-1)
    return probs, image, point, texts, labels


def test_objects_named_together_are_right_where_their_texts_are_not_and_an_absent_name_gets_none():
    *given, labels = clusters_with_wrong_texts()
    probs, *_ = given
    assert 0.5 < (probs.argmax(dim=-1) == labels).double().mean() < 0.9
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
    for part in (1, 7, 80):
        assert (named(probs, image, point, part=part) - z).abs().max() < 1e-4

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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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
    (tmp_path / "cut.pt").write_bytes((tmp_path / "evil.pt").read_bytes()[:200])
    torch.save({"weights": 1}, tmp_path / "other.pt")
    np.save(tmp_path / "evil.npy", np.array([Evil()]), allow_pickle=True)
    (tmp_path / "README.md").write_text("# A project")
    (tmp_path / "empty.pt").touch()
    torch.save({"folder": HERE}, tmp_path / "foreign.pt")
    for name, says in (("evil.pt", r" holds \w+\.system, which could run code"), ("nowhere.pt", ""),
                       ("foreign.pt", r" holds pathlib\.\S*Path, which"), ("other.pt", "no known family"),
                       ("cut.pt", " is no checkpoint, or only a part"), ("empty.pt", " is no checkpoint"),
                       ("README.md", " is no checkpoint")):
        with pytest.raises((UserError, OSError), match=name + ".*" + says) as refusal:
            load_checkpoint(tmp_path / name)
        assert "weights_only" not in str(refusal.value)  # torch's advice to load unsafely
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


# ------ fetching --------------------------------------------------------------------------------------------
def test_a_file_comes_from_the_hub_or_else_an_address_and_is_right_or_not_there(tmp_path, monkeypatch):
    path, gone, right, other = (tmp_path / name for name in ("to/toy.bin", "gone", "right", "other"))
    right.write_text("right")
    other.write_text("other")
    answer = Mock()  # what the hub says of a file before it is fetched
    hub = Mock(side_effect=[right, other, OSError("not in the cache")])  # files in its own cache
    monkeypatch.setattr(fetch, "get_hf_file_metadata", answer)
    monkeypatch.setattr(fetch, "hf_hub_download", hub)
    row = dict(file="to/toy.bin", sources=[("a/b", "c/file", "main"), gone.as_uri(), right.as_uri()],
               terms="free", sha256=hashlib.sha256(b"right").hexdigest())
    monkeypatch.setitem(fetch.DOWNLOADS, "toy", row)
    fetch_toy = partial(fetch.fetch_published, "toy", tmp_path)
    assert_refused("toy.bin is missing; leave out --no-download, or save", fetch_toy, allowed=False)
    assert fetch_toy() == right
    assert hub.call_args == call("a/b", "c/file", repo_type="dataset", revision="main")
    with ThreadPoolExecutor() as pool:  # the hub's is wrong now; the second finds what the first fetched
        assert [*pool.map(fetch_toy, [True, True])] == [path, path]
    assert path.read_text() == "right" and hub.call_count == 2 and not other.exists()
    path.unlink()
    right.write_text("wrong")
    answer.side_effect = OSError("out of reach")  # then the hub is asked for what it has here, and no more
    assert_refused(f"out of reach.*gone.*invalid hash.*save https.*a/b/blob/main/c/file as {path}, or name "
                   "the folder that has it with --data-root; .*--model tiny", fetch_toy)
    assert not path.exists() and hub.call_args.kwargs["local_files_only"]


def test_without_a_network_one_line_says_so_at_once_and_what_the_hub_has_here_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=AssertionError))
    began = time.perf_counter()
    for name, says in (("ulip2", "huggingface.co: HF_HUB_OFFLINE is set.*save https://huggingface.co/datasets"
                                 f"/SFXX/ulip/.* as {tmp_path}/ULIP.*with --cache; .*--model tiny"),
                       ("scanobjectnn", f"OFFLINE is set.*as {tmp_path}/scanobjectnn/h5.*--data-root")):
        with pytest.raises(UserError, match=says) as refused:
            fetch.fetch_published(name, tmp_path)
        assert "\n" not in str(refused.value) and "('" not in str(refused.value)
    assert time.perf_counter() - began < 5  # five retries took half a minute
    monkeypatch.setattr(fetch, "hf_hub_download", Mock(return_value=tmp_path / "cached"))
    assert fetch.fetch_published("ulip2", tmp_path) == tmp_path / "cached"


def test_an_archive_is_unpacked_once_inside_its_folder_and_whole_or_not_at_all(tmp_path, monkeypatch):
    folder, broken = tmp_path / "root/set", tmp_path / "broken.zip"
    files = {f"set/{k}.txt": str(k) for k in range(300)} | {"../out.txt": "2", "set/../../out.txt": "3"}
    odd = write_zip(tmp_path / "odd.zip", files)
    broken.write_bytes(odd.read_bytes()[:60])
    for archive, members in ((broken, None), (odd, {"set/1.txt": "0" * 64})):
        assert_refused(f"cannot unpack .*{archive.name}", fetch.unpack, archive, folder, members=members)
    with monkeypatch.context() as patch:
        patch.setattr(data.os, "replace", None)  # as if the process ended before
        assert_refused("TypeError", fetch.unpack, odd, folder)
    assert not folder.exists() and not list(tmp_path.rglob("*.txt"))
    (folder.parent / ".set.part/set").mkdir(parents=True)  # left by a killed process
    (folder.parent / ".set.part/set/half.txt").write_text("1")
    with ThreadPoolExecutor() as pool:  # the second thread waits, and finds it there
        assert [*pool.map(fetch.unpack, 2 * [odd], 2 * [folder])] == [None, None]
    assert (folder / "1.txt").read_text() == "1" and not list(tmp_path.rglob("half.txt"))
    assert all(folder in path.parents for path in tmp_path.rglob("*.txt"))
    assert_named_if_broken(odd, lambda path: fetch.unpack(path, tmp_path / f"{random.random()}"))


def test_an_archive_of_a_stranger_writes_nothing_outside_its_folder(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/1.txt").write_text("1")
    (tmp_path / "link").symlink_to("/tmp")
    for number, (name, inside) in enumerate([("set", "../out"), ("link", "set/link"), ("set", "set")]):
        archive, folder = tmp_path / f"{number}.tar.gz", tmp_path / f"root{number}/set"
        with tarfile.open(archive, "w:gz") as file:
            file.add(tmp_path / name, inside)
        if inside != "set":
            says = f"cannot unpack .*{archive.name}.*(Outside|Absolute)"
            assert_refused(says, fetch.unpack, archive, folder)
            assert not folder.exists() and not list(tmp_path.rglob("out"))
        else:
            fetch.unpack(archive, folder)
            assert [path.name for path in folder.iterdir()] == ["1.txt"]


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


def test_objects_cast_what_a_loader_gives():
    expected = data.Objects(CLOUD, torch.tensor([1]), ["a", "b"])
    for points in (CLOUD.double(), CLOUD.double().numpy(), CLOUD.tolist(), list(CLOUD.numpy()), list(CLOUD)):
        objects = data.Objects(points, np.array([1], np.uint8), ["a", "b"])
        assert torch.equal(objects.points, expected.points) and objects.points.dtype == torch.float32
        assert torch.equal(objects.labels, expected.labels) and objects.labels.dtype == torch.int64
        assert torch.equal(data.fixed_views(objects.points, 2, 32), data.fixed_views(CLOUD, 2, 32))
HASHES = {"source": "6da010e89ddf9284", "target": "b0bea5ac40c31780"}


def test_shapes_are_the_same_with_every_numpy():
    """Equal to the bit with 1.26.4, 2.0.2, 2.2.6 and 2.4.6. Rounded here: other processors differ in the last
    digits of a sine. If this fails, NumPy's Generator draws other numbers, and tables and tiny.pt are old."""
    for domain, expected in HASHES.items():
        points = data.sample_shapes(10, 0, domain, points=64).points[:, :16]
        thousandths = (points * 1000).round().to(torch.int32).numpy()
        assert hashlib.sha256(thousandths.tobytes()).hexdigest()[:16] == expected, np.__version__


def test_a_large_or_far_away_set_is_scaled_in_twice_its_memory_and_keeps_its_digits(tmp_path):
    far = LEANING[None, :64].astype(np.float64) + [4e5, 5.5e6, 300]  # metres of a map: float32 has halves
    assert torch.allclose(data.to_unit_sphere(torch.from_numpy(far)), CLOUD, atol=1e-6)
    with h5py.File(tmp_path / "far.h5", "w") as file:
        file.update(data=far, label=[0])
    clouds = data.read_h5(tmp_path / "far.h5", 1)[0]
    assert clouds.dtype == torch.float32 and torch.allclose(data.to_unit_sphere(clouds), CLOUD, atol=1e-5)

    script = """if True:
        import re, torch, data
        def peak():  # bytes; getrusage would begin with what the parent process had
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        points = torch.rand(4000, 4096, 3)
        data.to_unit_sphere(points[:8], up="-y")  # what torch loads when it is first used
        before = peak()
        data.to_unit_sphere(points, up="-y")
        print((peak() - before) / points.nbytes)"""
    if sys.platform == "linux":
        more = float(subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True,
                                    check=True).stdout)
        assert 0.9 < more < 1.5  # the result, and nothing else of the set's size


# ------ layouts of data sets --------------------------------------------------------------------------------
def write_h5(path, labels, clouds=1, **more):
    """An h5 file of LEANING times `clouds`, larger from object to object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    larger = np.arange(1, len(labels) + 1, dtype="f4")[:, None, None]
    with h5py.File(path, "w") as file:
        file.update(data=LEANING[:64] * larger * clouds, label=np.array(labels), **more)


def write_modelnet(root):
    folder = root / "modelnet40_ply_hdf5_2048"
    for file in ("train0", "train1", "test0"):
        write_h5(folder / f"ply_data_{file}.h5", np.arange(12)[:, None] % 11)
    (folder / "train_files.txt").write_text("data/any/ply_data_train0.h5\ndata/any/ply_data_train1.h5\n")
    (folder / "test_files.txt").write_text("data/any/ply_data_test0.h5\n")
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
    assert_refused("has views, but no names", load, "modelnet40")
    listed = json.dumps([f"airplane/plane_{i}.ply" for i in range(12)])
    (folder / "ply_data_test_0_id2file.json").write_text(listed)
    assert load("modelnet40-depth").names[3] == "plane_3" and plain.names[3] == "3"
    write_h5(folder / "ply_data_test0.h5", np.arange(12) % 11, normal=np.zeros((12, 64, 3)),
             name=[f"object_{i}".encode() for i in range(12)])
    write_pictures(folder / "views/airplane/test", *[f"object_{i // 2}.obj_v{i % 2}.png" for i in range(24)])
    objects, ten = load("modelnet40"), load("modelnet10")
    assert torch.allclose(objects.points, plain.points[..., [2, 0, 1]], atol=1e-6)
    assert objects.names[3] == "object_3" and [len(paths) for paths in objects.images] == [2] * 12
    assert objects.images[7][1].name == "object_7.obj_v1.png"
    assert load("modelnet40-depth").images is None
    assert ten.names == [f"object_{i}" for i in range(1, 11)] and len(ten.images) == 10
    assert_named_if_broken(folder / "ply_data_test0.h5", lambda path: data.read_h5(path, 11)[0][0])


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
    load = partial(data.load_dataset, root=root, points=2100)
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
    said = capsys.readouterr().out
    assert "fetching modelnet40_normal_resampled.tar.gz (1.6 GB" in said
    assert f"reading {root}/modelnet40_normal_resampled: 3 train objects of 2100 points" in said
    assert said.count("depth views are rendered; the original uses shaded pictures") == 1

    for owner in ("airplane", "bed", "night_stand"):  # what was read once is not read again
        shutil.rmtree(root / "modelnet40_normal_resampled" / owner)
    write_pictures(root / "modelnet40_normal_resampled/views/bed/test", "bed_0516.obj.shaded_v001.png")
    again = load("modelnet40", split="test", download=False)
    assert torch.equal(again.points, test.points) and [len(paths) for paths in again.images] == [1, 0]
    assert_refused("modelnet40_ply_hdf5_2048.zip is missing; leave out --no-download, or save https", load,
                   "modelnet40-depth", split="test", download=False)
    write_modelnet(root)  # up to 2,048 points, and always for depth views
    assert load("modelnet40", split="test", points=64).points.shape == (12, 64, 3)
    assert_refused("modelnet40-depth has 64 points", load, "modelnet40-depth", split="test")
    assert "modelnet40_ply_hdf5_2048: 12 test objects of 64 points" in capsys.readouterr().out


def test_reading_that_is_killed_leaves_no_worker_and_no_lock_behind(tmp_path):
    folder = write_resampled(tmp_path)
    names = [f"bed_{i}" for i in range(3000)]
    for name in names:
        os.link(folder / "bed/bed_0516.txt", folder / f"bed/{name}.txt")
    (folder / "modelnet40_train.txt").write_text("\n".join(names))
    script = f"import data; data.load_dataset('modelnet40', {str(tmp_path)!r}, 'train', 2100)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=HERE, stdout=subprocess.PIPE)
    part = tmp_path / ".modelnet40_normal_resampled-train.h5.part"
    while not (part.exists() and part.stat().st_size > 1e5):  # its workers are at work
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=20)  # stdout ends when the last process that could write to it has ended
    with fetch.lock(tmp_path / "modelnet40_normal_resampled-train.h5", timeout=20):
        assert not (tmp_path / "modelnet40_normal_resampled-train.h5").exists()


@pytest.mark.parametrize("file, content, says", [
    ("bed/bed_0516.txt", None, "no .*bed_0516.txt; --points 2048 reads modelnet40_ply_hdf5_2048"),
    ("bed/bed_0516.txt", "1,2,3\n1,2\n", "cannot read .*bed_0516.txt.*; expected lines x,y,z"),
    ("airplane/airplane_7.txt", "1,2,3\n", "airplane_7.txt has 1 points, .*bed_0516.txt has 2100"),
    ("modelnet40_test.txt", "sofa-1\n", "cannot read .*modelnet40_test.txt.*; expected names CLASS_NUMBER")])
def test_what_was_read_is_cached_whole_or_not_at_all(tmp_path, file, content, says):
    folder = write_resampled(tmp_path)
    whole = (folder / file).read_text()
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    load = partial(data.load_dataset, "modelnet40", tmp_path, "test", 2100, download=False)
    assert_refused(says, load)
    assert not list(tmp_path.rglob("*.h5")) and not list(tmp_path.rglob("*.part"))
    (folder / file).write_text(whole)
    assert load().names == ["bed_0516", "airplane_7"]
    (folder / "modelnet40_test.txt").write_text("airplane_7\n")  # another list is another cache
    assert load().names == ["airplane_7"]


@pytest.mark.skipif(not MODELNET.exists(), reason="needs the real ModelNet40")
def test_the_real_modelnet_has_its_counts_and_stands_upright():
    forty, ten = (data.load_dataset(name, MODELNET.parent, "test") for name in ("modelnet40", "modelnet10"))
    assert (len(forty), len(forty.class_names), len(ten), ten.class_names) == (2468, 40, 908, NAMES)
    assert forty.labels.bincount().max() == 100 and len(ten.names) == 908
    assert (ten.points[ten.labels == 8][..., 2] > 0).float().mean() > 0.55  # most of a table is its top
    low, high = forty.points[forty.labels == 0].aminmax(dim=1)
    assert (high - low).mean(dim=0).argmin() == 2  # and aeroplanes are flat


@pytest.mark.skipif(not MODELNET.exists(), reason="needs the real ModelNet40")
def test_resampled_objects_stand_and_face_as_the_same_objects_of_the_h5_files():
    forty = data.load_dataset("modelnet40", MODELNET.parent, "test")
    for path in (MODELNET.parent / "samples/normal_resampled").iterdir():
        same_object = forty.points[forty.names.index(path.stem)]
        cloud = data.to_unit_sphere(torch.from_numpy(data.read_resampled_text(path)[None, :8192]))[0]
        far = [torch.cdist(same_object, turned).amin(dim=1).mean() for turned in (
            cloud, cloud * torch.tensor([-1, -1, 1]), cloud[:, [1, 0, 2]] * torch.tensor([1, -1, 1]))]
        assert cloud.shape == (8192, 3) and far[0] < 0.03 and far[0] == min(far)


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


# ------ files of objects ------------------------------------------------------------------------------------
def assert_named_if_broken(path, read):
    """Cut off or changed anywhere, a file is read or an error names it. Ten thousand were tried once."""
    chance, whole = np.random.default_rng(0), np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(20):
        broken = whole.copy()
        broken[chance.integers(len(broken), size=4)] = chance.integers(256, size=4)
        path.write_bytes(broken[:chance.integers(2 * len(broken))].tobytes())
        try:
            found = read(path)
            assert found is None or found.shape == (64, 3)
        except (UserError, OSError) as error:
            assert path.name in str(error)


@pytest.mark.parametrize("extension", files.CLOUDS + files.MESHES)
def test_objects_of_every_format_are_read_the_same_every_time_or_named(tmp_path, extension):
    path, half = tmp_path / f"object{extension}", np.array([2, 1, 0.5])
    if extension in files.GLTF:  # a scene: a unit box and how it is stretched; its y is up
        scene, half = trimesh.Scene(), half[[2, 0, 1]]
        scene.add_geometry(trimesh.creation.box((1, 1, 1)), transform=np.diag([4, 2, 1, 1]))
        for name, content in trimesh.exchange.gltf.export_gltf(scene, embed_buffers=True).items():
            (tmp_path / name).write_bytes(content)
        if extension == ".glb":
            scene.export(path)
        else:
            os.replace(tmp_path / "model.gltf", path)
    elif extension in files.MESHES:
        trimesh.creation.box((4, 2, 1)).export(path)
    elif extension == ".npy":
        np.save(path, LEANING)
    else:
        between = "," if extension == ".csv" else " "
        np.savetxt(path, LEANING[:, [0, 1, 2, 0]], delimiter=between, header="x y z r", comments="")
    if extension == ".off":  # ModelNet's one-line header
        path.write_text(path.read_text().replace("OFF\n", "OFF", 1))
    points = files.read_object(path, 2000 if extension in files.MESHES else 200)
    assert np.array_equal(points, files.read_object(path, len(points))) and points.dtype == np.float32
    assert np.abs(points.mean(axis=0)).max() < (0.2 if len(points) == 200 else 1e-5)
    if extension in files.MESHES:  # on the surface of the box: six faces by their area
        low, high = points.min(axis=0), points.max(axis=0)
        away = np.abs(np.abs(points - (low + high) / 2) / half - 1)
        assert np.allclose(high - low, 2 * half, atol=0.02) and away.min(axis=1).max() < 0.02
        assert 1000 < (away[:, half.argmin()] < 0.005).sum() < 1300  # 8 of 14
    else:
        centred = LEANING - LEANING.mean(axis=0)
        away = np.linalg.norm(points[:, None] - centred[None], axis=-1)
        assert away.min(axis=1).max() < 1e-4 and len(set(away.argmin(axis=1))) == 200  # chosen, none twice
    assert_named_if_broken(path, lambda path: files.read_object(path, 64))
SOME = LEANING[:60].astype(np.float64).round(4)  # rows of the tables below
POINT = [[f"{value:.4f}" for value in row] for row in SOME]
COMMA = [[cell.replace(".", ",") for cell in row] for row in POINT]
MILLI = [[f"{1e4 * value + 5e4:,.3f}" for value in row] for row in SOME]  # 51,234.567
SWAPPED = [[cell.translate(str.maketrans(",.", ".,")) for cell in row] for row in MILLI]
COLOURS = [[str(7 * i % 256), "180", "20"] for i in range(60)]
COUNTED = [[str(i)] for i in range(60)]
CLOCK = [[f"{i + math.sin(i) / 3:.3f}"] for i in range(60)]


def table_of(*columns, between=",", head="", tail=""):
    """Columns side by side as text, below a head and above a tail."""
    rows = [between.join(sum(cells, [])) for cells in zip(*columns)]
    return "\n".join([*([head] if head else []), *rows, tail])


@pytest.mark.parametrize(
    "text",
    [
        table_of(POINT),
        table_of(POINT, between=" "),
        table_of(POINT, between="   "),
        table_of(POINT, between=" , "),
        table_of(POINT, between="\t"),
        table_of(POINT, between=";"),
        table_of(POINT).replace("\n", "\r\n"),
        table_of(COUNTED, POINT, head=",x,y,z"),
        table_of(COUNTED, POINT, between=";", head='"id";"X";"Y";"Z"'),
        table_of(COLOURS, POINT, between=" ", head="# R G B X Y Z"),
        table_of(COLOURS, POINT, head="//R,G,B,X,Y,Z\n60"),
        table_of(COUNTED, POINT, head="scan 7\nid,X [m],Y [m],Z [m]"),
        table_of(POINT, COLOURS, between=" ", head="//X Y Z R G B\n60"),
        table_of(POINT, between=" ", head="60"),
        table_of(POINT, between=" ", head="60 3 1"),
        table_of(POINT, between=" ", head="2024-05-06 10:11:12 1.0"),
        table_of(POINT, between=" ", tail="end of file\nexported by X 1.2\n"),
        table_of(POINT, tail="# 1, 2, 3\n// 4"),
        table_of(POINT[:9], between=" ", tail="# 1 2 3\n// 4 5 6\n" + table_of(POINT[9:], between=" ")),
        table_of([[f'"{cell}"' for cell in row] for row in POINT]),
        table_of(POINT, [["a chair"]] * 60, between="\t"),
        table_of([[f'"{cell}"' for cell in row] for row in COMMA]),
        table_of([['"leg, left"']] * 60, POINT, head="n,x,y,z"),
        table_of(COMMA, between=";"),
        table_of(COMMA, between="\t", head="x\ty\tz"),
        table_of(COMMA, between=" "),
        table_of(COMMA, between=";", head="X;Y;Z").encode("utf-16"),
        table_of(POINT).encode("utf-16-le"),
        table_of(POINT, POINT[::-1], head="X [m] Y [m] Z [m] a (1/s) b c", between=" "),
        table_of([["7"]] * 60, POINT, head="FIELDS i x y z\nSIZE 4 4 4 4\nCOUNT 1 1 1 1", between=" "),
        table_of([["7"]] * 60, POINT, head="i,x,y,z,\n# exported"),
        table_of(POINT, [["1"]] * 60, head="# made by a program of 2024\n60 4 1", between=" "),
        b"\xef\xbb\xbf" + table_of(COUNTED, POINT, head="id,x,y,z").encode(),
        table_of(POINT, head="Gr\xf6\xdfe").encode("latin1"),
        table_of(MILLI, between=" "),
        table_of(MILLI, between=";"),
        table_of(SWAPPED, between=";"),
        table_of([[f"{value:.8e}" for value in row] for row in SOME]),
        table_of([[f"{value:.8e}".replace(".", ",") for value in row] for row in SOME], between="\t"),
    ],
)
def test_tables_of_numbers_are_read_as_their_authors_meant_them(tmp_path, text):
    path = tmp_path / "cloud.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    points = files.read_object(path, 60)
    is_large = points.max() > 1e3
    assert np.allclose(points / (1e4 if is_large else 1), SOME - SOME.mean(axis=0), atol=1e-4)


@pytest.mark.parametrize(
    "text, says",
    [
        (table_of(COUNTED, POINT), "its first column counts the rows; name"),
        (table_of([[f"{i}.0"] for i in range(60)], POINT), "first column counts"),
        (table_of([[f"{0.05 * i:.2f}"] for i in range(60)], POINT), "first column counts"),
        (table_of([[str(17 * i % 60)] for i in range(60)], POINT), "first column counts"),
        (table_of(COUNTED, POINT, between=" ", head='"x" "y" "z"'), "first column counts"),
        (table_of(COLOURS, POINT), "look like colours"),
        (table_of(COLOURS), "look like colours"),
        (table_of([["0.0", "0.0", "1.0"]] * 60, POINT), "look like"),
        (table_of([["0.0", "0.6", "-0.8"]] * 60, POINT), "look like normals"),
        (table_of([["0.5"]] * 60, POINT, head="t,px,py,pz"), "its header names t, px, py, pz; call"),
        (table_of(CLOCK, POINT, head="# t px py pz"), "its header names t, px, py, pz; call"),
        (table_of(CLOCK, POINT, head="t,px,py,pz\n60"), "its header names t, px, py, pz; call"),
        (table_of(CLOCK, POINT, head="t,px,py,pz,"), "its header names t, px, py, pz; call"),
        (table_of(POINT, head="Northing,Easting,Height"), "its header names northing, easting, height; call"),
        (table_of(POINT, head="nx ny nz", between=" "), "its header names nx, ny, nz; call"),
        (table_of(POINT, POINT, head="x,y,z"), "header names 3 columns, its rows have 6; write"),
        (table_of(POINT[:29]) + table_of(POINT, POINT), "first rows have 3 columns, later ones have 6"),
        (table_of([["3"]] * 60, POINT), "first column looks like a label"),
        (table_of([[str(i // 20)] for i in range(60)], POINT), "first column looks like a label"),
        (table_of([["0.0"] * 3] * 2 + POINT), "2 of its 62 points are 0 0 0"),
        (table_of(POINT + [["-9999"] * 3]), "1 of its 61 points lie fifty times as far"),
        (table_of(POINT, POINT, head="x,y,z,x,y,z"), "names x, y or z twice"),
        (table_of(COMMA), "commas stand within numbers and between them; separate"),
        (table_of([["1,234", "5,678", "9,012"]] * 60, between=" "), "may be decimal or of thousands"),
        (table_of([["1,5", "2.5", "3,5"], *COMMA], between=";"), "may be decimal or of thousands"),
        (table_of(POINT, tail="0.1,0.2"), "row 61 has 2 columns, others have 3"),
        (table_of(POINT, tail="1.5,2.5,3.5,4.5"), "row 61 has 4 columns"),
        (table_of(POINT, tail="1.5,,3.5"), "point 61 has no y, expected a number"),
        (table_of(POINT, head="x,y,z\n,1.5,2.5"), "point 1 has no x"),
        (table_of(POINT, tail="NA,1.5,2.5\n" + table_of(POINT)), "point 61 has 'NA' as x"),
        (table_of(POINT, tail="nan,1.5,2.5"), "1 of its 61 points have NaN or infinite"),
        (table_of([row[:2] for row in POINT]), "no line of three numbers"),
        ("hello world, a chair\n" * 60, "no line of three"),
        ("", "holds no numbers"),
        (table_of(POINT) + "\0" * 99, "zero bytes, so it is no text"),
        (table_of([["C"]] * 60, POINT, between=" "), "point 1 has 'C' as x"),
    ],
)
def test_tables_that_may_mean_two_things_are_refused_with_what_was_found(tmp_path, text, says):
    (tmp_path / "cloud.csv").write_text(text)
    assert_refused(f"cannot read .*cloud.csv: .*{says}", files.read_object, tmp_path / "cloud.csv", 60)


def test_arrays_are_clouds_by_their_shape_or_fields_and_whole_sets_are_refused(tmp_path):
    path = tmp_path / "cloud.npy"
    record = np.zeros(60, [("intensity", "f4"), ("X", "f8"), ("Y", "f8"), ("Z", "f8")])
    record["X"], record["Y"], record["Z"] = SOME.T
    seen = np.stack(np.broadcast_arrays(*np.ogrid[0:1:40j, 0:1:50j], 0.5), axis=-1)  # a wall before a camera
    several = data.sample_shapes(50, 0, points=64).points.numpy()
    for array, cloud in (
        (SOME, SOME),
        (SOME[None], SOME),
        (SOME[:, None], SOME),
        (LEANING.reshape(20, 25, 3), LEANING),
        (np.hstack([SOME, SOME]), SOME),
        (record, SOME),
        (record.reshape(6, 10), SOME),
        (seen, seen.reshape(-1, 3)),
        ((1000 * SOME).astype(np.int16), (1000 * SOME).astype(int)),
    ):
        np.save(path, array)
        points = files.read_object(path, 60, 2000)
        assert np.allclose(points, cloud - cloud.mean(axis=0), atol=1e-5), array.shape
    for array, says in (
        (several, r"shape is \(50, 64, 3\), expected one cloud"),
        (several[2::10], r"\(5, 64, 3\)"),
        (np.repeat(several, 9, axis=0), r"\(450, 64, 3\)"),
        (SOME.T, "looks transposed"),
        (SOME.ravel(), r"\(180,\)"),
        (SOME > 1, "bool, expected numbers"),
        (SOME + 1j, "complex128"),
        (SOME.astype(str), "<U32"),
        ((255 * LEANING).astype(np.uint8), "bytes, as colours and pictures do"),
        (np.random.default_rng(0).random((60, 40)), r"shape is \(60, 40\), expected \(N, 3\) and a few"),
        (np.vstack([SOME, 0 * SOME[:2]]), "2 of its 62 points are 0 0 0"),
        (np.vstack([SOME + 9e5, 0 * SOME[:1]]), "1 of its 61 points lie fifty times"),
        ((SOME + [3e5, 5e6, 0]).astype(np.float32), "steps of 0.5: float32 is too coarse"),
        (record[["X", "Y"]], "fields X, Y, expected x, y, z"),
        (np.zeros((0, 3)), "holds no points"),
        (np.hstack([COUNTED, SOME]).astype(float), "counts the rows"),
    ):
        np.save(path, array)
        assert_refused(f"cannot read .*cloud.npy: .*{says}", files.read_object, path, 60)
BOX = trimesh.creation.box((1, 1, 1))
QUADS = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
TWO = np.concatenate([BOX.vertices, BOX.vertices + [5, 0, 0]])  # two unit boxes, 5 apart along x
ROWS = ["{} {} {}".format(*vertex) for vertex in TWO]


def write_ply(
    path, faces, kind="binary_little_endian", element="face", comment=b"", vertices=TWO, count=None
):
    """A PLY file of vertices and polygons."""
    head = (
        f"element vertex {count or len(vertices)}\nproperty double x\nproperty double y\nproperty double z\n"
        f"element {element} {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    if kind == "ascii":
        rows = [*vertices, *([len(face), *face] for face in faces)]
        body = "".join(" ".join(map(str, row)) + "\n" for row in rows).encode()
    else:
        order = "<" if "little" in kind else ">"
        body = np.asarray(vertices).astype(f"{order}f8").tobytes()
        body += b"".join(bytes([len(face)]) + np.array(face, f"{order}i4").tobytes() for face in faces)
    path.write_bytes(
        b"ply\nformat " + kind.encode() + b" 1.0\ncomment " + comment + b"\n" + head.encode() + body
    )


def test_meshes_of_many_programs_are_read_whole(tmp_path):
    blocks = "".join(
        "".join(f"v {row}\n" for row in ROWS[at : at + 8])
        + "vt 0 0\nvn 0 0 1\n"
        + "".join("f " + " ".join(f"{i - 8}/-1/-1" for i in face) + "\n" for face in QUADS)
        for at in (0, 8)
    )
    vertices = "".join(f"v {row}\n" for row in ROWS)
    faces = QUADS + [[i + 8 for i in face] for face in QUADS]
    plain = vertices + "".join("f " + " ".join(str(i + 1) for i in face) + "\n" for face in faces)
    mixed = BOX.faces.tolist() + faces[6:]
    off = "\n".join([*ROWS, *(" ".join(map(str, [len(face), *face])) for face in faces)])
    texts = {
        "blocks.obj": blocks,
        "latin1.obj": "usemtl gr\xfcn\n" + plain,
        "bom.obj": "\xef\xbb\xbf" + plain,
        "tabs.OBJ": plain.replace(" ", "\t"),
        "continued.obj": plain.replace(" 4 3", " \\\n4 3"),
        "plain.off": f"OFF\n16 12 0\n{off}",
        "glued.OFF": f"OFF16 12 0\n{off}\n",
        "bare.off": f"# x\n16 12\n{off}",
        "coff.off": f"COFF\n16 12 0\n{off}".replace(" 0.5\n", " 0.5 200 10 10 255\n"),
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode("latin1"))
    for kind in ("binary_little_endian", "binary_big_endian", "ascii"):
        write_ply(tmp_path / f"mixed_{kind}.ply", mixed, kind)
    write_ply(tmp_path / "comment.ply", faces, comment="Größe".encode("latin1"))
    scene = trimesh.Scene([trimesh.Trimesh(TWO[:8], BOX.faces), trimesh.Trimesh(TWO[8:], BOX.faces)])
    scene.apply_transform(np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]]))
    scene.export(tmp_path / "CAPITALS.GLB")
    for name, content in trimesh.exchange.gltf.export_gltf(scene).items():
        (tmp_path / name).write_bytes(content)  # a .gltf and its .bin
    scene.to_mesh().export(tmp_path / "binary.stl")
    solid = scene.to_mesh().export(file_type="stl_ascii").split("\n", 1)[1]
    (tmp_path / "ascii.stl").write_bytes(b"solid M\xf6bel\n" + solid.encode())
    paths = sorted(path for path in tmp_path.iterdir() if path.suffix != ".bin")
    assert len(paths) == len(texts) + 8
    for path in paths:
        points = files.read_object(path, 2000)
        size = np.sort(np.ptp(points, axis=0))
        assert np.allclose(size, [1, 1, 6], atol=0.02), path.name
        assert (
            abs((points[:, np.ptp(points, axis=0).argmax()] > 0).mean() - 0.5) < 0.05
        ), path.name  # both boxes
    cloud = trimesh.PointCloud(TWO[8:].repeat(50, axis=0))
    trimesh.Scene([trimesh.Trimesh(TWO[:8], BOX.faces), cloud]).export(tmp_path / "both.glb")
    assert (
        np.ptp(files.read_object(tmp_path / "both.glb", 800), axis=0).max() > 5.9
    )  # its mesh and its points


def change_glb(path, change):
    """A unit box as .glb whose JSON `change` edits."""
    raw = trimesh.Scene(BOX).export(file_type="glb")
    size = int.from_bytes(raw[12:16], "little")
    tree = json.loads(raw[20 : 20 + size])
    change(tree)
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    rest = raw[20 + size :]
    total = (20 + len(text) + len(rest)).to_bytes(4, "little")
    path.write_bytes(raw[:8] + total + len(text).to_bytes(4, "little") + raw[16:20] + text + rest)


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda tree: tree.update(extensionsRequired=["KHR_draco_mesh_compression"]),
            "KHR_draco_mesh_compression",
        ),
        (
            lambda tree: tree.update(extensionsRequired=["EXT_meshopt_compression"]),
            "EXT_meshopt_compression",
        ),
        (lambda tree: tree.update(extensionsRequired=["KHR_mesh_quantization"]), "KHR_mesh_quantization"),
        (
            lambda tree: [a.update(componentType=5122, normalized=True) for a in tree["accessors"]],
            "quantised",
        ),
        (lambda tree: [a.pop("bufferView") for a in tree["accessors"]], "compressed or sparse"),
        (lambda tree: tree["meshes"][0]["primitives"][0].update(mode=6), "triangle fans"),
        (lambda tree: tree.update(skins=[{"joints": [0]}]), "skeleton"),
        (lambda tree: tree["meshes"][0].update(weights=[0.0, 0.5]), "morph targets"),
        (lambda tree: tree.update(extensionsUsed=["EXT_mesh_gpu_instancing"]), "instances"),
        (lambda tree: tree["nodes"].clear() or tree.update(scenes=[{"nodes": []}]), "holds no points"),
        (
            lambda tree: tree.update(extensionsRequired=["KHR_texture_transform", "KHR_materials_unlit"]),
            None,
        ),
    ],
)
def test_gltf_that_would_be_read_as_zeros_is_refused_by_the_extensions_name(tmp_path, change, says):
    change_glb(tmp_path / "box.glb", change)
    if says is None:
        assert len(files.read_object(tmp_path / "box.glb", 100)) == 100
    else:
        assert_refused(f"cannot read .*box.glb: .*{says}", files.read_object, tmp_path / "box.glb", 100)


def test_a_notch_of_a_polygon_stays_open_or_is_refused(tmp_path):
    """A dart, an L, and a U, whose two notched corners do not see each other."""
    dart = [[0, 0], [2, 1], [0, 2], [0.5, 1]]
    ell = [[0, 0], [3, 0], [3, 1], [1, 1], [1, 3], [0, 3]]
    for corners, area in ((dart, 1.5), (ell, 5.0)):
        for turn in range(len(corners)):
            vertices = np.pad(np.roll(corners, turn, axis=0), [(0, 0), (0, 1)])
            face = [list(range(len(corners)))]
            rows = ["{} {} {}".format(*vertex) for vertex in vertices]
            text = "\n".join(f"v {row}" for row in rows) + "\nf " + " ".join(str(i + 1) for i in face[0])
            write_ply(tmp_path / "x.ply", face, vertices=vertices)
            for read, given in ((files.read_obj, text), (files.read_ply, (tmp_path / "x.ply").read_bytes())):
                points, faces = read(given)
                mesh = trimesh.Trimesh(points, faces, process=False)
                assert mesh.area == pytest.approx(area), (corners, turn, read)
    u = [[0, 0, 0], [3, 0, 0], [3, 3, 0], [2, 3, 0], [2, 1, 0], [1, 1, 0], [1, 3, 0], [0, 3, 0]]
    write_ply(tmp_path / "x.ply", [list(range(8))], vertices=np.array(u, float))
    assert_refused("face of 8 corners has notches; export", files.read_object, tmp_path / "x.ply", 9)


def test_corners_of_faces_may_have_coordinates_of_a_texture(tmp_path):
    head = "property list uchar int vertex_indices\n"
    write_ply(tmp_path / "x.ply", [[*face] for face in BOX.faces], "ascii", vertices=BOX.vertices)
    text = (tmp_path / "x.ply").read_text().replace(head, head + "property list uchar float texcoord\n")
    rows = text.splitlines()
    rows[-12:] = [f"{row} 6 {k / 9} 0 0 1 1 {k / 20}" for k, row in enumerate(rows[-12:])]
    (tmp_path / "x.ply").write_text("\n".join(rows) + "\n")
    vertices, faces = files.read_ply((tmp_path / "x.ply").read_bytes())
    assert len(vertices) == 8 and len(faces) == 12


def test_what_is_no_surface_is_not_sampled_as_one(tmp_path):
    cloud = "".join("v {} {} {}\n".format(*row) for row in SOME)
    texts = {
        "f 1 2 3\n": "1 faces join only 3 of its 60 points; export",
        "l 1 2 3\n": "lines or curves and no faces",
        "f 0 1 2\n": "names vertex -1",
        "f 1 2 99\n": "names vertex 98",
        "f -1 -2 -99\n": "names vertex -39",
        "f 1 2 3\n" * 40: "40 faces join only 3",
        "v 1\n": "column",
    }
    for text, says in texts.items():
        (tmp_path / "x.obj").write_text(cloud + text)
        assert_refused(f"cannot read .*x.obj: .*({says})", files.read_object, tmp_path / "x.obj", 50)
    for text, says in (
        ("v 0 0 0\nv 1 1 1\nv 2 2 2\nf 1 2 3\n", "its faces have no area"),
        ("# nothing\n", "no points"),
        ("v 0 0 0\nv 1 0 0\nv nan 1 0\nf 1 2 3\n", "faces have NaN"),
    ):
        (tmp_path / "x.obj").write_text(text)
        assert_refused(f"cannot read .*x.obj: .*{says}", files.read_object, tmp_path / "x.obj", 50)
    ply, faces = tmp_path / "x.ply", [[i, i + 1, i + 2] for i in range(0, 57, 3)]
    for change, says in (
        (dict(element="tristrips", vertices=SOME), "triangle strips; export it as triangles"),
        (dict(element="edge", vertices=SOME), "edges and no faces"),
        (dict(faces=faces[:1], vertices=SOME), "join only 3 of its 60"),
        (dict(faces=[], vertices=SOME, count=99, kind="ascii"), "declares|early end"),
        (dict(vertices=SOME[:50]), "names vertex 56|out of bounds"),
    ):
        write_ply(ply, **dict(dict(faces=faces), **change))
        assert_refused(f"cannot read .*x.ply: .*({says})", files.read_object, ply, 50)
    off = "OFF\n16 12 0\n" + "\n".join([*ROWS, *(f"3 {a} {b} {c}" for a, b, c in BOX.faces)])
    for name, text in (
        ("x.off", off[:-20]),
        ("x.stl", BOX.export(file_type="stl")[:400]),
        ("y.stl", BOX.export(file_type="stl_ascii")[:600]),
        ("z.stl", BOX.export(file_type="stl_ascii") + "\n" + BOX.export(file_type="stl_ascii")[:600]),
    ):
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        assert_refused(f"cannot read .*{name}: .*cut off", files.read_object, tmp_path / name, 50)


def test_coordinates_on_a_map_keep_their_digits_in_every_format(tmp_path):
    away = 0.2 * SOME + [356789.4, 5812345.6, 41.2]  # 0.8 m large, where a float32 has steps of 0.5 m
    np.save(tmp_path / "a.npy", away)
    np.savetxt(tmp_path / "a.xyz", away, fmt="%.6f")
    write_ply(tmp_path / "a.ply", [], vertices=away)
    (tmp_path / "a.obj").write_text("".join("v {:.6f} {:.6f} {:.6f}\n".format(*row) for row in away))
    (tmp_path / "a.off").write_text(
        "OFF\n60 0 0\n" + "".join("{:.6f} {:.6f} {:.6f}\n".format(*row) for row in away)
    )
    for path in tmp_path.iterdir():
        assert np.allclose(
            files.read_object(path, 60), 0.2 * (SOME - SOME.mean(axis=0)), atol=2e-6
        ), path.suffix
    box = BOX.copy().apply_translation([356789.4, 5812345.6, 0])  # STL holds float32 only
    box.export(tmp_path / "a.stl")
    assert_refused("a.stl: it is 1 long, .*steps of 0.5: float32", files.read_object, tmp_path / "a.stl", 60)


def test_one_folder_of_y_up_obj_and_gltf_has_one_meaning(tmp_path):
    (tmp_path / "own/train").mkdir(parents=True)
    (tmp_path / "own/classes.txt").write_text("box\nball\n")
    tall = trimesh.creation.box((1, 4, 2))  # 4 upwards, as its axis y
    for name in ("a.obj", "b.glb", "c.GLB", "d.stl"):
        (tmp_path / "own/train" / name).write_bytes(
            trimesh.Scene(tall).export(file_type="glb")
            if "gl" in name.lower()
            else (
                tall.export(file_type=name[-3:]).encode()
                if name[-3:] == "obj"
                else tall.export(file_type="stl")
            )
        )
    tallest = {
        up: np.ptp(
            data.load_dataset(str(tmp_path / "own"), tmp_path, "train", 500, up=up).points.numpy(), axis=1
        )
        .argmax(axis=1)
        .tolist()
        for up in ("y", None)
    }
    assert tallest == {"y": [2, 2, 2, 2], None: [1, 2, 2, 1]}  # --up is of the other formats
    objects = evaluation.load_files([tmp_path / "own/train/a.obj", tmp_path / "own/train/c.GLB"], 500, "y")
    assert np.ptp(objects.points.numpy(), axis=1).argmax(axis=1).tolist() == [2, 2]


# ------ folders, photographs, names -------------------------------------------------------------------------
def test_a_folder_of_ones_own_is_read_with_and_without_labels_and_set_upright(tmp_path, monkeypatch):
    named, bare = str(write_own(tmp_path / "named")), str(write_own(tmp_path / "bare", labelled=False))
    shutil.rmtree(tmp_path / "bare/test")
    write_pictures(tmp_path / "bare/views/train0", "1.png", "2.jpg")
    load, scan = partial(data.load_dataset, root=tmp_path, split="test"), Mock(wraps=data.scan)
    objects = load(named, points=64)
    assert objects.class_names == NAMES and [k // 2 for k in range(20)] == objects.labels.tolist()
    assert objects.names[:2] == ["test0", "test10"] and (objects.name, objects.split) == ("named", "test")
    for up, axis, sign in (("z", 2, 1), ("y", 1, 1), ("-y", 1, -1)):
        lying = load(named, points=64, up=options(f"--up={up}").up)
        turn = torch.linalg.lstsq(objects.points[0], lying.points[0]).solution
        assert turn[axis].tolist() == pytest.approx([0, 0, sign], abs=1e-4)  # what pointed up is along z now
        assert torch.linalg.det(turn) == pytest.approx(1, abs=1e-4)  # a rotation, no mirror image
    objects = load(bare, points=64)
    assert objects.labels is None and len(objects) == 48 and objects.split == "train"
    assert [len(paths) for paths in objects.images] == [2] + [0] * 47
    assert [data.dataset_row(root)["templates"] for root in (bare, named)] == ["photo", "depth"]
    monkeypatch.setattr(data, "scan", scan)
    for points, most in ((32, 96), (100, 128)):  # a scan loses points: more of a file are read than asked for
        assert load(named, points=points, domain="target").points.shape == (20, points, 3)
        assert scan.call_args.args[0].shape == (20, most, 3)


def test_photographs_and_depth_views_take_one_path_and_a_broken_picture_is_named(tmp_path):
    root = write_own(tmp_path / "own", labelled=False)
    write_pictures(root / "views/train0", *[f"{k}.png" for k in range(5)])
    objects = data.load_dataset(str(root), tmp_path, "train", points=64).pick(torch.arange(8))
    draw = partial(data.training_photographs, objects, torch.arange(8).split(4), 32)
    (weak, strong), again, other = (next(iter(draw(seed))) for seed in (1, 1, 2))
    assert torch.equal(strong, again[1]) and not torch.equal(strong, other[1])
    views = data.draw_views(objects.points[:4], 32, (weak, strong))
    assert strong.shape == weak.shape == (4, 3, 32, 32) and 0 <= strong.min() <= strong.max() <= 1
    assert torch.equal(views["weak_image"], weak) and weak[0, 2].mean() == pytest.approx(200 / 255, abs=0.01)
    assert torch.equal(weak[1, 0], weak[1, 1])  # a depth view is grey
    for count, reds in ((None, [0, 20, 40, 60, 80]), (2, [0, 80])):
        stills = list(data.fixed_images(objects, count, 32, 4, "cpu"))
        assert stills[0][0, :, 0, 0, 0].mul(255).round().tolist() == reds  # all its photographs, or some
        assert [len(images[0]) for images in stills[1:]] == [count or 6] * 7  # and depth views
    for path in objects.images[0]:
        path.write_bytes(b"not a picture")
    for images in (draw(1), data.fixed_images(objects, None, 32, 4, "cpu")):
        assert_refused("^cannot read .*[0-4].png: .*; replace or remove it$", next, iter(images))


def test_links_are_entered_hidden_files_skipped_others_counted_and_all_bad_ones_named(tmp_path, capsys):
    root, store = write_own(tmp_path / "own"), tmp_path / "store"
    load = partial(data.load_dataset, str(root), tmp_path, "train", 64)
    before = load()
    shutil.move(root / "train/bed", store)
    os.symlink(store, root / "train/bed")
    os.symlink(root / "train", root / "train/chair/loop")
    for name in (
        "train/chair/._a.npy",
        "train/chair/.DS_Store",
        "train/__MACOSX/a.npy",
        "train/.ipynb_checkpoints/b.npy",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"\0\5\x16\7")
    for name in ("a.pcd", "b.PCD", "c.las", "d.mtl"):
        (root / "train/sofa" / name).write_text("x")
    BOX.export(root / "train/table/box.off")
    (root / "train/table/box.txt").write_text("a box, seen on Monday")
    after = load()
    assert (
        after.names == sorted([*before.names, "box"], key=after.names.index)
        and len(after) == len(before) + 1
    )
    assert (
        "ignored 5 files" in (said := capsys.readouterr().err)
        and "2 .pcd, 1 .las, 1 .mtl, 1 .txt; convert" in said
    )
    for i in range(12):
        (root / f"train/bed/bad{i}.ply").write_text("no")
    os.symlink("/nowhere", root / "train/bed/gone.npy")
    assert_refused(
        r"13 of 62 files cannot be used:(\n  cannot read .*bad\d+.ply: .*){10}\n  and 3 more", load
    )


def test_single_files_of_unknown_kinds_say_which_are_read(tmp_path):
    (tmp_path / "a.pcd").write_text("1 2 3\n" * 99)
    os.symlink("/nowhere", tmp_path / "b.ply")
    for name, says in (
        ("a.pcd", r"a.pcd is not of a format that is read \(.npy .txt"),
        ("", "is a folder; name the files"),
        ("b.ply", "b.ply is a link to a file that is not there"),
        ("c.ply", "no .*c.ply"),
    ):
        assert_refused(says, files.read_object, tmp_path / name, 50)


def test_a_picture_belongs_to_the_object_whose_whole_name_it_begins_with(tmp_path, capsys):
    names = ["Chair", "Chair.001", "Büro", "0001", "door"]
    pictures = {
        "Chair.png": 0,
        "Chair.001.png": 1,
        "Chair.001_front.webp": 1,
        "Chair.002.png": None,
        "Chairs.png": None,
        "Büro 2.JPG": 2,
        "train/0001/0002.jpg": 3,
        "0001-b.tiff": 3,
        "00010.png": None,
        "0001/depth/1.png": None,
        "0001/masks/1.png": None,
        "0001/._1.jpg": None,
        "door/depth.png": 4,
        "door/r_0_depth_0001.png": None,
        "door/normals/1.png": None,
        "0001/0001_mask.png": None,
        "Chair_normal.png": None,
        "door/rgb/Chair.png": 4,
    }
    for picture in pictures:
        write_pictures((tmp_path / picture).parent, picture.split("/")[-1])
    (tmp_path / "0001/a.heic").write_bytes(b"x")
    decomposed = tmp_path / unicodedata.normalize("NFD", "Büro")
    write_pictures(decomposed, "a.png")
    images = files.find_photographs(tmp_path, names, ["Chair.002"])
    for k, paths in enumerate(images):
        expected = {tmp_path / name for name, owner in pictures.items() if owner == k} | (
            {decomposed / "a.png"} if k == 2 else set()
        )
        assert set(paths) == expected, names[k]
    files.find_photographs(tmp_path, [*names, "lamp"])
    assert re.search(
        "no picture of 1 of 6 .*example lamp; .*1 .heic there are not read", capsys.readouterr().err
    )
PICTURE = np.add.outer(np.arange(30) * 3, np.arange(40) * 2)[..., None] + [
    10,
    60,
    0,
]  # no two sides are alike


def test_photographs_are_read_as_a_person_sees_them(tmp_path):
    picture, grey = Image.fromarray(PICTURE.astype(np.uint8)), (PICTURE[..., 0] - 10).astype(np.uint16)
    turned = {
        1: [],
        2: [0],
        3: [3],
        4: [1],
        5: [5],
        6: [2],
        7: [6],
        8: [4],
    }  # Pillow's numbers of transpositions
    expected = {}
    for orientation, turns in turned.items():
        exif = picture.getexif()
        exif[0x0112] = orientation
        stored = picture.transpose(Image.Transpose(turns[0])) if turns else picture
        stored.save(tmp_path / f"{orientation}.png", exif=exif)
        expected[f"{orientation}.png"] = PICTURE
    stretched = np.repeat((grey / grey.max() * 255).round()[..., None], 3, axis=2)
    for name, values in {
        "16.png": 300 * grey,
        "12.tif": 16 * grey,
        "float.tif": grey.astype(np.float32),
    }.items():
        Image.fromarray(values).save(tmp_path / name)
        expected[name] = stretched
    seen = np.arange(40) < 20
    cut_out = picture.copy()  # its hidden colours stay in the file
    cut_out.putalpha(Image.fromarray(np.tile(255 * seen, (30, 1)).astype(np.uint8)))
    for name in ("rgba.png", "rgba.tiff", "rgba.webp"):
        cut_out.save(tmp_path / name, **({"lossless": True, "exact": True} if "webp" in name else {}))
        expected[name] = np.where(seen[:, None], PICTURE, 128)
    Image.fromarray(np.full((30, 40), 7, np.uint8)).convert("P").save(tmp_path / "hole.png", transparency=7)
    expected["hole.png"] = np.full((30, 40, 3), 128)
    for name in ("a.bmp", "a.tif", "cmyk.tif"):
        (picture.convert("CMYK") if "cmyk" in name else picture).save(tmp_path / name)
        expected[name] = PICTURE
    for name, pixels in expected.items():
        image = files.read_photograph(tmp_path / name)
        assert image.dtype == torch.uint8 and image.shape == (3, 30, 40), name
        assert np.abs(image.permute(1, 2, 0).numpy() - pixels).max() <= 1, name
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.bmp").read_bytes()[:2000])
    assert_refused(
        "cannot read .*cut.png: .*; replace or remove it", files.read_photograph, tmp_path / "cut.png"
    )


def test_workers_send_bytes_one_object_at_a_time_and_full_shared_memory_is_one_line(tmp_path, monkeypatch):
    objects = data.sample_shapes(4, 0, points=64)
    write_pictures(tmp_path, *[f"{i}.png" for i in range(4)])
    objects.images = [[tmp_path / f"{i}.png"] for i in range(4)]
    assert [image.dtype for image in data.Photographs(objects, 32, seed=2**32)[3]] == [torch.uint8] * 2
    assert data.Photographs(objects, 32)[0].dtype == torch.uint8
    images = next(iter(data.fixed_images(objects, None, 32, 4, "cpu")))
    assert images.dtype == torch.float32 and images[0, 0, 2, 0, 0] == pytest.approx(200 / 255)
    loader = Mock(wraps=data.DataLoader)
    monkeypatch.setattr(data, "DataLoader", loader)
    batches = list(data.training_photographs(objects, torch.arange(4).split(3), 32, 0))
    assert [len(weak) for weak, _ in batches] == [3, 1] and weak_is_shared(batches) == [False, False]
    assert loader.call_args.kwargs["batch_sampler"] == [[0], [1], [2], [3]]
    monkeypatch.setattr(
        data,
        "DataLoader",
        Mock(
            side_effect=lambda *_, **__: fail(
                RuntimeError(
                    "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
                )
            )
        ),
    )
    with pytest.raises(UserError, match="/dev/shm.* full; start .*--shm-size"):
        next(iter(data.training_photographs(objects, torch.arange(4).split(3), 32, 0)))


def weak_is_shared(batches):
    return [weak.is_shared() for weak, _ in batches]


def fail(error):
    """An iterator whose first item is an error."""
    raise error
    yield


@pytest.mark.parametrize(
    "content, names",
    [
        (b"\xef\xbb\xbfmug\r\nnight_stand  \r\n\r\n", ["mug", "night stand"]),
        ("mug\ncup\n".encode("utf-16"), ["mug", "cup"]),
        ("mug\ncup\n".encode("utf-16-le"), ["mug", "cup"]),
        ("B\u0075\u0308ro\nStuhl  alt".encode(), ["B\xfcro", "Stuhl alt"]),
        ("m\u200bug\ncup".encode(), ["mug", "cup"]),
        (b"5$ mug\n10$ cup\n{0}", ["5$ mug", "10$ cup", "{0}"]),
        (b"night_stand\nnight stand", "one to the text tower"),
        (b"Mug\ncup\nmug", "one to the text tower"),
        ("B\u0075\u0308ro\nb\xfcro".encode(), "one to the text tower"),
        ("mug\n\ufeffmug".encode(), "one to the text tower"),
        (b"# classes\nmug\ncup", "'# classes'; expected a class name alone"),
        (b"0 mug\n1 cup", "'0 mug'; expected"),
        (b"mug\t1\ncup\t2", "'mug 1'; expected"),
        (b'"mug"\n"cup"', "expected a class name alone"),
        (b"0,mug\n1,cup", "'0,mug'; expected a class name alone"),
        (b"mug,0\ncup,1", "'mug,0'; expected"),
        (b"- mug\n- cup", "'- mug'; expected"),
        (b"mug,\ncup,", "'mug,'; expected"),
        (b"mug # with a handle\ncup", "'mug # with a handle'; expected"),
        (b"mug, cup", "two or more different"),
        ("K\xfchlschrank\nmug".encode("latin1"), "saved as UTF-8"),
    ],
)
def test_class_names_are_what_the_text_tower_sees_and_equal_ones_are_refused(tmp_path, content, names):
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    if isinstance(names, str):
        assert_refused(
            f"classes.txt.*{names}", lambda: files.clean_class_names(files.read_lines(path), str(path))
        )
    else:
        assert files.clean_class_names(files.read_lines(path), str(path)) == names


def test_folders_of_classes_are_matched_as_names_and_names_that_are_no_utf8_can_be_written(tmp_path):
    (tmp_path / "classes.txt").write_text("B\xfcro stuhl\nTisch\n", encoding="utf-8")
    for folder in ("Bu\u0308ro_Stuhl", "tisch"):
        (tmp_path / "train" / folder).mkdir(parents=True)
        np.save(tmp_path / "train" / folder / f"{folder}.npy", SOME)
    with open(os.fsencode(tmp_path) + b"/train/tisch/m\xf6bel.npy", "wb") as file:
        np.save(file, SOME)
    objects = data.load_dataset(str(tmp_path), tmp_path, "train", 60)
    assert objects.labels.tolist() == [0, 1, 1] and objects.class_names == ["B\xfcro stuhl", "Tisch"]
    assert "m\ufffdbel" in objects.names and "\n".join(objects.names).encode()


def test_missing_data_sets_are_fetched_checked_unpacked_and_read(tmp_path, monkeypatch, capsys):
    root, made, top = tmp_path / "root", tmp_path / "made", tmp_path / "made/scanobjectnn/h5_files"
    write_modelnet(made / "modelnet40")
    for k, (folder, suffix) in enumerate((("main_split_nobg", ""), ("main_split", ""),
                                          ("main_split", "_augmentedrot_scale75"))):
        for part, count in (("training", 30 + k), ("test", 15 + k)):
            write_h5(top / folder / f"{part}_objectdataset{suffix}.h5", np.arange(count) % 15)
    for key in ("modelnet40", "scanobjectnn"):
        archive, row = Path(shutil.make_archive(tmp_path / key, "zip", made / key)), fetch.DOWNLOADS[key]
        members = {member: hashlib.sha256((made / key / member).read_bytes()).hexdigest()
                   for member in row.get("members", ())}
        changed = dict(sources=[archive.as_uri()], sha256=None, members=members)
        monkeypatch.setitem(fetch.DOWNLOADS, key, row | changed)
    for name, counts in (("modelnet40", (24, 12)), ("scanobjectnn-obj-only", (30, 15)),
                         ("scanobjectnn-with-bg", (31, 16)), ("scanobjectnn-hardest", (32, 17))):
        train, test = (data.load_dataset(name, root, split, points=64) for split in ("train", "test"))
        assert (len(train), len(test)) == counts
    assert test.labels.tolist() == [*range(15), 0, 1]
    assert test.class_names[:2] == ["bag", "bin"] and test.class_names[14] == "toilet"
    assert torch.allclose(test.points, CLOUD[..., [2, 0, 1]].expand(17, -1, -1), atol=1e-5)  # its y was up
    said = capsys.readouterr().out
    assert all(fetch.DOWNLOADS[key]["terms"] in said for key in ("modelnet40", "scanobjectnn"))
    shutil.rmtree(root / "scanobjectnn/h5_files")
    fetch.DOWNLOADS["scanobjectnn"]["members"] = dict.fromkeys(members, "0" * 64)  # another's files
    assert_refused("cannot unpack .*sha256", data.load_dataset, "scanobjectnn-hardest", root, "test", 64)


@pytest.mark.parametrize("name, file, content, says", [  # in place of a file: None is nothing
    ("modelnet41", "", b"", "unknown data set 'modelnet41'.*folder of your own"),
    ("ModelNet40", "", b"", "unknown data set 'ModelNet40'; did you mean modelnet40?"),
    ("mugs", "", b"", "unknown data set 'mugs'; There are"),
    ("redwood", "", b"", "no .*categories.json; github.com/isl-org/redwood-3dscan fetches"),
    ("co3d", "", b"", "no .*pointcloud.ply; github.com/facebookresearch/co3d fetches"),
    ("scanobjectnn-hardest", "", b"", "h5_files.zip is missing; leave out --no-download, or save http"),
    ("scanobjectnn-hardest", "../scanobjectnn/h5_files/a", b"x", "no .*test_objectdataset_augm.*_scale75.h5"),
    ("modelnet40", "shape_names.txt", None, "no .*shape_names.txt; README, \"Data sets\""),
    ("modelnet40", "test_files.txt", b"\n", "test_files.txt is empty"),
    ("modelnet40", "ply_data_test0.h5", dict(labels=[0, 200]), "label 200 in .*but there are 11 classes"),
    ("modelnet40", "ply_data_test0.h5", dict(labels=[1], clouds=np.nan), "object 0 has NaN"),
    ("modelnet40", "ply_data_test0.h5", dict(labels=[1], clouds=0), "object 0 has all its points in one"),
    ("modelnet40", "ply_data_test_0_id2file.json", b'["a/1.txt", "a/2.txt"]',
     r"data \(12, 64, 3\), 12 labels, 2 names; expected"),
    ("own", "classes.txt", None, "no .*own/classes.txt"),
    ("own", "classes.txt", b"\xff\xfea\nb", "cannot read .*classes.txt"),
    ("own", "classes.txt", b"mug\nmug\n", "two or more different names"),
    ("own", "test/cup/a.npy", LEANING, r"objects in \['cup'\]; expected folders"),
    ("own", "test/a.npy", LEANING, "objects in .*folders and outside"),
    ("own", "test/bed/test1.npy", LEANING[:20], "test1.npy has 20 points, --points is 64; lower"),
    ("own", "test/bed/test1.npy", LEANING * np.inf, "test1.npy: 500 of its 500 points have NaN or infinite"),
    ("own", "test/bed/test1.npy", LEANING * 0 + 1, "test1.npy: it has all its points in one"),
    ("own", "test/bed/test1.npy", LEANING[:, :2], r"test1.npy: its shape is \(500, 2\), expected one"),
    ("own", "views/stranger/a.png", b"x", "no picture of any object.*views/test0"),
    ("empty", "classes.txt", b"mug\ncup\n", "no objects in .*empty/train; expected files")])
def test_bad_data_is_refused_by_its_name_and_with_advice(tmp_path, name, file, content, says):
    if name == "own":
        write_own(tmp_path / name)
    folder = write_modelnet(tmp_path) if name == "modelnet40" else tmp_path / name
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        (folder / file).unlink()
    elif isinstance(content, dict):
        write_h5(folder / file, **content)
    elif isinstance(content, np.ndarray):
        np.save(folder / file, content)
    elif file:
        (folder / file).write_bytes(content)
    name = str(folder) if name in ("own", "empty") else name
    assert_refused(says, data.load_dataset, name, tmp_path, "test", 64, download=False)


def test_objects_of_one_name_are_told_apart_by_class_or_refused_where_pictures_could_be_of_either(tmp_path):
    for split in ("train", "test"):
        for name in ("mug", "cup"):
            (tmp_path / split / name).mkdir(parents=True)
            np.save(tmp_path / split / name / f"{split}1.npy", LEANING)
    (tmp_path / "classes.txt").write_text("mug\ncup")
    assert files.read_folder(tmp_path, "test")["names"] == ["cup/test1", "mug/test1"]

    write_pictures(tmp_path / "views/test1", "a.png")
    assert_refused("two objects of .*test are called test1", files.read_folder, tmp_path, "test")
    for path in (tmp_path / "test/cup/test1.npy", tmp_path / "train/cup/train1.npy"):
        path.unlink()
    assert len(files.read_folder(tmp_path, "test")["images"][0]) == 1
    (tmp_path / "train/mug/train1.npy").rename(tmp_path / "train/mug/test1.npy")
    assert_refused("test1 is an object of .*test and of .*train", files.read_folder, tmp_path, "test")

    (tmp_path / "test/mug/test1.xyz").write_text(table_of(POINT))
    shutil.rmtree(tmp_path / "views")
    assert_refused("two objects of .*test are called mug/test1", files.read_folder, tmp_path, "test")


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
    monkeypatch.setattr(pretrain, "pretrain_loss", loss)
    monkeypatch.setattr(pretrain, "sample_shapes", lambda *_, **__: own)
    monkeypatch.setattr(pretrain, "load_dataset", lambda *_: targets)
    recipe = dict(objects=8, epochs=1, batch_size=4, lr=1e-3, weight_decay=0.1)
    monkeypatch.setattr(pretrain, "RECIPES", {"clip": recipe})
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


@pytest.mark.parametrize("classes", [2, 130])
def test_a_confusion_of_any_number_of_classes_is_a_picture_of_bounded_size(classes):
    names = [f"${k}^$" for k in range(classes)]  # a broken formula to matplotlib
    objects = data.Objects(torch.zeros(classes, 1, 3), torch.arange(classes), names, "$\\x$")
    drawn = pictures.plot_confusion(objects.labels, objects.labels.roll(-1), objects.class_names, "")
    size = Image.open(io.BytesIO(drawn)).size
    assert max(size) < 3700 and min(size) > min(250, 32 * classes)
    probs = dict.fromkeys(evaluation.MODALITIES, torch.rand(2, classes))
    evaluation.plot_gallery(probs, objects.pick(torch.arange(2)), 1)


def test_the_code_s_hash_changes_with_what_code_does_and_not_with_what_it_says(tmp_path):
    texts = {module: (HERE / f"{module}.py").read_text(encoding="utf-8") for module in resume.HASHED}

    def hash_with(**edited):
        for module, text in {**texts, **edited}.items():
            path = tmp_path / f"{module}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return resume.code_hash(tmp_path)
    assert hash_with() == resume.CODE
    for module, text in texts.items():
        assert hash_with(**{module: text + "\nEDITED = True\n"}) != resume.CODE, module

    code = '"""One."""\nimport math\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\n' \
        '        return {}  # four\n'
    before = hash_with(losses=code.format("1 + 1"))
    for said, other in (("One", "1"), ("Two", "2"), ("Three", "\\n3"), ("# four", "# 4"),
                        ("1 + 1", "(1 +  1)")):
        assert hash_with(losses=code.format("1 + 1").replace(said, other)) == before
    for does in ("1 + 2", "1 - 1", "'1 + 1'", "1 + 1.0", "None"):
        assert hash_with(losses=code.format(does)) != before


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


def test_evaluating_says_that_a_checkpoint_was_trained_by_other_code(tmp_path, capsys, finished):
    saved = starts.read_file(finished[0] / "out/last.pt")
    for code, lines in ((evaluation.CODE, 0), ("0ther", 1)):
        starts.save_file({**saved, "identity": {**saved["identity"], "code": code}}, tmp_path / "last.pt")
        evaluation.main(["--checkpoint", str(tmp_path / "last.pt")])
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines and all("was trained by other code (0ther, now " in line for line in said)


def test_a_sheet_of_a_data_set_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "preview", partial(evaluation.preview, count=2))  # eight take seconds
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    write_own(tmp_path / "runs/x")
    assert train.parse_args(["--dataset", "runs/x"]).out == Path("runs/x-ulip2")
    for argv in (["--dataset", "runs/x", "--points", "100"], ["--domain", "source"]):
        evaluation.main([*argv, "--preview", "sheet"])
        assert Image.open("sheet").size[0] > 800
        os.remove("sheet")
    objects = replace(data.sample_shapes(1, 0, points=128), labels=None, names=["no UTF-8: \udcff"])
    evaluation.preview(objects, size=32)


def result(seed=0, joint=60.0, **more) -> dict:
    """A results.json."""
    after = {"image": 10.0, "point": 20.0, "joint": joint}
    row = {"dataset": "toys", "objects": 7, "model": "tiny", "start": "tiny", "precision": "fp32",
           "commit": "1234567", "seed": seed, "changed": {},
           "zero_shot": {"image": 1.0, "point": 2.0, "joint": 50.0}}
    return {**row, "accuracy" if "rival" in more else "teacher": after, **more}


def test_tables_average_seeds_and_measure_how_much_of_the_gap_to_true_labels_was_closed():
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


@pytest.mark.parametrize("key, value, says", [
    ("model", "ulip2", "model ulip2"), ("start", "other", "start other"),
    ("precision", "bf16", "precision bf16"), ("start", "tiny-seed-1", "start each seed's own")])
def test_runs_of_other_models_starts_or_precisions_have_a_row_of_their_own(key, value, says):
    other = result(1, 90.0, **{key: value})
    ceiling = result(1, 70.0, changed={"labels": "truth"})
    _, _, *rows = make_tables.tables([result(0), other, ceiling])[0].splitlines()
    assert sum("60.0" in row for row in rows) == 1 and sum("90.0" in row for row in rows) == 1
    row, = [row for row in rows if "90.0" in row]
    assert says in row and "%" not in row  # the ceiling is not this run's
    # Starts that were made for each seed are one setting, whichever commit made the runs.
    seeds = [result(seed, start=f"tiny-seed-{seed}", commit=f"c{seed}") for seed in range(3)]
    assert len(make_tables.tables(seeds)[0].splitlines()) == 3
    assert "- commit: c0, c1, c2" in make_tables.tables(seeds)[1]
    assert len(make_tables.tables([*seeds, result(3, start="tiny-seed-0")])[0].splitlines()) == 4


def test_gathering_refuses_broken_results_and_two_runs_that_differ_in_nothing(tmp_path):
    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return make_tables.gather(tmp_path)
    assert_refused("no results.json with accuracy below", make_tables.gather, tmp_path)
    assert len(write("toys/a/seed-0/results.json", json.dumps(result()))) == 1
    assert len(write("toys/a/seed-1/results.json", json.dumps(result(1)))) == 2
    assert len(write("toys/b/results.json", json.dumps(result(zero_shot=None)))) == 2  # had no labels
    assert len(write("results.json", "{")) == 2  # what an earlier call gathered
    assert_refused("c/results.json: another run there has its options", write, "toys/c/results.json",
                   json.dumps(result()))
    for broken in ("{", "[1]", '{"zero_shot": 1}'):
        assert_refused("cannot read .*c/results.json", write, "toys/c/results.json", broken)


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
    started = []

    def interrupted(_):
        raise KeyboardInterrupt

    def launch(*_):
        started.append(subprocess.Popen(["sleep", "60"]))
        return started[-1]
    monkeypatch.setattr(make_tables, "launch", launch)
    monkeypatch.setattr(make_tables.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_tables.in_processes(dict.fromkeys("abc"), tmp_path, 2)
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path, much = tmp_path / "x.pt", {"a": torch.zeros(1 << 18), "b": torch.zeros(1 << 10)}
    starts.save_file({"a": 0}, path)
    with open(path, "rb") as old:
        starts.save_file({"a": 1}, path)
        assert torch.load(old) == {"a": 0}  # the new one took its name, and did not overwrite it
    if Path("/dev/full").exists():
        for content in ({"a": 2}, much):
            (tmp_path / ".x.pt").symlink_to("/dev/full")
            with pytest.raises(OSError, match="No space left on device: '.*/x.pt'"):
                starts.save_file(content, path)
    if resource:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        for size in (0, 1000, 1 << 19, 1 << 20, (1 << 20) + 2000):  # head, middle, end
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            try:
                assert_refused("File too large: '.*/x.pt'", starts.save_file, much, path)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="error: '.*/x.pt'"):
        starts.save_file({"a": 2}, path)
    assert starts.read_file(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not (HERE / "assets/tables.md").exists(), reason="no tables yet")
def test_the_tables_are_those_of_the_recorded_runs():
    runs = json.loads((HERE / "assets/results.json").read_text())
    short, document = make_tables.tables(runs)
    assert (HERE / "assets/tables.md").read_text(encoding="utf-8") == document
    rows = {line for line in (HERE / "README.md").read_text().splitlines()
            if re.match(r"\| (Cross-MoST|`--[^`]*`|.*, no training) \|.* -> ", line)}
    assert len(rows) >= 4 and rows <= set(short.splitlines())