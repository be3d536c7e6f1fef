"""Who owns which token and which head, and how it travels between ranks."""

from gdn_cp.comm.all_to_all import cp_to_hp, hp_to_cp
from gdn_cp.comm.checks import assert_same_on_all_ranks
from gdn_cp.comm.layout import PaddedBatch, SegmentTable, ThdLayout, pad_cu_seqlens

__all__ = [
    "PaddedBatch",
    "SegmentTable",
    "ThdLayout",
    "assert_same_on_all_ranks",
    "cp_to_hp",
    "hp_to_cp",
    "pad_cu_seqlens",
]
