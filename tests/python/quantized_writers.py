# SPDX-License-Identifier: Apache-2.0
# Writers and slow readers of quantised files, from what is published about each format and by places instead of whole
# tensors, so that they share nothing with lors_cuda.compressed_tensors. No real file was within reach where they were
# written: test_quantized_checkpoints.py holds them against compressed-tensors' own writers.
"""Quantised checkpoints in every format, written for the tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lors_cuda.compressed_tensors.schemes import Scheme
from models import prune_two_of_four

SCHEMES = {
    "int4 groups": Scheme("pack-quantized", "int4", "group", 32),
    "int4 rows": Scheme("pack-quantized", "int4", "channel"),
    "int4 asymmetric groups": Scheme("pack-quantized", "int4", "group", 32, symmetric=False),
    "int4 asymmetric rows": Scheme("pack-quantized", "int4", "channel", symmetric=False),
    "packed int8": Scheme("pack-quantized", "int8", "group", 64, symmetric=False),
    "int8": Scheme("int-quantized", "int8", "channel"),
    "int8 asymmetric": Scheme("int-quantized", "int8", "group", 32, symmetric=False),
    "int8 tensor": Scheme("naive-quantized", "int8", "tensor", symmetric=False),
    "4 bits in int8": Scheme("naive-quantized", "int4", "group", 32, symmetric=False),
    "fp8": Scheme("float-quantized", "e4m3", "channel"),
    "fp8 tensor": Scheme("float-quantized", "e4m3", "tensor"),
    "naive fp8": Scheme("naive-quantized", "e4m3", "channel"),
    "fp8 bitmask": Scheme("float-quantized", "e4m3", "channel", bitmask=True),
    "int8 bitmask": Scheme("int-quantized", "int8", "channel", bitmask=True),
    "marlin int4": Scheme("marlin-24", "int4", "channel"),
    "marlin int4 groups": Scheme("marlin-24", "int4", "group", 128),
    "marlin int8": Scheme("marlin-24", "int8", "channel"),
    "marlin int8 groups": Scheme("marlin-24", "int8", "group", 128),
    "gptq": Scheme("gptq", "int4", "group", 128, symmetric=False, subtracted=1),
    "gptq rows": Scheme("gptq", "int4", "channel", symmetric=False, subtracted=1),
    "gptq int8": Scheme("gptq", "int8", "group", 64, symmetric=False, subtracted=1),
    "gptq_v2": Scheme("gptq", "int4", "group", 32, symmetric=False),
}


@dataclass
class Written:
    """A weight: its codes as integers (of e4m3: as float8), scales and zero points [N, groups]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group: int

    def dense(self) -> Tensor:
        """(q - z) s in float64, rounded once to the scales' dtype."""
        zeros, scales = (t.double().repeat_interleave(self.group, 1) for t in (self.zeros, self.scales))
        return ((self.codes.double() - zeros) * scales).to(self.scales.dtype) + 0.0


