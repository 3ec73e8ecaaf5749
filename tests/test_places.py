"""Where the program runs: notebooks, threads, one folder for two programs, signals, old GPUs."""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import model
import train
from conftest import TINY
from data import Example

ROOT = Path(__file__).parents[1]
RUN = [*TINY, "--built-in-size", "40"]


def rows_of(folder):
    """The table without its seconds."""
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


# ----------------------------------------------------------------------------- from Python


def test_any_stream_takes_what_is_printed(tmp_path, monkeypatch):
    """An io.StringIO has no `reconfigure`, as the streams of notebooks."""
    for program, argv, code in (
        (train, [*RUN, "--out", str(tmp_path / "run")], 0),
        (evaluation, [str(tmp_path / "run")], 0),
        (data, ["multi30k", "--out", str(tmp_path / "text")], 1),  # no network
    ):
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: 1 / 0)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert program.main(argv) == code
        assert out.getvalue() and (code == 0 or "error: cannot download" in err.getvalue())


def test_a_thread_trains_as_the_main_thread_does(tmp_path):
    """Gradio and Streamlit call from threads, where Python allows no signal handlers."""
    codes = []
    work = lambda: codes.append(train.main([*RUN, "--out", str(tmp_path / "a")]))  # noqa: E731
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert train.main([*RUN, "--out", str(tmp_path / "b")]) == 0 and codes == [0]
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")


@pytest.mark.parametrize("end", ["good", "UserError", "error", "Ctrl-C"])
def test_afterwards_signals_are_handled_as_before(end, tmp_path, monkeypatch):
    """Else the next Ctrl-C of a notebook would do nothing, and the model would stay in memory."""
    before, during, log = handlers(), [], train.log

    def watched(run, kind, numbers):
        log(run, kind, numbers)
        during.append(handlers())
        if end == "UserError":
            raise model.UserError("x")
        if end == "error":
            raise ZeroDivisionError
        if end == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "log", watched)
    with contextlib.suppress(ZeroDivisionError):
        assert train.main([*RUN, "--out", str(tmp_path / "run")]) == (end != "good")
    assert during[0][0] == during[0][1] != before[0]
    assert handlers() == before


