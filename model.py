"""The model: an encoder-decoder transformer with T5's architecture, written out by hand.

Nothing here knows of warmups, tasks or training. One shape alphabet for the whole codebase:

    B batch            S source length    T target length    W warmup length
    K warmups/example  H heads            D head size        V vocabulary
    E model width      L any decoder length                  R = B*K decoder rows, K of an example adjacent

T5's oddities, each marked where it happens: RMSNorm without mean or bias, no biases in any linear
layer, positions only as a learned bias on attention scores, the pad id as decoder start.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MASKED = -1e9  # added to a score to hide a key. Finite: a row whose keys are all hidden stays free of NaN.


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
    scaled: bool = True  # False: T5's weights. True: the same functions with weights that suit AdamW (see `embed`)
    absolute: bool = True  # add sinusoidal positions to the embeddings; False: T5, which has relative ones only
    dropout: float = 0.1
    pad_id: int = 0  # also the decoder's start token: T5 has no other
    eos_id: int = 1

    @property
    def attention_scale(self) -> float:
        """T5 does not divide attention scores by sqrt(D): its query weights are that much smaller instead."""
        return self.head_size**-0.5 if self.scaled else 1.0


SIZES = {
    "toy": dict(width=64, heads=4, head_size=16, ff=256, encoder_layers=0, decoder_layers=1, tied=False,
                absolute=False),
    "puzzle": dict(width=64, heads=4, head_size=16, ff=256, encoder_layers=3, decoder_layers=1, tied=False),
    "nano": dict(width=64, heads=2, head_size=32, ff=256, encoder_layers=2, decoder_layers=2),
    "tiny": dict(width=192, heads=6, head_size=32, ff=512, encoder_layers=3, decoder_layers=3),
    "small": dict(width=256, heads=4, head_size=64, ff=1024, encoder_layers=4, decoder_layers=4),
    "t5-small": dict(width=512, heads=8, head_size=64, ff=2048, encoder_layers=6, decoder_layers=6),
    "t5-base": dict(width=768, heads=12, head_size=64, ff=3072, encoder_layers=12, decoder_layers=12),
}


# ----------------------------------------------------------------------------- building blocks


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + 1e-6) * weight: T5's layer norm subtracts no mean and adds no bias."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)


class Dropout(nn.Module):
    """Zero each element with probability p and scale the rest by 1/(1-p), in training only.

    On a CPU torch draws a random float per element, which takes four times as long as the random byte
    used here. A byte decides just as well; it rounds p to a multiple of 1/256.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        drop = min(255, round(self.p * 256))
        bits = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)  # 8 bytes a draw
        keep = bits.view(torch.uint8)[: x.numel()].view(x.shape).to(x.dtype).ge_(drop)  # 0 or 1
        return x * keep.mul_(256 / (256 - drop))


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    """softmax(q kᵀ + bias) v: (B,H,L,D), (B,H,S,D) x2 -> (B,H,L,D), by a fused kernel where torch has one.

    bias (broadcast to (B,H,L,S)) holds position bias and masks; where it needs a gradient, CPUs have no such kernel.
    scale multiplies q kᵀ: 1 for T5, see ModelConfig.scaled. Attention weights are not dropped out (our choice:
    the fused CPU kernel cannot, and the other dropouts suffice).
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # torch 2.13: the fused one is 5x slower to train
        return plain_attention(q, k, v, bias, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    """The same in plain algebra; the tests hold `attention` to it, forward and backward."""
    scores = scale * (q @ k.transpose(-1, -2)) + bias  # (B,H,L,S)
    return scores.softmax(-1).to(v.dtype) @ v


class SelfAttention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads, self.scale, inner = c.heads, c.attention_scale, c.heads * c.head_size
        self.qkv = nn.Linear(c.width, 3 * inner, bias=False)  # one product instead of three
        self.out = nn.Linear(inner, c.width, bias=False)

    def forward(self, x: Tensor, bias: Tensor, cache: "Cache | None" = None, layer: int = 0) -> Tensor:
        R, L, _ = x.shape
        q, k, v = self.qkv(x).view(R, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (R,H,L,D)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (R,H,past+L,D)
        return self.out(attention(q, k, v, bias, self.scale).transpose(1, 2).reshape(R, L, -1))  # (R,L,E)


class CrossAttention(nn.Module):
    """The decoder's look at the source. Keys and values are projected once per example (`project`).

    Cross-attention has no causal structure, so an example's K warmups may stand side by side on the
    query axis: (B,H,K·L,D) queries against ONE copy of (B,H,S,D) keys. Nothing is repeated K times.
    """

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads, self.scale, inner = c.heads, c.attention_scale, c.heads * c.head_size
        self.q = nn.Linear(c.width, inner, bias=False)
        self.kv = nn.Linear(c.width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, c.width, bias=False)

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        B, S, _ = states.shape
        k, v = self.kv(states).view(B, S, 2, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B,H,S,D)
        return k, v

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        (R, L, _), B = x.shape, kv[0].size(0)
        q = self.q(x).view(B, R // B * L, self.heads, -1).transpose(1, 2)  # (B,H,K·L,D)
        return self.out(attention(q, *kv, bias, self.scale).transpose(1, 2).reshape(R, L, -1))  # (R,L,E)


class FeedForward(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gated = c.gated
        self.up = nn.Linear(c.width, c.ff * (2 if c.gated else 1), bias=False)
        self.down = nn.Linear(c.ff, c.width, bias=False)
        self.dropout = Dropout(c.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, x = self.up(x).chunk(2, dim=-1)
            return self.down(self.dropout(F.gelu(gate, approximate="tanh") * x))  # T5 v1.1 uses the tanh form
        return self.down(self.dropout(F.relu(self.up(x))))


class Block(nn.Module):
    """Self-attention, cross-attention (decoder only), feed-forward; each x + dropout(f(norm(x)))."""

    def __init__(self, c: ModelConfig, decoder: bool):
        super().__init__()
        self.self_attention, self.self_norm = SelfAttention(c), RMSNorm(c.width)
        if decoder:
            self.cross_attention, self.cross_norm = CrossAttention(c), RMSNorm(c.width)
        self.feed_forward, self.ff_norm = FeedForward(c), RMSNorm(c.width)
        self.dropout = Dropout(c.dropout)

    def forward(self, x, bias, memory=None, cache=None, layer=0) -> Tensor:
        x = x + self.dropout(self.self_attention(self.self_norm(x), bias, cache, layer))
        if memory is not None:
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), memory.kv[layer], memory.bias))
        return x + self.dropout(self.feed_forward(self.ff_norm(x)))


class PositionBias(nn.Module):
    """T5's only notion of position: a learned number per head and bucketed distance (Raffel et al. 2020, §2.1).

    Half of the buckets hold one distance each; the other half grow logarithmically up to max_distance.
    The encoder looks both ways and splits its buckets by sign; the decoder looks back only.
    """

    def __init__(self, c: ModelConfig, bidirectional: bool):
        super().__init__()
        self.bidirectional, self.buckets, self.max_distance = bidirectional, c.buckets, c.max_distance
        self.weight = nn.Parameter(torch.zeros(c.buckets, c.heads))

    def bucket(self, distance: Tensor) -> Tensor:
        """distance = key position - query position, any integer shape -> bucket index, same shape."""
        n, offset = self.buckets, torch.zeros_like(distance)
        if self.bidirectional:
            n //= 2
            offset, distance = (distance > 0).long() * n, distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = n // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (n - exact)).long()).clamp(max=n - 1)
        return offset + torch.where(distance < exact, distance, far)

    def forward(self, length: int) -> Tensor:
        at = torch.arange(length, device=self.weight.device)
        bias = self.weight[self.bucket(at[None, :] - at[:, None])]  # (L,L,H)
        return bias.permute(2, 0, 1).unsqueeze(0).contiguous()  # (1,H,L,L); CUDA's fused kernels ask for such a mask


def sinusoids(length: int, width: int, device) -> Tensor:
    """(length,width): sin and cos of the position at wavelengths from 2π to 20,000π (Vaswani et al. 2017, §3.5)."""
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))  # (width/2,)
    angle = torch.arange(length, device=device)[:, None] * rate  # (length,width/2)
    return torch.cat([angle.sin(), angle.cos()], -1)


class Stack(nn.Module):
    """All blocks of the encoder or the decoder, with the biases they share and a final norm."""

    def __init__(self, c: ModelConfig, decoder: bool):
        super().__init__()
        self.decoder, layers = decoder, c.decoder_layers if decoder else c.encoder_layers
        self.blocks = nn.ModuleList(Block(c, decoder) for _ in range(layers))
        self.biases = nn.ModuleList(PositionBias(c, not decoder) for _ in range(1 if c.shared_bias else layers))
        self.norm, self.dropout = RMSNorm(c.width), Dropout(c.dropout)
        self.recompute = False  # True: keep a block's input only, and compute the rest again for the backward pass

    def position_biases(self, length: int) -> list[Tensor]:
        """One (1,H,L,L) per layer, or a single one that all layers share; causal in the decoder."""
        biases = [bias(length) for bias in self.biases]
        if self.decoder:
            future = torch.ones(length, length, dtype=torch.bool, device=biases[0].device).triu(1)
            biases = [bias.masked_fill(future, MASKED) for bias in biases]
        return biases

    def forward(self, x: Tensor, biases: list[Tensor], memory=None, cache=None) -> Tensor:
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            bias = biases[layer if len(biases) > 1 else 0]
            if self.recompute and torch.is_grad_enabled():  # dropout is drawn again from the same random state
                x = checkpoint(block, x, bias, memory, None, layer, use_reentrant=False)
            else:
                x = block(x, bias, memory, cache, layer)
        return self.dropout(self.norm(x))


# ----------------------------------------------------------------------------- what decoding remembers


@dataclass
class Memory:
    """What the decoder sees of B sources: per decoder layer keys and values (B,H,S,D), and the padding bias."""

    kv: list[tuple[Tensor, Tensor]]
    bias: Tensor  # (B,1,1,S): 0 where there is a source token, MASKED where there is padding

    def detach(self) -> "Memory":
        return Memory([(k.detach(), v.detach()) for k, v in self.kv], self.bias)


class Cache:
    """Preallocated self-attention keys and values of the tokens that R decoder rows have read."""

    def __init__(self, model: "EncoderDecoder", room: int):
        self.biases = model.decoder.position_biases(room)  # once, then sliced at every step
        self.kv: list[Tensor | None] = [None] * len(model.decoder.blocks)  # each (R,2,H,room,D), on first use
        self.spare: list[Tensor | None] = [None] * len(model.decoder.blocks)  # `select` copies there, then swaps
        self.room, self.length = room, 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write L new positions, give back all so far: (R,H,L,D) x2 -> (R,H,length+L,D) x2."""
        R, H, L, D = k.shape
        if self.kv[layer] is None:
            self.kv[layer] = k.new_empty(R, 2, H, self.room, D)
        kv, end = self.kv[layer], self.length + L
        kv[:, 0, :, self.length : end], kv[:, 1, :, self.length : end] = k, v
        return kv[:, 0, :, :end], kv[:, 1, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep these rows in this order: expands B rows to B*K, or follows the surviving beams."""
        for layer, kv in enumerate(self.kv):
            if self.spare[layer] is None or len(self.spare[layer]) != len(rows):
                self.spare[layer] = kv.new_empty(len(rows), *kv.shape[1:])
            used = self.spare[layer][:, :, :, : self.length]  # the rest of the room holds nothing yet
            torch.index_select(kv[:, :, :, : self.length], 0, rows, out=used)
            self.kv[layer], self.spare[layer] = self.spare[layer], kv


# ----------------------------------------------------------------------------- log-probs of given tokens


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden weightᵀ)[target], holding at most `chunk` x V numbers at a time.

    Autograd would keep logits and log-probs, each N x V, until the backward pass. Here one buffer is
    overwritten in place: logits -> exp(logits - max) -> their gradient. If N fits one chunk, the buffer is
    kept for the backward pass; else it is thrown away and computed again there.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, forbidden, smoothing, chunk):
        ctx.save_for_backward(hidden, weight, targets, forbidden)
        ctx.smoothing, ctx.chunk, ctx.kept = smoothing, chunk, None
        log_probs = hidden.new_empty(len(targets), dtype=torch.float32)
        for at in range(0, len(targets), chunk):
            rows, kept = slice(at, at + chunk), None  # None: let go of the last chunk before the next is made
            log_probs[rows], *kept = _chunk(hidden[rows], weight, targets[rows], forbidden, smoothing)
        if len(targets) <= chunk:
            ctx.kept = kept
        return log_probs

    @staticmethod
    def backward(ctx, grad):
        (hidden, weight, targets, forbidden), s = ctx.saved_tensors, ctx.smoothing
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for at in range(0, len(targets), ctx.chunk):
            rows = slice(at, at + ctx.chunk)
            exps, total = ctx.kept or _chunk(hidden[rows], weight, targets[rows], forbidden, s)[1:]
            ctx.kept = None  # overwritten below: a second backward computes it anew
            g = grad[rows, None]  # (n,1)
            d = exps.mul_(-g / total)  # d log p / d logits = (1-s) onehot + s/V - softmax      (n,V)
            d.scatter_add_(1, targets[rows, None], (1 - s) * g)
            d = (d.add_(g * (s / len(weight))) if s else d).to(weight.dtype)
            grad_hidden[rows] = d @ weight  # (n,E)
            if d.dtype == torch.float32:
                torch.addmm(grad_weight, d.T, hidden[rows], out=grad_weight)  # (V,E), in place: no second one
            else:
                grad_weight += d.T @ hidden[rows]  # many chunks add up in float32 also when they are bfloat16
            exps = d = None  # let go of this chunk before the next is made
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _chunk(hidden, weight, targets, forbidden, smoothing):
    """n rows: their smoothed log-probs (n,), exp(logits - max) (n,V), and its row sums (n,1)."""
    logits = (hidden @ weight.T).float()  # (n,V)
    if forbidden is not None:
        logits.index_fill_(1, forbidden, -torch.inf)
    top = logits.amax(-1, keepdim=True)
    picked = logits.gather(1, targets[:, None])
    if smoothing:
        picked = (1 - smoothing) * picked + smoothing * logits.mean(-1, keepdim=True)
    exps = logits.sub_(top).exp_()
    total = exps.sum(-1, keepdim=True)
    return (picked - top - total.log()).squeeze(1), exps, total


# ----------------------------------------------------------------------------- the model


class EncoderDecoder(nn.Module):
    """T5's encoder-decoder. encode -> Memory; decode -> hidden states; token_logprobs or logits on those."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab_size, c.width)
        self.encoder, self.decoder = Stack(c, decoder=False), Stack(c, decoder=True)
        if not c.tied:
            self.output = nn.Linear(c.width, c.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Unit-variance products (1/sqrt(fan-in)), as T5; its query weights are smaller where scores are unscaled.

        Ours: if the output is tied, the logits and what the layers add to the residual stream start at 0.3 of
        that: else the decoder's own input token would dominate them. The first loss is within 0.6 of ln V.
        """
        c, small = self.config, 0.3 if self.config.tied else 1.0
        shrink = c.head_size**-0.5 / c.attention_scale  # of queries: 1, or T5's 1/sqrt(D)
        std = {"qkv": c.width**-0.5, "q": shrink * c.width**-0.5, "kv": c.width**-0.5, "up": c.width**-0.5}
        std |= {"out": small * (c.heads * c.head_size) ** -0.5, "down": small * c.ff**-0.5}
        for name, p in self.named_parameters():
            layer = name.split(".")[-2]
            if layer in std:
                nn.init.normal_(p, std=std[layer])
            if layer == "qkv":
                with torch.no_grad():
                    p[: c.heads * c.head_size] *= shrink
        nn.init.normal_(self.embedding.weight, std=c.width**-0.5 if c.scaled else 1.0)
        if c.tied:
            nn.init.constant_(self.decoder.norm.weight, small)
        else:
            nn.init.normal_(self.output.weight, std=small * c.width**-0.5)

    def embed(self, tokens: Tensor, past: int = 0) -> Tensor:
        """tokens (R,L) at positions past.. -> (R,L,E).

        T5's embeddings are sqrt(E) larger and its queries sqrt(D) smaller than `scaled` ones. Its optimizer,
        Adafactor, takes steps in proportion to a weight's size. AdamW's steps are all alike: it would leave
        T5's embeddings behind and make its attention scores jump. So when we train from scratch, a factor
        here and in `attention_scale` takes the place of the weights' sizes; what can be computed is the same.
        """
        x = self.embedding(tokens)
        if self.config.scaled:
            x = x * self.config.width**0.5
        if self.config.absolute:
            x = x + sinusoids(past + tokens.size(1), self.config.width, tokens.device)[past:].to(x.dtype)  # (L,E)
        return x

    def encode(self, source: Tensor) -> Memory:
        """source (B,S), padded on the right with pad_id -> Memory. Every row needs one real token."""
        padding = (source == self.config.pad_id)[:, None, None, :] * MASKED  # (B,1,1,S)
        biases = [bias + padding for bias in self.encoder.position_biases(source.size(1))]  # (B,H,S,S)
        states = self.encoder(self.embed(source), biases)  # (B,S,E)
        return Memory([block.cross_attention.project(states) for block in self.decoder.blocks], padding)

    def decode(self, tokens: Tensor, memory: Memory, cache: Cache | None = None) -> Tensor:
        """tokens (R,L) after what the cache holds -> hidden states (R,L,E).

        R = B*K rows share the memory of B examples. Rows are padded on the right only, so the causal mask
        alone keeps real tokens from padding; what padded positions compute is never read.
        """
        L, past = tokens.size(1), cache.length if cache else 0
        if tokens.size(0) % len(memory.bias):
            raise ValueError(f"{tokens.size(0)} decoder rows are not a multiple of {len(memory.bias)} examples")
        biases = cache.biases if cache else self.decoder.position_biases(L)
        biases = [bias[:, :, past : past + L, : past + L] for bias in biases]  # (1,H,L,past+L)
        # a cached step is longer each time: `forward` goes past what train.py --compile made of the decoder
        decoder = self.decoder.forward if cache else self.decoder
        hidden = decoder(self.embed(tokens, past), biases, memory, cache)  # (R,L,E)
        if cache:
            cache.length += L
        return hidden

    def output_layer(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden, weight (V,E)) whose product is the logits."""
        if not self.config.tied:
            return hidden, self.output.weight
        if not self.config.scaled:  # T5 v1.0 scales its large embeddings down where they are the output layer
            hidden = hidden * self.config.width**-0.5
        return hidden, self.embedding.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (...,E) -> logits (...,V) in float32, or in float64 for a float64 model."""
        logits = F.linear(*self.output_layer(hidden))
        return logits if logits.dtype == torch.float64 else logits.float()

    def token_logprobs(self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0,
                       forbidden: Tensor | None = None, smoothing: float = 0.0, chunk: int = 0) -> Tensor:
        """log softmax(logits / temperature)[target]: hidden (N,E), targets (N,) -> (N,), in float32.

        forbidden: ids of tokens of probability 0. smoothing s: (1-s) log p(target) + s mean_v log p(v).
        chunk: rows whose logits are held at once; 0 picks as many as fit 256 MiB.
        """
        if smoothing and forbidden is not None:
            raise ValueError("label smoothing would ask for the log-probs of forbidden tokens")
        hidden, weight = self.output_layer(hidden)
        if temperature != 1.0:
            hidden = hidden / temperature
        if torch.is_autocast_enabled(hidden.device.type):  # an autograd.Function is on its own here
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        if hidden.dtype == torch.float64:  # the exact tests; everything else accumulates in float32
            return plain_token_logprobs(hidden, weight, targets, forbidden, smoothing)
        chunk = chunk or max(1, 2**26 // len(weight))
        return _TokenLogProbs.apply(hidden, weight, targets, forbidden, smoothing, chunk)


def plain_token_logprobs(hidden, weight, targets, forbidden=None, smoothing=0.0) -> Tensor:
    """What `_TokenLogProbs` computes, in five lines that hold all N x V logits; tests hold it to these."""
    logits = hidden @ weight.T  # (N,V)
    logits = logits if forbidden is None else logits.index_fill(1, forbidden, -torch.inf)
    log_probs = logits.log_softmax(-1)  # (N,V)
    picked = log_probs.gather(1, targets[:, None]).squeeze(1)  # (N,)
    return (1 - smoothing) * picked + smoothing * log_probs.mean(-1) if smoothing else picked


# ----------------------------------------------------------------------------- decoding


@torch.no_grad()
def sample(model: EncoderDecoder, memory: Memory, prefix: Tensor, length: int, *, samples: int = 1,
           temperature: float = 1.0, forbidden: Tensor | None = None, stop: int | None = None,
           fill: int = 0, min_length: int = 0) -> tuple[Tensor, Tensor]:
    """Write `length` tokens after prefix (B,P): tokens (B,K,length) and their log-probs (B,K,length).

    K = samples independent draws per example; temperature 0 is greedy. No top-k or top-p: a policy gradient
    is only right if we sample from exactly the distribution that `token_logprobs` scores. After `stop`
    (barred from the first min_length places) a row holds `fill`, with log-prob 0: it is no longer a choice.
    """
    B, P = prefix.shape
    cache = Cache(model, P + length)
    hidden = model.decode(prefix, memory, cache)[:, -1].repeat_interleave(samples, 0)  # (R,E)
    cache.select(torch.arange(B, device=prefix.device).repeat_interleave(samples))
    tokens = prefix.new_full((B * samples, length), fill)  # (R,length)
    log_probs = torch.zeros(tokens.shape, device=prefix.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
    done = torch.zeros(B * samples, dtype=torch.bool, device=prefix.device)  # (R,)
    for t in range(length):
        logits = model.logits(hidden if temperature in (0, 1) else hidden / temperature)  # (R,V)
        if forbidden is not None:
            logits.index_fill_(1, forbidden, -torch.inf)
        if stop is not None and t < min_length:
            logits[:, stop] = -torch.inf
        exps = logits.sub_(logits.amax(-1, keepdim=True)).exp_()  # (R,V)
        if temperature == 0:
            token, total = exps.argmax(-1, keepdim=True), exps.sum(-1, keepdim=True)  # (R,1) both
        else:  # invert the cumulative distribution: one random number a row instead of V
            cdf = exps.cumsum(-1)  # (R,V)
            if cdf.is_cuda:  # a parallel sum rounds up and down: nothing may open a gap for a token of probability 0
                cdf = cdf.masked_fill_(exps == 0, 0.0).cummax(-1).values
            total = cdf[:, -1:]
            u = torch.rand(len(cdf), 1, device=cdf.device, dtype=cdf.dtype) * (1 - 2**-20)  # never all the mass
            token = torch.searchsorted(cdf, u * total, right=True)  # first token whose cdf exceeds it
        tokens[:, t] = torch.where(done, fill, token[:, 0])
        log_probs[:, t] = torch.where(done, 0.0, (exps.gather(1, token) / total).log()[:, 0])
        if stop is not None:
            done = done | (tokens[:, t] == stop)
            if done.all():
                break
        if t + 1 < length:
            hidden = model.decode(tokens[:, t : t + 1], memory, cache)[:, -1]
    return tokens.view(B, samples, length), log_probs.view(B, samples, length)


@torch.no_grad()
def beam_search(model: EncoderDecoder, memory: Memory, prefix: Tensor, length: int, *, beams: int = 4,
                length_penalty: float = 1.0, forbidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `beams` best continuations of prefix (B,P): tokens (B,beams,length), scores (B,beams), best first.

    score = sum of log-probs / (tokens written, </s> included) ** length_penalty. Each step looks at 2*beams
    candidates, so that beams stay alive when some end. An example stops when its best open beam, at its
    present length, cannot beat its worst finished one. What is open at `length` counts as finished.
    """
    (B, P), n, c = prefix.shape, beams, model.config
    cache = Cache(model, P + length)
    hidden = model.decode(prefix, memory, cache)[:, -1].repeat_interleave(n, 0)  # (B·n,E)
    rows = torch.arange(B, device=prefix.device)[:, None] * n  # (B,1): first row of each example
    cache.select(torch.arange(B, device=prefix.device).repeat_interleave(n))
    tokens = prefix.new_full((B, n, length), c.pad_id)  # open beams
    scores = torch.full((B, n), MASKED, device=prefix.device)  # their sums of log-probs
    scores[:, 0] = 0.0  # all beams are alike at first: let one speak
    ended, ended_scores = tokens.clone(), torch.full_like(scores, MASKED)
    running = torch.ones(B, 1, dtype=torch.bool, device=prefix.device)
    for t in range(length):
        logits = model.logits(hidden)  # (B·n,V)
        if forbidden is not None:
            logits.index_fill_(1, forbidden, -torch.inf)
        top, token = logits.topk(min(2 * n, c.vocab_size), -1)  # (B·n,2n): no other token can be a candidate
        log_probs = top - logits.logsumexp(-1, keepdim=True)  # (B·n,2n)
        candidates = (scores.view(-1, 1) + log_probs).view(B, -1)  # (B,n·2n)
        candidates, index = candidates.topk(min(2 * n, candidates.size(1)), -1)  # (B,2n), best first
        beam, token = index // top.size(1), token.view(B, -1).gather(1, index)  # (B,2n) both
        grown = tokens.gather(1, beam[..., None].expand(-1, -1, length))  # (B,2n,length)
        grown[:, :, t] = token
        ends = (token == c.eos_id) | (t + 1 == length)
        # finished: only candidates among the best n, and only while the example runs
        final = (candidates / (t + 1) ** length_penalty).masked_fill(~ends | ~running, MASKED)[:, :n]
        ended_scores, best = torch.cat([ended_scores, final], 1).topk(n, -1)
        ended = torch.cat([ended, grown[:, :n]], 1).gather(1, best[..., None].expand(-1, -1, length))
        # open: the best n that did not end
        scores, best = candidates.masked_fill(ends, MASKED).topk(n, -1)
        tokens = grown.gather(1, best[..., None].expand(-1, -1, length))
        running = running & (scores[:, :1] / (t + 1) ** length_penalty > ended_scores[:, -1:])
        if t + 1 == length or not running.any():
            break
        cache.select((rows + beam.gather(1, best)).view(-1))
        hidden = model.decode(tokens[:, :, t].reshape(-1, 1), memory, cache)[:, -1]
    return ended, ended_scores


# ----------------------------------------------------------------------------- pretrained weights

FAMILIES = ("t5", "mt5", "umt5")  # model_type in config.json; t5 is also v1.1, Flan-T5 and byT5


def t5_config(settings: dict) -> ModelConfig:
    """Hugging Face's config.json of a T5 v1.0, T5 v1.1, Flan-T5, mT5, umT5 or byT5. ValueError for all others."""
    get, family = settings.get, settings.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"a model of type {family!r} is not a T5: we read {', '.join(FAMILIES)}")
    missing = [name for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")
               if not isinstance(get(name), int)]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}, or has something else than a number there")
    act = get("feed_forward_proj") or ("gated-gelu" if get("is_gated_act") else get("dense_act_fn") or "relu")
    same = {"feed_forward_proj": (act if act in ("relu", "gated-gelu") else None, act),
            "layer_norm_epsilon": (1e-6, get("layer_norm_epsilon", 1e-6)),
            "decoder_start_token_id": (get("pad_token_id", 0), get("decoder_start_token_id", get("pad_token_id", 0)))}
    for name, (ours, theirs) in same.items():
        if ours != theirs:
            raise ValueError(f"{name} = {theirs!r} in config.json is not what any T5 has, and we cannot compute it")
    # transformers 5 writes tie_word_embeddings = true for all, and what it stood for under another name; for mT5 never
    tied = family != "mt5" and get("scale_decoder_outputs", get("tie_word_embeddings", True))
    return ModelConfig(
        vocab_size=settings["vocab_size"], width=settings["d_model"], heads=settings["num_heads"],
        head_size=settings["d_kv"], ff=settings["d_ff"], encoder_layers=settings["num_layers"],
        decoder_layers=get("num_decoder_layers") or settings["num_layers"], gated=act == "gated-gelu",
        tied=tied, shared_bias=family != "umt5", scaled=False, absolute=False,
        buckets=get("relative_attention_num_buckets", 32), max_distance=get("relative_attention_max_distance", 128),
        dropout=get("dropout_rate", 0.1), pad_id=get("pad_token_id", 0), eos_id=get("eos_token_id", 1))


