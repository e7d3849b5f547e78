"""Export trained adapters and projectors for PyTorch."""

import argparse
import dataclasses
import os
import re
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from etils import epath

from emollama_jax import __version__
from emollama_jax.cli._arguments import VerbParser
from emollama_jax.errors import UserError
from emollama_jax.io.atomic import atomic_folder
from emollama_jax.io.hub import push_folder
from emollama_jax.io.paths import PathLike, as_path
from emollama_jax.models.layers import FLOAT_DTYPES
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.runs.model_card import hub_base, model_card
from emollama_jax.runs.run import Run
from emollama_jax.weights.base_checkpoint import is_base_checkpoint, read_manifest
from emollama_jax.weights.locate import SCHEME
from emollama_jax.weights.model_identity import UNKNOWN, identify_model
from emollama_jax.weights.pretrained import load_base_tokenizer, load_llama, read_carried, save_hugging_face
from emollama_jax.weights.trained import TrainedWeights, load_adapters, open_trained
from emollama_jax.weights.trained_export import write_folder, write_projectors, write_pth


def run(argv: list[str]) -> None:
    arguments = make_parser().parse_args(argv)
    if arguments.to == "hf" and not arguments.base:
        raise UserError("--base: --to hf needs the language model that the adapters are added to")
    if arguments.to == "pth" and arguments.base:
        raise UserError("--base: not with --to pth, whose record of the language model is the input's")
    if arguments.adapter_name is not None and arguments.to != "pth":
        raise UserError("--adapter-name: only for --to pth; PEFT folders have no name there")
    if arguments.adapter_name and "." in arguments.adapter_name:
        raise UserError(f"--adapter-name {arguments.adapter_name}: a name has no dots; choose another")
    if arguments.alpha is not None and (arguments.alpha <= 0 or arguments.input.is_dir()):
        raise UserError(f"--alpha {arguments.alpha:g}: above 0, and only for a .pth; a folder records its own")
    repo = _repo(arguments)
    jax.config.update("jax_platforms", "cpu")  # the host has the memory, and nothing here needs an accelerator
    run = Run.find(arguments.input)
    trained = run.trained_weights() if run else open_trained(arguments.input, alpha=arguments.alpha)
    trained = _with_base(trained, arguments)
    tensors, lora = trained.reference_tensors(), trained.lora
    print(
        f"read    {len(tensors)} tensors of {arguments.input}: rank {lora.rank}, alpha {lora.alpha:g}, "
        f"on {', '.join(lora.targets)}"
    )
    print(f"dropped {', '.join(trained.dropped) or 'nothing'}")
    print(f"carried {', '.join(trained.carried()) or 'nothing'}")
    if repo:
        card = model_card(repo, trained, run, arguments.licence)
        _push(repo, card, dataclasses.replace(trained, base=hub_base(trained)), tensors, arguments)
        return
    for line in _write(arguments, trained, tensors):
        print(f"wrote   {line}")


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama export",
        description="Reads the trained weights of Emotion-LLaMA (a .pth of the reference or of MiniGPT-v2, a PEFT "
        "folder with projectors.safetensors, or the folder of a run or of one of its checkpoints) and writes them in "
        "one of the forms that PyTorch loads: the reference's .pth, a PEFT folder with the projectors beside it, or a "
        "whole language model with the adapters added to its weights.",
        epilog="example: emollama export Emotion_LLaMA.pth adapter --to peft",
    )
    parser.add_argument("input", type=epath.Path, help="file or folder to read")
    parser.add_argument(
        "output",
        type=epath.Path,
        help="file (pth) or folder to write, which must not exist; or, with --to peft, hf://USER/NAME, a model of the "
        "Hugging Face hub to push to, with a model card, which is shown first",
    )
    parser.add_argument("--to", choices=("pth", "peft", "hf"), required=True, help="what to write")
    parser.add_argument(
        "--base",
        type=epath.Path,
        help="the language model: for --to hf any that emollama convert reads; for --to peft the name or Hugging Face "
        "folder that is recorded for PEFT's AutoPeftModelForCausalLM (default: as the input records it)",
    )
    parser.add_argument(
        "--any-base",
        action="store_true",
        help="take another language model than the input was trained on; without --base, record none",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        help=f"the α of the adapters in a .pth, which does not record it (default: {LoRAConfig().alpha:g})",
    )
    parser.add_argument(
        "--adapter-name",
        metavar="NAME",
        help="for --to pth: write lora_A.NAME.weight, as newer PEFT versions do with 'default' (default: as read)",
    )
    parser.add_argument(
        "--dtype", choices=FLOAT_DTYPES, default="bfloat16", help="of the model of --to hf (default: %(default)s)"
    )
    group = parser.add_argument_group("the model on the hub")
    group.add_argument("--yes", action="store_true", help="push without asking")
    group.add_argument("--public", action="store_true", help="for all to see, where it is new (default: private)")
    group.add_argument(
        "--licence", metavar="NAME", default="other", help="as the hub calls it, as in llama2 (default: %(default)s)"
    )
    return parser


