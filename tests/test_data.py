"""data.py: the sample against an independent translator, the readers, the tokenizer, the batches."""

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
    PAD,
    PEOPLE,
    READERS,
    SAMPLES,
    SEP,
    TASKS,
    THINGS,
    UNK,
    VERBS,
    Batches,
    Encoded,
    Example,
    clause,
    encode,
    encode_split,
    find_file,
    generate_splits,
    in_order,
    load,
    load_tokenizer,
    noun_phrase,
    pointers,
    read_splits,
    sentence,
    special_ids,
    task_folder,
    train_tokenizer,
    translation_sample,
    wrong_pair,
)
from model import UserError
import train
from train import Config

MULTI30K = Path(__file__).parents[2] / "shared/data/multi30k"

# ------------------------------------------------------- full forms, written by hand and not taken from data.py


def table(text: str) -> list[list[str]]:
    return [
        [word.replace("_", " ") for word in row.split()]
        for row in text.replace("\n", ", ").split(", ")
    ]


NOUNS = table("""man men Mann Männer Männern m, woman women Frau Frauen Frauen f, child children Kind Kinder Kindern n
girl girls Mädchen Mädchen Mädchen n, friend friends Freund Freunde Freunden m, dog dogs Hund Hunde Hunden m
sister sisters Schwester Schwestern Schwestern f, teacher teachers Lehrer Lehrer Lehrern m
doctor doctors Arzt Ärzte Ärzten m, cat cats Katze Katzen Katzen f, horse horses Pferd Pferde Pferden n
house houses Haus Häuser Häusern n, book books Buch Bücher Büchern n, letter letters Brief Briefe Briefen m
door doors Tür Türen Türen f, window windows Fenster Fenster Fenstern n, table tables Tisch Tische Tischen m
lamp lamps Lampe Lampen Lampen f, car cars Auto Autos Autos n, picture pictures Bild Bilder Bildern n
key keys Schlüssel Schlüssel Schlüsseln m, bag bags Tasche Taschen Taschen f, coat coats Mantel Mäntel Mänteln m""")
NOUN = {row[number]: (row, bool(number)) for row in NOUNS for number in (0, 1)}
ADJECTIVE = dict(
    table("""young jung, friendly freundlich, old alt, small klein, big groß, new neu, beautiful schön
strange seltsam, red rot, green grün, cheap billig, heavy schwer""")
)
NUMBER = dict(table("two zwei, three drei, four vier, five fünf, twelve zwölf"))
DETERMINER = {  # article-ending of the adjective: m f n plural
    ("the", "nom"): "der-e die-e das-e die-en",
    ("a", "nom"): "ein-er eine-e ein-es",
    ("the", "acc"): "den-en die-e das-e die-en",
    ("a", "acc"): "einen-en eine-e ein-es",
    ("the", "dat"): "dem-en der-en dem-en den-en",
    ("a", "dat"): "einem-en einer-en einem-en",
    ("my", "nom"): "mein-er meine-e mein-es meine-en",
    ("my", "acc"): "meinen-en meine-e mein-es meine-en",
    ("my", "dat"): "meinem-en meiner-en meinem-en meinen-en",
}
# English base, 3rd person, past; German singular, plural, prefix, participle, auxiliary
VERB = table("""see sees saw sieht sehen - gesehen hat, look_at looks_at looked_at sieht sehen an angesehen hat
find finds found findet finden - gefunden hat, look_for looks_for looked_for sucht suchen - gesucht hat
fetch fetches fetched holt holen ab abgeholt hat, forget forgets forgot vergisst vergessen - vergessen hat
need needs needed braucht brauchen - gebraucht hat, paint paints painted malt malen - gemalt hat
buy buys bought kauft kaufen - gekauft hat, sell sells sold verkauft verkaufen - verkauft hat
choose chooses chose sucht suchen aus ausgesucht hat, carry carries carried trägt tragen - getragen hat
open opens opened macht machen auf aufgemacht hat, close closes closed macht machen zu zugemacht hat
sleep sleeps slept schläft schlafen - geschlafen hat, work works worked arbeitet arbeiten - gearbeitet hat
stay stays stayed bleibt bleiben - geblieben ist, arrive arrives arrived kommt kommen an angekommen ist
wake_up wakes_up woke_up wacht wachen auf aufgewacht ist, travel travels travelled reist reisen - gereist ist""")
ADVERB = dict(
    table("""today heute, every_day jeden_Tag, on_Monday am_Montag, now jetzt, yesterday gestern
last_week letzte_Woche, in_the_garden im_Garten, at_the_station am_Bahnhof, in_London in_London, at_home zu_Hause""")
)
JOIN = dict(table("because weil, although obwohl, if wenn"))
SAY = dict(table("says sagt, say sagen, knows weiß, know wissen, hopes hofft, hope hoffen"))
NAME = "Anna|Peter|Maria|Paul|Lena|Karl|Sophie|Jonas"

