# SPDX-License-Identifier: Apache-2.0
"""Block-sequential gradients are those of whole-model autograd, and only one block's exist at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from discquant.solver.chain import Chain, DecoderChain
from discquant.solver.gradients import block_gradients
from discquant.solver.losses import kl_of_logits
from discquant.solver.measure import mean_kl
from discquant.solver.module_chain import ModuleChain


def _student(chain: Chain) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    return [
        {
            ref.param_name: ref.parameter.detach()
            * (1 + 0.2 * torch.randn(ref.parameter.shape, generator=generator, dtype=ref.parameter.dtype))
            for ref in refs
        }
        for refs in chain.weights
    ]


def _whole_model(
    model: Any, chain: Chain, student: list[dict[str, Tensor]], ids: Tensor, mask: Tensor, loss: str
) -> tuple[float, list[dict[str, Tensor]]]:
    """Loss and gradients by ordinary autograd through the whole model."""
    flat = {}
    leaves = []
    for name, weights in zip(chain.block_names, student, strict=True):
        leaves.append({key: value.clone().requires_grad_() for key, value in weights.items()})
        flat |= {f"{name}.{key}": value for key, value in leaves[-1].items()}
    output = functional_call(
        model, flat, (), {"input_ids": ids, "use_cache": False, "output_hidden_states": True}
    )
    teacher = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    if loss == "kl":
        log_p, log_q = teacher.logits.log_softmax(-1), output.logits.log_softmax(-1)
        value = (log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean()
    else:
        counted = mask[:, 1:]
        value = torch.nn.functional.cross_entropy(output.logits[:, :-1][counted], ids[:, 1:][counted])
    value.backward()
    return value.item(), [{k: v.grad for k, v in block.items()} for block in leaves]


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("loss", ["kl", "ce"])
@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3-qk-norm", "gemma2-softcap", "phi3-fused", "granite-scaling"]
)
def test_equal_to_whole_model_autograd(
    architecture: str, loss: Any, keep_graph: bool, make_model: Callable[..., Any], token_ids: Tensor
) -> None:
    """Float64: the same sums up to the order in which micro-batches are added."""
    model = make_model(architecture)
    chain = DecoderChain(model)
    student = _student(chain)
    mask = torch.ones_like(token_ids, dtype=torch.bool)
    mask[1, 7:] = False
    expected_loss, expected = _whole_model(model, chain, student, token_ids, mask, loss)
    found: list[dict[str, Tensor]] = [{} for _ in chain.blocks]
    batches = [chain.prepare(token_ids[rows], mask[rows]) for rows in (slice(0, 2), slice(2, 4))]
    value = block_gradients(
        chain,
        lambda b: student[b],
        batches,
        found.__setitem__,
        loss=loss,
        chunk_size=5,
        keep_graph=keep_graph,
    )
    eps = torch.finfo(torch.float64).eps
    assert abs(value - expected_loss) <= 64 * eps * max(1.0, abs(expected_loss))
    for block, reference in zip(found, expected, strict=True):
        assert block.keys() == reference.keys()
        for name, grad in reference.items():
            assert (block[name] - grad).abs().max() <= 512 * eps * grad.abs().max(), name


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("loss", ["kl", "ce", "mse"])
@pytest.mark.parametrize("dense", [(0,), (0, 1), (1,), (2,)])
def test_blocks_without_weights(
    dense: tuple[int, ...], loss: Any, keep_graph: bool, make_model: Callable[..., Any], token_ids: Tensor
) -> None:
    """Blocks that nobody quantizes change no gradient of the others; below all others they get no backward pass."""
    model = make_model("llama")
    whole, part = DecoderChain(model), DecoderChain(model, [f"model.layers.{index}.*" for index in dense])
    student = _student(whole)
    for index in dense:
        student[index] = {ref.param_name: ref.parameter.detach() for ref in whole.weights[index]}
    found: list[dict[int, dict[str, Tensor]]] = []
    values = []
    for chain in (whole, part):
        sums: dict[int, dict[str, Tensor]] = {}
        weights = [
            {ref.param_name: block[ref.param_name] for ref in refs}
            for refs, block in zip(chain.weights, student, strict=True)
        ]
        values.append(
            block_gradients(
                chain,
                weights.__getitem__,
                [chain.prepare(token_ids)],
                sums.__setitem__,
                loss=loss,
                keep_graph=keep_graph,
            )
        )
        found.append(sums)
    assert values[0] == values[1]
    assert min(found[1]) == part.first == (0 if 0 not in dense else len(dense))
    for index, sums in found[1].items():
        expected = {} if index in dense else found[0][index]
        assert sums.keys() == expected.keys()
        assert all(torch.equal(grad, expected[name]) for name, grad in sums.items())


def test_last_bit_with_one_micro_batch(make_model: Callable[..., Any], token_ids: Tensor) -> None:
    """With one micro-batch and one chunk every block gradient equals autograd's through the chain, bit for bit."""
    chain = DecoderChain(make_model("llama"))
    student = _student(chain)
    batch = chain.prepare(token_ids)
    found: list[dict[str, Tensor]] = [{} for _ in chain.blocks]
    block_gradients(chain, lambda b: student[b], [batch], found.__setitem__)
    leaves = [{k: v.clone().requires_grad_() for k, v in block.items()} for block in student]
    hidden = batch.hidden
    for index, weights in enumerate(leaves):
        hidden = chain.run_block(index, hidden, batch.calls[index], weights)
    # The head's gradient is the op's own; everything below it is one autograd graph here.
    from discquant.solver.losses import head_loss

    part = head_loss(chain, batch, hidden.detach(), chain.teacher_output(batch), loss="kl", normalizer=48.0)
    hidden.backward(part.grad)
    for block, reference in zip(found, leaves, strict=True):
        for name, leaf in reference.items():
            assert torch.equal(block[name], leaf.grad), name


