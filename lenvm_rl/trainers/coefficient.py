"""The weight of the length stream while a run goes on: a constant, warmed up, or steered by what the run measures."""

import json
import math
import os

from lenvm_rl.controllers import FloorController, TargetController
from lenvm_rl.files import atomic_file
from lenvm_rl.trainers.coefficient_config import CoefficientConfig

STATE_FILE = "length_coef.json"
# Generation batches that a controller of the length looks ahead: about as far as Adam's momentum carries a policy.
HORIZON = 6.0


class LengthCoefficient:
    """`length_coef` of a run, see [`~lenvm_rl.trainers.coefficient_config.CoefficientConfig`].

    All processes hold the same: the measurements are those of all of them.

    Args:
        args ([`CoefficientConfig`]): of the run.
    """

    def __init__(self, args: CoefficientConfig):
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
            floor = args.accuracy_floor + args.accuracy_margin
            self.controller = FloorController(floor, args.length_coef_rate, args.accuracy_half_life, **settings)

    def at(self, step: int) -> float:
        """The coefficient of completions that are sampled after `step` optimizer steps of the policy."""
        if self.controller is not None:
            return self.controller.setting
        if self.args.length_coef_schedule == "linear":
            return self.args.length_coef * min(step / self.args.length_coef_warmup_steps, 1.0)
        return self.args.length_coef

    def observe(self, metrics: dict[str, float], is_paid: bool = True) -> dict[str, float]:
        """Move the coefficient of the batches to come by what this one measured; nothing measured moves nothing.

        Args:
            metrics (`dict`): what [`~lenvm_rl.trainers.metrics.completion_metrics`] says of it, NaN for nothing.
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

    def save(self, folder: str) -> None:
        """Write the state of a steered coefficient into a checkpoint; any other follows from the step."""
        if self.controller is not None:
            state = {"steering": self.args.steering, **self.controller.state_dict()}
            with atomic_file(os.path.join(folder, STATE_FILE)) as file:
                file.write(json.dumps(state, indent=2).encode())

    def load(self, folder: str) -> None:
        """Go on from the state in a checkpoint.

        Raises:
            `FileNotFoundError`: the checkpoint was written without steering.
            `ValueError`: it was steered by something else, or by an earlier version of this.
        """
        if self.controller is None:
            return
        path = os.path.join(folder, STATE_FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"The checkpoint '{folder}' has no file '{STATE_FILE}', so length_coef was not steered there: resume "
                "with the settings of that run, or start a new run from its weights."
            )
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        if state["steering"] != self.args.steering:
            raise ValueError(
                f"The checkpoint '{folder}' steered length_coef by '{state['steering']}', this run does by "
                f"'{self.args.steering}': resume with the settings of that run, or start a new run from its weights."
            )
        try:
            self.controller.load_state_dict(state)
        except ValueError as error:
            raise ValueError(
                f"The checkpoint '{folder}' was written by an earlier version, which steered length_coef otherwise "
                f"({error}): resume with that version, or start a new run from its weights."
            ) from error
