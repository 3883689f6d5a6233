"""The ASGI application: routes, middleware, and errors in the API's JSON form."""

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

from mygpt.decode.writer import Writer
from mygpt.server.completions import Completions
from mygpt.server.guards import Guards
from mygpt.server.inside import InsideRoute
from mygpt.server.openapi import Model, openapi
from mygpt.server.playground import Playground
from mygpt.server.problems import ApiError, broken, closing, json_answer, to_json
from mygpt.server.requests import unknown_model
from mygpt.server.scheduler import Scheduler
from mygpt.server.settings import ServerSettings
from mygpt.server.threads import ClientGone, Threads


def make_app(writer: Writer, settings: ServerSettings) -> Starlette:
    """The application that serves one model; its decoding thread starts with the first request.

    Its `state.scheduler` is the `Scheduler`.

    Raises:
        InputError: if the writer's engine is not available.
    """
    scheduler = Scheduler(lambda: writer.open_batch(settings.slots + 1), settings.max_waiting)
    threads = Threads(settings.max_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        scheduler.stop()
        threads.close()

    completions = Completions(writer, settings, scheduler, threads)
    page = Playground(writer, settings, scheduler, threads)
    inside = InsideRoute(writer, settings, threads)
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
        Route("/api/inside", inside.answer, methods=["POST"]),
        Route("/api/model", page.model),
        Route("/", page.page),
        Route("/write", page.writing),
        Route("/static/{name}", page.file),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Guards, settings=settings)],
        exception_handlers=dict.fromkeys(
            (ApiError, HTTPException, ClientDisconnect, ClientGone, Exception), _error
        ),
    )
    app.router.redirect_slashes = False
    app.state.scheduler = scheduler
    return app


class About:
    """Routes with information about the server and its model."""

    def __init__(self, writer: Writer, settings: ServerSettings, scheduler: Scheduler) -> None:
        self.name, self.scheduler, self.created = settings.name, scheduler, int(time.time())
        self.document = to_json(openapi(writer.tokenizer, settings))

    def _model(self) -> Model:
        created = self.created
        return {"id": self.name, "object": "model", "created": created, "owned_by": "mygpt"}

    async def models(self, request: HttpRequest) -> Response:
        """GET /v1/models."""
        return json_answer({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Response:
        """GET /v1/models/ID."""
        if request.path_params["model"] != self.name:
            raise unknown_model(request.path_params["model"], self.name)
        return json_answer(self._model())

    async def chat(self, request: HttpRequest) -> Response:
        """/v1/chat/completions: an error, since the models are not chat models."""
        raise ApiError(
            404,
            f"{self.name} is not a chat model, it continues text: use POST /v1/completions with a "
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


async def _error(request: HttpRequest, error: Exception) -> Response:
    """The response to a request whose handler raised `error`."""
    if isinstance(error, (ClientDisconnect, ClientGone)):
        return Response(status_code=499)
    if isinstance(error, HTTPException):  # Starlette's: no such route, or not with this method
        path = f"{request.url.path!r:.80}"
        message = {
            404: f"there is no resource at {path}: GET /openapi.json lists all of them",
            405: f"{path} does not support {request.method!r:.20}: see GET /openapi.json",
        }.get(error.status_code, error.detail)
        error = ApiError(error.status_code, message, headers=error.headers)
    if not isinstance(error, ApiError):
        error = ApiError(500, "an internal error of the server: see its log", code="bug")
    return error.answer()
