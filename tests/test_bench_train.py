"""scripts/bench_train.py: the search for the largest batch, what a trace says, and a whole run at small size."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("bench_train", SCRIPTS / "bench_train.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


@pytest.mark.parametrize(
    ("room", "begin", "most", "found"),
    [
        (100, 4, 32, 32),  # all fit
        (20, 4, 32, 16),  # 24 doesn't
        (25, 4, 32, 24),
        (5, 4, 32, 4),
        (6, 4, 32, 6),
        (3, 4, 32, 3),  # 2 fits, and half as much again
        (1, 4, 32, 1),
        (0, 4, 32, None),
        (100, 4, 4, 4),
    ],
)
def test_the_largest_batch_that_fits(bench, monkeypatch, room: int, begin: int, most: int, found: int | None):
    tried = []

    def worker(contender: str, args: SimpleNamespace) -> SimpleNamespace:
        tried.append(args.batch_size)
        return SimpleNamespace(answer={} if args.batch_size <= room else None, end=lambda: None)

    monkeypatch.setattr(bench, "Worker", worker)
    assert bench.largest_batch("lm", SimpleNamespace(batch_size=begin, largest=most)) == found
    assert len(tried) == len(set(tried)), "each costs minutes on a large model"
    assert max(tried) <= most


def plane(name: str, *lines: list) -> SimpleNamespace:
    return SimpleNamespace(name=name, lines=[SimpleNamespace(name="", events=events) for events in lines])


def event(op: str, start: float, took: float, module: str = "jit_step") -> SimpleNamespace:
    return SimpleNamespace(start_ns=start, duration_ns=took, stats=[("hlo_op", op), ("hlo_module", module)])


def test_an_operations_own_time_is_without_that_of_operations_within_it(bench):
    from traced import device_events, own_times

    host = plane(
        "/host:CPU",
        [
            event("while.1", 0, 100),
            event("dot.1", 10, 30),
            event("add.1", 15, 5),
            event("dot.1", 50, 20),
            event("copy.2", 100, 7),
            event("dot.1", 0, 50, module="jit_other"),
            SimpleNamespace(start_ns=0, duration_ns=9, stats=[]),
        ],
        [event("dot.1", 3, 4)],
    )
    lines = device_events(SimpleNamespace(planes=[host]), "step")
    times = {"while.1": 100 - 30 - 20, "dot.1": 30 - 5 + 20 + 4, "add.1": 5, "copy.2": 7}
    assert own_times(lines) == times
    # Two kernels that overlap on one line stay what they are: neither is within the other.
    assert own_times([[("a", 0, 10), ("b", 5, 15)]]) == {"a": 10, "b": 10}
    device = plane("/device:GPU:0", [event("gemm.3", 0, 11)])
    lines = device_events(SimpleNamespace(planes=[host, device]), "step")
    assert own_times(lines) == {"gemm.3": 11}, "what the host did for a device is not the device's time"


def test_shares_are_by_part_of_the_model_and_by_operation(bench):
    from traced import ranked, sources

    layers = "jit(step)/jvp(Transformer.hidden)/closed_call/layers"
    text = f"""
  %dot.1 = f32[2]{{0}} dot(a, b), metadata={{op_name="{layers}/attention/query/dot_general" stack_frame_id=3}}
  ROOT fusion.7 = f32[2]{{0}} fusion(c), kind=kLoop, metadata={{op_type="x" op_name="jit(step)/mul"}}
  %fusion.8 = f32[2]{{0}} fusion(c), kind=kLoop
  %all-gather.2 = f32[2]{{0}} all-gather(c), metadata={{op_name="{layers}/mlp/up/dot_general"}}
"""
    named = sources(text)
    assert set(named) == {"dot.1", "fusion.7", "all-gather.2"}
    lines = [[("dot.1", 0, 40), ("fusion.7", 40, 70), ("fusion.8", 70, 90), ("all-gather.2", 90, 100)]]
    found = ranked(lines, named, steps=2)
    assert found["busy"] == pytest.approx(50e-9)
    shares = {"attention": 0.4, "optimizer, clipping": 0.3, "not named": 0.2, "communication": 0.1}
    assert dict(found["parts"]) == pytest.approx(shares)
    assert found["operations"][0] == ("dot", "jvp(Transformer.hidden)/layers/attention/query/dot_general", 0.4)
    assert found["operations"][1][:2] == ("fusion", "mul")


def run(folder: Path, *words: str) -> str:
    command = [sys.executable, str(SCRIPTS / "bench_train.py"), *words, "--rounds", "1", "--warmup", "1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=True)
    assert "failed" not in done.stderr, done.stderr
    return done.stdout


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| (?:gpt|llama)-.*$", text, re.M)]


def check_profile(text: str) -> None:
    told = text.partition("| part | share |")[2].partition("\n\n")
    parts = {name: float(share) for name, share in re.findall(r"^\| (.*?) \| ([\d.]+)% \|$", told[0], re.M)}
    assert sum(parts.values()) == pytest.approx(100, abs=0.5)
    assert {"attention", "feed-forward", "head and loss", "optimizer, clipping"} <= set(parts)
    assert parts["attention"] > 0
    busy, step = map(float, re.findall(r"take ([\d.]+) s of a step's ([\d.]+) s", text)[0])
    assert 0 < busy < 20 * step  # several threads are busy at once, and a traced step is slower


def test_a_small_model_alone_with_its_profile(tmp_path: Path):
    """One contender, no search beyond the first size: what is measured ends up in the file."""
    words = ("--models", "gpt-2x32", "--seq-len", "16", "--batch-size", "2", "--largest", "2", "--contenders", "lm")
    told = run(tmp_path, *words, "--profile", "--steps", "2", "--output", "there/table.md")
    assert (tmp_path / "there" / "table.md").read_text() == told
    ((model, length, batch, contender, speed, *_, loss),) = rows(told)
    assert (model, length, batch, contender) == ("gpt-2x32", "16", "2", "lm")
    assert float(speed.replace(",", "")) > 0
    assert float(loss) == pytest.approx(5.55, abs=0.1)  # log 256
    check_profile(told)


@pytest.mark.slow
def test_a_set_is_one_command(tmp_path: Path, bench):
    told = run(tmp_path, "--set", "try", "--contenders", "lm", "torch", "--steps", "2")
    output, title, cases = bench.SETS["try"]
    assert (tmp_path / output).read_text() == told
    assert told.startswith(f"# {title}\n")
    assert [(row[0], row[2], row[3]) for row in rows(told)] == [
        (case["model"], str(case["largest"]), contender) for case in cases for contender in ("lm", "torch")
    ]
    assert told.count("| part | share |") == len(cases)
    losses = {(row[0], row[3]): float(row[-1]) for row in rows(told)}
    assert all(loss == pytest.approx(5.55, abs=0.1) for loss in losses.values()), losses


def test_the_set_for_gpus_is_what_its_page_wants(bench):
    output, _, cases = bench.SETS["gpu"]
    assert output == "docs/results/gpu.md"
    assert [case["model"] for case in cases] == ["gpt2-small", "llama-1b", "llama-7b"]
    known = {"model", "seq_len", *bench.SHARED, "pad_vocab", "profile", "largest"}
    for case in (case for _, _, cases in bench.SETS.values() for case in cases):
        assert set(case) <= known
        assert case["model"] in bench.SHAPES
        assert case["batch_size"] <= case["largest"]