NP = (
    rf"(?:{NAME}|(?:the|an?|my|\d\d|{'|'.join(NUMBER)}) (?:(?:{'|'.join(ADJECTIVE)}) )?"
    rf"(?:{'|'.join(sorted(NOUN, reverse=True))})\b)"
)
TIME = r"today|every day|on Monday|now|yesterday|last week|in \d{4}"
PLACE = "in the garden|at the station|in London|at home"
CLAUSE = re.compile(
    rf"(?:(?P<front>{TIME}|{PLACE}|with {NP}) )?(?P<s>{NP}) (?:(?P<do>did|does|do) not )?"
    rf"(?P<verb>{'|'.join(form for verb in VERB for form in verb[2::-1])})\b"
    rf"(?: (?P<o>{NP}))?(?: (?P<place>{PLACE}|with {NP}))?(?: (?P<time>{TIME}))?"
)


# ----------------------------------------------------------------- a translator that shares no code with data.py


def line(*words: str) -> str:
    return " ".join(filter(None, words))


def is_plural(phrase: str) -> bool:
    return NOUN[phrase.split()[-1]][1] if " " in phrase else False


def german(phrase: str, case: str) -> str:
    """The German of an English noun phrase."""
    determiner, *adjectives, noun = phrase.split() if " " in phrase else ("", phrase)
    if not determiner:
        return phrase  # a name
    (_, _, singular, plural, dative, gender), many = NOUN[noun]
    if ("a" if determiner == "an" else determiner, case) in DETERMINER:
        forms = DETERMINER["a" if determiner == "an" else determiner, case].split()
        article, ending = forms[3 if many else "mfn".index(gender)].split("-")
    else:
        assert many, phrase
        article, ending = NUMBER.get(determiner, determiner), "en" if case == "dat" else "e"
    head = singular if not many else dative if case == "dat" else plural
    return line(article, *(ADJECTIVE[adjective] + ending for adjective in adjectives), head)


def adverbial(text: str | None) -> str:
    if not text:
        return ""
    if text.startswith("with "):
        return "mit " + german(text.removeprefix("with "), "dat")
    return ADVERB[text] if text in ADVERB else re.sub(r"^in (\d{4})$", r"im Jahr \1", text)


def verb_forms(verb: list[str], past: bool, plural: bool) -> tuple[str, str, str]:
    """Finite verb, what closes a main clause, what closes a subordinate one."""
    _, _, _, singular, many, prefix, participle, auxiliary = verb
    if past:
        finite = {"hat": "haben", "ist": "sind"}[auxiliary] if plural else auxiliary
        return finite, participle, f"{participle} {finite}"
    finite, prefix = many if plural else singular, prefix.strip("-")
    return finite, prefix, prefix + finite


def translate_clause(en: str, order: str) -> str:
    """order: main, sub (finite verb last) or inv (subject after the verb). English agreement is checked too."""
    m = CLAUSE.fullmatch(en)
    assert m, en
    plural = is_plural(m["s"])
    verb = next(row for row in VERB if m["verb"] in row[:3])
    past = m["do"] == "did" or (not m["do"] and m["verb"] == verb[2])
    if m["do"]:
        assert (m["do"], m["verb"]) == ("did" if past else "do" if plural else "does", verb[0]), en
    else:
        assert m["verb"] == verb[2 if past else 0 if plural else 1], en
    assert not m["time"] or past == bool(re.match(r"yesterday|last week|in \d", m["time"])), en
    finite, end, last = verb_forms(verb, past, plural)
    subject, o, no = (
        german(m["s"], "nom"),
        german(m["o"], "acc") if m["o"] else "",
        "nicht" if m["do"] else "",
    )
    if no and o.startswith("ein"):
        o, no = "k" + o, ""
    rest = (adverbial(m["time"]), o, no, adverbial(m["place"]))
    if order == "sub":
        return line(subject, *rest, last)
    if order == "inv" or m["front"]:
        return line(adverbial(m["front"]), finite, subject, *rest, end)
    return line(subject, finite, *rest, end)


