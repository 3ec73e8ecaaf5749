"""Settings, tasks, their examples as text and as token ids, and batches.

    text pairs --load--> {split: [Example]} --encode--> token ids --Batches--> warmup.Batch

A task is a row of TASKS. Its data is looked for in this order, and the choice is printed: --data
DIR, then data/TASK/ (translation: data/TASK/PAIR/), then built-in data, generated from the seed.

    python data.py wmt --pair de-en             download real data into data/wmt/de-en/

Signatures carry few types: config is a Config (in model.py a ModelConfig), tokenizer is a
tokenizers.Tokenizer. examples is a list of Example as text, data a list of the same as token ids.
Both are of one split; train.py keeps both by split, in dicts. split is its name, stage the name of
a stage.
"""

import argparse
import difflib
import gzip
import io
import json
import os
import random
import re
import shlex
import struct
import sys
import tarfile
import tempfile
import zlib
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import compress, permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import EOS_ID, SIZES, UserError, one_line, read_json
from warmup import ESTIMATORS, NOT_SAMPLED, Batch

PAD, EOS, UNK, SEP = "<pad>", "</s>", "<unk>", "<sep>"  # ids 0 to 3, in this order


class Example(NamedTuple):
    """One item of a task, as text or as token ids. (source, prompt) is x, and the target is y."""

    source: str
    prompt: str  # what the decoder reads before it writes; for translation, a tag such as <2de>
    target: str


@dataclass(frozen=True)
class Task:
    """Where a task's examples come from and how they are scored. All else is shared."""

    metrics: str  # a key of eval.METRICS
    generator: str = ""  # a key of GENERATORS, for built-in data; "": there is none
    reader: str = ""  # a key of READERS, the formats of real data; "": all data is generated
    source_prefix: str = ""  # what a pretrained T5 finds before its sources, as in its own training
    prompt: str = ""  # one that --input may have; "": its examples have none, or --pair's tag
    cut: str = ""  # which side of a long source is cut. "": a long training pair is left out
    settings: dict = field(default_factory=dict)  # defaults of Config for this task


TRANSLATE = "translate {} to {}: "
TASKS = {
    "toy": Task(
        "pointers",
        generator="pointers",
        prompt="<2hops> a",
        settings=dict(
            size="toy",
            built_in_size=100000,
            dropout=0.0,
            weight_decay=0.0,
            sft_steps=400,
            policy_steps=1000,
            batch_tokens=9216,  # 512 examples of 18 tokens
            policy_batch_tokens=2304,  # 128
            max_source_tokens=32,
            max_target_tokens=4,
            lr=4e-3,
            policy_lr=2e-3,
            samples=8,
            warmup_len=1,
            eval_every=50,
            eval_samples=8,
            eval_decode=500,
            beams=1,
        ),
    ),
    "wmt": Task("translation", generator="translation", reader="parallel", source_prefix=TRANSLATE),
    "multi30k": Task(
        "translation",
        reader="parallel",
        source_prefix=TRANSLATE,
        settings=dict(
            vocab_size=6000,
            dropout=0.2,
            batch_tokens=6000,
            policy_batch_tokens=3000,
            lr_rampup_steps=300,
            policy_lr=5e-4,
            sft_steps=3300,
            policy_steps=300,
            eval_every=300,
        ),
    ),
    "xsum": Task(
        "summaries",
        generator="news",
        reader="xsum",
        source_prefix="summarize: ",
        cut="end",
        settings=dict(
            warmup_len=8, max_source_tokens=512, max_target_tokens=64, policy_batch_tokens=3000
        ),
    ),
    "logiqa": Task(
        "options",
        generator="puzzle",
        reader="logiqa",
        cut="start",
        settings=dict(
            size="puzzle",
            built_in_size=50000,
            max_source_tokens=512,
            max_target_tokens=4,
            dropout=0.0,
            weight_decay=0.0,
            sft_steps=1000,
            batch_tokens=12000,
            policy_batch_tokens=3000,
            lr=4e-3,
            beams=1,
        ),
    ),
}
# The stages of a run, in the order of training, and their rows in the table
STAGES = {"sft": "sft", "policy": "warmup", "control": "sft, same compute"}
BASELINES = {"sft": "sft, same tokens", "pause": "pause", "frozen": "warmup, frozen"}  # --estimator


# ----------------------------------------------------------------------------- settings
def flag(default, help, low=1, high=1_000_000_000, choices=None):
    """A setting: its default, what it means and in which unit, a number's range, or its choices."""
    if type(default) in (int, float):
        help += f" [{low} to {high}]"
    return field(default=default, metadata=dict(help=help, limits=(low, high), choices=choices))


