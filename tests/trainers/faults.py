"""Faults of a run of GRPO or PPO, as a table: what happens, how it is provoked, and what it has to end in."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tiny import EOS, tiny_llama, tiny_tokenizer
from trainer_parts import VOCAB, counts_of_w8, grpo, ppo, random_lenvm
from transformers import LlamaConfig, LlamaForSequenceClassification

from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer, LenVMPPOConfig, LenVMPPOTrainer

TRAINERS = {grpo: LenVMGRPOTrainer, ppo: LenVMPPOTrainer}
CONFIGS = {grpo: LenVMGRPOConfig, ppo: LenVMPPOConfig}
BOTH = tuple(TRAINERS)


def make(maker, folder, rewards=counts_of_w8, **changes):
    """A run of two steps that writes a checkpoint after each, with states of its own beside the policy's."""
    steps = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    length = {"length_coef": 0.5, "length_gate": "all", "length_target": 3.0, "length_coef_rate": 0.1}
    # PPO has its critic.
    refresh = {"refresh_steps": 1} if maker is grpo else {}
    return maker(folder, rewards, random_lenvm(), **{**steps, **length, **refresh, **changes})


# How a fault is provoked in the second step: by what changes the trainer, or by a reward function.


def gives(model, number, only_with_gradient=False):
    """One value that `model` of the trainer (its name) gives is `number`."""

    def provoke(trainer):
        def spoil(module, arguments, output):
            if trainer.state.global_step == 1 and (torch.is_grad_enabled() or not only_with_gradient):
                output.logits[0] = number

        getattr(trainer, model).register_forward_hook(spoil)

    return provoke


def reward_is(faulty, asynchronous=False):
    """A reward function that returns `faulty(rewards)`, given what it should return."""

    def counts(completion_ids, trainer_state, **kwargs):
        rewards = counts_of_w8(completion_ids)
        return faulty(rewards) if trainer_state.global_step == 1 else rewards

    async def counts_later(**arguments):
        await asyncio.sleep(0)
        return counts(**arguments)

    counts.__name__ = counts_later.__name__ = counts_of_w8.__name__
    return counts_later if asynchronous else counts


def down(rewards):
    raise ConnectionError("the judge does not answer")


def first_is(value):
    return lambda rewards: [value, *rewards[1:]]


def reward_model_gives_nan(trainer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=VOCAB, num_key_value_heads=1, num_labels=1, pad_token_id=0, **sizes)
    )
    trainer.reward_funcs, trainer.reward_processing_classes = [model], [tiny_tokenizer(VOCAB)]
    with torch.no_grad():
        model.score.weight.fill_(math.nan)


@dataclass(frozen=True)
class Stops:
    """The step after a checkpoint ends in an error that says `says`; the checkpoint stays and a run goes on from it.

    `keeps`: name of the file with the batch at fault. `rewards`: the reward function, where that is at fault.
    """

    says: str
    keeps: str | None = None
    provoke: Callable = lambda trainer: None
    rewards: Callable = counts_of_w8
    makers: tuple = BOTH


@dataclass(frozen=True)
class GoesOn:
    """The completions, all in one batch, give finite numbers: worked by hand, for rewards 1, 0, 1, 0.

    `advantages` are of GRPO; `measured`: metrics. PPO has a critic that says 1/4, so all of its advantages are 1/4
    higher: 1 - 1/4 and 0 - 1/4 where GRPO has 1 - 1/2 and 0 - 1/2.
    """

    completions: list
    advantages: list
    measured: dict
    changes: dict


@dataclass(frozen=True)
class Refused:
    """Construction ends in an error that says `says`."""

    construct: Callable
    says: str


@dataclass(frozen=True)
class Cut:
    """A file of a checkpoint is cut in half: resuming names it, and the checkpoint before."""

    file: str
    makers: tuple = BOTH


@dataclass(frozen=True)
class FullDisk:
    """No file of the next checkpoint can grow beyond so many bytes (of its trainer state, where that is named)."""

    room: int
    says: str
    makers: tuple = BOTH
    only_trainer_state: bool = False


def with_tokenizer_of_20(maker, folder):
    lenvm = LengthValueModel.from_backbone(tiny_llama(20), gamma=0.9, tokenizer=tiny_tokenizer(20))
    return maker(folder, lenvm=lenvm)


def with_unknown_tokenizer(maker, folder):
    return maker(folder, lenvm=LengthValueModel.from_backbone(tiny_llama(VOCAB), gamma=0.9))


def with_another_gamma(maker, folder):
    return maker(folder, lenvm=random_lenvm(), shaping_coef=0.5, shaping_gamma=0.9, task_gamma=0.99)


LENVM_FILE = "nonfinite_length_value_model_step1_rank0.safetensors"
CRITIC_FILE = "nonfinite_task_critic_step1_rank0.safetensors"
REWARD_FILE = "failed_reward_counts_of_w8_step1_rank0.json"
LENVM_SAYS = "The length value model gave NaN or infinity at step 1 .*check its weights"
CRITIC_SAYS = "The task critic gave NaN or infinity at step 1 .*learning rate"
NOTE = "This came of the reward function 'counts_of_w8' at step 1"
SAYS = "The reward function 'counts_of_w8' returned "

