"""Speed beside Hugging Face T5 on the same shapes: python tests/bench.py (needs pip install transformers).

Not a test: prints ratios, never fails. Each pair runs in turn, ours then theirs, and the median ratio counts;
absolute times are this machine's. Both models have random weights and the same configuration.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import SIZES, EncoderDecoder, ModelConfig, beam_search, sample  # noqa: E402
from train import make_optimizer  # noqa: E402
from warmup import Batch, sft_loss  # noqa: E402


def hugging_face(c: ModelConfig):
    """transformers' T5 of the same shape."""
    try:
        from transformers import T5Config, T5ForConditionalGeneration
    except ImportError:
        sys.exit("the comparison needs: pip install transformers")
    return T5ForConditionalGeneration(T5Config(
        vocab_size=c.vocab_size, d_model=c.width, d_kv=c.head_size, d_ff=c.ff, num_layers=c.encoder_layers,
        num_decoder_layers=c.decoder_layers, num_heads=c.heads, dropout_rate=c.dropout, feed_forward_proj="relu",
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))


def pair(name: str, ours, theirs, repeats: int) -> None:
    """Run both in turn, print medians and the median of the paired ratios."""
    times = []
    for i in range(repeats + 1):
        row = []
        for call in (ours, theirs):
            start = time.perf_counter()
            call()
            row.append(time.perf_counter() - start)
        if i:  # the first round warms the machine up
            times.append(row)
    ratio = statistics.median(b / a for a, b in times)
    a, b = (statistics.median(column) for column in zip(*times))
    low, high = min(b / a for a, b in times), max(b / a for a, b in times)
    print(f"{name:44}{a * 1e3:9.0f} ms{b * 1e3:9.0f} ms{ratio:8.2f}x   ({low:.2f} to {high:.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dropout", type=float, default=0.1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    B, S, T, V, K, W = 64, 20, 20, 8000, 4, 8
    c = ModelConfig(vocab_size=V, dropout=args.dropout, **SIZES["small"])
    ours, theirs = EncoderDecoder(c), hugging_face(c)
    source, target = torch.randint(4, V, (B, S)), torch.randint(4, V, (B, T))  # no padding: the same work for both
    batch = Batch(source, torch.empty(B, 0, dtype=torch.long), target)
    start, attend = torch.zeros(B, 1, dtype=torch.long), torch.ones_like(source)
    print(f"torch {torch.__version__}, {args.threads} threads, dropout {args.dropout}, "
          f"V={V} E={c.width} layers=4+4 B={B} S={S} T={T}\n{'':44}{'ours':>12}{'HF T5':>12}{'ratio':>9}")

    optimizers = make_optimizer(ours, 0.01), torch.optim.AdamW(theirs.parameters(), fused=True)  # the same for both

    def step(loss, model, optimizer):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    ours.train(), theirs.train()
    pair("SFT step", lambda: step(sft_loss(ours, batch) / target.numel(), ours, optimizers[0]),
         lambda: step(theirs(input_ids=source, attention_mask=attend, labels=target).loss, theirs, optimizers[1]),
         args.repeats)

    ours.eval(), theirs.eval()
    no_end = torch.tensor([0, 1])  # </s> barred on both sides, so that both write every token

    def encode():
        with torch.no_grad():
            return ours.encode(source)

    for top_k in (50, 0):  # 50 is the default of generate; 0 samples the full distribution, as ours does
        pair(f"sample K={K} of {W} tokens, {B} sources (HF top_k={top_k})",
             lambda: sample(ours, encode(), start, W, samples=K, forbidden=no_end),
             lambda: theirs.generate(input_ids=source, attention_mask=attend, do_sample=True, top_k=top_k, num_return_sequences=K,
                                     min_new_tokens=W, max_new_tokens=W), args.repeats)
    pair("beam 4, 24 tokens", lambda: beam_search(ours, encode(), start, 24, beams=4, forbidden=no_end),
         lambda: theirs.generate(input_ids=source, attention_mask=attend, num_beams=4, min_new_tokens=24,
                                 max_new_tokens=24), max(3, args.repeats // 2))


if __name__ == "__main__":
    main()
