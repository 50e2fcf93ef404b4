"""Finds planted duplicates among real documents and counts what is found, as Markdown tables.

    python scripts/bench_dedup.py                                 50,000 documents, and datasketch beside it: minutes
    python scripts/bench_dedup.py --documents 5000 --rounds 1     some seconds

Originals are English and Chinese documents of at least 20 tokens from `../shared/data`; where that is absent they are
made of random words. A quarter of the documents are planted: copies of originals, changed in one of six ways
(`KINDS`). A planted document is found if it lies in one cluster with its original; a removed document is right if it
and the one it gives way to come from the same original.
"""

import argparse
import csv
import itertools
import json
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from lm.text.dedup import (
    DedupConfig,
    band_keys,
    candidate_pairs,
    exact_hashes,
    first_of_cluster,
    first_of_equal,
    near_duplicates,
    signatures,
    similar,
    unique_pairs,
)

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u9fff]+")
KINDS = ("exact", "case and spaces", "5 % of words", "10 % of words", "20 % of words", "shuffled sentences")
LEAST_TOKENS = 20


@dataclass(frozen=True)
class Corpus:
    texts: list[str]
    family: np.ndarray  # int64 [n]: documents of one original have its number
    kind: np.ndarray  # int64 [n]: -1 for originals, otherwise a place in KINDS
    chinese: np.ndarray  # bool [n]


def tokens_of(text: str) -> list[str]:
    """The tokens of `lm.text.dedup`, written a second time."""
    return TOKEN.findall(text.casefold())


def is_chinese(text: str) -> bool:
    return len(re.findall(r"[\u4e00-\u9fff]", text)) > 0.3 * len(text)


def real_documents(data: Path) -> list[str]:
    texts: list[str] = []
    for name in ("train", "valid"):
        lines = (data / f"wikitext2/{name}.txt").read_text().split("\n")
        texts += [line.strip() for line in lines if not line.startswith(" =")]
    for name in ("train", "valid", "test"):
        lines = (data / f"ptb/ptb.{name}.txt").read_text().split("\n")
        texts += [" .".join(lines[i : i + 4]) for i in range(0, len(lines), 4)]
    with (data / "lambada/lambada_openai.first2500.jsonl").open() as file:
        texts += [json.loads(line)["context"] for line in file]
    texts += (data / "zh/CLUECorpusSmall_sampled.txt").read_text().split("\n")
    with (data / "zh/ChnSentiCorp_htl_all.csv").open(encoding="utf-8-sig", newline="") as file:
        texts += [row["review"] for row in csv.DictReader(file)]
    with (data / "summarization/csl_title_dev.tsv").open() as file:
        texts += [line.split("\t")[-1] for line in file]
    for name in ("poet.tang.0", "poet.tang.1000", "songci300"):
        poems = json.loads((data / f"zh/{name}.json").read_text())
        texts += ["".join(poem["paragraphs"]) for poem in poems]
    for name in ("train", "dev", "test"):
        texts += [line.split("\t")[0] for line in (data / f"sst2/{name}.tsv").read_text().split("\n")]
    texts += [line.split("\t")[0] for line in (data / "zh/thucnews_short_dev.txt").read_text().split("\n")]
    texts += (data / "multi30k/train.en").read_text().split("\n")
    return [text for text in texts if len(tokens_of(text)) >= LEAST_TOKENS]


def made_documents(n: int, rng: np.random.Generator) -> list[str]:
    """Two in three of Latin letters, one of Chinese characters, of words drawn by Zipf's law."""
    latin = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 9))) for _ in range(20_000)]
    han = ["".join(chr(0x4E00 + c) for c in rng.integers(0, 3000, rng.integers(1, 4))) for _ in range(20_000)]
    texts = []
    for i in range(n):
        words, space, stop = (han, "", "。") if i % 3 == 2 else (latin, " ", ". ")
        picks = [words[j % 20_000] for j in rng.zipf(1.2, int(np.clip(rng.lognormal(4.3, 0.6), 30, 1000)))]
        texts.append(stop.join(space.join(picks[j : j + 15]) for j in range(0, len(picks), 15)) + stop)
    return texts


