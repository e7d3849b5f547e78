"""Benchmark of the encoders: EVA-ViT, MAE, VideoMAE and HuBERT."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emollama_jax.bench.peer import PEER, as_source, obstacle, torch_device, torch_encoder
from emollama_jax.bench.report import OURS, Measure, Report, add_speed, alternate, check_one_device, with_dtype
from emollama_jax.config import Config, to_dict
from emollama_jax.fields import fields_affecting
from emollama_jax.media.audio import SAMPLE_RATE, standardize
from emollama_jax.models.eva_vit import CLIP_MEAN, CLIP_STD, EvaVit
from emollama_jax.models.hubert import Hubert
from emollama_jax.models.mae import Mae
from emollama_jax.models.videomae import VideoMae
from emollama_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD, EncoderConfig, normalize
from emollama_jax.train.speed import encoder_flops
from emollama_jax.weights.encoders import ENCODERS, random_encoder
from emollama_jax.weights.eva_vit import load_eva_vit
from emollama_jax.weights.hubert import load_hubert
from emollama_jax.weights.mae import load_mae
from emollama_jax.weights.videomae import load_videomae

COLUMNS = {"clips_per_s": "clips/s", "ms_per_batch": "ms/batch"}

Encoder = EvaVit | Mae | VideoMae | Hubert


def bench_encode(
    config: Config,
    *,
    encoders: Sequence[str] = tuple(ENCODERS),
    batch_sizes: Sequence[int] = (1,),
    seconds: int = 3,
    dtype: str | None = None,
    repeats: int = 3,
    with_peer: bool = True,
) -> Report:
    """Each encoder on random clips: one frame, one face, one clip of frames, or `seconds` of sound.

    Args:
        dtype: of kernels and activations, in place of the experiment's; default: float32 on CPUs, the experiment's
            elsewhere.
    """
    check_one_device(config)
    why_no_peer = obstacle("torch", "transformers", wanted=with_peer)
    notes = [f"a clip is one frame (eva_vit), one face (mae), one clip of frames (videomae), {seconds} s (hubert)"]
    notes += [why_no_peer] if why_no_peer else []
    config, results, operations, kernels = with_dtype(config, encoders, dtype), [], {}, {}
    for name in encoders:
        settings = getattr(config, name)
        peer = None if why_no_peer else torch_encoder(settings, config.seed)
        model = load_peer(settings, peer) if peer else random_encoder(name, settings, config.seed)
        for batch in batch_sizes:
            inputs = random_inputs(settings, batch, seconds, config.seed)
            contenders = {OURS: _ours(model, inputs), PEER: _peers(peer, settings, inputs) if peer else None}
            in_ms = lambda run: {"ms_per_batch": 1e3 * run["seconds"]}
            measured = alternate(contenders, what=name, batch=batch, repeats=repeats, derive=in_ms)
            if peer is not None:
                difference = relative_difference(*(result.output for result in measured))
                notes.append(f"{name}, batch {batch}: the outputs differ by {difference:.1e} of their largest value")
            results += measured
        operations[name], kernels[name] = encoder_flops(model, seconds), model.config.attention
        del model, peer, contenders  # the next encoder's memory
    speed, note = add_speed(
        results,
        lambda result: operations[result.what] * result.batch,
        "matrix products and convolutions",
    )
    dtype, columns = getattr(config, encoders[0]).compute_dtype, COLUMNS | speed
    settings = {"seconds": seconds, "repeats": repeats, "dtype": dtype}
    settings["attention"] = "+".join(dict.fromkeys(kernels.values()))
    return Report("Encoding, random weights", to_dict(config), settings, columns, results, notes + note)


def relative_difference(ours: Any, theirs: Any) -> float:
    """The largest difference, as a part of the largest value of `theirs`."""
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def load_peer(config: EncoderConfig, peer: Any) -> Encoder:
    """Our encoder with the parameters of torch's."""
    execution = {name: getattr(config, name) for name in fields_affecting(EncoderConfig, "execution")}
    source = as_source(peer)
    match peer.config.model_type:
        case "hubert":
            return load_hubert(source, layer=config.layer, **execution)[0]
        case "vit_mae":
            return load_mae(source, pool=config.pool, **execution)[0]
        case "videomae":
            return load_videomae(source, **execution)[0]
    return load_eva_vit(source, config)[0]


def random_inputs(config: EncoderConfig, batch: int, seconds: int, seed: int) -> tuple[np.ndarray, ...]:
    """Random inputs of the encoder's `encode`, of full length."""
    random = np.random.default_rng(seed)
    if hasattr(config, "conv_kernels"):
        samples = seconds * SAMPLE_RATE
        waveforms = [standardize(random.normal(size=samples).astype(np.float32)) for _ in range(batch)]
        return np.stack(waveforms), np.full(batch, samples, np.int32)
    frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
    return (random.integers(0, 256, (batch, *frames, config.image_size, config.image_size, 3), np.uint8),)


def _ours(model: Encoder, inputs: tuple[np.ndarray, ...]) -> Measure:
    graphdef, state = nnx.split(model)
    encode = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state).encode(*inputs))
    on_device = [jnp.asarray(x) for x in inputs]

    return lambda: ({"clips": len(inputs[0])}, jax.block_until_ready(encode(state, *on_device)))


def _peers(peer: Any, config: EncoderConfig, inputs: tuple[np.ndarray, ...]) -> Measure:
    """The same from torch; its pixels are normalised beforehand."""
    import torch

    device = torch_device()
    peer = peer.to(device, getattr(torch, config.compute_dtype))
    kind, further = peer.config.model_type, {}
    pool = {"vit_mae": lambda x: x[:, 0] if config.pool == "cls" else x[:, 1:].mean(1)}
    pool |= dict.fromkeys(("videomae", "hubert"), lambda x: x.mean(1))
    if kind == "hubert":
        x, further = inputs[0], {"output_hidden_states": True}
    else:
        stats = (IMAGENET_MEAN, IMAGENET_STD) if kind in pool else (CLIP_MEAN, CLIP_STD)
        x = np.moveaxis(np.asarray(normalize(jnp.asarray(inputs[0]), *stats)), -1, -3)
    if kind == "vit_mae":  # without noise the patches come out in the order they went in
        further["noise"] = torch.zeros(len(x), config.grid**2, device=device)
    x = torch.tensor(np.ascontiguousarray(x)).to(device, getattr(torch, config.compute_dtype))

    @torch.inference_mode()
    def measure():
        output = peer(x, **further)
        hidden = output.hidden_states[config.layer] if kind == "hubert" else output.last_hidden_state
        output = pool.get(kind, lambda x: x)(hidden.float())
        return {"clips": len(x)}, output.cpu().numpy()

    return measure
