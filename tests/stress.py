"""Kill training at random and resume it; give the programs broken input. Not for pytest: minutes.

    python tests/stress.py --kills 100 --inputs 1000 --seed 0

Kills: SIGKILL ends tiny runs at a random time or before a random operation on a file. Resumed, they
must end like an uninterrupted run: checkpoints, log and results, but for seconds, bit for bit.
Inputs: changed bytes or JSON values in files, random flags. Good answers: code 0, code 1 with one
line, "error: ...", code 2 with the usage. Others go to --out. Input 17: --first 17 --inputs 1
"""

import argparse, collections, dataclasses, faulthandler, gzip, json, math, os, random, re, resource
import shutil, signal, sys, tempfile, time, traceback
from pathlib import Path

import torch._dynamo  # here: optimizers would import it in every child

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data, eval as evaluation, train

TINY = (
    "--size nano --built-in-size 300 --vocab-size 500 --max-source-tokens 40 --max-target-tokens 40 --batch-tokens 800 --beams "
    "2 --policy-batch-tokens 400 --warmup-len 2 --samples 2 --eval-samples 2 --eval-decode 0 "
    "--threads 1 --eval-every 2 --sft-steps 4 --policy-steps 4"
).split()
TOY = ["--task", "toy", *TINY, *"--sft-steps 12 --policy-steps 12 --eval-every 4".split()]
WMT = ["--task", "wmt", "--data", "text", *TINY]
GOOD = {0: "code 0", 1: "code 1, one line", 2: "code 2, usage"}
FINE = ("killed", "resumed", "equal bit for bit", *GOOD.values())  # all else goes to --out
FILES = ("open", "os.rename", "os.truncate", "os.remove", "os.mkdir")


def fork(home, program, argv, limit=300, memory=64, after=0.0, at=math.inf) -> dict:
    """program(argv) in a fork, in folder home. SIGKILL: after seconds, or at an operation."""
    report, trace, *standard = [home.with_name(name) for name in "report trace in out err".split()]
    _ = [path.write_text("", encoding="utf-8") for path in (report, trace, *standard[1:])]
    started, told = time.monotonic(), {"operations": 0}

    def count(event: str, arguments) -> None:
        if event in FILES and not str(arguments[0]).startswith("/"):  # imports begin with a /
            told["operations"] += 1
            if told["operations"] > at:
                os.kill(os.getpid(), signal.SIGKILL)

    if not (pid := os.fork()):
        try:
            os.chdir(home)
            for number, path in enumerate(standard):
                os.dup2(os.open(path, os.O_RDWR), number)
            faulthandler.enable(file := open(trace, "w", buffering=1))
            faulthandler.dump_traceback_later(limit, exit=True, file=file)
            resource.setrlimit(resource.RLIMIT_AS, (memory << 30, memory << 30))
            sys.addaudithook(count)
            try:
                told["code"] = program(argv)
            except SystemExit as leaving:
                told["code"] = leaving.code
            except BaseException as error:
                told["outcome"] = f"TRACEBACK {type(error).__name__}"
                traceback.print_exc(file=file)
            sys.stdout.flush(), sys.stderr.flush()
            report.write_text(json.dumps(told), encoding="utf-8")
        finally:
            os._exit(0)
    time.sleep(after)
    if after:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    text, err = (p.read_text(encoding="utf-8", errors="replace") for p in (trace, standard[2]))
    shown = re.sub(r".*\r|.*\d%\|.*|\x1b\[A", "", err)  # by a terminal, without bars
    lines = [line for line in shown.split("\n") if line.strip()]
    killed = status == signal.SIGKILL and (after or at < math.inf)
    died = "killed" if killed else "timeout" if text.startswith("Timeout") else "DIED"
    told = {
        "seconds": time.monotonic() - started,
        "stderr": " | ".join(lines)[-300:],
        "where": re.findall(rf'File "{ROOT}/(\w+\.py)", line (\d+)', text),
        "last": text[-200:],
        **json.loads(report.read_text(encoding="utf-8") or f'{{"outcome": "{died}"}}'),
    }
    if "outcome" not in told:
        code, ours = told["code"], len(lines) == 1 and lines[0].startswith("error: ")
        notes = all(line.startswith(("note: ", "data: ")) for line in lines)  # beside --input's
        fine = {0: notes, 1: ours, 2: len(lines) == 2 and lines[0].startswith("error: ")}.get(code)
        told["outcome"] = GOOD[code] if fine else f"code {code}, {len(lines)} lines"
    return told


