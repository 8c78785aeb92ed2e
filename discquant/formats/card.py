# SPDX-License-Identifier: Apache-2.0
"""The model card (README.md) of an exported model, as the hub expects it: front matter, KL table, recipe, hashes.

It says what discquant did: rounded a model, converted a file, or refined one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from discquant.config import AS_LAID
from discquant.errors import CheckpointError, UnrepresentableError
from discquant.formats.checkpoint import read_json

CARD, MANIFEST, PROOF = "README.md", "discquant_manifest.json", "discquant_proof.json"
# What `discquant rotate` says of a model that it wrote; goes along with everything made from that.
ROTATION = "discquant_rotation.json"
FEW_RULES = 8  # grids of single layers that a card shows; a manifest has all
# The hub takes every folder with a config.json for transformers unless its card names another library.
LIBRARIES = {"mlx": "mlx", "gguf": "gguf", "onnx": "onnx"}
_PROJECT = "[discquant](https://arxiv.org/abs/2501.06417)"
_COLUMNS = (
    ("KL mean", "kl_mean", "{:.5f}"),
    ("± s.e.", "kl_stderr", "{:.5f}"),
    ("KL median", "kl_median", "{:.5f}"),
    ("KL 99.9 %", "kl_p999", "{:.4f}"),
    ("KL max", "kl_max", "{:.4f}"),
    ("same top token", "top1", "{:.4f}"),
    ("perplexity ratio", "perplexity_ratio", "{:.4f}"),
)


def write_card(folder: Path, source: Path | None = None, summary: Mapping[str, Any] | None = None) -> None:
    """Write the card of an exported or refined folder from its manifest, proof and the run's summary.

    Args:
        folder: Holds the manifest.
        source: The original model; its own card gives licence and language, else that of a refined file does.
        summary: summary.json of the run; None says that nothing was measured.

    Raises:
        CheckpointError: Manifest or configuration cannot be read.
        UnrepresentableError: No layer is quantized.
    """
    from huggingface_hub import ModelCard, ModelCardData

    manifest = read_json(folder / MANIFEST)
    if manifest.get("bits_per_weight", 0) is None:
        raise UnrepresentableError("export: no quantized layer was given: the original serves as it is")
    places = [place / "config.json" for place in (folder, source) if place is not None]
    config = next((read_json(place) for place in places if place.is_file()), {})
    proof = read_json(folder / PROOF) if (folder / PROOF).exists() else None
    taken = manifest.get("refined_from") or {}
    taken_over = inherited(source and source / CARD) or inherited(
        taken.get("card") and folder / taken["card"]
    )
    origin = manifest["source"]
    base = origin.get("hub")
    scheme = _scheme(manifest)
    data = ModelCardData(
        license=taken_over.get("license"),
        license_name=taken_over.get("license_name"),
        license_link=taken_over.get("license_link"),
        language=taken_over.get("language"),
        library_name=LIBRARIES.get(manifest["format"], "transformers"),
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation="quantized" if base else None,
        tags=_tags(manifest),
    )
    lines = [
        f"# {origin['name']}, {scheme}, {manifest['format']}{', refined' if taken else ''}",
        "",
        *(_refined(manifest, base) if taken else _written(manifest, base, scheme)),
        f"{manifest['bits_per_weight']:.3f} bits per quantized weight, {manifest['weight_file_bytes']:,} bytes of "
        "weights in all.",
        "",
        *_measured(summary, bool(origin.get("rotated"))),
        *_engines(manifest),
        *_recipe(manifest),
        *_hashes(manifest, proof),
    ]
    architecture = (config.get("architectures") or ["model"])[0]
    lines += ["", f"Architecture: `{architecture}`."]
    text = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"))
    temporary = folder / f".{CARD}.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / CARD)


def hub_name(path: Path) -> str | None:
    """`owner/name` of a folder in the hub's cache, None elsewhere."""
    for parent in path.absolute().parents:
        found = re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", parent.name)
        if found:
            return f"{found[1]}/{found[2]}"
    return None


