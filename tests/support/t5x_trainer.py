"""Run beside a checkout of T5X: T5X's trainer on jaxalign's objectives.

``t5x_trainer.py FOLDER GIN_TEXT`` prints one line of JSON for each comparison.
"""

import json
import pathlib
import sys

import gin
import jax
import numpy as np
import seqio
import tensorflow as tf
from flax.core import freeze, unfreeze
from t5x import adafactor, gin_utils, partitioning, utils
from t5x import trainer as trainer_lib
from t5x.train import train  # as the gin file's train_script

import jaxalign
from jaxalign import data, models, objectives
from jaxalign.data.plan import Placement, RowShape
from jaxalign.interop import t5x
from jaxalign.training import optimizers
from jaxalign.training import step as steps

ROOT = pathlib.Path(__file__).parents[2]
LEARNING_RATE, STEPS = 1e-2, 20
SIZES = {
    "vocab_size": 48,
    "emb_dim": 16,
    "num_heads": 2,
    "head_dim": 8,
    "mlp_dim": 32,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
}
WIDE = {"vocab_size": 128, "emb_dim": 128, "head_dim": 64, "mlp_dim": 128}
WIDE |= {"num_encoder_layers": 2}
CASES = {
    "DROV": ({}, {}),
    "DPO": ({}, {}),
    # T5X's Adafactor factors every scanned kernel, ours those of 128 at least.
    "DROV scanned": ({"tau": 0.5}, WIDE | {"scan_layers": True}),
}


def tell(case, what, **facts):
    print(json.dumps({"case": case, "what": what, **facts}), flush=True)


def make_rows(count, seed):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        found = rng.integers(3, SIZES["vocab_size"], rng.integers(low, high))
        return np.append(found, 1).astype(np.int32)

    return [
        data.Row(
            key=str(i),
            prompts=[ids(2, 7)],
            responses=[ids(1, 7), ids(1, 7)],
            response_prompt=[0, 0],
            response_kind=[0, 0],
            response_reward=[float(r) for r in rng.normal(size=2)],
            response_label=[-1, -1],
            pairs=[(0, 1, 0.0)],
        )
        for i in range(count)
    ]


def make_batch(seed):
    """Four rows of two prompts each, packed."""
    rows, shape = make_rows(8, seed), RowShape(16, 2, 16, 2, 4, 2)
    arrays = []
    for start in range(0, len(rows), 2):
        ids = np.arange(start, start + 2)
        placement = Placement(ids, np.arange(4) % 2, inputs=8, targets=8)
        arrays.append(data.to_arrays(rows[start : start + 2], placement, shape))
    return {name: np.stack([a[name] for a in arrays]) for name in arrays[0]}


def made(objective, reference="online"):
    """The model, and a state initialiser, in T5X."""
    model = t5x.as_t5x_model(
        objective,
        vocabulary=jaxalign.vocabularies.ByteVocabulary(),
        optimizer_def=adafactor.Adafactor(
            1e-3, logical_factor_rules=adafactor.standard_logical_factor_rules()
        ),
        reference=reference,
    )
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    batch = make_batch(0)
    init = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={name: value.shape for name, value in batch.items()},
        input_types={name: value.dtype for name, value in batch.items()},
        partitioner=partitioner,
    )
    return model, partitioner, init


def objective_of(case, settings, shape):
    config = models.T5Config(**{**SIZES, **shape})
    return getattr(objectives, case.split()[0])(model=models.T5(config), **settings)


