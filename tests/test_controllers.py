"""Steering a strength toward a mean length: by hand, and in a world whose mean length is known at every strength."""

import math

import pytest
import torch

from lenvm_rl.controllers import TargetController, calibrate_strength
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
        controller = TargetController(10.0, 0.3)
        with pytest.raises(ValueError, match="measurement is nan"):
            controller.update(math.nan)
        assert controller.setting == 0.0
