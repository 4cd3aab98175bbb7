"""How much there is to read. `make check` runs it, and fails when a limit is exceeded.

    python scripts/size_report.py

A *code line* carries code: no blank line, no comment, no docstring. The *reading hour* is the twelve files that a
newcomer reads to understand the engine; its limit counts physical lines, because docstrings are read too. No function
is longer than 60 lines (kernels are exempt: one idea can need one long body). A limit that is in the way is a sign that
a feature belongs behind a seam; raising it is a decision, to be made in a commit of its own.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanovllm"
READING_HOUR = (
    "engine/sequence.py",
    "engine/block_manager.py",
    "engine/scheduler.py",
    "engine/batch.py",
    "engine/llm_engine.py",
    "engine/model_runner.py",
    "runner/inputs.py",
    "forward_context.py",
    "attention/torch_reference.py",
    "models/decoder.py",
    "sampling/sampler.py",
    "executor/in_process.py",
)
COMPILED_STEP = "kernels/cpu/step.cpp"
COMPILED_STEP_PYTHON = (
    "kernels/cpu/build.py",
    "kernels/cpu/compiler.py",
    "kernels/cpu/library.py",
    "kernels/cpu/packing.py",
    "models/compiled_decoder.py",
    "attention/compiled.py",
)
MAX_READING_HOUR_LINES = 1900  # physical
MAX_FUNCTION_LINES = 60  # physical, from `def` to the last line
EXEMPT_FOLDERS = ("kernels",)
NUM_LONGEST = 5
LAYOUT_TOKENS = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True, slots=True)
class Function:
    name: str  # "engine/scheduler.py: Scheduler.schedule"
    num_lines: int
    is_exempt: bool


@dataclass(frozen=True, slots=True)
class SourceFile:
    path: str  # relative to the package
    num_lines: int
    num_code_lines: int
    functions: list[Function]

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0] or "(top)"


def read_file(path: Path) -> SourceFile:
    name = path.relative_to(PACKAGE).as_posix()
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    is_exempt = name.split("/")[0] in EXEMPT_FOLDERS
    functions = [Function(f"{name}: {title}", lines, is_exempt) for title, lines in find_functions(tree)]
    return SourceFile(name, len(source.splitlines()), len(code_lines(source) - docstring_lines(tree)), functions)


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that carry a token other than layout and comments."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT_TOKENS:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            docstring = node.body[0]
            lines.update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return lines


def find_functions(node: ast.AST, prefix: str = "") -> list[tuple[str, int]]:
    """(dotted name, physical lines) of every function under `node`, nested ones included."""
    found = []
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{prefix}.{child.name}".lstrip(".")
            if not isinstance(child, ast.ClassDef):
                found.append((name, (child.end_lineno or child.lineno) - child.lineno + 1))
        found.extend(find_functions(child, name))
    return found


# --- the report


def report_reading_hour(files: dict[str, SourceFile]) -> list[str]:
    """Prints the twelve files; returns what is wrong."""
    missing = [name for name in READING_HOUR if name not in files]
    present = [files[name] for name in READING_HOUR if name in files]
    total = sum(file.num_lines for file in present)
    print(f"{'The reading hour':<36}{'code':>8}{'lines':>8}")
    for file in present:
        print(f"  {file.path:<34}{file.num_code_lines:>8}{file.num_lines:>8}")
    code = sum(file.num_code_lines for file in present)
    print(f"  {'total':<34}{code:>8}{total:>8}   (limit: {MAX_READING_HOUR_LINES} lines)\n")
    problems = [f"{name} of the reading hour does not exist" for name in missing]
    if total > MAX_READING_HOUR_LINES:
        problems.append(f"the reading hour has {total} lines, {total - MAX_READING_HOUR_LINES} over its limit")
    return problems


def report_folders(files: dict[str, SourceFile]) -> None:
    folders: dict[str, list[SourceFile]] = {}
    for file in files.values():
        folders.setdefault(file.folder, []).append(file)
    print(f"{'The package':<36}{'code':>8}{'lines':>8}{'files':>8}")
    for folder, members in sorted(folders.items()):
        report_total(folder, members)
    report_total("total", list(files.values()))
    print()


def report_total(title: str, files: list[SourceFile]) -> None:
    code, lines = sum(file.num_code_lines for file in files), sum(file.num_lines for file in files)
    print(f"  {title:<34}{code:>8}{lines:>8}{len(files):>8}")


def report_compiled_step(files: dict[str, SourceFile]) -> None:
    lines = (PACKAGE / COMPILED_STEP).read_text(encoding="utf-8").splitlines()
    num_code_lines = sum(bool(line.strip()) and not line.lstrip().startswith("//") for line in lines)
    print(f"{'The compiled step':<36}{'code':>8}{'lines':>8}{'files':>8}")
    report_total("C++", [SourceFile(COMPILED_STEP, len(lines), num_code_lines, [])])
    report_total("its Python", [files[name] for name in COMPILED_STEP_PYTHON])
    print()


def report_functions(files: dict[str, SourceFile]) -> list[str]:
    """Prints lengths; returns what is too long."""
    functions = sorted((f for file in files.values() for f in file.functions), key=lambda f: f.num_lines, reverse=True)
    lengths = sorted(function.num_lines for function in functions)
    ninth_decile = lengths[(len(lengths) * 9) // 10]
    print(
        f"{len(functions)} functions: median {statistics.median(lengths):g} lines, nine in ten at most {ninth_decile}; longest:"
    )
    for function in functions[:NUM_LONGEST]:
        print(f"  {function.num_lines:>4}  {function.name}")
    too_long = [f for f in functions if f.num_lines > MAX_FUNCTION_LINES and not f.is_exempt]
    return [f"{f.name} has {f.num_lines} lines, more than {MAX_FUNCTION_LINES}" for f in too_long]


def main() -> int:
    files = {file.path: file for file in map(read_file, sorted(PACKAGE.rglob("*.py")))}
    problems = report_reading_hour(files)
    report_folders(files)
    report_compiled_step(files)
    problems += report_functions(files)
    for problem in problems:
        print(f"size_report: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
