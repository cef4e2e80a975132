# SPDX-License-Identifier: Apache-2.0
"""lors_linear and merge given what they cannot use: a sentence that says what was given and what is needed."""

from __future__ import annotations

import pytest
import torch

from lors_cuda import SparseWeight, lors_linear, merge

N, K, R, T = 6, 33, 3, 5


def arguments(**changes: object) -> dict[str, object]:
    """Arguments of lors_linear that are right, but for the changes."""
    generator = torch.Generator().manual_seed(5)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    right = {
        "input": normal(T, K),
        "weight": normal(N, K),
        "lora_A": normal(R, K),
        "lora_B": normal(N, R),
        "scaling": 0.75,
        "bias": normal(N),
    }
    return right | changes


def refused(error: type[Exception] | tuple[type[Exception], ...], message: str, **changes: object) -> str:
    """lors_linear refuses the changed arguments, and merge too where it takes them; the message is a whole sentence."""
    with pytest.raises(error) as caught:
        lors_linear(**arguments(**changes))
    text = str(caught.value)
    assert message in text, text
    assert text.rstrip().endswith("."), text
    if not changes.keys() & {"input", "bias", "gradient"}:
        given = {k: v for k, v in arguments(**changes).items() if k not in ("input", "bias")}
        with pytest.raises(error) as caught:
            merge(**given)
        assert message in str(caught.value)
    return text


f = torch.randn
meta = {"device": "meta"}


def test_the_arguments_are_right():
    assert lors_linear(**arguments()).shape == (T, N)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": f(N, K, 1)},
            "weight has shape (6, 33, 1); it must be [out_features, in_features], both at",
        ),
        ({"weight": f(N * K)}, "weight has shape (198,)"),
        ({"weight": f(0, K)}, "weight has shape (0, 33)"),
        ({"weight": f(N, 0)}, "weight has shape (6, 0)"),
        ({"weight": torch.ones(N, K, dtype=torch.int32)}, "weight has dtype torch.int32; it must be float32, bfloat16"),
        ({"weight": f(N, K).to(torch.float8_e4m3fn)}, "weight has dtype torch.float8_e4m3fn"),
        ({"weight": f(N, K).requires_grad_()}, "weight requires grad, but LoRS freezes it"),
        ({"weight": torch.nn.Parameter(f(N, K))}, "Call weight.requires_grad_(False), or pass weight.detach()"),
        ({"lora_A": f(R, K + 1)}, "lora_A has shape (3, 34); it must be [r, 33] for a weight of shape (6, 33)"),
        ({"lora_A": f(K)}, "lora_A has shape (33,)"),
        ({"lora_A": f(K, R)}, "lora_A has shape (33, 3)"),
        ({"lora_A": f(0, K), "lora_B": f(N, 0)}, "the rank r must be at least 1"),
        ({"lora_A": torch.ones(R, K, dtype=torch.int8)}, "lora_A has dtype torch.int8; it must be float32, bfloat16"),
        ({"lora_B": f(N, R + 1)}, "lora_B has shape (6, 4); it must be (6, 3) for a weight of shape (6, 33)"),
        ({"lora_B": f(R, N)}, "lora_B has shape (3, 6); it must be (6, 3)"),
        ({"lora_B": f(N, R, 1)}, "lora_B has shape (6, 3, 1)"),
        ({"lora_B": torch.ones(N, R, dtype=torch.bool)}, "lora_B has dtype torch.bool"),
        ({"lora_A": f(R, K, **meta)}, "lora_A is on meta and weight on cpu; move them to the same device"),
        ({"lora_B": f(N, R, **meta)}, "lora_B is on meta and weight on cpu"),
        ({"weight": f(N, K, **meta)}, "lora_A is on cpu and weight on meta"),
        (
            {"mask": torch.ones(N, K)},
            "mask is torch.float32 with shape (6, 33); it must be bool with the weight's",
        ),
        ({"mask": torch.ones(K, N, dtype=torch.bool)}, "mask is torch.bool with shape (33, 6)"),
        ({"mask": torch.ones(N, 2, dtype=torch.int32)}, "mask is torch.int32 with shape (6, 2)"),
        ({"mask": torch.ones(N, K, dtype=torch.bool, **meta)}, "mask is on meta and weight on cpu"),
        ({"scaling": torch.tensor([0.5, 0.75])}, "scaling has shape (2,); it must be a float or a 0-d tensor"),
        ({"input": f(T, K + 1)}, "input has shape (5, 34); its last dimension must be in_features = 33"),
        ({"input": torch.tensor(0.5)}, "input has shape (); its last dimension must be in_features = 33"),
        ({"input": f(T, K).bfloat16()}, "input has dtype torch.bfloat16 and weight torch.float32; convert one"),
        ({"input": torch.ones(T, K, dtype=torch.int64)}, "input has dtype torch.int64 and weight torch.float32"),
        ({"input": f(T, K).double()}, "input has dtype torch.float64 and weight torch.float32"),
        ({"input": f(T, K, **meta)}, "input is on meta and weight on cpu; move them to the same device"),
        ({"bias": f(N + 1)}, "bias has shape (7,); it must be (6,) for a weight of shape (6, 33)"),
        ({"bias": f(N, 1)}, "bias has shape (6, 1)"),
        ({"bias": f(())}, "bias has shape ()"),
        ({"bias": f(N, **meta)}, "bias is on meta and weight on cpu"),
        ({"gradient": "Lors"}, "gradient is 'Lors'; it must be 'lors' or 'exact'"),
        ({"gradient": None}, "gradient is None; it must be 'lors' or 'exact'"),
    ],
)
def test_values_that_do_not_fit(changes, message):
    refused(ValueError, message, **changes)


