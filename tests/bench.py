"""Speed and memory beside Hugging Face T5, and beside what the machine allows. Not a test: prints a table in markdown.

    pip install transformers && python tests/bench.py
    python tests/bench.py --shapes t5-base mt5-base --rows sft warmup
    python tests/bench.py --bfloat16                   products in bfloat16 by autocast, on both sides
    python tests/bench.py --rows sft --compiled        the SFT step also by torch.compile
    python tests/bench.py --gpu                        on CUDA, in bfloat16, the SFT step also compiled
    python tests/bench.py --picture docs/cost.png      instead: how a warmup step's time grows
                                                       (pip install matplotlib)

Both sides have the same weights (T5's, random) and read the same tokens, no padding; `check` sees first that they
compute the same. Times are medians of calls in turn (ours, theirs, ours, ...; the first round is dropped, the fourth is
the last once 2 minutes are over), ratios are medians over rounds. Floor: the larger of FLOPs / matmul rate and bytes /
copy rate, the counts from `work`, the rates measured before and after the rows. Peak memory is what one call adds: on
a CPU the highest resident size less that before the call, in a fresh process that holds weights and optimizer state
and has done the same for one example (so gradients count, AdamW's moments do not); on a GPU the same of torch.cuda's
allocations.
"""

import argparse
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import (
    SIZES,
    EncoderDecoder,
    ModelConfig,
    beam_search,  # noqa: E402
    compile_stacks,
    decoding,
    plain_token_logprobs,
    sample_tokens,
    save_pretrained,
)
from train import make_optimizer  # noqa: E402
from warmup import (
    Batch,
    WarmupSpec,
    marginal,
    sample_warmups,
    score,  # noqa: E402
    sft_loss,
    warmup_loss,
)

SAMPLES, LENGTH, BEAMS, WRITTEN = 4, 8, 4, 24
SEP, FORBIDDEN = 2, (0, 1, 2)  # pad, </s>, <sep>: on both sides, so that both write every token
SHAPES = {  # size, V, B, S, T
    "small": (SIZES["small"], 8000, 64, 20, 20),
    "t5-small": (SIZES["t5-small"], 32128, 16, 32, 32),
    "t5-base": (SIZES["t5-base"], 32128, 8, 32, 32),
    "mt5-base": (SIZES["t5-base"] | dict(ff=2048, gated=True, tied=False), 250112, 4, 32, 32),
}
LOSSES = {"V = 32,128": 32128, "V = 250,112": 250112}  # the row `loss` has no layers, only these
ROWS = {
    "sft": "SFT step",  # forward, backward, clip, fused AdamW. Dropout 0.1; Hugging Face drops attention weights, too
    "warmup": f"warmup step, K = {SAMPLES}, W = {LENGTH}",  # the same without dropout, against the naive recipe
    "half": "the same, half of the samples distinct",  # what repeats is scored once; the naive recipe scores all
    "quarter": "the same, all samples alike",
    "recompute": "warmup step with --recompute",  # of ours; the naive recipe as it is
    "sample": f"sample {SAMPLES} × {LENGTH} tokens",  # from the full softmax, the encoder included
    "beam": f"beam {BEAMS}, {WRITTEN} tokens",  # the encoder included
    "loss": "loss of 4,096 tokens",  # token_logprobs and its gradients, against plain_token_logprobs
}
TARGETS = {
    "sft": "share 78%",
    "warmup": "share 82%",
    "half": 2.5,
    "sample": "share 68%",
    "beam": "share 60%",
}


# ----------------------------------------------------------------------------- the floor


