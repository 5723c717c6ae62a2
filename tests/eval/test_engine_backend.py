"""Arms that vLLM samples, by a stand-in for the module: what is asked of it, what comes of it, and broken runs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scripted_engine import scripted_vllm, written
from tiny import EOS, tiny_length_value_model, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from eval.engine import PROCESSOR, EngineRequest, GuidedEngine, whole_model
from eval.length_control.__main__ import LengthControlArguments
from eval.length_control.__main__ import main as compare_lengths
from eval.tradeoff.__main__ import main as compare_arms
from eval.tradeoff.arms import TradeoffArguments
from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.decoding.requests import guidance_of_request
from lenvm_rl.modeling.loading import load_policy, load_tokenizer


@pytest.fixture
def engine(monkeypatch):
    module, record = scripted_vllm()
    monkeypatch.setitem(sys.modules, "vllm", module)
    return record


@pytest.fixture
def models(tmp_path):
    tokenizer = tiny_tokenizer(chat=True)
    tiny_llama().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    tiny_length_value_model(tokenizer=tokenizer).save_pretrained(tmp_path / "lenvm")
    return {"policy": str(tmp_path / "policy"), "length_value_model": str(tmp_path / "lenvm")}


def test_requests_carry_their_guidance_and_come_back_by_number(engine):
    asked = GuidedEngine("p", "v", "b", 64, 3, "bfloat16", "float32", {"max_num_seqs": 5, "seed": 2})
    plain = LengthGuidance(temperature=0.7, top_k=15)
    goal = LengthGuidance(mode="equal_to", target_length=4, temperature=0.7, top_k=15, rule="patient")
    requests = [EngineRequest([7 + n], guidance, 9, 2**31 + n) for n, guidance in enumerate((plain, goal))]
    found = dict(asked.complete(requests, [EOS]))
    assert list(found) == [1, 0] and len(found[1]) == 5 and found[1][-1] == EOS
    [settings] = engine.engines
    assert (settings["model"], settings["dtype"], settings["max_model_len"]) == ("p", "bfloat16", 64)
    # What is given goes before what the engine would take.
    assert (settings["max_num_seqs"], settings["seed"], settings["logits_processors"]) == (5, 2, [PROCESSOR])
    assert settings["additional_config"] == {
        "length_value_model": "v", "length_value_base": "b", "length_value_dtype": "float32",
    }  # fmt: skip
    (_, second), (_, first) = engine.ended
    assert [params.seed for params in (first, second)] == [0, 1]
    # Not guided is strength 0: the processor applies the one candidate rule.
    assert [guidance_of_request(params.extra_args, 0.7) for params in (first, second)] == [plain, goal]
    assert list(asked.complete([], [EOS])) == [] and len(engine.engines) == 1


def test_adapters_are_served_merged_into_their_base(models, tmp_path):
    policy = load_policy(models["policy"])
    adapted = get_peft_model(policy, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapters")
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / "adapters")
    ids = torch.arange(6, 12)[None]
    with torch.no_grad(), whole_model(str(tmp_path / "adapters")) as folder:
        merged = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert torch.allclose(merged, adapted(ids).logits, atol=1e-5)
        assert not torch.allclose(merged, load_policy(models["policy"])(ids).logits, atol=1e-2)
        assert load_tokenizer(folder).chat_template == tiny_tokenizer(chat=True).chat_template
    assert not Path(folder).exists()
    with whole_model(models["policy"]) as folder:
        assert folder == models["policy"]


def control(tmp_path, models, **changes):
    tasks = [
        {
            "id": n,
            "category": "create",
            "lang": "en",
            "task": f"w{7 + n} w8. Answer in {{word_count}} {{word_count_type}}.",
        }
        for n in range(3)
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks))
    given = {
        "dataset_name": str(tmp_path / "tasks.jsonl"),
        "backend": "vllm",
        "targets": [4, 8],
        "modes": ["equal_to", "at_least"],
        "cap_extra": 6,
        "output_dir": str(tmp_path / "out"),
    }
    return compare_lengths(LengthControlArguments(**{**models, **given, **changes}))


def test_length_control_asks_for_all_cells_together(engine, models, tmp_path):
    report = control(tmp_path, models, rule="patient")
    assert len(engine.engines) == 1 and len(engine.ended) == 3 + 3 * (3 * 2 * 2)
    asked = [guidance_of_request(params.extra_args, 1.0, params.max_tokens) for _, params in engine.ended]
    assert {(one.mode, one.target_length, one.rule) for one in asked} == {
        ("tilt", None, None), ("equal_to", 4, "patient"), ("equal_to", 8, "patient"),
        ("at_least", 4, "feasible"), ("at_least", 8, "feasible"),
    }  # fmt: skip
    # Those with the most room begin; the stand-in ends the last one first.
    rooms = [params.max_tokens for _, params in engine.ended]
    assert rooms == sorted(rooms) and set(rooms) == {10, 16}
    cells = {(row["arm"], row["mode"], row["target"]): row for row in report["cells"]}
    for arm in ("guided", "guided+prompt"):
        assert cells[arm, "equal_to", "all"]["length_score"]["estimate"] == 100
        assert cells[arm, "equal_to", 8]["perplexity"]["estimate"] > 1
    assert cells["base", "equal_to", 4]["completions"] == 3
    assert json.loads((tmp_path / "out" / "length_control.json").read_text())["arguments"]["backend"] == "vllm"


def test_a_broken_run_goes_on_and_ends_as_an_unbroken_one(engine, models, tmp_path, monkeypatch):
    whole = control(tmp_path, models)
    monkeypatch.setattr("eval.length_control.sampler.SCORED_COMPLETIONS", 4)
    engine.ended.clear()
    engine.dies_after = 11
    with pytest.raises(RuntimeError, match="out of memory"):
        control(tmp_path, models, output_dir=str(tmp_path / "broken"))
    engine.ended.clear()
    engine.dies_after = None
    again = control(tmp_path, models, output_dir=str(tmp_path / "broken"))
    # Two times four were kept.
    assert len(engine.ended) == 39 - 8 and again["cells"] == whole["cells"]
    engines = len(engine.engines)
    assert control(tmp_path, models, output_dir=str(tmp_path / "broken"))["cells"] == whole["cells"]
    assert len(engine.engines) == engines
    with pytest.raises(ValueError, match="other prompts or settings"):
        control(tmp_path, models, output_dir=str(tmp_path / "broken"), dtype="bfloat16")


def test_the_tradeoff_is_sampled_arm_by_arm_and_kept(engine, models, tmp_path):
    rows = [{"question": f"w{7 + n} w{8 + n}", "answer": str(n)} for n in range(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = TradeoffArguments(
        **models,
        task="gsm8k",
        dataset_name=str(tmp_path / "test.jsonl"),
        backend="vllm",
        num_samples=4,
        max_new_tokens=8,
        strengths=[1.0],
        budget_quantiles=[0.5],
        output_dir=str(tmp_path / "out"),
    )
    found = {row["name"]: row for row in compare_arms(args)}
    assert list(found) == ["base", "cut at q0.5", "asked for q0.5", "shortest of 2", "shortest of 4", "tilt +1"]
    assert len(engine.ended) == 3 * 16 and len(engine.engines) == 1
    assert found["tilt +1"]["tokens"]["estimate"] < 0.5 * found["base"]["tokens"]["estimate"]
    # A processor hands nothing back, so of what an engine samples only the base's own divergence is known.
    assert {name: row["kl"] for name, row in found.items() if row["kl"] is not None} == {
        "base": {"estimate": 0.0, "low": 0.0, "high": 0.0}
    }
    lengths = [sum(token != EOS for token in written(*each)) for each in engine.ended[:16]]
    assert found["base"]["tokens"]["estimate"] == pytest.approx(np.mean(lengths))
    assert {row["name"]: row for row in compare_arms(args)} == found and len(engine.ended) == 3 * 16


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        (LengthControlArguments, {"arms": ["enforced"]}, "arms"),
        (LengthControlArguments, {"top_k": 0}, "top_k"),
        (LengthControlArguments, {"backend": "sglang"}, "backend"),
        (LengthControlArguments, {"engine_arguments": "3"}, "engine_arguments"),
        (LengthControlArguments, {"engine_arguments": "{"}, "engine_arguments"),
        (TradeoffArguments, {"trained": ["ours=path"]}, "trained"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(kind, fields, named):
    with pytest.raises(ValueError, match=named):
        kind(**{"dataset_name": "tasks.jsonl", "backend": "vllm", **fields})
