"""Whether a group's ranks exchange through peers' memory or through NCCL: asked once per group, answered by all alike.

Peer memory needs GPUs of one machine that reach each other over NVLink, processes that see each other (torch's
symmetric memory passes handles through the temporary folder, between process ids), and torch's symmetric memory itself.
Every rank says what it finds missing; one objection anywhere sends all ranks to NCCL, with one line in the log.

GDN_CP_EXCHANGE, or the argument `request` before it, says "auto" (the default), "nccl", or "peer", which makes what is
missing an error instead.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from gdn_cp.comm.symmetric import PeerMemory

REQUESTS = ("auto", "nccl", "peer")
DEFAULT = "auto"
VARIABLE = "GDN_CP_EXCHANGE"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What a rank tells the others: its request, where it runs, its GPU, and what it lacks by itself."""

    request: str
    place: str
    gpu: str
    problem: str = ""


# One answer per group; goes with it.
_answers: WeakKeyDictionary[dist.ProcessGroup, PeerMemory | None] = WeakKeyDictionary()


def read_request(request: str | None = None) -> str:
    """The argument, else GDN_CP_EXCHANGE, else "auto".

    Raises:
        ValueError: for anything but "auto", "nccl" and "peer".
    """
    name = "request" if request is not None else VARIABLE
    value = request if request is not None else os.environ.get(VARIABLE, "") or DEFAULT
    if value not in REQUESTS:
        raise ValueError(f'{name}: got {value!r}; choose "auto", "nccl" or "peer"')
    return value


def peer_memory(group: dist.ProcessGroup, device: torch.device, request: str | None = None) -> PeerMemory | None:
    """The group's memory for exchanges, or None where they go through the group's own collectives.

    The first call for a group of GPUs is collective, and waits on the host: all ranks make it, outside the capture of a
    CUDA graph. Its answer is kept with the group, whatever later calls request.

    Args:
        group: the ranks that exchange.
        device: this rank's device. On a CPU nothing is asked.
        request: see the module.

    Raises:
        ValueError: on every rank, where the ranks request different things, and where "peer" is requested and
            something is missing.
    """
    wanted = read_request(request)
    if device.type != "cuda" or group.size() == 1:
        if wanted == "peer" and group.size() > 1:
            raise ValueError(f'{VARIABLE}: "peer" needs GPUs, but the tensors are on {device}; choose "auto"')
        return None
    if group not in _answers:
        with torch.cuda.device(device):  # the vote's objects travel by way of the current one
            _answers[group] = _open(group, device, wanted) if _vote(group, device, wanted) else None
    return _answers[group]


def _open(group: dist.ProcessGroup, device: torch.device, wanted: str) -> PeerMemory | None:
    """The memory, tried out: a sandbox may forbid what everything that can be asked allowed."""
    memory, problem = PeerMemory(group, device), ""
    try:
        memory.open()
    except RuntimeError as error:
        problem = f"torch's symmetric memory: {error}"
    problems = [""] * group.size()
    dist.all_gather_object(problems, problem, group=group)
    return memory if decide(wanted, problems, group.rank()) else None


def _vote(group: dist.ProcessGroup, device: torch.device, wanted: str) -> bool:
    everyone: list[Facts] = [Facts("", "", "")] * group.size()
    mine = Facts(wanted, "", "") if wanted == "nccl" else _facts(wanted, device)  # of no use to anyone then
    dist.all_gather_object(everyone, mine, group=group)
    requests = {facts.request for facts in everyone}
    if len(requests) > 1:
        raise ValueError(f"{VARIABLE}: the ranks request {sorted(requests)}; set the same on all of them")
    if wanted == "nccl":
        return False
    problems = [""] * group.size()
    dist.all_gather_object(problems, find_problem(everyone, group.rank(), _linked), group=group)
    return decide(wanted, problems, group.rank())


def decide(wanted: str, problems: Sequence[str], rank: int) -> bool:
    """The vote's result from all ranks' problems ("" for none): the same on every rank, and said by the first.

    Raises:
        ValueError: with what is missing, where "peer" is requested.
    """
    found = [f"rank {index}: {problem}" for index, problem in enumerate(problems) if problem]
    if not found:
        return True
    if wanted == "peer":
        raise ValueError(f'{VARIABLE}: "peer" is not possible here ({"; ".join(found)}); choose "auto" or "nccl"')
    if rank == 0:
        logger.warning("exchange through NCCL, not through peers' memory: %s", found[0])
    return False


def find_problem(everyone: Sequence[Facts], rank: int, linked: Callable[[str, str], str]) -> str:
    """What keeps this rank from its peers, in words; "" if nothing does.

    Args:
        everyone: all ranks' facts.
        rank: this one.
        linked: function of two GPUs' ids that says what lies between them, "" for NVLink.
    """
    mine = everyone[rank]
    if mine.problem:
        return mine.problem
    for index, other in enumerate(everyone):
        if index == rank or other.problem:
            continue
        if other.place != mine.place:
            return f"rank {index} runs elsewhere (another machine, container or temporary folder)"
        if other.gpu == mine.gpu:
            return f"rank {index} shares this GPU"
        problem = linked(mine.gpu, other.gpu)
        if problem:
            return f"{problem} to rank {index}"
    return ""


def _facts(wanted: str, device: torch.device) -> Facts:
    problem = ""
    try:
        import torch.distributed._symmetric_memory as symm_mem

        if symm_mem.get_backend(device) is None:  # a build without it
            problem = "this torch has no symmetric memory for its GPU"
    except (ImportError, AttributeError, RuntimeError) as error:
        problem = f"torch's symmetric memory: {error}"
    return Facts(wanted, _place(), str(torch.cuda.get_device_properties(device).uuid), problem)


def _place() -> str:
    """The same for processes that can hand each other memory: one kernel, one space of process ids, one folder."""
    folder = os.stat(tempfile.gettempdir())
    names = [socket.gethostname(), f"{folder.st_dev}:{folder.st_ino}"]
    for read in (Path("/proc/sys/kernel/random/boot_id").read_text, Path("/proc/self/ns/pid").readlink):
        try:
            names.append(str(read()).strip())
        except OSError:  # a sandbox that hides it
            names.append("")
    return "|".join(names)


def _linked(mine: str, theirs: str) -> str:
    """What is missing between two GPUs, by their ids: "" where this process sees both and NVLink joins them."""
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    if theirs not in visible:
        return "CUDA_VISIBLE_DEVICES hides the GPU"
    if not torch.cuda.can_device_access_peer(visible[mine], visible[theirs]):
        return "no peer access"
    return _nvlink(f"GPU-{mine}", f"GPU-{theirs}")


def _nvlink(mine: str, theirs: str) -> str:
    """NVML's word on NVLink between two GPUs: "" if it joins them."""
    capability_nvlink, status_ok = 2, 0  # NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return "NVML does not start, so nobody knows of NVLink"
        handles = [ctypes.c_void_p(), ctypes.c_void_p()]
        for name, handle in zip((mine, theirs), handles, strict=True):
            if nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle)):
                return f"NVML does not know {name}"
        status = ctypes.c_int(-1)
        failed = nvml.nvmlDeviceGetP2PStatus(*handles, capability_nvlink, ctypes.byref(status))
        return "" if not failed and status.value == status_ok else "no NVLink"
    except (OSError, AttributeError) as error:
        return f"NVML: {error}"
