"""Score a run: decode a split, compute its metrics, compare its stages, translate new text.

python eval.py runs/wmt                     the table that train.py printed
python eval.py runs/wmt --show 3            sampled warmups, their rewards and weights
python eval.py runs/wmt --plot curves.png   its log as curves
python eval.py runs/wmt --input text.de     new text: one line in, one line out
python eval.py runs/mt5 --export folder     write a checkpoint for Hugging Face transformers
"""

import argparse, itertools, json, re, sys, unicodedata, zipfile
from collections import Counter, defaultdict
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version as version_of
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest
from tokenizers import Tokenizer

from data import (
    EOS,
    PAD,
    SEP,
    TASKS,
    UNK,
    Encoded,
    Example,
    chain,
    collate,
    encode,
    encode_split,
    in_order,
    load,
    load_tokenizer,
    read_lines,
    source_prefix,
    special_ids,
    translation,
    wrong_pair,
)
from model import (
    EncoderDecoder,
    ModelConfig,
    Parser,
    UserError,
    build,
    one_line,
    pick_device,
    precision,
    program,
    read_json,
    save_pretrained,
    shell_word,
)
from warmup import (
    ESTIMATORS,
    Batch,
    WarmupSpec,
    direct_logprobs,
    evaluate_warmups,
    generate,
    sample_warmups,
    score,
    target_tokens,
    weights,
)

STAGES = {"sft": "sft", "control": "sft, same compute", "policy": "warmup"}  # file -> table row
BASELINES = {"sft": "sft, same tokens", "pause": "pause", "frozen": "warmup, frozen"}  # --estimator


def warmup_spec(stage: str, config, tokenizer: Tokenizer) -> WarmupSpec | None:
    """What stands before y after a stage. None: nothing."""
    if stage != "policy" or config.estimator == "sft":
        return None
    return WarmupSpec(
        tokenizer.token_to_id(SEP),
        special_ids(tokenizer),
        config.warmup_len,
        config.warmup_min_len or config.warmup_len,
        config.temperature,
        config.estimator == "pause",
    )


# ----------------------------------------------------------------------------- likelihood
@torch.no_grad()
def validate(model, data: Encoded, config, spec: WarmupSpec | None) -> dict[str, float]:
    """Held-out numbers, no dropout. nll: nats per target token, </s> included.

    Without a spec: -log P(y|x). With one: -log of the mean of P(y|x,c) over --eval-samples sampled
    warmups, in expectation an upper bound on -log P(y|x), and evaluate_warmups' other numbers."""
    model.eval()
    device = next(model.parameters()).device
    sums, tokens = {}, 0
    batch_tokens = config.batch_tokens // (config.eval_samples if spec else 1)
    for _, batch in in_order(data, batch_tokens, "validation"):
        tokens += target_tokens(model, batch)
        batch = batch.to(device)
        with precision(config.dtype, device):
            if spec:
                new = evaluate_warmups(model, batch, spec, config.eval_samples, config.alpha)
            else:
                new = {"nll": -direct_logprobs(model, model.encode(batch.source), batch).sum()}
        sums = {name: sums.get(name, 0) + value for name, value in new.items()}
    return averages(sums, len(data.source), tokens)


def averages(sums: dict, examples: int, tokens: int | torch.Tensor) -> dict[str, float]:
    """Sums over examples -> loss and nll per target token, all else per example."""
    units = {"loss": tokens, "nll": tokens, "swap_gap": sums.pop("swapped", None)}
    if units["swap_gap"] == 0:
        del sums["swap_gap"]  # no batch had two examples
    return {name: float(value) / float(units.get(name, examples)) for name, value in sums.items()}


# ----------------------------------------------------------------------------- decoding
class Output(NamedTuple):
    """What was written for an example."""

    text: str
    warmup: str  # "": there is none
    ended: bool  # by </s>; False: cut at --max-target-tokens


def decode_batch(
    model, tokenizer, batch: Batch, config, spec: WarmupSpec | None, c=None
) -> list[Output]:
    """y ends at </s> or at --max-target-tokens, whatever stands beside it.

    c (B,W): the warmups to write y after. None: the greedy ones."""
    device = next(model.parameters()).device
    with precision(config.dtype, device):
        c, y = generate(
            model,
            batch.to(device),
            spec,
            config.max_target_tokens,
            c=c,
            beams=config.beams,
            length_penalty=config.length_penalty,
            forbidden=special_ids(tokenizer),
        )
    rows = y.tolist()
    warmups = [""] * len(rows)
    if spec is not None and not spec.pause:
        texts = tokenizer.decode_batch(c.tolist(), skip_special_tokens=False)
        warmups = [one_line(text) or " " for text in texts]
    ended = [model.config.eos_id in row for row in rows]
    return [*map(Output, to_text(tokenizer, rows), warmups, ended)]


