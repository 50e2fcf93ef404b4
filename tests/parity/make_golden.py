"""Writes `golden/`, what torch computes, for where torch is absent: `PYTHONPATH=tests python
tests/parity/make_golden.py`."""

from pathlib import Path

import numpy as np
import torch
import torch_models
import transformers
from hugging_face import batch, draw, gpt2_shapes
from pretrained import LLAMA_CONFIG, golden_tokens, llama_weights

GOLDEN = Path(__file__).parent / "golden"


def gpt2() -> None:
    """Logits of the first batch (float32), the losses of the run, and a sum that tells whether weights are the same."""
    weights = draw(gpt2_shapes())
    model = torch_models.gpt2(weights)
    logits = torch_models.logits(model, batch(0)[:, :-1])
    checksum = sum(float(np.abs(w).astype(np.float64).sum()) for w in weights.values())
    losses = np.array(torch_models.train(model))
    np.savez_compressed(GOLDEN / "gpt2.npz", logits=logits, losses=losses, checksum=checksum)
    print(f"gpt2.npz: losses {losses[0]:.4f} to {losses[-1]:.4f}")


def families() -> None:
    """BERT's logits of words and pairs with their loss, and T5's logits."""
    bert = torch_models.bert_outputs(torch_models.bert())
    t5 = torch_models.t5_logits(torch_models.t5())
    np.savez_compressed(GOLDEN / "families.npz", t5=t5, **{f"bert_{name}": value for name, value in bert.items()})
    print(f"families.npz: BERT's loss {bert['loss']:.4f}")


def llama() -> None:
    """Every eighth logit of a LLaMA 3."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_CONFIG))
    weights = {name: torch.from_numpy(weight) for name, weight in llama_weights(LLAMA_CONFIG).items()}
    model.load_state_dict(weights)
    logits = torch_models.logits(model.eval(), golden_tokens(LLAMA_CONFIG))[..., ::8]
    np.savez_compressed(GOLDEN / "llama.npz", logits=logits)
    print(f"llama.npz: from {logits.min():.2f} to {logits.max():.2f}")


def main() -> None:
    """All files."""
    torch.use_deterministic_algorithms(True)
    gpt2()
    families()
    llama()


if __name__ == "__main__":
    main()
