"""Three forms of one model: what is shared stays bit for bit as it was, and what is one's own is saved and learns."""

import copy
import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import assert_same_logits, assert_same_weights, tiny_llama, tiny_qwen2, tiny_qwen3, tokens
from torch import nn
from transformers import AutoConfig, AutoModel, LlamaForCausalLM

from lenvm_rl.modeling.completions import completion_logits
from lenvm_rl.modeling.length_value_model import LengthValueConfig, LengthValueModel
from lenvm_rl.modeling.sharing import lora_settings

SHARED = ["adapter", "head"]
GAMMA = 0.9


def make_policy(base=None, **changes):
    """A policy with a LoRA adapter of its own that does something."""
    settings = {"target_modules": ["q_proj", "up_proj"], "r": 2, "init_lora_weights": False, **changes}
    return get_peft_model(tiny_llama() if base is None else base, LoraConfig(**settings)).eval()


def make_model(form, base, **changes):
    """A length value model whose head and adapter, if any, say something; `changes` for `from_backbone`."""
    model = LengthValueModel.from_backbone(base, gamma=GAMMA, form=form, **changes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model


def weights_of(module):
    return {name: weight.clone() for name, weight in module.state_dict().items()}


def assert_unchanged(module, before):
    after = module.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


# ---- what they compute


def test_a_head_alone_reads_the_last_hidden_state_of_the_base():
    base = tiny_llama()
    model = make_model("head", base)
    ids, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    full = LengthValueModel.from_backbone(base, gamma=GAMMA)
    full.head.load_state_dict(model.head.state_dict())
    assert torch.equal(model(ids, attention_mask=mask).values, full(ids, attention_mask=mask).values)
    assert model.backbone is base.model and model.get_input_embeddings() is base.model.embed_tokens
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"head"}


def test_a_head_alone_rides_on_a_forward_of_the_reference():
    base = tiny_llama()
    model = make_model("head", base)
    ids = tokens(2, 6)
    hidden = base(ids, output_hidden_states=True).hidden_states[-1]
    riding = model.from_hidden_states(hidden)
    assert torch.equal(riding.logits, model(ids).logits) and torch.equal(riding.values, -riding.logits.sigmoid())
    riding.values.sum().backward()
    assert model.head.output.weight.grad is not None and base.model.embed_tokens.weight.grad is None
    for form in ("full", "adapter"):
        with pytest.raises(ValueError, match=f"form='{form}'"):
            LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA, form=form).from_hidden_states(hidden)


def test_an_adapter_is_a_low_rank_update_of_the_base():
    """`W + (alpha / r) B A` in each layer, written into a full model, gives the same logits."""
    base = tiny_qwen2()
    model = make_model("adapter", base, lora={"r": 2, "lora_alpha": 6, "target_modules": ["v_proj", "down_proj"]})
    full = LengthValueModel.from_backbone(tiny_qwen2(), gamma=GAMMA)
    full.head.load_state_dict(model.head.state_dict())
    weights = model.state_dict()
    for path in {name.rpartition(".lora_")[0] for name in weights if name.startswith("adapter.")}:
        update = weights[f"{path}.lora_B.weight"] @ weights[f"{path}.lora_A.weight"]
        with torch.no_grad():
            full.backbone.get_submodule(path.removeprefix("adapter.")).weight.add_(3 * update)
    ids, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    ours, theirs = (each(ids, attention_mask=mask).logits[mask.bool()] for each in (model, full))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - make_model("head", tiny_qwen2())(ids, attention_mask=mask).logits[mask.bool()]).abs().max() > 0.1


def test_a_new_adapter_changes_nothing_yet():
    base = tiny_llama()
    hidden = base.model(tokens(2, 6)).last_hidden_state
    model = LengthValueModel.from_backbone(base, gamma=GAMMA, form="adapter")
    assert torch.equal(model(tokens(2, 6)).logits, model.head(hidden))


