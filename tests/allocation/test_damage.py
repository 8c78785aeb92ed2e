# SPDX-License-Identifier: Apache-2.0
"""What an error costs: products with the gradients of sampled labels, and the KL that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant.allocation.damage import _weights, projections
from discquant.formats.source import open_source
from discquant.solver.boundaries import Boundaries
from discquant.solver.chain import DecoderChain, Prepared
from discquant.solver.measure import mean_kl
from discquant.solver.rows import TokenRows
from discquant.solver.sampled import label_generator, sampled_gradient


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {
        "vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(4)
    return model.eval()


def windows_of(chain: DecoderChain, count: int = 3, mask: bool = False) -> tuple[TokenRows, list[Prepared]]:
    ids = torch.randint(3, 50, (count, 12), generator=torch.Generator().manual_seed(1))
    keep = torch.ones_like(ids, dtype=torch.bool)
    if mask:
        keep[1, 7:] = False
    rows = TokenRows(chain, ids, keep, 1)
    return rows, rows.batches(range(count))


def drawn(chain: DecoderChain, index: int, candidates: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + index)
    return [torch.randn(candidates, *ref.shape, generator=generator) * 0.01 for ref in chain.weights[index]]


@pytest.mark.parametrize("mask", [False, True])
def test_products_are_those_of_the_whole_model_s_gradient(mask: bool) -> None:
    """By autograd through all blocks at once, on the same labels; what does not count has no part in it."""
    chain = DecoderChain(llama())
    _, windows = windows_of(chain, mask=mask)
    found = projections(
        chain,
        windows,
        lambda index, _: drawn(chain, index),
        generator=label_generator(torch.device("cpu"), 5),
    )
    generator = label_generator(torch.device("cpu"), 5)
    outputs = [chain.teacher_output(window) for window in windows]
    pulls = [
        sampled_gradient(chain, w, output, generator) for w, output in zip(windows, outputs, strict=True)
    ]
    refs = [ref for block in chain.weights for ref in block]
    errors = [error for index in range(2) for error in drawn(chain, index)]
    for place, (window, pull) in enumerate(zip(windows, pulls, strict=True)):
        leaves = [
            {ref.param_name: ref.parameter.detach().requires_grad_() for ref in block}
            for block in chain.weights
        ]
        hidden = window.hidden
        with torch.enable_grad():
            for index, own in enumerate(leaves):
                hidden = chain.run_block(index, hidden, window.calls[index], own)
        grads = torch.autograd.grad(hidden, [leaf for own in leaves for leaf in own.values()], pull)
        for ref, error, grad in zip(refs, errors, grads, strict=True):
            expected = (error * grad).sum(dim=(1, 2)).double()
            torch.testing.assert_close(found[ref.name][:, place], expected, rtol=1e-4, atol=1e-6)
    assert found.keys() == {ref.name for ref in refs}


def test_the_form_is_the_kl_that_an_error_causes() -> None:
    """Half the mean square of the products, against the KL itself, within the noise of the labels."""
    chain = DecoderChain(llama())
    rows, _ = windows_of(chain, 48)
    windows = rows.batches(range(48)) * 8  # labels are drawn again for each
    found = projections(
        chain,
        windows,
        lambda index, _: drawn(chain, index, 1),
        generator=label_generator(torch.device("cpu"), 5),
    )
    tokens = 8 * rows.tokens(range(48), "kl")
    for index in range(2):
        for ref, (error,) in zip(chain.weights[index], drawn(chain, index, 1), strict=True):
            predicted = 0.5 * float(found[ref.name].square().sum()) / tokens

            def student(
                block: int, index: int = index, ref: Any = ref, error: Tensor = error
            ) -> dict[str, Tensor]:
                own = {other.param_name: other.matrix() for other in chain.weights[block]}
                return own | ({ref.param_name: ref.matrix() + error} if block == index else {})

            actual = mean_kl(chain, student, rows.batches(range(48)))
            # 384 squares of a normal variable: a standard error of 7 %.
            assert predicted == pytest.approx(actual, rel=0.3), ref.name


def test_streamed_activations_and_weights_give_the_same(tmp_path: Path) -> None:
    """Blocks read one by one from the checkpoint, and activations kept on disk: bit for bit."""
    llama().save_pretrained(tmp_path / "model")
    made = []
    for lazy, boundaries in ((False, None), (True, Boundaries("disk", "cpu", tmp_path / "scratch"))):
        chain = DecoderChain(open_source(tmp_path / "model", dtype=torch.float32, lazy=lazy).model)
        _, windows = windows_of(chain)
        made.append(
            projections(
                chain, windows, lambda index, _, chain=chain: drawn(chain, index),  # type: ignore[misc]
                generator=label_generator(torch.device("cpu"), 5), boundaries=boundaries,
            )
        )  # fmt: skip
        if boundaries is not None:
            boundaries.close()
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_experts_have_their_own_and_those_without_tokens_none() -> None:
    """A fused parameter's matrices one by one; an expert that no token of a window chose has a product of zero."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(3)
    config = MixtralConfig(
        vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=1, max_position_embeddings=64,
    )  # fmt: skip
    chain = DecoderChain(MixtralForCausalLM(config).eval())
    ids = torch.full((2, 6), 7)  # one token over and over: few experts see it
    windows = TokenRows(chain, ids, None, 1).batches(range(2))
    found = projections(
        chain,
        windows,
        lambda index, _: drawn(chain, index),
        generator=label_generator(torch.device("cpu"), 5),
    )
    for refs in chain.weights:  # in memory and where they run: no copy
        for name, value in _weights(refs).items():
            assert value.data_ptr() == next(r.parameter for r in refs if r.param_name == name).data_ptr()
    experts = {name: value for name, value in found.items() if ".experts." in name}
    assert len(experts) == 18
    reached = {name.split(".experts.")[1].split(".")[0] for name, value in experts.items() if value.any()}
    assert 0 < len(reached) < 6


