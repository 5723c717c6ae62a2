"""Critics as people hand them over: with a score head, frozen in part, with adapters, in bfloat16."""

import torch
from peft import IA3Config, LoraConfig, OFTConfig, TrainableTokensConfig, get_peft_model
from tiny import tiny_llama
from trainer_parts import VOCAB
from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

from lenvm_rl.trainers import TaskCritic

LORA = {"r": 2, "init_lora_weights": False}
SCORES = {"task_type": "SEQ_CLS", **LORA}


def critic():
    """A critic with 5233 weights, whose head, which has 289 of them, says something."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        made = TaskCritic.from_backbone(tiny_llama(VOCAB, seed=7))
        torch.nn.init.normal_(made.head.output.weight)
    return made


def frozen(model):
    """The same model, of which nothing but the head learns."""
    model.base_model.requires_grad_(False)
    return model


def reward_model(labels=1, kind=LlamaForSequenceClassification):
    """A reward model: 4960 weights, of which the score head has 16."""
    config = tiny_llama(VOCAB, seed=7).config
    config.num_labels = labels
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return kind(config).eval()


def two_adapters():
    """A critic with two active adapters and one that is not."""
    model = get_peft_model(critic(), LoraConfig(**LORA, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=3, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("idle", LoraConfig(r=5, init_lora_weights=False, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def half_frozen():
    """A critic in bfloat16 whose last layer and head learn."""
    model = frozen(critic().bfloat16())
    model.backbone.layers[1].requires_grad_(True)
    return model


# By name: what is handed over, weights that learn of all, whether anything is bfloat16 in the end, and the adapters.
SHAPES = {
    "a frozen decoder": (lambda: frozen(critic()), 289, 5233, False, []),
    "all in bfloat16": (lambda: critic().bfloat16(), 5233, 5233, False, []),
    "a frozen decoder in bfloat16": (lambda: frozen(critic().bfloat16()), 289, 5233, True, []),
    "one layer of a decoder in bfloat16": (half_frozen, 289 + 2336, 5233, False, []),
    "a reward model": (reward_model, 4960, 4960, False, []),
    "a frozen reward model with a score that learns": (lambda: frozen(reward_model()), 16, 4960, False, []),
    "a reward model of tokens": (lambda: reward_model(kind=LlamaForTokenClassification), 4961, 4961, False, []),
    # Two layers of 16 by 16 have 128 weights at rank 2.
    "a critic with adapters and its head": (
        lambda: get_peft_model(critic(), LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["head"])),
        128 + 289, 5233 + 128, False, ["default"],
    ),
    "a reward model in bfloat16 with adapters": (
        lambda: get_peft_model(
            reward_model().bfloat16(),
            LoraConfig(**SCORES, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 3},
                       alpha_pattern={"v_proj": 5}),
        ),
        2 * 3 * 32 + 2 * 2 * 24 + 16, 4960 + 2 * 3 * 32 + 2 * 2 * 24, True, ["default"],
    ),
    "a language model with adapters": (
        lambda: get_peft_model(tiny_llama(VOCAB, seed=7), LoraConfig(**LORA, target_modules=["q_proj"])),
        128 + 289, 5233 + 128, False, ["default"],
    ),
    "two adapters": (two_adapters, 128 + 2 * 3 * (32 + 24), 5233 + 128 + 2 * 3 * (32 + 24), False,
                     ["default", "second"]),
    "scaled activations": (
        lambda: get_peft_model(reward_model(), IA3Config(task_type="SEQ_CLS", init_ia3_weights=False)),
        2 * (8 + 8 + 32) + 16, 4960 + 2 * (8 + 8 + 32), False, ["default"],
    ),
    # Rotations have buffers that are never saved.
    "rotations": (
        lambda: get_peft_model(
            reward_model(), OFTConfig(task_type="SEQ_CLS", oft_block_size=4, target_modules=["q_proj"])
        ),
        64, 4960 + 48, False, ["default"],
    ),
    "trained tokens": (
        lambda: get_peft_model(
            reward_model(),
            TrainableTokensConfig(task_type="SEQ_CLS", token_indices=[3, 8], target_modules=["embed_tokens"]),
        ),
        32, 4960 + 32, False, ["default"],
    ),
}  # fmt: skip
