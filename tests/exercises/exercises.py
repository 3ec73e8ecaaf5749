"""The exercises that are code: fill in 1 to 4, mend 8 to 10.

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

    The policy is softmax(logits / spec.temperature). Tokens of spec.forbidden have probability 0.
    But spec.sep_id, though one of them, may end the warmup at any place from spec.min_length on.
    What follows it is filled with <sep>: no choice, so no log-prob.
    """
    raise NotImplementedError


# 5, 6 and 7 are experiments: see docs/exercises.md.
# 8, 9 and 10: the functions in broken.py train without complaint, and each is wrong. Say which test
# would notice. Then copy the function to the end of this file, below the import, and mend it there.

from broken import draw_tokens, surrogate, truncated_weights  # noqa: E402, F401
