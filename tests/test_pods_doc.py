"""docs/pods.md: its commands run, as far as they can without a cloud, and the lines that it explains are ours."""

import ast
import mmap
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import jaxlib
import pytest
import yaml
from test_launch import ENDPOINTS, instructions, train_arguments

from lm import cli, cluster
from lm.commands import check_mesh
from lm.commands.exits import DONE, FAILED, MISTAKE, PREEMPTED

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines() if line]

# Programs that write down what they were asked; what they read is kept, and srun starts what it is given.
STAND_IN = r"""#!/usr/bin/env bash
name=$(basename "$0")
line=$(printf ' %q' "$@")
printf '%s\n' "$name$line" >> "$FAKE/asked"
case "$name $*" in
lm\ *) echo "$XLA_FLAGS" > "$FAKE/flags" ;;
kubectl\ *) cat > "$FAKE/applied.yaml" ;;
sbatch\ *) shift 4; SLURM_JOB_ID=1 SLURM_SUBMIT_DIR=$PWD bash "$@" ;;
srun\ *) shift; "$@" ;;
*queued-resources\ describe*) cat "$FAKE/state" 2>/dev/null || exit 1 ;;
*queued-resources\ create*) echo ACTIVE > "$FAKE/state" ;;
*tpu-vm\ ssh*nohup*) eval "$(printf '%s\n' "$@" | sed -n 's/^--command=cd lm && nohup //p' | sed 's/>>.*//')" ;;
esac
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A copy of the repository's scripts and configs, with programs that stand in for those of clouds, and for lm."""
    for name in ("configs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("lm", "sbatch", "srun", "scontrol", "scancel", "gcloud", "docker", "kubectl"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    (programs / "curl").write_text(
        '#!/usr/bin/env bash\ncase "${*: -1}" in\n*/agent-worker-number) echo 1 ;;\n'
        f"*/worker-network-endpoints) echo {ENDPOINTS['addresses']} ;;\n*) exit 22 ;;\nesac\n"
    )
    (programs / "curl").chmod(0o755)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *who, "commit", "-q", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    return tmp_path


