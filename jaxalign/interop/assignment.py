"""Which array of a checkpoint each parameter is taken from, and what became of all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

# Pairs (pattern, replacement), as T5X's assignment_map; None takes no array.
Rules = Sequence[tuple[str, str | None]]


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every array of a checkpoint and of a network.

    Attributes:
      loaded: the stored arrays that each parameter came from, by its path.
      initialised: parameters that were not taken from the checkpoint.
      left_over: parameters of the checkpoint that nothing was loaded from.
    """

    loaded: Mapping[str, tuple[str, ...]]
    initialised: tuple[str, ...]
    left_over: tuple[str, ...]

    def __str__(self) -> str:
        """All of it, in lines.

        >>> print(Report({"encoder/x": ("target/encoder/x",)}, ("head/kernel",), ()))
        1 parameter loaded
        1 initialised: head/kernel
        0 left over
        """
        count = len(self.loaded)
        lines = [f"{count} parameter{'s' * (count != 1)} loaded"]
        for name in ("initialised", "left_over"):
            found = getattr(self, name)
            listed = f": {', '.join(found)}" if found else ""
            lines.append(f"{len(found)} {name.replace('_', ' ')}{listed}")
        return "\n".join(lines)


def assigned(
    wanted: Iterable[str], rules: Rules, prefix: str = ""
) -> dict[str, str | None]:
    """The stored name that each parameter is taken from; None for none.

    Args:
      wanted: paths of a network's parameters.
      rules: the first whose pattern matches a whole path decides; what none matches is
        taken from its own name.
      prefix: of stored names, and of paths where patterns look at them.

    Raises:
      ValueError: for a rule that is none, or that matches no parameter.

    >>> rules = [(r"value_head/.*", None), (r"encoder/(.*)", r"trunk/\\1")]
    >>> assigned(["encoder/x", "value_head/bias", "y"], rules)
    {'encoder/x': 'trunk/x', 'value_head/bias': None, 'y': 'y'}
    """
    wanted = list(wanted)
    compiled = []
    for pattern, replacement in rules:
        try:
            compiled.append((re.compile(pattern), replacement))
        except re.error as error:
            raise ValueError(
                f"assignment_map: {pattern!r} is no regular expression: {error}."
            ) from error
    names: dict[str, str | None] = {}
    unused = {rule.pattern for rule, _ in compiled}
    for path in wanted:
        names[path] = prefix + path
        for rule, replacement in compiled:
            if match := rule.fullmatch(prefix + path):
                unused.discard(rule.pattern)
                names[path] = _expanded(match, replacement)
                break
    if unused:
        raise ValueError(
            f"assignment_map: {sorted(unused)} match no parameter of the network. A "
            f"pattern has to match a whole name, such as {prefix}{wanted[0]}."
        )
    return names


def _expanded(match: re.Match[str], replacement: str | None) -> str | None:
    try:
        return None if replacement is None else match.expand(replacement)
    except (re.error, IndexError) as error:
        raise ValueError(
            f"assignment_map: {replacement!r} does not fit {match.re.pattern!r}: "
            f"{error}."
        ) from error
