"""Score a run: decode a split, compute its metrics, compare its stages, translate new text.

    python eval.py runs/wmt                     the table that train.py printed
    python eval.py runs/wmt --show 3            sampled warmups, their rewards and weights
    python eval.py runs/wmt --plot curves.png   its log as curves
    python eval.py runs/wmt --input text.de     new text: one line in, one line out
    python eval.py runs/mt5 --export folder     write a checkpoint for Hugging Face transformers

`run` is a Run; train.py's has more fields. Other names are those of data.py and warmup.py.
hypotheses and warmups are texts, "" for no warmup.
"""

import argparse
import json
import re
import sys
import traceback
import unicodedata
from collections import Counter, defaultdict
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics import BLEU, CHRF
from tokenizers import Tokenizer

from data import (
    BASELINES,
    EOS,
    PAD,
    SEP,
    SPLITS,
    STAGES,
    TASKS,
    UNK,
    Config,
    Example,
    Parser,
    add_flags,
    chain,
    collate,
    encode,
    encode_split,
    load,
    load_tokenizer,
    longest_first,
    lookup,
    program,
    read_config,
    read_lines,
    shell_word,
    source_prefix,
    special_ids,
    translation,
)
from model import (
    EOS_ID,
    EncoderDecoder,
    UserError,
    load_model,
    one_line,
    own_draws,
    pick_device,
    precision,
    save_pretrained,
)
from warmup import (
    NOT_SAMPLED,
    WarmupSpec,
    evaluate_warmups,
    generate,
    sample_warmups,
    score,
    sft_loss,
    target_tokens,
    weights,
)


@dataclass
class Run:
    """What scores and writes: a model with its tokenizer and settings."""

    config: Config
    tokenizer: Tokenizer
    device: torch.device
    model: EncoderDecoder | None = None  # None: no stage is loaded yet
    spec: WarmupSpec | None = None  # None: y is written at once


def warmup_spec(stage, config, tokenizer) -> WarmupSpec | None:
    """What stands before y in a stage. None: nothing, as in SFT and its control."""
    if stage != "policy" or config.estimator == "sft":
        return None
    return WarmupSpec(
        tokenizer.token_to_id(SEP),
        special_ids(tokenizer),
        config.warmup_len,
        config.temperature,
        pause=config.estimator == "pause",
    )


# ----------------------------------------------------------------------------- likelihood
@torch.no_grad()
def validate(run, data):
    """Held-out numbers, no dropout. nll: nats per target token, </s> included.

    Without a spec: -log P₀(y|x). With one: -log of the mean of P(y|x,c) over --eval-samples sampled
    warmups, in expectation an upper bound on -log P(y|x), and evaluate_warmups' other numbers.
    The same warmups each time, if weights and settings are the same.
    """
    config, model, spec = run.config, run.model, run.spec
    model.eval()
    sums, counts = Counter(), Counter()
    batch_tokens = config.batch_tokens // (config.eval_samples if spec else 1)
    with own_draws(run.device, config.seed, "validation"), precision(config.dtype, run.device):
        for _, batch in longest_first(data, batch_tokens, "validation"):
            here = batch.to(run.device)
            if spec:
                numbers = evaluate_warmups(model, here, spec, config.eval_samples, config.alpha)
            else:
                numbers = {("nll", "token"): sft_loss(model, here)}
            sums.update(numbers)
            counts.update(units(batch))
    return means(sums, counts)


# ----------------------------------------------------------------------------- decoding
class Output(NamedTuple):
    """What was written for an example."""

    text: str
    warmup: str = ""  # "": there is none
    ended: bool = True  # by </s>; False: cut at --max-target-tokens


def decode_batch(run, batch, c=None):
    """An Output for each example: a greedy warmup, then y by beam search.

    y ends at </s> or at --max-target-tokens, whatever stands beside it in the batch.
    c (B,W): the warmups to write y after. None: the greedy ones.
    """
    config, tokenizer, spec = run.config, run.tokenizer, run.spec
    with precision(config.dtype, run.device):
        c, y = generate(
            run.model,
            batch.to(run.device),
            spec,
            config.max_target_tokens,
            beams=config.beams,
            length_penalty=config.length_penalty,
            forbidden=special_ids(tokenizer),
            c=c,
        )
    rows = y.tolist()
    warmups = [""] * len(rows)
    if spec is not None and not spec.pause:
        texts = tokenizer.decode_batch(c.tolist(), skip_special_tokens=False)
        # "" would say: no warmup
        warmups = [clean(text) or " " for text in texts]
    ended = [EOS_ID in row for row in rows]
    return [*map(Output, to_text(tokenizer, rows), warmups, ended)]


