"""Length penalties where a group spans processes: the numbers are those of one process, and nobody waits in vain."""

import copy
from types import SimpleNamespace

import pytest
import torch
from launched import run_two
from places import PATHS
from processes import FakeProcesses

from lenvm_rl.trainers.rewards import watched
from reward.length_reward import LengthReward
from reward.rules import LENGTH_RULES, length_rule


def flag_column(completions, right, **columns):
    """A task reward that reads its flags from a column, and fails where a flag is a text."""
    if "fails" in right:
        raise OSError("the grader is not there")
    return list(right)


# A setting of each penalty that bites at the lengths below.
PENALTIES = [
    LengthReward("linear", flag_column, alpha=0.5, max_length=100),
    LengthReward("truncation", flag_column, limit=50),
    LengthReward("kimi", flag_column),
    LengthReward("arora", flag_column, alpha=0.4),
    LengthReward("cosine", flag_column, max_length=100, margin=10),
    LengthReward("alp", flag_column, beta=0.01),
    LengthReward("pass_rate", flag_column),
    LengthReward("shorter_better", flag_column, beta=0.01),
    LengthReward("gr3", flag_column),
    LengthReward("laser", flag_column, target_length=50),
    LengthReward("l1_exact", flag_column, alpha=0.01, target_length="target_length"),
    LengthReward("l1_max", flag_column, alpha=0.01, target_length="target_length"),
    LengthReward("leash", flag_column, target_length=50, multiplier=0.5, rate=0.1),
    LengthReward("laser_d", flag_column, candidates=[20, 40, 60, 80], every=2),
]
each = pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: penalty.name)


def rows(lengths, right, prompts=None, **columns):
    """The columns of a call on completions of these lengths, all of one prompt unless prompts are given."""
    return {
        "prompts": prompts or ["p"] * len(lengths),
        "completions": [""] * len(lengths),
        "completion_ids": [[7] * length for length in lengths],
        "right": right,
        **columns,
    }


def share_of(batch, rank, count):
    """The rows that a process has of a batch that is shared out in order."""
    size = len(batch["prompts"]) // count
    return {name: column[rank * size : (rank + 1) * size] for name, column in batch.items()}


