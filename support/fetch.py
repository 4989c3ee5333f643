"""Published files: fetched where they are missing, from the Hugging Face hub or from a plain address."""
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

from support import UserError, lock

ULIP2 = "ULIP-2-PointBERT-8k-xyz-pc-slip_vit_b-objaverse-pretrained.pt"
# file: what it is called in the folder that `option` names (--data-root if none does). terms: said before it
# is fetched. sources: tried in order, addresses, or (data set of the hub, file in it, revision). sha256: of a
# file from an address. otherwise: what one can do without it.
FILES = {
    "ulip2": dict(
        file=ULIP2, option="--cache", terms="BSD-3-Clause, 8k-point Objaverse model of ULIP-2",
        otherwise="--model tiny needs no file, but knows ten kinds of furniture only",
        sources=[("SFXX/ulip", f"ULIP-2/pretrained_models/{ULIP2}", None)]),
    "ulip1": dict(
        file="checkpoint_pointbert.pt", option="--cache", terms="BSD-3-Clause, ULIP-1 on ShapeNet-55",
        otherwise="--model tiny needs no file, but knows ten kinds of furniture only",
        sources=[("SFXX/ulip",
                  "ULIP-1/pretrained_models/ckpt_zero-sho_classification/checkpoint_pointbert.pt", None)]),
    "modelnet40-8192": dict(
        file="modelnet40_normal_resampled.tar.gz",
        terms="1.6 GB, 7 GB unpacked, for academic research only",
        otherwise="--points 2048 reads modelnet40_ply_hdf5_2048 instead",
        sources=[("Pointcept/modelnet40_normal_resampled-compressed", "modelnet40_normal_resampled.tar.gz",
                  None),
                 "https://shapenet.cs.stanford.edu/media/modelnet40_normal_resampled.zip"]),
    "modelnet40": dict(
        file="modelnet40_ply_hdf5_2048.zip",
        terms="435 MB, for academic research only",
        sources=[("Msun/modelnet40", "modelnet40_ply_hdf5_2048.zip",
                  "d5dc795541800feeb7a4b3bd3142729a0d2adf7a"),
                 "https://shapenet.cs.stanford.edu/media/modelnet40_ply_hdf5_2048.zip"],
        sha256="07670e237db72ece0f723b9abb571534c9ad655a6456b389646587dc72bb8bae"),
    "scanobjectnn": dict(
        file="h5_files.zip",
        terms="for research: hkust-vgd.github.io/scanobjectnn",
        sources=["http://hkust-vgd.ust.hk/scanobjectnn/h5_files.zip",
                 "https://github.com/ma-xu/pointMLP-pytorch/releases/download/dataset/h5_files.zip"]),
}


def fetch(name: str, folder: Path, allowed: bool = True) -> Path:
    """FILES[name], where it lies in `folder`, or else from the first source that gives it.

    What comes from the hub stays in the hub's own cache, what comes from an address in `folder`.
    Raises: UserError, one line: what went wrong at each source, where the file is, where to put it.
    """
    row = FILES[name]
    path = folder / row["file"]
    if path.exists():  # put there by hand
        return path
    pages = [page_of(source) for source in row["sources"]]
    option = row.get("option", "--data-root")
    by_hand = f"save {pages[0]} as {path}, or name the folder that has it with {option}"
    if "otherwise" in row:
        by_hand += f"; {row['otherwise']}"
    if not allowed:
        raise UserError(f"{path} is missing; leave out --no-download, or {by_hand}")

    print(f"fetching {path.name} ({row['terms']})", flush=True)
    reasons = []
    for source, page in zip(row["sources"], pages):
        try:
            return fetch_from(source, path, row.get("sha256"))
        except Exception as error:  # the hub, the network and the file system have many types of errors
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            reasons.append(f"{page.split('/')[2]}: {reason[:200]}")
    raise UserError(f"cannot fetch {path.name} ({'; '.join(reasons)}); {by_hand}")


def page_of(source: str | tuple) -> str:
    """The address where a person finds what a source gives."""
    if isinstance(source, str):
        return source
    data_set, file, revision = source
    return f"{constants.ENDPOINT}/datasets/{data_set}/blob/{revision or 'main'}/{file}"


def fetch_from(source: str | tuple, path: Path, sha256: str | None) -> Path:
    """A file from the hub, in the hub's cache, or from an address, at `path`. Raises: whatever went wrong."""
    if isinstance(source, str):
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(source, str(path), hash_prefix=sha256)
        return path
    data_set, file, revision = source
    place = dict(repo_type="dataset", revision=revision)
    try:  # what the hub's cache has needs no network
        return Path(hf_hub_download(data_set, file, **place, local_files_only=True))
    except OSError:
        # One question before: without a network hf_hub_download asks for half a minute.
        get_hf_file_metadata(hf_hub_url(data_set, file, **place), timeout=10)
        return Path(hf_hub_download(data_set, file, **place))


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
