"""What is measured: configurations, their peers and their targets."""

from __future__ import annotations

import dataclasses
from typing import Any

# Peers' scripts print "median 1.234s"; see `benchmarks.steps.peers`.
TORCH_DPO = "peer_torch_dpo.py"
TORCH_DPO_BF16 = "peer_torch_dpo.py bfloat16"  # autocast; parameters, losses float32
T5X_SFT = "peer_t5x_sft.py"


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step to time.

    Attributes:
      name: unique.
      gin_files: of the run, the model last.
      bindings: of the run.
      peer: the script that times the same step elsewhere, if there is one, and what
        it is told beside the sizes.
      target: how many times as fast as the peer the step is to be.
      mfu_target: the share of the matrix-product ceiling it is to reach.
      devices: the platforms it is for.
    """

    name: str
    gin_files: tuple[str, ...]
    bindings: tuple[str, ...]
    peer: str | None = None
    target: float | None = None
    mfu_target: float | None = None
    devices: tuple[str, ...] = ("cpu", "gpu", "tpu")

    def request(self, steps: int) -> dict[str, Any]:
        """What `benchmarks.steps.worker` is asked."""
        return {
            "kind": "train_step",
            "gin_files": list(self.gin_files),
            "bindings": list(self.bindings),
            "steps": steps,
        }


def step_case(
    name: str,
    run: str,
    size: str,
    *bindings: str,
    batch: int = 8,
    inputs: int = 128,
    targets: int = 64,
    **settings: Any,
) -> Case:
    """A case on synthetic tokens: a run file at one of T5 1.1's sizes."""
    lengths = f"TASK_FEATURE_LENGTHS = {{'inputs': {inputs}, 'targets': {targets}}}"
    common = ("TRAIN_STEPS = 1000", lengths, f"BATCH_SIZE = {batch}", "PACKING = None")
    files = (f"runs/{run}.gin", f"models/t5_1_1_{size}.gin")
    return Case(name, files, (*common, *bindings), **settings)


_ADAMW = "OPTIMIZER_NAME = 'adamw'"  # the PyTorch peer's
_ONLINE = "REFERENCE = 'online'"
_BF16 = "ACTIVATION_DTYPE = 'bfloat16'"
_REMAT = "models.T5Config.remat_policy = 'minimal'"
CHUNK = "models.T5Config.logits_chunk = 16"
ATTENTION = "models.T5Config.attention = 'chunked'"
SCAN = "models.T5Config.scan_layers = True"
REMAT_FULL = "models.T5Config.remat_policy = 'full'"

# The steps of the table of targets. Peers are in float32 where not said otherwise.
MAIN = (
    step_case("sft-small", "sft", "small", peer=T5X_SFT, target=1.5),
    step_case("sft-small-bf16", "sft", "small", _BF16, peer=T5X_SFT, target=2.5),
    step_case("dpo-small-cached", "dpo", "small", _ADAMW, peer=TORCH_DPO, target=3.0),
    step_case(
        "dpo-small-online", "dpo", "small", _ADAMW, _ONLINE, peer=TORCH_DPO, target=2.0
    ),
    step_case(
        "dpo-small-cached-bf16", "dpo", "small", _ADAMW, _BF16, peer=TORCH_DPO,
        target=3.0,
    ),
    step_case(
        "dpo-small-cached-bf16-both", "dpo", "small", _ADAMW, _BF16,
        peer=TORCH_DPO_BF16, target=1.8,
    ),
    step_case(
        "dpo-small-online-bf16", "dpo", "small", _ADAMW, _ONLINE, _BF16,
        peer=TORCH_DPO, target=2.5,
    ),
    step_case("dpo-small", "dpo", "small", mfu_target=0.72),
    step_case(
        "dpo-small-packed", "dpo", "small", "PACKING = 4", ATTENTION, batch=2,
        mfu_target=0.66,
    ),
)  # fmt: skip
# The rest of what `jaxalign bench --all` measures.
MORE = (
    step_case("sft-tiny", "sft", "tiny", batch=32),
    step_case("dpo-tiny-cached", "dpo", "tiny", batch=32),
    step_case("kto-small", "kto", "small", "PACKING = 2", batch=4),
    step_case("dro-v-small", "dro_v", "small"),
    step_case("dpo-small-packed-whole", "dpo", "small", "PACKING = 4", batch=2),
    step_case("dpo-small-remat", "dpo", "small", _REMAT),
    step_case("dpo-small-scan", "dpo", "small", SCAN),
    step_case("dpo-small-chunked", "dpo", "small", _ADAMW, CHUNK),
    step_case("dpo-tiny-1024", "dpo", "tiny", batch=2, inputs=1024, targets=1024),
    step_case(
        "dpo-tiny-1024-chunked", "dpo", "tiny", ATTENTION, batch=2, inputs=1024,
        targets=1024,
    ),
    step_case("sft-base", "sft", "base"),
    step_case("dpo-base-cached", "dpo", "base"),
    step_case(
        "dpo-large-bf16", "dpo", "large", _BF16, batch=32, inputs=512, targets=256,
        devices=("gpu", "tpu"),
    ),
    step_case(
        "dpo-xl-bf16", "dpo", "xl", _BF16, _REMAT, CHUNK, batch=16, inputs=512,
        targets=256, mfu_target=0.5, devices=("gpu", "tpu"),
    ),
    step_case(
        "dro-v-xl-bf16", "dro_v", "xl", _BF16, _REMAT, CHUNK, batch=8, inputs=512,
        targets=256, mfu_target=0.5, devices=("gpu", "tpu"),
    ),
)  # fmt: skip
STEPS = (*MAIN, *MORE)
# At most this share of the unchunked step's temporaries.
TEMPORARIES_TARGET = 0.5
# Packed rows carry so many times the real tokens per second of padded ones.
PACKED_TARGET = 2.5
OCCUPANCY_TARGET = 0.95
# The input pipeline delivers so many times what the base step consumes.
FEED_TARGET = 10.0
# Time per real token grows at most by this factor.
GROWTH_TARGET = 1.1
