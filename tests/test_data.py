"""data.py: built-in data against an independent translator, the readers, the tokenizer, the batches."""

import gzip
import random
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors

from data import (
    EOS,
    GENERATORS,
    PAD,
    PEOPLE,
    READERS,
    SEP,
    TASKS,
    THINGS,
    UNK,
    VERBS,
    Batches,
    Config,
    Example,
    built_in_translation,
    clause,
    encode,
    encode_split,
    find_files,
    generate_splits,
    longest_first,
    load,
    load_tokenizer,
    news,
    noun_phrase,
    pointers,
    read_splits,
    special_ids,
    task_folder,
    train_tokenizer,
    wrong_pair,
)
from model import UserError
import train

MULTI30K = Path(__file__).parents[2] / "shared/data/multi30k"

# ------------------------------------------------------- full forms, written by hand and not taken from data.py


def table(text: str) -> list[list[str]]:
    return [
        [word.replace("_", " ") for word in row.split()]
        for row in text.replace("\n", ", ").split(", ")
    ]


NOUNS = table("""man men Mann Männer m, woman women Frau Frauen f, child children Kind Kinder n
girl girls Mädchen Mädchen n, friend friends Freund Freunde m, dog dogs Hund Hunde m
sister sisters Schwester Schwestern f, teacher teachers Lehrer Lehrer m, doctor doctors Arzt Ärzte m
cat cats Katze Katzen f, horse horses Pferd Pferde n, house houses Haus Häuser n
book books Buch Bücher n, letter letters Brief Briefe m, door doors Tür Türen f
window windows Fenster Fenster n, table tables Tisch Tische m, lamp lamps Lampe Lampen f
car cars Auto Autos n, picture pictures Bild Bilder n, key keys Schlüssel Schlüssel m
bag bags Tasche Taschen f, coat coats Mantel Mäntel m""")
NOUN = {row[number]: (row, bool(number)) for row in NOUNS for number in (0, 1)}
ADJECTIVE = dict(
    table("""old alt, small klein, big groß, new neu, beautiful schön, strange seltsam, clean sauber
famous berühmt, cheap billig, ugly hässlich, heavy schwer""")
)
DETERMINER = {  # article-ending of the adjective: m f n plural
    ("the", "nominative"): "der-e die-e das-e die-en",
    ("a", "nominative"): "ein-er eine-e ein-es",
    ("the", "accusative"): "den-en die-e das-e die-en",
    ("a", "accusative"): "einen-en eine-e ein-es",
}
# English base, 3rd person, past; German singular, plural, prefix, participle
VERB = table("""see sees saw sieht sehen - gesehen, look_at looks_at looked_at sieht sehen an angesehen
find finds found findet finden - gefunden, look_for looks_for looked_for sucht suchen - gesucht
fetch fetches fetched holt holen ab abgeholt, forget forgets forgot vergisst vergessen - vergessen
need needs needed braucht brauchen - gebraucht, paint paints painted malt malen - gemalt
buy buys bought kauft kaufen - gekauft, sell sells sold verkauft verkaufen - verkauft
choose chooses chose sucht suchen aus ausgesucht, carry carries carried trägt tragen - getragen
open opens opened macht machen auf aufgemacht, close closes closed macht machen zu zugemacht""")
ADVERB = dict(
    table("""today heute, every_day jeden_Tag, on_Monday am_Montag, now jetzt, yesterday gestern
last_week letzte_Woche""")
)
JOIN = dict(table("because weil, although obwohl, if wenn"))

NP = (
    rf"(?:(?:the|an?) (?:(?:{'|'.join(ADJECTIVE)}) )?"
    rf"(?:{'|'.join(sorted(NOUN, reverse=True))})\b)"
)
TIME = r"today|every day|on Monday|now|yesterday|last week|in \d{4}"
CLAUSE = re.compile(
    rf"(?:(?P<front>{TIME}) )?(?P<s>{NP}) "
    rf"(?P<verb>{'|'.join(form for verb in VERB for form in verb[2::-1])})\b"
    rf" (?P<o>{NP})(?: (?P<time>{TIME}))?"
)


# ----------------------------------------------------------------- a translator that shares no code with data.py


def line(*words: str) -> str:
    return " ".join(filter(None, words))


def is_plural(phrase: str) -> bool:
    return NOUN[phrase.split()[-1]][1]


def german(phrase: str, case: str) -> str:
    """The German of an English noun phrase."""
    determiner, *adjectives, noun = phrase.split()
    (_, _, singular, plural, gender), many = NOUN[noun]
    forms = DETERMINER["a" if determiner == "an" else determiner, case].split()
    article, ending = forms[3 if many else "mfn".index(gender)].split("-")
    words = (ADJECTIVE[adjective] + ending for adjective in adjectives)
    return line(article, *words, plural if many else singular)


def adverbial(text: str) -> str:
    return ADVERB[text] if text in ADVERB else re.sub(r"^in (\d{4})$", r"im Jahr \1", text)


def verb_forms(verb: list[str], past: bool, plural: bool) -> tuple[str, str, str]:
    """Finite verb, what closes a main clause, what closes a subordinate one."""
    _, _, _, singular, many, prefix, participle = verb
    if past:
        finite = "haben" if plural else "hat"
        return finite, participle, f"{participle} {finite}"
    finite, prefix = many if plural else singular, prefix.strip("-")
    return finite, prefix, prefix + finite


