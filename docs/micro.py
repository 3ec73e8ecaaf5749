"""Warmup generations in one file: torch alone, nothing imported from this project.

    python docs/micro.py               about half a minute on two CPU cores
    python docs/micro.py --seed 1

The source x is a random permutation f of 16 letters: 16 pairs (i, f(i)). The target y is f(start),
one hop, or f(f(start)), two hops. The model has one decoder layer, so it can look up one pair for
each token that it reads. One hop is one look-up. For two hops it must first write the letter in
between, f(start). Nobody tells it so. Before y it may write one letter c, the warmup. A letter c
that makes y likelier becomes likelier itself. That is the whole idea.

Here y follows c directly: the look-up that SFT has learned at the start letter serves again at c.
In the large program <sep> stands between c and y, and the look-up must be learned anew there.

B questions, K warmups a question, N = B·K rows, L places, E width, H heads, D head size, V letters
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, E, H = 16, 64, 4
K = 8  # warmups sampled for each question


def questions(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs (B,V), as ids i·V + f(i); the question (B,2), its kind and start; y, f(start) (B,)."""
    f = torch.rand(count, V).argsort(1)  # (B,V): a permutation a row
    start = torch.randint(V, (count, 1))  # (B,1)
    kind = torch.randint(V, V + 2, (count, 1))  # (B,1): the token V asks for one hop, V + 1 for two
    once = f.gather(1, start)  # (B,1)
    y = torch.where(kind == V, once, f.gather(1, once))  # (B,1)
    return torch.arange(V) * V + f, torch.cat([kind, start], 1), y[:, 0], once[:, 0]


def matrix(rows: int, columns: int) -> nn.Parameter:
    """Of variance 1/fan-in: what goes in with variance 1 comes out so."""
    return nn.Parameter(torch.randn(rows, columns) * columns**-0.5)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v with H heads: (B,L,E), (B,S,E) twice -> (B,L,E)."""
    q, k, v = (x.unflatten(2, (H, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (E,))


class Decoder(nn.Module):
    """One layer: it looks at what stands before, then at the pairs, then thinks."""

    def __init__(self):
        super().__init__()
        self.pairs = matrix(V * V, E)  # an embedding for each pair of letters
        self.tokens = matrix(V + 2, E)  # of the letters, and of the two kinds of question
        self.places = matrix(3, E)  # learned positions: kind of question, start, c
        self.own = nn.ParameterList(matrix(E, E) for _ in range(4))  # q, k, v, out
        self.source = nn.ParameterList(matrix(E, E) for _ in range(4))
        self.up, self.down = matrix(4 * E, E), matrix(E, 4 * E)
        self.letters = matrix(V, E)  # the output layer

    def forward(self, pairs: Tensor, tokens: Tensor) -> Tensor:
        """pairs (B,V), tokens (B,L) -> log-probs of the letter that comes next, (B,L,V)."""
        memory = norm(self.pairs[pairs])  # (B,V,E)
        x = norm(self.tokens[tokens] + self.places[: tokens.size(1)])  # (B,L,E)
        q, k, v, out = self.own
        h = norm(x)
        x = x + attend(h @ q.T, h @ k.T, h @ v.T, causal=True) @ out.T
        q, k, v, out = self.source
        x = x + attend(norm(x) @ q.T, memory @ k.T, memory @ v.T, causal=False) @ out.T
        x = x + F.relu(norm(x) @ self.up.T) @ self.down.T
        return (norm(x) @ self.letters.T).log_softmax(-1)


def sft_loss(model: Decoder, pairs: Tensor, question: Tensor, y: Tensor) -> Tensor:
    """Supervised fine-tuning: -log P(y|x), y directly after the question."""
    return F.nll_loss(model(pairs, question)[:, -1], y)


def warmup_loss(model: Decoder, pairs: Tensor, question: Tensor, y: Tensor) -> Tensor:
    """Sample K warmups a question, reward each, push the good ones: the policy gradient."""
    pairs, question, y = (x.repeat_interleave(K, 0) for x in (pairs, question, y))  # N rows
    with torch.no_grad():
        c = model(pairs, question)[:, -1].exp().multinomial(1)  # (N,1): sampled from P(c|x)
    log_probs = model(pairs, torch.cat([question, c], 1))  # (N,3,V)
    log_pi = log_probs[:, 1].gather(1, c).view(-1, K)  # (B,K): log P(c|x)
    log_p = log_probs[:, 2].gather(1, y[:, None]).view(-1, K)  # (B,K): log P(y|x,c)
    return marginal_loss(log_pi, log_p)


def marginal_loss(log_pi: Tensor, log_p: Tensor) -> Tensor:
    """Its gradient is the paper's, ∇ log P(y|x) = E[ r(c) (∇ log P(c|x) + ∇ log P(y|x,c)) ].

    r(c) = P(y|x,c) / P(y|x). The mean over the samples stands for P(y|x), so r(c_k) / K is w_k, a
    softmax. w is a weight: no gradient flows through it. w - 1/K says whether c_k was better than
    the others. Without -1/K each sampled c would become likelier, even a bad one.
    """
    w = log_p.detach().softmax(1)  # (B,K)
    return -((w - 1 / K) * log_pi + w * log_p).sum(1).mean()


@torch.no_grad()
def report(model: Decoder, title: str, warmup: bool) -> tuple[float, float, float]:
    """Accuracy at one hop and at two on new questions; how often c is f(start) at two hops."""
    pairs, tokens, y, once = questions(2000)
    two = tokens[:, 0] == V + 1
    hit = torch.tensor(torch.nan)  # without a warmup
    if warmup:
        c = model(pairs, tokens)[:, -1].argmax(1)  # (B,): the likeliest
        tokens = torch.cat([tokens, c[:, None]], 1)
        hit = (c == once)[two].float().mean()
    right = (model(pairs, tokens)[:, -1].argmax(1) == y).float()
    one_hop, two_hops = right[~two].mean(), right[two].mean()
    found = f"   c = f(start) {hit:.2f}" if warmup else ""
    print(f"{title:16} one hop {one_hop:.2f}   two hops {two_hops:.2f}{found}")
    return one_hop.item(), two_hops.item(), hit.item()


def train(model: Decoder, loss, updates: int, batch: int, rate: float, name: str) -> None:
    """Adam, the learning rate falling to 0."""
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    for step in range(updates):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / updates) * min(1, (step + 1) / 50)
        pairs, question, y, _ = questions(batch)  # every question is new
        loss(model, pairs, question, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            report(model, f"{name} {step + 1}", loss is warmup_loss)


def main(argv: list[str] | None = None) -> tuple[float, float, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=500, help="of each stage; default: 500")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    model = Decoder()
    train(model, sft_loss, args.updates, 512, 4e-3, "SFT")
    train(model, warmup_loss, args.updates, 128, 4e-3, "warmups")
    scores = report(model, "at the end", warmup=True)
    print(f"{time.perf_counter() - started:.0f} seconds")
    return scores


if __name__ == "__main__":
    main()
