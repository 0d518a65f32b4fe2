"""Pure, unreduced losses: arrays in, one float32 loss per example out.

A loss never sees a model, a tokenizer or a trainer. Objectives
(`jaxalign.objectives`) join a loss with a model's forward pass and its metrics.
"""

from jaxalign.losses.anchored import apo_down, apo_zero, exo_pair, nca_pair, sppo_hard
from jaxalign.losses.likelihood import cross_entropy
from jaxalign.losses.pairwise import (
    dpo,
    dpo_nll,
    hinge,
    ipo,
    log_ratios,
    margins,
    masked,
    robust_dpo,
)
from jaxalign.losses.rationales import RATIONALE_TERMS, rationale
from jaxalign.losses.reference_free import cpo, orpo, simpo, slic_hf
from jaxalign.losses.rewards import dro_p, dro_p_at_mean, dro_v, reward_weights
from jaxalign.losses.unpaired import apo_zero_unpaired, bco, kto, kto_at_reference_point

__all__ = [
    "RATIONALE_TERMS",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco",
    "cpo",
    "cross_entropy",
    "dpo",
    "dpo_nll",
    "dro_p",
    "dro_p_at_mean",
    "dro_v",
    "exo_pair",
    "hinge",
    "ipo",
    "kto",
    "kto_at_reference_point",
    "log_ratios",
    "margins",
    "masked",
    "nca_pair",
    "orpo",
    "rationale",
    "reward_weights",
    "robust_dpo",
    "simpo",
    "slic_hf",
    "sppo_hard",
]
