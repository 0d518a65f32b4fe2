"""``jaxalign generate``: responses to a file of prompts, line by line.

Lines go to ``OUTPUT.partial``, which takes its name when all are written. Beside it
lies ``OUTPUT.partial.json`` with what was asked for. The same command, started again
after a kill, keeps the whole lines that are there and goes on; the result has the bytes
of a run that was never killed, because whole windows of prompts are decoded again and
what a window gives is a function of its prompts alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign import files, remote, user_code
from jaxalign.cluster import exclusive
from jaxalign.cluster import mesh as meshes
from jaxalign.data import chat_template as chat_templates
from jaxalign.data import jsonl, records
from jaxalign.decoding import (
    BeamSearch,
    Generation,
    Generator,
    Sampling,
    constraints,
)
from jaxalign.decoding import bad_words as forbidden
from jaxalign.decoding.checks import check_constraint
from jaxalign.decoding.stops import Stops
from jaxalign.inference import outputs, searching
from jaxalign.training import checkpoints

_log = logging.getLogger(__name__)


@exclusive.one_output_at_a_time
def generate(
    *,
    checkpoint: str,
    prompts: str,
    output: str,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    repetition_penalty: float = 1.0,
    bad_words: Sequence[str] = (),
    stop: Sequence[str] = (),
    num_beams: int = 1,
    length_penalty: float = 1.0,
    num_groups: int = 1,
    diversity_penalty: float = 0.0,
    contrastive_alpha: float = 0.0,
    mbr: str | None = None,
    regex: str | None = None,
    include: Sequence[str] = (),
    min_new_tokens: int = 0,
    max_new_tokens: int = 128,
    max_prompt_length: int | None = None,
    batch_size: int = 16,
    slots: int | None = None,
    seed: int = 0,
    mesh: Mapping[str, int] | None = None,
    field_map: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
    chat_template: str | None = None,
) -> int:
    """Samples responses to the prompts of a file, resumably.

    Args:
      checkpoint: a run directory or one of its checkpoints.
      prompts: JSON Lines, CSV or TSV: rows with a ``prompt``, or with ``messages``.
      output: a JSON Lines file: each row as it was read, once per sample, with
        ``response``, ``sample`` (its index), ``logp`` (sum under the model's full
        distribution, EOS included) and ``num_tokens``. A response that other rules
        left no way to meet `regex` and `include` is null.
      num_samples: per prompt; the encoder runs once for all of them.
      temperature: 0 takes the most probable tokens.
      top_k: keep so many tokens; 0 keeps all.
      top_p: keep so much probability.
      min_p: keep tokens at least so probable relative to the most probable one.
      typical_p: keep so much probability around the entropy.
      repetition_penalty: above 1 makes tokens of the response less probable.
      bad_words: texts that no response holds, whatever tokens spell them.
      stop: texts that end a response, whatever tokens spell them; kept in it. Of
        several the one that is completed first.
      num_beams: above 1: beam search (`jaxalign.decoding.BeamSearch`), of which the
        `num_samples` best are written, with their ``score``.
      length_penalty: of beam search.
      num_groups: of diverse beam search.
      diversity_penalty: of diverse beam search.
      contrastive_alpha: above 0: contrastive search among `top_k` candidates (4 if 0).
      mbr: ``chrf``, ``bleu`` or ``module:function``: write only the sample with the
        highest mean metric against the prompt's others, with its ``utility``.
      regex: what a whole response has to match (`jaxalign.decoding.regular`); tokens
        after which it could not are ruled out, so a response is always whole.
      include: phrases that every response holds.
      min_new_tokens: no EOS before so many tokens.
      max_new_tokens: tokens of a response, EOS included.
      max_prompt_length: longer prompts are truncated, with a warning; None truncates
        nothing.
      batch_size: prompts decoded at a time; changes no sample.
      slots: samples of a prompt decoded at a time; default: all.
      seed: of the samples.
      mesh: sizes ``{"data", "fsdp", "tensor"}`` as in training; None: one device, or
        all devices of a job of several processes, which must divide `batch_size`.
      field_map: our field names to the file's.
      on_bad_row: ``"error"`` or ``"skip"``.
      chat_template: makes texts of chat messages; None: the CHAT_TEMPLATE of the
        checkpoint's training.

    Returns:
      The number of lines in the file.

    Raises:
      ValueError: when the output, finished or not, was asked for with other settings,
        or no response of `max_new_tokens` meets `regex`, `include` and `bad_words`.
    """
    asked = {k: v for k, v in locals().items() if k != "output"}
    del asked["chat_template"]  # outputs made before there was one have none
    if (template := chat_templates.resolve(chat_template)) is not None:
        asked["chat_template"] = template
    searching.check(asked)
    # Lines are appended to it, which an object store cannot do.
    local_output = remote.local_only(output, "--output, which grows line by line,")
    metric = searching.text_metric(mbr) if mbr else None
    asked["prompts"] = outputs.input_key(prompts)
    if mbr and ":" in mbr:
        asked["mbr"] = user_code.function_key(mbr, metric)
    count = outputs.kept(local_output, _key(asked), checkpoint=checkpoint)
    if count >= 0:
        return count
    policy, sharding = load(checkpoint, mesh)
    of = policy.vocabulary, policy.model.config.vocab_size
    constraint = None
    if regex is not None or include:
        constraint = constraints.must_include(
            include, *of, pattern=regex, bad_words=bad_words
        )
    elif bad_words:
        constraint = forbidden.without(bad_words, *of)
    check_constraint(constraint, max_new_tokens)
    Stops(stop, policy.vocabulary)  # refuses what is none
    sampling = Sampling(
        temperature,
        top_k,
        top_p,
        min_p,
        typical_p,
        repetition_penalty,
        min_new_tokens=min_new_tokens,
    )
    template = template or policy.meta.get("chat_template")
    rows = read_rows(prompts, "prompts", output, field_map, on_bad_row, template)
    asked["checkpoint"] = policy.fingerprint
    per_prompt = 1 if mbr else num_samples
    with appending(local_output, asked) as (there, write):
        # Prompts that need no decoding; lines of the next that are there.
        whole, skip = divmod(there, per_prompt)
        if num_beams > 1:
            beams = BeamSearch(
                num_beams,
                length_penalty,
                num_groups=num_groups,
                diversity_penalty=diversity_penalty,
                rules=sampling,
            )
            decode = functools.partial(
                searching.search, beams=beams, constraint=constraint
            )
        elif contrastive_alpha > 0:
            decode = functools.partial(
                searching.search, contrastive=(top_k or 4, contrastive_alpha)
            )
        else:
            decode = functools.partial(
                sample,
                sampling=sampling,
                slots=slots,
                seed=seed,
                sharding=sharding,
                stop=stop,
                constraint=constraint,
            )
        generations = decode(
            policy,
            [record["prompt"] for _, record in rows],
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            max_prompt_length=max_prompt_length,
            batch_size=batch_size,
            start=whole,
        )
        if metric:
            generations = searching.choose(generations, metric)
        dead = 0
        for (raw, _), generation in zip(rows[whole:], generations, strict=True):
            write(list(_lines(raw, generation))[skip:])
            dead, skip = dead + generation.texts.count(None), 0
    if dead:
        _log.warning(
            "%d responses are null: min_new_tokens or a stop left them no way to meet "
            "the constraint.",
            dead,
        )
    return len(rows) * per_prompt


def load(
    checkpoint: str, mesh: Mapping[str, int] | None
) -> tuple[checkpoints.Network, jax.sharding.Sharding | None]:
    """A policy on a training mesh, and the sharding of rows over it.

    Without a mesh: one device, or every device of a job of several processes.
    """
    if mesh is None:
        if jax.process_count() == 1:
            return checkpoints.newest(checkpoint), None
        mesh = {}
    built = meshes.named_mesh(mesh)
    policy = checkpoints.newest(checkpoint, mesh=built)
    return policy, meshes.batch_sharding(built)


def sample(
    policy: checkpoints.Network,
    prompts: Sequence[str],
    *,
    max_prompt_length: int | None = None,
    start: int = 0,
    **settings: Any,
) -> Iterator[Generation]:
    """Yields a `jaxalign.decoding.Generation` per prompt, in order, from `start` on.

    `settings` are those of `jaxalign.decoding.Generator`.
    """
    vocabulary = policy.vocabulary
    tokens = [[*vocabulary.encode(text), vocabulary.eos_id] for text in prompts]
    longest = max(map(len, tokens), default=1)
    limit = max_prompt_length or longest
    generator = Generator(policy.model, vocabulary, max_prompt_length=limit, **settings)
    yield from generator(policy.params, tokens, start=start)
    if generator.num_truncated:
        _log.warning(
            "%d of %d prompts were truncated to %d tokens.",
            generator.num_truncated,
            len(tokens),
            max_prompt_length,
        )


def read_rows(
    path: str,
    schema: str,
    output: str | None,
    field_map: Mapping[str, str] | None,
    on_bad_row: str,
    chat_template: str | None = None,
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of an input as they were read, and as the schema has them.

    Bad rows are listed beside the output, if that is here.
    """
    listing = None
    if output is not None and not remote.is_remote(output) and not jax.process_index():
        beside = Path(output).expanduser()
        listing = beside.with_name(f"{beside.name}.bad_rows.jsonl")
    examples, _ = records.load(
        path,
        schema,
        field_map=field_map,
        on_bad_row=on_bad_row,
        listing=listing,
        chat_template=chat_template,
    )
    return [(e.raw, record) for e in examples for record in e.records]