CONTROL = r"[\x00-\x1f\x7f]"  # a byte-level vocabulary can spell them: line ends, or a bell


def clean(text):
    """One line without control characters. Outputs and references alike, so that they compare."""
    return one_line(re.sub(CONTROL, " ", text))


def to_text(tokenizer, rows):
    """A line of text for each row of ids, without special tokens."""
    lines = []
    for row, text in zip(rows, tokenizer.decode_batch(rows, skip_special_tokens=True)):
        if EOS_ID not in row:  # a row that was cut may end with some bytes of a character
            text = text.rstrip("\ufffd")
        lines.append(re.sub(CONTROL, " ", text).strip())  # an output is one line of a file
    return lines


def decode_split(run, data):
    """The outputs in the order of the data."""
    outputs = {}
    for index, batch in longest_first(data, run.config.batch_tokens, "decoding"):
        outputs |= zip(index, decode_batch(run, batch))
    return [outputs[i] for i in range(len(data))]


# ----------------------------------------------------------------------------- metrics
# A task has one function in METRICS. It returns {name: number}, all of them rows of the table.


def translation_scores(config, examples, hypotheses, warmups):
    """BLEU and chrF++ of the whole corpus, 0 to 100."""
    references = [[example.target for example in examples]]
    metrics = translation_metrics(config, examples)
    return {name: m.corpus_score(hypotheses, references).score for name, m in metrics.items()}


def pointer_scores(config, examples, hypotheses, warmups):
    """Exact match by hops, from 0 to 1.

    hit rate: the share of warmups that begin with the symbols in between. Nobody labelled them.
    """
    right = defaultdict(list)
    for example, hypothesis, warmup in zip(examples, hypotheses, warmups):
        symbols = chain(example)
        hops, between = len(symbols) - 1, symbols[1:-1]
        right["1 hop" if hops == 1 else f"{hops} hops"].append(hypothesis == symbols[-1])
        if warmup and between:
            right["hit rate"].append(warmup.split()[: len(between)] == between)
    return {name: sum(right[name]) / len(right[name]) for name in sorted(right)}


def ceiling(tokenizer, examples, config):
    """What a perfect model would score: the references as token ids, up to the limit, and back.

    T5's vocabulary has no Chinese, for example. Without this row that would look like a bad model.
    """
    data = encode(tokenizer, examples)
    rows = [ids.target[: config.max_target_tokens].tolist() for ids in data]
    return compute_metrics(config, examples, map(Output, to_text(tokenizer, rows)))


# ----------------------------------------------------------------------------- the table
def score_run(run, stages, examples, split):
    """Decode and score the best checkpoints of stages on a split. -> results, {stage: outputs}.

    Checkpoints are chosen on validation, never on test. results is the head of results.json: a row
    of the table for each stage, and the ceiling. A row's cost is of all updates, the SFT stage's
    included. at_limit: outputs that ended at --max-target-tokens.
    """
    config = run.config
    rows, outputs = [], {}
    data = encode_split(run.tokenizer, examples, config, split)
    for stage in stages:
        cost = training_cost(config.folder, "sft", stage)  # first: decoding takes long
        load_stage(run, stage)
        written = decode_split(run, data)
        row = {
            "stage": stage,
            "name": row_name(stage, config),
            "metrics": compute_metrics(config, examples, written),
            "nll": round(validate(run, data)["nll"], 4),
            **cost,
            "at_limit": sum(not output.ended for output in written),
        }
        rows.append(row)
        outputs[stage] = written
    results = {
        "split": split,
        "rows": rows,
        "ceiling": ceiling(run.tokenizer, examples, config),
        "signature": signatures(config, examples),
    }
    return results, outputs


