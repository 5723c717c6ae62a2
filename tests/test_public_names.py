"""The public face: names that other work builds on, from `lenvm_rl` and from their modules, with their arguments."""

import importlib
import inspect

import pytest

import lenvm_rl

# Module, name, and the arguments that are promised, in order; after "*" by keyword.
NAMES = {
    "returns.discounted_return": "remaining gamma",
    "returns.remaining_from_logits": "logits gamma",
    "returns.logits_from_remaining": "remaining gamma",
    "returns.remaining_from_value": "value gamma",
    "returns.fit_gamma": "lengths quantile=0.99 coverage=0.99",
    "returns.td_residual": "values mask gamma bootstrap=None",
    "returns.horizon_shift": "values mask gamma bootstrap=None",
    "advantages.gae": "rewards values mask gamma lam bootstrap=None action_mask=None",
    "advantages.length_advantage": "values mask gamma lam=1.0 bootstrap=None action_mask=None",
    "advantages.combine": "task length mask coef gate=None",
    "shaping.potential_shaping": "potential mask gamma bootstrap=None",
    "decoding.LengthGuidance": "mode='tilt' strength=0.0 target_length=None",
    "decoding.LengthGuidedLogitsProcessor": "length_value_model guidance",
    "decoding.generate_guided": "model length_value_model inputs guidance",
    "prediction.predict_length": "length_value_model tokenizer prompts",
    "trainers.LenVMGRPOConfig": "",
    "trainers.LenVMPPOConfig": "",
    "trainers.LenVMGRPOTrainer": "model reward_funcs args",
    "trainers.LenVMPPOTrainer": "model reward_funcs args",
    "modeling.LengthValueModel": "config",
}


@pytest.mark.parametrize("path", NAMES)
def test_a_public_name_is_found_at_the_top_and_in_its_module(path):
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(f"lenvm_rl.{module}"), name)
    assert getattr(lenvm_rl, name) is found and name in lenvm_rl.__all__


@pytest.mark.parametrize("path", [path for path, arguments in NAMES.items() if arguments])
def test_it_takes_its_arguments_in_their_order(path):
    signature = inspect.signature(getattr(lenvm_rl, path.rpartition(".")[2]))
    found = [
        name if parameter.default in (inspect.Parameter.empty, None) else f"{name}={parameter.default!r}"
        for name, parameter in signature.parameters.items()
    ]
    promised = NAMES[path].replace("=None", "").split()
    assert found[: len(promised)] == promised


def test_guidance_has_its_fields():
    fields = set(inspect.signature(lenvm_rl.LengthGuidance).parameters)
    assert fields >= {
        "mode", "strength", "target_length", "rule", "tolerance", "temperature", "top_k", "top_p", "min_p", "enforce",
    }  # fmt: skip


@pytest.mark.parametrize("trainer", ["LenVMGRPOTrainer", "LenVMPPOTrainer"])
def test_trainers_take_the_length_value_model_by_keyword(trainer):
    parameters = inspect.signature(getattr(lenvm_rl, trainer)).parameters
    assert parameters["length_value_model"].default is None
    assert ("critic" in parameters) == (trainer == "LenVMPPOTrainer")


def test_a_length_value_model_is_made_read_and_written():
    model = lenvm_rl.LengthValueModel
    made = inspect.signature(model.from_backbone).parameters
    assert list(made)[0] == "model_or_path" and made["form"].default == "full" and "gamma" in made
    assert callable(model.from_pretrained) and callable(model.save_pretrained)
