"""Tasks, their data, the tokenizer, and batches.

    text pairs --load--> {split: [Example]} --encode--> token ids --Batches--> warmup.Batch (padded tensors)

A task is a row of TASKS. Data is looked for in this order, and the choice is printed: `--data DIR`, then
`data/<task>/`, then the built-in sample, which is generated from a seed and needs no download.

    python data.py wmt --pair de-en             download real data into data/wmt/
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import struct
import sys
import tarfile
import time
import zlib
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import accumulate
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, Callable, Iterator, NamedTuple
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from warmup import Batch

PAD, EOS, UNK, SEP = "<pad>", "</s>", "<unk>", "<sep>"  # ids 0 to 3, in this order


class UserError(Exception):
    """Something that the user can mend. Printed as one line, exit code 1, no traceback."""


class Example(NamedTuple):
    source: str
    prompt: str  # what the decoder is told before it writes: for translation, a tag such as <2de>
    target: str


# ----------------------------------------------------------------------------- built-in sample: English-German

def table(text: str) -> list[list[str]]:
    """Rows end at | or a new line, words at a space; _ is a space within a word."""
    return [[word.replace("_", " ") for word in row.split()] for row in text.replace("\n", "|").split("|")]


# Nouns: English singular, plural, German singular, plural, gender.
PEOPLE = table("""man men Mann Männer m|woman women Frau Frauen f|child children Kind Kinder n
girl girls Mädchen Mädchen n|friend friends Freund Freunde m|teacher teachers Lehrer Lehrer m
dog dogs Hund Hunde m|cat cats Katze Katzen f|sister sisters Schwester Schwestern f
doctor doctors Arzt Ärzte m|horse horses Pferd Pferde n""")
THINGS = table("""house houses Haus Häuser n|book books Buch Bücher n|letter letters Brief Briefe m
door doors Tür Türen f|window windows Fenster Fenster n|table tables Tisch Tische m|lamp lamps Lampe Lampen f
car cars Auto Autos n|picture pictures Bild Bilder n|key keys Schlüssel Schlüssel m|bag bags Tasche Taschen f
coat coats Mantel Mäntel m""")
NAMES = "Anna Peter Maria Paul Lena Karl Sophie Jonas".split()
ADJECTIVES = table("""young jung|friendly freundlich|old alt|small klein|big groß|new neu|beautiful schön
strange seltsam|red rot|green grün|cheap billig|heavy schwer""")  # people take the first eight, things the last ten
NUMBERS = table("two zwei|three drei|four vier|five fünf|twelve zwölf")
# Verbs: English base, 3rd person, past; German 3rd person singular, plural, participle, separable prefix, auxiliary.
# The first eight take people or things as object, the next six things only, the last six no object.
VERBS = table("""see sees saw sieht sehen gesehen - hat|look_at looks_at looked_at sieht sehen gesehen an hat
find finds found findet finden gefunden - hat|look_for looks_for looked_for sucht suchen gesucht - hat
fetch fetches fetched holt holen geholt ab hat|forget forgets forgot vergisst vergessen vergessen - hat
need needs needed braucht brauchen gebraucht - hat|paint paints painted malt malen gemalt - hat
buy buys bought kauft kaufen gekauft - hat|sell sells sold verkauft verkaufen verkauft - hat
choose chooses chose sucht suchen gesucht aus hat|carry carries carried trägt tragen getragen - hat
open opens opened macht machen gemacht auf hat|close closes closed macht machen gemacht zu hat
sleep sleeps slept schläft schlafen geschlafen - hat|work works worked arbeitet arbeiten gearbeitet - hat
stay stays stayed bleibt bleiben geblieben - ist|arrive arrives arrived kommt kommen gekommen an ist
wake_up wakes_up woke_up wacht wachen gewacht auf ist|travel travels travelled reist reisen gereist - ist""")
TIMES = (table("today heute|every_day jeden_Tag|on_Monday am_Montag|now jetzt"),
         table("yesterday gestern|last_week letzte_Woche|in_{year} im_Jahr_{year}"))  # present, past
PLACES = table("""in_the_garden im_Garten|at_the_station am_Bahnhof|in_London in_London|at_home zu_Hause
with_{en} mit_{de}""")
JOINS = table("because weil|although obwohl|if wenn")
SAYS = table("says sagt say sagen|knows weiß know wissen|hopes hofft hope hoffen")
# Endings for m f n plural, by case: "der", "ein-" (. is none), adjectives after either, adjectives after a number.
ENDINGS = {"nom": table("der die das die|. e . e|e e e en|er e es en|. . . e"),
           "acc": table("den die das die|en e . e|en e e en|en e es en|. . . e"),
           "dat": table("dem der dem den|em er em en|en en en en|en en en en|. . . en")}


def noun_phrase(r: random.Random, case: str, nouns: list, negated: bool = False) -> tuple[str, str, bool]:
    """English, German, plural? Article, adjective and noun agree in gender, number and case."""
    if nouns is PEOPLE and r.random() < 0.15:
        name = r.choice(NAMES)
        return name, name, False
    en, en_plural, de, de_plural, gender = r.choice(nouns)
    kind = r.choice(["the", "the", "a", "my", "number"])
    plural = kind == "number" or (kind != "a" and r.random() < 0.3)
    definite, indefinite, weak, mixed, strong = (row["mfn".index(gender) if not plural else 3] for row in ENDINGS[case])
    if kind == "number":
        (word_en, word_de), ending = r.choice(NUMBERS) if r.random() < 0.7 else [str(r.randint(13, 99))] * 2, strong
    elif kind == "the":
        word_en, word_de, ending = "the", definite, weak
    else:
        stem = "mein" if kind == "my" else "kein" if negated else "ein"
        word_en, word_de, ending = kind, stem + indefinite.strip("."), mixed
    if plural:  # dative plural: den Kindern
        en, de = en_plural, de_plural + ("n" if case == "dat" and de_plural[-1] not in "ns" else "")
    if r.random() < 0.4:
        adjective_en, adjective_de = r.choice(ADJECTIVES[:8] if nouns is PEOPLE else ADJECTIVES[2:])
        en, de = f"{adjective_en} {en}", f"{adjective_de}{ending} {de}"
    word_en = "an" if word_en == "a" and en[0] in "aeiou" else word_en
    return f"{word_en} {en}", f"{word_de} {de}", plural


def clause(r: random.Random, order: str) -> tuple[str, str]:
    """One clause in English and German. order: of the German words, "main", "front", "sub" or "inv".

    The finite verb is second in a main clause, so the subject moves behind it when an adverbial ("front") or
    another clause ("inv") comes first; in a subordinate clause ("sub") it is last. Separable prefixes and
    participles close the clause.
    """
    which, past, negated = r.randrange(len(VERBS)), r.random() < 0.5, r.random() < 0.2
    base, third, simple_past, singular, many, participle, prefix, auxiliary = VERBS[which]
    s_en, s_de, plural = noun_phrase(r, "nom", PEOPLE)
    o_en = o_de = place_en = place_de = time_en = time_de = ""
    if which < 14:
        o_en, o_de, _ = noun_phrase(r, "acc", r.choice([PEOPLE, THINGS]) if which < 8 else THINGS, negated)
    if order == "front" or r.random() < 0.5:
        year = r.randint(1900, 1999)
        time_en, time_de = (text.format(year=year) for text in r.choice(TIMES[past]))
    if r.random() < 0.35:
        en, de, _ = noun_phrase(r, "dat", PEOPLE)
        place_en, place_de = (text.format(en=en, de=de) for text in r.choice(PLACES))
    v_en = simple_past if past else base if plural else third
    if negated:
        v_en = ("did not " if past else "do not " if plural else "does not ") + base
    no = "nicht" if negated and not o_de.startswith("kein") else ""
    finite, end = many if plural else singular, prefix.strip("-")
    last = end + finite  # separable verbs are one word at the end of a subordinate clause
    if past:  # English simple past, German perfect: hat ... aufgemacht, ist ... angekommen
        finite, end = {"hat": ("hat", "haben"), "ist": ("ist", "sind")}[auxiliary][plural], end + participle
        last = f"{end} {finite}"
    middle = [o_de, no, place_de]
    german = {"main": [s_de, finite, time_de, *middle, end], "front": [time_de, finite, s_de, *middle, end],
              "sub": [s_de, time_de, *middle, last], "inv": [finite, s_de, time_de, *middle, end]}
    english = [s_en, v_en, o_en, place_en]
    english = [time_en, *english] if order == "front" else [*english, time_en]
    return " ".join(filter(None, english)), " ".join(filter(None, german[order]))


def sentence(r: random.Random) -> tuple[str, str]:
    """One sentence of the sample as (English, German)."""
    kind, (join_en, join_de) = r.random(), r.choice(JOINS)
    if kind < 0.55:
        en, de = clause(r, "front" if kind < 0.25 else "main")
    elif kind < 0.7:
        (en, de), (because_en, because_de) = clause(r, "main"), clause(r, "sub")
        en, de = f"{en} {join_en} {because_en}", f"{de}, {join_de} {because_de}"
    elif kind < 0.85:
        (because_en, because_de), (en, de) = clause(r, "sub"), clause(r, "inv")
        en, de = f"{join_en} {because_en}, {en}", f"{join_de} {because_de}, {de}"
    else:
        (who_en, who_de, plural), say, (en, de) = noun_phrase(r, "nom", PEOPLE), r.choice(SAYS), clause(r, "sub")
        en, de = f"{who_en} {say[2 * plural]} that {en}", f"{who_de} {say[2 * plural + 1]}, dass {de}"
    return en[0].upper() + en[1:] + ".", de[0].upper() + de[1:] + "."


def translation_sample(r: random.Random, config) -> Example:
    """One pair of the sample, --pair de-en or en-de."""
    if config.pair not in ("de-en", "en-de"):
        raise UserError(f"the built-in sample is German-English: use --pair de-en or en-de, not {config.pair}, or "
                        f"real text: python data.py wmt --pair {config.pair}, or --data DIR")
    en, de = sentence(r)
    return translation(config.pair, *((en, de) if config.pair == "en-de" else (de, en)))


# ----------------------------------------------------------------------------- built-in sample: pointer chasing


def pointers(r: random.Random, config) -> Example:
    """y = f^hops(start) for a random permutation f of --symbols letters; 1 to --hops look-ups (0: copy start).

    The source holds f as one word "ij" for each f(i) = j, which becomes one token. One decoder layer can look
    up one word per token that it writes, so two hops need a token in between: a warmup.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"[: config.symbols]
    hops = r.randint(min(1, config.hops), config.hops)
    source = " ".join(i + j for i, j in zip(letters, r.sample(letters, len(letters))))
    question = Example(source, f"<{hops}hops> {r.choice(letters)}", "")
    return question._replace(target=chain(question)[-1])


