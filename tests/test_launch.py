"""The scripts of scripts/launch, without the clouds they speak to."""

import math
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from lm import config as configs
from lm.commands.exits import MISTAKE
from lm.commands.shared import launched
from lm.commands.train import TrainArguments

REPOSITORY = Path(__file__).parent.parent
LAUNCH = REPOSITORY / "scripts" / "launch"
SCRIPTS = [*sorted(REPOSITORY.joinpath("scripts").rglob("*.sh")), LAUNCH / "slurm.sbatch"]

# A gcloud that writes down what it was asked and keeps the state of one request in a file: none, then those in `next`.
GCLOUD = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >> "$FAKE/asked"
case "$*" in
*queued-resources\ describe*)
  [ -e "$FAKE/state" ] || exit 1
  cat "$FAKE/state"
  if [ -s "$FAKE/next" ]; then head -n 1 "$FAKE/next" > "$FAKE/state"; sed -i 1d "$FAKE/next"; fi
  ;;
*queued-resources\ create*) echo WAITING_FOR_RESOURCES > "$FAKE/state" ;;
*queued-resources\ delete*) rm -f "$FAKE/state" ;;
*tpu-vm\ scp*) cp "$5" "$FAKE/archive.tar.gz" ;;
esac
"""


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.parent.mkdir()
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    return tmp_path


def pod(cloud: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{cloud / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(LAUNCH / "tpu_pod.sh"), *arguments],
        env={**os.environ, "PATH": path, "FAKE": str(cloud), "PAUSE": "0", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def asked(cloud: Path) -> list[str]:
    """What gcloud was asked, questions about the state left out."""
    lines = (cloud / "asked").read_text().splitlines()
    return [line.removeprefix("compute tpus ") for line in lines if "describe" not in line]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_checked(path: Path) -> None:
    program = shutil.which("shellcheck", path=f"{REPOSITORY / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("needs shellcheck: pip install -e .[test]")
    # SC2329: functions that a trap alone calls.
    options = ["--external-sources", "--source-path=SCRIPTDIR", "--exclude=SC2329"]
    done = subprocess.run([program, *options, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_slice_is_asked_for_and_set_up(cloud: Path) -> None:
    (cloud / "next").write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    done = pod(cloud, "up", "mine", TYPE="v5e-16", ZONE="us-west4-a", SPOT="1")
    assert done.returncode == 0, done.stderr
    create, copy, install = asked(cloud)
    assert create.startswith("queued-resources create mine --node-id=mine --accelerator-type=v5e-16")
    assert create.endswith("--spot --zone us-west4-a --quiet")
    assert "mine: PROVISIONING" in done.stdout
    assert copy.endswith("mine: --zone us-west4-a --quiet --worker=all")
    assert "--worker=all" in install
    with tarfile.open(cloud / "archive.tar.gz") as archive:
        assert {"lm/scripts/launch/train.sh", "lm/requirements.txt"} <= set(archive.getnames())


def test_a_slice_that_is_there_is_taken(cloud: Path) -> None:
    (cloud / "state").write_text("ACTIVE\n")
    assert pod(cloud, "up", "mine").returncode == 0
    assert not [line for line in asked(cloud) if "create" in line or "delete" in line]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_a_slice_that_was_taken_away_is_asked_for_anew(cloud: Path, state: str) -> None:
    (cloud / "state").write_text(f"{state}\n")
    (cloud / "next").write_text(f"{state}\nACTIVE\nACTIVE\n")
    assert pod(cloud, "up", "mine").returncode == 0
    assert [line.split()[1] for line in asked(cloud)[:2]] == ["delete", "create"]


def test_a_request_that_comes_to_nothing_is_told(cloud: Path) -> None:
    (cloud / "next").write_text("PROVISIONING\nFAILED\nFAILED\n")
    done = pod(cloud, "up", "mine")
    assert done.returncode == 1
    assert "came to nothing: FAILED; run this again" in done.stderr


def test_all_hosts_train_with_the_words_as_they_were_given(cloud: Path) -> None:
    rates = "--optim.rates", "classifier/.*=1", ".*=0"
    assert pod(cloud, "train", "mine", "configs/llama_7b.py", "/mnt/runs/a b", *rates).returncode == 0
    (line,) = asked(cloud)
    assert "tpu-vm ssh mine" in line
    assert "--worker=all" in line
    command = line.partition("--command=")[2].partition("nohup ")[2].partition(">>")[0]
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    assert words.stdout.splitlines() == [
        "bash",
        "scripts/launch/tpu_host.sh",
        "configs/llama_7b.py",
        "/mnt/runs/a b",
        *rates,
    ]


def test_logs_stop_and_down(cloud: Path) -> None:
    for what in ("logs", "stop", "down"):
        assert pod(cloud, what, "mine").returncode == 0
    logs, stop, down = asked(cloud)
    assert "--worker=0" in logs
    assert "pkill -TERM" in stop
    assert down.startswith("queued-resources delete mine --force")


@pytest.mark.parametrize("arguments", [(), ("up",), ("fly", "mine"), ("train", "mine", "config.py")])
def test_what_is_not_understood_is_answered_with_the_usage(cloud: Path, arguments: tuple[str, ...]) -> None:
    done = pod(cloud, *arguments)
    assert done.returncode == 2
    assert "tpu_pod.sh up NAME" in done.stderr
    assert not (cloud / "asked").exists()


def written(folder: Path) -> Path:
    """A program that writes down its arguments, a line each, in place of `lm`."""
    program = folder / "lm"
    program.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$(dirname "$0")/words"\n')
    program.chmod(0o755)
    return program


def train_arguments(words: list[str], repository: str = str(REPOSITORY)) -> TrainArguments:
    """What `lm` makes of `train CONFIG.py …`; the config lies in `repository`, which stands for this one."""
    assert words[0] == "train"
    path = Path(words[1].replace(repository, str(REPOSITORY), 1))
    default = TrainArguments(experiment=configs.load_file(path))
    return configs.parse(TrainArguments, default, words[2:], prog="lm train")


ENDPOINTS = {"names": "a:0:10.0.0.5,b:1:10.0.0.6,c:2:10.0.0.7", "addresses": "10.0.0.5,10.0.0.6,10.0.0.7"}


@pytest.mark.parametrize("form", ENDPOINTS)
@pytest.mark.parametrize("waiting", [False, True])
def test_a_host_of_a_slice_learns_from_the_metadata_who_it_is(cloud: Path, form: str, waiting: bool) -> None:
    curl = cloud / "bin" / "curl"
    curl.write_text(
        '#!/usr/bin/env bash\ncase "${*: -1}" in\n'
        f"*/instance/attributes/agent-worker-number) echo 2 ;;\n"
        f"*/instance/attributes/worker-network-endpoints) echo {ENDPOINTS[form]} ;;\n*) exit 22 ;;\nesac\n"
    )
    curl.chmod(0o755)
    words = ["configs/quickstart.py", str(cloud / "a run"), "--optim.peak-lr", "1e-3"]
    words += ["--", "--cluster.wait", "900"] if waiting else []
    path = f"{cloud / 'bin'}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["bash", str(LAUNCH / "tpu_host.sh"), *words],
        env={**os.environ, "PATH": path, "LM": str(written(cloud))},
        cwd=REPOSITORY,
        check=True,
        timeout=60,
    )
    asked = train_arguments((cloud / "words").read_text().splitlines())
    assert asked.run == cloud / "a run"
    assert asked.experiment.optim.peak_lr == 1e-3
    cluster = asked.cluster
    assert (cluster.coordinator, cluster.processes, cluster.process) == ("10.0.0.5:8476", 3, 2)
    assert cluster.wait == (900 if waiting else 300)


def test_a_host_without_metadata_does_not_train_alone(cloud: Path) -> None:
    curl = cloud / "bin" / "curl"
    curl.write_text("#!/usr/bin/env bash\nexit 6\n")
    curl.chmod(0o755)
    path = f"{cloud / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(LAUNCH / "tpu_host.sh"), "configs/quickstart.py", "run"]
    environment = {**os.environ, "PATH": path, "LM": str(written(cloud))}
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == 6
    assert not (cloud / "words").exists()


def jobset(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A file for GKE: the JobSet, its one replicated job, and the container of that."""
    found = yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = found["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return found, job, container


@pytest.mark.parametrize("name", ["gke_jobset.yaml", "gke_jobset_gpu.yaml"])
def test_a_jobset_trains_with_words_that_lm_understands(name: str, tmp_path: Path) -> None:
    found, job, container = jobset(name)
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    # The image's own program, on a pod that Kubernetes counts.
    program = instructions()["ENTRYPOINT"][0]
    assert "command" not in container
    variables = {entry["name"]: entry.get("value", "3") for entry in container["env"]}
    arguments = [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], word) for word in container["args"]]
    assert program == '["bash", "/lm/scripts/launch/train.sh"]'
    arguments[0] = arguments[0].replace("/lm/", f"{REPOSITORY}/", 1)
    arguments[1] = str(tmp_path / "run")
    environment = {**os.environ, **variables, "LM": str(written(tmp_path))}
    subprocess.run(["bash", str(LAUNCH / "train.sh"), *arguments], env=environment, check=True, timeout=60)
    asked = train_arguments((tmp_path / "words").read_text().splitlines())
    assert spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"
    assert launched({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"})
    if asked.cluster.coordinator is None:
        assert asked.cluster.launcher == "auto"
        shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        chips = math.prod(map(int, shape.split("x")))
        assert chips == spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    else:
        own = found["metadata"]["name"]
        assert asked.cluster.coordinator.split(":")[0] == f"{own}-{job['name']}-0-0.{own}"
        assert (asked.cluster.processes, asked.cluster.process) == (spec["parallelism"], 3)
    # What it writes lies on the volume that all pods share, which stands where it is mounted.
    (volume,) = (mount for mount in container["volumeMounts"] if mount["name"] == "lm")
    for path in (container["args"][1], container["workingDir"], variables["JAX_COMPILATION_CACHE_DIR"]):
        assert Path(path).is_relative_to(volume["mountPath"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", ["gke_jobset.yaml", "gke_jobset_gpu.yaml"])
def test_a_jobset_begins_anew_but_not_after_a_mistake(name: str) -> None:
    found, job, container = jobset(name)
    spec = job["template"]["spec"]
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert spec["backoffLimit"] == 0
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [MISTAKE]}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # without which there may be no such policy
    used = set(re.findall(r"\$\{(\w+):-", (LAUNCH / "train.sh").read_text()))
    assert "RETRIES" in used & {entry["name"] for entry in container["env"]}


CONTAINER = REPOSITORY / "scripts" / "container"


def instructions() -> dict[str, list[str]]:
    """What the Dockerfile says, by instruction; in order."""
    text = (CONTAINER / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            word, _, rest = line.partition(" ")
            found.setdefault(word, []).append(rest.strip())
    return found


def test_the_image_is_made_of_what_is_there() -> None:
    told = instructions()
    assert set(told) == {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT"}
    copied = [shlex.split(line) for line in told["COPY"]]
    for *sources, _ in copied:
        assert all((REPOSITORY / source).exists() for source in sources), sources
    ignored = (CONTAINER / "Dockerfile.dockerignore").read_text().splitlines()
    assert not {source.split("/")[0] for *sources, _ in copied for source in sources} & set(ignored)
    (base,), (folder,), (entry,) = told["FROM"], told["WORKDIR"], told["ENTRYPOINT"]
    version = base.removeprefix("python:").removesuffix("-slim")
    assert (REPOSITORY / "requirements" / f"py{version}.txt").exists()
    script = Path(yaml.safe_load(entry)[1])
    assert (REPOSITORY / script.relative_to(folder)).exists()
    assert "scripts" in {words[0] for words in copied}


def test_the_image_installs_extras_that_exist() -> None:
    told = instructions()
    defaults = dict(line.split("=") for line in told["ARG"])
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(defaults["EXTRAS"].split(",")) <= set(project["project"]["optional-dependencies"])
    text = (CONTAINER / "Dockerfile").read_text(encoding="utf-8")
    asked = set(re.findall(r"ACCELERATOR=(\w+)", text))
    for path in LAUNCH.glob("*.yaml"):
        asked |= set(re.findall(r"ACCELERATOR=(\w+)", path.read_text(encoding="utf-8")))
    assert asked == {"cuda12", "tpu"}
    assert asked | {"cuda13"} <= set(metadata.metadata("jax").get_all("Provides-Extra") or [])
    (command,) = told["RUN"]
    words = shlex.split(command)
    assert words[words.index("--constraint") + 1] == "requirements/py3.12.txt"
    assert words[-2:] == [".[$EXTRAS]", "jax[$ACCELERATOR]"]
    # What the build of the package reads is there when it is built.
    before = " ".join(line for line in text.partition("RUN")[0].splitlines() if line.startswith("COPY"))
    dynamic = project["tool"]["setuptools"]["dynamic"]
    read = {*dynamic["dependencies"]["file"], project["project"]["readme"], "pyproject.toml", "lm/__init__.py"}
    assert all(name in before.split() for name in read)
    assert dynamic["version"]["attr"] == "lm.__version__"
