"""Train a task with every estimator and several seeds, one process a core; print one table, draw one picture.

    python tests/compare.py --task toy --estimators all --seeds 5

Each run is a run folder of train.py under --out. Finished runs are kept and begun ones continued, so the same
command goes on after an interruption. Flags that are not listed below go to train.py (--symbols 8, ...).
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
from warmup import ESTIMATORS  # noqa: E402

CONTROLS = ("frozen", "pause", "sft")


def train(job: tuple[str, int], args, flags: list[str]) -> str:
    """One run, from the start or from where it stopped. The first estimator's runs also train SFT for equal time."""
    estimator, seed = job
    folder = args.out / f"{estimator}-{seed}"
    if (folder / "results.json").exists():
        return f"{folder}: kept"
    if (folder / "last.pt").exists():
        command = ["--resume", folder]
    else:
        command = ["--task", args.task, "--estimator", estimator, "--seed", seed, "--threads", 1, "--out", folder, *flags]
        command += [] if estimator == args.estimators[0] else ["--no-control"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *map(str, command)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{folder}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    if args.metric not in results(folder)[0]["metrics"]:
        raise SystemExit(f"--metric {args.metric}: the rows have {', '.join(results(folder)[0]['metrics'])}")
    return f"{folder}: " + ", ".join(f"{k} {v:.2f}" for k, v in results(folder)[-1]["metrics"].items())


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["rows"]


def table(args) -> str:
    """Mean ± standard deviation over the seeds, in markdown. The rows of SFT come from the first estimator's runs."""
    rows: dict[str, list[dict]] = {}
    for estimator in args.estimators:
        for seed in range(args.seeds):
            for row in results(args.out / f"{estimator}-{seed}"):
                if row["name"] == "sft" or row["name"].startswith("sft, same compute"):
                    if estimator == args.estimators[0]:
                        rows.setdefault(row["name"], []).append(row)
                else:
                    rows.setdefault(row["name"] if estimator in CONTROLS else f"`{estimator}`", []).append(row)
    names = list(dict.fromkeys(name for group in rows.values() for row in group for name in row["metrics"]))
    lines = [f"| | {' | '.join(names)} | {args.metric}, each seed | NLL per token | updates | seconds |",
             "|---" * (len(names) + 5) + "|"]
    for title, group in rows.items():
        cells = [spread([row["metrics"][name] for row in group]) if name in group[0]["metrics"] else "–" for name in names]
        each = " ".join(f"{row['metrics'][args.metric]:.2f}" for row in group)
        cells += [each, spread([row["nll"] for row in group]), f"{statistics.mean(row['updates'] for row in group):,.0f}",
                  f"{statistics.mean(row['seconds'] for row in group):.0f}"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def draw(args) -> None:
    """The metric on validation data against the stage's updates: a line for each estimator, a band over the seeds."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    solid = [e for e in args.estimators if e not in CONTROLS]
    left = solid[: len(solid) // 2 + 1]
    for axis, group in zip(axes, (left, [e for e in args.estimators if e not in left])):
        axis.set_visible(bool(group))
        for estimator in group:
            curves = []
            for seed in range(args.seeds):
                log = map(json.loads, (args.out / f"{estimator}-{seed}" / "log.jsonl").read_text().splitlines())
                lines = [line for line in log if (line["kind"], line["stage"]) == ("valid", "policy")]
                curves.append([line[args.metric] for line in lines])
            steps = [line["step"] for line in lines]
            middle = [statistics.mean(at) for at in zip(*curves)]
            style = "--" if estimator in CONTROLS else "-"
            (line,) = axis.plot(steps, middle, style, label=estimator)
            axis.fill_between(steps, [min(at) for at in zip(*curves)], [max(at) for at in zip(*curves)],
                              color=line.get_color(), alpha=0.12, linewidth=0)
        axis.set_xlabel("updates after SFT")
        if group:
            axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"{args.metric}, validation")
    figure.suptitle(f"{args.task}: mean of {args.seeds} seeds, band from the worst to the best; dashed: controls", fontsize=10)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=110)
    print(f"wrote {args.picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--task", default="toy", help="default: toy")
    parser.add_argument("--estimators", nargs="+", default=["all"], choices=("all", *ESTIMATORS, "exact", "pause", "sft"))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this less one (default: 5)")
    parser.add_argument("--metric", default="2 hops", help="for the picture and the list of seeds (default: 2 hops)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="default: runs/compare")
    parser.add_argument("--picture", type=Path, default=Path("runs/compare/compare.png"), help="default: runs/compare/compare.png")
    args, flags = parser.parse_known_args()
    if "all" in args.estimators:
        every = [*ESTIMATORS, "pause", "sft"]
        args.estimators = every + [e for e in args.estimators if e not in ("all", *every)]
    if args.task != "toy" and "--eval-decode" not in flags:
        parser.error("the picture needs --eval-decode N: so many validation examples are scored as training goes")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("the picture needs matplotlib: pip install matplotlib") from None
    settings = json.dumps({"task": args.task, "flags": flags, "control": args.estimators[0]})
    args.out.mkdir(parents=True, exist_ok=True)
    note = args.out / "settings.json"
    if note.exists() and note.read_text() != settings:
        raise SystemExit(f"{args.out} holds runs of other settings, {note.read_text()}: choose another --out")
    note.write_text(settings)
    jobs = [(estimator, seed) for estimator in args.estimators for seed in range(args.seeds)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for line in pool.map(lambda job: train(job, args, flags), jobs):
            print(line, flush=True)
    print("\n" + table(args) + "\n")
    draw(args)


if __name__ == "__main__":
    main()
