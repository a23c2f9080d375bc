#!/usr/bin/env python3
"""Trains a small Mixture-of-Experts language model with its experts spread over ranks, and compares with one process.

Two layers of causal attention and 16 experts, two per token, read the documents of this repository byte by byte. Sequences of
a batch are split over the ranks (data parallelism: gradients of everything but the experts are added up), experts too (expert
parallelism: anyep.torch moves the tokens).

    python3 examples/train_moe.py                        # 2 ranks, then the same in one process, and both curves compared
    python3 examples/train_moe.py --ranks 4 --steps 100
    torchrun --nproc-per-node 2 examples/train_moe.py    # torchrun starts the ranks
    python3 examples/train_moe.py --dense                # one process only, without anyep's engine

The routing of the last step goes to a trace file, which `anyep bench --trace FILE` replays.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F

from anyep.torch import ExpertParallel, create_engine, local_experts
from anyep.workload import Batch, write_trace

LAYERS, EXPERTS, TOP_K, HIDDEN = 2, 16, 2, 128
SEQUENCES, LENGTH = 16, 64  # of a batch, over all ranks

# Both runs add the same float32 numbers in another order (2^-24 of a sum each), and every step carries the difference on. A
# token whose second and third expert are equal to that many digits may also change its expert.
TOLERANCE = 1e-3


class Expert(torch.nn.Module):
    """One expert. Its first weights depend on its layer and global id, not on the rank that it lives on."""

    def __init__(self, layer: int, expert: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * layer + expert + 1)
            self.up = torch.nn.Linear(HIDDEN, 2 * HIDDEN, dtype=torch.float32)
            self.down = torch.nn.Linear(2 * HIDDEN, HIDDEN, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class DenseExperts(torch.nn.Module):
    """What ExpertParallel computes, in one process: the definition."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(Expert(layer, expert) for expert in range(EXPERTS))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for expert, module in enumerate(self.experts):
            token, choice = (ids == expert).nonzero(as_tuple=True)
            y = y.index_add(0, token, module(x[token]) * weights[token, choice].unsqueeze(1))
        return y


class Layer(torch.nn.Module):
    """Causal attention, then the experts that a gate chooses, each added to what came in."""

    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(HIDDEN, 3 * HIDDEN, bias=False, dtype=torch.float32)
        self.gate = torch.nn.Linear(HIDDEN, EXPERTS, bias=False, dtype=torch.float32)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(HIDDEN, dtype=torch.float32) for _ in range(2))
        self.moe = experts
        self.chosen: Optional[Tuple[torch.Tensor, torch.Tensor]] = None  # (ids, weights) of the last call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(self.norms[0](x)).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        tokens = self.norms[1](x).reshape(-1, HIDDEN)
        weights, ids = self.gate(tokens).softmax(dim=-1).topk(TOP_K)
        self.chosen = ids, weights.detach()
        return x + self.moe(tokens, ids, weights).view_as(x)


class Model(torch.nn.Module):
    def __init__(self, make_experts: Callable[[int], torch.nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(256, HIDDEN, dtype=torch.float32)
        self.position = torch.nn.Parameter(torch.randn(LENGTH, HIDDEN, dtype=torch.float32) * 0.1)
        self.layers = torch.nn.ModuleList(Layer(make_experts(layer)) for layer in range(LAYERS))
        self.head = torch.nn.Linear(HIDDEN, 256, dtype=torch.float32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def shared_parameters(self) -> List[torch.nn.Parameter]:
        """Those that every rank holds: all but the experts'."""
        return [parameter for name, parameter in self.named_parameters() if ".moe." not in name]


def read_text() -> torch.Tensor:
    """The documents, as one long int64 tensor of bytes."""
    root = Path(__file__).resolve().parent.parent
    text = b"".join(path.read_bytes() for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))])
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def sequences_of(text: torch.Tensor, step: int, rank: int, num_ranks: int) -> torch.Tensor:
    """This rank's part of a step's batch, [n, LENGTH + 1]; the batch depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    begins = torch.randint(len(text) - LENGTH, (SEQUENCES,), generator=generator, dtype=torch.int64)
    mine = local_experts(SEQUENCES, num_ranks, rank)  # blocks of nearly equal size serve for sequences as well
    return torch.stack([text[begin : begin + LENGTH + 1] for begin in begins[mine.start : mine.stop].tolist()])


def train(model: Model, options: Any, rank: int, num_ranks: int, progress: Callable[[int, float], None]) -> List[float]:
    """Losses of all steps: means over all ranks' tokens."""
    text = read_text()
    # The large eps keeps rounding errors of gradients near 0 from becoming steps of full size.
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, eps=1e-5)
    losses = []
    for step in range(options.steps):
        sequences = sequences_of(text, step, rank, num_ranks)
        logits = model(sequences[:, :-1])
        # A share of the mean over the whole batch, so that gradients of all ranks add up to those of one process.
        loss = F.cross_entropy(logits.reshape(-1, 256), sequences[:, 1:].reshape(-1), reduction="sum") / (SEQUENCES * LENGTH)
        optimizer.zero_grad()
        loss.backward()
        losses.append(add_up(model, loss.detach()) if num_ranks > 1 else loss.item())
        optimizer.step()
        progress(step, losses[-1])
    return losses