def t5_names(c: ModelConfig) -> dict[str, list[str]]:
    """Our parameter -> the Hugging Face tensors that it holds, stacked along dim 0 in this order."""
    names = {"embedding.weight": ["shared.weight"]} | ({} if c.tied else {"output.weight": ["lm_head.weight"]})
    for stack, layers in (("encoder", c.encoder_layers), ("decoder", c.decoder_layers)):
        names[f"{stack}.norm.weight"] = [f"{stack}.final_layer_norm.weight"]
        for i in range(layers):
            last = 2 if stack == "decoder" else 1  # T5 numbers a block's parts: self, cross, feed-forward
            up = ["wi_0", "wi_1"] if c.gated else ["wi"]  # wi_0 is the gate
            parts = {"self_attention.qkv": [f"0.SelfAttention.{x}" for x in "qkv"],
                     "self_attention.out": ["0.SelfAttention.o"], "self_norm": ["0.layer_norm"],
                     "feed_forward.up": [f"{last}.DenseReluDense.{x}" for x in up],
                     "feed_forward.down": [f"{last}.DenseReluDense.wo"], "ff_norm": [f"{last}.layer_norm"]}
            if stack == "decoder":
                parts |= {"cross_attention.q": ["1.EncDecAttention.q"], "cross_norm": ["1.layer_norm"],
                          "cross_attention.kv": [f"1.EncDecAttention.{x}" for x in "kv"],
                          "cross_attention.out": ["1.EncDecAttention.o"]}
            names |= {f"{stack}.blocks.{i}.{ours}.weight": [f"{stack}.block.{i}.layer.{x}.weight" for x in theirs]
                      for ours, theirs in parts.items()}
            if i == 0 or not c.shared_bias:
                bias = f"{stack}.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight"
                names[f"{stack}.biases.{i}.weight"] = [bias]
    return names


