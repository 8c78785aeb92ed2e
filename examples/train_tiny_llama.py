# SPDX-License-Identifier: Apache-2.0
"""Train the bundled model, `examples/tiny_llama`: arithmetic word problems and Python's standard library.

Run it again to continue an interrupted training; the same settings continue from the last checkpoint.
It ends with the model, `examples/results/tiny_llama_training.json` and the README that quotes it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from discquant.calibration.arithmetic import (
    END,
    Problem,
    calibration_documents,
    document,
    extract_answer,
    problems,
    prompt,
    stdlib_text,
)

HERE = Path(__file__).resolve().parent
PAD, BOS = "<pad>", "<s>"
IGNORED = -100


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is trained; a checkpoint continues only under the same, `steps` aside."""

    steps: int = 2000
    batch: int = 16
    window: int = 256
    warmup: int = 50
    decay_share: float = 0.3  # the last share of the steps, over which the learning rate falls to zero
    lr_matrices: float = 0.02  # Muon, on the matrices of the blocks
    lr_rest: float = 0.003  # AdamW, on embedding, head and norms
    weight_decay: float = 0.05
    text_windows: float = 0.08  # share of windows of text alone; text also fills what problems leave
    prompt_weight: float = 0.3  # weight in the loss of tokens that cannot be calculated, only guessed
    vocabulary: int = 1024
    hidden: int = 256
    intermediate: int = 640
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    seed: int = 0


def make_tokenizer(settings: Settings) -> Tokenizer:
    """A byte-level BPE tokenizer, trained on the mix, in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[PAD, BOS, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # 3,000 documents: the merges no longer change with more, and the training takes a second.
    mix = (text.removesuffix(END) for text in calibration_documents("train", 3000, settings.seed))
    tokenizer.train_from_iterator(mix, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def make_model(settings: Settings) -> LlamaForCausalLM:
    """The untrained model, float32, from the seed."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=2 * settings.window,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


