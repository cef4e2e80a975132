# SPDX-License-Identifier: Apache-2.0
"""model.generate with a key-value cache: a converted model says what the merged one says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lors_cuda import disable_adapter, merge_and_unload, merge_cache
from models import fill_adapters, tokens, trained
from tolerance import assert_close

PROMPT, NEW_TOKENS = 8, 24
DRAWS = 16


def generate(model: nn.Module, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy continuations of two prompts: all tokens [2, 8 + 24], logits of each new token [2, 24, 64]."""
    prompt = tokens(3, length=PROMPT)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # token 0 is in it, and is no padding
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return output.sequences, torch.stack(output.logits, 1)


class Float64:
    """A plain float32 Llama in float64 throughout, and how far float32 sums may be from its logits.

    An error of a hidden state is one of every term of the sums behind it, whose own terms may cancel: no bound is
    relative to a logit. So what tolerance.py says of one sum, sqrt(n) u rms, is put on the output of every linear as
    random numbers, and what becomes of them in the logits is their spread.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).double()
        for name, module in list(self.model.named_modules()):
            if type(module).__name__ == "LlamaRMSNorm":  # whose forward is float32 whatever its weight is
                norm = nn.RMSNorm(module.weight.shape, module.variance_epsilon, dtype=torch.float64)
                norm.weight = module.weight
                self.model.set_submodule(name, norm)
            elif isinstance(module, nn.Linear):
                module.register_forward_hook(self._disturb)
        self.size = 0.0
        self.generator = torch.Generator().manual_seed(0)

    def _disturb(self, linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        rms = (inputs[0] ** 2 @ (linear.weight**2).T).sqrt()
        length = 2 * linear.in_features  # the norm or the attention in front of it is a sum as long
        noise = torch.randn(output.shape, dtype=torch.float64, generator=self.generator)
        return output + self.size * length**0.5 * rms * noise

    @torch.no_grad()
    def check(self, sequences: Tensor, logits: Tensor, what: str) -> None:
        """Refuse logits of these sequences' new tokens that are off by more than the rounding of float32 sums."""

        def computed(size: float) -> Tensor:
            self.size = size
            return self.model(sequences).logits[:, PROMPT - 1 : -1]

        expected, size = computed(0.0), 2.0**-30
        spread = torch.stack([computed(size) - expected for _ in range(DRAWS)]).square().mean(0).sqrt() / size
        assert_close(logits, expected, rms=spread, length=1, dtype=torch.float32, what=what)


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

    merged_model = merge_and_unload(copy.deepcopy(model))
    merged, merged_logits = generate(merged_model)
    assert torch.equal(merged, adapted)
    with merge_cache(model):
        cached, cached_logits = generate(model)
    assert torch.equal(cached, adapted)
    all_logits = {"adapted": adapted_logits, "merged": merged_logits, "cached": cached_logits}
    if dtype == torch.bfloat16:
        # The adapted forward rounds W~ once to the weight's dtype, exactly as the merged weight is: they are the same
        # products, and nothing else differs.
        tolerance = 4 * torch.finfo(dtype).eps
        for each in all_logits.values():
            torch.testing.assert_close(each, merged_logits, rtol=tolerance, atol=tolerance)
    else:
        # Sums may run in another order, over fourteen layers.
        oracle = Float64(merged_model)
        for what, each in all_logits.items():
            oracle.check(adapted, each, what)


def test_the_key_value_cache_changes_nothing():
    model = trained().eval()
    fill_adapters(model, size=0.3)
    with_cache, cached_logits = generate(model, use_cache=True)
    without, plain_logits = generate(model, use_cache=False)
    assert torch.equal(with_cache, without)
    # One token at a time or all at once: attention and products sum in another order, layer after layer.
    oracle = Float64(merge_and_unload(model))
    oracle.check(with_cache, cached_logits, "with the cache")
    oracle.check(with_cache, plain_logits, "without")
