"""The programs before training: from prompts to rollouts to a length value model, by command line and by YAML."""

import json
import logging
from dataclasses import fields

import pytest
from scripted_server import openai_answer, sampled, scripted_server, text_answer, vllm_answer
from tiny import EOS, tiny_length_value_model, tiny_llama, tiny_tokenizer

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.prediction import weights_fingerprint
from lenvm_rl.pretraining.trainer import LengthValueTrainingArguments
from lenvm_rl.rollouts.job import SamplingSettings
from lenvm_rl.rollouts.record import read_rollouts
from recipes import import_rollouts, pretrain_lenvm, sample_rollouts


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


def test_a_length_value_model_makes_the_batches(tmp_path, policy):
    predictor = tiny_length_value_model(tokenizer=tiny_tokenizer(chat=True))
    predictor.save_pretrained(tmp_path / "lenvm")
    options = ["--chat", "--batch_size", "7", "--length_value_model", str(tmp_path / "lenvm")]
    rollouts, metadata = sample(tmp_path, policy, *options)
    assert metadata.sampling["length_value_model"] == weights_fingerprint(predictor)
    assert rollouts["group"][:] == rollouts["answer"][:] == [index for index in range(12) for _ in range(3)]
    (tmp_path / "rollouts.jsonl").unlink()
    assert "length_value_model" not in sample(tmp_path, policy, "--chat")[1].sampling
    for backend in ("server", "vllm"):
        with pytest.raises(ValueError, match=f"length_value_model.*{backend}"):
            sample(tmp_path, policy, *options, "--backend", backend)


def test_mistakes_are_named(tmp_path, policy):
    with pytest.raises(ValueError, match="'solution'"):
        sample(tmp_path, policy, "--keep_columns", "solution")
    with pytest.raises(ValueError, match="system_prompt.*--chat"):
        sample(tmp_path, policy, "--system_prompt", "w9")
    with pytest.raises(ValueError, match="Unknown arguments"):
        config = tmp_path / "c.yaml"
        config.write_text("temprature: 1\n")
        sample(tmp_path, policy, "--config", str(config))


@pytest.mark.parametrize("kind", ["vllm", "openai"])
def test_a_server_is_a_backend(tmp_path, policy, kind, monkeypatch):
    monkeypatch.setenv("SCRIPTED_KEY", "open sesame")
    options = ["--backend", "server", "--server_kind", kind, "--server_model", "m", "--limit", "5"]
    options += ["--server_key_variable", "SCRIPTED_KEY", "--max_new_tokens", "8", "--batch_size", "4"]
    options += ["--retokenize"] if kind == "openai" else []
    with scripted_server(vllm_answer if kind == "vllm" else text_answer) as server:
        rollouts, metadata = sample(tmp_path, policy, *options, "--server_url", server.url)
        requests = len(server.requests)
        sample(tmp_path, policy, *options, "--server_url", "http://elsewhere/v1")
    assert requests == len(server.requests) == 15
    assert server.most_under_way <= 4
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer open sesame"}
    assert {request["model"] for request in server.requests} == {"m"}
    seeds = {json.dumps([request["prompt"], request["seed"]]) for request in server.requests}
    assert len(seeds) == 15
    if kind == "vllm":
        wanted = sorted(sampled(request["prompt"], request["seed"], 8) for request in server.requests)
        assert sorted(rollouts["completion_ids"][:]) == wanted
        assert server.requests[0]["stop_token_ids"] == [EOS]
    assert rollouts["answer"][:] == [index for index in range(5) for _ in range(3)]
    assert (metadata.generator, metadata.sampling["backend"]) == (str(policy), "server")
    assert metadata.sampling["token_ids"] == ("sampled" if kind == "vllm" else "retokenized")


def test_every_end_of_the_generation_config_ends_a_servers_completion(tmp_path, policy):
    config = json.loads((policy / "generation_config.json").read_text())
    (policy / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [9]}))
    options = ["--backend", "server", "--server_kind", "vllm", "--limit", "1", "--max_new_tokens", "8"]
    with scripted_server(lambda request: openai_answer([7, 9], 1, token_ids=[7, 9])) as server:
        rollouts, metadata = sample(tmp_path, policy, *options, "--server_url", server.url)
    assert server.requests[0]["stop_token_ids"] == metadata.eos_token_ids == [EOS, 9]
    assert rollouts["finish_reason"][:] == ["stop"] * 3
    (policy / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="--eos_token_ids"):
        sample(tmp_path, policy, *options, "--server_url", server.url)