class Windows:
    """Batches of windows, each a function of the seed and the step alone, so that a resumed run sees the same."""

    def __init__(self, tokenizer: Tokenizer, settings: Settings) -> None:
        """Tokenize the text once; problems are generated per step and never come twice by design."""
        self.tokenizer, self.settings = tokenizer, settings
        self.texts = [encoding.ids for encoding in tokenizer.encode_batch(stdlib_text("train"))]
        self.problem_tokens = self.text_tokens = 0

    def _text(self, rng: random.Random, length: int) -> list[int]:
        """`length` tokens of text from the start of a random document on."""
        ids: list[int] = []
        index = rng.randrange(len(self.texts))
        while len(ids) < length:
            ids += self.texts[index % len(self.texts)]
            index += 1
        return ids[:length]

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the windows of one step.

        Args:
            step: Counts from 0.

        Returns:
            ids: int64 [batch, window].
            weights: float32 [batch, window], each token's weight in the loss.
        """
        settings = self.settings
        rng = random.Random(f"{settings.seed}:{step}")
        needed = settings.batch * settings.window // 48 + 1  # more than fit: a problem has at least 55 tokens
        stories = problems("train", needed, seed=1_000_000 * (settings.seed + 1) + step)
        prompts = self.tokenizer.encode_batch([prompt(story) for story in stories])
        wholes = self.tokenizer.encode_batch([document(story) for story in stories])
        pairs = zip(prompts, wholes, strict=True)
        rows, weights = [], []
        pending: tuple[list[int], list[float]] | None = None
        for _ in range(settings.batch):
            row: list[int] = []
            weight: list[float] = []
            while rng.random() >= settings.text_windows or row:
                if pending is None:
                    head, whole = next(pairs)
                    solution = len(whole.ids) - len(head.ids)
                    pending = (whole.ids, [settings.prompt_weight] * len(head.ids) + [1.0] * solution)
                if len(row) + len(pending[0]) > settings.window:
                    break
                row, weight, pending = row + pending[0], weight + pending[1], None
            self.problem_tokens += len(row)
            rest = settings.window - len(row)
            self.text_tokens += rest
            rows.append(row + self._text(rng, rest))
            weights.append(weight + [settings.prompt_weight] * rest)
        return torch.tensor(rows), torch.tensor(weights)


def exact_match(
    model: LlamaForCausalLM, tokenizer: Tokenizer, stories: list[Problem], batch: int = 50
) -> float:
    """Share of problems whose final answer is right under greedy decoding, padded on the left.

    Args:
        model: On the CPU, any float dtype.
        tokenizer: The model's own.
        stories: The problems.
        batch: How many are decoded at once.

    Returns:
        The share, 0 to 1.
    """
    right = 0
    # Sorted by length, a batch holds next to no padding.
    encoded = sorted(
        ((tokenizer.encode(prompt(story)).ids, story) for story in stories), key=lambda pair: len(pair[0])
    )
    for start in range(0, len(encoded), batch):
        part = encoded[start : start + batch]
        width = max(len(ids) for ids, _ in part)
        ids = torch.tensor([[0] * (width - len(row)) + row for row, _ in part])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row, _ in part])
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=192, do_sample=False,
                             pad_token_id=0, eos_token_id=2)  # fmt: skip
        for row, (_, story) in zip(out[:, width:].tolist(), part, strict=True):
            right += extract_answer(tokenizer.decode(row)) == story.answer
    return right / len(stories)


def learning_rate(step: int, settings: Settings) -> float:
    """Warm-up, plateau, linear decay to zero: the factor on both learning rates."""
    decay = settings.decay_share * settings.steps
    return min(1.0, (step + 1) / settings.warmup, (settings.steps - step) / decay)


def losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token of [batch, window] but the first, in nats; the matrix products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return flat.view(ids.shape[0], -1)


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path, settings: Settings) -> None:
    """Write the model as `save_pretrained` lays it out: bfloat16 safetensors, configuration, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(model.config.to_json_string(use_diff=False))
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
            "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
            "attention_bias", "attention_dropout", "mlp_bias", "tie_word_embeddings", "use_cache", "pad_token_id",
            "bos_token_id", "eos_token_id")  # fmt: skip
    rope = config.get("rope_parameters") or {}
    # Both names of the dtype and of the rope base: transformers 4 and the engines read the older ones.
    plain = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
             "torch_dtype": "bfloat16", "rope_theta": rope.get("rope_theta", 10000.0)}  # fmt: skip
    files: dict[str, dict[str, Any]] = {
        "config.json": plain | {name: config[name] for name in kept},
        "generation_config.json": {
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "do_sample": False,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": END,
            "pad_token": PAD,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2 * settings.window,
        },
        "special_tokens_map.json": {"bos_token": BOS, "eos_token": END, "pad_token": PAD},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def write_atomically(state: dict[str, Any], path: Path) -> None:
    """Save so that an interruption leaves the former checkpoint."""
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def train(settings: Settings, work: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Train, or continue, up to the last step; export at the end.

    Args:
        settings: What to train.
        work: Holds the checkpoint and the tokenizer of an unfinished training.
        folder: Where the model goes.
        threads: CPU threads.

    Returns:
        The record of the training.

    Raises:
        ValueError: `work` holds a training under other settings.
    """
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer.json").exists():
        make_tokenizer(settings).save(str(work / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    model, windows = make_model(settings), Windows(tokenizer, settings)
    named = dict(model.named_parameters())
    matrices = [weight for name, weight in named.items() if weight.ndim == 2 and ".layers." in name]
    rest = [weight for name, weight in named.items() if weight.ndim != 2 or ".layers." not in name]
    optimizers = [
        (
            torch.optim.Muon(matrices, lr=settings.lr_matrices, weight_decay=settings.weight_decay),
            settings.lr_matrices,
        ),
        (torch.optim.AdamW(rest, lr=settings.lr_rest, betas=(0.9, 0.95), weight_decay=0.0), settings.lr_rest),
    ]
    first, wall, history = 0, 0.0, []
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if {**state["settings"], "steps": 0} != {**asdict(settings), "steps": 0}:
            raise ValueError(f"{checkpoint} belongs to other settings; choose another --work or delete it")
        model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, wall, history = state["step"], state["wall"], state["history"]
        windows.problem_tokens, windows.text_tokens = state["tokens"]
    probe = problems("train", 50, seed=999)
    began = saved_at = time.monotonic()
    running: list[tuple[float, float, float]] = []
    for step in range(first, settings.steps):
        factor = learning_rate(step, settings)
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * factor
        ids, weights = windows.batch(step)
        each = losses(model, ids)
        weights = weights[:, 1:]
        loss = (each * weights).sum() / weights.sum()
        loss.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        worked = weights == 1.0
        running.append((loss.item(), each[worked].mean().item(), each[~worked].mean().item()))
        last = step + 1 == settings.steps
        if (step + 1) % 25 == 0 or last:
            means = [sum(column) / len(running) for column in zip(*running, strict=True)]
            running = []
            row: dict[str, Any] = {"step": step + 1, "wall_seconds": round(wall + time.monotonic() - began, 1),
                   "loss": round(means[0], 4), "loss_solutions": round(means[1], 4),
                   "loss_rest": round(means[2], 4), "lr_factor": round(factor, 3)}  # fmt: skip
            if (step + 1) % 200 == 0 or last:
                row["exact_match_train_generator"] = exact_match(model, tokenizer, probe)
            history.append(row)
            print(json.dumps(row), flush=True)
        if last or time.monotonic() - saved_at > 90:
            saved_at = time.monotonic()
            write_atomically(
                {"settings": asdict(settings), "model": model.state_dict(), "step": step + 1, "history": history,
                 "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
                 "wall": wall + time.monotonic() - began,
                 "tokens": [windows.problem_tokens, windows.text_tokens]}, checkpoint)  # fmt: skip
    export(model, tokenizer, folder, settings)
    return {
        "settings": asdict(settings),
        "weights": sum(weight.numel() for weight in named.values()),
        "steps": settings.steps,
        "tokens": settings.steps * settings.batch * settings.window,
        "problem_token_share": round(
            windows.problem_tokens / (windows.problem_tokens + windows.text_tokens), 3
        ),
        "wall_seconds": round(wall + time.monotonic() - began, 1),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "history": history,
    }


def judge(folder: Path, count: int) -> dict[str, float]:
    """Exact-match of the exported model on held-out problems, and its loss on the text that it never saw."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = list(
        itertools.chain.from_iterable(e.ids for e in tokenizer.encode_batch(stdlib_text("heldout")[:200]))
    )
    rows = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    with torch.no_grad():
        text = torch.cat([losses(model, part) for part in rows.split(32)]).mean().item()
    return {
        "heldout_problems": count,
        "heldout_exact_match": exact_match(model, tokenizer, problems("heldout", count)),
        "heldout_text_loss": round(text, 4),
    }


def readme(record: dict[str, Any]) -> str:
    """The README of the model's folder, every number out of the record of its training."""
    settings, final = record["settings"], record["history"][-1]
    example = problems("heldout", 1)[0]
    right = f"{100 * record['heldout_exact_match']:.1f} %"
    share, minutes = f"{100 * record['problem_token_share']:.0f} %", f"{record['wall_seconds'] / 60:.0f}"
    tokens = f"{record['tokens'] / 1e6:.1f} million"
    # A run that was continued under another number of steps has a decay that its settings alone do not tell.
    planned = [round(learning_rate(row["step"] - 1, Settings(**settings)), 3) for row in record["history"]]
    bent = [
        row["step"]
        for row, factor in zip(record["history"], planned, strict=True)
        if row["lr_factor"] != factor
    ]
    note = (
        f"This run was first planned longer: up to step {bent[-1]} its learning rate stayed higher than\n"
        "one uninterrupted run would have it (`lr_factor` in the record), so a new run differs a little.\n"
        if bent
        else ""
    )
    return f"""<!-- Written by examples/train_tiny_llama.py from examples/results/tiny_llama_training.json. -->
# tiny_llama

A Llama-architecture causal language model of {record["weights"]:,} weights that solves multi-step arithmetic word
problems with worked steps, and knows some Python. It exists to be quantized: one wrong digit spoils an answer,
so careless rounding shows at once.

| what | value |
|---|---|
| blocks, hidden, intermediate | {settings["layers"]}, {settings["hidden"]}, {settings["intermediate"]} |
| heads, key/value heads, of | {settings["heads"]}, {settings["kv_heads"]}, {settings["hidden"] // settings["heads"]} |
| vocabulary | {settings["vocabulary"]}, byte-level BPE, one token per digit, untied head |
| file | bfloat16 safetensors, {record["file_bytes"] / 1e6:.2f} MB |
| exact answers on {record["heldout_problems"]} held-out problems, greedy | {right} |
| loss on worked solutions at the end of training | {final["loss_solutions"]:.4f} nats per token |
| loss on held-out standard library text | {record["heldout_text_loss"]:.3f} nats per token |

## What it reads and writes

```
{prompt(example)}{example.solution}
```

The text up to and with `Answer:` and its line end is the prompt (the tokenizer puts `{BOS}` before it); the
rest is what the model writes, closed by `{END}`. `discquant.calibration.arithmetic` generates the problems.

## Training

{record["steps"]:,} steps of {settings["batch"]} windows of {settings["window"]} tokens: {tokens} tokens, of which
{share} are problems and the rest source and docstrings of Python's standard library.
It took {minutes} minutes on {record["threads"]} CPU threads (torch {record["torch"]}), other work running beside it.
Muon on the matrices, AdamW on the rest, seed {settings["seed"]}.
{note}To train it again, or to continue:

```
python examples/train_tiny_llama.py
```

## What is held out

A problem belongs to the split (train, calibration or heldout) that a hash of its question says, and a standard
library module to the one that a hash of its name says: no split shares a problem or a module with another.
The model has learned from the train split only.
"""


def main() -> None:
    """Parse the command line, train, judge, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=Settings.steps, help="training steps (default %(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tiny_llama_training"), help="for the checkpoint"
    )
    parser.add_argument("--out", type=Path, default=HERE / "tiny_llama", help="where the model goes")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "tiny_llama_training.json")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    parser.add_argument("--heldout", type=int, default=500, help="held-out problems to answer at the end")
    arguments = parser.parse_args()
    record = train(Settings(steps=arguments.steps), arguments.work, arguments.out, arguments.threads)
    record |= judge(arguments.out, arguments.heldout)
    record["file_bytes"] = (arguments.out / "model.safetensors").stat().st_size
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(record, indent=1) + "\n")
    (arguments.out / "README.md").write_text(readme(record))
    print(f"{record['weights']:,} weights, held-out exact-match {record['heldout_exact_match']:.3f}")


if __name__ == "__main__":
    main()
