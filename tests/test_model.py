"""model.py: every fast path equals the plain one beside it; decoding equals exhaustive search on toys."""

import gc
import itertools
import math
import weakref

import pytest
import torch

import model as model_module
import warmup
from conftest import assert_near, drawn_logprobs
from model import (
    MASKED,
    SIZES,
    Cache,
    Dropout,
    EncoderDecoder,
    ModelConfig,
    PositionBias,
    TokenLogProbs,
    all_true,
    attention,
    beam_search,
    draw,
    plain_attention,
    plain_token_logprobs,
    rms_norm,
    sample_tokens,
    sinusoids,
)
from warmup import Batch, WarmupSpec, generate, warmup_loss


def tiny_model(seed=0, **changes):
    """A float64 model in eval mode, weights large enough to make its distributions uneven."""
    torch.manual_seed(seed)
    config = dict(
        vocab_size=11,
        width=16,
        heads=2,
        head_size=8,
        ff=32,
        encoder_layers=2,
        decoder_layers=2,
        dropout=0.0,
    )
    model = EncoderDecoder(ModelConfig(**config | changes)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


SOURCE = torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0]])  # the second is padded


# ----------------------------------------------------------------------------- attention


@pytest.mark.parametrize("shared", [True, False])
def test_fused_attention_equals_plain_with_padding_and_bias_forward_and_backward(shared):
    q, k, v = (torch.randn(3, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    padding = torch.zeros(3, 1, 1, 7, dtype=torch.float64)
    padding[1, ..., 4:] = padding[2, ..., 1:] = -1e9
    bias = torch.randn(1 if shared else 3, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    outcomes = []
    for function in (attention, plain_attention):
        out = function(q, k, v, bias + padding, 0.35)
        outcomes.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v, bias))])
    for fused, plain in zip(*outcomes):
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)


def test_t5s_attention_does_not_divide_by_sqrt_d():
    assert (
        ModelConfig(scaled=False).attention_scale == 1.0
        and ModelConfig(head_size=64).attention_scale == 1 / 8
    )
    q = torch.tensor([[[[2.0, 0.0]]]])
    k = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    out = attention(q, k, torch.eye(2)[None, None], torch.zeros(1, 1, 1, 2), 1.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([2.0, 0.0]).softmax(0))


def test_t5s_norm_keeps_the_mean_and_has_no_bias():
    x, norm = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), rms_norm(ModelConfig(width=4))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 1.0, 2.0, 0.5]))
    by_hand = x / 7.5**0.5 * torch.tensor([1.0, 1.0, 2.0, 0.5])  # 30 / 4, the mean square
    torch.testing.assert_close(norm(x), by_hand, rtol=1e-6, atol=1e-6)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
    tiny = norm(torch.full((1, 4), 1e-3))[0, 0]  # 1e-6 is added to a mean square of 1e-6
    assert tiny.item() == pytest.approx(0.5**0.5)


def test_folded_cross_attention_equals_repeated():
    """K rows that share a memory compute what K rows with K copies of it do, forward and gradient."""
    model, K = tiny_model(), 3
    tokens = torch.randint(2, 11, (2 * K, 5))
    weight = torch.randn(2 * K, 5, 16, dtype=torch.float64)
    outcomes = []
    for source in (SOURCE, SOURCE.repeat_interleave(K, 0)):
        hidden = model.decode(tokens, model.encode(source))
        outcomes.append(
            [hidden, *torch.autograd.grad((hidden * weight).sum(), list(model.parameters()))]
        )
    for folded, repeated in zip(*outcomes):
        torch.testing.assert_close(folded, repeated, rtol=1e-9, atol=1e-9)


def test_decode_refuses_rows_that_do_not_fit_the_examples():
    model = tiny_model()
    with pytest.raises(ValueError, match="multiple"):
        model.decode(torch.zeros(3, 2, dtype=torch.long), model.encode(SOURCE))


