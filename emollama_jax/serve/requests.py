"""What the routes do alike: bodies, deadlines, and clients that go away."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from starlette.datastructures import FormData
from starlette.requests import ClientDisconnect, Request

from emollama_jax.serve.errors import ApiError
from emollama_jax.serve.protocol import Model, parse_json

Result = TypeVar("Result")
LARGE = 1 << 16  # bytes of a JSON text from which it is read in a thread


def content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def wrong_type(accepted: str) -> ApiError:
    return ApiError(415, f"the body's content type must be {accepted}", "content_type")


async def read_json(request: Request, model: type[Model]) -> Model:
    """Read a body of JSON. Raises ApiError."""
    body = await request.body()
    return await asyncio.to_thread(parse_json, model, body) if len(body) > LARGE else parse_json(model, body)


@contextlib.asynccontextmanager
async def read_form(request: Request) -> AsyncIterator[FormData]:
    """Read a form with one file at most, which is gone after the block. Raises HTTPException for a damaged one."""
    async with request.form(max_files=1, max_fields=20, max_part_size=1 << 20) as form:
        yield form


@contextlib.asynccontextmanager
async def deadline(seconds: float) -> AsyncIterator[None]:
    """Raise ApiError where the block takes longer."""
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise too_late(seconds) from error


def too_late(seconds: float) -> ApiError:
    return ApiError(504, f"there was no answer within {seconds:g} s; ask again, or for less", "timeout")


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Return what the work gives; it is cancelled, and ClientDisconnect raised, when the client goes away."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
