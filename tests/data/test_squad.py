"""Questions about texts: from files of SQuAD's form to the words and answers of a prepared dataset."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.data.config import DataConfig
from lm.data.export import export_jsonl_zst
from lm.data.objectives.parts import SpanQAExamples
from lm.data.parts import words_of
from lm.data.prepare import prepare
from lm.data.runners import RunnerConfig
from lm.data.sources import Document, open_source
from lm.data.store import DatasetStore, part_stops
from lm.errors import UserError
from lm.text.augment import AugmentConfig
from lm.text.clean import CleanConfig
from lm.text.dedup import DedupConfig
from lm.text.scores import exact_match
from lm.text.tokenizer import TokenizerConfig, load_tokenizer

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
BYTE = TokenizerConfig(kind="byte")


def question(text: str, context: str, *answers: str | tuple[str, int], key: str = "q", **more: Any) -> dict[str, Any]:
    """An entry of `qas`; an answer without a place stands at its first."""
    placed = [(answer, context.index(answer)) if isinstance(answer, str) else answer for answer in answers]
    found = [{"text": answer, "answer_start": start} for answer, start in placed]
    return {"id": key, "question": text, "answers": found, **more}


def squad(*paragraphs: tuple[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A file's content: one article."""
    return {"version": "1.1", "data": [{"paragraphs": [{"context": text, "qas": qas} for text, qas in paragraphs]}]}


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def documents(path: Path, **settings: Any) -> list[Document]:
    return list(open_source(f"squad:{path}", DataConfig(source=f"squad:{path}", **settings)).documents())


def answer_of(document: Document) -> str:
    """What the parts of a document's span say, from its text alone."""
    assert document.span is not None
    _, context = document.text.split("\x1d")
    first, last = document.span
    return "".join(words_of(context)[first - 1 : last]).strip()


TEXTS = {
    "The Panthers' defense gave up just 308 points, in 2015.": [
        "The", " Panthers", "'", " defense", " gave", " up", " just", " 308", " points", ",", " in", " 2015", ".",
    ],
    "Manning's six-yard\n\n (1985–86) don’t  ": [
        "Manning", "'s", " six", "-", "yard", "\n\n (", "1985", "–", "86", ")", " don", "’t  ",
    ],
    "在2010年，东京は「首都」です": [
        "在", "2010", "年", "，", "东", "京", "は", "「", "首", "都", "」", "で", "す",
    ],
    "cafe\u0301 हिन्दी": ["cafe\u0301", " हिन्दी"],
    "ภาษาที่": ["ภ", "า", "ษ", "า", "ที่"],
    "it's 'special'": ["it", "'s", " '", "special", "'"],
    " \n": [" \n"],
    "": [""],
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), TEXTS.items())
def test_words_joined_are_the_text(text: str, words: list[str]) -> None:
    assert words_of(text) == words
    assert "".join(words) == text


def test_questions_become_documents(tmp_path: Path) -> None:
    text = "In 1889, the Eiffel Tower (324 m) opened. It's in Paris\x1d, France."
    chinese = "鲁迅，原名周樟寿，1881年出生。"
    qas = [
        question("Where?", text, "Paris", " Paris\x1d, France", key="where"),
        question("How high?", text, ("324 m", 27), key="high"),
        question("Who?", text, key="who"),
        question("What?", text, "Eiffel", key="what", is_impossible=True, plausible_answers=[]),
        question("何名？", text, "In 1889, the Eiffel Tower (324 m) opened. It's in Paris\x1d, France.", key=7),
    ]
    qas[-1]["id"] = 7
    write(tmp_path / "a.json", squad((text, qas), (chinese, [question("何年？", chinese, "1881年", "81", key="年")])))
    found = documents(tmp_path / "a.json")
    assert [document.key for document in found] == ["where", "high", "who", "what", "7", "年"]
    assert found[0].text == "Where?\x1d" + text.replace("\x1d", " ")
    assert [answer_of(document) for document in found if document.span != (-1, -1)] == [
        "Paris", "324 m", text.replace("\x1d", " "), "1881年",
    ]  # fmt: skip
    assert [document.span for document in found[2:4]] == [(-1, -1)] * 2
    assert [document.answers for document in found] == [
        ("Paris", "Paris , France"), ("324 m",), (), (), (text.replace("\x1d", " "),), ("1881年", "81"),
    ]  # fmt: skip
    assert {document.group for document in found[:5]} == {text}, "the questions of a text share a split"


