"""Whatever goes wrong, the user reads one line that says so, and no good file is lost."""

import errno
import gzip
import io
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import model
import train
from conftest import standard_input
from data import Config, load, load_tokenizer, program as one_line_for_errors, shell_word

ROOT = Path(__file__).parents[1]
TINY = [
    "--size",
    "nano",
    "--built-in-size",
    "80",
    "--sft-steps",
    "2",
    "--policy-steps",
    "0",
    "--vocab-size",
    "700",
    "--eval-every",
    "1",
    "--beams",
    "1",
    "--threads",
    "1",
    "--max-source-tokens",
    "60",
    "--max-target-tokens",
    "26",
]


posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell or SIGKILL")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test works in an empty folder, and leaves the handlers of signals as it found them."""
    monkeypatch.chdir(tmp_path)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run. Shared: tests copy it before they break it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train.main([*TINY, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def half_run(tmp_path, monkeypatch, capsys):
    """A tiny run interrupted after its first update."""
    folder = tmp_path / "half"
    with monkeypatch.context() as patch:
        patch.setattr(train, "progress", lambda run, bar: setattr(run, "stop", 1.0))
        assert train.main([*TINY, "--out", str(folder)]) == 1
    assert state_of(folder)["step"] == 1
    capsys.readouterr()
    return folder


def state_of(folder: Path) -> dict:
    return model.load_checkpoint(folder / "last.pt", "state")["state"]


def call(program, *argv) -> int:
    try:
        return program.main([str(word) for word in argv])
    except SystemExit as leaving:  # argparse
        return leaving.code


def shown(text: str) -> list[str]:
    """The lines that a terminal shows: what follows a return writes over what was there."""
    return [line.rpartition("\r")[2] for line in text.rstrip("\n").split("\n")]


def complaint(capsys, program, *argv, bars: bool = False) -> str:
    """Run it; exit code 1 and one line on stderr, `error: ...`, given back.

    bars: progress bars may precede it.
    """
    capsys.readouterr()
    code, lines = call(program, *argv), shown(capsys.readouterr().err)
    assert code == 1, (code, lines)
    assert lines[-1].startswith("error: "), lines
    assert not any("Traceback" in text for text in lines), lines
    assert len(lines) == 1 or bars, lines
    return lines[-1]


def misuse(capsys, program, *argv) -> str:
    """Run it; exit code 2 and two lines, `error: ...` and a hint; the first is returned."""
    capsys.readouterr()
    code, lines = call(program, *argv), capsys.readouterr().err.rstrip("\n").split("\n")
    assert code == 2, (code, lines)
    assert len(lines) == 2 and lines[0].startswith("error: "), lines
    assert lines[1].startswith(("did you mean --", "--help lists all flags")), lines
    return lines[0]


def parallel(folder: Path, **files) -> Path:
    """A folder of three good splits, de-en, with some files replaced: train_de=b"..."."""
    folder.mkdir()
    for split in ("train", "valid", "test"):
        for lang, text in (("de", "ein Hund\neine Katze\n"), ("en", "a dog\na cat\n")):
            (folder / f"{split}.{lang}").write_bytes(files.pop(f"{split}_{lang}", text.encode()))
    assert not files
    return folder


# ----------------------------------------------------------------------------- usage: exit code 2


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--no-such-flag", "--no-such-flag"),
        ("--sft-step 5", "--sft-step"),
        ("--task poems", "poems"),
        ("--estimator magic", "magic"),
        ("--size huge", "huge"),
        ("--dtype float8", "float8"),
        ("--samples two", "two"),
        ("--lr fast", "fast"),
        ("--samples", "expected one argument"),
        ("--sft-steps 0", "--sft-steps"),
        ("--policy-steps -1", "--policy-steps"),
        ("--batch-tokens 3", "--batch-tokens"),
        ("--beams 0", "--beams"),
        ("--vocab-size 20", "--vocab-size"),
        ("--dropout 1", "--dropout"),
        ("--dropout nan", "--dropout"),
        ("--temperature 0", "--temperature"),
        ("--temperature nan", "--temperature"),
        ("--samples 1", "--samples"),
        ("--estimator marginal --samples 1", "--samples"),
        ("--warmup-len 0", "--warmup-len"),
        ("--seed -1", "--seed"),
        ("--lr nan", "--lr"),
        ("--lr inf", "--lr"),
        ("--clip -1", "--clip"),
        ("--seed 99999999999999999999", "--seed"),
        ("--resume run --samples 8", "--samples"),
        ("--resume run --seed 0", "--seed"),
        ("--seed 0 --resume run", "--seed"),
        ("--resume", "--resume"),
        ("--resume run --device tpu", "tpu"),
        ("--resume run --threads two", "two"),
    ],
)
def test_training_refuses_bad_usage(flags, named, capsys, monkeypatch):
    for function in ("prepare", "read_config"):
        monkeypatch.setattr(train, function, lambda *_: pytest.fail("accepted"))
    assert named in misuse(capsys, train, *flags.split())


