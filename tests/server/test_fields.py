"""The table of fields against the structs, the page, the tests, and a running server."""

from __future__ import annotations

import ast
from pathlib import Path

import msgspec
import pytest

from nanovllm.server import fields
from nanovllm.server.anthropic_protocol import CountTokensRequest, MessagesRequest
from nanovllm.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from nanovllm.server.responses_protocol import ResponsesRequest

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "server" / "fields.md"
STRUCTS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
SMALL_BODIES = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/v1/embeddings": {"input": "a"},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "a"}]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
}

# vLLM's fields, from its protocol modules (0.28): each must be in our table.
SAMPLING = """use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids include_stop_str_in_output ignore_eos
    min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side allowed_token_ids
    prompt_logprobs logprob_token_ids bad_words"""
ENGINE = """add_special_tokens response_format structured_outputs priority request_id session_id return_tokens_as_token_ids
    return_token_ids return_token_offsets routed_experts_prompt_start cache_salt kv_transfer_params ec_transfer_params
    vllm_xargs repetition_detection thinking_token_budget stream_interval"""
OPENAI = """model echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream stream_options
    temperature top_p user"""
VLLM = {
    "/v1/completions": f"{OPENAI} {SAMPLING} {ENGINE} prompt suffix prompt_embeds best_of",
    "/v1/chat/completions": f"""{OPENAI} {SAMPLING} {ENGINE} messages top_logprobs max_completion_tokens tools tool_choice
        parallel_tool_calls reasoning_effort include_reasoning add_generation_prompt continue_final_message documents
        chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs return_prompt_text
        return_assistant_tokens_mask""",
    "/v1/responses": """background include input instructions max_output_tokens max_tool_calls metadata model
        parallel_tool_calls previous_response_id prompt reasoning include_reasoning service_tier store stream temperature text
        tool_choice tools top_logprobs top_p top_k truncation user presence_penalty frequency_penalty repetition_penalty
        prompt_cache_key seed stop ignore_eos priority cache_salt structured_outputs logit_bias""",
    "/v1/embeddings": """model input messages user encoding_format dimensions embed_dtype endianness use_activation
        truncate_prompt_tokens truncation_side priority cache_salt request_id""",
    "/tokenize": "prompt messages add_special_tokens return_token_strs chat_template chat_template_kwargs tools",
    "/detokenize": "tokens",
}
REFUSED_INSIDE = [
    *(
        (path, name, {"structured_outputs": {"regex": "a", name.partition(".")[2]: True}})
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses")
        for name in (
            "structured_outputs.structural_tag",
            "structured_outputs.disable_any_whitespace",
            "structured_outputs.disable_additional_properties",
            "structured_outputs.whitespace_pattern",
        )
    ),
    ("/v1/completions", "stream_options.include_obfuscation", {"stream": True, "stream_options": {"include_obfuscation": True}}),
    ("/v1/chat/completions", "response_format.type", {"response_format": {"type": "structural_tag"}}),
    ("/v1/chat/completions", "tool_choice.type", {"tool_choice": {"type": "allowed_tools", "function": {"name": "f"}}}),
    ("/v1/responses", "reasoning.summary", {"reasoning": {"summary": "auto"}}),
    ("/v1/responses", "text.verbosity", {"text": {"verbosity": "low"}}),
    ("/v1/responses", "tools[0]", {"tools": [{"type": "web_search"}]}),
    ("/v1/messages", "thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ("/v1/messages", "tools[0]", {"tools": [{"type": "bash_20250124", "name": "bash"}]}),
]
REFUSED = [(path, field.name) for path, table in fields.ENDPOINTS.items() for field in table if not field.is_honoured]


def test_the_structs_have_exactly_the_honoured_fields():
    for path, struct in STRUCTS.items():
        assert {field.encode_name for field in msgspec.structs.fields(struct)} == fields.honoured(path), path


def test_no_field_is_both_honoured_and_refused():
    for path, table in fields.ENDPOINTS.items():
        assert len({field.name for field in table}) == len(table), path


@pytest.mark.parametrize("path", VLLM)
def test_every_field_of_vllm_is_in_the_table(path):
    assert set(VLLM[path].split()) <= {field.name for field in fields.ENDPOINTS[path]}


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == fields.render_page(), "run python scripts/field_table.py"


def test_every_honoured_field_has_a_test():
    tested = {pair for file in HERE.glob("test_*.py") for pair in _marks(file)}
    honoured = {(path, field.name) for path, table in fields.ENDPOINTS.items() for field in table if field.is_honoured}
    assert sorted(honoured - tested) == []
    assert sorted(tested - honoured) == [], "a mark names a field that does not exist"


def _marks(file: Path) -> list[tuple[str, str]]:
    """(endpoint, field) of each `@pytest.mark.honours(endpoint, "field field ...")`."""
    found, constants = [], {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Assign)
            and isinstance(target := node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple)
        ):
            constants |= {
                name.id: value.value for name, value in zip(target.elts, node.value.elts) if isinstance(value, ast.Constant)
            }
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "honours":
            path, *names = [constants[one.id] if isinstance(one, ast.Name) else one.value for one in node.args]
            found += [(path, name) for text in names for name in text.split()]
    return found


