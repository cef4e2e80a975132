# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints that stay so in memory, and what is written from there."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from torch import nn

from interchange_cases import raw_state, sparse24
from lors_cuda import (
    LoRSConfig,
    SparseLinear,
    get_lors_model,
    load_sparse_checkpoint,
    merge_and_unload,
    save_sparse_checkpoint,
)
from lors_cuda.compressed_tensors import kept
from lors_cuda.compressed_tensors.quantized import decode_quantized
from lors_cuda.compressed_tensors.quantized_files import MASK_NAME, StoredWeight
from lors_cuda.formats import pack_mask, unpack_mask
from models import fill_adapters, refused
from quantized_writers import (
    SCHEMES,
    change_tensors,
    config_of,
    edit,
    filled,
    parts_of,
    quantized,
    small_llama,
    write_quantized,
)

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

FORMATS = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
IDS = torch.arange(16).view(2, 8)
NAME = "model.layers.0.mlp.up_proj"


def tensors_of(directory):
    return safetensors_torch.load_file(directory / "model.safetensors")


def keep(directory, **options):
    return load_sparse_checkpoint(directory, quantized="keep", **options)


@FORMATS
def test_kept_weights_are_those_that_are_dequantised(tmp_path, scheme):
    write_quantized(small_llama(), tmp_path / "q", scheme)
    dense = load_sparse_checkpoint(tmp_path / "q", quantized="dequantize").state_dict()
    model = keep(tmp_path / "q")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    assert len(layers) == 7
    for name, layer in layers.items():
        weight = layer.sparse_weight
        assert weight.layout == "2:4"
        assert weight.quantization.kind == scheme.kind
        assert torch.equal(weight.to_dense().bfloat16(), dense[f"{name}.weight"])
        assert torch.equal(weight.mask(), dense[f"{name}.weight"] != 0)
    plain = {name: t for name, t in model.state_dict().items() if name in dense}
    assert raw_state(plain) == raw_state({name: dense[name] for name in plain})
    with torch.no_grad():
        assert bool(model(input_ids=IDS).logits.isfinite().all())


BYTES = {  # per weight, half of them kept: docs say what a layout costs, and a scale of 16 bits is shared by its group
    "fp8": 0.625, "int8": 0.625, "int4 groups": 0.4375, "int4 rows": 0.375, "int4 asymmetric rows": 0.375,
    "marlin int4 groups": 0.391,
}  # fmt: skip


@pytest.mark.parametrize("scheme", BYTES)
@pytest.mark.parametrize("pattern", ["2:4", "bitmap"])
def test_memory_is_what_the_codes_take(scheme, pattern):
    how, N, K = SCHEMES[scheme], 128, 4096
    torch.manual_seed(0)
    weight = torch.randn(N, K) + 3
    if pattern == "2:4":
        weight.view(N, -1, 4)[..., 1:3] = 0
    else:
        if how.format == "marlin-24":
            pytest.skip("marlin-24 is 2:4")
        weight *= torch.rand(N, K).argsort(1) < K // 2
    read = decode_quantized(parts_of(quantized(weight, how), how), how, "w")
    stored = kept.sparse_weight(StoredWeight("w", read, read.nonzero()))
    assert stored.layout == pattern
    layer = SparseLinear(stored)
    held = sum(tensor.nbytes for tensor in [*layer.parameters(), *layer.buffers()])
    assert held <= 1.03 * BYTES[scheme] * N * K
    assert stored.nbytes >= 0.97 * BYTES[scheme] * N * K, "so is the table"


def test_the_whole_model_takes_what_its_layers_take(tmp_path):
    """Nothing of a weight's size stays beside the codes."""
    write_quantized(small_llama(), tmp_path / "q", SCHEMES["int4 groups"])
    model = keep(tmp_path / "q")
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    codes = sum(layer.sparse_weight.nbytes + layer.mask_digest.nbytes for layer in layers)
    rest = sum(p.nbytes for n, p in model.named_parameters() if "proj" not in n)
    assert sum(storages.values()) == codes + rest


@FORMATS
def test_what_is_kept_is_written_as_it_was(tmp_path, scheme):
    write_quantized(small_llama(), tmp_path / "q", scheme)
    extra = {f"{NAME}.input_scale": torch.full((1,), 0.5)} if scheme.format == "float-quantized" else {}
    change_tensors(tmp_path / "q", lambda tensors: tensors.update(extra))
    save_sparse_checkpoint(keep(tmp_path / "q"), tmp_path / "again", "quantized")
    before, after = tensors_of(tmp_path / "q"), tensors_of(tmp_path / "again")
    if not scheme.bitmask and scheme.format != "marlin-24":
        assert raw_state(after) == raw_state(before)
    assert extra.items() <= {name: after[name] for name in extra}.items() or torch.equal(
        after[f"{NAME}.input_scale"], extra[f"{NAME}.input_scale"]
    )
    block = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert "sparsity_config" not in block
    if scheme.format != "gptq":
        assert block["format"] == ("pack-quantized" if scheme.format == "marlin-24" else scheme.format)
    assert not (tmp_path / "again" / MASK_NAME).exists()
    one, two = (keep(tmp_path / which).state_dict() for which in ("q", "again"))
    assert raw_state(one) == raw_state(two)