def chain(example: Example) -> list[str]:
    """The symbols that a pointer question passes through: start, f(start), f(f(start)), ... the answer."""
    f = dict(example.source.split())  # a word "ij" is the pair (i, j)
    hops, start = example.prompt.removeprefix("<").split("hops> ")
    return list(accumulate(range(int(hops)), lambda symbol, _: f[symbol], initial=start))


# ----------------------------------------------------------------------------- built-in samples: news, logic puzzles

# Events: what, its verb in a headline, who answers, a detail.
EVENTS = table("""fire broke_out firefighters smoke_could_be_seen_for_miles|flood struck rescuers the_river_had_risen_overnight
storm hit engineers trees_blocked_several_roads|power_cut hit engineers the_lights_went_out_at_once
burglary took_place police a_window_had_been_broken|gas_leak was_found firefighters nearby_homes_were_emptied""")
SITES = "school hospital library factory station museum market hotel".split()
TOWNS = "Leeds Cardiff Oxford Derby Perth Bangor Newry Dundee Exeter Lincoln".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday".split()


def news(r: random.Random, config) -> Example:
    """A short news item and the sentence that sums it up: what, where, how many were hurt. The rest is detail."""
    (event, verb, helpers, detail), site, town, day = r.choice(EVENTS), r.choice(SITES), r.choice(TOWNS), r.choice(DAYS)
    hurt, other = r.choice(["", "one", "two", "three", "four", "five"]), r.choice([x for x in TOWNS if x != town])
    people = "person was" if hurt == "one" else "people were"
    a = "an" if event[0] in "aeiou" else "a"
    details = [f"It began at {r.randint(1, 11)} o'clock in the {r.choice(['morning', 'evening'])}, and {detail}.",
               f"{r.choice(NAMES)}, who lives nearby, said that nobody had expected it.",
               f"The {helpers} stayed for {r.choice(['two', 'three', 'six'])} hours.",
               f"Last year a similar {event} in {other} made headlines.",
               f"The {site} will open again on {r.choice([x for x in DAYS if x != day])}.",
               f"A hospital spokesman said that {hurt or 'no'} {people} being treated for injuries."]
    r.shuffle(details)
    start = f"Residents of {town} were woken by sirens on {day}. The {event} {verb} at the {site}."
    summary = f"{hurt} {people} hurt" if hurt else "nobody was hurt"
    return Example(f"{start} {' '.join(details)}", "", f"{summary} in {a} {event} at a {site} in {town}.".capitalize()
                   .replace(town.lower(), town))


