"""Benchmark of prediction: labels and reasons a second, from the clips' soft tokens on, and mixed-length answers.

The peer works as the original does: one clip at a time, each answer by `generate`; a label is then two tokens and the
end of the sequence. Ours works in batches and scores all labels in one forward pass.

Random weights have no tokenizer: texts are cut into pieces of four letters, about the length of real tokens.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from emollama_jax.bench.mixed_answers import LONGEST, measure_mixed_answers
from emollama_jax.bench.peer import PEER, add_adapters, generate_greedily, kernel_note, obstacle, torch_llama
from emollama_jax.bench.report import OURS, Figures, Measure, Report, alternate, check_one_device, random_emotion_llama
from emollama_jax.config import Config, GenerateConfig, to_dict
from emollama_jax.data.batch import soft_tokens_per_clip
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.infer.predictor import Predictor, task_questions
from emollama_jax.infer.slots import GenerationRequest, SlotBatcher
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.text.prompts import Sample, Turn
from emollama_jax.text.tokenizers import Tokenizer

COLUMNS = {"clips_per_s": "clips/s", "seconds_per_clip": "s/clip", "tokens_per_s": "tokens/s"}
LABEL_TOKENS = 3  # that the peer generates for a label
SUBTITLE = "Well, I never thought that they would come back home so early, and without a word to anyone."


class Pieces(Tokenizer):
    """A tokenizer without a vocabulary: every four letters are a token, whose id is a hash."""

    def __init__(self, size: int):
        super().__init__(size, lambda name: None, (1, size - 1, None))

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        pieces = re.findall(r" ?\w{1,4}|\S", text)
        return [2 + zlib.crc32(piece.encode()) % (self.vocab_size - 3) for piece in pieces]

    def decode(self, ids: Iterable[int], *, skip_specials: bool = True) -> str:
        return " ".join(map(str, ids))

    def save(self, folder) -> None:
        raise NotImplementedError("made for benchmarks only")


def bench_predict(
    config: Config,
    *,
    batch_sizes: Sequence[int] = (1, 16),
    new_tokens: int = 100,
    repeats: int = 3,
    longest: int = LONGEST,
    with_peer: bool = True,
) -> Report:
    """Labels, and reasons of `new_tokens` tokens, about clips of random soft tokens, at several batch sizes; and a mix
    of answers of up to `longest` tokens. No batch sizes measure the mix alone."""
    check_one_device(config)
    why_no_peer = obstacle("torch", "transformers", "peft", wanted=with_peer)
    model = random_emotion_llama(config)
    notes = [
        "a clip's work begins with its soft tokens; adapters are beside their kernels, not merged",
        f"{OURS}: a label is the likelihoods of all {len(config.prompt.labels)}, {PEER}: {LABEL_TOKENS} tokens",
    ]
    peer = None if why_no_peer else _peer(model, config)
    notes += [why_no_peer] if why_no_peer else kernel_note(config.llama)
    results = []
    for batch in batch_sizes:
        work = _Work(model, config, batch, new_tokens)
        for what, ours, theirs in (
            ("labels", work.labels, LABEL_TOKENS),
            ("reasons", work.reasons, new_tokens),
        ):
            contenders = {OURS: ours, PEER: work.one_clip(peer, what, theirs) if peer is not None else None}
            per_clip = lambda run: {"seconds_per_clip": run["seconds"] / run["clips"]}
            measured = alternate(contenders, batch=batch, repeats=repeats, what=what, derive=per_clip)
            if peer is not None and what == "reasons":
                first, their_first = (np.array(result.output[0]) for result in measured)
                same = np.mean(first == their_first)
                notes.append(f"batch {batch}: {same:.1%} of the first clip's tokens are the same from both")
            results += measured
    mixed, mixed_notes = measure_mixed_answers(model.llama, peer, repeats=repeats, longest=longest)
    results, notes = results + mixed, notes + mixed_notes
    if peer is not None and batch_sizes:
        notes.append(f"{PEER} is measured on the first clip of a batch: it takes one at a time")
    settings = {"new_tokens": new_tokens, "repeats": repeats}
    if batch_sizes:
        settings["prompt_tokens"] = work.longest
    return Report("Prediction, random weights", to_dict(config), settings, COLUMNS, results, notes)


def _peer(model: EmotionLlama, config: Config) -> Any:
    peer = torch_llama(model.llama)
    return add_adapters(peer, model.llama, config.lora).eval() if config.lora.rank else peer


class _Work:
    """A batch of clips with the same questions."""

    def __init__(self, model: EmotionLlama, config: Config, batch: int, new_tokens: int):
        rng = np.random.default_rng(config.seed)
        shape = (batch, soft_tokens_per_clip(config), config.llama.hidden_size)
        self.soft: Float[Array, "N S D"] = jnp.asarray(0.02 * rng.normal(size=shape), config.llama.compute_dtype)
        self.generate = GenerateConfig(max_new_tokens=new_tokens)
        self.batcher = SlotBatcher(model.llama, (), slots=batch)
        self.predictor = Predictor(model, Pieces(config.llama.vocab_size), config)
        blank = np.zeros((3, config.projectors.feature_size), np.float32)
        self.clips = [ClipInput(f"clip {i}", SUBTITLE, blank, np.ones(3, bool)) for i in range(batch)]
        self.asked = {
            what: task_questions(config.prompt, task) for what, task in (("labels", "emotion"), ("reasons", "reason"))
        }
        self.longest = max(len(self._prompt(what).tokens) for what in self.asked)

    def _prompt(self, what: str) -> Sample:
        return self.predictor.prompt(self.clips[0], [Turn(*self.asked[what])])

    def labels(self) -> tuple[Figures, list[list[int]]]:
        """Score all labels."""
        scores = self.predictor.labels(self.clips, self.soft)
        return {"clips": len(self.clips)}, scores.by_order[:, 0].argsort(axis=1).tolist()

    def reasons(self) -> tuple[Figures, list[list[int]]]:
        """Generate answers of full length."""
        prompts = [self.predictor.prompt(clip, [Turn(*self.asked["reasons"])]) for clip in self.clips]
        requests = zip(prompts, self.soft, strict=True)
        answers = self.batcher.run(GenerationRequest(prompt, self.generate, soft=soft) for prompt, soft in requests)
        return {"clips": len(self.clips)}, [list(answer.tokens) for answer in answers]

    def one_clip(self, peer: Any, what: str, new_tokens: int) -> Measure:
        """The peer's answer about the first clip."""
        import torch

        sample = self._prompt(what)
        device, dtype = peer.device, peer.dtype
        soft = torch.tensor(np.asarray(self.soft[0], np.float32)).to(device, dtype)
        tokens = torch.tensor(sample.tokens, dtype=torch.long, device=device)
        index = torch.tensor(sample.soft, dtype=torch.long, device=device)

        @torch.inference_mode()
        def measure() -> tuple[Figures, list[list[int]]]:
            embedded = peer.get_input_embeddings()(tokens)
            embedded = torch.where((index >= 0)[:, None], soft[index.clamp(min=0)], embedded)[None]
            return {"clips": 1}, generate_greedily(peer, new_tokens, inputs_embeds=embedded)

        return measure
