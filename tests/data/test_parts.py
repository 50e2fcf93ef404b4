"""Documents of several parts and with classes: from columns, parallel files and sentences to a dataset's index."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.data.config import DataConfig
from lm.data.export import export_jsonl_zst
from lm.data.manifest import load_manifest
from lm.data.parts import PartCutter, as_one_text, sorted_labels
from lm.data.prepare import prepare
from lm.data.runners import RunnerConfig
from lm.data.store import DatasetStore, MemoryStore, TokenStore, part_stops
from lm.data.writer import RECORD_TOKENS
from lm.errors import UserError
from lm.text.augment import AugmentConfig
from lm.text.clean import CleanConfig
from lm.text.dedup import DedupConfig
from lm.text.tokenizer import TokenizerConfig

BYTE = TokenizerConfig(kind="byte")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def texts_of(store: TokenStore) -> list[list[str]]:
    """The parts of every document of a byte-level dataset, as text."""
    assert store.part_starts is not None
    assert store.part_offsets is not None
    stops = part_stops(store)
    return [
        [
            bytes(store.read(int(store.part_starts[part]), int(stops[part])).tolist()).decode()
            for part in range(first, last)
        ]
        for first, last in zip(store.part_offsets, store.part_offsets[1:])
    ]


ROWS = [
    {"de": "Ein Hund.", "en": "A dog.", "class": "b"},
    {"de": "Zwei Katzen, drei Mäuse.", "en": "Two cats, three mice.", "class": "a"},
    {"de": "中文\x1d。", "en": "x" * (RECORD_TOKENS + 5), "class": "b"},
    {"de": "Lang " * 9000, "en": "kurz", "class": "a"},
]


@pytest.mark.parametrize("workers", [1, 2])
def test_columns_become_parts_and_classes_ids(tmp_path: Path, workers: int) -> None:
    write_rows(tmp_path / "t.jsonl", ROWS)
    data = DataConfig(
        source=f"jsonl:{tmp_path}/t.jsonl",
        fields=("de", "en"),
        label_field="class",
        validation_fraction=0,
        root=str(tmp_path / "d"),
    )
    folder = prepare(data, BYTE, runner=RunnerConfig(workers=workers))
    store = DatasetStore(folder, "train")
    expected = [[row["de"].replace("\x1d", " "), row["en"]] for row in ROWS]
    assert texts_of(store) == expected
    assert load_manifest(folder).labels == ["a", "b"]
    assert store.labels is not None
    assert store.labels.tolist() == [1, 0, 1, 0]
    # Parts lie one after another, and one end-of-document token closes the last.
    assert np.diff(store.document_offsets).tolist() == [len("".join(row).encode()) + 1 for row in expected]
    export_jsonl_zst(folder, tmp_path / "out")
    zstandard = pytest.importorskip("zstandard")
    packed = (tmp_path / "out" / "train.jsonl.zst").read_bytes()
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(packed).decode().splitlines()
    found = [json.loads(line) for line in lines]
    assert [row["parts"] for row in found] == expected
    assert [row["label"] for row in found] == ["b", "a", "b", "a"]


def test_parts_are_told_apart_over_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm.data.prepare._SHARD_BYTES", 300)
    rows = [{"a": f"source {i} " * (i % 4 + 1), "b": f"target {i}", "y": str(i % 3)} for i in range(60)]
    write_rows(tmp_path / "t.jsonl", rows)
    data = DataConfig(
        source=f"jsonl:{tmp_path}/t.jsonl",
        fields=("a", "b"),
        label_field="y",
        validation_fraction=0,
        root=str(tmp_path / "d"),
    )
    folder = prepare(data, BYTE)
    assert len(list(folder.glob("*array_record*"))) > 5
    store = DatasetStore(folder, "train")
    assert texts_of(store) == [[row["a"], row["b"]] for row in rows]
    assert store.labels is not None
    assert store.labels.tolist() == [i % 3 for i in range(60)]


def test_a_table_without_names_gives_parts_and_classes(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("good film\tfine\t10\nbad film\tpoor\t9\n", encoding="utf-8")
    data = DataConfig(
        source=f"tsv:{tmp_path}/t.tsv",
        header=False,
        fields=("0", "1"),
        label_field="2",
        validation_fraction=0,
        root=str(tmp_path / "d"),
    )
    folder = prepare(data, BYTE)
    assert texts_of(DatasetStore(folder, "train")) == [["good film", "fine"], ["bad film", "poor"]]
    assert load_manifest(folder).labels == ["9", "10"]  # in the order of numbers


def test_parallel_files_pair_up_by_line(tmp_path: Path) -> None:
    (tmp_path / "t.de").write_text("eins\nzwei\r\ndrei\n", encoding="utf-8")
    (tmp_path / "t.en").write_text("one\ntwo\nthree", encoding="utf-8")
    data = DataConfig(
        source=f"parallel:{tmp_path}/t.de,{tmp_path}/t.en", validation_fraction=0, root=str(tmp_path / "d")
    )
    folder = prepare(data, BYTE)
    store = DatasetStore(folder, "train")
    assert texts_of(store) == [["eins", "one"], ["zwei", "two"], ["drei", "three"]]
    assert store.document_key(1) == "t.de:2"
    (tmp_path / "t.en").write_text("one\ntwo\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"t\.en ends before line 3, and another file of the source goes on"):
        prepare(data, BYTE)


def test_sentences_joined_are_the_document(tmp_path: Path) -> None:
    texts = ["One. Two!  Three?\n\nFour", "一句。两句！ 三", "alone"]
    write_rows(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    data = DataConfig(
        source=f"jsonl:{tmp_path}/t.jsonl", sentences=True, validation_fraction=0, root=str(tmp_path / "d")
    )
    parts = texts_of(DatasetStore(prepare(data, BYTE), "train"))
    assert parts == [["One.", " Two!", "  Three?", "\n\nFour"], ["一句。", "两句！", " 三"], ["alone"]]
    assert ["".join(sentences) for sentences in parts] == texts


def test_every_part_is_cleaned_and_one_that_is_dropped_takes_the_document_along(tmp_path: Path) -> None:
    rows = [{"a": "a  b", "b": "x\u200by"}, {"a": "fine", "b": " "}, {"a": "fine", "b": "too long " * 50}]
    write_rows(tmp_path / "t.jsonl", rows)
    data = DataConfig(
        source=f"jsonl:{tmp_path}/t.jsonl", fields=("a", "b"), validation_fraction=0, root=str(tmp_path / "d")
    )
    clean = CleanConfig(rules=("control", "whitespace", "length"), min_characters=1, max_characters=100)
    folder = prepare(data, BYTE, clean=clean)
    assert texts_of(DatasetStore(folder, "train")) == [["a b", "xy"]]
    manifest = load_manifest(folder)
    assert manifest.skipped_documents + sum(manifest.removed_documents.values()) == 2


def test_copies_of_pairs_are_found(tmp_path: Path) -> None:
    rows = [{"a": "eins", "b": "one"}, {"a": "eins", "b": "two"}, {"a": "eins", "b": "one"}]
    write_rows(tmp_path / "t.jsonl", rows)
    data = DataConfig(
        source=f"jsonl:{tmp_path}/t.jsonl", fields=("a", "b"), validation_fraction=0, root=str(tmp_path / "d")
    )
    folder = prepare(data, BYTE, dedup=DedupConfig(exact=True))
    assert texts_of(DatasetStore(folder, "train")) == [["eins", "one"], ["eins", "two"]]


def test_an_unknown_class_of_another_split_is_a_mistake(tmp_path: Path) -> None:
    write_rows(tmp_path / "t.jsonl", [{"text": "x", "y": "a"}, {"text": "z", "y": "b"}])
    write_rows(tmp_path / "v.jsonl", [{"text": "v", "y": "c"}])
    data = {
        "source": f"jsonl:{tmp_path}/t.jsonl",
        "validation_source": f"jsonl:{tmp_path}/v.jsonl",
        "label_field": "y",
        "root": str(tmp_path / "d"),
    }
    with pytest.raises(UserError, match="validation split has the class 'c', which the training split lacks"):
        prepare(DataConfig(**data), BYTE)
    folder = prepare(DataConfig(**data, labels=("c", "b", "a")), BYTE)
    assert load_manifest(folder).labels == ["c", "b", "a"]
    found = DatasetStore(folder, "train").labels
    assert found is not None
    assert found.tolist() == [2, 1]


SEVERAL = [
    {"text": "one", "y": ["b", "a", "b"]},
    {"text": "two", "y": []},
    {"text": "three", "y": ["c"]},
    {"text": "four", "y": ["a", "中"]},
]


def bits_of(store: TokenStore, classes: int) -> list[list[int]]:
    assert store.labels is not None
    assert store.labels.dtype == np.uint8
    return np.unpackbits(store.labels, axis=1, count=classes).tolist()


@pytest.mark.parametrize("form", ["jsonl", "jsonl text", "csv", "parquet"])
def test_documents_of_several_classes(tmp_path: Path, form: str) -> None:
    """A list, or text with a separator; each class once, in any order, or none."""
    joined = [row | {"y": "; ".join(row["y"])} for row in SEVERAL]
    path = tmp_path / f"t.{form.split()[0]}"
    if form == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(__import__("pyarrow").Table.from_pylist(SEVERAL), path)
    elif form == "csv":
        path.write_text("text,y\n" + "".join(f"{row['text']},{row['y']}\n" for row in joined), encoding="utf-8")
    else:
        write_rows(path, SEVERAL if form == "jsonl" else joined)
    data = DataConfig(
        source=f"{form.split()[0]}:{path}",
        label_field="y",
        label_separator=";",
        validation_fraction=0,
        root=str(tmp_path / "d"),
    )
    folder = prepare(data, BYTE)
    assert load_manifest(folder).labels == ["a", "b", "c", "中"]
    assert bits_of(DatasetStore(folder, "train"), 4) == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]
    export_jsonl_zst(folder, tmp_path / "out")
    packed = (tmp_path / "out" / "train.jsonl.zst").read_bytes()
    lines = pytest.importorskip("zstandard").ZstdDecompressor().decompressobj().decompress(packed).decode()
    assert [json.loads(line)["label"] for line in lines.splitlines()] == [sorted(set(row["y"])) for row in SEVERAL]


def test_many_classes_over_shards_and_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever work is cut into, and in whatever order each piece meets the classes."""
    rng = np.random.default_rng(0)
    rows = [
        {"text": f"text {i} " * 4, "y": [str(c) for c in rng.permutation(19)[: rng.integers(0, 6)]]} for i in range(60)
    ]
    for half in (0, 1):
        write_rows(tmp_path / f"{half}.jsonl", rows[half * 30 : half * 30 + 30])
    data = DataConfig(
        source=f"jsonl:{tmp_path}/*.jsonl", label_field="y", label_separator=",", validation_fraction=0,
        root=str(tmp_path / "whole"),
    )  # fmt: skip
    whole = prepare(data, BYTE)
    monkeypatch.setattr("lm.data.prepare._SHARD_BYTES", 300)
    monkeypatch.setattr("lm.data.prepare._UNIT_BYTES", 400)
    cut = prepare(dataclasses.replace(data, root=str(tmp_path / "cut")), BYTE, runner=RunnerConfig(workers=2))
    assert len(list(cut.glob("*array_record*"))) > 5
    names = load_manifest(whole).labels
    assert names == [str(i) for i in range(19)]  # as numbers
    wanted = [[int(name in row["y"]) for name in names] for row in rows]
    for folder in (whole, cut):
        assert bits_of(DatasetStore(folder, "train"), 19) == wanted


