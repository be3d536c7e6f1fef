"""Train a proxy of a hybrid model (Gated DeltaNet and full attention) on real text, on one rank or under torchrun.

    python scripts/train_proxy.py tiny --steps 20
    torchrun --nproc-per-node 2 scripts/train_proxy.py tiny --cp 2
    torchrun --nproc-per-node 8 scripts/train_proxy.py qwen3-next-proxy --cp 8 --resume auto

`train_proxy.py PRESET --help` lists every choice.
"""

from __future__ import annotations

import os
import sys
import warnings

import torch

if not torch.cuda.is_available():  # Megatron compiles small functions, which on a CPU needs a C++ compiler
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # orders Megatron's communication before its products
for message in (
    ".*(Transformer Engine|Apex).*not installed.*",
    "full scope is deprecated.*",
    ".*_tensor` is deprecated.*",
):
    warnings.filterwarnings("ignore", message=message)

import tyro  # noqa: E402  (imports follow the settings that they must see)
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402

from gdn_cp.training.presets import PRESETS  # noqa: E402


@record
def main() -> int:
    """Parse the command line and train; 0 when trained, 2 for a choice that cannot work."""
    config = tyro.extras.overridable_config_cli(PRESETS, config=(tyro.conf.OmitArgPrefixes,), description=__doc__)
    from gdn_cp.training.loop import train

    try:
        train(config)
    except ValueError as error:
        print(f"error (rank {os.environ.get('RANK', '0')}): {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
