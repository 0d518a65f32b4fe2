"""Pure, unreduced losses: arrays in, one float32 loss per example out.

A loss never sees a model, a tokenizer or a trainer. Objectives
(`jaxalign.objectives`) join a loss with a model's forward pass and its metrics.
"""

from jaxalign.losses import (
    anchored,
    likelihood,
    pairwise,
    rationales,
    reference_free,
    rewards,
    unpaired,
)
from jaxalign.losses.anchored import *
from jaxalign.losses.likelihood import *
from jaxalign.losses.pairwise import *
from jaxalign.losses.rationales import *
from jaxalign.losses.reference_free import *
from jaxalign.losses.rewards import *
from jaxalign.losses.unpaired import *

__all__ = [
    *anchored.__all__,
    *likelihood.__all__,
    *pairwise.__all__,
    *rationales.__all__,
    *reference_free.__all__,
    *rewards.__all__,
    *unpaired.__all__,
]
