"""Scores against the examples of the libraries' own manuals, and against plain implementations written here."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from lm.errors import UserError
from lm.text import scores
from lm.text.scores import bleu, chrf, difference, exact_match, rouge_l, score_texts, token_f1

# The example of sacreBLEU's README.
SYSTEM = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
FIRST = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
SECOND = ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]


def some_texts(n: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Predictions that are references with words changed, lost and moved; one or two references each."""
    rng = random.Random(seed)
    words = ["the", "a", "cat", "dog", "runs", "over", "lazy", "river", "3", "green", ",", "quickly", "of", "to", "."]
    predictions, references = [], []
    for index in range(n):
        text = rng.choices(words, k=rng.randint(4, 15))
        other = [rng.choice(words) if rng.random() < 0.3 else word for word in text if rng.random() < 0.9]
        references.append([" ".join(text), " ".join(reversed(text))][: 1 + index % 2])
        predictions.append(" ".join(other))
    return predictions, references


def test_examples_of_the_sacrebleu_manual():
    pairs = [list(pair) for pair in zip(FIRST, SECOND)]
    found = bleu(SYSTEM, pairs)
    assert found.value == pytest.approx(48.53, abs=0.005)
    assert found.signature.startswith("BLEU|nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:2.")
    found = chrf(SYSTEM, pairs)
    assert found.value == pytest.approx(59.73, abs=0.005)
    assert found.signature.startswith("chrF2|nrefs:2|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.")
    # The first text with one reference less.
    found = bleu(SYSTEM, [pairs[0][1], *pairs[1:]])
    assert found.value == pytest.approx(29.44, abs=0.005)
    assert "nrefs:var" in found.signature


def test_value_and_bootstrap_are_those_of_sacrebleus_public_functions():
    import sacrebleu

    predictions, references = some_texts(20)
    second = [refs[1] if len(refs) > 1 else None for refs in references]
    streams = [[refs[0] for refs in references], second]
    for ours, metric in ((bleu, sacrebleu.BLEU()), (chrf, sacrebleu.CHRF())):
        found = ours(predictions, references, seed=3)
        assert found.value == metric.corpus_score(predictions, streams).score
        drawn = np.random.default_rng(3).integers(0, 20, 20)  # the first resample
        again = [[stream[i] for i in drawn] for stream in streams]
        assert found.replicates[0] == pytest.approx(metric.corpus_score([predictions[i] for i in drawn], again).score)
        assert len(found.replicates) == 200
        assert found.se == pytest.approx(np.std(found.replicates, ddof=1))


def plain_bleu(predictions: list[str], references: list[str]) -> float:
    """Papineni et al. 2002, one reference, words between spaces, no smoothing."""
    hits, totals, lengths, wanted = [0] * 4, [0] * 4, 0, 0
    for prediction, reference in zip(predictions, references):
        found, want = prediction.split(), reference.split()
        lengths, wanted = lengths + len(found), wanted + len(want)
        for n in range(4):
            a, b = (Counter(tuple(x[i : i + n + 1]) for i in range(len(x) - n)) for x in (found, want))
            hits[n] += sum(min(count, b[gram]) for gram, count in a.items())
            totals[n] += sum(a.values())
    precision = math.exp(sum(math.log(h / t) for h, t in zip(hits, totals)) / 4)
    return 100 * precision * min(1.0, math.exp(1 - wanted / lengths))


def test_bleu_by_hand():
    predictions, references = some_texts(40)
    firsts = [refs[0] for refs in references]
    assert bleu(predictions, firsts).value == pytest.approx(plain_bleu(predictions, firsts), rel=1e-9)


