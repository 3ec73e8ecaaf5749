"""warmup.py: the gradient is the one on paper. Exact where it can be: every warmup, every tuple of warmups.

The toy: 4 warmups (or a tiny transformer with few), K=3 samples, so all 64 triples can be enumerated, each
weighted by its probability, and the summed autograd gradients compared with the gradient of log P(y|x).

Each line of the paper's mathematics was broken once to see a test fail:
    marginal without -1/K, softmax over the batch     test_equal_rewards_…, test_marginal_equals_the_gradient_of_…
    mean_of_others with k itself, or over K           test_mean_of_others_…, test_weights_sum_…
    jensen or prob without baseline                   test_weights_sum_…, test_equal_rewards_…
    iwae's baseline with k itself; prob with b = w    test_jensen_prob_and_iwae_are_exact
    grpo without its mean; best takes the worst       test_weights_sum_…, test_better_warmups_are_pushed_up_…
    truncated counts repeats; forgets pi              test_truncated_is_exact_…, test_fisher_identity_…
    first_occurrence keeps the last, not the first    test_first_occurrence_by_hand
    frozen with b = 1                                 test_frozen_is_exact_for_the_target_alone
    weights with a graph; target term detached        test_weights_carry_no_graph_…, test_fisher_identity_…
    scored without mask; forced <sep> scored          test_the_probabilities_of_all_warmups_sum_to_one
    other temperature, or <sep> allowed, in one       test_sampled_and_teacher_forced_logprobs_agree
    y one place late                                  test_score_is_the_chain_rule_over_the_full_sequence
    alpha ignored                                     test_alpha_and_temperature_as_by_hand
    swapped with itself; gain turned round            test_swap_gap_is_zero_…, test_gain_over_empty_by_hand
    <sep> written into y                              test_generate_writes_warmup_then_target
    a sampled warmup at test time                     test_generate_writes_the_greedy_warmup
    </s> forbidden with the other special ids         test_generate_may_end_its_target_…
    forbidden ids, length penalty not passed on       test_generate_passes_on_…
    a repeat gets another row's log-probs or memory   test_distinct_warmups_scored_once_are_the_plain_path
    distinct_rows mixes up examples, keeps the last   test_distinct_rows_by_hand
    more rows computed, or fewer reported             test_a_repeated_warmup_is_computed_once
    cast weights of sampling used in scoring          test_bfloat16_reaches_every_parameter
    weights cast at every token                       test_in_low_precision_weights_are_cast_once_…
"""

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import warmup
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import drawn_logprobs
from model import EncoderDecoder, ModelConfig, beam_search, decoding, precision
from warmup import (
    ESTIMATORS,
    Batch,
    Scores,
    WarmupSpec,
    all_warmups,
    diagnostics,
    direct_logprobs,
    distinct_rows,
    evaluate_warmups,
    first_occurrence,
    generate,
    marginal,
    mean_of_others,
    sample_warmups,
    score,
    score_rows,
    sft_loss,
    surrogate,
    target_tokens,
    teacher_force,
    warmup_logprobs,
    warmup_loss,
    weights,
    with_start,
)

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


def tuples(policy, K):
    """All K-tuples of warmups with their probability."""
    probability = policy.detach().softmax(0)
    for c in itertools.product(range(4), repeat=K):
        yield torch.tensor(c), probability[list(c)].prod()


def expected_gradient(estimator, policy, target, K=3, alpha=1.0):
    """E over all K-tuples of warmups of the surrogate's gradient, sign flipped: (4,), (4,5)."""
    grads = [torch.zeros_like(policy), torch.zeros_like(target)]
    for c, probability in tuples(policy, K):
        log_pi, log_p = policy.log_softmax(0)[c][None], target.log_softmax(1)[c, 0][None]  # (1,K)
        a, b = weights(estimator, alpha * log_p.detach(), log_pi.detach(), c[None, :, None])
        for total, grad in zip(
            grads, torch.autograd.grad(surrogate(a, b, log_pi, log_p), (policy, target))
        ):
            total -= probability * grad
    return grads


def check(ours, objective, parameters):
    for a, b in zip(
        ours, torch.autograd.grad(objective, parameters, allow_unused=True, materialize_grads=True)
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def cosine(a, b):
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in (a, b))
    return (a @ b / a.norm() / b.norm()).item()


def test_fisher_identity_so_exact_is_the_gradient_of_the_marginal_likelihood():
    """∇ log P(y|x) = Σ_c posterior(c) (∇ log P(c|x) + ∇ log P(y|x,c)): eq. (1) with all c instead of samples."""
    policy, target = tables()
    log_pi, log_p = policy.log_softmax(0)[None], target.log_softmax(1)[None, :, 0]
    a, b = weights("exact", log_p.detach(), log_pi.detach(), torch.arange(4)[None, :, None])
    ours = torch.autograd.grad(-surrogate(a, b, log_pi, log_p), (policy, target))
    check(ours, log_marginal(policy, target), (policy, target))


def mean_over_tuples(policy, target, K, value):
    """E over all K-tuples of value(log p (K,)), with the graph through the tuples' probabilities too."""
    pi, log_p = policy.softmax(0), target.log_softmax(1)[:, 0]
    return sum(
        pi[list(c)].prod() * value(log_p[list(c)]) for c in itertools.product(range(4), repeat=K)
    )


OBJECTIVES = {  # what the expected gradient is exactly the gradient of
    "jensen": lambda log_p: log_p.mean(),  # E_c[log p]
    "prob": lambda log_p: log_p.exp().mean(),  # P(y|x)
    "iwae": lambda log_p: log_p.logsumexp(0) - math.log(len(log_p)),  # E[log mean_K p]
}


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_jensen_prob_and_iwae_are_exact(name, K):
    policy, target = tables()
    objective = mean_over_tuples(policy, target, K, OBJECTIVES[name])
    check(expected_gradient(name, policy, target, K), objective, (policy, target))


