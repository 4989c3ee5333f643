"""Which versions, which commit and which device computed: for the first line of a log."""
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import torch


def provenance(device: str) -> dict:
    """Versions, commit and device."""
    is_gpu = "cuda" in device
    name = torch.cuda.get_device_name(device) if is_gpu else f"{os.cpu_count()} CPU cores"
    return {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "open_clip": open_clip.__version__,
        "commit": commit(),
        "device": name,
    }


def commit() -> str:
    """The commit of these files; "unknown" outside of a repository of their own."""
    root = Path(__file__).resolve().parents[1]
    try:
        # Unpacked inside somebody's repository, they are not of its commit.
        top = git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root:
            return "unknown"
        return git(root, "describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return "unknown"


def git(folder: Path, *words: str) -> str:
    """What git answers."""
    # --no-optional-locks: it writes nothing there.
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def peak_memory(device: str) -> float | None:
    """GiB of GPU memory at most, None on a CPU."""
    if "cuda" not in device:
        return None
    return round(torch.cuda.max_memory_allocated(device) / 2 ** 30, 1)
