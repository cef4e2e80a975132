# SPDX-License-Identifier: Apache-2.0
"""Model directories in compressed-tensors' formats: what its releases wrote, round trips, shards, every refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from byte_model import full_disk
from interchange_cases import DIRECTORIES, WRITTEN, raw_state
from lors_cuda import load_sparse_checkpoint, save_sparse_checkpoint
from lors_cuda.compressed_tensors.bitmask import FORMATS, encode_weight
from lors_cuda.compressed_tensors.files import INDEX_NAME, read_tensors
from models import refused, tiny_llama, trained

pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")


def saved(path: Path, format: str = "sparse-24-bitmask", shard_size: str | None = None, **model) -> Path:
    """A tiny Llama in a directory, in more than one shard where a size is given."""
    llama = tiny_llama(**model)
    if shard_size is not None:
        save = llama.save_pretrained
        llama.save_pretrained = lambda where, **options: save(where, **{**options, "max_shard_size": shard_size})
    save_sparse_checkpoint(llama, path, format)
    return path


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change) -> None:
    tensors = safetensors_torch.load_file(path)
    change(tensors)
    safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})


def sparsity_config(directory: Path) -> dict:
    block = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == "compressed-tensors"
    return block["sparsity_config"]


def configured(directory: Path, **blocks) -> None:
    """Replace what config.json says of compression."""

    def change(config):
        config.pop("quantization_config", None)
        config.update(blocks)

    edit_json(directory / "config.json", change)


# ---- what compressed-tensors wrote ----


@pytest.mark.parametrize("name", DIRECTORIES)
def test_what_compressed_tensors_wrote_is_read(name):
    dense = safetensors_torch.load_file(WRITTEN / "dense.safetensors")
    model = load_sparse_checkpoint(WRITTEN / name)
    state = model.state_dict()
    assert state.keys() == dense.keys()
    for key, tensor in dense.items():
        assert state[key].dtype == torch.bfloat16
        assert torch.equal(state[key], tensor), key
        if "proj" in key:
            assert not (state[key].signbit() & (state[key] == 0)).any()
    assert not hasattr(model.config, "quantization_config")
    assert model.config._name_or_path == str(WRITTEN / name)
    assert not model.training


def test_what_is_written_is_what_compressed_tensors_wrote(tmp_path):
    """Tensor for tensor, except that a group with fewer than two weights may be filled in another column."""
    for format in FORMATS:
        theirs = WRITTEN / f"{format}-0.12.2"
        save_sparse_checkpoint(load_sparse_checkpoint(theirs), tmp_path / format, format)
        mine = safetensors_torch.load_file(tmp_path / format / "model.safetensors")
        other = safetensors_torch.load_file(theirs / "model.safetensors")
        assert {k: (t.dtype, t.shape) for k, t in mine.items()} == {k: (t.dtype, t.shape) for k, t in other.items()}
        for key, tensor in mine.items():
            if format == "sparse-bitmask" or not key.endswith(("compressed", "bitmask")):
                assert torch.equal(tensor, other[key]), key
        written, expected = sparsity_config(tmp_path / format), sparsity_config(theirs)
        assert written.keys() == expected.keys()
        for field in ("format", "sparsity_structure", "targets", "ignore"):
            assert written[field] == expected[field]


@pytest.mark.parametrize("key", ["compression_config", "sparsity_config"])
def test_configurations_of_older_releases(tmp_path, key):
    shutil.copytree(WRITTEN / "sparse-bitmask-0.8.0", tmp_path / "model")
    sparsity = {"format": "sparse-bitmask", "sparsity_structure": "unstructured"}
    configured(tmp_path / "model", **{key: sparsity if key == "sparsity_config" else {"sparsity_config": sparsity}})
    model = load_sparse_checkpoint(tmp_path / "model")
    assert not hasattr(model.config, key)
    assert raw_state(model.state_dict()) == raw_state(
        load_sparse_checkpoint(WRITTEN / "sparse-bitmask-0.8.0").state_dict()
    )


# ---- round trips ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["dense", *FORMATS])
def test_round_trips(tmp_path, format, dtype):
    before = tiny_llama(dtype=dtype)
    before.generation_config.max_new_tokens = 7
    save_sparse_checkpoint(before, tmp_path / "model", format)
    model = load_sparse_checkpoint(tmp_path / "model")
    assert raw_state(model.state_dict()) == raw_state({name: t + 0.0 for name, t in before.state_dict().items()})
    assert type(model) is type(before)
    assert model.generation_config.to_dict() == before.generation_config.to_dict()
    names = safetensors_torch.load_file(tmp_path / "model" / "model.safetensors").keys()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    if format == "dense":
        assert names == before.state_dict().keys()
        assert not any("quantization" in key or "sparsity" in key or "compression" in key for key in config)
    else:
        assert sum(name.endswith(".bitmask") for name in names) == 14
        assert "lm_head.weight" in names


def test_weights_that_a_format_does_not_fit_stay_dense(tmp_path):
    model = tiny_llama()
    projection = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        projection.weight[3, :4] = 1.0
    for format, kept in (("sparse-24-bitmask", True), ("sparse-bitmask", False)):
        save_sparse_checkpoint(model, tmp_path / format, format)
        names = safetensors_torch.load_file(tmp_path / format / "model.safetensors").keys()
        assert ("model.layers.0.mlp.down_proj.weight" in names) == kept
        ignored = sparsity_config(tmp_path / format)["ignore"]
        assert ignored == (["model.layers.0.mlp.down_proj", "lm_head"] if kept else ["lm_head"])
        assert raw_state(load_sparse_checkpoint(tmp_path / format).state_dict()) == raw_state(model.state_dict())


@pytest.mark.parametrize("format", FORMATS)
def test_shards(tmp_path, format):
    path = saved(tmp_path / "model", format, shard_size="20KB")
    files = {file.name for file in path.glob("*.safetensors")}
    assert len(files) >= 3
    index = json.loads((path / INDEX_NAME).read_text())
    held = {file: safetensors_torch.load_file(path / file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in held.values() for t in tensors.values())
    assert raw_state(load_sparse_checkpoint(path).state_dict()) == raw_state(tiny_llama().state_dict())

    # compressed-tensors' shards may part a weight from its bits.
    name = next(name for name in index["weight_map"] if name.endswith("bitmask"))
    source = index["weight_map"][name]
    target = next(file for file in files if file != source)
    moved = held[source].pop(name)
    edit_tensors(path / source, lambda tensors: tensors.pop(name))
    edit_tensors(path / target, lambda tensors: tensors.update({name: moved}))
    edit_json(path / INDEX_NAME, lambda content: content["weight_map"].update({name: target}))
    assert raw_state(load_sparse_checkpoint(path).state_dict()) == raw_state(tiny_llama().state_dict())


def test_a_named_dense_format_is_read_without_compressed_tensors(tmp_path):
    """What llm-compressor writes for a sparse model that it does not compress."""
    path = saved(tmp_path / "model", "dense")
    for sparsity in ({"format": "dense", "sparsity_structure": "2:4"}, {}):
        configured(
            path,
            quantization_config={"quant_method": "compressed-tensors", "sparsity_config": sparsity, "format": "dense"},
        )
        model = load_sparse_checkpoint(path)
        assert raw_state(model.state_dict()) == raw_state(tiny_llama().state_dict())
        assert not hasattr(model.config, "quantization_config")


def test_tied_embeddings(tmp_path):
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    save_sparse_checkpoint(model, tmp_path / "model", "sparse-24-bitmask")
    loaded = load_sparse_checkpoint(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert raw_state(loaded.state_dict()) == raw_state(model.state_dict())


def test_decoding_holds_one_weight_at_a_time(tmp_path, monkeypatch):
    """Beyond the dense tensors themselves: the parts of a weight are let go before the next one's are read."""
    import weakref

    from lors_cuda.compressed_tensors import files

    path = saved(tmp_path / "model")
    decode, alive = files.decode_weight, []

    def watch(parts, format, name):
        assert all(reference() is None for reference in alive)
        alive[:] = [weakref.ref(part) for part in parts.values()]
        return decode(parts, format, name)

    monkeypatch.setattr(files, "decode_weight", watch)
    assert len(read_tensors(path, "sparse-24-bitmask")) == len(tiny_llama().state_dict())
    assert len(alive) == 3


