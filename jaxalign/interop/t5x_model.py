"""jaxalign's objectives as models of T5X, for T5X's own ``train.py``; docs/t5x.md."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning

from jaxalign import models
from jaxalign.batch import check
from jaxalign.interop import t5x_features
from jaxalign.vocabularies import ByteVocabulary

REFERENCE = "reference"  # the network that fills the ``ref`` columns of a batch
REFERENCES = ("online", "cached")

# T5X's rules of factoring and partitioning know no axis of size one.
_AXES = {"scalar": "relpos_buckets"}
_FROZEN = "frozen"  # T5X's flax_mutables: {"frozen": {network: parameters}}


def as_t5x_model(
    objective: Any,
    model: models.EncoderDecoder | None = None,
    *,
    vocabulary: Any,
    optimizer_def: Any,
    reference: str = "online",
) -> Any:
    """An objective as a ``t5x.models.BaseTransformerModel``.

    T5X's ``target`` is the tree of the network where one trains, so that T5X's
    checkpoints of that network go in and come out; ``{"policy": ..., "value": ...}``
    where several do. Networks that do not train, the reference among them, are T5X's
    ``flax_mutables``, which its checkpoints hold.

    T5X's batch is jaxalign's batch: one flat dict of arrays, rows first.

    Args:
      objective: of ``jaxalign.objectives``, or its class, as ``OBJECTIVE`` names it.
      model: the network, where ``objective`` is a class.
      vocabulary: of ``jaxalign.vocabularies`` or seqio, equal to the tasks'.
      optimizer_def: T5X's, such as ``t5x.adafactor.Adafactor()``.
      reference: ``"online"``: the state holds the reference, which starts as the policy
        does, and each step scores its batch with it. ``"cached"``: the batch brings
        ``response_ref_logps``.

    Raises:
      ImportError: T5X is not installed.
      ValueError: for an objective that T5X's train state has no room for.

    In gin, beside T5X's own files::

        MODEL = @models.T5()
        OBJECTIVE = @objectives.DPO
        train_script.train.model = @t5x_model.as_t5x_model()
        t5x_model.as_t5x_model:
          objective = %OBJECTIVE
          model = %MODEL
          vocabulary = %VOCABULARY
          optimizer_def = %OPTIMIZER
    """
    if reference not in REFERENCES:
        raise ValueError(
            f"reference must be one of {list(REFERENCES)}, got {reference!r}. A "
            "reference that moves is only in jaxalign train."
        )
    if isinstance(objective, type) or not hasattr(objective, "batch_loss"):
        objective = objective(model=model)
    elif model is not None and model != objective.model:
        raise ValueError(
            "Give the network once: as model, with an objective's class, or inside the "
            "objective."
        )
    if objective.running:
        raise ValueError(
            f"{type(objective).__name__} adds up {list(objective.running)} over the "
            "steps of a run, which T5X's train state has no place for: use jaxalign "
            "train."
        )
    return _model_class()(objective, _seqio(vocabulary), optimizer_def, reference)


def start_from_t5(
    checkpoint: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    is_resuming: bool = False,
) -> dict[str, Any]:
    """Starts all networks of a run from a T5X checkpoint of one T5.

    One of ``utils.RestoreCheckpointConfig.state_transformation_fns``. Each network, the
    reference too, takes the parameters it has names for; the rest of it, such as a
    value's head, is new (``fallback_to_scratch = True``), and so is the optimizer's
    state. The step is the checkpoint's.

    Args:
      checkpoint, state: state dicts of the checkpoint and of the run.
      is_resuming: the run's own checkpoint is restored as it is.
    """
    if is_resuming:
        return dict(checkpoint)
    has = traverse_util.flatten_dict(dict(checkpoint), sep="/", is_leaf=_is_array)
    found = {"state/step": has["state/step"]}
    for name in traverse_util.flatten_dict(dict(state), sep="/", is_leaf=_is_array):
        if (source := _source(name, has)) is not None:
            found[name] = has[source]
    return traverse_util.unflatten_dict(found, sep="/")


def _is_array(_: Any, value: Mapping[str, Any]) -> bool:
    """Whether a dict says where T5X reads an array from, later."""
    return {"driver", "kvstore", "metadata"} <= set(value)


def _source(name: str, checkpoint: Mapping[str, Any]) -> str | None:
    """The parameter of a single T5's checkpoint that a run's parameter starts from."""
    if name.startswith("target/"):
        # {"policy": {"encoder": ...}, ...}, or one network's own tree.
        inside = (name.removeprefix("target/"), name.split("/", 2)[-1])
    elif name.startswith(f"flax_mutables/{_FROZEN}/"):
        inside = (name.split("/", 3)[-1],)
    else:
        return None
    candidates = (f"target/{path}" for path in inside)
    return next((path for path in candidates if path in checkpoint), None)


def _seqio(vocabulary: Any) -> Any:
    """seqio's vocabulary of the same ids, which T5X compares with the tasks'."""
    import seqio

    if isinstance(vocabulary, seqio.Vocabulary):
        return vocabulary
    if isinstance(vocabulary, ByteVocabulary):
        return seqio.ByteVocabulary(vocabulary.extra_ids)
    ids = (vocabulary.pad_id, vocabulary.eos_id)
    if ids != (0, 1) or not hasattr(vocabulary, "path"):
        raise ValueError(
            f"seqio has no vocabulary with the ids of {vocabulary!r}: T5X's tasks pad "
            "with 0 and end texts with 1. Train it with jaxalign train."
        )
    return seqio.SentencePieceVocabulary(vocabulary.path, vocabulary.extra_ids)


def _axes_metadata(axes: Mapping[str, Any]) -> dict[str, Any]:
    """T5X's ``params_axes`` for a tree of axis names."""
    flat = traverse_util.flatten_dict(dict(axes))
    return traverse_util.unflatten_dict(
        {
            (*path[:-1], f"{path[-1]}_axes"): flax_partitioning.AxisMetadata(
                names=tuple(_AXES.get(name, name) for name in names)
            )
            for path, names in flat.items()
        }
    )


