"""Requests that ask for no guidance, in an engine that has the processor."""

from engine_parts import an_engine, as_prompts, parameters, random_prompts, tokens


def test_requests_without_keys_are_untouched(models):
    """Bit for bit: the same log-probabilities as from an engine without the processor."""
    prompts = random_prompts(4, seed=9)
    asked = [parameters(logprobs=3, temperature=0.8, seed=number) for number in range(4)]

    def completed(**settings):
        with an_engine(*models, **settings) as llm:
            return llm.generate(as_prompts(prompts), asked, use_tqdm=False)

    said = completed(), completed(logits_processors=None, additional_config={})
    for one, other in zip(*said, strict=True):
        assert one.outputs[0].logprobs == other.outputs[0].logprobs and tokens(one) == tokens(other)
