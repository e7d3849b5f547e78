"""The peer: the same models in torch, by transformers and PEFT, with the same parameters."""

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from emollama_jax.models.eva_vit import EvaVitConfig
from emollama_jax.models.hubert import HubertConfig
from emollama_jax.models.llama import Llama, LlamaConfig
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.models.mae import MaeConfig
from emollama_jax.models.projectors import PROJECTORS, Projectors
from emollama_jax.models.videomae import VideoMaeConfig
from emollama_jax.models.vit import EncoderConfig
from emollama_jax.weights.engine import Table, export_on_device
from emollama_jax.weights.llama import hugging_face_config, hugging_face_table
from emollama_jax.weights.peft import adapter_table
from emollama_jax.weights.tensors import StoredTensor, WeightSource
from emollama_jax.weights.vit import linear_rules

PEER = "torch"


def obstacle(*packages: str, wanted: bool) -> str | None:
    """Why a peer of these packages cannot run, in one line; None if it is wanted and can."""
    if not wanted:
        return "no peer: not asked for"
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        return f"no peer: {' and '.join(missing)} not installed; pip install 'emollama_jax[bench]'"
    import torch

    platform = jax.default_backend()
    if platform == "cpu" or (platform == "gpu" and torch.cuda.is_available()):
        return None
    return f"no peer: torch {torch.__version__} cannot use the {platform}; install a build of torch that can"


def torch_device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


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
        with torch.device(torch_device()):
            peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    finally:
        torch.set_default_dtype(default)
    _fill(peer.named_parameters(), export_on_device(model, hugging_face_table(model.config), dtype="float32"))
    return peer.eval()


def add_adapters(peer: Any, model: Llama, lora: LoRAConfig) -> Any:
    """`peer` as PEFT's model with the adapters of `model`, ready to train them."""
    import peft

    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
    )
    peer = peft.get_peft_model(peer, settings)
    adapters = ((name, value) for name, value in peer.named_parameters() if "lora_" in name)
    _fill(adapters, export_on_device(model, adapter_table(lora.targets, adapter="default"), dtype="float32"))
    return peer.train()


def generate_greedily(peer: Any, new_tokens: int, **options: Any) -> list[list[int]]:
    """Answers of `new_tokens` tokens by the peer's `generate`.

    Args:
        options: of `generate`: the prompts, all of one length, as `input_ids` [B, T] or `inputs_embeds` [B, T, D].
    """
    import torch

    prompts = options.get("input_ids", options.get("inputs_embeds"))
    mask = torch.ones(prompts.shape[:2], dtype=torch.long, device=peer.device)
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        return peer.generate(attention_mask=mask, **settings, **options)[:, -new_tokens:].tolist()


def torch_projectors(projectors: Projectors) -> Any:
    """Linear layers with the parameters of `projectors`, by our names, float32 on the device."""
    import torch

    shapes = {name: getattr(projectors, name).kernel[...].shape for name in PROJECTORS}
    linears = {name: torch.nn.Linear(*shape, device=torch_device()) for name, shape in shapes.items()}
    peer = torch.nn.ModuleDict(linears)
    table = Table(tuple(linear_rules((name, name) for name in PROJECTORS)))
    _fill(peer.named_parameters(), export_on_device(projectors, table, dtype="float32"))
    return peer


def torch_encoder(config: EncoderConfig, seed: int = 0) -> Any:
    """The class of Hugging Face that is this encoder, float32 on the CPU, with random parameters.

    EVA-ViT-G is BLIP-2's vision model, MAE is set not to mask.
    """
    import torch

    torch.set_num_threads(os.cpu_count())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _torch_encoder(config).eval()


def _torch_encoder(config: EncoderConfig) -> Any:
    import transformers

    common = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.layer_norm_eps,
        "initializer_range": 0.02,  # BLIP-2's own would leave nothing but the norms' epsilons
    }
    size = {name: getattr(config, name) for name in ("image_size", "patch_size") if hasattr(config, name)}
    match config:
        case HubertConfig():
            settings = transformers.HubertConfig(
                **common,
                conv_dim=config.conv_dims,
                conv_kernel=config.conv_kernels,
                conv_stride=config.conv_strides,
                feat_extract_norm=config.conv_norm,
                conv_bias=config.conv_bias,
                feat_proj_layer_norm=config.feature_norm,
                do_stable_layer_norm=config.norm_first,
                num_conv_pos_embeddings=config.position_kernel,
                num_conv_pos_embedding_groups=config.position_groups,
            )
            return transformers.HubertModel(settings)
        case EvaVitConfig():
            model = transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**common, **size))
            model.post_layernorm.eps = config.output_norm_eps
            return model
        case MaeConfig():
            return transformers.ViTMAEModel(transformers.ViTMAEConfig(**common, **size, mask_ratio=0.0))
        case VideoMaeConfig():
            settings = transformers.VideoMAEConfig(
                **common,
                **size,
                num_frames=config.num_frames,
                tubelet_size=config.tubelet_size,
                use_mean_pooling=not config.final_norm,
            )
            return transformers.VideoMAEModel(settings)
    raise TypeError(f"no peer of {type(config).__name__}")


def as_source(model: Any) -> WeightSource:
    """The parameters and the configuration of one of Hugging Face's models, as if read from its files."""
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    stored = {name: StoredTensor(tuple(t.shape), lambda t=t: t.cpu().float().numpy()) for name, t in tensors.items()}
    return WeightSource(Path(type(model).__name__), "torch", stored, model.config.to_dict())


def _fill(parameters: Iterable[tuple[str, Any]], tensors: Iterable[tuple[str, jax.Array]]) -> None:
    """Copies the tensors, one at a time, into the parameters of the same names, which are as many."""
    import torch

    parameters = dict(parameters)
    with torch.no_grad():
        for name, tensor in tensors:
            parameters.pop(name).copy_(torch.from_dlpack(tensor))  # on a GPU it does not pass through the host
    assert not parameters, f"left as torch initialised them: {', '.join(parameters)}"


def kernel_note(config: LlamaConfig) -> list[str]:
    """A line where the peer does not store its kernels as we do."""
    if config.kernel_dtype == config.compute_dtype:
        return []
    return [f"kernels are stored as {config.kernel_dtype} by us, as {config.compute_dtype} by {PEER}"]
