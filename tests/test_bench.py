"""The floor's arithmetic (tests/bench.py), and train.py's, against torch's own count of FLOPs."""

from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import model
from train import policy_flops, sft_flops
from warmup import Batch, WarmupSpec, sample_warmups, sft_loss, warmup_loss


@pytest.mark.parametrize("shape", (dict(), dict(gated=True, tied=False)))
def test_flops_are_what_torch_counts(monkeypatch, shape):
    """Every row, to the last operation. Torch does not count the CPU's fused attention, so the plain one stands in."""
    monkeypatch.setattr(model, "attention", model.plain_attention)
    c = model.ModelConfig(
        vocab_size=50,
        width=24,
        heads=3,
        head_size=6,
        ff=40,
        encoder_layers=2,
        decoder_layers=3,
        **shape,
    )
    batch = Batch(
        torch.randint(3, 50, (2, 5)),
        torch.empty(2, 0, dtype=torch.long),
        torch.randint(3, 50, (2, 7)),
    )
    side, expected = bench.Ours(model.EncoderDecoder(c)), bench.work(c, 2, 5, 7)
    for row in ("sft", "warmup", "half", "quarter", "sample", "beam"):
        with FlopCounterMode(display=False) as counter:
            getattr(side, row)(batch)
        assert counter.get_total_flops() == expected[row][0], row
    with FlopCounterMode(display=False) as counter:
        side.warmup(batch, K=3, W=2)
    assert counter.get_total_flops() == bench.work(c, 2, 5, 7, K=3, W=2)["warmup"][0]


def test_flops_and_bytes_of_the_loss_and_of_an_update():
    c = model.ModelConfig(vocab_size=50, width=24, encoder_layers=0, decoder_layers=0)
    side = bench.Ours(model.EncoderDecoder(c))
    with FlopCounterMode(display=False) as counter:
        side.loss(Batch(torch.randn(9, 24), torch.empty(9, 0), torch.randint(50, (9,))))
    assert counter.get_total_flops() == bench.work(c, 9, 24, 9)["loss"][0]
    c = model.ModelConfig(**model.SIZES["small"])
    matrices = [
        p
        for name, p in model.EncoderDecoder(c).named_parameters()
        if p.dim() == 2 and "biases" not in name
    ]
    assert bench.work(c, 1, 1, 1)["sft"][1] == 28 * sum(p.numel() for p in matrices)


def test_every_row_runs_on_both_sides_which_do_the_same_work(monkeypatch):
    """`check`: the loss, and the scores of our samples, are those of Hugging Face's T5."""
    pytest.importorskip("transformers", reason="the other side: pip install transformers")
    monkeypatch.setitem(bench.SHAPES, "two", (model.SIZES["nano"], 50, 3, 5, 7))
    c, batch = bench.inputs("two", "cpu")
    sides = bench.both("two", c, "cpu", compiled=False)
    assert "at most" in bench.check(*sides, batch)
    for row in set(bench.ROWS) - {"loss"}:
        for side in sides:
            getattr(side, row)(batch)


def test_our_side_writes_what_the_rows_say():
    c = model.ModelConfig(vocab_size=50, **model.SIZES["nano"])
    side = bench.Ours(model.EncoderDecoder(c))
    batch = Batch(torch.randint(3, 50, (3, 5)), torch.empty(3, 0, dtype=torch.long), None)
    assert side.sample(batch).shape == (3, bench.SAMPLES, bench.LENGTH)
    tokens, scores = side.beam(batch)
    assert tokens.shape == (3, bench.BEAMS, bench.WRITTEN) and scores.shape == (3, bench.BEAMS)


@pytest.mark.parametrize("shape", (dict(), dict(gated=True, tied=False, encoder_layers=0)))
@pytest.mark.parametrize("prompt", [0, 3])
def test_the_flops_of_equal_compute_are_what_torch_counts(monkeypatch, shape, prompt):
    """train.py's to 3 %, with padding and prompts: SFT, sampled and given warmups."""
    monkeypatch.setattr(model, "attention", model.plain_attention)
    c = model.ModelConfig(
        **dict(
            vocab_size=500,
            width=96,
            heads=3,
            head_size=24,
            ff=160,
            encoder_layers=2,
            decoder_layers=3,
        )
        | shape
    )
    batch = Batch(*(torch.randint(3, 500, (2, n)) for n in (5, prompt, 7)))
    batch.source[0, 4:] = batch.target[1, 3:] = 0
    net = model.EncoderDecoder(c).eval()
    pause, sampled = (WarmupSpec(2, (0, 1, 2), 4, pause=pause) for pause in (True, False))
    repeating = WarmupSpec(2, (0, 1, *range(2, 499)), 4)  # one token is left
    updates = {  # loss: what train.py counts for it
        lambda: sft_loss(net, batch): lambda: sft_flops(net, batch),
        lambda: warmup_loss(net, batch, sampled, "marginal", 3).loss: lambda: policy_flops(
            net, batch, sampled, torch.tensor([3, 3]), 3
        ),
        lambda: warmup_loss(net, batch, pause, "frozen", 1).loss: lambda: policy_flops(
            net, batch, pause, torch.tensor([1, 1]), 0
        ),
        lambda: warmup_loss(net, batch, repeating, "marginal", 3).loss: lambda: policy_flops(
            net, batch, repeating, torch.tensor([1, 1]), 3
        ),
    }

    def unequal(*args):
        """All samples of the first example are alike, all of the second differ."""
        c = sample_warmups(*args)
        c[0], c[1, :, 0] = c[0, :1], torch.tensor([5, 6, 7])
        return c

    def some_alike():
        with mock.patch("warmup.sample_warmups", unequal):
            return warmup_loss(net, batch, sampled, "marginal", 3).loss

    updates[some_alike] = lambda: policy_flops(net, batch, sampled, torch.tensor([1, 3]), 3)
    for number, (loss, ours) in enumerate(updates.items()):
        with FlopCounterMode(display=False) as counter:
            loss().backward()
        assert ours() == pytest.approx(counter.get_total_flops(), rel=0.03), number
