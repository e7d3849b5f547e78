"""The page: a clip and its words in, the emotion, the reasons and what the model saw out."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from emollama_jax.serve.demo import figures
from emollama_jax.serve.demo.session import EMOTION, REASON, Asked, Shown, Talk, ask
from emollama_jax.serve.errors import ApiError
from emollama_jax.serve.service import AskSettings, Service
from emollama_jax.text.labels import DFEW, MER2023, MERR

KEPT_S = (300, 600)  # how often the files of clips are looked at, and from which age on they are removed
TITLE = "Emotion in a clip"
ABOUT = (
    "A clip of a person speaking goes in: what is seen, heard and said. An emotion, or a reasoned answer, comes out."
)
NO_BARS = "Press Emotion to see how likely each label is."
NO_SEEN = "The frame, the face, the sound and the words that the model is given."


def make_page(service: Service, examples: Sequence[Path] = ()) -> gr.Blocks:
    """Make the page.

    Args:
        examples: clips to try.
    """
    own = service.engine.config.prompt.labels
    service.usual_asks.append(AskSettings(orders=default_orders(service)))
    sets = {"the model's own": own, "MERR": MERR, "MER2023": MER2023, "DFEW": DFEW}
    choices = [(f"{name}: {', '.join(labels)}", ", ".join(labels)) for name, labels in sets.items()]
    choices = list({value: (name, value) for name, value in reversed(choices)}.values())[::-1]
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=KEPT_S) as page:
        talk = gr.State(Talk())
        gr.Markdown(f"# {TITLE}\n{ABOUT}")
        with gr.Row():
            with gr.Column(min_width=320):
                video = gr.Video(
                    label="Clip",
                    sources=["upload", "webcam"],
                    include_audio=True,
                    webcam_options=gr.WebcamOptions(mirror=False),
                    buttons=[],
                    elem_id="clip",
                )
                if examples:
                    gr.Examples([[str(path)] for path in examples], [video], label="Made-up examples")
                subtitle = gr.Textbox(
                    label="What is said",
                    info="Typed words count before those that are found in the clip.",
                    elem_id="subtitle",
                )
                labels = gr.Dropdown(
                    choices,
                    value=choices[0][1],
                    allow_custom_value=True,
                    label="Labels",
                    info="Choose a set, or type your own, separated by commas.",
                    elem_id="labels",
                )
                orders = gr.Slider(
                    1,
                    9,
                    value=default_orders(service),
                    step=1,
                    label="Orders of the labels",
                    info="Probabilities depend on the order in which labels are listed: the spread shows how much.",
                )
                with gr.Accordion("How answers are drawn", open=False):
                    temperature = gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature")
            with gr.Column(min_width=320):
                with gr.Row():
                    emotion = gr.Button("Emotion", variant="primary", min_width=120, elem_id="emotion")
                    reason = gr.Button("Reason", variant="primary", min_width=120, elem_id="reason")
                labelled = {"show_label": True, "container": True}
                bars = gr.HTML(figures.empty(NO_BARS), label="How likely each label is", elem_id="bars", **labelled)
                chat = gr.Chatbot(label="Conversation", height=320, render_markdown=False, buttons=[], elem_id="chat")
                with gr.Row(equal_height=True):
                    question = gr.Textbox(
                        placeholder="A question of your own",
                        show_label=False,
                        container=False,
                        scale=4,
                        min_width=160,
                        elem_id="question",
                    )
                    send = gr.Button("Ask", min_width=80, scale=1, elem_id="ask")
                seen = gr.HTML(figures.empty(NO_SEEN), label="What the model saw", elem_id="seen", **labelled)

        async def run(task: str, *given: Any) -> AsyncIterator[tuple[Any, ...]]:
            *fields, before = given
            names = ("video", "subtitle", "labels", "orders", "temperature", "question")
            values = dict(zip(names, fields, strict=True))
            values = {name: "" if value is None else value for name, value in values.items()}
            numbers = {"orders": int(values["orders"] or 1), "temperature": float(values["temperature"] or 0)}
            asked = Asked(**{**values, **numbers, "task": task})
            try:
                async for shown in ask(service, asked, before):
                    yield _updates(shown)
            except ApiError as error:  # not raised: what follows, such as free buttons, would be left out
                gr.Warning(error.message, title="No answer")
                yield (gr.skip(),) * len(parts)

        fields = [video, subtitle, labels, orders, temperature, question, talk]
        parts = [talk, chat, bars, seen, subtitle]

        def handler(task: str):
            async def handle(*given: Any) -> AsyncIterator[tuple[Any, ...]]:
                async for updates in run(task, *given):
                    yield updates

            return handle

        private = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}
        at_once = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        buttons = [emotion, reason, send]
        can_be_pressed = lambda value: lambda: [gr.update(interactive=value)] * len(buttons)

        def wire(triggers: Sequence[Any], task: str) -> None:
            """One question at a time: the next one goes on from its answer."""
            asking = gr.on(triggers, can_be_pressed(False), None, buttons, **at_once)
            asked = asking.then(handler(task), fields, parts, **private)
            if not task:
                asked.success(lambda: "", None, question, **at_once)
            asked.then(can_be_pressed(True), None, buttons, **at_once)

        wire([emotion.click], EMOTION)
        wire([reason.click], REASON)
        wire([send.click, question.submit], "")

        def begin_anew(path: str | None, before: Talk) -> tuple[Any, ...]:
            if path and before.key.startswith(f"{path} "):  # it has been asked about already
                return (gr.skip(),) * (len(parts) - 1)
            return Talk(), [], figures.empty(NO_BARS), figures.empty(NO_SEEN)

        video.change(begin_anew, [video, talk], parts[:-1], **at_once)
        video.change(None, None, subtitle, js="() => ''")  # at once, before new words are typed
    return page


def default_orders(service: Service) -> int:
    """Return the number of label orders that the page begins with."""
    return min(3, len(service.engine.config.prompt.labels))


def _updates(shown: Shown) -> tuple[Any, ...]:
    messages = [{"role": role, "content": text} for role, text in shown.talk.said]
    kept = lambda value: gr.skip() if value is None else value
    return shown.talk, messages, kept(shown.bars), kept(shown.seen), kept(shown.subtitle)
