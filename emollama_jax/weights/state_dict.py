"""State dicts as training scripts save them: inside containers, and with names that wrappers have lengthened."""

import re
from collections.abc import Collection, Mapping

from emollama_jax.errors import UserError
from emollama_jax.io.paths import PathLike
from emollama_jax.weights.tensors import StoredTensor

# Keys of a checkpoint that hold the model's tensors; "module" is DeepSpeed's.
CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
# Before every name: torch's DistributedDataParallel; Lightning, whose modules hold the model as an attribute.
OUTER = ("module.", "model.")
LLAMA = re.compile(r"model\.(embed_tokens|layers|norm)\.")  # and LlamaForCausalLM's own, which may be before all names
# Anywhere in a name: torch.compile, FSDP, activation checkpointing.
WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def inside_container(
    tensors: Mapping[str, StoredTensor], path: PathLike
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The model's tensors of a torch checkpoint without the keys that they lie under, and the names of all others.

    A key that all tensors lie under may have any name.

    Args:
        tensors: by flattened names, "/" between the levels.
        path: the file, for messages.

    Raises:
        UserError: two keys could hold the model's tensors.
    """
    prefix = ""
    while True:
        inner = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        keys = {name.split("/")[0] if "/" in name else "" for name in inner}
        found = [key for key in CONTAINERS if key in keys] or (list(keys) if len(keys) == 1 else [])
        if found in ([], [""]):
            break
        if len(found) > 1:
            raise UserError(f"tensors under {' and '.join(found)}: {path}; save the state dict of the model alone")
        prefix += f"{found[0]}/"
    model = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return model, tuple(sorted(name for name in tensors if not name.startswith(prefix)))


def without_wrappers(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors under the names that the model itself gives them."""
    short = {name: WRAPPER.sub("", name) for name in tensors}
    while prefix := _outer_prefix(short.values()):
        short = {name: WRAPPER.sub("", shorter.removeprefix(prefix)) for name, shorter in short.items()}
    if len(set(short.values())) != len(short):
        return dict(tensors)  # they are the caller's to refuse
    return {short[name]: tensor for name, tensor in tensors.items()}


def _outer_prefix(names: Collection[str]) -> str:
    """What a wrapper has put before every name; "" for nothing."""
    if any(map(LLAMA.match, names)):
        return ""
    return next((prefix for prefix in OUTER if names and all(name.startswith(prefix) for name in names)), "")
