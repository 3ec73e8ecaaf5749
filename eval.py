"""Score a run: decode a split, compute its metrics, compare its stages, translate new text.

    python eval.py runs/wmt                     the table that train.py printed
    python eval.py runs/wmt --input text.de     translate a file, one line in, one line out
    python eval.py runs/mt5 --export folder     write a checkpoint for Hugging Face transformers
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest
from tokenizers import Tokenizer
from torch import Tensor

from data import (EOS, PAD, SEP, TASKS, UNK, Encoded, Example, UserError, all_sums, chain, encode, encode_split, for_pair,
                  gather, in_order, load_pairs, processes, source_prefix, special_ids)
from model import EncoderDecoder, ModelConfig, save_pretrained
from warmup import WarmupSpec, direct_logprobs, evaluate_warmups, generate, sample_warmups, score, target_tokens

STAGES = {"sft": "sft", "control": "sft, same compute", "policy": "warmup"}  # file name -> row of the table
CONTROLS = {"sft": "sft, same tokens", "pause": "pause", "frozen": "warmup, frozen"}  # row of stage policy under these
FORMAT = "warmup checkpoint 1"


# ----------------------------------------------------------------------------- reading a run folder


def load_checkpoint(path: Path, what: str = "stage") -> dict:
    """A file that train.py saved; `what` it must hold. UserError if missing, broken, or another program's."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: that stage has not been trained here") from None
    except Exception as error:  # torch raises a zoo of types for broken and for unsafe files
        raise UserError(f"{path} is damaged or no checkpoint ({type(error).__name__}): train it again") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT or checkpoint.get("what") != what:
        raise UserError(f"{path} is not a {what} checkpoint of this program ({FORMAT!r})")
    return checkpoint


def load_config(folder: Path) -> SimpleNamespace:
    """The settings of a run, from its config.json."""
    from train import Config  # here, because train imports us

    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        types = {f.name: (f.type, int) if f.type is float else f.type for f in fields(Config)}
        wrong = sorted(types.keys() ^ dict(settings)) or [n for n in types if not isinstance(settings[n], types[n])]
        if wrong:
            raise ValueError(f"settings missing, unknown or of the wrong type: {', '.join(wrong)}")
        return SimpleNamespace(**settings)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {folder} is not a run folder") from None
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not the JSON object that train.py wrote: {error}") from None


def load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"cannot read {path}: {error}") from None


def load_model(path: Path, device) -> tuple[EncoderDecoder, dict]:
    """The model of a stage file, in eval mode, and the rest of what the file holds."""
    checkpoint = load_checkpoint(path)
    model = EncoderDecoder(ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint.pop("model"))
    return model.to(device).eval(), checkpoint


def warmup_spec(stage: str, config, tokenizer: Tokenizer) -> WarmupSpec | None:
    """What stands before y after a stage; None: nothing."""
    if stage != "policy" or config.estimator == "sft":
        return None
    length = config.warmup_len
    return WarmupSpec(tokenizer.token_to_id(SEP), special_ids(tokenizer), length, config.warmup_min_len or length,
                      config.temperature, pause=config.estimator == "pause")


def pick_device(name: str) -> torch.device:
    """auto: CUDA, else Apple's mps, else the CPU. UserError for a device that is not here."""
    mps = torch.backends.mps.is_available() and processes() == 1  # gloo knows the CPU alone, NCCL CUDA
    here = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, and no two batches are alike
    if not here.get(name, True):
        raise UserError(f"torch finds no {name} device here: choose another with --device")
    device = torch.device(name if name != "auto" else next(device for device in here if here[device]))
    if device.type == "cuda" and processes() > 1:
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise UserError(f"each process needs a GPU of its own: torchrun --nproc_per_node {count}, or --device cpu")
        torch.cuda.set_device(number)
    return device


@contextmanager
def precision(config, device: torch.device):
    """Matrix products in bfloat16 where the run says so (auto: on CUDA); weights stay float32."""
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    # no weight cache: older torch would fill it while sampling, without gradients, and reuse it for scoring
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low, cache_enabled=False):
        yield


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # GPU, CPU


# ----------------------------------------------------------------------------- scoring


