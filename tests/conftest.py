"""The GPU machine has neither gguf nor a usable Transformers: what needs them is not collected there."""

from __future__ import annotations

import importlib.util

collect_ignore: list[str] = []
if importlib.util.find_spec("gguf") is None:
    collect_ignore = ["loaders", "models", "layers", "runner", "test_llm.py", "test_real_model.py", "test_chat_template.py"]
    collect_ignore += ["test_tokenizer.py", "test_tokenizer_gguf.py", "test_tokenizer_streams.py"]
