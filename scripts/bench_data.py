"""Speed and memory of preparing data, part by part and as a whole, as Markdown tables.

    python scripts/bench_data.py                                  100 MB: every part in one process and in two, minutes
    python scripts/bench_data.py --megabytes 2000 --whole-only    the whole preparation, its time and peak memory

The corpus is made: documents of 5 to 40 sentences each, a quarter of them Chinese, drawn (seeded) from the texts in
`../shared/data`, or from the standard library's source where that is absent. Two of a hundred documents are copies.
Parts are timed in processes of their own that start together; MB are 10^6 bytes of UTF-8 text.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from lm.data.config import DataConfig
from lm.data.prepare import prepare
from lm.data.runners import RunnerConfig
from lm.data.sources import documents
from lm.data.store import DatasetStore
from lm.data.writer import DatasetWriter
from lm.text.clean import CleanConfig, Cleaner
from lm.text.dedup import DedupConfig, band_keys, exact_hashes, line_hashes, signatures
from lm.text.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
CLEAN = CleanConfig(
    rules=("nfc", "control", "whitespace", "mask_urls", "mask_emails", "length", "symbols", "repeated_lines")
)
DEDUP = DedupConfig(exact=True, near=True, lines=True)
BATCH = 1 << 20  # characters tokenised together, as preparing does
PARTS = ("read", "clean", "hash for dedup", "tokenise", "tokenise, library alone", "write", "read tokens")


def sentences() -> tuple[list[str], list[str]]:
    """English (or source code) and Chinese sentences to draw from."""
    english: list[str] = []
    chinese: list[str] = []
    if DATA.exists():
        for path in (DATA / "wikitext2" / "train.txt", DATA / "tinyshakespeare" / "input.txt"):
            english += [s for s in re.split(r"(?<=[.?!])\s+", path.read_text("utf-8")) if 20 < len(s) < 400]
        text = (DATA / "zh" / "CLUECorpusSmall_sampled.txt").read_text("utf-8")
        chinese = [s for s in re.split(r"(?<=[。！？])", text) if 8 < len(s) < 200]
    else:
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            english += [line for line in path.read_text("utf-8", errors="ignore").splitlines() if 20 < len(line) < 400]
    return english, chinese or english


def write_corpus(folder: Path, megabytes: float) -> int:
    """Writes jsonl files of about 64 MB; returns the bytes of text in them."""
    draw = random.Random(0)
    english, chinese = sentences()
    total = number = 0
    last = ""
    while total < megabytes * 1e6:
        size = 0
        with (folder / f"{number:05d}.jsonl").open("w", encoding="utf-8") as file:
            while size < min(64e6, megabytes * 1e6 - total):
                pool, joint = (chinese, "") if draw.random() < 0.25 else (english, " ")
                if draw.random() >= 0.02 or not last:
                    drawn = draw.choices(pool, k=draw.randint(5, 40))
                    last = "\n".join(joint.join(drawn[i : i + 8]) for i in range(0, len(drawn), 8))
                file.write(json.dumps({"text": last}, ensure_ascii=False) + "\n")
                size += len(last.encode())
        total += size
        number += 1
    return total


def batches(texts: list[str]):
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def time_part(part: str, corpus: Path, tokenizer_folder: Path, share: int, shares: int, start, answers) -> None:
    """Times one part on one process's share of the files; puts (bytes of text, seconds)."""
    if shares > 1:
        os.environ["RAYON_NUM_THREADS"] = "1"  # one process a core
    config = DataConfig(source=f"jsonl:{corpus}/*.jsonl")
    tokenizer = load_tokenizer(tokenizer_folder)
    everything = [document.text for document in documents(config.source, config)]
    texts = everything[share::shares]
    n_bytes = sum(len(text.encode()) for text in texts)
    ids = tokenizer.encode_batch(texts) if part in ("write", "read tokens") else []
    folder = Path(tempfile.mkdtemp(dir=corpus.parent))

    def write() -> None:
        with DatasetWriter(folder, "bench", tokenizer.eos_id) as writer:
            for i, (text, row) in enumerate(zip(texts, ids)):
                writer.add("train", str(i), row, len(text), last=True)
            writer.finish()

    if part == "read tokens":
        write()
    cleaner = Cleaner(CLEAN)
    library = tokenizer._hf if hasattr(tokenizer, "_hf") else None
    for text in texts[:50]:  # what is loaded once
        cleaner(text)
    tokenizer.encode_batch(texts[:50])
    signatures(texts[:50], DEDUP)
    start.wait()
    begun = time.perf_counter()
    if part == "read":
        files = sorted(corpus.glob("*.jsonl"))
        n_bytes = 0
        for path in files:
            own = DataConfig(source=f"jsonl:{path}")
            for number, document in enumerate(documents(own.source, own)):
                n_bytes += len(document.text.encode()) if number % shares == share else 0
        n_bytes = n_bytes if shares == 1 else sum(len(text.encode()) for text in everything) // shares
    elif part == "clean":
        for text in texts:
            cleaner(text)
    elif part == "hash for dedup":
        for batch in batches(texts):
            exact_hashes(batch)
            band_keys(signatures(batch, DEDUP), DEDUP)
            for text in batch:
                line_hashes(text, DEDUP)
    elif part == "tokenise":
        for batch in batches(texts):
            tokenizer.encode_batch(batch)
    elif part == "tokenise, library alone":
        assert library is not None
        for batch in batches(texts):
            [encoding.ids for encoding in library.encode_batch_fast(batch, add_special_tokens=False)]
    elif part == "write":
        write()
    elif part == "read tokens":
        store = DatasetStore(folder, "train", cache_tokens=0)
        for first in range(0, store.n_tokens - 16 * 1024, 16 * 1024):
            store.read_ranges(np.arange(first, first + 16 * 1024, 1024), np.full(16, 1024))
    answers.put((n_bytes, time.perf_counter() - begun))


