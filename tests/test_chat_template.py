"""Chat templates render as they do in Transformers, and no template can hang or fill this process."""

from __future__ import annotations

import enum
import threading
import time

import pytest

from nanovllm.chat_template import ChatTemplate, check_messages
from nanovllm.errors import InvalidChatTemplate, InvalidPrompt

USER = [{"role": "user", "content": "hi"}]


def render(source, messages=USER, **options):
    return ChatTemplate(source).render(messages, **options)


# What templates of published models use, in small.
HONEST = [
    "{% for m in messages %}{{ '<|' ~ m['role'] + '|>' }}{{ m.content | trim }}\n{% endfor %}",
    "{%- for m in messages -%}\n  {%- if loop.first and m.role != 'system' %}\n    first\n  {% endif %}\n{%- endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.n = 1 %}{% endif %}{% endfor %}{{ ns.n }}",
    "{{ messages | tojson }}{{ {'a': '<é>'} | tojson(indent=4) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
    "{% for m in messages if m.role != 'user' %}{{ loop.index0 }}{{ loop.last }}{% else %}none{% endfor %}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% macro show(m, n=2) %}[{{ m.content * n }}{{ caller() if caller }}]{% endmacro %}{{ show(messages[0]) }}",
    "{% macro box() %}<{{ caller('x') }}>{% endmacro %}{% call(v) box() %}{{ v }}!{% endcall %}",
    "{{ messages | map(attribute='content') | list | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list }}",
    "{{ messages | rejectattr('role', 'in', ['user']) | list | length }}{{ messages[-1:] }}{{ messages | last }}",
    "{{ 'a</think>b'.split('</think>')[-1].lstrip('\\n') }}{{ 'abc'[1:] }}{{ 'Ab'.upper() }}{{ ' x '.strip() }}",
    "{{ 'abc'.startswith(('x', 'a')) }}{{ 'a' in 'cab' }}{{ 'b' not in ['a'] }}{{ 1 < 2 <= 2 }}{{ 7 // 2 }}{{ 2 ** 5 }}{{ 7 % 4 }}",
    "{{ x is defined }}{{ messages is iterable }}{{ none is none }}{{ 'a' is string }}{{ messages[0] is mapping }}{{ x is undefined }}",
    "{% if x is defined and x %}a{% else %}b{% endif %}{{ x | default('d') }}{{ x or 'e' }}",
    "{% set text %}captured {{ messages[0].content }}{% endset %}{{ text | upper }}{% filter title %}some words{% endfilter %}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{% endfor %}",
    "{{ '%s-%03d' % ('a', 7) }}{{ '%.2f' | format(1.234) }}{{ '{:>4}|{a}'.format('x', a=1) }}{{ 2.567 | round(1) }}{{ 7.2 | int }}",
    "{{ ['b', 'a'] | sort }}{{ [1, 1, 2] | unique | list }}{{ [3, 4] | max }}{{ 'a\\nb' | indent(2) }}{{ 'x' | replace('x', 'yy') }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ 'a' 'b' }}{{ [1] + [2] }}{{ 'x' if true }}{# comment #}",
    "{{ dict(a=1) }}{{ tools }}{{ add_generation_prompt }}{{ bos_token }}{{ messages[0]['content'] | length }}{{ (1, 2) }}",
    "{% for group in [1, 2] recursive %}{{ group }}{% endfor %}{{ [messages, USER] | first | count }}{{ 'q' | e }}{{ '<' | safe }}",
]


@pytest.mark.parametrize("source", HONEST)
def test_renders_like_transformers(source):
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [
        {"role": "user", "content": " hi <b> 你好 "},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, 2.5, True]}}}]},
    ]
    if "trim" in source:
        chat = USER
    expected, _ = render_jinja_template([chat], chat_template=source, add_generation_prompt=True, bos_token="<s>")
    assert render(source, chat, add_generation_prompt=True, variables={"bos_token": "<s>"}) == expected[0]


