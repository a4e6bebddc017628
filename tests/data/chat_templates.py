"""Chat templates that behave as those of well-known models do, each in what is odd about it; conversations for them, and
what the model must say in these."""

from typing import Any

CALLS = """
{%- macro calls(message) %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n' + (call.function or call) | tojson + '\\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}
"""

# A system prompt of its own, and tools in it; the answers of tools are a user's.
QWEN25 = (
    CALLS
    + """
{%- set told = messages[0].content if messages[0].role == 'system' else 'Be kind.' %}
{{- '<|im_start|>system\\n' + told }}
{%- if tools %}
    {{- '\\n\\nTools:' }}
    {%- for tool in tools %}
        {{- '\\n' + tool | tojson }}
    {%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {{- '\\n' + message.content if message.content or not message.tool_calls }}
        {{- calls(message) + '<|im_end|>\\n' }}
    {%- elif not (message.role == 'system' and loop.first) %}
        {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\\n' if add_generation_prompt }}"""
)

# Thinking is shown from the last question on, empty at the end if there was none; without it on demand.
QWEN3 = (
    CALLS
    + """
{%- set ns = namespace(asked=0) %}
{%- for message in messages if message.role == 'user' %}
    {%- set ns.asked = messages.index(message) %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set thought, said = message.reasoning_content or '', message.content or '' %}
        {%- if '</think>' in said %}
            {%- set thought, said = said.split('</think>')[0].split('<think>')[1].strip(), said.split('</think>')[1].strip() %}
        {%- endif %}
        {%- generation %}
        {%- if loop.index0 > ns.asked and (thought or loop.last) %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- said + calls(message) }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking }}
{%- endif %}"""
)

