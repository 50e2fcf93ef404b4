"""Imports go downhill: a module imports from its own level or lower ones, and in no circle (docs/architecture.md)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = {
    "lm.tree": 0,
    "lm.losses": 0,
    "lm.metrics": 0,
    "lm.sharding": 0,
    "lm.hardware": 0,
    "lm.errors": 0,
    "lm.cluster": 0,
    "lm.records": 0,
    "lm.text": 1,
    "lm.data": 2,
    "lm.models": 2,
    "lm.optim": 2,
    "lm.checkpoint": 2,
    "lm.peft": 3,
    "lm.compress": 3,
    "lm.generate": 3,
    "lm.hf": 3,
    "lm.interpret": 3,
    "lm.vocabulary": 3,
    "lm.tasks": 4,
    "lm.evaluate": 5,
    "lm.train": 5,
    "lm.loop": 5,
    "lm.config": 6,
    "lm.run": 7,
    "lm.judge": 7,
    "lm.equality": 7,
    "lm.console": 7,
    "lm.plots": 7,
    "lm.plan": 7,
    "lm.sweep": 7,
    "lm.compare": 7,
    "lm.report": 7,
    "lm.commands": 8,
    "lm.cli": 8,
    "lm.__main__": 8,
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted((ROOT / "lm").rglob("*.py"))}


def room(module: str) -> str:
    """`lm.data.store` lives in `lm.data`."""
    return ".".join(module.split(".")[:2])


def imports_of(module: str) -> set[str]:
    """The modules of `lm` that a module names in an import, anywhere in it, but for types only."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name and name != module:
                found.add(name)
    return found


IMPORTS = {module: imports_of(module) for module in MODULES}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "lm"])
def test_module_has_a_level_and_imports_nothing_above_it(module):
    assert room(module) in LEVELS, f"give {room(module)} a level here and in docs/architecture.md"
    above = {name for name in IMPORTS[module] - {"lm"} if LEVELS[room(name)] > LEVELS[room(module)]}
    assert not above, f"{module} is on level {LEVELS[room(module)]}"


def test_the_package_itself_imports_nothing():
    assert not IMPORTS["lm"]


def test_no_module_imports_itself_through_others():
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for name in sorted(IMPORTS[module]):
                walk(name, (*way, module))
            done.add(module)

    for module in MODULES:
        walk(module, ())


def test_packages_have_an_init():
    folders = {path.parent for path in (ROOT / "lm").rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_the_document_says_the_same():
    """Every room that stands is in the table of docs/architecture.md, on the level it has here."""
    table = re.findall(
        r"^\| (\d) \| (.*?) \|", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    said = {f"lm.{name}": int(level) for level, rooms in table for name in re.findall(r"`lm/(\w+)", rooms)}
    built = {room(module) for module in MODULES if module != "lm"}
    assert {name: said.get(name) for name in built} == {name: LEVELS[name] for name in built}


# The parser of overrides, what a run writes down of its surroundings, and the flags of XLA that ours give way to.
ALLOWED = {"lm.config": {"tyro.cli"}, "lm.records": {"os.environ", "sys.argv"}, "lm.hardware": {"os.environ"}}


@pytest.mark.parametrize("module", [name for name in MODULES if LEVELS.get(room(name), 8) < 8 and name != "lm"])
def test_below_the_command_line_nothing_is_printed_parsed_or_read_from_the_environment(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    forbidden = {"print", "input", "argparse.ArgumentParser", "tyro.cli", "os.getenv", "os.environ", "sys.argv"}
    assert (calls | names) & forbidden <= ALLOWED.get(module, set())