def to_text(tokenizer, rows: list[list[int]]) -> list[str]:
    """A line of text for each row of ids, without special tokens."""
    texts, eos = tokenizer.decode_batch(rows, skip_special_tokens=True), tokenizer.token_to_id(EOS)
    # a row that was cut may end with some bytes of a character: decoded, that is U+FFFD
    texts = [text if eos in row else text.rstrip("\ufffd") for row, text in zip(rows, texts)]
    # a byte-level vocabulary can spell line ends, but an output is one line of a file
    return [text.replace("\n", " ").replace("\r", " ").strip() for text in texts]


def decode_split(model, tokenizer, data: Encoded, config, spec: WarmupSpec | None) -> list[Output]:
    """The outputs in the order of the data."""
    outputs = {}
    for index, batch in in_order(data, config.batch_tokens, "decoding"):
        outputs |= zip(index, decode_batch(model, tokenizer, batch, config, spec))
    return [outputs[i] for i in range(len(data.source))]


# ----------------------------------------------------------------------------- metrics
BLEU_TOKENIZERS = {  # of sacreBLEU; 13a, for all other languages, needs spaces between words
    "zh": "zh zho chi cmn yue wuu nan hak gan lzh",
    "ja-mecab": "ja jpn",
    "ko-mecab": "ko kor",
    "char": "th tha lo lao km khm my mya bur bo bod tib dz dzo",
}


def translation_metrics(config) -> dict:
    """sacreBLEU's BLEU, with its tokenizer for languages without spaces, and chrF++.

    {} for other tasks. UserError where sacreBLEU lacks a tokenizer."""
    if not TASKS[config.task].translates:
        return {}
    language = config.pair.split("-")[1].lower()
    fitting = (name for name, codes in BLEU_TOKENIZERS.items() if language in codes.split())
    try:
        tokenize = next(fitting, "13a")
        return {"BLEU": BLEU(tokenize=tokenize), "chrF++": CHRF(word_order=2)}
    except RuntimeError as error:  # Japanese and Korean need a package; sacreBLEU says which
        raise UserError(f"cannot score {config.pair}: {one_line(str(error))}") from None


def translation_scores(config, examples: list[Example], hypotheses, warmups) -> dict[str, float]:
    """Of the whole corpus, 0 to 100."""
    references = [[example.target for example in examples]]
    metrics = translation_metrics(config)
    return {name: m.corpus_score(hypotheses, references).score for name, m in metrics.items()}


def pointer_scores(config, examples: list[Example], hypotheses, warmups) -> dict[str, float]:
    """Exact match by hops, from 0 to 1.

    hit rate: the share of warmups that begin with the symbols in between. Nobody labelled them."""
    right, written = defaultdict(list), any(warmups)
    for example, hypothesis, warmup in zip(examples, hypotheses, warmups):
        symbols = chain(example)  # start, the symbols in between, the answer
        hops, between = len(symbols) - 1, symbols[1:-1]
        right[f"{hops} hop" if hops == 1 else f"{hops} hops"].append(hypothesis == symbols[-1])
        if written and between:
            words = warmup.replace(SEP, " ").split()
            right["hit rate"].append(words[: len(between)] == between)
    return {name: sum(right[name]) / len(right[name]) for name in sorted(right)}


# ----------------------------------------------------------------------------- the table
@dataclass
class Row:
    """One line of the table, and what it was computed from."""

    stage: str
    name: str
    metrics: dict[str, float]
    nll: float
    updates: int  # all optimizer updates behind this row, the SFT stage included
    flops: int  # of their matrix products
    seconds: float  # of the same
    at_limit: int  # outputs that ended at --max-target-tokens
    hypotheses: list[str]
    warmups: list[str]


def decode_and_score(model, tokenizer, data: Encoded, examples: list[Example], config, spec):
    """Metrics and outputs of a split; data: the examples as token ids."""
    outputs = decode_split(model, tokenizer, data, config, spec)
    hypotheses = [output.text for output in outputs]
    warmups = [output.warmup for output in outputs]
    return compute_metrics(config, examples, hypotheses, warmups), outputs


def compute_metrics(config, examples: list[Example], hypotheses, warmups) -> dict[str, float]:
    """By the task's function in METRICS. warmups: texts, "" where there is none."""
    try:
        scores = METRICS[TASKS[config.task].metrics](config, examples, hypotheses, warmups)
        return {name: round(float(score), 4) for name, score in scores.items()}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = f"its metric failed, {type(error).__name__}: {error}"
        raise UserError(f"task {config.task}: {said}") from error


