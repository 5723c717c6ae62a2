"""What users of TRL expect to keep working, in both trainers: tools, chats, tables, cards, adapters, losses."""

import math
import sqlite3

import pandas
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_trainers_ends import Engine
from tiny import EOS, tiny_llama, tiny_tokenizer
from trainer_parts import (
    VOCAB,
    batch_of,
    counts_of_w8,
    grpo,
    logged,
    no_reward,
    ppo,
    prompts,
    random_lenvm,
    same_weights,
    scripted,
    scripted_lenvm,
    settings,
    weights,
)
from trl.trainer import grpo_trainer as trl_grpo

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer, LenVMPPOConfig, LenVMPPOTrainer

TRAINERS = {"grpo": (LenVMGRPOTrainer, LenVMGRPOConfig), "ppo": (LenVMPPOTrainer, LenVMPPOConfig)}
MAKERS = {"grpo": grpo, "ppo": ppo}
PLAIN = {"grpo": {"scale_rewards": "none"}, "ppo": {"whiten": "none"}}
both = pytest.mark.parametrize("name", TRAINERS)

# ---- tools and environments: words 12 to 15 are markers, a tool call and a role
CALL = '{"name":"look","arguments":{"word":"w9"}}'
TOOL_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {% for call in message.tool_calls or [] %}"
    "<tool_call> {{ call.function | tojson }} </tool_call> {% endfor %}{{ message.content }} "
    "{% if message.role == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<eos>\s*", "content": "text"},
    },
}
# The first of the group calls the tool; what it then writes is the second turn.
TURNS = [[[12, 14, 13, EOS], [8, EOS], [8, 9, EOS], [9, EOS]], [[8, EOS]]]
# Its completion: call, end of turn, the tool's answer `<|tool|> w9 w10 <|assistant|>`, the second turn.
WITH_TOOL = [12, 14, 13, EOS, 15, 9, 10, 4, 8, EOS]
TOOL_MASK = [1, 1, 1, 1, 0, 0, 0, 0, 1, 1]


def tool_tokenizer():
    tokenizer = tiny_tokenizer(12)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", CALL, "<|tool|>"])
    tokenizer.chat_template, tokenizer.response_template = TOOL_TEMPLATE, RESPONSES
    return tokenizer


def tool_lenvm():
    """A value of -1/2 everywhere, but inside of the tool's answer, where it must not matter."""
    model = scripted_lenvm({15: -0.99, 10: -0.99})
    fingerprint = LengthValueModel.from_backbone(tiny_llama(VOCAB), gamma=0.5, tokenizer=tool_tokenizer()).config
    model.config.tokenizer_fingerprint = fingerprint.tokenizer_fingerprint
    return model


def in_turns(trainer_class, turns):
    """`trainer_class` with completions that are written out, turn by turn, instead of sampled."""

    class InTurns(trainer_class):
        def _generate_single_turn(self, prompt_ids, *arguments, **kwargs):
            self.turn = (getattr(self, "turn", -1) + 1) % len(turns)
            assert len(prompt_ids) == len(turns[self.turn])
            return [list(ids) for ids in turns[self.turn]], None

    return InTurns


def with_tools(name, folder, reward=no_reward, prompt="w6", **arguments):
    trainer_class, config_class = TRAINERS[name]
    own = {"length_coef": 1.0, "per_device_train_batch_size": 4, "max_completion_length": 12, "max_steps": 1}
    changes = {**own, "length_gate": "all", **PLAIN[name], **arguments.pop("changes", {})}
    return in_turns(trainer_class, TURNS)(
        tiny_llama(VOCAB, seed=1),
        reward,
        config_class(**settings(folder, **changes)),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": prompt}]]}),
        processing_class=tool_tokenizer(),
        length_value_model=tool_lenvm(),
        **arguments,
    )


def look(word: str) -> str:
    """
    Look a word up.

    Args:
        word: The word.
    """
    return f"{word} w10"


