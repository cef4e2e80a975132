# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints of every format: read to the last bit, by this package's readers and by others' writers."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from interchange_cases import WRITTEN, raw_state, sparse24
from lors_cuda import load_sparse_checkpoint, save_sparse_checkpoint
from lors_cuda.compressed_tensors.quantized import decode_quantized, encode_quantized
from lors_cuda.compressed_tensors.schemes import Scheme
from models import refused
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
# What compressed-tensors 0.20 still reads and writes.
CURRENT = {name: s for name, s in SCHEMES.items() if s.format not in ("gptq", "marlin-24") and not s.bitmask}


@FORMATS
def test_every_format_dequantises_to_code_times_scale(tmp_path, scheme):
    model = small_llama()
    written = write_quantized(model, tmp_path / "q", scheme)
    loaded = load_sparse_checkpoint(tmp_path / "q", quantized="dequantize")
    assert len(written) == 7
    state = loaded.state_dict()
    for name, weight in written.items():
        assert type(loaded.get_submodule(name.removesuffix(".weight"))) is torch.nn.Linear
        assert torch.equal(state[name], weight.dense().bfloat16()), name
        assert not bool(state[name].signbit()[state[name] == 0].any())
        assert bool((state[name][model.state_dict()[name] == 0] == 0).all()), "zeros stay"
    for name in state.keys() - written.keys():
        assert torch.equal(state[name], model.state_dict()[name]), name
    assert not hasattr(loaded.config, "quantization_config")
    ids = torch.arange(8)[None]
    assert bool(loaded(input_ids=ids).logits.isfinite().all())
    save_sparse_checkpoint(loaded, tmp_path / "dense")
    assert torch.equal(load_sparse_checkpoint(tmp_path / "dense")(input_ids=ids).logits, loaded(input_ids=ids).logits)


@pytest.mark.parametrize("scheme", CURRENT.values(), ids=CURRENT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_compressed_tensors_are_read_bit_for_bit(scheme, dtype):
    """Its own compressor writes, its own dequantises, and ours reads the same; also where no whole word is filled."""
    pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    described = QuantizationScheme(**config_of(scheme)["config_groups"]["group_0"], format=scheme.format)
    torch.manual_seed(1)
    for N, K in ((9, 192), (64, 64), (11, 36 if scheme.strategy != "group" else 64)):
        weight = sparse24(N, K)
        grid = quantized(weight, scheme, dtype)
        one = scheme.strategy == "tensor"
        scales, zeros = (t[:1, 0].clone() if one else t for t in (grid.scales, grid.zeros))
        given = {"weight": weight.to(dtype), "weight_scale": scales}
        if not scheme.symmetric:
            given["weight_zero_point"] = zeros
        parts = compressor.compress(given, described)
        read = decode_quantized(parts, scheme, "weight")
        expected = compressor.decompress(parts, described)["weight"]
        assert read.dequantize("weight").dtype == expected.dtype == dtype
        assert torch.equal(read.dequantize("weight"), expected), (N, K)


@pytest.mark.parametrize("scheme", ["int4 groups", "int8", "fp8"])
def test_models_are_what_transformers_dequantises(tmp_path, scheme):
    pytest.importorskip("compressed_tensors.compressors")
    write_quantized(small_llama(), tmp_path / "q", SCHEMES[scheme])
    ours = load_sparse_checkpoint(tmp_path / "q", quantized="dequantize").state_dict()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "q", quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    ).state_dict()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def old_weights():
    """{(name, scheme): tensors} of what compressed-tensors 0.12.2 wrote."""
    tensors = safetensors_torch.load_file(WRITTEN / "quantized-0.12.2.safetensors")
    formats = {"e4m3": "float-quantized", "8": "int-quantized"}
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        stored, kind, share = name.split(".")
        group = None if share == "channel" else int(share)
        grid = "e4m3" if kind == "e4m3" else f"int{kind}"
        bitmask = stored == "bitmask"
        format = formats[kind] if bitmask else stored
        scheme = Scheme(format, grid, "group" if group else "channel", group, bitmask=bitmask)
        parts = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == name}
        yield name, scheme, parts