@pytest.mark.parametrize(
    "flags, named",
    [
        ("", "run"),
        ("run --no-such-flag", "--no-such-flag"),
        ("run --split dev", "dev"),
        ("run --stage rl", "rl"),
        ("run --beams many", "many"),
        ("run --device tpu", "tpu"),
        ("run --input", "--input"),
        ("run --show-warmup", "--show-warmup"),
        ("run --pair de-en", "--pair"),
        ("run --input a --export b", "--export"),
        ("run --split test --input a", "--input"),
        ("run --export a --split valid", "--split"),
    ],
)
def test_scoring_refuses_bad_usage(flags, named, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "read_config", lambda *_: pytest.fail("accepted"))
    assert named in misuse(capsys, evaluation, *flags.split())


@pytest.mark.parametrize(
    "flags", ["--beams -1", "--beams 0", "--beams 100000", "--threads -1", f"--threads {2**40}"]
)
def test_scoring_holds_its_flags_to_the_ranges_of_training(flags, capsys, run):
    assert flags.split()[0] in misuse(capsys, evaluation, run, *flags.split())


def test_one_sample_is_enough_where_samples_are_not_compared():
    for flags in (
        "--estimator frozen --samples 1",
        "--policy-steps 0 --samples 1",
        "--estimator pause --samples 1",
        "--estimator best --samples 1",
    ):
        assert train.parse(flags.split())[0].samples == 1


# ----------------------------------------------------------------------------- data


def test_data_folder_is_missing(capsys):
    assert "nowhere" in complaint(capsys, train, *TINY, "--data", "nowhere")


def test_data_folder_is_a_file(capsys, tmp_path):
    (tmp_path / "text").write_text("a dog\n", encoding="utf-8")
    said = complaint(capsys, train, *TINY, "--data", "text")
    assert f"no folder {tmp_path / 'text'}" in said
    assert f"no folder {tmp_path / 'nofolder'}" in complaint(
        capsys, train, *TINY, "--data", "nofolder"
    )


def test_data_folder_without_files_says_which_are_expected(capsys, tmp_path):
    (tmp_path / "text").mkdir()
    said = complaint(capsys, train, *TINY, "--data", "text")
    assert "no train split" in said and "train.de" in said and ".gz" in said
    (tmp_path / "text/train.de").write_text("ein Hund\n", encoding="utf-8")
    assert "train.en" in complaint(capsys, train, *TINY, "--data", "text")


def test_no_validation_split(capsys, tmp_path):
    (parallel(tmp_path / "text") / "valid.de").unlink()
    said = complaint(capsys, train, *TINY, "--data", "text")
    assert "one side of the valid split only: no valid.de" in said
    (tmp_path / "text" / "valid.en").unlink()
    assert "no valid split" in complaint(capsys, train, *TINY, "--data", "text")


def test_line_counts_differ_names_both_counts(capsys, tmp_path):
    parallel(tmp_path / "text", train_en=b"a dog\na cat\na horse\n")
    said = complaint(capsys, train, *TINY, "--data", "text")
    assert "2 and 3 lines" in said and "train.de" in said and "train.en" in said


@pytest.mark.parametrize("split", ["valid", "test"])
def test_empty_line_in_a_scored_split_is_named(split, capsys, tmp_path):
    parallel(tmp_path / "text", **{f"{split}_en": b"a dog\n \n"})
    said = complaint(capsys, train, *TINY, "--data", "text")
    assert "line 2" in said and f"{split}.en" in said and "empty" in said


@pytest.mark.parametrize(
    "files",
    [dict(train_de=b"", train_en=b""), dict(train_de=b"\n\n"), dict(test_de=b"", test_en=b"")],
)
def test_a_split_without_text(files, capsys, tmp_path):
    parallel(tmp_path / "text", **files)
    said = complaint(capsys, train, *TINY, "--data", "text")
    assert list(files)[0].replace("_", ".") in said


def test_not_utf8(capsys, tmp_path):
    parallel(tmp_path / "text", train_de="für\nüber\n".encode("latin-1"))
    said = complaint(capsys, train, *TINY, "--data", "text")
    assert "train.de" in said and "utf-8" in said


def damage(how: str) -> bytes:
    content = gzip.compress(b" ".join(b"%d" % (n * n) for n in range(1000)) + b"\n")
    flipped = content[:900] + bytes(255 - byte for byte in content[900:920]) + content[920:]
    return {"no gzip": b"ein Hund\n", "truncated": content[:-200], "flipped": flipped}[how]