def translate(en: str) -> str:
    """The German of a whole English sentence."""
    text = en.removesuffix(".")
    text = text if re.match(NAME, text) else text[0].lower() + text[1:]
    if m := re.fullmatch(rf"({NP}) ({'|'.join(SAY)}) that (.+)", text):
        assert m[2].endswith("s") != is_plural(m[1]), en
        de = f"{german(m[1], 'nom')} {SAY[m[2]]}, dass {translate_clause(m[3], 'sub')}"
    elif m := re.fullmatch(r"(because|although|if) (.+), (.+)", text):
        de = f"{JOIN[m[1]]} {translate_clause(m[2], 'sub')}, {translate_clause(m[3], 'inv')}"
    elif m := re.fullmatch(r"(.+) (because|although|if) (.+)", text):
        de = f"{translate_clause(m[1], 'main')}, {JOIN[m[2]]} {translate_clause(m[3], 'sub')}"
    else:
        de = translate_clause(text, "main")
    return de[0].upper() + de[1:] + "."


GOLDEN = """The old man opens the door. | Der alte Mann macht die Tür auf.
Today Anna opens a red door. | Heute macht Anna eine rote Tür auf.
The old man did not see a small dog. | Der alte Mann hat keinen kleinen Hund gesehen.
Maria does not see the small dogs at home. | Maria sieht die kleinen Hunde nicht zu Hause.
Last week Paul arrived at the station. | Letzte Woche ist Paul am Bahnhof angekommen.
With the old men two women travel. | Mit den alten Männern reisen zwei Frauen.
Three old houses slept. | Drei alte Häuser haben geschlafen.
Because Lena wakes up, Karl slept in 1950. | Weil Lena aufwacht, hat Karl im Jahr 1950 geschlafen.
Two men fetch a dog if my sister woke up. | Zwei Männer holen einen Hund ab, wenn meine Schwester aufgewacht ist.
Two children know that a teacher fetches Anna today. | Zwei Kinder wissen, dass ein Lehrer heute Anna abholt."""


@pytest.mark.parametrize("en, de", [row.split(" | ") for row in GOLDEN.split("\n")])
def test_the_independent_translator_knows_german(en, de):
    assert translate(en) == de


# ------------------------------------------------------------------------------------------ the sample's grammar


def draws(count: int, seed: int = 1):
    r = random.Random(seed)
    return [sentence(r) for _ in range(count)]


@pytest.fixture(scope="module")
def phrases():
    """Many noun phrases: {(case, English): German}."""
    r = random.Random(2)
    return {
        (case, en): de
        for case in ("nom", "acc", "dat")
        for nouns in (PEOPLE, THINGS)
        for en, de, _ in (noun_phrase(r, case, nouns) for _ in range(15000))
    }


PHRASES = """nom the old man | der alte Mann, nom a new teacher | ein neuer Lehrer, nom my child | mein Kind
acc the old man | den alten Mann, acc a friendly woman | eine freundliche Frau, acc an old house | ein altes Haus
dat the old men | den alten Männern, dat my sister | meiner Schwester, dat a small girl | einem kleinen Mädchen
dat the children | den Kindern, dat the girls | den Mädchen, acc my cars | meine Autos, nom the doctors | die Ärzte
dat two dogs | zwei Hunden, acc three keys | drei Schlüssel, dat the cars | den Autos, nom Anna | Anna"""


@pytest.mark.parametrize("golden", PHRASES.replace("\n", ", ").split(", "))
def test_noun_phrase_agrees_in_gender_number_and_case(phrases, golden):
    case, english = golden.split(" | ")[0].split(" ", 1)
    assert phrases[case, english] == golden.split(" | ")[1]


def test_every_noun_phrase_agrees(phrases):
    for (case, en), de in phrases.items():
        assert re.fullmatch(NP, en) and de == german(en, case), (case, en, de)


def test_negated_indefinite_is_kein_and_nothing_else_is():
    r = random.Random(3)
    for _ in range(3000):
        en, de, _ = noun_phrase(r, "acc", THINGS, negated=True)
        expected = german(en, "acc")
        assert de == ("k" + expected if expected.startswith("ein") else expected)


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
    for en, de in draws(10000):
        assert translate(en) == de, en


