"""Order, stages and splits, seen from outside: which text stands beside which source and stage.

The other tests' tiny runs write the same forty dots for every source in every stage. In the run
here each output tells who wrote it for which source: decoding and validation are stand-ins, and all
between them and what the user reads is real. Each stage is best before its end.

Each of these was planted once to see a test fail:
    outputs in the order of decoding                  test_every_line_of_a_file_…, and 5 more
    outputs, warmups or weights of another stage      test_every_line_of_a_file_is_of_its_stage_…
    --input answered by SFT                           test_every_line_of_an_answer_…
    a row's metrics, NLL, cost or cut outputs from
    another stage; NLL on references that are cut     test_every_row_has_the_numbers_of_…
    the table: metrics, NLL or cost of the first row  test_every_line_of_the_table_…
    the page of --show by the first stage's weights,
    or of the example before                          test_every_shown_line_is_of_its_stage_…
    policy or control from SFT's last weights; the
    control from the policy stage's best              test_a_later_stage_begins_at_the_best_…
    the last weights kept, not the best               test_each_stage_keeps_its_best_…, and 6 more
    AdamW, or its moments, kept from stage to stage   test_each_stage_has_an_optimizer_of_its_own
    training on the validation data, in any stage     test_every_update_trains_on_training_data
    validation on the training data                   test_every_validation_reads_the_whole_…
    long targets left out of validation               test_every_validation_…, test_what_vali…
    a ceiling without --max-target-tokens             test_the_limit_of_the_output_…
    BLEU, or chrF++, in lower case                    test_case_counts
    default_rng(seed + epoch)                         test_no_two_seeds_share_an_epoch
    --dropout ignored with --init                     test_dropout_of_a_pretrained_model_…
    SIGTERM ends the program                          test_sigterm_saves_and_says_how_to_go_on
    no timeout of twelve hours                        test_processes_wait_for_each_other_…
    a download written under its final name; one side
    of a split renamed before the other is written    test_a_full_disk_leaves_no_half_file
"""

import json
import re
import shutil
import signal
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from gzip import compress
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import data as datasets
import eval as evaluation
import model as transformer
import train
from conftest import TINY
from data import SPLITS, Batches, Config, Example, collate, load, read_config, train_tokenizer
from warmup import sft_loss

STAGES = ("sft", "policy", "control")
# NLL of each stage's three validations. The second is the best. The later stages' first is that of
# their start. In SFT nothing is validated before the first update
NLL = {"sft": (3.0, 1.0, 2.0), "policy": (1.5, 0.5, 0.7), "control": (1.25, 0.75, 0.875)}
EVERY = {"sft": 5, "policy": 11, "control": 7}  # each fifth word of SFT's outputs is wrong, …
CUT = {"sft": 2, "policy": 9, "control": 3}  # each second output of SFT was cut, …
SHORT = 30  # --max-target-tokens: some targets are longer
FLAGS = [
    *TINY,
    "--built-in-size=80",
    "--vocab-size=460",  # so that some texts are long
    "--sft-steps=6",
    "--policy-steps=4",
    f"--max-target-tokens={SHORT}",
    "--max-source-tokens=60",  # none is longer
    "--batch-tokens=600",
    "--eval-decode=20",
]


def written(maker, reference):
    """What the weights of this maker, (stage, number of a validation), write for a source."""
    stage, number = maker
    words = reference.split()
    for i in range(0, len(words), EVERY[stage]):
        words[i] = f"{stage}{number}"
    return " ".join(words)


def warmup(source):
    return f"c of {source.split()[0]}"


def ended(stage, source):
    """Whether the output ended by itself: as the source's length has it, so counts differ."""
    return len(source) % CUT[stage] > 0


def bleu(texts, references):
    """BLEU and chrF++, as the table rounds them."""
    metrics = {"BLEU": BLEU(), "chrF++": CHRF(word_order=2)}
    return {
        name: round(metric.corpus_score(texts, [references]).score, 4)
        for name, metric in metrics.items()
    }


