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
from torch import nn

V, E, H = 16, 64, 4
K = 8  # warmups sampled for each question


def questions(count):
    """Pairs (B,V) as ids i·V + f(i); question (B,2): kind and start; y (B,); f(start) (B,)."""
    f = torch.rand(count, V).argsort(1)  # (B,V): a permutation a row
    pairs = torch.arange(V) * V + f  # (B,V)
    start = torch.randint(V, (count, 1))  # (B,1)
    kind = torch.randint(V, V + 2, (count, 1))  # (B,1): the token V asks for one hop, V + 1 for two
    once = f.gather(1, start)  # (B,1)
    twice = f.gather(1, once)  # (B,1)
    y = torch.where(kind == V, once, twice)  # (B,1)
    question = torch.cat([kind, start], 1)  # (B,2)
    y, once = y[:, 0], once[:, 0]  # (B,)
    return pairs, question, y, once


def matrix(rows, columns):
    """Of variance 1/fan-in: what goes in with variance 1 comes out so."""
    return nn.Parameter(torch.randn(rows, columns) * columns**-0.5)


def heads(x):
    """(B,L,E) -> (B,H,L,D)."""
    return x.unflatten(2, (H, -1)).transpose(1, 2)


def attend(x, memory, weights, causal):
    """softmax(q kᵀ / sqrt(D)) v with H heads: x (B,L,E), memory (B,S,E) -> (B,L,E)."""
    q, k, v, out = weights
    q = heads(x @ q.T)
    k = heads(memory @ k.T)
    v = heads(memory @ v.T)
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B,H,L,D)
    seen = seen.transpose(1, 2).flatten(2)  # (B,L,E)
    return seen @ out.T


def norm(x):
    return F.rms_norm(x, (E,))


class Decoder(nn.Module):
    """One layer: it looks at what stands before, then at the pairs, then thinks."""

    def __init__(self):
        super().__init__()
        self.pairs = matrix(V * V, E)  # an embedding for each pair of letters
        self.tokens = matrix(V + 2, E)  # of the letters, and of the two kinds of question
        self.places = matrix(3, E)  # learned positions: kind of question, start, c
        self.before = nn.ParameterList(matrix(E, E) for _ in range(4))  # q, k, v, out
        self.source = nn.ParameterList(matrix(E, E) for _ in range(4))
        self.up = matrix(4 * E, E)
        self.down = matrix(E, 4 * E)
        self.letters = matrix(V, E)  # the output layer

    def forward(self, pairs, tokens):
        """pairs (B,V), tokens (B,L) -> log-probs of the letter that comes next, (B,L,V)."""
        memory = norm(self.pairs[pairs])  # (B,V,E)
        places = self.places[: tokens.size(1)]  # (L,E)
        x = norm(self.tokens[tokens] + places)  # (B,L,E)

        h = norm(x)
        x = x + attend(h, h, self.before, causal=True)
        x = x + attend(norm(x), memory, self.source, causal=False)
        hidden = F.relu(norm(x) @ self.up.T)  # (B,L,4E)
        x = x + hidden @ self.down.T

        x = norm(x)
        logits = x @ self.letters.T  # (B,L,V)
        return logits.log_softmax(-1)


def sft_loss(model, pairs, question, y):
    """Supervised fine-tuning: -log P₀(y|x), y directly after the question."""
    log_probs = model(pairs, question)[:, -1]  # (B,V)
    return F.nll_loss(log_probs, y)


def warmup_loss(model, pairs, question, y):
    """Sample K warmups a question, reward each, push the good ones: the policy gradient."""
    pairs = pairs.repeat_interleave(K, 0)  # (N,V)
    question = question.repeat_interleave(K, 0)  # (N,2)
    y = y.repeat_interleave(K, 0)  # (N,)

    with torch.no_grad():
        log_probs = model(pairs, question)[:, -1]  # (N,V)
        c = log_probs.exp().multinomial(1)  # (N,1): sampled from P(c|x)

    tokens = torch.cat([question, c], 1)  # (N,3)
    log_probs = model(pairs, tokens)  # (N,3,V)
    log_pi = log_probs[:, 1].gather(1, c)  # (N,1): log P(c|x)
    log_p = log_probs[:, 2].gather(1, y[:, None])  # (N,1): log P(y|x,c)
    return marginal_loss(log_pi.view(-1, K), log_p.view(-1, K))


def marginal_loss(log_pi, log_p):
    """Its gradient is the paper's, ∇ log P(y|x) = E[ r(c) (∇ log P(c|x) + ∇ log P(y|x,c)) ].

    r(c) = P(y|x,c) / P(y|x). The mean over the samples stands for P(y|x), so r(c_k) / K is w_k, a
    softmax. w is a weight: no gradient flows through it. w - 1/K says whether c_k was better than
    the others. Without -1/K each sampled c would become likelier, even a bad one.
    """
    w = log_p.detach().softmax(1)  # (B,K)
    for_warmup = (w - 1 / K) * log_pi  # (B,K)
    for_target = w * log_p  # (B,K)
    loss = -(for_warmup + for_target).sum(1)  # (B,)
    return loss.mean()


@torch.no_grad()
def report(model, title, warmup):
    """Accuracy at one hop and at two on new questions; how often c is f(start) at two hops."""
    pairs, tokens, y, once = questions(2000)
    two = tokens[:, 0] == V + 1
    hit = torch.tensor(torch.nan)  # without a warmup
    if warmup:
        c = model(pairs, tokens)[:, -1].argmax(1)  # (B,): the likeliest
        tokens = torch.cat([tokens, c[:, None]], 1)
        found = (c == once).float()
        hit = found[two].mean()
    log_probs = model(pairs, tokens)[:, -1]  # (B,V)
    answer = log_probs.argmax(1)  # (B,)
    right = (answer == y).float()
    one = ~two
    one_hop = right[one].mean()
    two_hops = right[two].mean()
    last = f"   c = f(start) {hit:.2f}" if warmup else ""
    print(f"{title:16} one hop {one_hop:.2f}   two hops {two_hops:.2f}{last}")
    return one_hop.item(), two_hops.item(), hit.item()


def train(model, loss, updates, batch, peak, name):
    """Adam, the learning rate falling to 0."""
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    for step in range(updates):
        rise = min(1, (step + 1) / 50)
        fall = 1 - step / updates
        optimizer.param_groups[0]["lr"] = peak * fall * rise
        pairs, question, y, _ = questions(batch)  # every question is new
        loss(model, pairs, question, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            report(model, f"{name} {step + 1}", loss is warmup_loss)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=500, help="of each stage; default: 500")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    model = Decoder()
    train(model, sft_loss, args.updates, batch=512, peak=4e-3, name="SFT")
    train(model, warmup_loss, args.updates, batch=128, peak=4e-3, name="warmups")
    scores = report(model, "at the end", warmup=True)
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} seconds")
    return scores


if __name__ == "__main__":
    main()
