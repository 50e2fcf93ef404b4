"""The forms a source can have: what becomes a document in each, on files made here and on real ones."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm.data.config import DataConfig
from lm.data.sources import Document, open_source, shaping

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")


def read(source: str, **settings: object) -> list[Document]:
    """All documents; units of any size are checked to hold the same."""
    opened = open_source(source, DataConfig(source=source, **settings))
    found = list(opened.documents())
    total = sum(path.stat().st_size for _, path in opened.files())
    assert opened.bytes_read == total, "progress ends at 100 %"
    for target in (1, 300, 20_000, 1 << 40):
        if total / target < 2000:
            units = opened.units(target)
            assert sum(unit.bytes for unit in units) == total
            assert [document for unit in units for document in opened.read(unit)] == found
    assert opened.skipped.total == 0
    return found


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(content) // 2  # two frames, as `cat a.zst b.zst` makes
        return zstandard.compress(content[:half]) + zstandard.compress(content[half:])
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](content)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_hold_the_same_documents(tmp_path: Path, suffix: str):
    content = "".join(f"line {i} 第{i}行\n" for i in range(5000)).encode()
    (tmp_path / "t.txt").write_bytes(content)
    (tmp_path / f"p.txt{suffix}").write_bytes(compressed(content, suffix))
    for document in ("line", "file"):
        plain = read(f"text:{tmp_path}/t.txt", document=document)
        packed = read(f"text:{tmp_path}/p.txt{suffix}", document=document)
        assert [d.text for d in packed] == [d.text for d in plain]


ROWS = [
    ["id", "text", "who"],
    *([str(i), t, "ab"[i % 2]] for i, t in enumerate(["a,b", 'say "hi"', "two\nlines", "", "六"])),
]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
def test_csv(tmp_path: Path, end: str, encoding: str):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerows([*ROWS[:3], [], *ROWS[3:]])
    (tmp_path / "t.csv").write_bytes(text.getvalue().encode(encoding))
    assert read(f"csv:{tmp_path}/t.csv", encoding=encoding, group_field="who") == [
        Document("t.csv:2", "a,b", "a"),
        Document("t.csv:3", 'say "hi"', "b"),
        Document("t.csv:5", "two\nlines", "a"),  # after a blank row
        Document("t.csv:6", "", "b"),
        Document("t.csv:7", "六", "a"),
    ]
    assert [d.text for d in read(f"csv:{tmp_path}/t.csv", encoding=encoding, header=False, field="1")][:2] == [
        "text",
        "a,b",
    ]
    if encoding != "utf-16":
        units = open_source(f"csv:{tmp_path}/t.csv", DataConfig(encoding=encoding)).units(1)
        assert len(units) == 7, "one a row, the blank one too; none in the middle of a quoted value"


def test_tsv_quotes_nothing(tmp_path: Path):
    (tmp_path / "t.tsv").write_text('text\tn\n"one\t1\nit\'s "two"\t2\r\n\n三\t3')
    expected = [("t.tsv:2", '"one', "1"), ("t.tsv:3", 'it\'s "two"', "2"), ("t.tsv:5", "三", "3")]
    assert [(d.key, d.text, d.group) for d in read(f"tsv:{tmp_path}/t.tsv", group_field="n")] == expected
    assert [d.text for d in read(f"tsv:{tmp_path}/t.tsv", field="1", header=False)] == ["n", "1", "2", "3"]


@pytest.mark.parametrize("row_group_size", [3, 100])
def test_parquet(tmp_path: Path, row_group_size: int):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"text {i} 文" * (i % 5) for i in range(40)]
    table = pa.table({"n": list(range(40)), "text": texts, "who": [b"x", None] * 20, "lines": [["a", "b"]] * 40})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=row_group_size)
    found = read(f"parquet:{tmp_path}/*.parquet", group_field="who")
    assert found == [Document(f"t.parquet:{i + 1}", text, ["x", None][i % 2]) for i, text in enumerate(texts)]
    opened = open_source(f"parquet:{tmp_path}/t.parquet", DataConfig())
    assert len(opened.units(1)) == -(-40 // row_group_size)
    assert read(f"parquet:{tmp_path}/t.parquet", field="lines")[0].text == "a\nb"


def test_json_lists_and_lists_of_strings(tmp_path: Path):
    poems = [{"lines": ["一", "二"], "n": 3}, {"lines": [], "n": None}, {"lines": "三 \ud83d", "n": "x\ud83d"}]
    (tmp_path / "t.json").write_text(json.dumps(poems))
    expected = [("一\n二", "3"), ("", None), ("三 \ufffd", "x?")]
    found = read(f"json:{tmp_path}/t.json", field="lines", group_field="n")
    assert found == [Document(f"t.json:{i}", *values) for i, values in enumerate(expected, 1)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(poem) for poem in poems))
    found = read(f"jsonl:{tmp_path}/t.jsonl", field="lines", group_field="n")
    assert [(d.text, d.group) for d in found] == expected


def test_html_goes_by_the_page_not_by_the_setting(tmp_path: Path):
    body = "价格：五十元，欢迎大家来这里参观。"
    pages = {
        "big5.html": '<meta charset="big5"><p>' + "歡迎大家來這裡參觀",
        "gb.html": f'<meta http-equiv="Content-Type" content="text/html; charset=gb2312"><p>{body}',
        "utf16.html": f"<p>{body}",
        "utf8.html": f'<meta charset="gbk"><p>{body}',  # pages say all sorts of things
    }
    codecs = {"big5.html": "big5", "gb.html": "gb18030", "utf16.html": "utf-16", "utf8.html": "utf-8"}
    for name, page in pages.items():
        (tmp_path / name).write_bytes(page.encode(codecs[name]))
    found = read(f"html:{tmp_path}/*.html", encoding="ascii")
    assert [(d.key, d.text) for d in found] == sorted(pages.items())


@pytest.mark.parametrize(
    "codec", ["gb18030", "big5", "utf-16", "utf-16-le", "utf-32", "cp932", "latin-1", "utf-8", "utf-8-sig"]
)
@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
def test_encodings_named_and_found_out(tmp_path: Path, codec: str, document: str):
    line = {"cp932": "日本語のテキストです。これは", "latin-1": "Größe und Übermaß für Mädchen"}.get(
        codec, "我們在這裡說的是中國的文字" if codec == "big5" else "我们在这里说的是中国的文字，上来就是"
    )
    # The letters that tell come after more than a sample of plain ASCII.
    text = f"plain {'words ' * 100}\n\n" * (2000 if codec != "utf-16-le" else 1) + f"{line}\n" * 60
    (tmp_path / "t.txt").write_bytes(text.encode(codec))
    expected = {"file": [text], "line": text.splitlines(), "paragraph": text.removesuffix("\n").split("\n\n")}[document]
    for encoding in (codec, "auto"):
        opened = open_source(f"text:{tmp_path}/t.txt", DataConfig(encoding=encoding, document=document))
        assert [d.text for d in opened.documents()] == expected
        assert [d.text for unit in opened.units(100_000) for d in opened.read(unit)] == expected


def test_a_file_is_cut_in_the_encoding_that_is_found_out(tmp_path: Path):
    text = "plain\n" * 200_000 + "这是一个中文的句子，我们都看得到。\n" * 1000
    (tmp_path / "t.txt").write_bytes(text.encode("gb18030"))
    opened = open_source(f"text:{tmp_path}/t.txt", DataConfig(encoding="auto", document="line"))
    units = opened.units(100_000)
    assert len(units) > 10
    assert [d.text for unit in units for d in opened.read(unit)] == text.splitlines()


def test_long_utf8_is_found_out_whatever_character_a_sample_ends_in(tmp_path: Path):
    for end in (b"", "é".encode("latin-1")):
        content = ("的" * 1_200_000).encode() + end
        (tmp_path / "t.txt").write_bytes(content)
        opened = open_source(f"text:{tmp_path}/t.txt", DataConfig(encoding="auto", on_error="skip"))
        found = [document.text for document in opened.documents()]
        assert found == ([] if end else [content.decode()])


def test_what_shapes_a_form():
    old = DataConfig(document="line", field="body")
    assert shaping("text:x", old) == {"document": "line"}
    assert shaping("jsonl:x", old) == {"field": "body"}
    assert shaping("tfds:x", old) == {"field": "body"}
    assert shaping("python-stdlib", old) == {}
    assert shaping("text:x", DataConfig(encoding="utf8", max_document_bytes=5)) == {"document": "file"}
    skip = DataConfig(on_error="skip", encoding="GBK", max_document_bytes=5, header=False, group_field="who")
    expected = {"on_error": "skip", "encoding": "gbk", "max_document_bytes": 5}
    assert shaping("text:x", skip) == {"document": "file", **expected}
    assert shaping("csv:x", skip) == {"field": "text", "group_field": "who", "header": False, **expected}


@needs_data
def test_hotel_reviews():
    """BOM, quoted quotes, one empty review: 7,766 rows."""
    found = read(f"csv:{DATA}/zh/ChnSentiCorp_htl_all.csv", field="review", group_field="label")
    assert len(found) == 7766
    assert sum(not d.text.strip() for d in found) == 1
    assert found[0].text.startswith('距离川沙公路较近,但是公交指示不对,如果是"蔡陆线"的话')
    assert {d.group for d in found} == {"0", "1"}
    assert sum(d.group == "1" for d in found) == 5322


@needs_data
def test_tables_without_header():
    sst2 = read(f"tsv:{DATA}/sst2/*.tsv", field="0", group_field="1", header=False)
    assert [sum(d.key.startswith(name) for d in sst2) for name in ("train", "dev", "test")] == [6920, 872, 1821]
    assert {d.group for d in sst2} == {"0", "1"}
    news = read(f"tsv:{DATA}/zh/thucnews_short_dev.txt", field="0", group_field="1", header=False)
    assert len(news) == 10_000
    assert {d.group for d in news} == set("0123456789")


@needs_data
def test_poems():
    found = read(f"json:{DATA}/zh/*.json", field="paragraphs", group_field="author")
    by_file = [len(json.loads(path.read_text())) for path in sorted((DATA / "zh").glob("*.json"))]
    assert len(found) == sum(by_file)
    assert found[0].text.splitlines()[0] == "秦川雄帝宅，函谷壯皇居。"
    assert found[0].group == "太宗皇帝"


@needs_data
def test_web_pages():
    pages = read(f"html:{DATA}/noisy_html/html/*.html")
    assert len(pages) == 25
    assert all("<html" in page.text.lower() for page in pages)
    for page in pages:
        assert page.text == (DATA / "noisy_html" / "html" / page.key).read_bytes().decode("utf-8-sig")


HUGGING_FACE = """
import sys
from pathlib import Path
import datasets
from lm.data.config import DataConfig
from lm.data.sources import open_source
folder = Path(sys.argv[1])
texts = [f"text {i} 文" for i in range(20)]
rows = datasets.Dataset.from_dict({"text": texts, "who": [i % 3 for i in range(20)], "more": texts})
datasets.DatasetDict({"train": rows, "test": rows.select([3, 1])}).save_to_disk(str(folder / "saved"))
(folder / "parquet").mkdir()
rows.to_parquet(str(folder / "parquet" / "train.parquet"))
def read(source, **settings):
    opened = open_source(source, DataConfig(source=source, **settings))
    found = [(d.key, d.text, d.group) for d in opened.documents()]
    assert found == [(d.key, d.text, d.group) for u in opened.units(100) for d in opened.read(u)]
    assert all(path.is_file() for _, path in opened.files())
    return found