def drawn(groups=4, size=6, seed=0):
    """A batch of whole groups: prompts are chats, and some have no flag."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 100, (groups * size,), generator=generator).tolist()
    right = [[1, 1, 0, None][draw] for draw in torch.randint(0, 4, (groups * size,), generator=generator).tolist()]
    prompts = [[{"role": "user", "content": f"question {row // size}"}] for row in range(groups * size)]
    wanted = [30 + row // size for row in range(groups * size)]
    return rows(lengths, right, prompts, target_length=wanted)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_group_over_processes_is_one_group(monkeypatch, count):
    batch = rows([10, 20, 30, 40, 50, 60, 70, 80], [1] * 8)
    reward = LengthReward("kimi", flag_column)
    processes = FakeProcesses(monkeypatch, count)
    parts = processes.run(lambda rank: reward(**share_of(batch, rank, count)))
    # 0.5 - (L - 10) / 70.
    expected = [0.5, 0.3571429, 0.2142857, 0.0714286, -0.0714286, -0.2142857, -0.3571429, -0.5]
    assert [len(part) for part in parts] == [8 // count] * count
    assert sum(parts, []) == pytest.approx(expected)


@each
@pytest.mark.parametrize(("count", "size"), [(2, 8), (4, 8), (8, 4), (2, 12), (3, 24)])
@pytest.mark.parametrize("given", [True, False])
def test_every_penalty_pays_what_it_pays_on_one_process(monkeypatch, penalty, count, size, given):
    batch = drawn(24 // size, size)
    alone = copy.deepcopy(penalty)
    alone.num_generations = size if given else None
    many = [copy.deepcopy(alone) for _ in range(count)]
    # A call has the state that those before it left.
    expected = [alone(**batch) for _ in range(3)]
    processes = FakeProcesses(monkeypatch, count)

    def call(rank):
        return [many[rank](**share_of(batch, rank, count)) for _ in range(3)]

    parts = processes.run(call)
    for turn in range(3):
        assert sum((part[turn] for part in parts), []) == pytest.approx(expected[turn])
    assert len(set(map(repr, expected[0]))) >= 3, "this setting does not bite"
    flags = [flag for one in many for flag in one.unshaped_flags]
    assert flags == batch["right"] == alone.unshaped_flags
    if alone.state is not None:
        assert all(one.state_dict() == alone.state_dict() != penalty.state_dict() for one in many)
    # What looks at one completion at a time asks nobody; otherwise, whether all went well, and then what each has.
    assert processes.exchanges == (0 if penalty.rule.scope == "completion" else 6)


def test_the_scope_of_each_penalty():
    scopes = {penalty.name: penalty.rule.scope for penalty in PENALTIES}
    assert [name for name, scope in scopes.items() if scope == "group"] == [
        "kimi",
        "arora",
        "alp",
        "pass_rate",
        "shorter_better",
        "gr3",
        "laser_d",
    ]
    assert [name for name, scope in scopes.items() if scope == "batch"] == ["leash"]


@pytest.mark.parametrize("right", [[[None, None], [1, 1]], [[1, 1], [None, None]]])
def test_a_process_with_nothing_to_count_takes_part(monkeypatch, right):
    reward = LengthReward("kimi", flag_column)
    parts = FakeProcesses(monkeypatch, 2).run(lambda rank: reward(**rows([10, 30], right[rank])))
    assert parts == [[None, None] if flags[0] is None else [0.5, -0.5] for flags in right]


def test_nothing_to_count_anywhere(monkeypatch):
    for penalty in PENALTIES:
        reward = copy.deepcopy(penalty)
        batch = rows([0, 5], [None, None], target_length=[9, 9])
        assert FakeProcesses(monkeypatch, 2).run(lambda rank, r=reward, b=batch: r(**b)) == [[None, None]] * 2


@pytest.mark.parametrize("name", ["kimi", "leash", "laser_d"])
def test_an_error_on_one_process_reaches_all(monkeypatch, name):
    (penalty,) = [penalty for penalty in PENALTIES if penalty.name == name]
    reward = [copy.deepcopy(penalty) for _ in range(3)]

    def call(rank):
        return reward[rank](**rows([10, 30], ["fails", 1] if rank == 1 else [1, 1]))

    first, second, third = FakeProcesses(monkeypatch, 3).run(call)
    assert isinstance(second, OSError)
    for other in (first, third):
        assert isinstance(other, RuntimeError)
        assert "process 1" in str(other) and "the grader is not there" in str(other)


def test_groups_that_are_not_whole_are_refused_on_all(monkeypatch):
    reward = LengthReward("kimi", flag_column, num_generations=4)
    for prompts in (["p", "q", "q"], ["p", "p", "p"]):
        outcomes = FakeProcesses(monkeypatch, 2).run(lambda rank, p=prompts: reward(**rows([1, 2, 3], [1] * 3, p)))
        assert all("num_generations=4" in str(outcome) for outcome in outcomes)


def test_the_unshaped_reward_is_the_mean_over_the_completions_of_all(monkeypatch):
    # 1 of 3 on one process, 1 of 1 on the other: 2 of 4.
    right = [[1, 0, 0], [1, None, None]]
    for penalty in (PENALTIES[0], LengthReward("kimi", flag_column)):
        logged = []
        reward = copy.deepcopy(penalty)

        def call(rank, reward=reward, logged=logged):
            reward(**rows([10, 20, 30], right[rank]), log_metric=lambda name, value: logged.append(value))

        assert FakeProcesses(monkeypatch, 2).run(call) == [None, None]
        # TRL averages what all processes logged.
        assert sum(logged) / len(logged) == pytest.approx(0.5)


def test_an_error_of_any_reward_function_ends_the_trainers_of_all(monkeypatch, tmp_path):
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=3),
        args=SimpleNamespace(output_dir=tmp_path),
        accelerator=SimpleNamespace(process_index=1),
    )
    function = watched(flag_column, "flag_column", trainer)

    def call(rank):
        return function(**rows([10, 30], [1] if rank == 1 else [1, 0]))

    first, second = FakeProcesses(monkeypatch, 2).run(call)
    # Where it happened, the error is its own and the completions are kept.
    assert isinstance(second, ValueError) and "1 rewards, but 2" in str(second) and len(second.__notes__) == 1
    assert isinstance(first, RuntimeError) and "'flag_column'" in str(first) and "process 1" in str(first)
    assert len(list(tmp_path.iterdir())) == 1


def test_columns_that_a_rule_within_a_group_reads_come_along(monkeypatch):
    monkeypatch.setitem(LENGTH_RULES, "wanted_and_longest", None)

    @length_rule()
    def wanted_and_longest(lengths, correct, group, *, wanted):
        assert wanted.shape == lengths.shape
        return lengths - lengths.max() + wanted if len(lengths) else lengths

    batch = rows([1, 2, 3, 4], [1, None, 1, 1], wanted=[10, 20, 30, 40])
    reward = LengthReward("wanted_and_longest", flag_column, wanted="wanted")
    parts = FakeProcesses(monkeypatch, 2).run(lambda rank: reward(**share_of(batch, rank, 2)))
    assert parts == [[7, None], [29, 40]]


TWO_PROCESSES = """
import sys
sys.path[:0] = {paths!r}
import torch

