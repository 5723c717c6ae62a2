"""What a run holds in memory and how long value pretraining computes, worked out from the sizes of a model.

Nothing is measured: weights are counted on a model without memory, by bytes for a parameter: 2 for a base in bfloat16
(`--dtype bfloat16` with adapters), 4 for what a run loads in float32, 16 for what it trains, in float32 with its
gradient and AdamW's two moments. Activations, the cache of sampling and vLLM's share come
on top. Time is floating-point operations over what a card does: for each parameter and token, 2 in a forward and 4 in a
backward; 2 in the backward of a frozen decoder under adapters, none of one under a head alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen2Config
from transformers.hf_argparser import HfArg

from eval.report import Column, print_table
from lenvm_rl.modeling.backbones import load_model
from lenvm_rl.modeling.heads import LengthValueHead
from lenvm_rl.modeling.sharing import lora_settings

# Bytes of a parameter. A length value model of form full is loaded as it was fitted, in float32, and the reference of a
# policy that is trained whole as that policy is.
FROZEN, FROZEN_FLOAT32, TRAINED = 2, 4, 16
# Width, layers, heads, heads of keys, width between, vocabulary, tied ends: as the configs of Qwen2.5 have them.
QWEN = {
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-7B": (3584, 28, 28, 4, 18944, 152064, False),
    "Qwen2.5-32B": (5120, 64, 40, 8, 27648, 152064, False),
}


@dataclass
class MemoryArguments:
    """Which model, and what the card does."""

    model: str | None = HfArg(
        default=None, help="A model, folder or hub id; its config alone is read. Default: three sizes of Qwen2.5."
    )
    completions: int = HfArg(default=4096, help="Completions that a length value model is fitted on.")
    tokens: int = HfArg(default=1000, help="Tokens of a completion with its prompt, on average.")
    epochs: float = HfArg(default=2.0, help="Passes over them.")
    teraflops: float = HfArg(
        default=400.0,
        help="What a card computes, in 10^12 operations a second: about 0.4 of an H100's 989 in bfloat16.",
    )


def qwen_config(name: str) -> PretrainedConfig:
    """A config of one of [`QWEN`]."""
    width, layers, heads, key_heads, between, vocabulary, tied = QWEN[name]
    return Qwen2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=between,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters.

    Args:
        policy (`int`): with its language-model head.
        decoder (`int`): without it.
        adapters (`int`): of LoRA as this project makes it for a length value model.
        head (`int`): of a length value model.
    """

    policy: int
    decoder: int
    adapters: int
    head: int


def count_parameters(config: PretrainedConfig) -> ParameterCounts:
    """Parameters of a policy of a config, and of what a length value model puts on its decoder."""
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(config)
        head = LengthValueHead(config.hidden_size)
    decoder = policy.base_model
    rank = lora_settings()["r"]
    layers = [layer for layer in decoder.modules() if isinstance(layer, nn.Linear)]
    adapters = sum(rank * (layer.in_features + layer.out_features) for layer in layers)
    policy_size, *others = (sum(each.numel() for each in part.parameters()) for part in (policy, decoder, head))
    return ParameterCounts(policy_size, others[0], adapters, others[1])


def training_memory(n: ParameterCounts) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer in a run of PPO or GRPO, by what it trains and how it values length."""
    adapted = FROZEN * n.policy + TRAINED * n.adapters
    whole = (TRAINED + FROZEN_FLOAT32) * n.policy
    values = {
        "head": FROZEN_FLOAT32 * n.head,
        "adapter": FROZEN_FLOAT32 * (n.adapters + n.head),
        "full": FROZEN_FLOAT32 * (n.decoder + n.head),
    }
    return {
        "adapters, without a length value model": adapted,
        **{f"adapters, length value model of form {form}": adapted + own for form, own in values.items()},
        "whole policy and a reference, form full": whole + values["full"],
        "the same, and a learned critic of its size": whole + values["full"] + TRAINED * (n.decoder + n.head),
    }


def pretraining_costs(n: ParameterCounts) -> dict[str, tuple[int, int, int]]:
    """For each form of a length value model, bytes while it is fitted, and operations for a token: once, and in each
    epoch. Under a head alone the decoder is run once (`cache_hidden_states`)."""
    adapted = n.adapters + n.head
    return {
        "head": (FROZEN * n.decoder + TRAINED * n.head, 2 * n.decoder, 6 * n.head),
        "adapter": (FROZEN * n.decoder + TRAINED * adapted, 0, 4 * n.decoder + 6 * adapted),
        "full": (TRAINED * (n.decoder + n.head), 0, 6 * (n.decoder + n.head)),
    }


def main(args: MemoryArguments) -> None:
    """Prints both tables."""
    if args.model is None:
        configs = {name: qwen_config(name) for name in QWEN}
    else:
        configs = {args.model: load_model(AutoConfig.from_pretrained, args.model).get_text_config()}
    counts = {name: count_parameters(config) for name, config in configs.items()}
    training = {name: training_memory(each) for name, each in counts.items()}
    fitting = {name: pretraining_costs(each) for name, each in counts.items()}
    first = next(iter(counts))
    console = Console(width=140, highlight=False)
    rows: list[dict[str, Any]] = [
        {"what": what, **{name: float(each[what]) for name, each in training.items()}} for what in training[first]
    ]
    title = "weights, gradients and optimizer, computed"
    columns = [Column(name, name, 1, scale=2.0**-30) for name in counts]
    print_table(console, rows, [Column("training, GiB", "what"), *columns], title)
    tokens = args.completions * args.tokens
    rows = []
    for form in fitting[first]:
        memory = {name: each[form][0] / 2**30 for name, each in fitting.items()}
        operations = {name: each[form][1] + each[form][2] * args.epochs for name, each in fitting.items()}
        minutes = {name: each * tokens / (args.teraflops * 1e12) / 60 for name, each in operations.items()}
        rows.append({"form": form, **{name: f"{memory[name]:.1f} GiB, {minutes[name]:.1f} min" for name in counts}})
    title = (
        f"value pretraining on {args.completions} completions of {args.tokens} tokens, {args.epochs:g} epochs, computed"
    )
    print_table(console, rows, [Column("form", "form"), *(Column(name, name) for name in counts)], title)
