"""Arguments of the trainers: those of `trl.GRPOConfig` and of a length value model, and those of each trainer."""

import math
from dataclasses import dataclass, field

from lenvm_rl.trainers.base_config import LenVMConfig
from lenvm_rl.trainers.config_checks import require_choice, require_positive, require_unit

TRUNCATIONS = ("terminal", "bootstrap")
TASK_BASELINES = ("group", "batch")
WHITENINGS = ("task", "streams", "sum", "none")
BOOLEAN_WHITENINGS = {"true": "task", "false": "none"}


@dataclass
class LenVMGRPOConfig(LenVMConfig):
    """Arguments of [`LenVMGRPOTrainer`]: those of `trl.GRPOConfig` and of [`LenVMConfig`].

    `loss_type="dr_grpo"` is the advisable one with a length stream: `"grpo"` and `"sapo"` divide by each completion's
    own length, which is a length bias of its own, and after which the length value model is no pure baseline any more.
    """


class _GroupOfOne(int):
    """A 1 that passes for 2 where TRL asks: it refuses groups of one, which leave its own advantage nothing."""

    def __lt__(self, other):
        return int(self) < other and other != 2


@dataclass
class LenVMPPOConfig(LenVMConfig):
    """Arguments of [`LenVMPPOTrainer`]: those of `trl.GRPOConfig` and [`LenVMConfig`], and those of the task critic.

    Args:
        num_generations (`int`, *optional*, defaults to `2`):
            Completions per prompt. PPO needs no groups, so 1 is enough. Raise it where groups are used:
            `length_gate_center`, `length_gate="pass_rate"`, or `critic="lenvm"` with `task_baseline="group"`.
        critic_init (`str`, *optional*, defaults to `"policy"`):
            Where a learned critic starts: `"policy"`, `"lenvm"` (a copy of that decoder, and a new head), or a folder
            or hub id, of a reward model with its head as well.
        critic_learning_rate (`float`, *optional*, defaults to `1e-5`):
            Peak learning rate of the critic; it follows the policy's schedule. Ten times the policy's default. At 0
            the critic is taken as it is: a pretrained one that stays frozen (arXiv 2502.16944), read and never trained.
        vf_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the value loss, ``vf_coef * mean(1/2 (V - R)^2)``. The critic shares no weights with the policy,
            so this only scales its gradient against `max_grad_norm`.
        cliprange_value (`float`, *optional*, defaults to `0.2`):
            How far a value may move from the one at sampling time before its loss is clipped; `None` for no clipping.
        critic_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps at the start in which only the critic learns: the policy's weights and its optimizer state
            stay as they are, while its learning rate schedule runs on.
        kl_in_reward (`bool`, *optional*, defaults to `False`):
            Whether ``-kl_reward_coef * (log pi - log pi_ref)`` of each token is added to the rewards, before GAE, so
            that the critic learns it too. Needs `beta > 0`, without which TRL has no reference policy; the loss keeps
            its own term, so give a small `beta` if the divergence is to be paid once. Every token costs, so it also
            shortens completions.
        kl_reward_coef (`float`, *optional*, defaults to `0.05`): weight of that, above 0.
        critic_lam (`float`, *optional*):
            Lambda of the critic's targets, in [0, 1]; `task_lam` when unset. `task_lam=0.95, critic_lam=1.0` gives the
            policy less variance and the critic targets without bias (arXiv 2503.01491).
        length_adaptive_lam (`bool`, *optional*, defaults to `False`):
            Whether the policy's lambda is ``1 - 1 / (alpha * L)`` in a completion of L tokens (arXiv 2504.05118),
            instead of `task_lam`, which then has to be left at 1.
        length_adaptive_alpha (`float`, *optional*, defaults to `0.05`): alpha of that, above 0.
        whiten (`str`, *optional*, defaults to `"task"`):
            What is shifted and scaled to mean 0 and standard deviation 1 over all tokens of a generation batch that the
            policy chose. `True` and `False` stand for `"task"` and `"none"`.
            `"task"`: the task advantages (shaping included), *before* the length stream is added. `length_coef` counts
            in standard deviations of the task.
            `"streams"`: the gated length stream as well, so that `length_coef` is a ratio of the two. A length stream
            that is almost nothing is scaled up too, and by how much completions are too long no longer counts.
            `"sum"`: the sum alone. The weight of either stream then depends on the spread of the other.
            `"none"`: nothing.
        truncation (`str`, *optional*, defaults to `"terminal"`):
            What the task makes of a completion that was cut: `"terminal"` (nothing follows; the cut is a failure like
            any other) or `"bootstrap"` (the critic's value follows, and with shaping the potential).
        task_baseline (`str`, *optional*, defaults to `"group"`):
            With `critic="lenvm"`: what is subtracted from the task reward. `"group"`: TRL's group-relative advantage.
            `"batch"`: the mean over the generation batch.
    """

    num_generations: int | None = field(
        default=2,
        metadata={
            "help": "Completions per prompt; 1 is enough, as PPO needs no groups. Raise it where groups are used "
            "(length_gate_center, length_gate='pass_rate', or critic='lenvm' with task_baseline='group')."
        },
    )
    critic_init: str = field(
        default="policy",
        metadata={
            "help": "Where a learned critic starts: 'policy', 'lenvm' (that decoder, a new head), a folder or a hub id."
        },
    )
    critic_learning_rate: float = field(
        default=1e-5,
        metadata={
            "help": "Peak learning rate of the task critic; it follows the policy's schedule. 0: the critic stays as "
            "it is."
        },
    )
    vf_coef: float = field(default=1.0, metadata={"help": "Weight of the value loss, above 0."})
    cliprange_value: float | None = field(
        default=0.2, metadata={"help": "Range of value clipping around the values at sampling time. None: no clipping."}
    )
    critic_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps at the start in which only the critic learns."}
    )
    kl_in_reward: bool = field(
        default=False,
        metadata={
            "help": "Add -kl_reward_coef * (log pi - log pi_ref) of each token to the rewards. Needs beta > 0, whose "
            "own term stays in the loss."
        },
    )
    kl_reward_coef: float = field(default=0.05, metadata={"help": "Weight of the divergence in the reward, above 0."})
    critic_lam: float | None = field(
        default=None, metadata={"help": "Lambda of the critic's targets, in [0, 1]. Default: task_lam."}
    )
    length_adaptive_lam: bool = field(
        default=False, metadata={"help": "Lambda of the policy by length, 1 - 1 / (alpha * L), instead of task_lam."}
    )
    length_adaptive_alpha: float = field(
        default=0.05, metadata={"help": "Alpha of length_adaptive_lam: share of a completion that credit reaches over."}
    )
    # Text, so that the command line can give it; what stands for the booleans is read in __post_init__.
    whiten: str = field(
        default="task",
        metadata={
            "help": "What is whitened over the generation batch: 'task' (the task advantages, shaping included, before "
            "the length stream is added; also 'true'), 'streams' (each of the two), 'sum' (their sum) or 'none' (also "
            "'false')."
        },
    )
    truncation: str = field(
        default="terminal",
        metadata={
            "help": "What the task makes of a completion that was cut: 'terminal' (nothing follows) or 'bootstrap' "
            "(the critic's value follows, and with shaping the potential).",
            "choices": TRUNCATIONS,
        },
    )
    task_baseline: str = field(
        default="group",
        metadata={
            "help": "With critic='lenvm', what is subtracted from the task reward: 'group' (TRL's group-relative "
            "advantage) or 'batch' (the mean over the generation batch).",
            "choices": TASK_BASELINES,
        },
    )

    def __post_init__(self):
        if self.num_generations == 1:
            self.num_generations = _GroupOfOne(1)
        super().__post_init__()
        self.num_generations = int(self.num_generations)
        self._check_groups()
        require_positive(self, "vf_coef")
        if not 0.0 <= self.critic_learning_rate < math.inf:
            raise ValueError(f"critic_learning_rate={self.critic_learning_rate} is not a finite number, 0 or more.")
        if self.cliprange_value is not None:
            require_positive(self, "cliprange_value")
        self._check_lambdas()
        if self.critic_warmup_steps < 0:
            raise ValueError(f"critic_warmup_steps={self.critic_warmup_steps} is negative; 0 is no warm-up.")
        if self.critic_warmup_steps > 0 and self.critic_learning_rate == 0.0:
            raise ValueError(
                f"critic_warmup_steps={self.critic_warmup_steps} are steps in which the critic alone learns, and with "
                "critic_learning_rate=0 it does not: set one of the two."
            )
        require_positive(self, "kl_reward_coef")
        if not self.kl_in_reward:
            self._refuse_changed(("kl_reward_coef",), "kl_in_reward=True")
        elif self.beta == 0.0:
            raise ValueError(
                "kl_in_reward=True compares with the reference policy, which TRL has with beta > 0 only: set beta, to "
                "a small number such as 1e-6 if the loss is to have no such term of its own."
            )
        self.whiten = BOOLEAN_WHITENINGS.get(str(self.whiten).lower(), self.whiten)
        require_choice(self, "whiten", WHITENINGS)
        require_choice(self, "truncation", TRUNCATIONS)
        require_choice(self, "task_baseline", TASK_BASELINES)

    @property
    def target_lam(self) -> float:
        """Lambda of the critic's targets."""
        return self.task_lam if self.critic_lam is None else self.critic_lam

    def _check_groups(self) -> None:
        """Refuse what compares the completions of a prompt where there is one of each."""
        if self.num_generations > 1:
            return
        compared = {
            "length_gate_center=True": self.length_gate_center,
            "length_gate='pass_rate'": self.length_gate == "pass_rate",
            "length_gate_pass_rate": self.length_gate_pass_rate is not None,
        }
        used = [name for name, is_used in compared.items() if is_used]
        if used:
            raise ValueError(
                f"num_generations=1 leaves nothing to compare a completion with, as {', '.join(used)} does: set "
                "num_generations to 2 or more, or leave it out."
            )

    def _check_lambdas(self) -> None:
        if self.critic_lam is not None:
            require_unit(self, "critic_lam")
        require_positive(self, "length_adaptive_alpha")
        if self.length_adaptive_lam and self.task_lam != 1.0:
            raise ValueError(
                f"length_adaptive_lam=True takes the place of task_lam={self.task_lam} for the policy: leave task_lam "
                "at 1, and set critic_lam for the critic's targets."
            )
        if not self.length_adaptive_lam:
            self._refuse_changed(("length_adaptive_alpha",), "length_adaptive_lam=True")
