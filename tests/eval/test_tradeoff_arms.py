"""The further baselines of `eval.tradeoff`, its tasks, and the divergence from the base policy, by hand and exactly."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from places import DATA
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer
from transformers import HfArgumentParser, LogitsProcessorList

from eval.graded import read_run
from eval.tradeoff.__main__ import main
from eval.tradeoff.arms import TradeoffArguments, ask, measure_trained, shortest_of
from eval.tradeoff.sampler import Arm, DivergenceMeter, Sampler, policy_divergence, row_logits, token_divergence
from lenvm_rl.decoding.generation import LengthGuidance, LengthGuidedLogitsProcessor, generate_guided
from lenvm_rl.endings import strip_completion
from lenvm_rl.sandbox.scripted import EOS, START, ScriptedLengthValue, ScriptedPolicy, TokenChain, random_chain

MATH500 = DATA / "math500" / "math500_test.json"
GAMMA = 0.5


def graded_by_length(completion_ids, **columns):
    return [float(len(ids) % 2 == 0) for ids in completion_ids]


def coin_chain():
    """From `START`, the end or token 3 with equal chance; after token 3, the end."""
    transition = torch.zeros(4, 4)
    transition[START, EOS] = transition[START, 3] = 0.5
    transition[3, EOS] = 1.0
    return TokenChain(transition)


def metered(chain, strength, rows, max_new_tokens, **rule):
    """Completions of the tilted chain with their finish reasons and divergences."""
    guidance = LengthGuidance(strength=strength, **rule)
    value = ScriptedLengthValue.from_chain(chain, GAMMA)
    tilt = LengthGuidedLogitsProcessor(value, guidance, eos_token_id=EOS)
    meter = DivergenceMeter(tilt, guidance, [EOS])
    generated = ScriptedPolicy.from_chain(chain).generate(
        torch.full((rows, 1), START),
        attention_mask=torch.ones(rows, 1, dtype=torch.int64),
        do_sample=True,
        top_k=0,
        max_new_tokens=max_new_tokens,
        logits_processor=LogitsProcessorList([meter]),
    )
    # Padded to the longest of them.
    width = generated.shape[1] - 1
    return [strip_completion(row, [EOS], width)[0] for row in generated[:, 1:].tolist()], meter.total


def state_divergences(chain, strength):
    """Exact divergence of the next token of the tilted chain from that of the chain, in each state."""
    tilted = chain.tilted(strength, chain.value(GAMMA)).transition
    return torch.where(tilted > 0, tilted * (tilted / chain.transition).log(), 0.0).nansum(dim=1), tilted


def test_divergence_of_a_token_by_hand():
    p, q = torch.tensor([0.75, 0.25, 0.0]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    assert float(token_divergence(p, q)) == pytest.approx(0.75 * math.log(3))
    # Scores need not be normalised; what the first bars counts for nothing, and what the second bars alone is infinite.
    assert float(token_divergence(p + 7, q - 3)) == pytest.approx(0.75 * math.log(3))
    assert float(token_divergence(q, p)) == math.inf


def test_divergence_of_a_tilt_by_hand():
    # V is 0 at the end and -(1 - 1/2) after token 3, so the strength 2 log 3 makes the end three times as likely:
    # 3/4 and 1/4 instead of 1/2 each. After token 3 there is one candidate, whatever the tilt.
    completions, divergence = metered(coin_chain(), 2 * math.log(3), rows=400, max_new_tokens=4)
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert by_hand == pytest.approx(0.1308, abs=1e-4)
    torch.testing.assert_close(divergence, torch.full_like(divergence, by_hand), rtol=0, atol=1e-6)
    assert {tuple(row) for row in completions} == {(EOS,), (3, EOS)}
    assert np.mean([len(row) == 1 for row in completions]) == pytest.approx(0.75, abs=0.09)


@pytest.mark.parametrize("rule", [{"top_k": 2}, {"min_p": 0.5}, {"top_p": 0.85, "temperature": 1.0}])
def test_the_candidate_rule_holds_on_both_sides(rule):
    # Token 4 is barred, which leaves the coin of above; after token 3, one candidate and nothing to tilt.
    transition = torch.zeros(5, 5)
    transition[START, EOS], transition[START, 3], transition[START, 4] = 0.45, 0.45, 0.1
    transition[3, EOS] = transition[4, 3] = 1.0
    found = metered(TokenChain(transition), 2 * math.log(3), rows=8, max_new_tokens=4, **rule)[1]
    assert found.tolist() == pytest.approx([0.1308120] * 8, abs=1e-6)
    free = metered(TokenChain(transition), 2 * math.log(3), rows=8, max_new_tokens=4)[1]
    assert float((free - 0.1308120).abs().min()) > 0.01


def test_temperature_comes_before_the_tilt():
    # Odds of 4 to 1 become 2 to 1 at temperature 2; the tilt leaves 6 to 1.
    transition = torch.zeros(4, 4)
    transition[START, EOS], transition[START, 3], transition[3, EOS] = 0.8, 0.2, 1.0
    found = metered(TokenChain(transition), 2 * math.log(3), rows=4, max_new_tokens=4, temperature=2.0)[1]
    by_hand = 6 / 7 * math.log((6 / 7) / (2 / 3)) + 1 / 7 * math.log((1 / 7) / (1 / 3))
    assert found.tolist() == pytest.approx([by_hand] * 4, abs=1e-6)


def test_each_completion_counts_the_states_that_it_visits_and_their_mean_is_the_divergence():
    chain, strength = random_chain(8, seed=3, min_hazard=0.1), 3.0
    step, tilted = state_divergences(chain, strength)
    completions, divergence = metered(chain, strength, rows=3000, max_new_tokens=80)
    visited = [[START, *row[:-1]] for row in completions]
    torch.testing.assert_close(
        divergence, torch.stack([step[states].sum() for states in visited]), rtol=1e-4, atol=1e-5
    )
    # K = step + P' K over the states that continue.
    continuing = tilted.clone()
    continuing[:, EOS] = 0.0
    exact = float(torch.linalg.solve(torch.eye(8, dtype=torch.float64) - continuing, step)[START])
    error = float(divergence.std()) / math.sqrt(len(divergence))
    assert abs(float(divergence.mean()) - exact) < 4 * error
    # The log-ratio of the sampled tokens has the same mean and a larger variance.
    ratios = (tilted / chain.transition).log()
    single = torch.stack([ratios[states, row].sum() for states, row in zip(visited, completions, strict=True)])
    assert float(single.var()) > 2 * float(divergence.var())
    assert abs(float((single - divergence).mean())) < 4 * float((single - divergence).std()) / math.sqrt(len(single))


def test_divergence_of_two_policies_is_exact_in_each_state():
    ours, theirs = random_chain(8, seed=1, min_hazard=0.2), random_chain(8, seed=2, min_hazard=0.2)
    completions = [[3, 5, EOS], [EOS], [4, 4, 7, 6]]
    both = ours.transition, theirs.transition
    step = torch.where(both[0] > 0, both[0] * (both[0] / both[1]).log(), 0.0).nansum(dim=1)
    policies = ScriptedPolicy.from_chain(ours), ScriptedPolicy.from_chain(theirs)
    found = policy_divergence(*policies, [[START], [3, START], [START]], completions, temperature=1.0)
    visited = [[START, 3, 5], [START], [START, 4, 4, 7]]
    assert found.tolist() == pytest.approx([float(step[states].sum()) for states in visited], abs=1e-5)
    ratios = (both[0] / both[1]).log()
    sampled = policy_divergence(*policies, [[START]] * 3, completions, temperature=1.0, sampled=True)
    expected = [float(ratios[states, row].sum()) for states, row in zip(visited, completions, strict=True)]
    assert sampled.tolist() == pytest.approx(expected, abs=1e-5)
    # The reference sees other prompts: only the first state differs.
    moved = policy_divergence(policies[0], policies[0], [[START]], [[3, EOS]], 1.0, reference_prompt_ids=[[6]])
    p, q = ours.transition[START], ours.transition[6]
    assert moved.tolist() == pytest.approx([float(torch.where(p > 0, p * (p / q).log(), 0.0).nansum())], abs=1e-5)


def test_logits_of_completions_do_not_depend_on_their_batch(monkeypatch):
    policy = tiny_llama()
    prompts, completions = [[5, 6, 7, 8], [9], [10, 11]], [[20, 21, 1], [22, 23, 24, 25, 1], [1]]
    together = list(row_logits(policy, prompts, completions))
    monkeypatch.setattr("eval.tradeoff.sampler.LOGITS_AT_ONCE", 1)
    for batched, single, prompt, completion in zip(
        together, row_logits(policy, prompts, completions), prompts, completions, strict=True
    ):
        row = policy(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        assert batched.shape == (len(completion), 64)
        torch.testing.assert_close(batched, row, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(single, row, rtol=1e-4, atol=1e-4)


def tiny_sampler(**changes):
    tokenizer = tiny_tokenizer(chat=True)
    settings = {
        "tokenizer": tokenizer,
        "length_value_model": tiny_length_value_model(tokenizer=tokenizer).freeze(),
        "prompts": ["w7 w8 w9", "w10"],
        "columns": {"answer": ["4", "4"]},
        "reward": graded_by_length,
        "num_samples": 8,
        "max_new_tokens": 12,
        "batch_size": 16,
        "guidance": LengthGuidance(min_p=0.01, temperature=1.3),
        "seed": 0,
    }
    return Sampler(**{**settings, **changes})


def test_measuring_a_tilt_does_not_change_what_is_sampled():
    sampler, policy = tiny_sampler(), tiny_llama()
    arm = sampler.sample("tilt", "tilt", policy, strength=6.0)
    torch.manual_seed(0)
    # The shorter prompt first, as the sampler has them.
    inputs = sampler.tokenizer(["w10"] * 8 + ["w7 w8 w9"] * 8, padding=True, return_tensors="pt")
    generated = generate_guided(
        policy,
        sampler.length_value_model,
        {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]},
        replace(sampler.guidance, strength=6.0),
        tokenizer=sampler.tokenizer,
        max_new_tokens=12,
    )
    rows = generated[:, inputs["input_ids"].shape[1] :].tolist()
    assert arm.completions == [strip_completion(row, [1], 12)[0] for row in rows]
    assert arm.kl.shape == (16,) and (arm.kl > 0).all()
    assert not sampler.sample("base", "base", policy).kl.any()
    greedy = replace(sampler, guidance=LengthGuidance(temperature=0.0))
    assert greedy.sample("tilt", "tilt", policy, strength=1.0).kl is None
    assert not greedy.sample("base", "base", policy).kl.any()


def test_divergence_of_trained_policies_counts_from_the_base_policy():
    sampler, base, trained = tiny_sampler(guidance=LengthGuidance()), tiny_llama(), tiny_llama(seed=1)
    arm = sampler.sample("same", "trained", base)
    assert measure_trained(sampler, arm, base, base).kl.tolist() == pytest.approx([0.0] * 16, abs=1e-9)
    other = measure_trained(sampler, sampler.sample("other", "trained", trained), trained, base)
    assert (other.kl > 0.1).all()
    tilted = sampler.sample("tilt", "tilt of other", trained, strength=4.0)
    through = measure_trained(sampler, tilted, trained, base)
    prompts = [sampler.tokenizer(sampler.prompts[index])["input_ids"] for index in tilted.prompt]
    ratio = policy_divergence(trained, base, prompts, tilted.completions, 1.0, sampled=True)
    np.testing.assert_allclose(through.kl, tilted.kl + ratio)
    np.testing.assert_allclose(measure_trained(sampler, tilted, trained, trained).kl, tilted.kl, atol=1e-9)


def test_the_shortest_finished_of_several_by_hand():
    lengths, finished = np.array([5, 3, 2, 9, 9, 9, 4, 1]), np.array([1, 1, 0, 1, 0, 0, 1, 1], dtype=bool)
    correct = np.array([1, 0, 1, 1, 1, 0, 0, 1], dtype=bool)
    base = Arm(
        "base", "base", math.nan, [[n] for n in range(8)], lengths, finished, correct, np.array([1] * 4 + [0] * 4)
    )
    two = shortest_of(base, 2)
    # 5 or 3; 2 never ended, so 9; none ended, so the first; 4 or 1.
    assert two.completions == [[1], [3], [4], [7]]
    assert two.lengths.tolist() == [3, 9, 9, 1] and two.finished.tolist() == [True, True, False, True]
    assert two.correct.tolist() == [False, True, True, True] and two.prompt.tolist() == [1, 1, 0, 0]
    assert two.sampled.tolist() == [8, 11, 18, 5]
    assert two.kl is None and two.kl_bound == pytest.approx(math.log(2) - 0.5)
    assert shortest_of(base, 4).completions == [[1], [7]] and shortest_of(base, 4).sampled.tolist() == [19, 23]


def test_a_budget_is_asked_for_at_the_end_of_the_prompt():
    chat = [{"role": "system", "content": "w6"}, {"role": "user", "content": "w7"}]
    sampler = tiny_sampler(prompts=["w7 w8", "w9"])
    arm = ask(sampler, tiny_llama(), "asked", " w20", 20)
    assert (arm.kind, arm.setting) == ("prompt", 20.0) and (arm.kl > 0).all()
    seen = replace(sampler, prompts=["w7 w8 w20", "w9 w20"]).sample("asked", "prompt", tiny_llama())
    assert arm.completions == seen.completions
    sampler = tiny_sampler(prompts=[chat, chat])
    messages = ask(sampler, tiny_llama(), "asked", " w20", 20)
    longer = [chat[0], {"role": "user", "content": "w7 w20"}]
    assert (
        messages.completions == replace(sampler, prompts=[longer] * 2).sample("a", "prompt", tiny_llama()).completions
    )
    assert not ask(sampler, tiny_llama(), "asked", "", 20).kl.any()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of a random chat policy, its `same` trained policy, and GSM8K-like rows."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = tiny_tokenizer(chat=True)
    tiny_llama().save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    tiny_length_value_model(tokenizer=tokenizer).save_pretrained(folder / "lenvm")
    run = {"policy": "policy", "length_value_model": "lenvm", "trained": {"same": "policy"}, "data": {}}
    (folder / "run.json").write_text(json.dumps(run))
    rows = [{"question": f"w{7 + n} w{8 + n}", "answer": f"w9 #### {n}"} for n in range(4)]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_task_compares_every_baseline_and_writes_csv_and_divergences(run_dir, capsys):
    args = TradeoffArguments(
        run_dir=str(run_dir),
        task="gsm8k",
        dataset_name=str(run_dir / "gsm8k.jsonl"),
        num_samples=4,
        max_new_tokens=8,
        strengths=[1.0],
        budget_quantiles=[0.5],
        tilt=["base", "same"],
    )
    rows = {row["name"]: row for row in main(args)}
    assert [row["kind"] for row in rows.values()] == [
        "base", "truncation", "prompt", "best_of", "best_of", "tilt", "trained", "tilt of same",
    ]  # fmt: skip
    assert rows["base"]["kl"] == {"estimate": 0.0, "low": 0.0, "high": 0.0}
    assert rows["cut at q0.5"]["kl"] is None and rows["cut at q0.5"]["kl_bound"] is None
    assert rows["shortest of 4"]["kl_bound"] == pytest.approx(math.log(4) - 0.75)
    assert rows["same"]["kl"]["estimate"] == pytest.approx(0.0, abs=1e-9)
    assert rows["tilt +1"]["kl"]["estimate"] == pytest.approx(rows["same tilt +1"]["kl"]["estimate"]) != 0
    assert rows["asked for q0.5"]["setting"] == max(1, rows["cut at q0.5"]["setting"])
    # All four samples of a prompt were paid for.
    paid = 4 * rows["base"]["tokens"]["estimate"]
    assert rows["shortest of 4"]["sampled_tokens"]["estimate"] == pytest.approx(paid)
    assert rows["shortest of 4"]["tokens"]["estimate"] <= rows["shortest of 2"]["tokens"]["estimate"]
    printed = capsys.readouterr().out
    assert "KL to base" in printed and "sampled tokens" in printed and "≤ 0.64" in printed
    written = list(csv.DictReader((run_dir / "tradeoff" / "tradeoff.csv").open(encoding="utf-8")))
    assert [line["name"] for line in written] == list(rows)
    for line, row in zip(written, rows.values(), strict=True):
        assert (
            float(line["tokens_low"]) == row["tokens"]["low"] and float(line["accuracy"]) == row["accuracy"]["estimate"]
        )
        assert line["kl"] == ("" if row["kl"] is None else str(row["kl"]["estimate"]))
    assert json.loads((run_dir / "tradeoff" / "tradeoff.json").read_text())["arms"] == list(rows.values())


def test_presets_fill_in_what_is_not_said_and_no_more(run_dir, tmp_path):
    data_file = tmp_path / "rows.json"
    rows = [{"problem": "w7", "solution": "so \\boxed{5}", "answer": "5", "level": 2, "key": "6"}] * 2
    data_file.write_text(json.dumps(rows))
    given = {"run_dir": str(run_dir), "task": "math500", "dataset_name": str(data_file)}
    found, _ = read_run(TradeoffArguments(**given))
    data = found.load_prompts(320)
    assert data.prompts == [[{"role": "user", "content": "w7"}]] * 2
    assert data.columns["answer"] == ["5", "5"] and found.reward == "reward.mathematics.math_reward"
    assert found.prompt_only and found.best_of == [2, 4] and data.difficulties is None
    other, _ = read_run(TradeoffArguments(**given, chat=False, answer_column="key", best_of=[], prompt_only=False))
    data = other.load_prompts(320)
    assert data.prompts == ["w7", "w7"] and data.columns["answer"] == ["6", "6"]
    assert other.best_of == [] and not other.prompt_only
    plain, _ = read_run(TradeoffArguments(run_dir=str(run_dir), dataset_name=str(data_file), prompt_column="problem"))
    assert not plain.prompt_only and plain.best_of == [] and plain.reward.endswith("sandbox_reward")
    # A run on texts of its own stays on texts.
    run = json.loads((run_dir / "run.json").read_text())
    run["data"] = {"dataset_name": "mine.jsonl", "prompt_column": "text", "chat": False}
    (tmp_path / "run.json").write_text(json.dumps({**run, "reward": "reward.baselines.gsm8k_linear"}))
    own, _ = read_run(TradeoffArguments(**{**given, "run_dir": str(tmp_path)}))
    assert own.load_prompts(320).prompts == ["w7", "w7"]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"task": "gsm9k"}, "task"),
        ({"task": "gsm8k"}, "dataset_name"),
        ({"task": "sandbox", "dataset_name": "x.jsonl"}, "dataset_name"),
        ({"prompt_only": True}, "prompt_only"),
        ({"best_of": [3]}, "best_of"),
        ({"best_of": [1]}, "best_of"),
        ({"budget_request": "be brief"}, "budget_request"),
    ],
)
def test_arguments_that_make_no_sense_say_so(given, problem):
    with pytest.raises(ValueError, match=problem):
        TradeoffArguments(**given)


def test_a_missing_column_is_named(run_dir):
    given = {"run_dir": str(run_dir), "task": "gsm8k", "dataset_name": str(run_dir / "gsm8k.jsonl")}
    for column in ("prompt_column", "answer_column"):
        with pytest.raises(ValueError, match="nothing.*question.*answer"):
            read_run(TradeoffArguments(**given, **{column: "nothing"}))[0].load_prompts(320)


def test_lists_and_flags_are_read_from_the_command_line():
    line = ["--best_of", "2", "4", "--prompt_only", "false", "--task", "sandbox", "--num_samples", "8"]
    (args,) = HfArgumentParser(TradeoffArguments).parse_args_into_dataclasses(line)
    assert (args.best_of, args.prompt_only, args.task) == ([2, 4], False, "sandbox")
    (args,) = HfArgumentParser(TradeoffArguments).parse_args_into_dataclasses([])
    assert (args.best_of, args.prompt_only, args.task) == (None, None, None)


@pytest.mark.skipif(not MATH500.is_file(), reason=f"{MATH500} is absent: set LENVM_RL_DATA to a folder with math500/")
def test_math500_is_read_as_it_is(run_dir):
    args, _ = read_run(TradeoffArguments(str(run_dir), task="math500", dataset_name=str(MATH500)))
    found = args.load_prompts(1000)
    assert len(found.prompts) == len(found.columns["answer"]) == 500
    assert found.columns["answer"][0] == "\\left( 3, \\frac{\\pi}{2} \\right)"