@pytest.mark.parametrize(("path", "name"), REFUSED, ids=[f"{path} {name}" for path, name in REFUSED])
def test_a_refused_field_is_a_400_that_names_it(tiny, path, name):
    reply = tiny.post(path, {**SMALL_BODIES[path], name: 1})
    assert (reply.status, reply.error["param"]) == (400, name)
    assert name in reply.error["message"]
    assert fields.refused(path)[name] in reply.error["message"]


@pytest.mark.parametrize(("path", "name", "extra"), REFUSED_INSIDE, ids=[f"{path} {name}" for path, name, _ in REFUSED_INSIDE])
def test_a_refused_field_inside_an_object_is_a_400_that_names_it(tiny, path, name, extra):
    reply = tiny.post(path, {**SMALL_BODIES[path], **extra})
    assert (reply.status, reply.error["param"]) == (400, name)


@pytest.mark.parametrize("path", STRUCTS)
def test_null_means_left_out_for_every_field(tiny, path):
    names = [field.name for field in fields.ENDPOINTS[path] if field.name not in SMALL_BODIES[path]]
    if path == "/v1/embeddings":
        names.remove("messages")
    assert tiny.post(path, {**dict.fromkeys(names), **SMALL_BODIES[path]}).status == 200


def test_null_means_left_out_at_every_level_and_for_fields_of_newer_clients(tiny):
    block = {"type": "text", "text": "hi", "citations": None, "of_next_year": None}
    body = {**SMALL_BODIES["/v1/messages"], "messages": [{"role": "user", "content": [block], "also": None}], "later": None}
    assert tiny.post("/v1/messages", body).status == 200
    schema = {"type": "object", "properties": {"a": {"enum": [None, 1], "default": None}}}
    tool = {"type": "function", "function": {"name": "f", "description": None, "parameters": schema}}
    assert tiny.post("/v1/chat/completions", {**SMALL_BODIES["/v1/chat/completions"], "tools": [tool]}).status == 200


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/completions", "prompt", [1] * 5000),
        ("/v1/completions", "prompt", [-1]),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": "word " * 5000}]),
        ("/v1/embeddings", "input", ""),
    ],
)
def test_a_bad_prompt_names_the_field_that_it_came_in(tiny, path, field, value):
    reply = tiny.post(path, {**SMALL_BODIES[path], field: value})
    assert (reply.status, reply.error["param"]) == (400, field)


@pytest.mark.parametrize("path", STRUCTS)
def test_an_unknown_field_is_a_400_that_names_it_and_what_was_meant(tiny, path):
    reply = tiny.post(path, {**SMALL_BODIES[path], "modle": "x"})
    assert (reply.status, reply.error["param"]) == (400, "modle")
    assert "did you mean 'model'" in reply.error["message"]