def speed(part: str, corpus: Path, tokenizer: Path, processes: int) -> float:
    """MB/s of all processes together."""
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=time_part, args=(part, corpus, tokenizer, i, processes, start, answers))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    found = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    return sum(n_bytes for n_bytes, _ in found) / max(seconds for _, seconds in found) / 1e6


def parts_table(corpus: Path, work: Path, rounds: int) -> str:
    config = DataConfig(source=f"jsonl:{corpus}/*.jsonl")
    settings = TokenizerConfig(vocab_size=8192, training_bytes=10_000_000)
    tokenizer = train_tokenizer(settings, (document.text for document in documents(config.source, config)))
    tokenizer.save(work / "tokenizer")
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for part in PARTS:
            for processes in (1, 2):
                found.setdefault((part, processes), []).append(speed(part, corpus, work / "tokenizer", processes))
    lines = ["| part | one process, MB/s | two processes, MB/s |", "| --- | ---: | ---: |"]
    for part in PARTS:
        cells = []
        for processes in (1, 2):
            speeds = sorted(found[part, processes])
            cells.append(f"{statistics.median(speeds):.1f} ({speeds[0]:.1f} to {speeds[-1]:.1f})")
        lines.append(f"| {part} | {' | '.join(cells)} |")
    ratios = [
        a / b for n in (1, 2) for a, b in zip(found["tokenise", n], found["tokenise, library alone", n], strict=True)
    ]
    lines += ["", f"Tokenising through `Tokenizer.encode_batch`: {statistics.median(ratios):.2f} x the library alone."]
    return "\n".join(lines)