@pytest.mark.parametrize("form", SHARED)
def test_the_cache_and_the_completions_work_as_in_the_full_form(form):
    model = make_model(form, tiny_llama())
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    start = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
    rest = model(ids[:, 5:], attention_mask=mask, past_key_values=start.past_key_values)
    whole = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(torch.cat([start.logits, rest.logits], 1)[:, 3:], whole[:, 3:], rtol=0, atol=1e-5)
    read = completion_logits(model, ids[:, :5], mask[:, :5], ids[:, 5:], mask[:, 5:])
    torch.testing.assert_close(read, whole[:, 4:], rtol=0, atol=1e-5)


# ---- the owner of the base notices nothing


@pytest.mark.parametrize("form", SHARED)
@pytest.mark.parametrize("order", ["policy first", "policy later"])
def test_a_policy_with_its_own_adapter_is_unaffected(form, order):
    ids, base = tokens(2, 6), tiny_llama()
    expected = make_policy(copy.deepcopy(base))
    reference = base(ids).logits
    if order == "policy first":
        policy = make_policy(base)
        model = make_model(form, policy)
    else:
        model = make_model(form, base)
        assert torch.equal(base(ids).logits, reference)
        policy = make_policy(base)
    with torch.no_grad():
        for name, weight in expected.named_parameters():
            if "lora_" in name:
                weight.copy_(policy.get_parameter(name))
    plain = make_model(form, copy.deepcopy(tiny_llama()))
    plain.load_state_dict(model.state_dict())
    for _ in range(2):
        assert torch.equal(policy(ids).logits, expected(ids).logits)
        with policy.disable_adapter():
            assert torch.equal(policy(ids).logits, reference)
            assert torch.equal(model(ids).logits, plain(ids).logits)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)
    assert (policy(ids).logits - reference).abs().max() > 0.1
    assert policy.active_adapters == ["default"] and list(policy.peft_config) == ["default"]


@pytest.mark.parametrize("form", SHARED)
def test_a_policy_learns_as_if_it_were_alone(form, tmp_path):
    """Modes, trainable weights, gradients, checkpointing and what is saved are as in a policy without a critic."""
    runs = []
    for shared in (False, True):
        torch.manual_seed(0)
        policy = make_policy().train()
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()
        trainable = [name for name, weight in policy.named_parameters() if weight.requires_grad]
        modes = {name: module.training for name, module in policy.named_modules()}
        if shared:
            model = make_model(form, policy).freeze()
        logits = policy(tokens(2, 6)).logits
        if shared:
            assert not model(tokens(2, 6)).values.requires_grad
            assert [n for n, w in policy.named_parameters() if w.requires_grad] == trainable
            assert {name: policy.get_submodule(name).training for name in modes} == modes
        logits.square().mean().backward()
        policy.save_pretrained(tmp_path / str(shared))
        runs.append((logits, {n: policy.get_parameter(n).grad for n in trainable}))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1].keys() == runs[1][1].keys()
    assert all(torch.equal(gradient, runs[1][1][name]) for name, gradient in runs[0][1].items())
    saved = [load_file(tmp_path / str(shared) / "adapter_model.safetensors") for shared in (False, True)]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


@pytest.mark.parametrize("form", SHARED)
def test_nothing_done_to_the_model_is_done_to_its_base(form):
    base = tiny_llama().train()
    before = weights_of(base)
    model = make_model(form, base)
    model.to(torch.bfloat16).freeze().eval()
    parent = nn.ModuleDict({"critic": model}).half().eval()
    assert all(module.training for module in base.modules())
    assert all(weight.requires_grad for weight in base.parameters())
    assert {weight.dtype for weight in parent.parameters()} == {torch.float32}
    assert base.state_dict().keys() == before.keys() and not hasattr(base, "peft_config")
    assert_unchanged(base, before)


