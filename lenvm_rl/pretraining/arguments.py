"""Settings of value pretraining."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from lenvm_rl.modeling.sharing import FORMS, FULL
from lenvm_rl.pretraining.batches import TRUNCATED_ENDINGS
from lenvm_rl.returns import check_gamma


@dataclass
class LengthValueTrainingArguments(TrainingArguments):
    """Arguments of value pretraining: everything of `transformers.TrainingArguments`, and how lengths become targets.

    The defaults of learning rate, schedule and epochs are the paper's (arXiv 2604.27039, section 5); tiny models want a
    learning rate near 1e-3.
    """

    _argument_group_name = "Value pretraining"

    learning_rate: float = HfArg(default=2e-5, help="The initial learning rate.")
    lr_scheduler_type: str = HfArg(default="cosine", help="The learning rate schedule.")
    num_train_epochs: float = HfArg(default=2.0, help="Passes over the rollouts.")
    form: str = HfArg(
        default=FULL,
        help="What is trained: full, a decoder of its own and a head; adapter, LoRA and a head on the frozen backbone; "
        "head, the head alone. The last two are small and hold no decoder: whoever reads them names the backbone again "
        "(--base), and a run that trains a policy shares the one it has.",
        metadata={"choices": list(FORMS)},
    )
    layers: list[int] | None = HfArg(
        default=None,
        help="For a head alone: the layers of the backbone that it reads, side by side, e.g. 10 20 -1; 0 is the "
        "embeddings, -1 the last layer. Default: the last alone, which a run that trains a policy can read off the "
        "reference's forward; with others it makes a forward of its own.",
    )
    frozen_dtype: str = HfArg(
        default="float32",
        help="Dtype of the frozen backbone of the forms adapter and head, in which it is loaded from a path. What "
        "learns is float32 in any case.",
        metadata={"choices": ["float32", "bfloat16"]},
    )
    cache_hidden_states: bool = HfArg(
        default=True,
        help="For a head alone: compute what the frozen backbone says once, and keep it in output_dir until the model "
        "is saved, twice the hidden size in bytes for each token; an epoch then takes seconds. Off, each epoch runs "
        "the backbone.",
    )
    gamma: float | None = HfArg(
        default=None,
        help="Discount of the length return, in (0, 1). If omitted, it is fitted to the rollouts, so that the "
        "gamma_quantile of their lengths has a return of minus gamma_coverage.",
    )
    gamma_quantile: float = HfArg(default=0.99, help="Which quantile of the lengths gamma is fitted to.")
    gamma_coverage: float = HfArg(default=0.99, help="Magnitude of the return at that quantile.")
    lam: float = HfArg(default=1.0, help="Lambda of the lambda-returns, in [0, 1]; 1 is plain Monte Carlo returns.")
    truncated: str = HfArg(
        default="bootstrap",
        help="What a truncated completion is taken for. bootstrap: cut, worth what the model says at the cut; "
        "drop: left out of the fit; infinite: endless, worth -1; finished: ended at the cut (biased, for comparison "
        "only).",
        metadata={"choices": list(TRUNCATED_ENDINGS)},
    )
    only_correct: bool = HfArg(default=False, help="Fit only on completions whose column `correct` is true.")
    domain_column: str | None = HfArg(
        default=None,
        help="Column of the rollouts that names each prompt's domain: the metrics of the evaluation are then "
        "given for each domain, too, and stand in the model card.",
    )
    packing: bool = HfArg(
        default=True,
        help="Put several short sequences in one row instead of padding each. Turn it off for a backbone that "
        "does not keep packed sequences apart (an error says so): sequences of an optimizer step are then sorted "
        "into micro-batches by their length.",
    )
    row_length: int | None = HfArg(
        default=None,
        help="Most tokens in a packed row. If omitted: the longest sequence of the micro-batch, or twice that "
        "(twice that with share_prompts).",
    )
    share_prompts: bool = HfArg(
        default=False,
        help="Compute a prompt once for several of its completions, for prompts that are long beside their "
        "completions (`python -m eval.speed pretraining --help` measures it). Optimizer steps are then made of "
        "whole prompts drawn at random, not of completions: give a batch size that holds all of a prompt's. "
        "Llama, Qwen2 and Qwen3, with the attention sdpa or eager.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share_prompts and not self.packing:
            raise ValueError("share_prompts=True puts completions in one row, so it needs packing=True.")
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}.")
        if self.truncated not in TRUNCATED_ENDINGS:
            raise ValueError(f"truncated must be one of {', '.join(TRUNCATED_ENDINGS)}, got {self.truncated!r}.")
        if not 0.0 <= self.lam <= 1.0:
            raise ValueError(f"lam must be in [0, 1], got {self.lam}.")
        if self.gamma is not None:
            check_gamma(self.gamma)
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise ValueError(f"{name}=True rounds the model for good, its float32 head as well: leave it out.")
        if not self.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices must stay true: the loss is a mean over all processes.")
        self.remove_unused_columns = False  # the collator needs columns that the model does not take
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every parameter takes part in every value


def check_precision(args: TrainingArguments, sharded: bool) -> None:
    """Raise a `ValueError` if FSDP or DeepSpeed would cast the float32 head to a smaller precision."""
    if sharded and (args.bf16 or args.fp16):
        raise ValueError(
            "FSDP and DeepSpeed cast all that they hold to the precision of training, the head of a length value model "
            "as well, which has to stay float32: set bf16=False and fp16=False, or launch with DDP."
        )
