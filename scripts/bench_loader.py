"""Measures how many tokens a second the loader delivers, as a Markdown table.

    python scripts/bench_loader.py                       # a synthetic corpus of 8 million tokens
    python scripts/bench_loader.py --dataset DIR         # a dataset made by `python -m lm prepare`

Documents of the synthetic corpus have log-normal lengths. Its dataset is written to a temporary folder, in the format
of `lm prepare`. Rows named "memory" read the same documents from an array, which leaves the cost of batching alone;
rows named "disk, cold cache" may keep next to no decoded record, as with a corpus far larger than memory.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from lm.data.config import DataConfig
from lm.data.loader import packed, training_batches
from lm.data.packing import make_examples
from lm.data.store import DatasetStore, MemoryStore, TokenStore
from lm.data.writer import DatasetWriter


def synthetic_documents(tokens: int, mean: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    count = max(1, tokens // mean)
    lengths = np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0, count).astype(int), 1, 20 * mean)
    return [np.append(rng.integers(1, 32000, length), 0).astype(np.int32) for length in lengths]


def write_dataset(folder: Path, documents: list[np.ndarray]) -> None:
    with DatasetWriter(folder, "bench", eos_id=0) as writer:
        for i, document in enumerate(documents):
            writer.add("train", f"document-{i}", document[:-1].tolist(), text_bytes=4 * len(document), last=True)
        writer.finish()


def tokens_per_second(
    store: TokenStore, config: DataConfig, batch_size: int, seconds: float, repeats: int
) -> list[float]:
    batches = training_batches(store, config, make=packed(0), batch_size=batch_size)
    for _ in range(config.prefetch + 2):  # workers have started, files are open
        next(batches)
    rates = []
    for _ in range(repeats):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            next(batches)
            count += 1
        rates.append(count * batch_size * config.seq_len / (time.perf_counter() - start))
    batches.close()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="folder of a prepared dataset; its train split is read")
    parser.add_argument("--tokens", type=int, default=8_000_000, help="size of the synthetic corpus")
    parser.add_argument("--mean-length", type=int, default=500, help="mean document length of the synthetic corpus")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens in a batch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="0 reads in threads")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        stores: dict[str, TokenStore] = {}
        folder = args.dataset
        if folder is None:
            folder = Path(temporary)
            documents = synthetic_documents(args.tokens, args.mean_length)
            write_dataset(folder, documents)
            stores["memory"] = MemoryStore(documents)
        stores["disk"] = DatasetStore(folder, "train")
        stores["disk, cold cache"] = DatasetStore(folder, "train", cache_tokens=2**16)

        size = stores["disk"]
        packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "grain", "array-record"))
        print(f"{size.n_tokens:,} tokens in {len(size.document_offsets) - 1:,} documents; batches of about")
        print(f"{args.batch_tokens:,} tokens; median of {args.repeats} x {args.seconds:g} s, and their range.")
        cores = len(os.sched_getaffinity(0))
        print(f"{platform.machine()}, {cores} cores; Python {platform.python_version()}, {packages}.\n")
        print("| packing | T | store | workers | M tokens/s | range | fill |")
        print("|---|---|---|---|---|---|---|")
        for packing in ("stream", "documents"):
            for seq_len in args.seq_len:
                examples = make_examples(size, seq_len=seq_len, packing=packing, bos_id=0)
                targets = size.n_tokens - 1 if packing == "stream" else size.n_tokens
                fill = min(targets / (len(examples) * seq_len), 1.0)
                for name, store in stores.items():
                    for workers in args.workers:
                        config = DataConfig(seq_len=seq_len, packing=packing, workers=workers)
                        batch_size = max(1, args.batch_tokens // seq_len)
                        rates = tokens_per_second(store, config, batch_size, args.seconds, args.repeats)
                        median, low, high = (f(rates) / 1e6 for f in (statistics.median, min, max))
                        print(
                            f"| {packing} | {seq_len} | {name} | {workers} | {median:.2f} | {low:.2f}–{high:.2f} "
                            f"| {fill:.2%} |",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
