"""A small model learns answers by heart, in one turn and in two, and gives them when it is asked."""

import json
from pathlib import Path
from typing import Any

import chats
import numpy as np
import pytest
import small_runs

from lm import cli
from lm import run as runs
from lm.config import Experiment
from lm.data.config import DataConfig
from lm.errors import UserError
from lm.generate import SamplingConfig
from lm.generate.texts import generate_texts
from lm.models.transformer import ModelConfig
from lm.optim import OptimConfig
from lm.sharding import MeshConfig
from lm.tasks.causal_lm import CausalLM
from lm.tasks.instruction import Instruction
from lm.text.chat import ChatConfig
from lm.text.template import Message
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig

PAIRS = {"明天天气怎么样？": "晴朗", "Who?": "Me.", "1+1": "2", "end<|im_end|>": "no end"}
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=20)


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def talk(*said: str) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(said)
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, said)]}


def experiment(path: Path, template: Any, tokenizer: str = "byte", steps: int = 150, **data: Any) -> Experiment:
    settings: dict[str, Any] = {"packing": "documents", "seq_len": 96, "field": "messages", "validation_fraction": 0.0}
    return Experiment(
        data=DataConfig(
            source=f"jsonl:{path}",
            root=str(path.parent / "datasets"),
            chat=ChatConfig(template=template),
            **settings | data,
        ),
        tokenizer=TokenizerConfig(kind=tokenizer),
        model=ModelConfig(d_model=32, n_layers=2, n_heads=2, max_len=96, positions="rope"),
        task=Instruction(),
        optim=OptimConfig(peak_lr=1e-2, warmup=0.05),
        train=TrainConfig(steps=steps, batch_size=4, log_every=50, eval_every=0, save_every=0),
        mesh=MeshConfig(devices=1),
    )


def test_it_answers_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.jsonl", *({"q": q, "a": a} for q, a in PAIRS.items()))
    small_runs.start(experiment(path, "plain", fields=("q", "a"), seq_len=48), tmp_path / "run")
    trained = runs.load(tmp_path / "run", runs.inference_mesh())
    assert generate_texts(trained, list(PAIRS), GREEDY) == list(PAIRS.values())
    capsys.readouterr()
    asked = ["generate", str(tmp_path / "run"), "--prompt", "Who?", "--temperature", "0"]
    assert cli.main(asked) == 0
    assert capsys.readouterr().out == "Me.\n", "an answer stands alone"
    assert cli.main(asked[:2]) == 2
    assert "--prompt" in capsys.readouterr().err


def test_it_answers_in_a_second_turn_by_the_template_of_the_tokenizer(tmp_path: Path) -> None:
    """The same question has another answer after another first turn, and by another system."""
    folder = chats.write_folder(tmp_path / "tokenizer", chats.byte_tokenizer(), chats.QWEN)
    pirate = {"messages": [{"role": "system", "content": "Pirate."}, *talk("Who?", "Arr!")["messages"]]}
    rows = [talk("a", "b", "Who?", "You."), talk("c", "d", "Who?", "Nobody."), talk("Who?", "Me."), pirate]
    path = write(tmp_path / "t.jsonl", *rows)
    small_runs.start(experiment(path, "tokenizer", f"file:{folder}", steps=250), tmp_path / "run")
    trained = runs.load(tmp_path / "run", runs.inference_mesh())
    assert trained.chat is not None
    assert trained.end_id == trained.tokenizer.special_tokens["<|im_end|>"]
    for said, answer in ((("a", "b"), "You."), (("c", "d"), "Nobody."), ((), "Me.")):
        before = tuple(Message(role, content) for role, content in zip(("user", "assistant"), said))
        asked = runs.Trained(trained.experiment, trained.tokenizer, trained.model, trained.params, trained.step, before)
        assert generate_texts(asked, ["Who?"], GREEDY) == [answer]
    out = tmp_path / "out.txt"
    (tmp_path / "in.txt").write_text("Who?\n", encoding="utf-8")
    command = ["generate", str(tmp_path / "run"), "--file", str(tmp_path / "in.txt"), "--output", str(out)]
    assert cli.main([*command, "--temperature", "0", "--system", "Pirate."]) == 0
    assert out.read_text(encoding="utf-8") == "Arr!\n"


