"""Routing inputs: the C++ generators, traces, text behind a gate, model presets. The numbers depend on (profile, seed, step,
global token id) alone, so they are those of the C++ library and of the ``anyep`` tool.

Arrays are numpy arrays that own their memory.
"""

from __future__ import annotations

from typing import Any, List, Sequence, Tuple, Union

from . import _native
from .arrays import view
from .errors import ArgumentError

ModelPreset = _native.ModelPreset
Statistics = _native.Statistics


class Batch:
    """The choices of every rank's tokens. Global token ids go up from rank 0's first token.

    Attributes:
        experts: int64 [tokens of all ranks, top_k], -1 = unused.
        weights: float32, same shape, 0 where experts is -1.
        tokens_per_rank: list of ints. num_experts, top_k: ints.
    """

    def __init__(self, tokens_per_rank: Sequence[int], experts: Any, weights: Any, num_experts: int) -> None:
        self._take(_native.make_batch(list(tokens_per_rank), view("Batch", "experts", experts),
                                      view("Batch", "weights", weights), num_experts))

    def _take(self, native: Any) -> None:
        import numpy

        self._native = native
        self.top_k: int = native.top_k
        self.num_experts: int = native.num_experts
        self.tokens_per_rank: List[int] = list(native.tokens_per_rank)
        experts, weights = native.memories
        shape = (sum(self.tokens_per_rank), self.top_k)
        self.experts = numpy.frombuffer(experts, dtype=numpy.int64).reshape(shape)
        self.weights = numpy.frombuffer(weights, dtype=numpy.float32).reshape(shape)

    @classmethod
    def _of(cls, native: Any) -> "Batch":
        batch = cls.__new__(cls)
        batch._take(native)
        return batch

    @property
    def num_ranks(self) -> int:
        return len(self.tokens_per_rank)

    def of_rank(self, rank: int) -> Tuple[Any, Any]:
        """(experts, weights) of one rank: views of [tokens_per_rank[rank], top_k]."""
        if not 0 <= rank < self.num_ranks:
            raise ArgumentError(f"of_rank: rank = {rank}, allowed: 0..{self.num_ranks - 1}", argument="rank")
        first = sum(self.tokens_per_rank[:rank])
        rows = slice(first, first + self.tokens_per_rank[rank])
        return self.experts[rows], self.weights[rows]

    def split(self, num_ranks: int) -> "Batch":
        """The same tokens cut anew; the first ``num_tokens % num_ranks`` ranks take one more than the others."""
        return Batch._of(_native.split(self._native, num_ranks))

    def measure(self, num_ranks: int = 0) -> Statistics:
        """What the batch realised on ``num_ranks`` ranks (default: its own)."""
        return _native.measure(self._native, self.num_experts, num_ranks or self.num_ranks)


def generate(profile: str = "uniform", *, seed: int = 1, step: int = 0, num_experts: int = 256, top_k: int = 8,
             num_ranks: int = 1, tokens_per_rank: int = 4096) -> Batch:
    """Draws a batch. ``profiles()`` lists the profiles. ArgumentError: a number out of range, or a profile that cannot be met
    with these experts and ranks."""
    return Batch._of(_native.generate(profile, seed, step, num_experts, top_k, num_ranks, tokens_per_rank))


def profiles() -> str:
    """One line per profile with its meaning."""
    return _native.profile_help()


def write_trace(path: str, batch: Batch) -> None:
    """A text file of ids and weights (docs/trace_format.md); ``anyep bench --trace`` replays it. Weights survive to the bit."""
    _native.write_trace(str(path), batch._native)


def read_trace(path: str) -> Batch:
    """ArgumentError names the file and the key or line."""
    return Batch._of(_native.read_trace(str(path)))


def models() -> List[ModelPreset]:
    """Published models: name, hidden, num_experts, top_k, expert_width, groups, groups_kept, note."""
    return _native.models()


def find_model(name: str) -> ModelPreset:
    """ArgumentError lists the names."""
    return _native.find_model(name)


class TextWorkload:
    """Words of a text as tokens, embedded by seeded projections and routed by a gate in DeepSeek-V3's manner.

    Args:
        source: paths of files (a list), or the text itself (a str).
        hidden: elements of an embedding.
        model: a preset whose gate is used; without it num_experts, top_k, groups, groups_kept, scaling give the gate.
    """

    def __init__(self, source: Union[str, Sequence[str]], *, hidden: int = 7168, model: str = "", num_experts: int = 256,
                 top_k: int = 8, groups: int = 8, groups_kept: int = 4, scaling: float = 2.5, seed: int = 1) -> None:
        make = _native.text_of if isinstance(source, str) else _native.load_text
        what = source if isinstance(source, str) else [str(path) for path in source]
        self._native = make(what, hidden, model, num_experts, top_k, groups, groups_kept, scaling, seed)
        self.num_words: int = self._native.num_words
        self.hidden: int = hidden
        self.num_experts: int = self._native.num_experts
        self.top_k: int = self._native.top_k

    def word(self, token: int) -> str:
        return self._native.word(token)

    def embed(self, first_token: int, out: Any) -> Any:
        """Fills ``out``, bfloat16 [tokens, hidden] (a torch tensor, or anyep.Typed), about standard normal; returns it."""
        self._native.embed(first_token, view("embed", "out", out))
        return out

    def route(self, first_token: int, tokens_per_rank: Sequence[int]) -> Batch:
        """Choices of the tokens from ``first_token`` on. Ids past the last word start again at the first."""
        return Batch._of(self._native.route(first_token, list(tokens_per_rank)))
