"""Text to a tokenised dataset on disk, in TFDS's ArrayRecord format (`lm.data.manifest` describes the folder).

Reading and cleaning, deduplication, tokenising and writing are stages of independent tasks (`lm.data.stages`) that run
here, in several processes or on Apache Beam (`lm.data.runners`); memory grows with a few numbers per document. The
dataset depends on the text and the settings alone, to the byte, and appears under its name only when all of it is on
disk (`lm.data.atomic`); a preparation that was killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.atomic import Workspace, check_writable, resumable_folder
from lm.data.config import DataConfig
from lm.data.corpus import Corpus, split_code
from lm.data.duplicates import Found, remove_duplicates
from lm.data.manifest import (
    DATASET_VERSION,
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_FOLDER,
    Manifest,
    SourceFile,
    load_manifest,
    save_manifest,
)
from lm.data.parts import as_one_text, check_parts, classes_of, is_chat, is_joined, sorted_labels
from lm.data.preparation import REPORT_FILE, duplicates_report, reading_report, split_report
from lm.data.runners import RunnerConfig, Task, check_runner_config, run_tasks, whole_output
from lm.data.sources import (
    Source,
    check_source_config,
    fingerprint_file,
    form_of,
    open_source,
    shaping,
)
from lm.data.stages import (
    REMOVED,
    ReadUnit,
    WriteShard,
    read_shard,
    split_of,
)
from lm.data.writer import finish_dataset
from lm.errors import UserError, check
from lm.text.augment import AugmentConfig, augment_fingerprint, check_augment_config
from lm.text.chat import check_chat_config, template_for
from lm.text.clean import RULES, CleanConfig, check_clean_config
from lm.text.dedup import DedupConfig, check_dedup_config
from lm.text.filters import read_blocked_words
from lm.text.template import ChatTemplate
from lm.text.tokenizer import (
    Tokenizer,
    TokenizerConfig,
    check_tokenizer_config,
    is_trained,
    load_tokenizer,
    shaping_settings,
    train_tokenizer,
)

__all__ = ["REPORT_FILE", "Progress", "prepare", "split_of"]

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]
"""Called now and then with a phase ("fingerprint", "wait", "read", "deduplicate", "train tokenizer", "tokenize"), what
is done and the total; both in bytes, the total None where nobody knows it."""

# Work is cut by size, never by the number of workers. A larger corpus gets larger pieces, so that no stage has more
# than some thousands of them.
_UNIT_BYTES = 32 << 20
_SHARD_BYTES = 32 << 20
_MOST_PIECES = 4096

_PACKAGES = (
    "tokenizers",
    "sentencepiece",
    "jieba",
    "ftfy",
    "trafilatura",
    "opencc-python-reimplemented",
    "charset-normalizer",
    "py3langid",
)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Everything that shapes a dataset."""

    data: DataConfig
    tokenizer: TokenizerConfig
    clean: CleanConfig
    dedup: DedupConfig
    augment: AugmentConfig


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    progress: Progress | None = None,
    *,
    clean: CleanConfig | None = None,
    dedup: DedupConfig | None = None,
    augment: AugmentConfig | None = None,
    runner: RunnerConfig | None = None,
    min_tokens: int = 1,
) -> Path:
    """Makes sure that the dataset these settings describe is on disk.

    Args:
      data: where text comes from, how it is split, and where datasets live (`root`, `name`).
      tokenizer: which tokenizer; trained kinds learn from the training split.
      progress: told how far things are.
      clean: the rules every document goes through; none by default.
      dedup: which duplicates are removed; none by default.
      augment: altered copies of training documents; none by default.
      runner: where the work is done, in this process by default; no part of the dataset.
      min_tokens: a new dataset whose training split has fewer is refused and not left behind.

    Returns:
      Its folder, `root/name/FINGERPRINT/1.0.0`. The fingerprint covers the settings that shape the dataset and the
      content of the source files, so that the same text and settings find the folder of last time, and any change
      makes a new one.

    Raises:
      UserError: for settings or text that cannot be used, an empty training split, or a disk that cannot be written.
    """
    report = progress or (lambda phase, done, total: None)
    settings = _Settings(
        data=data,
        tokenizer=tokenizer,
        clean=clean or CleanConfig(),
        dedup=dedup or DedupConfig(),
        augment=augment or AugmentConfig(),
    )
    runner = runner or RunnerConfig()
    _check_settings(settings)
    check_runner_config(runner)
    sources = {
        role: open_source(form, data)
        for role in ("source", "validation_source", "test_source")
        if (form := getattr(data, role)) is not None
    }
    _check_held_out_files(data, sources)
    _check_root(data)
    # A tokenizer that is brought along shapes the dataset as much as the text does.
    brought = None if is_trained(tokenizer) else train_tokenizer(tokenizer, ())
    check_chat_config(data.chat, brought)
    seen = _modified(sources)
    files = _fingerprint_sources(sources, report)
    fingerprint = _fingerprint(settings, brought, files)

    folder = Path(data.root).expanduser() / data.name / fingerprint / DATASET_VERSION
    if folder.exists():
        load_manifest(folder)
        return folder
    if "html" not in settings.clean.rules and any(form_of(getattr(data, role)) == "html" for role in sources):
        log.warning("the tags of html: sources stay in the text; --clean.rules html takes the article out of a page")
    try:
        with resumable_folder(folder.absolute(), lambda: report("wait", 0, None)) as space:
            if space is not None:
                _build(space, settings, brought, sources, files, fingerprint, runner, report, min_tokens)
                _check_unchanged(seen, _modified(sources))
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return folder


