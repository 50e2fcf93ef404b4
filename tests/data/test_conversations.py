"""Conversations from records to a dataset: parts, roles, cleaning, fingerprints and mistakes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import chats
import numpy as np
import pytest

from lm.data.config import DataConfig
from lm.data.parts import clean_messages, join_messages, split_messages
from lm.data.prepare import prepare
from lm.data.runners import RunnerConfig
from lm.data.store import DatasetStore, part_texts
from lm.errors import UserError
from lm.text.chat import ChatConfig
from lm.text.clean import CleanConfig, Cleaner
from lm.text.template import Message
from lm.text.tokenizer import TokenizerConfig, load_tokenizer

BYTE = TokenizerConfig(kind="byte")
TALK = [
    {"role": "system", "content": "Be\x1dkind."},
    {"role": "user", "content": "你好？"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "a<|endoftext|>b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "nobody answers"},
]

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def config(path: Path, **changes: Any) -> DataConfig:
    base = DataConfig(
        source=f"jsonl:{path}",
        field="messages",
        chat=ChatConfig(template="plain"),
        validation_fraction=0,
        root=str(path.parent / "datasets"),
    )
    return dataclasses.replace(base, **changes)


def parts_of(folder: Path, document: int = 0) -> list[str]:
    """With ⏎ for a token that ends a text."""
    store = DatasetStore(folder, "train")

    def decode(ids: list[int]) -> str:
        return b"".join(b"\xe2\x8f\x8e" if i == 256 else bytes([i]) for i in ids).decode()

    return part_texts(store, document, decode)


def test_messages_and_columns_become_what_is_read_and_answered(tmp_path: Path) -> None:
    messages = prepare(config(write(tmp_path / "m.jsonl", {"messages": TALK})), BYTE)
    assert parts_of(messages) == ["⏎Be kind.⏎你好？⏎", "你好！⏎", "a<|endoftext|>b⏎", "c⏎"]
    pair = {"prompt": "明天天气怎么样？", "response": "晴朗"}
    columns = prepare(config(write(tmp_path / "c.jsonl", pair), fields=("prompt", "response")), BYTE)
    assert parts_of(columns) == ["⏎明天天气怎么样？⏎", "晴朗⏎"]
    template = load_tokenizer(columns / "tokenizer").chat_template
    assert template is not None, "whoever goes on with the dataset knows how it was written"
    assert template.render([Message("user", "x")], ask=True) == "<|endoftext|>x<|endoftext|>"


def test_a_trained_tokenizer_sees_what_is_said_and_no_roles(tmp_path: Path) -> None:
    rows = [{"prompt": f"zz {i}", "response": "zz"} for i in range(20)]
    data = config(write(tmp_path / "t.jsonl", *rows), fields=("prompt", "response"))
    tokenizer = load_tokenizer(prepare(data, TokenizerConfig(kind="word", vocab_size=100)) / "tokenizer")
    pieces = {tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)}
    assert pieces == {"<unk>", "<|endoftext|>", "zz", *map(str, range(20))}


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = [{"messages": [*TALK[: 3 + 2 * (i % 2)], ASSISTANT | {"content": f"{i}"}]} for i in range(50)]
    path = write(tmp_path / "t.jsonl", *rows)
    folders = [prepare(config(path, root=str(tmp_path / f"{n}")), BYTE, runner=RunnerConfig(workers=n)) for n in (1, 2)]
    a, b = (DatasetStore(folder, "train") for folder in folders)
    assert folders[0].parent.name == folders[1].parent.name
    np.testing.assert_array_equal(a.read(0, a.n_tokens), b.read(0, b.n_tokens))
    np.testing.assert_array_equal(a.part_starts, b.part_starts)


def test_a_split_is_a_matter_of_what_is_said_and_not_of_the_template(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", *({"prompt": f"p{i}", "response": f"r{i}"} for i in range(60)))
    found = {}
    for template in ("plain", "chatml"):
        data = config(path, fields=("prompt", "response"), chat=ChatConfig(template=template), validation_fraction=0.3)
        folder = prepare(data, BYTE)
        store = DatasetStore(folder, "validation")
        found[template] = [store.document_key(i) for i in range(len(store.document_offsets) - 1)]
    assert found["plain"] == found["chatml"]
    assert 5 < len(found["plain"]) < 40


def test_the_template_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"prompt": "a", "response": "b", "messages": TALK})
    tokenizer = chats.write_folder(tmp_path / "tokenizer", chats.byte_tokenizer(), chats.QWEN)
    kind = TokenizerConfig(kind=f"file:{tokenizer}")

    def made(template: Any, fields: tuple[str, ...] = ("prompt", "response")) -> Path:
        return prepare(config(path, fields=fields, chat=ChatConfig(template=template)), kind)

    folders = [made(None), made("plain"), made("chatml"), made("tokenizer")]
    chats.write_folder(tokenizer, chats.byte_tokenizer(), chats.LLAMA3)
    folders += [made("tokenizer"), made("tokenizer", ())]
    assert len(set(folders)) == 6
    assert made("tokenizer") == folders[4]
    chats.write_folder(tokenizer, chats.byte_tokenizer(), chats.QWEN)
    assert made("tokenizer") == folders[3]


def test_cleaning_is_of_what_is_said() -> None:
    cleaner = Cleaner(CleanConfig(rules=("whitespace",)))
    talk = [Message("system", ""), Message("user", "  a   b "), Message("assistant", "c\t\td")]
    cleaned = clean_messages(cleaner, join_messages(talk))
    assert cleaned is not None
    assert split_messages(cleaned) == [Message("system", ""), Message("user", "a b"), Message("assistant", "c d")]
    assert not clean_messages(cleaner, join_messages([Message("user", " \t"), Message("assistant", "x")]))


WRONG: list[tuple[Any, str]] = [
    ({"messages": [USER, ASSISTANT | {"content": " \n"}]}, r"message 2 \(assistant\) is an empty response"),
    ({"messages": [USER | {"content": ""}, ASSISTANT]}, r"message 1 \(user\) is an empty message"),
    ({"messages": [USER]}, "has no message of the assistant"),
    ({"messages": []}, "has no message of the assistant"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "message 1 has the role 'tool'"),
    ({"messages": [{"content": "a"}]}, "message 1 has the role None"),
    ({"messages": [{"role": "assistant", "content": ["a"]}]}, r"message 1 \(assistant\) holds a list, not text"),
    ({"messages": "hello"}, "field 'messages' holds text, not a list of objects"),
    ({"messages": ["hello"]}, "field 'messages' holds a list, not a list of objects"),
    ({"text": "a"}, "has no field 'messages'; it has 'text'"),
]


@pytest.mark.parametrize(("record", "says"), WRONG)
def test_a_record_that_is_no_conversation_stops_or_is_counted(tmp_path: Path, record: Any, says: str) -> None:
    path = write(tmp_path / "t.jsonl", {"messages": TALK}, record)
    with pytest.raises(UserError, match=rf"t\.jsonl:2.*{says}.*--data.on-error skip") as told:
        prepare(config(path), BYTE)
    assert "\n" not in str(told.value)
    assert not list((tmp_path / "datasets").rglob("manifest.json"))
    folder = prepare(config(path, on_error="skip"), BYTE)
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert sum(report["reading"]["skipped"]["source"]["counts"].values()) == 1
    assert len(DatasetStore(folder, "train").document_offsets) == 2


def test_an_empty_response_of_two_columns_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""})
    with pytest.raises(UserError, match=r"t\.jsonl:2: 'response' \(assistant\) is an empty response"):
        prepare(config(path, fields=("prompt", "response")), BYTE)
    with pytest.raises(UserError, match=r"has no field 'answer'"):
        prepare(config(path, fields=("prompt", "answer")), BYTE)


def test_what_the_template_refuses_stops_or_is_counted(tmp_path: Path) -> None:
    twice = {"messages": [TALK[1], TALK[1], TALK[2]]}
    path = write(tmp_path / "t.jsonl", {"messages": TALK[1:3]}, twice)
    tokenizer = chats.write_folder(tmp_path / "tokenizer", chats.byte_tokenizer(), chats.LLAMA2)
    kind = TokenizerConfig(kind=f"file:{tokenizer}")
    data = config(path, chat=ChatConfig(template="tokenizer"))
    with pytest.raises(UserError, match=r"t\.jsonl:2: .*roles must alternate.*--data.on-error skip"):
        prepare(data, kind)
    folder = prepare(dataclasses.replace(data, on_error="skip"), kind)
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert report["reading"]["skipped"]["source"]["counts"] == {"no conversation": 1}
    assert report["reading"]["documents"]["source"]["read"] == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chat": ChatConfig(template="tokenizer")}, "no chat template came with the tokenizer"),
        ({"fields": ("a", "b", "c")}, "data.fields names 3"),
        ({"source": "python-stdlib"}, "have no fields"),
        ({"sentences": True}, "are messages; leave one out"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = write(tmp_path / "t.jsonl", {"messages": TALK})
    with pytest.raises(UserError, match=says):
        prepare(config(path, **changes), BYTE)


def test_parquet_and_csv_hold_conversations(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"messages": [TALK[1:3]]}), tmp_path / "t.parquet")
    folder = prepare(config(tmp_path / "t", source=f"parquet:{tmp_path}/t.parquet"), BYTE)
    assert parts_of(folder) == ["⏎你好？⏎", "你好！⏎"]
    (tmp_path / "t.csv").write_text('q,a\n"1, 2",3\n', encoding="utf-8")
    folder = prepare(config(tmp_path / "t", source=f"csv:{tmp_path}/t.csv", fields=("q", "a")), BYTE)
    assert parts_of(folder) == ["⏎1, 2⏎", "3⏎"]
