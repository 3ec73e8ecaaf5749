"""python data.py TASK, against a server of our own that cuts, lies and sends error pages."""

import gzip
import hashlib
import io
import json
import socket
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

import data

PAGE = b"<html><body>Service temporarily unavailable</body></html>"


class Handler(BaseHTTPRequestHandler):
    """Serves server.files by base name. server.quirks[name]: what to do wrong, a request each; the last one stays."""

    def do_GET(self):
        name = self.path.rsplit("/", 1)[1]
        self.server.log.append((name, self.headers["Range"]))
        quirks, body = self.server.quirks.get(name, []), self.server.files.get(name)
        quirk = (quirks.pop(0) if len(quirks) > 1 else quirks[0]) if quirks else ""
        if body is None or quirk == "503":
            return self.send_error(404 if body is None else 503)
        body = PAGE if quirk == "page" else body
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if self.headers["Range"] else 0
        if quirk == "no range":
            start = 0
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start - (quirk == 'other range')}-{len(body) - 1}/{len(body)}")
        length = len(body) - start
        self.send_header("Content-Length", {"long": length + 50, "short": length // 2}.get(quirk, length))
        self.end_headers()
        self.wfile.write(body[start:][: length // 2] if quirk == "cut" else body[start:])

    def log_message(self, *args):
        pass


def tar_gz(files: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


def article(i: int, body: str = "Email\nBody {i}.\n\nMore.") -> str:
    return (f"[SN]URL[SN]\nhttp://x/{i}\n\n[SN]TITLE[SN]\nTitle\n\n[SN]FIRST-SENTENCE[SN]\nSummary {i} – ü.\n\n"
            f"[SN]RESTBODY[SN]\nShare this with\n{body.format(i=i)}\n")


def articles(count: int) -> dict[str, str]:
    return {f"bbc-summary-data/{i}.summary": article(i) for i in range(count)}


def logiqa(i: int) -> bytes:
    row = {"id": i, "answer": i % 4, "text": f"T{i}.", "question": "Q?", "options": list("abcd"), "type": {}}
    return (json.dumps(row) + "\n").encode()


NEWS = "news-commentary-v18.{}.tsv.gz".format
PAIRS = [f"Satz {i} über\u2028etwas.\tSentence {i}." for i in range(500)]
FLORES = "flores200_dataset.tar.gz"
XSUM, IDS = "XSUM-EMNLP18-Summary-Data-Original.tar.gz", "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"
FILES = {
    NEWS("de-en"): gzip.compress("\n".join([*PAIRS[:2], "\t", "Nur links\t", *PAIRS[2:]]).encode()),
    NEWS("en-zh"): gzip.compress("One.\t一。\nTwo.\t二。\n".encode()),
    FLORES: tar_gz({f"./flores200_dataset/{split}/{code}.{split}": f"{code} 1\n{code} 2\n"
                    for split in ("dev", "devtest") for code in [*data.FLORES.values(), "ace_Latn"]}),
    **{f"{split}.{lang}.gz": gzip.compress(f"{lang} eins\n{lang} zwei\n".encode())
       for split in ("train", "val", "test_2016_flickr") for lang in ("de", "en", "fr")},
    XSUM: tar_gz(articles(6) | {"bbc-summary-data/8.summary": article(8, body=" ")}),
    IDS: json.dumps({"test": ["0"], "validation": ["1"], "train": ["2", "4", "5", "8"]}).encode(),
    **{f"{split}.txt": b"".join(map(logiqa, range(n))) for split, n in (("train", 5), ("dev", 2), ("test", 3))},
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The table of sources points to it; the working directory is empty; no waiting."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.quirks, server.log = dict(FILES), {}, []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/"
    moved = {task: [s._replace(urls={here + url.rsplit("/", 1)[1]: None for url in s.urls}) for s in sources]
             for task, sources in data.SOURCES.items()}
    monkeypatch.setattr(data, "SOURCES", moved)
    monkeypatch.setattr(data, "PAUSE", 0)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def load(task, pair="de-en", folder=""):
    return data.load(SimpleNamespace(task=task, pair=pair, data=folder, init="", seed=0, sample_size=8))


def failed(capsys, *argv) -> str:
    """The one line on standard error of a download that fails and leaves no data folder behind."""
    assert data.main(["wmt", *argv]) == 1
    line = capsys.readouterr().err.split("\r")[-1].strip().split("\n")[-1]
    assert line.startswith("error: ") and not data.Path("data/wmt").exists()
    assert load("wmt")[1] == "sample"  # train.py still has its sample
    return line


def test_wmt_serves_both_directions_and_further_pairs(server, capsys):
    assert data.main(["wmt"]) == 0
    out = capsys.readouterr().out
    assert "FLORES-200" in out and "CC BY-SA 4.0" in out and "next: python train.py --task wmt --pair de-en (" in out
    assert "wrote data/wmt/train.de-en.de: 500 lines\n" in out and "left out 2 rows" in out
    splits, origin = load("wmt", "en-de")
    assert origin == str(data.Path("data/wmt").resolve())
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 500, "valid": 2, "test": 2}
    assert splits["train"][3] == ("Sentence 3.", "<2de>", "Satz 3 über\u2028etwas.")  # U+2028 ends no line
    assert splits["test"][1] == ("eng_Latn 2", "<2de>", "deu_Latn 2")
    assert load("wmt", "de-en")[0]["train"][499].target == "Sentence 499."
    assert data.main(["wmt", "--pair", "en-de,zh-en"]) == 0  # one more pair: one more file
    assert [name for name, _ in server.log] == [NEWS("de-en"), FLORES, NEWS("en-zh")]
    assert load("wmt", "zh-en")[0]["train"][0] == ("一。", "<2en>", "One.")
    assert data.main(["wmt", "--pair", "de-en,en-zh"]) == 0 and len(server.log) == 3
    assert "data/wmt is complete: nothing to download" in capsys.readouterr().out
    assert [path.name for path in data.Path("data").iterdir()] == ["wmt"]  # nothing else lies around


@pytest.mark.parametrize("task, first, sizes", [
    ("multi30k", ("de eins", "<2en>", "en eins"), (2, 2, 2)),
    ("logiqa", ("T0. Q? (A) a (B) b (C) c (D) d", "", "A"), (5, 2, 3)),
    ("xsum", ("Body 2. More.", "", "Summary 2 – ü."), (3, 1, 1))])  # share buttons and the empty article are gone
def test_each_task_can_be_read_after_its_download(server, capsys, task, first, sizes):
    assert data.main([task, "--out", "my/data"]) == 0
    pair = " --pair de-en" * (task == "multi30k")
    assert f"next: python train.py --task {task}{pair} --data my/data" in capsys.readouterr().out
    splits, _ = load(task, folder="my/data")
    assert splits["train"][0] == first and tuple(len(splits[split]) for split in ("train", "valid", "test")) == sizes
    count = len(server.log)
    assert data.main([task, "--out", "my/data"]) == 0 and len(server.log) == count


@pytest.mark.parametrize("quirks, ranges", [
    (["cut", ""], "-+"), (["cut", "cut", ""], "-++"), (["cut", "no range"], "-+"), (["cut", "other range", ""], "-++"),
    (["503", ""], "--"), (["long", ""], "-+-")])  # -: all of it was asked for; +: the rest. long: no rest, so once more
def test_what_fails_once_is_taken_up_again(server, quirks, ranges):
    server.quirks[NEWS("de-en")] = quirks
    assert data.main(["wmt"]) == 0
    asked = [r for name, r in server.log if name == NEWS("de-en")]
    assert "".join("+" if r else "-" for r in asked) == ranges and len(load("wmt")[0]["train"]) == 500
    if ranges == "-+" and quirks[0] == "cut":
        assert asked[1] == f"bytes={len(FILES[NEWS('de-en')]) // 2}-"


def test_a_stopped_download_goes_on_in_the_next_call(server, monkeypatch, capsys):
    def interrupt(seconds):
        raise KeyboardInterrupt

    server.quirks[FLORES] = ["cut", ""]
    with monkeypatch.context() as patch:
        patch.setattr(data.time, "sleep", interrupt)
        assert data.main(["wmt"]) == 1
    assert capsys.readouterr().err.endswith("\nstopped; the same command goes on from here\n")
    assert not data.Path("data/wmt").exists() and data.main(["wmt"]) == 0
    half = len(FILES[FLORES]) // 2
    assert server.log == [(NEWS("de-en"), None), (FLORES, None), (FLORES, f"bytes={half}-")]


@pytest.mark.parametrize("quirk, message", [("page", "not what we expected"), ("short", "not what we expected"),
                                            ("long", "attempts"), ("cut", "attempts"), ("503", "503")])
@pytest.mark.parametrize("name", [NEWS("de-en"), FLORES])
def test_what_stays_wrong_never_becomes_data(server, capsys, quirk, message, name):
    server.quirks[name] = [quirk]
    line = failed(capsys)
    assert message in line and name in line
    server.quirks[name] = [""]  # and nothing bad was kept
    assert data.main(["wmt"]) == 0 and len(load("wmt")[0]["train"]) == 500


@pytest.mark.parametrize("task, name, content", [
    ("logiqa", "dev.txt", PAGE), ("logiqa", "dev.txt", b""), ("logiqa", "dev.txt", b"{}"), ("xsum", IDS, PAGE),
    ("xsum", IDS, b"[]"), ("xsum", XSUM, PAGE), ("xsum", XSUM, tar_gz(articles(5))),
    ("xsum", XSUM, tar_gz(articles(5) | {"x/5.summary": "no sections"})),
    ("multi30k", "val.en.gz", PAGE), ("multi30k", "val.en.gz", gzip.compress(b""))])
def test_other_content_is_refused(server, capsys, task, name, content):
    server.files[name] = content
    assert data.main([task]) == 1 and not data.Path("data", task).exists()
    err = capsys.readouterr().err
    assert "not what we expected" in err and name in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["../evil.dev", "flores200_dataset/../../dev/deu_Latn.dev", "/tmp/dev/deu_Latn.dev"])
def test_an_archive_that_reaches_out_of_its_folder_is_refused(server, capsys, name, tmp_path):
    server.files[FLORES] = tar_gz({name: "x\n"})
    assert f"{name} points out of the archive" in failed(capsys)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".dev"]


def test_checksums(server, capsys, monkeypatch):
    good = hashlib.sha256(FILES[FLORES]).hexdigest()
    for digest, rc in (("0" * 64, 1), (good, 0)):
        sources = [s._replace(urls={url: digest * ("flores" in url) for url in s.urls}) for s in data.SOURCES["wmt"]]
        monkeypatch.setitem(data.SOURCES, "wmt", sources)
        if rc:
            assert "flores200_dataset.tar.gz: its checksum is wrong, so it was deleted" in failed(capsys)
    assert data.main(["wmt"]) == 0
    assert [name for name, _ in server.log].count(FLORES) == 2


def test_a_missing_file_is_asked_for_once_and_can_come_by_hand(server, capsys):
    gone = server.files.pop(NEWS("de-en"))
    line = failed(capsys)
    assert "404" in line and f"/{NEWS('de-en')}" in line and len(server.log) == 1
    folder = data.Path(line.split("into ")[1].split(" by hand")[0])
    folder.mkdir(parents=True)
    (folder / NEWS("de-en")).write_bytes(gone)
    assert data.main(["wmt"]) == 0 and not folder.exists() and len(load("wmt")[0]["train"]) == 500


def test_without_network(server, capsys, monkeypatch):
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        here = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        monkeypatch.setitem(data.SOURCES, "wmt", [s._replace(urls={here + "x.gz": None}) for s in data.SOURCES["wmt"]])
        assert "Is there a network?" in failed(capsys)
    assert not list(data.Path("data").iterdir())


def test_files_of_your_own_stay(server):
    data.Path("data/wmt").mkdir(parents=True)
    data.Path("data/wmt/valid.de").write_text("meins\nunser\n")
    assert data.main(["wmt"]) == 0
    assert load("wmt")[0]["valid"][0].source == "meins"


@pytest.mark.parametrize("argv, message", [
    (["toy"], "generated"), (["wmt", "--pair", "de"], "--pair"), (["wmt", "--pair", "de-de"], "--pair"),
    (["wmt", "--pair", "de-en-en"], "--pair"), (["multi30k", "--pair", "de-zh"], "cs de en fr")])
def test_bad_calls(argv, message, capsys):
    assert data.main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    with pytest.raises(SystemExit) as usage:
        data.main([])
    assert usage.value.code == 2


def test_the_sample_names_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    load("wmt")
    assert "python data.py wmt --pair de-en" in capsys.readouterr().out
    with pytest.raises(data.UserError, match="python data.py multi30k --pair de-en"):
        load("multi30k")
