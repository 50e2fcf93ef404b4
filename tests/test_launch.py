"""The scripts of scripts/launch, without the clouds they speak to."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

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
        "scripts/launch/train.sh",
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
