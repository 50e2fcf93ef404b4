"""A run on a mixture of prepared datasets: the same run when stopped, told how often it saw each."""

import dataclasses
import json
from pathlib import Path

import pytest
import small_runs as small

from lm import run as runs
from lm.data.config import DataConfig, MixtureConfig
from lm.data.prepare import prepare
from lm.errors import UserError
from lm.text.tokenizer import TokenizerConfig

BYTE = TokenizerConfig(kind="byte")


def dataset(folder: Path, name: str, paragraphs: int, tokenizer: TokenizerConfig = BYTE) -> Path:
    small.write_corpus(folder / f"{name}.txt", paragraphs, seed=paragraphs)
    data = DataConfig(
        source=f"text:{folder}/{name}.txt",
        document="paragraph",
        validation_fraction=0.2,
        name=name,
        root=str(folder / "datasets"),
    )
    return prepare(data, tokenizer)


def mixed(folder: Path, **mixture):
    experiment = small.experiment(folder, train={"steps": 9})
    data = DataConfig(seq_len=16, mixture=MixtureConfig(**mixture))
    return dataclasses.replace(experiment, data=data, tokenizer=TokenizerConfig())


def test_stopped_and_resumed_across_a_change_of_weights_it_is_the_same_run(tmp_path: Path):
    large, little = dataset(tmp_path, "large", 60), dataset(tmp_path, "little", 8)
    experiment = mixed(
        tmp_path, datasets=(str(large), str(little)), weights=(0.5, 0.5, 0.875, 0.125), from_steps=(0, 4)
    )
    small.start(experiment, tmp_path / "straight")
    small.train_in_parts(experiment, tmp_path / "parts", 3, 5)
    small.assert_same_run(tmp_path / "straight", tmp_path / "parts")
    told = json.loads((tmp_path / "straight/epochs.json").read_text())
    assert told["step"] == 9
    # Batches of 8: 4 steps of half and half, 5 steps of 7 and 1; a stage's first blocks may be off by what fits them.
    examples = {str(large): 4 * 4 + 5 * 7, str(little): 4 * 4 + 5 * 1}
    for path, count in examples.items():
        tokens = json.loads((Path(path) / "manifest.json").read_text())["splits"]["train"]["tokens"]
        assert told["epochs"][path] == pytest.approx(count / ((tokens - 1) // 16), rel=0.35)
    assert told["epochs"][str(little)] > 2 * told["epochs"][str(large)]
    result = runs.evaluate_run(
        tmp_path / "parts",
        split="validation",
        checkpoint="latest",
        mesh=experiment.mesh,
        max_batches=None,
        with_baselines=True,
    )
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (large, little)]
    assert result["tokens"] == sum(m["splits"]["validation"]["tokens"] for m in manifests) - 2  # no first token
    assert result["bits_per_byte"] > 0
    assert result["zlib_bits_per_byte"] > 0


def test_a_dataset_of_the_mixture_that_changed_is_told(tmp_path: Path):
    large, little = dataset(tmp_path, "large", 60), dataset(tmp_path, "little", 8)
    experiment = mixed(tmp_path, datasets=(str(large), str(little)))
    small.start(experiment, tmp_path / "run", stop_at=2)
    manifest = json.loads((little / "manifest.json").read_text())
    (little / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "0" * 12}))
    with pytest.raises(UserError, match=r"started with the mixture .*, but its datasets now make"):
        small.resume(tmp_path / "run")


def test_what_no_mixture_can_be_is_refused_before_anything_is_written(tmp_path: Path):
    large = dataset(tmp_path, "large", 60)
    other = dataset(tmp_path, "other", 20, TokenizerConfig(kind="bpe", vocab_size=300))
    for mixture, message in (
        ({"datasets": (str(large), str(other))}, "a mixture needs one"),
        ({"datasets": (str(large), str(tmp_path / "none"))}, r"no prepared dataset in .*none: .* name the folder that"),
        ({"datasets": (str(large.parent),)}, f"manifest.json is missing; name {large}"),
        ({"datasets": (str(large),), "weights": (1.0, 2.0)}, r"must have 1: one for each"),
    ):
        with pytest.raises(UserError, match=message):
            small.start(mixed(tmp_path, **mixture), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    settings = dataclasses.replace(mixed(tmp_path, datasets=(str(large),)), tokenizer=BYTE)
    with pytest.raises(UserError, match=r"tokenizer.kind is 'byte', but data.mixture.* leave it at 'bpe'"):
        small.start(settings, tmp_path / "run")
    with pytest.raises(UserError, match=r"data.mixture names prepared datasets"):
        prepare(DataConfig(mixture=MixtureConfig(datasets=(str(large),))), BYTE)
