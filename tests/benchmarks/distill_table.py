"""What distillation recovers on the CIFAR-10 network.

    python -m tests.benchmarks.distill_table --table
    python -m tests.benchmarks.distill_table --seeds 0 1 2 --results mine.jsonl

Converts sample_models/cifar10_cnn.onnx, distils each student on the images of the
training split and measures accuracy in onnxruntime on the validation split. Every run
is one line of the results file, with its settings and wall time; a run that is there
already is not made again, and an interrupted one goes on from its checkpoint. The file
beside this script holds what the README shows. Baseline: the teacher's accuracy, and
the paper's, which trained from scratch with labels.

`--start random` tells what fitted weights save: compare the column "epochs to" an
agreement. Rows that are to be above the teacher have the labels, with the weight
`--labels`. `--epochs 2 --images 4000` is a quick look. Minutes are of processor time,
latencies are measured when the table is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import cifar10
from tests.benchmarks.cifar10 import MODEL as TEACHER

RESULTS = Path(__file__).with_suffix(".jsonl")


@dataclass(frozen=True)
class Structure:
    """One row: the command that makes the student, how it is trained, what to beat."""

    command: tuple[str, ...]
    epochs: int
    labels: float  # their weight; 0 is training without
    paper: float | None
    aim: str


CONVERT = ("convert", "--to")
SEPARABLE = (*CONVERT, "depthwise-separable", "--pool", "absorb")
INVERTED = (*CONVERT, "inverted-residual", "--pool", "absorb", "--set", "expansion=6")
V2 = (*CONVERT, "effnet-v2", "--set")
PRUNE = ("prune", "--macs")
COSTLIER = "--allow-costlier"
STRUCTURES = {
    "effnet": Structure((*CONVERT, "effnet"), 30, 0, 80.20, "teacher − 1"),
    "effnet, labels": Structure((*CONVERT, "effnet"), 30, 1.0, 80.20, "teacher"),
    "depthwise-separable": Structure(SEPARABLE, 20, 0, 77.48, "teacher − 3"),
    "effnet-v2 ×6": Structure(
        (*V2, "expansion=6", COSTLIER), 10, 1.0, 83.05, "teacher"
    ),
    "effnet-v2 ×2": Structure((*V2, "expansion=2"), 10, 0, 80.02, "teacher − 1.5"),
    "inverted-residual ×6": Structure((*INVERTED, COSTLIER), 15, 1.0, 79.10, "teacher"),
    "pruned to 25 %": Structure((*PRUNE, "25%"), 20, 0, None, "teacher − 1"),
    "pruned to 25 %, labels": Structure((*PRUNE, "25%"), 10, 1.0, None, "teacher − 1"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=cifar10.FOLDER)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("distill_table.work"))
    parser.add_argument("--structures", nargs="*", default=list(STRUCTURES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--start", choices=["default", "random", "fitted"], default="fitted"
    )
    parser.add_argument("--epochs", type=int, help="default: the structure's")
    parser.add_argument("--images", type=int, help="train on the first so many only")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE")
    parser.add_argument(
        "--labels", type=float, help="their weight; default: the structure's"
    )
    parser.add_argument("--reach", type=float, default=0.8, help="agreement to reach")
    parser.add_argument("--table", action="store_true", help="print, run nothing")
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True)
    if not options.table:
        for seed in options.seeds:
            for name in options.structures:
                run_once(name, seed, options)
    print_table(options)


def run_once(name: str, seed: int, options: argparse.Namespace) -> None:
    """Make, distil and measure one student, unless the results hold it."""
    structure = STRUCTURES[name]
    labels = structure.labels if options.labels is None else options.labels
    settings = {
        "structure": name,
        "seed": seed,
        "start": options.start,
        "epochs": structure.epochs if options.epochs is None else options.epochs,
        "images": options.images,
        "set": sorted(options.set),
        **({"labels": labels} if labels else {}),
    }
    if any(row["settings"] == settings for row in rows(options.results)):
        return
    train, validation = archives(options, bool(labels))
    student = options.work / f"{stem_of(settings)}.onnx"
    if not student.exists() and not make(settings, student, train):
        return
    started = time.time(), time.process_time()
    result = train_student(student, train, settings)
    found = {
        "settings": settings,
        **result,
        "accuracy": accuracy(student.with_suffix(".distilled.onnx"), validation),
        "untrained": accuracy(student, validation),
        "teacher": accuracy(TEACHER, validation),
        "macs": macs(student),
        "wall_seconds": time.time() - started[0],
        "processor_seconds": time.process_time() - started[1],
    }
    with options.results.open("a") as file:
        file.write(json.dumps(found) + "\n")
    print(
        f"{student.stem}: {found['untrained']:.2%} → {found['accuracy']:.2%} "
        f"(teacher {found['teacher']:.2%}) in {found['wall_seconds']:.0f} s",
        flush=True,
    )


def stem_of(settings: dict) -> str:
    stem = "-".join(str(v) for v in settings.values() if v).replace(" ", "_")
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in stem)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()] if path.exists() else []


def make(settings: dict, student: Path, train: Path) -> bool:
    """Run the command that makes the student; False where this version lacks it."""
    from squeeze.cli import run

    name, seed = settings["structure"], settings["seed"]
    command, *arguments = STRUCTURES[name].command
    fit = {
        "default": [],
        "random": ["--fit", "none"],
        "fitted": ["--data", str(train)],
    }[settings["start"]]
    if command == "prune":
        fit = ["--data", str(train)]
    arguments += [*fit, "--no-bench", "--seed", str(seed), "-o", str(student)]
    with contextlib.redirect_stdout(io.StringIO()):
        status = run([command, str(TEACHER), *arguments])
    if status:
        print(f"{name}: squeeze {command} {' '.join(arguments)} gives status {status}")
    return status == 0


def train_student(student: Path, train: Path, settings: dict) -> dict:
    from squeeze.recover import Files, Options, distill_files

    files = Files(student, TEACHER, str(train))
    chosen = {k: _value(v) for k, v in (o.split("=", 1) for o in settings["set"])}
    setting = Options(
        epochs=settings["epochs"],
        seed=settings["seed"],
        label_weight=settings.get("labels", 0.0),
        **chosen,
    )

    def progress(p) -> None:
        if p.finished:
            e = p.finished
            print(
                f"  {e.phase} {e.epoch}/{e.epochs}: loss {e.loss:.4f}, agreement "
                f"{e.score.agreement:.2%}, {e.seconds:.0f} s",
                flush=True,
            )

    resume = files.checkpoint.is_file()
    done = distill_files(files, setting, resume=resume, progress=progress)
    return {
        "history": [_short(dataclasses.asdict(e)) for e in done.history],
        "training_seconds": done.history[-1].seconds if done.history else 0.0,
        "device": done.device,
        "precision": done.precision,
        "stopped": done.stopped,
    }


def _short(value: Any) -> Any:
    """Four digits of every number."""
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _value(text: str) -> object:
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def archives(options: argparse.Namespace, labelled: bool) -> tuple[Path, Path]:
    """The decoded splits: training images, without labels but where they are used."""
    suffix = f"-{options.images}" if options.images else ""
    suffix += "-labelled" if labelled else ""
    train = options.work / f"train{suffix}.npz"
    validation = options.work / "validation.npz"
    if not train.exists():
        x, y = cifar10.split(options.data / "train.npz")
        labels = {"labels": y[: options.images]} if labelled else {}
        np.savez(train, x=x[: options.images], **labels)
    if not validation.exists():
        x, y = cifar10.split(options.data / "validation.npz")
        np.savez(validation, x=x, labels=y)
    return train, validation


def accuracy(model: Path, archive: Path) -> float:
    from squeeze import session

    with np.load(archive) as data:
        x, labels = data["x"], data["labels"]
    runner = session.create(model)
    hits = [
        runner.run(None, {runner.get_inputs()[0].name: x[i : i + 250]})[0].argmax(1)
        == labels[i : i + 250]
        for i in range(0, len(x), 250)
    ]
    return float(np.concatenate(hits).mean())


def macs(model: Path) -> float:
    from squeeze.cost import profile

    return profile(model).totals.macs / profile(TEACHER).totals.macs


def latency(model: Path) -> float:
    """Over the teacher's, in processor time of one thread: other load is not in it."""
    from squeeze import load, shapes
    from squeeze.measure.latency import Candidate, Settings, bench, feeds_for

    candidates = [
        Candidate(path, feeds_for(path, shapes.infer(load(path))))
        for path in (TEACHER, model)
    ]
    (ratio,) = bench(candidates, Settings(seconds=5.0, clock="processor")).ratios
    return ratio.ratio


