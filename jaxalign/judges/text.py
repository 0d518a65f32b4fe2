"""A teacher asked with a rubric: its answer is read for a number, or for A or B.

A rubric is a text file with ``{prompt}`` and ``{response}``, or ``{prompt}``, ``{a}``
and ``{b}`` to compare two; other names are looked up in a row's metadata. At its head,
between two lines of ``---``, it may set

* ``read``: a regular expression, of which the last match in the answer counts (its
  first group, if it has one); by default any number, or ``A``, ``B`` or ``tie``;
* ``range``: the least and the largest score, such as ``1 5``;
* ``samples``: answers asked for, whose mean is taken; 1 by default;
* ``temperature``: 0 by default, 1 where there are several samples;
* ``max_tokens``: of an answer, 256 by default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign import teachers
from jaxalign.evaluation.judging import Metadata
from jaxalign.judges.template import Template

_SETTINGS = ("read", "range", "samples", "temperature", "max_tokens")
# No part of a word, nor what stands behind a slash or "out of": 4/5 is a 4.
_NUMBER = r"(?<![\w./-])(?<!out of )-?\d+(?:\.\d+)?"
# The article before a word is no letter.
_LETTER = r"\b(A(?! [a-z])|B|[Tt]ie)\b"
_PREFERENCES = {"A": 1.0, "B": 0.0, "TIE": 0.5}


class _Asked:
    """A teacher, a rubric and how an answer is read."""

    _read = _NUMBER

    def __init__(self, teacher: teachers.Teacher, rubric: Template):
        self._teacher, self._rubric = teacher, rubric
        self.fingerprint = f"text:{teacher.fingerprint}#{rubric.fingerprint}"
        self._samples = int(rubric.number("samples", 1))
        self._temperature = rubric.number("temperature", float(self._samples > 1))
        self._max_tokens = int(rubric.number("max_tokens", 256))
        try:
            self._pattern = re.compile(rubric.settings.get("read", self._read))
            ends = rubric.settings.get("range", "-inf inf")
            self._low, self._high = map(float, ends.split())
        except (re.error, ValueError) as error:
            raise ValueError(
                f"{rubric.origin}: expected 'read: REGULAR EXPRESSION' and 'range: LOW "
                f"HIGH' ({error})."
            ) from error

    def _ask(self, about: Metadata | None, **texts: Sequence[str]) -> np.ndarray:
        """The mean of what is read off each row's answers, NaN for none."""
        rows = [
            dict(zip(texts, row, strict=True))
            for row in zip(*texts.values(), strict=True)
        ]
        more = about or [None] * len(rows)
        answers = self._teacher.generate(
            [self._rubric.fill(m, **r) for r, m in zip(rows, more, strict=True)],
            n=self._samples,
            temperature=self._temperature,
            max_tokens=self._max_tokens,
        )
        read = [[v for a in given if (v := self._value(a)) == v] for given in answers]
        means = [sum(values) / len(values) if values else math.nan for values in read]
        return np.array(means, np.float32)

    def _value(self, answer: str | None) -> float:
        matches = list(self._pattern.finditer(answer or ""))
        if not matches:
            return math.nan
        value = self._number(matches[-1][1 if self._pattern.groups else 0])
        return value if self._low <= value <= self._high else math.nan

    def _number(self, text: str | None) -> float:
        try:
            return float(text or "")
        except ValueError:
            return math.nan


class TextJudge(_Asked):
    """Scores by a teacher and a rubric with ``{response}``."""

    def __call__(self, prompts, responses, metadata=None):
        """Float32 ``[n]``; NaN where no answer holds a number of the rubric's range."""
        return self._ask(metadata, prompt=prompts, response=responses)


class TextPreference(_Asked):
    """Prefers by a teacher and a rubric with ``{a}`` and ``{b}``."""

    _read = _LETTER

    def compare(self, prompts, a, b, metadata=None):
        """Float32 ``[n]``; NaN where no answer says A, B or tie."""
        return self._ask(metadata, prompt=prompts, a=a, b=b)

    def _number(self, text: str | None) -> float:
        return _PREFERENCES.get((text or "").upper(), math.nan)


def judge(text: str) -> TextJudge | TextPreference:
    """``text:TEACHER#RUBRIC``, such as ``text:http://127.0.0.1:8000/v1#m#rubric.md``.

    Raises:
      ValueError: for a rubric that asks neither about a response nor about two.
      FileNotFoundError: for a rubric or a teacher that is not there.
    """
    teacher, _, path = text.rpartition("#")
    if not teacher:
        raise ValueError(
            f"text:{text} names no rubric: expected text:TEACHER#RUBRIC.md, such as "
            f"text:{text}#rubric.md."
        )
    rubric = Template.read(path, _SETTINGS)
    scores, compares = "response" in rubric.names, {"a", "b"} <= rubric.names
    if scores == compares:
        raise ValueError(
            f"{path} has to hold either {{response}}, to score one, or {{a}} and {{b}},"
            f" to compare two; it holds {sorted(rubric.names)}."
        )
    kind: Any = TextPreference if compares else TextJudge
    return kind(teachers.resolve(teacher), rubric)
