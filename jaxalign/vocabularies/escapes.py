"""Characters that a model cannot hold, spelt with ones that it can."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

# Candidates for the character that opens an escape, rarest in ordinary text first.
_ESCAPE_CHARACTERS = "§¶¤¦~^|_@#%"
# One-letter escapes. A newline takes a space with it, so that the next word keeps its
# word-initial piece.
_SHORT = {"\n": "n ", "\t": "t", "\r": "r", " ": "s", "{": "(", "}": ")", "<": "["}
_HEX = "0123456789abcdef"


class Escapes:
    """Spells what a model cannot hold with what it can, and back.

    Args:
      held: whether the model gives a text back as it is.
      extra_ids: sentinels of the model, which stay sentinels at word starts.

    Attributes:
      opener: the character that opens an escape; empty when the model holds none.
      letters: what each letter behind the opener stands for.
    """

    def __init__(self, held: Callable[[str], bool], extra_ids: int):
        self._held = functools.lru_cache(maxsize=None)(held)
        self.opener = ""
        if all(self._held(c) for c in "nstx;" + _HEX):
            self.opener = next((c for c in _ESCAPE_CHARACTERS if self._held(c)), "")
        self._codes = {
            c: code for c, code in _SHORT.items() if self._held(code.strip())
        }
        self.letters = {code.strip(): c for c, code in self._codes.items()}
        # Cuts text into sentinels at word starts, what passes as it is, and others.
        plain = [chr(i) for i in range(33, 127) if self._held(chr(i))]
        plain = "".join(re.escape(c) for c in plain if c != self.opener)
        numbers = "|".join(str(i) for i in reversed(range(extra_ids)))
        self._scanner = re.compile(
            (rf"(?P<sentinel>(?:^|(?<= ))<extra_id_(?:{numbers})>)|" if numbers else "")
            + (rf"(?P<plain>[{plain}]+)|" if plain else "")
            + r"(?P<spaces> +)|(?P<other>.)",
            flags=re.DOTALL,
        )

    def escape(self, text: str, strict: bool = False) -> str:
        """Spells what the model cannot hold with what it can.

        With ``strict`` all that is not plain ASCII is spelt out, and sentinels too.
        """
        opener, out = self.opener, []
        after_space = True  # a space here would be stripped: at the start, or doubled
        for match in self._scanner.finditer(text):
            part = match[0]
            if match.lastgroup == "plain":
                out.append(part)
            elif match.lastgroup == "spaces":
                # The last of a run stays, so that words keep their initial piece.
                keep = match.end() < len(text) and not (after_space and len(part) == 1)
                out.append((opener + "s") * (len(part) - keep) + " " * keep)
                after_space = keep
                continue
            elif match.lastgroup == "sentinel" and not strict:
                out.append(part)
            else:
                out.extend(self._spell(c, strict) for c in part)
                after_space = part == "\n" and "\n" in self._codes
                continue
            after_space = False
        if out and out[-1] == opener + "n ":
            out[-1] = opener + "n"
        return "".join(out)

    def _spell(self, c: str, strict: bool) -> str:
        if c == self.opener:
            return c + c
        if self._held(c) and (c.isascii() or not strict):
            return c
        code = self._codes.get(c)
        return self.opener + (f"x{ord(c):x};" if code is None else code)

    def unescape(self, text: str, final: bool = True) -> str:
        """Undoes :meth:`escape`; malformed escapes stay as they are.

        Unless the text is ``final``, an escape that it ends in is left out.
        """

        def restore(match: re.Match[str]) -> str:
            code, digits = match["code"], match["digits"]
            if match["open"] is not None:
                return match[0] if final else ""
            if digits:
                point = int(digits, 16)
                surrogate = 0xD800 <= point < 0xE000
                return match[0] if point > 0x10FFFF or surrogate else chr(point)
            if code == self.opener:
                return code
            return self.letters.get(code.strip(), match[0])

        opener = re.escape(self.opener)
        pattern = (
            f"{opener}(?:x(?P<digits>[{_HEX}]{{1,6}});"
            f"|(?P<open>(?:x[{_HEX}]{{0,6}})?\\Z)|(?P<code>n ?|.))"
        )
        return re.sub(pattern, restore, text, flags=re.DOTALL)
