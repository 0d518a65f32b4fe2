"""``jaxalign generate``: responses to a file of prompts, line by line.

Lines go to ``OUTPUT.partial``, which takes its name when all are written. Beside it
lies ``OUTPUT.partial.json`` with what was asked for. The same command, started again
after a kill, keeps the whole lines that are there and goes on; the result has the bytes
of a run that was never killed, because whole windows of prompts are decoded again and
what a window gives is a function of its prompts alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign import models, remote
from jaxalign.data import records
from jaxalign.decoding import (
    BeamSearch,
    Constraint,
    Generation,
    Generator,
    Sampling,
    constraints,
)
from jaxalign.pipelines import searching
from jaxalign.training import checkpoints, run_directory
from jaxalign.training import mesh as meshes

_log = logging.getLogger(__name__)


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
        distribution, EOS included) and ``num_tokens``.
      num_samples: per prompt; the encoder runs once for all of them.
      temperature: 0 takes the most probable tokens.
      top_k: keep so many tokens; 0 keeps all.
      top_p: keep so much probability.
      min_p: keep tokens at least so probable relative to the most probable one.
      typical_p: keep so much probability around the entropy.
      repetition_penalty: above 1 makes tokens of the response less probable.
      bad_words: texts whose tokens are never completed, as tokenised alone.
      stop: texts whose tokens end a response, as tokenised alone; kept in it.
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
      ValueError: when an unfinished output was asked for with other settings.
    """
    settings = {k: v for k, v in locals().items() if k not in ("output", "prompts")}
    searches = num_beams > 1 or contrastive_alpha > 0
    searching.check(settings)
    # Lines are appended to it, which an object store cannot do.
    local_output = remote.local_only(output, "--output, which grows line by line,")
    metric = searching.text_metric(mbr) if mbr else None
    policy, sharding = load(checkpoint, mesh)
    constraint = None
    if regex is not None or include:
        constraint = constraints.must_include(
            include,
            policy.vocabulary,
            policy.model.config.vocab_size,
            pattern=regex,
        )
    sampling = Sampling(
        temperature,
        top_k,
        top_p,
        min_p,
        typical_p,
        repetition_penalty,
        bad_words=[policy.vocabulary.encode(text) for text in bad_words],
        stop_sequences=[policy.vocabulary.encode(text) for text in stop],
        min_new_tokens=min_new_tokens,
    )
    examples, _ = records.load(
        prompts, "prompts", field_map=field_map, on_bad_row=on_bad_row
    )
    rows = [(e.raw, record["prompt"]) for e in examples for record in e.records]
    asked = {
        "prompts": hashlib.sha256(remote.copy(prompts).read_bytes()).hexdigest(),
        **settings,
        "checkpoint": policy.meta["policy_fingerprint"],
    }
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
                constraint=constraint,
                **common,
            )
        if metric:
            generations = searching.choose(generations, metric)
        for (raw, _), generation in zip(rows[whole:], generations, strict=True):
            writer.write(_lines(raw, generation))
    return len(rows) * per_prompt


def load(
    checkpoint: str, mesh: Mapping[str, int] | None
) -> tuple[checkpoints.Policy, jax.sharding.Sharding | None]:
    """A policy on a training mesh, and the sharding of rows over it.

    Without a mesh: one device, or every device of a job of several processes.
    """
    if mesh is None:
        if jax.process_count() == 1:
            return checkpoints.load_policy(checkpoint), None
        mesh = {}
    meta = checkpoints.read_meta(checkpoints.resolve(checkpoint))
    model = checkpoints.stored_model(meta)
    shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    built = meshes.named_mesh(mesh)
    shardings = meshes.param_shardings(built, models.logical_axes(model), shapes)
    return checkpoints.load_policy(checkpoint, shardings), meshes.batch_sharding(built)


def sample(
    policy: checkpoints.Policy,
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


def _lines(
    raw: Mapping[str, Any], generation: Generation | searching.Found
) -> Iterator[str]:
    more = getattr(generation, "more", [{}] * len(generation.texts))
    for i, text in enumerate(generation.texts):
        line = {
            **raw,
            "response": text,
            "sample": i,
            "logp": float(generation.logp[i]),
            "num_tokens": len(generation.tokens[i]),
            **more[i],
        }
        yield json.dumps(line, ensure_ascii=False) + "\n"


class _Writer:
    """Appends lines to an unfinished file that says what it belongs to.

    Attributes:
      count: whole lines that an earlier run left.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], per_prompt: int):
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._about = path.with_name(path.name + ".partial.json")
        self._first = jax.process_index() == 0
        self._skip = 0
        self.count = 0
        if self._first:
            self.count = self._open(json.loads(json.dumps(asked)))
        if jax.process_count() > 1:
            self.count = int(multihost_utils.broadcast_one_to_all(np.int32(self.count)))
        self._skip = self.count % per_prompt

    def _open(self, asked: dict[str, Any]) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = b""
        if self._partial.exists() and self._about.exists():
            before = json.loads(self._about.read_text(encoding="utf-8"))
            other = sorted(k for k in asked if asked[k] != before.get(k))
            if other:
                raise ValueError(
                    f"{self._partial} was begun with other settings: "
                    + ", ".join(f"{k}={before.get(k)!r}" for k in other)
                    + f" (now {', '.join(f'{k}={asked[k]!r}' for k in other)}). Ask "
                    "for the same to go on, or delete it to start over."
                )
            # A kill may have torn the last line.
            content = self._partial.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
        run_directory.write_atomically(self._about, json.dumps(asked, indent=2) + "\n")
        self._file = open(self._partial, "ab")  # noqa: SIM115 - closed by __exit__
        self._file.truncate(len(whole))
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
            os.replace(self._partial, self._path)
            self._about.unlink()
