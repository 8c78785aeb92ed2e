# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's matmul through ctypes: quantise, place in the CPU's own (repacked) buffer type, multiply.

Needs a folder with libggml-base and libggml-cpu, such as the `lib` folder of an installed llama-cpp-python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

TYPES = {"F32": 0, "Q4_0": 2, "Q3_K": 11, "Q4_K": 12}
_ARENA = 1 << 20  # tensor headers and graphs, not data


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class GgmlLinear:
    """y = x W^T on one copy of a weight."""

    def __init__(self, run: Callable[[Tensor], Tensor], buffer: str) -> None:
        self.run, self.buffer = run, buffer

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [tokens, in_features]."""
        return self.run(x)


class Ggml:
    """The library, with the handful of its functions that a matmul needs."""

    def __init__(self, folder: Path) -> None:
        """Load it.

        Raises:
            OSError: The folder holds no libggml-base and libggml-cpu that load here.
        """
        self.libraries = [
            ctypes.CDLL(str(self._find(folder, stem)), mode=ctypes.RTLD_GLOBAL) for stem in ("base", "cpu")
        ]
        self._declared: dict[str, Callable[..., int]] = {}
        # It would tell of every tensor that it repacks. Kept: the library holds the callback's address.
        self._silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
            lambda level, text, data: None
        )
        self.call("ggml_log_set", self._silence, None)

    @staticmethod
    def _find(folder: Path, stem: str) -> Path:
        found = sorted(folder.glob(f"libggml-{stem}*.so*"))
        if not found:
            raise OSError(f"{folder} holds no libggml-{stem}")
        return found[0]

    def call(self, name: str, *arguments: object) -> int:
        """A C function of one of the libraries; every result is taken as a pointer-sized integer."""
        if name not in self._declared:
            function = next((getattr(lib, name) for lib in self.libraries if hasattr(lib, name)), None)
            if function is None:
                raise OSError(f"ggml: there is no {name} in this version")
            function.restype = ctypes.c_void_p
            self._declared[name] = function
        plain = [ctypes.c_int64(a) if type(a) is int else a for a in arguments]
        return self._declared[name](*plain) or 0

    def quantize(self, weight: Tensor, kind: str) -> Tensor:
        """Blocks of a float32 weight, as bytes."""
        n, k = weight.shape
        row = self.call("ggml_row_size", ctypes.c_int(TYPES[kind]), k)
        out = torch.empty(row * n, dtype=torch.uint8)
        source, target = ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(out.data_ptr())
        self.call("ggml_quantize_chunk", ctypes.c_int(TYPES[kind]), source, target, 0, n, k, None)
        return out

    def _context(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.call("ggml_init", _InitParams(_ARENA, None, True)))

    def _buffer_types(self) -> list[ctypes.c_void_p]:
        """The CPU's extra buffer types (repacked layouts), then the plain one."""
        registry = ctypes.c_void_p(self.call("ggml_backend_cpu_reg"))
        device = ctypes.c_void_p(self.call("ggml_backend_reg_dev_get", registry, ctypes.c_size_t(0)))
        address = self.call(
            "ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts"
        )
        found = []
        if address:
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
            i = 0
            while extra and extra[i]:
                found.append(ctypes.c_void_p(extra[i]))
                i += 1
        return [*found, ctypes.c_void_p(self.call("ggml_backend_cpu_buffer_type"))]

    def linear(
        self, blocks: Tensor, kind: str, n: int, k: int, threads: int, *, amx: bool = True
    ) -> GgmlLinear:
        """A layer over its own copy of `blocks`, in the first buffer type that supports this matmul."""
        backend = ctypes.c_void_p(self.call("ggml_backend_cpu_init"))
        self.call("ggml_backend_cpu_set_n_threads", backend, ctypes.c_int(threads))
        device = ctypes.c_void_p(self.call("ggml_backend_get_device", backend))
        types = self._buffer_types()
        for place in types:
            name = ctypes.string_at(self.call("ggml_backend_buft_name", place)).decode()
            if name == "AMX" and not amx:
                continue
            context = self._context()
            weight = ctypes.c_void_p(
                self.call("ggml_new_tensor_2d", context, ctypes.c_int(TYPES[kind]), k, n)
            )
            buffer = self.call("ggml_backend_alloc_ctx_tensors_from_buft", context, place)
            if not buffer:
                continue
            probe = self._context()
            x = ctypes.c_void_p(self.call("ggml_new_tensor_2d", probe, ctypes.c_int(0), k, 1))
            y = ctypes.c_void_p(self.call("ggml_mul_mat", probe, weight, x))
            plain = place.value == types[-1].value
            if plain or self.call("ggml_backend_dev_supports_op", device, y) & 1:
                break
        size = self.call("ggml_nbytes", weight)
        data = ctypes.c_void_p(blocks.data_ptr())
        self.call("ggml_backend_tensor_set", weight, data, ctypes.c_size_t(0), ctypes.c_size_t(size))
        graphs: dict[int, tuple[ctypes.c_void_p, ...]] = {}

        def run(x: Tensor) -> Tensor:
            tokens = x.shape[0]
            if tokens not in graphs:
                work = self._context()
                a = ctypes.c_void_p(self.call("ggml_new_tensor_2d", work, ctypes.c_int(0), k, tokens))
                b = ctypes.c_void_p(self.call("ggml_mul_mat", work, weight, a))
                graph = ctypes.c_void_p(self.call("ggml_new_graph", work))
                self.call("ggml_build_forward_expand", graph, b)
                self.call("ggml_backend_alloc_ctx_tensors", work, backend)
                graphs[tokens] = (a, b, graph)
            a, b, graph = graphs[tokens]
            out = torch.empty(tokens, n)
            x_data, y_data = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())
            zero = ctypes.c_size_t(0)
            self.call("ggml_backend_tensor_set", a, x_data, zero, ctypes.c_size_t(x.numel() * 4))
            self.call("ggml_backend_graph_compute", backend, graph)
            self.call("ggml_backend_tensor_get", b, y_data, zero, ctypes.c_size_t(out.numel() * 4))
            return out

        return GgmlLinear(run, name)