@pytest.mark.parametrize("padded", [False, True])
def test_mse_equals_autograd(padded: bool, make_model: Callable[..., Any], token_ids: Tensor) -> None:
    """The mean over counted tokens of all micro-batches, however many of them lie in each; padding changes nothing."""
    chain = DecoderChain(make_model("llama"))
    student = _student(chain)
    mask = torch.ones_like(token_ids, dtype=torch.bool)
    if padded:
        mask[0, 5:] = mask[3, 9:] = False
    batch = chain.prepare(token_ids)
    leaves = [{k: v.clone().requires_grad_() for k, v in block.items()} for block in student]
    s = t = batch.hidden
    value = torch.zeros((), dtype=torch.float64)
    for index, weights in enumerate(leaves):
        s = chain.run_block(index, s, batch.calls[index], weights)
        t = chain.run_block(index, t, batch.calls[index])
        value = value + (s - t)[mask].square().mean() / len(chain.blocks)
    value.backward()
    for content in (3, 4):
        ids = torch.where(mask, token_ids, content)
        given = None if not padded else mask
        batches = [
            chain.prepare(ids[rows], None if given is None else given[rows])
            for rows in (slice(0, 1), slice(1, 4))
        ]
        found: list[dict[str, Tensor]] = [{} for _ in chain.blocks]
        got = block_gradients(chain, lambda b: student[b], batches, found.__setitem__, loss="mse")
        assert got == pytest.approx(value.item(), rel=1e-12)
        for block, reference in zip(found, leaves, strict=True):
            for name, leaf in reference.items():
                assert (block[name] - leaf.grad).abs().max() <= 1e-12 * leaf.grad.abs().max()


def test_keeping_the_graph_changes_no_bit(make_model: Callable[..., Any], token_ids: Tensor) -> None:
    chain = DecoderChain(make_model("llama", torch.float32))
    student = _student(chain)
    batches = [chain.prepare(token_ids[:2]), chain.prepare(token_ids[2:])]
    results = []
    for keep in (False, True):
        found: list[dict[str, Tensor]] = [{} for _ in chain.blocks]
        loss = block_gradients(chain, lambda b: student[b], batches, found.__setitem__, keep_graph=keep)
        results.append((loss, found))
    assert results[0][0] == results[1][0]
    for one, two in zip(results[0][1], results[1][1], strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_known_teacher_changes_no_bit(make_model: Callable[..., Any], token_ids: Tensor) -> None:
    chain = DecoderChain(make_model("llama", torch.float32))
    student = _student(chain)
    batch = chain.prepare(token_ids)
    losses = []
    for prepared in (batch, batch._replace(teacher=chain.teacher_output(batch))):
        losses.append(block_gradients(chain, lambda b: student[b], [prepared], lambda b, g: None))
        assert mean_kl(chain, lambda b: student[b], [prepared]) == pytest.approx(losses[-1], rel=1e-6)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("keep_graph", [False, True])
def test_never_two_blocks_gradients(
    keep_graph: bool, make_model: Callable[..., Any], token_ids: Tensor
) -> None:
    """When a block's gradients arrive, those of the block before are gone from memory."""
    chain = DecoderChain(make_model("llama"))
    student = _student(chain)
    alive: list[weakref.ref[Tensor]] = []
    order: list[int] = []

    def sink(index: int, grads: dict[str, Tensor]) -> None:
        gc.collect()
        assert not any(reference() is not None for reference in alive), (
            f"block {index}: an earlier gradient lives"
        )
        alive.extend(weakref.ref(grad) for grad in grads.values())
        order.append(index)

    block_gradients(chain, lambda b: student[b], [chain.prepare(token_ids)], sink, keep_graph=keep_graph)
    assert order == [2, 1, 0]
    assert len(alive) == 3 * 7


def test_a_block_may_be_changed_in_its_callback(make_model: Callable[..., Any], token_ids: Tensor) -> None:
    """Stepping a block at once does not disturb the gradients of the blocks below it."""
    chain = DecoderChain(make_model("llama"))
    results = []
    for change in (False, True):
        student = _student(chain)
        found: list[dict[str, Tensor]] = [{} for _ in chain.blocks]

        def sink(index: int, grads: dict[str, Tensor]) -> None:
            found[index] = grads  # noqa: B023 (called within this iteration)
            if change:  # noqa: B023
                for weight in student[index].values():  # noqa: B023
                    weight.zero_()

        block_gradients(chain, lambda b: student[b], [chain.prepare(token_ids)], sink)  # noqa: B023
        results.append(found)
    for one, two in zip(*results, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_plain_module_equals_autograd() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 16, 5)
    ).double()
    chain = ModuleChain(net)
    student = _student(chain)
    x = torch.randn(6, 2, 6, 6, dtype=torch.float64)
    leaves = {key: value.clone().requires_grad_() for key, value in student[0].items()}
    log_q = functional_call(net, leaves, (x,)).log_softmax(-1)
    log_p = net(x).log_softmax(-1)
    value = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    value.backward()
    found: list[dict[str, Tensor]] = [{}]
    got = block_gradients(
        chain, lambda b: student[b], [chain.prepare(x[:4]), chain.prepare(x[4:])], found.__setitem__
    )
    assert got == pytest.approx(value.item(), rel=1e-12)
    for name, leaf in leaves.items():
        assert (found[0][name] - leaf.grad).abs().max() <= 1e-12 * leaf.grad.abs().max()


def test_masked_classes_of_a_module() -> None:
    """A class whose logit is -inf in both counts for nothing, in the KL and in its gradient."""
    teacher, student = torch.randn(2, 3, 5, dtype=torch.float64)
    expected_leaf = student.clone().requires_grad_()
    expected = kl_of_logits(expected_leaf, teacher)
    expected.sum().backward()
    wider = torch.full((3, 1), -torch.inf, dtype=torch.float64)
    leaf = torch.cat([student, wider], dim=1).requires_grad_()
    found = kl_of_logits(leaf, torch.cat([teacher, wider], dim=1))
    found.sum().backward()
    assert torch.equal(found, expected)
    assert leaf.grad is not None and expected_leaf.grad is not None
    assert torch.equal(leaf.grad[:, :5], expected_leaf.grad) and not leaf.grad[:, 5].any()


def test_nothing_to_count_is_refused(make_model: Callable[..., Any], token_ids: Tensor) -> None:
    chain = DecoderChain(make_model("llama"))
    student = _student(chain)
    batch = chain.prepare(token_ids, torch.zeros_like(token_ids, dtype=torch.bool))
    with pytest.raises(ValueError, match="no token"):
        block_gradients(chain, lambda b: student[b], [batch], lambda b, g: None)


def test_non_finite_loss_is_refused_before_any_callback(
    make_model: Callable[..., Any], token_ids: Tensor
) -> None:
    chain = DecoderChain(make_model("llama"))
    student = _student(chain)
    student[1]["mlp.down_proj.weight"][0, 0] = torch.nan
    calls: list[int] = []
    with pytest.raises(ValueError, match="finite"):
        block_gradients(chain, lambda b: student[b], [chain.prepare(token_ids)], lambda b, g: calls.append(b))
    assert calls == []
