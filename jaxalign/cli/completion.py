"""``jaxalign completion bash``: verbs, flags and values for the shell to complete.

The script is made of the verbs' signatures once; completing starts no Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jaxalign import configs
from jaxalign.cli import flags as command_line
from jaxalign.cli import table

# One function for both shells: bash splits words at "=", zsh does not.
_FUNCTION = """\
_jaxalign() {
  local IFS=$'\\n' cur="${COMP_WORDS[COMP_CWORD]}" verb="${COMP_WORDS[1]}"
  local prev="${COMP_WORDS[COMP_CWORD-1]}" flag="" head="" words=""
  COMPREPLY=()
  if [[ $COMP_CWORD -eq 1 ]]; then
    COMPREPLY=($(compgen -W $'%(verbs)s' -- "$cur"))
    return
  fi
  if [[ $cur == --*=* ]]; then flag="${cur%%%%=*}"; head="$flag="; cur="${cur#*=}"
  elif [[ $cur == "=" ]]; then flag="$prev"; cur=""
  elif [[ $prev == "=" ]]; then flag="${COMP_WORDS[COMP_CWORD-2]}"
  elif [[ $cur == -* || -z $cur ]]; then
    case "$verb" in
%(flags)s
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    [[ -n $cur ]] && return
  fi
  case "$verb $flag" in
%(values)s
  esac
  COMPREPLY+=($(compgen -W "$words" -- "$cur") $(compgen -f -- "$cur"))
  if [[ -n $head ]]; then COMPREPLY=("${COMPREPLY[@]/#/$head}"); fi
}
complete -o nospace -F _jaxalign jaxalign
"""
_ZSH = """\
autoload -Uz compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit
"""


def script(shell: str, verbs: Mapping[str, table.Verb]) -> str:
    """The completion script of a shell, ``"bash"`` or ``"zsh"``."""
    flags, values = [], []
    for name, verb in verbs.items():
        words = []
        for group in table.parameters(verb).values():
            for parameter in group.values():
                flag = "" if parameter.positional else command_line.flag(parameter)
                if flag:
                    words.append(flag if parameter.type == "bool" else f"{flag}=")
                if parameter.choices:
                    values.append((f'"{name} {flag}"', parameter.choices))
        words += ["--gin_file=", "--gin."] * table.takes_gin(verb)
        flags.append((f'"{name}"', words))
    values.append(('*" --gin_file"', configs.available()))
    body = _FUNCTION % {
        "verbs": "\\n".join(f"{name} " for name in verbs),
        "flags": "\n".join(_case(*pair) for pair in flags),
        "values": "\n".join(_case(*pair) for pair in values),
    }
    return (_ZSH if shell == "zsh" else "") + body


def _case(pattern: str, words: Iterable[str]) -> str:
    return f"    {pattern}) words=$'" + "\\n".join(words) + "' ;;"
