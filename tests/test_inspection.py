"""What `lm inspect` shows: arrays against references, the page against the arrays, and in a browser by hand."""

import base64
import dataclasses
import hashlib
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from browser import Browser, needs_chromium

from lm import losses
from lm.config import Experiment
from lm.data.config import DataConfig
from lm.data.objectives.parts import ClassificationExamples, Seq2SeqExamples, TextPairLM
from lm.data.store import MemoryStore
from lm.errors import UserError
from lm.report import inspection as inspections
from lm.report.attention import About, attention_page, check_head, chosen_layers, draw, quantised
from lm.report.inspection import Inspection, Reading, inspect, read, shapes
from lm.report.pieces import labels
from lm.run import Trained
from lm.tasks import TASKS
from lm.text.tokenizer import ByteTokenizer, Tokenizer, TokenizerConfig, train_tokenizer

HOSTILE = "<script>alert(1)</script><!--"
CORPUS = ["the cat sat on the mat and saw the dog", "a dog ran over a mat, then sat", "红色的猫坐在垫子上"] * 5
BYTE = ByteTokenizer()
PIECES = train_tokenizer(TokenizerConfig(kind="wordpiece", vocab_size=120), CORPUS)
BERT = {"mask": "bidirectional", "norm_place": "post", "embedding_norm": True, "head_transform": True}


def trained(kind: str, tokenizer: Tokenizer = BYTE, packing: str = "stream", **model: Any) -> Trained:
    """A run as `lm.run.load` would give it, of parameters far from their initial values; a classifier's is of pairs."""
    config = tiny.config(**{"vocab_size": tokenizer.vocab_size + 7, "max_len": 64, **model})
    built, params = tiny.build(config)
    data = DataConfig(packing=packing, fields=("a", "b") if kind == "classification" else ())
    experiment = Experiment(model=config, task=TASKS[kind](), data=data)
    return Trained(experiment, tokenizer, built, tiny.perturbed(params), 7)


@pytest.fixture(scope="module")
def gpt() -> Trained:
    return trained("causal_lm")


@pytest.fixture(scope="module")
def bert() -> Trained:
    return trained("masked_lm", PIECES, "documents", **BERT)


@pytest.fixture(scope="module")
def translator() -> Trained:
    return trained("seq2seq", encoder_layers=1)


@pytest.fixture(scope="module")
def classifier() -> Trained:
    return trained("classification", PIECES, **BERT, n_classes=3, token_types=2)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def forward(run: Trained, reading: Reading, **changes: Any) -> np.ndarray:
    """Logits of the whole model, [T, V]."""
    inputs = {name: value for name, value in reading.batch.items() if name not in ("targets", "weights")}
    return np.asarray(run.model.apply({"params": run.params}, **(inputs | changes)))[0]


def about(run: Trained, **changes: Any) -> About:
    causal = run.model.config.mask != "bidirectional"
    told = {"run": "made", "step": run.step, "tokenizer": run.tokenizer, "in_bytes": False, "causal": causal}
    return About(**(told | changes))


def page_of(run: Trained, found: Inspection, head: tuple[int, int] | None = None, **changes: Any) -> str:
    layers = chosen_layers(shapes(run.model.config, found.reading), ())
    return attention_page(found, about(run, **changes), layers, head)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def weights_of(kind: dict[str, Any], names: dict[str, list[str]]) -> np.ndarray:
    """The probabilities that a page holds, [L, N, T, S]."""
    raw = np.frombuffer(zlib.decompress(base64.b64decode(kind["weights"])), np.uint8)
    size = (len(kind["layers"]), kind["heads"], len(names[kind["queries"]]), len(names[kind["keys"]]))
    return (raw.reshape(size) / 255.0) ** 2


# How texts are laid out: as the examples of training.


