"""What is practical, and not of the paper. What stands here is needed everywhere."""
import os
from pathlib import Path


class UserError(Exception):
    """What a user can put right. It ends train.py and eval.py with this one line and exit code 2."""


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
