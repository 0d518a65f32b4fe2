"""Metrics of generated text, judges, and comparisons with confidence intervals."""

from jaxalign.evaluation.compare import Comparison, compare_responses, mean_reward
from jaxalign.evaluation.intervals import Interval, mean_with_ci, wilson_interval
from jaxalign.evaluation.judges import resolve_callable
from jaxalign.evaluation.metrics import run_metrics

__all__ = [
    "Comparison",
    "Interval",
    "compare_responses",
    "mean_reward",
    "mean_with_ci",
    "resolve_callable",
    "run_metrics",
    "wilson_interval",
]
