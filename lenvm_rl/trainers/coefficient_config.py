"""Arguments of `length_coef`: a constant, warmed up, or steered toward a mean length or along a floor of accuracy."""

import math
from dataclasses import dataclass, field

from trl import GRPOConfig

from lenvm_rl.trainers.config_checks import require_choice, require_finite, require_positive, require_unit

SCHEDULES = ("constant", "linear")
# What only a steered coefficient reads.
STEERING = ("length_coef_rate", "length_coef_proportional", "length_coef_min", "length_coef_max")
FLOOR = ("accuracy_margin", "accuracy_half_life")


@dataclass
class CoefficientConfig(GRPOConfig):
    """Arguments of `trl.GRPOConfig`, and how the weight of the length stream moves.

    A steered coefficient belongs to the generation batch after those that it was measured on: one that depended on the
    completions it weighs would make the length value model more than a baseline.

    Args:
        length_coef (`float`, *optional*, defaults to `0.0`):
            Weight s of the length stream in ``A = A_task + s * A_len`` (arXiv 2604.27039, appendix C.2). Positive
            shortens, negative lengthens, 0 leaves TRL as it is. Where it is steered, the weight at the start.
        length_coef_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"`, or `"linear"`: from 0 at the first step to `length_coef` after `length_coef_warmup_steps`.
        length_coef_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps of the linear warm-up. Steps in which only a critic learns do not count.
        length_target (`float`, *optional*):
            Steer the coefficient so that the mean length of a generation batch is this, in tokens, EOS not counted (cut
            completions count with what they have). To hold it, the coefficient goes below 0 where they are too short.
            With `length_coef_min=0` it is a budget: nothing is lengthened, and where no reward pulls at the length, it
            ends well below.
        accuracy_floor (`float`, *optional*):
            Steer the coefficient to the most that keeps accuracy: it grows while the moving average of `length/correct`
            is above `accuracy_floor + accuracy_margin`, and shrinks while it is below.
        accuracy_margin (`float`, *optional*, defaults to `0.0`): distance that is kept from the floor, 0 or more.
        accuracy_half_life (`float`, *optional*, defaults to `10.0`):
            Generation batches after which a batch counts half in the moving average. It should cover enough completions
            to tell the margin from noise, and be short against the time in which the policy reacts.
        length_coef_rate (`float`, *optional*, defaults to `0.02`):
            Change of a steered coefficient per generation batch for an error of 1. The error of a mean length is the
            logarithm of its ratio to the target (so 1 is 2.7 times as long), the error of an accuracy its distance from
            the floor.
        length_coef_proportional (`float`, *optional*, defaults to `2.0`):
            What an error of 1 adds to a steered coefficient while it lasts, 0 or more. A policy's length moves as long
            as the coefficient is not 0, so what only adds up (0 here) swings about the target (arXiv 2007.03964).
        length_coef_min (`float`, *optional*):
            Lower bound of a steered coefficient. When unset, `-length_coef_max` with `length_target`, and 0 with
            `accuracy_floor`.
        length_coef_max (`float`, *optional*, defaults to `1.0`): upper bound of a steered coefficient.

    Raises:
        `ValueError`: a value is out of its bounds, or two values exclude each other.
    """

    length_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the length stream in A = A_task + length_coef * A_len. Positive shortens, negative "
            "lengthens, 0 leaves TRL as it is. Start small (0.1) and watch accuracy next to length."
        },
    )
    length_coef_schedule: str = field(
        default="constant",
        metadata={
            "help": "'constant', or 'linear': from 0 to length_coef over length_coef_warmup_steps.",
            "choices": SCHEDULES,
        },
    )
    length_coef_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps of the linear warm-up of length_coef."}
    )
    length_target: float | None = field(
        default=None,
        metadata={"help": "Steer length_coef until completions have this mean length, in tokens, EOS not counted."},
    )
    accuracy_floor: float | None = field(
        default=None,
        metadata={"help": "Steer length_coef to the most that keeps the share of correct completions above this."},
    )
    accuracy_margin: float = field(
        default=0.0, metadata={"help": "Distance that is kept from accuracy_floor, 0 or more."}
    )
    accuracy_half_life: float = field(
        default=10.0, metadata={"help": "Half-life of the moving average of accuracy, in generation batches."}
    )
    length_coef_rate: float = field(
        default=0.02,
        metadata={
            "help": "Change of a steered length_coef per generation batch, for completions of 2.7 times the target or "
            "an accuracy of 1 above the floor."
        },
    )
    length_coef_proportional: float = field(
        default=2.0,
        metadata={
            "help": "What completions of 2.7 times the target, or an accuracy of 1 above the floor, add to a steered "
            "length_coef while that lasts: it damps swings about the target."
        },
    )
    length_coef_min: float | None = field(
        default=None,
        metadata={
            "help": "Lower bound of a steered length_coef. Default: -length_coef_max with length_target (0 makes the "
            "target a budget: nothing is lengthened), 0 with accuracy_floor."
        },
    )
    length_coef_max: float = field(default=1.0, metadata={"help": "Upper bound of a steered length_coef."})

    def __post_init__(self):
        super().__post_init__()
        require_finite(self, "length_coef", "length_coef_max")
        if self.length_coef_min is not None:
            require_finite(self, "length_coef_min")
        require_choice(self, "length_coef_schedule", SCHEDULES)
        if self.length_coef_schedule == "linear":
            self._check_warmup()
        elif self.length_coef_warmup_steps != 0:
            raise ValueError(
                f"length_coef_warmup_steps={self.length_coef_warmup_steps} needs length_coef_schedule='linear'."
            )
        if self.steering is None:
            self._refuse_changed((*STEERING, *FLOOR), "length_target or accuracy_floor")
        else:
            self._check_steering()

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

    def _check_warmup(self) -> None:
        if self.length_coef_warmup_steps < 1:
            raise ValueError(
                f"length_coef_schedule='linear' needs length_coef_warmup_steps of 1 or more, not "
                f"{self.length_coef_warmup_steps}."
            )
        if self.steering is not None:
            raise ValueError(
                "length_coef_schedule='linear' and length_target or accuracy_floor both move length_coef: leave one of "
                "them out (a steered coefficient starts at length_coef and grows at length_coef_rate by itself)."
            )
        if self.length_coef == 0.0:
            raise ValueError("length_coef_schedule='linear' leads to length_coef, which is 0: set length_coef.")

    def _check_steering(self) -> None:
        if self.length_target is not None and self.accuracy_floor is not None:
            raise ValueError(
                f"length_target={self.length_target} and accuracy_floor={self.accuracy_floor} both steer length_coef: "
                "leave one of them out."
            )
        require_positive(self, "length_coef_rate")
        if not 0.0 <= self.length_coef_proportional < math.inf:
            raise ValueError(
                f"length_coef_proportional={self.length_coef_proportional} is not a finite number, 0 or more."
            )
        lowest, highest = self.coefficient_bounds
        if not lowest <= self.length_coef <= highest:
            raise ValueError(
                f"length_coef={self.length_coef}, where a steered coefficient starts, is not in [length_coef_min, "
                f"length_coef_max] = [{lowest}, {highest}]: change it or the bounds."
            )
        if self.length_target is not None:
            require_positive(self, "length_target")
            self._refuse_changed(FLOOR, "accuracy_floor")
            return
        require_unit(self, "accuracy_floor", "accuracy_margin")
        require_positive(self, "accuracy_half_life")
        if self.accuracy_floor + self.accuracy_margin >= 1.0:
            raise ValueError(
                f"accuracy_floor + accuracy_margin = {self.accuracy_floor + self.accuracy_margin} can never be "
                "exceeded, so the coefficient would only shrink: lower one of them."
            )
        if lowest < 0.0:
            raise ValueError(
                f"length_coef_min={self.length_coef_min} with accuracy_floor would pay for length where accuracy is "
                "below the floor: set it to 0 or more."
            )

    def _refuse_changed(self, names: tuple[str, ...], reader: str) -> None:
        """Refuse arguments that nothing reads."""
        changed = [name for name in names if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if changed:
            raise ValueError(f"{', '.join(changed)} is read with {reader} only: set that too, or leave it out.")
