"""Tables of runs of one's own, and those of README and assets/tables.md; the runs behind them.

    python -m tools.make_tables --data "--dataset shapes" --rows "" "--w-cross 0" --seeds 0 1
    OMP_NUM_THREADS=1 python -m tools.make_tables       # all of assets/tables.md: days
    python -m tools.make_tables --gather --into assets  # no run, only tables of those done

A row is a set of options of train.py, "" the method with its defaults, or the name of a rival,
which trains nothing. Each seed has a start of its own, which tools.pretrain makes first: a quarter
of an hour on one core. A finished run is not run again, an unfinished one continues. tables.md and
results.json are written beside the runs, into runs/tables.
"""
import json
import re
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import train
from data import Objects, load_dataset
from eval import MODALITIES, assess, embed, evaluate, to_probs
from model import CrossMoST
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
    # Rivals: what the same start reaches without training.
    "cache": (SHAPES, REAL, SCANNED),
    "named together": (SHAPES, REAL, SCANNED),
}


# ------ Running ---------------------------------------------------------------------------------------------
def main(argv=None) -> str:
    """Run what is not done, then write the tables. Returns the short one."""
    args = parse_args(argv)
    failed = [] if args.gather else run_all(args)

    results = gather(args.folder)
    short, document = tables(results)
    for folder in (args.folder, args.into):
        if folder:
            write_whole(folder / "tables.md", document.encode())
            write_whole(folder / "results.json", json.dumps(results, indent=0).encode())
    print(short)
    if failed:
        listed = ", ".join(failed)
        raise UserError(f"{len(failed)} runs failed; their output.txt says why: {listed}")
    return short


def parse_args(argv=None):
    parser = option_parser("tables of runs, and the runs behind them")
    add = parser.add_argument
    add("--rows", nargs="+", default=list(ROWS), metavar="ROW",
        help=f"options of train.py, or a rival: {', '.join(RIVALS)}")
    add("--data", nargs="+", metavar="OPTIONS",
        help="data sets, as \"--dataset modelnet10 --domain target\"")
    add("--seeds", nargs="+", type=number(0, convert=int), default=[0, 1, 2],
        help="of starts and runs")
    add("--folder", type=Path, default=Path("runs/tables"), help="of the runs and their tables")
    add("--gather", action="store_true", help="run nothing, make the tables of what is done")
    add("--into", type=Path, help="a second folder for tables.md and results.json, as assets")
    return parser.parse_args(argv)


def run_all(args) -> list[str]:
    """Make the seeds' starts, and run what is not done. Returns the folders of failed runs."""
    starts = {seed: make_start(seed, args.folder) for seed in args.seeds}
    failed = []
    for row in args.rows:
        data_sets = args.data or ROWS.get(row, (SHAPES,))
        for data_set, seed in product(data_sets, args.seeds):
            out = args.folder / folder_name(data_set) / folder_name(row) / f"seed-{seed}"
            if (out / "results.json").exists():
                continue
            # Nothing reads the accuracy on the way, so only the end is evaluated.
            options = [*data_set.split(), "--start-checkpoint", str(starts[seed])]
            options += ["--seed", str(seed), "--eval-every", "0"]
            if row in RIVALS:
                results = score_rival(row, options)
                write_whole(out / "results.json", json.dumps(results, indent=1).encode())
            elif not run_python([train.__file__, *options, *row.split(), "--out", str(out)], out):
                failed.append(str(out))
    return failed


def make_start(seed: int, folder: Path) -> Path:
    """The path of a seed's start, which is made if it is not there.

    Raises: UserError for one that other code made, or where making it fails.
    """
    path, out = folder / "starts" / f"tiny-seed-{seed}.pt", folder / "starts" / f"seed-{seed}"
    if not path.exists():
        pretrain = ["-m", "tools.pretrain", "--seed", str(seed), "--into", str(path)]
        if not run_python(pretrain, out):
            raise UserError(f"{path} was not made; {out}/output.txt says why")
    if read_start(path)["options"].get("code") != CODE_OF_STARTS:
        raise UserError(f"{path} was made by other code; remove it, or name another --folder")
    return path


def folder_name(options: str) -> str:
    """"--dataset shapes --domain target" -> "shapes-target", "--w-cross 0" -> "w-cross-0"."""
    words = options.replace("--dataset ", "").replace("--domain ", "").replace("--", "")
    # A path, too, becomes one name: a folder of the user's own is a data set.
    return re.sub(r"[^\w.+-]+", "-", words).strip("-") or "default"


