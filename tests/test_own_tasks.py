"""A task of one's own: what is wrong with it is said in one line, before anything else.

Each of these was planted once to see a test fail:
    settings not looked at                            test_settings_that_mean_nothing
    types not looked at                               test_values_that_mean_nothing
    a metric, generator or reader without an entry    test_names_that_mean_nothing
    empty, or no text, taken from a generator         test_what_a_generator_may_not_give
    None for a missing warmup                         test_a_metric_may_look_at_warmups
    the warmups' file not written                     test_the_warmups_of_a_split_are_written_…
    no settings, no checksum in results.json          test_a_results_file_says_what_made_it
"""

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import train
import warmup
from conftest import TINY, drawn_logprobs
from data import Example, Task
from model import EncoderDecoder, ModelConfig, load_checkpoint

FLAGS = [
    "--task",
    "mine",
    "--size",
    "nano",
    "--built-in-size",
    "40",
    "--threads",
    "1",
    "--beams",
    "1",
    "--sft-steps",
    "2",
    "--policy-steps",
    "2",
    "--eval-every",
    "1",
    "--samples",
    "2",
]


def good(r, config):
    word = r.choice("abcdefgh") + r.choice("abcdefgh") + r.choice("abcdefgh")
    return Example(word, "", word[::-1])


@pytest.fixture
def mine(monkeypatch, tmp_path):
    """mine(generator, **columns): a task of that name, as its owner would write it."""
    monkeypatch.chdir(tmp_path)

    def register(generator=good, metrics="options", name="mine", **columns):
        monkeypatch.setitem(data.GENERATORS, "mine", generator)
        task = Task(metrics, generator=name, **columns)
        monkeypatch.setitem(data.TASKS, "mine", task)

    return register


def refused(capsys) -> str:
    """The one line that says what is wrong. No run folder was made."""
    capsys.readouterr()
    assert train.main([*FLAGS, "--out", "run"]) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("error: task mine: "), (out, err)
    assert not Path("run").exists()
    return err


@pytest.mark.parametrize(
    "settings, name",
    [
        (dict(warmup_length=2), "warmup_length"),
        (dict(policy_step=60), "policy_step"),
        (dict(xyzzy=1), "xyzzy"),
    ],
)
def test_settings_that_mean_nothing(settings, name, mine, capsys):
    mine(settings=settings)
    said = refused(capsys)
    assert f"task mine: there is no setting '{name}': " in said
    near = {"warmup_length": "warmup_len", "policy_step": "policy_steps"}.get(name)
    if near:
        assert said.endswith(f"did you mean {near}?\n")
    else:
        assert " warmup_len, " in said and " policy_steps, " in said


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(samples="8x"), "invalid int value: '8x'"),
        (dict(samples=8.0), "--samples must be of type int, not 8.0"),
        (dict(control=1), "--control must be of type bool, not 1"),
        (dict(samples=0), "--samples must lie between 1 and 1024"),
        (dict(size="huge"), "--size must be one of toy, "),
    ],
)
def test_values_that_mean_nothing(settings, says, mine, capsys):
    mine(settings=settings)
    with pytest.raises(SystemExit) as stop:
        train.main(["--task", "mine", "--out", "run"])
    assert stop.value.code == 2 and not Path("run").exists()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("error: ") and says in said[0]


def test_settings_that_mean_something_are_used(mine):
    """A whole number may stand for a float."""
    mine(settings=dict(warmup_len=2, lr=1, control=False))
    config, _ = train.parse(["--task", "mine"])
    assert (config.warmup_len, config.lr, config.control) == (2, 1, False)


@pytest.mark.parametrize(
    "columns, says",
    [
        (dict(metrics="accuracy"), "eval.METRICS has no 'accuracy': there are translation, "),
        (dict(metrics=""), "eval.METRICS has no '': there are translation, "),
        (dict(name="mein"), "data.GENERATORS has no 'mein': "),
    ],
)
def test_names_that_mean_nothing(columns, says, mine, capsys):
    mine(**columns)
    assert says in refused(capsys)


def test_a_reader_that_means_nothing(mine, capsys):
    mine(reader="tsv")
    assert train.main([*FLAGS, "--data", ".", "--out", "run"]) == 1
    says = "error: task mine: data.READERS has no 'tsv': there are parallel, "
    assert capsys.readouterr().err.startswith(says)


@pytest.mark.parametrize(
    "given",
    [
        ("a", "", "b"),
        None,
        Example("a", "", ["b"]),
        Example("a", None, "b"),
        Example("a", "", " "),
        Example("", "", "b"),
    ],
)
@pytest.mark.parametrize("often", [True, False])
def test_what_a_generator_may_not_give(given, often, mine, capsys):
    """Always, or once in ten."""
    mine(lambda r, config: given if often or r.random() < 0.1 else good(r, config))
    assert f"its generator gave {given!r}, not an Example of texts" in refused(capsys)