def print_table(results, config, count):
    """A line for each row. Updates, TFLOP (10^12 operations) and seconds include the SFT stage.

    The policy comes last: a gain counts only against the control, SFT with the same compute.
    count: how many examples were scored.
    """
    rows = sorted(results["rows"], key=lambda row: row["stage"] == "policy")
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    lines = [["", *names, "NLL/token", "updates", "TFLOP", "seconds"]]
    for row in rows:
        cost = [
            f"{row['nll']:.3f}",
            f"{row['updates']}",
            f"{row['flops'] / 1e12:,.2f}",
            f"{row['seconds']:.0f}",
        ]
        lines.append([row["name"], *cells(names, row["metrics"]), *cost])
    lines.append(["ceiling", *cells(names, results["ceiling"])])
    longest = max(len(cell) for _, *line in lines for cell in line)
    width = max(10, longest + 2)
    pair = f" {config.pair}" if config.translates else ""
    print(f"\n{config.task}{pair}, {results['split']} split, {count} examples")
    for title, *line in lines:
        print(f"{title:20}" + "".join(f"{cell:>{width}}" for cell in line))
    for row in rows:
        if row["at_limit"]:
            print(f"{row['name']}: {cut_outputs(row['at_limit'], count, config)}")
    for name, signature in results["signature"].items():
        print(f"{name}: {signature}")


# ----------------------------------------------------------------------------- at work
def show(run, stages, examples):
    """Print examples with what each stage writes, and the estimator at work.

    Stages in the outer loop: one model in memory at a time.
    """
    config = run.config
    data = encode_split(run.tokenizer, examples, config, "shown")
    pages = []
    for example in examples:
        pages.append([f"\n{'source':20}{example.source}", f"{'prompt':20}{example.prompt}"])
        if example.target:
            pages[-1].append(f"{'reference':20}{example.target}")
    for stage in sorted(stages, key=lambda stage: stage == "policy"):  # last, as in the table
        load_stage(run, stage)
        compares = run.spec and config.samples > 1 and config.estimator not in NOT_SAMPLED
        with own_draws(run.device, config.seed, "show"):
            for ids, page in zip(data, pages):
                [output] = decode_batch(run, collate([ids]))
                before = f"{output.warmup} -> " if output.warmup else ""
                page.append(f"{row_name(stage, config):20}{before}{output.text}")
                if compares:
                    page += samples_at_work(run, ids)
    for page in pages:
        print("\n".join(page))


def samples_at_work(run, ids):
    """K sampled warmups of one example, as in a policy update. A line for each that differs:

    how often drawn, log P(c|x), y after c. With a reference: also the reward R = log P(y|x,c), and
    the weights a and b of one draw.
    """
    config, model, spec = run.config, run.model, run.spec
    K = config.samples
    batch = collate([ids]).to(run.device)
    with precision(config.dtype, run.device), torch.no_grad():
        memory = model.encode(batch.source)
        c = sample_warmups(model, memory, batch.prompt, spec, K)  # (1,K,W)
        log_pi, R, _ = score(model, memory, batch, c, spec)  # (1,K) both
    a, b = weights(config.estimator, config.alpha * R, log_pi, c)  # (1,K) both

    title = "drawn  log P(c|x)  sampled c -> y"
    form = "{:12.3f}"
    if len(ids.target) > 1:  # a reference: more than </s>
        title = "drawn  log P(c|x)  log P(y|x,c)        a        b  sampled c -> y"
        form = "{:12.3f}{:14.3f}{:+9.3f}{:9.3f}"
    numbers = torch.cat([log_pi, R, a, b]).T.tolist()  # K rows of 4
    outputs = decode_batch(run, collate([ids] * K), c[0])
    lines = Counter(
        f"{form.format(*row)}  {output.warmup} -> {output.text}"
        for row, output in zip(numbers, outputs)
    )
    return [title, *(f"{times:4} x{line}" for line, times in lines.most_common())]


# ===== plumbing: means, METRICS, what a tokenizer loses, log and plot, new text, export, program
def units(batch):
    """What a batch's sums are divided by: how many there are of each unit."""
    B = len(batch.source)
    return {"token": int(target_tokens(batch)), "example": B, "swap": B if B > 1 else 0}