@both
@pytest.mark.parametrize(
    ("stop", "first", "last", "truncated"),
    [
        # The string ended the turn before, or stands in the tool's answer alone: the last turn runs to the cap of 12.
        ("</tool_call>", [12, 14, 13], [8, 8, 8, 8, 8], 0.25),
        ("w10", [12, 14, 13, EOS], [8, 8, 8, 8], 0.25),
        ("w10", [12, 14, 13, EOS], [8, 8, 8, 10], 0.0),
    ],
)
def test_a_stop_string_ends_the_turn_that_holds_it(name, tmp_path, monkeypatch, stop, first, last, truncated):
    monkeypatch.setattr("test_trainers_features.TURNS", [[first, [8, EOS], [9, EOS], [9, EOS]], [last]])
    monkeypatch.setattr(trl_grpo, "VLLMGeneration", Engine)
    changes = {
        "use_vllm": True, "vllm_mode": "server", "vllm_importance_sampling_correction": False,
        "generation_kwargs": {"stop": [stop]},
    }  # fmt: skip
    trainer = with_tools(name, tmp_path, tools=[look], changes=changes)
    assert batch_of(trainer)["completion_mask"][0].sum() == 12
    assert trainer._metrics["train"]["length/truncated"] == [truncated]


@both
def test_a_turn_of_all_that_a_turn_may_take_was_cut(name, tmp_path, monkeypatch):
    # At most three tokens to a turn: the last one of the first row and the only one of the second have no end.
    turns = [[[12, 14, 13], [8, 8, 8], [8, 9, EOS], [9, EOS]], [[8, 8, 8]]]
    monkeypatch.setattr("test_trainers_features.TURNS", turns)
    trainer = with_tools(name, tmp_path, tools=[look], changes={"generation_kwargs": {"max_new_tokens": 3}})
    batch_of(trainer)
    assert trainer._metrics["train"]["length/truncated"] == [0.5]


class Room:
    """An environment whose tool is `look`, and which is content with whoever used it."""

    def reset(self, **kwargs):
        self.looked = False
        return " w7"

    def look(self, word: str) -> str:
        """
        Look a word up.

        Args:
            word: The word.
        """
        self.looked = True
        return look(word)

    def get_reward(self):
        return float(self.looked)


@both
def test_the_tools_of_trl_are_called_and_their_tokens_are_no_actions(tmp_path, name):
    trainer = with_tools(name, tmp_path, tools=[look])
    batch = batch_of(trainer)
    assert batch["completion_ids"][0].tolist() == WITH_TOOL and batch["tool_mask"][0].tolist() == TOOL_MASK
    # Six tokens of its own: the advantage of the one with n to come is V - G, 2^-n - 1/2, and the tool's are 0.
    expected = torch.tensor([0.5**n - 0.5 if n else 0.0 for n in (6, 5, 4, 3, 0, 0, 0, 0, 2, 1)])
    torch.testing.assert_close(batch["advantages"][0], expected)
    metrics = trainer._metrics["train"]
    assert metrics["tools/call_frequency"] == [0.25] and metrics["tools/failure_frequency"] == [0.0]
    # Lengths 5, 1, 2 and 1: the tool's words are not among them, the end of the first turn is.
    assert metrics["length/mean"] == [pytest.approx(9 / 4)]
    if name == "ppo":
        assert batch["critic_mask"][0].tolist() == [bool(own) for own in TOOL_MASK]
    trainer.train()
    assert math.isfinite(logged(trainer, "loss")[0])


@both
def test_an_environment_brings_tools_and_the_reward_of_the_gate(tmp_path, name):
    trainer = with_tools(
        name, tmp_path, None, environment_factory=Room, changes={"length_gate": "correct", "gate_reward": "Room"}
    )
    batch = batch_of(trainer)
    # What `reset` has to say stands in the prompt.
    assert batch["prompt_ids"][0].tolist() == [3, 6, 7, 4] and batch["tool_mask"][0].tolist() == TOOL_MASK
    assert trainer._metrics["train"]["length/correct"] == [0.25]
    assert trainer._metrics["train"]["rewards/Room/mean"] == [0.25]
    # The task's share is the reward less the mean of the group, or less a critic that says 0; the gate adds length to
    # the first completion alone.
    task = torch.tensor([1.0, 0.0, 0.0, 0.0]) - (0.25 if name == "grpo" else 0.0)
    length = torch.zeros(4, 2)
    length[0] = torch.tensor([0.5**6 - 0.5, 0.5**5 - 0.5])
    torch.testing.assert_close(batch["advantages"][:, :2], task.unsqueeze(1) + length)


