"""The paper: an encoder-decoder that writes a short latent warmup c before its target y.

    decoder reads   [start] prompt c_1..c_W <sep> y_1..y_{T-1}
    decoder writes                 c_1..c_W <sep> y_1..y_{T-1} </s>

Nobody labels c. It is sampled from P(c|x), rewarded by R = log P(y|x,c), and improved by policy
gradient. The order of this file is the order of one training step: encode, sample_warmups, score,
weights (an estimator), surrogate. warmup_loss is all five.

Notation: x source, y target, R (B,K) rewards, pi = P(c|x), p = P(y|x,c). Shapes as in model.py.
P(y|x) = Σ_c P(c|x) P(y|x,c) is the sum over warmups, nothing else. P₀(y|x) is the likelihood of a
y that the decoder writes at once, without a warmup.

Absent on purpose: a critic, a KL penalty, ratio clipping, a reward model. The reward is the model's
own likelihood. Every sample is used once, so the policy that is updated is the one that sampled.
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import EOS_ID, PAD_ID, beam_search, copy_memory, sample_tokens


@dataclass(frozen=True)
class WarmupSpec:
    """What a warmup may look like. Sampling and scoring share it, so they agree."""

    sep_id: int  # stands between warmup and target
    forbidden: tuple[int, ...]  # ids of probability 0 in a warmup: pad, </s>, <sep>, tags
    length: int  # W
    temperature: float = 1.0
    pause: bool = False  # baseline: W times <sep> for c. Room to compute, but no message

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"a warmup has at least one token, not {self.length}")
        if self.sep_id not in self.forbidden:
            raise ValueError("<sep> must be forbidden: it says where the warmup ends")


@lru_cache  # made once: to send it to a GPU takes longer than to use it
def tensor_of(ids, device):
    return torch.tensor(ids, device=device)


class Batch(NamedTuple):
    """B examples. Rows are padded on the right. All prompts of a batch have one length."""

    source: Tensor  # (B,S)
    prompt: Tensor  # (B,prompt) what the decoder reads first, never scored: a tag, a question
    target: Tensor  # (B,T), each row ends in </s>

    def to(self, device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) for x in self))


def target_tokens(batch):
    """How many target tokens a batch has, </s> included, as a () tensor."""
    return (batch.target != PAD_ID).sum()


def with_start(prompt):
    """(N,prompt) -> (N,1+prompt): the start token, T5's pad id, in front of the prompt."""
    return F.pad(prompt, (1, 0), value=PAD_ID)


def teacher_force(model, memory, prefix, target):
    """Read prefix (N,prefix), then target (N,T). -> log P(target|x,prefix) (N,), hidden (N,L,E).

    Only real tokens reach the output layer. It is the largest product, and padding is much of T.
    """
    tokens = torch.cat([prefix, target[:, :-1]], 1)  # (N,L)
    hidden = model.decode(tokens, memory)  # (N,L,E)
    before = hidden[:, prefix.size(1) - 1 :]  # (N,T,E): the state before a token predicts it
    real = target != PAD_ID  # (N,T)
    row, at = real.nonzero(as_tuple=True)  # (tokens,) each
    log_probs = model.token_logprobs(before[row, at], target[row, at])  # (tokens,)
    sums = log_probs.new_zeros(len(target))  # (N,)
    return sums.index_add(0, row, log_probs), hidden


# ----------------------------------------------------------------------------- stage 1: SFT
def direct_logprobs(model, memory, batch):
    """log P₀(y|x), no warmup: the decoder reads [start] prompt y. -> (B,) sums over tokens."""
    log_p, _ = teacher_force(model, memory, with_start(batch.prompt), batch.target)  # (B,)
    return log_p


def sft_loss(model, batch):
    """Supervised fine-tuning: -Σ log P₀(y|x), a sum over tokens, which train.py divides."""
    memory = model.encode(batch.source)
    return -direct_logprobs(model, memory, batch).sum()


# ----------------------------------------------------------------------------- stage 2: warmups
def sample_warmups(model, memory, prompt, spec, samples):
    """Draw K = samples warmups per example from P(c|x): c (B,K,W). No autograd.

    No top-k or top-p: then we would score another distribution than we sampled from, and the
    policy gradient would be wrong.
    """
    if spec.pause:
        return prompt.new_full((len(prompt), samples, spec.length), spec.sep_id)
    return sample_tokens(
        model,
        memory,
        with_start(prompt),
        spec.length,
        samples=samples,
        temperature=spec.temperature,
        forbidden=tensor_of(spec.forbidden, prompt.device),
    )


