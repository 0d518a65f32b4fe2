"""Metrics that add up: over microbatches, batches and devices.

A step returns sums and counts, never averages, so that averaging averages (the usual
bug under microbatching) cannot happen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Mean:
    """A weighted mean: ``total / count``."""

    total: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array) -> Mean:
        """The mean of `values` where `mask` is non-zero, same shapes."""
        mask = mask.astype(jnp.float32)
        # Masked entries may be anything, NaN included.
        total = jnp.sum(jnp.where(mask > 0, values.astype(jnp.float32), 0.0) * mask)
        return cls(total, jnp.sum(mask))


@flax.struct.dataclass
class Values:
    """A whole sample, for what no sum gives: percentiles, deviations."""

    values: jax.Array
    mask: jax.Array

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array) -> Values:
        return cls(values.astype(jnp.float32).reshape(-1), mask.reshape(-1))


@flax.struct.dataclass
class Pairs:
    """Two aligned samples, for their correlation and calibration."""

    x: jax.Array
    y: jax.Array
    mask: jax.Array

    @classmethod
    def of(cls, x: jax.Array, y: jax.Array, mask: jax.Array) -> Pairs:
        x, y = (v.astype(jnp.float32).reshape(-1) for v in (x, y))
        return cls(x, y, mask.reshape(-1))


Metric = Mean | Values | Pairs
Metrics = Mapping[str, Metric]


def sample_pairs(
    batches: Sequence[Metrics], name: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """The two aligned samples of a `Pairs` metric over batches; None if it is none."""
    if not batches or not isinstance(batches[0].get(name), Pairs):
        return None
    parts = jax.device_get([metrics[name] for metrics in batches])
    mask = np.concatenate([p.mask.reshape(-1) for p in parts]) > 0
    x, y = (
        np.concatenate([getattr(p, axis).reshape(-1) for p in parts])[mask]
        for axis in "xy"
    )
    return x, y


def summarize(batches: Sequence[Metrics]) -> dict[str, float]:
    """Reduces the metrics of one or more steps to numbers, on the host.

    A `Mean` becomes ``name``, absent when nothing was counted; `Values` become
    ``name/p50``, ``name/p95`` and ``name/std``; `Pairs` become ``name``, Pearson's
    correlation, absent when it is undefined.

    >>> one = {"loss": Mean(jnp.array(6.0), jnp.array(2.0))}
    >>> two = {"loss": Mean(jnp.array(0.0), jnp.array(1.0))}
    >>> summarize([one, two])
    {'loss': 2.0}
    """
    host = jax.device_get(list(batches))
    out: dict[str, float] = {}
    for name in host[0] if host else ():
        parts = [metrics[name] for metrics in host]
        if isinstance(parts[0], Mean):
            count = float(sum(np.sum(p.count, dtype=np.float64) for p in parts))
            if count:
                total = sum(np.sum(p.total, dtype=np.float64) for p in parts)
                out[name] = float(total) / count
            continue
        if isinstance(parts[0], Values):
            mask = np.concatenate([p.mask.reshape(-1) for p in parts]) > 0
            values = np.concatenate([p.values.reshape(-1) for p in parts])[mask]
            if values.size:
                out[f"{name}/p50"], out[f"{name}/p95"] = map(
                    float, np.percentile(values, (50, 95))
                )
                out[f"{name}/std"] = float(np.std(values))
            continue
        x, y = sample_pairs(host, name)
        if x.size > 1 and np.std(x) > 0 and np.std(y) > 0:
            out[name] = float(np.corrcoef(x, y)[0, 1])
    return out
