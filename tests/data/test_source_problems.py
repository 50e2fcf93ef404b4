"""Input that cannot be used: an error in one line, or left out and counted; never half of something."""

import bz2
import csv
import gzip
import json
import lzma
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from lm.data.config import DataConfig
from lm.data.sources import SkipCounts, open_source
from lm.errors import UserError


def skipping(source: str, target: int | None = None, **settings: object) -> tuple[list[str], SkipCounts]:
    """Texts and counts where problems are skipped; by units of `target` bytes where it is given."""
    opened = open_source(source, DataConfig(source=source, on_error="skip", **settings))
    if target is None:
        return [document.text for document in opened.documents()], opened.skipped
    texts, skipped = [], SkipCounts()
    for unit in opened.units(target):
        texts += [document.text for document in opened.read(unit)]
        skipped.merge(pickle.loads(pickle.dumps(opened.skipped)))
    return texts, skipped


def check_problem(
    source: str, texts: list[str], counts: dict[str, int], message: str, settings: dict | None = None
) -> SkipCounts:
    """The same file stopped at, with a message of one line, and read around, in one go and in units of all sizes."""
    settings = settings or {}
    with pytest.raises(UserError, match=message) as caught:
        list(open_source(source, DataConfig(source=source, **settings)).documents())
    assert "\n" not in str(caught.value)
    assert "--data.on-error skip" in str(caught.value)
    found, skipped = skipping(source, **settings)
    assert (found, skipped.counts) == (texts, counts)
    for target in (1, 7, 1000, 1 << 30):
        assert skipping(source, target, **settings) == (found, skipped)
    return skipped


def test_bytes_of_another_encoding_cost_the_document_they_stand_in(tmp_path: Path):
    (tmp_path / "t.txt").write_bytes("eins\ncaf\xe9\n\ndrei\n\xff\xfe\nvier\n\nfünf".encode("latin-1"))
    source = f"text:{tmp_path}/t.txt"
    message = "t.txt is not UTF-8: byte 0xE9 at offset 8; set data.encoding"
    check_problem(source, [], {"undecodable text": 1}, message)
    skipped = check_problem(
        source, ["eins", "", "drei", "vier", ""], {"undecodable text": 3}, message, {"document": "line"}
    )
    wrong = [("E9", 8), ("FF", 16), ("FC", 26)]
    shown = [f"{tmp_path}/t.txt is not UTF-8: byte 0x{byte} at offset {at}" for byte, at in wrong]
    assert skipped.examples == {"undecodable text": shown}
    check_problem(source, [], {"undecodable text": 3}, message, {"document": "paragraph"})
    assert skipping(source, encoding="latin-1", document="line")[0][1] == "caf\xe9"


def test_wide_encodings_that_break_in_the_middle_leave_nothing_out_of_half_a_file(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("eins\nzwei\n".encode("utf-16") + b"\n")
    (tmp_path / "b.txt").write_bytes("drei\n".encode("utf-16"))
    settings = {"encoding": "utf-16", "document": "line"}
    check_problem(f"text:{tmp_path}/*.txt", ["drei"], {"undecodable text": 1}, "a.txt.* is not UTF-16", settings)


@pytest.mark.parametrize("encoding", ["utf-8", "auto", "gb18030"])
def test_binary_files(tmp_path: Path, encoding: str):
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "b.txt").write_bytes(b"text\n")
    for document in ("file", "line"):
        settings = {"encoding": encoding, "document": document}
        texts = ["text\n"] if document == "file" else ["text"]
        check_problem(f"text:{tmp_path}/*", texts, {"binary file": 1}, "a.txt looks like a binary file", settings)


def test_null_bytes_further_on_right_to_left_and_combining_characters_are_text(tmp_path: Path):
    text = "x" * 9000 + "\0 שלום \u202eabc\u202c e\u0301 \u200d\u200b\ufeff" + "a\u0300" * 500
    (tmp_path / "t.txt").write_bytes(text.encode())
    (tmp_path / "t.csv").write_bytes(f"text\n{text}\n".encode())
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}))
    for form in ("text:{}/t.txt", "csv:{}/t.csv", "jsonl:{}/t.jsonl"):
        opened = open_source(form.format(tmp_path), DataConfig())
        assert [document.text for document in opened.documents()] == [text]


def damaged(suffix: str) -> dict[str, bytes]:
    content = "".join(f"line {i}\n" for i in range(20_000)).encode()
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        whole = zstandard.compress(content)
    else:
        whole = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](content)
    middle = len(whole) // 2
    return {
        "short": whole[:-9],
        "half": whole[:middle],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "other": b"this is something else",
    }