def whole(corpus: Path, work: Path, workers: int) -> dict[str, float]:
    """Prepares everything in a process of its own: seconds by phase, peak resident memory in MB."""
    command = [sys.executable, __file__, "--prepare", str(corpus), "--root", str(work / f"whole-{workers}")]
    command += ["--workers", str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, resident_of_tree(process.pid))
            time.sleep(0.25)
        out, problems = process.communicate()
    if process.returncode:
        sys.exit(problems)
    return json.loads(out.splitlines()[-1]) | {"peak of all": peak}


def resident_of_tree(pid: int) -> float:
    """MB resident in a process and its descendants, shared pages counted once (Linux's Pss)."""
    total, waiting = 0, [str(pid)]
    while waiting:
        process = Path("/proc") / waiting.pop()
        with contextlib.suppress(OSError):  # it ended meanwhile
            for task in (process / "task").iterdir():
                waiting += (task / "children").read_text().split()
            found = re.search(r"^Pss: +(\d+) kB", (process / "smaps_rollup").read_text(), re.MULTILINE)
            total += int(found[1]) if found else 0
    return total * 1024 / 1e6


def prepare_here(args: argparse.Namespace) -> None:
    """The measured process of `whole`."""
    times: dict[str, float] = {}
    phase, begun = "", time.perf_counter()

    def progress(name: str, done: int, total: int | None) -> None:
        nonlocal phase, begun
        now = time.perf_counter()
        if phase:
            times[phase] = times.get(phase, 0.0) + now - begun
        phase, begun = name, now

    start = time.perf_counter()
    folder = prepare(
        DataConfig(source=f"jsonl:{args.prepare}/*.jsonl", root=args.root),
        TokenizerConfig(vocab_size=8192, training_bytes=10_000_000),
        progress,
        clean=CLEAN,
        dedup=DEDUP,
        runner=RunnerConfig(workers=args.workers[0]),
    )
    times["all"] = time.perf_counter() - start
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    documents_kept = sum(split["documents"] for split in manifest["splits"].values())
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    print(
        json.dumps(times | {"peak": peak / 1000, "dataset": size / 1e6, "documents": documents_kept, "tokens": tokens})
    )


def whole_table(corpus: Path, work: Path, megabytes: float, numbers_of_workers: list[int]) -> str:
    phases = ("fingerprint", "read", "deduplicate", "find repeated lines", "train tokenizer", "tokenize", "all")
    lines = [
        "| workers | "
        + " | ".join(f"{phase}, s" for phase in phases)
        + " | MB/s | peak of one process, MB | of all, MB |"
    ]
    lines += ["| ---: |" + " ---: |" * (len(phases) + 3)]
    for workers in numbers_of_workers:
        found = whole(corpus, work, workers)
        cells = " | ".join(f"{found.get(phase, 0.0):.0f}" for phase in phases)
        memory = f"{found['peak']:.0f} | {found['peak of all']:.0f}"
        lines.append(f"| {workers} | {cells} | {megabytes / found['all']:.1f} | {memory} |")
    lines += [
        "",
        f"{megabytes:.0f} MB of text become {found['documents']:,.0f} documents, {found['tokens']:,.0f} tokens and"
        f" {found['dataset']:.0f} MB on disk.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole-only", action="store_true", help="leave out the parts")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder otherwise")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="of the whole preparation")
    args = parser.parse_args()
    if args.prepare:
        prepare_here(args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        corpus = work / "corpus"
        corpus.mkdir()
        megabytes = write_corpus(corpus, args.megabytes) / 1e6
        packages = ", ".join(f"{package} {version(package)}" for package in ("numpy", "tokenizers", "array-record"))
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        print(f"`{' '.join(['python', 'scripts/bench_data.py', *sys.argv[1:]])}`\n")
        print(f"Python {platform.python_version()}, {packages}; {cpus} cores; {megabytes:.0f} MB of text.\n")
        if not args.whole_only:
            print(parts_table(corpus, work, args.rounds) + "\n")
        print(whole_table(corpus, work, megabytes, args.workers))


if __name__ == "__main__":
    main()
