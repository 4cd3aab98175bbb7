"""What a client says stays with the client: no log line, and no error, has text of a prompt or of an answer."""

from __future__ import annotations

SECRET = "zebra-violet-xylophone"
CHAT = [{"role": "user", "content": SECRET}]
TOO_LONG = f"{SECRET} " * 400

BODIES = [
    ("/v1/completions", {"prompt": SECRET, "max_tokens": 2, "echo": True}),
    ("/v1/completions", {"prompt": SECRET, "max_tokens": 2, "stream": True}),
    ("/v1/completions", {"prompt": TOO_LONG}),
    ("/v1/completions", {"prompt": [SECRET, 5]}),
    ("/v1/completions", {"prompt": [[SECRET]]}),
    ("/v1/completions", {"prompt": {"text": SECRET}}),
    ("/v1/completions", {"prompt": SECRET, "temperature": 200}),
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": TOO_LONG}]}),
    ("/v1/chat/completions", {"messages": [{"role": "king", "content": SECRET}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": {"text": SECRET}}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "txt": SECRET}]}]}),
    ("/v1/chat/completions", {"messages": CHAT, "chat_template_kwargs": {"messages": SECRET}}),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": SECRET}}]}]}),
    ("/v1/chat/completions", {"messages": [*CHAT, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}], "continue_final_message": True}),
    ("/v1/responses", {"input": SECRET, "max_output_tokens": 2}),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": 5, "x": SECRET}]}]}),
    ("/v1/responses", {"input": [{"type": "message", "role": "user", "content": SECRET, "status": 5}]}),
    ("/v1/embeddings", {"input": SECRET}),
    ("/v1/embeddings", {"input": TOO_LONG}),
    ("/v1/messages", {"messages": CHAT, "max_tokens": 2}),
    ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": SECRET, "y": 1}]}], "max_tokens": 2}),
    ("/v1/messages/count_tokens", {"messages": CHAT}),
    ("/tokenize", {"prompt": SECRET}),
    ("/tokenize", {"prompt": TOO_LONG * 100}),
]  # fmt: skip


def test_prompts_are_in_no_log_line_and_in_no_error(tiny):
    errors = []
    for path, body in BODIES:
        reply = tiny.post(path, body)
        assert reply.status in (200, 400), (path, reply.body)
        if reply.status != 200:
            errors.append(reply.body.decode())
    assert len(errors) >= 13
    assert not [error for error in errors if SECRET in error]
    assert SECRET not in "".join(tiny.log)
