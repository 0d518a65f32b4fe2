"""Rows of chat messages against what TRL and transformers make of them.

``goldens/record_trl_chats.py`` recorded what TRL 1.16.0 returns; transformers renders
here.
"""

from __future__ import annotations

import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data import chat_template, records
from jaxalign.data.bad_rows import BadRow
from jaxalign.data.chat_template import TEMPLATES, ChatTemplate, resolve
from jaxalign.data.conversations import CHAT, DIALOGUE, IMPLICIT, Conversations
from jaxalign.data.tables import Cell

RECORD = json.loads(
    pathlib.Path(__file__)
    .with_name("goldens")
    .joinpath("trl_chats_1_16_0.json")
    .read_text()
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(row, schema, **options):
    """The records of a row, or what is wrong with it."""
    (item,) = records.examples([("rows.jsonl", 7, row)], schema, **options)
    return item if isinstance(item, BadRow) else item.records


# What TRL makes of the same rows.


@pytest.mark.parametrize(
    ("row", "name", "texts"),
    [
        pytest.param(golden["row"], name, texts, id=f"{i}-{name or 'texts'}")
        for i, golden in enumerate(RECORD["rows"])
        for name, texts in golden["texts"].items()
    ],
)
def test_texts_are_those_of_trl(row, name, texts):
    template = RECORD["templates"][name] if name else None
    schema = "prompts" if set(row) == {"prompt"} else "supervised"
    schema = "preference" if "chosen" in row else schema
    (found,), how = Conversations(schema, template).read(row)
    for field, text in texts.items():
        assert found[field] == text, field
    assert (CHAT in how) == bool(name)
    assert (IMPLICIT in how) == (
        texts.get("prompt") != row.get("prompt")
        and (not isinstance(row.get("prompt"), list))
    )


@pytest.mark.parametrize("schema", ["preference", "supervised", "trajectory"])
def test_a_pair_of_dialogues_serves_every_schema(schema):
    row = {
        "chosen": [user("q"), assistant("a")],
        "rejected": [user("q"), assistant("b")],
    }
    prompt = {"prompt": "User: q\n\nAssistant: "}
    assert (
        read(row, schema)
        == {
            "preference": [prompt | {"chosen": "a", "rejected": "b", "margin": 0.0}],
            "supervised": [prompt | {"completion": "a"}],
            "trajectory": [
                prompt | {"completion": "a", "label": 1, "reward": 1.0},
                prompt | {"completion": "b", "label": 0, "reward": 0.0},
            ],
        }[schema]
    )


def test_rationales_and_thumbs():
    pair = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": "b"}
    (found,) = read(pair | {"rationale": "[chosen] is so.", "margin": 2}, "rationale")
    assert found["rationale"] == "[chosen] is so." and found["margin"] == 2.0
    assert (found["chosen"], found["rejected"]) == ("a", "b")
    thumb = {"prompt": [user("q")], "completion": [assistant("a")], "label": False}
    assert read(thumb, "trajectory")[0]["label"] == 0


def test_what_a_schema_does_not_read_is_no_fault():
    row = {"prompt": [user("q")], "completion": 3, "chosen": [assistant("a")]}
    assert read(row, "prompts") == [{"prompt": "User: q\n\nAssistant: "}]
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [3]}
    assert read(row, "supervised")[0]["completion"] == "a"
    assert read(row, "preference").field == "rejected"


# Dialogues.

DIALOGUE_ROW = {"messages": [user("1"), assistant("2"), user("3"), assistant("4")]}
TURNS = [
    ("User: 1\n\nAssistant: ", "2"),
    ("User: 1\n\nAssistant: 2\n\nUser: 3\n\nAssistant: ", "4"),
]


def test_every_answer_of_a_dialogue_is_one_to_imitate():
    found = read(DIALOGUE_ROW, "supervised")
    assert [(r["prompt"], r["completion"]) for r in found] == TURNS
    # Feedback is on the last; a prompt ends before it.
    (rated,) = read(DIALOGUE_ROW | {"reward": 0.5}, "trajectory")
    assert (rated["prompt"], rated["completion"], rated["reward"]) == (*TURNS[1], 0.5)
    assert read(DIALOGUE_ROW, "prompts") == [{"prompt": TURNS[1][0]}]
    asked = {"messages": DIALOGUE_ROW["messages"][:3]}
    assert read(asked, "prompts") == [{"prompt": TURNS[1][0]}]


def test_a_greeting_is_no_answer():
    row = {"messages": [assistant("Hello!"), user("q"), assistant("a")]}
    assert read(row, "supervised") == [
        {"prompt": "Assistant: Hello!\n\nUser: q\n\nAssistant: ", "completion": "a"}
    ]


def test_the_first_message_beside_a_dialogue_changes_nothing():
    row = {"prompt": "1", "prompt_id": "x"} | DIALOGUE_ROW
    assert len(read(row, "supervised")) == 2
    assert read(row, "prompts") == [{"prompt": "1"}]  # as it was before
    both = {"prompt": "p", "completion": "c"} | DIALOGUE_ROW
    assert read(both, "supervised") == [{"prompt": "p", "completion": "c"}]


def test_contents_in_parts_and_entries_that_parquet_adds():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "user", "content": parts, "name": None, "tool_calls": None}
    row = {"prompt": [message], "completion": [assistant("c")]}
    assert read(row, "supervised")[0]["prompt"] == "User: ab\n\nAssistant: "


# What is no row.


