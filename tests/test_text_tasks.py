"""Summaries and multiple choice: samples, readers of the real formats, metrics, the whole path."""

import gzip
import itertools
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval as evaluation
import train
from conftest import TINY
from data import (
    TASKS,
    Config,
    Example,
    UserError,
    encode_split,
    logiqa_row,
    news,
    puzzle,
    read_splits,
    source_prefix,
    train_tokenizer,
    xsum_row,
)

DATA = Path(__file__).parents[2] / "shared" / "data"


def test_every_puzzle_has_one_answer_and_it_is_the_target():
    """By trying all 24 orders against the clues: one fits; the letter names who is asked for."""
    r, letters, stated = random.Random(0), Counter(), 0
    for _ in range(600):
        example = puzzle(r, None)
        names = dict(re.findall(r"\(([A-D])\) (\w+)", example.source))
        assert len(set(names.values())) == 4 and not example.prompt
        asked = re.search(r"Who is (.*)\?", example.source)[1]
        more = re.findall(r"(\w+) is \w+er than (\w+)\.", example.source)
        if not more:
            stated += 1
            assert example.source.startswith(f"{names[example.target]} is {asked}. Who is")
            continue
        assert len(more) == 3
        orders = [
            order
            for order in itertools.permutations(names.values())
            if all(order.index(a) < order.index(b) for a, b in more)
        ]
        second, word = re.fullmatch(r"the (second )?(\w+)", asked).groups()
        place = 1 if second else 0
        place = 3 - place if word in ("youngest", "shortest", "slowest") else place
        assert len(orders) == 1 and names[example.target] == orders[0][place]
        letters[example.target] += 1  # of those to be derived
    assert 360 < stated < 480 and min(letters.values()) > 25  # no letter is a good guess


def test_summaries_say_what_the_news_say():
    """What, where and how many: each is in the item, and two items differ in each."""
    r, seen = random.Random(0), []
    for _ in range(200):
        example = news(r, None)
        hurt, event, site, town = re.fullmatch(
            r"(\w+) people were hurt in a (.+) at a (\w+) in (\w+)\.", example.target
        ).groups()
        first, second = example.source.split(". ")[:2]
        assert first == f"Residents of {town} were woken by sirens"
        assert second.startswith(f"The {event} ") and second.endswith(f" at the {site}")
        assert f"that {hurt.lower()} people" in example.source
        elsewhere = re.search(rf"similar {event} in (\w+) made", example.source)[1]
        assert elsewhere != town
        assert event[0] not in "aeiou" and site[0] not in "aeiou"  # "a" is the right article
        seen.append((hurt, event, site, town))
    assert all(len(set(column)) >= 5 for column in zip(*seen))


def write_lines(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


LOGIQA = {
    "id": 1,
    "answer": 2,
    "text": "All A are B.",
    "question": "So?",
    "options": ["a b", "b", "c\n c", "d"],
    "type": {},
}
XSUM = {"document": "Long\ntext.", "summary": " Short. "}


def read(row, folder):
    return read_splits(folder, ["jsonl"], row)


def test_readers(tmp_path):
    write_lines(tmp_path / "train.jsonl", [XSUM] * 2)
    write_lines(tmp_path / "val.jsonl.gz", [{"document": "x", "summary": "y", "id": 7}])
    assert read(xsum_row, tmp_path) == {
        "train": [("Long text.", "", "Short.")] * 2,
        "valid": [("x", "", "y")],
    }
    write_lines(tmp_path / "test.jsonl", [XSUM])
    assert len(read(xsum_row, tmp_path)["test"]) == 1
    other = tmp_path / "other"
    other.mkdir()
    write_lines(other / "train.jsonl.gz", [LOGIQA])
    write_lines(other / "dev.jsonl", [LOGIQA])
    question = ("All A are B. So? (A) a b (B) b (C) c c (D) d", "", "C")
    assert read(logiqa_row, other) == {"train": [question], "valid": [question]}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        json.dumps(LOGIQA | {"answer": 4}),
        json.dumps(LOGIQA | {"answer": -1}),
        json.dumps(LOGIQA | {"options": ["a"]}),
        json.dumps(LOGIQA | {"options": None}),
        json.dumps({"text": "x"}),
        json.dumps(LOGIQA | {"answer": "C"}),
        json.dumps(LOGIQA | {"answer": True}),
        json.dumps(LOGIQA | {"text": "half \ud800"}),
        "[" * 200_000,
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    write_lines(tmp_path / "train.jsonl", [LOGIQA, line])
    with pytest.raises(UserError, match=r"line 2 of .*train.jsonl"):
        read(logiqa_row, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        '{"document": "x"}',
        json.dumps(XSUM | {"summary": None}),
        json.dumps(XSUM | {"document": ["x"]}),
    ],
)
def test_a_bad_line_of_a_summary_is_named(tmp_path, line):
    write_lines(tmp_path / "train.jsonl", [XSUM, XSUM, line])
    with pytest.raises(UserError, match=r"line 3 of .*train.jsonl"):
        read(xsum_row, tmp_path)


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no train split"):
        read(logiqa_row, tmp_path)
    for rows in ([], [XSUM | {"summary": " "}]):
        write_lines(tmp_path / "train.jsonl", rows)
        with pytest.raises(UserError, match=r"train\.jsonl"):
            read(xsum_row, tmp_path)
    write_lines(tmp_path / "train.jsonl", [XSUM])
    with pytest.raises(UserError, match="no valid split"):
        read(xsum_row, tmp_path)