@pytest.mark.parametrize("how", ["no gzip", "truncated", "flipped"])
def test_broken_gz(how, capsys, tmp_path):
    (parallel(tmp_path / "text") / "train.de").unlink()
    (tmp_path / "text/train.de.gz").write_bytes(damage(how))
    said = complaint(capsys, train, *TINY, "--data", "text")
    assert "cannot read" in said and "text/train.de.gz" in said


def test_built_in_data_has_two_languages_only(capsys):
    said = complaint(capsys, train, *TINY, "--pair", "fr-en")
    assert "fr-en" in said and "--data" in said


@pytest.mark.parametrize(
    "pair", ["german", "de-", "-en", "de_en", "de-en-fr", "d3-en", "de-de", "de-en,en-de"]
)
def test_pair_is_not_two_codes(pair, capsys):
    assert "--pair takes two language codes" in misuse(capsys, train, *TINY, f"--pair={pair}")


def test_without_a_policy_stage_exact_is_not_refused():
    flags = [*TINY, "--estimator", "exact"]
    assert "--policy-steps" in flags and train.main([*flags, "--out", "run"]) == 0


def test_a_task_without_translation_does_not_read_the_pair():
    config = Config(task="toy", pair="foo", built_in_size=9)
    assert not config.problem() and len(load(config)[0]["train"]) == 9


def test_task_without_built_in_data_and_without_data_says_where_to_put_it(capsys):
    said = complaint(capsys, train, *TINY, "--task", "multi30k")
    assert "data/multi30k" in said and "--data" in said


def test_every_training_pair_too_long(capsys, tmp_path):
    parallel(
        tmp_path / "text",
        train_de=b"Hund " * 50 + b"\nKatze\n",
        train_en=b"dog\n" + b"cat " * 50 + b"\n",
    )
    flags = ["--data", "text", "--max-source-tokens", "9", "--max-target-tokens", "9"]
    said = complaint(capsys, train, *TINY, *flags)
    assert "raise --max-source-tokens or --max-target-tokens" in said


# ----------------------------------------------------------------------------- run folders


def test_folder_already_holds_a_run(capsys, run, monkeypatch):
    """Said at once, before data is made and a tokenizer trained."""
    monkeypatch.setattr(train, "load", lambda config: pytest.fail("too late"))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    said = complaint(capsys, train, *TINY, "--out", run)
    assert "--resume" in said and "--overwrite" in said and "--out" in said
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_overwriting_takes_our_files_and_waits_until_all_else_is_well(capsys, run, monkeypatch):
    (run / "notes.v2.txt").write_text("mine", encoding="utf-8")
    (run / "test.sft.txt").write_text("ours", encoding="utf-8")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags in (["--device", "cuda"], ["--max-target-tokens", "2"]):
        complaint(capsys, train, *TINY, "--out", run, "--overwrite", *flags)
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
        complaint(capsys, train, *TINY, "--out", "new", *flags)
        assert not Path("new").exists()  # so that the command, mended, is not refused
    monkeypatch.setattr(train, "train", lambda run: None)
    monkeypatch.setattr(train, "report", lambda *_: None)
    assert train.main([*TINY, "--out", str(run), "--overwrite"]) == 0
    left = {path.name for path in run.iterdir()}
    assert left == {"config.json", "tokenizer.json", "log.jsonl", "last.pt", "notes.v2.txt", "lock"}


def test_overwriting_takes_every_file_of_a_run(tmp_path):
    """Of all stages and all splits: an old control.pt must not be scored beside a new sft.pt."""
    names = ["config.json", "tokenizer.json", "log.jsonl", "results.json", "last.pt"]
    names += [f"{stage}.pt" for stage in ("sft", "policy", "control")]
    for split in ("train", "valid", "test"):
        names.append(f"{split}.ref.txt")
        names += [f"{split}.{stage}.txt" for stage in ("sft", "policy", "control")]
        names.append(f"{split}.policy.warmups.txt")
    for name in names:
        (tmp_path / name).write_text("old", encoding="utf-8")
        assert train.earlier_files(tmp_path) == [tmp_path / name]
        (tmp_path / name).unlink()