FAULTS = {
    "NaN from the length value model": Stops(LENVM_SAYS, LENVM_FILE, gives("length_value_model", math.nan)),
    "infinity from the length value model": Stops(
        LENVM_SAYS, LENVM_FILE, gives("length_value_model", math.inf), makers=(grpo,)
    ),
    "NaN from the critic": Stops(CRITIC_SAYS, CRITIC_FILE, gives("critic", math.nan), makers=(ppo,)),
    "infinity from the critic": Stops(CRITIC_SAYS, CRITIC_FILE, gives("critic", -math.inf), makers=(ppo,)),
    "NaN from the critic in the loss": Stops(CRITIC_SAYS, CRITIC_FILE, gives("critic", math.nan, True), makers=(ppo,)),
    "NaN as a reward": Stops(
        SAYS + "nan for completion 0 of 8 .*None for completions", REWARD_FILE, rewards=reward_is(first_is(math.nan))
    ),
    "infinity as a reward": Stops(
        SAYS + "-inf for completion 0 .*finite numbers",
        REWARD_FILE,
        rewards=reward_is(first_is(-math.inf)),
        makers=(ppo,),
    ),
    "NaN from a reward model": Stops(
        "reward model 'counts_of_w8' gave NaN .*for 8 of 8 completions: check its weights",
        provoke=reward_model_gives_nan,
        makers=(grpo,),
    ),
    "a reward function that raises": Stops(
        f"the judge does not answer\n{NOTE}.*resume", REWARD_FILE, rewards=reward_is(down)
    ),
    "an asynchronous reward function that raises": Stops(
        f"the judge does not answer\n{NOTE}.*resume",
        REWARD_FILE,
        rewards=reward_is(down, asynchronous=True),
        makers=(ppo,),
    ),
    "a reward function that returns None": Stops(
        SAYS + "None, not one reward .*return a list of 8 numbers", REWARD_FILE, rewards=reward_is(lambda right: None)
    ),
    "the wrong number of rewards": Stops(
        SAYS + "7 rewards, but 8 were expected: return one", REWARD_FILE, rewards=reward_is(lambda right: right[1:])
    ),
    "a text as a reward": Stops(
        SAYS + "something that is no number .*return numbers or None",
        REWARD_FILE,
        rewards=reward_is(first_is("good")),
        makers=(ppo,),
    ),
    # gamma 1/2, V = -.6 at the prompt and -1/2 after w8: A_len = -1/2 + .6 for an end at once, and for w8 and the end
    # -3/4 + .6, -1/2 + 1/2.
    "a completion of only EOS": GoesOn(
        [[EOS], [8, EOS], [EOS], [8, EOS]],
        [[0.6, 0.0], [-0.65, -0.5], [0.6, 0.0], [-0.65, -0.5]],
        {"length/mean": 0.5, "length/truncated": 0.0, "lenvm/realised_length": 0.5},
        {},
    ),
    "completions of only EOS": GoesOn(
        [[EOS]] * 4,
        [[0.6], [-0.4], [0.6], [-0.4]],
        {"length/mean": 0.0, "length/truncated": 0.0, "lenvm/realised_length": 0.0},
        {},
    ),
    # The stream goes on with V = -.9 after w9: -3/4 - .9/4 + .6 and -1/2 - .9/2 + 1/2.
    "all completions truncated": GoesOn(
        [[8, 9]] * 4, [[0.125, 0.05], [-0.875, -0.95]] * 2, {"length/mean": 2.0, "length/truncated": 1.0}, {}
    ),
    "masks of zeros": GoesOn(
        [[8, 9]] * 4,
        [[0.0, 0.0]] * 4,
        {"length/mean": 2.0, "length/truncated": 1.0},
        {"mask_truncated_completions": True},
    ),
    "a vocabulary that differs": Refused(with_tokenizer_of_20, "20 tokens"),
    "a vocabulary that nobody knows": Refused(with_unknown_tokenizer, "cannot be compared"),
    "gamma mismatch": Refused(with_another_gamma, "differs from task_gamma=0.99.*allow_gamma_mismatch"),
    "half of the weights": Cut("model.safetensors"),
    "half of the optimizer": Cut("optimizer.pt"),
    "half of the scheduler": Cut("scheduler.pt"),
    "half of the random numbers": Cut("rng_state.pth"),
    "half of the coefficient, the drift and the refresh": Cut("lenvm_state_rank0.json"),
    "half of the trainer state": Cut("trainer_state.json"),
    "half of the refreshed model": Cut("refresh/length_value_model/model.safetensors", (grpo,)),
    "half of the completions to refresh on": Cut("refresh/completions_rank0.parquet", (grpo,)),
    "half of the critic": Cut("critic/model.safetensors", (ppo,)),
    "half of the critic's config": Cut("critic/config.json", (ppo,)),
    "a full disk in the weights": FullDisk(20_000, "File too large", (ppo,)),
    "a full disk in the optimizer": FullDisk(30_000, "unexpected pos", (grpo,)),
    "a full disk in the trainer state": FullDisk(500, "File too large", only_trainer_state=True),
    # And SIGTERM in the middle of a step: the last test, in a process of its own.
}