def same_rows(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """The one row of `found` is that of `wanted`, whose `segments` say what is no padding."""
    for name, value in found.items():
        there = wanted["source_segments" if name.startswith("source_") else "segments"] > 0
        np.testing.assert_array_equal(value[0], wanted[name][there], err_msg=name)
    assert set(wanted) - set(found) <= {"segments", "source_segments", "labels", "label_weights"}


def pairs(tokenizer: Tokenizer, a: str, b: str) -> MemoryStore:
    parts = [tokenizer.encode(a), tokenizer.encode(b)]
    document = np.array([*parts[0], *parts[1], tokenizer.eos_id], np.int32)
    return MemoryStore([document], part_lengths=[[len(part) for part in parts]], labels=[1])


def test_source_and_target_are_read_as_in_training(translator: Trained):
    ids = {"bos_id": BYTE.bos_id, "eos_id": BYTE.eos_id}
    wanted = Seq2SeqExamples(pairs(BYTE, "a cat", "猫"), 20, 20, **ids).batch(np.array([0]))
    found = read(translator, [], "a cat", "猫")
    same_rows(found.batch, wanted)
    assert not found.written


@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_a_decoder_alone_reads_source_and_target_as_in_training(mask: str):
    run = trained("seq2seq", mask=mask)
    wanted = TextPairLM(pairs(BYTE, "a cat", "猫"), 30, bos_id=BYTE.bos_id, eos_id=BYTE.eos_id).batch(np.array([0]))
    found = read(run, [], "a cat", "猫").batch
    if mask == "causal":
        wanted.pop("prefix")
    same_rows(found, wanted)


def test_pairs_are_read_as_in_training(classifier: Trained):
    store = pairs(PIECES, "the cat sat", "a dog")
    ids = {"bos_id": PIECES.bos_id, "eos_id": PIECES.eos_id}
    wanted = ClassificationExamples(store, 30, 3, pair=True, **ids).batch(np.array([0]))
    found = read(classifier, ["the cat sat", "a dog"], None, None).batch
    same_rows({name: found[name] for name in ("tokens", "positions", "types")}, wanted)
    assert not found["weights"].any()


def test_a_prefix_is_followed_by_its_continuation():
    run = trained("prefix_lm", packing="documents", mask="prefix")
    found = read(run, [], "ab", "cd").batch
    bos, eos = BYTE.bos_id, BYTE.eos_id
    assert found["tokens"].tolist() == [[bos, 97, 98, 99, 100]]
    assert found["targets"][0, 2:].tolist() == [99, 100, eos]
    assert found["prefix"].tolist() == [[1, 1, 1, 0, 0]]
    assert found["weights"].tolist() == [[0, 0, 1, 1, 1]]
    assert "prefix" not in read(run, ["abcd"], None, None).batch, "all of a text is told, nothing given"


def test_what_the_model_writes_is_its_likeliest_target(translator: Trained):
    reading = read(translator, [], "abc", None)
    assert reading.written
    scored = reading.batch["weights"][0] > 0
    guesses = forward(translator, reading)[:, : BYTE.vocab_size].argmax(-1)
    np.testing.assert_array_equal(guesses[scored], reading.batch["targets"][0][scored])


@pytest.mark.parametrize(
    ("run", "texts", "source", "target", "message"),
    [
        ("gpt", [], None, None, "nothing to look at; give --text"),
        ("translator", [], None, None, "nothing to look at; give --source"),
        ("gpt", ["a", "b"], None, None, "--text has 2 texts, .* trained on one; quote"),
        ("classifier", ["a", "a", "a"], None, None, "--text has 3 texts, .* two at most; give one, or two"),
        ("gpt", [""], None, None, "--text has no tokens"),
        ("translator", [], "", "a", "--source has no tokens"),
        ("translator", [], "a", "", "--target has no tokens"),
        ("gpt", ["a" * 65], None, None, "the text has 65 tokens, more than the 64 of model.max_len"),
        ("translator", [], "a" * 64, "a", "the source has 65 tokens, more than the 64 of model.max_len"),
        ("translator", [], "a", "a" * 64, "the target has 65 tokens, more than the 64 of model.max_len"),
        ("gpt", [], "a", None, "--source, but the run's model has no encoder"),
        ("gpt", ["a"], None, "b", "--target goes with --source"),
        ("translator", ["a"], None, None, "trained on sources and targets; give --source"),
        ("translator", ["a"], "a", None, "--text and --source; give one of them"),
    ],
)
def test_what_can_not_be_read_is_told(
    run: str, texts: list[str], source: str | None, target: str | None, message: str, request: pytest.FixtureRequest
):
    with pytest.raises(UserError, match=message) as told:
        read(request.getfixturevalue(run), texts, source, target)
    assert "\n" not in str(told.value)


# What is found in them.


def test_a_causal_text(gpt: Trained):
    reading = read(gpt, ["the cat 猫"], None, None)
    found = inspect(gpt, reading)
    ids, T = reading.tokens, len(reading.tokens)
    weights = found.attention["self"]
    assert weights.shape == (2, 4, T, T)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert not weights[..., np.triu(np.ones((T, T), bool), 1)].any()
    # Losses: by hand in float64, and as the objective has them.
    logits = forward(gpt, reading)
    by_hand = -log_softmax(logits)[np.arange(T - 1), ids[1:]]
    assert found.nats is not None
    np.testing.assert_allclose(found.nats[:-1], by_hand, rtol=1e-5)
    assert math.isnan(found.nats[-1])
    total, _ = losses.cross_entropy(jnp.asarray(logits[:-1]), jnp.asarray(ids[1:]), jnp.ones(T - 1))
    assert float(np.nansum(found.nats)) == pytest.approx(float(total), rel=1e-5)


def test_the_losses_of_a_target(translator: Trained):
    reading = read(translator, [], "a cat", "猫 b")
    found = inspect(translator, reading)
    assert found.nats is not None
    by_hand = -log_softmax(forward(translator, reading))[np.arange(6), reading.batch["targets"][0]]
    np.testing.assert_allclose(found.nats, by_hand, rtol=1e-5)
    sizes = {name: weights.shape for name, weights in found.attention.items()}
    assert sizes == {"self": (2, 4, 6, 6), "cross": (2, 4, 6, 6), "encoder": (1, 4, 6, 6)}
    for weights in found.attention.values():
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_the_lens_is_what_a_model_without_its_later_layers_writes(gpt: Trained):
    """Layers that write nothing leave the residual stream as it is, so that the whole model is its lens before them."""
    reading = read(gpt, ["the cat"], None, None)
    lens = inspect(gpt, reading).lens
    assert lens is not None
    told, T = np.roll(reading.tokens, -1), len(reading.tokens)

    def silenced(path: Any, leaf: jax.Array, since: int) -> jax.Array:
        writes = {"out", "down"} & {str(getattr(key, "key", "")) for key in path}
        return leaf.at[since:].set(0) if writes and "layers" in str(path[0]) else leaf

    for layer in range(3):
        params = jax.tree_util.tree_map_with_path(lambda path, x, n=layer: silenced(path, x, n), gpt.params)
        wanted = np.exp(log_softmax(forward(dataclasses.replace(gpt, params=params), reading)))
        np.testing.assert_allclose(lens.came[layer, :-1], wanted[np.arange(T), told][:-1], rtol=1e-4)
        order = np.sort(wanted[:, : BYTE.vocab_size], axis=-1)[:, ::-1]
        np.testing.assert_allclose(lens.probabilities[layer], order[:, :5], rtol=1e-4)
        of_ids = np.take_along_axis(wanted, lens.ids[layer], axis=-1)
        np.testing.assert_allclose(of_ids, lens.probabilities[layer], rtol=1e-4)
    assert np.isnan(lens.came[:, -1]).all(), "the last place has nothing to tell"


def test_hidden_tokens_are_scored_one_by_one(bert: Trained, monkeypatch: pytest.MonkeyPatch):
    reading = read(bert, ["the cat sat on the mat"], None, None)
    assert reading.mask_id == PIECES.mask_id
    monkeypatch.setattr(inspections, "_ROWS", 4)  # more than one batch, the last not full
    found = inspect(bert, reading).nats
    assert found is not None
    special = set(PIECES.special_tokens.values())
    for place, token in enumerate(reading.tokens):
        if token in special:
            assert math.isnan(found[place])
            continue
        hidden = reading.batch["tokens"].copy()
        hidden[0, place] = PIECES.mask_id
        wanted = -log_softmax(forward(bert, reading, tokens=hidden))[place, token]
        assert found[place] == pytest.approx(wanted, rel=1e-4)


def test_hidden_tokens_are_left_out_where_it_takes_long(bert: Trained, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inspections, "_CHEAP", 1000)
    found = inspect(bert, read(bert, ["the cat"], None, None))
    assert found.nats is None
    page = page_of(bert, found)
    assert "would take too long" in page
    assert " nats, " not in page


def test_classes(classifier: Trained):
    reading = read(classifier, ["the cat", "a dog"], None, None)
    found = inspect(classifier, reading)
    assert found.nats is None
    assert found.lens is None
    assert found.classes is not None
    hidden, _ = classifier.model.apply(
        {"params": classifier.params},
        reading.batch["tokens"],
        types=reading.batch["types"],
        method="hidden",
    )
    scores = classifier.model.apply({"params": classifier.params}, hidden, method="classify")
    np.testing.assert_allclose(found.classes, np.exp(log_softmax(np.asarray(scores)))[0], rtol=1e-4)
    page = page_of(classifier, found, classes=("good", HOSTILE, "bad"))
    assert f"{found.classes[0]:.1%}" in page
    assert HOSTILE not in page.replace("alert(1)</script><script", "")
    assert "class 2" in page_of(classifier, found)


def test_too_many_weights_are_refused(gpt: Trained, monkeypatch: pytest.MonkeyPatch):
    assert chosen_layers({"self": (12, 12, 300, 300)}, ()) == {"self": list(range(12))}
    with pytest.raises(UserError, match=r"34,560,000 attention weights is too large .* --layers"):
        chosen_layers({"self": (24, 16, 300, 300)}, ())
    assert chosen_layers({"self": (24, 16, 300, 300)}, (3, 0)) == {"self": [0, 3]}
    assert chosen_layers({"self": (3, 2, 5, 5), "encoder": (1, 2, 5, 5)}, (1,)) == {"self": [1], "encoder": []}
    for layer in (-1, 3):
        with pytest.raises(UserError, match=f"--layers has {layer}; .* from 0 to 2"):
            chosen_layers({"self": (3, 2, 5, 5), "encoder": (1, 2, 5, 5)}, (0, layer))
    for head in ((3, 0), (0, 2), (-1, 0), (0, -1)):
        with pytest.raises(UserError, match="layers go from 0 to 2 and heads from 0 to 1"):
            check_head({"self": (3, 2, 5, 5), "encoder": (1, 2, 5, 5)}, head)
    check_head({"self": (3, 2, 5, 5)}, (2, 1))
    monkeypatch.setattr(inspections, "_CAPTURED", 1000)
    with pytest.raises(UserError, match=r"attention maps of 16 tokens take .* give a shorter text"):
        inspect(gpt, read(gpt, ["a" * 16], None, None))


# Names of tokens.


def test_tokens_have_names_that_can_be_read():
    ids = BYTE.encode("a 猫\n😀\u202e")
    assert labels(BYTE, [*ids, BYTE.eos_id], in_bytes=False) == [
        *("a", "␣", "猫₁", "猫₂", "猫₃", "↵", "😀₁", "😀₂", "😀₃", "😀₄", "U+202E₁", "U+202E₂", "U+202E₃"),
        "<|endoftext|>",
    ]
    assert labels(BYTE, [0xE7, 97, 300, 7], in_bytes=False) == ["<0xE7>", "a", "<no token 300>", "U+0007"]
    bpe = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), CORPUS)
    assert "".join(labels(bpe, bpe.encode("the cat"), in_bytes=True)) == "the␣cat"
    assert labels(bpe, bpe.encode("龘"), in_bytes=True) == ["龘₁", "龘₂", "龘₃"]
    names = labels(PIECES, [PIECES.bos_id, *PIECES.encode("saton 猫")], in_bytes=False)
    assert names[0] == "[CLS]"
    assert names[-1] == "猫"
    assert "".join(name.removeprefix("##") for name in names[1:-1]) == "saton"
    assert names[2].startswith("##")


