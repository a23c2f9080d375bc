"""Random rows for Python benchmarks, and the exact checks of what came of them.

Rows need no storage: row `key` is a stretch of one table of normal numbers, at a place that the key fixes, so that a row at a
wrong place is seen.
"""
import torch

from anyep import workload

NUM_KEYS = 1 << 20
_STEP = 0x9E3779B1  # odd: permutes the keys, and keeps neighbours from being the same numbers one element further
_BLOCK = 512  # rows that a check looks at together


def different(got, want):
    """Elements of bfloat16 tensors that differ as bits."""
    return int(torch.count_nonzero(got.view(torch.int16) != want.view(torch.int16)))


class Workload:
    """Routing and rows of all ranks, equal on every rank.

    Attributes:
        experts, weights: of this rank, [tokens, top_k] int64 and float32.
        reads: bool [R, tokens, R]: does rank r host an expert of source's token?
    """

    def __init__(self, rank, num_ranks, tokens, hidden=7168, num_experts=256, top_k=8, profile="uniform", seed=1):
        self.rank, self.num_ranks, self.tokens, self.hidden = rank, num_ranks, tokens, hidden
        self.num_experts, self.top_k, self.routing = num_experts, top_k, f"{profile}:{seed}"
        if num_experts % num_ranks != 0:
            raise ValueError(f"{num_experts} experts on {num_ranks} ranks: the benchmarks divide them evenly")
        self.local_experts = num_experts // num_ranks
        batch = workload.generate(profile, seed=seed, num_experts=num_experts, top_k=top_k, num_ranks=num_ranks,
                                  tokens_per_rank=tokens)
        self._experts = torch.from_numpy(batch.experts.copy()).view(num_ranks, tokens, top_k)
        self._weights = torch.from_numpy(batch.weights.copy()).view(num_ranks, tokens, top_k)
        self.experts, self.weights = self._experts[rank].contiguous(), self._weights[rank].contiguous()
        self.reads = torch.zeros((num_ranks, tokens, num_ranks), dtype=torch.bool)
        self.reads.scatter_(2, self._experts // self.local_experts, True)
        self.source, self.token = self.reads[:, :, rank].nonzero(as_tuple=True)  # of received rows, in order
        generator = torch.Generator().manual_seed(seed)
        self._table = torch.randn(NUM_KEYS + hidden, generator=generator, dtype=torch.float32).to(torch.bfloat16)
        self._rows = self._table.as_strided((NUM_KEYS, hidden), (1, 1))
        self._sums = None  # what combine must give, made when first asked for: checks are many

    @property
    def num_rows(self):
        return len(self.source)

    @property
    def wire_rows(self):
        """Rows that cross to or from this rank in the busier direction."""
        own = int(self.reads[self.rank, :, self.rank].sum())
        return max(int(self.reads[self.rank].sum()), self.num_rows) - own

    def _row(self, kind, source, token):
        keys = (kind * self.num_ranks + source) * self.tokens + token
        return self._rows.index_select(0, keys * _STEP % NUM_KEYS)

    def fill_input(self, out):
        for begin in range(0, self.tokens, _BLOCK):
            token = torch.arange(begin, min(begin + _BLOCK, self.tokens))
            out[begin:begin + len(token)] = self._row(0, self.rank, token)

    def fill_answers(self, out):
        """What this rank answers for every row that it receives: different bits per (rank, source, token)."""
        for begin in range(0, self.num_rows, _BLOCK):
            rows = slice(begin, begin + _BLOCK)
            out[rows] = self._row(1 + self.rank, self.source[rows], self.token[rows])

    def wrong_tokens(self, x, source, token):
        """Wrong elements of rows that ought to be those tokens of rank ``source``."""
        return different(x, self._row(0, source, token))

    def wrong_rows(self, x, experts, weights):
        """Wrong elements of a dispatch: rows, local ids, weights."""
        if x.shape[0] != self.num_rows:
            return max(x.shape[0], self.num_rows) * self.hidden
        wrong = 0
        for begin in range(0, self.num_rows, _BLOCK):
            rows = slice(begin, begin + _BLOCK)
            wrong += different(x[rows], self._row(0, self.source[rows], self.token[rows]))
        ids = self._experts[self.source, self.token]
        here = ids // self.local_experts == self.rank
        wrong += int((experts != torch.where(here, ids % self.local_experts, -1)).sum())
        return wrong + int((weights != torch.where(here, self._weights[self.source, self.token], 0)).sum())

    def wrong_sums(self, out):
        """Wrong elements of a combine of fill_answers() on every rank: the float32 sum over ranks ascending, rounded once."""
        if self._sums is None:
            self._sums = self._expected_sums()
        return sum(different(out[begin:begin + _BLOCK], self._sums[begin:begin + _BLOCK])
                   for begin in range(0, self.tokens, _BLOCK))

    def _expected_sums(self):
        sums = torch.empty((self.tokens, self.hidden), dtype=torch.bfloat16)
        for begin in range(0, self.tokens, _BLOCK):
            token = torch.arange(begin, min(begin + _BLOCK, self.tokens))
            total = torch.zeros((len(token), self.hidden), dtype=torch.float32)
            for reader in range(self.num_ranks):
                read = self.reads[self.rank, token, reader].unsqueeze(1)
                total += torch.where(read, self._row(1 + reader, self.rank, token).float(), 0)
            sums[begin:begin + len(token)] = total
        return sums
