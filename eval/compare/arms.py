"""The arms of `eval.compare`: ways to train for shorter answers, each with the three strengths that it is tried at.

The strength of an arm is the one number that says how much length costs; what it is called is the rule's own matter.
Constants that papers give for thousands of tokens are set for the tens of the sandbox: each arm's middle strength is a
guess that was made before any run, and its neighbours are about half and twice as strong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from trl.rewards import get_soft_overlong_punishment

from reward.length_reward import LengthReward
from reward.sandbox import sandbox_reward

# Strengths of the length stream. PPO whitens the task's stream, so that its deviation is 1 at all times; GRPO's is 0 in
# every group that is right as a whole, and a first guess of PPO's strengths for both cost GRPO accuracy.
COEFFICIENTS, PPO_COEFFICIENTS = (0.75, 1.5, 3.0), (3.0, 6.0, 12.0)
# Re-fits of the length value model along the way, on the latest completions: ten steps of sixteen.
REFRESH = {"refresh_steps": 10, "refresh_completions": 160, "refresh_learning_rate": 1e-3}
# Tokens that a correct answer of the sandbox hardly ever exceeds.
LONG = 128


def task_only(strength: float | None) -> list[Callable]:
    """The task reward alone."""
    return [sandbox_reward]


def rule(name: str, knob: str, **knobs: Any) -> Callable[[float], list[Callable]]:
    """A rule of `reward.rules` that stands in the place of the task reward, with its strength under the name `knob`."""
    return lambda strength: [LengthReward(name, sandbox_reward, **{knob: strength}, **knobs)]


def whole(make: Callable[[int], list[Callable]]) -> Callable[[float], list[Callable]]:
    """Rewards of a strength that is a number of tokens."""
    return lambda strength: make(int(strength))


def kimi_beside_task(strength: float) -> list[Callable]:
    """Kimi's length term, to be added to the task reward with the weight `strength`."""
    return [sandbox_reward, LengthReward("kimi", sandbox_reward)]


@dataclass(frozen=True)
class TrainingArm:
    """A way to train.

    Args:
        name (`str`): unique.
        kind (`str`): `"task"`, `"LenVM"`, `"penalty"`, `"oracle"`, `"control"`, or `"critic"`, which runs where it is
            named alone.
        strengths (tuple of `float`): what it is tried at, the first guess in the middle; empty if there is nothing to
            choose.
        ppo_strengths (tuple of `float`): the same for groups of one, where they are others.
        rewards (`Callable`): from the strength to reward functions.
        weights (`Callable`, *optional*): from the strength to their weights; 1 each when omitted.
        coefficient (`str`, *optional*): the field of the trainer's config that is the strength.
        fields (mapping): further fields of the trainer's config.
        ppo_only (mapping): further keyword arguments of the PPO trainer; where there are some, the arm is of groups of
            one completion alone.
        values (`str`): the folder, in the run's, of the length value model.
        variant (`str`, *optional*): a name in `eval.compare.variants.VARIANTS`: what is different about the trainer.
        least_group (`int`): fewest completions of a prompt that it can compare.
        settings_of (`str`, *optional*): the arm whose learning rate and strength it is run at, as controls are.
    """

    name: str
    kind: Literal["task", "LenVM", "penalty", "oracle", "control", "critic"]
    strengths: tuple[float, ...] = ()
    ppo_strengths: tuple[float, ...] = ()
    rewards: Callable[[float | None], list[Callable]] = task_only
    weights: Callable[[float], list[float]] | None = None
    coefficient: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    ppo_only: Mapping[str, Any] = field(default_factory=dict)
    values: str = "length_value_model"
    variant: str | None = None
    least_group: int = 1
    settings_of: str | None = None

    def tried(self, group_size: int) -> tuple[float, ...]:
        """The strengths that it is tried at with groups of a size."""
        return self.ppo_strengths if group_size == 1 and self.ppo_strengths else self.strengths

    def serves(self, group_size: int) -> bool:
        """Whether the arm means anything with so many completions of a prompt."""
        return group_size >= self.least_group and (group_size == 1 or not self.ppo_only)

    def config_fields(self, strength: float | None) -> dict[str, Any]:
        """Fields of the trainer's config at a strength."""
        own = {} if self.coefficient is None else {self.coefficient: strength}
        weighted = {} if self.weights is None else {"reward_weights": self.weights(strength)}
        return {**self.fields, **own, **weighted}


