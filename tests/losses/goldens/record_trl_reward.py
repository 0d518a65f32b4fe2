"""Records what TRL 1.16.0's ``RewardTrainer.compute_loss`` gives, with gradients.

Its arithmetic on arrays, in float64: a "model" returns given scores. Run where TRL
1.16.0 and torch are::

    python tests/losses/goldens/record_trl_reward.py

Nothing of jaxalign is imported here; ``tests/losses/test_scores.py`` compares.
"""

from __future__ import annotations

import collections
import json
import pathlib
import types

import torch
import trl
from trl import RewardTrainer

PAIRS = 16


def compute(chosen, rejected, margin, coefficient):
    """The trainer's loss, and what it logs."""
    logits = torch.cat([chosen, rejected])[:, None]
    accelerator = types.SimpleNamespace(
        gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    self = types.SimpleNamespace(
        model=types.SimpleNamespace(training=False),
        args=types.SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=accelerator,
        _metrics=metrics,
        _total_train_tokens=0,
    )
    inputs = {"attention_mask": torch.ones(1)}
    if margin is not None:
        inputs["margin"] = margin
    model = lambda **_: types.SimpleNamespace(logits=logits)  # noqa: E731
    loss = RewardTrainer.compute_loss(self, model, inputs)
    return loss, {k: v[0] for k, v in metrics["eval"].items()}


def main():
    torch.set_default_dtype(torch.float64)
    draw = torch.Generator().manual_seed(0)
    chosen, rejected = (3 * torch.randn(PAIRS, generator=draw) for _ in range(2))
    chosen[0], rejected[0] = 400.0, -400.0  # and far the other way
    chosen[1], rejected[1] = -400.0, 400.0
    margin = torch.rand(PAIRS, generator=draw)
    cases = []
    for with_margin in (False, True):
        for coefficient in (None, 0.01):
            leaves = [x.clone().requires_grad_(True) for x in (chosen, rejected)]
            loss, told = compute(*leaves, margin if with_margin else None, coefficient)
            slopes = torch.autograd.grad(loss, leaves)
            cases.append(
                {
                    "margin": with_margin,
                    "coefficient": coefficient,
                    "loss": loss.item(),
                    "gradients": [g.tolist() for g in slopes],
                    "accuracy": told["accuracy"],
                    "mean_margin": told["margin"],
                }
            )
    found = {
        "trl": trl.__version__,
        "torch": torch.__version__,
        "chosen": chosen.tolist(),
        "rejected": rejected.tolist(),
        "margin": margin.tolist(),
        "cases": cases,
    }
    path = pathlib.Path(__file__).with_name("trl_reward_1_16_0.json")
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