def work(
    c: ModelConfig, B: int, S: int, T: int, K: int = SAMPLES, W: int = LENGTH
) -> dict[str, tuple[int, int]]:
    """Row -> (FLOPs of its matrix products, bytes it moves at least).

    2·M·N·K per product; a backward pass is twice its forward. Bytes, 4 a weight: an update reads weight, gradient and
    AdamW's two moments and writes all but the gradient; a decoding step reads the decoder and the output layer.
    Activations and caches are left out: the floor may be too low, never too high.
    """
    E, A, ff, V = c.width, c.heads * c.head_size, c.ff * (3 if c.gated else 2), c.vocab_size
    source = (
        c.encoder_layers * E * (4 * A + ff) + c.decoder_layers * E * 2 * A
    )  # weights: encoder, cross keys, values
    target = c.decoder_layers * E * (6 * A + ff)  # weights: the rest of the decoder
    encode = 2 * B * S * (source + c.encoder_layers * 2 * A * S)

    def decode(rows, length, keys):  # keys: decoder tokens that a token attends to, on average
        return int(2 * rows * length * (target + c.decoder_layers * 2 * A * (keys + S)))

    def write(n, steps):  # the first step reads [start] once per source
        return decode(B, 1, 1) + decode(B * n, steps - 1, 1 + steps / 2) + 2 * B * n * steps * E * V

    update, read = 28 * (source + target + V * E * (1 if c.tied else 2)), 4 * (target + V * E)
    sft = encode + decode(B, T, T) + 2 * B * T * E * V

    def warmup(distinct):  # of the K samples of an example
        rows = B * distinct
        scored = encode + decode(rows, W + 1 + T, W + 1 + T) + 2 * rows * (W + T) * E * V
        return write(K, W) + 3 * scored, update + W * read

    return {
        "sft": (3 * sft, update),
        "warmup": warmup(K),
        "half": warmup(K // 2),
        "quarter": warmup(K // 4),
        "recompute": warmup(K),  # to compute twice is no need
        "sample": (encode + write(K, W), W * read),
        "beam": (encode + write(BEAMS, WRITTEN), WRITTEN * read),
        "loss": (6 * B * E * V, 8 * V * E),
    }  # B tokens


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rates(device: str, *shape: int) -> tuple[float, float, float]:
    """FLOP/s of a large square product, of one of `shape` (M,K,N), and bytes/s of a copy. The best of 6 each."""
    side, dtype = (
        8192 if device == "cuda" else 2048,
        torch.bfloat16 if Ours.bfloat16 else torch.float32,
    )
    found = []
    for m, k, n in ((side, side, side), shape):
        a, b = (torch.randn(size, device=device, dtype=dtype) for size in ((m, k), (k, n)))
        found.append(2 * m * k * n / min(seconds(lambda: a @ b) for _ in range(6)))
    a = torch.zeros(2**26, device=device)
    b = torch.zeros_like(a)
    return *found, 2 * 4 * len(a) / min(seconds(lambda: b.copy_(a)) for _ in range(6))


# ----------------------------------------------------------------------------- the two sides: a method for each row


class Ours:
    def __init__(self, model):
        self.model, self.optimizer = model, make_optimizer(model, 0.01)

    bfloat16 = False  # set by --bfloat16 and --gpu

    def low(self):  # ours without a cache of cast weights, as in train.py
        device = next(self.model.parameters()).device.type
        return torch.autocast(
            device, torch.bfloat16, enabled=Ours.bfloat16, cache_enabled=isinstance(self, Theirs)
        )

    def step(self, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()  # at learning rate 0: every round does the same work
        self.optimizer.zero_grad(set_to_none=True)

    def sft(self, batch):
        with self.low():
            loss = sft_loss(self.model.train(), batch) / batch.target.numel()
        self.step(loss)

    def warmup(self, batch, K=SAMPLES, W=LENGTH, estimator="marginal"):
        with self.low():
            spec = WarmupSpec(SEP, FORBIDDEN, W)
            loss, *_ = warmup_loss(self.model.eval(), batch, spec, estimator, K)
        self.step(loss / batch.target.numel())

    def half(self, batch, distinct=SAMPLES // 2):
        """A warmup step in which the samples of an example are copies of so many."""

        def repeat(*args):
            c = sample_warmups(*args)  # (B,K,W)
            return c[:, [k % distinct for k in range(SAMPLES)]]

        with mock.patch("warmup.sample_warmups", repeat):
            self.warmup(batch)

    def quarter(self, batch):
        self.half(batch, SAMPLES // 4)

    def recompute(self, batch):
        self.model.encoder.recompute = self.model.decoder.recompute = True
        self.warmup(batch)
        self.model.encoder.recompute = self.model.decoder.recompute = False

    def sample(self, batch):
        return self.write(batch, LENGTH, samples=SAMPLES)

    def beam(self, batch):
        return self.write(batch, WRITTEN, beams=BEAMS)

    def write(self, batch, length, **how):
        start = torch.zeros_like(batch.source[:, :1])
        how["forbidden"] = torch.tensor(FORBIDDEN, device=batch.source.device)
        function = beam_search if "beams" in how else sample_tokens
        with self.low(), decoding():
            memory = self.model.eval().encode(batch.source)
            return function(self.model, memory, start, length, **how)

    def loss(self, batch, log_probs=EncoderDecoder.token_logprobs):
        with self.low():
            loss = log_probs(
                self.model, batch.source.detach().requires_grad_(), batch.target
            ).mean()
        loss.backward()
        self.model.zero_grad(set_to_none=True)


class Theirs(Ours):
    """Hugging Face; its warmup step is the naive recipe: generate K times, then score K-fold repeated inputs."""

    def sft(self, batch):
        with self.low():
            loss = self.model.train()(
                input_ids=batch.source, labels=batch.target, use_cache=False
            ).loss
        self.step(loss)

    def warmup(self, batch):
        c = self.sample(batch).view(-1, SAMPLES, LENGTH)  # (B,K,W)
        with self.low():
            log_pi, log_p = self.score(batch, c)
            a, b = marginal(log_p.detach())
            loss = -(a * log_pi + b * log_p).sum() / batch.target.numel()
        self.step(loss)

    half = quarter = recompute = warmup

    def score(self, batch, c):
        """log P(c|x), log P(y|x,c), both (B,K), of c (B,K,W): all inputs repeated K times, all logits held."""
        B, K, W = c.shape
        x, y = (t.repeat_interleave(K, 0) for t in (batch.source, batch.target))  # (N,S), (N,T)
        written = torch.cat([c.flatten(0, 1), torch.full_like(y[:, :1], SEP), y], 1)  # (N,W+1+T)
        read = torch.cat([torch.zeros_like(y[:, :1]), written[:, :-1]], 1)
        out = self.model(input_ids=x, decoder_input_ids=read, use_cache=False)
        logits = out.logits  # (N,W+1+T,V)
        logits[:, :W, list(FORBIDDEN)] = -torch.inf
        log_probs = logits.log_softmax(-1).gather(-1, written[..., None]).squeeze(-1)
        return log_probs[:, :W].sum(1).view(B, K), log_probs[:, W + 1 :].sum(1).view(B, K)

    def write(self, batch, length, samples=1, beams=1):
        with self.low():
            tokens = self.model.eval().generate(
                input_ids=batch.source,
                attention_mask=torch.ones_like(batch.source),
                max_new_tokens=length,
                do_sample=beams == 1,
                top_k=0,
                num_beams=beams,
                num_return_sequences=samples,
                suppress_tokens=list(FORBIDDEN),
            )[:, 1:]
        assert tokens.size(1) == length
        return tokens

    def loss(self, batch):
        super().loss(
            batch,
            lambda model, *args: plain_token_logprobs(args[0], model.embedding.weight, args[1]),
        )


def inputs(shape: str, device: str) -> tuple[ModelConfig, Batch]:
    if shape in LOSSES:  # hidden states stand where the source would
        c = ModelConfig(vocab_size=LOSSES[shape], width=512, encoder_layers=0, decoder_layers=0)
        source, target = torch.randn(4096, c.width), torch.randint(c.vocab_size, (4096,))
    else:
        size, V, B, S, T = SHAPES[shape]
        c = ModelConfig(vocab_size=V, scaled=False, absolute=False, **size)
        source, target = torch.randint(3, V, (B, S)), torch.randint(3, V, (B, T))
    return c, Batch(source, torch.empty(len(source), 0, dtype=torch.long), target).to(device)


def head(batch: Batch, examples: int) -> Batch:
    return Batch(batch.source[:examples], batch.prompt[:examples], batch.target[:examples])


def both(shape: str, c: ModelConfig, device: str, compiled: bool) -> list[Ours]:
    """[ours, theirs] with the same weights; [ours] without transformers."""
    ours = EncoderDecoder(c)
    if shape in LOSSES:
        return [side(ours.to(device)) for side in (Ours, Theirs)]
    need = 36 * sum(
        p.numel() for p in ours.parameters()
    )  # bytes: weights and moments twice, gradients, some more
    if device == "cpu" and need > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise SystemExit(f"two models with AdamW need about {need / 1e9:.0f} GB of memory")
    try:
        from transformers import AutoModelForSeq2SeqLM
    except ImportError:
        return [Ours(ours.to(device))]
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, Path(folder))
        theirs = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="sdpa").to(
            device
        )
    ours.to(device)
    if compiled:
        compile_stacks(ours)
        theirs.compile(dynamic=True)
    return [Ours(ours), Theirs(theirs)]


@torch.no_grad()
def check(ours: Ours, theirs: Theirs, batch: Batch) -> str:
    """SFT loss, and scores of the same warmups: SystemExit if they differ by more than 1e-4 of the largest."""
    spec = WarmupSpec(SEP, FORBIDDEN, LENGTH)
    model, c = ours.model.eval(), ours.sample(batch)
    loss = theirs.model.eval()(input_ids=batch.source, labels=batch.target).loss
    scores = score(model, model.encode(batch.source), batch, c, spec)
    pairs = [
        (sft_loss(model, batch) / batch.target.numel(), loss),
        *zip(scores[:2], theirs.score(batch, c)),  # not the rows
    ]
    apart = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    if not apart < 1e-4:
        raise SystemExit(f"the two sides are {apart:.0e} apart: they do not do the same work")
    return (
        f" SFT loss {pairs[0][0]:.4f} and {loss:.4f}; this and the scores of warmups at most {apart:.0e} apart; "
        f"theirs with {theirs.model.config._attn_implementation} attention."
    )


# ----------------------------------------------------------------------------- measuring, in processes of their own


def peak(call, device: str) -> float:
    """Bytes that the call holds at most, beyond what was held before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    import ctypes
    import resource

    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
    Path("/proc/self/clear_refs").write_text(
        "5", encoding="utf-8"
    )  # Linux: the highest resident size so far is forgotten
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def child(shape: str, rows: list[str], what: str, mode: str, device: str, repeats: int) -> dict:
    """what: "time", or "0" or "1" for the peak memory of our side or theirs."""
    c, batch = inputs(shape, device)
    sides = both(shape, c, device, mode == "compiled")
    if what != "time":
        side, sides = sides[int(what)], None  # the other one goes
        getattr(side, rows[0])(head(batch, 1))
        return {"peak": peak(lambda: getattr(side, rows[0])(batch), device)}
    comparable = len(sides) == 2 and shape in SHAPES and mode == "eager"
    note = check(*sides, batch) if comparable else ""
    size, times = (batch.target.numel(), c.width, c.ff), {}
    before = rates(device, *size)
    for row in rows:
        rounds, begun = [], time.perf_counter()
        while len(rounds) <= repeats and (len(rounds) < 4 or time.perf_counter() - begun < 120):
            rounds.append([seconds(lambda: getattr(side, row)(batch)) for side in sides])
        times[row] = rounds[1:]
    return {"times": times, "note": note, "rates": [*map(max, before, rates(device, *size))]}


def ask(args, *question: str) -> dict:
    """What `child` gives back; {} and a line on stderr if it failed (for want of memory, say)."""
    command = [
        sys.executable,
        __file__,
        f"--threads={args.threads}",
        f"--repeats={args.repeats}",
        "--child",
        *question,
    ]
    command += ["--gpu"] * args.gpu + ["--bfloat16"] * args.bfloat16
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(
            *question,
            *(done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]),
            file=sys.stderr,
        )
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def table(shape: str, rows: list[str], mode: str, args) -> str:
    """Print the shape's rows; give back the line that belongs below the table."""
    out = ask(args, shape, ",".join(rows), "time", mode)
    if not out:
        return f"{shape}: not measured, see above."
    c, batch = inputs(shape, "cpu")
    counts, (square, similar, copy), ours = (
        work(c, *batch.source.shape, batch.target.size(-1)),
        out["rates"],
        {},
    )
    for row, rounds in out["times"].items():
        ours[row], *theirs = [statistics.median(column) for column in zip(*rounds)]
        peaks = [
            ask(args, shape, row, str(i), mode).get("peak", 0) / 1e6 for i in range(len(rounds[0]))
        ]
        floor, bound = max(
            (counts[row][0] / max(square, similar), "FLOPs"), (counts[row][1] / copy, "bytes")
        )
        cells = [
            f"{shape}{', compiled' * (mode == 'compiled')}: {ROWS[row]}",
            f"{ours[row] * 1e3:,.0f} ms",
            "–",
            "–",
            TARGETS.get(row, ""),
            f"{floor * 1e3:,.1f} ms ({bound})",
            f"{floor / ours[row]:.0%}",
            " / ".join(f"{p:,.0f}" for p in peaks),
        ]
        if theirs:
            ratios = sorted(b / a for a, b in rounds)
            cells[2] = f"{theirs[0] * 1e3:,.0f} ms"
            cells[3] = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            cells[7] += f" ({peaks[0] / peaks[1]:.2f})" if all(peaks) else ""
        print("|", " | ".join(map(str, cells)), "|", flush=True)
    note = (
        f"{shape}: E = {c.width}, V = {c.vocab_size:,}, source {tuple(batch.source.shape)}, target "
        f"{tuple(batch.target.shape)}.{out['note']} Matmul rate {square / 1e9:,.0f} GFLOP/s, in this shape's sizes "
        f"{similar / 1e9:,.0f}; copy rate {copy / 1e9:.1f} GB/s."
    )
    if {"sft", "warmup"} <= ours.keys():
        measured, counted = ours["warmup"] / ours["sft"], counts["warmup"][0] / counts["sft"][0]
        note += (
            f" Warmup step / SFT step: {measured:.2f}, in FLOPs {counted:.2f}: {measured / counted:.2f} times "
            "as much (target: at most 1.25)."
        )
    return note


# ----------------------------------------------------------------------------- the figure


def picture(path: Path, device: str, repeats: int, machine: str) -> None:
    """Time of our warmup step against K, W and size."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        raise SystemExit("the picture needs matplotlib: pip install matplotlib") from None
    sizes = ("nano", "tiny", "small", "t5-small", "t5-base")
    panels = {
        "K, warmups per example (W = 8)": [(k, "small", k, 8) for k in (1, 2, 4, 8, 16, 32)],
        "W, tokens per warmup (K = 4)": [(w, "small", 4, w) for w in (1, 2, 4, 8, 16, 32, 64)],
        "size, million parameters (K = 4, W = 8)": [(None, size, 4, 8) for size in sizes],
    }
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), sharey=True, layout="constrained")
    matmul = max(rates(device, 16 * 20 * 4, 256, 1024)[:2])
    for axis, (title, points) in zip(axes, panels.items()):
        xs, measured, floor = [], [], []
        for x, size, K, W in points:
            c, batch = inputs("small", device)
            c, batch = ModelConfig(**vars(c) | SIZES[size]), head(batch, 16)
            side = Ours(EncoderDecoder(c).to(device))
            times = [
                seconds(lambda: side.warmup(batch, K, W, "best")) for _ in range(repeats + 1)
            ]  # best: K may be 1
            xs.append(x or sum(p.numel() for p in side.model.parameters()) / 1e6)
            measured.append(statistics.median(times[1:]))
            floor.append(work(c, 16, 20, 20, K, W)["warmup"][0] / matmul)
            print(f"{size} K={K} W={W}: {measured[-1]:.3f} s, floor {floor[-1]:.3f} s", flush=True)
        axis.loglog(xs, measured, "o-", label="measured")
        axis.loglog(xs, floor, "k--", linewidth=1, label="its matrix products at full rate")
        axis.set_xticks(xs, [f"{x:,.0f}" for x in xs])
        axis.minorticks_off()
        axis.set_xlabel(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds per warmup step")
    axes[0].legend(frameon=False)
    figure.suptitle(
        f"16 examples, S = T = 20, V = 8,000; left, middle: small (E = 256, 4+4 layers). {machine}",
        fontsize=9,
    )
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "t5-small"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument(
        "--bfloat16", action="store_true", help="matrix products in bfloat16, on both sides"
    )
    parser.add_argument("--gpu", action="store_true", help="CUDA, in bfloat16; implies --compiled")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="the SFT step also compiled, as by train.py --compile",
    )
    parser.add_argument("--repeats", type=int, default=9, help="rounds that count (default: 9)")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--picture", type=Path, help="draw this PNG instead of the table")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats < 1 or args.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, Ours.bfloat16 = "cuda" if args.gpu else "cpu", args.gpu or args.bfloat16
    if args.child:
        shape, rows, what, mode = args.child
        return print(json.dumps(child(shape, rows.split(","), what, mode, device, args.repeats)))
    if args.gpu and not torch.cuda.is_available():
        raise SystemExit("--gpu needs a CUDA device, and torch sees none")
    cpu = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        if sys.platform == "linux"
        else None
    )
    cpu = cpu[1] if cpu else platform.processor()
    machine = torch.cuda.get_device_name() if args.gpu else f"{cpu}, {args.threads} threads"
    if args.picture:
        return picture(args.picture, device, args.repeats, machine)
    try:
        theirs = f"transformers {metadata.version('transformers')}"
    except metadata.PackageNotFoundError:
        theirs = "without Hugging Face: pip install transformers"
    print(
        f"{machine}, {'bfloat16' if Ours.bfloat16 else 'float32'}, torch {torch.__version__}, {theirs}, "
        f"load {os.getloadavg()[0]:.1f} at the start, {args.repeats} rounds\n\n"
        "| | ours | theirs | ratio | target | floor | share | peak MB |\n|---|---|---|---|---|---|---|---|"
    )
    layers, notes = [row for row in args.rows if row != "loss"], []
    for mode in ("eager", "compiled") if args.gpu or args.compiled else ("eager",):
        if (
            mode == "compiled"
        ):  # cached decoding has another shape at each step: torch would compile for minutes
            layers = [row for row in layers if row == "sft"]
        notes += [table(shape, layers, mode, args) for shape in args.shapes if layers]
        if "loss" in args.rows and mode == "eager":
            notes += [table(shape, ["loss"], mode, args) for shape in LOSSES]
    print("\n" + "\n\n".join(notes))


if __name__ == "__main__":
    main()
