"""warmup.py: the gradient is the one on paper. Exact where it can be: every warmup, every tuple of warmups.

The toy: 4 warmups (or a tiny transformer with few), K=3 samples, so all 64 triples can be enumerated, each
weighted by its probability, and the summed autograd gradients compared with the gradient of log P(y|x).
"""

import itertools
import math

import pytest
import torch

from model import EncoderDecoder, ModelConfig
from warmup import (ESTIMATORS, Batch, WarmupSpec, diagnostics, direct_logprobs, evaluate_warmups, frozen, generate,
                    marginal, sample_warmups, score, sft_loss, surrogate, target_tokens, warmup_loss)

F64 = dict(dtype=torch.float64)


# ----------------------------------------------------------------------------- the estimator, by enumeration


def tables(seed=0, scale=1.0):
    """A tabular model: logits of P(c|x) over 4 warmups, and of P(y|x,c) over 5 targets (y is target 0)."""
    generator = torch.Generator().manual_seed(seed)
    policy = torch.randn(4, generator=generator, **F64).mul(scale).requires_grad_()
    target = torch.randn(4, 5, generator=generator, **F64).mul(scale).requires_grad_()
    return policy, target


def log_marginal(policy, target):
    """log P(y|x) = log Σ_c P(c|x) P(y|x,c), exactly."""
    return (policy.log_softmax(0) + target.log_softmax(1)[:, 0]).logsumexp(0)


def expected_gradient(estimator, policy, target, K):
    """E over all K-tuples of warmups of the surrogate's gradient, sign flipped: (4,), (4,5)."""
    grads = [torch.zeros_like(policy), torch.zeros_like(target)]
    probability = policy.detach().softmax(0)
    for tuple_ in itertools.product(range(4), repeat=K):
        c = torch.tensor(tuple_)
        log_pi, log_p = policy.log_softmax(0)[c][None], target.log_softmax(1)[c, 0][None]  # (1,K)
        a, b = estimator(log_p.detach())
        loss = surrogate(a, b, log_pi, log_p)
        for total, grad in zip(grads, torch.autograd.grad(loss, (policy, target))):
            total -= probability[c].prod() * grad
    return grads


def cosine(a, b):
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in (a, b))
    return (a @ b / a.norm() / b.norm()).item()


def test_fisher_identity():
    """∇ log P(y|x) = Σ_c posterior(c) (∇ log P(c|x) + ∇ log P(y|x,c)): eq. (1) with all c instead of samples."""
    policy, target = tables()
    log_pi, log_p = policy.log_softmax(0), target.log_softmax(1)[:, 0]
    posterior = (log_pi + log_p).detach().softmax(0)
    ours = torch.autograd.grad((posterior * (log_pi + log_p)).sum(), (policy, target))
    exact = torch.autograd.grad(log_marginal(policy, target), (policy, target))
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_frozen_is_the_exact_gradient_of_the_expected_log_prob_for_the_target_alone():
    policy, target = tables()
    policy_grad, target_grad = expected_gradient(frozen, policy, target, K=3)
    expected = (policy.detach().softmax(0) * target.log_softmax(1)[:, 0]).sum()  # E_c[log p], c's policy fixed
    torch.testing.assert_close(target_grad, torch.autograd.grad(expected, target)[0], rtol=1e-10, atol=1e-10)
    assert policy_grad.abs().max() == 0


def test_marginal_bias_falls_with_k():
    """The expected gradient approaches ∇ log P(y|x): at K = 2, 3, 4, 5 ever nearer, about as 1/K."""
    for seed in range(3):
        policy, target = tables(seed)
        exact = torch.autograd.grad(log_marginal(policy, target), (policy, target))
        errors = []
        for K in (2, 3, 4, 5):
            grads = expected_gradient(marginal, policy, target, K)
            errors.append(sum((a - b).pow(2).sum() for a, b in zip(grads, exact)).sqrt().item())
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.6 * errors[0]


