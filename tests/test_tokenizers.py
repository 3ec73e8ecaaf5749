"""Tokenizers of pretrained models: spiece.model read as tokenizer.json reads, sentinels lent to <sep> and tags."""

import gzip
import json
import re
import shutil
import struct
import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import data
import train
from conftest import TINY
from data import (
    EOS,
    PAD,
    SEP,
    UNK,
    Example,
    encode,
    load_tokenizer,
    pretrained_tokenizer,
    read_spiece,
    special_ids,
    train_tokenizer,
)
from model import UserError, load_model, load_pretrained

TINY_TUNED = [
    word
    for flag, value in zip(TINY[::2], TINY[1::2])
    if flag not in ("--size", "--vocab-size")
    for word in (flag, value)
]  # what a pretrained model leaves open
DATA = Path(__file__).parents[2] / "shared" / "data"
GOLDEN = Path(__file__).parent / "golden"
ODD = [
    "  two  leading",
    "trailing  ",
    " ",
    "",
    "a\tb\u00a0c\u3000d",
    "\u200bzero width",
    "▁ itself",
    "ﬁ ① ½",
    "🙂 👩‍👩‍👧 emoji",
    "</s> in text <pad>",
    "<extra_id_0> x",
    "<sep>",
    "İ I ı",
    "12,345.67 €",
    "е́",
]


def chunk(field, value):
    """One length-delimited protobuf field: enough to write a spiece.model of our own."""
    value = value.encode() if isinstance(value, str) else value
    size, head = len(value), [field << 3 | 2]
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes([*head, size]) + value


def spiece(pieces, model_type=1, squeeze=1):
    """pieces: (text, score, kind) with kind 1 text, 2 <unk>, 3 control."""
    data = b"".join(
        chunk(1, chunk(1, text) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind]))
        for text, score, kind in pieces
    )
    return (
        data
        + chunk(2, b"\x18" + bytes([model_type]))
        + chunk(3, chunk(1, "identity") + b"\x20" + bytes([squeeze]))
    )


PIECES = [
    ("<pad>", 0.0, 3),
    ("</s>", 0.0, 3),
    ("<unk>", 0.0, 2),
    *((c, -5.0, 1) for c in "▁abcdehousr<>/n123456789:"),
    ("▁house", -2.0, 1),
    ("▁a", -2.5, 1),
    ("bc", -3.0, 1),
]


@pytest.fixture
def folder(tmp_path):
    """A T5 of our own: the golden weights with an embedding of 140, and a spiece.model of 32 pieces."""
    import torch

    from model import read_weights

    path = Path(shutil.copytree(GOLDEN / "t5", tmp_path / "t5"))
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(settings | {"vocab_size": 140}), encoding="utf-8")
    torch.manual_seed(0)
    tensors = {
        n: torch.randn(140, 16) * 0.3 if n in ("shared.weight", "lm_head.weight") else x
        for n, x in read_weights(path).items()
        if "embed_tokens" not in n and n != "lm_head.weight"
    }
    torch.save(tensors, path / "pytorch_model.bin")
    (path / "spiece.model").write_bytes(spiece(PIECES))
    return path


def test_pieces_by_score_and_whitespace(folder):
    pieces = [text for text, *_ in PIECES]
    tokenizer = read_spiece(folder / "spiece.model", 140)
    assert tokenizer.encode("a  house  bc ").tokens == [
        "▁a",
        "▁house",
        "▁",
        "bc",
    ]  # no run of spaces survives
    assert tokenizer.encode("xa").tokens == ["▁", "x", "a"] and tokenizer.encode("xa").ids[
        1
    ] == pieces.index("<unk>")
    assert tokenizer.decode(tokenizer.encode("a house").ids) == "a house"
    assert (
        tokenizer.token_to_id("<extra_id_99>") == len(pieces)
        and tokenizer.token_to_id("<extra_id_0>") == len(pieces) + 99
    )


