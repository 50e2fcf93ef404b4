"""What a prepared dataset is made of, as a page to read before anything is trained on it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lm.data.manifest import TOKENIZER_FOLDER, Manifest, load_manifest
from lm.data.preparation import REPORT_FILE
from lm.errors import UserError, check
from lm.report.examples import cleaning, duplicates, unreadable
from lm.report.page import (
    Html,
    Section,
    bars,
    element,
    fold,
    join,
    number,
    page,
    percent,
    size,
    table,
)
from lm.report.pieces import byte_level, spelled
from lm.report.texts import shown

PAGE_FILE = "report.html"

_FILES = 50  # files listed of each source
_FREQUENT = 20

# From which shares on the page says so first.
_MUCH_LEFT_OUT = 0.5
_STRICT_RULE = 0.3
_MANY_UNKNOWN = 0.01
_MUCH_UNUSED = 0.5


def preparation_report(folder: Path) -> Path:
    """Writes `report.html` into a prepared dataset: one file that shows what went in, what was left out and why.

    Args:
      folder: the dataset, with the manifest.json and report.json that `lm.data.prepare` wrote.

    Returns:
      The file's path. Its bytes depend on the two JSON files and the tokenizer alone; a file that holds them already
      is not written again.

    Raises:
      UserError: if this is no whole dataset, or the folder can't be written.
    """
    manifest, content = load_manifest(folder), _read(folder / REPORT_FILE)
    new = _page(manifest, content, byte_level(folder / TOKENIZER_FOLDER)).encode("utf-8")
    path = folder / PAGE_FILE
    temporary = path.with_name(f".{os.getpid()}-{PAGE_FILE}")
    try:
        if not path.exists() or path.read_bytes() != new:
            temporary.write_bytes(new)
            temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; the dataset itself is whole") from error
    return path


def left_out(folder: Path) -> list[tuple[str, int]]:
    """Why documents of a prepared dataset were left out, and how many for each reason, in the order of the work.

    Raises:
      UserError: if the dataset's report.json can't be read.
    """
    return _left_out(_read(folder / REPORT_FILE))


def _left_out(content: dict[str, Any]) -> list[tuple[str, int]]:
    reading = content["reading"]
    found: dict[str, int] = {}
    for skipped in reading["skipped"].values():
        for reason, count in skipped["counts"].items():
            found[f"unreadable: {reason}"] = found.get(f"unreadable: {reason}", 0) + count
    for name, rule in reading["clean"]["rules"].items():
        found[f"cleaning: {name}"] = rule["dropped"]
    found["empty"] = sum(counts["empty"] for counts in reading["documents"].values())
    found.update(content["duplicates"]["removed"])
    return [(reason, count) for reason, count in found.items() if count]


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no report without {path}; delete the dataset's folder and run prepare again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; delete the dataset's folder and run prepare again") from None
    check(isinstance(value, dict), f"{path} holds no JSON object; delete the dataset's folder and run prepare again")
    return value


def _page(manifest: Manifest, content: dict[str, Any], in_bytes: bool) -> str:
    splits = content["splits"]
    total = {name: sum(split[name] for split in splits.values()) for name in ("documents", "tokens", "bytes")}
    subtitle = [f"Dataset {manifest.fingerprint}"]
    if manifest.licence:
        subtitle.append(f"Licence: {manifest.licence}")
    facts = [
        ("documents", number(total["documents"])),
        ("tokens", number(total["tokens"])),
        ("text (UTF-8)", size(total["bytes"])),
        ("bytes per token", _ratio(total["bytes"], total["tokens"])),
        ("vocabulary", number(manifest.vocab_size)),
    ]
    sections = [
        _first_look(manifest, content),
        _way(content),
        _splits(splits, total),
        _lengths(splits),
        unreadable(content["reading"]["skipped"]),
        cleaning(content["reading"]["clean"]),
        duplicates(content["duplicates"]),
        _ngrams(splits),
        _tokenizer(manifest, content, in_bytes),
        _origin(manifest),
    ]
    return page(
        manifest.name,
        shown(" · ".join(subtitle)),
        facts,
        [section for section in sections if section is not None],
    )


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}" if b else "–"


# The sections; None for one that has nothing to show.


def _first_look(manifest: Manifest, content: dict[str, Any]) -> Section | None:
    notes = [*_notes(manifest, content)]
    if not notes:
        return None
    return Section(
        name="first",
        title="Look here first",
        intro="What is unusual about this dataset. None of it need be wrong; all of it should be meant.",
        body=element("ul", *(element("li", note) for note in notes)),
    )


def _notes(manifest: Manifest, content: dict[str, Any]) -> Iterator[str]:
    reading = content["reading"]
    found = _found(content)
    gone = sum(count for _, count in _left_out(content))
    if gone > _MUCH_LEFT_OUT * found:
        yield f"{percent(gone, found)} of what the sources hold was left out: {number(gone)} of {number(found)}."
    for name, rule in reading["clean"]["rules"].items():
        if rule["dropped"] > _STRICT_RULE * rule["seen"]:
            yield (
                f"The cleaning rule {name} dropped {percent(rule['dropped'], rule['seen'])} of the documents that "
                "reached it."
            )
    for what, count in content["duplicates"]["across_splits"].items():
        yield f"Found across splits and removed: {number(count)} × {what}."
    for name, split in content["splits"].items():
        unknown = split["unknown_tokens"]
        if unknown is not None and unknown > _MANY_UNKNOWN * split["tokens"]:
            yield f"{percent(unknown, split['tokens'])} of the tokens in {name} are unknown to the tokenizer."
    unused = content["splits"]["train"]["unused_tokens"]
    if unused > _MUCH_UNUSED * manifest.vocab_size:
        yield (
            f"{percent(unused, manifest.vocab_size)} of the vocabulary never occurs in train: {number(unused)} "
            "embeddings that will not be trained."
        )


def _found(content: dict[str, Any]) -> int:
    reading = content["reading"]
    return sum(counts["read"] for counts in reading["documents"].values()) + sum(
        skipped["total"] for skipped in reading["skipped"].values()
    )


def _way(content: dict[str, Any]) -> Section:
    found = _found(content)
    gone = _left_out(content)
    written = sum(split["documents"] for split in content["splits"].values())
    copies = written - (found - sum(count for _, count in gone))
    rows: list[tuple[object, int]] = [("found in the sources", found), *((f"− {why}", count) for why, count in gone)]
    if copies:
        rows.append(("+ altered copies (augmentation)", copies))
    rows.append(("= written", written))
    return Section(
        name="way",
        title="From the sources to the dataset",
        intro="Every document is counted once. Look for a reason that takes more than you would have guessed: "
        "examples are further down.",
        body=bars(("documents", "text"), rows, found),
    )


def _splits(splits: dict[str, Any], total: dict[str, int]) -> Section:
    rows = [
        [
            name,
            number(split["documents"]),
            number(split["tokens"]),
            percent(split["tokens"], total["tokens"]),
            number(split["bytes"]),
            number(split["characters"]),
            f"{split['tokens'] / split['bytes']:.3f}" if split["bytes"] else "–",
        ]
        for name, split in splits.items()
    ]
    return Section(
        name="splits",
        title="Splits",
        intro="What is trained on and what it is measured on. A validation split of a few thousand tokens gives a "
        "loss that jumps about; one whose tokens per byte differ much from train's holds another kind of text.",
        body=table(
            [
                ("split", "name"),
                ("documents", "number"),
                ("tokens", "number"),
                ("share", "number"),
                ("bytes", "number"),
                ("characters", "number"),
                ("tokens per byte", "number"),
            ],
            rows,
        ),
    )


def _lengths(splits: dict[str, Any]) -> Section | None:
    counts = {name: {int(b): n for b, n in split["length_bins"].items()} for name, split in splits.items()}
    bins = sorted({b for lengths in counts.values() for b in lengths})
    if not bins:
        return None
    longest = max(count / splits[name]["documents"] for name, found in counts.items() for count in found.values())
    charts = [
        bars(
            ("characters", "name"),
            [(_bin(b), found.get(b, 0)) for b in range(bins[0], bins[-1] + 1)],
            splits[name]["documents"],
            longest=longest,
            caption=f"{name}: {splits[name]['characters'] / splits[name]['documents']:,.0f} characters on average",
        )
        for name, found in counts.items()
        if found
    ]
    return Section(
        name="lengths",
        title="Length of documents",
        intro="Documents by their number of characters; each row is twice as long as the one before. The splits "
        "should have the same shape. A heap of very short documents is often boilerplate.",
        body=element("div", *charts, class_="grid"),
    )


def _bin(exponent: int) -> str:
    low, high = 2**exponent, 2 ** (exponent + 1) - 1
    return f"{low:,} – {high:,}" if low < high else f"{low:,}"


def _ngrams(splits: dict[str, Any]) -> Section | None:
    folds = []
    for i, (name, split) in enumerate(splits.items()):
        charts = [
            bars((f"{n} in a row" if int(n) > 1 else "single", "text"), [(shown(gram), count) for gram, count in grams])
            for n, grams in split["ngrams"].items()
            if grams
        ]
        if charts:
            about = f"counted in {number(split['sampled_characters'])} of {number(split['characters'])} characters"
            folds.append(fold(name, about, element("div", *charts, class_="grid"), opened=i == 0))
    if not folds:
        return None
    return Section(
        name="ngrams",
        title="Most frequent words and phrases",
        intro="Words, or characters where a script puts no spaces between words. Look for what no person would write "
        "so often: menus, licence headers, cookie notices, leftovers of markup.",
        body=join(folds),
    )


def _tokenizer(manifest: Manifest, content: dict[str, Any], in_bytes: bool) -> Section:
    splits = content["splits"]
    vocabulary = manifest.vocab_size

    def row(what: str, cell: Callable[[dict[str, Any]], str]) -> list[object]:
        return [what, *(cell(split) for split in splits.values())]

    rows = [
        row("tokens per document", lambda split: f"{split['tokens'] / split['documents']:,.1f}"),
        row("bytes per token", lambda split: _ratio(split["bytes"], split["tokens"])),
        row("characters per token", lambda split: _ratio(split["characters"], split["tokens"])),
        row("unused vocabulary", lambda split: number(split["unused_tokens"])),
        row("… as a share", lambda split: percent(split["unused_tokens"], vocabulary)),
    ]
    known = {name: split["unknown_tokens"] for name, split in splits.items()}
    if any(count is not None for count in known.values()):
        rows.append(row("unknown tokens", lambda split: number(split["unknown_tokens"] or 0)))
        rows.append(row("… as a share", lambda split: percent(split["unknown_tokens"] or 0, split["tokens"])))
    parts = [table([("", "name"), *((name, "number") for name in splits)], rows)]
    frequent = splits["train"]["frequent_tokens"][:_FREQUENT]
    if frequent:
        labels = [shown(spelled(piece, in_bytes)) for piece, _ in frequent]
        counts = [count for _, count in frequent]
        chart = bars(("token", "text"), list(zip(labels, counts)), splits["train"]["tokens"])
        parts.append(fold("most frequent tokens in train", "", chart, opened=True))
    kind = content["tokenizer"]["kind"]
    return Section(
        name="tokenizer",
        title="Tokenizer",
        intro=f"{kind}, {number(vocabulary)} tokens, fingerprint {manifest.tokenizer_fingerprint}. More bytes per "
        "token mean shorter sequences; much unused vocabulary or many unknown tokens mean that it was made for other "
        "text.",
        body=join(parts),
    )


def _origin(manifest: Manifest) -> Section:
    parts: list[Html] = []
    for role, files in manifest.sources.items():
        total = sum(file.bytes for file in files)
        files_word = "file" if len(files) == 1 else "files"
        listing = table(
            [("file", "text"), ("bytes", "number"), ("BLAKE2b", "text")],
            [[shown(file.path), number(file.bytes), element("code", file.blake2b)] for file in files[:_FILES]],
            caption=f"the first {_FILES} of {number(len(files))}" if len(files) > _FILES else None,
        )
        about = f"{number(len(files))} {files_word}, {number(total)} bytes"
        parts.append(fold(role, about, listing))
    settings = [[name, shown(value)] for name, value in _flat(manifest.settings)]
    parts.append(fold("settings", "", table([("setting", "name"), ("value", "text")], settings)))
    if manifest.packages:
        versions = table(
            [("package", "name"), ("version", "text")], [[name, text] for name, text in manifest.packages.items()]
        )
        parts.append(fold("packages", "", versions))
    return Section(
        name="origin",
        title="Where it comes from",
        intro="The same files, settings and package versions give the same dataset, to the byte.",
        body=join(parts),
    )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        yield name, ", ".join(str(item) for item in value) or "none"
    else:
        yield name, "none" if value is None else str(value)
