"""Prompts with pictures: the value models of both trainers see what the policy has seen, however a batch is cut."""

import copy

import pytest
import torch
from datasets import Dataset
from PIL import Image
from test_backbones_vlm import IMAGE, VISION_END, PictureProcessor, tiny_vlm
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer
from trainer_parts import logged, no_reward, same_weights, settings, weights
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lenvm_rl.advantages import length_advantage
from lenvm_rl.modeling.completions import completion_logits
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.trainers import LenVMGRPOConfig, LenVMGRPOTrainer, LenVMPPOConfig, LenVMPPOTrainer
from lenvm_rl.trainers.reading import check_sees_pictures, picture_inputs

GAMMA, EOS = 0.9, 1
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %} "
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TRAINERS = {"grpo": (LenVMGRPOTrainer, LenVMGRPOConfig), "ppo": (LenVMPPOTrainer, LenVMPPOConfig)}


def picture_processor():
    """A processor made in the process, for pictures of 4x4 patches and a chat."""
    tokenizer = tiny_tokenizer(60)
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.padding_side = "left"
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    return PictureProcessor(image_processor=images, tokenizer=tokenizer, chat_template=TEMPLATE)


def noise(width, height, seed):
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def picture_prompts(seed=0):
    """Three prompts of different lengths, with one picture or two, of different sizes."""
    sizes = [[(24, 16)], [(16, 16), (16, 24)], [(32, 16)]]
    words = ["w10", "w11 w12 w13", "w14 w15"]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in words],
            "images": [[noise(*size, seed + 10 * i + j) for j, size in enumerate(row)] for i, row in enumerate(sizes)],
        }
    )


def value_model(seed=3, **changes):
    backbone = tiny_vlm(seed)
    return tiny_length_value_model(backbone, GAMMA, seed, picture_processor().tokenizer, **changes)


def make(name, folder, lenvm=None, data=None, policy=None, critic="lenvm", reward=no_reward, **changes):
    trainer_class, config_class = TRAINERS[name]
    defaults = {
        "per_device_train_batch_size": 3, "steps_per_generation": 2, "gradient_accumulation_steps": 2,
        "num_generations": 2, "max_completion_length": 5, "max_steps": 2,
        # A random policy writes the tokens of pictures too, which no decoder reads without a picture.
        "generation_kwargs": {"suppress_tokens": [60, 61, 62, 63]},
    }  # fmt: skip
    return trainer_class(
        policy or tiny_vlm(1),
        reward,
        config_class(**settings(folder, **{**defaults, **changes})),
        train_dataset=data or picture_prompts(),
        processing_class=picture_processor(),
        length_value_model=lenvm,
        **({"critic": critic} if name == "ppo" else {}),
    )