# The prompt opens the thinking, which no turn keeps.
R1 = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>' + message.content.split('</think>')[-1] + eos_token }}
    {%- else %}
        {{- '<|user|>' + message.content }}
    {%- endif %}
{%- endfor %}
{{- '<|assistant|><think>\\n' if add_generation_prompt }}"""

# No generation prompt; the system prompt goes to the first question.
LLAMA2 = """
{%- for message in messages if message.role != 'system' %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must take turns') }}
    {%- elif message.role == 'user' %}
        {%- set told = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' if messages[0].role == 'system' %}
        {{- bos_token + '[INST] ' + (told if told and loop.first else '') + message.content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

LLAMA3 = """
{{- bos_token }}
{%- if date is not defined %}
    {%- set date = strftime_now('%d %b %Y') %}
{%- endif %}
{{- '<|head|>system<|/head|>\\n\\nToday: ' + date + '<|eot|>' }}
{%- for message in messages %}
    {{- '<|head|>' + message.role + '<|/head|>\\n\\n' }}
    {%- for call in message.tool_calls or [] %}
        {{- '<|python|>' + call.function | tojson(indent=1) }}
    {%- endfor %}
    {{- message.content | default('', true) | trim }}
    {{- '<|eom|>' if message.tool_calls else '<|eot|>' }}
{%- endfor %}
{{- '<|head|>assistant<|/head|>\\n\\n' if add_generation_prompt }}"""

GEMMA = """
{{- bos_token }}
{%- set first = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- continue %}
    {%- endif %}
    {{- '<|head|>' + ('model' if message.role == 'assistant' else 'user') + '\\n' }}
    {{- (first if loop.index0 == (1 if first else 0) else '') + message.content | trim + '<|eot|>\\n' }}
{%- endfor %}
{{- '<|head|>model\\n' if add_generation_prompt }}"""

# The system prompt goes to the last question; calls are special tokens, and alone in their turn.
MISTRAL = """
{%- set ns = namespace(turn=0, last=-1) %}
{%- for message in messages if message.role == 'user' %}
    {%- set ns.last = messages.index(message) %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' or message.role == 'assistant' and not message.tool_calls %}
        {%- if (message.role == 'user') != (ns.turn % 2 == 0) %}
            {{- raise_exception('roles must take turns') }}
        {%- endif %}
        {%- set ns.turn = ns.turn + 1 %}
    {%- endif %}
    {%- if message.role == 'user' %}
        {%- set told = messages[0].content + '\\n\\n' if messages[0].role == 'system' and loop.index0 == ns.last %}
        {{- '[INST] ' + (told or '') + message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {{- '[RESULT] ' + {'content': message.content} | tojson + '[/RESULT]' }}
    {%- elif message.tool_calls %}
        {{- '[CALLS] ' + message.tool_calls | map(attribute='function') | list | tojson + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""

# A token ends each turn, another one the conversation.
PHI3 = """
{%- for message in messages %}
    {{- '<|head|>' + message.role + '\\n' + message.content + '<|eot|>\\n' }}
{%- endfor %}
{{- '<|head|>assistant\\n' if add_generation_prompt else eos_token }}"""

TEMPLATES = {
    "qwen25": QWEN25,
    "qwen3": QWEN3,
    "r1": R1,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "phi3": PHI3,
}
CONTROL = ["<|head|>", "<|/head|>", "<|eot|>", "<|eom|>", "<|python|>", "<|user|>", "<|assistant|>"]
CONTROL += ["[INST]", "[/INST]", "[CALLS]", "[RESULT]", "[/RESULT]"]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": "<é>"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ASKED = [user("1+1?"), says(" two\n", reasoning_content="easy")]
TALK = [SYSTEM, user("hi"), says("Hello!"), user("1+1?"), says("two")]
THOUGHT = [user("hi"), says("<think>\nwho?\n</think>\n\nHello!"), user("1+1?"), says("<think>\nhm\n</think>\n\n2")]
CALLED = [user("1+1?"), says(None, tool_calls=[ADD, ADD], reasoning_content="hm"), {"role": "tool", "content": "2"}, says("2")]
LONGER = [SYSTEM, *CALLED, user("so?"), says("so", tool_calls=None)]
CONVERSATIONS = {"asked": ASKED, "talk": TALK, "thought": THOUGHT, "called": CALLED, "longer": LONGER}


def call_text(count: int = 2) -> str:
    return '\n<tool_call>\n{"name": "add", "arguments": {"a": "<é>"}}\n</tool_call>' * count


EMPTY = "<think>\n\n</think>\n\n"
MUST_SAY = [
    # (template, conversation, variables): (what the model must say, whether serving shows what is before it) ...
    ("qwen25", "asked", {}, [(" two\n<|im_end|>", True)]),
    ("qwen25", "called", {}, [(call_text()[1:] + "<|im_end|>", True), ("2<|im_end|>", True)]),
    ("qwen3", "asked", {}, [("<think>\neasy\n</think>\n\n two\n<|im_end|>", True)]),
    ("qwen3", "talk", {}, [("Hello!<|im_end|>", True), (f"{EMPTY}two<|im_end|>", True)]),
    ("qwen3", "talk", {"enable_thinking": False}, [("Hello!<|im_end|>", True), ("two<|im_end|>", False)]),
    ("qwen3", "thought", {}, [("Hello!<|im_end|>", True), ("<think>\nhm\n</think>\n\n2<|im_end|>", True)]),
    (
        *("qwen3", "longer", {}),
        [(call_text() + "<|im_end|>", True), ("2<|im_end|>", False), (f"{EMPTY}so<|im_end|>", True)],
    ),
    ("r1", "thought", {}, [("\n\nHello!</s>", False), ("\n\n2</s>", False)]),
    ("llama2", "talk", {}, [(" Hello! </s>", True), (" two </s>", True)]),
    ("llama3", "asked", {"date": "today"}, [("two<|eot|>", False)]),
    ("gemma", "talk", {}, [("Hello!<|eot|>", True), ("two<|eot|>", True)]),
    ("mistral", "talk", {}, [(" Hello!</s>", False), (" two</s>", True)]),
    ("phi3", "talk", {}, [("Hello!<|eot|>", True), ("two<|eot|>", True)]),
]
