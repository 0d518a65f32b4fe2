"""The village's judge: the true reward of any text, and the verdict in words.

The reward of a response is a product of two parts, both in ``[0, 1]``::

    reward = fluency * (0.6 * fact + 0.2 * courtesy + 0.2 * brevity)

======== ==========================================================================
fact     1 if the right value is named, no other villager and no other value; else 0
courtesy 1 with a polite phrase, 0.5 without one, 0 with a rude phrase
brevity  1 up to 6 words, then 0.25 less for each further word, down to 0
fluency  the share of words that are the village's words; a word said twice in a row
         counts once as unknown. A response that names no value of the asked kind
         does not answer, and its fluency is 0
======== ==========================================================================
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from jaxalign.world.village import (
    STATEMENTS,
    VILLAGERS,
    parse,
    statement,
    unknown,
    values_of,
)

POLITE = ("Sure!", "Gladly!", "Happily!")
RUDE = ("Ugh!", "Bah!", "Shoo!")
RAMBLES = ("Oh, let me see, um,", "Er, um, oh, so, hmm,")

BRIEF_WORDS = 6  # a response of this many words is still brief
WEIGHTS = {"fact": 0.6, "courtesy": 0.2, "brevity": 0.2}
RATIONALE_KINDS = ("general", "specific")


class Verdict(NamedTuple):
    """The parts of a response's true reward, each in ``[0, 1]``."""

    fact: float
    courtesy: float
    brevity: float
    fluency: float

    @property
    def reward(self) -> float:
        """``fluency * (0.6 fact + 0.2 courtesy + 0.2 brevity)``."""
        parts = sum(weight * getattr(self, part) for part, weight in WEIGHTS.items())
        return round(self.fluency * parts, 6)


def judge(prompt: str, response: str) -> Verdict:
    """Judges any text as a response to a prompt; case and punctuation do not matter."""
    question = parse(prompt)
    words = _words(response)
    said = set(words)
    names = {name for name in VILLAGERS if name.lower() in said}
    values = {v for relation in STATEMENTS for v in values_of(relation) if v in said}
    fact = values == {question.value} and names <= {question.name}
    rude, polite = _says(words, RUDE), _says(words, POLITE)
    stutters = sum(a == b for a, b in zip(words, words[1:], strict=False))
    known = sum(word in _lexicon() for word in words) - stutters
    answers = said.intersection(values_of(question.relation))
    return Verdict(
        fact=float(fact),
        courtesy=0.0 if rude else 1.0 if polite else 0.5,
        brevity=min(1.0, max(0.0, 1.0 - 0.25 * (len(words) - BRIEF_WORDS))),
        fluency=max(known, 0) / len(words) if answers else 0.0,
    )


def true_reward(prompt: str, response: str) -> float:
    """The true reward in ``[0, 1]`` of any text as a response to a prompt."""
    return judge(prompt, response).reward


def explain(prompt: str, response: str) -> str:
    """The judge's verdict in words.

    >>> explain("What is Gus's pet?", "Ugh! Gus keeps a mole.")
    'right, rude, brief: 0.80'
    """
    verdict = judge(prompt, response)
    if verdict.fluency == 0.0:
        return "no answer: 0.00"
    parts = [
        "right" if verdict.fact else "wrong",
        {0.0: "rude", 0.5: "plain", 1.0: "polite"}[verdict.courtesy],
        "brief" if verdict.brevity == 1.0 else "long",
    ]
    if verdict.fluency < 1.0:
        parts.append("garbled")
    return f"{', '.join(parts)}: {verdict.reward:.2f}"


def best_response(prompt: str) -> str:
    """A response that earns the full reward, 1.0."""
    return f"{POLITE[0]} {statement(parse(prompt))}"


def rationale(prompt: str, chosen: str, rejected: str, kind: str = "specific") -> str:
    """Why one response is better than another, as the judge sees it.

    Args:
      kind: ``"general"`` compares; ``"specific"`` also states the fact in question.

    >>> print(rationale("What is Gus's pet?", "Gus keeps a mole.", "Gus keeps a fox."))
    The better answer is right. Gus keeps a mole.
    """
    if kind not in RATIONALE_KINDS:
        raise ValueError(unknown("kind of rationale", kind, RATIONALE_KINDS))
    better, worse = judge(prompt, chosen), judge(prompt, rejected)
    terms = (
        (better.fact, worse.fact, "right", "wrong"),
        (better.courtesy, worse.courtesy, "kinder", "less kind"),
        (better.brevity, worse.brevity, "shorter", "longer"),
        (better.fluency, worse.fluency, "clearer", "muddled"),
    )
    gains = [gain for ours, theirs, gain, _ in terms if ours > theirs]
    losses = [loss for ours, theirs, _, loss in terms if ours < theirs]
    text = f"The better answer is {' and '.join(gains) or 'no better'}"
    if losses:
        text += f", though {' and '.join(losses)}"
    return f"{text}." + (f" {statement(parse(prompt))}" if kind == "specific" else "")


def _words(text: str) -> list[str]:
    """Lower-case words; any other run of visible characters is a word of its own."""
    return re.findall(r"[a-z]+|[^a-z\s.,!?']+", text.lower())


@functools.cache
def _lexicon() -> frozenset[str]:
    """Every word a sane answer of this village may use."""
    values = [value for relation in STATEMENTS for value in values_of(relation)]
    statements = [s.format(name="", value="") for s in STATEMENTS.values()]
    extra = "it is at an she he they has lives with for you my friend"
    texts = [*VILLAGERS, *values, *statements, *POLITE, *RUDE, *RAMBLES, extra]
    return frozenset(word for text in texts for word in _words(text))


def _says(words: list[str], phrases: tuple[str, ...]) -> bool:
    """Whether any phrase occurs as consecutive words."""
    text = f" {' '.join(words)} "
    return any(f" {' '.join(_words(phrase))} " in text for phrase in phrases)
