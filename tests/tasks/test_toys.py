"""Small skills that a model either has or has not: copying, reversing and sorting, learned to the last letter."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from lm.config import Experiment
from lm.data.config import DataConfig
from lm.generate import SamplingConfig
from lm.judge import judge
from lm.models.transformer import ModelConfig
from lm.optim import OptimConfig
from lm.sharding import MeshConfig
from lm.tasks.seq2seq import Seq2Seq
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
import small_runs

SKILLS = {"copy": lambda word: word, "reverse": lambda word: word[::-1], "sort": lambda word: "".join(sorted(word))}
STEPS = {"copy": 600, "reverse": 600, "sort": 1500}  # after 600 two of 150 are sorted wrong, with repeated letters
ENCODER_DECODER = ModelConfig(
    d_model=64,
    n_layers=2,
    encoder_layers=2,
    n_heads=4,
    d_ff=128,
    max_len=32,
    norm="rmsnorm",
    positions="rope",
    use_bias=False,
)


def settings(folder: Path, skill: str) -> Experiment:
    rng = np.random.default_rng(0)
    words = sorted({"".join(rng.choice(list("abcdefgh"), rng.integers(3, 8))) for _ in range(6000)})
    rows = [{"source": word, "target": SKILLS[skill](word)} for word in words]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Experiment(
        data=DataConfig(
            source=f"jsonl:{folder}/words.jsonl",
            fields=("source", "target"),
            validation_fraction=0.05,
            root=str(folder / "datasets"),
            seq_len=10,
        ),
        tokenizer=TokenizerConfig(kind="char", vocab_size=16),
        model=ENCODER_DECODER,
        task=Seq2Seq(),
        optim=OptimConfig(peak_lr=3e-3, warmup=0.1, schedule="cosine"),
        train=TrainConfig(steps=STEPS[skill], batch_size=64, log_every=100, eval_every=300, save_every=0),
        mesh=MeshConfig(devices=1),
    )


@pytest.mark.slow
@pytest.mark.parametrize("skill", SKILLS)
def test_a_skill_is_learned_without_a_fault(tmp_path: Path, skill: str) -> None:
    small_runs.start(settings(tmp_path, skill), tmp_path / "run")
    for sampling in (SamplingConfig(temperature=0, max_new_tokens=9), SamplingConfig(beams=3, max_new_tokens=9)):
        judged = judge(tmp_path / "run", ["exact_match"], sampling, split="validation", batch_size=64, limit=150)
        wrong = [row for row in zip(judged.sources, judged.references, judged.texts) if row[1] != row[2]]
        assert not wrong, f"{len(wrong)} of {len(judged.texts)}: {wrong[:3]}"
