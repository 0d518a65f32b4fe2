"""Generation: sampling rules, the jitted decode loop, engines and searches over it."""

from jaxalign.decoding.beam import Beams, BeamSearch, beam_search
from jaxalign.decoding.contrastive import contrastive_search
from jaxalign.decoding.engine import Engine, Finished
from jaxalign.decoding.generate import generate
from jaxalign.decoding.generator import Generation, Generator
from jaxalign.decoding.groups import Samples
from jaxalign.decoding.mbr import minimum_bayes_risk
from jaxalign.decoding.rules import Constraint, Sampling
from jaxalign.decoding.sampling import sample

__all__ = [
    "BeamSearch",
    "Beams",
    "Constraint",
    "Engine",
    "Finished",
    "Generation",
    "Generator",
    "Samples",
    "Sampling",
    "beam_search",
    "contrastive_search",
    "generate",
    "minimum_bayes_risk",
    "sample",
]
