r"""LLaMA 7B and 70B over 16 to 8,192 TPU v5p chips, as `lm plan` sees them: the tables of docs/results/scale.md.

    pip install 'jax[tpu]'  # to compile; without it the figures that are kept are shown
    python scripts/scale_table.py                         # writes the tables from what is kept, in seconds
    python scripts/scale_table.py --compile 7b:512        # compiles one of the steps anew first, in minutes

What compiling gave is kept in docs/results/scale.json; all else is worked out anew each time.
"""

import argparse
import dataclasses
import json
import os
import time
from importlib import metadata
from pathlib import Path

if __name__ == "__main__":
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

from lm import config as configs
from lm.plan import Plan, make_plan, parse_topology
from lm.plan.compiled import Compiled, compile_step
from lm.plan.hlo import Collective
from lm.plan.job import Job
from lm.plan.planning import checked_job, fitted
from lm.sharding import MeshConfig, sizes_of_axes

ROOT = Path(__file__).resolve().parent.parent
PAGE, KEPT = ROOT / "docs/results/scale.md", ROOT / "docs/results/scale.json"
BEGIN, END = "<!-- tables: scripts/scale_table.py -->", "<!-- end -->"

# Slices that can be had (https://cloud.google.com/tpu/docs/v5p); no slice has more than 6,144 chips.
TOPOLOGIES = {
    16: "v5p:2x2x4",
    32: "v5p:2x4x4",
    64: "v5p:4x4x4",
    128: "v5p:4x4x8",
    256: "v5p:4x8x8",
    512: "v5p:8x8x8",
    1024: "v5p:8x8x16",
    2048: "v5p:8x16x16",
    4096: "v5p:16x16x16",
    8192: "2xv5p:16x16x16",
}
MODELS = {"7b": "llama_7b", "70b": "llama_70b"}
# ZeRO-3 over so many chips at most, and copies of that.
MOST_FSDP = 512
# Rows of a chip that are in work at once, at most.
AT_ONCE = 2


