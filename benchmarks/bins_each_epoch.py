"""Does it matter that a response keeps its row mates over the epochs?

A plan puts examples into rows (bins) once; epochs shuffle the rows. So a response meets
the same neighbours in every epoch, and KTO the same mismatched prompt. Here KTO and DPO
train for several epochs on few examples of the village, once with the plan as it is and
once with a new plan every epoch, from the same supervised policy, with as many steps.
Printed is, on clean held-out pairs and relative to that policy: the share of pairs told
apart, the mean margin and the mean log-ratio.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import data, models, objectives, world
from jaxalign.batch import select_pairs
from jaxalign.training import step as steps
from jaxalign.vocabularies import ByteVocabulary

EXAMPLES, BATCH, EPOCHS, SEEDS = 320, 16, 8, (0, 1, 2)
SHAPE = data.RowShape(96, 2, 112, prompts=12, responses=24, pairs=12)
MODEL = models.T5(models.T5Config(264, 48, 4, 12, 96, 1, 1, ("relu",)))
VOCABULARY = ByteVocabulary()


def ids(text: str) -> np.ndarray:
    return np.array([*VOCABULARY.encode(text)[:55], 1], np.int32)


def row(key: int, found: dict) -> data.Row:
    """A row of the village as the cache would hold it."""
    texts = [found[k] for k in ("chosen", "rejected", "completion") if k in found]
    return data.Row(
        key=str(key),
        prompts=[ids(found["prompt"])],
        responses=[ids(text) for text in texts],
        response_prompt=[0] * len(texts),
        response_kind=[0] * len(texts),
        response_reward=[float("nan")] * len(texts),
        response_label=[int(found.get("label", -1))] * len(texts),
        pairs=[(0, 1, 0.0)] if len(texts) == 2 else [],
    )


def rows(schema: str, split: str, count: int, seed: int = 0) -> list[data.Row]:
    found = world.rows(schema, split, count, seed=seed)
    return [row(i, one) for i, one in enumerate(found)]


def plan(of: list[data.Row], min_prompts: int) -> data.Plan:
    return data.pack(
        data.build_index(of), inputs=48, targets=56, packing=2, min_prompts=min_prompts
    )


def batches(of: list[data.Row], min_prompts: int, seed: int, anew: bool):
    """All batches of all epochs."""
    for epoch in range(EPOCHS):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(of)) if anew else np.arange(len(of))
        mixed = [of[i] for i in order]
        bins = plan(mixed, min_prompts)
        shuffled = rng.permutation(len(bins))
        for start in range(0, len(shuffled) - BATCH + 1, BATCH):
            yield stacked(mixed, bins, shuffled[start : start + BATCH], SHAPE)


def stacked(of: list[data.Row], bins: data.Plan, which, shape: data.RowShape):
    arrays = [
        data.to_arrays([of[i] for i in bins[b].row_ids], bins[b], shape) for b in which
    ]
    return {name: np.stack([a[name] for a in arrays]) for name in arrays[0]}


@functools.cache
def step(name: str):
    """An objective, its optimizer and its compiled step."""
    own = {"dropout": False} if name == "SFT" else {"beta": 0.5}
    objective = objectives.OBJECTIVES[name](model=MODEL, **own)
    tx = optax.adam(3e-3 if name == "SFT" else 1e-3)
    function = steps.make_train_step(objective, tx)
    return objective, tx, jax.jit(function)


def train(name: str, params, fed, reference=None):
    objective, tx, function = step(name)
    networks = jax.tree.map(jnp.copy, params)
    if reference is not None:
        networks["reference"] = reference
    state = steps.TrainState.create(networks, tx, objective)
    for batch in fed:
        state, _ = function(state, batch, jax.random.key(0))
    return state.params


def main() -> None:
    clean = rows("rationale", "validation", 160)  # pairs without wrong labels
    bins = plan(clean, 1)
    held_out = stacked(clean, bins, range(len(bins)), bins.shape)
    score = jax.jit(lambda params: models.response_logps(MODEL, params, held_out))
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for seed in SEEDS:
        fed = batches(rows("supervised", "train", 4 * EXAMPLES, seed), 1, seed, False)
        start = step("SFT")[0].init_params(jax.random.key(seed))
        start = train("SFT", start, fed)
        before = np.asarray(score(start["policy"]))
        for name, schema in (("KTO", "trajectory"), ("DPO", "preference")):
            of = rows(schema, "train", EXAMPLES, seed)
            mates = step(name)[0].min_prompts
            for arm in ("once", "each epoch"):
                fed = batches(of, mates, seed, arm == "each epoch")
                after = train(name, start, fed, start["policy"])
                ratios = np.asarray(score(after["policy"])) - before
                chosen, rejected = select_pairs(ratios, held_out)
                margins = np.asarray(chosen - rejected)[held_out["pair_mask"] > 0]
                numbers = (
                    float((margins > 0).mean()),
                    float(margins.mean()),
                    float(ratios[held_out["response_mask"] > 0].mean()),
                )
                found.setdefault((name, arm), []).append(numbers)
                print(name, f"bins {arm}", f"seed {seed}", np.round(numbers, 3))
    for (name, arm), numbers in found.items():
        mean, spread = np.mean(numbers, 0), np.std(numbers, 0, ddof=1)
        print(f"{name}, bins {arm}: {mean.round(3)} +- {spread.round(3)}")


if __name__ == "__main__":
    main()
