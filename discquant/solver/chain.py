# SPDX-License-Identifier: Apache-2.0
"""A model as a chain: embedding -> block 1 .. block L -> head; any other module is a chain of one (`module_chain`).

The model's own code runs everywhere: blocks are called with the arguments that the model gives them
(recorded while the blocks are bypassed), and their weights are substituted functionally.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from discquant.solver.calls import layer_by_layer
from discquant.solver.experts import expert_refs, routes, settle_kernel
from discquant.solver.layers import (
    joined,
    quantizable_modules,
    refuse_transposed,
    selected,
    transposed_modules,
)
from discquant.solver.norms import fused, rms_norms
from discquant.solver.weight_ref import LAZY
from discquant.solver.weight_ref import WeightRef as WeightRef


class BlockCall(NamedTuple):
    """Arguments a block gets besides its input; they do not depend on the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Prepared(NamedTuple):
    """One micro-batch ready to run.

    `hidden` is block 1's input, `calls` the call of each block, `inputs` the ids, `mask` the positions that
    count, `teacher` the teacher's last block output where it is already known.
    """

    hidden: Tensor
    calls: list[BlockCall]
    inputs: Tensor
    mask: Tensor | None
    teacher: Tensor | None = None


@dataclass(frozen=True)
class Head:
    """Frozen output head: logits = cap(logit_scale * (h @ weight^T + bias)); see `ops.linear_kl`."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


def lazy_weights(block: nn.Module) -> Any | None:
    """Return what reads a block's weights when it runs (`formats.lazy`), None where they are in memory."""
    return getattr(block, LAZY, None)


