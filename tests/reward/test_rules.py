"""Length rules: worked examples of every one, what holds for all of them, and their form as TRL reward functions."""

import pickle

import pytest
import torch
from trl.rewards import get_cosine_scaled_reward

from lenvm_rl.reward_functions import load_reward
from reward import baselines, rules
from reward.length_reward import LengthReward
from reward.rules import LENGTH_RULES, length_rule

PAYING = {"penalize_wrong": True}
# Rule, knobs, lengths, correct, rewards. All of one group.
WORKED = [
    (rules.linear, {"alpha": 0.5, "max_length": 100}, [40, 100, 250, 40], [1, 1, 1, 0], [0.8, 0.5, 0.5, 0]),
    (rules.truncation, {"limit": 100}, [100, 101, 10], [1, 1, 0], [1, 0, 0]),
    (rules.kimi, {}, [10, 20, 30], [1, 1, 0], [0.5, 0, 0]),
    (rules.kimi, {}, [1, 101], [0, 1], [0, -0.5]),
    (rules.kimi, PAYING, [10, 20, 30], [1, 1, 0], [0.5, 0, -0.5]),
    (rules.arora, {"alpha": 0.2}, [10, 30, 500], [1, 1, 0], [0.946212, 0.853788, 0]),
    # sigmoid(0) where there is no spread: one correct alone, and equal lengths.
    (rules.arora, {"alpha": 0.2}, [10, 30], [1, 0], [0.9, 0]),
    (rules.arora, {"alpha": 0.2}, [7, 7, 7], [1, 1, 1], [0.9, 0.9, 0.9]),
    # The population's deviation: of 10, 10 and 40 it is sqrt(200), so z = -0.7071 twice, and 1.4142.
    (rules.arora, {"alpha": 1.0}, [10, 10, 40], [1, 1, 1], [0.669762, 0.669762, 0.195572]),
    (rules.alp, {"beta": 0.01}, [10, 20, 30, 40], [1, 0, 0, 0], [0.975, 0, 0, 0]),
    (rules.alp, {"beta": 0.01, **PAYING}, [10, 20, 30, 40], [1, 0, 0, 0], [0.975, -0.05, -0.075, -0.1]),
    (rules.alp, {"beta": 0.01}, [10, 20, 30, 40], [1, 1, 1, 1], [0.9, 0.8, 0.7, 0.6]),
    # Never solved: the price is that of one in K.
    (rules.alp, {"beta": 0.01, **PAYING}, [10, 20], [0, 0], [-0.05, -0.1]),
    # p = 2/3, and the longest is a wrong one.
    (rules.pass_rate, {}, [10, 30, 40], [1, 1, 0], [0.958333, 0.875, 0]),
    (rules.pass_rate, {"coefficient": 1.0}, [10, 40], [1, 1], [0.75, 0]),
    (rules.pass_rate, {}, [10, 20], [0, 0], [0, 0]),
    (rules.pass_rate, {}, [0, 0], [1, 0], [1, 0]),
    (rules.cosine, {"max_length": 200, "margin": 20}, [0, 100, 150, 180], [1, 1, 1, 1], [2, 1.5, 1.146447, -10]),
    (rules.cosine, {"max_length": 200, "margin": 20}, [0, 100, 150, 180], [0, 0, 0, 0], [-10, -5, -1.464466, -10]),
    # The margin begins with the token at which it is reached; the authors' is 16.
    (rules.cosine, {"max_length": 232}, [215, 216, 900], [1, 1, 0], [1.013190, -10, -10]),
    (
        rules.cosine,
        {"max_length": 100, "margin": 0, "correct_rewards": (1, 0), "wrong_rewards": (0, 0), "exceed_reward": -1},
        [50, 50, 100],
        [1, 0, 1],
        [0.5, 0, -1],
    ),
    (rules.l1_exact, {"target_length": 100, "alpha": 0.01}, [100, 80, 300, 80], [1, 1, 1, 0], [1, 0.8, 0, 0]),
    (
        rules.l1_exact,
        {"target_length": 100, "alpha": 0.01, **PAYING},
        [100, 80, 300, 80],
        [1, 1, 1, 0],
        [1, 0.8, -1, -0.2],
    ),
    (
        rules.l1_max,
        {"target_length": 100, "alpha": 0.01},
        [50, 100, 125, 150, 10],
        [1, 1, 1, 1, 0],
        [1, 0.5, 0.25, 0, 0],
    ),
    (rules.l1_max, {"target_length": 1000}, [0, 1000, 2000], [1, 1, 1], [0.65, 0.5, 0.35]),
    (rules.laser, {"target_length": 100}, [100, 101, 10], [1, 1, 0], [1.5, 1, 0]),
    (rules.laser_d, {"targets": [50, 100, 200]}, [80, 80, 80], [1, 1, 0], [1, 1, 0]),
    (rules.laser_d, {"targets": [50, 100, 200]}, [80, 80, 80], [1, 0, 0], [1.5, 0, 0]),
    (rules.laser_d, {"targets": [50, 100, 200]}, [150, 150, 150, 150], [1, 0, 0, 0], [1.5, 0, 0, 0]),
    (rules.shorter_better, {"beta": 0.01}, [100, 150, 50], [1, 1, 0], [2, 1.5, 0]),
    (rules.shorter_better, {"beta": 0.01, **PAYING}, [100, 150, 50], [1, 1, 0], [2, 1.5, -0.5]),
    # None correct: the mean, 100.
    (rules.shorter_better, {"beta": 0.01, **PAYING}, [50, 150], [0, 0], [-0.5, -0.5]),
    (rules.gr3, {"alpha": 1.0}, [50, 150, 100], [1, 1, 0], [1 / 1.5, 1 / 2.5, 0]),
    (rules.gr3, {}, [0, 0], [1, 0], [1, 0]),
    (
        rules.leash,
        {"target_length": 100, "multiplier": 0.5},
        [50, 100, 200, 700, 10, 700],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0.5, -1, -1, -1],
    ),
]
# A setting of each rule that bites at the lengths below.
BITING = [
    (rules.linear, {"alpha": 0.5, "max_length": 100}),
    (rules.truncation, {"limit": 50}),
    (rules.kimi, {}),
    (rules.arora, {"alpha": 0.4}),
    (rules.alp, {"beta": 0.01}),
    (rules.pass_rate, {}),
    # Only with this setting are wrong answers spared.
    (rules.cosine, {"max_length": 130, "margin": 0, "wrong_rewards": (0.0, 0.0)}),
    (rules.l1_exact, {"target_length": 1, "alpha": 0.01}),
    (rules.l1_max, {"target_length": 50, "alpha": 0.01}),
    (rules.laser, {"target_length": 50}),
    (rules.laser_d, {"targets": [40, 50, 60]}),
    (rules.shorter_better, {"beta": 0.01}),
    (rules.gr3, {}),
    (rules.leash, {"target_length": 50, "multiplier": 0.5}),
]
names = pytest.mark.parametrize(("rule", "knobs"), BITING, ids=lambda value: getattr(value, "__name__", ""))


