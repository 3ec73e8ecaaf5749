"""Train a task with every estimator and several seeds, one process a core: a table and a picture.

    python tests/compare.py --task toy --estimators all --seeds 5 --picture docs/toy.png

Each run is a run folder of train.py under --out. The first estimator's runs train SFT and the
control, once a seed. The others take this SFT stage (--sft). So runs of a seed share SFT, data and
test set, and are compared in pairs: the difference from the control, seed by seed.

Finished runs are kept and begun ones continued, so the same command goes on after an interruption.
Flags that are not listed below go to train.py (--symbols 8, …).
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
from data import BASELINES, STAGES  # noqa: E402
from model import UserError  # noqa: E402
from train import parse  # noqa: E402
from warmup import ESTIMATORS, NOT_SAMPLED  # noqa: E402

CONTROL = STAGES["control"]  # its name in the table


def train(job: tuple[str, int], args, flags: list[str]) -> str:
    """One run, from the start, from another run's SFT stage, or from where it stopped."""
    estimator, seed = job
    folder = args.out / f"{estimator}-{seed}"
    first = args.out / f"{args.estimators[0]}-{seed}"
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
        command += [] if folder == first else ["--no-control", "--sft", first]
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
    [metrics] = [row["metrics"] for row in results(folder) if row["stage"] == "policy"]
    return f"{folder}: " + ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def first_error(text: str) -> str:
    lines = text.strip().splitlines() or ["killed"]
    return next((line for line in lines if line.startswith("error: ")), lines[-1])


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]


def all_rows(args) -> dict[str, list[dict]]:
    """Title -> the rows of all seeds. SFT and its control are those of the first estimator's runs."""
    rows: dict[str, list[dict]] = {"sft": [], CONTROL: []}
    for estimator in args.estimators:
        for seed in range(args.seeds):
            for row in results(args.out / f"{estimator}-{seed}"):
                if row["stage"] == "policy":
                    title = row["name"] if estimator in BASELINES else f"`{estimator}`"
                    rows.setdefault(title, []).append(row)
                elif estimator == args.estimators[0]:
                    rows[row["name"]].append(row)
    return rows


def table(rows, args) -> str:
    """Mean ± standard deviation over the seeds, in markdown. TFLOP: 10^12 operations of training."""
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


def spread(values: list[float], form=".2f") -> str:
    mean = f"{statistics.mean(values):{form}}"
    return mean + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def differences(group: list[dict], control: list[dict]) -> dict[str, list[float]]:
    """Metric, or NLL -> row less control, for each seed: they share SFT stage, data and test set."""
    numbers = [[row["metrics"] | {"NLL": row["nll"]} for row in rows] for rows in (group, control)]
    names = [name for name in numbers[1][0] if name in numbers[0][0]]
    return {name: [a[name] - b[name] for a, b in zip(*numbers)] for name in names}


def paired_table(rows) -> str:
    """For each row its differences from the control: mean ± standard deviation, how often above.

    The spread of a row over seeds says how much seeds differ. It is not the yardstick here.
    """
    lines = []
    for title, group in rows.items():
        if title == CONTROL:
            continue
        found = differences(group, rows[CONTROL])
        lines = lines or [
            f"| less `{CONTROL}` | {' | '.join(found)} |",
            "|---" * (len(found) + 1) + "|",
        ]
        cells = []
        for values in found.values():
            above = sum(value > 0 for value in values)
            count = f"above in {above} of {len(values)}" if len(values) > 1 else "1 seed"
            cells.append(f"{spread(values, '+.2f')} ({count})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows, args) -> None:
    """The metric on validation data against updates: a line for each estimator, a band of seeds.

    On the right, on test data, what counts: the difference from the control, a dot for each seed.
    """
    from matplotlib import pyplot as plt

    figure, (*axes, right) = plt.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
    axes[1].sharey(axes[0])
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
    titles = [title for title in rows if title not in ("sft", CONTROL)]
    for place, title in enumerate(titles):  # in the order of args.estimators
        values = differences(rows[title], rows[CONTROL])[args.metric]
        right.plot(values, [place] * len(values), "o", color=f"C{place}", alpha=0.5)
        right.plot([statistics.mean(values)], [place], "|", color="black", markersize=16)
    right.set_yticks(range(len(titles)), [title.strip("`") for title in titles])
    right.invert_yaxis()
    right.axvline(0, color="gray", linewidth=0.8)
    right.set_xlabel(f"{args.metric}, test: difference from '{CONTROL}'")
    right.spines[["top", "right"]].set_visible(False)
    seeds = "1 seed" if args.seeds == 1 else f"mean of {args.seeds} seeds, band: worst to best"
    dots = "right: each seed, the line is the mean"
    figure.suptitle(f"{args.task}: {seeds}; dashed: baselines; {dots}", fontsize=10)
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
        choices=("all", *ESTIMATORS, *NOT_SAMPLED, "sft"),
    )
    add("--seeds", type=int, default=5, help="seeds 0 to this less one (default: 5)")
    add("--metric", default="2 hops", help="in the picture and for each seed (default: 2 hops)")
    add("--out", type=Path, default=Path("runs/compare"), help="default: runs/compare")
    add("--picture", type=Path, default=picture, help=f"default: {picture}")
    args, flags = parser.parse_known_args()
    flags = [word for flag in flags for word in flag.split("=", 1)]
    own = {"--estimator", "--seed", "--threads", "--out", "--sft", "--control", "--no-control"}
    if own := own & {*flags}:
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
    first, *others = args.estimators
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for group in ([first], others):  # the others take the SFT stage of the first
            jobs = [(estimator, seed) for estimator in group for seed in range(args.seeds)]
            for line in pool.map(lambda job: train(job, args, flags), jobs):
                print(line, flush=True)
    rows = all_rows(args)
    print(f"\n{table(rows, args)}\n\n{paired_table(rows)}\n")
    draw(rows, args)


if __name__ == "__main__":
    main()
