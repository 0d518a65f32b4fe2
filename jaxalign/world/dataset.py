"""Rows drawn from the village: imperfect demonstrators, and the four schemas.

Row ``i`` of a data set is a pure function of ``(schema, split, seed, i)``.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxalign.files import write_atomically
from jaxalign.world.reward import POLITE, RAMBLES, RUDE, rationale, true_reward
from jaxalign.world.village import (
    SPLITS,
    parse,
    sample_prompts,
    statement,
    unknown,
    values_of,
)

SCHEMAS = ("supervised", "trajectory", "preference", "rationale")
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


def respond(prompt: str, demonstrator: str, rng: random.Random) -> str:
    """Draws a demonstrator's response to a prompt."""
    if demonstrator not in DEMONSTRATORS:
        raise ValueError(unknown("demonstrator", demonstrator, DEMONSTRATORS))
    habits = DEMONSTRATORS[demonstrator]
    question = parse(prompt)
    value = question.value
    if rng.random() < habits.error:
        value = rng.choice([v for v in values_of(question.relation) if v != value])
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
      key: with the schema, what the draw depends on.
    """
    if schema not in SCHEMAS:
        raise ValueError(unknown("schema", schema, SCHEMAS))
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
    gap = 0.0
    while not gap:
        one, two = (
            respond(prompt, demonstrator, rng)
            for demonstrator in rng.sample(list(DEMONSTRATORS), 2)
        )
        gap = true_reward(prompt, one) - true_reward(prompt, two)
    chosen, rejected = (one, two) if gap > 0 else (two, one)
    if schema == "rationale":
        text = rationale(prompt, chosen, rejected, kind)
        return dict(prompt=prompt, chosen=chosen, rejected=rejected, rationale=text)
    if rng.random() < FLIP_PROBABILITY:
        chosen, rejected = rejected, chosen
    return dict(prompt=prompt, chosen=chosen, rejected=rejected)


def draws(split: str, size: int | None = None, seed: int = 0) -> Iterator[dict]:
    """What a data set is drawn from: ``{"prompt", "key"}`` for each row.

    Args:
      size: the number of rows, ``SIZES`` by default; a data set is a prefix of any
        larger one.
    """
    if split not in SPLITS:
        raise ValueError(unknown("split", split, SPLITS))
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
    """Writes :func:`rows` as JSON lines; the same bytes for the same seed."""
    drawn = rows(schema, split, size, seed)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in drawn))
    return Path(path)
