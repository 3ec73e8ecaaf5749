"""What each stage does, seen from inside: what it calls, with what. Runs of all kinds are watched.

Tiny runs write empty lines, and both sides of a comparison may share a mistake. So here we look at
arguments. Every setting has a value of its own: no two can be taken for each other.

Each of these was planted once to see a test fail:
    control trained at --lr                          test_each_stage_has_its_learning_rate
    control with the policy stage's batches          test_each_stage_has_its_batch_tokens
    validation counted as training                   test_validation_costs_no_training
    FLOPs of a validation logged as an update's      test_the_cost_of_a_stage_is_…
    SFT's validation NLL doubled                     test_validation_is_the_loss_of_each_…
    encoder dropout off in the policy stage          test_train.py: test_decoder_dropout_is_off_…
    a baseline with more or less dropout             test_train.py: test_decoder_dropout_is_off_…
    no clipping of gradients                         test_gradients_are_clipped
    beams ignored; --length-penalty not passed on    test_decoding_is_by_the_settings
    a sampled warmup at test time                    test_warmup.py: test_generate_writes_the_…
    validation with --samples                        test_validation_draws_eval_samples
    outputs cut by the length of a source             test_decoding_is_by_the_settings
    --eval-decode: other examples as text            test_the_first_validation_examples_…
    swap_gap divided by all examples                 test_means_are_per_token_…
    --temperature, --warmup-len ignored              test_the_warmup_is_that_of_the_settings
    --input without a pretrained model's prefix      test_new_text_for_a_pretrained_model_…
    SFT for the baseline, with a control             test_the_command_for_sacrebleu_…
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import train
from conftest import TINY
from data import Config, Example, collate, encode_split, flag_name, read_config, special_ids
from warmup import Batch, WarmupSpec, sample_warmups, score, sft_loss

SETTINGS = dict(
    built_in_size=140,
    sft_steps=4,
    policy_steps=5,
    lr=0.02,
    policy_lr=0.003,
    lr_rampup_steps=0,
    clip=0.05,
    batch_tokens=900,
    policy_batch_tokens=300,
    samples=3,
    eval_samples=4,
    alpha=1.7,
    warmup_len=2,
    beams=3,
    length_penalty=0.6,
    eval_every=2,
)
FLAGS = [*TINY, *(f"{flag_name(name)}={value}" for name, value in SETTINGS.items())]
ESTIMATORS = Config.__dataclass_fields__["estimator"].metadata["choices"]
KINDS = ("marginal", "frozen", "pause", "sft")


def watched_run(folder, *flags):
    """A whole run, without its report: its folder, and what its stages called."""
    seen = SimpleNamespace(folder=folder, updates=[], policy=[], norms=[], drawn=[], split=[])
    config, _ = train.parse(["--task", "wmt", *FLAGS, *flags, "--out", str(folder)])
    run = train.prepare(config, resume=False)
    loss, warmup_loss, step = train.batch_loss, train.warmup_loss, torch.optim.AdamW.step
    evaluate, longest_first = evaluation.evaluate_warmups, evaluation.longest_first

    def watched_loss(run, batch):
        fresh = all(p.grad is None or not p.grad.any() for p in run.model.parameters())
        result = loss(run, batch)
        seen.updates.append(
            SimpleNamespace(
                stage=run.state.stage,
                limit=run.batches.batch_tokens,
                flops=result[2]["flops"],
                tokens=batch.source.numel() + batch.target.numel(),
                fresh=fresh,
            )
        )
        return result

    def watched_warmup_loss(model, batch, spec, estimator, samples, alpha):
        seen.policy.append((estimator, samples, alpha))
        return warmup_loss(model, batch, spec, estimator, samples, alpha)

    def watched_step(optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.norms.append(torch.cat([g.flatten() for g in gradients if g is not None]).norm())
        return step(optimizer)

    def watched_evaluate(model, batch, spec, samples, alpha):
        assert alpha == SETTINGS["alpha"]
        seen.drawn.append(samples)
        return evaluate(model, batch, spec, samples, alpha)

    def watched_longest_first(data, batch_tokens, what):
        seen.split.append((run.state.stage, batch_tokens, what))
        return longest_first(data, batch_tokens, what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "batch_loss", watched_loss)
        patch.setattr(train, "warmup_loss", watched_warmup_loss)
        patch.setattr(torch.optim.AdamW, "step", watched_step)
        patch.setattr(evaluation, "evaluate_warmups", watched_evaluate)
        patch.setattr(evaluation, "longest_first", watched_longest_first)
        train.train(run)
    return seen


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Kind -> what a run of that --estimator called."""
    folder = tmp_path_factory.mktemp("runs")
    return {kind: watched_run(folder / kind, "--estimator", kind) for kind in KINDS}


def lines_of(folder, kind="train"):
    lines = [
        json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line["kind"] == kind]