def split_words(text: str, chinese: bool) -> list[str]:
    """Pieces that join to the text; every other one is a word."""
    if not chinese:
        return re.split(r"(\w+)", text)
    import jieba

    jieba.setLogLevel(60)
    pieces = [""]
    for word in jieba.cut(text):
        if word.isalnum():
            pieces += [word, ""]
        else:
            pieces[-1] += word
    return pieces


def change_words(text: str, chinese: bool, share: float, vocabulary: list[str], rng: np.random.Generator) -> str:
    pieces = split_words(text, chinese)
    places = np.arange(1, len(pieces), 2)
    for place in rng.choice(places, max(1, round(share * len(places))), replace=False):
        new = pieces[place]
        while new.casefold() == pieces[place].casefold():
            new = vocabulary[rng.integers(len(vocabulary))]
        pieces[place] = new
    return "".join(pieces)


def shuffle_sentences(text: str, rng: np.random.Generator) -> str:
    sentences = re.findall(r".*?(?:[.!?;。！？；]+\s*|$)", text, re.DOTALL)
    sentences = [sentence for sentence in sentences if sentence]
    return "".join(sentences[i] for i in rng.permutation(len(sentences)))


def similar_pairs(texts: list[str], threshold: float, ngram: int) -> dict[tuple[int, int], float]:
    """All pairs whose sets of shingles have that Jaccard similarity, exactly: by their rarest shingles."""
    sets = [shingle_set(text, ngram) for text in texts]
    frequency = Counter(itertools.chain.from_iterable(sets))
    holders: dict[str, list[int]] = {}
    found = {}
    for i, shingles in enumerate(sets):
        # Sets that share less than `need` elements are too different; so one of the rarest others must be shared.
        need = int(np.ceil(threshold * len(shingles) - 1e-9))
        rarest = sorted(shingles, key=lambda s: (frequency[s], s))[: len(shingles) - need + 1]
        for j in sorted({j for s in rarest for j in holders.get(s, ())}):
            if min(len(shingles), len(sets[j])) >= threshold * max(len(shingles), len(sets[j])):
                common = len(shingles & sets[j])
                if (jaccard := common / (len(shingles) + len(sets[j]) - common)) >= threshold:
                    found[j, i] = jaccard
        for s in rarest:
            holders.setdefault(s, []).append(i)
    return found


def shingle_set(text: str, ngram: int) -> set[str]:
    tokens = tokens_of(text)
    return {" ".join(tokens[i : i + ngram]) for i in range(max(1, len(tokens) - ngram + 1))}


