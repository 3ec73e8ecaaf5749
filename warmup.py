"""The paper: an encoder-decoder that writes a short latent warmup c before its target y.

    decoder reads   [start] prompt c_1..c_W <sep> y_1..y_{T-1}
    decoder writes                 c_1..c_W <sep> y_1..y_{T-1} </s>

Nobody labels c. It is sampled from P(c|x), rewarded by R = log P(y|x,c), and improved by policy gradient.
Reading order = the order of one training step: sample_warmups, score, an estimator, warmup_loss.

Notation (shapes as in model.py): x source, y target, R (B,K) rewards, pi = P(c|x), p = P(y|x,c).
Absent on purpose: no critic, no KL penalty, no clipping, no reward model. The reward is the model's own
likelihood and every sample is used once, so the policy that is updated is the policy that sampled.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import EncoderDecoder, Memory, beam_search, sample


@dataclass(frozen=True)
class WarmupSpec:
    """What a warmup may look like. Sampling and scoring share it, so they agree on the distribution."""

    sep_id: int  # stands between warmup and target
    forbidden: tuple[int, ...]  # ids a warmup may not contain (pad, </s>, tags), <sep> among them
    length: int  # W
    min_length: int  # from here on <sep> may end a warmup early; W: it never may
    temperature: float = 1.0
    pause: bool = False  # control: W constant tokens (<sep>) instead of a warmup, room to compute but no message

    def __post_init__(self):
        if not 1 <= self.min_length <= self.length:
            raise ValueError(f"need 1 <= min_length <= length, got {self.min_length} and {self.length}")
        if self.sep_id not in self.forbidden:
            raise ValueError("<sep> must be forbidden: min_length says where it may end a warmup early")

    def barred(self, device, may_stop: bool) -> Tensor:
        """Ids of probability 0 in a warmup; <sep> is one of them wherever the warmup may not stop."""
        return torch.tensor([i for i in self.forbidden if not (may_stop and i == self.sep_id)], device=device)


@dataclass
class Batch:
    """B examples. Rows are padded on the right with pad_id; prompts of one batch have one length P."""

    source: Tensor  # (B,S)
    prompt: Tensor  # (B,P) decoder prefix, read but never scored: a language tag, a question
    target: Tensor  # (B,T), each row ends in </s>

    def to(self, device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in (self.source, self.prompt, self.target)))

    def index(self, rows) -> "Batch":
        return Batch(self.source[rows], self.prompt[rows], self.target[rows])


def target_tokens(model: EncoderDecoder, batch: Batch) -> Tensor:
    """How many target tokens a batch holds, </s> included: the unit of every per-token number, a () tensor."""
    return (batch.target != model.config.pad_id).sum()


def with_start(model: EncoderDecoder, prompt: Tensor) -> Tensor:
    """(R,P) -> (R,1+P): the start token (T5: the pad id) in front of the prompt."""
    return torch.cat([prompt.new_full((len(prompt), 1), model.config.pad_id), prompt], 1)


def masked_logprobs(model, hidden: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """hidden (R,T,E), target (R,T) -> (R,) sums of target log-probs. Padding never reaches the output layer."""
    real = target != model.config.pad_id  # (R,T)
    log_probs = model.token_logprobs(hidden[real], target[real], smoothing=smoothing)  # (tokens,)
    rows = torch.arange(len(target), device=target.device)[:, None].expand_as(target)[real]
    return log_probs.new_zeros(len(target)).index_add(0, rows, log_probs)


# ----------------------------------------------------------------------------- stage 1: SFT


def direct_logprobs(model: EncoderDecoder, memory: Memory, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """log P(y|x), no warmup: the decoder reads [start] prompt y. -> (B,) sums over target tokens."""
    tokens = torch.cat([with_start(model, batch.prompt), batch.target[:, :-1]], 1)  # (B,P+T)
    hidden = model.decode(tokens, memory)[:, batch.prompt.size(1) :]  # (B,T,E)
    return masked_logprobs(model, hidden, batch.target, smoothing)


def sft_loss(model: EncoderDecoder, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Supervised fine-tuning: -Σ log P(y|x), a sum over tokens (the caller divides: see train.py)."""
    return -direct_logprobs(model, model.encode(batch.source), batch, smoothing).sum()