def _cannot_write(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or " ".join(str(error).split())
    return UserError(f"cannot write the dataset in {folder}: {reason}; free space or set data.root")


def _check_held_out_files(data: DataConfig, sources: dict[str, Source]) -> None:
    """Raises `UserError` if a file that is measured on is trained on, too."""
    trained = _own_files(sources["source"], data.source)
    for role, source in sources.items():
        both = sorted(trained & _own_files(source, getattr(data, role))) if role != "source" else []
        if both:
            more = f" and {len(both) - 1} more" if len(both) > 1 else ""
            raise UserError(
                f"data.source {data.source!r} and data.{role} {getattr(data, role)!r} both read {both[0]}{more}; "
                f"name other files for one, or leave out data.{role}: a part of data.source is then held out"
            )


def _own_files(source: Source, name: str) -> set[Path]:
    """The files that a source reads whole; of a library's it may read a slice."""
    if form_of(name) in ("tfds", "hf"):
        return set()
    return {path.resolve() for _, path in source.files()}


def _check_root(data: DataConfig) -> None:
    """Raises `UserError` if no dataset can be written, before any text is read."""
    folder = Path(data.root).expanduser() / data.name
    if any(folder.glob(f"*/{DATASET_VERSION}")):
        return  # perhaps the very one: it may lie where nobody may write
    try:
        check_writable(folder.absolute())
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _check_settings(settings: _Settings) -> None:
    check_tokenizer_config(settings.tokenizer)
    check_clean_config(settings.clean)
    check_dedup_config(settings.dedup)
    check_augment_config(settings.augment)
    data = settings.data
    check(
        not data.mixture.datasets,
        "data.mixture names prepared datasets; prepare each of them, without it",
    )
    check_source_config(data)
    check_parts(data, settings.dedup, settings.augment, settings.clean)
    check(
        re.fullmatch(r"[a-z][a-z0-9_]*", data.name),
        f"data.name is {data.name!r}; use lower-case letters, digits and _, and start with a letter",
    )
    check(
        data.document in ("file", "paragraph", "line"),
        f"data.document is {data.document!r}; choose file, paragraph or line",
    )
    validation, test = data.validation_fraction, data.test_fraction
    check(
        validation >= 0 and test >= 0 and validation + test < 1,
        f"data.validation_fraction is {validation} and data.test_fraction {test}; "
        "both must be at least 0 and their sum below 1",
    )


def _fingerprint_sources(sources: dict[str, Source], report: Progress) -> dict[str, list[SourceFile]]:
    found = {role: source.files() for role, source in sources.items()}
    total = sum(_size(path) for files in found.values() for _, path in files)
    done = 0
    fingerprints: dict[str, list[SourceFile]] = {}
    for role, files in found.items():
        fingerprints[role] = []
        for key, path in files:
            fingerprints[role].append(fingerprint_file(key, path))
            done += fingerprints[role][-1].bytes
            report("fingerprint", done, total)
    return fingerprints


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _modified(sources: dict[str, Source]) -> dict[Path, int]:
    """When each source file was last written, in nanoseconds; -1 if it is gone."""
    paths = [path for source in sources.values() for _, path in source.files()]
    return {path: path.stat().st_mtime_ns if path.exists() else -1 for path in paths}


def _check_unchanged(before: dict[Path, int], after: dict[Path, int]) -> None:
    for path, modified in before.items():
        check(after.get(path) == modified, f"{path} changed while it was read; run prepare again")


def _fingerprint(settings: _Settings, brought: Tokenizer | None, files: dict[str, list[SourceFile]]) -> str:
    """12 hex digits over what shapes the dataset; settings without effect are left out."""
    data = settings.data
    shape: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "forms": {role: form_of(getattr(data, role)) for role in files},
        "files": {role: [dataclasses.astuple(file) for file in listed] for role, listed in files.items()},
    }
    for role in files:
        shape |= shaping(getattr(data, role), data)
    shape["held_out"] = [
        data.validation_fraction if data.validation_source is None else 0,
        data.test_fraction if data.test_source is None else 0,
    ]
    if any(shape["held_out"]):
        shape["split_seed"] = data.split_seed
    if data.licence:
        shape["licence"] = data.licence
    shape["tokenizer"] = brought.fingerprint() if brought else shaping_settings(settings.tokenizer)
    if brought is not None and (template := template_for(data.chat, brought)) is not None:
        shape["chat_template"] = [template.source, dict(template.tokens)]
    shape["clean"] = _clean_shape(settings.clean)
    dedup = settings.dedup
    shape["dedup"] = dataclasses.asdict(dedup) if dedup.exact or dedup.near or dedup.lines else {}
    shape["augment"] = augment_fingerprint(settings.augment)
    return hashlib.blake2b(json.dumps(shape, sort_keys=True).encode("utf-8"), digest_size=6).hexdigest()


