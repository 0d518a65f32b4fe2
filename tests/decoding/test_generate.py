"""The decode loop against Hugging Face, teacher forcing and known distributions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from hugging_face import torch_model
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign import batch as batch_lib
from jaxalign.decoding import Sampling, generate
from jaxalign.decoding.generate import _generate
from jaxalign.decoding.groups import Plan
from jaxalign.models import T5, init_params, response_logps, token_logps

GREEDY = Sampling(temperature=0.0)
# One setting and one shape for most tests: each other one is another compilation.
SETTING = Sampling(temperature=0.9, top_k=20, top_p=0.97)


def _prompts(rows: int, length: int = 9) -> np.ndarray:
    """Ragged, right-padded prompts that end in EOS."""
    rng = np.random.default_rng(rows)
    tokens = rng.integers(2, 24, (rows, length)).astype(np.int32)
    for row, size in enumerate(rng.integers(1, length + 1, rows)):
        tokens[row, size - 1] = 1
        tokens[row, size:] = 0
    return tokens


def _run(
    model, params, prompts, sampling=SETTING, *, ids=None, samples=4, seed=0, new=10
):
    return jax.device_get(
        generate(
            model,
            params,
            prompts,
            key=jax.random.key(seed),
            prompt_ids=np.arange(len(prompts)) if ids is None else ids,
            num_samples=samples,
            max_new_tokens=new,
            sampling=sampling,
        )
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "mlp_activations": ("relu",),
            "logits_via_embedding": True,
            "scan_layers": True,
        },
    ],
    ids=["1.1", "1.0-scanned"],
)
def test_greedy_equals_hugging_face(tiny, changes):
    model = T5(dataclasses.replace(tiny[0].config, **changes))
    params = init_params(model, jax.random.key(3))
    params = jax.tree.map(lambda x: 2.0 * x if x.ndim > 1 else x, params)
    theirs = torch_model(model, params)
    prompts = _prompts(8)
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(prompts, dtype=torch.long),
            attention_mask=torch.tensor(prompts != 0, dtype=torch.long),
            max_new_tokens=10,
            do_sample=False,
        ).numpy()[:, 1:]
    expected = np.pad(expected, ((0, 0), (0, 10 - expected.shape[1])))
    found = _run(model, params, prompts, GREEDY, samples=1)
    np.testing.assert_array_equal(found.tokens[:, 0], expected)
    # The responses differ, and end at different lengths.
    assert len(np.unique(found.tokens[:, 0], axis=0)) > 2
    assert len(np.unique(found.lengths)) > 1


def test_masks_end_at_the_first_eos_inclusive(tiny):
    found = _run(*tiny, _prompts(8))
    ended = 0
    for tokens, logps, length in zip(
        found.tokens.reshape(-1, 10),
        found.logps.reshape(-1, 10),
        found.lengths.ravel(),
        strict=True,
    ):
        eos = np.flatnonzero(tokens == 1)
        assert length == (eos[0] + 1 if eos.size else 10)
        assert (tokens[length:] == 0).all() and (logps[length:] == 0.0).all()
        assert (logps[:length] < 0.0).all()
        ended += eos.size
    assert 0 < ended < 32
    # Padding's id may be sampled; it counts as a token like any other.
    inside = np.arange(10) < found.lengths[..., None]
    assert ((found.tokens == 0) & inside).any()


def test_log_probabilities_equal_teacher_forcing(tiny):
    model, params = tiny
    prompts, n = _prompts(8), 4
    found = _run(model, params, prompts)
    inside = np.arange(10) < found.lengths[..., None]
    rows = len(prompts)
    number = np.broadcast_to(np.arange(1, n + 1)[None, :, None], inside.shape)
    shifted = np.pad(found.tokens, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    batch = {
        "encoder_input_tokens": prompts,
        "encoder_segment_ids": (prompts != 0).astype(np.int32),
        "decoder_input_tokens": shifted * inside,
        "decoder_target_tokens": found.tokens,
        "decoder_loss_weights": inside.astype(np.float32),
        "decoder_segment_ids": (number * inside).astype(np.int32),
        "response_mask": np.ones((rows, n), np.float32),
        "response_prompt": np.zeros((rows, n), np.int32),
    }
    batch = {name: np.ascontiguousarray(v) for name, v in batch.items()}
    batch_lib.check(batch)
    np.testing.assert_allclose(
        found.logps, token_logps(model, params, batch) * inside, atol=1e-4
    )
    np.testing.assert_allclose(
        found.logps.sum(-1), response_logps(model, params, batch), atol=1e-4
    )
    # The sampler's own distribution is another one.
    assert np.abs(found.logps - found.sampler_logps).max() > 0.1


def test_samples_do_not_depend_on_batch_or_neighbours(tiny):
    prompts, ids = _prompts(8), np.array([5, 2**32 - 1, 9, 0, 3, 70_000, 8, 6])
    whole = _run(*tiny, prompts, ids=ids)
    for size in (1, 3):
        for start in range(0, 8 - size + 1, size):
            rows = slice(start, start + size)
            part = _run(*tiny, prompts[rows], ids=ids[rows])
            np.testing.assert_array_equal(part.tokens, whole.tokens[rows])
            np.testing.assert_allclose(part.logps, whole.logps[rows], atol=1e-5)
    # Nor on the padded length, on how many samples are drawn, or on the cache's size.
    padded = np.pad(prompts[:7], ((0, 0), (0, 7)))
    other = _run(*tiny, padded, ids=ids[:7], samples=2, new=7)
    np.testing.assert_array_equal(other.tokens, whole.tokens[:7, :2, :7])
    # But on the seed, the sample index and the prompt's id.
    reseeded = _run(*tiny, prompts, ids=ids, seed=1)
    assert (reseeded.tokens != whole.tokens).any()
    renamed = _run(*tiny, prompts, ids=(ids + 1) % 2**32)
    assert (renamed.tokens != whole.tokens).any()
    assert len(np.unique(whole.tokens[0], axis=0)) > 1


def test_rows_without_a_prompt_are_empty(tiny):
    prompts = _prompts(8)
    prompts[2] = 0
    found = _run(*tiny, prompts)
    np.testing.assert_array_equal(found.lengths[2], 0)
    np.testing.assert_array_equal(found.tokens[2], 0)
    assert (np.delete(found.lengths, 2, axis=0) > 0).all()


@dataclasses.dataclass(frozen=True)
class Chain:
    """A Markov chain behind the decoding protocol; token ids are its states."""

    table: tuple[tuple[float, ...], ...]
    steps: list = dataclasses.field(default_factory=list, hash=False, compare=False)

    def apply(self, variables, *args, method):
        return getattr(self, method)(*args)

    def encode(self, tokens, segment_ids):
        return tokens

    def cross_key_values(self, encoded):
        return ()

    def init_self_cache(self, batch, n, length):
        return ()

    def decode_step(self, tokens, position, cache, cross, mask, cursor):
        jax.debug.callback(lambda t: self.steps.append(int(t)), cursor)
        return jnp.log(jnp.array(self.table, jnp.float32))[tokens], cache


def test_joint_frequencies_of_whole_responses():
    table = np.array(
        [[0.0, 0.1, 0.3, 0.6], [0.25] * 4, [0.1, 0.4, 0.2, 0.3], [0.0, 0.2, 0.7, 0.1]]
    )
    chain, n = Chain(tuple(map(tuple, table))), 20_000
    found = _run(chain, {}, np.full((1, 2), 3, np.int32), Sampling(), samples=n, new=3)
    expected = {}
    for a in range(4):
        for b in range(4):
            for c in range(4):
                steps = [(0, a), (a, b), (b, c)]
                response = (a, b, c)
                if 1 in response:  # what follows EOS is never drawn
                    end = response.index(1) + 1
                    response = response[:end] + (0,) * (3 - end)
                    steps = steps[:end]
                expected[response] = np.prod([table[s] for s in steps])
    expected = {r: p for r, p in expected.items() if p > 0}
    assert abs(sum(expected.values()) - 1.0) < 1e-12
    drawn, counts = np.unique(found.tokens[0], axis=0, return_counts=True)
    observed = dict(zip(map(tuple, drawn.tolist()), counts, strict=True))
    assert set(observed) <= set(expected)
    statistic = scipy.stats.chisquare(
        [observed.get(r, 0) for r in expected], [n * p for p in expected.values()]
    )
    assert statistic.pvalue > 1e-3


def test_the_loop_stops_when_all_rows_have_ended():
    certain = np.eye(4)[[2, 0, 3, 1]]  # 0 -> 2 -> 3 -> EOS
    chain = Chain(tuple(map(tuple, certain)))
    prompts = np.array([[3, 1], [0, 0]], np.int32)
    found = _run(chain, {}, prompts, GREEDY, samples=2, new=50)
    jax.effects_barrier()
    np.testing.assert_array_equal(found.lengths, [[3, 3], [0, 0]])
    assert sorted(set(chain.steps)) == [0, 1, 2]


def test_cross_attention_memory_does_not_grow_with_samples(tiny):
    model, params = tiny
    length, cfg = 4096, tiny[0].config

    def temporary_bytes(n):
        lowered = _generate.lower(
            Plan(model, GREEDY, n, n, 2, False),
            params,
            jnp.ones((1, length), jnp.int32),
            jax.random.key(0),
            jnp.zeros(1, jnp.uint32),
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    a_copy = 2 * length * cfg.num_heads * cfg.head_dim * 4
    scores = length * cfg.num_heads * 4  # and the softmax over them
    growth = (temporary_bytes(18) - temporary_bytes(2)) / 16
    assert growth < min(4 * scores, a_copy)


def test_sharded_parameters_and_prompts_give_the_same_tokens(tiny):
    model, params = tiny
    devices = jax.device_count()
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )

    def shard(x):
        axis = next((i for i, n in enumerate(x.shape) if n % devices == 0), None)
        spec = [None] * x.ndim
        if axis is not None:
            spec[axis] = "data"
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    prompts = _prompts(8)
    expected = _run(model, params, prompts)
    placed = jax.device_put(prompts, NamedSharding(mesh, PartitionSpec("data")))
    found = _run(model, jax.tree.map(shard, params), placed)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logps, expected.logps, atol=1e-5)


def test_wrong_arguments_are_refused(tiny):
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        _run(*tiny, _prompts(2), GREEDY, samples=0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        _run(*tiny, _prompts(2), GREEDY, new=0)
    left = np.array([[5, 6, 1], [0, 5, 1]], np.int32)
    with pytest.raises(ValueError, match="row 1 has padding .* right padding"):
        _run(*tiny, left, GREEDY)
