"""The routes of a server, as an ASGI application."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response

from emollama_jax import __version__
from emollama_jax.serve import chat, emotions
from emollama_jax.serve.api_page import api_page
from emollama_jax.serve.errors import ApiError, error_responses
from emollama_jax.serve.guard import ASKS, Guard
from emollama_jax.serve.service import Service

ABOUT = """Emotion-LLaMA in JAX: ask about a clip of a person speaking.

`POST /v1/emotions` gives the emotion in a clip, `POST /v1/chat/completions` is OpenAI's protocol."""
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]
CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed"}


def make_app(service: Service) -> FastAPI:
    """Make the application of a service, without its demo."""
    app = FastAPI(title="emollama", version=__version__, description=ABOUT, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.state.service = service
    for module in (emotions, chat):
        app.include_router(module.make_router(service))
    _add_status(app, service)
    _add_ends(app)
    if service.settings.api_key:
        app.openapi = lambda: _with_key(app)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(Guard, service=service)  # the outermost
    return app


def _add_status(app: FastAPI, service: Service) -> None:
    model = {
        "id": service.settings.model_name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "emollama",
        "weights": service.weights,
        "labels": list(service.engine.config.prompt.labels),
    }

    @app.get("/v1/models", summary="The model that is served", responses=error_responses(401))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name}", summary="One model", responses=error_responses(401, 404))
    async def one_model(name: str) -> dict[str, Any]:
        if name != model["id"]:
            raise ApiError(404, f"no model of this name; this server has {model['id']!r}", "model_not_found", "model")
        return model

    @app.get("/health", summary="Whether the process lives")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether requests should come here", responses=error_responses(503))
    async def ready() -> Any:
        if reason := service.unready:
            return ApiError(503, reason, "not_ready", retry_after_s=5).response()  # no refusal
        return {"status": "ready"}

    @app.get("/version", summary="Of the package")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics", summary="Figures for Prometheus", response_class=Response, responses=error_responses(401))
    async def metrics() -> Response:
        service.metrics.ready.set(not service.unready)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(api_page(app.openapi()))


def _add_ends(app: FastAPI) -> None:
    """Refuse what is no route below /v1, also where a page is mounted at /."""

    @app.api_route("/v1/{rest:path}", methods=METHODS, include_in_schema=False)
    async def no_route(request: Request, rest: str) -> None:
        raise HTTPException(405 if request.url.path in (*ASKS, "/v1/models") else 404)


async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    request.app.state.service.metrics.refusals.labels(error.code).inc()
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    """What Starlette refuses: a path that is not there, a method, a damaged form."""
    code = CODES.get(error.status_code, "invalid_request")
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    known = ApiError(error.status_code, message, code, headers=dict(error.headers or {}))
    return await _api_error(request, known)


def _with_key(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description with its key."""
    if not app.openapi_schema:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        app.openapi_schema = schema
    return app.openapi_schema
