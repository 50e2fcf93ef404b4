"""`lm prepare` as a person uses it: flags reach the dataset, and it can be had in other formats."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_runs as small

from lm.cli import main
from lm.commands.prepare import workers_find_this_package


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
    assert f"\ndatasets/corpus/{manifest['fingerprint']}/1.0.0\n" in shown
    assert "report datasets/corpus/" in shown


def test_a_dataset_is_exported_and_nothing_is_written_for_an_export_that_cannot_be(
    corpus: Path, capsys: pytest.CaptureFixture[str]
):
    zstandard = pytest.importorskip("zstandard")
    for arguments, message in (
        (["--export-to", "out"], "nothing is exported"),
        (["--export", "jsonl.zst", "--export-to", "."], "is there already"),
        (
            ["--export", "jsonl.zst", "--export-to", "corpus.txt/out"],
            "--export-to corpus.txt/out: Not a directory; name",
        ),
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


def test_an_export_that_is_not_whole_is_told(corpus: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("zstandard")
    assert main([*ARGUMENTS, "--export", "jsonl.zst"]) == 0
    (exported,) = corpus.glob("datasets/corpus/*/jsonl.zst")
    (exported / "train.jsonl.zst").unlink()
    assert main([*ARGUMENTS, "--export", "jsonl.zst"]) == 2
    assert "is damaged: train.jsonl.zst is not there in full" in capsys.readouterr().err


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_preparation_says_how_to_go_on(corpus: Path, monkeypatch, capsys, signal_number: int):
    def interrupt(*_: object, **__: object) -> Path:
        os.kill(os.getpid(), signal_number)
        time.sleep(60)  # another thread may get it, and tell this one a moment later
        raise AssertionError("the signal did not arrive")

    # Python leaves Ctrl-C ignored where it is when it starts, as in the background of a script.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("lm.commands.prepare.prepare", interrupt)
            assert main(ARGUMENTS) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "lm: interrupted; the same command goes on where this one was\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert main(ARGUMENTS) == 0


def test_what_no_training_could_read_is_not_prepared(corpus: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, message in (
        (["--data.seq-len", "0"], "data.seq-len is 0"),
        (["--data.stride", "1000"], "data.stride is 1000"),
        (["--data.mixture.weights", "1", "2"], "names no dataset"),
        (["--tokenizer.vocab-size", "5000"], "--tokenizer.vocab-size is set, but nothing is trained with tokenizer.ki"),
        (["--tokenizer.training_bytes=5"], "--tokenizer.training-bytes is set, but nothing is trained"),
    ):
        assert main([*ARGUMENTS, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (corpus / "datasets").exists()
    # A config's own vocabulary goes with any kind.
    (corpus / "mine.py").write_text(
        "from lm.config import Experiment\nfrom lm.text.tokenizer import TokenizerConfig\n"
        "def get_config():\n    return Experiment(tokenizer=TokenizerConfig(vocab_size=300))\n"
    )
    assert main(["prepare", "mine.py", *ARGUMENTS[1:]]) == 0


def test_a_runner_that_cannot_work_is_one_line(corpus: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    beam = pytest.importorskip("apache_beam")

    def unreachable(*_: object, **__: object) -> None:
        raise RuntimeError("Unable to fetch remote job server jar\nat some address")

    monkeypatch.setattr(beam.Pipeline, "run", unreachable)
    assert main([*ARGUMENTS, "--runner", "DirectRunner"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lm: --runner DirectRunner could not run the work: Unable to fetch remote job server jar at")
    assert not (corpus / "datasets").exists()


def test_beams_processes_import_this_package_wherever_they_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not one that happens to lie in the current folder."""
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "__init__.py").write_text("raise ImportError('the wrong lm')")
    monkeypatch.chdir(tmp_path)
    with workers_find_this_package():
        done = subprocess.run(
            [sys.executable, "-m", "lm", "--version"], capture_output=True, text=True, check=False, timeout=60
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert "PYTHONSAFEPATH" not in os.environ