def translate_clause(en: str, order: str) -> str:
    """order: main or sub (finite verb last). English agreement is checked too."""
    m = CLAUSE.fullmatch(en)
    assert m and bool(m["front"]) != bool(m["time"]), en
    when = m["front"] or m["time"]
    plural = is_plural(m["s"])
    verb = next(row for row in VERB if m["verb"] in row[:3])
    past = m["verb"] == verb[2]
    assert m["verb"] == verb[2 if past else 0 if plural else 1], en
    assert past == bool(re.match(r"yesterday|last week|in \d", when)), en
    finite, end, last = verb_forms(verb, past, plural)
    subject, o = german(m["s"], "nominative"), german(m["o"], "accusative")
    if order == "sub":
        assert m["time"], en
        return line(subject, adverbial(when), o, last)
    if m["front"]:
        return line(adverbial(when), finite, subject, o, end)
    return line(subject, finite, adverbial(when), o, end)


def translate(en: str) -> str:
    """The German of a whole English sentence."""
    text = en.removesuffix(".")
    text = re.sub(
        r"^(The|An?|Today|Every|On|Now|Yesterday|Last|In)\b", lambda m: m[0].lower(), text
    )
    if m := re.fullmatch(rf"(.+) ({'|'.join(JOIN)}) (.+)", text):
        de = f"{translate_clause(m[1], 'main')}, {JOIN[m[2]]} {translate_clause(m[3], 'sub')}"
    else:
        de = translate_clause(text, "main")
    return de[0].upper() + de[1:] + "."


GOLDEN = """The old man opens the door today. | Der alte Mann macht heute die Tür auf.
Today a woman opens an ugly door. | Heute macht eine Frau eine hässliche Tür auf.
Last week the dogs found a small key. | Letzte Woche haben die Hunde einen kleinen Schlüssel gefunden.
The children see the new cars every day. | Die Kinder sehen jeden Tag die neuen Autos.
In 1950 a strange girl chose an old house. | Im Jahr 1950 hat ein seltsames Mädchen ein altes Haus ausgesucht.
A big horse needs the coat now because the cat fetched a bag yesterday. | Ein großes Pferd braucht jetzt den Mantel, weil die Katze gestern eine Tasche abgeholt hat.
Now the teachers close the window if the doctors open the big windows on Monday. | Jetzt machen die Lehrer das Fenster zu, wenn die Ärzte am Montag die großen Fenster aufmachen.
The sisters sold the lamps in 1999 although a friend looks for the heavy table today. | Die Schwestern haben im Jahr 1999 die Lampen verkauft, obwohl ein Freund heute den schweren Tisch sucht."""


@pytest.mark.parametrize("en, de", [row.split(" | ") for row in GOLDEN.split("\n")])
def test_the_independent_translator_knows_german(en, de):
    assert translate(en) == de


# ------------------------------------------------------------------------------------------ built-in grammar


def draws(count: int, seed: int = 1):
    r, config = random.Random(seed), Config(pair="en-de")
    examples = (built_in_translation(r, config) for _ in range(count))
    return [(example.source, example.target) for example in examples]


@pytest.fixture(scope="module")
def phrases():
    """Many noun phrases: {(case, English): German}."""
    r, seen = random.Random(2), {}
    for case in ("nominative", "accusative"):
        for nouns in (PEOPLE, THINGS):
            for _ in range(15000):
                en, de, plural = noun_phrase(r, case, nouns)
                assert plural == is_plural(en)
                assert seen.setdefault((case, en), de) == de
    return seen


PHRASES = """nominative the old man | der alte Mann, nominative a new teacher | ein neuer Lehrer
nominative a woman | eine Frau, nominative a clean horse | ein sauberes Pferd, nominative the dog | der Hund
nominative an ugly cat | eine hässliche Katze, nominative the big child | das große Kind
nominative the doctors | die Ärzte, nominative the small girls | die kleinen Mädchen
accusative the old man | den alten Mann, accusative a friend | einen Freund, accusative the woman | die Frau
accusative a beautiful woman | eine schöne Frau, accusative an old house | ein altes Haus
accusative a new key | einen neuen Schlüssel, accusative the heavy key | den schweren Schlüssel
accusative the keys | die Schlüssel, accusative the heavy doors | die schweren Türen
accusative the strange picture | das seltsame Bild, accusative the big lamp | die große Lampe"""


@pytest.mark.parametrize("golden", PHRASES.replace("\n", ", ").split(", "))
def test_noun_phrase_agrees_in_gender_number_and_case(phrases, golden):
    case, english = golden.split(" | ")[0].split(" ", 1)
    assert phrases[case, english] == golden.split(" | ")[1]


def test_every_noun_phrase_agrees(phrases):
    for (case, en), de in phrases.items():
        assert re.fullmatch(NP, en) and de == german(en, case), (case, en, de)
    # a noun: singular the and a, plural the; each alone or with one of ten adjectives
    assert len(phrases) == 2 * len(NOUNS) * 3 * 11