def ceiling(tokenizer, examples: list[Example], config) -> dict[str, float]:
    """What a perfect model would score: the references as token ids, up to the limit, and back."""
    targets = encode(tokenizer, examples).target
    texts = to_text(tokenizer, [row[: config.max_target_tokens].tolist() for row in targets])
    return compute_metrics(config, examples, texts, [""] * len(texts))


def score_run(folder: Path, stages, config, tokenizer, examples, split: str, device) -> list[Row]:
    """Decode and score the best checkpoints of stages on a split."""
    data, rows = encode_split(tokenizer, examples, config, split), []
    for stage in stages:
        cost = training_cost(folder, "sft", stage)  # first: decoding takes long
        torch.manual_seed(config.seed)  # the Monte-Carlo NLL draws warmups: the same every time
        model = load_model(folder / f"{stage}.pt", tokenizer, device)
        spec = warmup_spec(stage, config, tokenizer)
        scores, outputs = decode_and_score(model, tokenizer, data, examples, config, spec)
        nll = round(validate(model, data, config, spec)["nll"], 4)
        at_limit = sum(not output.ended for output in outputs)
        rows.append(
            Row(
                stage,
                row_name(stage, config),
                scores,
                nll,
                **cost,
                at_limit=at_limit,
                hypotheses=[output.text for output in outputs],
                warmups=[output.warmup for output in outputs],
            )
        )
    return rows


def resume_command(folder: Path) -> str:
    return f"python train.py --resume {shell_word(folder)}"


def row_name(stage: str, config) -> str:
    return BASELINES.get(config.estimator, "warmup") if stage == "policy" else STAGES[stage]


def training_cost(folder: Path, *stages: str) -> dict[str, int | float]:
    """Updates, FLOPs and seconds of these stages together, from log.jsonl."""
    records = [r for r in read_log(folder) if r["kind"] == "train" and r["stage"] in stages]
    return {
        "updates": len(records),
        "flops": sum(record["flops"] for record in records),
        "seconds": round(sum(record["seconds"] for record in records), 1),
    }


def read_log(folder: Path) -> list[dict]:
    """The records of log.jsonl. UserError if one of them lacks what train.py wrote."""
    path, needed = folder / "log.jsonl", {"train": "flops seconds", "valid": "step"}
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for record in records:
            sum(record[name] for name in needed[record["kind"]].split()), STAGES[record["stage"]]
        return records
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is incomplete ({error}): try again, or --resume") from None


def cut_outputs(at_limit: int, count: int, config) -> str:
    """What to say of outputs that did not end by themselves. "": there are none."""
    limit = f"--max-target-tokens {config.max_target_tokens}"
    return f"{at_limit} of {count} outputs were cut at {limit}" if at_limit else ""


def print_table(
    rows: list[Row], ceiling_scores: dict, config, examples: list[Example], split: str
) -> None:
    """A line for each row. Updates, TFLOP (10^12 operations) and seconds include the SFT stage."""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    pair = f" {config.pair}" if TASKS[config.task].translates else ""
    print(f"\n{config.task}{pair}, {split} split, {len(examples)} examples")
    width = max([9, *(len(name) + 1 for name in names)])
    header = "".join(f"{name:>{width}}" for name in names)
    print(f"{'':20}{header}{'NLL/token':>11}{'updates':>9}{'TFLOP':>10}{'seconds':>9}")

    def beginning(name: str, scores: dict) -> str:
        cells = [
            f"{scores[name]:{width}.2f}" if name in scores else f"{'-':>{width}}" for name in names
        ]
        return f"{name:20}{''.join(cells)}"

    for row in rows:
        print(
            f"{beginning(row.name, row.metrics)}{row.nll:11.3f}{row.updates:9}"
            f"{row.flops / 1e12:10,.2f}{row.seconds:9.0f}"
        )
    print(beginning("ceiling", ceiling_scores))
    for row in rows:
        if cut := cut_outputs(row.at_limit, len(examples), config):
            print(f"{row.name}: {cut}")
    for name, signature in signatures(config, examples).items():
        print(f"{name}: {signature}")


# ===== plumbing: significance, other metrics, show and plot, settings, checkpoints, export, program
def print_significance(rows: list[Row], config, examples: list[Example]) -> None:
    """sacreBLEU's paired bootstrap (Koehn 2004) of each row against the control, else the first."""
    rows = sorted(rows, key=lambda row: row.stage != "control")
    metrics, references = translation_metrics(config), [[e.target for e in examples]]
    systems = [(row.name, row.hypotheses) for row in rows]
    _, scores = PairedTest(systems, metrics, references, test_type="bs", n_samples=1000)()
    print(f"\npaired bootstrap against {rows[0].name!r}, 1000 resamples")
    for name, results in zip(metrics, (scores[key] for key in scores if key != "System")):
        for row, result in zip(rows, results):
            p = "" if result.p_value is None else f"  p = {result.p_value:.4f}"
            if row is not rows[0] and row.hypotheses == rows[0].hypotheses:
                p = "  the same outputs"  # sacreBLEU would call that significant
            print(
                f"  {name:7} {row.name:20} {result.score:6.2f}  mean {result.mean:6.2f} "
                f"± {result.ci:.2f}{p}"
            )


