"""Plans of a tiny run, compiled for CPU devices and for a TPU slice."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json

import jax
import numpy as np
import pytest
import tiny_run

from jaxalign import cli, models, planning
from jaxalign.cluster import mesh as meshes
from jaxalign.planning import estimate, hardware, programs
from jaxalign.training import optimizers

KEYS = {
    "fits",
    "hbm_bytes",
    "flops_per_step",
    "collective_bytes",
    "predicted_step_seconds",
    "assumptions",
    "parameter_count",
}


def make_run(objective="DROV", **changes):
    return tiny_run.make_run("unused", "unused", "unused", objective, **changes)


@pytest.fixture(scope="module")
def planned():
    return planning.plan(
        make_run(optimizer=optimizers.optimizer("adafactor", learning_rate=1e-3)),
        ["cpu:8"],
        meshes=[
            {"data": 1, "fsdp": 4, "tensor": 2},
            {"data": 8, "fsdp": 1, "tensor": 1},
        ],
        steps=["train"],
    )


@pytest.mark.slow
def test_every_candidate_has_the_keys_that_others_read(planned):
    for found in json.loads(json.dumps(planned))["candidates"]:
        assert set(found) >= KEYS
        assert set(found["hbm_bytes"]) == {
            "parameters",
            "optimizer",
            "activations_and_temporaries",
            "limit",
        }
        assert found["fits"] and found["predicted_step_seconds"] > 0
        assert found["hbm_bytes"]["activations_and_temporaries"] > 0
        assert found["flops_per_step"] > 0 and found["collective_bytes"]
        assert all(size >= 0 for size in found["collective_bytes"].values())


def hand_count(fsdp: int, tensor: int) -> dict[str, int]:
    """Bytes of the policy's parameters on one device, kernel by kernel."""
    c = tiny_run.CONFIG
    e, h, f, v = c.emb_dim, c.num_heads * c.head_dim, c.mlp_dim, c.vocab_size
    attention = 4 * (e // fsdp) * (h // tensor)
    mlp = 3 * (e // fsdp) * (f // tensor)
    norm, bias = e // fsdp, 32 * c.num_heads // tensor
    encoder = c.num_encoder_layers * (attention + mlp + 2 * norm) + norm + bias
    decoder = c.num_decoder_layers * (2 * attention + mlp + 3 * norm) + norm + bias
    table = (e // fsdp) * (v // tensor)
    return {
        "policy": 4 * (encoder + decoder + 2 * table),
        # The value network: an encoder, its embedding, and a head of one number.
        "value_without_head": 4 * (encoder + table),
    }


def test_parameter_and_optimizer_bytes_are_hand_arithmetic():
    run = make_run("DPO")  # AdamW: two moments like the parameters
    for fsdp, tensor in ((1, 1), (4, 2), (8, 1)):
        mesh = meshes.make_mesh(
            fsdp=fsdp, tensor=tensor, devices=jax.devices()[: fsdp * tensor]
        )
        state = programs.abstract_setup(run, mesh).abstract_state
        expected = hand_count(fsdp, tensor)["policy"]
        assert estimate.bytes_per_device(state.params) == expected
        # Two counters of 4 bytes and a recorded learning rate beside the moments.
        moments = estimate.bytes_per_device(state.opt_state) - 2 * expected
        scalars = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 0]
        assert moments == 4 * len(scalars)


def test_arithmetic_is_what_real_arrays_take(planned):
    run = make_run(optimizer=optimizers.optimizer("adafactor", learning_rate=1e-3))
    mesh = meshes.make_mesh(data=1, fsdp=4, tensor=2)
    ready = programs.abstract_setup(run, mesh)
    state = ready.init_state(jax.random.key(0))
    device = jax.devices()[3]

    def on_device(tree):
        return sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
            if shard.device == device
        )

    memory = planned["candidates"][0]["hbm_bytes"]
    assert memory["parameters"] == on_device(state.params)
    assert memory["optimizer"] == on_device(state.opt_state)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    assert planned["candidates"][0]["parameter_count"]["total"] == count


def test_the_cheapest_mesh_has_the_fewest_device_seconds(planned):
    times = [c["predicted_step_seconds"] for c in planned["candidates"]]
    assert planned["cheapest"] == int(np.argmin(times))
    table = planning.table(planned)
    assert "1,4,2" in table and "Cheapest that fits" in table
    page = planning.html(planned)
    assert page.count("<tr>") == 3 and "<script" not in page


def test_what_does_not_fit_says_by_how_much(monkeypatch):
    run = make_run("SFT")
    wanted = [{"data": 1, "fsdp": 8, "tensor": 1}]
    small = dataclasses.replace(hardware.CHIPS["cpu"], memory=100_000)
    monkeypatch.setitem(hardware.CHIPS, "cpu", small)
    found = planning.plan(run, ["cpu:8"], meshes=wanted, steps=["train"])
    (one,) = found["candidates"]
    assert not one["fits"] and found["cheapest"] is None
    needed = sum(v for k, v in one["hbm_bytes"].items() if k != "limit")
    assert one["shortfall"]["short"] == needed - 100_000 > 0
    assert "too many" in planning.table(found)
    # Parameters alone are too large: nothing is compiled.
    tiny = dataclasses.replace(small, memory=1000)
    monkeypatch.setitem(hardware.CHIPS, "cpu", tiny)
    monkeypatch.setattr(programs.Program, "compile", None)
    found = planning.plan(run, ["cpu:8"], meshes=wanted, steps=["train"])
    assert found["candidates"][0]["shortfall"]["at_least"]


def test_libtpus_refusals_are_read():
    for message, needed, limit in (
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory "
            "in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by "
            "4.75G.",
            20.5,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
            "for HLO temporaries (2.00T) exceeds available HBM (95.74G).",
            2048,
            95.74,
        ),
    ):
        found = estimate._out_of_memory(message)
        assert found == (int(needed * hardware.GIB), int(limit * hardware.GIB))
    assert estimate._out_of_memory("INTERNAL: something else") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5:4x4", "Unknown topology 'v5:4x4'.*Did you mean v5"),
        ("v5e:4x4x4", "v5e slice has 2 dimensions"),
        ("v5p:4x4", "v5p slice has 3 dimensions"),
        ("v5e:3x3", "1 or even"),
        ("v6e:32x32", "largest v6e slice has 256 chips"),
        ("gpu-h100:many", "number of devices"),
        ("cpu:9", "Only 8 CPU devices"),
    ],
)
def test_topologies_that_do_not_exist_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        hardware.find(name)


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "libtpu" else real(n)
    )
    with pytest.raises(ImportError, match=r"pip install 'jaxalign\[plan\]'"):
        hardware.find("v5e:2x2")


