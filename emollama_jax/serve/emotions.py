"""POST /v1/emotions: a clip in, the record of `emollama predict` out."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse

from emollama_jax.infer.answer import ClipAnswer
from emollama_jax.infer.batch_run import answer_fields
from emollama_jax.serve.errors import bad_request, error_responses
from emollama_jax.serve.jobs import Generation
from emollama_jax.serve.protocol import EmotionForm, EmotionRequest, json_body, parse_fields
from emollama_jax.serve.requests import content_type, deadline, read_form, read_json, unless_gone, wrong_type
from emollama_jax.serve.service import AskSettings, Service
from emollama_jax.serve.uploads import MediaFile, Uploads

RECORD = {
    "type": "object",
    "required": ["name", "status", "answer", "label", "probabilities", "subtitle", "clip", "fingerprint", "weights"],
    "properties": {
        "name": {"type": "string"},
        "status": {"const": "success"},
        "answer": {"type": "string", "description": "to the question, or the label"},
        "label": {"type": "string"},
        "label_by_order": {"type": "array", "items": {"type": "string"}},
        "probabilities": {"type": "object", "additionalProperties": {"type": "number"}},
        "subtitle": {"type": "string"},
        "clip": {"type": "object", "description": "what was seen and heard"},
        "fingerprint": {"type": "string"},
        "timings_s": {"type": "object", "additionalProperties": {"type": "number"}},
        "weights": {"type": "object", "description": "fingerprints of the model's weights"},
    },
}


def make_router(service: Service) -> APIRouter:
    router = APIRouter()
    responses: dict[int | str, dict[str, Any]] = {
        200: {"description": "The clip's record.", "content": {"application/json": {"schema": RECORD}}},
        **error_responses(400, 401, 408, 413, 415, 422, 429, 500, 503, 504),
    }
    body = json_body(("application/json", EmotionRequest), ("multipart/form-data", EmotionForm))

    @router.post("/v1/emotions", responses=responses, openapi_extra=body, summary="The emotion in a clip")
    async def emotions(request: Request) -> JSONResponse:
        async with deadline(service.settings.request_timeout):
            if content_type(request) == "application/json":
                asked = await read_json(request, EmotionRequest)
                return await _answer(request, service, asked, asked.clip)
            if content_type(request) != "multipart/form-data":
                raise wrong_type("application/json or multipart/form-data")
            async with read_form(request) as form:
                fields = dict(form)
                if any(isinstance(value, UploadFile) for name, value in fields.items() if name != "clip"):
                    raise bad_request("only `clip` may be a file", "clip")
                # An empty field of a form is one that was not filled in.
                given = parse_fields(EmotionForm, {name: value for name, value in fields.items() if value != ""})
                named = given.model_dump(exclude={"clip", "labels"})
                labels = [label.strip() for label in given.labels.split(",")] if given.labels else None
                asked = parse_fields(EmotionRequest, {**named, "clip": "file", "labels": labels})
                return await _answer(request, service, asked, given.clip)

    return router


async def _answer(request: Request, service: Service, asked: EmotionRequest, clip: UploadFile | str) -> JSONResponse:
    return JSONResponse(await unless_gone(request, emotion_record(service, asked, clip)))


async def emotion_record(service: Service, asked: EmotionRequest, clip: UploadFile | str) -> dict[str, Any]:
    """Return the record of a clip that was sent, or that a URL means. Raises ApiError."""
    labels = tuple(asked.labels) if asked.labels else None
    engine = service.engine_for(AskSettings(labels, orders=asked.orders, modalities=asked.modalities))
    with service.uploads() as uploads:
        file = await _take(uploads, clip)
        parts = (None, file) if file.kind == "audio" else (file, None)
        opened = await service.open_clip(*parts, subtitle=asked.subtitle.strip(), peak_index=asked.peak_index)
    generation = Generation(question=asked.question) if asked.question.strip() else None
    answer = await service.answer(opened, engine, scores_labels=True, generation=generation)
    return record_of(answer, service)


def record_of(answer: ClipAnswer, service: Service) -> dict[str, Any]:
    """Return an answer as `emollama predict` writes it, with the label and the weights' fingerprints."""
    more = {"label": answer.label, "label_by_order": list(answer.label_by_order), "weights": service.weights}
    return {"name": answer.name, **answer_fields(answer), **more}


async def _take(uploads: Uploads, clip: UploadFile | str) -> MediaFile:
    if isinstance(clip, str):
        return await uploads.from_url(clip, "clip")
    return await uploads.from_upload(clip.file, clip.filename or "", clip.content_type or "", "clip")