def test_prompts_of_unequal_length(mine, capsys):
    """Padding would stand between a shorter one and y."""
    calls = []

    def generator(r, config):
        calls.append(r)
        return good(r, config)._replace(prompt="<ask> " + "a " * (len(calls) % 2))

    mine(generator, prompt="<ask> a")
    assert train.main([*FLAGS, "--out", "run"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and not Path("run").exists()
    assert "all prompts of a task must have as many tokens, not {" in err and "'<ask> a '" in err


def test_a_task_says_that_its_examples_have_prompts(mine, capsys, tmp_path):
    """Else --input would write after no question."""
    asking = lambda r, config: good(r, config)._replace(prompt="<ask> a")  # noqa: E731
    mine(asking)
    assert "its examples have prompts, so its row in TASKS needs one, too" in refused(capsys)
    mine(asking, prompt="<ask> a")
    assert train.main([*FLAGS, "--out", "run"]) == 0
    for line, ok in (
        ("abc\t<ask> a", True),
        ("abc", False),
        ("abc\ta", False),
        ("a\t<ask>", False),
    ):
        (tmp_path / "text").write_text(line, encoding="utf-8")
        assert evaluation.main(["run", "--input", "text"]) == (0 if ok else 1)
        assert ok or "a prompt such as <ask> a" in capsys.readouterr().err


def test_a_generator_that_repeats_itself(mine, capsys):
    mine(lambda r, config: Example(r.choice("ab"), "", "b"))
    assert train.main([*FLAGS, "--out", "run"]) == 1
    said = capsys.readouterr().err
    assert " no new example, after " in said and " of 60: lower --built-in-size (now 40)" in said


def test_a_metric_may_look_at_warmups(mine, monkeypatch, capsys):
    """Of one's own: it splits them. Before the policy stage, and in the ceiling, they are empty."""
    given = []

    def metric(config, examples, hypotheses, warmups):
        given.append(warmups)
        words = [warmup.split() for warmup in warmups]
        return {"mean words in a warmup": sum(map(len, words)) / len(words), "x": 1.0}

    monkeypatch.setitem(evaluation.METRICS, "words", metric)
    mine(metrics="words")
    assert train.main([*FLAGS, "--out", "run"]) == 0
    out = capsys.readouterr().out
    assert all(type(text) is str for warmups in given for text in warmups)
    assert any(map(any, given)) and not all(map(any, given))
    lines = out.splitlines()
    header = next(line for line in lines if "mean words in a warmup" in line)
    row = next(line for line in lines if line.startswith("sft  "))
    ends = [
        re.search(pattern, line).end() for pattern, line in ((r" x(?= )", header), ("1.00", row))
    ]
    assert ends[0] == ends[1]  # a column stands under its name


@pytest.mark.parametrize(
    "metric, says",
    [
        (lambda *_: None, "AttributeError"),
        (lambda config, examples: {}, "TypeError"),
        (lambda *_: {"x": "many"}, "ValueError"),
        (lambda *_: {"x": [1][3]}, "IndexError"),
        (lambda *_: {"x": misspelt}, "NameError"),  # noqa: F821
        (
            lambda c, e, h, warmups: {"x": float(any(w and w.split()[9] for w in warmups))},
            "IndexError",
        ),
    ],
)
def test_a_metric_that_fails_does_so_before_training(metric, says, mine, monkeypatch, capsys):
    monkeypatch.setitem(evaluation.METRICS, "broken", metric)
    monkeypatch.setattr(train, "train", lambda run: pytest.fail("trained"))
    mine(metrics="broken")
    assert train.main([*FLAGS, "--out", "run"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: task mine: its metric failed, ") and says in err
    assert err.count("\n") == 1


def test_numbers_of_numpy_and_torch_are_numbers(mine, monkeypatch):
    monkeypatch.setitem(
        evaluation.METRICS, "odd", lambda *_: {"x": np.float32(0.5), "y": torch.ones(())}
    )
    config = data.Config(task="wmt")
    monkeypatch.setitem(data.TASKS, "wmt", Task("odd", generator="translation"))
    assert evaluation.compute_metrics(config, [], [evaluation.Output("")]) == {"x": 0.5, "y": 1.0}


def test_a_metric_that_is_gone(finished_run, monkeypatch, capsys):
    monkeypatch.delitem(evaluation.METRICS, "translation")
    for program, *argv in ((evaluation, str(finished_run)), (train, "--resume", str(finished_run))):
        assert program.main(argv) == 1
        said = "error: task wmt: eval.METRICS has no 'translation': there are pointers, "
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "row, says",
    [
        (lambda line: line.split(" "), "TypeError"),
        (lambda line: None, "TypeError"),
        (lambda line: line.splitt(), "AttributeError"),
        (lambda line: (line, "", ["b"]), "TypeError"),
    ],
)
def test_a_reader_of_ones_own_that_fails(row, says, mine, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(data.READERS, "own", lambda pair: (["txt"], row))
    mine(reader="own")
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text("a b c d\n" * 9, encoding="utf-8")
    assert train.main([*FLAGS, "--data", ".", "--out", "run"]) == 1
    err = capsys.readouterr().err
    assert "line 1 of" in err and says in err and err.count("\n") == 1


def test_the_warmups_of_a_split_are_written_beside_its_outputs(finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    assert evaluation.main([str(run), "--split", "valid"]) == 0
    assert f"wrote {run / 'valid.policy.warmups.txt'}" in capsys.readouterr().out
    texts, warmups = (
        (run / name).read_text(encoding="utf-8").split("\n")
        for name in ("valid.policy.txt", "valid.policy.warmups.txt")
    )
    assert len(texts) == len(warmups) == 31 and all(warmups[:-1]) and not warmups[-1]
    assert not (run / "valid.sft.warmups.txt").exists()
    assert (
        train.main(
            [
                "--task",
                "wmt",
                *TINY,
                "--built-in-size",
                "40",
                "--policy-steps",
                "0",
                "--overwrite",
                "--out",
                str(run),
            ]
        )
        == 0
    )
    assert not (run / "valid.policy.warmups.txt").exists()


def test_a_results_file_says_what_made_it(finished_run):
    results = json.loads((finished_run / "results.json").read_text(encoding="utf-8"))
    assert results["config"] == json.loads(
        (finished_run / "config.json").read_text(encoding="utf-8")
    )
    assert results["config"]["seed"] == 0 and results["config"]["samples"] == 2
    assert results["versions"]["torch"] == version("torch")
    assert results["versions"]["numpy"] == version("numpy")
    saved = load_checkpoint(finished_run / "last.pt", "state")
    assert results["data_checksum"] == saved["checksum"]


def test_a_task_that_is_registered_no_longer(finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps(settings | {"task": "mine"}), encoding="utf-8")
    for program, *argv in ((evaluation, str(run)), (train, "--resume", str(run))):
        assert program.main(argv) == 1
        said = capsys.readouterr().err
        assert f"{run / 'config.json'}" in said and "--task must be one of toy, wmt, " in said


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    """A folder of runs, too, and one that does not exist."""
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    (tmp_path / "runs" / "toy" / "config.json").write_text("{}", encoding="utf-8")
    for folder in (tmp_path / "runs" / "nope", tmp_path / "runs"):
        for program, *argv in ((evaluation, str(folder)), (train, "--resume", str(folder))):
            assert program.main(argv) == 1
            said = capsys.readouterr().err
            assert said.startswith(f"error: no run in {folder}. ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "program, argv, hint",
    [
        (train, ["--sampels", "8"], "did you mean --samples?"),
        (train, ["--max-tokens", "8"], "did you mean --max-"),
        (train, ["--samples", "x"], "--help lists all flags"),
        (evaluation, ["runs/wmt", "--imput", "f"], "did you mean --input?"),
        (evaluation, ["runs/wmt", "--lr", "1"], "--help lists all flags"),  # not --plot
        (data, ["wmt", "--pairs", "de-en"], "did you mean --pair?"),
    ],
)
def test_a_flag_that_does_not_exist_has_a_neighbour(program, argv, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(argv)
    error, second, end = capsys.readouterr().err.split("\n")
    assert stop.value.code == 2 and error.startswith("error: ") and end == ""
    assert second.startswith(hint)


@pytest.mark.parametrize(
    "estimator, name", [("pause", "pause"), ("frozen", "warmup, frozen"), ("marginal", "warmup")]
)
def test_an_export_is_called_by_its_row(
    estimator, name, finished_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluation, "save_pretrained", lambda model, out: out.mkdir())
    run = evaluation.open_run(finished_run, estimator=estimator)
    evaluation.export(run, "policy", tmp_path / "out")
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}: {name}\n"


def test_a_warmup_may_hold_all_but_its_separator():
    """Nothing else is forbidden. It has W tokens, and their probabilities sum to 1."""
    torch.manual_seed(0)
    model = (
        EncoderDecoder(
            ModelConfig(
                vocab_size=6,
                width=16,
                heads=2,
                head_size=8,
                ff=16,
                encoder_layers=1,
                decoder_layers=1,
            )
        )
        .double()
        .eval()
    )
    spec = warmup.WarmupSpec(3, (3,), 2)
    source, prompt = torch.tensor([[4, 5]]), torch.tensor([[4]])
    memory = model.encode(source)
    with drawn_logprobs() as drawn:
        c = warmup.sample_warmups(model, memory, prompt, spec, 8)
    log_pi = torch.cat(drawn, 1).sum(1)[None]  # (1,K)
    batch = warmup.Batch(source, prompt, torch.tensor([[5, 1]]))
    again, *_ = warmup.score(model, memory, batch, c, spec)
    torch.testing.assert_close(again, log_pi, rtol=1e-9, atol=1e-9)
    every = warmup.all_warmups(spec, 6)[None]
    assert every.shape == (1, 25, 2) and not (every == 3).any()
    total, *_ = warmup.score(model, memory, batch, every, spec)
    torch.testing.assert_close(total.exp().sum(), torch.ones((), dtype=torch.float64))
