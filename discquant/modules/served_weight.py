# SPDX-License-Identifier: Apache-2.0
"""`ServedWeight`: the weight that a packed layer shows to models that read it; it refuses what would be lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_OPERATORS = (
    "add",
    "sub",
    "mul",
    "div",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
_WRITES = {"__setitem__", "__set__", *(f"__i{name}__" for name in _OPERATORS)}
# These end like the names of methods that write, and write no value.
_HARMLESS = {"requires_grad_", "share_memory_", "detach_"}


class ServedWeight(Tensor):
    """A weight made for one read. What is computed from it is an ordinary tensor; writing into it raises.

    RWKV, for one, divides weights in place before its first forward: lost, that would give other outputs in silence.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A copy is its owner's to write into."""
        return self.clone()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func` on it as on a plain tensor.

        Raises:
            NotImplementedError: It would write into the weight.
        """
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        mine = bool(args) and isinstance(args[0], cls)
        in_place = name in _WRITES or (
            name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
        )
        if (mine and in_place) or isinstance(kwargs.get("out"), cls):
            raise NotImplementedError(
                f"PackedLinear: weight must be only read, got {name} on it; its codes cannot follow: load the model "
                "with mode='plain'"
            )
        if mine and func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0]  # the way of older code to write
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
