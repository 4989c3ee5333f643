"""What is practical, and not of the paper. What stands here is needed everywhere."""
import os
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class UserError(Exception):
    """What a user can put right. It ends a script with this one line and exit code 2."""


def write_whole(path: Path, content: bytes):
    """Make `path` the whole new file, or leave it as it was. Raises: OSError that names it: a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")  # what a killed process left is overwritten by the next
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename, for the case that the power fails
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def lock(path: Path, timeout: float = -1):
    """To hold (`with`) while `path` is made: another process waits, or gets filelock.Timeout.

    Raises: UserError where the file system knows no locks, or may only be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path.with_name(f".{path.name}.lock"), timeout)
    try:
        held.acquire()
    except Timeout:
        raise
    except (NotImplementedError, OSError) as error:
        raise UserError(f"cannot lock {path.parent} ({error}); choose a folder on another disk") from error
    try:
        yield
    finally:
        held.release()
