"""Exports: what was prepared comes out again, in order, whole or not at all."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lm.data.export
from lm.data.config import DataConfig
from lm.data.export import export_jsonl_zst, export_tfrecord
from lm.data.manifest import load_manifest
from lm.data.prepare import prepare, split_of
from lm.data.sources import documents, fingerprint_file
from lm.errors import UserError
from lm.text.tokenizer import TokenizerConfig

zstandard = pytest.importorskip("zstandard")
BYTE = TokenizerConfig(kind="byte")


def dataset(folder: Path, tokenizer: TokenizerConfig = BYTE, **settings: object) -> tuple[DataConfig, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"Document  {i}, 第{i}篇:\n\t" + "wörd " * (i % 7) + "e\u0301 😀\r" for i in range(60)]
    (folder / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    source, root = f"jsonl:{folder}/t.jsonl", str(folder / "datasets")
    data = DataConfig(source=source, validation_fraction=0.2, root=root, **settings)
    return data, prepare(data, tokenizer)


def exported_lines(path: Path) -> list[dict]:
    with zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True) as stream:
        return [json.loads(line) for line in io.TextIOWrapper(stream, "utf-8", newline="\n")]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_the_text_comes_back_and_can_be_prepared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    monkeypatch.setattr("lm.data.export._READ_TOKENS", 300)
    data, folder = dataset(tmp_path, TokenizerConfig(kind=kind, vocab_size=300))
    told: list[tuple[int, int]] = []
    exported = export_jsonl_zst(folder, tmp_path / "out" / "corpus", progress=lambda *at: told.append(at))
    assert told[-1] == (60, 60)
    expected = {"train": [], "validation": []}
    for document in documents(data.source, data):
        expected[split_of(document.text, data)].append(document)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["corpus"]
    files = ["manifest.json", "train.jsonl.zst", "validation.jsonl.zst"]
    assert sorted(path.name for path in (tmp_path / "out/corpus").iterdir()) == files
    for split, listed in expected.items():
        lines = exported_lines(tmp_path / f"out/corpus/{split}.jsonl.zst")
        assert lines == [{"text": d.text, "key": d.key} for d in listed]
        counts = exported.splits[split]
        assert counts.documents == len(listed)
        assert counts.bytes == counts.prepared_bytes == sum(len(d.text.encode()) for d in listed)
    assert exported.exact
    again = list(documents(f"jsonl:{tmp_path}/out/corpus/*.zst", DataConfig()))
    assert [d.text for d in again] == [d.text for listed in expected.values() for d in listed]


def test_the_manifest_says_where_it_came_from(tmp_path: Path):
    _, folder = dataset(tmp_path, licence="CC BY 4.0, from nobody")
    exported = export_jsonl_zst(folder, tmp_path / "out", splits=["validation"])
    raw = json.loads((tmp_path / "out/manifest.json").read_text())
    assert raw == json.loads(json.dumps(dataclasses.asdict(exported)))
    assert [file["path"] for file in raw["files"]] == ["validation.jsonl.zst"]
    path = tmp_path / "out/validation.jsonl.zst"
    assert raw["files"] == [dataclasses.asdict(fingerprint_file(path.name, path))]
    manifest = load_manifest(folder)
    assert raw["dataset"]["fingerprint"] == manifest.fingerprint
    assert raw["dataset"]["licence"] == "CC BY 4.0, from nobody"
    assert raw["dataset"]["sources"]["source"][0]["blake2b"] == manifest.sources["source"][0].blake2b
    assert raw["dataset"]["settings"] == json.loads(json.dumps(manifest.settings))
    export_jsonl_zst(folder, tmp_path / "twice", splits=["validation"])
    for name in ("validation.jsonl.zst", "manifest.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_tokenizer_that_loses_something_is_told(tmp_path: Path):
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"])}
    lossy = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    lossy.normalizer = normalizers.Lowercase()  # as many bytes as before, so that only the letters show
    lossy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lossy.decoder = decoders.ByteLevel()
    lossy.save(str(tmp_path / "tokenizer.json"))
    _, folder = dataset(tmp_path / "d", TokenizerConfig(kind=f"hf:{tmp_path}/tokenizer.json"))
    exported = export_jsonl_zst(folder, tmp_path / "out")
    assert not exported.exact
    assert exported_lines(tmp_path / "out/train.jsonl.zst")[0]["text"].startswith("document  ")


def test_what_cannot_be_exported(tmp_path: Path):
    _, folder = dataset(tmp_path)
    (tmp_path / "there").mkdir()
    for arguments, splits, message in (
        ((folder, tmp_path / "there"), None, "there is there already; name another folder"),
        ((folder, tmp_path / "out"), ["test"], "there is no split 'test' in .*; it has train, validation"),
        ((tmp_path, tmp_path / "out"), None, "no prepared dataset"),
    ):
        with pytest.raises(UserError, match=message):
            export_jsonl_zst(*arguments, splits=splits)
    assert not (tmp_path / "out").exists()


FULL_DISK = """
import resource, sys
from pathlib import Path
from lm.data.export import export_jsonl_zst
from lm.errors import UserError
import lm.data.export
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    export_jsonl_zst(Path(sys.argv[1]), Path(sys.argv[2]) / "out")
except UserError as error:
    print(error)
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path):
    _, folder = dataset(tmp_path / "d")
    (tmp_path / "e").mkdir()
    command = [sys.executable, "-c", FULL_DISK, str(folder), str(tmp_path / "e")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("cannot write the export in"), done.stderr
    assert "File too large; free space" in done.stdout
    assert list((tmp_path / "e").iterdir()) == []


def test_a_failure_on_the_way_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, folder = dataset(tmp_path / "d")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lm.data.export, "fingerprint_file", fail)
    with pytest.raises(KeyboardInterrupt):
        export_jsonl_zst(folder, tmp_path / "e" / "out")
    assert not (tmp_path / "e").exists()


