#!/usr/bin/env python3
"""A decode loop that hides communication behind compute: two micro-batches, low-latency calls, receive hooks.

While tokens of one micro-batch are on their way, the rank works on the other one. With `hook=True` a call returns when its
data is on the way, and nothing runs or polls until `receive()`. Ranks are processes of this program; each has 32 sequences
in two micro-batches and generates one token of each per step, through 4 layers of 16 experts, 4 per token.

    python3 examples/decode_loop.py [--ranks 2] [--steps 20]

The same loop without hooks runs first, for comparison; all answers of the last step are compared with a dense computation.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from typing import Any, Deque, List, Tuple

import anyep
import torch
import torch.nn.functional as F

from anyep.torch import local_experts

LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH = 4, 16, 4, 256, 512
TOKENS = 16  # of a micro-batch, per rank

ROUNDOFF = 2.0**-8  # of bfloat16


class Model:
    """Seeded weights. Every rank has all of them, so that it can check itself; it uses only its own experts'."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)

        def weights(*shape: int) -> torch.Tensor:
            numbers = torch.randn(shape, generator=generator, dtype=torch.float32)
            return (numbers * shape[-2] ** -0.5).to(torch.bfloat16)

        self.mix = weights(LAYERS, HIDDEN, HIDDEN)
        self.gate = weights(LAYERS, HIDDEN, EXPERTS)
        self.up = weights(LAYERS, EXPERTS, HIDDEN, WIDTH)
        self.down = weights(LAYERS, EXPERTS, WIDTH, HIDDEN)

    def attend(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Stands for attention: work on local tokens. [n, HIDDEN] -> [n, HIDDEN] of about unit size."""
        return F.rms_norm(x + torch.tanh(x @ self.mix[layer]), (HIDDEN,))

    def choose(self, layer: int, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """(ids int64, weights float32), [n, TOP_K] each."""
        weights, ids = (x @ self.gate[layer]).float().softmax(dim=-1).topk(TOP_K)
        return ids, weights / weights.sum(dim=-1, keepdim=True)

    def expert(self, layer: int, expert: int, rows: torch.Tensor) -> torch.Tensor:
        return F.silu(rows @ self.up[layer, expert]) @ self.down[layer, expert]


class MicroBatch:
    """One micro-batch of one rank: its tokens, and the calls that are on their way for it."""

    def __init__(self, engine: anyep.Engine, model: Model, seed: int, hook: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.engine, self.model, self.hook = engine, model, hook
        self.x = torch.randn((TOKENS, HIDDEN), generator=generator, dtype=torch.float32).to(torch.bfloat16)
        self.mine = local_experts(EXPERTS, engine.num_ranks, engine.rank)
        rows = engine.num_ranks * TOKENS
        self.answers = torch.empty((len(self.mine), rows, HIDDEN), dtype=torch.bfloat16, device="cpu")
        self.log: Deque[Tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = collections.deque(maxlen=LAYERS)
        self.dispatched: Any = None
        self.combined: Any = None

    def attend(self, layer: int) -> None:
        self.layer = layer
        self.x = self.model.attend(layer, self.x)
        self.ids, self.weights = self.model.choose(layer, self.x)

    def send_tokens(self) -> None:
        self.dispatched = self.engine.low_latency_dispatch(self.x, self.ids, EXPERTS, TOKENS, hook=self.hook)

    def receive_tokens(self) -> None:
        if self.hook:
            self.dispatched.receive()

    def run_experts(self) -> None:
        slabs = self.dispatched.result
        for local, (expert, count) in enumerate(zip(self.mine, slabs.counts.tolist())):
            self.answers[local, :count] = self.model.expert(self.layer, expert, slabs.x[local, :count])

    def send_answers(self) -> None:
        self.combined = self.engine.low_latency_combine(self.answers, self.ids, self.weights, self.dispatched.result, EXPERTS,
                                                        TOKENS, hook=self.hook)

    def receive_answers(self) -> None:
        """Nothing to do before the first send."""
        if self.combined is None:
            return
        if self.hook:
            self.combined.receive()
        self.log.append((self.layer, self.x, self.ids, self.weights, self.combined.result))
        self.x = self.x + self.combined.result
        self.combined = None


def step(a: MicroBatch, b: MicroBatch) -> None:
    """One token of every sequence. Between each send and its receive there is work on the other micro-batch."""
    for layer in range(LAYERS):
        a.attend(layer)  # meanwhile: b's answers of the layer before
        b.receive_answers()
        a.send_tokens()
        b.attend(layer)  # meanwhile: a's tokens
        a.receive_tokens()
        b.send_tokens()
        a.run_experts()  # meanwhile: b's tokens
        b.receive_tokens()
        a.send_answers()
        b.run_experts()  # meanwhile: a's answers
        a.receive_answers()
        b.send_answers()


def decode(engine: anyep.Engine, model: Model, steps: int, hook: bool) -> Tuple[float, List[MicroBatch]]:
    """Tokens per second of this rank, and the micro-batches."""
    batches = [MicroBatch(engine, model, 10 * engine.rank + index, hook) for index in range(2)]
    step(*batches)  # first touch of memory
    begin = time.monotonic()
    for _ in range(steps):
        step(*batches)
    batches[1].receive_answers()
    return steps * 2 * TOKENS / (time.monotonic() - begin), batches


def is_dense(model: Model, batch: MicroBatch) -> bool:
    """Every answer of the last step, against the same in float32.

    An expert rounds h = x @ up, silu(h) (whose slope is at most 1.1) and s @ down, the combine each rank's sum and that of the
    ranks: together at most ROUNDOFF * (2.1 |h| @ |down| + 3 |answer|) of every choice, times its weight.
    """
    assert len(batch.log) == LAYERS
    for layer, x, ids, weights, answer in batch.log:
        h = torch.einsum("nd,edw->new", x.float(), model.up[layer].float())
        down = model.down[layer].float()
        answers = torch.einsum("new,ewd->ned", F.silu(h), down)
        allowed = ROUNDOFF * (2.1 * torch.einsum("new,ewd->ned", h.abs(), down.abs()) + 3 * answers.abs())
        factors = torch.zeros((x.shape[0], EXPERTS), dtype=torch.float32, device="cpu").scatter_(1, ids, weights)
        expected, bound = ((tensor * factors.unsqueeze(2)).sum(dim=1) for tensor in (answers, allowed))
        wrong = (answer.float() - expected).abs() > 1.02 * bound
        if bool(wrong.any()):
            return False
    return True


def run_rank(bootstrap: anyep.Bootstrap, steps: int) -> None:
    torch.set_num_threads(1)
    model = Model()
    num_bytes = anyep.low_latency_bytes(num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, max_tokens=TOKENS,
                                        num_ranks=bootstrap.num_ranks)
    with anyep.Engine.create(bootstrap, low_latency_bytes=num_bytes) as engine, torch.inference_mode():
        for title, hook in (("without hooks", False), ("with hooks", True)):
            rate, batches = decode(engine, model, steps, hook)
            equal = all(is_dense(model, batch) for batch in batches)
            if engine.rank == 0:
                print(f"{title}: {rate * engine.num_ranks:.0f} tokens/s, {engine.num_ranks} ranks", flush=True)
            if not equal:
                print(f"rank {engine.rank}, {title}: answers differ from the dense computation", flush=True)
                sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--steps", type=int, default=20, help="tokens per sequence (default 20)")
    options = parser.parse_args()
    if options.ranks < 1 or options.steps < 1:
        parser.error("--ranks and --steps must be at least 1")
    codes = anyep.run_processes(options.ranks, lambda bootstrap: run_rank(bootstrap, options.steps))
    equal = not any(codes)
    print("all answers of the last step against the dense computation: " + ("EQUAL" if equal else "DIFFERENT"))
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
