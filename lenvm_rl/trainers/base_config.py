"""Arguments that both trainers share: everything of `trl.GRPOConfig`, and what a length value model adds to it."""

import math
from dataclasses import dataclass, field

from trl import GRPOConfig

from lenvm_rl.shaping import check_shaping_gamma
from lenvm_rl.trainers.arguments import check_config_names
from lenvm_rl.trainers.config_checks import require_choice, require_finite, require_unit
from lenvm_rl.trainers.refresh_config import RefreshConfig

GATES = ("all", "correct", "pass_rate")
POTENTIALS = ("value", "length")
SHAPING_FORMS = ("rewards", "critic_offset")


@dataclass
class LenVMConfig(RefreshConfig):
    """What [`LenVMGRPOConfig`] and [`LenVMPPOConfig`] share: the length stream, its gate, and shaping.

    Args:
        length_lam (`float`, *optional*, defaults to `1.0`): lambda of the length stream's GAE, in [0, 1].
        length_gate (`str`, *optional*, defaults to `"correct"`):
            `"correct"`: only correct completions are paid for length. `"all"`: every completion is.
            `"pass_rate"`: every one is, times the share p of correct completions among those of its prompt: groups that
            can do it are to be short, groups that cannot are left alone. p depends on the completion itself (by one
            part in `num_generations`) and on the others of its group. The others are no bias: they are drawn
            independently, and the length value model stays a baseline for that part. For the own part it does not, as
            with `"correct"`.
        length_gate_pass_rate (`float`, *optional*):
            Pay for length only in groups where p is at least this, in (0, 1], whatever `length_gate` is. p near the
            threshold turns on a single completion, so here the own part is a gate in full. Both need groups: with few
            generations p takes few values.
        gate_reward (`str`, *optional*):
            Name of the reward function that says what is correct. It may be left out where there is no doubt: one
            function, or penalties around one and the same task reward, with or without that beside them.
        gate_threshold (`float`, *optional*, defaults to `0.5`):
            A completion is correct where the raw value of that function, without weight, is above this. A penalty that
            keeps its task reward's flags ([`~lenvm_rl.trainers.gate.ShapedReward`]) is asked for those instead.
        length_gate_center (`bool`, *optional*, defaults to `False`):
            Whether the gated stream is centred over the group's correct completions, see
            [`~lenvm_rl.trainers.streams.centered_gated_advantage`]. Needs `length_gate="correct"`, `length_lam=1`.
        shaping_coef (`float`, *optional*, defaults to `0.0`):
            Weight of potential-based shaping (arXiv 2604.27039, appendix C.3; Ng et al., 1999).
        shaping_potential (`str`, *optional*, defaults to `"value"`):
            `"value"`: ``Phi = V``. `"length"`: ``Phi = -n / max_completion_length``, n in tokens.
        shaping_form (`str`, *optional*, defaults to `"rewards"`):
            `"rewards"`: ``F_t = gamma * Phi(s_{t+1}) - Phi(s_t)`` is added to the rewards, and a critic learns the
            shaped return. `"critic_offset"`: ``Phi`` is added to the critic's values (to 0 where there is no critic)
            and the rewards stay as they are. The advantages are the same (docs/mathematics.md, theorem 6), up to
            rounding; what differs is what the critic's metrics speak of.
        shaping_gamma (`float`, *optional*): discount of the shaping term; `task_gamma` when unset.
        allow_gamma_mismatch (`bool`, *optional*, defaults to `False`):
            Whether `shaping_gamma` may differ from `task_gamma`. Such shaping changes what is optimal.
        task_gamma (`float`, *optional*, defaults to `1.0`): discount of the task return, in (0, 1].
        task_lam (`float`, *optional*, defaults to `1.0`):
            Lambda of the task stream's GAE, in [0, 1]. The task pays once, at the end: below 1 the reward that reaches
            a token fades by lambda for every token after it (0.95 leaves 0.6 % of it after 100 tokens, and the rest is
            the critic's guess), so the unbiased 1 is the default, as for long chains of thought elsewhere
            (arXiv 2503.24290). In PPO it serves the policy and the critic's targets, unless `critic_lam` is set.
        rollout_guidance (`dict`, *optional*):
            Guide the rollouts of training (not those of evaluation) in length: the fields of
            [`~lenvm_rl.decoding.generation.LengthGuidance`] but temperature, top_k, top_p and min_p, which are the
            trainer's. Such completions are off-policy, see `lenvm_rl.trainers.rollouts`.
        rollout_ratio_max (`float`, *optional*, defaults to `3.0`):
            Truncation of the importance ratio that each token of a guided rollout is weighed by, above 0.

    Raises:
        `ValueError`: a value is out of its bounds, or two values exclude each other.
        `TypeError`: a field is one of an older PPO config; what stands for it is said.
    """

    # What may come from the command line as JSON.
    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "rollout_guidance"]

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
            "help": "Who is paid for length: 'correct' (only completions that gate_reward calls correct), 'all' "
            "(every completion; with a large length_coef the policy learns to answer at once, right or wrong) or "
            "'pass_rate' (every completion, times the share of correct ones among those of its prompt).",
            "choices": GATES,
        },
    )
    length_gate_pass_rate: float | None = field(
        default=None,
        metadata={"help": "Pay for length only where at least this share of a prompt's completions is correct."},
    )
    gate_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function whose raw value says what is correct, needed where there are several "
            "that differ in that. It is also used for the metrics of correct completions."
        },
    )
    gate_threshold: float = field(
        default=0.5, metadata={"help": "A completion is correct where the raw value of gate_reward is above this."}
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
    shaping_form: str = field(
        default="rewards",
        metadata={
            "help": "How shaping comes in: 'rewards' (F is added to the rewards) or 'critic_offset' (the potential is "
            "added to the critic's values). The advantages are the same.",
            "choices": SHAPING_FORMS,
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

    def __new__(cls, *arguments, **fields):
        check_config_names(cls.__name__, fields)
        return super().__new__(cls)

    def __post_init__(self):
        super().__post_init__()
        require_finite(self, "shaping_coef", "gate_threshold")
        require_unit(self, "length_lam", "task_lam")
        if not 0.0 < self.task_gamma <= 1.0:
            raise ValueError(f"task_gamma={self.task_gamma} is not in (0, 1]; 1 is the usual choice.")
        require_choice(self, "length_gate", GATES)
        require_choice(self, "shaping_potential", POTENTIALS)
        require_choice(self, "shaping_form", SHAPING_FORMS)
        if self.shaping_gamma is not None and not 0.0 < self.shaping_gamma <= 1.0:
            raise ValueError(f"shaping_gamma={self.shaping_gamma} is not in (0, 1]; leave it unset to use task_gamma.")
        check_shaping_gamma(self.shaping_gamma, self.task_gamma, self.allow_gamma_mismatch)
        if self.shaping_form == "critic_offset" and self.shaping_discount != self.task_gamma:
            raise ValueError(
                f"shaping_form='critic_offset' has no discount of its own, but shaping_gamma={self.shaping_gamma} is "
                f"not task_gamma={self.task_gamma}: leave shaping_gamma out, or set shaping_form='rewards'."
            )
        if isinstance(self.rollout_guidance, str):
            raise ValueError(f"rollout_guidance={self.rollout_guidance!r} is no JSON object: write it as '{{...}}'.")
        if not (math.isfinite(self.rollout_ratio_max) and self.rollout_ratio_max > 0):
            raise ValueError(f"rollout_ratio_max={self.rollout_ratio_max} must be positive; 3.0 is the default.")
        rate = self.length_gate_pass_rate
        if rate is not None and not 0.0 < rate <= 1.0:
            raise ValueError(f"length_gate_pass_rate={rate} is not in (0, 1]; leave it unset for no threshold.")
        if rate is not None and self.length_gate_center:
            raise ValueError(
                f"length_gate_pass_rate={rate} is a gate of its own, under which length_gate_center=True no longer "
                "takes the length value model out: leave one of them out."
            )
        if self.length_gate_center and self.length_gate != "correct":
            raise ValueError(
                f"length_gate_center=True centres the stream of the correct completions, but length_gate="
                f"'{self.length_gate}' pays the others too: set length_gate='correct', or leave the centring out."
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
    def gate_users(self) -> list[str]:
        """The settings, as a person writes them, that have to know which completions are correct."""
        gated = self.has_length_stream and self.length_gate != "all"
        thresholded = self.has_length_stream and self.length_gate_pass_rate is not None
        users = {
            f"length_gate='{self.length_gate}'": gated,
            f"length_gate_pass_rate={self.length_gate_pass_rate}": thresholded,
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
