"""The examples' default model and data: a small pruned Llama, and real text."""

from __future__ import annotations

import pydoc_data.topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lors_cuda.pruning import prune


def pruned_llama(vocab_size: int = 384, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama with random weights, pruned to 2:4; 384 tokens are those of ByT5Tokenizer, which needs no files."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).to(dtype)
    prune(model, "2:4", method="magnitude", progress=False)
    return model


def documentation(topics: int = 40) -> list[str]:
    """Topics of Python's own documentation, which every installation has."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())[:topics]]
