"""python data.py TASK, with prepared files in the place of the network."""

import errno
import gzip
import io
import json
import os
import tarfile
import tempfile
from http.client import IncompleteRead
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError, URLError

import pytest
import torch

import data
from data import shell_word

PAGE = b"<html><body>Service temporarily unavailable</body></html>"


def tar_gz(files: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


def article(i: int, body: str = "Email\nBody {i}.\n\nMore.") -> str:
    return (
        f"[SN]URL[SN]\nhttp://x/{i}\n\n[SN]TITLE[SN]\nTitle\n\n[SN]FIRST-SENTENCE[SN]\n"
        f"Summary {i} – ü.\n\n[SN]RESTBODY[SN]\n  Share this with \n{body.format(i=i)}\n"
    )


def logiqa(i: int) -> dict:
    return {"id": i, "answer": i % 4, "text": f"T{i}.", "question": "Q?", "options": list("abcd")}


def lines_of(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


NEWS = "news-commentary-v18.{}.tsv.gz".format
PAIRS = [f"Satz {i} über\u2028etwas.\tSentence {i}." for i in range(500)]
NEWS_LINES = [*PAIRS[:2], "\t", "Nur links\t", "\tOnly right", *PAIRS[2:]]
FLORES, XSUM, IDS = (
    file[0].rsplit("/", 1)[1] for file in (data.FLORES_FILE, data.XSUM_FILE, data.XSUM_IDS)
)
CODES = ["deu_Latn", "eng_Latn", "fra_Latn", "rus_Cyrl", "zho_Hans", "ace_Latn"]
ARTICLES = {f"bbc-summary-data/{i}.summary": article(i) for i in range(6)}  # 3: in no split
FILES = {
    NEWS("de-en"): gzip.compress("\n".join(NEWS_LINES).encode()),
    NEWS("en-zh"): gzip.compress("One.\t一。\nTwo.\t二。\n".encode()),
    FLORES: tar_gz(
        {
            f"./flores200_dataset/{split}/{code}.{split}": "".join(
                f"{code} {split} {i}\n" for i in range(1, count + 1)
            )
            for split, count in (("dev", 2), ("devtest", 3))
            for code in CODES
        }
    ),
    **{
        f"{split}.{lang}.gz": gzip.compress(f"{lang} {split} 1\n{lang} {split} 2\n".encode())
        for split in ("train", "val", "test_2016_flickr")
        for lang in ("de", "en", "fr")
    },
    XSUM: tar_gz(ARTICLES | {"bbc-summary-data/8.summary": article(8, body=" ")}),
    IDS: json.dumps({"test": ["0"], "validation": ["1"], "train": ["2", "4", "5", "8"]}).encode(),
    **{
        f"{split}.txt": lines_of(map(logiqa, range(n)))
        for split, n in (("train", 5), ("dev", 2), ("test", 3))
    },
}
CHECKSUMS = {FLORES: data.FLORES_FILE[1], XSUM: data.XSUM_FILE[1], IDS: data.XSUM_IDS[1]}


@pytest.fixture
def net(monkeypatch, tmp_path):
    """files: what is served, by base name; an exception is raised. asked: the names, in order."""
    net = SimpleNamespace(files=dict(FILES), asked=[])

    def download_url_to_file(url, dst, hash_prefix=None, progress=True):
        name = url.rsplit("/", 1)[1]
        net.asked.append(name)
        assert hash_prefix == CHECKSUMS.get(name)
        if isinstance(net.files[name], BaseException):
            raise net.files[name]
        Path(dst).write_bytes(net.files[name])

    monkeypatch.setattr(torch.hub, "download_url_to_file", download_url_to_file)
    monkeypatch.chdir(tmp_path)
    return net


def load(task, pair="de-en", folder=""):
    config = data.Config(task=task, pair=pair, data=folder, built_in_size=8)
    return data.load(config)


def files(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_wmt_serves_both_directions(net, capsys):
    assert data.main(["wmt"]) == 0
    out = capsys.readouterr().out
    assert "News Commentary" in out and "CC BY-SA 4.0" in out
    assert "next: python train.py --task wmt --pair de-en --size small" in out
    assert out.endswith(" --data data/wmt/de-en\n")
    assert "wrote data/wmt/de-en/train.de: 500 lines\n" in out
    assert files("data/wmt/de-en") == [
        f"{split}.{lang}" for split in ("test", "train", "valid") for lang in ("de", "en")
    ]
    splits, origin = load("wmt", "en-de")
    assert origin == str(Path("data/wmt/de-en").resolve())
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 500,
        "valid": 2,
        "test": 3,
    }  # rows with an empty side are gone on both sides
    assert splits["train"][3] == ("Sentence 3.", "<2de>", "Satz 3 über\u2028etwas.")
    assert splits["valid"][1] == ("eng_Latn dev 2", "<2de>", "deu_Latn dev 2")
    assert splits["test"][2] == ("eng_Latn devtest 3", "<2de>", "deu_Latn devtest 3")
    assert load("wmt", "de-en")[0]["train"][499].target == "Sentence 499."
    assert files(".") == ["data"] and files("data") == ["wmt"]  # nothing else lies around


def test_each_pair_has_a_folder_of_its_own(net):
    assert data.main(["wmt"]) == 0 and data.main(["wmt", "--pair", "zh-en"]) == 0
    assert net.asked == [NEWS("de-en"), FLORES, NEWS("en-zh"), FLORES]
    assert files("data/wmt") == ["de-en", "zh-en"]
    assert load("wmt", "zh-en")[0]["train"] == [
        ("一。", "<2en>", "One."),
        ("二。", "<2en>", "Two."),
    ]
    assert load("wmt", "en-zh")[0]["test"][0].source == "eng_Latn devtest 1"
    assert data.main(["wmt", "--pair", "en-de"]) == 0  # the folder of a pair serves both directions
    assert files("data/wmt") == ["de-en", "zh-en"]


@pytest.mark.parametrize(
    "task, sizes, first, last",
    [
        (
            "multi30k",
            (2, 2, 2),
            ("de train 1", "<2en>", "en train 1"),
            ("de test_2016_flickr 2", "<2en>", "en test_2016_flickr 2"),
        ),
        (
            "logiqa",
            (5, 2, 3),
            ("T0. Q? (A) a (B) b (C) c (D) d", "", "A"),
            ("T2. Q? (A) a (B) b (C) c (D) d", "", "C"),
        ),
        (
            "xsum",
            (3, 1, 1),
            ("Body 2. More.", "", "Summary 2 – ü."),  # no share buttons
            ("Body 0. More.", "", "Summary 0 – ü."),
        ),
    ],
)  # article 8 is empty
def test_each_task_can_be_read_after_its_download(net, capsys, task, sizes, first, last):
    assert data.main([task]) == 0  # into the folder where train.py looks
    splits, origin = load(task)
    assert origin.startswith(str(Path("data", task).resolve()))
    assert tuple(len(splits[split]) for split in ("train", "valid", "test")) == sizes
    assert splits["train"][0] == first and splits["test"][-1] == last
    assert data.main([task, "--out", "my/data"]) == 0
    assert capsys.readouterr().out.endswith("--data my/data\n")
    endings = ["de", "en"] if task == "multi30k" else ["jsonl"]
    assert files("my/data") == [
        f"{split}.{end}" for split in ("test", "train", "valid") for end in endings
    ]
    assert load(task, folder="my/data")[0] == splits


def test_the_next_command_takes_a_folder_with_a_space(net, capsys):
    assert data.main(["logiqa", "--out", "my data"]) == 0
    assert capsys.readouterr().out.endswith(f"--data {shell_word('my data')}\n")


def test_an_article_of_no_split_may_lack_sections(net):
    """The archive holds more articles than the splits."""
    net.files[XSUM] = tar_gz(ARTICLES | {"x/8.summary": article(8), "x/9.summary": "no sections"})
    assert data.main(["xsum"]) == 0
    assert len(load("xsum")[0]["train"]) == 4


def failed(capsys, task="wmt") -> str:
    """The one line on standard error of a download that fails and leaves no data behind."""
    assert data.main([task]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert files(".") == []
    return err


@pytest.mark.parametrize("name", [NEWS("de-en"), FLORES])
@pytest.mark.parametrize(
    "problem",
    [
        URLError("no route"),
        HTTPError("http://x", 404, "Not Found", {}, None),
        TimeoutError("slow"),
        ConnectionResetError("gone"),
        IncompleteRead(b"half"),
        RuntimeError('invalid hash value (expected "b8b0", got "0000")'),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_does_not_arrive_is_named(net, capsys, name, problem):
    net.files[name] = problem
    assert data.main(["wmt"]) == 1
    out, err = capsys.readouterr()
    assert out.endswith(f"/{name}\n") and "from https://" in out
    assert err.startswith(f"error: cannot download wmt: {type(problem).__name__}: ")
    assert str(problem) in err and err.count("\n") == 1 and files(".") == []
    assert load("wmt")[1] == "built-in"  # train.py still has that
    net.files[name] = FILES[name]
    assert data.main(["wmt"]) == 0 and len(load("wmt")[0]["train"]) == 500


def test_an_interrupted_download_leaves_nothing(net, capsys):
    net.files[FLORES] = KeyboardInterrupt()
    assert data.main(["wmt"]) == 1 and files(".") == []
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "task, name, content",
    [
        ("wmt", NEWS("de-en"), PAGE),
        ("wmt", NEWS("de-en"), FILES[NEWS("de-en")][:-20]),
        ("wmt", FLORES, PAGE),
        ("wmt", FLORES, FILES[FLORES][: len(FILES[FLORES]) // 2]),
        ("wmt", FLORES, FILES[FLORES][:40] + bytes(40) + FILES[FLORES][80:]),
        ("multi30k", "val.en.gz", PAGE),
        ("multi30k", "val.en.gz", FILES["val.en.gz"][:-9]),
        ("logiqa", "dev.txt", PAGE),
        ("logiqa", "dev.txt", b"{}"),
        ("logiqa", "dev.txt", b"[]"),
        ("logiqa", "dev.txt", lines_of([logiqa(0) | {"text": None}])),
        ("logiqa", "dev.txt", lines_of([logiqa(0)])[:-9]),
        ("logiqa", "dev.txt", b"\xff\xfe"),
        ("xsum", IDS, PAGE),
        ("xsum", IDS, b"[]"),
        ("xsum", IDS, b'{"train": []}'),
        ("xsum", XSUM, PAGE),
        ("xsum", XSUM, FILES[XSUM][: len(FILES[XSUM]) // 2]),
        ("xsum", XSUM, tar_gz(ARTICLES | {"x/8.summary": "no sections"})),
    ],
)
def test_other_content_never_becomes_data(net, capsys, task, name, content):
    """An error page, a cut or damaged file, an article without its sections."""
    net.files[name] = content
    failed(capsys, task)


def test_a_file_that_windows_still_holds_hides_no_error(net, capsys, monkeypatch, tmp_path):
    """There an archive that failed may be open when its folder is to go."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def held(path, **how):
        raise PermissionError(errno.EACCES, "used by another process", str(path))

    net.files[FLORES] = PAGE
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", held)
        assert data.main(["wmt"]) == 1
    said = capsys.readouterr().err
    assert "cannot download wmt: " in said and "another process" not in said


def test_missing_articles_are_counted(net, capsys):
    net.files[XSUM] = tar_gz(dict(list(ARTICLES.items())[:5]))
    assert "lacks 2 articles" in failed(capsys, "xsum")  # 5 and 8


def test_what_is_there_already_stays(net, capsys):
    folder = Path("data/wmt/de-en")
    folder.mkdir(parents=True)
    (folder / "valid.de").write_text("meins\nunser\n", encoding="utf-8")
    assert data.main(["wmt"]) == 1 and net.asked == []  # beside it the new side has other lines
    said = capsys.readouterr().err
    assert f"{folder} has one side of the valid split, without .en: move it away" in said
    assert files(folder) == ["valid.de"]
    (folder / "valid.en").write_text("mine\nours\n", encoding="utf-8")
    assert data.main(["wmt"]) == 0
    assert load("wmt")[0]["valid"][0] == ("meins", "<2en>", "mine")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(before) == 6 and "wrote data/wmt/de-en/valid.de" not in capsys.readouterr().out
    assert data.main(["wmt"]) == 0 and "wrote" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("out", [[], ["--out", "my"]], ids=["default folder", "--out"])
@pytest.mark.parametrize(
    "task, pair",
    [
        ("wmt", "de"),
        ("wmt", "de-de"),
        ("wmt", "de-en-fr"),
        ("wmt", "de-xx"),
        ("wmt", ""),
        ("multi30k", "de-zh"),
    ],
)
def test_a_pair_that_is_not_offered_is_refused_before_any_download(net, capsys, task, pair, out):
    with pytest.raises(SystemExit) as usage:
        data.main([task, "--pair", pair, *out])
    assert usage.value.code == 2 and "error: --pair takes two" in capsys.readouterr().err
    assert not net.asked and files(".") == []


@pytest.mark.parametrize("argv", [[], ["toy"], ["wmt", "--no-such-flag"]])
def test_bad_usage_is_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as usage:
        data.main(argv)
    assert usage.value.code == 2 and "--help lists" in capsys.readouterr().err
