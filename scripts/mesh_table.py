"""Is a run on eight devices the run on one? Every family of models on every axis, alone and mixed.

    python scripts/mesh_table.py --output docs/results/meshes.md      (about half an hour on two cores)
    python scripts/mesh_table.py --families llama --meshes "context 8" --steps 3

On fake devices of this machine, in float32 and without dropout, on made-up batches of packed documents (see
`lm.equality`; BERT's and the encoder-decoders' are of pairs). The run on one device recomputes nothing and takes its
batch whole; those on eight recompute and accumulate in turns, as the table says.
"""

import argparse
import dataclasses
import platform
from importlib import metadata
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from lm.config import Experiment  # noqa: E402
from lm.data.config import DataConfig  # noqa: E402
from lm.equality import Comparison, compare, on_one_device  # noqa: E402
from lm.models.presets import bert, gpt2, llama, t5, transformer  # noqa: E402
from lm.optim import OptimConfig  # noqa: E402
from lm.sharding import MeshConfig, Rules  # noqa: E402
from lm.tasks.causal_lm import CausalLM  # noqa: E402
from lm.tasks.masked_lm import BertPretraining  # noqa: E402
from lm.tasks.seq2seq import Seq2Seq  # noqa: E402
from lm.text.tokenizer import TokenizerConfig  # noqa: E402
from lm.train import TrainConfig  # noqa: E402

SMALL = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_len": 64, "d_ff": 64, "vocab_size": None}
PACKED = DataConfig(source="text:none", seq_len=32, packing="documents")
PAIRS = DataConfig(source="parallel:none,none", seq_len=32)
SENTENCES = DataConfig(source="text:none", seq_len=32, sentences=True)
FAMILIES = {
    "gpt2": (gpt2("small", **SMALL), CausalLM(), PACKED),
    "llama": (llama("tiny", **SMALL | {"n_kv_heads": 2}), CausalLM(loss_chunk=8), PACKED),
    "llama, window 12, soft cap": (
        llama("tiny", **SMALL, n_kv_heads=1, window=12, attention_softcap=20.0, qk_norm=True),
        CausalLM(z_loss=1e-4),
        PACKED,
    ),
    "bert": (bert("tiny", **SMALL), BertPretraining(), SENTENCES),
    "transformer": (transformer("base", **SMALL, encoder_layers=2), Seq2Seq(), PAIRS),
    "t5": (t5("small", **SMALL, encoder_layers=2), Seq2Seq(), PAIRS),
}
SEQUENCE = Rules(residual_length=("context", "tensor"))
MESHES = {
    "data 8": MeshConfig(),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "tensor 4, data 2": MeshConfig(tensor=4),
    "context 8": MeshConfig(data=1, context=8),
    "context 4, fsdp 2": MeshConfig(data=1, fsdp=2, context=4),
    "data 2, fsdp 2, tensor 2": MeshConfig(fsdp=2, tensor=2),
    "data 2, context 2, tensor 2, sequence": MeshConfig(context=2, tensor=2, rules=SEQUENCE),
    "fsdp 2, tensor 4, sequence": MeshConfig(data=1, fsdp=2, tensor=4, rules=SEQUENCE),
}
WAYS = (("none", 2), ("dots", 1), ("offload", 2), ("full", 1))
HEAD = "| model | mesh | remat | accumulate | layers | gradients | losses |\n|---|---|---|---:|---:|---:|---:|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--meshes", nargs="+", choices=MESHES, default=list(MESHES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, help="also write a page")
    args = parser.parse_args()
    rows, worst = [], 0.0
    print(HEAD)
    for family in args.families:
        model, task, data = FAMILIES[family]
        experiment = Experiment(
            model=model,
            data=data,
            tokenizer=TokenizerConfig(kind="byte"),
            task=task,
            optim=OptimConfig(peak_lr=1e-2, warmup=3),
            train=TrainConfig(steps=args.steps, batch_size=16),
        )
        alone = on_one_device(experiment, steps=args.steps)
        for number, mesh in enumerate(args.meshes, start=list(FAMILIES).index(family)):
            remat, accumulate = WAYS[number % len(WAYS)]
            asked = dataclasses.replace(
                experiment,
                model=dataclasses.replace(model, remat=remat),
                train=dataclasses.replace(experiment.train, accumulate=accumulate),
                mesh=MESHES[mesh],
            )
            found = compare(alone, asked)
            rows.append(f"| {family} | {mesh} | {remat} | {accumulate} | {cells(found)} |")
            worst = max(worst, found.largest("loss").relative)
            assert found.largest("initial").relative == 0, found.largest("initial")
            print(rows[-1], flush=True)
    if args.output is not None:
        args.output.write_text(page(rows, worst, args.steps), encoding="utf-8")


def cells(found: Comparison) -> str:
    """Largest differences, or in bold where the runs part."""
    sizes = (found.largest_of_layers(), found.largest("gradient"), found.largest("loss"))
    return " | ".join(f"{x.relative:.1e}" if x.relative <= found.tolerance else f"**{x.relative:.1e}**" for x in sizes)


def page(rows: list[str], worst: float, steps: int) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax"))
    return f"""# One device and eight

    python scripts/mesh_table.py --output docs/results/meshes.md

Two layers of each family, trained for {steps} steps on one device and on eight fake ones, in float32, without dropout.
Figures are the largest difference of a layer's output, a gradient or a loss, relative to the largest value there
(gradients: at least a hundredth of the largest of all). Initial parameters are the same to the bit. Losses differ by at
most **{worst:.1e}** anywhere; what is above 1e-5 would be bold. The command that does this for a config of yours is
`lm doctor --check-mesh` ([meshes.md](../meshes.md)).

{versions}, Python {platform.python_version()}; a machine with two CPU cores.

{HEAD}
{chr(10).join(rows)}

`sequence` is `mesh.rules.residual-length context tensor`; `tests/test_equality.py` holds losses to 1e-5.
"""


if __name__ == "__main__":
    main()