def means(sums, counts):
    """{(name, unit): sum} -> {name: mean}. counts: of each unit. Of nothing there is no mean."""
    return {name: float(x) / counts[unit] for (name, unit), x in sums.items() if counts[unit]}


BLEU_TOKENIZERS = {  # sacreBLEU's name: the letters of a script
    "ja-mecab": "\u3040-\u30ff",  # kana: before Han, which Japanese writes, too
    "ko-mecab": "\uac00-\ud7a3",
    "zh": "\u3400-\u9fff",
    "char": "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff",  # Thai, Lao, Tibetan, Burmese, Khmer
}


def bleu_tokenizer(examples):
    """How sacreBLEU finds the words: by the first script that has a tenth of all letters.

    Not by --pair: whoever writes en-cn gets Chinese words, too. 13a is for scripts with spaces.
    """
    text = "".join(example.target for example in examples)
    for name, script in BLEU_TOKENIZERS.items():
        if len(re.findall(f"[{script}]", text)) > 0.1 * sum(map(str.isalpha, text)):
            return name
    return "13a"


def translation_metrics(config, examples):
    """sacreBLEU's BLEU, with its tokenizer for languages without spaces, and chrF++.

    {} for other tasks. UserError where sacreBLEU lacks a tokenizer.
    """
    if not config.translates:
        return {}
    try:
        return {"BLEU": BLEU(tokenize=bleu_tokenizer(examples)), "chrF++": CHRF(word_order=2)}
    except RuntimeError as error:  # Japanese and Korean need a package; sacreBLEU says which
        raise UserError(f"cannot score {config.pair}: {one_line(str(error))}") from None


# Scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, bopomofo, Han
NO_SPACES = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)


class AnyScript(DefaultTokenizer):
    """A tokenizer for rouge-score: words of letters, marks and digits, in lower case.

    rouge-score's own keeps a-z and 0-9 alone. It stems the words of these, so plain English scores
    as everywhere. In a script without spaces each character is a word.
    """

    def tokenize(self, text):
        text = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower())
        words = []
        for word in re.sub(f"([{NO_SPACES}])", r" \1 ", text).split():
            words += super().tokenize(word) if word.isascii() else [word]
        return words


def rouge_scores(config, examples, hypotheses, warmups):
    """Mean F1 of ROUGE-1, -2 and -L, times 100."""
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=AnyScript(use_stemmer=True))
    sums = Counter()
    for example, hypothesis in zip(examples, hypotheses):
        for kind, value in scorer.score(example.target, hypothesis).items():
            sums[kind.replace("rouge", "ROUGE-")] += value.fmeasure
    return {name: 100 * value / len(examples) for name, value in sums.items()}


def option_scores(config, examples, hypotheses, warmups):
    """Accuracy and macro-F1 over the answers that occur, in percent. Other words are wrong.

    F1 beside accuracy: who always answers A is right in a quarter of the questions.
    """
    answers = [example.target for example in examples]
    hits = Counter(y for y, h in zip(answers, hypotheses) if y == h)
    asked, given = Counter(answers), Counter(hypotheses)
    f1 = [2 * hits[y] / (asked[y] + given[y]) for y in asked]
    return {"acc": 100 * hits.total() / len(answers), "F1": 100 * sum(f1) / len(f1)}


METRICS = {
    "translation": translation_scores,
    "pointers": pointer_scores,
    "summaries": rouge_scores,
    "options": option_scores,
}


def compute_metrics(config, examples, outputs):
    """By the task's function in METRICS. UserError if it fails: it may be a student's own."""
    name = TASKS[config.task].metrics
    metrics = lookup(METRICS, name, f"task {config.task}: eval.METRICS has no")
    hypotheses, warmups, _ = zip(*outputs)
    hypotheses = [clean(text) for text in hypotheses]
    examples = [example._replace(target=clean(example.target)) for example in examples]
    try:
        scores = metrics(config, examples, hypotheses, warmups)
        return {name: round(float(value), 4) for name, value in scores.items()}
    except UserError:  # sacreBLEU lacks a package
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"task {config.task}: its metric failed, {type(error).__name__}: {error}, in line "
            f"{place.lineno} of {Path(place.filename).name}"
        ) from error


