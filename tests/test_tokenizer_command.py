"""`lm tokenizer`: from text to a tokenizer that training takes, a table, coloured pieces; mistakes in one line."""

import io
import json
import re
from pathlib import Path

import pytest

from lm.cli import main
from lm.text.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog.\n床前明月光，疑是地上霜。\n" * 50


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "table.csv").write_text("id,body\n1,the quick\n2,the fox\n", encoding="utf-8")
    (tmp_path / "list.txt").write_text("明月\n地上\n", encoding="utf-8")
    return tmp_path


def train(
    *options: str, kind: str = "bpe", size: int = 300, source: str = "text:corpus.txt", output: str = "made"
) -> int:
    where = ["--source", source, "--output", output]
    return main(["tokenizer", "train", "--kind", kind, "--vocab-size", str(size), *where, *options])


def test_what_is_trained_is_what_training_would_make(place: Path, capsys: pytest.CaptureFixture[str]):
    assert train("--document", "line") == 0
    said = capsys.readouterr().out
    assert "vocabulary" in said
    assert "none possible" in said
    assert "The| qu" in said
    assert "--tokenizer.kind file:made" in said
    expected = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), TEXT.splitlines())
    assert load_tokenizer(place / "made").fingerprint() == expected.fingerprint()
    assert train_tokenizer(TokenizerConfig(kind="file:made"), ()).fingerprint() == expected.fingerprint()


def test_settings_and_columns_reach_the_trainer(place: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--field", "body", "--min-count", "2", "--special-tokens", "<mask>"]
    assert train(*options, kind="word", source="csv:table.csv") == 0
    made = load_tokenizer(place / "made")
    assert [made.id_to_piece(i) for i in range(made.vocab_size)] == ["<unk>", "the", "<|endoftext|>", "<mask>"]
    assert "50.000%" in capsys.readouterr().out, "fox and quick of four words are unknown"


def test_a_word_list_is_put_beside_jieba(place: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("jieba", reason="jieba is an extra")
    assert train("--word-list", "list.txt", kind="maxmatch") == 0
    assert "words agreeing with jieba" in capsys.readouterr().out


def test_a_table_of_several(place: Path, capsys: pytest.CaptureFixture[str]):
    assert train() == 0
    capsys.readouterr()
    assert main(["tokenizer", "compare", "made", "byte", "--source", "text:corpus.txt"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("text:corpus.txt\n")
    assert all(word in table for word in ("made", "byte", "257", "100.0%", "per word"))
    assert main(["tokenizer", "compare", "made", "byte", "--source", "text:corpus.txt", "--json", "--bytes", "90"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["made", "byte"]
    assert rows[1]["tokens"] == len(TEXT.encode()[:90].decode(errors="ignore").encode())
    assert rows[1]["tokens_per_byte"] == 1 > rows[0]["tokens_per_byte"]


def test_pieces_of_a_text(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert main(["tokenizer", "show", "byte", "a床\n", "--ids"]) == 0
    assert capsys.readouterr().out == "a|床×3|␤\n\n97 229 186 138 10\n5 tokens, 3 characters, 5 bytes\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab")))
    assert main(["tokenizer", "show", "byte"]) == 0
    assert capsys.readouterr().out.startswith("a|b\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb")))
    assert main(["tokenizer", "show", "byte"]) == 2
    assert "standard input is not UTF-8 at byte 1; convert it" in capsys.readouterr().err


def test_pieces_are_coloured_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from rich.console import Console

    monkeypatch.setattr(
        "lm.commands.tokenizer.open_console", lambda: Console(force_terminal=True, color_system="truecolor", width=80)
    )
    assert main(["tokenizer", "show", "byte", "ab"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[" in out
    assert "a|b" not in out


MISTAKES = {
    "nothing to do": (["tokenizer"], r"Expected one of \{train, compare, show\}"),
    "unknown subcommand": (["tokenizer", "tarin"], "[Tt]arin.*train.*compare.*show"),
    "misspelt option": (
        ["tokenizer", "train", "--source", "text:corpus.txt", "--output", "x", "--vocab-siz", "9"],
        r"Perhaps you meant: --vocab-size .* 8192\); see `lm tokenizer train --help`$",
    ),
    "no output": (["tokenizer", "train", "--source", "text:corpus.txt"], "--output"),
    "output in use": (
        ["tokenizer", "train", "--source", "text:corpus.txt", "--output", "."],
        r"\. is not empty; choose another",
    ),
    "nothing to train": (
        ["tokenizer", "train", "--kind", "byte", "--source", "text:corpus.txt", "--output", "x"],
        "kind 'byte' has nothing to train",
    ),
    "a setting of another kind": (
        ["tokenizer", "train", "--no-hmm", "--source", "text:corpus.txt", "--output", "x"],
        "tokenizer.hmm is set, but only jieba",
    ),
    "too many tokens": (
        ["tokenizer", "train", "--kind", "sentencepiece-bpe", "--source", "text:corpus.txt", "--output", "x"],
        r"8192; the training text has pieces for at most \d+",
    ),
    "no such source": (
        ["tokenizer", "train", "--source", "text:nope", "--output", "x"],
        "'text:nope' matches no file",
    ),
    "no such tokenizer": (["tokenizer", "show", "nope", "x"], "'nope' is no tokenizer; give a path, byte or hf:"),
    "nothing to compare": (["tokenizer", "compare", "--source", "text:corpus.txt"], "(?i)tokenizer"),
    "half a pair": (["tokenizer", "show", "byte", "a\ud83d"], r"U\+D83D at character 1"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_line(place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("lm: ")
    assert said.count("\n") == 1
    assert re.search(message, said.rstrip())
    assert not (place / "x").exists()


def test_help_says_what_a_subcommand_is_for(capsys: pytest.CaptureFixture[str]):
    for name, says in (("train", "--measure-bytes"), ("show", "Shows the pieces of a text")):
        with pytest.raises(SystemExit):
            main(["tokenizer", name, "-h"])
        assert says in " ".join(capsys.readouterr().out.split())