expected = [(f"train:{i}", text, str(i % 3)) for i, text in enumerate(texts)]
assert read(f"hf:{folder}/saved", group_field="who") == expected
assert read(f"hf:{folder}/saved#test") == [("test:0", texts[3], None), ("test:1", texts[1], None)]
assert read(f"hf:{folder}/parquet", group_field="who") == expected
assert len(read(f"hf:{folder}/parquet#train[:5]")) == 5
(folder / "parquet" / "README.md").write_text('''---
configs:
- config_name: small
  data_files: train.parquet
- config_name: other
  data_files: none.parquet
---
''')
assert read(f"hf:{folder}/parquet@small", group_field="who") == expected
from lm.errors import UserError
for source, message in [(f"{folder}/saved#none", "has no split"), (f"{folder}/nothing", "cannot open source")]:
    try:
        read("hf:" + source)
    except UserError as error:
        assert "cannot open source" in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError(source)
try:
    read(f"hf:{folder}/saved", field="body")
except UserError as error:
    assert "no column 'body'; it has 'text', 'who', 'more'" in str(error), error
print("all well")
"""


def test_hugging_face(tmp_path: Path):
    """In a process of its own: the package patches others, and it looks for a hub unless told not to."""
    pytest.importorskip("datasets", reason="needs the package datasets")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", HUGGING_FACE, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("all well\n"), done.stderr
