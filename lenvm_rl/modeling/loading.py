"""Models as programs load them: by path, on a device, in eval mode, and each checked against what it is used with."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lenvm_rl.modeling.backbones import load_model
from lenvm_rl.modeling.length_value_model import LengthValueConfig, LengthValueModel
from lenvm_rl.modeling.sharing import FULL
from lenvm_rl.tokenization import check_same_tokenizer

CONFIG_FILE, ADAPTER_FILE = "config.json", "adapter_config.json"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def default_device() -> torch.device:
    """The accelerator, if there is one."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def load_policy(path: str | os.PathLike, **load_kwargs: Any) -> PreTrainedModel:
    """A causal language model at a path, or adapters of one, in eval mode."""
    check_policy(path)
    return load_model(AutoModelForCausalLM.from_pretrained, path, **load_kwargs).to(default_device()).eval()


def check_policy(path: str | os.PathLike) -> None:
    """Raise an error if there is no policy at a path, as [`load_policy`] does, without loading it."""
    if model_type(path, ADAPTER_FILE) == LengthValueConfig.model_type:
        raise ValueError(f"'{path}' is a length value model, which writes no text: give the policy here.")


def has_tokenizer(path: str | os.PathLike) -> bool:
    """Whether a tokenizer lies in a folder; what is no folder is taken for a hub id, which may have one."""
    folder = os.path.expanduser(os.fspath(path))
    return not os.path.isdir(folder) or any(os.path.isfile(os.path.join(folder, name)) for name in TOKENIZER_FILES)


def load_tokenizer(
    path: str | os.PathLike, pad_token: str | None = None, **load_kwargs: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer at a path; `pad_token`, one of its vocabulary, pads instead of its own."""
    if not has_tokenizer(path):
        raise FileNotFoundError(
            f"'{path}' has no tokenizer ({' or '.join(TOKENIZER_FILES)}): save the policy's there, "
            "`tokenizer.save_pretrained(path)`, or name another place where the program lets you."
        )
    tokenizer = load_model(AutoTokenizer.from_pretrained, path, **load_kwargs)
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ValueError(f"pad_token {pad_token!r} is not in the vocabulary of '{path}': name a token that is.")
        tokenizer.pad_token = pad_token
    return tokenizer


def load_length_value_model(
    path: str | os.PathLike,
    base: str | os.PathLike | nn.Module | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | dict | None = None,
    tokenizer_name: str = "the policy",
    device: torch.device | str | None = None,
    **load_kwargs: Any,
) -> LengthValueModel:
    """The length value model at a path, in any of its forms, frozen.

    Args:
        path (`str` or path): a folder or a hub id.
        base (`str`, path or model, *optional*):
            What the forms `"adapter"` and `"head"` were fitted on and share the decoder of; the form `"full"`, which
            has a decoder of its own, does without. A program hands over what it knows, whatever the form.
        tokenizer (`PreTrainedTokenizerBase` or `dict`, *optional*): what the model has to agree with, a tokenizer or a
            fingerprint; compared before weights are read.
        tokenizer_name (`str`, *optional*): whose that is, in the error.
        device (*optional*, defaults to [`default_device`]): where the model goes.
        load_kwargs: further arguments of [`~lenvm_rl.modeling.LengthValueModel.from_pretrained`].
    """
    config = read_config(path)
    if config.form != FULL and base is None:
        fitted_on = f" It was fitted on completions of {config.generator}." if config.generator else ""
        raise ValueError(
            f"The length value model '{path}' is of form {config.form!r} and holds no decoder: name the model that it "
            f"was fitted on with --base.{fitted_on}"
        )
    if tokenizer is not None:
        check_same_tokenizer(config.tokenizer_fingerprint, tokenizer, theirs_name=tokenizer_name)
    shared = None if config.form == FULL else base
    model = LengthValueModel.from_pretrained(path, base=shared, **load_kwargs)
    return model.to(device or default_device()).freeze()


def read_config(path: str | os.PathLike) -> LengthValueConfig:
    """The config of the length value model at a path; a `ValueError` if it is another model's."""
    kind = model_type(path)
    if kind != LengthValueConfig.model_type:
        raise ValueError(
            f"'{path}' is a model of type {kind!r}, not a length value model: give one that "
            "recipes/pretrain_lenvm.py made."
        )
    return load_model(LengthValueConfig.from_pretrained, path)


def model_type(path: str | os.PathLike, *other_files: str) -> str | None:
    """What the config at a path calls its model; `None` where one of the other files stands for it."""
    folder, names = os.path.expanduser(os.fspath(path)), (CONFIG_FILE, *other_files)
    if os.path.isdir(folder) and not any(os.path.isfile(os.path.join(folder, name)) for name in names):
        raise FileNotFoundError(f"'{path}' holds no model (no {' or '.join(names)}): check the path.")
    return load_model(PreTrainedConfig.get_config_dict, path)[0].get("model_type")
