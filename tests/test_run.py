"""Runs that stop and go on: the same run, to the bit, and nothing written by one that can't."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small_runs as small

from lm import config as configs
from lm import run as runs
from lm.config import Experiment
from lm.errors import UserError
from lm.loop import TrainingHaltedError
from lm.records import RunDirectory
from lm.sharding import MeshConfig, make_mesh

HARD = {  # everything that could carry state from one step to the next
    "data": {"packing": "documents"},
    "model": {"embedding_dropout": 0.1, "residual_dropout": 0.1},
    "train": {"accumulate": 2, "ema_decay": 0.9, "patience": 20, "eval_every": 3, "save_every": 2, "log_every": 2},
}


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, marks=pytest.mark.slow), HARD],
    ids=["plain", "dropout, packing, accumulation, average"],
)
def test_stopped_and_resumed_is_the_straight_run(tmp_path: Path, changes: dict):
    settings = small.experiment(tmp_path, **changes)
    assert small.start(settings, tmp_path / "straight").state == "finished"
    # 3 is a step of evaluation and saving, 1 and 4 are neither (with HARD, 4 is one of saving alone).
    for name, stops in {"once": (4,), "at evaluation": (3,), "twice": (1, 4), "twice, at once": (3, 4)}.items():
        assert small.train_in_parts(settings, tmp_path / name, *stops).state == "finished"
        small.assert_same_run(tmp_path / "straight", tmp_path / name)


def test_early_stopping_ends_the_same_run_at_the_same_step(tmp_path: Path):
    # A rate this low makes nothing better than the first evaluation for long; one this high makes it worse.
    settings = small.experiment(
        tmp_path,
        optim={"peak_lr": 0.5, "schedule": "constant", "warmup": 0.0},
        train={"steps": 40, "eval_every": 1, "save_every": 4, "patience": 3},
    )
    outcome = small.start(settings, tmp_path / "straight")
    assert outcome.state == "finished"
    assert "no better validation loss in 3 evaluations" in outcome.reason
    assert 4 <= outcome.step < 40
    end = outcome.step
    best = json.loads((tmp_path / "straight/best.json").read_text())
    assert best["step"] == end - 3
    for name, stops in {"while waiting": (end - 1,), "at the best": (end - 3, end - 2)}.items():
        again = small.train_in_parts(settings, tmp_path / name, *stops)
        assert (again.state, again.step, again.reason) == (outcome.state, outcome.step, outcome.reason)
        small.assert_same_run(tmp_path / "straight", tmp_path / name)
    # Killed after the last checkpoint, before the status said so: there is nothing left to train.
    before = small.state(tmp_path / "straight")
    RunDirectory(tmp_path / "straight").set_status("running")
    again = small.resume(tmp_path / "straight")
    assert (again.step, again.reason) == (end, outcome.reason)
    assert small.checkpoint_steps(tmp_path / "straight")[-1] == end
    assert all((before[name] == value).all() for name, value in small.state(tmp_path / "straight").items())


def test_the_best_may_be_that_of_another_metric(tmp_path: Path):
    """Which checkpoint is kept and loaded, and when patience is at its end; of equals the first."""
    settings = small.experiment(
        tmp_path,
        optim={"peak_lr": 0.05, "schedule": "constant", "warmup": 0.0},
        train={"steps": 30, "eval_every": 1, "save_every": 4, "patience": 3, "best": "accuracy"},
    )
    outcome = small.start(settings, tmp_path / "straight")
    held_out = [record for record in small.metrics(tmp_path / "straight") if record["split"] == "validation"]
    values = [record["accuracy"] for record in held_out]
    step = 1 + int(np.argmax(values))
    assert outcome.reason == "no better validation accuracy in 3 evaluations"
    assert outcome.step == len(values) == step + 3
    losses = [record["loss"] for record in held_out]
    assert step != 1 + int(np.argmin(losses)), "by the loss another would be the best"
    best = json.loads((tmp_path / "straight/best.json").read_text())
    assert best == {"step": step, "metric": "accuracy", "value": max(values)}
    mesh = make_mesh(MeshConfig(devices=1))
    assert runs.load(tmp_path / "straight", mesh).step == step
    assert small.train_in_parts(settings, tmp_path / "parts", step, step + 2).reason == outcome.reason
    small.assert_same_run(tmp_path / "straight", tmp_path / "parts")


def test_a_run_of_before_there_was_another_metric_goes_on(tmp_path: Path):
    settings = small.experiment(tmp_path, train={"patience": 5, "eval_every": 1})
    small.start(settings, tmp_path / "straight")
    small.start(settings, tmp_path / "old", stop_at=4)
    written = tmp_path / "old" / "checkpoints" / "4" / "extra" / "metadata"
    written.write_text(written.read_text().replace('"best_value"', '"best_loss"'))
    assert "best_loss" in written.read_text()
    small.resume(tmp_path / "old")
    small.assert_same_run(tmp_path / "straight", tmp_path / "old")


def test_what_a_killed_run_wrote_after_its_checkpoint_is_written_again(tmp_path: Path):
    settings = small.experiment(tmp_path)
    small.start(settings, tmp_path / "straight")
    small.start(settings, tmp_path / "killed", stop_at=4)
    # What a kill at step 5 leaves: no checkpoint 4, records of steps 4 and 5, one of them cut short.
    shutil.rmtree(tmp_path / "killed/checkpoints/4")
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "split": "train", "loss": 1.0, "tokens": 1, "seconds": 1}\n{"step": 6, "sp')
    RunDirectory(tmp_path / "killed").set_status("running")
    assert len(small.metrics(tmp_path / "killed")) == 6
    small.resume(tmp_path / "killed")
    small.assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path):
    settings = small.experiment(tmp_path)
    small.start(settings, tmp_path / "straight")
    small.start(settings, tmp_path / "killed", stop_at=2)
    shutil.rmtree(tmp_path / "killed/checkpoints")
    assert small.resume(tmp_path / "killed").state == "finished"
    small.assert_same_run(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.parametrize("last", ["environment.json", "dataset.json", "config.json", "status.json"])
def test_a_run_killed_as_it_began_is_started_again_or_resumed(tmp_path: Path, monkeypatch, last: str):
    settings = small.experiment(tmp_path)
    write = RunDirectory.write

    def kill(self: RunDirectory, name: str, value: object) -> None:
        if name == last:
            raise KeyboardInterrupt
        write(self, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write", kill)
        with pytest.raises(KeyboardInterrupt):
            small.start(settings, tmp_path / "run")
    if last == "status.json":
        assert small.resume(tmp_path / "run", stop_at=1).state == "preempted"
    else:
        assert small.start(settings, tmp_path / "run", stop_at=1).state == "preempted"


def test_a_checkpoint_that_was_being_written_is_passed_over_and_removed(tmp_path: Path):
    settings = small.experiment(tmp_path)
    small.start(settings, tmp_path / "straight")
    small.start(settings, tmp_path / "killed", stop_at=4)
    folder = tmp_path / "killed/checkpoints"
    (folder / "4").rename(folder / "4.orbax-checkpoint-tmp")
    for name in ("commit_success.txt", "_CHECKPOINT_METADATA"):
        (folder / "4.orbax-checkpoint-tmp" / name).unlink(missing_ok=True)
    assert small.resume(tmp_path / "killed").state == "finished"
    assert sorted(path.name for path in folder.iterdir()) == ["3", "6"]
    small.assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_the_latest_are_kept_and_the_best_apart(tmp_path: Path):
    # Learns for a while, then is driven off by a rate that only grows: the best lies in the past.
    settings = small.experiment(
        tmp_path,
        optim={"peak_lr": 1.0, "schedule": "constant", "warmup": 12.0},
        train={"steps": 12, "eval_every": 2, "save_every": 1, "keep": 3},
    )
    outcome = small.start(settings, tmp_path / "run")
    best = json.loads((tmp_path / "run/best.json").read_text())
    losses = {r["step"]: r["loss"] for r in small.metrics(tmp_path / "run") if r["split"] == "validation"}
    assert best == {"step": min(losses, key=losses.__getitem__), "metric": "loss", "value": min(losses.values())}
    assert best["step"] < 10, "the run should have got worse"
    assert small.checkpoint_steps(tmp_path / "run") == [best["step"], 10, 11, 12]
    mesh = make_mesh(MeshConfig(devices=1))
    assert runs.load(tmp_path / "run", mesh).step == best["step"]
    assert runs.load(tmp_path / "run", mesh, "latest").step == outcome.step
    assert runs.load(tmp_path / "run", mesh, "11").step == 11
    with pytest.raises(
        UserError, match=rf"no checkpoint '4'; choose best, latest or one of {best['step']}, 10, 11, 12"
    ):
        runs.load(tmp_path / "run", mesh, "4")
    # best.json is written while its checkpoint still is: the word of the last whole checkpoint counts.
    RunDirectory(tmp_path / "run").write("best.json", {"step": 13, "metric": "loss", "value": 0.1})
    assert runs.load(tmp_path / "run", mesh).step == best["step"]


def test_the_average_is_what_is_evaluated_and_loaded(tmp_path: Path):
    settings = small.experiment(tmp_path, train={"ema_decay": 0.5})
    small.start(settings, tmp_path / "run")
    trained = runs.load(tmp_path / "run", make_mesh(MeshConfig(devices=1)), "latest")
    saved = small.state(tmp_path / "run")
    table = np.asarray(trained.params["embed"]["embedding"])
    np.testing.assert_array_equal(table, saved["ema/embed/embedding"])
    assert (table != saved["params/embed/embedding"]).any()
    logged = [r for r in small.metrics(tmp_path / "run") if r["split"] == "validation"][-1]
    assert (
        runs.evaluate_run(tmp_path / "run", checkpoint="latest", mesh=MeshConfig(devices=1))["loss"] == logged["loss"]
    )


def _explodes(tmp_path: Path, **train: object) -> Experiment:
    """Settings whose second step starts from parameters beyond what float32 can multiply."""
    return small.experiment(
        tmp_path,
        model={"norm_place": "post"},
        optim={"optimizer": "sgd", "momentum": 0.0, "peak_lr": 1e38, "warmup": 0.0, "weight_decay": 0.0},
        train={"eval_every": 0, "save_every": 1, **train},
    )


def test_not_finite_halts_names_its_documents_and_can_be_resumed(tmp_path: Path):
    settings = _explodes(tmp_path)
    with pytest.raises(TrainingHaltedError, match=r"^step \d+: .*Last good checkpoint: step \d+") as halted:
        small.start(settings, tmp_path / "run")
    message = str(halted.value)
    step = int(message.split()[1].rstrip(":"))
    assert "corpus.txt:" in message
    assert "\n" not in message
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed"
    assert f"step {step}:" in status["reason"]
    assert small.checkpoint_steps(tmp_path / "run")[-1] == step - 1
    saved = small.state(tmp_path / "run")
    assert all(np.isfinite(value).all() for value in saved.values())
    # It halts again at the same step, and goes on if told to skip.
    with pytest.raises(TrainingHaltedError, match=f"^step {step}:"):
        small.resume(tmp_path / "run")

    def skip(experiment: Experiment) -> Experiment:
        return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, non_finite="skip"))

    assert small.resume(tmp_path / "run", override=skip).state == "finished"
    end = small.state(tmp_path / "run")
    assert end["step"] == 6
    assert end["skipped"] == 6 - (step - 1)
    np.testing.assert_array_equal(end["params/embed/embedding"], saved["params/embed/embedding"])


def test_not_finite_skips_counts_and_resumes_to_the_bit(tmp_path: Path):
    settings = _explodes(tmp_path, non_finite="skip", save_every=2)
    small.start(settings, tmp_path / "straight")
    records = [record for record in small.metrics(tmp_path / "straight") if record["split"] == "train"]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["skipped"] >= 4
    assert records[-1]["loss"] is None or math.isfinite(records[-1]["loss"])
    small.train_in_parts(settings, tmp_path / "resumed", 3, 4)
    small.assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_a_resumed_run_may_change_how_it_runs_but_not_what_it_computes(tmp_path: Path):
    settings = small.experiment(tmp_path)
    small.start(settings, tmp_path / "run", stop_at=4)

    def change(section: str, **fields: object):
        return lambda saved: dataclasses.replace(
            saved, **{section: dataclasses.replace(getattr(saved, section), **fields)}
        )

    for section, fields in (
        ("optim", {"peak_lr": 1.0}),
        ("train", {"steps": 7}),
        ("data", {"seq_len": 8}),
        ("model", {"positions": "rope"}),
        ("train", {"batch_size": 16}),
    ):
        name, value = f"{section}.{next(iter(fields))}", next(iter(fields.values()))
        with pytest.raises(UserError, match=f"^{name} is {value!r} but the run was started with"):
            small.resume(tmp_path / "run", override=change(section, **fields))
    with pytest.raises(UserError, match="can't stop at step 4: the run's last checkpoint is of step 4"):
        small.resume(tmp_path / "run", stop_at=4)
    eight = change("mesh", devices=None)
    assert small.resume(tmp_path / "run", override=eight, stop_at=5).state == "preempted"
    assert runs.load_experiment(RunDirectory(tmp_path / "run")).mesh == MeshConfig()
    assert small.resume(tmp_path / "run", override=change("train", log_every=2, keep=1)).state == "finished"
    assert small.checkpoint_steps(tmp_path / "run")[-1] == 6


def test_a_changed_environment_is_told(tmp_path: Path):
    small.start(small.experiment(tmp_path), tmp_path / "run", stop_at=1)
    run = RunDirectory(tmp_path / "run")
    run.write(
        "environment.json",
        run.read("environment.json") | {"XLA_FLAGS": "--of-another-time", "LIBTPU_INIT_ARGS": "--old"},
    )
    reporter = small.Silent()
    runs.resume(tmp_path / "run", reporter, stop_at=2)
    told = reporter.named("message")
    assert any("XLA_FLAGS was --of-another-time" in text for text in told)
    assert any("LIBTPU_INIT_ARGS was --old" in text for text in told)
    reporter = small.Silent()
    runs.resume(tmp_path / "run", reporter, stop_at=3)
    assert not reporter.named("message")


def test_a_run_finds_its_dataset_again_or_says_what_changed(tmp_path: Path):
    settings = small.experiment(tmp_path)
    small.start(settings, tmp_path / "straight")
    small.start(settings, tmp_path / "run", stop_at=4)
    shutil.rmtree(tmp_path / "datasets")
    small.resume(tmp_path / "run", stop_at=5)
    (tmp_path / "datasets").rename(tmp_path / "elsewhere")
    small.write_corpus(tmp_path / "corpus.txt", seed=1)
    for _ in range(2):  # the first leaves no dataset behind that the second would find
        with pytest.raises(UserError, match="the source text has changed; restore it or start a new run"):
            small.resume(tmp_path / "run")
        assert not (tmp_path / "datasets").exists()
    with pytest.raises(UserError, match="the source text has changed; restore it or start a new run"):
        runs.evaluate_run(tmp_path / "run", mesh=MeshConfig(devices=1))
    assert not (tmp_path / "datasets").exists()
    (tmp_path / "corpus.txt").unlink()
    with pytest.raises(UserError, match=r"corpus\.txt"):
        small.resume(tmp_path / "run")


def test_a_resumed_run_looks_for_its_dataset_below_another_root(tmp_path: Path):
    settings = small.experiment(tmp_path)
    small.start(settings, tmp_path / "straight")
    small.start(settings, tmp_path / "run", stop_at=2)
    run = RunDirectory(tmp_path / "run")

    def below(root: str):
        return lambda saved: dataclasses.replace(saved, data=dataclasses.replace(saved.data, root=str(tmp_path / root)))

    # Moved, with its source gone: only the folder can serve; and from then on the run knows where it is.
    (tmp_path / "datasets").rename(tmp_path / "moved")
    (tmp_path / "corpus.txt").rename(tmp_path / "corpus.away")
    assert small.resume(tmp_path / "run", override=below("moved"), stop_at=3).state == "preempted"
    assert Path(run.read("dataset.json")["folder"]).is_relative_to(tmp_path / "moved")
    assert small.resume(tmp_path / "run", stop_at=4).state == "preempted"
    # Nothing there: prepared there, though the old folder still stands.
    (tmp_path / "corpus.away").rename(tmp_path / "corpus.txt")
    assert small.resume(tmp_path / "run", override=below("new")).state == "finished"
    assert Path(run.read("dataset.json")["folder"]).is_relative_to(tmp_path / "new")
    small.assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_a_mistake_found_after_preparing_leaves_an_older_dataset_alone(tmp_path: Path):
    settings = small.experiment(tmp_path, optim={"warmup": 500.0}, train={"steps": None, "epochs": 1.0})
    with pytest.raises(UserError, match=r"warmup of 500 steps is longer than the run of"):
        small.start(settings, tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.txt"}
    right = dataclasses.replace(settings, optim=dataclasses.replace(settings.optim, warmup=0.0))
    small.start(right, tmp_path / "right", stop_at=1)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "datasets").rglob("*")}
    with pytest.raises(UserError, match=r"warmup of 500 steps is longer than the run of"):
        small.start(settings, tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "datasets").rglob("*")} == files


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"can't mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_fills_up_while_saving_costs_the_steps_since_the_last_checkpoint(tmp_path: Path, small_disk: Path):
    settings = small.experiment(tmp_path)
    small.start(settings, tmp_path / "straight")
    run = small_disk / "run"
    small.start(settings, run, stop_at=3)
    before = small.state(run)
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(filler, filler.stat().st_size - 60 * 1024)  # room for some records, and not for a checkpoint
    command = [sys.executable, "-m", "lm", "train", "--resume", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("lm: ")]
    assert len(said) == 1, done.stderr
    assert re.match(r"lm: training failed: No space left on device: .*go on with `lm train --resume", said[0])
    assert small.checkpoint_steps(run) == [3]
    after = small.state(run)
    assert all((before[name] == after[name]).all() for name in before)
    assert RunDirectory(run).status() != "finished"
    filler.unlink()
    assert small.resume(run).state == "finished"
    small.assert_same_run(tmp_path / "straight", run)


def test_a_run_without_validation_says_so_and_evaluates_nothing(tmp_path: Path):
    for fraction, told in ((0.0, True), (0.2, False)):
        settings = small.experiment(tmp_path, data={"validation_fraction": fraction})
        reporter = small.Silent()
        runs.start(settings, tmp_path / f"run-{fraction}", reporter, stop_at=3)
        said = [text for text in reporter.named("message") if "no validation split" in text]
        assert len(said) == told
        assert all("nothing will be evaluated" in text and "data.validation_source" in text for text in said)
        assert bool(reporter.named("evaluated")) != told


def test_workers_read_the_same_batches_across_a_resume(tmp_path: Path):
    """Processes that read ahead take nothing along: threads, processes, and threads again make one run, to the bit."""
    settings = small.experiment(tmp_path, data={"packing": "documents"})
    small.start(settings, tmp_path / "straight")

    def workers(count: int):
        return lambda saved: dataclasses.replace(saved, data=dataclasses.replace(saved.data, workers=count))

    small.start(workers(2)(settings), tmp_path / "run", stop_at=2)
    small.resume(tmp_path / "run", stop_at=4)
    assert runs.load_experiment(RunDirectory(tmp_path / "run")).data.workers == 2
    small.resume(tmp_path / "run", override=workers(0))
    small.assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize(("what", "reads"), [("state", "latest"), ("extra", "best")])
def test_a_checkpoint_that_was_cut_short_is_one_line_and_what_to_do(tmp_path: Path, what: str, reads: str):
    """What a copy that was broken off, or a disk that lied, leaves behind."""
    small.start(small.experiment(tmp_path), tmp_path / "run", stop_at=4)
    [*_, last] = small.checkpoint_steps(tmp_path / "run")
    files = [path for path in (tmp_path / f"run/checkpoints/{last}/{what}").rglob("*") if path.is_file()]
    for path in files:
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(
        UserError, match=rf"checkpoint {last}.*delete its folder to go on from an earlier one"
    ) as caught:
        small.resume(tmp_path / "run")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=rf"checkpoint {last}"):
        runs.load(tmp_path / "run", make_mesh(MeshConfig(devices=1)), reads)
    shutil.rmtree(tmp_path / f"run/checkpoints/{last}")
    assert small.resume(tmp_path / "run").state == "finished"


def test_length_in_tokens_and_epochs(tmp_path: Path):
    changes = {"steps": None, "eval_every": 0, "save_every": 0}
    by_tokens = small.experiment(tmp_path, train={**changes, "tokens": 3 * 8 * 16 - 1})
    assert small.start(by_tokens, tmp_path / "tokens").step == 3
    by_epochs = small.experiment(tmp_path, train={**changes, "epochs": 0.5})
    outcome = small.start(by_epochs, tmp_path / "epochs")
    dataset = runs.Dataset.open(Path(json.loads((tmp_path / "epochs/dataset.json").read_text())["folder"]))
    examples = (dataset.manifest.splits["train"].tokens - 1) // 16
    assert outcome.step == math.ceil(0.5 * examples / 8)
    assert small.checkpoint_steps(tmp_path / "epochs") == [outcome.step]
    assert [r["step"] for r in small.metrics(tmp_path / "epochs") if r["split"] == "validation"] == [outcome.step]


def test_a_run_describes_itself(tmp_path: Path):
    settings = small.experiment(tmp_path, train={"steps": 6})
    small.start(settings, tmp_path / "run")
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {
        *("config.json", "environment.json", "status.json", "dataset.json", "best.json", "metrics.jsonl", "log.txt"),
        *("tensorboard", "tokenizer", "checkpoints"),
    }
    saved = runs.load_experiment(RunDirectory(tmp_path / "run"))
    assert configs.changed(settings, saved) == [("model.vocab_size", None, 384)]
    assert any((tmp_path / "run/tensorboard").iterdir())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_finishes_the_step_saves_and_exits_75(tmp_path: Path, signum: signal.Signals):
    (tmp_path / "config.py").write_text(small.CONFIG)
    small.write_corpus(tmp_path / "corpus.txt")
    command = [sys.executable, "-m", "lm", "train", "config.py", "--run", "run", "--train.steps", "1000000"]
    command += ["--train.eval-every", "0", "--train.save-every", "0"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while not small.metrics(tmp_path / "run"):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signum)  # as a terminal or a scheduler does: the whole group
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "preempted"
    assert status["reason"] == signum.name
    assert out.count("stopping after this step: saving ... (") == 1
    assert out.index("stopping after this step") < out.index("stopped after step")
    assert "resume with: lm train --resume run" in out
    assert (tmp_path / "run/loss.png").stat().st_size > 5000
    assert err == ""
    assert small.checkpoint_steps(tmp_path / "run") == [status["step"]]
    assert small.metrics(tmp_path / "run")[-1]["step"] == status["step"]


@pytest.mark.slow
def test_the_crash_test_with_two_kills(tmp_path: Path):
    script = Path(__file__).parent.parent / "scripts" / "crash_test.py"
    command = [sys.executable, str(script), "--kills", "2", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing lost: both runs are the same to the bit; 2 kills" in done.stdout


@pytest.mark.parametrize(("name", "value", "free"), [("attention", "xla", True), ("attention_dropout", 0.5, False)])
def test_a_resume_frees_a_setting_and_not_those_whose_names_begin_alike(name, value, free):
    saved = Experiment()
    asked = dataclasses.replace(saved, model=dataclasses.replace(saved.model, **{name: value}))
    if free:
        runs.check_changes(saved, asked)
    else:
        with pytest.raises(UserError, match=f"model.{name}"):
            runs.check_changes(saved, asked)