def test_position_buckets_are_t5s():
    """Reference values of T5: 32 buckets, max distance 128 (worked out by hand from the paper's rule)."""
    c = ModelConfig(heads=1)
    two_way, causal = PositionBias(c, True), PositionBias(c, False)
    distance = torch.tensor([0, -1, -7, -8, -15, -127, -1000, 1, 7, 8, 1000])
    assert two_way.bucket(distance).tolist() == [0, 1, 7, 8, 9, 15, 15, 17, 23, 24, 31]
    with torch.no_grad():  # each bucket's bias is its number
        two_way.weight.copy_(torch.arange(32.0)[:, None])
        causal.weight.copy_(torch.arange(32.0)[:, None])
    assert two_way(3).tolist() == [[[[0, 17, 18], [1, 0, 17], [2, 1, 0]]]]
    future = torch.tensor(MASKED).item()
    assert causal(3).tolist() == [[[[0, future, future], [1, 0, future], [2, 1, 0]]]]
    assert causal.bucket(distance).tolist() == [0, 1, 7, 8, 15, 31, 31, 1, 7, 8, 31]


# ----------------------------------------------------------------------------- the whole model


def test_the_bias_of_positions_follows_its_model_to_another_device():
    bias = PositionBias(ModelConfig(heads=1), True)
    assert bias(3).device.type == "cpu" and bias.to("meta")(3).device.type == "meta"


def test_sinusoids_by_hand_and_from_any_start():
    """Sines, then cosines, of wavelengths from 2π on. A later part is a part of the whole."""
    whole = sinusoids(torch.zeros(1, 9, 4), 0)
    slow = 1 / 100  # 10000 ** (-2 / 4)
    rows = [[math.sin(t), math.sin(t * slow), math.cos(t), math.cos(t * slow)] for t in range(9)]
    torch.testing.assert_close(whole, torch.tensor(rows))
    assert torch.equal(sinusoids(torch.zeros(1, 4, 4), 5), whole[5:])


def test_padding_changes_nothing():
    """A row alone equals the row in a padded batch, in the encoder and in the decoder."""
    model, tokens = tiny_model(), torch.tensor([[0, 3, 4, 5, 6], [0, 7, 8, 0, 0]])
    together = model.decode(tokens, model.encode(SOURCE))[1, :3]
    alone = model.decode(tokens[1:, :3], model.encode(SOURCE[1:, :2]))[0]
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_decoder_cannot_see_the_future():
    model, tokens = tiny_model(), torch.tensor([[0, 3, 4, 5]])
    memory = model.encode(SOURCE[:1])
    changed = tokens.clone()
    changed[0, 3] = 9
    before, after = model.decode(tokens, memory)[0], model.decode(changed, memory)[0]
    assert torch.equal(before[:3], after[:3]) and not torch.allclose(before[3], after[3])


@pytest.mark.parametrize("shared_bias", [True, False])
def test_cached_decoding_equals_uncached(shared_bias):
    """One token at a time, then reordered and expanded rows, give what one pass over all tokens gives."""
    model = tiny_model(shared_bias=shared_bias)
    with torch.no_grad():
        memory, tokens = model.encode(SOURCE), torch.randint(2, 11, (2, 6))
        cache = Cache(model.decoder, 6)
        steps = [model.decode(tokens[:, :2], memory, cache)]
        steps += [model.decode(tokens[:, t : t + 1], memory, cache) for t in (2, 3)]
        torch.testing.assert_close(
            torch.cat(steps, 1), model.decode(tokens[:, :4], memory), rtol=1e-10, atol=1e-10
        )
        cache.select(torch.tensor([0, 0, 1, 1]))  # two rows per example
        cache.select(torch.tensor([1, 0, 2, 2]))  # as beams do
        more = torch.randint(2, 11, (4, 2))
        stepped = torch.cat([model.decode(more[:, t : t + 1], memory, cache) for t in (0, 1)], 1)
        full = torch.cat([tokens[[0, 0, 1, 1], :4], more], 1)
        torch.testing.assert_close(
            stepped, model.decode(full, memory)[:, 4:], rtol=1e-10, atol=1e-10
        )