def flag_column(completions, right, **columns):
    """A task reward that reads its flags from a column."""
    return list(right)


def called(reward, lengths, right, prompts=None, **columns):
    """A TRL reward function called on completions of these lengths, all of one prompt unless prompts are given."""
    return reward(
        prompts=prompts or ["p"] * len(lengths),
        completions=[""] * len(lengths),
        completion_ids=[[7] * length for length in lengths],
        right=right,
        **columns,
    )


def drawn(seed, groups=6, size=8):
    """Lengths, correctness and groups, the completions of a group not together."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 120, (groups * size,), generator=generator)
    correct = torch.rand(groups * size, generator=generator) < torch.rand(groups, generator=generator).repeat(size)
    return lengths, correct, torch.arange(groups).repeat(size) * 3


@pytest.mark.parametrize(("rule", "knobs", "lengths", "correct", "expected"), WORKED)
def test_worked_examples(rule, knobs, lengths, correct, expected):
    group = torch.zeros(len(lengths), dtype=torch.long)
    rewards = rule(torch.tensor(lengths), torch.tensor(correct), group, **knobs)
    assert rewards.dtype == torch.float32
    torch.testing.assert_close(rewards, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_kimi_by_hand_over_two_groups_in_any_order():
    lengths = torch.tensor([10, 5, 20, 5, 30, 5])
    correct = torch.tensor([1, 1, 1, 0, 0, 1])
    group = torch.tensor([4, 9, 4, 9, 4, 9])
    rewards = rules.kimi(lengths, correct, group, penalize_wrong=True)
    torch.testing.assert_close(rewards, torch.tensor([0.5, 0.0, 0.0, 0.0, -0.5, 0.0]))
    spared = rules.kimi(lengths, correct, group)
    torch.testing.assert_close(spared, torch.tensor([0.5, 0.0, 0.0, 0.0, 0.0, 0.0]))


@names
def test_by_default_a_wrong_answer_neither_pays_nor_gains_by_its_length(rule, knobs):
    lengths, correct, group = drawn(1)
    rewards = rule(lengths, correct, group, **knobs)
    wrong = rewards[~correct]
    assert wrong.unique().tolist() == [-1.0 if rule is rules.leash else 0.0]
    if rule is not rules.kimi:
        # That one is to be added to the task reward; all others contain it.
        assert (rewards[correct] >= wrong[0]).all() and rewards[correct].mean() > wrong[0] + 0.1


@names
def test_of_two_correct_answers_to_a_prompt_the_longer_never_earns_more(rule, knobs):
    lengths, correct, group = drawn(2)
    rewards = rule(lengths, correct, group, **knobs)
    differences = 0
    for one in group.unique():
        inside = correct & (group == one)
        order = lengths[inside].argsort()
        steps = rewards[inside][order].diff()
        assert (steps <= 1e-6).all()
        differences += int((steps < -1e-6).sum())
    assert differences > 0, "this setting does not bite"


@names
def test_groups_are_apart_and_order_does_not_matter(rule, knobs):
    lengths, correct, group = drawn(3)
    rewards = rule(lengths, correct, group, **knobs)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rule(lengths[order], correct[order], group[order], **knobs), rewards[order])
    alone = group == 3
    torch.testing.assert_close(rule(lengths[alone], correct[alone], group[alone], **knobs), rewards[alone])
    assert rule(lengths[:0], correct[:0], group[:0], **knobs).shape == (0,)


@names
def test_a_shaped_number_and_a_wrong_shape_are_refused(rule, knobs):
    lengths, correct, group = drawn(4)
    with pytest.raises(ValueError, match="correct"):
        rule(lengths, correct * 0.7, group, **knobs)
    with pytest.raises(ValueError, match="correct"):
        rule(lengths, correct[:-1], group, **knobs)


@pytest.mark.parametrize("rule", [rules.kimi, rules.arora, rules.alp, rules.pass_rate, rules.shorter_better, rules.gr3])
def test_rules_within_a_group_need_one(rule):
    with pytest.raises(ValueError, match="group"):
        rule(torch.tensor([1]), torch.tensor([1]), None)


@pytest.mark.parametrize(
    ("rule", "knobs", "message"),
    [
        (rules.truncation, {"limit": 0}, "limit"),
        (rules.linear, {"alpha": 1.5, "max_length": 10}, "alpha"),
        (rules.linear, {"alpha": 0.5, "max_length": 0}, "max_length"),
        (rules.arora, {"alpha": 1.1}, "alpha"),
        (rules.alp, {"beta": -1.0}, "beta"),
        (rules.pass_rate, {"coefficient": 1.1}, "coefficient"),
        (rules.cosine, {"max_length": 0}, "max_length"),
        (rules.cosine, {"max_length": 10, "margin": -1}, "margin"),
        (rules.l1_exact, {"target_length": 0}, "target_length"),
        (rules.l1_max, {"target_length": torch.tensor([1, 2])}, "target_length"),
        (rules.l1_max, {"target_length": float("nan")}, "target_length"),
        (rules.laser_d, {"targets": [1, 2]}, "targets"),
        (rules.laser_d, {"targets": [1, 2, 0]}, "targets"),
        (rules.shorter_better, {"beta": float("nan")}, "beta"),
        (rules.gr3, {"alpha": -0.1}, "alpha"),
        (rules.leash, {"target_length": 5, "multiplier": -1.0}, "multiplier"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(rule, knobs, message):
    with pytest.raises(ValueError, match=message):
        rule(torch.tensor([3]), torch.tensor([1]), torch.tensor([0]), **knobs)


def test_equal_knobs_make_equal_rules():
    lengths, correct, group = drawn(5)
    plain = correct.float()
    for rule, knobs in [
        (rules.linear, {"alpha": 0.0, "max_length": 10}),
        (rules.arora, {"alpha": 0.0}),
        (rules.alp, {"beta": 0.0}),
        (rules.gr3, {"alpha": 0.0}),
        (rules.pass_rate, {"coefficient": 0.0}),
        (rules.cosine, {"max_length": 200, "correct_rewards": (1.0, 1.0), "wrong_rewards": (0.0, 0.0)}),
        (rules.laser, {"bonus": 0.0, "target_length": 10}),
        (rules.shorter_better, {"alpha": 1.0, "beta": 0.0}),
        (rules.l1_max, {"alpha": 0.0, "delta": 1.0, "target_length": 10}),
    ]:
        torch.testing.assert_close(rule(lengths, correct, group, **knobs), plain)
    # One target for all difficulties is LASER.
    torch.testing.assert_close(
        rules.laser_d(lengths, correct, group, targets=[40, 40, 40]),
        rules.laser(lengths, correct, group, target_length=40),
    )


@pytest.mark.parametrize("alpha", [3e-4, 0.01])
def test_l1_max_at_half_the_price_is_the_released_code(alpha):
    lengths, correct, group = drawn(6)
    released = correct * ((alpha * (60 - lengths)).clamp(-1.0, 1.0) + 1.0) / 2.0
    torch.testing.assert_close(
        rules.l1_max(lengths, correct, group, target_length=60, alpha=alpha / 2), released.float()
    )


def test_laser_with_a_base_of_minus_a_half_is_laser_with_a_third_of_a_bonus():
    lengths, correct, group = drawn(7)
    based = torch.where(correct, 1.0, -0.5) + 0.5 * (correct & (lengths <= 40))
    ours = rules.laser(lengths, correct, group, target_length=40, bonus=1 / 3)
    torch.testing.assert_close(1.5 * ours - 0.5, based)


def test_the_cosine_is_trls_below_the_margin():
    lengths = [0, 10, 50, 89, 0, 10, 50, 89, 90, 90]
    correct = [1, 1, 1, 1, 0, 0, 0, 0, 1, 0]
    theirs = get_cosine_scaled_reward(100)(
        completions=[[{"content": f"\\boxed{{{5 if flag else 6}}}"}] for flag in correct],
        solution=["\\boxed{5}"] * len(correct),
        completion_ids=[[7] * length for length in lengths],
    )
    ours = rules.cosine(
        torch.tensor(lengths),
        torch.tensor(correct),
        max_length=100,
        margin=10,
        correct_rewards=(1.0, 0.5),
        wrong_rewards=(-1.0, -0.5),
    ).tolist()
    assert ours[:-2] == pytest.approx(theirs[:-2]) and ours[-2:] == [-10.0, -10.0] != theirs[-2:]


def test_a_threshold_makes_flags_of_a_graded_reward_and_the_unshaped_one_is_logged():
    logged = {}
    reward = LengthReward("truncation", flag_column, limit=10, threshold=0.5)
    assert called(reward, [5, 5, 50], [0.9, 0.4, 1.0], log_metric=logged.__setitem__) == [1.0, 0.0, 0.0]
    assert logged == {"flag_column_truncation/unshaped": pytest.approx((0.9 + 0.4 + 1.0) / 3)}


def test_a_task_reward_may_be_a_dotted_path():
    reward = LengthReward("gr3", "reward.gsm8k.gsm8k_reward")
    assert reward.__name__ == "gsm8k_reward_gr3"


def test_num_generations_keeps_equal_prompts_apart_and_groups_whole():
    lengths, right = [10, 30, 100, 300], [1, 1, 1, 1]
    assert called(LengthReward("kimi", flag_column), lengths, right)[1] > 0
    pairs = LengthReward("kimi", flag_column, num_generations=2)
    assert called(pairs, lengths, right) == [0.5, -0.5, 0.5, -0.5]
    assert called(pairs, lengths, right, prompts=["p", "p", "q", "q"]) == [0.5, -0.5, 0.5, -0.5]
    for prompts in (["p", "q", "q", "q"], ["p", "p", "p", "q"], ["p", "p", "q", "r"]):
        with pytest.raises(ValueError, match="num_generations=2"):
            called(pairs, lengths, right, prompts=prompts)
    with pytest.raises(ValueError, match="num_generations=2"):
        called(pairs, [1, 2, 3], [1, 1, 1])
    assert called(pairs, [], []) == []


def test_the_end_counts_unless_it_is_known():
    ids = {"completion_ids": [[5, 5, 9], [5, 5, 5], []], "prompts": ["p"] * 3, "completions": [""] * 3}
    counted = LengthReward("truncation", flag_column, limit=2)
    known = LengthReward("truncation", flag_column, limit=2, eos_token_ids=[9, 10])
    assert counted(right=[1, 1, 1], **ids) == [0.0, 0.0, 1.0]
    assert known(right=[1, 1, 1], **ids) == [1.0, 0.0, 1.0]


def test_a_knob_may_be_a_column_row_by_row():
    reward = LengthReward("l1_exact", flag_column, alpha=0.01, target_length="wanted")
    assert called(reward, [100, 100, 100], [1, None, 1], wanted=[100, 7, 50], target_length=[1] * 3) == [1.0, None, 0.5]
    budget = LengthReward("l1_max", flag_column, alpha=0.01, target_length="target_length")
    assert called(budget, [60, 60], [1, 1], target_length=[60, 70]) == pytest.approx([0.5, 0.6])
    with pytest.raises(ValueError, match="'wanted'"):
        called(reward, [5], [1], target_length=[5])
    fixed = LengthReward("l1_exact", flag_column, alpha=0.01, target_length=90)
    assert called(fixed, [100], [1]) == pytest.approx([0.9])


def test_a_rule_of_ones_own_is_one_function(monkeypatch):
    monkeypatch.delitem(LENGTH_RULES, "halved", raising=False)

    @length_rule(scope="completion")
    def halved(lengths, correct, group, *, limit):
        return correct * (1.0 - 0.5 * (lengths > limit))

    reward = LengthReward("halved", flag_column, limit=5)
    assert called(reward, [5, 6, 5], [1, 1, 0]) == [1.0, 0.5, 0.0] and reward.__name__ == "flag_column_halved"
    del LENGTH_RULES["halved"]
    with pytest.raises(ValueError, match="rule .*kimi.*'halved'"):
        LengthReward("halved", flag_column, limit=5)


def test_a_wrong_knob_is_an_error_at_once():
    with pytest.raises(TypeError, match="alfa"):
        LengthReward("arora", flag_column, alfa=0.1)
    with pytest.raises(TypeError, match="target_length"):
        LengthReward("laser", flag_column)
    with pytest.raises(ValueError, match="beta"):
        LengthReward("alp", flag_column, beta=-1.0)
    with pytest.raises(ValueError, match="num_generations"):
        LengthReward("linear", flag_column, alpha=0.1, max_length=5, num_generations=0)


READY = sorted(name for name, value in vars(baselines).items() if isinstance(value, LengthReward))


def test_every_rule_is_ready_for_every_task():
    ready = sorted(f"{task}_{rule}" for task in ("gsm8k", "math", "sandbox") for rule in LENGTH_RULES)
    assert ready == READY
    assert baselines.trl_soft_overlong_512(completion_ids=[[0] * 448]) == [-0.5]
    longest = baselines.SANDBOX_P99_LENGTH
    assert baselines.trl_soft_overlong_sandbox(completion_ids=[[0] * (longest // 4), [0] * longest]) == [0, -1]


@pytest.mark.parametrize("name", READY)
def test_ready_made_rewards_are_found_by_their_path_and_survive_pickling(name):
    reward = load_reward(f"reward.baselines.{name}")
    again = pickle.loads(pickle.dumps(reward))
    assert again.__name__ == reward.__name__ == f"{reward.task_reward.__name__}_{name.partition('_')[2]}"
    call = {"completions": ["It is 5.", "\\boxed{6}", "5"], "answer": ["5"] * 3, "target_length": [100] * 3}
    # The sandbox's tokens, the end among them, are read by its reward alone.
    ids = [[1] * 40, [1] * 20, [1] * 60]
    rewards = reward(prompts=["p"] * 3, completion_ids=ids, **call)
    assert again(prompts=["p"] * 3, completion_ids=ids, **call) == rewards and len(rewards) == 3
    if not name.startswith("sandbox"):
        assert (rewards[0] >= rewards[2] or "l1_exact" in name) and (rewards[2] > rewards[1] or "kimi" in name)


@pytest.mark.parametrize(
    ("name", "lengths", "expected"),
    [
        ("linear", [128, 1000, 3], [0.9, 0.6, 0.0]),
        # cos(pi / 2) = 0; 500 and 16 more are too many for 512.
        ("cosine", [256, 500, 256], [1.5, -10.0, -5.0]),
        # p = 2/3: 1 - 1/4 * 2/3 * 1/2, and 1 - 1/4 * 2/3.
        ("pass_rate", [128, 256, 3], [11 / 12, 5 / 6, 0.0]),
        # 5e-4 * 2/3 a token.
        ("alp", [120, 240, 3], [0.96, 0.92, 0.0]),
    ],
)
def test_ready_made_rewards_by_hand(name, lengths, expected):
    rewards = load_reward(f"reward.baselines.gsm8k_{name}")(
        prompts=["p"] * 3,
        completions=["5", "so 5", "6"],
        completion_ids=[[7] * length for length in lengths],
        answer=["5"] * 3,
    )
    assert rewards == pytest.approx(expected)