def test_a_bias_of_integers():
    refused((ValueError, RuntimeError), "bias has ", bias=torch.ones(N, dtype=torch.int32))


@pytest.mark.parametrize("name", ["input", "weight", "lora_A", "lora_B", "bias"])
def test_arguments_of_the_wrong_type(name):
    """The docstring promises a TypeError, which names the argument."""
    refused(TypeError, f"{name} is a list; it must be a torch.Tensor", **{name: [[0.5]]})


@pytest.mark.parametrize("scaling", [None, "a half", [0.5]])
def test_a_scaling_that_is_no_number(scaling):
    refused(TypeError, "scaling is", scaling=scaling)


def test_a_mask_beside_a_sparse_weight():
    w = SparseWeight.from_dense(torch.randn(N, K))
    refused(ValueError, "mask was given together with a SparseWeight, which has its own", weight=w, mask=w.mask())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("convert", ["to_sparse", "to_sparse_csr"])
def test_torch_sparse_weights(convert):
    """People with pruned weights may hold them in torch's own sparse layouts: say what to do, by our own name."""
    refused((TypeError, ValueError), "to_dense()", weight=getattr(torch.randn(N, K), convert)())


def test_autocast_casts_floating_inputs_only():
    with torch.autocast("cpu", torch.bfloat16):
        refused(ValueError, "input has dtype torch.int64", input=torch.ones(T, K, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"weight torch\.float64"):
            lors_linear(**arguments(weight=torch.randn(N, K, dtype=torch.float64)))


def test_meta_tensors_give_shapes():
    """As torch's own layers do; accelerate and FLOP counters rely on it."""
    given = arguments()
    shells = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    output = lors_linear(**shells)
    assert output.is_meta
    assert output.shape == (T, N)


def test_nothing_was_changed_by_a_refusal():
    given = arguments(bias=torch.randn(N + 1))
    before = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError, match="bias has shape"):
        lors_linear(**given)
    assert all(torch.equal(given[k], v) for k, v in before.items())


def test_other_devices_are_refused_by_name(monkeypatch):
    from lors_cuda import _library

    monkeypatch.setattr(
        _library, "_cuda_reason", lambda index: "this build of lors_cuda has no CUDA kernels", raising=False
    )
    with pytest.raises(RuntimeError, match=r"tensors on cuda:0, but .*Move the model to the CPU"):
        _library.check_device(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match=r"tensors on mps, but there are no kernels for mps devices"):
        _library.check_device(torch.device("mps"))
