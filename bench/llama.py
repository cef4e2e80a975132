# SPDX-License-Identifier: Apache-2.0
"""Llamas of transformers' own class, random and pruned 2:4, and the methods that train or run them.

A method makes a trainable model of the pruned one; the weights that it only reads are shared, not copied. The layers of
a peer that is no library are peers.py's formulas in the place of each linear.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lors_cuda
import lors_cuda.peft
import peft
from lors_cuda.pruning import prune
from peers import PEERS

SCALING = 2.0  # not 1, so that forgetting it shows


@dataclass(frozen=True)
class Shape:
    """A Llama's proportions."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 4096  # small: what is compared are the layers, not the head, which no method adapts

    def config(self) -> LlamaConfig:
        return LlamaConfig(**asdict(self), max_position_embeddings=4096, bos_token_id=None, eos_token_id=None)


SHAPES = {
    "1024 x 8": Shape(1024, 2816, 8, 16, 16),
    "8B / 2, 2 layers": Shape(2048, 7168, 2, 16, 4),  # Llama-3-8B's layer with every side halved
}
QUICK_SHAPES = {"tiny": Shape(32, 96, 2, 4, 2, vocab_size=64)}
COUNTED_SHAPES = {
    "Llama-3-8B": Shape(4096, 14336, 32, 32, 8, vocab_size=128256),
    "Llama-3-70B": Shape(8192, 28672, 80, 64, 8, vocab_size=128256),
}


def pruned_llama(shape: Shape, seed: int = 0) -> LlamaForCausalLM:
    """A random model in float32, every linear of its layers pruned to 2:4 by magnitude; frozen."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(shape.config())
    prune(model, "2:4", method="magnitude", progress=False)
    return model.requires_grad_(False)


def layer_linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linears of the decoder layers, which every method adapts: (parent, name, linear)."""
    for parent in model.get_submodule("model.layers").modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                yield parent, name, child


def targets(model: nn.Module) -> list[str]:
    return sorted({name for _, name, _ in layer_linears(model)})


def shared_copy(model: nn.Module) -> Any:
    """A model of its own whose parameters and buffers are the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def fill_adapters(model: nn.Module, seed: int = 1) -> None:
    """The same values for the adapters of every method, not zero: an adapter as training leaves it.

    Every method's trained tensors are, linear by linear, lora_A [r, K] and lora_B [N, r].
    """
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for lora_A, lora_B in zip(trained[::2], trained[1::2], strict=True):
            r, K = lora_A.shape
            if lora_B.shape[1] != r:
                raise RuntimeError(f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)} are no adapter")
            lora_A.copy_(torch.randn(lora_A.shape, generator=generator) * K**-0.5)
            lora_B.copy_(torch.randn(lora_B.shape, generator=generator) * 0.01)


# --- the methods ------------------------------------------------------------------------------------------------------


class PeerLinear(nn.Module):
    """A formula of peers.py as a layer; adapters in the weight's dtype, the only one that all of them accept."""

    def __init__(self, linear: nn.Linear, rank: int, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight = linear.weight
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_empty(linear.out_features, rank))
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input, self.weight, self.lora_A, self.lora_B, SCALING)


def _peer(name: str) -> Callable[[nn.Module, int], nn.Module]:
    def make(model: nn.Module, rank: int) -> nn.Module:
        function = PEERS[name].make()
        for parent, child, linear in list(layer_linears(model)):
            setattr(parent, child, PeerLinear(linear, rank, function))
        return model

    return make


def _frozen(model: nn.Module, rank: int) -> nn.Module:
    # The lowest parameter of the layers, so that the gradient passes through every one of them.
    norm = model.get_submodule("model.layers.0.input_layernorm")
    norm.weight = nn.Parameter(norm.weight.clone())
    return model


def _lors(layout: str, kind: str = "", group: int = 0) -> Callable[[nn.Module, int], nn.Module]:
    def make(model: nn.Module, rank: int) -> nn.Module:
        config = lors_cuda.LoRSConfig(r=rank, lora_alpha=SCALING * rank, target_modules=targets(model), layout=layout)
        if kind:
            for parent, child, linear in list(layer_linears(model)):
                columns = group if group and linear.in_features % group == 0 else None
                weight = lors_cuda.SparseWeight.quantize(linear.weight.detach(), None, kind, columns, layout=layout)
                setattr(parent, child, lors_cuda.SparseLinear(weight, linear.bias))
        return lors_cuda.get_lors_model(model, config)

    return make