TRAITS = table("older oldest youngest|taller tallest shortest|faster fastest slowest|richer richest poorest")


def puzzle(r: random.Random, config) -> Example:
    """Who of four people is the oldest, …? Three comparisons that fix their order, or (7 of 10) the answer in words.

    y is the letter of the option. The easy items are there to be learnt first: with comparisons in all of them,
    1,500 updates from scratch stayed at chance.
    """
    (more, most, least), people = r.choice(TRAITS), r.sample(NAMES, 4)  # in their order: people[0] is the most
    place = r.randrange(4)
    asked = [f"the {most}", f"the second {most}", f"the second {least}", f"the {least}"][place]
    clues = [f"{a} is {more} than {b}." if r.random() < 0.5 else f"{b} is not as {more.removesuffix('r').removesuffix('e')}"
             f" as {a}." for a, b in zip(people, people[1:])]
    if r.random() < 0.7:
        clues = [f"{people[place]} is {asked}."]
    r.shuffle(clues)
    options = r.sample(people, 4)
    return multiple_choice(" ".join(clues), f"Who is {asked}?", options, options.index(people[place]))


def multiple_choice(text: str, question: str, options: list[str], answer: int) -> Example:
    """The source lists the options by letter; y is the letter."""
    listed = " ".join(f"({letter}) {option}" for letter, option in zip("ABCD", options))
    return Example(f"{text} {question} {listed}", "", "ABCD"[answer])


def generate_splits(draw: Callable, config) -> dict[str, list[Example]]:
    """--sample-size training examples and 500 each (at most a quarter of that) for validation and test.

    Which split an example belongs to is a hash of its longer side, so no seed's training data ever holds
    another seed's test item, and no direction of translation the other's.
    """
    held_out = min(500, max(1, config.sample_size // 4))
    r, wanted = random.Random(f"{config.seed}"), {"train": config.sample_size, "valid": held_out, "test": held_out}
    splits: dict[str, dict] = {split: {} for split in wanted}  # dicts: no example twice
    in_vain = 0
    while in_vain < 10000:
        if all(len(splits[split]) == n for split, n in wanted.items()):
            return {split: list(rows) for split, rows in splits.items()}
        size = sum(map(len, splits.values()))
        example = draw(r, config)
        text = max(example.source, example.target, key=lambda text: (len(text), text))
        split = {0: "test", 1: "valid"}.get(zlib.crc32(text.encode()) % 20, "train")
        if len(splits[split]) < wanted[split]:
            splits[split][example] = None
        in_vain = 0 if sum(map(len, splits.values())) > size else in_vain + 1
    raise UserError(f"the sample of task {config.task} holds too few different examples: lower --sample-size")


# ----------------------------------------------------------------------------- real data: parallel line files


def translation(pair: str, source: str, target: str) -> Example:
    return Example(source, f"<2{pair.split('-')[1]}>", target)  # the prompt names the target language


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, plain or .gz, stripped. UserError if it is missing, broken or not UTF-8."""
    try:
        how = dict(mode="rt", encoding="utf-8-sig", newline="\n")  # -sig: Windows editors begin files with a mark
        with gzip.open(path, **how) if path.suffix == ".gz" else open(path, **how) as f:
            return [line.strip() for line in f]  # split at newlines only: U+2028 and the like are text
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def parallel_files(folder: Path, pair: str, split: str) -> tuple[Path, Path] | None:
    """Source and target file of a split: SPLIT.LANG or SPLIT.PAIR.LANG, either order of the pair, plain or .gz.

    split is a glob: "test*" finds test_2016_flickr. The alphabetically first that has both sides counts.
    """
    source, target = pair.split("-")
    stems = ("", f".{source}-{target}", f".{target}-{source}")
    for stem in stems:
        for a in sorted(p for end in ("", ".gz") for p in folder.glob(f"{split}{stem}.{source}{end}")):
            base = a.name.removesuffix(".gz").removesuffix(f"{stem}.{source}")
            for b in (folder / f"{base}{stem}.{target}", folder / f"{base}{stem}.{target}.gz"):
                if b.exists():
                    return a, b
    return None


def read_parallel(pair: str, folder: Path) -> dict[str, list[Example]]:
    """Splits train, valid (or val) and test (the first test*) of a folder; without a test split, no key "test"."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give --data a folder with files such as train.de and train.en")
    splits = {}
    for split, globs in {"train": ["train"], "valid": ["valid", "val", "dev"], "test": ["test*"]}.items():
        files = next(filter(None, (parallel_files(folder, pair, name) for name in globs)), None)
        if files is None:
            if split == "test":
                continue
            langs = pair.split("-")
            raise UserError(f"no {split} split for {pair} in {folder}: expected {globs[0]}.{langs[0]} and "
                            f"{globs[0]}.{langs[1]}, or {globs[0]}.{pair}.{langs[0]} and so on, plain or .gz")
        source, target = read_lines(files[0]), read_lines(files[1])
        if len(source) != len(target):
            raise UserError(f"{files[0]} has {len(source)} lines but {files[1]} has {len(target)}: "
                            "line i of one must translate line i of the other")
        rows = [(number, s, t) for number, (s, t) in enumerate(zip(source, target), 1)]
        empty = [number for number, s, t in rows if not s or not t]
        if empty and split != "train":  # dropping test lines would change the score: refuse
            raise UserError(f"line {empty[0]} of {files[0]} or {files[1]} is empty: remove it from both files")
        if len(empty) == len(rows):
            raise UserError(f"{files[0]} and {files[1]} hold no pair of non-empty lines")
        if empty:
            print(f"{files[0].name}: left out {len(empty)} pairs with an empty side")
        splits[split] = [translation(pair, s, t) for _, s, t in rows if s and t]
    return splits


# ----------------------------------------------------------------------------- real data: JSON lines


def xsum_row(row: dict) -> Example:
    return Example(" ".join(row["document"].split()), "", " ".join(row["summary"].split()))


def logiqa_row(row: dict) -> Example:
    """LogiQA 2.0: text, question, four options and the number of the right one."""
    text, question, options = row["text"], row["question"], row["options"]
    if len(options) != 4 or row["answer"] not in range(4):
        raise ValueError
    return multiple_choice(*(" ".join(x.split()) for x in (text, question)), [" ".join(x.split()) for x in options],
                           row["answer"])


def read_json_lines(row: Callable[[dict], Example], folder: Path) -> dict[str, list[Example]]:
    """Splits train, valid (val, validation, dev) and test of a folder: SPLIT.jsonl (or .json, .txt), plain or .gz."""
    splits = {}
    for split, names in {"train": ["train"], "valid": ["valid", "val", "validation", "dev"], "test": ["test"]}.items():
        endings = [f"{kind}{end}" for kind in ("jsonl", "json", "txt") for end in ("", ".gz")]
        files = (folder / f"{name}.{ending}" for name in names for ending in endings)
        path = next((file for file in files if file.exists()), None)
        if path is None:
            if split == "test":
                continue
            raise UserError(f"no {split} split in {folder}: expected {names[0]}.jsonl, one JSON object a line")
        splits[split] = []
        for number, line in enumerate(read_lines(path), 1):
            try:
                example = row(json.loads(line))
                if not example.source or not example.target:
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"line {number} of {path} is not an object with the fields of this task, none of them "
                                "empty (see README, Your own text)") from None
            splits[split].append(example)
        if not splits[split]:
            raise UserError(f"{path} is empty")
    return splits