@torch.no_grad()
def validate(model, data: Encoded, config, spec: WarmupSpec | None) -> dict[str, float]:
    """Held-out numbers, no dropout. nll: nats per target token (</s> included).

    spec None: -log P(y|x). Otherwise -log of the mean of P(y|x,c) over --eval-samples sampled warmups, an
    upper bound on -log P(y|x) in expectation, and warmup.evaluate_warmups' numbers per example.
    """
    model.eval()
    device, sums, tokens = next(model.parameters()).device, {}, 0
    for _, batch in in_order(data, config.batch_tokens // (config.eval_samples if spec else 1)):
        batch = batch.to(device)
        with precision(config, device):
            if spec is None:
                new = {"nll": -direct_logprobs(model, model.encode(batch.source), batch).sum()}
            else:
                new = evaluate_warmups(model, batch, spec, config.eval_samples)
        tokens += target_tokens(model, batch)
        sums = {name: sums.get(name, 0) + value for name, value in new.items()}
    sums = all_sums(sums | {"tokens": tokens})
    return averages(sums, len(data.source), sums.pop("tokens"))


def collect(rows: dict) -> list:
    """{index: row} of this process -> the rows of all, in the order of the data."""
    rows = {i: row for share in gather(rows) for i, row in share.items()}
    return [rows[i] for i in range(len(rows))]


def averages(sums: dict, examples: int, tokens: Tensor) -> dict[str, float]:
    """Sums of warmup.diagnostics -> nll per target token, everything else per example."""
    units = {"nll": tokens, "swap_gap": sums.pop("swapped", torch.tensor(1.0)).clamp(min=1)}
    return {name: (value / units.get(name, examples)).item() for name, value in sums.items()}


def decode_split(model, tokenizer, data: Encoded, config, spec: WarmupSpec | None, beams: int):
    """Hypotheses, and warmups (None without), as text in the order of the data. Greedy c, beam y."""
    device = next(model.parameters()).device
    rows = {}
    for index, batch in in_order(data, config.batch_tokens):
        length = min(config.max_tokens, 2 * batch.source.size(1) + 10)  # no translation is that much longer
        try:
            with precision(config, device):
                c, y = generate(model, batch.to(device), spec, length, beams=beams, length_penalty=config.length_penalty,
                                barred=special_ids(tokenizer))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise UserError(f"out of memory while decoding with beam width {beams}. A trained run is scored by python "
                            "eval.py RUN with --beams 1 or --device cpu; to train again, lower --batch-tokens or --beams"
                            ) from None
        texts = tokenizer.decode_batch(y.tolist(), skip_special_tokens=True)
        latent = tokenizer.decode_batch(c.tolist(), skip_special_tokens=False) if spec else [None] * len(index)
        rows |= {i: (text.strip(), warmup) for i, text, warmup in zip(index, texts, latent)}
    return [list(column) for column in zip(*collect(rows))]


def translation_metrics(target_lang: str) -> dict:
    """sacreBLEU's BLEU, with its tokenizer for languages without spaces, and chrF++ (word order 2)."""
    tokenize = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}.get(target_lang, "13a")
    return {"BLEU": BLEU(tokenize=tokenize), "chrF++": CHRF(word_order=2)}


def make_metrics(config) -> dict:
    """Name -> sacreBLEU metric, {} if the task has others. UserError where sacreBLEU lacks a tokenizer."""
    if TASKS[config.task].metrics != "translation":
        return {}
    try:
        return translation_metrics(config.pair.split("-")[1])
    except RuntimeError as error:  # Japanese and Korean need an extra package; sacreBLEU says which
        raise UserError(f"cannot score {config.pair}: {' '.join(str(error).split())}") from None


def translation_scores(config, examples: list[Example], hypotheses: list[str], warmups: list) -> dict[str, float]:
    references = [[example.target for example in examples]]
    return {name: m.corpus_score(hypotheses, references).score for name, m in make_metrics(config).items()}


def pointer_scores(config, examples: list[Example], hypotheses: list[str], warmups: list) -> dict[str, float]:
    """Exact match by hops, and hit rate: warmups that begin with the symbols in between, nobody having labelled them."""
    right = defaultdict(list)
    for example, hypothesis, warmup in zip(examples, hypotheses, warmups):
        symbols = chain(example)
        hops, between, answer = len(symbols) - 1, symbols[1:-1], symbols[-1]
        right[f"{hops} hop{'s' * (hops != 1)}"].append(hypothesis == answer)
        if warmup is not None and between:
            right["hit rate"].append(warmup.replace(SEP, " ").split()[: len(between)] == between)
    return {name: sum(right[name]) / len(right[name]) for name in sorted(right)}