def flag_name(name):
    """sft_steps -> --sft-steps."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Each is a flag (--sft-steps for sft_steps). Saved as config.json.

    Defaults are for the built-in translation data; a task's settings replace them. They are our
    choice throughout: the paper's learning rates and batches are for mT5 on GPUs.
    """

    task: str = flag("wmt", "what to train on", choices=TASKS)
    out: str = flag("", "run folder; default: runs/TASK")
    overwrite: bool = flag(False, "replace an earlier run in the same folder")
    sft: str = flag("", "run folder: begin at the policy stage, after the SFT stage of that run")
    # data
    pair: str = flag("de-en", "source-target language codes, for translation")
    data: str = flag(
        "", "folder, or 'built-in'; empty: data/TASK[/PAIR] if it exists, else built-in"
    )
    built_in_size: int = flag(20000, "training examples in the built-in data", 1, 10_000_000)
    symbols: int = flag(16, "task toy: letters in the permutation", 2, 26)
    hops: int = flag(2, "task toy: most look-ups that a question asks for; 0: copy", 0, 9)
    seed: int = flag(0, "of weights, batches, dropout, warmups, built-in data", 0)
    max_source_tokens: int = flag(
        128, "longer sources are cut or left out; see the guide", 2, 100_000
    )
    max_target_tokens: int = flag(128, "of y; longer training pairs are left out", 2, 100_000)
    batch_tokens: int = flag(3000, "source, target, padding in a micro-batch", 16)
    # model
    size: str = flag("tiny", "of a model from scratch", choices=SIZES)
    vocab_size: int = flag(4000, "most tokens in a vocabulary from scratch", 300, 1_000_000)
    init: str = flag("", "Hugging Face folder or name of a T5, mT5, umT5, … to start from")
    dropout: float = flag(0.1, "probability of dropping an activation", 0, 0.99)
    recompute: bool = flag(False, "compute activations again in the backward pass: less memory")
    compile: bool = flag(False, "torch.compile of encoder and decoder: minutes at first")
    # optimisation
    sft_steps: int = flag(900, "updates of the SFT stage")
    policy_steps: int = flag(120, "updates of the policy stage; 0: SFT only", 0)
    control: bool = flag(True, "afterwards SFT again, with the policy stage's FLOPs and dropout")
    policy_batch_tokens: int = flag(1500, "in the policy stage; K samples count once", 16)
    accumulate: int = flag(1, "micro-batches per update, of each process")
    lr: float = flag(3e-3, "peak learning rate of SFT", 1e-12, 10)
    policy_lr: float = flag(1e-3, "peak learning rate of policy stage and control", 1e-12, 10)
    lr_rampup_steps: int = flag(100, "updates of linear rise, at most 1/4 of a stage", 0)
    weight_decay: float = flag(0.01, "AdamW's decay of weight matrices", 0, 100)
    clip: float = flag(1.0, "largest norm of the gradient", 1e-9)
    # warmups
    estimator: str = flag(
        "marginal",
        "see the README; baselines: frozen, pause, sft",
        choices=(*ESTIMATORS, *NOT_SAMPLED, "sft"),
    )
    samples: int = flag(4, "K, warmups sampled per example and update", 1, 1024)
    warmup_len: int = flag(4, "W, tokens in a warmup", 1, 1024)
    alpha: float = flag(1.0, "factor on the reward", 0)
    temperature: float = flag(1.0, "softmax temperature of the warmup policy", 1e-3, 1e3)
    # validation and test
    eval_every: int = flag(100, "updates between validations; each saves last.pt")
    eval_samples: int = flag(4, "warmups per example in the estimate of NLL", 1, 1024)
    eval_decode: int = flag(0, "validation examples to decode at each validation", 0)
    beams: int = flag(4, "beam width for the test table; 1: greedy", 1, 1024)
    length_penalty: float = flag(1.0, "beam score = log-prob / length ** this", 0, 10)
    # machine
    device: str = flag("auto", "auto: cuda, else cpu", choices=("auto", "cpu", "cuda"))
    dtype: str = flag(
        "auto",
        "auto: bfloat16 on CUDA from compute capability 8.0",
        choices=("auto", "float32", "bfloat16"),
    )
    threads: int = flag(0, "CPU threads; 0: torch's choice", 0, 1024)

    @property
    def folder(self):
        """Where the run is saved."""
        return Path(self.out or f"runs/{self.task}")

    @property
    def stages(self):
        """Those of STAGES that are trained."""
        if not self.policy_steps:
            return ["sft"]
        return [stage for stage in STAGES if self.control or stage != "control"]

    @property
    def translates(self):
        return TASKS[self.task].metrics == "translation"

    def problem(self):
        """What is wrong with the settings. "": nothing."""
        for f in fields(self):
            name, value = flag_name(f.name), getattr(self, f.name)
            (low, high), choices = f.metadata["limits"], f.metadata["choices"]
            kinds = (int, float) if f.type is float else (f.type,)
            if type(value) not in kinds:
                return f"{name} must be of type {f.type.__name__}, not {value!r}"
            if f.type in (int, float) and not low <= value <= high:
                return f"{name} must lie between {low} and {high}"
            if choices and value not in choices:
                return f"{name} must be one of {', '.join(choices)}"
        if self.sft and not self.policy_steps:
            return "--sft begins at the policy stage: --policy-steps must be at least 1"
        alone = self.estimator in ("best", *NOT_SAMPLED, *BASELINES)  # needs no other sample
        if self.samples < 2 and self.policy_steps and not alone:
            return f"--estimator {self.estimator} compares warmups: --samples must be at least 2"
        return wrong_pair(self.pair) if self.translates else ""


# With --sft these may differ from the other run's: names, the machine, what later stages read
AFTER_SFT = """out overwrite sft device threads recompute compile policy_steps control
policy_batch_tokens policy_lr estimator samples warmup_len alpha temperature eval_samples""".split()


# ----------------------------------------------------------------------------- text to token ids
def special_ids(tokenizer):
    """Ids that stand for no text: what a warmup may not contain.

    They are <pad>, </s>, <unk>, <sep>, the prompts' tags and, from T5, unused sentinels.
    """
    added = tokenizer.get_added_tokens_decoder()  # words that somebody added to a T5, too
    return tuple(sorted(i for i in added if added[i].special))


def encode(tokenizer, examples):
    """Examples as token ids, an int32 array a field. Every target ends in </s>.

    Only prompts hold special tokens: a "</s>" that somebody wrote is text like any other.
    """
    # T5's own tokenizer reads "</s>" in a text as the special token all the same
    in_text = dict.fromkeys(special_ids(tokenizer), tokenizer.token_to_id(UNK))
    endings = {"source": [], "prompt": [], "target": [EOS_ID]}
    if tokenizer.post_processor:  # `pretrained_tokenizer` says so: T5's sources end in </s>, too
        endings["source"] = endings["target"]
    columns = []
    for name, texts in zip(Example._fields, zip(*examples)):
        # True: special tokens are read as any other text, character by character
        tokenizer.encode_special_tokens = name != "prompt"
        unwanted = {} if name == "prompt" else in_text
        rows = []
        for at in range(0, len(texts), 4096):  # an encoding takes ten times the memory of its ids
            some = tokenizer.encode_batch_fast(texts[at : at + 4096], add_special_tokens=False)
            for encoding in some:
                ids = [unwanted.get(i, i) for i in encoding.ids]
                rows.append(np.array(ids + endings[name], dtype=np.int32))
        columns.append(rows)
    tokenizer.encode_special_tokens = False  # as it was
    return [Example(*row) for row in zip(*columns)]


def encode_split(tokenizer, examples, config, split, scored=True):
    """A split as token ids, within the limits of the run. Prints what is cut or left out.

    scored: every example counts, so sources are cut and references stay whole. In training a pair
    with a long target is left out: cut, it would teach the model to stop in mid-sentence. So is one
    with a long source, unless the task cuts it.
    UserError if prompts differ in length: then padding would stand between prompt and y.
    """
    data = encode(tokenizer, examples)
    prompts = {len(ids.prompt): example.prompt for ids, example in zip(data, examples)}
    if len(prompts) > 1:
        raise UserError(f"all prompts of a task must have as many tokens, not {prompts}")
    side = TASKS[config.task].cut
    cuts_sources = scored or side
    most = config.max_source_tokens
    long_source = lengths(data, "source") > most
    long_target = lengths(data, "target") > config.max_target_tokens
    what = f"of {len(examples)} {split} examples have a"
    fate = f"their source loses its {side or 'end'}" if cuts_sources else "left out"
    say(long_source, f"{what} source over --max-source-tokens {most}: {fate}")
    fate = "the reference stays whole, the output will be cut" if scored else "left out"
    say(long_target, f"{what} target over --max-target-tokens {config.max_target_tokens}: {fate}")

    if scored:
        check_references(data, split)
    if not scored:
        left_out = long_target if cuts_sources else long_source | long_target
        data = compress(data, ~left_out)
    kept_end = int(tokenizer.post_processor is not None)  # T5's </s> stays
    return [ids._replace(source=cut(ids.source, most, side, kept_end)) for ids in data]


