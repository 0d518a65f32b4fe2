"""Generation: sampling rules, the jitted decode loop, engines and searches over it."""

from jaxalign.decoding.engine import Engine, Finished
from jaxalign.decoding.generate import generate
from jaxalign.decoding.generator import Generation, Generator
from jaxalign.decoding.loop import Constraint, Samples
from jaxalign.decoding.sampling import Sampling, sample

__all__ = [
    "Constraint",
    "Engine",
    "Finished",
    "Generation",
    "Generator",
    "Samples",
    "Sampling",
    "generate",
    "sample",
]
