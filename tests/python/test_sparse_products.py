# SPDX-License-Identifier: Apache-2.0
"""2:4 products on the sparse tensor cores without a GPU: the CUDA operators over a cuSPARSELt that computes on the CPU.

Both ways must give the oracle's result; which one ran is told by the library's calls. Plans, versions and failures by
themselves are tests/cpp/test_sparse_product.cpp and test_product_choice.cpp.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle

import pytest
import torch

import cases
import fake_binding
import lors_cuda
from cases import Case, make_case
from expectations import check_linear, check_linear_backward
from lors_cuda import LoRSConfig, LoRSLinear, SparseWeight, sparse_product
from lors_cuda.cli import main

DTYPES = (torch.bfloat16, torch.float16)
T, N, K, R = 24, 32, 64, 4


@pytest.fixture(scope="module")
def fake():
    return fake_binding.load()


@pytest.fixture
def ops(fake, monkeypatch):
    """The fake operators, with nothing chosen yet; afterwards nothing is held."""
    monkeypatch.setattr(cases, "lors", fake)
    monkeypatch.delenv("LORS_SPARSE_PRODUCT", raising=False)
    fake.fake_set(False, 1.0)
    fake.sparse_product_clear(0)
    yield fake
    fake.fake_set(False, 1.0)
    assert fake.fake_state().split()[:2] == ["0", "0"]


@pytest.fixture
def served(ops, monkeypatch):
    """As if every device were a CUDA device that the fake library serves."""
    monkeypatch.setattr(sparse_product, "lors", ops)
    monkeypatch.setattr(sparse_product, "sparse_product_reason", lambda device=None: None)
    monkeypatch.setattr(sparse_product, "_has_device", lambda device: True)
    monkeypatch.setattr(sparse_product, "_index", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "fake device")
    return ops


def transposable_mask(n: int, k: int) -> torch.Tensor:
    """bool [n, k], 2:4 along both sides, by diagonals."""
    return ((torch.arange(n)[:, None] + torch.arange(k)) % 2).bool()


class StoredCase(Case):
    """Compressed once: asking for the arguments of a call shall not call the library."""

    stored = functools.cached_property(lambda self: Case.stored.fget(self))


def problem(seed: int, dtype: torch.dtype, *, transposable: bool = False, **fields: object) -> Case:
    case = StoredCase(**vars(make_case(seed, T, N, K, R, dtype, layout="2:4", **fields)))
    if transposable:
        values = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
        case.weight = torch.where(transposable_mask(N, K), values, 0.0)
    assert case.stored[2].dtype == torch.uint8
    return case


def stored(case: Case) -> SparseWeight:
    return SparseWeight.from_dense(case.weight, "2:4", case.mask)


def linear(ops, case: Case, products: str = "sparse", metadata: torch.Tensor | None = None) -> torch.Tensor:
    bias, s = case.bias, case.scaling
    return ops.linear(case.input, *case.adapted, bias, s, "lors", None, metadata, False, products)


def backward(ops, case: Case, products: str = "sparse", transposable: bool = True) -> tuple[torch.Tensor, ...]:
    args = (*case.adapted, case.bias, case.scaling, "lors", True, True, True, None, transposable, products)
    return ops.linear_backward(case.grad_output, case.input, *args)


class Calls:
    """What the library was called for inside the block."""

    def __enter__(self) -> Calls:
        self._before = {name: fake_binding.calls(name) for name in ("Matmul", "MatmulSearch", "SpMMACompress2")}
        return self

    def __exit__(self, *error: object) -> None:
        self.counts = {name: fake_binding.calls(name) - before for name, before in self._before.items()}

    def __getattr__(self, name: str) -> int:
        return self.counts[name]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_in_place_and_recompressed_meets_the_oracle(served, seed, dtype, explicit, bias):
    """Groups with none, one and two kept weights, kept zeros, an adapter as large as the weight."""
    case = problem(seed, dtype, explicit_mask=explicit, bias=bias)
    weight = stored(case)
    assert weight.library_metadata.nbytes == N * K // 8
    with Calls() as calls:
        in_place = linear(served, case, metadata=weight.library_metadata)
        again = linear(served, case, metadata=weight.library_metadata)
    assert calls.counts == {"Matmul": 2, "MatmulSearch": 1, "SpMMACompress2": 0}
    with Calls() as calls:
        recompressed = linear(served, case)
    assert calls.SpMMACompress2 > 0
    assert calls.MatmulSearch == 0, "the plan is the same"
    for Y in (in_place, again, recompressed):
        check_linear(Y, case)
    assert torch.equal(in_place, recompressed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_input_gradient_of_a_transposable_mask(served, seed, dtype):
    case = problem(seed, dtype, transposable=True, bias=True)
    assert stored(case).transposable
    with Calls() as calls:
        grads = backward(served, case)
    assert calls.Matmul > 0
    check_linear_backward(grads, case, "lors")


def test_any_other_mask_has_the_dense_input_gradient_whatever_is_asked_for(served, seed):
    case = problem(seed, torch.bfloat16)
    assert not stored(case).transposable
    with Calls() as calls:
        grads = backward(served, case, "sparse", transposable=False)
    assert calls.counts == {"Matmul": 0, "MatmulSearch": 0, "SpMMACompress2": 0}
    check_linear_backward(grads, case, "lors")


def test_a_float32_weight_under_16_bit_activations_is_recompressed(served, seed):
    case = problem(seed, torch.float32)
    case.input = case.input.bfloat16()
    assert stored(case).library_metadata is None, "the library's metadata belongs to 16-bit values"
    with Calls() as calls:
        check_linear(linear(served, case), case)
    assert calls.SpMMACompress2 > 0


def test_a_16_bit_weight_under_activations_of_the_other_16_bits_is_recompressed(served, seed):
    """Its metadata is there, but its values would be merged in its own type."""
    case = problem(seed, torch.float16)
    case.input = case.input.bfloat16()
    metadata = stored(case).library_metadata
    with Calls() as calls:
        check_linear(linear(served, case, metadata=metadata), case)
    assert calls.SpMMACompress2 > 0


def test_strided_activations(served, seed):
    case = problem(seed, torch.bfloat16, bias=True)
    other = case.replace(input=case.input.T.contiguous().T)
    assert not other.input.is_contiguous()
    assert torch.equal(linear(served, other), linear(served, case))


def test_a_merged_weight_that_is_there_is_multiplied_densely(served, seed):
    case = problem(seed, torch.bfloat16)
    merged = served.merged_operand(*case.adapted, case.scaling, torch.bfloat16)
    with Calls() as calls:
        Y = served.linear(case.input, *case.adapted, None, case.scaling, "lors", merged, None, False, "sparse")
    assert calls.Matmul == 0
    check_linear(Y, case)


@pytest.mark.parametrize("layout", ["metadata_first", "tiled"])
def test_where_the_values_do_not_come_first_there_is_no_writing_in_place(served, seed, monkeypatch, layout):
    monkeypatch.setenv("FAKE_CUSPARSELT_LAYOUT", layout)
    case = problem(seed, torch.bfloat16)
    assert stored(case).library_metadata is None
    check_linear(linear(served, case), case)


def test_metadata_of_a_weight_as_it_is_would_be_wrong_and_is_noticed(served, seed):
    """Where a group keeps one weight, the library puts it where it likes; that is why a full pattern is compressed."""
    case = problem(seed, torch.bfloat16)
    compressed = served.sparse_product_compress(case.weight)
    wrong = compressed[N * K :].clone()
    assert not torch.equal(wrong, stored(case).library_metadata)
    with pytest.raises(RuntimeError, match="differs from the dense one by more than rounding"):
        linear(served, case, metadata=wrong)
    served.sparse_product_clear(0)
    for _ in range(2):
        check_linear(linear(served, case, "auto", wrong), case)
    (choice,) = lors_cuda.plan_cache_info().choices
    assert choice.products == "dense"
    assert "more than rounding" in choice.note


def test_auto_measures_once_and_takes_the_faster_way(served, seed, monkeypatch):
    case = problem(seed, torch.bfloat16, transposable=True)
    metadata = stored(case).library_metadata
    for milliseconds, taken in ((1.0, "sparse"), (0.25, "dense")):  # the library's products take half a millisecond
        served.sparse_product_clear(0)
        served.fake_set(False, milliseconds)
        check_linear(linear(served, case, "auto", metadata), case)
        check_linear_backward(backward(served, case, "auto"), case, "lors")
        with Calls() as calls:
            for _ in range(3):
                check_linear(linear(served, case, "auto", metadata), case)
                check_linear_backward(backward(served, case, "auto"), case, "lors")
        assert calls.Matmul == (6 if taken == "sparse" else 0)
        assert calls.MatmulSearch == 0
        info = lors_cuda.plan_cache_info()
        assert (info.searches, info.size, info.library_version, info.maximum) == (2, 2, "0.8.1", 256)
        assert {(c.operation, c.in_place, c.products) for c in info.choices} == {
            ("forward", True, taken),
            ("input_gradient", False, taken),
        }
        assert all((c.dense_us, c.sparse_us) == (1000 * milliseconds, 500) for c in info.choices)


def test_a_captured_graph_gets_what_is_warm(served, seed):
    case = problem(seed, torch.bfloat16)
    metadata = stored(case).library_metadata
    served.fake_set(True, 1.0)
    with Calls() as calls:
        check_linear(linear(served, case, "auto", metadata), case)
    assert calls.counts == {"Matmul": 0, "MatmulSearch": 0, "SpMMACompress2": 0}
    with pytest.raises(RuntimeError, match=r"a CUDA graph is being captured .* run it once before the capture"):
        linear(served, case, "sparse", metadata)
    served.fake_set(False, 1.0)
    linear(served, case, "auto", metadata)
    served.fake_set(True, 1.0)
    with Calls() as calls:
        check_linear(linear(served, case, "auto", metadata), case)
    assert calls.Matmul == 1
    served.fake_set(False, 1.0)
    lors_cuda.plan_cache_clear()
    assert lors_cuda.plan_cache_info().size == 1, "the graph holds its plan"


def test_what_is_not_served_is_dense_and_says_why_where_sparse_is_asked_for(ops, seed):
    for shape, dtype, why in (
        ((T, N, K), torch.float32, "bfloat16 and float16 only"),
        ((T, N, K + 4), torch.bfloat16, "in_features in multiples of 16, and it is 68"),
        ((T, N + 1, K), torch.bfloat16, "out_features in multiples of 16, and it is 33"),
        ((T + 1, N, K), torch.bfloat16, "the number of tokens in multiples of 8, and it is 25"),
    ):
        case = make_case(seed, *shape, R, dtype, layout="2:4")
        check_linear(linear(ops, case, "auto"), case)
        with pytest.raises(RuntimeError, match=f"products is 'sparse', but .*{why}"):
            linear(ops, case, "sparse")
        check_linear(linear(ops, case, "dense"), case)


def test_the_environment_says_what_auto_is(served, seed, monkeypatch):
    case = problem(seed, torch.bfloat16)
    for word, sparse in (("dense", False), ("sparse", True)):
        monkeypatch.setenv("LORS_SPARSE_PRODUCT", word)
        with Calls() as calls:
            check_linear(linear(served, case, "auto"), case)
        assert (calls.Matmul > 0) == sparse
    monkeypatch.setenv("LORS_SPARSE_PRODUCT", "yes")
    with pytest.raises(RuntimeError, match="LORS_SPARSE_PRODUCT is 'yes'; it must be auto, dense or sparse"):
        linear(served, case, "auto")


def test_refusals_of_the_operators(fake, seed):
    """On the CPU too, where the arguments change nothing."""
    case = problem(seed, torch.bfloat16)
    for ops in (fake, torch.ops.lors):
        with pytest.raises(RuntimeError, match="products is 'fast'; it must be 'auto', 'dense' or 'sparse'"):
            linear(ops, case, "fast")
        with pytest.raises(RuntimeError, match=r"library_metadata has shape \[2, 3\]; it must be uint8"):
            linear(ops, case, "auto", torch.zeros(2, 3, dtype=torch.uint8))
        dense = case.replace(layout="dense")
        with pytest.raises(RuntimeError, match="library_metadata was given with a weight that is not 2:4"):
            linear(ops, dense, "auto", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match=r"library_metadata has 5 bytes; cuSPARSELt 0\.8\.1 makes 256"):
        linear(fake, case, "sparse", torch.zeros(5, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="merged has shape"):
        fake.sparse_product_compress(torch.zeros(16, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="in_features in multiples of 16"):
        fake.sparse_product_compress(torch.zeros(16, 20, dtype=torch.bfloat16))


@pytest.mark.parametrize("products", ["auto", "dense", "sparse"])
def test_opcheck(seed, products):
    """The schema, fake and autograd halves take the arguments too; on the CPU they change nothing."""
    case = problem(seed, torch.float32, transposable=True, bias=True)
    args = (*case.adapted, case.bias, case.scaling, "lors")
    metadata = torch.zeros(7, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.lors.linear, (case.input, *args, None, metadata, True, products))
    given = (case.grad_output, case.input, *args, True, True, True, None, True, products)
    torch.library.opcheck(torch.ops.lors.linear_backward, given)
    for tensor in (case.input, case.lora_A, case.lora_B, case.bias):
        tensor.requires_grad_()
    Y = torch.ops.lors.linear(case.input, *args, None, metadata, True, products)
    grads = torch.autograd.grad(Y, (case.input, case.lora_A, case.lora_B, case.bias), case.grad_output)
    check_linear_backward(tuple(g.detach() for g in grads), case, "lors")


# ---- choices in a file -----------------------------------------------------------------------------------------------


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
