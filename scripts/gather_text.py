"""Gathers text to pretrain on into a folder, a document a line, for configs/finetune/english.py and chinese.py.

    python scripts/gather_text.py english FOLDER data/english
    python scripts/gather_text.py chinese FOLDER data/chinese

FOLDER holds the public files that the functions `english` and `chinese` name. The sentences of SST-2's training split,
which are a thirtieth of the English text, are written eight times, without their classes: a model is to be fine-tuned
on their like. Nothing of its validation and test splits is read.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

COPIES = 8


def read(path: Path) -> list[str]:
    """The lines of a file."""
    return path.read_text(encoding="utf-8").split("\n")


def english(folder: Path) -> dict[str, Iterable[str]]:
    """Lines by the name of the file that they go to."""
    stories = [json.loads(line) for line in read(folder / "lambada" / "lambada_openai.first2500.jsonl") if line]
    articles = json.loads((folder / "qa" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    return {
        "wikitext2": read(folder / "wikitext2" / "train.txt"),  # pytorch/examples
        "ptb": read(folder / "ptb" / "ptb.train.txt"),  # Mikolov's preprocessing
        "multi30k": read(folder / "multi30k" / "train.en"),  # multi30k/dataset
        "lambada": "\n".join(f"{story['context']} {story['continuation']}" for story in stories).split("\n"),
        "xquad": [paragraph["context"] for article in articles for paragraph in article["paragraphs"]],
        "sst2": [line.partition("\t")[0] for line in read(folder / "sst2" / "train.tsv")] * COPIES,
    }


def chinese(folder: Path) -> dict[str, Iterable[str]]:
    """Lines by the name of the file that they go to."""
    return {
        "clue": read(folder / "zh" / "CLUECorpusSmall_sampled.txt"),
        "titles": [line.partition("\t")[0] for line in read(folder / "zh" / "thucnews_short_dev.txt")],  # no classes
    }


def main() -> None:
    """Writes the files."""
    languages = {gather.__name__: gather for gather in (english, chinese)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("language", choices=languages)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    asked = parser.parse_args()
    try:
        texts = languages[asked.language](asked.folder)
    except FileNotFoundError as error:
        parser.error(f"{error.filename} is missing; FOLDER is to hold every file that this script names")
    asked.output.mkdir(parents=True, exist_ok=True)
    for name, lines in texts.items():
        stripped = (line.strip() for line in lines)
        (asked.output / f"{name}.txt").write_text("".join(f"{line}\n" for line in stripped if line), encoding="utf-8")


if __name__ == "__main__":
    main()
