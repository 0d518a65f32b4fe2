"""Pure, unreduced losses: arrays in, one float32 loss per example out.

A loss never sees a model, a tokenizer or a trainer. Objectives
(`jaxalign.objectives`) join a loss with a model's forward pass and its metrics.
"""

from jaxalign.losses.contrastive import info_nce, score_spread, sinkhorn, swav
from jaxalign.losses.likelihood import RATIONALE_TERMS, cross_entropy, rationale
from jaxalign.losses.pairwise import (
    apo_down,
    apo_zero,
    dpo,
    dpo_nll,
    exo_pair,
    hinge,
    ipo,
    log_ratios,
    masked,
    nca_pair,
    robust_dpo,
    sppo_hard,
)
from jaxalign.losses.reference_free import cpo, orpo, simpo, slic_hf
from jaxalign.losses.rewards import dro_p, dro_p_at_mean, dro_v, reward_weights
from jaxalign.losses.scores import (
    AGGREGATES,
    aggregate,
    bradley_terry,
    centring,
    plackett_luce,
    score_ordinal,
    score_regression,
)
from jaxalign.losses.unpaired import apo_zero_unpaired, bco, kto, kto_at_reference_point

__all__ = [
    "AGGREGATES",
    "RATIONALE_TERMS",
    "aggregate",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco",
    "bradley_terry",
    "centring",
    "cpo",
    "cross_entropy",
    "dpo",
    "dpo_nll",
    "dro_p",
    "dro_p_at_mean",
    "dro_v",
    "exo_pair",
    "hinge",
    "info_nce",
    "ipo",
    "kto",
    "kto_at_reference_point",
    "log_ratios",
    "masked",
    "nca_pair",
    "orpo",
    "plackett_luce",
    "rationale",
    "reward_weights",
    "robust_dpo",
    "score_ordinal",
    "score_regression",
    "score_spread",
    "simpo",
    "sinkhorn",
    "slic_hf",
    "sppo_hard",
    "swav",
]
