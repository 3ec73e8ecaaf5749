"""Runs on a pretended accelerator (pretend_device.py) are those of the CPU, and seldom wait for it.

All commands run in one other process, twice: there and on the CPU. (--export never leaves the CPU.)

Each of these was planted once to see a test fail:
    draw: torch.rand without a device                 test_a_command_does_…[whole], and 20 more
    sinusoids: their positions stay on the CPU        test_a_command_does_…[whole], and 10 more
    PositionBias: its positions stay on the CPU       test_a_command_does_…, of all commands
    exact: all_warmups stay                           test_a_command_does_…[exact]
    beam_search: ended_scores stay, or first_row      test_a_command_does_…[beams], and 6 more
    decode_batch, validate, batch_loss: a batch stays test_a_command_does_…, of all commands
    samples_at_work: its example stays                test_a_command_does_…[show], and 17 more
    tensor_of: forbidden ids stay                     test_a_command_does_…, of all commands
    iwae: torch.eye without a device                  test_a_command_does_…[iwae]
    pause: log P(c|x) of zeros stays                  test_a_command_does_…[pause]
    score_distinct: kept rows stay                    test_a_command_does_…[repeats], and 3 more
    score_distinct: places stay: legal, but slow      test_how_often_an_update_waits[repeats]
    load_model leaves the model on the CPU            test_a_command_does_…[beams], and 5 more
    a checkpoint is loaded to where it was saved      test_a_command_does_…, of all commands
    recompute without the random state                test_what_is_computed_again_draws_…
    FLOPs of a policy update counted there            test_a_command_does_…, of all commands
    loss.item(); a batch sent blocking; ids made
    anew for each batch                               test_how_often_an_update_waits, of most runs
    a look at every token, or at every fourth         test_decoding_looks_at_every_eighth_…
    a generator that is left as the program used it   test_a_command_does_…, of all commands
    draws after resuming that begin again             test_a_resumed_run_goes_on_with_other_…
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import train
from conftest import TINY
from data import load_tokenizer, special_ids
from pretend_device import UNSUPPORTED

# no dropout: on the CPU it draws other numbers than elsewhere
SMALL = [
    "--task",
    "toy",
    *TINY,
    "--dropout",
    "0",
    "--dtype",
    "float32",
    "--sft-steps",
    "2",
    "--policy-steps",
    "2",
    "--eval-every",
    "9",
]
TEXT = [
    *SMALL,
    "--task",
    "wmt",
    "--data",
    "DATA",
    "--max-source-tokens",
    "17",
    "--max-target-tokens",
    "17",
    "--batch-tokens",
    "60",
    "--policy-batch-tokens",
    "60",
    "--samples",
    "3",
]
TOY = [
    *SMALL,
    "--size",
    "toy",
    "--built-in-size",
    "16",
    "--symbols",
    "6",
    "--batch-tokens",
    "160",
    "--policy-batch-tokens",
    "40",
    "--eval-decode",
    "0",
    "--beams",
    "1",
    "--no-control",
]
NANO = [*TOY, "--size", "nano", "--dropout", "0.3"]
MANY = 330  # samples: at most 296 warmups of one token differ, so over a tenth are equal
RUNS = {
    "whole": TEXT,
    "iwae": [*TOY, "--estimator", "iwae", "--temperature", "1.2"],
    "repeats": [*TOY, "--estimator", "truncated", "--warmup-len", "1", "--samples", f"{MANY}"],
    "exact": [*TOY, "--estimator", "exact", "--warmup-len", "1"],
    "frozen": [*TOY, "--estimator", "frozen", "--accumulate", "2"],
    "pause": [*TOY, "--estimator", "pause"],
    "uninterrupted": TOY,
}
DROPOUT = {"dropout": NANO, "recompute": [*NANO, "--recompute"]}
SCORED = {
    "beams": ["--stage", "policy", "--beams", "3"],
    "greedy": ["--stage", "policy", "--beams", "1"],
    "show": ["--show", "2"],
    "input": ["--input", "INPUT", "--show-warmup"],
}


def write_text(folder):
    """A few sentences to train on, and one to translate."""
    folder.mkdir()
    names = ["Anna", "Otto", "Eva", "Kai", "Ida", "Tom", "Ute", "Max", "Lea"]
    for split, start, end in (("train", 0, 8), ("valid", 2, 6), ("test", 6, 8)):
        for language, verb in (("de", "sieht heute"), ("en", "sees today")):
            lines = [f"{names[n]} {verb} {names[n + 1]}\n" for n in range(start, end)]
            (folder / f"{split}.{language}").write_text("".join(lines), encoding="utf-8")
    (folder / "input").write_text("Anna sieht heute Tom\n", encoding="utf-8")


def interrupt_run(flags):
    """A run that leaves off in the policy stage, on the CPU."""
    loss = train.batch_loss

    def interrupting_loss(run, batch):
        run.stop = run.state.stage == "policy"
        return loss(run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "batch_loss", interrupting_loss)
        assert train.main([*flags, "--device", "cpu"]) == 1


def commands(root, device):
    """Name -> a command on this device. Its run folders lie in a folder of the device's name."""
    folder = root / device
    argv = {
        name: ["train", *flags, "--out", f"{folder / name}"]
        for name, flags in (RUNS | DROPOUT).items()
    }
    argv["resumed"] = ["train", "--resume", f"{folder}/resumed"]
    argv |= {name: ["eval", f"{folder}/whole", *flags] for name, flags in SCORED.items()}
    places = {"DATA": f"{root}/data", "INPUT": f"{root}/data/input"}
    return {
        name: [*(places.get(word, word) for word in words), "--device", device]
        for name, words in argv.items()
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(device, name) -> what the command did: exit code, printed text, waits. auto: pretended."""
    root = tmp_path_factory.mktemp("pretended")
    write_text(root / "data")
    interrupt_run([*TOY, "--out", f"{root}/cpu/resumed"])
    shutil.copytree(root / "cpu", root / "auto")
    todo = {
        (device, name): argv
        for device in ("cpu", "auto")
        for name, argv in commands(root, device).items()
        if device == "auto" or name not in DROPOUT
    }
    script = Path(__file__).with_name("pretend_device.py")
    ended = subprocess.run(
        [sys.executable, script, json.dumps([*todo.values()])],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # one accelerator
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if ended.returncode == UNSUPPORTED:
        pytest.skip(f"this torch takes no backend written in Python: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr[-2000:]
    results = dict(zip(todo, json.loads(ended.stdout.splitlines()[-1])))
    for (device, name), result in results.items():
        result |= {"root": root / device, "folder": root / device / name}
    return results


def log_of(result):
    """The numbers of the log, but for the seconds: no two runs share them."""
    lines = map(
        json.loads, (result["folder"] / "log.jsonl").read_text(encoding="utf-8").splitlines()
    )
    return [
        {f"{line['kind']} {line['stage']}": 1.0}
        | {name: value for name, value in line.items() if name not in ("kind", "stage", "seconds")}
        for line in lines
    ]


def words_of(result):
    """What was printed, without device, folder and the table's seconds. Decimals are numbers."""
    text = result["printed"].replace(str(result["root"]), "").replace("pretend:0", "cpu")
    text = re.sub(r"(\d\.\d\d) +\d+$", r"\1", text, flags=re.MULTILINE)
    words = [float(word) if re.fullmatch(r"[-+]?\d+\.\d+", word) else word for word in text.split()]
    return [w for w in words if type(w) is str], [w for w in words if type(w) is float]


@pytest.mark.parametrize("name", [*RUNS, "resumed", *SCORED])
def test_a_command_does_elsewhere_what_it_does_on_the_cpu(name, done):
    """The same seeds: the same text, and all numbers. No operation has mixed two devices."""
    there, here = done["auto", name], done["cpu", name]
    assert (there["code"], here["code"]) == (0, 0), there["said"]
    (text, numbers), (wanted, near) = words_of(there), words_of(here)
    assert text == wanted and numbers == pytest.approx(near, abs=2e-3)
    assert there["waits"]  # it was elsewhere
    assert there["generators"]  # a notebook's draws go on as before
    if name not in SCORED:
        assert_same_log(there, here)


def assert_same_log(one, other):
    """All numbers of two runs are equal, but for rounding."""
    assert len(log_of(one)) == len(log_of(other)) > 6
    for line, expected in zip(log_of(one), log_of(other)):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_resumed_run_goes_on_with_other_draws_than_at_its_start(done):
    """On rank 0, too. The device has a generator of its own, which last.pt does not hold."""
    resumed, whole = done["auto", "resumed"], done["auto", "uninterrupted"]
    assert (resumed["code"], whole["code"]) == (0, 0), resumed["said"]
    assert_same_log(resumed, whole)


def test_what_is_computed_again_draws_the_same_dropout(done):
    kept, again = done["auto", "dropout"], done["auto", "recompute"]
    assert (kept["code"], again["code"]) == (0, 0), again["said"]
    assert_same_log(again, kept)


def waits_of(result, function):
    """Where and why a command waited within this function of the program -> how often."""
    counts = Counter()
    for wait, count in result["waits"].items():
        path, why = wait.split(": ")
        functions = path.split("/")
        if functions[0] != "main":  # a thread of the backward pass
            counts[wait] += count
        elif function in functions and "validate_and_save" not in functions:
            inside = functions[functions.index(function) + 1 :]
            counts["/".join(inside) + f": {why}"] += count
    return counts


# one for each update: the numbers of the log come in one transfer
UPDATE = ["summary: tolist"]
# one for each micro-batch of SFT, a size: how many target tokens are real
SFT = ["batch_loss/sft_loss/direct_logprobs/teacher_force: nonzero"]
# two for each of the policy stage: also which of an example's warmups are distinct
POLICY = [
    "batch_loss/warmup_loss/score/distinct_rows: to the CPU",
    "batch_loss/warmup_loss/score/score_rows/teacher_force: nonzero",
]
MORE = {
    "exact": ["batch_loss/warmup_loss/propose: to the device"]  # all warmups
}


@pytest.mark.parametrize("name", [*RUNS, *DROPOUT, "resumed"])
def test_how_often_an_update_waits(name, done):
    result = done["auto", name]
    assert result["code"] == 0, result["said"]
    updates = Counter(kind for line in log_of(result) for kind in line if "train" in kind)
    if name == "resumed":
        updates -= Counter({"train sft": 2, "train policy": 1})  # of the CPU
    policy, sft = updates["train policy"], updates["train sft"] + updates["train control"]
    micro_batches = 2 if name == "frozen" else 1  # --accumulate
    expected = Counter()
    for wait in UPDATE:
        expected[wait] += sft + policy
    for wait in SFT:
        expected[wait] += sft * micro_batches
    for wait in POLICY + MORE.get(name, []):
        expected[wait] += policy * micro_batches
    waits = Counter()
    repeats = 0  # micro-batches with many equal warmups: elsewhere by chance, and as many waits
    for wait, count in waits_of(result, "train_stage").items():
        waits[wait.replace("score_distinct/", "")] += count
        repeats += count * ("score_distinct/" in wait)
    assert policy and waits == expected
    if name == "repeats":
        tokenizer = load_tokenizer(result["folder"] / "tokenizer.json")
        possible = tokenizer.get_vocab_size() - len(special_ids(tokenizer))
        assert possible <= 0.9 * MANY and repeats == policy


@pytest.mark.parametrize("name", ["greedy", "beams"])
def test_decoding_looks_at_every_eighth_token_whether_it_may_stop(name, done):
    """Beside it a batch waits for c and for y."""
    result = done["auto", name]
    assert result["code"] == 0, result["said"]
    steps = Counter(result["steps"])
    batches, looks = steps[0], steps[7] + steps[15]
    assert batches > 1 and 7 <= max(steps) <= 16
    assert waits_of(result, "decode_batch") == {
        "generate/beam_search/all_true: _local_scalar_dense": looks,
        ": tolist": 2 * batches,
    }
