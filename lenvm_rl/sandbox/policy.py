"""The sandbox's policy: a tiny Llama fitted to the teacher's completions, all styles alike at every difficulty."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from lenvm_rl.modeling.loading import load_policy
from lenvm_rl.pretraining.batches import pack_lengths
from lenvm_rl.sandbox.styles import Overthinking, draw_completion
from lenvm_rl.sandbox.task import DIFFICULTIES, sandbox_tokenizer, stream_problems

logger = logging.getLogger(__name__)

# Examples that are packed together; more fill the rows better, fewer start sooner.
PACKING_WINDOW = 512
# Positions are relative (RoPE), so room costs nothing.
MAX_POSITIONS = 8192
# Tokens of the shortest row of a fit.
LEAST_ROW = 256
# Start, label and operation of each step, question mark.
LONGEST_PROMPT = 2 + 2 * max(DIFFICULTIES)


@dataclass(frozen=True)
class PolicySettings:
    """Size of the policy, and of its fit to `train_tokens` tokens of teacher text, prompts and padding included.

    An optimizer step takes `batch_tokens` tokens in packed rows; `learning_rate` is the peak of a cosine schedule, and
    `seed` is the seed of the weights and of the teacher's text. `passes` and `repeats` say how much the teacher wastes,
    see [`~lenvm_rl.sandbox.styles.Overthinking`]. With `start`, the path of a policy of the sandbox, the fit goes on
    from that one: a policy that can do the task takes a fraction of the tokens to learn another habit.
    """

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    train_tokens: int = 4_000_000
    batch_tokens: int = 2048
    learning_rate: float = 3e-3
    seed: int = 0
    passes: float = Overthinking.passes
    repeats: int = Overthinking.repeats
    start: str | None = None

    @property
    def overthinking(self) -> Overthinking:
        """How much the teacher wastes."""
        return Overthinking(self.passes, self.repeats)

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row: the longest prompt and completion without detours, in whole batches of rows."""
        longest = self.overthinking.longest_completion + LONGEST_PROMPT
        return max(longest, self.batch_tokens // max(1, self.batch_tokens // max(LEAST_ROW, longest)))

    @property
    def batch_rows(self) -> int:
        """Rows of an optimizer step."""
        return max(1, self.batch_tokens // self.row_tokens)

    @property
    def steps(self) -> int:
        """Optimizer steps of the fit."""
        return max(1, self.train_tokens // (self.row_tokens * self.batch_rows))


def new_policy(settings: PolicySettings, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """An untrained policy. Weights start with a standard deviation of 0.1: at this width 0.02 learns far slower."""
    set_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=4 * settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            max_position_embeddings=MAX_POSITIONS,
            initializer_range=0.1,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


class TeacherRows(IterableDataset):
    """Endless packed rows of teacher text from the train split; the loss counts completion tokens only.

    Sequences of all lengths share a row, and rows are drawn in random order: batches of similar lengths under a
    token-mean loss would overweight short answers.
    """

    def __init__(self, settings: PolicySettings, tokenizer: PreTrainedTokenizerBase):
        self.settings, self.ids = settings, tokenizer.get_vocab()
        self.pad = tokenizer.pad_token_id

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rng = random.Random(self.settings.seed)
        problems = stream_problems(self.settings.seed, "train")
        while True:
            drawn = [next(problems) for _ in range(PACKING_WINDOW)]
            examples = [
                (problem.prompt.split(), draw_completion(rng, problem, self.settings.overthinking)) for problem in drawn
            ]
            # A completion with very many detours does not fit a row, and its text is not worth a longer one.
            examples = [(p, c) for p, c in examples if len(p) + len(c) <= self.settings.row_tokens]
            lengths = [len(prompt) + len(completion) for prompt, completion in examples]
            rows = pack_lengths(lengths, self.settings.row_tokens)
            rng.shuffle(rows)
            for row in rows:
                yield self._lay_out([examples[index] for index in row])

    def _lay_out(self, examples: list[tuple[list[str], list[str]]]) -> dict[str, torch.Tensor]:
        input_ids, labels, positions = [], [], []
        for prompt, completion in examples:
            input_ids += [self.ids[token] for token in (*prompt, *completion)]
            labels += [-100] * len(prompt) + [self.ids[token] for token in completion]
            positions += range(len(prompt) + len(completion))
        room = self.settings.row_tokens - len(input_ids)
        row = {
            "input_ids": input_ids + [self.pad] * room,
            "labels": labels + [-100] * room,
            "position_ids": [*positions, *range(room)],
        }
        return {name: torch.tensor(entries) for name, entries in row.items()}


class PackedTrainer(Trainer):
    """A `Trainer` whose forward takes no cache: transformers tells packed sequences apart only without one."""

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.compute_loss`."""
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)


def fit_policy(output_dir: str, settings: PolicySettings, **training_arguments: Any) -> LlamaForCausalLM:
    """Fit a policy to the teacher and save it with its tokenizer under `output_dir`; it is in evaluation mode.

    Args:
        output_dir (`str`): folder to write.
        settings ([`PolicySettings`]): sizes of the policy and of its fit.
        training_arguments: further fields of `transformers.TrainingArguments`, such as `use_cpu`.
    """
    tokenizer = sandbox_tokenizer()
    model = new_policy(settings, tokenizer) if settings.start is None else load_policy(settings.start).train()
    arguments = TrainingArguments(
        output_dir=output_dir,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_rows,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, settings.steps // 10),
        adam_beta2=0.98,
        weight_decay=0.0,
        logging_steps=max(1, settings.steps // 5),
        save_strategy="no",
        report_to="none",
        seed=settings.seed,
        **training_arguments,
    )
    trainer = PackedTrainer(model=model, args=arguments, train_dataset=TeacherRows(settings, tokenizer))
    trainer.train()
    model = trainer.model.eval()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return model