def test_dropout_of_the_base_and_of_a_frozen_adapter_is_off_whatever_mode_the_owner_is_in():
    policy = make_policy(tiny_llama(attention_dropout=0.5), lora_dropout=0.5)
    for form in SHARED:
        lora = {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.5} if form == "adapter" else None
        model = make_model(form, policy, lora=lora)
        ids = tokens(2, 6)
        quiet = model(ids).logits
        policy.train()
        assert torch.equal(model(ids).logits, quiet)
        model.train()
        assert torch.equal(model(ids).logits, quiet) == (form == "head"), "its own dropout is on while it is trained"
        model.freeze()
        policy.train()
        assert torch.equal(model(ids).logits, quiet)


def test_a_forward_that_fails_leaves_the_base_as_it_was():
    policy = make_policy().train()
    model = make_model("adapter", policy)
    expected = policy(tokens(1, 4)).logits
    with pytest.raises(IndexError):
        model(torch.full((1, 4), 999))
    assert policy.training and torch.equal(policy(tokens(1, 4)).logits, expected)


def test_several_models_on_one_base_do_not_meet():
    base, ids = tiny_llama(), tokens(2, 6)
    models = [make_model("adapter", base) for _ in range(2)]
    alone = [make_model("adapter", tiny_llama()) for _ in range(2)]
    for model, other in zip(models, alone, strict=True):
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(ids).logits, other(ids).logits)
    assert not torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_a_base_that_is_not_what_it_was_is_refused():
    policy = make_policy()
    model = make_model("adapter", policy)
    policy.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(tokens(1, 3))
    policy.unmerge_adapter()
    model(tokens(1, 3))
    values = model(tokens(1, 3)).values
    plain = policy.unload()
    assert torch.equal(model(tokens(1, 3)).values, values)
    plain.model.layers[0].mlp.up_proj = nn.Linear(16, 32, bias=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="layers.0.mlp.up_proj"):
            model(tokens(1, 3))


# ---- saving and loading