def signatures(config, examples):
    """How each metric was computed; sacreBLEU's own description of it.

    A score without it cannot be compared with another paper's (Post 2018).
    """
    if TASKS[config.task].metrics == "summaries":
        words = "words of any script, characters where a script has no spaces, Porter stemmer"
        return {"ROUGE": f"rouge-score {version('rouge-score')}, {words} for a-z"}
    targets = [example.target for example in examples]
    said = {}
    for name, metric in translation_metrics(config, examples).items():
        metric.corpus_score(targets, [targets])  # a signature counts the references
        said[name] = str(metric.get_signature())
    return said


def cells(names, scores):
    """Numbers of a row of the table. Not every row has every metric."""
    return [f"{scores[name]:.2f}" if name in scores else "-" for name in names]


def cut_outputs(at_limit, count, config):
    """What to say of outputs that did not end by themselves: their scores are not the model's."""
    return (
        f"{at_limit} of {count} outputs were cut at --max-target-tokens {config.max_target_tokens}"
    )


def what_is_lost(tokenizer, examples, config):
    """What a tokenizer cannot read or write, as a line for the user. "": nothing.

    Said before training: afterwards the hours are spent. Nothing is said of characters that the
    task's metric does not see, such as another kind of space.
    """
    data = encode(tokenizer, examples)
    unknown = tokenizer.token_to_id(UNK)
    source, _, target = map(np.concatenate, zip(*data))
    in_source, in_target = 100 * np.mean(source == unknown), 100 * np.mean(target == unknown)
    shares = f"<unk> is {in_source:.1f} % of source tokens, {in_target:.1f} % of target tokens"
    targets = [clean(example.target) for example in examples]
    texts = [clean(text) for text in to_text(tokenizer, [ids.target.tolist() for ids in data])]
    same = texts == targets  # as always with a tokenizer of ours: metrics can take long
    scores = {} if same else compute_metrics(config, examples, map(Output, texts))
    if same or scores == compute_metrics(config, examples, map(Output, targets)):
        return f"this tokenizer cannot read all sources: {shares}" if in_source >= 1 else ""
    cases = sum(target != text for target, text in zip(targets, texts))
    lost = Counter("".join(targets)) - Counter("".join(texts))
    del lost[" "]
    best = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
    return (
        f"this tokenizer cannot write {100 * cases / len(texts):.1f} % of the targets: a perfect "
        f"model would score {best}. {shares}. Most often lost: "
        f"{' '.join(repr(c) for c, _ in lost.most_common(5))}. Another --init may do better"
    )


# ----------------------------------------------------------------------------- the log
def resume_command(folder):
    return f"python train.py --resume {shell_word(folder)}"


def read_log(folder):
    """The records of log.jsonl. UserError if it cannot be read: its costs go into the table."""
    path = folder / "log.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [record for record in records if record["kind"] and record["stage"]]
    except Exception as error:
        raise UserError(
            f"{path} is incomplete ({error}): try again if its run goes on, else bring it back"
        ) from None


def training_cost(folder, *stages):
    """Updates, FLOPs and seconds of these stages together, from log.jsonl.

    FLOPs, not seconds, make compute equal: a busy machine must not change the table.
    """
    records = [r for r in read_log(folder) if r["kind"] == "train" and r["stage"] in stages]
    return {
        "updates": len(records),
        "flops": sum(record["flops"] for record in records),
        "seconds": round(sum(record["seconds"] for record in records), 1),
    }


