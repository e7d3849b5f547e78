"""POST /v1/chat/completions: OpenAI's protocol, whole or streamed."""

import asyncio
import contextlib
import json
import math
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from emollama_jax.infer.engine import Engine
from emollama_jax.serve.answer_text import AnswerText, TokenTexts
from emollama_jax.serve.conversation import Conversation, emotion_question_of, parse_messages, take_media
from emollama_jax.serve.errors import ApiError, bad_request, error_responses
from emollama_jax.serve.jobs import Encoded, Event, Finished, Generation, OpenClip, Scored, Started, Tokens
from emollama_jax.serve.protocol import ChatRequest, json_body
from emollama_jax.serve.requests import content_type, deadline, read_json, too_late, unless_gone, wrong_type
from emollama_jax.serve.service import AskSettings, Service

COMPLETION = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "chat.completion"},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {"type": "array", "minItems": 1, "items": {"type": "object"}},
        "usage": {"type": "object"},
        "emollama": {"type": "object", "description": "what was seen of the clip; a choice's probabilities"},
    },
}


def make_router(service: Service) -> APIRouter:
    router = APIRouter()
    content = {"application/json": {"schema": COMPLETION}, "text/event-stream": {"schema": {"type": "string"}}}
    responses: dict[int | str, dict[str, Any]] = {
        200: {"description": "The answer, or its pieces.", "content": content},
        **error_responses(400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    }
    body = json_body(("application/json", ChatRequest))

    @router.post("/v1/chat/completions", responses=responses, openapi_extra=body, summary="Ask about a clip")
    async def chat_completions(request: Request) -> Response:
        start = time.monotonic()
        async with deadline(service.settings.request_timeout):
            if content_type(request) != "application/json":
                raise wrong_type("application/json")
            asked = await read_json(request, ChatRequest)
            answer = await unless_gone(request, _begin(service, asked))
            if asked.stream:
                end = start + service.settings.request_timeout
                return _EventStream(answer, end)
            async with answer.stack:
                return JSONResponse(await unless_gone(request, _whole(answer)))

    return router


@dataclass
class _ChatAnswer:
    """A chat's answer under way."""

    asked: ChatRequest
    service: Service
    engine: Engine
    events: AsyncIterator[Event]
    stack: contextlib.AsyncExitStack
    text: AnswerText
    name: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    prompt_tokens: int = 0
    seen: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None

    async def pieces(self) -> AsyncIterator[tuple[str, list[dict]]]:
        """Yield the answer's text with the tokens' log-probabilities, and note how it ends."""
        wants = self.asked.top_logprobs or 0 if self.asked.logprobs else None
        texts = TokenTexts(self.engine.tokenizer)
        async for event in self.events:
            match event:
                case Encoded():
                    self.seen |= {"clip": event.encoded.clip_info}
                case Scored():
                    probabilities = event.fields["probabilities"]
                    self.seen |= {name: event.fields[name] for name in ("probabilities", "label_by_order")}
                    self.finish_reason, self.prompt_tokens = "stop", event.prompt_tokens
                    yield event.fields["label"], [] if wants is None else [_choice_entry(probabilities, wants)]
                case Started():
                    self.prompt_tokens = event.prompt_tokens
                case Tokens():
                    piece, before = self.text.push(event.tokens), len(event.tokens)
                    pairs = zip(event.tokens[:before], event.logprobs, strict=False)
                    yield piece, [] if wants is None else [texts.entry(*pair, wants) for pair in pairs]
                    if self.text.stopped:
                        self.finish_reason = "stop"
                        return
                case Finished():
                    if not self.asked.choice:
                        self.finish_reason = "stop" if event.ended else "length"
                        yield self.text.finish(), []

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.text.tokens,
            "total_tokens": self.prompt_tokens + self.text.tokens,
        }

    def envelope(self, kind: str) -> dict[str, Any]:
        fields = {"id": self.name, "object": kind, "created": self.created}
        return {**fields, "model": self.service.settings.model_name}


class _EventStream(StreamingResponse):
    """A streamed answer, whose work is dropped when the client goes away, also before the first piece."""

    def __init__(self, answer: _ChatAnswer, end: float):
        super().__init__(_stream(answer, end), media_type="text/event-stream")
        self._stack = answer.stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