@functools.cache
def _model_class() -> type:
    """The class; made where T5X is, which nothing else here asks for."""
    try:
        from t5x import models as t5x_models
    except ImportError as error:
        raise ImportError(
            "as_t5x_model makes a model for T5X, which cannot be imported: "
            f"{error}. Install https://github.com/google-research/t5x beside jaxalign; "
            "jaxalign train needs none of it."
        ) from error

    class ObjectiveModel(t5x_models.BaseTransformerModel):
        """An objective of jaxalign between T5X's trainer and its checkpoints."""

        def __init__(
            self, objective: Any, vocabulary: Any, optimizer_def: Any, reference: str
        ):
            super().__init__(objective.model, vocabulary, vocabulary, optimizer_def)
            self.objective = objective
            names = [n for n in objective.networks() if n not in objective.frozen]
            self._trained = names
            self._own_reference = objective.uses_reference and reference == "online"
            self._cached = objective.uses_reference and reference == "cached"
            self._rows: int | None = None  # of a training batch

        @property
        def FEATURE_CONVERTER_CLS(self) -> Callable[..., Any]:
            return t5x_features.converter(self.objective, cached_reference=self._cached)

        def get_initial_variables(
            self,
            rng: jax.Array,
            input_shapes: Mapping[str, Any],
            input_types: Mapping[str, Any] | None = None,
        ) -> flax.core.FrozenDict:
            """Parameters and their axes; shapes of batches do not enter."""
            del input_types
            self._rows = next(iter(input_shapes.values()))[0]
            params = self.objective.init_params(rng)
            axes = self.objective.logical_axes()
            found = {
                "params": self._tree(params),
                "params_axes": _axes_metadata(self._tree(axes)),
            }
            if held := self._held(params):
                found[_FROZEN] = held
                found[f"{_FROZEN}_axes"] = _axes_metadata(self._held(axes))
            return flax.core.freeze(found)

        def _tree(self, networks: Mapping[str, Any]) -> Any:
            """T5X's ``target``: of one network that trains its own tree."""
            if len(self._trained) == 1:
                return networks[self._trained[0]]
            return {name: networks[name] for name in self._trained}

        def _held(self, networks: Mapping[str, Any]) -> dict[str, Any]:
            """The networks that no step changes."""
            held = {name: networks[name] for name in self.objective.frozen}
            if self._own_reference:
                held[REFERENCE] = networks[self.objective.main]
            return held

        def _networks(self, params: Any, mutables: Any = None) -> dict[str, Any]:
            trained = flax.core.unfreeze(params)
            if len(self._trained) == 1:
                trained = {self._trained[0]: trained}
            held = flax.core.unfreeze(mutables)[_FROZEN] if mutables else {}
            return {**held, **trained}

        def loss_fn(
            self,
            params: Any,
            batch: Mapping[str, jax.Array],
            dropout_rng: jax.Array | None,
            flax_mutables: Any = None,
        ) -> tuple[jax.Array, Any]:
            """The loss of a batch, divided by its own counts, and T5X's metrics."""
            rows = batch["encoder_input_tokens"].shape[0]
            if self._rows not in (None, rows):
                raise ValueError(
                    f"T5X cut a batch of {self._rows} rows into microbatches of {rows} "
                    "and would add up losses that are each divided by their own "
                    "counts. Set trainer.Trainer.num_microbatches = None; to save "
                    "memory set models.T5Config.remat_policy or logits_chunk."
                )
            loss, metrics = self._loss(params, batch, dropout_rng, flax_mutables)
            return loss, metrics if flax_mutables is None else (metrics, flax_mutables)

        def eval_fn(
            self,
            params: Any,
            batch: Mapping[str, jax.Array],
            flax_mutables: Any = None,
        ) -> tuple[jax.Array, Any]:
            return self._loss(params, batch, None, flax_mutables)

        def _loss(
            self, params: Any, batch: Mapping[str, jax.Array], rng: Any, mutables: Any
        ) -> tuple[jax.Array, Any]:
            needed = self.objective.columns
            if self._own_reference:
                needed = [name for name in needed if "_ref_" not in name]
            check(batch, tuple(needed))
            networks = self._networks(params, mutables)
            loss, metrics = self.objective.batch_loss(networks, batch, rng)
            return loss, _metrics(metrics, loss, batch)

        def _policy(self, params: Any) -> Any:
            return self._networks(params)[self.objective.main]

        def _compute_logits(
            self,
            params: Any,
            batch: Mapping[str, jax.Array],
            dropout_rng: jax.Array | None = None,
        ) -> jax.Array:
            """Logits ``[B, K, Ld, V]``; ``[B, Ld, V]`` where K is 1."""
            states, kernel, _ = models.final_states(
                self.objective.model,
                self._policy(params),
                batch,
                deterministic=dropout_rng is None,
                dropout_key=dropout_rng,
            )
            logits = jnp.einsum(
                "bkde,ev->bkdv", states, kernel, preferred_element_type=jnp.float32
            )
            return logits[:, 0] if logits.shape[1] == 1 else logits

        def score_batch(
            self,
            params: Any,
            batch: Mapping[str, jax.Array],
            return_intermediates: bool = False,
        ) -> jax.Array:
            """Log-probabilities of responses ``[B, R]``, or ``[B]`` of one a row."""
            if return_intermediates:
                raise ValueError("jaxalign's networks sow no intermediates.")
            scores = models.response_logps(
                self.objective.model, self._policy(params), batch
            )
            return scores[:, 0] if scores.shape[1] == 1 else scores

        def predict_batch_with_aux(
            self,
            params: Any,
            batch: Mapping[str, jax.Array],
            rng: jax.Array | None = None,
            temperature: float = 0.0,
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            """Responses ``[B, Ld]`` to rows of one prompt each, greedy by default."""
            from jaxalign import decoding

            tokens = batch["encoder_input_tokens"]
            key = jax.random.key(0)
            if rng is not None:
                raw = jnp.issubdtype(rng.dtype, jnp.integer)
                key = jax.random.wrap_key_data(rng) if raw else rng
            found = decoding.generate(
                self.objective.model,
                self._policy(params),
                tokens,
                key=key,
                prompt_ids=jnp.arange(len(tokens)),
                num_samples=1,
                max_new_tokens=batch["decoder_target_tokens"].shape[-1],
                sampling=decoding.Sampling(
                    temperature=temperature, eos_id=self.output_vocabulary.eos_id
                ),
            )
            return found.tokens[:, 0], {"scores": found.logps[:, 0].sum(axis=-1)}

    return ObjectiveModel


def _metrics(
    metrics: Mapping[str, Any], loss: jax.Array, batch: Mapping[str, jax.Array]
) -> dict[str, Any]:
    """T5X's metrics: means, of samples too; correlations are left out."""
    import clu.metrics
    from t5x import metrics as t5x_metrics

    found: dict[str, Any] = {
        "objective": t5x_metrics.AveragePerStep.from_model_output(loss),
        "timing/steps_per_second": t5x_metrics.StepsPerTime.from_model_output(),
        "timing/target_tokens_per_second": t5x_metrics.TimeRate.from_model_output(
            numerator=jnp.sum(batch["decoder_loss_weights"])
        ),
    }
    for name, metric in metrics.items():
        total, count = getattr(metric, "total", None), getattr(metric, "count", None)
        if hasattr(metric, "values"):
            total = jnp.sum(jnp.where(metric.mask > 0, metric.values, 0.0))
            count = jnp.sum(metric.mask > 0)
        if total is not None:
            found[name] = clu.metrics.Average(total=total, count=count)
    return found
