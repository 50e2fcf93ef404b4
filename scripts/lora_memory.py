"""Device memory of a LoRA step, compiled for a TPU that isn't here.

    pip install 'jax[tpu]'           # libtpu compiles without a TPU
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python scripts/lora_memory.py
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python scripts/lora_memory.py --targets '.*' --seq-len 4096

The base is LLaMA 7B in bfloat16, frozen; the terms, their gradients and AdamW's moments are float32. The table is what
the compiler plans: `arguments` are the state and the batch, which the step takes over (`aliased`), `temporary` all that
it needs besides. A plan is for one chip; nothing is run.
"""

import argparse
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from lm.models.lora import LoraConfig
from lm.models.presets import llama
from lm.models.transformer import Transformer
from lm.optim import OptimConfig, freezing, make_optimizer, make_schedule
from lm.run.begin import tuned_rates
from lm.sharding import MeshConfig, batch_sharding, make_mesh
from lm.tasks.causal_lm import CausalLM
from lm.train import TrainConfig, abstract_params, make_program
from lm.tree import count_parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:2x2x1", help="whose first chip is compiled for")
    parser.add_argument("--size", default="7b")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default=LoraConfig().targets)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--remat", default="full", choices=["none", "dots", "full"])
    parser.add_argument("--loss-chunk", type=int, default=256)
    args = parser.parse_args()

    chip = topologies.get_topology_desc(args.topology, platform="tpu").devices[0]
    mesh = make_mesh(MeshConfig(), [chip])
    config = llama(
        args.size,
        max_len=args.seq_len,
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
        remat=args.remat,
        unroll=1,
        lora=LoraConfig(rank=args.rank, targets=args.targets),
    )
    model = Transformer(config)
    optim = OptimConfig(rates=tuned_rates(config))
    params, _ = abstract_params(model, mesh)
    schedule = make_schedule(optim, 1000)
    tx = make_optimizer(optim, schedule, params)
    train = TrainConfig(steps=1000, batch_size=args.batch_size)
    task = CausalLM(loss_chunk=args.loss_chunk)
    program = make_program(model, task, tx, schedule, train, mesh, freezing(optim, params))
    shape, at = (args.batch_size, args.seq_len), batch_sharding(mesh)
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32, "positions": jnp.int32}
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=at) for name, kind in kinds.items()}
    with jax.set_mesh(mesh):
        plan = program.train_step.lower(program.target, batch).compile().memory_analysis()

    trained = count_parameters(program.target.params)
    frozen = count_parameters(program.target.frozen)
    moments = sum(np.dtype(leaf.dtype).itemsize * leaf.size for leaf in jax.tree.leaves(program.target.opt_state))
    peak = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    peak += plan.generated_code_size_in_bytes - plan.alias_size_in_bytes
    rows = {
        "arguments": plan.argument_size_in_bytes,
        "outputs": plan.output_size_in_bytes,
        "aliased": plan.alias_size_in_bytes,
        "temporary": plan.temp_size_in_bytes,
        "code": plan.generated_code_size_in_bytes,
        "**all**": peak,
    }
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax", "libtpu"))
    print(
        f"LLaMA {args.size}, rank {args.rank} on {args.targets!r}, B={args.batch_size}, T={args.seq_len}, remat"
        f" {args.remat}, for one chip of {args.topology} ({chip.device_kind}); {versions}\n"
        f"{frozen / 1e9:.2f}B frozen parameters (bfloat16), {trained / 1e6:.1f}M trained (float32), moments"
        f" {moments / 1e6:.0f} MB\n\n| | GB |\n|---|---:|"
    )
    for name, size in rows.items():
        print(f"| {name} | {size / 1e9:.2f} |")


if __name__ == "__main__":
    main()
