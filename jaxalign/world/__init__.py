"""The village: an embedded instruction world whose true reward is a program.

Sixteen villagers, four questions one may ask about each (home, pet, job, food), and
demonstrators who answer imperfectly: some err, some are rude, some ramble. Because
:func:`true_reward` judges any text exactly, the effect of every objective can be
measured without a reward model, and with confidence intervals.

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

Prompts are compositions (opening x wording x villager x closing). They are assigned
to ``train``, ``validation`` and ``test`` by a hash of their text, so the splits are
disjoint whatever the seed, and every test prompt is an unseen combination of seen
parts.

Row ``i`` of a data set is a pure function of ``(schema, split, seed, i)``.

>>> true_reward("Where does Ada live?", "Gladly! Ada lives at the mill.")
1.0
>>> true_reward("Where does Ada live?", "Ugh! Ada lives at the farm.")
0.2
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
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

POLITE = ("Sure!", "Gladly!", "Happily!")
RUDE = ("Ugh!", "Bah!", "Shoo!")
RAMBLES = ("Oh, let me see, um,", "Er, um, oh, so, hmm,")

BRIEF_WORDS = 6  # a response of this many words is still brief
WEIGHTS = {"fact": 0.6, "courtesy": 0.2, "brevity": 0.2}
SCHEMAS = ("supervised", "trajectory", "preference", "rationale")
RATIONALE_KINDS = ("general", "specific")
SPLITS = ("train", "validation", "test")
SIZES = {"train": 8000, "validation": 500, "test": 1000}  # rows, unless told otherwise

FLIP_PROBABILITY = 0.1  # of a preference, and of a thumb
REWARD_NOISE = 0.1  # standard deviation of the Gaussian added to scalar rewards
THUMB_THRESHOLD = 0.65  # true rewards above it earn a thumb up, before flips


class Demonstrator(NamedTuple):
    """How a source of responses behaves: probabilities of each kind of slip."""

    error: float  # a wrong value, uniform over the others
    polite: float
    rude: float
    ramble: float


# Of different quality, none of them perfect. Supervised data mix them evenly.
DEMONSTRATORS: dict[str, Demonstrator] = {
    "careful": Demonstrator(error=0.15, polite=0.5, rude=0.1, ramble=0.2),
    "hasty": Demonstrator(error=0.45, polite=0.1, rude=0.5, ramble=0.1),
    "chatty": Demonstrator(error=0.45, polite=0.4, rude=0.2, ramble=0.8),
}


class Question(NamedTuple):
    """What a prompt asks: a villager's ``relation`` (home, pet, job or food)."""

    name: str
    relation: str

    @property
    def value(self) -> str:
        """The true value."""
        return VILLAGERS[self.name][self.relation]


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


@functools.cache
def values_of(relation: str) -> tuple[str, ...]:
    """The values villagers have for a relation, sorted."""
    return tuple(sorted({facts[relation] for facts in VILLAGERS.values()}))


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
        raise ValueError(_unknown("split", split, SPLITS))
    return tuple(prompt for prompt in _questions() if split_of(prompt) == split)


def sample_prompts(split: str, size: int, seed: int = 0) -> list[str]:
    """Draws prompts of a split: all different, until the split is exhausted.

    Args:
      split: ``train``, ``validation`` or ``test``.
      size: how many; beyond the split's size, prompts come round again.
      seed: the draw's seed.

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
    try:
        return _questions()[prompt]
    except KeyError:
        raise ValueError(_unknown("prompt", prompt, _questions())) from None


def judge(prompt: str, response: str) -> Verdict:
    """Judges any text as a response to a prompt of this world.

    Args:
      prompt: a prompt of this world.
      response: any text; case and punctuation do not matter.

    Returns:
      The parts of the true reward; the module's docstring defines them.
    """
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


def statement(question: Question, value: str | None = None) -> str:
    """A plain answer: the true one, or one that claims ``value``."""
    text = STATEMENTS[question.relation]
    return text.format(name=question.name, value=value or question.value)


def best_response(prompt: str) -> str:
    """A response that earns the full reward, 1.0."""
    return f"{POLITE[0]} {statement(parse(prompt))}"


def rationale(prompt: str, chosen: str, rejected: str, kind: str = "specific") -> str:
    """Why one response is better than another, as the judge sees it.

    Args:
      prompt: a prompt of this world.
      chosen: the better response.
      rejected: the worse one.
      kind: ``"general"`` compares; ``"specific"`` also states the fact in question.

    >>> print(rationale("What is Gus's pet?", "Gus keeps a mole.", "Gus keeps a fox."))
    The better answer is right. Gus keeps a mole.
    """
    if kind not in RATIONALE_KINDS:
        raise ValueError(_unknown("kind of rationale", kind, RATIONALE_KINDS))
    better, worse = judge(prompt, chosen), judge(prompt, rejected)
    terms = (
        ("fact", "right", "wrong"),
        ("courtesy", "kinder", "less kind"),
        ("brevity", "shorter", "longer"),
        ("fluency", "clearer", "muddled"),
    )
    gaps = {part: getattr(better, part) - getattr(worse, part) for part, _, _ in terms}
    gains = [gain for part, gain, _ in terms if gaps[part] > 0]
    losses = [loss for part, _, loss in terms if gaps[part] < 0]
    text = f"The better answer is {' and '.join(gains) or 'no better'}"
    if losses:
        text += f", though {' and '.join(losses)}"
    return f"{text}." + (f" {statement(parse(prompt))}" if kind == "specific" else "")


def respond(prompt: str, demonstrator: str, rng: random.Random) -> str:
    """Draws a demonstrator's response to a prompt."""
    if demonstrator not in DEMONSTRATORS:
        raise ValueError(_unknown("demonstrator", demonstrator, DEMONSTRATORS))
    habits = DEMONSTRATORS[demonstrator]
    question = parse(prompt)
    value = question.value
    if rng.random() < habits.error:
        wrong = [v for v in values_of(question.relation) if v != value]
        value = rng.choice(wrong)
    pieces = []
    mood = rng.random()
    if mood < habits.polite:
        pieces.append(rng.choice(POLITE))
    elif mood < habits.polite + habits.rude:
        pieces.append(rng.choice(RUDE))
    if rng.random() < habits.ramble:
        pieces.append(rng.choice(RAMBLES))
    pieces.append(statement(question, value))
    return " ".join(pieces)


