"""What a user sees: `eval.py --show` and `--plot`, and the progress bars.

Each of these was planted once to see a test fail:
    a and b exchanged; alpha left out; log P(c|x) and R exchanged      test_show_prints_…
    y written after the greedy warmup, or for another source           test_show_prints_…
    samples shown for a constant warmup                                test_nothing_is_sampled_…
    control drawn from 0 FLOPs, not from SFT's; a train value missing  test_plot_draws_…
    the bar begins at 0 after --resume                                 test_a_resumed_run_…
    a bar with the numbers of another stage                            test_each_stage_has_a_bar_…
"""

import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import data
import eval as evaluation
import train
from conftest import TINY
from data import load_tokenizer
from model import load_model


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the finished run: three stages, K = 2, W = 2."""
    return shutil.copytree(finished_run, tmp_path / "run")


def change(run, **settings):
    path = run / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings), encoding="utf-8"
    )


# ----------------------------------------------------------------------------- --show


def test_show_prints_the_estimator_at_work(run, monkeypatch, capsys):
    """Two examples, three given warmups each. All numbers by hand, from plain logits."""
    change(run, samples=3, alpha=0.4)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    words = [tokenizer.token_to_id(word) for word in ("Ġin", "Ġthe", "ĠFrau", "Ġa")]
    given = torch.tensor([[[words[0], words[1]], [words[2], words[3]], [words[0], words[1]]]])
    drawn, written, sources = [], [], []

    def draw(model, memory, prompt, spec, samples):
        drawn.append(samples)
        return given

    def write(model, batch, spec, length, *, c, **how):
        n = len(batch.source)
        written.append(n)
        sources.append(batch.source)
        c = given[0, :1].expand(n, -1) if c is None and spec else c  # greedy: the first of them
        return c, (torch.tensor([[words[1]]]) if c is None else c.flip(1))

    monkeypatch.setattr(evaluation, "sample_warmups", draw)
    monkeypatch.setattr(evaluation, "generate", write)
    assert evaluation.main([str(run), "--show", "2"]) == 0
    out = capsys.readouterr().out
    assert drawn == [3, 3] and written == [1, 1, 1, 1, 1, 3, 1, 3]
    assert all(torch.equal(sources[i].expand(3, -1), sources[i + 1]) for i in (4, 6))
    examples = data.load(data.read_config(run))[0]["test"]
    capsys.readouterr()
    blocks = out.split("\nsource ")[1:]
    assert len(blocks) == 2
    for block, example in zip(blocks, examples):
        source, prompt, reference, *stages, titles = block.splitlines()[:7]
        rows = [row.split(maxsplit=6) for row in block.splitlines()[7:]]
        assert [row[:2] for row in rows] == [["2", "x"], ["1", "x"]]  # draws of each
        assert source.strip() == example.source
        assert prompt.split() == ["prompt", "<2en>"]
        assert reference.removeprefix("reference").strip() == example.target
        assert stages[0].split() == ["sft", "the"]
        assert stages[1].split() == ["sft,", "same", "compute", "the"]
        assert stages[2].split() == ["warmup", "in", "the", "->", "the", "in"]
        assert titles.split() == "drawn log P(c|x) log P(y|x,c) a b sampled c -> y".split()
        log_pi, R = by_hand(run, tokenizer, example, given[0])
        w = [(0.4 * r).exp().item() for r in R - R.max()]
        w = [x / sum(w) for x in w]
        for k, (_, _, *numbers, text) in enumerate(rows):
            expected = [log_pi[k], R[k], w[k] - 1 / 3, w[k]]
            assert [float(x) for x in numbers] == pytest.approx(
                list(map(float, expected)), abs=6e-4
            )
            assert numbers[2][0] in "+-"
            assert text == ("Frau a -> a Frau" if k == 1 else "in the -> the in")


def by_hand(run, tokenizer, example, c):
    """log P(c|x) and log P(y|x,c), (K,) each: the whole sequence through plain logits."""
    model = load_model(run / "policy.pt", tokenizer, torch.device("cpu"))
    ids = {
        name: tokenizer.encode(text, add_special_tokens=False).ids
        for name, text in example._asdict().items()
    }
    log_pi, R = [], []
    for row in c.tolist():
        y = [*ids["target"], 1]
        tokens = torch.tensor([[0, *ids["prompt"], *row, 3, *y[:-1]]])
        with torch.no_grad():
            memory = model.encode(torch.tensor([ids["source"]]))
            logits = model.logits(model.decode(tokens, memory))[0].double()
        at = len(ids["prompt"])  # the place that predicts the warmup's first token
        policy = logits[at : at + 2].index_fill(1, torch.tensor([0, 1, 2, 3, 4]), -torch.inf)
        log_pi.append(policy.log_softmax(-1)[range(2), row].sum())
        target = logits[at + 3 :].log_softmax(-1)
        R.append(target[range(len(y)), y].sum())
    return torch.stack(log_pi), torch.stack(R)


@pytest.mark.parametrize(
    "estimator, samples", [("pause", 2), ("sft", 2), ("exact", 2), ("best", 1)]
)
def test_nothing_is_sampled_where_there_is_nothing_to_compare(estimator, samples, run, capsys):
    change(run, estimator=estimator, samples=samples)
    assert evaluation.main([str(run), "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert "log P(c|x)" not in out
    names = [line[:20].rstrip() for line in out.splitlines()[-3:]]
    assert names == ["sft", "sft, same compute", evaluation.BASELINES.get(estimator, "warmup")]
    assert (" -> " in out) == (estimator not in ("sft", "pause"))  # pause has a constant for c


def test_show_is_the_same_every_time_and_for_each_stage(run, capsys):
    shown = []
    for flags in ([], [], ["--stage", "policy"], ["--stage", "sft"]):
        assert evaluation.main([str(run), "--show", "2", *flags]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert shown[2] == "".join(
        line for line in shown[0].splitlines(keepends=True) if not line.startswith("sft")
    )
    assert "sft" in shown[3] and "log P" not in shown[3] and "warmup" not in shown[3]


def test_training_and_scoring_end_with_what_show_prints(run, capsys):
    """The table of a run is followed by its first three examples."""
    assert evaluation.main([str(run), "--show", "3"]) == 0
    shown = capsys.readouterr().out
    shown = shown[shown.index("\nsource ") :]
    assert evaluation.main([str(run)]) == 0
    assert shown in capsys.readouterr().out


# ----------------------------------------------------------------------------- --plot


class Axis:
    """Stands for matplotlib's: keeps what is drawn."""

    def __init__(self, title):
        self.title, self.curves, self.colors, self.named = title, {}, {}, False

    def plot(self, x, y, color, label=None, marker=None, linewidth=1.0):
        assert (label is None) == (marker is None) == (linewidth < 1)
        self.curves[label or f"thin {color}"] = list(x), list(y)
        if label:
            self.colors[label] = color

    def set_xlabel(self, text):
        assert "TFLOP" in text

    def legend(self, **how):
        self.named = True


