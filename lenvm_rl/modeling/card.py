"""The model card of a length value model: what its values mean and where they come from, written beside the weights."""

import json
import math
from pathlib import Path

_MARK = "<!-- This card is written when the model is saved: delete this line to keep your own changes. -->"
# What transformers puts in the card of a model that it knows nothing about.
_GENERIC = "This model card has been automatically generated"
_PAPER = "arXiv [2604.27039](https://arxiv.org/abs/2604.27039)"
_USE = {
    "full": "model = LengthValueModel.from_pretrained({name!r})",
    "adapter": "model = LengthValueModel.from_pretrained({name!r}, base=policy)  # or a path; shared, not copied",
    "head": "model = LengthValueModel.from_pretrained({name!r}, base=policy)  # or a path; shared, not copied",
}
_HOLDS = {
    "full": "a decoder and a value head",
    "adapter": "a LoRA adapter and a value head, without the base model that they belong to",
    "head": "a value head alone, without the base model whose last hidden state it reads",
}


def model_card(config, name: str = "path/or/hub-id") -> str:
    """The text of a model card.

    Args:
        config ([`~lenvm_rl.modeling.length_value_model.LengthValueConfig`]):
            Everything in the card stands there.
        name (`str`, *optional*, defaults to `"path/or/hub-id"`):
            What the example loads.

    Returns:
        `str`: Markdown with a YAML header.
    """
    base = _base(config)
    header = ["library_name: transformers", "tags:", "- length-value-model"]
    header += [] if base is None else [f"base_model: {json.dumps(base)}"]
    parts = [
        "\n".join(["---", *header, "---"]),
        _MARK,
        "# Length value model",
        f"It says at every token how much of a completion is still to come ({_PAPER}). This repository holds "
        f"{_HOLDS[config.form]} (`form: {config.form}`), on a decoder of type `{config.backbone_config.model_type}`.",
        _meaning(config),
        _origin(config),
        *([_results(config.metrics)] if config.metrics else []),
        "## Use\n\n```python\nfrom lenvm_rl import LengthValueModel\n\n"
        f"{_USE[config.form].format(name=name)}\n"
        "output = model(input_ids, attention_mask=attention_mask)\noutput.values, output.logits  # (B, S)\n```\n",
    ]
    return "\n\n".join(parts)


def write_model_card(folder, config, name: str | None = None) -> None:
    """Write the card as `README.md`, unless somebody wrote one there by hand.

    Args:
        folder (`str` or `os.PathLike`): the saved model's.
        config ([`~lenvm_rl.modeling.length_value_model.LengthValueConfig`]): the model's.
        name (`str`, *optional*): what the card's example loads; by default the folder's name.
    """
    path = Path(folder) / "README.md"
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if _MARK not in text and _GENERIC not in text:
            return
    path.write_text(model_card(config, path.parent.name if name is None else name), encoding="utf-8")


def _base(config) -> str | None:
    # A folder of one's own machine would be taken for a hub id.
    name = config.backbone_config.name_or_path
    return name if name and name.count("/") == 1 and not name.startswith((".", "/", "~")) else None


def _meaning(config) -> str:
    gamma = config.gamma
    if gamma is None:
        return (
            "## What the values mean\n\nγ is not recorded. Without it they mean nothing, and the model does not load."
        )
    return (
        "## What the values mean\n\n"
        f"`V = -sigmoid(logit)` estimates the return `G = -(1 - γ^n)` with **γ = {gamma!r}**, where n tokens follow, "
        "the end of sequence counted.\n\n"
        "**Sign**: values are negative costs in (-1, 0). 0 is the end itself, -1 infinitely far from it; a higher "
        "value is a shorter rest. The rest in tokens is `n = -softplus(logit) / ln(γ)`; half of the range, V = -1/2, "
        f"is {math.log(0.5) / math.log(gamma):.0f} tokens."
    )


def _origin(config) -> str:
    share = config.truncated_share
    rows = [
        ("Generator (whose completions)", config.generator),
        ("Sampling", _settings(config.sampling)),
        ("γ fitted on", _settings(config.gamma_fit)),
        ("Truncated completions", None if share is None else f"{100 * share:.2f} %"),
        ("Tokenizer", _settings(config.tokenizer_fingerprint)),
    ]
    lines = [f"| {what} | {_cell(said)} |" for what, said in rows]
    return "\n".join(["## What it was fitted on", "", "| | |", "| --- | --- |", *lines])


def _settings(settings: dict | None) -> str | None:
    return ", ".join(f"{name} {_value(value)}" for name, value in settings.items()) if settings else None


def _value(value) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name}: {_value(each)}" for name, each in value.items()) + ")"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _cell(text: str | None) -> str:
    return "not recorded" if text is None else text.replace("|", "\\|").replace("\n", " ")


def _results(metrics: dict) -> str:
    """A table with a row for each metric and a column for each domain; `{name: number}` is one domain."""
    if not all(isinstance(each, dict) for each in metrics.values()):
        metrics = {"all": metrics}
    names = list(dict.fromkeys(name for numbers in metrics.values() for name in numbers))
    lines = [
        "| " + " | ".join([f"`{name}`", *(_cell(_number(numbers.get(name))) for numbers in metrics.values())]) + " |"
        for name in names
    ]
    heads = "| " + " | ".join(["metric", *map(_cell, metrics)]) + " |"
    return "\n".join(["## Results by domain", "", heads, "| --- " + "| ---: " * len(metrics) + "|", *lines])


def _number(value) -> str:
    return "–" if value is None else _value(value)