def what_is_lost(tokenizer, examples: list[Example], config) -> list[str]:
    """What a tokenizer cannot read or write, as lines for the user. A space may change its kind."""
    data, unknown = encode(tokenizer, examples), tokenizer.token_to_id(UNK)
    unknowns = [
        100 * np.mean(np.concatenate(column) == unknown) for column in (data.source, data.target)
    ]
    shares = "<unk> is {:.1f} % of source tokens, {:.1f} % of target tokens".format(*unknowns)
    targets = [one_line(example.target) for example in examples]
    texts = to_text(tokenizer, [row.tolist() for row in data.target])
    pairs = [(a, b) for a, b in zip(targets, map(one_line, texts)) if a != b]
    nothing = [""] * len(targets)
    scores = pairs and compute_metrics(config, examples, texts, nothing)
    if not pairs or scores == compute_metrics(config, examples, targets, nothing):
        return [f"this tokenizer cannot read all sources: {shares}"] if unknowns[0] >= 1 else []
    lost = sum((Counter(target) - Counter(text) for target, text in pairs), Counter())
    del lost[" "]
    commonest = [character for character, _ in lost.most_common(5)]
    characters = " ".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in commonest)
    best = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
    advice = ". Choose another --init" if len(pairs) > len(targets) / 2 else ""
    return [
        f"this tokenizer cannot write {100 * len(pairs) / len(targets):.1f} % of the targets: "
        f"a perfect model would score {best}. {shares}. Most often lost: {characters}{advice}"
    ]


# Scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, bopomofo, Han
NO_SPACES = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)


class AnyScript:
    """A tokenizer for rouge-score: words of letters, marks and digits, in lower case.

    In a script without spaces each character is a word."""

    def tokenize(self, text: str) -> list[str]:
        text = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower())
        return re.sub(f"([{NO_SPACES}])", r" \1 ", text).split()


def rouge_scorer(examples: list[Example]) -> tuple[RougeScorer, str]:
    """rouge-score, and what to say of it. Its own tokenizer keeps a-z and 0-9 alone.

    So it is used where at most 5 % of the references' letters and digits are others, such as é,
    and no reference would be lost as a whole."""
    letters = [[c.isascii() for c in example.target.lower() if c.isalnum()] for example in examples]
    kinds, version = ["rouge1", "rouge2", "rougeL"], f"rouge-score {version_of('rouge-score')}"
    kept, count = sum(map(sum, letters)), sum(map(len, letters))
    if kept >= 0.95 * count and all(any(row) for row in letters if row):
        return RougeScorer(kinds, use_stemmer=True), f"{version}, its own words, Porter stemmer"
    return RougeScorer(kinds, tokenizer=AnyScript()), (
        f"{version}, words of any script, characters where a script has no spaces, no stemmer"
    )


def rouge_scores(config, examples: list[Example], hypotheses, warmups) -> dict[str, float]:
    """Mean F1 of ROUGE-1, -2 and -L, times 100."""
    scorer, _ = rouge_scorer(examples)
    scores = [scorer.score(example.target, y) for example, y in zip(examples, hypotheses)]
    return {
        key.replace("rouge", "ROUGE-"): 100
        * sum(score[key].fmeasure for score in scores)
        / len(scores)
        for key in scores[0]
    }


def option_scores(config, examples: list[Example], hypotheses, warmups) -> dict[str, float]:
    """Accuracy and macro-F1 over the answers that occur, in percent. Other words are wrong."""
    answers = [example.target for example in examples]
    hits = Counter(y for y, h in zip(answers, hypotheses) if y == h)
    f1 = [2 * hits[y] / (answers.count(y) + hypotheses.count(y)) for y in sorted(set(answers))]
    return {"acc": 100 * hits.total() / len(answers), "F1": 100 * sum(f1) / len(f1)}


METRICS = {
    "translation": translation_scores,
    "pointers": pointer_scores,
    "summaries": rouge_scores,
    "options": option_scores,
}


def signatures(config, examples: list[Example]) -> dict[str, str]:
    """How each metric was computed; sacreBLEU's own description of it."""
    if TASKS[config.task].metrics == "summaries":
        return {"ROUGE": rouge_scorer(examples)[1]}
    targets, metrics = [example.target for example in examples], translation_metrics(config)
    for metric in metrics.values():
        metric.corpus_score(targets, [targets])
    return {name: str(metric.get_signature()) for name, metric in metrics.items()}


