"""Worker processes that decode photographs: torch's DataLoader, handing over arrays."""
import os
import re
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support import UserError
from support.files import read_photograph


def in_workers(dataset: Dataset, indices: list[int], ahead: int = 2):
    """The items of these indices in order, computed by worker processes, each `ahead` items in advance.

    Items should be NumPy arrays. These come through a pipe, where tensors need shared memory, of which Docker
    gives 64 MB, and sockets, whose paths may be too long.
    Raises: UserError, one line, for whatever a worker finds wrong with a file.
    """
    # Without a generator of its own a DataLoader draws from the global one, and a resumed run would differ.
    loader = DataLoader(dataset, batch_sampler=[[i] for i in indices], collate_fn=list, prefetch_factor=ahead,
                        num_workers=min(8, usable_cores()), worker_init_fn=ignore_ctrl_c,
                        generator=torch.Generator())
    items = None
    try:
        with ctrl_c_waits():
            items = iter(loader)
        for (item,) in items:
            yield item
    except (UserError, OSError) as error:  # it comes with the worker's whole traceback as its text
        last_line = str(error).strip().splitlines()[-1]
        raise UserError(re.sub(r"^[\w.]+: ", "", last_line)) from None
    finally:
        # At once, not when Python collects it: Ctrl-C would be lost there.
        if items is not None:
            items._shutdown_workers()


@contextmanager
def ctrl_c_waits():
    """Hold a Ctrl-C back until the end, here and in workers that are started meanwhile."""
    if threading.current_thread() is not threading.main_thread():  # no other thread may set handlers
        yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def ignore_ctrl_c(_worker):
    """Leave Ctrl-C to the parent process, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def usable_cores() -> int:
    """How many cores this process may use, which containers and clusters limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Trial(Dataset):
    """What is wrong with each of some pictures: "" where nothing is. whole: read more than their headers."""

    def __init__(self, paths: list[Path], whole: bool):
        self.paths, self.whole = paths, whole

    def __getitem__(self, i: int) -> str:
        try:
            read_photograph(self.paths[i], only_header=not self.whole)
        except (UserError, OSError) as error:
            return str(error)
        return ""


def refuse_broken_photographs(paths: list[Path], whole: bool):
    """Read all pictures once. Raises: UserError that names those that cannot be read, ten at most."""
    trial = in_workers(Trial(paths, whole), list(range(len(paths))), ahead=16)
    bar = tqdm(trial, "looking at all photographs once", len(paths), unit="picture", disable=None)
    problems = [problem for problem in bar if problem]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:10])
        raise UserError(f"{len(problems)} of {len(paths)} photographs cannot be read:{listed}")