ODD = {"y": "a", "z": None, "e": "", "l": ["a", "b"], "n": [], "g": ["a", ""], "h": "a,,b"}
ONE_CLASS = [{"text": "x", **ODD}, {"text": "z", **ODD, "z": [1]}]
PROBLEMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "one field": ({"fields": ("text",)}, {}, "names two or more columns"),
    "twice": ({"fields": ("text", "text")}, {}, "twice"),
    "sentences too": ({"fields": ("text", "y"), "sentences": True}, {}, "leave one out"),
    "lines": ({"fields": ("text", "y")}, {"dedup": DedupConfig(lines=True)}, "dedup.lines"),
    "copies": ({"fields": ("text", "y")}, {"augment": AugmentConfig(copies=1)}, "augment.copies"),
    "labels alone": ({"labels": ("a", "b")}, {}, "data.label_field does not say"),
    "a single label": ({"labels": ("a",), "label_field": "y"}, {}, "two or more classes"),
    "all alike": ({"label_field": "y"}, {}, "all training documents have the class 'a'"),
    "not named": ({"label_field": "y", "labels": ("b", "c")}, {}, "class 'a', which data.labels does not name"),
    "no such column": ({"label_field": "w"}, {}, "no field 'w'"),
    "no such part": ({"fields": ("text", "w")}, {}, "set data.fields"),
    "no class": ({"label_field": "z"}, {}, "holds null, not one value"),
    "an empty class": ({"label_field": "e"}, {}, "field 'e' is empty, and names no class; write it there"),
    "a list for a class": (
        {"label_field": "l"},
        {},
        "holds a list, not one value; .*or data.label_separator where doc",
    ),
    "an empty class named": ({"label_field": "y", "labels": ("a", " ")}, {}, "names the empty class"),
    "a separator alone": ({"label_separator": ","}, {}, "data.label_separator is ','; .*set both, or neither"),
    "an empty separator": ({"label_field": "y", "label_separator": ""}, {}, "data.label_separator is ''"),
    "one of several": (
        {"label_field": "y", "label_separator": ","},
        {},
        r"the training documents have no class but 'a' \(data.label_field 'y'\); a classifier needs two",
    ),
    "none of several": ({"label_field": "n", "label_separator": ","}, {}, "documents have no class at all"),
    "neither list nor text": (
        {"label_field": "z", "label_separator": ","},
        {},
        "holds null, neither a list nor te",
    ),
    "a class without a name": ({"label_field": "g", "label_separator": ","}, {}, "with a class that has no name"),
    "a text with a gap": ({"label_field": "h", "label_separator": ","}, {}, "'a,,b', with a class that has no name"),
    "one of several not named": (
        {"label_field": "l", "label_separator": ",", "labels": ("a", "c")},
        {},
        "class 'b', which data.labels does not name",
    ),
    "text has no fields": ({"source": "text:{}/t.jsonl", "label_field": "y"}, {}, "have no fields"),
    "parallel alone": ({"source": "parallel:{}/t.jsonl"}, {}, "names one file"),
    "parallel gone": ({"source": "parallel:{0}/t.jsonl,{0}/u"}, {}, "no file"),
}