def test_sentencepiece_names_show_their_spaces():
    sentencepiece = train_tokenizer(TokenizerConfig(kind="sentencepiece-bpe", vocab_size=330), CORPUS)
    ids = sentencepiece.encode("the cat 龘")
    names = labels(sentencepiece, ids, in_bytes=False)
    assert len(names) == len(ids)
    assert "".join(names) == "the␣cat␣龘₁龘₂龘₃"


# The page.


@pytest.fixture(scope="module")
def found(gpt: Trained) -> Inspection:
    return inspect(gpt, read(gpt, [f"the 猫 {HOSTILE}"], None, None))


def test_weights_are_kept_closely():
    weights = np.linspace(0, 1, 20_001)
    kept = (quantised(weights) / 255.0) ** 2
    assert np.abs(kept - weights).max() < 0.004
    assert np.abs(kept - weights)[weights < 0.01].max() < 0.0004
    assert quantised(np.array([0.0, 1.0])).tolist() == [0, 255]


def test_the_numbers_of_the_page_are_those_of_the_arrays(gpt: Trained, found: Inspection):
    page = page_of(gpt, found)
    data = data_of(page)
    weights = weights_of(data["kinds"][0], data["names"])
    assert np.abs(weights - found.attention["self"]).max() < 0.004
    T = weights.shape[-1]
    assert not weights[..., np.triu(np.ones((T, T), bool), 1)].any()
    assert np.abs(weights.sum(-1) - 1).max() < 0.05
    assert found.nats is not None
    told = [float(value) for value in re.findall(r"\d+: ([\d.]+) nats, probability", page)]
    np.testing.assert_allclose(told, found.nats[:-1], atol=5.1e-4)
    scored = found.nats[:-1].mean()
    assert f"<dd>{scored:.3f}</dd>" in page
    assert f"<dd>{math.exp(scored):,.2f}</dd>" in page
    lens, shown = found.lens, data["lens"]
    assert lens is not None
    assert np.abs(np.array(shown["parts"]) / 10_000 - lens.probabilities).max() < 1e-4
    names = [[labels(BYTE, [i], in_bytes=False)[0] for i in row] for row in lens.ids[-1].tolist()]
    assert [[shown["pieces"][i] for i in row] for row in shown["top"][-1]] == names
    right = lens.ids[:, :-1, 0] == found.reading.tokens[1:]
    np.testing.assert_array_equal(np.array(shown["right"])[:, :-1], right)