def show(folder: Path, stages, config, tokenizer: Tokenizer, examples: list[Example], device):
    """Print examples with what each stage writes, and the estimator at work."""
    torch.manual_seed(config.seed)
    data = encode_split(tokenizer, examples, config, "shown")
    pages = [
        [f"\nsource              {example.source}", f"prompt              {example.prompt}"]
        for example in examples
    ]
    for page, example in zip(pages, examples):
        page += [f"reference           {example.target}"] if example.target else []
    for stage in stages:
        model = load_model(folder / f"{stage}.pt", tokenizer, device)
        spec = warmup_spec(stage, config, tokenizer)
        for i, page in enumerate(pages):
            [output] = decode_batch(model, tokenizer, collate(data, [i]), config, spec)
            before = f"{output.warmup} -> " if output.warmup else ""
            page.append(f"{row_name(stage, config):20}{before}{output.text}")
            if spec and not spec.pause and config.estimator != "exact" and config.samples > 1:
                scored = bool(examples[i].target)
                page += samples_at_work(model, tokenizer, data, i, config, spec, scored)
    print("\n".join(itertools.chain(*pages)))


def samples_at_work(model, tokenizer, data: Encoded, i: int, config, spec, scored) -> list[str]:
    """K sampled warmups of example i, as in a policy update. A line for each that differs:

    how often drawn, log P(c|x), y after c. scored, that is with a reference: also the reward
    R = log P(y|x,c), and the weights a and b of one draw."""
    K, device = config.samples, next(model.parameters()).device
    one, copies = collate(data, [i]).to(device), collate(data, [i] * K)
    with precision(config.dtype, device), torch.no_grad():
        memory = model.encode(one.source)
        c, _ = sample_warmups(model, memory, one.prompt, spec, K)  # (1,K,W)
        log_pi, R = score(model, memory, one.prompt, c, one.target, spec)  # (1,K) both
    a, b = weights(config.estimator, config.alpha * R, log_pi, c)  # (1,K) both
    columns, titles, form = [log_pi], "drawn  log P(c|x)", "{:12.3f}"
    if scored:
        columns += [R, a, b]
        titles += "  log P(y|x,c)        a        b"
        form += "{:14.3f}{:+9.3f}{:9.3f}"
    rows = torch.cat(columns).T.tolist()  # K rows
    outputs = decode_batch(model, tokenizer, copies, config, spec, c[0])
    drawn = Counter(
        f"{form.format(*row)}  {output.warmup} -> {output.text}"
        for row, output in zip(rows, outputs)
    )
    return [
        f"{titles}  sampled c -> y",
        *(f"{times:4} x{line}" for line, times in drawn.most_common()),
    ]


PANELS = {  # title: kind of record, its number
    "validation NLL, nats per token": ("valid", "nll"),
    "swap gap, nats: how much y depends on c": ("valid", "swap_gap"),
    "spread of rewards within an example, nats": ("train", "spread"),
    "entropy of the warmups, nats": ("train", "entropy"),
}
NO_METRICS = "kind stage step nll reward spread ess entropy distinct swap_gap over_empty".split()


def plot(folder: Path, config, out: Path) -> None:
    """log.jsonl as a page of curves, a PNG. UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot draws by matplotlib: pip install matplotlib") from None
    curves, spent = defaultdict(list), {"sft": 0}  # spent: FLOPs so far, SFT's included
    for record in read_log(folder):
        stage = record["stage"]
        spent[stage] = spent.get(stage, spent["sft"]) + record.get("flops", 0)
        for name, value in record.items():
            curves[record["kind"], name, stage].append((spent[stage] / 1e12, value))
    # what --eval-decode logged: each metric has a panel of its own
    metrics = {name for kind, name, _ in curves if kind == "valid" and name not in NO_METRICS}
    panels = PANELS | {f"{name}, validation": ("valid", name) for name in sorted(metrics)}
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(10, 3 * rows), layout="constrained")
    figure.suptitle(folder.resolve().name)
    figure.supxlabel("TFLOP, those of SFT included")
    axes = list(figure.subplots(rows, 2, sharex=True).flat)
    for axis, (title, key) in zip(axes, panels.items()):
        axis.set_title(title, fontsize="medium")
        for stage, color in zip(STAGES, ("black", "gray", "C0")):
            if curve := curves[*key, stage]:
                draw_curve(axis, *zip(*curve), key[0], color, row_name(stage, config))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    if len(panels) % 2:  # below this one there is none that has tick labels
        axes[len(panels) - 2].tick_params(labelbottom=True)
    if axes[0].lines:
        axes[0].legend(frameon=False)  # each stage has one colour in all panels
    axes[0].set_yscale("log")
    low, high = axes[0].get_ylim()
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
    figure.savefig(out, format="png")
    print(f"wrote {out}")


def draw_curve(axis, x, y, kind: str, color: str, name: str) -> None:
    """Validations as dots. Updates thin, and over them their running mean."""
    if kind == "valid":
        axis.plot(x, y, color=color, marker="o", markersize=3, linewidth=0.8, label=name)
        return
    axis.plot(x, y, color=color, linewidth=0.5, alpha=0.3)
    reach = len(y) // 40
    smooth = [np.mean(y[max(0, i - reach) : i + reach + 1]) for i in range(len(y))]
    axis.plot(x, smooth, color=color, linewidth=1.8, label=name)


def flag(default, help: str, low=None, high=None, choices=None):
    """A setting: its default, what it means and in which unit, its range or its choices."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


