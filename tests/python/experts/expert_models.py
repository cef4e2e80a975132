# SPDX-License-Identifier: Apache-2.0
# Tiny mixtures of experts, one of each kind that transformers has: gated; with shared experts and dense layers;
# transposed with biases; without a gate; with a norm after the experts.
"""Tiny models with experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lors_cuda.experts import expert_stacks, stack_of

VOCABULARY = 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}


def _muse_spark(t: Any) -> nn.Module:
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkTextModel

    config = t.MuseSparkTextConfig(
        **_SIZES, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, moe_hidden_size=24
    )
    return MuseSparkTextModel(config)


EXPERT_MODELS: dict[str, Callable[[Any], nn.Module]] = {
    "mixtral": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**_SIZES, num_local_experts=4)),
    "qwen3_moe": lambda t: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**_SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
    "deepseek_v3": lambda t: t.DeepseekV3ForCausalLM(
        t.DeepseekV3Config(
            **{**_SIZES, "num_key_value_heads": 4, "head_dim": 4},  # here of the rotated part
            **_ROUTED,
            n_shared_experts=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    ),
    "gpt_oss": lambda t: t.GptOssForCausalLM(
        t.GptOssConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, rope_parameters={"rope_type": "default"})
    ),
    "nemotron_h": lambda t: t.NemotronHForCausalLM(
        t.NemotronHConfig(
            **{key: value for key, value in _SIZES.items() if key != "num_hidden_layers"},
            **_ROUTED,
            layers_block_type=["attention", "moe"],
            moe_shared_expert_intermediate_size=16,
            mamba_num_heads=4,
            mamba_head_dim=8,
            ssm_state_size=8,
        )
    ),
    "muse_spark": _muse_spark,
}


def experts_model(name: str, dtype: torch.dtype = torch.float32, *, sparse: bool = True) -> nn.Module:
    """A tiny model in evaluation, 2:4 sparse in its linears (but for the output head) and experts if ``sparse``; its
    biases of experts are not zero, and its experts run by transformers' eager code."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = EXPERT_MODELS[name](transformers).to(dtype).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "experts" in key and key.endswith("_bias"):
                parameter.normal_(std=0.1)
        if sparse:
            for key, module in model.named_modules():
                if isinstance(module, nn.Linear) and not key.endswith("lm_head"):
                    module.weight.copy_(two_of_four(module.weight))
            for _, module, parameter_name in expert_stacks(model):
                stack = stack_of(module, parameter_name)
                stack.copy_(two_of_four(stack))
    return model


def two_of_four(weight: Tensor) -> Tensor:
    """The weight without the two smaller of every four along its last dimension."""
    groups = weight.reshape(-1, 4)
    return groups.scatter(1, groups.abs().argsort(1)[:, :2], 0.0).view(weight.shape)


def token_batch(seed: int = 0, batch: int = 2, length: int = 9) -> Tensor:
    """Random token numbers [batch, length]."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """A scalar to differentiate: the language-modelling loss, or, without a head, one of the normed states."""
    if model.get_output_embeddings() is None:
        return model(input_ids=ids).last_hidden_state.tanh().square().mean()
    return model(input_ids=ids, labels=ids).loss
