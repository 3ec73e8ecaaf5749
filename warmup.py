"""The paper: an encoder-decoder that writes a short latent warmup c before its target y.

    decoder reads   [start] prompt c_1..c_W <sep> y_1..y_{T-1}
    decoder writes                 c_1..c_W <sep> y_1..y_{T-1} </s>

Nobody labels c. It is sampled from P(c|x), rewarded by R = log P(y|x,c), and improved by policy
gradient. The order of this file is the order of one training step: sample_warmups, score, an
estimator, surrogate, warmup_loss.

Notation: x source, y target, R (B,K) rewards, pi = P(c|x), p = P(y|x,c). Shapes as in model.py.

Absent on purpose: a critic, a KL penalty, ratio clipping, a reward model. The reward is the model's
own likelihood. Every sample is used once, so the policy that is updated is the one that sampled.
"""

import itertools, math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from model import EncoderDecoder, Memory, beam_search, decoding, sample


@dataclass(frozen=True)
class WarmupSpec:
    """What a warmup may look like. Sampling and scoring share it, so they agree."""

    sep_id: int  # stands between warmup and target
    forbidden: tuple[int, ...]  # never in a warmup: pad, </s>, tags. <sep> is one; see min_length
    length: int  # W
    min_length: int  # from here on <sep> may end a warmup early; W: it never may
    temperature: float = 1.0
    pause: bool = False  # baseline: W times <sep> for c. Room to compute, but no message

    def __post_init__(self):
        if not 1 <= self.min_length <= self.length:
            raise ValueError(f"need 1 <= {self.min_length} (min_length) <= {self.length} (length)")
        if self.sep_id not in self.forbidden:
            raise ValueError("<sep> must be forbidden: min_length says where it may end a warmup")

    def forbidden_ids(self, device, may_stop: bool) -> Tensor:
        """Ids of probability 0. <sep> is one of them wherever the warmup may not stop."""
        ids = tuple(i for i in self.forbidden if i != self.sep_id or not may_stop)
        return tensor_of(ids, device)


@lru_cache  # made once: to send it to a GPU takes longer than to use it
def tensor_of(ids: tuple[int, ...], device) -> Tensor:
    return torch.tensor(ids, dtype=torch.long, device=device)  # long: an empty list would be float


@dataclass
class Batch:
    """B examples. Rows are padded on the right. The prompts of one batch have one length P."""

    source: Tensor  # (B,S)
    prompt: Tensor  # (B,P) what the decoder reads first, never scored: a language tag, a question
    target: Tensor  # (B,T), each row ends in </s>

    def to(self, device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) for x in vars(self).values()))


def target_tokens(model: EncoderDecoder, batch: Batch) -> Tensor:
    """How many target tokens a batch has, </s> included, as a () tensor."""
    return (batch.target != model.config.pad_id).sum()


def with_start(model: EncoderDecoder, prompt: Tensor) -> Tensor:
    """(N,P) -> (N,1+P): the start token, T5's pad id, in front of the prompt."""
    start = prompt.new_full((len(prompt), 1), model.config.pad_id)  # (N,1)
    return torch.cat([start, prompt], 1)


def sum_logprobs(model: EncoderDecoder, hidden: Tensor, target: Tensor) -> Tensor:
    """hidden (N,T,E), target (N,T) -> (N,): the sum of each row's target log-probs.

    Only real tokens reach the output layer. It is the largest product, and padding is much of T."""
    row, at = (target != model.config.pad_id).nonzero(as_tuple=True)  # (tokens,) each
    log_probs = model.token_logprobs(hidden[row, at], target[row, at])  # (tokens,)
    return log_probs.new_zeros(len(target)).index_add(0, row, log_probs)


# ----------------------------------------------------------------------------- stage 1: SFT
def direct_logprobs(model: EncoderDecoder, memory: Memory, batch: Batch) -> Tensor:
    """log P(y|x), no warmup: the decoder reads [start] prompt y. -> (B,) sums over tokens."""
    prefix = with_start(model, batch.prompt)  # (B,1+P)
    hidden = model.decode(torch.cat([prefix, batch.target[:, :-1]], 1), memory)  # (B,P+T,E)
    return sum_logprobs(model, hidden[:, batch.prompt.size(1) :], batch.target)


def sft_loss(model: EncoderDecoder, batch: Batch) -> Tensor:
    """Supervised fine-tuning: -Σ log P(y|x), a sum over tokens, which train.py divides."""
    return -direct_logprobs(model, model.encode(batch.source), batch).sum()