@pytest.mark.parametrize("scheme", ["int4 groups", "int8", "fp8", "marlin int4"])
def test_transformers_loads_what_is_written(tmp_path, scheme):
    pytest.importorskip("compressed_tensors.compressors")
    write_quantized(small_llama(), tmp_path / "q", SCHEMES[scheme])
    model = keep(tmp_path / "q")
    save_sparse_checkpoint(model, tmp_path / "again", "quantized")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again",
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLinear):
            assert torch.equal(theirs.get_submodule(name).weight, layer.sparse_weight.to_dense().bfloat16()), name


def test_kept_zeros_survive_in_the_side_file(tmp_path):
    """A kept weight whose code is 0 is in the mask again after saving; without the file it is pruned."""
    model = small_llama()
    model.save_pretrained(tmp_path / "sparse")
    write_quantized(model, tmp_path / "q", SCHEMES["int4 rows"])
    change_tensors(tmp_path / "q", lambda t: t[f"{NAME}.weight_packed"][:4].fill_(-0x77777778))  # all codes 0
    loaded = keep(tmp_path / "q", mask_from=tmp_path / "sparse")
    mask = model.get_submodule(NAME).weight != 0
    assert torch.equal(loaded.get_submodule(NAME).sparse_weight.mask(), mask)
    save_sparse_checkpoint(loaded, tmp_path / "again", "quantized")
    stored = safetensors_torch.load_file(tmp_path / "again" / MASK_NAME)
    assert torch.equal(unpack_mask(stored[f"{NAME}.weight"], mask.shape[1]), mask)
    for name, bits in stored.items():
        assert not torch.equal(pack_mask(model.state_dict()[name] != 0), pack_mask(load_dense(tmp_path)[name] != 0)), (
            name
        )
        assert torch.equal(bits, pack_mask(model.state_dict()[name] != 0))
    again = keep(tmp_path / "again")
    assert raw_state(again.state_dict()) == raw_state(loaded.state_dict())
    with pytest.warns(UserWarning, match=r"\d+ kept weights .* count as pruned in ordinary linears"):
        load_sparse_checkpoint(tmp_path / "again", quantized="dequantize")
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "again", whole)

    def damaged(change, *fragments):
        masks = dict(stored)
        change(masks)
        safetensors_torch.save_file(masks, tmp_path / "again" / MASK_NAME)
        refused(ValueError, lambda: keep(tmp_path / "again"), *fragments)

    damaged(lambda masks: masks.update({"lm_head.weight": torch.zeros(1)}), "which is no quantized weight")
    damaged(lambda masks: masks.update({f"{NAME}.weight": stored[f"{NAME}.weight"][1:]}), "does not fit the weight")
    damaged(lambda masks: masks.update({f"{NAME}.weight": stored[f"{NAME}.weight"] & 0x77777777}), "does not fit")
    (tmp_path / "again" / MASK_NAME).write_bytes(b"0")
    refused(ValueError, lambda: keep(tmp_path / "again"), "not a readable safetensors file")
    (tmp_path / "again" / MASK_NAME).unlink()
    assert not bool(keep(tmp_path / "again").get_submodule(NAME).sparse_weight.mask()[:4].any())


def load_dense(tmp_path):
    return load_sparse_checkpoint(tmp_path / "q", quantized="dequantize").state_dict()


def test_a_mask_that_is_not_2_4_becomes_a_bitmap_or_dense(tmp_path):
    write_quantized(small_llama(), tmp_path / "q", SCHEMES["int8"])
    filled(tmp_path / "q")
    edit(tmp_path / "q", lambda block: block.update(sparsity_config={"format": "dense", "sparsity_structure": "2:4"}))
    with pytest.warns(UserWarning, match="1 of 7 are not"):
        model = keep(tmp_path / "q")
    layouts = {module.sparse_weight.layout for module in model.modules() if isinstance(module, SparseLinear)}
    assert layouts == {"2:4", "bitmap"}