def test_english_says_an_before_a_vowel_only():
    articles = [
        pair
        for en, _ in draws(5000)
        for pair in pairwise(en.lower().split())
        if pair[0] in ("a", "an")
    ]
    assert {article for article, _ in articles} == {"a", "an"}
    assert all((article == "an") == (word[0] in "aeiou") for article, word in articles)


def test_every_sentence_is_what_the_independent_translator_says():
    """Single clauses with each order, and each join: all are drawn."""
    joins = set()
    for en, de in draws(10000):
        assert translate(en) == de, en
        joins |= set(re.findall(r", (\w+) ", de)) or {"none"}
    assert joins == {"none", *JOIN.values()}


def test_both_sides_name_the_same_years():
    years = set()
    for en, de in draws(5000):
        ours = re.findall(r"\bin (\d{4})\b", en, re.IGNORECASE)
        assert ours == re.findall(r"\bim Jahr (\d{4})\b", de, re.IGNORECASE)
        assert ours == re.findall(r"\d+", en) == re.findall(r"\d+", de)
        years.update(map(int, ours))
    assert years == set(range(1900, 2000))


class Steered(random.Random):
    """Draws what holds a wanted word wherever there is such a choice: golden clauses turn up soon."""

    def choice(self, options):
        wanted = [option for option in options if set(re.findall(r"\w+", str(option))) & self.words]
        return super().choice(wanted or options)


def german_of(english: str, order: str, words: str) -> str:
    """What the grammar writes in this order for a clause with this English."""
    r = Steered(4)
    r.words = set(words.split())
    return next(de for en, de in (clause(r, order) for _ in range(30_000)) if en == english)


@pytest.mark.parametrize(
    "order, expected",
    [
        ("main", "die Frau macht heute die alte Tür auf"),
        ("sub", "die Frau heute die alte Tür aufmacht"),
        ("front", "heute macht die Frau die alte Tür auf"),
    ],
)
def test_separable_verb_in_the_present(order, expected):
    """Its prefix ends a main clause, and is joined to the verb at the end of a subordinate one."""
    english = "the woman opens the old door today"
    if order == "front":
        english = "today the woman opens the old door"
    assert german_of(english, order, "open woman old door today") == expected


@pytest.mark.parametrize(
    "order, expected",
    [
        ("main", "der Mann hat gestern eine Tasche abgeholt"),
        ("sub", "der Mann gestern eine Tasche abgeholt hat"),
        ("front", "gestern hat der Mann eine Tasche abgeholt"),
    ],
)
def test_perfect_of_a_separable_verb(order, expected):
    english = "the man fetched a bag yesterday"
    if order == "front":
        english = "yesterday the man fetched a bag"
    assert german_of(english, order, "fetch man bag yesterday") == expected


@pytest.mark.parametrize(
    "order, expected",
    [
        ("main", "die Kinder brauchen jetzt einen Mantel"),
        ("sub", "die Kinder jetzt einen Mantel brauchen"),
        ("front", "jetzt brauchen die Kinder einen Mantel"),
    ],
)
def test_a_verb_without_a_prefix(order, expected):
    """Second in a main clause, last in a subordinate one; nothing follows."""
    english = "the children need a coat now"
    if order == "front":
        english = "now the children need a coat"
    assert german_of(english, order, "need child coat now") == expected


def test_plural_subjects_have_plural_verbs():
    words = "forget horse letter week"
    english = "the horses forgot the letters last week"
    wanted = "die Pferde haben letzte Woche die Briefe vergessen"
    assert german_of(english, "main", words) == wanted
    assert german_of("last week the horse forgot the letters", "front", words) == (
        "letzte Woche hat das Pferd die Briefe vergessen"
    )


def test_english_and_german_determine_each_other():
    pairs = set(draws(30000))
    assert len({en for en, _ in pairs}) == len(pairs) == len({de for _, de in pairs})


def test_there_are_at_least_ten_million_pairs():
    """A lower bound of one clause: subject x object x verb x time, all drawn independently."""
    r = random.Random(5)
    subjects = {noun_phrase(r, "nominative", PEOPLE)[:2] for _ in range(10000)}  # those seen
    objects = {noun_phrase(r, "accusative", THINGS)[:2] for _ in range(10000)}
    assert len(VERBS) == 14 and len({tuple(verb[:3]) for verb in VERBS}) == 14
    assert len(subjects) * len(objects) * 14 * (4 + 2 + 100) >= 10**7
    assert len(set(draws(20000))) > 0.97 * 20000  # and few short sentences are drawn over and over


# ------------------------------------------------------------------------------------------ built-in splits


def built_in_splits(pair, size, seed):
    return generate_splits(built_in_translation, Config(pair=pair, built_in_size=size, seed=seed))


@pytest.fixture(scope="module")
def built_in():
    return {seed: built_in_splits("en-de", 3000, seed) for seed in range(4)}


def test_same_seed_same_pairs_and_another_seed_others(built_in):
    assert built_in_splits("en-de", 3000, 0) == built_in[0]
    shared = set(built_in[0]["train"]) & set(built_in[1]["train"])
    assert len(shared) < 0.1 * 3000


def test_splits_have_the_asked_sizes_and_no_pair_twice(built_in):
    assert {split: len(set(rows)) for split, rows in built_in[0].items()} == {
        "train": 3000,
        "valid": 500,
        "test": 500,
    }
    assert {split: len(rows) for split, rows in built_in_splits("de-en", 40, 0).items()} == {
        "train": 40,
        "valid": 10,
        "test": 10,
    }