# ----------------------------------------------------------------------------- updates


@pytest.mark.parametrize("kind", KINDS)
def test_each_stage_has_its_learning_rate(kind, runs):
    """Without a rise each stage begins at its peak: --lr, and --policy-lr for both later ones."""
    first = {line["stage"]: line["lr"] for line in lines_of(runs[kind].folder) if line["step"] == 1}
    assert first == {"sft": 0.02, "policy": 0.003, "control": 0.003}
    for line in lines_of(runs[kind].folder):
        total = SETTINGS.get(f"{line['stage']}_steps") or len(
            [other for other in lines_of(runs[kind].folder) if other["stage"] == "control"]
        )
        left = (total - line["step"] + 1) / total
        assert line["lr"] == pytest.approx(first[line["stage"]] * left, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_each_stage_has_its_batch_tokens(kind, runs):
    """The control's batches are SFT's. K samples are one pair, so a baseline gets K times more."""
    wanted = {"sft": 900, "control": 900, "policy": 900 if kind in ("pause", "sft") else 300}
    for stage, limit in wanted.items():
        updates = [update for update in runs[kind].updates if update.stage == stage]
        assert updates and {update.limit for update in updates} == {limit}
        assert max(update.tokens for update in updates) <= limit
        assert max(update.tokens for update in updates) > 0.6 * limit


def test_every_update_begins_without_gradients(runs):
    assert all(update.fresh for seen in runs.values() for update in seen.updates)


def test_gradients_are_clipped(runs):
    """The optimizer gets a norm of --clip. The log holds the norm before."""
    for seen in runs.values():
        logged = [line["grad_norm"] for line in lines_of(seen.folder)]
        assert len(seen.norms) == len(logged) and min(logged) > 0.05
        for norm in seen.norms:
            assert norm.item() == pytest.approx(0.05, rel=1e-3)


def test_small_gradients_are_not_scaled(tmp_path):
    seen = watched_run(tmp_path / "r", "--clip", "1e6", "--policy-steps", "0")
    logged = [line["grad_norm"] for line in lines_of(seen.folder)]
    assert [norm.item() for norm in seen.norms] == pytest.approx(logged, rel=1e-4)


def test_the_objective_is_that_of_the_flags(runs):
    """Estimator, K and alpha of every policy update. pause: one constant c, read by y."""
    calls = {kind: set(runs[kind].policy) for kind in KINDS}
    assert calls == {
        "marginal": {("marginal", 3, 1.7)},
        "frozen": {("frozen", 3, 1.7)},
        "pause": {("pause", 3, 1.7)},
        "sft": set(),
    }


# ----------------------------------------------------------------------------- compute


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_of_a_stage_is_that_of_its_updates(kind, runs):
    """The losses that were computed, and nothing of validation. The control's number follows."""
    cost = {}
    for stage in ("sft", "policy", "control"):
        flops = [update.flops for update in runs[kind].updates if update.stage == stage]
        cost[stage] = evaluation.training_cost(runs[kind].folder, stage)
        assert (cost[stage]["updates"], cost[stage]["flops"]) == (len(flops), sum(flops))
    wanted = cost["policy"]["flops"] / (cost["sft"]["flops"] / 4)
    assert cost["control"]["updates"] == max(1, round(wanted))


def test_validation_costs_no_training(tmp_path, runs):
    """Even if its lines held FLOPs and seconds; and the control's updates are those of before."""
    folder, stages = shutil.copytree(runs["marginal"].folder, tmp_path / "r"), train.STAGES
    before = {stage: evaluation.training_cost(folder, stage) for stage in stages}
    config = replace(read_config(folder), out=str(folder))
    run = train.prepare(config, resume=True)
    lines = [
        json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    valid = [line["kind"] == "valid" for line in lines]
    assert sum(valid) > 6
    lines = [
        line | dict(flops=10**18, seconds=10.0**6) if is_valid else line
        for line, is_valid in zip(lines, valid)
    ]
    (folder / "log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    assert {stage: evaluation.training_cost(folder, stage) for stage in stages} == before
    train.start_stage(run, "control")
    assert run.state.total == before["control"]["updates"]


def test_more_validations_change_no_cost(tmp_path, runs):
    """--eval-every 1 for 2: as many updates, as many FLOPs, in every stage."""
    often = watched_run(tmp_path / "r", "--eval-every", "1").folder
    assert len(lines_of(often, "valid")) > len(lines_of(runs["marginal"].folder, "valid"))
    for stage in ("sft", "policy", "control"):
        costs = [
            evaluation.training_cost(folder, stage) | {"seconds": 0}
            for folder in (often, runs["marginal"].folder)
        ]
        assert costs[0] == costs[1]


# ----------------------------------------------------------------------------- validation


@pytest.mark.parametrize("kind", KINDS)
def test_validation_draws_eval_samples(kind, runs):
    """--eval-samples warmups an example, not --samples; and that many rows for each source."""
    spec = kind != "sft"
    assert set(runs[kind].drawn) == ({4} if spec else set())
    sizes = {
        stage: {tokens for s, tokens, _ in runs[kind].split if s == stage}
        for stage in ("sft", "policy", "control")
    }
    assert sizes == {"sft": {900}, "policy": {900 // 4 if spec else 900}, "control": {900}}


@pytest.mark.parametrize("kind", ["sft", "pause"])
def test_validation_is_the_loss_of_each_example_alone(kind, runs):
    """-log P(y|x), or -log P(y|x, pauses), example by example, over all target tokens. Exact."""
    folder = runs[kind].folder
    config = read_config(folder)
    run = train.prepare(config, resume=True)
    model, data = run.model.double().train(), run.data["valid"]
    spec = evaluation.warmup_spec("policy", config, run.tokenizer)
    run.spec = spec
    nll = evaluation.validate(run, data)["nll"]
    assert not model.training
    total, tokens = 0.0, 0
    for i in range(len(data)):
        batch = collate([data[i]])
        with torch.no_grad():
            if spec is None:
                total += sft_loss(model, batch).item()
            else:
                memory = model.encode(batch.source)
                c = sample_warmups(model, memory, batch.prompt, spec, 1)
                total -= score(model, memory, batch, c, spec)[1].item()
        tokens += len(data[i].target)
    assert len(data) > 30 and nll == pytest.approx(total / tokens, rel=1e-9)


def test_means_are_per_token_per_example_or_per_swap():
    """By hand: batches of 4, 2 and 1 examples. The last has no other example's warmup."""
    unit_of = dict(loss="token", nll="token", reward="example", swap_gap="swap")
    counts = {"token": 0, "example": 0, "swap": 0}
    for target in ([[5, 1], [5, 6], [1, 0], [5, 1]], [[1], [1]], [[5, 6, 1]]):
        target = torch.tensor(target)
        batch = Batch(torch.ones(len(target), 3), torch.ones(len(target), 1), target)
        counts = {unit: counts[unit] + more for unit, more in evaluation.units(batch).items()}
    assert counts == {"token": 7 + 2 + 3, "example": 7, "swap": 6}
    sums = {(name, unit): torch.tensor(84.0) for name, unit in unit_of.items()}
    numbers = evaluation.means(sums, counts)
    assert numbers == dict(loss=7.0, nll=7.0, reward=12.0, swap_gap=14.0)
    del numbers["swap_gap"]  # not 0: it was not measured
    assert evaluation.means(sums, counts | {"swap": 0}) == numbers


def test_the_first_validation_examples_are_decoded_and_scored_against_themselves(
    tmp_path, monkeypatch
):
    """--eval-decode 7: the same seven as text and as token ids, at every validation."""
    seen, scored = [], []

    def decode(run, data):
        seen.append((data, run.spec))
        return [evaluation.Output(f"text {n}", f"warmup {n}", True) for n in range(7)]

    def metrics(config, examples, outputs):
        assert outputs == [(f"text {n}", f"warmup {n}", True) for n in range(7)]
        scored.append(examples)
        return {"BLEU": 12.5}

    config, _ = train.parse(["--task", "wmt", *FLAGS, "--eval-decode=7", "--out", f"{tmp_path}/r"])
    run = train.prepare(config, resume=False)
    monkeypatch.setattr(train, "decode_split", decode)
    monkeypatch.setattr(train, "compute_metrics", metrics)
    train.train(run)
    wanted = encode_split(run.tokenizer, run.examples["valid"][:7], config, "valid")
    for examples in scored:
        assert examples == run.examples["valid"][:7]
    for data, _ in seen:
        for ours, theirs in zip(data, wanted):
            assert [row.tolist() for row in ours] == [row.tolist() for row in theirs]
    lines = lines_of(run.config.folder, "valid")
    assert len(seen) == len(scored) == len(lines) > 6 and {line["BLEU"] for line in lines} == {12.5}
    assert [spec is not None for _, spec in seen] == [line["stage"] == "policy" for line in lines]


# ----------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("stage", ["sft", "policy", "control"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_warmup_is_that_of_the_settings(estimator, stage, runs):
    """Only the policy stage has one. It has W tokens, and of specials it holds none."""
    tokenizer = evaluation.load_tokenizer(runs["sft"].folder / "tokenizer.json")
    for length in (1, 3):
        config = Config(estimator=estimator, warmup_len=length, temperature=0.7)
        ours = evaluation.warmup_spec(stage, config, tokenizer)
        if stage != "policy" or estimator == "sft":
            assert ours is None
        else:
            special = special_ids(tokenizer)
            assert ours == WarmupSpec(3, special, length, 0.7, pause=estimator == "pause")


@pytest.mark.parametrize("stage", ["sft", "control", "policy"])
@pytest.mark.parametrize("flags, beams", [([], 3), (["--beams", "5"], 5)])
def test_decoding_is_by_the_settings(stage, flags, beams, runs, tmp_path, monkeypatch):
    """Beams, length penalty, what y may not hold, and how long it may be: of every batch."""
    folder, seen = shutil.copytree(runs["marginal"].folder, tmp_path / "r"), []
    tokenizer = evaluation.load_tokenizer(folder / "tokenizer.json")

    def fake(model, batch, spec, length, *, c, **how):
        if c is None:  # else one of the sampled warmups that are shown below the table
            seen.append((spec is not None, how, length))
        nothing = torch.zeros(len(batch.source), 2, dtype=torch.long)
        return (nothing if spec else None), nothing

    monkeypatch.setattr(evaluation, "generate", fake)
    assert evaluation.main([str(folder), "--stage", stage, *flags]) == 0
    assert len(seen) > 1
    for warmed, how, length in seen:
        assert warmed == (stage == "policy")
        assert how == dict(beams=beams, length_penalty=0.6, forbidden=special_ids(tokenizer))
        assert length == 24  # --max-target-tokens, whatever the sources' lengths


def test_new_text_for_a_pretrained_model_begins_as_its_training_did(runs, tmp_path, monkeypatch):
    """With --init: the prefix that T5 knows. From scratch: the line itself."""
    folder = shutil.copytree(runs["marginal"].folder, tmp_path / "r")
    (tmp_path / "in").write_text("Anna schläft.\n", encoding="utf-8")
    settings, seen = json.loads((folder / "config.json").read_text(encoding="utf-8")), []
    monkeypatch.setattr(
        evaluation,
        "encode_split",
        lambda tokenizer, examples, *more: (
            seen.extend(examples),
            encode_split(tokenizer, examples, *more),
        )[1],
    )
    for init in ("", "t5-small"):
        (folder / "config.json").write_text(json.dumps(settings | {"init": init}), encoding="utf-8")
        assert evaluation.main([str(folder), "--input", str(tmp_path / "in")]) == 0
    assert [example.source for example in seen] == [
        "Anna schläft.",
        "translate German to English: Anna schläft.",
    ]
    assert {example.prompt for example in seen} == {"<2en>"}


def test_the_guides_command_for_sacrebleu_gives_the_tables_scores(runs, tmp_path):
    """As it is printed, but for the folder. The control is its baseline."""
    folder = shutil.copytree(runs["marginal"].folder, tmp_path / "run")
    score_run, tables = evaluation.score_run, []
    with pytest.MonkeyPatch.context() as patch:
        keep = lambda *given: tables.append(score_run(*given)) or tables[-1]
        patch.setattr(evaluation, "score_run", keep)
        assert evaluation.main([str(folder)]) == 0
    guide = (Path(__file__).parents[1] / "docs" / "guide.md").read_text(encoding="utf-8")
    [command] = [line for line in guide.splitlines() if line.startswith("sacrebleu ")]
    program, *words = shlex.split(command.replace("runs/en-de", folder.as_posix()))
    code = f"from sacrebleu.{program} import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--paired-bs-n", "20"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    table, *_ = done.stdout.split("Paired bootstrap resampling")
    systems = [line.strip("│ ").split("│") for line in table.splitlines() if ".txt" in line]
    outputs = [f"{folder.as_posix()}/test.{stage}.txt" for stage in ("control", "sft", "policy")]
    assert [name.strip() for name, *_ in systems] == [f"Baseline: {outputs[0]}", *outputs[1:]]
    assert table.count("(p = ") == 4  # BLEU and chrF++ of all but the first
    [(results, _)] = tables
    by_stage = {row["stage"]: row for row in results["rows"]}
    for stage, (_, *scores) in zip(("control", "sft", "policy"), systems):  # those of our table
        scores = [float(score.split()[0]) for score in scores]
        assert scores == pytest.approx(list(by_stage[stage]["metrics"].values()), abs=0.06)


def test_references_are_one_line_an_example(runs, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(runs["marginal"].folder, tmp_path / "r")
    examples = [Example(f"{n}", "<2en>", f"a dog\n sees  {n}\u2028cats") for n in range(3)]
    monkeypatch.setattr(evaluation, "load", lambda config: ({"valid": examples}, ""))
    assert evaluation.main([str(folder), "--stage", "policy"]) == 0
    out = capsys.readouterr().out
    assert f"wrote {folder / 'valid.ref.txt'}\n" in out
    lines = (folder / "valid.ref.txt").read_text(encoding="utf-8").split("\n")
    assert lines == [f"a dog sees {n} cats" for n in range(3)] + [""]
