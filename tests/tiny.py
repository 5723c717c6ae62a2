"""Tiny tokenizers and models made in the process, so that no test needs the hub. The same seed, the same weights."""

import copy

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PAD, EOS, UNK = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(vocab_size=64, chat=False):
    """A word-level tokenizer, words split at blanks, nothing added at either end; `chat=True` sets a chat template.

    Ids: `<pad>` 0, `<eos>` 1, `<unk>` 2, `<|user|>` 3, `<|assistant|>` 4, `<|system|>` 5, then `w6`, `w7`, ….
    """
    special = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
    words = special + [f"w{i}" for i in range(len(special), vocab_size)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        padding_side="left",
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(vocab_size=64, hidden=16, layers=2, seed=0, **config):
    """A random `LlamaForCausalLM` (2 heads, 1 key-value head), in eval mode."""
    return _seeded(LlamaForCausalLM, LlamaConfig, vocab_size, hidden, layers, seed, config)


def tiny_qwen2(vocab_size=64, hidden=16, layers=2, seed=0, **config):
    """A random `Qwen2ForCausalLM` (2 heads, 1 key-value head), in eval mode."""
    return _seeded(Qwen2ForCausalLM, Qwen2Config, vocab_size, hidden, layers, seed, config)


def tiny_qwen3(vocab_size=64, hidden=16, layers=2, seed=0, **config):
    """A random `Qwen3ForCausalLM` (2 heads, 1 key-value head), in eval mode."""
    config = {"head_dim": hidden // 2, **config}
    return _seeded(Qwen3ForCausalLM, Qwen3Config, vocab_size, hidden, layers, seed, config)


def tiny_gpt2(vocab_size=64, hidden=16, layers=2, seed=0):
    """A random `GPT2LMHeadModel` in eval mode. It adds an embedding of the absolute position: in the others, which
    rotate, a shift of all positions of a sequence goes unnoticed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_embd=hidden,
                n_layer=layers,
                n_head=2,
                n_positions=128,
                initializer_range=0.2,
                bos_token_id=None,
                eos_token_id=EOS,
            )
        ).eval()


def _seeded(model_class, config_class, vocab_size, hidden, layers, seed, config):
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": EOS,
        # The default of 0.02 makes a network this narrow nearly constant: its outputs would hide mistakes.
        "initializer_range": 0.2,
    }
    settings.update(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config_class(**settings)).eval()


def tiny_length_value_model(backbone=None, gamma=0.9, seed=0, tokenizer=None):
    """A random `LengthValueModel` whose values differ widely from state to state; those of a new head hardly do."""
    from lenvm_rl.modeling.length_value_model import LengthValueModel

    model = LengthValueModel.from_backbone(backbone or tiny_llama(seed=seed), gamma=gamma, tokenizer=tokenizer)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed + 1)
        for parameter in model.head.parameters():
            parameter.normal_(std=0.5)
    return model


def tokens(rows, length, seed=0):
    """Random token ids `(rows, length)`, none of them pad, end or unknown."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_same_weights(first, second):
    """The two modules have the same weights to the bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        assert weight.dtype == theirs[key].dtype and torch.equal(weight, theirs[key]), key


def assert_same_logits(first, second):
    """The two length value models compute the same logits to the bit, padding included."""
    ids, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    # The copy matters: weights that are read from a file lie elsewhere in memory, and the last bit of a product of
    # matrices depends on how they are aligned.
    logits = [copy.deepcopy(model)(ids, attention_mask=mask).logits for model in (first, second)]
    assert torch.equal(*logits)
