"""Steering toward a mean length or along a floor: by hand, and in worlds that are known at every setting."""

import json
import math
import tempfile

import pytest
import torch

from lenvm_rl.controllers import FloorController, MultiplicativeController, TargetController, calibrate_strength
from lenvm_rl.decoding.generation import LengthGuidance, mean_length_at
from lenvm_rl.sandbox.scripted import START, ScriptedLengthValue, ScriptedPolicy, random_chain
from lenvm_rl.trainers import LenVMGRPOConfig
from lenvm_rl.trainers.coefficient import HORIZON, LengthCoefficient

LN2 = math.log(2.0)


def trainers_controller(target, horizon=HORIZON):
    """As a run with `length_target` and defaults has it."""
    with tempfile.TemporaryDirectory() as folder:
        args = LenVMGRPOConfig(folder, use_cpu=True, bf16=False, report_to="none", length_target=target)
    controller = LengthCoefficient(args).controller
    controller.horizon = horizon
    return controller


def mean_length(chain, strength, value):
    """Exact mean length of the tilted chain, end-of-sequence not counted."""
    return float(chain.tilted(strength, value).mean_length()[START]) - 1.0


def learn(controller, length, speed, momentum=0.9, pull=0.0, steps=300):
    """Mean lengths of a policy that learns: the end of sequence counted, their logarithm falls by `speed` times the
    coefficient per batch, averaged over earlier ones by the optimizer's momentum, and rises by `pull`."""
    lengths, push = [], 0.0
    for _ in range(steps):
        push = momentum * push + (1.0 - momentum) * controller.setting
        length = (length + 1.0) * math.exp(pull - speed * push) - 1.0
        lengths.append(length)
        controller.update(max(length, 0.0))
    return lengths


