"""A pretraining run goes on with what it was begun with, and with nothing else."""

import logging
import shutil

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from ragged import random_rollouts
from test_pretraining import make_args, make_metadata
from tiny import tiny_llama, tiny_tokenizer

from lenvm_rl.files import write_json
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.resuming import RECORD, check_resumed, find_checkpoint, fingerprint, settings_of
from lenvm_rl.rollouts.record import write_rollouts
from recipes import pretrain_lenvm

ROLLOUTS = Dataset.from_list(random_rollouts(12))


def settings(tmp_path, gamma=0.9, hidden=16, train=ROLLOUTS, **changes):
    changes = {"per_device_train_batch_size": 4, **changes}
    model = LengthValueModel.from_backbone(tiny_llama(hidden=hidden), gamma=gamma)
    return settings_of(make_args(tmp_path, **changes), model, train)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"num_train_epochs": 3}, "num_train_epochs"),
        ({"max_steps": 7}, "max_steps"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type"),
        ({"warmup_steps": 3}, "warmup_steps"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"seed": 1}, "seed"),
        ({"bf16": True}, "bf16"),
        ({"lam": 0.9}, "lam"),
        ({"truncated": "drop"}, "truncated"),
        ({"gamma_quantile": 0.9}, "gamma_quantile"),
        ({"packing": False}, "packing"),
        ({"row_length": 64}, "row_length"),
        ({"per_device_train_batch_size": 8}, "step"),
        ({"gamma": 0.95}, "gamma"),
        ({"hidden": 32}, "backbone"),
        ({"train": ROLLOUTS.select(range(11))}, "rollouts"),
        ({"train": ROLLOUTS.select([1, 0, *range(2, 12)])}, "rollouts"),
    ],
)
def test_what_the_weights_depend_on_is_compared(change, name, tmp_path):
    write_json(tmp_path / RECORD, settings(tmp_path))
    check_resumed(tmp_path, settings(tmp_path))
    with pytest.raises(ValueError, match=rf"begun with other settings \({name} "):
        check_resumed(tmp_path, settings(tmp_path, **change))


def test_a_frozen_decoder_is_compared_by_its_weights(tmp_path):
    """No checkpoint of a head holds the decoder, so that another of its size would be taken for it."""
    same, other = tiny_llama(), tiny_llama()
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.5)

    def of(base):
        return settings_of(make_args(tmp_path), LengthValueModel.from_backbone(base, gamma=0.9, form="head"), ROLLOUTS)

    write_json(tmp_path / RECORD, of(same))
    check_resumed(tmp_path, of(same))
    with pytest.raises(ValueError, match="decoder"):
        check_resumed(tmp_path, of(other))


@pytest.mark.parametrize(
    "change",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"logging_steps": 3, "logging_strategy": "steps"},
        {"save_strategy": "steps", "save_steps": 3},
        {"per_device_eval_batch_size": 2},
        {"domain_column": "domain"},
        {"report_to": "wandb"},
        {"dataloader_num_workers": 1},
        {"train": ROLLOUTS.select([*range(12)])},
        {"train": ROLLOUTS.add_column("answer", [1] * 12)},
    ],
)
def test_what_tells_of_a_run_or_makes_it_faster_is_no_other_run(change, tmp_path):
    write_json(tmp_path / RECORD, settings(tmp_path))
    check_resumed(tmp_path, settings(tmp_path, **change))


def test_a_fingerprint_does_not_depend_on_chunks():
    parts = [ROLLOUTS.select(range(5)), ROLLOUTS.select(range(5, 12))]
    assert fingerprint(concatenate_datasets(parts)) == fingerprint(ROLLOUTS)


def test_a_run_that_does_not_say_is_gone_on_with_and_remarked(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        check_resumed(tmp_path, settings(tmp_path))
    assert RECORD in caplog.text


@pytest.mark.parametrize(
    "asked, resume, found",
    [
        (None, True, "checkpoint-3"),
        ("False", True, "checkpoint-3"),
        ("true", False, "checkpoint-3"),
        (True, False, "checkpoint-3"),
        ("out/checkpoint-2/", False, "checkpoint-2"),
    ],
)
def test_the_checkpoint_to_go_on_from(asked, resume, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoint-2", "checkpoint-3", "checkpoint-4"):
        (tmp_path / "out" / name).mkdir(parents=True)
    for name in ("checkpoint-2", "checkpoint-3"):
        (tmp_path / "out" / name / "trainer_state.json").write_text("{}")
    assert find_checkpoint(make_args(tmp_path, resume_from_checkpoint=asked), resume).endswith(f"out/{found}")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    assert find_checkpoint(make_args(tmp_path), resume=True) is None
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint.*nowhere"):
        find_checkpoint(make_args(tmp_path, resume_from_checkpoint=str(tmp_path / "nowhere")), resume=False)


def test_the_recipe_leaves_the_held_out_prompts_of_the_run_alone(tmp_path):
    tokenizer = tiny_tokenizer()
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(path, random_rollouts(12, cut_share=0.0), make_metadata(tokenizer))
    tiny_llama().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    line = f"--rollouts {path} --model_name_or_path {tmp_path / 'policy'} --output_dir {tmp_path / 'out'} --max_steps 2"
    line += " --gamma 0.9 --save_steps 1 --use_cpu true --report_to none --disable_tqdm true --resume true"

    def run(*options):
        return pretrain_lenvm.main(*pretrain_lenvm.make_parser().parse_args_and_config([*line.split(), *options]))

    run("--eval_share", "0.2")
    held_out = (tmp_path / "out" / pretrain_lenvm.HELD_OUT).read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(ValueError, match=".rollouts"):
        run("--eval_share", "0.5")
    assert (tmp_path / "out" / pretrain_lenvm.HELD_OUT).read_bytes() == held_out
    run("--eval_share", "0.2")
