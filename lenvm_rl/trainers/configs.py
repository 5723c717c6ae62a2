"""Arguments of the trainers: everything of `trl.GRPOConfig`, and what a length value model adds to it."""

import math
from dataclasses import dataclass, field

from trl import GRPOConfig

from lenvm_rl.shaping import check_shaping_gamma

GATES = ("all", "correct")
POTENTIALS = ("value", "length")
TRUNCATIONS = ("terminal", "bootstrap")
TASK_BASELINES = ("group", "batch")


@dataclass
class LenVMConfig(GRPOConfig):
    """What [`LenVMGRPOConfig`] and [`LenVMPPOConfig`] share: the length stream, its gate, and shaping.

    Args:
        length_coef (`float`, *optional*, defaults to `0.0`):
            Weight s of the length stream in ``A = A_task + s * A_len`` (arXiv 2604.27039, appendix C.2). Positive
            shortens, negative lengthens, 0 leaves TRL as it is.
        length_lam (`float`, *optional*, defaults to `1.0`): lambda of the length stream's GAE, in [0, 1].
        length_gate (`str`, *optional*, defaults to `"correct"`):
            `"correct"`: only correct completions are paid for length. `"all"`: every completion is.
        gate_reward (`str`, *optional*):
            Name of the reward function that says what is correct; the first one when unset.
        gate_threshold (`float`, *optional*, defaults to `0.5`):
            A completion is correct where the raw value of that function, without weight, is above this.
        length_gate_center (`bool`, *optional*, defaults to `False`):
            Whether the gated stream is centred over the group's correct completions, see
            [`~lenvm_rl.trainers.streams.centered_gated_advantage`]. Needs `length_gate="correct"`, `length_lam=1`.
        shaping_coef (`float`, *optional*, defaults to `0.0`):
            Weight of potential-based shaping (arXiv 2604.27039, appendix C.3; Ng et al., 1999).
        shaping_potential (`str`, *optional*, defaults to `"value"`):
            `"value"`: ``Phi = V``. `"length"`: ``Phi = -n / max_completion_length``, n in tokens.
        shaping_gamma (`float`, *optional*): discount of the shaping term; `task_gamma` when unset.
        allow_gamma_mismatch (`bool`, *optional*, defaults to `False`):
            Whether `shaping_gamma` may differ from `task_gamma`. Such shaping changes what is optimal.
        task_gamma (`float`, *optional*, defaults to `1.0`): discount of the task return, in (0, 1].
        task_lam (`float`, *optional*, defaults to `1.0`):
            Lambda of the task stream's GAE, in [0, 1]. The task pays once, at the end: below 1 the reward that reaches
            a token fades by lambda for every token after it (0.95 leaves 0.6 % of it after 100 tokens, and the rest is
            the critic's guess), so the unbiased 1 is the default, as for long chains of thought elsewhere
            (arXiv 2503.24290). It serves the policy and the critic's targets alike; arXiv 2503.01491 takes 0.95 for
            the one and 1 for the other, which is not offered.

        rollout_guidance (`dict`, *optional*):
            Guide the rollouts of training (not those of evaluation) in length: the fields of
            [`~lenvm_rl.decoding.LengthGuidance`] but temperature, top_k, top_p and min_p, which are the trainer's. Such
            completions are off-policy, see `lenvm_rl.trainers.guided_rollouts`.
        rollout_ratio_max (`float`, *optional*, defaults to `3.0`):
            Truncation of the importance ratio that each token of a guided rollout is weighed by, above 0.

    Raises:
        `ValueError`: a value is out of its bounds, or two values exclude each other.
    """

    # What may come from the command line as JSON.
    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "rollout_guidance"]

    length_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the length stream in A = A_task + length_coef * A_len. Positive shortens, negative "
            "lengthens, 0 leaves TRL as it is. Start small (0.1) and watch accuracy next to length."
        },
    )
    length_lam: float = field(
        default=1.0,
        metadata={
            "help": "Lambda of the length stream's GAE, in [0, 1]. At 1 the length value model is only a baseline; "
            "below 1 its errors enter the gradient in exchange for less variance."
        },
    )
    length_gate: str = field(
        default="correct",
        metadata={
            "help": "Who is paid for length: 'correct' (only completions that gate_reward calls correct) or 'all' "
            "(every completion; with a large length_coef the policy learns to answer at once, right or wrong).",
            "choices": GATES,
        },
    )
    gate_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function whose raw value says what is correct. Default: the first one. It is "
            "also used for the metrics of correct completions."
        },
    )
    gate_threshold: float = field(
        default=0.5,
        metadata={"help": "A completion is correct where the raw value of gate_reward is above this."},
    )
    length_gate_center: bool = field(
        default=False,
        metadata={
            "help": "Centre the gated length stream over the correct completions of each group, so that no length "
            "value model can push the chance to be correct. Needs length_gate='correct' and length_lam=1."
        },
    )
    rollout_guidance: dict | str | None = field(
        default=None,
        metadata={
            "help": "Guide the rollouts of training in length: fields of LengthGuidance as JSON, such as "
            "'{\"strength\": 2.0}'. They are off-policy then, and each token is weighed by its importance ratio."
        },
    )
    rollout_ratio_max: float = field(
        default=3.0, metadata={"help": "Truncation of the importance ratio of the tokens of guided rollouts."}
    )
    shaping_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of potential-based shaping with the length value model as the potential. It changes how a "
            "policy learns, not what is optimal: it does not shorten completions."
        },
    )
    shaping_potential: str = field(
        default="value",
        metadata={
            "help": "The potential: 'value' (V, flat far from the end) or 'length' (minus the predicted tokens to "
            "come, divided by max_completion_length).",
            "choices": POTENTIALS,
        },
    )
    shaping_gamma: float | None = field(
        default=None,
        metadata={"help": "Discount of the shaping term. Default: task_gamma, the only one that is potential-based."},
    )
    allow_gamma_mismatch: bool = field(
        default=False,
        metadata={"help": "Allow a shaping_gamma that is not task_gamma. Such shaping changes what is optimal."},
    )
    task_gamma: float = field(
        default=1.0,
        metadata={"help": "Discount of the task return, in (0, 1]. It is not the length value model's gamma."},
    )
    task_lam: float = field(
        default=1.0,
        metadata={
            "help": "Lambda of the task stream's GAE, in [0, 1]. 1 is unbiased; lower values let the critic stand in "
            "for a reward that comes only at the end."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        _check_finite(self, "length_coef", "shaping_coef", "gate_threshold")
        _check_unit(self, "length_lam", "task_lam")
        if not 0.0 < self.task_gamma <= 1.0:
            raise ValueError(f"task_gamma={self.task_gamma} is not in (0, 1]; 1 is the usual choice.")
        _check_choice(self, "length_gate", GATES)
        _check_choice(self, "shaping_potential", POTENTIALS)
        if self.shaping_gamma is not None and not 0.0 < self.shaping_gamma <= 1.0:
            raise ValueError(f"shaping_gamma={self.shaping_gamma} is not in (0, 1]; leave it unset to use task_gamma.")
        check_shaping_gamma(self.shaping_gamma, self.task_gamma, self.allow_gamma_mismatch)
        if isinstance(self.rollout_guidance, str):
            raise ValueError(f"rollout_guidance={self.rollout_guidance!r} is no JSON object: write it as '{{...}}'.")
        if not (math.isfinite(self.rollout_ratio_max) and self.rollout_ratio_max > 0):
            raise ValueError(f"rollout_ratio_max={self.rollout_ratio_max} must be positive; 3.0 is the default.")
        if self.length_gate_center and self.length_gate != "correct":
            raise ValueError(
                f"length_gate_center=True centres the stream of the correct completions, but length_gate="
                f"'{self.length_gate}' pays every completion: set length_gate='correct', or leave the centring out."
            )
        if self.length_gate_center and self.length_lam != 1.0:
            raise ValueError(
                f"length_gate_center=True needs length_lam=1, not {self.length_lam}: below 1 the stream depends on the "
                "length value model whatever is subtracted from it."
            )

    @property
    def shaping_discount(self) -> float:
        """The discount F is computed with."""
        return self.task_gamma if self.shaping_gamma is None else self.shaping_gamma

    @property
    def needs_length_value_model(self) -> bool:
        """Whether something is set that only a length value model can serve."""
        return self.length_coef != 0.0 or self.shaping_coef != 0.0 or self.rollout_guidance is not None


@dataclass
class LenVMGRPOConfig(LenVMConfig):
    """Arguments of [`LenVMGRPOTrainer`]: those of `trl.GRPOConfig` and of [`LenVMConfig`].

    `loss_type="dr_grpo"` is the advisable one with a length stream: `"grpo"` and `"sapo"` divide by each completion's
    own length, which is a length bias of its own, and after which the length value model is no pure baseline any more.
    """


@dataclass
class LenVMPPOConfig(LenVMConfig):
    """Arguments of [`LenVMPPOTrainer`]: those of `trl.GRPOConfig` and [`LenVMConfig`], and those of the task critic.

    Args:
        num_generations (`int`, *optional*, defaults to `2`):
            Completions per prompt. PPO needs no groups, and TRL takes no fewer than 2. Raise it where groups are
            used: `length_gate_center`, or `critic="lenvm"` with `task_baseline="group"`.
        critic_init (`str`, *optional*, defaults to `"policy"`):
            Whose decoder a learned critic starts from: `"policy"`, `"lenvm"`, or a folder or hub id.
        critic_learning_rate (`float`, *optional*, defaults to `1e-5`):
            Peak learning rate of the critic; it follows the policy's schedule. Ten times the policy's default.
        vf_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the value loss, ``vf_coef * mean(1/2 (V - R)^2)``. The critic shares no weights with the policy,
            so this only scales its gradient against `max_grad_norm`.
        cliprange_value (`float`, *optional*, defaults to `0.2`):
            How far a value may move from the one at sampling time before its loss is clipped; `None` for no clipping.
        whiten (`bool`, *optional*, defaults to `True`):
            Whether the task advantages (shaping included) are shifted and scaled to mean 0 and standard deviation 1
            over all tokens of a generation batch, *before* the length stream is added. So `length_coef` counts in
            standard deviations of the task: whitening the sum would make the weight of either stream depend on the
            spread of the other.
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
            "help": "Completions per prompt. PPO needs no groups, and TRL takes no fewer than 2; raise it where groups "
            "are used (length_gate_center, or critic='lenvm' with task_baseline='group')."
        },
    )
    critic_init: str = field(
        default="policy",
        metadata={"help": "Whose decoder a learned critic starts from: 'policy', 'lenvm', or a folder or hub id."},
    )
    critic_learning_rate: float = field(
        default=1e-5,
        metadata={"help": "Peak learning rate of the task critic; it follows the policy's schedule."},
    )
    vf_coef: float = field(default=1.0, metadata={"help": "Weight of the value loss, above 0."})
    cliprange_value: float | None = field(
        default=0.2,
        metadata={"help": "Range of value clipping around the values at sampling time. None: no clipping."},
    )
    whiten: bool = field(
        default=True,
        metadata={
            "help": "Whiten the task advantages (shaping included) over the generation batch before the length stream "
            "is added: length_coef then counts in standard deviations of the task."
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
        super().__post_init__()
        _check_positive(self, "critic_learning_rate", "vf_coef")
        if self.cliprange_value is not None:
            _check_positive(self, "cliprange_value")
        _check_choice(self, "truncation", TRUNCATIONS)
        _check_choice(self, "task_baseline", TASK_BASELINES)


def _check_finite(config, *names) -> None:
    for name in names:
        if not math.isfinite(getattr(config, name)):
            raise ValueError(f"{name}={getattr(config, name)} is not a finite number.")


def _check_unit(config, *names) -> None:
    for name in names:
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise ValueError(f"{name}={getattr(config, name)} is not in [0, 1].")


def _check_positive(config, *names) -> None:
    for name in names:
        if not 0.0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} is not a finite number above 0.")


def _check_choice(config, name, choices) -> None:
    if getattr(config, name) not in choices:
        raise ValueError(f"{name}='{getattr(config, name)}' is unknown; choose one of {', '.join(choices)}.")