class Scores(NamedTuple):
    """What `score` says of K warmups of each example. Both log-probs are sums over tokens."""

    log_pi: Tensor  # (B,K): log P(c|x)
    log_p: Tensor  # (B,K): log P(y|x,c), the reward
    rows: Tensor  # (B,) on the CPU: how many warmups of each example were computed


def score(model, memory, batch, c, spec) -> Scores:
    """log P(c|x) and log P(y|x,c) of warmups c (B,K,W). Equal warmups of an example: scored once.

    Where few are equal, that does not pay: K rows that share one memory are faster. On a CPU the
    two are even where a tenth are equal.
    """
    B, K, _ = c.shape
    kept, index = distinct_rows(c)  # (n,) of all B·K rows, (B,K)
    if len(kept) <= 0.9 * B * K:
        return score_distinct(model, memory, batch, c, spec, kept, index)
    log_pi, log_p = score_rows(model, memory, batch, c, spec)  # (B,K) both
    return Scores(log_pi, log_p, torch.full((B,), K))


def score_rows(model, memory, batch, c, spec):
    """One teacher-forced pass over [start] prompt c <sep> y: log P(c|x), log P(y|x,c), (B,K) both.

    The plain form of `score`. An example's K rows share its memory.
    """
    B, K, W = c.shape
    prefix = with_start(batch.prompt).repeat_interleave(K, 0)  # (N,1+prompt)
    c = c.reshape(B * K, W)  # (N,W)
    y = batch.target.repeat_interleave(K, 0)  # (N,T)
    sep = torch.full_like(c[:, :1], spec.sep_id)  # (N,1)
    prefix = torch.cat([prefix, c, sep], 1)  # (N,1+prompt+W+1)
    log_p, hidden = teacher_force(model, memory, prefix, y)  # (N,), (N,L,E)
    before_c = batch.prompt.size(1)  # place of the last prompt token: it predicts c_1
    log_pi = warmup_logprobs(model, hidden[:, before_c : before_c + W], c, spec)  # (N,)
    return log_pi.view(B, K), log_p.view(B, K)


def warmup_logprobs(model, hidden, c, spec):
    """log P(c|x) of c (N,W) from hidden (N,W,E): (N,), by the distribution that was sampled."""
    if spec.pause:
        return hidden.new_zeros(len(c))
    log_probs = model.token_logprobs(
        hidden.flatten(0, 1),
        c.flatten(),
        temperature=spec.temperature,
        forbidden=tensor_of(spec.forbidden, c.device),
    )  # (N·W,)
    return log_probs.view(c.shape).sum(1)


def all_warmups(spec, vocab_size):
    """Every warmup that can be sampled, (all,W), for `exact` and tests. About V^W: toys only."""
    tokens = [i for i in range(vocab_size) if i not in spec.forbidden]
    return torch.tensor([*itertools.product(tokens, repeat=spec.length)])


# ----------------------------------------------------------------------------- the estimators
# Each is a choice of two weights for the surrogate (2): a_k moves the warmup, b_k moves the target.
# R (B,K) -> a, b (B,K). R_k = log p_k is the sum of the target's log-probs after warmup c_k.
# With --alpha R comes multiplied. Then a is exact for p^alpha in place of p. An exact b would have
# alpha as a factor, too. We leave it out: alpha chooses among warmups, it does not slow y down.


def num_samples(R):
    """K. ValueError for K = 1, where a sample cannot be compared with the others."""
    if R.size(-1) < 2:
        raise ValueError("this estimator compares warmups: it needs --samples 2 or more")
    return R.size(-1)


def mean_of_others(x):
    """(B,K) -> (B,K): mean_{j≠k} x_j, to subtract from x_k. It does not depend on sample k."""
    others = x.sum(-1, keepdim=True) - x
    return others / (num_samples(x) - 1)


