"""Sequential Monte Carlo against exact enumeration of every string."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.decoding import programs
from jaxalign.decoding.smc import smc
from jaxalign.models import T5, T5Config, init_params

T = 4  # longest string, EOS included
RUNS = 600  # independent runs: prompts that are equal but for their ids
PROMPTS = np.array([[4, 2, 3, 1], [3, 3, 1, 0]], np.int32)


class Strings(NamedTuple):
    """Every string of at most ``T`` tokens that ends in EOS, under each prompt."""

    texts: list[tuple[int, ...]]
    logps: np.ndarray  # [prompts, strings, T], 0 behind EOS


@pytest.fixture(scope="module")
def small():
    model = T5(T5Config(5, 8, 2, 4, 16, 1, 1))
    params = init_params(model, jax.random.key(9))
    return model, jax.tree.map(lambda x: 1.6 * x if x.ndim > 1 else x, params)


def teacher_forced(small, prompt, targets):
    """Log-probabilities ``[n, T]`` of the targets ``[n, T]``, without any cache."""
    logps = _log_softmax(*small, prompt[None], targets[None])[0]
    return np.take_along_axis(np.asarray(logps), targets[..., None], 2)[..., 0]


@functools.partial(jax.jit, static_argnums=0)
def _log_softmax(model, params, prompt, targets):
    inputs = jnp.pad(targets, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    mask = (prompt != 0).astype(jnp.int32)

    def apply(method, *args):
        return model.apply({"params": params}, *args, method=method)

    encoded = apply("encode", prompt, mask)
    states = apply(
        "decode", encoded, mask, inputs, jnp.ones_like(inputs), jnp.ones_like(inputs)
    )
    return jax.nn.log_softmax(apply("logits", states))


@pytest.fixture(scope="module")
def strings(small):
    texts = [
        (*body, 1)
        for length in range(T)
        for body in itertools.product((0, 2, 3, 4), repeat=length)
    ]
    targets = np.array([[*s, *[0] * (T - len(s))] for s in texts], np.int32)
    behind = np.arange(T) >= np.array([len(s) for s in texts])[:, None]
    logps = [teacher_forced(small, prompt, targets) for prompt in PROMPTS]
    return Strings(texts, np.where(behind, 0.0, np.stack(logps)))


def run(small, program, *, runs=RUNS, prompts=PROMPTS[:1], seed=0, **settings):
    model, params = small
    settings = {"num_particles": 4, "expansion": 3, "max_new_tokens": T, **settings}
    batch = np.broadcast_to(prompts, (runs, *prompts.shape))
    key = jax.random.key(seed)
    return jax.device_get(smc(model, params, batch, program, key=key, **settings))


def standard_error(values):
    return values.std(axis=0, ddof=1) / np.sqrt(len(values))


def check(found, texts, log_target):
    """Evidence and posterior mass of every string within sampling error."""
    target = np.exp(log_target)
    evidence = np.exp(found.log_evidence)
    error = max(standard_error(evidence), 2e-5 * target.sum())
    assert abs(evidence.mean() - target.sum()) < 3.5 * error
    index = {text: i for i, text in enumerate(texts)}
    mass = np.zeros((len(evidence), len(texts)))
    weights = np.exp(found.log_weights) / found.log_weights.shape[1]
    for r, n in np.argwhere(weights > 0.0):
        text = tuple(found.tokens[r, n, : found.lengths[r, n]].tolist())
        mass[r, index[text]] += weights[r, n]
    assert not mass[:, target == 0.0].any()
    # Strings seen too seldom have no normal error; together they are one cell.
    seen = (mass > 0.0).sum(axis=0) >= 15
    cells = np.c_[mass[:, seen], mass[:, ~seen].sum(axis=1)]
    wanted = np.r_[target[seen], target[~seen].sum()]
    off = np.abs(cells.mean(axis=0) - wanted)
    assert seen.sum() > 3
    assert (off <= 4.0 * standard_error(cells) + 2e-5 * target.sum()).all()


SETTINGS = {
    "without replacement": {},
    "merged": {"merge": True, "seed": 3},
    "large beam": {"num_particles": 3, "expansion": 9},
    "multinomial": {"resampling": "multinomial", "expansion": 1, "num_particles": 6},
    "stratified": {"resampling": "stratified", "expansion": 2},
    "systematic": {"resampling": "systematic", "expansion": 1, "num_particles": 6},
}


@flax.struct.dataclass
class NoRepeats(programs.Program):
    """No token may follow itself; found out late, by weight alone."""

    def step(self, state, context, token, key):
        last = context.tokens[jnp.maximum(context.position - 1, 0)]
        repeated = (context.position > 0) & (last == token)
        return state, jnp.where(repeated, -jnp.inf, 0.0), False


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if i < 2 else pytest.mark.slow)
        for i, name in enumerate(SETTINGS)
    ],
)
def test_evidence_and_posterior_of_a_late_constraint(small, strings, name):
    allowed = np.array(
        [all(a != b for a, b in itertools.pairwise(s[:-1])) for s in strings.texts]
    )
    logps = strings.logps[0].sum(axis=1)
    found = run(small, NoRepeats(), **SETTINGS[name])
    check(found, strings.texts, np.where(allowed, logps, -np.inf))


@flax.struct.dataclass
class AllowedTokens(programs.Program):
    """A hard constraint on every token, by a proposal that keeps it."""

    allowed: jax.Array

    def proposal(self, state, context):
        kept = jnp.where(self.allowed, context.logps[0], -jnp.inf)
        return programs.only_eos_at_last(kept, context)


def test_hard_constraint(small, strings):
    allowed = np.array([1, 2, 4])
    inside = np.array([set(s) <= set(allowed.tolist()) for s in strings.texts])
    logps = strings.logps[0].sum(axis=1)
    program = AllowedTokens(jnp.zeros(5, bool).at[allowed].set(True))
    check(run(small, program), strings.texts, np.where(inside, logps, -np.inf))


def test_infilling(small, strings):
    # One or two tokens, then a 3, then the end; each further token costs a coin.
    logps = strings.logps[0].sum(axis=1)
    fits = np.array([len(s) in (3, 4) and s[-2] == 3 for s in strings.texts])
    coins = np.array([len(s) - 2 for s in strings.texts]) * np.log(0.5)
    found = run(small, programs.infilling([None, [3]]))
    check(found, strings.texts, np.where(fits, logps + coins, -np.inf))


def test_prompt_intersection(small, strings):
    logps = strings.logps.sum(axis=2).sum(axis=0)
    found = run(small, programs.PromptIntersection(2), prompts=PROMPTS)
    check(found, strings.texts, logps)
    # The model's own log-probability is that of the first prompt.
    index = {text: i for i, text in enumerate(strings.texts)}
    for r, n in np.argwhere(found.ended)[:50]:
        i = index[tuple(found.tokens[r, n, : found.lengths[r, n]].tolist())]
        assert abs(found.logps[r, n] - strings.logps[0, i].sum()) < 1e-4


def threes(tokens, length, done, prompt_id):
    return 0.8 * jnp.sum(tokens == 3)


class Digits:
    def decode(self, ids):
        return "".join(map(str, ids))


@pytest.mark.parametrize("in_python", [False, True])
def test_rewards_and_products(small, strings, in_python):
    def judge(texts, prompt_ids):
        assert all(0 <= i < RUNS for i in prompt_ids)
        return [0.8 * text.count("3") for text in texts]

    function = programs.text_function(judge, Digits()) if in_python else threes
    program = programs.Product(
        (
            programs.Potential(function),
            AllowedTokens(jnp.array([False, True, True, True, False])),
        )
    )
    reward = np.array([0.8 * s.count(3) for s in strings.texts])
    inside = np.array([set(s) <= {1, 2, 3} for s in strings.texts])
    logps = strings.logps[0].sum(axis=1)
    found = run(small, program)
    check(found, strings.texts, np.where(inside, logps + reward, -np.inf))


def test_one_step_with_its_best_proposal_has_no_variance(small, strings):
    found = run(small, programs.Program(), runs=64, max_new_tokens=1)
    np.testing.assert_allclose(
        found.log_evidence, strings.logps[0][strings.texts.index((1,))][0], atol=1e-5
    )
    assert found.ended.all() and (found.tokens == 1).all()


@flax.struct.dataclass
class Uneven(programs.Program):
    """A twist: what it adds at one step it takes back at the next."""

    def init(self):
        return jnp.float32(0.0)

    def step(self, state, context, token, key):
        tokens = context.tokens.at[context.position].set(token)
        sum_ = jnp.sum(tokens * jnp.arange(1, 13)).astype(jnp.float32)
        value = 3.0 * jnp.sin(sum_)
        return value, value - state, False


def test_caches_follow_their_ancestors(small):
    """Cached log-probabilities equal those of a pass without cache, after gathers."""
    found = run(small, Uneven(), runs=16, max_new_tokens=12, num_particles=8)
    moved = found.ancestors != np.arange(8)
    assert moved[found.ess > 0.0].sum() > 100
    tokens, lengths = found.tokens.reshape(-1, 12), found.lengths.reshape(-1)
    logps = teacher_forced(small, PROMPTS[0], tokens)
    logps = np.where(np.arange(12) < lengths[:, None], logps, 0.0).sum(axis=1)
    alive = found.ended.reshape(-1)
    assert alive.sum() > 50
    np.testing.assert_allclose(found.logps.reshape(-1)[alive], logps[alive], atol=1e-4)


def test_a_run_depends_on_its_id_and_not_on_its_neighbours(small):
    model, params = small
    key = jax.random.key(1)

    def of(prompts, ids):
        settings = {"num_particles": 4, "expansion": 2, "max_new_tokens": 6}
        found = smc(
            model, params, prompts, NoRepeats(), key=key, prompt_ids=ids, **settings
        )
        return np.asarray(found.tokens), np.asarray(found.log_evidence)

    alone, evidence = of(PROMPTS[1:], [7])
    beside, evidences = of(PROMPTS, [3, 7])
    np.testing.assert_array_equal(alone[0], beside[1])
    np.testing.assert_allclose(evidence[0], evidences[1], rtol=1e-5)


# What goes wrong elsewhere.


@flax.struct.dataclass
class Unreachable(programs.Program):
    """Excludes every token from some position on, for particles that are there."""

    at: jax.Array

    def proposal(self, state, context):
        blocked = context.position >= self.at
        return jnp.where(blocked, -jnp.inf, context.logps[0])


def test_a_mask_that_excludes_every_token_kills_and_does_not_raise(small, strings):
    # Strings that end at once are all that survives; dead particles stay dead.
    found = run(small, Unreachable(jnp.int32(1)), runs=200)
    logps = strings.logps[0].sum(axis=1)
    short = np.array([len(s) == 1 for s in strings.texts])
    evidence = np.exp(found.log_evidence)
    error = standard_error(evidence)
    assert abs(evidence.mean() - np.exp(logps[short]).sum()) < 3.5 * error
    assert not found.ended[found.log_weights == -np.inf].any()


def test_when_all_are_dead_the_evidence_is_zero_and_nothing_is_nan(small):
    for scheme in ("fearnhead_clifford", "systematic"):
        found = run(
            small, Unreachable(jnp.int32(0)), runs=3, resampling=scheme, expansion=2
        )
        assert (found.log_evidence == -np.inf).all()
        assert not any(np.isnan(x).any() for x in jax.tree.leaves(found))
        assert not found.ended.any() and not found.ess.any()


@flax.struct.dataclass
class Broken(programs.Program):
    value: jax.Array

    def step(self, state, context, token, key):
        return state, jnp.where(token == 2, self.value, 0.0), False


@pytest.mark.parametrize(
    "value", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)]
)
def test_weights_that_are_no_numbers_count_as_dead(small, strings, value):
    found = run(small, Broken(jnp.float32(value)))
    fine = np.array([2 not in s for s in strings.texts])
    logps = strings.logps[0].sum(axis=1)
    check(found, strings.texts, np.where(fine, logps, -np.inf))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expansion": 1}, "needs expansion >= 2"),
        ({"resampling": "residual"}, "resampling must be one of"),
        ({"num_particles": 0}, "num_particles must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"prompts": PROMPTS}, "Program reads 1 prompts, got 2"),
    ],
)
def test_bad_settings_are_named(small, settings, message):
    with pytest.raises(ValueError, match=message):
        run(small, programs.Program(), runs=1, **settings)


def test_eight_devices_give_the_particles_of_one(small):
    """Prompts over the data axis, parameters on every device."""
    model, params = small
    prompts = np.repeat(PROMPTS[:1], 16, axis=0)
    settings = {
        "key": jax.random.key(5),
        "num_particles": 4,
        "expansion": 3,
        "max_new_tokens": T,
    }
    program = programs.Potential(lambda tokens, length, done, prompt_id: 0.3 * length)
    one = smc(model, params, prompts, program, **settings)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.device_put(prompts, rows)
    eight = smc(model, jax.device_put(params, everywhere), placed, program, **settings)
    np.testing.assert_array_equal(eight.tokens, one.tokens)
    np.testing.assert_allclose(eight.log_weights, one.log_weights, rtol=1e-5, atol=1e-5)
    assert len(eight.tokens.sharding.device_set) == 8