def test_zero_encoder_layers_and_gated_untied_variants_run():
    for changes in (dict(encoder_layers=0), dict(gated=True, tied=False), dict(scaled=False)):
        model = tiny_model(**changes)
        hidden = model.decode(torch.tensor([[0, 3], [0, 4]]), model.encode(SOURCE))
        assert model.logits(hidden).shape == (2, 2, 11) and hidden.isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [100, 8000])
def test_initial_loss_is_near_ln_v(tied, vocab_size):
    torch.manual_seed(0)
    model = EncoderDecoder(ModelConfig(vocab_size=vocab_size, tied=tied, **SIZES["tiny"])).eval()
    source, target = torch.randint(2, vocab_size, (2, 16, 10))
    with torch.no_grad():
        hidden = model.decode(target.roll(1, 1), model.encode(source))
        loss = -model.token_logprobs(hidden.flatten(0, 1), target.flatten()).mean().item()
    assert abs(loss - math.log(vocab_size)) < (
        0.4 if tied else 0.6
    )  # untied: logits of variance 1 cost half a nat


def test_scaled_weights_compute_what_t5s_do():
    """`scaled` is another way to write T5's function: embeddings / sqrt(E), queries * sqrt(D), same logits."""
    t5, ours = tiny_model(scaled=False, absolute=False), tiny_model(scaled=True, absolute=False)
    weights = {name: p.clone() for name, p in t5.state_dict().items()}
    weights["embedding.weight"] /= 16**0.5
    for name in weights:
        if name.endswith("qkv.weight"):
            weights[name][:16] *= 8**0.5
        if name.endswith(".q.weight"):
            weights[name] *= 8**0.5
    ours.load_state_dict(weights)
    tokens = torch.tensor([[0, 3, 4], [0, 5, 6]])
    a, b = (model.logits(model.decode(tokens, model.encode(SOURCE))) for model in (t5, ours))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("p, dropped", [(0.25, 64), (0.1, 26)])
def test_dropout_keeps_the_mean_and_drops_the_share_it_says(p, dropped):
    """The share is p rounded to 1/256. What is kept is scaled by just that, not by 1/(1-p)."""
    torch.manual_seed(0)
    dropout, x = Dropout(p), torch.ones(999, 1001)
    out = dropout(x)
    assert sorted(out.unique().tolist()) == pytest.approx([0, 256 / (256 - dropped)], rel=1e-6)
    assert (out == 0).float().mean().item() == pytest.approx(dropped / 256, abs=2e-3)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("decoder", [False, True])
def test_dropout_stands_where_t5_has_it(decoder, gated, monkeypatch):
    """Before the first block, behind each part of a block and within ff, and behind the last norm.

    Twice the input stands for a draw. Then the whole stack by hand.
    """
    model = tiny_model(gated=gated)
    memory, tokens = model.encode(SOURCE), torch.tensor([[0, 4, 5], [0, 6, 7]])
    monkeypatch.setattr(Dropout, "forward", lambda self, x: 2 * x)
    stack = model.decoder if decoder else model.encoder
    biases, x = stack.position_biases(3), 2 * model.embed(tokens)
    for layer, block in enumerate(stack.blocks):
        x = x + 2 * block.self_attention(block.self_norm(x), biases[0], None, layer)
        if decoder:
            seen = block.cross_attention(block.cross_norm(x), memory.kv[layer], memory.bias)
            x = x + 2 * seen
        ff = block.feed_forward
        inner = ff.up(block.ff_norm(x))
        if gated:
            gate, value = inner.chunk(2, -1)
            inner = torch.nn.functional.gelu(gate, approximate="tanh") * value
        else:
            inner = inner.relu()
        x = x + 2 * ff.down(2 * inner)
    expected = 2 * stack.norm(x)
    ours = stack(model.embed(tokens), biases, memory if decoder else None)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_dropout_gradient_uses_the_same_mask():
    x = torch.randn(64, 65, requires_grad=True)
    out = Dropout(0.5)(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad * x, out)


