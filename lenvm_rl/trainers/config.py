"""Arguments of the trainers: everything of `trl.GRPOConfig`, and what a length value model and a task critic add to it.

Each field is told once ([`lenvm_rl.trainers.fields`]), and docstrings, checks and the help of the command line are made
from that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from trl import GRPOConfig

from lenvm_rl.shaping import check_shaping_gamma
from lenvm_rl.trainers.checks import check_config_names
from lenvm_rl.trainers.fields import (
    COUNT,
    NOT_NEGATIVE,
    NUMBER,
    POSITIVE,
    UNIT,
    changed_fields,
    check_fields,
    documented_fields,
    is_within,
    setting,
)

# What nothing reads unless one of these is set.
STEERED, REFRESHED = ("length_target", "accuracy_floor"), ("refresh_steps",)
# How a critic learns, where it does.
LEARNING = (
    "critic_warmup_steps",
    "critic_updates_per_step",
    "critic_max_grad_norm",
    "critic_weight_decay",
    "critic_lr_scheduler_type",
    "critic_frozen",
    "vf_coef",
    "cliprange_value",
)


@documented_fields
@dataclass
class LenVMConfig(GRPOConfig):
    """What [`LenVMGRPOConfig`] and [`LenVMPPOConfig`] share: the length stream, its weight and its gate, shaping,
    guided rollouts, and re-fits of the length value model.

    A steered coefficient belongs to the generation batch after those that it was measured on: one that depended on the
    completions it weighs would make the length value model more than a baseline. For the same reason a re-fit happens
    before completions are sampled, on completions of earlier batches.

    Raises:
        `ValueError`: a value is out of its bounds, or two values exclude each other.
        `TypeError`: a field is one of an older PPO config; what stands for it is said.
    """

    _argument_group_name = "Length stream, shaping, guided rollouts, re-fits"
    # What may come from the command line as JSON.
    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "rollout_guidance"]

    length_coef: Annotated[float, NUMBER] = setting(
        0.0,
        "Weight s of the length stream in A = A_task + s * A_len (arXiv 2604.27039, appendix C.2). Positive shortens, "
        "negative lengthens, 0 leaves TRL as it is. Start at 1 (PPO, which whitens the task's stream: 3) and watch "
        "accuracy next to length. Where it is steered (length_target, accuracy_floor), the weight at the start.",
    )
    length_coef_warmup_steps: Annotated[int, NOT_NEGATIVE] = setting(
        0,
        "Optimizer steps in which length_coef grows linearly from 0. Steps in which only a critic learns do not count.",
    )
    length_target: Annotated[float | None, POSITIVE] = setting(
        None,
        "Steer length_coef until completions have this mean length, in tokens, EOS not counted (cut ones count with "
        "what they have). To hold it, the coefficient goes below 0 where they are too short; with length_coef_min=0 it "
        "is a budget: nothing is lengthened, and where no reward pulls at the length, it ends well below.",
    )
    accuracy_floor: Annotated[float | None, "[0, 1)"] = setting(
        None,
        "Steer length_coef to the most that keeps accuracy: it grows while the moving average of length/correct (half-"
        "life: 10 generation batches) is above this, and shrinks while it is below.",
    )
    length_coef_rate: Annotated[float, POSITIVE, STEERED] = setting(
        0.02,
        "Change of a steered length_coef per generation batch for an error of 1: the logarithm of the mean length over "
        "length_target (so 1 is 2.7 times as long), or the distance of the accuracy from accuracy_floor.",
    )
    length_coef_proportional: Annotated[float, NOT_NEGATIVE, STEERED] = setting(
        2.0,
        "What an error of 1 adds to a steered length_coef while it lasts. A policy's length moves as long as the "
        "coefficient is not 0, so what only adds up (0 here) swings about the target (arXiv 2007.03964).",
    )
    length_coef_min: Annotated[float | None, NUMBER, STEERED] = setting(
        None,
        "Lower bound of a steered length_coef. Default: -length_coef_max with length_target, 0 with accuracy_floor.",
    )
    length_coef_max: Annotated[float, NUMBER, STEERED] = setting(1.0, "Upper bound of a steered length_coef.")
    length_lam: Annotated[float, UNIT] = setting(
        1.0,
        "Lambda of the length stream's GAE. At 1 the length value model is only a baseline; below 1 its errors enter "
        "the gradient in exchange for less variance.",
    )
    length_gate: Literal["all", "correct", "pass_rate"] = setting(
        "correct",
        "Who is paid for length: 'correct' (only completions that gate_reward calls correct), 'all' (every completion; "
        "with a large length_coef the policy learns to answer at once, right or wrong) or 'pass_rate' (every "
        "completion, times the share of correct ones in its group: groups that can do it are to be short, "
        "the others are left alone. The share depends on the completion itself by one part in num_generations, and "
        "for that part the length value model is no pure baseline, as with 'correct').",
    )
    gate_reward: str | None = setting(
        None,
        "Name of the reward function that says what is correct. It may be left out where there is no doubt: one "
        "function, or penalties around one and the same task reward, with or without that beside them.",
    )
    gate_threshold: Annotated[float, NUMBER] = setting(
        0.5,
        "A completion is correct where the raw value of that function, without weight, is above this. A penalty that "
        "keeps its task reward's flags is asked for those instead.",
    )
    length_gate_center: bool = setting(
        False,
        "Centre the gated length stream over the correct completions of each group, so that no length value model can "
        "push the chance to be correct. Needs length_gate='correct' and length_lam=1.",
    )
    shaping_coef: Annotated[float, NUMBER] = setting(
        0.0,
        "Weight of potential-based shaping with the length value model as the potential (arXiv 2604.27039, appendix "
        "C.3; Ng et al., 1999). It changes how a policy learns, not what is optimal: it does not shorten completions.",
    )
    shaping_potential: Literal["value", "length"] = setting(
        "value",
        "The potential: 'value' (V, flat far from the end) or 'length' (minus the predicted tokens to come, divided by "
        "max_completion_length).",
    )
    shaping_gamma: Annotated[float | None, "(0, 1]"] = setting(
        None, "Discount of the shaping term. Default: task_gamma, the only one that is potential-based."
    )
    allow_gamma_mismatch: bool = setting(
        False, "Allow a shaping_gamma that is not task_gamma. Such shaping changes what is optimal."
    )
    task_gamma: Annotated[float, "(0, 1]"] = setting(
        1.0, "Discount of the task return. It is not the length value model's gamma."
    )
    task_lam: Annotated[float, UNIT] = setting(
        1.0,
        "Lambda of the task stream's GAE. The task pays once, at the end: below 1 the reward that reaches a token "
        "fades by lambda for every token after it (0.95 leaves 0.006 of it after 100 tokens, and the rest is the "
        "critic's guess), so the unbiased 1 is the default (arXiv 2503.24290). In PPO it serves the policy and the "
        "critic's targets, unless critic_lam is set.",
    )
    rollout_guidance: dict | str | None = setting(
        None,
        "Guide the rollouts of training, but not of evaluation, in length: fields of LengthGuidance as JSON, such as "
        "'{\"strength\": 2.0}', but temperature, top_k, top_p and min_p, which are the trainer's. They are off-policy "
        "then, and each token is weighed by its importance ratio, truncated at 3. Of vLLM, colocated alone.",
    )
    refresh_steps: Annotated[int, NOT_NEGATIVE] = setting(
        0,
        "Re-fit the length value model after every so many optimizer steps, and freeze it again; 0 is never. Its gamma "
        "stays. It changes the model that was given to the trainer, and checkpoints hold it.",
    )
    refresh_completions: Annotated[int, COUNT, REFRESHED] = setting(
        2048, "How many completions, the latest of all processes, it is re-fitted on, in one pass of 64 to a step."
    )
    refresh_learning_rate: Annotated[float, POSITIVE, REFRESHED] = setting(
        1e-5, "Constant learning rate of a re-fit (AdamW, a new one each time)."
    )
    refresh_only_correct: Annotated[bool, REFRESHED] = setting(
        False, "Re-fit on correct completions only: the V that length_gate='correct' asks for."
    )

    def __new__(cls, *arguments, **fields):
        check_config_names(cls.__name__, fields)
        return super().__new__(cls)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, beside=GRPOConfig)
        self._check_steering()
        if self.length_gate_center and (self.length_gate != "correct" or self.length_lam != 1.0):
            raise ValueError(
                f"length_gate_center=True needs length_gate='correct' and length_lam=1, not '{self.length_gate}' and "
                f"{self.length_lam}: it centres the stream of the correct completions, and only at 1 does the length "
                "value model drop out of that. Set both, or leave the centring out."
            )
        check_shaping_gamma(self.shaping_gamma, self.task_gamma, self.allow_gamma_mismatch)
        if isinstance(self.rollout_guidance, str):
            raise ValueError(f"rollout_guidance={self.rollout_guidance!r} is no JSON object: write it as '{{...}}'.")

    def _check_steering(self) -> None:
        if self.length_coef_warmup_steps and (self.steering is not None or self.length_coef == 0.0):
            raise ValueError(
                f"length_coef_warmup_steps={self.length_coef_warmup_steps} lead to a constant length_coef that is not "
                "0: set length_coef, and leave out length_target and accuracy_floor (a steered coefficient starts at "
                "length_coef and grows at length_coef_rate by itself)."
            )
        if self.steering is None:
            return
        if self.length_target is not None and self.accuracy_floor is not None:
            raise ValueError(
                f"length_target={self.length_target} and accuracy_floor={self.accuracy_floor} both steer length_coef: "
                "leave one of them out."
            )
        most = self.max_completion_length
        if self.length_target is not None and most is not None and self.length_target > most:
            raise ValueError(
                f"length_target={self.length_target} cannot be reached: completions have at most max_completion_length="
                f"{most} tokens. Raise max_completion_length, or lower length_target."
            )
        lowest, highest = self.coefficient_bounds
        if not lowest <= self.length_coef <= highest:
            raise ValueError(
                f"length_coef={self.length_coef}, where a steered coefficient starts, is not in [length_coef_min, "
                f"length_coef_max] = [{lowest}, {highest}]: change it or the bounds."
            )
        if self.accuracy_floor is not None and lowest < 0.0:
            raise ValueError(
                f"length_coef_min={self.length_coef_min} with accuracy_floor would pay for length where accuracy is "
                "below the floor: set it to 0 or more."
            )
        if self.rollout_guidance is not None:
            raise ValueError(
                "length_target and accuracy_floor measure the policy's own completions, which rollout_guidance "
                "changes: leave one of them out."
            )

    @property
    def steering(self) -> str | None:
        """What the coefficient is steered by: `"target"`, `"floor"`, or `None`."""
        if self.length_target is not None:
            return "target"
        return None if self.accuracy_floor is None else "floor"

    @property
    def coefficient_bounds(self) -> tuple[float, float]:
        """Between which a steered coefficient moves."""
        if self.length_coef_min is not None:
            return self.length_coef_min, self.length_coef_max
        return (-self.length_coef_max if self.steering == "target" else 0.0), self.length_coef_max

    @property
    def has_length_stream(self) -> bool:
        """Whether the length stream is ever added to the advantages."""
        return self.length_coef != 0.0 or self.steering is not None

    @property
    def shaping_discount(self) -> float:
        """The discount F is computed with."""
        return self.task_gamma if self.shaping_gamma is None else self.shaping_gamma

    @property
    def gate_users(self) -> list[str]:
        """The settings, as a person writes them, that have to know which completions are correct."""
        users = {
            f"length_gate='{self.length_gate}'": self.has_length_stream and self.length_gate != "all",
            f"accuracy_floor={self.accuracy_floor}": self.accuracy_floor is not None,
            "refresh_only_correct=True": self.refresh_steps > 0 and self.refresh_only_correct,
        }
        return [name for name, is_one in users.items() if is_one]

    @property
    def runs_remote_code(self) -> bool:
        """Whether code that comes with weights is run: asked for as TRL takes it, for the policy or for all models."""
        return self.trust_remote_code or bool((self.model_init_kwargs or {}).get("trust_remote_code"))

    @property
    def needs_length_value_model(self) -> bool:
        """Whether something is set that only a length value model can serve."""
        wanted = (self.shaping_coef != 0.0, self.rollout_guidance is not None, self.refresh_steps > 0)
        return self.has_length_stream or any(wanted)


@dataclass
class LenVMGRPOConfig(LenVMConfig):
    """Arguments of [`LenVMGRPOTrainer`]: `trl.GRPOConfig` and [`LenVMConfig`].

    `loss_type="dr_grpo"` is the advisable one with a length stream: `"grpo"` and `"sapo"` divide by each completion's
    own length, which is a length bias of its own, and after which the length value model is no pure baseline any more.
    """


# So small that the loss has no term of it, and the reference is loaded all the same.
NEGLIGIBLE_BETA = 1e-12


class _GroupOfOne(int):
    """A 1 that passes for 2 where TRL asks: it refuses groups of one, which leave its own advantage nothing."""

    def __lt__(self, other):
        return int(self) < other and other != 2


@documented_fields
@dataclass
class LenVMPPOConfig(LenVMConfig):
    """Arguments of [`LenVMPPOTrainer`]: `trl.GRPOConfig`, [`LenVMConfig`], and the task critic's."""

    _argument_group_name = "PPO and its critic"

    num_generations: int | None = field(
        default=2,
        metadata={
            "help": "Completions per prompt; 1 is enough, as PPO needs no groups. Raise it where groups are used "
            "(length_gate_center, length_gate='pass_rate', or critic='lenvm' with task_baseline='group')."
        },
    )
    critic_init: str = setting(
        "policy",
        "Where a learned critic starts: 'policy', 'lenvm' (a copy of that decoder, and a new head), or a folder or hub "
        "id, of a reward model with its head as well.",
    )
    critic_form: Literal["full", "adapter", "head"] = setting(
        "full",
        "What a critic that starts at the policy is: 'full' (a decoder and a head, all of which learns), 'adapter' "
        "(LoRA and a head) or 'head' (a head alone) on a decoder that this run keeps frozen: the reference's (beta > "
        "0), or the base under the policy's adapters. A head alone reads the reference's forward. A critic that is "
        "given is taken as it is.",
    )
    critic_learning_rate: Annotated[float, NOT_NEGATIVE] = setting(
        1e-5,
        "Peak learning rate of the critic. Ten times the policy's default. At 0 the critic is taken as it is: a "
        "pretrained one that stays frozen (arXiv 2502.16944).",
    )
    critic_lr_scheduler_type: Literal["policy", "linear", "cosine", "constant", "constant_with_warmup"] = setting(
        "policy", "Schedule of the critic's learning rate: the policy's, or one of its own over the same warmup_steps."
    )
    critic_weight_decay: Annotated[float | None, NOT_NEGATIVE] = setting(
        None, "Weight decay of the critic; weight_decay when unset."
    )
    critic_max_grad_norm: Annotated[float | None, NOT_NEGATIVE] = setting(
        None, "Bound of the norm of the critic's gradient, 0 for none; max_grad_norm when unset."
    )
    critic_updates_per_step: Annotated[int, COUNT] = setting(
        1,
        "How often the critic learns from the mini-batch of an optimizer step. The policy does once, so that the "
        "critic's own epochs are num_iterations times this.",
    )
    critic_frozen: list[str] | None = setting(
        None,
        "Names of modules of the critic that stay as they are, such as self_attn. They may stand anywhere in "
        "it; the others learn.",
    )
    vf_coef: Annotated[float, POSITIVE] = setting(
        1.0,
        "Weight of the value loss, vf_coef * mean(1/2 (V - R)^2). The critic shares no weights with the policy, so "
        "this only scales its gradient against max_grad_norm.",
    )
    cliprange_value: float | None = setting(
        0.2, "How far a value may move from the one at sampling time before its loss is clipped; None for no clipping."
    )
    critic_warmup_steps: Annotated[int, NOT_NEGATIVE] = setting(
        0,
        "Optimizer steps at the start in which only the critic learns. The policy's weights and its optimizer state "
        "stay as they are, while its learning rate schedule runs on.",
    )
    kl_reward_coef: Annotated[float, NOT_NEGATIVE] = setting(
        0.0,
        "Add -kl_reward_coef * (log pi - log pi_ref) of each token to the rewards, before GAE, so that the critic "
        "learns it too. The loss has a term of its own where beta is set as well. Every token costs, so it also "
        "shortens completions.",
    )
    kl_reward_target: Annotated[float | None, POSITIVE, ("kl_reward_coef",)] = setting(
        None,
        "Steer kl_reward_coef so that kl_reward/per_token, in nats, comes to this. After every generation batch that "
        "the policy learns from, it is multiplied by 1 + e * completions / kl_reward_horizon, where e is the relative "
        "error, within 0.2 (arXiv 1909.08593).",
    )
    kl_reward_horizon: Annotated[float, POSITIVE, ("kl_reward_target",)] = setting(
        1e4, "Completions in which a steered kl_reward_coef may grow or shrink by about 20 percent."
    )
    target_kl: Annotated[float | None, POSITIVE] = setting(
        None,
        "Stop learning from a generation batch once policy/approx_kl of an optimizer step, its mean divergence from "
        "the policy that sampled, is above this. The critic goes on. For batches that are used more than once "
        "(num_iterations, steps_per_generation).",
    )
    missing_eos_penalty: Annotated[float | None, NOT_NEGATIVE] = setting(
        None, "Subtract this from the reward of a completion that was cut, before anything else is done with it."
    )
    reward_normalization: bool = setting(
        False,
        "Shift and scale rewards to mean 0 and standard deviation 1 over all completions of the run so far. It is no "
        "use to rewards of 0 and 1, whose scale is known.",
    )
    reward_clip: Annotated[float | None, POSITIVE] = setting(
        None, "Bound rewards to plus and minus this, after they are normalised."
    )
    critic_lam: Annotated[float | None, UNIT] = setting(
        None,
        "Lambda of the critic's targets; task_lam when unset. With task_lam=0.95, critic_lam=1.0 the policy has less "
        "variance and the critic targets without bias (arXiv 2503.01491).",
    )
    length_adaptive_alpha: Annotated[float | None, POSITIVE] = setting(
        None,
        "Make the policy's lambda 1 - 1 / (alpha * L) in a completion of L tokens (arXiv 2504.05118; 0.05 there). It "
        "takes the place of task_lam, which has to be left at 1. alpha: the share of a completion that credit reaches "
        "over.",
    )
    whiten: Literal["task", "streams", "sum", "none"] = setting(
        "task",
        "What is shifted and scaled to mean 0 and standard deviation 1 over all tokens of a generation batch that the "
        "policy chose. 'task': the task advantages (shaping included), before the length stream is added; length_coef "
        "counts in standard deviations of the task. 'streams': the gated length stream as well, so that length_coef is "
        "a ratio of the two; a length stream that is almost nothing is scaled up too. 'sum': the sum alone; the weight "
        "of either stream then depends on the spread of the other. 'none': nothing.",
    )
    truncation: Literal["terminal", "bootstrap"] = setting(
        "terminal",
        "What the task makes of a completion that was cut: 'terminal' (nothing follows; the cut is a failure like any "
        "other) or 'bootstrap' (the critic's value follows, and with shaping the potential).",
    )
    task_baseline: Literal["group", "batch"] = setting(
        "group",
        "With critic='lenvm', what is subtracted from the task reward: 'group' (TRL's group-relative advantage) or "
        "'batch' (the mean over the generation batch).",
    )

    def __post_init__(self):
        if self.num_generations == 1:
            self.num_generations = _GroupOfOne(1)
        if self.kl_reward_coef > 0.0 and self.beta == 0.0:
            # TRL has a reference policy with beta > 0 only.
            self.beta = NEGLIGIBLE_BETA
        super().__post_init__()
        self.num_generations = int(self.num_generations)
        if self.num_generations == 1 and (self.length_gate_center or self.length_gate == "pass_rate"):
            raise ValueError(
                "num_generations=1 leaves nothing to compare a completion with, as length_gate_center and "
                "length_gate='pass_rate' do: set num_generations to 2 or more, or leave it out."
            )
        if self.cliprange_value is not None and not is_within(self.cliprange_value, POSITIVE):
            raise ValueError(f"cliprange_value={self.cliprange_value} is not in {POSITIVE}, or None for no clipping.")
        idle = changed_fields(self, LEARNING) if self.critic_learning_rate == 0.0 else []
        if idle:
            raise ValueError(
                f"{idle[0]}={getattr(self, idle[0])} says how the critic learns, and with critic_learning_rate=0 it "
                "does not: set one of the two."
            )
        if self.kl_reward_target is not None and self.generation_batch_size >= 5 * self.kl_reward_horizon:
            raise ValueError(
                f"kl_reward_horizon={self.kl_reward_horizon} with {self.generation_batch_size} completions to a batch "
                "could take kl_reward_coef to 0 at once: make it larger."
            )
        if self.critic_form != "full" and self.critic_init == "lenvm":
            raise ValueError(
                f"critic_form='{self.critic_form}' is on the decoder of the policy or its reference, and "
                "critic_init='lenvm' starts a critic of form 'full': leave one of them out."
            )
        if self.length_adaptive_alpha is not None and self.task_lam != 1.0:
            raise ValueError(
                f"length_adaptive_alpha={self.length_adaptive_alpha} takes the place of task_lam={self.task_lam} for "
                "the policy: leave task_lam at 1, and set critic_lam for the critic's targets."
            )

    @property
    def target_lam(self) -> float:
        """Lambda of the critic's targets."""
        return self.task_lam if self.critic_lam is None else self.critic_lam
