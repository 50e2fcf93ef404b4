"""Runs small enough to train in a second, and what is compared of them."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from lm import run as runs
from lm.checkpoint import read_arrays, whole_steps
from lm.config import Experiment
from lm.data.config import DataConfig
from lm.loop import Outcome
from lm.models.transformer import ModelConfig
from lm.optim import OptimConfig
from lm.records import TIMINGS, RunDirectory
from lm.run import training
from lm.sharding import MeshConfig
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig

CONFIG = '''"""A model of a few thousand parameters."""

from lm.config import Experiment
from lm.data.config import DataConfig
from lm.models.transformer import ModelConfig
from lm.optim import OptimConfig
from lm.sharding import MeshConfig
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig


def get_config() -> Experiment:
    return Experiment(
        data=DataConfig(
            source="text:corpus.txt", document="paragraph", validation_fraction=0.2, test_fraction=0.1, seq_len=16
        ),
        tokenizer=TokenizerConfig(kind="byte"),
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, max_len=32),
        optim=OptimConfig(peak_lr=1e-2, warmup=2),
        train=TrainConfig(steps=6, batch_size=8, log_every=1, eval_every=3, save_every=3),
        mesh=MeshConfig(devices=1),
    )
'''


def write_corpus(path: Path, paragraphs: int = 60, seed: int = 0) -> None:
    """A few KB of made-up sentences, some of them with letters of more than one byte."""
    rng = np.random.default_rng(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "its", "näive", "dog", "中文"]
    texts = [" ".join(rng.choice(words, rng.integers(4, 25))) + "." for _ in range(paragraphs)]
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def write_tokenizer(path: Path) -> None:
    """A `tokenizer.json` that spells bytes, with `<s>` before and `</s>` after documents."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(["<s>", "</s>", *alphabet])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(path))


def experiment(folder: Path, **changes: Any) -> Experiment:
    """The experiment of `CONFIG` on a corpus in `folder`; `changes` are dicts of fields by section."""
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        write_corpus(corpus)
    base = Experiment(
        data=DataConfig(
            source=f"text:{corpus}",
            document="paragraph",
            validation_fraction=0.2,
            test_fraction=0.1,
            seq_len=16,
            root=str(folder / "datasets"),
        ),
        tokenizer=TokenizerConfig(kind="byte"),
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, max_len=32),
        optim=OptimConfig(peak_lr=1e-2, warmup=2),
        train=TrainConfig(steps=6, batch_size=8, log_every=1, eval_every=3, save_every=3),
        mesh=MeshConfig(devices=1),
    )
    sections = {name: dataclasses.replace(getattr(base, name), **fields) for name, fields in changes.items()}
    return dataclasses.replace(base, **sections)


class Silent:
    """A reporter that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def start(self, step: int, total: int) -> None:
        self.told.append(("start", (step, total)))

    def train(self, record: dict[str, Any]) -> None:
        self.told.append(("train", record))

    def evaluating(self, done: int, total: int) -> None:
        self.told.append(("evaluating", (done, total)))

    def evaluated(self, record: dict[str, Any]) -> None:
        self.told.append(("evaluated", record))

    def message(self, text: str) -> None:
        self.told.append(("message", text))

    def close(self) -> None:
        self.told.append(("close", None))

    def named(self, name: str) -> list[Any]:
        return [value for told, value in self.told if told == name]


@contextlib.contextmanager
def programs_reused() -> Iterator[None]:
    """Within, runs of equal settings share their compiled program: most of a tiny run's time is its tracing."""
    make_schedule = functools.cache(training.make_schedule)
    made: dict[Any, Any] = {}

    def make_program(model: Any, task: Any, tx: Any, schedule: Any, train: TrainConfig, mesh: Any, *moves: Any) -> Any:
        # A schedule stands for the optimizer's settings, as each of them has its own.
        key = (model.config, task, schedule, train.accumulate, train.ema_decay, train.seed, mesh, moves[1:])
        if key not in made:
            made[key] = original(model, task, tx, schedule, train, mesh, *moves)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        original = training.make_program
        patch.setattr(training, "make_schedule", make_schedule)
        patch.setattr(training, "make_program", make_program)
        yield


def start(settings: Experiment, path: Path, **options: Any) -> Outcome:
    return runs.start(settings, path, Silent(), **options)


def resume(path: Path, **options: Any) -> Outcome:
    return runs.resume(path, Silent(), **options)


def train_in_parts(settings: Experiment, path: Path, *stops: int) -> Outcome:
    """Starts a run, stops it after each of `stops`, and resumes it to its end."""
    outcome = start(settings, path, stop_at=stops[0])
    for stop in (*stops[1:], None):
        assert outcome.state == "preempted"
        outcome = resume(path, stop_at=stop)
    return outcome


def checkpoint_steps(path: Path) -> list[int]:
    return whole_steps(path / "checkpoints")


def state(path: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint (the last, by default) by its path."""
    return read_arrays(path / "checkpoints", checkpoint_steps(path)[-1] if step is None else step)


def extra(path: Path, step: int) -> dict[str, Any]:
    return json.loads((path / "checkpoints" / str(step) / "extra" / "metadata").read_text())


def metrics(path: Path) -> list[dict[str, Any]]:
    """The run's records, but for timings."""
    return [
        {name: value for name, value in record.items() if name not in TIMINGS}
        for record in RunDirectory(path).metrics()
    ]


def assert_same_run(a: Path, b: Path) -> None:
    """Parameters, optimizer state and every logged number, to the bit."""
    left, right = state(a), state(b)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)
    assert metrics(a) == metrics(b)
    last = checkpoint_steps(a)[-1]
    assert last == checkpoint_steps(b)[-1]
    first, second = extra(a, last), extra(b, last)
    for values in (first, second):
        del values["progress"]["seconds"]
    assert first == second
