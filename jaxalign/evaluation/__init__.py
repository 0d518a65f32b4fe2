"""Metrics of texts, judges' verdicts on them, and comparisons with intervals."""

from jaxalign.evaluation.compare import Comparison, compare_responses, mean_reward
from jaxalign.evaluation.intervals import Interval, mean_with_ci, wilson_interval
from jaxalign.evaluation.judging import verdicts
from jaxalign.evaluation.metrics import run_metrics

__all__ = [
    "Comparison",
    "Interval",
    "compare_responses",
    "mean_reward",
    "mean_with_ci",
    "run_metrics",
    "verdicts",
    "wilson_interval",
]
