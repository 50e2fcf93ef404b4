"""Measures cleaning: articles out of web pages, encodings, languages, and each rule's speed. Prints Markdown tables.

    python scripts/bench_clean.py --data DATA

DATA holds noisy_html/, zh/, multi30k/, qa/ and wikitext2/ as docs/results/cleaning.md describes them.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import charset_normalizer
import trafilatura

TESTS = Path(__file__).resolve().parents[1] / "tests" / "text"
sys.path.insert(0, str(TESTS))

from advert_pages import pages  # noqa: E402 - beside the tests that share it
from test_html import f1, left_over, visible  # noqa: E402

from lm.text.clean import RULES, CleanConfig, Cleaner  # noqa: E402
from lm.text.encoding import decode  # noqa: E402
from lm.text.language import identify  # noqa: E402

SIZES = (50, 200, 1000, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=2.0, help="text for each speed")
    arguments = parser.parse_args()
    html(arguments.data)
    encodings(arguments.data)
    languages(arguments.data)
    speeds(arguments.data, arguments.megabytes)


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    heads = list(heads)
    print("\n| " + " | ".join(heads) + " |\n|---|" + "---:|" * (len(heads) - 1))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def html(data: Path) -> None:
    def plain(page: str) -> str:
        return trafilatura.extract(page) or ""

    def without_comments(page: str) -> str:
        return trafilatura.extract(page, include_comments=False) or ""

    cleaner = Cleaner(CleanConfig(rules=("html",)))
    ways: dict[str, Callable[[str], str]] = {
        "trafilatura, out of the box": plain,
        "trafilatura, no comments": without_comments,
        "rule html": lambda page: cleaner(page) or "",
    }
    truth = json.loads((data / "noisy_html/ground-truth.json").read_text("utf-8"))
    real = {name: (data / f"noisy_html/html/{name}.html").read_bytes().decode("utf-8", "replace") for name in truth}
    rows = []
    for name, extract in ways.items():
        row: list[object] = [name, f"{mean(f1(extract(real[k]), truth[k]['articleBody']) for k in truth):.4f}"]
        for group in ("interruptions", "unseen"):
            made = pages(group)
            row.append(f"{mean(made_f1(extract, page) for page in made):.4f}")
            row.append(f"{sum(left_over(extract, page) < 0.05 for page in made)} of {len(made)}")
        traps = pages("traps")
        row.append(f"{sum(not visible(page.article) - found(extract, page) for page in traps)} of {len(traps)}")
        rows.append(row)
    heads = ["", "25 real pages, F1", "made, F1", "made, gone", "unseen, F1", "unseen, gone", "traps, whole"]
    table(heads, rows)
    left = {
        (page.kind, page.language): [left_over(way, page) for way in ways.values()] for page in pages("interruptions")
    }
    kinds = list(dict.fromkeys(kind for kind, _ in left))
    columns = [(language, way) for language in ("en", "zh") for way in (1, 2)]
    table(
        ["left of the interruption", "en, trafilatura", "en, rule", "zh, trafilatura", "zh, rule"],
        ([kind, *(f"{left[kind, language][way]:.0%}" for language, way in columns)] for kind in kinds),
    )


def found(extract: Callable[[str], str], page: object) -> Counter[str]:
    return visible(extract(page.html)) if extract(page.html) else Counter()


def made_f1(extract: Callable[[str], str], page: object) -> float:
    a, b = found(extract, page), visible(page.article)
    return 2 * (a & b).total() / (a.total() + b.total())


def encodings(data: Path) -> None:
    chinese = [x for x in (data / "zh/CLUECorpusSmall_sampled.txt").read_text("utf-8").splitlines() if len(x) > 60]
    titles = [x.split("\t")[0] for x in (data / "zh/thucnews_short_dev.txt").read_text("utf-8").splitlines()]
    poems = ["\n".join(x["paragraphs"]) for x in json.loads((data / "zh/poet.tang.0.json").read_text("utf-8"))]
    german = (data / "multi30k/val.de").read_text("utf-8").splitlines()
    sets = {
        ("modern Chinese", "gb18030"): chinese,
        ("news titles", "gb18030"): ["\n".join(titles[i : i + 50]) for i in range(0, len(titles), 50)],
        ("modern Chinese", "utf-16-le"): chinese,
        ("Tang poems", "gb18030"): ["\n".join(poems[i : i + 15]) for i in range(0, len(poems), 15)],
        ("Tang poems", "big5hkscs"): ["\n".join(poems[i : i + 15]) for i in range(0, len(poems), 15)],
        ("German captions", "latin-1"): ["\n".join(german[i : i + 15]) for i in range(0, len(german), 15)],
    }
    rows = []
    for (name, codec), documents in sets.items():
        row: list[object] = [f"{name}, {codec}"]
        for size in SIZES:
            ours, theirs, total = 0, 0, 0
            for document in documents[:200]:
                content = document.encode(codec, errors="ignore")
                if size is not None and len(content) < size:
                    continue
                text = content[:size].decode(codec, errors="ignore")
                if text.isascii():
                    continue
                content = text.encode(codec)
                total += 1
                ours += decode(content, "auto")[0] == text
                best = charset_normalizer.from_bytes(content).best()
                theirs += best is not None and str(best) == text
            row.append(f"{ours / total:.1%} ({theirs / total:.1%})" if total else "")
        rows.append(row)
    table(["decoded exactly; in parentheses charset-normalizer", "50 bytes", "200", "1,000", "whole"], rows)


def languages(data: Path) -> None:
    articles = json.loads((data / "qa/xquad.en.json").read_text("utf-8"))["data"]
    sets = {
        ("multi30k captions", "de"): (data / "multi30k/val.de").read_text("utf-8").splitlines(),
        ("multi30k captions", "en"): (data / "multi30k/val.en").read_text("utf-8").splitlines(),
        ("xquad paragraphs", "en"): [p["context"] for article in articles for p in article["paragraphs"]],
        ("news titles", "zh"): [
            x.split("\t")[0] for x in (data / "zh/thucnews_short_dev.txt").read_text("utf-8").splitlines()
        ],
        ("CLUE documents", "zh"): (data / "zh/CLUECorpusSmall_sampled.txt").read_text("utf-8").splitlines(),
    }
    rows = []
    for (name, code), texts in sets.items():
        codes = Counter(identify(text)[0] for text in texts)
        wrong = ", ".join(f"{other} {count}" for other, count in codes.most_common(5) if other != code)
        rows.append([f"{name}, {code}", len(texts), f"{codes[code] / len(texts):.1%}", wrong])
    table(["", "texts", "right", "taken for"], rows)


def speeds(data: Path, megabytes: float) -> None:
    articles = (data / "wikitext2/train.txt").read_text("utf-8").split(" \n = ")
    sets = {
        "English": articles,
        "Chinese": (data / "zh/CLUECorpusSmall_sampled.txt").read_text("utf-8").splitlines(),
    }
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder) / "words.txt"
        words.write_text("".join(f"word{i}\n赌{chr(0x4E00 + i)}场\n" for i in range(2000)), encoding="utf-8")
        rows = []
        for name in RULES:
            row: list[object] = [name]
            for texts in sets.values():
                documents = []
                for text in texts:
                    documents.append(
                        f"<html><body><article><p>{text}</p></article></body></html>" if name == "html" else text
                    )
                    if sum(map(len, documents[-50:])) and sum(len(x) for x in documents) > megabytes * 1e6:
                        break
                config = CleanConfig(
                    rules=(name,),
                    languages=("en", "zh") if name == "language" else (),
                    blocked_words=str(words) if name == "blocked_words" else None,
                )
                Cleaner(config)(texts[0])  # models and tables are loaded
                cleaner = Cleaner(config)
                start = time.process_time()
                for document in documents:
                    cleaner(document)
                seconds = time.process_time() - start
                report = cleaner.report.rules[name]
                size = sum(len(document.encode("utf-8")) for document in documents)
                row += [f"{size / 1e6 / seconds:,.1f}", f"{report.changed / report.seen:.1%}"]
                row += [f"{report.dropped / report.seen:.1%}"]
            rows.append(row)
    heads = [f"{language}, {what}" for language in sets for what in ("MB/s", "changed", "dropped")]
    table(["rule", *heads], rows)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