class Steered(random.Random):
    """Draws what holds a wanted word wherever there is such a choice: golden clauses turn up soon."""

    def choice(self, options):
        wanted = [option for option in options if set(re.findall(r"\w+", str(option))) & self.words]
        return super().choice(wanted or options)

    def randrange(self, start, *more):
        verbs = [i for i, verb in enumerate(VERBS) if verb[0] in self.words]
        return super().randrange(start, *more) if more else verbs[0]


def german_of(english: str, order: str, words: str) -> str:
    """What the grammar writes in this order for a clause with this English."""
    r = Steered(4)
    r.words = set(words.split())
    return next(de for en, de in (clause(r, order) for _ in range(30_000)) if en == english)


@pytest.mark.parametrize(
    "order, expected",
    [
        ("main", "Anna macht heute die alte Tür auf"),
        ("sub", "Anna heute die alte Tür aufmacht"),
        ("inv", "macht Anna heute die alte Tür auf"),
    ],
)
def test_separable_verb_in_the_present(order, expected):
    assert (
        german_of("Anna opens the old door today", order, "open Anna the old door today")
        == expected
    )


def test_verb_second_after_a_fronted_adverbial():
    assert german_of("today Anna opens the old door", "front", "open Anna the old door today") == (
        "heute macht Anna die alte Tür auf"
    )


def test_perfect_with_haben():
    words = "fetch the a man dog yesterday"
    assert (
        german_of("the man fetched a dog yesterday", "sub", words)
        == "der Mann gestern einen Hund abgeholt hat"
    )
    assert (
        german_of("yesterday the man fetched a dog", "front", words)
        == "gestern hat der Mann einen Hund abgeholt"
    )


def test_perfect_with_sein_and_a_place():
    en, words = "two women arrived at home", "arrive number two woman home"
    assert german_of(en, "main", words) == "zwei Frauen sind zu Hause angekommen"
    assert german_of(en, "sub", words) == "zwei Frauen zu Hause angekommen sind"


def test_negation_by_kein_or_nicht():
    assert (
        german_of("Paul does not buy a coat", "main", "buy Paul a coat")
        == "Paul kauft keinen Mantel"
    )
    assert (
        german_of("Paul does not buy the coat", "sub", "buy Paul the coat")
        == "Paul den Mantel nicht kauft"
    )
    assert german_of(
        "Karl did not sleep with the children", "main", "sleep Karl the child with"
    ) == ("Karl hat nicht mit den Kindern geschlafen")


def test_english_and_german_determine_each_other():
    pairs = set(draws(30000))
    assert len({en for en, _ in pairs}) == len(pairs) == len({de for _, de in pairs})


def test_there_are_at_least_ten_million_pairs():
    """A lower bound: subject x object x the 14 verbs that take a thing x 2 tenses, all drawn independently."""
    r = random.Random(5)
    subjects = {
        noun_phrase(r, "nom", PEOPLE)[:2] for _ in range(10000)
    }  # those seen: there are more
    objects = {noun_phrase(r, "acc", THINGS)[:2] for _ in range(10000)}
    assert len(VERBS) == 20 and len({tuple(verb[:3]) for verb in VERBS[:14]}) == 14
    assert len(subjects) * len(objects) * 14 * 2 >= 10**7
    assert len(set(draws(20000))) > 0.97 * 20000  # and few short sentences are drawn over and over


# ------------------------------------------------------------------------------------------ the sample's splits


def sample_splits(pair, size, seed):
    return generate_splits(translation_sample, Config(pair=pair, sample_size=size, seed=seed))


@pytest.fixture(scope="module")
def samples():
    return {seed: sample_splits("en-de", 3000, seed) for seed in range(4)}


def test_same_seed_same_pairs_and_another_seed_others(samples):
    assert sample_splits("en-de", 3000, 0) == samples[0]
    shared = set(samples[0]["train"]) & set(samples[1]["train"])
    assert len(shared) < 0.1 * 3000


def test_splits_have_the_asked_sizes_and_no_pair_twice(samples):
    assert {split: len(set(rows)) for split, rows in samples[0].items()} == {
        "train": 3000,
        "valid": 500,
        "test": 500,
    }
    assert {split: len(rows) for split, rows in sample_splits("de-en", 40, 0).items()} == {
        "train": 40,
        "valid": 10,
        "test": 10,
    }