from trainer_parts import grpo
from lenvm_rl.reward_functions import check_returned
from reward.length_reward import LengthReward
from reward.rules import kimi

def starts_low(completion_ids, **columns):
    return [float(ids[0] < 8) if len(ids) % 5 else None for ids in completion_ids]

seen = []

class Seen(LengthReward):
    def __call__(self, prompts, completions, completion_ids, **columns):
        paid = super().__call__(prompts, completions, completion_ids, **columns)
        seen.append((completion_ids, starts_low(completion_ids), paid, columns["num_generations"]))
        return paid

# A process has eight rows and a group sixteen: one group spans both.
rewards = [Seen("kimi", starts_low), LengthReward("leash", starts_low, target_length=3),
           LengthReward("laser_d", starts_low, candidates=[1, 2, 4, 6], every=2)]
trainer = grpo({folder!r}, rewards, num_generations=16, max_steps=2, ddp_backend="gloo")
trainer.train()
rank = trainer.accelerator.process_index
everyone = [None, None]
torch.distributed.all_gather_object(everyone, [seen, *(reward.state_dict() for reward in rewards[1:])])
(first, *states), (second, *others) = everyone
assert states == others, "the processes have drifted apart"
assert states[0]["multiplier"] != 0.01
for mine, theirs in zip(first, second, strict=True):
    ids, flags, paid = (mine[place] + theirs[place] for place in range(3))
    assert len(ids) == 16 and mine[3] == 16
    counted = [row for row, flag in enumerate(flags) if flag is not None]
    expected = kimi(torch.tensor([len(ids[row]) for row in counted]),
                                  torch.tensor([flags[row] for row in counted]), torch.zeros(len(counted)))
    assert [paid[row] for row in counted] == expected.tolist()
    assert all(paid[row] is None for row in range(16) if row not in counted)

# An error in one process ends both.
def fails(completion_ids, **columns):
    if rank:
        raise OSError("the grader is not there")
    return [1.0] * len(completion_ids)

try:
    LengthReward("kimi", fails)(prompts=["p"], completions=[""], completion_ids=[[1]])
except (OSError if rank else RuntimeError) as error:
    assert "the grader is not there" in str(error)
else:
    raise AssertionError("no error")
"""


@pytest.mark.slow
def test_two_real_processes(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES.format(paths=PATHS, folder=str(tmp_path / "run")))
    run_two(script)


def test_a_linear_penalty_asks_nobody(monkeypatch):
    processes = FakeProcesses(monkeypatch, 2)
    reward = LengthReward("linear", flag_column, alpha=1.0, max_length=10, num_generations=16)
    assert processes.run(lambda rank: reward(**rows([5], [1]))) == [[0.5], [0.5]] and processes.exchanges == 0
