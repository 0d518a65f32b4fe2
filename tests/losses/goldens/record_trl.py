"""Records what TRL 0.24.0's own loss methods return, with gradients, in float64.

Run in an environment of its own, because TRL 0.24.0 asks for an older transformers than
the tests do::

    python -m venv trl && trl/bin/pip install trl==0.24.0 transformers==4.57.1 torch
    trl/bin/python tests/losses/goldens/record_trl.py

Nothing of jaxalign is imported here; ``tests/losses/test_trl.py`` compares.
"""

from __future__ import annotations

import json
import pathlib
import types

import torch
import trl
from trl import BCOTrainer, CPOTrainer, DPOTrainer, KTOTrainer, ORPOTrainer
from trl.models import create_reference_model  # noqa: F401 - fails early if incomplete
from trl.trainer.utils import RunningMoments

PAIRS = 16
BETA = 0.3


def trainer(**settings):
    """As much of a trainer as its loss method reads."""
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"),
        gather_for_metrics=lambda x: x,
        num_processes=1,
        use_distributed=False,
    )
    defaults = {
        "accelerator": accelerator,
        "beta": BETA,
        "label_smoothing": 0.0,
        "reference_free": False,
        "f_divergence_type": "reverse_kl",
        "aux_loss_enabled": False,
        "use_weighting": False,
    }
    return types.SimpleNamespace(**{**defaults, **settings})


def record(function, inputs):
    """Losses and the gradients of their sum."""
    leaves = [x.clone().requires_grad_(True) for x in inputs]
    losses = function(*leaves)
    grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    return {
        "losses": losses.detach().tolist(),
        "gradients": [
            [0.0] * len(x) if g is None else g.tolist()
            for x, g in zip(leaves, grads, strict=True)
        ],
    }


def exact(x):
    """Rounded to what float32 holds exactly, differences included."""
    return torch.round(256.0 * x) / 256.0


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    chosen, rejected = exact(-30.0 * torch.rand(2, PAIRS) - 1.0)
    ref_chosen = exact(chosen + 3.0 * torch.randn(PAIRS))
    ref_rejected = exact(rejected + 3.0 * torch.randn(PAIRS))
    lengths = torch.randint(2, 20, (2, PAIRS)).double()
    means = [chosen / lengths[0], rejected / lengths[1]]
    kl = exact(-30.0 * torch.rand(2 * PAIRS) - 1.0)
    ref_kl = exact(kl - 0.5 + torch.randn(2 * PAIRS))
    four = [chosen, rejected, ref_chosen, ref_rejected]

    cases = {}
    for name, kind, settings in (
        ("dpo", "sigmoid", {}),
        ("cdpo", "sigmoid", {"label_smoothing": 0.1}),
        ("robust_dpo", "robust", {"label_smoothing": 0.1}),
        ("hinge", "hinge", {}),
        ("ipo", "ipo", {}),
        ("exo_pair", "exo_pair", {"label_smoothing": 1e-3}),
        ("nca_pair", "nca_pair", {}),
        ("sppo_hard", "sppo_hard", {}),
        ("apo_zero", "apo_zero", {}),
        ("apo_down", "apo_down", {}),
    ):
        own = trainer(loss_type=kind, **settings)
        cases[name] = record(
            lambda *x, own=own, kind=kind: DPOTrainer.dpo_loss(own, *x, kind)[0], four
        )
    for name, kind, settings, inputs in (
        ("cpo", "sigmoid", {}, [chosen, rejected]),
        ("cpo_smoothed", "sigmoid", {"label_smoothing": 0.1}, [chosen, rejected]),
        ("slic_hf", "hinge", {}, [chosen, rejected]),
        ("simpo", "simpo", {"simpo_gamma": 0.7, "beta": 2.0}, means),
    ):
        own = trainer(loss_type=kind, alpha=0.0, **settings)
        cases[name] = record(
            lambda *x, own=own: CPOTrainer.cpo_loss(own, *x)[0], inputs
        )
    # It returns what is *subtracted* from the likelihood's loss.
    cases["orpo"] = record(
        lambda *x: -ORPOTrainer.odds_ratio_loss(trainer(), *x)[0], means
    )
    weights = {"desirable_weight": 1.33, "undesirable_weight": 0.9}
    for name in ("kto", "apo_zero_unpaired"):
        own = trainer(loss_type=name, calculate_KL=name == "kto", **weights)
        cases[name] = record(
            lambda *x, own=own: KTOTrainer.kto_loss(own, *x[:2], kl, *x[2:], ref_kl)[0],
            four,
        )
    # Two batches: the reward shift of the second has seen the first.
    own = trainer(match_underlying_distribution=False)
    own.running = RunningMoments(own.accelerator)
    cases["bco"] = {"steps": []}
    for part in (slice(0, PAIRS // 2), slice(PAIRS // 2, PAIRS)):
        half = [x[part] for x in four]
        cases["bco"]["steps"].append(
            record(lambda *x: BCOTrainer.bco_loss(own, *x, None, None)[0], half)
        )
        cases["bco"]["steps"][-1]["shift"] = float(own.running.mean)

    found = {
        "trl": trl.__version__,
        "beta": BETA,
        "inputs": {
            "chosen_logps": chosen.tolist(),
            "rejected_logps": rejected.tolist(),
            "ref_chosen_logps": ref_chosen.tolist(),
            "ref_rejected_logps": ref_rejected.tolist(),
            "chosen_lengths": lengths[0].tolist(),
            "rejected_lengths": lengths[1].tolist(),
            "kl_logps": kl.tolist(),
            "ref_kl_logps": ref_kl.tolist(),
        },
        "cases": cases,
    }
    path = pathlib.Path(__file__).with_name("trl_0_24_0.json")
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
