"""Convert a hybrid model between Hugging Face (Qwen3-Next, Qwen3.5's text model) and Megatron. No network.

    python scripts/convert_hf.py to-megatron --source Qwen-folder --target megatron-folder
    python scripts/convert_hf.py to-hf --source megatron-folder --target new-Qwen-folder

A Hugging Face folder has config.json and safetensors files. A Megatron folder has model.json (the sizes, as
gdn_cp.megatron.huggingface_config.HybridModel) and safetensors files of the whole model under the names of GPTModel.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing here is worth compiling

import tyro

from gdn_cp.megatron.huggingface import to_huggingface, to_megatron
from gdn_cp.megatron.huggingface_config import HybridModel
from gdn_cp.megatron.tensor_files import TensorFolder, write_tensors

MODEL = "model.json"


@dataclasses.dataclass(frozen=True)
class ToMegatron:
    """From a Hugging Face folder to a Megatron folder."""

    source: Path
    target: Path
    """A folder that does not exist yet, or is empty."""
    ignore: tuple[str, ...] = ()
    """Beginnings of tensor names to leave out, such as mtp. and model.visual."""
    zero_centered: bool = True
    """Norm weights hold the gain minus one: set layernorm_zero_centered_gamma alike in the job."""


@dataclasses.dataclass(frozen=True)
class ToHf:
    """From a Megatron folder to a Hugging Face folder."""

    source: Path
    target: Path
    """A folder that does not exist yet, or is empty."""
    ignore: tuple[str, ...] = ()
    """Beginnings of tensor names to leave out."""


Command = Annotated[ToMegatron, tyro.conf.subcommand("to-megatron")] | Annotated[ToHf, tyro.conf.subcommand("to-hf")]


def convert(command: ToMegatron | ToHf) -> HybridModel:
    """Do what the command line says; ValueError for what cannot be converted."""
    if command.target.exists() and any(command.target.iterdir()):
        raise ValueError(f"--target {command.target}: is not empty; name a new folder")
    tensors = TensorFolder(command.source)
    if isinstance(command, ToMegatron):
        config = json.loads((command.source / "config.json").read_text(encoding="utf-8"))
        model = HybridModel.from_huggingface(config, zero_centered=command.zero_centered)
        write_tensors(to_megatron(tensors, model, ignore=command.ignore), command.target)
        content = dataclasses.asdict(model)
    else:
        model = HybridModel.from_json(json.loads((command.source / MODEL).read_text(encoding="utf-8")))
        write_tensors(to_huggingface(tensors, model, ignore=command.ignore), command.target)
        dtype = str(tensors["embedding.word_embeddings.weight"].dtype).removeprefix("torch.")
        content = model.to_huggingface(dtype)
    name = MODEL if isinstance(command, ToMegatron) else "config.json"
    (command.target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return model


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and convert; 0 when done, 2 for what cannot be converted."""
    command = tyro.cli(Command, description=__doc__, args=arguments)  # type: ignore[arg-type]
    try:
        model = convert(command)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{command.target}: {model.family}, {model.num_layers} layers, hidden size {model.hidden_size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