# -- the table ----------------------------------------------------------------------


def groups(path: Path) -> Iterator[tuple[dict, list[dict]]]:
    """Rows that differ in the seed alone."""
    found: dict[str, list[dict]] = {}
    for row in rows(path):
        key = {k: v for k, v in row["settings"].items() if k != "seed"}
        found.setdefault(json.dumps(key), []).append(row)
    for key, members in found.items():
        yield json.loads(key), members


def print_table(options: argparse.Namespace) -> None:
    path, reach = options.results, options.reach
    print(
        "| structure | start | MACs | latency | untrained | accuracy | paper | teacher "
        f"| aim | epochs | to {reach:.0%} agreement | minutes |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|")
    for settings, members in groups(path):
        structure = STRUCTURES[settings["structure"]]
        paper = f"{structure.paper:.2f} %" if structure.paper else "–"
        epochs = statistics.mean(len(m["history"]) for m in members)
        student = options.work / f"{stem_of(members[0]['settings'])}.onnx"
        if not student.exists():
            make(members[0]["settings"], student, archives(options, False)[0])
        cells = [
            settings["structure"],
            settings["start"] + (", labels" if settings.get("labels") else ""),
            f"{members[0]['macs']:.2f}",
            f"{latency(student):.2f}",
            f"{statistics.mean(m['untrained'] for m in members):.1%}",
            spread([100 * m["accuracy"] for m in members]),
            paper,
            f"{members[0]['teacher']:.2%}",
            structure.aim,
            f"{epochs:.0f}",
            reached([m["history"] for m in members], reach),
            f"{statistics.mean(m['processor_seconds'] for m in members) / 60:.1f}",
        ]
        print(f"| {' | '.join(cells)} |")


def spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.2f} % (1 seed)"
    return f"{mean:.2f} ± {statistics.stdev(values):.2f} % ({len(values)} seeds)"


def reached(histories: list[list[dict]], agreement: float) -> str:
    first = [
        next(
            (i for i, e in enumerate(h, 1) if e["score"]["agreement"] >= agreement),
            None,
        )
        for h in histories
    ]
    if any(f is None for f in first):
        return "not"
    return f"{statistics.mean(f for f in first if f):.1f}"


if __name__ == "__main__":
    main()
