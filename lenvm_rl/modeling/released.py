"""The paper's released checkpoints, read as length value models (arXiv 2604.27039).

A released checkpoint is the folder of a causal language model with the value head beside it in
`value_head.safetensors`, applied to the last hidden state after the final norm:

- `v_head.fc.weight` `(H, H)` and `v_head.fc.bias`, then SiLU, then `v_head.summary.weight` `(1, H)` and
  `v_head.summary.bias`: the head of §3.1, taken over as it is;
- older ones, and the vision-language ones, have `v_head.summary` alone: a linear head.

`V = -sigmoid(z)` in both. The discount gamma is not stored, though values mean nothing without it: it has to be known.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from lenvm_rl.modeling.backbones import fitting_fingerprint, load_decoder, load_model
from lenvm_rl.modeling.length_value_model import LengthValueConfig, LengthValueModel

logger = logging.getLogger(__name__)

HEAD_FILE = "value_head.safetensors"
LINEAR_HEAD = {"v_head.summary.weight", "v_head.summary.bias"}
FULL_HEAD = LINEAR_HEAD | {"v_head.fc.weight", "v_head.fc.bias"}


def load_released_checkpoint(
    path: str | os.PathLike,
    gamma: float,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generator: str | None = None,
    gamma_fit: dict | None = None,
    truncated_share: float | None = None,
    dtype: str | torch.dtype = "float32",
    **load_kwargs: Any,
) -> LengthValueModel:
    """A length value model from a checkpoint of the paper's released code.

    Args:
        path (`str` or `os.PathLike`): the checkpoint's folder, or its hub id; only safetensors are loaded.
        gamma (`float`): the discount that the checkpoint was trained with, in (0, 1). The checkpoint does not say; the
            training settings released with it do: 0.997 for the models of Qwen2.5, 0.9998 for the models of Qwen3.
        tokenizer (`PreTrainedTokenizerBase`, *optional*, defaults to the checkpoint's own): its fingerprint is kept in
            the config. Without a tokenizer here or in the checkpoint, no policy can be checked against the model.
        generator, gamma_fit, truncated_share (*optional*): for the config, see [`LengthValueConfig`]. (The released
            code trained on completions that were cut as if they had finished.)
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`): of the decoder. The head is float32.
        load_kwargs: further arguments of `AutoModel.from_pretrained`.

    Returns:
        [`~lenvm_rl.modeling.LengthValueModel`]: in eval mode; saved by `save_pretrained`, it loads like any other.

    Raises:
        `FileNotFoundError`: nothing is at the path, or it has no `value_head.safetensors`.
        `ValueError`: gamma is not in (0, 1), weights are missing or others than named above, or the tokenizer does not
            fit.
    """
    if gamma is None:
        raise ValueError(
            "gamma is not stored in a released checkpoint, and values mean nothing without it: give the one of "
            "its training (the released training settings have 0.997 for Qwen2.5 and 0.9998 for Qwen3)."
        )
    weights = load_file(_head_file(path))
    decoder = load_decoder(path, dtype, **load_kwargs)
    _check_head(weights, decoder, path)
    config = LengthValueConfig(
        backbone_config=decoder.config,
        gamma=gamma,
        gamma_fit=gamma_fit,
        tokenizer_fingerprint=fitting_fingerprint(_own_tokenizer(path) if tokenizer is None else tokenizer, decoder),
        generator=generator,
        truncated_share=truncated_share,
        dtype=decoder.dtype,
    )
    model = LengthValueModel(config, backbone=decoder).to(decoder.device).eval()
    _fill_head(model.head, weights)
    return model


def _head_file(path) -> str:
    path = os.path.expanduser(os.fspath(path))
    if not os.path.isdir(path):
        return load_model(cached_file, path, HEAD_FILE)
    if not os.path.isfile(os.path.join(path, HEAD_FILE)):
        other = sorted(file.name for file in Path(path).glob("value_head.*"))
        found = f" It has {', '.join(other)}, but only safetensors are loaded: convert that file." if other else ""
        raise FileNotFoundError(
            f"'{path}' has no {HEAD_FILE}, so it is no released checkpoint of a length value model.{found} A model "
            "saved by this library is loaded with `LengthValueModel.from_pretrained`."
        )
    return os.path.join(path, HEAD_FILE)


def _check_head(weights, decoder, path) -> None:
    if weights.keys() not in (FULL_HEAD, LINEAR_HEAD):
        raise ValueError(
            f"The value head of '{path}' has the weights {sorted(weights)}, but a released one has "
            f"{sorted(FULL_HEAD)}, or {sorted(LINEAR_HEAD)} alone."
        )
    reads, gives = weights["v_head.summary.weight"].shape[-1], decoder.config.get_text_config(decoder=True).hidden_size
    if reads != gives:
        raise ValueError(
            f"The value head of '{path}' reads {reads} numbers per token, but its decoder gives {gives}: the two files "
            "belong to different models."
        )


def _own_tokenizer(path):
    path = os.path.expanduser(os.fspath(path))
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "tokenizer_config.json")):
        logger.warning("'%s' has no tokenizer: the model cannot be compared with a policy's", path)
        return None
    return load_model(AutoTokenizer.from_pretrained, path)


@torch.no_grad()
def _fill_head(head, weights) -> None:
    """Takes over the released weights. A linear head `w h + b` is written exactly as one with a SiLU layer.

    With the two hidden units `w h` and `-w h`, weighted 1 and -1: `SiLU(x) - SiLU(-x) = x (σ(x) + σ(-x)) = x`. The
    other units keep the random weights of a new head and are weighted 0, so they change nothing and can still learn.
    """
    head.output.bias.copy_(weights["v_head.summary.bias"])
    if weights.keys() == FULL_HEAD:
        head.hidden.weight.copy_(weights["v_head.fc.weight"])
        head.hidden.bias.copy_(weights["v_head.fc.bias"])
        head.output.weight.copy_(weights["v_head.summary.weight"])
        return
    logger.warning("the value head is linear (v_head.summary alone), as in older and vision-language checkpoints")
    head.hidden.weight[0] = weights["v_head.summary.weight"][0]
    head.hidden.weight[1] = -weights["v_head.summary.weight"][0]
    head.output.weight.zero_()
    head.output.weight[0, 0], head.output.weight[0, 1] = 1.0, -1.0