def pretrained_folder(source: str | Path) -> Path:
    """The folder itself, or where the Hugging Face hub's files of that name lie (downloaded, or in its cache)."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(source)):
        raise OSError(f"{source} is neither a folder nor a name on the Hugging Face hub")
    from huggingface_hub import snapshot_download  # comes with tokenizers

    small = ["config.json", "tokenizer.json", "spiece.model", "tokenizer_config.json", "*.index.json"]
    try:
        folder = Path(snapshot_download(source, allow_patterns=[*small, "model*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(source, allow_patterns=[*small, "pytorch_model*.bin"]))
        return folder
    except Exception as error:  # the hub, its HTTP library and the cache raise a zoo of types
        raise OSError(f"{source} is no folder here, and the Hugging Face hub did not give it "
                      f"({type(error).__name__}). Is the name right, and is there a network? If not: download it "
                      "elsewhere and name its folder") from None


def read_json(path: Path) -> dict:
    """A JSON object. OSError if there is none, ValueError if it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        return content
    except FileNotFoundError:
        raise OSError(f"{path} does not exist") from None
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors (needs safetensors) or pytorch_model.bin, in one file or in shards."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        files, index = [name], folder / f"{name}.index.json"
        if not (folder / name).exists():
            if not index.exists():
                continue
            try:
                files = sorted(set(read_json(index)["weight_map"].values()))
            except (KeyError, AttributeError, TypeError):
                raise ValueError(f"{index} has no weight_map: it is no index of shards") from None
        tensors: dict[str, Tensor] = {}
        for path in (folder / Path(file).name for file in files):
            try:
                if path.suffix == ".safetensors":
                    from safetensors.torch import load_file

                    tensors |= load_file(path)
                else:
                    tensors |= torch.load(path, map_location="cpu", weights_only=True)
            except ImportError:
                raise OSError(f"to read {path.name}: pip install safetensors") from None
            except FileNotFoundError:
                raise OSError(f"{path} is missing: the checkpoint's index names it") from None
            except Exception as error:
                raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from None
        return tensors
    raise OSError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def load_pretrained(source: str | Path, **changes) -> EncoderDecoder:
    """A T5 in float32 from a Hugging Face folder or hub name. changes: ModelConfig fields, such as dropout.

    Every tensor is used or named in a ValueError; OSError for what cannot be read.
    """
    folder = pretrained_folder(source)
    settings = read_json(folder / "config.json")
    c = replace(t5_config(settings), **changes)
    tensors = read_weights(folder)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):  # the same under other names
        copy = tensors.pop(name, None)
        if copy is not None and not torch.equal(copy, tensors.setdefault("shared.weight", copy)):
            raise ValueError(f"{name} differs from shared.weight: in a T5 they are one")
    if c.tied and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        if not torch.equal(head, tensors.get("shared.weight", head)):  # umT5: scaled as if tied, and is not
            c = replace(c, tied=False)
            tensors["lm_head.weight"] = head.float() * c.width**-0.5
    if not c.tied and settings.get("tie_word_embeddings"):  # transformers 5 ties a new v1.1 or mT5, without scaling
        tensors.setdefault("lm_head.weight", tensors.get("shared.weight"))
    tensors.pop("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", None)  # never used, by anyone
    names = t5_names(c)
    missing = [name for parts in names.values() for name in parts if name not in tensors]
    foreign = sorted(tensors.keys() - {name for parts in names.values() for name in parts})
    if missing or foreign:
        lists = (f"{what} {', '.join(n[:3])}{' …' * (len(n) > 3)}" for what, n in
                 (("lacks", missing), ("also holds", foreign)) if n)
        raise ValueError(f"{folder} is not what its config.json says: it {' and '.join(lists)}")
    with torch.device("meta"):  # shapes without memory: the loaded tensors become the parameters
        model = EncoderDecoder(c)
    for name, parameter in model.named_parameters():
        whole = torch.cat([tensors.pop(part) for part in names[name]]).float()
        if whole.shape != parameter.shape:
            raise ValueError(f"{' + '.join(names[name])} has shape {tuple(whole.shape)}, but config.json says "
                             f"{tuple(parameter.shape)}")
        model.load_state_dict({name: whole}, strict=False, assign=True)
    return model