@pytest.mark.parametrize("empty", [XSUM | {"document": " \n"}, XSUM | {"summary": ""}])
def test_an_empty_side_is_left_out_of_training_and_refused_elsewhere(empty, tmp_path, capsys):
    write_lines(tmp_path / "train.jsonl", [XSUM, empty, XSUM])
    write_lines(tmp_path / "valid.jsonl", [XSUM])
    splits = read(xsum_row, tmp_path)
    assert splits["train"] == [("Long text.", "", "Short.")] * 2
    assert re.search(r"\b1\b.* empty side", capsys.readouterr().out)
    for split in ("valid", "test"):
        write_lines(tmp_path / f"{split}.jsonl", [XSUM, empty])
        with pytest.raises(UserError, match=rf"line 2 of .*{split}\.jsonl.* empty"):
            read(xsum_row, tmp_path)
        write_lines(tmp_path / f"{split}.jsonl", [XSUM])


@pytest.mark.parametrize(
    "row, file, count",
    [(xsum_row, "xsum/xsum_622.jsonl", 622), (logiqa_row, "logiqa/logiqa2_dev.jsonl", 1569)],
)
def test_real_files(tmp_path, row, file, count):
    if not (DATA / file).exists():
        pytest.skip(f"needs {DATA / file}")
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").symlink_to(DATA / file)
    assert len(read(row, tmp_path)["train"]) == count


def test_accuracy_and_macro_f1_by_hand():
    """A: 1 hit of 2, said twice: F1 1/2. B: 1 of 1, said once: 1. C: 0. "x" is wrong. Mean 1/2."""
    examples = [SimpleNamespace(target=letter) for letter in "AABC"]
    scores = evaluation.option_scores(None, examples, ["A", "x", "B", "A"], [""] * 4)
    assert scores == {"acc": 50.0, "F1": pytest.approx(50.0)}


def test_macro_f1_counts_an_answer_that_is_never_given():
    """A A B answered A A A: F1 of A is 0.8, of B 0. Mean 40: of the answers, not of the outputs."""
    examples = [Example("x", "", y) for y in "AAB"]
    scores = evaluation.option_scores(None, examples, ["A", "A", "A"], [""] * 3)
    assert scores == {"acc": pytest.approx(200 / 3), "F1": pytest.approx(40.0)}


def test_macro_f1_of_many_answers_looks_at_each_once():
    """8,000 distinct answers took 2.4 s when each was counted by a pass over all outputs."""

    class Outputs(list):
        def count(self, *_):
            raise AssertionError("a pass over all outputs for one answer")

    examples = [Example("x", "", f"{n % 3000}") for n in range(4000)]
    outputs = Outputs(f"{n % 2000}" for n in range(4000))
    scores = evaluation.option_scores(None, examples, outputs, [])
    # 0 to 999: asked twice, said twice, hit once. 1000 to 1999: once, twice, once. Others: never
    assert scores == {"acc": 50.0, "F1": pytest.approx(100 * (1000 * 0.5 + 1000 * 2 / 3) / 3000)}


