"""T5 networks, their heads, and the log-probabilities of responses."""

from jaxalign.models.config import T5Config
from jaxalign.models.conversion import relayout, stack_layers, unstack_layers
from jaxalign.models.embedding import EmbeddingModel
from jaxalign.models.heads import ScalarModel
from jaxalign.models.networks import (
    EncoderDecoder,
    describe,
    graft,
    init_params,
    logical_axes,
    register,
    restored,
    shapes,
    stored,
)
from jaxalign.models.reward import RewardModel
from jaxalign.models.scoring import (
    encode,
    final_states,
    response_logps,
    token_logps,
)
from jaxalign.models.t5 import T5
from jaxalign.models.vocabulary import HeadOutputs, head_outputs, mean_logits

__all__ = [
    "EmbeddingModel",
    "EncoderDecoder",
    "RewardModel",
    "ScalarModel",
    "graft",
    "register",
    "restored",
    "shapes",
    "stored",
    "HeadOutputs",
    "T5",
    "T5Config",
    "describe",
    "encode",
    "final_states",
    "head_outputs",
    "init_params",
    "logical_axes",
    "mean_logits",
    "relayout",
    "response_logps",
    "stack_layers",
    "token_logps",
    "unstack_layers",
]
