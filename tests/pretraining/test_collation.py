"""Batches: the right number of tokens to come at the right column, and sequences that do not see each other."""

import pytest
import torch
from ragged import EOS, make_rollout, random_rollouts
from tiny import tiny_length_value_model, tiny_llama, tiny_qwen2

from lenvm_rl.pretraining.batches import LengthValueCollator, check_isolation, unpack
from lenvm_rl.pretraining.loss import CUT, IGNORED


def test_a_batch_by_hand():
    rollouts = [make_rollout([10, 11], [12, 13, EOS], group=4), make_rollout([20], [21, 22], "length", group=5)]
    batch = LengthValueCollator(row_length=8)(rollouts)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 20, 21, 22]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORED, 3, 2, 1, 2, 1, IGNORED]]
    assert batch["endings"][0, 4:6].tolist() == [CUT, CUT]
    assert batch["sequences"].tolist() == [[0, 1, 3, 1, 4, 2], [0, 4, 2, 0, 5, 1]]
    assert "attention_mask" not in batch
    # Nothing is read after the last state unless the cut is bootstrapped.
    assert LengthValueCollator(truncated="finished")(rollouts)["input_ids"].tolist() == [[10, 11, 12, 13, 20, 21]]
    left = LengthValueCollator(packing=False, padding_side="left", pad_token_id=0)(rollouts)
    assert left["input_ids"].tolist() == [[10, 11, 12, 13], [0, 20, 21, 22]]
    assert left["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert left["labels"].tolist() == [[IGNORED, 3, 2, 1], [IGNORED, 2, 1, IGNORED]]
    assert left["sequences"].tolist() == [[0, 1, 3, 1, 4, 2], [1, 1, 2, 0, 5, 1]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize(
    "layout", [{}, {"row_length": 300}, {"flatten": True}, {"packing": False, "padding_side": "left"}]
)
def test_values_in_a_row_are_those_of_the_sequence_alone(backbone, attention, layout):
    model = tiny_length_value_model(backbone(attn_implementation=attention))
    assert model.backbone.config._attn_implementation == attention
    check_isolation(model)
    rollouts = random_rollouts(12)
    batch = LengthValueCollator(**layout)(rollouts)
    row_of, first, lengths, _, _, _ = batch["sequences"].unbind(1)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
    with torch.no_grad():
        packed = unpack(model(**inputs).values, row_of, first, lengths)
        for index, rollout in enumerate(rollouts):
            ids = torch.tensor([rollout["prompt_ids"] + rollout["completion_ids"]])
            alone = model(ids).values[0, len(rollout["prompt_ids"]) - 1 : -1]
            torch.testing.assert_close(packed[index, : lengths[index]], alone, atol=1e-5, rtol=0)
            # Values that hardly vary would hide a leak.
            assert len(alone) < 3 or alone.std() > 0.01
