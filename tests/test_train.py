"""train.py and eval.py: resumed runs are the same runs, the normaliser is right, results reproduce."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch

import eval as evaluation
import train
from conftest import TINY
from data import collate, encode, load
from warmup import sft_loss, target_tokens


def log_of(folder, kind=None):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def stop_at(monkeypatch, stage, step, killed=False):
    """As if Ctrl-C came during that update; killed: twice, so that nothing more is saved."""
    log = train.Run.log

    def interrupting(run, kind, numbers):
        log(run, kind, numbers)
        if kind == "train" and (run.state.stage, run.state.step) == (stage, step):
            run.stop = True
            if killed:
                run.interrupt()

    monkeypatch.setattr(train.Run, "log", interrupting)


# ----------------------------------------------------------------------------- resume


@pytest.mark.parametrize("stage, step, killed", [("sft", 3, False), ("sft", 4, False), ("policy", 1, False),
                                                 ("policy", 3, False), ("policy", 1, True), ("policy", 3, True)])
def test_a_resumed_run_is_the_same_run_bit_for_bit(stage, step, killed, tmp_path, monkeypatch, capsys):
    """N updates = n, interrupt, resume, N - n: weights, optimizer, every logged number. Dropout is on."""
    settings = ["--task", "wmt", *TINY, "--no-control", "--dropout", "0.3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main([*settings, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, stage, step, killed)
        assert train.main([*settings, "--out", str(parts)]) == 1
    assert f"--resume {parts}" in capsys.readouterr().err
    assert train.main(["--resume", str(parts)]) == 0
    a, b = (evaluation.load_checkpoint(folder / "last.pt", "state") for folder in (whole, parts))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    moments = [checkpoint["optimizer"]["state"] for checkpoint in (a, b)]
    assert all(torch.equal(moments[0][i][name], moments[1][i][name]) for i in moments[0] for name in moments[0][i])
    assert torch.equal(a["rng"], b["rng"]) and a["batches"] == b["batches"]
    timeless = [[{k: v for k, v in line.items() if k != "tokens_per_second"} for line in log_of(f)] for f in (whole, parts)]
    assert timeless[0] == timeless[1]
    rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (whole, parts)]
    assert [row | {"seconds": 0} for row in rows[0]] == [row | {"seconds": 0} for row in rows[1]]


def test_resuming_a_finished_run_prints_its_table_again(finished_run, capsys):
    before = json.loads((finished_run / "results.json").read_text())
    assert train.main(["--resume", str(finished_run)]) == 0
    assert json.loads((finished_run / "results.json").read_text()) == before
    assert "sft, same compute" in capsys.readouterr().out


def test_log_lines_after_the_checkpoint_are_forgotten(finished_run, tmp_path):
    """A killed run may have logged updates that its last checkpoint does not hold; resuming repeats them."""
    run, *_ = train.prepare(train.Config(**vars(evaluation.load_config(finished_run)) | {"out": str(tmp_path / "r")}), False)
    run.log("train", {"loss": 1.0})
    run.save()
    run.log("train", {"loss": 2.0})
    run.resume(evaluation.load_checkpoint(run.folder / "last.pt", "state"))
    assert [line["loss"] for line in log_of(run.folder)] == [1.0]


def test_other_data_is_not_trained_on_after_resuming(finished_run, tmp_path, capsys):
    config = train.Config(**vars(evaluation.load_config(finished_run)) | {"out": str(tmp_path / "r")})
    run, *_ = train.prepare(config, resume=False)
    run.data["train"].source[7][0] += 1
    with pytest.raises(train.UserError, match="not what"):
        run.resume(evaluation.load_checkpoint(run.folder / "last.pt", "state"))


def test_a_run_from_another_kind_of_device_can_be_resumed(finished_run, tmp_path):
    run, *_ = train.prepare(train.Config(**vars(evaluation.load_config(finished_run)) | {"out": str(tmp_path / "r")}), False)
    saved = evaluation.load_checkpoint(run.folder / "last.pt", "state")
    run.resume(saved | {"mps_rng": [saved["rng"]], "cuda_rng": [saved["rng"]]})


def test_the_training_split_is_scored_whole(finished_run, tmp_path, capsys):
    """Pairs longer than --max-tokens are left out of training only: else line i would be scored against line i + 1."""
    folder = shutil.copytree(finished_run, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_tokens": 12}))
    assert evaluation.main([str(folder), "--split", "train", "--stage", "sft"]) == 0
    assert "their source loses its end" in capsys.readouterr().out
    assert len((folder / "train.sft.txt").read_text().splitlines()) == config["sample_size"]


def test_a_run_remembers_its_data(finished_run, tmp_path, monkeypatch, capsys):
    """Data prepared later in data/wmt must not slip under a run on the sample."""
    (tmp_path / "data" / "wmt").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert evaluation.load_config(finished_run).data == "sample"
    assert evaluation.main([str(finished_run), "--stage", "sft"]) == 0


# ----------------------------------------------------------------------------- the step


def test_unequal_micro_batches_give_the_gradient_of_the_joined_batch(tmp_path, monkeypatch):
    """--accumulate 3: the summed loss over all micro-batches, divided once by all their tokens."""
    settings = ["--task", "wmt", *TINY, "--dropout", "0", "--accumulate", "3", "--sft-steps", "1", "--policy-steps", "0"]
    config, _ = train.parse([*settings, "--out", str(tmp_path / "r")])
    run, *_ = train.prepare(config, resume=False)
    run.model.double()
    index = [[0, 1, 2, 3, 4], [5], [6, 7]]
    micro = iter([collate(run.data["train"], rows) for rows in index])
    monkeypatch.setattr(type(run.batches), "__next__", lambda self: next(micro))
    seen = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda ps, c: seen.extend(p.grad.clone() for p in ps) or torch.ones(()))
    run.train()
    torch.manual_seed(config.seed)
    model = train.EncoderDecoder(run.model.config).double()  # the same initial weights
    joined = collate(run.data["train"], sum(index, []))
    (sft_loss(model, joined, config.label_smoothing) / target_tokens(model, joined)).backward()
    for a, b in zip(seen, (p.grad for p in model.parameters())):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_learning_rate_rises_then_falls_to_zero(tmp_path):
    config, _ = train.parse(["--task", "wmt", *TINY, "--sft-steps", "100", "--lr-rampup-steps", "10", "--lr", "0.01",
                             "--out", str(tmp_path / "r")])
    run, *_ = train.prepare(config, resume=False)
    rates = []
    for run.state.step in range(100):
        rates.append(run.learning_rate())
    assert max(rates) == pytest.approx(0.01, rel=0.01) and rates.index(max(rates)) == 10
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 2e-4


def test_position_biases_and_gains_are_not_decayed(tmp_path):
    model = train.EncoderDecoder(train.ModelConfig(**train.SIZES["nano"]))
    decayed, free = make = train.make_optimizer(model, 0.1).param_groups
    assert {id(p) for g in make for p in g["params"]} == {id(p) for p in model.parameters()}
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("norm" in names[id(p)] or "biases" in names[id(p)] for p in free["params"])


# ----------------------------------------------------------------------------- a whole run


def test_a_run_leaves_what_the_readme_says(finished_run):
    have = {path.name for path in finished_run.iterdir()}
    assert {"config.json", "tokenizer.json", "log.jsonl", "last.pt", "sft.pt", "policy.pt", "control.pt", "results.json"} <= have
    assert not any(name.endswith(".tmp") for name in have)
    results = json.loads((finished_run / "results.json").read_text())
    assert set(results) >= {"task", "pair", "data", "rows", "signature"}
    assert [row["name"] for row in results["rows"]] == ["sft", "sft, same compute", "warmup"]
    for row in results["rows"]:
        assert set(row) == {"pair", "split", "name", "metrics", "nll", "updates", "seconds"}
        assert set(row["metrics"]) == {"BLEU", "chrF++"} and 0 < row["nll"] < math.inf
    assert results["rows"][2]["updates"] == 4 + 3 and "tok:13a" in results["signature"]["BLEU"]


def test_the_control_gets_the_time_of_the_warmup_stage(finished_run):
    """Its number of updates = policy seconds / (SFT seconds per update), rounded."""
    spent = evaluation.load_checkpoint(finished_run / "last.pt", "state")["state"]["spent"]
    assert spent["control"][0] == max(1, round(spent["policy"][1] / (spent["sft"][1] / spent["sft"][0])))


def test_both_later_stages_start_from_the_best_sft_weights(finished_run):
    """Validation before the first update: the control is exactly where SFT was best."""
    best = evaluation.load_checkpoint(finished_run / "sft.pt")["valid_nll"]
    first = next(line for line in log_of(finished_run, "valid") if line["stage"] == "control")
    assert first["step"] == 0 and first["nll"] == pytest.approx(best, abs=1e-6)


def test_the_best_checkpoint_is_kept_not_the_last(tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(train, "validate", lambda *_: {"nll": next(scores)})
    settings = ["--task", "wmt", *TINY, "--policy-steps", "0", "--sft-steps", "3", "--eval-every", "1"]
    run, *_ = train.prepare(train.parse([*settings, "--out", str(tmp_path / "r")])[0], resume=False)
    run.train()
    kept = evaluation.load_checkpoint(tmp_path / "r" / "sft.pt")
    assert (kept["best_step"], kept["valid_nll"], kept["updates"]) == (2, 1.0, 3)


def test_eval_reproduces_the_table(finished_run, capsys):
    results = json.loads((finished_run / "results.json").read_text())["rows"]
    assert evaluation.main([str(finished_run)]) == 0
    out = capsys.readouterr().out
    for row in results:
        line = next(line for line in out.splitlines() if line.startswith(row["name"] + "  "))
        numbers = [float(word) for word in line[20:].split()]
        assert numbers[:2] == [row["metrics"]["BLEU"], row["metrics"]["chrF++"]]
        assert numbers[2] == pytest.approx(row["nll"], abs=6e-4) and numbers[3] == row["updates"]
    assert "note: this run is not finished" not in out
    assert "paired bootstrap" in out and len((finished_run / "test.policy.txt").read_text().splitlines()) == 75


def test_equal_outputs_are_no_significant_difference(capsys):
    """sacreBLEU's bootstrap gives two equal systems the smallest p there is."""
    examples, texts = [train.Example("a", "<2en>", f"a small dog sees {n} cats") for n in range(20)], ["a dog sees cats"] * 20
    rows = [evaluation.Row(stage, stage, {}, 0.0, 1, 1.0, texts, [None] * 20) for stage in ("sft", "control", "policy")]
    rows[2].hypotheses = ["a small dog sees cats"] * 20
    evaluation.print_significance(rows, train.Config(), examples)
    lines = capsys.readouterr().out.splitlines()
    assert sum("the same outputs" in line and " sft " in line for line in lines) == 2  # BLEU, chrF++
    assert all(("p = " in line) == (" policy " in line) for line in lines)


