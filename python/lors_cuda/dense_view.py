# SPDX-License-Identifier: Apache-2.0
# `layer.weight` of a sparse layer. Model code often looks at it without using it (T5 asks its dtype in every forward),
# and decompressing it for a look would cost more than the layer's own matmul on few tokens.
"""A weight that is decompressed when it is used, and not when it is looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

if TYPE_CHECKING:
    from .linear import SparseLinear

# What can be asked of a tensor without its values. Everything else is a use.
_LOOKS = frozenset(
    {
        "__hash__", "__len__", "device", "dim", "dtype", "element_size", "get_device", "grad", "grad_fn", "is_complex",
        "is_contiguous", "is_cpu", "is_cuda", "is_floating_point", "is_leaf", "is_meta", "is_mkldnn", "is_mps",
        "is_nested", "is_quantized", "is_sparse", "is_sparse_csr", "is_xla", "is_xpu", "itemsize", "layout", "nbytes",
        "ndim", "ndimension", "nelement", "numel", "requires_grad", "shape", "size", "stride",
    }
)  # fmt: skip
_ITSELF = frozenset({"contiguous", "data", "detach"})  # they change nothing in a frozen, contiguous tensor


class DenseView(Tensor):
    """The frozen weight of a sparse layer as a dense tensor [N, K], decompressed at its first use.

    Shape, dtype, device and the like cost nothing. Every other operation is a use: it adds 1 to the layer's
    ``weight_uses`` and runs on the plain dense tensor, which is kept as long as this object is.

    Raises:
        ValueError: an operation would make it require a gradient, or would write to the dense form of a compressed
            weight; either would be lost.
    """

    _layer: SparseLinear
    _dense: Tensor | None

    @staticmethod
    def __new__(cls, layer: SparseLinear) -> DenseView:
        values = layer.weight_values
        view: DenseView = Tensor._make_wrapper_subclass(
            cls, (layer.out_features, layer.in_features), dtype=values.dtype, device=values.device
        )
        view._layer, view._dense = layer, None
        return view

    def _used(self) -> Tensor:
        """The dense tensor; in layout "dense" of the stored memory."""
        layer = self._layer
        layer.weight_uses += 1
        if self._dense is None:
            stored = layer.weight_index is None
            self._dense = layer.weight_values.detach() if stored else layer.sparse_weight.to_dense()
        return self._dense

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        called = getattr(func, "__name__", "")
        # The getter and the setter of an attribute are called __get__ and __set__.
        name: str = getattr(getattr(func, "__self__", None), "__name__", "") if called in _ACCESSORS else called
        if called != "__set__":
            if name in _LOOKS:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if name in _ITSELF and isinstance(args[0], DenseView):
                return args[0]
        if called == "__set__" or name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            if name in ("requires_grad", "requires_grad_"):
                if not all((*args[1:], *kwargs.values())):
                    return args[0]  # it is frozen already
                raise ValueError(
                    "The weight of a sparse layer is frozen and cannot require a gradient. Train lora_A and lora_B, or "
                    "take a copy of your own with weight.clone()."
                )
            _refuse_writing(name, args[0])
        _refuse_writing("out=", kwargs.get("out"))
        return func(*_plain(args), **_plain(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What reaches torch's operators from C++, without the method above."""
        if func._schema.is_mutable:
            _refuse_writing(func._schema.name, (args[:1], (kwargs or {}).get("out")))
        return func(*_plain(args), **_plain(kwargs or {}))


_ACCESSORS = ("__get__", "__set__")


def _plain(arguments: Any) -> Any:
    return tree_map_only(DenseView, DenseView._used, arguments)


def _refuse_writing(name: str, written: Any) -> None:
    for view in tree_leaves(written):
        if isinstance(view, DenseView) and view._layer.weight_index is not None:
            raise ValueError(
                f"The weight of a compressed layer is read-only as a dense tensor: {name} would change a copy that "
                "nothing reads. Change the layer's weight_values, or take a copy of your own with weight.clone()."
            )