def rouge_scores(config, examples: list[Example], hypotheses: list[str], warmups: list) -> dict[str, float]:
    """Mean F1 of ROUGE-1, -2 and -L (rouge-score, Porter stemmer), times 100."""
    names = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
    scorer = RougeScorer(list(names.values()), use_stemmer=True)
    scores = [scorer.score(example.target, text) for example, text in zip(examples, hypotheses)]
    return {name: 100 * sum(s[key].fmeasure for s in scores) / len(scores) for name, key in names.items()}


def option_scores(config, examples: list[Example], hypotheses: list[str], warmups: list) -> dict[str, float]:
    """Accuracy and macro-F1 over the letters, in percent. A hypothesis that is no letter is wrong for all of them."""
    right = [example.target for example in examples]
    f1 = []
    for letter in sorted(set(right)):
        hits = sum(y == h == letter for y, h in zip(right, hypotheses))
        f1.append(2 * hits / (right.count(letter) + hypotheses.count(letter)))
    return {"acc": 100 * sum(y == h for y, h in zip(right, hypotheses)) / len(right), "F1": 100 * sum(f1) / len(f1)}


@torch.no_grad()
def likeliest_option(model, tokenizer, data: Encoded, config, spec: WarmupSpec | None) -> list[str]:
    """The letter of the largest log P(letter|x), or log P(letter|x,c) after the greedy warmup, per example."""
    letters = [row.tolist() for row in encode(tokenizer, [Example("", "", letter) for letter in "ABCD"]).target]
    chosen: dict[int, str] = {}
    device = next(model.parameters()).device
    for index, batch in in_order(data, config.batch_tokens):
        batch, scores = batch.to(device), []
        with precision(config, device):
            memory = model.encode(batch.source)
            c = sample_warmups(model, memory, batch.prompt, spec, 1, temperature=0.0)[0] if spec else None
            for letter in letters:
                target = torch.tensor(letter, device=device).expand(len(index), -1)
                scores.append(direct_logprobs(model, memory, replace(batch, target=target)) if c is None else
                              score(model, memory, batch.prompt, c, target, spec)[1][:, 0])
        for i, best in zip(index, torch.stack(scores, 1).argmax(1).tolist()):  # (B,letters)
            chosen[i] = "ABCD"[best]
    return collect(chosen)


METRICS = {"translation": translation_scores, "pointers": pointer_scores, "summaries": rouge_scores,
           "options": option_scores}


@dataclass
class Row:
    """One line of the table, and what it was computed from."""

    stage: str
    name: str
    metrics: dict[str, float]
    nll: float
    updates: int  # all optimizer updates behind this row, SFT stage included
    seconds: float  # of training, validation excluded, SFT stage included
    hypotheses: list[str]
    warmups: list[str | None]

    def to_json(self) -> dict:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("hypotheses", "warmups", "stage")}


def decode_and_score(model, tokenizer, data: Encoded, examples: list[Example], config, spec, beams: int):
    """Metrics, hypotheses and warmups of a split."""
    hypotheses, warmups = decode_split(model, tokenizer, data, config, spec, beams)
    metrics = TASKS[config.task].metrics
    scores = METRICS[metrics](config, examples, hypotheses, warmups)
    if metrics == "options":  # also by comparison: which letter is the likeliest?
        chosen = option_scores(config, examples, likeliest_option(model, tokenizer, data, config, spec), warmups)
        scores |= {f"{name}*": value for name, value in chosen.items()}
    return scores, hypotheses, warmups


def score_stage(folder: Path, stage: str, config, tokenizer, examples: list[Example], data: Encoded, beams: int,
                device) -> Row:
    """Decode and score one stage's best checkpoint on some examples; data: the same as token ids."""
    torch.manual_seed(config.seed)  # the Monte-Carlo NLL draws warmups: the same every time
    model, checkpoint = load_model(folder / f"{stage}.pt", device)
    spec = warmup_spec(stage, config, tokenizer)
    scores, hypotheses, warmups = decode_and_score(model, tokenizer, data, examples, config, spec, beams)
    scores = {name: round(score, 4) for name, score in scores.items()}
    nll = round(validate(model, data, config, spec)["nll"], 4)
    name = CONTROLS.get(config.estimator, "warmup") if stage == "policy" else STAGES[stage]
    return Row(stage, name, scores, nll, checkpoint["updates"], round(checkpoint["seconds"], 1), hypotheses, warmups)


