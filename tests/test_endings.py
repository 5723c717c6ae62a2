"""What ends a completion: ids, words of who sampled it, budgets; and what counts as its length."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_tokenizer
from transformers import GenerationConfig

from lenvm_rl.endings import (
    end_token_ids,
    finished_rows,
    likeliest_end,
    own_length,
    own_lengths,
    padding_id,
    strip_completion,
)

EOS, TURN = 1, 9


def rows(*completions, pad=0):
    """Ids and mask of completions that are padded on the right with `pad`."""
    width = max(map(len, completions))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in completions])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in completions])
    return ids, mask


def test_ends_are_those_of_the_tokenizer_and_of_every_setting():
    tokenizer = tiny_tokenizer()
    assert end_token_ids(tokenizer) == [EOS]
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=[TURN, EOS]), None, 4) == [EOS, 4, TURN]
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=TURN)) == [EOS, TURN]
    assert end_token_ids(None, torch.tensor(TURN), torch.tensor([5, 4])) == [4, 5, TURN]
    assert end_token_ids(SimpleNamespace(eos_token_id=None), GenerationConfig()) == []


@pytest.mark.parametrize("pad", [0, EOS, None])
def test_what_pads_is_the_pad_token_or_an_end(pad):
    tokenizer = SimpleNamespace(pad_token_id=pad)
    assert padding_id(tokenizer, [EOS, TURN]) == (EOS if pad is None else pad)
    with pytest.raises(ValueError, match="eos_token"):
        padding_id(tokenizer, [])


def test_padding_after_the_end_is_stripped_exactly():
    assert strip_completion([7, 1, 0, 0], [1], 4) == ([7, 1], "stop")
    assert strip_completion([1, 0, 0, 0], [1], 4) == ([1], "stop")
    # A pad token that was sampled before the end is a token; one that is an end ends.
    assert strip_completion([0, 7, 0, 2], [1, 2], 4) == ([0, 7, 0, 2], "stop")
    assert strip_completion([7, 1, 1, 1], [1], 4) == ([7, 1], "stop")
    assert strip_completion([7, 8, 9, 1], [1], 4) == ([7, 8, 9, 1], "stop")
    assert strip_completion([7, 8, 0, 0], [1], 4) == ([7, 8, 0, 0], "length")
    with pytest.raises(ValueError, match="after 3 of 4 tokens"):
        strip_completion([7, 8, 9], [1], 4)


class TestFinished:
    def test_any_of_several_ends_ends(self):
        ids, mask = rows([6, 8, 13, TURN], [6, 8, 13, EOS], [6, TURN, 13, 8])
        assert finished_rows(ids, mask, [EOS, TURN]).tolist() == [True, True, False]
        assert finished_rows(ids, mask, [EOS]).tolist() == [False, True, False]

    def test_padding_is_no_end_even_if_it_is_the_same_token(self):
        ids, mask = rows([6, 8], [6, EOS], [6, 8, 13], pad=EOS)
        assert finished_rows(ids, mask, [EOS]).tolist() == [False, True, False]

    def test_a_row_is_cut_if_it_used_up_its_budget(self):
        ids, mask = rows([6, 8], [6, 8, 13], [6, 8, EOS])
        assert finished_rows(ids, mask, [EOS], budget=3).tolist() == [True, False, True]
        # A budget of each row's own: the second had room for more.
        assert finished_rows(ids, mask, [EOS], budget=torch.tensor([2, 4, 3])).tolist() == [False, True, True]

    def test_word_from_who_sampled_settles_it(self):
        ids, mask = rows([6, 8], [6, EOS], [6, 8, 13])
        said = torch.tensor([False, False, True])
        assert finished_rows(ids, mask, [EOS], budget=3, said=said).tolist() == [False, False, True]

    def test_text_of_an_environment_is_no_end(self):
        ids, mask = rows([8, 9, 10, EOS], [8, 9, 10, EOS])
        actions = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 1]])
        assert finished_rows(ids, mask, [EOS], actions).tolist() == [False, True]
        # Its episode was over before the budget was.
        assert finished_rows(ids, mask, [EOS], actions, budget=9).tolist() == [True, True]

    def test_a_row_without_tokens_has_not_finished(self):
        ids, mask = torch.tensor([[0, 0], [8, EOS]]), torch.tensor([[0, 0], [1, 1]])
        assert finished_rows(ids, mask, [EOS], budget=4, said=None).tolist() == [False, True]
        assert finished_rows(ids, mask, [EOS], said=torch.tensor([1, 1])).tolist() == [False, True]
        assert finished_rows(ids[:, :0], mask[:, :0], [EOS]).tolist() == [False, False]


class TestLengths:
    def test_the_end_and_what_others_wrote_do_not_count(self):
        ids, mask = rows([8, 9, 10, EOS], [8, 9, 10], [8, 9, 10, EOS], [8, 9, 10, EOS])
        actions = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]])
        assert own_lengths(ids, mask, [EOS]).tolist() == [3, 3, 3, 3]
        assert own_lengths(ids, mask, [EOS], actions).tolist() == [3, 3, 2, 1]
        lists = [row[: sum(exists)] for row, exists in zip(ids.tolist(), mask.tolist(), strict=True)]
        for row, own, length in zip(lists, actions.tolist(), [3, 3, 2, 1], strict=True):
            assert own_length(row, [EOS], own[: len(row)]) == length

    def test_without_ends_every_own_token_counts(self):
        assert own_length([8, 9, EOS]) == 3
        assert own_length([], [EOS]) == 0
        assert own_length([8, 9, 10, 10, 10, EOS], (), [1, 1, 0, 0, 0, 1]) == 3


def test_the_likeliest_end_is_each_rows_own():
    scores = torch.tensor([[0.0, 2.0, 9.0, 1.0], [0.0, 1.0, 9.0, 2.0], [0.0, -torch.inf, 9.0, -torch.inf]])
    assert likeliest_end(scores, [1, 3]).tolist() == [1, 3, 1]
    assert likeliest_end(scores, [3, 1]).tolist() == [1, 3, 3]
