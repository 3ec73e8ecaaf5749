"""Train a task with every estimator and several seeds, one process a core: a table and a picture.

    python tests/compare.py --task toy --estimators all --seeds 5 --picture docs/toy.png

Each run is a run folder of train.py under --out. Finished runs are kept and begun ones continued,
so the same command goes on after an interruption. Flags that are not listed below go to train.py
(--symbols 8, …).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from data import BASELINES  # noqa: E402
from model import UserError  # noqa: E402
from train import parse  # noqa: E402
from warmup import ESTIMATORS  # noqa: E402


def train(job: tuple[str, int], args, flags: list[str]) -> str:
    """One run, from the start or from where it stopped.

    The first estimator's runs also train the control: SFT for as many FLOPs.
    """
    estimator, seed = job
    folder = args.out / f"{estimator}-{seed}"
    if (folder / "results.json").exists():
        return f"{folder}: kept"
    if (folder / "last.pt").exists():
        command = ["--resume", folder]
    else:
        command = [
            "--task",
            args.task,
            "--estimator",
            estimator,
            "--seed",
            seed,
            "--threads",
            1,
            "--out",
            folder,
            *flags,
        ]
        command += [] if estimator == args.estimators[0] else ["--no-control"]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{folder}: {first_error(done.stderr)}")
    if args.metric not in results(folder)[0]["metrics"]:
        names = ", ".join(results(folder)[0]["metrics"])
        raise SystemExit(f"--metric {args.metric}: the rows have {names}")
    metrics = results(folder)[-1]["metrics"]
    return f"{folder}: " + ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def first_error(text: str) -> str:
    lines = text.strip().splitlines() or ["killed"]
    return next((line for line in lines if line.startswith("error: ")), lines[-1])


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]


def table(args) -> str:
    """Mean ± standard deviation over the seeds, in markdown. TFLOP: 10^12 operations of training.

    The rows of SFT come from the first estimator's runs.
    """
    rows: dict[str, list[dict]] = {}
    for estimator in args.estimators:
        for seed in range(args.seeds):
            for row in results(args.out / f"{estimator}-{seed}"):
                if row["name"] in ("sft", "sft, same compute"):
                    if estimator == args.estimators[0]:
                        rows.setdefault(row["name"], []).append(row)
                else:
                    title = row["name"] if estimator in BASELINES else f"`{estimator}`"
                    rows.setdefault(title, []).append(row)
    names = list(
        dict.fromkeys(name for group in rows.values() for row in group for name in row["metrics"])
    )
    lines = [
        f"| | {' | '.join(names)} | {args.metric}, each seed | NLL per token | updates "
        "| TFLOP | seconds |",
        "|---" * (len(names) + 6) + "|",
    ]
    for title, group in rows.items():
        updates, flops, seconds = (
            statistics.mean(row[name] for row in group) for name in ("updates", "flops", "seconds")
        )
        cells = [
            spread([row["metrics"][name] for row in group]) if name in group[0]["metrics"] else "–"
            for name in names
        ]
        each = " ".join(f"{row['metrics'][args.metric]:.2f}" for row in group)
        cells += [
            each,
            spread([row["nll"] for row in group]),
            f"{updates:,.0f}",
            f"{flops / 1e12:,.2f}",
            f"{seconds:.0f}",
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def draw(args) -> None:
    """The metric on validation data against updates: a line for each estimator, a band of seeds."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    solid = [e for e in args.estimators if e not in BASELINES]
    left = solid[: len(solid) // 2 + 1]
    for axis, group in zip(axes, (left, [e for e in args.estimators if e not in left])):
        axis.set_visible(bool(group))
        for estimator in group:
            curves = []
            for seed in range(args.seeds):
                log = (
                    (args.out / f"{estimator}-{seed}" / "log.jsonl")
                    .read_text(encoding="utf-8")
                    .splitlines()
                )
                lines = [
                    line
                    for line in map(json.loads, log)
                    if (line["kind"], line["stage"]) == ("valid", "policy")
                ]
                curves.append([line[args.metric] for line in lines])
            steps = [line["step"] for line in lines]
            middle = [statistics.mean(at) for at in zip(*curves)]
            style = "--" if estimator in BASELINES else "-"
            color = f"C{args.estimators.index(estimator)}"
            axis.plot(steps, middle, style, color=color, label=estimator)
            worst, best = ([pick(at) for at in zip(*curves)] for pick in (min, max))
            axis.fill_between(steps, worst, best, color=color, alpha=0.12, linewidth=0)
        axis.set_xlabel("updates after SFT")
        if group:
            axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"{args.metric}, validation")
    figure.suptitle(
        f"{args.task}: mean of {args.seeds} seeds, band from the worst to the best; "
        "dashed: baselines",
        fontsize=10,
    )
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=110)
    print(f"wrote {args.picture}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, picture = parser.add_argument, Path("runs/compare/compare.png")
    add("--task", default="toy", help="default: toy")
    add(
        "--estimators",
        nargs="+",
        default=["all"],
        choices=("all", *ESTIMATORS, "exact", "pause", "sft"),
    )
    add("--seeds", type=int, default=5, help="seeds 0 to this less one (default: 5)")
    add("--metric", default="2 hops", help="in the picture and for each seed (default: 2 hops)")
    add("--out", type=Path, default=Path("runs/compare"), help="default: runs/compare")
    add("--picture", type=Path, default=picture, help=f"default: {picture}")
    args, flags = parser.parse_known_args()
    flags = [word for flag in flags for word in flag.split("=", 1)]
    if own := {"--estimator", "--seed", "--threads", "--out", "--control", "--no-control"} & {
        *flags
    }:
        parser.error(f"{', '.join(sorted(own))} is set for each run: see --estimators and --seeds")
    try:  # a flag that train.py lacks should fail before a folder is made
        parse(["--task", args.task, *flags])
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    if "all" in args.estimators:
        every = [*ESTIMATORS, "pause", "sft"]
        args.estimators = every + [e for e in args.estimators if e not in ("all", *every)]
    if args.task != "toy" and "--eval-decode" not in flags:
        parser.error(
            "the picture needs --eval-decode N: so many validation examples are scored as "
            "training goes"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("the picture needs matplotlib: pip install matplotlib") from None
    settings = json.dumps({"task": args.task, "flags": flags, "control": args.estimators[0]})
    args.out.mkdir(parents=True, exist_ok=True)
    note = args.out / "settings.json"
    before = note.read_text(encoding="utf-8") if note.exists() else settings
    if before != settings:
        raise SystemExit(f"{args.out} holds runs of other settings, {before}: choose another --out")
    note.write_text(settings, encoding="utf-8")
    jobs = [(estimator, seed) for estimator in args.estimators for seed in range(args.seeds)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for line in pool.map(lambda job: train(job, args, flags), jobs):
            print(line, flush=True)
    print("\n" + table(args) + "\n")
    draw(args)


if __name__ == "__main__":
    main()