@pytest.mark.parametrize("layers", [0, 2])
def test_recomputing_a_layer_changes_no_gradient(layers):
    """Dropout on: the second pass must draw the same masks as the first. And it does keep less."""
    c = ModelConfig(
        vocab_size=20,
        width=16,
        heads=2,
        head_size=8,
        ff=32,
        encoder_layers=layers,
        decoder_layers=2,
        dropout=0.3,
    )
    torch.manual_seed(0)
    model, gradients, kept = EncoderDecoder(c), [], []
    for model.encoder.recompute, model.decoder.recompute in ((False, False), (True, True)):
        torch.manual_seed(1)
        count = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: count.append(x.numel()) or x, lambda x: x
        ):
            logits = model.logits(
                model.decode(torch.tensor([[0, 3, 4, 5]] * 2), model.encode(SOURCE % 20))
            )
        gradients.append(
            torch.autograd.grad(
                logits.logsumexp(-1).sum(), list(model.parameters()), allow_unused=True
            )
        )
        kept.append(sum(count))
    for once, twice in zip(*gradients):
        assert (once is None) == (twice is None) and (once is None or torch.equal(once, twice))
    assert kept[1] < kept[0] / 2


# ----------------------------------------------------------------------------- log-probs


def chunks_of(monkeypatch, tokens, vocab_size, kept):
    """At most so many tokens' logits at once; all of them are kept for the backward pass, or none."""
    monkeypatch.setattr(model_module, "CHUNK", tokens * vocab_size)
    monkeypatch.setattr(model_module, "KEPT", 2**30 if kept else 0)


@pytest.mark.parametrize("forbidden", [None, [0, 3]])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("chunk", [5, 7, 64])
def test_chunked_logprobs_equal_plain_forward_and_gradient(forbidden, kept, chunk, monkeypatch):
    """Whatever the chunk (a divisor, not a divisor, more than all tokens): same numbers."""
    torch.manual_seed(0)
    chunks_of(monkeypatch, chunk, 50, kept)
    model = EncoderDecoder(ModelConfig(vocab_size=50, **SIZES["nano"]))
    hidden = torch.randn(20, 64, requires_grad=True)
    targets, weight = torch.randint(4, 50, (20,)), torch.randn(20)
    never = None if forbidden is None else torch.tensor(forbidden)
    fast = model.token_logprobs(hidden, targets, temperature=0.7, forbidden=never)
    plain = plain_token_logprobs(hidden / 0.7, model.embedding.weight, targets, never)
    assert_near(fast, plain)
    gradients = [
        torch.autograd.grad((x * weight).sum(), (hidden, model.embedding.weight))
        for x in (fast, plain)
    ]
    for a, b in zip(*gradients):
        assert_near(a, b)


CASES = {  # CHUNK and KEPT of 20 tokens at V = 50; how many chunks are made: forward, backward
    "one chunk": (1000, 1000, [20], []),
    "several, kept": (350, 1000, [7, 7, 6], []),
    "several, computed again": (350, 999, [7, 7, 6], [7, 7, 6]),
}


