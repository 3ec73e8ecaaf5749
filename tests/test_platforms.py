"""What differs on Windows and macOS, emulated here: nothing was run there.

Each of these was planted once to see a test fail:
    os.fsync on a handle opened for reading           test_windows_flushes_only_…
    a checkpoint renamed while it is open             test_no_open_file_is_renamed_…
    a text file opened without an encoding            test_every_text_file_has_an_encoding
    lines that end as the system likes                test_every_text_file_has_an_encoding
    /dev/stdin                                        test_no_name_of_a_device_file
    --device auto takes mps                           test_auto_is_cuda_or_the_cpu
    what goes to a file in the terminal's encoding    test_output_to_a_file_is_utf_8
    a version without a bound                         test_requirements_have_bounds
"""

import builtins
import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import model
import train
from conftest import TINY, standard_input

ROOT = Path(__file__).parents[1]
SCRIPTS = ("warmup.py", "model.py", "data.py", "train.py", "eval.py")
SMALL = ["--task", "wmt", *TINY, "--built-in-size", "40", "--beams", "1"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds open files in /proc")


def tiny_run(folder, *flags):
    return train.main([*SMALL, *flags, "--out", str(folder)])


# ----------------------------------------------------------------------------- files


@pytest.mark.skipif(os.name != "posix", reason="emulates a rule of Windows, which holds there")
def test_windows_flushes_only_what_is_open_for_writing(tmp_path, monkeypatch):
    import fcntl

    flushed = []

    def fsync(number):
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(number)

    monkeypatch.setattr(os, "fsync", fsync)
    assert tiny_run(tmp_path / "run") == 0
    assert len(flushed) > 5


@linux
def test_no_open_file_is_renamed_cut_or_removed(tmp_path, monkeypatch, capsys):
    """On Windows each of these fails with PermissionError."""
    asked = set()

    def closed_first(name):
        real = getattr(os, name)

        def act(path, *more, **how):
            links = list(Path("/proc/self/fd").iterdir())
            held = {os.readlink(link) for link in links if link.is_symlink()}
            for file in (path, *more):
                if isinstance(file, (str, Path)):
                    assert str(Path(file).resolve()) not in held, (name, file)
            asked.add(name)
            return real(path, *more, **how)

        monkeypatch.setattr(os, name, act)

    for name in ("replace", "truncate", "unlink"):
        closed_first(name)
    run = tmp_path / "run"
    assert tiny_run(run) == 0
    assert train.main(["--resume", str(run)]) == 0
    assert evaluation.main([str(run)]) == 0
    assert tiny_run(run, "--overwrite", "--policy-steps", "0") == 0
    assert {"replace", "truncate"} <= asked


def test_every_text_file_has_an_encoding(tmp_path, monkeypatch):
    """Else Windows reads and writes cp1252; and no line ends in CR LF there."""
    named, real = [], io.open

    def opened(
        file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest, **how
    ):
        if sys._getframe(1).f_globals.get("__name__") in ("data", "model", "train", "eval"):
            named.append((mode, encoding, newline))
        return real(file, mode, buffering, encoding, errors, newline, *rest, **how)

    write_text = Path.write_text

    def written(path, data, encoding=None, errors=None, newline=None):
        if sys._getframe(1).f_globals.get("__name__") in ("data", "model", "train", "eval"):
            named.append(("w", encoding, newline if path.suffix != ".tmp" else "\n"))
        return write_text(path, data, encoding, errors, newline)

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(Path, "write_text", written)
    assert tiny_run(tmp_path / "run") == 0
    assert evaluation.main([str(tmp_path / "run")]) == 0
    (tmp_path / "text").write_text("ein Hund\n", encoding="utf-8")
    assert evaluation.main([str(tmp_path / "run"), "--input", str(tmp_path / "text")]) == 0
    assert len(named) > 10
    for mode, encoding, newline in named:
        assert "b" in mode or encoding in ("utf-8", "utf-8-sig"), (mode, encoding)
        assert mode not in ("a", "w") or newline == "\n"


def test_python_itself_finds_no_file_without_an_encoding(tmp_path):
    """-X warn_default_encoding, in all that the scripts read and write."""
    code = (
        "import sys, train, eval; run = sys.argv.pop(); "
        "sys.exit(train.main([*sys.argv[1:], '--out', run]) or eval.main([run]))"
    )
    flags = [
        "-X",
        "warn_default_encoding",
        "-W",
        "error::EncodingWarning:train",
        "-W",
        "error::EncodingWarning:eval",
        "-W",
        "error::EncodingWarning:data",
        "-W",
        "error::EncodingWarning:model",
    ]
    command = [sys.executable, *flags, "-c", code, *SMALL, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# ----------------------------------------------------------------------------- system calls


def test_no_name_of_a_device_file_and_no_call_of_posix_alone():
    for name in SCRIPTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"[\"']/(dev|proc|tmp)\b", text), name
        assert not re.search(r"\bos\.(fork|getuid|kill|mkfifo|uname|sysconf|nice)\b", text), name
        assert not re.search(r"\b(SIGKILL|SIGHUP|SIGUSR|SIGALRM|fcntl|resource|pwd)\b", text), name


def test_standard_input_is_read_without_a_device_file(finished_run, monkeypatch, capsys):
    """As on Windows, where /dev/stdin does not exist."""
    real = io.open

    def no_device(file, *rest, **how):
        if str(file).startswith("/dev/"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(file))
        return real(file, *rest, **how)

    monkeypatch.setattr(builtins, "open", no_device)
    with standard_input("Anna schläft.\nein Hund\n".encode()):
        assert evaluation.main([str(finished_run), "--input", "-"]) == 0
        assert capsys.readouterr().out.count("\n") == 2


def test_output_to_a_file_is_utf_8():
    """On Windows Python would write cp1252 there, and ? for all else. Both streams."""
    code = (
        "import sys, data; "
        "show = lambda argv: [print('▁дом 家 é', file=f) for f in (sys.stdout, sys.stderr)]; "
        "data.program(show)([])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
    )
    for written in (done.stdout, done.stderr):
        assert written.decode("utf-8").strip() == "▁дом 家 é"


@pytest.mark.parametrize("cuda, chosen", [(0, "cpu"), (1, "cuda")])
def test_auto_is_cuda_or_the_cpu(cuda, chosen, monkeypatch):
    """Also on a Mac: nothing was ever run on mps."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert model.pick_device("auto").type == chosen


# ----------------------------------------------------------------------------- versions


def test_requirements_have_bounds():
    """From what was run up to the next major version: the newest that pip gives may be later."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert len(lines) == 6
    for line in lines:
        lower, upper = re.fullmatch(r"[a-z-]+>=(\d+)[\d.]*,<(\d+)", line).groups()
        assert int(upper) == int(lower) + 1, line


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for number in ("0", "3"):
        monkeypatch.setenv("LOCAL_RANK", number)
        assert model.pick_device("auto").type == "cuda"
    assert taken == [0, 3]
    monkeypatch.setenv("LOCAL_RANK", "4")
    for name in ("auto", "cuda"):  # five processes, four GPUs: a CPU among them would wait for ever
        with pytest.raises(model.UserError, match="no cuda device for this process"):
            model.pick_device(name)