def test_the_page_runs_its_own_script_alone_and_asks_for_nothing(gpt: Trained, found: Inspection):
    page = page_of(gpt, found)
    assert page == page_of(gpt, found), "the same arrays, the same bytes"
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    assert page.count("<script") == 2
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", page)
    assert "https://" not in scripts[0]


def test_only_the_layers_asked_for_are_there(gpt: Trained, found: Inspection):
    page = attention_page(found, about(gpt), {"self": [1]}, (1, 2))
    data = data_of(page)
    assert data["kinds"][0]["layers"] == [1]
    assert data["opened"] == [0, 0, 2]
    weights = weights_of(data["kinds"][0], data["names"])
    assert np.abs(weights[0] - found.attention["self"][1]).max() < 0.004
    assert 'aria-label="layer 1, head 3"' in page
    assert 'aria-label="layer 0, head 3"' not in page


def test_a_long_text_makes_a_page_that_a_browser_can_open():
    """300 tokens, 12 layers of 12 heads; weights as spread as noise has them, which compress badly."""
    T = 300
    rng = np.random.default_rng(0)
    one = np.exp(2 * rng.standard_normal((2, 12, T, T), np.float32))
    weights = np.tile(one / one.sum(-1, keepdims=True), (6, 1, 1, 1))
    weights[2:] = weights[2:][..., rng.permutation(T)]  # zlib looks back 32 KB only, so this is as good as new
    tokens = rng.integers(32, 126, (1, T)).astype(np.int32)
    nothing = Reading(batch={"tokens": tokens, "targets": tokens, "weights": np.zeros((1, T), np.float32)})
    found = Inspection(reading=nothing, attention={"self": weights}, nats=None, lens=None, classes=None)
    run = About(run="made", step=1, tokenizer=BYTE, in_bytes=False, causal=False)
    size = len(attention_page(found, run, chosen_layers({"self": weights.shape}, ())))
    assert 5e6 < size < 20e6


