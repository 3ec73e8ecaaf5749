"""train.py and eval.py: resumed runs are the same runs, the step is right, results reproduce."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import data as datasets
import eval as evaluation
import model as transformer
import train
import warmup
from conftest import TINY
from data import TASKS, Config, collate, flag_name, load, read_config
from model import load_checkpoint
from warmup import Batch, WarmupSpec, all_warmups, sft_loss, score, target_tokens, warmup_loss


def log_of(folder, kind=None):
    lines = [
        json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if kind in (None, line["kind"])]


def rows_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]


def state_of(folder):
    return load_checkpoint(folder / "last.pt", "state")["state"]


def costs_of(folder):
    """Stage -> updates, FLOPs, seconds."""
    return {
        stage: evaluation.training_cost(folder, stage) for stage in ("sft", "policy", "control")
    }


def prepared(tmp_path, *flags):
    """A run that has not begun to train."""
    config, _ = train.parse(["--task", "wmt", *TINY, *flags, "--out", str(tmp_path / "r")])
    return train.prepare(config, resume=False)


def stop_at(monkeypatch, stage, step, killed=False):
    """As if Ctrl-C came during that update; killed: twice, so that nothing more is saved."""
    log = train.log

    def interrupting(run, kind, numbers):
        log(run, kind, numbers)
        if kind == "train" and (run.state.stage, run.state.step) == (stage, step):
            run.stop = True
            if killed:
                run.stop = -9.0
                run.interrupt(signal.SIGINT, None)

    monkeypatch.setattr(train, "log", interrupting)


# ----------------------------------------------------------------------------- resume


WITH_DROPOUT = ["--task", "wmt", *TINY, "--dropout", "0.3", "--built-in-size", "80", "--beams", "1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run WITH_DROPOUT that nothing interrupted. Shared: read it, do not change it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*WITH_DROPOUT, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    "stage, step, killed",
    [
        ("sft", 3, False),
        ("sft", 4, False),
        ("policy", 1, False),
        ("control", 1, False),
        ("policy", 3, False),
        ("policy", 1, True),
        ("policy", 3, True),
    ],
)
def test_a_resumed_run_is_the_same_run_bit_for_bit(
    stage, step, killed, whole, tmp_path, monkeypatch, capsys
):
    """N updates = n, interrupt, resume, N - n: weights, optimizer, every number. Dropout is on."""
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        stop_at(patch, stage, step, killed)
        assert train.main([*WITH_DROPOUT, "--out", str(parts)]) == 1
    assert f"--resume {parts}" in capsys.readouterr().err
    assert not (parts / "results.json").exists() and state_of(parts)["stage"] == stage
    assert train.main(["--resume", str(parts)]) == 0
    a, b = (load_checkpoint(f / "last.pt", "state") for f in (whole, parts))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    moments = [checkpoint["optimizer"]["state"] for checkpoint in (a, b)]
    assert all(
        torch.equal(moments[0][i][name], moments[1][i][name])
        for i in moments[0]
        for name in moments[0][i]
    )
    assert a["batches"] == b["batches"]
    timeless = [[line | {"seconds": 0} for line in log_of(f)] for f in (whole, parts)]
    assert timeless[0] == timeless[1]
    rows = [[row | {"seconds": 0} for row in rows_of(f)] for f in (whole, parts)]
    assert rows[0] == rows[1]


def test_resuming_a_finished_run_prints_its_table_again(finished_run, capsys):
    before = json.loads((finished_run / "results.json").read_text(encoding="utf-8"))
    assert train.main(["--resume", str(finished_run)]) == 0
    assert json.loads((finished_run / "results.json").read_text(encoding="utf-8")) == before
    assert "sft, same compute" in capsys.readouterr().out


def test_log_lines_after_the_checkpoint_are_forgotten(tmp_path):
    """A killed run may have logged updates that last.pt does not hold; resuming repeats them."""
    run = prepared(tmp_path)
    train.log(run, "train", {"loss": 1.0})
    train.save_state(run)
    train.log(run, "train", {"loss": 2.0})
    train.restore(run)
    assert [line["loss"] for line in log_of(run.config.folder)] == [1.0]


@pytest.mark.parametrize("column", ["source", "target"])
def test_other_data_is_not_trained_on_after_resuming(column, tmp_path):
    run = prepared(tmp_path)
    train.restore(run)
    rows = run.examples["train"]
    rows[7] = rows[7]._replace(**{column: "x"})
    other = replace(run, checksum=train.checksum(run.examples))
    with pytest.raises(train.UserError, match="not what"):
        train.restore(other)


def test_a_run_that_moved_is_resumed_with_other_device_threads_and_data(
    tmp_path, monkeypatch, capsys
):
    text, run = tmp_path / "text", tmp_path / "run"
    text.mkdir()
    for split, lines in (("train", 40), ("valid", 8)):
        for language, word in (("de", "Hund"), ("en", "dog")):
            (text / f"{split}.{language}").write_text(
                "".join(f"{word} {n} {word}\n" for n in range(lines)), encoding="utf-8"
            )
    with monkeypatch.context() as patch:
        stop_at(patch, "sft", 2)
        patch.setattr(torch, "set_num_threads", lambda number: None)  # where others run: slow
        flags = [*TINY, "--threads", "2", "--policy-steps", "0", "--data", str(text)]
        assert train.main([*flags, "--out", str(run)]) == 1
    moved = text.rename(tmp_path / "moved")
    assert train.main(["--resume", str(run)]) == 1
    assert str(text) in capsys.readouterr().err.splitlines()[-1]
    torch.set_num_threads(2)
    flags = ["--threads", "1", "--device", "cpu", "--data", str(moved)]
    assert train.main(["--resume", str(run), *flags]) == 0
    assert torch.get_num_threads() == 1 and f"data: {moved}" in capsys.readouterr().out
    assert [line["step"] for line in log_of(run, "train")] == [1, 2, 3, 4]
    assert json.loads((run / "results.json").read_text(encoding="utf-8"))["config"]["data"] == str(
        moved
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--seed 1",
        "--task wmt",
        "--samples 2",
        "--init x",
        "--overwrite",
        "--no-control",
        "--out elsewhere",
    ],
)
def test_a_resumed_run_takes_no_other_settings(flags, finished_run, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", str(finished_run), *flags.split()])
    assert (
        stop.value.code == 2
        and flags.split()[0].replace("no-", "") in (capsys.readouterr().err.splitlines()[0])
    )


def test_the_training_split_is_scored_whole(finished_run, tmp_path, capsys):
    """Long pairs are left out of training only: else line i would be scored against line i + 1."""
    folder = shutil.copytree(finished_run, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps(config | {"max_source_tokens": 12}), encoding="utf-8"
    )
    assert evaluation.main([str(folder), "--split", "train", "--stage", "sft"]) == 0
    assert "their source loses its end" in capsys.readouterr().out
    assert (
        len((folder / "train.sft.txt").read_text(encoding="utf-8").splitlines())
        == config["built_in_size"]
    )


def test_a_run_remembers_its_data(finished_run, tmp_path, monkeypatch):
    """Data prepared later in data/wmt must not slip under a run on the built-in data."""
    (tmp_path / "data" / "wmt" / "de-en").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(train.UserError, match="no train split"):
        load(Config())
    assert read_config(finished_run).data == "built-in"
    assert evaluation.main([str(finished_run), "--stage", "sft"]) == 0


# ----------------------------------------------------------------------------- the step


def test_unequal_micro_batches_give_the_gradient_of_the_joined_batch(tmp_path, monkeypatch):
    """--accumulate 3: the loss summed over all micro-batches, divided once by all their tokens."""
    run = prepared(
        tmp_path, "--dropout", "0", "--accumulate", "3", "--sft-steps", "1", "--policy-steps", "0"
    )
    run.model.double()
    index = [[0, 1, 2, 3, 4], [5], [6, 7]]
    pick = lambda rows: collate([run.data["train"][i] for i in rows])  # noqa: E731
    micro = iter([pick(rows) for rows in index])
    monkeypatch.setattr(type(run.batches), "__next__", lambda self: next(micro))
    seen = []

    def clip(parameters, norm):
        seen.extend(p.grad.clone() for p in parameters)
        return torch.ones(())

    monkeypatch.setattr(train, "clip_grad_norm_", clip)
    train.train(run)
    with transformer.own_draws(run.device, run.config.seed, "weights"):
        model = train.EncoderDecoder(run.model.config).double()  # the same initial weights
    joined = pick(sum(index, []))
    (sft_loss(model, joined) / target_tokens(joined)).backward()
    assert len(seen) == len(list(model.parameters()))
    for a, b in zip(seen, (p.grad for p in model.parameters())):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_learning_rate_rises_then_falls_to_zero(tmp_path):
    run = prepared(tmp_path, "--sft-steps", "100", "--lr-rampup-steps", "10", "--lr", "0.01")
    rates = []
    for run.state.step in range(100):
        rates.append(train.learning_rate(run.config, run.state))
    assert max(rates) == pytest.approx(0.01, rel=0.01) and rates.index(max(rates)) == 10
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 2e-4


@pytest.mark.parametrize("total, ramp", [(40, 10), (41, 10), (3, 0), (800, 100)])
def test_the_rise_takes_at_most_a_quarter_of_the_stage(total, ramp, tmp_path):
    run = prepared(tmp_path, "--lr-rampup-steps", "100", "--lr", "0.01")
    run.state.total = total
    rates = []
    for run.state.step in range(total):
        rates.append(train.learning_rate(run.config, run.state))
    assert rates.index(max(rates)) == ramp and max(rates) == pytest.approx(0.01)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_spoils_no_file(norm, tmp_path, monkeypatch):
    run = prepared(tmp_path, "--policy-steps", "0", "--sft-steps", "4", "--eval-every", "1")
    real, calls = train.clip_grad_norm_, []

    def clip(parameters, limit):
        calls.append(real(parameters, limit))
        return calls[-1] if len(calls) < 3 else torch.tensor(norm)

    monkeypatch.setattr(train, "clip_grad_norm_", clip)
    with pytest.raises(
        train.UserError, match=f"the gradient became {norm}: start again, lower --lr"
    ):
        train.train(run)
    assert state_of(run.config.folder)["step"] == 2
    saved = load_checkpoint(run.config.folder / "last.pt", "state")["model"]
    assert all(weights.isfinite().all() for weights in saved.values())


def test_position_biases_and_gains_are_not_decayed():
    model = train.EncoderDecoder(train.ModelConfig(**train.SIZES["nano"]))
    decayed, free = groups = train.make_optimizer(model, 0.1).param_groups
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("norm" in names[id(p)] or "biases" in names[id(p)] for p in free["params"])


def test_the_optimizer_forgets_as_fast_as_transformers_need():
    """The second beta is 0.98: with torch's 0.999, 100 updates would hardly fill its average."""
    model = train.EncoderDecoder(train.ModelConfig(**train.SIZES["nano"])).double()
    optimizer = train.make_optimizer(model, 0.0)
    weight = model.embedding.weight
    parameter, gradients = weight.detach()[0, 0].clone(), (2.0, -0.5, 1.0)
    m = v = 0.0
    for step, gradient in enumerate(gradients, 1):
        weight.grad = torch.full_like(weight, gradient)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.98 * v + 0.02 * gradient**2
        parameter -= 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.98**step)) ** 0.5 + 1e-9)
        assert weight[0, 0].item() == pytest.approx(parameter.item(), abs=1e-12)