@contextlib.contextmanager
def _replaced_forward(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Give modules another forward; attributes and hooks that the model reads stay in place."""
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward
            lazy = lazy_weights(module)
            if lazy is not None:
                lazy.paused = True
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)
            lazy = lazy_weights(module)
            if lazy is not None:
                lazy.paused = False


def _first(output: Any) -> Tensor:
    """Return the hidden state of a block's output (some return tuples).

    Raises:
        NotImplementedError: It has none.
    """
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor):
        raise NotImplementedError(
            "Chain: a block, or a module as a whole, must give = a tensor, or a tuple that begins with one, "
            f"got {type(output).__name__}"
        )
    return hidden


def _called(model: nn.Module, method: str) -> Any:
    """Return what an argument-free method of the model gives, None where it has no such method."""
    found = getattr(model, method, None)
    return found() if callable(found) else None


class Chain:
    """Base of both kinds.

    Attributes:
        model: The whole model.
        blocks: Its blocks, in order.
        block_names: Their names in the model.
        weights: Per block, the weights to quantize.
        routers: Linear layers that were left in full precision because they choose or weigh experts.
        head: The output head, None where the last block gives the logits.
    """

    model: nn.Module
    blocks: list[nn.Module]
    block_names: list[str]
    weights: list[list[WeightRef]]
    routers: list[str]
    head: Head | None

    def _collect(self, ignore: Sequence[str], routers: bool = False) -> None:
        settle_kernel(self.model)
        self._norms: dict[int, list[nn.Module]] = {}
        self.weights, self.routers = [], []
        for prefix, block in zip(self.block_names, self.blocks, strict=True):
            refs = []
            for name, module in quantizable_modules(block, prefix, ignore):
                if not routers and routes(name, module):
                    self.routers.append(joined(prefix, name))
                    continue
                assert isinstance(module.weight, nn.Parameter)  # as `quantizable_modules` promises
                refs.append(WeightRef(joined(prefix, name), joined(name, "weight"), module.weight))
            refs += expert_refs(self.model, block, prefix, lambda name: selected(name, ignore))
            self.weights.append([dataclasses.replace(ref, device=self.device) for ref in refs])
        seen: dict[tuple[object, ...], str] = {}
        for ref in (ref for refs in self.weights for ref in refs):
            other = seen.setdefault((id(ref.parameter), ref.part), ref.name)
            if other != ref.name:
                raise NotImplementedError(
                    f"Chain: {ref.name} and {other} share one weight; ignore one of them"
                )
        if not seen:
            raise ValueError("Chain: the model has no linear layer left to quantize")

    @property
    def first(self) -> int:
        """Index of the first block with weights to quantize: nothing below it needs a gradient."""
        return next(index for index, refs in enumerate(self.weights) if refs)

    def prepare(self, inputs: Tensor, mask: Tensor | None = None) -> Prepared:
        """Run what comes before block 1 and record every block's arguments."""
        raise NotImplementedError

    def finish(self, hidden: Tensor, prepared: Prepared) -> Tensor:
        """Run what comes between the last block and the head (the final norm); differentiable."""
        raise NotImplementedError

    @torch.no_grad()
    def teacher_output(
        self, prepared: Prepared, teacher: Callable[[int], Mapping[str, Tensor] | None] | None = None
    ) -> Tensor:
        """Return the original model's last block output on a micro-batch, with `teacher`'s weights where given."""
        hidden = prepared.hidden
        for index, call in enumerate(prepared.calls):
            hidden = self.run_block(index, hidden, call, None if teacher is None else teacher(index))
        return hidden

    @torch.no_grad()
    def teacher_outputs(
        self,
        batches: Sequence[Prepared],
        teacher: Callable[[int], Mapping[str, Tensor] | None] | None = None,
    ) -> list[Tensor]:
        """Return `teacher_output` of every micro-batch, visiting each block once."""
        hidden = [batch.hidden for batch in batches]
        for index in range(len(self.blocks)):
            weights = None if teacher is None else teacher(index)
            with self.opened(index):
                for place, batch in enumerate(batches):  # each micro-batch in place of the last
                    hidden[place] = self.run_block(index, hidden[place], batch.calls[index], weights)
        return hidden

    @property
    def lazy(self) -> bool:
        """Whether the blocks' own weights are read from the checkpoint whenever a block runs."""
        return any(lazy_weights(block) is not None for block in self.blocks)

    def opened(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Keep the own weights of a block in memory meanwhile, where they are not always."""
        lazy = lazy_weights(self.blocks[index])
        held: contextlib.AbstractContextManager[None] = (
            contextlib.nullcontext() if lazy is None else lazy.held()
        )
        return held

    @property
    def device(self) -> torch.device:
        """Where inputs must be: the device of the head, or of a plain module's first parameter."""
        if self.head is not None:
            return self.head.weight.device
        return next(self.model.parameters()).device

    def _fast_norms(self, index: int, where: Tensor) -> Sequence[nn.Module]:
        """Return the norms of a block that torch's kernel computes: those it can, on a GPU."""
        if not where.is_cuda:
            return ()
        if index not in self._norms:
            self._norms[index] = rms_norms(self.blocks[index])
        return self._norms[index]

    def run_block(
        self, index: int, hidden: Tensor, call: BlockCall, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Run block `index`, with `weights` (parameter name -> value) in place of its own where given.

        On a GPU, norms are torch's kernel.
        """
        block = self.blocks[index]
        with fused(self._fast_norms(index, hidden)), layer_by_layer():
            if weights is None:
                return _first(block(hidden, *call.args, **call.kwargs))
            return _first(functional_call(block, dict(weights), (hidden, *call.args), call.kwargs))


# How far the chain's logits may be from the model's: this many units in the last place of the largest logit, but never
# more than this share of it. Those of every tested architecture are equal to the bit, or within one unit.
LOGIT_ULPS, LOGIT_SHARE = 1e3, 0.05


def refuse_encoder_decoder(config: Any) -> None:
    """Refuse the configuration of an encoder-decoder.

    Raises:
        NotImplementedError: It is one.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"DecoderChain: a model of type {getattr(config, 'model_type', '?')} is an encoder-decoder, and only "
            "decoder-only models are quantized"
        )


class DecoderChain(Chain):
    """A `transformers` decoder-only language model."""

    def __init__(
        self, model: nn.Module, ignore: Sequence[str] = ("lm_head",), *, routers: bool = False
    ) -> None:
        """Find blocks and head.

        Args:
            model: A causal language model of `transformers`, in evaluation mode.
            ignore: Module names, last name parts or glob patterns that stay untouched.
            routers: Quantize also what chooses and weighs experts, as files of other tools may.

        Raises:
            NotImplementedError: No chain of blocks, or no linear head, was found; an encoder-decoder; layers of a kind
                that is not quantized in the blocks (`transformers`' Conv1D).
            ValueError: Nothing is left to quantize.
        """
        named = self.named_blocks(model)
        self.model = model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._decoder = self._find_decoder(model)
        self.blocks, self.block_names = list(named.values()), list(named)
        output = _called(model, "get_output_embeddings")
        if not isinstance(output, nn.Linear):
            raise NotImplementedError("DecoderChain: the model has no linear output head")
        config: Any = getattr(model.config, "text_config", model.config)
        self.head = Head(
            output.weight.detach(),
            None if output.bias is None else output.bias.detach(),
            float(getattr(config, "logit_scale", None) or 1.0)
            / float(getattr(config, "logits_scaling", None) or 1.0),
            getattr(config, "final_logit_softcapping", None),
        )
        for prefix, block in zip(self.block_names, self.blocks, strict=True):
            refuse_transposed(transposed_modules(block, prefix, ignore))
        self._collect(ignore, routers)

    @classmethod
    def named_blocks(cls, model: nn.Module) -> dict[str, nn.Module]:
        """Return a model's blocks in order, by their names.

        Raises:
            NotImplementedError: It has none, or is an encoder-decoder.
        """
        refuse_encoder_decoder(getattr(model, "config", None))
        blocks, names = cls._find_blocks(model, cls._find_decoder(model))
        return dict(zip(names, blocks, strict=True))

    @staticmethod
    def _find_decoder(model: nn.Module) -> nn.Module:
        decoder = _called(model, "get_decoder")
        if decoder is None or decoder is model:
            decoder = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
        if not isinstance(decoder, nn.Module):
            raise NotImplementedError("DecoderChain: the model has no decoder (get_decoder)")
        return decoder

    @staticmethod
    def _find_blocks(model: nn.Module, decoder: nn.Module) -> tuple[list[nn.Module], list[str]]:
        lists: list[nn.Module] = [
            m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) > 0
        ]
        if not lists:
            raise NotImplementedError("DecoderChain: the decoder has no list of blocks")

        def size(candidate: nn.Module) -> int:
            return sum(parameter.numel() for parameter in candidate.parameters())

        blocks = list(max(lists, key=size).children())
        names = {id(module): name for name, module in model.named_modules()}
        return blocks, [names[id(block)] for block in blocks]

    @torch.no_grad()
    def prepare(self, inputs: Tensor, mask: Tensor | None = None) -> Prepared:
        """Embed token ids and record the blocks' arguments.

        Args:
            inputs: Token ids, int64, [windows, seqlen]; padding only at the end of a window.
            mask: True where a token counts in the loss, bool, same shape; None counts all. Attention needs
                no padding mask: under causal attention nothing that counts sees the padding.

        Returns:
            Prepared.
        """
        calls: list[BlockCall] = []
        first: list[Tensor] = []

        def recorder(index: int) -> Callable[..., Tensor]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if index == 0:
                    first.append(hidden_states)
                calls.append(BlockCall(args, kwargs))
                return hidden_states

            return forward

        forwards = [recorder(index) for index in range(len(self.blocks))]
        with _replaced_forward(self.blocks, forwards):
            self._decoder(input_ids=inputs, use_cache=False)
        return Prepared(first[0], calls, inputs, mask)

    def finish(self, hidden: Tensor, prepared: Prepared) -> Tensor:
        """Return the head's input (after the final norm), [windows, seqlen, hidden_size]."""

        def bypass(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden_states

        def inject(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden

        forwards: list[Callable[..., Tensor]] = [bypass] * (len(self.blocks) - 1) + [inject]
        with _replaced_forward(self.blocks, forwards):
            output = self._decoder(input_ids=prepared.inputs, use_cache=False)
        return _first(output if isinstance(output, Tensor) else output[0])

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """Return logits computed through the chain, to compare with the model's own."""
        from discquant.ops.reference.linear_kl import cap_logits

        assert self.head is not None
        prepared = self.prepare(inputs)
        features = self.finish(self.teacher_output(prepared), prepared)
        raw = nn.functional.linear(features, self.head.weight, self.head.bias)
        return cap_logits(raw, self.head.logit_scale, self.head.softcap)[0]

    @torch.no_grad()
    def verify(self, inputs: Tensor) -> None:
        """Check that the chain computes what the model computes.

        Raises:
            NotImplementedError: It does not, so this architecture is no plain chain of blocks.
        """
        inputs = inputs.to(self.device)
        norms = [norm for index in range(len(self.blocks)) for norm in self._fast_norms(index, inputs)]
        # With the chain's norms: in 16 bits their last bits grow over the blocks, and turn some token to other experts.
        with fused(norms):
            expected = self.model(input_ids=inputs, use_cache=False).logits
        share = min(LOGIT_ULPS * torch.finfo(expected.dtype).eps, LOGIT_SHARE)
        limit = share * float(expected.abs().max())
        actual = self.logits(inputs)
        # Not "greater": logits that are NaN are within no limit.
        if expected.shape != actual.shape or not float((expected - actual).abs_().max()) <= limit:
            raise NotImplementedError(
                f"DecoderChain: {type(self.model).__name__} is not a plain chain of blocks and a linear head: "
                "its logits differ from the chain's, or are not finite"
            )