def test_monte_carlo_scores_draw_the_same_warmups_every_time(finished_run, monkeypatch):
    """The table's NLL is an estimate from samples: score_stage must seed them (stand-in: a random number)."""
    monkeypatch.setattr(evaluation, "validate", lambda *_: {"nll": torch.rand(()).item()})
    config, tokenizer = evaluation.load_config(finished_run), evaluation.load_tokenizer(finished_run)
    examples = load(train.Config(data="sample", sample_size=8))[0]["test"]
    encoded = encode(tokenizer, examples)
    rows = [evaluation.score_stage(finished_run, "policy", config, tokenizer, examples, encoded, 1, torch.device("cpu"))
            for _ in range(2)]
    assert rows[0].nll == rows[1].nll


def test_translating_keeps_line_order_and_count(finished_run, tmp_path, capsys):
    lines = ["Die Frau schläft.", "Heute arbeitet der alte Mann im Garten.", "Anna kauft 17 Bücher."]
    one_by_one = []
    for line in lines:
        (tmp_path / "one").write_text(line + "\n")
        assert evaluation.main([str(finished_run), "--input", str(tmp_path / "one")]) == 0
        one_by_one.append(capsys.readouterr().out)
    (tmp_path / "all").write_text("\n".join(lines) + "\n")
    assert evaluation.main([str(finished_run), "--input", str(tmp_path / "all"), "--show-warmup"]) == 0
    together = capsys.readouterr().out.splitlines(keepends=True)
    assert [row.split("\t")[1] for row in together] == one_by_one and len(together) == 3