@pytest.mark.parametrize("flags, both", [(["--recompute"], True), ([], False)])
def test_recompute_reaches_encoder_and_decoder(flags, both, tmp_path):
    model = prepared(tmp_path, *flags).model
    assert (model.encoder.recompute, model.decoder.recompute) == (both, both)


@pytest.mark.parametrize("estimator", ["marginal", "frozen", "pause", "sft"])
def test_decoder_dropout_is_off_in_both_later_stages(estimator, tmp_path, monkeypatch):
    """Of baselines and control, too: else dropout is a second difference. Encoder dropout stays."""
    original, seen = train.batch_loss, {}

    def watched(run, batch):
        def note(decoder, _):
            encoder = {module.training for module in run.model.encoder.modules()}
            decoder = {module.training for module in decoder.modules()}
            seen.setdefault(run.state.stage, []).append((encoder, decoder))

        hook = run.model.decoder.register_forward_pre_hook(note)
        result = original(run, batch)
        hook.remove()
        return result

    monkeypatch.setattr(train, "batch_loss", watched)
    train.train(prepared(tmp_path, "--estimator", estimator, "--built-in-size", "40"))
    assert list(seen) == ["sft", "policy", "control"]
    assert all(modes == ({True}, {True}) for modes in seen["sft"])
    assert all(modes == ({True}, {False}) for modes in seen["policy"] + seen["control"])


