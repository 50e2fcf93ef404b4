"""What a device was busy with while steps were traced: a profile of `jax.profiler`, read without TensorFlow."""

import collections
import re

# Where in the model an operation stands, by its name in the source; the first that fits.
PARTS = {
    "attention": r"/attention(/|$)",
    "feed-forward": r"/mlp(/|$)",
    "norms": r"norm(/|$)",
    "head and loss": r"logits|embed\.attend|/head(/|$)|jvp\(\)",
    "embedding": r"embed",
    "rest of the model": r"Transformer|/layers",
    "optimizer, clipping": r"^jit\(step\)",
}


def device_events(profile, module: str) -> list[list[tuple[str, int, int]]]:
    """What the devices did for a program whose name holds `module`: for each line of the trace (operation, start, end).

    Where a device has a plane of its own, what the host did for it is left out.
    """
    planes = list(profile.planes)
    of_devices = [plane for plane in planes if plane.name.startswith("/device:") and any(plane.lines)]
    lines = []
    for plane in of_devices or planes:
        for line in plane.lines:
            found = []
            for event in line.events:
                told = dict(event.stats)
                if "hlo_op" in told and module in str(told.get("hlo_module", "")):
                    start = round(event.start_ns)
                    found.append((str(told["hlo_op"]), start, start + round(event.duration_ns)))
            if found:
                lines.append(found)
    return lines


def own_times(lines: list[list[tuple[str, int, int]]]) -> collections.Counter:
    """Nanoseconds of each operation, less those of operations that began and ended within it on the same line."""
    times: collections.Counter = collections.Counter()
    for line in lines:
        open_events: list[tuple[str, int]] = []
        for name, start, end in sorted(line, key=lambda event: (event[1], -event[2])):
            while open_events and open_events[-1][1] <= start:
                open_events.pop()
            times[name] += end - start
            if open_events and end <= open_events[-1][1]:
                times[open_events[-1][0]] -= end - start
            open_events.append((name, end))
    return times


def sources(text: str) -> dict[str, str]:
    """From a compiled program's text: operation -> where in the source it comes from."""
    found = re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?metadata=\{[^}]*?op_name="([^"]*)"', text, re.M)
    return dict(found)


def ranked(lines: list[list[tuple[str, int, int]]], named: dict[str, str], steps: int) -> dict:
    """Where the time of traced steps went.

    Args:
      lines: from `device_events`.
      named: from `sources`.
      steps: how many were traced.

    Returns:
      `busy`, the seconds of all operations in a step; their shares by `parts` of the model, and those of the twelve
      `operations` that take most (what it is, where it comes from, share).
    """
    times = own_times(lines)
    whole = sum(times.values()) or 1
    parts: collections.Counter = collections.Counter()
    operations: collections.Counter = collections.Counter()
    for name, took in times.items():
        source = named.get(name, "")
        communication = re.match(r"(all-|reduce-scatter|collective-)", name)
        of_source = next((part for part, pattern in PARTS.items() if re.search(pattern, source)), "not named")
        parts["communication" if communication else of_source] += took
        short = re.sub(r"closed_call/|while/body/|jit\(step\)/", "", source)
        operations[re.sub(r"[.\d]+$", "", name), short] += took
    return {
        "busy": whole / steps / 1e9,
        "parts": [(part, took / whole) for part, took in parts.most_common()],
        "operations": [(*name, took / whole) for name, took in operations.most_common(12)],
    }