def signatures(config, examples: list[Example]) -> dict[str, str]:
    """sacreBLEU's own description of how each metric was computed."""
    out = {}
    for name, metric in make_metrics(config).items():
        metric.corpus_score([e.target for e in examples], [[e.target for e in examples]])
        out[name] = str(metric.get_signature())
    return out


def print_table(rows: list[Row], config, examples: list[Example], split: str) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    direction = f" {config.pair}" if TASKS[config.task].metrics == "translation" else ""
    print(f"\n{config.task}{direction}, {split} split, {len(examples)} examples")
    print(f"{'':20}" + "".join(f"{name:>9}" for name in names) + f"{'NLL/token':>11}{'updates':>9}{'seconds':>9}")
    for row in rows:
        scores = (f"{row.metrics[name]:9.2f}" if name in row.metrics else f"{'-':>9}" for name in names)
        print(f"{row.name:20}" + "".join(scores) + f"{row.nll:11.3f}{row.updates:9}{row.seconds:9.0f}")
    for name, signature in signatures(config, examples).items():
        print(f"{name}: {signature}")
    if "acc*" in names:
        print("acc, F1: accuracy and macro-F1 of the letter that was written; with a star: of the likeliest letter")


def print_means(tables: dict[str, list[Row]]) -> None:
    """Of several directions: each row's mean over them."""
    if len(tables) > 1:
        print(f"\nmean of {', '.join(tables)}")
        for same in zip(*tables.values()):  # one row of each direction
            means = (f"{name} {mean(row.metrics[name] for row in same):.2f}" for name in same[0].metrics)
            print(f"{same[0].name:20}{'  '.join(means)}")


def print_examples(rows: list[Row], examples: list[Example], count: int = 3) -> None:
    """The first test sentences: source, reference, and what each row makes of them."""
    for i, example in enumerate(examples[:count]):
        prompt = f"\nprompt     {example.prompt}" if " " in example.prompt else ""  # a tag alone says nothing new
        print(f"\nsource     {example.source}{prompt}\nreference  {example.target}")
        for row in rows:
            if row.stage == "sft":
                print(f"sft        {row.hypotheses[i]}")
            elif row.stage == "policy":
                print(f"warmup c   {row.warmups[i]}\nwarmup y   {row.hypotheses[i]}")


def print_significance(rows: list[Row], config, examples: list[Example]) -> None:
    """Paired bootstrap resampling (Koehn 2004) of each row against the control, else the first, by sacreBLEU."""
    rows = sorted(rows, key=lambda row: row.stage != "control")
    systems = [(row.name, row.hypotheses) for row in rows]
    metrics = make_metrics(config)
    _, scores = PairedTest(systems, metrics, [[e.target for e in examples]], test_type="bs", n_samples=1000)()
    print(f"\npaired bootstrap against {rows[0].name!r}, 1000 resamples")
    for name, results in zip(metrics, (scores[key] for key in scores if key != "System")):
        for row, result in zip(rows, results):
            p = "" if result.p_value is None else f"  p = {result.p_value:.4f}"
            if row is not rows[0] and row.hypotheses == rows[0].hypotheses:  # sacreBLEU would call that significant
                p = "  the same outputs"
            print(f"  {name:7} {row.name:20} {result.score:6.2f}  mean {result.mean:6.2f} ± {result.ci:.2f}{p}")


# ----------------------------------------------------------------------------- new text


