"""The scripts of scripts/launch, without the clouds they speak to."""

import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import time
import tomllib
from collections.abc import Iterator
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


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ((), "an action and a NAME are wanted:"),
        (("up",), "an action and a NAME are wanted:"),
        (("fly", "mine"), "unknown action 'fly'; there are up, train, logs, stop and down:"),
        (("train", "mine", "config.py"), "'train mine' wants CONFIG.py and RUN:"),
    ],
)
def test_what_is_not_understood_is_answered_with_the_usage(cloud: Path, arguments: tuple[str, ...], wrong: str) -> None:
    done = pod(cloud, *arguments)
    assert done.returncode == 2
    told = done.stderr.splitlines()
    assert told[0] == wrong
    assert "tpu_pod.sh up NAME" in done.stderr
    assert told[-1].endswith(".")  # whole sentences
    assert not any(line.startswith(("#", "set ")) for line in told)
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


def program(path: Path, text: str) -> Path:
    """A script in place of a program."""
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)
    return path


def until(path: Path, lines: int = 1) -> None:
    """Waits until a file has so many lines."""
    deadline = time.monotonic() + 20
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < deadline, f"{path} has not {lines} lines"
        time.sleep(0.02)


# A run that says that it began, and ends with 75 some time after a SIGTERM, of which it keeps count.
SAVING = """trap 'echo told >> "$FAKE/told"; sleep 0.3; echo saved >> "$FAKE/saved"; exit 75' TERM
echo "$$" >> "$FAKE/began"
sleep 20 &
wait
"""
# Its task is a group of its own, which the signal of scancel goes to, as to every process of a step, unless that is for
# the batch script. One that is told itself kills its task, as srun may.
SRUN = """shift
setsid "$@" &
task=$!
trap 'kill -KILL -- "-$task"' TERM INT
echo "$task" > "$FAKE/task"
wait "$task"
"""
SCANCEL = """echo "$*" >> "$FAKE/cancelled"
case "$*" in
*--batch*) kill -TERM "$PPID" ;;
"--signal=TERM 7") kill -TERM -- "-$(cat "$FAKE/task")" ;;
esac
"""


@pytest.mark.parametrize(
    ("signals", "queued"),
    [([signal.SIGUSR1], True), ([signal.SIGUSR1] * 2, True), ([signal.SIGTERM], False)],
    ids=["its time is up", "told twice", "cancelled"],
)
def test_a_slurm_job_saves_and_goes_into_the_queue_again(
    tmp_path: Path, signals: list[signal.Signals], queued: bool
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    program(programs / "srun", SRUN)
    program(programs / "scancel", SCANCEL)
    program(programs / "scontrol", 'echo "$*" >> "$FAKE/controlled"\n')
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "FAKE": str(tmp_path),
        "LM": str(program(tmp_path / "lm", SAVING)),
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "PAUSE": "0",
    }
    job = subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch"), "config.py", str(tmp_path / "run")], env=environment)
    try:
        until(tmp_path / "began")
        until(tmp_path / "task")
        for number in signals:
            job.send_signal(number)
            until(tmp_path / "told")
        assert job.wait(timeout=20) == 75
    finally:
        job.kill()
    assert (tmp_path / "cancelled").read_text() == "--signal=TERM 7\n"
    assert (tmp_path / "saved").exists()
    assert len((tmp_path / "began").read_text().splitlines()) == 1
    assert (tmp_path / "controlled").exists() == queued
    if queued:
        assert (tmp_path / "controlled").read_text() == "requeue 7\n"


def test_slurm_sends_the_signal_that_the_script_waits_for() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    (name,) = re.findall(r"^#SBATCH --signal=B:(\w+)@300$", text, re.M)
    assert f"trap 'pass_on {name}' {name}" in text
    assert name != "TERM"  # which is what a cancelled job gets


def test_a_slurm_job_that_ends_by_itself_keeps_its_status(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    program(programs / "srun", 'shift\n"$@"\n')
    program(programs / "scontrol", 'echo "$*" >> "$FAKE/controlled"\n')
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "FAKE": str(tmp_path),
        "LM": str(program(tmp_path / "lm", "exit 2\n")),
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
    }
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "config.py", str(tmp_path / "run")]
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == 2
    assert not (tmp_path / "controlled").exists()