# ----------------------------------------------------------------------------- the table of tasks


LANGUAGES = dict(de="German", en="English", fr="French", ru="Russian", zh="Chinese", cs="Czech", ro="Romanian")


def source_prefix(config) -> str:
    """What a pretrained model finds before its source, as T5 did in its training; "" from scratch."""
    if not config.init or TASKS[config.task].metrics != "translation":
        return TASKS[config.task].prefix if config.init else ""
    source, target = (LANGUAGES.get(lang, lang) for lang in config.pair.split("-"))
    return f"translate {source} to {target}: "


@dataclass(frozen=True)
class Task:
    """A task is how to sample it, how to read it, and how it is scored; everything else is shared."""

    draw: Callable[[random.Random, Any], Example] | None  # one example of the built-in sample
    read: Callable[[str, Path], dict[str, list[Example]]] | None  # (pair, folder) -> splits
    metrics: str  # a key of eval.METRICS
    prefix: str = ""  # see source_prefix
    cut: str = ""  # which part a long source can do without, "end" or "start"; "": a long training pair is left out
    settings: dict = field(default_factory=dict)  # defaults of train.Config that are other than usual
    scratch: dict = field(default_factory=dict)  # more of them, for a model from scratch


TOY = dict(size="toy", sample_size=100000, dropout=0.0, label_smoothing=0.0, weight_decay=0.0, sft_steps=400,
           policy_steps=500, batch_tokens=512 * 18, policy_batch_tokens=128 * 18, lr=4e-3, policy_lr=4e-3, samples=8,
           warmup_len=1, eval_every=50, eval_samples=8, eval_decode=500, beams=1)  # 18: 16 source and 2 target tokens
TASKS = {
    "toy": Task(pointers, None, "pointers", settings=TOY),
    "wmt": Task(translation_sample, read_parallel, "translation"),
    "multi30k": Task(None, read_parallel, "translation"),
    "xsum": Task(news, lambda pair, folder: read_json_lines(xsum_row, folder), "summaries", "summarize: ", "end",
                 dict(warmup_len=8, max_tokens=512, policy_batch_tokens=3000)),
    "logiqa": Task(puzzle, lambda pair, folder: read_json_lines(logiqa_row, folder), "options", "", "start",
                   dict(max_tokens=512, policy_batch_tokens=3000, label_smoothing=0.0, beams=1),
                   dict(size="puzzle", sample_size=50000, sft_steps=1000, batch_tokens=12000, lr=4e-3, dropout=0.0,
                        weight_decay=0.0)),
}


def for_pair(config, pair: str) -> SimpleNamespace:
    """A run's settings for one of the directions that it has."""
    return SimpleNamespace(**(vars(config) | {"pair": pair}))


def load_pairs(config) -> tuple[dict[str, dict[str, list[Example]]], str]:
    """{direction: its splits} for each of --pair, and where they come from. Other tasks: one, whatever its name."""
    pairs = config.pair.split(",") if TASKS[config.task].metrics == "translation" else [config.pair]
    loaded = {pair: load(for_pair(config, pair)) for pair in pairs}
    return {pair: splits for pair, (splits, _) in loaded.items()}, loaded[pairs[0]][1]


def load(config) -> tuple[dict[str, list[Example]], str]:
    """The splits of a task and where they come from ("sample" or a folder). Prints the choice in one line.

    config: train.Config, of which --data "" looks for data/<task>/ and falls back to the sample; "sample"
    insists on it.
    """
    task, pair = TASKS[config.task], config.pair
    parallel = task.metrics == "translation"
    if parallel and (len(set(pair.split("-"))) != 2 or not all(lang.isalpha() for lang in pair.split("-"))):
        raise UserError(f"--pair takes two language codes such as de-en, or several such pairs (de-en,en-fr), not {pair!r}")
    folder = Path(config.data) if config.data else Path("data") / config.task
    if task.read and config.data != "sample" and (config.data or folder.is_dir()):
        splits, origin = task.read(pair, folder), str(folder.resolve())
        print(f"data: {origin}{f', {pair}' * parallel}")
    elif not task.draw:
        raise UserError(f"task {config.task} has no built-in sample: python data.py {config.task} --pair {pair} fills "
                        f"{folder}/, --data DIR takes a folder of your own files (README, Your own text)")
    elif not task.read and config.data not in ("", "sample"):
        raise UserError(f"task {config.task} is generated: leave --data out")
    else:
        splits, origin = generate_splits(task.draw, config), "sample"
        print(f"data: built-in sample{f', {pair}' * parallel}" + (task.read is not None) * ". For real text: python "
              f"data.py {config.task}{f' --pair {pair}' * parallel}, or --data FOLDER (README, Your own text)")
    if "test" not in splits:
        print("data: no test split, so the validation split, which also picks the checkpoint, is scored in its place")
    prefix = source_prefix(config)
    return {name: [e._replace(source=prefix + e.source) for e in rows] for name, rows in splits.items()}, origin