@pytest.mark.parametrize("form", SHARED)
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_qwen3])
@pytest.mark.parametrize("source", ["live", "policy", "path"])
def test_a_saved_form_comes_back_bit_for_bit_on_its_base(form, make, source, tmp_path):
    model = make_model(form, make())
    model.save_pretrained(tmp_path / "lenvm")
    assert sorted(os.listdir(tmp_path / "lenvm")) == ["README.md", "config.json", "model.safetensors"]
    saved = load_file(tmp_path / "lenvm" / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == ({"head"} if form == "head" else {"head", "adapter"})
    make().save_pretrained(tmp_path / "base")
    base = {"live": make(), "policy": make(), "path": tmp_path / "base"}[source]
    given = make_policy(base) if source == "policy" else base
    for loader in (LengthValueModel, AutoModel):
        loaded = loader.from_pretrained(tmp_path / "lenvm", base=given)
        assert type(loaded) is LengthValueModel and not loaded.training and loaded.config.form == form
        assert source == "path" or loaded.backbone is base.model, "shared, not copied"
        assert_same_weights(model, loaded)
        assert_same_logits(model, loaded)
        assert all(weight.requires_grad for weight in loaded.parameters())


def test_an_adapter_on_a_base_in_bfloat16_is_float32_and_comes_back(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = make_model("adapter", base)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert base.model.embed_tokens.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "lenvm")
    for given, settings in ((base, {}), (tmp_path / "base", {"dtype": torch.bfloat16})):
        loaded = LengthValueModel.from_pretrained(tmp_path / "lenvm", base=given, **settings)
        assert loaded.backbone.dtype == torch.bfloat16
        assert_same_weights(model, loaded)
        assert_same_logits(model, loaded)


def test_the_config_knows_the_form_and_the_layers(tmp_path):
    lora = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.25, target_modules={"v_proj", "q_proj"}, use_rslora=True)
    model = make_model("adapter", tiny_llama(), lora=lora, generator="policy", sampling={"temperature": 0.7})
    expected = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.25, "target_modules": ["q_proj", "v_proj"]}
    assert model.config.lora == {**expected, "use_rslora": True}
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.form, config.lora, config.gamma) == ("adapter", model.config.lora, GAMMA)
    assert (config.generator, config.sampling) == ("policy", {"temperature": 0.7})
    assert json.loads((tmp_path / "config.json").read_text())["backbone_config"]["model_type"] == "llama"
    whole = LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA, form="adapter")
    layers = {name.rpartition(".lora_")[0] for name in whole.state_dict() if name.startswith("adapter.")}
    assert len(layers) == 2 * 7, "by default all linear layers"
    assert lora_settings() == {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def test_what_cannot_be_loaded_says_what_to_do(tmp_path):
    make_model("adapter", tiny_llama()).save_pretrained(tmp_path / "adapter")
    LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA).save_pretrained(tmp_path / "full")
    for loader in (LengthValueModel, AutoModel):
        with pytest.raises(ValueError, match=r"form='adapter' holds no decoder: give.*base=model_or_path"):
            loader.from_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match="form='full'.*`base`"):
            loader.from_pretrained(tmp_path / "full", base=tiny_llama())
    with pytest.raises(ValueError, match=r"another base than this one \(hidden_size 16 there and 32 here; inter"):
        LengthValueModel.from_pretrained(tmp_path / "adapter", base=tiny_llama(hidden=32))
    with pytest.raises(ValueError, match=r"\['dtype'\] say how to load a model, but a model to share was given"):
        LengthValueModel.from_pretrained(tmp_path / "adapter", base=tiny_llama(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="length value model already"):
        LengthValueModel.from_pretrained(tmp_path / "adapter", base=tmp_path / "full")
    with pytest.raises(FileNotFoundError, match="There is no model at"):
        LengthValueModel.from_pretrained(tmp_path / "adapter", base=tmp_path / "none")


def test_a_shared_form_without_gamma_does_not_load(tmp_path):
    for form in SHARED:
        model = make_model(form, tiny_llama())
        model.config.gamma = None
        model.save_pretrained(tmp_path / form)
        with pytest.raises(ValueError, match="gamma"):
            LengthValueModel.from_pretrained(tmp_path / form, base=tiny_llama())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "half"}, "form must be one of full, adapter, head, got 'half'"),
        ({"lora": {"r": 2}}, "settings of LoRA belong to form='adapter'"),
        ({"form": "head", "lora": {"r": 2}}, "settings of LoRA belong to form='adapter'"),
        ({"form": "adapter", "lora": {"modules_to_save": ["norm"]}}, "modules_to_save of LoRA would change a decoder"),
        ({"form": "adapter", "lora": {"bias": "all"}}, "bias of LoRA would change"),
        ({"form": "adapter", "lora": {"init_lora_weights": "pissa"}}, "init_lora_weights='pissa' of LoRA would change"),
        (
            {"form": "adapter", "lora": {"target_modules": ["embed_tokens"]}},
            "on linear layers only, and embed_tokens is none",
        ),
        ({"form": "head", "revision": "main"}, r"\['revision'\] say how to load"),
    ],
)
def test_what_cannot_be_shared_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LengthValueModel.from_backbone(tiny_llama(), gamma=GAMMA, **settings)


def test_a_base_with_adapters_is_shared_but_not_copied():
    policy = make_policy()
    with pytest.raises(ValueError, match="merge its adapters"):
        LengthValueModel.from_backbone(policy, gamma=GAMMA)
    with pytest.raises(ValueError, match="form="):
        LengthValueModel(LengthValueConfig(backbone_config=tiny_llama().config, gamma=GAMMA, form="head"))


# ---- pretraining


@pytest.mark.parametrize("form", SHARED)
def test_checkpointing_of_activations_is_refused(form):
    model = make_model(form, tiny_llama())
    with pytest.raises(ValueError, match="does not support"):
        model.gradient_checkpointing_enable()
