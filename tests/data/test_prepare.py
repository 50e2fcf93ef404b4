"""Preparing: the text comes back from disk token by token, stays in its split, and is whole or not there."""

import dataclasses
import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

import lm.data.atomic
import lm.data.prepare
from lm.data.config import DataConfig
from lm.data.manifest import FORMAT_VERSION, index_path, load_manifest
from lm.data.prepare import prepare, split_of
from lm.data.runners import RunnerConfig
from lm.data.sources import Document, SkipCounts, Unit, documents, open_source
from lm.data.writer import RECORD_TOKENS, ShardWriter
from lm.errors import UserError
from lm.text.augment import AugmentConfig
from lm.text.clean import CleanConfig
from lm.text.dedup import DedupConfig
from lm.text.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer

BYTE = TokenizerConfig(kind="byte")
BPE = TokenizerConfig(kind="bpe", vocab_size=300)


def corpus(folder: Path, count: int = 40) -> DataConfig:
    """Settings for `count` one-paragraph documents, some of them empty."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"document {i}, 第{i}篇: " + "word " * (i % 7) for i in range(count)]
    (folder / "t.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return DataConfig(
        source=f"text:{folder}/*.txt",
        document="paragraph",
        validation_fraction=0.2,
        test_fraction=0.2,
        root=str(folder / "datasets"),
    )


def stored_documents(folder: Path, split: str) -> list[tuple[str, list[int]]]:
    """Key and tokens of each document, put together again from the records that TFDS reads."""
    found: list[tuple[str, list[int]]] = []
    number = -1
    for record in tfds.builder_from_directory(folder).as_data_source(split=split):
        if record["offset"] == 0:
            found.append((record["key"].decode(), []))
            number = record["document"] if record["document"] == 0 else number + 1  # each shard counts its own
        assert record["document"] == number
        assert record["offset"] == len(found[-1][1])
        assert record["tokens"].dtype == np.int32
        assert 0 < len(record["tokens"]) <= RECORD_TOKENS
        found[-1][1].extend(record["tokens"].tolist())
    return found


def expected_documents(data: DataConfig, split: str, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    return [
        (document.key, [*tokenizer.encode(document.text), tokenizer.eos_id])
        for document in documents(data.source, data)
        if split_of(document.text, data) == split and document.text.strip()
    ]


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("config", [BYTE, BPE], ids=["byte", "bpe"])
def test_tfds_reads_back_what_the_tokenizer_says(tmp_path: Path, config: TokenizerConfig):
    data = corpus(tmp_path)
    folder = prepare(data, config)
    manifest = load_manifest(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert tokenizer.fingerprint() == manifest.tokenizer_fingerprint
    assert set(manifest.splits) == {"train", "validation", "test"}
    assert sum(counts.documents for counts in manifest.splits.values()) == 40

    for split, counts in manifest.splits.items():
        stored = stored_documents(folder, split)
        assert stored == expected_documents(data, split, tokenizer)
        lengths = [len(tokens) for _, tokens in stored]
        by_document = np.load(index_path(folder, split, "documents"), mmap_mode="r")
        by_record = np.load(index_path(folder, split, "records"), mmap_mode="r")
        assert by_document.dtype == by_record.dtype == np.int64
        np.testing.assert_array_equal(by_document, np.cumsum([0, *lengths]))
        assert (counts.documents, counts.tokens) == (len(stored), sum(lengths))
        assert counts.records == len(by_record) - 1
        assert by_record[-1] == counts.tokens
        assert counts.bytes == sum(len(tokenizer.decode(tokens).encode()) for _, tokens in stored)


@pytest.mark.parametrize("config", [BYTE, BPE], ids=["byte", "bpe"])
def test_long_documents_are_cut_into_records_and_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: TokenizerConfig
):
    monkeypatch.setattr("lm.data.prepare._SHARD_BYTES", 10_000)
    monkeypatch.setattr("lm.data.prepare._UNIT_BYTES", 9_000)
    monkeypatch.setattr("lm.data.stages._BATCH_CHARACTERS", 5_000)
    texts = ["ab cd 月 " * 9_000, "x" * (RECORD_TOKENS - 1), "y" * RECORD_TOKENS, "no", " "]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    data = DataConfig(source=f"text:{tmp_path}/*.txt", validation_fraction=0, root=str(tmp_path))
    folder = prepare(data, config)
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert stored_documents(folder, "train") == expected_documents(data, "train", tokenizer)
    shards = sorted(folder.glob("corpus-train*"))
    assert len(shards) == 3
    assert shards[-1].name.endswith(f"-{len(shards) - 1:05d}-of-{len(shards):05d}")
    manifest = load_manifest(folder)
    assert manifest.skipped_documents == 1
    records = tfds.builder_from_directory(folder).as_data_source(split="train")
    index = np.load(index_path(folder, "train", "records"))
    np.testing.assert_array_equal(np.diff(index), [len(record["tokens"]) for record in records])
    if config is BYTE:
        assert (np.diff(index)[-4:] == [RECORD_TOKENS, RECORD_TOKENS, 1, 3]).all()


def test_twice_is_once_and_any_change_shows(tmp_path: Path):
    data = corpus(tmp_path)
    folder = prepare(data, BYTE)
    phases: list[str] = []
    assert prepare(data, BYTE, lambda phase, done, total: phases.append(phase)) == folder
    assert set(phases) == {"fingerprint"}

    def elsewhere(**changes: object) -> Path:
        return prepare(dataclasses.replace(data, **changes), BYTE)

    for reading in ({"seq_len": 8}, {"packing": "documents"}, {"seed": 3}, {"workers": 2}, {"field": "no matter"}):
        assert elsewhere(**reading) == folder
    held_out = tmp_path / "held_out.md"
    held_out.write_bytes((tmp_path / "t.txt").read_bytes())
    folders = [
        folder,
        elsewhere(split_seed=1),
        elsewhere(test_fraction=0.1),
        elsewhere(document="line"),
        elsewhere(validation_source=f"text:{held_out}"),
        prepare(data, BPE),
        prepare(data, dataclasses.replace(BPE, vocab_size=290)),
    ]
    (tmp_path / "t.txt").touch()
    assert prepare(data, BYTE) == folder, "the content counts, not the time"
    with (tmp_path / "t.txt").open("a") as file:
        file.write("!")
    folders.append(prepare(data, BYTE))
    assert len(set(folders)) == len(folders)


def test_the_same_text_elsewhere_is_the_same_dataset(tmp_path: Path):
    one, two = prepare(corpus(tmp_path / "a"), BPE), prepare(corpus(tmp_path / "b/c"), BPE)
    assert one.parent.name == two.parent.name
    for path in everything_below(one):
        if (one / path).is_file() and path != "manifest.json":
            assert (one / path).read_bytes() == (two / path).read_bytes(), path


def test_documents_keep_their_split_when_others_come(tmp_path: Path):
    data = corpus(tmp_path)
    before = prepare(data, BYTE)
    (tmp_path / "a_first.txt").write_text("\n\n".join(f"new {i}" for i in range(30)) + "\n\ndocument 1, 第1篇: word ")
    after = prepare(data, BYTE)
    tokens: dict[str, list[set]] = {}
    for split in ("train", "validation", "test"):
        tokens[split] = [{tuple(t) for _, t in stored_documents(folder, split)} for folder in (before, after)]
        assert tokens[split][0] <= tokens[split][1]
    assert not tokens["train"][1] & tokens["validation"][1]
    assert not tokens["train"][1] & tokens["test"][1]


def test_fractions_are_kept_and_seeded():
    texts = [f"text {i}" for i in range(4000)]
    data = DataConfig(validation_fraction=0.1, test_fraction=0.25)
    splits = [split_of(text, data) for text in texts]
    assert abs(splits.count("validation") / 4000 - 0.1) < 0.02
    assert abs(splits.count("test") / 4000 - 0.25) < 0.03
    assert splits != [split_of(text, dataclasses.replace(data, split_seed=1)) for text in texts]


def test_splits_given_as_files(tmp_path: Path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name} one\n{name} two\n")
    data = DataConfig(
        source=f"text:{tmp_path}/train.txt",
        validation_source=f"text:{tmp_path}/valid.txt",
        test_source=f"text:{tmp_path}/test.txt",
        document="line",
        validation_fraction=0.9,
        root=str(tmp_path),
    )
    folder = prepare(data, BPE)
    tokenizer = load_tokenizer(folder / "tokenizer")
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        stored = stored_documents(folder, split)
        assert [tokenizer.decode(tokens) for _, tokens in stored] == [f"{name} one", f"{name} two"]
    assert set(load_manifest(folder).sources) == {"source", "validation_source", "test_source"}


def test_the_tokenizer_learns_from_the_training_split_alone(tmp_path: Path):
    data = corpus(tmp_path)
    held_out = [d.text for d in documents(data.source, data) if split_of(d.text, data) != "train"]
    alone = tmp_path / "alone"
    alone.mkdir()
    kept = [d.text for d in documents(data.source, data) if d.text not in held_out]
    (alone / "t.txt").write_text("\n\n".join(kept), encoding="utf-8")
    folders = [prepare(data, BPE), prepare(dataclasses.replace(data, source=f"text:{alone}/t.txt"), BPE)]
    assert len({load_manifest(folder).tokenizer_fingerprint for folder in folders}) == 1


def test_a_prepared_dataset_is_a_source(tmp_path: Path):
    """What TFDS users have, ArrayRecord datasets in a folder, goes in again; here with the keys as text."""
    first = prepare(corpus(tmp_path), BYTE)
    data = DataConfig(source=f"tfds:{first}", field="key", validation_fraction=0, root=str(tmp_path))
    again = prepare(data, BYTE)
    keys = [key for key, _ in stored_documents(first, "train")]
    tokenizer = load_tokenizer(again / "tokenizer")
    assert [tokenizer.decode(tokens) for _, tokens in stored_documents(again, "train")] == keys


class BrokenError(Exception):
    """Something unforeseen."""


@pytest.mark.parametrize("most", [64_000_000, 30])
def test_progress_of_training_is_out_of_the_text_there_is(tmp_path: Path, most: int):
    (tmp_path / "t.txt").write_text("".join(f"line {i} 床\n" for i in range(10)), encoding="utf-8")
    data = DataConfig(source=f"text:{tmp_path}/t.txt", document="line", validation_fraction=0, root=str(tmp_path / "d"))
    told: list[tuple[int, int | None]] = []
    tokenizer = dataclasses.replace(BPE, training_bytes=most)
    prepare(data, tokenizer, lambda phase, *of: told.append(of) if phase == "train tokenizer" else None)
    text = sum(len(f"line {i} 床".encode()) for i in range(10))
    assert {total for _, total in told} == {min(text, most)}
    assert 0 < told[-1][0] <= min(text, most)


@pytest.mark.parametrize("when", ["read", "train tokenizer", "tokenize"])
def test_a_failure_leaves_nothing(tmp_path: Path, when: str):
    data = corpus(tmp_path)
    before = everything_below(tmp_path)

    def fail(phase: str, done: int, total: int | None) -> None:
        if phase == when:
            raise BrokenError

    with pytest.raises(BrokenError):
        prepare(data, BPE, fail)
    assert everything_below(tmp_path) == before
    load_manifest(prepare(data, BPE))


@pytest.mark.parametrize("when", ["read", "deduplicate", "train tokenizer", "tokenize"])
@pytest.mark.parametrize("dedup", [DedupConfig(), DedupConfig(exact=True, near=True, lines=True)], ids=["", "dedup"])
def test_an_interrupted_preparation_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, dedup: DedupConfig
):
    monkeypatch.setattr("lm.data.prepare._SHARD_BYTES", 300)
    monkeypatch.setattr("lm.data.prepare._UNIT_BYTES", 100)
    data = corpus(tmp_path)
    straight = prepare(dataclasses.replace(data, root=str(tmp_path / "straight")), BPE, dedup=dedup)
    seen = 0

    def interrupt(phase: str, done: int, total: int | None) -> None:
        nonlocal seen
        seen += phase == when and done > 0
        if seen == 2:
            raise KeyboardInterrupt

    if when == "deduplicate" and not dedup.near:
        return
    with pytest.raises(KeyboardInterrupt):
        prepare(data, BPE, interrupt, dedup=dedup)
    assert not list(Path(data.root).glob("corpus/*/1.0.0"))
    (work,) = Path(data.root).glob("corpus/*/.incomplete-*")
    done_before = {path: path.stat().st_mtime_ns for path in (work / "work" / "units").iterdir()}
    assert done_before

    phases: dict[str, int] = {}
    kept: dict[Path, int] = {}

    def watch(phase: str, done: int, total: int | None) -> None:
        phases.setdefault(phase, done)
        if phase == "tokenize":
            kept.update({path: path.stat().st_mtime_ns for path in done_before})

    folder = prepare(data, BPE, watch, dedup=dedup)
    assert phases["read"] > 0
    assert kept == done_before, "what was read once is not read again"
    if when == "tokenize":
        assert phases["tokenize"] > 0
    assert contents(folder) == contents(straight)
    assert [path.name for path in folder.parent.iterdir()] == ["1.0.0"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EVERYTHING = {
    "clean": CleanConfig(rules=("nfc", "whitespace", "length"), min_characters=14),
    "dedup": DedupConfig(exact=True, near=True, lines=True),
    "augment": AugmentConfig(copies=2, operations=("swap", "typos")),
}


@pytest.mark.parametrize(
    "runner",
    [
        pytest.param(RunnerConfig(workers=2), id="two processes"),
        pytest.param(RunnerConfig(runner="DirectRunner"), id="beam"),
        pytest.param(RunnerConfig(runner="DirectRunner", workers=2), id="beam in two", marks=pytest.mark.slow),
    ],
)
def test_the_bytes_do_not_depend_on_who_does_the_work(tmp_path: Path, runner: RunnerConfig):
    held_out = tmp_path / "validation.jsonl"
    held_out.write_text("".join(json.dumps({"text": f"text {i} to validate with"}) + "\n" for i in range(20)))
    data = dataclasses.replace(corpus(tmp_path, 400), validation_source=f"jsonl:{held_out}", test_fraction=0.1)
    folders = [
        prepare(dataclasses.replace(data, root=str(tmp_path / name)), BPE, **EVERYTHING, runner=who)
        for name, who in (("here", RunnerConfig()), ("there", runner))
    ]
    here, there = (contents(folder) for folder in folders)
    assert here == there
    assert sum(name.startswith("corpus-") for name in here) == 3


def test_cleaning_deduplication_and_copies_reach_the_dataset(tmp_path: Path):
    """By hand: what each of a few documents comes to."""
    long = "the quick brown fox jumps over the lazy dog and runs away into the deep dark wood"
    train = [
        long,
        f"  {long.upper()}  ",  # the same, but for case and space
        long.replace("lazy", "idle"),  # nearly the same
        "too short",
        "a line that stands in several documents\nof which this one speaks about the weather in spring",
        "a line that stands in several documents\nbut nobody else wrote a word on iron bridges over rivers",
        "a sentence that will be found in the test file as well, word for word",
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*train, " "]))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": train[-1]}) + "\n")
    data = DataConfig(
        source=f"jsonl:{tmp_path}/train.jsonl",
        test_source=f"jsonl:{tmp_path}/test.jsonl",
        validation_fraction=0,
        root=str(tmp_path),
        licence="made up",
    )
    folder = prepare(
        data,
        BYTE,
        clean=CleanConfig(rules=("length",), min_characters=10),
        dedup=DedupConfig(exact=True, near=True, lines=True),
        augment=AugmentConfig(copies=1, operations=("swap",), rate=0.5),
    )
    tokenizer = load_tokenizer(folder / "tokenizer")
    stored = {key: tokenizer.decode(tokens) for key, tokens in stored_documents(folder, "train")}
    originals = {key: text for key, text in stored.items() if "#" not in key}
    assert originals == {
        "train.jsonl:1": train[0],
        "train.jsonl:5": train[4],
        "train.jsonl:6": "but nobody else wrote a word on iron bridges over rivers",
    }
    assert {key.partition("#")[0] for key in stored if "#" in key} == set(originals)
    assert all(sorted(stored[f"{key}#1"]) == sorted(text) for key, text in originals.items() if f"{key}#1" in stored)
    assert [key for key, _ in stored_documents(folder, "test")] == ["test.jsonl:1"]

    manifest = load_manifest(folder)
    assert manifest.removed_documents == {"cleaning": 2, "exact duplicate": 2, "near duplicate": 1}
    assert manifest.licence == "made up"
    assert manifest.settings["clean"]["rules"] == ["length"]
    report = json.loads((folder / "report.json").read_text())
    assert report["duplicates"]["across_splits"] == {"train document that also stands in test": 1}
    assert report["duplicates"]["lines_removed"] == 1
    assert {(pair["removed_key"], pair["kept_key"]) for pair in report["duplicates"]["examples"]} == {
        ("train.jsonl:2", "train.jsonl:1"),
        ("train.jsonl:3", "train.jsonl:1"),
        ("train.jsonl:7", "test.jsonl:1"),
    }
    assert report["reading"]["documents"]["source"] == {"read": 8, "empty": 0, "dropped": 2}
    split = report["splits"]["train"]
    assert split["characters"] == sum(len(text) for text in stored.values())
    assert sum(split["length_bins"].values()) == len(stored)
    assert dict(split["ngrams"]["2"])["that stands"] == sum(text.count("that stands") for text in stored.values())


def test_a_group_stays_together(tmp_path: Path):
    rows = [{"text": f"text number {i}", "author": f"author {i % 20}"} for i in range(400)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        source=f"jsonl:{tmp_path}/t.jsonl", group_field="author", validation_fraction=0.3, root=str(tmp_path)
    )
    folder = prepare(data, BYTE)
    authors = {
        split: {rows[int(key.partition(":")[2]) - 1]["author"] for key, _ in stored_documents(folder, split)}
        for split in ("train", "validation")
    }
    assert authors["train"] | authors["validation"] == {row["author"] for row in rows}
    assert not authors["train"] & authors["validation"]
    assert 2 <= len(authors["validation"]) <= 11


def test_a_full_disk_is_a_user_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = corpus(tmp_path)
    before = everything_below(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lm.data.atomic, "_sync", full)
    with pytest.raises(UserError, match=r"cannot write the dataset in .*: No space left on device; free space or set"):
        prepare(data, BYTE)
    assert everything_below(tmp_path) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_inside_array_record(tmp_path: Path):
    ids = np.random.default_rng(0).integers(1 << 30, size=2000).tolist()

    def write() -> None:
        with ShardWriter(Path("/dev/full"), tmp_path / "lengths", eos_id=0) as writer:
            for i in range(3000):
                writer.add(str(i), ids, 1, last=True)
            writer.finish()

    with pytest.raises(UserError, match="cannot write the dataset"):
        write()


KILLED = """
import os, signal, sys
import lm.data.prepare
from lm.data.config import DataConfig
from lm.data.prepare import prepare
from lm.text.dedup import DedupConfig
from lm.text.tokenizer import TokenizerConfig

