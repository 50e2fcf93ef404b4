r"""LLaMA 7B from scratch on English, Chinese and code, for the 20 tokens a parameter of Chinchilla.

    lm tokenizer train --source 'jsonl:data/llama_7b/*/0000.jsonl.gz' --vocab-size 32000 \
        --training-bytes 4000000000 --output datasets/llama_7b/tokenizer
    for name in web_en web_zh code books_en books_zh wiki_en wiki_zh papers questions; do
        lm prepare --data.source "jsonl:data/llama_7b/$name/*.jsonl.gz" --data.root datasets/llama_7b \
            --data.name $name --data.validation-fraction 0.0005 --tokenizer.kind file:datasets/llama_7b/tokenizer
    done
    lm plan configs/llama_7b.py --topology v5p:4x4x4
    lm train configs/llama_7b.py --run runs/llama_7b

Data. Each kind of text is a folder of jsonl files below data/llama_7b, the document in the field "text", and becomes a
dataset of its own (cleaning and duplicates: docs/data.md; `repeated_ngrams` is not for code). One tokenizer reads them
all, a byte-level BPE trained on the first file of each, so that Chinese has tokens of its own. The mixture takes what
lies below datasets/llama_7b; where nothing does, as on a machine that only plans, the config stands for all the text
as one dataset, and tokenizer and shares are as the text is.

| dataset | share, % | why |
|---|---:|---|
| web_en, web_zh | 44, 30 | LLaMA has 82 of web pages (67 CommonCrawl, 15 C4; arXiv:2302.13971, table 1), in English |
| code | 8 | LLaMA 4.5; Skywork-13B, trained on both languages, 8.0 (arXiv:2310.19341) |
| books_en, books_zh | 4.5, 2.5 | LLaMA 4.5; long documents |
| wiki_en, wiki_zh | 4, 2 | LLaMA 4.5 |
| papers | 3 | LLaMA 2.5 of arXiv |
| questions | 2 | LLaMA 2.0 of Stack Exchange |

34.5 are Chinese; Skywork-13B has 39.6, and 52.2 English. No text should be seen more than four times
(arXiv:2305.16264): `lm prepare` says how many tokens a dataset has, and the run asks for its share of 135 billion; a
dataset with less than a quarter of that wants a smaller share.

Batch and schedule. Learning rate, betas, decay, warmup and the cosine to a tenth are LLaMA's. So are 2,048 tokens a
row. A step is 512 rows, 1.05M tokens, a quarter of theirs, as the run is a seventh of theirs; for their 1,000 billion
tokens: --train.tokens 1000000000000 --train.batch-size 2048 --train.accumulate 64.

This has not been run: what is tested is that it builds, abstractly, and that its datasets come together. Parameters,
gradients and AdamW's moments, all in float32, are 108 GB, which `mesh.fsdp` splits: 13.5 GB each on eight 80 GB GPUs;
layers keep the results of their matrix products and compute the rest again.

Cost. 135 billion tokens are 5.8e21 floating-point operations: 21 days on eight H100s at 40 % of their peak. At 40 %
everywhere (operations / (0.4 x peak x 3,600 s)):

| tokens | H100, hours | TPU v5p, chip-hours | A100, hours |
|---:|---:|---:|---:|
| 135 billion | 4,073 | 8,775 | 12,910 |
| 1,000 billion | 30,123 | 64,906 | 95,486 |

LLaMA's 1,000 billion took 82,432 hours of an A100 (its table 15), 46 %.
"""

from pathlib import Path

from lm.config import Experiment
from lm.data.config import DataConfig, MixtureConfig
from lm.errors import check
from lm.models.presets import llama
from lm.optim import OptimConfig
from lm.sharding import MeshConfig
from lm.tasks.causal_lm import CausalLM
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig

DATASETS = Path("datasets/llama_7b")
SHARES = {
    "web_en": 44,
    "web_zh": 30,
    "code": 8,
    "books_en": 4.5,
    "books_zh": 2.5,
    "wiki_en": 4,
    "wiki_zh": 2,
    "papers": 3,
    "questions": 2,
}


def mixture() -> MixtureConfig:
    """The prepared datasets; none where none is there."""
    found = {name: sorted(DATASETS.glob(f"{name}/*/1.0.0")) for name in SHARES}
    if not any(found.values()):
        return MixtureConfig()
    for name, folders in found.items():
        check(
            folders, f"no dataset in {DATASETS / name}, and there are others; prepare it, as configs/llama_7b.py says"
        )
        check(len(folders) == 1, f"{len(folders)} datasets in {DATASETS / name}; keep the one to train on")
    return MixtureConfig(
        datasets=tuple(str(folders[0]) for folders in found.values()),
        weights=tuple(float(share) for share in SHARES.values()),
    )


def get_config() -> Experiment:
    mixed = mixture()
    data, tokenizer = DataConfig(seq_len=2048, mixture=mixed), TokenizerConfig()  # the datasets bring theirs
    if not mixed.datasets:
        source = "jsonl:data/llama_7b/*/*.jsonl.gz"
        data = DataConfig(name="all", root=str(DATASETS), source=source, validation_fraction=0.0005, seq_len=2048)
        tokenizer = TokenizerConfig(kind="bpe", vocab_size=32000, training_bytes=4_000_000_000)
    return Experiment(
        data=data,
        tokenizer=tokenizer,
        model=llama("7b", compute_dtype="bfloat16", remat="dots", unroll=1),
        task=CausalLM(loss_chunk=256),
        optim=OptimConfig(peak_lr=3e-4, warmup=2000.0, beta2=0.95, weight_decay=0.1, final_lr_fraction=0.1),
        train=TrainConfig(
            tokens=135_000_000_000,
            batch_size=512,
            accumulate=16,
            eval_every=500,
            eval_batches=50,
            save_every=500,
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
