"""What the repository says about itself is true: the trees and snippets of the READMEs, links, charters, public names."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

import nanovllm
from nanovllm import SamplingParams
from nanovllm.config import EngineConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanovllm"
READMES = ("README.md", "README.zh-CN.md")
CUDA_PLACES = ("platforms/", "kernels/", "attention/", "runner/cuda_graphs.py", "runner/pending.py")
# Put together, so that this file does not name them either.
REGISTRY_HOSTS = ["pypi" + ".org", "python" + "hosted.org", "npm" + "js.org", "npm" + "js.com", "download." + "pytorch.org"]
REGISTRY_OPTIONS = ["--index" + "-url", "--extra" + "-index-url"]


def source_files(*suffixes: str) -> list[Path]:
    """Every text file that is, or could be, committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes)]


def package_modules() -> list[Path]:
    """Every module with something in it."""
    return sorted(path for path in PACKAGE.rglob("*.py") if path.stat().st_size)


def code_blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def tree_paths(readme: str) -> list[str]:
    """The paths of a README's tree; two spaces of indentation are one folder."""
    (tree,) = [block for block in code_blocks(readme, "text") if "nanovllm/\n" in block]
    folders: list[str] = []
    paths = []
    for line in filter(None, tree.splitlines()):
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name]
        paths.append("".join(folders))
    return paths


# --- the READMEs


@pytest.mark.parametrize("readme", READMES)
class TestReadme:
    def test_every_path_of_the_tree_exists(self, readme):
        missing = [path for path in tree_paths(readme) if not (ROOT / path).exists()]
        assert not missing

    def test_every_module_is_in_the_tree(self, readme):
        modules = {path.relative_to(ROOT).as_posix() for path in package_modules()}
        assert not modules - set(tree_paths(readme)), f"add a line for these to the tree of {readme}"

    def test_every_entry_of_the_tree_but_folders_says_what_it_is(self, readme):
        (tree,) = [block for block in code_blocks(readme, "text") if "nanovllm/\n" in block]
        assert not [line for line in tree.splitlines() if line.strip() and len(line.split()) < 2 and not line.endswith("/")]

    def test_python_blocks_compile(self, readme):
        for block in code_blocks(readme, "python"):
            compile(block, readme, "exec")

    def test_options_of_the_table_exist(self, readme):
        rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / readme).read_text(encoding="utf-8"), re.MULTILINE)
        names = [name for row in rows for name in re.findall(r"`(\w+)`", row) if not name.endswith("ForCausalLM")]
        assert len(names) > 5
        assert not set(names) - {field.name for field in dataclasses.fields(EngineConfig)}

    def test_every_sampling_option_is_named(self, readme):
        text = (ROOT / readme).read_text(encoding="utf-8")
        assert not [field.name for field in dataclasses.fields(SamplingParams) if f"`{field.name}`" not in text]

    def test_the_reading_order_is_that_of_the_size_report(self, readme):
        size_report = load_size_report()
        text = (ROOT / readme).read_text(encoding="utf-8")
        places = [text.find(f"`{name}`") for name in size_report.READING_HOUR]
        assert -1 not in places and places == sorted(places)


def load_size_report():
    spec = importlib.util.spec_from_file_location("size_report", ROOT / "scripts/size_report.py")
    size_report = importlib.util.module_from_spec(spec)
    sys.modules["size_report"] = size_report  # dataclasses look their module up
    spec.loader.exec_module(size_report)
    return size_report


def test_the_page_of_the_compiled_step_says_how_long_it_is(capsys):
    load_size_report().main()
    printed = re.findall(r"^  (?:C\+\+|its Python) +\d+ +(\d+) ", capsys.readouterr().out, re.MULTILINE)
    page = (ROOT / "docs/cpu-step.md").read_text(encoding="utf-8")
    said = re.search(r"([\d,]+) lines of C\+\+ and ([\d,]+) of Python", page)
    assert [int(number.replace(",", "")) for number in said.groups()] == pytest.approx(
        [int(number) for number in printed], rel=0.03
    )


def test_the_two_readmes_have_the_same_code_and_the_same_tree():
    english, chinese = ([ast.dump(ast.parse(block)) for block in code_blocks(readme, "python")] for readme in READMES)
    assert english == chinese
    assert tree_paths(READMES[0]) == tree_paths(READMES[1])


def test_the_quick_start_runs(capsys):
    (snippet,) = code_blocks("README.md", "python")
    namespace: dict = {}
    exec(compile(snippet, "README.md", "exec"), namespace)
    namespace["llm"].close()
    assert "Paris" in capsys.readouterr().out


def test_links_between_documents_lead_somewhere():
    broken = []
    for path in source_files(".md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert not broken


def test_pictures_are_well_formed():
    for path in (ROOT / "docs").rglob("*.svg"):
        xml.etree.ElementTree.parse(path)


# --- the package


def test_public_names_import():
    for name in nanovllm.__all__:
        assert getattr(nanovllm, name).__name__ == name
    with pytest.raises(AttributeError, match="Sampler"):
        _ = nanovllm.Sampler


def test_every_module_opens_with_a_charter():
    assert not [str(path) for path in package_modules() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]


def test_the_control_plane_loads_without_torch():
    program = "import sys, nanovllm.engine.llm_engine, nanovllm.runner.memory_plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_torch_cuda_appears_only_where_devices_are_handled():
    names = {
        path.relative_to(PACKAGE).as_posix() for path in package_modules() if "torch.cuda" in path.read_text(encoding="utf-8")
    }
    assert not [name for name in names if not name.startswith(CUDA_PLACES)]


def test_every_module_has_its_place_in_the_layers():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = [name for line in settings["tool"]["importlinter"]["contracts"][0]["layers"] for name in line.split(" | ")]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in package_modules() if path.name != "__init__.py"]
    homeless = [module for module in modules if not any(module == layer or module.startswith(f"{layer}.") for layer in layers)]
    assert not homeless, "name their layer in pyproject.toml"


# --- everything


def test_no_file_names_a_package_registry():
    for path in source_files():
        text = path.read_bytes().decode("utf-8", errors="ignore").lower()
        found = [word for word in REGISTRY_HOSTS + REGISTRY_OPTIONS if word in text]
        assert not found, path


def test_todo_marks_carry_an_issue_number():
    for path in [*source_files(".py", ".toml", ".md", ".sh"), ROOT / "Makefile", ROOT / ".ci/run"]:
        if path != Path(__file__):
            marks = re.findall(r"\b(?:TODO|FIXME|XXX)\b(?!\(#\d+\))", path.read_text(encoding="utf-8"))
            assert not marks, path