OLD = {name: (scheme, parts) for name, scheme, parts in old_weights()}


@pytest.mark.parametrize("name", OLD)
def test_formats_that_nothing_else_reads_any_more(name):
    scheme, parts = OLD[name]
    codes, scales = parts.pop("codes"), parts.pop("scales")
    read = decode_quantized(parts, scheme, name)
    parts |= {"codes": codes, "scales": scales}
    assert torch.equal(read.codes.float(), codes.float())
    assert torch.equal(read.grid.scales, scales)
    assert read.grid.zero_points is None


def test_the_tests_own_writer_of_marlin_is_the_old_one():
    for name, (scheme, parts) in OLD.items():
        if scheme.format == "marlin-24":
            from quantized_writers import Written, marlin24

            group = scheme.columns(parts["codes"].shape[1])
            zeros = torch.zeros_like(parts["scales"], dtype=torch.int8)
            ours = marlin24(Written(parts["codes"], parts["scales"], zeros, group), scheme)
            assert torch.equal(ours["scale_packed"], parts["scale_packed"]), name
            codes = decode_quantized(ours, scheme, name).codes
            assert torch.equal(codes, parts["codes"]), name


def test_quantised_weights_are_refused_unless_told_what_becomes_of_them(tmp_path):
    write_quantized(small_llama(), tmp_path / "q", SCHEMES["int4 groups"])
    refused(ValueError, lambda: load_sparse_checkpoint(tmp_path / "q"), "(pack-quantized)", "quantized='dequantize'")
    refused(ValueError, lambda: load_sparse_checkpoint(tmp_path / "q", quantized="x"), "quantized is 'x'")
    small_llama().save_pretrained(tmp_path / "plain")
    call = lambda: load_sparse_checkpoint(tmp_path / "plain", mask_from=tmp_path / "q")  # noqa: E731
    refused(ValueError, call, "not quantized", "leave mask_from out")
    load_sparse_checkpoint(tmp_path / "plain", quantized="dequantize")