def dense_stream(name: str, **different: Any) -> TrainingArm:
    """The length stream, gated by correctness, with what is different about it."""
    usual = {"strengths": COEFFICIENTS, "ppo_strengths": PPO_COEFFICIENTS, "coefficient": "length_coef"}
    return TrainingArm(name, **{"kind": "LenVM"} | usual | different)


def control(name: str, **different: Any) -> TrainingArm:
    """The length stream with something else in the place of its values, at the settings of the original."""
    return dense_stream(name, **{"kind": "control", "settings_of": LENVM} | different)


def critic(name: str, **fields: Any) -> TrainingArm:
    """PPO with another task critic, at the settings of the original."""
    return dense_stream(name, kind="critic", settings_of=LENVM, fields=fields, ppo_only={"critic": "learned"})


# A critic that shares a decoder needs one that is frozen, the reference's: present, and too weak to pull.
REFERENCE = {"beta": 1e-3}
TASK_ONLY, LENVM, LENVM_95 = "task only", "LenVM, lambda 1", "LenVM, lambda 0.95"
ARMS: Sequence[TrainingArm] = (
    TrainingArm(TASK_ONLY, "task"),
    dense_stream(LENVM),
    dense_stream(LENVM_95, fields={"length_lam": 0.95}),
    dense_stream("LenVM as only critic", fields={"task_baseline": "batch"}, ppo_only={"critic": "lenvm"}),
    TrainingArm("linear", "penalty", (0.2, 0.4, 0.8), rewards=rule("linear", "alpha", max_length=LONG // 2)),
    TrainingArm("truncation", "penalty", (40, 28, 20), rewards=whole(rule("truncation", "limit"))),
    TrainingArm(
        "soft overlong",
        "penalty",
        (64, 48, 32),
        rewards=whole(lambda longest: [sandbox_reward, get_soft_overlong_punishment(longest, 3 * longest // 4)]),
    ),
    TrainingArm("cosine", "penalty", (LONG, 80, 48), rewards=whole(rule("cosine", "max_length"))),
    TrainingArm(
        "Kimi k1.5",
        "penalty",
        (0.25, 0.5, 1.0),
        rewards=kimi_beside_task,
        weights=lambda weight: [1.0, weight],
        least_group=2,
    ),
    TrainingArm("Arora", "penalty", (0.1, 0.2, 0.4), rewards=rule("arora", "alpha"), least_group=2),
    TrainingArm("pass rate", "penalty", (0.125, 0.25, 0.5), rewards=rule("pass_rate", "coefficient"), least_group=2),
    TrainingArm("ShorterBetter", "penalty", (0.01, 0.02, 0.04), rewards=rule("shorter_better", "beta"), least_group=2),
    TrainingArm("GR3", "penalty", (0.33, 0.66, 1.32), rewards=rule("gr3", "alpha"), least_group=2),
    TrainingArm(
        "LASER-D",
        "penalty",
        (0.25, 0.5, 1.0),
        rewards=rule("laser_d", "bonus", candidates=range(4, LONG + 1, 4)),
        least_group=2,
    ),
    TrainingArm("Leash", "penalty", (20, 14, 10), rewards=whole(rule("leash", "target_length", multiplier=0.25))),
    TrainingArm("oracle: waste alone", "oracle", (0.1, 0.3, 1.0), variant="waste"),
    control("constant V", variant="constant"),
    control("V of another rollout", variant="borrowed", least_group=2),
    control("stale V", values="stale"),
    control("V of 256 rollouts", values="few"),
    control("refreshed V", fields=REFRESH),
    control("refreshed V, lambda 0.95", fields={**REFRESH, "length_lam": 0.95}, settings_of=LENVM_95),
    control("length return of the whole", variant="sequence", least_group=2),
    control("shaping alone", coefficient="shaping_coef"),
    critic("critic of form full", **REFERENCE),
    critic("critic of form adapter", critic_form="adapter", **REFERENCE),
    critic("critic of form head", critic_form="head", **REFERENCE),
    # Single samples as SAO has them (arXiv 2607.07508).
    critic("SAO", critic_updates_per_step=2, critic_warmup_steps=10, critic_frozen=["self_attn"]),
)
BY_NAME = {arm.name: arm for arm in ARMS}