def test_pictures(translator: Trained, tmp_path: Path):
    found = inspect(translator, read(translator, [], "a $x$ 猫", "b"))
    layers = chosen_layers(shapes(translator.model.config, found.reading), ())
    paths = draw(found, about(translator), tmp_path / "png", layers, (1, 3))
    names = ["self.png", "self-1-3.png", "cross.png", "cross-1-3.png", "encoder.png"]
    assert [path.name for path in paths] == names, "the encoder has no second layer"
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_picture_shows_the_weights(tmp_path: Path):
    """One dark cell, at its row and column."""
    from matplotlib import image

    weights = np.zeros((1, 1, 4, 4), np.float32)
    weights[0, 0, 1, 2] = 1.0
    tokens = np.array([[97, 98, 99, 100]], np.int32)
    reading = Reading(batch={"tokens": tokens, "targets": tokens, "weights": np.zeros((1, 4), np.float32)})
    found = Inspection(reading=reading, attention={"self": weights}, nats=None, lens=None, classes=None)
    run = About(run="made", step=1, tokenizer=BYTE, in_bytes=False, causal=True)
    (path,) = draw(found, run, tmp_path / "png", {"self": [0]})
    pixels = image.imread(path)[..., :3]
    # The axes' frame is black; what is dark blue is the cell.
    down, across = np.nonzero((pixels[..., 2] > 0.3) & (pixels[..., 0] < 0.1))
    frame = np.nonzero((pixels < 0.02).all(-1))
    place = [
        (at.mean() - side.min()) / (side.max() - side.min()) for at, side in ((across, frame[1]), (down, frame[0]))
    ]
    assert 0.5 < place[0] < 0.85
    assert down.mean() < pixels.shape[0] * 0.6


