"""Every family of decoders, with pictures or without, is trained, saved, loaded and asked through one class."""

import pytest
import torch
from PIL import Image
from tiny import (
    assert_same_weights,
    tiny_length_value_model,
    tiny_llama,
    tiny_qwen2,
    tiny_qwen3,
    tiny_tokenizer,
    tokens,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lenvm_rl.modeling.heads import LengthValueHead
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.pretraining.batches import check_isolation

IMAGE, VIDEO, VISION_START, VISION_END = 60, 61, 62, 63
FORMS = ["full", "adapter", "head"]


def tiny_vlm(seed=0):
    """A random `Qwen2_5_VLForConditionalGeneration`: patches of 4x4 pixels, merged 2x2; a picture is token 60."""
    text = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]},
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "initializer_range": 0.2,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [0],
        "out_hidden_size": 16,
        "initializer_range": 0.2,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config).eval()


def picture_inputs(rows, pad=0):
    """`rows` lists of text; a picture of 4x4 patches, 4 tokens, stands behind the first two tokens of each."""
    draw = torch.Generator().manual_seed(1)
    sequences = [[*row[:2], VISION_START, *[IMAGE] * 4, VISION_END, *row[2:]] for row in rows]
    width = max(map(len, sequences)) + pad
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "image_grid_thw": torch.tensor([[1, 4, 4]]).expand(len(rows), 3),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=draw).repeat(len(rows), 1),
    }


ROWS = [[10, 11, 12], [20, 21, 22, 23, 24]]
MAKERS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "qwen3": tiny_qwen3, "qwen2_5_vl": tiny_vlm, "pictures": tiny_vlm}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", MAKERS)
def test_train_a_step_save_load_and_predict(backbone, form, tmp_path):
    base = MAKERS[backbone]()
    model = LengthValueModel.from_backbone(base, gamma=0.9, form=form).train()
    if backbone == "pictures":
        inputs = picture_inputs(ROWS)
    else:
        inputs = {"input_ids": tokens(2, 6), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}
    exists = inputs["attention_mask"].bool()
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = (model(**inputs).values[exists] + 0.9).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert type(model.head) is LengthValueHead
    model.eval().save_pretrained(tmp_path)
    loaded = LengthValueModel.from_pretrained(tmp_path, **({} if form == "full" else {"base": base}))
    assert_same_weights(model, loaded)
    output = loaded(**inputs)
    assert output.values.shape == exists.shape and output.values.std() > 1e-4
    torch.testing.assert_close(output.values, model(**inputs).values, rtol=0, atol=1e-6)


# ---- pictures


def test_the_hidden_states_with_pictures_are_those_of_the_policy():
    """Positions are the policy's own, on a grid where there is a picture."""
    policy = tiny_vlm()
    model = tiny_length_value_model(policy)
    inputs = picture_inputs(ROWS)
    hidden = policy(**inputs, output_hidden_states=True).hidden_states[-1]
    there = inputs["attention_mask"].bool()
    assert torch.equal(model(**inputs).logits[there], model.head(hidden)[there])
    flat = model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0))
    assert (flat.logits - model(**inputs).logits)[there].abs().max() > 1e-2, "counted positions would be others"


def test_a_picture_changes_the_values_behind_it_and_none_before():
    model = tiny_length_value_model(tiny_vlm())
    inputs = picture_inputs(ROWS[:1])
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    difference = (model(**inputs).values - model(**other).values)[0].abs()
    assert (difference[:3] == 0).all() and (difference[4:] > 1e-4).all()


def test_padding_changes_no_value_with_pictures():
    model = tiny_length_value_model(tiny_vlm())
    padded = model(**picture_inputs(ROWS, pad=3)).values
    for row, text in enumerate(ROWS):
        alone = model(**picture_inputs([text])).values[0]
        torch.testing.assert_close(padded[row, -len(alone) :], alone, rtol=0, atol=1e-5)


