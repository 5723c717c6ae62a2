"""A value model's decoder, of any class of transformers: loaded or copied, checked, and what is particular about it.

A decoder whose class is none of transformers' own has its code beside its weights. That code runs only where it is
asked for (`trust_remote_code=True`), and is saved with every model that is made of the decoder.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticCache,
)
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.initialization import no_init_weights

from lenvm_rl.tokenization import tokenizer_fingerprint

logger = logging.getLogger(__name__)

# What decoders call their cache: since transformers 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")
RESIZE = "give the model's own tokenizer, or add rows with `model.resize_token_embeddings(len(tokenizer))`"
_TRAINED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Where transformers puts classes whose code came with the weights, and what says where to look for it.
_MODULES = "transformers_modules"
_OF_HUB = ("revision", "token", "cache_dir", "local_files_only")
# Kinds of rotary positions that go beyond the length that the config names.
_STRETCHED = ("dynamic", "yarn")
_REACHES = ("window", "chunk", "block", "local", "span")


def load_model(loader: Callable, path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    """`loader(path, …)`, with an error that says first whether the path was taken for a folder or for a hub id.

    Args:
        loader (`Callable`): some `from_pretrained`.
        path (`str` or `os.PathLike`): a folder (`~` is the home folder) or a hub id (`name` or `owner/name`).

    Raises:
        `FileNotFoundError`: nothing is there. The hub is not asked for what cannot be a hub id, nor for what would lie
            in a folder that exists.
    """
    path = os.path.expanduser(os.fspath(path))
    if os.path.exists(path):
        return loader(path, *args, **kwargs)
    may_be_hub_id = path.count("/") <= 1 and not path.startswith((".", "/")) and "\\" not in path
    if not may_be_hub_id or ("/" in path and os.path.isdir(path.split("/")[0])):
        raise FileNotFoundError(f"There is no model at '{path}' (looked from {os.getcwd()}): check the path.")
    try:
        return loader(path, *args, **kwargs)
    except OSError as error:
        raise FileNotFoundError(
            f"There is no folder '{path}' (looked from {os.getcwd()}), and as a hub id it could not be loaded: {error}"
        ) from error


def load_decoder(path: str | os.PathLike, dtype: str | torch.dtype, **load_kwargs: Any) -> PreTrainedModel:
    """The decoder of the model at a path, every weight of it and no language-model head. Only safetensors are loaded.

    Raises:
        `FileNotFoundError`: see [`load_model`].
        `ValueError`: see [`check_decoder`]; or weights are missing, which would be random.
    """
    settings = {"use_safetensors": True, "dtype": dtype, **load_kwargs, "output_loading_info": True}
    loader = load_model(_loader_of, path, load_kwargs)
    model, info = load_model(loader.from_pretrained, path, **settings)
    check_decoder(model)
    decoder = model.base_model
    missing = list(info["missing_keys"])
    tied = decoder.config.get_text_config(decoder=True).tie_word_embeddings
    table = decoder.get_input_embeddings().weight
    embedding = [name for name, weight in decoder.named_parameters() if weight is table]
    if tied and "lm_head.weight" in info["unexpected_keys"] and missing == embedding:
        # Tied embeddings are held once; some checkpoints do so under the output's name, where a bare decoder does not
        # look for them.
        mapping = {**(load_kwargs.get("key_mapping") or {}), r"^lm_head\.weight$": missing[0]}
        decoder, info = load_model(AutoModel.from_pretrained, path, **{**settings, "key_mapping": mapping})
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking:
        raise ValueError(
            f"The decoder at '{path}' lacks weights, which would be random: {', '.join(lacking[:6])}. The checkpoint "
            "is incomplete, or holds adapters only: download it again, or merge the adapters (`merge_and_unload`)."
        )
    return decoder


def copy_decoder(model: PreTrainedModel, dtype: str | torch.dtype, loadable: bool = True) -> PreTrainedModel:
    """A decoder with the weights of a model's: nothing shared, and none of the original's hooks, flags or freezing.

    Args:
        model (`PreTrainedModel`): a causal language model or a bare decoder, see [`check_decoder`].
        dtype (`str` or `torch.dtype`): of the copy.
        loadable (`bool`, *optional*, defaults to `True`): whether a copy that could be saved but not loaded, since
            `AutoModel` would make another class from the decoder's config, is an error or only worth a warning.
    """
    check_decoder(model)
    decoder = model.base_model
    known = MODEL_MAPPING.get(type(decoder.config), None)
    classes = known if isinstance(known, tuple) else (known,)
    if not _is_remote(decoder) and type(decoder) not in classes:
        problem = (
            f"The decoder is a {type(decoder).__name__}, but `AutoModel` makes "
            f"{'nothing' if known is None else f'a {classes[0].__name__}'} from its config, so a copy could not be "
            "loaded again: give a model of a class that `AutoModel` knows, or make it known (`AutoConfig.register`, "
            "`AutoModel.register`)."
        )
        if loadable:
            raise ValueError(problem)
        logger.warning(problem)
    config = copy.deepcopy(decoder.config)
    # What was read from a quantised file is plain by now; what still is quantised has been refused.
    vars(config).pop("quantization_config", None)
    # Every weight is written over, so drawing random ones would only cost time and the caller's random state.
    with no_init_weights():
        copied = type(decoder)._from_config(config, dtype=dtype)
    copied.load_state_dict(decoder.state_dict())
    return copied.to(decoder.device).eval()


def check_decoder(model: Any, adapters: bool = False, shared: bool = False) -> None:
    """Raise unless a value model can be built on a model: one of transformers as it is, with a causal decoder, and no
    value model already; whose layers may carry adapters where `adapters` says so. One that is to be `shared` may be
    quantised and carry adapters: its weights are read by its own layers alone."""
    plain = isinstance(model, PreTrainedModel)
    if not plain or (
        not (adapters or shared) and any(isinstance(module, BaseTunerLayer) for module in model.modules())
    ):
        raise ValueError(
            f"A length value model is built on a plain model of transformers; this is a {type(model).__name__}, "
            "wrapped or with adapters: unwrap it (`accelerator.unwrap_model`), merge its adapters (`merge_and_unload`)."
        )
    if not shared and is_quantized(model):
        raise ValueError(
            f"The weights of this {type(model).__name__} are quantised, and a model that learns cannot start from "
            "a copy of them: give one that is not, or share them (form='head' or 'adapter')."
        )
    if model.config.model_type == "length_value":
        raise ValueError("This is a length value model already: load it with `LengthValueModel.from_pretrained`.")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; a length value model needs a causal decoder.")


def shared_config(decoder: PreTrainedModel) -> PretrainedConfig:
    """A copy of a decoder's config for a model that shares it, in however many bits its owner holds the weights."""
    config = copy.copy(decoder.config)
    vars(config).pop("quantization_config", None)
    return copy.deepcopy(config)


