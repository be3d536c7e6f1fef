"""The process groups of two-dimensional context parallelism: neighbours trade heads, same-head ranks pass states.

With a = `a2a_size`, rank r of a context-parallel group of P belongs to

- one a2a group: the a neighbours [g*a, (g+1)*a), g = r // a, which all-to-all tokens against heads;
- one state group: the P/a ranks with the same r % a. After the all-to-all they hold the same heads of different
  segments, so they alone need each other's states. Rank g of it is the member of a2a group g.

Example, P = 4, a = 2: a2a groups {0 1} {2 3}, state groups {0 2} {1 3}.
"""

from __future__ import annotations

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
    it, in the same order relative to the other groups that they make. It creates two groups with
    `new_group(..., use_local_synchronization=True)`, so ranks outside `group` need not take part; PyTorch then asks
    that the ranks of `group` are members of equally many groups. Later calls for the pair, and calls for the sizes 1
    and all, communicate nothing. The groups end with `dist.destroy_process_group()`; `group` itself is not kept alive.
    Call once before capturing a CUDA graph. `timeout` is that of the new groups' collectives; None: PyTorch's default.

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
    index, head = divmod(group.rank(), a2a_size)
    neighbours = ranks[index * a2a_size : (index + 1) * a2a_size]
    a2a = dist.new_group(neighbours, timeout, use_local_synchronization=True, group_desc="gdn_cp_a2a")
    states = dist.new_group(ranks[head::a2a_size], timeout, use_local_synchronization=True, group_desc="gdn_cp_states")
    assert isinstance(a2a, dist.ProcessGroup)
    assert isinstance(states, dist.ProcessGroup)
    return a2a, states
