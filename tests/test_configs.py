"""The configs that ship: each loads, says how to run it, and survives being saved."""

import csv
import dataclasses
import gzip
import itertools
import json
import math
import re
import runpy
import shlex
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import small_runs as small

from lm import config as configs
from lm import run as runs
from lm import tree
from lm.cli import main
from lm.config import Experiment
from lm.data.config import MixtureConfig
from lm.data.manifest import Manifest, load_manifest
from lm.data.mixture import open_mixture
from lm.data.prepare import prepare
from lm.data.store import DatasetStore
from lm.errors import UserError
from lm.hardware import PEAK_FLOPS
from lm.models.transformer import Transformer, flops_per_token
from lm.optim import make_optimizer, make_schedule
from lm.text.tokenizer import load_tokenizer
from lm.train import abstract_params, make_program

REPOSITORY = Path(__file__).parent.parent
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.py"))
DATA_CONFIGS = REPOSITORY / "configs" / "data"
DATA = REPOSITORY.parent / "shared" / "data"
PTB = DATA / "ptb"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_a_lab_note_and_an_experiment(path: Path):
    note = configs.describe(path)
    assert re.match(r"[A-Z].*\.\n\n", note), "what it trains, in one sentence"
    assert f"lm train {path.relative_to(REPOSITORY).as_posix()}" in note, "the exact command"
    if "not been run" in note:  # then it says what the time is reckoned from
        assert re.search(r"floating-point operations[:,]\s+\S+\s+days on", note), "the time it would take"
    else:
        assert re.search(r"\d.* minutes?|\d.* seconds|minutes on", note), "the expected time"
        assert re.search(r"(loss|perplexity|bits per byte)\D{1,30}\d", note), "the expected result"
    experiment = configs.load_file(path)
    assert configs.from_dict(Experiment, json.loads(json.dumps(configs.to_dict(experiment)))) == experiment
    runs.check_experiment(experiment)


# Parameters: of a config's own model with its tokenizer's vocabulary, or as published.
PARAMETERS = {
    "gpt2_small_owt": 124_439_808 + 47 * 768,  # Radford et al. 2019, and the rows that fill up the table
    "llama_1b": 1_100_048_384,  # arXiv:2401.02385
    "llama_7b": 6_738_415_616,  # arXiv:2302.13971
    "llama_7b_h200": 6_738_415_616,
    "llama_70b": 68_976_648_192,  # arXiv:2307.09288
}
FLOPS = {  # that the notes tell
    "gpt2_small_owt": 2.5e20,
    "llama_1b": 1.6e20,
    "llama_7b": 5.8e21,
    "llama_7b_h200": 4.3e20,
    "llama_70b": 6.2e23,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_config_too_large_to_run_here_builds_abstractly(name: str):
    """Shapes alone: parameters as published, and one whole step of the batch that the config asks for."""
    experiment = configs.load_file(REPOSITORY / "configs" / f"{name}.py")
    mesh = runs.check_experiment(experiment)
    model, train, length = Transformer(experiment.model), experiment.train, experiment.data.seq_len
    params, _ = abstract_params(model, mesh)
    assert tree.count_parameters(params) == PARAMETERS[name]
    tokens = train.batch_size * length
    steps = train.total_steps(tokens_per_step=tokens, steps_per_epoch=math.nan)
    flops = steps * tokens * flops_per_token(experiment.model, length)
    assert flops == pytest.approx(FLOPS[name], rel=0.03)
    assert f"{FLOPS[name]:.1e}".replace("+", "") in configs.describe(REPOSITORY / "configs" / f"{name}.py")
    schedule = make_schedule(experiment.optim, steps)
    program = make_program(
        model, experiment.task, make_optimizer(experiment.optim, schedule, params), schedule, train, mesh
    )
    row = dict.fromkeys(("tokens", "targets", "positions"), np.int32) | {"weights": np.float32}
    batch = {key: jax.ShapeDtypeStruct((train.batch_size, length), dtype) for key, dtype in row.items()}
    with jax.set_mesh(mesh):
        state, report = jax.eval_shape(program.train_step, program.target, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), program.target
    )
    assert {x.shape for x in jax.tree.leaves(report)} == {()}


def test_the_cost_of_llama_7b_follows_from_its_operations():
    """The table of chip-hours: operations by 0.4 of the peak that `lm.hardware` knows."""
    note = configs.describe(REPOSITORY / "configs" / "llama_7b.py")
    per_token = flops_per_token(configs.load_file(REPOSITORY / "configs" / "llama_7b.py").model, 2048)
    rows = re.findall(r"^\| ([\d,]+) billion \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", note, re.M)
    assert len(rows) == 2
    for row in rows:
        billions, *hours = (float(cell.replace(",", "")) for cell in row)
        for kind, told in zip(("NVIDIA H100 80GB HBM3", "TPU v5", "NVIDIA A100"), hours, strict=True):
            reckoned = billions * 1e9 * per_token / (0.4 * PEAK_FLOPS[kind] * 3600)
            assert told == pytest.approx(reckoned, rel=0.005), (kind, billions)