# In a browser.

SHADES = "[...document.querySelectorAll('#keys .token')].map(e => e.style.getPropertyValue('--shade'))"


@needs_chromium
def test_a_page_that_is_clicked_hovered_and_typed_into(gpt: Trained, found: Inspection, tmp_path: Path):
    path = tmp_path / "page # 数据.html"
    path.write_text(page_of(gpt, found, (0, 1)), encoding="utf-8")
    weights, names = found.attention["self"], data_of(path.read_text(encoding="utf-8"))["names"]["tokens"]
    T = len(names)

    def percent(share: float) -> str:
        kept = float((quantised(np.array(share)) / 255.0) ** 2)
        return "0%" if kept == 0 else "<0.1%" if kept < 0.001 else f"{100 * kept:.1f}%"

    with Browser(tmp_path) as browser:
        browser.open(path)
        assert browser.complaints == []
        assert browser.text("#which").endswith("layer 0, head 1")
        assert browser.run("document.querySelectorAll('.head[aria-pressed=true]').length") == 1
        picture = browser.run("document.querySelector('#map').toDataURL()")

        # A click shows another head.
        browser.click("[aria-label='layer 1, head 2']")
        assert browser.text("#which").endswith("layer 1, head 2")
        assert browser.run("document.querySelector('[aria-label=\"layer 1, head 2\"]').ariaPressed") == "true"
        assert browser.run("document.querySelector('#map').toDataURL()") != picture

        # Hovering a query shades the keys by its row and says its largest weights.
        browser.hover("#queries .token:nth-child(6)")
        row = weights[1, 2, 5]
        shades = browser.run(SHADES)
        np.testing.assert_allclose([float(share) for share in shades], np.sqrt(row), atol=0.003)
        best = int(np.argmax(row))
        said = browser.text("#readout").replace("\u2068", "").replace("\u2069", "")
        assert said.startswith(f"“{names[5]}” (5) looks at “{names[best]}” ({best}) {percent(row[best])}")
        assert browser.text("#queries .here") == names[5]

        # Held, it stays where the mouse goes; a key then tells the weight of the two. Escape lets go.
        browser.click("#queries .token:nth-child(6)")
        browser.hover("#queries .token:nth-child(3)")
        assert browser.run("[...document.querySelectorAll('#queries .token')].findIndex(e => e.matches('.here'))") == 5
        browser.hover("#keys .token:nth-child(2)")
        said = browser.text("#readout").replace("\u2068", "").replace("\u2069", "")
        assert said.startswith(f"“{names[5]}” (5) to “{names[1]}” (1): {percent(row[1])}; it is seen by")
        browser.press("Escape")
        browser.hover("#queries .token:nth-child(3)")
        assert browser.text("#queries .here") == names[2]

        # A place on the large map: its last corner.
        browser.hover("#map", across=0.999, down=0.999)
        said = browser.text("#readout").replace("\u2068", "").replace("\u2069", "")
        last = f"“{names[-1]}” ({T - 1})"
        assert said.startswith(f"{last} to {last}: {percent(weights[1, 2, -1, -1])}")

        # By keyboard: along the heads and along the tokens.
        browser.run("document.querySelector('[aria-label=\"layer 0, head 0\"]').focus()")
        for key in ("ArrowRight", "ArrowDown", "Enter"):
            browser.press(key)
        assert browser.text("#which").endswith("layer 1, head 1")
        browser.run("document.querySelector('#queries .token').focus()")
        browser.press("ArrowRight")
        assert browser.text("#queries .here") == names[1]

        # The lens: a cell's five guesses of every layer.
        browser.hover("#lens-grid td[data-layer='1'][data-place='4']")
        assert found.lens is not None
        rows = browser.run(
            "[...document.querySelectorAll('#lens-detail tr')].map(r => [...r.children].map(c => c.textContent))"
        )
        assert [row[0] for row in rows] == ["layer 1", "layer 0", "embedding"]
        guess = labels(BYTE, found.lens.ids[1, 4].tolist()[:1], in_bytes=False)[0]
        assert rows[1][1].startswith(f"{guess} ")
        assert rows[1][1].endswith(f"{100 * found.lens.probabilities[1, 4, 0]:.1f}%")
        assert rows[0][6].rstrip("%") in (f"{100 * found.lens.came[2, 4]:.1f}", "<0.1")

        # Dark, the maps are painted anew; narrow, nothing sticks out.
        light = browser.run("document.querySelector('.head canvas').toDataURL()")
        browser.theme("dark")
        browser.wait(f"document.querySelector('.head canvas').toDataURL() !== {json.dumps(light)}")
        browser.call("Emulation.setDeviceMetricsOverride", width=380, height=700, deviceScaleFactor=2, mobile=False)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        assert browser.complaints == []

        # A planted script is refused, and the console says so.
        planted = tmp_path / "planted.html"
        text = path.read_text(encoding="utf-8")
        planted.write_text(text.replace("<main>", "<main><script>document.title = 'planted'</script>"), "utf-8")
        browser.open(planted)
        assert browser.run("document.title") != "planted"
        assert any("Content Security Policy" in complaint for complaint in browser.complaints)


