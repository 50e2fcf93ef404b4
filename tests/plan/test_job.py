"""A job is the run: the batches it plans for are those of the run's data, its state is the run's state."""

import dataclasses
import sys
from pathlib import Path

import jax
import pytest
import small_runs

from lm.errors import UserError
from lm.models.transformer import Transformer
from lm.plan.job import batch_shapes, make_job
from lm.run.datasets import maker, prepared
from lm.tasks.distillation import DistillConfig
from lm.train import abstract_params

sys.path.insert(0, str(Path(__file__).parent.parent / "tasks"))
import families

# One family for each objective that can be planned, and one more where the batch depends on it.
PLANNED = [
    ("gpt", "causal_lm"),
    ("prefix", "prefix_lm"),
    ("bert", "masked_lm"),
    ("bert", "bert"),
    ("t5", "span_corruption"),
    ("t5", "seq2seq"),
    ("prefix", "seq2seq"),
    ("gpt", "instruction"),
    ("bert", "classification"),
    ("gpt", "classification"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@pytest.mark.parametrize(("family", "kind"), PLANNED)
def test_batches_are_those_of_the_data(corpus: Path, family: str, kind: str) -> None:
    experiment = families.experiment(corpus, family, kind)
    with prepared(experiment, None) as dataset:
        model = experiment.task.settle(experiment.model.with_vocabulary(dataset.tokenizer.vocab_size), dataset.labels)
        experiment = dataclasses.replace(experiment, model=model)
        examples = maker(experiment, dataset)(dataset.store("train"), experiment.data, True)
        real = examples.batch(jax.numpy.arange(3).__array__())
    planned = batch_shapes(experiment, model, 3)
    assert {name: (value.shape, value.dtype) for name, value in real.items()} == {
        name: (value.shape, value.dtype) for name, value in planned.items()
    }


@pytest.mark.parametrize("kind", ["prompted", "extractive_qa"])
def test_objectives_whose_batches_the_data_shapes_are_refused(corpus: Path, kind: str) -> None:
    family = families.SERVES[kind][0]
    with pytest.raises(UserError, match="neither planned nor checked"):
        batch_shapes(families.experiment(corpus, family, kind), families.FAMILIES[family], 1)


def test_a_teacher_is_refused(tmp_path: Path) -> None:
    experiment = small_runs.experiment(tmp_path)
    with pytest.raises(UserError, match=r"distill\.teacher"):
        make_job(dataclasses.replace(experiment, distill=DistillConfig(teacher="runs/large")), "tpu")


def test_what_a_run_would_refuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.seq_len 64 is longer"):
        make_job(small_runs.experiment(tmp_path, data={"seq_len": 64}), "tpu")


def test_the_state_is_the_run_s_with_what_optimizers_and_averages_hold(tmp_path: Path) -> None:
    base = small_runs.experiment(tmp_path)
    job = make_job(base, "cpu")
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    params, _ = abstract_params(Transformer(job.model), mesh)
    assert jax.tree.map(lambda x: x.shape, job.state().params) == jax.tree.map(lambda x: x.shape, params)
    averaged = make_job(small_runs.experiment(tmp_path, train={"ema_decay": 0.9}), "cpu")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    total = {one: sum(leaf.size for leaf in jax.tree.leaves(one.state())) for one in (job, averaged)}
    assert total[averaged] - total[job] == count
    assert 3 * count < total[job] < 3 * count + 10, "parameters and two moments, and a few counts"


def test_attention_is_that_of_the_platform_planned_for(tmp_path: Path) -> None:
    experiment = small_runs.experiment(tmp_path)
    assert make_job(experiment, "tpu").model.attention == "xla"
    assert make_job(experiment, "cpu").model.attention == experiment.model.attention == "auto"
