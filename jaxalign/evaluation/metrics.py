"""Metrics of generated text, written as seqio's ``metric_fns``.

A metric is a function ``(targets, predictions) -> {name: value}``; with the argument
names ``(targets, scores)`` it receives log-probabilities of the targets instead, and
with ``(targets, predictions, aux_values)`` also what the generator knows beside the
text. ``run_metrics`` calls any list of them, so the ``metric_fns`` of a seqio task work
unchanged. Rates are in percent, as T5 reports them.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)

MetricFn = Callable[..., Mapping[str, Any]]

_SIGNATURES = (
    ("targets", "predictions"),
    ("targets", "scores"),
    ("targets", "predictions", "aux_values"),
)


def _pairs(targets: Sequence[Any], predictions: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Each target with its prediction; at least one."""
    if len(targets) != len(predictions):
        raise ValueError(
            f"Expected one prediction per target, got {len(targets)} targets and "
            f"{len(predictions)} predictions."
        )
    if len(targets) == 0:
        raise ValueError("A metric needs at least one example, got none.")
    return list(zip(targets, predictions, strict=True))


def _references(target: str | Sequence[str]) -> list[str]:
    """One text or several equally good ones, as a list; never none."""
    texts = [target] if isinstance(target, str) else list(target)
    if not texts:
        raise ValueError(
            "An example has an empty list of references: expected a text, or a list "
            "of at least one. Leave out examples that have nothing to compare with."
        )
    return texts


def _tokens(sequence: Any) -> list[Any]:
    """Token ids as they are; a text split at white space."""
    if isinstance(sequence, str):
        return sequence.split()
    return np.asarray(sequence).tolist()


