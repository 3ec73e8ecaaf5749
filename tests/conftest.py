"""Shared by the tests: tiny settings, one finished tiny run."""

import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # from any folder
import model  # noqa: E402
import train  # noqa: E402

TINY = [
    "--size",
    "nano",
    "--built-in-size",
    "120",
    "--vocab-size",
    "700",
    "--sft-steps",
    "4",
    "--policy-steps",
    "3",
    "--eval-every",
    "2",
    "--batch-tokens",
    "800",
    "--policy-batch-tokens",
    "400",
    "--beams",
    "2",
    "--threads",
    "1",
    "--warmup-len",
    "2",
    "--samples",
    "2",
    "--eval-samples",
    "2",
    "--max-source-tokens",
    "26",
    "--max-target-tokens",
    "24",
]


@contextmanager
def standard_input(content: bytes):
    """What file descriptor 0 reads."""
    saved = os.dup(0)
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        os.dup2(file.fileno(), 0)
        yield
    os.dup2(saved, 0)
    os.close(saved)


@contextmanager
def drawn_logprobs():
    """A list that gets the log-probs (N,1) by which `model.draw` draws each token."""
    draw, seen = model.draw, []

    def watched(probs):
        token = draw(probs)
        seen.append((probs.gather(1, token) / probs.sum(1, keepdim=True)).log())
        return token

    with mock.patch("model.draw", watched):
        yield seen


def assert_near(ours, theirs):
    """To 5e-5 of the largest number, in float32. Another CPU adds in another order, and a small sum
    of large terms then differs by more than 5e-5 of itself. Zeros must be zeros.
    """
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5 * theirs.abs().max().item())


@pytest.fixture(autouse=True)
def one_thread():
    """Small products gain nothing from threads, and two test processes would fight over cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run folder with all three stages. All tests share it: read it, do not change it."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    assert train.main(["--task", "wmt", *TINY, "--out", str(folder)]) == 0
    return folder


def pytest_addoption(parser):
    parser.addoption(
        "--mine",
        action="store_true",
        help="tests/exercises: check exercises.py instead of solutions.py",
    )