@pytest.mark.parametrize("side", ["source", "target"])
def test_splits_are_disjoint_on_each_side_within_and_across_seeds(built_in, side):
    texts = {
        (seed, split): {getattr(row, side) for row in rows}
        for seed, splits in built_in.items()
        for split, rows in splits.items()
    }
    for seed in range(4):
        assert not texts[0, "test"] & (texts[seed, "train"] | texts[seed, "valid"])
        assert not texts[0, "valid"] & texts[seed, "train"]


def test_no_test_summary_is_seen_in_training():
    """2,000 summaries stand for 20,000 items: split by the item, all of them would be seen."""
    splits = generate_splits(news, Config(task="xsum", built_in_size=4000))
    summaries = {split: {row.target for row in rows} for split, rows in splits.items()}
    assert len(summaries["train"]) > 1500 and len(summaries["test"]) > 50
    assert not summaries["test"] & (summaries["train"] | summaries["valid"])
    assert not summaries["valid"] & summaries["train"]
    words = {split: set(" ".join(texts).split()) for split, texts in summaries.items()}
    assert words["test"] == words["train"]  # each word of a test summary can be learned


def test_the_reversed_pair_swaps_the_sides_and_the_tag(built_in):
    for there, back in zip(built_in[0]["test"], built_in_splits("de-en", 3000, 0)["test"]):
        assert back == (there.target, "<2en>", there.source) and there.prompt == "<2de>"


def test_pointer_questions_follow_the_permutation():
    """The answer by hand: read the words "ij" as f(i) = j and look up as often as the prompt says."""
    splits = generate_splits(pointers, Config(task="toy", built_in_size=400, symbols=5, hops=3))
    seen = set()
    for example in splits["train"] + splits["test"]:
        words = example.source.split()
        assert [word[0] for word in words] == list("abcde") == sorted(word[1] for word in words)
        tag, symbol = example.prompt.split()
        for _ in range(int(tag[1])):
            symbol = next(word[1] for word in words if word[0] == symbol)
        assert symbol == example.target
        seen.add(tag)
    assert seen == {"<1hops>", "<2hops>", "<3hops>"}
    assert not {e.source for e in splits["train"]} & {
        e.source for e in splits["test"] + splits["valid"]
    }
    copies = generate_splits(pointers, Config(task="toy", built_in_size=20, hops=0))["train"]
    assert all(e.prompt == f"<0hops> {e.target}" for e in copies)


def test_each_pointer_and_each_symbol_is_one_token():
    """The toy goes through the same tokenizer as text; a symbol is the same token in question, answer and warmup."""
    rows = generate_splits(pointers, Config(task="toy", built_in_size=2000))["train"]
    data = encode(tokenizer := train_tokenizer(rows, 4000), rows)
    assert {tuple(map(len, ids)) for ids in data} == {(16, 2, 2)}
    assert {int(ids.prompt[1]) for ids in data} == {int(ids.target[0]) for ids in data}
    assert not {int(ids.target[0]) for ids in data} & set(special_ids(tokenizer))
    assert {int(ids.prompt[0]) for ids in data} <= set(special_ids(tokenizer))


def test_letters_are_not_normalised():
    """Ligatures, wide letters, decomposed umlauts, spaces of all kinds come back as they were."""
    tokenizer = train_tokenizer([Example("fine Bücher", "", "12 A")], 300)
    for text in (
        "\ufb01ne Bu\u0308cher\u00a0\u2460\uff12 \uff21",
        "½ ﬁ e\u0301",
        "a  b\tc ",
        " a",
        "▁a Ġ",
        "，？：《》",
        "สวัสดี",
        "नमस्ते",
        "👩\u200d👧",
        "</s> <pad>",
        "ein \u2028 Satz",
    ):
        [(_, _, target)] = encode(tokenizer, [Example(text, "", text)])
        assert tokenizer.decode(target.tolist()) == text
        assert tokenizer.token_to_id(UNK) not in target


# ------------------------------------------------------------------------------------------ parallel line files


