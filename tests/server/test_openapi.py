"""The OpenAPI document: valid, complete, and true; and a bounded search for requests that break the server."""

from __future__ import annotations

from collections import Counter

import hypothesis
import pytest
import schemathesis
from openapi_spec_validator import validate
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from nanovllm.server import anthropic, chat, completions, embeddings, load, models, openapi, responses, restored, tokenize

MODULES = (anthropic, chat, completions, embeddings, load, models, openapi, responses, restored, tokenize)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
BUDGETS = {  # what bounds the work of a request
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/messages": "max_tokens",
}
CHAT = {"messages": [{"role": "user", "content": "a"}], "model": None}
CORE = {  # requests that work
    "/v1/completions": {"prompt": "a", "model": None},
    "/v1/chat/completions": {**CHAT, "max_completion_tokens": None},
    "/v1/responses": {"input": "a", "model": None},
    "/v1/embeddings": {"input": "a", "messages": None, "model": None},
    "/v1/messages": CHAT,
    "/v1/messages/count_tokens": CHAT,
    "/tokenize": {**CHAT, "prompt": None},
    "/detokenize": {"tokens": [1], "model": None},
}


def test_the_document_is_valid():
    validate(openapi.document())


def test_every_route_is_in_the_document():
    routes = {
        (method.lower(), route.path.replace(":path", ""))
        for module in MODULES
        for route in module.routes
        for method in route.methods
    }
    assert {(one.method, one.path) for one in openapi.OPERATIONS} == {pair for pair in routes if pair[0] != "head"}


def test_the_server_shows_the_document(tiny):
    assert tiny.get("/openapi.json").json == openapi.document()


def test_every_struct_of_a_request_is_strict():
    schemas = openapi.document()["components"]["schemas"]
    for one in openapi.OPERATIONS:
        if one.body is not None:
            assert schemas[one.body.__name__]["additionalProperties"] is False


def nearly_right(path, body, choose):
    """A request that works, with a few generated fields: so that these are looked at, and not only the first wrong one."""
    names = [name for name in sorted(body) if name not in CORE[path]]
    return bounded(path, {**{name: body[name] for name in choose.sample(names, min(3, len(names)))}, **CORE[path]})


def bounded(path, body):
    """Whatever else it asks for, it must not run for long."""
    if isinstance(body, dict) and path in BUDGETS:
        body = {**body, BUDGETS[path]: 2}
        if isinstance(body.get("n"), int):
            body["n"] = min(body["n"], 2)
    return body


def search(operation, mode, change, url):
    """Send generated requests; returns how often each status came."""
    statuses = Counter()

    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), choose=hypothesis.strategies.randoms())
    @hypothesis.settings(
        max_examples=12, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    def send(case, choose):
        case.body = change(case.body, choose)
        statuses[case.call_and_validate(base_url=url, checks=CHECKS, timeout=60).status_code] += 1

    send()
    return statuses


@pytest.fixture(scope="module")
def operations():
    schema = schemathesis.openapi.from_dict(openapi.document())
    return {operation.path: operation for operation in (result.ok() for result in schema.get_all_operations())}


@pytest.mark.parametrize("path", CORE)
def test_no_generated_body_breaks_the_server(tiny, operations, path):
    wrong = search(operations[path], GenerationMode.NEGATIVE, lambda body, _: bounded(path, body), tiny.url)
    assert set(wrong) <= {200, 400, 404}
    right = search(operations[path], GenerationMode.POSITIVE, lambda body, choose: nearly_right(path, body, choose), tiny.url)
    assert right[200], "no request got through"
    assert tiny.get("/health").status == 200


@pytest.mark.parametrize("path", [one.path for one in openapi.OPERATIONS if one.body is None])
def test_reading_routes_are_as_described(tiny, operations, path):
    assert search(operations[path], GenerationMode.POSITIVE, lambda body, _: body, tiny.url)