def twenty_steps(case, settings, shape):
    objective = objective_of(case, settings, shape)
    model, partitioner, init = made(objective)
    state = init.from_scratch(jax.random.PRNGKey(0))
    copied = jax.tree.map(np.array, unfreeze(state.params))
    networks = copied if "value" in objective.networks() else {"policy": copied}
    held = jax.tree.map(np.array, unfreeze(state.flax_mutables))["frozen"]

    tx = optimizers.adafactor(LEARNING_RATE)
    ours = steps.TrainState.create(networks | {"reference": held["reference"]}, tx)
    ours = jax.tree.map(jax.numpy.asarray, ours)
    step = jax.jit(steps.make_train_step(objective, tx))
    batches = [make_batch(seed) for seed in range(STEPS)]
    wanted = []
    for batch in batches:
        ours, metrics = step(ours, batch, jax.random.key(1))
        wanted.append(float(metrics["objective"].total))

    trainer = trainer_lib.Trainer(
        model=model,
        train_state=state,
        partitioner=partitioner,
        eval_names=[],
        summary_dir=None,
        train_state_axes=init.train_state_axes,
        rng=jax.random.PRNGKey(2),
        learning_rate_fn=lambda step: LEARNING_RATE,
        num_microbatches=None,
    )
    found, count = [], None
    with trainer:
        for i, batch in enumerate(batches):
            summary = trainer.train(iter([batch]), 1, start_step=i).result()
            found.append(float(summary["objective"].value))
            count = len(summary)
    final = unfreeze(trainer.train_state.params)
    final = final if "value" in networks else {"policy": final}
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), final, ours.params)
    still = unfreeze(trainer.train_state.flax_mutables)["frozen"]["reference"]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), still, held["reference"])
    tell(
        case,
        "losses",
        found=found,
        wanted=wanted,
        parameters=float(max(jax.tree.leaves(apart))),
        reference=float(max(jax.tree.leaves(moved))),
        metrics=count,
        step=int(trainer.train_state.step),
    )


def microbatches(case):
    model, partitioner, init = made(objective_of(case, {}, {}))
    trainer = trainer_lib.Trainer(
        model=model,
        train_state=init.from_scratch(jax.random.PRNGKey(0)),
        partitioner=partitioner,
        eval_names=[],
        summary_dir=None,
        train_state_axes=init.train_state_axes,
        rng=jax.random.PRNGKey(2),
        learning_rate_fn=lambda step: LEARNING_RATE,
        num_microbatches=2,
    )
    message = ""
    with trainer:
        try:
            trainer.train(iter([make_batch(0)]), 1)
        except ValueError as error:
            message = str(error)
    tell(case, "microbatches", message=message)


def starts(case, folder):
    """A T5X checkpoint of one T5 as the start of every network of a run."""
    objective = objective_of(case, {}, {})
    params = models.init_params(objective.model, jax.random.key(9))
    t5x.save(folder / "t5", jax.tree.map(np.asarray, params), step=7)
    _, _, init = made(objective)
    config = utils.RestoreCheckpointConfig(
        f"{folder}/t5/checkpoint_7",
        "specific",
        dtype="float32",
        fallback_to_scratch=True,
        state_transformation_fns=[t5x.start_from_t5],
    )
    ((state, _),) = init.from_checkpoints([config], init_rng=jax.random.PRNGKey(0))
    found = unfreeze(state.params)
    networks = found if "value" in objective.networks() else {"policy": found}
    networks |= unfreeze(state.flax_mutables)["frozen"]
    fresh = init.from_scratch(jax.random.PRNGKey(0)).params
    equal = {
        name: all(
            jax.tree.leaves(
                jax.tree.map(
                    np.array_equal,
                    {k: v for k, v in network.items() if k in params},
                    {k: v for k, v in params.items() if k in network},
                )
            )
        )
        for name, network in networks.items()
    }
    if "value" in networks:
        head = unfreeze(fresh)["value"]["value_head"]["kernel"]
        own = networks["value"]["value_head"]["kernel"]
        equal["value_head"] = bool(np.array_equal(head, own))
    tell(case, "starts", equal=equal, step=int(state.step))


