"""Classes by words: scores beside a forward pass for each word, what is shown, and what is learned."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small_runs
import tiny

from lm import metrics
from lm.config import Experiment
from lm.data.config import DataConfig
from lm.data.objectives.prompts import PromptedExamples, draw_shots, make_pattern
from lm.data.prepare import prepare
from lm.data.store import DatasetStore, MemoryStore
from lm.errors import UserError
from lm.models.transformer import ModelConfig, Transformer
from lm.optim import OptimConfig
from lm.run import Dataset
from lm.sharding import MeshConfig
from lm.tasks.base import hidden_of
from lm.tasks.prompted import Prompted
from lm.text.base import ByteTokenizer
from lm.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from lm.train import TrainConfig

EOS = 256
TEXTS = ["good film", "bad", "a fine, long text that is cut", "so so", "ok", "no"]
LABELS = [1, 0, 1, 0, 1, 0]
BERT = {"mask": "bidirectional", "norm_place": "post", "embedding_norm": True, "head_transform": True}


def memory(texts: list[Any] = TEXTS, labels: list[int] = LABELS) -> MemoryStore:
    """Texts, or pairs of them, as bytes."""
    parts = [[text] if isinstance(text, str) else list(text) for text in texts]
    documents = [np.array([*"".join(each).encode(), EOS]) for each in parts]
    return MemoryStore(documents, part_lengths=[[len(p) for p in each] for each in parts], labels=labels)


@functools.cache
def masking_tokenizer() -> Tokenizer:
    made = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=258, special_tokens=("<mask>",)), ["abc"])
    assert made.mask_id is not None
    return made


def spelled(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Tokens as text: ⏎ for the end and begin of texts, ▮ for a mask."""
    names = {tokenizer.eos_id: "⏎", tokenizer.bos_id: "⏎", tokenizer.mask_id: "▮"}
    return "".join(names.get(i) or tokenizer.decode([i]) for i in ids.tolist())


def rows_of(made: PromptedExamples, index: int, tokenizer: Tokenizer) -> list[str]:
    batch = made.batch(np.array([index]))
    found = []
    for tokens, segments in zip(batch["tokens"][0], batch["segments"][0]):
        size = int(segments.sum())
        assert not tokens[size:].any()
        found.append(spelled(tokenizer, tokens[:size]))
    return found


def make(task: Prompted, tokenizer: Tokenizer, store: MemoryStore, seq_len: int, masked: bool) -> PromptedExamples:
    model = ModelConfig(**(BERT if masked else {}))
    maker = task.maker(model, tokenizer, ("0", "1"))
    return maker(store, DataConfig(seq_len=seq_len), False)  # type: ignore[return-value]


WORDS = ("0= awful", "1= great")


def test_a_decoder_reads_a_row_for_each_word() -> None:
    task = Prompted(pattern="Q: {text} It was{word}. (not read)", words=WORDS)
    made = make(task, ByteTokenizer(), memory(), 30, masked=False)
    assert rows_of(made, 0, ByteTokenizer()) == ["⏎Q: good film It was awful", "⏎Q: good film It was great"]
    assert rows_of(made, 2, ByteTokenizer()) == ["⏎Q: a fine, long  It was awful", "⏎Q: a fine, long  It was great"]
    assert made.cut == 1
    assert made.documents(2).tolist() == [2]


def test_an_encoder_reads_masks() -> None:
    tokenizer = masking_tokenizer()
    store = MemoryStore([np.array([*tokenizer.encode(text), tokenizer.eos_id]) for text in TEXTS], labels=LABELS)
    task = Prompted(pattern="It was{word}: {text}", words=("0= bad", "1= top"))
    made = make(task, tokenizer, store, 40, masked=True)
    assert rows_of(made, 0, tokenizer) == ["⏎It was▮▮▮▮: good film⏎"]
    with pytest.raises(UserError, match="4 and 6 tokens, and the model fills in masks"):
        make(Prompted(pattern="{text}", words=("0= bad", "1= great")), tokenizer, store, 40, masked=True)
    with pytest.raises(UserError, match="the tokenizer has none"):
        make(task, ByteTokenizer(), memory(), 40, masked=True)


