"""Files of prompts, and texts from a trained model."""

import dataclasses
import json
from typing import Any

import pytest
import tiny

from lm.errors import UserError
from lm.generate import Generation, SamplingConfig
from lm.generate.texts import (
    as_json,
    check_output,
    generate_texts,
    make_generator,
    one_line,
    read_prompts,
    write_lines,
)
from lm.models.transformer import ModelConfig, Transformer
from lm.text.tokenizer import ByteTokenizer


@dataclasses.dataclass(frozen=True)
class Trained:
    model: Transformer
    params: Any
    tokenizer: ByteTokenizer = dataclasses.field(default_factory=ByteTokenizer)

    @property
    def end_id(self) -> int:
        return self.tokenizer.eos_id

    def prompt_ids(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(text), self.tokenizer.eos_id]


def trained(**changes: Any) -> Trained:
    settings: dict[str, Any] = {"vocab_size": 257, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_len": 24}
    config = ModelConfig(**(settings | changes))
    model, params = tiny.build(config)
    return Trained(model, tiny.perturbed(params, scale=0.5))


SOURCES = ["ab", "", "a longer one", "中", "ab"]


@pytest.mark.parametrize("encoder_layers", [0, 1])
@pytest.mark.parametrize("sampling", [{"temperature": 1.5, "seed": 4}, {"beams": 3}], ids=["drawn", "searched"])
def test_texts_come_in_order_and_without_the_source(encoder_layers, sampling):
    ready = trained(encoder_layers=encoder_layers)
    settings = SamplingConfig(max_new_tokens=6, **sampling)
    told: list[int] = []
    texts = generate_texts(ready, SOURCES, settings, 2, on_batch=told.append)
    assert told == [2, 4, 5]
    made = make_generator(ready).generate([ready.prompt_ids(text) for text in SOURCES], settings)
    assert texts == [text_of(ready, one) for one in made]
    assert generate_texts(ready, SOURCES, settings) == texts
    assert (texts[0] == texts[4]) == (settings.beams > 1)


def text_of(ready: Trained, made: Generation) -> str:
    """The new tokens' text, by the tokenizer alone; bytes that are no text come out as the same character."""
    return ready.tokenizer.decode(made.ids)


def test_a_source_that_is_too_long_is_named():
    with pytest.raises(UserError, match=r"in\.txt, line 2 has 31 tokens"):
        generate_texts(trained(), ["a", "a" * 30], SamplingConfig(), name=lambda index: f"in.txt, line {index + 1}")
    with pytest.raises(UserError, match="n_best is 2, but each source gets one text"):
        generate_texts(trained(), ["a"], SamplingConfig(beams=2, n_best=2))


def test_lines_of_any_kind_are_prompts(tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes("\ufeffone\r\n\n  two \u2028 still two\\n\n中文".encode())
    assert read_prompts(path) == ["one", "", "  two \u2028 still two\\n", "中文"]
    path.write_bytes(b"one\n")
    assert read_prompts(path) == ["one"]
    path.write_bytes(b"\n\n")
    assert read_prompts(path) == ["", ""]


def test_objects_hold_prompts_of_several_lines(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "one\\ntwo", "id": 3}\n{"prompt": ""}\n')
    assert read_prompts(path) == ["one\ntwo", ""]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.txt", None, r"can't read the prompts in .*in\.txt: No such file"),
        ("in.txt", b"", r"in\.txt is empty; write one prompt a line"),
        ("in.txt", b"ab\xe9c", r"in\.txt is not UTF-8 text \(byte 2\)"),
        ("in.jsonl", b'{"prompt": "a"}\n\n', r"in\.jsonl, line 2: not JSON"),
        ("in.jsonl", b'{"text": "a"}\n', r"in\.jsonl, line 1: no text under 'prompt'"),
        ("in.jsonl", b'"a"\n', r"in\.jsonl, line 1: no text under 'prompt'"),
        ("in.jsonl", b'{"prompt": 3}\n', r"in\.jsonl, line 1: no text under 'prompt'"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_file_of_prompts(tmp_path):
    with pytest.raises(UserError, match="Is a directory"):
        read_prompts(tmp_path)


@pytest.mark.parametrize("text", ["a\nb", "a\\nb", "\r\n\\", "中\u2028文", ""])
def test_a_text_in_one_line_can_be_read_back(text):
    line = one_line(text)
    assert "\n" not in line
    assert "\r" not in line
    parts = line.split("\\\\")
    assert "\\".join(part.replace("\\n", "\n").replace("\\r", "\r") for part in parts) == text


def test_output_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "out.txt"
    check_output(path, "--output")
    write_lines(path, ["a", "中"])
    assert path.read_bytes() == "a\n中\n".encode()
    with pytest.raises(UserError, match=r"out\.txt exists; name another file with --output, or remove it"):
        check_output(path, "--output")
    with pytest.raises(UserError, match=r"there is no folder .*nowhere for --output out\.txt"):
        check_output(tmp_path / "nowhere" / "out.txt", "--output")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "replace", full)
    with pytest.raises(UserError, match=r"can't write .*new\.txt: No space left on device"):
        write_lines(tmp_path / "new.txt", ["a"])
    assert [one.name for one in tmp_path.iterdir()] == ["out.txt"]


def test_json_tells_what_there_is():
    made = Generation(prompt_ids=[1], ids=[2], logprobs=[-0.12345678], finished="eos", text="b")
    told = json.loads(json.dumps(as_json("a", made)))
    assert told == {
        "prompt": "a",
        "prompt_ids": [1],
        "ids": [2],
        "text": "b",
        "logprobs": [-0.123457],
        "finished": "eos",
    }
    assert as_json("a", dataclasses.replace(made, score=-1.5))["score"] == -1.5