def test_vllm_is_a_backend(tmp_path, policy, monkeypatch):
    """Where vLLM's engine is called, the arguments are the recipe's (its own test runs it by a stand-in)."""
    given = {}

    class Called(Exception):
        pass

    def stand_in(model, tokenizer, prompts, settings, **options):
        given.update(model=model, prompts=prompts, settings=settings, **options)
        raise Called

    monkeypatch.setattr(sample_rollouts, "VLLMJob", stand_in)
    engine = '{"tensor_parallel_size": 2, "dtype": "bfloat16"}'
    with pytest.raises(Called):
        sample(tmp_path, policy, "--backend", "vllm", "--engine_arguments", engine, "--limit", "2", "--top_k", "5")
    assert given["model"] == str(policy) and given["eos_token_ids"] == [EOS]
    assert given["engine_arguments"] == {"tensor_parallel_size": 2, "dtype": "bfloat16"}
    assert given["prompts"] == ["w7", "w7 w7"] and given["extra_columns"] == {"answer": [0, 1]}
    assert (given["settings"].top_k, given["settings"].num_samples) == (5, 3)


def test_mistakes_about_backends_are_named(tmp_path, policy):
    with pytest.raises(ValueError, match="needs --server_url"):
        sample(tmp_path, policy, "--backend", "server")
    with pytest.raises(ValueError, match="NO_SUCH_KEY"):
        sample(
            tmp_path, policy, "--backend", "server", "--server_url", "http://h", "--server_key_variable", "NO_SUCH_KEY"
        )
    with pytest.raises(ValueError, match="set retokenize=True"):
        sample(tmp_path, policy, "--backend", "server", "--server_url", "http://h/v1")
    for wrong in ("{", "[1]"):
        with pytest.raises(ValueError, match="must be a JSON object"):
            sample(tmp_path, policy, "--backend", "vllm", "--engine_arguments", wrong)


def test_conversations_become_a_rollout_file(tmp_path, policy, caplog):
    def conversation(answer, length):
        turns = [{"from": "human", "value": "w6"}, {"from": "gpt", "value": answer}]
        return {"conversations": turns, "meta_info": {"answer_token_length": length, "model_name": "m"}}

    items = [conversation("w8 w9", 3), conversation("w8 w9 w10 w11", 4), conversation("w8", 3), {"conversations": []}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    arguments = [
        "--format",
        "sharegpt",
        "--input",
        tmp_path / "a.jsonl",
        "--tokenizer_name_or_path",
        policy,
        "--max_tokens",
        4,
    ]
    arguments += ["--assume", "cut_at_max_tokens", "--output", tmp_path / "r.jsonl"]
    with caplog.at_level(logging.INFO):
        import_rollouts.main(*import_rollouts.make_parser().parse_args_and_config([str(text) for text in arguments]))
    rollouts, metadata = read_rollouts(tmp_path / "r.jsonl")
    assert rollouts["completion_ids"][:] == [[8, 9, EOS], [8, 9, 10, 11], [8, EOS]]
    assert rollouts["finish_reason"][:] == ["stop", "length", "stop"]
    assert rollouts["length_error"][:] == [0, 0, -1]
    assert metadata.sampling["retokenization"]["wrong_length"] == 1 and metadata.generator == "m"
    shown = caplog.text
    assert "3 completions of 1 prompts, 2 to 4 tokens (median 3), 33.3% truncated, 1 set aside" in shown
    assert "1 have another number of tokens than was sampled" in shown
    assert (
        "assumed (cut at max tokens): 2 finished, 1 cut" in shown and shown.count("assumed of its 3 completions") == 1
    )
    assert (tmp_path / "r.rejected.jsonl").exists() and not (tmp_path / "a.rejected.jsonl").exists()


def test_rows_of_text_become_a_rollout_file(tmp_path, policy):
    (tmp_path / "a.csv").write_text("question,answer\nw6 w7,w8 w9\nw6 w7,w8\n")
    arguments = f"--input {tmp_path / 'a.csv'} --format text --prompt_column question --completion_column answer --chat"
    arguments += f" --generator m --assume all_finished --tokenizer_name_or_path {policy}"

    def run(*further):
        line = [*arguments.split(), "--output", str(tmp_path / "r.jsonl"), *further]
        return import_rollouts.main(*import_rollouts.make_parser().parse_args_and_config(line))

    assert run().sampling["prompts"]["chat_template"] == 2
    rollouts, metadata = read_rollouts(tmp_path / "r.jsonl")
    assert rollouts["prompt_ids"][:] == [[3, 6, 7, 4]] * 2 and metadata.num_prompts == 1
    assert rollouts["completion_ids"][:] == [[8, 9, EOS], [8, EOS]]
    with pytest.raises(ValueError, match="--models"):
        run("--models", "m")
    with pytest.raises(ValueError, match="--prompt_column, --completion_column, --chat"):
        run("--format", "sharegpt")


def test_every_field_explains_itself():
    own = (
        sample_rollouts.SampleArguments,
        SamplingSettings,
        import_rollouts.ImportArguments,
        pretrain_lenvm.PretrainArguments,
    )
    for arguments in (*own, LengthValueTrainingArguments):
        for entry in fields(arguments):
            assert entry.metadata.get("help") or not entry.init, f"{arguments.__name__}.{entry.name}"
    assert "gamma_quantile" in pretrain_lenvm.make_parser().format_help()
    assert "--config FILE" in sample_rollouts.make_parser().format_help()
