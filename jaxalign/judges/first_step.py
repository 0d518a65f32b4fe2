"""Judges that are one decoder step: a token's logit, or its chance against another.

MetricX-23 and -24 say the number of errors by the logit of one token, rerankers such as
monoT5 the relevance by the probability of one word where two are possible.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import batch as batches
from jaxalign import models
from jaxalign.data.bad_rows import nearest
from jaxalign.judges.network import NetworkJudge
from jaxalign.judges.template import Template
from jaxalign.models.products import float32_einsum

# What the encoder reads, without EOS unless it says so. MetricX-24 without a reference:
_METRICX = "source: {prompt} candidate: {response}"
# monoT5's:
_MONOT5 = "---\neos: 1\n---\nQuery: {prompt} Document: {response} Relevant:"

_SETTINGS = ("clip", "eos", "max_length")


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What is read off the first step: one id, or the first of two against the second.

    Attributes:
      ids: one or two.
      low, high: where the number is cut.
    """

    ids: tuple[int, ...]
    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        cut = f" in [{self.low}, {self.high}]" if math.isfinite(self.high) else ""
        return f"token {','.join(map(str, self.ids))}{cut}"


def token(text: str) -> NetworkJudge:
    """``token:PATH[?SETTINGS]#ID[,ID][#TEMPLATE]``: the decoder's first step.

    One id: its logit. Two: the probability of the first where there are no others.
    The encoder reads prompt and response, by default as MetricX-24 does, with two ids
    as monoT5 does; a template's file says otherwise. Settings, between ``&``, or at the
    template's head:

    * ``clip=LOW,HIGH``: the number is cut there;
    * ``max_length=N``: of the encoder's text, EOS counted;
    * ``eos=1`` or ``0``: whether that text ends with EOS.

    MetricX counts errors, from 0 to 25: a smaller number is better, so ask for
    ``-1*token:PATH?clip=0,25&max_length=1536#250089``.

    Raises:
      ValueError: for what is no id or setting; when first asked, for an id that the
        network lacks.
    """
    where, _, rest = text.partition("#")
    path, _, query = where.partition("?")
    numbers, _, file = rest.partition("#")
    ids = tuple(numbers.split(","))
    if len(ids) > 2 or not all(i.isdecimal() for i in ids):
        raise ValueError(
            f"token:{text} names no token: expected token:RUN_DIR#ID, such as "
            f"token:{path}#250089, or two, such as token:{path}#1176,6136."
        )
    if file:
        template = Template.read(file, _SETTINGS)
    else:
        usual = _METRICX if len(ids) == 1 else _MONOT5
        template = Template(usual, "the token judge's text", _SETTINGS)
    given = _settings(text, query)
    template.settings.update(given)
    low, high = _clip(template)
    reading = _Reading(tuple(map(int, ids)), low, high)
    max_length = int(template.number("max_length", 0))

    def forward(model: Any, params: Any, batch: batches.Batch) -> jax.Array:
        return _first_step(text, reading, model, params, batch)

    judge = NetworkJudge(path, str(reading), forward, template, max_length=max_length)
    judge.fingerprint += "".join(f"&{k}={v}" for k, v in sorted(given.items()))
    return judge


def _settings(text: str, query: str) -> dict[str, str]:
    found = {}
    for setting in query.split("&") if query else ():
        name, equals, value = setting.partition("=")
        if not equals or name not in _SETTINGS:
            raise ValueError(
                f"token:{text} sets {setting!r}; expected name=value of "
                f"{', '.join(_SETTINGS)}{nearest(name, _SETTINGS)}."
            )
        found[name] = value
    return found


def _clip(template: Template) -> tuple[float, float]:
    ends = template.settings.get("clip", "-inf,inf")
    try:
        low, high = map(float, ends.replace(",", " ").split())
    except ValueError:
        low = high = math.nan
    if not low < high:
        raise ValueError(
            f"{template.origin}: clip must be LOW,HIGH, such as 0,25; got {ends!r}."
        )
    return low, high


def _first_step(
    text: str, reading: _Reading, model: Any, params: Any, batch: batches.Batch
) -> jax.Array:
    """``[B, R]``: the reading of each response's first decoder step."""
    states, kernel, _ = models.final_states(model, params, batch)
    for number in reading.ids:
        if number >= kernel.shape[-1]:
            raise ValueError(
                f"token:{text}: the network has {kernel.shape[-1]} tokens, numbered "
                f"from 0; there is no {number}."
            )
    columns = kernel[:, list(reading.ids)].astype(states.dtype)
    logits = float32_einsum("...e,en->...n", states, columns)
    values = logits[..., 0]
    if len(reading.ids) == 2:
        values = jax.nn.softmax(logits)[..., 0]
    values = jnp.clip(values, reading.low, reading.high)
    segments = batch["decoder_segment_ids"]
    before = jnp.pad(segments[..., :-1], ((0, 0), (0, 0), (1, 0)))
    first = jnp.where(segments != before, values, 0.0)
    return batches.sum_by_response(first, segments, batch["response_mask"].shape[1])
