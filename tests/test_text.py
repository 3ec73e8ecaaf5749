"""Any text, any length: nothing is lost in silence.

Each of these was planted once to see a test fail:
    the tokenizer normalises (NFKC)                   test_text_of_any_script_comes_back_…
    bytes that no training text holds are no tokens   test_text_of_any_script_comes_back_…
    y ends at the length of the longest source        test_the_same_y_alone_and_in_a_batch
    a beam that waits for its neighbours              test_the_same_y_alone_and_in_a_batch
    the cache keeps its first places when it grows    test_a_target_of_three_hundred_tokens
    outputs at the limit not counted                  test_the_table_says_how_many_…
    an output of two lines                            test_an_output_is_one_line
    a ceiling without the tokenizer, of the sources   test_the_ceiling_of_a_poor_vocabulary
    nothing said before training                      test_a_poor_vocabulary_is_announced_…
    the limit left out of the ceiling; no <unk> of
    the sources; a NBSP counted as lost               test_the_limit_is_…, …source_that…, …spaces_of…
    combining marks split off                         test_vowel_signs_are_part_of_their_word
    position biases for the whole limit               test_places_are_made_as_they_are_needed
    rouge-score's own words for all scripts, or none  test_identical_text_scores_100, test_rouge_of_english_…
    13a for Thai, for zho                             test_identical_text_scores_100
"""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import eval as evaluation
import train
from conftest import TINY
from data import EOS, PAD, SEP, UNK, Config, Example, collate, encode, read_config, train_tokenizer
from model import Cache, EncoderDecoder, ModelConfig, beam_search, sample_tokens
from warmup import Batch, WarmupSpec, generate

SENTENCES = {  # code -> one sentence, in twelve languages and as many ways to write
    "en": "The old teacher opened the window of the house yesterday.",
    "de": "Der alte Lehrer öffnete gestern das Fenster des Hauses.",
    "fr": "Le vieil instituteur a ouvert hier la fenêtre « bleue ».",
    "ru": "Старый учитель вчера открыл окно дома.",
    "el": "Ο παλιός δάσκαλος άνοιξε χθες το παράθυρο.",
    "ar": "فتح المعلم العجوز نافذة البيت أمس.",
    "hi": "बूढ़े शिक्षक ने कल घर की खिड़की खोली।",
    "zh": "老老师昨天打开了房子的窗户，对吗？",
    "th": "ครูเก่าเปิดหน้าต่างบ้านเมื่อวานนี้",
    "lo": "ຄູເກົ່າເປີດປ່ອງຢ້ຽມເຮືອນມື້ວານນີ້",
    "km": "គ្រូចាស់បានបើកបង្អួចផ្ទះកាលពីម្សិលមិញ",
    "my": "ဆရာအိုသည် မနေ့က အိမ်ပြတင်းပေါက်ကို ဖွင့်ခဲ့သည်။",
}
OTHERS = {
    "ja": "年老いた先生は昨日、家の窓を開けました。",
    "ko": "늙은 선생님이 어제 집의 창문을 열었다.",
    "odd": "½ ﬁ e\u0301 \u00a0 👩\u200d👧 12,345.67 € ，？：",
    "tags": "</s> <pad> <sep> <2de> <unk>",
}


# ----------------------------------------------------------------------------- own tokenizer


@pytest.mark.parametrize("language", [*SENTENCES, *OTHERS])
def test_text_of_any_script_comes_back_from_a_vocabulary_that_never_saw_it(language):
    text = (SENTENCES | OTHERS)[language]
    for seen in ("only plain English words", text):
        tokenizer = train_tokenizer([Example(seen, "<2de>", seen)] * 3, 400)
        data = encode(tokenizer, [Example(text, "<2de>", text)])
        assert tokenizer.token_to_id(UNK) not in data[0].target
        for row in (data[0].source, data[0].target):
            assert tokenizer.decode(row.tolist()) == text
        assert data[0].prompt.tolist() == [tokenizer.token_to_id("<2de>")]


