"""Keys and values of tokens of many rows in one pool, and the attention that reads them there.

Every token has a place of its own in the pool, so nothing is ever moved or padded: a row is the list of the places of
its tokens, a candidate that is chosen stays where its keys were written, and what a row gives back the next one takes.

A forward is packed: the new tokens of all its rows stand side by side in one sequence, so that every layer but the
attention sees exactly the tokens that are asked for. In the attention, which transformers lets us replace by name
(`AttentionInterface`), rows whose tables of keys and queries are of about one size share a call.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import CacheLayerMixin

# What configs call the attention below while a packed forward lasts.
PACKED_ATTENTION = "lenvm_rl_packed"
# Rows share a call of the attention while their common table has at most so many times the cells that they need, or so
# few cells that a call of its own would cost more.
PADDING, FEW_CELLS = 1.5, 2048
# The first tokens that a pool has place for.
_SMALLEST = 256


@dataclass
class Segment:
    """What one row has in a packed forward: tokens that follow its prefix, then candidates beside one another.

    Args:
        places (`array` of `int`): where the keys are: of the prefix, the tokens that follow, and the candidates.
        read (`int`): tokens of the prefix, whose keys are there already.
        follow (`int`): tokens that follow it in this forward, each seeing those before it.
        candidates (`int`): tokens that see all these and themselves, and not each other.
    """

    places: array
    read: int
    follow: int
    candidates: int

    @property
    def queries(self) -> int:
        """Tokens in this forward."""
        return self.follow + self.candidates


class TokenCache:
    """Places for the keys and values of tokens, as many as were ever needed at once, up to a bound.

    Args:
        model (`torch.nn.Module`): what reads them, a length value model.
        max_tokens (`int`, *optional*): the most tokens that are held; without it, as many as are asked for.
    """

    def __init__(self, model: nn.Module, max_tokens: int | None = None):
        self.max_tokens = max_tokens
        # A decoder that is shared is none of the model's modules. Configs hold configs: outer ones come first.
        modules = [*model.modules(), *getattr(model, "backbone", model).modules()]
        self._configs = list({id(each.config): each.config for each in modules if hasattr(each, "config")}.values())
        # The first place is nobody's: it holds zeros, which padding points at.
        self.capacity = 1
        self._free: list[int] = []
        self.forward: PackedForward | None = None
        self.layers = DynamicCache()
        self.layers.layer_class_to_replicate = partial(_PooledLayer, self)

    @property
    def held(self) -> int:
        """Tokens whose keys and values are held."""
        return self.capacity - 1 - len(self._free)

    @property
    def left(self) -> float:
        """Tokens that there is place for yet."""
        return float("inf") if self.max_tokens is None else self.max_tokens - self.held

    def take(self, count: int) -> list[int]:
        """Places for so many more tokens, of which there must be `left`."""
        if len(self._free) < count:
            wanted = max(_SMALLEST, 2 * self.capacity, self.capacity + count)
            limit = wanted if self.max_tokens is None else self.max_tokens + 1
            capacity = min(wanted, limit)
            self._free = [*range(capacity - 1, self.capacity - 1, -1), *self._free]
            self.capacity = capacity
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken

    def give_back(self, places: Sequence[int]) -> None:
        """Frees places."""
        self._free.extend(places)

    def bytes(self) -> int:
        """Bytes of the pool."""
        kept = [pool for layer in self.layers.layers for pool in (layer.keys, layer.values) if pool is not None]
        return sum(pool.numel() * pool.element_size() for pool in kept)

    @contextmanager
    def reading(self, forward: PackedForward) -> Iterator[DynamicCache]:
        """What to give the model as its cache in a packed forward; inside, its attention is replaced, for everyone."""
        names = [config._attn_implementation for config in self._configs]
        self.forward = forward
        try:
            for config in self._configs:
                config._attn_implementation = PACKED_ATTENTION
            yield self.layers
        finally:
            self.forward = None
            # What is set in a config is set in those that it holds.
            for config, name in zip(self._configs, names, strict=True):
                config._attn_implementation = name


class PackedForward:
    """Where the tokens of a packed forward are written, and which keys each of them sees.

    Args:
        segments (list of [`Segment`]): in the order in which they stand in the sequence.
        device (`torch.device`): of the model.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device):
        new = [place for each in segments for place in each.places[each.read :]]
        self.written = torch.tensor(new, device=device)
        starts, start = [], 0
        for each in segments:
            starts.append(start)
            start += each.queries
        order = sorted(range(len(segments)), key=lambda i: (segments[i].queries, len(segments[i].places)), reverse=True)
        sizes = [(segments[i].queries, len(segments[i].places)) for i in order]
        self.groups = []
        for first, last in _shared(sizes):
            chosen = order[first:last]
            self.groups.append(_Group([segments[i] for i in chosen], [starts[i] for i in chosen], device))