def _peft(config_class: type[Any], *, autocast_adapter_dtype: bool = True, **options: Any) -> Callable[..., nn.Module]:
    def make(model: nn.Module, rank: int) -> nn.Module:
        config = config_class(r=rank, lora_alpha=SCALING * rank, target_modules=targets(model), **options)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)

    return make


@dataclass(frozen=True)
class Method:
    """How a pruned model is trained. `masked`: its zeros survive, so that all such methods have one loss."""

    make: Callable[[nn.Module, int], nn.Module]
    note: str
    masked: bool = True
    only_16_bit: bool = False


METHODS = {
    "frozen": Method(_frozen, "no adapters; trains the first norm alone, so that every layer has a backward", False),
    "peft_lora": Method(_peft(peft.LoraConfig), "PEFT's LoRA as it comes (float32 adapters): loses the zeros", False),
    "peft_lora_16": Method(
        _peft(peft.LoraConfig, autocast_adapter_dtype=False), "the same, adapters in the weight's dtype", False, True
    ),
    "official": Method(_peer("official"), "LoRS in eager torch, adapters in the weight's dtype"),
    "sqft": Method(_peer("sqft"), "masked LoRA under autograd, adapters in the weight's dtype"),
    "sqft_checkpointed": Method(_peer("sqft_checkpointed"), "the same, each linear checkpointed"),
    "lors_cuda": Method(_lors("dense"), "get_lors_model, dense weights, float32 adapters"),
    "lors_cuda_24": Method(_lors("2:4"), "get_lors_model, 2:4 weights stored compressed"),
    "lors_cuda_bitmap": Method(_lors("bitmap"), "get_lors_model, bitmap weights"),
    "lors_cuda_24_int8": Method(_lors("2:4", "int8"), "the same, 2:4, int8 codes, a scale for each row", False),
    "lors_cuda_24_int4": Method(_lors("2:4", "int4", 128), "2:4, int4 codes in groups of 128", False),
    "lors_cuda_bitmap_int4": Method(_lors("bitmap", "int4", 128), "bitmap, int4 codes in groups of 128", False),
    "lors_cuda_peft": Method(
        _peft(lors_cuda.peft.LoRSLoraConfig, layout="2:4"), "lors_cuda.peft, 2:4 weights stored compressed"
    ),
}
# Each by itself on top of a method, as a suffix of its name.
VARIANTS = {
    "": "",
    "_gc": "gradient checkpointing of every decoder layer",
    "_compiled": "torch.compile of every layer",
    "_prefetch": "inside lors_cuda.prefetch",
}


def split(name: str) -> tuple[str, str]:
    """A method's name and the suffix of its variant."""
    for suffix in VARIANTS:
        if suffix and name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""


def note(name: str) -> str:
    method, variant = split(name)
    return ", ".join(filter(None, (METHODS[method].note, VARIANTS[variant])))


def make(name: str, base: nn.Module, rank: int) -> nn.Module:
    """The model of a method and variant, ready to train; `base` stays as it is."""
    method, variant = split(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a name that transformers has changed
        model = METHODS[method].make(shared_copy(base), rank).train()
    if method != "frozen":
        fill_adapters(model)
    if variant == "_gc":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the newest transformers has another name for it
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if variant == "_prefetch":
        vars(model)["prefetching"] = contextlib.ExitStack()  # for as long as the model lives
        model.prefetching.enter_context(lors_cuda.prefetch(model))
    if variant == "_compiled":
        for layer in next(module for name, module in model.named_modules() if name.endswith("model.layers")):
            layer.compile()
    return model


def with_adapters(base: nn.Module, rank: int, layout: str) -> nn.Module:
    """Our model of the pruned one, with adapters that are not zero."""
    model = _lors(layout)(shared_copy(base), rank)
    fill_adapters(model)
    return model


# --- one training step ------------------------------------------------------------------------------------------------


class Trainer:
    """Forward, backward and AdamW on one batch of random tokens."""

    def __init__(self, model: nn.Module, vocabulary: int, batch: int, length: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(2))
        self.tokens = tokens.to(self.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(self) -> Tensor:
        loss: Tensor = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def state_bytes(self) -> int:
        """Of the optimizer's state."""
        return sum(tensor.nbytes for state in self.optimizer.state.values() for tensor in state.values())


def held_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, each storage once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
