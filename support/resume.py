"""Exact resume: what a run saves, and when it may go on (Deviation D16)."""
import ast
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from support import UserError
from support.command_line import as_options
from support.parallel import leader
from support.starts import read_file, save_file

# What a run writes into OUT. One that starts over removes it first.
LEFT_BY_A_RUN = ("last.pt", "log.jsonl", "results.json", "curves.png", "predictions.csv")


@dataclass
class Run:
    """All that a run needs to continue exactly. OUT/last.pt holds it."""

    student: nn.Module
    teacher: nn.Module
    optimizer: torch.optim.Optimizer
    options: dict  # as they were given
    identity: dict  # what must be the same when a run continues, see identity_of
    epoch: int = 0  # how many are done
    zero_shot: dict | None = None  # what assess() said of the start
    start_named: tuple | None = None  # its joint confidence and label of each test object, (N,) and (N,)
    given: tuple | None = None  # labels and keep (N,) of all objects, where the step does not ask the teacher
    began: float = 0.0  # on perf_counter's clock; moved back by the time of the processes before this one

    def seconds(self) -> float:
        """How long the run has taken, all its processes together."""
        return time.perf_counter() - self.began


def save(run: Run, out: Path):
    """Write OUT/last.pt, whole or not at all. Raises: UserError where a weight is not finite."""
    if not leader():
        return
    path = out / "last.pt"
    if not all(parameter.isfinite().all() for parameter in run.student.parameters()):
        raise UserError(f"weights are not finite after epoch {run.epoch}; lower --lr, or look at the data; "
                        f"{path} is of an earlier epoch, if there was one")
    content = {name: getattr(run, name).state_dict() for name in ("student", "teacher", "optimizer")}
    for name in ("options", "identity", "epoch", "zero_shot", "start_named", "given"):
        content[name] = getattr(run, name)
    content["architecture"] = run.student.architecture
    content["seconds"] = run.seconds()
    content["threads"] = torch.get_num_threads()
    content["log_bytes"] = (out / "log.jsonl").stat().st_size
    save_file(content, path)


def load(run: Run, out: Path):
    """Go back to OUT/last.pt. Raises: UserError where it is broken, or of other options, data or code."""
    path, log = out / "last.pt", out / "log.jsonl"
    content = read_file(path)
    try:
        before = content["identity"]
        gone = photographs_gone(before["photographs"], run.identity["photographs"])
        if gone:
            print(f"{gone} photographs are gone since {path} was saved; the run goes on without them")
            before["photographs"] = run.identity["photographs"]
        changes = changes_of(before, run.identity)
        if changes:
            raise UserError(f"{path} cannot continue: {'; '.join(changes)}. Give what it was begun with, or "
                            "another --out; --no-resume starts over")
        for name in ("student", "teacher", "optimizer"):
            getattr(run, name).load_state_dict(content[name])
        for name in ("epoch", "zero_shot", "start_named", "given"):
            setattr(run, name, content[name])
        run.began -= content["seconds"]
        # Forget lines that were written after the checkpoint.
        os.truncate(log, min(content["log_bytes"], log.stat().st_size))
        if content["threads"] != torch.get_num_threads():
            print(f"{content['threads']} threads computed so far, now {torch.get_num_threads()}: the last "
                  "digits may differ from those of a run that never stopped")
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot continue {path}, it is broken: {error}; --no-resume starts over") from error


def identity_of(options: dict, may_change: tuple[str, ...], objects, precision: torch.dtype) -> dict:
    """What must be the same for a run to continue: options (but those that may change), data, code."""
    fixed = {option: value for option, value in options.items() if option not in may_change}
    photographs = objects.images and [[path.name for path in paths] for paths in objects.images]
    return {**fixed, "precision": str(precision).removeprefix("torch."), "code": CODE,
            "classes": objects.class_names, "objects": objects_hash(objects), "photographs": photographs}


def objects_hash(objects) -> str:
    """A hash of clouds, names and labels; the clouds are not copied for it."""
    digest = hashlib.sha256(objects.points.contiguous().numpy())
    labels = None if objects.labels is None else objects.labels.tolist()
    digest.update(json.dumps([objects.names, labels]).encode())
    return digest.hexdigest()[:16]


def photographs_gone(before: list | None, now: list | None) -> int:
    """How many photographs of the objects are gone, as broken ones that were removed; 0 where any is new."""
    pairs = list(zip(before or [], now or []))
    is_any_new = any(set(of_object_now) - set(of_object) for of_object, of_object_now in pairs)
    return 0 if is_any_new else sum(len(of_object) - len(of_object_now) for of_object, of_object_now in pairs)


def changes_of(before: dict, now: dict) -> list[str]:
    """What differs between two identities, in words that one can act on."""
    in_words = {"code": "the code was edited since", "classes": "the class names are others",
                "objects": "the training objects are others",
                "photographs": "there are other photographs"}
    changes = []
    for key, value in now.items():
        if before.get(key) != value:
            was, is_now = (as_options({key: one}) or f"no --{key}" for one in (before.get(key), value))
            changes.append(in_words.get(key, f"it was begun with {was}, now {is_now}"))
    return changes


def remove_earlier_run(out: Path):
    """Remove what an earlier run left: parts of two runs would mix up their numbers.

    Raises: UserError where files of these names are there that no run has written.
    """
    found = [out / name for name in LEFT_BY_A_RUN if (out / name).exists()]
    log = out / "log.jsonl"
    # As train.start_over begins it.
    is_ours = log.exists() and log.read_bytes().startswith(b'{"options": ')
    if found and not is_ours:
        raise UserError(f"{found[0]} is there, and no run of train.py has written it; name "
                        "another --out")
    for path in found:
        path.unlink()


# ------ The code's hash -------------------------------------------------------------------------------------
# What decides the weights of a start that tools.pretrain makes, and those that a run ends with.
OF_BOTH = ("losses", "model", "data", "support/furniture", "support/files", "support/published",
           "support/farthest_points")
HASHED_OF_STARTS = (*OF_BOTH, "tools/pretrain")
HASHED = (*OF_BOTH, "eval", "train", "support/starts", "support/parallel", "support/transduction")


def code_hash(root: Path, modules: tuple[str, ...] = HASHED) -> str:
    """Eight hexadecimal digits that change with what these files below `root` do.

    Comments, docstrings and layout do not change it.
    """
    digest = hashlib.sha256()
    for module in modules:
        tree = ast.parse((root / f"{module}.py").read_text(encoding="utf-8"))
        digest.update(json.dumps(as_lists(tree)).encode())
    return digest.hexdigest()[:8]


def as_lists(node) -> list | str:
    """A syntax tree as nested lists of types, fields and values.

    What ast.dump and ast.unparse write differs between versions of Python.
    """
    if isinstance(node, list):
        return [as_lists(one) for one in node]
    if not isinstance(node, ast.AST):
        return f"{type(node).__name__} {node}"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return []  # a docstring
    # New versions of Python add fields that hold nothing.
    fields = {name: as_lists(value) for name, value in ast.iter_fields(node) if value not in (None, [])}
    return [type(node).__name__, fields]


# What other code began must not continue. Hashed at import, because the files may be edited while a run
# lasts.
CODE = code_hash(Path(__file__).parents[1])
CODE_OF_STARTS = code_hash(Path(__file__).parents[1], HASHED_OF_STARTS)
