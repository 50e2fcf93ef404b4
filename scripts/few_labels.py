"""Writes the rows of a CSV file by the splits of a dataset that was prepared of it, few of them to train on.

    lm prepare CONFIG.py --export jsonl.zst --export-to data/splits
    python scripts/few_labels.py data/rows.csv data/splits 250 data/few

gives data/few/train.csv with 250 rows of the training split, drawn at random (--seed), and validation.csv and test.csv
with all of theirs: what was held out of the dataset, and of what was pretrained on it, stays held out.
"""

import argparse
import csv
import json
import random
from pathlib import Path

import zstandard


def rows_by_number(path: Path) -> tuple[list[str], dict[int, list[str]]]:
    """The header of a CSV file, and its rows by number, as the keys of documents have them: the header's is 1."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return header, dict(enumerate(rows, 2))


def numbers_of(split: Path) -> list[int]:
    """Where the documents of an exported split stood, from their keys `FILE:ROW`."""
    with zstandard.open(split, "rt", encoding="utf-8") as file:
        return [int(json.loads(line)["key"].rpartition(":")[2]) for line in file]


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the CSV file, with a header")
    parser.add_argument("splits", type=Path, help="the dataset of it, as `lm prepare --export jsonl.zst` wrote it")
    parser.add_argument("count", type=int, help="rows to train on")
    parser.add_argument("output", type=Path, help="a folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of their draw")
    asked = parser.parse_args()
    header, rows = rows_by_number(asked.source)
    asked.output.mkdir(parents=True)
    for name in ("train", "validation", "test"):
        numbers = numbers_of(asked.splits / f"{name}.jsonl.zst")
        if name == "train":
            numbers = random.Random(asked.seed).sample(numbers, asked.count)
        with (asked.output / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *(rows[number] for number in numbers)])


if __name__ == "__main__":
    main()