# ----------------------------------------------------------------------------- stage 2: warmups


def sample_warmups(model: EncoderDecoder, memory: Memory, prompt: Tensor, spec: WarmupSpec, samples: int,
                   temperature: float | None = None) -> tuple[Tensor, Tensor]:
    """Draw K = samples warmups per example from P(c|x): c (B,K,W) and log P(c|x) (B,K), without autograd.

    A warmup that stops early is filled up with <sep>. Those are forced, no choice of the policy, and carry
    no log-prob; in exchange y starts at the same place in every row. temperature=0 takes the likeliest
    token at each step (for test time).
    """
    if spec.pause:
        c = prompt.new_full((len(prompt), samples, spec.length), spec.sep_id)  # (B,K,W)
        return c, torch.zeros(c.shape[:2], device=c.device)
    temperature = spec.temperature if temperature is None else temperature
    may_stop = spec.min_length < spec.length
    c, log_probs = sample(
        model, memory, with_start(model, prompt), spec.length, samples=samples, temperature=temperature,
        forbidden=spec.barred(prompt.device, may_stop),
        stop=spec.sep_id if may_stop else None, fill=spec.sep_id, min_length=spec.min_length,
    )
    return c, log_probs.sum(-1)


def score(model: EncoderDecoder, memory: Memory, prompt: Tensor, c: Tensor, target: Tensor,
          spec: WarmupSpec) -> tuple[Tensor, Tensor]:
    """One teacher-forced pass over [start, prompt, c, <sep>, y]: log P(c|x) and log P(y|x,c), both (B,K).

    c (B,K,W), target (B,T). Both are sums over tokens. The memory of the B examples serves all K rows.
    """
    (B, K, W), P = c.shape, prompt.size(1)
    prefix = with_start(model, prompt).repeat_interleave(K, 0)  # (R,1+P)
    c, y = c.reshape(B * K, W), target.repeat_interleave(K, 0)  # (R,W), (R,T)
    sep = torch.full_like(c[:, :1], spec.sep_id)  # (R,1)
    hidden = model.decode(torch.cat([prefix, c, sep, y[:, :-1]], 1), memory)  # (R,P+W+1+T,E)

    log_pi = hidden.new_zeros(B * K)
    stopped = torch.cat([torch.zeros_like(sep), (c == spec.sep_id).int().cumsum(1)[:, :-1]], 1) > 0  # (R,W)
    for start, end in ((0, spec.min_length), (spec.min_length, W)):  # <sep> is allowed in the second part only
        if start < end and not spec.pause:
            part = hidden[:, P + start : P + end].flatten(0, 1)  # (R·w,E)
            log_probs = model.token_logprobs(part, c[:, start:end].flatten(), temperature=spec.temperature,
                                             forbidden=spec.barred(c.device, start > 0)).view(B * K, -1)  # (R,w)
            log_pi = log_pi + log_probs.masked_fill(stopped[:, start:end], 0.0).sum(1)
    log_p = masked_logprobs(model, hidden[:, P + W + 1 :], y)
    return log_pi.view(B, K), log_p.view(B, K)


def all_warmups(spec: WarmupSpec, vocab_size: int) -> Tensor:
    """Every warmup that can be sampled, (N,W): for `exact`, and for tests. N is about V^W: toys only."""
    tokens = [i for i in range(vocab_size) if i not in spec.forbidden]
    rows = [[*c, *[spec.sep_id] * (spec.length - n)]
            for n in range(spec.min_length, spec.length + 1) for c in itertools.product(tokens, repeat=n)]
    return torch.tensor(rows)


# ----------------------------------------------------------------------------- the estimators
#
# Each is a choice of two weights for the surrogate (2): a_k moves the warmup policy, b_k moves the target.
# R (B,K) -> a, b (B,K). R_k = log p_k is the sum of the target's log-probs after warmup c_k, w = softmax(R).


