"""A plan as a picture: memory, times and what moves."""

from __future__ import annotations

from pathlib import Path

from lm.plan.compiled import Compiled
from lm.plan.planning import Plan


def draw_plan(plan: Plan, path: Path) -> None:
    """Draws memory against the chip's, the least times of a step, and collectives by mesh axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    memory, times, moved = figure.subplots(1, 3)
    if isinstance(plan.compiled, Compiled):
        one = plan.compiled
        parts = {"state and batch": one.arguments, "temporary": one.temporary, "code": one.code}
    else:
        parts = dict(plan.analytic.memory)
    below = 0.0
    for name, size in parts.items():
        memory.bar("needed", size / 1e9, bottom=below, label=name, width=0.5)
        below += size / 1e9
    if plan.limit is not None:
        memory.axhline(plan.limit / 1e9, color="#c0392b", linewidth=1.5)
        memory.annotate("the chip has", (0.4, plan.limit / 1e9), va="bottom", ha="right", color="#c0392b")
    memory.set(title="memory of a device", ylabel="GB", xlim=(-0.5, 1.6))
    memory.legend(frameon=False, fontsize="small", loc="center right")

    found = plan.times
    if found is not None:
        names = ("compute", "memory", "links", "host") if found.host else ("compute", "memory", "links")
        times.barh(names, [getattr(found, name) for name in names], color="#5b7db1")
        times.invert_yaxis()
        times.set(title=f"least seconds of a step (bound by {found.bound})", xlabel="seconds")
    else:
        times.set_axis_off()

    sums: dict[str, float] = {}
    for one_kind in plan.collectives:
        label = f"{one_kind.kind}\nover {' x '.join(one_kind.axes)}"
        sums[label] = sums.get(label, 0.0) + one_kind.sent / 1e9
    largest = sorted(sums.items(), key=lambda item: -item[1])[:6]
    if largest:
        moved.barh([name for name, _ in largest], [size for _, size in largest], color="#7fa37a")
        moved.invert_yaxis()
        moved.tick_params(axis="y", labelsize="small")
        moved.set(title="sent by a device in a step", xlabel="GB")
    else:
        moved.set_axis_off()
    for axes in (memory, times, moved):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.sizes.items() if size > 1) or "one device"
    figure.suptitle(f"{plan.parameters / 1e9:.3g}B parameters on {plan.topology.name}, mesh {mesh}", fontsize="medium")
    figure.savefig(path, dpi=120)