@both
def test_tokens_of_an_environment_mask_are_no_actions(tmp_path, name):
    """`rollout_func` says with `env_mask` which tokens are not the policy's."""

    def rollout(prompts, trainer):
        count = len(prompts)
        return {
            "prompt_ids": [[6, 6]] * count,
            "completion_ids": [[8, 10, 10, 9, EOS]] * count,
            "logprobs": [[0.0] * 5] * count,
            "env_mask": [[1, 0, 0, 1, 1]] * count,
        }

    trainer_class, config_class = TRAINERS[name]
    trainer = trainer_class(
        tiny_llama(VOCAB, seed=1),
        no_reward,
        config_class(**settings(tmp_path, length_coef=1.0, length_gate="all", max_steps=1, **PLAIN[name])),
        train_dataset=prompts(),
        processing_class=tiny_tokenizer(VOCAB),
        # Read at 10, which the environment wrote, but for the last of its tokens.
        length_value_model=scripted_lenvm({}),
        rollout_func=rollout,
    )
    batch = batch_of(trainer)
    torch.testing.assert_close(batch["advantages"][0], torch.tensor([0.5**3 - 0.5, 0, 0, 0.5**2 - 0.5, 0]))
    assert trainer._metrics["train"]["length/mean"] == [2.0]
    trainer.train()
    assert math.isfinite(logged(trainer, "loss")[0])


# ---- chats
@both
def test_conversational_prompts(tmp_path, name):
    """The first value is read at the last token of the chat template; rewards get messages."""
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(completions)

    trainer_class, config_class = TRAINERS[name]
    trainer = scripted(trainer_class, [[8, EOS]] * 4)(
        tiny_llama(VOCAB, seed=1),
        reward,
        config_class(
            **settings(tmp_path, length_coef=1.0, length_gate="all", per_device_train_batch_size=4, max_steps=1,
                       **PLAIN[name])
        ),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "w6 w7"}]]}),
        processing_class=tiny_tokenizer(VOCAB, chat=True),
        length_value_model=scripted_lenvm({4: -0.6}),
    )  # fmt: skip
    batch = batch_of(trainer)
    assert batch["prompt_ids"][0].tolist() == [3, 6, 7, 4]
    torch.testing.assert_close(batch["advantages"], torch.tensor([[-0.75 + 0.6, 0.0]] * 4))
    assert seen[0] == ([{"role": "user", "content": "w6 w7"}], [{"role": "assistant", "content": "w8"}])
    trainer.train()
    assert math.isfinite(logged(trainer, "loss")[0])


# ---- what is reported
@both
def test_the_table_of_completions_has_the_advantage_that_the_policy_learns_from(tmp_path, name):
    completions = [[8, 9, EOS], [8, EOS], [9, 9, 9], [10, EOS]]
    trainer = MAKERS[name](
        tmp_path, counts_of_w8, scripted_lenvm({}), trainer=scripted(TRAINERS[name][0], completions), data=prompts(1),
        log_completions=True, length_coef=1.0, length_gate="all", per_device_train_batch_size=4,
        max_completion_length=3, max_steps=1, **PLAIN[name],
    )  # fmt: skip
    trainer.train()
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert table["completion"].tolist() == ["w8 w9", "w8", "w9 w9 w9", "w10"] and table["step"].tolist() == [1] * 4
    rewards = torch.tensor([1 / 3, 1 / 2, 0.0, 0.0])
    torch.testing.assert_close(torch.tensor(table["counts_of_w8"]).float(), rewards)
    task = rewards - rewards.mean() if name == "grpo" else rewards
    # 2^-n - 1/2 of the tokens; at the cut, V = -1/2 stands for one more.
    length = torch.tensor([-0.375 - 0.25, -0.25, -0.4375 - 0.375 - 0.25, -0.25]) / torch.tensor([3.0, 2.0, 3.0, 2.0])
    torch.testing.assert_close(torch.tensor(table["policy_advantage"]).float(), task + length)


