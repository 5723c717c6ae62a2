"""What a frozen decoder says is computed once, kept, and the same as when it is asked again."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from ragged import random_rollouts
from tiny import tiny_llama, tiny_tokenizer

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining import LengthValueCollator, LengthValueTrainer, LengthValueTrainingArguments
from lenvm_rl.pretraining.hidden_states import HiddenStates, decoder_digest, remove_hidden_states

GAMMA = 0.9
COLLATE = LengthValueCollator()


def make_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA, form="head", tokenizer=tiny_tokenizer())


def kept(path, rollouts, truncated="bootstrap", **part):
    return HiddenStates(path, rollouts, 16, truncated, {"of": "this"}, **part)


@pytest.mark.parametrize("truncated", ["bootstrap", "infinite"])
def test_states_are_those_of_each_completion_alone(truncated, tmp_path):
    rollouts = Dataset.from_list(random_rollouts(12, cut_share=0.5))
    model = make_model()
    states = kept(tmp_path / "states.bin", rollouts, truncated)
    states.fill(model, LengthValueCollator(truncated=truncated), batch_size=5, progress=False)
    assert states.bytes == states.path.stat().st_size == 2 * 16 * sum(states.counts)
    for row, rollout in enumerate(rollouts):
        ids = torch.tensor([rollout["prompt_ids"] + rollout["completion_ids"]])
        with torch.no_grad():
            alone = model.backbone(ids).last_hidden_state[0, len(rollout["prompt_ids"]) - 1 :]
        # The state after the last token is read where a cut is bootstrapped, and nowhere else.
        reads_cut = truncated == "bootstrap" and rollout["finish_reason"] == "length"
        assert len(states.of(row)) == len(rollout["completion_ids"]) + reads_cut
        torch.testing.assert_close(states.of(row).float(), alone[: len(states.of(row))], atol=2e-2, rtol=1e-2)


# Batches of 10 go across a multiple of 64, batches of 16 end on it: the note is of the last that was reached.
@pytest.mark.parametrize(("size", "noted"), [(10, 70), (16, 128)])
def test_what_was_computed_before_an_interruption_is_not_computed_again(size, noted, tmp_path):
    rollouts = Dataset.from_list(random_rollouts(200, cut_share=0.0))
    model = make_model()
    asked = []
    hook = model.backbone.register_forward_pre_hook(lambda *_: asked.append(1))
    states = kept(tmp_path / "states.bin", rollouts)

    def interrupt(module, given):
        if len(asked) == 12:
            raise KeyboardInterrupt

    stop = model.backbone.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        states.fill(model, COLLATE, batch_size=size, progress=False)
    stop.remove()
    # Eleven batches were done.
    again = kept(tmp_path / "states.bin", rollouts)
    assert again.done == noted
    asked.clear()
    again.fill(model, COLLATE, batch_size=size, progress=False)
    assert len(asked) == -(-(200 - noted) // size)
    asked.clear()
    kept(tmp_path / "states.bin", rollouts).fill(model, COLLATE, batch_size=size, progress=False)
    assert asked == []
    hook.remove()
    fresh = kept(tmp_path / "other.bin", rollouts)
    fresh.fill(model, COLLATE, batch_size=size, progress=False)
    assert np.array_equal(np.fromfile(again.path), np.fromfile(fresh.path), equal_nan=True)
    # Of something else, it is made anew.
    other = HiddenStates(tmp_path / "states.bin", rollouts, 16, "bootstrap", {"of": "that"})
    assert other.done == 0


def test_processes_write_their_shares_into_one_file(tmp_path):
    rollouts = Dataset.from_list(random_rollouts(9, cut_share=0.3))
    model = make_model()
    for process in range(4):
        kept(tmp_path / "shared.bin", rollouts, process=process, processes=4).fill(model, COLLATE, 2, progress=False)
    alone = kept(tmp_path / "alone.bin", rollouts)
    alone.fill(model, COLLATE, 2, progress=False)
    shared = kept(tmp_path / "shared.bin", rollouts, process=3, processes=4)
    for row in range(9):
        torch.testing.assert_close(shared.of(row), alone.of(row))


def test_states_of_another_process_have_to_be_in_the_same_file(tmp_path):
    rollouts = Dataset.from_list(random_rollouts(9, cut_share=0.0))
    model = make_model()
    first, second = (kept(tmp_path / "shared.bin", rollouts, process=each, processes=2) for each in (0, 1))
    first.fill(model, COLLATE, 2, progress=False)
    with pytest.raises(ValueError, match="cache_hidden_states"):
        first.check_whole()
    second.fill(model, COLLATE, 2, progress=False)
    first.check_whole()


@pytest.mark.parametrize("processes", [1, 2])
def test_states_that_others_have_begun_meanwhile_are_not_mixed_with_these(processes, tmp_path):
    """A is done by two processes; of B, with as many rollouts, one process comes no further than opening its file."""
    rollouts, model, path = Dataset.from_list(random_rollouts(12, cut_share=0.0)), make_model(), tmp_path / "states.bin"
    for each in (0, 1):
        kept(path, rollouts, process=each, processes=2).fill(model, COLLATE, 4, progress=False)
    before = kept(path, rollouts, process=1, processes=2).of(11)
    HiddenStates(path, rollouts, 8, "bootstrap", {"of": "that"}, process=0, processes=processes)
    assert len(list(tmp_path.glob("*.bin"))) == 1
    again = kept(path, rollouts, process=1, processes=2)
    assert again.done == 6
    again.fill(model, COLLATE, 4, progress=False)
    assert torch.equal(again.of(11), before)


def head_trainer(tmp_path, **changes):
    settings = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, **changes}
    model = make_model()
    with torch.no_grad():
        model.head.output.weight.copy_(torch.linspace(-1, 1, 16))
    return LengthValueTrainer(model, LengthValueTrainingArguments(str(tmp_path), **settings))


def test_other_data_is_evaluated_and_the_first_again(tmp_path):
    data = [Dataset.from_list(random_rollouts(count, seed=count, cut_share=0.2)) for count in (24, 20)]
    keeps = head_trainer(tmp_path)
    asks = head_trainer(tmp_path, cache_hidden_states=False)
    for rollouts in (*data, data[0]):
        found, asked = (trainer.evaluate(rollouts)["eval_length_mae_at_0"] for trainer in (keeps, asks))
        assert found == pytest.approx(asked, rel=1e-2)


def test_states_are_computed_without_packing_where_it_is_off(tmp_path, monkeypatch):
    trainer = head_trainer(tmp_path, packing=False)
    backbone, inputs = trainer.model.backbone, []
    forward = backbone.forward
    monkeypatch.setattr(backbone, "forward", lambda **given: inputs.append(given) or forward(**given))
    trainer.evaluate(Dataset.from_list(random_rollouts(10, cut_share=0.0)))
    assert inputs and all(given["attention_mask"] is not None for given in inputs)


def test_the_digest_of_a_decoder_changes_with_its_config():
    model = make_model()
    before = decoder_digest(model)
    model.backbone.config.rope_parameters = {**model.backbone.config.rope_parameters, "rope_theta": 500.0}
    assert decoder_digest(model) != before


@pytest.mark.parametrize("truncated", ["bootstrap", "drop"])
def test_a_head_learns_the_same_from_kept_states(truncated, tmp_path):
    """Steps, losses and metrics are those of a run that asks the decoder every time, up to bfloat16."""
    rollouts = Dataset.from_list(random_rollouts(48, cut_share=0.0 if truncated == "drop" else 0.2))
    logs = []
    for name, keep in (("asked", False), ("kept", True)):
        args = LengthValueTrainingArguments(
            str(tmp_path / name),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            use_cpu=True,
            learning_rate=1e-2,
            num_train_epochs=3,
            per_device_train_batch_size=16,
            truncated=truncated,
            cache_hidden_states=keep,
        )
        trainer = LengthValueTrainer(make_model(), args, train_dataset=rollouts, eval_dataset=rollouts)
        asked = []
        trainer.model.backbone.register_forward_pre_hook(lambda *_, asked=asked: asked.append(1))
        trainer.train()
        found = trainer.evaluate()
        logs.append(([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], found))
        # Nine steps, and an evaluation of six batches; or each completion once, in batches of eight, twice.
        assert len(asked) == (12 if keep else 9 + 6)
        assert len(list((tmp_path / name).glob("hidden_states_train.*.bin"))) == keep
    (losses, metrics), (kept_losses, kept_metrics) = logs
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(kept_losses, losses, rtol=2e-2)
    assert kept_metrics.keys() == metrics.keys()
    assert kept_metrics["eval_length_mae_at_0"] == pytest.approx(metrics["eval_length_mae_at_0"], rel=2e-2)
    assert json.loads((tmp_path / "kept").glob("hidden_states_eval.*.bin.*.json").__next__().read_text())["done"] == 48


def test_a_finished_model_is_left_without_them(tmp_path):
    (tmp_path / "hidden_states_train.0a1b.bin").write_bytes(b"0")
    (tmp_path / "hidden_states_train.0a1b.bin.0-4.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"0")
    remove_hidden_states(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("layers", [[-1], [0, 2], [1, -1]])
def test_layers_are_read_side_by_side_each_of_unit_size(layers, tmp_path):
    """By hand: x / rms(x) of each hidden state, in the order of the layers, then the head; saved, cached and loaded."""
    base = tiny_llama()
    model = LengthValueModel.from_backbone(base, gamma=GAMMA, form="head", layers=layers, tokenizer=tiny_tokenizer())
    ids = torch.tensor([[3, 5, 4, 7]])
    with torch.no_grad():
        states = base(ids, output_hidden_states=True).hidden_states
    read = torch.cat([states[layer] / (states[layer] ** 2).mean(-1, keepdim=True).sqrt() for layer in layers], -1)
    torch.testing.assert_close(model.hidden_states(ids).detach(), read, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(ids).logits, model.head(read), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.from_hidden_states(read).logits, model.head(read))
    model.save_pretrained(tmp_path / "model")
    again = LengthValueModel.from_pretrained(tmp_path / "model", base=base)
    assert again.config.layers == [layer % 3 for layer in layers]
    assert torch.equal(again(ids).logits, model(ids).logits)
    rollouts = Dataset.from_list(random_rollouts(5, cut_share=0.0))
    states = HiddenStates(tmp_path / "s.bin", rollouts, 16 * len(layers), "bootstrap", {})
    states.fill(model, COLLATE, batch_size=2, progress=False)
    ids = torch.tensor([rollouts[4]["prompt_ids"] + rollouts[4]["completion_ids"]])
    alone = model.hidden_states(ids)[0, len(rollouts[4]["prompt_ids"]) - 1 :]
    torch.testing.assert_close(states.of(4).float(), alone[: len(states.of(4))].detach(), atol=2e-2, rtol=1e-2)


def test_layers_that_are_none_are_refused():
    for layers in ([3], [-4], [1, 1], [2, -1], []):
        with pytest.raises(ValueError, match="layers"):
            LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA, form="head", layers=layers)
    for form in ("full", "adapter"):
        with pytest.raises(ValueError, match="layers"):
            LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA, form=form, layers=[1])
