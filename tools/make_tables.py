"""The runs behind the tables of README and assets/tables.md, runs of one's own, and the tables of both.

    python -m tools.make_tables --data "--dataset shapes" --rows "" "--w-cross 0" --seeds 0 1
    python -m tools.make_tables --rivals                # all of assets/tables.md: days
    python -m tools.make_tables --jobs 0 --into assets  # no run, only tables of those done

A row is a set of options of train.py, "" the method with its defaults. Each seed has a start of its own,
which tools.pretrain makes first: a quarter of an hour on one core. A finished run is not run again, an
unfinished one continues. tables.md and results.json are written beside the runs, into runs/tables.
"""
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import train
from data import Objects, load_dataset
from eval import MODALITIES, assess, embed, evaluate, to_probs
from model import TEMPLATES, CrossMoST, build_model, precision_for
from support import UserError, write_whole
from support.command_line import as_options, number, one_line_errors, option_parser
from support.files import reading
from support.provenance import provenance
from support.results import top_one
from support.resume import CODE_OF_STARTS
from support.starts import read_start
from support.transduction import transduced_labels


# ------ What is run -----------------------------------------------------------------------------------------
SHAPES = "--dataset shapes"
REAL = "--dataset modelnet10"
SCANNED = "--dataset modelnet10 --domain target"
# The rows of assets/tables.md, and the data sets each was run on.
ROWS = {
    "": (SHAPES, REAL, SCANNED),
    "--labels truth": (SHAPES, REAL, SCANNED),
    # The original's baseline: each modality trains on its own labels, and nothing aligns the two.
    "--labels separate --w-cross 0": (SHAPES, REAL, SCANNED),
    "--labels together": (SHAPES, REAL, SCANNED),
    "--labels together --w-fair 0": (SHAPES, REAL, SCANNED),
    "--labels separate": (SHAPES, REAL),
    "--labels mean": (SHAPES, REAL),
    "--labels agree": (SHAPES, REAL),
    "--modalities image": (SHAPES, REAL),
    "--modalities point": (SHAPES, REAL),
    "--w-fair 0": (SHAPES, REAL),
    "--w-cross 0": (SHAPES, REAL),
    "--w-mim 0": (SHAPES, REAL),
    "--w-mpm 0": (SHAPES, REAL),
    "--w-gl 0": (SHAPES, REAL),
    "--point-target points": (SHAPES, REAL),
    "--momentum 0.99": (REAL,),
    "--momentum 0.999": (SHAPES,),  # whose default is 0.98
    "--mask-ratio 0": (SHAPES, REAL),
}


class Run(NamedTuple):
    """A run, or the score of a rival without training, for one row, data set and seed."""

    name: str  # also its folder's
    options: str  # of train.py; of a rival they say which data and which start
    rival: str | None = None


def planned_runs(rows: list[str], data_sets: list[str] | None, seeds: list[int], rivals: bool,
                 folder: Path) -> list[Run]:
    """All runs, then all rivals. A row's seeds stand together.

    data_sets: for all rows; None takes those of ROWS, and `shapes` for a row that is not there.
    """
    runs = []
    for row in rows:
        for data_set in data_sets or ROWS.get(row, (SHAPES,)):
            for seed in seeds:
                name = f"{folder_name(data_set)}/{folder_name(row) or 'default'}/seed-{seed}"
                runs.append(Run(name, f"{data_set} {row} {options_of(seed, folder)}"))

    for rival in RIVALS if rivals else ():
        for data_set in data_sets or ROWS[""]:
            for seed in seeds:
                name = f"{folder_name(data_set)}/{rival.replace(' ', '-')}/seed-{seed}"
                runs.append(Run(name, f"{data_set} {options_of(seed, folder)}", rival))
    return runs


def folder_name(options: str) -> str:
    """"--dataset modelnet10 --domain target" -> "modelnet10-target", "--w-cross 0" -> "w-cross-0"."""
    words = options.replace("--dataset ", "").replace("--domain ", "").split()
    return "-".join(word.removeprefix("--") for word in words)


def options_of(seed: int, folder: Path) -> str:
    """Options of all runs of a seed. Nothing reads the accuracy on the way, so only the end is evaluated."""
    return f"--start-checkpoint {start_path(seed, folder)} --seed {seed} --eval-every 0"


def start_path(seed: int, folder: Path) -> Path:
    return folder / "starts" / f"tiny-seed-{seed}.pt"