def read_rotation(path: Path) -> dict[str, Any] | None:
    """What `discquant rotate` says of a folder that it wrote, None of any other.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = path / ROTATION
    if not file.is_file():
        return None
    found = read_json(file)
    source = found.get("source")
    kinds: dict[str, tuple[type, ...]] = {
        "name": (str,), "sha256": (str,), "hub": (str, type(None)), "revision": (str, type(None)),
    }  # fmt: skip
    if (
        type(found.get("seed")) is not int
        or not isinstance(source, dict)
        or not all(key in source and isinstance(source[key], kind) for key, kind in kinds.items())
    ):
        raise CheckpointError(f"{file} does not name the model that was rotated, or the seed")
    return found


def origin_of(path: Path, sha256: str) -> dict[str, Any]:
    """The manifest's entry `source`, which names the original model; of a rotated one, what it was made from.

    Args:
        path: Its folder.
        sha256: Of its tensors, see `Checkpoint.sha256`.
    """
    rotation = read_rotation(path)
    if rotation is not None:
        first = rotation["source"]
        return {**first, "sha256": sha256, "rotated": {"seed": rotation["seed"], "sha256": first["sha256"]}}
    hub, folder = hub_name(path), path.resolve().name
    return {
        "name": (hub or folder).rpartition("/")[2],
        "hub": hub,
        # Folders of the hub's cache bear the commit as their name.
        "revision": folder if re.fullmatch(r"[0-9a-f]{40}", folder) else None,
        "sha256": sha256,
    }


def inherited(card: Path | None) -> dict[str, Any]:
    """Licence and language from another card; nothing where there is none that can be read."""
    if not card or not card.is_file():
        return {}
    from huggingface_hub import ModelCard

    try:
        text = card.read_text(encoding="utf-8")
        if not text.lstrip().startswith("---"):  # no metadata, which the parser would warn of
            return {}
        data = ModelCard(text, ignore_metadata_errors=True).data
    except Exception:  # somebody else's card and a foreign parser: without it only a courtesy is lost
        return {}
    found = {key: getattr(data, key, None) for key in ("license", "license_name", "license_link", "language")}
    return {key: value for key, value in found.items() if value}


def _scheme(manifest: Mapping[str, Any]) -> str:
    kinds: dict[str, None] = {}
    for row in manifest["layers"].values():
        name = f"{row['kind']}{row['num_bits']}" if row["kind"] in ("int", "affine") else row["kind"]
        size = "per row" if row["group_size"] == -1 else f"group {row['group_size']}"
        kinds[f"{name} {size} {'symmetric' if row['symmetric'] else 'asymmetric'}"] = None
    return " and ".join(kinds) or "no layers"


def _tags(manifest: Mapping[str, Any]) -> list[str]:
    """What people filter by: that it is quantized, the format, widths, and kinds with a name of their own."""
    rows = manifest["layers"].values()
    kinds = {row["kind"].lower() for row in rows} - {"int", "affine"}
    bits = {row["num_bits"] for row in rows}
    tags = ["discquant", "quantized", manifest["format"], *(f"{number}-bit" for number in sorted(bits))]
    return [*tags, *sorted(kinds)]


def _origin(manifest: Mapping[str, Any], base: str | None) -> str:
    """The original as a card's sentences name it."""
    source = manifest["source"]
    rotated = f" (rotated, seed {source['rotated']['seed']})" if source.get("rotated") else ""
    return f"`{base or source['name']}`{rotated}"


def _written(manifest: Mapping[str, Any], base: str | None, scheme: str) -> list[str]:
    """What an exported folder is."""
    recipe, count = manifest["recipe"], f"{manifest['quantized_weights']:,}"
    origin = _origin(manifest, base)
    # GGUF widens vectors to float32, and reorders rows.
    whose = "rotated model" if manifest["source"].get("rotated") else "original"
    rest = f"has the {whose}'s values" if manifest["format"] == "gguf" else f"is the {whose}'s, byte for byte"
    converted, taken = recipe.get("converted_from"), recipe.get("refined_from")
    if converted:
        return [
            f"{origin} quantized, converted from `{converted['name']}` ({converted['format']}) to "
            f"{manifest['format']} by {_PROJECT}: the codes of its {count} quantized weights ({scheme}) are that "
            f"file's, none was chosen anew. Everything else {rest}.",
        ]
    method = f", method {recipe['method']}," if recipe.get("method") else ""
    grid = f" on the grid of `{taken['name']}` ({taken['format']}):" if taken else " to"
    return [
        f"{count} weights of {origin} rounded by {_PROJECT}{method}{grid} {scheme}. Everything else {rest}."
    ]


