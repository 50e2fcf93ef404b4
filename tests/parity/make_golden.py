"""Writes `golden/gpt2.npz`, what torch computes, for where torch is absent: `python tests/parity/make_golden.py`."""

from pathlib import Path

import numpy as np
import torch
import torch_models
from hugging_face import batch, draw, gpt2_shapes

GOLDEN = Path(__file__).parent / "golden" / "gpt2.npz"


def main() -> None:
    """Logits of the first batch (float32), the losses of the run, and a sum that tells whether weights are the same."""
    torch.use_deterministic_algorithms(True)
    weights = draw(gpt2_shapes())
    model = torch_models.gpt2(weights)
    logits = torch_models.logits(model, batch(0)[:, :-1])
    checksum = sum(float(np.abs(w).astype(np.float64).sum()) for w in weights.values())
    losses = np.array(torch_models.train(model))
    np.savez_compressed(GOLDEN, logits=logits, losses=losses, checksum=checksum)
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes, losses {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
