"""Solutions of exercises.py. For 5, 6 and 7 see docs/exercises.md."""

import math

import torch

from warmup import score, truncated


def jensen(R):
    K = R.size(1)
    others = (R.sum(1, keepdim=True) - R) / (K - 1)
    return (R - others) / K, torch.full_like(R, 1 / K)


def iwae(R):
    K = R.size(1)
    others = torch.stack(
        [torch.cat([R[:, :k], R[:, k + 1 :]], 1).logsumexp(1) for k in range(K)], 1
    )
    everyone = R.logsumexp(1, keepdim=True)
    return everyone - others - torch.log(torch.tensor(K / (K - 1))), R.softmax(1)


def swap_gap(model, batch, spec, c):
    memory = model.encode(batch.source)
    own = score(model, memory, batch, c, spec)[1]
    other = score(model, memory, batch, torch.cat([c[1:], c[:1]]), spec)[1]
    return (own - other).mean()


def log_policy(logits, c, spec):
    allowed = (logits / spec.temperature).index_fill(1, torch.tensor(spec.forbidden), -torch.inf)
    return allowed.log_softmax(1).gather(1, c[:, None]).sum()


def entropy_gradient(log_pi):
    K = log_pi.size(1)
    others = (log_pi.sum(1, keepdim=True) - log_pi) / (K - 1)
    return -(log_pi - others) / K


def continuum(R, q):
    K = R.size(1)
    log_mean = R.logsumexp(1, keepdim=True) - math.log(K)
    p = (R - q * log_mean).exp()  # P̂^(-q) p_k: what it is times, the mean of the others is, too
    others = (p.sum(1, keepdim=True) - p) / (K - 1)
    return (p - others) / K, p / K


def draw_tokens(logits, samples):
    """Drew from the likeliest four, but scored under the whole softmax: E[∇ log P] is then no longer 0."""
    tokens = logits.softmax(-1).multinomial(samples, replacement=True)
    return tokens, logits.log_softmax(-1).gather(1, tokens)


def surrogate(a, b, log_pi, log_p):
    """The target's term carried no gradient: only the warmup was trained."""
    return -(a.detach() * log_pi + b.detach() * log_p).sum()


def truncated_weights(R, log_pi, c):
    """A warmup drawn twice was counted twice, once by the drawing and again by its pi: only its first copy may count."""
    copies = torch.stack(
        [(c[:, k : k + 1] == c[:, :k]).all(-1).any(1) for k in range(c.size(1))], 1
    )
    return truncated(R, log_pi.masked_fill(copies, -torch.inf))
