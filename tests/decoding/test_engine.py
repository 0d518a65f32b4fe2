"""The engine: same samples whatever the batching; cancellation; limits; constraints."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.decoding import Engine, Sampling, generate, sample

LENGTH, NEW, SAMPLES = 9, 10, 4
RULES = Sampling(temperature=0.9, top_k=20, top_p=0.97)


def _prompts(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    sizes = rng.integers(1, LENGTH + 1, count)
    return [np.append(rng.integers(2, 24, n - 1), 1).astype(np.int32) for n in sizes]


def _engine(model, params, **changes) -> Engine:
    settings = {
        "prompt_length": LENGTH,
        "max_new_tokens": NEW,
        "num_samples": SAMPLES,
        "groups": 7,
        "sampling": RULES,
    }
    return Engine(model, params, **(settings | changes))


def _drain(engine: Engine, **arguments) -> dict:
    done = {}
    while engine.pending:
        for finished in engine.step(**arguments):
            assert finished.ticket not in done
            done[finished.ticket] = finished
    return done


@pytest.fixture(scope="module")
def expected(tiny):
    """What one call without refill gives."""
    prompts = _prompts(64)
    padded = np.zeros((64, LENGTH), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    return prompts, jax.device_get(
        generate(
            *tiny,
            padded,
            key=jax.random.key(3),
            prompt_ids=np.arange(64),
            num_samples=SAMPLES,
            max_new_tokens=NEW,
            sampling=RULES,
        )
    )


def _sharding():
    mesh = jax.make_mesh(
        (jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    return NamedSharding(mesh, PartitionSpec("data"))


@pytest.mark.parametrize(
    "changes, max_steps, count",
    [
        ({"groups": 1}, None, 9),
        ({"groups": 7, "slots": 2, "admit": 2}, None, 64),
        ({"groups": 7, "admit": 7}, 3, 23),  # waits for the longest
        ({"groups": 64, "slots": 3}, None, 64),
        ({"groups": 16, "slots": 2, "sharding": True}, 5, 40),
    ],
    ids=["one", "refill", "no-refill", "all", "8-devices"],
)
def test_samples_do_not_depend_on_batching(tiny, expected, changes, max_steps, count):
    prompts, want = expected
    if "sharding" in changes:
        changes = changes | {"sharding": _sharding()}
    engine = _engine(*tiny, **changes)
    tickets = {engine.submit(prompts[i], prompt_id=i, seed=3): i for i in range(count)}
    done = _drain(engine, max_steps=max_steps)
    assert set(done) == set(tickets)
    for ticket, finished in done.items():
        i = tickets[ticket]
        assert finished.prompt_id == i and len(finished.tokens) == SAMPLES
        for n in range(SAMPLES):
            length = want.lengths[i, n]
            np.testing.assert_array_equal(
                finished.tokens[n], want.tokens[i, n, :length]
            )
            for name in ("logps", "sampler_logps"):
                np.testing.assert_allclose(
                    getattr(finished, name)[n],
                    getattr(want, name)[i, n, :length],
                    atol=1e-4,
                )


def test_keys_are_folded_from_seed_prompt_and_sample(tiny, expected):
    # By hand: the first token of sample 2 of prompt 5.
    prompts, want = expected
    model, params = tiny
    key = jax.random.key(3)
    for number in (5, 2, 0):  # prompt, sample, position
        key = jax.random.fold_in(key, number)
    tokens = prompts[5][None]

    def first_logits(module):
        mask = np.ones_like(tokens)
        cross = module.cross_key_values(module.encode(tokens, mask))
        cache = model.init_self_cache(1, 1, 1)
        return module.decode_step(np.zeros((1, 1), int), 0, cache, cross, mask)[0]

    forward = jax.jit(lambda p: model.apply({"params": p}, method=first_logits))
    logits = forward(params)[0, 0]
    assert sample(logits, key, RULES).tokens == want.tokens[5, 2, 0]


def test_own_limits_late_arrivals_and_cancellation(tiny, expected):
    prompts, want = expected
    engine = _engine(*tiny, slots=2, admit=2)
    first = [engine.submit(prompts[i], prompt_id=i, seed=3) for i in range(20)]
    short = engine.submit(
        prompts[20], prompt_id=20, seed=3, num_samples=3, max_new_tokens=2
    )
    assert engine.pending == 21
    done = {f.ticket: f for f in engine.step(max_steps=2)}
    assert engine.cancel(first[19])  # waits
    seated = next(t for t in first if t not in done)
    assert engine.cancel(seated)  # at work
    assert not engine.cancel(seated) and not engine.cancel(10_000)
    late = engine.submit(prompts[30], prompt_id=30, seed=3)
    done |= _drain(engine)
    assert engine.pending == 0 and engine.step() == []
    assert set(done) == {*first, short, late} - {first[19], seated}
    assert [len(t) for t in done[short].tokens] == [
        min(2, n) for n in want.lengths[20, :3]
    ]
    for n in range(SAMPLES):
        np.testing.assert_array_equal(
            done[late].tokens[n], want.tokens[30, n, : want.lengths[30, n]]
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Alternating:
    """Tokens at even places from one set, at odd places from another."""

    tables: jax.Array  # bool [2, V]

    def start(self):
        return jnp.int32(0)

    def allowed(self, state, remaining):
        return self.tables[state]

    def advance(self, state, tokens):
        return 1 - state


def test_constraints_prefixes_stops_and_entropies(tiny):
    model, params = tiny
    tables = np.zeros((2, 24), bool)
    tables[0, 2:12], tables[1, 12:] = True, True
    engine = _engine(
        *tiny,
        slots=2,
        sampling=Sampling(stop_sequences=[[5], [20]]),
        constraint=Alternating(jnp.asarray(tables)),
        prefixes=True,
        entropy=True,
    )
    forced = [[], [4, 13, 5], [6], []]
    prompts = _prompts(9)
    for i, prompt in enumerate(prompts):
        engine.submit(prompt, prompt_id=i, prefixes=forced)
    stopped = 0
    for finished in _drain(engine).values():
        for tokens, own, logps, entropies, prefix in zip(
            finished.tokens,
            finished.sampler_logps,
            finished.logps,
            finished.entropies,
            forced,
            strict=True,
        ):
            np.testing.assert_array_equal(tokens[: len(prefix)], prefix)
            np.testing.assert_array_equal(own[: len(prefix)], 0.0)
            assert (own[len(prefix) :] < 0).all() and (logps < 0).all()
            assert ((tokens < 12) == (np.arange(len(tokens)) % 2 == 0)).all()
            assert ((0 < entropies) & (entropies < np.log(24))).all()
            ends = np.isin(tokens, [5, 20])
            ends[: len(prefix)] = False  # what is forced ends nothing
            assert not ends[:-1].any() and (ends[-1] or len(tokens) == NEW)
            stopped += ends[-1]
    assert stopped > 0


def test_submissions_that_do_not_fit_are_refused(tiny):
    engine = _engine(*tiny)
    for arguments, message in [
        ({"tokens": [5] * 10}, "1 to 9 tokens"),
        ({"tokens": []}, "1 to 9 tokens"),
        ({"tokens": [5, 0, 1]}, "ids below 1"),
        ({"num_samples": 5}, r"num_samples must lie in \[1, 4\], got 5"),
        ({"max_new_tokens": 11}, r"max_new_tokens must lie in \[1, 10\]"),
        ({"seed": -1}, r"seed must lie in \[0, 2\*\*32\), got -1"),
        ({"prefixes": [[2]]}, "an Engine made with prefixes=True"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit(**({"tokens": [5, 1], "prompt_id": 0} | arguments))
    with pytest.raises(ValueError, match="groups must be at least 1"):
        _engine(*tiny, groups=0)
    with pytest.raises(ValueError, match="groups=6 .* do not divide"):
        _engine(*tiny, groups=6, sharding=_sharding())
    engine = _engine(*tiny, prefixes=True)
    for prefixes, message in [
        ([[2] * 11], "has 11 tokens; max_new_tokens is 10"),
        ([[2, 1]], "holds EOS"),
        ([[2]] * 5, "has 5 rows for 4 samples"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit([5, 1], prompt_id=0, prefixes=prefixes)


def test_settings_of_a_prompt_are_those_of_an_engine_of_its_own(tiny):
    """Temperature and top-p as data give what they give when compiled in."""
    prompts = _prompts(3)
    settings = [(1.0, 1.0), (0.7, 0.9), (0.0, 1.0)]
    shared = _engine(*tiny, sampling=Sampling(min_p=0.01), per_prompt=True)
    tickets = {
        shared.submit(prompt, prompt_id=i, temperature=t, top_p=p): i
        for i, (prompt, (t, p)) in enumerate(zip(prompts, settings, strict=True))
    }
    for ticket, found in _drain(shared).items():
        i = tickets[ticket]
        temperature, top_p = settings[i]
        rules = Sampling(temperature, top_p=top_p, min_p=0.01)
        alone = _engine(*tiny, sampling=rules)
        alone.submit(prompts[i], prompt_id=i)
        (own,) = _drain(alone).values()
        for a, b in zip(found.tokens, own.tokens, strict=True):
            np.testing.assert_array_equal(a, b)
        for name in ("logps", "sampler_logps"):
            for a, b in zip(getattr(found, name), getattr(own, name), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_settings_of_a_prompt_are_checked(tiny):
    with pytest.raises(ValueError, match="per_prompt=True"):
        _engine(*tiny).submit([5, 1], prompt_id=0, temperature=0.5)
    with pytest.raises(ValueError, match="top_p must lie"):
        _engine(*tiny, per_prompt=True).submit([5, 1], prompt_id=0, top_p=1.5)


def test_progress_is_a_prefix_of_the_end(tiny):
    engine = _engine(*tiny, groups=2)
    tickets = [engine.submit(p, prompt_id=i) for i, p in enumerate(_prompts(3))]
    seen, done = {}, {}
    while engine.pending:
        for finished in engine.step(max_steps=2):
            done[finished.ticket] = finished.tokens
        seen |= engine.progress()
    assert set(seen) <= set(tickets) == set(done) and seen
    for ticket, samples in seen.items():
        for part, whole in zip(samples, done[ticket], strict=True):
            assert 0 < len(part) <= len(whole)
            np.testing.assert_array_equal(part, whole[: len(part)])
