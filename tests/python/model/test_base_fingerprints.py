# SPDX-License-Identifier: Apache-2.0
"""Adapter files know the mask, the values and the dtype of their base; each difference has its own sentence."""

from __future__ import annotations

import hashlib
import json
import struct
import warnings

import pytest
import torch
from torch import nn

from adapter_directories import Q_PROJ, edit_config
from lors_cuda import (
    LoRSConfig,
    SparseWeight,
    estimate_gradients,
    get_lors_model,
    init_from_gradients,
    load_adapter,
    merge_and_unload,
    save_adapter,
)
from lors_cuda.fingerprints import fingerprint
from models import assert_unchanged, batch, fill_adapters, refused, snapshot, tiny_llama, trained

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def two_of_four(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    return values * torch.tensor([1, 0, 0, 1], dtype=dtype).repeat(columns // 4)


# ---- the fingerprint ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_that_of_the_values_in_every_layout_and_wider_dtype(dtype):
    weight = two_of_four(9, 72, dtype)
    expected = fingerprint(SparseWeight.from_dense(weight, "dense"))
    assert expected.dtype == str(dtype).removeprefix("torch.")
    for layout in ("2:4", "bitmap"):
        assert fingerprint(SparseWeight.from_dense(weight, layout)) == expected
    assert fingerprint(SparseWeight.from_dense(weight, mask=weight != 0)) == expected
    assert fingerprint(SparseWeight(torch.where(weight == 0, -0.0, weight))) == expected
    for wider in DTYPES[DTYPES.index(dtype) :]:
        if torch.promote_types(dtype, wider) == wider:
            assert fingerprint(SparseWeight(weight.to(wider))).values == expected.values


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_change_in_any_place_gives_another(dtype):
    weight = two_of_four(3, 8, dtype)
    seen = {fingerprint(SparseWeight(weight)).values}
    for row, column in (weight != 0).nonzero().tolist():
        changed = weight.clone()
        value = changed[row, column]
        changed[row, column] = value * (1 + torch.finfo(dtype).eps)
        seen.add(fingerprint(SparseWeight(changed)).values)
    swapped = weight.clone()
    swapped[0, [0, 4]] = weight[0, [4, 0]]
    rows = weight[[1, 0, 2]]
    seen |= {fingerprint(SparseWeight(each)).values for each in (swapped, rows, weight.view(6, 4), -weight)}
    assert len(seen) == 1 + 12 + 4


def test_it_is_of_known_numbers():
    def scrambled(value: float) -> int:
        (bits,) = struct.unpack("<q", struct.pack("<d", value))
        return bits % 2**64 ^ bits % 2**64 >> 32

    sums = [scrambled(1.5) + 5 * scrambled(-2.0), 3 * scrambled(0.25)]
    data = b"2x3:" + b"".join(struct.pack("<Q", number % 2**64) for number in sums)
    weight = SparseWeight.from_dense(torch.tensor([[1.5, 0.0, -2.0], [0.0, 0.25, 0.0]]).bfloat16(), "bitmap")
    assert fingerprint(weight).values == hashlib.sha256(data).hexdigest()


# ---- loading: the five causes ----


def silent(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return call()


def load(model: nn.Module, directory) -> str:
    """Load the adapter with one warning, which is returned."""
    with pytest.warns(UserWarning, match="The adapter in") as caught:
        load_adapter(model, directory)
    texts = [str(each.message) for each in caught if each.category is UserWarning]
    assert len(texts) == 1
    return texts[0]


def converted_if(convert_first: bool, model: nn.Module, **fields) -> nn.Module:
    return get_lors_model(model, LoRSConfig(r=4, lora_alpha=8, **fields)) if convert_first else model


@pytest.mark.parametrize("convert_first", [False, True])
@pytest.mark.parametrize("layout", ["dense", "bitmap"])
def test_the_right_base_in_another_layout_or_a_wider_dtype_loads_silently(tmp_path, convert_first, layout):
    save_adapter(trained(torch.bfloat16), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())["lors"]
    assert fields["weight_dtypes"][Q_PROJ] == "bfloat16"
    assert len(fields["value_fingerprints"][Q_PROJ]) == 64
    for dtype in (torch.bfloat16, torch.float32):
        base = tiny_llama(dtype=torch.bfloat16).to(dtype)
        silent(lambda base=base: load_adapter(converted_if(convert_first, base, layout=layout), tmp_path))


@pytest.mark.parametrize("convert_first", [False, True])
def test_other_values_are_warned_of_by_name_or_refused(saved, convert_first):
    _, directory = saved
    base = tiny_llama()
    base.get_submodule(Q_PROJ).weight.data *= 1.5
    model = converted_if(convert_first, base)
    before = snapshot(model)
    message = refused(
        ValueError,
        lambda: load_adapter(model, directory, strict_values=True),
        f"The weights of '{Q_PROJ}' have the mask of those it was trained on, but other values",
        "use strict_values=False",
    )
    assert message.count("self_attn") == 1, "only the layer that differs is named"
    assert_unchanged(model, before)
    text = load(model, directory)
    assert f"'{Q_PROJ}'" in text
    assert "strict" not in text
    assert "Load the base model it was trained on" in text


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head"]}])
def test_merging_twice_is_warned_of(tmp_path, fields):
    model = trained(**fields)
    save_adapter(model, tmp_path)
    merge_and_unload(model)
    assert "merged into them already" in load(model, tmp_path)


def test_an_adapter_that_changes_nothing_can_be_merged_twice(tmp_path):
    model = get_lors_model(tiny_llama(), LoRSConfig(r=4, lora_alpha=8))
    save_adapter(model, tmp_path)
    merge_and_unload(model)
    silent(lambda: load_adapter(model, tmp_path))


def test_a_gradient_start_leaves_the_base_as_it_was(tmp_path):
    model = tiny_llama()
    gradients = estimate_gradients(model, [batch(1)])
    get_lors_model(model, LoRSConfig(r=4, modules_to_save=["lm_head"], exclude_modules=["lm_head"]))
    init_from_gradients(model, gradients)
    fill_adapters(model)
    save_adapter(model, tmp_path)
    silent(lambda: load_adapter(tiny_llama(), tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_a_narrower_dtype_is_called_that(saved, dtype):
    _, directory = saved
    model = tiny_llama().to(dtype)
    text = load(model, directory)
    assert "trained on weights in torch.float32" in text
    assert f"are in {dtype}, so that the values differ. Load the base model in torch.float32" in text


@pytest.mark.parametrize("convert_first", [False, True])
def test_a_mask_that_lost_weights_to_a_narrower_dtype_is_the_dtypes_fault(tmp_path, convert_first):
    def base() -> nn.Module:
        model = tiny_llama()
        weight = model.get_submodule(Q_PROJ).weight
        row, column = weight.nonzero()[0].tolist()
        weight.data[row, column] = 1e-8
        return model

    model = get_lors_model(base(), LoRSConfig(r=4, lora_alpha=8))
    save_adapter(model, tmp_path)
    half = converted_if(convert_first, base().half())
    cause = f"weights in torch.float32, and those of '{Q_PROJ}' are in torch.float16, where small weights round to zero"
    message = refused(ValueError, lambda: load_adapter(half, tmp_path), cause, "in torch.float32", "strict_mask=False")
    assert "another sparsity mask" not in message
    # A file of an earlier version does not say which dtype it was.
    fields = json.loads((tmp_path / "adapter_config.json").read_text())["lors"]
    del fields["weight_dtypes"], fields["value_fingerprints"]
    edit_config(tmp_path, lors=fields)
    refused(
        ValueError,
        lambda: load_adapter(half, tmp_path),
        "another sparsity mask",
        "torch.float16 now and in another dtype",
    )
    silent(lambda: load_adapter(base(), tmp_path))


def test_a_base_in_a_wider_dtype_may_be_another_one_or_the_one_that_was_rounded(tmp_path):
    save_adapter(get_lors_model(tiny_llama().bfloat16(), LoRSConfig(r=4, lora_alpha=8)), tmp_path)
    hint = "if this is that one, in torch.float32 now and in torch.bfloat16 in training"
    refused(ValueError, lambda: load_adapter(tiny_llama(1), tmp_path), "another sparsity mask", hint)
    text = load(tiny_llama(), tmp_path)
    assert "other values" in text
    assert hint in text


@pytest.mark.parametrize("door", ["core", "peft"])
def test_a_mask_that_does_not_fit_the_layout_is_another_mask(tmp_path, door):
    save_adapter(trained(layout="2:4"), tmp_path)
    model = tiny_llama()
    model.get_submodule(Q_PROJ).weight.data += 1.0
    call = load_adapter
    if door == "peft":
        pytest.importorskip("peft")
        from lors_cuda.peft import from_pretrained as call
    before = snapshot(model)
    refused(ValueError, lambda: call(model, tmp_path), f"another sparsity mask: '{Q_PROJ}' differ")
    assert_unchanged(model, before)


def test_weights_that_are_not_loaded_yet_are_called_that(saved):
    _, directory = saved
    for model in (tiny_llama().to("meta"), get_lors_model(tiny_llama(), LoRSConfig(r=4, lora_alpha=8)).to("meta")):
        refused(ValueError, lambda model=model: load_adapter(model, directory), "meta device", "weights")


def test_files_without_the_values_load_silently(saved):
    _, directory = saved
    fields = json.loads((directory / "adapter_config.json").read_text())["lors"]
    edit_config(directory, lors={name: fields[name] for name in ("format_version", "mask_fingerprints")})
    base = tiny_llama()
    base.get_submodule(Q_PROJ).weight.data *= 1.5
    silent(lambda: load_adapter(base, directory))
    edit_config(directory, lors={**fields, "value_fingerprints": 3})
    refused(ValueError, lambda: load_adapter(tiny_llama(), directory), "is corrupted", "fingerprints")