@pytest.mark.parametrize("name, vocab_size", [("t5_v1_1", 32128), ("umt5", 256384)])
def test_equal_ids_on_every_line_of_flores(name, vocab_size):
    """spiece.model read by us = the tokenizer.json that comes with it, in five languages and on odd strings."""
    if not (DATA / "tokenizers").is_dir():
        pytest.skip(f"needs real vocabularies and FLORES in {DATA}")
    where = DATA / "tokenizers" / name
    ours = read_spiece(where / "spiece.model", vocab_size)
    ours.add_special_tokens([token for token in ours.get_vocab() if "<extra_id_" in token])
    text = (
        (where / "tokenizer.json").read_text(encoding="utf-8")
        if name == "t5_v1_1"
        else gzip.open(where / "tokenizer.json.gz", "rt").read()
    )
    theirs = Tokenizer.from_str(text)
    lines = [
        line
        for file in sorted((DATA / "flores").glob("*.dev"))
        for line in file.read_text(encoding="utf-8").split("\n")
    ]
    assert len(lines) > 4900 and ours.get_vocab() == theirs.get_vocab()
    for text in lines + ODD:
        assert (
            ours.encode(text, add_special_tokens=False).ids
            == theirs.encode(text, add_special_tokens=False).ids
        ), text


def test_sentinels_become_sep_and_tags(folder):
    """<extra_id_0> is the last piece, so <sep> has its id, the tags those before it; every id of the model has a token."""
    tokenizer = pretrained_tokenizer(folder, ["<2de>", "<2en>"], 140)
    n = len(PIECES)
    assert [tokenizer.token_to_id(t) for t in (PAD, EOS, UNK, SEP, "<2de>", "<2en>")] == [
        0,
        1,
        2,
        n + 99,
        n + 98,
        n + 97,
    ]
    assert tokenizer.get_vocab_size() == 140 and tokenizer.token_to_id("<extra_id_0>") is None
    assert set(special_ids(tokenizer)) == {
        0,
        1,
        2,
        *range(n, 140),
    }  # no warmup may hold what is no text
    assert (
        Tokenizer.from_str(tokenizer.to_str()).get_vocab() == tokenizer.get_vocab()
    )  # as a run folder keeps it


def test_no_special_token_swallows_the_spaces_around_it(folder):
    """The sentinels in T5's own tokenizer.json do."""
    text = read_spiece(folder / "spiece.model", 140).to_str()
    text = text.replace('"lstrip":false,"rstrip":false', '"lstrip":true,"rstrip":true')
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json")).get_added_tokens_decoder()
    assert all(token.lstrip and token.rstrip for token in theirs.values())
    ours = pretrained_tokenizer(folder, ["<2de>"], 140).get_added_tokens_decoder()
    assert len(ours) >= len(theirs)
    assert not any(token.lstrip or token.rstrip for token in ours.values())


def test_tags_are_prompts_and_special_tokens_in_a_text_are_not(folder):
    tokenizer = pretrained_tokenizer(folder, ["<2de>"], 140)
    data = encode(tokenizer, [Example("a</s>b <2de> <sep>", "<2de>", "a <pad>")])
    assert data[0].prompt.tolist() == [tokenizer.token_to_id("<2de>")]
    assert not set(data[0].source[:-1].tolist()) & set(special_ids(tokenizer)) - {2}
    assert (
        data[0].target.tolist().count(1) == 1
        and data[0].target[-1] == 1
        and 0 not in data[0].target
    )


def test_mt5_has_its_sentinels_as_pieces(folder):
    """▁<extra_id_N>, within the vocabulary: no others are added."""
    pieces = PIECES + [(f"▁<extra_id_{i}>", -20.0, 1) for i in (1, 0)]
    (folder / "spiece.model").write_bytes(spiece(pieces))
    tokenizer = pretrained_tokenizer(folder, ["<2de>"], 140)
    assert (tokenizer.token_to_id(SEP), tokenizer.token_to_id("<2de>")) == (
        len(pieces) - 1,
        len(pieces) - 2,
    )
    assert set(special_ids(tokenizer)) == {0, 1, 2, *range(len(PIECES), 140)}