# ----------------------------------------------------------------------------- stage 2: warmups
@decoding()
def sample_warmups(
    model: EncoderDecoder,
    memory: Memory,
    prompt: Tensor,
    spec: WarmupSpec,
    samples: int,
    temperature: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw K = samples warmups per example from P(c|x): c (B,K,W), log P(c|x) (B,K). No autograd.

    A warmup that stops early is filled up with <sep>: y starts at the same place in every row. The
    filling is forced, so it carries no log-prob. temperature None: the spec's; 0: greedy."""
    if spec.pause:
        c = prompt.new_full((len(prompt), samples, spec.length), spec.sep_id)  # (B,K,W)
        return c, torch.zeros(c.shape[:2], device=c.device)
    if temperature is None:
        temperature = spec.temperature
    may_stop = spec.min_length < spec.length
    c, log_probs = sample(
        model,
        memory,
        with_start(model, prompt),
        spec.length,
        samples=samples,
        temperature=temperature,
        forbidden=spec.forbidden_ids(prompt.device, may_stop),
        stop=spec.sep_id if may_stop else None,
        fill=spec.sep_id,
        min_length=spec.min_length,
    )  # (B,K,W) both
    return c, log_probs.sum(-1)


def score(
    model: EncoderDecoder,
    memory: Memory,
    prompt: Tensor,
    c: Tensor,
    target: Tensor,
    spec: WarmupSpec,
) -> tuple[Tensor, Tensor]:
    """One teacher-forced pass over [start] prompt c <sep> y: log P(c|x), log P(y|x,c), (B,K) both.

    c (B,K,W), target (B,T). Both are sums over tokens. An example's K rows share its memory."""
    B, K, W = c.shape
    P = prompt.size(1)
    prefix = with_start(model, prompt).repeat_interleave(K, 0)  # (N,1+P)
    c = c.reshape(B * K, W)  # (N,W)
    y = target.repeat_interleave(K, 0)  # (N,T)
    sep = torch.full_like(c[:, :1], spec.sep_id)  # (N,1)
    hidden = model.decode(torch.cat([prefix, c, sep, y[:, :-1]], 1), memory)  # (N,P+W+1+T,E)

    # the hidden state that predicts a token stands one place before it
    log_pi = warmup_logprobs(model, hidden[:, P : P + W], c, spec)  # (N,)
    log_p = sum_logprobs(model, hidden[:, P + W + 1 :], y)  # (N,)
    return log_pi.view(B, K), log_p.view(B, K)


def warmup_logprobs(model: EncoderDecoder, hidden: Tensor, c: Tensor, spec: WarmupSpec) -> Tensor:
    """log P(c|x) of c (N,W) from hidden (N,W,E): (N,), under the masks that sampling uses."""
    if spec.pause:
        return hidden.new_zeros(len(c))

    def part(start: int, end: int, may_stop: bool) -> Tensor:
        log_probs = model.token_logprobs(
            hidden[:, start:end].flatten(0, 1),
            c[:, start:end].flatten(),
            temperature=spec.temperature,
            forbidden=spec.forbidden_ids(c.device, may_stop),
        )
        return log_probs.view(len(c), end - start)  # (N,end-start)

    log_probs = part(0, spec.min_length, may_stop=False)
    if spec.min_length < spec.length:
        rest = part(spec.min_length, spec.length, may_stop=True)
        log_probs = torch.cat([log_probs, rest], 1)  # (N,W)
    is_sep = (c == spec.sep_id).int()
    seps_before = is_sep.cumsum(1) - is_sep  # (N,W): after an earlier <sep> a token was forced
    return log_probs.masked_fill(seps_before > 0, 0.0).sum(1)


def score_distinct(
    model: EncoderDecoder,
    memory: Memory,
    prompt: Tensor,
    c: Tensor,
    target: Tensor,
    spec: WarmupSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fast path of `score`: of the equal warmups of an example only one is computed.

    Each distinct warmup is a row with a memory of its own, and the rows' log-probs are handed back
    to all (B,K). Also: how many warmups of each example were computed, (B,) on the CPU."""
    B, K, _ = c.shape
    earliest = earliest_equal(c)  # (B,K)
    first = earliest == torch.arange(K, device=c.device)  # (B,K)
    example, k = first.cpu().nonzero(as_tuple=True)  # (n,) each
    if len(k) > 0.9 * B * K:  # few repeats: one memory for K rows is faster
        return *score(model, memory, prompt, c, target, spec), torch.full((B,), K)
    computed = example.bincount(minlength=B)
    example, k = (x.to(c.device, non_blocking=True) for x in (example, k))
    rows = c[example, k][:, None]  # (n,1,W)
    log_pi, log_p = score(
        model, memory.select(example), prompt[example], rows, target[example], spec
    )  # (n,1) both
    number = first.flatten().cumsum(0).view(B, K) - 1  # the row's number, where `first`
    number = number.gather(1, earliest)  # (B,K)
    return log_pi[number, 0], log_p[number, 0], computed


def all_warmups(spec: WarmupSpec, vocab_size: int) -> Tensor:
    """Every warmup that can be sampled, (all,W), for `exact` and tests. About V^W: toys only."""
    tokens = [i for i in range(vocab_size) if i not in spec.forbidden]
    rows = []
    for n in range(spec.min_length, spec.length + 1):
        filling = [spec.sep_id] * (spec.length - n)
        rows += [[*c, *filling] for c in itertools.product(tokens, repeat=n)]
    return torch.tensor(rows)


# ----------------------------------------------------------------------------- the estimators
# Each is a choice of two weights for the surrogate (2): a_k moves the warmup, b_k moves the target.
# R (B,K) -> a, b (B,K). R_k = log p_k is the sum of the target's log-probs after warmup c_k.


def num_samples(R: Tensor) -> int:
    """K. ValueError for K = 1, where a sample cannot be compared with the others."""
    if R.size(-1) < 2:
        raise ValueError("this estimator compares warmups: it needs --samples 2 or more")
    return R.size(-1)


def mean_of_others(x: Tensor) -> Tensor:
    """(B,K) -> (B,K): mean_{j≠k} x_j, to subtract from x_k. It does not depend on sample k."""
    return (x.sum(-1, keepdim=True) - x) / (num_samples(x) - 1)


def marginal(R: Tensor) -> tuple[Tensor, Tensor]:
    """a = w - 1/K, b = w, w = softmax(R): our reading of the paper. Eq. (1):

    ∇ log P(y|x) = E_{c~pi}[ r(c) (∇ log pi + ∇ log p) ],  r(c) = p / P(y|x)                   (1)

    With the mean of p over the samples for P(y|x), r(c_k)/K is w_k. The bias is O(1/K).
    The -1/K is a control variate: E[∇ log pi] = 0, so it changes no expectation. Without it equal
    rewards would still push every sampled c to repeat itself."""
    K = num_samples(R)
    w = R.softmax(-1)
    return w - 1 / K, w


def jensen(R: Tensor) -> tuple[Tensor, Tensor]:
    """a = (R_k - mean_{j≠k} R_j)/K, b = 1/K: exact for E_c[log p] <= log P(y|x) (LaTRO, JEPO)."""
    K = num_samples(R)
    return (R - mean_of_others(R)) / K, torch.full_like(R, 1 / K)


def iwae(R: Tensor) -> tuple[Tensor, Tensor]:
    """a = log mean_j p_j - log mean_{j≠k} p_j, b = w: exact for E[log mean_K p] (VIMCO, JEPO)."""
    K = num_samples(R)
    log_mean = R.logsumexp(-1, keepdim=True) - math.log(K)  # (B,1)
    itself = torch.eye(K, dtype=torch.bool, device=R.device)
    others = R[..., None, :].masked_fill(itself, -torch.inf)  # (B,K,K): row k lacks sample k
    log_mean_of_others = others.logsumexp(-1) - math.log(K - 1)  # (B,K)
    return log_mean - log_mean_of_others, R.softmax(-1)


def prob(R: Tensor) -> tuple[Tensor, Tensor]:
    """a = (p_k - mean_{j≠k} p_j)/K, b = p_k/K: exact for P(y|x) itself (VeriFree).

    p underflows where targets are long."""
    K = num_samples(R)
    p = R.exp()
    return (p - mean_of_others(p)) / K, p / K


def grpo(R: Tensor) -> tuple[Tensor, Tensor]:
    """a = (R_k - mean R)/(std R + 1e-4)/K, b = 1/K: the exact gradient of nothing (GRPO)."""
    K = num_samples(R)
    centred = R - R.mean(-1, keepdim=True)
    return centred / (R.std(-1, keepdim=True) + 1e-4) / K, torch.full_like(R, 1 / K)


def best(R: Tensor) -> tuple[Tensor, Tensor]:
    """a = b = 1 for the best sample, 0 for the others: hard EM. The exact gradient of nothing."""
    top = F.one_hot(R.argmax(-1), R.size(-1)).to(R.dtype)
    return top, top


def truncated(R: Tensor, log_pi: Tensor) -> tuple[Tensor, Tensor]:
    """a = b = softmax(log pi + R): exact for log Σ pi p over a set of DISTINCT warmups (RAG).

    A repeat must come with log pi = -inf (see `weights`). Else sampling would count it once, and
    its pi again. Over all warmups this is ∇ log P(y|x) by (1): `exact` is this one, enumerated."""
    num_samples(R)
    posterior = (log_pi + R).softmax(-1)
    return posterior, posterior


def frozen(R: Tensor) -> tuple[Tensor, Tensor]:
    """a = 0, b = 1/K: the baseline without policy gradient. y learns to read c."""
    return torch.zeros_like(R), torch.full_like(R, 1 / R.size(-1))


ESTIMATORS = {f.__name__: f for f in (marginal, jensen, iwae, prob, grpo, best, truncated, frozen)}


def weights(estimator: str, R: Tensor, log_pi: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """a, b (B,K) by the estimator's name. For `exact`, c (B,K,W) must be all_warmups."""
    if estimator == "exact":
        return truncated(R, log_pi)
    if estimator == "truncated":
        return truncated(R, log_pi.masked_fill(~first_occurrence(c), -torch.inf))
    return ESTIMATORS[estimator](R)


def earliest_equal(c: Tensor) -> Tensor:
    """c (B,K,W) -> (B,K): the first place where the same example has an equal warmup."""
    same = (c[:, :, None] == c[:, None]).all(-1)  # (B,K,K)
    return same.int().argmax(-1)  # of equals, argmax takes the first


def first_occurrence(c: Tensor) -> Tensor:
    """c (B,K,W) -> (B,K): False where an earlier warmup of the same example is equal."""
    return earliest_equal(c) == torch.arange(c.size(1), device=c.device)


def entropy_gradient(log_pi: Tensor) -> Tensor:
    """(B,K) -> (B,K): what to add to a, to follow the gradient of the entropy H = -E[log pi].

    ∇H = -E[log pi ∇ log pi], so a_k = -(log pi_k - mean_{j≠k} log pi_j)/K."""
    return -(log_pi - mean_of_others(log_pi)) / num_samples(log_pi)


def surrogate(a: Tensor, b: Tensor, log_pi: Tensor, log_p: Tensor) -> Tensor:
    """loss = -Σ_k [ sg(a_k) log P(c_k|x) + sg(b_k) log P(y|x,c_k) ]  (2), summed over the batch.

    Its gradient is the estimator. Its value is no metric, and may rise while all is well: it is
    about -R per example where Σ a = 0 and Σ b = 1, as with `marginal`. log_p keeps its graph:
    without it the target half of (1) would vanish in silence."""
    return -(a.detach() * log_pi + b.detach() * log_p).sum()


def warmup_loss(
    model: EncoderDecoder,
    batch: Batch,
    spec: WarmupSpec,
    estimator: str = "marginal",
    samples: int = 4,
    *,
    alpha: float = 1.0,
    entropy_bonus: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one policy update, and its diagnostics: sums over the batch, as sft_loss.

    `computed` beside them is score_distinct's (B,): what an update costs depends on it.
    alpha scales R before the estimator. With `marginal`, b goes from that of `frozen` (alpha 0) to
    that of `best` (alpha ∞). entropy_bonus adds so much of the entropy of sampled warmups, in nats.
    The encoder runs once, so sampling and scoring share its dropout. ValueError if the decoder has
    dropout on: we would then score another distribution than we sampled from."""
    if model.decoder.training:
        raise ValueError("call model.decoder.eval() first: decoder dropout is off-policy")
    memory = model.encode(batch.source)
    if estimator == "exact":
        c = all_warmups(spec, model.config.vocab_size).to(batch.source.device)
        c = c.expand(len(batch.source), -1, -1)  # (B,all,W)
    else:
        c, _ = sample_warmups(model, memory, batch.prompt, spec, samples)  # (B,K,W)
    log_pi, log_p, computed = score_distinct(
        model, memory, batch.prompt, c, batch.target, spec
    )  # (B,K), (B,K), (B,)
    R = log_p.detach()
    a, b = weights(estimator, alpha * R, log_pi.detach(), c)  # (B,K) both
    if entropy_bonus:
        a = a + entropy_bonus * entropy_gradient(log_pi.detach())
    loss = surrogate(a, b, log_pi, log_p)
    numbers = diagnostics(R, log_pi.detach(), c, alpha, exact=estimator == "exact")
    return loss, numbers | {"computed": computed}


# ----------------------------------------------------------------------------- is it working?
def diagnostics(
    R: Tensor, log_pi: Tensor, c: Tensor, alpha: float = 1.0, exact: bool = False
) -> dict[str, Tensor]:
    """What to watch instead of the surrogate loss. R, log_pi (B,K), c (B,K,W) -> batch sums.

    Means are over an example's K sampled warmups. exact: over all of them, weighted by P(c|x).

    nll       -log mean_k P(y|x,c_k), nats. In expectation an upper bound on -log P(y|x)
    reward    mean of R over an example's warmups, nats
    spread    standard deviation of R within an example, nats. 0: no c is better than another
    ess       effective sample size 1/Σw², w as the softmax of alpha·R: 1 (one takes all) to K
    entropy   -log P(c|x) of the sampled c, nats. Its mean is the policy's entropy
    distinct  distinct warmups / K"""
    if exact:
        log_q = log_pi  # (B,K): what each warmup counts
        distinct = R.new_ones(len(R))
    else:
        log_q = torch.full_like(R, -math.log(R.size(1)))
        distinct = first_occurrence(c).float().mean(1)  # (B,)
    q = log_q.exp()  # (B,K)
    w = (log_q + alpha * R).softmax(1)  # (B,K)
    mean = (q * R).sum(1, keepdim=True)  # (B,1)
    return {
        "nll": -(log_q + R).logsumexp(1).sum(),
        "reward": mean.sum(),
        "spread": (q * (R - mean) ** 2).sum(1).sqrt().sum(),
        "ess": (1 / w.pow(2).sum(1)).sum(),
        "entropy": -(q * log_pi).sum(),
        "distinct": distinct.sum(),
    }


@torch.no_grad()
def evaluate_warmups(
    model: EncoderDecoder, batch: Batch, spec: WarmupSpec, samples: int, alpha: float = 1.0
) -> dict[str, Tensor]:
    """`diagnostics` on held-out data, and numbers that need more passes. All are batch sums, nats.

    swap_gap    mean_k log P(y|x,c_k) - log P(y|x, c_k of another example). 0: y ignores c
    swapped     how many examples swap_gap counts. One that is alone in its batch has no other
    over_empty  mean_k log P(y|x,c_k) - log P(y|x): what a warmup gains over writing y at once"""
    memory = model.encode(batch.source)
    c, log_pi = sample_warmups(model, memory, batch.prompt, spec, samples)  # (B,K,W), (B,K)
    _, log_p, _ = score_distinct(model, memory, batch.prompt, c, batch.target, spec)  # (B,K)
    others = c.roll(-1, 0)
    _, swapped, _ = score_distinct(model, memory, batch.prompt, others, batch.target, spec)
    direct = direct_logprobs(model, memory, batch)  # (B,)
    return diagnostics(log_p, log_pi, c, alpha) | {
        "swap_gap": (log_p - swapped).mean(1).sum(),
        "swapped": len(c) if len(c) > 1 else 0,
        "over_empty": (log_p.mean(1) - direct).sum(),
    }


# ----------------------------------------------------------------------------- test time
@decoding()
def generate(
    model: EncoderDecoder,
    batch: Batch,
    spec: WarmupSpec | None,
    length: int,
    *,
    beams: int = 1,
    length_penalty: float = 1.0,
    forbidden: tuple[int, ...] = (),
    c: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Write a greedy warmup, then the target: c (B,W) or None, y (B,length), padded after </s>.

    spec None: no warmup, as after SFT. c: a warmup to write y after, in place of the greedy one.
    beams > 1: beam search over y; 1: greedy y. Before its </s>, y holds no pad, no <sep> of the
    spec and no forbidden id. batch.target is not read."""
    config = model.config
    memory = model.encode(batch.source)
    prefix = with_start(model, batch.prompt)  # (B,1+P)
    never = {config.pad_id, *forbidden}
    if spec is not None:
        if c is None:
            c = sample_warmups(model, memory, batch.prompt, spec, 1, temperature=0.0)[0][:, 0]
        sep = torch.full_like(c[:, :1], spec.sep_id)
        prefix = torch.cat([prefix, c, sep], 1)  # (B,1+P+W+1)
        never.add(spec.sep_id)
    never = tensor_of(tuple(sorted(never - {config.eos_id})), prefix.device)  # (ids,)
    if beams > 1:
        y, _ = beam_search(
            model,
            memory,
            prefix,
            length,
            beams=beams,
            length_penalty=length_penalty,
            forbidden=never,
        )
    else:
        y, _ = sample(
            model,
            memory,
            prefix,
            length,
            temperature=0.0,
            forbidden=never,
            stop=config.eos_id,
            fill=config.pad_id,
        )
    return c, y[:, 0]  # (B,W), (B,length): the best beam