# ----------------------------------------------------------------------------- equal compute


TINY_MODEL = transformer.SIZES["tiny"] | dict(vocab_size=4000)
SHAPES = {  # B, S, P, T; K, W; the model's config
    "toy": ((12, 16, 2, 2), (8, 1), transformer.SIZES["toy"] | dict(vocab_size=280)),
    "wmt": ((4, 24, 1, 22), (4, 4), TINY_MODEL),
    "xsum": ((2, 512, 0, 40), (4, 8), TINY_MODEL),
    "gated, untied": ((2, 40, 1, 30), (2, 3), TINY_MODEL | dict(gated=True, tied=False)),
    "a long prompt": ((2, 20, 30, 4), (5, 8), TINY_MODEL | dict(shared_bias=False)),
    "heads wider than the model": ((2, 30, 1, 20), (2, 2), TINY_MODEL | dict(head_size=64)),
}


def counted(shape):
    """A model, a batch with padding on both sides, and what counts a loss's FLOPs with backward."""
    torch.manual_seed(0)
    (B, S, P, T), _, settings = SHAPES[shape]
    model = transformer.EncoderDecoder(transformer.ModelConfig(**settings))
    V = settings["vocab_size"]
    batch = Batch(torch.randint(5, V, (B, S)), torch.full((B, P), 5), torch.randint(5, V, (B, T)))
    batch.source[0, S // 2 :] = batch.target[1, T // 2 :] = 0
    model.decoder.eval()

    def flops(loss):
        with FlopCounterMode(display=False) as counter:
            loss(model, batch).backward()
        return counter.get_total_flops()

    return model, batch, flops


@pytest.fixture
def countable_attention(monkeypatch):
    """torch's counter does not know the fused kernel of the CPU."""
    monkeypatch.setattr(transformer, "attention", transformer.plain_attention)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_flops_of_an_sft_update_are_those_that_torch_counts(shape, countable_attention):
    model, batch, flops = counted(shape)
    assert train.sft_flops(model, batch) == pytest.approx(flops(sft_loss), rel=0.03)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("estimator", ["marginal", "frozen"])
@pytest.mark.parametrize("repeats", [False, True])
def test_the_flops_of_a_warmup_update_are_those_that_torch_counts(
    estimator, shape, repeats, countable_attention, monkeypatch
):
    """Sampling reads a prefix once an example, then a token at a time. It has no backward pass.

    repeats: all warmups of the first example are equal, and two of each other: computed once.
    """
    (B, *_), (K, W), _ = SHAPES[shape]
    model, batch, flops = counted(shape)
    spec = WarmupSpec(3, (0, 1, 2, 3), W)
    seen, sample_warmups = {}, warmup.sample_warmups

    def repeated(model, memory, prompt, spec, samples):
        c = sample_warmups(model, memory, prompt, spec, samples)
        c[:] = torch.arange(5, 5 + K)[:, None]  # else all differ
        if repeats:
            c[0], c[:, 1] = c[0, 0], c[:, 0]
        return c

    def loss(model, batch):
        seen["loss"] = warmup_loss(model, batch, spec, estimator, K)
        return seen["loss"].loss

    monkeypatch.setattr(warmup, "sample_warmups", repeated)
    torchs, rows = flops(loss), seen["loss"].rows
    assert rows.tolist() == ([1] + [K - 1] * (B - 1) if repeats else [K] * B)
    ours = train.policy_flops(model, batch, spec, rows, sampled=K)
    assert ours == pytest.approx(torchs, rel=0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_flops_of_a_pause_update_are_those_that_torch_counts(shape, countable_attention):
    (K, W), (model, batch, flops) = SHAPES[shape][1], counted(shape)
    spec = WarmupSpec(3, (0, 1, 2, 3), W, pause=True)
    torchs = flops(lambda model, batch: warmup_loss(model, batch, spec, "pause", K).loss)
    rows = torch.ones(len(batch.source), dtype=torch.long)
    assert train.policy_flops(model, batch, spec, rows, 0) == pytest.approx(torchs, rel=0.03)


@pytest.mark.parametrize("estimator", ["marginal", "exact", "truncated", "frozen", "pause", "sft"])
def test_a_run_counts_the_flops_that_torch_counts(estimator, tmp_path, countable_attention):
    """Of a policy update as batch_loss does it, with its own K, W and ways of sampling."""
    config, _ = train.parse(
        [
            "--task",
            "toy",
            "--symbols",
            "5",
            "--built-in-size",
            "60",
            "--samples",
            "4",
            "--policy-batch-tokens",
            "100",
            "--estimator",
            estimator,
            "--out",
            str(tmp_path / "r"),
        ]
    )
    run = train.prepare(config, resume=False)
    train.validate_and_save(run)  # sft.pt, from which the policy stage begins
    train.start_stage(run, "policy")
    run.model.train()
    batch = next(run.batches)
    with FlopCounterMode(display=False) as counter:
        loss, _, counts = train.batch_loss(run, batch)
        loss.backward()
    assert counts["flops"] == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_the_control_costs_what_the_warmup_stage_costs(finished_run):
    """Its number of updates = policy FLOPs / (SFT FLOPs per update), rounded; all are logged."""
    sft, policy, control = costs = costs_of(finished_run).values()
    wanted = policy["flops"] / (sft["flops"] / sft["updates"])
    assert control["updates"] == max(1, round(wanted)) and wanted > 1.5
    assert all(cost["flops"] > 0 for cost in costs)
    assert [cost["updates"] for cost in costs] == [4, 3, round(wanted)]
    rows = rows_of(finished_run)
    assert rows[0]["flops"] == sft["flops"]
    assert rows[1]["flops"] == sft["flops"] + policy["flops"]
    assert rows[2]["flops"] == sft["flops"] + control["flops"]


def test_even_a_cheap_warmup_stage_gives_the_control_one_update(tmp_path):
    run = prepared(tmp_path)
    train.validate_and_save(run)  # sft.pt, from which the control begins
    for policy, updates in ((1, 1), (149, 1), (151, 2), (1000, 10)):
        costs = [("sft", 100, 1.0)] * 3 + [("policy", 0, 33.0)] * 6 + [("policy", policy, 1.0)]
        lines = [
            dict(kind="train", stage=stage, flops=flops, seconds=seconds)
            for stage, flops, seconds in costs
        ]
        (run.config.folder / "log.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
        train.start_stage(run, "control")
        assert run.state.total == updates


def test_a_slow_machine_prints_the_same_table(tmp_path, monkeypatch, capsys):
    """All but the seconds: the control's number of updates depends on no clock."""
    original, clock, tables, finished = train.batch_loss, time.perf_counter, [], []
    late = [0.0]  # seconds by which the clock of the slow machine is ahead
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])

    def slow(run, batch):
        late[0] += 60 if run.state.stage == "sft" else 0
        return original(run, batch)

    for name in ("fast", "slow"):
        if name == "slow":
            monkeypatch.setattr(train, "batch_loss", slow)
        flags = [*TINY, "--beams", "1", "--built-in-size", "80", "--out", str(tmp_path / name)]
        assert train.main(flags) == 0
        table = capsys.readouterr().out.split("wmt de-en, test split")[1].split("\nsaved")[0]
        tables.append(table.splitlines())
        finished.append(costs_of(tmp_path / name))
    is_row = [re.match(r"(sft|sft, same compute|warmup) +\d", line) for line in tables[0]]
    assert sum(map(bool, is_row)) == 3
    timeless = [
        [line[:-9] if row else line for line, row in zip(table, is_row)] for table in tables
    ]
    assert tables[0] != tables[1] and timeless[0] == timeless[1]  # the seconds differ, nothing else
    assert finished[1]["sft"]["seconds"] > finished[0]["sft"]["seconds"] + 200
    assert all(
        finished[0][stage][cost] == finished[1][stage][cost]
        for stage in ("sft", "policy", "control")
        for cost in ("updates", "flops")
    )


# ----------------------------------------------------------------------------- a whole run


def test_a_run_leaves_what_the_readme_says(finished_run):
    have = {path.name for path in finished_run.iterdir()}
    assert {
        "config.json",
        "tokenizer.json",
        "log.jsonl",
        "last.pt",
        "sft.pt",
        "policy.pt",
        "control.pt",
        "results.json",
    } <= have
    assert not any(name.endswith(".tmp") for name in have)
    results = json.loads((finished_run / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {
        "split",
        "rows",
        "ceiling",
        "signature",
        "config",
        "data_checksum",
        "versions",
        "device",
        "processes",
    }
    assert [results["config"][name] for name in ("task", "pair", "data")] == [
        "wmt",
        "de-en",
        "built-in",
    ]
    assert results["split"] == "test"
    assert [row["name"] for row in results["rows"]] == ["sft", "warmup", "sft, same compute"]
    for row in results["rows"]:
        assert set(row) == {
            "stage",
            "name",
            "metrics",
            "nll",
            "updates",
            "flops",
            "seconds",
            "at_limit",
        }
        assert set(row["metrics"]) == {"BLEU", "chrF++"} and 0 < row["nll"] < math.inf
    assert all(90 < score <= 100 for score in results["ceiling"].values())  # some are cut
    assert results["rows"][0]["updates"] == 4 and results["rows"][1]["updates"] == 4 + 3
    assert "tok:13a" in results["signature"]["BLEU"]


def test_a_finished_run_stands_at_the_end_of_its_last_stage(finished_run):
    state = state_of(finished_run)
    assert state["stage"] == "control" and state["step"] == state["total"] > 0


def test_both_later_stages_start_from_the_best_sft_weights(finished_run):
    """Validation before the first update: the control is exactly where SFT was best."""
    lines = log_of(finished_run, "valid")
    best = min(line["nll"] for line in lines if line["stage"] == "sft")
    first = next(line for line in lines if line["stage"] == "control")
    assert first["step"] == 0 and first["nll"] == pytest.approx(best, abs=1e-6)


def test_the_best_checkpoint_is_kept_not_the_last(tmp_path, monkeypatch):
    scores, seen = iter([3.0, 1.0, 2.0]), []

    def validate(run, data):
        seen.append(run.model.embedding.weight.detach().clone())
        return {"nll": next(scores)}

    monkeypatch.setattr(train, "validate", validate)
    train.train(prepared(tmp_path, "--policy-steps", "0", "--sft-steps", "3", "--eval-every", "1"))
    kept = load_checkpoint(tmp_path / "r" / "sft.pt")["model"]["embedding.weight"]
    assert [torch.equal(kept, weight) for weight in seen] == [False, True, False]


def test_the_cost_of_stages_is_that_of_their_logged_updates(tmp_path):
    lines = [
        dict(kind="train", stage=stage, flops=10**20 + n, seconds=n / 4)
        for n, stage in enumerate(["sft", "sft", "policy", "control"])
    ]
    lines.insert(1, dict(kind="valid", stage="sft", step=1, nll=1.0))
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    cost = evaluation.training_cost(tmp_path, "sft", "policy")
    assert cost == {"updates": 3, "flops": 3 * 10**20 + 3, "seconds": 0.8}
    for broken in ("{", "[]", '{"kind": "train"}'):
        log.write_text(broken + "\n", encoding="utf-8")
        with pytest.raises(train.UserError, match="log.jsonl is incomplete .* bring it back"):
            evaluation.training_cost(tmp_path, "sft")


def test_eval_reproduces_the_table(finished_run, capsys):
    assert evaluation.main([str(finished_run)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"BLEU +chrF\+\+ +NLL/token +updates +TFLOP +seconds\n", out)
    for row in rows_of(finished_run):
        line = next(line for line in out.splitlines() if line.startswith(row["name"] + "  "))
        numbers = [float(word) for word in line[20:].split()]
        assert numbers[:2] == pytest.approx(list(row["metrics"].values()), abs=6e-3)
        assert numbers[2] == pytest.approx(row["nll"], abs=6e-4) and numbers[3] == row["updates"]
        assert numbers[4] == pytest.approx(row["flops"] / 1e12, abs=6e-3)
        assert numbers[5] == pytest.approx(row["seconds"], abs=0.6)
    assert "note: this run is not finished" not in out
    assert len((finished_run / "test.policy.txt").read_text(encoding="utf-8").splitlines()) == 30


def test_the_table_counts_in_tflop(capsys):
    row = dict(
        stage="sft",
        name="sft",
        metrics={"BLEU": 1.5},
        nll=2.5,
        updates=300,
        flops=1234_567_000_000_000,
        seconds=61.0,
        at_limit=0,
    )
    best = {"BLEU": 99.987}
    evaluation.print_table(dict(split="test", rows=[row], ceiling=best, signature={}), Config(), 1)
    out = capsys.readouterr().out
    assert re.search(r"\nsft +1\.50 +2\.500 +300 +1,234\.57 +61\nceiling +99\.99\n", out)
    row |= dict(updates=24000, flops=113 * 10**15, seconds=720000.0)  # columns do not run together
    evaluation.print_table(dict(split="test", rows=[row], ceiling=best, signature={}), Config(), 1)
    assert re.search(r"\nsft +1\.50 +2\.500 +24000 +113,000\.00 +720000\n", capsys.readouterr().out)


def test_monte_carlo_scores_draw_the_same_warmups_every_time(finished_run, monkeypatch):
    """The NLL is estimated from samples: validate seeds them (stand-in: a random number)."""
    drawn = lambda *_: {("nll", "token"): torch.rand(())}  # noqa: E731
    monkeypatch.setattr(evaluation, "evaluate_warmups", drawn)
    examples = load(Config(data="built-in", built_in_size=8))[0]["test"]
    run = evaluation.open_run(finished_run)
    before = torch.get_rng_state()
    first, second = [
        evaluation.score_run(run, ["policy"], examples, "test")[0]["rows"][0]["nll"]
        for _ in range(2)
    ]
    assert first == second and torch.equal(before, torch.get_rng_state())


def test_translating_keeps_line_order_and_count(finished_run, tmp_path, capsys):
    lines = ["Die Frau schläft.", "Heute arbeitet der alte Mann.", "Anna kauft 17 Bücher."]
    one_by_one = []
    for line in lines:
        (tmp_path / "one").write_text(line + "\n", encoding="utf-8")
        assert evaluation.main([str(finished_run), "--input", str(tmp_path / "one")]) == 0
        one_by_one.append(capsys.readouterr().out)
    (tmp_path / "all").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = ["--input", str(tmp_path / "all"), "--show-warmup"]
    assert evaluation.main([str(finished_run), *flags]) == 0
    together = capsys.readouterr().out.splitlines(keepends=True)
    assert [row.split("\t")[1] for row in together] == one_by_one and len(together) == 3
    assert evaluation.main([str(finished_run), *flags, "--stage", "sft"]) == 0
    assert "\t" not in capsys.readouterr().out  # after SFT there is no warmup to show


def test_the_prompt_of_new_text_names_the_target_language(tmp_path, monkeypatch):
    folder, seen, original = tmp_path / "run", [], evaluation.generate
    flags = [*TINY, "--pair", "en-de", "--policy-steps", "0"]
    assert train.main(["--task", "wmt", *flags, "--out", str(folder)]) == 0

    def watched(model, batch, *more, **flags):
        seen.append(batch.prompt)
        return original(model, batch, *more, **flags)

    monkeypatch.setattr(evaluation, "generate", watched)
    (tmp_path / "in.txt").write_text("A child.\n", encoding="utf-8")
    assert evaluation.main([str(folder), "--input", str(tmp_path / "in.txt")]) == 0
    tokenizer = evaluation.load_tokenizer(folder / "tokenizer.json")
    assert [tokenizer.id_to_token(int(prompt)) for prompt in seen] == ["<2de>"]


def test_log_holds_the_diagnostics(finished_run):
    policy = [line for line in log_of(finished_run) if line["stage"] == "policy"]
    names = {"reward", "spread", "ess", "entropy", "distinct", "nll", "loss", "grad_norm", "flops"}
    assert names <= set(next(line for line in policy if line["kind"] == "train"))
    assert {"swap_gap", "over_empty", "nll"} <= set(
        next(line for line in policy if line["kind"] == "valid")
    )


def test_sampled_validation_nll_is_an_upper_bound_on_average(tmp_path):
    """Jensen: E[-log mean_k p_k] >= -log E[p]; with more samples the bound gets tighter."""
    config, _ = train.parse(
        [
            "--task",
            "toy",
            "--symbols",
            "5",
            "--built-in-size",
            "60",
            "--batch-tokens",
            "4000",
            "--out",
            str(tmp_path / "r"),
        ]
    )
    run = train.prepare(config, resume=False)
    for p in run.model.parameters():  # so that the warmup matters
        p.data += 0.5 * torch.randn_like(p)
    model, data = run.model.eval(), run.data["valid"]
    spec = evaluation.warmup_spec("policy", config, run.tokenizer)
    batch = collate(data)
    c = all_warmups(spec, model.config.vocab_size).expand(len(batch.source), -1, -1)
    with torch.no_grad():
        memory = model.encode(batch.source)
        log_pi, log_p, _ = score(model, memory, batch, c, spec)
    exact = -(log_pi + log_p).logsumexp(1).sum() / target_tokens(batch)
    means = []
    for K in (1, 8):
        run.spec, total = spec, 0.0
        for seed in range(40):  # of the draws
            run.config = replace(config, eval_samples=K, seed=seed)
            total += evaluation.validate(run, data)["nll"]
        means.append(total / 40)
    few, many = means
    assert exact < many < few


# ----------------------------------------------------------------------------- the command line


def entries_of_help(program, capsys, *flags) -> dict[str, str]:
    """Flag -> what --help says of it, on one line. Wide: no word is broken at its hyphen."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setenv("COLUMNS", "500")
        program.main([*flags, "--help"])
    assert stop.value.code == 0
    _, *entries = re.split(r"\n  (?=--)", capsys.readouterr().out)
    return {re.split(r"[ ,]", entry)[0]: " ".join(entry.split()) for entry in entries}


@pytest.mark.parametrize("task", TASKS)
def test_help_gives_the_meaning_range_and_default_of_every_flag(task, capsys):
    """To the last character. With --task: the defaults of that task."""
    entries, numbers = entries_of_help(train, capsys, "--task", task), 0
    settings = fields(Config)
    assert set(entries) == {"--resume", *(flag_name(f.name) for f in settings)}
    for f in settings:
        text, (low, high), choices = f.metadata.values()
        default, name = TASKS[task].settings.get(f.name, f.default), flag_name(f.name)
        start = f"{name} {f.name.upper()}"
        if choices:
            start = f"{name} {{{','.join(choices)}}}"
        if f.type is bool:
            start = f"{name}, --no-{name[2:]}"
        if f.type in (int, float):
            assert low <= default <= high and text.endswith(f" [{low} to {high}]")
            numbers += 1
        assert text and entries[name] == f"{start} {text} (default: {default})"
    assert numbers > 20


def test_help_of_the_other_programs_gives_every_default(capsys, monkeypatch):
    """Flags that have no default do nothing unless they are given."""
    entries = entries_of_help(evaluation, capsys)
    without = {"--input", "--export", "--show-warmup", "--show", "--plot"}
    defaults = {"--split": "test", "--stage": "all"}
    of_the_run = {"beams", "max_target_tokens", "batch_tokens", "data", "device", "threads"}
    assert set(entries) == without | set(defaults) | set(map(flag_name, of_the_run))
    for flag, default in defaults.items():
        assert f"default: {default}" in entries[flag], flag
    for name in of_the_run:  # as train.py says it; a run has settings of its own, so no default
        f = Config.__dataclass_fields__[name]
        assert f.metadata["help"] in entries[flag_name(name)]
        assert "default:" not in entries[flag_name(name)]
    settings = Config(beams=7, data="here", device="cpu", threads=3)
    monkeypatch.setattr(evaluation, "read_config", lambda folder: settings)
    given, used = evaluation.parse(["run"])
    assert not given.show_warmup and used == {}
    one_of = ("split", "stage", "input", "export", "show", "plot")
    assert {getattr(given, name) for name in one_of} == {None}
    given, used = evaluation.parse(["run", "--beams", "2", "--data", "", "--threads", "0"])
    assert used == dict(beams=2, data="", threads=0)
    entries = entries_of_help(datasets, capsys)
    assert set(entries) == {"--pair", "--out"}
    assert entries["--pair"].endswith("(default: de-en)")
    assert entries["--out"].endswith("(default: where train.py looks)")


def test_every_end_of_a_range_is_accepted_and_nothing_beyond(capsys):
    alone = {"--samples": ["--policy-steps", "0"]}
    for f in fields(Config):
        if f.type not in (int, float):
            continue
        flag, (low, high) = "--" + f.name.replace("_", "-"), f.metadata["limits"]
        for value in (low, high):
            config, _ = train.parse([*alone.get(flag, []), f"{flag}={value}"])
            assert getattr(config, f.name) == value
        for value in (low - 1, high * 2):
            with pytest.raises(SystemExit) as stop:
                train.parse([*alone.get(flag, []), f"{flag}={value}"])
            assert stop.value.code == 2 and flag in capsys.readouterr().err.splitlines()[0]


def test_importing_has_no_side_effects():
    """Any function can be imported by a student: no output, no seeding, no argument parsing."""
    code = (
        "import torch; s = torch.get_rng_state(); import train, eval, sys; "
        "sys.exit(not torch.equal(s, torch.get_rng_state()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-such-flag"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_out_of_memory_names_the_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "batch_loss", lambda run, batch: torch.empty(2**60))
    assert train.main(["--task", "wmt", *TINY, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.splitlines()[-1].rpartition("\r")[2]
    assert error.startswith("error: out of memory") and "--batch-tokens" in error
    assert "--policy-batch-tokens" in error and "--recompute" in error


def test_out_of_memory_while_decoding_keeps_what_was_trained(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    monkeypatch.setattr(evaluation, "generate", lambda *_, **__: torch.empty(2**60))
    flags = [*TINY, "--policy-steps", "0", "--out", str(folder)]  # SFT is decoded first
    for program, argv in ((train, ["--task", "wmt", *flags]), (evaluation, [str(folder)])):
        assert program.main(argv) == 1
        error = capsys.readouterr().err.splitlines()[-1].rpartition("\r")[2]
        assert error.startswith("error: out of memory") and "--beams" in error
    monkeypatch.undo()
    assert evaluation.main([str(folder), "--beams", "1"]) == 0


def test_compile_makes_a_handful_of_graphs_and_changes_nothing(monkeypatch):
    """Eight shapes of batch; SFT, warmups, validation: the same losses and gradients."""
    from torch._dynamo.testing import CompileCounter

    from warmup import evaluate_warmups

    torch.manual_seed(0)
    model = transformer.EncoderDecoder(
        transformer.ModelConfig(
            vocab_size=40,
            width=16,
            heads=2,
            head_size=8,
            ff=32,
            encoder_layers=1,
            decoder_layers=1,
            dropout=0.0,
        )
    )
    spec, results, counter = WarmupSpec(3, (0, 1, 2, 3), 4), [], CompileCounter()
    plain = torch.nn.Module.compile
    counted = lambda module, **how: plain(module, backend=counter, **how)
    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    for compiled in (False, True):
        if compiled:
            train.compile_stacks(model)
        torch.manual_seed(1)
        numbers = []
        for _ in range(8):
            B, S, T = torch.randint(0, 5, (3,)) + torch.tensor([4, 10, 20])
            batch = Batch(
                torch.randint(4, 40, (B, S)), torch.full((B, 1), 5), torch.randint(4, 40, (B, T))
            )
            model.train()
            loss = sft_loss(model, batch)
            model.decoder.eval()
            numbers += [loss.detach(), *warmup_loss(model, batch, spec, samples=3)[1].values()]
            (loss + warmup_loss(model, batch, spec, samples=3)[0]).backward()
            numbers += evaluate_warmups(model.eval(), batch, spec, 2).values()
        results.append((numbers, [p.grad for p in model.parameters()]))
        model.zero_grad()
    torch.testing.assert_close(*results)
    assert 1 <= counter.frame_count <= 8, counter.frame_count
