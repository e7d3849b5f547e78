"""Validation while training: the loss on clips held out, and whatever else is asked for."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
from flax import nnx
from jax.sharding import Mesh

from emollama_jax.config import Config
from emollama_jax.data.batch import Images
from emollama_jax.data.batch_shards import process_shard
from emollama_jax.data.datasets import find_images, open_datasets
from emollama_jax.data.pipeline import eval_dataset, onto_devices
from emollama_jax.distributed import barrier
from emollama_jax.errors import UserError
from emollama_jax.text.tokenizers import Tokenizer
from emollama_jax.train.step import TrainState, multimodal_loss

MoreMetrics = Callable[[nnx.Module], Mapping[str, float]]


class Validation:
    """The data sets `config.train.validation`, ready to be gone through again and again.

    `validation(state, frozen)` gives the metrics of a state: `loss`, averaged as in training (`train.loss_average`),
    and what `more` makes of the model.
    """

    def __init__(
        self,
        config: Config,
        graphdef: nnx.GraphDef,
        mesh: Mesh,
        tokenizer: Tokenizer,
        *,
        images: Images,
        more: MoreMetrics | None = None,
    ):
        """Raises UserError when the data does not exist, or does not keep its `images` as the training data does."""
        data = dataclasses.replace(config.data, eval=config.train.validation, workers=0)
        config = dataclasses.replace(config, data=data)
        found = find_images(open_datasets(data.eval, config, "train.validation"))
        if found != images:
            raise UserError(f"train.validation: data of {found}, the training data is of {images}; prepare them alike")
        index, count = process_shard(config, mesh)
        dataset = eval_dataset(config, tokenizer, shard_index=index, num_shards=count)
        self._batches = onto_devices(dataset, config, mesh)
        self._graphdef, self._more = graphdef, more
        self._compiled: Callable | None = None
        self._loss = jax.jit(
            lambda state, frozen, batch: multimodal_loss(nnx.merge(graphdef, state, frozen), batch, None)
        )

    def __call__(self, state: TrainState, frozen: nnx.State) -> dict[str, float]:
        iterator, found = iter(self._batches), []
        for batch in iterator:
            if self._compiled is None:
                self._compiled = self._loss.lower(state.trainable, frozen, batch).compile()
                barrier("validation")
            found.append(self._compiled(state.trainable, frozen, batch))
        iterator.close()
        found = jax.device_get(found)
        total = sum(float(weight) for _, weight in found)
        if not total:
            raise UserError("train.validation: no clip has an answer for prompt.tasks; choose other data")
        metrics = {"loss": sum(float(loss) * float(weight) for loss, weight in found) / total}
        if self._more:
            metrics |= self._more(nnx.merge(self._graphdef, state.trainable, frozen))
        return metrics


@dataclasses.dataclass(frozen=True)
class Best:
    """The best validation so far, and how many have followed it."""

    step: int | None = None
    value: float = 0.0
    worse: int = 0

    def after(self, step: int, metrics: Mapping[str, float], name: str) -> "Best":
        """With one validation more; `name` is `train.best_metric`. Raises UserError when there is no such metric."""
        if name not in metrics:
            raise UserError(f"train.best_metric={name}: the validation has {', '.join(metrics)}; choose one of these")
        value = metrics[name]
        better = self.step is None or (value < self.value if name == "loss" else value > self.value)
        return Best(step, value) if better else dataclasses.replace(self, worse=self.worse + 1)