JAX_WANTS = [
    "jaxlib<=0.10.2,>=0.10.1",
    'jaxlib<=0.10.2,>=0.10.2; extra == "tpu"',
    'libtpu==0.0.42.*; extra == "tpu"',
]


@pytest.mark.parametrize("found", ["0.0.42", "0.0.42.1"])
def test_the_libtpu_that_jax_names_is_taken(found):
    hardware.check_libtpu("0.10.2", JAX_WANTS, found)
    hardware.check_libtpu("0.10.2", JAX_WANTS[:2], "0.0.52")  # it names none


@pytest.mark.parametrize("found", ["0.0.52", "0.0.4", "0.0.421", "0.1.42", "0"])
def test_another_libtpu_is_refused_with_what_to_install(found):
    with pytest.raises(ImportError) as error:
        hardware.check_libtpu("0.10.2", JAX_WANTS, found)
    told = str(error.value)
    assert f"libtpu {found} does not go with jax 0.10.2" in told
    assert "pip install 'libtpu==0.0.42.*'" in told and "\n" not in told


def test_the_installed_jax_names_its_libtpu():
    """What the check reads; another spelling there would switch it off unnoticed."""
    wants = importlib.metadata.requires("jax")
    with pytest.raises(ImportError, match="pip install 'libtpu=="):
        hardware.check_libtpu("this", wants, "0.0.0")


def test_meshes_that_do_not_divide_are_left_out_with_the_reason():
    run = make_run("SFT", batch_size=8)
    with pytest.raises(
        ValueError, match="No mesh.*num_heads=2.*cannot be split 8 ways"
    ):
        planning.plan(run, ["cpu:8"], meshes=[{"data": 1, "fsdp": 1, "tensor": 8}])


@pytest.mark.slow
def test_a_tpu_slice_from_the_command_line(tmp_path, capfd):
    """The real compiler: needs libtpu, no TPU."""
    output = tmp_path / "plan.json"
    argv = [
        "plan",
        "--gin_file=runs/dpo.gin",
        "--gin.BATCH_SIZE=8",
        "--topology=v5e:2x2",
        "--mesh=1,2,2",
        f"--output={output}",
    ]
    assert cli.main(argv) == 0
    printed = capfd.readouterr().out
    assert "v5e:2x2" in printed and "Assumed:" in printed
    (found,) = json.loads(output.read_text())["candidates"]
    assert set(found) >= KEYS and set(found["programs"]) == set(programs.STEPS)
    assert found["collective_bytes"] and found["fits"]
    assert output.with_suffix(".html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_the_memory_of_each_chip_is_what_libtpu_says():
    for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
        topology = hardware.find(name)
        one = jax.sharding.SingleDeviceSharding(topology.devices[0])
        x = jax.ShapeDtypeStruct((2**40,), np.float32, sharding=one)
        with pytest.raises(jax.errors.JaxRuntimeError) as refused:
            jax.jit(lambda x: x + 1).lower(x).compile()
        found = estimate._out_of_memory(str(refused.value))
        assert found[1] == topology.chip.memory


@pytest.mark.slow
def test_the_largest_batch_fits_and_one_more_unit_does_not(monkeypatch):
    small = dataclasses.replace(hardware.CHIPS["cpu"], memory=4_000_000)
    monkeypatch.setitem(hardware.CHIPS, "cpu", small)
    run = make_run("SFT", model=models.T5(tiny_run.CONFIG))
    wanted = {"data": 8, "fsdp": 1, "tensor": 1}
    found = planning.plan(
        run, ["cpu:8"], meshes=[wanted], steps=["train"], find_largest_batch=True
    )
    largest = found["candidates"][0]["largest_batch"]
    for size, fits in ((largest, True), (largest + 8, False)):
        dataset = dataclasses.replace(run.dataset, batch_size=size)
        one = dataclasses.replace(run, dataset=dataset)
        again = estimate.candidate(one, hardware.find("cpu:8"), wanted, ("train",))
        assert again["fits"] is fits