def save_pretrained(model: EncoderDecoder, folder: str | Path) -> None:
    """Write config.json and pytorch_model.bin that Hugging Face transformers loads, to the same logits."""
    c, folder = model.config, Path(folder)
    if c.absolute:
        raise ValueError("this model, trained from scratch, has absolute positions, and a T5 has none")
    if not c.encoder_layers:
        raise ValueError("this model has no encoder, and a T5 has one")
    tensors = {}
    for ours, theirs in t5_names(c).items():
        whole = model.get_parameter(ours).detach().cpu()
        if c.scaled and ours == "embedding.weight":  # see `embed`
            whole = whole * c.width**0.5
        parts = [part.clone() for part in whole.chunk(len(theirs))]
        if c.scaled and ours.endswith(("qkv.weight", "attention.q.weight")):
            parts[0] *= c.attention_scale
        if ours == "output.weight" and not c.shared_bias:  # transformers 5 scales umT5's untied output, too
            parts[0] *= c.width**0.5
        tensors |= zip(theirs, parts)
    settings = {
        "model_type": "t5" if c.shared_bias else "umt5", "is_encoder_decoder": True,
        "architectures": ["T5ForConditionalGeneration" if c.shared_bias else "UMT5ForConditionalGeneration"],
        "vocab_size": c.vocab_size, "d_model": c.width, "d_kv": c.head_size, "d_ff": c.ff, "num_heads": c.heads,
        "num_layers": c.encoder_layers, "num_decoder_layers": c.decoder_layers, "dropout_rate": c.dropout,
        "feed_forward_proj": "gated-gelu" if c.gated else "relu", "tie_word_embeddings": c.tied or not c.shared_bias,
        "relative_attention_num_buckets": c.buckets, "relative_attention_max_distance": c.max_distance,
        "pad_token_id": c.pad_id, "eos_token_id": c.eos_id, "decoder_start_token_id": c.pad_id}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    torch.save(tensors, folder / "pytorch_model.bin")