# ----------------------------------------------------------------------------- tokenizer


def train_tokenizer(examples: list[Example], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding of source and target together. Special tokens and prompt tags (<2de>) come first."""
    tags = prompt_tags(examples)
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # numbers digit by digit: 57 and 58 share what they share
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, EOS, UNK, SEP, *tags],
                                  show_progress=False, limit_alphabet=vocab_size // 2)
    tokenizer.train_from_iterator((text for e in examples for text in (e.source, e.target)), trainer)
    return tokenizer


def prompt_tags(examples: list[Example]) -> list[str]:
    """The words of prompts that are one token each, such as <2de>."""
    return sorted({word for example in examples for word in example.prompt.split() if word.startswith("<")})


def protobuf(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: whole numbers, and bytes for all else."""
    at = 0

    def varint() -> int:
        nonlocal at
        number = shift = 0
        while True:  # 7 bits a byte, lowest first; the top bit says that more follow
            at, shift, byte = at + 1, shift + 7, data[at]
            number |= (byte & 127) << (shift - 7)
            if byte < 128:
                return number

    while at < len(data):
        field, kind = divmod(varint(), 8)
        if kind == 0:
            yield field, varint()
        else:
            size = {1: 8, 5: 4}[kind] if kind != 2 else varint()
            at += size
            yield field, data[at - size : at]


def read_spiece(path: Path, vocab_size: int) -> Tokenizer:
    """SentencePiece's spiece.model, a protobuf, as the pipeline that T5's tokenizer.json holds.

    Unigram pieces with scores; normalisation by the precompiled table; "_" before each word. Checkpoints of
    T5 (100) and umT5 (300) expect sentinels <extra_id_N> behind the pieces, counted backwards; mT5 has them as
    pieces. Byte fallback is off, as in their tokenizer.json.
    """
    try:
        pieces, trainer, normalizer = [], {}, {}
        for field, value in protobuf(path.read_bytes()):
            if field == 1:
                piece = dict(protobuf(value))
                pieces.append((piece[1].decode(), *struct.unpack("<f", piece.get(2, bytes(4))), piece.get(3, 1)))
            elif field == 2:
                trainer = dict(protobuf(value))
            elif field == 3:
                normalizer = dict(protobuf(value))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except (KeyError, IndexError, TypeError, ValueError, struct.error):
        pieces = []
    if not pieces or trainer.get(3) != 1:
        raise UserError(f"{path} is not a SentencePiece unigram model: T5, mT5 and umT5 have such")
    vocab = [(text, score) for text, score, _ in pieces]
    special = [text for text, _, kind in pieces if kind in (2, 3)]  # <unk>, and control symbols such as </s>
    if not any("<extra_id_" in text for text, _ in vocab):
        sentinels = [f"<extra_id_{i}>" for i in reversed(range(300 if vocab_size - len(vocab) >= 300 else 100))]
        vocab, special = vocab + [(text, 0.0) for text in sentinels], special + sentinels
    tokenizer = Tokenizer(models.Unigram(vocab, [kind for *_, kind in pieces].index(2), False))
    steps = [normalizers.Precompiled(normalizer[2])] if normalizer.get(2) else []
    if normalizer.get(4, 1):  # remove_extra_whitespaces
        steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    else:
        steps += [normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return tokenizer


def pretrained_tokenizer(folder: Path, tags: list[str], vocab_size: int) -> Tokenizer:
    """The tokenizer of a T5 checkpoint, with <sep> and tags in place of its first sentinels (<extra_id_0> …).

    So no embedding is resized: the sentinels stand for masked spans in pretraining and for nothing in our text.
    The other sentinels, and the embeddings that have no token (T5: 28), become special tokens that no warmup
    and no output may hold.
    """
    if (folder / "tokenizer.json").exists():
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"cannot read {folder}/tokenizer.json: {error}") from None
    elif (folder / "spiece.model").exists():
        tokenizer = read_spiece(folder / "spiece.model", vocab_size)
    else:
        raise UserError(f"{folder} has neither tokenizer.json nor spiece.model")
    numbers = {token: re.fullmatch(r"▁?<extra_id_(\d+)>", token) for token in tokenizer.get_vocab()}
    sentinels = sorted((token for token, found in numbers.items() if found), key=lambda token: int(numbers[token][1]))
    ours = [token for token in (SEP, *tags) if token not in numbers]  # what eval.py --export wrote has them
    if not {PAD, EOS, UNK} <= numbers.keys() or len(sentinels) < len(ours) or len(numbers) > vocab_size:
        raise UserError(f"the tokenizer in {folder} is not that of its T5: it has {len(numbers)} tokens (the model: "
                        f"{vocab_size}), {len(sentinels)} of them sentinels <extra_id_N> ({len(ours)} needed)")
    names, content = dict(zip(sentinels, ours)), json.loads(tokenizer.to_str())
    for piece in content["model"]["vocab"]:
        piece[0] = names.get(piece[0], piece[0])
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
        token["lstrip"] = token["rstrip"] = False  # T5's sentinels swallow the spaces around them
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(  # T5 has read all its sources with </s> at the end
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))])
    unused = [f"<unused_{i}>" for i in range(vocab_size - len(numbers))]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)
                                  for text in (SEP, *tags, *sentinels[len(ours) :], *unused)])
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that stand for no text: what a warmup may not contain."""
    return tuple(sorted(tokenizer.get_added_tokens_decoder()))


class Encoded(NamedTuple):
    """One split as token ids: N int32 arrays a column, the target with its </s>."""

    source: list[np.ndarray]
    prompt: list[np.ndarray]
    target: list[np.ndarray]


def encode(tokenizer: Tokenizer, examples: list[Example]) -> Encoded:
    """Token ids. "</s>" in a source or target is text, spelled out in pieces; only prompts hold special tokens."""
    columns, unknown = [], tokenizer.token_to_id(UNK)
    special = set(special_ids(tokenizer))
    eos = [tokenizer.token_to_id(EOS)]
    ends = (eos if tokenizer.post_processor else [], [], eos)  # pretrained_tokenizer sets a post_processor
    for name, texts, end in zip(Example._fields, zip(*examples), ends):
        tokenizer.encode_special_tokens = name != "prompt"
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        rows = (encoding.ids for encoding in encodings)
        if name != "prompt":  # T5's own tokenizer would still read "</s>" in a text as the end of it
            rows = ([unknown if i in special else i for i in row] for row in rows)
        columns.append([np.array(row + end, dtype=np.int32) for row in rows])
    return Encoded(*columns)


def shorten(data: Encoded, max_tokens: int, cut: str) -> tuple[Encoded, int]:
    """How many sources are longer than max_tokens? cut: they lose their "end" (but the last token) or their "start".

    cut "": pairs with a side that is longer are left out.
    """
    long = [len(s) > max_tokens or (not cut and len(t) > max_tokens) for s, t in zip(data.source, data.target)]
    if not cut:
        return Encoded(*([row for row, out in zip(column, long) if not out] for column in data)), sum(long)
    shorter = {"start": lambda s: s[-max_tokens:], "end": lambda s: np.append(s[: max_tokens - 1], s[-1])}[cut]
    source = [shorter(s) if out else s for s, out in zip(data.source, long)]
    return data._replace(source=source), sum(long)


def encode_split(tokenizer: Tokenizer, examples: list[Example], config, split: str, scored: bool = True) -> Encoded:
    """A split as token ids, cut or (unless scored) thinned out by --max-tokens. Prints how many examples that concerns."""
    cut = TASKS[config.task].cut or ("end" if scored else "")  # what is scored keeps all its examples
    data, long = shorten(encode(tokenizer, examples), config.max_tokens, cut)
    if long:
        print(f"data: {long} of {len(examples)} {split} examples are longer than --max-tokens {config.max_tokens}: "
              f"{f'their source loses its {cut}' if cut else 'left out'}")
    return data


# ----------------------------------------------------------------------------- several processes
#
# Under torchrun N processes run the same program, each on its share of the batches. They meet in `gather` and
# `add_up`, which all must call in the same order. Alone, a process gets back what it gave.


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0. Rank 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def meeting():
    """What torch raises where processes meet means that one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        raise UserError("a process of this job died or is out of reach; the last checkpoint is whole: go on with torchrun "
                        f"… train.py --resume RUN. torch says: {' '.join(str(error).split())[:150]}") from None


