"""Gathers Chinese text of four kinds into one jsonl file, a document a line, for configs/data/zh_mixed.py.

    python scripts/gather_zh.py FOLDER data/zh/mixed.jsonl

FOLDER holds the public files that each of `texts` names; which lines are dropped or changed is left to `lm prepare`.
"""

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Pairs (kind, text): running text, hotel reviews, news titles, poems."""
    with (folder / "CLUECorpusSmall_sampled.txt").open(encoding="utf-8") as file:  # dbiir/UER-py
        yield from (("running", line) for line in file)
    with (folder / "ChnSentiCorp_htl_all.csv").open(encoding="utf-8-sig", newline="") as file:
        yield from (("review", row["review"]) for row in csv.DictReader(file))  # SophonPlus/ChineseNlpCorpus
    with (folder / "thucnews_short_dev.txt").open(encoding="utf-8") as file:  # title<TAB>class
        yield from (("title", line.rpartition("\t")[0]) for line in file)
    for path in [*sorted(folder.glob("poet.tang.*.json")), folder / "songci300.json"]:  # chinese-poetry
        yield from (("poem", "\n".join(poem["paragraphs"])) for poem in json.loads(path.read_text(encoding="utf-8")))


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    asked = parser.parse_args()
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    with asked.output.open("w", encoding="utf-8") as output:
        for kind, text in texts(asked.folder):
            if text.strip():
                output.write(json.dumps({"text": text.strip(), "kind": kind}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
