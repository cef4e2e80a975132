# SPDX-License-Identifier: Apache-2.0
"""Families of transformers, tiny: the default configuration converts each, and adapted = merged = reloaded."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lors_cuda import LoRSConfig, get_lors_model, load_adapter, merge_and_unload, named_lors_layers, save_adapter
from lors_cuda._linears import is_linear, weight_of
from models import fill_adapters

T = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
MOE = DECODER | {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
PICTURE = {**SIZES, "image_size": 16, "patch_size": 8, "num_channels": 3}
VISION = {name: value for name, value in PICTURE.items() if name != "vocab_size"}
SOUND = SIZES | {
    "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
SEQUENCE = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
GPT = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
ALIBI = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
STATES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
SELECTIVE = STATES | {"state_size": 4, "time_step_rank": 16}
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS}
PAIR = {"input_ids": IDS, "decoder_input_ids": IDS}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}
WAVE = {"input_values": torch.linspace(0, 50, 800).sin().view(1, 800)}

# name: (model, configuration, fields, inputs)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor]]] = {
    # decoders
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, TEXT),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"tie_word_embeddings": True}, TEXT),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER, TEXT),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER, TEXT),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER | {"head_dim": 8}, TEXT),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", DECODER | {"head_dim": 8}, TEXT),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER | {"head_dim": 8}, TEXT),
    "phi": ("PhiForCausalLM", "PhiConfig", DECODER, TEXT),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", DECODER, TEXT),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", DECODER, TEXT),
    "cohere": ("CohereForCausalLM", "CohereConfig", DECODER, TEXT),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES | {"max_position_embeddings": 64}, TEXT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT, TEXT),
    "openai-gpt": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT, TEXT),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 8}, TEXT),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        ALIBI | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, TEXT,
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", STATES | {"num_attention_heads": 4}, TEXT),
    "falcon": ("FalconForCausalLM", "FalconConfig", ALIBI, TEXT),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", DECODER, TEXT),
    # mixtures of experts
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", DECODER | {"num_local_experts": 4}, TEXT),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", MOE | {"num_experts": 4, "shared_expert_intermediate_size": 32}, TEXT,
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE | {"num_experts": 4, "head_dim": 8}, TEXT),
    "qwen3-next": (
        "Qwen3NextForCausalLM", "Qwen3NextConfig",
        MOE | {"num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2,
               "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
               "layer_types": ["linear_attention", "full_attention"]}, TEXT,
    ),
    "llama4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        DECODER | {"intermediate_size_mlp": 64, "num_local_experts": 4, "head_dim": 8}, TEXT,
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        MOE | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
               "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
               "first_k_dense_replace": 1}, TEXT,
    ),
    "switch": (
        "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
        T5 | {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
              "num_experts": 4}, PAIR,
    ),
    # state spaces and other recurrences
    "mamba": ("MambaForCausalLM", "MambaConfig", SELECTIVE, TEXT),
    "mamba2": (
        "Mamba2ForCausalLM", "Mamba2Config",
        STATES | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}, TEXT,
    ),
    "falcon-mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", SELECTIVE, TEXT),
    "jamba": (
        "JambaForCausalLM", "JambaConfig",
        DECODER | {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 16, "attn_layer_period": 2,
                   "attn_layer_offset": 1, "use_mamba_kernels": False}, TEXT,
    ),
    "rwkv": (
        "RwkvForCausalLM", "RwkvConfig",
        STATES | {"attention_hidden_size": 32, "intermediate_size": 64, "context_length": 64, "rescale_every": 1},
        TEXT | {"use_cache": False},
    ),
    # encoders
    "bert": ("BertForMaskedLM", "BertConfig", SIZES, TEXT),
    "bert-qa": ("BertForQuestionAnswering", "BertConfig", SIZES, TEXT),
    "roberta-cls": ("RobertaForSequenceClassification", "RobertaConfig", SIZES, TEXT),
    "distilbert": (
        "DistilBertForMaskedLM", "DistilBertConfig",
        {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}, TEXT,
    ),
    "electra": ("ElectraForPreTraining", "ElectraConfig", SIZES | {"embedding_size": 16}, TEXT),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", SIZES | {"embedding_size": 16}, TEXT),
    "deberta": ("DebertaModel", "DebertaConfig", SIZES, TEXT),
    "deberta-v2": ("DebertaV2Model", "DebertaV2Config", SIZES, TEXT),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", SIZES | {"pad_token_id": 0}, TEXT),
    "mobilebert": (
        "MobileBertModel", "MobileBertConfig",
        SIZES | {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16}, TEXT,
    ),
    # encoder-decoders
    "t5": ("T5ForConditionalGeneration", "T5Config", T5 | {"feed_forward_proj": "gated-gelu"}, PAIR),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQUENCE, PAIR),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", SEQUENCE, PAIR),
    # vision, and vision with text
    "vit": ("ViTForImageClassification", "ViTConfig", VISION, IMAGE),
    "dinov2": ("Dinov2Model", "Dinov2Config", VISION, IMAGE),
    "swin": (
        "SwinModel", "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        IMAGE,
    ),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", VISION, IMAGE),
    "clip": (
        "CLIPModel", "CLIPConfig",
        {"text_config": SIZES | {"max_position_embeddings": 64, "eos_token_id": 2}, "vision_config": VISION,
         "projection_dim": 16}, TEXT | IMAGE,
    ),
    "gemma3-vision": (
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {"text_config": DECODER | {"head_dim": 8}, "vision_config": VISION, "mm_tokens_per_image": 4,
         "image_token_index": 5}, TEXT,
    ),
    # audio
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        SEQUENCE | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        {"input_features": torch.linspace(-1, 1, 256).view(1, 8, 32), "decoder_input_ids": IDS[:1]},
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", SOUND, WAVE),
    "hubert": ("HubertForCTC", "HubertConfig", SOUND, WAVE),
    "wavlm": ("WavLMForCTC", "WavLMConfig", SOUND, WAVE),
}  # fmt: skip


LEAVING_OUT = {
    "qwen2-moe", "qwen3-next", "mamba", "mamba2", "falcon-mamba", "jamba", "bert-qa", "roberta-cls", "electra",
    "siglip", "gemma3-vision", "wavlm", "rwkv",
}  # fmt: skip


def family(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny pruned model of the family in evaluation, and its inputs; skips where this transformers lacks it."""
    kind, config, fields, inputs = FAMILIES[name]
    if not hasattr(T, kind):
        pytest.skip(f"transformers {T.__version__} has no {kind}")
    torch.manual_seed(0)
    model = getattr(T, kind)(getattr(T, config)(**fields)).eval()
    with torch.no_grad():
        for module in model.modules():
            if is_linear(module):
                weight = weight_of(module)
                weight *= 1 + (torch.rand_like(weight) > 0.5)  # larger than the initialisation, so that adapters matter
                weight[:, ::2] = 0.0
    return model, inputs


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Every number that the model returns, in one row."""
    tensors = [value for value in model(**inputs).to_tuple() if isinstance(value, Tensor)]
    return torch.cat([value.flatten().float() for value in tensors])


@pytest.mark.parametrize("name", FAMILIES)
def test_adapted_merged_and_reloaded_agree(name, tmp_path):
    model, inputs = family(name)
    with torch.no_grad():
        plain = outputs(model, inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_lors_model(model)
    assert sum("leaves out" in str(each.message) for each in caught) == (name in LEAVING_OUT)
    layers = dict(named_lors_layers(model))
    fill_adapters(model, size=0.2)
    called = set()
    for path, layer in layers.items():
        layer.register_forward_hook(lambda *_, path=path: called.add(path))
    adapted = outputs(model, inputs)
    assert not torch.allclose(adapted, plain, atol=1e-3), "else the comparisons below would prove nothing"
    adapted.square().sum().backward()
    # An expert without tokens, or an image's encoder without an image, may be out of reach; a layer that runs learns.
    assert called == {path for path, layer in layers.items() if layer.lora_B.grad is not None}
    save_adapter(model, tmp_path)
    merge_and_unload(model)
    with torch.no_grad():
        torch.testing.assert_close(outputs(model, inputs), adapted.detach(), rtol=1e-3, atol=1e-4)
        again = load_adapter(family(name)[0], tmp_path)
        torch.testing.assert_close(outputs(again, inputs), adapted.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "falcon", "qwen2-moe", "mamba", "siglip", "wavlm", "roberta-cls"])
def test_peft_adapts_the_same_layers_and_merges_them(name):
    peft = pytest.importorskip("peft")
    from peft_models import LoRSLoraConfig, fill, layers

    ours, (theirs, inputs) = family(name)[0], family(name)
    get_lors_model(ours)
    model = peft.get_peft_model(theirs, LoRSLoraConfig(r=16, target_modules="all-linear"))
    assert list(layers(model)) == [path for path, _ in named_lors_layers(ours)]
    fill(model.eval(), size=0.2)
    with torch.no_grad():
        adapted = outputs(model, inputs)
        torch.testing.assert_close(outputs(model.merge_and_unload(), inputs), adapted, rtol=1e-3, atol=1e-4)


LEFT_OUT = {
    "wavlm": ("attention.q_proj", "WavLMAttention.torch_multi_head_self_attention"),
    "mamba": ("mixer.dt_proj", "MambaMixer.forward"),
    "mamba2": ("mixer.out_proj", "Mamba2Mixer.forward"),
    "rwkv": ("attention.output", "RwkvModel._rescale_layers"),
    "siglip": ("head.attention.out_proj", "MultiheadAttention.forward"),
    "qwen2-moe": ("mlp.shared_expert_gate", "r is 16; for a layer of 1 x 32"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_named_with_its_reason(name):
    suffix, reason = LEFT_OUT[name]
    model, _ = family(name)
    with pytest.warns(UserWarning, match="leaves out") as caught:
        get_lors_model(model)
    text = str(caught[0].message)
    assert suffix in text
    assert reason in text
    if "r is" in reason:
        return
    with pytest.raises(ValueError, match="cannot be adapted"):
        get_lors_model(family(name)[0], LoRSConfig(r=1, target_modules=[suffix]))


@pytest.mark.parametrize(
    ("name", "router", "reason"),
    [
        ("llama4", "feed_forward.router", "a forward of its own"),
        ("switch", "mlp.router.classifier", "is the router of"),
    ],
)
def test_routers_of_experts_that_are_not_adapted_are_left_alone(name, router, reason):
    model, _ = family(name)
    assert any(path.endswith(router) for path, _ in model.named_modules())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*leaves out")
        get_lors_model(model)
    assert not any(path.endswith(router) for path, _ in named_lors_layers(model))
    with pytest.raises(ValueError, match=reason):
        get_lors_model(family(name)[0], LoRSConfig(r=1, target_modules=[router]))
