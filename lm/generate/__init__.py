"""Text from a trained model: what to draw (`sampling`) and the cached loop that draws it (`decode`)."""

from lm.generate.decode import Finished, Generation, Generator
from lm.generate.sampling import SamplingConfig

__all__ = ["Finished", "Generation", "Generator", "SamplingConfig"]
