"""Where torch is absent: a LLaMA 3 folder gives the logits that transformers computed (tests/parity/make_golden.py)."""

from pathlib import Path

import jax
import numpy as np
from pretrained import LLAMA_CONFIG, golden_tokens, llama_weights, load_folder, write_folder

from lm.models.transformer import Transformer


def test_logits_of_llama_3(tmp_path):
    golden = np.load(Path(__file__).parents[1] / "parity" / "golden" / "llama.npz")["logits"]
    folder = write_folder(tmp_path / "source", llama_weights(LLAMA_CONFIG), LLAMA_CONFIG, parts=3)
    model, params = load_folder(folder)
    assert np.ptp(golden) > 1
    ours = jax.jit(lambda params: Transformer(model).apply({"params": params}, golden_tokens(LLAMA_CONFIG)))(params)
    np.testing.assert_allclose(ours[..., ::8], golden, atol=1e-4, rtol=0)