def quantized(weight: Tensor, scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> Written:
    """Round to nearest; a zero stays one."""
    N, K = weight.shape
    group = scheme.columns(K)
    groups = weight.double().view(N, -1, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if scheme.strategy == "tensor":
        low, high = low.amin().expand(N, 1), high.amax().expand(N, 1)
    most = 2 ** (scheme.bits - 1)
    if scheme.symmetric:
        scales = torch.maximum(-low, high) / (
            448 if scheme.kind == "e4m3" else most - 1
        )  # never -most: see the old writer
    else:
        scales = (high - low) / (2 * most - 1)
    scales = torch.where(scales == 0, 2.0**-10, scales).to(dtype)
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    if not scheme.symmetric:
        zeros = (-most - low / scales.double()).round().clamp(-most, most - 1).to(torch.int8)
    steps = (groups / scales.double().unsqueeze(-1)).view(N, K)
    if scheme.kind == "e4m3":
        return Written(steps.float().clamp(-448, 448).to(torch.float8_e4m3fn), scales, zeros, group)
    codes = (steps.round() + zeros.repeat_interleave(group, 1)).clamp(-most, most - 1).to(torch.int8)
    return Written(codes, scales, zeros, group)


def parts_of(weight: Written, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of a weight by the last parts of their names."""
    N, K = weight.codes.shape
    bits, half = scheme.bits, 2 ** (scheme.bits - 1)
    if scheme.format == "gptq":
        stored = (weight.zeros.numpy().astype(np.int64) + half - scheme.subtracted) % (2 * half)
        return {
            "qweight": words(weight.codes.numpy().astype(np.int64).T + half, bits, 0),
            "qzeros": words(stored.T, bits, 1),
            "scales": weight.scales.t().contiguous(),
            "g_idx": torch.tensor([k // weight.group for k in range(K)], dtype=torch.int32),
        }
    if scheme.format == "marlin-24":
        return marlin24(weight, scheme)
    parts = {"weight_scale": weight.scales[0, :1].clone() if scheme.strategy == "tensor" else weight.scales}
    if scheme.format == "pack-quantized":
        parts["weight_packed"] = words(weight.codes.numpy().astype(np.int64) + half, bits, 1)
        parts["weight_shape"] = torch.tensor([N, K])
        if not scheme.symmetric:
            parts["weight_zero_point"] = words(weight.zeros.numpy().astype(np.int64) + half, bits, 0)
        return parts
    if not scheme.symmetric:
        parts["weight_zero_point"] = weight.zeros[0, :1].clone() if scheme.strategy == "tensor" else weight.zeros
    if not scheme.bitmask:
        return parts | {"weight": weight.codes}
    keep = two_of_four(weight.codes)
    packed = np.packbits(keep.numpy(), axis=1, bitorder="little")
    kept = weight.codes.view(torch.int8)[keep].view(N, K // 2).view(weight.codes.dtype)
    return parts | {"compressed": kept, "bitmask": torch.from_numpy(packed), "shape": torch.tensor([[N], [K]])}


def words(numbers: np.ndarray, bits: int, axis: int) -> Tensor:
    """Numbers packed along an axis: number i of a line is bits `bits` i and on of the line's words."""
    lines = numbers if axis == 1 else numbers.T
    result = np.zeros((lines.shape[0], -(-lines.shape[1] * bits // 32)), np.uint32)
    for i in range(lines.shape[1]):
        result[:, i * bits // 32] |= lines[:, i].astype(np.uint32) << np.uint32(i * bits % 32)
    packed = torch.from_numpy(result.view(np.int32))
    return packed if axis == 1 else packed.t().clone(memory_format=torch.contiguous_format)


def two_of_four(codes: Tensor) -> Tensor:
    """A mask with exactly two of every four columns, those that are not 0 among them."""
    nonzero = codes.float().view(codes.shape[0], -1, 4) != 0
    return (
        torch.zeros_like(nonzero)
        .scatter_(2, nonzero.int().argsort(dim=2, descending=True, stable=True)[..., :2], True)
        .flatten(1)
    )


def marlin24(weight: Written, scheme: Scheme) -> dict[str, Tensor]:
    """Element by element: the place of each code, metadata word and scale by its number."""
    N, K = weight.codes.shape
    bits, half, per_word = scheme.bits, 2 ** (scheme.bits - 1), 32 // scheme.bits
    keep = two_of_four(weight.codes)
    columns = keep.nonzero()[:, 1].view(N, K // 2).numpy()
    kept = np.take_along_axis(weight.codes.numpy().astype(np.int64), columns, 1) + half
    packed = np.zeros((K // 32, N * bits // 2), np.uint32)
    n, k = np.meshgrid(np.arange(N), np.arange(K // 2), indexing="ij")
    # Rows of a fragment: lane, pair; a tile of 16 x 16 gives each of 4 x 8 lanes 8 codes, 4 tiles side by side.
    last = (k % 2) * 4 + (n // 4 % 2) * 2 + k // 8 % 2 if bits == 4 else (n // 4 % 2) * 4 + (k % 2) * 2 + k // 8 % 2
    place = n // 64 * 1024 + n // 16 % 4 * 256 + n // 8 % 2 * 128 + k // 2 % 4 * 32 + n % 4 * 8 + last
    for p, at, code in zip((k // 16).flat, place.flat, kept.flat, strict=True):
        packed[p, at // per_word] |= np.uint32(int(code) << at % per_word * bits)
    meta = np.zeros(N * K // 16, np.uint16)
    for row in range(N):
        for word in range(K // 16):
            code = 0
            for g in range(4):
                first, second = columns[row, 8 * word + 2 * g : 8 * word + 2 * g + 2] % 4
                code |= (int(first) | int(second) << 2) << 4 * g
            to = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
            column = word
            if to % 2 == 0 and column % 2 == 1:
                to, column = to + 1, column - 1
            elif to % 2 == 1 and column % 2 == 0:
                to, column = to - 1, column + 1
            meta[column // 2 * 2 * N + 2 * to + column % 2] = code
    scales = weight.scales.t().contiguous()
    if weight.group < K // 2:
        order = [8 * i + j for i in range(N // 8) for j in (0, 4, 1, 5, 2, 6, 3, 7)]
        scales = scales[:, order].contiguous()
    return {
        "weight_packed": torch.from_numpy(packed.view(np.int32)),
        "scale_packed": scales,
        "meta": torch.from_numpy(meta.view(np.int16)).view(K // 32, 2 * N),
    }


def config_of(scheme: Scheme) -> dict:
    """``quantization_config`` of a whole model."""
    if scheme.format == "gptq":
        version = {1: "gptq", 0: "gptq_v2"}[scheme.subtracted]
        return {
            "quant_method": "gptq", "bits": scheme.bits, "group_size": scheme.group or -1, "desc_act": False,
            "sym": False, "checkpoint_format": version,
        }  # fmt: skip
    weights = {
        "num_bits": scheme.bits, "type": "float" if scheme.kind == "e4m3" else "int", "symmetric": scheme.symmetric,
        "strategy": scheme.strategy, "group_size": scheme.group, "actorder": None, "dynamic": False,
    }  # fmt: skip
    config = {
        "quant_method": "compressed-tensors", "format": scheme.format, "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": None,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }  # fmt: skip
    if scheme.bitmask or scheme.format == "marlin-24":
        stored = "sparse-24-bitmask" if scheme.bitmask else "dense"
        config["sparsity_config"] = {"format": stored, "sparsity_structure": "2:4", "global_sparsity": 0.5}
    return config


def write_quantized(model: nn.Module, directory: Path, scheme: Scheme) -> dict[str, Written]:
    """Save a model with its linears quantised, but for the head; returns them by their weights' names."""
    safetensors_torch = pytest.importorskip("safetensors.torch")
    model.save_pretrained(directory)
    tensors = safetensors_torch.load_file(directory / "model.safetensors")
    written = {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        dtype = torch.float16 if scheme.format in ("gptq", "marlin-24") else torch.bfloat16
        written[name] = quantized(tensors.pop(name), scheme, dtype)
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{part}": tensor.contiguous() for part, tensor in parts_of(written[name], scheme).items()}
    safetensors_torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = config_of(scheme)
    (directory / "config.json").write_text(json.dumps(config))
    return written


def read_slowly(parts: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """The dense weight of parts, element by element, in float64 rounded to the scales' dtype."""
    bits, half = scheme.bits, 2 ** (scheme.bits - 1)

    def number(word: int, i: int) -> int:
        return (word >> i % (32 // bits) * bits) % (2 * half)

    if scheme.format == "gptq":
        words_, zeros_ = parts["qweight"].tolist(), parts["qzeros"].tolist()
        K, N = len(words_) * 32 // bits, len(words_[0])
        scales = parts["scales"].t()
        codes = [[number(words_[k * bits // 32][n], k) for k in range(K)] for n in range(N)]
        zeros = [[number(row[n * bits // 32], n) + scheme.subtracted for row in zeros_] for n in range(N)]
    elif scheme.format == "marlin-24":
        packed = parts["weight_packed"].tolist()
        K, N = 32 * len(packed), 2 * len(packed[0]) // bits
        meta = [word % 65536 for word in parts["meta"].reshape(-1).tolist()]
        scales = parts["scale_packed"].t()
        if scheme.columns(K) < K // 2:
            scales = scales[[8 * i + j for i in range(N // 8) for j in (0, 2, 4, 6, 1, 3, 5, 7)]]
        codes, zeros = [[0] * K for _ in range(N)], None
        for n in range(N):
            for k in range(K // 2):
                last = [k % 2, n // 4 % 2, k // 8 % 2] if bits == 4 else [n // 4 % 2, k % 2, k // 8 % 2]
                at = n // 64 * 1024 + n // 16 % 4 * 256 + n // 8 % 2 * 128 + k // 2 % 4 * 32 + n % 4 * 8
                at += 4 * last[0] + 2 * last[1] + last[2]
                word, to = k // 8, n // 64 * 64 + n % 2 * 2 + n % 8 // 4 + n % 4 // 2 * 32 + n % 64 // 8 * 4
                swap = (to % 2) - (word % 2)
                code = meta[(word + swap) // 2 * 2 * N + 2 * (to - swap) + (word + swap) % 2] >> 4 * (k // 2 % 4)
                column = 4 * (k // 2) + (code >> 2 * (k % 2)) % 4
                codes[n][column] = number(packed[k // 16][at * bits // 32], at) - half
    elif scheme.format == "pack-quantized":
        N, K = parts["weight_shape"].reshape(-1).tolist()
        packed, scales = parts["weight_packed"].tolist(), parts["weight_scale"]
        codes = [[number(row[k * bits // 32], k) - half for k in range(K)] for row in packed]
        zeros = None
        if not scheme.symmetric:
            stored = parts["weight_zero_point"].tolist()
            zeros = [[number(stored[n * bits // 32][g], n) - half for g in range(len(stored[0]))] for n in range(N)]
    else:
        scales = parts["weight_scale"]
        zeros = (
            None
            if scheme.symmetric
            else parts["weight_zero_point"].reshape(-1, 1 if scales.numel() == 1 else scales.shape[-1]).tolist()
        )
        if scheme.bitmask:
            N, K = parts["shape"].reshape(-1).tolist()
            codes = [[0.0] * K for _ in range(N)]
            for n, row in enumerate(parts["bitmask"].tolist()):
                kept = iter(parts["compressed"][n].float().tolist())
                for k in range(K):
                    if row[k // 8] >> k % 8 & 1:
                        codes[n][k] = next(kept)
        else:
            codes = parts["weight"].float().tolist()
    K = len(codes[0])
    group = scheme.columns(K)
    dense = torch.zeros(len(codes), K, dtype=torch.float64)
    for n, row in enumerate(codes):
        for k, code in enumerate(row):
            at = (0, 0) if scheme.strategy == "tensor" else (n, k // group)
            zero = 0 if zeros is None else zeros[at[0]][at[1]]
            dense[n, k] = (code - zero) * float(scales.reshape(1, 1)[at] if scheme.strategy == "tensor" else scales[at])
    return dense.to(scales.dtype)


def small_llama(dtype: torch.dtype = torch.bfloat16, seed: int = 0):
    """Linears of 64 to 384 columns and rows, pruned 2:4."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, initializer_range=0.1, dtype=dtype,
    )  # fmt: skip
    return prune_two_of_four(transformers.LlamaForCausalLM(config).to(dtype).eval())


def edit(directory, change) -> None:
    """Change the quantization_config in place."""
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def change_tensors(directory, change) -> None:
    safetensors_torch = pytest.importorskip("safetensors.torch")
    tensors = safetensors_torch.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors_torch.save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )


def filled(directory) -> int:
    """Gives values to pruned weights, as a quantiser does that does not keep the mask; how many."""

    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][:3] = 5

    change_tensors(directory, change)
    return 3 * 128 // 2