def _refined(manifest: Mapping[str, Any], base: str | None) -> list[str]:
    """What a refined folder is, and what changed."""
    taken, found, diff = manifest["refined_from"], manifest["refine"], manifest["byte_diff"]
    origin, method = _origin(manifest, base), manifest["recipe"]["method"]
    file = f"`{taken['name']}` ({taken['format']}), made from {origin}"
    if found["improved"]:
        lines = [
            f"{file}, refined by {_PROJECT}, method {method}: the file's scales, zero points and layout are kept, and "
            f"{found['codes_changed']:,} of {found['codes']:,} codes were chosen anew. KL(original || quantized) on "
            f"held-out text: {found['kl_before']:.5f} before, {found['kl_after']:.5f} after "
            f"({found['kl_ratio']:.2f} of it).",
        ]
    else:
        kept = "-" if found["kl_before"] is None else f"{found['kl_before']:.5f}"
        lines = [
            f"{file}. {_PROJECT}, method {method}, found no codes that are better on held-out text (KL {kept}), so "
            "that all codes are the file's own.",
        ]
    lines.append(
        f"{diff['changed']:,} of {diff['code_bytes']:,} bytes of codes differ from that file, and "
        f"{diff['outside']} bytes elsewhere in the weights."
    )
    if taken.get("card"):
        lines.append(f"Its own card: [{taken['card']}]({taken['card']}).")
    return lines


def _measured(summary: Mapping[str, Any] | None, rotated: bool) -> list[str]:
    if not summary or not summary.get("methods"):
        return ["Divergence from the original was not measured for this file.", ""]
    held = summary["held_out"]
    # What is lost by rounding the rotated weights to their own dtype is not in these figures.
    whose = "rotated model" if rotated else "original"
    moved = AS_LAID in summary["methods"]
    grid = "on one grid, whose scales DiscQuant then moved" if moved else "the same grid"
    lines = [
        f"## Divergence from the {whose}\n",
        f"Held-out text: {held['source']}, {held['tokens']:,} tokens. KL({whose} || quantized) of "
        f"the next-token distribution, in nats; all methods on the same text and {grid}.\n",
        "| method | " + " | ".join(title for title, _, _ in _COLUMNS) + " |",
        "|---|" + "---:|" * len(_COLUMNS),
    ]
    rejected = (summary.get("refine") or {}).get("rejected")
    for method, found in summary["methods"].items():
        cells = ["n/a" if found.get(key) is None else shape.format(found[key]) for _, key, shape in _COLUMNS]
        mark = "**" if method == summary.get("method") else ""
        label = f"{method} (rejected)" if method == rejected else method
        lines.append(f"| {mark}{label}{mark} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _engines(manifest: Mapping[str, Any]) -> list[str]:
    rows = manifest.get("engines") or []
    lines = ["## Engines", ""]
    if not rows:
        return [*lines, "No engine is known to serve this grid in this format.", ""]
    lines += [
        f"As of {rows[0]['as_of']}; not all of it was tried with this file.",
        "",
        "| engine | serves it | note |",
        "|---|---|---|",
    ]
    lines += [f"| {row['engine']} | {row['verdict']} | {row['note']} |" for row in rows]
    requires = ", ".join(f"{name} >= {version}" for name, version in manifest["requires"].items() if version)
    if requires:
        lines += ["", f"Needs {requires}."]
    lines += ["", *(f"- {warning}" for warning in manifest.get("warnings", []))]
    return [*lines, ""]


def _recipe(manifest: Mapping[str, Any]) -> list[str]:
    recipe = manifest["recipe"]
    seed, rules = recipe.get("seed"), recipe.get("layers") or ()
    if len(rules) > FEW_RULES:
        recipe = {**recipe, "layers": f"{len(rules)} rules: {MANIFEST} has them"}
    text = json.dumps(recipe, indent=1, ensure_ascii=False)
    said = [] if seed is None else [f"Seed {seed}.", ""]
    return ["## Recipe", "", *said, "```json", text, "```", ""]


def _hashes(manifest: Mapping[str, Any], proof: Mapping[str, Any] | None) -> list[str]:
    origin = manifest["source"]
    lines = ["## Hashes", "", f"- original weights: `{origin['sha256']}`"]
    if origin.get("rotated"):
        lines[-1:] = [
            f"- original weights: `{origin['rotated']['sha256']}`",
            f"- rotated weights: `{origin['sha256']}`",
        ]
    if origin.get("revision"):
        lines.append(f"- original revision: `{origin['revision']}`")
    recipe = manifest["recipe"]
    taken = manifest.get("refined_from") or recipe.get("refined_from") or recipe.get("converted_from") or {}
    lines += [f"- {name} of `{taken['name']}`: `{sha}`" for name, sha in taken.get("files", {}).items()]
    lines += [f"- {name}: `{row['sha256']}`" for name, row in manifest["shards"].items()]
    if proof is not None:
        lines += ["", f"Proof, re-read from disk: {proof['result']} ({proof['weights']:,} weights)."]
    return lines
