"""The model: an encoder-decoder transformer with T5's architecture, written out by hand.

Nothing here computes with warmups, tasks or training; some messages name flags of train.py. One
shape alphabet for the whole codebase:

    B batch            S source length    T target length    W warmup length
    K warmups/example  H heads            D head size        V vocabulary
    E model width      L decoder length   N = B*K decoder rows, the K of an example adjacent

T5's oddities, each marked where it happens: RMSNorm without mean or bias, no biases in linear
layers, positions only as a learned bias on attention scores, the pad id as decoder start.
"""

import json
import math
import os
import random
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PAD_ID = 0  # also the decoder's start token: T5 has no other
EOS_ID = 1
MASKED = -1e9  # added to a score to hide a key. Finite: a row that sees no key stays free of NaN


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Field names are ours; T5's are in parentheses where they differ."""

    vocab_size: int = 8000
    width: int = 256  # E (d_model)
    heads: int = 4  # H
    head_size: int = 64  # D (d_kv); T5 does not require H * D == E
    ff: int = 1024  # hidden size of the feed-forward layer (d_ff)
    encoder_layers: int = 4  # 0: the decoder attends to the normalised source embeddings
    decoder_layers: int = 4
    gated: bool = False  # False: ReLU (T5 v1.0); True: gated GELU (T5 v1.1, mT5)
    tied: bool = True  # the output layer is the embedding (T5 v1.0)
    shared_bias: bool = True  # one position bias per stack; False: one per layer (umT5)
    buckets: int = 32  # relative distances fall into this many buckets
    max_distance: int = 128  # distances from here on share the last bucket
    scaled: bool = True  # our form of the same function, for AdamW (see `embed`); False: T5's
    absolute: bool = True  # add sinusoidal positions to the embeddings; False: T5, which has none
    dropout: float = 0.1

    @property
    def inner(self):
        return self.heads * self.head_size

    @property
    def attention_scale(self):
        """1 for T5, which does not divide by sqrt(D): its query weights are smaller instead."""
        return self.head_size**-0.5 if self.scaled else 1.0


# ----------------------------------------------------------------------------- building blocks
def attention(q, k, v, bias, scale):
    """softmax(scale q kᵀ + bias) v: (B,H,L,D), (B,H,S,D) x2 -> (B,H,L,D), fused where torch can.

    bias, broadcast to (B,H,L,S), holds position bias and masks. scale is 1 for T5. No dropout of
    attention weights: our choice, the fused CPU kernel has none.
    """
    if q.dtype == torch.bfloat16 and q.is_cpu:  # torch 2.13: fused is 5x slower
        return plain_attention(q, k, v, bias, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)


def plain_attention(q, k, v, bias, scale):
    """The same in plain algebra. Tests hold `attention` to it, forward and backward."""
    scores = scale * (q @ k.transpose(-1, -2)) + bias  # (B,H,L,S)
    return scores.softmax(-1).to(v.dtype) @ v


def split_heads(x, parts, heads):
    """(N,L,parts·H·D) -> (parts,N,H,L,D)."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def linear(inputs, outputs):
    """A matrix: T5's linear layers have no bias."""
    return nn.Linear(inputs, outputs, bias=False)


def rms_norm(config):
    """x / sqrt(mean(x²) + 1e-6) * weight: T5's layer norm subtracts no mean and adds no bias."""
    return nn.RMSNorm(config.width, eps=1e-6)


class Dropout(nn.Dropout):
    """Zero each element with probability p and scale the rest by 1/(1-p), in training only."""

    def forward(self, x):
        if self.training and self.p and x.is_cpu:
            return cpu_dropout(x, self.p)  # a faster form; p is rounded to 1/256
        return super().forward(x)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.scale = config.heads, config.attention_scale
        self.qkv = linear(config.width, 3 * config.inner)  # one product, not three
        self.out = linear(config.inner, config.width)

    def forward(self, x, bias, cache, layer):
        qkv = split_heads(self.qkv(x), 3, self.heads)  # (3,N,H,L,D)
        q, kv = qkv[0], qkv[1:]
        if cache is not None:
            kv = cache.append(layer, kv)  # (2,N,H,past+L,D)
        mixed = attention(q, *kv, bias, self.scale)  # (N,H,L,D)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (N,L,E)