@pytest.mark.parametrize("case", CASES)
def test_logprobs_equal_plain_and_survive_a_second_backward(case, monkeypatch):
    """Regression guard: the kept buffer is overwritten by the first backward and must not be used again."""
    torch.manual_seed(0)
    chunk, kept, forward, backward = CASES[case]
    made, one_chunk = [], model_module.one_chunk
    monkeypatch.setattr(model_module, "CHUNK", chunk)
    monkeypatch.setattr(model_module, "KEPT", kept)

    def watched(rows, *inputs):
        out = one_chunk(rows, *inputs)
        made.append(len(out[0]))
        return out

    monkeypatch.setattr(model_module, "one_chunk", watched)
    hidden = torch.randn(20, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    targets, g, never = torch.randint(4, 50, (20,)), torch.randn(20), torch.tensor([0, 3])
    plain = plain_token_logprobs(hidden, weight, targets, never)
    fast = TokenLogProbs.apply(hidden, weight, targets, never)
    assert_near(fast, plain)
    assert made == forward
    expected = torch.autograd.grad(plain, (hidden, weight), g)
    first = torch.autograd.grad(fast, (hidden, weight), g, retain_graph=True)
    assert made == forward + backward
    second = torch.autograd.grad(fast, (hidden, weight), g, retain_graph=True)
    third = torch.autograd.grad(fast, (hidden, weight), g)
    for a, b, c, d in zip(first, second, third, expected):
        assert_near(a, d)
        assert torch.equal(a, b) and torch.equal(a, c)


def test_the_gradient_of_many_chunks_adds_up_in_float32(monkeypatch):
    """In bfloat16, 128 chunks: an error of 0.2 % of the largest element. Added up in bfloat16: 1.2 %."""
    torch.manual_seed(0)
    monkeypatch.setattr(model_module, "CHUNK", 16 * 8)
    hidden, weight = torch.randn(1024, 8).bfloat16(), torch.randn(16, 8).bfloat16()
    targets = torch.randint(0, 16, (1024,))
    exact, ours = weight.double().requires_grad_(), weight.clone().requires_grad_()
    plain_token_logprobs(hidden.double(), exact, targets).sum().backward()
    TokenLogProbs.apply(hidden, ours, targets, None).sum().backward()
    assert (ours.grad.double() - exact.grad).abs().max() < 0.005 * exact.grad.abs().max()


def test_plain_logprobs_are_torchs_cross_entropy():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(6, 8), torch.randn(9, 8), torch.randint(2, 9, (6,))
    logits = hidden @ weight.T
    for never in (None, torch.tensor([0, 1])):
        ours = -plain_token_logprobs(hidden, weight, targets, never)
        allowed, first = (logits, 0) if never is None else (logits[:, 2:], 2)  # 0 and 1 are gone
        torchs = torch.nn.functional.cross_entropy(allowed, targets - first, reduction="none")
        torch.testing.assert_close(ours, torchs)


# ----------------------------------------------------------------------------- decoding


def teacher_forced(model, memory, prefix, tokens):
    """log-probs of tokens (N,L) after prefix (N,P), from the full softmax: (N,L)."""
    hidden = model.decode(torch.cat([prefix, tokens], 1), memory)[:, prefix.size(1) - 1 : -1]
    return model.logits(hidden).log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)


