"""Several processes (gloo, on the CPU) are one with the joined batch, and stop and fail as one."""

import json
import multiprocessing
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import data
import eval as evaluation
import model
import train
import warmup
from conftest import TINY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, on Linux")
ROOT = Path(__file__).parents[1]
WMT = [*TINY, "--device", "cpu", "--built-in-size", "120"]
TOY = [*WMT, "--task", "toy", "--symbols", "5", "--policy-batch-tokens", "80"]


def in_processes(work, folder: Path, count: int = 2) -> list:
    """What work(rank) returns in each of `count` processes, forked: a test's patches hold there."""

    def child(number: int) -> None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=number,
            world_size=count,
            timeout=timedelta(minutes=10),
        )
        torch.save(work(number), folder / f"{number}.result")

    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=child, args=(number,)) for number in range(count)]
    for process in children:
        process.start()
    for process in children:
        process.join(600)
        assert process.exitcode == 0
    return [torch.load(folder / f"{number}.result") for number in range(count)]


def log_of(folder: Path) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


# ----------------------------------------------------------------------------- N processes are one


def drawn_from_the_source(model, memory, prompt, spec, samples):
    """In place of sample_warmups: no random numbers, so all processes draw the same c (B,K,W)."""
    ids = range(model.config.vocab_size)
    allowed = torch.tensor([i for i in ids if i not in spec.forbidden])
    lengths = (memory.bias == 0).sum(-1)  # (B,1,1)
    seed = lengths * 7 + torch.arange(samples)[:, None] * 13 + torch.arange(spec.length) * 5
    return allowed[seed % len(allowed)]  # (B,K,W)


@pytest.mark.parametrize(
    "settings",
    [
        [
            *TOY,
            "--estimator",
            "exact",
            "--warmup-len",
            "1",
            "--built-in-size",
            "24",
            "--policy-batch-tokens",
            "32",
            "--policy-steps",
            "2",
        ],
        [*WMT, "--eval-decode", "9"],
    ],
    ids=["exact", "marginal"],
)
def test_two_processes_are_one_with_the_joined_batch(settings, tmp_path, monkeypatch):
    """One update of 2 processes = one of 1 with 2 micro-batches: losses, FLOPs, weights, scores."""
    monkeypatch.setattr(
        train, "EncoderDecoder", lambda config: model.EncoderDecoder(config).double()
    )
    monkeypatch.setattr(warmup, "sample_warmups", drawn_from_the_source)
    monkeypatch.setattr(
        evaluation, "generate", lambda model, batch, spec, *_, **__: (batch.source, batch.source)
    )
    settings = [*settings, "--dropout", "0"]

    def work(number):
        assert train.main([*settings, "--out", str(tmp_path / "two")]) == 0

    assert train.main([*settings, "--accumulate", "2", "--out", str(tmp_path / "one")]) == 0
    in_processes(work, tmp_path)
    one, two = (log_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) and {line["stage"] for line in one} == {"sft", "policy", "control"}
    for a, b in zip(one, two):
        assert all(a.pop(name) == b.pop(name) for name in ("kind", "stage", "step"))
        assert a.get("flops") == b.get("flops")
        assert a | {"seconds": 0} == pytest.approx(b | {"seconds": 0}, rel=1e-6, abs=1e-9)
    for stage in ("sft", "policy", "control"):
        a, b = (
            model.load_checkpoint(tmp_path / name / f"{stage}.pt")["model"]
            for name in ("one", "two")
        )
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    rows = [
        json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))["rows"]
        for name in ("one", "two")
    ]
    for name in ("metrics", "updates", "flops"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]


def test_rank_0_alone_validates_and_decodes(tmp_path, monkeypatch):
    """As often as the log says; the others take the best score from it, and no file of theirs."""
    calls, folder = [], tmp_path / "run"
    for name in ("validate", "decode_split", "report", "save_checkpoint", "write_file"):

        def watched(*arguments, _name=name, _original=getattr(train, name), **how):
            calls.append(_name)
            return _original(*arguments, **how)

        monkeypatch.setattr(train, name, watched)

    def work(number):
        start_stage, best = train.start_stage, []

        def watched(run, stage):
            if stage != "sft":
                best.append(run.state.best_nll)
            start_stage(run, stage)

        train.start_stage = watched
        assert train.main([*WMT, "--eval-decode", "5", "--out", str(folder)]) == 0
        return calls, best

    (first, best), (second, other_best) = in_processes(work, tmp_path)
    validations = sum(line["kind"] == "valid" for line in log_of(folder))
    assert validations > 4 and second == []
    assert first.count("validate") == first.count("decode_split") == validations
    assert first.count("report") == 1
    assert len(best) == 2 and best == other_best and max(best) < 10


