"""What clients send, and how it is checked: /v1/emotions, and OpenAI's chat completions with clips."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emollama_jax.data.modalities import ALL
from emollama_jax.infer.sampling import TOP_LOGPROBS
from emollama_jax.serve.errors import ApiError, bad_request

TEXT = 20_000  # letters of a question or subtitle
STRUCTURES = 20_000  # commas and brackets of a JSON text, outside its strings and within

Text = Annotated[str, Field(max_length=TEXT)]
Labels = Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(min_length=2, max_length=100)]
Stop = Annotated[str, Field(max_length=200)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EmotionRequest(Strict):
    """A clip, and what is asked about it."""

    clip: str = Field(
        min_length=1,
        description="data:TYPE;base64,DATA; an https: URL where the server fetches; a file: URL in its allowed folder",
    )
    subtitle: Text = Field("", description="what the person says, in place of what the clip's file says")
    labels: Labels | None = Field(None, description="to choose from; default: those the model was trained on")
    orders: int | None = Field(None, ge=1, le=100, description="of the labels, that probabilities are averaged over")
    question: Text = Field("", description="answered in words, beside the label; with a task's tag, as '[reason] Why?'")
    modalities: str | None = Field(None, pattern="^[AVT]{1,3}$", description=f"any of {ALL}: audio, video, text")
    peak_index: int | None = Field(None, ge=0, lt=2**31, description="number of the peak frame, for that frame rule")


class EmotionForm(Strict):
    """A form with a file."""

    clip: Any = Field(json_schema_extra={"type": "string", "format": "binary"}, description="the file, or a URL")
    subtitle: Text = ""
    labels: str = Field("", description="separated by commas")
    orders: int | None = Field(None, ge=1, le=100)
    question: Text = ""
    modalities: str | None = Field(None, pattern="^[AVT]{1,3}$")
    peak_index: int | None = Field(None, ge=0, lt=2**31)


class Url(Strict):
    url: str = Field(min_length=1)
    detail: str | None = None


class InputAudio(Strict):
    data: str = Field(min_length=1)
    format: str = Field("wav", max_length=20)


class Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class TextPart(Part):
    type: Literal["text"]
    text: Text


class VideoPart(Part):
    type: Literal["video_url"]
    video_url: Url


class ImagePart(Part):
    type: Literal["image_url"]
    image_url: Url


class AudioUrlPart(Part):
    type: Literal["audio_url"]
    audio_url: Url


class InputAudioPart(Part):
    type: Literal["input_audio"]
    input_audio: InputAudio


AnyPart = Annotated[TextPart | VideoPart | ImagePart | AudioUrlPart | InputAudioPart, Field(discriminator="type")]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[AnyPart], Field(max_length=50)]
    name: str | None = None
    refusal: None = None


class StructuredOutputs(Strict):
    choice: Labels


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(Strict):
    """OpenAI's request, of which what this model cannot do is refused."""

    model: str | None = Field(None, max_length=200)
    messages: list[Message] = Field(min_length=1, max_length=200)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: Seed | None = None
    stop: Stop | list[Stop] | None = Field(None, max_length=200)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    structured_outputs: StructuredOutputs | None = Field(None, description="a choice among labels")
    guided_choice: Labels | None = Field(None, description="the same, as older clients write it")
    orders: int | None = Field(None, ge=1, le=100, description="of a choice, that probabilities are averaged over")
    subtitle: Text = Field("", description="what the person says, in place of what the clip's file says")
    n: Literal[1] | None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    modalities: list[Literal["text"]] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    user: str | None = Field(None, max_length=500)
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @property
    def choice(self) -> tuple[str, ...] | None:
        given = self.structured_outputs.choice if self.structured_outputs else self.guided_choice
        return tuple(given) if given else None

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


Model = TypeVar("Model", bound=BaseModel)


def parse_json(model: type[Model], body: bytes) -> Model:
    """Read a request's JSON text. Raises ApiError."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > STRUCTURES:
        raise bad_request("the JSON text has too many parts; send one clip and its questions", code="too_many_parts")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _of_validation(error) from error


def parse_fields(model: type[Model], fields: dict[str, Any]) -> Model:
    """Read a form's fields. Raises ApiError."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _of_validation(error) from error


def _of_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    first = max(found, key=lambda one: len(one["loc"]))  # of a value that may be several things, the nearest one
    names = [str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
    where = ".".join(names)[:200] or None
    message = first["msg"].splitlines()[0][:300]
    return bad_request(f"{where}: {message}" if where else message, where)


def json_body(*models: tuple[str, type[BaseModel]]) -> dict[str, Any]:
    """Return OpenAPI's description of a body, by content type."""
    content = {kind: {"schema": _schema(model)} for kind, model in models}
    return {"requestBody": {"required": True, "content": content}}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """A model's schema without references, as it stands inside a larger one."""
    schema = model.model_json_schema()
    named = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolved(named[node["$ref"].rpartition("/")[2]])
            return {key: resolved(value) for key, value in node.items() if key != "discriminator"}
        return [resolved(value) for value in node] if isinstance(node, list) else node

    return resolved(json.loads(json.dumps(schema)))
