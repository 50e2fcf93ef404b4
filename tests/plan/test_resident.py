"""What a plan says of memory beside what a real run's process grows by, with more than a gigabyte of state."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lm.config import Experiment, to_dict
from lm.data.config import DataConfig
from lm.models.presets import gpt2, llama
from lm.models.transformer import ModelConfig
from lm.tasks.causal_lm import CausalLM
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig

LLAMA = {"d_model": 1024, "d_ff": 2816, "n_layers": 8, "n_heads": 16, "n_kv_heads": 4}
RUNS = {
    "plain": (gpt2("small", vocab_size=16384, max_len=256, unroll=1), 4, 1),
    "unrolled": (gpt2("small", vocab_size=16384, max_len=256), 4, 1),
    "recomputed in parts": (llama("tiny", **LLAMA, vocab_size=16384, remat="full", unroll=1), 8, 2),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="/proc tells what a process takes")
@pytest.mark.parametrize("name", RUNS)
def test_a_process_grows_by_what_was_planned(tmp_path: Path, name: str):
    model: ModelConfig
    model, rows, parts = RUNS[name]
    experiment = Experiment(
        model=model,
        data=DataConfig(seq_len=256),
        tokenizer=TokenizerConfig(kind="byte"),
        task=CausalLM(),
        train=TrainConfig(steps=10, batch_size=rows, accumulate=parts),
    )
    config = tmp_path / "config.json"
    config.write_text(json.dumps(to_dict(experiment)), encoding="utf-8")
    script = Path(__file__).parent / "resident.py"
    done = subprocess.run([sys.executable, str(script), str(config)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["state"] > 1e9
    assert found["planned"] == pytest.approx(found["grown"], rel=0.15)
