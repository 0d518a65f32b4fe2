"""Parity with Hugging Face's PyTorch T5, and the mapping of its checkpoints."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
import torch
import transformers

from jaxalign import models
from jaxalign.interop import huggingface as hf
from jaxalign.models.layers import bucket_table

LENGTHS, DECODER_LENGTHS = (23, 9, 3), (7, 5, 1)


def _torch_model(feed_forward_proj, tied):
    config = transformers.T5Config(
        vocab_size=50,
        d_model=20,
        d_kv=6,
        d_ff=28,
        num_layers=1,
        num_decoder_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj=feed_forward_proj,
        tie_word_embeddings=tied,
        dropout_rate=0.0,
        attn_implementation="eager",
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not tied:
        # transformers 5 ties at construction and unties by what a checkpoint holds.
        model.lm_head.weight = torch.nn.Parameter(torch.empty(50, 20))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else 100
            parameter.normal_(0, fan_in**-0.5, generator=generator)
            if parameter.ndim == 1:
                parameter += 1
    return model


def _batch():
    """Three prompts of different lengths, right-padded, one response each."""
    rng = np.random.default_rng(0)
    encoder = np.arange(23) < np.array(LENGTHS)[:, None]
    decoder = (np.arange(7) < np.array(DECODER_LENGTHS)[:, None])[:, None]
    targets = rng.integers(1, 50, decoder.shape) * decoder
    inputs = np.concatenate([np.zeros((3, 1, 1), int), targets[..., :-1]], axis=-1)
    return {
        "encoder_input_tokens": (rng.integers(1, 50, (3, 23)) * encoder).astype("i4"),
        "encoder_segment_ids": encoder.astype("i4"),
        "decoder_input_tokens": inputs.astype("i4"),
        "decoder_target_tokens": targets.astype("i4"),
        "decoder_loss_weights": decoder.astype("f4"),
        "decoder_segment_ids": decoder.astype("i4"),
        "response_prompt": np.zeros((3, 1), "i4"),
        "response_mask": np.ones((3, 1), "f4"),
    }


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("proj", ["relu", "gated-gelu"])
def test_logits_logps_and_gradients_equal_pytorch(proj, tied):
    theirs = _torch_model(proj, tied)
    config = hf.config_from_huggingface(theirs.config.to_dict())
    assert config.logits_via_embedding == tied
    assert len(config.mlp_activations) == (1 if proj == "relu" else 2)
    model = models.T5(config)
    state = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    params = hf.params_from_huggingface(state, config)
    batch = _batch()

    where = batch["decoder_segment_ids"][:, 0] > 0
    long = {k: torch.from_numpy(v.astype("i8")) for k, v in batch.items()}
    want = theirs(
        input_ids=long["encoder_input_tokens"],
        attention_mask=long["encoder_segment_ids"],
        decoder_input_ids=long["decoder_input_tokens"][:, 0],
    ).logits
    logps = want.log_softmax(-1).gather(
        -1, long["decoder_target_tokens"][:, 0, :, None]
    )
    logps = logps[..., 0] * torch.from_numpy(where)
    logps.sum().backward()

    def loss(params, batch):
        logps = models.response_logps(model, params, batch)
        return logps.sum(), (logps, model.apply({"params": params}, batch))

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, (got_logps, got)), grads = step(params, batch)
    want = want.detach().numpy()
    np.testing.assert_allclose(np.asarray(got)[:, 0][where], want[where], atol=1e-4)
    np.testing.assert_allclose(
        got_logps[:, 0], logps.sum(1).detach().numpy(), atol=1e-4
    )
    expected = {k: v.grad.numpy() for k, v in theirs.named_parameters()}
    chex.assert_trees_all_close(
        jax.device_get(grads),
        hf.params_from_huggingface(expected, config),
        rtol=1e-4,
        atol=2e-4,
    )


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_pytorch(bidirectional):
    distance = np.arange(-700, 701)
    want = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        torch.from_numpy(distance), bidirectional=bidirectional
    ).numpy()
    table = bucket_table(16 if bidirectional else 32, 128)
    if bidirectional:
        got = table[np.minimum(np.abs(distance), 128)] + 16 * (distance > 0)
    else:
        got = table[np.clip(-distance, 0, 128)]
    np.testing.assert_array_equal(got, want)


@pytest.fixture(scope="module")
def untied():
    model = _torch_model("gated-gelu", tied=False)
    config = hf.config_from_huggingface(model.config.to_dict())
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    return model, config, state


def test_mapping_round_trip(untied):
    _, config, state = untied
    params = hf.params_from_huggingface(state, config)
    back = hf.params_to_huggingface(params, config)
    assert set(state) - set(back) == {
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
    }
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name])
    # Every parameter of ours is filled, and in both layouts.
    abstract = jax.eval_shape(
        lambda: models.init_params(models.T5(config), jax.random.key(0))
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract)
    scan = hf.config_from_huggingface(
        hf.config_to_huggingface(config), scan_layers=True
    )
    stacked = hf.params_from_huggingface(state, scan)
    chex.assert_trees_all_equal(stacked, models.stack_layers(params))
    for name, value in hf.params_to_huggingface(stacked, scan).items():
        np.testing.assert_array_equal(value, state[name])


@pytest.mark.parametrize("form", ["safetensors", "sharded", "torch", "bfloat16"])
def test_loads_a_folder(untied, form, tmp_path):
    model, config, state = untied
    want = state
    if form == "torch":
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    elif form == "bfloat16":
        import ml_dtypes
        from safetensors.torch import save_file

        model.config.save_pretrained(tmp_path)
        half = {k: v.bfloat16().clone() for k, v in model.state_dict().items()}
        save_file(half, tmp_path / "model.safetensors")
        want = {
            k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in state.items()
        }
    else:
        size = "20KB" if form == "sharded" else "1GB"
        model.save_pretrained(tmp_path, max_shard_size=size)
        shards = len(list(tmp_path.glob("*.safetensors")))
        assert shards > 1 if form == "sharded" else shards == 1
    loaded, params = hf.load_huggingface(tmp_path, dtype="bfloat16")
    assert loaded.dtype == "bfloat16"
    chex.assert_trees_all_equal(params, hf.params_from_huggingface(want, config))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}


def test_saved_folder_is_read_by_transformers(untied, tmp_path):
    model, config, state = untied
    params = hf.params_from_huggingface(state, config)
    hf.save_huggingface(tmp_path, config, params)
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    for name, value in again.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[name], err_msg=name)
    assert again.config.scale_decoder_outputs == model.config.scale_decoder_outputs


def test_refuses_what_does_not_fit(untied, tmp_path):
    _, config, state = untied
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    renamed = {k.replace("0.SelfAttention.q.", "0.SelfAttention.qq."): v
               for k, v in state.items()}  # fmt: skip
    with pytest.raises(ValueError, match=rf"lacks '{name}'.*nearest: '.*qq\.weight'"):
        hf.params_from_huggingface(renamed, config)
    with pytest.raises(ValueError, match=r"must have shape \(20, 18\).*\(20, 17\)"):
        hf.params_from_huggingface(state | {name: state[name][:17]}, config)
    with pytest.raises(ValueError, match=r"1 names .* no place for.*'adapter'"):
        hf.params_from_huggingface(state | {"adapter": np.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"'t5' or 'mt5', got 'umt5'"):
        hf.config_from_huggingface({"model_type": "umt5"})
    with pytest.raises(ValueError, match=r"config.json lacks 'vocab_size'"):
        hf.config_from_huggingface({"d_model": 3})
    with pytest.raises(FileNotFoundError, match=r"with a config\.json"):
        hf.load_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"vocab_size": 4, "d_model": 4, "num_heads": 1, "d_kv": 4, "d_ff": 4, '
        '"num_layers": 1}'
    )
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        hf.load_huggingface(tmp_path)


def test_tied_but_unscaled_head_is_the_embedding(untied):
    _, config, state = untied
    state = {k: v for k, v in state.items() if k != "lm_head.weight"}
    params = hf.params_from_huggingface(state, config)
    np.testing.assert_array_equal(
        params["decoder"]["logits_dense"]["kernel"], state["shared.weight"].T
    )


def test_mt5_folders_of_transformers_4_and_5_are_the_same_network(tmp_path):
    from safetensors.torch import save_file

    sizes = dict(vocab_size=30, d_model=8, num_heads=2, d_kv=4, d_ff=8, num_layers=1)
    model = transformers.MT5ForConditionalGeneration(transformers.MT5Config(**sizes))
    generator = torch.Generator().manual_seed(0)
    state = {
        k: 0.3 * torch.randn(v.shape, generator=generator)
        for k, v in model.state_dict().items()
    }
    for stack in ("encoder", "decoder"):
        state[f"{stack}.embed_tokens.weight"] = state["shared.weight"].clone()
    old = model.config.to_dict() | {
        "tie_word_embeddings": False,
        "transformers_version": "4.11.0",
        "architectures": ["MT5ForConditionalGeneration"],
    }
    (tmp_path / "old").mkdir()
    save_file(state, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "old" / "config.json").write_text(json.dumps(old))
    model = transformers.MT5ForConditionalGeneration.from_pretrained(tmp_path / "old")
    model.save_pretrained(tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "config.json").read_text())
    assert saved["tie_word_embeddings"] and "scale_decoder_outputs" not in saved

    config, params = hf.load_huggingface(tmp_path / "new")
    assert config == hf.load_huggingface(tmp_path / "old")[0]
    chex.assert_trees_all_equal(params, hf.load_huggingface(tmp_path / "old")[1])
    assert not config.logits_via_embedding
    prompt, answer = np.array([[5, 6, 7, 1]]), np.array([[0, 9, 8]])
    with torch.no_grad():
        want = model.eval()(
            input_ids=torch.from_numpy(prompt),
            decoder_input_ids=torch.from_numpy(answer),
        ).logits.numpy()
    batch = {
        "encoder_input_tokens": prompt,
        "encoder_segment_ids": np.ones_like(prompt),
        "decoder_input_tokens": answer[None],
        "decoder_segment_ids": np.ones_like(answer)[None],
        "response_prompt": np.zeros((1, 1), "i4"),
    }
    got = models.T5(config).apply({"params": params}, batch)
    np.testing.assert_allclose(np.asarray(got)[:, 0], want, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"layer_norm_epsilon": 1e-5}, r"layer_norm_epsilon=1e-06, got 1e-05"),
        ({"decoder_start_token_id": 2}, r"decoder_start_token_id=0, got 2"),
        ({"dense_act_fn": "silu"}, r"dense_act_fn='relu' with .*'relu', got 'silu'"),
        ({"is_gated_act": True}, r"is_gated_act=False with feed_forward_proj='relu'"),
        ({"is_encoder_decoder": False}, r"is_encoder_decoder=True, got False"),
        ({"feed_forward_proj": "gelu"}, r"feed_forward_proj must be one of"),
        ({"relative_attention_max_distance": 16}, r"must exceed half of the 32"),
    ],
)
def test_a_config_of_another_function_is_refused(fields, told):
    config = dict(
        vocab_size=8, d_model=4, num_heads=1, d_kv=4, d_ff=4, num_layers=1,
        feed_forward_proj="relu", layer_norm_epsilon=1e-6, decoder_start_token_id=0,
        dense_act_fn="relu", is_gated_act=False,
    )  # fmt: skip
    hf.config_from_huggingface(config)
    with pytest.raises(ValueError, match=told):
        hf.config_from_huggingface(config | fields)


@pytest.mark.parametrize("name", ["lm_head", "encoder.embed_tokens"])
def test_a_second_embedding_is_not_lost(untied, name):
    _, config, state = untied
    tied = dataclasses.replace(config, logits_via_embedding=True)
    other = {**state, "lm_head.weight": state["shared.weight"]}
    other[f"{name}.weight"] = state["shared.weight"] + 1
    with pytest.raises(ValueError, match=rf"'{name}.weight' differs from 'shared"):
        hf.params_from_huggingface(other, tied)
