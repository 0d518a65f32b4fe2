"""ORPO, CPO and SimPO against TRL's own trainers on a T5: the same twenty losses."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxalign import data, objectives
from jaxalign.data.plan import Placement, RowShape
from jaxalign.interop import huggingface
from jaxalign.training import optimizers
from jaxalign.training import step as steps

STEPS, BATCH, LEARNING_RATE = 20, 4, 3e-3
TEXTS = [
    (f"say {i} {'very ' * (i % 4)}well", f"good {'day ' * (i % 3)}{i}", "bad" * (i % 5))
    for i in range(16)
]
# The objective here, and TRL's trainer and settings.
CASES = {
    "ORPO": (objectives.ORPO, {"beta": 0.3}, "orpo", {"beta": 0.3}),
    "CPO": (objectives.CPO, {"beta": 0.2}, "cpo", {"beta": 0.2}),
    "SimPO": (
        objectives.SimPO,
        {"beta": 2.0, "gamma": 0.7},
        "cpo",
        {"beta": 2.0, "simpo_gamma": 0.7, "loss_type": "simpo", "cpo_alpha": 0.0},
    ),
}


@pytest.fixture(scope="module")
def experimental():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "TRL_EXPERIMENTAL_SILENCE"):
            patch.setenv(name, "1")
        reason = "needs trl 1.16 and datasets (pip install trl==1.16.* datasets)"
        for module in ("datasets", "trl.experimental.orpo", "trl.experimental.cpo"):
            pytest.importorskip(module, reason=reason, exc_type=ImportError)
        import trl.experimental

        yield trl.experimental


def _theirs(module, kind, settings, folder, model):
    """TRL's losses, and the batches it made them of."""
    import datasets
    import transformers

    config = getattr(module, f"{kind}Config")(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=0.0,
        max_length=64,
        max_completion_length=32,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    seen = []

    class Trainer(getattr(module, f"{kind}Trainer")):
        def compute_loss(self, model, inputs, *args, **kwargs):
            out = super().compute_loss(model, inputs, *args, **kwargs)
            seen.append((inputs, float(out)))
            return out

    names = ("prompt", "chosen", "rejected")
    rows = dict(zip(names, map(list, zip(*TEXTS, strict=True)), strict=True))
    trainer = Trainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    return [loss for _, loss in seen], [inputs for inputs, _ in seen]


def _batch(inputs):
    """TRL's batch as the columns of a response batch."""

    def ids(name, mask):
        return [
            np.array(row[kept], np.int32)
            for row, kept in zip(inputs[name].numpy(), mask, strict=True)
        ]

    prompts = ids("prompt_input_ids", inputs["prompt_attention_mask"].numpy() == 1)
    sides = [
        ids(name, inputs[name].numpy() != -100)
        for name in ("chosen_labels", "rejected_labels")
    ]
    rows = [
        data.Row(
            key=str(i),
            prompts=[prompt],
            responses=[chosen, rejected],
            response_prompt=[0, 0],
            response_kind=[0, 0],
            response_reward=[float("nan")] * 2,
            response_label=[-1, -1],
            pairs=[(0, 1, 0.0)],
        )
        for i, (prompt, chosen, rejected) in enumerate(
            zip(prompts, *sides, strict=True)
        )
    ]
    arrays = [
        data.to_arrays(
            [row],
            Placement(np.array([i]), np.arange(2), inputs=64, targets=32),
            RowShape(64, 2, 32, prompts=1, responses=2, pairs=1),
        )
        for i, row in enumerate(rows)
    ]
    return {name: np.stack([a[name] for a in arrays]) for name in arrays[0]}


def _quieter(folder):
    """The folder's network with half as large matrices, written there again.

    In one as loud as the folder's, a step makes ten differences of rounding's size out
    of one, and two programs part ways before the twentieth.
    """
    import torch
    import transformers

    model = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")  # transformers' about TRL, and torch's
@pytest.mark.parametrize("name", CASES)
def test_twenty_losses_equal_trls(name, experimental, tmp_path):
    import foreign_folders

    kind, settings, module, theirs = CASES[name]
    foreign_folders.write("byt5", tmp_path)
    torch_model = _quieter(tmp_path)
    foreign = huggingface.open_folder(tmp_path)
    params = huggingface.read(tmp_path)
    wanted, batches = _theirs(
        getattr(experimental, module), module.upper(), theirs, tmp_path, torch_model
    )
    assert len(wanted) == STEPS
    epoch = len(TEXTS) // BATCH
    assert sum(wanted[-epoch:]) < 0.98 * sum(wanted[:epoch])  # it learns

    tx = optimizers.optimizer("adamw", learning_rate=LEARNING_RATE, weight_decay=0.0)
    objective = kind(model=foreign.model(), **settings)
    params = jax.tree.map(jax.numpy.asarray, params)
    state = steps.TrainState.create({"policy": params}, tx)
    step = jax.jit(steps.make_train_step(objective, tx))
    found = []
    for inputs in batches:
        state, metrics = step(state, _batch(inputs), jax.random.key(0))
        found.append(float(metrics["objective"].total))
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
