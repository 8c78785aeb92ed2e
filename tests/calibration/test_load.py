# SPDX-License-Identifier: Apache-2.0
"""load_windows: every kind of data set, exactly the tokens that stand in it, and each documented error."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from discquant.calibration import load_windows
from discquant.calibration.load import check_dataset, text_mask
from discquant.errors import CalibrationError, ConfigError

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
BOS, EOS, PAD = 1, 2, 0


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts_of(windows: Any, tokenizer: Any) -> list[str]:
    """Documents that a set of windows in stream order holds, told apart by begin and end token."""
    stream = windows.input_ids[windows.mask].tolist()
    text = tokenizer.decode(stream)
    assert text.startswith("<s>")
    return [part.removesuffix("</s>") for part in text.split("<s>")[1:]]


def in_stream_order(dataset: str, tokenizer: Any, **options: Any) -> Any:
    """One window that holds everything: no order of windows to undo."""
    from discquant.calibration import load

    ids, mask = load._from_text(
        dataset, tokenizer, nsamples=10**6, seqlen=options.pop("seqlen", 8), seed=0, pad_id=PAD,
        **({"chat_template": False, "text_key": "text"} | options),
    )  # fmt: skip
    return load.Windows.make(ids, mask)


def test_a_byte_order_mark_is_no_text(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("ab cd\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("ab cd\n", encoding="utf-8-sig")
    plain, marked = (in_stream_order(str(tmp_path / name), tokenizer) for name in ("a.txt", "b.txt"))
    assert torch.equal(plain.input_ids, marked.input_ids)


def test_txt_is_one_document_without_loss(tmp_path: Path, tokenizer: Any) -> None:
    text = "The quick brown fox\njumps over 12 lazy dogs.\n"
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert texts_of(in_stream_order(str(path), tokenizer), tokenizer) == [text]
    windows = load_windows(str(path), tokenizer, nsamples=99, seqlen=10)
    total = len(text) + 2
    assert (len(windows), windows.seqlen, windows.tokens) == (-(-total // 10), 10, total)
    assert set(windows.input_ids[~windows.mask].tolist()) == {PAD}
    everything = sorted(windows.input_ids[windows.mask].tolist())
    assert everything == sorted([BOS, *tokenizer(text, add_special_tokens=False)["input_ids"], EOS])


def test_no_second_begin_or_end_token(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("<s>some text</s>")
    windows = load_windows(str(path), tokenizer, nsamples=1, seqlen=11)
    ids = windows.input_ids[0].tolist()
    assert (ids.count(BOS), ids.count(EOS), ids[0], ids[-1]) == (1, 1, BOS, EOS)


def test_jsonl_and_parquet_give_their_rows(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [f"document {number}" for number in range(23)]
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"text": row, "other": 1} for row in rows])
    parquet = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": rows, "other": [1] * 23}), parquet, row_group_size=5)
    for dataset in (jsonl, parquet):
        found = texts_of(in_stream_order(dataset, tokenizer), tokenizer)
        assert sorted(found) == sorted(rows), dataset
        assert found != rows, "the order must be permuted"


def test_question_answer_and_text_key(tmp_path: Path, tokenizer: Any) -> None:
    dataset = write_jsonl(tmp_path / "a.jsonl", [{"question": "1+1?", "answer": "2"}])
    assert texts_of(in_stream_order(dataset, tokenizer), tokenizer) == ["Question: 1+1?\nAnswer: 2"]
    dataset = write_jsonl(tmp_path / "b.jsonl", [{"body": "words and words"}])
    assert texts_of(in_stream_order(dataset, tokenizer, text_key="body"), tokenizer) == ["words and words"]


def test_chat_template(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dialogue = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]
    chat = write_jsonl(tmp_path / "a.jsonl", [{"messages": dialogue}])
    pair = write_jsonl(tmp_path / "b.jsonl", [{"question": "hi there", "answer": "hello"}])
    plain = write_jsonl(tmp_path / "c.jsonl", [{"text": "hi there"}])
    with pytest.raises(CalibrationError, match="needs a chat template"):
        load_windows(chat, tokenizer, nsamples=1, seqlen=8)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    rendered = "[user]hi there\n[assistant]hello\n"
    assert texts_of(in_stream_order(chat, tokenizer), tokenizer) == [rendered]
    assert texts_of(in_stream_order(pair, tokenizer, chat_template=True), tokenizer) == [rendered]
    assert texts_of(in_stream_order(plain, tokenizer, chat_template=True), tokenizer) == ["[user]hi there\n"]


def test_reads_no_more_documents_than_needed(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A large file costs what is used of it, and where text abounds no window is padded."""
    dataset = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 100}] * 50)
    for seed in range(8):
        with caplog.at_level(logging.INFO):
            windows = load_windows(dataset, tokenizer, nsamples=4, seqlen=20, seed=seed)
        assert len(windows) == 4
        assert bool(windows.mask.all())
    assert "1 documents read, 0 of them empty, 102 tokens" in caplog.text


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"text": "half \\ud800 a pair"}', "no Unicode text"),
        ('{"messages": [{"role": "user", "content": "half \\udfff"}]}', "no Unicode text"),
        ("[" * 100_000, "is not JSON"),
        ('{"text": "x", "n": ' + "1" * 5000 + "}", "is not JSON"),
    ],
)
def test_lines_that_json_or_tokenizer_cannot_take(
    line: str, match: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is told by file and line, as other lines that cannot be read."""
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(CalibrationError, match=rf"{path} line 2 .*{match}|{path} line 2 {match}"):
        load_windows(str(path), tokenizer, nsamples=1, seqlen=8)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint8])
def test_token_file(tmp_path: Path, tokenizer: Any, model: Any, dtype: torch.dtype) -> None:
    rows = torch.randint(3, 100, (6, 20)).to(dtype)
    save_file({"calibration": rows, "heldout": rows[:1].clone()}, tmp_path / "t.safetensors")
    windows = load_windows(f"{tmp_path}/t.safetensors:calibration", None, nsamples=99, seqlen=20, model=model)
    assert sorted(map(tuple, windows.input_ids.tolist())) == sorted(map(tuple, rows.tolist()))
    assert bool(windows.mask.all())
    # Longer rows are cut, each on its own: 8 + 8 + 4 tokens, and nothing lost.
    windows = load_windows(f"{tmp_path}/t.safetensors:calibration", tokenizer, nsamples=99, seqlen=8)
    assert (len(windows), windows.seqlen, windows.tokens) == (18, 8, 120)
    assert sorted(windows.input_ids[windows.mask].tolist()) == sorted(rows.flatten().tolist())


def test_token_file_narrower_than_seqlen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"ids": torch.full((3, 6), 5)}, tmp_path / "t.safetensors")
    with caplog.at_level(logging.WARNING):
        windows = load_windows(f"{tmp_path}/t.safetensors", None, nsamples=3, seqlen=16)
    assert windows.seqlen == 6
    assert "rows of 6 tokens, fewer than seqlen = 16" in caplog.text


def test_padding_of_a_token_file_is_masked(tmp_path: Path, model: Any) -> None:
    rows = torch.tensor([[1, 5, 6, 2, 0, 0], [1, 5, 0, 6, 7, 2], [1, 0, 0, 0, 0, 0]])
    save_file({"ids": rows}, tmp_path / "t.safetensors")
    windows = load_windows(f"{tmp_path}/t.safetensors:ids", None, nsamples=9, seqlen=6, model=model)
    found = {
        tuple(ids): mask for ids, mask in zip(windows.input_ids.tolist(), windows.mask.tolist(), strict=True)
    }
    T, F = True, False
    assert found == {
        (1, 5, 6, 2, 0, 0): [T, T, T, T, F, F],
        (1, 5, 0, 6, 7, 2): [T] * 6,
        (1, 0, 0, 0, 0, 0): [T, F, F, F, F, F],
    }


def test_text_mask_where_the_end_token_pads() -> None:
    rows = torch.tensor([[1, 5, 2, 2, 2], [1, 5, 6, 7, 2], [1, 5, 2, 1, 8]])
    expected = [[True, True, True, False, False], [True] * 5, [True] * 5]
    assert text_mask(rows, pad=2, eos=2).tolist() == expected
    assert bool(text_mask(rows, pad=None, eos=2).all())


def test_arithmetic_splits_share_no_problem(tokenizer: Any) -> None:
    found = {}
    for split in ("calibration", "heldout"):
        windows = load_windows(f"arithmetic:{split}", tokenizer, nsamples=20, seqlen=256)
        assert (len(windows), windows.seqlen) == (20, 256)
        # Characters are tokens here; whole questions inside one window are enough to compare.
        text = [tokenizer.decode(row) for row in windows.input_ids.tolist()]
        found[split] = {
            part.split("\n")[0] for row in text for part in row.split("Question: ")[1:] if "\n" in part
        }
        assert len(found[split]) > 3
    assert not found["calibration"] & found["heldout"]
    assert load_windows("arithmetic", tokenizer, nsamples=4, seqlen=64).digest == (
        load_windows("arithmetic:calibration", tokenizer, nsamples=4, seqlen=64).digest
    )


def test_seed_decides(tmp_path: Path, tokenizer: Any) -> None:
    dataset = write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {number}"} for number in range(40)])
    one, again, other = (
        load_windows(dataset, tokenizer, nsamples=5, seqlen=16, seed=seed) for seed in (3, 3, 4)
    )
    assert one.digest == again.digest
    assert one.digest != other.digest


def test_too_few_windows_warns_with_both_numbers(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 38)
    with caplog.at_level(logging.INFO):
        windows = load_windows(str(path), tokenizer, nsamples=7, seqlen=16)
    assert len(windows) == 3
    assert "3 windows of 16 tokens, fewer than the 7 asked for" in caplog.text
    assert "40 tokens used, 0 left over, 8 of padding" in caplog.text


def test_callers_may_say_that_windows_are_fewer(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Runs do, in a note: a warning besides would say it twice."""
    (tmp_path / "a.txt").write_text("some words " * 20)
    for warn in (True, False):
        caplog.clear()
        load_windows(str(tmp_path / "a.txt"), tokenizer, nsamples=700, seqlen=16, warn=warn)
        warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warned) == warn