def several(R: Tensor) -> int:
    """K. ValueError for K = 1 where a sample is weighed against the others of its example."""
    if R.size(-1) < 2:
        raise ValueError("this estimator compares warmups with each other: it needs --samples 2 or more")
    return R.size(-1)


def marginal(R: Tensor) -> tuple[Tensor, Tensor]:
    """a = w - 1/K, b = w: our reading of the paper, eq. (1) with the mean of p over the samples for P(y|x).

    ∇ log P(y|x) = E_{c~pi}[ r(c) (∇ log pi + ∇ log p) ],  r(c) = p / P(y|x)                       (1)

    r(c_k)/K = w_k then: consistent, with a bias of O(1/K). The -1/K is a control variate: E[∇ log pi] = 0, so
    it changes no expectation, but without it equal rewards would still push every sampled c to repeat itself.
    """
    K, w = several(R), R.softmax(-1)
    return w - 1 / K, w


def jensen(R: Tensor) -> tuple[Tensor, Tensor]:
    """a = (R_k - mean_{j≠k} R_j)/K, b = 1/K: exact for E_c[log p], a lower bound of log P(y|x) (LaTRO, JEPO)."""
    K = several(R)
    return (R - R.mean(-1, keepdim=True)) / (K - 1), torch.full_like(R, 1 / K)  # R - mean = (K-1)/K (R - others' mean)


def iwae(R: Tensor) -> tuple[Tensor, Tensor]:
    """a = log mean_j p_j - log mean_{j≠k} p_j, b = w: exact for E[log mean_K p], a tighter bound (VIMCO, JEPO)."""
    K, itself = several(R), torch.eye(R.size(-1), dtype=torch.bool, device=R.device)
    others = R[..., None, :].masked_fill(itself, -torch.inf).logsumexp(-1) - math.log(K - 1)  # (B,K)
    return R.logsumexp(-1, keepdim=True) - math.log(K) - others, R.softmax(-1)


def prob(R: Tensor) -> tuple[Tensor, Tensor]:
    """a = (p_k - mean_{j≠k} p_j)/K, b = p_k/K: exact for P(y|x) itself (VeriFree). Long targets: p underflows."""
    K, p = several(R), R.exp()
    return (p - p.mean(-1, keepdim=True)) / (K - 1), p / K


def grpo(R: Tensor) -> tuple[Tensor, Tensor]:
    """a = (R_k - mean R)/(std R + 1e-4)/K, b = 1/K: the gradient of nothing, the scale is set per example (GRPO)."""
    K = several(R)
    return (R - R.mean(-1, keepdim=True)) / (R.std(-1, keepdim=True) + 1e-4) / K, torch.full_like(R, 1 / K)


def best(R: Tensor) -> tuple[Tensor, Tensor]:
    """a = b = 1 for the best sample, 0 for the others: hard EM. The gradient of nothing exact."""
    top = F.one_hot(R.argmax(-1), R.size(-1)).to(R.dtype)
    return top, top


def truncated(R: Tensor, log_pi: Tensor) -> tuple[Tensor, Tensor]:
    """a = b = softmax(log pi + R): exact for log Σ pi p over a set of DISTINCT warmups (as in RAG).

    A repeated warmup must come with log pi = -inf (see `weights`), or it would be counted once by the sampling
    and again by its pi. Over all warmups this is ∇ log P(y|x), by (1): so `exact` is this one, enumerated.
    """
    several(R)
    v = (log_pi + R).softmax(-1)
    return v, v


def frozen(R: Tensor) -> tuple[Tensor, Tensor]:
    """a = 0, b = 1/K: the control without policy gradient. The target learns to read c; c is not improved."""
    return torch.zeros_like(R), torch.full_like(R, 1 / R.size(-1))


ESTIMATORS = {f.__name__: f for f in (marginal, jensen, iwae, prob, grpo, best, truncated, frozen)}


