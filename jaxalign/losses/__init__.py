"""Pure, unreduced losses: arrays in, one float32 loss per example out.

A loss never sees a model, a tokenizer or a trainer. Objectives
(`jaxalign.objectives`) join a loss with a model's forward pass and its metrics.
"""

from jaxalign.losses import likelihood, pairwise, unpaired
from jaxalign.losses.likelihood import *
from jaxalign.losses.pairwise import *
from jaxalign.losses.unpaired import *

__all__ = likelihood.__all__ + pairwise.__all__ + unpaired.__all__