def run_python(words: list[str], out: Path) -> bool:
    """Run Python, which prints into OUT/output.txt. Returns whether it succeeded."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "w") as output:
        command = [sys.executable, "-u", *words]
        ended = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT)
    print(f"{out} {'failed' if ended.returncode else 'done'}", flush=True)
    return ended.returncode == 0


# ------ Rivals: what the same start reaches without training ------------------------------------------------
def score_rival(rival: str, options: list[str]) -> dict:
    """The results of a rival, with those keys of train.py's that the tables read, and "accuracy".

    options: of train.py, which say the data and the start.
    """
    args = train.parse_args(options)
    how = args.points, args.domain, args.download, args.up, args.cache
    unlabelled = load_dataset(args.dataset, args.data_root, "train", *how)
    test = load_dataset(args.dataset, args.data_root, "test", *how)
    begun = train.begin(args, unlabelled)
    model = begun.teacher
    before = evaluate(model, test, args.views)
    after = assess(RIVALS[rival](model, unlabelled, test, args.views), test)
    return {
        "dataset": test.name,
        "objects": len(test),
        "rival": rival,
        "model": args.model,
        "start": train.start_name(args),
        "seed": args.seed,
        "changed": {},
        "precision": begun.identity["precision"],
        "commit": provenance(args.device)["commit"],
        "zero_shot": top_one(before),
        "accuracy": top_one(after),
        "information": {"start": before["information"], "teacher": after["information"]},
    }


def predict_by_cache(model: CrossMoST, unlabelled: Objects, objects: Objects,
                     views: int | None = None, shots: int = 16,
                     sharpness: float = 5.5) -> dict[str, Tensor]:
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


HEADS = (*MODALITIES, "gap", "student, joint", "joint by seed", "information")


def gather(folder: Path) -> list[dict]:
    """The results.json of all runs below the folder.

    Raises: UserError for a broken file, two runs that differ in nothing, or no run.
    """
    runs = {}
    for path in sorted(folder.glob("*/**/results.json")):  # FOLDER/results.json is what is gathered
        with reading(path, "expected results of train.py or of a rival; remove it"):
            run = json.loads(path.read_text())
            setting = str([row_of(run), *ceiling_key(run)])
            if setting in runs:
                raise ValueError("another run there has its options and its seed")
            runs[setting] = run
    if not runs:
        raise UserError(f"no results.json below {folder}; run some rows first")
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
    each data set; without labels, of what image and point tell each other.
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
            told = f"{cell['information']} nats" if cell["information"] else ""
            joint = f"{cell['joint']} ({cell['gap']})" if cell["gap"] else cell["joint"]
            cells.append(joint or told)
        short.append(markdown(cells))

    document = [HEADING]
    for key in ("commit", *conditions(runs[0])):
        values = {str({**run, **conditions(run)}[key]) for run in runs}
        document.append(f"- {key}: {', '.join(sorted(values))}")
    for name, objects in data_sets.items():
        summaries = {row: summary(by_data_set[name], ceilings)
                     for row, by_data_set in rows.items() if name in by_data_set}
        # What no run says has no column: accuracy without labels, information in old results.
        heads = [head for head in HEADS if any(cells[head] for cells in summaries.values())]
        document += ["", markdown([f"{name}, {objects} objects", *heads])]
        document.append(markdown(["---"] * (1 + len(heads))))
        for row, cells in summaries.items():
            document.append(markdown([row, *(cells[head] for head in heads)]))
    return "\n".join(short), "\n".join(document) + "\n"


def ceiling_key(run: dict) -> tuple:
    """What a run has in common with its ceiling."""
    return run["dataset"], *conditions(run).values(), run["seed"]


def row_of(run: dict) -> str:
    """What a run differs in from the method's defaults: options of train.py, or a rival."""
    return run["rival"] if "rival" in run else as_options(run["changed"])


def label(run: dict, runs: list[dict]) -> str:
    """A row's name in the tables, with those conditions that are not the same in all of `runs`."""
    row = row_of(run)
    name = f"`{row}`" if row else "Cross-MoST"
    words = [f"{row}, no training" if "rival" in run else name]
    for key, value in conditions(run).items():
        if any(conditions(other)[key] != value for other in runs):
            words.append(f"{key} {value}")
    return ", ".join(words)


def place(run: dict) -> int:
    """Where a run's row stands: as in ROWS, or at the end."""
    rows, row = list(ROWS), row_of(run)
    return rows.index(row) if row in rows else len(rows)


def summary(runs: list[dict], ceilings: dict) -> dict[str, str]:
    """The cells of a row by HEADS, from the runs of its seeds; empty where these do not say it."""
    with_labels = [run for run in runs if run["zero_shot"]]
    starts = [run["zero_shot"] for run in with_labels]
    ends = [run["accuracy"] if "rival" in run else run["teacher"] for run in with_labels]
    cells = {}
    for modality in MODALITIES:
        before = mean_and_std([accuracy[modality] for accuracy in starts])
        after = mean_and_std([accuracy[modality] for accuracy in ends])
        cells[modality] = f"{before} -> {after}" if with_labels else ""

    closed, by_seed, students = [], [], []
    for run, start, end in zip(with_labels, starts, ends):
        by_seed.append(f"{run['seed']}: {end['joint']:.1f}")
        if "student" in run:
            students.append(run["student"]["joint"])
        if ceiling_key(run) in ceilings:
            gap = ceilings[ceiling_key(run)] - start["joint"]
            closed.append((end["joint"] - start["joint"]) / gap)
    cells["gap"] = f"{100 * statistics.mean(closed):.0f} %" if closed else ""
    cells["student, joint"] = mean_and_std(students)
    cells["joint by seed"] = ", ".join(by_seed)

    told = [run["information"] for run in runs if "information" in run]
    before = mean_and_std([by_model["start"] for by_model in told], digits=2)
    after = mean_and_std([by_model["teacher"] for by_model in told], digits=2)
    cells["information"] = f"{before} -> {after}" if told else ""
    return cells


def mean_and_std(values: list[float], digits: int = 1) -> str:
    """mean ± standard deviation; of one value itself, of none nothing."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    with one_line_errors():
        main()
