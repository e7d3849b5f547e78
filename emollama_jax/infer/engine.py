"""The public face of the package: a model, loaded once, and what is asked about clips.

    engine = Engine.load("runs/stage2")
    engine.label("clip.mp4").probabilities      # {"happy": 0.83, ...}
    engine.ask("clip.mp4", "[reason] Why does she smile?", "Are you sure?").answers
    for piece in engine.stream("clip.mp4", "[reason] Why does she smile?"):
        print(piece, end="", flush=True)
    for result in engine.answer(sorted(Path("videos").glob("*.mp4"))):
        print(result.name, result.answer if isinstance(result, ClipAnswer) else result)

`predict`, `evaluate` and the metrics of a validation use it too. A clip's answer depends on the clip
alone; probabilities up to rounding, which the number of clips that are computed together changes.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from emollama_jax.config import Config, load_config
from emollama_jax.data.modalities import ALL, check_modalities
from emollama_jax.distributed import use_compile_cache
from emollama_jax.errors import UserError
from emollama_jax.infer.answer import Clip, ClipAnswer, ClipError, Query
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.infer.identity import identity_of
from emollama_jax.infer.inputs import Item, ItemRead, VideoClips
from emollama_jax.infer.loading import (
    INPUTS,
    check_image_file,
    choose_frame_rule,
    load_clip_encoders,
    load_model,
    make_config_mesh,
)
from emollama_jax.infer.predictor import Predictor
from emollama_jax.infer.query_reader import QueryReader
from emollama_jax.infer.shapes import Shapes
from emollama_jax.infer.shared_batcher import SharedBatcher
from emollama_jax.infer.slots import SlotBatcher
from emollama_jax.io.paths import PathLike
from emollama_jax.media.subtitles import Recogniser
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.models.lora import is_adapter
from emollama_jax.runs.run import Run
from emollama_jax.sharding import use_mesh
from emollama_jax.text.prompts import PromptConfig, Turn
from emollama_jax.text.tokenizers import Tokenizer


class Engine:
    """Asks one model about clips: see the module's example.

    `Engine.load` makes one from files; the constructor takes a model that is in memory.

    Args:
        model: with EVA-ViT where clips have frames.
        config: the experiment that the model belongs to.
        modalities: the ones used, any of A (audio), V (video) and T (text).
        orders: orders of the labels in the question that probabilities are averaged over; see `LabelScorer`.
        mesh: where the parameters are; default: the first device, or the mesh in use.
        slots: answers that are generated at the same time, at most.
        base: the file or folder of the language model.
        make_videos: makes the reader of videos; without it clips are records or arrays.
        described: how videos are read and encoded, for `identity`.

    Raises:
        UserError: no or unknown modalities, fewer than two labels, or fewer labels than orders.
    """

    def __init__(
        self,
        model: EmotionLlama,
        tokenizer: Tokenizer,
        config: Config,
        *,
        modalities: str = ALL,
        orders: int = 1,
        mesh: Mesh | None = None,
        slots: int = 8,
        base: PathLike | None = None,
        make_videos: Callable[..., VideoClips] | None = None,
        described: Mapping[str, Any] | None = None,
    ):
        self.config = config
        self._model, self._tokenizer, self._mesh = model, tokenizer, mesh
        self._base, self._described = base, dict(described or {})
        self._reader = QueryReader(make_videos)
        self._settings = {"modalities": modalities, "orders": orders}
        self._batcher = SharedBatcher(SlotBatcher(model.llama, tokenizer.end_ids, slots=slots))
        self._predictor = Predictor(model, tokenizer, config, batcher=self._batcher, **self._settings)

    @classmethod
    def load(
        cls,
        trained: Run | PathLike | None = None,
        *,
        config: Config | str | None = None,
        base: PathLike | None = None,
        eva_vit: PathLike | None = None,
        ln_vision: PathLike | None = None,
        mae: PathLike | None = None,
        videomae: PathLike | None = None,
        hubert: PathLike | None = None,
        inputs: str = "videos",
        random_encoders: bool = False,
        any_encoders: bool = False,
        any_base: bool = False,
        any_labels: bool = False,
        modalities: str = ALL,
        orders: int = 1,
        frame_rule: str | None = None,
        subtitle_sources: Sequence[str] = (),
        subtitle_language: str = "",
        recogniser: str | None = None,
        slots: int = 8,
        workers: int = 0,
        mesh: Mesh | None = None,
        log: Callable[[str], None] = lambda message: None,
    ) -> "Engine":
        """Load a model and the encoders of clips.

        Example:
            engine = Engine.load("runs/stage2")
            engine = Engine.load("Emotion_LLaMA.pth", config="stage2_merr", base="weights/llama2")

        Args:
            trained: adapters and projectors: a training run or one of its checkpoints, a .pth or a PEFT folder;
                default: `config.weights.trained`, or new ones where that is empty.
            config: the experiment, or the name or path of its file; default: the run's own, on one device.
            base, eva_vit, ln_vision, mae, videomae, hubert: files or folders of weights; default: those of
                `config.weights`. "" leaves MAE, VideoMAE or HuBERT out: clips then have none of its features.
            inputs: what clips are, which decides the encoders that are loaded: `videos` needs all, `frames` (records
                that hold frames) EVA-ViT alone, `image_tokens` none.
            random_encoders: untrained encoders in place of files, for trials: see `features.encoders.random_encoders`.
            any_encoders, any_base, any_labels: take trained weights with encoders, with a language model or for labels
                that they were not trained with.
            modalities, orders: see `Engine`.
            frame_rule: first, middle, peak or a frame's number from 0; default: the rule of the run's training data.
            subtitle_sources: where the words of a video without a subtitle are looked for, in this order: any of
                file, track and speech.
            subtitle_language: of files and tracks, as in "en": others are passed over; "" takes any.
            recogniser: the faster-whisper model for `speech`.
            slots: answers that are generated at the same time, at most.
            workers: child processes that read videos ahead in `answer`; 0 is one that reads each when its turn comes.
            mesh: the devices; default: those of `config.mesh`.
            log: is told of choices made, a line each.

        Raises:
            StartError: weights are missing or damaged, or the devices cannot hold them.
            UserError: arguments that do not fit, or a run that was trained with other encoders, labels or another base.
        """
        if inputs not in INPUTS:
            raise UserError(f"inputs {inputs!r}: give one of {', '.join(INPUTS)}")
        run = trained if isinstance(trained, Run) else Run.find(trained)
        if config is None and run is None:
            raise UserError(f"no experiment: {trained} does not hold one; give its config")
        if not isinstance(config, Config):
            config = load_config(config) if config else run.config_for_inference()
        if trained is None and config.weights.trained:
            trained, run = config.weights.trained, Run.find(config.weights.trained)
        base = base or config.weights.base
        if not base:
            raise UserError("config.weights.base: no language model; give a base checkpoint, made by emollama convert")
        given = {"mae": mae, "videomae": videomae, "hubert": hubert, "eva_vit": eva_vit, "ln_vision": ln_vision}
        files = {name: getattr(config.weights, name) if file is None else file for name, file in given.items()}
        takes_files = inputs == "frames" or (inputs == "videos" and (eva_vit or not random_encoders))
        image_encoder = {"eva_vit": files["eva_vit"], "ln_vision": files["ln_vision"] or None} if takes_files else {}
        mesh = make_config_mesh(config) if mesh is None else mesh
        use_compile_cache(config.train.compile_cache)
        checked = None if any_encoders else run
        make_videos, described, clip_encoders = None, {}, None
        check_image_file(image_encoder, checked)
        with _on_mesh(mesh, config):
            if inputs == "videos":
                clip_encoders = load_clip_encoders(
                    config, files, use_random=random_encoders, eva_vit=not image_encoder, mesh=mesh
                )
                rule = choose_frame_rule(run, frame_rule, log)
                encoders = clip_encoders.fingerprints(config)
                described = {"encoders": encoders, "frame": rule, "subtitles_from": list(subtitle_sources)}
                described |= {"subtitle_language": subtitle_language} if subtitle_language else {}
                if checked:
                    checked.check_encoders(encoders, all_known=True)
                make_videos = functools.partial(
                    VideoClips,
                    config,
                    functools.partial(clip_encoders.features, size=config.projectors.feature_size),
                    clip_encoders.read_spec(config.eva_vit.image_size),
                    frame_rule=rule,
                    subtitle_sources=tuple(subtitle_sources),
                    subtitle_language=subtitle_language,
                    transcribe=Recogniser(recogniser).transcribe if recogniser else None,
                    workers=workers,
                )
                make_videos()  # checks the rule and the sources
            model, tokenizer = load_model(
                config,
                trained=run or trained or None,
                base=base,
                image_encoder=image_encoder,
                eva_vit=clip_encoders and clip_encoders.eva_vit,
                checked=checked,
                any_base=any_base,
                mesh=mesh,
            )
        if run and not any_labels:
            run.check_labels(config.prompt.labels)
        options = {"modalities": modalities, "orders": orders, "mesh": mesh, "slots": slots, "base": base}
        return cls(model, tokenizer, config, make_videos=make_videos, described=described, **options)

    def replace(
        self, *, prompt: PromptConfig | None = None, modalities: str | None = None, orders: int | None = None
    ) -> "Engine":
        """Return an engine with the same weights and other settings.

        Example:
            binary = engine.replace(prompt=dataclasses.replace(engine.config.prompt, labels=("calm", "tense")))
        """
        other = copy.copy(self)
        if prompt is not None:
            other.config = dataclasses.replace(self.config, prompt=prompt)
        given = {"modalities": modalities, "orders": orders}
        other._settings = self._settings | {name: value for name, value in given.items() if value is not None}
        other._predictor = Predictor(
            self._model, self._tokenizer, other.config, batcher=self._batcher, **other._settings
        )
        return other

    def label(self, clip: Clip, *, subtitle: str = "") -> ClipAnswer:
        """Return the most likely label of `config.prompt.labels` for a clip, and the probabilities of all.

        Example:
            engine.label("clip.mp4", subtitle="I am fine.").label

        Raises:
            ClipError: the clip cannot be read, its prompt is too long, or a probability is not finite.
        """
        return self._answer_one(Query(clip, subtitle=subtitle))

    def ask(self, clip: Clip, *questions: str, subtitle: str = "", history: Sequence[Turn] = ()) -> ClipAnswer:
        """Ask questions about a clip one after another, as a conversation; the last answer is `.answer`.

        Example:
            engine.ask("clip.mp4", "[reason] Why does she smile?").answer

        Args:
            questions: with a task's tag where it is to have one (`prompts.TASKS`).
            history: earlier questions with their answers.

        Raises:
            ClipError: as `label`.
        """
        if not questions:
            raise ValueError("no question; give one or more, or call label")
        return self._answer_one(Query(clip, questions, subtitle=subtitle, history=tuple(history)))

    def stream(self, clip: Clip, question: str, *, subtitle: str = "", history: Sequence[Turn] = ()) -> Iterator[str]:
        """Yield the answer of `ask` in pieces of text, as they are generated.

        Example:
            for piece in engine.stream("clip.mp4", "[reason] Why does she smile?"):
                print(piece, end="", flush=True)

        Raises:
            ClipError: as `label`, before the first piece.
        """
        query = Query(clip, (question,), subtitle=subtitle, history=tuple(history))
        ((_, found),) = self._reader.read([query])
        if isinstance(found, ClipError):
            raise found
        item, read = found
        with self.on_mesh():
            (clip_input,) = self._reader.encode([item], [read])
        pieces = self._predictor.stream(dataclasses.replace(query, clip=clip_input))
        try:
            while True:
                with self.on_mesh():  # only here: what the caller does between two pieces is its own
                    piece = next(pieces, None)
                if piece is None:
                    return
                yield piece
        finally:
            with self.on_mesh():
                pieces.close()

    def answer(
        self, clips: Iterable[Clip | Query], questions: Sequence[str] = (), *, batch_size: int = 16
    ) -> Iterator[ClipAnswer | ClipError]:
        """Yield the answers about many clips, in their order. A clip without an answer gives the error in place of one.

        Example:
            for result in engine.answer(["a.mp4", Query("b.mp4", ("[reason] Why?",))]):
                print(result)

        Args:
            clips: may be of any length: they are taken as they are needed.
            questions: asked about each clip that is no `Query`; without any the labels are scored.
            batch_size: clips that are computed together.
        """
        queries = (clip if isinstance(clip, Query) else Query(clip, tuple(questions)) for clip in clips)
        with contextlib.closing(self._reader.read(queries)) as reads:
            while batch := list(itertools.islice(reads, batch_size)):
                good = [(query, read) for query, read in batch if not isinstance(read, ClipError)]
                found = iter(self.answer_batch(*zip(*good, strict=True), self._reader.encode) if good else [])
                yield from (read if isinstance(read, ClipError) else next(found) for _, read in batch)

    def label_views(
        self, clips: Iterable[Clip], views: Sequence[str], *, batch_size: int = 16
    ) -> Iterator[dict[str, ClipAnswer] | ClipError]:
        """Yield the labels of each clip by view, a set of modalities; views share their work (`infer/views.py`)."""
        with contextlib.closing(self._reader.read(map(Query, clips))) as reads:
            while batch := list(itertools.islice(reads, batch_size)):
                good = [read for _, read in batch if not isinstance(read, ClipError)]
                with self.on_mesh():
                    encoded = self._reader.encode(*zip(*good, strict=True)) if good else []
                    found = iter(self._predictor.answer_views(encoded, list(map(check_modalities, views))))
                yield from (read if isinstance(read, ClipError) else next(found) for _, read in batch)

    def answer_batch(
        self,
        queries: Sequence[Query],
        clips: Sequence[tuple[Item, ItemRead]],
        encode: Callable[[Sequence[Item], Sequence[ItemRead]], list[ClipInput]],
    ) -> list[ClipAnswer | ClipError]:
        """Return the answers about clips that are read already, encoded and computed together.

        Args:
            clips: each query's clip, with what was read of it, in place of `Query.clip`.
            encode: of the `ClipSource` that has read the clips.
        """
        with self.on_mesh():
            start = time.perf_counter()
            encoded = encode(*zip(*clips, strict=True))
            encode_s = (time.perf_counter() - start) / len(clips)
            asked = [dataclasses.replace(query, clip=clip) for query, clip in zip(queries, encoded, strict=True)]
            results = self._predictor.answer(asked)
        return [_with_read(result, read, encode_s) for result, (_, read) in zip(results, clips, strict=True)]

    def identity(self, **settings: Any) -> dict[str, Any]:
        """Return what answers depend on, in JSON's types: weights by fingerprint, the experiment, and `settings`."""
        settings = self._described | self._settings | {"modalities": self._predictor.modalities} | settings
        return identity_of(self.config, self._model, self._base, **{"encoders": {}, **settings})

    def videos(self, **settings: Any) -> VideoClips:
        """Return the engine's reader of videos, with further settings of a `VideoClips`. Raises UserError where the
        engine was loaded for records."""
        return self._reader.videos(**settings)

    @property
    def predictor(self) -> Predictor:
        """The steps of an answer, one by one, for whoever batches by itself; to be called `on_mesh`."""
        return self._predictor

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def make_slot_batcher(self, slots: int, shapes: Shapes | None = None, *, adapters: bool = True) -> SlotBatcher:
        """Make a batcher of this model's answers, beside the engine's own; without `adapters` of the language model
        alone, which shares its parameters."""
        llama = self._model.llama
        if not adapters:
            graphdef, adapted, others = nnx.split(llama, is_adapter, ...)
            llama = nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, adapted), others)
        return SlotBatcher(llama, self._tokenizer.end_ids, slots=slots, shapes=shapes)

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """Compute on the engine's mesh within the block."""
        return _on_mesh(self._mesh, self.config)

    def _answer_one(self, query: Query) -> ClipAnswer:
        (result,) = self.answer([query])
        if isinstance(result, ClipError):
            raise result
        return result


@contextlib.contextmanager
def _on_mesh(mesh: Mesh | None, config: Config) -> Iterator[None]:
    with use_mesh(mesh, config.sharding) if mesh is not None else contextlib.nullcontext():
        yield


def _with_read(result: ClipAnswer | ClipError, read: ItemRead, encode_s: float) -> ClipAnswer | ClipError:
    """Add what is known from reading the clip, and the seconds that its encoding took."""
    if isinstance(result, ClipError):
        return result
    timings = {**read.seconds, **result.timings_s, "encode": encode_s + result.timings_s["encode"]}
    return dataclasses.replace(result, clip_info=read.clip_info, fingerprint=read.fingerprint, timings_s=timings)