def weights(estimator: str, R: Tensor, log_pi: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """a, b (B,K) by the estimator's name; `exact`: c (B,K,W) must be all_warmups."""
    if estimator == "exact":
        return truncated(R, log_pi)
    if estimator == "truncated":
        return truncated(R, log_pi.masked_fill(~first_of_its_kind(c), -torch.inf))
    return ESTIMATORS[estimator](R)


def first_of_its_kind(c: Tensor) -> Tensor:
    """c (B,K,W) -> (B,K): False where an earlier warmup of the same example is equal."""
    same = (c[:, :, None] == c[:, None]).all(-1)  # (B,K,K)
    return ~same.tril(-1).any(-1)


def entropy_gradient(log_pi: Tensor) -> Tensor:
    """The addition to a that follows the gradient of the policy's entropy H = -E[log pi]: (B,K) -> (B,K).

    ∇H = -E[log pi ∇ log pi]; as in `jensen`, the others' mean is the baseline.
    """
    return -(log_pi - log_pi.mean(-1, keepdim=True)) / (several(log_pi) - 1)


def surrogate(a: Tensor, b: Tensor, log_pi: Tensor, log_p: Tensor) -> Tensor:
    """loss = -Σ_k [ sg(a_k) log P(c_k|x) + sg(b_k) log P(y|x,c_k) ]  (2), summed over the batch.

    Its gradient is the estimator; its value means nothing (near 0, and it may rise while all goes well).
    log_p keeps its graph: without it the target half of (1) would silently vanish.
    """
    return -(a.detach() * log_pi + b.detach() * log_p).sum()


def warmup_loss(model: EncoderDecoder, batch: Batch, spec: WarmupSpec, estimator: str = "marginal", samples: int = 4,
                *, alpha: float = 1.0, entropy_bonus: float = 0.0, sft_weight: float = 0.0
                ) -> tuple[Tensor, dict[str, Tensor]]:
    """One policy update's loss (a sum, as sft_loss) and diagnostics (() tensors, sums over the batch).

    alpha scales R before the estimator: with `marginal`, b = softmax(alpha R) goes from that of `frozen` (0) to
    that of `best` (∞; a keeps its -1/K). entropy_bonus adds that much of the policy's entropy (nats) to the
    objective (of sampled warmups, so not with `exact`), sft_weight that much of log P(y|x) without warmup.

    The encoder runs once; its dropout, if on, is drawn once and shared by sampling and scoring. The
    decoder must be in eval mode: dropout would make us score another distribution than we sampled from.
    """
    if model.decoder.training:
        raise ValueError("call model.decoder.eval() first: decoder dropout would take the samples off-policy")
    memory = model.encode(batch.source)
    if estimator == "exact":
        c = all_warmups(spec, model.config.vocab_size).to(batch.source.device).expand(len(batch.source), -1, -1)
    else:
        c, _ = sample_warmups(model, memory.detach(), batch.prompt, spec, samples)  # (B,K,W)
    log_pi, log_p = score(model, memory, batch.prompt, c, batch.target, spec)  # (B,K) both
    R = log_p.detach()
    a, b = weights(estimator, alpha * R, log_pi.detach(), c)
    if entropy_bonus:
        a = a + entropy_bonus * entropy_gradient(log_pi.detach())
    loss = surrogate(a, b, log_pi, log_p)
    if sft_weight:
        loss = loss - sft_weight * direct_logprobs(model, memory, batch).sum()
    return loss, diagnostics(R, log_pi.detach(), c, exact=estimator == "exact")


# ----------------------------------------------------------------------------- is it working?


def diagnostics(R: Tensor, log_pi: Tensor, c: Tensor, exact: bool = False) -> dict[str, Tensor]:
    """What to watch instead of the surrogate loss. R, log_pi (B,K), c (B,K,W) -> sums over the batch.

    Means are over an example's K sampled warmups, or (exact: all warmups) weighted by P(c|x).

    nll           -log mean_k P(y|x,c_k), nats: an upper bound on -log P(y|x) in expectation (exact: itself)
    reward        mean of R over an example's warmups, nats
    spread        standard deviation of R within an example, nats: 0 means that no c is better than another
    ess           effective sample size 1/Σw², from 1 (one sample takes all) to K (all alike)
    entropy       -log P(c|x) of the sampled c, nats: its mean is the policy's entropy
    distinct      distinct warmups / K
    """
    log_q = log_pi if exact else torch.full_like(R, -math.log(R.size(1)))  # (B,K) what each warmup counts
    q, w = log_q.exp(), (log_q + R).softmax(1)  # (B,K) both
    mean = (q * R).sum(1, keepdim=True)  # (B,1)
    return {
        "nll": -(log_q + R).logsumexp(1).sum(),
        "reward": mean.sum(),
        "spread": (q * (R - mean) ** 2).sum(1).sqrt().sum(),
        "ess": (1 / w.pow(2).sum(1)).sum(),
        "entropy": -(q * log_pi).sum(),
        "distinct": R.new_tensor(len(R)) if exact else first_of_its_kind(c).float().mean(1).sum(),
    }


@torch.no_grad()
def evaluate_warmups(model: EncoderDecoder, batch: Batch, spec: WarmupSpec, samples: int) -> dict[str, Tensor]:
    """`diagnostics` on held-out data, and two that need more passes (all sums over the batch, nats):

    swap_gap    mean_k log P(y|x,c_k) - log P(y|x, c_k of another example): 0 means that c is ignored. Per
                `swapped` example: one that is alone in its batch has no other
    over_empty  mean_k log P(y|x,c_k) - log P(y|x): what a sampled warmup gains over writing y at once
    """
    memory = model.encode(batch.source)
    c, log_pi = sample_warmups(model, memory, batch.prompt, spec, samples)
    _, log_p = score(model, memory, batch.prompt, c, batch.target, spec)
    _, swapped = score(model, memory, batch.prompt, c.roll(-1, 0), batch.target, spec)  # the neighbour's c
    direct = direct_logprobs(model, memory, batch)
    return diagnostics(log_p, log_pi, c) | {
        "swap_gap": (log_p - swapped).mean(1).sum(),
        "swapped": torch.tensor(float(len(c) if len(c) > 1 else 0), device=c.device),
        "over_empty": (log_p.mean(1) - direct).sum(),
    }


# ----------------------------------------------------------------------------- test time


@torch.no_grad()
def generate(model: EncoderDecoder, batch: Batch, spec: WarmupSpec | None, length: int, *, beams: int = 1,
             length_penalty: float = 1.0, warmup_temperature: float = 0.0, temperature: float = 0.0,
             barred: tuple[int, ...] = ()) -> tuple[Tensor | None, Tensor]:
    """Write the warmup, then the target: c (B,W) or None, y (B,length) padded after </s>.

    spec None: no warmup, as after SFT. warmup_temperature 0: greedy c; 1: a sampled c. beams > 1: beam
    search over y; beams 1: greedy, or sampled at `temperature` > 0. y never holds pad, <sep> or a `barred` id.
    batch.target is not read.
    """
    memory, prefix, c = model.encode(batch.source), with_start(model, batch.prompt), None
    if spec is not None:
        c = sample_warmups(model, memory, batch.prompt, spec, 1, warmup_temperature)[0][:, 0]  # (B,W)
        prefix = torch.cat([prefix, c, torch.full_like(c[:, :1], spec.sep_id)], 1)  # (B,1+P+W+1)
    barred = {model.config.pad_id, *barred, *([spec.sep_id] if spec else [])} - {model.config.eos_id}
    forbidden = torch.tensor(sorted(barred), device=prefix.device)
    if beams > 1:
        y = beam_search(model, memory, prefix, length, beams=beams, length_penalty=length_penalty,
                        forbidden=forbidden)[0][:, 0]
    else:
        y = sample(model, memory, prefix, length, temperature=temperature, forbidden=forbidden,
                   stop=model.config.eos_id, fill=model.config.pad_id)[0][:, 0]
    return c, y  # (B,W), (B,length)