TEXT = "A cat sat."
GOOD = question("Who sat?", TEXT, "cat", key="good")
BROKEN: dict[str, tuple[Any, str, str]] = {
    "no JSON": ('{"data": [', "broken JSON", "not valid JSON"),
    "a list": ([], "broken JSON", "is not a JSON object but a list"),
    "no data": ({"version": 1}, "no such field", r"has no 'data'; it has 'version'"),
    "data is text": ({"data": "x"}, "field without text", "'data' holds text, not a list"),
    "no paragraphs": ({"data": [{}]}, "no such field", "article 1 has no 'paragraphs'"),
    "no context": ({"data": [{"paragraphs": [{"qas": []}]}]}, "no such field", "paragraph 1 has no 'context'"),
    "no questions": ({"data": [{"paragraphs": [{"context": ""}]}]}, "no such field", "paragraph 1 has no 'qas'"),
    "no question": (squad((TEXT, [{"id": "x"}])), "no such field", "question 1 has no 'question'"),
    "no id": (squad((TEXT, [{"question": "x"}])), "no such field", "question 1 has no 'id'"),
    "no answers": (squad((TEXT, [{"id": "x", "question": "x"}])), "no such field", "question 1 has no 'answers'"),
    "answers null": (
        squad((TEXT, [{"id": "x", "question": "x", "answers": None}])),
        "field without text",
        "'answers' holds null, not a list",
    ),
    "no start": (
        squad((TEXT, [{"id": "x", "question": "x", "answers": [{"text": "cat"}]}])),
        "no such field",
        "question 1, answer 1 has no 'answer_start'",
    ),
    "a wrong place": (
        squad((TEXT, [question("x", TEXT, ("cat", 3))])),
        "answer out of place",
        "answer 1 is 'cat', but at 3 the context has 'at '",
    ),
    "behind the end": (squad((TEXT, [question("x", TEXT, ("sat.", 50))])), "answer out of place", "has ''"),
    "before the start": (squad((TEXT, [question("x", TEXT, ("t.", -2))])), "answer out of place", "at -2"),
    "nothing": (squad((TEXT, [question("x", TEXT, (" ", 1))])), "answer out of place", "answer 1 is ' '"),
    "the second": (
        squad((TEXT, [question("x", TEXT, "cat", ("dog", 2))])),
        "answer out of place",
        "answer 2 is 'dog', but at 2 the context has 'cat'",
    ),
}