class CrossAttention(nn.Module):
    """The decoder's look at the source. Keys and values are projected once per example.

    Cross-attention has no causal structure, so an example's K warmups may stand side by side on
    the query axis: queries (B,H,K·L,D) against ONE copy of keys (B,H,S,D). (Where many warmups are
    equal, `warmup.score_distinct` copies the memory after all: fewer rows are faster.)
    """

    def __init__(self, config):
        super().__init__()
        self.heads, self.scale = config.heads, config.attention_scale
        self.q = linear(config.width, config.inner)
        self.kv = linear(config.width, 2 * config.inner)
        self.out = linear(config.inner, config.width)

    def project(self, states):
        """Encoder states (B,S,E) -> keys and values, (2,B,H,S,D)."""
        return split_heads(self.kv(states), 2, self.heads)

    def forward(self, x, kv, bias):
        N, L, _ = x.shape
        B = kv.size(1)
        q = self.q(x).view(B, N // B * L, self.heads, -1)  # (B,K·L,H,D)
        mixed = attention(q.transpose(1, 2), *kv, bias, self.scale)  # (B,H,K·L,D)
        return self.out(mixed.transpose(1, 2).reshape(N, L, -1))  # (N,L,E)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.gated
        parts = 2 if config.gated else 1
        self.up = linear(config.width, parts * config.ff)
        self.down = linear(config.ff, config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            x = F.gelu(gate, approximate="tanh") * x
        else:
            x = F.relu(x)
        return self.down(self.dropout(x))


class Block(nn.Module):
    """Self-attention, cross-attention (decoder), feed-forward; each x + dropout(f(norm(x)))."""

    def __init__(self, config, decoder):
        super().__init__()
        self.self_attention, self.self_norm = SelfAttention(config), rms_norm(config)
        if decoder:
            self.cross_attention, self.cross_norm = CrossAttention(config), rms_norm(config)
        self.feed_forward, self.ff_norm = FeedForward(config), rms_norm(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x, bias, memory, cache, layer):
        read = self.self_attention(self.self_norm(x), bias, cache, layer)
        x = x + self.dropout(read)
        if memory is not None:
            seen = self.cross_attention(self.cross_norm(x), memory.kv[layer], memory.bias)
            x = x + self.dropout(seen)
        return x + self.dropout(self.feed_forward(self.ff_norm(x)))


class PositionBias(nn.Module):
    """T5's only notion of position: a learned number per head and distance (Raffel et al. §2.1).

    Half of the buckets hold one distance each; the others grow logarithmically to max_distance.
    The encoder looks both ways and splits its buckets by sign. The decoder looks back only.
    """

    def __init__(self, config, bidirectional):
        super().__init__()
        self.bidirectional = bidirectional
        self.buckets, self.max_distance = config.buckets, config.max_distance
        self.weight = nn.Parameter(torch.zeros(config.buckets, config.heads))

    def bucket(self, distance):
        """distance = key position - query position, any shape -> bucket index, same shape."""
        n = self.buckets // 2 if self.bidirectional else self.buckets
        exact = n // 2  # distances below have a bucket each
        steps = distance.abs()  # both ways alike: the decoder's future is masked
        ratio = torch.log(steps.clamp(min=1) / exact)
        ratio = ratio / math.log(self.max_distance / exact)  # from 0 to 1, and beyond
        far = exact + (ratio * (n - exact)).long()
        bucket = torch.where(steps < exact, steps, far.clamp(max=n - 1))
        if self.bidirectional:
            bucket = bucket + n * (distance > 0)
        return bucket

    def forward(self, length):
        """(1,H,L,L), L the length. In the decoder the future is MASKED."""
        at = torch.arange(length, device=self.weight.device)
        distance = at - at[:, None]  # (L,L)
        bias = self.weight[self.bucket(distance)].permute(2, 0, 1)  # (H,L,L)
        if not self.bidirectional:
            bias = bias.masked_fill(distance > 0, MASKED)
        # contiguous: CUDA's fused kernels ask for such a mask
        return bias[None].contiguous()


def sinusoids(x, past):
    """(L,E) for x (N,L,E): sin and cos of positions from `past` on (Vaswani et al. §3.5).

    Their wavelengths go from 2π to 20,000π.
    """
    _, L, E = x.shape
    rate = torch.exp(torch.arange(0, E, 2, device=x.device) * (-math.log(10000.0) / E))
    angle = torch.arange(past, past + L, device=x.device)[:, None] * rate  # (L,E/2)
    return torch.cat([angle.sin(), angle.cos()], -1)


class Stack(nn.Module):
    """All blocks of the encoder or the decoder, with the biases they share and a final norm."""

    def __init__(self, config, decoder):
        super().__init__()
        layers = config.decoder_layers if decoder else config.encoder_layers
        biases = 1 if config.shared_bias else layers
        self.blocks = nn.ModuleList(Block(config, decoder) for _ in range(layers))
        self.biases = nn.ModuleList(PositionBias(config, not decoder) for _ in range(biases))
        self.norm, self.dropout = rms_norm(config), Dropout(config.dropout)
        self.recompute = False  # True: keep a block's input only; backward computes the rest again

    def position_biases(self, length):
        """One (1,H,L,L) per layer, or a single one that all layers share; causal in the decoder."""
        return [bias(length) for bias in self.biases]

    def forward(self, x, biases, memory=None, cache=None):
        x = self.dropout(x)
        device = x.device.type
        if torch.is_autocast_enabled(device) and device != "cpu":
            dtype = torch.get_autocast_dtype(device)
            biases = [bias.to(dtype) for bias in biases]  # once, not in the attention of each layer
        for layer, block in enumerate(self.blocks):
            bias = biases[layer % len(biases)]  # its own, or the one that all layers share
            if self.recompute and torch.is_grad_enabled():
                # the second pass restores the random state, so it draws the same dropout
                x = checkpoint(block, x, bias, memory, None, layer, use_reentrant=False)
            else:
                x = block(x, bias, memory, cache, layer)
        return self.dropout(self.norm(x))


# ----------------------------------------------------------------------------- memory and cache
@dataclass
class Memory:
    """What the decoder sees of B sources."""

    kv: list[Tensor]  # per decoder layer: keys and values, (2,B,H,S,D)
    bias: Tensor  # (B,1,1,S): 0 at a source token, MASKED at padding


class Cache:
    """Self-attention keys and values of what N decoder rows have read: at most `room` tokens.

    Its places double when they are used up: most rows end long before the limit.
    """

    def __init__(self, decoder, room):
        self.decoder, self.room = decoder, room
        self.places, self.length = 0, 0  # a token has a place; `length` places are used
        self.kv = {}  # layer: (2,N,H,places,D)

    def extend(self, L):
        """Count L more tokens as read. -> their position biases, (1,H,L,length) each."""
        self.past, self.length = self.length, self.length + L
        if self.length > self.places:
            # 64, if there is room: short outputs are never copied
            self.places = min(self.room, max(64, 2 * self.length))
            self.biases = self.decoder.position_biases(self.places)  # sliced at every step
        return [bias[..., self.past : self.length, : self.length] for bias in self.biases]

    def append(self, layer, kv):
        """Write L new places, return all so far: (2,N,H,L,D) -> (2,N,H,length,D). No gradients."""
        whole = self.kv.get(layer, kv[..., :0, :])
        if whole.size(3) < self.places:
            whole = F.pad(whole, (0, 0, 0, self.places - whole.size(3)))
            self.kv[layer] = whole
        whole[..., self.past : self.length, :] = kv
        return whole[..., : self.length, :]

    def select(self, rows):
        """Reorder the rows: expand B rows to B·K, or follow the surviving beams."""
        for layer, kv in self.kv.items():
            chosen = kv.new_empty(2, len(rows), *kv.shape[2:])
            used = chosen[..., : self.length, :]  # the other places hold nothing yet
            torch.index_select(kv[..., : self.length, :], 1, rows, out=used)
            self.kv[layer] = chosen


# ----------------------------------------------------------------------------- the model
class EncoderDecoder(nn.Module):
    """encode -> Memory; decode -> hidden states; token_logprobs or logits on those."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.encoder, self.decoder = Stack(config, decoder=False), Stack(config, decoder=True)
        if not config.tied:
            self.output = linear(config.width, config.vocab_size)
        self.init_weights()

    def init_weights(self):
        """1/sqrt(fan-in): products have variance 1. T5's own weights are read from its files.

        Our choice: with a tied output, logits and what layers add to the residual stream start at
        0.3 of that. Else the decoder's own input token dominates the logits.
        """
        small = 0.3 if self.config.tied else 1.0
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                factor = small if name.endswith(("out", "down")) else 1.0
                nn.init.normal_(layer.weight, std=factor * layer.in_features**-0.5)
        nn.init.normal_(self.embedding.weight, std=self.config.width**-0.5)
        nn.init.constant_(self.decoder.norm.weight, small)

    def embed(self, tokens, past=0):
        """tokens (N,L), of which the first is at position `past` -> (N,L,E).

        T5's embeddings are sqrt(E) larger and its queries sqrt(D) smaller than `scaled` ones. Its
        optimizer, Adafactor, takes larger steps for larger weights. AdamW's steps are all alike:
        too small for such embeddings, too large for such queries. So from scratch the weights have
        usual sizes, and a factor here and in `attention_scale` makes the same function of them.
        """
        x = self.embedding(tokens)
        if self.config.scaled:
            x = x * self.config.width**0.5
        if self.config.absolute:
            x = x + sinusoids(x, past)
        return x

    def encode(self, source) -> Memory:
        """source (B,S), padded on the right with PAD_ID -> Memory. Every row needs a real token."""
        padding = (source == PAD_ID)[:, None, None] * MASKED  # (B,1,1,S)
        biases = [bias + padding for bias in self.encoder.position_biases(source.size(1))]
        states = self.encoder(self.embed(source), biases)  # (B,S,E)
        kv = [block.cross_attention.project(states) for block in self.decoder.blocks]
        return Memory(kv, padding)

    def decode(self, tokens, memory, cache=None):
        """tokens (N,L), after those in the cache -> hidden states (N,L,E).

        N = B·K rows share the memory of B examples; ValueError if they do not divide. Rows are
        padded on the right only, so the causal mask keeps real tokens from padding.
        """
        if len(tokens) % len(memory.bias):
            raise ValueError(f"{len(tokens)} rows: not a multiple of {len(memory.bias)} examples")
        if cache is None:
            biases = self.decoder.position_biases(tokens.size(1))
            return self.decoder(self.embed(tokens), biases, memory)
        biases = cache.extend(tokens.size(1))  # (1,H,L,past+L)
        # a cached step has a new shape each time: `forward` avoids what compile_stacks compiled
        return self.decoder.forward(self.embed(tokens, cache.past), biases, memory, cache)

    def output_operands(self, hidden):
        """(hidden, weight (V,E)) whose product is the logits."""
        if not self.config.tied:
            return hidden, self.output.weight
        if not self.config.scaled:  # T5 v1.0 scales its large embeddings down for the output
            hidden = hidden * self.config.width**-0.5
        return hidden, self.embedding.weight

    def logits(self, hidden):
        """hidden (...,E) -> logits (...,V) in float32, or in float64 for a float64 model."""
        logits = F.linear(*self.output_operands(hidden))
        return logits if logits.dtype == torch.float64 else logits.float()

    def token_logprobs(self, hidden, targets, *, temperature=1.0, forbidden=None):
        """log softmax(logits / temperature)[targets]: (tokens,E), (tokens,) -> (tokens,).

        In float32, or in float64 for a float64 model. forbidden: ids of probability 0.
        """
        hidden, weight = self.output_operands(hidden)
        if temperature != 1.0:  # dividing hidden divides the logits, and is the smaller tensor
            hidden = hidden / temperature
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # autocast does not reach into an autograd.Function
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        if hidden.dtype == torch.float64:  # the exact tests; all else accumulates in float32
            return plain_token_logprobs(hidden, weight, targets, forbidden)
        return TokenLogProbs.apply(hidden, weight, targets, forbidden)  # a faster form


def plain_token_logprobs(hidden, weight, targets, forbidden=None):
    """log softmax(hidden weightᵀ)[targets]: (tokens,E), (V,E), (tokens,) -> (tokens,).

    The plain form, which makes all (tokens,V) logits. forbidden: ids of probability 0.
    """
    logits = hidden @ weight.T  # (tokens,V)
    log_probs = forbid(logits, forbidden).log_softmax(-1)
    return log_probs.gather(1, targets[:, None]).squeeze(1)  # (tokens,)


def forbid(logits, ids):
    """logits (N,V), in place -inf for these ids. None: for none."""
    return logits if ids is None else logits.index_fill_(1, ids, -torch.inf)


# ----------------------------------------------------------------------------- decoding
@contextmanager
def decoding():
    """No gradients; and in low precision a weight is cast once, not for each token."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(before)
        torch.clear_autocast_cache()


def read_prefix(model, memory, prefix, length, copies):
    """Read prefix (B,prefix) once per example, then copy the rows: cache, hidden (N,E).

    length: how many tokens will be written after it.
    """
    cache = Cache(model.decoder, prefix.size(1) + length)
    hidden = model.decode(prefix, memory, cache)[:, -1]  # (B,E)
    rows = torch.arange(len(prefix), device=prefix.device).repeat_interleave(copies)  # (N,)
    cache.select(rows)
    return cache, hidden[rows]


def draw(probs):
    """probs (N,V), not normalised -> a token of each row, (N,1).

    Inverts the cumulative distribution: the token is the first whose cumulative sum exceeds
    u·sum, u uniform in [0,1). One random number a row; torch.multinomial draws V.
    """
    cdf = probs.cumsum(-1)  # (N,V)
    if cdf.is_cuda:
        # a parallel sum rounds up and down: a token of probability 0 must not be drawn
        cdf = cdf.masked_fill_(probs == 0, 0.0).cummax(-1).values
    # a little less than 1: u·sum must stay below the sum after rounding, too
    u = torch.rand(len(cdf), 1, device=cdf.device, dtype=cdf.dtype) * (1 - 2**-20)
    token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
    return token.clamp(max=probs.size(1) - 1)  # clamp: if the sum is nan, none is found


@decoding()
def sample_tokens(model, memory, prefix, length, *, samples=1, temperature=1.0, forbidden=None):
    """Write `length` tokens after prefix (B,prefix): (B,K,length).

    K = samples independent draws per example. temperature 0 is greedy. No top-k or top-p: a policy
    gradient is only right if we sample from exactly the distribution that `token_logprobs` scores.
    """
    cache, hidden = read_prefix(model, memory, prefix, length, samples)  # hidden (N,E)
    tokens = []
    for t in range(length):
        if t > 0:
            hidden = model.decode(tokens[-1], memory, cache)[:, -1]
        hidden = hidden / (temperature or 1.0)  # divides the logits, too, and is smaller
        logits = forbid(model.logits(hidden), forbidden)  # (N,V)
        probs = logits.sub_(logits.amax(-1, keepdim=True)).exp_()  # (N,V), not normalised
        token = draw(probs) if temperature else probs.argmax(-1, keepdim=True)
        tokens.append(token)  # (N,1)
    return torch.cat(tokens, 1).view(-1, samples, length)


def candidates(logits, scores):
    """The best 2n ways to go on from n open beams, best first.

    logits (B·n,V), overwritten; scores (B,n) -> new scores, the beam that goes on, its next token:
    (B,2n) each.
    """
    B, n = scores.shape
    V = logits.size(1)
    log_probs = logits.sub_(logits.logsumexp(-1, keepdim=True))
    all_sums = log_probs.add_(scores.view(-1, 1)).view(B, n * V)
    sums, index = all_sums.topk(2 * n, -1)  # (B,2n)
    return sums, index // V, index % V


@decoding()
def beam_search(model, memory, prefix, length, *, beams=4, length_penalty=1.0, forbidden=None):
    """The n = beams best continuations of prefix (B,prefix): tokens (B,n,length), scores (B,n).

    Padded after </s>. One beam is greedy decoding.

    score = sum of log-probs / (tokens written, </s> included) ** length_penalty, best first. Each
    step looks at 2n candidates, so that n stay open when some end. An example stops when its best
    open beam, at its present length, cannot beat its worst finished one.
    """
    B, n = len(prefix), beams
    device = prefix.device
    cache, hidden = read_prefix(model, memory, prefix, length, n)  # hidden (B·n,E)
    example = torch.arange(B, device=device)[:, None]  # (B,1)
    tokens = prefix.new_full((B, n, length), PAD_ID)  # open beams
    scores = torch.full((B, n), MASKED, device=device)  # of open beams: sums of log-probs
    ended, ended_scores = tokens, scores.clone()  # finished beams
    scores[:, 0] = 0.0  # all beams are alike at first: count only one
    running = torch.ones_like(example, dtype=torch.bool)  # (B,1)
    for t in range(length):
        logits = forbid(model.logits(hidden), forbidden)  # (B·n,V)
        sums, beam, token = candidates(logits, scores)  # (B,2n) each
        grown = tokens[example, beam]  # (B,2n,length)
        grown[..., t] = token
        ends = (token == EOS_ID) | (t + 1 == length)
        normaliser = (t + 1) ** length_penalty

        # finished: those among the best n that end here, while the example runs
        final = (sums / normaliser).masked_fill(~ends | ~running, MASKED)[:, :n]
        ended_scores, keep_ended = torch.cat([ended_scores, final], 1).topk(n, -1)
        ended = torch.cat([ended, grown[:, :n]], 1)[example, keep_ended]
        # open: the best n that do not end
        scores, keep_open = sums.masked_fill(ends, MASKED).topk(n, -1)
        tokens = grown[example, keep_open]
        running = running & (scores[:, :1] / normaliser > ended_scores[:, -1:])
        if t + 1 == length or all_true(~running, t):
            break
        if n > 1:
            survivors = example * n + beam[example, keep_open]  # (B,n): their cache rows
            cache.select(survivors.view(-1))
        hidden = model.decode(tokens[:, :, t].reshape(-1, 1), memory, cache)[:, -1]
    return ended, ended_scores


# ===== plumbing: for fast paths; sizes; errors; device, draws, precision, compile; checkpoints
def copy_memory(memory, examples) -> Memory:
    """examples (n,) -> the memory of n decoder rows, each with a copy of its example's."""
    kv = [kv.index_select(1, examples) for kv in memory.kv]
    return Memory(kv, memory.bias[examples])


def cpu_dropout(x, p):
    """`Dropout` for the CPU. torch draws a random float per element; a random byte decides as well.

    With torch's dropout an SFT step (size small) takes 1.12 to 1.22 times as long.
    """
    dropped = round(p * 256)  # of the 256 values of a byte
    draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    draws = draws.view(torch.uint8)[: x.numel()].view(x.shape)  # eight bytes from each draw
    kept = draws.to(x.dtype).ge_(dropped)  # 0 or 1
    return x * kept.mul_(256 / (256 - dropped))


CHUNK = 2**26  # most numbers in the logits that are made at once: 256 MiB of float32
KEPT = 3 * CHUNK  # most numbers that are kept for the backward pass: 768 MiB


class TokenLogProbs(torch.autograd.Function):
    """`plain_token_logprobs`, a chunk of tokens at a time.

    Autograd would keep logits and log-probs, each tokens x V, until the backward pass. Here one
    buffer a chunk is overwritten: logits, then exp(logits - max), then their gradient. If all
    chunks are too large to keep, each is computed again in the backward pass. With the plain form a
    warmup step (size small) takes 1.02 to 1.3 times as long, as the machine has it, and the loss at
    mT5's V 15 times the memory.
    """

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        hidden, weight, targets, _ = inputs
        ctx.chunk = max(1, CHUNK // len(weight))  # tokens
        ctx.kept = {}
        log_probs = hidden.new_empty(len(targets), dtype=torch.float32)  # (tokens,)
        for at in range(0, len(targets), ctx.chunk):
            rows = slice(at, at + ctx.chunk)
            log_probs[rows], *kept = one_chunk(rows, *inputs)
            if len(targets) * len(weight) <= KEPT:
                ctx.kept[at] = kept
            del kept  # before the next chunk is made
        return log_probs

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, _ = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # many chunks add up: float32
        for at in range(0, len(targets), ctx.chunk):
            rows = slice(at, at + ctx.chunk)
            # not kept, or overwritten by an earlier backward pass: computed again
            exps, total = ctx.kept.pop(at, None) or one_chunk(rows, *ctx.saved_tensors)[1:]
            # d log p / d logits = onehot - softmax, times the incoming gradient g
            g = grad[rows, None]  # (n,1)
            d = exps.mul_(-g / total)  # (n,V)
            d = d.scatter_add_(1, targets[rows, None], g).to(weight.dtype)
            grad_hidden[rows] = d @ weight  # (n,E)
            if d.dtype == torch.float32:
                torch.addmm(grad_weight, d.T, hidden[rows], out=grad_weight)  # (V,E), in place
            else:
                grad_weight += d.T @ hidden[rows]
            del exps, d  # before the next chunk is made
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def one_chunk(rows, hidden, weight, targets, forbidden):
    """n tokens: log-probs (n,), exp(logits - max) (n,V), and its row sums (n,1)."""
    logits = forbid((hidden[rows] @ weight.T).float(), forbidden)  # (n,V)
    top = logits.amax(-1, keepdim=True)
    picked = logits.gather(1, targets[rows, None])  # (n,1). First: the next line overwrites logits
    exps = logits.sub_(top).exp_()
    total = exps.sum(-1, keepdim=True)
    return (picked - top - total.log()).squeeze(1), exps, total


SIZES = {
    "toy": dict(
        width=64,
        head_size=16,
        ff=256,
        encoder_layers=0,
        decoder_layers=1,
        tied=False,
        absolute=False,
    ),
    "puzzle": dict(width=64, head_size=16, ff=256, encoder_layers=3, decoder_layers=1, tied=False),
    "nano": dict(width=64, heads=2, head_size=32, ff=256, encoder_layers=2, decoder_layers=2),
    "tiny": dict(width=192, heads=6, head_size=32, ff=512, encoder_layers=3, decoder_layers=3),
    "small": dict(),  # the defaults above
    "t5-small": dict(width=512, heads=8, ff=2048, encoder_layers=6, decoder_layers=6),
    "t5-base": dict(width=768, heads=12, ff=3072, encoder_layers=12, decoder_layers=12),
}


class UserError(Exception):
    """Something that the user can mend. Printed as one line, exit code 1, no traceback."""


def one_line(text):
    """Line ends and runs of spaces become one space."""
    return " ".join(text.split())


def pick_device(name, threads=0):
    """Set torch up for a device, and return it. auto: CUDA, else the CPU.

    threads: of the CPU; 0: torch's choice. Under torchrun each process has its own GPU. UserError
    if there are too few.
    """
    if threads:
        torch.set_num_threads(threads)
    number = int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun
    gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name == "cuda":
        if number >= gpus:
            raise UserError("torch finds no cuda device for this process: choose another --device")
        torch.cuda.set_device(number)
        # cuDNN's attention plans anew for each shape, and no two batches are alike
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


@contextmanager
def own_draws(device, *seed):
    """Within, random draws depend on these numbers and words alone.

    Afterwards torch's generators are as they were, the device's, too.
    """
    gpu = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(gpu, device_type=device.type):
        torch.manual_seed(random.Random(repr(seed)).getrandbits(63))
        yield


def low_precision(dtype, device):
    """Whether matrix products are in bfloat16. auto: on a GPU that has it.

    Older GPUs, such as T4 and V100, emulate it, slower than float32.
    """
    if dtype == "auto" and device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return dtype == "bfloat16"


def precision(dtype, device):
    """Matrix products in bfloat16 or float32, by --dtype. Weights stay float32."""
    low = low_precision(dtype, device)
    # no cache of cast weights: sampling would fill it without gradients, and scoring would use it
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=low, cache_enabled=False)


def all_true(done, step):
    """Whether decoding may stop. To look makes the host wait for a GPU: only at each 8th step."""
    return (step % 8 == 7 or not done.is_cuda) and bool(done.all())


def compile_stacks(model):
    """torch.compile of encoder and decoder, with dynamic shapes: no two batches are alike."""
    # graphs: with gradients or not, with dropout or not, and where a length is 1 or two are equal
    torch._dynamo.config.cache_size_limit = 32  # newer torch: an alias of recompile_limit
    model.encoder.compile(dynamic=True)
    model.decoder.compile(dynamic=True)


# ----------------------------------------------------------------------------- our checkpoints
FORMAT = "warmup checkpoint 7"


def write_file(path, save):
    """save(temporary path), then rename: `path` holds the old or the new, whole, whatever comes."""
    temporary = Path(f"{path}.tmp")
    try:
        save(temporary)
        with open(temporary, "r+b") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}. Mend it, then go on by --resume") from None


def save_checkpoint(path, model, **more):
    """The model and more, as a file that load_checkpoint reads."""
    content = {"format": FORMAT, "config": asdict(model.config), "model": model.state_dict()}
    write_file(path, lambda temporary: torch.save(content | more, temporary))


def load_checkpoint(path, part="model"):
    """What save_checkpoint wrote. UserError for any other file, and if it lacks this part."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"{damaged} is damaged")
        content = dict(torch.load(path, map_location="cpu", weights_only=True))
        if content["format"] != FORMAT or part not in content:
            raise ValueError(f"no {part} of this version of the program: train it again")
        return content
    except Exception as error:  # torch raises a zoo of types for broken and for unsafe files
        raise UserError(
            f"cannot read the checkpoint {path} "
            f"({type(error).__name__}: {one_line(str(error))[:200]})"
        ) from None


def load_model(path, tokenizer, device) -> EncoderDecoder:
    """The model of a checkpoint, if it fits the tokenizer."""
    checkpoint = load_checkpoint(path)
    model = empty_model(ModelConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"], assign=True)
    if model.config.vocab_size != tokenizer.get_vocab_size():
        raise UserError(f"{path} does not fit the tokenizer.json beside it: they are of two runs")
    return model.to(device).eval()


def empty_model(config) -> EncoderDecoder:
    """A model of shapes without memory: load_state_dict(…, assign=True) makes weights of it."""
    with torch.device("meta"):
        return EncoderDecoder(config)


# ----------------------------------------------------------------------------- T5's checkpoints
T5_SIZES = {  # in config.json: our name
    "vocab_size": "vocab_size",
    "d_model": "width",
    "num_heads": "heads",
    "d_kv": "head_size",
    "d_ff": "ff",
    "num_layers": "encoder_layers",
    "num_decoder_layers": "decoder_layers",
    "relative_attention_num_buckets": "buckets",
    "relative_attention_max_distance": "max_distance",
}
T5_FIXED = {  # of all T5s
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def t5_config(settings) -> ModelConfig:
    """Hugging Face's config.json of a T5 v1.0, v1.1, Flan-T5, mT5, umT5 or byT5. Else UserError."""
    # null is as good as nothing, and some defaults are not written
    settings = {name: value for name, value in settings.items() if value is not None}
    family = settings.get("model_type")
    if family not in ("t5", "mt5", "umt5"):
        raise UserError(f"a model of type {family!r} is not a T5: we read t5, mt5 and umt5")
    dense = "gated-gelu" if settings.get("is_gated_act") else settings.get("dense_act_fn", "relu")
    usual = T5_FIXED | {
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "tie_word_embeddings": True,
        "dropout_rate": 0.1,
        "num_decoder_layers": settings.get("num_layers"),
        "feed_forward_proj": dense,
    }
    settings = usual | settings

    def refuse(name):
        raise UserError(f"config.json has {name} = {settings.get(name)!r}, which no T5 has")

    for name, value in T5_FIXED.items():
        if settings[name] != value:
            refuse(name)
    sizes = {}
    for name, ours in T5_SIZES.items():
        least = 4 if name.endswith("buckets") else 1
        most = 1000 if name.endswith("layers") else 2**20  # more would fill the memory with names
        value = settings.get(name)
        if type(value) is not int or not least <= value <= most:
            refuse(name)
        sizes[ours] = value
    if sizes["max_distance"] < sizes["buckets"]:
        refuse("relative_attention_max_distance")
    if settings["feed_forward_proj"] not in ("relu", "gated-gelu"):
        refuse("feed_forward_proj")

    # transformers 5 writes tie_word_embeddings = true for all, and the truth under another name
    tied = settings.get("scale_decoder_outputs", settings["tie_word_embeddings"])
    return ModelConfig(
        **sizes,
        gated=settings["feed_forward_proj"] == "gated-gelu",
        tied=tied and family != "mt5",
        shared_bias=family != "umt5",
        scaled=False,
        absolute=False,
        dropout=settings["dropout_rate"],
    )


T5_PARTS = {  # of a block: the tensors, each behind T5's number of its part
    "self_attention.qkv": "0.SelfAttention.q 0.SelfAttention.k 0.SelfAttention.v",
    "self_attention.out": "0.SelfAttention.o",
    "self_norm": "0.layer_norm",
    "cross_attention.q": "1.EncDecAttention.q",
    "cross_attention.kv": "1.EncDecAttention.k 1.EncDecAttention.v",
    "cross_attention.out": "1.EncDecAttention.o",
    "cross_norm": "1.layer_norm",
    "feed_forward.up": "2.DenseReluDense.wi",
    "feed_forward.down": "2.DenseReluDense.wo",
    "ff_norm": "2.layer_norm",
}


def t5_tensors(name, config):
    """Our parameter -> the Hugging Face tensors that it holds, stacked along dim 0."""
    if name == "embedding.weight":
        return ["shared.weight"]
    if name == "output.weight":
        return ["lm_head.weight"]
    stack, kind, *rest = name.removesuffix(".weight").split(".", 3)
    if kind == "norm":
        return [f"{stack}.final_layer_norm.weight"]
    block = f"{stack}.block.{rest[0]}.layer"
    if kind == "biases":
        return [f"{block}.0.SelfAttention.relative_attention_bias.weight"]
    tensors = T5_PARTS[rest[1]]
    if config.gated:
        tensors = tensors.replace("wi", "wi_0 2.DenseReluDense.wi_1")  # wi_0 is the gate
    if stack == "encoder":
        tensors = tensors.replace("2.", "1.")  # there is no cross-attention before it
    return [f"{block}.{tensor}.weight" for tensor in tensors.split()]


def pretrained_folder(init):
    """The folder itself, or where the hub's files of that name lie once they are downloaded."""
    if Path(init).is_dir():
        return Path(init)
    from huggingface_hub import snapshot_download  # comes with tokenizers

    kinds = ["pytorch_model*.bin"]  # a repository has one of the two kinds, or both
    if find_spec("safetensors"):
        kinds.insert(0, "model*.safetensors")
    try:
        for pattern in kinds:
            files = ["*.json", "spiece.model", pattern]
            folder = Path(snapshot_download(init, allow_patterns=files))
            if list(folder.glob(pattern)):
                break
        return folder
    except Exception as error:  # the hub, its HTTP library and the cache raise a zoo of types
        raise UserError(
            f"{init}: no folder here, and the hub did not give it ({type(error).__name__})"
        ) from None


def read_json(path):
    """A JSON object. UserError if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) | {}  # TypeError if it is no object
    except Exception as error:
        raise UserError(f"cannot read {path} as a JSON object: {error}") from None


def read_weights(folder):
    """All tensors of model*.safetensors, else of pytorch_model*.bin: one file, or shards."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(
            f"{folder} holds no pytorch_model.bin and no model.safetensors. The latter is "
            "downloaded only after: pip install safetensors"
        )
    tensors = {}
    for path in files:
        try:
            if path.suffix == ".bin":
                tensors |= torch.load(path, map_location="cpu", weights_only=True)
            else:
                from safetensors.torch import load_file

                tensors |= load_file(path)
        except ImportError:
            raise UserError(f"to read {path.name}: pip install safetensors") from None
        except Exception as error:  # torch and safetensors raise a zoo of types
            raise UserError(f"{path} is damaged ({type(error).__name__})") from None
    return tensors


