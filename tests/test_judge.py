"""Texts that a run writes, against those it should: as they were read, not as the tokenizer knows them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import small_runs
from tasks.families import experiment

from lm.cli import main
from lm.errors import UserError
from lm.generate import SamplingConfig
from lm.judge import judge
from lm.text.tokenizer import TokenizerConfig

ONE = ["--mesh.devices", "1"]


def write(path: Path, pairs: list[tuple[str, str]]) -> None:
    path.write_text("".join(json.dumps({"a": a, "b": b}) + "\n" for a, b in pairs), encoding="utf-8")


def run(folder: Path, family: str, **data: Any) -> Path:
    """A run of a tokenizer of words, which has none of the held-out texts' own."""
    words = ["cat", "dog", "mat"]
    write(folder / "corpus.jsonl", [(f"{words[i % 3]} {words[i % 2]}", words[i % 3]) for i in range(40)])
    write(folder / "held.jsonl", [(f"cat zebra{i} dog mat cat dog", f"Quagga{i} mat") for i in range(5)])
    settings = experiment(folder, family, "seq2seq", steps=2, save_every=2, eval_every=0)
    settings = dataclasses.replace(
        settings,
        data=dataclasses.replace(
            settings.data, validation_source=f"jsonl:{folder}/held.jsonl", validation_fraction=0.0, **data
        ),
        tokenizer=TokenizerConfig(kind="word", vocab_size=32),
    )
    small_runs.start(settings, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("translator"), "t5")


def test_references_are_what_was_read_and_unknown_words_are_wrong(translator: Path) -> None:
    sampling = SamplingConfig(temperature=0, max_new_tokens=6)
    judged = judge(translator, ["exact_match", "chrf"], sampling, limit=4)
    assert judged.references == [f"Quagga{i} mat" for i in range(4)]
    assert judged.sources == [f"cat zebra{i} dog mat cat dog" for i in range(4)]
    assert judged.scores["exact_match"] == 0
    # What the tokenizer makes of a reference would match a text of unknown words.
    trained = small_runs.runs.load(translator, small_runs.runs.inference_mesh())
    assert "Quagga" not in trained.tokenizer.decode(trained.tokenizer.encode(judged.references[0]))
    assert judged.cut == 0


def test_sources_that_are_cut_are_counted(tmp_path: Path) -> None:
    """A decoder's rows of 10: half of one is for a source, and what a text of at most 3 tokens leaves."""
    path = run(tmp_path, "gpt", seq_len=10)
    sampling = SamplingConfig(temperature=0, max_new_tokens=3)
    prompt = small_runs.runs.load(path, small_runs.runs.inference_mesh()).prompt_ids("cat zebra1 dog mat cat dog")
    assert len(prompt) == 8
    assert judge(path, ["exact_match"], sampling).cut == 5
    assert judge(path, ["exact_match"], dataclasses.replace(sampling, max_new_tokens=2)).cut == 0


def test_the_command_says_how_many_and_keeps_them(
    translator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--scores", "exact_match", "--texts", str(tmp_path / "texts.jsonl"), "--limit", "3", "--json"]
    assert main(["evaluate", str(translator), *options, *ONE, "--sampling.max-new-tokens", "4"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["written"], said["cut"], said["exact_match"]) == (3, 0, 0.0)
    kept = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in kept] == [f"Quagga{i} mat" for i in range(3)]


MISTAKES = {
    "texts of nothing": (["--texts", "new.jsonl"], "--texts is new.jsonl, and nothing is written without --scores"),
    "a limit of nothing": (["--limit", "3"], "--limit is 3, and nothing is written without --scores"),
    "a file that is there": (["--scores", "bleu", "--texts", "there"], "there exists; name another file with --texts"),
    "none": (["--scores", "bleu", "--limit", "0"], "the number of documents is 0"),
    "several texts": (["--scores", "bleu", "--sampling.beams", "2", "--sampling.n-best", "2"], "n_best is 2"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_before_anything_is_computed(
    translator: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lm.run.evaluate_run", lambda *args, **kwargs: pytest.fail("evaluated"))
    Path("there").touch()
    assert main(["evaluate", str(translator), *options, *ONE]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_a_run_of_another_objective_writes_nothing(tmp_path: Path) -> None:
    small_runs.start(small_runs.experiment(tmp_path), tmp_path / "run")
    with pytest.raises(UserError, match="was trained for causal_lm; texts are written and scored for task seq2seq"):
        judge(tmp_path / "run", ["bleu"], SamplingConfig())