# ---- refusals ----


@pytest.mark.parametrize(
    ("block", "fragments"),
    [
        ({"quant_method": "awq", "bits": 4}, ["quantized with 'awq'", "the checkpoint that it was made from"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["quantized with 'bitsandbytes'"]),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
             "config_groups": {"group_0": {"targets": ["Linear"]}}},
            ["quantized by compressed-tensors in the format 'nvfp4-pack-quantized'"],
        ),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {}},
             "sparsity_config": {"format": "sparse-24-bitmask"}},
            ["is corrupted", "config_groups['group_0'] must be an object with a list of targets"],
        ),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, ["compressed format 'pack-quantized'"]),
        ({"sparsity_config": {"format": "sparse-48"}}, ["'sparse-48'", "sparse-24-bitmask, sparse-bitmask and dense"]),
        ({"sparsity_config": "sparse"}, ["'sparse'"]),
        ({"kv_cache_scheme": {"num_bits": 8}}, ["(kv_cache_scheme), which is not read"]),
        ({"transform_config": {"config_groups": {"R1": {}}}}, ["transform_config"]),
        ([1], ["quantization_config is a list"]),
    ],
)  # fmt: skip
def test_other_formats_are_refused_by_name(tmp_path, block, fragments):
    path = saved(tmp_path / "model")
    configured(path, quantization_config=block)
    refused(ValueError, lambda: load_sparse_checkpoint(path), str(path), *fragments)


