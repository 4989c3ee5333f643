"""What is practical, and not of the paper. What stands here is needed everywhere."""
import os
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """What a user can put right. It ends train.py and eval.py with this one line and exit code 2."""


@contextmanager
def whole_file(path: Path):
    """Gives a temporary name to write to. `path` is then the whole new file, or what it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")  # what a killed process left is overwritten by the next
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path | None, write, *given):
    """Make the file `path`, whole or not at all, by write(temporary name, *given). Nothing for None."""
    if path:
        with whole_file(path) as temporary:
            write(temporary, *given)
