"""Chat templates: messages to the text that the network reads.

A template is Jinja2 in the dialect of Hugging Face's ``apply_chat_template``: it sees
``messages``, ``tools`` and ``add_generation_prompt``. One is written in gin, by name
(:data:`TEMPLATES`), as a file or as its text (``CHAT_TEMPLATE``).

Whoever wrote it may be a stranger, and the same messages must give the same text on
every day: it runs in Jinja's sandbox and has no clock. The vocabulary ends texts, so
``bos_token`` and ``eos_token`` are empty.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.data.bad_rows import nearest

# Both have a place for text alone, and say so: nothing of a message is left out unseen.
_TEXT_ALONE = (
    "{% if message.content is not string or message.tool_calls %}"
    "{{ raise_exception('only text has a place in this template; give one of your own "
    "in CHAT_TEMPLATE') }}"
    "{% endif %}"
)
# "Role: content", a blank line between messages.
_TURNS = (
    "{% for message in messages %}"
    f"{_TEXT_ALONE}"
    "{{ '\n\n' if not loop.first }}{{ message.role | capitalize }}: "
    "{{ message.content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n' if messages }}Assistant: {% endif %}"
)
_CHATML = (
    "{% for message in messages %}"
    f"{_TEXT_ALONE}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# By name. The text of DEFAULT is part of what caches hold without its being in their
# fingerprints: prepare.caches.VERSION has to rise when it changes.
TEMPLATES = {"turns": _TURNS, "chatml": _CHATML}
DEFAULT = "turns"


class TemplateError(ValueError):
    """What a template said of messages that it does not render."""


class ChatTemplate:
    """A compiled template.

    >>> template = ChatTemplate(TEMPLATES["turns"])
    >>> template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    'User: Hi\\n\\nAssistant: '

    Raises:
      ValueError: naming the line of the template that is no Jinja2.
    """

    def __init__(self, text: str):
        import jinja2

        self.text = text
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"CHAT_TEMPLATE is no Jinja2 template: line {error.lineno}: "
                f"{error.message}."
            ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of messages; `TemplateError` where the template refuses them.

        Args:
          tools: JSON schemas of functions that the assistant may call.
          add_generation_prompt: whether the text ends with what an answer begins with.
        """
        import jinja2

        try:
            return self._template.render(
                messages=list(messages),
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                bos_token="",
                eos_token="",
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise TemplateError(str(error) or type(error).__name__) from None

    def unfinished(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The text up to the end of the last message's content, which goes on."""
        *before, last = messages
        marked = [*before, {**last, "content": f"{last['content']}{_MARK}"}]
        text = self.render(marked, tools=tools)
        at = text.rfind(_MARK.strip())
        if at < 0:
            raise TemplateError("the template does not show the last message")
        # Where the mark lost its space, the template strips what it shows.
        whole = text[at : at + len(_MARK)] == _MARK
        return text[:at] if whole else text[:at].rstrip()


_MARK = "\x02the message goes on from here\x03 "


@functools.lru_cache(maxsize=16)
def compiled(template: str | None) -> ChatTemplate:
    """The template for a text of `resolve`; None: the default one."""
    return ChatTemplate(TEMPLATES[DEFAULT] if template is None else template)


def resolve(setting: str | None) -> str | None:
    """The template's text for what CHAT_TEMPLATE says: a name, a file or the text.

    None stays None: `DEFAULT`, which has no part in the identity of data.

    Raises:
      FileNotFoundError, ValueError: with the names that there are.
    """
    if setting is None:
        return None
    if not isinstance(setting, str):
        raise ValueError(
            f"CHAT_TEMPLATE must be one text, got a {type(setting).__name__}: a name "
            f"among {list(TEMPLATES)}, a .jinja file or a Jinja2 template."
        )
    text = TEMPLATES.get(setting)
    if text is None and _is_jinja(setting):
        text = setting
    if text is None and setting.endswith((".jinja", ".jinja2", ".json")):
        path = pathlib.Path(setting).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"CHAT_TEMPLATE: no file {setting!r}.")
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            text = _of_tokenizer(path, text)
        if not _is_jinja(text):
            raise ValueError(f"CHAT_TEMPLATE: {path} has neither {{{{ nor {{%.")
    if text is None:
        raise ValueError(
            f"CHAT_TEMPLATE={setting!r} is neither the name of a template "
            f"{list(TEMPLATES)}{nearest(setting, TEMPLATES)}, nor a .jinja file (or a "
            "tokenizer_config.json), nor a Jinja2 template, which has {{ or {%."
        )
    compiled(text)  # says what is wrong with it
    return text


def _is_jinja(text: str) -> bool:
    return "{{" in text or "{%" in text


def _of_tokenizer(path: pathlib.Path, text: str) -> str:
    """The template in a Hugging Face ``tokenizer_config.json``."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"CHAT_TEMPLATE: {path} is no JSON ({error}).") from None
    template = found.get("chat_template") if isinstance(found, dict) else None
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template}
        template = named.get("default")
    if not isinstance(template, str):
        raise ValueError(f"CHAT_TEMPLATE: {path} has no 'chat_template'.")
    return template


@functools.cache
def _environment() -> Any:
    """Jinja as ``apply_chat_template`` sets it up, without its clock."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """``{% generation %}``, which marks what an assistant says, shows its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(_: str) -> str:
        raise jinja2.TemplateError(
            "strftime_now: a template must give the same text every day; write the "
            "date into the template"
        )

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    # As is, without HTML's escapes, which Jinja's own filter makes.
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    # What draws at random would give the same row another text each time.
    for name in ("lipsum",):
        environment.globals.pop(name, None)
    environment.filters.pop("random", None)
    return environment
