"""Exercises 8 to 10: three functions that pass a smoke run, and are wrong.

Copy one to the end of exercises.py to mend it.
"""

from torch import Tensor


def draw_tokens(logits: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """8. logits (N,V) -> tokens and their log-probs, (N,samples) both, of softmax(logits)."""
    likely, ids = logits.topk(min(4, logits.size(-1)))  # (N,4)
    picked = likely.softmax(-1).multinomial(samples, replacement=True)  # (N,samples)
    tokens = ids.gather(1, picked)
    return tokens, logits.log_softmax(-1).gather(1, tokens)


def surrogate(a: Tensor, b: Tensor, log_pi: Tensor, log_p: Tensor) -> Tensor:
    """9. The loss whose gradient is the estimator's, eq. (2)."""
    log_p = log_p.detach()  # the reward: it says how good a warmup was, and carries no gradient
    return -(a.detach() * log_pi + b.detach() * log_p).sum()


def truncated_weights(R: Tensor, log_pi: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """10. R, log_pi (B,K), c (B,K,W) -> a, b (B,K) of `truncated`.

    The posterior over the warmups that were drawn.
    """
    v = (R + log_pi).softmax(-1)
    return v, v
