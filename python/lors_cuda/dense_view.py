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
    from .sparse_linear import SparseLinear
    from .weight import SparseWeight

# What can be asked of a tensor without its values. Everything else is a use.
LOOKS = frozenset(
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
        ValueError: an operation would make it a parameter or require a gradient, or would write to the dense form of a
            compressed weight; all these would be lost.
        RuntimeError: torch's, where it is assigned to another tensor's ``data``; assign ``weight.clone()``.
    """

    _layer: SparseLinear
    _dense: Tensor | None

    @staticmethod
    def __new__(cls, layer: SparseLinear) -> DenseView:
        # To torch it is a meta tensor whose device is asked for: so `tensor.data = view`, which takes the memory of a
        # tensor without asking it, is refused by torch. With memory that is not there it would end in a crash.
        view: DenseView = Tensor._make_wrapper_subclass(
            cls,
            (layer.out_features, layer.in_features),
            dtype=layer.dense_dtype,
            device=torch.device("meta"),
            dispatch_device=True,
        )
        view._layer, view._dense = layer, None
        return view

    @property
    def _is_param(self) -> bool:
        """False; nn.Parameter sets it, on the view itself, which would then hold no values of its own."""
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        raise ValueError(_FROZEN)

    def _used(self) -> Tensor:
        """The dense tensor; in layout "dense" of the stored memory."""
        self._layer.weight_uses += 1
        if self._dense is None:
            self._dense = dense_tensor(self._layer).detach()  # not the parameter, which would copy as one
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
            if name in LOOKS:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if name in _ITSELF and args and isinstance(args[0], DenseView):
                return args[0]
        if called == "__set__" or name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            if name in ("requires_grad", "requires_grad_"):
                if not all((*args[1:], *kwargs.values())):
                    return args[0]  # it is frozen already
                raise ValueError(_FROZEN)
            _refuse_writing(name, args[0] if args else kwargs)  # torch.nn.init passes names only
        _refuse_writing("out=", kwargs.get("out"))
        return func(*_plain(args), **_plain(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What reaches torch's operators from C++, without the method above; and its device."""
        if func is torch.ops.prim.device.default:
            return args[0]._layer.weight_values.device
        if func._schema.is_mutable:
            _refuse_writing(func._schema.name, (args[:1], (kwargs or {}).get("out")))
        return func(*_plain(args), **_plain(kwargs or {}))


_ACCESSORS = ("__get__", "__set__")
_FROZEN = (
    "The weight of a sparse layer is frozen, and neither a parameter nor able to require a gradient. Train lora_A and "
    "lora_B, or take a copy of your own with weight.clone()."
)


def dense_tensor(layer: SparseLinear) -> Tensor:
    """The weight of a layer, [N, K]: in layout "dense" the stored tensor, else a new one."""
    weight = layer.sparse_weight
    return weight.values if _is_itself(weight) else weight.to_dense(layer._dense_dtype)


def _is_itself(weight: SparseWeight) -> bool:
    """Whether the dense weight is what is stored."""
    return weight.layout == "dense" and weight.quantization is None


def _plain(arguments: Any) -> Any:
    return tree_map_only(DenseView, DenseView._used, arguments)


def _refuse_writing(name: str, written: Any) -> None:
    for view in tree_leaves(written):
        if isinstance(view, DenseView) and not _is_itself(view._layer.sparse_weight):
            raise ValueError(
                f"The weight of a compressed layer is read-only as a dense tensor: {name} would change a copy that "
                "nothing reads. Change the layer's weight_values, or take a copy of your own with weight.clone()."
            )
