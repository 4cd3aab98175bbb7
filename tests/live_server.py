"""`nanovllm serve` as users start it: a process of its own, with everything real. Its log is kept.

`write_tiny_model` makes a checkpoint with SmolLM2's tokenizer and a chat template that knows reasoning, tools and
documents, but with random weights and one layer: fast, and everything but sense is as in a real one. Its tokenizer puts
a special token before each text.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

from nanovllm.llm import load_tokenizer
from nanovllm.loaders.checkpoint import open_checkpoint

TEMPLATE = """{%- if tools %}<|im_start|>tools
{{ tools | tojson }}<tool_call></tool_call><|im_end|>
{% endif %}{% if documents %}<|im_start|>documents
{{ documents | tojson }}<|im_end|>
{% endif %}{% if reasoning_effort %}<|im_start|>effort
{{ reasoning_effort }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{%- if thinks_first %}<think>
{% endif %}{% endif %}"""


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The data of server-sent events; "[DONE]" stays text."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


@dataclass
class LiveServer:
    url: str
    process: subprocess.Popen[str]
    log: list[str]
    started: float = 0.0  # when it listened, of the monotonic clock

    def post(self, path: str, body: Any) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._send(urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}))

    def get(self, path: str) -> Reply:
        return self._send(urllib.request.Request(self.url + path))

    def _send(self, request: urllib.request.Request) -> Reply:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Reply(response.status, dict(response.headers), response.read())
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, dict(error.headers), error.read())


def close_decision(server: LiveServer, prompt: list[int]) -> tuple[dict[str, Any], int, int]:
    """(options, A, B): with these options, the greedy answer to `prompt` is A, A, the second by a margin of 1 over B.

    So anything that holds it against A that it was there before turns the answer into A, B.
    """

    def logprob(*tokens: int) -> float:
        body = {"prompt": [*prompt, *tokens], "echo": True, "logprobs": 0, "max_tokens": 0}
        return server.post("/v1/completions", body).json["choices"][0]["logprobs"]["token_logprobs"][-1]

    for a, b in ((3000, 4000), (4000, 3000)):
        first, second = logprob(a) - logprob(b), logprob(a, a) - logprob(a, b)
        if first - second + 1 > 0.1:
            return {"allowed_token_ids": [a, b], "logit_bias": {str(a): 50 + 1 - second, str(b): 50}}, a, b
    raise AssertionError("the tokens are badly chosen")


@contextmanager
def live_server(*options: str) -> Iterator[LiveServer]:
    """`options`: those of `nanovllm serve`. Ends it in good order."""
    with started_server(*options) as server:
        yield server
        server.process.send_signal(signal.SIGTERM)
        status = server.process.wait(30)
    assert status == 0, "".join(server.log[-20:])


@contextmanager
def started_server(*options: str, **environment: str) -> Iterator[LiveServer]:
    """In a session of its own, all of which is killed at the end, if it still runs."""
    command = [sys.executable, "-m", "nanovllm", "serve", "--port", "0", *options]
    whole = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=whole, start_new_session=True
    )
    log: list[str] = []
    ready = threading.Event()

    def read() -> None:
        for line in process.stderr or ():
            log.append(line)
            if " at http://" in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(100), "the server did not start"
        match = re.search(r" at (http://[\w.:]+)", "".join(log))
        assert match, "".join(log)
        yield LiveServer(match[1].rstrip(":"), process, log, time.monotonic())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join()
        if process.stderr is not None:
            process.stderr.close()


def write_tiny_model(folder: Path, poison: int | None = None) -> Path:
    """`poison`: a token whose embedding is NaN; the output head is then a matrix of its own."""
    checkpoint = open_checkpoint(None)
    parts = load_tokenizer(checkpoint).parts
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": checkpoint.config["vocab_size"],
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": poison is None,
        "torch_dtype": "float32",
        "eos_token_id": sorted(parts.end_token_ids),
    }
    (folder / "config.json").write_text(json.dumps(config))
    backend = tokenizers.Tokenizer.from_str(parts.backend.to_str())
    first = ("<|endoftext|>", backend.token_to_id("<|endoftext|>"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    (folder / "tokenizer.json").write_text(backend.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({**parts.named_tokens, "chat_template": TEMPLATE}))
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], 64),
        "model.norm.weight": (64,),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.0.post_attention_layernorm.weight": (64,),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.k_proj.weight": (32, 64),
        "model.layers.0.self_attn.v_proj.weight": (32, 64),
        "model.layers.0.self_attn.o_proj.weight": (64, 64),
        "model.layers.0.mlp.gate_proj.weight": (64, 64),
        "model.layers.0.mlp.up_proj.weight": (64, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 64),
    }
    tensors = {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}
    if poison is not None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.embed_tokens.weight"][poison] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    return folder
