"""Three toys small enough to solve on paper, for every estimator: python tests/exercises/toys.py xor --estimator jensen

They hold tables instead of a transformer, so all warmups can be listed and log P(y|x) is exact.

xor          y = x1 xor x2, each logit linear in x1, x2 and a binary c. Without c the best is log 2 = 0.69 nats;
             with c = (x1 and x2) it is 0.
paraphrases  y is one of four equally likely words of six letters, letters independent given c. Without c
             6 log 4 = 8.32 nats; if each c stands for one word, log 4 = 1.39.
blind        y = x, one of eight, and P(y|c) cannot see x. Without c log 8 = 2.08 nats; if c tells x, 0.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from warmup import ESTIMATORS, surrogate, weights  # noqa: E402


def parameter(*shape):
    return (0.1 * torch.randn(*shape)).requires_grad_()


def xor():
    """Parameters, and a function to log P(c|x), log P(y|x,c): (4,2) each, a row for each x."""
    bits = torch.tensor([[1.0, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]])  # a constant, x1, x2
    y = torch.tensor([0, 1, 1, 0])
    policy, direct, by_c = parameter(3, 2), parameter(3), parameter(2)

    def tables():
        logit = (bits @ direct)[:, None] + by_c  # (x,c), of y = 1
        return (bits @ policy).log_softmax(1), torch.nn.functional.logsigmoid(
            torch.where(y[:, None] == 1, logit, -logit)
        )

    return [policy, direct, by_c], tables


def paraphrases():
    words = torch.tensor(
        [[(w + t) % 4 for t in range(6)] for w in range(4)]
    )  # no two share a letter at any place
    policy, letters = parameter(4), parameter(4, 6, 4)  # letters: (c, place, letter)

    def tables():
        log_p = letters.log_softmax(-1)[:, torch.arange(6), words].sum(-1)  # (c,word)
        return policy.log_softmax(0).expand(4, 4), log_p.T

    return [policy, letters], tables


def blind():
    policy, target = parameter(8, 8), parameter(8, 8)  # (x,c), (c,y)
    return [policy, target], lambda: (policy.log_softmax(1), target.log_softmax(1).T)


TOYS = {"xor": xor, "paraphrases": paraphrases, "blind": blind}


def solve(
    toy: str,
    estimator: str,
    samples: int = 8,
    steps: int = 400,
    alpha: float = 1.0,
    seed: int = 0,
    weigh=weights,
) -> float:
    """Train by sampling; the exact -log P(y|x) at the end, mean over x, in nats."""
    torch.manual_seed(seed)
    parameters, tables = TOYS[toy]()
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(steps):
        log_pi, log_p = tables()  # (x,c) both
        if estimator == "exact":
            c = torch.arange(log_pi.size(1)).expand(len(log_pi), -1)  # (x,K)
        else:
            rows = log_pi.exp().repeat(8, 1)  # each x eight times a step
            log_pi, log_p = log_pi.repeat(8, 1), log_p.repeat(8, 1)
            c = rows.multinomial(samples, replacement=True)
        log_pi, log_p = log_pi.gather(1, c), log_p.gather(1, c)  # (x,K) both
        a, b = weigh(estimator, alpha * log_p.detach(), log_pi.detach(), c[..., None])
        optimizer.zero_grad()
        (surrogate(a, b, log_pi, log_p) / len(c)).backward()
        optimizer.step()
    log_pi, log_p = tables()
    return -(log_pi + log_p).logsumexp(1).mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("toy", choices=TOYS)
    parser.add_argument(
        "--estimator", choices=(*ESTIMATORS, "exact"), nargs="+", default=[*ESTIMATORS, "exact"]
    )
    parser.add_argument("--samples", type=int, default=8, help="K (default: 8)")
    parser.add_argument(
        "--alpha", type=float, default=1.0, help="factor on the reward (default: 1)"
    )
    parser.add_argument("--steps", type=int, default=400, help="updates (default: 400)")
    parser.add_argument("--seeds", type=int, default=10, help="runs (default: 10)")
    args = parser.parse_args()
    if args.samples < 2 and set(args.estimator) - {"best", "frozen", "exact"}:
        parser.error("all but best, frozen and exact compare warmups: --samples must be at least 2")
    for name in args.estimator:
        values = torch.tensor(
            [
                solve(args.toy, name, args.samples, args.steps, args.alpha, s)
                for s in range(args.seeds)
            ]
        )
        print(
            f"{args.toy} {name:10} nats: lowest {values.min():.2f}  median {values.median():.2f}  highest {values.max():.2f}"
        )
