"""A module around the experts of this rank, and an engine for it."""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Sequence, Union

import torch

from .._gpu import device_of
from ..bootstrap import as_bootstrap
from ..engine import Engine, Tuning
from ..errors import argument_error
from .functions import FLOATS, Combine, Dispatch, Gather, Scatter, check_floats, dense, refusing

_MIB = 1 << 20
_LEAST_ROWS_BYTES = 16 * _MIB
_MOST_ROWS_BYTES = 4096 * _MIB

#: ``experts(rows [p, hidden], rows_per_expert) -> [p, hidden]``: rows grouped by local expert, ascending.
GroupedExperts = Callable[[torch.Tensor, List[int]], torch.Tensor]


def local_experts(num_experts: int, num_ranks: int, rank: int) -> range:
    """Global ids of the experts that live on a rank: contiguous blocks, the first ``num_experts % num_ranks`` ranks have one
    more."""
    base, rest = divmod(num_experts, num_ranks)
    first = rank * base + min(rank, rest)
    return range(first, first + base + (rank < rest))


def rows_bytes_for(num_ranks: int, hidden: int, num_tokens: int, dtype: torch.dtype) -> int:
    """The budget of ``create_engine``: room for two buffers of all tokens of all ranks, because the rows that came and the
    answers that go back exist at the same time, and a rank never gets more rows than there are tokens. At least 16 MiB, at
    most 4 GiB. It is address space: pages that no call touches take no memory, and what finds no room uses ordinary memory."""
    row_bytes = hidden * dtype.itemsize
    return min(max(2 * num_ranks * num_tokens * row_bytes, _LEAST_ROWS_BYTES), _MOST_ROWS_BYTES)


def create_engine(group: Any = None, *, hidden: int, num_tokens: int, dtype: torch.dtype = torch.float32,
                  max_experts: int = 1024, tuning: Optional[Tuning] = None, device: Any = None) -> Engine:
    """An engine with the budget of ``rows_bytes_for``. Collective; all arguments are the same on every rank.

    Args:
        group: a torch process group, an anyep.Bootstrap, an mpi4py communicator, or None for one rank. Used in this call only.
        hidden, dtype: of the rows. num_tokens: an estimate of a rank's tokens per call, never a limit.
        max_experts, tuning, device: as in ``Engine.create``.

    Raises:
        ArgumentError; MismatchError: ranks differ. ResourceError, PeerTimeoutError, PeerDeadError.
    """
    if hidden < 1 or num_tokens < 0:
        raise argument_error("create_engine", "hidden, num_tokens", f"{hidden}, {num_tokens}", "hidden >= 1, num_tokens >= 0")
    if dtype not in FLOATS:
        raise argument_error("create_engine", "dtype", str(dtype), "torch.float32, torch.bfloat16 or torch.float16")
    bootstrap = as_bootstrap(group)
    return Engine.create(bootstrap, rows_bytes=rows_bytes_for(bootstrap.num_ranks, hidden, num_tokens, dtype),
                         max_experts=max_experts, tuning=tuning,
                         device=device_of(device, group))