def test_chrf_with_two_plusses_counts_words():
    metrics = evaluation.translation_metrics(Config(), [])
    metrics["chrF++"].corpus_score(["a dog"], [["a dog"]])
    assert "|nw:2|" in str(metrics["chrF++"].get_signature())


def test_rouge_by_hand():
    """4 of 5 words in common with 4 (stems: cats = cat): P 1, R 4/5, F 8/9; bigrams 3: F 6/7."""
    examples = [SimpleNamespace(target="the cat sat down today")]
    scores = evaluation.rouge_scores(None, examples, ["the cats sat down"], [""])
    assert scores == {
        "ROUGE-1": pytest.approx(800 / 9),
        "ROUGE-2": pytest.approx(600 / 7),
        "ROUGE-L": pytest.approx(800 / 9),
    }


def test_a_long_puzzle_keeps_its_question_and_options(capsys):
    example = logiqa_row(json.dumps(LOGIQA | {"text": "word " * 99}))
    tokenizer = train_tokenizer([example], 300)
    config = Config(task="logiqa", max_source_tokens=40)
    data = encode_split(tokenizer, [example], config, "train", scored=False)
    kept = tokenizer.decode(data[0].source.tolist())
    assert len(data[0].source) == 40
    assert kept.endswith("word So? (A) a b (B) b (C) c c (D) d")
    said = capsys.readouterr().out
    assert re.search(
        "1 of 1 train examples .*--max-source-tokens 40: their source loses its start", said
    )


@pytest.mark.parametrize(
    "task, columns", [("xsum", {"ROUGE-1", "ROUGE-2", "ROUGE-L"}), ("logiqa", {"acc", "F1"})]
)
def test_the_whole_path(task, columns, tmp_path, capsys):
    """No prompt, sources cut to fit and counted; table, results, scoring again, resuming."""
    folder = tmp_path / "r"
    flags = [*TINY, "--max-source-tokens", "30", "--built-in-size", "60"]
    assert train.main(["--task", task, *flags, "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"[1-9]\d* of 60 train examples .*--max-source-tokens 30: their source loses", out
    )
    assert "log P(c|x)" in out
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    assert [set(row["metrics"]) for row in rows] == [columns] * 3
    assert evaluation.main([str(folder), "--stage", "policy"]) == 0
    assert f"{rows[1]['nll']:.3f}" in capsys.readouterr().out
    assert train.main(["--resume", str(folder)]) == 0
    assert f"{rows[1]['nll']:.3f}" in capsys.readouterr().out
    (tmp_path / "text").write_text("Who is it?\n\nA fire\tbroke out.\n", encoding="utf-8")
    assert evaluation.main([str(folder), "--input", str(tmp_path / "text")]) == 0
    assert capsys.readouterr().out.count("\n") == 3


def test_a_pretrained_model_changes_two_learning_rates_and_no_other_default():
    for task in TASKS:
        scratch, tuned = (train.parse(["--task", task, *more])[0] for more in ([], ["--init", "x"]))
        assert tuned == replace(scratch, init="x", lr=3e-4, policy_lr=1e-4)
    assert train.parse(["--init", "x", "--lr", "0.5"])[0].lr == 0.5
    for more in (["--size", "tiny"], ["--size=tiny"], ["--vocab-size", "4000"]):
        with pytest.raises(SystemExit):
            train.parse(["--init", "x", *more])


def test_prefixes_for_pretrained_models():
    def prefix(task, init="x", pair="de-en"):
        return source_prefix(SimpleNamespace(task=task, init=init, pair=pair))

    assert prefix("xsum") == "summarize: " and prefix("logiqa") == ""
    assert prefix("wmt") == "translate German to English: "
    assert prefix("multi30k", pair="en-fr") == "translate English to French: "
    assert [prefix(task, init="") for task in ("xsum", "wmt")] == ["", ""]