def test_config_and_files_must_belong_together(tmp_path):
    path = saved(tmp_path / "model")
    configured(path, quantization_config={"sparsity_config": {"format": "sparse-bitmask"}})
    refused(ValueError, lambda: load_sparse_checkpoint(path), "_proj.weight' has no 'row_offsets'")
    configured(path, quantization_config={"sparsity_config": {"format": "dense"}})
    refused(
        ValueError, lambda: load_sparse_checkpoint(path), "names no compressed format", "bitmask, compressed, shape"
    )
    configured(path)
    refused(ValueError, lambda: load_sparse_checkpoint(path), "is incomplete", "13 more tensors")
    (path / "config.json").write_text('{"quantization_config": ')
    refused(ValueError, lambda: load_sparse_checkpoint(path), "config.json' is not readable JSON")
    (path / "config.json").write_text("[]")
    refused(ValueError, lambda: load_sparse_checkpoint(path), "must be a JSON object")
    (path / "config.json").unlink()
    refused(FileNotFoundError, lambda: load_sparse_checkpoint(path), "has no config.json")
    refused(FileNotFoundError, lambda: load_sparse_checkpoint(tmp_path / "none"), "does not exist")


def test_damaged_files_are_refused(tmp_path):
    path = saved(tmp_path / "model", shard_size="20KB")
    whole = tmp_path / "whole"
    shutil.copytree(path, whole)
    index = json.loads((path / INDEX_NAME).read_text())["weight_map"]
    name = "model.layers.0.mlp.up_proj.bitmask"
    shard = path / index[name]

    def refuse(*fragments):
        refused(ValueError, lambda: load_sparse_checkpoint(path), *fragments)
        shutil.rmtree(path)
        shutil.copytree(whole, path)

    shard.write_bytes(shard.read_bytes()[:-64])
    refuse(f"{shard.name}' is not a readable safetensors file", "truncated or corrupted", "Copy it again")
    shard.write_bytes(b"")
    refuse(f"{shard.name}' is not a readable safetensors file")
    shard.unlink()
    refuse("is incomplete", f"names '{shard.name}', which is not there")
    edit_tensors(shard, lambda tensors: tensors.pop(name))
    refuse(f"says that '{name}' is in '{shard.name}', where it is not")
    edit_json(path / INDEX_NAME, lambda content: content["weight_map"].pop(name))
    edit_tensors(shard, lambda tensors: tensors.pop(name))
    refuse("'model.layers.0.mlp.up_proj.weight' has no 'bitmask'")
    other = next(file for file in path.glob("*.safetensors") if file != shard)
    edit_tensors(other, lambda tensors: tensors.update({name: torch.zeros(1, dtype=torch.uint8)}))
    refuse(f"holds the tensor '{name}' twice")
    edit_tensors(shard, lambda tensors: tensors.update({name.replace("bitmask", "weight"): torch.zeros(64, 32)}))
    refuse("'model.layers.0.mlp.up_proj.weight' both dense and compressed")
    edit_tensors(shard, lambda tensors: tensors[name].bitwise_xor_(1))
    refuse("The compressed weight 'model.layers.0.mlp.up_proj.weight' is corrupted", "row 0, columns 0 to 7")
    # A weight that is sound by itself and is not this model's.
    sound = encode_weight(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), "sparse-24-bitmask")
    parts = {name.replace("bitmask", part): tensor for part, tensor in sound.items()}
    edit_tensors(shard, lambda tensors: tensors.update(parts))
    refuse("could not be loaded")
    for file in ("../" + shard.name, "", "..", "a" * 256, 1):
        edit_json(path / INDEX_NAME, lambda content, file=file: content["weight_map"].update({name: file}))
        refuse("weight_map must give each tensor the name of a file beside it")
    edit_json(path / INDEX_NAME, lambda content: content.update(weight_map=[1]))
    refuse("is corrupted: its weight_map")
    (path / INDEX_NAME).unlink()
    refuse("has neither model.safetensors nor model.safetensors.index.json")
    edit_tensors(path / index["model.norm.weight"], lambda tensors: tensors.pop("model.norm.weight"))
    edit_json(path / INDEX_NAME, lambda content: content["weight_map"].pop("model.norm.weight"))
    refuse("incomplete: 'model.norm.weight' and 0 more")
    assert raw_state(load_sparse_checkpoint(path).state_dict()) == raw_state(tiny_llama().state_dict())


