# SPDX-License-Identifier: Apache-2.0
"""Choices of 2:4 products in files, and what weights and layers carry for these products; without a GPU, as
test_sparse_products.py."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch

import lors_cuda
from expectations import check_linear
from lors_cuda import LoRSConfig, LoRSLinear, SparseWeight, sparse_product
from lors_cuda.cli import main
from sparse_product_cases import Calls, K, N, R, backward, linear, problem, stored

pytest_plugins = ["sparse_product_fixtures"]


def test_choices_survive_in_a_file(served, seed, tmp_path):
    path = tmp_path / "choices.json"
    case = problem(seed, torch.bfloat16, transposable=True, bias=True)
    metadata = stored(case).library_metadata
    linear(served, case, "auto", metadata)
    backward(served, case, "auto")
    before = lors_cuda.plan_cache_info().choices
    assert {(c.operation, c.bias, c.in_place) for c in before} == {
        ("forward", True, True),
        ("input_gradient", False, False),
    }
    assert lors_cuda.save_product_choices(path) == len(before) == 2
    lors_cuda.plan_cache_clear()
    assert lors_cuda.plan_cache_info().choices == ()
    assert lors_cuda.load_product_choices(path) == 2
    assert lors_cuda.plan_cache_info().choices == before
    with Calls() as calls:
        check_linear(linear(served, case, "auto", metadata), case)
    assert calls.counts == {"Matmul": 1, "MatmulSearch": 0, "SpMMACompress2": 0}, (
        "nothing was measured or searched again"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["choices.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(device="another"), "measured with device another, and here it is fake device"),
        (lambda d: d.update(cusparselt="0.7.1"), "measured with cusparselt 0.7.1, and here it is 0.8.1"),
        (lambda d: d.update(lors_cuda="9.9"), "measured with lors_cuda 9.9"),
        (lambda d: d.update(version=2), "holds no product choices of this version"),
        (lambda d: d.pop("format"), "holds no product choices"),
        (lambda d: d.update(choices=3), "has no list of choices"),
        (lambda d: d["choices"].append(7), "Choice 1 in .* is no table of fields"),
        (lambda d: d["choices"][0].pop("tokens"), "Choice 0 in .* has None for tokens"),
        (lambda d: d["choices"][0].update(tokens=True), "Choice 0 in .* has True for tokens"),
        (
            lambda d: d["choices"][0].update(tokens=12),
            "has 12 for tokens, which must be a multiple of 8",
        ),
        (lambda d: d["choices"][0].update(in_features=2**40), "for in_features, which must be a multiple of 16 below"),
        (lambda d: d["choices"][0].update(algorithm=[2**40, 1, 0]), "for algorithm, which must be three numbers"),
        (lambda d: d["choices"].append({**d["choices"][0], "tokens": 2**30}), "Choice 1 in .* than 2.31 elements"),
        (lambda d: d["choices"][0].update(tokens=-8), "Choice 0 in .* has -8 for tokens"),
        (lambda d: d["choices"][0].update(dense_us=float("nan")), "Choice 0 in .* has nan for dense_us"),
        (lambda d: d["choices"][0].update(dtype="int8"), "'int8' for dtype, which must be one of bfloat16, float16"),
        (lambda d: d["choices"][0].update(operation="back"), "'back' for operation"),
        (lambda d: d["choices"][0].update(algorithm=[1, 2]), "for algorithm, which must be three numbers or null"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(served, seed, tmp_path, change, message):
    path = tmp_path / "choices.json"
    linear(served, problem(seed, torch.bfloat16), "auto")
    lors_cuda.save_product_choices(path)
    lors_cuda.plan_cache_clear()
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        lors_cuda.load_product_choices(path)
    assert lors_cuda.plan_cache_info().choices == ()


def test_files_that_are_none(served, tmp_path):
    with pytest.raises(FileNotFoundError):
        lors_cuda.load_product_choices(tmp_path / "nothing")
    for content in (b"{", b"[]", b"\xff\xfe"):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(ValueError, match="what save_product_choices wrote"):
            lors_cuda.load_product_choices(tmp_path / "bad")


def test_without_cuda_there_is_nothing_and_it_says_why(tmp_path):
    reason = sparse_product.sparse_product_reason()
    if reason is None:
        pytest.skip("this device has sparse products")
    info = lors_cuda.plan_cache_info()
    assert info.reason == reason
    if torch.cuda.is_available():
        return
    assert (info.size, info.choices, info.library_version) == (0, (), None)
    lors_cuda.plan_cache_clear()
    path = tmp_path / "choices.json"
    assert lors_cuda.save_product_choices(path) == lors_cuda.load_product_choices(path) == 0


def test_info_says_whether_and_why_not(capsys):
    assert main(["info", "--json"]) == 0
    products = json.loads(capsys.readouterr().out)["cuda"]["sparse_products"]
    assert products["available"] == (products["reason"] is None)
    assert main(["info"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("2:4 ")]
    assert products["available"] or products["reason"] in line


# ---- weights and layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposable", [False, True])
def test_a_weight_keeps_what_it_knows(served, seed, transposable):
    case = problem(seed, torch.bfloat16, transposable=transposable)
    weight = stored(case)
    parts = SparseWeight.from_sparse24(weight.values, weight.index)
    adapter = case.lora_A, case.lora_B, case.scaling
    others = [copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.to("cpu"), weight.merge(*adapter)]
    for other in (parts, *others, weight.to(torch.float16)):
        assert other.transposable == transposable
        assert torch.equal(other.library_metadata, weight.library_metadata)
    assert weight.nbytes == N * K + 2 * (N * K // 8)
    assert b"library_metadata" in pickle.dumps(weight)
    assert weight.library_metadata.numpy().tobytes() not in pickle.dumps(weight)
    assert weight.to(torch.float32).library_metadata is None


@pytest.mark.parametrize("transposable", [False, True])
def test_a_layer_keeps_what_its_weight_knows(served, seed, transposable):
    case = problem(seed, torch.bfloat16, transposable=transposable)
    linear = torch.nn.Linear(K, N, dtype=torch.bfloat16)
    linear.weight.data = case.weight
    layer = LoRSLinear.from_linear(linear, r=R, layout="2:4", products="dense")
    expected = layer.sparse_weight.library_metadata
    assert expected.nbytes == N * K // 8
    assert layer.products == "dense"
    names = {*layer.state_dict(), *dict(layer.named_parameters()), *dict(layer.named_buffers())}
    assert "weight_library_metadata" not in names
    assert layer.__getstate__()["weight_library_metadata"] is None
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False), copy.deepcopy(layer).half()):
        assert other.sparse_weight.transposable == transposable
        assert torch.equal(other.sparse_weight.library_metadata, expected)
    assert copy.deepcopy(layer).float().sparse_weight.library_metadata is None
    # A state brings its own mask with it.
    linear.weight.data = problem(seed + 1, torch.bfloat16, transposable=not transposable).weight
    fresh = LoRSLinear.from_linear(linear, r=R, layout="2:4")
    assert fresh.sparse_weight.transposable != transposable
    fresh.load_state_dict(layer.state_dict())
    assert fresh.sparse_weight.transposable == transposable
    assert torch.equal(fresh.sparse_weight.library_metadata, expected)


def test_where_nothing_serves_nothing_is_made(seed):
    weight = stored(problem(seed, torch.bfloat16, transposable=True))
    assert weight.library_metadata is None
    assert weight.transposable


def test_products_reaches_the_operator_from_everywhere(seed, monkeypatch):
    """Through lors_linear, the layer, the config, and backward."""
    from lors_cuda import _library, functional, get_lors_model

    seen = []

    class Spy:
        def __getattr__(self, name):
            op = getattr(torch.ops.lors, name)

            def call(*args):
                if name in ("linear", "linear_backward"):
                    seen.append((name, *args[-2:]))
                return op(*args)

            return call

    monkeypatch.setattr(functional, "lors", Spy())
    monkeypatch.setattr(_library, "lors", Spy())
    linear = torch.nn.Linear(K, N)
    linear.weight.data = problem(seed, torch.float32, transposable=True).weight
    model = torch.nn.Sequential(linear)
    get_lors_model(model, LoRSConfig(r=R, layout="2:4", products="sparse"))
    model(torch.randn(8, K, requires_grad=True)).sum().backward()
    assert seen == [("linear", True, "sparse"), ("linear_backward", True, "sparse")]
    with pytest.raises(ValueError, match="products is 'quick'; it must be 'auto', 'dense', 'sparse'"):
        LoRSLinear.from_linear(linear, r=R, products="quick")
    with pytest.raises(ValueError, match="products"):
        LoRSConfig(products="quick")
