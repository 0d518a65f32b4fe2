"""T5X checkpoints, read and written without T5X.

All of T5X's formats are read, and the one that all of its versions restore is written::

    checkpoint = t5x.open_checkpoint("t5_1_1_small/checkpoint_1000000")
    found = t5x.describe(checkpoint)  # shape, names; nothing is read yet
    params, report = t5x.restore(checkpoint, like)  # straight onto like's shardings
    t5x.save("out", params, step=checkpoint.step, shape=found.shape)

`as_t5x_model` makes a model for T5X's own trainer of an objective (docs/t5x.md).
"""

from jaxalign.interop.assignment import Report
from jaxalign.interop.t5x_files import Checkpoint, open_checkpoint
from jaxalign.interop.t5x_formats import Found, T5XError, detect, of_parameters
from jaxalign.interop.t5x_model import as_t5x_model, start_from_t5
from jaxalign.interop.t5x_network import Description, describe
from jaxalign.interop.t5x_restore import restore
from jaxalign.interop.t5x_save import VOCABULARY, save
from jaxalign.interop.t5x_slots import moments

__all__ = [
    "VOCABULARY",
    "Checkpoint",
    "Description",
    "Found",
    "Report",
    "T5XError",
    "as_t5x_model",
    "describe",
    "detect",
    "moments",
    "of_parameters",
    "open_checkpoint",
    "restore",
    "save",
    "start_from_t5",
]
