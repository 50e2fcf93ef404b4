"""The script that fine-tunes one run in every way, and the text that the shipped ones are pretrained on."""

import csv
import dataclasses
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from lm import cli, tree
from lm import run as runs
from lm.config import Experiment, describe, load_file, parse
from lm.models.transformer import Transformer
from lm.optim import freezing
from lm.records import RunDirectory
from lm.run.begin import tuned_rates
from lm.train import abstract_params

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "configs" / "finetune"
SCRIPT = REPOSITORY / "scripts" / "finetune_table.py"
SMALL = (
    "--mesh.devices 1 --model.d-model 16 --model.n-heads 2 --model.d-ff 32 --train.epochs 0.3 --train.batch-size 8"
    " --train.eval-every 0"
)

# What moves in each way, of a model of two layers of width 64; the head's 64 x 2 + 2 always do.
BODY = 64 * 4 * 64 + 4 * 64 + 2 * 64 * 256 + 256 + 64 + 4 * 64  # attention, feed-forward block, two norms
EMBEDDED = 16384 * 64
HEAD = 64 * 2 + 2
TRAINED = {
    "scratch": EMBEDDED + 128 + 2 * BODY + 128 + HEAD,
    "full": EMBEDDED + 128 + 2 * BODY + 128 + HEAD,
    "frozen-layers": EMBEDDED + 128 + 128 + HEAD,
    "frozen-below": BODY + 128 + HEAD,
    "head": HEAD,
    "bitfit": 64 + 2 * (4 * 64 + 256 + 64 + 2 * 64) + 64 + HEAD,
    "lora": 2 * 2 * (64 * 8 + 8 * 64) + HEAD,
    "adapter": 2 * 2 * (64 * 16 + 16 + 16 * 64 + 64) + 2 * 4 * 64 + 128 + 128 + HEAD,  # with all norms
    "prompt": 10 * 64 + HEAD,
}


