"""A check that the ranks of a group agree on a batch, for data loaders and for finding out why numbers differ."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist

from gdn_cp.comm.layout import ThdLayout


def assert_same_on_all_ranks(layout: ThdLayout, group: dist.ProcessGroup | None) -> None:
    """Raise ValueError on every rank of `group`, naming the ranks that differ, unless all were given equal layouts.

    Compares a 64-bit digest of kind, cp_size and lengths: one all-gather of 8 bytes per rank, and on GPUs one
    synchronisation, so call it while loading data and not in every layer. Under NCCL the digest travels by way of the
    current GPU, so set that before. `group` None is one rank: nothing to compare.
    The ranks said to differ are those that do not have the most frequent layout (on a tie, rank 0's counts as right).
    """
    if group is None:
        return
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    mine = torch.tensor([layout.digest()], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(gathered, mine, group=group)
    digests = [int(digest) for digest in torch.cat(gathered).tolist()]
    common = Counter(digests).most_common(1)[0][0]  # equal counts come in order of first appearance
    differing = [rank for rank, digest in enumerate(digests) if digest != common]
    if differing:
        raise ValueError(
            f"layout: ranks {differing} of the group were given another layout than the rest; this rank {group.rank()} "
            f"has {layout!r}; every rank must build it from the same cu_seqlens, seqlens and cp_size"
        )
