"""What a plan says of memory beside what a real run's process grows by, with more than a gigabyte of state."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "resident.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="/proc tells what a process takes")
@pytest.mark.parametrize("name", runpy.run_path(str(SCRIPT))["RUNS"])
def test_a_process_grows_by_what_was_planned(name: str):
    done = subprocess.run([sys.executable, str(SCRIPT), name], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["state"] > 1e9
    assert found["held"] >= found["state"]
    assert found["planned"] == pytest.approx(found["grown"], rel=0.15)