def test_left_over_tokens_are_told(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 62)
    with caplog.at_level(logging.INFO):
        load_windows(str(path), tokenizer, nsamples=1, seqlen=16)
    assert "1 windows of 16 tokens, 16 tokens used, 48 left over" in caplog.text


def bad_files(folder: Path) -> dict[str, tuple[str, str]]:
    """What is wrong: (data set, words of the message)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "empty.txt").write_text(" \n ")
    (folder / "short.txt").write_text("abc")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00\x9f")
    (folder / "table.csv").write_text("a,b\n")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "list.jsonl").write_text("[1, 2]\n")
    (folder / "keys.jsonl").write_text('{"content": "a", "id": 3}\n')
    (folder / "nothing.jsonl").write_text("\n")
    (folder / "broken.parquet").write_bytes(b"PAR1 no")
    save_file(
        {"a": torch.full((2, 9), 200), "b": torch.rand(2, 9), "c": torch.tensor([[3, -4]])},
        folder / "t.safetensors",
    )
    save_file({"e": torch.zeros(0, 9, dtype=torch.int64)}, folder / "e.safetensors")
    save_file({"p": torch.zeros(4, 9, dtype=torch.int64)}, folder / "padding.safetensors")
    damaged = folder / "page.parquet"
    pq.write_table(pa.table({"text": ["words "] * 400}), damaged, use_dictionary=False, compression="none")
    damaged.write_bytes(b"PAR1" + b"\xff" * 64 + damaged.read_bytes()[68:])
    (folder / "cut.safetensors").write_bytes((folder / "t.safetensors").read_bytes()[:-20])
    return {
        "empty": ("empty.txt", "holds no text"),
        "short": ("short.txt", "too short: 5 tokens, and one window needs 8"),
        "binary": ("binary.txt", "is not UTF-8"),
        "suffix": ("table.csv", "must be a .txt, .jsonl or .parquet"),
        "missing": ("gone.jsonl", "there is no file"),
        "not json": ("broken.jsonl", "line 2 is not JSON"),
        "list": ("list.jsonl", "must be a JSON object"),
        "keys": ("keys.jsonl", "got content (str), id (int)"),
        "no rows": ("nothing.jsonl", "holds no text"),
        "parquet": ("broken.parquet", "not a readable parquet"),
        "parquet page": ("page.parquet", "not a readable parquet"),
        "padding alone": ("padding.safetensors:p", "holds padding alone, [4, 9]"),
        "vocabulary": ("t.safetensors:a", "token id 200, and the model's vocabulary has 104"),
        "float ids": ("t.safetensors:b", "must be integer token ids"),
        "negative": ("t.safetensors:c", "negative token id -4"),
        "key": ("t.safetensors:d", "holds a, b, c; name one"),
        "no key": ("t.safetensors", "holds a, b, c; name one"),
        "no ids": ("e.safetensors", "is empty"),
        "truncated": ("cut.safetensors:a", "truncated or corrupt"),
        "no token file": ("gone.safetensors:a", "there is no file"),
    }


def test_rejects_bad_data(tmp_path: Path, tokenizer: Any, model: Any) -> None:
    for what, (dataset, words) in bad_files(tmp_path).items():
        with pytest.raises(CalibrationError) as raised:
            load_windows(str(tmp_path / dataset), tokenizer, nsamples=2, seqlen=8, model=model)
        assert words in str(raised.value), f"{what}: {raised.value}"


def test_the_beginning_of_a_file_is_looked_at(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its rest; what is right later is not read, and what loads passes."""
    from discquant.calibration import documents

    def told(dataset: str) -> str:
        try:
            check_dataset(str(tmp_path / dataset), tokenizer)
        except CalibrationError as error:
            return str(error)
        return ""

    bad = bad_files(tmp_path)
    early = {what: text for what, (dataset, _) in bad.items() if (text := told(dataset))}
    assert {"no token file", "truncated"} < early.keys()
    assert all(bad[what][1] in text for what, text in early.items())
    monkeypatch.setattr(documents, "_FIRST_PIECE", 3)
    (tmp_path / "good.TXT").write_text(
        "a\u00e4\u00e4", encoding="utf-8"
    )  # a character across the piece's end
    (tmp_path / "bad.txt").write_bytes(b"a\xff\xff\xff")
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "words"}, "no object"])
    save_file({"a": torch.zeros(1, 8, dtype=torch.int64), "b": torch.zeros(1)}, tmp_path / "ab.safetensors")
    for dataset in (
        str(tmp_path / "good.TXT"),
        good,
        "self",
        "arithmetic",
        "arithmetic:heldout",
        "owner/name",
    ):
        check_dataset(dataset, tokenizer)
    for dataset, words in (
        (str(tmp_path / "bad.txt"), "is not UTF-8 text"),
        (f"{tmp_path}/ab.safetensors:c", "holds a, b; name one"),
        ("arithmetic:validation", "train, calibration, heldout"),
    ):
        with pytest.raises(CalibrationError, match=words):
            check_dataset(dataset, tokenizer)
    with pytest.raises(CalibrationError, match="line 1 must hold body"):
        check_dataset(good, tokenizer, text_key="body")