@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize("name", [*OBJECTIVES, "exact"])
def test_with_alpha_a_is_exact_for_p_to_the_alpha_and_b_lacks_the_factor(name, alpha):
    """b is 1/alpha of what would be exact: alpha does not change how fast y learns."""
    policy, target = tables()
    if name == "exact":
        log_pi, log_p = policy.log_softmax(0)[None], target.log_softmax(1)[None, :, 0]
        every = torch.arange(4)[None, :, None]
        a, b = weights(name, alpha * log_p.detach(), log_pi.detach(), every)
        loss = -surrogate(a, b, log_pi, log_p)
        for_policy, for_target = torch.autograd.grad(loss, (policy, target), retain_graph=True)
        objective = (log_pi + alpha * log_p).logsumexp(1)[0]
    else:
        for_policy, for_target = expected_gradient(name, policy, target, 2, alpha)
        value = lambda log_p: OBJECTIVES[name](alpha * log_p)
        objective = mean_over_tuples(policy, target, 2, value)
    check([for_policy, alpha * for_target], objective, (policy, target))


def test_frozen_is_exact_for_the_target_alone():
    """Of E_c[log p] with c's policy held fixed."""
    policy, target = tables()
    expected = (policy.detach().softmax(0) * target.log_softmax(1)[:, 0]).sum()
    check(expected_gradient("frozen", policy, target), expected, (policy, target))


def test_truncated_is_exact_for_each_set_of_distinct_warmups():
    """log Σ pi p over the set, a repeated warmup counted once: every triple, not only on average."""
    policy, target = tables()
    for c, _ in tuples(policy, 3):
        log_pi, log_p = policy.log_softmax(0)[c][None], target.log_softmax(1)[c, 0][None]
        a, b = weights("truncated", log_p.detach(), log_pi.detach(), c[None, :, None])
        ours = torch.autograd.grad(
            -surrogate(a, b, log_pi, log_p), (policy, target), retain_graph=True
        )
        distinct = c.unique()
        check(
            ours,
            (policy.log_softmax(0) + target.log_softmax(1)[:, 0])[distinct].logsumexp(0),
            (policy, target),
        )


def test_marginal_bias_falls_with_k():
    """The expected gradient approaches ∇ log P(y|x): at K = 2, 3, 4, 5 ever nearer, about as 1/K."""
    for seed in range(3):
        policy, target = tables(seed)
        exact = torch.autograd.grad(log_marginal(policy, target), (policy, target))
        errors = []
        for K in (2, 3, 4, 5):
            grads = expected_gradient("marginal", policy, target, K)
            errors.append(sum((a - b).pow(2).sum() for a, b in zip(grads, exact)).sqrt().item())
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.6 * errors[0]


def test_directions_on_a_peaked_example():
    """The cosine of each expected gradient (K=3) with ∇ log P(y|x): 1 for prob, since ∇P = P ∇ log P."""
    policy, target = tables(0, scale=2.0)
    exact = torch.autograd.grad(log_marginal(policy, target), (policy, target))
    cosines = {name: cosine(expected_gradient(name, policy, target), exact) for name in ESTIMATORS}
    assert cosines["prob"] == pytest.approx(1.0, abs=1e-10)
    assert 0.99 < cosines["marginal"] < 0.9999  # biased
    assert max(cosines[name] for name in ("jensen", "grpo", "frozen")) < cosines["marginal"]


def test_marginal_equals_the_gradient_of_the_monte_carlo_objective_for_the_target():
    """Its b half is autograd of log mean_k p_k = logsumexp(R) - log K, sample by sample, not only on average."""
    log_p = torch.randn(5, 4, requires_grad=True, **F64)
    _, b = marginal(log_p.detach())
    torch.testing.assert_close(
        b, torch.autograd.grad(log_p.logsumexp(1).sum(), log_p)[0], rtol=1e-10, atol=1e-10
    )


def make(name, R):
    """a, b of distinct warmups, with an even policy."""
    c = torch.arange(R.size(1))[None, :, None].expand(len(R), -1, 1)
    return weights(name, R, torch.full_like(R, math.log(0.1)), c)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_weights_sum_as_they_should(name):
    """Σ b = 1 (as much target gradient as SFT; prob: Σ b = mean p) and Σ a = 0 (a baseline was taken off).

    iwae's Σ a is not 0: the mean of the leave-one-out logs lies under the log of the mean, so it is above 0.
    """
    R = 10 * torch.randn(6, 4, **F64)
    a, b = make(name, R)
    torch.testing.assert_close(
        b.sum(1),
        R.exp().mean(1) if name == "prob" else torch.ones(6, **F64),
        rtol=1e-10,
        atol=1e-10,
    )
    if name == "iwae":
        assert (a.sum(1) > 0).all()
    else:
        expected = torch.full((6,), float(name in ("best", "truncated")), **F64)
        torch.testing.assert_close(a.sum(1), expected, rtol=0, atol=1e-10 * R.exp().max().item())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equal_rewards_push_no_warmup_and_a_constant_changes_nothing(name):
    R = torch.randn(6, 4, **F64)
    if name not in ("best", "truncated"):
        assert make(name, R[:, :1].expand(6, 4))[0].abs().max() < 1e-14
    if name != "prob":
        for one, other in zip(make(name, R), make(name, R - 700)):  # p = e^-700 must not underflow
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"frozen", "truncated"}))
def test_better_warmups_are_pushed_up_and_worse_down(name):
    """And y learns most from the best, or from all alike (jensen, grpo)."""
    (a,), (b,) = (weight.tolist() for weight in make(name, torch.tensor([[-3.0, -2.0, -0.5]])))
    if name == "best":
        assert a == b == [0, 0, 1]
    else:
        assert a[0] < a[1] < a[2] and a[0] < 0 < a[2]
        alike = name in ("jensen", "grpo")
        assert b == pytest.approx([1 / 3] * 3) if alike else 0 < b[0] < b[1] < b[2]


