"""Run beside a checkout of T5X: what T5X writes is read here, and the other way round.

``real_t5x.py FOLDER`` prints one line of JSON for each comparison. T5X and jaxalign are
in one process here, and nowhere else.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import seqio
from flax import traverse_util
from flax.core import freeze, unfreeze
from t5x import adafactor, checkpoints, models, partitioning, utils
from t5x.examples.scalable_t5 import network as scalable_t5
from t5x.examples.t5 import network as t5

import jaxalign.models
from jaxalign.interop import t5x, t5x_layouts
from jaxalign.models import networks
from jaxalign.training.adafactor import AdafactorState, scale_by_adafactor

GATED = {"mlp_activations": ("gelu", "linear")}
TIED = {"mlp_activations": ("relu",), "logits_via_embedding": True}
CASES = {  # emb 128 and mlp 256: Adafactor factors them
    "t5_1_1": (t5, {**GATED, "emb_dim": 128, "mlp_dim": 256}),
    "t5_1_0": (t5, {**TIED, "emb_dim": 24, "mlp_dim": 32}),
    "umt5": (scalable_t5, {**GATED, "emb_dim": 24, "mlp_dim": 32}),
    "umt5_apart": (scalable_t5, {**GATED, "emb_dim": 24, "mlp_dim": 32}),
}
PER_LAYER = "relative_bias_per_layer" in jaxalign.models.T5Config.__dataclass_fields__


def build(network, fields):
    config = network.T5Config(
        vocab_size=40,
        num_heads=3,
        head_dim=6,
        num_encoder_layers=2,
        num_decoder_layers=3,
        dropout_rate=0.0,
        dtype="float32",
        **fields,
    )
    vocabulary = seqio.ByteVocabulary()
    rules = adafactor.standard_logical_factor_rules()
    model = models.EncoderDecoderModel(
        network.Transformer(config),
        vocabulary,
        vocabulary,
        optimizer_def=adafactor.Adafactor(1e-3, logical_factor_rules=rules),
    )
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    init = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes=dict.fromkeys(names, (2, 8)),
        partitioner=partitioner,
    )
    state = init.from_scratch(jax.random.PRNGKey(0))
    state = state.apply_gradient(grads=state.params, learning_rate=1e-3)
    return model, partitioner, init, state


def batch():
    rng = np.random.default_rng(0)
    encoder, decoder = rng.integers(2, 40, (2, 2, 8)).astype(np.int32)
    encoder[1, 5:] = 0
    targets = np.roll(decoder, -1, axis=1)
    return encoder, decoder, targets


def t5x_logits(model, params):
    return np.asarray(
        model.module.apply({"params": params}, *batch(), enable_dropout=False)
    )


def our_logits(network, params):
    encoder, decoder, targets = batch()
    segments = (encoder > 0).astype(np.int32)
    own = (targets > 0).astype(np.int32)[:, None]
    variables = {"params": params}
    encoded = network.apply(variables, encoder, segments, method="encode")
    states = network.apply(
        variables, encoded, segments, decoder[:, None], own, own, method="decode"
    )
    states, kernel = network.apply(variables, states, method="head")
    return np.asarray(states @ kernel)[:, 0]


def ours_of(checkpoint):
    """The parameters by our names, layers apart; no network is asked."""
    found = {}
    for name in (n for n in checkpoint.leaves if n.startswith("target/")):
        path = name.removeprefix("target/")
        if not t5x_layouts.is_scanned(path):
            found[path] = t5x_layouts.find(checkpoint.leaves, name)
            continue
        stack, _, rest = path.split("/", 2)
        for i in range(3 if stack == "decoder" else 2):
            path = f"{stack}/layers_{i}/{rest}"
            found[path] = t5x_layouts.find(checkpoint.leaves, f"target/{path}")
    return found


def steps_apart(checkpoint, state, params):
    """Three steps of both Adafactors from what T5X kept; the largest difference."""
    optimizer = scale_by_adafactor(
        decay_rate=0.8,
        clipping_threshold=1.0,
        multiply_by_parameter_scale=True,
        min_dim_size_to_factor=128,
        factored=True,
        epsilon1=1e-30,
        epsilon2=1e-3,
    )
    fresh = optimizer.init(params)
    like = {name: getattr(fresh, name) for name in ("v_row", "v_col", "v")}
    ours = AdafactorState(
        np.asarray(checkpoint.step, np.int32), **t5x.moments(checkpoint, like)
    )
    for i in range(3):
        grads = jax.tree.map(lambda x, i=i: np.sin(np.asarray(x) * 50 + i), params)
        state = state.apply_gradient(grads=freeze(grads), learning_rate=0.1)
        updates, ours = optimizer.update(grads, ours, params)
        params = jax.tree.map(lambda x, u: x - 0.1 * u, params, updates)
    theirs = unfreeze(state.params)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, theirs)
    return float(max(jax.tree.leaves(apart)))


def differences(found, wanted):
    """Names and arrays that are not the same, bit for bit."""
    names = sorted(set(found) ^ set(wanted))
    return names + [
        name
        for name in sorted(set(found) & set(wanted))
        if found[name].shape != np.shape(wanted[name])
        or found[name].read().tobytes() != np.asarray(wanted[name]).tobytes()
    ]


def main(folder):
    def tell(case, what, **facts):
        print(json.dumps({"case": case, "what": what, **facts}), flush=True)

    for case, (network, fields) in CASES.items():
        if case == "umt5_apart":
            fields = {**fields, "scan_layers": False}
        model, partitioner, init, state = build(network, fields)
        wanted = t5x_logits(model, state.params)
        flat = traverse_util.flatten_dict(state.state_dict(), sep="/")
        flat = {name: value for name, value in flat.items() if np.size(value)}
        for kind in ("legacy", "orbax"):
            place = folder / case / kind
            place.mkdir(parents=True)
            if kind == "legacy":
                checkpoints.Checkpointer(state, partitioner, str(place)).save(state)
            else:
                make = checkpoints.OrbaxCheckpointManagerInterface
                manager = make(str(place), state, partitioner)
                manager.save(state)
                manager.close()
            checkpoint = t5x.open_checkpoint(place)
            stored = {n: v for n, v in flat.items() if n in checkpoint.leaves}
            facts = {"format": checkpoint.found.format, "step": checkpoint.step}
            missing = differences(checkpoint.leaves, stored)
            tell(case, "read", missing=missing, count=len(stored), **facts)
            if case.startswith("umt5") and not PER_LAYER:
                continue
            shape = t5x.describe(checkpoint).shape
            for scan_layers in (False, True):
                config = dataclasses.asdict(shape) | {"scan_layers": scan_layers}
                ours = jaxalign.models.T5(jaxalign.models.T5Config(**config))
                params, _ = t5x.restore(checkpoint, networks.shapes(ours))
                worst = float(np.abs(our_logits(ours, params) - wanted).max())
                tell(case, "our logits", worst=worst)
        if not case.startswith("umt5"):
            params = jax.tree.map(np.asarray, unfreeze(state.params))
            worst = steps_apart(checkpoint, state, params)
            tell(case, "three steps", worst=worst)
        if case == "umt5_apart":
            continue  # written in the other layout
        place = folder / case / "ours"
        checkpoint = t5x.open_checkpoint(folder / case / "legacy")
        t5x.save(place, ours_of(checkpoint), step=12)
        empty = state.replace_params(jax.tree.map(lambda x: x * 0, state.params))
        restorers = {
            "Checkpointer": lambda init, empty, partitioner, place: (
                checkpoints.Checkpointer(empty, partitioner, str(place)).restore()
            ),
            "trainer": lambda init, empty, partitioner, place: next(
                init.from_checkpoints(
                    [
                        utils.RestoreCheckpointConfig(
                            f"{place}/checkpoint_12", "specific"
                        )
                    ]
                )
            )[0],
            "Orbax manager": lambda init, empty, partitioner, place: (
                checkpoints.OrbaxCheckpointManagerInterface(
                    str(place), empty, partitioner
                ).restore(path=f"{place}/checkpoint_12")
            ),
        }
        for name, restore in restorers.items():
            found = restore(init, empty, partitioner, place)
            worst = float(np.abs(t5x_logits(model, found.params) - wanted).max())
            tell(case, f"T5X's {name}", worst=worst, step=int(found.step))
        written = t5x.open_checkpoint(place).leaves
        slots = {n: v for n, v in flat.items() if n.startswith("state/param_states/")}
        shapes = [n for n, v in slots.items() if written[n].shape != np.shape(v)]
        tell(case, "slots", count=len(slots), wrong=shapes)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).absolute())