def flag_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Settings:
    """What data.py and this file need to know of a run. train.Config adds what training needs."""

    task: str = flag("wmt", "what to train on", choices=TASKS)
    pair: str = flag("de-en", "source-target language codes, for translation")
    data: str = flag("", "folder, or 'sample'; empty: data/TASK[/PAIR] if it exists, else sample")
    sample_size: int = flag(20000, "training examples in the built-in sample", 1, 10**7)
    symbols: int = flag(16, "task toy: letters in the permutation", 2, 26)
    hops: int = flag(2, "task toy: most look-ups that a question asks for; 0: copy", 0, 9)
    init: str = flag("", "Hugging Face folder or name of a T5, mT5, umT5, … to start from")
    seed: int = flag(0, "of weights, batches, dropout, warmups and sample", 0, 2**63 - 1)
    max_source_tokens: int = flag(128, "longer sources are cut; see the guide", 2, 10**5)
    max_target_tokens: int = flag(
        128,
        "y ends here, if not at </s>; training pairs with a longer target are left out",
        2,
        10**5,
    )
    batch_tokens: int = flag(3000, "tokens of source, target, padding in a micro-batch", 16, 10**9)
    # warmups
    estimator: str = flag(
        "marginal",
        "see the README; baselines: frozen, pause, sft",
        choices=(*ESTIMATORS, "exact", "pause", "sft"),
    )
    samples: int = flag(4, "K, warmups sampled per example and update", 1, 1024)
    warmup_len: int = flag(4, "W, tokens in a warmup", 1, 1024)
    warmup_min_len: int = flag(0, "tokens before <sep> may end a warmup; 0: all W", 0, 1024)
    alpha: float = flag(1.0, "factor on the reward", 0, 1e9)
    temperature: float = flag(1.0, "softmax temperature of the warmup policy", 1e-3, 1e3)
    # scoring
    eval_samples: int = flag(4, "warmups per example in the estimate of NLL", 1, 1024)
    beams: int = flag(4, "beam width for the test table; 1: greedy", 1, 1024)
    length_penalty: float = flag(1.0, "beam score = log-prob / length ** this", 0, 10)
    # machine
    device: str = flag("auto", "auto: cuda, else cpu", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "auto: bfloat16 on CUDA", choices=("auto", "float32", "bfloat16"))
    threads: int = flag(0, "CPU threads; 0: torch's choice", 0, 1024)

    def problem(self) -> str:
        """What is wrong with the settings. "": nothing."""
        for f in fields(self):
            name, value = flag_name(f.name), getattr(self, f.name)
            _, low, high, choices = f.metadata.values()
            if type(value) not in ((int, float) if f.type is float else (f.type,)):
                return f"{name} must be {f.type.__name__}, not {value!r}"
            if low is not None and not low <= value <= high:
                return f"{name} must lie between {low} and {high}"
            if choices and value not in choices:
                return f"{name} must be one of {', '.join(choices)}"
        if self.warmup_min_len > self.warmup_len:
            return "--warmup-min-len must not exceed --warmup-len"
        return wrong_pair(self.pair) if TASKS[self.task].translates else ""