@pytest.fixture
def drawn(monkeypatch):
    """The axes, and the title, of a figure that is drawn by a stand-in for matplotlib."""
    made = SimpleNamespace(axes=[], title="", page=None, places=[])

    class Figure:
        def __init__(self, **how):
            made.axes.clear(), made.places.clear()
            self.axes = made.axes

        def add_subplot(self, rows, columns, number, title):
            made.places.append((rows, columns, number))
            made.axes.append(Axis(title))
            return made.axes[-1]

        def suptitle(self, text):
            made.title = text

        def savefig(self, path, format):
            assert format == "png"
            made.page = path

    module = ModuleType("matplotlib.figure")
    module.Figure = Figure
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    return made


VALIDATED = "nll reward spread ess entropy distinct swap_gap over_empty".split()


def test_plot_draws_the_log_against_flops(run, drawn, tmp_path, capsys):
    """Each stage's values at the FLOPs spent so far; both later stages begin where SFT ended."""
    page = tmp_path / "curves.png"
    assert evaluation.main([str(run), "--plot", str(page)]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert drawn.page == page and drawn.title.startswith("run: ")
    assert [axis.title for axis in drawn.axes] == VALIDATED
    records = [
        json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]

    def cost(stage, step):
        flops = [
            record["flops"]
            for record in records
            if (record["kind"], record["stage"]) == ("train", stage) and record["step"] <= step
        ]
        return sum(flops) / 1e12

    names = {"sft": "sft", "control": "sft, same compute", "policy": "warmup"}
    for axis, key in zip(drawn.axes, VALIDATED):
        for stage, name in names.items():
            before = 0 if stage == "sft" else cost("sft", 99)
            wanted = [
                (before + cost(stage, record["step"]), record[key])
                for record in records
                if (record["kind"], record["stage"]) == ("valid", stage) and key in record
            ]
            assert bool(wanted) == (stage == "policy" or key == "nll")
            assert (name in axis.curves) == bool(wanted)
            x, y = axis.curves.get(name, ([], []))
            assert x == pytest.approx([x for x, _ in wanted], rel=1e-9)
            assert y == [y for _, y in wanted]
            updates = [
                (before + cost(stage, record["step"]), record[key])
                for record in records
                if (record["kind"], record["stage"]) == ("train", stage) and key in record
            ]
            logged = stage == "policy" and key not in ("swap_gap", "over_empty")
            assert bool(updates) == logged
            x, y = axis.curves.get(f"thin {axis.colors.get(name)}", ([], []))
            assert x == pytest.approx([x for x, _ in updates], rel=1e-9)
            assert y == [y for _, y in updates]
    colors = {
        name: {axis.colors.get(name) for axis in drawn.axes} - {None} for name in names.values()
    }
    assert colors == {"sft": {"black"}, "warmup": {"C0"}, "sft, same compute": {"gray"}}
    assert all(axis.named for axis in drawn.axes)
    assert drawn.places == [(3, 3, number) for number in range(1, 9)]


def test_plot_has_a_panel_for_each_metric_that_was_logged(run, drawn, tmp_path):
    """--eval-decode: three of them here. Eleven panels: the twelfth place stays empty."""
    path = run / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for n, line in enumerate(lines):
        if line["kind"] == "valid":
            line |= {"1 hop": n / 100, "2 hops": n / 50, "hit rate": n / 70}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert evaluation.main([str(run), "--plot", str(tmp_path / "curves.png")]) == 0
    titles = [axis.title for axis in drawn.axes]
    assert len(titles) == 11 and {"1 hop", "hit rate"} < set(titles)
    assert drawn.places == [(4, 3, number) for number in range(1, 12)]
    wanted = [
        n / 50 for n, line in enumerate(lines) if line["kind"] == "valid" and line["stage"] == "sft"
    ]
    assert drawn.axes[titles.index("2 hops")].curves["sft"][1] == wanted


def show_lines(run, capsys, *flags) -> list[str]:
    assert evaluation.main([str(run), "--show", "2", *flags]) == 0
    return capsys.readouterr().out.splitlines()


def test_show_takes_another_split_or_lines_of_ones_own(run, tmp_path, capsys):
    config = data.read_config(run)
    splits, _ = data.load(config)
    lines = show_lines(run, capsys, "--split", "valid")
    assert [line for line in lines if line.startswith("source")] == [
        f"source              {example.source}" for example in splits["valid"][:2]
    ]
    assert sum("log P(y|x,c)" in line for line in lines) == 2
    text = tmp_path / "text"
    text.write_text("\nein Hund\nAnna schläft.\nzu viel\n", encoding="utf-8")
    lines = show_lines(run, capsys, "--input", str(text))
    assert [line for line in lines if line.startswith("source")] == [
        "source              ein Hund",
        "source              Anna schläft.",
    ]
    # without a reference there is no reward, so there are no weights
    assert not any("reference" in line or "log P(y|x,c)" in line for line in lines)
    titles = [line for line in lines if line.startswith("drawn")]
    assert titles == ["drawn  log P(c|x)  sampled c -> y"] * 2
    rows = [line.split() for line in lines if " x " in line and " -> " in line]
    assert rows and all(float(row[2]) <= 0 for row in rows)


@pytest.mark.parametrize(
    "flags",
    [
        ["--split", "test", "--input", "f"],
        ["--export", "d", "--show", "1"],
        ["--plot", "p.png", "--input", "f"],
        ["--split", "test", "--plot", "p.png"],
    ],
)
def test_what_does_not_go_together(flags, run, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(run), *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and ("not allowed with" in said or "--show takes" in said)


def test_plot_writes_a_picture(run, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib to test drawing")
    assert evaluation.main([str(run), "--plot", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["log.jsonl", "sft.pt", "curves.jpg", ""])
def test_plot_writes_over_no_other_file(name, run, capsys):
    before = (run / "log.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(run), "--plot", str(run / name)])
    assert stop.value.code == 2 and "--plot takes the name of a .png" in capsys.readouterr().err
    assert (run / "log.jsonl").read_bytes() == before


def test_plot_needs_the_log_alone(run, tmp_path, monkeypatch):
    """A run without a trained stage, of a device that is not here."""
    change(run, device="cuda")
    for name in ("sft.pt", "control.pt", "policy.pt", "tokenizer.json"):
        (run / name).unlink()
    drawn = []
    monkeypatch.setattr(evaluation, "plot", lambda config, out: drawn.append(config.folder))
    assert evaluation.main([str(run), "--plot", str(tmp_path / "curves.png")]) == 0
    assert drawn == [run]


def test_without_matplotlib_plot_says_what_to_install(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert evaluation.main([str(run), "--plot", str(tmp_path / "curves.png")]) == 1
    assert capsys.readouterr().err == "error: --plot draws by matplotlib: pip install matplotlib\n"


# ----------------------------------------------------------------------------- the bars


class Bar(data.tqdm):
    """Keeps every bar, its totals and its last numbers."""

    made = []

    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.made.append(self)
        self.shown = []

    def set_postfix(self, numbers=None, **how):
        if numbers is not None:
            self.shown.append((self.desc, self.total, set(numbers)))


def stage_bars():
    """Without those of validations."""
    return [bar for bar in Bar.made if bar.unit == "update"]


def test_each_stage_has_a_bar_of_its_updates(tmp_path, monkeypatch):
    """4 SFT, 3 warmup, then the control's. A beginner's three numbers; all others are in the log."""
    monkeypatch.setattr(data, "tqdm", Bar)
    Bar.made.clear()
    monkeypatch.setattr(train, "report", lambda run: None)  # after the last bar
    flags = [*TINY, "--built-in-size", "80", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    control = evaluation.training_cost(tmp_path / "run", "control")["updates"]
    assert len(stage_bars()) == 3
    for bar, stage, total, names in zip(
        stage_bars(),
        ("sft", "policy", "control"),
        (4, 3, control),
        ({"loss"}, {"nll", "spread", "swap_gap"}, {"loss"}),
    ):
        assert bar.n == bar.total == total and bar.initial == 0
        assert [(name.strip(": "), *rest) for name, *rest in bar.shown] == [
            (stage, total, names)
        ] * total


def test_a_resumed_run_begins_its_bar_where_it_stopped(run, tmp_path, monkeypatch):
    """A finished one at the end of its control; an interrupted one in its policy stage."""
    monkeypatch.setattr(data, "tqdm", Bar)
    monkeypatch.setattr(train, "report", lambda run: None)  # after the last bar
    Bar.made.clear()
    assert train.main(["--resume", str(run)]) == 0
    [bar] = stage_bars()
    assert bar.initial == bar.total == bar.n > 0 and bar.desc.startswith("control")

    log = train.log

    def interrupting(run, kind, numbers):
        log(run, kind, numbers)
        run.stop = (run.state.stage, run.state.step) == ("policy", 1)

    with monkeypatch.context() as patch:
        patch.setattr(train, "log", interrupting)
        flags = [*TINY, "--built-in-size", "80", "--out", str(tmp_path / "half")]
        assert train.main(flags) == 1
    Bar.made.clear()
    assert train.main(["--resume", str(tmp_path / "half")]) == 0
    bar, last = stage_bars()
    assert (bar.initial, bar.n, bar.total) == (1, 3, 3) and bar.desc.startswith("policy")
    assert last.initial == 0 and last.n == last.total > 0


def test_validation_and_decoding_have_a_bar_of_examples(run, monkeypatch):
    monkeypatch.setattr(data, "tqdm", Bar)
    Bar.made.clear()
    assert evaluation.main([str(run), "--stage", "policy"]) == 0
    assert not any(bar.leave for bar in Bar.made)
    assert [(bar.desc, bar.n, bar.total) for bar in Bar.made] == [
        ("decoding", 30, 30),
        ("validation", 30, 30),
    ]
