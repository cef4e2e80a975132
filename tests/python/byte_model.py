# SPDX-License-Identifier: Apache-2.0
# A Llama on byte-level tokens (ByT5's tokenizer needs no files) and texts for it: data, pruning, training, cli tests.
"""A small byte-level language model that several test files share."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

import pytest
import torch
from torch import nn

TEXT = "".join(f"{number} bottles of beer on the wall, {number} bottles of beer.\n" for number in range(60))


def byte_tokenizer():
    """ByT5's tokenizer: byte b is token b + 3; EOS is 1, there is no BOS."""
    return pytest.importorskip("transformers").ByT5Tokenizer()


def fast_tokenizer(adds: str = "nothing", template: str | None = None, words: tuple[str, ...] = ()):
    """A tokenizer by bytes (and ``words``) in Rust: <pad> 0, <s> 1, </s> 2; it adds "bos" or "bos and eos" to texts."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    level = tokenizers.pre_tokenizers.ByteLevel
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(special) + 256 + len(words), special_tokens=special, initial_alphabet=level.alphabet()
    )
    made.train_from_iterator(words, trainer)
    if adds != "nothing":
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>" if adds == "bos and eos" else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def byte_llama(seed: int = 0, layers: int = 2, **fields) -> nn.Module:
    """A dense Llama with hidden size 32 for byte_tokenizer, 128 positions."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 384,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.1,
            **fields,
        }
    )
    return transformers.LlamaForCausalLM(config).eval()


@contextlib.contextmanager
def full_disk(free: int = 0) -> Iterator[None]:
    """Make every write beyond ``free`` bytes of a file fail with an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
