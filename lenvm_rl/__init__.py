"""A pretrained length value model as frozen critic and as shaping term for PPO and GRPO in TRL.

The public names stand at the top: `lenvm_rl.gae`, `lenvm_rl.LengthValueModel`, `lenvm_rl.LenVMPPOTrainer`, …; so do the
modules, as `lenvm_rl.returns`. Each is imported when it is first used, so that `import lenvm_rl` costs nothing, the
mathematics needs torch alone, and only trainers and programs need TRL.
"""

import importlib
import pkgutil

__version__ = "0.1.0"

_NAMES_OF_MODULE = {
    "returns": (
        "discounted_return",
        "fit_gamma",
        "horizon_shift",
        "logits_from_remaining",
        "remaining_from_logits",
        "remaining_from_value",
        "td_residual",
    ),
    "advantages": ("combine", "gae", "length_advantage"),
    "shaping": ("potential_shaping",),
    "tokenization": ("check_same_tokenizer", "load_prompts", "tokenizer_fingerprint"),
    "modeling": ("LengthValueConfig", "LengthValueModel", "load_released_checkpoint"),
    "rollouts": (
        "RolloutMetadata",
        "SamplingSettings",
        "ServerJob",
        "TransformersJob",
        "VLLMJob",
        "import_completions",
        "read_rollouts",
        "sample_rollouts",
        "sample_to_file",
        "split_by_prompt",
        "write_rollouts",
    ),
    "pretraining": (
        "LengthValueCollator",
        "LengthValueTrainer",
        "LengthValueTrainingArguments",
        "length_value_metrics",
        "pretrain",
    ),
    "decoding": (
        "GuidanceReport",
        "LengthGuidance",
        "LengthGuidedLogitsProcessor",
        "generate_guided",
        "mean_length_at",
    ),
    "prediction": ("LengthQuantiles", "length_aware_batches", "padding_steps", "predict_length", "predict_remaining"),
    "controllers": ("FloorController", "TargetController", "calibrate_strength"),
    "trainers": ("LenVMGRPOConfig", "LenVMGRPOTrainer", "LenVMPPOConfig", "LenVMPPOTrainer"),
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}
_MODULES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))

__all__ = ["__version__", *sorted(_MODULE_OF_NAME)]


def __getattr__(name):
    """Imports a public name, or a module of this package, at its first use (PEP 562)."""
    if name in _MODULE_OF_NAME:
        module = importlib.import_module(f"{__name__}.{_MODULE_OF_NAME[name]}")
        value = getattr(module, name)
        # Found without this function from now on.
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__, *_MODULES})
