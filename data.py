"""Tasks, their data, the tokenizer, and batches.

    text pairs --load--> {split: [Example]} --encode--> token ids --Batches--> warmup.Batch (padded tensors)

A task is a row of TASKS. Data is looked for in this order, and the choice is printed: `--data DIR`, then
`data/<task>/`, then the built-in sample, which is generated from a seed and needs no download.
"""

import gzip
import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from warmup import Batch

PAD, EOS, UNK, SEP = "<pad>", "</s>", "<unk>", "<sep>"  # ids 0 to 3, in this order


class UserError(Exception):
    """Something that the user can mend. Printed as one line, exit code 1, no traceback."""


class Example(NamedTuple):
    source: str
    prompt: str  # what the decoder is told before it writes: for translation, a tag such as <2de>
    target: str


# ----------------------------------------------------------------------------- built-in sample: English-German

# Each noun: English singular, plural, German singular, plural, gender.
PEOPLE = """man men Mann Männer m|woman women Frau Frauen f|child children Kind Kinder n|girl girls Mädchen Mädchen n
friend friends Freund Freunde m|teacher teachers Lehrer Lehrer m|sister sisters Schwester Schwestern f
doctor doctors Arzt Ärzte m|dog dogs Hund Hunde m|cat cats Katze Katzen f|horse horses Pferd Pferde n"""
THINGS = """house houses Haus Häuser n|book books Buch Bücher n|letter letters Brief Briefe m|door doors Tür Türen f
window windows Fenster Fenster n|table tables Tisch Tische m|lamp lamps Lampe Lampen f|car cars Auto Autos n
picture pictures Bild Bilder n|key keys Schlüssel Schlüssel m|bag bags Tasche Taschen f|coat coats Mantel Mäntel m"""
PEOPLE, THINGS = ([noun.split() for noun in text.replace("\n", "|").split("|")] for text in (PEOPLE, THINGS))
NAMES = "Anna Peter Maria Paul Lena Karl Sophie Jonas".split()
ADJECTIVES = """young jung|friendly freundlich|old alt|small klein|big groß|new neu|beautiful schön|strange seltsam
red rot|green grün|cheap billig|heavy schwer"""  # people take the first eight, things the last ten
ADJECTIVES = [pair.split() for pair in ADJECTIVES.replace("\n", "|").split("|")]
NUMBERS = [pair.split() for pair in "two zwei|three drei|four vier|five fünf|twelve zwölf".split("|")]
# English base, 3rd person, past; German 3rd person singular, plural, participle, separable prefix, auxiliary.
# The first eight take people or things as object, the next six things only, the last six no object.
VERBS = """see sees saw sieht sehen gesehen - hat|look_at looks_at looked_at sieht sehen gesehen an hat
find finds found findet finden gefunden - hat|look_for looks_for looked_for sucht suchen gesucht - hat
fetch fetches fetched holt holen geholt ab hat|forget forgets forgot vergisst vergessen vergessen - hat
need needs needed braucht brauchen gebraucht - hat|paint paints painted malt malen gemalt - hat
buy buys bought kauft kaufen gekauft - hat|sell sells sold verkauft verkaufen verkauft - hat
choose chooses chose sucht suchen gesucht aus hat|carry carries carried trägt tragen getragen - hat
open opens opened macht machen gemacht auf hat|close closes closed macht machen gemacht zu hat
sleep sleeps slept schläft schlafen geschlafen - hat|work works worked arbeitet arbeiten gearbeitet - hat
stay stays stayed bleibt bleiben geblieben - ist|arrive arrives arrived kommt kommen gekommen an ist
wake_up wakes_up woke_up wacht wachen gewacht auf ist|travel travels travelled reist reisen gereist - ist"""
VERBS = [[word.replace("_", " ") for word in verb.split()] for verb in VERBS.replace("\n", "|").split("|")]
TIMES = {False: [("today", "heute"), ("every day", "jeden Tag"), ("on Monday", "am Montag"), ("now", "jetzt")],
         True: [("yesterday", "gestern"), ("last week", "letzte Woche"), ("in {y}", "im Jahr {y}")]}  # fmt: skip