def marginal(R):
    """a = w - 1/K, b = w, w = softmax(R): our reading of the paper. Equation (1):

    ∇ log P(y|x) = E_{c~pi}[ r(c) (∇ log pi + ∇ log p) ],  r(c) = p / P(y|x)                   (1)

    With the mean of p over the samples for P(y|x), r(c_k)/K is w_k. The bias is O(1/K).
    The -1/K is a control variate: E[∇ log pi] = 0, so it changes no expectation. Without it equal
    rewards would still push every sampled c to repeat itself.
    """
    K = num_samples(R)
    w = R.softmax(-1)
    return w - 1 / K, w


def jensen(R):
    """a = (R_k - mean_{j≠k} R_j)/K, b = 1/K: exact for E_c[log p] <= log P(y|x) (LaTRO, JEPO)."""
    K = num_samples(R)
    a = (R - mean_of_others(R)) / K
    b = torch.full_like(R, 1 / K)
    return a, b


def iwae(R):
    """a = log mean_j p_j - log mean_{j≠k} p_j, b = w: exact for E[log mean_K p] (VIMCO, JEPO)."""
    K = num_samples(R)
    log_mean = R.logsumexp(-1, keepdim=True) - math.log(K)  # (B,1)
    itself = torch.eye(K, dtype=torch.bool, device=R.device)
    others = R[..., None, :].masked_fill(itself, -torch.inf)  # (B,K,K): row k lacks sample k
    log_mean_of_others = others.logsumexp(-1) - math.log(K - 1)  # (B,K)
    return log_mean - log_mean_of_others, R.softmax(-1)


def prob(R):
    """a = (p_k - mean_{j≠k} p_j)/K, b = p_k/K: exact for P(y|x) itself (VeriFree).

    p underflows where targets are long.
    """
    K = num_samples(R)
    p = R.exp()
    return (p - mean_of_others(p)) / K, p / K


def grpo(R):
    """a = (R_k - mean R)/(std R + 1e-4)/K, b = 1/K: the exact gradient of nothing (GRPO)."""
    K = num_samples(R)
    centred = R - R.mean(-1, keepdim=True)
    std = R.std(-1, keepdim=True)
    b = torch.full_like(R, 1 / K)
    return centred / (std + 1e-4) / K, b


def best(R):
    """a = b = 1 for the best sample, 0 for the others: hard EM. The exact gradient of nothing."""
    top = R.argmax(-1, keepdim=True)  # (B,1)
    weight = torch.zeros_like(R).scatter(-1, top, 1.0)
    return weight, weight


def truncated(R, log_pi):
    """a = b = softmax(log pi + R): exact for log Σ pi p over a set of DISTINCT warmups (RAG).

    A repeat must come with log pi = -inf (see `weights`). Else sampling would count it once, and
    its pi again. Over all warmups this is ∇ log P(y|x) by (1): `exact` is this one, enumerated.
    """
    num_samples(R)
    posterior = (log_pi + R).softmax(-1)
    return posterior, posterior


def frozen(R):
    """a = 0, b = 1/K: the baseline without policy gradient. y learns to read c."""
    K = R.size(-1)
    return torch.zeros_like(R), torch.full_like(R, 1 / K)


ESTIMATORS = {f.__name__: f for f in (marginal, jensen, iwae, prob, grpo, best, truncated, frozen)}


# Two that sample nothing, and their rules. exact takes all warmups, pause a constant one
NOT_SAMPLED = {"exact": truncated, "pause": frozen}


def propose(model, memory, prompt, spec, estimator, samples):
    """The warmups of an update, c (B,K,W), and how many of them were sampled for each example.

    exact: all warmups. pause: the constant one. Both: 0 were sampled, so each counts by its P(c|x).
    """
    if estimator == "exact":
        c = all_warmups(spec, model.config.vocab_size).to(prompt.device)  # (all,W)
        return c.expand(len(prompt), -1, -1), 0
    if estimator == "pause":
        return sample_warmups(model, memory, prompt, spec, 1), 0
    return sample_warmups(model, memory, prompt, spec, samples), samples


def weights(estimator, R, log_pi, c):
    """a, b (B,K) of the warmups c (B,K,W), by the estimator's name."""
    rule = (ESTIMATORS | NOT_SAMPLED)[estimator]
    if rule is truncated:
        repeated = ~first_occurrence(c)
        return truncated(R, log_pi.masked_fill(repeated, -torch.inf))
    return rule(R)