def test_mean_of_others_by_hand():
    x = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    expected = torch.tensor([[4.0, 3.5, 1.5], [1.5, 1.5, 0.0]])
    torch.testing.assert_close(mean_of_others(x), expected)
    with pytest.raises(ValueError, match="--samples 2"):
        mean_of_others(x[:, :1])


def test_first_occurrence_by_hand():
    """Within an example only: the second one's first warmup equals none before it."""
    c = torch.tensor([[[4, 5], [5, 4], [4, 5], [4, 5]], [[4, 5], [4, 4], [5, 4], [4, 4]]])
    assert first_occurrence(c).tolist() == [[True, True, False, False], [True, True, True, False]]


def test_grpo_weighs_by_standard_deviations():
    a, _ = make("grpo", torch.tensor([[0.0, 1.0, 2.0]]))  # mean 1, std 1
    torch.testing.assert_close(a, torch.tensor([[-1.0, 0.0, 1.0]]) / 3, rtol=1e-3, atol=0)


def test_alpha_spans_frozen_marginal_and_best():
    R = torch.randn(6, 4, **F64)
    for alpha, name in ((0.0, "frozen"), (1e6, "best")):
        (a, b), (a_limit, b_limit) = make("marginal", alpha * R), make(name, R)
        torch.testing.assert_close(b, b_limit)
        torch.testing.assert_close(
            a, a_limit - (1 / 4 if name == "best" else 0)
        )  # marginal keeps its baseline


@pytest.mark.parametrize("name", ESTIMATORS)
def test_one_sample_cannot_be_compared(name):
    if name in ("frozen", "best"):
        make(name, torch.zeros(3, 1))
    else:
        with pytest.raises(ValueError, match="--samples 2"):
            make(name, torch.zeros(3, 1))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_weights_carry_no_graph_and_the_target_term_does(name):
    """Two silent mistakes of published code: gradient through the weights, and a target term that is cut off."""
    policy, target = tables()
    log_pi, log_p = policy.log_softmax(0)[None, :3], target.log_softmax(1)[None, :3, 0]
    a, b = weights(
        name, log_p, log_pi, torch.arange(3)[None, :, None]
    )  # with graph on purpose: surrogate must cut it
    by_hand = -(a.detach() * log_pi + b.detach() * log_p).sum()
    for x, y in zip(
        *(
            torch.autograd.grad(loss, (policy, target), retain_graph=True)
            for loss in (surrogate(a, b, log_pi, log_p), by_hand)
        )
    ):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(by_hand, target)[0].abs().max() > 0.01


# ----------------------------------------------------------------------------- with the real model

V, SEP = 7, 3


def toy_model(seed=0):
    torch.manual_seed(seed)
    c = ModelConfig(
        vocab_size=V,
        width=16,
        heads=2,
        head_size=8,
        ff=16,
        encoder_layers=1,
        decoder_layers=1,
        dropout=0.0,
    )
    model = EncoderDecoder(c).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.4 * torch.randn_like(p)
    return model


def toy_batch():
    """Two examples: padded source, one prompt token, padded target; </s> is 1."""
    return Batch(
        torch.tensor([[4, 5, 6], [6, 4, 0]]),
        torch.tensor([[5], [6]]),
        torch.tensor([[4, 6, 1], [5, 1, 0]]),
    )


def first_of(batch):
    return Batch(batch.source[:1], batch.prompt[:1], batch.target[:1])


def spec(length=2, **changes):
    return WarmupSpec(SEP, (0, 1, 2, SEP), length, **changes)


def by_brute_force(s: WarmupSpec):
    """Every c that sampling can produce: W tokens, none of them forbidden."""
    for c in itertools.product(range(V), repeat=s.length):
        if not set(c) & {0, 1, 2, SEP}:
            yield c


@pytest.mark.parametrize("length", [1, 2, 3])
def test_all_warmups_are_those_of_a_brute_force_search(length):
    s = spec(length)
    found = [tuple(c) for c in all_warmups(s, V).tolist()]
    assert sorted(found) == sorted(by_brute_force(s))


