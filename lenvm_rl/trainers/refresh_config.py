"""Arguments of re-fitting the length value model while a policy is trained, and of noticing that it is stale."""

from dataclasses import dataclass, field

from lenvm_rl.trainers.coefficient_config import CoefficientConfig
from lenvm_rl.trainers.config_checks import require_finite, require_positive

# What only a refresh reads.
REFRESH = (
    "refresh_completions",
    "refresh_epochs",
    "refresh_batch_size",
    "refresh_learning_rate",
    "refresh_only_correct",
)


@dataclass
class RefreshConfig(CoefficientConfig):
    """Arguments of [`~lenvm_rl.trainers.coefficient_config.CoefficientConfig`], of refresh and of staleness.

    A refresh happens between two phases: before completions are sampled, on completions of earlier batches. What the
    model then says of the new ones does not depend on how they turned out, so it remains a baseline.

    Args:
        refresh_steps (`int`, *optional*, defaults to `0`):
            Re-fit the length value model after every so many optimizer steps, and freeze it again; 0 is never. Its
            gamma stays. It changes the model that was given to the trainer, and checkpoints hold it.
        refresh_completions (`int`, *optional*, defaults to `2048`):
            How many completions, the latest of all processes, it is re-fitted on.
        refresh_epochs (`int`, *optional*, defaults to `1`): passes over them in a re-fit.
        refresh_batch_size (`int`, *optional*, defaults to `64`):
            Completions per optimizer step of the re-fit, of all processes.
        refresh_learning_rate (`float`, *optional*, defaults to `1e-5`):
            Constant learning rate of the re-fit (AdamW, a new one each time).
        refresh_only_correct (`bool`, *optional*, defaults to `False`):
            Re-fit on correct completions only: the V that `length_gate="correct"` asks for.
        stale_explained_variance (`float`, *optional*, defaults to `0.0`):
            The model counts as stale while the moving average of `lenvm/explained_variance` is below this.
        stale_factor (`float`, *optional*, defaults to `2.0`):
            So it does while `lenvm/calibration_slope`, or predicted over realised length, is above this or below its
            inverse; above 1.

    Raises:
        `ValueError`: a value is out of its bounds, or is set without `refresh_steps`.
    """

    refresh_steps: int = field(
        default=0, metadata={"help": "Re-fit the length value model after every so many optimizer steps. 0: never."}
    )
    refresh_completions: int = field(
        default=2048, metadata={"help": "How many of the latest completions it is re-fitted on."}
    )
    refresh_epochs: int = field(default=1, metadata={"help": "Passes over the completions in a re-fit."})
    refresh_batch_size: int = field(
        default=64, metadata={"help": "Completions per optimizer step of the re-fit, of all processes."}
    )
    refresh_learning_rate: float = field(default=1e-5, metadata={"help": "Constant learning rate of the re-fit."})
    refresh_only_correct: bool = field(
        default=False, metadata={"help": "Re-fit on correct completions only, for length_gate='correct'."}
    )
    stale_explained_variance: float = field(
        default=0.0, metadata={"help": "Warn while the moving average of lenvm/explained_variance is below this."}
    )
    stale_factor: float = field(
        default=2.0,
        metadata={
            "help": "Warn while lenvm/calibration_slope, or predicted over realised length, is above this or below its "
            "inverse."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.refresh_steps < 0:
            raise ValueError(f"refresh_steps={self.refresh_steps} is negative; 0 is no refresh.")
        for name in ("refresh_completions", "refresh_epochs", "refresh_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1.")
        require_positive(self, "refresh_learning_rate")
        require_finite(self, "stale_explained_variance", "stale_factor")
        if self.stale_factor <= 1.0:
            raise ValueError(f"stale_factor={self.stale_factor} is not above 1; 2 warns of twice and of half.")
        if self.refresh_steps == 0:
            self._refuse_changed(REFRESH, "refresh_steps > 0")