# ----------------------------------------------------------------------------- batches
def collate(examples) -> Batch:
    """Examples as token ids -> one batch, padded with 0 (PAD). Prompts must have one length."""
    columns = []
    for column in zip(*examples):
        rows = map(torch.from_numpy, column)
        columns.append(pad_sequence(rows, batch_first=True).long())
    return Batch(*columns)


def group(data, batch_tokens, key):
    """Batches of examples in the order of key: lists of their indices.

    Each has B · (longest S + longest T) <= batch_tokens, padding included, or one example.
    """
    batches = []
    S = T = 0
    for i in np.argsort(key, kind="stable"):
        s, t = len(data[i].source), len(data[i].target)
        S, T = max(S, s), max(T, t)
        if not batches or (len(batches[-1]) + 1) * (S + T) > batch_tokens:
            batches.append([])
            S, T = s, t
        batches[-1].append(i)
    return batches


@dataclass
class Batches:
    """Endless training batches of similar lengths. (seed, epoch, position) fixes the next one.

    So a resumed run restores the order of the data by `seek`.

    N processes take turns: `next` moves on by N batches and returns the rank-th of them. So they
    share an epoch without talking to each other.
    """

    data: list
    batch_tokens: int
    seed: int
    rank: int = 0
    processes: int = 1

    def __post_init__(self):
        self.seek(0, 0)

    def __next__(self) -> Batch:
        for turn in range(self.processes):
            if self.position == len(self.order):  # the other ranks' batches are passed over
                self.seek(self.epoch + 1, 0)
            if turn == self.rank:
                index = self.order[self.position]
            self.position += 1
        return collate([self.data[i] for i in index])

    def seek(self, epoch, position):
        """Go to this place. Seed and epoch fix the order of the batches."""
        self.epoch, self.position = epoch, position
        rng = np.random.default_rng([self.seed, epoch])
        source, target = lengths(self.data, "source"), lengths(self.data, "target")
        # by source, then target length: little padding. Noise gives each epoch other neighbours
        key = source + (target + rng.uniform(0, 2, len(target))) / 1_000_000
        self.order = group(self.data, self.batch_tokens, key)
        rng.shuffle(self.order)


# ===== plumbing: helpers, config.json, where data comes from, tokenizers, built-in data, download
def longest_first(data, batch_tokens, what):
    """Every example once, longest sources first, with its indices. The progress bar says `what`."""
    key = -lengths(data, "source")
    with progress_bar(what, len(data), "example", delay=2, leave=False) as bar:
        for index in group(data, batch_tokens, key):
            yield index, collate([data[i] for i in index])
            bar.update(len(index))


def progress_bar(what, total, unit, **more):
    """tqdm on standard error. In a job's log file it writes twice a minute."""
    if not (sys.stderr and sys.stderr.isatty() or "ipykernel" in sys.modules):
        more |= dict(mininterval=30, maxinterval=30)
    return tqdm(desc=what, total=total, unit=unit, **more)


def say(cases, what):
    """Print how many cases there are, if any. cases: booleans, one an example."""
    if cases.any():
        print(f"data: {cases.sum()} {what}")


def check_references(data, split):
    """UserError for one of over 10,000 tokens: attention takes their square of memory."""
    for number, ids in enumerate(data, 1):
        if len(ids.target) > 10_000:
            raise UserError(
                f"the target of {split} example {number} is too long: remove or split it"
            )


def lengths(data, name):
    """(examples,): how many token ids the field of this name has."""
    return np.array([len(getattr(ids, name)) for ids in data])


def cut(ids, most, side, kept_end):
    """At most `most` of a source's token ids. side: the one that goes, "start" or else the end.

    kept_end: so many tokens at the end stay all the same, as T5's </s>.
    """
    if side == "start":
        return ids[-most:]
    return np.delete(ids, slice(most - kept_end, len(ids) - kept_end))


def read_config(folder) -> Config:
    """The settings in a run's config.json. UserError if they are not those of this program."""
    folder = Path(folder).expanduser()
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"no run in {folder}. One that was killed early: start it again")
    saved = read_json(path) | {"out": str(folder)}
    if saved.keys() != vars(Config()).keys():
        raise UserError(f"{path} is of another version of the program: train again, --overwrite")
    config = Config(**saved)
    if wrong := config.problem():
        raise UserError(f"{path} does not fit this program: {wrong}")
    return config


def lookup(known, key, what):
    """known[key]. UserError, which begins with `what`, if it is not there.

    The names in a row of TASKS are written by hand, so a slip must be said clearly.
    """
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"{what} {key!r}: {hint}")
    return known[key]


def load(config):
    """The splits of a task, and where they come from: "built-in" or a folder. Prints the choice.

    -> {split: [Example]}, origin. "test" may be missing: then validation stands in for it.
    UserError if there is no data, or if it cannot be read.
    """
    task = TASKS[config.task]
    folder = task_folder(config.task, config.pair)
    said = f"task {config.task}:"
    origin = config.data
    if not origin:
        origin = str(folder) if task.reader and folder.is_dir() else "built-in"
    if origin == "built-in" and task.generator:
        generator = lookup(GENERATORS, task.generator, f"{said} data.GENERATORS has no")
        splits = generate_splits(generator, config)
    elif origin == "built-in":
        how = f"python data.py fills {folder}, or " if config.task in CORPORA else ""
        raise UserError(f"{said} there is no built-in data: {how}--data DIR")
    elif task.reader:
        origin = Path(origin).resolve()
        reader = lookup(READERS, task.reader, f"{said} data.READERS has no")
        splits = read_splits(origin, *reader(config.pair))
    else:
        raise UserError(f"{said} all data is generated: leave --data out")
    if splits["train"][0].prompt and not (task.prompt or config.translates):
        raise UserError(f"{said} its examples have prompts, so its row in TASKS needs one, too")
    print(f"data: {origin}, {config.pair}" if config.translates else f"data: {origin}")
    if "test" not in splits:
        print("data: no test split, so the validation split, which picks the checkpoint, is scored")
    prefix = source_prefix(config)
    if prefix:
        print(f"data: every source gets the prefix {prefix!r}")
        for code in sorted({*config.pair.split("-")} - {*LANGUAGES}):
            print(f"note: data.LANGUAGES has no name for {code!r}. A T5 knows languages by name")
    for split, rows in splits.items():
        splits[split] = [example._replace(source=prefix + example.source) for example in rows]
    return splits, str(origin)


LANGUAGES = {  # those of T5's own pairs, and of CORPORA
    "cs": "Czech",
    "de": "German",
    "en": "English",
    "fr": "French",
    "ro": "Romanian",
    "ru": "Russian",
    "zh": "Chinese",
}


