# SPDX-License-Identifier: Apache-2.0
"""model.generate with a key-value cache: a converted model says what the merged one says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lors_cuda import disable_adapter, merge_and_unload, merge_cache
from models import fill_adapters, tokens, trained

NEW_TOKENS = 24


def generate(model: nn.Module, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy continuations of two prompts: all tokens [2, 8 + 24], logits of each new token [24, 2, 64]."""
    output = model.generate(
        tokens(3, length=8),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapted_and_merged_generate_the_same(dtype, layout):
    model = trained(dtype, layout=layout).eval()
    fill_adapters(model, size=0.3)
    adapted, adapted_logits = generate(model)
    assert adapted.shape == (2, 8 + NEW_TOKENS)
    with disable_adapter(model):
        frozen, _ = generate(model)
    assert not torch.equal(frozen, adapted), "the adapters must change what is said for this test to mean anything"
    assert all(len(set(row.tolist())) > 8 for row in adapted), "a text that repeats itself says little"

    merged, merged_logits = generate(merge_and_unload(copy.deepcopy(model)))
    assert torch.equal(merged, adapted)
    # The adapted forward rounds W~ once to the weight's dtype, exactly as the merged weight is: in bfloat16, where both
    # are then the same products, nothing else differs. In float32 sums may run in another order, over fourteen layers.
    tolerance = 4 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(adapted_logits, merged_logits, rtol=tolerance, atol=tolerance)
    with merge_cache(model):
        cached, cached_logits = generate(model)
    assert torch.equal(cached, adapted)
    torch.testing.assert_close(cached_logits, merged_logits, rtol=tolerance, atol=tolerance)


def test_the_key_value_cache_changes_nothing():
    model = trained().eval()
    fill_adapters(model, size=0.3)
    with_cache, cached_logits = generate(model, use_cache=True)
    without, plain_logits = generate(model, use_cache=False)
    assert torch.equal(with_cache, without)
    # One token at a time or all at once: attention and products sum in another order, layer after layer.
    tolerance = 32 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(cached_logits, plain_logits, rtol=tolerance, atol=tolerance)