async def _begin(service: Service, asked: ChatRequest) -> _ChatAnswer:
    """Read the clip and wait until the engine has its prompt: what is wrong with a request is known then."""
    if asked.model not in (None, "", service.settings.model_name):
        message = f"no model {asked.model!r}; this server has {service.settings.model_name!r}"
        raise ApiError(404, message, "model_not_found", "model")
    if asked.top_logprobs and not asked.logprobs:
        raise bad_request("top_logprobs goes with logprobs", "top_logprobs")
    conversation = parse_messages(asked.messages)
    question = emotion_question_of(conversation.question) if asked.choice else conversation.question
    if not asked.choice and not question:
        raise bad_request("no question; write one as text beside the clip", "messages", "no_question")
    generation = None if asked.choice else _generation(service, asked, question)
    with service.uploads() as uploads:
        picture, sound = await take_media(uploads, conversation)
        modalities = _modalities(service.engine, picture is not None)
        engine = service.engine_for(
            AskSettings(asked.choice, question if asked.choice else None, asked.orders, modalities)
        )
        clip = await service.open_clip(picture, sound, subtitle=asked.subtitle.strip())
    return await _ask(service, asked, engine, clip, conversation, generation)


async def _ask(
    service: Service,
    asked: ChatRequest,
    engine: Engine,
    clip: OpenClip,
    conversation: Conversation,
    generation: Generation | None,
) -> _ChatAnswer:
    async with contextlib.AsyncExitStack() as stack:
        scores_labels = generation is None
        asking = service.asked(
            clip, engine, scores_labels=scores_labels, history=conversation.history, generation=generation
        )
        events = await stack.enter_async_context(asking)
        first = []
        async for event in events:
            first.append(event)
            if isinstance(event, Started | Scored):
                break
        text = AnswerText(engine.tokenizer, asked.stops)
        answer = _ChatAnswer(asked, service, engine, _chained(first, events), stack.pop_all(), text)
        answer.seen |= {
            "subtitle": clip.item.subtitle or first[0].encoded.clip.subtitle,
            "fingerprint": clip.fingerprint,
        }
        return answer


async def _chained(first: list[Event], rest: AsyncIterator[Event]) -> AsyncIterator[Event]:
    for event in first:
        yield event
    async for event in rest:
        yield event


def _modalities(engine: Engine, has_picture: bool) -> str | None:
    """Those in use, without the picture where there is none. Raises ApiError where nothing is left."""
    own = engine.predictor.modalities
    if has_picture:
        return None
    left = own.replace("V", "")
    if not left:
        raise bad_request("this server looks at pictures only; send one", "messages", "no_picture")
    return left


def _generation(service: Service, asked: ChatRequest, question: str) -> Generation:
    own, longest = service.engine.config.generate.max_new_tokens, service.engine.config.data.sequence_length
    tokens = asked.max_completion_tokens or asked.max_tokens or own
    if tokens > max(longest, own):
        raise bad_request(f"max_tokens {tokens}: at most {max(longest, own)}", "max_tokens")
    generate = service.generate_config(
        max_new_tokens=tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        repetition_penalty=asked.repetition_penalty,
    )
    seed = None if asked.seed is None else asked.seed % 2**32
    return Generation(question=question, generate=generate, seed=seed, logprobs=bool(asked.logprobs))


async def _whole(answer: _ChatAnswer) -> dict[str, Any]:
    text, logprobs = "", []
    async for piece, entries in answer.pieces():
        text += piece
        logprobs += entries
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": {"content": logprobs, "refusal": None} if answer.asked.logprobs else None,
        "finish_reason": answer.finish_reason,
    }
    return {
        **answer.envelope("chat.completion"),
        "choices": [choice],
        "usage": answer.usage,
        "emollama": answer.seen,
    }


async def _stream(answer: _ChatAnswer, end: float) -> AsyncIterator[str]:
    """Yield server-sent events."""
    usage = answer.asked.stream_options is not None and answer.asked.stream_options.include_usage

    def chunk(delta: dict[str, Any], entries: list[dict] = (), finish_reason: str | None = None, **more: Any) -> str:
        logprobs = {"content": list(entries), "refusal": None} if entries else None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return _event({**answer.envelope("chat.completion.chunk"), "choices": [choice], **more})

    try:
        yield chunk({"role": "assistant", "content": ""})
        pieces = answer.pieces()
        while True:
            try:
                piece, entries = await asyncio.wait_for(anext(pieces), max(0.0, end - time.monotonic()))
            except StopAsyncIteration:
                break
            except TimeoutError:
                raise too_late(answer.service.settings.request_timeout) from None
            if piece or entries:
                yield chunk({"content": piece}, entries)
        yield chunk({}, finish_reason=answer.finish_reason, emollama=answer.seen)
        if usage:
            yield _event({**answer.envelope("chat.completion.chunk"), "choices": [], "usage": answer.usage})
        yield "data: [DONE]\n\n"
    except ApiError as error:
        answer.service.metrics.refusals.labels(error.code).inc()
        yield _event(error.body())


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _choice_entry(probabilities: dict[str, float], alternatives: int) -> dict[str, Any]:
    """The labels as alternatives of a single token."""
    one = lambda label, p: {"token": label, "logprob": math.log(max(p, 1e-30)), "bytes": list(label.encode())}
    entries = [one(*pair) for pair in probabilities.items()]
    return {**entries[0], "top_logprobs": entries[:alternatives]}
