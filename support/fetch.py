"""Files that are fetched where they are missing: the hub's copy first, then plain addresses."""
import hashlib
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

from support import UserError
from support.files import FEWER_POINTS

ULIP2 = "ULIP-2-PointBERT-8k-xyz-pc-slip_vit_b-objaverse-pretrained.pt"

# file: its place below the folder `option` (--data-root if none is named). terms: said before it is fetched.
# sources: addresses, or (data set of the Hugging Face hub, file in it, revision). otherwise: what else helps.
# sha256, and members (sha256 of files inside an archive): where several public projects agree on them.
DOWNLOADS = {
    "ulip2": dict(
        file=ULIP2,
        terms="BSD-3-Clause, 8k-point Objaverse model of ULIP-2",
        option="--cache",
        sources=[("SFXX/ulip", f"ULIP-2/pretrained_models/{ULIP2}", None)]),
    "ulip1": dict(
        file="checkpoint_pointbert.pt",
        terms="BSD-3-Clause, ULIP-1 on ShapeNet-55",
        option="--cache",
        sources=[("SFXX/ulip",
                  "ULIP-1/pretrained_models/ckpt_zero-sho_classification/checkpoint_pointbert.pt", None)]),
    # No sha256 is published. The md5 of one public loader (46ed374f8ef5f7504ec4870298772ac2) is of no named
    # revision: a renewed archive would be refused for nothing. read_resampled checks lists and files instead.
    "modelnet40-8192": dict(
        file="modelnet40_normal_resampled.tar.gz",
        terms="1.6 GB, 7 GB unpacked, for academic research only",
        sources=[("Pointcept/modelnet40_normal_resampled-compressed", "modelnet40_normal_resampled.tar.gz",
                  None),
                 "https://shapenet.cs.stanford.edu/media/modelnet40_normal_resampled.zip"],
        otherwise=FEWER_POINTS),
    "modelnet40": dict(
        file="modelnet40_ply_hdf5_2048.zip",
        terms="435 MB, for academic research only",
        sources=[("Msun/modelnet40", "modelnet40_ply_hdf5_2048.zip",
                  "d5dc795541800feeb7a4b3bd3142729a0d2adf7a"),
                 "https://shapenet.cs.stanford.edu/media/modelnet40_ply_hdf5_2048.zip"],
        sha256="07670e237db72ece0f723b9abb571534c9ad655a6456b389646587dc72bb8bae"),
    "scanobjectnn": dict(
        file="scanobjectnn/h5_files.zip",
        terms="for research: hkust-vgd.github.io/scanobjectnn",
        sources=["http://hkust-vgd.ust.hk/scanobjectnn/h5_files.zip",
                 "https://github.com/ma-xu/pointMLP-pytorch/releases/download/dataset/h5_files.zip"],
        members={
            "h5_files/main_split/training_objectdataset.h5":
                "d334dd3e44556606b0c38560a6a2ed6b191c2e2fe6588f22e3f154d5cbdf3cb1",
            "h5_files/main_split/test_objectdataset.h5":
                "4465e207202fe9375e3c58d2e13bf44bddc1baa1fcb6b123b82f99e55353e22e",
            "h5_files/main_split/test_objectdataset_augmentedrot_scale75.h5":
                "f23822ee2f1e1d18331e91334d74adb10c8718d72d503bfa76ebe0a9348a7ea1",
            "h5_files/main_split_nobg/test_objectdataset.h5":
                "b7176ebd4b8f2218c8cca84b59617d96f5145d864924cc930b36eaf55931c9e1"}),
}


def fetch_published(name: str, folder: Path, allowed: bool = True) -> Path:
    """The file DOWNLOADS[name] in `folder`; if it is not there, from the first source that gives it.

    Raises: UserError, one line: what went wrong at each source, where the file is, where to put it.
    """
    row = DOWNLOADS[name]
    path = folder / row["file"]
    if path.exists():
        return path
    pages = [source if isinstance(source, str) else hub_page(*source) for source in row["sources"]]
    by_hand = (f"save {pages[0]} as {path}, or name the folder that has it with "
               f"{row.get('option', '--data-root')}; "
               + row.get("otherwise", "--dataset shapes --model tiny needs no file"))
    if not allowed:
        raise UserError(f"{path} is missing; leave out --no-download, or {by_hand}")

    print(f"fetching {path.name} ({row['terms']})", flush=True)
    reasons = []
    with lock(path):
        if path.exists():  # another process fetched it
            return path
        for source, page in zip(row["sources"], pages):
            try:
                return fetch(source, path, row.get("sha256"))
            except Exception as error:  # the hub, the network and the file system have many types of errors
                reason = (str(error).strip() or repr(error)).splitlines()[0]
                reasons.append(f"{page.split('/')[2]}: {reason[:200]}")
    raise UserError(f"cannot fetch {path.name} ({'; '.join(reasons)}); {by_hand}")


def hub_page(data_set: str, file: str, revision: str | None) -> str:
    """The address where a person finds a file of the Hugging Face hub."""
    return f"https://huggingface.co/datasets/{data_set}/blob/{revision or 'main'}/{file}"


def fetch(source: str | tuple, path: Path, sha256: str | None) -> Path:
    """A file from an address, to `path`, or from the Hugging Face hub, in the hub's own cache.

    Raises: whatever went wrong, at once where there is no network or HF_HUB_OFFLINE forbids to use it.
    ValueError or RuntimeError for bytes of another sha256, which are not kept.
    """
    if isinstance(source, str):
        refuse_if_offline()
        torch.hub.download_url_to_file(source, str(path), hash_prefix=sha256)
        return path

    data_set, file, revision = source
    place = dict(repo_type="dataset", revision=revision)
    try:  # one question before: without a network hf_hub_download asks for half a minute
        refuse_if_offline()
        get_hf_file_metadata(hf_hub_url(data_set, file, **place), timeout=10)
    except Exception as no_answer:
        try:
            cached = Path(hf_hub_download(data_set, file, **place, local_files_only=True))
        except OSError:  # nor is it in the cache
            raise no_answer from None
    else:
        cached = Path(hf_hub_download(data_set, file, **place))
    if sha256 and hashlib.sha256(cached.read_bytes()).hexdigest() != sha256:
        cached.resolve().unlink()
        raise ValueError("wrong sha256")
    return cached


def refuse_if_offline():
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")


def lock(path: Path, timeout: float = -1) -> FileLock:
    """To hold (`with`) while `path` is made: another process waits, or raises filelock.Timeout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"), timeout)


def unpack(archive: Path, folder: Path, members: dict | None = None):
    """Unpack a zip or tar.gz of `folder`, or of what goes into it. The folder appears whole, or not at all.

    members: sha256 of files in the archive.
    Raises: UserError naming an archive that is broken, or not its authors'.
    """
    part = folder.with_name(f".{folder.name}.part")
    with lock(folder):
        if folder.exists():
            return
        shutil.rmtree(part, ignore_errors=True)  # a killed process left it
        try:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as file:
                    file.extractall(part)  # strips `..`
            else:
                with tarfile.open(archive) as file:
                    file.extractall(part, filter="data")  # refuses `..`, links to the outside, devices
            for name, sha256 in (members or {}).items():
                if hashlib.sha256((part / name).read_bytes()).hexdigest() != sha256:
                    raise ValueError(f"{name} is not its authors' (sha256)")
            inner = part / folder.name
            os.replace(inner if inner.is_dir() else part, folder)
        except Exception as error:  # archives break in many ways, each with a type of its own
            raise UserError(f"cannot unpack {archive}: {error!r}; to fetch it again, remove it") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