def test_batches_are_dealt_out_without_overlap_or_loss(monkeypatch):
    """Call j of rank r of N is batch jN + r of one sequence, over epochs, and with another N."""
    monkeypatch.setattr(data, "collate", lambda examples: tuple(int(e.source[0]) for e in examples))
    encoded = [data.Example(*[torch.full((n % 7 + 1,), n).numpy()] * 3) for n in range(50)]

    def of(number, count, state, calls):
        batches = data.Batches(encoded, 60, seed=0, rank=number, processes=count)
        batches.seek(*state)
        return [next(batches) for _ in range(calls)], (batches.epoch, batches.position)

    start = (0, 0)
    sequence, _ = of(0, 1, start, 39)
    epoch = len(data.Batches(encoded, 60, seed=0).order)
    assert sorted(sum(sequence[:epoch], ())) == list(range(50))  # each example once
    assert len(set(sequence)) > 1.5 * epoch  # a second epoch, in other batches
    for r in range(3):
        mine, state = of(r, 3, start, 9)
        assert mine == sequence[r:27:3]
    for r in range(2):
        assert of(r, 2, state, 6)[0] == sequence[27 + r :: 2]


def test_what_processes_share_and_what_not(tmp_path):
    """Rank 0's weights and best validation for all, though the others had their own."""
    config, _ = train.parse([*WMT, "--policy-steps", "0", "--out", str(tmp_path / "run")])

    def work(number):
        own_draws = train.own_draws
        train.own_draws = lambda device, *seed: own_draws(device, *seed, number)  # other weights
        run = train.prepare(config, resume=False)
        weights = [p.clone() for p in run.model.parameters()]
        train.validate_and_save(run)
        return weights, run.state.best_nll

    (weights, best), (other_weights, other_best) = in_processes(work, tmp_path)
    torch.testing.assert_close(weights, other_weights, rtol=0, atol=0)
    assert best == other_best < float("inf")


def test_each_of_three_processes_draws_its_own(tmp_path):
    """With one seed for all ranks they would share all draws. A resumed run draws the same."""
    flags = [*WMT, "--policy-steps", "0", "--sft-steps", "3"]

    def work(number):
        draws, loss, stop = [], train.batch_loss, []

        def watched(run, batch):
            draws.append(torch.rand(5).tolist())
            run.stop = len(draws) == stop
            return loss(run, batch)

        train.batch_loss = watched
        config, _ = train.parse([*flags, "--out", str(tmp_path / "whole")])
        train.train(train.prepare(config, resume=False))
        whole, stop = draws.copy(), 5  # the second update of the next run
        assert train.main([*flags, "--out", str(tmp_path / "parts")]) == 1
        dist.barrier()  # rank 0 saves while the others leave
        assert train.main(["--resume", str(tmp_path / "parts")]) == 0
        assert draws == whole + whole
        return whole

    draws = sum(in_processes(work, tmp_path, 3), [])
    assert len({tuple(draw) for draw in draws}) == len(draws) == 9


# ----------------------------------------------------------------------------- one ends, all end


def test_a_signal_to_one_stops_all_and_one_alone_goes_on(tmp_path, monkeypatch, capfd):
    """Rank 1 is told to stop in update 2. Two updates of 2 batches and two of 1 are 6 batches."""
    log = train.log

    def interrupting(run, kind, numbers):
        log(run, kind, numbers)
        run.stop = run.stop or (train.rank() == 1 and run.state.step == 2)

    monkeypatch.setattr(train, "log", interrupting)
    out = str(tmp_path / "run")
    flags = [*WMT, "--policy-steps", "0", "--out", out]
    assert in_processes(lambda number: train.main(flags), tmp_path) == [1, 1]
    assert f"stopped; go on with: python train.py --resume {out}" in capfd.readouterr().err
    assert train.main(["--resume", out]) == 0
    assert [line["step"] for line in log_of(Path(out)) if line["kind"] == "train"] == [1, 2, 3, 4]
    saved = model.load_checkpoint(Path(out) / "last.pt", "state")["batches"]
    assert saved == (0, 6)  # epoch, position


def test_processes_with_different_data_are_refused_by_each_in_one_line(tmp_path, capfd):
    def work(number):
        return train.main([*WMT, "--seed", str(number), "--out", str(tmp_path / "run")])

    assert in_processes(work, tmp_path) == [1, 1]
    said = capfd.readouterr().err
    assert said.count("error: ") == said.count("do not read the same data") == 2
    assert "Traceback" not in said and not (tmp_path / "run").exists()


DYING = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
log = train.log
def dying(run, kind, numbers):
    log(run, kind, numbers)
    if train.rank() == 1 and run.state.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
train.log = dying
sys.exit(train.main())
"""


def test_a_killed_process_ends_the_job_and_one_alone_goes_on(tmp_path):
    run, script = tmp_path / "run", tmp_path / "dying.py"
    script.write_text(DYING, encoding="utf-8")
    flags = [*WMT, "--policy-steps", "0", "--sft-steps", "12", "--eval-every", "4", "--out", run]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    job = subprocess.run(
        [*command, script, *flags],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert job.returncode != 0 and "Signal 9 (SIGKILL)" in job.stderr  # as torchrun says it
    assert job.stdout.count("model: nano") == 1  # rank 0 alone prints
    assert model.load_checkpoint(run / "last.pt", "state")["state"]["step"] == 4
    assert train.main(["--resume", str(run)]) == 0
    steps = [line["step"] for line in log_of(run) if line["kind"] == "train"]
    assert steps == list(range(1, 13))