def batch_of(trainer):
    """What the trainer makes of two completions of each of its prompts."""
    trainer.model.train()
    batch = trainer._generate_and_score_completions([dict(trainer.train_dataset[i // 2]) for i in range(6)])
    trainer.unread.read()
    return batch


def values_alone(model, batch, row, pictures):
    """The values along one completion, without padding and without other rows: `(L + 1,)`."""
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
    completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
    ids = torch.cat([prompt, completion]).unsqueeze(0)
    images = picture_processor().image_processor(images=pictures, return_tensors="pt")
    logits = model(input_ids=ids, mm_token_type_ids=(ids == IMAGE).int(), **images).logits[0, len(prompt) - 1 :]
    return -torch.sigmoid(logits)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_length_stream_is_that_of_each_row_alone_with_its_pictures(tmp_path, name):
    """Rows of 3 are cut out of groups of 2, so a forward has the pictures of two prompts."""
    lenvm = value_model()
    trainer = make(name, tmp_path, lenvm, length_coef=1.0, length_gate="all")
    batch = batch_of(trainer)
    assert batch["num_images"] == [1, 1, 2, 2, 1, 1] and len(set(batch["prompt_mask"].sum(1).tolist())) > 1
    for row in range(6):
        values = values_alone(lenvm, batch, row, trainer.train_dataset[row // 2]["images"])
        steps = len(values) - 1
        ended = batch["completion_ids"][row, steps - 1] == EOS
        expected = length_advantage(
            values[None, :-1], torch.ones(1, steps), GAMMA, 1.0, torch.where(ended, 0.0, values[-1:])
        )
        torch.testing.assert_close(batch["advantages"][row, :steps], expected[0], rtol=0, atol=1e-5)


def test_other_pictures_have_other_values(tmp_path):
    lenvm = value_model()
    trainer = make("grpo", tmp_path, lenvm)
    batch = batch_of(trainer)
    logits = trainer._frozen.logits(batch, 8)
    patches = batch["image_grid_thw"].prod(1)
    # Of the two pictures of the second prompt, the second; in the fourth row alone.
    first = int(patches[:5].sum())
    changed = batch["pixel_values"].clone()
    changed[first : first + int(patches[5])] *= -1
    others = trainer._frozen.logits({**batch, "pixel_values": changed}, 8)
    differs = (others != logits).any(dim=1)
    assert differs.tolist() == [False, False, False, True, False, False]
    assert float((others - logits)[3].abs().max()) > 1e-3


@pytest.mark.parametrize(("name", "critic"), [("grpo", None), ("ppo", "lenvm"), ("ppo", "learned")])
def test_both_trainers_learn_from_pictures(tmp_path, name, critic):
    lenvm = value_model()
    frozen = weights(lenvm)

    def reward(completion_ids, **kwargs):
        return [float(len(set(ids))) for ids in completion_ids]

    trainer = make(name, tmp_path, lenvm, critic=critic, reward=reward, length_coef=0.5, shaping_coef=0.5, max_steps=3)
    policy = weights(trainer.model)
    start = weights(trainer.critic) if critic == "learned" else None
    trainer.train()
    assert len(logged(trainer, "loss")) == 3 and same_weights(weights(lenvm), frozen)
    assert not same_weights(weights(trainer.model), policy)
    if critic == "learned":
        moved = {key for key, weight in weights(trainer.critic).items() if not torch.equal(weight, start[key])}
        assert any("visual" in key for key in moved) and any("head" in key for key in moved)


@pytest.mark.parametrize("form", ["full", "adapter", "head"])
def test_a_learned_critic_reads_each_row_with_its_pictures(tmp_path, form):
    tiny_vlm(5).save_pretrained(tmp_path / "policy")
    policy = str(tmp_path / "policy")
    trainer = make("ppo", tmp_path / "run", policy=policy, critic="learned", critic_form=form, beta=0.1)
    critic = trainer.critic
    torch.nn.init.normal_(critic.head.output.weight)
    batch = batch_of(trainer)
    for row in range(6):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        ids = torch.cat([prompt, batch["completion_ids"][row][batch["completion_mask"][row].bool()]]).unsqueeze(0)
        images = picture_processor().image_processor(
            images=trainer.train_dataset[row // 2]["images"], return_tensors="pt"
        )
        alone = critic(ids, torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE).int(), **images).logits[0]
        values = batch["critic_values"][row, : ids.shape[1] - len(prompt)]
        torch.testing.assert_close(values, alone[len(prompt) - 1 : -1].detach(), rtol=0, atol=1e-5)
    # In the loss as well: nothing has moved yet, so that the new values are the old ones.
    trainer.current_gradient_accumulation_steps = 2
    trainer._value_loss(batch)
    errors = (batch["critic_returns"] - batch["critic_values"])[batch["critic_mask"]]
    expected = float(0.5 * errors.square().mean())
    trainer.unread.read()
    assert trainer._metrics["train"]["critic/value_loss"] == [pytest.approx(expected, rel=1e-4)] and expected > 0


@pytest.mark.parametrize("form", ["adapter", "head"])
def test_a_shared_base_reads_pictures_too(tmp_path, form):
    """A head alone takes them out of the reference's forward; an adapter makes a forward of its own."""
    policy = tiny_vlm(1)
    policy.save_pretrained(tmp_path / "policy")
    tokenizer = picture_processor().tokenizer
    lenvm = LengthValueModel.from_backbone(copy.deepcopy(policy), gamma=GAMMA, tokenizer=tokenizer, form=form)
    torch.nn.init.normal_(lenvm.head.output.weight)
    lenvm.save_pretrained(tmp_path / "lenvm")
    trainer = make(
        "grpo", tmp_path / "out", str(tmp_path / "lenvm"), policy=str(tmp_path / "policy"), beta=0.1, length_coef=1.0,
        length_gate="all",
    )  # fmt: skip
    forwards = []
    trainer.length_value_model.register_forward_hook(lambda *_: forwards.append(1))
    batch = batch_of(trainer)
    assert len(forwards) == (0 if form == "head" else 2)
    for row in range(6):
        values = values_alone(lenvm, batch, row, trainer.train_dataset[row // 2]["images"])
        steps = len(values) - 1
        ended = batch["completion_ids"][row, steps - 1] == EOS
        expected = length_advantage(
            values[None, :-1], torch.ones(1, steps), GAMMA, 1.0, torch.where(ended, 0.0, values[-1:])
        )
        torch.testing.assert_close(batch["advantages"][row, :steps], expected[0].detach(), rtol=0, atol=1e-5)


def test_text_beside_pictures_and_text_alone(tmp_path):
    """A chunk of rows without pictures is read as text, and so is a batch without any."""
    lenvm = value_model()
    batch = batch_of(make("grpo", tmp_path, lenvm))
    text = torch.tensor([[3, 10, 11, 4]])
    width = batch["prompt_ids"].shape[1]
    ids = torch.cat([torch.zeros(1, width - 4, dtype=torch.long), text], dim=1)
    mixed = {name: value for name, value in batch.items() if name != "num_images"}
    for name, row in (("prompt_ids", ids), ("prompt_mask", (ids != 0).long())):
        mixed[name] = torch.cat([batch[name], row])
    for name in ("completion_ids", "completion_mask"):
        mixed[name] = torch.cat([batch[name], batch[name][:1]])
    types = batch["mm_token_type_ids"]
    mixed["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(types[:1])])
    mixed["num_images"] = [*batch["num_images"], 0]
    keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    logits = completion_logits(lenvm, *(mixed[key] for key in keys), 3, picture_inputs(mixed))
    alone = completion_logits(lenvm, text, torch.ones_like(text), *(batch[key][:1] for key in keys[2:]))
    torch.testing.assert_close(logits[6:], alone, rtol=0, atol=1e-5)
    whole = completion_logits(lenvm, *(mixed[key] for key in keys), None, picture_inputs(mixed))
    torch.testing.assert_close(whole, logits, rtol=0, atol=1e-5)
    assert picture_inputs({key: batch[key] for key in keys}) is None


def test_what_would_lose_the_pictures_is_refused(tmp_path):
    text = tiny_length_value_model(tiny_llama(64), GAMMA, tokenizer=picture_processor().tokenizer)
    with pytest.raises(ValueError, match="length value model.*qwen2_5_vl"):
        make("grpo", tmp_path, text)
    with pytest.raises(ValueError, match="task critic"):
        make("ppo", tmp_path, critic=tiny_llama(64))
    with pytest.raises(ValueError, match="refresh_steps"):
        make("grpo", tmp_path, value_model(), length_coef=0.1, refresh_steps=1)
    with pytest.raises(ValueError, match="rollout_guidance"):
        make("grpo", tmp_path, value_model(), rollout_guidance={"strength": 1.0})
    trainer, other = make("grpo", tmp_path), value_model()
    other.config.backbone_config.model_type = "qwen2_vl"
    with pytest.raises(ValueError, match="qwen2_vl"):
        check_sees_pictures(other, trainer, "length value model")


def test_pictures_in_a_completion_that_was_left_out_are_refused(tmp_path):
    batch = batch_of(make("grpo", tmp_path))
    picture_inputs(batch)
    batch["mm_token_type_ids"][0, -1] = 1
    batch["completion_mask"][0] = 0
    assert VISION_END not in batch["completion_ids"]
    with pytest.raises(ValueError, match="mask_truncated_completions"):
        picture_inputs(batch)
