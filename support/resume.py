"""Exact resume: what a run saves, and when it may go on."""
import ast
import hashlib
import json
import os
import time
from pathlib import Path

from support import UserError
from support.command_line import words
from support.parallel import leader
from support.starts import read_file, save_file


class TrainingState:
    """What OUT/last.pt holds: all that a run needs to continue exactly (Deviation D16).

    student, teacher, optimizer; epoch: how many are done; zero_shot: what assess() said of the start;
    transduced: what name_together said last, or None; seconds: run time so far, with that of the processes
    that this one continues. may_change: options with which a run may continue changed.
    """

    def __init__(self, student, teacher, optimizer, args, objects, may_change: tuple[str, ...]):
        self.student, self.teacher, self.optimizer = student, teacher, optimizer
        self.epoch, self.zero_shot, self.transduced = 0, None, None
        self.path, self.log_path = args.out / "last.pt", args.out / "log.jsonl"
        self.options = plain_options(args)
        # What must not change when a run continues, besides the options.
        self.identity = {option: value for option, value in self.options.items()
                         if option not in may_change}
        self.identity |= {"classes": objects.class_names, "objects": objects_hash(objects), "code": CODE,
                          "precision": str(student.precision).removeprefix("torch.")}
        self.began = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def save(self):
        """Write OUT/last.pt, whole or not at all. Raises: UserError where a weight is not finite."""
        if not leader():
            return
        if not all(parameter.isfinite().all() for parameter in self.student.parameters()):
            raise UserError(f"weights are not finite after epoch {self.epoch}; lower --lr, or look at the "
                            f"data; {self.path} is of an earlier epoch, if there was one")
        states = {name: getattr(self, name).state_dict() for name in ("student", "teacher", "optimizer")}
        values = {name: getattr(self, name)
                  for name in ("epoch", "zero_shot", "transduced", "options", "identity")}
        save_file({**states, **values, "architecture": self.student.architecture,
                   "seconds": self.seconds(), "log_bytes": self.log_path.stat().st_size}, self.path)

    def load(self):
        """Go back to OUT/last.pt. Raises: UserError where it is broken, or of other options, data or code."""
        saved = read_file(self.path)
        advice = "name another --out, or --no-resume to start over"
        try:
            changed = [f"{option}: {words(saved['identity'].get(option))} then, {words(value)} now"
                       for option, value in self.identity.items() if saved["identity"].get(option) != value]
            if changed:
                raise UserError(f"{self.path} was made with other values: {'; '.join(changed)}; use those, "
                                f"{advice}")
            log_bytes = self.log_path.stat().st_size if self.log_path.exists() else 0
            if log_bytes < saved["log_bytes"]:
                raise UserError(f"{self.log_path} is shorter than when {self.path} was saved; {advice}")
            for name in ("student", "teacher", "optimizer"):
                getattr(self, name).load_state_dict(saved[name])
            for name in ("epoch", "zero_shot", "transduced"):
                setattr(self, name, saved[name])
            self.began -= saved["seconds"]
            os.truncate(self.log_path, saved["log_bytes"])  # forget lines written after the checkpoint
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"cannot continue {self.path}, it is broken: {error}; {advice}") from error


def objects_hash(objects) -> str:
    """A hash of clouds, names, labels and photographs' names; the clouds are not copied for it."""
    digest = hashlib.sha256(objects.points.contiguous().numpy())
    images = objects.images and [[path.name for path in paths] for paths in objects.images]
    labels = None if objects.labels is None else objects.labels.tolist()
    digest.update(json.dumps([objects.names, labels, images]).encode())
    return digest.hexdigest()[:16]


def plain_options(args) -> dict:
    """The options in the parser's order, as values that a file can keep."""
    not_options = ("sources", "changed", "changes")
    return {option: str(value) if isinstance(value, Path) else value for option, value in vars(args).items()
            if option not in not_options}


# What decides which weights a run ends with.
HASHED = ("losses", "model", "data", "eval", "train", "support/furniture", "support/files", "support/starts",
          "support/farthest_points", "support/parallel", "support/transduction")


def code_hash(root: Path) -> str:
    """Eight hexadecimal digits that change with what the files of HASHED below `root` do.

    Comments, docstrings and layout do not change it. It is made of the syntax tree's own types and values,
    because what ast.dump and ast.unparse write differs between versions of Python.
    """
    digest = hashlib.sha256()
    for module in HASHED:
        tree = ast.parse((root / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
                node.body[0].value.value = ""
        digest.update(json.dumps(described(tree)).encode())
    return digest.hexdigest()[:8]


def described(node) -> list | str:
    """A syntax tree as nested lists of types, fields and values. A field that holds nothing is left out: new
    versions of Python add such fields.
    """
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
        return [type(node).__name__, *([name, described(value)] for name, value in fields)]
    if isinstance(node, list):
        return [described(one) for one in node]
    return f"{type(node).__name__} {node}"


# A run that other code began must not continue, and its figures are not ours. Hashed at import, because the
# files may be edited while a run lasts.
CODE = code_hash(Path(__file__).parents[1])
