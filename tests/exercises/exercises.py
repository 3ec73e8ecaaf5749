"""The exercises that are code: fill in 1 to 4, 12 and 13, mend 8 to 10.

docs/exercises.md lists all of them, with the time each takes.
Check one with: python -m pytest tests/exercises --mine -k exercise_01
Shapes and words are those of warmup.py. Solutions are in solutions.py; a look into warmup.py gives
most away, too.
"""

import torch  # noqa: F401
from torch import Tensor

from warmup import WarmupSpec, score, truncated, with_start  # noqa: F401 (some help)


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
    """3. c (B,K,W) -> (): the mean of log P(y|x,c) - log P(y|x, c of the next example).

    Over examples and warmups. The last example takes the warmups of the first. 0 means that the
    target ignores its warmup.
    """
    raise NotImplementedError


def log_policy(logits: Tensor, c: Tensor, spec: WarmupSpec) -> Tensor:
    """4. logits (W,V) that the decoder gives along c, c (W,) -> () log P(c|x): Σ_c P(c|x) = 1.

    The policy is softmax(logits / spec.temperature), but tokens of spec.forbidden have probability
    0. A warmup has W tokens, always.
    """
    raise NotImplementedError


def entropy_gradient(log_pi: Tensor) -> Tensor:
    """12. log_pi (B,K) of sampled warmups -> (B,K): what to add to a, so that the entropy rises.

    The entropy of the policy is H = -E[log pi], and ∇H = -E[log pi ∇ log pi]. Estimate it from the
    K samples. Subtract from each what does not depend on it, as `mean_of_others` does for R.
    """
    raise NotImplementedError


def continuum(R: Tensor, q: float) -> tuple[Tensor, Tensor]:
    """13. R (B,K), q from 0 to 1 -> a, b (B,K): from `prob` (q = 0) to `marginal` (q = 1).

    This is the Tsallis continuum (arXiv 2604.25907): follow the gradient of the q-logarithm of P,
    (P^(1-q) - 1) / (1-q), which is P - 1 at q = 0 and becomes log P towards q = 1. With p_k = exp(R_k) and
    P̂ = mean_j p_j, the mean over all K samples,

    a_k = P̂^(-q) (p_k - mean of the other samples' p) / K,   b_k = P̂^(-q) p_k / K

    At q = 1, a is K/(K-1) times that of `marginal`. R may be -700: exp(R) is 0 there, so take
    P̂^(-q) p_k without leaving the log. At q = 1 the weights of R and of R + 700 are the same.
    """
    raise NotImplementedError


# 5, 6 and 7 are experiments: see docs/exercises.md.
# 8, 9 and 10: the functions in broken.py train without complaint, and each is wrong. Say which test
# would notice. Then copy the function to the end of this file, below the import, and mend it there.

from broken import draw_tokens, surrogate, truncated_weights  # noqa: E402, F401
