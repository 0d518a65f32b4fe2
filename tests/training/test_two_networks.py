"""An objective of two networks that the library does not know, through all of it.

A Bradley-Terry reward model, kept near a frozen copy of the encoder that it started
from, on pairs that weigh as much as a column of the data says.
"""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from jaxalign import batch as batches
from jaxalign import judges, models
from jaxalign.models.layers import Embed
from jaxalign.models.stacks import Encoder
from jaxalign.objectives.base import LossOutput, Objective, Step
from jaxalign.objectives.metrics import Mean
from jaxalign.training import checkpoints, run_directory, scoring
from jaxalign.training import train as loop
from jaxalign.training.checkpoint_writer import Checkpoints

batches.add_column("pair_strength", "BQ", optional=True, empty=1.0)


@models.register
class EncoderStates(nn.Module):
    """The encoder's states ``[B, Le, E]``, named as in `models.T5`."""

    config: models.T5Config

    def setup(self):
        self.token_embedder = Embed(self.config)
        self.encoder = Encoder(self.config)

    def __call__(self, batch):
        tokens = self.token_embedder(batch["encoder_input_tokens"])
        return self.encoder(tokens, batch["encoder_segment_ids"], True)


@dataclasses.dataclass(frozen=True)
class AnchoredBradleyTerry(Objective):
    """``-log sigmoid(r_w - r_l)``, and the distance from the encoder at the start."""

    weight: float = 0.1

    schema: ClassVar[str] = "preference"
    columns: ClassVar[tuple[str, ...]] = ("pair_strength",)
    main: ClassVar[str] = "reward"
    frozen: ClassVar[tuple[str, ...]] = ("anchor",)

    def networks(self):
        config = self.model.config
        reward = models.ScalarModel(config=config)
        return {"reward": reward, "anchor": EncoderStates(config)}

    def start(self, fresh, loaded):
        made = super().start(fresh, loaded)
        return {**made, "anchor": models.graft(made["anchor"], made["reward"])}

    def loss(self, params, step):
        batch, nets = step.batch, self.networks()
        rewards = nets["reward"].apply({"params": params["reward"]}, batch)
        chosen, rejected = batches.select_pairs(rewards, batch)
        mask = batch["pair_mask"] * batch["pair_strength"]
        losses = jax.nn.softplus(rejected - chosen)
        own = {name: params["reward"][name] for name in params["anchor"]}
        here, there = (
            nets["anchor"].apply({"params": p}, batch) for p in (own, params["anchor"])
        )
        moved = jnp.sum(jnp.square(here - there), -1) * batch["encoder_segment_ids"]
        sums = {
            "pairs": jnp.sum(losses * mask),
            "prompts": self.weight * jnp.sum(moved),
        }
        metrics = {
            "loss": Mean.of(losses, mask),
            "rewards/accuracies": Mean.of(chosen > rejected, batch["pair_mask"]),
            "moved": Mean(jnp.sum(moved), jnp.sum(batch["prompt_mask"])),
        }
        return LossOutput(sums, metrics)