TEXT = {"en": "the river runs past the old mill and under the bridge ", "zh": "河水流过旧磨坊，从桥下穿过。"}


@pytest.fixture
def pretraining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[list[str]]]:
    """A folder with text of each kind that configs/llama_7b.py names; its commands: tokenizer, preparations."""
    monkeypatch.chdir(tmp_path)
    note = configs.describe(REPOSITORY / "configs" / "llama_7b.py").replace("\\\n", " ")
    (names,) = re.findall(r"for name in (.*); do", note)
    (tokenizer,) = re.findall(r"lm (tokenizer train .*)", note)
    (prepare,) = re.findall(r"lm (prepare .*)", note)
    for name in names.split():
        folder = tmp_path / "data" / "llama_7b" / name
        folder.mkdir(parents=True)
        texts = [f"{name} {i}: " + TEXT["zh" if name.endswith("zh") else "en"] * 4 for i in range(12)]
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (folder / "0000.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return shlex.split(tokenizer), [shlex.split(prepare.replace("$name", name)) for name in names.split()]


def test_the_datasets_of_llama_7b_come_together(pretraining: tuple[list[str], list[list[str]]]):
    """The commands of the note, on a little text; then the config takes the mixture, in its shares."""
    train_tokenizer, preparations = pretraining
    assert main([*train_tokenizer, "--vocab-size", "300"]) == 0
    config = REPOSITORY / "configs" / "llama_7b.py"
    planned = configs.load_file(config)
    assert planned.data.mixture == MixtureConfig(), "nothing is prepared"
    for number, command in enumerate(preparations):
        if number:  # each is missed until it is there
            with pytest.raises(UserError, match=f"no dataset in datasets/llama_7b/{command[6]}"):
                configs.load_file(config)
        assert main([*command, "--data.validation-fraction", "0.2"]) == 0
    experiment = configs.load_file(config)
    mixture = experiment.data.mixture
    assert [name.split("/")[2] for name in mixture.datasets] == [command[6] for command in preparations]
    assert sum(mixture.weights) == 100
    assert mixture.weights[0] == 44
    runs.check_experiment(experiment)
    # Of five thousand rows, as many as the rarest share needs for a hundred, each dataset has its share exactly.
    mixed = open_mixture(mixture).store("train")
    order = mixed.order([10] * len(mixture.datasets), batch_size=1, seed=0)
    assert order.counts(5000) == [50 * share for share in mixture.weights]
    note = configs.describe(config)
    shares = [cells.split(",") for cells in re.findall(r"^\| [a-z_, ]+ \| ([\d., ]+) \|", note, re.M)]
    assert [float(share) for cells in shares for share in cells] == list(mixture.weights)
    assert configs.load_file(config.with_name("llama_7b_h200.py")).data.mixture == MixtureConfig()
    # A second preparation of other settings: which of the two is meant cannot be told.
    assert main([*preparations[0], "--data.validation-fraction", "0.3"]) == 0
    with pytest.raises(UserError, match="2 datasets in datasets/llama_7b/web_en; keep the one"):
        configs.load_file(config)


@pytest.mark.slow
@pytest.mark.skipif(not PTB.exists(), reason="the Penn Treebank is not at hand")
def test_ptb_perplexity_falls_at_every_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    command = ["train", str(REPOSITORY / "configs/ptb_small.py"), "--run", "ptb", "--mesh.devices", "1"]
    for name, file in {"source": "train", "validation-source": "valid", "test-source": "test"}.items():
        command += [f"--data.{name}", f"text:{PTB}/ptb.{file}.txt"]
    command += ["--train.steps", "100", "--train.eval-every", "20", "--train.eval-batches", "20"]
    assert main(command) == 0
    records = small.metrics(tmp_path / "ptb")
    perplexities = [record["perplexity"] for record in records if record["split"] == "validation"]
    assert len(perplexities) == 5
    assert all(later < earlier for earlier, later in itertools.pairwise(perplexities)), perplexities
    assert perplexities[-1] < 400


def prepared(name: str, root: Path, **sources: str | None) -> tuple[Path, Manifest]:
    """The dataset of a config in configs/data, of other sources."""
    asked = configs.load_file(DATA_CONFIGS / f"{name}.py")
    data = dataclasses.replace(asked.data, root=str(root), **sources)
    folder = prepare(data, asked.tokenizer, clean=asked.clean, dedup=asked.dedup, augment=asked.augment)
    return folder, load_manifest(folder)


def words(path: Path) -> tuple[Counter[str], int]:
    """Words as spaces separate them, and how many lines hold any."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return Counter(word for line in lines for word in line.split()), sum(bool(line.strip()) for line in lines)


# Tokens with an end of sentence a line, as published: of PTB in Mikolov 2010 and after, checked against wc.
PTB_TOKENS = {"train": 929_589, "validation": 73_760, "test": 82_430}


@pytest.mark.skipif(not PTB.exists(), reason="the Penn Treebank is not at hand")
def test_ptb_has_its_published_tokens(tmp_path: Path):
    """The two small files; the vocabulary is that of the one in the place of the training file."""
    valid, test = (f"text:{PTB / f'ptb.{part}.txt'}" for part in ("valid", "test"))
    _, manifest = prepared("ptb", tmp_path, source=test, validation_source=valid, test_source=None)
    assert {split: counts.tokens for split, counts in manifest.splits.items()} == {
        "train": PTB_TOKENS["test"],
        "validation": PTB_TOKENS["validation"],
    }
    counted, _ = words(PTB / "ptb.test.txt")
    assert "<unk>" in counted
    assert manifest.vocab_size == len(counted) + 1


@pytest.mark.slow
@pytest.mark.skipif(not PTB.exists(), reason="the Penn Treebank is not at hand")
def test_ptb_has_ten_thousand_words(tmp_path: Path):
    train, valid, test = (f"text:{PTB / f'ptb.{part}.txt'}" for part in ("train", "valid", "test"))
    _, manifest = prepared("ptb", tmp_path, source=train, validation_source=valid, test_source=test)
    assert {split: counts.tokens for split, counts in manifest.splits.items()} == PTB_TOKENS
    assert manifest.vocab_size == 10_000


@pytest.mark.skipif(not (DATA / "wikitext2").exists(), reason="WikiText-2 is not at hand")
def test_wikitext2_keeps_every_word(tmp_path: Path):
    valid = DATA / "wikitext2" / "valid.txt"
    folder, manifest = prepared("wikitext2", tmp_path, source=f"text:{valid}", validation_source=None)
    counted, lines = words(valid)
    assert manifest.splits["train"].tokens + manifest.splits["validation"].tokens == counted.total() + lines == 216_347
    assert manifest.skipped_documents == 3760 - lines  # all others are blank
    store, unknown = DatasetStore(folder, "train"), load_tokenizer(folder / "tokenizer").unk_id
    # Only what the file itself spells <unk> is unknown in training.
    split_unknown = int((store.read(0, store.n_tokens) == unknown).sum())
    assert 0.9 * counted["<unk>"] < split_unknown <= counted["<unk>"]


REVIEW = "房间很干净，早餐也很丰富，离地铁站只要五分钟，下次来还会住这里。"


@pytest.fixture
def chinese(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few files of the forms that scripts/gather_zh.py reads, and what it makes of them."""
    pytest.importorskip("opencc")
    folder = tmp_path / "zh"
    folder.mkdir()
    running = [f"第{i}天，我们沿着河边走了{i + 3}公里，在村口的小店里喝茶，听老人讲从前的事。" for i in range(40)]
    running += [
        "请联系客服，电话13812345678，或者写信到service@example.com，我们会尽快回复您。",
        "看这里看这里看这里看这里",
    ]
    (folder / "CLUECorpusSmall_sampled.txt").write_text("\n".join(running) + "\n", encoding="utf-8")
    with (folder / "ChnSentiCorp_htl_all.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("label", "review"), (1, REVIEW), (1, f" {REVIEW}"), (0, "一般"), (0, "")])
    (folder / "thucnews_short_dev.txt").write_text("同步首秀：港股缩量回调\t2\n", encoding="utf-8")
    poem = [{"author": "無名", "paragraphs": ["風從遠處來，", "雲向山中去。"]}]
    for name in ("poet.tang.0.json", "songci300.json"):
        (folder / name).write_text(json.dumps(poem, ensure_ascii=False), encoding="utf-8")
    output = tmp_path / "mixed.jsonl"
    monkeypatch.setattr(sys, "argv", ["gather_zh.py", str(folder), str(output)])
    runpy.run_path(str(REPOSITORY / "scripts" / "gather_zh.py"), run_name="__main__")
    return output


def test_zh_mixed_keeps_short_texts_and_drops_what_it_says(chinese: Path, tmp_path: Path):
    folder, manifest = prepared("zh_mixed", tmp_path, source=f"jsonl:{chinese}", validation_fraction=0.0)
    store, tokenizer = DatasetStore(folder, "train"), load_tokenizer(folder / "tokenizer")
    texts = [
        tokenizer.decode(store.read(int(start), int(stop) - 1).tolist())
        for start, stop in itertools.pairwise(store.document_offsets)
    ]
    assert texts.count(REVIEW) == 1
    assert "同步首秀：港股缩量回调" in texts, "a title of eleven characters"
    assert texts.count("风从远处来，\n云向山中去。") == 1, "simplified, and once of twice"
    assert not any("看这里" in text or text == "一般" for text in texts)
    assert any("<PHONE>" in text and "<EMAIL>" in text for text in texts)
    assert sum(text.startswith("第") for text in texts) + manifest.removed_documents["near duplicate"] == 40
    assert manifest.removed_documents["exact duplicate"] == 2
    assert manifest.removed_documents["cleaning"] == 2
