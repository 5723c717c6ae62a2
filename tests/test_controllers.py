"""Steering toward a mean length or along a floor: by hand, and in worlds that are known at every setting."""

import math

import pytest
import torch

from lenvm_rl.controllers import FloorController, TargetController, calibrate_strength
from lenvm_rl.decoding import LengthGuidance, mean_length_at
from lenvm_rl.sandbox.scripted import START, ScriptedLengthValue, ScriptedPolicy, random_chain


def mean_length(chain, strength, value):
    """Exact mean length of the tilted chain, end-of-sequence not counted."""
    return float(chain.tilted(strength, value).mean_length()[START]) - 1.0


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
        with pytest.raises(ValueError, match="no strength to be found"):
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
    def test_an_update_by_hand_and_its_bounds(self):
        controller = TargetController(target=10.0, rate=0.5, initial=1.0, minimum=0.0, maximum=1.6)
        assert controller.update(20.0) == 1.5  # 1 + 0.5 * (2 - 1)
        assert controller.update(20.0) == 1.6
        assert controller.update(5.0) == pytest.approx(1.35)
        for _ in range(9):
            controller.update(0.0)
        assert controller.setting == 0.0 and controller.updates == 12

    def test_the_proportional_part_by_hand(self):
        """Errors 1, 1, 0: integral 0.5, 1, 1 and setting 0.5 + 0.25, 1 + 0.25, 1."""
        controller = TargetController(target=10.0, rate=0.5, proportional=0.25)
        assert [controller.update(length) for length in (20.0, 20.0, 10.0)] == [0.75, 1.25, 1.0]

    @pytest.mark.parametrize(("proportional", "swings"), [(0.0, True), (1.0, False)])
    def test_it_damps_the_swings_of_a_measurement_whose_speed_the_setting_is(self, proportional, swings):
        """Length 20, lowered by the setting in each step; without damping it swings for good."""
        controller, length, lengths = TargetController(10.0, rate=0.05, proportional=proportional), 20.0, []
        for _ in range(600):
            length = max(length - controller.update(length), 0.1)
            lengths.append(length)
        last = lengths[-100:]
        assert max(last) - min(last) > 5.0 if swings else last[-1] == pytest.approx(10.0, abs=0.1)

    def test_it_settles_where_the_exact_world_has_the_target(self):
        chain = random_chain(8, seed=3, min_hazard=0.05)
        value = chain.value(0.9)
        target = 0.6 * mean_length(chain, 0.0, value)
        controller = TargetController(target, rate=1.0)
        for _ in range(300):
            controller.update(mean_length(chain, controller.setting, value))
        assert mean_length(chain, controller.setting, value) == pytest.approx(target, rel=1e-3)

    def test_it_goes_on_from_its_state(self):
        first, second = (TargetController(10.0, 0.3) for _ in range(2))
        for length in (14.0, 9.0):
            first.update(length)
        second.load_state_dict(first.state_dict())
        assert second.update(11.0) == first.update(11.0) and second.updates == 3

    def test_refusals(self):
        with pytest.raises(ValueError, match="target must be positive"):
            TargetController(0.0, 1.0)
        with pytest.raises(ValueError, match="must lie in"):
            TargetController(1.0, 1.0, initial=2.0, maximum=1.0)
        with pytest.raises(ValueError, match="proportional must be 0 or more"):
            TargetController(1.0, 1.0, proportional=-1.0)
        controller = TargetController(10.0, 0.3)
        with pytest.raises(ValueError, match="measurement is nan"):
            controller.update(math.nan)
        assert controller.setting == 0.0


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
        with pytest.raises(ValueError, match="half_life must be positive"):
            FloorController(0.5, 0.1, 0.0)
        with pytest.raises(ValueError, match="rate must be positive"):
            FloorController(0.5, -0.1, 1.0)
        with pytest.raises(ValueError, match="must lie in"):
            FloorController(0.5, 0.1, 1.0, initial=-0.1)
        controller = FloorController(0.5, 0.1, 1.0)
        with pytest.raises(ValueError, match="measurement is nan"):
            controller.update(math.nan)
        assert controller.updates == 0 and controller.setting == 0.0
