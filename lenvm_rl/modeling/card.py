"""The model card of a length value model: what its values mean and where they come from, written beside the weights."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

if TYPE_CHECKING:
    from lenvm_rl.modeling.length_value_model import LengthValueConfig

_MARK = "<!-- This card is written when the model is saved: delete this line to keep your own changes. -->"
# What transformers puts in the card of a model that it knows nothing about.
_GENERIC = "This model card has been automatically generated"
_HOLDS = {
    "full": "a decoder and a value head",
    "adapter": "a LoRA adapter and a value head, without the base model that they belong to",
    "head": "a value head alone, without the base model whose last hidden state it reads",
}
_CARD = """---
{metadata}
---

{mark}

# Length value model

It says at every token how much of a completion is still to come (arXiv [2604.27039](https://arxiv.org/abs/2604.27039)).
This repository holds {holds} (`form: {form}`), on a decoder of type `{decoder}`.

## What the values mean

{meaning}

## What it was fitted on

{origin}

{results}## Use

```python
from lenvm_rl import LengthValueModel

model = LengthValueModel.from_pretrained({name!r}{base})
output = model(input_ids, attention_mask=attention_mask)
output.values, output.logits  # (B, S)
```
"""
_MEANING = (
    "`V = -sigmoid(logit)` estimates the return `G = -(1 - γ^n)` with **γ = {gamma!r}**, where n tokens follow, the "
    "end of sequence counted.\n\n**Sign**: values are negative costs in (-1, 0). 0 is the end itself, -1 infinitely "
    "far from it; a higher value is a shorter rest. The rest in tokens is `n = -softplus(logit) / ln(γ)`; half of the "
    "range, V = -1/2, is {half:.0f} tokens."
)


def model_card(config: LengthValueConfig, name: str = "path/or/hub-id") -> str:
    """The text of a model card, Markdown with a YAML header; everything in it stands in the config."""
    base, gamma, share = config.backbone_config.name_or_path, config.gamma, config.truncated_share
    # A folder of one's own machine would be taken for a hub id.
    is_hub_id = base and base.count("/") == 1 and not base.startswith((".", "/", "~"))
    metadata = ModelCardData(
        library_name="transformers", tags=["length-value-model"], base_model=base if is_hub_id else None
    )
    meaning = "γ is not recorded. Without it they mean nothing, and the model does not load."
    if gamma is not None:
        meaning = _MEANING.format(gamma=gamma, half=math.log(0.5) / math.log(gamma))
    origin = {
        "Generator (whose completions)": config.generator,
        "Sampling": config.sampling,
        "γ fitted on": config.gamma_fit,
        "Truncated completions": None if share is None else f"{100 * share:.2f} %",
        "Tokenizer": config.tokenizer_fingerprint,
    }
    return _CARD.format(
        metadata=metadata.to_yaml(),
        mark=_MARK,
        holds=_HOLDS[config.form],
        form=config.form,
        decoder=config.backbone_config.model_type,
        meaning=meaning,
        origin=_table([["", ""], *([what, _said(said, "not recorded")] for what, said in origin.items())]),
        results=_results(config.metrics) if config.metrics else "",
        name=name,
        base="" if config.form == "full" else ", base=policy",
    )


def write_model_card(folder: str | os.PathLike, config: LengthValueConfig, name: str | None = None) -> None:
    """Write the card as `README.md`, unless somebody wrote one there by hand."""
    path = Path(folder) / "README.md"
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if _MARK not in text and _GENERIC not in text:
            return
    path.write_text(model_card(config, path.parent.name if name is None else name), encoding="utf-8")


def _results(metrics: dict) -> str:
    """A table with a row for each metric and a column for each domain; `{name: number}` is one domain."""
    if not all(isinstance(each, dict) for each in metrics.values()):
        metrics = {"all": metrics}
    names = dict.fromkeys(name for numbers in metrics.values() for name in numbers)
    rows = [[f"`{name}`", *(_said(numbers.get(name), "–") for numbers in metrics.values())] for name in names]
    return "## Results by domain\n\n" + _table([["metric", *metrics], *rows], " ---: |") + "\n\n"


def _table(rows: list[list[str]], column: str = " --- |") -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- |" + column * (len(rows[0]) - 1), *lines[1:]])


def _said(value: Any, unknown: str = "None", between: str = " ") -> str:
    """A setting as text: a number, or names with what they say, nested ones in brackets."""
    if value is None or value == {}:
        return unknown
    if isinstance(value, dict):
        said = {name: _said(each, between=": ") for name, each in value.items()}
        nested = {name: f"({text})" if isinstance(value[name], dict) else text for name, text in said.items()}
        return ", ".join(f"{name}{between}{text}" for name, text in nested.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)