class TestCalibration:
    @pytest.mark.parametrize("factor", [0.4, 0.8, 1.0, 1.5])
    def test_it_finds_the_strength_of_an_exact_world(self, factor):
        chain = random_chain(8, seed=3, min_hazard=0.05)
        value = chain.value(0.9)
        target = factor * mean_length(chain, 0.0, value)
        found = calibrate_strength(lambda s: mean_length(chain, s, value), target, unit=2.0, tolerance=0.01)
        assert found.met and found.mean_length == pytest.approx(target, rel=0.01)
        assert mean_length(chain, found.strength, value) == found.mean_length
        assert math.copysign(1.0, found.strength) == (1.0 if factor <= 1 else -1.0)

    def test_the_steps_by_hand(self):
        """Length 100 - 10 s, target 45, unit 2: doubling to 2, 4, 8, then between 4 and 8, then between 4 and 6."""
        found = calibrate_strength(lambda s: 100 - 10 * s, 45.0, unit=2.0, tolerance=0.2 / 45)
        assert found.trials[:6] == [(0.0, 100.0), (2.0, 80.0), (4.0, 60.0), (8.0, 20.0), (6.0, 40.0), (5.0, 50.0)]
        assert found.trials[6] == (5.5, 45.0) and found.strength == 5.5 and found.met

    def test_a_target_out_of_reach_is_said_to_be(self, caplog):
        found = calibrate_strength(lambda s: max(10.0, 20.0 - s), 5.0, max_strength=64)
        assert not found.met and found.mean_length == 10.0 and "no strength met" in caplog.text
        few = calibrate_strength(lambda s: 100 - 10 * s, 45.0, unit=2.0, tolerance=1e-3, max_trials=3)
        assert not few.met and len(few.trials) == 3

    def test_sampled_completions_meet_a_budget(self):
        chain = random_chain(8, seed=3, min_hazard=0.05)
        policy, value = ScriptedPolicy.from_chain(chain), ScriptedLengthValue.from_chain(chain, 0.9)

        start, guidance = torch.full((400, 1), START), LengthGuidance(min_p=1e-6)
        sampled = mean_length_at(policy, value, start, guidance, seed=0, max_new_tokens=120)
        before = torch.random.get_rng_state()
        target = 0.6 * mean_length(chain, 0.0, chain.value(0.9))
        found = calibrate_strength(sampled, target, unit=2.0, tolerance=0.05)
        assert found.met and torch.equal(torch.random.get_rng_state(), before)
        # The exact mean at that strength, which the sample of 400 estimates.
        assert mean_length(chain, found.strength, chain.value(0.9)) == pytest.approx(target, rel=0.12)

    def test_only_a_tilt_has_a_strength(self):
        with pytest.raises(ValueError, match="mode"):
            mean_length_at(None, None, None, LengthGuidance(mode="at_most", target_length=3), seed=0)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"target_length": 0.0}, "target_length must be positive"),
            ({"unit": -1.0}, "unit must be positive"),
            ({"tolerance": math.nan}, "tolerance must be positive"),
            ({"max_trials": 0}, "max_trials must be positive"),
        ],
    )
    def test_settings_that_make_no_sense(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            calibrate_strength(lambda s: 10.0, **{"target_length": 5.0, **arguments})

    def test_a_length_that_is_none(self):
        with pytest.raises(ValueError, match="mean length of nan"):
            calibrate_strength(lambda s: math.nan, 5.0)


class TestController:
    """Lengths are chosen so that the errors are whole or half powers of 2: with a target of 7, 15 is twice as long."""

    def test_an_update_by_hand_and_its_bounds(self):
        controller = TargetController(target=7.0, rate=0.5, initial=1.0, minimum=0.0, maximum=1.6)
        assert controller.update(15.0) == pytest.approx(1.0 + 0.5 * LN2)
        assert controller.update(15.0) == 1.6
        # Half as long takes back what twice as long has added.
        assert controller.update(3.0) == pytest.approx(1.6 - 0.5 * LN2)
        for _ in range(9):
            controller.update(0.0)
        assert controller.setting == 0.0 and controller.updates == 12

    def test_the_proportional_part_by_hand(self):
        """Errors 1, 1, 0 in units of ln 2: integral 0.5, 1, 1 and setting 0.5 + 0.25, 1 + 0.25, 1."""
        controller = TargetController(target=7.0, rate=0.5, proportional=0.25)
        assert [controller.update(length) / LN2 for length in (15.0, 15.0, 7.0)] == pytest.approx([0.75, 1.25, 1.0])

    def test_it_looks_ahead_by_hand(self):
        """Errors 0, 2, 0 in units of ln 2. Level 0; 0 + 1/2 * 2 = 1; 1.3 - 1/2 * 1.3 = .65. Trend 0; 0 + .3 * 1 = .3;
        .3 + .3 * (-.35 - .3) = .105. Expected two ahead: 0, 1.6, .86."""
        controller = TargetController(target=7.0, rate=1.0, horizon=2.0)
        settings = [controller.update(length) / LN2 for length in (7.0, 31.0, 7.0)]
        assert settings == pytest.approx([0.0, 1.6, 1.6 + 0.86])

    def test_what_cannot_follow_does_not_wind_up(self):
        """The setting is at its bound by the proportional part alone, so the integral waits; below the target at once
        nothing is left of it."""
        controller = TargetController(target=7.0, rate=0.5, maximum=1.0, minimum=-1.0, proportional=2.0)
        for _ in range(50):
            assert controller.update(31.0) == 1.0
        assert controller.state_dict()["integral"] == 0.0
        assert controller.update(3.0) == -1.0 and controller.state_dict()["integral"] == 0.0
        # An error of a quarter of ln 2 is within the bounds, so it adds up.
        assert controller.update(8 * 2**0.25 - 1) == pytest.approx(2.5 * LN2 / 4)

    def test_what_nobody_answers_does_not_wind_up(self):
        controller = TargetController(target=7.0, rate=0.5, proportional=0.25)
        for _ in range(9):
            assert controller.update(15.0, is_answer=False) == pytest.approx(0.25 * LN2)
        assert controller.update(15.0) == pytest.approx(0.75 * LN2)

    def test_a_policy_that_writes_nothing_is_a_measurement(self):
        assert TargetController(target=7.0, rate=1.0).update(0.0) == pytest.approx(-3 * LN2)

    @pytest.mark.parametrize(("proportional", "horizon", "swings"), [(0.0, 0.0, True), (2.0, 0.0, False)])
    def test_it_damps_the_swings_of_a_measurement_whose_speed_the_setting_is(self, proportional, horizon, swings):
        """Length 20, lowered by the setting in each step; without damping it swings for good."""
        controller = TargetController(10.0, rate=0.05, proportional=proportional, horizon=horizon)
        lengths = learn(controller, length=20.0, speed=0.07, momentum=0.0)[-100:]
        assert max(lengths) - min(lengths) > 5.0 if swings else lengths[-1] == pytest.approx(10.0, abs=0.1)

    @pytest.mark.parametrize("speed", [0.01, 0.025, 0.07, 0.2])
    @pytest.mark.parametrize(("start", "target"), [(30.0, 5.0), (30.0, 15.0), (5.0, 15.0)])
    def test_it_holds_a_target_at_the_speeds_that_policies_learn_at(self, speed, start, target):
        """As the trainers set it, against a policy with the momentum of Adam: within a tenth of the target in the end,
        and no longer below nine tenths of it than the way down took."""
        lengths = learn(trainers_controller(target), start, speed, steps=400)
        way = next(step for step, length in enumerate(lengths) if abs(length - target) <= 0.02 * target)
        under = sum(length < 0.9 * target for length in lengths[way:])
        assert way < 250 and under <= way
        assert sum(lengths[-30:]) / 30 == pytest.approx(target, rel=0.1)

    def test_without_looking_ahead_a_fast_policy_swings(self):
        """What the horizon is for."""
        blind = learn(trainers_controller(15.0, horizon=0.0), 30.0, speed=0.2)[-100:]
        ahead = learn(trainers_controller(15.0), 30.0, speed=0.2)[-100:]
        assert max(blind) - min(blind) > 3 * (max(ahead) - min(ahead))

    def test_a_task_that_pulls_is_overcome(self):
        """A constant pull of a fifth of what the largest coefficient does."""
        lengths = learn(trainers_controller(15.0), 30.0, speed=0.05, pull=0.01, steps=600)
        assert lengths[-1] == pytest.approx(15.0, rel=0.02)

    def test_it_settles_where_the_exact_world_has_the_target(self):
        chain = random_chain(8, seed=3, min_hazard=0.05)
        value = chain.value(0.9)
        target = 0.6 * mean_length(chain, 0.0, value)
        controller = TargetController(target, rate=1.0)
        for _ in range(300):
            controller.update(mean_length(chain, controller.setting, value))
        assert mean_length(chain, controller.setting, value) == pytest.approx(target, rel=1e-3)

    @pytest.mark.parametrize("horizon", [0.0, 6.0])
    @pytest.mark.parametrize("before", [(), (14.0, 9.0)])
    def test_it_goes_on_from_its_state(self, horizon, before):
        first, second = (TargetController(10.0, 0.3, proportional=0.2, horizon=horizon) for _ in range(2))
        for length in before:
            first.update(length)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.update(11.0) == first.update(11.0) and second.updates == len(before) + 1
        assert second.update(12.0) == first.update(12.0)

    def test_the_state_of_another_version_is_refused(self):
        controller = TargetController(10.0, 0.3)
        with pytest.raises(ValueError, match="TargetController.*level, trend"):
            controller.load_state_dict({"setting": 0.3, "integral": 0.3, "updates": 4})
        assert controller.setting == 0.0 and controller.updates == 0

    def test_refusals(self):
        with pytest.raises(ValueError, match="target"):
            TargetController(0.0, 1.0)
        with pytest.raises(ValueError, match="initial"):
            TargetController(1.0, 1.0, initial=2.0, maximum=1.0)
        with pytest.raises(ValueError, match="proportional"):
            TargetController(1.0, 1.0, proportional=-1.0)
        with pytest.raises(ValueError, match="horizon"):
            TargetController(1.0, 1.0, horizon=-1.0)
        controller = TargetController(10.0, 0.3)
        for wrong in (math.nan, math.inf, -1.0):
            with pytest.raises(ValueError, match=f"measurement is {wrong}"):
                controller.update(wrong)
        assert controller.setting == 0.0 and controller.updates == 0


class TestFloor:
    def test_an_update_by_hand_and_its_bounds(self):
        """Half-life 1: the averages of 1, 0, 0 are 1, 1/3, 1/7; floor 0.5, rate 0.6, so + 0.3, - 0.1, - 0.214."""
        controller = FloorController(0.5, rate=0.6, half_life=1.0, initial=0.1, maximum=0.35)
        assert math.isnan(controller.average)
        assert controller.update(1.0) == 0.35 and controller.average == 1.0
        assert controller.update(0.0) == pytest.approx(0.25) and controller.average == pytest.approx(1 / 3)
        assert controller.update(0.0) == pytest.approx(0.25 - 0.6 * (0.5 - 1 / 7))
        for _ in range(3):
            controller.update(0.0)
        assert controller.setting == 0.0 and controller.updates == 6

    def test_the_half_life_is_one(self):
        """Weights of old measurements halve every four: after 400 of 1, four of 0 leave an average of a half."""
        controller = FloorController(0.5, rate=0.1, half_life=4.0)
        for measured in [1.0] * 400 + [0.0] * 4:
            controller.update(measured)
        assert controller.average == pytest.approx(0.5)

    @pytest.mark.parametrize(("floor", "settled"), [(0.8, 0.4), (0.6, 0.8), (0.2, 1.0), (0.95, 0.1)])
    def test_it_settles_at_the_largest_setting_that_keeps_the_floor(self, floor, settled):
        """A world whose accuracy is 1 - s / 2; at a floor of 0.2 the bound comes first."""
        controller = FloorController(floor, rate=0.05, half_life=5.0, maximum=1.0)
        for _ in range(1500):
            controller.update(1.0 - controller.setting / 2)
        assert controller.setting == pytest.approx(settled, abs=1e-3)

    def test_it_takes_everything_back_where_the_floor_is_out_of_reach(self):
        controller = FloorController(0.9, rate=0.1, half_life=5.0, initial=0.5)
        for _ in range(100):
            controller.update(0.7)
        assert controller.setting == 0.0

    def test_it_goes_on_from_its_state(self):
        first, second = (FloorController(0.5, 0.3, 3.0) for _ in range(2))
        for accuracy in (0.7, 0.9):
            first.update(accuracy)
        second.load_state_dict(first.state_dict())
        assert second.update(0.6) == first.update(0.6) and second.average == first.average and second.updates == 3

    def test_refusals(self):
        with pytest.raises(ValueError, match="half_life"):
            FloorController(0.5, 0.1, 0.0)
        with pytest.raises(ValueError, match="rate"):
            FloorController(0.5, -0.1, 1.0)
        with pytest.raises(ValueError, match="initial"):
            FloorController(0.5, 0.1, 1.0, initial=-0.1)
        controller = FloorController(0.5, 0.1, 1.0)
        with pytest.raises(ValueError, match="measurement is nan"):
            controller.update(math.nan)
        assert controller.updates == 0 and controller.setting == 0.0


class TestMultiplicative:
    def test_updates_by_hand(self):
        """Target 2, gain 1/2: a measurement of 3 is an error of 1/2, which counts as 0.2; one of 1.8 of -0.1."""
        controller = MultiplicativeController(2.0, gain=0.5, initial=1.0)
        assert controller.update(3.0) == pytest.approx(1.1)
        assert controller.update(1.8) == pytest.approx(1.1 * 0.95)
        assert controller.update(-7.0) == pytest.approx(1.1 * 0.95 * 0.9)
        assert controller.update(2.0) == controller.setting == pytest.approx(1.1 * 0.95 * 0.9)

    @pytest.mark.parametrize("initial", [0.01, 10.0])
    def test_it_settles_at_its_target(self, initial):
        """A world in which the measurement is 1 over the setting: 4 at a setting of 1/4."""
        controller = MultiplicativeController(4.0, gain=0.5, initial=initial)
        for _ in range(200):
            controller.update(1.0 / controller.setting)
        assert controller.setting == pytest.approx(0.25, rel=1e-3)

    def test_it_goes_on_from_its_state(self):
        first, second = (MultiplicativeController(1.0, 0.3, 0.1) for _ in range(2))
        first.update(1.1)
        second.load_state_dict(first.state_dict())
        assert second.setting == first.setting and second.update(0.95) == first.update(0.95)

    def test_refusals(self):
        for wrong in ({"target": 0.0}, {"gain": -1.0}, {"gain": 5.0}, {"initial": 0.0}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                MultiplicativeController(**{"target": 1.0, "gain": 0.1, "initial": 1.0, **wrong})
        with pytest.raises(ValueError, match="measurement is nan"):
            MultiplicativeController(1.0, 0.1, 1.0).update(math.nan)
