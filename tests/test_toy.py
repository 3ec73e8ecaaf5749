"""Task toy through train.py: its settings, scores, controls, and that the warmup is read."""

import json

import pytest

import data
import eval as evaluation
import train
from data import Example

SMALL = [
    "--task",
    "toy",
    "--built-in-size",
    "120",
    "--symbols",
    "6",
    "--sft-steps",
    "4",
    "--policy-steps",
    "3",
    "--eval-every",
    "2",
    "--batch-tokens",
    "320",
    "--policy-batch-tokens",
    "80",
    "--samples",
    "2",
    "--eval-decode",
    "20",
    "--threads",
    "1",
]


def log_of(folder):
    return [
        json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_scores_by_hops_and_hit_rate():
    """f: a->b, b->c, c->a. Asked: f(a), f(f(a)) twice."""
    one, two = Example("ab bc ca", "<1hops> a", "b"), Example("ab bc ca", "<2hops> a", "c")
    assert data.chain(one) == ["a", "b"] and data.chain(two) == ["a", "b", "c"]
    score = evaluation.pointer_scores
    scores = score(None, [one, two, two], ["b", "c", "b"], ["x", "b", "c"])
    assert scores == {"1 hop": 1.0, "2 hops": 0.5, "hit rate": 0.5}
    assert score(None, [one], ["c"], [""]) == {"1 hop": 0.0}
    three = Example("ab bc ca", "<3hops> a", "a")
    assert score(None, [three], ["a"], ["b c"]) == {"3 hops": 1.0, "hit rate": 1.0}
    zero = Example("ab bc ca", "<0hops> a", "a")  # --hops 0: copy
    assert score(None, [zero, zero], ["a", "b"], ["b", "b"]) == {"0 hops": 0.5}
    assert score(None, [three], ["a"], ["b b"])["hit rate"] == 0.0
    assert score(None, [three], ["a"], ["c b"])["hit rate"] == 0.0  # the order counts


def test_a_task_brings_its_own_settings_and_flags_go_before_them():
    for task in data.TASKS:
        config, _ = train.parse(["--task", task])
        settings = data.TASKS[task].settings
        assert config == data.Config(task=task, **settings)
        assert not config.problem()
    assert len(data.TASKS["toy"].settings) > 10
    assert train.parse(["--samples", "3", "--task=toy"])[0].samples == 3
    assert train.parse([])[0] == data.Config()


@pytest.mark.parametrize("estimator", ["jensen", "exact", "truncated", "pause", "sft"])
def test_every_kind_of_estimator_trains_from_the_command_line(estimator, tmp_path):
    folder = tmp_path / "run"
    flags = [*SMALL, "--estimator", estimator, "--no-control"]
    assert train.main([*flags, "--out", str(folder)]) == 0
    rows = {
        row["name"]: row
        for row in json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    }
    name = {"pause": "pause", "sft": "sft, same tokens"}.get(estimator, "warmup")
    assert set(rows) == {"sft", name} and {"1 hop", "2 hops"} <= set(rows[name]["metrics"])
    assert ("hit rate" in rows[name]["metrics"]) == (estimator not in ("sft", "pause"))
    policy = [line for line in log_of(folder) if line["stage"] == "policy"]
    trained = [line for line in policy if line["kind"] == "train"]
    assert len(trained) == 3 and ("reward" in trained[0]) == (estimator != "sft")
    assert all("1 hop" in line for line in policy if line["kind"] == "valid")  # --eval-decode
    assert evaluation.main([str(folder)]) == 0


def examples_per_update(monkeypatch, estimator, folder):
    seen, original = [], train.batch_loss

    def watched(run, batch):
        if run.state.stage == "policy":
            seen.append(len(batch.source))
        return original(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train, "batch_loss", watched)
        flags = [*SMALL, "--estimator", estimator, "--samples", "4", "--no-control"]
        assert train.main([*flags, "--out", str(folder)]) == 0
    return set(seen)


def test_controls_see_as_many_target_tokens_an_update(monkeypatch, tmp_path):
    """80 tokens: 6 of source + 2 of target each; a baseline without samples gets 4 x as many."""
    for estimator, examples in (("marginal", 10), ("frozen", 10), ("pause", 40), ("sft", 40)):
        assert examples_per_update(monkeypatch, estimator, tmp_path / estimator) == {examples}


@pytest.mark.parametrize("flag", [["--alpha", "0"], ["--temperature", "3"]])
def test_the_options_of_the_objective_reach_the_weights(flag, tmp_path):
    losses = []
    for name, more in (("plain", []), ("other", flag)):
        assert train.main([*SMALL, "--out", str(tmp_path / name), "--no-control", *more]) == 0
        losses.append(
            [
                line["nll"]
                for line in log_of(tmp_path / name)
                if (line["stage"], line["step"], line["kind"]) == ("policy", 3, "train")
            ]
        )
    assert len(losses[0]) == 1 and losses[0] != losses[1]


def test_a_toy_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    original, calls = train.batch_loss, []
    assert train.main([*SMALL, "--out", str(tmp_path / "whole")]) == 0

    def interrupted(run, batch):
        calls.append(0)
        run.stop = run.stop or len(calls) == 6  # in the policy stage
        return original(run, batch)

    monkeypatch.setattr(train, "batch_loss", interrupted)
    assert train.main([*SMALL, "--out", str(tmp_path / "cut")]) == 1
    monkeypatch.undo()
    assert {line["stage"] for line in log_of(tmp_path / "cut")} == {"sft", "policy"}
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    whole, cut = (
        [line | {"seconds": 0} for line in log_of(tmp_path / name)] for name in ("whole", "cut")
    )
    assert whole == cut


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "toy", "--data", "nowhere"], "leave --data out"),
        (["--task", "toy", "--symbols", "2"], "of 74: lower --built-in-size (now 50)"),
        (
            ["--task", "toy", "--estimator", "exact", "--symbols", "20", "--warmup-len", "2"],
            "exact",
        ),
        (
            ["--task", "toy", "--data", "built-in", "--symbols", "3", "--hops", "0"],
            "of 74: lower --built-in-size (now 50)",
        ),
    ],
)
def test_what_the_toy_refuses(arguments, message, tmp_path, capsys):
    assert train.main([*arguments, "--built-in-size", "50", "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_bad_toy_usage(capsys):
    for arguments in (
        ["--symbols", "27"],
        ["--hops", "-1"],
        ["--hops", "10"],
        ["--alpha", "nan"],
        ["--alpha", "inf"],
        ["--samples", "1", "--estimator", "jensen"],
    ):
        with pytest.raises(SystemExit) as stop:
            train.main(["--task", "toy", *arguments])
        assert stop.value.code == 2 and arguments[0] in capsys.readouterr().err.splitlines()[0]


def test_new_questions_have_a_tab_before_their_prompt(tmp_path, capsys):
    """f: a->b, b->c, …; the model is hardly trained. Without a prompt there is no question."""
    folder, text = tmp_path / "run", tmp_path / "text"
    assert train.main([*SMALL, "--policy-steps", "0", "--out", str(folder)]) == 0
    capsys.readouterr()
    text.write_text(
        "ab bc cd de ef fa\t<2hops> a\n\nab bc cd de ef fa\t<1hops> c\n", encoding="utf-8"
    )
    seen, real = [], data.collate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "collate", lambda examples: seen.extend(examples) or real(examples))
        assert evaluation.main([str(folder), "--input", str(text)]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    tokenizer = evaluation.load_tokenizer(folder / "tokenizer.json")
    assert [tokenizer.decode(ids.prompt, skip_special_tokens=False) for ids in seen] == [
        "<2hops> a",
        "<1hops> c",
    ]
    text.write_text("ab bc cd de ef fa\t<2hops> a\nab bc cd de ef fa\n", encoding="utf-8")
    assert evaluation.main([str(folder), "--input", str(text)]) == 1
    assert "line 2 of --input: a line is the source, a tab, and" in capsys.readouterr().err
    text.write_text("ab bc cd de ef fa\t<3hops> a\n", encoding="utf-8")
    assert evaluation.main([str(folder), "--input", str(text)]) == 1
    said = capsys.readouterr().err
    assert "such as <2hops> a, with a tag of this run's data" in said and "'<3hops> a'" in said
    for content in ("", "\n\n"):
        text.write_text(content, encoding="utf-8")
        assert evaluation.main([str(folder), "--input", str(text), "--show", "2"]) == 1
        assert "--input holds no line to show" in capsys.readouterr().err