def content(run: Path) -> list[bytes]:
    """What must be equal: the stages' checkpoints, log and results.

    But for seconds, and for --overwrite, by which a run begins again that left no last.pt.
    """
    varies = rb'"seconds": [-+.\de]+|"overwrite": \w+'
    names = ["log.jsonl", "results.json", *(f"{stage}.pt" for stage in data.STAGES)]
    return [re.sub(varies, b"", (run / name).read_bytes()) for name in names]


def kills(home: Path, r: random.Random, left: int, note):
    """Runs until `left` kills are used up, at most 10 of each. note: writes down an outcome."""
    while left > 0:
        home.mkdir()
        argv = [*TOY, "--out", "run", "--seed", str(r.randrange(10**9))]
        whole, words = fork(home, train.main, argv), argv
        expected, allowed, history = content(home / "run"), min(left, 10), []
        shutil.rmtree(home / "run")
        while words:
            how = (
                r.choice(
                    [
                        {"after": r.uniform(0, whole["seconds"] / 2)},
                        {"at": r.randint(0, whole["operations"] // 2)},
                    ]
                )
                if allowed
                else {}
            )
            told = fork(home, train.main, words, **how)
            outcome, resuming, words = told["outcome"], words[0] == "--resume", []
            if resuming and outcome in ("killed", "code 0"):
                note("resumed")
            if outcome == "killed":
                allowed, left, again = allowed - 1, left - 1, (home / "run/last.pt").exists()
                words = ["--resume", "run"] if again else [*argv, "--overwrite"]
            elif outcome == "code 0":
                outcome = "equal bit for bit" if content(home / "run") == expected else "DIFFERENT"
            elif resuming and outcome == GOOD[1]:  # then a user starts again
                outcome, words = f"refused: {told['stderr'][:99]}", [*argv, "--overwrite"]
            history.append(f"{'resumed' if resuming else 'new'} {how}: {outcome}")
            note(outcome, argv=argv, history=history, told=told)
        shutil.rmtree(home)


# ----------------------------------------------------------------------------- broken input
JSON = [
    *r"""null true -1 0 1 3 2147483648 1099511627776 1e30 -0.5 1e-40 1e308 1e999 NaN "" "1" "x"
        "tüx" "\u0000" "\ud800" "text" "de-en" "zh-ja" [] [1] ["x"] {} {"a":1}""".split(),
    "1" + "0" * 400,
    "9" * 5000,
    "[" * 9999,
]
ODD = [
    *(
        f"-1 0 2000000000 {2**40} {2**70} 1e-40 1e400 nan -inf wmt wmt/config.json text . tüx☃ "
        f"a/b x-y zh-ja b\udcff {'x' * 300}"
    ).split(),
    "",
    " ",
]
USUAL = {
    int: "1 2 3 5".split(),
    float: "0.01 0.5 1 3".split(),
    bool: [],
    str: "text built-in new de-en en-de wmt - fr-en".split(),
}
TRAIN = {
    data.flag_name(f.name): list(f.metadata["choices"] or USUAL[f.type])
    for f in dataclasses.fields(data.Config)
    if f.name != "compile"
}
TRAIN["--size"] = ["nano", "tiny", "toy", "puzzle"]  # the others take too long
EVAL = dict.fromkeys(("--input", "--export", "--data"), USUAL[str]) | {
    "--split": list(data.SPLITS),
    "--stage": list(data.STAGES),
    "--show-warmup": [],
    "--beams": USUAL[int],
    "--threads": USUAL[int],
    "--device": ["cpu", "cuda"],
}


def flags(r: random.Random, table: dict) -> list[str]:
    """Some of a program's flags, a third of the values odd."""
    names = r.sample(list(table), min(len(table), r.choice([0, 1, 1, 2, 4])))
    return [
        f"{name}={r.choice(r.choice([ODD, table[name], table[name]]))}" if table[name] else name
        for name in names
    ]


def change(r: random.Random, path: Path) -> str:
    """Change one file. Returns how."""
    raw, count = path.read_bytes(), r.choice([1, 1, 2, 8, 200])
    at = int(r.random() * r.choice([min(4000, len(raw)), len(raw)]))  # weights are not first
    values = [match.span() for match in re.finditer(rb'(?<=": )("[^"]*"|[-\w.]+)', raw[: 10**5])]
    new = r.choice([r.randbytes(count), b"\n", b"\0", b"\xff", b'"', b"-", b"\xe2\x80\xa8", b" "])
    flipped = bytes(byte ^ 1 << r.randrange(8) for byte in raw[at : at + count])
    edits = {
        "flip": (at, at + count, flipped),
        "remove": (at, at + count, b""),
        "cut": (at, len(raw), b""),
        "insert": (at, at, new),
        "value": (*r.choice(values or [(at, at)]), r.choice(JSON).encode()),
        "empty": (0, len(raw), b""),
        "folder": (0, len(raw), b""),
    }
    how = "value" if path.suffix.startswith(".json") and r.random() < 0.6 else r.choice(list(edits))
    start, end, new = edits[how]
    path.write_bytes(raw[:start] + new + raw[end:])
    _ = how == "folder" and (path.unlink(), path.mkdir())
    return f"{path.parent.name}/{path.name}: {how}, bytes {start} to {end} become {new[:30]!r}"


def inputs(home: Path, numbers, seed: int, note):
    """Each input meets a fresh copy of two finished runs, a killed one, and their text."""
    pages, template = [b"", b"<html>", gzip.compress(b"a\tb\n"), b"\x1f\x8b"], home.with_name("t")
    (home / "text").mkdir(parents=True)
    for name in (f"{split}.{end}" for split in data.SPLITS for end in ("de", "en")):
        (home / "text" / name).write_text(
            "".join(f"{name} {i}, ä {i**3}.\n" for i in range(40)), encoding="utf-8"
        )
    fork(home, train.main, [*TOY, "--out", "toy"])
    told = fork(home, train.main, [*WMT, "--out", "wmt"])
    fork(home, train.main, [*WMT, "--out", "half"], at=told["operations"] // 2)
    home.rename(template)
    for number in numbers:
        r, edits, _ = random.Random(f"{seed} {number}"), [], shutil.copytree(template, home)
        run, page = home / r.choice(["toy", "half", "half", "wmt"]), r.choice(pages)
        new = ["--out", "new", *r.choice([TOY, WMT, ["--task", "xsum", *TINY]])]
        program, argv = r.choice(
            [(train, [*new, *flags(r, TRAIN)])] * 3
            + [(evaluation, [run.name, *flags(r, EVAL)])] * 2
            + [(data, [r.choice(list(data.CORPORA)), *flags(r, {"--pair": ODD, "--out": ["new"]})])]
        )
        if r.random() < 0.65:
            folder = r.choice([run, run, run, home / "text"])
            program, argv = r.choice(
                [(train, ["--resume", run.name])]
                + [(evaluation, [run.name])]
                + [(train, [*WMT, "--out", "new"])] * (folder != run)
            )
            for _ in range(r.choice([1, 1, 1, 2])):
                files = sorted(filter(Path.is_file, folder.iterdir()))
                edits.append(change(r, r.choice([*files, *files[:1] * 4])))  # config.json is first
        torch.hub.download_url_to_file = lambda url, path, **_: Path(path).write_bytes(page)
        told = fork(home, program.main, argv, limit=20, memory=8)
        note(told["outcome"], input=number, edits=edits, argv=[program.__name__, *argv], told=told)
        shutil.rmtree(home)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in dict(kills=100, inputs=1000, seed=0, first=0).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    work, started = Path(tempfile.mkdtemp(prefix="stress")), time.monotonic()
    parser.add_argument("--out", type=Path, default=work / "stress.log")
    args, counts = parser.parse_args(), collections.Counter()
    (work / "in").write_text("Ein Hund schläft.\nEine Katze, ☃.\n", encoding="utf-8")

    def note(outcome: str, **details) -> None:
        counts[outcome] += 1
        if outcome not in FINE or args.inputs == 1:
            with open(args.out, "a") as file:
                print(json.dumps({"outcome": outcome, "seed": args.seed} | details), file=file)

    print(f"works in {work}, writes what is bad to {args.out}", flush=True)
    kills(work / "kills", random.Random(args.seed), args.kills, note)
    inputs(work / "home", range(args.first, args.first + args.inputs), args.seed, note)
    lines = [f"{count:6} {outcome}" for outcome, count in sorted(counts.items())]
    print(*lines, f"{time.monotonic() - started:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
