"""Reward models as judges: ``reward:runs/rm``, in their own or a standard scale.

reward:runs/rm                              standardised by the checkpoint
reward:runs/rm?scale=raw                    as the network gives it
reward:runs/rm?aggregate=worst              of an ensemble's heads
reward:runs/member*?aggregate=penalised&penalty=0.5      of several runs
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxalign import batch as batches
from jaxalign import models, remote
from jaxalign.cluster import mesh as meshes
from jaxalign.data import memory
from jaxalign.data.bad_rows import nearest
from jaxalign.evaluation.judging import Judge, Metadata, PairwiseJudge
from jaxalign.files import json_sha256
from jaxalign.judges.network import NetworkJudge
from jaxalign.losses import AGGREGATES, aggregate
from jaxalign.models.reward import PAIRWISE, combine
from jaxalign.training import checkpoints, scoring

_POOL = 64  # responses to a prompt beside one encoder row, and in a batch
_ROWS = 16  # encoder rows of a batch, at most
_SETTINGS = ("aggregate", "penalty", "scale")
_SCALES = ("standard", "raw")


def reward(text: str) -> Judge | PairwiseJudge:
    """``reward:PATH[?SETTINGS]``: what a checkpoint's main network gives a response.

    Settings, between ``&``: ``aggregate`` and ``penalty`` of an ensemble in place of
    its own, ``scale=raw``. A path with a wildcard is an ensemble of several runs, each
    in its standard scale.

    Raises:
      FileNotFoundError: for a checkpoint that is not there, or a pattern that fits
        none.
      ValueError: for another setting, or a network without a scalar head.
    """
    path, _, query = text.partition("?")
    settings = _settings(text, query)
    if not glob.has_magic(path) or remote.is_remote(path):
        return _of_run(path, settings)
    paths = sorted(glob.glob(path))
    if not paths:
        raise FileNotFoundError(f"reward:{text}: no run directory fits {path}.")
    own = {k: v for k, v in settings.items() if k == "scale"}
    members = [_of_run(one, own) for one in paths]
    if any(hasattr(member, "compare") for member in members):
        raise ValueError(
            f"reward:{text}: one of these runs compares two responses and scores none; "
            "an ensemble is of scores."
        )
    return EnsembleJudge(
        members, settings.get("aggregate", "mean"), settings.get("penalty", 1.0)
    )


def _of_run(path: str, settings: Mapping[str, Any]) -> RewardJudge:
    meta = checkpoints.newest_meta(path)
    about = checkpoints.description(meta, meta["main"], path)
    pairwise = about.get("options", {}).get("read") in PAIRWISE
    kind = RewardComparison if pairwise else RewardJudge
    return kind(path, meta, settings)


def _settings(text: str, query: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for setting in query.split("&") if query else ():
        name, equals, value = setting.partition("=")
        if not equals or name not in _SETTINGS:
            raise ValueError(
                f"reward:{text} sets {setting!r}; expected name=value of "
                f"{', '.join(_SETTINGS)}{nearest(name, _SETTINGS)}."
            )
        known = {"aggregate": AGGREGATES, "scale": _SCALES}.get(name)
        if known and value not in known:
            raise ValueError(
                f"reward:{text}: {name} must be one of {known}, got {value!r}"
                f"{nearest(value, known)}."
            )
        try:
            found[name] = value if known else float(value)
        except ValueError:
            found[name] = float("nan")
        if not known and not 0.0 <= found[name] < float("inf"):
            raise ValueError(
                f"reward:{text}: {name} must be a number, at least 0; got {value!r}."
            )
    return found


class RewardJudge(NetworkJudge):
    """Scores by the scalar head of a checkpoint's main network.

    Responses to one prompt share its encoder pass, up to 64 at a time.

    Args:
      path: a run directory or one of its checkpoints.
      meta: of its newest checkpoint.
      settings: of `reward`.
    """

    def __init__(self, path: str, meta: Mapping[str, Any], settings: Mapping[str, Any]):
        super().__init__(path, "reward", self._no_forward, network=None)
        self._settings = dict(settings)
        self._heads: scoring.Function | None = None
        stats = meta.get("score_stats")
        if stats or settings:
            told = {"stats": stats, **settings}
            self.fingerprint += f"?{json_sha256(told)[:16]}"

    @staticmethod
    def _no_forward(*_: Any) -> Any:
        raise AssertionError("bound when it is loaded")

    def _bound(self, loaded: checkpoints.Network) -> scoring.Function:
        model, settings = loaded.model, self._settings
        standard = loaded.meta.get("score_stats")
        if settings.get("scale") == "raw":
            standard = None
        own = isinstance(model, models.RewardModel)
        if not own and set(settings) - {"scale"}:
            raise ValueError(
                f"The network of {self._path} is a {type(model).__name__}, which has "
                "no heads to aggregate: leave out "
                f"{', '.join(sorted(set(settings) - {'scale'}))}."
            )

        def forward(params: Any, batch: batches.Batch) -> Any:
            if own:
                found = model.apply({"params": params}, batch, method="outputs")
                return combine(
                    model,
                    found,
                    standard,
                    how=settings.get("aggregate"),
                    penalty=settings.get("penalty"),
                )
            rewards = model.apply({"params": params}, batch)
            if rewards.shape != batch["response_mask"].shape:
                raise ValueError(
                    f"The network of {self._path} is a {type(model).__name__}, which "
                    f"gives no number for each response: reward:{self._path} needs one "
                    f"with a scalar head; did you mean likelihood:{self._path}?"
                )
            return rewards

        return forward

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        metadata: Metadata | None = None,
    ) -> np.ndarray:
        """Float32 ``[n]``; nothing is truncated.

        Raises:
          ValueError: when a number is not finite: the parameters are damaged.
        """
        del metadata
        self.load()
        return self._pooled(prompts, responses, self._forward)

    def heads(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Each member's score, attributes in one sum: float32 ``[n, members]``, raw.

        Of a network without heads ``[n, 1]``.
        """
        loaded = self.load()
        if not isinstance(loaded.model, models.RewardModel):
            return self._pooled(prompts, responses, self._forward)[:, None]
        if self._heads is None:
            weights = np.array(list(loaded.model.weights.values()), np.float32)
            self._heads = lambda params, batch: {
                "response_score": loaded.model.apply(
                    {"params": params}, batch, method="outputs"
                )
                @ weights
            }
        return self._pooled(prompts, responses, self._heads)

    def _pooled(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        function: scoring.Function,
    ) -> np.ndarray:
        """The function of each response, those to one prompt beside each other."""
        if not len(prompts):
            return np.zeros(0, np.float32)
        pools: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            pools.setdefault(prompt, []).append(i)
        rows = [
            (prompt, places[first : first + _POOL])
            for prompt, places in pools.items()
            for first in range(0, len(places), _POOL)
        ]
        found = self._scored(
            [
                memory.text_row(
                    str(n),
                    self._loaded.vocabulary,
                    prompt,
                    [responses[i] for i in places],
                )
                for n, (prompt, places) in enumerate(rows)
            ],
            function,
        )["response_score"]
        order = [i for _, places in rows for i in places]
        scores = np.empty_like(found)
        scores[order] = found
        return scores

    def _scored(
        self, rows: Sequence[Any], function: scoring.Function
    ) -> scoring.Columns:
        cache = memory.MemoryCache(rows, self._loaded.vocabulary, "texts")
        widest = memory.power_of_two(max(len(row.responses) for row in rows))
        feed = memory.feed(cache, batch_size=max(1, min(_ROWS, _POOL // widest)))
        mesh = meshes.make_mesh(devices=jax.local_devices()[:1])
        return scoring.score(
            feed,
            function,
            self._loaded.params,
            mesh,
            verify=0.0,
            title=self._path,
        )


class RewardComparison(RewardJudge):
    """Prefers one of two responses by a network that reads both together."""

    __call__ = None  # it has no score of a single response

    def _bound(self, loaded: checkpoints.Network) -> scoring.Function:
        forward = super()._bound(loaded)
        return lambda params, batch: {"pair_score": forward(params, batch)}

    def compare(
        self,
        prompts: Sequence[str],
        a: Sequence[str],
        b: Sequence[str],
        metadata: Metadata | None = None,
    ) -> np.ndarray:
        """The probability, float32 ``[n]``, that ``a`` is preferred.

        0.5 for two equal texts; exchanging them gives 1 minus it.
        """
        del metadata
        if not len(prompts):
            return np.zeros(0, np.float32)
        self.load()
        vocabulary = self._loaded.vocabulary
        rows = [
            memory.text_row(str(n), vocabulary, prompt, two, pairs=[(0, 1, 0.0)])
            for n, (prompt, *two) in enumerate(zip(prompts, a, b, strict=True))
        ]
        found = self._scored(rows, self._forward)["pair_score"].astype(np.float64)
        return (1.0 / (1.0 + np.exp(-found))).astype(np.float32)


class EnsembleJudge:
    """One score of several judges' scores; NaN where one of them has none.

    Args:
      members: judges whose scores have one scale.
      how, penalty: of `jaxalign.losses.aggregate`.
    """

    def __init__(self, members: Sequence[Judge], how: str, penalty: float):
        self._members, self._how, self._penalty = list(members), how, penalty
        each = " ".join(member.fingerprint for member in members)
        self.fingerprint = f"{how} {penalty:g} of [{each}]"

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        metadata: Metadata | None = None,
    ) -> np.ndarray:
        """Float32 ``[n]``."""
        scores = np.stack([m(prompts, responses, metadata) for m in self._members], -1)
        found = aggregate(scores.astype(np.float64), self._how, penalty=self._penalty)
        return found.astype(np.float32)