@meeting()
def gather(thing) -> list:
    """The `thing` of every process, by rank."""
    everyone = [thing] * processes()
    if processes() > 1:
        dist.all_gather_object(everyone, thing)
    return everyone


@meeting()
def add_up(x: torch.Tensor) -> torch.Tensor:
    """x, summed over the processes in place."""
    if processes() > 1:
        dist.all_reduce(x)
    return x


def all_sums(sums: dict) -> dict:
    """Named numbers, summed over the processes. One that had no batch has fewer names."""
    if processes() == 1:
        return sums
    everyone = gather({name: float(value) for name, value in sums.items()})
    return {name: torch.tensor(sum(one.get(name, 0.0) for one in everyone), dtype=torch.float64)
            for name in max(everyone, key=len)}


def first_to_fail() -> bool:
    """Whether to report an error: those of the other processes are the same, or come of this one."""
    try:
        return processes() == 1 or dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the store is gone, with the machine of rank 0
        return True


# ----------------------------------------------------------------------------- batches


def pad(rows: list[np.ndarray], pad_id: int = 0) -> torch.Tensor:
    """Rows of unequal length -> (B, longest), padded on the right."""
    out = np.full((len(rows), max(map(len, rows))), pad_id, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def collate(data: Encoded, index) -> Batch:
    if len({len(data.prompt[i]) for i in index}) > 1:
        raise ValueError("the prompts of a batch must have one length: padding would stand inside the sequence")
    return Batch(*(pad([column[i] for i in index]) for column in data))


def bucket(data: Encoded, batch_tokens: int, key: np.ndarray) -> list[np.ndarray]:
    """Consecutive runs, in the order of key, of which each fits batch_tokens: B * (longest S + longest T)."""
    batches, run, s, t = [], [], 0, 0
    for i in np.argsort(key, kind="stable"):
        s_new, t_new = max(s, len(data.source[i])), max(t, len(data.target[i]))
        if run and (len(run) + 1) * (s_new + t_new) > batch_tokens:
            batches.append(np.array(run))
            run, s_new, t_new = [], len(data.source[i]), len(data.target[i])
        run, s, t = [*run, i], s_new, t_new
    return batches + [np.array(run)]


class Batches:
    """Endless training batches of similar lengths. (seed, epoch, position) determines the next: resumable.

    N processes take turns: `next` moves on by N batches and gives the rank-th of them.
    """

    def __init__(self, data: Encoded, batch_tokens: int, seed: int):
        self.data, self.batch_tokens, self.seed = data, batch_tokens, seed
        self.lengths = np.array([[len(row) for row in column] for column in (data.source, data.target)])  # (2,N)
        self.epoch, self.position = 0, 0
        self.order = self._shuffle()

    def _shuffle(self) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, self.epoch])
        # by source length, then target length: little padding. The noise gives each epoch other neighbours.
        key = self.lengths[0] + (self.lengths[1] + rng.uniform(0, 2, self.lengths.shape[1])) / 10**6
        batches = bucket(self.data, self.batch_tokens, key)
        return [batches[i] for i in rng.permutation(len(batches))]

    def __next__(self) -> Batch:
        for turn in range(processes()):
            if self.position == len(self.order):
                self.epoch, self.position = self.epoch + 1, 0
                self.order = self._shuffle()
            if turn == rank():
                index = self.order[self.position]
            self.position += 1
        return collate(self.data, index)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.order = self._shuffle()


