"""Summaries and multiple choice: samples, readers of the real formats, metrics, the whole path."""

import gzip
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import train
from conftest import TINY
from data import TASKS, UserError, encode, logiqa_row, news, puzzle, read_json_lines, source_prefix, train_tokenizer, xsum_row

DATA = Path(__file__).parents[2] / "shared" / "data"


def test_every_puzzle_has_one_answer_and_it_is_the_target():
    """By trying all 24 orders against the clues: no other is consistent, and the letter names who is asked for."""
    r, letters, stated = random.Random(0), Counter(), 0
    for _ in range(600):
        example = puzzle(r, None)
        names = dict(re.findall(r"\(([A-D])\) (\w+)", example.source))
        more = [(a, b) for a, b in re.findall(r"(\w+) is \w+er than (\w+)\.", example.source)]
        more += [(b, a) for a, b in re.findall(r"(\w+) is not as \w+ as (\w+)\.", example.source)]
        assert len(set(names.values())) == 4
        asked = re.search(r"Who is (.*)\?", example.source)[1]
        if not more:
            stated += 1
            assert example.source.startswith(f"{names[example.target]} is {asked}.")
            continue
        assert len(more) == 3
        orders = [o for o in itertools.permutations(names.values()) if all(o.index(a) < o.index(b) for a, b in more)]
        second, word = re.search(r"Who is the (second )?(\w+)\?", example.source).groups()
        place = 1 if second else 0
        place = 3 - place if word in ("youngest", "shortest", "slowest", "poorest") else place
        assert len(orders) == 1 and names[example.target] == orders[0][place]
        letters[example.target] += 1  # of those to be derived
    assert 360 < stated < 480 and min(letters.values()) > 25  # no letter is a good guess


def test_summaries_say_what_the_news_say():
    r = random.Random(0)
    for _ in range(200):
        example = news(r, None)
        assert example.target.rsplit(" ", 1)[-1].strip(".") in example.source.split(".")[0]  # the town
        number = example.target.split()[0].lower()
        assert f"that {'no' if number == 'nobody' else number} pe" in example.source
        assert example.target.split(" at a ")[1].split(" in ")[0] in example.source.split(".")[1]  # the place
    assert "an" not in {news(r, None).target.split(" in ")[1].split()[0] for _ in range(50)}  # no event begins with a vowel


def write_lines(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


LOGIQA = {"id": 1, "answer": 2, "text": "All A are B.", "question": "So?", "options": ["a b", "b", "c\n c", "d"], "type": {}}


def test_readers(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"document": "Long\ntext.", "summary": " Short. "}] * 2)
    write_lines(tmp_path / "validation.jsonl.gz", [{"document": "x", "summary": "y"}])
    splits = read_json_lines(xsum_row, tmp_path)
    assert splits["train"][0] == ("Long text.", "", "Short.") and splits["valid"] == [("x", "", "y")] and "test" not in splits
    write_lines(tmp_path / "train.txt", [LOGIQA])
    (tmp_path / "train.jsonl").unlink()
    write_lines(tmp_path / "dev.txt", [LOGIQA])
    (tmp_path / "validation.jsonl.gz").unlink()
    assert read_json_lines(logiqa_row, tmp_path)["valid"] == [("All A are B. So? (A) a b (B) b (C) c c (D) d", "", "C")]


@pytest.mark.parametrize("line", ["", "{", "[]", "3", json.dumps(LOGIQA | {"answer": 4}), json.dumps(LOGIQA | {"options": ["a"]}),
                                  json.dumps({"text": "x"}), json.dumps(LOGIQA | {"text": None})])
def test_a_bad_line_is_named(tmp_path, line):
    write_lines(tmp_path / "train.jsonl", [LOGIQA])
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"line 2 of .*train.jsonl"):
        read_json_lines(logiqa_row, tmp_path)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        read_json_lines(logiqa_row, tmp_path)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match="no train split"):
        read_json_lines(logiqa_row, tmp_path)


@pytest.mark.parametrize("task, row, file, count", [("xsum", xsum_row, "xsum/xsum_622.jsonl", 622),
                                                    ("logiqa", logiqa_row, "logiqa/logiqa2_dev.jsonl", 1569)])
def test_real_files(tmp_path, task, row, file, count):
    if not (DATA / file).exists():
        pytest.skip(f"needs {DATA / file}")
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").symlink_to(DATA / file)
    assert len(read_json_lines(row, tmp_path)["train"]) == count


def test_accuracy_and_macro_f1_by_hand():
    """A: 1 hit of 2, said twice: F1 1/2. B: 1 of 1, said once: 1. C: 0. "x" is wrong everywhere. Mean 1/2."""
    examples = [SimpleNamespace(target=letter) for letter in "AABC"]
    scores = evaluation.option_scores(None, examples, ["A", "x", "B", "A"], [None] * 4)
    assert scores == {"acc": 50.0, "F1": pytest.approx(50.0)}