@pytest.mark.parametrize("side", ["source", "target"])
def test_splits_are_disjoint_on_each_side_within_and_across_seeds(samples, side):
    texts = {
        (seed, split): {getattr(row, side) for row in rows}
        for seed, splits in samples.items()
        for split, rows in splits.items()
    }
    for seed in range(4):
        assert not texts[0, "test"] & (texts[seed, "train"] | texts[seed, "valid"])
        assert not texts[0, "valid"] & texts[seed, "train"]


def test_the_reversed_pair_swaps_the_sides_and_the_tag(samples):
    for there, back in zip(samples[0]["test"], sample_splits("de-en", 3000, 0)["test"]):
        assert back == (there.target, "<2en>", there.source) and there.prompt == "<2de>"


def test_pointer_questions_follow_the_permutation():
    """The answer by hand: read the words "ij" as f(i) = j and look up as often as the prompt says."""
    splits = generate_splits(pointers, Config(task="toy", sample_size=400, symbols=5, hops=3))
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
    copies = generate_splits(pointers, Config(task="toy", sample_size=20, hops=0))["train"]
    assert all(e.prompt == f"<0hops> {e.target}" for e in copies)


def test_each_pointer_and_each_symbol_is_one_token():
    """The toy goes through the same tokenizer as text; a symbol is the same token in question, answer and warmup."""
    rows = generate_splits(pointers, Config(task="toy", sample_size=2000))["train"]
    data = encode(tokenizer := train_tokenizer(rows, 4000), rows)
    assert {len(ids) for ids in data.source} == {16} and {
        len(ids) for ids in data.prompt + data.target
    } == {2}
    assert {int(ids[1]) for ids in data.prompt} == {int(ids[0]) for ids in data.target}
    assert not {int(ids[0]) for ids in data.target} & set(special_ids(tokenizer)) >= {
        int(ids[0]) for ids in data.prompt
    }


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
        [target] = encode(tokenizer, [Example(text, "", text)]).target
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
    with pytest.raises(UserError, match=f"no {split} split in .*expected {gone}"):
        read(tmp_path)
    assert find_file(tmp_path, "test", "fr") is None
    with pytest.raises(UserError, match="no folder"):
        read(tmp_path / "no folder")


def test_sides_of_different_length_are_refused(tmp_path):
    write(tmp_path, **PLAIN | {"valid__en": "C D"})
    with pytest.raises(UserError, match=r"valid.de and .*valid.en have 1 and 2 lines"):
        read(tmp_path)


