"""Parts for the tests of the trainers: tiny policies, scripted completions, scripted length value models, rewards."""

import torch
from datasets import Dataset
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer

from lenvm_rl.modeling.length_value_model import LengthValueModel, LengthValueOutput
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer, LenVMPPOConfig, LenVMPPOTrainer

VOCAB = 16
GAMMA = 0.5


class ScriptedLengthValueModel(LengthValueModel):
    """A length value model whose value at a position is looked up by the token that stands there."""

    table: torch.Tensor

    def forward(self, input_ids, attention_mask=None, **kwargs):
        logits = self.table[input_ids]
        return LengthValueOutput(logits=logits, values=-torch.sigmoid(logits))


def scripted_lenvm(value_of_token, gamma=GAMMA, default=-0.5):
    """`{token: value}` as a length value model; the other tokens have the value `default`."""
    model = ScriptedLengthValueModel.from_backbone(
        tiny_llama(VOCAB, hidden=8, layers=1), gamma=gamma, tokenizer=tiny_tokenizer(VOCAB)
    )
    values = torch.full((VOCAB,), default)
    for token, value in value_of_token.items():
        values[token] = value
    model.table = torch.logit(-values)
    return model


def random_lenvm(gamma=0.9, seed=3):
    """A length value model with random weights and a value that varies from token to token."""
    return tiny_length_value_model(tiny_llama(VOCAB, seed=seed), gamma, seed, tiny_tokenizer(VOCAB))


def prompts(count=8):
    """`count` different prompts of two or three words."""
    return Dataset.from_dict({"prompt": [f"w6 w{6 + i % 10}" + " w7" * (i // 10 % 2) for i in range(count)]})


def counts_of_w8(completion_ids, **kwargs):
    """Reward: the share of tokens that are `w8`."""
    return [sum(token == 8 for token in ids) / len(ids) for ids in completion_ids]


def first_is_w8(completion_ids, **kwargs):
    """Reward: 1 where the completion starts with `w8`."""
    return [float(ids[0] == 8) for ids in completion_ids]


def ppo_whose_first_is_best(folder, every, **changes):
    """A PPO trainer that loads its best model at the end: evaluated and saved every so many steps, worse every time."""
    calls = []

    def worse_and_worse(completion_ids, **kwargs):
        calls.append(len(completion_ids))
        return [-float(len(calls)) - ids[0] / 100 for ids in completion_ids]

    return ppo(
        folder, worse_and_worse, max_steps=2 * every, save_strategy="steps", save_steps=every, eval_strategy="steps",
        eval_steps=every, load_best_model_at_end=True, metric_for_best_model="eval_reward", greater_is_better=True,
        per_device_eval_batch_size=8, eval_data=prompts(4), **changes,
    )  # fmt: skip


def no_reward(completion_ids, **kwargs):
    """Reward: 0 always."""
    return [0.0] * len(completion_ids)


def settings(folder, **changes):
    """Arguments of a tiny CPU run."""
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "seed": 5,
    }
    values.update(changes)
    return values


def grpo(folder, rewards=counts_of_w8, lenvm=None, trainer=LenVMGRPOTrainer, policy=None, data=None, **changes):
    """A [`LenVMGRPOTrainer`] on a tiny policy."""
    return trainer(
        policy or tiny_llama(VOCAB, seed=1),
        rewards,
        LenVMGRPOConfig(**settings(folder, **changes)),
        train_dataset=data or prompts(),
        processing_class=tiny_tokenizer(VOCAB),
        length_value_model=lenvm,
    )


def ppo(folder, rewards=counts_of_w8, lenvm=None, trainer=LenVMPPOTrainer, policy=None, critic="learned", data=None,
        eval_data=None, **changes):  # fmt: skip
    """A [`LenVMPPOTrainer`] on a tiny policy."""
    return trainer(
        policy or tiny_llama(VOCAB, seed=1),
        rewards,
        LenVMPPOConfig(**settings(folder, **changes)),
        train_dataset=data or prompts(),
        eval_dataset=eval_data,
        processing_class=tiny_tokenizer(VOCAB),
        length_value_model=lenvm,
        critic=critic,
    )


def scripted(trainer_class, completions, tool_masks=None):
    """`trainer_class` with completions (lists of ids, one batch) that are written out instead of sampled."""

    class Scripted(trainer_class):
        def _generate_single_turn(self, prompt_ids, *arguments, **kwargs):
            assert len(prompt_ids) == len(completions)
            return [list(ids) for ids in completions], None

        def _generate(self, prompts):
            generated = list(super()._generate(prompts))
            if tool_masks is not None:
                generated[2] = [list(mask) for mask in tool_masks]
            return tuple(generated)

    return Scripted


def batch_of(trainer, mode="train"):
    """What the trainer makes of its first prompts: the dict that goes into the loss, with nothing left unread."""
    trainer.model.train(mode == "train")
    group = trainer.num_generations
    rows = trainer.args.per_device_train_batch_size
    inputs = [dict(trainer.train_dataset[i // group]) for i in range(rows)]
    batch = trainer._generate_and_score_completions(inputs)
    trainer.unread.read()
    return batch


def weights(model):
    """A copy of a model's weights."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_weights(ours, theirs):
    """Whether two copies are equal bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def logged(trainer, key):
    """What was logged under `key`, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
