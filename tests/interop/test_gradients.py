"""Supervised fine-tuning of an imported T5: PyTorch's gradient, leaf by leaf."""

from __future__ import annotations

import foreign_folders
import jax
import numpy as np
import pytest
import torch
from flax import traverse_util

from jaxalign import data, models, objectives
from jaxalign.data.plan import Placement, RowShape
from jaxalign.interop import huggingface


def _rows(size):
    rng = np.random.default_rng(0)

    def ids(length):
        return np.append(rng.integers(3, size, length), 1).astype(np.int32)

    return [
        data.Row(
            key=str(i),
            prompts=[ids(prompt)],
            responses=[ids(response)],
            response_prompt=[0],
            response_kind=[0],
            response_reward=[float("nan")],
            response_label=[-1],
            pairs=[],
        )
        for i, (prompt, response) in enumerate([(9, 4), (3, 8), (6, 1), (5, 5)])
    ]


def _batch(rows):
    """Two rows of two prompts each, packed."""
    arrays = []
    for start in (0, 2):
        placement = Placement(
            np.arange(start, start + 2), np.zeros(2, int), inputs=16, targets=16
        )
        shape = RowShape(24, 1, 24, prompts=2, responses=2, pairs=1)
        arrays.append(data.to_arrays(rows[start : start + 2], placement, shape))
    return {name: np.stack([a[name] for a in arrays]) for name in arrays[0]}


def _torch_loss(model, rows):
    """The mean over target tokens of the cross-entropy, one row at a time."""
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor(row.responses[0][None], dtype=torch.long)
        logits = model(
            input_ids=torch.tensor(row.prompts[0][None], dtype=torch.long),
            labels=labels,
        ).logits
        total = total + torch.nn.functional.cross_entropy(
            logits[0], labels[0], reduction="sum"
        )
        count += labels.numel()
    return total / count


@pytest.mark.parametrize("family", ["t5_1_0", "t5_1_1", "mt5"])
def test_every_leafs_gradient_is_pytorchs(family, tmp_path):
    theirs = foreign_folders.write(family, tmp_path / "model")
    foreign = huggingface.open_folder(tmp_path / "model")
    params = huggingface.read(tmp_path / "model")
    rows = _rows(foreign.shape.vocab_size)
    objective = objectives.SFT(model=foreign.model())
    batch = _batch(rows)

    def of_batch(params):
        return objective.batch_loss({"policy": params}, batch)[0]

    loss, grads = jax.jit(jax.value_and_grad(of_batch))(params)

    wanted = _torch_loss(theirs, rows)
    wanted.backward()
    np.testing.assert_allclose(loss, wanted.item(), rtol=1e-5)
    # The gradients as another checkpoint of the same architecture, read like any.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "grads")
    for file in (tmp_path / "model").iterdir():
        if not (other := tmp_path / "grads" / file.name).exists():
            other.write_bytes(file.read_bytes())
    expected = traverse_util.flatten_dict(huggingface.read(tmp_path / "grads"), sep="/")
    found = traverse_util.flatten_dict(grads, sep="/")
    shapes = traverse_util.flatten_dict(models.shapes(objective.model), sep="/")
    assert set(found) == set(expected) == set(shapes)
    for name, grad in found.items():
        size = np.linalg.norm(expected[name])
        assert size > 1e-6, name
        apart = np.linalg.norm(grad - expected[name])
        assert apart < 1e-3 * size, (name, apart / size)