def test_the_default_folder_is_taken_before_the_sample(tmp_path, monkeypatch, capsys):
    """One folder serves both directions of a pair; another pair has its own."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data/wmt/de-en", **PLAIN)
    for pair, first in (("de-en", ("a", "A")), ("en-de", ("A", "a"))):
        splits, origin = load(Config(task="wmt", pair=pair))
        assert texts(splits["train"])[0] == first and origin == str(tmp_path / "data/wmt/de-en")
        assert f"data: {origin}, {pair}" in capsys.readouterr().out
    assert task_folder("wmt", "de-fr") == Path("data/wmt/de-fr")
    assert load(Config(task="wmt", data="sample", sample_size=8))[1] == "sample"


def test_without_a_folder_of_its_own_a_task_takes_its_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data/wmt", **PLAIN)  # no folder of a pair
    write(tmp_path / "data/toy", train__jsonl="{}")  # the toy is generated
    for task in ("wmt", "toy"):
        assert load(Config(task=task, sample_size=8))[1] == "sample"
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
    """Each task has a sample or a reader, and its keys are in the tables."""
    for task in TASKS.values():
        assert task.sample or task.reader
        assert task.sample in ("", *SAMPLES) and task.reader in ("", *READERS)


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
def tokenizer(samples):
    return train_tokenizer(samples[0]["train"][:1000], 600)


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


def test_text_survives_encoding_and_decoding(tokenizer, samples):
    for row in samples[1]["test"]:
        for text in (row.source, row.target):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_encoded_rows_hold_no_unknown_or_special_token_but_the_end(tokenizer, samples):
    encoded = encode(tokenizer, samples[0]["test"])
    assert all(row.min() > 4 for row in encoded.source)
    assert all(row[-1] == 1 and (row[:-1] > 4).all() for row in encoded.target)
    assert all(row.tolist() == [4] for row in encoded.prompt)


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
    assert {len(column) for column in data} == {len(data.source)}
    return [(words.decode(source), len(target)) for source, target in zip(data.source, data.target)]


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
    assert [row.tolist()[-1] for row in data.source] == [1, 1, 1]
    assert [t5.decode(row.tolist()) for row in data.source] == ["a b c", "a b c d", "a b"]


def test_a_target_as_long_as_the_limit_stays(words):
    """</s> counts: y may have so many tokens, too."""
    for task in ("wmt", "xsum"):
        for limit, left in ((4, 1), (5, 2), (8, 2), (9, 3)):
            config = Config(task=task, max_source_tokens=99, max_target_tokens=limit)
            assert len(encode_split(words, TEXTS, config, "train", scored=False).source) == left


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


def numbered(count: int = 300, longest: int = 30) -> Encoded:
    """Example i has source i+2, i+2, ... and a target of the same number, closed by 1: rows tell who they are."""
    rng = np.random.default_rng(6)
    lengths = rng.integers(1, longest, (2, count))
    source, target = (
        [np.full(n, i + 2, dtype=np.int32) for i, n in enumerate(row)] for row in lengths
    )
    return Encoded(
        source, [np.array([4], dtype=np.int32)] * count, [np.append(row, 1) for row in target]
    )


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
    data.source[7] = np.full(500, 9, dtype=np.int32)  # too long for any batch: alone in its own
    batches = Batches(data, 400, seed=0)
    made = [next(batches) for _ in range(len(batches.order))]
    sizes = [batch.source.numel() + batch.target.numel() for batch in made]
    assert (
        all(size <= 400 or len(batch.source) == 1 for size, batch in zip(sizes, made))
        and max(sizes) > 400
    )
    assert len(made) < 2 * sum(len(row) for row in data.source + data.target) / 400


def test_of_equally_long_sources_those_with_like_targets_share_a_batch():
    """Sources of 5, targets of 1 to 60 in mixed order: without their own order half is padding."""
    lengths = [1 + 37 * i % 60 for i in range(600)]
    rows = [[np.full(n, 9, dtype=np.int32) for n in ns] for ns in ([5] * 600, [0] * 600, lengths)]
    batches = Batches(Encoded(*rows), 400, seed=0)
    targets = torch.cat([next(batches).target.flatten() for _ in range(len(batches.order))])
    assert (targets == 0).float().mean() < 0.1


def test_rows_are_padded_on_the_right_and_unchanged():
    data = numbered()
    batches = Batches(data, 400, seed=0)
    for _ in range(len(batches.order)):
        batch = next(batches)
        for source, target in zip(batch.source, batch.target):
            i = source[0].item() - 2
            for row, original in ((source, data.source[i]), (target, data.target[i])):
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
    assert [len(column) for column in data] == [5000] * 3
    for i in (0, 1, 4094, 4095, 4096, 4097, 4999):
        assert tokenizer.decode(data.source[i].tolist()) == examples[i].source
        assert tokenizer.decode(data.target[i].tolist()[:-1]) == examples[i].target


def test_in_order_covers_everything_once_longest_first():
    data, seen, lengths = numbered(), [], []
    for index, batch in in_order(data, 400, "a test"):
        assert who([batch.source]) == index.tolist()
        seen, lengths = seen + index.tolist(), lengths + [batch.source.size(1)]
    assert sorted(seen) == list(range(300)) and lengths == sorted(lengths, reverse=True)


def test_a_pair_of_unknown_languages_has_no_sample():
    with pytest.raises(UserError, match="sample is (German-English|de-en)"):
        sample_splits("fr-en", 10, 0)


def test_special_tokens_in_text_are_text():
    """A corpus that spells </s> or <pad> must not end or hide its sentences."""
    tokenizer = train_tokenizer([Example("a </s> <pad> b", "<2en>", "a <sep> b")] * 3, 300)
    data = encode(tokenizer, [Example("a </s> <pad> b", "<2en>", "b <sep> a")])
    assert not set(data.source[0].tolist()) & {0, 1, 3} and not set(
        data.target[0][:-1].tolist()
    ) & {0, 1, 3}
    assert data.prompt[0].tolist() == [tokenizer.token_to_id("<2en>")] and data.target[0][-1] == 1


def test_prompts_of_a_split_have_one_length(words):
    """Padding would stand between a shorter prompt and y."""
    texts = [Example("ein Hund", "<2en>", "a dog"), Example("ein Hund", "<2en> a", "a dog")]
    with pytest.raises(UserError, match="same number of tokens"):
        encode_split(words, texts, Config(), "train")
