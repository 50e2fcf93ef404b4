"""Runs as transformers loads them: the same texts, token by token, from a folder it wrote and from one of ours."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tokenizers
from small_runs import experiment, start
from test_hf_families import DECODERS, T5, build

from lm import run as runs
from lm.generate import SamplingConfig
from lm.generate.texts import make_generator
from lm.hf.tokenizer import write_tokenizer as write_tokenizer_files
from lm.models.transformer import Transformer
from lm.run.pretrained import export_run, import_run
from lm.text.tokenizer import TokenizerConfig, train_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

NEW = 64
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=NEW)


def ours(run, prompts: list[list[int]], greedy: SamplingConfig = GREEDY) -> list[list[int]]:
    trained = runs.load(run, runs.inference_mesh())
    return [found.ids for found in make_generator(trained).generate(prompts, greedy)]


def theirs(folder, prompts: list[list[int]], kind: str = "AutoModelForCausalLM", ends: bool = True) -> list[list[int]]:
    """One by one, without the end of a text; unless it `ends`, the token that would end it is one like any other."""
    import torch
    import transformers

    model = getattr(transformers, kind).from_pretrained(folder).eval()
    found = []
    if not ends:
        model.generation_config.eos_token_id = None
    for prompt in prompts:
        made = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW)[0].tolist()
        made = made[1:] if kind == "AutoModelForSeq2SeqLM" else made[len(prompt) :]
        eos = model.generation_config.eos_token_id
        found.append(made[: made.index(eos)] if eos in made else made)
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama 3", "mistral", "qwen3"])
def test_decoders_write_the_same(name, tmp_path):
    cls, config, settings = DECODERS[name]
    length = "n_positions" if name == "gpt2" else "max_position_embeddings"
    build(cls, config, settings | {length: 96}).save_pretrained(tmp_path / "source")
    import_run(str(tmp_path / "source"), tmp_path / "run", runs.inference_mesh())
    made = export_run(tmp_path / "run", tmp_path / "out", runs.inference_mesh(), max_shard_size="20KB")
    assert len(made.files) > 1
    prompts = [[5, 6, 7], [40], [9, 8, 7, 6, 5, 4, 3, 10, 11, 12]]
    expected = theirs(tmp_path / "out", prompts, ends=False)
    assert ours(tmp_path / "run", prompts, dataclasses.replace(GREEDY, ignore_eos=True)) == expected
    assert {len(ids) for ids in expected} == {NEW}
    assert expected == theirs(tmp_path / "source", prompts, ends=False)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_t5_writes_the_same(version, tmp_path):
    """Its decoder begins with padding."""
    changes = {} if version == "1.0" else {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    build("T5ForConditionalGeneration", "T5Config", T5 | changes | {"decoder_start_token_id": 0}).save_pretrained(
        tmp_path / "source"
    )
    import_run(str(tmp_path / "source"), tmp_path / "run", runs.inference_mesh())
    export_run(tmp_path / "run", tmp_path / "out", runs.inference_mesh())
    prompts = [[5, 6, 7, 1], [40, 41, 42, 43, 44, 45, 1]]
    expected = theirs(tmp_path / "out", prompts, "AutoModelForSeq2SeqLM")
    assert ours(tmp_path / "run", prompts) == expected
    assert max(map(len, expected)) > 20
    assert expected == theirs(tmp_path / "source", prompts, "AutoModelForSeq2SeqLM")


def write_tokenizer(path) -> None:
    """Bytes, spelled by GPT-2's letters, and two special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "</s>", *alphabet])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(path))


