"""Texts that end a response: one rule for files, streams and Python.

A stop is looked for in the *text* of a response, whatever tokens spell it. Of several
the one that is completed first ends the response; of those completed by the same
character, the longest. So the answer depends on the tokens alone, not on how many of
them come between two looks at what the engine has decoded.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

LOOK = 8  # tokens decoded between two looks


class Cut(NamedTuple):
    """Where a stop ends a response."""

    text: str  # up to and including the stop
    start: int  # where the stop begins in it
    tokens: int  # how many tokens there are up to the one that completes the stop


class Stops:
    """Finds the first of several texts, none empty, in a response.

    >>> from jaxalign.vocabularies import ByteVocabulary
    >>> stops = Stops(["END", "."], ByteVocabulary())
    >>> stops.cut(ByteVocabulary().encode("so. THE END"))
    Cut(text='so.', start=2, tokens=3)
    """

    def __init__(self, texts: Sequence[str], vocabulary: Any):
        if isinstance(texts, str):
            texts = [texts]
        for text in texts:
            if not isinstance(text, str) or not text:
                raise ValueError(f"A stop must be a text, not empty; got {text!r}.")
        self.texts = tuple(texts)
        self._vocabulary = vocabulary

    def __bool__(self) -> bool:
        return bool(self.texts)

    def find(self, text: str, after: int = 0) -> tuple[int, int] | None:
        """Begin and end of the stop that is completed first, or None.

        Stops that end at ``after`` or before do not count.
        """
        found = []
        for stop in self.texts:
            start = text.find(stop, max(0, after + 1 - len(stop)))
            if start >= 0:
                found.append((start, start + len(stop)))
        return min(found, key=lambda at: (at[1], at[0]), default=None)

    def before(self, text: str) -> str:
        """What comes before the first stop, or the whole text."""
        found = self.find(text)
        return text[: found[0]] if found else text

    def held(self, text: str) -> int:
        """How many characters at the end of a text may begin a stop."""
        begun = (stop[:n] for stop in self.texts for n in range(len(stop)))
        return max((len(b) for b in begun if text.endswith(b)), default=0)

    def cut(
        self, tokens: Sequence[int], final: bool = False, forced: int = 0
    ) -> Cut | None:
        """Where the first stop ends the tokens of a response, or None.

        Args:
          tokens: of the response so far.
          final: whether no more will come: then an open escape is text as well.
          forced: of the tokens, were given: a stop inside of their text is none.
        """
        if not self.texts:
            return None
        decode = self._vocabulary.decode
        after = len(decode(tokens[:forced], final=False)) if forced else 0
        text = decode(tokens, final=False)
        found = self.find(text, after)
        if found is None and final:
            text = decode(tokens)
            found = self.find(text, after)
        if found is None:
            return None
        # Each token only adds to the text: the fewest of them that reach the end.
        fewest = forced + bisect.bisect_left(
            range(forced, len(tokens)),
            found[1],
            key=lambda n: len(decode(tokens[:n], final=False)),
        )
        return Cut(text[: found[1]], found[0], fewest)
