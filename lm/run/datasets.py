"""The dataset of an experiment or a run: prepared, opened, found again, and its batches as the objective wants them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.config import Experiment
from lm.data import loader
from lm.data.manifest import TOKENIZER_FOLDER, Manifest, load_manifest
from lm.data.mixture import MixedDatasets, Mixture, open_mixture
from lm.data.prepare import Progress, prepare
from lm.data.store import DatasetStore, TokenStore
from lm.errors import UserError, check
from lm.records import RunDirectory
from lm.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset, opened."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where it is; a mixture is in several."""
        return (self.folder,)

    @property
    def fingerprint(self) -> str:
        """What it holds, in hex."""
        return self.manifest.fingerprint

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits it has."""
        return tuple(self.manifest.splits)

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """Opens what `lm.data.prepare` made."""
        return cls(folder, load_manifest(folder), load_tokenizer(folder / TOKENIZER_FOLDER))

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of its documents, in order of id; none if they have none."""
        return tuple(self.manifest.labels)

    def store(self, split: str) -> DatasetStore:
        """The tokens of a split.

        Raises:
          UserError: the dataset has no such split.
        """
        splits = self.manifest.splits
        check(split in splits, f"the dataset has no split {split!r}; it has {', '.join(splits)}")
        return DatasetStore(self.folder, split)

    def tokens_per_byte(self, split: str) -> float:
        """Tokens, ends of documents included, for each byte of a split's text."""
        counts = self.manifest.splits[split]
        return counts.tokens / counts.bytes


AnyDataset = Dataset | MixedDatasets
"""What a run can be trained on."""


@contextlib.contextmanager
def prepared(
    experiment: Experiment, progress: Progress | None, *, min_tokens: int | None = None
) -> Iterator[AnyDataset]:
    """The dataset of an experiment, prepared if it is not there; those of a mixture must be there.

    One whose training split has fewer than `min_tokens` is refused; None = what one example takes.

    One that this call made is removed again if the body finds a mistake that could not be told without it: a mistake
    leaves nothing behind.
    """
    data = experiment.data
    if data.mixture.datasets:
        yield open_mixture(data.mixture)
        return
    home = Path(data.root).expanduser() / data.name
    before, missing = set(home.glob("*/*")), [path for path in (home, *home.parents) if not path.exists()]
    phases = set()

    def told(phase: str, done: int, total: int | None) -> None:
        phases.add(phase)
        if progress is not None:
            progress(phase, done, total)

    # A corpus too short to train on is refused before a dataset of it is left behind.
    folder = prepare(
        data,
        experiment.tokenizer,
        told,
        clean=experiment.clean,
        dedup=experiment.dedup,
        augment=experiment.augment,
        min_tokens=data.seq_len + 1 if min_tokens is None else min_tokens,
    )
    try:
        yield Dataset.open(folder)
    except UserError:
        # Another process made it if it was waited for, or if there was nothing to do but to read the source.
        if folder not in before and "wait" not in phases and phases > {"fingerprint"}:
            _remove(folder, missing)
        raise


def _remove(folder: Path, parents: list[Path]) -> None:
    """Removes a dataset's folder, and those of its parents that it leaves empty."""
    # Under a name that `lm.data.atomic` cleans away, so that being killed here leaves no half of a dataset.
    going = folder.with_name(f".incomplete-{secrets.token_hex(8)}")
    folder.rename(going)
    shutil.rmtree(going)
    with contextlib.suppress(OSError):  # not empty: another process works there
        for path in (folder.parent, *parents):
            path.rmdir()


def described(dataset: AnyDataset) -> dict[str, Any]:
    """What `dataset.json` says."""
    folders = [str(folder.absolute()) for folder in dataset.folders]
    found = {"folder": folders[0], "folders": folders, "fingerprint": dataset.fingerprint}
    return found | ({"labels": list(dataset.labels)} if dataset.labels else {})


