"""The model: an encoder-decoder transformer with T5's architecture, written out by hand.

Nothing here knows of warmups, tasks or training. One shape alphabet for the whole codebase:

    B batch            S source length    T target length    W warmup length
    K warmups/example  H heads            D head size        V vocabulary
    E model width      L decoder length   N = B*K decoder rows, the K of an example adjacent

T5's oddities, each marked where it happens: RMSNorm without mean or bias, no biases in linear
layers, positions only as a learned bias on attention scores, the pad id as decoder start.
"""

import argparse, difflib, json, math, os, re, shlex, sys
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    pad_id: int = 0  # also the decoder's start token: T5 has no other
    eos_id: int = 1

    def __post_init__(self):
        """ValueError for a size that no model has: some configs are read from files."""
        least = {
            "encoder_layers": 0,
            "decoder_layers": 0,
            "pad_id": 0,
            "eos_id": 0,
            "buckets": 4,
            "max_distance": self.buckets,
        }
        for f in fields(self):
            value, most = getattr(self, f.name), 1000 if "layers" in f.name else 2**20
            if f.type is int and not (type(value) is int and least.get(f.name, 1) <= value <= most):
                raise ValueError(f"{f.name} = {value!r}")

    @property
    def inner(self) -> int:
        return self.heads * self.head_size

    @property
    def attention_scale(self) -> float:
        """1 for T5, which does not divide by sqrt(D): its query weights are smaller instead."""
        return self.head_size**-0.5 if self.scaled else 1.0


SIZES = {
    "toy": dict(
        width=64,
        heads=4,
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


# ----------------------------------------------------------------------------- building blocks
def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    """softmax(scale q kᵀ + bias) v: (B,H,L,D), (B,H,S,D) x2 -> (B,H,L,D), fused where torch can.

    bias, broadcast to (B,H,L,S), holds position bias and masks. scale is 1 for T5. No dropout of
    attention weights: our choice, the fused CPU kernel has none."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # torch 2.13: fused is 5x slower
        return plain_attention(q, k, v, bias, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    """The same in plain algebra. Tests hold `attention` to it, forward and backward."""
    scores = scale * (q @ k.transpose(-1, -2)) + bias  # (B,H,L,S)
    return scores.softmax(-1).to(v.dtype) @ v


def split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """(N,L,parts·H·D) -> (parts,N,H,L,D)."""
    return x.view(*x.shape[:2], parts, heads, -1).permute(2, 0, 3, 1, 4)


def rms_norm(config: ModelConfig) -> nn.RMSNorm:
    """x / sqrt(mean(x²) + 1e-6) * weight: T5's layer norm subtracts no mean and adds no bias."""
    return nn.RMSNorm(config.width, eps=1e-6)


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.scale = config.heads, config.attention_scale
        self.qkv = nn.Linear(config.width, 3 * config.inner, bias=False)  # one product, not three
        self.out = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x: Tensor, bias: Tensor, cache: "Cache | None", layer: int) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.heads)  # (N,H,L,D) each
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (N,H,past+L,D)
        mixed = attention(q, k, v, bias, self.scale)  # (N,H,L,D)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (N,L,E)


