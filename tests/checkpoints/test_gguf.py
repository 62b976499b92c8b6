"""A GGUF source gives the tensors that transformers loads from the same file."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_moe.checkpoints import gguf as streaming_gguf
from modeling_moe.checkpoints import open_source
from modeling_moe.utils.errors import UserError


HIDDEN, WIDTH, HEADS, KV_HEADS, VOCAB, LAYERS = 64, 96, 4, 2, 50, 2


def write_llama(file, tied=True, without=()):
    """Writes a Llama model in GGUF: matrices in Q8_0 and F16, norms in F32."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    shapes |= {} if tied else {"output.weight": (VOCAB, HIDDEN)}
    kv_width = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (kv_width, HIDDEN),
            f"blk.{layer}.attn_v.weight": (kv_width, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate.weight": (WIDTH, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (WIDTH, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, WIDTH),
        }
    for name, shape in shapes.items():
        values = generator.standard_normal(shape, dtype=np.float32)
        if name in without:
            continue
        if len(shape) == 1:
            writer.add_tensor(name, values)
        elif "ffn_up" in name:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_equals_what_transformers_loads(tmp_path, monkeypatch, tied):
    monkeypatch.setattr(streaming_gguf, "BLOCK", 2000)  # the embeddings are read in several pieces
    write_llama(tmp_path / "tiny.gguf", tied)
    state = open_source(tmp_path, "tiny.gguf").state
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").state_dict()
    if tied:
        expected.pop("lm_head.weight")
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (state[name].shape, state[name].dtype) == (tuple(tensor.shape), torch.float32)
        assert torch.equal(state[name].read(), tensor), name
        assert torch.equal(torch.cat([chunk.reshape(-1) for chunk in state[name].chunks()]), tensor.reshape(-1))
        assert torch.equal(state[name][5:20].read(), tensor[5:20])
    assert len(state["model.embed_tokens.weight"].parts) == 8
    columns = state["model.embed_tokens.weight"][3:7, 10:20]
    assert torch.equal(columns.read(), expected["model.embed_tokens.weight"][3:7, 10:20])


def test_file_without_a_tensor(tmp_path):
    write_llama(tmp_path / "tiny.gguf", without=("blk.1.ffn_up.weight",))
    with pytest.raises(UserError, match=r"lacks model.layers.1.mlp.up_proj.weight"):
        open_source(tmp_path, "tiny.gguf")


@pytest.mark.parametrize("keep", [3, 200, -5000])
def test_truncated_file(tmp_path, keep):
    write_llama(tmp_path / "tiny.gguf")
    file = tmp_path / "tiny.gguf"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"tiny.gguf cannot be read as a GGUF file"):
        open_source(tmp_path, "tiny.gguf")


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"gguf_file none\.gguf is not in"):
        open_source(tmp_path, "none.gguf")
