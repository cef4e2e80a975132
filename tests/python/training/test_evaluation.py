# SPDX-License-Identifier: Apache-2.0
"""Perplexity: every token counts once, whatever its batch."""

from __future__ import annotations

import math

import pytest
import torch

from byte_model import TEXT, byte_llama, byte_tokenizer
from lors_cuda.data import TokenDataset
from lors_cuda.evaluation import evaluate
from models import refused


@pytest.fixture(scope="module")
def padded() -> TokenDataset:
    records = [(i, {"prompt": TEXT[i : i + 9], "completion": TEXT[40 : 45 + 6 * i]}) for i in range(7)]
    return TokenDataset.from_records(records, byte_tokenizer(), 64)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_perplexity_weighs_tokens_and_ignores_padding(padded, batch_size):
    model = byte_llama()
    model.train()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in padded.examples:
            log_probabilities = model(input_ids=ids.long()[None]).logits[0].double().log_softmax(-1)
            for position in range(1, len(ids)):
                if labels[position] >= 0:
                    total -= log_probabilities[position - 1, labels[position]].item()
                    count += 1
    measured = evaluate(model, padded, batch_size=batch_size)
    assert measured.tokens == count == padded.loss_tokens
    assert measured.loss == pytest.approx(total / count, rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert model.training
    assert model.config.use_cache


def test_perplexity_of_a_broken_model_is_an_error(padded):
    model = byte_llama()
    model.model.norm.weight.data[0] = math.nan
    refused(FloatingPointError, lambda: evaluate(model, padded), "on the records is nan", "Check the weights")
