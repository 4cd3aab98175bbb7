"""Grammars of strangers: refused by name, or within the deadline, and the next one is served."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from test_tokenizer import byte_level_backend

from nanovllm import StructuredOutput
from nanovllm.errors import CapacityError, InvalidGrammar
from nanovllm.structured import checker as checker_module
from nanovllm.structured.checker import GrammarChecker
from nanovllm.tokenizer import Tokenizer
from nanovllm.tokenizer_files import TokenizerParts

DEADLINE = 1.0
SLOW = StructuredOutput("grammar", "start: A\nA: " + " & ".join(f"/.*a.{{{i}}}.*/" for i in range(3, 17)))  # takes four seconds
GOOD = StructuredOutput("regex", "a+")


def make_checker() -> GrammarChecker:
    tokenizer = Tokenizer(TokenizerParts(byte_level_backend()))
    return GrammarChecker(tokenizer, tokenizer.vocab_size, [tokenizer.token_to_id("</s>")])


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    checker = make_checker()
    yield checker
    checker.close()


def nested(depth: int, inside: str = "{}") -> str:
    return '{"type":"array","items":' * depth + inside + "}" * depth


def tower(levels: int) -> str:
    """Each definition holds the one before it ten times."""
    definitions = {f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i - 1}"}] * 10} for i in range(1, levels)}
    return json.dumps({"$defs": {"d0": {"type": "integer"}, **definitions}, "$ref": f"#/$defs/d{levels - 1}"})


HOSTILE = {
    "(a+)+": StructuredOutput("regex", "(a+)+$"),
    "(a|a)*": StructuredOutput("regex", "(a|a)*b"),
    "((a*)*)*": StructuredOutput("regex", "((a*)*)*c"),
    "huge repeat": StructuredOutput("regex", "a{1000000}"),
    "repeats of repeats": StructuredOutput("regex", "((a{1,100}){1,100}){1,100}"),
    "many letters": StructuredOutput("regex", r"(\w{1,1000}\s){1,1000}"),
    "far back": StructuredOutput("regex", r"(.|\n)*a(.|\n){20}"),
    "parentheses": StructuredOutput("regex", "(" * 4000 + ")" * 4000),
    "deep schema": StructuredOutput("json_schema", nested(60)),
    "deeper schema": StructuredOutput("json_schema", nested(1000)),
    "deepest schema": StructuredOutput("json_schema", nested(8000)),
    "endless schema": StructuredOutput("json_schema", '{"$ref": "#"}'),
    "circle": StructuredOutput("json_schema", '{"$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}},"$ref":"#/$defs/a"}'),
    "must contain itself": StructuredOutput("json_schema", '{"properties":{"a":{"$ref":"#"}},"required":["a"],"type":"object"}'),
    "tower": StructuredOutput("json_schema", tower(12)),
    "long strings": StructuredOutput("json_schema", '{"type":"string","minLength":100000000,"maxLength":1000000000}'),
    "long arrays": StructuredOutput("json_schema", '{"type":"array","minItems":100000000,"items":{"type":"integer"}}'),
    "intersections": StructuredOutput(
        "json_schema", json.dumps({"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(8)]})
    ),
    "many properties": StructuredOutput("json_schema", json.dumps({"properties": {f"p{i}": {} for i in range(4000)}})),
    "large divisor": StructuredOutput("json_schema", '{"type":"integer","multipleOf":999999937}'),
    "pattern in a schema": StructuredOutput("json_schema", '{"type":"string","pattern":"^(([a-z])+.)+[A-Z]([a-z])+$"}'),
    "slow intersection": SLOW,
    "ambiguous": StructuredOutput("grammar", 'start: x\nx: x x x | "a" | ""'),
    "left recursion": StructuredOutput("grammar", 'start: start start | "a"'),
    "nested repeats": StructuredOutput("grammar", 'start: a{1,1000}\na: b{1,1000}\nb: c{1,1000}\nc: "x"'),
    "open parentheses": StructuredOutput("grammar", "start: " + "(" * 100_000),
    "GBNF parentheses": StructuredOutput("grammar", "root ::= " + "(" * 100_000),
    "GBNF repeats": StructuredOutput("grammar", 'root ::= ("a"{1000000}){1000000}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_or_bounded_by_the_deadline(checker, name):
    checker.check_grammar(GOOD, DEADLINE)  # a worker that was killed is started again outside of the measured time
    if checker._worker is None:
        checker._start()
    started = time.monotonic()
    try:
        checker.check_grammar(HOSTILE[name], DEADLINE)
    except InvalidGrammar as error:
        assert 10 < len(str(error)) < 600
    assert time.monotonic() - started < DEADLINE + 1.5  # of a busy machine
    checker.check_grammar(StructuredOutput("choice", [f"after {name}"]), 20)


def test_a_grammar_that_hangs_costs_its_sender_an_error_and_the_worker_is_replaced():
    checker = make_checker()
    checker.check_grammar(GOOD, 20)
    before = checker._worker.process
    started = time.monotonic()
    with pytest.raises(InvalidGrammar, match=r"grammar: it takes longer than 0.3 seconds to compile"):
        checker.check_grammar(SLOW, 0.3)
    assert time.monotonic() - started < 3 and before.poll() is not None
    started = time.monotonic()
    with pytest.raises(InvalidGrammar, match="takes longer"):
        checker.check_grammar(SLOW, 0.3)
    assert time.monotonic() - started < 0.1, "the verdict is remembered"
    checker.check_grammar(StructuredOutput("regex", "b"), 20)
    assert checker._worker.process.pid != before.pid
    checker.close()


def test_a_worker_that_dies_is_replaced(checker):
    checker.check_grammar(StructuredOutput("regex", "before"), 20)
    os.kill(checker._worker.process.pid, signal.SIGKILL)
    checker._worker.process.wait()
    with pytest.raises(InvalidGrammar, match="gave up"):
        checker.check_grammar(StructuredOutput("regex", "during"), 20)
    checker.check_grammar(StructuredOutput("regex", "after"), 20)


def test_faults_come_with_the_words_of_the_compiler(checker):
    with pytest.raises(InvalidGrammar, match=r'json_schema: Unimplemented keys: \["uniqueItems"\]'):
        checker.check_grammar(StructuredOutput("json_schema", '{"type":"array","uniqueItems":true}'), 20)
    with pytest.raises(InvalidGrammar, match="unclosed group"):
        checker.check_grammar(StructuredOutput("regex", "(天"), 20)


def test_many_threads_share_one_worker(checker):
    failures = []

    def check(number: int) -> None:
        try:
            checker.check_grammar(StructuredOutput("regex", f"{number}+"), 20)
            with pytest.raises(InvalidGrammar, match=rf"\({number}"):
                checker.check_grammar(StructuredOutput("regex", f"({number}"), 20)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=check, args=(number,)) for number in range(100, 116)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_who_waits_too_long_for_a_turn_is_told_so(checker, monkeypatch):
    monkeypatch.setattr(checker_module, "MAX_WAIT", 0.05)
    with checker._lock, pytest.raises(CapacityError, match="try again"):
        checker.check_grammar(StructuredOutput("regex", "waits"), 20)


def test_verdicts_are_kept_up_to_a_limit(checker, monkeypatch):
    monkeypatch.setattr(checker_module, "MAX_VERDICTS", 5)
    checker._verdicts.clear()
    for number in range(12):
        checker.check_grammar(StructuredOutput("regex", f"v{number}"), 20)
    assert [kept.text for kept in checker._verdicts] == ["v7", "v8", "v9", "v10", "v11"]


def test_the_worker_takes_no_code_from_the_current_folder(tmp_path, monkeypatch):
    """Which may be that of a downloaded model."""
    for name in ("json", "msgspec", "llguidance", "tokenizers", "nanovllm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the model has run')")
    monkeypatch.chdir(tmp_path)
    checker = make_checker()
    checker.check_grammar(GOOD, 20)
    checker.close()


def test_the_worker_ends_with_its_checker():
    checker = make_checker()
    checker.check_grammar(GOOD, 20)
    process = checker._worker.process
    checker.close()
    checker.close()
    assert process.poll() is not None
    with pytest.raises(RuntimeError, match="closed"):
        checker.check_grammar(StructuredOutput("regex", "b"), 20)


def test_the_worker_ends_when_its_input_does():
    checker = make_checker()
    checker.check_grammar(GOOD, 20)
    worker = checker._worker
    worker.process.stdin.close()
    assert worker.process.wait(10) == 0
    checker.close()