class ExpertParallel(torch.nn.Module):
    """Experts of a layer spread over ranks: y[token] = sum over its choices of weight * expert(x[token]).

    Args:
        experts: this rank's experts, in the order of ``local_experts``. A sequence or ModuleList of modules [p, hidden] ->
            [p, hidden], one per local expert; or one callable ``experts(rows, rows_per_expert)`` that gets all rows at once,
            grouped by local expert, and how many each has (a list of ints). An expert may get no rows, and is called all the
            same, so that its parameters have gradients after every backward.
        num_experts: of all ranks.
        engine: an Engine, shared by all layers of a model; or the group (see ``create_engine``) of an engine that this module
            makes and ``close`` closes. Then ``hidden``, ``num_tokens`` and ``dtype`` say the budget, ``device`` the GPU.

    Parameters of experts belong to one rank: their gradients contain the tokens of all ranks and need no all-reduce. Those of
    the other layers do, as in any data-parallel program. The sum of all ranks' losses is what is differentiated.

    Calls are collective: every rank calls the layers in the same order, with any number of tokens, also none, and every rank
    runs backward, with gradients enabled on all ranks or on none. Then backward is in the same order on every rank: autograd
    runs the CPU nodes of one graph in one thread and always takes the youngest ready node, so the nodes of these calls run in
    the reverse order of forward, whatever lies between them. A rank without experts, without tokens, or whose experts give
    no gradient takes part like the others.

    Works in ``torch.no_grad`` and ``torch.inference_mode``, with activation checkpointing (the block's calls run again in
    backward, on every rank at the same place), and inside ``torch.compile``, where forward is a graph break. One thread of a
    rank at a time.
    """

    def __init__(self, experts: Union[Sequence[Any], torch.nn.ModuleList, GroupedExperts], num_experts: int, engine: Any,
                 *, hidden: int = 0, num_tokens: int = 4096, dtype: torch.dtype = torch.float32, device: Any = None) -> None:
        super().__init__()
        self._owns_engine = not isinstance(engine, Engine)
        if self._owns_engine:
            engine = create_engine(engine, hidden=hidden, num_tokens=num_tokens, dtype=dtype, device=device)
        self.engine: Engine = engine
        self.num_experts = num_experts
        self.num_local_experts = len(local_experts(num_experts, engine.num_ranks, engine.rank))
        self._one_by_one = isinstance(experts, (torch.nn.ModuleList, list, tuple))
        if self._one_by_one and len(experts) != self.num_local_experts:
            raise argument_error("ExpertParallel", "experts", f"{len(experts)} modules",
                                 f"{self.num_local_experts}, one per local expert of rank {engine.rank}",
                                 "anyep.torch.local_experts lists them")
        self.experts = torch.nn.ModuleList(experts) if isinstance(experts, (list, tuple)) else experts

    @torch.compiler.disable
    def forward(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Args:
            x: [num_tokens, hidden] float32, bfloat16 or float16; row bytes a multiple of 16.
            topk_ids: [num_tokens, k] int32 or int64, global ids, -1 = unused; ids may repeat within a token.
            topk_weights: [num_tokens, k] of any floating type; float32 is what travels and multiplies.

        Returns:
            [num_tokens, hidden] of x's type. Weighted answers are added in float32 per rank, rounded to that type once, and the
            ranks' sums are added in float32 and rounded once. 0 for a token without choices.

        Raises:
            ArgumentError: a shape or type, before anything is sent. Where it, or an exception of an expert, comes on some ranks
            only, the others get PeerDeadError with its text. One in an expert's backward leaves them waiting: use the engine
            in a ``with`` block, or call ``engine.abandon``.
        """
        engine = self.engine
        with refusing(engine, "route"):
            self._check(x, topk_ids, topk_weights)
        handle = engine.route(dense(topk_ids), self.num_experts)
        # With it every rank's graph has the same collective nodes, whether or not its own x, weights or experts need gradients:
        # what dispatch gives requires one, and the product with the received weights leads every answer back to it.
        anchor = torch.empty(0, dtype=torch.float32, device=x.device, requires_grad=torch.is_grad_enabled())
        rows, weights, _, ids = Dispatch.apply(x, topk_weights.to(torch.float32), None, anchor, topk_ids, handle, engine)

        top_k = ids.shape[1]
        flat = ids.reshape(-1)
        counts = torch.bincount(flat + 1, minlength=self.num_local_experts + 1).tolist()
        pairs = torch.argsort(flat, stable=True)[counts[0]:]  # choices of local experts, by expert, then by row
        index = torch.div(pairs, top_k, rounding_mode="floor")
        with refusing(engine, "combine"):
            answers = self._run_experts(Gather.apply(rows, index, x.dtype, engine), counts[1:])
        # A float32 factor makes the product float32, and only the experts' own answers are kept for backward.
        weighted = answers * weights.reshape(-1).index_select(0, pairs).unsqueeze(1)
        return Combine.apply(Scatter.apply(weighted, index, rows.shape[0], x.dtype, engine), None, None, handle,
                             engine)[0]

    def _run_experts(self, rows: torch.Tensor, rows_per_expert: List[int]) -> torch.Tensor:
        if not self._one_by_one:
            answers = self.experts(rows, rows_per_expert)
        elif rows_per_expert:
            parts = rows.split(rows_per_expert)
            answers = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])
        else:
            answers = rows
        if answers.shape != rows.shape:
            raise argument_error("ExpertParallel", "result of experts", f"shape {list(answers.shape)}",
                                 f"that of the rows, {list(rows.shape)}")
        return answers

    def _check(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
        op = "ExpertParallel"
        check_floats(op, "x", x)
        if topk_ids.dim() != 2 or topk_ids.dtype not in (torch.int32, torch.int64):
            raise argument_error(op, "topk_ids", f"{topk_ids.dtype} of shape {list(topk_ids.shape)}",
                                 "int32 or int64 of [num_tokens, k]")
        if topk_ids.shape[0] != x.shape[0]:
            raise argument_error(op, "topk_ids", f"{topk_ids.shape[0]} tokens", f"{x.shape[0]}, as x has")
        if topk_weights.shape != topk_ids.shape or not topk_weights.is_floating_point():
            raise argument_error(op, "topk_weights", f"{topk_weights.dtype} of shape {list(topk_weights.shape)}",
                                 f"floating point of topk_ids' shape {list(topk_ids.shape)}")

    def close(self) -> None:
        """Collective, idempotent: closes the engine if this module made it."""
        if self._owns_engine:
            self.engine.close()

    def extra_repr(self) -> str:
        where = f"rank={self.engine.rank} of {self.engine.num_ranks}"
        return f"num_experts={self.num_experts}, local={self.num_local_experts}, {where}"
