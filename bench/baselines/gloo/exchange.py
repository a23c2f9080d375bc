"""Dispatch and combine by torch.distributed's gloo backend, as well as torch's own operators allow.

Dispatch: where tokens go from the ids, counts by ``all_to_all_single``, one row per token and destination rank by one
``index_select``, rows by ``all_to_all_single`` straight to their place, ids and weights as a record per row likewise; the ids
become local ones. Combine: rows back without a pack by ``all_to_all_single``, then ``index_add_``: of float32 copies, source
rank by source rank, rounded once; or one call on bfloat16 tensors, inside which torch 2.13 adds in float32 too (the check of
results would tell of another version). Buffers are preallocated and touched; gloo's own are gloo's.
"""
import torch
import torch.distributed as dist


class Gloo:
    """One rank. ``x``: its rows; ``recv``: [rows received, hidden]; ``answers``: likewise; ``spare``: [rows sent, hidden]."""

    def __init__(self, work, x, recv, answers, spare, out):
        self.work, self.x, self.recv, self.answers, self.spare, self.out = work, x, recv, answers, spare, out
        self.total = torch.zeros((work.tokens, work.hidden), dtype=torch.float32)
        self.block = torch.zeros((work.tokens, work.hidden), dtype=torch.float32)
        words = 3 * work.top_k  # an int64 id and a float32 weight for every choice
        self.record = torch.zeros((work.tokens, words), dtype=torch.int32)
        self.sent_records = torch.zeros((len(spare), words), dtype=torch.int32)
        self.recv_records = torch.zeros((len(recv), words), dtype=torch.int32)
        self.recv_counts = torch.zeros(work.num_ranks, dtype=torch.int64)
        self.experts = self.weights = None

    def dispatch(self):
        work, words = self.work, 2 * self.work.top_k
        goes = torch.zeros((work.tokens, work.num_ranks), dtype=torch.bool)
        goes.scatter_(1, work.experts // work.local_experts, True)
        counts = goes.sum(0)
        dist.all_to_all_single(self.recv_counts, counts)
        self.sent_split, self.recv_split = counts.tolist(), self.recv_counts.tolist()
        self.sent_token = goes.t().nonzero()[:, 1].contiguous()  # by destination rank, then token

        torch.index_select(self.x, 0, self.sent_token, out=self.spare)
        dist.all_to_all_single(self.recv, self.spare, self.recv_split, self.sent_split)

        self.record[:, :words] = work.experts.view(torch.int32)
        self.record[:, words:] = work.weights.view(torch.int32)
        torch.index_select(self.record, 0, self.sent_token, out=self.sent_records)
        dist.all_to_all_single(self.recv_records, self.sent_records, self.recv_split, self.sent_split)
        ids = self.recv_records[:, :words].contiguous().view(torch.int64) - work.rank * work.local_experts
        elsewhere = (ids < 0) | (ids >= work.local_experts)
        self.experts = ids.masked_fill_(elsewhere, -1)
        self.weights = self.recv_records[:, words:].contiguous().view(torch.float32).masked_fill_(elsewhere, 0)

    def wrong_dispatch(self):
        return self.work.wrong_rows(self.recv, self.experts, self.weights)

    def _rows_back(self):
        dist.all_to_all_single(self.spare, self.answers, self.sent_split, self.recv_split)

    def combine_float32(self):
        self._rows_back()
        self.total.zero_()
        begin = 0
        for count in self.sent_split:
            block = self.block[:count]
            block.copy_(self.spare[begin:begin + count])
            self.total.index_add_(0, self.sent_token[begin:begin + count], block)
            begin += count
        self.out.copy_(self.total)

    def combine_bfloat16(self):
        self._rows_back()
        self.out.zero_()
        self.out.index_add_(0, self.sent_token, self.spare)

    def wrong_combine(self):
        return self.work.wrong_sums(self.out)