def plot(config, out):
    """log.jsonl as a page of curves, a PNG: a panel for each number that a validation logs.

    Dots are validations. The thin lines are updates, which log some of the same numbers.
    UserError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot draws by matplotlib: pip install matplotlib") from None
    curves = defaultdict(list)
    panels = {}
    cost = {"sft": 0}  # FLOPs so far of each stage, SFT's included
    for record in read_log(config.folder):
        kind, stage, _ = map(record.pop, ("kind", "stage", "step"))
        cost[stage] = cost.get(stage, cost["sft"]) + record.get("flops", 0)
        for name, value in record.items():
            curves[name, stage, kind].append((cost[stage] / 1e12, value))
        if kind == "valid":
            panels |= record

    rows = (len(panels) + 2) // 3
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    figure.suptitle(f"{config.folder.resolve().name}: validations (dots) and updates")
    for number, name in enumerate(panels, 1):
        axis = figure.add_subplot(rows, 3, number, title=name)
        axis.set_xlabel("TFLOP, those of SFT included")
        for stage, color in zip(STAGES, ("black", "C0", "gray")):
            dots = dict(marker=".", label=row_name(stage, config))
            for kind, how in (("train", dict(linewidth=0.3)), ("valid", dots)):
                if points := curves[name, stage, kind]:
                    axis.plot(*zip(*points), color=color, **how)
        axis.legend(frameon=False)
    figure.savefig(out, format="png")
    print(f"wrote {out}")


# ----------------------------------------------------------------------------- new text, export
def read_input(lines, config, tokenizer):
    """The lines of --input as examples without a target. An empty line has an empty source.

    A line is a source. Where a task has prompts, as the toy, a tab and the prompt follow.
    """
    usual = TASKS[config.task].prompt
    prefix = source_prefix(config)
    examples = []
    for number, line in enumerate(lines, 1):
        example = Example(line, "", "")
        if config.translates:
            example = translation(config.pair, line, "")
        elif line and usual:
            source, _, prompt = map(str.strip, line.partition("\t"))
            example = Example(source, prompt, "")
            tag, *words = prompt.split(" ")
            known = tokenizer.token_to_id(tag) in special_ids(tokenizer)
            if not known or 1 + len(words) != len(usual.split(" ")):
                raise UserError(
                    f"line {number} of --input: a line is the source, a tab, and a prompt such as "
                    f"{usual}, with a tag of this run's data. Here the prompt is {prompt!r}"
                )
        examples.append(example._replace(source=line and prefix + example.source))
    return examples


def answers(run, lines):
    """An Output for each line of new text, as --input takes it: an empty one for an empty line."""
    config = run.config
    lines = [lines] if isinstance(lines, str) else lines
    examples = read_input(lines, config, run.tokenizer)
    filled = [example for example in examples if example.source]
    data = encode_split(run.tokenizer, filled, config, "new")
    longest = np.zeros(config.max_target_tokens)  # y may become so long: it counts in a batch
    outputs = iter(decode_split(run, [ids._replace(target=longest) for ids in data]))
    return [next(outputs) if example.source else Output("") for example in examples]


def answer(run, stage, lines, show_warmup):
    """--input: print y for each line, in order, and an empty line for an empty one.

    What else there is to say goes to standard error, so that the output is a file of its own.
    """
    load_stage(run, stage)
    with redirect_stdout(sys.stderr):  # what is cut must not stand among the outputs
        outputs = answers(run, lines)
    for output in outputs:
        print(f"{output.warmup}\t{output.text}" if show_warmup and run.spec else output.text)
    at_limit = sum(not output.ended for output in outputs)
    if at_limit:
        note = cut_outputs(at_limit, sum(map(bool, lines)), run.config)
        print(f"note: {note}", file=sys.stderr)


def export(run, stage, out):
    """A stage as a folder that transformers and --init load, with its tokenizer."""
    load_stage(run, stage)
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],  # a T5 has no token types
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
    }
    try:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty: choose another folder")
        save_pretrained(run.model, out)  # UserError before anything is written
        run.tokenizer.save(str(out / "tokenizer.json"))
        (out / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot export to {out}, which may be incomplete: {error}") from None
    print(f"wrote {out}: {row_name(stage, run.config)}")


# ----------------------------------------------------------------------------- the program
def open_run(folder, stage=None, **changes) -> Run:
    """A run folder as a Run, with the best model of a stage. UserError if it is not there.

    stage None: no model yet. changes: settings that differ from the run's own, such as beams=1.
    """
    config = replace(read_config(folder), **changes)
    if wrong := config.problem():
        raise UserError(wrong)
    tokenizer = load_tokenizer(config.folder / "tokenizer.json", SEP)
    run = Run(config, tokenizer, pick_device(config.device, config.threads))
    if stage:
        load_stage(run, stage)
    return run


def load_stage(run, stage):
    """Give run the best model of a stage, and its spec. UserError if it is not there."""
    run.model = load_model(run.config.folder / f"{stage}.pt", run.tokenizer, run.device)
    run.spec = warmup_spec(stage, run.config, run.tokenizer)


def row_name(stage, config):
    """A stage's name in the table: baselines take the policy stage's place."""
    return BASELINES.get(config.estimator, "warmup") if stage == "policy" else STAGES[stage]


def parse(argv):
    """The flags, and {setting: value} of what they change. Exits with code 2 on bad usage."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("run", type=Path, help="a run folder that train.py made")
    add_one = parser.add_mutually_exclusive_group().add_argument
    add_one("--split", choices=SPLITS, help="score this split; default: test")
    add_one("--input", metavar="FILE", help="write y for each line of a file (-: standard input)")
    add_one("--export", type=Path, metavar="DIR", help="write the stage for transformers")
    add_one("--plot", type=Path, metavar="PNG", help="draw the log (needs matplotlib)")
    items = "N items of the split, or lines of --input: outputs, sampled warmups, weights"
    add("--show", type=int, metavar="N", help=items)
    add("--stage", choices=STAGES, help="default: all; --input, --export: policy, else sft")
    add("--show-warmup", action="store_true", help="with --input: the warmup and a tab first")
    changeable = ("beams", "max_target_tokens", "batch_tokens", "data", "device", "threads")
    more = parser.add_argument_group("settings of the run that may differ from its own")
    add_flags(more, dict.fromkeys(changeable, argparse.SUPPRESS))
    args = parser.parse_args(argv)

    if args.show is not None and (args.show < 1 or args.export or args.plot):
        parser.error("--show takes a number of items, 1 or more, of --split or --input")
    if args.plot and args.plot.suffix != ".png":  # no other file is written over
        parser.error("--plot takes the name of a .png file")
    if args.show_warmup and (args.input is None or args.show):
        parser.error("--show-warmup goes with --input alone")
    changes = {name: value for name, value in vars(args).items() if name in changeable}
    if wrong := replace(read_config(args.run), **changes).problem():
        parser.error(wrong)
    return args, changes


