"""How the backward of the delta rule is cut into slices of chunks, and how many programs walk in one: numbers only.

The buffers of all chunks, above all the states and their gradients, are far larger than the activations. A slice is as
many consecutive chunks as fit into a fixed number of bytes; see `chunk_bwd`.

Dimensions: HV value heads, K, V head dims.
"""

from __future__ import annotations

from gdn_cp.kernels.configs import cdiv, power_of_2
from gdn_cp.kernels.tables import CHUNK

# Buffers of one slice: small beside the activations of the batches that are cut, large enough to fill the card.
SLICE_BYTES = 384 * 2**20
# Where memory counts more than a few launches, two slices from this size on: half the buffers, and 128 programs still.
LEAN_BYTES = 128 * 2**20


def chain_columns(walks: int, V: int, processors: int) -> int:
    """Columns of the state per program, 16 to 64: the fewest with which the programs of `walks` all run at once.

    >>> chain_columns(8, 128, 132), chain_columns(16, 128, 132), chain_columns(64, 128, 132)
    (16, 32, 64)
    """
    columns = max(16, min(64, power_of_2(V)))
    while columns > 16 and walks * 2 * cdiv(V, columns // 2) <= processors:
        columns //= 2
    return columns


def slice_chunks(num_chunks: int, HV: int, K: int, V: int, element_size: int = 2, lean: bool = False) -> int:
    """Chunks of a slice when num_chunks are too many for one set of buffers of SLICE_BYTES, else 0 (no slices).

    With `lean` they are two slices at least when they take more than LEAN_BYTES in one.
    """
    per_chunk = HV * (2 * K * V + CHUNK * (max(K, 2 * CHUNK) + 2 * V)) * element_size
    slices = cdiv(num_chunks, max(SLICE_BYTES // per_chunk, 16))
    if lean and num_chunks > max(LEAN_BYTES // per_chunk, 16):
        slices = max(slices, 2)
    return cdiv(num_chunks, slices) if slices > 1 else 0


def concurrent_pieces(num_pieces: int, num_chunks: int, size: int) -> int:
    """Pieces of which a slice of `size` chunks holds a part, if they are equally long; whole sequences count as one.

    >>> concurrent_pieces(4, 2048, 410), concurrent_pieces(4, 2048, 2048)
    (2, 4)
    """
    return min(num_pieces, 1 + cdiv((num_pieces - 1) * size, max(num_chunks, 1)))


def summary_chunks(num_chunks: int, HV: int, K: int, element_size: int = 2) -> int:
    """Chunks of a slice when only gradients of states are walked, which needs X and Y and nothing else; at least 1."""
    fitting = max(SLICE_BYTES // (HV * CHUNK * (K + CHUNK) * element_size), 16)
    slices = -(-num_chunks // fitting)
    return -(-num_chunks // max(slices, 1)) or 1