@pytest.mark.parametrize(("settings", "more", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_mistakes_are_told(tmp_path: Path, settings: dict[str, Any], more: dict[str, Any], message: str) -> None:
    write_rows(tmp_path / "t.jsonl", ONE_CLASS)
    settings = {"source": "jsonl:{}/t.jsonl", "validation_fraction": 0, **settings}
    settings["source"] = settings["source"].format(tmp_path)
    with pytest.raises(UserError, match=message):
        prepare(DataConfig(**settings, root=str(tmp_path / "d")), BYTE, **more)
    assert not list((tmp_path / "d").glob("*/*/1.0.0"))


@pytest.mark.parametrize("sentences", [False, True])
def test_where_documents_are_not_joined_the_separator_is_a_character(tmp_path: Path, sentences: bool) -> None:
    text = " \x1done. two\x1d\x1d\nthree"
    write_rows(tmp_path / "t.jsonl", [{"text": text}, {"text": "other"}])
    data = DataConfig(
        source=f"jsonl:{tmp_path}/t.jsonl", validation_fraction=0, root=str(tmp_path / "d"), sentences=sentences
    )
    store = DatasetStore(prepare(data, BYTE), "train")
    assert bytes(store.read(0, int(store.document_offsets[1]) - 1).tolist()).decode() == text
    clean = CleanConfig(rules=("length",), min_characters=10)  # of the whole, not of what stands between
    assert DatasetStore(prepare(data, BYTE, clean=clean), "train").n_tokens == len(text) + 1


def test_small_helpers() -> None:
    assert sorted_labels(["10", "9", "2"]) == ("2", "9", "10")
    assert sorted_labels(["b", "10", "a"]) == ("10", "a", "b")
    assert as_one_text("a\x1db") == "a\nb"
    assert PartCutter(DataConfig(sentences=True))("...") == ["..."]
    store = MemoryStore([np.arange(6), np.arange(4)], part_lengths=[[2, 3], [3]], labels=[1, 0])
    assert store.part_starts is not None
    assert store.part_starts.tolist() == [0, 2, 6]
    assert part_stops(store).tolist() == [2, 5, 9]