def test_marginal_points_along_the_exact_gradient_on_a_peaked_example():
    policy, target = tables(0, scale=2.0)
    exact = torch.autograd.grad(log_marginal(policy, target), (policy, target))
    assert cosine(expected_gradient(marginal, policy, target, 3), exact) > 0.9
    assert cosine(expected_gradient(frozen, policy, target, 3), exact) < cosine(
        expected_gradient(marginal, policy, target, 3), exact)


def test_marginal_equals_the_gradient_of_the_monte_carlo_objective_for_the_target():
    """Its b half is autograd of log mean_k p_k = logsumexp(R) - log K, sample by sample, not only on average."""
    log_p = torch.randn(5, 4, requires_grad=True, **F64)
    _, b = marginal(log_p.detach())
    torch.testing.assert_close(b, torch.autograd.grad(log_p.logsumexp(1).sum(), log_p)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_weights_sum_as_they_should(name):
    """Σ a = 0 (a baseline was taken off) and Σ b = 1 (as much target gradient as SFT)."""
    a, b = ESTIMATORS[name](10 * torch.randn(6, 4, **F64))
    torch.testing.assert_close(a.sum(1), torch.zeros(6, **F64), rtol=0, atol=1e-10)
    torch.testing.assert_close(b.sum(1), torch.ones(6, **F64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_equal_rewards_push_no_warmup_and_a_constant_changes_nothing(name):
    R = torch.randn(6, 4, **F64)
    assert ESTIMATORS[name](R[:, :1].expand(6, 4))[0].abs().max() < 1e-15
    for one, other in zip(ESTIMATORS[name](R), ESTIMATORS[name](R - 700)):  # p = e^-700 must not underflow
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_better_warmups_are_pushed_up_and_worse_down():
    a, b = marginal(torch.tensor([[0.0, 1.0, 3.0]]))
    assert a[0, 0] < 0 and a[0, 1] < 0 < a[0, 2] and b[0].argmax() == 2


def test_one_sample_cannot_be_compared():
    with pytest.raises(ValueError, match="--samples 2"):
        marginal(torch.zeros(3, 1))


def test_weights_carry_no_graph_and_the_target_term_does():
    """Two silent mistakes of published code: gradient through the weights, and a target term that is cut off."""
    policy, target = tables()
    log_pi, log_p = policy.log_softmax(0)[None, :3], target.log_softmax(1)[None, :3, 0]
    a, b = marginal(log_p)  # with graph on purpose: surrogate must cut it
    fixed = surrogate(*(w.detach() for w in (a, b)), log_pi, log_p)
    for x, y in zip(*(torch.autograd.grad(loss, (policy, target), retain_graph=True)
                      for loss in (surrogate(a, b, log_pi, log_p), fixed))):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(fixed, target)[0].abs().max() > 0.01


# ----------------------------------------------------------------------------- with the real model

V, SEP = 7, 3


def toy_model(seed=0):
    torch.manual_seed(seed)
    c = ModelConfig(vocab_size=V, width=16, heads=2, head_size=8, ff=16, encoder_layers=1, decoder_layers=1, dropout=0.0)
    model = EncoderDecoder(c).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.4 * torch.randn_like(p)
    return model


def toy_batch():
    """Two examples: padded source, one prompt token, padded target; </s> is 1."""
    return Batch(torch.tensor([[4, 5, 6], [6, 4, 0]]), torch.tensor([[5], [6]]), torch.tensor([[4, 6, 1], [5, 1, 0]]))


def spec(length=2, min_length=None, **changes):
    return WarmupSpec(SEP, (0, 1, 2, SEP), length, min_length or length, **changes)


def all_warmups(s: WarmupSpec):
    """Every c that sampling can produce: content tokens, or an early <sep> filled up with <sep>."""
    for c in itertools.product(range(V), repeat=s.length):
        stop = c.index(SEP) if SEP in c else s.length
        content, rest = c[:stop], c[stop:]
        if stop >= s.min_length and set(rest) <= {SEP} and not set(content) & {0, 1, 2}:
            yield c


@pytest.mark.parametrize("length, min_length, temperature", [(1, 1, 1.0), (2, 2, 1.0), (3, 1, 1.0), (3, 2, 0.7)])
def test_the_probabilities_of_all_warmups_sum_to_one(length, min_length, temperature):
    model, batch, s = toy_model(), toy_batch(), spec(length, min_length, temperature=temperature)
    c = torch.tensor(list(all_warmups(s)))[None].expand(2, -1, -1)  # (2,all,W)
    log_pi, _ = score(model, model.encode(batch.source), batch.prompt, c, batch.target, s)
    torch.testing.assert_close(log_pi.exp().sum(1), torch.ones(2, **F64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length, min_length, temperature", [(2, 2, 1.0), (4, 1, 1.3)])
def test_sampled_and_teacher_forced_logprobs_agree(length, min_length, temperature):
    model, batch, s = toy_model(), toy_batch(), spec(length, min_length, temperature=temperature)
    torch.manual_seed(0)
    memory = model.encode(batch.source)
    c, sampled = sample_warmups(model, memory.detach(), batch.prompt, s, samples=40)
    scored, _ = score(model, memory, batch.prompt, c, batch.target, s)
    torch.testing.assert_close(sampled.double(), scored, rtol=1e-5, atol=1e-5)
    assert {tuple(row) for row in c.view(-1, length).tolist()} <= set(all_warmups(s))


def test_a_row_scores_alone_as_it_does_in_a_padded_batch():
    model, batch, s = toy_model(), toy_batch(), spec()
    c = torch.tensor([[[4, 5], [6, 6]], [[5, 4], [4, 4]]])
    both = score(model, model.encode(batch.source), batch.prompt, c, batch.target, s)
    alone = Batch(batch.source[1:, :2], batch.prompt[1:], batch.target[1:, :2])
    one = score(model, model.encode(alone.source), alone.prompt, c[1:], alone.target, s)
    for x, y in zip(both, one):
        torch.testing.assert_close(x[1:], y, rtol=1e-10, atol=1e-10)
    direct = direct_logprobs(model, model.encode(batch.source), batch)
    torch.testing.assert_close(direct[1:], direct_logprobs(model, model.encode(alone.source), alone), rtol=1e-10, atol=1e-10)


def test_score_is_the_chain_rule_over_the_full_sequence():
    """log P(c|x) and log P(y|x,c), token by token from full softmaxes, with the mask written out."""
    model, batch, s = toy_model(), toy_batch(), spec(2)
    c = torch.tensor([[[4, 5]], [[6, 4]]])
    log_pi, log_p = score(model, model.encode(batch.source), batch.prompt, c, batch.target, s)
    for i, (x, y) in enumerate([([4, 5, 6], [4, 6, 1]), ([6, 4], [5, 1])]):
        sequence = [0, batch.prompt[i, 0].item(), *c[i, 0].tolist(), SEP, *y]
        memory, pi, p = model.encode(torch.tensor([x])), 0.0, 0.0
        for t in range(2, len(sequence)):
            logits = model.logits(model.decode(torch.tensor([sequence[:t]]), memory))[0, -1]
            if t < 4:
                logits[[0, 1, 2, SEP]] = -math.inf
                pi += logits.log_softmax(0)[sequence[t]].item()
            elif t > 4:  # at t = 4 <sep> is forced: no choice, no log-prob
                p += logits.log_softmax(0)[sequence[t]].item()
        assert log_pi[i, 0].item() == pytest.approx(pi, abs=1e-10)
        assert log_p[i, 0].item() == pytest.approx(p, abs=1e-10)


def test_forced_seps_after_an_early_stop_carry_no_logprob():
    model, batch, s = toy_model(), toy_batch(), spec(3, 1)
    early = torch.tensor([[[4, SEP, SEP]]] * 2)
    log_pi, _ = score(model, model.encode(batch.source), batch.prompt, early, batch.target, s)
    tokens = torch.cat([torch.zeros(2, 1, dtype=torch.long), batch.prompt, early[:, 0, :1]], 1)
    logits = model.logits(model.decode(tokens, model.encode(batch.source)))
    logits[:, :, :3] = -math.inf
    logits[:, 1, SEP] = -math.inf  # the first token may not stop
    expected = logits[:, 1].log_softmax(-1)[:, 4] + logits[:, 2].log_softmax(-1)[:, SEP]
    torch.testing.assert_close(log_pi[:, 0], expected, rtol=1e-10, atol=1e-10)


def test_warmup_loss_has_the_exact_gradient_on_average_over_all_pairs():
    """The whole path: 9 pairs of one-token warmups through the transformer, K=2, every parameter."""
    model, batch, s = toy_model(), toy_batch().index(slice(1)), spec(1)
    parameters, choices = [p for p in model.parameters()], torch.tensor(list(all_warmups(spec(1))))
    grads, log_p_all = [torch.zeros_like(p) for p in parameters], None
    memory = model.encode(batch.source)
    log_pi_all, log_p_all = score(model, memory, batch.prompt, choices[None], batch.target, s)  # (1,3)
    for i, j in itertools.product(range(3), repeat=2):
        log_pi, log_p = score(model, model.encode(batch.source), batch.prompt, choices[[i, j]][None], batch.target, s)
        loss = surrogate(*frozen(log_p.detach()), log_pi, log_p)
        for total, grad in zip(grads, torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)):
            total += (log_pi_all[0, i] + log_pi_all[0, j]).exp().item() * grad
    expected = -(log_pi_all.detach().exp() * log_p_all).sum()
    exact = torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True)
    for a, b in zip(grads, exact):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_warmup_loss_is_sample_score_estimate_surrogate(monkeypatch):
    """warmup_loss on its own samples equals the parts put together by hand, gradient included."""
    model, batch, s = toy_model(), toy_batch(), spec(2)
    torch.manual_seed(3)
    loss, stats = warmup_loss(model, batch, s, "marginal", samples=5)
    torch.manual_seed(3)
    memory = model.encode(batch.source)
    c, _ = sample_warmups(model, memory.detach(), batch.prompt, s, 5)
    log_pi, log_p = score(model, memory, batch.prompt, c, batch.target, s)
    w = log_p.detach().softmax(1)
    by_hand = -((w - 0.2) * log_pi + w * log_p).sum()
    for a, b in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (loss, by_hand))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert stats["reward"].item() == pytest.approx(log_p.mean(1).sum().item())


def test_policy_updates_refuse_decoder_dropout():
    model, batch = toy_model().train(), toy_batch()
    with pytest.raises(ValueError, match="decoder.eval"):
        warmup_loss(model, batch, spec())


def test_early_stop_needs_a_consistent_spec():
    with pytest.raises(ValueError, match="min_length"):
        WarmupSpec(SEP, (0, SEP), length=2, min_length=3)
    with pytest.raises(ValueError, match="forbidden"):
        WarmupSpec(SEP, (0,), length=2, min_length=2)


# ----------------------------------------------------------------------------- SFT, diagnostics, generation


def test_sft_loss_counts_target_tokens_only():
    model, batch = toy_model(), toy_batch()
    tokens = torch.tensor([[0, 5, 4, 6], [0, 6, 5, 1]])
    log_probs = model.logits(model.decode(tokens, model.encode(batch.source))).log_softmax(-1)
    expected = sum(log_probs[0, i + 1, t] for i, t in enumerate([4, 6, 1]))
    expected += sum(log_probs[1, i + 1, t] for i, t in enumerate([5, 1]))
    torch.testing.assert_close(sft_loss(model, batch), -expected, rtol=1e-10, atol=1e-10)
    assert target_tokens(model, batch) == 5


def test_diagnostics_by_hand():
    R = torch.tensor([[0.0, math.log(3.0)], [-2.0, -2.0]])
    c = torch.tensor([[[4, 5], [4, 6]], [[4, 4], [4, 4]]])
    d = diagnostics(R, torch.tensor([[-1.0, -3.0], [-2.0, -2.0]]), c)
    assert d["marginal_nll"].item() == pytest.approx(-math.log(2.0) + 2.0)  # means of p: 2 and e^-2
    assert d["reward"].item() == pytest.approx(math.log(3.0) / 2 - 2.0)
    assert d["spread"].item() == pytest.approx(math.log(3.0) / 2)
    assert d["ess"].item() == pytest.approx(1 / (0.25**2 + 0.75**2) + 2.0)
    assert d["entropy"].item() == pytest.approx(4.0)
    assert d["distinct"].item() == pytest.approx(1.0 + 0.5)


def test_swap_gap_is_zero_when_the_target_ignores_c_and_not_otherwise():
    model, batch, s = toy_model(), toy_batch(), spec()
    torch.manual_seed(0)
    assert abs(evaluate_warmups(model, batch, s, 8)["swap_gap"].item()) > 1e-3
    with torch.no_grad():  # no self-attention in the decoder: y cannot see c
        model.decoder.blocks[0].self_attention.out.weight.zero_()
    assert evaluate_warmups(model, batch, s, 8)["swap_gap"].abs().item() < 1e-9


def test_generate_writes_warmup_then_target():
    """c is the greedy warmup; y continues [start] prompt c <sep> greedily; no special token inside."""
    model, batch, s = toy_model(2), toy_batch(), spec(2)
    c, y = generate(model, batch, s, 4)
    memory = model.encode(batch.source)
    assert torch.equal(c, sample_warmups(model, memory, batch.prompt, s, 1, temperature=0)[0][:, 0])
    tokens = torch.cat([torch.zeros(2, 1, dtype=torch.long), batch.prompt, c, torch.full((2, 1), SEP)], 1)
    logits = model.logits(model.decode(tokens, memory))[:, -1]
    logits[:, [0, SEP]] = -math.inf
    assert torch.equal(logits.argmax(-1), y[:, 0])
    assert not (y == SEP).any()


def test_generate_beam_sampled_and_without_warmup():
    model, batch, s = toy_model(2), toy_batch(), spec(2)
    none, direct = generate(model, batch, None, 4)
    assert none is None and direct.shape == (2, 4)
    c, y = generate(model, batch, s, 4, beams=3)
    assert torch.equal(c, generate(model, batch, s, 4)[0]) and y.shape == (2, 4)
    torch.manual_seed(0)
    several = {tuple(generate(model, batch, s, 4, warmup_temperature=1.0, temperature=1.0)[0][0].tolist()) for _ in range(20)}
    assert len(several) > 1


def test_empty_prompts_work():
    model, b = toy_model(), toy_batch()
    batch = Batch(b.source, torch.empty(2, 0, dtype=torch.long), b.target)
    assert sft_loss(model, batch).isfinite() and warmup_loss(model, batch, spec())[0].isfinite()


def test_bfloat16_reaches_every_parameter(monkeypatch):
    """Regression guard: autocast's weight cache, filled while sampling, once left scoring without gradients."""
    import eval as evaluation

    torch.manual_seed(0)
    c = ModelConfig(vocab_size=V, width=16, heads=2, head_size=8, ff=16, encoder_layers=1, decoder_layers=1, dropout=0.0)
    model, batch, norms = EncoderDecoder(c).eval(), toy_batch(), []
    for dtype in ("float32", "bfloat16"):
        model.zero_grad()
        torch.manual_seed(5)
        config = type("Config", (), {"dtype": dtype})
        with evaluation.precision(config, torch.device("cpu")):
            assert not torch.is_autocast_cache_enabled() or dtype == "float32"
            loss, _ = warmup_loss(model, batch, spec(1), "frozen", samples=3)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_swap_gap_does_not_count_an_example_without_a_neighbour():
    assert evaluate_warmups(toy_model(), toy_batch().index(slice(1)), spec(), 2)["swapped"].item() == 0
    assert evaluate_warmups(toy_model(), toy_batch(), spec(), 2)["swapped"].item() == 2