def test_bleu_of_chinese_counts_characters():
    predictions, references = (
        ["我们今天去北京看长城。", "他喜欢吃苹果和香蕉"],
        ["我们今天去北京看故宫。", "她喜欢吃香蕉和苹果"],
    )
    spaced = [" ".join(text) for text in predictions], [" ".join(text) for text in references]
    found = bleu(predictions, references, language="zh")
    assert "tok:zh" in found.signature
    assert found.value == pytest.approx(plain_bleu(*spaced), rel=1e-9)
    assert bleu(predictions, references).value == 0  # as words, nothing agrees


def plain_chrf(predictions: list[str], references: list[str]) -> float:
    """Popovic 2015 with beta 2: mean precision and recall over orders 1 to 6."""
    hits, found, want = [0] * 6, [0] * 6, [0] * 6
    for pair in zip(predictions, references):
        for n in range(6):
            a, b = (Counter(x[i : i + n + 1] for i in range(len(x) - n)) for x in ("".join(t.split()) for t in pair))
            hits[n] += sum((a & b).values())
            found[n], want[n] = found[n] + sum(a.values()), want[n] + sum(b.values())
    precision = sum(h / f for h, f in zip(hits, found)) / 6
    recall = sum(h / w for h, w in zip(hits, want)) / 6
    return 100 * 5 * precision * recall / (4 * precision + recall)


def test_chrf_by_hand():
    predictions, references = some_texts(40, seed=1)
    firsts = [refs[0] for refs in references]
    assert chrf(predictions, firsts).value == pytest.approx(plain_chrf(predictions, firsts), rel=1e-9)
    assert chrf(predictions, firsts, language="zh").value == chrf(predictions, firsts).value


def plain_lcs(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + plain_lcs(a[1:], b[1:])
    return max(plain_lcs(a[1:], b), plain_lcs(a, b[1:]))


def plain_rouge_l(prediction: list[str], reference: list[str]) -> float:
    return 100 * 2 * plain_lcs(prediction, reference) / (len(prediction) + len(reference))


def test_rouge_l():
    # The texts of rouge-score's manual: "the quick brown" and "jumps the" agree, 5 or 6 of 9 and 8 words.
    reference, prediction = "The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log."
    found = rouge_l([prediction], [reference])
    want = plain_rouge_l(prediction.lower().strip(".").split(), reference.lower().split())
    assert found.value == pytest.approx(want) == pytest.approx(100 * 10 / 17)
    assert found.signature.startswith("rougeL|stem:no|tok:rouge-score|version:0.1")
    assert rouge_l([prediction], [["nothing", reference]]).value == found.value  # the best reference
    assert rouge_l([""], ["something"]).value == 0


def test_rouge_l_of_chinese_counts_characters():
    prediction, reference = "他昨天坐JAX火车去上海。", "昨天他坐火车，去了上海jax"
    found = rouge_l([prediction], [reference], language="zh")
    tokens = [[*"他昨天坐", "jax", *"火车去上海"], [*"昨天他坐火车去了上海", "jax"]]
    assert found.value == pytest.approx(plain_rouge_l(*tokens))
    assert rouge_l([prediction], [reference]).value == 100  # rouge-score sees jax and nothing else


@pytest.mark.parametrize(
    ("prediction", "reference", "match", "f1"),
    [
        ("The Eiffel Tower.", "eiffel  tower", 100, 100),
        ("an apple, a day", "apple day", 100, 100),
        ("to be or not", "to be to", 0, 100 * 2 * 2 / 7),
        ("cats", "dogs", 0, 0),
        ("theatre", "atre", 0, 0),  # an article is a whole word
        ("the", "", 100, 100),
        ("", "word", 0, 0),
    ],
)
def test_squad(prediction, reference, match, f1):
    assert exact_match([prediction], [reference]).value == match
    assert token_f1([prediction], [reference]).value == pytest.approx(f1)


@pytest.mark.parametrize(
    ("prediction", "reference", "match", "f1"),
    [
        ("《红楼梦》", "红楼梦", 100, 100),
        ("北京大学", "在北京的大学", 0, 100 * 2 * 2 / 10),  # the longest run, not all that is common
        ("1998年，", "1998年", 100, 100),
        ("GPT 2 模型", "gpt 2模型", 0, 100),  # CMRC leaves spaces in place for a match
        ("上海", "北京", 0, 0),
    ],
)
def test_cmrc(prediction, reference, match, f1):
    assert exact_match([prediction], [reference], language="zh").value == match
    assert token_f1([prediction], [reference], language="zh").value == pytest.approx(f1)


def test_longest_run_by_brute_force():
    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choices("xyz", k=rng.randint(1, 9))) for _ in range(2))
        runs = [a[i:j] for i in range(len(a)) for j in range(i + 1, len(a) + 1)]
        assert scores._longest_common_run(list(a), list(b)) == max((len(run) for run in runs if run in b), default=0)


