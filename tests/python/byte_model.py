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
