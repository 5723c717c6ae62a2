"""Scripted policies: language models whose length law is known exactly, for tests and for checks of estimators.

A [`TokenChain`] is a finite Markov chain over tokens: the next token depends on the last one only. Everything about its
length follows from a linear system, so nothing has to be estimated. [`ScriptedPolicy`] plays the chain as a causal
language model and [`ScriptedLengthValue`] gives its exact length value behind the interface of `LengthValueModel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lenvm_rl.modeling.length_value_model import LengthValueOutput
from lenvm_rl.returns import check_gamma

PAD, EOS, START = 0, 1, 2
# Stands for an infinite logit: its softmax and sigmoid are exactly 0 or 1 in float32, and no NaN comes from it.
INFINITE_LOGIT = 1e4


@dataclass(frozen=True)
class TokenChain:
    """A Markov chain over tokens that ends at the end-of-sequence token.

    The state is the last token. `n` is the number of tokens still to come after it, end-of-sequence counted, and the
    length return of a state is ``G = -(1 - gamma**n)`` (arXiv 2604.27039, section 3.1).

    Args:
        transition (`torch.Tensor` of shape `(V, V)`):
            ``transition[i, j]`` is the probability of token `j` after token `i`; kept in float64. The rows of `pad` and
            end-of-sequence are not used.
        eos_token_id (`int`, *optional*, defaults to 1): the token that ends a sequence.
        pad_token_id (`int`, *optional*, defaults to 0): the padding token, never chosen.
    """

    transition: Tensor
    eos_token_id: int = EOS
    pad_token_id: int = PAD

    def __post_init__(self):
        transition = self.transition.to(torch.float64).clone()
        if transition.dim() != 2 or transition.shape[0] != transition.shape[1]:
            raise ValueError(f"transition must have shape (V, V), got {tuple(transition.shape)}.")
        if self.eos_token_id == self.pad_token_id:
            raise ValueError("eos_token_id and pad_token_id must differ.")
        special = [self.eos_token_id, self.pad_token_id]
        transition[special] = 0.0
        transition[special, self.eos_token_id] = 1.0
        sums = transition.sum(dim=1)
        if bool((transition < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-9):
            raise ValueError("every row of transition must hold probabilities that sum to 1.")
        if bool(transition[:, self.pad_token_id].any()):
            raise ValueError("no row of transition may choose the padding token.")
        object.__setattr__(self, "transition", transition)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.transition.shape[0]

    @property
    def _continuing(self) -> Tensor:
        """`(V, V)` probabilities of the moves that do not end the sequence."""
        continuing = self.transition.clone()
        continuing[:, self.eos_token_id] = 0.0
        return continuing

    def value(self, gamma: float) -> Tensor:
        """Exact length value ``V = E[G]`` of each state, `(V,)` float64: exactly 0 at end-of-sequence.

        It solves ``(I - gamma P) V = -(1 - gamma)``, where `P` holds the moves that do not end the sequence. The
        chance-weighted discount is ``E[gamma**n] = 1 + V``.
        """
        gamma = check_gamma(gamma)
        cost = torch.full((self.vocab_size,), -(1.0 - gamma), dtype=torch.float64)
        value = torch.linalg.solve(torch.eye(self.vocab_size, dtype=torch.float64) - gamma * self._continuing, cost)
        value[self.eos_token_id] = 0.0
        return value

    def mean_length(self) -> Tensor:
        """Exact ``E[n]`` of each state, `(V,)` float64, end-of-sequence counted; the chain must surely end."""
        ones = torch.ones(self.vocab_size, dtype=torch.float64)
        length = torch.linalg.solve(torch.eye(self.vocab_size, dtype=torch.float64) - self._continuing, ones)
        length[self.eos_token_id] = 0.0
        return length

    def length_distribution(self, state: int, max_length: int) -> Tensor:
        """``P(n = l)`` for ``l = 0 … max_length`` after the token `state`, `(max_length + 1,)` float64."""
        alive = torch.zeros(self.vocab_size, dtype=torch.float64)
        alive[state] = 1.0
        ended = [torch.zeros((), dtype=torch.float64)]
        for _ in range(max_length):
            ended.append(alive @ self.transition[:, self.eos_token_id])
            alive = alive @ self._continuing
        return torch.stack(ended)

    def tilted(self, strength: float, values: Tensor) -> TokenChain:
        """The chain with ``p'(j | i)`` proportional to ``p(j | i) * exp(strength * values[j])``.

        `values` `(V,)` is the value after each token, 0 at end-of-sequence; a positive strength leans towards the end.
        """
        logits = self.transition.log() + strength * values.to(torch.float64)
        return TokenChain(logits.softmax(dim=1), self.eos_token_id, self.pad_token_id)


def geometric_chain(hazard: float, vocab_size: int = 6) -> TokenChain:
    """Ends with probability `hazard` at every step, else moves to any ordinary token (id 2 and up) with equal chance.

    Its value is the same at every state, ``V = -(1 - gamma) / (1 - gamma * (1 - hazard))``, and ``E[n] = 1 / hazard``.
    """
    if not 0.0 < hazard <= 1.0:
        raise ValueError(f"hazard must lie in (0, 1], got {hazard}.")
    transition = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
    transition[:, EOS] = hazard
    transition[:, START:] = (1.0 - hazard) / (vocab_size - START)
    return TokenChain(transition)


def countdown_chain(start_probabilities: Sequence[float]) -> TokenChain:
    """From `START`, draws how many tokens to write and then counts down to the end, with nothing left to chance.

    Token ``START + n`` means that `n` tokens are still to come, end-of-sequence counted, so its value is exactly
    ``-(1 - gamma**n)``. Chosen first, it gives a completion of `n` tokens, end-of-sequence not counted.

    Args:
        start_probabilities (sequence of `float`): entry ``n - 1`` is the probability of token ``START + n`` first.
    """
    longest = len(start_probabilities)
    transition = torch.zeros(START + 1 + longest, START + 1 + longest, dtype=torch.float64)
    transition[START, START + 1 :] = torch.tensor(start_probabilities, dtype=torch.float64)
    for count in range(2, longest + 1):
        transition[START + count, START + count - 1] = 1.0
    transition[START + 1, EOS] = 1.0
    return TokenChain(transition)


def random_chain(vocab_size: int, seed: int, min_hazard: float = 0.01) -> TokenChain:
    """Random transitions whose chance of ending is at least `min_hazard` at every step and differs between states."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(vocab_size, vocab_size, generator=generator, dtype=torch.float64) ** 3
    weights[:, PAD] = 0.0
    transition = weights / weights.sum(dim=1, keepdim=True) * (1.0 - min_hazard)
    transition[:, EOS] += min_hazard
    return TokenChain(transition)