def source_prefix(config):
    """What a pretrained model finds before its source. From scratch: nothing.

    T5 was trained on several tasks at once and knows them by such words (Raffel et al. §2.4).
    """
    languages = [LANGUAGES.get(language, language) for language in config.pair.split("-")]
    return TASKS[config.task].source_prefix.format(*languages) if config.init else ""


# ----------------------------------------------------------------------------- readers of real data
SPLITS = {"train": ["train"], "valid": ["valid", "val", "dev"], "test": ["test"]}  # file names


def wrong_pair(pair):
    """What is wrong with --pair. "": nothing."""
    languages = re.fullmatch(r"([^\W\d_]+)-([^\W\d_]+)", pair)
    if languages and languages[1] != languages[2]:
        return ""
    return f"--pair takes two language codes, of letters alone, such as de-en: not {pair!r}"


def task_folder(task, pair):
    """data/TASK, or data/TASK/PAIR, where a pair's folder serves both directions."""
    folder = Path("data") / task
    if TASKS[task].metrics != "translation":
        return folder
    a, b = pair.split("-")
    reverse = folder / f"{b}-{a}"
    return reverse if reverse.is_dir() and not (folder / pair).is_dir() else folder / pair


def read_lines(path):
    """The lines of a text file, plain or .gz, stripped. None: of standard input.

    UserError if it is not UTF-8, is damaged, or has the line ends of old Macs: all of it would be
    one line.
    """
    # utf-8-sig: Windows editors begin files with a mark. Only newlines end lines: U+2028 is text
    name = path or "standard input"
    opener = gzip.open if path and path.suffix == ".gz" else open
    try:
        with opener(path or 0, "rt", encoding="utf-8-sig", newline="\n") as file:
            lines = [line.strip() for line in file]
    except (OSError, EOFError, UnicodeError, zlib.error) as error:
        raise UserError(f"cannot read {name}, which must be text in UTF-8: {error}") from None
    if len(lines) == 1 and "\r" in lines[0]:
        raise UserError(f"the lines of {name} end in CR alone: convert them to LF")
    return lines


def find_files(folder, split, endings):
    """The files of a split, one for each ending, plain or .gz. []: there is no test split."""
    for name in SPLITS[split]:
        names = [f"{name}.{ending}" for ending in endings]
        paths = [
            folder / (plain if (folder / plain).exists() else f"{plain}.gz") for plain in names
        ]
        missing = [plain for plain, path in zip(names, paths) if not path.exists()]
        if not missing:
            return paths
        if len(missing) < len(names):
            raise UserError(f"{folder} has one side of the {split} split only: no {missing[0]}")
    if split != "test":
        expected = f"{split}.{endings[0]}"
        raise UserError(f"no {split} split in {folder}: expected {expected}, plain or .gz")
    return []


def read_splits(folder, endings, to_example):
    """{split: [Example]} of a folder. UserError if a file is missing, but for those of "test".

    endings: of a split's files, such as "de" and "en". to_example makes an Example of one line of
    each of them.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    splits = {}
    for split in SPLITS:
        if paths := find_files(folder, split, endings):
            splits[split] = read_split(paths, to_example, split)
    return splits


def read_split(paths, to_example, split):
    """The examples of one split.

    Those with an empty side are left out of training. Elsewhere that would change the score, so it
    is a UserError, as are a line that cannot be read and files of different lengths.
    """
    names = " and ".join(map(str, paths))
    columns = [read_lines(path) for path in paths]
    counts = [str(len(lines)) for lines in columns]
    if len(set(counts)) > 1:
        raise UserError(f"{names} have {' and '.join(counts)} lines: they must be as many")
    rows = [*zip(*columns)]
    while rows and not any(rows[-1]):  # blank lines at the end are none
        rows.pop()
    examples = []
    empty = 0
    for number, lines in enumerate(rows, 1):
        example = Example("", "", "")
        try:
            if any(lines):
                example = Example(*to_example(*lines))
            "".join(example).encode()  # ValueError for half a surrogate pair
        except Exception as error:  # it may be a student's own
            raise UserError(
                f"line {number} of {names}: its reader failed, {type(error).__name__}: {error}. "
                "docs/guide.md has the formats"
            ) from None
        if example.source.strip() and example.target.strip():
            examples.append(example)
        elif split == "train":
            empty += 1
        else:
            raise UserError(f"line {number} of {names} has an empty side: remove it")
    if not examples:
        raise UserError(f"{names} hold no line with both sides")
    if empty:
        print(f"data: left out {empty} examples with an empty side")
    return examples


def translation(pair, source, target) -> Example:
    """The prompt names the target language."""
    return Example(source, f"<2{pair.split('-')[1]}>", target)


def xsum_row(line) -> Example:
    """A JSON object with "document" and "summary". A line of text each: they may hold line ends."""
    row = json.loads(line)
    return Example(one_line(row["document"]), "", one_line(row["summary"]))


def logiqa_row(line) -> Example:
    """LogiQA 2.0: text, question, four options and the number of the right one.

    ValueError or LookupError if one of them is missing. read_split turns it into one line.
    """
    row = json.loads(line)
    options = [one_line(option) for option in row["options"]]
    answer = row["answer"]
    if (
        type(row["options"]) is dict
        or len(options) != 4
        or type(answer) is not int
        or answer not in range(4)
    ):
        raise ValueError("not four options, or no answer from 0 to 3")
    return multiple_choice(one_line(row["text"]), one_line(row["question"]), options, answer)


# --pair -> the endings of a split's files, and what makes an Example of their lines
READERS = {
    "parallel": lambda pair: (pair.split("-"), partial(translation, pair)),
    "xsum": lambda pair: (["jsonl"], xsum_row),
    "logiqa": lambda pair: (["jsonl"], logiqa_row),
}

# ----------------------------------------------------------------------------- tokenizers
# A word, a digit, signs, or spaces: GPT-2's pattern without its English endings. Unlike there, a
# combining mark is part of its word: Hindi, Thai and Burmese write vowels so. And each digit is a
# token: 57 and 58 share what they share. At most 99 signs: training takes the square of a word.
WORD = r" ?[\p{L}\p{M}]{1,99}|\p{N}| ?[^\s\p{L}\p{M}\p{N}]{1,99}|\s{1,99}(?![^\s\p{N}])|\s{1,99}"


def train_tokenizer(examples, vocab_size) -> Tokenizer:
    """Byte-level byte-pair encoding of source and target together, GPT-2's way.

    All 256 bytes are tokens and nothing is normalised: text in any script comes back as it was.
    Specials and prompt tags come first. <unk> keeps its id, as in T5, but is never needed.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")  # the first word is a word like any other
    words = pre_tokenizers.Split(Regex(WORD), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    without_first_space = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), without_first_space])
    # after a tag the normalizer prepends a space of its own, so the tag takes the one in the text
    tags = [AddedToken(tag, rstrip=True, special=True) for tag in prompt_tags(examples)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, UNK, SEP, *tags],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ([example.source, example.target] for example in examples)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prompt_tags(examples):
    """The words of prompts that are one token each, such as <2de>.

    A tag in pieces would make prompts of different lengths, and teach nothing.
    """
    words = {word for example in examples for word in example.prompt.split()}
    return sorted(word for word in words if word.startswith("<"))


