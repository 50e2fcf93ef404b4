"""Texts in, texts out: prompts of many lines through a trained model, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from jax.sharding import Mesh

from lm.errors import UserError, check
from lm.generate.generator import Generation, Generator
from lm.generate.sampling import SamplingConfig
from lm.models.transformer import Transformer
from lm.text.base import Tokenizer


class Trained(Protocol):
    """What `lm.run.load` gives."""

    @property
    def model(self) -> Transformer:
        """The Transformer."""

    @property
    def params(self) -> Any:
        """Its parameters."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's."""

    @property
    def end_id(self) -> int:
        """The token that ends what it writes."""

    def prompt_ids(self, text: str) -> list[int]:
        """A text as the model wants to go on from it."""


def make_generator(trained: Trained, mesh: Mesh | None = None) -> Generator:
    """A generator of a trained run; `mesh` as in `Generator`."""
    tokenizer = trained.tokenizer
    return Generator(
        trained.model.config,
        trained.params,
        vocab_size=tokenizer.vocab_size,
        eos_id=trained.end_id,
        bos_id=tokenizer.bos_id,
        mesh=mesh,
    )


def generate_texts(
    trained: Trained,
    sources: Sequence[str],
    sampling: SamplingConfig,
    batch_size: int = 32,
    *,
    mesh: Mesh | None = None,
    name: Callable[[int], str] = lambda index: f"prompt {index}",
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """What a trained model writes to each source, to be scored against references (`lm.text.scores`).

    Args:
      trained: from `lm.run.load`.
      sources: what an encoder reads, or a prompt.
      sampling: how to choose tokens; of a beam search the best text counts.
      batch_size: sources at a time, those of like lengths together; it changes no text (see `Generator.generate`).
      mesh: where the parameters lie; None = on one device.
      name: how a mistake names a source, from its index.
      on_batch: called with the number of sources done.

    Returns:
      One text each, in order, without the source.

    Raises:
      UserError: a source that is too long for the model, or `n_best` above 1.
    """
    check(sampling.n_best == 1, f"n_best is {sampling.n_best}, but each source gets one text; leave it out")
    prompts = [trained.prompt_ids(text) for text in sources]
    generator = make_generator(trained, mesh)
    generator.check_prompts(prompts, name)
    found = generator.generate(
        prompts, sampling, decode=trained.tokenizer.decode, batch_size=batch_size, on_batch=on_batch
    )
    return [one.text or "" for one in found]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: its lines, or in `.jsonl` what each object holds under `prompt`.

    Raises:
      UserError: no such file, nothing in it, bytes that are not UTF-8, or a line without a prompt.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise UserError(f"can't read the prompts in {path}: {error.strerror}") from None
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    check(text, f"{path} is empty; write one prompt a line")
    if path.suffix != ".jsonl":
        return lines
    return [_prompt_of(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _prompt_of(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); each line is an object with a text under 'prompt'") from None
    prompt = found.get("prompt") if isinstance(found, dict) else None
    check(isinstance(prompt, str), f"{where}: no text under 'prompt'; each line is an object with one")
    assert isinstance(prompt, str)
    return prompt


def check_output(path: Path, option: str) -> None:
    """Raises `UserError` where a file of the name given with `option` can't be made, or is there already."""
    check(not path.exists(), f"{path} exists; name another file with {option}, or remove it")
    check(path.parent.is_dir(), f"there is no folder {path.parent} for {option} {path.name}; make it first")


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Writes a file that is whole or not there.

    Raises:
      UserError: whatever the disk says.
    """
    unfinished = path.with_name(f".{path.name}.incomplete")
    try:
        unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"can't write {path}: {error.strerror}") from None


def one_line(text: str) -> str:
    """A text in one line: a new line as `\\n`, a carriage return as `\\r`, and so a backslash as two."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def as_json(prompt: str, made: Generation) -> dict[str, Any]:
    """What is told of a generation where everything is."""
    told = {
        "prompt": prompt,
        "prompt_ids": made.prompt_ids,
        "ids": made.ids,
        "text": made.text,
        "logprobs": [round(value, 6) for value in made.logprobs],
        "finished": made.finished,
    }
    return told if made.score is None else told | {"score": round(made.score, 6)}