def test_pairs_and_blanks() -> None:
    pairs = memory([("ab", "cd"), ("abcdef", "ghijkl")], [0, 1])
    task = Prompted(pattern="{1} | {0}?", words=("0=n", "1=y"), calibrate=True)
    made = make(task, ByteTokenizer(), pairs, 14, masked=False)
    assert rows_of(made, 0, ByteTokenizer()) == ["⏎cd | ab?n", "⏎cd | ab?y", "⏎ | ?n", "⏎ | ?y"]
    assert rows_of(made, 1, ByteTokenizer()) == ["⏎ghij | abcd?n", "⏎ghij | abcd?y", "⏎ | ?n", "⏎ | ?y"]


def test_documents_are_shown_evenly_and_not_asked_about() -> None:
    task = Prompted(pattern="{text}:{word}.", words=("0=n", "1=y"), shots=4, shot_seed=3)
    made = make(task, ByteTokenizer(), memory(), 200, masked=False)
    assert len(made) == 2
    shown = rows_of(made, 0, ByteTokenizer())[0].removeprefix("⏎").split("\n\n")
    assert shown.pop() == f"{TEXTS[made.documents(0)[0]]}:n"
    asked = [TEXTS[made.documents(i)[0]] for i in range(2)]
    assert sorted([*asked, *(text.split(":")[0] for text in shown)]) == sorted(TEXTS)
    assert all(text == f"{TEXTS[i]}:{'ny'[LABELS[i]]}." for text in shown for i in [TEXTS.index(text.split(":")[0])])
    assert sorted(text[-2] for text in shown) == ["n", "n", "y", "y"]
    again = make(Prompted(**vars(task) | {"shot_seed": 4}), ByteTokenizer(), memory(), 200, masked=False)
    assert rows_of(again, 0, ByteTokenizer()) != rows_of(made, 0, ByteTokenizer())
    # Long texts share the row.
    store = memory(["x" * 500, "y" * 500, "z" * 500, "v" * 500], [0, 1, 0, 1])
    short = make(Prompted(pattern="{text}:{word}.", words=("0=n", "1=y"), shots=2), ByteTokenizer(), store, 100, False)
    row = rows_of(short, 0, ByteTokenizer())[0]
    assert len(row) == 100
    assert sorted(set(row)) == sorted({*"⏎\n:.ny", *row[1], *row[50], *row[-5]})
    assert min(row.count(letter) for letter in set("xyzv") & set(row) - {"y"}) >= 28


def test_shots_are_a_formula() -> None:
    labels = np.array([0, 1, 2] * 20)
    drawn = [draw_shots(labels, 3, 7, seed) for seed in range(50)]
    assert all(sorted(np.bincount(labels[shots], minlength=3)) == [2, 2, 3] for shots in drawn)
    assert all(len(set(shots.tolist())) == 7 for shots in drawn)
    assert len({tuple(shots.tolist()) for shots in drawn}) == 50
    assert draw_shots(labels, 3, 7, 0).tolist() == draw_shots(labels, 3, 7, 0).tolist()
    assert len({int(np.argmax(np.bincount(labels[shots]))) for shots in drawn}) == 3, "no class is always the third"
    with pytest.raises(UserError, match="a class has only 1 training documents"):
        draw_shots(np.array([0, 1, 1, 1]), 2, 4, 0)


