"""The application: routes, guards, and errors in the API's form."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from mygpt.generation.writer import Writer
from mygpt.server.bodies import Bodies
from mygpt.server.completions import Completions
from mygpt.server.guards import Guards, Telling
from mygpt.server.openapi import openapi
from mygpt.server.playground import Playground
from mygpt.server.problems import ApiError, broken, closing, json_answer, to_json
from mygpt.server.reading import Reader
from mygpt.server.requests import unknown_model
from mygpt.server.scheduler import Scheduler
from mygpt.server.settings import ServerSettings
from mygpt.server.streaming import ClientGone


def make_app(writer: Writer, settings: ServerSettings) -> Starlette:
    """The application that serves one model; its thread starts with the first request.

    Its `state.scheduler` is the `Scheduler`.

    Raises:
        InputError: for an engine that cannot be had.
    """
    scheduler = Scheduler(lambda: writer.open_batch(settings.slots + 1), settings.max_waiting)
    reader, bodies = Reader(writer, settings.max_waiting), Bodies(settings.max_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        scheduler.stop()
        reader.close()
        bodies.close()

    completions = Completions(writer, settings, scheduler, reader, bodies)
    page = Playground(writer, settings, scheduler, reader, bodies)
    about = About(writer, settings, scheduler)
    routes = [
        Route("/v1/completions", completions.answer, methods=["POST"]),
        Route("/v1/models", about.models),
        Route("/v1/models/{model:path}", about.model),
        Route("/v1/chat/completions", about.chat, methods=["GET", "POST"]),
        Route("/health", about.health),
        Route("/openapi.json", about.openapi),
        Route("/api/next", page.next, methods=["POST"]),
        Route("/api/attention", page.attention, methods=["POST"]),
        Route("/api/model", page.model),
        Route("/", page.page),
        Route("/static/{name}", page.file),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Telling, settings.log), Middleware(Guards, settings)],
        exception_handlers={
            ApiError: _told,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            ClientGone: _gone,
            Exception: _bug,
        },
    )
    app.router.redirect_slashes = False
    app.state.scheduler = scheduler
    return app


class About:
    """Routes that tell about the server."""

    def __init__(self, writer: Writer, settings: ServerSettings, scheduler: Scheduler) -> None:
        self.name, self.scheduler, self.created = settings.name, scheduler, int(time.time())
        self.document = to_json(openapi(writer, settings))

    def _model(self) -> dict[str, object]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "mygpt",
        }

    async def models(self, request: HttpRequest) -> Response:
        """GET /v1/models."""
        return json_answer({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Response:
        """GET /v1/models/ID."""
        if request.path_params["model"] != self.name:
            raise unknown_model(request.path_params["model"], self.name)
        return json_answer(self._model())

    async def chat(self, request: HttpRequest) -> Response:
        """Chat, which these models cannot."""
        raise ApiError(
            404,
            f"{self.name} continues text and is no chat model: use POST /v1/completions with a "
            "prompt",
            code="not_a_chat_model",
        )

    async def health(self, request: HttpRequest) -> Response:
        """GET /health."""
        scheduler = self.scheduler
        content = {
            "healthy": scheduler.healthy,
            "running": scheduler.running,
            "waiting": scheduler.waiting,
            "restarts": scheduler.restarts,
        }
        if scheduler.healthy:
            return json_answer(content)
        reason = broken().message if scheduler.dead else closing().message
        problem = ApiError(503, reason, code="unhealthy")
        return json_answer(content | problem.to_dict(), problem.status)

    async def openapi(self, request: HttpRequest) -> Response:
        """GET /openapi.json."""
        return json_answer(self.document)


async def _told(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.answer()


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """What Starlette itself refuses: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    path = f"{request.url.path!r:.80}"
    message = {
        404: f"there is nothing at {path}: GET /openapi.json says what there is",
        405: f"{path} does not take {request.method!r:.20}",
    }.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers).answer()


async def _gone(request: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _bug(request: HttpRequest, error: Exception) -> Response:
    return ApiError(500, "an error of the server's own: its log says more", code="bug").answer()