UNREAD = {
    "awq": ({"quant_method": "awq", "bits": 4}, "quantized with 'awq'"),
    "nf4": ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}, "quantized with 'bitsandbytes'"),
    "hqq": ({"quant_method": "hqq"}, "quantized with 'hqq'"),
    "fp8": ({"quant_method": "fp8"}, "quantized with 'fp8'"),
    "nvfp4": ({"format": "nvfp4-pack-quantized"}, "in the format 'nvfp4-pack-quantized'"),
    "mxfp4": ({"format": "mxfp4-pack-quantized"}, "in the format 'mxfp4-pack-quantized'"),
    "kv cache": ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    "transformed": ({"transform_config": {"config_groups": {"a": {}}}}, "transform_config"),
    "3 bits": ({"weights.num_bits": 3}, "int weights of 3 bits"),
    "fp4": ({"weights.num_bits": 4, "weights.type": "float"}, "float weights of 4 bits"),
    "act-order": ({"weights.actorder": "group"}, "act-order (actorder='group')"),
    "blocks": ({"weights.strategy": "block"}, "a scale for each 'block'"),
    "group": ({"weights.group_size": 0}, "group_size is 0"),
    "odd group": ({"weights.group_size": 80}, "groups of 80 do not divide"),
    "symmetry": ({"weights.symmetric": 1}, "symmetric=1"),
    "no weights": ({"config_groups": {"g": {"targets": ["Linear"], "weights": None}}}, "quantizes no weights"),
    "no targets": ({"config_groups": {"g": {"weights": {}}}}, "a list of targets"),
    "expression": ({"config_groups": {"g": {"targets": ["re:("], "weights": {}}}}, "is no regular expression"),
    "no group": ({"config_groups": {}}, "without groups"),
    "other targets": ({"targets": ["re:.*nowhere"]}, "no group of its config.json"),
    "both": ({"sparsity_config": {"format": "sparse-bitmask"}}, "'sparse-bitmask' besides"),
    "packed bitmask": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "stores the format 'pack-quantized' as"),
    "float in a pack": ({"weights.type": "float"}, "float weights of 4 bits"),
    "marlin groups": ({"format": "marlin-24"}, "marlin-24 is symmetric, with groups of 128"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_configurations_that_are_not_read_are_named(tmp_path, case):
    changes, sentence = UNREAD[case]
    write_quantized(small_llama(), tmp_path / "q", SCHEMES["int4 groups"])

    def change(block):
        for key, value in changes.items():
            place, _, last = key.rpartition(".")
            group = block["config_groups"]["group_0"]
            (group["weights"] if place else group if key == "targets" else block)[last] = value

    edit(tmp_path / "q", change)
    refused(ValueError, lambda: load_sparse_checkpoint(tmp_path / "q", quantized="dequantize"), sentence)


UNREAD_GPTQ = {
    "desc_act": ({"desc_act": True}, "act-order (desc_act)"),
    "bits": ({"bits": 3}, "to 3 bits"),
    "marlin": ({"checkpoint_format": "marlin"}, "stored as 'marlin'"),
    "marlin flag": ({"is_marlin_format": True}, "stored as 'marlin'"),
    "dynamic": ({"dynamic": {"-:lm_head": {}}}, "differently for each module"),
    "group": ({"group_size": "128"}, "group_size is '128'"),
    "other group": ({"group_size": 64}, "'qzeros' is torch.int32 with shape"),
}


@pytest.mark.parametrize("case", UNREAD_GPTQ)
def test_gptq_that_is_not_read_is_named(tmp_path, case):
    changes, sentence = UNREAD_GPTQ[case]
    write_quantized(small_llama(), tmp_path / "q", SCHEMES["gptq"])
    edit(tmp_path / "q", lambda block: block.update(changes))
    refused(ValueError, lambda: load_sparse_checkpoint(tmp_path / "q", quantized="dequantize"), sentence)


def damaged(change, *, scheme="int4 asymmetric groups"):
    """A weight's parts after a change."""
    torch.manual_seed(0)
    parts = parts_of(quantized(sparse24(64, 384), SCHEMES[scheme], torch.float16), SCHEMES[scheme])
    change(parts)
    return lambda: decode_quantized(parts, SCHEMES[scheme], "model.q_proj.weight")


def put(part, place, value):
    return lambda parts: parts[part].__setitem__(place, value)


@pytest.mark.parametrize(
    ("scheme", "change", "sentence"),
    [
        ("int4 groups", put("weight_scale", (3, 1), 0.0), "scale 1 of row 3 is 0.0"),
        ("int4 groups", put("weight_scale", (3, 1), -0.5), "scale 1 of row 3 is -0.5"),
        ("fp8", put("weight_scale", (3, 0), float("nan")), "scale 0 of row 3 is nan"),
        ("marlin int4", put("scale_packed", (0, 9), float("inf")), "is inf"),
        ("gptq", put("scales", (1, 2), 0.0), "scale 1 of row 2 is 0.0"),
        (
            "fp8",
            lambda parts: parts["weight"].view(torch.int8).__setitem__((5, 7), 127),
            "row 5, column 7 is no number",
        ),
        ("fp8", lambda parts: parts["weight"].view(torch.int8).__setitem__((5, 7), -1), "row 5, column 7 is no number"),
        ("4 bits in int8", put("weight", (2, 3), 8), "row 2, column 3 is beyond 4 bits"),
        ("4 bits in int8", put("weight_zero_point", (2, 3), -9), "a zero point is beyond 4 bits"),
        ("int4 groups", lambda parts: parts.pop("weight_shape"), "'weight_shape' is missing"),
        ("int4 groups", lambda parts: parts.update(meta=torch.ones(1)), "'meta' is too much"),
        ("int4 groups", put("weight_shape", 1, 352), "'weight_packed' is torch.int32 with shape (64, 48)"),
        ("int4 groups", put("weight_shape", 0, -1), "its shape is (-1, 384)"),
        ("int4 groups", lambda parts: parts.update(weight_g_idx=torch.arange(384)), "'weight_g_idx' is too much"),
        (
            "int4 groups",
            lambda parts: parts.update(weight_scale=torch.ones(64, 6)),
            "it must be floating with (64, 12)",
        ),
        ("int4 groups", lambda parts: parts.update(weight_zero_point=torch.ones(8, 12)), "zero points that are not 0"),
        ("int4 asymmetric groups", lambda parts: parts.pop("weight_zero_point"), "'weight_zero_point' is missing"),
        ("fp8 bitmask", put("bitmask", (1, 1), 0x37), "first in row 1, columns 8 to 15"),
        ("marlin int4", lambda parts: parts["meta"].fill_(0), "no code of two positions in row 0"),
        (
            "marlin int4",
            lambda parts: parts.update(meta=parts["meta"][:-1]),
            "'meta' is torch.int16 with shape (11, 128)",
        ),
        ("gptq", lambda parts: parts["g_idx"].copy_(parts["g_idx"].flip(0)), "is in act-order"),
        ("gptq", put("qzeros", (1, 1), -1), "zero point 15 in row 8, group 1"),
        ("fp8", lambda parts: parts.update(weight=parts["weight"].float()), "'weight' is torch.float32"),
        ("fp8", lambda parts: parts.update(weight=parts["weight"][0]), "it must have rows and columns"),
        ("int8 tensor", lambda parts: parts.update(weight_scale=torch.ones(2)), "floating with (1,)"),
    ],
)
def test_damaged_weights_are_refused_by_their_first_wrong_place(scheme, change, sentence):
    refused(ValueError, damaged(change, scheme=scheme), "model.q_proj.weight", sentence)


def test_negative_zeros_are_zeros(tmp_path):
    weight = damaged(lambda parts: parts["weight"].view(torch.int8)[0].fill_(-128), scheme="fp8")()
    assert not bool(weight.nonzero()[0].any())
    dense = weight.dequantize("w")[0]
    assert torch.equal(dense, torch.zeros_like(dense))
    assert not bool(dense.signbit().any())


def test_a_weight_beyond_the_range_of_its_scale_is_refused():
    weight = damaged(put("weight_scale", (3, 1), 60000.0), scheme="int8 asymmetric")()
    refused(ValueError, lambda: weight.dequantize("w"), "row 3, column", "beyond the range of torch.float16")


def test_files_that_contradict_their_configuration_are_refused(tmp_path):
    directory, whole = tmp_path / "q", tmp_path / "whole"
    write_quantized(small_llama(), whole, SCHEMES["int4 groups"])
    stem = "model.layers.0.mlp.up_proj"

    def case(change, *fragments):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(whole, directory)
        change_tensors(directory, change)
        refused(ValueError, lambda: load_sparse_checkpoint(directory, quantized="dequantize"), *fragments)

    case(lambda t: t.update({f"{stem}.weight": torch.ones(384, 128)}), "both whole and in parts")
    case(
        lambda t: [t.pop(f"{stem}.{part}") for part in ("weight_packed", "weight_scale", "weight_shape")], "incomplete"
    )
    case(lambda t: t.update({"lm_head.weight": torch.zeros(64, 128, dtype=torch.int8)}), "no 'weight_scale' beside it")
    case(lambda t: [t.pop(name) for name in list(t) if "proj" in name], "the files hold none")
    case(lambda t: t.update({f"{stem}.weight_shape": torch.tensor([128, 384])}), "must be torch.int32 (128, 48)")


def test_activations_scales_are_left_out(tmp_path):
    write_quantized(small_llama(), tmp_path / "q", SCHEMES["fp8"])
    change_tensors(tmp_path / "q", lambda t: t.update({"model.layers.0.mlp.up_proj.input_scale": torch.ones(1)}))
    load_sparse_checkpoint(tmp_path / "q", quantized="dequantize")


def test_masks_come_from_the_sparse_checkpoint(tmp_path):
    model = small_llama()
    model.save_pretrained(tmp_path / "sparse")
    save_sparse_checkpoint(model, tmp_path / "bitmask", "sparse-bitmask")
    directory = tmp_path / "q"
    written = write_quantized(model, directory, SCHEMES["int8"])
    edit(directory, lambda block: block.update(sparsity_config={"format": "dense", "sparsity_structure": "2:4"}))
    outside = filled(directory)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.warns(UserWarning, match=r"says that the weights are 2:4, and 1 of 7 are not.*up_proj.*mask_from"):
        load_sparse_checkpoint(directory, quantized="dequantize")
    for source in ("sparse", "bitmask"):
        with pytest.warns(UserWarning, match="outside the given masks") as caught:
            loaded = load_sparse_checkpoint(directory, quantized="dequantize", mask_from=tmp_path / source)
        said = [str(warning.message) for warning in caught]
        assert any(f"{outside} of " in text and "outside the given masks" in text for text in said), said
        state, before = loaded.state_dict(), model.state_dict()
        assert bool((state[name][before[name] == 0] == 0).all())
        kept = before[name] != 0
        expected = torch.where(kept, (written[name].scales * 5).to(torch.bfloat16), 0)[:3]
        assert torch.equal(state[name][:3], expected)
        lost = sum(int((state[n][before[n] != 0] == 0).sum()) for n in written)
        assert (lost > 0) == any(f"{lost} kept weights" in text for text in said)
    refused(
        ValueError,
        lambda: load_sparse_checkpoint(directory, quantized="dequantize", mask_from=directory),
        "is quantized too",
    )
    refused(
        FileNotFoundError,
        lambda: load_sparse_checkpoint(directory, quantized="dequantize", mask_from=tmp_path),
        "holds no model",
    )
    small_llama().model.save_pretrained(tmp_path / "other")
    call = lambda: load_sparse_checkpoint(directory, quantized="dequantize", mask_from=tmp_path / "other")  # noqa: E731
    refused(ValueError, call, "it is another model")


def test_masks_of_asymmetric_codes_leave_the_zero_point(tmp_path):
    model = small_llama()
    model.save_pretrained(tmp_path / "sparse")
    write_quantized(model, tmp_path / "q", SCHEMES["int8 asymmetric"])
    filled(tmp_path / "q")
    with pytest.warns(UserWarning, match="outside the given masks"):
        loaded = load_sparse_checkpoint(tmp_path / "q", quantized="dequantize", mask_from=tmp_path / "sparse")
    for name, weight in model.state_dict().items():
        if name.endswith("proj.weight"):
            assert bool((loaded.state_dict()[name][weight == 0] == 0).all())


@FORMATS
def test_odd_numbers_of_rows_and_one_group_are_read(scheme):
    """Zero points fill no word, and a row is one group; GPTQ and marlin have whole words."""
    torch.manual_seed(3)
    N = 64 if scheme.format in ("gptq", "marlin-24") else 5
    K = scheme.group or 64
    weight = quantized(sparse24(N, K), scheme, torch.float16)
    read = decode_quantized(parts_of(weight, scheme), scheme, "weight")
    assert torch.equal(read.codes.float(), weight.codes.float())
    assert torch.equal(read.dequantize("weight"), weight.dense())


@FORMATS
def test_what_is_written_is_what_was_read(scheme):
    """The same tensors, or for what nothing reads any more those of the format that holds the same."""
    torch.manual_seed(4)
    N, K = (64, 384) if scheme.format in ("gptq", "marlin-24") else (9, 384)
    parts = parts_of(quantized(sparse24(N, K), scheme), scheme)
    read = decode_quantized(parts, scheme, "weight")
    written = encode_quantized(read, scheme)
    if scheme.bitmask:
        assert set(written) == {"weight", "weight_scale"}
        assert torch.equal(written["weight"].float(), read.codes.float())
        return
    if scheme.format == "marlin-24":
        scheme = dataclasses.replace(scheme, format="pack-quantized")
        again = decode_quantized(written, scheme, "weight")
        assert torch.equal(again.codes, read.codes)
        assert torch.equal(again.grid.scales, read.grid.scales)
        return
    assert raw_state(written) == raw_state(parts)
    for name, tensor in written.items():
        assert (tensor.shape, tensor.dtype) == (parts[name].shape, parts[name].dtype), name
        assert tensor.is_contiguous(), name