def load_tokenizer(path, *more) -> Tokenizer:
    """A tokenizer.json, of ours or of a T5, with the special tokens that both have, and more.

    UserError if it cannot be read or lacks one.
    Ids with gaps would make rows of the embedding that no text can reach.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
        vocab = tokenizer.get_vocab()
        lacking = {PAD, EOS, UNK, *more} - vocab.keys()
        if lacking or sorted(vocab.values()) != [*range(len(vocab))]:
            raise ValueError("its ids have gaps, or it lacks special tokens")
        return tokenizer
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # bare Exception from tokenizers, for a panic not even that
        raise UserError(f"cannot read {path}: {error}") from None


def pretrained_tokenizer(folder, tags, vocab_size) -> Tokenizer:
    """The tokenizer of a T5, with <sep> and tags in place of its first sentinels, <extra_id_0> …

    So no embedding is resized: the sentinels stand for masked spans in pretraining and for nothing
    in our text. The other sentinels, and embeddings without a token (T5: 28), become special
    tokens, which no warmup and no output may hold.
    """
    if (folder / "tokenizer.json").exists():
        tokenizer = load_tokenizer(folder / "tokenizer.json")
    else:
        tokenizer = read_spiece(folder / "spiece.model", vocab_size)
        if (folder / "added_tokens.json").exists():
            added = read_json(folder / "added_tokens.json")
            known = tokenizer.get_vocab()
            tokenizer.add_tokens(
                [word for word in sorted(added, key=added.get) if word not in known]
            )
    vocab = tokenizer.get_vocab()
    sentinels = [token for token in vocab if "<extra_id_" in token]
    sentinels.sort(key=vocab.get, reverse=True)  # <extra_id_0> has the highest id
    ours = [token for token in (SEP, *tags) if token not in vocab]  # our own exports have them
    is_t5 = isinstance(tokenizer.model, models.Unigram)
    is_t5 = is_t5 and vocab.get(PAD) == 0 and vocab.get(EOS) == 1
    if not is_t5 or len(vocab) > vocab_size or len(sentinels) < len(ours):
        raise UserError(f"the tokenizer in {folder} is not that of a T5 with {vocab_size} tokens")

    # T5's sentinels swallow the spaces around them
    content = tokenizer.to_str().replace('strip":true', 'strip":false')
    for sentinel, token in zip(sentinels, ours):
        content = content.replace(f'"{sentinel}"', json.dumps(token))
    tokenizer = Tokenizer.from_str(content)
    end = [(EOS, 1)]
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {EOS}", special_tokens=end)
    unused = [f"<unused_{i}>" for i in range(vocab_size - len(vocab))]
    # pieces of the vocabulary keep their ids
    tokenizer.add_special_tokens([SEP, *tags, *sentinels[len(ours) :], *unused])
    return tokenizer


def protobuf(data):
    """(field number, value) of a protobuf message: whole numbers, and bytes for all else.

    Read by hand: the protobuf package would be one more to install, for one file of a few models.
    """
    stream = io.BytesIO(data)

    def varint():
        """7 bits a byte, lowest first; the top bit says that more follow."""
        byte = stream.read(1)[0]
        return byte if byte < 128 else byte % 128 + 128 * varint()

    while stream.tell() < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            size = varint() if kind == 2 else 4
            value = stream.read(size)
            if len(value) < size:
                raise ValueError("cut short")
            yield number, value


def read_spiece(path, vocab_size) -> Tokenizer:
    """SentencePiece's spiece.model, a protobuf, as the pipeline that T5's tokenizer.json holds.

    T5 (100) and umT5 (300) expect sentinels <extra_id_N> behind the pieces, counted backwards.
    mT5 has them as pieces.
    """
    try:
        message = list(protobuf(path.read_bytes()))  # 1: a piece; 2: the trainer; 3: the normalizer
        normalizer = dict(protobuf(dict(message)[3]))
        vocab, special = [], []
        for number, value in message:
            if number == 1:
                piece = dict(protobuf(value))
                text = piece[1].decode()
                [score] = struct.unpack("<f", piece[2])
                vocab.append((text, score))
                if piece.get(3) in (2, 3):  # <unk>; </s> and the like
                    special.append(text)
        unknown = vocab.index((UNK, 0.0))
        if dict(protobuf(dict(message)[2]))[3] != 1:  # the kind of model
            raise ValueError("no unigram model")
        rules, squeeze = normalizer.get(2), normalizer.get(4, 1)  # squeeze: no runs of spaces
        steps = [normalizers.Precompiled(rules)] if rules else []
    except Exception:  # a damaged file fails in many ways, and tokenizers raises bare Exception
        raise UserError(
            f"there is no tokenizer.json, and {path} is missing or not a SentencePiece unigram "
            "model, as all T5s have"
        ) from None
    if not any("<extra_id_" in text for text, _ in vocab):
        count = 300 if vocab_size - len(vocab) >= 300 else 100
        vocab += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(count))]
    if squeeze:
        steps.append(normalizers.Strip(left=False, right=True))
    steps.append(normalizers.Replace(Regex(" {2,}"), "▁" if squeeze else " "))
    tokenizer = Tokenizer(models.Unigram(vocab, unknown, False))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    return tokenizer


# ----------------------------------------------------------------------------- built-in data
def pointers(r, config) -> Example:
    """y = f^hops(start): a random permutation f of --symbols letters, 1 to --hops look-ups.

    The source holds f as one word "ij", and so one token, for each f(i) = j. One decoder layer can
    look up one word per token that it reads. So two hops need a token in between: a warmup.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"[: config.symbols]
    hops = r.randint(min(1, config.hops), config.hops)
    source = " ".join(i + j for i, j in zip(letters, r.sample(letters, len(letters))))
    question = Example(source, f"<{hops}hops> {r.choice(letters)}", "")
    return question._replace(target=chain(question)[-1])


def chain(example):
    """The symbols that a question passes through: start, f(start), f(f(start)), … the answer."""
    f = dict(example.source.split())  # a word "ij" is the pair (i, j)
    hops, start = example.prompt.removeprefix("<").split("hops> ")
    symbols = [start]
    for _ in range(int(hops)):
        symbols.append(f[symbols[-1]])
    return symbols


def table(text):
    """ "red,rot|light green,hellgrün" -> [["red", "rot"], ["light green", "hellgrün"]].

    A new line ends a row, too.
    """
    return [row.split(",") for row in re.split(r"[|\n]", text)]


