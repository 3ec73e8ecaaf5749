"""Every command of the README runs as printed (with tiny settings), and its numbers about the code are true."""

import io
import re
import shlex
from pathlib import Path

import pytest

import data
import eval as evaluation
import train
from conftest import TINY

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```", README, re.S | re.M) for line in block.splitlines()
            if re.match(r"(python|pip|echo|git|torchrun|BASE=) ?", line)]


def test_the_commands_are_found():
    assert len(COMMANDS) >= 8 and sum("train.py" in c for c in COMMANDS) >= 4 and sum("eval.py" in c for c in COMMANDS) >= 3


def test_all_commands_run_in_the_order_printed(tmp_path, monkeypatch, capsys):
    """A fresh folder, as a reader would have. Pip is left to .ci/run; tiny settings come last, so they win.

    What needs the network, a GPU or real data is not run: its flags are parsed.
    """
    downloads, base = [], ""
    monkeypatch.setattr(data, "download", lambda *arguments: downloads.append(arguments))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mytext").mkdir()
    for split in ("train", "valid", "test"):
        for lang, word in (("de", "Haus"), ("en", "house")):
            (tmp_path / "mytext" / f"{split}.{lang}").write_text("".join(f"{word} number {i}.\n" for i in range(40)))
    for command in COMMANDS:
        if command.startswith("BASE="):
            base = shlex.split(command)[0].removeprefix("BASE=")
            continue
        command = command.replace("$BASE", base)
        for part in command.split(" && "):
            standard_input = ""
            if " | " in part:
                echo, part = part.split(" | ")
                standard_input = shlex.split(echo)[1] + "\n"
            words = shlex.split(part)
            if words[0] == "pip" or words[1:3] == ["-m", "pytest"] or words[1].startswith("tests/"):
                continue
            if words[0] == "torchrun":
                words = ["python", *words[3:], "--init", "parse only"]
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(standard_input.encode())))
            if words[1] == "train.py":
                if "--help" in words:
                    with pytest.raises(SystemExit) as stop:
                        train.main(words[2:])
                    assert stop.value.code == 0
                    continue
                if any(word in ("--init", "multi30k") for word in words):
                    train.parse(words[2:])  # real data: the flags exist
                    continue
                arguments = words[2:] if "--resume" in words else [*words[2:], *TINY]
                assert train.main(arguments) == 0, command
            elif "--export" in words:
                evaluation.parse(words[2:])  # of a model that was not trained here
            elif words[1] == "data.py":
                assert data.main(words[2:]) == 0, command
            elif words[1] == "eval.py":
                assert evaluation.main(words[2:]) == 0, command
            else:
                pytest.fail(f"the README has a command that this test does not know: {command}")
    assert {arguments[0] for arguments in downloads} == set(data.SOURCES)


def test_line_counts_are_those_of_the_files():
    for name in ("warmup", "model", "data", "train", "eval"):
        said = int(re.search(rf"\| `{name}.py` \| (\d+) \|", README)[1])
        have = len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines())
        assert abs(said - have) <= 10, f"{name}.py has {have} lines, the README says {said}"


def test_every_function_the_readme_names_exists():
    import model
    import warmup

    modules = {"model": model, "warmup": warmup, "train": train, "eval": evaluation, "data": data}
    named = set(re.findall(r"`(model|warmup|train|eval|data)\.([A-Za-z_.]+)`", README))
    assert len(named) > 10
    for module, path in {(m, p) for m, p in named if p not in ("py", "de", "en", "jsonl")}:
        thing = modules[module]
        for part in path.split("."):
            thing = getattr(thing, part, None) or getattr(thing, "__dataclass_fields__", {}).get(part)
            assert thing is not None, f"{module}.{path}"


def test_every_flag_the_readme_names_exists(capsys):
    flags = set(re.findall(r"`(--[a-z0-9-]+)", README))
    known = set()
    for program in (train, evaluation):
        with pytest.raises(SystemExit):
            program.main(["--help"])
        known |= set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
    assert flags - known - {"--index-url"} == set()
