"""T5 networks, their heads, and the log-probabilities of responses."""

from jaxalign.models.config import T5Config
from jaxalign.models.conversion import relayout, stack_layers, unstack_layers
from jaxalign.models.heads import (
    RewardModel,
    TokenValueModel,
    ValueHead,
    ValueModel,
)
from jaxalign.models.scoring import (
    final_states,
    response_logps,
    target_logps,
    token_logps,
)
from jaxalign.models.t5 import T5, init_params, logical_axes
from jaxalign.models.vocabulary import HeadOutputs, head_outputs, mean_logits

__all__ = [
    "HeadOutputs",
    "RewardModel",
    "T5",
    "T5Config",
    "TokenValueModel",
    "ValueHead",
    "ValueModel",
    "final_states",
    "head_outputs",
    "init_params",
    "logical_axes",
    "mean_logits",
    "relayout",
    "response_logps",
    "stack_layers",
    "target_logps",
    "token_logps",
    "unstack_layers",
]