# Nouns: English singular, plural, German singular, plural, gender.
PEOPLE = table("""man,men,Mann,Männer,m|woman,women,Frau,Frauen,f|child,children,Kind,Kinder,n
girl,girls,Mädchen,Mädchen,n|friend,friends,Freund,Freunde,m|teacher,teachers,Lehrer,Lehrer,m
dog,dogs,Hund,Hunde,m|cat,cats,Katze,Katzen,f|sister,sisters,Schwester,Schwestern,f
doctor,doctors,Arzt,Ärzte,m|horse,horses,Pferd,Pferde,n""")
THINGS = table("""house,houses,Haus,Häuser,n|book,books,Buch,Bücher,n|letter,letters,Brief,Briefe,m
door,doors,Tür,Türen,f|window,windows,Fenster,Fenster,n|table,tables,Tisch,Tische,m
lamp,lamps,Lampe,Lampen,f|car,cars,Auto,Autos,n|picture,pictures,Bild,Bilder,n
key,keys,Schlüssel,Schlüssel,m|bag,bags,Tasche,Taschen,f|coat,coats,Mantel,Mäntel,m""")
ADJECTIVES = table("""old,alt|small,klein|big,groß|new,neu|beautiful,schön|strange,seltsam
famous,berühmt|clean,sauber|ugly,hässlich|heavy,schwer""")
# Verbs: English plural, singular, past; German singular, plural, participle, separable particle.
VERBS = table("""see,sees,saw,sieht,sehen,gesehen,|find,finds,found,findet,finden,gefunden,
look at,looks at,looked at,sieht,sehen,gesehen,an|paint,paints,painted,malt,malen,gemalt,
look for,looks for,looked for,sucht,suchen,gesucht,|fetch,fetches,fetched,holt,holen,geholt,ab
forget,forgets,forgot,vergisst,vergessen,vergessen,|buy,buys,bought,kauft,kaufen,gekauft,
sell,sells,sold,verkauft,verkaufen,verkauft,|choose,chooses,chose,sucht,suchen,gesucht,aus
carry,carries,carried,trägt,tragen,getragen,|need,needs,needed,braucht,brauchen,gebraucht,
open,opens,opened,macht,machen,gemacht,auf|close,closes,closed,macht,machen,gemacht,zu""")
TIMES = (
    table("today,heute|every day,jeden Tag|on Monday,am Montag|now,jetzt"),  # present
    table("yesterday,gestern|last week,letzte Woche|in {year},im Jahr {year}"),  # past
)
JOINS = table("because,weil|although,obwohl|if,wenn")
# [case][definite][column]: "ein" or "der", and the ending of an adjective after it. The columns are
# m f n, and plural.
ARTICLES = {
    "nominative": table("ein er,eine e,ein es|der e,die e,das e,die en"),
    "accusative": table("einen en,eine e,ein es|den en,die e,das e,die en"),
}


def noun_phrase(r, case, nouns):
    """(English, German, plural?). Article, adjective and noun agree in gender, number and case."""
    en, en_plural, de, de_plural, gender = r.choice(nouns)
    column = "mfn".index(gender)
    plural, definite = r.random() < 0.3, r.random() < 0.6
    if plural:
        en, de, column, definite = en_plural, de_plural, 3, True  # 3: the column of plurals
    article, ending = ARTICLES[case][definite][column].split()
    if r.random() < 0.4:
        good, gut = r.choice(ADJECTIVES)
        en, de = f"{good} {en}", f"{gut}{ending} {de}"
    an = "an" if en[0] in "aeiou" else "a"
    english_article = "the" if definite else an
    return f"{english_article} {en}", f"{article} {de}", plural


def clause(r, order):
    """One clause in English and German. order: of the German words.

    The finite verb is second in a "main" clause, so the subject moves behind it when the time comes
    first ("front"). In a subordinate clause ("sub") the verb is last. A separable particle or a
    participle closes the clause.
    """
    past = r.random() < 0.5
    base, third, simple_past, singular, many, participle, particle = r.choice(VERBS)
    who, wer, plural = noun_phrase(r, "nominative", PEOPLE)
    whom, wen, _ = noun_phrase(r, "accusative", THINGS)
    year = r.randint(1900, 1999)
    when, wann = (text.format(year=year) for text in r.choice(TIMES[past]))
    if past:  # English simple past, German perfect: hat … aufgemacht
        verb, finite, end = simple_past, "haben" if plural else "hat", particle + participle
        last = f"{end} {finite}"
    else:
        verb, finite, end = base if plural else third, many if plural else singular, particle
        last = end + finite  # a separable verb is one word at the end of a subordinate clause
    if order == "front":
        return f"{when} {who} {verb} {whom}", f"{wann} {finite} {wer} {wen} {end}".strip()
    english = f"{who} {verb} {whom} {when}"
    if order == "sub":
        return english, f"{wer} {wann} {wen} {last}"
    return english, f"{wer} {finite} {wann} {wen} {end}".strip()


def built_in_translation(r, config) -> Example:
    """A sentence, --pair de-en or en-de: a clause, and often a second one that depends on it."""
    if config.pair not in ("de-en", "en-de"):
        raise UserError(f"the built-in data is de-en or en-de: for {config.pair} give --data DIR")
    en, de = clause(r, r.choice(["main", "front"]))
    if r.random() < 0.5:
        why, warum = r.choice(JOINS)
        reason, grund = clause(r, "sub")
        en, de = f"{en} {why} {reason}", f"{de}, {warum} {grund}"
    pair = [text[0].upper() + text[1:] + "." for text in (en, de)]
    if config.pair == "de-en":
        pair.reverse()
    return translation(config.pair, *pair)


NAMES = "Anna Peter Maria Paul Lena Karl Sophie Jonas".split()
# Events: what, its verb in a headline, who answers, a detail.
EVENTS = table("""fire,broke out,firefighters,smoke could be seen for miles
flood,struck,rescuers,the river had risen|storm,hit,engineers,trees blocked several roads
burglary,took place,police,a window was broken|gas leak,was found,experts,homes were emptied""")
SITES = "school hospital library factory station museum market hotel".split()
TOWNS = "Leeds Cardiff Oxford Derby Perth Bangor Newry Dundee Exeter Lincoln".split()


def news(r, config) -> Example:
    """A short news item, and the sentence that sums it up: what, where, how many were hurt."""
    event, verb, helpers, detail = r.choice(EVENTS)
    site = r.choice(SITES)
    name = r.choice(NAMES)
    hours = r.choice("two three six".split())
    town, other = r.sample(TOWNS, 2)
    hurt = r.choice("no two three four five".split())
    details = [
        f"It began at {r.randint(1, 11)} o'clock, and {detail}.",
        f"{name}, who lives nearby, said that nobody had expected it.",
        f"The {helpers} stayed for {hours} hours.",
        f"Last year a similar {event} in {other} made headlines.",
        f"A spokesman said that {hurt} people were being treated for injuries.",
    ]
    r.shuffle(details)
    start = f"Residents of {town} were woken by sirens. The {event} {verb} at the {site}."
    summary = f"{hurt.capitalize()} people were hurt in a {event} at a {site} in {town}."
    return Example(f"{start} {' '.join(details)}", "", summary)