def add_up(model: Model, loss: torch.Tensor) -> float:
    """Adds the shared parameters' gradients, and the loss, of all ranks: one message. Experts have theirs already."""
    parameters = model.shared_parameters()
    flat = torch.cat([loss.reshape(1), *(parameter.grad.reshape(-1) for parameter in parameters)])
    dist.all_reduce(flat)
    parts = flat[1:].split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts):
        parameter.grad.copy_(part.view_as(parameter))
    return flat[0].item()


def gathered_routing(model: Model, num_ranks: int) -> Batch:
    """The first layer's choices in the last step, of all ranks."""
    parts: List[Any] = [None] * num_ranks
    dist.all_gather_object(parts, model.layers[0].chosen)
    ids, weights = (torch.cat(tensors) for tensors in zip(*parts))
    return Batch([len(part[0]) for part in parts], ids, weights, EXPERTS)


def shown_progress(title: str, options: Any, show: bool) -> Callable[[int, float], None]:
    """A bar where there is a terminal (and rich), else every tenth step on a line; nothing on other ranks."""
    if not show:
        return lambda step, loss: None
    if sys.stdout.isatty():
        try:
            from rich.progress import Progress
        except ImportError:
            pass
        else:
            bar = Progress()
            bar.start()
            task = bar.add_task(title, total=options.steps)

            def advance(step: int, loss: float) -> None:
                bar.update(task, completed=step + 1, description=f"{title}: loss {loss:.4f}")
                if step + 1 == options.steps:
                    bar.stop()

            return advance

    def line(step: int, loss: float) -> None:
        if step % 10 == 0 or step + 1 == options.steps:
            print(f"{title}: step {step:3}  loss {loss:.6f}", flush=True)

    return line


def report(title: str, losses: List[float], seconds: float) -> None:
    print(f"{title}: loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps, {seconds:.1f} s", flush=True)


def run_dense(options: Any) -> List[float]:
    begin = time.monotonic()
    losses = train(Model(DenseExperts), options, 0, 1, shown_progress("dense", options, True))
    report("dense", losses, time.monotonic() - begin)
    return losses


def run_rank(options: Any) -> bool:
    """One rank, in an initialised process group. True: the curves are equal, or were not compared."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    begin = time.monotonic()
    with create_engine(dist.group.WORLD, hidden=HIDDEN, num_tokens=SEQUENCES * LENGTH) as engine:
        def make_experts(layer: int) -> ExpertParallel:
            mine = [Expert(layer, expert) for expert in local_experts(EXPERTS, num_ranks, rank)]
            return ExpertParallel(mine, EXPERTS, engine)

        model = Model(make_experts)
        losses = train(model, options, rank, num_ranks, shown_progress(f"{num_ranks} ranks", options, rank == 0))
    routing = gathered_routing(model, num_ranks)
    if rank != 0:
        return True
    report(f"{num_ranks} ranks", losses, time.monotonic() - begin)
    write_trace(options.trace, routing)
    print(f"routing of the last step: {options.trace}\n"
          f"replay it: anyep bench --trace {options.trace} --ranks {num_ranks} --experts {EXPERTS} --hidden {HIDDEN}")
    return compare(losses, run_dense(options)) if options.check else True


def compare(losses: List[float], dense: List[float]) -> bool:
    largest = max(abs(a - b) for a, b in zip(losses, dense))
    equal = largest <= TOLERANCE
    print(f"largest difference of the losses {largest:.1e}, allowed {TOLERANCE:.0e}: {'EQUAL' if equal else 'DIFFERENT'}")
    return equal


def forked(rank: int, num_ranks: int, folder: str, options: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks,
                            timeout=datetime.timedelta(minutes=5))
    equal = run_rank(options)
    dist.destroy_process_group()
    if not equal:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes to start, at most 16 (default 2)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--trace", default="train_moe.trace", help="file for the routing (default train_moe.trace)")
    parser.add_argument("--dense", action="store_true", help="one process only")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="compare with one process")
    options = parser.parse_args()
    if not 1 <= options.ranks <= SEQUENCES or options.steps < 1:
        parser.error(f"--ranks must be 1..{SEQUENCES}, --steps at least 1")
    torch.set_num_threads(1)
    if options.dense:
        run_dense(options)
    elif "LOCAL_RANK" in os.environ:  # torchrun
        dist.init_process_group("gloo")
        equal = run_rank(options)
        dist.destroy_process_group()
        sys.exit(0 if equal else 1)
    else:
        with tempfile.TemporaryDirectory() as folder:
            # Forked before anything runs: torch need not be imported again by every rank.
            torch.multiprocessing.start_processes(forked, (options.ranks, folder, options), options.ranks, start_method="fork")


if __name__ == "__main__":
    main()