def brute_force(
    model: Transformer, params: Any, asked: list[tuple[list[int], int, list[int]]], masked: bool
) -> list[float]:
    """Of (row, place, word) the log-probability of the word's tokens there, from a forward pass over the row alone."""
    rows = [tokens if masked else [*tokens[:at], *word] for tokens, at, word in asked]
    tokens, segments = np.zeros((2, len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1

    @jax.jit
    def logits_of(tokens: Any, segments: Any) -> Any:
        hidden: Any = model.apply({"params": params}, tokens, None, segments, method="hidden")[0]
        return model.apply({"params": params}, hidden, method="logits")

    logits = np.asarray(logits_of(tokens, segments), np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return [
        float(sum(log_probs[i, (at if masked else at - 1) + j, token] for j, token in enumerate(word)))
        for i, (_, at, word) in enumerate(asked)
    ]


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_are_those_of_a_forward_pass_a_word(masked: bool, calibrate: bool) -> None:
    tokenizer = masking_tokenizer()
    store = MemoryStore([np.array([*tokenizer.encode(text), tokenizer.eos_id]) for text in TEXTS], labels=LABELS)
    words = ("0= bad", "1= top") if masked else ("0= bad", "1= great!")
    task = Prompted(pattern="<{text}> is{word}.", words=words, calibrate=calibrate)
    made = make(task, tokenizer, store, 48, masked)
    model, params = tiny.build(tiny.config(vocab_size=258, max_len=48, **(BERT if masked else {})))
    params = tiny.perturbed(params, scale=0.3)
    batch = {name: jax.numpy.asarray(value) for name, value in made.batch(np.arange(len(TEXTS))).items()}

    ids = [tokenizer.encode(word.partition("=")[2]) for word in words]
    asked = []
    for text in [*TEXTS, ""]:
        begin = [tokenizer.bos_id, *tokenizer.encode("<"), *tokenizer.encode(text), *tokenizer.encode("> is")]
        row = [*begin, *([tokenizer.mask_id] * 4), *tokenizer.encode("."), tokenizer.eos_id]
        asked += [(row, len(begin), word) for word in ids]
    told_words = np.reshape(brute_force(model, params, asked, masked), (-1, 2))
    wanted = told_words[:-1] - calibrate * told_words[-1]

    @jax.jit
    def scored(batch: Any) -> Any:
        hidden = hidden_of(model, params, batch, None)
        return *task.loss_from(model, params, hidden, batch, None), task.scores(model, params, hidden, batch)[0]

    total, hidden_sums, scores = scored(batch)
    np.testing.assert_allclose(scores, wanted, rtol=2e-5, atol=2e-5)
    shifted = wanted - wanted.max(axis=1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    assert float(total) == pytest.approx(-log_probs[np.arange(6), LABELS].sum(), rel=1e-4)
    told = task.summarise({name: np.asarray(value) for name, value in hidden_sums.items() if name != "rows"})
    assert told["accuracy"] == pytest.approx(np.mean(wanted.argmax(axis=1) == LABELS))
    assert {"macro_f1", "macro_f1_se", "accuracy_se"} <= told.keys()
    assert task.summarise({"loss": 1.0, "correct": 1.0, "weight": 2.0}) == {"loss": 0.5, "accuracy": 0.5}
    assert metrics.ratio(hidden_sums, "loss") == pytest.approx(float(total) / 6)


def test_padding_counts_nothing() -> None:
    task = Prompted(pattern="{text}", words=WORDS, calibrate=True)
    made = make(task, ByteTokenizer(), memory(), 24, masked=False)
    model, params = tiny.build(tiny.config(vocab_size=257))
    both = task.loss(model, params, made.batch(np.array([3, -1])), None)[1]  # type: ignore[arg-type]
    alone = task.loss(model, params, made.batch(np.array([3])), None)[1]  # type: ignore[arg-type]
    assert float(both["weight"]) == 1
    assert float(both["loss"]) == pytest.approx(float(alone["loss"]), rel=1e-5)
    assert np.asarray(both["confusion"]).sum() == 1


def write(path: Path, n: int = 120) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        good = bool(i % 2)
        drawn = [*rng.choice(["the", "film", "was", "a", "one"], 3), "fun" if good else "dull"]
        rows.append({"text": " ".join(rng.permutation(drawn)) + f" {i}", "y": "yes" if good else "no"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def experiment(folder: Path, **task: Any) -> Experiment:
    settings = {"pattern": "{text} It was", "words": ("no= bad", "yes= top")} | task
    return Experiment(
        data=DataConfig(
            source=f"jsonl:{write(folder / 't.jsonl')}",
            label_field="y",
            root=str(folder / "datasets"),
            validation_fraction=0.2,
            seq_len=160 if task.get("shots") else 48,
        ),
        tokenizer=TokenizerConfig(kind="byte"),
        model=ModelConfig(d_model=32, n_layers=2, n_heads=2, max_len=160),
        task=Prompted(**settings),  # type: ignore[arg-type]
        optim=OptimConfig(peak_lr=5e-3, warmup=5),
        train=TrainConfig(steps=60, batch_size=16, log_every=10, eval_every=60, save_every=0),
        mesh=MeshConfig(devices=1),
    )


def test_it_is_tuned(tmp_path: Path) -> None:
    small_runs.start(experiment(tmp_path), tmp_path / "run")
    (record,) = [record for record in small_runs.metrics(tmp_path / "run") if record["split"] == "validation"]
    assert record["accuracy"] == 1
    assert record["loss"] < 0.1


def test_what_is_shown_comes_from_the_training_split(tmp_path: Path) -> None:
    settings = experiment(tmp_path, shots=2)
    folder = prepare(settings.data, settings.tokenizer)
    dataset = Dataset.open(folder)
    maker = settings.task.maker(settings.model, dataset.tokenizer, dataset.labels)
    train, held_out = (DatasetStore(folder, split) for split in ("train", "validation"))
    trained, asked = maker(train, settings.data, True), maker(held_out, settings.data, False)
    assert len(trained) == len(train.document_offsets) - 1 - 2
    assert len(asked) == len(held_out.document_offsets) - 1
    rows = [rows_of(made, 0, dataset.tokenizer)[0].split("\n\n") for made in (trained, asked)]  # type: ignore[arg-type]
    assert rows[0][:2] == rows[1][:2], "the same documents, whatever is asked about"
    texts = {
        dataset.tokenizer.decode(train.read(a, b - 1).tolist())
        for a, b in zip(train.document_offsets, train.document_offsets[1:])
    }
    for text in rows[1][:2]:
        assert text.removeprefix("⏎").split(" It was")[0] in texts


@pytest.mark.parametrize(
    ("task", "model", "data", "says"),
    [
        ({}, {"mask": "prefix"}, {}, "needs model.mask causal or bidirectional"),
        ({}, {"encoder_layers": 1}, {}, "no encoder"),
        ({"pattern": "{word} {text}"}, {}, {}, "tells the word before it has read the text"),
        ({"words": ()}, {}, {}, "give a word for each class"),
        ({}, {}, {"label_field": None}, "set data.label_field"),
        ({"pattern": "{0} {1}"}, {}, {}, "of two texts; name their columns in data.fields"),
        ({}, {}, {"fields": ("a", "b")}, "of one text; leave data.fields out"),
    ],
)
def test_what_cannot_serve(task: dict[str, Any], model: dict[str, Any], data: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {"pattern": "{text}", "words": WORDS}
    with pytest.raises(UserError, match=says) as told:
        Prompted(**good | task).check(ModelConfig(**model), DataConfig(**{"label_field": "y"} | data))
    assert "\n" not in str(told.value)
    Prompted(**good).check(ModelConfig(), DataConfig(label_field="y"))
    Prompted(pattern="{word} {text}", words=WORDS).check(ModelConfig(**BERT), DataConfig(label_field="y"))


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"pattern": "no place"}, "it has {text} once"),
        ({"pattern": "{text} {text}"}, "it has {text} once"),
        ({"pattern": "{text} {0}"}, "it has {text} once"),
        ({"pattern": "{0}"}, "it has {text} once"),
        ({"pattern": "{text}{word}{word}"}, "at most one {word}"),
        ({"words": ("bad",)}, "write CLASS=WORD"),
        ({"words": ("0=",)}, "write CLASS=WORD"),
        ({"shots": -1}, "task.shots is -1"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_settings_that_cannot_be(task: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Prompted(**task)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("0=a", "2=b"), "no word for the class '1'"),
        (("0=a", "1=b", "2=c"), "doesn't know task.words' the class '2'"),
        (("0=a", "1=b", "1=c"), "two words for a class"),
        (("0=a", "1=a"), "are the same tokens"),
    ],
)
def test_words_and_classes_belong_together(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Prompted(pattern="{text}", words=words).maker(ModelConfig(), ByteTokenizer(), ("0", "1"))


def test_words_that_a_tokenizer_does_not_know() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="word", vocab_size=50), ["good bad film"])
    with pytest.raises(UserError, match="'great', which the tokenizer doesn't know"):
        make_pattern("{text}", ["bad", "great"], tokenizer)
    with pytest.raises(UserError, match="leaves no room for a text in a row of 8"):
        make(Prompted(pattern="{text} long pattern", words=WORDS), ByteTokenizer(), memory(), 8, masked=False)
    with pytest.raises(UserError, match=r"task\.shots is 100, but a class has only"):
        make(Prompted(pattern="{text}", words=WORDS, shots=100), ByteTokenizer(), memory(), 8, masked=False)
