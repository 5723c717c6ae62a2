"""What steers a setting toward a length or along a floor: for a whole workload at once, or step by step while it runs.

A tilt strength acts on every token of every completion, so the strength that brings the mean length of a workload to a
budget is not known beforehand. [`calibrate_strength`] finds it on a sample, [`TargetController`] while the workload
runs. Both need only that a larger setting gives a smaller measurement, as a larger strength gives shorter completions.
The trainers steer `length_coef` alike: toward a mean length with the same controller, or, with [`FloorController`], to
the largest that keeps accuracy; and `kl_reward_coef` with [`MultiplicativeController`].
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """What [`calibrate_strength`] found.

    Args:
        strength (`float`): the measured strength whose mean length came nearest to the target.
        mean_length (`float`): the mean length that was measured there.
        met (`bool`): whether it is within the tolerance.
        trials (`list[tuple[float, float]]`): every strength that was tried and its mean length, in order.
    """

    strength: float
    mean_length: float
    met: bool
    trials: list[tuple[float, float]]


def calibrate_strength(
    measure: Callable[[float], float],
    target_length: float,
    *,
    unit: float = 1.0,
    tolerance: float = 0.02,
    max_trials: int = 12,
    max_strength: float = 1e4,
) -> Calibration:
    """The tilt strength at which the mean length of a sample meets a target, by bisection.

    From strength 0 the sign of the difference says which way to go; the strength is doubled until the target lies
    between two measurements, and then halved in. Measure with the same prompts and the same seed every time, so that
    the noise of sampling is much the same in all trials.

    Args:
        measure (callable): the mean length in tokens at a strength; it falls as the strength grows, but for noise.
        target_length (`float`): the mean length to meet, counted as `measure` counts it.
        unit (`float`, *optional*, defaults to `1.0`): the first step, e.g. one over the standard deviation of V.
        tolerance (`float`, *optional*, defaults to `0.02`): share of the target by which the mean may miss it.
        max_trials (`int`, *optional*, defaults to `12`): most measurements.
        max_strength (`float`, *optional*, defaults to `1e4`): largest strength, either way, in multiples of `unit`.

    Returns:
        [`Calibration`]: `met` is `False`, and a warning logged, if the target is out of reach or trials ran out.
    """
    _check_positive(target_length=target_length, unit=unit, tolerance=tolerance, max_trials=max_trials)
    within = tolerance * target_length
    trials: list[tuple[float, float]] = []

    def is_too_long(strength: float) -> bool:
        length = float(measure(strength))
        if not math.isfinite(length):
            raise ValueError(f"measure({strength}) gave a mean length of {length}: it must be a number of tokens.")
        trials.append((strength, length))
        return length > target_length

    too_long = is_too_long(0.0)
    # Where it is too long, and where too short: strengths that enclose the one that is looked for.
    ends: dict[bool, float] = {too_long: 0.0}
    step = unit if too_long else -unit
    while abs(trials[-1][1] - target_length) > within and len(trials) < max_trials:
        if len(ends) == 2:
            strength = 0.5 * (ends[True] + ends[False])
        elif abs(step) > max_strength * unit:
            break
        else:
            strength, step = step, 2.0 * step
        ends[is_too_long(strength)] = strength
    strength, length = min(trials, key=lambda trial: abs(trial[1] - target_length))
    found = Calibration(strength, length, abs(length - target_length) <= within, trials)
    if not found.met:
        logger.warning(
            "no strength met a mean length of %g within %.1f%%: the nearest of %d trials is %g with %.1f tokens",
            target_length,
            100 * tolerance,
            len(trials),
            strength,
            length,
        )
    return found


class _IntegralController:
    """What both controllers share: a setting that an error moves, by itself and by its integral, within bounds.

    Attributes:
        setting (`float`): the current setting.
        updates (`int`): measurements so far.
    """

    # What a checkpoint keeps, by its name there.
    KEPT = {"setting": "setting", "integral": "_integral", "updates": "updates"}

    def __init__(self, rate: float, initial: float, minimum: float, maximum: float, proportional: float):
        _check_positive(rate=rate)
        if not 0.0 <= proportional < math.inf:
            raise ValueError(f"proportional must be 0 or more and finite, got {proportional}.")
        if not minimum <= initial <= maximum:
            raise ValueError(
                f"the initial setting {initial} must lie in [{minimum}, {maximum}]: change it or the bounds."
            )
        self.rate, self.minimum, self.maximum, self.proportional = rate, minimum, maximum, proportional
        self.setting = self._integral = float(initial)
        self.updates = 0

    def update(self, measured: float, is_answer: bool = True) -> float:
        """Takes a measurement, a mean over the last batch, and returns the new setting.

        Args:
            measured (`float`): the measurement.
            is_answer (`bool`, *optional*, defaults to `True`): whether the setting could act on what comes after this
                batch. If not, the integral stays as it is: it would grow for as long as that lasts.
        """
        if not math.isfinite(measured):
            raise ValueError(f"the measurement is {measured}: measure the mean over at least one completion.")
        error = self._error(measured)
        self.updates += 1
        # The integral does not grow where the setting cannot follow, or it would take as long to come back.
        unbounded = self._integral + self.proportional * error
        is_stuck = unbounded >= self.maximum if error > 0 else unbounded <= self.minimum
        if is_answer and not is_stuck:
            self._integral = self._bounded(self._integral + self.rate * error)
        self.setting = self._bounded(self._integral + self.proportional * error)
        return self.setting

    def state_dict(self) -> dict[str, float | None]:
        """What a checkpoint has to keep."""
        return {name: getattr(self, attribute) for name, attribute in self.KEPT.items()}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Goes on from what `state_dict` returned; the goal, the bounds and the rates stay this controller's own."""
        missing = sorted(self.KEPT.keys() - state.keys())
        if missing:
            raise ValueError(f"this is no state of a {type(self).__name__}: it has no {', '.join(missing)}.")
        for name, attribute in self.KEPT.items():
            setattr(self, attribute, state[name])
        self.setting, self._integral = self._bounded(float(self.setting)), self._bounded(float(self._integral))

    def _error(self, measured: float) -> float:
        """How far a measurement is above the goal; takes it in."""
        raise NotImplementedError

    def _bounded(self, value: float) -> float:
        return min(max(value, self.minimum), self.maximum)


