"""Random requests generated from the OpenAPI document, valid and invalid: no 500, and no hang.

MYGPT_FUZZ_CASES sets how many (120); each must be answered within ten seconds.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from mygpt.server.openapi import openapi
from mygpt.server.settings import ServerSettings
from servers import running, tiny_writer

pytestmark = pytest.mark.processes

CASES = int(os.environ.get("MYGPT_FUZZ_CASES", "120"))
LIMITS: dict[str, Any] = {"max_tokens": 200, "max_choices": 6, "max_prompt_tokens": 17}
WRITER = tiny_writer()
SCHEMA = schemathesis.openapi.from_dict(openapi(WRITER.tokenizer, ServerSettings(**LIMITS)))

# Errors that the schema cannot express: combinations of valid fields.
TOGETHER = (
    "best_of=",
    "choices, more than the limit of 6",
    "stream_options need a stream",
    "overflows float32",
    "prompt tokens are more than 17, the limit for one response",
    "the prompt has 17 tokens and the window 16",
    "other tokens are not read",
    "is not a part of this model",
    "cannot be combined",
    "the second text",
)


@pytest.fixture(scope="module")
def server():
    with running(WRITER, **LIMITS) as made, requests.Session() as session:
        yield made.url, session


def some(mode: GenerationMode):
    """Half of the cases, each kind of request among them, the same at every run."""

    def decorate(test):
        found = given(case=SCHEMA.as_strategy(generation_mode=mode))(test)
        return settings(
            max_examples=CASES // 2,
            derandomize=CASES <= 300,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(found)

    return decorate


@some(GenerationMode.POSITIVE)
def test_valid_requests_get_responses_that_match_the_document(server, case):
    """Status, content type and schema; an error can only be about a combination of fields."""
    url, session = server
    response = case.call(base_url=url, session=session, timeout=10)
    case.validate_response(response, excluded_checks=[positive_data_acceptance])
    if response.status_code >= 400:
        assert response.status_code == 400
        message = response.json()["error"]["message"]
        assert any(words in message for words in TOGETHER), message


@some(GenerationMode.NEGATIVE)
def test_invalid_requests_get_errors_that_match_the_document(server, case):
    """Each with an error in the API's form."""
    url, session = server
    response = case.call(base_url=url, session=session, timeout=10)
    case.validate_response(response)
    if response.status_code >= 400:
        assert response.json()["error"]["message"]
