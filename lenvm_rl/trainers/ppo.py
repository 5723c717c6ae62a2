"""PPO on the hooks of TRL's GRPO trainer: a learned task critic, and a frozen length value model beside it."""

import contextlib
import os

import torch
from torch import Tensor

from lenvm_rl.advantages import gae
from lenvm_rl.modeling.completions import completion_logits
from lenvm_rl.modeling.critic import TaskCritic
from lenvm_rl.trainers import checks
from lenvm_rl.trainers.base import LenVMTrainer, Outcomes
from lenvm_rl.trainers.card import LENVM_CITATION, PPO_CITATION
from lenvm_rl.trainers.configs import LenVMPPOConfig
from lenvm_rl.trainers.critic import (
    CRITIC_FOLDER,
    check_same_critic,
    check_settings,
    make_critic,
    place_critic,
    read_critic,
)
from lenvm_rl.trainers.metrics import Moments, critic_metrics, kl_reward_metrics
from lenvm_rl.trainers.pictures import picture_inputs
from lenvm_rl.trainers.streams import Completions, final_rewards, length_adaptive_lambda, whiten


class LenVMPPOTrainer(LenVMTrainer):
    """PPO (Schulman et al., arXiv 1707.06347) with two streams of advantage (arXiv 2604.27039, appendix C.2).

    TRL has had no PPO trainer since 1.13. This one adds a critic to [`trl.GRPOTrainer`] and keeps everything else of
    it: rollouts, reward functions, the clipped loss and its KL term (`beta`), PEFT policies, logging, resuming.

    Task stream, with a learned critic: the weighted sum of the rewards is paid at the last token, with shaping rewards
    ``F_t`` added to every token where `shaping_coef` is set, so that the critic learns the shaped return, and likewise
    the divergence from the reference policy with `kl_in_reward`.
    ``A_task = GAE(r + F, V_task; task_gamma, task_lam)``, the critic's targets are ``A_task + V_task`` (each with a
    lambda of its own where `critic_lam` or `length_adaptive_lam` is set), and `whiten` acts on ``A_task`` alone, unless
    it says otherwise. A completion that was cut is an end, or goes on with the critic's value and the potential
    (`truncation`). Then ``A = A_task + length_coef * A_len``, with ``A_len`` as in [`LenVMGRPOTrainer`]. Settings of
    groups, such as `scale_rewards`, only matter to `critic="lenvm"`.

    The critic has its own parameter group and learning rate (weight decay as for the policy), and its gradient is
    clipped by itself to `max_grad_norm`. Its loss is the mean over the tokens of the whole optimizer step,
    accumulation and processes included. In the first `critic_warmup_steps` it alone learns; with
    `critic_learning_rate=0` it does not, and makes no loss. Dropout is off in it. What is frozen in a critic that is
    given stays so, and adapters and a score head are kept ([`lenvm_rl.trainers.critic.make_critic`]). It is
    saved with the policy, in `critic/` of every checkpoint and of what `save_model` writes, and restored on resume.

    Refused at construction, beside what [`LenVMGRPOTrainer`] refuses: a learned critic under FSDP or DeepSpeed (its
    weights are not sharded), with an optimizer that steps layer by layer, or with
    `multi_objective_aggregation="normalize_then_sum"`; `truncation="bootstrap"`, and whatever only a critic reads,
    without a critic.

    Args:
        model, reward_funcs, train_dataset, eval_dataset, processing_class, further, grpo_arguments:
            As in [`trl.GRPOTrainer`], by position or by name.
        args ([`LenVMPPOConfig`], *optional*): a default one if omitted.
        length_value_model ([`LengthValueModel`] or `str`, *optional*): as in [`LenVMGRPOTrainer`].
        critic (`str` or `PreTrainedModel`, *optional*, defaults to `"learned"`):
            `"learned"`: a task critic that starts from `args.critic_init`. `"lenvm"`: no task critic; the task stream
            is the reward less a baseline (`args.task_baseline`), and the frozen length value model is the only critic
            there is, for length. Or a model or path, see [`lenvm_rl.trainers.critic.make_critic`].

    Example:

    ```python
    trainer = LenVMPPOTrainer(
        model="my-policy",
        reward_funcs=accuracy_reward,
        args=LenVMPPOConfig("out", length_coef=0.1),
        train_dataset=dataset,
        length_value_model="my-length-value-model",
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "ppo", "lenvm"]
    _name = "PPO"
    _paper = {
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        "citation": f"{PPO_CITATION}\n{LENVM_CITATION}",
    }
    config_class = LenVMPPOConfig
    always_dense = True

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: LenVMPPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *further,
        length_value_model=None,
        critic="learned",
        **grpo_arguments,
    ):
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            *further,
            length_value_model=length_value_model,
            **grpo_arguments,
        )
        self._check_critic(critic)
        args, policy = self.args, self.accelerator.unwrap_model(self.model)
        critic = make_critic(critic, args.critic_init, policy, self.length_value_model, args.runs_remote_code)
        self.critic = None if critic is None else place_critic(critic, self)

    def _check_critic(self, critic) -> None:
        check_settings(critic, self)

    @property
    def _critic_learns(self) -> bool:
        return self.critic is not None and self.args.critic_learning_rate > 0.0

    def _task_stream(self, batch: dict, completions: Completions, outcomes: Outcomes, logits: Tensor | None) -> Tensor:
        scored = outcomes.scored.unsqueeze(1)
        if self.critic is None:
            task = self._baseline_stream(batch, completions, outcomes, logits)
        else:
            values = self._value_logits(self.critic, batch, "task critic")
            rewards = self._rewards(batch, completions, outcomes, logits)
            offset = torch.zeros_like(values)
            if self.args.shaping_coef != 0.0 and self.args.shaping_form == "critic_offset":
                offset = self._potential(logits)
            task, targets, errors = self._critic_streams(values + offset, completions, rewards)
            mask = completions.actions & scored
            batch["critic_mask"] = mask
            batch["critic_values"] = values[:, :-1]
            batch["critic_returns"] = targets + values[:, :-1]
            shown = (values + offset)[:, :-1]
            realised = completions.finished if self.args.truncation == "bootstrap" else None
            self._log_all(critic_metrics(shown, errors + shown, mask, self._sum_over_processes, realised))
        task = torch.where(scored, task, 0.0)
        return self._whiten(task, completions, outcomes) if self.args.whiten in ("task", "streams") else task

    def _whiten(self, advantages: Tensor, completions: Completions, outcomes: Outcomes) -> Tensor:
        """Whitened over the tokens that the policy chose in scored completions, of all processes."""
        return whiten(advantages, completions.actions & outcomes.scored.unsqueeze(1), self._sum_over_processes)

    def _length_stream(self, logits: Tensor, completions: Completions, outcomes: Outcomes) -> Tensor:
        length = super()._length_stream(logits, completions, outcomes)
        return self._whiten(length, completions, outcomes) if self.args.whiten == "streams" else length

    def _add_streams(self, task, length, coefficient, completions, outcomes) -> Tensor:
        advantages = super()._add_streams(task, length, coefficient, completions, outcomes)
        return self._whiten(advantages, completions, outcomes) if self.args.whiten == "sum" else advantages

    def _rewards(self, batch: dict, completions: Completions, outcomes: Outcomes, logits: Tensor | None) -> Tensor:
        """What each token is paid, `(B, T)`: the reward at the end, and shaping and divergence along the way."""
        args = self.args
        rewards = final_rewards(outcomes.rewards, completions)
        if args.shaping_coef != 0.0 and args.shaping_form == "rewards":
            terminal_cut = args.truncation == "terminal"
            rewards += self._shaping_rewards(self._potential(logits), completions, terminal_cut)
        if args.kl_in_reward:
            log_ratio = torch.where(completions.actions, self._log_ratio(batch), 0.0)
            self._log_all(kl_reward_metrics(log_ratio, args.kl_reward_coef, completions, self._sum_over_processes))
            rewards -= args.kl_reward_coef * log_ratio
        return rewards

    def _log_ratio(self, batch: dict) -> Tensor:
        """``log pi - log pi_ref`` of each token, `(B, T)`, of the policy that the completions were sampled from."""
        policy = batch.get("old_per_token_logps")
        if policy is None:
            # TRL leaves them out where the loss can do without.
            args, training = self.args, self._mode == "train"
            with torch.no_grad():
                policy = self._get_per_token_logps_and_entropies(
                    self.model,
                    torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                    torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                    batch["completion_ids"].shape[1],
                    batch_size=args.per_device_train_batch_size if training else args.per_device_eval_batch_size,
                )[0]
        return policy - batch["ref_per_token_logps"]

    def _critic_streams(self, values: Tensor, completions: Completions, rewards: Tensor) -> tuple[Tensor, ...]:
        """GAE of the rewards from the critic's values at every state, `(B, T + 1)`: of the policy, of the critic, and
        of lambda 1, how far the return was from the value.

        Three tensors `(B, T)`; those of one lambda are one tensor.
        """
        args = self.args
        following = completions.following(values, args.truncation == "terminal")

        def advantages(lam: float | Tensor) -> Tensor:
            if isinstance(lam, Tensor):
                lam = lam.unsqueeze(1).expand_as(rewards)
            actions = completions.actions
            return gae(rewards, values[:, :-1], completions.mask, args.task_gamma, lam, following, actions)

        known = {lam: advantages(lam) for lam in {1.0, args.target_lam, args.task_lam}}
        policy = known[args.task_lam]
        if args.length_adaptive_lam:
            policy = advantages(length_adaptive_lambda(completions, args.length_adaptive_alpha))
        return policy, known[args.target_lam], known[1.0]

    def _baseline_stream(
        self, batch: dict, completions: Completions, outcomes: Outcomes, logits: Tensor | None
    ) -> Tensor:
        """The task advantage without a critic: the reward less a baseline, the same for all tokens, and shaping."""
        if self.args.task_baseline == "group":
            task = batch["advantages"]
        else:
            moments = Moments(self._sum_over_processes)
            moments.add("reward", outcomes.rewards, outcomes.scored)
            task = outcomes.rewards - moments.exchange().mean("reward")
        task = torch.where(completions.actions, task.unsqueeze(1), 0.0)
        if self.args.shaping_coef != 0.0:
            task = task + self._shaping_advantage(logits, completions)
        return task

    @property
    def _policy_step(self) -> int:
        return max(super()._policy_step - self.args.critic_warmup_steps, 0)

    @property
    def _policy_learns(self) -> bool:
        return self.state.global_step >= self.args.critic_warmup_steps

    def _compute_loss(self, model, inputs):
        if self._mode == "train" and not self._policy_learns:
            # Without gradients, not with gradients of 0: the optimizer then neither decays nor moves a weight, and
            # its moments start with the first step that is one.
            with torch.no_grad():
                super()._compute_loss(model, inputs)
            return self.args.vf_coef * self._value_loss(inputs)
        loss = super()._compute_loss(model, inputs)
        if not self._critic_learns:
            return loss
        return loss + self.args.vf_coef * self._value_loss(inputs)

    def _value_loss(self, inputs: dict) -> Tensor:
        """``1/2 (V - R)^2``, clipped, as a mean over the tokens of the optimizer step that this batch is a part of."""
        mask, old, returns = inputs["critic_mask"], inputs["critic_values"], inputs["critic_returns"]
        # As Trainer does for the policy: processes exchange gradients once per optimizer step.
        defer = not self.accelerator.sync_gradients
        with self.accelerator.no_sync(self.critic) if defer else contextlib.nullcontext():
            extended = completion_logits(
                self.critic,
                inputs["prompt_ids"],
                inputs["prompt_mask"],
                inputs["completion_ids"],
                inputs["completion_mask"],
                further_inputs=picture_inputs(inputs),
            )
        checks.check_finite(extended, "task critic", inputs, self)
        values = extended[:, :-1]
        errors, clipped = (values - returns).square(), torch.zeros_like(mask)
        if self.args.cliprange_value is not None:
            near = old + (values - old).clamp(-self.args.cliprange_value, self.args.cliprange_value)
            clipped_errors = (near - returns).square()
            clipped = clipped_errors > errors
            errors = torch.maximum(errors, clipped_errors)
        losses = torch.where(mask, 0.5 * errors, 0.0)
        moments = Moments(self._sum_over_processes)
        moments.add("loss", losses, mask)
        moments.add("clipped", clipped.float(), mask)
        moments.exchange()
        self._log_all({"critic/value_loss": moments.mean("loss"), "critic/clip_fraction": moments.mean("clipped")})
        # `num_items_in_batch` spans the generation batch and all processes; DDP averages over processes.
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self._mode == "train":
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return losses.sum() / tokens

    def create_optimizer(self, model=None):
        """As `Trainer.create_optimizer`, with parameter groups of the critic's own learning rate."""
        optimizer = super().create_optimizer(model)
        if not self._critic_learns:
            return optimizer
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        named = [(name, p) for name, p in self.critic.named_parameters() if p.requires_grad]
        if any(id(parameter) in known for _, parameter in named):
            return optimizer
        decayed = set(self.get_decay_parameter_names(self.critic))
        for weight_decay, wanted in ((self.args.weight_decay, True), (0.0, False)):
            optimizer.add_param_group(
                {
                    "params": [p for name, p in named if (name in decayed) == wanted],
                    "lr": self.args.critic_learning_rate,
                    "weight_decay": weight_decay,
                }
            )
        return optimizer

    def _clip_grad_norm(self, model):
        # First, because it also unscales the gradients of every parameter where there is a gradient scaler.
        norm = super()._clip_grad_norm(model)
        if self._critic_learns:
            critic_norm = torch.nn.utils.clip_grad_norm_(self.critic.parameters(), self.args.max_grad_norm)
            self._log_all({"critic/grad_norm": critic_norm.item()})
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with a learned critic in the folder `critic` beside the policy.

        So it is in every checkpoint, and `critic="<output_dir>/critic"` takes it up again in another run.
        """
        # First: what follows may upload the folder.
        if self.critic is not None and self.args.should_save:
            self.save_critic(os.path.join(output_dir or self.args.output_dir, CRITIC_FOLDER))
        super().save_model(output_dir, _internal_call)

    def save_critic(self, folder: str) -> None:
        """Write the learned critic to `folder`: `critic=folder` takes it up again in another run."""
        if self.critic is None:
            raise ValueError("critic='lenvm' learns no critic, so there is none to save.")
        self._bare_critic.save_pretrained(folder)

    def _check_checkpoint(self, checkpoint: str) -> int:
        step = super()._check_checkpoint(checkpoint)
        check_same_critic(checkpoint, self._bare_critic)
        return step

    @property
    def _bare_critic(self) -> TaskCritic | None:
        return None if self.critic is None else self.accelerator.unwrap_model(self.critic)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.critic is not None:
            read_critic(resume_from_checkpoint, self._bare_critic)

    def _load_best_model(self):
        super()._load_best_model()
        if self.critic is not None:
            read_critic(self.state.best_model_checkpoint, self._bare_critic)