def write(folder: Path, **files: str) -> Path:
    """train__de="a b" becomes train.de; "_gz" at the end compresses; each word is a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in files.items():
        path, content = (
            folder / name.replace("__", "."),
            "".join(word + "\n" for word in words.split()).encode(),
        )
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return folder


def texts(rows: list[Example]) -> list[tuple[str, str]]:
    return [(row.source, row.target) for row in rows]


PLAIN = dict(
    train__de="a b", train__en="A B", valid__de="c", valid__en="C", test__de="d", test__en="D"
)
LAYOUTS = {
    "plain": PLAIN,
    "gz": {name + "__gz": words for name, words in PLAIN.items()},
    "gz on one side": {name + "__gz" * name.endswith("de"): words for name, words in PLAIN.items()},
    "val": {name.replace("valid", "val"): words for name, words in PLAIN.items()},
    "dev": {name.replace("valid", "dev"): words for name, words in PLAIN.items()},
}


def read(folder: Path, pair: str = "de-en") -> dict[str, list[Example]]:
    return read_splits(folder, *READERS["parallel"](pair))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reader_knows_the_usual_file_names(tmp_path, layout):
    splits = read(write(tmp_path, **LAYOUTS[layout]))
    assert {split: texts(rows) for split, rows in splits.items()} == {
        "train": [("a", "A"), ("b", "B")],
        "valid": [("c", "C")],
        "test": [("d", "D")],
    }
    assert {row.prompt for rows in splits.values() for row in rows} == {"<2en>"}
    assert texts(read(tmp_path, "en-de")["test"]) == [("D", "d")]


def test_files_of_other_names_are_not_taken(tmp_path):
    """A test split in files with a year or the pair in their names."""
    write(tmp_path, **{name: words for name, words in PLAIN.items() if "test" not in name})
    for stem in ("test_2016", "test.de-en", "mytest"):
        for language in ("de", "en"):
            (tmp_path / f"{stem}.{language}").write_text("x\n", encoding="utf-8")
    assert set(read(tmp_path)) == {"train", "valid"}


def test_without_a_test_split_there_is_no_key(tmp_path, capsys):
    write(tmp_path, **{name: words for name, words in PLAIN.items() if "test" not in name})
    splits, origin = load(Config(task="wmt", data=str(tmp_path)))
    assert set(splits) == {"train", "valid"} and origin == str(tmp_path)
    assert "no test split" in capsys.readouterr().out


@pytest.mark.parametrize("gone", ["train.en", "valid.de"])
def test_a_missing_file_is_named(tmp_path, gone):
    write(tmp_path, **PLAIN)
    (tmp_path / gone).unlink()
    split, language = gone.split(".")
    with pytest.raises(UserError, match=f"one side of the {split} split only: no {gone}"):
        read(tmp_path)
    for path in tmp_path.glob(f"{split}.*"):
        path.unlink()
    with pytest.raises(UserError, match=f"no {split} split in .*expected {split}"):
        read(tmp_path)
    assert find_files(tmp_path, "test", ["fr"]) == []
    with pytest.raises(UserError, match="no folder"):
        read(tmp_path / "no folder")


def test_sides_of_different_length_are_refused(tmp_path):
    write(tmp_path, **PLAIN | {"valid__en": "C D"})
    with pytest.raises(UserError, match=r"valid.de and .*valid.en have 1 and 2 lines"):
        read(tmp_path)


def test_the_default_folder_is_taken_before_built_in_data(tmp_path, monkeypatch, capsys):
    """One folder serves both directions of a pair; another pair has its own."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data/wmt/de-en", **PLAIN)
    for pair, first in (("de-en", ("a", "A")), ("en-de", ("A", "a"))):
        splits, origin = load(Config(task="wmt", pair=pair))
        assert texts(splits["train"])[0] == first and origin == str(tmp_path / "data/wmt/de-en")
        assert f"data: {origin}, {pair}" in capsys.readouterr().out
    assert task_folder("wmt", "de-fr") == Path("data/wmt/de-fr")
    assert load(Config(task="wmt", data="built-in", built_in_size=8))[1] == "built-in"


def test_without_a_folder_of_its_own_a_task_takes_its_built_in_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data/wmt", **PLAIN)  # no folder of a pair
    write(tmp_path / "data/toy", train__jsonl="{}")  # the toy is generated
    for task in ("wmt", "toy"):
        assert load(Config(task=task, built_in_size=8))[1] == "built-in"
    with pytest.raises(UserError, match="data.py.* data/multi30k/de-en"):
        load(Config(task="multi30k"))
    with pytest.raises(UserError, match="leave --data out"):
        load(Config(task="toy", data=str(tmp_path)))


def test_the_folder_of_the_asked_direction_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for pair in ("de-en", "en-de"):
        write(tmp_path / "data/wmt" / pair, **PLAIN)
    assert [task_folder("wmt", pair).name for pair in ("de-en", "en-de")] == ["de-en", "en-de"]


@pytest.mark.parametrize("pair", ["de", "de-de", "de-en-fr", "", "-", "de-../en", "de-"])
def test_what_is_no_pair_of_languages_is_refused(pair):
    assert "two language codes" in wrong_pair(pair)
    assert not wrong_pair("de-en")


def test_the_tables_fit_together():
    """Each task has a generator or a reader, and its keys are in the tables."""
    for task in TASKS.values():
        assert task.generator or task.reader
        assert task.generator in ("", *GENERATORS) and task.reader in ("", *READERS)


def test_windows_line_ends_are_no_part_of_the_text(tmp_path):
    write(tmp_path, **PLAIN)
    (tmp_path / "test.de").write_bytes("eins zwei\r\ndrei\r\n".encode())
    (tmp_path / "test.en").write_bytes(b"one two\nthree\n")
    assert texts(read(tmp_path)["test"]) == [("eins zwei", "one two"), ("drei", "three")]


