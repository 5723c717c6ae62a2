"""Guidance in a real vLLM writes what `generate_guided` writes, token for token, however requests come and go."""

from dataclasses import replace

import pytest
import torch
from engine_parts import (
    ASKED,
    GUIDANCES,
    NEW_TOKENS,
    as_prompts,
    guide_of,
    parameters,
    random_prompts,
    references,
    tokens,
)
from tiny import EOS
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from lenvm_rl.decoding.processor import LengthGuidedLogitsProcessor
from lenvm_rl.decoding.requests import keys_of_guidance
from lenvm_rl.modeling.length_value_model import LengthValueModel

SETTINGS = {"logprobs_mode": "processed_logprobs"}


def test_a_batch_is_guided_as_each_request_alone(engine, models):
    prompts = random_prompts(len(ASKED))
    outputs = engine.generate(as_prompts(prompts), [parameters(each) for each in ASKED], use_tqdm=False)
    assert [tokens(each) for each in outputs] == references(models, prompts, ASKED)
    assert len({len(tokens(each)) for each in outputs}) > 3
    # Nobody is left in the scorer once the engine has said who went, at its next step.
    engine.generate(as_prompts(prompts[:1]), parameters(), use_tqdm=False)
    assert guide_of(engine).scorer.cached_tokens == 0


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_tokens_have_the_probability_that_guidance_gives_them(engine, models, temperature):
    """`processed_logprobs` of vLLM beside the processor of `generate`, at every token of sampled completions."""
    prompts = random_prompts(len(GUIDANCES), seed=5)
    asked = [parameters(each, temperature=temperature, seed=7, logprobs=0) for each in GUIDANCES]
    outputs = engine.generate(as_prompts(prompts), asked, use_tqdm=False)
    again = engine.generate(as_prompts(prompts), asked, use_tqdm=False)
    assert [tokens(each) for each in outputs] == [tokens(each) for each in again]
    policy = AutoModelForCausalLM.from_pretrained(models[0]).eval()
    lenvm = LengthValueModel.from_pretrained(models[1]).freeze()
    for prompt, guidance, output in zip(prompts, GUIDANCES, outputs, strict=True):
        processor = LengthGuidedLogitsProcessor(lenvm, replace(guidance, temperature=temperature), eos_token_id=EOS)
        for place, token in enumerate(tokens(output)):
            ids = torch.tensor([prompt + tokens(output)[:place]])
            with torch.no_grad():
                scores = policy(ids).logits[:, -1]
            expected = processor(ids, scores).log_softmax(dim=1)[0, token]
            found = output.outputs[0].logprobs[place][token].logprob
            assert found == pytest.approx(float(expected), abs=1e-4)


def test_several_samples_stop_strings_ends_and_least_tokens(engine, models):
    [prompt] = random_prompts(1, seed=11)
    guidance = GUIDANCES[0]
    # Greedy samples of one request are one completion; each is a row of its own.
    [output] = engine.generate(as_prompts([prompt]), parameters(guidance, n=3, temperature=0.9, seed=1), use_tqdm=False)
    assert len({tuple(each.token_ids) for each in output.outputs}) > 1
    [plain] = engine.generate(as_prompts([prompt]), parameters(GUIDANCES[1]), use_tqdm=False)
    word = engine.get_tokenizer().decode([tokens(plain)[3]])
    [stopped] = engine.generate(as_prompts([prompt]), parameters(GUIDANCES[1], stop=[word]), use_tqdm=False)
    assert stopped.outputs[0].stop_reason == word and len(tokens(stopped)) <= 4
    # Another end: its value is 0, as the end's.
    other = tokens(plain)[2]
    [ended] = engine.generate(as_prompts([prompt]), parameters(GUIDANCES[1], stop_token_ids=[other]), use_tqdm=False)
    [expected] = references(models, [prompt], [GUIDANCES[1]], eos_token_id=[EOS, other])
    assert tokens(ended) == expected
    asked = parameters(guidance, min_tokens=9)
    [held] = engine.generate(as_prompts([prompt]), asked, use_tqdm=False)
    [expected] = references(models, [prompt], [guidance], min_new_tokens=9)
    assert tokens(held) == expected and len(expected) >= 9


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"extra_args": {"length_strenght": 1}}, "length_strenght"),
        ({"extra_args": keys_of_guidance(GUIDANCES[0]) | {"length_top_k": 0}}, "length_top_k"),
        ({"top_p": 0.9}, "top_p.*length_top_p"),
        ({"top_k": 5}, "length_top_k"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"extra_args": keys_of_guidance(GUIDANCES[3]) | {"length_target": NEW_TOKENS}}, "max_tokens"),
    ],
)
def test_what_cannot_be_guided_is_refused(engine, settings, named):
    given = {"temperature": 1.0, "max_tokens": NEW_TOKENS, "extra_args": keys_of_guidance(GUIDANCES[0])} | settings
    with pytest.raises((ValueError, VLLMValidationError), match=named):
        engine.generate(as_prompts([[7, 8]]), SamplingParams(**given), use_tqdm=False)
