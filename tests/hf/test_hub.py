"""A name on the hub: which files are asked for. The hub itself is not reached from here."""

import huggingface_hub
import pytest
from pretrained import GPT2_CONFIG, gpt2_weights, write_folder

from lm.errors import UserError
from lm.hf.source import open_source

SMALL = ["config.json", "tokenizer.json", "README.md", "modeling_custom.py", "training_args.bin", "rng.pkl"]
# files there: the ones that are weights, of which the first kind is taken
HOLDINGS = {
    "safetensors": (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
    "parts": (
        ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["model.safetensors.index.json", "model-*-of-*.safetensors"],
    ),
    "flax": (["flax_model.msgpack", "pytorch_model.bin", "tf_model.h5"], ["flax_model.msgpack"]),
    "torch": (["pytorch_model.bin"], ["pytorch_model.bin"]),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model, whose downloads are noted."""
    asked = {}
    folder = write_folder(tmp_path / "cache", gpt2_weights(GPT2_CONFIG), GPT2_CONFIG)

    class Sibling:
        def __init__(self, name):
            self.rfilename = name

    class Info:
        siblings = ()

    class Api:
        def model_info(self, name, revision):
            asked["info"] = name, revision
            Info.siblings = [Sibling(file) for file in asked["files"]]
            return Info

    def download(name, **options):
        asked["name"], asked["options"] = name, options
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize("kind", HOLDINGS)
def test_weights_of_one_kind_and_small_files(kind, hub):
    import fnmatch

    there, wanted = HOLDINGS[kind]
    hub["files"] = [*SMALL, *there]
    source = open_source("someone/gpt2")
    assert hub["name"] == "someone/gpt2"
    patterns = hub["options"]["allow_patterns"]
    taken = {file for file in hub["files"] if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)}
    assert taken == {"config.json", "tokenizer.json"} | {
        file for file in there if any(fnmatch.fnmatch(file, pattern) for pattern in wanted)
    }
    assert source.config["model_type"] == "gpt2"


def test_a_revision(hub):
    hub["files"] = [*SMALL, "model.safetensors"]
    open_source("someone/gpt2@v1.0")
    assert hub["info"] == ("someone/gpt2", "v1.0")
    assert (hub["name"], hub["options"]["revision"]) == ("someone/gpt2", "v1.0")
    open_source("someone/gpt2")
    assert (hub["name"], hub["options"]["revision"]) == ("someone/gpt2", None)


def test_without_weights(hub):
    hub["files"] = SMALL
    with pytest.raises(UserError, match=r"someone/gpt2 on the hub holds no weights in model\.safetensors"):
        open_source("someone/gpt2")
    assert "name" not in hub
