"""`lm doctor`: can this machine run it?

Plain text from Python's own library until it is known that the packages which the other commands need are there.
"""

import importlib.util
import platform
import shutil
from importlib import metadata
from pathlib import Path

from lm.commands.exits import DONE
from lm.errors import check

# Name to install by, and name to import by where it is another.
REQUIRED = {
    "jax": "",
    "jaxlib": "",
    "jinja2": "",
    "flax": "",
    "optax": "",
    "orbax-checkpoint": "orbax.checkpoint",
    "grain": "",
    "array-record": "array_record",
    "tensorflow-datasets": "tensorflow_datasets",
    "tokenizers": "",
    "huggingface-hub": "huggingface_hub",
    "sentencepiece": "",
    "tyro": "",
    "rich": "",
    "tensorboardX": "",
    "matplotlib": "",
    "absl-py": "absl",
    "numpy": "",
}
# Name to install by, and the extra that brings it.
EXTRAS = {
    "charset-normalizer": "text",
    "ftfy": "text",
    "jieba": "text",
    "lxml_html_clean": "text",
    "opencc-python-reimplemented": "text",
    "py3langid": "text",
    "pyarrow": "text",
    "trafilatura": "text",
    "zstandard": "text",
    "apache-beam": "beam",
    "torch": "parity",
    "transformers": "parity",
}


def run(arguments: list[str]) -> int:
    """`lm doctor [--mesh.fsdp 4 ...]`, or `lm doctor --check-mesh CONFIG.py [settings]`."""
    for at, argument in enumerate(arguments):
        option, given, value = argument.partition("=")
        if option.replace("_", "-") == "--check-mesh":
            rest = arguments[at + 1 :]
            value = value if given else (rest.pop(0) if rest else "")
            check(value, "--check-mesh is given no config file; write `lm doctor --check-mesh CONFIG.py [settings]`")
            from lm.commands import check_mesh

            return check_mesh.run(Path(value), arguments[:at] + rest, _memory().get("MemAvailable"))
    rows = [("python", f"{platform.python_version()} on {platform.platform()}")]
    found = {package: _version(package, module or package) for package, module in REQUIRED.items()}
    missing = [package for package, version in found.items() if version is None]
    rows += [(package, version or "MISSING") for package, version in found.items()]
    for package, extra in EXTRAS.items():
        rows.append((f"{package} ({extra})", _installed(package) or f"not installed; pip install -e '.[{extra}]'"))
    if missing:  # before anything is imported that would stumble over it
        _print(rows + _machine())
    check(not missing, f"missing packages: {', '.join(missing)}; run `pip install -r requirements.txt`")
    return _with_devices(rows, arguments)


def _with_devices(rows: list[tuple[str, str]], arguments: list[str]) -> int:
    from dataclasses import dataclass, field

    import jax

    from lm import config as configs
    from lm.commands.shared import open_console
    from lm.hardware import peak_flops
    from lm.sharding import MeshConfig, make_mesh

    @dataclass(frozen=True, kw_only=True)
    class DoctorArguments:
        """Versions, devices, how a mesh fits, free memory and disk, and which extras are installed."""

        mesh: MeshConfig = field(default_factory=MeshConfig)
        """The mesh to try."""
        check_mesh: Path | None = None
        """CONFIG.py, followed by any of its settings: train it for some steps on one device and on its mesh, of fake
        devices or of real ones, and name the first layer that differs. See `lm doctor --check-mesh CONFIG.py -h`."""

    asked = configs.parse(DoctorArguments, None, arguments, prog="lm doctor")
    open_console()
    devices = jax.devices()
    peak = peak_flops(devices[0])
    speed = f", {peak / 1e12:.0f} TFLOP/s bf16 each" if peak else ", peak FLOP/s unknown (no MFU will be shown)"
    rows.append(("devices", f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){speed}"))
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        rows.append(("device memory", f"{free / 2**30:.1f} of {stats['bytes_limit'] / 2**30:.1f} GiB free"))
    rows += _machine()
    try:
        mesh = make_mesh(asked.mesh)
        fit = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        least = mesh.shape["data"] * mesh.shape["fsdp"]
        rows.append(("mesh", f"{fit}; train.batch_size must be a multiple of {least} x train.accumulate"))
    finally:
        _print(rows)
    return DONE


def _version(package: str, module: str) -> str | None:
    """Of a package that is installed and can be found by an import, without importing it."""
    try:
        there = importlib.util.find_spec(module) is not None
    except ImportError:
        there = False
    return _installed(package) if there else None


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> list[tuple[str, str]]:
    disk = shutil.disk_usage(Path.cwd())
    here = f"{disk.free / 2**30:.1f} of {disk.total / 2**30:.1f} GiB free"
    return [("host memory", _host_memory()), ("disk here", here)]


def _host_memory() -> str:
    sizes = _memory()
    return f"{sizes['MemAvailable'] / 2**30:.1f} of {sizes['MemTotal'] / 2**30:.1f} GiB free" if sizes else "unknown"


def _memory() -> dict[str, int]:
    """Bytes of host memory by what they are, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 2**10 for line in lines}


def _print(rows: list[tuple[str, str]]) -> None:
    print("lm doctor")
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")