@pytest.mark.parametrize(("content", "reason", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_told_or_left_out(tmp_path: Path, content: Any, reason: str, message: str) -> None:
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = {"data": [*content["data"], *squad((TEXT, [GOOD]))["data"]]}  # what follows is read
        expected = ["good", "good"]
    else:
        expected = ["good"]
    (tmp_path / "a.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    write(tmp_path / "b.json", squad((TEXT, [GOOD])))
    with pytest.raises(UserError, match=message):
        documents(tmp_path / "*.json")
    source = open_source(f"squad:{tmp_path}/*.json", DataConfig(on_error="skip"))
    assert [document.key for document in source.documents()] == expected
    assert source.skipped.counts == {reason: 1}


def test_a_file_beyond_the_limit_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a.json", squad((TEXT, [GOOD])))
    with pytest.raises(UserError, match="longer than data"):
        documents(tmp_path / "a.json", max_document_bytes=100)


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    text = "a \ud800 b \ud83d\ude00 cat"
    (tmp_path / "a.json").write_text(json.dumps(squad((text, [question("\udfff?", text, "b \ud83d\ude00")]))))
    (document,) = documents(tmp_path / "a.json")
    assert document.text.encode() == "\ufffd?\x1da \ufffd b 😀 cat".encode()
    assert document.answers == ("b 😀",)
    assert answer_of(document) == "b 😀"


def config(tmp_path: Path, name: str = "t.json", **settings: Any) -> DataConfig:
    return DataConfig(**{"source": f"squad:{tmp_path}/{name}", "root": str(tmp_path / "d"), **settings})


def many(count: int) -> dict[str, Any]:
    """Texts with two questions each, every fifth without an answer."""
    paragraphs = []
    for i in range(count):
        text = f"Town {i} has {3 * i} houses, {i}'s river and a (small) church."
        last = question("What is small?", text, *(["a (small) church", "church"] if i % 5 else []), key=f"{i}b")
        paragraphs.append((text, [question("How many?", text, f"{3 * i} houses", key=f"{i}a"), last]))
    return squad(*paragraphs)


@pytest.mark.parametrize("workers", [1, 2])
def test_spans_and_answers_reach_the_dataset(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = many(40)
    write(tmp_path / "t.json", content)
    monkeypatch.setattr("lm.data.prepare._SHARD_BYTES", 400)  # many shards
    monkeypatch.setattr("lm.data.stages._BATCH_CHARACTERS", 300)  # and, in this process, batches
    folder = prepare(config(tmp_path, validation_fraction=0.3), BYTE, runner=RunnerConfig(workers=workers))
    assert len(list(folder.glob("*array_record*"))) > 5
    wanted = {
        qa["id"]: (qa["question"], paragraph["context"], [answer["text"] for answer in qa["answers"]])
        for paragraph in content["data"][0]["paragraphs"]
        for qa in paragraph["qas"]
    }
    contexts = []
    for split in ("train", "validation"):
        store = DatasetStore(folder, split)
        assert store.spans is not None
        assert store.part_starts is not None
        assert store.part_offsets is not None
        assert store.spans.dtype == np.int32
        stops = part_stops(store)
        contexts.append(set())
        for document, (words, answers) in enumerate(store.questions):
            asked, context, given = wanted.pop(store.document_key(document))
            assert "".join(words) == context
            assert answers == given
            low, high = store.part_offsets[document : document + 2]
            parts = [
                bytes(store.read(int(a), int(b)).tolist()).decode()
                for a, b in zip(store.part_starts[low:high], stops[low:high])
            ]
            assert parts == [asked, *words]
            first, last = store.spans[document]
            assert ("".join(parts[first : last + 1]).strip() if first >= 0 else None) == (given[0] if given else None)
            contexts[-1].add(context)
    assert not wanted
    assert all(contexts)
    assert not contexts[0] & contexts[1], "a text is in one split"


def test_the_tokenizer_learns_from_the_text_as_it_is(tmp_path: Path) -> None:
    """Not from words apart: a word with the space before it is one token, and joined words have the text's tokens."""
    text = "the cat saw the cat and the cat saw the dog. " * 20
    write(tmp_path / "t.json", squad((text, [question("Who?", text, "cat")])))
    folder = prepare(config(tmp_path, validation_fraction=0), TokenizerConfig(kind="bpe", vocab_size=270))
    tokenizer = load_tokenizer(folder / "tokenizer")
    store = DatasetStore(folder, "train")
    assert store.read(0, store.n_tokens - 1).tolist() == tokenizer.encode("Who?") + tokenizer.encode(text)
    assert len(tokenizer.encode(" cat")) == 1


def test_blank_questions_are_empty_and_copies_are_found(tmp_path: Path) -> None:
    qas = [question(asked, TEXT, "cat", key=str(i)) for i, asked in enumerate(["Who?", " ", "Who?", "Who  sat?"])]
    write(tmp_path / "t.json", squad((TEXT, qas), (" ", [question("Who?", " ", key="4")])))
    folder = prepare(config(tmp_path, validation_fraction=0), BYTE, dedup=DedupConfig(exact=True))
    store = DatasetStore(folder, "train")
    assert [store.document_key(i) for i in range(2)] == ["0", "3"]
    assert len(store.document_offsets) == 3
    assert store.spans is not None
    assert store.spans.tolist() == [[2, 2]] * 2
    assert len(store.questions) == 2
    zstandard = pytest.importorskip("zstandard")
    export_jsonl_zst(folder, tmp_path / "out")
    packed = (tmp_path / "out" / "train.jsonl.zst").read_bytes()
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(packed).decode().splitlines()
    assert [(row["parts"][0], row["answers"]) for row in map(json.loads, lines)] == [
        ("Who?", ["cat"]), ("Who  sat?", ["cat"]),
    ]  # fmt: skip


PROBLEMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "rules": ({}, {"clean": CleanConfig(rules=("nfc",))}, "clean.rules is nfc, but answers of squad: sources stand"),
    "lines": ({}, {"dedup": DedupConfig(lines=True)}, "dedup.lines"),
    "copies": ({}, {"augment": AugmentConfig(copies=1)}, "augment.copies"),
    "sentences": ({"sentences": True}, {}, "leave one out"),
    "fields": ({"fields": ("a", "b")}, {}, "have no fields"),
    "another form": ({"validation_source": "text:{}/v.txt"}, {}, "not both squad: sources"),
    "held out alone": ({"source": "text:{}/v.txt", "test_source": "squad:{}/t.json"}, {}, "not both squad: sources"),
}


@pytest.mark.parametrize(("settings", "more", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_mistakes_are_told(tmp_path: Path, settings: dict[str, Any], more: dict[str, Any], message: str) -> None:
    write(tmp_path / "t.json", squad((TEXT, [GOOD])))
    (tmp_path / "v.txt").write_text("text")
    settings = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(UserError, match=message):
        prepare(config(tmp_path, **settings), BYTE, **more)


def test_answers_of_real_questions(tmp_path: Path) -> None:
    """XQuAD: nearly all answers are whole words, and all but one in a thousand are once compared as SQuAD does."""
    file = DATA / "qa" / "xquad.en.json"
    if not file.exists():
        pytest.skip("shared/data/qa is not here")
    found = documents(file)
    assert len(found) == 1190
    said, wanted = [answer_of(document) for document in found], [document.answers[0] for document in found]
    assert all(answer in text for text, answer in zip(said, wanted))
    assert sum(a == b for a, b in zip(said, wanted)) / len(found) > 0.985
    assert exact_match(said, wanted).value > 99.9
    # In a dataset, too, the tokens of the span are those words.
    folder = prepare(config(tmp_path, source=f"squad:{file}", validation_fraction=0), BYTE)
    store = DatasetStore(folder, "train")
    examples = SpanQAExamples(store, 2**13, bos_id=256, eos_id=256, max_question=500)
    assert examples.cut == 0
    for i in range(0, len(examples), 100):
        row = examples.batch(np.array([i]))
        tokens = row["tokens"][0, row["starts"][0] : row["ends"][0] + 1]
        assert bytes(tokens.tolist()).decode().strip() == said[i]