# ------ Running ---------------------------------------------------------------------------------------------
def main(argv=None) -> str:
    """Run what is not done, then write the tables. Returns the short one."""
    args = parse_args(argv)
    failed = []
    if args.jobs:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: ends the runs, too
        failed = run_all(args)

    results = gather(args.folder)
    short, document = tables(results)
    for folder in (args.folder, args.into):
        if folder:
            write_whole(folder / "tables.md", document.encode())
            write_whole(folder / "results.json", json.dumps(results, indent=0).encode())
    print(short)
    if failed:
        raise UserError(f"{len(failed)} runs failed; their output.txt says why: {', '.join(failed)}")
    return short


def parse_args(argv=None):
    parser = option_parser("the runs behind the tables, runs of one's own, and the tables of both")
    add = parser.add_argument
    add("--rows", nargs="+", default=list(ROWS), metavar="OPTIONS", help="of train.py, a row each")
    add("--data", nargs="+", metavar="OPTIONS", help="data sets, as \"--dataset modelnet10 --domain target\"")
    add("--seeds", nargs="+", type=number(0, convert=int), default=[0, 1, 2], help="of starts and runs")
    add("--rivals", action="store_true", help="score what the starts reach without training, too")
    add("--folder", type=Path, default=Path("runs/tables"), help="where the runs and their tables are")
    add("--jobs", type=number(0, convert=int), default=2, help="runs at a time; 0 only gathers what is done")
    add("--into", type=Path, help="a second folder for tables.md and results.json, for example assets")
    return parser.parse_args(argv)


def run_all(args) -> list[str]:
    """Make the seeds' starts, run, and score rivals, as far as it is not done. Returns the names that failed.

    Raises: UserError for a start that other code made.
    """
    runs = planned_runs(args.rows, args.data, args.seeds, args.rivals, args.folder)
    starts = {}
    for seed in args.seeds:
        path = start_path(seed, args.folder)
        if not path.exists():
            starts[f"starts/seed-{seed}"] = f"-m tools.pretrain --seed {seed} --into {path}"
        elif read_start(path)["options"].get("code") != CODE_OF_STARTS:
            raise UserError(f"{path} was made by other code; remove it, or name another --folder")

    trainings = {run.name: f"{train.__file__} {run.options} --out {args.folder / run.name}"
                 for run in runs if not run.rival and not results_path(args.folder, run).exists()}
    failed = in_processes(starts, args.folder, args.jobs) + in_processes(trainings, args.folder, args.jobs)
    for run in runs:
        path = results_path(args.folder, run)
        if run.rival and not path.exists():
            write_whole(path, json.dumps(score_rival(run), indent=1).encode())
            print(f"{run.name} done", flush=True)
    return failed


def results_path(folder: Path, run: Run) -> Path:
    return folder / run.name / "results.json"


