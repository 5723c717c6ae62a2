"""The weight of the length stream while a run goes on: a constant, warmed up, or steered by what the run measures."""

from __future__ import annotations

import math
from typing import Any

from lenvm_rl.controllers import FloorController, TargetController
from lenvm_rl.trainers.config import LenVMConfig

# Generation batches that a controller of the length looks ahead: about as far as Adam's momentum carries a policy.
HORIZON = 6.0
# Generation batches after which a batch counts half in the moving average of accuracy: enough completions to tell a
# percent from noise, and short against the time in which a policy reacts.
HALF_LIFE = 10.0


class LengthCoefficient:
    """`length_coef` of a run, see [`~lenvm_rl.trainers.config.LenVMConfig`].

    All processes hold the same, since each sees what all of them measured.
    """

    def __init__(self, args: LenVMConfig):
        self.args = args
        settings = {
            "initial": args.length_coef,
            "minimum": args.coefficient_bounds[0],
            "maximum": args.coefficient_bounds[1],
            "proportional": args.length_coef_proportional,
        }
        self.controller: TargetController | FloorController | None = None
        if args.steering == "target":
            self.controller = TargetController(args.length_target, args.length_coef_rate, horizon=HORIZON, **settings)
        elif args.steering == "floor":
            self.controller = FloorController(args.accuracy_floor, args.length_coef_rate, HALF_LIFE, **settings)

    def at(self, step: int) -> float:
        """The coefficient of completions that are sampled after `step` optimizer steps of the policy."""
        if self.controller is not None:
            return self.controller.setting
        if self.args.length_coef_warmup_steps > 0:
            return self.args.length_coef * min(step / self.args.length_coef_warmup_steps, 1.0)
        return self.args.length_coef

    def observe(self, metrics: dict[str, float], is_paid: bool = True) -> dict[str, float]:
        """Move the coefficient of the batches to come by what this one measured; nothing measured moves nothing.

        Args:
            metrics (`dict`): what [`~lenvm_rl.trainers.metrics.add_completions`] says of it, NaN for nothing.
            is_paid (`bool`, *optional*, defaults to `True`):
                Whether its length stream pays anybody. Where nobody is (the gate is closed), no length answers the
                coefficient, so the error does not add up.

        Returns:
            `dict[str, float]`: `steering/accuracy`, the moving average, where accuracy is what steers.
        """
        if self.args.steering == "target":
            self.controller.update(metrics["length/mean"], is_answer=is_paid)
        elif self.args.steering == "floor":
            if not math.isnan(metrics["length/correct"]):
                self.controller.update(metrics["length/correct"])
            return {"steering/accuracy": self.controller.average}
        return {}

    def state_dict(self) -> dict[str, Any] | None:
        """The state of a steered coefficient; any other follows from the step."""
        return self.controller and {"steering": self.args.steering, **self.controller.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a state; a `ValueError` if it was steered otherwise, or not at all."""
        if self.controller is None:
            return
        steering = None if state is None else state["steering"]
        if steering != self.args.steering:
            raise ValueError(
                f"length_coef was steered by {steering} there, and is by {self.args.steering} here (length_target, "
                "accuracy_floor): resume with the settings of that run, or start a new run from its weights."
            )
        try:
            self.controller.load_state_dict(state)
        except ValueError as error:
            raise ValueError(
                f"An earlier version steered length_coef otherwise ({error}): resume with that version, or start a new "
                "run from the weights of the checkpoint."
            ) from error