def test_vowel_signs_are_part_of_their_word():
    """GPT-2's pattern splits at each combining mark: Hindi took twice, Burmese five times as many."""
    for text in ("की खिड़की खोली", "ครูเก่าเปิดหน้าต่าง", "အိမ်ပြတင်းပေါက်ကို"):
        example = Example(text, "<2de>", text)
        tokenizer = train_tokenizer([example] * 3, 2000)
        assert len(tokenizer.encode(text).ids) == len(
            text.split()
        )  # one token a word: it may merge


def test_a_tag_swallows_the_space_behind_it():
    """So "i" is one token in a question, as in the answer."""
    example = Example("a b c i", "<2hops> i", "i")
    tokenizer = train_tokenizer([example] * 3, 300)
    data = encode(tokenizer, [example])
    assert data[0].prompt.tolist() == [tokenizer.token_to_id("<2hops>"), data[0].target[0]]


# ----------------------------------------------------------------------------- lengths


def wordy_model(seed=5):
    """A float64 model of 12 tokens that ends some outputs early, some late, some never."""
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=12,
        width=32,
        heads=2,
        head_size=16,
        ff=64,
        encoder_layers=1,
        decoder_layers=2,
        dropout=0.0,
        tied=False,
    )
    model = EncoderDecoder(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5 * torch.randn_like(p)
        model.output.weight[1] *= 1.5  # </s>
    return model


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("spec", [None, WarmupSpec(3, (0, 1, 2, 3), 2)])
def test_the_same_y_alone_and_in_a_batch(beams, spec):
    """20 sources of 1 to 40 tokens, each alone and all at once."""
    model, rng = wordy_model(), np.random.default_rng(0)
    lengths = [1, 40, *rng.integers(1, 30, 18)]
    source = [rng.integers(4, 12, n).astype(np.int32) for n in lengths]
    five, one = np.array([5], dtype=np.int32), np.array([1], dtype=np.int32)
    data = [Example(ids, five, one) for ids in source]
    c, y = generate(model, collate(data), spec, 30, beams=beams)
    ends = set()
    for i in range(20):
        own_c, own = generate(model, collate([data[i]]), spec, 30, beams=beams)
        assert torch.equal(own[0], y[i]) and (spec is None or torch.equal(own_c[0], c[i]))
        ends.add(y[i].tolist().index(1) if 1 in y[i] else 30)
    assert len(ends) > 4 and 30 in ends and min(ends) < 20  # or nothing was tested


def test_no_length_depends_on_the_source(finished_run, tmp_path, capsys):
    """One word and forty: y has as many places, here and in eval.py --show."""
    folder = shutil.copytree(finished_run, tmp_path / "run")
    lengths, real = [], evaluation.generate

    def watched(model, batch, spec, length, **how):
        lengths.append(length)
        return real(model, batch, spec, length, **how)

    (tmp_path / "in").write_text("Hund\n" + "Hund " * 9 + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "generate", watched)
        assert evaluation.main([str(folder), "--input", str(tmp_path / "in")]) == 0
        assert evaluation.main([str(folder), "--show", "1"]) == 0
        assert evaluation.main([str(folder), "--show", "1", "--max-target-tokens", "7"]) == 0
    assert set(lengths) == {24, 7} and lengths[-1] == 7


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_a_target_of_three_hundred_tokens(beams):
    """Far beyond the first places of the cache: equal to decoding without a cache."""
    model = wordy_model(1)
    source, prefix = torch.tensor([[7, 8, 9], [10, 11, 0]]), torch.tensor([[0], [0]])

    with torch.no_grad():
        memory = model.encode(source)
        never = torch.tensor([0, 1])
        if beams == 1:
            tokens = sample_tokens(model, memory, prefix, 300, temperature=0, forbidden=never)
        else:
            tokens, sums = beam_search(
                model, memory, prefix, 300, beams=beams, forbidden=never, length_penalty=0.0
            )
        for k in range(tokens.size(1)):
            whole = torch.cat([prefix, tokens[:, k]], 1)
            logits = model.logits(model.decode(whole, memory)[:, :-1])
            logits[..., never] = -torch.inf
            if beams == 1:
                assert torch.equal(logits.argmax(-1), tokens[:, 0])
                continue
            picked = logits.log_softmax(-1).gather(-1, tokens[:, k, :, None]).sum((1, 2))
            torch.testing.assert_close(picked, sums[:, k], rtol=1e-9, atol=1e-7)


def test_the_table_says_how_many_outputs_ended_at_the_limit(
    finished_run, tmp_path, monkeypatch, capsys
):
    """Of five: by </s>, at the last place, cut, cut, by </s> at once."""
    folder = shutil.copytree(finished_run, tmp_path / "run")
    tokenizer = evaluation.load_tokenizer(folder / "tokenizer.json")
    rows = torch.tensor([[7, 1, 0], [7, 8, 1], [7, 8, 9], [9, 8, 7], [1, 0, 0]])

    def fake(model, batch, spec, length, **how):
        n = len(batch.source)
        c = None if spec is None else torch.full((n, 2), 7)
        return c, rows[torch.arange(n) % 5]

    monkeypatch.setattr(evaluation, "generate", fake)
    config = read_config(folder)
    examples = [Example(f"{i} Hunde", "<2en>", f"{i} dogs") for i in range(5)]
    config = replace(config, out=str(folder))
    run = SimpleNamespace(config=config, tokenizer=tokenizer, device=torch.device("cpu"))
    results, _ = evaluation.score_run(run, ["policy"], examples, "test")
    [row] = results["rows"]
    assert row["at_limit"] == 2
    evaluation.print_table(results, config, 5)
    assert "warmup: 2 of 5 outputs were cut at --max-target-tokens 24\n" in capsys.readouterr().out
    row["at_limit"] = 0
    evaluation.print_table(results, config, 5)
    assert "were cut" not in capsys.readouterr().out

    (tmp_path / "in").write_text("ein Hund\n" * 5, encoding="utf-8")
    assert evaluation.main([str(folder), "--input", str(tmp_path / "in")]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 5 and "note: 2 of 5 outputs were cut at --max-target-tokens 24" in err


def test_places_are_made_as_they_are_needed(monkeypatch):
    """A limit of 5,000 costs nothing where y ends after a few tokens. The cache begins with 64."""
    model, lengths = wordy_model(), []
    real = type(model.decoder).position_biases
    monkeypatch.setattr(
        type(model.decoder),
        "position_biases",
        lambda stack, length: lengths.append(length) or real(stack, length),
    )
    batch = Batch(
        torch.tensor([[7, 8], [9, 0]]), torch.tensor([[5], [5]]), torch.tensor([[1], [1]])
    )
    logits, at_once = model.logits, torch.zeros(12)
    at_once[1] = 1e3  # </s>
    monkeypatch.setattr(model, "logits", lambda hidden: logits(hidden) + at_once)
    for beams in (1, 3):
        _, y = generate(model, batch, None, 5000, beams=beams)
        assert y[:, 0].tolist() == [1, 1] and y.shape == (2, 5000)
    assert max(lengths) == 64


def test_half_a_character_at_the_limit_is_no_text():
    """A character of three bytes is up to three tokens. What ends by </s> is shown as it is."""
    tokenizer = train_tokenizer([Example("a", "", "b")] * 3, 300)
    ids = tokenizer.encode("a家", add_special_tokens=False).ids
    cut, whole = ids[:-1], [*ids[:-1], 1]
    assert evaluation.to_text(tokenizer, [ids, cut, whole]) == ["a家", "a", "a\ufffd"]
    bell = tokenizer.encode("a\ab\x1b[2Jc\r\nd\x7f", add_special_tokens=False).ids
    assert evaluation.to_text(tokenizer, [bell]) == ["a b [2Jc  d"]  # a terminal stays as it is


@pytest.mark.parametrize("limit, places", [(3, [4]), (300, [64, 130, 262, 301])])
def test_places_double_up_to_the_limit(limit, places, monkeypatch):
    """One more at a time would copy all that was read at every token."""
    model, seen, extend = wordy_model(), set(), Cache.extend

    def watched(cache, L):
        biases = extend(cache, L)
        seen.add(cache.places)
        return biases

    monkeypatch.setattr(Cache, "extend", watched)
    with torch.no_grad():
        memory = model.encode(torch.tensor([[7, 8]]))
        sample_tokens(model, memory, torch.tensor([[0]]), limit, forbidden=torch.tensor([0, 1]))
    assert sorted(seen) == places


def test_a_warmup_is_one_line(finished_run, tmp_path, monkeypatch, capsys):
    """It may hold any byte of the vocabulary, and eval.py prints one line for each that it read."""
    tokenizer = evaluation.load_tokenizer(finished_run / "tokenizer.json")
    ids = tokenizer.encode("a\nb\r\nc", add_special_tokens=False).ids
    written = torch.tensor([ids]), torch.tensor([[*ids, 1]])
    monkeypatch.setattr(evaluation, "generate", lambda *_, **how: written)
    (tmp_path / "in").write_text("Hund\n", encoding="utf-8")
    flags = ["--input", str(tmp_path / "in"), "--show-warmup"]
    assert evaluation.main([str(finished_run), *flags]) == 0
    assert capsys.readouterr().out == "a b c\ta b  c\n"


def test_translating_keeps_the_limit_of_a_batch(finished_run, tmp_path, monkeypatch):
    """y counts, too: 20 lines of a few tokens, two at a time, for 30 tokens may follow each."""
    rows, real = [], evaluation.generate
    monkeypatch.setattr(
        evaluation,
        "generate",
        lambda model, batch, *more, **how: (
            rows.append(len(batch.source)),
            real(model, batch, *more, **how),
        )[1],
    )
    (tmp_path / "in").write_text("Hund\n" * 20, encoding="utf-8")
    flags = ["--max-target-tokens", "30", "--batch-tokens", "75"]
    assert evaluation.main([str(finished_run), "--input", str(tmp_path / "in"), *flags]) == 0
    assert rows == [2] * 10


def test_an_output_is_one_line():
    """A byte-level vocabulary can spell line ends; a file of hypotheses has one line for each."""
    tokenizer = train_tokenizer([Example("a", "", "b")] * 3, 300)
    ids = tokenizer.encode("a\nb\r\nc\u2028d", add_special_tokens=False).ids
    assert evaluation.to_text(tokenizer, [ids, [*ids, 1, 0]]) == ["a b  c\u2028d"] * 2


# ----------------------------------------------------------------------------- the ceiling


def poor_tokenizer(tags=("<2en>",)) -> Tokenizer:
    """Lower-case letters without e, digits and the space are tokens. All else is <unk>."""
    specials = [PAD, EOS, UNK, SEP, *tags]
    vocab = {
        token: i for i, token in enumerate([*specials, "▁", *"abcdfghijklmnopqrstuvwxyz01234"])
    }
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(specials)
    return tokenizer


POOR = [
    Example("ein hund", "<2en>", "a dog barks loudly"),
    Example("zwei", "<2en>", "two cats do not"),
    Example("drei", "<2en>", "three mice see me é"),
    Example("vier", "<2en>", "it is cold today"),
]


def test_the_ceiling_of_a_poor_vocabulary():
    """By hand: what is written lacks each e and the é."""
    config = Config()
    texts = ["a dog barks loudly", "two cats do not", "thr mic s m", "it is cold today"]
    scores = evaluation.ceiling(poor_tokenizer(), POOR, config)
    metrics = evaluation.translation_metrics(config, POOR)
    references = [[example.target for example in POOR]]
    for name, metric in metrics.items():
        assert scores[name] == pytest.approx(metric.corpus_score(texts, references).score, abs=1e-4)
    said = evaluation.what_is_lost(poor_tokenizer(), POOR, config)
    assert "cannot write 25.0 % of the targets" in said
    assert (
        f"perfect model would score BLEU {scores['BLEU']:.2f}, chrF++ {scores['chrF++']:.2f}"
        in said
    )
    letters = sum(len(example.target) + 1 for example in POOR)  # </s> is a token, too
    assert f"{100 * 7 / letters:.1f} % of target tokens" in said  # eeeeee and é
    sources = sum(len(example.source) for example in POOR)
    assert f"<unk> is {100 * 4 / sources:.1f} % of source tokens" in said
    assert said.endswith("Most often lost: 'e' 'é'. Another --init may do better")


def test_the_limit_is_part_of_the_ceiling():
    """A perfect model cannot write more, either. That is no fault of the tokenizer."""
    config = Config(max_target_tokens=6)
    examples = [Example("x", "<2en>", "a dog"), Example("x", "<2en>", "a cat runs")]
    metrics = evaluation.translation_metrics(config, examples)
    scores = evaluation.ceiling(poor_tokenizer(), examples, config)
    wanted = metrics["BLEU"].corpus_score(["a dog", "a cat"], [["a dog", "a cat runs"]]).score
    assert scores["BLEU"] == pytest.approx(wanted, abs=1e-4) and wanted < 90
    whole = evaluation.ceiling(poor_tokenizer(), examples[:1], replace(config, max_target_tokens=5))
    assert whole["chrF++"] == 100.0  # "a dog" has 5 tokens
    assert evaluation.what_is_lost(poor_tokenizer(), examples, config) == ""


def test_spaces_of_another_kind_are_no_loss():
    """T5's tokenizer makes plain spaces of them, and no metric looks."""
    examples = [Example("x", "<2en>", "a\u00a0dog"), Example("x", "<2en>", "a  cat\u2009runs")]
    tokenizer = poor_tokenizer()
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    assert evaluation.what_is_lost(tokenizer, examples, Config()) == ""
    mixed = [*examples, Example("x", "<2en>", "the cat")]
    said = evaluation.what_is_lost(tokenizer, mixed, Config())
    assert "33.3 % of the targets" in said and "Most often lost: 'e'." in said


def test_a_lost_character_that_cannot_be_seen_is_named_by_its_number():
    examples = [Example("x", "<2en>", "a\u200dcat"), Example("x", "<2en>", "a dog")]
    said = evaluation.what_is_lost(poor_tokenizer(), examples, Config())
    assert r"Most often lost: '\u200d'." in said


@pytest.mark.parametrize("splits", [("train", "valid"), ("train", "valid", "test")])
def test_what_is_lost_is_looked_for_in_the_split_of_the_table(splits, tmp_path, monkeypatch):
    for split in splits:
        for language in ("de", "en"):
            (tmp_path / f"{split}.{language}").write_text(f"{split}\n" * 3, encoding="utf-8")
    seen = []
    monkeypatch.setattr(
        train, "what_is_lost", lambda tokenizer, examples, config: (seen.extend(examples), "")[1]
    )
    config, _ = train.parse([*TINY, "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    train.prepare(config, False)
    assert [example.target for example in seen] == [splits[-1]] * 3


def test_a_source_that_cannot_be_read_is_announced():
    good = Example("ein", "<2en>", "a dog")
    fine = [Example("hund", "<2en>", "a cat")] * 60
    said = evaluation.what_is_lost(
        poor_tokenizer(), [Example("Эй", "<2en>", "a cat"), *fine[:9]], Config()
    )
    assert said.startswith(
        "this tokenizer cannot read all sources: <unk> is 5.3 % of source tokens"
    )
    assert evaluation.what_is_lost(poor_tokenizer(), [good, *fine], Config()) == ""  # 0.4 %


def test_nothing_is_said_where_nothing_is_lost():
    examples = [Example(text, "<2en>", text) for text in (SENTENCES | OTHERS).values()]
    tokenizer = train_tokenizer(examples[:1], 300)
    config = Config(max_target_tokens=1000)
    assert evaluation.what_is_lost(tokenizer, examples, config) == ""
    assert evaluation.ceiling(tokenizer, examples, config) == {"BLEU": 100.0, "chrF++": 100.0}


def test_a_poor_vocabulary_is_announced_before_training_and_stands_in_the_table(
    tmp_path, monkeypatch, capsys
):
    real = train.train_tokenizer
    monkeypatch.setattr(train, "train_tokenizer", lambda examples, size: poor_tokenizer())
    said = []
    monkeypatch.setattr(train, "train", lambda run: said.append(capsys.readouterr().out))
    monkeypatch.setattr(train, "report", lambda *_: None)
    flags = [
        "--task",
        "wmt",
        *TINY,
        "--max-source-tokens",
        "200",
        "--max-target-tokens",
        "125",
        "--built-in-size",
        "16",
        "--policy-steps",
        "0",
        "--beams",
        "1",
    ]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    [line] = [line for line in said[0].splitlines() if "perfect model" in line]
    assert line.startswith("data: this tokenizer cannot write 100.0 % of the targets: ")
    monkeypatch.undo()
    assert real is train.train_tokenizer
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert 0 < results["ceiling"]["BLEU"] < 60
    row = f"\nceiling +{results['ceiling']['BLEU']:.2f} +{results['ceiling']['chrF++']:.2f}\n"
    assert re.search(row, out)
    assert evaluation.main([str(tmp_path / "run")]) == 0
    assert re.search(row, capsys.readouterr().out)


# ----------------------------------------------------------------------------- scores


def scores_of(config, examples, texts):
    return evaluation.compute_metrics(config, examples, map(evaluation.Output, texts))


@pytest.mark.parametrize("language", SENTENCES)
def test_identical_text_scores_100(language):
    text = SENTENCES[language]
    examples = [Example("x", f"<2{language}>", text)] * 3
    config = Config(pair=f"xx-{language}")
    scores = scores_of(config, examples, [text] * 3)
    assert scores == {"BLEU": 100.0, "chrF++": 100.0}
    config = Config(task="xsum")
    scores = scores_of(config, examples, [text] * 3)
    assert scores == {"ROUGE-1": 100.0, "ROUGE-2": 100.0, "ROUGE-L": 100.0}


@pytest.mark.parametrize("pair", ["en-zh", "en-cn", "src-tgt", "zh-en"])
@pytest.mark.parametrize("language", [*SENTENCES, "ja", "ko"])
def test_bleu_has_the_tokenizer_of_the_references_script(language, pair):
    """Whatever --pair says. A few foreign words change nothing."""
    wanted = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}
    wanted |= dict.fromkeys(["th", "lo", "km", "my"], "char")
    own = (SENTENCES | OTHERS)[language]
    for extra in ("", "東京 の", " IBM"):
        examples = [Example("x", "", own)] * 20 + [Example("x", "", extra)]
        assert evaluation.bleu_tokenizer(examples) == wanted.get(language, "13a")
    if language not in ("ja", "ko"):
        signature = evaluation.signatures(Config(pair=pair), examples)["BLEU"]
        assert f"|tok:{wanted.get(language, '13a')}|" in signature


@pytest.mark.parametrize("language", ["ja", "ko"])
def test_japanese_and_korean_need_a_package_of_sacrebleu(language):
    try:
        examples = [Example("x", "", OTHERS[language])]
        metric = evaluation.translation_metrics(Config(), examples)["BLEU"]
        assert metric.corpus_score([OTHERS[language]], [[OTHERS[language]]]).score > 99
    except evaluation.UserError as error:
        assert "pip install" in str(error)


@pytest.mark.parametrize("language", ["th", "zh", "hi", "ru"])
def test_a_wrong_summary_scores_less(language):
    """Half of it: some of ROUGE, but not all; another text: next to nothing."""
    text, config = SENTENCES[language], Config(task="xsum")
    half, other = text[: len(text) // 2], OTHERS["ko"]
    examples = [Example("x", "", text)]
    some = scores_of(config, examples, [half])["ROUGE-1"]
    none = scores_of(config, examples, [other])["ROUGE-1"]
    assert 30 < some < 90 and none < 10


def test_rouge_of_english_is_that_of_rouge_score():
    """Its own tokenizer and stemmer for words of a-z and 0-9, so English scores as everywhere."""
    config = Config(task="xsum")
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    pairs = [
        (
            "Three people weren't hurt in a fire_drill in Leeds.",
            "Two persons hurt by fires in Leeds",
        ),
        ("The 12-year-old U.S. runners' times improved", "12 year old US runner was improving"),
    ]
    for target, written in pairs:
        scores = scores_of(config, [Example("x", "", target)], [written])
        for name, key in (("ROUGE-1", "rouge1"), ("ROUGE-2", "rouge2"), ("ROUGE-L", "rougeL")):
            wanted = 100 * theirs.score(target, written)[key].fmeasure
            assert scores[name] == pytest.approx(wanted, abs=1e-4)
        words = evaluation.AnyScript(use_stemmer=True).tokenize(target)
        assert words == DefaultTokenizer(use_stemmer=True).tokenize(target)


def test_one_summary_in_another_script_counts():
    """A review: 98 English summaries and 2 short Chinese ones scored 74 against themselves."""
    config = Config(task="xsum")
    targets = ["Three people were hurt in a fire in Leeds."] * 98 + ["好。"] * 2
    examples = [Example("x", "", target) for target in targets]
    scores = scores_of(config, examples, targets)
    assert scores["ROUGE-1"] == 100


def test_the_printed_signature_names_the_words_of_rouge(capsys):
    config = Config(task="xsum")
    row = dict(
        stage="sft",
        name="sft",
        metrics={"ROUGE-1": 1.0},
        nll=1.0,
        updates=1,
        flops=1,
        seconds=1.0,
        at_limit=0,
    )
    evaluation.print_table(
        dict(split="test", rows=[row], ceiling={}, signature=evaluation.signatures(config, [])),
        config,
        1,
    )
    out = capsys.readouterr().out
    assert re.search(r"ROUGE: rouge-score [\d.]+, words of any script, characters where", out)


def test_words_of_any_script_by_hand():
    words = evaluation.AnyScript(use_stemmer=True).tokenize
    assert words("Größe, e\u0301té-2024!") == ["größe", "e\u0301té", "2024"]
    assert words("हिन्दी में") == ["हिन्दी", "में"]  # vowel signs are part of a word
    assert words("他说 OK，对吗？") == ["他", "说", "ok", "对", "吗"]
    assert words("ไทย 12") == ["ไ", "ท", "ย", "12"]
    assert words("한국어 텍스트") == ["한국어", "텍스트"]
    # hiragana, katakana, its extension; Han: extension A, compatibility, beyond 16 bits
    # Lao, Tibetan, Burmese, Khmer, extended Burmese
    for text in (
        "\u3042\u30ab\u31f0",
        "\u3400\u4e00\uf900\U00020bb7\U00030000",
        "\u0e81\u0f40\u1000\u1780\uaa60\ua9e0",
        "\u3007\u3007\u3105\uff76\uff85",
    ):
        assert words(text) == list(text)