def make_corpus(originals: list[str], each: int, seed: int) -> Corpus:
    rng = np.random.default_rng(seed)
    chinese = [is_chinese(text) for text in originals]
    vocabularies = {
        language: [
            word
            for i in range(0, len(originals), max(1, len(originals) // 4000))
            if chinese[i] == language
            for word in split_words(originals[i], language)[1::2]
        ]
        for language in (False, True)
    }
    texts, family, kind = list(originals), list(range(len(originals))), [-1] * len(originals)
    sources = rng.permutation(len(originals))
    for k, name in enumerate(KINDS):
        for i in sources[k * each : (k + 1) * each]:  # every original has at most one copy
            text, is_zh = originals[i], chinese[i]
            if name == "case and spaces":
                text = "  ".join(text.upper().split(" ")) + "\n"
            elif name.endswith("words"):
                text = change_words(text, is_zh, int(name.split()[0]) / 100, vocabularies[is_zh], rng)
            elif name.startswith("shuffled"):
                text = shuffle_sentences(text, rng)
            texts.append(text)
            family.append(int(i))
            kind.append(k)
    order = rng.permutation(len(texts))
    families = np.array(family)[order]
    return Corpus([texts[i] for i in order], families, np.array(kind)[order], np.array(chinese)[families])


def datasketch_near(texts: list[str], config: DedupConfig) -> tuple[np.ndarray, dict[str, float]]:
    """`near_duplicates` with datasketch throughout; CPU seconds of its three parts."""
    from datasketch import MinHash, MinHashLSH

    clock = [time.process_time()]
    sets = [[s.encode() for s in shingle_set(text, config.ngram)] for text in texts]
    clock.append(time.process_time())
    sketches = MinHash.bulk(sets, num_perm=config.permutations, seed=config.seed + 1)
    clock.append(time.process_time())
    index = MinHashLSH(
        num_perm=config.permutations, params=(config.bands, config.permutations // config.bands), threshold=0.5
    )
    pairs = []
    for i, sketch in enumerate(sketches):
        pairs += [(j, i) for j in index.query(sketch) if sketches[j].jaccard(sketch) >= config.threshold]
        index.insert(i, sketch, check_duplication=False)
    first = first_of_cluster(len(texts), np.array(pairs, np.int64).reshape(-1, 2))
    clock.append(time.process_time())
    parts = dict(zip(("shingles", "signatures", "index"), np.diff(clock).tolist(), strict=True))
    return np.where(first == np.arange(len(texts)), -1, first), parts


def lm_near(texts: list[str], config: DedupConfig) -> tuple[np.ndarray, dict[str, float]]:
    """`near_duplicates`; CPU seconds of its two parts, the first measured by itself."""
    start = time.process_time()
    first = near_duplicates(texts, config)
    total = time.process_time() - start
    start = time.process_time()
    signatures(texts, config)
    seconds = time.process_time() - start
    return first, {"shingles and signatures": seconds, "index": total - seconds}


def with_self(first: np.ndarray) -> np.ndarray:
    return np.where(first < 0, np.arange(len(first)), first)


def found(corpus: Corpus, first: np.ndarray) -> np.ndarray:
    """Which planted documents lie in the cluster of their original, bool, in the order of the documents."""
    place = np.empty(len(corpus.texts), np.int64)
    originals = np.flatnonzero(corpus.kind < 0)
    place[corpus.family[originals]] = originals
    planted = np.flatnonzero(corpus.kind >= 0)
    cluster = with_self(first)
    return cluster[planted] == cluster[place[corpus.family[planted]]]


def right(corpus: Corpus, first: np.ndarray) -> np.ndarray:
    """Which removed documents give way to one of the same original, bool, in the order of the documents."""
    removed = np.flatnonzero(first >= 0)
    return corpus.family[removed] == corpus.family[first[removed]]


def row(*cells: object) -> None:
    print("| " + " | ".join(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")


def table(*names: str) -> None:
    print()
    row(*names)
    row(*(["---"] + ["---:"] * (len(names) - 1)))


def recall_tables(originals: list[str], each: int, config: DedupConfig, seed: int) -> None:
    corpus = make_corpus(originals, each, seed)
    exact = first_of_equal(exact_hashes(corpus.texts))
    exact = np.where(exact == np.arange(len(exact)), -1, exact)
    near = near_duplicates(corpus.texts, config)
    planted = corpus.kind[corpus.kind >= 0]
    table("kind", "planted", "recall, exact", "recall, near", "removed with this kind alone", "precision, near")
    for k, name in enumerate(KINDS):
        keep = np.flatnonzero((corpus.kind < 0) | (corpus.kind == k))
        part = Corpus([corpus.texts[i] for i in keep], corpus.family[keep], corpus.kind[keep], corpus.chinese[keep])
        alone = near_duplicates(part.texts, config)
        row(
            name,
            each,
            float(found(corpus, exact)[planted == k].mean()),
            float(found(corpus, near)[planted == k].mean()),
            int((alone >= 0).sum()),
            float(right(part, alone).mean()),
        )
    row("all", len(planted), float(found(corpus, exact).mean()), float(found(corpus, near).mean()),
        int((near >= 0).sum()), float(right(corpus, near).mean()))  # fmt: skip
    print(f"\nExact stage: {(exact >= 0).sum()} removed, precision {right(corpus, exact).mean():.4f}.")

    ten = KINDS.index("10 % of words")
    places = np.flatnonzero(corpus.kind >= 0)
    tokens = np.array([len(tokens_of(corpus.texts[i])) for i in places])
    table("10 % of words changed, by tokens of the document", "20 to 39", "40 to 79", "80 to 159", "160 and more")
    for language, chosen in (("English", ~corpus.chinese[places]), ("Chinese", corpus.chinese[places])):
        cells = []
        for low, high in ((20, 40), (40, 80), (80, 160), (160, 10**9)):
            hits = found(corpus, near)[(planted == ten) & chosen & (tokens >= low) & (tokens < high)]
            cells.append(f"{hits.mean():.3f} of {len(hits)}" if len(hits) else "none")
        row(language, *cells)


def compare(texts: list[str], corpus: Corpus, config: DedupConfig, rounds: int) -> None:
    size = sum(len(text.encode()) for text in texts) / 1e6
    contenders: dict[str, Callable] = {"lm.text.dedup": lm_near, "datasketch": datasketch_near}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    first: dict[str, np.ndarray] = {}
    for _ in range(rounds):  # in turns
        for name, run in contenders.items():
            first[name], parts = run(texts, config)
            seconds[name].append(parts)
    table("", "CPU seconds, median", "range", "documents/s", "MB/s", "recall of planted", "precision", "parts, s")
    medians = {}
    for name, runs in seconds.items():
        totals = [sum(parts.values()) for parts in runs]
        medians[name] = statistics.median(totals)
        row(
            name,
            f"{medians[name]:.1f}",
            f"{min(totals):.1f} to {max(totals):.1f}",
            f"{len(texts) / medians[name]:,.0f}",
            f"{size / medians[name]:.1f}",
            float(found(corpus, first[name]).mean()),
            float(right(corpus, first[name]).mean()),
            ", ".join(f"{key} {statistics.median(run[key] for run in runs):.1f}" for key in runs[0]),
        )
    ratios = [sum(slow.values()) / sum(fast.values()) for fast, slow in zip(*seconds.values(), strict=True)]
    print(f"\ndatasketch takes {statistics.median(ratios):.1f} times as long ({min(ratios):.1f} to {max(ratios):.1f}).")


def scales(config: DedupConfig, sizes: tuple[int, ...], rng: np.random.Generator) -> None:
    """CPU seconds of the global stages for made signatures of which a tenth are near duplicates."""
    table("documents", "band_keys", "candidate_pairs, one band", "similar, a million pairs", "first_of_cluster")
    for n in sizes:
        rows = rng.integers(0, 2**32, (n, config.permutations), np.uint32)
        copies = rng.permutation(n)[: n // 5].reshape(2, -1)
        rows[copies[1], : config.permutations * 7 // 10] = rows[copies[0], : config.permutations * 7 // 10]
        clock = [time.process_time()]
        keys = band_keys(rows, config)
        clock.append(time.process_time())
        pairs = candidate_pairs(np.ascontiguousarray(keys[:, 0]), np.arange(n), config.bucket_window)
        clock.append(time.process_time())
        similar(rows, rng.integers(0, n, (1_000_000, 2)), config)
        clock.append(time.process_time())
        first_of_cluster(n, unique_pairs(pairs))
        clock.append(time.process_time())
        row(f"{n:,}", *(f"{seconds:.2f} s" for seconds in np.diff(clock).tolist()))


def hotel(data: Path, config: DedupConfig) -> None:
    with (data / "zh/ChnSentiCorp_htl_all.csv").open(encoding="utf-8-sig", newline="") as file:
        texts = [row["review"] for row in csv.DictReader(file)]
    exact = first_of_equal(exact_hashes(texts))
    near = near_duplicates(texts, config)
    order = np.arange(len(texts))
    pairs = similar_pairs(texts, config.threshold, config.ngram)
    cluster = with_self(near)
    hits = sum(bool(cluster[i] == cluster[j]) for i, j in pairs)
    print(f"\nChnSentiCorp_htl_all.csv: {len(texts)} reviews; {(exact != order).sum()} equal an earlier one "
          f"({len(texts) - len(set(texts))} to the character); near removes {(near >= 0).sum()}. Of {len(pairs)} pairs "
          f"with an exact similarity of {config.threshold} or more, {hits} are in one cluster.")  # fmt: skip
    table("similarity", "reviews", "the first", "the second")
    for (i, j), jaccard in sorted(pairs.items(), key=lambda item: -item[1]):
        row(f"{jaccard:.2f}", f"{i}, {j}", *(re.sub(r"\s+", " ", texts[k])[:80] for k in (i, j)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=50_000, help="originals and planted ones together")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of real texts; made ones where it is absent")
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of the comparison with datasketch; 0 leaves it out"
    )
    parser.add_argument("--scale", type=int, nargs="*", default=[1_000_000], help="documents for the global stages")
    parser.add_argument("--ngram", type=int, default=DedupConfig.ngram)
    parser.add_argument("--threshold", type=float, default=DedupConfig.threshold)
    parser.add_argument("--permutations", type=int, default=DedupConfig.permutations)
    parser.add_argument("--bands", type=int, default=DedupConfig.bands)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = DedupConfig(
        near=True, ngram=args.ngram, threshold=args.threshold, permutations=args.permutations, bands=args.bands
    )
    print(f"Python {platform.python_version()}, numpy {np.__version__}, datasketch {version('datasketch')}; {config}")

    rng = np.random.default_rng(args.seed)
    each = args.documents // 4 // len(KINDS)
    count = args.documents - each * len(KINDS)
    real = args.data.exists()
    pool = real_documents(args.data) if real else made_documents(count * 5 // 4, rng)
    pool = [pool[i] for i in rng.permutation(len(pool))]
    if real and args.documents < 20_000:
        pool = pool[: 2 * count]
    pairs = similar_pairs(pool, config.threshold, config.ngram)
    hits = with_self(near_duplicates(pool, config))
    chinese = sum(map(is_chinese, pool))
    caught = np.array([hits[i] == hits[j] for i, j in pairs] or [True])
    print(f"\n{len(pool)} documents before anything is planted ({chinese} Chinese): {len(pairs)} pairs "
          f"have an exact similarity of {config.threshold} or more, {caught.sum()} of them are found "
          f"({caught.mean():.4f}); {(hits != np.arange(len(hits))).sum()} documents would go.")  # fmt: skip
    repeated = {later for _, later in pairs}
    originals = [text for i, text in enumerate(pool) if i not in repeated][:count]
    if len(originals) < count:
        raise SystemExit(f"--documents {args.documents} needs {count} originals; there are {len(originals)}.")

    print("\n## Planted among documents without such pairs")
    recall_tables(originals, each, config, args.seed)
    corpus = make_corpus(pool[:count], each, args.seed)
    near = near_duplicates(corpus.texts, config)
    print(f"\nPlanted among the documents as they come: recall {found(corpus, near).mean():.4f}, precision "
          f"{right(corpus, near).mean():.4f} if what was alike before counts as wrong.")  # fmt: skip
    if real:
        print("\n## Real duplicates")
        hotel(args.data, config)
    if args.scale:
        print("\n## Global stages")
        scales(config, tuple(args.scale), rng)
    if args.rounds:
        print("\n## Beside datasketch")
        corpus = make_corpus(originals, each, args.seed)
        compare(corpus.texts, corpus, config, args.rounds)


if __name__ == "__main__":
    main()