@pytest.mark.parametrize("length, temperature", [(1, 1.0), (2, 1.0), (3, 1.0), (3, 0.7)])
def test_the_probabilities_of_all_warmups_sum_to_one(length, temperature):
    model, batch, s = toy_model(), toy_batch(), spec(length, temperature=temperature)
    c = all_warmups(s, V)[None].expand(2, -1, -1)  # (2,all,W)
    log_pi, *_ = score(model, model.encode(batch.source), batch, c, s)
    torch.testing.assert_close(log_pi.exp().sum(1), torch.ones(2, **F64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length, temperature", [(2, 1.0), (4, 1.3)])
def test_sampled_and_teacher_forced_logprobs_agree(length, temperature):
    model, batch, s = toy_model(), toy_batch(), spec(length, temperature=temperature)
    torch.manual_seed(0)
    memory = model.encode(batch.source)
    with drawn_logprobs() as drawn:
        c = sample_warmups(model, memory, batch.prompt, s, samples=40)
    sampled = torch.cat(drawn, 1).sum(1).view(2, 40)
    scored, *_ = score(model, memory, batch, c, s)
    torch.testing.assert_close(sampled, scored, rtol=1e-10, atol=1e-10)
    assert {tuple(row) for row in c.view(-1, length).tolist()} <= {
        tuple(row) for row in all_warmups(s, V).tolist()
    }


def test_a_row_scores_alone_as_it_does_in_a_padded_batch():
    model, batch, s = toy_model(), toy_batch(), spec()
    c = torch.tensor([[[4, 5], [6, 6]], [[5, 4], [4, 4]]])
    both = score(model, model.encode(batch.source), batch, c, s)
    alone = Batch(batch.source[1:, :2], batch.prompt[1:], batch.target[1:, :2])
    one = score(model, model.encode(alone.source), alone, c[1:], s)
    for x, y in zip(both, one):
        torch.testing.assert_close(x[1:], y, rtol=1e-10, atol=1e-10)
    direct = direct_logprobs(model, model.encode(batch.source), batch)
    torch.testing.assert_close(
        direct[1:],
        direct_logprobs(model, model.encode(alone.source), alone),
        rtol=1e-10,
        atol=1e-10,
    )


def test_score_is_the_chain_rule_over_the_full_sequence():
    """log P(c|x) and log P(y|x,c), token by token from full softmaxes, with the mask written out."""
    model, batch, s = toy_model(), toy_batch(), spec(2)
    c = torch.tensor([[[4, 5]], [[6, 4]]])
    log_pi, log_p, _ = score(model, model.encode(batch.source), batch, c, s)
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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_logprobs_of_a_warmup_are_those_of_the_softmax_over_what_is_allowed(temperature):
    """warmup_logprobs, alone and within score, against the sum by hand."""
    model, batch, s = toy_model(), toy_batch(), spec(3, temperature=temperature)
    c = torch.tensor([[4, 6, 5], [5, 5, 6]])  # (N,W)
    memory = model.encode(batch.source)
    tokens = torch.cat([with_start(batch.prompt), c[:, :-1]], 1)
    hidden = model.decode(tokens, memory)[:, 1:]  # (N,W,E)
    logits = model.logits(hidden) / temperature
    logits[:, :, [0, 1, 2, SEP]] = -math.inf
    log_probs = logits.log_softmax(-1)
    one = log_probs[0, 0, 4] + log_probs[0, 1, 6] + log_probs[0, 2, 5]
    two = log_probs[1, 0, 5] + log_probs[1, 1, 5] + log_probs[1, 2, 6]
    expected = torch.stack([one, two])
    alone = warmup_logprobs(model, hidden, c, s)
    scored, *_ = score(model, memory, batch, c[:, None], s)
    for ours in (alone, scored[:, 0]):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_teacher_forcing_leaves_padding_out():
    model, batch = toy_model(), toy_batch()
    prefix, memory = torch.tensor([[0, 5], [0, 4]]), model.encode(batch.source)
    ours, hidden = teacher_force(model, memory, prefix, batch.target)
    log_probs = model.logits(hidden[:, 1:]).log_softmax(-1)  # (N,T,V)
    expected = [
        sum(log_probs[row, t, y] for t, y in enumerate(ys))
        for row, ys in enumerate([[4, 6, 1], [5, 1]])
    ]
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["frozen", "jensen", "iwae"])
def test_the_gradient_is_exact_on_average_through_the_whole_model(name):
    """All 9 pairs of one-token warmups through the transformer, K=2: the gradient of every parameter."""
    model, batch, s = toy_model(), first_of(toy_batch()), spec(1)
    parameters, choices = list(model.parameters()), all_warmups(s, V)
    memory = model.encode(batch.source)
    log_pi_all, log_p_all, _ = (x[0] for x in score(model, memory, batch, choices[None], s))  # (3,)
    grads, objective = [torch.zeros_like(p) for p in parameters], 0.0
    for i, j in itertools.product(range(3), repeat=2):
        memory = model.encode(batch.source)
        log_pi, log_p, _ = score(model, memory, batch, choices[[i, j]][None], s)
        loss = surrogate(
            *weights(name, log_p.detach(), log_pi.detach(), choices[[i, j]][None]), log_pi, log_p
        )
        probability = (log_pi_all[i] + log_pi_all[j]).exp()
        for total, grad in zip(
            grads, torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        ):
            total -= probability.item() * grad
        value = OBJECTIVES.get(name, OBJECTIVES["jensen"])(log_p_all[[i, j]])
        objective = objective + (probability.detach() if name == "frozen" else probability) * value
    check(grads, objective, parameters)


@pytest.mark.parametrize("length", [1, 2])
def test_warmup_loss_exact_is_the_gradient_of_the_marginal_likelihood(length):
    model, batch, s = toy_model(), toy_batch(), spec(length)
    parameters = list(model.parameters())
    loss, numbers, rows, sampled = warmup_loss(model, batch, s, "exact")
    assert rows.tolist() == [3**length] * 2 and sampled == 0  # all warmups differ
    c = all_warmups(s, V).expand(2, -1, -1)
    log_pi, log_p, _ = score(model, model.encode(batch.source), batch, c, s)
    log_marginal = (log_pi + log_p).logsumexp(1).sum()
    check([-g for g in torch.autograd.grad(loss, parameters)], log_marginal, parameters)
    assert numbers["nll", "token"].item() == pytest.approx(
        -log_marginal.item()
    )  # weighted by P(c|x)


def test_marginal_with_alpha_0_is_frozen_and_alpha_is_no_no_op():
    """A term that silently does nothing is a published mistake."""
    model, batch, s = toy_model(), toy_batch(), spec(1)

    def gradient(estimator="marginal", **options):
        torch.manual_seed(1)
        loss, *_ = warmup_loss(model, batch, s, estimator, 4, **options)
        return torch.autograd.grad(loss, list(model.parameters()))

    frozen = gradient("frozen")
    for a, b in zip(gradient(alpha=0.0), frozen):
        torch.testing.assert_close(a, b)
    assert max((a - b).abs().max() for a, b in zip(gradient(alpha=1.0), frozen)) > 1e-3


def test_alpha_and_temperature_as_by_hand():
    """warmup_loss(alpha) on given warmups, drawn at the temperature at which they are scored."""
    model, batch, s = toy_model(), toy_batch(), spec(2, temperature=0.5)
    torch.manual_seed(1)
    loss, *_ = warmup_loss(model, batch, s, "marginal", 4, alpha=2.5)
    torch.manual_seed(1)
    memory = model.encode(batch.source)
    c = sample_warmups(model, memory, batch.prompt, s, 4)
    log_pi, log_p, _ = score(model, memory, batch, c, s)
    a, b = marginal(2.5 * log_p.detach())
    by_hand = torch.autograd.grad(surrogate(a, b, log_pi, log_p), list(model.parameters()))
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), by_hand):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_cold_policy_samples_its_favourite():
    """At temperature 0.001 every sample is the greedy warmup, in warmup_loss, too: else it would be off-policy."""
    model, batch, s = toy_model(2), toy_batch(), spec(2, temperature=1e-3)
    assert warmup_loss(model, batch, s, "frozen", 8)[1][
        "distinct", "example"
    ].item() == pytest.approx(2 / 8)