GROW = "{% for i in range(60) %}{% set ns.s = #STEP %}{% endfor %}"
LISTS = "{% set ns = namespace(s=['a'], t=['a']) %}" + GROW.replace("#STEP", "[ns.s, ns.s]")
LISTS_TWICE = LISTS + GROW.replace("ns.s =", "ns.t =").replace("#STEP", "[ns.t, ns.t]")
TUPLES = "{% set ns = namespace(s=(1, 2)) %}" + GROW.replace("#STEP", "(ns.s, ns.s)")
HOSTILE = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages['__class__'] }}",
    "{{ messages | attr('__class__') }}",
    "{{ (messages | map(attribute='__class__') | list)[0] }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum() }}",
    "{% include '/etc/passwd' %}",
    "{% set _ = messages.append(1) %}",
    "{% set _ = messages[0].update({'role': 'x'}) %}",
    "{% set _ = messages.clear() %}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
    "{% for i in range(99999) %}{% set x = range(99999) | select('eq', 1) | list %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}{% endmacro %}{{ f(99) }}",
    "{% for x in [[1], [2]] recursive %}{{ loop([[1], [2]]) }}{% endfor %}",
    "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "{% set big %}{% for i in range(99999) %}{% for j in range(999) %}" + "x" * 1000 + "{% endfor %}{% endfor %}{% endset %}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ ([1] * 10**9) | length }}",
    "{{ 'x' * 20000000 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ (9 ** 9) ** (9 ** 9) }}",
    "{% set ns = namespace(s=3) %}" + GROW.replace("#STEP", "ns.s * ns.s"),
    "{% set ns = namespace(s='a') %}" + GROW.replace("#STEP", "ns.s + ns.s"),
    "{% set ns = namespace(s='a') %}" + GROW.replace("#STEP", "ns.s ~ ns.s"),
    "{% set ns = namespace(s=[1]) %}" + GROW.replace("#STEP", "ns.s + ns.s"),
    "{% set ns = namespace(s='a') %}" + GROW.replace("#STEP", "'%s%s' % (ns.s, ns.s)"),
    "{% set ns = namespace(s='a') %}" + GROW.replace("#STEP", "'{0}{0}'.format(ns.s)"),
    "{% set ns = namespace(s='a') %}" + GROW.replace("#STEP", "[ns.s, ns.s] | join"),
    "{% set ns = namespace(s='a') %}" + GROW.replace("#STEP", "''.join([ns.s, ns.s])"),
    "{% set ns = namespace(s='a') %}" + GROW.replace("#STEP", "ns.s.replace('a', 'aa')"),
    "{% set ns = namespace(s='a') %}" + GROW.replace("#STEP", "ns.s | replace('a', 'aa')"),
    LISTS + "{{ ns.s }}",
    LISTS + "{{ ns }}",
    LISTS + "{{ ns.s | tojson }}",
    LISTS + "{{ ns.s | string | length }}",
    LISTS + "{{ ('' ~ ns.s) | length }}",
    LISTS + "{{ {'a': ns.s}.values() }}",
    LISTS_TWICE + "{{ ns.s == ns.t }}",
    LISTS_TWICE + "{{ ns.s is eq(ns.t) }}",
    LISTS_TWICE + "{{ ns.s in [ns.t] }}",
    LISTS_TWICE + "{{ [ns.s, ns.t] | sort }}",
    LISTS_TWICE + "{{ [ns.s].index(ns.t) }}",
    LISTS_TWICE + "{{ [ns.s, ns.t] | map('string') | list }}",
    LISTS_TWICE + "{{ [ns.s].count(ns.t) }}",
    LISTS_TWICE + "{% for x in [ns.s, ns.t] %}{{ loop.changed(x) }}{% endfor %}",
    TUPLES + "{{ {ns.s: 1} | length }}",
    TUPLES + "{{ {}[ns.s] }}",
    TUPLES + "{{ {}.get(ns.s) }}",
    TUPLES + "{{ dict([(ns.s, 1)]) | length }}",
    TUPLES + "{{ ns.s in {} }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ [1] | batch(10**9, 0) | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{{ 'a' | indent(10**9, true) }}",
    "{{ [1] | tojson(indent=10**9) }}",
    "{{ [1] | tojson(indent='x' * 1000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ '{:{w}}'.format_map({'w': 10**9}) }}",
    "{{ (['{:{}}'.format] | map('string') | list) }}",
    "{{ 5 | round(-1000000000) }}",
    "{{ 5.5 | round(1000000000, 'ceil') }}",
    "{{ (5).to_bytes(10**9, 'big') }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000).join(range(100000) | map('string')) | length }}",
    "{{ (range(100000) | map('string') | join('a' * 1000000)) | length }}",
    "{{ range(99999) | map('replace', '1', 'a' * 100000) | list | length }}",
    "{% set s = 'a' * 1000000 %}{{ ''.join(([s] * 100000) | map('upper')) | length }}",
    "{" * 3000 + "}" * 3000,
    "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    "{{ raise_exception('x' * 1000000) }}",
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_templates_end_soon_as_an_error_of_the_request(source):
    chat = [{"role": "user", "content": "hi"}]
    start = time.perf_counter()
    with pytest.raises(InvalidChatTemplate) as caught:
        ChatTemplate(source, max_seconds=0.3).render(chat)
    assert time.perf_counter() - start < 3.0  # 0.3 s, and time for a busy machine
    assert len(str(caught.value)) < 3000
    assert chat == USER