def job(folder, name, **changes):
    data = folder / "data.jsonl"
    if not data.exists():
        tiny_run.write_data(data)
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        for i, row in enumerate(rows):
            row["strength"] = i % 2  # of every other pair nothing is learned
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"field_map": {"pair_strength": "strength"}}
    settings = {"dataset": dataset, "train_steps": 4, **changes}
    run = tiny_run.make_run(folder / name, data, folder / "cache", "SFT", **settings)
    return dataclasses.replace(run, objective=AnchoredBradleyTerry)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a whole run of four steps."""
    folder = tmp_path_factory.mktemp("two")
    loop.train(job(folder, "whole"))
    return folder


def prints(folder):
    return run_directory.read_manifest(folder)["networks"]


def test_both_networks_are_in_the_checkpoint_and_one_of_them_rests(work):
    run = work / "whole"
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [x for x in lines if "train/loss" in x]
    assert trained[0]["train/moved"] == 0.0 < trained[-1]["train/moved"]
    assert trained[-1]["train/loss"] < trained[0]["train/loss"]
    reward = checkpoints.load(run, "reward")
    anchor = checkpoints.load(run, "anchor")
    assert isinstance(reward.model, models.ScalarModel)
    assert isinstance(anchor.model, EncoderStates)
    begun = checkpoints.load(run / "checkpoints" / "2", "anchor").params
    jax.tree.map(np.testing.assert_array_equal, anchor.params, begun)
    assert prints(run) == {"reward": reward.fingerprint, "anchor": anchor.fingerprint}
    with pytest.raises(ValueError, match=r"no network 'policy'.*the main one is 'rew"):
        checkpoints.load(run)


def test_what_the_column_says_weighs_nothing_teaches_nothing(work):
    """Rows of weight 0 may say anything."""
    batch = loop.setup(job(work, "whole")).inputs.train.batch(0)
    real = batch["pair_mask"] > 0
    assert {*batch["pair_strength"][real].tolist()} == {0.0, 1.0}
    objective = AnchoredBradleyTerry(models.T5(tiny_run.CONFIG))
    params = objective.init_params(jax.random.key(0))
    gradient = jax.jit(
        jax.grad(lambda p, b: objective.loss(p, Step(b)).sums["pairs"]),
    )
    told = gradient(params, batch)
    idle = batch["pair_strength"] == 0
    swapped = {
        **batch,
        "pair_chosen": np.where(idle, batch["pair_rejected"], batch["pair_chosen"]),
        "pair_rejected": np.where(idle, batch["pair_chosen"], batch["pair_rejected"]),
    }
    jax.tree.map(np.testing.assert_array_equal, gradient(params, swapped), told)


def test_it_goes_on_to_the_bit(work):
    loop.train(job(work, "twice", train_steps=2))
    loop.train(job(work, "twice"))
    assert prints(work / "twice") == prints(work / "whole")


@pytest.mark.parametrize(
    "mesh", [{"data": 4, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_it_restores_on_other_meshes_of_eight_devices(work, mesh):
    ready = loop.setup(job(work, "whole", mesh=mesh))
    with Checkpoints(work / "whole") as found:
        state, meta = found.restore(ready.abstract_state)
        found.close()
    kernel = state.params["reward"]["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
    assert len(kernel.sharding.device_set) == 8 and kernel.sharding.spec != ()
    for name, params in state.networks.items():
        assert checkpoints.params_fingerprint(params) == prints(work / "whole")[name]
    assert meta["step"] == 4


def test_it_is_scored_by_the_one_pass_and_is_a_judge(work):
    prompts = ["say 1", "say 2", "say 3"]
    responses = ["it is 1", "no", "a longer answer than others"]
    reward = checkpoints.load(work / "whole", "reward")

    def rewards(params, batch):
        return reward.model.apply({"params": params}, batch)

    scored = scoring.score_texts(
        rewards, reward.params, reward.vocabulary, prompts, responses, verify=1.0
    )
    judge = judges.resolve(f"reward:{work / 'whole'}")
    np.testing.assert_array_equal(judge(prompts, responses), scored)
    alone = [judge([p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
    np.testing.assert_allclose(scored, alone, rtol=1e-4, atol=1e-5)
    assert len({*scored.tolist()}) == 3


@pytest.mark.slow  # four runs
def test_a_reward_model_starts_from_a_policy_and_its_anchor_is_read_there(work):
    data, cache = work / "data.jsonl", work / "cache"
    sft = tiny_run.make_run(work / "sft", data, cache, "SFT", train_steps=2)
    loop.train(sft)
    start = {"initial_checkpoint_path": str(work / "sft")}
    loop.train(job(work, "from", train_steps=2, **start))
    loop.train(job(work, "from", **start))
    loop.train(job(work, "from_whole", **start))
    assert prints(work / "from") == prints(work / "from_whole")
    policy = checkpoints.load(work / "sft").params
    ready = loop.setup(job(work, "x", **start))
    state = loop.starts.start(ready, jax.random.key(0))
    for name in ("encoder", "token_embedder"):
        for network in ("reward", "anchor"):
            found = state.networks[network][name]
            jax.tree.map(np.testing.assert_array_equal, found, policy[name])
    folder = work / "from" / "checkpoints" / "4"
    assert (folder / "reward").is_dir() and not (folder / "anchor").exists()
    with pytest.raises(ValueError, match=r"no step changed, made from .*sft, which"):
        checkpoints.load(work / "from", "anchor")


def test_names_and_parts_that_cannot_be_are_refused(work):
    with pytest.raises(ValueError, match="NETWORKS has 'ancor'.*Did you mean 'anchor'"):
        loop.setup(job(work, "x", networks={"ancor": "somewhere"}))

    @dataclasses.dataclass(frozen=True)
    class Contrastive(AnchoredBradleyTerry):
        additive: ClassVar[bool] = False

    run = dataclasses.replace(job(work, "x", num_microbatches=2), objective=Contrastive)
    with pytest.raises(ValueError, match="Contrastive compares all rows.*MICROBATCHES"):
        loop.setup(run)