def earliest_equal(c):
    """c (B,K,W) -> (B,K): the first k where the same example has an equal warmup."""
    same = (c[:, :, None] == c[:, None]).all(-1)  # (B,K,K)
    return same.int().argmax(-1)  # of equals, argmax takes the first


def first_occurrence(c):
    """c (B,K,W) -> (B,K): False where an earlier warmup of the same example is equal."""
    k = torch.arange(c.size(1), device=c.device)
    return earliest_equal(c) == k


def surrogate(a, b, log_pi, log_p):
    """loss = -Σ_k [ sg(a_k) log P(c_k|x) + sg(b_k) log P(y|x,c_k) ]  (2), summed over the batch.

    sg: no gradient. The gradient of the loss is the estimator. Its value is no metric, and may rise
    while all is well: it is about -R per example where Σ a = 0 and Σ b = 1, as with `marginal`.
    log_p keeps its graph: without it the target half of (1) would vanish in silence.
    """
    for_warmup = a.detach() * log_pi  # (B,K)
    for_target = b.detach() * log_p  # (B,K)
    return -(for_warmup + for_target).sum()


class PolicyLoss(NamedTuple):
    """What `warmup_loss` gives for a batch."""

    loss: Tensor  # () a sum over the batch, as sft_loss
    numbers: dict  # `diagnostics`: sums over the batch, too
    rows: Tensor  # (B,) on the CPU: computed warmups. What an update costs depends on it
    sampled: int  # warmups sampled for each example: they cost, too


def warmup_loss(model, batch, spec, estimator="marginal", samples=4, alpha=1.0) -> PolicyLoss:
    """The loss of one policy update.

    alpha scales R before the estimator. With `marginal`, b goes from that of `frozen` (alpha 0) to
    that of `best` (alpha ∞). The encoder runs once, so sampling and scoring share its dropout.
    ValueError if the decoder has dropout on: we would then score another distribution than we
    sampled from.
    """
    if model.decoder.training:
        raise ValueError("call model.decoder.eval() first: decoder dropout is off-policy")
    memory = model.encode(batch.source)

    c, sampled = propose(model, memory, batch.prompt, spec, estimator, samples)  # (B,K,W)

    log_pi, log_p, rows = score(model, memory, batch, c, spec)  # (B,K), (B,K), (B,)

    R = log_p.detach()
    a, b = weights(estimator, alpha * R, log_pi.detach(), c)  # (B,K) both

    loss = surrogate(a, b, log_pi, log_p)
    numbers = diagnostics(R, log_pi.detach(), c, alpha, sampled)
    return PolicyLoss(loss, numbers, rows, sampled)


# ----------------------------------------------------------------------------- is it working?
def diagnostics(R, log_pi, c, alpha=1.0, sampled=1):
    """What to watch instead of the surrogate loss. R, log_pi (B,K), c (B,K,W) -> batch sums.

    {(name, unit): sum}: the log divides each sum by the number of its units.
    Means are over an example's K warmups. If 0 of them were sampled, P(c|x) weighs them.

    nll       -log mean_k P(y|x,c_k), nats. In expectation an upper bound on -log P(y|x)
    reward    mean of R over an example's warmups, nats
    spread    standard deviation of R within an example (over K, not K-1), nats. 0: all c are alike
    ess       effective sample size 1/Σw², w as the softmax of alpha·R: 1 (one takes all) to K.
              If none was sampled, w is that of log P(c|x) + alpha·R
    entropy   -log P(c|x) of the sampled c, nats. Its mean is the policy's entropy
    distinct  distinct warmups / K
    """
    log_q = torch.full_like(R, -math.log(R.size(1)))  # (B,K): log of a warmup's weight in the means
    if not sampled:
        log_q = log_pi
    distinct = first_occurrence(c).float().mean(1)  # (B,)
    q = log_q.exp()  # (B,K)
    w = (log_q + alpha * R).softmax(1)  # (B,K)
    mean = (q * R).sum(1, keepdim=True)  # (B,1)
    variance = (q * (R - mean) ** 2).sum(1)  # (B,)
    ess = 1 / w.pow(2).sum(1)  # (B,)
    return {
        ("nll", "token"): -(log_q + R).logsumexp(1).sum(),
        ("reward", "example"): mean.sum(),
        ("spread", "example"): variance.sqrt().sum(),
        ("ess", "example"): ess.sum(),
        ("entropy", "example"): -(q * log_pi).sum(),
        ("distinct", "example"): distinct.sum(),
    }


