# SPDX-License-Identifier: Apache-2.0
# Tiny models of transformers' families, from configurations, and batches for them: what differs between them is how
# they keep their weights (Conv1D, subclasses of nn.Linear, experts as parameters, tied and shared weights, heads).
"""Tiny models of many families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 384  # of byte_tokenizer
_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT = {**_SIZES, "intermediate_size": 64}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "max_position_embeddings": 64}
_EXPERTS = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}

FAMILIES: dict[str, Callable[[Any], nn.Module]] = {
    "gpt2": lambda t: t.GPT2LMHeadModel(
        t.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=1,
            eos_token_id=1,
        )
    ),
    "falcon": lambda t: t.FalconForCausalLM(t.FalconConfig(**_SIZES)),
    "bloom": lambda t: t.BloomForCausalLM(t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)),
    "mamba": lambda t: t.MambaForCausalLM(
        t.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4)
    ),
    "xlnet": lambda t: t.XLNetLMHeadModel(
        t.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=64)
    ),
    "mixtral": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**_LLAMA, num_local_experts=4)),
    "qwen2_moe": lambda t: t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**_LLAMA, **_EXPERTS)),
    "gpt_oss": lambda t: t.GptOssForCausalLM(t.GptOssConfig(**_LLAMA, num_local_experts=4, head_dim=8)),
    "llama4": lambda t: t.Llama4ForCausalLM(
        t.Llama4TextConfig(**_LLAMA, intermediate_size_mlp=64, num_local_experts=4, head_dim=8)
    ),
    "dbrx": lambda t: t.DbrxForCausalLM(
        t.DbrxConfig(
            d_model=32,
            n_heads=4,
            n_layers=2,
            vocab_size=VOCABULARY,
            max_seq_len=64,
            attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        )
    ),
    "jetmoe": lambda t: t.JetMoeForCausalLM(
        t.JetMoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=8,
            intermediate_size=32,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    ),
    "gemma3": lambda t: t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(
            text_config={**_LLAMA, "head_dim": 8},
            vision_config=dict(_VISION),
            mm_tokens_per_image=4,
            image_token_index=5,
        )
    ),
    "bert": lambda t: t.BertForMaskedLM(t.BertConfig(**_BERT)),
    "albert": lambda t: t.AlbertForMaskedLM(t.AlbertConfig(**_BERT, embedding_size=32)),
    "bert classifier": lambda t: t.BertForSequenceClassification(t.BertConfig(**_BERT)),
    "bert answers": lambda t: t.BertForQuestionAnswering(t.BertConfig(**_BERT)),
    "roberta classifier": lambda t: t.RobertaForSequenceClassification(t.RobertaConfig(**_BERT)),
    "t5": lambda t: t.T5ForConditionalGeneration(t.T5Config(**_T5)),
    "switch": lambda t: t.SwitchTransformersForConditionalGeneration(
        t.SwitchTransformersConfig(
            **_T5, num_experts=4, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
        )
    ),
    "vit": lambda t: t.ViTForImageClassification(t.ViTConfig(**_VISION)),
}
_WITHOUT_TEXT = ("vit",)


def family(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A tiny model and a batch of token numbers for it; no batch where it takes none."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = FAMILIES[name](transformers).eval()
    if name in _WITHOUT_TEXT:
        return model, []
    ids = torch.randint(6, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    return model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}]