def labels_of(run: RunDirectory, experiment: Experiment) -> tuple[str, ...]:
    """What the classes of a run are called, in order of id; none if it has none, or nobody knows any more."""
    if experiment.data.labels or not (run.path / "dataset.json").exists():
        return experiment.data.labels
    recorded = run.read("dataset.json", "folder", "fingerprint")
    if "labels" in recorded:
        return tuple(recorded["labels"])
    try:  # a run of before they were written down
        return tuple(load_manifest(Path(recorded["folder"])).labels)
    except UserError:
        return ()


def check_has_dataset(run: RunDirectory) -> None:
    """Raises `UserError` for a run that was imported and not trained here."""
    check(
        (run.path / "dataset.json").exists() or not (run.path / "pretrained").is_dir(),
        f"{run.path} was imported, so it has no dataset; name one with `lm evaluate {run.path} --on CONFIG.py`, or"
        f" begin a run with `lm train CONFIG.py --init-from.run {run.path}`",
    )


def dataset_of(
    run: RunDirectory, experiment: Experiment, progress: Progress | None = None, *, elsewhere: bool = False
) -> AnyDataset:
    """The dataset a run was started with, from its folder, from below `data.root`, or prepared again.

    With `elsewhere`, `data.root` has been changed and its old folder does not count.
    """
    check_has_dataset(run)
    recorded = run.read("dataset.json", "folder", "fingerprint")
    if experiment.data.mixture.datasets:
        mixed = open_mixture(experiment.data.mixture)
        check(
            mixed.fingerprint == recorded["fingerprint"],
            f"the run was started with the mixture {recorded['fingerprint']}, but its datasets now make"
            f" {mixed.fingerprint}; restore them or start a new run",
        )
        return mixed
    old = Path(recorded["folder"])
    below_root = Path(experiment.data.root).expanduser() / experiment.data.name / recorded["fingerprint"] / old.name
    wanted = below_root if elsewhere else old
    for folder in (wanted, below_root):
        if folder.exists():
            dataset = Dataset.open(folder)
            check(
                dataset.manifest.fingerprint == recorded["fingerprint"],
                f"the run was started with dataset {recorded['fingerprint']} but {folder} holds"
                f" {dataset.manifest.fingerprint}; restore it or start a new run",
            )
            return dataset
    with prepared(experiment, progress) as found:
        check(
            found.fingerprint == recorded["fingerprint"],
            f"the run was started with dataset {recorded['fingerprint']}, which is not in {wanted},"
            f" and preparing it again gives {found.fingerprint}: the source text has changed; restore it or"
            " start a new run",
        )
    return found


def maker(experiment: Experiment, dataset: AnyDataset) -> loader.Maker:
    """What makes the examples of an experiment's objective."""
    return experiment.task.maker(experiment.model, dataset.tokenizer, dataset.labels)


def split_batches(
    dataset: AnyDataset,
    experiment: Experiment,
    split: str,
    batch_size: int,
    max_batches: int | None,
    rows: Sequence[int] | None = None,
) -> tuple[Callable[[], Any], int]:
    """A function that starts over with the batches of a split, each example once, and how many there are.

    `rows` are those of each batch that this process reads; None = all.
    """
    make = maker(experiment, dataset)
    return store_batches(dataset.store(split), experiment, make, batch_size, max_batches, rows)


def store_batches(
    store: TokenStore | Mixture,
    experiment: Experiment,
    make: loader.Maker,
    batch_size: int,
    max_batches: int | None,
    rows: Sequence[int] | None = None,
) -> tuple[Callable[[], Any], int]:
    """`split_batches` of a store."""
    count = loader.n_evaluation_batches(
        store, experiment.data, make=make, batch_size=batch_size, max_batches=max_batches
    )
    batches = functools.partial(
        loader.evaluation_batches,
        store,
        experiment.data,
        make=make,
        batch_size=batch_size,
        max_batches=max_batches,
        rows=rows,
    )
    return batches, count


def split_text(dataset: AnyDataset, split: str) -> Iterator[bytes]:
    """The text of each document of a split, as its tokens spell it, in UTF-8."""
    opened = dataset.store(split)
    for store in opened.stores if isinstance(opened, Mixture) else [opened]:
        for start, stop in itertools.pairwise(store.document_offsets):
            ids = store.read(int(start), int(stop) - 1)
            yield dataset.tokenizer.decode(ids.tolist()).encode()