def exact_match(
    targets: Sequence[str | Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
    """How many predictions equal a reference, white space at the ends aside.

    Args:
      targets: a text per example, or several acceptable ones.

    >>> exact_match(["4", ["yes", "true"]], ["4 ", "no"])
    {'exact_match': 50.0}
    """
    hits = [
        prediction.strip() in {text.strip() for text in _references(target)}
        for target, prediction in _pairs(targets, predictions)
    ]
    return {"exact_match": 100.0 * float(np.mean(hits))}


def sequence_accuracy(
    targets: Sequence[Any], predictions: Sequence[Any]
) -> dict[str, float]:
    """How many predictions equal their target in every token."""
    hits = [_tokens(t) == _tokens(p) for t, p in _pairs(targets, predictions)]
    return {"sequence_accuracy": 100.0 * float(np.mean(hits))}


def token_accuracy(
    targets: Sequence[Any], predictions: Sequence[Any]
) -> dict[str, float]:
    """How many tokens stand where the target has them, over all examples.

    Each example counts ``max(len(target), len(prediction))`` positions, so that 100
    means equality and babbling past the end costs.

    >>> token_accuracy([[5, 6, 7]], [[5, 9, 7, 7]])
    {'token_accuracy': 50.0}
    """
    hits = positions = 0
    for pair in _pairs(targets, predictions):
        target, prediction = map(_tokens, pair)
        hits += sum(t == p for t, p in zip(target, prediction, strict=False))
        positions += max(len(target), len(prediction))
    return {"token_accuracy": 100.0 * hits / max(positions, 1)}


def _import_optional(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This metric needs the package {package!r}, which is not installed. "
            "Install it with: pip install 'jaxalign[metrics]'"
        ) from error


def bleu(
    targets: Sequence[str | Sequence[str]],
    predictions: Sequence[str],
    *,
    tokenize: str = "intl",
) -> dict[str, float]:
    """Corpus BLEU by ``sacrebleu``, with T5's settings (``intl`` tokenisation).

    Args:
      tokenize: sacrebleu's tokenisation.

    Raises:
      ImportError: when sacrebleu is absent (extra ``metrics``).
    """
    _pairs(targets, predictions)
    sacrebleu = _import_optional("sacrebleu", "sacrebleu")
    references = [_references(target) for target in targets]
    # One stream per reference number; examples with fewer references end theirs early.
    streams = [list(texts) for texts in itertools.zip_longest(*references)]
    score = sacrebleu.corpus_bleu(list(predictions), streams, tokenize=tokenize)
    return {"bleu": float(score.score)}


# Scripts that are written without spaces between words.
_UNSPACED = (
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TIBETAN",
)


def words(text: str) -> list[str]:
    """The words of a text in any script, for ROUGE.

    Lower case, letters, marks and digits; a character of a script without spaces is a
    word of its own. On ASCII text these are the words of ``rouge-score``, which knows
    no letters but ``a`` to ``z``.

    >>> words("Don't go, Zoë! 東京へ नमस्ते")
    ['don', 't', 'go', 'zoë', '東', '京', 'へ', 'नमस्ते']
    """
    found = [""]
    for c in unicodedata.normalize("NFC", text.lower()):
        kind = unicodedata.category(c)[0]
        if kind not in "LMN":
            found.append("")
        elif c.isascii() or not unicodedata.name(c, "").startswith(_UNSPACED):
            found[-1] += c
        elif kind == "M" and len(found) > 1 and found[-2] and not found[-1]:
            found[-2] += c  # a mark belongs to the character before it
        else:
            found += [c, ""]
    return [word for word in found if word]


def rouge(
    targets: Sequence[str | Sequence[str]],
    predictions: Sequence[str],
    *,
    tokenize: str = "unicode",
) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-Lsum F-measures by ``rouge-score``, stemming off.

    Sentences of ROUGE-Lsum are lines. With several references the best one counts,
    for each measure separately.

    Args:
      tokenize: ``"unicode"``, the words of any script (`words`); or ``"ascii"``, those
        of ``rouge-score`` itself, to compare with published numbers of texts that have
        letters beyond ``a`` to ``z``, all of which it drops. Equal on ASCII text.

    Returns:
      ``rouge1``, ``rouge2``, ``rougeLsum`` in percent, means over examples.
    """
    pairs = _pairs(targets, predictions)
    if tokenize not in ("unicode", "ascii"):
        raise ValueError(f"tokenize must be 'unicode' or 'ascii', got {tokenize!r}.")
    scoring = _import_optional("rouge_score.rouge_scorer", "rouge-score")
    names = ("rouge1", "rouge2", "rougeLsum")
    tokenizer = SimpleNamespace(tokenize=words) if tokenize == "unicode" else None
    scorer = scoring.RougeScorer(names, tokenizer=tokenizer)
    texts = [text for target in targets for text in _references(target)]
    bare = [t for t in texts if t.strip() and not words(t)]
    dropped = [t for t in texts if any(not w.isascii() for w in words(t))]
    zero = (
        "no letter or digit, such as %.40r: ROUGE gives them 0 whatever is predicted."
    )
    lost = (
        "letters beyond a to z, such as %.40r, which ROUGE drops with "
        "tokenize='ascii'; use 'unicode' for them."
    )
    for found, what in ((bare, zero), (dropped * (tokenize == "ascii"), lost)):
        if found:
            text = f"%d of %d references have {what}"
            _log.warning(text, len(found), len(texts), found[0])
    scores = [scorer.score_multi(_references(t), p) for t, p in pairs]
    means = {n: np.mean([score[n].fmeasure for score in scores]) for n in names}
    return {name: 100.0 * float(mean) for name, mean in means.items()}


def _name(metric_fn: MetricFn) -> str:
    return getattr(metric_fn, "__qualname__", None) or type(metric_fn).__qualname__


def _signature(metric_fn: MetricFn) -> tuple[str, ...]:
    """The names of the arguments without a default, which say what a metric wants."""
    free = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(metric_fn).parameters.values()
    wanted = (p for p in parameters if p.kind not in free)
    required = tuple(p.name for p in wanted if p.default is p.empty)
    if required not in _SIGNATURES:
        raise ValueError(
            f"Metric {_name(metric_fn)} takes the arguments {required}; expected one "
            f"of {list(_SIGNATURES)}. seqio tells metrics apart by these names: rename "
            "the arguments, or give the others a default."
        )
    return required


def run_metrics(
    metric_fns: Sequence[MetricFn],
    targets: Sequence[Any],
    *,
    predictions: Sequence[Any] | None = None,
    scores: Sequence[float] | None = None,
    aux_values: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Applies seqio-style metrics and merges what they return.

    Args:
      metric_fns: functions told apart by their argument names (see the module).

    Returns:
      ``{name: value}``; ``seqio.metrics.Scalar`` and its like are unwrapped.

    Raises:
      ValueError: on unknown arguments, missing inputs or a name returned twice.

    >>> run_metrics([exact_match, token_accuracy], ["a b"], predictions=["a c"])
    {'exact_match': 0.0, 'token_accuracy': 50.0}
    """
    inputs = {"predictions": predictions, "scores": scores, "aux_values": aux_values}
    signatures = [_signature(metric_fn) for metric_fn in metric_fns]
    results: dict[str, Any] = {}
    for metric_fn, (_, *names) in zip(metric_fns, signatures, strict=True):
        missing = [name for name in names if inputs[name] is None]
        if missing:
            raise ValueError(
                f"Metric {_name(metric_fn)} needs {missing}, which this evaluation "
                f"does not provide; pass {', '.join(f'{name}=' for name in missing)}."
            )
        for name, value in metric_fn(targets, *(inputs[n] for n in names)).items():
            if name in results:
                raise ValueError(
                    f"Two metrics return {name!r}; rename one of them, or list the "
                    "function only once."
                )
            results[name] = getattr(value, "value", value)
    return results
