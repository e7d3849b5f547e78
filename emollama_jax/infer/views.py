"""Labels of clips under several views, the sets of modalities A (audio), V (video) and T (text), from two prefills.

Most tokens of a prompt are the image's, and they come first. The views with video share them; so do those without,
whose image is zeros and therefore the same for all clips of a batch. What follows (the voice's token, the subtitle, the
question and the labels) is scored as the branches of one tree (`infer/likelihood.py`):

    IMAGE, MAE, VIDEOMAE, voice, subtitle, question   AVT        zeros ──┬─ voice, subtitle, question     AT
                       │    └─ question               AV                 │    └─ question                 A
                       └─ (no voice), subtitle ...    VT                 └─ (no voice), subtitle ...      T
                            └─ question               V

Axes: N clips, S soft tokens, D width.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from emollama_jax.config import Config
from emollama_jax.infer.clip_input import ClipInput
from emollama_jax.infer.likelihood import Likelihoods
from emollama_jax.infer.score import LabelScorer, LabelScores
from emollama_jax.models.projectors import NUM_FEATURE_TOKENS
from emollama_jax.text.prompts import FEATURES, Sample


def score_views(
    scorer: LabelScorer,
    clips: Sequence[ClipInput],
    views: Sequence[str],
    soft: Float[Array, "N S D"],
    blank: Float[Array, "1 S D"],
    config: Config,
) -> dict[str, LabelScores]:
    """Score the labels of clips under each view; up to rounding they are those of the view alone.

    Args:
        views: modalities in the order A, V, T, as `check_modalities` gives them.
        soft: the clips' soft tokens, of all modalities.
        blank: those of a clip that has none.

    Returns:
        The scores by view; their `tokens` are shares of the work of the views that are scored together.
    """
    image_tokens = soft.shape[1] - NUM_FEATURE_TOKENS
    voice = image_tokens + FEATURES.index("hubert")
    silent = soft.shape[1]  # where the token of a missing voice stands, behind the clip's own
    blanks = jnp.repeat(blank, len(clips), axis=0)
    unseen = blanks.at[:, voice].set(soft[:, voice])
    found: dict[str, LabelScores] = {}
    for has_image, own in ((True, soft), (False, unseen)):
        group = [view for view in views if ("V" in view) == has_image]
        if not group:
            continue
        of_view = lambda clip, view: view_prompts(scorer, clip, view, image_tokens, (voice, silent), config)
        asked = [[prompt for view in group for prompt in of_view(clip, view)] for clip in clips]  # noqa: B023
        both = jnp.concatenate([own, blanks[:, voice : voice + 1]], axis=1)
        found |= _by_view(scorer, scorer.likelihoods(asked, both, shared_soft=None if has_image else voice), group)
    return {view: found[view] for view in views}


def view_prompts(
    scorer: LabelScorer,
    clip: ClipInput,
    view: str,
    image_tokens: int,
    places: tuple[int, int],
    config: Config,
) -> list[Sample]:
    """Return a clip's prompts under a view and every order.

    Args:
        places: among the clip's soft tokens, of the voice, and of what stands for it in views without audio.
    """
    voice, silent = places
    seen = clip.restricted(view, config)
    prompts = scorer.prompts(seen.subtitle, tuple(map(bool, seen.has_feature)), image_tokens)
    if "A" in view:
        return prompts
    return [Sample(p.tokens, np.where(p.soft == voice, silent, p.soft), p.is_answer) for p in prompts]


def _by_view(scorer: LabelScorer, found: Likelihoods, views: Sequence[str]) -> Mapping[str, LabelScores]:
    by_view = np.split(found.log, len(views), axis=1)
    tokens = found.tokens / len(views)
    return {view: scorer.to_scores(Likelihoods(log, tokens)) for view, log in zip(views, by_view, strict=True)}