def planned(model: str, chips: int) -> tuple[Job, str, dict[str, int]]:
    """The job of a row of the table, its topology, and its mesh."""
    experiment = configs.load_file(ROOT / "configs" / f"{MODELS[model]}.py")
    train = experiment.train
    # The config's batch as long as there is a row for every chip, then one row a chip.
    rows = max(train.batch_size, chips)
    accumulate = max(train.accumulate, rows // chips // AT_ONCE)
    mesh = MeshConfig(data=max(chips // MOST_FSDP, 1), fsdp=min(chips, MOST_FSDP))
    train = dataclasses.replace(train, batch_size=rows, accumulate=accumulate)
    experiment = dataclasses.replace(experiment, train=train, mesh=mesh)
    topology = parse_topology(TOPOLOGIES[chips])
    sizes = sizes_of_axes(mesh, chips, topology.name)
    return fitted(checked_job(experiment, topology), sizes)[0], topology.name, sizes


def plan_of(model: str, chips: int, kept: dict[str, dict]) -> Plan:
    """The plan of a row, with what compiling gave where that is kept."""
    job, name, sizes = planned(model, chips)
    found = kept.get(f"{model}:{chips}")
    compiled = None
    if found is not None:
        fields = dict(found["compiled"])
        moved = [Collective(**(one | {"axes": tuple(one["axes"])})) for one in fields.pop("collectives")]
        compiled = Compiled(**fields, collectives=moved)
    return make_plan(job, parse_topology(name), sizes, compiled)


def compile_row(model: str, chips: int) -> dict:
    """Compiles a row's step."""
    job, name, sizes = planned(model, chips)
    start, busy = time.perf_counter(), time.process_time()
    compiled = compile_step(job, parse_topology(name), sizes)
    if not isinstance(compiled, Compiled):
        raise SystemExit(f"{model}:{chips} is too large for its chips: {compiled.total / 1e9:.1f} GB")
    return {
        "compiled": dataclasses.asdict(compiled),
        "seconds": round(time.perf_counter() - start),
        "busy": round(time.process_time() - busy),
        "libtpu": metadata.version("libtpu"),
        "jax": metadata.version("jax"),
    }


def moved(collectives: list[Collective]) -> float:
    """GB of whole arrays that collectives move."""
    return sum(one.payload for one in collectives) / 1e9


def row_of(model: str, chips: int, kept: dict[str, dict]) -> str:
    """A row of the first table."""
    plan = plan_of(model, chips, kept)
    train, compiled, analytic = plan.job.train, plan.compiled, plan.analytic
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.sizes.items() if size > 1)
    at_once = train.batch_size // chips // train.accumulate
    cells = [f"{chips:,}", plan.topology.name, mesh, f"{train.batch_size:,}", f"{at_once} x {train.accumulate}"]
    if isinstance(compiled, Compiled):
        share = analytic.total / compiled.total
        cells += [f"{compiled.total / 1e9:.1f}", f"{analytic.total / 1e9:.1f}", f"{share:.2f}"]
        share = moved(analytic.collectives) / moved(compiled.collectives)
        cells += [f"{moved(compiled.collectives):.0f}", f"{moved(analytic.collectives):.0f}", f"{share:.2f}"]
    else:
        cells += ["", f"{analytic.total / 1e9:.1f}", "", "", f"{moved(analytic.collectives):.0f}", ""]
    assert plan.mfu is not None
    assert plan.times is not None
    how = "compiled" if isinstance(compiled, Compiled) else "analytic"
    bounds = f"{plan.mfu[0]:.0%} to {plan.mfu[1]:.0%}" if plan.fits else "does not fit"
    cells += [how, bounds, plan.times.bound]
    return f"| {' | '.join(cells)} |"


def parts_of(model: str, chips: int, kept: dict[str, dict]) -> str:
    """A row of the second table: what moves, by kind and mesh axis."""
    plan = plan_of(model, chips, kept)
    sums: dict[str, float] = {}
    for one in plan.collectives:
        name = f"{one.kind} over {' x '.join(one.axes)}"
        sums[name] = sums.get(name, 0.0) + one.payload / 1e9
    shown = [f"{name} {size:.1f}" for name, size in sums.items() if size > 1e-3 * sum(sums.values())]
    how = "compiled" if isinstance(plan.compiled, Compiled) else "analytic"
    return f"| {chips:,} | {how} | {'; '.join(shown)} |"


def tables(kept: dict[str, dict]) -> str:
    """All tables, as Markdown."""
    lines = []
    for model, config in MODELS.items():
        lines += [f"### {config}", ""]
        lines.append(
            "| chips | topology | mesh | rows | at once x parts | GB a chip, compiled | analytic | ratio"
            " | GB moved, compiled | analytic | ratio | MFU of | MFU | bound |"
        )
        lines.append("|---:|---|---|---:|---|---:|---:|---:|---:|---:|---:|---|---|---|")
        lines += [row_of(model, chips, kept) for chips in TOPOLOGIES]
        lines += ["", "| chips | how | GB moved a step, by kind and mesh axis |", "|---:|---|---|"]
        lines += [parts_of(model, chips, kept) for chips in TOPOLOGIES]
        lines.append("")
    lines += ["| compiled | seconds | processor seconds | jax, libtpu |", "|---|---:|---:|---|"]
    for name, one in sorted(kept.items(), key=lambda item: (item[0].split(":")[0], int(item[0].split(":")[1]))):
        lines.append(f"| {name} | {one['seconds']} | {one['busy']} | {one['jax']}, {one['libtpu']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", nargs="*", default=[], metavar="MODEL:CHIPS", help="rows to compile anew")
    asked = parser.parse_args()
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    for name in asked.compile:
        model, _, chips = name.partition(":")
        if model not in MODELS or not chips.isdigit() or int(chips) not in TOPOLOGIES:
            parser.error(f"--compile {name}; rows are {', '.join(MODELS)}, a colon, {', '.join(map(str, TOPOLOGIES))}")
        kept[name] = compile_row(model, int(chips))
        KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(kept)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