def is_quantized(model: nn.Module) -> bool:
    """Whether weights are held in fewer bits than torch can train (if they were read from GGUF, they are plain)."""
    if any(weight.dtype not in _TRAINED_DTYPES for weight in model.parameters()):
        return True
    # As transformers marks what it has quantised, and as TRL asks.
    marks = ("is_loaded_in_4bit", "is_loaded_in_8bit")
    return getattr(model, "quantization_method", "gguf") != "gguf" or any(getattr(model, m, False) for m in marks)


@torch.no_grad()
def check_causal(decoder: PreTrainedModel) -> None:
    """Raise if a token's hidden state depends on the tokens after it, as in encoders: it would tell the length.

    One short forward says so, whatever the config does. It is left out where the weights are not all here (on the
    device "meta", or held in parts by FSDP2 or DeepSpeed).
    """
    if any(weight.is_meta or not weight.numel() or isinstance(weight, DTensor) for weight in decoder.parameters()):
        logger.info("%s holds its weights elsewhere: not asked whether it is causal", type(decoder).__name__)
        return
    embedding = decoder.get_input_embeddings().weight
    configs = (decoder.config, decoder.config.get_text_config(decoder=True))
    named = [value for config in configs for name, value in config.to_dict().items() if name.endswith("token_id")]
    # Ids of pictures, padding and the like may be treated otherwise.
    plain = list(itertools.islice((token for token in range(embedding.shape[0]) if token not in named), 9))
    first, others, half = plain[:1], plain[1:], len(plain) // 2
    ids = torch.tensor([first + others[:half], first + others[-half:]], device=embedding.device)
    modes = [(module, module.training) for module in decoder.modules()]
    decoder.eval()
    states = decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    hidden = states[:, 0].float()
    for module, training in modes:
        module.training = training
    # Equal but for rounding; an encoder with random weights of the usual size differs by 0.003 and more.
    if float((hidden[0] - hidden[1]).norm()) > 1e-3 * float(hidden[0].norm()):
        raise ValueError(
            f"In {type(decoder).__name__}, a token sees the tokens after it (a bidirectional encoder), so its state "
            "would tell how long the completion is: a length value model needs a causal decoder. Give one, or set what "
            "makes this one causal in its config (`is_decoder=True`, `use_bidirectional_attention=False`, …)."
        )