def translate(folder: Path, stage: str, lines: list[str], config, tokenizer, args, device) -> None:
    """Print one output line per input line. UserError names the first line that is empty or too long."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"line {number} of --input is empty: one sentence a line, please")
    model, _ = load_model(folder / f"{stage}.pt", device)
    prompt = f"<2{config.pair.split('-')[1]}>"
    data = encode(tokenizer, [Example(source_prefix(config) + line.strip(), prompt, "") for line in lines])
    for number, ids in enumerate(data.source, 1):
        if len(ids) > config.max_tokens:
            raise UserError(f"line {number} of --input has {len(ids)} tokens, but this model was trained on at most "
                            f"{config.max_tokens}: split the line")
        if not len(ids):
            raise UserError(f"line {number} of --input holds no text")
    spec = warmup_spec(stage, config, tokenizer)
    hypotheses, warmups = decode_split(model, tokenizer, data, config, spec, args.beams or config.beams)
    for text, warmup in zip(hypotheses, warmups):
        print(f"{warmup}\t{text}" if args.show_warmup and warmup is not None else text)


def export(folder: Path, stage: str, out: Path, tokenizer: Tokenizer) -> None:
    """A stage as a folder that transformers (AutoModelForSeq2SeqLM, AutoTokenizer) and --init load."""
    model, _ = load_model(folder / f"{stage}.pt", "cpu")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    try:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty: choose another folder")
        save_pretrained(model, out)  # ValueError before anything is written
        tokenizer.save(str(out / "tokenizer.json"))
        (out / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    except ValueError as error:
        raise UserError(f"cannot export {stage}.pt: {error}") from None
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot export {stage}.pt to {out}, which may be incomplete: {error}") from None
    print(f"wrote {out}: {STAGES[stage]}" + (stage == "policy") * ". Its decoder writes c <sep> y: see README")


# ----------------------------------------------------------------------------- the program


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="a run folder that train.py made")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test", help="default: test")
    parser.add_argument("--stage", choices=tuple(STAGES), help="default: all that were trained; for "
                        "--input and --export policy or sft")
    parser.add_argument("--pair", help="one direction of a run that has several; default: all, for --input the first")
    parser.add_argument("--beams", type=int, help="beam width, 1: greedy; default: the run's --beams")
    parser.add_argument("--input", metavar="FILE", help="translate this file (-: standard input), line by line")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the stage as a folder for transformers")
    parser.add_argument("--show-warmup", action="store_true", help="with --input: the warmup and a tab first")
    parser.add_argument("--data", default="", help="folder of the data, if it has moved since training")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), help="default: the run's --device")
    parser.add_argument("--threads", type=int, help="CPU threads; default: the run's --threads")
    args = parser.parse_args(argv)
    if args.show_warmup and not args.input:
        parser.error("--show-warmup goes with --input")
    if any(number is not None and number < 1 for number in (args.beams, args.threads)):
        parser.error("--beams and --threads must be at least 1")
    return args


def run(args: argparse.Namespace) -> None:
    config, tokenizer = load_config(args.run), load_tokenizer(args.run)
    device = pick_device(args.device or config.device)
    if args.threads or config.threads:
        torch.set_num_threads(args.threads or config.threads)
    trained = [stage for stage in STAGES if (args.run / f"{stage}.pt").exists()]
    stages = [args.stage] if args.stage else trained
    if not stages:
        raise UserError(f"{args.run} holds no trained stage yet: python train.py --resume {args.run}")
    translates = TASKS[config.task].metrics == "translation"
    one_stage = args.stage or ("policy" if "policy" in trained else "sft")
    if args.export:
        return export(args.run, one_stage, args.export, tokenizer)
    if args.pair and not translates:
        raise UserError(f"--pair is for translation, and {args.run} was trained on {config.task}")
    if args.pair and args.pair not in config.pair.split(","):
        raise UserError(f"{args.run} was trained on {config.pair}, not on {args.pair}")
    several, config.pair = "," in config.pair, args.pair or config.pair
    if args.input:
        config.pair = config.pair.split(",")[0]
        if not translates:
            raise UserError(f"--input translates, and {args.run} was trained on {config.task}")
        try:
            raw = sys.stdin.buffer.read() if args.input == "-" else Path(args.input).read_bytes()
            text = raw.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --input {args.input}: {error}") from None
        return translate(args.run, one_stage, text.removesuffix("\n").split("\n"), config, tokenizer, args, device)
    config.data = args.data or config.data
    if not (args.run / "results.json").exists():  # train.py's last file
        print("note: this run is not finished; its stages are scored as last validated. Go on with python train.py "
              f"--resume {args.run}")
    tables = {}
    for pair, splits in load_pairs(config)[0].items():
        one, split = for_pair(config, pair), args.split if args.split in splits else "valid"
        tables[pair], data = (rows := []), encode_split(tokenizer, splits[split], one, split)
        for stage in stages:
            row = score_stage(args.run, stage, one, tokenizer, splits[split], data, args.beams or config.beams, device)
            rows.append(row)
            path = args.run / f"{split}{f'.{pair}' * several}.{stage}.txt"
            try:
                path.write_text("".join(text + "\n" for text in row.hypotheses), encoding="utf-8")
            except OSError as error:
                raise UserError(f"cannot write {path}: {error}") from None
            print(f"wrote {path}")
        print_table(rows, one, splits[split], split)
        print_examples(rows, splits[split])
        if len(rows) > 1 and make_metrics(one):
            print_significance(rows, one, splits[split])
    print_means(tables)


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