lm.data.prepare._UNIT_BYTES = lm.data.prepare._SHARD_BYTES = 100
when, calls = sys.argv[3], int(sys.argv[4])

def report(phase, done, total):
    global calls
    calls -= phase == when
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)

data = DataConfig(source=sys.argv[1], root=sys.argv[2], validation_fraction=0.2)
dedup = DedupConfig(exact=True, near=True, lines=True)
print(prepare(data, TokenizerConfig(kind="bpe", vocab_size=280), report, dedup=dedup))
"""


def kill(source: str, root: Path, when: str, calls: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", KILLED, source, str(root), when, str(calls)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)


def test_a_killed_process_leaves_nothing_that_looks_whole_and_is_continued(tmp_path: Path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"text {i}, " + " and ".join(str(j * i) for j in range(9)))
    source, root = f"text:{tmp_path}/*.txt", tmp_path / "datasets"
    straight = kill(source, tmp_path / "straight", "never", 1)
    assert straight.returncode == 0, straight.stderr
    for when, calls in (("read", 3), ("deduplicate", 4), ("train tokenizer", 1), ("tokenize", 3)):
        done = kill(source, root, when, calls)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not list(root.glob("corpus/*/1.0.0"))
        assert list(root.glob("corpus/*/.incomplete-*/*/units/0*"))
    done = kill(source, root, "never", 1)
    assert contents(Path(done.stdout.strip())) == contents(Path(straight.stdout.strip()))
    assert not list(root.rglob(".*"))


def test_what_a_killed_process_left_is_removed_by_the_next_preparation_of_another(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text " * 99)
    (tmp_path / "b.txt").write_text("and more " * 99)
    source, root = f"text:{tmp_path}/*.txt", tmp_path / "datasets"
    assert kill(source, root, "tokenize", 1).returncode == -signal.SIGKILL
    (leftover,) = root.glob("corpus/*/.incomplete-*")
    load_manifest(prepare(DataConfig(source=f"text:{tmp_path}/a.txt", validation_fraction=0, root=str(root)), BYTE))
    assert not leftover.exists()
    assert not leftover.parent.exists()
    assert not list(root.rglob(".lock"))


@pytest.fixture
def little_disk(tmp_path: Path):
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [40, 1300, 1700, 2500])
def test_a_disk_that_fills_at_any_stage_is_told_and_left_clean(little_disk: Path, tmp_path: Path, kilobytes: int):
    """Texts, hashes, tokenizer, shards and index grow with the corpus: larger ones fill the disk earlier."""
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(500)]
    for i in range(kilobytes // 4):
        (tmp_path / f"{i:03d}.txt").write_text(" ".join(rng.choice(words, 600)))
    data = DataConfig(source=f"text:{tmp_path}/*.txt", root=str(little_disk / "datasets"), validation_fraction=0)
    if kilobytes == 40:  # this one fits
        load_manifest(prepare(data, BYTE, dedup=DedupConfig(exact=True, near=True)))
        return
    with pytest.raises(UserError, match=r"cannot write the dataset in .*No space left on device.*; free space or set"):
        prepare(data, BYTE, dedup=DedupConfig(exact=True, near=True))
    assert not list(little_disk.iterdir())


def test_who_comes_second_waits_and_takes_what_the_first_built(tmp_path: Path):
    data = corpus(tmp_path)
    first_works, second_waits = threading.Event(), threading.Event()
    phases: list[str] = []
    folders: list[Path] = []

    def first(phase: str, done: int, total: int | None) -> None:
        if phase == "tokenize" and not first_works.is_set():
            first_works.set()
            assert second_waits.wait(20)

    def second(phase: str, done: int, total: int | None) -> None:
        phases.append(phase)
        if phase == "wait":
            second_waits.set()

    threads = [threading.Thread(target=lambda: folders.append(prepare(data, BYTE, first)))]
    threads.append(threading.Thread(target=lambda: folders.append(prepare(data, BYTE, second))))
    threads[0].start()
    assert first_works.wait(20)
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert len(set(folders)) == 1
    assert len(folders) == 2
    assert set(phases) == {"fingerprint", "wait"}
    assert [path.name for path in folders[0].parent.iterdir()] == ["1.0.0"]


def test_without_locks_the_first_to_finish_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Some network file systems have no locks; then two may build at once, and neither harms the other."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    data = corpus(tmp_path)
    inner: list[Path] = []

    def second(phase: str, done: int, total: int | None) -> None:
        if phase == "tokenize" and not inner:
            inner.append(Path())
            inner[0] = prepare(data, BYTE)

    folder = prepare(data, BYTE, second)
    assert folder == inner[0]
    load_manifest(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["1.0.0"]


def test_text_that_changes_while_it_is_read_is_refused(tmp_path: Path):
    data = corpus(tmp_path)

    def meddle(phase: str, done: int, total: int | None) -> None:
        if phase == "tokenize":
            (tmp_path / "t.txt").write_text("other")

    with pytest.raises(UserError, match=r"t\.txt changed while it was read"):
        prepare(data, BYTE, meddle)
    assert not Path(data.root).exists()


def test_a_damaged_dataset_is_named(tmp_path: Path):
    data = corpus(tmp_path)
    folder = prepare(data, BYTE)
    shard = next(folder.glob("corpus-train*"))
    os.truncate(shard, 10)
    with pytest.raises(UserError, match=f"{shard.name} has 10 bytes, expected"):
        prepare(data, BYTE)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is gone, expected"):
        load_manifest(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 0}))
    with pytest.raises(UserError, match=f"has dataset format 0; this version reads {FORMAT_VERSION}"):
        load_manifest(folder)
    for content in ("", "[]", "{}"):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"cannot read .*manifest\.json"):
            load_manifest(folder)
    with pytest.raises(UserError, match="no prepared dataset in"):
        load_manifest(tmp_path)


class _Endless:
    """A source of `count` documents that exist one at a time."""

    def __init__(self, count: int):
        self.count = count
        self.bytes_read = 0
        self.skipped = SkipCounts()

    def files(self) -> list[tuple[str, Path]]:
        return []

    def units(self, target_bytes: int) -> list[Unit]:
        return [Unit(())]

    def read(self, unit: Unit):
        for i in range(self.count):
            yield Document(str(i), f"{i} " + "words of a text " * 150)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lm.data.stages._BATCH_CHARACTERS", 50_000)
    monkeypatch.setattr("lm.data.statistics._SAMPLE_CHARACTERS", 10_000)
    peaks = []
    for count in (50, 200, 1600):  # The first loads what is loaded once.
        for module in ("prepare", "stages"):
            monkeypatch.setattr(f"lm.data.{module}.open_source", lambda *_, count=count: _Endless(count))
        tracemalloc.start()
        prepare(DataConfig(root=str(tmp_path / str(count))), BYTE)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[1], peaks


BAD = {
    "empty file": ({"source": "text:{tmp}/empty.txt"}, {}, "data.source .* holds no text"),
    "white space": ({"source": "text:{tmp}/white.txt", "document": "line"}, {}, r"holds no text \(2 empty documents\)"),
    "no width": ({"source": "text:{tmp}/unseen.txt", "document": "line"}, {}, r"holds no text \(2 empty documents\)"),
    "no such field": (
        {"source": "jsonl:{tmp}/two.jsonl", "field": "nope", "on_error": "skip"},
        {},
        r"holds no text \(2 left out: no such field, 1 empty documents\); look at what was left out.*two.jsonl:1",
    ),
    "all held out": (
        {"source": "text:{tmp}/one.txt", "validation_fraction": 0.999999},
        {},
        "training split is empty: the 1 documents .* were all held out; make more documents",
    ),
    "empty validation": ({"validation_source": "text:{tmp}/empty.txt"}, {}, "data.validation_source .* holds no text"),
    "missing validation": ({"validation_source": "text:{tmp}/none.txt"}, {}, "matches no file"),
    "validation text is trained on": (
        {"source": "text:{tmp}/[fo]*.txt", "validation_source": "text:{tmp}/one.txt"},
        {},
        r"data.source .* and data.validation_source .* both read .*/one.txt; name other files",
    ),
    "test text is trained on": (
        {"source": "text:{tmp}/*.txt", "test_source": "jsonl:{tmp}/../*/[wo]*.txt"},
        {},
        r"and data.test_source .* both read .*/one.txt and 1 more; name",
    ),
    "fraction above 1": ({"validation_fraction": 1.0}, {}, "data.validation_fraction is 1.0"),
    "fraction below 0": ({"test_fraction": -0.1}, {}, "data.test_fraction -0.1"),
    "fraction no number": ({"test_fraction": float("nan")}, {}, "data.test_fraction nan"),
    "name": ({"name": "My-Corpus"}, {}, "data.name is 'My-Corpus'; use lower-case letters"),
    "name leads away": ({"name": "../up"}, {}, "data.name is '../up'"),
    "document": ({"document": "page"}, {}, "data.document is 'page'; choose file, paragraph or line"),
    "tokenizer": ({}, {"kind": "syllable"}, "tokenizer.kind is 'syllable'"),
    "broken text": ({"source": "text:{tmp}/latin.bin"}, {}, "is not UTF-8"),
    "root is a file": ({"root": "{tmp}/one.txt"}, {}, "cannot write the dataset in .*: Not a directory"),
    "root cannot be": ({"root": "/proc/none/datasets"}, {}, "cannot write the dataset in /proc"),
    "no such tokenizer": ({}, {"kind": "file:nope"}, "'file:nope', but there is no such file"),
}


@pytest.mark.parametrize(("data", "tokenizer", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_answered_in_one_line(tmp_path: Path, data: dict, tokenizer: dict, message: str):
    for name, content in {"empty": b"", "white": b" \n\t\n", "one": b"one", "fine": b"fine text"}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "latin.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "unseen.txt").write_text("\u200b\u200d\n\xad \u2060\n", encoding="utf-8")
    (tmp_path / "two.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b"}\n{"nope": " "}\n')
    before = everything_below(tmp_path)
    settings = {"source": "text:{tmp}/fine.txt", "validation_fraction": 0, "root": "{tmp}/new/datasets"} | data
    settings = {k: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(UserError, match=message) as caught:
        prepare(DataConfig(**settings), TokenizerConfig(**({"kind": "byte"} | tokenizer)))
    assert "\n" not in str(caught.value)
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize(
    ("data", "tokenizer"),
    [({"root": "{tmp}/t.txt"}, BYTE), ({"root": "/proc/none"}, BYTE), ({}, TokenizerConfig(kind="file:nope"))],
)
def test_what_cannot_work_is_told_before_text_is_read(tmp_path: Path, data: dict, tokenizer: TokenizerConfig):
    settings = {name: value.replace("{tmp}", str(tmp_path)) for name, value in data.items()}
    asked = dataclasses.replace(corpus(tmp_path), **settings)
    phases: list[str] = []
    with pytest.raises(UserError):
        prepare(asked, tokenizer, lambda phase, *_: phases.append(phase))
    assert phases == []


def test_tags_that_stay_in_the_text_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "page.html").write_text(
        "<html><body><article>" + "<p>Some text of an article, at some length.</p>" * 9 + "</article></body></html>"
    )
    data = DataConfig(source=f"html:{tmp_path}/*.html", validation_fraction=0, root=str(tmp_path / "datasets"))
    prepare(data, BYTE, clean=CleanConfig(rules=("nfc",)))
    assert "--clean.rules html takes" in caplog.text
    caplog.clear()
    if importlib.util.find_spec("trafilatura"):
        prepare(data, BYTE, clean=CleanConfig(rules=("html",)))
    prepare(corpus(tmp_path), BYTE)
    assert caplog.text == ""


def test_a_dataset_is_found_where_nobody_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = corpus(tmp_path)
    folder = prepare(data, BYTE)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("os.mkdir", "tempfile.mkdtemp"):
        monkeypatch.setattr(name, read_only)
    assert prepare(data, BYTE) == folder
    with pytest.raises(UserError, match=r"cannot write the dataset in .*Read-only file system"):
        prepare(data, BPE)
    with pytest.raises(UserError, match=r"cannot write the dataset in .*Read-only file system"):
        prepare(dataclasses.replace(data, name="other"), BYTE)


PTB = Path(__file__).parents[3] / "shared/data/ptb"


@pytest.mark.skipif(not PTB.is_dir(), reason="the PTB files are not here")
def test_penn_treebank_has_its_published_size(tmp_path: Path):
    data = DataConfig(source=f"text:{PTB}/ptb.valid.txt", document="line", validation_fraction=0, root=str(tmp_path))
    folder = prepare(data, BYTE)
    words = sum(len(d.text.split()) + 1 for d in open_source(data.source, data).documents())
    assert words == 73_760, "the published count, one end of sentence per line included"
    assert load_manifest(folder).splits["train"].documents == 3370