@pytest.mark.parametrize(
    ("row", "schema", "field", "got"),
    [
        ({"messages": [user("1")]}, "supervised", "messages", "a single message"),
        (
            {"messages": [user("1"), assistant("2"), user("3")]},
            "supervised",
            "messages",
            "a last message by 'user'",
        ),
        (DIALOGUE_ROW, "preference", "prompt", "fields ['messages']"),
        (
            {"prompt": [{"role": "user"}], "completion": "c"},
            "supervised",
            "prompt",
            "null for the content (message 1)",
        ),
        (
            {"prompt": [{"role": 3, "content": "x"}], "completion": "c"},
            "supervised",
            "prompt",
            "the int 3 for the role",
        ),
        (
            {"prompt": [user("q"), "x"], "completion": "c"},
            "supervised",
            "prompt",
            "the text 'x' (message 2)",
        ),
        (
            {"prompt": [user([{"type": "image", "url": "u"}])], "completion": "c"},
            "supervised",
            "prompt",
            "parts that are no text",
        ),
        (
            {
                "prompt": [user("q")],
                "completion": [assistant("a") | {"tool_calls": [1]}],
            },
            "supervised",
            "completion",
            "only text has a place in this template",
        ),
        (
            {"prompt": [user("q")], "completion": [assistant("")]},
            "supervised",
            "completion",
            "an empty text",
        ),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": []},
            "preference",
            "prompt",
            "fields ['chosen', 'rejected']",
        ),
        (
            {
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("a")],
            },
            "preference",
            "rejected",
            "the same text",
        ),
        (
            {"chosen": "yes", "rejected": "no"},
            "preference",
            "prompt",
            "fields ['chosen', 'rejected']",
        ),
        (
            {"prompt": [user("q")], "completion": "c", "tools": "add"},
            "supervised",
            "tools",
            "the text 'add'",
        ),
    ],
)
def test_a_row_that_is_no_chat_is_told_by_its_field(row, schema, field, got):
    bad = read(row, schema)
    assert isinstance(bad, BadRow) and (bad.file, bad.line) == ("rows.jsonl", 7)
    assert bad.field == field and got in bad.got, bad


def test_whoever_names_the_prompt_gets_no_other():
    row = {"chosen": "same a", "rejected": "same b"}
    assert read(row, "preference")[0]["prompt"] == "same"
    bad = read(row, "preference", field_map={"prompt": "question"})
    assert "'question'" in bad.expected
    # Nor does a data set with a function of its own.
    bad = read(row, "preference", transform=lambda raw: [raw])
    assert isinstance(bad, BadRow) and bad.problem == "missing"


def test_cells_of_a_table_hold_messages_as_json():
    row = {"messages": Cell(json.dumps(DIALOGUE_ROW["messages"]))}
    assert len(read(row, "supervised")) == 2
    bad = read({"messages": Cell(str(DIALOGUE_ROW["messages"]))}, "supervised")
    assert "in single quotes" in bad.got
    text = Cell('["no", "messages"]')
    (found,) = read({"prompt": text, "completion": Cell("c")}, "supervised")
    assert found["prompt"] == text and type(found["prompt"]) is str


# Templates.

MESSAGES = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["system", "user", "assistant", "tool"]),
        st.text("ab é<&{}%#\n '\"", max_size=8),
    ),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


@pytest.mark.parametrize("name", [*TEMPLATES, *RECORD["templates"]])
def test_templates_render_as_in_transformers(name, tokenizer):
    text = (TEMPLATES | RECORD["templates"])[name]
    tokenizer.chat_template = text

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(MESSAGES, st.booleans())
    def check(messages, prompt):
        options = dict(tokenize=False, add_generation_prompt=prompt)
        theirs = tokenizer.apply_chat_template(messages, **options)
        ours = ChatTemplate(text).render(messages, add_generation_prompt=prompt)
        assert ours == theirs

    check()


def test_a_template_is_a_name_a_file_or_its_text(tmp_path):
    text = "{{ messages[0].content }}"
    (tmp_path / "chat.jinja").write_text(text)
    for found, name in (
        (text, "a.json"),
        ([{"name": "default", "template": text}], "b.json"),
    ):
        (tmp_path / name).write_text(json.dumps({"chat_template": found}))
        assert resolve(str(tmp_path / name)) == text
    assert resolve(str(tmp_path / "chat.jinja")) == resolve(text) == text
    assert resolve("chatml") == TEMPLATES["chatml"] and resolve(None) is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("chatlm", "did you mean 'chatml'"),
        ("{% for m in messages %}", "line 1"),
        ("nothing.jinja", "no file 'nothing.jinja'"),
        (3, "got a int"),
        (str(pathlib.Path(__file__).with_name("goldens") / "none.json"), "no file"),
    ],
)
def test_a_template_that_cannot_be_used_is_told_before_any_row(setting, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        resolve(setting)


@pytest.mark.parametrize(
    "text",
    [
        "{{ strftime_now('%d') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.format_map({}).missing.more }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_a_template_may_not_do_is_a_bad_row(text):
    row = {"prompt": [user("q")], "completion": [assistant("a")]}
    bad = read(row, "supervised", chat_template=text)
    assert isinstance(bad, BadRow) and bad.problem == "template"


def test_the_default_template_is_what_caches_were_made_with():
    """It has no part in their fingerprints: with another, raise caches.VERSION."""
    template = chat_template.compiled(None)
    assert template.text == TEMPLATES["turns"]
    messages = [{"role": "system", "content": "s"}, user("u"), assistant("a\n")]
    assert template.render(messages) == "System: s\n\nUser: u\n\nAssistant: a\n"
    assert template.render(messages[:1], add_generation_prompt=True) == (
        "System: s\n\nAssistant: "
    )


def test_how_a_row_was_read():
    chats = Conversations("supervised")
    assert chats.read(DIALOGUE_ROW)[1] == {CHAT, DIALOGUE}
    row = {"prompt": "p", "completion": "c"}
    found, how = chats.read(row)
    assert found == [row] and not how