def test_pause_is_a_constant_warmup_without_a_policy():
    model, batch, s = toy_model(), toy_batch(), spec(2, pause=True)
    c = sample_warmups(model, model.encode(batch.source), batch.prompt, s, 3)
    assert c.shape == (2, 3, 2) and (c == SEP).all()
    scored, log_p, _ = score(model, model.encode(batch.source), batch, c, s)
    assert (scored == 0).all()
    loss, numbers, rows, sampled = warmup_loss(model, batch, s, "pause", 3)
    torch.testing.assert_close(loss, -log_p[:, 0].sum(), rtol=1e-10, atol=1e-10)
    assert (rows.tolist(), sampled) == ([1, 1], 0)  # one row an example, whatever K
    assert numbers["nll", "token"] == pytest.approx(-log_p[:, 0].sum().item())
    assert (generate(model, batch, s, 4)[0] == SEP).all()


def test_warmup_loss_is_sample_score_estimate_surrogate():
    """warmup_loss on its own samples equals the parts put together by hand, gradient included."""
    model, batch, s = toy_model(), toy_batch(), spec(2)
    torch.manual_seed(3)
    loss, stats, *_ = warmup_loss(model, batch, s, "marginal", samples=5)
    torch.manual_seed(3)
    memory = model.encode(batch.source)
    c = sample_warmups(model, memory, batch.prompt, s, 5)
    log_pi, log_p, _ = score(model, memory, batch, c, s)
    w = log_p.detach().softmax(1)
    by_hand = -((w - 0.2) * log_pi + w * log_p).sum()
    for a, b in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (loss, by_hand))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert stats["reward", "example"].item() == pytest.approx(log_p.mean(1).sum().item())


def test_policy_updates_refuse_decoder_dropout():
    model, batch = toy_model().train(), toy_batch()
    with pytest.raises(ValueError, match="decoder.eval"):
        warmup_loss(model, batch, spec())


def test_a_spec_must_be_consistent():
    for length in (0, -1):
        with pytest.raises(ValueError, match="at least one token"):
            WarmupSpec(SEP, (0, SEP), length)
    with pytest.raises(ValueError, match="forbidden"):
        WarmupSpec(SEP, (0,), length=2)


# ----------------------------------------------------------------------------- SFT, diagnostics, generation


def test_sft_loss_counts_target_tokens_only():
    model, batch = toy_model(), toy_batch()
    tokens = torch.tensor([[0, 5, 4, 6], [0, 6, 5, 1]])
    log_probs = model.logits(model.decode(tokens, model.encode(batch.source))).log_softmax(-1)
    expected = sum(log_probs[0, i + 1, t] for i, t in enumerate([4, 6, 1]))
    expected += sum(log_probs[1, i + 1, t] for i, t in enumerate([5, 1]))
    torch.testing.assert_close(sft_loss(model, batch), -expected, rtol=1e-10, atol=1e-10)
    assert target_tokens(batch) == 5


def test_diagnostics_by_hand():
    R = torch.tensor([[0.0, math.log(3.0)], [-2.0, -2.0]])
    c = torch.tensor([[[4, 5], [4, 6]], [[4, 4], [4, 4]]])
    d = diagnostics(R, torch.tensor([[-1.0, -3.0], [-2.0, -2.0]]), c)
    assert d["nll", "token"].item() == pytest.approx(-math.log(2.0) + 2.0)  # means of p: 2 and e^-2
    assert d["reward", "example"].item() == pytest.approx(math.log(3.0) / 2 - 2.0)
    assert d["spread", "example"].item() == pytest.approx(math.log(3.0) / 2)
    assert d["ess", "example"].item() == pytest.approx(1 / (0.25**2 + 0.75**2) + 2.0)
    assert d["entropy", "example"].item() == pytest.approx(4.0)
    assert d["distinct", "example"].item() == pytest.approx(1.0 + 0.5)


