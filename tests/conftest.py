"""Eight fake CPU devices, a compile cache that outlives the process, and the rule for tests that need torch."""

import ctypes
import gc
import importlib.util
import os
from importlib import metadata
from pathlib import Path

import pytest

# Before jax is imported. Environment variables, so that commands run by a test find the same machine and cache.
CACHE = Path(__file__).parent.parent / ".cache" / "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests run each program a few times, so what makes programs fast to run and slow to compile is off (6 times faster);
# XLA's own rewriting of programs stays as it is. Flags that are set outside come last and win.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if metadata.version("jaxlib").startswith("0.10."):  # later ones know no other way, and refuse flags they don't know
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402 - only once the variables are set


def pytest_configure(config: pytest.Config) -> None:
    # Two workers may write one cache entry at once; who reads it half-written compiles instead.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("parity") and importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch: pip install -e .[parity]")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if item.get_closest_marker("parity") and report.skipped and os.environ.get("LM_PARITY") == "1":
        report.outcome = "failed"
        report.longrepr = f"LM_PARITY=1 and this test was skipped: {report.longrepr}"
    return report


@pytest.fixture
def strict_promotion():
    """Mixing dtypes without saying so is an error: a silent upcast is slow, a silent downcast wrong."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _programs_reused():
    from small_runs import programs_reused

    with programs_reused():
        yield
    # What was compiled stays for as long as the process does, which is a whole suite, and what is let go stays with the
    # allocator: gigabytes.
    if _resident() > _MOST_RESIDENT:
        jax.clear_caches()
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it
            trim(0)


_MOST_RESIDENT = 2 * 10**9


def _resident() -> int:
    """Bytes of memory that this process has, where the system tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