TRAITS = table("older,oldest,youngest|taller,tallest,shortest|faster,fastest,slowest")


def puzzle(r, config) -> Example:
    """Who of four people is the oldest, …? Three comparisons fix their order. y is a letter."""
    more, most, least = r.choice(TRAITS)
    people = r.sample(NAMES, 4)  # in their order: people[0] is the most
    place = r.randrange(4)
    asked = "the " + (most, f"second {most}", f"second {least}", least)[place]
    clues = [f"{a} is {more} than {b}." for a, b in zip(people, people[1:])]
    if r.random() < 0.7:  # an item to begin with: with comparisons alone SFT stayed at chance
        clues = [f"{people[place]} is {asked}."]
    r.shuffle(clues)
    options = r.sample(people, 4)
    answer = options.index(people[place])
    return multiple_choice(" ".join(clues), f"Who is {asked}?", options, answer)


def multiple_choice(text, question, options, answer) -> Example:
    """The source lists the options by letter; y is the letter."""
    listed = " ".join(f"({letter}) {option}" for letter, option in zip("ABCD", options))
    return Example(f"{text} {question} {listed}", "", "ABCD"[answer])


GENERATORS = {
    "pointers": pointers,
    "translation": built_in_translation,
    "news": news,
    "puzzle": puzzle,
}


def check_example(task, example):
    """UserError unless a generator gave an Example of text, with two full sides.

    Generators are what a class writes first. An error here names the task; later it would not.
    """
    match example:
        case Example(str(source), str(), str(target)) if source.strip() and target.strip():
            return
    raise UserError(
        f"task {task}: its generator gave {example!r:.200}, "
        "not an Example of texts with a source and a target"
    )


