"""Generation: sampling rules, the jitted decode loop, and a driver over texts."""

from jaxalign.decoding.generate import Samples, generate
from jaxalign.decoding.generator import Generation, Generator
from jaxalign.decoding.sampling import Sampling, sample

__all__ = ["Generation", "Generator", "Samples", "Sampling", "generate", "sample"]
