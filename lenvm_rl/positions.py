"""Positions in a length value model's decoder: counted from the mask, or left to a decoder that sees pictures; and how
many there are.

Vision-language decoders with multimodal rotary positions (Qwen2-VL, Qwen2.5-VL, …) place the tokens of a picture on a
grid, by `get_rope_index`; the text behind it goes on from the grid's larger side and not from the number of tokens.
"""

import torch

from lenvm_rl.completions import position_ids_from_mask

_GRIDS = ("image_grid_thw", "video_grid_thw")
_STRETCHED = ("dynamic", "yarn")
_REACHES = ("window", "chunk", "block", "local", "span")


def _places_on_grid(decoder) -> bool:
    return hasattr(decoder, "get_rope_index")


def grid_offsets(decoder):
    """How far the next position is ahead of the number of tokens, `(B, 1)`, if the decoder has just made its own."""
    return decoder.rope_deltas if _places_on_grid(decoder) else None


def context_of(config) -> int | None:
    """Tokens that a model can read, prompt included, as its config says it; `None` where it names no limit.

    Args:
        config (`PretrainedConfig`): of a decoder, or of a model around one.
    """
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if limit is not None and rope.get("rope_type") in _STRETCHED:
        # Their configs name what the model was trained on before its positions were stretched.
        trained = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, int(trained * (rope.get("factor") or 1.0)))
    return limit


def window_sizes(config) -> list[int]:
    """Numbers in a decoder's config that may be the reach of an attention, in tokens, ascending."""
    text = config.get_text_config(decoder=True).to_dict()
    named = [value for name, value in text.items() if any(part in name for part in _REACHES)]
    return sorted({value for value in named if isinstance(value, int) and not isinstance(value, bool) and value > 1})


def decoder_positions(decoder, inputs, attention_mask, position_ids, past_key_values, backbone_kwargs):
    """Position ids for a forward of the decoder.

    Args:
        decoder (`PreTrainedModel`):
            The decoder.
        inputs (`torch.Tensor` of shape `(B, S)` or `(B, S, H)`):
            Token ids or embedded tokens.
        attention_mask (`torch.Tensor`, *optional*):
            As [`~lenvm_rl.modeling.LengthValueModel.forward`] takes it.
        position_ids (`torch.LongTensor`, *optional*):
            The caller's, which are kept.
        past_key_values (`Cache`, *optional*):
            What came before.
        backbone_kwargs (`dict`):
            Further inputs, among them those of pictures.

    Returns:
        `torch.LongTensor` or `None`: `(B, S)`; `(4, B, S)` for text without a mask in a decoder with multimodal
        positions, which so keeps packed sequences apart; `None` where the decoder makes its own.

    Raises:
        `ValueError`: no positions can be told from what is given.
    """
    multimodal = _places_on_grid(decoder)
    if multimodal and position_ids is None:
        if any(backbone_kwargs.get(name) is not None for name in _GRIDS):
            _check_pictures(inputs, past_key_values, backbone_kwargs)
            return None
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise ValueError(
                "With a cache, positions after a picture cannot be counted from the mask: give `position_ids`, the "
                "number of tokens before plus the output's `rope_deltas` (0 without pictures)."
            )
        if attention_mask is None:
            position_ids = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape[:2])
    if position_ids is None and attention_mask is not None:
        position_ids = position_ids_from_mask(attention_mask)[:, -inputs.shape[1] :]
    if multimodal and attention_mask is None and past_key_values is None and position_ids.ndim == 2:
        return position_ids.expand(4, *position_ids.shape)
    return position_ids


def _check_pictures(inputs, past_key_values, backbone_kwargs) -> None:
    if inputs.is_floating_point() or backbone_kwargs.get("mm_token_type_ids") is None:
        raise ValueError(
            "A picture's place is found in `input_ids` and `mm_token_type_ids`: give the model everything that the "
            "processor returns."
        )
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise ValueError("Pictures come with the prompt, and not after a cache: give the whole sequence.")
