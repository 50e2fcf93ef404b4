"""Extractive question answering: best spans, answers over windows, and how right they are."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import run as runs
from lm.config import Experiment
from lm.data.config import DataConfig, MixtureConfig
from lm.data.objectives.parts import SpanQAExamples
from lm.data.prepare import prepare
from lm.data.store import MemoryStore, Question
from lm.errors import UserError
from lm.models.transformer import ModelConfig
from lm.optim import OptimConfig
from lm.sharding import MeshConfig, make_mesh
from lm.tasks.base import hidden_of
from lm.tasks.distillation import DistillConfig, Distilled, make_teacher
from lm.tasks.extractive_qa import CLOSED, Answer, ExtractiveQA, best_spans
from lm.text.scores import exact_match, token_f1
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
import small_runs
import tiny
from tasks.families import experiment

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.mark.parametrize(("T", "longest", "n"), [(9, 3, 5), (7, 50, 20), (2, 1, 1), (12, 4, 100)])
def test_best_spans_are_those_of_all_spans(T: int, longest: int, n: int) -> None:
    rng = np.random.default_rng(T)
    logits = rng.normal(size=(4, 2, T)).astype(np.float32)
    logits[:, :, 1:][:, :, rng.random(T - 1) < 0.3] = CLOSED
    found = jax.tree.map(np.asarray, best_spans(jnp.asarray(logits), longest, n))
    for row in range(4):
        start, end = logits[row].astype(np.float64)
        spans = [(start[a] + end[b], a, b) for a in range(1, T) for b in range(a, min(T, a + longest))]
        wanted = sorted([span for span in spans if span[0] > CLOSED / 2], reverse=True)[:n]
        real = found["score"][row] > CLOSED / 2
        assert [*zip(found["first"][row][real], found["last"][row][real])] == [(a, b) for _, a, b in wanted]
        np.testing.assert_allclose(found["score"][row][real], [score for score, _, _ in wanted], rtol=1e-6)
        np.testing.assert_allclose(found["none"][row], start[0] + end[0], rtol=1e-6)


BOS, EOS = 90, 91
WORDS = ["The", " cat", " sat", " on", " the", " mat"]


def store(spans: list[tuple[int, int]], answers: list[list[str]]) -> MemoryStore:
    """Questions of two tokens about `WORDS`, of two tokens each."""
    documents = [np.array([1, 2, *range(10, 22), EOS]) for _ in spans]
    questions = [Question(WORDS, right) for right in answers]
    return MemoryStore(documents, part_lengths=[[2] * 7 for _ in spans], spans=spans, questions=questions)


def said(examples: SpanQAExamples, spans: dict[int, list[tuple[int, int, float]]], none: float) -> list[dict[str, Any]]:
    """As `best_spans` of each row: by example, spans as tokens of the text (0 to 11) with scores."""
    rows = []
    for index in range(len(examples)):
        begin = int(examples.batch(np.array([index]))["tokens"][0, 4]) - 10  # the text's first token in the window
        found = [(4 + a - begin, 4 + b - begin, score) for a, b, score in spans.get(index, [])]
        found += [(0, 10**6, 2 * CLOSED)] * (4 - len(found))
        first, last, score = zip(*found)
        rows.append({"first": first, "last": last, "score": score, "none": none - index})
    arrays = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return [{name: values[i : i + 2] for name, values in arrays.items()} for i in range(0, len(rows), 2)]


def test_answers_are_whole_words_and_the_best_of_all_windows() -> None:
    questions = store([(2, 2), (5, 6)], [["cat"], ["the mat", "mat"]])
    examples = SpanQAExamples(questions, 11, bos_id=BOS, eos_id=EOS, stride=4, max_question=2)
    assert [int(examples.documents(i)[0]) for i in range(len(examples))] == [0, 0, 0, 1, 1, 1]
    # Of document 0: " cat" is found in parts, twice; in window 1 better. Windows begin at tokens 0, 4 and 8.
    spans = {0: [(3, 3, 1.0), (0, 5, 0.5)], 1: [(4, 5, 4.0), (6, 9, 2.0)], 3: [(2, 2, 3.0), (2, 3, 2.0)], 5: []}
    batches = said(examples, spans, none=-10.0)
    answers = ExtractiveQA().answers(batches, questions, examples)
    assert answers[0] == [Answer("sat", 4.0), Answer("on the", 2.0), Answer("cat", 1.0), Answer("The cat sat", 0.5)]
    assert answers[1] == [Answer("cat", 3.0)], "the same words once, with the better score"
    assert ExtractiveQA().texts(batches, questions, examples) == [("sat", ["cat"]), ("cat", ["the mat", "mat"])]
    # A document whose windows are not all there has no answer.
    assert list(ExtractiveQA().answers(batches[:2], questions, examples)) == [0]
    # Where nothing can be an answer, none is given.
    assert ExtractiveQA().answers(said(examples, {}, 1.0), questions, examples)[0][0].text == ""


@pytest.mark.parametrize(("no_answer", "text"), [(None, "cat"), (0.0, ""), (0.9, ""), (1.1, "cat")])
def test_no_answer_must_be_better_by_a_margin_in_every_window(no_answer: float | None, text: str) -> None:
    questions = store([(-1, -1)], [[]])
    examples = SpanQAExamples(questions, 11, bos_id=BOS, eos_id=EOS, stride=4, max_question=2)
    # Windows have 5, 4 and 3 for no answer, the last of which counts.
    batches = said(examples, {1: [(6, 6, -4.0)], 0: [(2, 3, 2.0)]}, none=5.0)
    task = ExtractiveQA(no_answer=no_answer)
    assert task.texts(batches, questions, examples) == [(text, [""])]
    ranked = task.answers(batches, questions, examples)[0]
    assert [answer.score for answer in ranked] == sorted((answer.score for answer in ranked), reverse=True)
    assert ("" in [answer.text for answer in ranked]) == (no_answer is not None)


def test_scores_are_those_of_squad() -> None:
    texts = [("The Mat.", ["a mat", "x"]), ("red cat", ["a cat"]), ("", [""]), ("dog", [""])]
    scores = ExtractiveQA().score_texts(texts)
    assert scores["exact_match"] == pytest.approx(50)
    assert scores["f1"] == pytest.approx(100 * (1 + 2 / 3 + 1 + 0) / 4)
    values = np.array([100, 0, 100, 0])
    assert scores["exact_match_se"] == pytest.approx(values.std(ddof=1) / 2)
    assert ExtractiveQA(language="zh").score_texts([("1881年。", ["1881年"]), ("北京市", ["北京"])])["f1"] == 90


def test_no_place_but_cls_and_text_has_a_part_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = store([(2, 2), (5, 6)], [["cat"], ["the mat"]])
    examples = SpanQAExamples(questions, 14, bos_id=BOS, eos_id=EOS, stride=6, max_question=2)
    batch = {name: jnp.asarray(rows) for name, rows in examples.batch(np.array([0, 1, 2, 3, -1])).items()}
    task = ExtractiveQA()
    settings = {"mask": "bidirectional", "token_types": 2, "vocab_size": 96}
    model, params = tiny.build(task.settle(dataclasses.replace(tiny.config(), **settings), ()))
    hidden = jax.random.normal(jax.random.key(1), (5, 14, model.config.d_model))
    gradient = jax.grad(lambda hidden: task.loss_from(model, params, hidden, batch, None)[0])(hidden)
    there = np.abs(np.asarray(gradient)).sum(-1) > 0
    for row, count in enumerate([9, 6, 9, 6, 0]):
        assert np.flatnonzero(there[row]).tolist() == ([0, *range(4, 4 + count)] if count else []), row
    _, sums = task.loss_from(model, params, hidden, batch, None)
    assert sums["weight"] == 4
    # A window is right where both places are: here in all but one.
    at = [np.array(batch[name]) for name in ("starts", "ends")]
    at[1][1] += 1
    scores = jnp.stack([jax.nn.one_hot(places, 14) for places in at], axis=1)
    weights = jnp.repeat(batch["label_weights"][:, None] / 2, 2, axis=1)
    monkeypatch.setattr(ExtractiveQA, "scores", lambda *_: (scores, weights))
    _, sums = task.loss_from(model, params, hidden, batch, None)
    assert sums["correct"] == 3


MARGIN = 2.18  # what some of the questions of a run of six steps pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qa")
    settings = experiment(folder, "bert", "extractive_qa")
    task = ExtractiveQA(max_question=8, stride=6, no_answer=MARGIN)
    small_runs.start(dataclasses.replace(settings, task=task), folder / "run")
    return folder


def test_an_evaluation_reports_how_right_answers_are(trained: Path) -> None:
    settings = experiment(trained, "bert", "extractive_qa")
    result = runs.evaluate_run(trained / "run", mesh=MeshConfig(devices=1))
    for name in ("exact_match", "f1"):
        assert 0 <= result[name] <= 100
        assert result[f"{name}_se"] >= 0
    assert result["f1"] >= result["exact_match"]
    assert result["loss_se"] > 0
    # As counted by hand, from each document's own windows.
    loaded = runs.load(trained / "run", runs.inference_mesh())
    dataset = runs.Dataset.open(prepare(settings.data, settings.tokenizer))
    validation = dataset.store("validation")
    make = settings.task.maker(loaded.model.config, dataset.tokenizer, ())
    examples = make(validation, settings.data, False)
    given, right = [], []
    batch = {name: jnp.asarray(rows) for name, rows in examples.batch(np.arange(len(examples))).items()}
    bound = loaded.model.bind({"params": loaded.params})
    hidden, _ = bound.hidden(batch["tokens"], batch["positions"], batch["segments"], types=batch["types"])
    spans = np.asarray(bound.spans(hidden))
    for document, question in enumerate(validation.questions):
        best, none = (-np.inf, ""), np.inf
        for index in range(len(examples)):
            if examples.documents(index)[0] == document:
                start, end = spans[index].T
                words = examples.words(index)
                for a in np.flatnonzero(words >= 0):
                    for b in range(a, min(a + 30, len(words))):
                        if words[b] >= 0:
                            text = "".join(question.words[words[a] - 1 : words[b]]).strip()
                            best = max(best, (float(start[a] + end[b]), text))
                none = min(none, float(start[0] + end[0]))
        given.append("" if none - best[0] > MARGIN else best[1])
        right.append(question.answers or [""])
    assert 0 < given.count("") < len(given)
    assert result["exact_match"] == exact_match(given, right).value
    assert result["f1"] == token_f1(given, right).value
    # On several devices the same, and of one batch that of the documents in it.
    spread = runs.evaluate_run(trained / "run", mesh=MeshConfig(fsdp=2, tensor=2))
    assert spread["f1"] == pytest.approx(result["f1"])
    part = runs.evaluate_run(trained / "run", mesh=MeshConfig(devices=1), max_batches=1)
    assert part["tokens"] == 16
    assert "exact_match" in part


def test_a_mixture_is_evaluated_as_one(trained: Path) -> None:
    settings = experiment(trained, "bert", "extractive_qa")
    folder = prepare(settings.data, settings.tokenizer)
    other = dataclasses.replace(settings.data, split_seed=1)
    second = prepare(other, TokenizerConfig(kind=f"file:{folder}/tokenizer"))
    mixture = MixtureConfig(datasets=(str(folder), str(second)))
    data = DataConfig(mixture=mixture, seq_len=24, root=str(trained / "datasets"))
    mixed = dataclasses.replace(settings, data=data, tokenizer=TokenizerConfig())
    small_runs.start(mixed, trained / "mixed")
    result = runs.evaluate_run(trained / "mixed", mesh=MeshConfig(devices=1))
    one = runs.evaluate_run(trained / "mixed", mesh=MeshConfig(devices=1), max_batches=2)
    assert {"exact_match", "f1"} <= result.keys() & one.keys()
    assert one["tokens"] == 32


def test_a_student_learns_places_from_a_teacher() -> None:
    """A teacher that says the same adds nothing; another adds the divergence of starts and of ends, halved."""
    questions = store([(2, 2), (5, 6)], [["cat"], ["the mat"]])
    examples = SpanQAExamples(questions, 17, bos_id=BOS, eos_id=EOS, max_question=2)
    batch = {name: jnp.asarray(rows) for name, rows in examples.batch(np.array([0, 1, -1])).items()}
    task = ExtractiveQA()
    settings = {"mask": "bidirectional", "token_types": 2, "vocab_size": 96}
    model, params = tiny.build(task.settle(dataclasses.replace(tiny.config(), **settings), ()))
    mesh = make_mesh(MeshConfig(devices=1))
    config = DistillConfig(teacher="x", weight=1.0, temperature=1.0, hidden_weight=1.0)
    for teacher, same in ((params, True), (tiny.perturbed(params, scale=1.0), False)):
        taught = make_teacher(task, model, teacher, config, mesh)(batch)
        total, sums = Distilled(task, config).loss(model, params, taught, jax.random.key(0))
        hidden = {}
        for name, tree in (("student", params), ("teacher", teacher)):
            hidden[name] = np.asarray(hidden_of(model, tree, batch, None), np.float64)
        scores, _ = task.scores(model, params, hidden_of(model, params, batch, None), batch)
        p, q = (np.asarray(jax.nn.softmax(x), np.float64)[:2] for x in (taught["teacher_logits"], scores))
        soft = (p * (np.log(p + 1e-30) - np.log(q + 1e-30))).sum() / 2
        norms = np.prod([np.linalg.norm(x, axis=-1) for x in hidden.values()], axis=0)
        cosine = (hidden["student"] * hidden["teacher"]).sum(-1) / norms
        assert float(sums["soft_loss"]) == pytest.approx(soft, rel=1e-4, abs=1e-6)
        assert float(total) == pytest.approx(soft + (1 - cosine)[:2].mean(1).sum(), rel=1e-4, abs=1e-5)
        assert (float(total) < 1e-5) == same


MISTAKES: dict[str, tuple[str, dict[str, dict[str, Any]], str]] = {
    "no questions": ("bert", {"data": {"source": "text:{}/corpus.jsonl"}}, "needs questions with answers in a text"),
    "a causal model": ("gpt", {}, "task extractive_qa needs model.mask bidirectional and no encoder"),
    "one type": ("bert", {"model": {"token_types": 1}}, "a question and a text have 2 types"),
    "short rows": ("bert", {"data": {"seq_len": 11}}, "data.seq_len is 11; .* must be at least 12"),
    "no answer": ("bert", {"task": {"no_answer": None}}, r"of the dataset's \d+ questions have no answer; set task.no"),
}


@pytest.mark.parametrize(("family", "changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told(
    trained: Path, tmp_path: Path, family: str, changes: dict[str, dict[str, Any]], message: str
) -> None:
    settings = experiment(trained, family, "extractive_qa")
    for section, fields in changes.items():
        fields = {k: v.format(trained) if isinstance(v, str) else v for k, v in fields.items()}
        settings = dataclasses.replace(settings, **{section: dataclasses.replace(getattr(settings, section), **fields)})
    with pytest.raises(UserError, match=message):
        runs.start(settings, tmp_path / "run", small_runs.Silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["stride", "max_question", "max_answer"])
def test_a_setting_out_of_range_is_told(name: str) -> None:
    with pytest.raises(UserError, match=f"task.{name} is 0; it must be at least 1"):
        ExtractiveQA(**{name: 0})


@pytest.mark.slow
def test_a_small_model_learns_twenty_real_questions_by_heart(tmp_path: Path) -> None:
    file = DATA / "qa" / "xquad.en.json"
    if not file.exists():
        pytest.skip("shared/data/qa is not here")
    article = json.loads(file.read_text(encoding="utf-8"))["data"][0]
    paragraphs, left = [], 20
    for paragraph in article["paragraphs"]:
        qas = paragraph["qas"][:left]
        left -= len(qas)
        paragraphs.append({**paragraph, "qas": qas})
    assert left == 0
    (tmp_path / "twenty.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")
    settings = Experiment(
        data=DataConfig(
            source=f"squad:{tmp_path}/twenty.json", validation_fraction=0, seq_len=128, root=str(tmp_path / "datasets")
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=800),
        model=ModelConfig(d_model=64, n_layers=2, n_heads=4, max_len=128, mask="bidirectional", token_types=2),
        task=ExtractiveQA(stride=32, max_question=48),
        optim=OptimConfig(peak_lr=3e-3, warmup=20),
        train=TrainConfig(steps=150, batch_size=16, log_every=50, eval_every=150, save_every=150),
        mesh=MeshConfig(devices=1),
    )
    small_runs.start(settings, tmp_path / "run")
    result = runs.evaluate_run(tmp_path / "run", split="train", mesh=MeshConfig(devices=1))
    assert result["tokens"] > 40, "texts need several windows"

    assert result["exact_match"] >= 90
    assert result["f1"] >= 90