def test_progress_and_log_hold_the_diagnostics(finished_run):
    policy = [line for line in log_of(finished_run) if line["stage"] == "policy"]
    train_line = next(line for line in policy if line["kind"] == "train")
    assert {"reward", "spread", "ess", "entropy", "distinct", "nll", "loss", "grad_norm"} <= set(train_line)
    assert {"swap_gap", "over_empty", "nll"} <= set(next(line for line in policy if line["kind"] == "valid"))


def test_sampled_validation_nll_is_an_upper_bound_on_average():
    """Jensen: E[-log mean_k p_k] >= -log E[p]; with more samples the bound gets tighter."""
    torch.manual_seed(0)
    log_p = 3 * torch.randn(20000, 64, dtype=torch.float64)
    exact = -(3.0**2) / 2  # -log E[e^(3z)]
    few, many = (math.log(K) - log_p[:, :K].logsumexp(1).mean().item() for K in (2, 64))
    assert exact < many < few


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for f in train.fields(train.Config):
        assert "--" + f.name.replace("_", "-") in out
    assert out.count("(default:") >= len(train.fields(train.Config)) - 3


def test_importing_has_no_side_effects():
    """Any function can be imported by a student: no output, no seeding, no argument parsing."""
    code = "import torch; s = torch.get_rng_state(); import train, eval, sys; sys.exit(not torch.equal(s, torch.get_rng_state()))"
    done = subprocess.run([sys.executable, "-c", code, "--no-such-flag"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_one_model_for_several_directions(tmp_path, capsys):
    """Trained on both, scored in each, a mean over them; eval.py takes one of them, for scoring and for new text."""
    folder = tmp_path / "both"
    assert train.main(["--task", "wmt", "--pair", "de-en,en-de", *TINY, "--policy-steps", "0", "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert int(re.search(r"(\d+) training pairs", out)[1]) > 300 and "wmt de-en, test" in out and "wmt en-de, test" in out
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["pair"] for row in rows] == ["de-en", "en-de"]
    mean = sum(row["metrics"]["chrF++"] for row in rows) / 2
    assert f"mean of de-en, en-de\nsft                 BLEU" in out and f"chrF++ {mean:.2f}" in out
    assert evaluation.main([str(folder), "--pair", "en-de"]) == 0
    again = capsys.readouterr().out
    assert (folder / "test.en-de.sft.txt").exists() and not (folder / "test.de-en.sft.txt").exists()
    assert f"{rows[1]['nll']:.3f}" in again and "wmt de-en" not in again
    seen, original = [], evaluation.generate
    evaluation.generate = lambda model, batch, *more, **flags: seen.append(batch.prompt) or original(model, batch, *more, **flags)
    (tmp_path / "in.txt").write_text("Ein Kind.\n")
    assert evaluation.main([str(folder), "--input", str(tmp_path / "in.txt")]) == 0
    assert evaluation.main([str(folder), "--input", str(tmp_path / "in.txt"), "--pair", "en-de"]) == 0
    evaluation.generate = original
    tokenizer = evaluation.load_tokenizer(folder)
    assert [tokenizer.id_to_token(int(prompt)) for prompt in seen] == ["<2en>", "<2de>"]
    assert evaluation.main([str(folder), "--pair", "fr-en"]) == 1
    assert "trained on de-en,en-de, not on fr-en" in capsys.readouterr().err


def test_out_of_memory_names_the_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Run, "loss", lambda run, batch: torch.empty(2**60))
    assert train.main(["--task", "wmt", *TINY, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: out of memory") and "--batch-tokens" in error and "--recompute" in error


def test_out_of_memory_while_decoding_keeps_what_was_trained(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    monkeypatch.setattr(evaluation, "generate", lambda *_, **__: torch.empty(2**60))
    for program, argv in ((train, ["--task", "wmt", *TINY, "--out", str(folder)]), (evaluation, [str(folder)])):
        assert program.main(argv) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: out of memory while decoding") and "eval.py RUN" in error
    monkeypatch.undo()
    assert evaluation.main([str(folder), "--beams", "1"]) == 0


def test_the_memory_estimate_grows_with_what_it_should():
    """By hand, for one layer a side, no logits to speak of: 4 bytes times numbers. (Measured beside it: README.)"""
    from data import Encoded
    from model import ModelConfig

    c = ModelConfig(vocab_size=1, width=10, ff=20, encoder_layers=1, decoder_layers=1)
    data = Encoded([[0] * 30] * 2, [[], []], [[0] * 10] * 2)  # 3/4 of the tokens are source
    config = train.Config(batch_tokens=4000, policy_batch_tokens=400, samples=4, warmup_len=4)
    mib = train.memory_estimate(config, c, 1000, data)
    layer = 28 * 10 + 3 * 20
    assert mib["SFT"] * 2**20 == pytest.approx(4 * (4000 + 3000 * layer + 1000 * layer + 2 * 1000))
    assert mib["warmups"] * 2**20 == pytest.approx(4 * (4000 + 300 * layer + 4 * (100 + 10 * 5) * layer + 2 * 400))
    less = train.memory_estimate(train.replace(config, recompute=True), c, 1000, data)
    assert less["SFT"] * 2**20 == pytest.approx(4 * (4000 + min(4000 * layer, 4000 * 10 + 3 * layer * 3000) + 2 * 1000))


def test_compile_makes_a_handful_of_graphs_and_changes_nothing():
    """Eight shapes of batch; SFT, warmups, validation: the same losses and gradients. Cached steps are left alone."""
    from torch._dynamo.testing import CompileCounter

    from model import EncoderDecoder, ModelConfig
    from warmup import Batch, WarmupSpec, evaluate_warmups, warmup_loss

    torch.manual_seed(0)
    model = EncoderDecoder(ModelConfig(vocab_size=40, width=16, heads=2, head_size=8, ff=32, encoder_layers=1, decoder_layers=1,
                                       dropout=0.0))
    spec, results, counter = WarmupSpec(3, (0, 1, 2, 3), 4, 4), [], CompileCounter()
    for compiled in (False, True):
        if compiled:
            train.compile_stacks(model, backend=counter)
        torch.manual_seed(1)
        numbers = []
        for _ in range(8):
            (B, S, T), ids = torch.randint(0, 5, (3,)) + torch.tensor([4, 10, 20]), lambda *shape: torch.randint(4, 40, shape)
            batch = Batch(ids(B, S), torch.full((B, 1), 5), ids(B, T))
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