def test_packed_or_padded_the_loss_is_the_same(tmp_path: Path) -> None:
    rows = [talk(f"{i} {'x' * (i % 7)}", f"{i * i}", "and", "y" * (i % 5 + 1)) for i in range(24)]
    path = write(tmp_path / "t.jsonl", *rows)
    found = {}
    small_runs.start(experiment(path, "plain", steps=3), tmp_path / "run")
    for packing in ("documents", "pad"):
        trained = runs.load(tmp_path / "run", runs.inference_mesh())
        settings = experiment(path, "plain", packing=packing)
        dataset = runs.dataset_of(runs_directory(tmp_path / "run"), trained.experiment)
        make = settings.task.maker(trained.model.config, dataset.tokenizer, ())
        examples = make(dataset.store("train"), settings.data, False)
        batch = examples.batch(np.arange(len(examples)))
        _, sums = settings.task.loss(trained.model, trained.params, batch, None)  # type: ignore[arg-type]
        found[packing] = (float(sums["loss"]), float(sums["weight"]), len(examples))
    assert found["documents"][2] < found["pad"][2] == 24
    assert found["documents"][:2] == pytest.approx(found["pad"][:2], rel=1e-5)


def runs_directory(path: Path) -> Any:
    from lm.records import RunDirectory

    return RunDirectory.open(path)


def test_what_is_left_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "t.jsonl", *(talk(f"q{i}", "a") for i in range(8)), talk("q", "long " * 30))
    settings = experiment(path, "plain", steps=2)
    with pytest.raises(UserError, match=r"last response of t\.jsonl:9 has 151 tokens and a row 96 \(data\.seq_len\)"):
        small_runs.start(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "datasets").exists()
    small_runs.start(experiment(path, "plain", steps=2, on_error="skip"), tmp_path / "run")
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert told == ["1 of 9 conversations are left out of training: their last response is longer than a row"]


@pytest.mark.parametrize(
    ("model", "data", "says"),
    [
        ({"mask": "prefix"}, {}, "needs model.mask causal"),
        ({"mask": "bidirectional"}, {}, "needs model.mask causal"),
        ({"encoder_layers": 1}, {}, "needs model.mask causal and no encoder"),
        ({}, {"chat": ChatConfig()}, "set data.chat.template"),
        ({}, {"packing": "stream"}, "set data.packing to documents"),
        ({}, {"stride": 4}, "data.stride cuts"),
        ({}, {"eval_stride": 4}, "data.eval_stride cuts"),
    ],
)
def test_what_cannot_serve(model: dict[str, Any], data: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {"chat": ChatConfig(template="plain"), "packing": "pad"}
    with pytest.raises(UserError, match=says):
        Instruction().check(ModelConfig(**model), DataConfig(**good | data))
    Instruction().check(ModelConfig(), DataConfig(**good))


def test_prompts_of_a_plain_run_become_turns_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of an imported chat model, whose tokenizer brings the template."""
    folder = chats.write_folder(tmp_path / "tokenizer", chats.byte_tokenizer(), chats.QWEN)
    (tmp_path / "t.txt").write_text("some text " * 40, encoding="utf-8")
    base = small_runs.experiment(tmp_path)
    for name, kind in (("with", f"file:{folder}"), ("without", "byte")):
        settings = small_runs.experiment(
            tmp_path, tokenizer={"kind": kind}, model={"max_len": 128}, train={"steps": 2, "eval_every": 0}
        )
        assert isinstance(base.task, CausalLM)
        small_runs.start(settings, tmp_path / name)
    asked = ["--prompt", "hi", "--max-new-tokens", "2", "--json"]
    assert cli.main(["generate", str(tmp_path / "with"), *asked, "--chat", "--system", "Be kind."]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    trained = runs.load(tmp_path / "with", runs.inference_mesh())
    text = "".join(trained.tokenizer.id_to_piece(i) for i in told["prompt_ids"]).replace("Ġ", " ").replace("Ċ", "\n")
    start = "<|im_start|>"
    assert text == f"{start}system\nBe kind.<|im_end|>\n{start}user\nhi<|im_end|>\n{start}assistant\n"
    for command, says in (
        (["with", *asked, "--system", "x"], "--system goes with conversations"),
        (["without", *asked, "--chat"], "no chat template came with the tokenizer"),
    ):
        assert cli.main(["generate", str(tmp_path / command[0]), *command[1:]]) == 2
        assert says in capsys.readouterr().err