def untangle(tensors, config, settings) -> ModelConfig:
    """Remove copies and leftovers from tensors, in place. -> config, with the files' own `tied`.

    ValueError if two tensors differ that are one in a T5.
    """
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        copy = tensors.pop(name, None)
        if copy is not None and not torch.equal(copy, tensors.setdefault("shared.weight", copy)):
            raise ValueError(f"{name} differs from shared.weight: in a T5 they are one")
    # nothing ever read this tensor of files from 2019
    tensors.pop("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", None)
    embedding = tensors["shared.weight"]
    if config.tied:
        head = tensors.pop("lm_head.weight", embedding)
        if not torch.equal(head, embedding):
            # umT5 scales its output without tying it: fold the scale into the weight
            config = replace(config, tied=False)
            tensors["lm_head.weight"] = head.float() * config.width**-0.5
    elif settings.get("tie_word_embeddings"):
        # transformers 5 ties a v1.1 or mT5 that it makes new, without scaling
        tensors.setdefault("lm_head.weight", embedding)
    return config


def load_pretrained(init, **changes) -> EncoderDecoder:
    """A T5 in float32 from a Hugging Face folder or hub name.

    changes: ModelConfig fields, such as dropout. Every tensor is used or named in a UserError, but
    for what `untangle` removes.
    """
    folder = pretrained_folder(init)
    settings = read_json(folder / "config.json")
    config = replace(t5_config(settings), **changes)
    tensors = read_weights(folder)
    weights = {}
    try:
        config = untangle(tensors, config, settings)
        model = empty_model(config)
        for ours in model.state_dict():
            theirs = t5_tensors(ours, config)
            weights[ours] = torch.cat([tensors.pop(name) for name in theirs]).float()
            if not weights[ours].isfinite().all():
                raise ValueError(f"{theirs[0]} holds numbers that are not finite")
        if tensors:
            raise ValueError(f"it also holds {', '.join(sorted(tensors)[:3])}")
        model.load_state_dict(weights, assign=True)
        return model
    except Exception as error:
        wrong = f"it lacks {error}" if isinstance(error, KeyError) else one_line(str(error))[:250]
        raise UserError(f"{folder} is not what its config.json says: {wrong}") from None


def save_pretrained(model, folder):
    """Write config.json and pytorch_model.bin that transformers loads, to the same logits."""
    config = model.config
    if config.scaled or config.absolute:
        raise UserError("only --init runs export: a T5 has neither our scaling nor our positions")
    tensors = {}
    for ours, whole in model.state_dict().items():
        theirs = t5_tensors(ours, config)
        if ours == "output.weight" and not config.shared_bias:
            whole = whole * config.width**0.5  # transformers 5 scales umT5's untied output, too
        parts = [part.clone().cpu() for part in whole.chunk(len(theirs))]
        tensors |= zip(theirs, parts)

    kind = "t5" if config.shared_bias else "umt5"
    settings = {theirs: getattr(config, ours) for theirs, ours in T5_SIZES.items()}
    settings |= T5_FIXED | {
        "model_type": kind,
        "architectures": [f"{kind.upper()}ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "dropout_rate": config.dropout,
        "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        "tie_word_embeddings": config.tied or not config.shared_bias,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    torch.save(tensors, folder / "pytorch_model.bin")