def test_folder_holds_another_programs_files(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    for flags in ([], ["--overwrite"]):
        said = complaint(capsys, train, *TINY, "--out", tmp_path, *flags)
        assert "config.json is not a run's, and would be lost: choose another --out" in said
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == "{}"


def test_scoring_an_unfinished_run_says_so(capsys, run):
    (run / "results.json").unlink()
    assert call(evaluation, run) == 0
    said = capsys.readouterr().out
    assert "this run is not finished" in said and f"train.py --resume {run}" in said


def test_run_folder_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "file/run" in complaint(capsys, train, *TINY, "--out", "file/run")


@pytest.mark.parametrize(
    "program, flags", [(train, ["--resume", "nowhere"]), (evaluation, ["nowhere"])]
)
def test_run_folder_is_missing(program, flags, capsys, tmp_path):
    assert "nowhere" in complaint(capsys, program, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["{not json", "[1, 2]", "7", "", "{}", '{"colour": "red"}', '{"pair": 5}', b"\xff{}"]
)
def test_config_is_not_what_training_wrote(text, capsys, run):
    (run / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "config.json" in complaint(capsys, train, "--resume", run)
    assert "config.json" in complaint(capsys, evaluation, run)


@pytest.mark.parametrize(
    "change",
    [
        dict(beams="four"),
        dict(task="poems"),
        dict(seed=None),
        dict(device="tpu"),
        dict(pair="de"),
        dict(beams=-3),
        dict(symbols=0),
        dict(hops=2.5),
        dict(pair=["de", "en"]),
        dict(samples=1, policy_steps=9),
    ],
)
def test_one_wrong_setting_in_the_config(change, capsys, run):
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps(settings | change), encoding="utf-8")
    name, *_ = change
    for program, argv in ((train, ["--resume", run]), (evaluation, [run])):
        said = complaint(capsys, program, *argv)
        assert "config.json" in said and name in said


@pytest.mark.parametrize(
    "change",
    [
        dict(lr=-1.0),
        dict(control="no"),
        dict(estimator="magic"),
        dict(clip=float("nan")),
        dict(overwrite=3),
        dict(accumulate=True),
    ],
)
def test_resuming_holds_the_config_to_the_rules_of_the_flags(change, capsys, run):
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps(settings | change), encoding="utf-8")
    said = complaint(capsys, train, "--resume", run)
    assert "config.json" in said and list(change)[0] in said


def test_tokenizer_is_damaged(capsys, run):
    (run / "tokenizer.json").write_text("{", encoding="utf-8")
    assert "tokenizer.json" in complaint(capsys, train, "--resume", run)
    assert "tokenizer.json" in complaint(capsys, evaluation, run)


def test_nothing_trained_yet(capsys, run):
    (run / "sft.pt").unlink()
    said = complaint(capsys, evaluation, run)
    assert said.endswith(f"was not validated yet: python train.py --resume {run}")


def test_that_stage_is_not_trained(capsys, run):
    assert "policy.pt" in complaint(capsys, evaluation, run, "--stage", "policy")


