"""What a value model says along completions: one number for every state, from before the first token to after the last.

A batch is laid out as TRL has it: prompts `(B, P)` padded on the left, completions `(B, T)` padded on the right.
"""

import torch


def position_ids_from_mask(attention_mask: torch.Tensor) -> torch.LongTensor:
    """Positions counted from each row's first token, so that padding on the left moves nothing.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, S)`):
            1 for tokens, 0 for padding.

    Returns:
        `torch.LongTensor` of shape `(B, S)`: 0 at padding before the tokens, the last token's position after them.

    Raises:
        `ValueError`: the mask is not two-dimensional, so that no positions can be read off it.
    """
    if attention_mask.ndim != 2:
        raise ValueError(
            f"Positions are counted from a mask of shape (B, S), and this one is {tuple(attention_mask.shape)}: "
            "give `position_ids`."
        )
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def completion_logits(
    model, prompt_ids, prompt_mask, completion_ids, completion_mask, chunk_size=None, further_inputs=None
) -> torch.FloatTensor:
    """The logits of a batch of completions at every state.

    Runs with gradients if the caller has them on. What stands at masked slots does not matter, not even an id outside
    the vocabulary.

    Args:
        model (`Callable`):
            `model(input_ids=…, attention_mask=…)` returns an object with `.logits` of shape `(B, S)`; positions are
            counted from the mask.
        prompt_ids (`torch.LongTensor` of shape `(B, P)`):
            Prompts, padded on the left.
        prompt_mask (`torch.Tensor` of shape `(B, P)`):
            1 where a prompt token exists.
        completion_ids (`torch.LongTensor` of shape `(B, T)`):
            Completions, padded on the right.
        completion_mask (`torch.Tensor` of shape `(B, T)`):
            1 where a completion token exists.
        chunk_size (`int`, *optional*):
            Rows per forward; all at once by default.
        further_inputs (`Callable`, *optional*):
            `further_inputs(rows)` gives the model's further keyword arguments for a `slice` of rows, such as those of
            pictures.

    Returns:
        `torch.FloatTensor` of shape `(B, T + 1)`: entry t is the logit of the state before token t, so entry 0 is read
        at the last prompt token and the entry at the row's length after its last token. Entries beyond that are 0.

    Raises:
        `ValueError`: shapes disagree, a prompt is empty or not padded on the left, a completion is not padded on the
            right, chunk_size is below 1, or the model does not give one number per position.
    """
    _check_layout(prompt_ids, prompt_mask, completion_ids, completion_mask)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is the number of rows per forward, so at least 1, not {chunk_size}.")
    mask = torch.cat([prompt_mask.long(), completion_mask.long()], dim=1)
    ids = torch.cat([prompt_ids, completion_ids], dim=1).masked_fill(mask == 0, 0)
    size = len(ids) if chunk_size is None else chunk_size
    chunks = []
    for index, (rows, rows_mask) in enumerate(zip(ids.split(size), mask.split(size), strict=True)):
        further = {} if further_inputs is None else further_inputs(slice(index * size, (index + 1) * size))
        logits = model(input_ids=rows, attention_mask=rows_mask, **further).logits
        if logits.shape != rows.shape:
            raise ValueError(
                f"A value model gives one logit per position, here {tuple(rows.shape)}, but this model gives "
                f"{tuple(logits.shape)}: make one with `LengthValueModel.from_backbone`."
            )
        chunks.append(logits[:, prompt_ids.shape[1] - 1 :].float())
    exists = torch.nn.functional.pad(completion_mask.bool(), (1, 0), value=True)
    return torch.where(exists, torch.cat(chunks), 0.0)


def bootstrap_values(values: torch.Tensor, mask: torch.Tensor, finished: torch.Tensor) -> torch.Tensor:
    """The value after each row's last token: exactly 0 where the completion finished, because nothing follows the end.

    Args:
        values (`torch.Tensor` of shape `(B, T + 1)`):
            One number per state, as [`completion_logits`] lays them out. The 0 of a finished row is a value; as a logit
            it would not say "nothing follows".
        mask (`torch.Tensor` of shape `(B, T)`):
            1 where a token exists: ones, then zeros, in each row.
        finished (`torch.Tensor` of shape `(B,)`):
            True where the last token is the end of sequence, False where the completion was cut.

    Returns:
        `torch.Tensor` of shape `(B,)`, in the dtype of values.

    Raises:
        `ValueError`: shapes disagree, or a row of the mask is not ones, then zeros.
    """
    rows, steps = mask.shape
    if values.shape != (rows, steps + 1) or finished.shape != (rows,):
        raise ValueError(
            f"With a mask of shape (B, T) = {(rows, steps)}, values are (B, T + 1) and finished is (B,); these are "
            f"{tuple(values.shape)} and {tuple(finished.shape)}."
        )
    _check_padded_on_the_right(mask)
    last = values.gather(1, mask.long().sum(dim=1, keepdim=True)).squeeze(1)
    return torch.where(finished.bool(), 0.0, last)


def _check_layout(prompt_ids, prompt_mask, completion_ids, completion_mask) -> None:
    shapes = [tuple(array.shape) for array in (prompt_ids, prompt_mask, completion_ids, completion_mask)]
    prompt, completion = shapes[0], shapes[2]
    if shapes != [prompt, prompt, completion, completion] or [len(prompt), len(completion)] != [2, 2]:
        raise ValueError(f"Prompt ids and mask are (B, P), completion ids and mask (B, T); these are {shapes}.")
    if prompt[0] != completion[0]:
        raise ValueError(f"There are {prompt[0]} prompts and {completion[0]} completions: give one row of each.")
    tokens = prompt_mask.bool()
    if prompt[1] == 0 or not tokens[:, -1].all() or (tokens[:, :-1] & ~tokens[:, 1:]).any():
        raise ValueError(
            "A prompt has at least one token and is padded on the left, so a row of prompt_mask is zeros, then ones."
        )
    _check_padded_on_the_right(completion_mask)


def _check_padded_on_the_right(mask) -> None:
    tokens = mask.bool()
    if (tokens[:, 1:] & ~tokens[:, :-1]).any():
        raise ValueError("A completion is padded on the right, so a row of its mask is ones, then zeros.")


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