def test_rouge_by_hand():
    """4 of 5 words in common with 4 (stems: cats = cat): P 1, R 4/5, F 8/9; bigrams 3 of 3 and 4: F 6/7."""
    scores = evaluation.rouge_scores(None, [SimpleNamespace(target="the cat sat down today")], ["the cats sat down"], [None])
    assert scores == {"ROUGE-1": pytest.approx(800 / 9), "ROUGE-2": pytest.approx(600 / 7), "ROUGE-L": pytest.approx(800 / 9)}


def test_the_likeliest_option_is_the_one_that_the_loss_prefers():
    """Against one call of warmup.sft_loss per letter and example, padding and different lengths included."""
    from model import EncoderDecoder, ModelConfig
    from warmup import Batch, sft_loss

    r = random.Random(3)
    examples = [puzzle(r, None) for _ in range(40)]
    tokenizer = train_tokenizer(examples, 300)
    torch.manual_seed(1)
    model = EncoderDecoder(ModelConfig(vocab_size=tokenizer.get_vocab_size(), width=16, heads=2, head_size=8, ff=16,
                                       encoder_layers=1, decoder_layers=1)).eval()
    for p in model.parameters():  # so that letters differ
        p.data += 0.5 * torch.randn_like(p)
    data, config = encode(tokenizer, examples), SimpleNamespace(batch_tokens=400, dtype="float32")
    chosen = evaluation.likeliest_option(model, tokenizer, data, config, None)
    letter = {y: encode(tokenizer, [examples[0]._replace(target=y)]).target[0] for y in "ABCD"}
    for source, choice in zip(data.source, chosen):
        loss = {y: sft_loss(model, Batch(*(torch.tensor(x)[None].long() for x in (source, [], ids)))) for y, ids in letter.items()}
        assert choice == min(loss, key=loss.get)
    assert len(set(chosen)) > 1
    alike = encode(tokenizer, [example._replace(target="A") for example in examples])  # the answers are no hint
    assert evaluation.likeliest_option(model, tokenizer, alike, config, None) == chosen


def test_a_long_puzzle_keeps_its_question_and_options(capsys):
    from data import encode_split

    example = logiqa_row(LOGIQA | {"text": "word " * 99})
    tokenizer = train_tokenizer([example], 300)
    data = encode_split(tokenizer, [example], train.Config(task="logiqa", max_tokens=40), "train")
    assert tokenizer.decode(data.source[0].tolist()).endswith("word So? (A) a b (B) b (C) c c (D) d")
    assert "1 of 1 train examples are longer than --max-tokens 40: their source loses its start" in capsys.readouterr().out


@pytest.mark.parametrize("task, columns", [("xsum", {"ROUGE-1", "ROUGE-2", "ROUGE-L"}), ("logiqa", {"acc", "F1", "acc*", "F1*"})])
def test_the_whole_path(task, columns, tmp_path, capsys):
    """No prompt, sources cut to fit and counted; table, results, scoring again, resuming."""
    folder = str(tmp_path / "r")
    assert train.main(["--task", task, *TINY, "--out", folder]) == 0
    out = capsys.readouterr().out
    assert re.search(r"[1-9]\d* of 300 train examples are longer than --max-tokens 40: their source loses its", out)
    assert "warmup y" in out
    rows = json.loads((tmp_path / "r" / "results.json").read_text())["rows"]
    assert [set(row["metrics"]) for row in rows] == [columns] * 3
    assert evaluation.main([folder, "--stage", "policy"]) == 0 and train.main(["--resume", folder]) == 0
    assert evaluation.main([folder, "--pair", "de-en"]) == 1 and "--pair is for translation" in capsys.readouterr().err


def test_settings_for_training_from_scratch_are_not_those_for_pretrained_models():
    scratch, tuned = (train.parse(["--task", "logiqa", *more])[0] for more in ([], ["--init", "x"]))
    assert (scratch.size, scratch.dropout, tuned.dropout) == ("puzzle", 0.0, 0.1) and tuned.lr == 3e-4
    assert scratch.max_tokens == tuned.max_tokens == 512
    with pytest.raises(SystemExit):
        train.parse(["--init", "x", "--size", "tiny"])


def test_prefixes_for_pretrained_models():
    config = SimpleNamespace(task="xsum", init="x", pair="de-en")
    assert source_prefix(config) == "summarize: " and source_prefix(SimpleNamespace(task="logiqa", init="x")) == ""
    config.task = "wmt"
    assert source_prefix(config) == "translate German to English: "
    config.init = ""
    assert source_prefix(config) == "" and {"xsum", "logiqa"} <= TASKS.keys()