def test_what_cannot_be_saved_is_refused_and_nothing_is_left(tmp_path):
    model = tiny_llama()
    path = tmp_path / "model"
    refused(ValueError, lambda: save_sparse_checkpoint(model, path, "marlin-24"), "'marlin-24'", "'dense'")
    refused(ValueError, lambda: save_sparse_checkpoint(trained(), path), "merge_and_unload first", "q_proj'")
    refused(TypeError, lambda: save_sparse_checkpoint(nn.Linear(4, 4), path), "must be a transformers model")
    model.config.quantization_config = {"quant_method": "gptq"}
    refused(ValueError, lambda: save_sparse_checkpoint(model, path), "is quantized")
    del model.config.quantization_config
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.fill_(1.0)
    refused(ValueError, lambda: save_sparse_checkpoint(model, path, "sparse-24-bitmask"), "15 linears is 2:4")
    refused(ValueError, lambda: save_sparse_checkpoint(model, path, "sparse-bitmask"), "sparse enough")
    for format in ("dense", "sparse-24-bitmask"):
        with full_disk(10_000):
            refused(
                OSError,
                lambda format=format: save_sparse_checkpoint(tiny_llama(), path, format),
                "could not be written",
            )
    assert list(tmp_path.iterdir()) == []
    save_sparse_checkpoint(model, path)
    before = (path / "model.safetensors").read_bytes()
    refused(FileExistsError, lambda: save_sparse_checkpoint(model, path), "not an empty directory")
    assert (path / "model.safetensors").read_bytes() == before


def test_tensors_that_the_model_has_no_place_for_are_named(tmp_path):
    directory = saved(tmp_path / "model")
    edit_json(directory / "config.json", lambda config: config.update(num_hidden_layers=1))
    with pytest.warns(UserWarning, match=r"hold 'model\.layers\.1\..*' and \d+ more tensors that LlamaForCausalLM"):
        load_sparse_checkpoint(directory)