PLACES = [("in the garden", "im Garten"), ("at the station", "am Bahnhof"), ("in London", "in London"),
          ("at home", "zu Hause"), ("with {en}", "mit {de}")]  # fmt: skip
JOINS = [("because", "weil"), ("although", "obwohl"), ("if", "wenn")]
SAYS = [("says", "sagt", "say", "sagen"), ("knows", "weiß", "know", "wissen"), ("hopes", "hofft", "hope", "hoffen")]
# Endings by case, in the order m f n plural: the article "der", "ein-" words, adjectives after each, after a number.
ENDINGS = {
    "nom": ("der die das die", ["", "e", "", "e"], "e e e en", "er e es en", "e"),
    "acc": ("den die das die", ["en", "e", "", "e"], "en e e en", "en e es en", "e"),
    "dat": ("dem der dem den", ["em", "er", "em", "en"], "en en en en", "en en en en", "en"),
}


def noun_phrase(r: random.Random, case: str, nouns: list, negated: bool = False) -> tuple[str, str, bool]:
    """English, German, plural? Article, adjective and noun agree in gender, number and case."""
    if r.random() < 0.15 and nouns is PEOPLE:
        name = r.choice(NAMES)
        return name, name, False
    en, ens, de, des, gender = r.choice(nouns)
    kind = r.choice(["the", "the", "a", "my", "number"])
    plural = kind == "number" or (kind != "a" and r.random() < 0.3)
    column, (definite, indefinite, weak, mixed, strong) = 3 if plural else "mfn".index(gender), ENDINGS[case]
    if kind == "number":
        n_en, n_de = r.choice(NUMBERS) if r.random() < 0.7 else [str(r.randint(13, 99))] * 2
        parts, ending = (n_en, n_de), strong
    elif kind == "the":
        parts, ending = ("the", definite.split()[column]), weak.split()[column]
    else:
        stem = "mein" if kind == "my" else "kein" if negated else "ein"
        parts, ending = (kind, stem + indefinite[column]), mixed.split()[column]
    words = [parts]
    if r.random() < 0.4:
        adjective_en, adjective_de = r.choice(ADJECTIVES[:8] if nouns is PEOPLE else ADJECTIVES[2:])
        words.append((adjective_en, adjective_de + ending))
    if plural:
        en, de = ens, des + ("n" if case == "dat" and des[-1] not in "ns" else "")  # dative plural: den Kindern
    if words[0][0] == "a" and (words[1][0] if len(words) > 1 else en)[0] in "aeiou":
        words[0] = ("an", words[0][1])
    words.append((en, de))
    return " ".join(w[0] for w in words), " ".join(w[1] for w in words), plural


def clause(r: random.Random) -> dict[str, str]:
    """One clause: en and de with the subject first, en/de "front" with an adverbial first, de "sub" and "inv".

    German: the finite verb is second in a main clause (so the subject moves behind it when something is
    fronted), last in a subordinate one; separable prefixes and participles close the clause.
    """
    which = r.randrange(len(VERBS))
    base, third, past, de_sg, de_pl, participle, prefix, auxiliary = VERBS[which]
    prefix, is_past, negated = prefix.strip("-"), r.random() < 0.5, r.random() < 0.2
    s_en, s_de, plural = noun_phrase(r, "nom", PEOPLE)
    o_en = o_de = ""
    if which < 14:
        o_en, o_de, _ = noun_phrase(r, "acc", r.choice([PEOPLE, THINGS]) if which < 8 else THINGS, negated)
    time, place = ("", ""), ("", "")
    if r.random() < 0.5:
        year = r.randint(1900, 1999)
        time = tuple(text.format(y=year) for text in r.choice(TIMES[is_past]))
    if r.random() < 0.35:
        w_en, w_de, _ = noun_phrase(r, "dat", PEOPLE)
        place = tuple(text.format(en=w_en, de=w_de) for text in r.choice(PLACES))
    if negated:
        v_en = ("did not " if is_past else "do not " if plural else "does not ") + base
    else:
        v_en = past if is_past else base if plural else third
    finite, end = (de_pl if plural else de_sg), prefix
    if is_past:  # English simple past, German perfect: hat ... aufgemacht, ist ... angekommen
        finite, end = {"hat": ("hat", "haben"), "ist": ("ist", "sind")}[auxiliary][plural], prefix + participle
    no = "nicht" if negated and not o_de.startswith("kein") else ""
    final = f"{end} {finite}" if is_past else prefix + finite
    line = lambda *words: " ".join(word for word in words if word)  # noqa: E731
    first, rest_time, rest_place = (time, "", place[1]) if time[0] else (place, time[1], "")
    return {
        "en": line(s_en, v_en, o_en, place[0], time[0]),
        "de": line(s_de, finite, time[1], o_de, no, place[1], end),
        "en front": line(first[0], s_en, v_en, o_en, place[0] if time[0] else ""),
        "de front": line(first[1], finite, s_de, rest_time, o_de, no, rest_place, end) if first[0] else
                    line(s_de, finite, o_de, no, end),
        "de sub": line(s_de, time[1], o_de, no, place[1], final),
        "de inv": line(finite, s_de, time[1], o_de, no, place[1], end),
    }  # fmt: skip