def test_what_cannot_be_kept_is_refused_by_name(tmp_path):
    scheme = dataclasses.replace(SCHEMES["int8 asymmetric"], group=16)
    write_quantized(small_llama(), tmp_path / "q", scheme)
    refused(ValueError, lambda: keep(tmp_path / "q"), "cannot be kept: group is 16", "quantized='dequantize'")
    load_sparse_checkpoint(tmp_path / "q", quantized="dequantize")
    small_llama().save_pretrained(tmp_path / "plain")
    call = lambda: save_sparse_checkpoint(keep(tmp_path / "plain"), tmp_path / "out", "quantized")  # noqa: E731
    refused(ValueError, call, "no quantized layers", "quantized='keep'")
    refused(
        TypeError, lambda: save_sparse_checkpoint(nn.Linear(2, 2), tmp_path / "out", "quantized"), "save_pretrained"
    )
    assert not (tmp_path / "out").exists()


def test_conv1d_is_refused(tmp_path):
    """Its weight is [in, out]: a square one would be read transposed."""
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "q")
    scheme = SCHEMES["int8"]
    torch.manual_seed(0)
    tensors = tensors_of(tmp_path / "q")
    stem = "transformer.h.0.attn.c_proj"
    parts = parts_of(quantized(sparse24(64, 64), scheme), scheme)
    tensors |= {f"{stem}.{part}": tensor for part, tensor in parts.items()}
    safetensors_torch.save_file(tensors, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "q" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config_of(scheme)}))
    for how in ("keep", "dequantize"):
        refused(ValueError, lambda how=how: load_sparse_checkpoint(tmp_path / "q", quantized=how), "Conv1D layers")


@pytest.mark.parametrize("scheme", ["int4 groups", "int4 asymmetric groups", "int8", "fp8", "gptq"])
@pytest.mark.parametrize("remainder", ["none", "dither"])
def test_nothing_is_lost_by_merging_codes(tmp_path, scheme, remainder):
    """Train, export, load again: the same logits to the last bit, by this package and by transformers."""
    if scheme == "fp8" and remainder == "dither":
        pytest.skip("fp8 has no dither")
    dtype = torch.float16 if scheme == "gptq" else torch.bfloat16  # that of the scales
    write_quantized(small_llama(dtype), tmp_path / "q", SCHEMES[scheme])
    base = keep(tmp_path / "q")
    masks = {n: m.sparse_weight.mask() for n, m in base.named_modules() if isinstance(m, SparseLinear)}
    model = get_lors_model(base, LoRSConfig(r=4, lora_alpha=8, requantize=True, remainder=remainder))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
    save_sparse_checkpoint(model, tmp_path / "merged", "quantized")
    again = keep(tmp_path / "merged")
    changed = 0
    for name, mask in masks.items():
        weight = again.get_submodule(name).sparse_weight
        assert torch.equal(weight.mask(), mask), name
        changed += int((weight.codes().float() != model.get_submodule(name).sparse_weight.codes().float()).sum())
    assert changed > 0
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, trained)
        merged = merge_and_unload(model)
        for name in masks:
            assert torch.equal(merged.get_submodule(name).weight, again.get_submodule(name).sparse_weight.to_dense())
        if dtype != torch.float16:  # whose matmuls run in float32 here and in float16 in torch
            assert torch.equal(merged(input_ids=IDS).logits, trained)
    for part in ("weight_scale", "weight_zero_point", "scales", "qzeros"):
        before, after = tensors_of(tmp_path / "q"), tensors_of(tmp_path / "merged")
        for name in before:
            if name.endswith(part):
                assert torch.equal(before[name], after[name]), name
    if scheme in ("int4 groups", "int8", "fp8"):
        pytest.importorskip("compressed_tensors.compressors")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged", quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
        )
        for name in masks:
            assert torch.equal(theirs.get_submodule(name).weight, merged.get_submodule(name).weight), name
        with torch.no_grad():
            assert torch.equal(theirs(input_ids=IDS).logits, trained)


def test_a_model_in_another_dtype_than_its_scales_becomes_plain_in_its_own(tmp_path):
    """marlin-24 and GPTQ have float16 scales, and models are bfloat16."""
    write_quantized(small_llama(), tmp_path / "q", SCHEMES["marlin int4"])
    model = get_lors_model(keep(tmp_path / "q"), LoRSConfig(r=2))
    fill_adapters(model)
    with torch.no_grad():
        adapted = model.eval()(input_ids=IDS).logits
        merged = merge_and_unload(model)
        assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
        assert torch.equal(merged(input_ids=IDS).logits, adapted)


def test_an_adapter_that_was_not_trained_on_the_grid_is_not_rounded_to_it(tmp_path):
    write_quantized(small_llama(), tmp_path / "q", SCHEMES["int4 groups"])
    model = get_lors_model(keep(tmp_path / "q"), LoRSConfig(r=2))
    fill_adapters(model)
    call = lambda: save_sparse_checkpoint(model, tmp_path / "out", "quantized")  # noqa: E731
    refused(ValueError, call, "trained without requantize", "format='dense'")
    save_sparse_checkpoint(merge_and_unload(model), tmp_path / "out")
