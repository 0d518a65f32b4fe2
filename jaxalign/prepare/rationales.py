"""Prompts about pairs: one whose answer a policy learns, and one for its teacher.

A rationale says why one answer of a pair is better (arXiv 2407.14477). The policy
learns to give it for a prompt that shows the question and both answers and does not
tell which one won; the teacher who writes it is told. A *general* rationale explains
overall, a *specific* one names the passages or facts that decide it.
"""

from __future__ import annotations

import hashlib

from jaxalign.data.bad_rows import OptionError, nearest
from jaxalign.data.records import Record

_ASK = {
    "general": "Explain in one to three sentences why it is better overall.",
    "specific": (
        "Cite the specific passages or facts that decide it, in one to three sentences."
    ),
}
KINDS = tuple(_ASK)


def chosen_comes_second(key: str, index: int, seed: int) -> bool:
    """Whether a rationale prompt shows the rejected answer first; a fair coin.

    A fixed order would teach the policy that the first answer wins.
    """
    return bool(hashlib.sha256(f"{seed}:{key}:{index}".encode()).digest()[0] & 1)


def _answers(record: Record, chosen_second: bool) -> str:
    first, second = record["chosen"], record["rejected"]
    if chosen_second:
        first, second = second, first
    return f"Response A: {first}\n\nResponse B: {second}"


def rationale_prompt(record: Record, chosen_second: bool) -> str:
    """The prompt whose response is the rationale.

    It shows the question and both answers, without saying which one was preferred.
    """
    return (
        f"Question: {record['prompt']}\n\n"
        "Which response is preferable and follows the question? Explain why.\n\n"
        f"{_answers(record, chosen_second)}"
    )


def rationale_text(rationale: str, chosen_second: bool) -> str:
    """``[chosen]`` and ``[rejected]`` in a rationale, named as its prompt shows them.

    >>> rationale_text("[chosen] is right, [rejected] is not.", chosen_second=True)
    'Response B is right, Response A is not.'
    """
    chosen, rejected = ("B", "A") if chosen_second else ("A", "B")
    text = rationale.replace("[chosen]", f"Response {chosen}")
    return text.replace("[rejected]", f"Response {rejected}")


def request(record: Record, kind: str, chosen_second: bool) -> str:
    """What a teacher is asked, who writes the rationale of a pair.

    The teacher calls the answers by the bracketed names that `rationale_text`
    replaces, so that what it writes fits either order. ``kind`` is ``"general"`` or
    ``"specific"``.
    """
    if kind not in _ASK:
        raise OptionError(
            f"kind must be one of {KINDS}, got {kind!r}{nearest(kind, KINDS)}."
        )
    winner, loser = ("B", "A") if chosen_second else ("A", "B")
    return (
        f"Question: {record['prompt']}\n\n{_answers(record, chosen_second)}\n\n"
        f"Response {winner} was preferred. {_ASK[kind]} Write [chosen] for response "
        f"{winner} and [rejected] for response {loser}."
    )