def measured(chain: DecoderChain, known: set[str], asked: list[int] | None = None) -> dict[str, Tensor]:
    """Products of two windows; `asked` gets the blocks whose errors were wanted."""

    def errors(index: int, inputs: list[Tensor]) -> list[Tensor]:
        if asked is not None:
            asked.append(index)
        return drawn(chain, index)

    _, windows = windows_of(chain, 2)
    return projections(chain, windows, errors, generator=label_generator(torch.device("cpu"), 5), known=known)


def test_blocks_that_are_known_are_only_passed() -> None:
    """No errors are made of them, and the others get what they get without; a block that is known in part is done."""
    chain = DecoderChain(llama(num_hidden_layers=3))
    whole = measured(chain, set())
    names = [{ref.name for ref in refs} for refs in chain.weights]
    part = {min(names[0])}
    for known, wanted in (
        (names[2] | names[1], [0]), (names[0], [2, 1]), (names[1] | part, [2, 0]), (names[0] | names[1] | names[2], []),
    ):  # fmt: skip
        asked: list[int] = []
        found = measured(chain, known, asked)
        assert asked == wanted and set(found) == set().union(*(names[index] for index in wanted))
        assert all(torch.equal(product, whole[name]) for name, product in found.items())


def test_products_of_narrow_errors_are_wide() -> None:
    """All choices of a block are held at once, in bfloat16; a sum over a matrix in it would be noise."""
    chain = DecoderChain(llama())
    _, windows = windows_of(chain, 2)

    def found(dtype: torch.dtype) -> dict[str, Tensor]:
        return projections(
            chain, windows, lambda index, _: [error.bfloat16().to(dtype) for error in drawn(chain, index)],
            generator=label_generator(torch.device("cpu"), 5),
        )  # fmt: skip

    narrow, wide = found(torch.bfloat16), found(torch.float32)
    assert all(torch.equal(narrow[name], product) for name, product in wide.items())


class Routed(torch.nn.Module):
    """Two experts of plain linear layers, of which the second gets no token."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


def test_a_layer_that_no_token_reaches_has_a_product_of_zero() -> None:
    model = llama()
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = Routed()
    for name, product in measured(DecoderChain(model), set()).items():
        assert bool(product.any()) != name.endswith("experts.1")
