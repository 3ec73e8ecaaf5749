"""Checks of the exercises: of the solutions, or with --mine of your own work in exercises.py."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # from any folder
import broken
import exercises
import solutions
import toys
import warmup
from model import EncoderDecoder, ModelConfig, plain_token_logprobs
from warmup import Batch, WarmupSpec, all_warmups, sample_warmups, score, warmup_logprobs

F64 = dict(dtype=torch.float64)


@pytest.fixture
def work(request):
    return exercises if request.config.getoption("--mine", False) else solutions


def tables():
    """Logits of P(c|x) over 4 warmups and log P(y|x,c), as parameters."""
    torch.manual_seed(0)
    return torch.randn(4, **F64).requires_grad_(), (-torch.rand(4, **F64)).requires_grad_()


def small_model():
    torch.manual_seed(0)
    model = (
        EncoderDecoder(
            ModelConfig(
                vocab_size=7,
                width=16,
                heads=2,
                head_size=8,
                ff=16,
                encoder_layers=1,
                decoder_layers=1,
                dropout=0.0,
            )
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        for p in model.parameters():
            p += 0.4 * torch.randn_like(p)
    return model, Batch(
        torch.tensor([[4, 5, 6], [6, 4, 0], [5, 5, 4]]),
        torch.tensor([[5], [6], [4]]),
        torch.tensor([[4, 6, 1], [5, 1, 0], [6, 6, 1]]),
    )


def is_exact_gradient(estimator, value, K=3):
    """The estimator's gradient, over all 64 triples, against autograd of E[value(log p of the triple)]."""
    policy, log_p = tables()
    needs = {"a": "log P(c|x), the policy", "b": "log P(y|x,c), the target"}
    ours, objective = [torch.zeros(4, **F64), torch.zeros(4, **F64)], 0.0
    for triple in itertools.product(range(4), repeat=K):
        c = list(triple)
        log_pi, R = policy.log_softmax(0)[c][None], log_p[c][None]
        a, b = estimator(R.detach())
        probability = policy.softmax(0)[c].prod()
        for total, grad in zip(
            ours, torch.autograd.grad((a * log_pi + b * R).sum(), (policy, log_p))
        ):
            total += probability.item() * grad
        objective = objective + probability * value(log_p[c])
    both = zip(needs.items(), ours, torch.autograd.grad(objective, (policy, log_p)))
    for (weight, moves), mine, exact in both:
        assert mine.allclose(exact, rtol=1e-10, atol=1e-10), (
            f"{weight}, which moves {moves}, is wrong: over all {4**K} triples of warmups the "
            f"gradient is {mine.tolist()}, not {exact.tolist()}"
        )


def test_exercise_01_jensen(work):
    is_exact_gradient(work.jensen, lambda log_p: log_p.mean())