class TargetController(_IntegralController):
    """Steers a setting so that the mean length, which it lowers, settles at a target.

    The error is ``e = ln((length + 1) / (target + 1))``, the end of sequence counted: twice as long weighs as much as
    half as long, whatever the target. After each measurement

        ``integral <- clip(integral + rate * e, minimum, maximum)``,   ``setting = clip(integral + proportional * e)``

    but the integral stays where the setting is at a bound already and `e` would drive it further. So the setting grows
    as long as completions are too long, whatever it is that it has to overcome: this is the ascent on the multiplier of
    the constraint ``E[length] = target`` (``<=`` for `minimum=0`), as in Leash (arXiv 2512.21540).

    Where the setting moves not the length but its speed, as the weight of a reward does while a policy learns, the
    integral alone swings about the target: give it little `rate` and much `proportional`. Such a policy also goes on
    for some updates in the direction it was given (the optimizer's momentum); with `horizon` the error is not the last
    one but the one to be expected so many measurements later, ``level + horizon * trend``, both smoothed (Holt, "double
    exponential smoothing"). Together these are a PID controller; for multipliers see arXiv 2007.03964.

    Args:
        target (`float`): the mean length to settle at, in tokens, end of sequence not counted, positive.
        rate (`float`): change of the integral per measurement for an error of 1.
        initial (`float`, *optional*, defaults to `0.0`): setting at the start.
        minimum, maximum (`float`, *optional*): bounds of the setting; none when omitted.
        proportional (`float`, *optional*, defaults to `0.0`): what an error of 1 adds for as long as it lasts.
        horizon (`float`, *optional*, defaults to `0.0`): measurements to look ahead; with 0, the last one counts as it
            is, without smoothing.
    """

    KEPT = {**_IntegralController.KEPT, "level": "_level", "trend": "_trend"}
    # Shares of the new in level and trend: large ones are noisy, small ones late.
    LEVEL_SHARE, TREND_SHARE = 0.5, 0.3

    def __init__(
        self,
        target: float,
        rate: float,
        initial: float = 0.0,
        minimum: float = -math.inf,
        maximum: float = math.inf,
        proportional: float = 0.0,
        horizon: float = 0.0,
    ):
        _check_positive(target=target)
        if not 0.0 <= horizon < math.inf:
            raise ValueError(f"horizon must be 0 or more and finite, got {horizon}.")
        super().__init__(rate, initial, minimum, maximum, proportional)
        self.target, self.horizon = target, horizon
        self._level: float | None = None
        self._trend = 0.0

    def _error(self, measured: float) -> float:
        if measured < 0:
            raise ValueError(f"the measurement is {measured}: a length cannot be below 0.")
        error = math.log((measured + 1.0) / (self.target + 1.0))
        if self.horizon == 0.0:
            return error
        if self._level is None:
            self._level = error
        before, expected = self._level, self._level + self._trend
        self._level = expected + self.LEVEL_SHARE * (error - expected)
        self._trend += self.TREND_SHARE * (self._level - before - self._trend)
        return self._level + self.horizon * self._trend


