"""An HTML page about annotations, for people: counts, what was dropped and why, and each clip with its peak frame."""

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from emollama_jax.captions.annotation import Annotation, AnnotationResult
from emollama_jax.captions.human_check import HumanCheck
from emollama_jax.io.atomic import write_text

DOUBT = (
    "Blendshapes are not action units: a grimace of pain moves them as a smile does, and raised brows are not always "
    "surprise. Labels by them alone are to be looked at."
)
NAMED = 12  # of the clips that share a reason; annotations.jsonl names all
SHOWN = 300  # clips on the page; annotations.jsonl has all of them
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 0 0 1rem } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
td.number { text-align: right }
.sheet { display: flex; flex-wrap: wrap; gap: .4rem; margin-bottom: 2rem } .sheet a { font-size: .75rem; width: 7rem }
.sheet img { width: 7rem; display: block }
article { display: grid; grid-template-columns: 14rem 1fr; gap: 1rem; border-top: 1px solid #ccc; padding: 1rem 0 }
article img { width: 14rem } h3 { margin: 0 } p { margin: .3rem 0 } .by { color: #777; font-size: .8rem }
.bar { background: #4a7ab5; height: .6rem; display: inline-block }
"""


def write_page(
    out: Path, found: AnnotationResult, check: HumanCheck | None = None, *, title: str = "Annotations"
) -> None:
    """Writes `report.html`, which shows the pictures of the folder `frames` beside it.

    Args:
        check: what people say of the annotations.
    """
    annotated = found.having("annotated")
    shown = annotated[:SHOWN]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_text(title)}</title><style>{STYLE}</style>",
        f"<h1>{_text(title)}</h1>",
        f"<p>{len(found.annotations)} clips: {len(annotated)} annotated, {len(found.having('dropped'))} dropped, "
        f"{len(found.having('failed'))} failed.</p>",
        _counts("Labels", Counter(one.label for one in annotated)),
        _without("Dropped", found.having("dropped")),
        _without("Failed", found.having("failed")),
        _counts("Labels by", Counter(one.label_by for one in annotated)),
        f"<p>{DOUBT}</p>" if any(one.label_by == "blendshapes" for one in annotated) else "",
        _counts("Peaks by", Counter(one.peak_by for one in annotated)),
        _counts("Without a text", Counter(f"{k}: {why}" for one in annotated for k, why in one.unanswered.items())),
        _check(check),
        f"<h2>{'The first ' if len(shown) < len(annotated) else ''}{len(shown)} clips</h2><div class=sheet>",
        *(
            f"<a href='#{_id(i)}'><img loading=lazy src='{_frame(one)}'>{_text(one.label)}</a>"
            for i, one in enumerate(shown)
        ),
        "</div>",
        *(_clip(i, one) for i, one in enumerate(shown)),
        "</html>",
    ]
    write_text(out / "report.html", "\n".join(filter(None, parts)) + "\n")


def _counts(heading: str, counts: Counter[str]) -> str:
    rows = (f"<tr><td>{_text(what)}<td class=number>{count}" for what, count in counts.most_common())
    return f"<h2>{heading}</h2><table>{''.join(rows)}</table>" if counts else ""


def _without(heading: str, clips: Sequence[Annotation]) -> str:
    """The reasons why clips are not there, with how many these are and the names of the first."""
    names: dict[str, list[str]] = {}
    for one in clips:
        names.setdefault(one.reason, []).append(one.name)
    rows = (
        f"<tr><td>{_text(reason)}<td class=number>{len(of_reason)}<td class=by>{_text(', '.join(of_reason[:NAMED]))}"
        f"{' ...' if len(of_reason) > NAMED else ''}"
        for reason, of_reason in sorted(names.items(), key=lambda item: -len(item[1]))
    )
    return f"<h2>{heading}</h2><table>{''.join(rows)}</table>" if clips else ""


def _check(check: HumanCheck | None) -> str:
    if check is None:
        return ""
    rows = (f"<tr><td>{_text(label)}<td class=number>{mean:.2f}" for label, mean in check.means.items())
    alpha = "not known" if check.alpha is None else f"{check.alpha:.2f}"
    return (
        f"<h2>Scores by people, 0 to 5</h2><table>{''.join(rows)}</table>"
        f"<p>{check.raters} raters, {check.clips} clips; Krippendorff's alpha: {alpha}</p>"
    )


def _clip(i: int, one: Annotation) -> str:
    most = max(one.units.values(), default=1)
    bars = (
        f"<tr><td>{_text(unit)}<td class=number>{value:.2f}"
        f"<td><span class=bar style='width:{8 * value / most:.1f}rem'></span>"
        for unit, value in one.units.items()
    )
    lines = [
        ("coarse caption", one.caption_coarse, one.describers.get("coarse")),
        ("fine caption", one.caption_fine, one.describers.get("fine")),
    ]
    texts = (
        f"<p>{_text(text)} <span class=by>{what}, {_text(by or '')}</span></p>" for what, text, by in lines if text
    )
    missing = (f"<p class=by>no {_text(kind)}: {_text(why)}</p>" for kind, why in one.unanswered.items())
    notes = (f"<p class=by>{_text(note)}</p>" for note in one.notes)
    return (
        f"<article id={_id(i)}><div><img loading=lazy src='{_frame(one)}'></div><div>"
        f"<h3>{_text(one.name)}: {_text(one.label)}</h3>"
        f"<p class=by>label by {_text(one.label_by)}; "
        f"peak: frame {one.peak_index} of {one.frames}, by {_text(one.peak_by)}</p>"
        f"{''.join(texts)}<table>{''.join(bars)}</table>{''.join((*missing, *notes))}</div></article>"
    )


def _id(i: int) -> str:
    return f"clip-{i}"


def _frame(one: Annotation) -> str:
    return html.escape(f"frames/{quote(one.name, errors='surrogateescape')}.png", quote=True)


def _text(text: str) -> str:
    return html.escape(text)