def test_ess_is_that_of_the_weights_which_alpha_sharpens():
    """All else describes the reward itself, whatever alpha makes of it."""
    R, log_pi = torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2)
    c = torch.tensor([[[4], [5]]])
    one, two = (diagnostics(R, log_pi, c, alpha) for alpha in (1.0, 2.0))
    assert two.pop(("ess", "example")).item() == pytest.approx(
        1 / (0.1**2 + 0.9**2)
    )  # 1 : 9, not 1 : 3
    assert (
        one.pop(("ess", "example")).item() == pytest.approx(1 / (0.25**2 + 0.75**2)) and one == two
    )
    model, batch = toy_model(), toy_batch()
    model.decoder.eval()
    held_out = [
        evaluate_warmups(model, batch, spec(), 3, alpha)["ess", "example"] for alpha in (0.0, 1.0)
    ]
    _, numbers, *_ = warmup_loss(model, batch, spec(), samples=3, alpha=0.0)
    assert held_out[0] == pytest.approx(3.0 * len(batch.source)) == numbers["ess", "example"]
    assert held_out[1] < held_out[0]


def test_diagnostics_of_all_warmups_are_weighted_by_the_policy():
    """exact: what sampling would give in the mean, without the noise."""
    log_pi, R = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.0, -2.0]])
    d = diagnostics(R, log_pi, torch.tensor([[[4], [5]]]), sampled=0)
    p = 0.25 + 0.75 * math.exp(-2.0)
    assert d["nll", "token"].item() == pytest.approx(-math.log(p)) and d[
        "reward", "example"
    ].item() == pytest.approx(-1.5)
    assert d["spread", "example"].item() == pytest.approx((0.25 * 1.5**2 + 0.75 * 0.5**2) ** 0.5)
    assert d["ess", "example"].item() == pytest.approx(1 / ((0.25 / p) ** 2 + (1 - 0.25 / p) ** 2))
    assert d["entropy", "example"].item() == pytest.approx(
        -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    )
    assert d["distinct", "example"].item() == 1.0


def test_swap_gap_is_zero_when_the_target_ignores_c_and_not_otherwise():
    model, batch, s = toy_model(), toy_batch(), spec()
    torch.manual_seed(0)
    assert abs(evaluate_warmups(model, batch, s, 8)["swap_gap", "swap"].item()) > 1e-3
    with torch.no_grad():  # no self-attention in the decoder: y cannot see c
        model.decoder.blocks[0].self_attention.out.weight.zero_()
    assert evaluate_warmups(model, batch, s, 8)["swap_gap", "swap"].abs().item() < 1e-9


def test_generate_writes_warmup_then_target():
    """c is the greedy warmup; y continues [start] prompt c <sep> greedily; no special token inside."""
    model, batch, s = toy_model(2), toy_batch(), spec(2)
    c, y = generate(model, batch, s, 4)
    memory = model.encode(batch.source)
    assert torch.equal(
        c, sample_warmups(model, memory, batch.prompt, replace(s, temperature=0.0), 1)[:, 0]
    )
    tokens = torch.cat(
        [torch.zeros(2, 1, dtype=torch.long), batch.prompt, c, torch.full((2, 1), SEP)], 1
    )
    logits = model.logits(model.decode(tokens, memory))[:, -1]
    logits[:, [0, SEP]] = -math.inf
    assert torch.equal(logits.argmax(-1), y[:, 0])
    assert not (y == SEP).any()


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_writes_the_greedy_warmup(beams):
    """Token by token the likeliest of what is allowed, whatever the seed and the temperature."""
    model, batch, s = toy_model(), toy_batch(), spec(3, temperature=3.0)
    memory, row = model.encode(batch.source), with_start(batch.prompt)
    for _ in range(3):
        logits = model.logits(model.decode(row, memory))[:, -1]
        logits[:, [0, 1, 2, SEP]] = -math.inf
        assert (logits / 3.0).softmax(-1).amax() < 0.8  # sampling would choose otherwise
        row = torch.cat([row, logits.argmax(-1, keepdim=True)], 1)
    for seed in range(5):
        torch.manual_seed(seed)
        assert torch.equal(generate(model, batch, s, 4, beams=beams)[0], row[:, 2:])


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_writes_the_target_after_a_given_warmup(beams):
    """Not the greedy one: y is that of a decoder which has read [start] prompt c <sep>."""
    model, batch, s = toy_model(2), toy_batch(), spec(2)
    greedy, y = generate(model, batch, s, 4, beams=beams)
    again, same = generate(model, batch, s, 4, beams=beams, c=greedy)
    assert torch.equal(again, greedy) and torch.equal(same, y)
    c = torch.where(greedy == SEP + 1, SEP + 2, SEP + 1)  # (B,2), unlike the greedy one
    given, y = generate(model, batch, s, 4, beams=beams, c=c)
    assert torch.equal(given, c)
    prefix = torch.cat([with_start(batch.prompt), c, torch.full((2, 1), SEP)], 1)
    memory, never = model.encode(batch.source), torch.tensor([0, SEP])
    if beams == 1:
        for t in range(4):
            row = torch.cat([prefix, y[:, :t]], 1)
            logits = model.logits(model.decode(row, memory))[:, -1].index_fill(1, never, -math.inf)
            alive = ~(y[:, :t] == 1).any(1)
            assert torch.equal(logits.argmax(-1)[alive], y[alive, t])
    else:
        wanted, _ = beam_search(model, memory, prefix, 4, beams=3, forbidden=never)
        assert torch.equal(y, wanted[:, 0])


