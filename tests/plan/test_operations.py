"""Operations, counted from programs whose products are known."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from lm.config import Experiment
from lm.data.config import DataConfig
from lm.models.transformer import flops_per_token
from lm.plan.job import make_job
from lm.plan.operations import product_flops
from lm.plan.planning import flops_of_row, with_settings
from lm.tasks.causal_lm import CausalLM
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig


def counted(function, *shapes) -> int:
    return product_flops(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)).jaxpr)


def test_a_product_a_batch_of_products_and_a_loop():
    assert counted(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert counted(jnp.matmul, (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7

    def loop(x, layers):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, layers)[0].sum()

    forward = counted(loop, (3, 5), (6, 5, 5))
    assert forward == 6 * 2 * 3 * 5 * 5
    # Backward two products each; the layers' checkpoint computes the forward one again.
    assert counted(jax.grad(loop, argnums=(0, 1)), (3, 5), (6, 5, 5)) == 3 * forward


def test_of_branches_the_most_expensive_counts():
    def either(x):
        return jax.lax.cond(x.sum() > 0, lambda x: x, lambda x: x @ x, x)

    assert counted(either, (4, 4)) == 2 * 4**3


def job(remat: str):
    model = tiny.config(remat=remat, vocab_size=257, max_len=64)
    return make_job(
        Experiment(
            model=model,
            data=DataConfig(seq_len=64),
            tokenizer=TokenizerConfig(kind="byte"),
            task=CausalLM(),
            train=TrainConfig(steps=3, batch_size=4),
        ),
        "tpu",
    )


def test_a_step_does_what_its_model_needs():
    """Without recomputation the products of a step are those that 6 N and 12 L N H T count."""
    plain = job("none")
    assert flops_of_row(plain) == flops_per_token(plain.model, 64) * 64
    assert flops_of_row(with_settings(plain, batch_size=12, accumulate=3)) == flops_of_row(plain)


def test_recomputation_costs_a_forward_pass_of_the_layers():
    none, full = flops_of_row(job("none")), flops_of_row(job("full"))
    head = 6 * 32 * 257 * 64
    assert full - none == pytest.approx((none - head) / 3, rel=0.15)  # less what the last product of a layer takes
    assert full > none
