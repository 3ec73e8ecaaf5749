"""The comparison is fair: a control that differs in the warmup alone, draws that nothing disturbs.

Each of these was planted once to see a test fail:
    the control with decoder dropout                  test_train.py: test_decoder_dropout_is_off_in_…
    the control with the learning rate of SFT         test_the_control_is_the_baseline_sft_…
    validations of the control by --eval-every        test_policy_stage_and_control_have_as_many_…
    one seed for all stages; for all updates          test_each_update_draws_its_own
    validation draws from training's generator        test_validation_changes_nothing_that_is_trained
    draws of validation that go on from call to call  test_train.py: test_monte_carlo_scores_draw_…
    --sft: last weights for the best; no log; another
    stage's log; data not looked at                   test_a_run_from_another_runs_sft_…, test_sft_of_…
    a difference that is control less row             test_paired_differences_by_hand
    exact without a limit on rows                     test_exact_is_refused_where_it_would_take_hours
"""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import compare
import eval as evaluation
import train
from conftest import TINY
from data import AFTER_SFT, Config, flag_name, read_config
from model import load_checkpoint, own_draws

WMT = ["--task", "wmt", *TINY, "--beams", "1", "--built-in-size", "60"]


def lines_of(folder, kind="train"):
    text = (folder / "log.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) | {"seconds": 0} for line in text.splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def trained(folder, *flags):
    """A run without its report."""
    config, resume = train.parse([*WMT, *flags, "--out", str(folder)])
    run = train.prepare(config, resume)
    train.train(run)
    return run


def weights_of(folder, stage):
    return load_checkpoint(folder / f"{stage}.pt")["model"]


def assert_same_files(one, other):
    """Weights, log, and the table's rows, but for the seconds: bit for bit."""
    for stage in ("sft", "policy", "control"):
        a, b = weights_of(one, stage), weights_of(other, stage)
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert lines_of(one, None) == lines_of(other, None)
    results = [json.loads((f / "results.json").read_text(encoding="utf-8")) for f in (one, other)]
    for result in results:
        del result["config"]
        result["rows"] = [row | {"seconds": 0} for row in result["rows"]]
    assert results[0] == results[1]


# ----------------------------------------------------------------------------- the control


def test_the_control_is_the_baseline_sft_if_both_have_the_same_batches(tmp_path, monkeypatch):
    """No warmup, no dropout, as many updates: the same rates, validations, weights, bit for bit."""
    loss, modes = train.batch_loss, []

    def watched(run, batch):
        result = loss(run, batch)
        modes.append((run.state.stage, run.model.encoder.training, run.model.decoder.training))
        return result

    monkeypatch.setattr(train, "batch_loss", watched)
    flags = "--estimator sft --samples 1 --policy-batch-tokens 800 --policy-steps 4 --dropout 0"
    trained(tmp_path, *flags.split())
    seen = Counter(modes)
    assert seen == {("sft", True, True): 4, ("policy", True, False): 4, ("control", True, False): 4}
    log = lines_of(tmp_path, None)
    policy, control = (
        [line | {"stage": ""} for line in log if line["stage"] == stage]
        for stage in ("policy", "control")
    )
    assert policy == control and len(policy) == 4 + 3  # updates; validations at 0, 2 and 4
    policy, control = weights_of(tmp_path, "policy"), weights_of(tmp_path, "control")
    assert all(torch.equal(policy[name], control[name]) for name in policy)


@pytest.mark.parametrize(
    "policy_steps, eval_every, updates",
    [(120, 100, 84), (1000, 50, 588), (300, 300, 470), (7, 2, 4), (5, 9, 1), (9, 1, 40)],
)
def test_policy_stage_and_control_have_as_many_validations(policy_steps, eval_every, updates):
    """At even distances, and at the end: as many checkpoints to choose from."""

    def validations(stage, total):
        state = train.State(stage, total=total)
        due = []
        for state.step in range(1, total + 1):
            if train.validation_is_due(config, state):
                due.append(state.step)
        return due

    config = Config(policy_steps=policy_steps, eval_every=eval_every)
    policy = validations("policy", policy_steps)
    assert policy[:-1] == [*range(eval_every, policy_steps, eval_every)]
    control = validations("control", updates)
    assert len(control) == len(policy) and control[-1] == updates and policy[-1] == policy_steps
    gaps = [b - a for a, b in zip([0, *control], control)]
    assert max(gaps) - min(gaps) <= 1


# ----------------------------------------------------------------------------- draws


def test_draws_of_their_own_depend_on_the_seed_alone():
    device = torch.device("cpu")
    before = torch.get_rng_state()

    def drawn(*seed):
        with own_draws(device, *seed):
            return torch.rand(4).tolist()

    seeds = [(0, "policy", 0, 1), (1, "policy", 0, 1), (0, "control", 0, 1), (0, "policy", 1, 1)]
    seeds += [(0, "policy", 0, 2), (0, "validation"), (10, "policy", 0, 1)]
    draws = [drawn(*seed) for seed in seeds]
    torch.rand(3)
    assert draws == [drawn(*seed) for seed in seeds]
    assert len({tuple(draw) for draw in draws}) == len(seeds)
    torch.set_rng_state(before)
    with pytest.raises(MemoryError), own_draws(device, 1):
        raise MemoryError
    assert torch.equal(before, torch.get_rng_state())


def test_each_update_draws_its_own(tmp_path, monkeypatch):
    """No two updates share their draws, whatever stage and seed. Micro-batches go on."""
    loss, draws = train.batch_loss, []

    def watched(run, batch):
        draws.append(tuple(torch.rand(3).tolist()))
        return loss(run, batch)

    monkeypatch.setattr(train, "batch_loss", watched)
    trained(tmp_path / "0", "--accumulate", "2")
    assert len(set(draws)) == len(draws) == 2 * len(lines_of(tmp_path / "0"))
    trained(tmp_path / "1", "--seed", "1", "--policy-steps", "0")
    assert len(set(draws)) == len(draws)


def test_validation_changes_nothing_that_is_trained(tmp_path):
    """How often, with how many warmups, how many are decoded: losses and FLOPs are the same."""
    settings = ["", "--eval-every 1", "--eval-samples 3", "--eval-decode 3"]
    logs = []
    for n, flags in enumerate(settings):
        trained(tmp_path / str(n), "--dropout", "0.2", *flags.split())
        logs.append(lines_of(tmp_path / str(n)))
    assert {line["stage"] for line in logs[0]} == {"sft", "policy", "control"}
    for log in logs[1:]:
        assert log == logs[0]


# ----------------------------------------------------------------------------- --sft


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A finished run whose SFT stage was best before its end."""
    folder = tmp_path_factory.mktemp("other") / "run"
    with pytest.MonkeyPatch.context() as patch:
        rising(patch)
        assert train.main([*WMT, "--estimator", "frozen", "--out", str(folder)]) == 0
    return folder


def rising(patch):
    """Validation of SFT that gets worse with each update."""
    validate = train.validate

    def worse(run, data):
        return validate(run, data) | {"nll": float(run.state.step)}

    patch.setattr(train, "validate", worse)


def test_a_run_from_another_runs_sft_stage_is_the_run_from_the_start(other, tmp_path, monkeypatch):
    """Weights, log and table. The flags of SFT need not be said again; those after it are new."""
    rising(monkeypatch)
    sft, last = weights_of(other, "sft"), load_checkpoint(other / "last.pt", "state")["model"]
    assert any(not torch.equal(sft[name], last[name]) for name in sft)
    flags = ["--estimator", "jensen", "--policy-lr", "0.002", "--beams", "1", "--threads", "1"]
    after = ["--policy-steps", "3", "--policy-batch-tokens", "400", "--warmup-len", "2"]
    after += ["--samples", "2", "--eval-samples", "2"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train.main([*WMT, *flags, "--out", str(whole)]) == 0
    updates = []
    train_stage = train.train_stage
    watched = lambda run, bar: updates.append(run.state.stage) or train_stage(run, bar)
    monkeypatch.setattr(train, "train_stage", watched)
    assert train.main(["--sft", str(other), *flags, *after, "--out", str(part)]) == 0
    assert updates == ["policy", "control"]
    assert_same_files(whole, part)
    assert read_config(part).sft == str(other)
    third = tmp_path / "third"  # the SFT stage of the SFT stage
    assert train.main(["--sft", str(part), *flags, *after, "--out", str(third)]) == 0
    assert_same_files(whole, third)


def test_what_sft_depends_on_must_be_equal(other, tmp_path, capsys):
    """The first difference in one line, with code 2. What comes after SFT may differ."""
    changes = dict(size="tiny", seed=1, sft_steps=5, dropout=0.3, lr=0.01, eval_every=1)
    changes |= dict(batch_tokens=900, vocab_size=400, pair="en-de", built_in_size=121)
    for name, value in changes.items():
        with pytest.raises(SystemExit) as stop:
            flags = ["--sft", str(other), flag_name(name), str(value), "--out", f"{tmp_path}/new"]
            train.main(flags)
        assert stop.value.code == 2
        said = capsys.readouterr().err.splitlines()[0]
        before = getattr(read_config(other), name)
        assert f"the SFT stage of {other} has {flag_name(name)} {before!r}, not {value!r}: " in said
    config, _ = train.parse(["--sft", str(other), "--out", "new"])
    assert (config.size, config.built_in_size, config.data) == ("nano", 60, "built-in")
    theirs = read_config(other)  # nothing is forgotten, what later stages read neither
    assert config == replace(theirs, out="new", sft=str(other)) != Config()
    assert theirs.policy_steps != Config().policy_steps and theirs.samples != Config().samples
    assert set(AFTER_SFT) < set(vars(Config())) and not set(changes) & set(AFTER_SFT)
    for flags, said in ((["--policy-steps", "0"], "--policy-steps"), (["--out", other], "--out")):
        with pytest.raises(SystemExit) as stop:
            train.main(["--sft", str(other), "--out", f"{tmp_path}/new", *map(str, flags)])
        assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and (other / "results.json").exists()


def test_sft_of_other_data_or_unfinished_is_refused(other, tmp_path, capsys):
    """Before the new folder is made."""

    def refused(folder, *flags):
        assert train.main(["--sft", str(folder), *flags, "--out", str(tmp_path / "new")]) == 1
        assert not (tmp_path / "new").exists()
        return capsys.readouterr().err.splitlines()[-1]

    text = tmp_path / "text"
    text.mkdir()
    for split in ("train", "valid"):
        for language in ("de", "en"):
            (text / f"{split}.{language}").write_text("eins zwei drei\n" * 9, encoding="utf-8")
    assert str(text) in refused(other, "--data", str(text))
    assert "no run in" in refused(tmp_path / "nothing")

    lines = (other / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if '"policy"' in line) - 1
    assert '"valid"' in lines[last]
    for number, kept in enumerate((lines[:last], lines[1:])):  # no last validation; no first update
        folder = shutil.copytree(other, tmp_path / f"half{number}")
        (folder / "log.jsonl").write_text("".join(kept), encoding="utf-8")
        said = f"SFT is not finished there. Go on with: python train.py --resume {folder}"
        assert said in refused(folder)


# ----------------------------------------------------------------------------- pairs


def rows(*values):
    return [{"metrics": {"BLEU": bleu}, "nll": nll} for bleu, nll in values]


def test_paired_differences_by_hand():
    """Seeds differ by 40 points, rows of a seed by 1: the pairs say so, the spreads do not."""
    table = {
        "sft": rows((9.0, 1.5), (50.0, 0.75)),
        compare.CONTROL: rows((10.0, 1.0), (50.0, 0.5)),
        "`marginal`": rows((11.0, 0.75), (51.5, 0.75)),
    }
    assert compare.paired_table(table).splitlines() == [
        f"| less `{compare.CONTROL}` | BLEU | NLL |",
        "|---|---|---|",
        "| sft | -0.50 ± 0.71 (above in 0 of 2) | +0.38 ± 0.18 (above in 2 of 2) |",
        "| `marginal` | +1.25 ± 0.35 (above in 2 of 2) | +0.00 ± 0.35 (above in 1 of 2) |",
    ]
    one = {title: group[:1] for title, group in table.items()}
    last = compare.paired_table(one).splitlines()[-1]
    assert last == "| `marginal` | +1.00 (1 seed) | -0.25 (1 seed) |"


def test_compare_trains_sft_once_a_seed(tmp_path, monkeypatch):
    """The first estimator trains SFT and control. The others take its SFT stage."""
    commands = []

    def run(command, **how):
        commands.append(command[2:])
        folder = tmp_path / command[command.index("--out") + 1]
        folder.mkdir(parents=True)
        row = {"stage": "policy", "metrics": {"2 hops": 0.5}}
        (folder / "results.json").write_text(json.dumps({"rows": [row]}), encoding="utf-8")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(compare.subprocess, "run", run)
    args = SimpleNamespace(
        out=tmp_path / "c", estimators=["marginal", "jensen"], task="toy", metric="2 hops"
    )
    for estimator in args.estimators:
        compare.train((estimator, 3), args, ["--hops", "0"])
    first, second = commands
    assert "--sft" not in first and "--no-control" not in first
    assert second[second.index("--sft") + 1] == str(tmp_path / "c" / "marginal-3")
    assert "--no-control" in second and second[-4:-2] != first[-2:]
    assert all(command[command.index("--hops") + 1] == "0" for command in commands)


# ----------------------------------------------------------------------------- what goes with it


def test_exact_is_refused_where_it_would_take_hours(tmp_path):
    """The rows of an update count, not the warmups of an example alone. The line says what to do."""

    def prepared(*flags):
        toy = ["--task", "toy", "--built-in-size", "200", "--estimator", "exact"]
        config, _ = train.parse([*toy, *flags, "--out", str(tmp_path / "new")])
        return train.prepare(config, resume=False)

    def refused(*flags):
        with pytest.raises(train.UserError) as stop:
            prepared(*flags)
        assert not (tmp_path / "new").exists()
        return str(stop.value)

    said = refused()
    assert "--estimator exact would score 67," in said and "At most 4,096" in said
    limit = int(said.rsplit(" ", 1)[1])
    assert f"lower --policy-batch-tokens to {limit}" in said and limit > 18
    flags = ["--policy-batch-tokens", f"{limit}"]
    assert "lower --policy-batch-tokens" in refused(*flags, "--accumulate", "2")
    assert "lower --warmup-len, --vocab-size or --accumulate" in refused(
        *flags, "--warmup-len", "2"
    )
    run = prepared(*flags)
    rows = len(run.tokenizer.get_vocab()) - len(evaluation.special_ids(run.tokenizer))
    assert 3000 < rows * max(map(len, run_batches(run))) <= 4096


def run_batches(run):
    config = run.config
    return train.Batches(run.data["train"], config.policy_batch_tokens, config.seed).order


def test_a_swap_gap_that_cannot_be_measured_is_said_once(tmp_path, capsys):
    trained(tmp_path / "a")
    assert "swap_gap" not in capsys.readouterr().out
    trained(tmp_path / "b", "--eval-samples", "30")
    assert capsys.readouterr().out.count("no swap_gap: lower --eval-samples") == 1
    stages = [line for line in lines_of(tmp_path / "b", "valid") if line["stage"] == "policy"]
    assert len(stages) == 3 and all("swap_gap" not in line for line in stages)


def test_a_run_can_be_opened_for_a_notebook(finished_run):
    run = evaluation.open_run(finished_run, "policy", beams=1)
    assert run.config.beams == 1 and run.spec.length == 2 and not run.model.training
    assert math.isfinite(evaluation.validate(run, run_data(run))["swap_gap"])
    run = evaluation.open_run(finished_run)
    assert run.model is None and run.spec is None


def run_data(run):
    splits, _ = train.load(run.config)
    return train.encode_split(run.tokenizer, splits["valid"], run.config, "valid")
