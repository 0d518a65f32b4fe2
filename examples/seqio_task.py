"""Bring your own seqio task: register it as for T5X, name this file, train.

    CHECKPOINT=flan-t5-small python examples/seqio_task.py

A task's vocabulary has to be the checkpoint's. Bytes here, as the tiny network has; for
a Flan-T5 it is seqio.SentencePieceVocabulary("flan-t5-small/spiece.model", 100).
"""

# %% The task: this half is what `MIXTURE_OR_TASK_MODULE` imports
import os

import seqio
import tensorflow as tf

CHECKPOINT = os.environ.get("CHECKPOINT")
VOCABULARY = (
    seqio.SentencePieceVocabulary(f"{CHECKPOINT}/spiece.model", extra_ids=100)
    if CHECKPOINT
    else seqio.ByteVocabulary(extra_ids=125)
)
ROWS = {
    "train": [(f"{a} plus {b}", str(a + b)) for a in range(12) for b in range(12)],
    "validation": [(f"{a} plus {a + 12}", str(2 * a + 12)) for a in range(12)],
}


def sums(split, shuffle_files, seed=None):
    """The rows of a split; a file, TFDS or a function may be the source."""
    del shuffle_files, seed
    inputs, targets = map(list, zip(*ROWS[split], strict=True))
    return tf.data.Dataset.from_tensor_slices({"inputs": inputs, "targets": targets})


feature = seqio.Feature(VOCABULARY)
if "example_sums" not in seqio.TaskRegistry.names():
    seqio.TaskRegistry.add(
        "example_sums",
        source=seqio.FunctionDataSource(sums, splits=("train", "validation")),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": feature, "targets": feature},
    )

# %% The run: `MIXTURE_OR_TASK_NAME` is T5X's name for it
if __name__ == "__main__":
    import tiny

    import jaxalign

    policy = jaxalign.train(
        objective="sft",
        checkpoint=CHECKPOINT or tiny.checkpoint(),
        run_dir="runs/examples/sums",
        steps=30,
        MIXTURE_OR_TASK_NAME="example_sums",
        MIXTURE_OR_TASK_MODULE=__file__,
        **({} if CHECKPOINT else tiny.SETTINGS),
    )
    print(policy.generate(["3 plus 4"], temperature=0, max_new_tokens=8))
