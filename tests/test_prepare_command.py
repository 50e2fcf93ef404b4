"""`lm prepare` as a person uses it: flags reach the dataset, and it can be had in other formats."""

import io
import json
import sys
from pathlib import Path

import pytest
import small_runs as small

from lm.cli import main


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    small.write_corpus(tmp_path / "corpus.txt")
    with (tmp_path / "corpus.txt").open("a", encoding="utf-8") as file:
        for ending in ("river", "lake"):
            file.write(f"\nA paragraph that is there twice and differs in its last word alone, and that is {ending}\n")
    return tmp_path


ARGUMENTS = ["prepare", "--data.source", "text:corpus.txt", "--data.document", "paragraph", "--tokenizer.kind", "byte"]


def datasets(folder: Path) -> list[dict]:
    found = sorted(folder.glob("datasets/corpus/*/1.0.0/manifest.json"))
    return [json.loads(path.read_text()) for path in found]


def test_flags_for_cleaning_duplicates_and_copies_reach_the_dataset(corpus: Path, capsys: pytest.CaptureFixture[str]):
    rules = ["--clean.rules", "nfc", "length", "--clean.min-characters", "60"]
    duplicates = ["--dedup.exact", "--dedup.near", "--dedup.threshold", "0.3"]
    copies = ["--augment.copies", "1", "--augment.operations", "swap"]
    assert main([*ARGUMENTS, *rules, *duplicates, *copies, "--workers", "2"]) == 0
    (manifest,) = datasets(corpus)
    assert manifest["settings"]["clean"]["rules"] == ["nfc", "length"]
    assert manifest["settings"]["clean"]["min_characters"] == 60
    assert manifest["settings"]["dedup"]["threshold"] == 0.3
    assert manifest["settings"]["augment"]["copies"] == 1
    assert manifest["removed_documents"]["cleaning"] > 0
    assert manifest["removed_documents"]["near duplicate"] > 0
    shown = capsys.readouterr().out
    assert "left out" in shown
    assert "report datasets/corpus/" in shown


def test_a_dataset_is_exported_and_nothing_is_written_for_an_export_that_cannot_be(
    corpus: Path, capsys: pytest.CaptureFixture[str]
):
    zstandard = pytest.importorskip("zstandard")
    for arguments, message in (
        (["--export-to", "out"], "nothing is exported"),
        (["--export", "jsonl.zst", "--export-to", "."], "is there already"),
    ):
        assert main([*ARGUMENTS, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (corpus / "datasets").exists()
    assert main([*ARGUMENTS, "--export", "jsonl.zst", "--export-to", "out"]) == 0
    (manifest,) = datasets(corpus)
    raw = (corpus / "out" / "train.jsonl.zst").read_bytes()
    lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8").read().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == manifest["splits"]["train"]["documents"]
    assert set(texts) <= set((corpus / "corpus.txt").read_text(encoding="utf-8").rstrip("\n").split("\n\n"))
    # Without a folder of its own it goes beside the dataset, and a second time it is found there.
    for _ in range(2):
        assert main([*ARGUMENTS, "--export", "jsonl.zst"]) == 0
    (beside,) = corpus.glob("datasets/corpus/*/jsonl.zst/train.jsonl.zst")
    assert beside.read_bytes() == raw


def test_tfrecord_without_tensorflow_is_one_line(corpus: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert main([*ARGUMENTS, "--export", "tfrecord"]) == 2
    assert "pip install -e '.[tfrecord]'" in capsys.readouterr().err
    assert not (corpus / "datasets").exists()