def test_generate_may_end_its_target_whatever_is_forbidden():
    """eval.py forbids all special ids, </s> too. Greedy y by hand up to its </s>; then padding."""
    model, batch, s = toy_model(1), toy_batch(), spec(2)
    c, y = generate(model, batch, s, 6, forbidden=s.forbidden)
    memory = model.encode(batch.source)
    row = torch.cat([with_start(batch.prompt), c, torch.full((2, 1), SEP)], 1)
    ended, expected = torch.zeros(2, dtype=torch.bool), []
    for _ in range(6):
        logits = model.logits(model.decode(row, memory))[:, -1]
        logits[:, [0, 2, SEP]] = -math.inf
        expected.append(logits.argmax(-1).masked_fill(ended, 0))
        ended, row = ended | (expected[-1] == 1), torch.cat([row, expected[-1][:, None]], 1)
    assert torch.equal(y, torch.stack(expected, 1)) and (y == 1).sum(1).tolist() == [1, 1]
    assert y[0, 0] > SEP  # one ends at once, the other later
    _, y = generate(model, batch, s, 6, beams=3, forbidden=s.forbidden)
    assert (y == 1).sum(1).tolist() == [1, 1] and not (y == SEP).any()


def test_generate_by_beam_search_and_without_warmup():
    """The same greedy c, then the best beam after [start] prompt c <sep>; or after the prompt."""
    model, batch, s = toy_model(2), toy_batch(), spec(2)
    memory, start = model.encode(batch.source), with_start(batch.prompt)
    c, y = generate(model, batch, s, 4, beams=3)
    assert torch.equal(c, generate(model, batch, s, 4)[0])
    none, direct = generate(model, batch, None, 4, beams=3)
    assert none is None
    after = torch.cat([start, c, torch.full((2, 1), SEP)], 1)
    for ours, prefix, never in ((y, after, [0, SEP]), (direct, start, [0])):
        beams, _ = beam_search(model, memory, prefix, 4, beams=3, forbidden=torch.tensor(never))
        assert torch.equal(ours, beams[:, 0])


def test_empty_prompts_work():
    model, b = toy_model(), toy_batch()
    batch = Batch(b.source, torch.empty(2, 0, dtype=torch.long), b.target)
    assert sft_loss(model, batch).isfinite() and warmup_loss(model, batch, spec())[0].isfinite()


def test_bfloat16_reaches_every_parameter():
    """Regression guard: autocast's weight cache, filled while sampling, once left scoring without gradients."""
    torch.manual_seed(0)
    c = ModelConfig(
        vocab_size=V,
        width=16,
        heads=2,
        head_size=8,
        ff=16,
        encoder_layers=1,
        decoder_layers=1,
        dropout=0.0,
    )
    model, batch, norms = EncoderDecoder(c).eval(), toy_batch(), []
    for dtype in ("float32", "bfloat16"):
        model.zero_grad()
        torch.manual_seed(5)
        with precision(dtype, torch.device("cpu")):
            assert torch.is_autocast_enabled("cpu") == (dtype == "bfloat16")
            assert not torch.is_autocast_cache_enabled()
            loss, *_ = warmup_loss(model, batch, spec(1), "frozen", samples=3)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_gain_over_empty_by_hand():
    """mean_k log P(y|x,c_k) - log P(y|x), and the swap gap against the neighbour's warmups, on the same samples."""
    model, batch, s = toy_model(), toy_batch(), spec(2)
    torch.manual_seed(0)
    numbers = evaluate_warmups(model, batch, s, 3)
    torch.manual_seed(0)
    memory = model.encode(batch.source)
    c = sample_warmups(model, memory, batch.prompt, s, 3)
    log_p, swapped = (score(model, memory, batch, x, s)[1] for x in (c, c.flip(0)))
    direct = direct_logprobs(model, memory, batch)
    assert numbers["over_empty", "example"].item() == pytest.approx(
        (log_p.mean(1) - direct).sum().item()
    )
    assert numbers["swap_gap", "swap"].item() == pytest.approx(
        (log_p - swapped).mean(1).sum().item()
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_passes_on_what_is_forbidden(beams):
    model, batch, s = toy_model(2), toy_batch(), spec(2)
    _, free = generate(model, batch, s, 4, beams=beams)
    favourites = {token for token in free.flatten().tolist() if token > 1}
    assert favourites
    for token in favourites:
        _, y = generate(model, batch, s, 4, beams=beams, forbidden=(token,))
        assert not (y == token).any()


def test_generate_passes_on_the_length_penalty(monkeypatch):
    given, original = [], warmup.beam_search
    monkeypatch.setattr(
        warmup,
        "beam_search",
        lambda *a, **how: given.append(how["length_penalty"]) or original(*a, **how),
    )
    generate(toy_model(), toy_batch(), spec(), 4, beams=2, length_penalty=0.6)
    assert given == [0.6]


def test_swap_gap_does_not_count_an_example_without_a_neighbour():
    alone = evaluate_warmups(toy_model(), first_of(toy_batch()), spec(), 2)
    assert alone["swap_gap", "swap"] == 0  # its neighbour is itself


# ----------------------------------------------------------------------------- the fast path of `score`

REPEATS = {  # three examples, K = 4: which of the example's warmups stands in each place
    "some": [[0, 1, 0, 0], [2, 1, 1, 3], [0, 0, 1, 1]],
    "none": [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]],
    "all": [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2]],
    "few": [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 0]],  # 11 of 12 are distinct: not worth it
}


