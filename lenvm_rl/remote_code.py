"""Decoders whose code comes with their weights ("remote code"): copied with a model that is saved, run when asked for.

transformers keeps such classes in modules of their own (`transformers_modules`). Whoever loads a policy with
`trust_remote_code=True` has them in the process; a value model made from that policy uses the same classes, and its
folder holds the files that define them. Read again, they are run with `trust_remote_code=True` and else not.
"""

import os

from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module

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