def test_exercise_02_iwae(work):
    is_exact_gradient(work.iwae, lambda log_p: log_p.exp().mean().log())
    for one, other in zip(
        work.iwae(torch.tensor([[-1.0, -2.0, -4.0]])),
        work.iwae(torch.tensor([[-701.0, -702.0, -704.0]])),
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_exercise_03_swap_gap(work):
    model, batch = small_model()
    spec, memory = WarmupSpec(3, (0, 1, 2, 3), 2), model.encode(batch.source)
    c = sample_warmups(model, memory, batch.prompt, spec, 5)
    one = score(model, memory, batch, c, spec)[1].mean()
    two = score(model, memory, batch, c[[1, 2, 0]], spec)[1].mean()
    torch.testing.assert_close(
        work.swap_gap(model, batch, spec, c), one - two, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_exercise_04_mask(work, length, temperature):
    spec, V = WarmupSpec(3, (0, 1, 2, 3), length, temperature), 7
    logits = torch.randn(length, V, generator=torch.Generator().manual_seed(0), **F64)
    probabilities = [work.log_policy(logits, c, spec).exp() for c in all_warmups(spec, V)]
    torch.testing.assert_close(sum(probabilities), torch.ones((), **F64), rtol=1e-10, atol=1e-10)
    model = SimpleNamespace(
        token_logprobs=lambda hidden, targets, temperature, forbidden: plain_token_logprobs(
            hidden / temperature, torch.eye(V, **F64), targets, forbidden
        )
    )
    for c in all_warmups(spec, V):  # and not just any numbers that add up: those of warmup.py
        [expected] = warmup_logprobs(model, logits[None], c[None], spec)
        mine = work.log_policy(logits, c, spec)
        assert mine.allclose(expected), f"c = {c.tolist()}, {spec}: {mine}, not {expected}"


def test_exercise_12_entropy(work):
    """Over all 64 triples of warmups against autograd of the entropy; and a case by hand."""
    policy, _ = tables()
    ours = torch.zeros(4, **F64)
    for triple in itertools.product(range(4), repeat=3):
        c = list(triple)
        log_pi = policy.log_softmax(0)[c][None]
        loss = (work.entropy_gradient(log_pi.detach()) * log_pi).sum()
        probability = policy.softmax(0)[c].prod().item()
        ours += probability * torch.autograd.grad(loss, policy)[0]
    entropy = -(policy.softmax(0) * policy.log_softmax(0)).sum()
    [exact] = torch.autograd.grad(entropy, policy)
    torch.testing.assert_close(
        ours,
        exact,
        rtol=1e-10,
        atol=1e-10,
        msg=lambda m: f"over all 64 triples it is not the entropy's gradient. {m}",
    )
    log_pi = torch.tensor([[-1.0, -2.0, -6.0], [-9.0, -9.0, -9.0]])
    expected = torch.tensor([[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]) / 3
    torch.testing.assert_close(
        work.entropy_gradient(log_pi),
        expected,
        msg=lambda m: f"without the baseline, or with another: what is alike is pushed. {m}",
    )


def test_exercise_13_continuum(work):
    """Both ends are known; in between b is a gradient, and a is b with the others' mean taken off."""
    K, exactly = 4, dict(rtol=1e-10, atol=1e-10)
    R = 2 * torch.randn(5, K, generator=torch.Generator().manual_seed(0), **F64)
    for ours, known in zip(work.continuum(R, 0.0), warmup.prob(R)):
        torch.testing.assert_close(ours, known, **exactly)
    (a, b), (a_known, b_known) = work.continuum(R, 1.0), warmup.marginal(R)
    torch.testing.assert_close(a * (K - 1) / K, a_known, **exactly)
    torch.testing.assert_close(b, b_known, **exactly)
    for q in (0.1, 0.5, 0.9):
        leaf = R.clone().requires_grad_()
        q_logarithm = leaf.exp().mean(1) ** (1 - q) / (1 - q)
        [gradient] = torch.autograd.grad(q_logarithm.sum(), leaf)
        a, b = work.continuum(R, q)
        torch.testing.assert_close(b, gradient, **exactly)
        torch.testing.assert_close(a, b - warmup.mean_of_others(b), **exactly)
    R = torch.tensor([[-1.0, -2.0, -4.0]])
    for ours, near in zip(work.continuum(R - 700, 1.0), work.continuum(R, 1.0)):
        torch.testing.assert_close(ours, near, rtol=1e-4, atol=1e-5)


def test_a_wrong_weight_is_named():
    """By a solution with one wrong weight: the message says which."""
    value = lambda log_p: log_p.mean()
    wrong_a = lambda R: (R / R.size(-1) * 2, solutions.jensen(R)[1])
    wrong_b = lambda R: (solutions.jensen(R)[0], torch.ones_like(R))
    for estimator, said in (
        (wrong_a, "a, which moves log P.c.x., "),
        (wrong_b, "b, which moves log P.y"),
    ):
        with pytest.raises(AssertionError, match=f"^{said}.* is wrong"):
            is_exact_gradient(estimator, value)


def test_a_policy_that_ignores_the_temperature_is_refused(monkeypatch):
    real = solutions.log_policy
    monkeypatch.setattr(
        solutions,
        "log_policy",
        lambda logits, c, spec: real(logits, c, replace(spec, temperature=1.0)),
    )
    with pytest.raises(AssertionError, match="temperature=2.0"):
        test_exercise_04_mask(solutions, 2, 2.0)


def test_they_are_found_from_another_folder(tmp_path):
    """A student need not stand in the project's root."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__)),
        "-k",
        "exercise_01",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def smoke(module):
    """What a careless test would look at: shapes, finite losses, and gradients that exist."""
    logits = torch.randn(3, 6, requires_grad=True)
    tokens, log_pi = module.draw_tokens(logits, 5)
    assert tokens.shape == log_pi.shape == (3, 5)
    R = -torch.rand(3, 5)
    a, b = module.truncated_weights(R, log_pi.detach(), tokens[..., None])
    loss = module.surrogate(a, b, log_pi, R)
    loss.backward()
    assert loss.isfinite() and logits.grad.abs().max() > 0


def check_8(module):
    """Every token must be drawn as often as its returned log-prob says."""
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 0.5, 0.0, -0.5, -1.0, 0.2]])
    tokens, log_probs = module.draw_tokens(logits, 50_000)
    torch.testing.assert_close(log_probs.exp(), logits.softmax(-1)[0, tokens])
    torch.testing.assert_close(
        tokens[0].bincount(minlength=6) / 50_000,
        logits.softmax(-1)[0],
        rtol=0,
        atol=0.01,
        msg=lambda m: f"tokens are drawn at other rates than their log-probs say. {m}",
    )


def check_9(module):
    """Autograd of the loss is -a for log pi and -b for log p."""
    a, b, log_pi, log_p = torch.randn(4, 2, 3)
    log_pi.requires_grad_(), log_p.requires_grad_()
    module.surrogate(a, b, log_pi, log_p).backward()
    for name, weight, value in (("log_pi", a, log_pi), ("log_p", b, log_p)):
        assert value.grad is not None, f"{name} gets no gradient at all"
        assert torch.equal(value.grad, -weight), (
            f"the gradient of {name} is {value.grad}, not {-weight}"
        )


def check_10(module):
    """A repeated warmup counts once: the weights of (c, c, d) are those of (c, d)."""
    pi, p = torch.tensor([0.6, 0.1]).log(), torch.tensor([0.2, 0.9]).log()
    pick = torch.tensor([[0, 0, 1]])
    a, _ = module.truncated_weights(p[pick], pi[pick], pick[..., None])
    torch.testing.assert_close(
        torch.stack([a[0, :2].sum(), a[0, 2]]),
        (pi + p).softmax(0),
        msg=lambda m: f"(c, c, d) does not give c and d the weights that (c, d) gives. {m}",
    )


CHECKS = {8: check_8, 9: check_9, 10: check_10}


@pytest.mark.parametrize("number", CHECKS, ids="exercise_{:02d}".format)
def test_planted_bug(work, number):
    smoke(work)
    CHECKS[number](work)


@pytest.mark.parametrize("number", CHECKS, ids="exercise_{:02d}".format)
def test_the_broken_functions_pass_the_smoke_run_and_fail_their_check(number, request):
    if request.config.getoption("--mine", False):
        pytest.skip("they are broken: that is the exercise")
    smoke(broken)
    with pytest.raises((AssertionError, RuntimeError)):
        CHECKS[number](broken)


# ----------------------------------------------------------------------------- exercise 5's experiments


@pytest.mark.parametrize("estimator", ["marginal", "jensen", "iwae", "grpo", "exact"])
def test_xor_is_solved_with_a_warmup(estimator):
    assert toys.solve("xor", estimator) < 0.1


@pytest.mark.parametrize("estimator", ["frozen", "best"])
def test_xor_is_not_solved_without_a_gradient_or_by_hard_em(estimator):
    assert toys.solve("xor", estimator) > 0.99 * math.log(2)


def test_paraphrases_part_marginal_from_jensen():
    """Of four equally good words, jensen wants the same log-prob for all c; marginal lets each c have its word."""
    assert toys.solve("paraphrases", "marginal", samples=16) < 4
    assert toys.solve("paraphrases", "jensen", samples=16) > 8


def test_a_blind_target_learns_through_the_warmup_alone():
    assert toys.solve("blind", "marginal") < 0.3 and toys.solve(
        "blind", "frozen"
    ) > 0.99 * math.log(8)
