"""GRPO with the length stream of a frozen length value model, and with potential-based shaping."""

from __future__ import annotations

import torch
from trl import GRPOTrainer

from lenvm_rl.trainers.base import LENVM_CITATION, LenVMTrainer
from lenvm_rl.trainers.config import LenVMGRPOConfig
from lenvm_rl.trainers.streams import Batch, Streams, length_stream, shaping_advantage, with_length_stream


def grpo_streams(args: LenVMGRPOConfig, batch: Batch) -> Streams:
    """``A_t = A_task + length_coef * A_len,t + shaping_coef * A_shaping,t`` (arXiv 2604.27039, appendices C.2, C.3)."""
    task = torch.where(batch.completions.actions, batch.relative.unsqueeze(1), 0.0)
    if args.shaping_coef != 0.0:
        shaping = shaping_advantage(args, batch)
        task = task + torch.where(batch.outcomes.scored.unsqueeze(1), shaping, 0.0)
    return with_length_stream(args, batch, task, *length_stream(args, batch))


class LenVMGRPOTrainer(LenVMTrainer):
    """[`trl.GRPOTrainer`] whose advantages have a second stream, and so differ from token to token.

    ``A_t = A_task + length_coef * A_len,t + shaping_coef * A_shaping,t`` (arXiv 2604.27039, appendices C.2 and C.3):

    - ``A_task``: TRL's group-relative advantage, one number per completion, as it is (`scale_rewards`,
      `multi_objective_aggregation`, several reward functions).
    - ``A_len``: GAE of the length return with the frozen length value model as the baseline. Completions that were cut
      go on with ``V(s_L)``. With `length_gate="correct"` the others get 0; the gate reads the *raw* value of
      `gate_reward`, never the weighted sum.
    - ``A_shaping``: GAE of the shaping rewards, with Phi = 0 after the last token: this task treats a cut as an end.

    Tokens that nobody chose get 0, and so do completions that no reward function scored. A group whose rewards are all
    equal has no task advantage, but still learns from the length stream. With both coefficients at 0 this *is*
    `GRPOTrainer`: the batch is not touched. (But a row ends at every id that ends it, also one of `generation_kwargs`,
    where TRL would train on the padding behind.)

    How completions ended is decided by `lenvm_rl.endings`: by an id, by stopping short of the budget (vLLM's `stop`, an
    environment), or by the field `finished` of a `rollout_func`, one flag for each completion.

    Refused at construction: losses that know one advantage per completion ([`lenvm_rl.trainers.checks.check_loss`]), a
    policy with another tokenizer than the length value model's, `max_time` (cuts that nobody can see), and with a
    multimodal processor, a length value model whose decoder does not see the policy's pictures.

    Args:
        model, reward_funcs, train_dataset, eval_dataset, processing_class, further, grpo_arguments:
            As in [`trl.GRPOTrainer`], by position or by name.
        args ([`LenVMGRPOConfig`], *optional*): a default one if omitted.
        length_value_model ([`LengthValueModel`] or `str`, *optional*):
            The model or its path; frozen for good. Needed unless `length_coef` and `shaping_coef` are 0.

    Example:

    ```python
    trainer = LenVMGRPOTrainer(
        model="my-policy",
        reward_funcs=accuracy_reward,
        args=LenVMGRPOConfig("out", length_coef=1.0, loss_type="dr_grpo"),
        train_dataset=dataset,
        length_value_model="my-length-value-model",
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "grpo", "lenvm"]
    # TRL's card names the paper that introduced the algorithm, which is not the length value model's.
    _paper = {**GRPOTrainer._paper, "citation": GRPOTrainer._paper["citation"] + "\n" + LENVM_CITATION}
    config_class = LenVMGRPOConfig

    def _streams(self, read: Batch) -> Streams:
        return grpo_streams(self.args, read)