def test_no_warmup_and_no_output_may_hold_a_sentinel_that_is_left(folder):
    """mT5's sentinels are pieces like any other. Those that we do not rename are no text."""
    pieces = PIECES + [(f"▁<extra_id_{i}>", -20.0, 1) for i in (4, 3, 2, 1, 0)]
    (folder / "spiece.model").write_bytes(spiece(pieces))
    tokenizer = pretrained_tokenizer(folder, ["<2de>"], 140)
    left = [tokenizer.token_to_id(f"▁<extra_id_{i}>") for i in (2, 3, 4)]
    n = len(PIECES)
    assert left == [n + 2, n + 1, n] and set(special_ids(tokenizer)) == {0, 1, 2, *range(n, 140)}


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "not a SentencePiece unigram"),
        (b"\x0a\xff\xff", "not a SentencePiece unigram"),
        (b"hello, world", "not a SentencePiece"),
        (spiece(PIECES, model_type=2), "not a SentencePiece unigram"),
        (spiece(PIECES + [(f"p{i}", -9.0, 1) for i in range(200)]), "is not that of"),
        (spiece([("a" if text == PAD else text, s, k) for text, s, k in PIECES]), "is not that of"),
        (spiece([piece for piece in PIECES if piece[2] != 2]), "not a SentencePiece unigram"),
        (spiece(PIECES) + chunk(3, chunk(2, b"\x07nonsense")), "not a SentencePiece unigram"),
        (spiece(PIECES) + b"\x08" + b"\xff" * 5000, "not a SentencePiece unigram"),
        (spiece(PIECES) + b"\x0a" + b"\xff" * 20 + b"\x01", "not a SentencePiece unigram"),
        (spiece([PIECES[1], PIECES[0], *PIECES[2:]]), "is not that of"),  # </s> is not 1
    ],
)
def test_broken_vocabularies_are_refused(folder, content, complaint):
    (folder / "spiece.model").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        pretrained_tokenizer(folder, [], 140)


def test_a_tokenizer_of_another_kind_is_refused(folder):
    train_tokenizer([Example("a b", "", "c d")] * 9, 100).save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="is not that of a T5"):
        pretrained_tokenizer(folder, [], 140)


def test_a_spiece_model_that_was_cut_short_is_refused_wherever_it_ends(folder):
    """A field that is shorter than it says would change the normalisation without a word."""
    (folder / "tokenizer.json").unlink(missing_ok=True)
    path = folder / "spiece.model"
    whole = path.read_bytes()
    fields = [len(whole)]
    for size in range(len(whole) - 1, len(whole) - 40, -1):
        path.write_bytes(whole[:size])
        try:
            read_spiece(path, 140)
            fields.append(size)  # between two fields: what is missing has a default
        except UserError as error:
            assert "or not a SentencePiece unigram model" in str(error)
    assert len(fields) < 8


def test_missing_or_broken_tokenizer_files(folder):
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer.json"):
        pretrained_tokenizer(folder, [], 140)
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").unlink()
    with pytest.raises(
        UserError, match="there is no tokenizer.json, and .*spiece.model is missing or not"
    ):
        pretrained_tokenizer(folder, [], 140)


