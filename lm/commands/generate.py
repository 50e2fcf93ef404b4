"""`lm generate`: what a run writes after a prompt."""

import dataclasses
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lm import config as configs
from lm import run as runs
from lm.commands.exits import DONE
from lm.commands.shared import RunArgument, open_console
from lm.errors import UserError, check
from lm.generate import SamplingConfig
from lm.generate.texts import as_json, check_output, make_generator, one_line, read_prompts, write_lines
from lm.text.template import Message


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Continues prompts with a trained run."""

    run: RunArgument
    """Run directory."""
    prompt: tuple[str, ...] = ()
    """Texts to continue, all in one batch (--prompt A B); none = begin a document."""
    prompt_ids: tuple[str, ...] = ()
    """Prompts as token ids instead, such as 1,5,9; taken as they are, without a token that begins a document."""
    file: Path | None = None
    """File of prompts instead: a prompt a line, or .jsonl with objects that hold it under "prompt"."""
    output: Path | None = None
    """Where to write what follows the prompts of --file, a line each and in order: the text with \\n for a new line
    (and \\\\ for a backslash), or to a .jsonl file what --json tells; None = on the terminal."""
    batch_size: int = 32
    """Prompts of --file at a time; changes how fast it goes and how much memory it takes."""
    chat: bool = False
    """Prompts are a user's turns, written by the chat template that came with the tokenizer; without being asked in a
    run of task instruction."""
    system: str | None = None
    """What the system's turn before each prompt says; with --chat, or a run of task instruction."""
    checkpoint: str = "best"
    """best (as train.best has it), latest, or a step."""
    json: bool = False
    """One JSON object a line: prompt, ids, text and log-probabilities."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)


def run(arguments: list[str]) -> int:
    """`lm generate RUN --prompt TEXT ... [options]`."""
    asked = configs.parse(GenerateArguments, None, arguments, prog="lm generate")
    given = [name for name in ("prompt", "prompt_ids", "file") if getattr(asked, name)]
    flags = [f"--{name.replace('_', '-')}" for name in given]
    check(len(given) <= 1, f"give {' or '.join(flags)}, not both")
    if asked.file is not None:
        return _run_file(asked, asked.file)
    check(asked.output is None, "--output goes with --file; without one, send what is shown to a file")
    check(
        asked.batch_size == GenerateArguments.batch_size, "--batch-size goes with --file; all prompts go at once here"
    )
    open_console()
    trained = _load(asked)
    tokenizer = trained.tokenizer
    if asked.prompt_ids:
        ids = [_parse_ids(text, tokenizer.vocab_size) for text in asked.prompt_ids]
        texts = [tokenizer.decode(row) for row in ids]
    else:
        check(
            asked.prompt or trained.chat is None,
            f"{asked.run} answers in conversations; give what the user says with --prompt",
        )
        texts = list(asked.prompt) or [""]
        ids = [trained.prompt_ids(text) for text in texts]
    generator = make_generator(trained)  # a model that writes nothing is told before a word is shown
    n_best = asked.sampling.n_best
    stream = not asked.json and len(ids) == n_best == 1
    # A source is not what the text begins with: the text stands alone, or below it.
    source = trained.model.config.encoder_layers or trained.experiment.task.kind == "seq2seq"
    goes_on = not (source or trained.chat)
    if stream and goes_on:
        _write(texts[0])
    results = generator.generate(
        ids,
        asked.sampling,
        decode=tokenizer.decode,
        on_tokens=(lambda row, ids, text: _write(text)) if stream else None,
    )
    texts = [text for text in texts for _ in range(n_best)]
    lines = [as_json(text, result) for text, result in zip(texts, results)]
    if asked.json:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False))
    elif stream:
        _write("\n")
    else:
        for number, (text, result) in enumerate(zip(texts, results), 1):
            score = "" if result.score is None else f" (score {result.score:.4f})"
            _write(f"--- {number} of {len(results)}{score}\n{text}{'' if goes_on else chr(10)}{result.text or ''}\n")
    settings = dataclasses.asdict(asked.sampling)
    try:
        with (asked.run / "samples.jsonl").open("a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps({"step": trained.step, **line, "sampling": settings}, ensure_ascii=False) + "\n")
    except OSError as error:  # somebody else's run: the samples were shown, they are just not kept
        logging.getLogger(__name__).warning("samples were not added to %s: %s", asked.run, error.strerror)
    return DONE


def _load(asked: GenerateArguments) -> runs.Trained:
    """The run, its prompts turns of a conversation where that is asked for."""
    trained = runs.load(asked.run, runs.inference_mesh(), asked.checkpoint)
    talks = asked.chat or trained.chat is not None
    check(
        asked.system is None or talks,
        f"--system goes with conversations, and {asked.run} goes on from texts; add --chat, or leave it out",
    )
    check(
        not (asked.chat and trained.model.config.encoder_layers),
        "--chat is for decoders, and the model is an encoder-decoder; leave it out",
    )
    before = () if asked.system is None else (Message("system", asked.system),)
    return dataclasses.replace(trained, before=before) if talks else trained


def _run_file(asked: GenerateArguments, path: Path) -> int:
    """Prompts from a file, texts to another or to the terminal; the run's samples.jsonl does not get them."""
    check(asked.batch_size >= 1, f"--batch-size is {asked.batch_size}; it must be at least 1")
    as_objects = asked.json or (asked.output is not None and asked.output.suffix == ".jsonl")
    n_best = asked.sampling.n_best
    check(
        n_best == 1 or as_objects,
        f"--n-best is {n_best}, and a line of text holds one; write to a .jsonl file, or give --json",
    )
    texts = read_prompts(path)
    if asked.output is not None:
        check_output(asked.output, "--output")
    console = open_console()
    with console.status("generating") as status:
        trained = _load(asked)
        generator = make_generator(trained)
        prompts = [trained.prompt_ids(text) for text in texts]
        generator.check_prompts(prompts, lambda index: f"{path}, line {index + 1}")
        results = generator.generate(
            prompts,
            asked.sampling,
            decode=trained.tokenizer.decode,
            batch_size=asked.batch_size,
            on_batch=lambda done: status.update(f"generating {done}/{len(prompts)}"),
        )
    if as_objects:
        told = [as_json(texts[place // n_best], result) for place, result in enumerate(results)]
        lines = [json.dumps(line, ensure_ascii=False) for line in told]
    else:
        lines = [one_line(result.text or "") for result in results]
    if asked.output is not None:
        write_lines(asked.output, lines)
    else:
        for line in lines:
            print(line)
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
