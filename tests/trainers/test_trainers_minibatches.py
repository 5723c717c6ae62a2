"""Each pass of PPO through a generation batch deals the same rows into other mini-batches."""

import torch
from trainer_parts import first_is_w8, ppo, random_lenvm

from lenvm_rl.trainers.ppo import dealt_again


def test_rows_stay_together_and_none_is_lost():
    parts = []
    for start in (0, 4, 8):
        numbers = torch.arange(start, start + 4)
        further = {"items": torch.tensor(9), "images": numbers.tolist(), "nothing": None}
        parts.append({"ids": numbers.view(4, 1), "value": numbers, **further})
    torch.manual_seed(0)
    again = dealt_again(parts)
    rows = torch.cat([part["ids"] for part in again]).flatten().tolist()
    assert (
        sorted(rows) == list(range(12)) and rows != list(range(12)) and [len(part["ids"]) for part in again] == [4] * 3
    )
    for part in again:
        assert part["ids"].flatten().tolist() == part["value"].tolist() == part["images"]
        assert part["items"] == 9 and part["nothing"] is None
    # One mini-batch, or pictures: nothing to deal, or nothing that may be.
    assert dealt_again(parts[:1]) == parts[:1]
    pictures = [{**part, "pixel_values": torch.zeros(7, 2)} for part in parts]
    assert dealt_again(pictures) is pictures


def test_passes_of_a_run_differ_in_their_mini_batches_only(tmp_path):
    seen = []
    trainer = ppo(
        tmp_path, first_is_w8, random_lenvm(), num_iterations=3, steps_per_generation=4, gradient_accumulation_steps=1,
        per_device_train_batch_size=2, num_generations=2, max_steps=24,
    )  # fmt: skip
    inner = trainer._compute_loss

    def watched(model, inputs):
        seen.append({(tuple(ids.tolist()), round(float(value), 5)) for ids, value in zip(
            inputs["completion_ids"], inputs["advantages"][:, 0], strict=True)})  # fmt: skip
        return inner(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    passes = [seen[start : start + 4] for start in range(0, 24, 4)]
    for batch in (passes[:3], passes[3:]):
        rows = [set().union(*each) for each in batch]
        assert rows[0] == rows[1] == rows[2]
        assert not all(each == batch[0] for each in batch[1:])
