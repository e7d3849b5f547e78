"""Convert a language model between weight formats."""

import argparse
from pathlib import Path

import jax
from etils import epath

from emollama_jax.cli._arguments import VerbParser
from emollama_jax.errors import UserError
from emollama_jax.io.atomic import atomic_folder
from emollama_jax.models.layers import FLOAT_DTYPES, QUANTISED
from emollama_jax.models.llama import LlamaConfig
from emollama_jax.models.lora import merge
from emollama_jax.weights.base_checkpoint import is_base_checkpoint, read_manifest, save_base
from emollama_jax.weights.convert import source_name, write_base_from
from emollama_jax.weights.llama import architecture
from emollama_jax.weights.model_identity import check_base, identify_model
from emollama_jax.weights.peft import adapter_base, adapter_config, load_adapter
from emollama_jax.weights.pretrained import (
    NO_LORA,
    load_base_tokenizer,
    load_llama,
    read_carried,
    save_hugging_face,
    save_settings,
)
from emollama_jax.weights.sources import open_source


def run(argv: list[str]) -> None:
    arguments = make_parser().parse_args(argv)
    if arguments.kernel_dtype in QUANTISED and (arguments.to == "hf" or arguments.adapter):
        raise UserError(
            f"--kernel-dtype {arguments.kernel_dtype}: neither with --to hf nor with --adapter; "
            "write the merged model with --to hf, then convert that"
        )
    if arguments.any_base and not arguments.adapter:
        raise UserError("--any-base: goes with --adapter")
    jax.config.update("jax_platforms", "cpu")  # the host has the memory, and nothing here needs an accelerator
    with atomic_folder(arguments.output) as folder:
        _convert(arguments, folder)


def make_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="emollama convert",
        description="Reads a LLaMA model (a Hugging Face folder with safetensors or .bin files, a Flax folder, a GGUF "
        "file, or a base checkpoint) and writes it, with its tokenizer, as a base checkpoint, which is what training "
        "and prediction load, or as a Hugging Face folder, which is what torch loads.",
    )
    parser.add_argument("input", type=epath.Path, help="folder or file to read, or ORG/NAME of the Hugging Face hub")
    parser.add_argument("output", type=epath.Path, help="folder to write; must not exist")
    parser.add_argument("--to", choices=("base", "hf"), default="base", help="what to write (default: %(default)s)")
    parser.add_argument("--adapter", type=epath.Path, help="PEFT folder whose LoRA is added to the weights")
    parser.add_argument(
        "--any-base", action="store_true", help="add it to another language model than it was trained on"
    )
    parser.add_argument(
        "--kernel-dtype",
        choices=FLOAT_DTYPES + QUANTISED,
        help="storage of the blocks' kernels in a base checkpoint (default: as --dtype)",
    )
    parser.add_argument(
        "--dtype",
        choices=FLOAT_DTYPES,
        default="bfloat16",
        help="storage of all the rest, or of everything in a Hugging Face folder (default: %(default)s)",
    )
    return parser


def _convert(arguments: argparse.Namespace, folder: Path) -> None:
    is_base = is_base_checkpoint(arguments.input)
    source = arguments.input if is_base else open_source(arguments.input)
    if not is_base and arguments.to == "base" and not arguments.adapter:
        kernel_dtype = arguments.kernel_dtype or arguments.dtype
        storage = {"dtype": arguments.dtype, "kernel_dtype": kernel_dtype}
        fingerprint = write_base_from(source, folder, **storage, name=source_name(arguments.input), log=print)
        print(f"wrote   {arguments.output}: a base checkpoint with {kernel_dtype} kernels, fingerprint {fingerprint}")
        return
    manifest = read_manifest(source) if is_base else {"llama": LlamaConfig(**architecture(source))}
    found = manifest["llama"]
    execution = {"param_dtype": arguments.dtype, "kernel_dtype": arguments.kernel_dtype or arguments.dtype}
    if is_base and arguments.to == "hf":
        execution["kernel_dtype"] = found.kernel_dtype  # they are dequantised on the way out
    # What is small comes first: nobody waits for the weights to learn that the tokenizer is missing.
    tokenizer, carried = load_base_tokenizer(source, found.vocab_size), read_carried(source)
    lora = adapter_config(arguments.adapter, found.num_layers) if arguments.adapter else NO_LORA
    if arguments.adapter and not arguments.any_base:
        name, known = adapter_base(arguments.adapter)
        if known:
            check_base(arguments.adapter, known, name, arguments.input, identify_model(arguments.input))
    model, report = load_llama(source, lora=lora, **execution)
    print(f"read    {len(report.read)} {'parameters' if is_base else f'{source.format} tensors'} of {arguments.input}")
    print(f"dropped {', '.join(report.dropped) or 'nothing'}")
    if arguments.adapter:
        print(f"added   {len(load_adapter(model, arguments.adapter).read)} adapter tensors of {arguments.adapter}")
    if arguments.to == "hf":
        merged = {"dtype": arguments.dtype, "merge_adapters": bool(arguments.adapter)}
        save_hugging_face(folder, model, tokenizer, **merged, carried=carried)
        what = f"a Hugging Face folder in {arguments.dtype}"
    else:
        merge(model)
        origin = manifest.get("origin", "") if is_base and not arguments.adapter else ""
        save_settings(folder, model.config, tokenizer, carried, dtype=arguments.dtype)
        made_of = manifest["source"] if is_base else source_name(arguments.input)
        fingerprint = save_base(folder, model, source=made_of, origin=origin)
        what = f"a base checkpoint with {execution['kernel_dtype']} kernels, fingerprint {fingerprint}"
    print(f"wrote   {arguments.output}: {what}")