class CrossAttention(nn.Module):
    """The decoder's look at the source. Keys and values are projected once per example.

    Cross-attention has no causal structure, so an example's K warmups may stand side by side on
    the query axis: queries (B,H,K·L,D) against ONE copy of keys (B,H,S,D). Nothing is repeated."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.scale = config.heads, config.attention_scale
        self.q = nn.Linear(config.width, config.inner, bias=False)
        self.kv = nn.Linear(config.width, 2 * config.inner, bias=False)
        self.out = nn.Linear(config.inner, config.width, bias=False)

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states (B,S,E) -> keys and values, (B,H,S,D) each."""
        return split_heads(self.kv(states), 2, self.heads).unbind()

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        N, L, _ = x.shape
        B = len(kv[0])
        q = self.q(x).view(B, N // B * L, self.heads, -1).transpose(1, 2)  # (B,H,K·L,D)
        mixed = attention(q, *kv, bias, self.scale)  # (B,H,K·L,D)
        return self.out(mixed.transpose(1, 2).reshape(N, L, -1))  # (N,L,E)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gated = config.gated
        self.up = nn.Linear(config.width, config.ff * (2 if config.gated else 1), bias=False)
        self.down = nn.Linear(config.ff, config.width, bias=False)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.down(self.dropout(F.relu(self.up(x))))
        gate, x = self.up(x).chunk(2, dim=-1)
        return self.down(self.dropout(F.gelu(gate, approximate="tanh") * x))


class Block(nn.Module):
    """Self-attention, cross-attention (decoder), feed-forward; each x + dropout(f(norm(x)))."""

    def __init__(self, config: ModelConfig, decoder: bool):
        super().__init__()
        self.self_attention, self.self_norm = SelfAttention(config), rms_norm(config)
        if decoder:
            self.cross_attention, self.cross_norm = CrossAttention(config), rms_norm(config)
        self.feed_forward, self.ff_norm = FeedForward(config), rms_norm(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x, bias, memory=None, cache=None, layer=0) -> Tensor:
        x = x + self.dropout(self.self_attention(self.self_norm(x), bias, cache, layer))
        if memory is not None:
            seen = self.cross_attention(self.cross_norm(x), memory.kv[layer], memory.bias)
            x = x + self.dropout(seen)
        return x + self.dropout(self.feed_forward(self.ff_norm(x)))


class PositionBias(nn.Module):
    """T5's only notion of position: a learned number per head and distance (Raffel et al. §2.1).

    Half of the buckets hold one distance each; the others grow logarithmically to max_distance.
    The encoder looks both ways and splits its buckets by sign. The decoder looks back only."""

    def __init__(self, config: ModelConfig, bidirectional: bool):
        super().__init__()
        self.bidirectional = bidirectional
        self.buckets, self.max_distance = config.buckets, config.max_distance
        self.weight = nn.Parameter(torch.zeros(config.buckets, config.heads))
        self.kept = None  # the longest table so far

    def bucket(self, distance: Tensor) -> Tensor:
        """distance = key position - query position, any shape -> bucket index, same shape."""
        n, offset = self.buckets, torch.zeros_like(distance)
        if self.bidirectional:
            n //= 2
            offset = (distance > 0).long() * n
        distance = distance.abs() if self.bidirectional else (-distance).clamp(min=0)
        exact = n // 2  # distances below have a bucket each
        ratio = torch.log(distance.clamp(min=1).float() / exact)
        far = exact + (ratio / math.log(self.max_distance / exact) * (n - exact)).long()
        return offset + torch.where(distance < exact, distance, far.clamp(max=n - 1))

    def table(self, length: int) -> Tensor:
        """Buckets by query and key, of at least (length,length) places. The largest: the future."""
        device = self.weight.device
        if self.kept is None or len(self.kept) < length or self.kept.device != device:
            at = torch.arange(-(-length // 64) * 64, device=device)
            distance = at[None, :] - at[:, None]
            future = (distance > 0) & (not self.bidirectional)
            self.kept = self.bucket(distance).masked_fill(future, self.buckets)
        return self.kept

    def forward(self, length: int) -> Tensor:
        table = self.table(length)
        weight = F.pad(self.weight, (0, 0, 0, 1), value=MASKED)  # (buckets+1,H)
        bias = weight[table[:length, :length]]  # (L,L,H)
        # contiguous: CUDA's fused kernels ask for such a mask
        return bias.permute(2, 0, 1).unsqueeze(0).contiguous()  # (1,H,L,L)


@lru_cache(maxsize=8)  # a long decoding asks for one length after the other
def sinusoids(length: int, width: int, device) -> Tensor:
    """(length,width): sin, cos of positions at wavelengths 2π to 20,000π (Vaswani et al. §3.5)."""
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))
    angle = torch.arange(length, device=device)[:, None] * rate  # (length,width/2)
    return torch.cat([angle.sin(), angle.cos()], -1)


class Stack(nn.Module):
    """All blocks of the encoder or the decoder, with the biases they share and a final norm."""

    def __init__(self, config: ModelConfig, decoder: bool):
        super().__init__()
        layers = config.decoder_layers if decoder else config.encoder_layers
        biases = 1 if config.shared_bias else layers
        self.blocks = nn.ModuleList(Block(config, decoder) for _ in range(layers))
        self.biases = nn.ModuleList(PositionBias(config, not decoder) for _ in range(biases))
        self.norm, self.dropout = rms_norm(config), Dropout(config.dropout)
        self.recompute = False  # True: keep a block's input only; backward computes the rest again

    def position_biases(self, length: int) -> list[Tensor]:
        """One (1,H,L,L) per layer, or a single one that all layers share; causal in the decoder."""
        return [bias(length) for bias in self.biases]

    def forward(self, x: Tensor, biases: list[Tensor], memory=None, cache=None) -> Tensor:
        x = self.dropout(x)
        if torch.is_autocast_enabled(x.device.type) and x.device.type != "cpu":
            dtype = torch.get_autocast_dtype(x.device.type)
            biases = [bias.to(dtype) for bias in biases]  # once, not in the attention of each layer
        for layer, block in enumerate(self.blocks):
            bias = biases[layer if len(biases) > 1 else 0]
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

    kv: list[tuple[Tensor, Tensor]]  # per decoder layer: keys and values, (B,H,S,D) each
    bias: Tensor  # (B,1,1,S): 0 at a source token, MASKED at padding

    def select(self, examples: Tensor) -> "Memory":
        """examples (n,) -> the memory of n decoder rows, each with a copy of its example's."""
        kv = [(k.index_select(0, examples), v.index_select(0, examples)) for k, v in self.kv]
        return Memory(kv, self.bias[examples])


class Cache:
    """Self-attention keys and values of what N decoder rows have read: at most `room` tokens.

    Its places double when they are used up: most rows end long before the limit."""

    def __init__(self, model: "EncoderDecoder", room: int):
        self.decoder = model.decoder
        self.kv = [None] * len(model.decoder.blocks)  # (N,2,H,places,D) each, made on first use
        self.other = list(self.kv)  # `select` copies there, then the two swap
        self.room, self.places, self.length = room, 0, 0

    def reserve(self, end: int) -> list[Tensor]:
        """See to it that `end` tokens have a place. -> the position biases of all places."""
        if end > self.places:
            self.places = min(self.room, max(64, 2 * end))
            self.biases = self.decoder.position_biases(self.places)  # sliced at every step
        return self.biases

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write L new places, return all so far: (N,H,L,D) x2 -> (N,H,length+L,D) x2."""
        N, H, L, D = k.shape
        kv, end = self.kv[layer], self.length + L
        if kv is None or kv.size(3) < self.places:
            grown = k.new_empty(N, 2, H, self.places, D)
            if kv is not None:
                grown[:, :, :, : self.length] = kv[:, :, :, : self.length]
            self.kv[layer] = kv = grown
        kv[:, 0, :, self.length : end] = k
        kv[:, 1, :, self.length : end] = v
        return kv[:, 0, :, :end], kv[:, 1, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep these rows in this order: expand B rows to B·K, or follow the surviving beams."""
        for layer, kv in enumerate(self.kv):
            other = self.other[layer]
            if other is None or other.shape[1:] != kv.shape[1:] or len(other) != len(rows):
                other = kv.new_empty(len(rows), *kv.shape[1:])
            used = other[:, :, :, : self.length]  # the other places hold nothing yet
            torch.index_select(kv[:, :, :, : self.length], 0, rows, out=used)
            self.kv[layer], self.other[layer] = other, kv


# ----------------------------------------------------------------------------- the model
class EncoderDecoder(nn.Module):
    """encode -> Memory; decode -> hidden states; token_logprobs or logits on those."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.encoder, self.decoder = Stack(config, decoder=False), Stack(config, decoder=True)
        if not config.tied:
            self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """1/sqrt(fan-in), as T5: products have variance 1. Unscaled queries are sqrt(D) smaller.

        Our choice: with a tied output, logits and what layers add to the residual stream start at
        0.3 of that. Else the decoder's own input token dominates the logits."""
        config, small = self.config, 0.3 if self.config.tied else 1.0
        shrink = config.head_size**-0.5 / config.attention_scale  # 1, or T5's 1/sqrt(D)
        wide = config.width**-0.5
        std = {"qkv": wide, "q": shrink * wide, "kv": wide, "up": wide}
        std |= {"out": small * config.inner**-0.5, "down": small * config.ff**-0.5}
        for name, parameter in self.named_parameters():
            layer = name.split(".")[-2]
            if layer in std:
                nn.init.normal_(parameter, std=std[layer])
            if layer == "qkv":
                parameter.data[: config.inner] *= shrink
        nn.init.normal_(self.embedding.weight, std=wide if config.scaled else 1.0)
        if config.tied:
            nn.init.constant_(self.decoder.norm.weight, small)
        else:
            nn.init.normal_(self.output.weight, std=small * wide)

    def embed(self, tokens: Tensor, past: int = 0) -> Tensor:
        """tokens (N,L), of which the first is at position `past` -> (N,L,E).

        T5's embeddings are sqrt(E) larger and its queries sqrt(D) smaller than `scaled` ones: its
        optimizer, Adafactor, takes steps in proportion to a weight's size. AdamW's steps are all
        alike. It would leave such embeddings behind and make attention scores jump. So from
        scratch a factor here and in `attention_scale` stands for the difference."""
        x = self.embedding(tokens)
        if self.config.scaled:
            x = x * self.config.width**0.5
        if self.config.absolute:
            end = past + tokens.size(1)
            places = sinusoids(-(-end // 64) * 64, self.config.width, x.device)  # few to keep
            x = x + places[past:end].to(x.dtype)  # (L,E)
        return x

    def encode(self, source: Tensor) -> Memory:
        """source (B,S), padded on the right with pad_id -> Memory. Every row needs a real token."""
        padding = (source == self.config.pad_id)[:, None, None, :] * MASKED  # (B,1,1,S)
        biases = [bias + padding for bias in self.encoder.position_biases(source.size(1))]
        states = self.encoder(self.embed(source), biases)  # (B,S,E)
        kv = [block.cross_attention.project(states) for block in self.decoder.blocks]
        return Memory(kv, padding)

    def decode(self, tokens: Tensor, memory: Memory, cache: Cache | None = None) -> Tensor:
        """tokens (N,L), after those in the cache -> hidden states (N,L,E).

        N = B·K rows share the memory of B examples; ValueError if they do not divide. Rows are
        padded on the right only, so the causal mask keeps real tokens from padding."""
        L, past = tokens.size(1), cache.length if cache else 0
        if len(tokens) % len(memory.bias):
            raise ValueError(f"{len(tokens)} rows: not a multiple of {len(memory.bias)} examples")
        biases = cache.reserve(past + L) if cache else self.decoder.position_biases(L)
        biases = [bias[:, :, past : past + L, : past + L] for bias in biases]  # (1,H,L,past+L)
        # a cached step has a new shape each time: `forward` avoids what compile_stacks compiled
        decoder = self.decoder.forward if cache else self.decoder
        hidden = decoder(self.embed(tokens, past), biases, memory, cache)  # (N,L,E)
        if cache:
            cache.length += L
        return hidden

    def output_layer(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden, weight (V,E)) whose product is the logits."""
        if not self.config.tied:
            return hidden, self.output.weight
        if not self.config.scaled:  # T5 v1.0 scales its large embeddings down for the output
            hidden = hidden * self.config.width**-0.5
        return hidden, self.embedding.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (...,E) -> logits (...,V) in float32, or in float64 for a float64 model."""
        logits = F.linear(*self.output_layer(hidden))
        return logits if logits.dtype == torch.float64 else logits.float()

    def token_logprobs(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        temperature: float = 1.0,
        forbidden: Tensor | None = None,
        chunk: int = 0,
    ) -> Tensor:
        """log softmax(logits / temperature)[targets]: (tokens,E), (tokens,) -> (tokens,), float32.

        forbidden: ids of probability 0. chunk: tokens whose logits are held at once; 0: 256 MiB's.
        """
        hidden, weight = self.output_layer(hidden)
        if temperature != 1.0:
            hidden = hidden / temperature
        if torch.is_autocast_enabled(hidden.device.type):  # blind to an autograd.Function
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        if hidden.dtype == torch.float64:  # the exact tests; all else accumulates in float32
            return plain_token_logprobs(hidden, weight, targets, forbidden)
        chunk = chunk or max(1, 2**26 // len(weight))
        return _TokenLogProbs.apply(hidden, weight, targets, forbidden, chunk)


# ----------------------------------------------------------------------------- decoding
def read_prefix(model, memory: Memory, prefix: Tensor, room: int, copies: int):
    """Read prefix (B,P) once per example, then copy the rows: cache, hidden (B·copies,E)."""
    cache = Cache(model, prefix.size(1) + room)
    hidden = model.decode(prefix, memory, cache)[:, -1]  # (B,E)
    rows = torch.arange(len(prefix), device=prefix.device).repeat_interleave(copies)  # (N,)
    cache.select(rows)
    return cache, hidden[rows]


def draw(probs: Tensor) -> tuple[Tensor, Tensor]:
    """probs (N,V), not normalised -> a token of each row and the row's sum, (N,1) both.

    Inverts the cumulative distribution: the token is the first whose cumulative sum exceeds
    u·sum, u uniform in [0,1). One random number a row; torch.multinomial draws V."""
    cdf = probs.cumsum(-1)  # (N,V)
    if cdf.is_cuda:
        # a parallel sum rounds up and down: no gap may open for a token of probability 0
        cdf = cdf.masked_fill_(probs == 0, 0.0).cummax(-1).values
    total = cdf[:, -1:]
    # a little less than 1: u·sum must stay below the sum after rounding, too
    u = torch.rand(len(cdf), 1, device=cdf.device, dtype=cdf.dtype) * (1 - 2**-20)
    token = torch.searchsorted(cdf, u * total, right=True)
    return token.clamp(max=probs.size(1) - 1), total  # clamp: if the sum is nan, none is found


@torch.no_grad()
def sample(
    model: EncoderDecoder,
    memory: Memory,
    prefix: Tensor,
    length: int,
    *,
    samples: int = 1,
    temperature: float = 1.0,
    forbidden: Tensor | None = None,
    stop: int | None = None,
    fill: int = 0,
    min_length: int = 0,
) -> tuple[Tensor, Tensor]:
    """Write `length` tokens after prefix (B,P): tokens and their log-probs, (B,K,length) both.

    K = samples independent draws per example. temperature 0 is greedy. No top-k or top-p: a policy
    gradient is only right if we sample from exactly the distribution that `token_logprobs` scores.
    A row ends at `stop`, which may not come within the first min_length tokens. The rest of it
    holds `fill`, with log-prob 0: it is no choice."""
    cache, hidden = read_prefix(model, memory, prefix, length, samples)  # hidden (N,E)
    tokens = prefix.new_full((len(hidden), length), fill)  # (N,length)
    log_probs = torch.zeros_like(tokens, dtype=torch.promote_types(hidden.dtype, torch.float32))
    done = torch.zeros_like(tokens[:, 0], dtype=torch.bool)  # (N,)
    for t in range(length):
        logits = model.logits(hidden if temperature in (0, 1) else hidden / temperature)  # (N,V)
        if forbidden is not None:
            logits.index_fill_(1, forbidden, -torch.inf)
        if stop is not None and t < min_length:
            logits[:, stop] = -torch.inf
        probs = logits.sub_(logits.amax(-1, keepdim=True)).exp_()  # (N,V), not normalised
        if temperature == 0:
            token, total = probs.argmax(-1, keepdim=True), probs.sum(-1, keepdim=True)  # (N,1)
        else:
            token, total = draw(probs)  # (N,1)
        log_prob = (probs.gather(1, token) / total).log()  # (N,1)
        tokens[:, t] = torch.where(done, fill, token[:, 0])
        log_probs[:, t] = torch.where(done, 0.0, log_prob[:, 0])
        if stop is not None:
            done = done | (tokens[:, t] == stop)
            if all_true(done, t):
                break
        if t + 1 < length:
            hidden = model.decode(tokens[:, t : t + 1], memory, cache)[:, -1]
    return tokens.view(-1, samples, length), log_probs.view(-1, samples, length)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B,n,L), index (B,m) -> (B,m,L): the rows of each example in the order of its index."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.size(2)))


@torch.no_grad()
def beam_search(
    model: EncoderDecoder,
    memory: Memory,
    prefix: Tensor,
    length: int,
    *,
    beams: int = 4,
    length_penalty: float = 1.0,
    forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The n = beams best continuations of prefix (B,P): tokens (B,n,length), scores (B,n).

    score = sum of log-probs / (tokens written, </s> included) ** length_penalty, best first. Each
    step looks at 2n candidates, so that n stay open when some end. An example stops when its best
    open beam, at its present length, cannot beat its worst finished one."""
    B, n, config = len(prefix), beams, model.config
    cache, hidden = read_prefix(model, memory, prefix, length, n)  # hidden (B·n,E)
    first_row = torch.arange(B, device=prefix.device)[:, None] * n  # (B,1) of each example
    tokens = prefix.new_full((B, n, length), config.pad_id)  # open beams
    ended = tokens.clone()  # finished beams
    ended_scores = torch.full((B, n), MASKED, device=prefix.device)
    scores = ended_scores.clone()  # of open beams: sums of log-probs
    scores[:, 0] = 0.0  # all beams are alike at first: only one may speak
    running = torch.ones_like(first_row, dtype=torch.bool)  # (B,1)
    for t in range(length):
        logits = model.logits(hidden)  # (B·n,V)
        if forbidden is not None:
            logits.index_fill_(1, forbidden, -torch.inf)

        # candidates: each open beam with each of its 2n likeliest tokens; of these the best 2n
        top, token = logits.topk(min(2 * n, config.vocab_size), -1)  # (B·n,2n)
        log_probs = top - logits.logsumexp(-1, keepdim=True)
        sums = (scores.view(-1, 1) + log_probs).view(B, -1)  # (B,n·2n)
        sums, index = sums.topk(min(2 * n, sums.size(1)), -1)  # (B,2n), best first
        beam = index // top.size(1)  # (B,2n): which open beam it continues
        token = token.view(B, -1).gather(1, index)  # (B,2n)
        grown = take(tokens, beam)  # (B,2n,length)
        grown[:, :, t] = token
        ends = (token == config.eos_id) | (t + 1 == length)
        normaliser = (t + 1) ** length_penalty

        # finished: those among the best n that end here, while the example runs
        final = (sums / normaliser).masked_fill(~ends | ~running, MASKED)[:, :n]
        ended_scores, keep = torch.cat([ended_scores, final], 1).topk(n, -1)
        ended = take(torch.cat([ended, grown[:, :n]], 1), keep)
        # open: the best n that do not end
        scores, keep = sums.masked_fill(ends, MASKED).topk(n, -1)
        tokens = take(grown, keep)
        running = running & (scores[:, :1] / normaliser > ended_scores[:, -1:])
        if t + 1 == length or all_true(~running, t):
            break
        survivors = first_row + beam.gather(1, keep)  # (B,n): the cache rows they continue
        cache.select(survivors.view(-1))
        hidden = model.decode(tokens[:, :, t].reshape(-1, 1), memory, cache)[:, -1]
    return ended, ended_scores


# ===== plumbing: two fast paths; errors, device, precision, compile; T5 checkpoints in and out
class Dropout(nn.Module):
    """Zero each element with probability p and scale the rest by 1/(1-p), in training only.

    On a CPU torch draws a random float per element. A random byte decides as well; it rounds p to
    1/256. With torch's dropout an SFT step (size small) takes 1.12 to 1.22 times as long."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        dropped = min(255, round(self.p * 256))  # of the 256 values of a byte
        draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        drawn = draws.view(torch.uint8)[: x.numel()].view(x.shape)  # eight bytes from each draw
        return x * drawn.to(x.dtype).ge_(dropped).mul_(256 / (256 - dropped))


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden weightᵀ)[targets], holding at most `chunk` x V numbers at a time.

    Autograd would keep logits and log-probs, each tokens x V, until the backward pass. Here one
    buffer is overwritten: logits, then exp(logits - max), then their gradient. One chunk is kept
    for the backward pass; of several, each is computed again there. With the plain form a warmup
    step (size small) takes 1.6 times as long, and the loss at mT5's V 15 times the memory."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, forbidden, chunk):
        ctx.save_for_backward(hidden, weight, targets, forbidden)
        ctx.chunk, ctx.kept = chunk, None
        log_probs = hidden.new_empty(len(targets), dtype=torch.float32)  # (tokens,)
        for at in range(0, len(targets), chunk):
            rows = slice(at, at + chunk)
            log_probs[rows], *kept = _chunk(hidden[rows], weight, targets[rows], forbidden)
            if len(targets) <= chunk:
                ctx.kept = kept
            del kept  # before the next chunk is made
        return log_probs

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, forbidden = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # many chunks add up: float32
        for at in range(0, len(targets), ctx.chunk):
            rows = slice(at, at + ctx.chunk)
            if ctx.kept is None:
                _, *ctx.kept = _chunk(hidden[rows], weight, targets[rows], forbidden)
            exps, total = ctx.kept
            ctx.kept = None  # overwritten below: a second backward pass computes it again
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
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _chunk(hidden, weight, targets, forbidden):
    """n tokens: log-probs (n,), exp(logits - max) (n,V), and its row sums (n,1)."""
    logits = (hidden @ weight.T).float()  # (n,V)
    if forbidden is not None:
        logits.index_fill_(1, forbidden, -torch.inf)
    top = logits.amax(-1, keepdim=True)
    picked = logits.gather(1, targets[:, None])  # (n,1)
    exps = logits.sub_(top).exp_()
    total = exps.sum(-1, keepdim=True)
    return (picked - top - total.log()).squeeze(1), exps, total


def plain_token_logprobs(hidden, weight, targets, forbidden=None) -> Tensor:
    """What `_TokenLogProbs` computes, with all tokens x V logits. Tests hold it to these lines."""
    logits = hidden @ weight.T  # (tokens,V)
    if forbidden is not None:
        logits = logits.index_fill(1, forbidden, -torch.inf)
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)  # (tokens,)


def one_line(text: str) -> str:
    """Line ends and runs of spaces become one space."""
    return " ".join(text.split())


def shell_word(path: str | Path) -> str:
    """A path as one word of a command line, for the commands that the program prints."""
    if sys.platform != "win32":
        return shlex.quote(str(path))
    return f'"{path}"' if re.search(r"[^\w.:/\\-]", str(path)) else str(path)


class UserError(Exception):
    """Something that the user can mend. Printed as one line, exit code 1, no traceback."""


class Parser(argparse.ArgumentParser):
    """Says in two lines what is wrong with the usage: the error, and what may have been meant."""

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], flags, 1) if unknown else []
        hint = f"did you mean {near[0]}?" if near else f"--help lists all flags of {self.prog}"
        self.exit(2, f"error: {message}\n{hint}\n")