def _clean_shape(clean: CleanConfig) -> dict[str, Any]:
    """The rules, the options they read, and the blocked words themselves."""
    if not clean.rules:
        return {}
    values = {option: getattr(clean, option) for name in clean.rules for option in RULES[name].options}
    if values.get("blocked_words") is not None:
        values["blocked_words"] = read_blocked_words(Path(values["blocked_words"]))
    return {"rules": list(clean.rules), **values}


def _build(
    space: Workspace,
    settings: _Settings,
    brought: Tokenizer | None,
    sources: dict[str, Source],
    files: dict[str, list[SourceFile]],
    fingerprint: str,
    runner: RunnerConfig,
    report: Progress,
    min_tokens: int,
) -> None:
    """Makes the whole dataset in `space.result`; whatever is there from an interrupted attempt is used."""
    units = space.work / "units"
    template = template_for(settings.data.chat, brought) if brought is not None else None
    reading_tasks = _reading_tasks(units, settings, sources, template)
    run_tasks(reading_tasks, runner, lambda done, total: report("read", done, total))
    corpus = Corpus(units)
    found = remove_duplicates(space.work, corpus, settings.dedup, runner, report)
    _check_training_split(found.fate, corpus, settings.data)

    tokenizer = _tokenizer(space.result / TOKENIZER_FOLDER, settings, brought, corpus, found, report)
    labels = _labels(corpus, found, settings.data)
    writing = _writing_tasks(space, corpus, found, settings, labels)
    tasks = [task for listed in writing.values() for task in listed]
    run_tasks(tasks, runner, lambda done, total: report("tokenize", done, total))
    written = {split: [read_shard(task.output) for task in listed] for split, listed in writing.items()}
    splits = finish_dataset(
        space.result, settings.data.name, {split: [shard for shard, _, _ in read] for split, read in written.items()}
    )
    tokens = splits["train"].tokens
    check(
        tokens >= min_tokens,
        f"the training split has {tokens} tokens, fewer than the {min_tokens} that one sequence takes (data.seq_len "
        f"{settings.data.seq_len}); lower data.seq_len or add text",
    )

    reading = reading_report(corpus)
    removed = {
        "unreadable": sum(part["total"] for part in reading["skipped"].values()),
        "cleaning": sum(counts["dropped"] for counts in reading["documents"].values()),
        **found.removed,
    }
    content = {
        "reading": reading,
        "duplicates": duplicates_report(corpus, found.first, found.exact, found.removed, found.lines),
        "splits": {
            split: split_report(splits[split], [(statistics, counts) for _, statistics, counts in read], tokenizer)
            for split, read in written.items()
        },
        "tokenizer": {"kind": settings.tokenizer.kind, "vocab_size": tokenizer.vocab_size},
    }
    (space.result / REPORT_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    manifest = Manifest(
        name=settings.data.name,
        format_version=FORMAT_VERSION,
        fingerprint=fingerprint,
        settings={name: _shaping(value) for name, value in vars(settings).items()},
        splits=splits,
        skipped_documents=sum(counts["empty"] for counts in reading["documents"].values()),
        removed_documents={reason: count for reason, count in removed.items() if count},
        licence=settings.data.licence,
        packages={name: version for name in _PACKAGES if (version := _version(name))},
        sources=files,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        labels=list(labels),
        files={path.relative_to(space.result).as_posix(): path.stat().st_size for path in _files_below(space.result)},
    )
    save_manifest(manifest, space.result)


def _shaping(settings: Any) -> dict[str, Any]:
    """The settings as JSON; of `DataConfig` those that shape the dataset, the others are about reading it."""
    if not isinstance(settings, DataConfig):
        return dataclasses.asdict(settings)
    roles = {
        role: source for role in ("source", "validation_source", "test_source") if (source := getattr(settings, role))
    }
    values = {name: getattr(settings, name) for name in ("validation_fraction", "test_fraction", "split_seed")}
    return (
        roles | values | {name: value for source in roles.values() for name, value in shaping(source, settings).items()}
    )


def _reading_tasks(
    units: Path, settings: _Settings, sources: dict[str, Source], template: ChatTemplate | None
) -> list[Task]:
    total = sum(_size(path) for source in sources.values() for _, path in source.files())
    target = max(_UNIT_BYTES, total // _MOST_PIECES)
    tasks: list[Task] = []
    for role, source in sources.items():
        for unit in source.units(target):
            tasks.append(
                ReadUnit(
                    output=units / f"{len(tasks):06d}",
                    size=unit.bytes,
                    role=role,
                    form=getattr(settings.data, role),
                    unit=unit,
                    data=settings.data,
                    clean=settings.clean,
                    dedup=settings.dedup,
                    template=template,
                )
            )
    return tasks


def _check_training_split(fate: np.ndarray, corpus: Corpus, data: DataConfig) -> None:
    there = {split: int((fate == split_code(split)).sum()) for split in SPLITS}
    if not there["train"]:
        held_out = sum(there[split] for split in SPLITS if getattr(data, f"{split}_source", None) is None)
        if held_out:
            raise UserError(
                f"the training split is empty: the {held_out} documents of data.source {data.source!r} were all held "
                "out; make more documents (data.document) or lower data.validation_fraction and data.test_fraction"
            )
        reading = reading_report(corpus)
        counts, skipped = reading["documents"].get("source", {}), reading["skipped"].get("source", {})
        reasons = [f"{count} left out: {reason}" for reason, count in skipped.get("counts", {}).items()]
        reasons += [f"{counts['dropped']} dropped by cleaning"] if counts.get("dropped") else []
        reasons += [f"{count} removed as duplicates"] if (count := int((fate == REMOVED).sum())) else []
        if reasons:
            remedy = "look at what was left out, and at the settings that say so"
            example = next((found[0] for found in skipped.get("examples", {}).values() if found), None)
            remedy += f"; the first: {example}" if example else ""
        else:
            remedy = "name another source"
        reasons += [f"{count} empty documents"] if (count := counts.get("empty", 0)) else []
        why = ", ".join(reasons) or "its files are empty"
        raise UserError(f"data.source {data.source!r} holds no text ({why}); {remedy}")
    for split in ("validation", "test"):
        source = getattr(data, f"{split}_source")
        check(
            source is None or there[split],
            f"data.{split}_source {source!r} holds no text; name another source or leave it out",
        )


def _tokenizer(
    folder: Path,
    settings: _Settings,
    brought: Tokenizer | None,
    corpus: Corpus,
    found: Found,
    report: Progress,
) -> Tokenizer:
    """The tokenizer, saved in `folder`; trained on the training split as it will be written, without copies."""
    if not folder.exists():
        tokenizer = brought or train_tokenizer(settings.tokenizer, _training_texts(settings, corpus, found, report))
        # A dataset of conversations remembers how they were written, for whoever goes on with them.
        tokenizer.chat_template = template_for(settings.data.chat, tokenizer) or tokenizer.chat_template
        with whole_output(folder) as part:
            tokenizer.save(part)
    return load_tokenizer(folder)


def _training_texts(settings: _Settings, corpus: Corpus, found: Found, report: Progress) -> Iterator[str]:
    joined, chat = is_joined(settings.data), is_chat(settings.data)
    done, total = 0, 0
    for unit, offset in zip(corpus.units, corpus.offsets):
        total += int(unit.sizes()[found.fate[offset : offset + len(unit)] == split_code("train")].sum())
    total = min(total, settings.tokenizer.training_bytes)
    for ordinal, _, text in corpus.documents(0, len(corpus)):
        if found.fate[ordinal] == split_code("train"):
            yield as_one_text(text, chat=chat) if joined else text
            done += len(text.encode("utf-8"))
            report("train tokenizer", min(done, total), total)


def _labels(corpus: Corpus, found: Found, data: DataConfig) -> tuple[str, ...]:
    """The classes in order of id: those that are named, or those of the training split."""
    if data.labels or data.label_field is None:
        return data.labels
    names: set[str] = set()
    for unit, offset in zip(corpus.units, corpus.offsets):
        mine = unit.column("label")[found.fate[offset : offset + len(unit)] == split_code("train")]
        for label in np.unique(mine):
            names.update(classes_of(unit.summary["labels"][label], data))
    said = f"all training documents have the class {next(iter(names), None)!r}"
    if data.label_separator is not None:
        said = f"the training documents have {f'no class but {min(names)!r}' if names else 'no class at all'}"
    check(
        len(names) > 1,
        f"{said} (data.label_field {data.label_field!r}); a classifier needs two or more",
    )
    return sorted_labels(names)


def _writing_tasks(
    space: Workspace, corpus: Corpus, found: Found, settings: _Settings, labels: tuple[str, ...]
) -> dict[str, list[WriteShard]]:
    """Cuts each split into shards of about equal bytes of text, at documents."""
    sizes = np.concatenate([np.zeros(0, np.int64), *(unit.sizes() for unit in corpus.units)])
    tasks: dict[str, list[WriteShard]] = {}
    for split in SPLITS:
        (mine,) = np.nonzero(found.fate == split_code(split))
        if not len(mine):
            continue
        ends = np.cumsum(sizes[mine])
        target = max(_SHARD_BYTES, int(ends[-1]) // _MOST_PIECES)
        # A document belongs to the shard in which it begins; a shard that none begins in is left out.
        of = (ends - sizes[mine]) // target
        starts = np.flatnonzero(np.diff(of, prepend=-1))
        stops = np.append(starts[1:], len(mine))
        tasks[split] = [
            WriteShard(
                output=space.work / "shards" / f"{split}-{number:05d}",
                size=int(sizes[mine[start:stop]].sum()),
                units=space.work / "units",
                fate=found.fate_file,
                dropped_lines=found.dropped_lines,
                dataset=space.result,
                name=settings.data.name,
                split=split,
                number=number,
                count=len(starts),
                first=int(mine[start]),
                last=int(mine[stop - 1]) + 1,
                dedup=settings.dedup,
                augment=settings.augment,
                data=settings.data,
                labels=labels,
            )
            for number, (start, stop) in enumerate(zip(starts, stops))
        ]
    return tasks


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
