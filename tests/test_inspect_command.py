"""`lm inspect` on trained runs: what it writes, and what it says to a mistake."""

import dataclasses
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import small_runs

from lm.cli import main
from lm.errors import UserError
from lm.models.transformer import Transformer
from lm.report.inspection import read
from lm.run import Trained
from lm.text.tokenizer import TokenizerConfig, train_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from tasks.families import experiment as family


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of one layer and two heads on bytes."""
    folder = tmp_path_factory.mktemp("inspect")
    small_runs.start(small_runs.experiment(folder), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def trained(folder: Path, name: str, kind: str) -> Path:
    path = folder / f"{name}-{kind}"
    small_runs.start(family(folder, name, kind), path)
    return path


def data_of(path: Path) -> dict:
    found = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)
    assert found is not None
    return json.loads(found[1])


def test_a_page_in_the_run_and_elsewhere(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(run), "--text", "the 猫"]) == 0
    page = run / "inspect.html"
    said = capsys.readouterr().out
    assert said.startswith(f"{page}  (")
    assert "kB; open it in a browser)" in said
    assert data_of(page)["names"]["tokens"] == ["t", "h", "e", "␣", "猫₁", "猫₂", "猫₃"]
    first = page.read_bytes()

    options = ["--output", str(tmp_path / "a.html"), "--png", str(tmp_path / "png"), "--head", "0", "1"]
    assert main(["inspect", str(run), "--text", "the 猫", *options]) == 0
    assert data_of(tmp_path / "a.html")["opened"] == [0, 0, 1]
    assert (tmp_path / "a.html").read_bytes() != first
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == ["self-0-1.png", "self.png"]
    assert page.read_bytes() == first
    # Once more: replaced, with the same bytes.
    assert main(["inspect", str(run), "--text", "the 猫"]) == 0
    assert page.read_bytes() == first
    assert not [path for path in run.iterdir() if path.name.startswith(".")], "nothing half-written is left"


def test_the_losses_of_the_page_are_those_the_run_generates_with(run: Path, tmp_path: Path, capsys):
    """`lm generate` tells the log-probability of each token it wrote; the page tells the same of that text."""
    assert main(["generate", str(run), "--prompt", "the cat", "--max-new-tokens", "6", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    text = made["prompt"] + bytes(i for i in made["ids"] if i < 128).decode()
    if any(i >= 128 for i in made["ids"]):
        pytest.skip("the tiny model wrote no ASCII")
    assert main(["inspect", str(run), "--text", text, "--output", str(tmp_path / "a.html")]) == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    told = [float(nats) for nats in re.findall(r"\d+: ([\d.]+) nats", page)]
    assert told[-len(made["ids"]) :] == pytest.approx([-value for value in made["logprobs"]], abs=2e-3)


def test_an_encoder_decoder_writes_its_own_target(folder: Path):
    path = trained(folder, "t5", "seq2seq")
    assert main(["inspect", str(path), "--source", "cat dog", "--target", "dog cat", "--layers", "1"]) == 0
    data = data_of(path / "inspect.html")
    assert [kind["title"].split()[0] for kind in data["kinds"]] == ["Each", "Target", "Source"]
    assert [kind["layers"] for kind in data["kinds"]] == [[1], [1], [1]]
    assert "".join(data["names"]["source"]).startswith("cat␣dog")
    # What it writes itself, if that is nothing but the end.
    assert main(["inspect", str(path), "--source", "cat dog"]) == 0
    assert data_of(path / "inspect.html")["names"]["tokens"][0] == "<|endoftext|>"
    assert "what the model itself writes" in (path / "inspect.html").read_text(encoding="utf-8")


def test_a_pair_of_texts(folder: Path):
    path = trained(folder, "bert", "bert")
    assert main(["inspect", str(path), "--text", "The cat sat.", "A dog ran."]) == 0
    page = (path / "inspect.html").read_text(encoding="utf-8")
    names = "".join(data_of(path / "inspect.html")["names"]["tokens"])
    assert names.count("<|endoftext|>") == 3
    assert "the second text follows the first" in page
    assert "pseudo-perplexity" in page


def test_classes_by_name(folder: Path):
    path = trained(folder, "llama", "classification")
    assert main(["inspect", str(path), "--text", "The red cat."]) == 0
    page = (path / "inspect.html").read_text(encoding="utf-8")
    assert "<bdi>True</bdi>" in page
    shares = [float(share) for share in re.findall(r'<td class="number">([\d.]+)%</td>', page)]
    assert len(shares) == 2
    assert math.isclose(sum(shares), 100, abs_tol=0.11)
    # Without its dataset the run still has their names; one that never wrote them down can still be looked at.
    recorded = path / "dataset.json"
    told = json.loads(recorded.read_text().replace(str(folder), str(folder / "gone")))
    for name in ("<bdi>True</bdi>", "class 1"):
        recorded.write_text(json.dumps(told))
        assert main(["inspect", str(path), "--text", "The red cat."]) == 0
        assert name in (path / "inspect.html").read_text(encoding="utf-8")
        told.pop("labels", None)


@pytest.mark.slow
def test_a_question_and_its_text(folder: Path):
    path = trained(folder, "bert", "extractive_qa")
    assert main(["inspect", str(path), "--text", "behind cat?", "the cat sat on the mat"]) == 0
    assert len(data_of(path / "inspect.html")["names"]["tokens"]) > 10


def test_texts_are_laid_out_as_in_training(folder: Path):
    """A pair for a classifier without [CLS]: each text with its end; and of one text, no pair."""
    settings = family(folder, "llama", "classification")
    pairs = dataclasses.replace(settings, data=dataclasses.replace(settings.data, fields=("a", "b")))
    model = settings.model
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), ())
    for of, texts in ((pairs, ["ab", "c"]), (settings, ["ab"])):
        found = read(Trained(of, tokenizer, Transformer(model), {}, 0), texts, None, None)
        ends = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eos_id)]
        assert found.tokens.tolist() == ends
    with pytest.raises(UserError, match="trained on two at most"):
        read(Trained(pairs, tokenizer, Transformer(model), {}, 0), ["a", "b", "c"], None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to look at; give --text"),
        (["--text", ""], "--text has no tokens"),
        (["--text", "x" * 33], "33 tokens, more than the 32 of model.max_len"),
        (["--source", "x"], "--source, but the run's model has no encoder"),
        (["--text", "x", "--layers", "1"], "--layers has 1; the model's layers go from 0 to 0"),
        (["--text", "x", "--head", "0", "2"], "--head is layer 0, head 2"),
        (["--text", "x", "--head", "0"], "--head has 1 numbers; give a layer and a head"),
        (["--text", "x", "--head", "0", "a"], "--head"),
        (["--text", "x", "--output", "missing/a.html"], "for --output a.html; make it first"),
        (["--text", "x", "--output", "."], "is a folder; name a file in it"),
        (["--text", "x", "--png", "missing/png"], "for --png png; make it first"),
        (["--text", "x", "--png", "file"], "--png file is a file; name a folder"),
        (["--text", "x", "--checkpoint", "99"], "no checkpoint '99'"),
        (["--text", "a", "b"], "--text has 2 texts, and the run was trained on one; quote it as a whole"),
        (["--text", "a", "--text", "b"], "--text is given 2 times; write all its values after one"),
    ],
)
def test_mistakes_are_told_in_one_line(
    options: list[str], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("here")
    (run / "inspect.html").unlink(missing_ok=True)
    assert main(["inspect", str(run), *options]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not (run / "inspect.html").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_run(tmp_path: Path, run: Path, capsys):
    assert main(["inspect", str(tmp_path), "--text", "x"]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    assert main(["inspect", str(tmp_path / "run"), "--text", "x"]) == 2
    assert "no complete checkpoint yet" in capsys.readouterr().err