def test_limits_say_what_was_exceeded():
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidChatTemplate, match=r"stopped: it ran longer than 0\.05 s"):
        ChatTemplate(loop, max_seconds=0.05).render(USER)
    with pytest.raises(InvalidChatTemplate, match="longer than 100 characters"):
        ChatTemplate("{% for i in range(99) %}{{ i }}{% endfor %}", max_bytes=100).render(USER)
    with pytest.raises(InvalidChatTemplate, match="at most"):
        ChatTemplate("x" * 2_000_000)


def test_a_stopped_render_does_not_spoil_the_next():
    template = ChatTemplate("{% if n %}{% for i in range(n) %}{{ 'a' * n }}{% endfor %}{% endif %}ok", max_bytes=1000)
    for _ in range(3):
        with pytest.raises(InvalidChatTemplate):
            template.render(USER, variables={"n": 5000})
        assert template.render(USER, variables={"n": 0}) == "ok"


def test_threads_have_separate_budgets():
    template = ChatTemplate("{% for i in range(n) %}{{ i }}{% endfor %}", max_seconds=1.0)
    results = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(len(template.render(USER, variables={"n": n}))))
        for n in range(100, 108)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted(sum(len(str(i)) for i in range(n)) for n in range(100, 108))


def test_a_long_honest_chat_is_within_the_limits():
    source = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    chat = [{"role": "user", "content": "x" * 2000}] * 2000
    assert len(render(source, chat)) > 4_000_000


def test_errors_speak_the_language_of_the_template():
    with pytest.raises(InvalidChatTemplate, match="refused the messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidChatTemplate, match="line 2 of the chat template is not valid Jinja"):
        render("a\n{% if %}")
    with pytest.raises(InvalidChatTemplate, match="No filter named 'nonsense'"):
        render("{{ messages | nonsense }}")
    with pytest.raises(InvalidChatTemplate, match="'a' is undefined"):
        render("{{ a.b.c }}")
    with pytest.raises(InvalidChatTemplate, match="TypeError: can only concatenate str"):
        render("{{ 'a' + none }}")


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ("hi", "messages must be a list"),
        ({"role": "user"}, "messages must be a list"),
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] must be an object"),
        ([*USER, {"content": "x"}], r"messages\[1\]\.role"),
        ([{"role": 3, "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "user"}], r"messages\[0\]\.content must be a string"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\]\.content\[0\] is of type 'image_url'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\] holds a object"),
        ([{"role": "user", "content": "x", 1: 2}], r"messages\[0\] has a key"),
    ],
)
def test_malformed_messages_are_named(messages, where):
    with pytest.raises(InvalidPrompt, match=where):
        render("ok", messages)


def test_messages_nested_too_deep_are_refused():
    value = "x"
    for _ in range(100):
        value = [value]
    with pytest.raises(InvalidPrompt, match="nested more than 64"):
        render("ok", [{"role": "user", "content": "x", "extra": value}])


def test_messages_become_plain_copies():
    class Role(str, enum.Enum):
        USER = "user"

    message = {"role": Role.USER, "content": ({"type": "text", "text": "a"}, {"type": "text", "text": "b"})}
    (plain,) = check_messages((message,))
    assert plain == {"role": "user", "content": "a\nb"} and type(plain["role"]) is str
    (plain,) = check_messages([{"role": "assistant", "tool_calls": [{"id": "1"}]}])
    assert plain["content"] is None


def test_variables_reach_the_template_but_not_over_the_reserved_ones():
    assert render("{{ thinking }}", variables={"thinking": False}) == "False"
    with pytest.raises(InvalidChatTemplate, match="'messages' is set by the engine"):
        render("", variables={"messages": []})
    with pytest.raises(InvalidPrompt, match="template variables holds a function"):
        render("", variables={"f": render})


CONTINUE = "{% for m in messages %}[{{ m.role }}]{{ m.content#FILTER }}<end>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.mark.parametrize(
    ("filters", "expected"), [("", "[user]hi<end>\n[assistant]so  "), (" | trim", "[user]hi<end>\n[assistant]so")]
)
def test_the_final_message_can_be_continued(filters, expected):
    chat = [*USER, {"role": "assistant", "content": "so  "}]
    source = CONTINUE.replace("#FILTER", filters)
    assert render(source, chat, continue_final_message=True) == expected
    assert render(source, USER) == "[user]hi<end>\n[assistant]"
    assert render(source, USER, add_generation_prompt=False) == "[user]hi<end>\n"


def test_what_cannot_be_continued_is_refused():
    with pytest.raises(InvalidChatTemplate, match="exclude each other"):
        render("", USER, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(InvalidChatTemplate, match="leaves out or changes"):
        render("{{ messages | length }}", USER, continue_final_message=True)
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    with pytest.raises(InvalidChatTemplate, match="needs text"):
        render("", calls, continue_final_message=True)