def test_data_has_moved_since_training(capsys, run):
    settings = json.loads((run / "config.json").read_text(encoding="utf-8")) | {"data": "gone"}
    (run / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert "gone" in complaint(capsys, evaluation, run)
    assert "gone" in complaint(capsys, train, "--resume", run)


def test_this_machine_has_no_gpu(capsys, run):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert "no cuda" in complaint(capsys, train, *TINY, "--device", "cuda", "--out", "new")
    assert "no cuda" in complaint(capsys, evaluation, run, "--device", "cuda")


# ----------------------------------------------------------------------------- checkpoints


class Bomb:
    """Unpickling one leaves a file behind."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


FOREIGN = {
    "truncated": truncated,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a checkpoint\n", encoding="utf-8"),
    "another program's": lambda path: torch.save({"model": {"weight": torch.ones(2)}}, path),
    "a tensor": lambda path: torch.save(torch.ones(2), path),
    "torch bomb": lambda path: torch.save(Bomb(), path),
    "pickle bomb": lambda path: path.write_bytes(pickle.dumps(Bomb(), protocol=2)),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["last.pt", "sft.pt"])
def test_damaged_or_foreign_checkpoint(name, kind, capsys, run, tmp_path):
    FOREIGN[kind](run / name)
    argv = (train, "--resume", run) if name == "last.pt" else (evaluation, run)
    said = complaint(capsys, *argv)
    assert f"cannot read the checkpoint {run / name} (" in said
    assert not (tmp_path / "exploded").exists(), "loading ran code from the file"


def test_the_bombs_are_live(tmp_path):
    """Otherwise the test above would prove nothing."""
    FOREIGN["torch bomb"](tmp_path / "bomb.pt")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "exploded").exists()


def test_a_stage_is_not_a_state(capsys, run):
    shutil.copy(run / "sft.pt", run / "last.pt")
    said = complaint(capsys, train, "--resume", run)
    assert f"cannot read the checkpoint {run / 'last.pt'} (" in said and "no state of this" in said


def test_tokenizer_of_another_run(capsys, run, half_run):
    for folder in (run, half_run):
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        tokenizer.add_special_tokens(["<2fr>"])
        tokenizer.save(str(folder / "tokenizer.json"))
    said = complaint(capsys, train, "--resume", half_run)
    assert "last.pt does not fit the tokenizer.json" in said
    for how in ([], ["--input", run / "config.json"], ["--export", run / "out"]):
        said = complaint(capsys, evaluation, run, *how, bars=True)
        assert "sft.pt does not fit the tokenizer.json" in said


@pytest.mark.parametrize(
    "old, new", [('"<sep>"', '"<sap>"'), ('"</s>"', '"<s>"'), ('"<sep>":3', '"<sep>":2147483648')]
)
def test_a_tokenizer_with_one_wrong_word_or_number(old, new, capsys, run):
    path = run / "tokenizer.json"
    compact = json.dumps(
        json.loads(path.read_text(encoding="utf-8")), separators=(",", ":"), ensure_ascii=False
    )
    assert old in compact
    path.write_text(compact.replace(old, new), encoding="utf-8")
    assert "tokenizer.json" in complaint(capsys, evaluation, run, bars=True)


def test_one_flipped_bit_in_a_checkpoint(capsys, run):
    """torch.load would take it: the checksums of the archive are looked at."""
    content = bytearray((run / "sft.pt").read_bytes())
    tensor = model.load_checkpoint(run / "sft.pt")["model"]["embedding.weight"]
    at = content.index(tensor.numpy().tobytes())  # not in the padding between two records
    content[at + tensor.numel()] ^= 1
    (run / "sft.pt").write_bytes(content)
    torch.load(run / "sft.pt", weights_only=True)
    said = complaint(capsys, evaluation, run, bars=True)
    assert f"cannot read the checkpoint {run / 'sft.pt'} (" in said and "is damaged" in said


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "log.jsonl", "sft.pt", "last.pt"]
)
def test_a_folder_where_a_file_is_expected(name, capsys, run):
    (run / name).unlink()
    (run / name).mkdir()
    if name != "last.pt":
        assert name in complaint(capsys, evaluation, run, bars=True)
    assert name in complaint(capsys, train, "--resume", run, bars=True)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "log.jsonl"])
def test_brackets_without_end(name, capsys, run):
    (run / name).write_text("[" * 200_000, encoding="utf-8")
    assert name in complaint(capsys, evaluation, run, bars=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_lacks_characters(encoding, capsys, run, monkeypatch):
    """It shows a question mark. What goes to files is whole."""
    (run / "results.json").unlink()
    terminal = io.TextIOWrapper(io.BytesIO(), encoding)
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", terminal)
    example = evaluation.Example("źródło", "", "猫")
    runner = train.Run(
        **vars(evaluation.open_run(run)),
        checksum=1,
        data={},
        examples={"train": [], "test": [example]},
    )

    @one_line_for_errors
    def main(argv):
        train.report(runner)

    assert main([]) == 0 and (run / "results.json").exists()
    terminal.flush()
    assert b"?" in terminal.buffer.getvalue()


def test_results_are_saved_before_they_are_shown(run, monkeypatch):
    """A terminal may fail, or its reader leave."""

    def gone(*arguments):
        raise BrokenPipeError

    (run / "results.json").unlink()
    runner = train.Run(
        **vars(evaluation.open_run(run)),
        checksum=1,
        data={},
        examples={"train": [], "test": [evaluation.Example("ein", "", "a")]},
    )
    monkeypatch.setattr("builtins.print", gone)
    with pytest.raises(BrokenPipeError):
        train.report(runner)
    assert (run / "results.json").exists()


@posix
def test_a_reader_that_leaves_and_a_closed_input(finished, tmp_path):
    """`| true`, which reads nothing; `<&-`. Neither ends in a traceback."""
    (tmp_path / "text").write_text("ein Hund\n" * 3, encoding="utf-8")
    shell = f"{shlex.join(map(str, (sys.executable, ROOT / 'eval.py', finished)))} --input "
    for end in ("text | true", "- <&-"):
        done = subprocess.run(shell + end, shell=True, capture_output=True, text=True)
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert done.returncode == 1 and "cannot read standard input" in done.stderr


def test_a_run_that_was_killed_before_its_first_checkpoint(capsys, run):
    (run / "config.json").unlink()
    assert f"no run in {run}" in complaint(capsys, train, "--resume", run)
    assert "no run in ." in complaint(capsys, train, "--resume", "")  # and no run is begun
    said = complaint(capsys, train, *TINY, "--out", run)
    assert "--overwrite" in said
    (run / "config.json").write_text('{"task": "wmt"}', encoding="utf-8")
    (run / "last.pt").unlink()
    said = complaint(capsys, train, *TINY, "--out", run)
    assert "--overwrite" in said


def test_a_gradient_that_is_no_number_is_reported_as_such(capsys, half_run):
    """Also where warmups are drawn from a model that has become nan."""
    saved = model.load_checkpoint(half_run / "last.pt", "state")
    saved["model"]["decoder.norm.weight"] *= torch.nan
    torch.save(saved, half_run / "last.pt")
    said = complaint(capsys, train, "--resume", half_run, bars=True)
    assert "the gradient became nan: start again, lower --lr" in said


def test_resuming_where_a_stage_file_is_damaged(capsys):
    """The policy stage begins at sft.pt: a damaged one is refused in one line."""
    flags = [*TINY, "--policy-steps", "1", "--no-control", "--out", "whole"]
    assert call(train, *flags) == 0
    truncated(Path("whole/sft.pt"))
    said = complaint(capsys, train, "--resume", "whole", bars=True)
    assert f"cannot read the checkpoint {Path('whole/sft.pt')} (" in said


def test_a_stage_that_the_config_now_leaves_out(capsys):
    assert call(train, *TINY, "--policy-steps", "1", "--out", "whole") == 0
    settings, log = (
        json.loads(Path("whole/config.json").read_text(encoding="utf-8")),
        Path("whole/log.jsonl"),
    )
    before = log.read_bytes()
    for change in (dict(policy_steps=0), dict(control=False)):
        Path("whole/config.json").write_text(json.dumps(settings | change), encoding="utf-8")
        assert "may not change on resuming" in complaint(capsys, train, "--resume", "whole")
        assert log.read_bytes() == before


# ----------------------------------------------------------------------------- text to translate


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "cannot read text"),
        (b"\xff\xfe\n", "must be text in UTF-8"),
        (b"a\rb\r", "end in CR"),
    ],
)
def test_text_that_cannot_be_read(content, says, capsys, finished, tmp_path):
    """From a file and from standard input, which Python itself reads without complaint at times."""
    if content is not None:
        (tmp_path / "text").write_bytes(content)
        with standard_input(content):
            said = complaint(capsys, evaluation, finished, "--input", "-")
        assert says in said and "standard input" in said
    assert says in complaint(capsys, evaluation, finished, "--input", "text")


@pytest.mark.parametrize(
    "content, lines",
    [
        (b"", 0),
        (b"\n", 1),
        (b"ein Hund\n\nein Pferd\n", 3),
        (b"ein Hund\n   \n", 2),
        (b"\n\nHund", 3),
    ],
)
def test_an_empty_line_in_is_an_empty_line_out(content, lines, capsys, finished):
    capsys.readouterr()
    with standard_input(content):
        assert call(evaluation, finished, "--input", "-") == 0
    out = capsys.readouterr().out.split("\n")
    assert out.pop() == "" and len(out) == lines
    for given, line in zip(content.decode().split("\n"), out):
        assert line == "" or given.strip()


def test_a_long_line_is_cut_and_counted_beside_the_outputs(capsys, finished, tmp_path):
    (tmp_path / "text").write_text("ein Hund\n" + "Hund " * 200 + "\n", encoding="utf-8")
    capsys.readouterr()
    assert call(evaluation, finished, "--input", "text") == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 2 and "data: " not in out
    assert "1 of 2 new examples have a source over --max-source-tokens 60: their" in err


def test_one_line_out_per_line_in(capsys, finished, tmp_path):
    (tmp_path / "text").write_bytes("ein Hund\r\neine\u2028Katze\r\n\u732b \U0001f600\n".encode())
    capsys.readouterr()
    assert call(evaluation, finished, "--input", "text") == 0
    assert capsys.readouterr().out.count("\n") == 3


# ----------------------------------------------------------------------------- disks, kills, Ctrl-C


needs_full_device = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full"
)


def whole_disk(content, path):
    """What torch.save does on a full disk: half a file, then an error."""
    Path(path).write_bytes(b"half a checkpoint")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torn_archive(content, path):
    Path(path).write_bytes(b"half a checkpoint")
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


@pytest.mark.parametrize("save", [whole_disk, torn_archive])
def test_full_disk_keeps_the_old_checkpoint(save, capsys, half_run, monkeypatch):
    before = (half_run / "last.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        said = complaint(capsys, train, "--resume", half_run, bars=True)
    assert f"cannot write {half_run / 'last.pt'}" in said and "--resume" in said
    assert (half_run / "last.pt").read_bytes() == before and not list(half_run.glob("*.tmp"))
    assert train.main(["--resume", str(half_run)]) == 0


@needs_full_device
def test_a_device_that_is_really_full(capsys, half_run):
    before = (half_run / "last.pt").read_bytes()
    os.symlink("/dev/full", half_run / "last.pt.tmp")
    said = complaint(capsys, train, "--resume", half_run, bars=True)
    assert f"cannot write {half_run / 'last.pt'}" in said and "--resume" in said
    assert (half_run / "last.pt").read_bytes() == before


@needs_full_device
def test_full_disk_while_writing_the_log(capsys, half_run, monkeypatch):
    real = open

    def full(path, *mode, **how):
        appends = str(path).endswith("log.jsonl") and mode == ("a",)
        return real("/dev/full" if appends else path, *mode, **how)

    monkeypatch.setattr("builtins.open", full)
    said = complaint(capsys, train, "--resume", half_run, bars=True)
    assert "log.jsonl" in said and "No space left" in said


@needs_full_device
def test_full_disk_while_writing_translations(capsys, run):
    os.symlink("/dev/full", run / "test.sft.txt")
    assert "No space left" in complaint(capsys, evaluation, run, bars=True)


def log_steps(folder: Path) -> list[int]:
    """Training updates in the log. A line still being written is left out."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"]