def test_the_sampler_draws_by_the_probabilities_that_teacher_forcing_gives():
    model, prefix = tiny_model(), torch.tensor([[0, 2], [0, 3]])
    with torch.no_grad(), drawn_logprobs() as drawn:
        memory = model.encode(SOURCE)
        tokens = sample_tokens(model, memory, prefix, 5, samples=3)
        forced = teacher_forced(model, memory, prefix.repeat_interleave(3, 0), tokens.view(6, 5))
    torch.testing.assert_close(torch.cat(drawn, 1), forced, rtol=1e-10, atol=1e-10)


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_draw_follows_the_distribution(device):
    """200,000 draws from each of two rows, which need not sum to 1: 4 standard errors at most."""
    torch.manual_seed(0)
    n = 200_000
    probs = torch.tensor([[0.0, 3.0, 0.0, 0.5, 1e-3, 6.0, 0.0], [0.2] * 7], device=device)
    tokens = draw(probs.repeat_interleave(n, 0))
    assert tokens.shape == (2 * n, 1)
    for row, p in zip(tokens.view(2, n).cpu(), (probs / probs.sum(1, keepdim=True)).cpu()):
        seen = torch.bincount(row, minlength=7) / n
        assert ((seen - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()
        assert (seen[p == 0] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_draw_gives_a_token_even_if_the_model_has_broken(device):
    """The gradient is then reported as nan; on CUDA an id out of range would end the process."""
    probs = torch.full((3, 5), torch.nan, device=device)
    tokens = draw(probs)
    assert ((0 <= tokens) & (tokens < 5)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("u", ["lowest", "any", "highest"])
def test_draw_never_takes_a_token_of_probability_0(device, u, monkeypatch):
    """At the ends of the random range, too, and where a sum of many small numbers is rounded."""
    ends = {
        "lowest": lambda *shape, **how: torch.zeros(*shape, **how),
        "highest": lambda *shape, **how: torch.full(shape, 1 - 2**-24, **how),
    }
    torch.manual_seed(0)
    probs = torch.rand(400, 5000, device=device) ** 8
    probs[torch.rand(400, 5000, device=device) < 0.9] = 0.0
    probs[:, 0] = probs[:, -1] = 0.0
    probs[:200, 2500] = 1000.0  # small numbers beside a large one
    if u in ends:
        monkeypatch.setattr(torch, "rand", ends[u])
    for _ in range(20):
        tokens = draw(probs)
        assert (probs.gather(1, tokens) > 0).all()


def test_samples_follow_the_distribution():
    """20,000 draws of one token: every frequency within 4 standard errors; forbidden tokens never appear."""
    model, n = tiny_model(), 20_000
    torch.manual_seed(1)
    with torch.no_grad():
        memory = model.encode(SOURCE[:1])
        tokens = sample_tokens(
            model,
            memory,
            torch.tensor([[0]]),
            1,
            samples=n,
            forbidden=torch.tensor([3]),
            temperature=0.8,
        )
        logits = model.logits(model.decode(torch.tensor([[0]]), memory))[0, -1] / 0.8
    logits[3] = -torch.inf
    p, seen = logits.softmax(0), torch.bincount(tokens.flatten(), minlength=11) / n
    assert seen[3] == 0
    assert ((seen - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 1e-9).all()


class OnGPU:
    """As much of a tensor on a GPU as all_true uses. It counts the looks."""

    is_cuda, looks = True, 0

    def all(self):
        self.looks += 1
        return True


def test_decoding_looks_at_a_gpu_only_every_8th_step():
    done = OnGPU()
    assert [step for step in range(20) if all_true(done, step)] == [7, 15] and done.looks == 2
    on_cpu = torch.tensor([True, True])
    assert all(all_true(on_cpu, step) for step in range(20))
    assert not all_true(torch.tensor([True, False]), 7)


def test_a_late_look_changes_no_result(monkeypatch):
    """Rows that are done write what is forced: as well to stop at once as seven steps later."""
    model, source = tiny_model(), torch.randint(3, 11, (3, 5))
    memory, start = model.encode(source), torch.zeros(3, 1, dtype=torch.long)
    found = []
    for looks in (all_true, lambda done, step: False):
        monkeypatch.setattr("model.all_true", looks)
        torch.manual_seed(0)
        found += [
            (
                *beam_search(model, memory, start, 12, beams=1),
                *beam_search(model, memory, start, 12, beams=3),
            )
        ]
    for at_once, late in zip(*found):
        assert torch.equal(at_once, late)


def test_greedy_takes_the_likeliest_token():
    model, prefix = tiny_model(), torch.tensor([[0], [0]])
    with torch.no_grad():
        memory = model.encode(SOURCE)
        tokens = sample_tokens(model, memory, prefix, 4, temperature=0)[:, 0]
        hidden = model.decode(torch.cat([prefix, tokens], 1), memory)[:, :-1]
        assert torch.equal(model.logits(hidden).argmax(-1), tokens)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_wide_beam_equals_exhaustive_search(length_penalty):
    """With V**T beams nothing is pruned: the best of all sequences, those that end early included, wins."""
    V, T, eos = 5, 3, 1
    for seed in range(4):
        model, prefix = tiny_model(seed, vocab_size=V), torch.tensor([[0], [0]])
        source = torch.tensor([[2, 3, 4], [4, 2, 0]])
        complete = [
            s
            for n in range(1, T + 1)
            for s in itertools.product(range(V), repeat=n)
            if eos not in s[:-1] and (s[-1] == eos or n == T)
        ]
        with torch.no_grad():
            memory = model.encode(source)
            tokens, scores = beam_search(
                model, memory, prefix, T, beams=V**T, length_penalty=length_penalty
            )
            for row in range(2):
                one = model.encode(source[row : row + 1])
                expected = {
                    s: teacher_forced(model, one, prefix[:1], torch.tensor([s])).sum().item()
                    / len(s) ** length_penalty
                    for s in complete
                }
                best = max(expected, key=expected.get)
                assert tokens[row, 0].tolist() == [*best, *[0] * (T - len(best))]
                assert scores[row, 0].item() == pytest.approx(expected[best], abs=1e-5)


def test_beams_do_not_mix_examples():
    """A batch decodes to what its rows decode to alone."""
    model, prefix = tiny_model(3), torch.tensor([[0], [0]])
    with torch.no_grad():
        together, _ = beam_search(model, model.encode(SOURCE), prefix, 6, beams=3)
        alone, _ = beam_search(model, model.encode(SOURCE[1:, :2]), prefix[1:], 6, beams=3)
    assert torch.equal(together[1], alone[0])


@pytest.mark.parametrize("seed", range(5))
def test_one_beam_is_greedy(seed):
    model, prefix = tiny_model(seed), torch.tensor([[0], [0]])
    with torch.no_grad():
        memory = model.encode(SOURCE)
        beam = beam_search(model, memory, prefix, 6, beams=1)[0][:, 0]
        greedy = sample_tokens(model, memory, prefix, 6, temperature=0)[:, 0]
    ended = (greedy == 1).cumsum(1) - (greedy == 1).long()  # </s> came before
    assert torch.equal(beam, greedy.masked_fill(ended > 0, 0))


def test_overfits_one_batch():
    """100 updates on 8 pairs bring the loss from ln V to almost nothing: the gradient reaches everything."""
    torch.manual_seed(0)
    model = EncoderDecoder(ModelConfig(vocab_size=40, dropout=0.0, **SIZES["nano"]))
    source, target = torch.randint(2, 40, (2, 8, 6))
    inputs = torch.cat([torch.zeros(8, 1, dtype=torch.long), target[:, :-1]], 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        loss = -model.token_logprobs(
            model.decode(inputs, model.encode(source)).flatten(0, 1), target.flatten()
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# ----------------------------------------------------------------------------- memory


def test_nothing_keeps_a_model_alive():
    """No cache of the program holds a model, its parts or its tables once it is gone."""
    model = tiny_model()
    memory = model.encode(SOURCE)
    spec = WarmupSpec(3, (0, 1, 2, 3), 2)
    batch = Batch(SOURCE, torch.tensor([[4], [4]]), torch.tensor([[5, 1], [6, 1]]))
    model.decoder.eval()
    loss, *_ = warmup_loss(model, batch, spec, "marginal", 2)
    loss.backward()
    generate(model, batch, spec, 4, beams=2)
    del memory, loss
    seen = [weakref.ref(part) for part in model.modules()]
    seen += [weakref.ref(parameter) for parameter in model.parameters()]
    assert len(seen) > 40
    del model, batch
    gc.collect()
    assert [ref() for ref in seen if ref() is not None] == []


def test_no_method_has_a_cache():
    """functools.lru_cache on a method keeps its object."""
    for module in (model_module, warmup):
        for name, thing in vars(module).items():
            if isinstance(thing, type):
                assert not [m for m in vars(thing).values() if hasattr(m, "cache_info")], name