@pytest.mark.parametrize(
    "dataset",
    ["nothere.csv", "a/b/nothere", "./nothere", "/nothere", "~/x", "nothere.txt:train", "no such file"],
)
def test_what_looks_like_a_file_is_not_asked_of_the_hub(
    dataset: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: pytest.fail("asked"))
    for check in (check_dataset, functools.partial(load_windows, nsamples=2, seqlen=8)):
        with pytest.raises(CalibrationError, match=f"there is no file {dataset}"):
            check(dataset, tokenizer)


class Stream:
    """A streamed data set that breaks off."""

    def __init__(self, rows: int, error: Exception) -> None:
        self.rows, self.error = rows, error

    def shuffle(self, **options: Any) -> Stream:
        return self

    def __iter__(self) -> Iterator[dict[str, str]]:
        yield from [{"text": "words and words"}] * self.rows
        raise self.error


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (0, TimeoutError(), "can be reached (TimeoutError)"),
        (0, ConnectionError("no\nway"), "can be reached (ConnectionError: no)"),
        (1, ConnectionError("gone"), "some/name broke off after 1 rows (ConnectionError: gone)"),
        (3, TimeoutError(), "some/name broke off after 3 rows (TimeoutError)"),
    ],
)
def test_a_data_set_that_breaks_off(
    rows: int, error: Exception, words: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: Stream(rows, error))
    with pytest.raises(CalibrationError) as raised:
        load_windows("some/name", tokenizer, nsamples=20, seqlen=16)
    assert words in str(raised.value)


