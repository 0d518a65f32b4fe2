"""Records the texts that TRL 1.16.0 makes of rows of chat messages.

Its own ``maybe_extract_prompt`` and ``apply_chat_template`` run, and in them
transformers' Jinja2. Run in an environment of its own, because TRL brings packages that
the tests do without::

    python -m venv trl && trl/bin/pip install trl==1.16.0 transformers==5.23.0
    trl/bin/python tests/data/goldens/record_trl_chats.py

Nothing of jaxalign is imported here; ``tests/data/test_conversations.py`` compares.
"""

from __future__ import annotations

import json
import pathlib

import transformers
import trl
from transformers import ByT5Tokenizer
from trl.data_utils import apply_chat_template, maybe_extract_prompt

# A plain one; one with white space, a system prompt of its own, a loop's controls and
# tools; and one that shows another text behind a prompt than before an answer.
TEMPLATES = {
    "plain": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
    "white": (
        "{% if messages[0]['role'] != 'system' %}\n"
        "    [be brief]\n"
        "{% endif %}\n"
        "{% if tools %}{{ tools | tojson(indent=1) }}\n"
        "{% endif %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message['role'] == 'tool' %}{% continue %}{% endif %}\n"
        "    {{- message['role'] | upper + ': ' + "
        "message['content'] | trim + '\\n' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "thinking": (
        "{% for m in messages %}{{ m.role }}|"
        "{% generation %}{{ m.content }}{% endgeneration %}|"
        "{% endfor %}{% if add_generation_prompt %}assistant|<think>{% endif %}"
    ),
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "You answer in rhymes. é 日本 {x}"}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "a < b & c", "parameters": {}},
    }
]
LONG = [SYSTEM, user(" one "), assistant("two\n"), user("three")]
ROWS = [
    {"prompt": [user("Hi")], "completion": [assistant("Hello")]},
    {"prompt": LONG, "completion": [assistant("four <b>")]},
    {"prompt": LONG, "chosen": [assistant("good")], "rejected": [assistant("goof")]},
    {"prompt": [user("q")], "completion": [assistant(" a ")], "label": True},
    {"prompt": [user("q")], "completion": [assistant("b"), user("c"), assistant("d")]},
    {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
    {
        "prompt": "q",
        "chosen": [user("q"), assistant("a")],
        "rejected": [user("q"), assistant("b")],
    },
    {"chosen": [*LONG, assistant("x")], "rejected": [*LONG, assistant("y")]},
    {
        "chosen": [user("q"), assistant("s"), user("t"), assistant("a")],
        "rejected": [user("q"), assistant("s"), user("u"), assistant("b")],
    },
    {"prompt": [user("q"), assistant("It is")], "completion": [assistant("so")]},
    {"prompt": LONG, "completion": [assistant("with tools")], "tools": TOOLS},
    {"prompt": [user("q")]},
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "The sky is blue.", "rejected": "The sky isn't."},
    {"chosen": "yes", "rejected": "yes, it is"},
    {"chosen": "Q: a\n\nA: b", "rejected": "Q: a\n\nA: c"},
]


def main() -> None:
    found = []
    for row in ROWS:
        row = dict(row)
        whole = maybe_extract_prompt(row) | {k: row[k] for k in ("label",) if k in row}
        if isinstance(whole["prompt"], str):
            found.append({"row": row, "texts": {"": whole}})
            continue
        tokenizer, texts = ByT5Tokenizer(), {}
        for name, template in TEMPLATES.items():
            tokenizer.chat_template = template
            example = {k: v for k, v in whole.items() if k != "tools"}
            texts[name] = apply_chat_template(
                example, tokenizer, tools=row.get("tools")
            )
        found.append({"row": row, "texts": texts})
    record = {
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "templates": TEMPLATES,
        "rows": found,
    }
    path = pathlib.Path(__file__).with_name("trl_chats_1_16_0.json")
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