@needs_chromium
def test_pages_of_the_other_families(translator: Trained, bert: Trained, classifier: Trained, tmp_path: Path):
    readings = {
        "translator": (translator, read(translator, [], "a long cat 猫", "b")),
        "bert": (bert, read(bert, ["the cat 猫"], None, None)),
        "classifier": (classifier, read(classifier, ["the cat", "a dog"], None, None)),
    }
    with Browser(tmp_path) as browser:
        for name, (run, reading) in readings.items():
            path = tmp_path / f"{name}.html"
            path.write_text(page_of(run, inspect(run, reading)), encoding="utf-8")
            browser.open(path)
            heads = sum(math.prod(shape[:2]) for shape in shapes(run.model.config, reading).values())
            assert browser.run("document.querySelectorAll('button.head').length") == heads
            assert bool(browser.run("document.querySelector('#lens-grid') !== null")) == (name != "classifier")
            if name == "translator":  # other queries and keys
                browser.click("details:nth-of-type(2) .head")
                assert browser.text("#which").startswith("Target to source")
                assert (
                    browser.run("document.querySelectorAll('#keys .token').length")
                    == reading.batch["source_tokens"].size
                )
                browser.hover("#queries .token:nth-child(2)")
                weights = inspect(run, reading).attention["cross"][0, 0, 1]
                shades = [float(share) for share in browser.run(SHADES)]
                np.testing.assert_allclose(shades, np.sqrt(weights), atol=0.003)
        assert browser.complaints == []