@pytest.mark.parametrize("character", ["\u2028", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_only_newlines_split_lines(tmp_path, character, end):
    write(tmp_path, **{name: words for name, words in PLAIN.items() if name != "test__de"})
    content = f"one{character}line\n".encode()
    (tmp_path / f"test.de{end}").write_bytes(gzip.compress(content) if end else content)
    assert texts(read(tmp_path)["test"]) == [(f"one{character}line", "D")]


def test_half_a_test_split_is_not_taken_for_none(tmp_path):
    write(tmp_path, **{name: words for name, words in PLAIN.items() if name != "test__de"})
    with pytest.raises(UserError, match="one side of the test split only"):
        read(tmp_path)


def test_a_file_whose_lines_end_in_cr_alone_is_not_one_long_line(tmp_path):
    write(tmp_path, **PLAIN)
    (tmp_path / "train.de").write_bytes(b"eins\rzwei\r")
    with pytest.raises(UserError, match="end in CR alone"):
        read(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    write(tmp_path, **PLAIN)
    (tmp_path / "test.de").write_bytes(b"\xef\xbb\xbf" + "über\n".encode())
    assert texts(read(tmp_path)["test"]) == [("über", "D")]


def test_empty_training_lines_are_left_out_and_counted(tmp_path, capsys):
    write(tmp_path, **PLAIN)
    (tmp_path / "train.de").write_text("a\n\nb\n", encoding="utf-8")
    (tmp_path / "train.en").write_text("A\nX\nB\n", encoding="utf-8")
    assert texts(read(tmp_path)["train"]) == [("a", "A"), ("b", "B")]
    assert "left out 1 example" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["valid", "test"])
def test_an_empty_side_is_refused_where_it_would_change_the_score(tmp_path, split):
    write(tmp_path, **PLAIN)
    (tmp_path / f"{split}.de").write_text("a\n  \n", encoding="utf-8")
    (tmp_path / f"{split}.en").write_text("A\nB\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"line 2 of .*{split}.de and .*has an empty side"):
        read(tmp_path)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_split_without_examples_is_refused(tmp_path, split, content):
    write(tmp_path, **PLAIN)
    for language in ("de", "en"):
        (tmp_path / f"{split}.{language}").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"{split}.en"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("train.de", b"\xff\xfe"),
        ("train.de.gz", b"plain text\n"),
        ("train.de.gz", gzip.compress(b"a\nb\n")[:-4]),
        ("train.de.gz", gzip.compress(b"a\nb\n")[:12] + b"\xff" * 20),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content):
    write(tmp_path, **PLAIN)
    (tmp_path / "train.de").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"cannot read .*{name}"):
        read(tmp_path)


@pytest.mark.skipif(not MULTI30K.is_dir(), reason=f"real data is not here: {MULTI30K}")
def test_multi30k():
    splits, _ = load(Config(task="multi30k", pair="en-de", data=str(MULTI30K)))
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 29000,
        "valid": 1014,
        "test": 1000,
    }
    assert splits["test"][0] == (
        "A man in an orange hat starring at something.",
        "<2de>",
        "Ein Mann mit einem orangefarbenen Hut, der etwas anstarrt.",
    )


# ------------------------------------------------------------------------------------------ tokenizer


@pytest.fixture(scope="module")
def tokenizer(built_in):
    return train_tokenizer(built_in[0]["train"][:1000], 600)


def test_special_tokens_come_first_and_tags_follow(tokenizer):
    assert [tokenizer.id_to_token(i) for i in range(5)] == [PAD, EOS, UNK, SEP, "<2de>"]
    both = [Example("a b", "<2en>", "c"), Example("c", "<2de> <ask>", "a b")]
    assert [train_tokenizer(both, 300).id_to_token(i) for i in range(4, 7)] == [
        "<2de>",
        "<2en>",
        "<ask>",
    ]
    assert special_ids(tokenizer) == (0, 1, 2, 3, 4)
    assert tokenizer.get_vocab_size() == 600


def test_text_survives_encoding_and_decoding(tokenizer, built_in):
    for row in built_in[1]["test"]:
        for text in (row.source, row.target):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_encoded_rows_hold_no_unknown_or_special_token_but_the_end(tokenizer, built_in):
    encoded = encode(tokenizer, built_in[0]["test"])
    assert all(ids.source.min() > 4 for ids in encoded)
    assert all(ids.target[-1] == 1 and (ids.target[:-1] > 4).all() for ids in encoded)
    assert all(ids.prompt.tolist() == [4] for ids in encoded)


def test_digits_are_tokens_of_their_own(tokenizer):
    assert tokenizer.encode("in 1957").tokens[-4:] == list("1957")