def type_in(place: Path, line: str) -> list[list[str]]:
    """What the stand-ins were asked when a line of the page was typed into a shell."""
    (place / "asked").unlink(missing_ok=True)
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name not in ("LM", "XLA_FLAGS")}
    environment |= {"PATH": path, "FAKE": str(place), "PAUSE": "0"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=place,
        env=environment,
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (line, done.stderr)
    asked = place / "asked"
    return [shlex.split(call) for call in asked.read_text().splitlines()] if asked.exists() else []


def test_every_command_is_one_that_this_test_knows(place: Path):
    """Typed in order; each `lm train` that comes of it has words that lm understands."""
    programs, trained = set(), []
    for line in COMMANDS:
        calls = type_in(place, line)
        assert calls, line
        programs |= {call[0] for call in calls}
        trained += [(line, call[1:]) for call in calls if call[:2] == ["lm", "train"]]
        for call in calls:
            if call[0] == "docker" and call[1] == "build":
                words = call[1:]
                assert (place / words[words.index("--file") + 1]).exists()
                name, _, value = words[words.index("--build-arg") + 1].partition("=")
                assert name in {line.partition("=")[0] for line in instructions()["ARG"]}
                assert value in ("tpu", "cuda12", "cuda13")
                assert "REGISTRY/lm:tpu" in words
    assert programs == {"lm", "sbatch", "srun", "gcloud", "docker", "kubectl"}
    runs = {}
    for line, words in trained:
        asked = train_arguments(words)
        launcher = next((word.split("/")[-1] for word in shlex.split(line) if "scripts/launch" in word), "lm")
        runs.setdefault(launcher, []).append((str(asked.run), asked.cluster))
    assert set(runs) == {"local_processes.sh", "slurm.sbatch", "tpu_pod.sh", "lm"}
    assert sorted(cluster.process for _, cluster in runs["local_processes.sh"]) == [0, 1]
    assert runs["slurm.sbatch"][0][0] == "/shared/runs/llama_7b"
    ((path, cluster),) = runs["tpu_pod.sh"]
    assert (path, cluster.process, cluster.processes) == ("/mnt/lm/runs/llama_7b", 1, 3)
    assert (place / "flags").read_text().strip().startswith("--xla_gpu_enable_latency_hiding_scheduler=")
    applied = yaml.safe_load((place / "applied.yaml").read_text())
    (job,) = applied["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["template"]["spec"]["containers"][0]["image"] == "REGISTRY/lm:tpu"


def test_what_is_to_be_checked_first_can_be(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    plan, doctor = (shlex.split(line)[1:] for line in COMMANDS if line.startswith(("lm plan", "lm doctor")))
    assert cli.main(plan) == 0
    assert "fits" in capsys.readouterr().out
    # Which compares models for a while: tests/test_check_mesh.py; here, that its words are understood.
    at = doctor.index("--check-mesh")
    asked = []
    monkeypatch.setattr(check_mesh, "run", lambda path, words, *_: asked.append((path, words)) or 0)
    assert cli.main(doctor) == 0
    assert asked == [(Path(doctor[at + 1]), doctor[1:at] + doctor[at + 2 :])]


def test_statuses_are_those_of_the_program():
    rows = re.findall(r"^\| ([^|]*) \| [^|]* \| (\d+) \| [^|]* \|$", PAGE, re.M)
    status = {what: int(number) for what, number in rows}
    assert status["it is done"] == DONE
    assert status["a mistake in what was asked for"] == MISTAKE
    assert next(number for what, number in status.items() if "SIGTERM" in what) == PREEMPTED
    assert next(number for what, number in status.items() if "killed" in what) == FAILED
    script = (ROOT / "scripts" / "launch" / "train.sh").read_text()
    for name, default in re.findall(r"`(RETRIES|PAUSE)` (?:times|seconds) \((\d+)\)", PAGE):
        assert f"${{{name}:-{default}}}" in script


def templates() -> list[str]:
    """Every text of our code and scripts as a pattern: what is put in may be anything."""
    found = []
    for path in sorted((ROOT / "lm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[gsd]", ".*", re.escape(node.value)))
    for path in (ROOT / "scripts" / "launch").glob("*.sh"):
        for text in re.findall(r'echo "(.*?)"(?: >&2)?$', path.read_text(encoding="utf-8"), re.M):
            found.append(".*".join(map(re.escape, re.split(r"\$\(\(.*?\)\)|\$\w+", text))))
    return [pattern for pattern in found if len(pattern.replace(".*", "")) >= 12]


TABLE = PAGE.partition("## Lines you may see")[2]
CELLS = re.findall(r"^\| (?:`([^`]+)`|``(.*?)``) \| ", TABLE, re.M)
LINES = [single or double.strip() for single, double in CELLS]


@pytest.fixture(scope="module")
def known() -> list[str]:
    return templates()


def is_written(line: str, known: list[str]) -> bool:
    """Whether a line is a text of ours with its gaps filled in; `lm:` in front may be left out."""
    return any(re.fullmatch(pattern, f"{begin}{line}") for pattern in known for begin in ("", "lm: "))


@pytest.mark.parametrize("line", LINES)
def test_every_line_explained_is_one_that_is_written(line: str, known: list[str]):
    assert is_written(line, known)


def test_a_line_that_nobody_writes_would_be_told(known: list[str]):
    for line in ("5 of 4 processes came, and nobody waits", "process 1 was begun with cluster.processes 3, and …"):
        assert not is_written(line, known)
    assert len(LINES) >= 15


def test_a_line_that_is_not_ours_is_one_of_jax():
    (line,) = re.findall(r"`(\[Gloo\][^`]*)`", TABLE)
    words = re.split(r"\d+", line.partition("…")[0])
    (path,) = Path(jaxlib.__file__).parent.glob("libjax_common.*")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as program:
        assert program.find(words[0].encode() + b"\0") >= 0
        assert program.find(words[1].encode() + b"\0") >= 0
        assert program.find(words[-1].strip(" .").encode()) >= 0


def test_what_all_processes_must_share_is_said():
    checks = PAGE.partition("## What start-up checks")[2].partition("\n## ")[0]
    for item in ("run's folder is one and the same for all", "the same for all (text and tokenizer"):
        assert item in checks
    seconds = cluster.SEEN_WITHIN
    assert "within a minute" in checks
    assert seconds == 60
    happens = PAGE.partition("## What happens when")[2].partition("\n## ")[0]
    assert "one that fails ends all of them" in happens


def test_what_the_page_says_of_slurm_is_what_the_script_does():
    script = (ROOT / "scripts" / "launch" / "slurm.sbatch").read_text()
    assert "SLURM sends the script a SIGUSR1" in PAGE
    assert "#SBATCH --signal=B:USR1@300" in script  # five minutes


def test_links_lead_somewhere():
    headings = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in re.findall(r"^## (.*)$", PAGE, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        path, _, heading = target.partition("#")
        assert (ROOT / "docs" / path).exists()
        assert not heading or path or heading in headings
    for path in re.findall(r"`((?:scripts|tests|lm)/[\w/.]+\.\w+)`", PAGE):
        assert (ROOT / path).exists(), path