def test_tfrecord_asks_for_tensorflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(
        UserError, match=r"needs the package tensorflow; install it with `pip install -e '.\[tfrecord\]'`"
    ):
        export_tfrecord(tmp_path, tmp_path / "out")


TFRECORD = """
import sys
from pathlib import Path
import tensorflow as tf
import lm.data.export
from lm.data.export import export_tfrecord
from lm.data.store import DatasetStore
from lm.errors import UserError
folder, output = map(Path, sys.argv[1:])
lm.data.export._SHARD_BYTES = 2000
exported = export_tfrecord(folder, output)
assert exported.exact and exported.format == "tfrecord"
string = tf.io.FixedLenFeature([], tf.string)
features = {"tokens": tf.io.VarLenFeature(tf.int64), "text": string, "key": string}
for split in ("train", "validation"):
    files = sorted(output.glob(f"{split}-*.tfrecord"))
    assert files[-1].name == f"{split}-{len(files) - 1:05d}-of-{len(files):05d}.tfrecord", files
    assert split != "train" or len(files) > 2
    store = DatasetStore(folder, split)
    n = 0
    for i, record in enumerate(tf.data.TFRecordDataset([str(file) for file in files])):
        example = tf.io.parse_single_example(record, features)
        tokens = tf.sparse.to_dense(example["tokens"]).numpy().tolist()
        start, stop = map(int, store.document_offsets[i : i + 2])
        assert tokens == store.read(start, stop).tolist()
        assert bytes(tokens[:-1]) == example["text"].numpy()
        assert example["key"].numpy().decode() == store.document_key(i)
        n += 1
    assert n == exported.splits[split].documents == len(store.document_offsets) - 1
assert sorted(file.path for file in exported.files) == sorted(path.name for path in output.glob("*.tfrecord"))
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    export_tfrecord(folder, output.parent / "full")
except UserError as error:
    assert "cannot write the export" in str(error), error
else:
    raise AssertionError("wrote to a full disk")
assert not (output.parent / "full").exists() and not list(output.parent.glob(".*"))
print("all well")
"""


def test_tfrecord(tmp_path: Path):
    """In a process of its own: TensorFlow is large, and warns of many things."""
    pytest.importorskip("tensorflow", reason="needs the package tensorflow")
    _, folder = dataset(tmp_path / "d")
    (tmp_path / "e").mkdir()
    command = [sys.executable, "-c", TFRECORD, str(folder), str(tmp_path / "e/out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("all well\n"), done.stderr