def test_a_cache_behind_a_picture_goes_on_where_the_picture_ends():
    model = tiny_length_value_model(tiny_vlm())
    inputs = picture_inputs([[10, 11, 12, 13, 14]])
    whole = model(**inputs).values
    start = {
        name: value[:, :9] if name in ("input_ids", "mm_token_type_ids") else value for name, value in inputs.items()
    }
    output = model(**{**start, "attention_mask": inputs["attention_mask"][:, :9]}, use_cache=True)
    # 9 tokens; the picture's 4 take the 2 positions of its larger side.
    assert output.rope_deltas.tolist() == [[-2]]
    rest = {"input_ids": inputs["input_ids"][:, 9:], "attention_mask": inputs["attention_mask"]}
    with pytest.raises(ValueError, match="position_ids"):
        model(**rest, past_key_values=output.past_key_values)
    positions = torch.arange(9, 11)[None] + output.rope_deltas
    behind = model(**rest, past_key_values=output.past_key_values, position_ids=positions).values
    torch.testing.assert_close(torch.cat([output.values, behind], 1), whole, rtol=0, atol=1e-5)


def test_pictures_without_all_that_the_processor_returns_are_refused():
    model = tiny_length_value_model(tiny_vlm())
    inputs = picture_inputs(ROWS)
    del inputs["mm_token_type_ids"]
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        model(**inputs)


@pytest.mark.parametrize("form", FORMS)
def test_text_without_pictures_is_padded_and_packed_as_in_any_decoder(form):
    model = LengthValueModel.from_backbone(tiny_vlm(), gamma=0.9, form=form)
    check_isolation(model)
    first, second = tokens(1, 4, seed=1) % 60, tokens(1, 6, seed=2) % 60
    packed = model(
        torch.cat([first, second], 1), position_ids=torch.cat([torch.arange(4), torch.arange(6)])[None]
    ).logits
    alone = torch.cat([model(first).logits, model(second).logits], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    padded = torch.cat([torch.full((1, 3), 9), second], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], alone[:, 4:], rtol=0, atol=1e-5)
    # A forward with pictures leaves no trace in the next one without.
    model(**picture_inputs(ROWS))
    embeds = model.get_input_embeddings()(second)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, alone[:, 4:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["adapter", "head"])
def test_a_policy_in_the_middle_of_a_generation_keeps_its_positions(form):
    policy = tiny_vlm()
    model = LengthValueModel.from_backbone(policy, gamma=0.9, form=form)
    policy(**picture_inputs(ROWS), use_cache=True)
    deltas = policy.model.rope_deltas.clone()
    model(**picture_inputs([[10, 11, 12]]))
    assert torch.equal(policy.model.rope_deltas, deltas)


class PictureProcessor(Qwen2_5_VLProcessor):
    """Without the part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name != "video_processor":
            super().check_argument_for_proper_class(argument_name, argument)


def test_pictures_come_through_the_processor():
    """A processor made in the process: a picture of 16x24 pixels is 4x6 patches, so 6 tokens."""
    tokenizer = tiny_tokenizer(60)
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    assert tokenizer.convert_tokens_to_ids(names) == [IMAGE, VIDEO, VISION_START, VISION_END]
    tokenizer.padding_side = "left"
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    processor = PictureProcessor(image_processor=images, tokenizer=tokenizer)
    text = [
        "w10 <|vision_start|><|image_pad|><|vision_end|> w11 w12",
        "<|vision_start|><|image_pad|><|vision_end|> w13",
    ]
    pictures = [Image.effect_noise((24, 16), 60).convert("RGB") for _ in text]
    inputs = processor(text=text, images=pictures, padding=True, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]] * 2
    assert (inputs["input_ids"] == IMAGE).sum(dim=1).tolist() == [6, 6]
    model = tiny_length_value_model(tiny_vlm(), tokenizer=tokenizer)
    values = model(**inputs).values
    assert values.shape == inputs["input_ids"].shape
    alone = processor(text=text[1:], images=pictures[1:], return_tensors="pt")
    torch.testing.assert_close(values[1, 2:], model(**alone).values[0], rtol=0, atol=1e-5)