@contextlib.contextmanager
def train(
    folder: Path, text: str, *words: str, script: str = "train.sh", **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """A script of ours begun with a program in place of `lm`; at the end it is killed, should it be there still."""
    command = ["bash", str(LAUNCH / script), *words]
    environment = {**os.environ, "FAKE": str(folder), "LM": str(program(folder / "lm", text)), **environment}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as begun:
        try:
            yield begun
        finally:
            begun.kill()


def test_a_signal_between_two_attempts_is_not_lost(tmp_path: Path) -> None:
    began = time.monotonic()
    with train(tmp_path, 'echo x >> "$FAKE/began"; exit 9\n', "config.py", str(tmp_path / "run"), PAUSE="10") as script:
        assert script.stderr is not None
        assert script.stderr.readline() == "attempt 1 ended with status 9\n"
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=20) == 9
        assert script.stderr.read() == ""
    assert time.monotonic() - began < 8
    assert (tmp_path / "began").read_text() == "x\n"


def test_a_signal_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    with train(tmp_path, SAVING, "config.py", str(tmp_path / "run")) as script:
        until(tmp_path / "began")
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=20) == 75
    assert (tmp_path / "saved").read_text() == "saved\n"
    assert (tmp_path / "began").read_text().count("\n") == 1


@pytest.mark.parametrize("retries", ["0", "2", "08"])
def test_attempts_are_as_many_as_asked_for(tmp_path: Path, retries: str) -> None:
    words = "config.py", str(tmp_path / "run")
    with train(tmp_path, 'echo x >> "$FAKE/began"; exit 9\n', *words, RETRIES=retries, PAUSE="0.0") as script:
        _, told = script.communicate(timeout=20)
    assert script.returncode == 9
    assert (tmp_path / "began").read_text().count("x") == int(retries) + 1
    assert told.splitlines()[-1] == f"given up after {int(retries) + 1} attempts"


@pytest.mark.parametrize("variable", ["RETRIES", "PAUSE"])
@pytest.mark.parametrize("value", ["x", "-1", "1 2", "1e3"])
def test_retries_and_pause_are_numbers(tmp_path: Path, variable: str, value: str) -> None:
    with train(tmp_path, 'echo x >> "$FAKE/began"; exit 9\n', "a", str(tmp_path / "b"), **{variable: value}) as script:
        _, told = script.communicate(timeout=20)
    assert script.returncode == 2
    (line,) = told.splitlines()
    assert line.startswith(f"{variable} is '{value}', not a number")
    assert not (tmp_path / "began").exists()


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5", ""])
def test_several_processes_are_one_or_more(tmp_path: Path, count: str) -> None:
    words = count, "config.py", str(tmp_path / "run")
    with train(tmp_path, 'echo x >> "$FAKE/began"\n', *words, script="local_processes.sh") as script:
        _, told = script.communicate(timeout=20)
    assert script.returncode == 2
    assert told == f"N is '{count}', not a number of processes; give 1 or more\n"
    assert not (tmp_path / "began").exists()


@pytest.mark.parametrize("waiting", [False, True])
def test_several_processes_take_cluster_options(tmp_path: Path, waiting: bool) -> None:
    words = ["2", "configs/quickstart.py", str(tmp_path / "a run"), "--train.steps", "100"]
    words += ["--", "--cluster.wait", "900"] if waiting else []
    note = 'printf "%s\\n" "$@" > "$FAKE/words.${*: -1}"\n'
    with train(tmp_path, note, *words, script="local_processes.sh") as script:
        script.communicate(timeout=20)
    assert script.returncode == 0
    for process in range(2):
        asked = train_arguments((tmp_path / f"words.{process}").read_text().splitlines())
        assert (asked.run, asked.experiment.train.steps) == (tmp_path / "a run", 100)
        assert (asked.cluster.processes, asked.cluster.process) == (2, process)
        assert asked.cluster.wait == (900 if waiting else 300)


def test_several_processes_stop_together(tmp_path: Path) -> None:
    words = "2", "config.py", str(tmp_path / "run")
    with train(tmp_path, SAVING, *words, script="local_processes.sh") as script:
        until(tmp_path / "began", 2)
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=20) == 75
    assert (tmp_path / "saved").read_text() == "saved\nsaved\n"


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
