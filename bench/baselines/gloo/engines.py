"""The same work by anyep with given outputs, and by deep_ep."""
import anyep
import torch

# Address space for rings as large as they get and for all rows of a rank twice; pages come when they are used.
_RINGS_BYTES = 1 << 30


def rows_bytes_for(num_rows, hidden, num_ranks):
    return _RINGS_BYTES + 3 * num_rows * hidden * 2 * num_ranks


class AnyEP:
    """``memory``: "window" (rows of make_rows) or "caller" (the tensors that the baseline uses too)."""

    def __init__(self, engine, work, memory, x, recv, answers, out):
        self.engine, self.work, self.x, self.out = engine, work, x, out
        if memory == "window":
            recv = engine.make_rows(work.num_rows, work.hidden, "bfloat16", like=x).x
            answers = engine.make_rows(work.num_rows, work.hidden, "bfloat16", like=x).x
            recv.zero_()
            work.fill_answers(answers)
        self.answers = answers
        self.rows = anyep.Rows(recv, experts=torch.zeros((work.num_rows, work.top_k), dtype=torch.int64),
                               weights=torch.zeros((work.num_rows, work.top_k)))

    def dispatch(self):
        work = self.work
        self.handle = self.engine.route(work.experts, work.num_experts)
        self.engine.dispatch(self.x, self.handle, experts=work.experts, weights=work.weights, out=self.rows)

    def wrong_dispatch(self):
        return self.work.wrong_rows(self.rows.x, self.rows.experts, self.rows.weights)

    def combine(self):
        self.engine.combine(self.answers, self.handle, out=self.out)

    def wrong_combine(self):
        return self.work.wrong_sums(self.out)


class DeepEP:
    """Outputs are new ones in every call: V1 has no others. The layout is part of the dispatch."""

    def __init__(self, buffer, work, x, answers):
        self.buffer, self.work, self.x, self.answers = buffer, work, x, answers

    def dispatch(self):
        work = self.work
        counts, _, pairs, in_rank, _ = self.buffer.get_dispatch_layout(work.experts, work.num_experts)
        self.received = None  # the memory of the last call's rows serves this one
        self.received = self.buffer.dispatch(self.x, num_tokens_per_rank=counts, is_token_in_rank=in_rank,
                                             num_tokens_per_expert=pairs, topk_idx=work.experts, topk_weights=work.weights)
        self.handle = self.received[4]

    def wrong_dispatch(self):
        return self.work.wrong_rows(*self.received[:3])

    def combine(self):
        self.out = None
        self.out = self.buffer.combine(self.answers, self.handle)[0]

    def wrong_combine(self):
        return self.work.wrong_sums(self.out)