def test_a_notebook_trains_scores_and_downloads(tmp_path):
    """In a real Jupyter kernel: main from Python, and %run."""
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat")
    flags = " ".join(RUN)
    cells = [
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train, data\nimport eval as scores",
        f"assert train.main({RUN} + ['--out', 'a']) == 0",
        f"%run '{ROOT / 'train.py'}' {flags} --out b",
        "assert scores.main(['a']) == 0",
        "try:\n    data.main(['nothing'])\nexcept SystemExit as stop:\n    assert stop.code == 2",
        "run = scores.open_run('a', 'policy')\nprint(scores.answers(run, ['Der Hund.'])[0].text)",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    client = nbclient.NotebookClient(
        book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    said = "".join(output.get("text", "") for cell in book.cells for output in cell.outputs)
    assert said.count("saved ") == 2 and "policy: 100%" in said  # the bar, too


def test_new_text_from_python(finished_run, capsys):
    """The guide's call: what --input prints, an Output a line."""
    run = evaluation.open_run(finished_run, "policy")
    lines = ["Der Hund schläft.", "", "Eine Katze sieht das Haus."]
    outputs = evaluation.answers(run, lines)
    assert [bool(output.text) for output in outputs] == [True, False, True]
    capsys.readouterr()
    evaluation.answer(run, "policy", lines, show_warmup=True)
    printed = capsys.readouterr().out.split("\n")
    assert printed == [*(f"{o.warmup}\t{o.text}" for o in outputs), ""]


# ----------------------------------------------------------------------------- one folder


def command(*flags):
    return [sys.executable, str(ROOT / "train.py"), *RUN, *flags]


def started(*flags, **environment):
    return subprocess.Popen(
        command(*flags),
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def test_of_two_programs_in_one_folder_one_goes_on(tmp_path, finished_run):
    """Started at one moment, as `srun -n 2 python train.py` does. And one beside a living run."""
    both = [started("--out", str(tmp_path / "run")) for _ in range(2)]
    said = [program.communicate()[1].splitlines()[-1] for program in both]
    assert sorted(program.returncode for program in both) == [0, 1]
    [loser] = [line for line, program in zip(said, both) if program.returncode]
    assert loser == f"error: another program works in {tmp_path / 'run'}: choose another --out"
    assert train.main([*RUN, "--out", str(tmp_path / "alone")]) == 0
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "alone")


def test_a_second_program_changes_nothing(tmp_path, monkeypatch, capsys):
    """It comes while the first one trains. With --overwrite, and with --resume."""
    folder, log, codes = tmp_path / "run", train.log, []

    def disturbed(run, kind, numbers):
        log(run, kind, numbers)
        if run.state.step == 2 and not codes:
            before = {path: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
            for flags in ([*RUN, "--overwrite", "--out", str(folder)], ["--resume", str(folder)]):
                codes.append(train.main(flags))
            after = {path: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
            assert after == before

    monkeypatch.setattr(train, "log", disturbed)
    assert train.main([*RUN, "--out", str(folder)]) == 0
    assert codes == [1, 1] and capsys.readouterr().err.count("another program works in") == 2
    assert train.main(["--resume", str(folder)]) == 0  # the lock is gone


def test_a_killed_program_leaves_no_lock(tmp_path):
    program = started("--policy-steps", "1000", "--out", str(tmp_path / "run"))
    while not (tmp_path / "run" / "last.pt").exists() and program.poll() is None:
        time.sleep(0.1)
    assert train.main(["--resume", str(tmp_path / "run")]) == 1
    program.kill()
    program.communicate()
    with train.alone_in(tmp_path / "run"):
        pass


def test_a_refused_command_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), train.alone_in(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run").exists()
        raise ZeroDivisionError
    assert not (tmp_path / "a" / "run").exists()


def test_several_processes_that_nobody_joins_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main([*RUN, "--out", str(tmp_path / "run")]) == 1
    assert "WORLD_SIZE is set, but torchrun did not start this" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_runs_is_not_overwritten(tmp_path, capsys):
    """--init own --out own: the checkpoint of a T5 would be lost."""
    (tmp_path / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    for flags in ([], ["--overwrite"]):
        assert train.main([*RUN, *flags, "--out", str(tmp_path)]) == 1
        assert "is not a run's, and would be lost" in capsys.readouterr().err
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == "{}"


# ----------------------------------------------------------------------------- signals


def test_only_a_second_ctrl_c_leaves_at_once(finished_run):
    """Not a second SIGTERM, nor what torchrun sends on within a second."""
    config = data.read_config(finished_run)
    fields = dict(examples={}, data={}, checksum=0)
    run = train.Run(config, None, torch.device("cpu"), None, **fields)
    try:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            run.interrupt(number, None)
            assert run.stop > 0
        run.stop -= 1
        run.interrupt(signal.SIGTERM, None)
    except KeyboardInterrupt:  # would end pytest
        pytest.fail("left at once")
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        run.interrupt(signal.SIGINT, None)


KILLED_IN_VALIDATION = """
import os, signal, sys, time, train
validate, times = train.validate, []
def slow(run, data):
    times.append(run.state.step)
    if run.state.stage == "policy" and run.state.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    return validate(run, data)
train.validate = slow
train.main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_during_a_validation_no_update_is_lost(tmp_path):
    """SIGTERM, then SIGKILL. On resuming it validates, and goes on as if nothing had been."""
    flags = [*RUN, "--policy-steps", "3", "--eval-every", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = [sys.executable, "-c", KILLED_IN_VALIDATION, *flags, "--out", str(tmp_path / "a")]
    assert subprocess.run(code, env=environment, capture_output=True).returncode == -signal.SIGKILL
    state = model.load_checkpoint(tmp_path / "a" / "last.pt", "state")["state"]
    assert (state["stage"], state["step"], state["validated"]) == ("policy", 2, 0)
    assert train.main(["--resume", str(tmp_path / "a")]) == 0
    assert train.main([*flags, "--out", str(tmp_path / "b")]) == 0
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    logs = []
    for name in "ab":
        lines = (tmp_path / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        logs.append([{**json.loads(line), "seconds": 0} for line in lines])
    assert logs[0] == logs[1]


TERMINATED = """
import os, signal, sys, train
log = train.log
def terminating(run, kind, numbers):
    log(run, kind, numbers)
    if (run.state.stage, run.state.step, kind) == ("sft", 3, "train") and train.rank() == 0:
        os.kill(os.getppid(), signal.SIGTERM)   # the agent, which sends it to its workers
        os.kill(os.getpid(), signal.SIGTERM)
train.log = terminating
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_sigterm_to_a_job_of_torchrun_saves(tmp_path):
    """To the agent and to a worker. The agent sends it again."""
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(TERMINATED), encoding="utf-8")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    job = subprocess.run(
        [sys.executable, *words, str(script), *RUN, "--sft-steps=60", "--eval-every=50"]
        + ["--out", str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "stopped; go on with" in job.stderr, job.stderr[-2000:]
    state = model.load_checkpoint(tmp_path / "run" / "last.pt", "state")["state"]
    lines = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert state["step"] == json.loads(lines[-1])["step"] >= 3


# ----------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "capability, kind, dtype, low",
    [
        ((7, 5), "cuda", "auto", False),  # T4
        ((7, 0), "cuda", "auto", False),  # V100
        ((8, 0), "cuda", "auto", True),
        ((9, 0), "cuda", "auto", True),
        ((7, 5), "cuda", "bfloat16", True),
        ((9, 0), "cuda", "float32", False),
        ((9, 0), "cpu", "auto", False),
    ],
)
def test_auto_takes_bfloat16_where_the_hardware_has_it(capability, kind, dtype, low, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert model.low_precision(dtype, torch.device(kind)) == low


def test_the_start_says_precision_and_epochs(tmp_path, capsys):
    flags = [*RUN, "--accumulate", "2", "--policy-steps", "0", "--dtype", "bfloat16"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"on cpu in bfloat16; (\d+) training pairs", out)
    config = data.read_config(tmp_path / "run")
    run = evaluation.open_run(tmp_path / "run")
    examples = train.load(config)[0]["train"]
    encoded = train.encode_split(run.tokenizer, examples, config, "train", scored=False)
    order = train.Batches(encoded, config.batch_tokens, config.seed).order
    assert f"\nsft: 4 updates, {4 * 2 / len(order):.2f} epochs\n" in out


def test_what_may_not_change_on_resuming_says_what_to_do(finished_run, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", str(finished_run), "--batch-tokens", "400"])
    assert stop.value.code == 2
    said = "error: --batch-tokens may not change on resuming: --sft RUN starts a new run from"
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("change", [dict(batch_tokens=3000), dict(sft_steps=90)])
def test_a_config_that_was_edited_by_hand_is_said(change, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main([*RUN, "--policy-steps", "0", "--out", str(folder)]) == 0
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | change), encoding="utf-8")
    capsys.readouterr()
    assert train.main(["--resume", str(folder)]) == 1
    [(name, value)] = change.items()
    said = f"config.json has {data.flag_name(name)} {value}, last.pt {settings[name]}"
    assert said in capsys.readouterr().err


def test_a_home_folder_behind_an_equals_sign(monkeypatch):
    """`--out=~/x`: the shell leaves the ~ as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    config, _ = train.parse(["--out=~/x", "--data=~/text", "--init=~/t5"])
    assert (config.out, config.data, config.init) == ("/home/me/x", "/home/me/text", "/home/me/t5")


def test_the_printed_commands_have_settings_for_their_data():
    """data.py prints a command for what it downloaded: all its flags are ours."""
    for task, (_, _, settings) in data.CORPORA.items():
        config, _ = train.parse(["--task", task, *settings.split()])
        assert config.problem() == ""
        built_in = train.parse(["--task", "wmt"])[0]
        assert (config.sft_steps, config.lr) != (built_in.sft_steps, built_in.lr), task
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    [words] = re.findall(r"^python train.py (--task multi30k .*)$", results, re.M)
    settings = vars(train.parse(words.split())[0])
    plain = vars(train.parse(["--task", "multi30k"])[0])
    differ = {name for name in plain if plain[name] != settings[name]}
    assert differ == {"pair", "data", "dtype", "threads"}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("place", ["log file", "terminal", "notebook"])
def test_a_bar_writes_as_often_as_somebody_looks(place, monkeypatch):
    """In a job's log file twice a minute."""
    monkeypatch.setattr(sys, "stderr", Terminal() if place == "terminal" else io.StringIO())
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if place == "notebook":
        monkeypatch.setitem(sys.modules, "ipykernel", object())
    with data.progress_bar("sft", 10, "update") as bar:
        assert (bar.mininterval, bar.maxinterval) == (
            (30, 30) if place == "log file" else (0.1, 10)
        )


# ----------------------------------------------------------------------------- text


@pytest.mark.parametrize("target", [" B", "B ", "B\t", "B\n", "\x07B", "a  b", "a\tb"])
def test_references_are_treated_as_outputs(target):
    """A leading space in a target cost every exact match. Outputs are stripped, so both are."""
    examples = [Example("x", "", target)] * 2
    outputs = [evaluation.Output(" ".join(target.replace("\x07", " ").split()))] * 2
    assert evaluation.compute_metrics(data.Config(task="logiqa"), examples, outputs)["acc"] == 100


def test_no_word_is_longer_than_99_signs():
    """Training is quadratic in the longest word: one line of 100,000 signs took minutes."""
    tokenizer = data.train_tokenizer([Example("字" * 5000, "", "ab" + "-" * 500)] * 3, 300)
    for text in ("字" * 5000, "-" * 5000, " " * 5000, "a" * 5000):
        parts = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert max(end - start for _, (start, end) in parts) <= 100
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_one_split_takes_the_files_of_one_name(tmp_path):
    """valid.de beside dev.de and dev.en: two sets."""
    for name in ("train.de", "train.en", "valid.de", "dev.de", "dev.en"):
        (tmp_path / name).write_text("a\n", encoding="utf-8")
    with pytest.raises(model.UserError, match="one side of the valid split only: no valid.en"):
        data.load(data.Config(data=str(tmp_path)))


def test_blank_lines_of_a_jsonl(tmp_path):
    """As in a text file: left out of training, named elsewhere, nothing at the end."""
    row = json.dumps({"document": "a b", "summary": "c"})
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(f"{row}\n\n{row}\n\n\n", encoding="utf-8")
    config = data.Config(task="xsum", data=str(tmp_path))
    with pytest.raises(model.UserError, match="line 2 of .*valid.jsonl has an empty side"):
        data.load(config)
    (tmp_path / "valid.jsonl").write_text(f"{row}\n{row}\n\n\n", encoding="utf-8")
    splits, _ = data.load(config)
    assert len(splits["train"]) == len(splits["valid"]) == 2


def test_options_that_are_no_list_are_refused():
    row = dict(text="x", question="y", options={"A": "a", "B": "b", "C": "c", "D": "d"}, answer=0)
    with pytest.raises(ValueError, match="not four options"):
        data.logiqa_row(json.dumps(row))


@pytest.mark.parametrize("pair, prefix", [("en-ro", "Romanian"), ("de-en", "English")])
def test_the_prefix_of_a_t5_is_printed_before_training(pair, prefix, capsys):
    config = data.Config(pair=pair, init="t5", data="built-in", built_in_size=8)
    assert data.source_prefix(config).endswith(f" to {prefix}: ")
    if pair == "de-en":
        data.load(config)
        said = "data: every source gets the prefix 'translate German to English: '\n"
        assert said in capsys.readouterr().out


def test_a_language_without_a_name_is_said(tmp_path, capsys):
    for name in ("train", "valid"):
        for code in ("en", "xx"):
            (tmp_path / f"{name}.{code}").write_text("a\n", encoding="utf-8")
    data.load(data.Config(pair="en-xx", init="t5", data=str(tmp_path)))
    assert "data.LANGUAGES has no name for 'xx'" in capsys.readouterr().out


def test_added_words_of_a_t5_are_words(tmp_path):
    """A tokenizer.json with ` <` added, and added_tokens.json beside a spiece.model: not special."""
    from test_tokenizers import PIECES, spiece
    from tokenizers import AddedToken

    (tmp_path / "spiece.model").write_bytes(spiece(PIECES))
    plain = data.read_spiece(tmp_path / "spiece.model", 140)
    size = plain.get_vocab_size()
    words = {"{": size + 1, " <": size, "<extra_id_0>": plain.token_to_id("<extra_id_0>")}
    (tmp_path / "added_tokens.json").write_text(json.dumps(words), encoding="utf-8")
    from_spiece = data.pretrained_tokenizer(tmp_path, ["<2de>"], size + 4)
    plain.add_tokens([AddedToken(" <", normalized=False), AddedToken("{", normalized=False)])
    plain.save(str(tmp_path / "tokenizer.json"))
    from_json = data.pretrained_tokenizer(tmp_path, ["<2de>"], size + 4)
    for tokenizer in (from_spiece, from_json):
        special = data.special_ids(tokenizer)
        assert [tokenizer.token_to_id(word) for word in (" <", "{")] == [size, size + 1]
        assert not {size, size + 1} & {*special} and tokenizer.token_to_id("<sep>") in special
        example = Example("a < house{", "", "a < house{")
        [ids] = data.encode(tokenizer, [example])
        assert size in ids.target and size + 1 in ids.target
        assert evaluation.to_text(tokenizer, [ids.target.tolist()]) == ["a < house{"]
        assert evaluation.what_is_lost(tokenizer, [example], data.Config()) == ""


# ----------------------------------------------------------------------------- the guide's sections


def section(title, language):
    page = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    return re.search(rf"\n## {title}\n.*?```{language}\n(.*?)```", page, re.S)[1]


def test_the_guides_notebook_cell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--built-in-size=300", "--sft-steps=4", "--policy-steps=3", "--eval-decode=0"]
    main = train.main
    monkeypatch.setattr(train, "main", lambda argv: main([*argv, *small, "--threads=1"]))
    exec(section("In a notebook", "python"), {})
    assert re.fullmatch(r".* -> .*", capsys.readouterr().out.splitlines()[-1])


@pytest.mark.skipif(sys.platform == "win32", reason="a script for bash")
def test_the_guides_job_script(tmp_path):
    """srun starts its command, torchrun is this Python's. Twice: the second job resumes."""
    shims = {
        "srun": 'exec "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "scontrol": 'echo "$@" >> requeued',
    }
    for name, body in shims.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    script = section("On a cluster", "bash").replace(
        "train.py", shlex.quote(str(ROOT / "train.py"))
    )
    script = script.replace("--task wmt", " ".join(["--task wmt", *RUN]))
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7"}
    job = ["bash", "-c", script]
    for signalled in (True, False):
        program = subprocess.Popen(job, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
        while signalled and not (tmp_path / "runs" / "two" / "sft.pt").exists():
            assert program.poll() is None, program.communicate()[1][-2000:]
            time.sleep(0.05)
        if signalled:
            children = ["pkill", "-TERM", "-P", str(program.pid)]  # of the batch shell, as SLURM
            subprocess.run(children, check=True)
        program.communicate(timeout=120)
        finished = (tmp_path / "runs" / "two" / "results.json").exists()
        assert finished == (not signalled)
        assert (tmp_path / "requeued").read_text(encoding="utf-8") == "requeue 7\n"


def test_a_job_that_died_while_it_was_prepared_starts_again(tmp_path, monkeypatch):
    """Before last.pt there is nothing to lose, and nothing to resume."""
    folder = tmp_path / "run"
    flags = [*RUN, "--policy-steps", "0", "--out", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_state", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(flags)
    left = {path.name for path in folder.iterdir()}
    assert left == {"config.json", "tokenizer.json", "log.jsonl", "lock"}
    assert train.main(flags) == 0
    assert train.main(flags) == 1  # now there is something


def test_a_reference_that_no_memory_holds_is_named_before_training(tmp_path, capsys):
    for name in ("train", "valid"):
        for code in ("en", "zh"):
            long = "".join(chr(0x4E00 + n) for n in range(12_000))
            lines = ["ein Satz"] * 20 + [long] + ["ein Satz"]
            (tmp_path / f"{name}.{code}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = ["--pair", "en-zh", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert train.main([*TINY, *flags]) == 1
    said = "the target of valid example 21 is too long: remove or split it"
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_open_run_takes_settings_that_the_flags_take(finished_run, monkeypatch):
    with pytest.raises(model.UserError, match="--beams must lie between"):
        evaluation.open_run(finished_run, "policy", beams=0)
    monkeypatch.setenv("HOME", str(finished_run.parent))
    monkeypatch.setenv("USERPROFILE", str(finished_run.parent))
    run = evaluation.open_run("~/tiny", "policy")
    assert evaluation.answers(run, "Der Hund.") == evaluation.answers(run, ["Der Hund."])
