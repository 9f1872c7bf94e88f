"""The hub's Jinja conventions, against transformers' own renderer where that can be asked."""

import json
from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lmx.core.errors import InputError
from lmx.core.text.template import MAX_RENDERED_CHARS, ChatTemplate, TemplateError
from lmx.core.text.types import Message

MESSAGES = [
    Message(role="user", content="<b>Grüße & 'quotes' \"</b>\n"),
    Message(role="assistant", content=" 生活 🤗 "),
]
TEMPLATES = {
    "blocks": "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\nend\n",
    "tojson": "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}|{{ 'é' | tojson(ensure_ascii=true) }}",
    "tojson separators": "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m['content'] }}\n{% endgeneration %}{% endfor %}",
    "generation scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "loopcontrols": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{{ m.role }}{% break %}{% endfor %}",
    "defaults": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}"
    "{{ missing is defined }}{{ missing }}",
    "tokens": "{{ bos_token }}{{ eos_token }}{{ additional_special_tokens | join(',') }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 %}{% endfor %}"
    "{{ ns.n * 3 }}",
    "macro": "{% macro f(x) %}[{{ x | trim }}]{% endmacro %}{% for m in messages %}{{ f(m['content']) }}{% endfor %}",
    "whitespace": "  {%- if true -%}  a  {%- endif %}  b\n\n",
    "methods": "{{ messages[0]['content'].split('b') | join('-') }}"
    "{{ messages[1].content.strip() | upper }}{{ 2 ** 10 }}",
}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<a>", "<b>"]}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(name: str, prompt: bool) -> None:
    expected, _ = render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=prompt, **VARIABLES
    )
    assert ChatTemplate(TEMPLATES[name], VARIABLES).render(MESSAGES, prompt) == expected[0]


def test_strftime_now() -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    assert ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}).render(MESSAGES, True) in (
        before,
        datetime.now().strftime("%Y-%m-%d"),
    )


def test_raise_exception_is_a_refusal() -> None:
    with pytest.raises(TemplateError, match="Only cats") as error:
        ChatTemplate("{{ raise_exception('Only cats') }}", {}).render(MESSAGES, True)
    assert error.value.refusal == "Only cats"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ 'a' * 10**10 }}",
        "{{ [0] * 999999999 }}",
        "{{ 10 ** 100000 }}",
        "{{ (2 ** 4000) ** 4000 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for a in range(9999) %}{% for b in range(9999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ missing() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a'|int('b') + [] }}",
    ],
)
def test_what_a_template_may_not_do(source: str) -> None:
    with pytest.raises(TemplateError) as error:
        ChatTemplate(source, {}).render(MESSAGES, True)
    assert error.value.refusal is None
    assert "\n" not in error.value.message


def test_an_unsafe_attribute_is_as_good_as_undefined() -> None:
    assert ChatTemplate("[{{ messages.__class__ }}{{ ''|attr('__class__') }}]", {}).render(MESSAGES, True) == "[]"


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ }", "{% if x %}", "{{ x | nofilter }}", "{{ " + "(" * 5000 + " }}"]
)
def test_malformed_templates(source: str) -> None:
    with pytest.raises(InputError, match="malformed"):
        ChatTemplate(source, {})


def test_output_is_bounded_but_large_enough() -> None:
    text = "x" * (MAX_RENDERED_CHARS - 10)
    assert len(ChatTemplate("{{ messages[0].content }}", {}).render([Message(role="user", content=text)], True)) == len(
        text
    )


def test_messages_are_not_changed() -> None:
    before = json.dumps(MESSAGES)
    ChatTemplate("{% for m in messages %}{% set _ = m.get('role') %}{% endfor %}", {}).render(MESSAGES, True)
    assert json.dumps(MESSAGES) == before