def program(run):
    """Decorator of a script's main(argv): 0, or 1 after one line that says what is wrong."""

    @wraps(run)
    def main(argv: list[str] | None = None) -> int:
        try:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                # a file gets UTF-8, as all our files; not every terminal has every character
                encoding = None if stream.isatty() else "utf-8"
                stream.reconfigure(encoding=encoding, errors="replace")
            run(sys.argv[1:] if argv is None else argv)
            print(end="", flush=True)  # if the reader has left, it shows here
            return 0
        except KeyboardInterrupt as interrupt:
            said = f"\nstopped; {interrupt}" if str(interrupt) else "\nstopped"
        except BrokenPipeError:  # a reader such as `head` has left
            return 1
        except (UserError, OSError, UnicodeError) as error:
            said = f"error: {one_line(str(error))}"
        except RuntimeError as error:  # torch has no type for the memory of a CPU
            if not isinstance(error, torch.OutOfMemoryError) and "allocate mem" not in str(error):
                raise
            said = (
                "error: out of memory. Lower --batch-tokens, --policy-batch-tokens, --beams or "
                "--max-target-tokens, or train with --recompute"
            )
        print(said, file=sys.stderr)
        return 1

    return main


def pick_device(name: str) -> torch.device:
    """auto: CUDA, else the CPU. Apple's mps, where nothing was ever run, only by its name.

    Under torchrun each process has its own GPU. Sets two switches of torch: which GPU is the
    current one, and that cuDNN's attention is off."""
    # cuDNN's attention plans anew for each shape, and no two batches are alike
    torch.backends.cuda.enable_cudnn_sdp(False)
    number = os.environ.get("LOCAL_RANK")  # set by torchrun. Processes cannot meet on mps
    here = {
        "cuda": torch.cuda.device_count() > int(number or 0),
        "mps": torch.backends.mps.is_available() and number is None,
        "cpu": True,
    }
    if name == "auto":
        name = "cuda" if here["cuda"] else "cpu"
    if not here[name]:
        raise UserError(f"torch finds no {name} device for this process: choose another --device")
    if name == "cuda":
        torch.cuda.set_device(int(number or 0))
    return torch.device(name)