class ScriptedConfig(PreTrainedConfig):
    """Configuration of both scripted models; `gamma` is used by [`ScriptedLengthValue`] alone."""

    model_type = "scripted"

    vocab_size: int = 3
    gamma: float | None = None
    tokenizer_fingerprint: dict | None = None
    # Read by `generate` when it makes a cache; nothing is ever stored in it.
    num_hidden_layers: int = 1
    pad_token_id: int | None = PAD
    eos_token_id: int | list[int] | None = EOS


class ScriptedModel(PreTrainedModel):
    """A table with a row for each token: no context beyond the last token, so no cache is kept."""

    config_class = ScriptedConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: ScriptedConfig, width: int):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The table: it has a row for each token, as embeddings have."""
        return self.table

    @classmethod
    def _from_table(cls, chain: TokenChain, table: Tensor, gamma: float | None):
        config = ScriptedConfig(
            vocab_size=chain.vocab_size, gamma=gamma, eos_token_id=chain.eos_token_id, pad_token_id=chain.pad_token_id
        )
        model = cls(config)
        with torch.no_grad():
            model.table.weight.copy_(table)
        return model.eval()


class ScriptedPolicy(ScriptedModel, GenerationMixin):
    """A causal language model that draws the next token as a [`TokenChain`] does.

    The logits of a position are the row of its token, so the policy is tabular: its parameters can be trained, and its
    exact law read back with [`~ScriptedPolicy.chain`].
    """

    def __init__(self, config: ScriptedConfig):
        super().__init__(config, width=config.vocab_size)

    @classmethod
    def from_chain(cls, chain: TokenChain) -> ScriptedPolicy:
        """The policy that plays `chain`, in eval mode."""
        return cls._from_table(chain, chain.transition.log().clamp(min=-INFINITE_LOGIT), gamma=None)

    def chain(self) -> TokenChain:
        """The chain that this policy plays now."""
        transition = self.table.weight.detach().double().cpu().softmax(dim=1)
        return TokenChain(transition, self.config.eos_token_id, self.config.pad_token_id)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token logits `(B, S, V)` of `input_ids` `(B, S)`; masks, positions and cache change nothing."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=self.table(input_ids[:, keep]), past_key_values=past_key_values)


class ScriptedLengthValue(ScriptedModel):
    """The exact length value of a [`TokenChain`], with the forward of `LengthValueModel`."""

    def __init__(self, config: ScriptedConfig):
        super().__init__(config, width=1)

    @classmethod
    def from_chain(cls, chain: TokenChain, gamma: float) -> ScriptedLengthValue:
        """The exact value of `chain` at `gamma`, frozen.

        The logit is ``z = log(-V / (1 + V))``, so that ``-sigmoid(z)`` is the value; end-of-sequence has a value of
        exactly 0.
        """
        value = chain.value(gamma)
        logit = ((-value).log() - value.log1p()).clamp(-INFINITE_LOGIT, INFINITE_LOGIT)
        return cls._from_table(chain, logit.unsqueeze(1), gamma=check_gamma(gamma)).freeze()

    def freeze(self) -> ScriptedLengthValue:
        """Turns gradients off; there is nothing else in this model that training could change."""
        return self.requires_grad_(False).eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        **kwargs,
    ) -> LengthValueOutput:
        """Logits and values `(B, S)`, float32, of `input_ids` `(B, S)`; masks, positions and cache change nothing."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        logits = self.table(input_ids).squeeze(-1).float()
        return LengthValueOutput(logits=logits, values=-logits.sigmoid(), past_key_values=past_key_values)
