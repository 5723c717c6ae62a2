"""The pretraining recipe: its table of references, where it reports, and the launch configurations that it names."""

import io
import math
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from datasets import Dataset
from ragged import random_rollouts
from rich.console import Console
from test_pretraining import GAMMA, make_args
from tiny import tiny_llama
from transformers.integrations import WandbCallback

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.metrics import length_value_metrics
from lenvm_rl.pretraining.references import reference_metrics
from lenvm_rl.pretraining.trainer import LengthValueTrainer
from recipes import pretrain_lenvm

CONFIGS = sorted((Path(pretrain_lenvm.__file__).parent / "accelerate_configs").glob("*.yaml"))


def printed(lengths, groups, logit=0.0):
    """What the recipe prints for completions of these lengths, and the metrics that it prints."""
    lengths, groups, finished = torch.tensor(lengths), torch.tensor(groups), torch.ones(len(lengths))
    logits = torch.full((len(lengths), int(lengths.max())), logit)
    metrics = length_value_metrics(logits, lengths, finished, groups, 0.5)
    metrics |= reference_metrics(lengths, groups + 1, finished, groups, 0.5)
    output = io.StringIO()
    pretrain_lenvm.print_comparison({f"eval_{k}": v for k, v in metrics.items()}, Console(file=output, width=120))
    return output.getvalue(), metrics


def test_the_table_holds_the_model_beside_its_references():
    # A logit of 0 is one token at gamma 0.5; realised lengths are 2, 4, 3, 3: errors 1, 3, 2, 2 of a mean of 3.
    shown, metrics = printed([2, 4, 3, 3], [0, 0, 1, 1])
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in shown.split("\n")
        if line.startswith("│")
    }
    assert rows["this model"][:2] == ["2.000", f"{(1 / 2 + 3 / 4 + 2 / 3 + 2 / 3) / 4:.3f}"]
    assert rows["mean of all"][:2] == ["0.500", f"{(1 / 2 + 1 / 4) / 4:.3f}"]
    assert rows["median of the prompt's own"] == ["0.500", "–", "–", "–"]
    noise = (2 / 4 + 2 / 2) / 2 / 2
    assert rows["the other half of the samples"] == ["–", "–", "–", f"{noise:.3f}"]
    ratio = metrics["half_mre"] / noise
    assert f"noise between halves: {ratio:.2f} (2 prompts, halves of 1.0" in shown
    assert f"explained at the prompt: {metrics['prompt_explained_variance']:.3f}, by an exact" in shown


def test_single_completions_have_no_halves():
    shown, metrics = printed([2, 4], [0, 1])
    assert "No prompt has two or more completions" in shown and math.isnan(metrics["half_mre"])


def test_report_to_names_what_it_needs(tmp_path):
    model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
    assert make_args(tmp_path, report_to="trackio").report_to == ["trackio"]
    trainer = LengthValueTrainer(model, make_args(tmp_path, report_to="wandb"), Dataset.from_list(random_rollouts(4)))
    assert any(isinstance(callback, WandbCallback) for callback in trainer.callback_handler.callbacks)
    with pytest.raises(ValueError, match="wandbb is not supported, only .*trackio.*wandb"):
        LengthValueTrainer(model, make_args(tmp_path, report_to="wandbb"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_launch_configuration_parses_and_the_recipe_names_it(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "single_process": "NO"}
    assert config.distributed_type.value == expected[path.stem]
    assert config.mixed_precision == "no"
    assert f"recipes/accelerate_configs/{path.name}" in pretrain_lenvm.__doc__
    if path.stem == "fsdp2":
        # The classes that are wrapped: the head, and the layers of the decoder.
        model = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA)
        assert config.fsdp_config["fsdp_version"] == 2
        assert {"LengthValueHead", "LlamaDecoderLayer"} <= set(model._no_split_modules)
