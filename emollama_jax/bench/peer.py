"""The peer: the same LLaMA in torch, by Hugging Face's transformers with PEFT's LoRA, holding the same numbers."""

import importlib.util
import os
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from emollama_jax.models.llama import Llama, LlamaConfig
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.weights.engine import export
from emollama_jax.weights.llama import hugging_face_config, hugging_face_table
from emollama_jax.weights.peft import adapter_table

PEER = "torch"


def obstacle(*packages: str) -> str | None:
    """Why a peer made of these packages cannot run here, in one line; None if it can."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        return f"no peer: {' and '.join(missing)} not installed; pip install 'emollama_jax[bench]'"
    import torch

    platform = jax.default_backend()
    if platform == "cpu" or (platform == "gpu" and torch.cuda.is_available()):
        return None
    return f"no peer: torch {torch.__version__} cannot use the {platform}; install a build of torch that can"


def torch_llama(model: Llama) -> Any:
    """`LlamaForCausalLM` with the parameters of `model`, adapters left out, in its compute dtype on its device."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count())
    dtype = model.config.compute_dtype
    settings = hugging_face_config(model.config, dtype) | {"bos_token_id": None, "eos_token_id": None}
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))  # the parameters are made in it, not in float32 first
    try:
        with torch.device("cuda" if jax.default_backend() == "gpu" else "cpu"):
            peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    finally:
        torch.set_default_dtype(default)
    _fill(peer.named_parameters(), export(model, hugging_face_table(model.config), dtype="float32"))
    return peer.eval()


def add_adapters(peer: Any, model: Llama, lora: LoRAConfig) -> Any:
    """`peer` as PEFT's model with the adapters of `model`, ready to train them."""
    import peft

    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
    )
    peer = peft.get_peft_model(peer, settings)
    adapters = ((name, value) for name, value in peer.named_parameters() if "lora_" in name)
    _fill(adapters, export(model, adapter_table(lora.targets, adapter="default"), dtype="float32"))
    return peer.train()


def _fill(parameters: Iterable[tuple[str, Any]], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Copies the tensors, one at a time, into the parameters of the same names, which are as many."""
    import torch

    parameters = dict(parameters)
    with torch.no_grad():
        for name, tensor in tensors:
            parameters.pop(name).copy_(torch.tensor(tensor))
    assert not parameters, f"left as torch initialised them: {', '.join(parameters)}"


def kernel_note(config: LlamaConfig) -> list[str]:
    """A line where the peer does not store its kernels as we do."""
    if config.kernel_dtype == config.compute_dtype:
        return []
    return [f"kernels are stored as {config.kernel_dtype} by us, as {config.compute_dtype} by {PEER}"]
