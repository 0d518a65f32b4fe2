"""``jaxalign completion bash``: verbs, flags and values for the shell to complete.

The script is made of the verbs' parsers once; completing starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping

from jaxalign import configs
from jaxalign.cli.flags import verb_parser

SHELLS = ("bash", "zsh")

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


def completion_parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "completion",
        "Print a script for the shell: source <(jaxalign completion bash).",
        gin=False,
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell it is for")
    return parser


def script(
    shell: str, parsers: Mapping[str, Callable[[], argparse.ArgumentParser]]
) -> str:
    """The completion script of a shell.

    Args:
      shell: ``"bash"`` or ``"zsh"``.
      parsers: what makes each verb's parser.
    """
    flags, values = [], []
    for verb, make in parsers.items():
        parser = make()
        words = []
        for action in parser._actions:
            for flag in (f for f in action.option_strings if f.startswith("--")):
                words.append(flag if action.nargs == 0 else f"{flag}=")
                if action.choices:
                    values.append((f'"{verb} {flag}"', action.choices))
        if "--gin_file" in (parser.epilog or ""):
            words += ["--gin_file=", "--gin."]
        flags.append((f'"{verb}"', words))
    values.append(('*" --gin_file"', configs.available()))
    values.append(('"completion "', SHELLS))
    body = _FUNCTION % {
        "verbs": "\\n".join(f"{verb} " for verb in parsers),
        "flags": "\n".join(_case(*pair) for pair in flags),
        "values": "\n".join(_case(*pair) for pair in values),
    }
    return (_ZSH if shell == "zsh" else "") + body


def _case(pattern: str, words: Iterable[str]) -> str:
    return f"    {pattern}) words=$'" + "\\n".join(words) + "' ;;"
