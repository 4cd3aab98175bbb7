# Triton to the type checker: anything. It cannot know what @triton.jit makes of a signature, and CPU builds lack Triton.
from typing import Any

def __getattr__(name: str) -> Any: ...