@pytest.mark.parametrize("how", ["short", "half", "flipped", "other"])
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_files_are_left_out_whole(tmp_path: Path, suffix: str, how: str):
    content = damaged(suffix)[how]
    if (suffix, how) == (".zst", "flipped"):
        pytest.skip("Zstandard files need not have a checksum")
    (tmp_path / f"a.txt{suffix}").write_bytes(content)
    (tmp_path / "b.txt").write_text("fine")
    for document in ("line", "file"):
        check_problem(
            f"text:{tmp_path}/*",
            ["fine"],
            {"damaged file": 1},
            f"cannot read .*a.txt{suffix}: ",
            {"document": document},
        )


def test_a_disk_that_fails_is_no_damaged_file(tmp_path: Path):
    (tmp_path / "a.txt").write_text("fine")
    opened = open_source(f"text:{tmp_path}/*", DataConfig(on_error="skip"))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a.txt: No such file"):
        list(opened.documents())


def test_broken_json(tmp_path: Path):
    lines = [
        '{"text": "one"}',
        '{"text": ',
        "[1]",
        '{"text": 5}',
        '{"body": "x"}',
        "[" * 100_000,
        '{"text": "a\0b"}',
        '{"text": "two"}',
        '{"text": null}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with (tmp_path / "t.jsonl").open("ab") as file:
        file.write(b'\n{"text": "\xff"}\n{"text": "three"}')
    # A NUL among the first bytes is taken for a binary file's.
    content = (tmp_path / "t.jsonl").read_bytes()
    (tmp_path / "t.jsonl").write_bytes(b" " * 9000 + b"\n" + content)
    counts = {"broken JSON": 4, "field without text": 2, "no such field": 1, "undecodable text": 1}
    skipped = check_problem(f"jsonl:{tmp_path}/t.jsonl", ["one", "two", "three"], counts, "t.jsonl:3 is not valid JSON")
    assert skipped.examples["no such field"] == [f"{tmp_path}/t.jsonl:6 has no field 'text'; it has 'body'"]
    assert skipped.examples["field without text"][1] == f"{tmp_path}/t.jsonl:10: field 'text' holds null, not text"


def test_broken_json_lists(tmp_path: Path):
    (tmp_path / "a.json").write_text('[{"text": "lost"}, {"text"')
    (tmp_path / "b.json").write_text('{"text": "no list"}')
    (tmp_path / "c.json").write_text('[{"text": "one"}, 5, {"text": ["a", 5]}, {"text": {}}]')
    counts = {"broken JSON": 3, "field without text": 2}
    check_problem(f"json:{tmp_path}/*.json", ["one"], counts, "a.json is not valid JSON")


def test_only_the_first_few_are_shown(tmp_path: Path):
    (tmp_path / "t.jsonl").write_text("x\n" * 100)
    for target in (None, 1, 20):
        skipped = skipping(f"jsonl:{tmp_path}/t.jsonl", target)[1]
        assert skipped.total == 100
        shown = skipped.examples["broken JSON"]
        assert [example.split(" ")[0].rsplit(":")[-1] for example in shown] == ["1", "2", "3", "4", "5"]


def test_broken_tables(tmp_path: Path):
    rows = [
        "text,n",
        "one,1",
        "two,1,2",
        '"x"y,3',
        "three",
        '"four\nlines",4',
        ",5",
        "five,6",
        '"never closed,7',
        "swallowed,8",
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    source, settings = f"csv:{tmp_path}/t.csv", {"group_field": "n"}
    counts = {"broken row": 3, "no such field": 1}
    skipped = check_problem(
        source, ["one", "four\nlines", "", "five"], counts, "t.csv:3 has 3 values for 2 col", settings
    )
    assert "t.csv:9 is not valid CSV" in skipped.examples["broken row"][2]
    assert "it goes on for 2 lines" in skipped.examples["broken row"][2]
    (tmp_path / "t.tsv").write_text("n\ttext\n1\tone\n2\n3\ttwo\tmore\n4\tthree\n")
    check_problem(
        f"tsv:{tmp_path}/t.tsv", ["one", "three"], {"no such field": 1, "broken row": 1}, "t.tsv:3 has no field 'text'"
    )


def test_undecodable_rows(tmp_path: Path):
    (tmp_path / "t.csv").write_bytes(b'text\none\n"caf\xe9\nau lait"\ntwo\n')
    check_problem(f"csv:{tmp_path}/t.csv", ["one", "two"], {"undecodable text": 1}, "byte 0xE9 at offset 13")


def test_a_column_that_is_not_there_is_told_once_a_file(tmp_path: Path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, delimiter in (("csv", ","), ("tsv", "\t")):
        with (tmp_path / f"t.{name}").open("w") as file:
            csv.writer(file, delimiter=delimiter).writerows([["a", "b"]] * 1000)
        message = rf"t.{name} has no column 'text'; it has 'a', 'b'; set data.field, or --data.no-header"
        check_problem(f"{name}:{tmp_path}/t.{name}", [], {"no such field": 1}, message)
    pq.write_table(pa.table({"a": ["x"] * 1000}), tmp_path / "t.parquet", row_group_size=10)
    check_problem(
        f"parquet:{tmp_path}/t.parquet", [], {"no such field": 1}, "t.parquet has no column 'text'; it has 'a'"
    )


def test_broken_parquet(tmp_path: Path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "c.parquet").write_bytes(b"")
    counts = {"field without text": 1, "damaged file": 2}
    check_problem(f"parquet:{tmp_path}/*", ["a", "b"], counts, "a.parquet:2: field 'text' holds null, not text")


def test_documents_over_the_limit(tmp_path: Path):
    (tmp_path / "a.txt").write_text("12345\n123456\n\n123\n12\n\n一二\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("12345")
    source, limit = f"text:{tmp_path}/*.txt", {"max_document_bytes": 5}
    counts = {"larger than max_document_bytes": 1}
    check_problem(source, ["12345"], counts, "a.txt is longer than data.max_document_bytes 5", limit)
    counts = {"larger than max_document_bytes": 2}
    expected = ["12345", "", "123", "12", "", "12345"]
    check_problem(source, expected, counts, "a.txt:2 is longer", {**limit, "document": "line"})
    (tmp_path / "t.jsonl").write_text('{"text": "12345"}\n{"text": "12345678"}\n{"text": "' + "1" * 1000 + '"}\n')
    check_problem(
        f"jsonl:{tmp_path}/t.jsonl",
        ["12345", "12345678"],
        {"larger than max_document_bytes": 1},
        "t.jsonl:3 is",
        {"max_document_bytes": 30},
    )
    (tmp_path / "t.csv").write_text('text\none\n"' + "x\n" * 1000 + '"\ntwo\n')
    _, skipped = skipping(f"csv:{tmp_path}/t.csv", max_document_bytes=30)
    assert skipped.counts["larger than max_document_bytes"] >= 1


LONG_LINE = """
import resource, sys
from lm.data.config import DataConfig
from lm.data.sources import open_source
source, limit = sys.argv[1], int(sys.argv[2])
opened = open_source(source, DataConfig(document="line", on_error="skip", max_document_bytes=limit))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(opened.units(1 << 20)) == 1 + (not source.endswith(".gz"))
print([len(d.text) for d in opened.documents()], opened.skipped.total)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("size", [20_000_000, pytest.param(200_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("suffix", "limit"), [("", 1 << 30), ("", 1 << 20), (".gz", 1 << 20)])
def test_one_long_line(tmp_path: Path, suffix: str, limit: int, size: int):
    """It works in a few times its size, or is left out in almost nothing."""
    path = tmp_path / f"t.txt{suffix}"
    with gzip.open(path, "wb", compresslevel=1) if suffix else path.open("wb") as file:
        for _ in range(size // 1_000_000):
            file.write(b"x" * 1_000_000)
        file.write(b"\nend\n")
    command = [sys.executable, "-c", LONG_LINE, f"text:{path}", str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lengths, grown = done.stdout.splitlines()
    if limit > size:
        assert lengths == f"[{size}, 3] 0"
        assert int(grown) < 40 + 3.5 * size / 1e6
    else:
        assert lengths == "[3] 1"
        assert int(grown) < 15


def test_settings_that_cannot_be():
    for settings, message in {
        "encoding": ({"encoding": "utf-9"}, "data.encoding is 'utf-9', which Python does not know"),
        "no text": ({"encoding": "base64"}, "data.encoding is 'base64'"),
        "on_error": ({"on_error": "ignore"}, "data.on_error is 'ignore'; choose stop or skip"),
        "limit": ({"max_document_bytes": 0}, "data.max_document_bytes is 0"),
        "document": ({"document": "page"}, "data.document is 'page'; choose file, paragraph or line"),
        "group": ({"group_field": "who", "source": "text:x"}, "documents of 'text:x' have no fields"),
        "column": (
            {"source": "csv:x", "header": False},
            "data.field is 'text', but --data.no-header .* give its number",
        ),
    }.values():
        with pytest.raises(UserError, match=message):
            open_source("python-stdlib", DataConfig(**settings))