def in_processes(commands: dict[str, str], folder: Path, jobs: int) -> list[str]:
    """Run Python with each command line, `jobs` at a time. Returns the names of those that failed.

    What one prints goes into output.txt in the folder of its name. Whatever ends this process ends them.
    """
    waiting, running, failed = list(commands), {}, []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[name] = launch(commands[name], folder / name, max(1, torch.get_num_threads() // jobs))
            time.sleep(0.2)

            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        failed.append(name)
                    ended = "failed" if process.returncode else "done"
                    print(f"{name} {ended}, {len(waiting) + len(running)} remain", flush=True)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return failed


def launch(command: str, out: Path, threads: int) -> subprocess.Popen:
    """Python with a command line, whose output goes into a file."""
    out.mkdir(parents=True, exist_ok=True)
    root = Path(train.__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1",
                   "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    with open(out / "output.txt", "w") as output:
        # A session of its own, so that a terminal's Ctrl-C comes from here alone, once.
        return subprocess.Popen([sys.executable, *command.split()], stdout=output, stderr=subprocess.STDOUT,
                                env=environment, start_new_session=True)


# ------ Rivals: what the same start reaches without training ------------------------------------------------
def score_rival(run: Run) -> dict:
    """The results of a rival, with the keys of train.py's as far as there is such a thing, and "accuracy"."""
    args = train.parse_args(run.options.split())
    unlabelled, test = (load_dataset(args.dataset, args.data_root, split, args.points, args.domain,
                                     args.download, args.up, args.cache) for split in ("train", "test"))
    model = build_model(args.model, test.class_names, TEMPLATES[args.templates], args.pretrained,
                        args.start_checkpoint, groups=args.groups, group_size=args.group_size)
    model = model.to(args.device)
    model.precision = precision_for(args.precision, args.device)
    probs = RIVALS[run.rival](model, unlabelled, test, args.views)
    return {
        "dataset": test.name, "split": test.split, "objects": len(test), "rival": run.rival,
        "model": args.model, "start": train.start_name(args), "seed": args.seed, "changed": {},
        "precision": str(model.precision).removeprefix("torch."),
        "commit": provenance(args.device)["commit"],
        "zero_shot": top_one(evaluate(model, test, args.views)),
        "accuracy": top_one(assess(probs, test)),
    }


def predict_by_cache(model: CrossMoST, unlabelled: Objects, objects: Objects, views: int | None = None,
                     shots: int = 16, sharpness: float = 5.5) -> dict[str, Tensor]:
    """Names borrowed from confident objects that look alike, after Point-Cache (arXiv 2503.12150).

    logits_m + s sum_k exp(-sharpness (1 - f_m . f_mk)) onehot(y_k) / shots, in each modality m, with the
    model's logit scale s. The keys k are, of each predicted class y_k, the `shots` unlabelled objects of
    highest joint confidence. shots and sharpness are Tip-Adapter's (arXiv 2111.03930).
    Returns probabilities as `to_probs` does.
    """
    classes = len(model.class_names)
    cached = embed(model, unlabelled, views)
    outputs = embed(model, objects, views)

    confidence, labels = to_probs(cached)["joint"].max(dim=-1)
    by_confidence = confidence.argsort(descending=True)
    keys = torch.cat([by_confidence[labels[by_confidence] == k][:shots] for k in range(classes)])
    names = F.one_hot(labels[keys], classes).float()

    for modality in ("image", "point"):
        similarity = outputs[f"{modality}_features"] @ cached[f"{modality}_features"][keys].T
        nearness = (-sharpness * (1 - similarity)).exp()
        outputs[f"{modality}_logits"] += model.logit_scale.exp().item() * nearness @ names / shots
    return to_probs(outputs)


def predict_together(model: CrossMoST, _unlabelled: Objects, objects: Objects,
                     views: int | None = None) -> dict[str, Tensor]:
    """The objects named together, which `--labels together` trains on; here without training.

    Returns probabilities as `to_probs` does. Image's and point's are the start's own.
    """
    outputs = embed(model, objects, views)
    probs = to_probs(outputs)
    names = F.normalize(model.classifier.detach().float(), dim=0).T.cpu()
    features = outputs["image_features"], outputs["point_features"]
    return probs | {"joint": transduced_labels(probs["joint"], *features, names)}


RIVALS = {"cache": predict_by_cache, "named together": predict_together}


# ------ Tables ----------------------------------------------------------------------------------------------
HEADING = """# Results

Made by `python -m tools.make_tables`. Top-1 accuracy in percent, zero-shot start -> teacher after the last
epoch, mean ± standard deviation over seeds. gap: how much of the gap in joint accuracy between the start and
the same training with true labels (`--labels truth`) was closed; the mean of the seeds' shares.
"""


def gather(folder: Path) -> list[dict]:
    """The results.json of all runs below the folder, without those that had no labels.

    Raises: UserError for a broken file, or two runs that differ in nothing; FileNotFoundError without any.
    """
    runs = {}
    for path in sorted(folder.glob("*/**/results.json")):  # FOLDER/results.json is what is gathered
        with reading(path, "expected results of train.py or of a rival; remove it"):
            run = json.loads(path.read_text())
            if not run["zero_shot"]:
                continue
            tables([run])
            setting = str([options_label(run), *ceiling_key(run)])
            if setting in runs:
                raise ValueError("another run there has its options and its seed")
            runs[setting] = run
    if not runs:
        raise FileNotFoundError(f"no results.json with accuracy below {folder}; --jobs 2 makes some")
    return list(runs.values())


def conditions(run: dict) -> dict:
    """What has to be equal, besides the options, for runs of several seeds to stand in one row.

    A start that was made for a seed is a file MODEL-seed-SEED. Such starts count as one. Any other start
    counts by its file's name. Which commit a run was made at does not count: what training computes has not
    changed since the first of these runs, and the tests compare it.
    """
    own = f"{run['model'].replace('/', '-')}-seed-{run['seed']}"
    return {
        "model": run["model"],
        "start": "each seed's own" if run["start"] == own else run["start"],
        "precision": run["precision"],
    }


def tables(runs: list[dict]) -> tuple[str, str]:
    """Many runs as Markdown: a short table, and a document with a whole table for each data set.

    A row is a setting, a cell the mean over its seeds. The short table has a column of joint accuracy for
    each data set.
    """
    rows = {}  # label -> data set -> the runs of all seeds
    for run in sorted(runs, key=place):
        rows.setdefault(label(run, runs), {}).setdefault(run["dataset"], []).append(run)
    data_sets = {run["dataset"]: run["objects"] for run in runs}
    ceilings = {ceiling_key(run): run["teacher"]["joint"]
                for run in runs if run["changed"] == {"labels": "truth"}}

    short = [markdown(["joint top-1, %: start -> end (gap)", *data_sets])]
    short.append(markdown(["---"] * (1 + len(data_sets))))
    for row, by_data_set in rows.items():
        cells = [row]
        for name in data_sets:
            cell = summary(by_data_set.get(name, []), ceilings)
            cells.append(f"{cell['joint']} ({cell['gap']})" if cell["gap"] else cell["joint"])
        short.append(markdown(cells))

    document = [HEADING]
    for key in ("commit", *conditions(runs[0])):
        values = {str({**run, **conditions(run)}[key]) for run in runs}
        document.append(f"- {key}: {', '.join(sorted(values))}")
    for name, objects in data_sets.items():
        heads = [f"{name}, {objects} objects", *MODALITIES, "gap", "student, joint", "joint by seed"]
        document += ["", markdown(heads), markdown(["---"] * len(heads))]
        for row, by_data_set in rows.items():
            if name in by_data_set:
                document.append(markdown([row, *summary(by_data_set[name], ceilings).values()]))
    return "\n".join(short), "\n".join(document) + "\n"


def ceiling_key(run: dict) -> tuple:
    """What a run has in common with its ceiling."""
    return run["dataset"], *conditions(run).values(), run["seed"]


def label(run: dict, runs: list[dict]) -> str:
    """A row's name: the changed options, and those conditions that are not the same in all of `runs`."""
    words = [options_label(run)]
    for key, value in conditions(run).items():
        if any(conditions(other)[key] != value for other in runs):
            words.append(f"{key} {value}")
    return ", ".join(words)


def options_label(run: dict) -> str:
    """What sets a run apart from the method with its defaults, as options of train.py."""
    if "rival" in run:
        return f"{run['rival']}, no training"
    options = as_options(run["changed"])
    return f"`{options}`" if options else "Cross-MoST"


def place(run: dict) -> int:
    """Where a run's row stands: as in ROWS, then rivals, then anything else."""
    options = [f"`{row}`" for row in ROWS if row]
    order = ["Cross-MoST", *options, *(f"{rival}, no training" for rival in RIVALS)]
    name = options_label(run)
    return order.index(name) if name in order else len(order)


def summary(runs: list[dict], ceilings: dict) -> dict[str, str]:
    """The cells of a row, from the runs of its seeds; empty ones without runs."""
    starts = [run["zero_shot"] for run in runs]
    ends = [run["accuracy"] if "rival" in run else run["teacher"] for run in runs]
    cells = {}
    for modality in MODALITIES:
        before = mean_and_std([accuracy[modality] for accuracy in starts])
        after = mean_and_std([accuracy[modality] for accuracy in ends])
        cells[modality] = f"{before} -> {after}" if runs else ""

    closed = [(end["joint"] - start["joint"]) / (ceilings[ceiling_key(run)] - start["joint"])
              for run, start, end in zip(runs, starts, ends) if ceiling_key(run) in ceilings]
    cells["gap"] = f"{100 * statistics.mean(closed):.0f} %" if closed else ""
    cells["student"] = mean_and_std([run["student"]["joint"] for run in runs if "student" in run])
    cells["seeds"] = ", ".join(f"{run['seed']}: {end['joint']:.1f}" for run, end in zip(runs, ends))
    return cells


def mean_and_std(values: list[float]) -> str:
    """mean ± standard deviation; of one value itself, of none nothing."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def markdown(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    with one_line_errors():
        main()
