"""README and docs: every command runs as printed (with tiny settings), every name and number is the code's."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import data
import eval as evaluation
import model
import train
import warmup
from conftest import TINY, standard_input

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))
}
PAGES = {"README.md": README} | PAGES
SCRIPTS = ("warmup", "model", "data", "train", "eval")
PROGRAMS = {"train.py": train, "eval.py": evaluation, "data.py": data}


def commands(page: str) -> list[str]:
    """The lines of fenced blocks that are commands, in order. $BASE is put in."""
    lines, base, fence = [], "", None
    for line in PAGES[page].splitlines():
        if line.startswith("```"):
            fence = line if fence is None else None
        elif fence == "```" and line.startswith("BASE="):
            base = shlex.split(line)[0].removeprefix("BASE=")
        elif fence == "```" and re.match(r"(python|pip|echo|torchrun) ", line):
            lines.append(line.replace("$BASE", base))
    return lines


def test_the_commands_are_found():
    found = {page: len(commands(page)) for page in PAGES}
    assert found["README.md"] >= 7 and found["guide.md"] >= 5 and found["results.md"] >= 14, found
    assert found["exercises.md"] >= 7, found


def run(command: str, monkeypatch) -> None:
    """One command with tiny settings, which come last and so win. What needs more is parsed alone."""
    text = b""
    if " | " in command:
        echo, command = command.split(" | ")
        text = shlex.split(echo)[1].encode() + b"\n"
    words = shlex.split(command)
    if words[0] == "pip" or words[1:2] == ["-m"] or words[0] == ".":
        return  # .ci/run does the like
    if words[0] == "torchrun":
        return train.parse(words[4:])
    if words[1].startswith("tests/"):
        assert (ROOT / words[1]).exists(), command
        return
    program, arguments = PROGRAMS[words[1]], words[2:]
    if "--help" in arguments:
        with pytest.raises(SystemExit) as stop:
            program.main(arguments)
        assert stop.value.code == 0
    elif "--plot" in arguments and not find_spec("matplotlib"):
        evaluation.parse(arguments)
    elif "--export" in arguments:
        with monkeypatch.context() as patch:  # a model that was not trained here
            patch.setattr(evaluation, "read_config", lambda folder: data.Config())
            evaluation.parse(arguments)
    elif "--init" in arguments or "multi30k" in arguments and program is train:
        train.parse(arguments)  # weights and data that are not here
    elif program is train and "--resume" not in arguments:
        assert train.main([*arguments, *TINY, "--built-in-size", "40"]) == 0, command
    else:
        with standard_input(text):
            assert program.main(arguments) == 0, command


@pytest.mark.parametrize("page", PAGES)
def test_all_commands_run_in_the_order_printed(page, tmp_path, monkeypatch, capsys):
    """In a fresh folder, as a reader would have, but for the download."""
    downloads = []
    monkeypatch.setattr(data, "download", lambda *arguments: downloads.append(arguments))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mytext").mkdir()
    for split in ("train", "valid", "test"):
        for lang, word in (("de", "Haus"), ("en", "house")):
            lines = "".join(f"{word} number {i}.\n" for i in range(40))
            (tmp_path / "mytext" / f"{split}.{lang}").write_text(lines, encoding="utf-8")
    for command in commands(page):
        for part in command.split(" && "):
            run(part, monkeypatch)
    if page == "results.md":
        assert {task for task, *_ in downloads} == set(data.CORPORA)


def test_commands_in_running_text_are_accepted():
    """`python train.py …` between backticks: the flags exist."""
    found = [
        text for page in PAGES.values() for text in re.findall(r"`(python train\.py [^`…]+)`", page)
    ]
    assert len(found) >= 4
    for text in found:
        words = shlex.split(text.replace(" S ", " 0 ").replace("TASK", "wmt"))[2:]
        if not {"majority", "mine", "--help"} & set(words):  # the guide's own task
            train.parse(words)


# each script as a program of its own, but torch is imported once
IN_TURN = """
import json, runpy, sys
sys.path[0] = "."
for sys.argv in json.loads(sys.argv[1]):
    print("===", *sys.argv)
    ours = [name for name in sys.modules if name in ("warmup", "model", "data", "train", "eval")]
    for name in ours:
        del sys.modules[name]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