@torch.no_grad()
def evaluate_warmups(model, batch, spec, samples, alpha=1.0):
    """`diagnostics` on held-out data, and numbers that need more passes. All are batch sums, nats.

    swap_gap    mean_k log P(y|x,c_k) - log P(y|x, c_k of another example). 0: y ignores c.
                Its unit is the swap: an example that is alone in its batch has no other
    over_empty  mean_k log P(y|x,c_k) - log P₀(y|x): what a warmup gains over writing y at once
    """
    memory = model.encode(batch.source)
    c = sample_warmups(model, memory, batch.prompt, spec, samples)  # (B,K,W)
    log_pi, log_p, _ = score(model, memory, batch, c, spec)  # (B,K) both
    log_p_swapped = score(model, memory, batch, c.roll(-1, 0), spec).log_p  # (B,K)
    direct = direct_logprobs(model, memory, batch)  # (B,)
    return diagnostics(log_p, log_pi, c, alpha) | {
        ("swap_gap", "swap"): (log_p - log_p_swapped).mean(1).sum(),
        ("over_empty", "example"): (log_p.mean(1) - direct).sum(),
    }


# ----------------------------------------------------------------------------- test time
@torch.no_grad()
def generate(model, batch, spec, length, *, beams=1, length_penalty=1.0, forbidden=(), c=None):
    """Write a greedy warmup, then the target: c (B,W) or None, y (B,length), padded after </s>.

    spec None: no warmup, as after SFT. c: a warmup to write y after, in place of the greedy one.
    beams > 1: beam search over y; 1: greedy y. Before its </s>, y holds no pad, no <sep> of the
    spec and no forbidden id. batch.target is not read.
    """
    memory = model.encode(batch.source)
    prefix = with_start(batch.prompt)  # (B,1+prompt)
    never = {PAD_ID, *forbidden}  # </s> may be among them, but it is how y ends
    if spec is not None:
        if c is None:
            greedy = replace(spec, temperature=0.0)
            c = sample_warmups(model, memory, batch.prompt, greedy, 1)[:, 0]  # (B,W)
        sep = torch.full_like(c[:, :1], spec.sep_id)
        prefix = torch.cat([prefix, c, sep], 1)  # (B,1+prompt+W+1)
        never.add(spec.sep_id)
    y, _ = beam_search(
        model,
        memory,
        prefix,
        length,
        beams=beams,
        length_penalty=length_penalty,
        forbidden=tensor_of(tuple(never - {EOS_ID}), prefix.device),
    )
    return c, y[:, 0]  # (B,W), (B,length): the best beam


# ===== plumbing: the fast path of `score`
def distinct_rows(c):
    """c (B,K,W) -> the rows, of all B·K, that differ from earlier ones of their example: (n,).

    Also, for each warmup, its index among them: (B,K). Both on the CPU. `unique` sorts the rows,
    and its inverse has the shape of what it was given.
    """
    B, K, _ = c.shape
    earliest = earliest_equal(c).cpu()  # (B,K). The only wait for a GPU
    row = torch.arange(B)[:, None] * K + earliest  # (B,K): the row that stands for this one
    return row.unique(return_inverse=True)


def score_distinct(model, memory, batch, c, spec, kept, index) -> Scores:
    """`score` where many warmups are equal: each kept row gets a memory of its own.

    Its log-probs are handed back to all the warmups that are equal to it.
    """
    B, K, W = c.shape
    rows = (kept // K).bincount(minlength=B)  # (B,)
    kept = kept.to(c.device, non_blocking=True)
    index = index.to(c.device, non_blocking=True)
    example = kept // K  # (n,)
    c = c.reshape(B * K, 1, W)[kept]  # (n,1,W)
    memory = copy_memory(memory, example)
    batch = Batch(*(column[example] for column in batch))
    log_pi, log_p = score_rows(model, memory, batch, c, spec)  # (n,1) both
    return Scores(log_pi[index, 0], log_p[index, 0], rows)
