"""`lm generate` with files, beams and encoder-decoders."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import small_runs as small

from lm import run as runs
from lm.cli import main
from lm.generate.texts import one_line
from lm.records import RunDirectory
from lm.sharding import MeshConfig, make_mesh
from lm.tasks.seq2seq import Seq2Seq

PROMPTS = ["the cat", "", "a dog on a mat", "中文", "the cat"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a decoder's run, an encoder-decoder's, and files of prompts."""
    folder = tmp_path_factory.mktemp("world")
    small.start(small.experiment(folder), folder / "done")
    rng = np.random.default_rng(0)
    sources = ["".join(rng.choice(list("abc"), rng.integers(3, 9))) for _ in range(120)]
    (folder / "s.txt").write_text("\n".join(sources) + "\n")
    (folder / "t.txt").write_text("\n".join(text.upper() for text in sources) + "\n")
    data = {"source": f"parallel:{folder}/s.txt,{folder}/t.txt", "name": "upper"}
    for name, layers in (("translator", 1), ("pairs", 0)):
        settings = small.experiment(folder, data=data, model={"encoder_layers": layers})
        settings = settings.__class__(**(vars(settings) | {"task": Seq2Seq()}))
        small.start(settings, folder / name)
    (folder / "in.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    (folder / "long.txt").write_text("ab\n" + "a" * 40 + "\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text("")
    return folder


FEW = ["--max-new-tokens", "6", "--seed", "3"]


def out(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> list[str]:
    assert main(arguments) == 0
    return capsys.readouterr().out.split("\n")[:-1]  # and not at other characters that end lines for some


def objects(lines: list[str]) -> list[dict]:
    return [json.loads(line) for line in lines]


def test_a_file_gives_a_line_each_in_order(world: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    want = objects(out(capsys, ["generate", "done", "--json", "--prompt", *PROMPTS, *FEW]))
    samples = (world / "done/samples.jsonl").read_text()

    shown = out(capsys, ["generate", "done", "--file", "in.txt", "--batch-size", "2", *FEW])
    assert shown == [one_line(one["text"]) for one in want]
    text = tmp_path / "out.txt"
    assert out(capsys, ["generate", "done", "--file", "in.jsonl", "--output", str(text), *FEW]) == []
    assert text.read_text().split("\n")[:-1] == shown
    told = tmp_path / "out.jsonl"
    assert out(capsys, ["generate", "done", "--file", "in.txt", "--output", str(told), *FEW]) == []
    for found in (
        objects(told.read_text().split("\n")[:-1]),
        objects(out(capsys, ["generate", "done", "--file", "in.txt", "--json", *FEW])),
    ):
        for one, other in zip(found, want, strict=True):
            assert one.pop("logprobs") == pytest.approx(other["logprobs"], abs=1e-4)
            assert one == {name: value for name, value in other.items() if name != "logprobs"}
    assert (world / "done/samples.jsonl").read_text() == samples  # files have a place of their own


def test_beams_show_the_best_first(world: Path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    search = ["--beams", "3", "--n-best", "2", "--max-new-tokens", "5"]
    found = objects(out(capsys, ["generate", "done", "--json", "--prompt", "the", "a", *search]))
    assert [one["prompt"] for one in found] == ["the", "the", "a", "a"]
    assert found[0]["score"] >= found[1]["score"]
    shown = "\n".join(out(capsys, ["generate", "done", "--prompt", "the", *search]))
    assert f"--- 2 of 2 (score {found[1]['score']:.4f})\nthe{found[1]['text']}" in shown
    lines = objects(out(capsys, ["generate", "done", "--file", "in.txt", "--json", *search]))
    assert [one["prompt"] for one in lines] == [text for text in PROMPTS for _ in range(2)]


def test_a_source_is_not_what_the_text_begins_with(world: Path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    [made] = objects(out(capsys, ["generate", "translator", "--json", "--prompt", "abc", *FEW]))
    tokenizer = runs.load(world / "translator", make_mesh(MeshConfig(devices=1))).tokenizer
    assert made["prompt_ids"] == [*tokenizer.encode("abc"), tokenizer.eos_id]
    assert main(["generate", "translator", "--prompt", "abc", *FEW]) == 0
    assert capsys.readouterr().out == made["text"] + "\n"
    assert main(["generate", "translator", "--prompt", "abc", "b", *FEW]) == 0
    assert capsys.readouterr().out.startswith(f"--- 1 of 2\nabc\n{made['text']}\n---")
    # A decoder alone reads bos, source, eos, as in its training.
    [pair] = objects(out(capsys, ["generate", "pairs", "--json", "--prompt", "abc", *FEW]))
    trained = runs.load(world / "pairs", make_mesh(MeshConfig(devices=1)))
    [batch] = [
        next(
            iter(
                runs.split_batches(
                    runs.dataset_of(RunDirectory.open(world / "pairs"), trained.experiment, None),
                    trained.experiment,
                    "validation",
                    1,
                    1,
                )[0]()
            )
        )
    ]
    begin = batch["tokens"][0][batch["prefix"][0] > 0].tolist()
    source = tokenizer.decode(begin[1:-1])
    assert re.fullmatch("[abc]+", source)
    assert trained.prompt_ids(source) == begin
    assert pair["prompt_ids"] == trained.prompt_ids("abc")


MISTAKES = {
    "no such file": (["--file", "nope.txt"], r"can't read the prompts in nope\.txt: No such file"),
    "a folder": (["--file", "done"], r"can't read the prompts in done: Is a directory"),
    "nothing in it": (["--file", "empty.txt"], r"empty\.txt is empty"),
    "not UTF-8": (["--file", "latin.txt"], r"latin\.txt is not UTF-8"),
    "too long": (["--file", "long.txt"], r"long\.txt, line 2 has 40 tokens; .* 31 or fewer"),
    "output is there": (["--file", "in.txt", "--output", "long.txt"], r"long\.txt exists; name another file"),
    "no folder": (["--file", "in.txt", "--output", "no/out.txt"], r"there is no folder no for --output out\.txt"),
    "output alone": (["--output", "out.txt"], r"--output goes with --file"),
    "two kinds": (["--file", "in.txt", "--prompt", "a"], r"give --prompt or --file, not both"),
    "no batch": (["--file", "in.txt", "--batch-size", "0"], r"--batch-size is 0; it must be at least 1"),
    "several in a line": (
        ["--file", "in.txt", "--beams", "2", "--n-best", "2"],
        r"--n-best is 2, and a line of text holds one; write to a \.jsonl file",
    ),
    "penalty without beams": (["--length-penalty", "1"], r"length_penalty is 1\.0, but only a beam search reads it"),
    "beams with a temperature": (["--beams", "2", "--temperature", "0.5"], r"temperature is 0\.5, but a beam search"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(name: str, world: Path, monkeypatch, capfd):
    arguments, says = MISTAKES[name]
    monkeypatch.chdir(world)
    before = sorted(path.name for path in world.iterdir())
    assert main(["generate", "done", *arguments]) == 2
    shown = capfd.readouterr()
    assert shown.err.startswith("lm: ")
    assert shown.err.count("\n") == 1, shown.err
    assert re.search(says, shown.err), shown.err
    assert shown.out == ""
    assert sorted(path.name for path in world.iterdir()) == before