"""


def test_adding_a_task_works_as_the_guide_says(tmp_path):
    """Its lines, at the end of data.py and eval.py, make two tasks, a metric and a reader that work."""
    blocks = re.findall(
        r"```python\n(.*?)```", PAGES["guide.md"].split("## Add a task")[1].split("\n## ")[0], re.S
    )
    majority, metric, reader = blocks
    assert len(majority.strip().splitlines()) <= 10
    added = {"data": f"{majority}\n\n{reader}", "eval": metric}
    main = 'if __name__ == "__main__":'
    for name in SCRIPTS:
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        if name in added:
            assert source.count(main) == 1
            source = source.replace(main, f"{added[name]}\n{main}")
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    for split, count in (("train", 40), ("valid", 8), ("test", 8)):
        lines = "".join(f"{'ab' * (n % 5)} b {n}\t{'b' if n % 2 else 'a'}\n" for n in range(count))
        (tmp_path / f"{split}.tsv").write_text(lines, encoding="utf-8")
    tiny = [
        "--threads",
        "1",
        "--sft-steps",
        "4",
        "--policy-steps",
        "2",
        "--eval-every",
        "2",
        "--built-in-size",
        "100",
    ]
    commands = (
        ["train.py", "--task", "majority", *tiny],
        ["train.py", "--task", "mine", "--data", ".", *tiny],
        ["eval.py", "runs/mine"],
    )
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(commands)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed = done.stdout.split("=== ")[1:]
    assert len(printed) == 3
    for text in printed:
        assert re.search(r"^warmup +\d", text, re.M), text
    assert re.search(r"^ +right +in warmup +NLL/token", printed[2], re.M)


def test_line_counts_are_those_of_the_files():
    for name in (*SCRIPTS, "docs/micro"):
        said = re.search(rf"\| `{name}.py` \| (\d+) \| (\d+) \|", README)
        lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()
        ruler = next(
            (i for i, line in enumerate(lines) if line.startswith("# ===== plumbing")), len(lines)
        )
        assert (int(said[1]), int(said[2])) == (len(lines), ruler), name


def test_every_function_that_is_named_exists():
    modules = {"model": model, "warmup": warmup, "train": train, "eval": evaluation, "data": data}
    files = {"py", "jsonl", "json", "model", "tsv"}
    text = "\n".join(PAGES.values())
    named = {
        found
        for found in re.findall(r"`(model|warmup|train|eval|data)\.([A-Za-z_.]+)", text)
        if found[1] not in files and found[1] not in ("de", "en")
    }
    assert len(named) > 30
    for module, path in named:
        thing = modules[module]
        for part in path.split("."):
            thing = getattr(thing, part, None)
            assert thing is not None, f"{module}.{path}"


def test_every_flag_that_is_named_exists(capsys):
    known = {"--extra-index-url", "--nproc_per_node", "--standalone"}  # pip's, torchrun's, SLURM's
    known |= {"--ntasks", "--gpus", "--cpus-per-task", "--time", "--signal", "--requeue"}
    known |= {"--open-mode", "--chrf-word-order", "--tokenize", "--paired-bs"}  # and sacreBLEU's
    for program in (train, evaluation, data):
        with pytest.raises(SystemExit):
            program.main(["--help"])
        known |= set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
    for script in ("bench.py", "compare.py", "make_golden.py", "exercises/toys.py", "conftest.py"):
        source = (ROOT / "tests" / script).read_text(encoding="utf-8")
        known |= set(re.findall(r"\"(--[a-z0-9-]+)\"", source))
    for name, page in PAGES.items():
        assert set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9_-]+)", page)) - known == set(), name


def test_the_scripts_beside_the_tests_start():
    """All are Python of the oldest version that we support. compare.py refuses what it sets itself."""
    for path in sorted((ROOT / "tests").glob("**/*.py")):
        compile(path.read_text(encoding="utf-8"), path, "exec")
    command = [sys.executable, str(ROOT / "tests" / "compare.py"), "--estimator=jensen"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "see --estimators" in done.stderr, done.stderr


def test_links_lead_somewhere():
    for name, page in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\(([^)]+)\)", page):
            if not link.startswith("http"):
                path, _, anchor = link.partition("#")
                assert (folder / path).exists(), f"{name}: {link}"
                target = PAGES.get(Path(path).name, "") if path else page
                headings = {
                    re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-")
                    for line in re.findall(r"^#+ (.*)$", target, re.M)
                }
                assert not anchor or anchor in headings, f"{name}: {link}"


def test_the_readme_is_three_pages():
    assert len(README.splitlines()) <= 150 and len(README.split()) <= 2000


def test_the_estimators_and_tasks_of_the_pages_are_those_of_the_code():
    rows = set(re.findall(r"^\| `(\w+)`", README, re.M)) | {"pause", "sft"}
    [estimator] = [f for f in dataclasses.fields(data.Config) if f.name == "estimator"]
    assert set(estimator.metadata["choices"]) <= rows
    assert set(
        re.findall(r"^\| `(\w+)` \|", PAGES["guide.md"].split("## Your own text")[0], re.M)
    ) == set(data.TASKS)


def test_no_placeholder_is_left():
    for name, page in PAGES.items():
        assert not re.search(r"@[A-Z]+@|TODO|FIXME", page), name
