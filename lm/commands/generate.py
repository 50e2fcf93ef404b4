"""`lm generate`: what a run writes after a prompt."""

import dataclasses
import json
import logging
import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from lm import config as configs
from lm import run as runs
from lm.commands.exits import DONE
from lm.commands.shared import RunArgument, open_console
from lm.errors import UserError, check
from lm.generate import Generator, SamplingConfig


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Continues prompts with a trained run."""

    run: RunArgument
    """Run directory."""
    prompt: tuple[str, ...] = ()
    """Texts to continue, all in one batch (--prompt A B); none = begin a document."""
    prompt_ids: tuple[str, ...] = ()
    """Prompts as token ids instead, such as 1,5,9; taken as they are, without a token that begins a document."""
    checkpoint: str = "best"
    """best (by validation loss), latest, or a step."""
    json: bool = False
    """One JSON object a line: prompt, ids, text and log-probabilities."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)


def run(arguments: list[str]) -> int:
    """`lm generate RUN --prompt TEXT ... [options]`."""
    asked = configs.parse(GenerateArguments, None, arguments, prog="lm generate")
    check(not (asked.prompt and asked.prompt_ids), "give --prompt or --prompt-ids, not both")
    open_console()
    trained = runs.load(asked.run, runs.inference_mesh(), asked.checkpoint)
    tokenizer = trained.tokenizer
    if asked.prompt_ids:
        ids = [_parse_ids(text, tokenizer.vocab_size) for text in asked.prompt_ids]
        texts = [tokenizer.decode(row) for row in ids]
    else:
        texts = list(asked.prompt) or [""]
        ids = [trained.prompt_ids(text) for text in texts]
    generator = Generator(
        trained.model.config, trained.params, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
    )
    stream = not asked.json and len(ids) == 1
    if stream:
        _write(texts[0])
    results = generator.generate(
        ids,
        asked.sampling,
        decode=tokenizer.decode,
        on_tokens=(lambda row, ids, text: _write(text)) if stream else None,
    )
    lines = []
    for text, result in zip(texts, results):
        lines.append(
            {
                "prompt": text,
                "prompt_ids": result.prompt_ids,
                "ids": result.ids,
                "text": result.text,
                "logprobs": [round(value, 6) for value in result.logprobs],
                "finished": result.finished,
            }
        )
    if asked.json:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False))
    elif stream:
        _write("\n")
    else:
        for number, (text, result) in enumerate(zip(texts, results), 1):
            _write(f"--- {number} of {len(results)}\n{text}{result.text or ''}\n")
    settings = dataclasses.asdict(asked.sampling)
    try:
        with (asked.run / "samples.jsonl").open("a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps({"step": trained.step, **line, "sampling": settings}, ensure_ascii=False) + "\n")
    except OSError as error:  # somebody else's run: the samples were shown, they are just not kept
        logging.getLogger(__name__).warning("samples were not added to %s: %s", asked.run, error.strerror)
    return DONE


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _parse_ids(text: str, vocab_size: int) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--prompt-ids {text!r} is not a list of ids; write them as 1,5,9") from None
    for i in ids:
        check(0 <= i < vocab_size, f"--prompt-ids has {i}, outside the vocabulary; ids go from 0 to {vocab_size - 1}")
    return ids