def test_init_trains_scores_and_resumes(folder, tmp_path, capsys):
    """The whole path from a checkpoint folder: both stages, the table, a resumed run equal to the whole one."""
    import torch

    import eval as evaluation

    arguments = [
        "--task",
        "wmt",
        *TINY_TUNED,
        "--max-source-tokens",
        "120",
        "--max-target-tokens",
        "80",
        "--built-in-size",
        "24",
        "--beams",
        "1",
        "--threads",
        "1",
        "--init",
        str(folder),
    ]
    runs = [str(tmp_path / name) for name in ("whole", "parts")]
    assert train.main([*arguments, "--out", runs[0]]) == 0
    printed = capsys.readouterr().out
    assert (
        "vocabulary 140" in printed
        and "translate German to English: " in printed
        and "log P(c|x)" in printed
    )
    config = json.loads((Path(runs[0]) / "config.json").read_text(encoding="utf-8"))
    assert config["init"] == str(folder)
    shutil.rmtree(folder)  # the run folder stands alone
    assert (
        train.main(["--resume", runs[0]]) == 0 and evaluation.main([runs[0], "--stage", "sft"]) == 0
    )
    tokenizer = load_tokenizer(Path(runs[0]) / "tokenizer.json")
    model = load_model(Path(runs[0]) / "policy.pt", tokenizer, torch.device("cpu"))
    assert not model.config.scaled and model.config.vocab_size == 140

    out = tmp_path / "out"  # and back to Hugging Face's format, from which another run can start
    assert evaluation.main([runs[0], "--export", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "pytorch_model.bin",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    again = load_pretrained(out)
    assert all(
        torch.allclose(p, again.get_parameter(name), rtol=1e-6)
        for name, p in model.named_parameters()
    )
    own = load_tokenizer(Path(runs[0]) / "tokenizer.json")
    assert (
        pretrained_tokenizer(out, ["<2en>"], 140).get_vocab() == own.get_vocab()
    )  # <sep> is the one it learnt
    assert train.main([*arguments[:-1], str(out), "--out", runs[1], "--policy-steps", "0"]) == 0
    capsys.readouterr()
    assert (
        evaluation.main([runs[0], "--export", str(out)]) == 1
        and "is not empty" in capsys.readouterr().err
    )


def test_what_cannot_leave_says_so(finished_run, tmp_path, capsys, monkeypatch):
    """A model with our scaling and absolute positions; any model onto a full disk."""
    import eval as evaluation

    assert evaluation.main([str(finished_run), "--export", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "only --init runs export" in error and "incomplete" not in error
    assert not (tmp_path / "out").exists()

    def full(*_):
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(evaluation, "save_pretrained", full)
    assert evaluation.main([str(finished_run), "--export", str(tmp_path / "out")]) == 1
    assert "may be incomplete: unexpected pos" in capsys.readouterr().err


def test_t5_reads_sources_that_end(folder):
    """Its pretraining and fine-tuning closed every source with </s>; a vocabulary from scratch has no need to."""
    example = Example("a house", "<2de>", "house")
    own = encode(train_tokenizer([example], 300), [example])
    t5 = encode(pretrained_tokenizer(folder, ["<2de>"], 140), [example])
    assert t5[0].source[-1] == 1 == t5[0].target[-1] and own[0].source[-1] != 1 == own[0].target[-1]


def test_learning_rates_default_lower_for_pretrained_models():
    config, _ = train.parse(["--init", "somewhere"])
    assert (config.lr, config.policy_lr) == (3e-4, 1e-4)
    assert (
        train.parse(["--init", "somewhere", "--lr", "1e-2"])[0].lr == 1e-2
        and train.parse([])[0].lr == data.Config.lr
    )


def test_what_cannot_be_loaded_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    shutil.copytree(GOLDEN / "t5", tmp_path / "no-tokenizer")
    for init, complaint in (
        (str(tmp_path / "empty"), "config.json"),
        (str(tmp_path / "no-tokenizer"), "spiece.model"),
        ("/no/such", "no folder"),
        ("google/no-such-model", "did not give it"),
    ):
        assert (
            train.main(["--task", "wmt", *TINY_TUNED, "--init", init, "--out", str(tmp_path / "r")])
            == 1
        )
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and complaint in error and "\n" not in error
        assert not (tmp_path / "r").exists()


def test_the_guide_writes_a_warmup_in_transformers_as_we_do(folder, tmp_path, monkeypatch, capsys):
    """Its lines on an exported run, greedy: our c and our y, and no warning on loading."""
    transformers = pytest.importorskip(
        "transformers", reason="pip install transformers to test an export there"
    )
    import eval as evaluation

    monkeypatch.chdir(tmp_path)
    arguments = [
        "--task",
        "wmt",
        *TINY_TUNED,
        "--max-source-tokens",
        "200",
        "--max-target-tokens",
        "128",
        "--warmup-len",
        "4",
        "--beams",
        "1",
        "--no-control",
        "--init",
        str(folder),
        "--out",
        "run",
    ]
    assert train.main(arguments) == 0 and evaluation.main(["run", "--export", "exported"]) == 0
    Path("in").write_text("Anna schläft.\n", encoding="utf-8")
    capsys.readouterr()
    assert evaluation.main(["run", "--input", "in", "--show-warmup"]) == 0
    warmup, text = capsys.readouterr().out.rstrip("\n").split("\t")
    guide = (Path(__file__).parents[1] / "docs" / "guide.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(import torch\n.*?)```", guide, re.S)
    transformers.logging.set_verbosity_warning()
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(block, names)
    out, err = capsys.readouterr()
    assert out.rstrip("\n").strip() == text
    assert names["tokenizer"].decode(names["c"][0, 2:]).split() == warmup.split()
    assert "tie_word_embeddings" not in err