def test_a_tokenizer_file_is_read_or_refused(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    assert load_tokenizer(path).get_vocab() == tokenizer.get_vocab()
    path.write_text("{}", encoding="utf-8")
    for broken in (path, tmp_path / "none.json"):
        with pytest.raises(UserError, match=f"cannot read {broken}"):
            load_tokenizer(broken)


# ----------------------------------------------------------------------------- lengths


@pytest.fixture(scope="module")
def words():
    """A tokenizer to which each letter is a token."""
    letters = " ".join("abcdefghij")
    return train_tokenizer([Example(letters, "<2de>", letters)] * 3, 300)


TEXTS = [
    Example("a b c", "<2de>", "a b c d"),
    Example("a b c d e f g h i", "<2de>", "a"),
    Example("a b", "<2de>", "a b c d e f g h"),
]  # longest: source 9, target 9 with its </s>


def shortened(words, task: str, split: str, scored: bool, target: int = 7) -> list[tuple[str, int]]:
    """Source, and number of tokens of the target, of what is left of sources of 5 tokens."""
    config = Config(task=task, max_source_tokens=5, max_target_tokens=target)
    data = encode_split(words, TEXTS, config, split, scored)
    return [(words.decode(ids.source), len(ids.target)) for ids in data]


def test_long_training_pairs_are_left_out_and_counted(words, capsys):
    assert shortened(words, "wmt", "train", scored=False) == [("a b c", 5)]
    source, target = capsys.readouterr().out.splitlines()
    assert source == (
        "data: 1 of 3 train examples have a source over --max-source-tokens 5: left out"
    )
    assert target == (
        "data: 1 of 3 train examples have a target over --max-target-tokens 7: left out"
    )


@pytest.mark.parametrize(
    "task, split, scored, end, kept",
    [
        ("wmt", "valid", True, "end", "a b c d e"),
        ("xsum", "train", False, "end", "a b c d e"),
        ("xsum", "test", True, "end", "a b c d e"),
        ("logiqa", "train", False, "start", "e f g h i"),
        ("logiqa", "test", True, "start", "e f g h i"),
    ],
)
def test_long_sources_are_cut(words, capsys, task, split, scored, end, kept):
    """Training pairs with a long target are left out; a reference stays whole."""
    expected = [("a b c", 5), (kept, 2), ("a b", 9)]
    assert shortened(words, task, split, scored) == expected[: 3 if scored else 2]
    source, target = capsys.readouterr().out.splitlines()
    assert source.startswith(f"data: 1 of 3 {split} examples have a source")
    assert source.endswith(f"source loses its {end}")
    assert target.startswith(f"data: 1 of 3 {split} examples have a target")
    assert target.endswith("the output will be cut" if scored else "left out")


def test_a_source_that_ends_in_eos_keeps_it(words):
    """T5's sources do. words with a post_processor stands for its tokenizer."""
    t5 = Tokenizer.from_str(words.to_str())
    t5.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    config = Config(task="wmt", max_source_tokens=5, max_target_tokens=9)
    data = encode_split(t5, TEXTS, config, "test")
    assert [ids.source.tolist()[-1] for ids in data] == [1, 1, 1]
    assert [t5.decode(ids.source.tolist()) for ids in data] == ["a b c", "a b c d", "a b"]


def test_a_target_as_long_as_the_limit_stays(words):
    """</s> counts: y may have so many tokens, too."""
    for task in ("wmt", "xsum"):
        for limit, left in ((4, 1), (5, 2), (8, 2), (9, 3)):
            config = Config(task=task, max_source_tokens=99, max_target_tokens=limit)
            assert len(encode_split(words, TEXTS, config, "train", scored=False)) == left


def test_what_fits_is_not_touched(words, capsys):
    config = Config(max_source_tokens=9, max_target_tokens=9)
    data = encode_split(words, TEXTS, config, "train", scored=False)
    for ours, whole in zip(data, encode(words, TEXTS)):
        assert all(map(np.array_equal, ours, whole)) and len(ours) == 3
    assert capsys.readouterr().out == ""


def test_each_task_has_limits_of_its_own():
    wanted = {"wmt": (128, 128), "multi30k": (128, 128), "xsum": (512, 64), "logiqa": (512, 4)}
    for task, (source, target) in wanted.items():
        config, _ = train.parse(["--task", task])
        assert (config.max_source_tokens, config.max_target_tokens) == (source, target)


# ------------------------------------------------------------------------------------------ batches


def numbered(count: int = 300, longest: int = 30) -> list[Example]:
    """Example i has source i+2, i+2, ... and a target of the same number, closed by 1: rows tell who they are."""
    rng = np.random.default_rng(6)
    lengths = rng.integers(1, longest, (2, count))
    source, target = (
        [np.full(n, i + 2, dtype=np.int32) for i, n in enumerate(row)] for row in lengths
    )
    prompt = np.array([4], dtype=np.int32)
    return [Example(s, prompt, np.append(t, 1)) for s, t in zip(source, target)]


def epoch(batches: Batches) -> list[torch.Tensor]:
    return [next(batches).source for _ in range(len(batches.order))]


def who(sources: list[torch.Tensor]) -> list[int]:
    return [row[0].item() - 2 for source in sources for row in source]


def test_every_example_once_per_epoch():
    batches = Batches(numbered(), 400, seed=0)
    for number in range(3):
        assert sorted(who(epoch(batches))) == list(range(300)) and batches.epoch == number


def test_batches_keep_the_token_limit_and_come_close_to_it():
    data = numbered()
    # too long for any batch: alone in its own
    data[7] = data[7]._replace(source=np.full(500, 9, dtype=np.int32))
    batches = Batches(data, 400, seed=0)
    made = [next(batches) for _ in range(len(batches.order))]
    sizes = [batch.source.numel() + batch.target.numel() for batch in made]
    assert (
        all(size <= 400 or len(batch.source) == 1 for size, batch in zip(sizes, made))
        and max(sizes) > 400
    )
    assert len(made) < 2 * sum(len(ids.source) + len(ids.target) for ids in data) / 400


def test_of_equally_long_sources_those_with_like_targets_share_a_batch():
    """Sources of 5, targets of 1 to 60 in mixed order: without their own order half is padding."""
    lengths = [1 + 37 * i % 60 for i in range(600)]
    ids = np.full(60, 9, dtype=np.int32)
    data = [Example(ids[:5], ids[:0], ids[:n]) for n in lengths]
    batches = Batches(data, 400, seed=0)
    targets = torch.cat([next(batches).target.flatten() for _ in range(len(batches.order))])
    assert (targets == 0).float().mean() < 0.1


def test_rows_are_padded_on_the_right_and_unchanged():
    data = numbered()
    batches = Batches(data, 400, seed=0)
    for _ in range(len(batches.order)):
        batch = next(batches)
        for source, target in zip(batch.source, batch.target):
            i = source[0].item() - 2
            for row, original in ((source, data[i].source), (target, data[i].target)):
                assert (
                    row[: len(original)].tolist() == original.tolist()
                    and not row[len(original) :].any()
                )
        assert batch.source.dtype == torch.int64 and (batch.prompt == 4).all()


def test_seed_and_epoch_determine_the_batches():
    first, again, other = (epoch(Batches(numbered(), 400, seed)) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert who(first) != who(other)


def test_epochs_differ_in_order_and_in_neighbours():
    batches = Batches(numbered(longest=4), 100, seed=0)  # few lengths: many ways to group
    one, two = epoch(batches), epoch(batches)
    assert who(one) != who(two)
    assert {frozenset(who([batch])) for batch in one} != {frozenset(who([batch])) for batch in two}


@pytest.mark.parametrize("done", [0, 7, "one epoch", "beyond"])
def test_a_restored_state_continues_identically(done):
    running = Batches(numbered(), 400, seed=0)
    done = {"one epoch": len(running.order), "beyond": len(running.order) + 5}.get(done, done)
    for _ in range(done):
        next(running)
    restored = Batches(numbered(), 400, seed=0)
    restored.seek(running.epoch, running.position)
    for _ in range(len(running.order) + 10):  # past the end of an epoch
        assert torch.equal(next(running).source, next(restored).source)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_take_turns(processes):
    """Together they read what one process reads, in its order, also over the end of an epoch."""
    alone = Batches(numbered(), 400, seed=0)
    parts = [Batches(numbered(), 400, 0, rank, processes) for rank in range(processes)]
    for turn in range(len(alone.order) + 5):
        assert torch.equal(next(alone).source, next(parts[turn % processes]).source)
    while turn % processes < processes - 1:  # all have moved on by as much
        turn, _ = turn + 1, next(parts[(turn + 1) % processes])
    assert len({(part.epoch, part.position) for part in parts}) == 1


def test_chunks_of_text_stay_in_order():
    """5,000 examples are encoded in two parts: each row is that of its own text."""
    examples = [Example(f"{i} Katzen", "<2en>", f"{i + 7} cats") for i in range(5000)]
    tokenizer = train_tokenizer(examples[:500], 300)
    data = encode(tokenizer, examples)
    assert len(data) == 5000
    for i in (0, 1, 4094, 4095, 4096, 4097, 4999):
        assert tokenizer.decode(data[i].source.tolist()) == examples[i].source
        assert tokenizer.decode(data[i].target.tolist()[:-1]) == examples[i].target


def test_each_example_once_longest_first():
    data, seen, lengths = numbered(), [], []
    for index, batch in longest_first(data, 400, "a test"):
        assert who([batch.source]) == index
        seen, lengths = seen + index, lengths + [batch.source.size(1)]
    assert sorted(seen) == list(range(300)) and lengths == sorted(lengths, reverse=True)
    assert len(lengths) == 35  # 49 if each batch were measured by the longest of all before it


def test_a_pair_of_unknown_languages_has_no_built_in_data():
    with pytest.raises(UserError, match="built-in data is de-en or en-de: for fr-en"):
        built_in_splits("fr-en", 10, 0)


def test_special_tokens_in_text_are_text():
    """A corpus that spells </s> or <pad> must not end or hide its sentences."""
    tokenizer = train_tokenizer([Example("a </s> <pad> b", "<2en>", "a <sep> b")] * 3, 300)
    data = encode(tokenizer, [Example("a </s> <pad> b", "<2en>", "b <sep> a")])
    assert not set(data[0].source.tolist()) & {0, 1, 3} and not set(
        data[0].target[:-1].tolist()
    ) & {0, 1, 3}
    assert data[0].prompt.tolist() == [tokenizer.token_to_id("<2en>")] and data[0].target[-1] == 1


def test_prompts_of_a_split_have_one_length(words):
    """Padding would stand between a shorter prompt and y."""
    texts = [Example("ein Hund", "<2en>", "a dog"), Example("ein Hund", "<2en> a", "a dog")]
    with pytest.raises(UserError, match="as many tokens, not"):
        encode_split(words, texts, Config(), "train")


def test_encoding_leaves_no_state_in_the_tokenizer(words):
    """Then "</s>" in text is text again only while examples are encoded."""
    assert words.encode_special_tokens is False
    before = words.to_str()
    for examples in (TEXTS, TEXTS[:1]):
        encode(words, examples)
        assert words.encode_special_tokens is False and words.to_str() == before
    assert words.encode("a</s>", add_special_tokens=False).ids[-1] == words.token_to_id(EOS)