def _lines(
    raw: Mapping[str, Any], generation: Generation | searching.Found
) -> Iterator[str]:
    more = getattr(generation, "more", [{}] * len(generation.texts))
    if np.isnan(generation.logp).any():
        raise ValueError(
            "The network's logits are not finite (log-probability NaN): the "
            "checkpoint's parameters are damaged, or overflow in this dtype."
        )
    for i, text in enumerate(generation.texts):
        logp, size = float(generation.logp[i]), len(generation.tokens[i])
        if text is None:
            logp, size = None, 0
        line = {"response": text, "sample": i, "logp": logp, "num_tokens": size}
        yield jsonl.json_line({**raw, **line, **more[i]})


# How it was decoded, which changes no text.
_EXECUTION = ("batch_size", "slots", "mesh")


def _key(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in asked.items() if k not in _EXECUTION}


@contextlib.contextmanager
def appending(
    path: Path, asked: Mapping[str, Any]
) -> Iterator[tuple[int, Callable[[list[str]], None]]]:
    """How many whole lines an earlier run left of an output, and what appends more.

    The unfinished file, beside which lies what was asked for, takes its name at the
    end, if nothing went wrong. Of several processes the first writes.
    """
    count, file = 0, None
    about = path.with_name(path.name + ".partial.json")
    if jax.process_index() == 0:
        whole, partial = b"", outputs.partial_path(path)
        if partial.exists() and about.exists():
            before = jsonl.read_json(about)
            outputs.refuse_other(f"{partial} was begun", before, asked)
            # A kill may have torn the last line.
            content = partial.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
        file = outputs.open_partial(path)
        files.write_atomically(about, json.dumps(asked, indent=2) + "\n")
        file.truncate(len(whole))
        file.seek(len(whole))
        count = whole.count(b"\n")
        if count:
            _log.info("%s: going on after %d lines.", partial, count)
    if jax.process_count() > 1:
        count = int(multihost_utils.broadcast_one_to_all(np.int32(count)))

    def write(lines: list[str]) -> None:
        if file:
            file.write("".join(lines).encode("utf-8"))
            file.flush()

    with file or contextlib.nullcontext():
        yield count, write
    if file:
        outputs.finish(path, _key(asked))
        about.unlink()
