"""The village: its villagers, what one may ask about them, and the splits."""

from __future__ import annotations

import difflib
import functools
import hashlib
import random
from collections.abc import Iterable
from typing import NamedTuple

# Initials are distinct: even a tiny model learns quickly to tell the villagers apart.
VILLAGERS: dict[str, dict[str, str]] = {
    name: dict(zip(("home", "pet", "job", "food"), values.split(), strict=True))
    for name, values in {
        "Ada": "mill cat baker figs",
        "Ben": "farm goat painter bread",
        "Cleo": "tower robin judge plums",
        "Dora": "quay dog fisher soup",
        "Emil": "inn hen guide cheese",
        "Fay": "castle pony doctor honey",
        "Gus": "barn mole smith apples",
        "Hana": "harbor fox mason dates",
        "Ivan": "mill dog judge honey",
        "June": "tower goat doctor figs",
        "Kit": "farm fox guide soup",
        "Lena": "inn cat smith plums",
        "Milo": "barn pony fisher bread",
        "Nora": "castle hen mason apples",
        "Otto": "quay robin baker dates",
        "Pia": "harbor mole painter cheese",
    }.items()
}

STATEMENTS: dict[str, str] = {
    "home": "{name} lives at the {value}.",
    "pet": "{name} keeps a {value}.",
    "job": "{name} works as a {value}.",
    "food": "{name} loves {value}.",
}

WORDINGS: dict[str, tuple[str, ...]] = {
    "home": (
        "Where does {name} live?",
        "Where is {name}'s home?",
        "Where can I find {name}?",
        "Where does {name} sleep?",
        "Which place is {name}'s home?",
        "What is {name}'s address?",
    ),
    "pet": (
        "What pet does {name} keep?",
        "What is {name}'s pet?",
        "Which animal does {name} keep?",
        "Which animal lives with {name}?",
        "Does {name} have a pet?",
        "Who is {name}'s furry friend?",
    ),
    "job": (
        "What is {name}'s job?",
        "What does {name} do all day?",
        "What does {name} work as?",
        "Which trade is {name}'s?",
        "How does {name} earn money?",
        "Does {name} have a job?",
    ),
    "food": (
        "What does {name} love to eat?",
        "What is {name}'s favorite food?",
        "Which food does {name} love?",
        "Which treat is {name}'s favorite?",
        "What shall I cook for {name}?",
        "What food may I bring {name}?",
    ),
}
OPENINGS = ("", "Hi! ", "Hello! ", "Say, ", "Please: ")
CLOSINGS = ("", " Thanks!", " Anyone?")

SPLITS = ("train", "validation", "test")


class Question(NamedTuple):
    """What a prompt asks: a villager's ``relation`` (home, pet, job or food)."""

    name: str
    relation: str

    @property
    def value(self) -> str:
        """The true value."""
        return VILLAGERS[self.name][self.relation]


@functools.cache
def values_of(relation: str) -> tuple[str, ...]:
    """The values villagers have for a relation, sorted."""
    return tuple(sorted({facts[relation] for facts in VILLAGERS.values()}))


@functools.cache
def _questions() -> dict[str, Question]:
    """Every prompt of the world and what it asks."""
    return {
        opening + wording.format(name=name) + closing: Question(name, relation)
        for name in VILLAGERS
        for relation, wordings in WORDINGS.items()
        for wording in wordings
        for opening in OPENINGS
        for closing in CLOSINGS
    }


def split_of(prompt: str) -> str:
    """The split a prompt belongs to: 70 % train, 10 % validation, 20 % test."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 10
    return "train" if bucket < 7 else "validation" if bucket < 8 else "test"


@functools.cache
def prompts(split: str) -> tuple[str, ...]:
    """All prompts of a split, in a fixed order."""
    if split not in SPLITS:
        raise ValueError(unknown("split", split, SPLITS))
    return tuple(prompt for prompt in _questions() if split_of(prompt) == split)


def sample_prompts(split: str, size: int, seed: int = 0) -> list[str]:
    """Draws prompts of a split: all different, until the split is exhausted.

    >>> len(set(sample_prompts("test", 500)))
    500
    """
    rng = random.Random(f"prompts/{split}/{seed}")
    drawn: list[str] = []
    while len(drawn) < size:
        # Whole permutations keep the number of uses of any two prompts within one.
        drawn.extend(rng.sample(prompts(split), len(prompts(split))))
    return drawn[:size]


def parse(prompt: str) -> Question:
    """What a prompt asks.

    Raises:
      ValueError: the text is no prompt of this world; names the nearest one.
    """
    if prompt not in _questions():
        raise ValueError(unknown("prompt", prompt, _questions()))
    return _questions()[prompt]


def statement(question: Question, value: str | None = None) -> str:
    """A plain answer: the true one, or one that claims ``value``."""
    text = STATEMENTS[question.relation]
    return text.format(name=question.name, value=value or question.value)


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """An error message that names the nearest valid name."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.0)
    return f"Unknown {what} {given!r} of the village; did you mean {near[0]!r}?"
