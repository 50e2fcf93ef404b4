"""The page of a preparation says what the JSON says, and text from a corpus stays text on it."""

import errno
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lm.cli import main
from lm.data.config import DataConfig
from lm.data.manifest import FORMAT_VERSION, Manifest, SourceFile, SplitCounts, load_manifest, save_manifest
from lm.data.prepare import prepare
from lm.errors import UserError
from lm.report import left_out, preparation_report
from lm.report.page import Html, bars, element, number, page, percent, size
from lm.report.texts import differences, excerpt, shown
from lm.text.clean import CleanConfig, Cleaner
from lm.text.dedup import DedupConfig
from lm.text.tokenizer import TokenizerConfig

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'></td></main>&lt;b&gt;"
BIDI = "abc\u202egnp.exe\u2066 \u05e9\u05dc\u05d5\u05dd"
CONTROLS = "bell\x07 escape\x1b[31m null\x00 zero\u200bwidth\ufeff"
CHINESE = "今天天气很好，我们去公园散步。"
RULES = ("control", "halfwidth", "whitespace", "mask_emails", "length")


def clean_report(texts: list[str]) -> dict[str, Any]:
    cleaner = Cleaner(CleanConfig(rules=RULES, min_characters=12))
    for text in texts:
        cleaner(text)
    return cleaner.report.to_dict()


def split(documents: int, tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "documents": documents,
        "records": documents,
        "tokens": tokens,
        "bytes": 4 * tokens,
        "characters": 3 * tokens,
        "length_bins": {"3": documents - 2, "5": 2},
        "sampled_characters": 2 * tokens,
        "ngrams": {"1": [["的", 1234], [HOSTILE, 77]], "2": [["of the", 321]], "3": []},
        "unknown_tokens": None,
        "unused_tokens": 17,
        "frequent_tokens": [["çļĦ", 4321], ["Ġthe", 1111], ["ä½", 99], ["<|endoftext|>", 12]],
        **more,
    }


def pair(kind: str, removed: str, kept: str) -> dict[str, str]:
    return {
        "kind": kind,
        "removed_key": f"{HOSTILE}:1",
        "removed_split": "train",
        "removed_text": removed,
        "kept_key": f"{CHINESE}:2",
        "kept_split": "test",
        "kept_text": kept,
    }


def content() -> dict[str, Any]:
    texts = [
        f"{BIDI} {HOSTILE}",
        f"{CONTROLS} and more text",
        f"{CHINESE}３月　 \tok",
        "short",
        "write to a.b@example.org now",
    ]
    clean = clean_report(texts)
    return {
        "reading": {
            "documents": {"source": {"read": 12_007, "empty": 3, "dropped": clean["documents"] - clean["kept"]}},
            "skipped": {
                "source": {
                    "total": 5,
                    "counts": {"not UTF-8": 4, "no JSON": 1},
                    "examples": {"not UTF-8": [f"a.txt {HOSTILE}"], "no JSON": [f"b.jsonl:3 {BIDI}"]},
                }
            },
            "clean": clean,
        },
        "duplicates": {
            "removed": {"exact duplicate": 1_000, "near duplicate": 250, "repeated lines": 0},
            "across_splits": {"train document that also stands in test": 41},
            "lines_removed": 4_567,
            "examples": [
                pair("near", f"the quick brown fox {CHINESE}", f"the quick red fox {CHINESE}"),
                pair("exact", f"The same {HOSTILE}", f"The same {HOSTILE}"),
            ],
        },
        "splits": {"train": split(10_000, 1_234_567), "validation": split(500, 60_000), "test": split(253, 30_001)},
        "tokenizer": {"kind": "bpe", "vocab_size": 4_000},
    }