class _Group:
    """Rows that share a call of the attention.

    `queries` `(G, Q)` are places in the packed sequence and `keys` `(G, S)` places in the pool, both padded on the
    right with 0; `cells` are the queries that exist, counted through, and `seen` `(G, Q, S)` what each query sees.
    """

    def __init__(self, segments: Sequence[Segment], starts: Sequence[int], device: torch.device):
        sizes = torch.tensor([(each.read, each.follow, each.queries) for each in segments], device=device)
        read, follow, count = (column.unsqueeze(1) for column in sizes.unbind(dim=1))
        query = torch.arange(max(each.queries for each in segments), device=device)
        exists = query < count
        places = (torch.tensor(starts, device=device).unsqueeze(1) + query).masked_fill(~exists, 0)
        self.queries, self.cells, self.places = places, exists.flatten().nonzero().squeeze(1), places[exists]
        keys = [torch.frombuffer(each.places, dtype=torch.int64) for each in segments]
        self.keys = pad_sequence(keys, batch_first=True).to(device)
        # Tokens that follow see those before them, candidates all of these; and each sees itself. A query that does not
        # exist sees what a candidate would, so that no sum over keys is empty.
        before, own = read + torch.minimum(query + 1, follow), read + query
        key = torch.arange(self.keys.shape[1], device=device)
        self.seen = (key < before.unsqueeze(2)) | (key == own.unsqueeze(2))
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}

    def gathered(self, pool: Tensor) -> Tensor:
        """Keys or values of the rows `(G, heads, S, head size)` out of a pool."""
        # For whole rows of memory, faster than indexing.
        gathered = pool.index_select(0, self.keys.flatten())
        return gathered.view(*self.keys.shape, *pool.shape[1:]).transpose(1, 2)

    def mask(self, repeats: int, dtype: torch.dtype) -> Tensor:
        """`(G, 1, repeats * Q, S)`, to be added; the same for all layers."""
        if (repeats, dtype) not in self._masks:
            mask = torch.zeros(self.seen.shape, dtype=dtype, device=self.seen.device)
            mask = mask.masked_fill_(~self.seen, -torch.inf).repeat(1, repeats, 1).unsqueeze(1)
            self._masks[repeats, dtype] = mask
        return self._masks[repeats, dtype]


class _PooledLayer(CacheLayerMixin):
    """One layer's keys and values `(places, heads, head size)`. Given to the attention in place of both."""

    is_sliding = False

    def __init__(self, cache: TokenCache):
        super().__init__()
        self.cache, self.is_initialized = cache, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: a pool grows when it is written to."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple:
        """Writes keys and values `(1, heads, N, head size)` of a packed forward into their places."""
        self.keys = self._written(self.keys, key_states)
        self.values = self._written(self.values, value_states)
        return self, self

    def _written(self, pool: Tensor | None, states: Tensor) -> Tensor:
        _, heads, _, size = states.shape
        if pool is None or pool.shape[0] < self.cache.capacity:
            grown = states.new_zeros(self.cache.capacity, heads, size)
            if pool is not None:
                grown[: pool.shape[0]] = pool
            pool = grown
        pool[self.cache.forward.written] = states[0].transpose(0, 1).to(pool.dtype)
        return pool

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if there were no keys but the new ones: nobody makes a mask of it."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: positions are given."""
        return 0

    def get_max_length(self) -> int:
        """-1, for no maximum."""
        return -1


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: _PooledLayer,
    value: _PooledLayer,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed forward, `(1, N, heads, head size)`: each token sees the keys of its own row.

    Args:
        module (`torch.nn.Module`), attention_mask (`torch.Tensor`, *optional*), kwargs: not read.
        query (`torch.Tensor` of shape `(1, heads, N, head size)`): of the packed sequence.
        key, value: the layer's pool.
        scaling (`float`, *optional*): of the products of queries and keys.
    """
    queries = query[0].transpose(0, 1)
    (tokens, heads, size), shared = queries.shape, key.keys.shape[1]
    result = queries.new_empty(tokens, heads, value.values.shape[2])
    for group in key.cache.forward.groups:
        rows, width = group.queries.shape
        # Heads that share keys are further queries of these: the keys need no repeating.
        asked = queries[group.queries].view(rows, width, shared, heads // shared, size).permute(0, 2, 3, 1, 4)
        keys, values = (group.gathered(pool).to(query.dtype) for pool in (key.keys, value.values))
        found = nn.functional.scaled_dot_product_attention(
            asked.reshape(rows, shared, -1, size),
            keys,
            values,
            attn_mask=group.mask(heads // shared, query.dtype),
            scale=scaling,
        )
        found = found.view(rows, shared, heads // shared, width, -1).permute(0, 3, 1, 2, 4)
        result[group.places] = found.reshape(rows * width, heads, -1)[group.cells]
    return result.unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def _shared(sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) of rows that share a call, by the queries and keys of each, the largest first."""
    first, cells, longest = 0, 0, 0
    for index, (queries, keys) in enumerate(sizes):
        width = max(longest, keys)
        table = (index + 1 - first) * sizes[first][0] * width
        if index > first and table > max(FEW_CELLS, PADDING * (cells + queries * keys)):
            yield first, index
            first, cells, width = index, 0, keys
        cells, longest = cells + queries * keys, width
    if sizes:
        yield first, len(sizes)