def in_order(data: Encoded, batch_tokens: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every example once, longest sources first, with its indices: for validation and decoding, shared by processes."""
    for index in bucket(data, batch_tokens, -np.array([len(s) for s in data.source]))[rank() :: processes()]:
        yield index, collate(data, index)


# ----------------------------------------------------------------------------- download real data

TRIES, PAUSE, TIMEOUT = 5, 1.0, 60  # attempts at a file; seconds before the second, doubled each time; of silence


class Source(NamedTuple):
    """A corpus: its files on the net and what becomes of them. {a} and {b}: the two languages, sorted."""

    about: str  # name, home, licence
    urls: dict[str, str | None]  # url -> SHA-256, where somebody states it
    files: list[str]  # what is written into the task's folder
    rows: Callable[..., Iterator[dict[str, str]]]  # (files, *downloaded) -> {file: its next line}; {}: a row left out


def plain_rows(files: list[str], *paths: Path) -> Iterator[dict[str, str]]:
    for name, path in zip(files, paths):
        for line in read_lines(path):
            if name.endswith(".txt"):  # LogiQA, which has no checksum: an error page is no JSON, and is refused here
                logiqa_row(json.loads(line))
            yield {name: line}


def table_rows(files: list[str], path: Path) -> Iterator[dict[str, str]]:
    """Two columns. An empty side, which ends a document in News Commentary, went with read_lines' strip."""
    for line in read_lines(path):
        sides = line.split("\t")
        yield {name: side.strip() for name, side in zip(files, sides)} if len(sides) == 2 else {}


def members(archive: Path) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    """Name and content of each file in a tar archive, as a stream: nothing is unpacked to disk."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise UserError(f"its member {name} points out of the archive")
            if member.isfile():
                yield name, tar.extractfile(member)


FLORES = dict(de="deu_Latn", en="eng_Latn", fr="fra_Latn", ru="rus_Cyrl", zh="zho_Hans")


def flores_rows(files: list[str], archive: Path) -> Iterator[dict[str, str]]:
    """dev/CODE.dev, devtest/CODE.devtest: line i is the same sentence in every language, so any pair can be formed."""
    wanted = [f"{split}/{code}.{split}" for split in ("dev", "devtest") for code in FLORES.values()]
    for name, file in members(archive):
        if (end := "/".join(name.parts[-2:])) in wanted:
            yield from ({files[wanted.index(end)]: line} for line in file.read().decode().strip().split("\n"))


BUTTONS = {"Share this with", "Email", "Facebook", "Messenger", "Twitter", "Pinterest", "WhatsApp", "Linkedin",
           "LinkedIn", "Copy this link", "These are external links and will open in a new window"}  # of the web page


def xsum_rows(files: list[str], archive: Path, ids: Path) -> Iterator[dict[str, str]]:
    """ID.summary holds sections, "[SN]NAME[SN] text"; the summary is FIRST-SENTENCE. ids: {split: its articles}."""
    splits = json.loads(ids.read_bytes())
    where = {i: file for split, file in zip(("train", "validation", "test"), files) for i in splits[split]}
    for name, file in members(archive):
        if name.stem in where:
            text = "\n".join(line for line in file.read().decode().split("\n") if line.strip() not in BUTTONS)
            parts = [part.strip() for part in text.split("[SN]")]  # "", name, text, name, text, ...
            row = {"document": parts[parts.index("RESTBODY") + 1], "summary": parts[parts.index("FIRST-SENTENCE") + 1]}
            target = where.pop(name.stem)
            yield {target: json.dumps(row, ensure_ascii=False)} if all(row.values()) else {}
    if where:
        raise UserError(f"it lacks {len(where)} articles")


# FLORES' checksum is from MLCommons' Croissant 1.0 specification, XSum's are from dataset_infos.json in Hugging Face
# datasets; we know of no others. A .gz file has a checksum of its own.
GITHUB, NEWS = "https://raw.githubusercontent.com", "https://data.statmt.org/news-commentary"
SIDES = [f"{split}.{side}" for split in ("train", "val", "test_2016_flickr") for side in ("{a}", "{b}")]
SOURCES = {
    "wmt": [Source(f"News Commentary v18.1, {NEWS}: free for research; for other uses ask its owners",
                   {NEWS + "/v18.1/training/news-commentary-v18.{a}-{b}.tsv.gz": None},
                   ["train.{a}-{b}.{a}", "train.{a}-{b}.{b}"], table_rows),
            Source("FLORES-200, https://github.com/facebookresearch/flores: CC BY-SA 4.0",
                   {"https://dl.fbaipublicfiles.com/nllb/flores200_dataset.tar.gz":
                    "b8b0b76783024b85797e5cc75064eb83fc5288b41e9654dabc7be6ae944011f6"},
                   [f"{split}.{lang}" for split in ("valid", "test") for lang in FLORES], flores_rows)],
    "multi30k": [Source("Multi30k task 1, https://github.com/multi30k/dataset: no licence stated; for research",
                        {f"{GITHUB}/multi30k/dataset/master/data/task1/raw/{side}.gz": None for side in SIDES},
                        SIDES, plain_rows)],
    "xsum": [Source("XSum, https://github.com/EdinburghNLP/XSum: the articles are the BBC's; for research",
                    {"http://bollin.inf.ed.ac.uk/public/direct/XSUM-EMNLP18-Summary-Data-Original.tar.gz":
                     "10b48aa187fc9c904b30f76ca97e2da0de8d3a1238acc26acadef93e2001af90",
                     f"{GITHUB}/EdinburghNLP/XSum/master/XSum-Dataset/XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json":
                     "9c0c5d8f048a90bd68b19a34e4c30577ed270d3247b2119fa06a04ef46292068"},
                    ["train.jsonl", "valid.jsonl", "test.jsonl"], xsum_rows)],
    "logiqa": [Source("LogiQA 2.0, https://github.com/csitfun/LogiQA2.0: CC BY-NC-SA 4.0",
                      {f"{GITHUB}/csitfun/LogiQA2.0/main/logiqa/DATA/LOGIQA/{name}.txt": None
                       for name in ("train", "dev", "test")}, ["train.txt", "dev.txt", "test.txt"], plain_rows)],
}
OFFERED = {"wmt": list(FLORES), "multi30k": ["cs", "de", "en", "fr"]}


def receive(url: str, part: Path) -> None:
    """Append to the file part what it lacks of url. OSError, HTTPException: not all came; what did is kept.

    Should url have changed since part began, the mixture fails its checksum, or as JSON.
    """
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "warmup"} | ({"Range": f"bytes={start}-"} if start else {})
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as answer:
        if answer.status != 206:  # the whole file, be it that the server cannot continue one
            start = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ConnectionError("the server sent another part than the one we lack")
        total = None if answer.length is None else start + answer.length
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, dynamic_ncols=True)
        with bar, open(part, "ab" if start else "wb") as file:
            while chunk := answer.read(2**16):
                bar.update(file.write(chunk))
            if total is not None and file.tell() < total:
                raise ConnectionError(f"the connection ended after {file.tell():,} of {total:,} bytes")


def fetch(url: str, path: Path, sha256: str | None) -> None:
    """Download url unless path is there. Cut off, it goes on from path.part. UserError: it cannot be had."""
    part, by_hand = path.with_name(path.name + ".part"), f"You can put the file into {path.parent}/ by hand"
    for attempt in range(0 if path.exists() else TRIES):
        try:
            receive(url, part)
            part.replace(path)
            break
        except (OSError, HTTPException) as error:
            problem, code = error, getattr(error, "code", None)
        if code == 416:  # our part is longer than the file
            part.unlink(missing_ok=True)
        elif code and code < 500 and code not in (408, 429):  # those may pass
            raise UserError(f"{url}: {problem}. {by_hand} and run the same command again")
        elif attempt == 0 and not code and isinstance(problem, URLError):
            raise UserError(f"cannot reach {url}: {problem.reason}. Is there a network? {by_hand}")
        if attempt == TRIES - 1:
            raise UserError(f"{url}: {problem}, at the last of {TRIES} attempts. The same command goes on from here")
        print(f"{path.name}: {problem}; again in {PAUSE * 2**attempt:g} s")
        time.sleep(PAUSE * 2**attempt)
    if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        path.unlink()
        raise UserError(f"{url}: its checksum is wrong, so it was deleted. Run the same command again. {by_hand}")


def convert(source: Source, paths: list[Path]) -> dict[str, int]:
    """Write a source's files beside its downloads, as FILE.new. How many lines has each?"""
    counts, left_out = dict.fromkeys(source.files, 0), 0
    try:
        with ExitStack() as stack:
            how = dict(mode="w", encoding="utf-8", newline="\n")
            out = {name: stack.enter_context(open(paths[0].with_name(f"{name}.new"), **how)) for name in counts}
            for row in source.rows(source.files, *paths):
                left_out += not row
                for name, line in row.items():
                    out[name].write(line + "\n")
                    counts[name] += 1
        if not all(counts.values()):
            raise UserError(f"nothing for {', '.join(name for name in counts if not counts[name])}")
    except (UserError, EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, ValueError, LookupError,
            TypeError, AttributeError) as error:
        for path in paths:
            path.unlink()
        raise UserError(f"{' and '.join(source.urls)}: not what we expected, so it was deleted: "
                        f"{str(error) or type(error).__name__}") from None
    print(f"{paths[0].name}: left out {left_out:,} rows with an empty side\n" * (left_out > 0), end="")
    return counts


def download(task: str, pairs: list[str], folder: Path) -> None:
    """Bring the real data of a task into folder. What was downloaded lies beside it until all is written.

    Not in it: after a download that failed, an empty data/TASK/ would keep train.py from its sample.
    """
    todo: list[Source] = []
    for a, b in (sorted(pair.split("-")) for pair in pairs):
        for source in SOURCES[task]:
            source = source._replace(urls={url.format(a=a, b=b): digest for url, digest in source.urls.items()},
                                     files=[name.format(a=a, b=b) for name in source.files])
            if source not in todo and not all((folder / name).exists() for name in source.files):
                todo.append(source)
    work = Path(f"{folder.resolve()}.downloads")
    paths = [[work / url.rsplit("/", 1)[1] for url in source.urls] for source in todo]
    try:
        work.mkdir(parents=True, exist_ok=True)
        for source, files in zip(todo, paths):
            print(source.about)
            for (url, digest), path in zip(source.urls.items(), files):
                fetch(url, path, digest)
        counts = [count for source, files in zip(todo, paths) for count in convert(source, files).items()]
        folder.mkdir(parents=True, exist_ok=True)
        for name, count in counts:
            if (folder / name).exists():  # from an earlier call, or the user's own: it stays
                (work / f"{name}.new").unlink(missing_ok=True)
            else:
                (work / f"{name}.new").replace(folder / name)
                print(f"wrote {folder / name}: {count:,} lines")
        for path in (path for files in paths for path in files):
            path.unlink(missing_ok=True)  # two pairs can share one
    finally:
        with suppress(OSError):  # not empty: the next call goes on from it
            work.rmdir()
    print(f"{folder} is complete" + (not todo) * ": nothing to download")
    for pair in pairs if task in OFFERED else [""]:
        print(f"next: python train.py --task {task}{pair and f' --pair {pair}'}"
              + (folder != Path("data") / task) * f" --data {folder}" + " (sizes and steps: README, Your own text)")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Download the real data of a task.", allow_abbrev=False)
    parser.add_argument("task", choices=tuple(TASKS))
    parser.add_argument("--pair", default="de-en", help="for wmt and multi30k: de-en (default), de-en,en-ru, ...")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: data/TASK, where train.py looks")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    known = OFFERED.get(args.task)
    pairs = args.pair.split(",") if known else ["-"]
    try:
        if args.task not in SOURCES:
            raise UserError(f"task {args.task} is generated, nothing to download: python train.py --task {args.task}")
        if known and not all(len(set(pair.split("-")) & set(known)) == 2 == len(pair.split("-")) for pair in pairs):
            raise UserError(f"--pair takes two of {' '.join(known)}, such as de-en, or several such pairs: de-en,en-fr")
        download(args.task, pairs, args.out or Path("data") / args.task)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
