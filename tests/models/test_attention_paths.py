"""Every way to compute attention against float64 NumPy and against the whole matrix."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxalign.cluster import mesh as meshes
from jaxalign.models import attention_paths, windows
from jaxalign.models.attention_paths import CHUNK, PATHS, Segments

B, H, D = 2, 3, 8


def arrays(queries, keys, causal, seed=0):
    """Random states, a bias, and two rows of segments, the second one padded."""
    rng = np.random.default_rng(seed)
    qkv = [
        rng.normal(size=(B, length, H, D)).astype(np.float32)
        for length in (queries, keys, keys)
    ]
    bias = rng.normal(size=(1, H, queries, keys)).astype(np.float32)

    def ids(length):
        first = np.sort(rng.integers(1, 4, length))
        second = np.where(np.arange(length) < length * 2 // 3, 1, 0)
        return np.stack([first, second]).astype(np.int32)

    of_query = ids(queries)
    return qkv, bias, Segments(of_query, of_query if causal else ids(keys), causal)


def sees_something(segments):
    """Which queries ``[B, Lq, 1, 1]`` count: those of no padding that have a key."""
    seen = segments.queries[:, :, None] == segments.keys[:, None, :]
    return (seen.any(-1) & (segments.queries > 0))[..., None, None]


def reference(qkv, bias, segments):
    """Attention in float64, one query after another."""
    query, keys, values = (x.astype(np.float64) for x in qkv)
    out = np.zeros(query.shape)
    for b in range(query.shape[0]):
        for q in range(query.shape[1]):
            seen = segments.keys[b] == segments.queries[b, q]
            if segments.causal:
                seen &= np.arange(len(seen)) <= q
            if not seen.any():
                continue
            for h in range(query.shape[2]):
                scores = keys[b, seen, h] @ query[b, q, h]
                if bias is not None:
                    scores = scores + bias[0, h, q, seen]
                share = np.exp(scores - scores.max())
                out[b, q, h] = share / share.sum() @ values[b, seen, h]
    return out


@pytest.fixture
def on_tpu():
    """The TPU's kernel, interpreted on the CPU."""
    with pltpu.force_tpu_interpret_mode():
        yield


LENGTHS = {
    "short": (7, 5, False),
    "one chunk": (CHUNK, 2 * CHUNK, False),
    "chunks and a rest": (2 * CHUNK + 3, CHUNK, False),
    "causal": (2 * CHUNK, 2 * CHUNK, True),
    "causal with a rest": (CHUNK + 9, CHUNK + 9, True),
    "a row of several": (3 * CHUNK + 40, 3 * CHUNK + 40, False),
    "prompts of several rows": (2 * CHUNK, 4 * CHUNK, False),
    "causal, several": (4 * CHUNK, 4 * CHUNK, True),
}
# The kernel is slow when interpreted, and pads: a few cases are all of it.
INTERPRETED = ("short", "chunks and a rest", "causal with a rest")
CASES = [
    (path, name)
    for path in PATHS
    for name in LENGTHS
    if path != "pallas" or name in INTERPRETED
]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("path", "name"), CASES)
def test_paths_equal_float64(path, name, with_bias, on_tpu):
    qkv, bias, segments = arrays(*LENGTHS[name])
    bias = bias if with_bias else None
    got = jax.jit(PATHS[path])(*map(jnp.asarray, qkv), segments, bias)
    assert np.all(np.isfinite(got))
    real, want = sees_something(segments), reference(qkv, bias, segments)
    np.testing.assert_allclose(got * real, want * real, atol=2e-5)


@pytest.mark.parametrize(("path", "name"), [c for c in CASES if c[0] != "whole"])
def test_gradients_equal_those_of_whole(path, name, on_tpu):
    qkv, bias, segments = arrays(*LENGTHS[name])
    factors = np.random.default_rng(1).normal(size=qkv[0].shape)
    factors = factors * sees_something(segments)

    def gradients(attend):
        def loss(query, keys, values, bias):
            return jnp.sum(attend(query, keys, values, segments, bias) * factors)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*qkv, bias)

    chex.assert_trees_all_close(
        gradients(PATHS[path]), gradients(attention_paths.whole), rtol=1e-4, atol=1e-4
    )


def spans(of_query, of_key, causal=False):
    """Where each chunk's window begins, and the fewest keys that it needs."""
    found = []
    for start in range(0, of_query.shape[1], CHUNK):
        chunk = Segments(of_query[:, start : start + CHUNK], of_key, causal)
        found.append(tuple(int(x) for x in windows.span(jnp.int32(start), chunk)))
    return found


def test_a_chunk_needs_the_keys_of_its_own_segments():
    # Four segments of a chunk each; three that lie across the chunks, and padding.
    even = np.repeat([1, 2, 3, 4], CHUNK)[None]
    across = np.repeat([1, 2, 3, 0], [100, 200, 150, 62])[None]
    assert spans(even, even) == [(0, 128), (128, 128), (256, 128), (384, 128)]
    assert spans(across, across) == [(0, 300), (100, 200), (100, 350), (300, 150)]
    assert spans(across, across, causal=True) == [
        (0, 128), (100, 156), (100, 284), (300, 150),
    ]  # fmt: skip
    # All rows of a batch share a window, and padding needs no key.
    both = np.concatenate([even, across])
    assert spans(both, both)[3] == (300, 212)
    assert spans(0 * even, even) == [(0, 0)] * 4


@pytest.mark.parametrize("causal", [False, True])
def test_what_lies_outside_of_a_window_is_not_computed(causal):
    """A NaN in another chunk's keys would reach a product that took all of them."""
    qkv, bias, _ = arrays(4 * CHUNK, 4 * CHUNK, causal)
    of = np.repeat([[1, 2, 3, 4]], CHUNK, axis=1).repeat(B, 0).astype(np.int32)
    segments = Segments(of, of, causal)
    query, keys, values = map(jnp.asarray, qkv)
    bad = values.at[:, CHUNK : 2 * CHUNK].set(jnp.nan)
    got = jax.jit(attention_paths.chunked)(query, keys, bad, segments, bias)
    want = attention_paths.whole(query, keys, values, segments, bias)
    rest = np.r_[:CHUNK, 2 * CHUNK : 4 * CHUNK]
    np.testing.assert_allclose(got[:, rest], want[:, rest], atol=2e-5)
    assert np.isnan(got[:, CHUNK : 2 * CHUNK]).all()


def test_kernel_is_called_for_each_devices_rows_and_heads(on_tpu):
    """XLA cannot split a kernel: 2 x 2 devices give what one gives."""
    qkv, bias, segments = arrays(*LENGTHS["causal with a rest"])
    qkv, bias = [x[:, :, :2] for x in qkv], bias[:, :2]
    factors = np.random.default_rng(1).normal(size=qkv[0].shape)
    factors = factors * sees_something(segments)

    def loss(query, keys, values, bias):
        out = attention_paths.pallas(query, keys, values, segments, bias)
        return jnp.sum(out * factors)

    step = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    mesh = meshes.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    split = jax.jit(
        meshes.with_activation_rules(mesh, step),
        in_shardings=meshes.replicated(mesh),
    )
    chex.assert_trees_all_close(
        split(*qkv, bias), jax.jit(step)(*qkv, bias), rtol=1e-5, atol=1e-5
    )
