"""A length value model's decoder: loaded from a folder or the hub, or copied from a model, and checked."""

import copy
import inspect
import itertools
import logging
import os

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.initialization import no_init_weights

from lenvm_rl.tokenization import tokenizer_fingerprint

logger = logging.getLogger(__name__)

# What decoders call their cache: since transformers 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")
_TRAINED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_model(loader, path, *args, **kwargs):
    """`loader(path, …)`, with an error that says first whether the path was taken for a folder or for a hub id.

    Args:
        loader (`Callable`):
            Some `from_pretrained`.
        path (`str` or `os.PathLike`):
            A folder (`~` is the home folder) or a hub id (`name` or `owner/name`).

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


def load_decoder(path, dtype, **load_kwargs) -> PreTrainedModel:
    """The decoder of the model at a path, every weight of it and no language-model head. Only safetensors are loaded.

    Args:
        path (`str` or `os.PathLike`):
            A folder or a hub id.
        dtype (`str` or `torch.dtype`):
            Dtype of the weights.
        load_kwargs:
            Further arguments of `AutoModel.from_pretrained`.

    Raises:
        `FileNotFoundError`: see [`load_model`].
        `ValueError`: see [`check_decoder`]; or weights are missing, which would be random without a word in the
            result.
    """
    settings = {"use_safetensors": True, "dtype": dtype, **load_kwargs, "output_loading_info": True}
    loader = load_model(loader_of, path, load_kwargs)
    model, info = load_model(loader.from_pretrained, path, **settings)
    check_decoder(model)
    decoder = model.base_model
    missing = list(info["missing_keys"])
    tied = decoder.config.get_text_config(decoder=True).tie_word_embeddings
    if tied and "lm_head.weight" in info["unexpected_keys"] and missing == _embedding_names(decoder):
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


def _embedding_names(decoder) -> list[str]:
    weight = decoder.get_input_embeddings().weight
    return [name for name, parameter in decoder.named_parameters() if parameter is weight]


def copy_decoder(model, dtype, loadable: bool = True) -> PreTrainedModel:
    """A decoder with the weights of a model's: nothing shared, and none of the original's hooks, flags or freezing.

    Args:
        model (`PreTrainedModel`):
            A causal language model or a bare decoder.
        dtype (`str` or `torch.dtype`):
            Dtype of the copy.
        loadable (`bool`, *optional*, defaults to `True`):
            Whether a copy that could be saved but not loaded, since `AutoModel` would make another class from the
            decoder's config, is an error or only worth a warning.

    Raises:
        `ValueError`: see [`check_decoder`]; or the copy could not be loaded.
    """
    check_decoder(model)
    decoder = model.base_model
    check_class(decoder, loadable)
    config = copy.deepcopy(decoder.config)
    # What was read from a quantised file is plain by now; what still is quantised has been refused.
    vars(config).pop("quantization_config", None)
    # Every weight is written over, so drawing random ones would only cost time and the caller's random state.
    with no_init_weights():
        copied = type(decoder)._from_config(config, dtype=dtype)
    copied.load_state_dict(decoder.state_dict())
    return copied.to(decoder.device).eval()


def check_class(decoder, loadable: bool = True) -> None:
    """Whether a decoder of this class can be loaded: `AutoModel` makes it of its config, or its code is saved with it.

    Arguments and error as in [`copy_decoder`].
    """
    known = MODEL_MAPPING.get(type(decoder.config), None)
    classes = known if isinstance(known, tuple) else (known,)
    if is_remote(decoder) or type(decoder) in classes:
        return
    problem = (
        f"The decoder is a {type(decoder).__name__}, but `AutoModel` makes "
        f"{'nothing' if known is None else f'a {classes[0].__name__}'} from its config, so a copy could not be loaded "
        "again: give a model of a class that `AutoModel` knows, or make it known (`AutoConfig.register`, "
        "`AutoModel.register`)."
    )
    if loadable:
        raise ValueError(problem)
    logger.warning(problem)


def check_decoder(model, adapters=False) -> None:
    """Raise unless a length value model can be built on the model.

    Args:
        model (`Any`):
            What is hoped to be a model of transformers.
        adapters (`bool`, *optional*, defaults to `False`):
            Whether its layers may carry adapters.

    Raises:
        `ValueError`: the model is not a plain model of transformers (wrapped, or with adapters), is a length value
            model already, or is an encoder-decoder.
    """
    plain = isinstance(model, PreTrainedModel)
    if not plain or (not adapters and any(isinstance(module, BaseTunerLayer) for module in model.modules())):
        raise ValueError(
            f"A length value model is built on a plain model of transformers; this is a {type(model).__name__}, "
            "wrapped or with adapters: unwrap it (`accelerator.unwrap_model`), merge its adapters (`merge_and_unload`)."
        )
    if is_quantized(model):
        raise ValueError(
            f"The weights of this {type(model).__name__} are quantised, and a model that learns cannot start from "
            "them: give one that is not."
        )
    if model.config.model_type == "length_value":
        raise ValueError("This is a length value model already: load it with `LengthValueModel.from_pretrained`.")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; a length value model needs a causal decoder.")


def is_quantized(model) -> bool:
    """Whether weights are held in fewer bits than torch can train (those that were read from GGUF are plain again)."""
    if any(weight.dtype not in _TRAINED_DTYPES for weight in model.parameters()):
        return True
    # As transformers marks what it has quantised, and as TRL asks.
    marks = ("is_loaded_in_4bit", "is_loaded_in_8bit")
    return getattr(model, "quantization_method", "gguf") != "gguf" or any(getattr(model, m, False) for m in marks)


def check_tokenizer_fits(tokenizer, decoder) -> None:
    """Raise unless the decoder can read what the tokenizer writes.

    Raises:
        `ValueError`: the tokenizer has ids that the decoder does not embed: see [`check_embeds`], ordinary tokens
            included.
    """
    check_embeds(tokenizer, decoder, "the model", ordinary=True)


def fitting_fingerprint(tokenizer, decoder) -> dict | None:
    """The fingerprint of a tokenizer that fits a decoder ([`check_tokenizer_fits`]); none of none."""
    if tokenizer is None:
        return None
    check_tokenizer_fits(tokenizer, decoder)
    return tokenizer_fingerprint(tokenizer)


RESIZE = "give the model's own tokenizer, or add rows with `model.resize_token_embeddings(len(tokenizer))`"


def check_embeds(
    tokenizer, model, what: str, ordinary: bool = False, padding: bool = True, remedy: str = RESIZE
) -> None:
    """Raise unless a model embeds the tokens that it will read, where they go beyond its table in a bare `IndexError`.

    Other tokens beyond the table are only warned of: some models come with tokens that stand for pictures and are
    never embedded.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): what writes the ids.
        model (`PreTrainedModel` or `peft.PeftModel`): what reads them.
        what (`str`): what the error calls the model, such as `"the policy"`.
        ordinary (`bool`, *optional*, defaults to `False`): whether it reads all tokens but those that were added as
            special ones. The end of sequence and what the chat template writes are read in any case.
        padding (`bool`, *optional*, defaults to `True`): whether it reads the pad token.
        remedy (`str`, *optional*): what to change.

    Raises:
        `ValueError`: names the tokens and what to change.
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