def test_rejects_names_and_models(tokenizer: Any, model: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text enough for a window")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("no-such-data-set", {}, "nor a data set that can be reached"),
        ("a:b:c:d", {}, "name:config:split"),
        ("arithmetic:validation", {}, "train, calibration, heldout"),
        ("self", {}, "no model was given"),
        (str(tmp_path / "a.txt"), {"tokenizer": None}, "has no tokenizer"),
    ]
    for dataset, options, words in cases:
        chosen = options.pop("tokenizer", tokenizer)
        with pytest.raises(CalibrationError) as raised:
            load_windows(dataset, chosen, nsamples=2, **({"seqlen": 8} | options))
        assert words in str(raised.value), f"{dataset}: {raised.value}"
    with pytest.raises(ConfigError, match="at most the model's 64 positions, got 65"):
        load_windows("self", tokenizer, nsamples=2, seqlen=65, model=model)
    with pytest.raises(ValueError, match="nsamples must be at least 1"):
        load_windows("self", tokenizer, nsamples=0, seqlen=8, model=model)
    with pytest.raises(ValueError, match="seqlen must be at least 2"):
        load_windows("self", tokenizer, nsamples=1, seqlen=1, model=model)


def test_shared_token_file(shared_dir: Path) -> None:
    """The rows of the shared model's token file arrive whole, none twice."""
    file = shared_dir / "models" / "stories260k" / "tokens.safetensors"
    windows = load_windows(f"{file}:heldout", None, nsamples=1000, seqlen=256)
    assert (len(windows), windows.tokens) == (256, 256 * 256)
    assert len({tuple(row) for row in windows.input_ids.tolist()}) == 256
