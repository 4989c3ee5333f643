"""Published files: fetched where they are missing, from the Hugging Face hub or from a plain address."""
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

from support import UserError, lock

HUB = "https://huggingface.co/datasets/"
KNOWS_LITTLE = "--model tiny needs no file, but knows ten kinds of furniture only"
# sources: addresses, tried in order. terms: said before it is fetched. sha256: of a file that is not the
# hub's. option: names the folder that holds it. otherwise: what one can do without it.
FILES = {
    "ulip2": dict(
        sources=[f"{HUB}SFXX/ulip/resolve/main/ULIP-2/pretrained_models/"
                 "ULIP-2-PointBERT-8k-xyz-pc-slip_vit_b-objaverse-pretrained.pt"],
        terms="BSD-3-Clause, 8k-point Objaverse model of ULIP-2",
        option="--cache", otherwise=KNOWS_LITTLE),
    "ulip1": dict(
        sources=[f"{HUB}SFXX/ulip/resolve/main/ULIP-1/pretrained_models/ckpt_zero-sho_classification/"
                 "checkpoint_pointbert.pt"],
        terms="BSD-3-Clause, ULIP-1 on ShapeNet-55",
        option="--cache", otherwise=KNOWS_LITTLE),
    "modelnet40-8192": dict(
        sources=[f"{HUB}Pointcept/modelnet40_normal_resampled-compressed/resolve/main/"
                 "modelnet40_normal_resampled.tar.gz",
                 "https://shapenet.cs.stanford.edu/media/modelnet40_normal_resampled.zip"],
        terms="1.6 GB, 7 GB unpacked, for academic research only",
        option="--data-root", otherwise="--points 2048 reads modelnet40_ply_hdf5_2048 instead"),
    "modelnet40": dict(
        sources=[f"{HUB}Msun/modelnet40/resolve/d5dc795541800feeb7a4b3bd3142729a0d2adf7a/"
                 "modelnet40_ply_hdf5_2048.zip",
                 "https://shapenet.cs.stanford.edu/media/modelnet40_ply_hdf5_2048.zip"],
        terms="435 MB, for academic research only",
        sha256="07670e237db72ece0f723b9abb571534c9ad655a6456b389646587dc72bb8bae",
        option="--data-root"),
    "scanobjectnn": dict(
        sources=["http://hkust-vgd.ust.hk/scanobjectnn/h5_files.zip",
                 "https://github.com/ma-xu/pointMLP-pytorch/releases/download/dataset/h5_files.zip"],
        terms="for research: hkust-vgd.github.io/scanobjectnn",
        option="--data-root"),
}


def fetch(name: str, folder: Path, allowed: bool = True) -> Path:
    """FILES[name], where it lies in `folder`, or else from the first source that gives it.

    What comes from the hub stays in the hub's own cache, what comes from elsewhere in `folder`.
    Raises: UserError, one line: what went wrong at each source, where the file is, where to put it.
    """
    row = FILES[name]
    paths = [folder / Path(source).name for source in row["sources"]]
    for path in paths:
        if path.exists():  # put there by hand, or fetched before
            return path
    page = row["sources"][0].replace("/resolve/", "/blob/")
    page = page.replace("https://huggingface.co", constants.ENDPOINT)  # or a mirror of the hub
    by_hand = f"save {page} as {paths[0]}, or name the folder that has it with {row['option']}"
    if "otherwise" in row:
        by_hand += f"; {row['otherwise']}"
    if not allowed:
        raise UserError(f"{paths[0]} is missing; leave out --no-download, or {by_hand}")

    print(f"fetching {paths[0].name} ({row['terms']})", flush=True)
    reasons = []
    for source, path in zip(row["sources"], paths):
        try:
            if source.startswith(HUB):
                return from_hub(source)
            return from_elsewhere(source, path, row.get("sha256"))
        except Exception as error:  # the hub, the network and the disk have many types of errors
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            reasons.append(f"{source.split('/')[2]}: {reason[:200]}")
    raise UserError(f"cannot fetch {paths[0].name} ({'; '.join(reasons)}); {by_hand}")


def from_hub(source: str) -> Path:
    """A file in the hub's own cache. Raises: whatever went wrong."""
    owner, data_set, _, revision, file = source.removeprefix(HUB).split("/", 4)
    name, place = f"{owner}/{data_set}", dict(repo_type="dataset", revision=revision)
    try:  # what the cache has needs no network
        return Path(hf_hub_download(name, file, **place, local_files_only=True))
    except OSError:
        # One question before: without a network hf_hub_download asks for half a minute.
        get_hf_file_metadata(hf_hub_url(name, file, **place), timeout=10)
        return Path(hf_hub_download(name, file, **place))


def from_elsewhere(source: str, path: Path, sha256: str | None) -> Path:
    """A file at `path`. Raises: whatever went wrong."""
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(source, str(path), hash_prefix=sha256)
    return path


def unpack(archive: Path, folder: Path):
    """Unpack a zip or tar.gz of `folder`, or of what goes into it. The folder appears whole, or not at all.

    Raises: UserError naming an archive that is broken.
    """
    with lock(folder):
        if folder.exists():  # another process unpacked it
            return
        is_zip = archive.suffix == ".zip"
        if not is_zip and not hasattr(tarfile, "data_filter"):
            raise UserError(f"this Python cannot unpack {archive} safely; take Python 3.11.4 or newer, or "
                            f"unpack it by hand into {folder}")
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            # "data" refuses a tar's names that lead outside; those of a zip are skipped.
            shutil.unpack_archive(archive, part, **({} if is_zip else {"filter": "data"}))
            inner = part / folder.name
            os.replace(inner if inner.is_dir() else part, folder)
        except Exception as error:  # archives break in many ways, each with a type of its own
            raise UserError(f"cannot unpack {archive}: {error!r}; to fetch it again, remove it") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
