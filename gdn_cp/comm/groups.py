"""The process groups of two-dimensional context parallelism: neighbours trade heads, same-head ranks pass states.

With a = `a2a_size`, rank r of a context-parallel group of P belongs to

- one a2a group: the a neighbours [g*a, (g+1)*a), g = r // a, which all-to-all tokens against heads;
- one state group: the P/a ranks with the same r % a. After the all-to-all they hold the same heads of different
  segments, so they alone need each other's states. Rank g of it is the member of a2a group g.

Example, P = 4, a = 2: a2a groups {0 1} {2 3}, state groups {0 2} {1 3}.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist

from gdn_cp.comm.lengths import read_size


@dataclass(frozen=True)
class CpGroups:
    """This rank's groups for one (context-parallel group, a2a_size), immutable.

    `cp_groups` makes them. Whoever has such groups already (one node's ranks, one rank of each node) may build the
    object from them: `a2a` is None if `a2a_size` is 1, `states` is None if it is the whole group's size.
    """

    full: dist.ProcessGroup
    a2a_size: int
    a2a: dist.ProcessGroup | None
    states: dist.ProcessGroup | None

    def __post_init__(self) -> None:
        size = check_a2a_size(self.a2a_size, self.full.size())
        for name, group, expected in (
            ("a2a", self.a2a, size),
            ("states", self.states, self.full.size() // size),
        ):
            actual = 1 if group is None else group.size()
            if actual != expected:
                raise ValueError(
                    f"{name}: has {actual} rank(s), expected {expected} for a2a_size = {size} of {self.full.size()} "
                    "ranks; let gdn_cp.comm.groups.cp_groups make the groups"
                )

    @property
    def group_index(self) -> int:
        """Which a2a group this rank is in, g = r // a: the index of its segments in the layout."""
        return self.full.rank() // self.a2a_size

    @property
    def head_index(self) -> int:
        """Which share of the heads this rank runs, r % a."""
        return self.full.rank() % self.a2a_size


_Pair = tuple[dist.ProcessGroup, dist.ProcessGroup]
# Holds no reference to the key, and so lets it go; only groups that were made here stand in it.
_made: WeakKeyDictionary[dist.ProcessGroup, dict[int, _Pair]] = WeakKeyDictionary()


def cp_groups(group: dist.ProcessGroup, a2a_size: int, timeout: timedelta | None = None) -> CpGroups:
    """Return this rank's a2a group and state group within `group`.

    The first call for a pair (group, a2a_size) with 1 < a2a_size < size is collective over `group`: all its ranks make
    it, in the same order relative to their other collectives. Ranks outside `group` need not take part. Later calls
    for the pair, and calls for the sizes 1 and all, communicate nothing. The groups end with
    `dist.destroy_process_group()`; `group` itself is not kept alive, and a group made anew gets new ones.
    Call once before capturing a CUDA graph. `timeout` is that of the new groups' collectives; None: PyTorch's default.
    Under NCCL the first call needs each rank's GPU to be the current one (`torch.cuda.set_device`), by way of which
    PyTorch gathers objects.

    Raises ValueError, before any collective, if a2a_size does not divide the group's size.
    """
    size = check_a2a_size(a2a_size, group.size())
    if size == group.size():
        return CpGroups(group, size, a2a=group if size > 1 else None, states=None)
    if size == 1:
        return CpGroups(group, size, a2a=None, states=group)
    made = _made.setdefault(group, {})
    if size not in made:
        made[size] = _make_groups(group, size, timeout)
    return CpGroups(group, size, *made[size])


def check_a2a_size(a2a_size: int, cp_size: int) -> int:
    """Return a2a_size as an int that divides cp_size; ValueError naming the possible values otherwise."""
    size = read_size(a2a_size, "a2a_size")
    if cp_size % size:
        divisors = [d for d in range(1, cp_size + 1) if cp_size % d == 0]
        raise ValueError(f"a2a_size: got {size}; it must divide cp_size = {cp_size}: one of {divisors}")
    return size


def _make_groups(group: dist.ProcessGroup, a2a_size: int, timeout: timedelta | None) -> _Pair:
    ranks = dist.get_process_group_ranks(group)  # global ranks
    size, (index, head) = len(ranks), divmod(group.rank(), a2a_size)
    neighbours = [list(range(first, first + a2a_size)) for first in range(0, size, a2a_size)]
    same_heads = [list(range(first, size, a2a_size)) for first in range(a2a_size)]
    wanted = ((neighbours, index, "gdn_cp_a2a"), (same_heads, head, "gdn_cp_states"))
    made = []
    with _unused_names(group):
        for parts, mine, description in wanted:
            if _splits(group):
                part = dist.split_group(group, parts, timeout=timeout, group_desc=description)
            else:
                members = [ranks[member] for member in parts[mine]]
                part = dist.new_group(members, timeout, use_local_synchronization=True, group_desc=description)
            assert isinstance(part, dist.ProcessGroup)
            made.append(part)
    return made[0], made[1]


def _splits(group: dist.ProcessGroup) -> bool:
    """Whether subgroups have to be split from `group`.

    Where the world is bound to devices (`init_process_group(device_id=...)`), `new_group` splits NCCL's communicator of
    the whole world, for which ranks outside `group` would have to call too.
    """
    assert dist.group.WORLD is not None
    return dist.group.WORLD.bound_device_id is not None and "nccl" in dist.get_backend(group)


_names_used = 0


@contextmanager
def _unused_names(group: dist.ProcessGroup) -> Iterator[None]:
    """Let the ranks of `group` make groups of equal names, which none of them has used before.

    PyTorch names a locally synchronised group after its ranks and the number of groups that this process is in. Where
    that number differs (members of other groups, too) the ranks wait for each other for ever; where a group was
    destroyed it recurs, and the new group meets the old one's addresses in the store. So all agree on a number that is
    new to each of them, and reach it with groups of their own, which cost nothing and end here.
    """
    global _names_used
    world = getattr(dist.distributed_c10d, "_world", None)
    names = getattr(world, "pg_names", ())
    proposals: list[int] = [0] * group.size()
    dist.all_gather_object(proposals, max(len(names), _names_used), group=group)
    alone = [dist.get_rank()]
    fillers = [dist.new_group(alone, use_local_synchronization=True) for _ in range(max(proposals) - len(names))]
    yield
    _names_used = max(proposals) + 2
    for filler in fillers:
        assert isinstance(filler, dist.ProcessGroup)
        dist.destroy_process_group(filler)
