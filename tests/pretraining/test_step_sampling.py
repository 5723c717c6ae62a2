"""What an optimizer step is made of, and in which order: lengths decide the order in a step, never its members."""

import torch

from lenvm_rl.pretraining.batches import StepSampler, longest_first


def steps(sampler, size):
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order), size)]


def test_a_step_is_drawn_without_regard_to_length_and_sorted_inside():
    sizes = torch.randint(1, 500, (50,)).tolist()
    drawn = steps(StepSampler(sizes, 12, seed=3, epoch=lambda: 0), 12)
    unsorted = steps(StepSampler([1] * 50, 12, seed=3, epoch=lambda: 0), 12)
    assert [set(step) for step in drawn] == [set(step) for step in unsorted]
    assert sorted(index for step in drawn for index in step) == list(range(50))
    for step in drawn:
        assert [sizes[index] for index in step] == sorted((sizes[index] for index in step), reverse=True)
    # The steps are not buckets: long and short completions in each.
    assert all(max(sizes[i] for i in step) > 250 > min(sizes[i] for i in step) for step in drawn[:4])


def test_epochs_differ_and_come_again():
    epoch = 0
    sampler = StepSampler(list(range(1, 41)), 8, seed=0, epoch=lambda: epoch)
    first = list(sampler)
    epoch = 1
    second = list(sampler)
    epoch = 0
    assert first == list(sampler) != second and sorted(first) == sorted(second)


def test_what_fills_up_an_epoch_is_drawn_without_regard_to_length():
    """Each process gets as many micro-batches: of 41 completions in forwards of 16, seven come twice, of any length."""
    sizes, repeated = list(range(1, 42)), []
    for seed in range(60):
        sampler = StepSampler(sizes, 32, seed=seed, epoch=lambda: 0, multiple=16)
        order = list(sampler)
        assert len(order) == len(sampler) == 48 and set(order) == set(range(41))
        counts = torch.bincount(torch.tensor(order))
        repeated += [sizes[index] for index, count in enumerate(counts) for _ in range(count - 1)]
    # 420 draws from 1 … 41: mean 21, standard error 0.58; the longest of the first step would have more than 30.
    assert len(repeated) == 420 and abs(sum(repeated) / 420 - 21) < 2.5


def test_whole_prompts_are_drawn_when_they_share():
    groups = [index // 4 for index in range(40)]
    order = list(StepSampler([1] * 40, 8, seed=0, epoch=lambda: 0, groups=groups))
    assert sorted(order) == list(range(40)) and order != list(range(40))
    for start in range(0, 40, 4):
        assert len({groups[index] for index in order[start : start + 4]}) == 1


def test_padding_left_in_micro_batches():
    """Very ragged lengths in micro-batches of 8, 16 of them in a step: sorting more than halves the padding."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.exp(torch.randn(512, generator=draw) * 0.8 + 4).long().clamp(min=2).tolist()

    def padding(order):
        batches = [order[start : start + 8] for start in range(0, 512, 8)]
        return 1 - sum(sizes) / sum(8 * max(sizes[index] for index in batch) for batch in batches)

    at_random = padding(torch.randperm(512, generator=draw).tolist())
    in_steps = padding(list(StepSampler(sizes, 128, seed=0, epoch=lambda: 0)))
    assert at_random > 0.6 and in_steps < 0.5 * at_random and padding(longest_first(sizes)) < in_steps