def generate_splits(generate, config):
    """--built-in-size training examples; 500 of validation and of test, at most a quarter of it.

    The split of an example is a hash of its longer side. So no seed's training data holds another
    seed's test item, and no direction of translation the other's. Of a news item it is a hash of
    the summary: many items share one, and none of the test is seen in training.
    """
    shared = TASKS[config.task].metrics == "summaries"
    size = config.built_in_size
    held_out = min(500, max(1, size // 4))
    missing = {"train": size, "valid": held_out, "test": held_out}
    splits = {split: [] for split in missing}
    seen = set()
    r = random.Random(f"{config.seed}")  # a text is hashed: near seeds have nothing in common
    while any(missing.values()):
        for _ in range(10000):  # for the next example
            example = generate(r, config)
            check_example(config.task, example)
            longer = max(example.source, example.target, key=lambda text: (len(text), text))
            known_by = example.target if shared else longer
            number = zlib.crc32(known_by.encode()) % 20  # a twentieth for test, as for validation
            split = {0: "test", 1: "valid"}.get(number, "train")
            if missing[split] and example not in seen:
                break
        else:  # no draw was taken
            raise UserError(
                f"10,000 draws in a row gave no new example, after {len(seen)} of "
                f"{size + 2 * held_out}: lower --built-in-size (now {size})"
            )
        splits[split].append(example)
        seen.add(example)
        missing[split] -= 1
    return splits


# ----------------------------------------------------------------------------- download
# A task's function yields (file name, line) of all that it downloads; its docstring is printed.
# get(url, sha256) downloads a file and returns its path. The checksums are those that MLCommons'
# Croissant specification (FLORES) and Hugging Face's dataset_infos.json (XSum) state.
GITHUB = "https://raw.githubusercontent.com"
NEWS = "https://data.statmt.org/news-commentary/v18.1/training/news-commentary-v18"
FLORES = dict(deu_Latn="de", eng_Latn="en", fra_Latn="fr", rus_Cyrl="ru", zho_Hans="zh")
FLORES_FILE = (
    "https://dl.fbaipublicfiles.com/nllb/flores200_dataset.tar.gz",
    "b8b0b76783024b85797e5cc75064eb83fc5288b41e9654dabc7be6ae944011f6",
)
XSUM_FILE = (
    "http://bollin.inf.ed.ac.uk/public/direct/XSUM-EMNLP18-Summary-Data-Original.tar.gz",
    "10b48aa187fc9c904b30f76ca97e2da0de8d3a1238acc26acadef93e2001af90",
)
XSUM_IDS = (
    f"{GITHUB}/EdinburghNLP/XSum/master/XSum-Dataset/XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json",
    "9c0c5d8f048a90bd68b19a34e4c30577ed270d3247b2119fa06a04ef46292068",
)
BUTTONS = (
    r"(?m)^\s*(?:Share this with|Email|Facebook|Messenger|Twitter|Pinterest|WhatsApp|Linked[Ii]n|"
    r"Copy this link|These are external links and will open in a new window)\s*$"
)


def members(archive):
    """Path and text of each file in a tar archive. Nothing is unpacked to disk."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if file := tar.extractfile(member):  # None: a folder
                yield Path(member.name), file.read().decode()


def download_wmt(get, a, b):
    """News Commentary v18.1, data.statmt.org: free for research, for all else ask its owners.
    FLORES-200 dev and devtest, github.com/facebookresearch/flores: CC BY-SA 4.0."""
    a, b = sorted((a, b))
    for line in read_lines(get(f"{NEWS}.{a}-{b}.tsv.gz")):
        sides = line.split("\t")
        if len(sides) == 2:  # an empty side ends a document
            yield from zip((f"train.{a}", f"train.{b}"), sides)
    ours = {".dev": "valid", ".devtest": "test"}
    for path, text in members(get(*FLORES_FILE)):  # such as dev/deu_Latn.dev
        lang = FLORES.get(path.stem)
        if lang in (a, b):
            name = f"{ours[path.suffix]}.{lang}"
            for line in text.strip().split("\n"):
                yield name, line


def download_multi30k(get, a, b):
    """Multi30k task 1, github.com/multi30k/dataset: no licence stated; for research."""
    for ours, split in zip(SPLITS, ("train", "val", "test_2016_flickr")):
        for lang in (a, b):
            path = get(f"{GITHUB}/multi30k/dataset/master/data/task1/raw/{split}.{lang}.gz")
            for line in read_lines(path):
                yield f"{ours}.{lang}", line


def download_xsum(get, ending):
    """XSum, github.com/EdinburghNLP/XSum: the articles are the BBC's; for research."""
    ids = json.loads(get(*XSUM_IDS).read_bytes())
    ours = {"train": "train", "validation": "valid", "test": "test"}
    split_of = {number: ours[split] for split in ours for number in ids[split]}
    for path, text in members(get(*XSUM_FILE)):
        if split := split_of.pop(path.stem, None):
            text = re.sub(BUTTONS, "", text)
            # "", name, text, name, text, …: these two come last
            *_, summary, _, document = map(str.strip, text.split("[SN]"))
            if summary and document:
                row = {"document": document, "summary": summary}
                yield f"{split}.{ending}", json.dumps(row, ensure_ascii=False)
    if split_of:
        raise ValueError(f"the archive lacks {len(split_of)} articles")


def download_logiqa(get, ending):
    """LogiQA 2.0, github.com/csitfun/LogiQA2.0: CC BY-NC-SA 4.0."""
    for ours, split in zip(SPLITS, ("train", "dev", "test")):
        path = get(f"{GITHUB}/csitfun/LogiQA2.0/main/logiqa/DATA/LOGIQA/{split}.txt")
        for line in read_lines(path):
            logiqa_row(line)  # there is no checksum: an error page is refused here
            yield f"{ours}.{ending}", line


# For corpora of this size; our choice, never run. The other defaults are for built-in data
LARGE = "--size small --vocab-size 16000 --batch-tokens 12000 --lr 1e-3 --policy-lr 2e-4"
LARGE += " --sft-steps 30000 --policy-steps 3000 --eval-every 1000"
# task -> its function, the languages that it comes in pairs of, settings that fit its size
CORPORA = {
    "wmt": (download_wmt, "de en fr ru zh", LARGE),
    "multi30k": (download_multi30k, "cs de en fr", "--size tiny"),
    "xsum": (download_xsum, "", LARGE),
    "logiqa": (download_logiqa, "", "--size tiny --dropout 0.2 --lr 1e-3"),
}


def download(task, pair, folder):
    """Fill folder with the real data of a task. A split that is there already stays as it is.

    Files are written under another name and renamed: an interrupted download leaves no half file.
    UserError if the network fails, if what comes is not what we expected, or if the folder has one
    side of a split: beside an old file a new one would hold other lines.
    """
    corpus, languages, _ = CORPORA[task]
    sides = pair.split("-") if languages else ["jsonl"]
    files = {f"{split}.{side}": [] for split in SPLITS for side in sides}
    new = [name for name in files if not (folder / name).exists()]
    for split in SPLITS:
        missing = [side for side in sides if f"{split}.{side}" in new]
        if 0 < len(missing) < len(sides):
            raise UserError(
                f"{folder} has one side of the {split} split, without .{missing[0]}: "
                "move it away, then try again"
            )
    print(corpus.__doc__)
    # Windows does not remove a file that an archive's reader still holds open after an error
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:

        def get(url, sha256=None):
            print(f"from {url}")
            path = Path(work) / url.rsplit("/", 1)[1]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
            return path

        try:
            for name, line in corpus(get, *sides):
                files[name].append(line)
            if not all(files.values()):
                raise ValueError("a split has no lines")
        except Exception as error:  # the network's, the disk's, a wrong checksum, an error page
            raise UserError(
                f"cannot download {task}: {type(error).__name__}: {error}. Try again later"
            ) from None
    folder.mkdir(parents=True, exist_ok=True)
    for name in new:
        text = "".join(line + "\n" for line in files[name])
        (folder / f"{name}.part").write_text(text, encoding="utf-8", newline="\n")
    for name in new:  # only now: all sides of a split, or none
        (folder / f"{name}.part").replace(folder / name)
        print(f"wrote {folder / name}: {len(files[name]):,} lines")


# ----------------------------------------------------------------------------- the program
def add_flags(parser, defaults):
    """The fields of Config that defaults names, as flags of a command line.

    defaults: {field: default}. argparse.SUPPRESS: a flag that is not given is not in the result.
    """
    for f in fields(Config):
        if f.name not in defaults:
            continue
        # --out=~/x: a shell leaves this ~ to us
        kind = os.path.expanduser if f.type is str else f.type
        how = {"type": kind, "choices": f.metadata["choices"]}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        how |= {"help": f.metadata["help"], "default": defaults[f.name]}
        parser.add_argument(flag_name(f.name), **how)


def shell_word(path):
    """A path as one word of a command line, for the commands that the program prints."""
    if sys.platform != "win32":
        return shlex.quote(str(path))
    return f'"{path}"' if re.search(r"[^\w.:/\\-]", str(path)) else str(path)


class Parser(argparse.ArgumentParser):
    """Says in two lines what is wrong with the usage: the error, and what may have been meant.

    argparse prints the whole usage, 60 lines here, and the error scrolls away.
    """

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        known = self._option_string_actions
        near = unknown and difflib.get_close_matches(unknown[1], known, 1, 0.75)
        hint = f"did you mean {near[0]}?" if near else "--help lists all flags"
        self.exit(2, f"error: {message}\n{hint}\n")


def program(body):
    """Decorator of a script's main(argv): 0, or 1 after one line that says what is wrong.

    A traceback is for our own errors. What the user can mend is said in a line, without one.
    """

    def main(argv=None):
        try:
            for stream in (sys.stdout, sys.stderr):
                # a file gets UTF-8, as all our files; not every terminal has every character. A
                # notebook's stream has all, and no `reconfigure`
                if hasattr(stream, "reconfigure"):
                    encoding = None if stream.isatty() else "utf-8"
                    stream.reconfigure(encoding=encoding, errors="replace")
            body(argv)
            print(end="", flush=True)  # if the reader has left, it shows here
            return 0
        except KeyboardInterrupt as interrupt:
            said = f"\nstopped; {interrupt}" if str(interrupt) else "\nstopped"
        except BrokenPipeError:  # a reader such as `head` has left
            return 1
        except (UserError, OSError, UnicodeError) as error:
            said = f"error: {one_line(str(error))}"
        except RuntimeError as error:  # torch has no type for the memory of a CPU
            if not re.search("out of memory|allocate mem", str(error)):
                raise
            said = (
                "error: out of memory. Lower --batch-tokens, --policy-batch-tokens, --beams or "
                "--max-target-tokens, or train with --recompute"
            )
        print(said, file=sys.stderr)
        return 1

    return main


@program
def main(argv):
    """The program: python data.py TASK."""
    parser = Parser(description="Download real data.", allow_abbrev=False)
    parser.add_argument("task", choices=CORPORA)
    parser.add_argument("--pair", default="de-en", help="for wmt and multi30k (default: de-en)")
    parser.add_argument("--out", type=Path, help="folder (default: where train.py looks)")
    args = parser.parse_args(argv)
    _, known, settings = CORPORA[args.task]
    if known and tuple(args.pair.split("-")) not in permutations(known.split(), 2):
        parser.error(f"--pair takes two of {known}, such as de-en")
    folder = args.out or task_folder(args.task, args.pair)
    download(args.task, args.pair, folder)
    pair = f" --pair {args.pair}" if known else ""
    print(f"next: python train.py --task {args.task}{pair} {settings} --data {shell_word(folder)}")


if __name__ == "__main__":
    sys.exit(main())
