"""``jaxalign generate``: responses to a file of prompts, line by line.

Lines go to ``OUTPUT.partial``, which takes its name when all are written. Beside it
lies ``OUTPUT.partial.json`` with what was asked for. The same command, started again
after a kill, keeps the whole lines that are there and goes on; the result has the bytes
of a run that was never killed, because whole windows of prompts are decoded again and
what a window gives is a function of its prompts alone. When all is written, the
settings stay beside it (`jaxalign.inference.outputs`): the same command has nothing to
do, and another one does not overwrite it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign import files, remote, user_code
from jaxalign.cluster import exclusive
from jaxalign.cluster import mesh as meshes
from jaxalign.data import jsonl, records
from jaxalign.decoding import (
    BeamSearch,
    Constraint,
    Generation,
    Generator,
    Sampling,
    constraints,
)
from jaxalign.decoding import bad_words as forbidden
from jaxalign.decoding.generate import check_constraint
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
) -> int:
    """Samples responses to the prompts of a JSON Lines file, resumably.

    Args:
      checkpoint: a run directory or one of its checkpoints.
      prompts: rows with a ``prompt``.
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

    Returns:
      The number of lines in the file.

    Raises:
      ValueError: when the output, finished or not, was asked for with other settings,
        or no response of `max_new_tokens` meets `regex`, `include` and `bad_words`.
    """
    settings = {k: v for k, v in locals().items() if k not in ("output", "prompts")}
    searches = num_beams > 1 or contrastive_alpha > 0
    searching.check(settings)
    # Lines are appended to it, which an object store cannot do.
    local_output = remote.local_only(output, "--output, which grows line by line,")
    metric = searching.text_metric(mbr) if mbr else None
    asked = {
        "prompts": outputs.input_key(prompts),
        **settings,
    }
    if mbr and ":" in mbr:
        asked["mbr"] = user_code.function_key(mbr, metric)
    count = outputs.kept(
        local_output,
        lambda: _key({**asked, "checkpoint": outputs.policy_key(checkpoint)}),
    )
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
    examples, _ = records.load(
        prompts,
        "prompts",
        field_map=field_map,
        on_bad_row=on_bad_row,
        listing=bad_rows_beside(output),
    )
    rows = [(e.raw, record["prompt"]) for e in examples for record in e.records]
    asked["checkpoint"] = policy.fingerprint
    per_prompt = 1 if mbr else num_samples
    with _Writer(local_output, asked, per_prompt) as writer:
        whole = writer.count // per_prompt  # prompts that need no decoding
        common = {
            "num_samples": num_samples,
            "max_new_tokens": max_new_tokens,
            "max_prompt_length": max_prompt_length,
            "batch_size": batch_size,
            "start": whole,
        }
        texts = [text for _, text in rows]
        if searches:
            generations = searching.search(
                policy,
                texts,
                beams=BeamSearch(
                    num_beams,
                    length_penalty,
                    num_groups=num_groups,
                    diversity_penalty=diversity_penalty,
                    rules=sampling,
                )
                if num_beams > 1
                else None,
                contrastive=(top_k or 4, contrastive_alpha)
                if contrastive_alpha
                else None,
                constraint=constraint,
                **common,
            )
        else:
            generations = sample(
                policy,
                texts,
                sampling=sampling,
                slots=slots,
                seed=seed,
                sharding=sharding,
                stop=stop,
                constraint=constraint,
                **common,
            )
        if metric:
            generations = searching.choose(generations, metric)
        dead = 0
        for (raw, _), generation in zip(rows[whole:], generations, strict=True):
            writer.write(_lines(raw, generation))
            dead += generation.texts.count(None)
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
    num_samples: int = 1,
    sampling: Sampling | None = None,
    max_new_tokens: int = 128,
    max_prompt_length: int | None = None,
    batch_size: int = 16,
    slots: int | None = None,
    seed: int = 0,
    sharding: jax.sharding.Sharding | None = None,
    start: int = 0,
    stop: Sequence[str] = (),
    constraint: Constraint | None = None,
) -> Iterator[Generation]:
    """Yields a `jaxalign.decoding.Generation` per prompt, in order, from `start` on."""
    vocabulary = policy.vocabulary
    tokens = [[*vocabulary.encode(text), vocabulary.eos_id] for text in prompts]
    longest = max(map(len, tokens), default=1)
    generator = Generator(
        policy.model,
        vocabulary,
        max_prompt_length=max_prompt_length or longest,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        sampling=sampling,
        batch_size=batch_size,
        slots=slots,
        seed=seed,
        sharding=sharding,
        stop=stop,
        constraint=constraint,
    )
    yield from generator(policy.params, tokens, start=start)
    if generator.num_truncated:
        _log.warning(
            "%d of %d prompts were truncated to %d tokens.",
            generator.num_truncated,
            len(tokens),
            max_prompt_length,
        )


def bad_rows_beside(output: str | None) -> Path | None:
    """Where the bad rows of an input are listed: beside the output, if it is here."""
    if output is None or remote.is_remote(output) or jax.process_index() > 0:
        return None
    path = Path(output).expanduser()
    return path.with_name(f"{path.name}.bad_rows.jsonl")


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
        line = {
            **raw,
            "response": text,
            "sample": i,
            "logp": None if text is None else float(generation.logp[i]),
            "num_tokens": 0 if text is None else len(generation.tokens[i]),
            **more[i],
        }
        yield jsonl.json_line(line)


# How it was decoded, which changes no text.
_EXECUTION = ("batch_size", "slots", "mesh")


def _key(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in asked.items() if k not in _EXECUTION}


class _Writer:
    """Appends lines to an unfinished file that says what it belongs to.

    Attributes:
      count: whole lines that an earlier run left.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], per_prompt: int):
        self._path = path
        self._partial = outputs.partial_path(path)
        self._about = path.with_name(path.name + ".partial.json")
        self._asked = asked
        self._first = jax.process_index() == 0
        self._skip = 0
        self.count = 0
        if self._first:
            self.count = self._open(asked)
        if jax.process_count() > 1:
            self.count = int(multihost_utils.broadcast_one_to_all(np.int32(self.count)))
        self._skip = self.count % per_prompt

    def _open(self, asked: dict[str, Any]) -> int:
        whole = b""
        if self._partial.exists() and self._about.exists():
            before = jsonl.read_json(self._about)
            outputs.refuse_other(f"{self._partial} was begun", before, asked)
            # A kill may have torn the last line.
            content = self._partial.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
        self._file = outputs.open_partial(self._path)  # closed by __exit__
        files.write_atomically(self._about, json.dumps(asked, indent=2) + "\n")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        count = whole.count(b"\n")
        if count:
            _log.info("%s: going on after %d lines.", self._partial, count)
        return count

    def write(self, lines: Iterable[str]) -> None:
        """Appends a prompt's lines, less those that are there already."""
        if not self._first:
            return
        lines = list(lines)[self._skip :]
        self._skip = 0
        self._file.write("".join(lines).encode("utf-8"))
        self._file.flush()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Closes the file, which takes its name if nothing went wrong."""
        if not self._first:
            return
        self._file.close()
        if kind is None:
            outputs.finish(self._path, _key(self._asked))
            self._about.unlink()