def answers(case):
    """What T5X's inference asks of a model."""
    objective = objective_of(case, {}, {})
    model, _, init = made(objective)
    state = init.from_scratch(jax.random.PRNGKey(0))
    params, batch = freeze(unfreeze(state.params)), make_batch(3)
    own = model._policy(params)
    scores = jax.jit(model.score_batch)(params, batch)
    wanted = models.response_logps(objective.model, own, batch)
    logits = model._compute_logits(params, batch)
    picked = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)),
        batch["decoder_target_tokens"][..., None],
        axis=-1,
    )[..., 0]
    total = float((picked * batch["decoder_loss_weights"]).sum())
    single = {name: value for name, value in batch.items()}
    single["encoder_input_tokens"] = np.where(
        batch["encoder_segment_ids"] == 1, batch["encoder_input_tokens"], 0
    )
    tokens = jax.jit(model.predict_batch)(params, single, rng=jax.random.PRNGKey(4))
    generator = jaxalign.decoding.generate(
        objective.model,
        own,
        single["encoder_input_tokens"],
        key=jax.random.key(0),
        prompt_ids=np.arange(4),
        num_samples=1,
        max_new_tokens=16,
        sampling=jaxalign.decoding.Sampling(temperature=0.0),
    )
    tell(
        case,
        "answers",
        scores=float(np.abs(scores - wanted).max()),
        logits=abs(total - float(np.sum(wanted))),
        tokens=bool(np.array_equal(tokens, generator.tokens[:, 0])),
        shape=list(tokens.shape),
    )


def register_task():
    """A seqio task of pairs, of the features that docs/seqio.md lists."""
    vocabulary = seqio.ByteVocabulary(extra_ids=125)
    rows = [
        {"inputs": f"say {i}", "chosen": f"good {i}", "rejected": "bad"}
        for i in range(64)
    ]

    def dataset_fn(split, shuffle_files, seed=None):
        del split, shuffle_files, seed
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return tf.data.Dataset.from_tensor_slices(columns)

    seqio.TaskRegistry.add(
        "my_pairs",
        source=seqio.FunctionDataSource(dataset_fn, splits=["train", "validation"]),
        preprocessors=[
            lambda ds: seqio.preprocessors.tokenize(
                ds, _features(vocabulary), copy_pretokenized=False
            ),
            seqio.preprocessors.append_eos,
        ],
        output_features=_features(vocabulary),
    )


def _features(vocabulary):
    names = ("inputs", "chosen", "rejected")
    return {name: seqio.Feature(vocabulary, add_eos=True) for name in names}


def whole_run(folder, text):
    """The gin file of docs/t5x.md through T5X's train()."""
    register_task()
    (folder / "dpo.gin").write_text(text)
    gin_utils.parse_gin_flags(
        [str(folder), str(ROOT / "gin_configs")],
        ["dpo.gin"],
        [
            f"MODEL_DIR = '{folder / 'run'}'",
            "MIXTURE_OR_TASK_NAME = 'my_pairs'",
            "INITIAL_CHECKPOINT_PATH = []",
            "TRAIN_STEPS = 4",
            "BATCH_SIZE = 8",
            "TASK_FEATURE_LENGTHS = {'inputs': 12, 'targets': 8}",
            "EVAL_PERIOD = 2",
            "EVAL_STEPS = 1",
            "RANDOM_SEED = 0",
            "utils.SaveCheckpointConfig.period = 4",
        ],
    )
    run = gin.get_configurable(train)
    last, state = run()
    saved = t5x.open_checkpoint(folder / "run")
    shape = t5x.describe(saved).shape
    equal = np.array_equal(
        saved.leaves["target/token_embedder/embedding"].read(),
        state.params["token_embedder"]["embedding"],
    )
    tell(
        "DPO",
        "train.py",
        last=int(last),
        step=saved.step,
        width=shape.emb_dim,
        equal=bool(equal),
    )


if __name__ == "__main__":
    place = pathlib.Path(sys.argv[1]).absolute()
    for name, (fields, sizes) in CASES.items():
        twenty_steps(name, fields, sizes)
    microbatches("DPO")
    for name in ("DROV", "DPO"):
        starts(name, place / name)
        answers(name)
    whole_run(place, pathlib.Path(sys.argv[2]).read_text())
