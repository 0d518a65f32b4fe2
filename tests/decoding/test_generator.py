"""Batching prompts of any length: order, buckets, truncation, compilations."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.decoding import Generator, Sampling, generate, seats
from jaxalign.decoding.generator import prompt_bucket


class Letters:
    """Ids 2..23 are letters."""

    vocab_size, eos_id = 24, 1

    def decode(self, ids):
        return "".join(chr(ord("a") + i - 2) for i in ids if i > 1)


def _prompts(lengths):
    rng = np.random.default_rng(0)
    return [np.append(rng.integers(2, 24, n - 1), 1).astype(np.int32) for n in lengths]


def _generator(model, **changes):
    arguments = {
        "max_prompt_length": 32,
        "max_new_tokens": 6,
        "num_samples": 2,
        "batch_size": 4,
    }
    return Generator(model, Letters(), **(arguments | changes))


# Over a window of 128 prompts too, so that results of several windows are in order.
LENGTHS = [3, 20, 1, 40, 9, 16, 17, 2, 5, 31, 32, 33, 7] * 11


def test_results_come_in_order_and_equal_single_calls(tiny, capsys):
    model, params = tiny
    prompts = _prompts(LENGTHS)
    generator = _generator(model, seed=5)
    compiled = (seats.empty, seats.admit, seats.run)
    before = [function._cache_size() for function in compiled]
    found = list(generator(params, prompts))
    # Two lengths (16 and 32) and one batch size, whatever the prompts.
    after = [function._cache_size() for function in compiled]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 2, 2]
    list(generator(jax.tree.map(lambda x: x * 1.1, params), prompts[::-1]))
    assert [function._cache_size() for function in compiled] == after
    assert capsys.readouterr().err == ""  # a bar belongs on a terminal

    assert [g.prompt_id for g in found] == list(range(len(prompts)))
    assert [g.truncated for g in found] == [n > 32 for n in LENGTHS]
    assert generator.num_truncated == 2 * sum(n > 32 for n in LENGTHS)
    padded = np.zeros((4, 32), np.int32)
    chosen = [0, 3, 2, 140]
    for row, i in enumerate(chosen):
        cut = prompts[i][:32]
        cut[-1] = 1
        padded[row, : len(cut)] = cut
    direct = generate(
        model,
        params,
        padded,
        key=jax.random.key(5),
        prompt_ids=np.array(chosen),
        num_samples=2,
        max_new_tokens=6,
        sampling=Sampling(),
    )
    for row, i in enumerate(chosen):
        for n in range(2):
            length = int(direct.lengths[row, n])
            tokens = np.asarray(direct.tokens[row, n, :length])
            np.testing.assert_array_equal(found[i].tokens[n], tokens)
            assert found[i].texts[n] == Letters().decode(tokens.tolist())
            logps = np.asarray(direct.logps[row, n, :length])
            np.testing.assert_allclose(found[i].logps[n], logps, atol=1e-4)
            np.testing.assert_allclose(found[i].logp[n], logps.sum(), atol=1e-4)
    assert any(len(t) < 6 for g in found for t in g.tokens)


def test_own_ids_sample_a_subset_as_in_the_whole(tiny):
    model, params = tiny
    prompts = _prompts(LENGTHS[:9])
    whole = list(_generator(model)(params, prompts))
    part = list(_generator(model)(params, [prompts[7], prompts[1]], prompt_ids=[7, 1]))
    for found, i in zip(part, [7, 1], strict=True):
        assert found.prompt_id == i and found.texts == whole[i].texts


def test_prompts_sharded_over_devices(tiny):
    model, params = tiny
    mesh = jax.make_mesh(
        (jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    prompts = _prompts(LENGTHS[:9])
    sharded = _generator(
        model,
        batch_size=jax.device_count(),
        sharding=NamedSharding(mesh, PartitionSpec("data")),
    )
    plain = _generator(model)
    expected = [generation.texts for generation in plain(params, prompts)]
    assert [generation.texts for generation in sharded(params, prompts)] == expected


def test_a_bar_is_shown_when_asked(tiny, capsys):
    list(_generator(tiny[0], progress=True)(tiny[1], _prompts([4] * 4)))
    shown = capsys.readouterr().err
    assert "4/4" in shown and "tokens/s" in shown


def test_no_prompts_no_results(tiny):
    assert list(_generator(tiny[0])(tiny[1], [])) == []


def test_buckets():
    assert [prompt_bucket(n, 200) for n in (1, 16, 17, 128, 129, 200)] == [
        16, 16, 32, 128, 200, 200,
    ]  # fmt: skip
    assert prompt_bucket(5, 8) == 8


@pytest.mark.parametrize(
    "prompts, ids, message",
    [
        ([[5, 1], []], None, r"prompts\[1\] must be a non-empty vector"),
        ([[5, 0, 1]], None, r"prompts\[0\] holds the id 0; expected ids in \[1, 24\)"),
        ([[5, 24, 1]], None, r"holds the id 24; .* another vocabulary"),
        ([[5, 1]], [1, 2], "an id for each of 1 prompts, got 2"),
        ([[5, 1]], [-1], r"prompt_ids\[0\] must lie in \[0, 2\*\*32\), got -1"),
    ],
)
def test_bad_prompts_are_named_when_called(tiny, prompts, ids, message):
    with pytest.raises(ValueError, match=message):
        _generator(tiny[0])(tiny[1], prompts, prompt_ids=ids)


def test_bad_sizes_are_refused(tiny):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        _generator(tiny[0], batch_size=0)


def test_eos_is_the_vocabularys(tiny):
    model, params = tiny

    class Others(Letters):
        eos_id = 2

    prompts = _prompts([3, 5])
    settings = {"max_prompt_length": 8, "max_new_tokens": 12, "num_samples": 8}
    a, b = (
        list(Generator(model, kind(), **settings)(params, prompts))
        for kind in (Letters, Others)
    )
    found = set()
    for ours, theirs in ((a[0], b[0]), (a[1], b[1])):
        for x, y in zip(ours.tokens, theirs.tokens, strict=True):
            # The same draws, cut at another id.
            both = min(len(x), len(y))
            np.testing.assert_array_equal(x[:both], y[:both])
            assert 1 not in x[:-1] and 2 not in y[:-1]
            found |= {len(y) < 12 and int(y[-1])}
    assert found <= {2, False} and 2 in found