def test_a_mean_has_the_error_of_a_mean_and_its_bootstrap_agrees():
    predictions, references = some_texts(300)
    found = token_f1(predictions, references)
    alone = [token_f1([text], [refs]).value for text, refs in zip(predictions, references)]
    assert found.value == pytest.approx(np.mean(alone))
    assert found.se == pytest.approx(np.std(alone, ddof=1) / math.sqrt(300))
    assert np.std(found.replicates, ddof=1) == pytest.approx(found.se, rel=0.15)
    assert math.isnan(exact_match(predictions[:1], references[:1]).se)
    assert math.isnan(bleu(predictions[:1], references[:1]).se)


def test_the_error_of_a_corpus_score_is_that_of_new_texts():
    """What the bootstrap promises from one corpus, against the spread over many."""
    corpora = [bleu(*some_texts(60, seed)) for seed in range(40)]
    spread = np.std([one.value for one in corpora], ddof=1)
    assert np.mean([one.se for one in corpora]) == pytest.approx(spread, rel=0.3)


def test_systems_are_compared_in_pairs():
    predictions, references = some_texts(200)
    worse = ["green " + text for text in predictions]
    for score in (bleu, token_f1):
        better, less = score(predictions, references), score(worse, references)
        gain, error = difference(better, less)
        assert gain == pytest.approx(better.value - less.value)
        assert gain > 0
        assert error < 0.5 * math.hypot(better.se, less.se)  # texts that are hard are hard for both
    assert difference(better, better) == (0, 0)


def test_the_seed_decides():
    texts = some_texts(20)
    assert bleu(*texts, seed=1) == bleu(*texts, seed=1)
    assert bleu(*texts, seed=1).replicates != bleu(*texts, seed=2).replicates


def test_by_name():
    found = score_texts(["chrf", "exact_match"], SYSTEM, FIRST, language="en")
    assert list(found) == ["chrf", "exact_match"]
    assert found["exact_match"].value == pytest.approx(100 / 3)
    assert found["chrf"] == chrf(SYSTEM, FIRST)


@pytest.mark.parametrize(
    ("predictions", "references", "said"),
    [
        ([], [], "no text to score"),
        (["a", "b"], ["a"], "2 predictions and 1 references"),
        (["a", "b"], ["a", []], "prediction 1 has no reference"),
    ],
)
@pytest.mark.parametrize("name", scores.SCORES)
def test_nonsense_is_refused(name, predictions, references, said):
    with pytest.raises(UserError, match=said):
        scores.SCORES[name](predictions, references, language="en")


def test_an_unknown_score_is_refused():
    with pytest.raises(UserError, match="no score 'meteor'; choose from exact_match, token_f1, bleu, chrf, rouge_l"):
        score_texts(["meteor"], ["a"], ["a"])


@pytest.mark.parametrize(
    ("name", "package"), [("bleu", "sacrebleu"), ("chrf", "sacrebleu"), ("rouge_l", "rouge_score")]
)
def test_a_missing_package_is_named(monkeypatch, name, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=rf"the score {name} needs the package {package}; .*\[scores\]"):
        scores.SCORES[name](["a"], ["a"], language="en")