def read_settings(folder: Path, kind=Settings):
    """The settings in a run's config.json. kind: Settings or train.Config. Else UserError."""
    path = folder / "config.json"
    if not path.exists():
        known = sorted(str(config.parent) for config in folder.parent.glob("*/config.json"))
        known += sorted(str(config.parent) for config in folder.glob("*/config.json"))
        here = f": runs here are {', '.join(known[:8])}" if known else ""
        raise UserError(
            f"no run in {folder}{here}. If one was killed there before its first "
            "checkpoint, start it again with --overwrite"
        )
    saved = read_json(path)
    if missing := [flag_name(f.name) for f in fields(kind) if f.name not in saved]:
        raise UserError(
            f"{path} has no {missing[0]}: this run is of another version of the "
            "program. Train it again, with --overwrite"
        )
    if saved["task"] not in TASKS:
        raise UserError(f"{path} names the task {saved['task']!r}, which data.TASKS lacks")
    if TASKS[saved["task"]].metrics not in METRICS:
        raise UserError(
            f"eval.METRICS lacks {TASKS[saved['task']].metrics!r}, the metrics of task "
            f"{saved['task']}"
        )
    settings = kind(**{f.name: saved[f.name] for f in fields(kind)})
    if wrong := settings.problem():
        raise UserError(f"{path} is not what train.py wrote: {wrong}")
    return settings


FORMAT = "warmup checkpoint 4"
STATE = {"model", "model_config", "state", "optimizer", "batches", "random", "data", "log_bytes"}


def load_checkpoint(path: Path, what: str = "stage") -> dict:
    """A file that train.py saved; `what` it must hold. Else UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not look at the checksums
                raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: that has not been trained here") from None
    except Exception as error:  # torch raises a zoo of types for broken and for unsafe files
        raise UserError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict):
        checkpoint = {}
    found = checkpoint.get("format")
    if found != FORMAT and str(found).startswith("warmup checkpoint"):
        raise UserError(f"{path} is of another version of this program: train it again")
    if found != FORMAT or checkpoint.get("what") != what:
        raise UserError(f"{path} is not a {what} checkpoint of this program")
    if what == "state" and (missing := STATE - checkpoint.keys()):
        raise UserError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    return checkpoint


def load_model(path: Path, tokenizer: Tokenizer, device, what: str = "stage") -> EncoderDecoder:
    """The model of a checkpoint. UserError if it is damaged or does not fit the tokenizer."""
    checkpoint = load_checkpoint(path, what)
    try:
        model = build(ModelConfig(**checkpoint["model_config"]), checkpoint["model"])
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({one_line(str(error))[:200]})") from None
    if model.config.vocab_size != tokenizer.get_vocab_size() or not tokenizer.token_to_id(SEP):
        raise UserError(f"{path} does not fit the tokenizer.json beside it: they are of two runs")
    return model.to(device).eval()


def read_input(file: str, config, tokenizer: Tokenizer) -> list[Example]:
    """The lines of --input as examples without a target. An empty line has an empty source.

    A line is a source. Where a task has prompts, as the toy, a tab and the prompt follow."""
    lines = read_lines(None if file == "-" else Path(file))
    known = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    tags = [tag for tag in known if re.fullmatch(r"<(?!pad|unk|sep|extra_id_|unused_|/).*>", tag)]
    prefix, examples = source_prefix(config), []
    for number, line in enumerate(lines, 1):
        example = Example(line, "", "")
        if TASKS[config.task].translates:
            example = translation(config.pair, line, "")
        elif line and tags:
            source, _, prompt = line.partition("\t")
            example = Example(source.strip(), prompt.strip(), "")
            if not prompt.split() or prompt.split()[0] not in tags:
                raise UserError(
                    f"line {number} of --input has no prompt: a line is the source, a "
                    f"tab, and a prompt that begins with {' or '.join(tags)}"
                )
        examples.append(example._replace(source=line and prefix + example.source))
    return examples


def answer(folder: Path, stage: str, config, tokenizer, args, device) -> None:
    """--input: print y for each line, in order, and an empty line for an empty one."""
    examples = read_input(args.input, config, tokenizer)
    filled = [example for example in examples if example.source]
    outputs, spec = [], warmup_spec(stage, config, tokenizer)
    if filled:
        with redirect_stdout(sys.stderr):  # what is cut must not stand among the outputs
            data = encode_split(tokenizer, filled, config, "--input")
        room = np.zeros(config.max_target_tokens)  # in a batch: y may become so long
        data = data._replace(target=[room] * len(filled))
        model = load_model(folder / f"{stage}.pt", tokenizer, device)
        outputs = decode_split(model, tokenizer, data, config, spec)
    waiting = iter(outputs)
    for example in examples:
        output = next(waiting) if example.source else Output("", "", True)
        print(f"{output.warmup}\t{output.text}" if args.show_warmup and spec else output.text)
    if cut := cut_outputs(sum(not output.ended for output in outputs), len(outputs), config):
        print(f"note: {cut}", file=sys.stderr)


def export(folder: Path, stage: str, config, out: Path, tokenizer: Tokenizer) -> None:
    """A stage as a folder that transformers and --init load, with its tokenizer."""
    model = load_model(folder / f"{stage}.pt", tokenizer, "cpu")
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
    }
    try:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty: choose another folder")
        save_pretrained(model, out)  # UserError before anything is written
        tokenizer.save(str(out / "tokenizer.json"))
        (out / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot export to {out}, which may be incomplete: {error}") from None
    print(f"wrote {out}: {row_name(stage, config)}")


def parse(argv: list[str]) -> tuple[argparse.Namespace, Settings]:
    """The flags, and the run's settings with what they change. Exits with code 2 on bad usage."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("run", type=Path, help="a run folder that train.py made")
    add("--split", choices=("train", "valid", "test"), help="score this split; default: test")
    add("--input", metavar="FILE", help="write y for each line of a file (-: standard input)")
    add(
        "--show",
        type=int,
        metavar="N",
        help="N items of the split, or lines of --input: outputs, sampled warmups, weights",
    )
    add("--export", type=Path, metavar="DIR", help="write the stage as a folder for transformers")
    add("--plot", type=Path, metavar="PNG", help="draw the log (needs matplotlib)")
    add("--stage", choices=tuple(STAGES), help="default: all; --input, --export: policy, else sft")
    add("--beams", type=int, help="beam width, 1: greedy; default: the run's --beams")
    add("--max-target-tokens", type=int, help="where y ends; default: the run's")
    add("--batch-tokens", type=int, help="fewer take less memory; default: the run's")
    add("--show-warmup", action="store_true", help="with --input: the warmup and a tab first")
    add("--data", help="folder of the data, if it has moved since training")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), help="default: the run's --device")
    add("--threads", type=int, help="CPU threads; default: the run's --threads")
    args = parser.parse_args(argv)
    given = [name for name in ("split", "input", "show", "export", "plot") if getattr(args, name)]
    if len(given) > 1 and given not in (["split", "show"], ["input", "show"]):
        parser.error(f"--{given[0]} does not go with --{given[1]}")
    if args.show is not None and args.show < 1:
        parser.error("--show takes a number of items, 1 or more")
    if args.plot and args.plot.suffix != ".png":  # no other file is written over
        parser.error("--plot takes the name of a .png file")
    if args.show_warmup and (args.input is None or args.show):
        parser.error("--show-warmup goes with --input alone")
    changes = {
        name: value
        for name, value in vars(args).items()
        if name in ("beams", "max_target_tokens", "batch_tokens", "data", "device", "threads")
        and value is not None
    }
    settings = replace(read_settings(args.run), **changes)
    if wrong := settings.problem():
        parser.error(wrong)
    return args, settings