def subprocess_env() -> dict:
    """One thread. The scripts are found, and what an earlier PYTHONPATH finds, too."""
    path = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}


KILLED = """
import os, signal, sys, torch, train
real, saves = torch.save, []
def save(content, path):
    real(content, path)
    saves.append(path)
    if len(saves) == 4:  # the states of steps 0 and 1, best weights of step 1, state of step 2
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
train.main(sys.argv[1:])
"""


@posix
def test_killed_in_the_middle_of_a_save(capsys, tmp_path):
    command = [sys.executable, "-c", KILLED, *TINY, "--out", "run"]
    killed = subprocess.run(command, env=subprocess_env(), capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = tmp_path / "run"
    assert [path.name for path in run.glob("*.tmp")] == ["last.pt.tmp"]
    assert state_of(run)["step"] == 1
    weights = [model.load_checkpoint(run / f"{name}.pt")["model"] for name in ("last", "sft")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])  # of step 1
    assert train.main(["--resume", "run"]) == 0
    assert state_of(run)["step"] == state_of(run)["total"] == 2 and (run / "results.json").exists()
    assert not list(run.glob("*.tmp"))
    assert log_steps(run) == [1, 2]  # what was logged after the last save was cut off


def test_stopped_before_the_first_update(monkeypatch, capsys, tmp_path):
    """By Ctrl-C, twice. There is a first checkpoint, and the log is empty."""

    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)
        time.sleep(1.1)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("not stopped")

    with monkeypatch.context() as patch:
        patch.setattr(train, "sft_loss", interrupt)
        assert train.main([*TINY, "--out", "run"]) == 1
    assert "--resume run" in capsys.readouterr().err and log_steps(tmp_path / "run") == []
    assert train.main(["--resume", "run"]) == 0
    assert log_steps(tmp_path / "run") == [1, 2]


