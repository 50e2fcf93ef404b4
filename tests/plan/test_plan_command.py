"""`lm plan` as it is typed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm.cli import main
from lm.plan.chips import CHIPS

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SMALL = str(CONFIGS / "quickstart.py")
SEVEN = str(CONFIGS / "llama_7b.py")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["plan", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((SEVEN, "--topology", "v9:4x4"), "known are v4:4x4x4"),
        ((SEVEN, "--topology", "v5p:4x4"), "has 3 axes"),
        ((SEVEN, "--topology", "v5p:4x4x4", "--mesh.fsdp", "48"), "does not fit the 64 devices"),
        ((SEVEN, "--topology", "v5p:4x4x4", "--train.batch-size", "96"), "is not a multiple of"),
        ((SEVEN, "--topology", "v5p:4x4x4", "--mesh.context", "3"), "does not fit the 64 devices"),
        (
            (SEVEN, "--topology", "v5p:4x4x4", "--mesh.context", "64", "--mesh.fsdp", "1", "--data.seq-len", "2000"),
            "not a multiple of 128",
        ),
        ((SEVEN, "--topology", "2xv5p:4x4x4"), "make it a multiple of 2"),
        ((SEVEN, "--topology", "v5p:16x16x32"), "at most 6144; join several"),
        ((SEVEN, "--topology", "2xh100:8"), "only TPUs come in slices"),
        ((SEVEN, "--topology", "v5p:4x4x4", "--mesh.rules.residual-length", "tensor"), "without context"),
        ((SEVEN, "--topology", "v5p:4x4x4", "--model.remat", "host"), "remat"),
        ((SEVEN, "--topology", "h100:8", "--compile", "yes"), "nothing compiles for GPUs"),
        ((SEVEN, "--topology", "cpu:8", "--search"), "neither speed nor a limit"),
        ((SEVEN, "--topology", "v5p:4x4x4", "--search-compile", "2"), "add --search"),
        ((SEVEN, "--topology", "v5p:4x4x4", "--search-compile", "-1"), "it must be 0 or more"),
        ((SEVEN, "--topology", "v5p:4x4x4", "--search", "--mesh.tensor", "8"), "--search tries all meshes"),
        ((SEVEN, "--topology", "h100:8", "--search", "--compile", "yes"), "add --search-compile 3"),
        ((SEVEN, "--output", "plan.txt"), "a picture is a .png"),
        ((SEVEN, "--output", "nowhere/plan.png"), "no folder nowhere"),
        ((SEVEN, "--topolgy", "v5p:4x4x4"), "topolgy"),
        (("--topology", "v5p:4x4x4"), "give a config file first"),
        (("missing.py",), "no config file"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str):
    status, out, err = said(capsys, *arguments)
    assert status == 2
    assert told in err
    assert err.count("\n") == 1
    assert not out


def test_an_unknown_topology_lists_all_that_are_known(capsys: pytest.CaptureFixture[str]):
    _, _, err = said(capsys, SEVEN, "--topology", "tpu:64")
    assert all(f"{name}:" in err for name in (*CHIPS, "cpu"))


def test_a_plan_in_words_as_json_and_as_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    picture = tmp_path / "plan.png"
    options = (SEVEN, "--topology", "v5p:4x4x4", "--compile", "no")
    status, out, err = said(capsys, *options, "--output", str(picture))
    assert (status, err) == (0, "")
    assert "6,738,415,616" in out
    assert "fits: " in out
    assert "--train.accumulate 8" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    status, out, err = said(capsys, *options, "--json")
    plan = json.loads(out)
    assert plan["memory"]["fits"] is True
    assert plan["mesh"]["fsdp"] == 64
    assert {one["kind"] for one in plan["collectives"]} >= {"all-gather", "reduce-scatter"}


def test_what_does_not_fit_says_so_and_what_would(capsys: pytest.CaptureFixture[str]):
    status, out, _ = said(capsys, SEVEN, "--topology", "h100:8", "--mesh.data", "-1", "--mesh.fsdp", "1")
    assert status == 0
    assert "does not fit: needs" in out
    assert "fits with --mesh" in out


def test_a_search_as_json(capsys: pytest.CaptureFixture[str]):
    status, out, _ = said(capsys, SEVEN, "--topology", "h200:8", "--search", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["tried"] > len(found["fit"]) > 0
    assert all(plan["memory"]["fits"] for plan in found["fit"])


def test_a_small_run_is_compiled_for_fake_devices(tmp_path: Path):
    """In a process of its own, which has as many devices as the topology asks for."""
    options = ["--topology", "cpu:4", "--mesh.data", "2", "--mesh.fsdp", "2", "--json"]
    size = ["--model.d-model", "32", "--model.n-heads", "2", "--model.n-layers", "2", "--train.batch-size", "8"]
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-m", "lm", "plan", SMALL, *options, *size],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["memory"]["how"] == "compiled"
    assert plan["memory"]["fits"] is None
    axes = {axis for one in plan["collectives"] for axis in one["axes"]}
    assert axes == {"data", "fsdp"}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_one_line_says_how_to_get_it(capsys: pytest.CaptureFixture[str]):
    status, _, err = said(capsys, SEVEN, "--topology", "v5p:4x4x4")
    assert status == 2
    assert "pip install 'jax[tpu]'" in err
    assert err.count("\n") == 1
