"""docs/micro.py, the idea in one file, computes what the large program computes."""

import importlib.util
from pathlib import Path

import torch

import warmup

PATH = Path(__file__).parents[1] / "docs" / "micro.py"
spec = importlib.util.spec_from_file_location("micro", PATH)
micro = importlib.util.module_from_spec(spec)
spec.loader.exec_module(micro)


def test_it_is_short_and_stands_alone():
    text = PATH.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    imported = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert {line.split()[1].split(".")[0] for line in imported} == {"argparse", "time", "torch"}


def test_its_loss_is_the_surrogate_with_marginal_weights():
    """Value and gradients, in float64."""
    torch.manual_seed(0)
    log_pi, log_p = (torch.randn(5, micro.K, dtype=torch.float64).log_softmax(1) for _ in range(2))
    gradients = []
    for loss in (
        lambda pi, p: 5 * micro.marginal_loss(pi, p),  # a mean over questions, not a sum
        lambda pi, p: warmup.surrogate(*warmup.marginal(p), pi, p),
    ):
        leaves = [x.clone().requires_grad_() for x in (log_pi, log_p)]
        value = loss(*leaves)
        gradients.append([value, *torch.autograd.grad(value, leaves)])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_questions_are_as_described():
    torch.manual_seed(0)
    pairs, question, y, once = micro.questions(200)
    kinds = set()
    columns = (x.tolist() for x in (pairs, question, y, once))
    for ids, (kind, start), answer, between in zip(*columns):
        f = dict(divmod(i, micro.V) for i in ids)
        assert sorted(f) == sorted(f.values()) == list(range(micro.V))
        assert between == f[start] and answer == (between if kind == micro.V else f[between])
        kinds.add(kind)
    assert kinds == {micro.V, micro.V + 1}


def test_warmups_are_sampled_and_scored_by_the_same_model(monkeypatch):
    """log P(c|x) of the letter that was drawn, log P(y|x,c) one place later, a row for each c."""
    torch.manual_seed(0)
    model, given = micro.Decoder(), []
    pairs, question, y, _ = micro.questions(3)
    monkeypatch.setattr(micro, "marginal_loss", lambda *x: given.extend(x))
    micro.warmup_loss(model, pairs, question, y)
    log_pi, log_p = given  # (3,K)
    for b in range(3):
        first = model(pairs[b : b + 1], question[b : b + 1])[0, -1]  # (V,)
        letters = torch.arange(micro.V)[:, None]
        tokens = torch.cat([question[b].expand(micro.V, -1), letters], 1)
        target = model(pairs[b].expand(micro.V, -1), tokens)[:, -1, y[b]]  # (V,)
        # the letter that a row was drawn for is not known: some letter must fit both numbers
        far = torch.maximum((log_pi[b][:, None] - first).abs(), (log_p[b][:, None] - target).abs())
        assert far.amin(1).max() < 1e-4  # far: (K,V)


def test_it_runs_and_learns(capsys):
    """Shortened: both stages report, and SFT does better than guessing a letter, log 16 = 2.77."""
    micro.main(["--updates", "3"])
    assert "at the end" in capsys.readouterr().out
    torch.manual_seed(0)
    model = micro.Decoder()
    micro.train(model, micro.sft_loss, 150, 512, 4e-3, "SFT")
    assert "SFT 100" in capsys.readouterr().out
    with torch.no_grad():
        assert micro.sft_loss(model, *micro.questions(1000)[:3]) < 2.72