INTERRUPTED = """
import signal, sys, train
log = train.log
def interrupting(run, kind, numbers):
    log(run, kind, numbers)
    if run.state.step == 3:  # at an update, not at a time: no machine is too fast or too slow
        signal.raise_signal(signal.SIGINT)
train.log = interrupting
sys.exit(train.main(sys.argv[1:]))
"""


def test_ctrl_c_saves_and_resume_finishes(capsys, tmp_path):
    run = tmp_path / "my run"  # a name with a space: the command that is printed must work
    flags = [*TINY, "--sft-steps", "6", "--eval-every", "6", "--batch-tokens", "200"]
    command = [sys.executable, "-c", INTERRUPTED, *flags, "--out", "my run"]
    done = subprocess.run(command, env=subprocess_env(), capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    *_, last = shown(done.stderr)
    assert last == "stopped; go on with: python train.py --resume 'my run'"
    assert state_of(run)["step"] == 3 and log_steps(run) == [1, 2, 3]
    assert train.main(shlex.split(last)[6:]) == 0
    assert log_steps(run) == [1, 2, 3, 4, 5, 6] and (run / "results.json").exists()
    *_, last = capsys.readouterr().out.splitlines()
    again = last.split("Score again: ")[1]
    assert again == "python eval.py 'my run'"
    assert evaluation.main(shlex.split(again)[2:]) == 0


def test_ctrl_c_while_the_test_split_is_scored_leaves_at_once(capsys, monkeypatch):
    """All is saved by then: nothing is waited for."""

    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(train, "score_run", interrupt)
    assert train.main([*TINY, "--out", "run"]) == 1
    assert "stopped; go on with: python train.py --resume run" in capsys.readouterr().err


def test_windows_shells_know_no_single_quotes(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    words = [shell_word(name) for name in ("my run", "R&D", r"runs\a-1.b")]
    assert words == ['"my run"', '"R&D"', r"runs\a-1.b"]


def test_a_language_that_sacrebleu_cannot_split_fails_before_training(tmp_path, capsys):
    for split in ("train", "valid"):
        for lang in ("en", "ja"):
            (tmp_path / f"{split}.{lang}").write_text("猫は庭で眠る\n" * 8, encoding="utf-8")
    try:
        import MeCab  # noqa: F401

        pytest.skip("sacrebleu's Japanese tokenizer is installed here")
    except ImportError:
        pass
    code = train.main(["--pair", "en-ja", "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err.strip()
    assert code == 1 and error.startswith("error: cannot score en-ja: ") and "\n" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "damage", [lambda log: log.unlink(), lambda log: os.truncate(log, log.stat().st_size - 1)]
)
def test_a_log_that_was_shortened_is_not_filled_with_nothing(damage, capsys, half_run):
    damage(half_run / "log.jsonl")
    before = (half_run / "last.pt").read_bytes()
    assert "log.jsonl is incomplete" in complaint(capsys, train, "--resume", half_run)
    assert (half_run / "last.pt").read_bytes() == before


def test_a_half_written_line_of_the_log_is_cut_off(half_run):
    with open(half_run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "tr')
    assert train.main(["--resume", str(half_run)]) == 0
    assert log_steps(half_run) == [1, 2]


def swap(lines: bytes) -> bytes:
    """Two neighbours change places: the same tokens in another order."""
    first, second, *rest = lines.splitlines(keepends=True)
    return b"".join([second, first, *rest])


def move_a_word(lines: bytes) -> bytes:
    """The first word of the second line ends the first: the same tokens in the same order."""
    first, second, *rest = lines.splitlines()
    word, _, second = second.partition(b" ")
    return b"\n".join([first + b" " + word, second, *rest, b""])


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A run, and a copy of its data on which it can be resumed. Shared: copy it."""
    folder = tmp_path_factory.mktemp("moved")
    text, run = parallel(folder / "text"), str(folder / "run")
    assert train.main([*TINY, "--data", str(text), "--out", run]) == 0
    other = shutil.copytree(text, folder / "other")
    assert train.main(["--resume", run, "--data", str(other)]) == 0
    return folder


@pytest.mark.parametrize("name", ["train.de", "train.en", "valid.de", "valid.en"])
@pytest.mark.parametrize("change", [swap, move_a_word])
def test_resuming_on_other_data_is_refused(name, change, moved, capsys, tmp_path):
    """Also where the change is in validation data alone, or only in where an example ends."""
    for part in ("run", "other"):
        shutil.copytree(moved / part, tmp_path / part)
    other = tmp_path / "other"
    before = (other / name).read_bytes()
    (other / name).write_bytes(change(before))
    assert (other / name).read_bytes() != before
    said = complaint(capsys, train, "--resume", "run", "--data", other)
    assert "is not what this run was trained on" in said


def test_the_checksum_looks_at_all_texts():
    """By hand: each side, the prompt, the order, where an example ends, and both splits."""

    def of(*examples, valid="y"):
        splits = {
            "train": [evaluation.Example(*example) for example in examples],
            "valid": [evaluation.Example("x", "<2de>", valid)],
            "test": [],
        }
        return train.checksum(splits)

    one, two = ("a b", "<2de>", "c"), ("d", "<2de>", "e f")
    sums = [
        of(one, two),
        of(two, one),
        of(one),
        of(("a", "<2de>", "c"), two),
        of(one, two, valid="z"),
        of(("a b", "<2en>", "c"), two),
        of(("a b", "<2de>", "c d"), ("", "<2de>", "e f")),
        of(("a b <2de>", "", "c"), two),
        of(("a", "b <2de>", "c"), two),
    ]
    assert len(set(sums)) == len(sums) and of(one, two) == sums[0]


def test_a_panic_of_the_tokenizers_library_is_one_line(capsys, run, monkeypatch):
    """Rust's panics are no Exception. Found by tests/stress.py, input 908."""

    class PanicException(BaseException):
        pass

    def panics(path):
        raise PanicException("range end index out of range")

    monkeypatch.setattr("data.Tokenizer", SimpleNamespace(from_file=panics))
    assert "tokenizer.json: range end index" in complaint(capsys, evaluation, run)


def test_a_run_of_another_version_is_refused_in_one_line(capsys, run):
    """Before byte-level tokenizers a run had --max-tokens, and checkpoints of format 3."""
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    old = settings | {"max_tokens": 128}
    del old["max_source_tokens"], old["max_target_tokens"]
    (run / "config.json").write_text(json.dumps(old), encoding="utf-8")
    for program, *flags in ((evaluation, run), (train, "--resume", run)):
        said = complaint(capsys, program, *flags)
        assert f"{run / 'config.json'} is of another version of the program" in said
    (run / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name in ("last.pt", "sft.pt"):
        saved = torch.load(run / name, weights_only=True)
        torch.save(saved | {"format": "warmup checkpoint 3"}, run / name)
    for program, *flags in ((evaluation, run), (train, "--resume", run)):
        said = complaint(capsys, program, *flags, bars=True)
        assert "cannot read the checkpoint" in said and "of this version of the program" in said


def test_refused_data_leaves_the_run_as_it_was(capsys, half_run, tmp_path):
    with open(half_run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write("a line after the checkpoint\n")
    before = {path.name: path.read_bytes() for path in half_run.iterdir()}
    text = parallel(tmp_path / "text")
    assert "not what" in complaint(capsys, train, "--resume", half_run, "--data", text)
    assert {path.name: path.read_bytes() for path in half_run.iterdir()} == before
