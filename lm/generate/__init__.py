"""Text from a trained model: what to draw (`sampling`), the cached loops (`decode`, `beam`), and prompts to texts."""

from lm.generate.generator import Finished, Generation, Generator
from lm.generate.sampling import SamplingConfig

__all__ = ["Finished", "Generation", "Generator", "SamplingConfig"]
