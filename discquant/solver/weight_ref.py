# SPDX-License-Identifier: Apache-2.0
"""One weight matrix to quantize: a whole parameter, or one expert's rows of a fused three-dimensional one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from discquant.formats.stored import Part

LAZY = "_discquant_lazy"  # see `formats.lazy`


@dataclass(frozen=True)
class WeightRef:
    """One weight to quantize: `param_name` within its block, `name` of its module in the checkpoint.

    An ordinary layer is named in the model as in its checkpoint. Several matrices may share one fused parameter; each
    then has a `part`. `device` is where its block runs, None for where the parameter is.
    """

    name: str
    param_name: str
    parameter: nn.Parameter
    part: Part | None = None
    device: torch.device | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """Return this weight's matrix within a tensor of the parameter's shape, [out_features, in_features].

        A view wherever the layout allows one; the kernel of a convolution is flattened per output.
        """
        if self.part is None:
            return tensor.flatten(1)
        matrix = tensor[self.part.expert]
        return (matrix.T if self.part.transposed else matrix)[self.part.begin : self.part.end]

    def matrix(self) -> Tensor:
        """Return the weight as a contiguous [out_features, in_features], where its block runs."""
        read = getattr(self.parameter, LAZY, None)  # a parameter without memory has one
        if read is not None and self.part is not None:
            found: Tensor = read.matrix(self.part)
        else:
            found = self.view(self.parameter.detach() if read is None else read()).contiguous()
        return found if self.device is None else found.to(self.device)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix; nothing is read."""
        if self.part is None:
            return self.parameter.shape[0], self.parameter.shape[1:].numel()
        rows = self.part.end - self.part.begin
        return rows, int(self.parameter.shape[1 if self.part.transposed else 2])

    @property
    def matrix_size(self) -> int:
        """Number of elements of the matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def has_factors(self) -> bool:
        """Whether the curvature of this weight has Kronecker factors: a linear layer of its own."""
        return self.part is None and self.parameter.dim() == 2

    def shaped(self, matrix: Tensor) -> Tensor:
        """Return a matrix in the shape of the parameter; only for a parameter that is one matrix."""
        return matrix.view(self.parameter.shape)


def assemble(refs: Sequence[WeightRef], matrices: Iterable[Tensor]) -> dict[str, Tensor]:
    """Join matrices to parameters, as blocks take them.

    Args:
        refs: Weights of one block.
        matrices: Their values in the same order, floating, [out_features, in_features].

    Returns:
        Value by parameter name; what no ref covers of a fused parameter keeps its own value.
    """
    whole: dict[str, Tensor] = {}
    covered = Counter[str]()
    for ref in refs:
        covered[ref.param_name] += ref.matrix_size
    for ref, matrix in zip(refs, matrices, strict=True):
        if ref.part is None:
            whole[ref.param_name] = ref.shaped(matrix)
            continue
        if ref.param_name not in whole:
            whole[ref.param_name] = matrix.new_empty(ref.parameter.shape)
            if covered[ref.param_name] < ref.parameter.numel():
                read = getattr(ref.parameter, LAZY, ref.parameter.detach)
                whole[ref.param_name].copy_(read())
        ref.view(whole[ref.param_name]).copy_(matrix)
    return whole


def take_matrices(refs: Sequence[WeightRef], values: dict[str, Tensor]) -> Iterator[Tensor]:
    """Yield each ref's contiguous matrix of `values`, dropping a parameter's value after its last matrix."""
    last = {ref.param_name: place for place, ref in enumerate(refs)}
    for place, ref in enumerate(refs):
        whole = values.pop(ref.param_name) if last[ref.param_name] == place else values[ref.param_name]
        yield ref.view(whole).contiguous()


def _all_finite(value: Tensor) -> bool:
    """Whether no entry is NaN or Inf. Their sum tells, in one pass of five; only if it overflows all are asked."""
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def first_not_finite(refs: Sequence[WeightRef], values: dict[str, Tensor]) -> str | None:
    """Return the name of the first ref whose value holds NaN or Inf, None where all are finite."""
    bad = {name for name, value in values.items() if not _all_finite(value)}
    for ref in refs:
        if ref.param_name in bad and not _all_finite(ref.view(values[ref.param_name])):
            return ref.name
    return None
