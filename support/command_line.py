"""What the command lines of all scripts share."""
import argparse
import math
import os
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from support import UserError
from support.files import UP

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def one_line_errors():
    """`with one_line_errors():` ends a script with one line and exit code 2 where a user can put it right.

    That is at UserError, OSError and too little memory. Every other error is a bug, and keeps its traceback.
    Ctrl-C ends it with one line, too.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # names need not be in the terminal's alphabet
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read what is printed has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what was saved, if anything was", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # One line, but a list of files keeps its lines, which are indented by two blanks.
        message = "\n  ".join(" ".join(line.split()) for line in str(error).split("\n  "))
        # By type, or by what torch's CPU allocator says: other errors that speak of memory are bugs.
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if out_of_memory or "DefaultCPUAllocator: can't" in message:
            message = ("out of memory; lower --points, and in train.py also --batch-size or --groups, or add "
                       f"--grad-checkpointing there: {message}")
        elif "DataLoader worker" in message:  # which torch raises anywhere, as it has no type of its own
            message = f"a process that decodes photographs has ended; was there too little memory? {message}"
        elif not isinstance(error, (UserError, OSError)):
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def option_parser(purpose: str) -> argparse.ArgumentParser:
    """A parser that shows defaults, and says what is wrong in one line, without forty options before it."""
    return argparse.ArgumentParser(description=purpose, usage=argparse.SUPPRESS,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def add_data_options(add):
    """What both scripts ask of the data; `add` is the add_argument of a parser or a group."""
    add("--data-root", type=path_of, default=Path("data"), help="folder that holds the data sets")
    add("--download", action=argparse.BooleanOptionalAction, default=True,
        help="fetch data sets and starts that are missing")
    add("--domain", choices=("source", "target"), help="objects as they are, or as a scanner sees them")
    add("--up", choices=sorted(UP),
        help="axis that points upwards in the files, but for glTF, whose standard says y (--up=-y: y down)")
    add("--points", type=COUNT, help="points per cloud")
    add("--views", type=COUNT, help="evaluation: how many depth views or photographs are averaged")


def add_device_options(add):
    """Where and how both scripts compute."""
    add("--device", type=usable_device, default=DEVICE, help="where to compute")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="of the networks; auto: bf16 on a GPU that has it, else fp32. Some CPUs are fast in bf16, too")


def path_of(text: str) -> Path:
    """An argparse type: a path, whose ~ is the home folder (a shell leaves it in --out=~/x)."""
    return Path(text).expanduser()


def number(low: float, high: float = math.inf, convert: type = float):
    """An argparse type: a finite number in [low, high]."""
    def parse(text: str):
        value = convert(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value

    parse.__name__ = convert.__name__  # argparse prints it
    return parse


COUNT = number(1, convert=int)
SHARE = number(0, 1)
WEIGHT = number(0)


def usable_device(name: str) -> str:
    """An argparse type: cpu, cuda or cuda:N, where torch can compute here."""
    try:
        if torch.device(name).type not in ("cpu", "cuda"):  # Apple's mps has no float64, for one
            raise argparse.ArgumentTypeError(f"{name!r} is not supported; use cpu or cuda")
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot compute on {name!r}: {str(error).split('. ')[0][:100]}")
    return name


def as_options(values: dict) -> str:
    """Options as one types them: {"w_cross": 0.0, "threshold": [0.5, 0.6]} -> --w-cross 0 --threshold 0.5 0.6

    An option that is None is left out.
    """
    words = []
    for option, value in values.items():
        flag = "--" + option.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
            continue
        several = value if isinstance(value, list) else [value]
        texts = [f"{one:.15g}" if isinstance(one, float) else str(one) for one in several]
        if texts and texts[0].startswith("-"):  # which argparse would take for another option
            words.append(f"{flag}={texts[0]}")
        else:
            words += [flag, *texts]
    return shlex.join(words)


def plain_options(args: argparse.Namespace) -> dict:
    """The options in the parser's order, as values that a file can keep; paths hold from any folder."""
    return {option: str(value.resolve()) if isinstance(value, Path) else value
            for option, value in vars(args).items() if option != "changed"}
