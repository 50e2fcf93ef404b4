"""Commands through `lm.cli.main`: mistakes are one line, and the way from text to samples works."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import small_runs as small

from lm import run as runs
from lm.cli import COMMANDS, main, with_huge_pages
from lm.commands import doctor
from lm.data.packing import make_examples
from lm.records import RunDirectory
from lm.sharding import MeshConfig, make_mesh


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a config, a corpus, a finished run, a stopped run, and much that is wrong."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "config.py").write_text(small.CONFIG)
    small.write_corpus(folder / "corpus.txt")
    with contextlib.chdir(folder):
        assert main(["train", "config.py", "--run", "done"]) == 0
        assert main(["train", "config.py", "--run", "stopped", "--stop-at", "4"]) == 75
        for name, text in {
            "syntax.py": "def get_config(:\n    pass\n",
            "raises.py": "def get_config():\n    raise RuntimeError('first\\nsecond')\n",
            "exits.py": "raise SystemExit(0)\n",
            "nothing.py": "x = 1\n",
            "number.py": "def get_config():\n    return 1\n",
            "empty.txt": "",
            "blank.txt": " \n\n \n",
            "short.txt": "abc\n\ndef\n",
            "latin.txt": "ok",
        }.items():
            (folder / name).write_text(text)
        (folder / "latin.txt").write_bytes(b"caf\xe9 " * 100)
        for name, old, new in (
            ("wider", '"d_model": 16', '"d_model": 32'),
            ("not_json", "{", ""),
            ("unknown", '"d_model"', '"d_modle"'),
            ("typed", '"d_model": 16', '"d_model": "16"'),
        ):
            shutil.copytree(folder / "stopped", folder / name)
            config = folder / name / "config.json"
            config.write_text(config.read_text().replace(old, new, 1))
        shutil.copytree(folder / "stopped", folder / "unsaved")
        shutil.rmtree(folder / "unsaved" / "checkpoints")
        shutil.copytree(folder / "stopped", folder / "in_use")
        (folder / "folder").mkdir()
        (folder / "folder" / "something").write_text("mine")
        yield folder


TRAIN = ["train", "config.py", "--run", "new"]
# name: (arguments, what the one line must say: what was found, and what to do)
MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown command": (["trian"], r"unknown command 'trian'; choose one of train, evaluate"),
    "unknown override": ([*TRAIN, "--optim.peak-lrr", "1"], r"--optim\.peak-lrr.*Perhaps you meant: --optim\.peak-lr "),
    "wrong type": ([*TRAIN, "--optim.peak-lr", "fast"], r"--optim\.peak-lr: .*'fast'.*see `lm train config.py --help`"),
    "wrong choice": (
        [*TRAIN, "--model.positions", "polar"],
        r"'polar'.*'learned', 'sinusoidal', 'rope', 'relative', 'none'",
    ),
    "flag with a value": (
        [*TRAIN, "--model.use-bias", "False"],
        r"--model.use-bias takes.*'False'; write --model.no-use-bias;",
    ),
    "flag with a value after =": ([*TRAIN, "--model.no-use-bias=false"], r"takes no value.*; write --model.use-bias;"),
    "setting without a prefix": ([*TRAIN, "--optim.clip-norm", "-1"], r"optim\.clip_norm -1.0: give a number"),
    "setting that its rule ignores": (
        [*TRAIN, "--optim.momentum", "0.5"],
        r"momentum 0.5 with adamw.*only sgd reads",
    ),
    "no arguments": (["train"], r"give a config file first"),
    "option before the config": (["train", "--run", "new"], r"give a config file first"),
    "no config file": (["train", "nope.py"], r"no config file nope\.py; see configs/"),
    "config is a folder": (["train", "folder"], r"no config file folder"),
    "config is text": (["train", "short.txt"], r"short\.txt.*correct the config file"),
    "config with a syntax error": (["train", "syntax.py"], r"syntax\.py, line 1: .*; correct the config file"),
    "config that raises": (["train", "raises.py"], r"raises\.py, line 2: RuntimeError: first second; correct"),
    "config that exits": (["train", "exits.py"], r"exits\.py, line 1: SystemExit"),
    "config without get_config": (["train", "nothing.py"], r"defines no get_config\(\); it must return"),
    "config of another type": (["train", "number.py"], r"returned int; it must return an lm\.config\.Experiment"),
    "no text file": ([*TRAIN, "--data.source", "text:nope/*.txt"], r"'text:nope/\*\.txt' matches no file"),
    "unknown source": ([*TRAIN, "--data.source", "web:x"], r"unknown source 'web:x'; choose text:GLOB"),
    "empty corpus": ([*TRAIN, "--data.source", "text:empty.txt"], r"text:empty\.txt.*no text.*name another source"),
    "blank corpus": ([*TRAIN, "--data.source", "text:blank.txt"], r"text:blank\.txt.*no text.*name another source"),
    "corpus that is not UTF-8": ([*TRAIN, "--data.source", "text:latin.txt"], r"latin\.txt.*UTF-8"),
    "corpus shorter than a sequence": (
        [*TRAIN, "--data.source", "text:short.txt", "--data.validation-fraction", "0", "--data.test-fraction", "0"],
        r"has 8 tokens, fewer than the 17.*lower data\.seq_len or add text",
    ),
    "prepared corpus shorter than a sequence": (
        [*TRAIN, "--data.root", "datasets", "--data.seq-len", "9999", "--model.max-len", "9999"],
        r"has \d+ tokens.*9999.*add text",
    ),
    "bad dataset name": ([*TRAIN, "--data.name", "../x"], r"data\.name is '\.\./x'; use lower-case"),
    "dataset root under a file": ([*TRAIN, "--data.root", "corpus.txt/x"], r"corpus\.txt/x.*set data\.root"),
    "model's vocabulary too small": ([*TRAIN, "--model.vocab-size", "100"], r"257 ids.*vocab_size is 100; set"),
    "trained vocabulary too large": (
        [*TRAIN, "--tokenizer.kind", "bpe", "--tokenizer.vocab-size", "999", "--model.vocab-size", "500"],
        r"999 ids.*vocab_size is 500; set",
    ),
    "size of a vocabulary that is not trained": (
        [*TRAIN, "--tokenizer.kind", "byte", "--tokenizer.vocab_size=5000"],
        r"--tokenizer.vocab-size is set, but nothing is trained with tokenizer.kind 'byte'; leave one out",
    ),
    "unknown tokenizer": ([*TRAIN, "--tokenizer.kind", "words"], r"'words'.*byte"),
    "tokenizer file that is not there": ([*TRAIN, "--tokenizer.kind", "hf:nope.json"], r"nope\.json"),
    "heads do not divide the width": ([*TRAIN, "--model.n-heads", "3"], r"n_heads = 3 does not divide.*d_model = 16"),
    "mesh does not divide the devices": (
        [*TRAIN, "--mesh.devices", "None", "--mesh.tensor", "3"],
        r"tensor 3 does not fit 8 device\(s\) \(mesh.devices uses fewer\); make the product 8",
    ),
    "more devices than there are": ([*TRAIN, "--mesh.devices", "9"], r"mesh\.devices is 9; this machine has 8"),
    "mesh does not divide the batch": (
        [*TRAIN, "--mesh.devices", "None", "--train.batch-size", "12"],
        r"batch_size 12 is not a multiple of 8",
    ),
    "accumulation does not divide the batch": (
        [*TRAIN, "--train.accumulate", "3"],
        r"batch_size 8 is not a multiple of 3",
    ),
    "no length": ([*TRAIN, "--train.steps", "None"], r"no length; set one of train\.steps, train\.tokens"),
    "two lengths": ([*TRAIN, "--train.epochs", "1"], r"train\.steps and train\.epochs are both set"),
    "sequence longer than the model's": ([*TRAIN, "--data.seq-len", "33"], r"seq_len 33 .*max_len 32; raise one or"),
    "decay that the rule lacks": (
        [*TRAIN, "--optim.optimizer", "adam", "--optim.weight-decay", "0.1"],
        r"weight_decay 0\.1 with adam: .*set",
    ),
    "warmup longer than the run": ([*TRAIN, "--optim.warmup", "7"], r"warmup of 7 steps.*run of 6"),
    "warmup longer than the epochs": (
        [*TRAIN, "--optim.warmup", "500", "--train.steps", "None", "--train.epochs", "1"],
        r"warmup of 500 steps.*run of \d+",
    ),
    "patience without validation": (
        [*TRAIN, "--train.patience", "1", "--data.validation-fraction", "0"],
        r"train\.patience needs a validation split; set data\.validation_",
    ),
    "best by what is not reported": (
        [*TRAIN, "--train.best", "macro_f1"],
        r"best is 'macro_f1', which task causal_lm doesn't report; choose one of loss, perplexity, accuracy, bits_per",
    ),
    "best without validation": (
        [*TRAIN, "--train.best", "accuracy", "--data.validation-fraction", "0"],
        r"train\.best needs a validation split; set data\.validation_",
    ),
    "resume by another metric": (
        ["train", "--resume", "stopped", "--train.best", "accuracy"],
        r"train\.best is 'accuracy' but the run was started with 'loss'; a resumed run keeps",
    ),
    "run under a file": (["train", "config.py", "--run", "corpus.txt/run"], r"corpus\.txt is not a writable folder"),
    "run is a file": (["train", "config.py", "--run", "corpus.txt"], r"corpus\.txt is a file; choose another"),
    "run of another": (
        ["train", "config.py", "--run", "done"],
        r"done is not empty; resume it with .*or choose another",
    ),
    "folder with something": (["train", "config.py", "--run", "folder"], r"folder is not empty; .*choose another"),
    "resume without a run": (["train", "--resume"], r"--resume needs the run directory"),
    "resume of no run": (["train", "--resume", "folder"], r"folder is not a run directory .*give the folder"),
    "resume of nothing": (["train", "--resume=nope"], r"nope is not a run directory"),
    "resume and a config": (["train", "--resume", "stopped", "config.py"], r"either a config file or --resume"),
    "resume with another model": (
        ["train", "--resume", "stopped", "--model.d-model", "32"],
        r"model\.d_model is 32 but the run was started with 16; .*leave it out, or start a new run",
    ),
    "finished run with another model": (["train", "--resume", "done", "--model.d-model", "32"], r"d_model is 32 but"),
    "resume with another model in config.json": (
        ["train", "--resume", "wider"],
        r"checkpoint 4 is of another model: params/embed/embedding is \(384, 16\), not \(384, 32\).*use the config",
    ),
    "resume with a smaller mesh": (
        ["train", "--resume", "stopped", "--mesh.devices", "None", "--mesh.tensor", "3"],
        r"tensor 3 does not fit 8",
    ),
    "resume to stop before": (["train", "--resume", "stopped", "--stop-at", "4"], r"can't stop at step 4"),
    "config.json that is not JSON": (["train", "--resume", "not_json"], r"can't read not_json/config\.json.*damaged"),
    "config.json with an unknown setting": (
        ["train", "--resume", "unknown"],
        r"unknown setting 'd_modle'; did you mean d_model\?",
    ),
    "config.json of a wrong type": (["train", "--resume", "typed"], r"model\.d_model is '16'; it must be of type int"),
    "run in use": (["train", "--resume", "in_use"], r"another process is training in_use; wait for it or stop it"),
    "evaluate nothing": (["evaluate"], r"RUN.*required"),
    "evaluate no run": (["evaluate", "folder"], r"folder is not a run directory"),
    "evaluate another model": (["evaluate", "wider"], r"of another model: .*\(384, 16\), not \(384, 32\)"),
    "evaluate an unknown split": (["evaluate", "done", "--split", "dev"], r"'dev'.*'train', 'validation', 'test'"),
    "evaluate no checkpoint": (["evaluate", "done", "--checkpoint", "5"], r"no checkpoint '5'; choose .*one of 3, 6"),
    "evaluate an unsaved run": (["evaluate", "unsaved"], r"no complete checkpoint yet; train it further"),
    "evaluate no batches": (["evaluate", "done", "--batches", "0"], r"must be at least 1"),
    "generate words for ids": (["generate", "done", "--prompt-ids", "1,x"], r"'1,x' is not a list of ids; write"),
    "generate unknown ids": (["generate", "done", "--prompt-ids", "1,257"], r"has 257, outside.*from 0 to 256"),
    "generate negative ids": (["generate", "done", "--prompt-ids=-1"], r"-1.*0 to 256"),
    "generate both prompts": (["generate", "done", "--prompt", "a", "--prompt-ids", "1"], r"--prompt-ids, not both"),
    "generate below zero": (["generate", "done", "--temperature", "-1"], r"temperature is -1\.0; it must be"),
    "generate beyond the context": (["generate", "done", "--prompt", "a" * 40], r"40.*32"),
    "doctor with a bad mesh": (
        ["doctor", "--mesh.tensor", "5"],
        r"tensor 5 does not fit 8 device\(s\) \(mesh.devices uses fewer\); make",
    ),
    "prepare no text": (["prepare", "--data.source", "text:nope"], r"'text:nope' matches no file"),
}


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size of everything, and time of change of every file, below a folder."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.lstat()
        # A folder's own time also tells of what came and went again, as a dataset that turned out too short.
        found[str(path.relative_to(folder))] = (status.st_size, 0 if path.is_dir() else status.st_mtime_ns)
    return found


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_status_2_and_nothing_changed(
    name: str, world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    arguments, says = MISTAKES[name]
    if arguments[:1] == ["train"] and "--resume" not in arguments and "--data.root" not in arguments:
        arguments = [*arguments, "--data.root", "fresh"] if len(arguments) > 2 else arguments
    monkeypatch.chdir(world)
    before = _listing(world)
    with contextlib.ExitStack() as stack:
        if name == "run in use":
            holder = RunDirectory.open(world / "in_use")
            holder.lock()
            stack.callback(holder.unlock)
        assert main(arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith("lm: ")
    assert err.count("\n") == 1, err
    assert re.search(says, err), err
    assert len(err) < 700
    assert _listing(world) == before


def test_a_folder_without_permission_is_a_mistake(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(world)
    tmp_path.chmod(0o500)
    if os.geteuid() == 0:  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert main(["train", "config.py", "--run", str(tmp_path / "run" / "deep")]) == 2
    assert not list(tmp_path.iterdir())
    assert "not a writable folder; choose another with --run" in capfd.readouterr().err


def test_a_full_disk_while_the_run_is_made_is_a_mistake(
    world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(world)
    monkeypatch.setattr(Path, "touch", full)
    assert main(["train", "config.py", "--run", "full"]) == 2
    assert "No space left on device" in capfd.readouterr().err
    (world / "full").rmdir()


def test_no_command_shows_usage(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    usage = capsys.readouterr().out
    assert main(["-h"]) == 0
    assert capsys.readouterr().out == usage
    assert all(command in usage for command in COMMANDS)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"lm \d+\.\d+.*\n", capsys.readouterr().out)


HELP: dict[str, tuple[list[str], list[str], list[str]]] = {  # arguments, what help shows, what it does not
    "train": (["train"], ["lm train CONFIG.py", "--optim.peak-lr", "--stop-at"], []),
    "resume": (["train", "--resume"], ["lm train --resume RUN", "--stop-at", "data.root", "--train.log-every"], []),
    "evaluate": (["evaluate"], ["RUN", "--split", "--mesh.fsdp"], ["--optim"]),
    "generate": (["generate"], ["RUN", "--prompt", "--temperature"], ["--optim", "--mesh"]),
    "prepare": (["prepare"], ["--data.source", "--tokenizer.kind"], ["--optim", "--model", "--train", "--mesh"]),
    "doctor": (["doctor"], ["--mesh.fsdp"], ["--optim"]),
}


@pytest.mark.parametrize("name", HELP)
def test_help_of_a_command(name: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    arguments, there, absent = HELP[name]
    monkeypatch.chdir(tmp_path)
    shown = []
    for asked in ([*arguments, "-h"], [*arguments, "--help"], *([["help", *arguments]] if name in COMMANDS else [])):
        with pytest.raises(SystemExit) as stop:
            main(asked)
        assert stop.value.code == 0
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1
    assert all(text in shown[0] for text in there)
    assert not [text for text in absent if text in shown[0]]
    assert not list(tmp_path.iterdir())


def test_help_without_a_command_is_usage(capsys: pytest.CaptureFixture[str]):
    assert main(["-h"]) == 0
    usage = capsys.readouterr().out
    assert main(["help"]) == 0
    assert capsys.readouterr().out == usage
    assert main(["help", "trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tunables", "mode", "expected"),
    [
        (None, "always [madvise] never", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", "always [madvise] never", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "always [madvise] never", None),
        (None, "[always] madvise never", None),
        (None, "always madvise [never]", None),
    ],
)
def test_huge_pages_are_asked_for_where_the_kernel_waits_to_be_asked(tunables, mode, expected):
    environment = {"HOME": "/", **({} if tunables is None else {"GLIBC_TUNABLES": tunables})}
    changed = with_huge_pages(environment, mode)
    assert (changed and changed["GLIBC_TUNABLES"]) == expected
    assert changed is None or changed["HOME"] == "/"


def test_the_program_restarts_itself_once_with_its_own_arguments(tmp_path: Path):
    """`entry` in a fresh process: the same arguments arrive, malloc's setting is there, and nothing loops."""
    mode = tmp_path / "enabled"
    mode.write_text("always [madvise] never")
    code = (
        "import os, sys, pathlib, lm.cli as cli; cli.HUGE_PAGES = pathlib.Path(sys.argv.pop());"
        "cli.main = lambda arguments: print(os.getpid(), os.environ['GLIBC_TUNABLES'], *arguments) or 0;"
        "print(os.getpid(), flush=True); sys.exit(cli.entry())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", code, "train", "a config.py", str(mode)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    first, second, last = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert first == second
    assert last == f"{first} glibc.malloc.hugetlb=1 train a config.py"


def test_help_imports_nothing_heavy():
    code = (
        "import sys, lm.cli; lm.cli.main(['-h']); "
        "sys.exit(sorted({'jax', 'numpy', 'flax', 'tyro', 'rich'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "exit status" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_docs_and_defaults(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    shown = " ".join(re.sub(r"[│╭╮╰╯─\n]", " ", capsys.readouterr().out).split())
    assert f"usage: lm {command}" in shown
    says = {
        "train": (
            "--optim.peak-lr FLOAT",
            "Highest learning rate",
            "(default: 0.0003)",
            "--run",
            "--stop-at",
            "CONFIG",
        ),
        "evaluate": ("RUN", "Which split", "(default: validation)"),
        "generate": ("--temperature FLOAT", "0 = greedy", "(default: 1.0)"),
        "inspect": ("--text [STR", "The text", "(default: best)"),
        "import": (
            "SOURCE",
            "NAME@REVISION of the Hugging Face hub",
            "--dtype {float32,bfloat16}",
            "(default: float32)",
        ),
        "export": ("DIR", "--max-shard-size STR", "(default: 5GB)"),
        "teach": ("--top-k", "How many of the likeliest tokens", "(default: best)"),
        "prepare": ("--data.source STR", "Text to read", "(default: python-stdlib)"),
        "plan": ("--topology", "CONFIG"),
        "doctor": ("--mesh.fsdp INT", "(default: 1)"),
        "tokenizer": ("{train,compare,show}", "Trains a tokenizer on text and saves it"),
    }[command]
    for text in says:
        assert text in shown


def test_help_of_a_config_shows_its_docstring_and_its_defaults(world: Path, capsys: pytest.CaptureFixture[str]):
    with contextlib.chdir(world), pytest.raises(SystemExit):
        main(["train", "config.py", "--help"])
    shown = " ".join(re.sub(r"[│╭╮╰╯─\n]", " ", capsys.readouterr().out).split())
    assert "A model of a few thousand parameters." in shown
    assert "(default: 0.01)" in shown


def _json(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> list[dict]:
    capsys.readouterr()
    assert main(arguments) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_training_leaves_a_run_that_shows_itself(world: Path):
    from matplotlib.image import imread

    picture = imread(world / "done/loss.png")
    assert picture.shape[0] > 300
    assert picture.shape[1] > 500
    colours = np.unique(picture.reshape(-1, picture.shape[2]), axis=0)
    assert len(colours) > 20
    assert len(small.metrics(world / "done")) == 8
    assert any((world / "done/tensorboard").iterdir())
    log = (world / "done/log.txt").read_text()
    assert "training from step 0 to 6" in log
    assert "step 6/6  validation loss" in log


def test_evaluation_is_what_training_logged(world: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(world)
    logged = {r["step"]: r for r in small.metrics(world / "done") if r["split"] == "validation"}
    for step in (3, 6):
        [found] = _json(
            capsys, ["evaluate", "done", "--json", "--checkpoint", str(step), "--mesh.devices", "1", "--baselines"]
        )
        assert (found["step"], found["split"]) == (step, "validation")
        for name in ("loss", "perplexity", "accuracy", "bits_per_byte"):
            assert found[name] == logged[step][name]
        assert found["tokens"] == logged[step]["scored_tokens"]
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-12)
    [sharded] = _json(capsys, ["evaluate", "done", "--json"])
    assert sharded["loss"] == pytest.approx(found["loss"], rel=1e-6)
    [first] = _json(capsys, ["evaluate", "done", "--json", "--batches", "1", "--mesh.devices", "1"])
    assert first["tokens"] == 8 * 16


def test_bits_per_byte_and_baselines_are_those_of_the_text(world: Path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    [found] = _json(capsys, ["evaluate", "done", "--json", "--split", "test", "--baselines"])
    trained = runs.load(world / "done", make_mesh(MeshConfig(devices=1)), "best")
    dataset = runs.Dataset.open(Path(RunDirectory(world / "done").read("dataset.json")["folder"]))
    texts = list(runs.split_text(dataset, "test"))
    # The documents are those of the corpus, and no others.
    paragraphs = (world / "corpus.txt").read_text().strip().split("\n\n")
    assert {text.decode() for text in texts} <= set(paragraphs)
    assert len(texts) > 2
    # Loss token by token, in float64, over windows of 16 that follow each other; the first token predicts only.
    stream = np.array([i for text in texts for i in (*text, trained.tokenizer.eos_id)])
    nats = 0.0
    for begin in range(0, len(stream) - 1, 16):
        window = stream[begin : begin + 17]
        logits = trained.model.apply({"params": trained.params}, window[None, :-1])
        logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits, np.float64)[0]
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nats += float((log_z - logits[np.arange(len(window) - 1), window[1:]]).sum())
    scored = len(stream) - 1
    assert found["tokens"] == scored
    assert found["loss"] == pytest.approx(nats / scored, rel=1e-5)
    # The one token that has no context is charged what the others cost on average.
    n_bytes = sum(map(len, texts))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes * len(stream) / scored, rel=1e-5)
    text = b"".join(texts)
    share = np.bincount(np.frombuffer(text, np.uint8)) / len(text)
    entropy = -sum(p * math.log2(p) for p in share if p > 0)
    assert found["order0_bits_per_byte"] == pytest.approx(entropy, rel=1e-12)
    assert found["zlib_bits_per_byte"] == pytest.approx(8 * len(zlib.compress(text, 9)) / len(text), rel=1e-12)


def test_evaluation_prints_a_table(world: Path, monkeypatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.chdir(world)
    run = world / ("a_name_that_is_longer_than_any_table_is_wide_" * 3)
    run.symlink_to("done")
    assert main(["evaluate", run.name, "--baselines"]) == 0
    out, err = capfd.readouterr()
    for text in (
        f"{run.name} at step 6, validation split",
        "perplexity",
        "bits per byte",
        "zlib level 9",
        "order-0 entropy",
    ):
        assert text in out
    assert err == ""


def test_generation_streams_numbers_and_writes_json(world: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(world)
    (world / "done/samples.jsonl").unlink(missing_ok=True)
    few = ["--max-new-tokens", "6", "--seed", "3"]
    a, b = _json(capsys, ["generate", "done", "--json", "--prompt", "the cat", "a", *few])
    assert (a["prompt"], b["prompt"]) == ("the cat", "a")
    assert a["prompt_ids"] == list(b"the cat")
    assert len(a["ids"]) == len(a["logprobs"]) == 6
    assert all(value <= 0 for value in a["logprobs"])
    [by_ids] = _json(capsys, ["generate", "done", "--json", "--prompt-ids", ",".join(map(str, b"the cat")), *few])
    assert by_ids["ids"] == a["ids"]
    assert main(["generate", "done", "--prompt", "the cat", *few]) == 0
    assert capsys.readouterr().out == "the cat" + a["text"] + "\n"
    assert main(["generate", "done", "--prompt", "the cat", "a", *few]) == 0
    assert "--- 2 of 2" in capsys.readouterr().out
    [empty] = _json(capsys, ["generate", "done", "--json", *few])
    assert empty["prompt"] == ""
    lines = [json.loads(line) for line in (world / "done/samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 + 1 + 1 + 2 + 1
    assert lines[0] == {"step": 6, **a, "sampling": lines[0]["sampling"]}
    assert lines[0]["sampling"]["seed"] == 3


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_generation_starts_as_documents_do_in_training(tmp_path: Path, monkeypatch, capsys, packing: str):
    """With a tokenizer whose bos is not its eos; what precedes a document is read off the batches of the loader."""
    # Documents shorter than a sequence, so that no piece but a document's first follows an end.
    texts = [f"{animal} {number}" for animal in ("cat", "dog", "mat") for number in range(60)]
    (tmp_path / "corpus.txt").write_text("\n\n".join(texts))
    small.write_tokenizer(tmp_path / "tokenizer.json")
    settings = small.experiment(
        tmp_path,
        data={"packing": packing},
        tokenizer={"kind": f"hf:{tmp_path / 'tokenizer.json'}"},
        train={"seed": 1},  # one that doesn't end its text at once
    )
    small.start(settings, tmp_path / "run", stop_at=1)
    trained = runs.load(tmp_path / "run", make_mesh(MeshConfig(devices=1)))
    tokenizer = trained.tokenizer
    assert tokenizer.bos_id != tokenizer.eos_id
    dataset = runs.Dataset.open(Path(RunDirectory(tmp_path / "run").read("dataset.json")["folder"]))
    examples = make_examples(dataset.store("train"), seq_len=16, packing=packing, bos_id=tokenizer.bos_id)
    batch = examples.batch(np.arange(len(examples)))
    ends = batch["targets"][:, :-1] == tokenizer.eos_id
    if packing == "documents":  # not where padding follows
        ends &= batch["segments"][:, 1:] > 0
    [before] = {int(i) for i in batch["tokens"][:, 1:][ends]}

    monkeypatch.chdir(tmp_path)
    few = ["--max-new-tokens", "5", "--temperature", "0"]
    [empty] = _json(capsys, ["generate", "run", "--json", *few])
    assert empty["prompt_ids"] == [before]
    [cat] = _json(capsys, ["generate", "run", "--json", "--prompt", "the cat", *few])
    letters = tokenizer.encode("the cat")
    assert cat["prompt_ids"] == ([before, *letters] if packing == "documents" else letters)
    for made in (empty, cat):
        assert made["ids"]
        ids = made["prompt_ids"] + made["ids"]
        # Ids are taken as they are, so what was shown gives the same again; and the model says so too.
        [again] = _json(
            capsys, ["generate", "run", "--json", "--prompt-ids", ",".join(map(str, made["prompt_ids"])), *few]
        )
        assert {name: again[name] for name in ("prompt_ids", "ids", "text", "logprobs")} == {
            name: made[name] for name in ("prompt_ids", "ids", "text", "logprobs")
        }
        logits = np.asarray(trained.model.apply({"params": trained.params}, np.array([ids[:-1]])), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = log_p[np.arange(len(ids) - 1), ids[1:]][-len(made["ids"]) :]
        np.testing.assert_allclose(made["logprobs"], expected, atol=1e-5)


def test_prepare_and_doctor(world: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(world)
    assert main(["prepare", "config.py"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"train +│ +\d+ │ +\d,\d+ │ +\d,\d+ │ +\d\.\d+", out)
    assert "vocabulary 257" in out
    assert main(["doctor", "--mesh.fsdp", "4"]) == 0
    out = capsys.readouterr().out
    assert f"{len(jax.devices())} x cpu" in out
    assert "data 2, fsdp 4, context 1, tensor 1" in out
    assert re.search(r"host memory +\d", out)


@pytest.mark.parametrize("lacking", [("jax", "jaxlib"), ("tyro",), ("rich", "absl"), ("numpy",)])
def test_doctor_names_what_is_missing_without_needing_it(lacking: tuple[str, ...]):
    """In a fresh process where these packages can't be imported, and where whoever tries is shown to have tried."""
    code = f"""
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {lacking}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Gone())
from lm.cli import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2, done.stderr
    installed_as = [{"absl": "absl-py"}.get(name, name) for name in lacking]
    assert done.stderr == f"lm: missing packages: {', '.join(installed_as)}; run `pip install -r requirements.txt`\n"
    for name in installed_as:
        assert re.search(rf"^ +{name} +MISSING$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^ +flax +\d", done.stdout, re.MULTILINE)
    assert re.search(r"^ +host memory +\d", done.stdout, re.MULTILINE)


def test_doctor_asks_for_what_is_required_and_knows_the_extras():
    root = Path(__file__).parent.parent
    required = re.findall(r"^([\w-]+)", (root / "requirements.txt").read_text(), re.MULTILINE)
    assert set(doctor.REQUIRED) == {*required, "jaxlib"}
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for_people = {re.match(r"[\w-]+", line)[0]: extra for extra in ("text", "beam") for line in extras[extra]}
    assert {name: extra for name, extra in doctor.EXTRAS.items() if extra != "parity"} == for_people


def test_a_stopped_run_is_resumed_by_the_command_it_printed(world: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("config.py", "corpus.txt"):
        shutil.copy(world / name, tmp_path)
    assert main(["train", "config.py", "--run", "a run", "--stop-at", "2"]) == 75
    out = capsys.readouterr().out
    assert "stopped after step 2 (asked to stop at step 2); everything is saved" in out
    assert "resume with: lm train --resume 'a run'" in out
    assert RunDirectory(tmp_path / "a run").status() == "preempted"
    assert main(["train", "--resume", "a run", "--train.log-every", "2"]) == 0
    assert "finished at step 6 (all steps done)" in capsys.readouterr().out
    assert RunDirectory(tmp_path / "a run").status() == "finished"
    assert main(["train", "--resume", "a run"]) == 0
    assert "a run is finished; nothing to resume" in capsys.readouterr().out


def test_a_run_without_a_name_gets_one(world: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("config.py", "corpus.txt"):
        shutil.copy(world / name, tmp_path)
    assert main(["train", "config.py", "--stop-at", "1"]) == 75
    [run] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"config-\d{8}-\d{6}", run.name)


def test_a_halted_run_fails_with_one_line(world: Path, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("config.py", "corpus.txt"):
        shutil.copy(world / name, tmp_path)
    high = ["--optim.optimizer", "sgd", "--optim.weight-decay", "0", "--optim.warmup", "0", "--optim.peak-lr", "1e38"]
    assert main(["train", "config.py", "--run", "run", *high]) == 1
    err = capfd.readouterr().err
    assert re.match(r"lm: training halted: step \d+: ", err)
    assert err.count("\n") == 1
    assert RunDirectory(tmp_path / "run").status() == "failed"