@program
def main(argv):
    """The program: score a run, or do what a flag says instead."""
    args, changes = parse(argv)
    if args.plot:
        return plot(read_config(args.run), args.plot)
    run = open_run(args.run, **changes)
    config = run.config
    stages = [stage for stage in STAGES if (config.folder / f"{stage}.pt").exists()]
    if not stages:
        raise UserError(f"{args.run} was not validated yet: {resume_command(args.run)}")
    if args.stage:
        stages = [args.stage]
    best = "policy" if "policy" in stages else stages[0]
    if args.export:
        export(run, best, args.export)
        return
    if args.input is None:
        return score_split(run, stages, args)
    lines = read_lines(None if args.input == "-" else Path(args.input))
    if args.show:
        examples = [e for e in read_input(lines, config, run.tokenizer) if e.source]
        if not examples:
            raise UserError("--input holds no line to show")
        show(run, stages, examples[: args.show])
    else:
        answer(run, best, lines, args.show_warmup)


def score_split(run, stages, args):
    """The table, and files of outputs and references. Or --show."""
    config, folder = run.config, run.config.folder
    if not (folder / "results.json").exists():  # train.py's last file
        print(f"note: this run is not finished. Go on with: {resume_command(folder)}")
    splits, _ = load(config)
    split = args.split or "test"
    if split not in splits:
        split = "valid"
    examples = splits[split]
    if args.show:
        return show(run, stages, examples[: args.show])
    results, outputs = score_run(run, stages, examples, split)
    print_table(results, config, len(examples))
    files = {"ref": [clean(example.target) for example in examples]}
    for stage, written in outputs.items():
        files[stage], warmups, _ = zip(*written)
        if any(warmups):
            files[f"{stage}.warmups"] = warmups
    for name, texts in files.items():
        path = folder / f"{split}.{name}.txt"
        lines = "".join(text + "\n" for text in texts)
        path.write_text(lines, encoding="utf-8", newline="\n")
        print(f"wrote {path}")
    show(run, stages, examples[:3])


if __name__ == "__main__":
    sys.exit(main())