def sentence(r: random.Random) -> tuple[str, str]:
    """One sentence of the sample as (English, German)."""
    main, sub, (join_en, join_de), kind = clause(r), clause(r), r.choice(JOINS), r.random()
    if kind < 0.25:
        en, de = main["en"], main["de"]
    elif kind < 0.55:
        en, de = main["en front"], main["de front"]
    elif kind < 0.7:
        en, de = f"{main['en']} {join_en} {sub['en']}", f"{main['de']}, {join_de} {sub['de sub']}"
    elif kind < 0.85:
        en, de = f"{join_en} {sub['en']}, {main['en']}", f"{join_de} {sub['de sub']}, {main['de inv']}"
    else:
        (who_en, who_de, plural), say = noun_phrase(r, "nom", PEOPLE), r.choice(SAYS)
        en, de = f"{who_en} {say[2 * plural]} that {sub['en']}", f"{who_de} {say[1 + 2 * plural]}, dass {sub['de sub']}"
    return en[0].upper() + en[1:] + ".", de[0].upper() + de[1:] + "."


def translation_sample(pair: str, size: int, seed: int) -> dict[str, list[Example]]:
    """size training pairs and 500 each (at most size/4) for validation and test; pair de-en or en-de.

    Which split a sentence belongs to is a hash of its English side, so no seed's training data ever holds
    another seed's test item. (English determines German and the reverse: disjoint on one side is disjoint.)
    """
    if pair not in ("de-en", "en-de"):
        raise UserError(f"the built-in sample is German-English: use --pair de-en or en-de, not {pair}, or --data DIR")
    held_out = min(500, max(1, size // 4))
    r, wanted = random.Random(f"{seed}"), {"train": size, "valid": held_out, "test": held_out}
    splits: dict[str, dict] = {split: {} for split in wanted}  # dicts: no pair twice
    while any(len(splits[split]) < n for split, n in wanted.items()):
        en, de = sentence(r)
        split = {0: "test", 1: "valid"}.get(zlib.crc32(en.encode()) % 20, "train")
        if len(splits[split]) < wanted[split]:
            splits[split][(en, de)] = None
    order = slice(None) if pair == "en-de" else slice(None, None, -1)
    return {split: [translation(pair, *texts[order]) for texts in rows] for split, rows in splits.items()}


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
                            f"{globs[0]}.{langs[1]}, or {globs[0]}.{pair}.{langs[0]} and so on, plain or .gz")  # fmt: skip
        source, target = read_lines(files[0]), read_lines(files[1])
        if len(source) != len(target):
            raise UserError(f"{files[0]} has {len(source)} lines but {files[1]} has {len(target)}: "
                            "line i of one must translate line i of the other")  # fmt: skip
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


# ----------------------------------------------------------------------------- the table of tasks


@dataclass(frozen=True)
class Task:
    """A task is how to sample it, how to read it, and how it is scored; everything else is shared."""

    read: Callable[[str, Path], dict[str, list[Example]]]  # (pair, folder) -> splits
    sample: Callable[[str, int, int], dict[str, list[Example]]] | None  # (pair, size, seed) -> splits
    metrics: str  # a key of eval.METRICS


TASKS = {
    "wmt": Task(read_parallel, translation_sample, "translation"),
    "multi30k": Task(read_parallel, None, "translation"),
}


def load(task: str, pair: str, data: str, sample_size: int, seed: int) -> tuple[dict[str, list[Example]], str]:
    """The splits of a task and where they come from ("sample" or a folder). Prints the choice in one line."""
    if len(pair.split("-")) != 2 or not all(lang.isalpha() for lang in pair.split("-")):
        raise UserError(f"--pair takes two language codes such as de-en, not {pair!r}")
    folder = Path(data) if data else Path("data") / task
    if data or folder.is_dir():
        splits, origin = TASKS[task].read(pair, folder), str(folder)
    elif TASKS[task].sample is None:
        raise UserError(f"task {task} has no built-in sample: put train.LANG, valid.LANG and test.LANG for the two "
                        f"languages of {pair} into {folder}/, or name their folder with --data DIR")  # fmt: skip
    else:
        splits, origin = TASKS[task].sample(pair, sample_size, seed), "sample"
        print(f"data: built-in sample, {pair}. For real text: --data DIR, a folder with train.LANG, valid.LANG "
              "and test.LANG, one sentence a line (see README, Your own text)")  # fmt: skip
    if origin != "sample":
        print(f"data: {origin}, {pair}")
    if "test" not in splits:
        print("data: there is no test split, so the validation split is scored in its place")
    return splits, origin


# ----------------------------------------------------------------------------- tokenizer


def train_tokenizer(examples: list[Example], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding of source and target together. Special tokens and prompt tags come first."""
    tags = sorted({word for example in examples for word in example.prompt.split()})
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # numbers digit by digit: 57 and 58 share what they share
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, EOS, UNK, SEP, *tags],
                                  show_progress=False, limit_alphabet=vocab_size // 2)  # fmt: skip
    tokenizer.train_from_iterator((text for e in examples for text in (e.source, e.target)), trainer)
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that stand for no text: what a warmup may not contain."""
    return tuple(sorted(tokenizer.get_added_tokens_decoder()))


class Encoded(NamedTuple):
    """One split as token ids: per example int32 arrays, the target with its </s>."""

    source: list[np.ndarray]
    prompt: list[np.ndarray]
    target: list[np.ndarray]


def encode(tokenizer: Tokenizer, examples: list[Example]) -> Encoded:
    columns = []
    for texts, end in zip(zip(*examples), ([], [], [tokenizer.token_to_id(EOS)])):
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        columns.append([np.array(encoding.ids + end, dtype=np.int32) for encoding in encodings])
    return Encoded(*columns)


def shorten(data: Encoded, max_tokens: int, drop: bool) -> tuple[Encoded, int]:
    """Training pairs beyond max_tokens on a side are dropped; elsewhere only the source is cut. How many?"""
    long = [len(s) > max_tokens or (drop and len(t) > max_tokens) for s, t in zip(data.source, data.target)]
    if drop:
        return Encoded(*([row for row, out in zip(column, long) if not out] for column in data)), sum(long)
    return data._replace(source=[s[:max_tokens] for s in data.source]), sum(long)


# ----------------------------------------------------------------------------- batches


def pad(rows: list[np.ndarray], pad_id: int = 0) -> torch.Tensor:
    """Rows of unequal length -> (B, longest), padded on the right."""
    out = np.full((len(rows), max(map(len, rows))), pad_id, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def collate(data: Encoded, index) -> Batch:
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
    """Endless training batches of similar lengths. (seed, epoch, position) determines the next: resumable."""

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
        if self.position == len(self.order):
            self.epoch, self.position = self.epoch + 1, 0
            self.order = self._shuffle()
        self.position += 1
        return collate(self.data, self.order[self.position - 1])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.order = self._shuffle()


def in_order(data: Encoded, batch_tokens: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every example once, longest sources first, with its indices: for validation and decoding."""
    for index in bucket(data, batch_tokens, -np.array([len(s) for s in data.source])):
        yield index, collate(data, index)
