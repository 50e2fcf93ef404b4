"""Vectors of texts: those of one text at a time, by hand."""

from pathlib import Path

import jax
import numpy as np
import pytest
import small_runs
from tasks.families import experiment

from lm import run as runs
from lm.errors import UserError

TEXTS = ["The cat sat.", "dog", "", "Red mat saw the blue dog. A cat ran.", "the " * 60]


@pytest.mark.parametrize(
    ("family", "kind"), [("bert", "bert"), pytest.param("gpt", "causal_lm", marks=pytest.mark.slow)]
)
def test_vectors_are_those_of_each_text_alone(tmp_path: Path, family: str, kind: str) -> None:
    small_runs.start(experiment(tmp_path, family, kind, steps=2, eval_every=0), tmp_path / "run")
    trained = runs.load(tmp_path / "run", runs.inference_mesh())
    tokenizer, longest = trained.tokenizer, trained.model.config.max_len
    apply = jax.jit(lambda ids: trained.model.apply({"params": trained.params}, ids, method="hidden")[0][0])
    hidden = []
    for text in TEXTS:
        begin = [tokenizer.bos_id] if family == "bert" else []
        ids = [*begin, *tokenizer.encode(text)[: longest - 1 - len(begin)], tokenizer.eos_id]
        hidden.append(np.asarray(apply(np.array([ids], np.int32)), np.float64))
    assert len(hidden[-1]) == longest
    for pooling, of in (("first", lambda x: x[0]), ("last", lambda x: x[-1]), ("mean", lambda x: x.mean(0))):
        found = runs.embed(trained, TEXTS, pooling=pooling, batch_size=2)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, [of(x) for x in hidden], rtol=2e-5, atol=2e-6)
    own = trained.model.config.pooling
    np.testing.assert_array_equal(runs.embed(trained, TEXTS), runs.embed(trained, TEXTS, pooling=own))


def test_an_encoder_decoder_has_none(tmp_path: Path) -> None:
    small_runs.start(experiment(tmp_path, "t5", "seq2seq", steps=2, eval_every=0), tmp_path / "run")
    with pytest.raises(UserError, match="encoder-decoder, which has no vector"):
        runs.embed(runs.load(tmp_path / "run", runs.inference_mesh()), ["a"])
