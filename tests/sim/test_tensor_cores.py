# SPDX-License-Identifier: Apache-2.0
"""Kernels on tensor cores that round, and on those that cut off: the tolerance holds for each, and needs its term.

All other tests run on the simulator's default, `hopper`.
"""

from __future__ import annotations

import pytest
import torch

import numerics
import test_adapter_grad_lors
import test_fused_linear
import test_merge
import tolerance

FP32 = ("float32",) * 4


def check_all(sim, cores: str) -> None:
    test_merge.check(*test_merge.run(sim, sim.Device(tensor_cores=cores), "dense", (96, 520), 256, FP32))
    problem = test_fused_linear.Problem(16, 72, 1500, 16, False, FP32)
    test_fused_linear.check(test_fused_linear.run(sim, sim.Device(tensor_cores=cores), problem), problem)
    given = test_adapter_grad_lors.operands((300, 40, 264), 16, FP32)
    test_adapter_grad_lors.check(test_adapter_grad_lors.run(sim, sim.Device(tensor_cores=cores), given), given)


@pytest.mark.parametrize("cores", ["ampere", "hopper", "rounded"])
def test_the_tolerance_holds(sim, cores):
    check_all(sim, cores)


def test_the_tolerance_needs_its_term(sim, monkeypatch):
    for module in (numerics, test_fused_linear, test_merge):
        monkeypatch.setattr(module, "truncations", lambda *_: 0)
    check_all(sim, "rounded")
    with pytest.raises(AssertionError, match="are off"):
        check_all(sim, "ampere")


def test_the_term_is_no_licence():
    """Sums that are cut off eight times as often, after every product, fail where the tensor core's pass."""
    generator = torch.Generator().manual_seed(1)
    products = torch.randn(512, 4096, generator=generator, dtype=torch.float64)
    exact, rms = products.sum(0), products.square().sum(0).sqrt()

    def cut_off_after(width: int) -> torch.Tensor:
        total = torch.zeros_like(exact)
        for chunk in products.split(width):
            total = total + chunk.sum(0)
            unit = torch.exp2(total.abs().log2().floor() - 23)
            total = (total / unit).trunc() * unit
        return total.float()

    given = {"rms": rms, "length": 512, "dtype": torch.float32}
    for width, instructions in ((8, 64), (16, 32)):
        tolerance.assert_close(cut_off_after(width), exact, truncated=instructions, **given)
    with pytest.raises(AssertionError, match="at most"):
        tolerance.assert_close(cut_off_after(1), exact, truncated=64, **given)
    with pytest.raises(AssertionError, match="at most"):
        tolerance.assert_close(cut_off_after(8), exact, **given)
