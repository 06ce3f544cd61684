"""Short chat templates that treat tool calls and results like the published templates.

- `launch` writes a result as a turn of role `tool`. It accepts results inside the message that has the calls. It does
  not know thoughts.
- `spring` looks ahead for results. It closes the turn between two messages of the model.
- `summer` joins two messages of the model and writes null. It refuses arguments that are not an object. It shows the
  thoughts of all messages after the user's last message. It opens a thought after a result if the model thinks.
- `autumn` is `summer` for a large model, which closes an empty thought.

`launch` and `spring` write a null argument as `None`. All templates write the text of a message after its calls.

Tool declarations: `launch` and `spring` leave out parameters whose names are keywords. `launch` writes a comma before
the properties of an object and the items of an array. All templates write the nested items of an array as plain data.
"""

_ARGUMENT = """
{%- macro argument(x, mark='') -%}
{%- if NULLS and x is none -%}null
{%- elif x is string -%}<|"|>{{ x }}<|"|>
{%- elif x is boolean -%}{{ 'true' if x else 'false' }}
{%- elif x is mapping -%}{{ '{' }}{% for k, v in x | dictsort %}
{{- mark }}{{ k }}{{ mark }}:{{ argument(v, mark) }}{{ ',' if not loop.last }}{% endfor %}{{ '}' }}
{%- elif x is sequence -%}[{% for v in x %}{{ argument(v, mark) }}{{ ',' if not loop.last }}{% endfor %}]
{%- else -%}{{ x }}
{%- endif -%}
{%- endmacro -%}
{%- macro parameters(properties) -%}
{%- set keywords = ['description', 'nullable', 'properties', 'required', 'type'] if SKIPS else [] -%}
{%- for k, v in properties | dictsort if k not in keywords -%}
{%- set comma = ',' if not COMMAS -%}
{%- set early = ',' if COMMAS -%}
{{ k }}:{
{%- if v['description'] or not COMMAS %}description:<|"|>{{ v['description'] }}<|"|>{{ comma }}{% endif -%}
{%- if v['nullable'] %}{{ early if v['description'] }}nullable:true{{ comma }}{% endif -%}
{%- if v['enum'] and v['type'] | upper == 'STRING' %}enum:{{ argument(v['enum']) }},{% endif -%}
{%- if v['properties'] %}{{ early }}properties:{ {{- parameters(v['properties']) -}} }{{ comma }}{% endif -%}
{%- if v['type'] | upper == 'ARRAY' and v['items'] %}{{ early }}items:{{ items(v['items']) }}{{ comma }}{% endif -%}
{%- if v['description'] or v['nullable'] %}{{ early }}{% endif -%}
type:<|"|>{{ v['type'] | upper }}<|"|>}{{ ',' if not loop.last }}
{%- endfor -%}
{%- endmacro -%}
{%- macro items(schema) -%}
{ {%- for k, v in schema | dictsort -%}
{{ k }}:
{%- if k == 'properties' %}{ {{- parameters(v) -}} }
{%- elif k == 'type' %}<|"|>{{ v | upper }}<|"|>
{%- else %}{{ argument(v, '<|"|>') }}{% endif -%}
{{ ',' if not loop.last }}
{%- endfor -%} }
{%- endmacro -%}
{%- macro answered(name, response) -%}
<|tool_response>response:{{ name }}{value:{{ argument(response) }}}<tool_response|>
{%- endmacro -%}
{%- macro called(message) -%}
{%- for call in message['tool_calls'] or [] -%}
{%- set given = call['function']['arguments'] -%}
{%- if STRICT and given is not mapping %}{{ raise_exception('arguments must be an object') }}{% endif -%}
<|tool_call>call:{{ call['function']['name'] }}
{{- argument(given) if given is mapping else '{' + given + '}' }}<tool_call|>
{%- endfor -%}
{%- endmacro -%}
{%- macro plain(text) -%}{{ (text or '') | trim }}{%- endmacro -%}
{{- bos_token -}}
{%- set thinks = enable_thinking is defined and enable_thinking -%}
{%- set keeps = preserve_thinking is defined and preserve_thinking -%}
{%- set system = messages[0]['role'] in ['system', 'developer'] -%}
{%- if thinks or tools or system -%}
<|turn>system
{% if thinks %}<|think|>
{% endif %}{{ plain(messages[0]['content']) if system }}
{%- for tool in tools or [] -%}
<|tool>declaration:{{ tool['function']['name'] }}{
{%- set given = tool['function']['parameters'] -%}
{%- if given %}parameters:{ {{- parameters(given['properties']) -}} }{% endif -%}
}<tool|>
{%- endfor -%}<turn|>
{% endif -%}
{%- set messages = messages[1:] if system else messages -%}
"""