class Eyes:
    """A run and all that was seen of it. Weights are known by their embedding."""

    def __init__(self, folder):
        self.folder = folder
        self.truth = {}  # source -> reference, of all splits
        self.makers = {}  # embedding -> (stage, number of the validation that saw it first)
        self.weights = {}  # (stage, number of a validation) -> all weights
        self.validated = []  # (stage, maker of the weights, [(source, target)])
        self.scored = []  # (stage, [(source, target)]) of the checkpoints that are scored
        self.updates = []  # (stage, weights before its first, steps in AdamW's moments, pairs)
        self.printed = ""  # by train.py

    @contextmanager
    def worn(self):
        """Within, what decodes and validates is a stand-in, and updates are watched."""
        with pytest.MonkeyPatch.context() as patch:
            self.loss = train.batch_loss
            patch.setattr(train, "validate", self.validate)
            patch.setattr(train, "batch_loss", self.batch_loss)
            patch.setattr(evaluation, "validate", self.score)
            patch.setattr(evaluation, "decode_batch", self.decode_batch)
            yield

    def main(self, program, *argv):
        """What the program prints."""
        out = TextIOWrapper(BytesIO(), encoding="utf-8")
        with self.worn(), redirect_stdout(out):
            assert program.main([*map(str, argv)]) == 0
        return out.buffer.getvalue().decode()

    def maker(self, model):
        return self.makers[fingerprint(model)]

    def validate(self, run, data):
        stage = run.state.stage
        number = sum(stage == other for other, *_ in self.validated)
        self.makers.setdefault(fingerprint(run.model), (stage, number))
        self.weights[stage, number] = copied(run.model)
        self.validated.append((stage, self.maker(run.model), pairs(run, data)))
        return {"nll": NLL[stage][number]}

    def score(self, run, data):
        stage, number = self.maker(run.model)
        self.scored.append((stage, pairs(run, data)))
        return {"nll": NLL[stage][number]}

    def batch_loss(self, run, batch):
        before = copied(run.model) if run.state.step == 0 else {}
        moments = run.optimizer.state_dict()["state"]
        steps = {int(moment["step"]) for moment in moments.values()}
        self.updates.append((run.state.stage, before, steps, pairs(run, zip(*batch))))
        return self.loss(run, batch)

    def decode_batch(self, run, batch, c=None):
        stage, number = self.maker(run.model)
        outputs = []
        for source in texts(run, batch.source):
            text = written((stage, number), self.truth[source])
            before = warmup(source) if run.spec else ""
            outputs.append(evaluation.Output(text, before, ended(stage, source)))
        return outputs

    def split(self, name):
        return load(read_config(self.folder))[0][name]

    def valid_lines(self):
        lines = (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [line for line in map(json.loads, lines) if line["kind"] == "valid"]

    def rows(self):
        return json.loads((self.folder / "results.json").read_text(encoding="utf-8"))["rows"]


def fingerprint(model):
    return model.embedding.weight.detach().cpu().numpy().tobytes()


def copied(model):
    return {name: weights.cpu().clone() for name, weights in model.state_dict().items()}


def texts(run, rows):
    """Rows of token ids as texts."""
    return run.tokenizer.decode_batch([row.tolist() for row in rows], skip_special_tokens=True)


def pairs(run, data):
    """Examples as token ids -> [(source, target)], as texts."""
    sources, _, targets = zip(*data)
    return [*zip(texts(run, sources), texts(run, targets))]


def pairs_of(examples):
    return [(example.source, example.target) for example in examples]


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    """A run of three stages whose outputs differ by source and by weights. Do not change it."""
    eyes = Eyes(tmp_path_factory.mktemp("eyes") / "run")
    config, _ = train.parse([*FLAGS, "--out", str(eyes.folder)])
    splits, _ = load(config)
    for examples in splits.values():
        eyes.truth |= pairs_of(examples)
    assert len(eyes.truth) == sum(map(len, splits.values()))
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    eyes.printed = eyes.main(train, *FLAGS, "--out", eyes.folder)
    for number, handler in handlers:
        signal.signal(number, handler)
    return eyes


# ----------------------------------------------------------------------------- order and stages


def test_every_line_of_a_file_is_of_its_stage_and_of_its_source(eyes):
    """`eval.py RUN`: each test.STAGE.txt in the order of the data, by the stage's best weights."""
    out = eyes.main(evaluation, eyes.folder)
    examples = eyes.split("test")
    lengths = [len(example.source) for example in examples]
    assert lengths != sorted(lengths, reverse=True)  # nor in the order of decoding
    wanted = {"ref": [example.target for example in examples]}
    for stage in STAGES:
        wanted[stage] = [written((stage, 1), example.target) for example in examples]
    wanted["policy.warmups"] = [warmup(example.source) for example in examples]
    for name, lines in wanted.items():
        path = eyes.folder / f"test.{name}.txt"
        assert path.read_text(encoding="utf-8").split("\n") == [*lines, ""], name
        assert f"wrote {path}\n" in out
    assert {path.name for path in eyes.folder.glob("*.txt")} == {
        f"test.{name}.txt" for name in wanted
    }


@pytest.mark.parametrize("stage", STAGES)
def test_every_line_of_an_answer_is_of_its_source(stage, eyes, tmp_path):
    """`--input`: an empty line stays one, and what follows it does not move up."""
    examples = eyes.split("valid")
    lines, wanted = [], []
    for i, example in enumerate(examples):
        text = written((stage, 1), example.target)
        if stage == "policy":
            text = f"{warmup(example.source)}\t{text}"
        lines += [example.source, ""] if i % 5 == 2 else [example.source]
        wanted += [text, "\t" if stage == "policy" else ""] if i % 5 == 2 else [text]
    (tmp_path / "in").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    flags = ["--input", tmp_path / "in", "--show-warmup", "--stage", stage]
    assert eyes.main(evaluation, eyes.folder, *flags).splitlines() == wanted


def test_every_row_has_the_numbers_of_its_own_stage(eyes):
    """results.json: metrics, NLL, cost and what was cut. No two rows share a number."""
    rows, examples = eyes.rows(), eyes.split("test")
    config, references = read_config(eyes.folder), [example.target for example in examples]
    updates = {stage: sum(stage == other for other, *_ in eyes.updates) for stage in STAGES}
    assert [row["stage"] for row in rows] == [*STAGES]
    for row in rows:
        stage = row["stage"]
        lines = [written((stage, 1), reference) for reference in references]
        assert row["metrics"] == bleu(lines, references)
        assert row["nll"] == NLL[stage][1]
        assert row["at_limit"] == sum(not ended(stage, example.source) for example in examples)
        assert row["updates"] == updates["sft"] + updates[stage] * (stage != "sft")
        assert row["name"] == evaluation.row_name(stage, config)
    for numbers in zip(*([*row["metrics"].values(), row["nll"], row["at_limit"]] for row in rows)):
        assert len({*numbers}) == 3
    assert eyes.scored[:3] == [(stage, pairs_of(examples)) for stage in STAGES]  # whole references


def test_every_line_of_the_table_has_the_numbers_of_its_own_row(eyes, capsys):
    """What train.py prints, against results.json. And with costs so different that it shows."""
    results = json.loads((eyes.folder / "results.json").read_text(encoding="utf-8"))
    costs = [(901, 123e12, 51.0), (1702, 345e12, 82.0), (2603, 567e12, 93.0)]
    names = ("updates", "flops", "seconds")
    dear = [row | dict(zip(names, cost)) for row, cost in zip(results["rows"], costs)]
    evaluation.print_table(results | {"rows": dear}, read_config(eyes.folder), 20)
    for page, rows in ((eyes.printed, results["rows"]), (capsys.readouterr().out, dear)):
        table = page.split("test split, 20 examples\n")[1].split("\nsource")[0]
        row_of = {row["name"]: row for row in rows}
        shown = [line for line in table.splitlines() if line[:20].strip() in row_of]
        assert [line[:20].strip() for line in shown] == ["sft", "sft, same compute", "warmup"]
        for line in shown:
            row = row_of[line[:20].strip()]
            scores = [f"{score:.2f}" for score in row["metrics"].values()]
            cost = [f"{row['updates']}", f"{row['flops'] / 1e12:,.2f}", f"{row['seconds']:.0f}"]
            assert line[20:].split() == [*scores, f"{row['nll']:.3f}", *cost]
            assert f"\n{row['name']}: {row['at_limit']} of 20 outputs were cut at" in table


def test_every_shown_line_is_of_its_stage_and_of_its_source(eyes):
    """Below train.py's table, and with --show: each example, and what each stage writes for it."""
    examples = eyes.split("test")
    shown = eyes.main(evaluation, eyes.folder, "--show", 5).split("\nsource ")[1:]
    below = eyes.printed.split("\n\nsaved ")[0].split("\nsource ")[1:]
    assert len(shown) == 5 and len(below) == 3
    for page, example in [*zip(shown, examples), *zip(below, examples)]:
        sft, policy, control = (written((stage, 1), example.target) for stage in STAGES)
        answer = f"{warmup(example.source)} -> {policy}"
        first, *lines = page.splitlines()
        assert first.strip() == example.source
        assert lines[:5] == [
            f"{'prompt':20}{example.prompt}",
            f"{'reference':20}{example.target}",
            f"{'sft':20}{sft}",
            f"{'sft, same compute':20}{control}",
            f"{'warmup':20}{answer}",
        ]
        title, *drawn = lines[5:]
        assert title.startswith("drawn ") and drawn
        assert all(line.endswith(f"  {answer}") for line in drawn)


def test_a_finished_run_reports_the_same_again(eyes):
    """--resume: the same page and the same results.json, without an update."""
    before, updates = (eyes.folder / "results.json").read_bytes(), len(eyes.updates)
    again = eyes.main(train, "--resume", eyes.folder)
    assert (eyes.folder / "results.json").read_bytes() == before and len(eyes.updates) == updates
    start = eyes.printed.index("\nwmt de-en, test split")
    assert again.endswith(eyes.printed[start:])


# ------------------------------------------------------------------------- the beginning of a stage


@pytest.mark.parametrize("stage", ["policy", "control"])
def test_a_later_stage_begins_at_the_best_sft_weights(stage, eyes):
    """At sft.pt, of the second of three validations: not where SFT ended, nor another stage."""
    best = transformer.load_checkpoint(eyes.folder / "sft.pt")["model"]
    begun = [
        eyes.weights[stage, 0],
        *(before for s, before, *_ in eyes.updates if s == stage and before),
    ]
    assert len(begun) == 2  # at the first validation, and at the first update
    for start in begun:
        assert start.keys() == best.keys()
        assert all(torch.equal(start[name], best[name]) for name in best)
    for other in (eyes.weights["sft", 0], eyes.weights["sft", 2], eyes.weights["policy", 2]):
        assert not torch.equal(other["embedding.weight"], best["embedding.weight"])


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_keeps_its_best_weights(stage, eyes):
    kept = transformer.load_checkpoint(eyes.folder / f"{stage}.pt")["model"]
    same = [
        all(torch.equal(kept[name], eyes.weights[stage, number][name]) for name in kept)
        for number in range(3)
    ]
    assert same == [False, True, False]


def test_each_stage_has_an_optimizer_of_its_own(eyes):
    """AdamW's moments are those of the stage's own updates: as many as it has done."""
    for stage in STAGES:
        seen = [steps for other, _, steps, _ in eyes.updates if other == stage]
        assert len(seen) > 1 and seen == [{n} if n else set() for n in range(len(seen))]


# ----------------------------------------------------------------------------- splits


def test_every_update_trains_on_training_data(eyes):
    """By content: in SFT on each pair whose target is not too long, in later stages on no other."""
    tokenizer = datasets.load_tokenizer(eyes.folder / "tokenizer.json")
    short = {
        (source, target)
        for source, target in pairs_of(eyes.split("train"))
        if len(tokenizer.encode(target, add_special_tokens=False).ids) < SHORT
    }
    assert 40 < len(short) < 70
    seen = {stage: set() for stage in STAGES}
    for stage, _, _, batch in eyes.updates:
        seen[stage] |= {*batch}
    assert seen["sft"] == short  # an epoch and more
    assert seen["policy"] and seen["policy"] <= short
    assert seen["control"] and seen["control"] <= short


def test_every_validation_reads_the_whole_validation_data(eyes):
    """By content: no long target is left out or cut."""
    wanted = pairs_of(eyes.split("valid"))
    assert [stage for stage, *_ in eyes.validated] == [stage for stage in STAGES for _ in range(3)]
    for _, _, data in eyes.validated:
        assert data == wanted
    assert not {*wanted} & {*pairs_of(eyes.split("train"))}


def test_what_validation_decodes_is_scored_against_its_own_references(eyes):
    """--eval-decode: the logged BLEU is that of these weights' outputs, long targets included."""
    examples = eyes.split("valid")
    tokenizer = datasets.load_tokenizer(eyes.folder / "tokenizer.json")
    sizes = [len(tokenizer.encode(e.target, add_special_tokens=False).ids) for e in examples]
    assert sum(size >= SHORT for size in sizes[:10]) > 0  # what stands behind them would move up
    references = [example.target for example in examples]
    lines = eyes.valid_lines()
    assert len(lines) == 9
    for line, (stage, maker, _) in zip(lines, eyes.validated):
        assert line["stage"] == stage and maker[0] in (stage, "sft")
        scores = bleu([written(maker, reference) for reference in references], references)
        assert {name: line[name] for name in scores} == scores


# ----------------------------------------------------------------------------- scores

LONG = [
    Example("x", "<2en>", "the old dog sees a small cat in the garden of the house today"),
    Example("y", "<2en>", "two of the cats do not look for the dog because it rains"),
    Example("z", "<2en>", "a short one"),
]


def test_the_limit_of_the_output_lowers_the_ceiling(eyes):
    """By hand: each text up to the limit, in tokens. BLEU has 4-grams to count, so it moves."""
    tokenizer = train_tokenizer(LONG, 2000)  # every word is a token
    references = [example.target for example in LONG]
    seen = []
    for most in (5, 9, 40):
        texts = [" ".join(reference.split()[:most]) for reference in references]
        scores = evaluation.ceiling(tokenizer, LONG, Config(max_target_tokens=most))
        assert scores == bleu(texts, references)
        seen.append(scores["BLEU"])
    assert 5 < seen[0] < seen[1] - 10 and seen[1] < 90 and seen[2] == 100

    results = json.loads((eyes.folder / "results.json").read_text(encoding="utf-8"))
    limited = results["ceiling"]
    assert 50 < limited["BLEU"] < 99.5
    out = eyes.main(evaluation, eyes.folder, "--max-target-tokens", 100)
    for printed, best in ((eyes.printed, limited), (out, dict.fromkeys(limited, 100.0))):
        [line] = re.findall(r"\nceiling +(.*)", printed)
        assert line.split() == [f"{score:.2f}" for score in best.values()]


def test_case_counts(eyes):
    """Case alone costs BLEU and chrF++. The printed signatures say so."""
    references = [example.target for example in LONG]
    small = [evaluation.Output(text) for text in references]
    large = [example._replace(target=example.target.capitalize()) for example in LONG]
    assert evaluation.compute_metrics(Config(), LONG, small) == {"BLEU": 100, "chrF++": 100}
    scores = evaluation.compute_metrics(Config(), large, small)
    assert scores == bleu(references, [example.target for example in large])
    assert 50 < scores["BLEU"] < 95 and 50 < scores["chrF++"] < 95
    signatures = re.findall(r"\n(BLEU|chrF\+\+): (.*)", eyes.printed)
    assert [name for name, _ in signatures] == ["BLEU", "chrF++"]
    assert all("|case:mixed|" in said for _, said in signatures)


# ----------------------------------------------------------------------------- batches, dropout


def test_no_two_seeds_share_an_epoch():
    """Of five seeds the first five epochs: 25 orders."""
    config = Config(built_in_size=40)
    examples = load(config)[0]["train"]
    data = datasets.encode(train_tokenizer(examples, 500), examples)
    seen = {}
    for seed in range(5):
        batches = Batches(data, 200, seed)
        for epoch in range(5):
            batches.seek(epoch, 0)
            seen[str([*map(list, batches.order)])] = seed, epoch
    assert len(seen) == 25


def small_t5(folder):
    """A T5 whose words are letters, with a dropout of 0.1 in its config.json."""
    shutil.copytree(Path(__file__).parent / "golden" / "t5", folder)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dropout_rate"] == 0.1
    special = ["<pad>", "</s>", "<unk>", "<extra_id_1>", "<extra_id_0>"]
    pieces = [*special, "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram([(piece, -5.0) for piece in pieces], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dropout_of_a_pretrained_model_is_that_of_the_flag(dropout, tmp_path):
    """Not that of its config.json, 0.1. Also after --resume."""
    flags = ["--init", str(small_t5(tmp_path / "t5")), "--dropout", str(dropout)]
    more = [
        "--built-in-size=8",
        "--max-source-tokens=200",
        "--device=cpu",
        "--out",
        str(tmp_path / "run"),
    ]
    config, _ = train.parse([*flags, *more])
    for resume in (False, True):
        run = train.prepare(config, resume)
        assert run.model.config.dropout == dropout
        batch = collate(run.data["train"][:4])
        losses = []
        for training in (False, True, True):
            run.model.train(training)
            losses.append(sft_loss(run.model, batch).item())
        assert len({*losses}) == (3 if dropout else 1)


# ------------------------------------------------------------------------- SIGTERM, processes, disk


def test_sigterm_saves_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    """A cluster's way to stop a job: as Ctrl-C, after the update."""
    log, folder = train.log, tmp_path / "run"

    def terminating(run, kind, numbers):
        log(run, kind, numbers)
        if run.state.step == 2:
            signal.raise_signal(signal.SIGTERM)

    def unheard(*_):  # else this process would end
        pytest.fail("train.py did not take SIGTERM")

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(train, "log", terminating)
    try:
        signal.signal(signal.SIGTERM, unheard)
        code = train.main([*TINY, "--built-in-size=40", "--eval-every=9", "--out", str(folder)])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    *_, last = capsys.readouterr().err.splitlines()
    assert code == 1
    assert last == f"stopped; go on with: {evaluation.resume_command(folder)}"
    state = transformer.load_checkpoint(folder / "last.pt", "state")["state"]
    assert (state["stage"], state["step"]) == ("sft", 2)


@pytest.mark.parametrize("gpu, backend", [(False, "gloo"), (True, "cpu:gloo,cuda:nccl")])
def test_processes_wait_for_each_other_for_twelve_hours(gpu, backend, monkeypatch):
    """While rank 0 validates and decodes. By itself NCCL gives up after ten minutes."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(train.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(
        train.dist, "init_process_group", lambda *words, **how: seen.append((words, how))
    )
    train.join_processes()
    assert seen == [((backend,), {"timeout": timedelta(hours=12)})]


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch, capsys):
    """Written in part: no file has its name, and the next download is whole."""
    resource = pytest.importorskip("resource", reason="limits the size of a file, as a full disk")
    sizes = {"train": 900, "val": 3, "test_2016_flickr": 3}
    lines = {
        f"{split}.{lang}.gz": "".join(f"{split} line {n}{more}\n" for n in range(size))
        for split, size in sizes.items()
        for lang, more in (
            ("de", ""),
            ("en", 80 * " en"),
        )  # a side that fits, and one that does not
    }

    def arrive(url, path, **how):
        Path(path).write_bytes(compress(lines[url.rsplit("/", 1)[1]].encode()))

    monkeypatch.setattr(torch.hub, "download_url_to_file", arrive)
    folder, most = tmp_path / "data", 100_000
    assert all(len(compress(text.encode())) < most for text in lines.values())
    command = ["multi30k", "--out", str(folder)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        code = datasets.main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and "error: " in capsys.readouterr().err
    written = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert most in written.values()  # it did begin
    assert not {f"{split}.{lang}" for split in SPLITS for lang in ("de", "en")} & {*written}
    assert datasets.main(command) == 0
    ours = dict(zip(SPLITS, sizes))
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == {
        f"{name}.{lang}": lines[f"{split}.{lang}.gz"]
        for name, split in ours.items()
        for lang in ("de", "en")
    }