def manifest() -> Manifest:
    return Manifest(
        name="corpus",
        format_version=FORMAT_VERSION,
        fingerprint="d0e7453f9d9b",
        settings={
            "data": {"source": f"text:{HOSTILE}", "validation_source": None, "split_seed": 0},
            "clean": {"rules": list(RULES), "blocked_words": None},
        },
        splits={
            name: SplitCounts(documents=1, records=1, tokens=1, bytes=1) for name in ("train", "validation", "test")
        },
        skipped_documents=3,
        removed_documents={"unreadable": 5, "cleaning": 1, "exact duplicate": 1_000, "near duplicate": 250},
        licence=f"CC BY 4.0 {HOSTILE}",
        packages={"ftfy": "6.3.1"},
        sources={"source": [SourceFile(path=f"{HOSTILE}/{CHINESE}.txt", bytes=9_876_543, blake2b="ab" * 16)]},
        tokenizer_fingerprint="5221d9d2f80bd79c",
        vocab_size=4_000,
        eos_id=0,
        files={},
    )


def dataset(folder: Path, content: dict[str, Any], manifest: Manifest, decoder: str = "ByteLevel") -> Path:
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"decoder": {"type": decoder}}), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    save_manifest(manifest, folder)
    return folder


class Page(HTMLParser):
    """Elements as (path of names, attributes), the text of the whole and the cells of tables by section."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.section = ""
        self.text: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self.VOID:
            return
        self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data
        if "td" in self.open or "th" in self.open:
            self.rows[self.section][-1][-1] += data

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.elements}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(tmp_path_factory.mktemp("dataset"), content(), manifest())


@pytest.fixture(scope="module")
def parsed(folder: Path) -> Page:
    return Page(preparation_report(folder).read_text(encoding="utf-8"))


def test_the_file_stands_in_the_dataset_and_its_bytes_depend_on_it_alone(folder: Path, tmp_path: Path):
    path = preparation_report(folder)
    assert path == folder / "report.html"
    before = path.stat().st_mtime_ns
    assert preparation_report(folder).stat().st_mtime_ns == before, "written again without need"
    other = preparation_report(dataset(tmp_path, content(), manifest()))
    assert other.read_bytes() == path.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "manifest.json",
        "report.html",
        "report.json",
        "tokenizer",
    ]


def test_a_stale_page_is_replaced(tmp_path: Path):
    dataset(tmp_path, content(), manifest())
    (tmp_path / "report.html").write_text("old")
    assert "corpus" in preparation_report(tmp_path).read_text(encoding="utf-8")


def test_it_needs_nothing_from_elsewhere_and_runs_nothing(parsed: Page):
    assert not parsed.names & {"script", "iframe", "img", "object", "embed", "base", "form", "b"}
    for name, attributes in parsed.elements:
        assert not [key for key in attributes if key.startswith("on") or key in ("src", "srcset")]
        if "href" in attributes:
            assert name in ("a", "link")
            assert (attributes["href"] or "").startswith(("#", "data:,"))
    assert {"http-equiv": "Content-Security-Policy"}.items() <= next(
        attributes for name, attributes in parsed.elements if "http-equiv" in attributes
    ).items()
    targets = {attributes["id"] for name, attributes in parsed.elements if name == "section"}
    assert {f"#{target}" for target in targets} == {a["href"] for name, a in parsed.elements if name == "a"}


@pytest.mark.parametrize("section", ["", "unreadable", "cleaning", "duplicates", "ngrams", "origin"])
def test_hostile_text_is_there_as_text(section: str, parsed: Page):
    assert "<script>alert(1)</script>" in parsed.text[section]


def test_hidden_characters_are_shown_and_never_in_the_file(folder: Path, parsed: Page):
    source = preparation_report(folder).read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff]", source)
    for code in ("U+0000", "U+0007", "U+001B", "U+200B", "U+FEFF"):
        assert code in parsed.text["cleaning"]
    assert "U+202E" in parsed.text["unreadable"]
    assert "\u05e9\u05dc\u05d5\u05dd" in parsed.text["unreadable"]  # Hebrew itself stays


def test_every_document_is_accounted_for(parsed: Page):
    made = content()
    rows = {row[0]: row for row in parsed.rows["way"]}
    count = {name: int(row[2].replace(",", "")) for name, row in rows.items() if name != "documents"}
    assert count["found in the sources"] == 12_007 + 5
    assert count["− unreadable: not UTF-8"] == 4
    assert count["− cleaning: length"] == made["reading"]["clean"]["rules"]["length"]["dropped"] == 1
    assert count["− empty"] == 3
    assert count["− exact duplicate"] == 1_000
    assert "− repeated lines" not in count
    assert count["= written"] == 10_753
    gone = sum(value for name, value in count.items() if name.startswith("−"))
    assert count["found in the sources"] - gone == count["= written"]
    assert rows["− exact duplicate"][3] == f"{1000 / 12012:.1%}"


def test_what_is_left_out_agrees_with_the_manifest(folder: Path):
    assert_agrees(dict(left_out(folder)), manifest())


def assert_agrees(reasons: dict[str, int], manifest: Manifest) -> None:
    by_kind: dict[str, int] = {}
    for reason, count in reasons.items():
        kind = reason.partition(":")[0]
        by_kind[kind] = by_kind.get(kind, 0) + count
    assert by_kind.pop("empty", 0) == manifest.skipped_documents
    assert by_kind == manifest.removed_documents


def test_a_dataset_as_it_is_prepared(tmp_path: Path):
    """From text to the page: all sections find what they need in what the preparation writes."""
    sentence = "The {} of the house stood {} at the window and looked at the street for a while.\n"
    lines = [sentence.format(f"person{i}", f"quietly{i % 7}") for i in range(120)]
    lines += [lines[0], lines[1], "short\n", "\n", f"３ full-width digits, {CHINESE} {HOSTILE}\n"]
    (tmp_path / "corpus.txt").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfd\xfc\x81\n" * 4)
    data = DataConfig(
        name="made",
        source=f"text:{tmp_path}/*.txt",
        document="line",
        root=str(tmp_path / "root"),
        validation_fraction=0.2,
        test_fraction=0.1,
        on_error="skip",
    )
    clean = CleanConfig(rules=RULES, min_characters=12)
    folder = prepare(data, TokenizerConfig(kind="byte"), clean=clean, dedup=DedupConfig(exact=True))
    parsed = Page(preparation_report(folder).read_text(encoding="utf-8"))
    found = load_manifest(folder)
    assert_agrees(dict(left_out(folder)), found)
    assert dict(left_out(folder))["exact duplicate"] == 2
    assert dict(left_out(folder))["unreadable: undecodable text"] >= 1
    count = {row[0]: row[2].replace(",", "") for row in parsed.rows["way"][1:]}
    gone = sum(int(value) for name, value in count.items() if name.startswith("−"))
    written = sum(counts.documents for counts in found.splits.values())
    assert int(count["found in the sources"]) - gone == int(count["= written"]) == written
    rows = {row[0]: row[1:] for row in parsed.rows["splits"]}
    for name, counts in found.splits.items():
        assert rows[name][:2] == [number(counts.documents), number(counts.tokens)]
        assert rows[name][3] == number(counts.bytes)
    assert "of the" in {row[0] for row in parsed.rows["ngrams"]}
    sections = [attributes["id"] for name, attributes in parsed.elements if name == "section"]
    assert {"way", "splits", "lengths", "unreadable", "cleaning", "duplicates", "ngrams", "tokenizer", "origin"} <= set(
        sections
    )


def test_copies_are_told_apart_from_documents(tmp_path: Path):
    made = content()
    made["splits"]["train"]["documents"] += 10_000
    rows = {
        row[0]: row for row in Page(preparation_report(dataset(tmp_path, made, manifest())).read_text()).rows["way"]
    }
    assert rows["+ altered copies (augmentation)"][2] == "10,000"
    assert rows["= written"][2] == "20,753"


def test_splits_lengths_and_tokens(parsed: Page):
    rows = {row[0]: row[1:] for row in parsed.rows["splits"]}
    assert rows["train"] == ["10,000", "1,234,567", f"{1234567 / 1324568:.1%}", "4,938,268", "3,703,701", "0.250"]
    assert rows["test"][:2] == ["253", "30,001"]
    lengths = parsed.rows["lengths"]
    # Bin b holds 2**b to 2**(b+1) - 1 characters; an empty one between others is there.
    assert [row[0] for row in lengths[:4]] == ["characters", "8 – 15", "16 – 31", "32 – 63"]
    assert [row[2] for row in lengths[1:4]] == ["9,998", "0", "2"]
    assert lengths[3][3] == "<0.1%"
    assert len(lengths) == 3 * 4
    tokenizer = {row[0]: row[1:] for row in parsed.rows["tokenizer"]}
    assert tokenizer["tokens per document"] == ["123.5", "120.0", "118.6"]
    assert tokenizer["bytes per token"] == ["4.00"] * 3
    assert tokenizer["characters per token"] == ["3.00"] * 3
    assert tokenizer["unused vocabulary"] == ["17"] * 3
    assert "unknown tokens" not in tokenizer
    assert "5221d9d2f80bd79c" in parsed.text["tokenizer"]


def test_bars_are_as_long_as_the_counts(parsed: Page):
    widths = [a["style"] for name, a in parsed.elements if name == "span" and a.get("class") in ("some", "none")]
    counts = [12_012, 4, 1, 1, 3, 1_000, 250, 10_753]
    assert widths[: len(counts)] == [f"width:{100 * count / 12_012:.1f}%" for count in counts]


def test_byte_level_pieces_are_read_as_text_and_others_left_alone(parsed: Page, tmp_path: Path):
    labels = [row[0] for row in parsed.rows["tokenizer"]]
    assert {"的", "␣the", "<0xE4> <0xBD>", "<|endoftext|>"} <= set(labels)
    made = preparation_report(dataset(tmp_path, content(), manifest(), decoder="WordPiece"))
    assert "çļĦ" in {row[0] for row in Page(made.read_text(encoding="utf-8")).rows["tokenizer"]}


def test_every_byte_of_a_byte_level_piece_is_known():
    """Against the table of the tokenizers package: all bytes of text come back."""
    import tokenizers

    from lm.report.pieces import spelled

    text = "".join(map(chr, range(33, 0x2FF))) + CHINESE
    (piece,) = [part for part, _ in tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)]
    assert spelled(piece, True) == text
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert sum(re.fullmatch("<0x[0-9A-F]{2}>", spelled(char, True)) is not None for char in alphabet) == 128


def test_unknown_tokens_and_what_to_look_at_first(tmp_path: Path):
    made = content()
    for part in made["splits"].values():
        part.update(unknown_tokens=part["tokens"] // 50, unused_tokens=3_000)
    made["duplicates"]["removed"]["exact duplicate"] = 9_000
    parsed = Page(preparation_report(dataset(tmp_path, made, manifest())).read_text(encoding="utf-8"))
    tokenizer = {row[0]: row[1:] for row in parsed.rows["tokenizer"]}
    assert tokenizer["unknown tokens"] == ["24,691", "1,200", "600"]
    notes = parsed.text["first"]
    assert "2.0% of the tokens in train are unknown" in notes
    assert "75.0% of the vocabulary never occurs in train: 3,000" in notes
    assert f"{9259 / 12012:.1%} of what the sources hold was left out: 9,259 of 12,012" in notes
    assert "41 × train document that also stands in test" in notes


def test_rules_with_counts_and_examples(parsed: Page):
    clean = content()["reading"]["clean"]
    overview = {row[0]: row for row in parsed.rows["cleaning"][1 : 1 + len(RULES)]}
    assert list(overview) == list(RULES)
    for name, rule in clean["rules"].items():
        assert overview[name][1] == number(rule["changed"])
        assert overview[name][3] == number(rule["dropped"])
        assert overview[name][5:] == [number(rule[what]) for what in ("seen", "characters_in", "characters_out")]
    assert "example.org" not in parsed.text["cleaning"]
    assert "<EMAIL>" in parsed.text["cleaning"]


def test_sections_without_content_are_left_out(tmp_path: Path):
    made = content()
    made["reading"]["clean"] = clean_report([]) | {"rules": {}}
    made["reading"]["skipped"]["source"] = {"total": 0, "counts": {}, "examples": {}}
    made["duplicates"] = {"removed": {"exact duplicate": 0}, "across_splits": {}, "lines_removed": 0, "examples": []}
    for part in made["splits"].values():
        part.update(ngrams={"1": [], "2": []}, length_bins={})
    made["splits"]["train"]["documents"] = 12_004 - 753
    parsed = Page(preparation_report(dataset(tmp_path, made, manifest())).read_text(encoding="utf-8"))
    assert [a["id"] for name, a in parsed.elements if name == "section"] == ["way", "splits", "tokenizer", "origin"]
    for name, rows in parsed.rows.items():
        assert all(any(row) for row in rows), name


def test_a_damaged_or_locked_dataset_is_one_line(tmp_path: Path):
    dataset(tmp_path, content(), manifest())
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"^cannot write .*report\.html: .*; the dataset itself is whole$"):
        preparation_report(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        preparation_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        preparation_report(tmp_path)
    (tmp_path / "report.json").unlink()
    with pytest.raises(UserError, match=r"no report without .*report\.json; delete"):
        preparation_report(tmp_path)


def test_the_command_says_what_was_left_out_and_where_the_page_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("one line\n \nanother line\n", encoding="utf-8")
    command = ["prepare", "--data.source", "text:corpus.txt", "--data.document", "line", "--data.root", "root"]
    command += ["--data.name", "made", "--tokenizer.kind", "byte", "--data.validation-fraction", "0"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert re.search(r"│ empty +│ +1 │", out)
    assert re.search(r"train +│ +2 │", out)
    (path,) = Path("root").rglob("report.html")
    assert f"report {path}" in out
    # A folder that can't be written: the dataset serves all the same.
    path.unlink()
    path.mkdir()
    assert main(command) == 0
    said = capsys.readouterr()
    assert re.search(r"train +│ +2 │", said.out)
    assert re.fullmatch(r"lm: cannot write .*report\.html: .*; the dataset itself is whole\n", said.err)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset(tmp_path, content(), manifest())
    before = sorted(tmp_path.iterdir())

    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"report\.html: No space left on device; the dataset itself is whole$"):
        preparation_report(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


# The pieces of a page.


def test_only_markup_is_not_escaped():
    assert element("p", "<b>", Html("<i></i>"), 3, None) == "<p>&lt;b&gt;<i></i>3</p>"
    assert element("a", href='"><script>') == '<a href="&quot;&gt;&lt;script&gt;"></a>'
    assert element("details", open=True, id=None, hidden=False) == "<details open></details>"
    assert element("p", class_="a", aria_label="b") == '<p class="a" aria-label="b"></p>'
    assert "&lt;b&gt; $title" in page("<b> $title", Html(""), [("<i>", "<u>")], [])


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 7, "0.0%"), (1, 10_000, "<0.1%"), (1, 3, "33.3%"), (9_999, 10_000, ">99.9%"), (7, 7, "100.0%"), (0, 0, "–")],
)
def test_shares(part: int, whole: int, text: str):
    assert percent(part, whole) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_960, "100 kB"), (999_600, "1.0 MB"), (1_211_683, "1.2 MB")],
)
def test_sizes(count: int, text: str):
    assert size(count) == text


def test_bars_of_nothing_have_no_length():
    assert "width:0.0%" in bars(("x", "name"), [("a", 0)])


def marks(text: str) -> list[str]:
    return [html.unescape(re.sub("<[^>]*>", "", part)) for part in re.findall("<mark>(.*?)</mark>", text, re.DOTALL)]


def plain(text: str) -> str:
    return html.unescape(re.sub("<[^>]*>", "", text))


@pytest.mark.parametrize(
    ("before", "after", "by", "gone", "new"),
    [
        ("３月３１日", "3月31日", "character", ["３", "３１"], ["3", "31"]),
        ("a  b", "a b", "character", ["·"], []),
        ("a\u00a0b", "a b", "character", ["U+00A0"], ["·"]),
        ("a\r\nb", "a\nb", "character", ["U+000D"], []),
        ("a\u200db", "ab", "character", ["U+200D"], []),
        ("the quick fox", "the quack fox", "word", ["quick"], ["quack"]),
        ("今天很好", "今天不好", "word", ["很"], ["不"]),
        ("xxxx xx x.x@xxx.xxx xxx", "mail to <EMAIL> now", "mask", ["x.x@xxx.xxx"], ["<EMAIL>"]),
        ("same", "same", "word", [], []),
        ("", "new", "character", [], ["new"]),
    ],
)
def test_what_differs_is_marked(before: str, after: str, by: Any, gone: list[str], new: list[str]):
    left, right = differences(before, after, by=by, cut=80)
    assert (marks(left), marks(right)) == (gone, new)


def test_a_block_of_text_runs_in_its_own_direction():
    """`dir=auto` looks past what is in a `bdi`, so the text must not be in one."""
    for block in (excerpt("\u05e9\u05dc\u05d5\u05dd", cut=9), *differences("a b", "a c", by="word", cut=9)):
        assert block.startswith('<div class="excerpt" dir="auto">')
        assert "<bdi" not in block


def test_what_an_excerpt_cuts_off_is_no_difference():
    before, after = "a  " + "b" * 77, "a " + "b" * 77 + "c"
    left, right = differences(before, after, by="character", cut=80)
    assert (marks(left), marks(right)) == (["·"], [])
    assert plain(left) == "a ·" + "b" * 77 + "…"
    _, right = differences("a" * 79, "a" * 79 + "c", by="character", cut=90)
    assert marks(right) == ["c"]


def test_text_stays_what_it_is():
    assert plain(excerpt(f"{CHINESE}\n\tநன்றி 👩\u200d💻", cut=80)) == f"{CHINESE}\n\tநன்றி 👩\u200d💻"
    assert shown("<b>") == "<bdi>&lt;b&gt;</bdi>"
    assert plain(shown("\ud800\uffff")) == "U+D800U+FFFF"
    assert plain(excerpt("abc", cut=3)) == "abc…"


def test_excerpts_are_as_long_as_their_writers_cut_them():
    from lm.report import examples
    from lm.text.report import change_example

    example = change_example("a" * 500, "b" * 500, hide=None, private=False)
    assert len(example["before"]) == len(example["after"]) == examples._CHANGE_CUT


# In a browser.

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_it_without_a_complaint(tmp_path: Path):
    path = preparation_report(dataset(tmp_path / "data # 数据", content(), manifest()))
    dom, log = browse(path, tmp_path)
    assert "CONSOLE" not in log, log
    assert "1,234,567" in dom
    assert CHINESE in dom
    parsed = Page(re.sub("^<!DOCTYPE html>", "", dom))
    assert "script" not in parsed.names
    written = Page(path.read_text(encoding="utf-8"))
    assert {name: text.split() for name, text in parsed.text.items()} == {
        name: text.split() for name, text in written.text.items()
    }
    # A planted mistake is seen: the page's own policy refuses the script, and the console says so.
    planted = tmp_path / "planted.html"
    planted.write_text(path.read_text(encoding="utf-8").replace("<main>", "<main><script>document.title = 1</script>"))
    _, log = browse(planted, tmp_path)
    assert "Content Security Policy" in log


def browse(path: Path, folder: Path) -> tuple[str, str]:
    """The document as Chromium holds it, and what it logged."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    options += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.absolute().as_uri()]
    done = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr
