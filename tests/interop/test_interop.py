# SPDX-License-Identifier: Apache-2.0
"""The driver of `make interop` itself: what it compares, keeps and prints; the tools run only in `make interop`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from discquant.formats.coded import CodedLayer
from discquant.grids import UniformGrid

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's modules import one another by their bare names, as a script's do."""
    monkeypatch.syspath_prepend(str(HERE))
    for path in HERE.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)


def _layer(seed: int = 0) -> CodedLayer:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 8, (6, 64), generator=generator).to(torch.uint8)
    scale = (torch.rand(6, 2, generator=generator) + 0.1).bfloat16()
    return CodedLayer("a.b", q, UniformGrid(3, 32, True, scale))


def test_codes_come_back_from_weights_and_one_wrong_code_is_seen() -> None:
    import compare

    layer = _layer()
    weight = layer.dequantize(torch.float16).float()
    assert torch.equal(compare.recover_codes(weight, layer.grid), layer.q)
    found = compare.compare_weights([layer], {"a.b": weight})
    assert (found["codes_equal"], found["bits_equal"], found["missing"]) == (384, 384, [])
    wrong = weight.clone()
    wrong[2, 5] += float(layer.grid.scale[2, 0]) * (1 if layer.q[2, 5] < 7 else -1)
    assert compare.compare_weights([layer], {"a.b": wrong})["codes_equal"] == 383
    assert compare.compare_weights([layer], {})["missing"] == ["a.b"]


def test_bound_grows_with_the_error_of_the_arithmetic() -> None:
    import compare

    oracle = torch.tensor([[1.0, -4.0]], dtype=torch.float64)
    assert compare.logit_bound(oracle, oracle, "float32") == 2 * 2.0**-23 * 4
    assert compare.logit_bound(oracle, oracle + 0.25, "bfloat16") == 2 * (0.25 + 2.0**-7 * 4)


def test_a_sum_in_sequence_adds_each_product_in_turn() -> None:
    import compare

    generator = torch.Generator().manual_seed(4)
    x, weight = torch.randn(2, 3, 17, generator=generator), torch.randn(5, 17, generator=generator)
    want = torch.zeros(2, 3, 5)
    for place in range(17):
        want = want + x[:, :, place : place + 1] * weight[:, place]
    assert torch.equal(compare.sum_in_sequence(x, weight), want)
    # Small terms after a large one are lost one by one; a sum in pairs keeps them.
    lost = torch.tensor([[2.0**24, *[1.0] * 16]])
    assert compare.sum_in_sequence(lost, torch.ones(1, 17)).item() == 2.0**24


def test_int8_blocks_keep_each_block_within_half_a_step() -> None:
    import compare

    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    step = x.view(3, 2, 32).abs().amax(dim=-1, keepdim=True) / 127
    error = (compare._int8_blocks(x, 32) - x).view(3, 2, 32).abs()
    assert bool((error <= step * (0.5 + 1e-3)).all()) and float(error.max()) > 0
    # 256 columns do not fill a block here, so the short blocks are used.
    assert torch.equal(compare._int8_blocks(x, 256), compare._int8_blocks(x, 32))


def test_anything_but_codes_that_changed_is_named(tmp_path: Path) -> None:
    import filediff

    tensors = {
        "m.qweight": torch.arange(4, dtype=torch.int32),
        "m.scales": torch.ones(2).half(),
        "n": torch.ones(1),
    }
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    save_file(tensors, tmp_path / "old" / "model.safetensors")
    save_file({**tensors, "m.qweight": tensors["m.qweight"] + 1}, tmp_path / "new" / "model.safetensors")
    (tmp_path / "new" / "manifest.json").write_text("{}", encoding="utf-8")
    assert filediff.outside_codes(tmp_path / "old", tmp_path / "new") == []
    save_file({**tensors, "m.scales": torch.zeros(2).half()}, tmp_path / "new" / "model.safetensors")
    (tmp_path / "new" / "config.json").write_text("[]", encoding="utf-8")
    assert filediff.outside_codes(tmp_path / "old", tmp_path / "new") == ["config.json", "m.scales"]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_gguf_scales_are_no_codes(tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    import filediff
    import numpy as np

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 64)).astype(np.float32)

    def write(path: Path, scale: float, flip: bool) -> None:
        writer = gguf.GGUFWriter(path, "llama")
        wanted = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(weight * scale, wanted)
        if flip:
            data[0, -1] ^= 1
        writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write(tmp_path / "old.gguf", 1, False)
    write(tmp_path / "codes.gguf", 1, True)
    write(tmp_path / "scales.gguf", 3, False)
    assert filediff.outside_codes(tmp_path / "old.gguf", tmp_path / "codes.gguf") == []
    changed = filediff.outside_codes(tmp_path / "old.gguf", tmp_path / "scales.gguf")
    assert changed == ["blk.0.attn_q.weight"]


def test_a_result_is_kept_while_its_key_is_the_same(tmp_path: Path) -> None:
    from cases import Workshop

    made: list[str] = []

    def make(place: Path) -> None:
        made.append(place.name)
        place.write_text("x", encoding="utf-8")

    shop = Workshop(tmp_path)
    for key in ("1", "1", "2", "2"):
        shop.kept(tmp_path / "sub" / "thing", key, make)
    assert made == ["thing", "thing"]


def test_a_tool_that_fails_or_hangs_becomes_a_row_that_says_so(tmp_path: Path) -> None:
    import runner

    script = tmp_path / "tool.py"
    script.write_text("raise ValueError('no such layout')", encoding="utf-8")
    row = runner.timed(lambda: runner.run_script([sys.executable, script], tmp_path / "log", 60))  # type: ignore[arg-type, return-value]
    assert row["ok"] is False and "ValueError: no such layout" in row["message"]
    script.write_text("import time\ntime.sleep(600)", encoding="utf-8")
    with pytest.raises(runner.ToolError, match="stopped after 1 s"):
        runner.run_script([sys.executable, script], tmp_path / "log", 1)


def test_messages_hold_no_paths_and_no_addresses() -> None:
    import runner

    text = runner.public(f"cannot open {runner.ROOT}/runs/x, /opt/a/b.so at https://host.example/simple/")
    assert text == "cannot open ./runs/x, b.so at <address>"


def test_autoround_files_name_the_release_whose_loader_is_run() -> None:
    import environments

    from discquant.formats.autoround import AUTOROUND_VERSION

    pinned = environments.requirements("autoround").read_text(encoding="utf-8").split()
    assert f"auto-round=={AUTOROUND_VERSION}" in pinned


def test_the_page_shows_successes_and_failures() -> None:
    import table
    from rows import CONSUMERS, PRODUCERS

    names = [row.name for row in (*CONSUMERS, *PRODUCERS)]
    assert len(names) == len(set(names))
    consumer = {
        "kind": "consumer", "tool": "gptqmodel", "case": "int3", "format": "gptq", "ok": True, "weights": 10,
        "codes_equal": 10, "bits_equal": 10, "bits_equal_as": "float16", "missing": [], "difference": 1e-3,
        "bound": 2e-3, "kl_rounded_tool": 1e-6, "kl_original_rounded": 0.1, "perplexity_tool": 3.0,
        "perplexity_rounded": 3.0, "versions": {"gptqmodel": "7.6.0"},
    }  # fmt: skip
    broken = {
        "kind": "refine",
        "tool": "x",
        "label": "y",
        "format": "gptq",
        "bits": 3,
        "ok": False,
        "message": "no y",
    }
    page = table.document(json.loads(json.dumps({"rows": {"a": consumer, "b": broken}, "machine": {}})))
    assert "| gptqmodel 7.6.0 | gptq | tiny_llama, int3 | 10 of 10 | 10 (float16) |" in page
    assert "- `b`: no y" in page and page.count("**no**") == 1