def _repo(arguments: argparse.Namespace) -> str:
    """The name of the model on the hub that is to be pushed to; "" for a file or folder."""
    text = os.fspath(arguments.output)
    if not text.startswith(SCHEME):
        if arguments.yes or arguments.public or arguments.licence != "other":
            raise UserError("--yes, --public and --licence go with an output hf://USER/NAME")
        return ""
    repo = text.removeprefix(SCHEME)
    if arguments.to != "peft" or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise UserError(f"{text}: write hf://USER/NAME --to peft; other forms are written into a folder")
    if not arguments.yes and not sys.stdin.isatty():
        raise UserError(
            f"{text}: nothing is pushed without being asked; add --yes where there is no terminal to ask at"
        )
    return repo


def _push(
    repo: str, card: str, trained: TrainedWeights, tensors: dict[str, np.ndarray], arguments: argparse.Namespace
) -> None:
    """Shows what is to be pushed, asks, and pushes it."""
    with tempfile.TemporaryDirectory(prefix="emollama-") as name:
        folder = Path(name)
        recorded = {"base": trained.base, "base_identity": trained.base_identity}
        write_folder(folder, tensors, trained.lora, adapter_name=trained.adapter_name, **recorded)
        (folder / "README.md").write_text(card, encoding="utf-8")
        print(card)
        for file in sorted(folder.iterdir()):
            print(f"{file.stat().st_size:>13,} {file.name}")
        seen = "public" if arguments.public else "private"
        if not arguments.yes and input(f"push these files to {repo} ({seen} where it is new)? [y/N] ").lower() != "y":
            print("nothing was pushed")
            return
        message = f"Adapters and projectors, by emollama_jax {__version__}"
        print(f"pushed  {push_folder(folder, repo, private=not arguments.public, message=message)}")


def _with_base(trained: TrainedWeights, arguments: argparse.Namespace) -> TrainedWeights:
    """The trained weights with the name and the identity of their language model as they are to be recorded.

    Raises:
        UserError: the language model that is given is another than they were trained on, or PEFT cannot load it.
    """
    base, known = arguments.base, UNKNOWN if arguments.any_base else trained.base_identity
    if base is None:
        name = "" if arguments.any_base else _name_for_peft(trained.base)
        return dataclasses.replace(trained, base=name, base_identity=known)
    if base.exists() and (known or arguments.to == "peft"):
        found = identify_model(base)
        if known:
            trained.check_base(base, found)
        known = known or found
    name = _name_for_peft(base)
    if arguments.to == "peft" and not name:
        raise UserError(f"--base: PEFT cannot load a base checkpoint: {base}; give the model that it was made of")
    return dataclasses.replace(trained, base=name, base_identity=known)


def _name_for_peft(base: PathLike) -> str:
    """The name or folder by which PEFT loads a language model, for a base checkpoint that of the model it was made of;
    "" where nobody knows it."""
    if base and is_base_checkpoint(base):
        manifest = read_manifest(base)
        return manifest["source"] if manifest.get("origin") else ""
    return os.fspath(as_path(base) if base and as_path(base).exists() else base)


def _write(arguments: argparse.Namespace, trained: TrainedWeights, tensors: dict[str, np.ndarray]) -> list[str]:
    output, recorded = arguments.output, {"base": trained.base, "base_identity": trained.base_identity}
    if arguments.to == "pth":
        name = trained.adapter_name if arguments.adapter_name is None else arguments.adapter_name
        written = write_pth(output, tensors, adapter_name=name, **recorded)
        alpha = trained.lora.alpha
        unusual = f", to be read with alpha {alpha:g}, which it does not record" if alpha != LoRAConfig().alpha else ""
        return [f"{output}: {len(written)} tensors{unusual}"]
    with atomic_folder(output) as folder:
        if arguments.to == "peft":
            written = write_folder(folder, tensors, trained.lora, adapter_name=trained.adapter_name, **recorded)
            of = f" of {trained.base}" if trained.base else ""
            return [f"{output}: a PEFT adapter{of} and the projectors, {len(written)} tensors"]
        is_base = is_base_checkpoint(arguments.base)
        kernel_dtype = read_manifest(arguments.base)["llama"].kernel_dtype if is_base else arguments.dtype
        model, _ = load_llama(arguments.base, lora=trained.lora, param_dtype=arguments.dtype, kernel_dtype=kernel_dtype)
        tokenizer = load_base_tokenizer(arguments.base, model.config.vocab_size)
        load_adapters(model, trained)
        carried = read_carried(arguments.base)
        save_hugging_face(folder, model, tokenizer, dtype=arguments.dtype, merge_adapters=True, carried=carried)
        written = write_projectors(folder, tensors)
    return [
        f"{output}: {arguments.base} with the adapters added, a Hugging Face folder in {arguments.dtype}",
        f"{output / 'projectors.safetensors'}: the projectors, {len(written)} tensors",
    ]
