"""A text file with ``{names}`` to fill in, and settings at its head."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxalign.data.bad_rows import nearest

_HEAD = re.compile(r"\A---\n(.*?)^---\n", re.S | re.M)
_NAME = re.compile(r"\{(\w+)\}")


class Template:
    """A template, such as a judge's rubric.

    ``{name}`` stands for a value; what is filled in is not looked at again, and other
    braces stay. Lines ``name: value`` between two lines of ``---`` are its settings.

    Args:
      text: of the whole file; `fingerprint` is its digest.
      origin: where it comes from, for messages.
      settings: the names that the head may set.

    >>> template = Template("---\\nmax_tokens: 8\\n---\\n{prompt}: {response}?")
    >>> template.settings
    {'max_tokens': '8'}
    >>> template.fill(prompt="p", response="{prompt}")
    'p: {prompt}?'
    """

    def __init__(
        self,
        text: str,
        origin: str = "the template",
        settings: tuple[str, ...] = ("max_tokens",),
    ):
        self.origin = origin
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        head = _HEAD.match(text)
        self.text = text[head.end() :] if head else text
        self.names = frozenset(_NAME.findall(self.text))
        self.settings: dict[str, str] = {}
        for line in head[1].splitlines() if head else ():
            name, colon, value = line.partition(":")
            if not colon or name.strip() not in settings:
                raise ValueError(
                    f"{origin} sets {line!r} at its head; expected lines 'name: value' "
                    f"of {', '.join(settings)}{nearest(name.strip(), settings)}."
                )
            self.settings[name.strip()] = value.strip()

    @classmethod
    def read(cls, path: str, settings: tuple[str, ...]) -> Template:
        """The template in a file."""
        file = Path(path).expanduser()
        if not file.is_file():
            beside = [p.name for p in file.parent.glob(f"*{file.suffix}")]
            raise FileNotFoundError(
                f"No template at {path}{nearest(file.name, beside)}."
            )
        return cls(file.read_text(encoding="utf-8"), path, settings)

    def number(self, name: str, default: float) -> float:
        """A setting that is a number."""
        try:
            return float(self.settings.get(name, default))
        except ValueError:
            raise ValueError(
                f"{self.origin}: {name} must be a number, got {self.settings[name]!r}."
            ) from None

    def fill(self, more: Mapping[str, Any] | None = None, **values: str) -> str:
        """The text with `values`, or what `more` knows, in place of their names."""
        known = {**(more or {}), **values}
        missing = sorted(self.names - set(known))
        if missing:
            raise ValueError(
                f"{self.origin} asks for {{{missing[0]}}}, which is not among what is "
                f"known of a row: {', '.join(sorted(known))}"
                f"{nearest(missing[0], list(known))}."
            )
        return _NAME.sub(lambda found: str(known[found[1]]), self.text)