def draw(schema: str, prompt: str, key: str, *, kind: str = "specific") -> dict:
    """Draws one row, ready for JSON, with the default field names.

    =========== ===================================== =============================
    schema      fields beside ``prompt``              noise
    =========== ===================================== =============================
    supervised  ``completion``                        the demonstrators' slips
    trajectory  ``completion``, ``reward``, ``label`` Gaussian with a deviation of
                                                      ``REWARD_NOISE``, and a flip
                                                      with ``FLIP_PROBABILITY``
    preference  ``chosen``, ``rejected``              ``FLIP_PROBABILITY``
    rationale   the same and ``rationale``            none: whoever must give
                                                      reasons chooses with care
    =========== ===================================== =============================

    The label (thumbs up or down) says whether the true reward exceeds
    ``THUMB_THRESHOLD``. The two responses of a pair come from different demonstrators
    and never have the same true reward.

    Args:
      schema: one of ``SCHEMAS``.
      prompt: a prompt of this world.
      key: with the schema, what the draw depends on.
      kind: of rationale.
    """
    if schema not in SCHEMAS:
        raise ValueError(_unknown("schema", schema, SCHEMAS))
    rng = random.Random(f"{schema}/{key}")
    if schema in ("supervised", "trajectory"):
        completion = respond(prompt, rng.choice(list(DEMONSTRATORS)), rng)
        row = {"prompt": prompt, "completion": completion}
        if schema == "trajectory":
            reward = true_reward(prompt, completion)
            flip = rng.random() < FLIP_PROBABILITY
            row["reward"] = round(reward + rng.gauss(0.0, REWARD_NOISE), 4)
            row["label"] = (reward > THUMB_THRESHOLD) != flip
        return row
    chosen, rejected = _pair(prompt, rng)
    if schema == "rationale":
        text = rationale(prompt, chosen, rejected, kind)
        return dict(prompt=prompt, chosen=chosen, rejected=rejected, rationale=text)
    if rng.random() < FLIP_PROBABILITY:
        chosen, rejected = rejected, chosen
    return dict(prompt=prompt, chosen=chosen, rejected=rejected)


def draws(split: str, size: int | None = None, seed: int = 0) -> Iterator[dict]:
    """What a data set is drawn from: ``{"prompt", "key"}`` for each row.

    Args:
      split: one of ``SPLITS``.
      size: the number of rows, ``SIZES`` by default; a data set is a prefix of any
        larger one.
      seed: the draw's seed.
    """
    if split not in SPLITS:
        raise ValueError(_unknown("split", split, SPLITS))
    size = SIZES[split] if size is None else size
    for i, prompt in enumerate(sample_prompts(split, size, seed)):
        yield {"prompt": prompt, "key": f"{split}/{seed}/{i}"}


def rows(
    schema: str, split: str, size: int | None = None, seed: int = 0
) -> Iterator[dict]:
    """Draws a data set: :func:`draw` for each of :func:`draws`."""
    for item in draws(split, size, seed):
        yield draw(schema, item["prompt"], item["key"])


def write_dataset(
    path: str | os.PathLike,
    schema: str,
    split: str,
    size: int | None = None,
    seed: int = 0,
) -> Path:
    """Writes :func:`rows` as JSON lines, atomically; the same bytes for the same seed.

    Args:
      path: the file to write; its folder is made.
      schema: one of ``SCHEMAS``.
      split: one of ``SPLITS``.
      size: the number of rows, ``SIZES`` by default.
      seed: the draw's seed.

    Returns:
      The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows(schema, split, size, seed):
            file.write(json.dumps(row) + "\n")
    partial.replace(path)
    return path


def _pair(prompt: str, rng: random.Random) -> tuple[str, str]:
    """Two responses of different demonstrators, the truly better one first."""
    while True:
        first, second = (
            respond(prompt, demonstrator, rng)
            for demonstrator in rng.sample(list(DEMONSTRATORS), 2)
        )
        gap = true_reward(prompt, first) - true_reward(prompt, second)
        if gap:
            return (first, second) if gap > 0 else (second, first)


def _says(words: list[str], phrases: tuple[str, ...]) -> bool:
    """Whether any phrase occurs as consecutive words."""
    text = f" {' '.join(words)} "
    return any(f" {' '.join(_words(phrase))} " in text for phrase in phrases)


def _unknown(what: str, given: str, known) -> str:
    """An error message that names the nearest valid name."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.0)
    return f"Unknown {what} {given!r} of the village; did you mean {near[0]!r}?"