def with_repeats(repeats):
    """Model, batch of three examples (unlike in length), spec and c (3,4,3)."""
    two = toy_batch()
    batch = Batch(*(torch.cat([x, x[:1].roll(1, 1)]) for x in (two.source, two.prompt, two.target)))
    s = spec(3)
    c = all_warmups(s, V)[-8::2].flip(0)[torch.tensor(REPEATS[repeats])]  # (3,4,3)
    return toy_model(), batch, s, c


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_distinct_warmups_scored_once_are_the_plain_path(name, repeats, monkeypatch):
    model, batch, s, c = with_repeats(repeats)
    monkeypatch.setattr("warmup.sample_warmups", lambda *args, **how: c)

    def step():
        loss, numbers, rows, sampled = warmup_loss(model, batch, s, name, 4)
        assert sampled == 4
        return loss, numbers, rows, torch.autograd.grad(loss, list(model.parameters()))

    loss, numbers, rows, gradients = step()
    everything = lambda *args: Scores(*score_rows(*args), torch.full((3,), 4))  # noqa: E731
    monkeypatch.setattr("warmup.score", everything)
    plain_loss, plain_numbers, plain_rows, plain_gradients = step()
    assert plain_rows.tolist() == [4, 4, 4]
    assert (rows.tolist() == [4, 4, 4]) == (repeats in ("none", "few"))
    exactly = dict(rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss, plain_loss, **exactly)
    torch.testing.assert_close(gradients, plain_gradients, **exactly)
    assert numbers.keys() == plain_numbers.keys()
    for key in plain_numbers:
        torch.testing.assert_close(numbers[key], plain_numbers[key], **exactly)


@pytest.mark.parametrize("repeats", REPEATS)
def test_a_repeated_warmup_is_computed_once(repeats, monkeypatch):
    model, batch, s, c = with_repeats(repeats)
    shapes = []
    monkeypatch.setattr(
        "warmup.score_rows", lambda *args: shapes.append(args[3].shape) or score_rows(*args)
    )
    memory = model.encode(batch.source)
    log_pi, log_p, computed = score(model, memory, batch, c, s)
    plain_pi, plain_p = score_rows(model, memory, batch, c, s)
    torch.testing.assert_close(log_pi, plain_pi, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_p, plain_p, rtol=1e-10, atol=1e-10)
    expected = {"some": [2, 3, 2], "none": [4, 4, 4], "all": [1, 1, 1], "few": [4, 4, 4]}
    assert computed.tolist() == expected[repeats]
    assert [shape.numel() for shape in shapes] == [3 * sum(expected[repeats])]  # of W = 3 tokens


def test_distinct_rows_by_hand():
    """Row 4 equals row 0, but stands in another example: it is kept."""
    c = torch.tensor([[[4, 5], [5, 4], [4, 5], [4, 5]], [[4, 5], [4, 4], [5, 4], [4, 4]]])
    kept, place = distinct_rows(c)
    assert kept.tolist() == [0, 1, 4, 5, 6]
    assert place.tolist() == [[0, 1, 0, 0], [2, 3, 4, 3]]


class Casts(TorchDispatchMode):
    """Counts the matrices of float32 that become bfloat16."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.seen += tuple(args[0].shape) == (V, 16)  # the embedding, which is the output layer
        return out


def test_in_low_precision_weights_are_cast_once_for_all_tokens(monkeypatch):
    """The same tokens and log-probs, bit for bit, as with a cast at each token."""
    torch.manual_seed(0)
    model = EncoderDecoder(
        ModelConfig(
            vocab_size=V, width=16, heads=2, head_size=8, ff=16, encoder_layers=1, decoder_layers=1
        )
    ).eval()
    batch, s = toy_batch(), spec(5)
    found, counts = [], []
    cached = warmup.sample_tokens
    for sampler in (cached, torch.no_grad()(cached.__wrapped__)):
        monkeypatch.setattr(warmup, "sample_tokens", sampler)
        with precision("bfloat16", torch.device("cpu")):
            memory = model.encode(batch.source)
            torch.manual_seed(1)
            with Casts() as casts, drawn_logprobs() as drawn:
                found.append([sample_warmups(model, memory, batch.prompt, s, 3), *drawn])
        counts.append(casts.seen)
        assert torch.is_autocast_cache_enabled()
    assert counts == [1, 5]
    for ours, expected in zip(*found):
        assert torch.equal(ours, expected)


def test_decoding_has_no_gradients_and_leaves_autocast_as_it_was():
    for before in (True, False):
        torch.set_autocast_cache_enabled(before)
        with decoding():
            assert torch.is_autocast_cache_enabled() and not torch.is_grad_enabled()
        assert torch.is_autocast_cache_enabled() == before
        with pytest.raises(MemoryError), decoding():
            raise MemoryError
        assert torch.is_autocast_cache_enabled() == before
    torch.set_autocast_cache_enabled(True)


def test_generate_keeps_no_graph_of_the_encoder(monkeypatch):
    """Else each batch that is decoded would hold the encoder's activations."""
    modes, encode = [], EncoderDecoder.encode

    def watched(model, source):
        modes.append(torch.is_grad_enabled())
        return encode(model, source)

    monkeypatch.setattr(EncoderDecoder, "encode", watched)
    generate(toy_model(), toy_batch(), spec(), 4)
    assert modes == [False] and torch.is_grad_enabled()


def test_weights_that_change_between_two_decodings_are_cast_again():
    """In one autocast region, as a notebook may do it."""
    model, batch, s = toy_model(3).float(), toy_batch(), spec(2)
    weight = model.decoder.blocks[0].feed_forward.down.weight.data

    def outputs(regions):
        found = []
        for _ in range(2):
            torch.manual_seed(0)
            with regions(), torch.no_grad(), drawn_logprobs() as drawn:
                memory = model.encode(batch.source)
                sample_warmups(model, memory, batch.prompt, s, 1)
            found.append(torch.cat(drawn, 1))
            weight.mul_(-1)
        return found

    fresh = outputs(lambda: precision("bfloat16", batch.source.device))
    with precision("bfloat16", batch.source.device):
        again = outputs(nullcontext)
    assert not torch.equal(*fresh)
    assert torch.equal(fresh[0], again[0]) and torch.equal(fresh[1], again[1])
