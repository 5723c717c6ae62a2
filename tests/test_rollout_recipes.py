"""The two programs before training: from prompts to rollouts to a length value model, by command line and by YAML."""

import json
from dataclasses import fields

import pytest
from tiny import tiny_llama, tiny_tokenizer

from lenvm_rl.modeling import LengthValueModel
from lenvm_rl.pretraining import LengthValueTrainingArguments
from lenvm_rl.rollouts import read_rollouts
from recipes import pretrain_lenvm, sample_rollouts


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "policy"
    tiny_llama(initializer_range=0.02).save_pretrained(path)
    tiny_tokenizer(chat=True).save_pretrained(path)
    return path


def write_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"question": " ".join(["w7"] * (1 + index % 4)), "answer": index} for index in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample(tmp_path, policy, *options):
    arguments = {
        "model_name_or_path": policy,
        "dataset_name": write_prompts(tmp_path),
        "output": tmp_path / "rollouts.jsonl",
        "prompt_column": "question",
        "keep_columns": "answer",
        "num_samples": 3,
        "max_new_tokens": 90,
        "device": "cpu",
    }
    line = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    sample_rollouts.main(*sample_rollouts.make_parser().parse_args_and_config([*line, *options]))
    return read_rollouts(tmp_path / "rollouts.jsonl")


def test_from_prompts_to_a_length_value_model(tmp_path, policy):
    rollouts, metadata = sample(tmp_path, policy, "--chat", "--system_prompt", "w9", "--limit", "10")
    assert (metadata.num_prompts, metadata.num_completions, metadata.generator) == (10, 30, str(policy))
    assert rollouts["answer"][:] == [index for index in range(10) for _ in range(3)]
    messages = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w7 w7"}]
    assert rollouts[3]["prompt"] == messages
    assert sample_rollouts.load_prompts(str(tmp_path / "prompts.jsonl")).num_rows == 12

    config = tmp_path / "pretrain.yaml"
    config.write_text(
        f"rollouts: {tmp_path / 'rollouts.jsonl'}\nmodel_name_or_path: {policy}\noutput_dir: {tmp_path / 'out'}\n"
        "num_train_epochs: 3\neval_share: 0.2\nreport_to: none\nuse_cpu: true\ndisable_tqdm: true\n"
    )
    parser = pretrain_lenvm.make_parser()
    metrics = pretrain_lenvm.main(*parser.parse_args_and_config(["--config", str(config), "--max_steps", "2"]))
    assert metrics["eval_completions"] == 6
    model = LengthValueModel.from_pretrained(tmp_path / "out")
    assert model.config.gamma_fit["completions"] == 24
    assert model.config.truncated_share == metadata.truncated_share > 0
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_mistakes_are_named(tmp_path, policy):
    with pytest.raises(ValueError, match="has no column .'solution'."):
        sample(tmp_path, policy, "--keep_columns", "solution")
    with pytest.raises(ValueError, match="system_prompt needs --chat"):
        sample(tmp_path, policy, "--system_prompt", "w9")
    with pytest.raises(ValueError, match="Unknown arguments"):
        config = tmp_path / "c.yaml"
        config.write_text("temprature: 1\n")
        sample(tmp_path, policy, "--config", str(config))


def test_every_field_explains_itself():
    for arguments in (sample_rollouts.SampleArguments, pretrain_lenvm.PretrainArguments, LengthValueTrainingArguments):
        for entry in fields(arguments):
            assert entry.metadata.get("help") or not entry.init, f"{arguments.__name__}.{entry.name}"
    assert "gamma_quantile" in pretrain_lenvm.make_parser().format_help()
    assert "--config FILE" in sample_rollouts.make_parser().format_help()