_LAUNCH = """
{%- set ns = namespace(last=none) -%}
{%- for message in messages -%}
{%- set ns.last = none -%}
<|turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{{ called(message) }}
{%- for result in message['tool_responses'] or [] -%}
{{ answered(result['name'], result['response']) }}{% set ns.last = 'result' %}
{%- endfor -%}
{{ plain(message['content']) }}
{%- if not (message['tool_responses'] and not message['content']) %}<turn|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.last != 'result' -%}
<|turn>model
{% endif -%}
"""

_LATER = """
{%- set ns = namespace(last=none, before=none, user=-1) -%}
{%- for message in messages %}{% if message['role'] == 'user' %}{% set ns.user = loop.index0 %}{% endif %}{% endfor -%}
{%- for message in messages -%}
{%- set index = loop.index0 -%}
{%- if message['role'] != 'tool' -%}
{%- set ns.last = none -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{%- if not (role == 'model' and ns.before == 'assistant') -%}<|turn>{{ role }}
{% endif -%}
{%- set thought = message['reasoning_content'] -%}
{%- set calls = message['tool_calls'] -%}
{%- set shown = (index > ns.user and (JOINS or calls)) or (JOINS and keeps and calls) -%}
{%- if thought and shown -%}<|channel>thought
{{ thought }}
<channel|>{% endif -%}
{{ called(message) }}
{%- if message['tool_calls'] %}{% set ns.last = 'call' %}{% endif -%}
{%- set scan = namespace(over=false, following=none) -%}
{%- for follow in messages[index + 1:] -%}
{%- if follow['role'] != 'tool' and not scan.following %}{% set scan.following = follow['role'] %}{% endif -%}
{%- if follow['role'] != 'tool' %}{% set scan.over = true %}{% endif -%}
{%- if follow['role'] == 'tool' and not scan.over and message['tool_calls'] -%}
{%- set who = namespace(name=follow['name'] or 'unknown') -%}
{%- for call in message['tool_calls'] if call['id'] == follow['tool_call_id'] -%}
{%- set who.name = call['function']['name'] -%}
{%- endfor -%}
{{ answered(who.name, follow['content']) }}{% set ns.last = 'result' %}
{%- endif -%}
{%- endfor -%}
{{ plain(message['content']) }}
{%- set joins = JOINS and role == 'model' and scan.following == 'assistant' and ns.last != 'call' -%}
{%- set is_open = ns.last == 'result' and not message['content'] and not (JOINS and scan.following) -%}
{%- if ns.last == 'call' %}<|tool_response>
{%- elif not joins and not is_open %}<turn|>
{% endif -%}
{%- set ns.before = message['role'] -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.last not in ('result', 'call') -%}<|turn>model
{% if LARGE and not thinks %}<|channel>thought
<channel|>{% endif %}
{%- elif add_generation_prompt and JOINS and ns.last == 'result' and thinks -%}<|channel>thought
{% endif -%}
"""


def _template(body: str, **switches: bool) -> str:
    names = ("NULLS", "STRICT", "JOINS", "LARGE", "SKIPS", "COMMAS")
    return (
        "".join(f"{{%- set {name} = {str(switches.get(name, False)).lower()} -%}}" for name in names) + _ARGUMENT + body
    )


TEMPLATES = {
    "launch": _template(_LAUNCH, SKIPS=True, COMMAS=True),
    "spring": _template(_LATER, SKIPS=True),
    "summer": _template(_LATER, NULLS=True, STRICT=True, JOINS=True),
    "autumn": _template(_LATER, NULLS=True, STRICT=True, JOINS=True, LARGE=True),
}