def test_weights_and_biases_and_trackio_get_what_ppo_logs(tmp_path, monkeypatch):
    for variable, value in (("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(variable, value)
    import trackio.utils
    import wandb

    # Read once, on import.
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    trainer = ppo(
        tmp_path, lenvm=random_lenvm(), length_coef=0.1, max_steps=2, report_to=["wandb", "trackio"], project="lengths",
        run_name="tiny", log_completions=True, trackio_space_id=None, trackio_static_space_id=False,
    )  # fmt: skip
    trainer.train()
    summary, offline = wandb.run.summary, wandb.run.settings.mode
    value_loss = logged(trainer, "critic/value_loss")
    assert offline == "offline" and summary["train/critic/value_loss"] == value_loss[-1]
    assert summary["train/lenvm/value_mean"] < 0
    wandb.finish()
    with sqlite3.connect(tmp_path / "trackio" / "lengths.db") as database:
        lines = [bytes(row[0]) for row in database.execute("select metrics from metrics order by id")]
    assert len([line for line in lines if b"train/critic/value_loss" in line]) == 2
    assert any(b"completions" in line for line in lines)


@pytest.mark.parametrize(("name", "paper"), [("grpo", "2402.03300"), ("ppo", "1707.06347")])
def test_the_card_of_a_trained_model_names_the_papers_and_the_tags(tmp_path, name, paper):
    trainer = MAKERS[name](
        tmp_path / "out", lenvm=random_lenvm(), length_coef=0.1, max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    header = card.split("---")[1]
    assert {f"- {tag}" for tag in ("trl", name, "lenvm")} <= set(header.splitlines())
    assert f"{name.upper()}" in card and f"https://huggingface.co/papers/{paper}" in card
    # Both papers can be cited, that of the length value model beside the algorithm's.
    assert "zhang2026length" in card and "arXiv:2604.27039" in card and f"{paper}" in card.split("bibtex", 1)[1]


# ---- policies with adapters, checkpointing, losses
def test_adapters_checkpointing_and_divergence_go_together(tmp_path):
    """A policy with adapters is its own reference; recomputed activations give the same steps."""
    results = []
    for checkpointing in (False, True):
        policy, lenvm = tiny_llama(VOCAB, seed=1), random_lenvm()
        base, frozen = weights(policy.model), weights(lenvm)
        trainer = LenVMGRPOTrainer(
            policy,
            counts_of_w8,
            LenVMGRPOConfig(
                **settings(tmp_path, beta=0.1, length_coef=0.5, shaping_coef=0.5, gradient_checkpointing=checkpointing,
                           num_iterations=2, gradient_accumulation_steps=2, per_device_train_batch_size=4)
            ),
            train_dataset=prompts(),
            processing_class=tiny_tokenizer(VOCAB),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
            length_value_model=lenvm,
        )  # fmt: skip
        assert trainer.ref_model is None
        trainer.train()
        assert any(layer.gradient_checkpointing for layer in policy.model.layers) == checkpointing
        after = {key.replace(".base_layer", ""): value for key, value in weights(policy.model).items()}
        assert same_weights(base, {key: value for key, value in after.items() if "lora" not in key})
        assert same_weights(frozen, weights(lenvm))
        assert max(value.abs().max() for key, value in after.items() if "lora_B" in key) > 0
        results.append([logged(trainer, key) for key in ("loss", "kl", "advantage/length_std")])
    assert results[0] == results[1] and results[0][1][-1] > 0


def loss_of(loss_type, advantages, mask, width):
    """The policy's loss before anything has moved: every ratio is 1."""
    paid = (advantages * mask).sum(1)
    if loss_type == "dr_grpo":
        return -float(paid.sum()) / (len(mask) * width)
    if loss_type in ("dapo", "bnpo"):
        return -float(paid.sum() / mask.sum())
    # "sapo" weighs the two signs by 4 sigmoid(0) / temperature, and 1 is its default for one, 1.05 for the other.
    scale = torch.where(advantages > 0, 1 / 1.0, 1 / 1.05) * 2.0 if loss_type == "sapo" else 1.0
    return -float(((advantages * scale * mask).sum(1) / mask.sum(1)).mean())


@pytest.mark.parametrize(
    ("loss_type", "critic"),
    [*((name, "learned") for name in ("dapo", "dr_grpo", "bnpo", "grpo", "sapo", "cispo")), ("dr_grpo", "lenvm")],
)
def test_losses_of_ppo_by_hand(tmp_path, loss_type, critic):
    trainer = ppo(
        tmp_path, lenvm=random_lenvm(), critic=critic, length_coef=0.5, length_gate="all", loss_type=loss_type,
        max_steps=1, **({"vf_coef": 0.5} if critic == "learned" else {}),
    )  # fmt: skip
    before, batches, compute = weights(trainer.model), [], trainer._compute_loss

    def spy(model, inputs):
        batches.append(inputs)
        return compute(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    (batch,) = batches
    if loss_type == "cispo":
        assert math.isfinite(logged(trainer, "loss")[0])
    else:
        expected = loss_of(loss_type, batch["advantages"], batch["completion_mask"], trainer.max_completion_length)
        if critic == "learned":
            expected += 0.5 * logged(trainer, "critic/value_loss")[0]
        assert logged(trainer, "loss")[0] == pytest.approx(expected, abs=1e-5) and abs(expected) > 1e-5
    assert not same_weights(weights(trainer.model), before)
