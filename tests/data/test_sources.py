"""Sources: what becomes a document, and what is said about text that cannot be read."""

import gzip
import json
import pickle
from pathlib import Path

import pytest

from lm.data.config import DataConfig
from lm.data.sources import documents, open_source
from lm.errors import UserError


def read(source: str, **settings: object) -> list[tuple[str, str]]:
    return [(document.key, document.text) for document in documents(source, DataConfig(**settings))]


def test_files_come_sorted_with_keys_below_the_fixed_part(tmp_path: Path):
    for name in ["b.txt", "a/z.txt", "a/b/c.txt", "a/skip.md"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name + "\r\n")
    assert read(f"text:{tmp_path}/**/*.txt") == [
        ("a/b/c.txt", "a/b/c.txt\r\n"),
        ("a/z.txt", "a/z.txt\r\n"),
        ("b.txt", "b.txt\r\n"),
    ]
    assert read(f"text:{tmp_path}/a/z.txt") == [("z.txt", "a/z.txt\r\n")]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_and_paragraphs(tmp_path: Path, end: str):
    (tmp_path / "t.txt").write_bytes(end.join(["", "one", "two", " ", "", "三", ""]).encode())
    source = f"text:{tmp_path}/t.txt"
    assert read(source, document="line") == [
        ("t.txt:1", ""),
        ("t.txt:2", "one"),
        ("t.txt:3", "two"),
        ("t.txt:4", " "),
        ("t.txt:5", ""),
        ("t.txt:6", "三"),
    ]
    assert read(source, document="paragraph") == [("t.txt:2", f"one{end}two"), ("t.txt:6", "三")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gb18030"])
def test_a_lone_carriage_return_ends_no_line(tmp_path: Path, encoding: str):
    """As docs/data.md says: text with progress bars keeps its lines, whatever the encoding."""
    (tmp_path / "t.txt").write_bytes("10 %\r20 %\r\n一\u2028二\x85三\f\n\rfour".encode(encoding))
    for document in ("line", "paragraph"):
        found = read(f"text:{tmp_path}/t.txt", document=document, encoding=encoding)
        assert "".join(text for _, text in found).count("\r") == (2 if document == "line" else 3)
        if document == "line":
            assert [text for _, text in found] == ["10 %\r20 %", "一\u2028二\x85三\f", "\rfour"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    (tmp_path / "t.txt").write_bytes("\ufeffone\ntwo \ufeff".encode())
    assert read(f"text:{tmp_path}/t.txt") == [("t.txt", "one\ntwo \ufeff")]
    (tmp_path / "t.jsonl").write_bytes('\ufeff{"text": "one"}'.encode())
    assert read(f"jsonl:{tmp_path}/t.jsonl") == [("t.jsonl:1", "one")]


@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
def test_gz_is_the_same_text(tmp_path: Path, document: str):
    content = "one\n\ntwo 三\n".encode() * 1000
    (tmp_path / "t.txt").write_bytes(content)
    with gzip.open(tmp_path / "t.txt.gz", "wb") as file:
        file.write(content)
    plain = open_source(f"text:{tmp_path}/t.txt", DataConfig(document=document))
    packed = open_source(f"text:{tmp_path}/t.txt.gz", DataConfig(document=document))
    assert [d.text for d in plain.documents()] == [d.text for d in packed.documents()]
    for source, name in ((plain, "t.txt"), (packed, "t.txt.gz")):
        assert source.bytes_read == (tmp_path / name).stat().st_size, "progress ends at 100 %"


def test_jsonl_field(tmp_path: Path):
    lines = [json.dumps({"body": "一\n二", "n": 1}), "", json.dumps({"body": "three"}), r'{"body": "half \ud83d pair"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert read(f"jsonl:{tmp_path}/*.jsonl", field="body") == [
        ("t.jsonl:1", "一\n二"),
        ("t.jsonl:3", "three"),
        ("t.jsonl:4", "half \ufffd pair"),
    ]


def test_python_stdlib_holds_no_tests_and_never_changes():
    source = open_source("python-stdlib", DataConfig())
    keys = [key for key, _ in source.files()]
    assert keys == sorted(keys)
    assert "os.py" in keys
    assert "json/decoder.py" in keys
    assert not [key for key in keys if {"test", "tests", "idle_test", "site-packages"} & set(key.split("/"))]
    total = sum(len(document.text) for document in source.documents())
    assert total > 5_000_000
    assert keys == [key for key, _ in open_source("python-stdlib", DataConfig()).files()]


def write_tfds(folder: Path, texts: list[str]) -> None:
    from lm.data.writer import DatasetWriter

    with DatasetWriter(folder, "little", eos_id=0) as writer:
        for i, text in enumerate(texts):
            writer.add("train" if i else "test", text, [1, 2], 2, last=True)
        writer.finish()


def test_tfds_folder(tmp_path: Path):
    write_tfds(tmp_path, ["zero", "一", "two"])
    assert read(f"tfds:{tmp_path}", field="key") == [("train:0", "一"), ("train:1", "two")]
    assert read(f"tfds:{tmp_path}#test", field="key") == [("test:0", "zero")]
    assert read(f"tfds:{tmp_path}#train[1:]", field="key") == [("train[1:]:0", "two")]
    source = open_source(f"tfds:{tmp_path}", DataConfig(field="key"))
    assert [path.is_file() for _, path in source.files()] == [True]


BAD = {
    "unknown form": ("word:x", {}, "unknown source 'word:x'; choose text:GLOB"),
    "no glob": ("text:", {}, "unknown source 'text:'"),
    "missing file": ("text:{tmp}/none.txt", {}, "matches no file"),
    "missing glob": ("jsonl:{tmp}/*.none", {}, "matches no file"),
    "folder": ("text:{tmp}", {}, r"is a folder; name its files, as in .*/\*\*/\*.txt"),
    "not UTF-8": ("text:{tmp}/latin.txt", {}, "latin.txt is not UTF-8: byte 0xE9 at offset 11"),
    "not UTF-8, by line": ("text:{tmp}/latin.txt", {"document": "line"}, "byte 0xE9 at offset 11"),
    "broken gz": ("text:{tmp}/broken.gz", {}, "cannot read .*broken.gz"),
    "short gz": ("text:{tmp}/short.gz", {}, "cannot read .*short.gz"),
    "broken json": ("jsonl:{tmp}/bad.jsonl", {}, "bad.jsonl:2 is not valid JSON"),
    "deep json": ("jsonl:{tmp}/deep.jsonl", {}, "deep.jsonl:1 is not valid JSON"),
    "no object": ("jsonl:{tmp}/list.jsonl", {}, "list.jsonl:1 is not a JSON object but a list"),
    "no field": ("jsonl:{tmp}/bad.jsonl", {"field": "body"}, "bad.jsonl:1 has no field 'body'; it has 'text'"),
    "no string": ("jsonl:{tmp}/number.jsonl", {}, "field 'text' holds a number, not text"),
    "unknown tfds": (
        "tfds:there_is_no_such_dataset",
        {},
        "dataset': TFDS knows no such .* check it$",
    ),
    "no tfds folder": ("tfds:{tmp}", {}, "cannot open source"),
    "no tfds split": ("tfds:{tmp}/tfds#none", {"field": "key"}, "has no split 'none'; it has train, test"),
    "no tfds field": ("tfds:{tmp}/tfds", {}, "has no field 'text'"),
    "tfds field of numbers": ("tfds:{tmp}/tfds", {"field": "tokens"}, "field 'tokens' holds ndarray, not text"),
}


@pytest.mark.parametrize(("source", "settings", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_answered_in_one_line(tmp_path: Path, source: str, settings: dict, message: str):
    (tmp_path / "latin.txt").write_bytes(b"\xef\xbb\xbffine\ncaf\xe9")
    (tmp_path / "broken.gz").write_bytes(b"this is not gzip")
    (tmp_path / "short.gz").write_bytes(gzip.compress(b"fine\n" * 1000)[:-9])
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "deep.jsonl").write_text("[" * 200_000)
    (tmp_path / "list.jsonl").write_text("[1]")
    (tmp_path / "number.jsonl").write_text('{"text": 1}')
    if "/tfds" in source:
        (tmp_path / "tfds").mkdir()
        write_tfds(tmp_path / "tfds", ["a", "b"])
    with pytest.raises(UserError, match=message) as caught:
        read(source.replace("{tmp}", str(tmp_path)), **settings)
    assert "\n" not in str(caught.value)


def unit_texts(source: str, target: int, **settings: object) -> list[list[tuple[str, str]]]:
    """Documents by unit; each is read by a source of its own that has travelled, as in a worker process."""
    opened = open_source(source, DataConfig(**settings))
    units = opened.units(target)
    assert units == pickle.loads(pickle.dumps(units))
    assert sum(unit.bytes for unit in units) == sum(path.stat().st_size for _, path in opened.files())
    found = []
    for unit in units:
        worker = pickle.loads(pickle.dumps(opened))
        found.append([(document.key, document.text) for document in worker.read(unit)])
        assert worker.bytes_read == unit.bytes
        assert worker.skipped.total == 0
    return found


TRICKY = "one\r\n\n \n二二\n\u3000\nthree\nfour\n\n\n\t\nפו שש\ne\u0301\x00\n\nlast"


@pytest.mark.parametrize("target", [1, 2, 5, 8, 13, 1000])
@pytest.mark.parametrize("document", ["line", "paragraph", "file"])
def test_units_hold_exactly_the_documents(tmp_path: Path, document: str, target: int):
    texts = [TRICKY, "", "\n", "\n\n\n", "a", "b\n", "c\n\nd\n", TRICKY.replace("\n", " \n ")]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    source = f"text:{tmp_path}/*.txt"
    # NUL bytes in the first kilobytes are taken for a binary file's, so these come later.
    for i in (0, 7):
        (tmp_path / f"{i}.txt").write_bytes(b"x" * 9000 + b"\n" + texts[i].encode())
    units = unit_texts(source, target, document=document)
    assert [found for unit in units for found in unit] == read(source, document=document)
    if target == 1 and document == "line":
        assert max(map(len, units)) == 1, "a line a unit"
    if target == 1000:
        assert len(units) <= 4, "small files share a unit"


def test_units_of_jsonl_are_near_the_size_asked_for(tmp_path: Path):
    lines = [json.dumps({"text": "词" * (i % 50)}) + "\n" for i in range(2000)]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    size = (tmp_path / "t.jsonl").stat().st_size
    opened = open_source(f"jsonl:{tmp_path}/t.jsonl", DataConfig())
    units = opened.units(10_000)
    assert len(units) == pytest.approx(size / 10_000, abs=2 + size / 10_000 * 0.05)
    assert [d for unit in units for d in opened.read(unit)] == list(opened.documents())
    assert [d.key for d in opened.documents()][-1] == "t.jsonl:2000"


def test_units_of_tfds_and_stdlib(tmp_path: Path):
    write_tfds(tmp_path, ["zero", "一", "two", "three", "four"])
    units = unit_texts(f"tfds:{tmp_path}", 1, field="key")
    assert [found for unit in units for found in unit] == read(f"tfds:{tmp_path}", field="key")
    assert len(units) == 4
    units = open_source("python-stdlib", DataConfig()).units(1 << 20)
    assert 5 < len(units) < 100
    assert max(unit.bytes for unit in units) < 2 << 20
