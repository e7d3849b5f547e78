"""The peer of training, in torch as the original: one clip a row, padded to the longest of the batch.

Axes: N clips, L positions of the longest, S soft tokens a clip, P patches, W their width, F feature size, D width.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from emollama_jax.bench.peer import add_adapters, torch_llama, torch_projectors
from emollama_jax.config import Config
from emollama_jax.data.batch import Batch
from emollama_jax.models.llama import Llama
from emollama_jax.models.projectors import Projectors
from emollama_jax.train.optimizer import learning_rate


def one_clip_a_row(batch: Batch, soft_per_clip: int) -> dict[str, np.ndarray]:
    """Take the clips of a packed batch apart, each in a row of its own.

    Returns:
        `tokens` and `soft_index` (-1 at text, else which of the clip's soft tokens) and `attention_mask` (0 is padding,
        at the right), int64 [N, L]; `loss_weights` (of predicting the next token) float32 [N, L]; `features` and
        `image_tokens` [N, ...].
    """
    clips = np.argwhere(batch.clip_mask)
    places = [np.flatnonzero(batch.segment_ids[row] == k + 1) for row, k in clips]
    shape = (len(clips), max(map(len, places)))
    values = {"tokens": 0, "soft_index": -1, "attention_mask": 0}
    columns = {name: np.full(shape, value, np.int64) for name, value in values.items()}
    columns["loss_weights"] = np.zeros(shape, np.float32)
    for i, ((row, k), here) in enumerate(zip(clips, places, strict=True)):
        soft = batch.soft_index[row, here]
        columns["tokens"][i, : len(here)] = batch.tokens[row, here]
        columns["soft_index"][i, : len(here)] = np.where(soft >= 0, soft - k * soft_per_clip, -1)
        columns["loss_weights"][i, : len(here)] = batch.loss_weights[row, here]
        columns["attention_mask"][i, : len(here)] = 1
    return columns | {name: getattr(batch, name)[batch.clip_mask] for name in ("features", "image_tokens")}


class TorchTraining:
    """The model with the parameters of ours, its optimiser, and the rates of `config.train`.

    Attributes:
        device: where its batches lie.
    """

    def __init__(self, model: Llama, config: Config, projectors: Projectors | None = None):
        """Without `projectors` it trains on text alone."""
        import torch

        llama, self._projectors = torch_llama(model).train(), torch.nn.ModuleDict()
        if projectors is not None:
            self._projectors = torch_projectors(projectors)
        if config.lora.rank and config.lora.targets:
            llama = add_adapters(llama, model, config.lora)
        for name, parameter in llama.named_parameters():
            parameter.requires_grad_("lora_" in name and "lora" in config.trainable)
        for name, projector in self._projectors.items():
            projector.requires_grad_(name in config.trainable)
        if config.llama.remat != "none":
            llama.gradient_checkpointing_enable({"use_reentrant": False})
        self._llama, self._settings, self._count = llama, config.train, 0
        self.device, self._dtype = llama.device, getattr(torch, config.llama.compute_dtype)
        self._trained = [p for part in (llama, self._projectors) for p in part.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self._trained if p.ndim > 1], "weight_decay": config.train.weight_decay},
            {"params": [p for p in self._trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        betas = config.train.beta1, config.train.beta2
        self._optimizer = torch.optim.AdamW(groups, betas=betas, eps=config.train.epsilon)

    def step(self, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """Take a step; returns (loss, norm of the gradient) as tensors.

        Args:
            batch: as `one_clip_a_row` gives it, as tensors; of text only `tokens`, `attention_mask` and `loss_weights`.
        """
        import torch

        for group in self._optimizer.param_groups:
            group["lr"] = float(learning_rate(self._settings, self._count))
        # What is trained is float32, as ours is; the products are computed in the dtype of activations.
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            loss = self._loss(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self._settings.clip_norm or float("inf"))
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._count += 1
        return loss.detach(), norm

    def _loss(self, batch: Mapping[str, Any]) -> Any:
        import torch

        embedded = self._llama.get_input_embeddings()(batch["tokens"])
        if self._projectors:
            soft = self._soft_tokens(batch["image_tokens"].to(self._dtype), batch["features"].to(self._dtype))
            index = batch["soft_index"][..., None]
            picked = soft.gather(1, index.clamp(min=0).expand(-1, -1, soft.shape[-1]))
            embedded = torch.where(index >= 0, picked.to(embedded.dtype), embedded)
        logits = self._llama(inputs_embeds=embedded, attention_mask=batch["attention_mask"], use_cache=False).logits
        weights = batch["loss_weights"][:, :-1].flatten()
        kept = weights > 0
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1)[kept].float(), batch["tokens"][:, 1:].flatten()[kept], reduction="none"
        )
        return (weights[kept] * nll).sum() / weights.sum()

    def _soft_tokens(self, image: Any, features: Any) -> Any:
        """[N, S, D] from image tokens [N, 1 + P, W] and features [N, 3, F]."""
        import torch

        project = self._projectors
        patches = image[:, 1:].reshape(len(image), -1, project["image_proj"].in_features)
        tokens = [project["image_proj"](patches)]
        for i, name in enumerate(("mae_proj", "videomae_proj", "hubert_proj")):
            tokens.append(project[name](features[:, i : i + 1]))
        return torch.cat([*tokens, project["cls_proj"](image[:, :1])], dim=1)
