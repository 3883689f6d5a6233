"""OpenAI's own client completes, streams and gets errors from the server."""

from __future__ import annotations

import openai
import pytest

from servers import GatedWriter, running, tiny_writer

pytestmark = pytest.mark.kernels

WRITER = tiny_writer()


@pytest.fixture(scope="module")
def server():
    with running(WRITER, name="poems", api_key="secret") as made:
        yield made


@pytest.fixture(scope="module")
def theirs(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as made:
        yield made


def test_openais_client_completes(theirs):
    expected = WRITER.complete("ab", 20, 2, seed=1, temperature=0.7)
    found = theirs.completions.create(
        model="poems", prompt="ab", max_tokens=20, n=2, seed=1, temperature=0.7
    )
    assert [choice.text for choice in found.choices] == [e.text for e in expected]
    assert found.usage.total_tokens == 42
    assert [model.id for model in theirs.models.list()] == ["poems"]
    assert theirs.models.retrieve("poems").owned_by == "mygpt"
    more = theirs.completions.create(model="poems", prompt="ab", extra_body={"top_k": 1})
    assert more.choices[0].text == WRITER.complete("ab", 16, top_k=1)[0].text


def test_openais_client_streams_and_stops(theirs):
    stop = WRITER.complete("ab", 40, seed=5)[0].text[20:23]
    options = {"model": "poems", "prompt": "ab", "max_tokens": 40, "seed": 5, "stop": [stop]}
    whole = theirs.completions.create(**options).choices[0]
    chunks = list(
        theirs.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.text
    assert chunks[-2].choices[0].finish_reason == whole.finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens > 0


def test_openais_client_reads_logprobs(theirs):
    found = theirs.completions.create(
        model="poems", prompt="ab", max_tokens=5, logprobs=2, echo=True, seed=1
    )
    entries = found.choices[0].logprobs
    assert "".join(entries.tokens) == found.choices[0].text
    assert entries.token_logprobs[0] is None
    assert all(value <= 0 for value in entries.token_logprobs[1:])


def test_openais_client_raises_the_servers_errors(server, theirs):
    with pytest.raises(openai.BadRequestError, match="limit of 128") as caught:
        theirs.completions.create(model="poems", prompt="ab", n=999)
    assert caught.value.param == "n"
    with pytest.raises(openai.NotFoundError, match="its model is poems"):
        theirs.completions.create(model="davinci-002", prompt="ab")
    with pytest.raises(openai.NotFoundError, match="is not a chat model"):
        theirs.chat.completions.create(model="poems", messages=[{"role": "user", "content": "a"}])
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="API key"),
    ):
        stranger.completions.create(model="poems", prompt="ab")


def test_an_error_in_the_middle_of_a_stream_is_raised_by_openais_client():
    writer = tiny_writer(kind=GatedWriter)
    with (
        running(writer) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as theirs,
    ):
        writer.gate.allow(1)
        chunks = iter(
            theirs.completions.create(model="mygpt", prompt="ab", max_tokens=9, stream=True)
        )
        assert next(chunks).choices[0].text
        writer.gate.error = RuntimeError("made up")
        writer.gate.open()
        with pytest.raises(openai.APIError, match="decoding failed"):
            list(chunks)