class FloorController(_IntegralController):
    """Raises a setting as long as what it lowers stays above a floor, and takes it back where it does not.

    ``integral <- clip(integral + rate * (average - floor), minimum, maximum)`` after each measurement, `average` being
    an exponential moving average of the measurements; the setting is the integral. Of all settings that keep the floor
    it ends at the largest, within the bounds: what the setting saves is wanted, but never at the price of the floor.
    (The mirror image of the ascent on the multiplier of ``E[measurement] >= floor``: there the constraint's weight
    moves, here the saving's.)

    An average is behind what it averages, so the setting swings where `rate` is large for the half-life; with
    `proportional` it is ``clip(integral + proportional * (average - floor), minimum, maximum)``, as in
    [`TargetController`].

    Args:
        floor (`float`): what the measurement is to stay above.
        rate (`float`): change of the integral where the average is 1 above the floor.
        half_life (`float`): measurements after which one counts half in the average, above 0.
        initial, minimum, maximum, proportional (`float`, *optional*): as in [`TargetController`], from 0 up.

    Example: half-life 1, measurements 1, 0, 0: the averages are 1, 1/3, 1/7 (weights 4, 2, 1 from the last).
    """

    KEPT = {**_IntegralController.KEPT, "weighted": "_weighted", "weight": "_weight"}

    def __init__(
        self,
        floor: float,
        rate: float,
        half_life: float,
        initial: float = 0.0,
        minimum: float = 0.0,
        maximum: float = math.inf,
        proportional: float = 0.0,
    ):
        _check_positive(half_life=half_life)
        super().__init__(rate, initial, minimum, maximum, proportional)
        self.floor = floor
        self.decay = 0.5 ** (1.0 / half_life)
        self._weighted = self._weight = 0.0

    @property
    def average(self) -> float:
        """The moving average, whose weights sum to 1 from the first measurement on; NaN before it."""
        return self._weighted / self._weight if self._weight else math.nan

    def _error(self, measured: float) -> float:
        self._weighted = self.decay * self._weighted + measured
        self._weight = self.decay * self._weight + 1.0
        return self.average - self.floor


class MultiplicativeController:
    """Multiplies a setting by a little more or less than 1, so that what it lowers settles at a target.

    After each measurement ``setting <- setting * (1 + gain * clip((measured - target) / target, -0.2, 0.2))`` (Ziegler
    et al., arXiv 1909.08593, section 2.2, there for the weight of a KL penalty, with a gain of 0.1).

    Args:
        target (`float`): what the measurement is to be, positive.
        gain (`float`): change of the setting, as a share of itself, for an error of 1, in (0, 5).
        initial (`float`): setting at the start, positive.

    Example: target 2, gain 0.5, setting 1; a measurement of 3 makes it 1.1, and one of 1.8 then 1.1 * 0.95 = 1.045.
    """

    LARGEST_ERROR = 0.2

    def __init__(self, target: float, gain: float, initial: float):
        _check_positive(target=target, gain=gain, initial=initial)
        if gain * self.LARGEST_ERROR >= 1.0:
            raise ValueError(f"gain must be below {1 / self.LARGEST_ERROR:g}, or the setting turns 0, got {gain}.")
        self.target, self.gain, self.setting = target, gain, float(initial)

    def update(self, measured: float) -> float:
        """Takes a measurement, a mean over the last batch, and returns the new setting."""
        if not math.isfinite(measured):
            raise ValueError(f"the measurement is {measured}: measure the mean over at least one token.")
        error = (measured - self.target) / self.target
        self.setting *= 1.0 + self.gain * min(max(error, -self.LARGEST_ERROR), self.LARGEST_ERROR)
        return self.setting

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint has to keep."""
        return {"setting": self.setting}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from what `state_dict` returned; the target and the gain stay this controller's own."""
        self.setting = float(state["setting"])


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value}.")
