# SPDX-License-Identifier: Apache-2.0
"""What a conversion warns of: nothing sparse, experts without adapters, a new head that stays frozen; and when not."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import nn

from families import family
from lors_cuda import LoRSConfig, get_lors_model
from lors_cuda.pruning import prune
from models import prune_two_of_four, tiny_llama, tiny_net

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def by_library(model: nn.Module, **fields) -> None:
    get_lors_model(model, LoRSConfig(r=2, **fields))


def by_peft(model: nn.Module, **fields) -> None:
    from lors_cuda.peft import LoRSLoraConfig

    peft.get_peft_model(model, LoRSLoraConfig(r=2, **{"target_modules": "all-linear", **fields}))


both_doors = pytest.mark.parametrize("convert", [by_library, by_peft])


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# ---- nothing sparse ----


@both_doors
@pytest.mark.parametrize("layout", ["auto", "dense", "bitmap"])
def test_a_dense_model_is_noticed(convert, layout):
    net = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
    net[0].weight.data[3, 5] = 0  # as a model that was never pruned may have
    with pytest.warns(UserWarning, match=r"Nothing is sparse: 0\.03% of the weights of the 2 adapted layers are zero"):
        convert(net, layout=layout, target_modules=["0", "1"])


@both_doors
def test_only_the_adapted_linears_count(convert):
    net = nn.Sequential(prune_two_of_four(nn.Linear(64, 32)), nn.Linear(32, 32))
    with pytest.warns(UserWarning, match="of the 1 adapted layers"):
        convert(net, target_modules=["1"])


@both_doors
@pytest.mark.parametrize("layout", ["auto", "dense", "2:4", "bitmap"])
def test_a_sparse_model_is_converted_without_a_word(convert, layout):
    with no_warning():
        convert(tiny_llama(), layout=layout)
        convert(tiny_net(), layout=layout, target_modules=["0", "2"])


def test_a_base_that_is_already_compressed_and_dense_is_noticed():
    from lors_cuda import SparseLinear

    net = nn.Sequential(SparseLinear.compress(nn.Linear(64, 32), "bitmap"))
    with pytest.warns(UserWarning, match="Nothing is sparse"):
        by_peft(net, target_modules=["0"])


# ---- experts ----


@both_doors
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_named_with_their_share(convert, name):
    model, _ = family(name)
    prune_two_of_four(model)
    share = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_proj"))
    biases = tuple(f"{name}_bias" for name in ("gate_up_proj", "down_proj"))  # [E, N]: vectors
    share /= sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith(biases))
    with pytest.warns(UserWarning, match=rf"experts .*get no adapters.* {share:.1%} of the model's weights, and 0.00%"):
        convert(model, target_modules=["q_proj", "o_proj"])


# ---- heads ----


def classifier(kind: str = "BertForSequenceClassification") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    return prune_two_of_four(getattr(transformers, kind)(config))


HEADS = {
    "BertForSequenceClassification": "classifier",
    "BertForTokenClassification": "classifier",
    "BertForQuestionAnswering": "qa_outputs",
    "BertForNextSentencePrediction": "cls",
}


@both_doors
@pytest.mark.parametrize("kind", HEADS)
def test_a_new_head_is_named_unless_it_is_trained(convert, kind):
    head = HEADS[kind]
    targets = ["query", "value"]
    with pytest.warns(UserWarning, match=rf"'{head}' of {kind} stays frozen.*modules_to_save=\['{head}'\]"):
        convert(classifier(kind), target_modules=targets)
    model = classifier(kind)
    with no_warning():
        convert(model, target_modules=targets, modules_to_save=[head])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(f"{head}." in name for name in trained)


def test_the_head_that_peft_trains_for_a_task_is_no_problem():
    with no_warning():
        by_peft(classifier(), target_modules=["query"], task_type="SEQ_CLS")


@both_doors
def test_a_head_from_a_checkpoint_is_not_new_and_one_that_it_lacks_is(convert, tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path / "classifier")
    model.bert.save_pretrained(tmp_path / "encoder")
    auto = transformers.AutoModelForSequenceClassification
    with no_warning():
        convert(auto.from_pretrained(tmp_path / "classifier"), target_modules=["query"])
    new = auto.from_pretrained(tmp_path / "encoder")
    with pytest.warns(UserWarning, match="'classifier' of BertForSequenceClassification stays frozen"):
        convert(new, target_modules=["query"])


class Wrapped(nn.Module):
    """A loaded encoder and a head of one's own, as user code has it."""

    def __init__(self, directory):
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(directory, add_pooling_layer=False)
        self.head = nn.Linear(32, 2)


@both_doors
def test_a_head_of_ones_own_beside_a_loaded_model_is_named(convert, tmp_path):
    classifier().bert.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="'head' of Wrapped stays frozen"):
        convert(Wrapped(tmp_path), target_modules=["query"])
    with no_warning():
        convert(Wrapped(tmp_path), target_modules=["query"], modules_to_save=["head"])
        convert(Wrapped(tmp_path).encoder, target_modules=["query"])


def test_output_embeddings_that_no_file_holds_are_named(tmp_path):
    model = tiny_llama()
    model.model.save_pretrained(tmp_path)
    new = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="'lm_head' of LlamaForCausalLM stays frozen"):
        by_library(new)


def test_pruning_then_converting_warns_of_nothing():
    model, batches = family("bloom")
    prune(model, "2:4", batches=batches)
    with no_warning():
        by_library(model)
