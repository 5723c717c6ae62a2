"""Whether the frozen length value model still knows the policy's lengths: what is watched, and when it counts as stale.

The policy moves, the model does not. One generation batch is noise, so each of `lenvm/explained_variance`,
`lenvm/calibration_slope`, `lenvm/predicted_length` and `lenvm/realised_length` is averaged over the batches before a
verdict, and the verdict is logged when it changes.
"""

from __future__ import annotations

import json
import logging
import math
import os

from lenvm_rl.rollouts import atomic_file
from lenvm_rl.trainers.refresh_config import RefreshConfig

logger = logging.getLogger(__name__)

STATE_FILE = "length_value_drift.json"
WATCHED = ("explained_variance", "calibration_slope", "predicted_length", "realised_length")
# Generation batches after which a batch counts half; and before which there is no verdict.
HALF_LIFE = 5.0
FIRST_VERDICT = 5


class Drift:
    """Moving averages of how well a length value model fits the completions of a run, and the verdict on it.

    Args:
        args ([`~lenvm_rl.trainers.refresh_config.RefreshConfig`]): with `stale_explained_variance`, `stale_factor`.
    """

    def __init__(self, args: RefreshConfig):
        self._args = args
        self.reset()

    def reset(self) -> None:
        """Forget everything: the model has just been re-fitted."""
        self.averages: dict[str, float] = {}
        self.batches, self.stale = 0, False

    def observe(self, metrics: dict[str, float]) -> dict[str, float]:
        """Take in what a training batch measured.

        Args:
            metrics (`dict[str, float]`): of [`~lenvm_rl.trainers.metrics.value_metrics`]; NaN is left out.

        Returns:
            `dict[str, float]`: `lenvm/stale`, 1 while the model counts as stale; a warning is logged when it begins to.
        """
        keep = 0.5 ** (1.0 / HALF_LIFE)
        for name in WATCHED:
            value = metrics[f"lenvm/{name}"]
            if not math.isnan(value):
                before = self.averages.get(name, value)
                self.averages[name] = keep * before + (1.0 - keep) * value
        self.batches += 1
        reasons = self.reasons() if self.batches >= FIRST_VERDICT else []
        if reasons and not self.stale:
            logger.warning(
                "the length value model has become stale: %s. Set refresh_steps, or sample from the policy of today "
                "and pretrain it again.",
                "; ".join(reasons),
            )
        self.stale = bool(reasons)
        return {"lenvm/stale": float(self.stale)}

    def reasons(self) -> list[str]:
        """Why the model counts as stale; empty if it does not."""
        args, found = self._args, []
        explained = self.averages.get("explained_variance", math.inf)
        if explained < args.stale_explained_variance:
            found.append(
                f"it explains {explained:.2f} of the variance of the return (stale_explained_variance="
                f"{args.stale_explained_variance:g})"
            )
        slope = self.averages.get("calibration_slope", 1.0)
        if not 1.0 / args.stale_factor <= slope <= args.stale_factor:
            found.append(f"its calibration slope is {slope:.2f} (stale_factor={args.stale_factor:g})")
        predicted, realised = (self.averages.get(f"{name}_length", 0.0) for name in ("predicted", "realised"))
        # The end of sequence counted, so that a policy that writes nothing else divides by 1.
        ratio = (predicted + 1.0) / (realised + 1.0)
        if not 1.0 / args.stale_factor <= ratio <= args.stale_factor:
            found.append(
                f"it predicts {predicted:.1f} tokens where {realised:.1f} are written (stale_factor="
                f"{args.stale_factor:g})"
            )
        return found

    def save(self, folder: str) -> None:
        """Write the state into a checkpoint."""
        state = {"averages": self.averages, "batches": self.batches, "stale": self.stale}
        with atomic_file(os.path.join(folder, STATE_FILE)) as file:
            file.write(json.dumps(state, indent=2).encode())

    def load(self, folder: str) -> None:
        """Go on from the state in a checkpoint; one that was written without a length value model has none."""
        path = os.path.join(folder, STATE_FILE)
        if not os.path.isfile(path):
            logger.info(
                "the checkpoint '%s' does not say how the length value model has drifted: starting anew", folder
            )
            return
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        self.averages, self.batches, self.stale = state["averages"], state["batches"], state["stale"]