def fitting_fingerprint(tokenizer: PreTrainedTokenizerBase | None, decoder: PreTrainedModel) -> dict | None:
    """The fingerprint of a tokenizer, if there is one, all of whose ids the decoder embeds ([`check_embeds`])."""
    if tokenizer is None:
        return None
    check_embeds(tokenizer, decoder, "the model", ordinary=True)
    return tokenizer_fingerprint(tokenizer)


def check_embeds(
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module,
    what: str,
    ordinary: bool = False,
    padding: bool = True,
    remedy: str = RESIZE,
) -> None:
    """Raise unless a model embeds the tokens that it will read, where they go beyond its table in a bare `IndexError`.

    Other tokens beyond the table are only warned of: some models come with tokens that stand for pictures and are
    never embedded.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): what writes the ids.
        model (`PreTrainedModel` or `peft.PeftModel`): what reads them.
        what (`str`): what the error calls the model, such as `"the policy"`.
        ordinary (`bool`, *optional*, defaults to `False`): whether it reads all tokens but what was added as special.
            The end of sequence and what the chat template writes are read in any case.
        padding (`bool`, *optional*, defaults to `True`): whether it reads the pad token.
        remedy (`str`, *optional*): what to change.
    """
    rows = embedding_rows(model)
    beyond = {} if rows is None else {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    if not beyond:
        return
    special = {i for i, added in tokenizer.added_tokens_decoder.items() if added.special}
    template = str(tokenizer.chat_template or "")
    read = {tokenizer.eos_token_id} | ({tokenizer.pad_token_id} if padding else set())
    read |= {i for i, token in beyond.items() if token in template or (ordinary and i not in special)}
    if not padding:
        read -= {tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    missing = sorted(beyond.keys() & read)
    shown = ", ".join(f"{beyond[i]!r}" for i in (missing or sorted(beyond))[:5])
    if missing:
        raise ValueError(
            f"The tokenizer has ids up to {missing[-1]}, but {what} embeds {rows} tokens (ids 0 to {rows - 1}), and "
            f"not {shown}: {remedy}."
        )
    logger.warning(
        "%s embeds %d tokens, and the tokenizer has more (%s): a text that holds one of them ends in an error.",
        what[0].upper() + what[1:],
        rows,
        shown,
    )


def embedding_rows(model: nn.Module) -> int | None:
    """Rows of the table that a model looks ids up in; `None` where it has no such table."""
    table = model.get_input_embeddings()
    while isinstance(table, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        table = table.get_base_layer() if isinstance(table, BaseTunerLayer) else table.original_module
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def context_of(config: PretrainedConfig) -> int | None:
    """Tokens that a model can read, prompt included, as its config says it; `None` where it names no limit."""
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if limit is not None and rope.get("rope_type") in _STRETCHED:
        # Their configs name what the model was trained on before its positions were stretched.
        trained = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, int(trained * (rope.get("factor") or 1.0)))
    return limit


def window_sizes(config: PretrainedConfig) -> list[int]:
    """Numbers in a decoder's config that may be the reach of an attention, in tokens, ascending."""
    text = config.get_text_config(decoder=True).to_dict()
    named = [value for name, value in text.items() if any(part in name for part in _REACHES)]
    return sorted({value for value in named if isinstance(value, int) and not isinstance(value, bool) and value > 1})


def cache_keyword(decoder: PreTrainedModel, cache: Cache | None) -> dict[str, Cache]:
    """A cache of the tokens before, by the name that the decoder's forward has for it; nothing where there is none."""
    if cache is None:
        return {}
    _check_cache(decoder, cache)
    taken = inspect.signature(decoder.forward).parameters
    name = next((name for name in CACHE_NAMES if name in taken), None)
    if name is None:
        raise ValueError(f"{type(decoder).__name__} takes no `past_key_values`: give it whole sequences.")
    return {name: cache}


def cache_of(decoder: PreTrainedModel, outputs: Any) -> Cache:
    """The cache of keys and values in what the decoder returned, `use_cache=True` being given."""
    # Asked for by the old name, outputs that know the new one would warn.
    returned = set(outputs)
    name = next((name for name in CACHE_NAMES if name in returned), None)
    cache = None if name is None else outputs[name]
    _check_cache(decoder, cache)
    return cache


def _check_cache(decoder, cache) -> None:
    """Raise unless a cache holds keys and values and nothing else.

    A recurrent state, or the cache of a model's own, cannot be taken for granted: several decoders go on from theirs
    with other values than the whole sequence has, and without a word.
    """
    kinds = [] if cache is None else [type(cache).__name__]
    if type(cache) in (DynamicCache, StaticCache):
        recurrent = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
        kinds = sorted({type(layer).__name__ for layer in recurrent})
        if not kinds:
            return
    raise ValueError(
        f"{type(decoder).__name__} returns no `past_key_values` of keys and values alone (a recurrent decoder keeps a "
        f"state instead{': ' if kinds else ''}{', '.join(kinds)}), so use_cache=True has nothing to return: leave it "
        "out, and decode with scoring='full'."
    )


class CodelessConfig(PretrainedConfig):
    """The settings of a decoder whose code was not asked for: to be read, and not to be made a decoder of."""


def decoder_config_from_dict(settings: dict) -> PretrainedConfig:
    """A decoder's config from its JSON form; a [`CodelessConfig`] if its class is not at hand."""
    if "auto_map" in settings and settings.get("model_type") not in CONFIG_MAPPING:
        return CodelessConfig(**settings)
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise ValueError("`backbone_config` names no `model_type`: add the decoder's to config.json, such as 'llama'.")
    try:
        return AutoConfig.for_model(model_type, **settings)
    except ValueError as error:
        raise ValueError(f"This transformers makes no decoder config of type '{model_type}': {error}") from error


def decoder_from_config(config: PretrainedConfig) -> PreTrainedModel:
    """A decoder with random weights."""
    if isinstance(config, CodelessConfig):
        raise ValueError(
            f"The decoder (model type '{config.model_type}') is none of transformers' own; its code "
            "lies beside its weights and runs on this machine when it is loaded. If you trust it, load the model with "
            "`trust_remote_code=True` (in a run, set it in `args`)."
        )
    if not _is_remote(config):
        return AutoModel.from_config(config)
    model_class = get_class_from_dynamic_module(config.auto_map["AutoModel"], config._name_or_path)
    return model_class._from_config(config)


def with_code(config_class: type[PretrainedConfig], path: str | os.PathLike, load_kwargs: dict) -> dict:
    """Arguments of a value model's `from_pretrained`, with a `config` whose decoder has its own code where it needs it.

    Args:
        config_class (`type[PretrainedConfig]`): of the value model.
        path (`str` or `os.PathLike`): folder or hub id.
        load_kwargs (`dict`): the arguments. With `trust_remote_code=True` the code in the folder is run.
    """
    if not load_kwargs.get("trust_remote_code") or load_kwargs.get("config") is not None:
        return load_kwargs
    of_hub = {name: load_kwargs[name] for name in _OF_HUB if name in load_kwargs}
    settings, _ = config_class.get_config_dict(path, **of_hub)
    decoder = settings.get("backbone_config") or {}
    reference = (decoder.get("auto_map") or {}).get("AutoConfig")
    if reference is None:
        return load_kwargs
    decoder = get_class_from_dynamic_module(reference, path, **of_hub).from_dict(decoder)
    decoder._name_or_path = os.fspath(path)
    return {**load_kwargs, "config": config_class.from_dict({**settings, "backbone_config": decoder})}


def save_code(decoder: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Copy the files that define a decoder and its config into a folder, and name their classes in the config.

    Nothing is done for a decoder of transformers' own. Call this before the config is written.
    """
    if not _is_remote(decoder):
        return
    os.makedirs(folder, exist_ok=True)
    named = {}
    for name, thing in (("AutoConfig", decoder.config), ("AutoModel", decoder)):
        custom_object_save(thing, folder)
        named[name] = f"{type(thing).__module__.split('.')[-1]}.{type(thing).__name__}"
    decoder.config.auto_map = named


def _is_remote(thing: PreTrainedModel | PretrainedConfig) -> bool:
    return type(thing).__module__.split(".")[0] == _MODULES


def _loader_of(path, load_kwargs: dict):
    """`AutoModel`, or the class with a language-model head, where the code that comes with the weights has no other."""
    if not load_kwargs.get("trust_remote_code"):
        return AutoModel
    of_hub = {name: load_kwargs[name] for name in _OF_HUB if name in load_kwargs}
    settings, _ = PretrainedConfig.get_config_dict(path, **of_hub)
    classes = settings.get("auto_map") or {}
    return AutoModelForCausalLM if "AutoModelForCausalLM" in classes and "AutoModel" not in classes else AutoModel