def embedding_rows(model) -> int | None:
    """Rows of the table that a model looks ids up in; `None` where it has no such table."""
    table = model.get_input_embeddings()
    while isinstance(table, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        table = table.get_base_layer() if isinstance(table, BaseTunerLayer) else table.original_module
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


@torch.no_grad()
def check_causal(decoder) -> None:
    """Raise if a token's hidden state depends on the tokens after it, as in encoders: it would tell the length.

    One short forward says so, whatever the config does. It is left out where the weights are not all here (on the
    device "meta", or held in parts by DeepSpeed).

    Raises:
        `ValueError`: see above.
    """
    weights = list(decoder.parameters())
    if any(weight.is_meta or not weight.numel() for weight in weights):
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
    hidden = (
        decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state[:, 0].float()
    )
    for module, training in modes:
        module.training = training
    # Equal but for rounding; an encoder with random weights of the usual size differs by 0.003 and more.
    if float((hidden[0] - hidden[1]).norm()) > 1e-3 * float(hidden[0].norm()):
        raise ValueError(
            f"In {type(decoder).__name__}, a token sees the tokens after it (a bidirectional encoder), so its state "
            "would tell how long the completion is: a length value model needs a causal decoder. Give one, or set what "
            "makes this one causal in its config (`is_decoder=True`, `use_bidirectional_attention=False`, …)."
        )


def cache_keyword(decoder, cache) -> dict:
    """A cache of the tokens before, by the name that the decoder's forward has for it; nothing where there is none.

    Raises:
        `ValueError`: the decoder takes no cache, or see [`check_cache`].
    """
    if cache is None:
        return {}
    check_cache(decoder, cache)
    taken = inspect.signature(decoder.forward).parameters
    name = next((name for name in CACHE_NAMES if name in taken), None)
    if name is None:
        raise ValueError(f"{type(decoder).__name__} takes no `past_key_values`: give it whole sequences.")
    return {name: cache}


def cache_of(decoder, outputs):
    """The cache of keys and values in what the decoder returned, `use_cache=True` being given.

    Raises:
        `ValueError`: the decoder keeps no such cache, or more than that.
    """
    # Asked for by the old name, outputs that know the new one would warn.
    returned = set(outputs)
    name = next((name for name in CACHE_NAMES if name in returned), None)
    cache = None if name is None else outputs[name]
    check_cache(decoder, cache)
    return cache


def check_cache(decoder, cache) -> None:
    """Raise unless a cache holds keys and values and nothing else.

    A recurrent state, or the cache of a model's own, cannot be taken for granted: several decoders go on from theirs
    with other values than those of the whole sequence, and without a word.

    Args:
        decoder (`PreTrainedModel`): whose cache it is, for the message.
        cache (`Any`): what the decoder returned or is to be given.

    Raises:
        `ValueError`: see above.
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


def decoder_config_from_dict(settings: dict) -> PretrainedConfig:
    """A decoder's config from its JSON form; a [`~lenvm_rl.modeling.backbones.CodelessConfig`] if its class is not at
    hand.

    Raises:
        `ValueError`: it names no model type, or one that transformers does not know.
    """
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


_MODULES = "transformers_modules"
_OF_HUB = ("revision", "token", "cache_dir", "local_files_only")


def is_remote(thing: PreTrainedModel | PretrainedConfig) -> bool:
    """Whether the class of a model or of a config comes from such a module."""
    return type(thing).__module__.split(".")[0] == _MODULES


class CodelessConfig(PretrainedConfig):
    """The settings of a decoder whose code was not asked for: to be read, and not to be made a decoder of."""


def save_code(decoder: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Copy the files that define a decoder and its config into a folder, and name their classes in the config.

    Args:
        decoder (`PreTrainedModel`): nothing is done for one of transformers' own.
        folder (`str` or `os.PathLike`): where its model is saved; call this before the config is written.
    """
    if not is_remote(decoder):
        return
    os.makedirs(folder, exist_ok=True)
    named = {}
    for name, thing in (("AutoConfig", decoder.config), ("AutoModel", decoder)):
        custom_object_save(thing, folder)
        named[name] = f"{type(thing).__module__.split('.')[-1]}.{type(thing).__name__}"
    decoder.config.auto_map = named


def with_code(config_class, path: str | os.PathLike, load_kwargs: dict) -> dict:
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


def decoder_from_config(config: PretrainedConfig) -> PreTrainedModel:
    """A decoder with random weights.

    Raises:
        `ValueError`: its code was not asked for.
    """
    if isinstance(config, CodelessConfig):
        raise ValueError(
            f"The decoder (model type '{config.model_type}') is none of transformers' own; its code "
            "lies beside its weights and runs on this machine when it is loaded. If you trust it, load the model with "
            "`trust_remote_code=True` (in a run, set it in `args`)."
        )
    if not is_remote(config):
        return AutoModel.from_config(config)
    model_class = get_class_from_dynamic_module(config.auto_map["AutoModel"], config._name_or_path)
    return model_class._from_config(config)


def loader_of(path: str | os.PathLike, load_kwargs: dict):
    """Which class of transformers loads a decoder: `AutoModel`, or the one with a language-model head, where the code
    that comes with the weights has no other.

    Args:
        path (`str` or `os.PathLike`): folder or hub id.
        load_kwargs (`dict`): of `from_pretrained`.
    """
    if not load_kwargs.get("trust_remote_code"):
        return AutoModel
    settings, _ = PretrainedConfig.get_config_dict(
        path, **{name: load_kwargs[name] for name in _OF_HUB if name in load_kwargs}
    )
    classes = settings.get("auto_map") or {}
    return AutoModelForCausalLM if "AutoModelForCausalLM" in classes and "AutoModel" not in classes else AutoModel


_STRETCHED = ("dynamic", "yarn")
_REACHES = ("window", "chunk", "block", "local", "span")


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
