"""Expert parallelism in torch programs: autograd functions, and a module around the user's experts.

A layer of a model takes ten lines::

    import torch.distributed as dist                                         # after dist.init_process_group
    from anyep.torch import ExpertParallel, create_engine, local_experts

    engine = create_engine(dist.group.WORLD, hidden=512, num_tokens=4096)    # once, for all layers
    mine = local_experts(64, engine.num_ranks, engine.rank)                  # global ids of the experts that live here
    moe = ExpertParallel(torch.nn.ModuleList(Expert(512) for _ in mine), 64, engine)

    topk_weights, topk_ids = router(x).softmax(dim=-1).topk(8)               # x: [num_tokens, 512]
    y = moe(x, topk_ids, topk_weights)                                       # [num_tokens, 512]
    loss(y).backward()                                                       # on every rank, also one without tokens
    engine.close()

Every rank calls layers in the same order. Backward then is in the same order everywhere too, without any care: autograd runs
the nodes of one graph on the CPU in one thread and takes the youngest that is ready first, so the nodes of these calls run in
the reverse order of forward. docs/python/torch.md has the contract and the bounds of the gradients.
"""

from __future__ import annotations

from .experts import ExpertParallel, create_engine, local_experts, rows_bytes_for
from .functions import combine, dispatch

__all__ = ["ExpertParallel", "combine", "create_engine", "dispatch", "local_experts", "rows_bytes_for"]
