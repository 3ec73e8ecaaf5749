"""The exercises that are code: fill in 1 to 4, mend 8 to 10. The README lists all ten, with the time each takes.

Check one with: python -m pytest tests/exercises --mine -k exercise_1
Shapes and words are those of warmup.py. Solutions are in solutions.py; a look into warmup.py gives most away too.
"""

import torch
from torch import Tensor

from warmup import WarmupSpec, score, truncated, with_start  # noqa: F401 (some help to solve the exercises)


def jensen(R: Tensor) -> tuple[Tensor, Tensor]:
    """1. R (B,K) -> a, b (B,K), the exact gradient of E_c[log p]:

    a_k = (R_k - mean of the other samples' R) / K,   b_k = 1/K
    """
    raise NotImplementedError


def iwae(R: Tensor) -> tuple[Tensor, Tensor]:
    """2. R (B,K) -> a, b (B,K), the exact gradient of E[log mean_K p], where p_k = exp(R_k):

    a_k = log mean_j p_j - log mean_{j≠k} p_j,   b = softmax(R)

    R may be -700: exp(R) is 0 there, so the means have to be taken without leaving the log.
    """
    raise NotImplementedError


def swap_gap(model, batch, spec: WarmupSpec, c: Tensor) -> Tensor:
    """3. c (B,K,W) -> () mean over examples and warmups of log P(y|x,c) - log P(y|x, c of the next example).

    The last example takes the warmups of the first. 0 means that the target ignores its warmup.
    """
    raise NotImplementedError


def log_policy(logits: Tensor, c: Tensor, spec: WarmupSpec) -> Tensor:
    """4. logits (W,V) that the decoder gives along c, c (W,) -> () log P(c|x), such that Σ_c P(c|x) = 1.

    Tokens of spec.forbidden have probability 0. But spec.sep_id, though one of them, may end the warmup at any
    place from spec.min_length on. What follows it is filled with <sep>: no choice, so no log-prob.
    """
    raise NotImplementedError


# 5, 6 and 7 are experiments: see the README.
# Each function below trains without complaint, and each is wrong. Say which test would notice; then mend it.


def draw_tokens(logits: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """8. logits (R,V) -> tokens (R,samples) and their log-probs (R,samples): the sampler of a policy gradient."""
    likely, ids = logits.topk(min(4, logits.size(-1)))  # (R,4)
    picked = likely.softmax(-1).multinomial(samples, replacement=True)  # (R,samples)
    tokens = ids.gather(1, picked)
    return tokens, logits.log_softmax(-1).gather(1, tokens)


def surrogate(a: Tensor, b: Tensor, log_pi: Tensor, log_p: Tensor) -> Tensor:
    """9. The loss whose gradient is the estimator's, eq. (2)."""
    log_p = log_p.detach()  # the reward: it says how good a warmup was, and carries no gradient
    return -(a.detach() * log_pi + b.detach() * log_p).sum()


def truncated_weights(R: Tensor, log_pi: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """10. R, log_pi (B,K), c (B,K,W) -> a, b (B,K) of `truncated`: the posterior over the warmups that were drawn."""
    v = (R + log_pi).softmax(-1)
    return v, v