def precision(dtype: str, device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16 if so named (auto: on CUDA). Weights stay float32."""
    low = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
    # no cache of cast weights: sampling would fill it without gradients, and scoring would use it
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=low, cache_enabled=False)


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


def all_true(done: Tensor, step: int) -> bool:
    """Whether decoding may stop. To look makes the host wait for a GPU: only at each 8th step."""
    return (step % 8 == 7 or not done.is_cuda) and bool(done.all())


def compile_stacks(model: EncoderDecoder, **how) -> None:
    """torch.compile of encoder and decoder, with dynamic shapes: no two batches are alike."""
    # graphs: with gradients or not, with dropout or not, and where a length is 1 or two are equal
    torch._dynamo.config.recompile_limit = 32
    model.encoder.compile(dynamic=True, **how)
    model.decoder.compile(dynamic=True, **how)


def build(config: ModelConfig, weights: dict[str, Tensor]) -> EncoderDecoder:
    """A model with these weights. RuntimeError if they are not those of the config."""
    with torch.device("meta"):  # shapes without memory: the weights become the parameters
        model = EncoderDecoder(config)
    model.load_state_dict(weights, assign=True)
    return model


T5_FIELDS = {  # in config.json: our name. Where T5's files are silent, its default is ours, too
    "vocab_size": "vocab_size",
    "d_model": "width",
    "num_heads": "heads",
    "d_kv": "head_size",
    "d_ff": "ff",
    "num_layers": "encoder_layers",
    "num_decoder_layers": "decoder_layers",
    "relative_attention_num_buckets": "buckets",
    "relative_attention_max_distance": "max_distance",
    "dropout_rate": "dropout",
}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}  # of all T5s


def t5_config(settings: dict) -> ModelConfig:
    """Hugging Face's config.json of a T5 v1.0, v1.1, Flan-T5, mT5, umT5 or byT5. Else UserError."""
    get, family = settings.get, settings.get("model_type")
    if family not in ("t5", "mt5", "umt5"):
        raise UserError(f"a model of type {family!r} is not a T5: we read t5, mt5 and umt5")
    if missing := [name for name in list(T5_FIELDS)[:6] if not isinstance(get(name), int)]:
        raise UserError(f"config.json has no whole number as {', '.join(missing)}")
    ours = {T5_FIELDS[name]: value for name, value in settings.items() if name in T5_FIELDS}
    ours["decoder_layers"] = ours.get("decoder_layers") or ours["encoder_layers"]
    gated = "gated-gelu" if get("is_gated_act") else get("dense_act_fn")
    act = get("feed_forward_proj") or gated or "relu"
    usual = {
        "feed_forward_proj": act if act in ("relu", "gated-gelu") else "relu",
        "layer_norm_epsilon": 1e-6,
        **IDS,
    }
    for name, value in usual.items():
        if get(name, value) != value:
            raise UserError(f"{name} = {get(name)!r} in config.json: a T5 has {value!r} there")
    # transformers 5 writes tie_word_embeddings = true for all, and the truth under another name
    tied = family != "mt5" and get("scale_decoder_outputs", get("tie_word_embeddings", True))
    try:
        return ModelConfig(
            **ours,
            gated=act == "gated-gelu",
            tied=tied,
            scaled=False,
            absolute=False,
            shared_bias=family != "umt5",
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json has {error}, which no T5 has") from None


def t5_names(config: ModelConfig) -> dict[str, list[str]]:
    """Our parameter -> the Hugging Face tensors that it holds, stacked along dim 0."""
    own = {
        "self_attention.qkv": "SelfAttention.q SelfAttention.k SelfAttention.v",
        "self_attention.out": "SelfAttention.o",
        "self_norm": "layer_norm",
    }
    cross = {
        "cross_attention.q": "EncDecAttention.q",
        "cross_norm": "layer_norm",
        "cross_attention.kv": "EncDecAttention.k EncDecAttention.v",
        "cross_attention.out": "EncDecAttention.o",
    }
    up = "DenseReluDense.wi_0 DenseReluDense.wi_1" if config.gated else "DenseReluDense.wi"
    feed = {
        "feed_forward.up": up,  # wi_0 is the gate
        "feed_forward.down": "DenseReluDense.wo",
        "ff_norm": "layer_norm",
    }
    names = {"embedding.weight": ["shared.weight"]}
    names |= {} if config.tied else {"output.weight": ["lm_head.weight"]}
    for stack, parts in (("encoder", [own, feed]), ("decoder", [own, cross, feed])):
        names[f"{stack}.norm.weight"] = [f"{stack}.final_layer_norm.weight"]
        for i in range(getattr(config, f"{stack}_layers")):
            for number, part in enumerate(parts):  # T5 numbers the parts of a block
                for ours, theirs in part.items():
                    names[f"{stack}.blocks.{i}.{ours}.weight"] = [
                        f"{stack}.block.{i}.layer.{number}.{x}.weight" for x in theirs.split()
                    ]
            if i == 0 or not config.shared_bias:
                bias = f"{stack}.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight"
                names[f"{stack}.biases.{i}.weight"] = [bias]
    return names


def pretrained_folder(source: str | Path) -> Path:
    """The folder itself, or where the hub's files of that name lie once they are downloaded."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download  # comes with tokenizers

    try:
        kinds = ["model*.safetensors"] if find_spec("safetensors") else []
        for weights in (*kinds, "pytorch_model*.bin"):
            folder = snapshot_download(source, allow_patterns=["*.json", "spiece.model", weights])
            if list(Path(folder).glob(weights)):
                break
        return Path(folder)
    except Exception as error:  # the hub, its HTTP library and the cache raise a zoo of types
        name = type(error).__name__
        raise UserError(f"{source}: no folder here, and the hub did not give it ({name})") from None


def read_json(path: Path) -> dict:
    """A JSON object. UserError if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) | {}  # TypeError if it is no object
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a JSON object: {error}") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model*.safetensors, else of pytorch_model*.bin: one file, or shards."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(
            f"{folder} holds no pytorch_model.bin and no model.safetensors. The latter "
            "is downloaded only after: pip install safetensors"
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


def untangle(tensors: dict[str, Tensor], config: ModelConfig, settings: dict) -> ModelConfig:
    """Remove copies and leftovers from tensors; say whether the output layer is really tied."""
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        copy = tensors.pop(name, None)
        if copy is not None and not torch.equal(copy, tensors.setdefault("shared.weight", copy)):
            raise UserError(f"{name} differs from shared.weight: in a T5 they are one")
    # nothing ever read this tensor of files from 2019
    tensors.pop("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", None)
    if config.tied and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        if not torch.equal(head, tensors.get("shared.weight", head)):
            # umT5's head is scaled as if it were tied, and is not: fold the scale into the weight
            config = replace(config, tied=False)
            tensors["lm_head.weight"] = head.float() * config.width**-0.5
    if not config.tied and settings.get("tie_word_embeddings") and "shared.weight" in tensors:
        # transformers 5 ties a v1.1 or mT5 that it makes new, without scaling
        tensors.setdefault("lm_head.weight", tensors["shared.weight"])
    return config


def load_pretrained(source: str | Path, **changes) -> EncoderDecoder:
    """A T5 in float32 from a Hugging Face folder or hub name.

    changes: ModelConfig fields, such as dropout. Every tensor is used or named in a UserError."""
    folder = pretrained_folder(source)
    settings = read_json(folder / "config.json")
    config = replace(t5_config(settings), **changes)
    tensors, weights = read_weights(folder), {}
    try:
        config = untangle(tensors, config, settings)
        for ours, theirs in t5_names(config).items():
            weights[ours] = torch.cat([tensors.pop(name) for name in theirs]).float()
            if not weights[ours].isfinite().all():
                raise ValueError(f"{theirs[0]} holds numbers that are not finite")
        if tensors:
            raise ValueError(f"it also holds {', '.join(sorted(tensors)[:3])}")
        return build(config, weights)
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        wrong = f"it lacks {error}" if isinstance(error, KeyError) else one_line(str(error))[:250]
        raise UserError(f"{folder} is not what its config.json says: {wrong}") from None


def save_pretrained(model: EncoderDecoder, folder: str | Path) -> None:
    """Write config.json and pytorch_model.bin that transformers loads, to the same logits."""
    config, folder = model.config, Path(folder)
    if config.absolute or not config.encoder_layers:
        raise UserError("only --init runs export: a T5 has an encoder and no absolute positions")
    tensors = {}
    for ours, theirs in t5_names(config).items():
        whole = model.get_parameter(ours).detach().cpu()
        if config.scaled and ours == "embedding.weight":  # see `embed`
            whole = whole * config.width**0.5
        parts = [part.clone() for part in whole.chunk(len(theirs))]
        if config.scaled and ours.endswith(("qkv.weight", "attention.q.weight")):
            parts[0] *= config.attention_scale
        if ours == "output.weight" and not config.shared_bias:
            parts[0] *= config.width**0.5  # transformers 5 scales umT5's untied output, too
        tensors |= zip(theirs, parts)
    kind, architecture = ("t5", "T5") if config.shared_bias else ("umt5", "UMT5")
    settings = {theirs: getattr(config, ours) for theirs, ours in T5_FIELDS.items()} | {
        "model_type": kind,
        "architectures": [f"{architecture}ForConditionalGeneration"],
        "is_encoder_decoder": True,
        **IDS,
        "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        "tie_word_embeddings": config.tied or not config.shared_bias,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    torch.save(tensors, folder / "pytorch_model.bin")