@pytest.mark.parametrize("kind", ["byte", "bpe", "unigram", "wordpiece", "word", "char"])
def test_tokenizers(kind, tmp_path):
    """Of every kind that has a form there: the same ids of a text, the same text of ids, the same special tokens."""
    import transformers

    texts = ["The cat sat on a näive mat. 中文 分词", "and saw  dogs, 3 times!\n"] * 20
    sizes = {"vocab_size": 300} if kind in ("bpe", "unigram", "wordpiece") else {}
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind, **sizes), texts)
    assert write_tokenizer_files(tokenizer, tmp_path, 64) is None
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*texts[:2], "unseen: žšć \t 漢"):
        ids = tokenizer.encode(text)
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids
        assert loaded.decode(ids) == tokenizer.decode(ids)
    for name in ("eos", "bos", "pad", "unk", "mask"):
        assert getattr(loaded, f"{name}_token_id") == getattr(tokenizer, f"{name}_id"), name


@pytest.mark.parametrize("kind", ["byte", "file"])
def test_a_run_trained_here(kind, tmp_path):
    """Model and tokenizer of a run load in transformers: the same ids of a text, and the same text after it."""
    import transformers

    names = {"byte": "byte", "file": f"file:{tmp_path / 'tokenizer.json'}"}
    write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = {"kind": names[kind]}
    start(experiment(tmp_path, tokenizer=tokenizer, model={"max_len": 96}, train={"steps": 30}), tmp_path / "run")
    made = export_run(tmp_path / "run", tmp_path / "out", runs.inference_mesh())
    assert made.note is None
    trained = runs.load(tmp_path / "run", runs.inference_mesh())
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("The cat sat on a näive mat. 中文\n\tand  saw", " dog"):
        ids = trained.tokenizer.encode(text)
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids
        assert loaded.decode(ids) == trained.tokenizer.decode(ids) == text
    assert loaded.eos_token_id == trained.tokenizer.eos_id
    assert loaded.bos_token_id == trained.tokenizer.bos_id
    prompts = [trained.prompt_ids("the cat"), trained.prompt_ids("中文 dog")]
    assert ours(tmp_path / "run", prompts) == theirs(tmp_path / "out", prompts)


def test_a_classifier(tmp_path):
    """A BERT with classes goes out, and is what AutoModelForSequenceClassification makes of it."""
    import torch
    import transformers
    from pretrained import load_folder

    from lm.hf.export import write_configs, write_weights
    from lm.hf.families import expressed

    config = tiny.config(
        mask="bidirectional",
        token_types=2,
        embedding_norm=True,
        norm_place="post",
        activation="gelu",
        pooler=True,
        n_classes=3,
    )
    model, params = tiny.build(config)
    params = tiny.perturbed(params)
    family, architecture, told = expressed(config, "classification")
    write_weights(tmp_path, family, architecture, params, dtype=np.float32, max_shard_size=10**9)
    write_configs(tmp_path, told, {})
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.num_labels == 3
    tokens = np.random.RandomState(0).randint(0, 64, (3, 12))
    with torch.no_grad():
        expected = loaded(torch.from_numpy(tokens)).logits.numpy()
    bound = Transformer(model.config).bind({"params": params})
    scores = bound.classify(bound.hidden(tokens)[0])
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)
    again, _ = load_folder(tmp_path)
    assert again.n_classes == 3
    assert dataclasses.replace(again, n_classes=0).pooler
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_classifier_on_a_decoder(family, tmp_path):
    """Fine-tuned here; there a text and the token that ends it get the same scores."""
    import torch
    import transformers

    sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))
    from test_imported_runs import classify, imported

    start(classify(tmp_path, imported(tmp_path, family)), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", runs.inference_mesh())
    trained = runs.load(tmp_path / "run", runs.inference_mesh())
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.config.id2label == {0: "cold", 1: "warm"}
    for text in ("red cat", "a blue dog 7"):
        ids = [*trained.tokenizer.encode(text), trained.tokenizer.eos_id]
        given = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], loaded.config.eos_token_id]])
        assert given.tolist() == [ids]
        with torch.no_grad():
            expected = loaded(given).logits.numpy()
        bound = Transformer(trained.model.config).bind({"params": trained.params})
        scores = bound.classify(bound.hidden(np.array([ids], np.int32))[0])
        np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)
