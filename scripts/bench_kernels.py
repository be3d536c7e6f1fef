"""Time the kernels on a GPU, against other implementations and against the memory's speed.

    python scripts/bench_kernels.py chunk  --output benchmarks/results/chunk.json     # the delta rule
    python scripts/bench_kernels.py decode --output benchmarks/results/decode.json    # one token from a bank of states
    python scripts/bench_kernels.py gate   --output benchmarks/results/gate.json      # the decay gate

Results are compared with float64 before anything is timed, and what is wrong is not timed. (The one exception:
flash-linear-attention refuses to run on Hopper with Triton before 3.7.1. Its refusal is switched off to time it, and
the error that it makes is in the output.) Draw the files with scripts/plot_bench.py. Without a GPU small shapes run
too, timed eagerly: that tries the script, and nothing else.
"""

from __future__ import annotations

import sys
from typing import Annotated

import tyro
from bench_chunk import Chunk, run_chunk
from bench_decode import Decode, run_decode
from bench_gate import Gate, run_gate

Command = (
    Annotated[Chunk, tyro.conf.subcommand("chunk")]
    | Annotated[Decode, tyro.conf.subcommand("decode")]
    | Annotated[Gate, tyro.conf.subcommand("gate")]
)


def main(command: Chunk | Decode | Gate) -> int:
    """Run one benchmark; 1 if a result of ours is wrong."""
    if isinstance(command, Chunk):
        return run_chunk(command)
    return run_decode(command) if isinstance(command, Decode) else run_gate(command)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Command)))  # type: ignore[arg-type]
