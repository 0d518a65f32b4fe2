"""Reddit TL;DR: posts with their authors' summaries, and people's comparisons of
summaries (arXiv 2009.01325)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.data.bad_rows import FieldError, show
from jaxalign.prepare.tasks import add_task, as_rows


def prompt(post: Mapping[str, Any]) -> str:
    """A post (or, in the comparisons, now and then a news article) as a prompt."""
    if not post.get("post"):
        return f"ARTICLE: {post['article'].strip()}\n\nTL;DR:"
    return (
        f"SUBREDDIT: r/{post['subreddit']}\n\nTITLE: {post['title']}\n\n"
        f"POST: {post['post'].strip()}\n\nTL;DR:"
    )


def demonstrations(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A post and its author's summary."""
    return [{"prompt": prompt(raw), "completion": raw["summary"].strip()}]


def preferences(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two summaries of a post, one of which was chosen."""
    summaries, choice = as_rows(raw["summaries"]), raw["choice"]
    if len(summaries) != 2 or choice not in (0, 1):
        got = f"choice {show(choice)} of {len(summaries)} summaries"
        raise FieldError("choice", "shape", "0 or 1, of two summaries", got)
    return [
        {
            "prompt": prompt(raw["info"]),
            "chosen": summaries[choice]["text"].strip(),
            "rejected": summaries[1 - choice]["text"].strip(),
        }
    ]


add_task(
    "tldr",
    doc="Reddit TL;DR: filtered posts with summaries, and comparisons of summaries.",
    records={"supervised": demonstrations, "preference": preferences},
    source="huggingface:openai__summarize_from_feedback",
)