def test_every_way_trains_what_its_name_says() -> None:
    methods = runpy.run_path(str(SCRIPT))["METHODS"]
    assert methods.keys() == TRAINED.keys()
    base = load_file(CONFIGS / "sst2.py")
    for name, options in methods.items():
        experiment = parse(Experiment, base, list(options), prog=name)
        model = dataclasses.replace(experiment.model, vocab_size=16384, n_classes=2)
        optim = experiment.optim
        optim = dataclasses.replace(optim, rates=optim.rates or tuned_rates(model))
        params, _ = abstract_params(Transformer(model), runs.inference_mesh())
        trained, _ = tree.split(params, freezing(optim, params).moves)
        held = freezing(optim, params).lower
        below = sum(tree.count_parameters(params[stack]) * layers // model.n_layers for stack, layers in held)
        assert tree.count_parameters(trained) - below == TRAINED[name], name


@pytest.fixture
def pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with films' reviews, made up, and a run of configs/finetune/english.py on them."""
    monkeypatch.chdir(tmp_path)
    for folder in ("english", "sst2", "wikitext2"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    reviews = [f"a {word} film number {i}\t{i % 2}" for i in range(60) for word in (["dull", "fine"][i % 2],)]
    for split in ("train", "dev", "test"):
        (tmp_path / "data" / "sst2" / f"{split}.tsv").write_text("\n".join(reviews) + "\n")
    for name in ("english/text.txt", "wikitext2/valid.txt"):
        (tmp_path / "data" / name).write_text("\n".join(line[:-2] for line in reviews * 8) + "\n")
    steps = SMALL.replace("--train.epochs 0.3", "--train.steps 2")
    assert cli.main(["train", str(CONFIGS / "english.py"), "--run", "parent", *steps.split()]) == 0
    return tmp_path


def test_a_table_is_made_once(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--methods", "scratch", "lora", "--seeds", "0", "1", "--rounds", "1", "--steps", "2"]
    asked = [str(CONFIGS / "sst2.py"), "parent", "--output", "made", *options, *SMALL.split()]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *asked])
    capsys.readouterr()
    tables = []
    for _ in range(2):
        runpy.run_path(str(SCRIPT), run_name="__main__")
        said = capsys.readouterr()
        tables.append([line.split(" | ") for line in said.out.splitlines() if re.match(r"\| (scratch|lora) ", line)])
        trainings = said.err.count("lm train ")
        assert trainings == (4 if len(tables) == 1 else 0), "what is finished stays"
    assert [row[:-1] for row in tables[0]] == [row[:-1] for row in tables[1]], "all but the times"
    for way, row in zip(("scratch", "lora"), tables[0], strict=True):
        scores = [json.loads(Path(f"made/{way}-{seed}.test.json").read_text())["accuracy"] for seed in (0, 1)]
        assert row[1] == ", ".join(f"{100 * score:.1f}" for score in scores)
        assert row[2].startswith(f"{50 * sum(scores):.1f} ± {50 * abs(scores[0] - scores[1]):.1f}")
        trained = int(row[4].replace(",", ""))
        # Two moments for each, and a few counts of steps.
        assert 0 <= int(row[5].replace(",", "")) - 2 * 4 * trained < 64
        assert float(row[6].strip(" |")) > 0


def gather(monkeypatch: pytest.MonkeyPatch, *asked: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gather_text.py", *asked])
    runpy.run_path(str(REPOSITORY / "scripts" / "gather_text.py"), run_name="__main__")


CHINESE = {
    "data/zh/ChnSentiCorp_htl_all.csv": "label,review\n"
    + "".join(f"{i % 2},房间{'很好大小干净'[i % 5 :]}{i}\n" for i in range(80)),
    "public/data/zh/CLUECorpusSmall_sampled.txt": "".join(f"今天 天气 {i}\n" for i in range(300)),
    "public/data/zh/thucnews_short_dev.txt": "体验游戏\t8\n铁树开花\t5\n",
}


def test_commands_of_the_chinese_notes_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in CHINESE.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    for config in ("chinese", "hotel_text", "hotel_reviews"):
        for command in re.findall(r"^ {4}(.*)$", describe(CONFIGS / f"{config}.py"), re.M):
            program, *asked = shlex.split(command.replace("configs/finetune", str(CONFIGS)))
            if program == "python":
                gather(monkeypatch, *[name.replace("path/to/", "") for name in asked[1:]])
                assert Path("data/chinese/titles.txt").read_text(encoding="utf-8") == "体验游戏\n铁树开花\n"
                continue
            if asked[0] == "train":
                small = [*SMALL.split(), "--train.epochs", "None", "--train.steps", "2", "--data.seq-len", "16"]
                tokenizer = next(Path("datasets").glob("hotel_words/*/*/tokenizer"))
                asked = [name.replace("path/to/hotel_words/tokenizer", str(tokenizer)) for name in asked] + small
            assert cli.main(asked) == 0, command
    said = capsys.readouterr()
    assert "begins with the parameters of runs/hotel_text" in said.out + said.err
    a, b = (RunDirectory.open(Path("runs") / name) for name in ("hotel_text", "hotel_reviews"))
    assert a.read("dataset.json") == b.read("dataset.json"), "one dataset, so that no review of a test was read before"


def test_few_labels_are_of_the_training_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path("data/zh/ChnSentiCorp_htl_all.csv")
    source.parent.mkdir(parents=True)
    reviews = [(str(i % 2), f'好房间{i}, "很大"' + "\n在二楼" * (i % 7 == 0)) for i in range(90)]
    with source.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("label", "review"), *reviews])
    assert cli.main(["prepare", str(CONFIGS / "hotel_reviews.py"), "--export", "jsonl.zst", "--export-to", "all"]) == 0
    script = REPOSITORY / "scripts" / "few_labels.py"
    splits = {}
    for folder, count in (("few", "9"), ("most", "40")):
        monkeypatch.setattr(sys, "argv", [str(script), str(source), "all", count, folder])
        runpy.run_path(str(script), run_name="__main__")
        for name in ("train", "validation", "test"):
            with Path(folder, f"{name}.csv").open(encoding="utf-8", newline="") as file:
                header, *rows = csv.reader(file)
            assert header == ["label", "review"]
            splits[folder, name] = {tuple(row) for row in rows}
    assert [len(splits[folder, "train"]) for folder in ("few", "most")] == [9, 40]
    held_out = [splits["few", name] for name in ("validation", "test")]
    assert held_out == [splits["most", name] for name in ("validation", "test")]
    assert sum(map(len, held_out)) > 9
    assert not set.union(*held_out) & (splits["few", "train"] | splits["most", "train"])
    assert set.union(*splits.values()) <= set(reviews)


def test_a_file_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        gather(monkeypatch, "chinese", str(tmp_path), str(tmp_path / "made"))
    assert stopped.value.code == 2
    assert "CLUECorpusSmall_sampled.txt is missing" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_the_pretraining_text_holds_no_sentence_that_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "wikitext2/train.txt": " \n = Heading = \n A paragraph .\n",
        "ptb/ptb.train.txt": " mr. <unk> is chairman\n",
        "multi30k/train.en": "Two men.\n",
        "lambada/lambada_openai.first2500.jsonl": json.dumps({"context": "He said.\n\nGo", "continuation": "on"}),
        "qa/xquad.en.json": json.dumps({"data": [{"paragraphs": [{"context": "The Panthers."}]}]}),
        "sst2/train.tsv": "a fine film\t1\n",
        "sst2/dev.tsv": "asked first\t1\n",
        "sst2/test.tsv": "asked last\t1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    gather(monkeypatch, "english", str(tmp_path), str(tmp_path / "made"))
    lines = [line for path in sorted((tmp_path / "made").iterdir()) for line in path.read_text().splitlines()]
    assert lines == [
        "He said.",
        "Go on",
        "Two men.",
        "mr. <unk> is chairman",
        *["a fine film"] * 8,
        "= Heading =",
        "A paragraph .",
        "The Panthers.",
    ]