@program
def main(argv: list[str]) -> None:
    """The program: score a run, or do what a flag says instead."""
    args, config = parse(argv)
    if args.plot:
        return plot(args.run, config, args.plot)
    tokenizer = load_tokenizer(args.run / "tokenizer.json")
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    trained = [stage for stage in STAGES if (args.run / f"{stage}.pt").exists()]
    if not trained:
        raise UserError(f"{args.run} was not validated yet: {resume_command(args.run)}")
    stages = [args.stage] if args.stage else trained
    if args.export:
        export(args.run, stages[-1], config, args.export, tokenizer)
    elif args.input is not None and args.show:
        examples = [e for e in read_input(args.input, config, tokenizer) if e.source]
        if not examples:
            raise UserError("--input holds no line to show")
        show(args.run, stages, config, tokenizer, examples[: args.show], device)
    elif args.input is not None:
        answer(args.run, stages[-1], config, tokenizer, args, device)
    else:
        score_split(args.run, stages, config, tokenizer, args, device)


def score_split(folder: Path, stages: list[str], config, tokenizer, args, device) -> None:
    """The table, a file of hypotheses for each stage, and what differs significantly."""
    if not (folder / "results.json").exists():  # train.py's last file
        print(f"note: this run is not finished. Go on with: {resume_command(folder)}")
    splits, _ = load(config)
    split = args.split if args.split in splits else "test" if "test" in splits else "valid"
    if args.show:
        return show(folder, stages, config, tokenizer, splits[split][: args.show], device)
    rows = score_run(folder, stages, config, tokenizer, splits[split], split, device)
    best = ceiling(tokenizer, splits[split], config)
    print_table(rows, best, config, splits[split], split)
    for row in rows:
        files = {f"{split}.{row.stage}.txt": row.hypotheses}
        if any(row.warmups):
            files[f"{split}.{row.stage}.warmups.txt"] = row.warmups
        for name, texts in files.items():
            lines = "".join(text + "\n" for text in texts)
            (folder / name).write_text(lines, encoding="utf-8", newline="\n")
            print(f"wrote {folder / name}")
    show(folder, stages, config, tokenizer, splits[split][:3], device)
    if len(rows) > 1 and translation_metrics(config):
        print_significance(rows, config, splits[split])


if __name__ == "__main__":
    sys.exit(main())
