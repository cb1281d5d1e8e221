"""Chat templates that behave like those of public families, in words of our own, and tokenizers for them.

Each has the traits of its family that matter for ids: what stands between prompt and answer, what ends a turn, what is
written behind that, which earlier turns are rendered otherwise, what is refused.
"""

from dataclasses import dataclass
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

NEEDS_TURNS = """
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must take turns: user, assistant') }}{% endif %}
"""
CALLS = """
{%- for c in m.tool_calls or [] %}
{{- '\n<tool_call>\n' + ({'name': c.function.name, 'arguments': c.function.arguments} | tojson) + '\n</tool_call>' }}
{%- endfor %}"""
TOOL_LIST = """
{%- if tools %}{{- '\n\n# Tools\n' }}{% for t in tools %}{{- (t | tojson) + '\n' }}{% endfor %}{% endif %}"""
CHATML = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
QWEN25 = (
    """
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content }}
{%- else %}{{- '<|im_start|>system\nBe of help.' }}{% endif %}"""
    + TOOL_LIST
    + """{{- '<|im_end|>\n' }}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- elif m.role != 'system' or not loop.first %}{{- '<|im_start|>' + m.role + '\n' + (m.content or '') }}"""
    + CALLS
    + """{{- '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
)
FIND_LAST = """
{%- set ns = namespace(asked=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"""
QWEN3 = (
    """
{%- if tools or messages[0].role == 'system' %}{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{% endif %}"""
    + TOOL_LIST
    + """{{- '<|im_end|>\n' }}{% endif %}"""
    + FIND_LAST
    + """
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{%- set thought = m.reasoning_content or '' %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.asked and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + (m.content or '').lstrip('\n') }}
{%- else %}{{- m.content or '' }}{% endif %}"""
    + CALLS
    + """{{- '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}{% endif %}
{% endif %}"""
)
QWEN35 = (
    QWEN3.replace("(loop.last or thought)", "true")
    .replace(
        "add_generation_prompt %}{{- '<|im_start|>assistant\n' }}",
        "add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}",
    )
    .replace("{{- '<think>\n\n</think>\n\n' }}", "{{- '\n</think>\n\n' }}")
)
LLAMA2 = (
    """
{%- if messages[0].role == 'system' %}
{% set rest = messages[1:] %}
{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
{%- else %}{% set rest = messages %}{% set s = '' %}{% endif %}
{%- for m in rest %}"""
    + NEEDS_TURNS.strip("\n")
    + """
{%- set text = s + m.content if loop.first else m.content %}
{%- if m.role == 'user' %}{{- bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- else %}{{- ' ' + text.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
)
HEADER = "'<|start_header_id|>' + {} + '<|end_header_id|>\\n\\n'"
LLAMA3 = (
    """
{%- for m in messages %}
{%- set turn = """
    + HEADER.format("m.role")
    + """ + m.content | trim + '<|eot_id|>' %}
{{- bos_token + turn if loop.first else turn }}
{%- endfor %}
{%- if add_generation_prompt %}{{- """
    + HEADER.format("'assistant'")
    + """ }}{% endif %}"""
)
LLAMA31 = (
    """
{{- bos_token + """
    + HEADER.format("'system'")
    + """ }}
{%- if builtin_tools is defined %}{{- 'Environment: ipython\n' }}{% endif %}
{{- 'Today: ' + (date_string if date_string is defined else '1 May 2024') + '\n\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}
{{- '<|eot_id|>' }}
{%- for m in messages %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{- raise_exception('One call at a time!') }}{% endif %}
{%- set f = m.tool_calls[0].function %}
{{- """
    + HEADER.format("'assistant'")
    + """ }}
{%- if builtin_tools is defined and f.name in builtin_tools %}
{{- '<|python_tag|>' + f.name + '.call(' + (f.arguments | tojson) + ')' }}
{%- else %}{{- '{"name": "' + f.name + '", "parameters": ' + (f.arguments | tojson) + '}' }}{% endif %}
{{- '<|eom_id|>' if builtin_tools is defined else '<|eot_id|>' }}
{%- elif m.role == 'tool' %}{{- """
    + HEADER.format("'ipython'")
    + """ + m.content + '<|eot_id|>' }}
{%- else %}{{- """
    + HEADER.format("m.role")
    + """ }}
{%- if loop.first and tools %}{% for t in tools %}{{- (t | tojson) + '\n\n' }}{% endfor %}{% endif %}
{{- m.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- """
    + HEADER.format("'assistant'")
    + """ }}{% endif %}"""
)
MISTRAL1 = (
    """
{{- bos_token }}
{%- for m in messages %}"""
    + NEEDS_TURNS.strip("\n")
    + """
{%- if m.role == 'user' %}
{{- ' [INST] ' + m.content + ' [/INST]' }}{% else %}
{{- ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""
)
MISTRAL3 = (
    """
{%- set s = '' %}
{%- if messages[0].role == 'system' %}
{% set s = messages[0].content + '\n\n' %}
{% set messages = messages[1:] %}
{% endif %}"""
    + FIND_LAST
    + """
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if loop.index0 == ns.asked and tools %}
{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' + (s if loop.index0 == ns.asked else '') + m.content + '[/INST]' }}
{%- elif m.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for c in m.tool_calls %}
{%- if not c.id or c.id | length != 9 %}{{- raise_exception('An id of a call has 9 letters') }}{% endif %}
{{- '{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) + ', "id": "' + c.id + '"}' }}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""
)
MISTRAL7 = """
{{- bos_token }}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'system' %}{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}
{%- elif m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- else %}{{- m.content or '' }}
{%- for c in m.tool_calls or [] %}
{{- '[TOOL_CALLS]' + c.function.name + '[ARGS]' + (c.function.arguments | tojson) }}{% endfor %}
{{- eos_token }}{% endif %}
{%- endfor %}"""
GEMMA2 = (
    """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}"""
    + NEEDS_TURNS.strip("\n")
    + """
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}"""
)
GEMMA3 = GEMMA2.replace(
    "{{- raise_exception('System role not supported') }}",
    "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}",
).replace("+ m.content", "+ ((first if loop.first and first is defined else '') + m.content)")
PHI3 = """
{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token }}"""
PHI4 = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""
DEEPSEEK = """
{{- bos_token }}
{%- for m in messages if m.role == 'system' %}{{- m.content }}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|User|>' + m.content }}
{%- elif m.role == 'tool' %}{{- '<|tool_outputs_begin|>' + m.content + '<|tool_outputs_end|>' }}
{%- elif m.tool_calls %}{{- '<|Assistant|>' + (m.content or '') + '<|tool_calls_begin|>' }}
{%- for c in m.tool_calls %}
{{- c.function.name + '<|tool_sep|>' + (c.function.arguments | tojson) + '<|tool_call_end|>' }}{% endfor %}
{{- '<|tool_calls_end|>' + eos_token }}
{%- elif m.role == 'assistant' %}{{- ANSWER + m.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- ASK }}{% endif %}"""
R1 = DEEPSEEK.replace(
    "ANSWER", "('' if not loop.first and messages[loop.index0 - 1].role == 'tool' else '<|Assistant|>')"
).replace("ASK", "'' if messages[-1].role == 'tool' else '<|Assistant|><think>\n'")
V31 = DEEPSEEK.replace("ANSWER", "'<|Assistant|></think>'").replace(
    "ASK", "'<|Assistant|><think>' if thinking is defined and thinking else '<|Assistant|></think>'"
)
GLM45 = (
    """
{{- '[gMASK]<sop>' }}
{%- if tools %}
{{- '<|system|>\n# Tools\n' }}{% for t in tools %}
{{- (t | tojson) + '\n' }}{% endfor %}
{% endif %}"""
    + FIND_LAST
    + """
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '<|user|>\n' + m.content + ('/nothink' if enable_thinking is defined and not enable_thinking else '') }}
{%- elif m.role == 'system' %}{{- '<|system|>\n' + m.content }}
{%- elif m.role == 'tool' %}{{- '<|observation|>\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- else %}{{- '<|assistant|>' }}
{{- '\n<think>' + (m.reasoning_content if m.reasoning_content and loop.index0 > ns.asked else '') + '</think>' }}
{%- if m.content %}{{- '\n' + m.content.strip() }}{% endif %}
{%- for c in m.tool_calls or [] %}
{{- '\n<tool_call>' + c.function.name + '\n' }}
{%- for k, v in c.function.arguments.items() %}
{{- '<arg_key>' + k + '</arg_key>\n<arg_value>' + v + '</arg_value>\n' }}{% endfor %}
{{- '</tool_call>' }}
{%- endfor %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>'
  + ('\n<think></think>' if enable_thinking is defined and not enable_thinking else '') }}{% endif %}"""
)
GPT_OSS = (
    """
{{- '<|start|>system<|message|>You chat.\nReasoning: '
  + (reasoning_effort if reasoning_effort is defined else 'medium') + '<|end|>' }}
{%- set rest = messages %}{% set s = '' %}
{%- if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = messages[1:] %}{% endif %}
{%- if s or tools %}{{- '<|start|>developer<|message|>' + s }}"""
    + TOOL_LIST
    + """{{- '<|end|>' }}{% endif %}
{%- for m in rest %}
{%- if m.role == 'assistant' and m.tool_calls %}
{%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{%- set f = m.tool_calls[0].function %}
{{- '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>'
  + (f.arguments | tojson) + '<|call|>' }}
{%- elif m.role == 'assistant' and loop.last and not add_generation_prompt %}
{%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- elif m.role == 'assistant' %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start|>functions.find to=assistant<|channel|>commentary<|message|>' + (m.content | tojson)
  + '<|end|>' }}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"""
)
ZEPHYR = """
{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{% endif %}"""
VICUNA = """
{%- if messages[0].role == 'system' %}{{- messages[0].content + ' ' }}{% set messages = messages[1:] %}
{%- else %}{{- 'A talk. ' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- 'USER: ' + m.content.strip() + ' ' }}{% else %}
{{- 'ASSISTANT: ' + m.content.strip() + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{% endif %}"""
TULU = """
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{- '<|assistant|>\n' + m.content + eos_token + ('' if loop.last else '\n') }}
{%- else %}{{- '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}
{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\n' }}{% endif %}
{%- endfor %}"""
OLMO2 = "{{- bos_token }}" + TULU
SMOLLM3 = (
    """
{%- set mode = 'think' if enable_thinking is not defined or enable_thinking else 'no_think' %}
{{- '<|im_start|>system\n## Metadata\nReasoning Mode: /' + mode + '\n\n' }}
{%- if messages[0].role == 'system' %}
{{- '## Instructions\n' + messages[0].content }}{% set messages = messages[1:] %}
{% endif %}"""
    + TOOL_LIST
    + """{{- '<|im_end|>\n' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif mode == 'think' %}{{- '<|im_start|>assistant\n' + m.content.lstrip('\n') }}"""
    + CALLS
    + """{{- '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' + ('' if mode == 'think' else '<think>\n\n</think>\n') }}{% endif %}"""
)
COMMAND_R = """
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{- raise_exception('A tool is not known here') }}{% endif %}
{{- '<|START_OF_TURN_TOKEN|><|' + {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}[m.role] + '_TOKEN|>' }}
{{- m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""
GRANITE = """
{%- if messages[0].role != 'system' %}
{{- '<|start_of_role|>system<|end_of_role|>Today is May.<|end_of_text|>\n' }}{% endif %}
{%- if tools %}
{{- '<|start_of_role|>available_tools<|end_of_role|>' + (tools | tojson) + '<|end_of_text|>\n' }}{% endif %}
{%- for m in messages %}{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + (m.content or '') }}
{%- if m.tool_calls %}{{- '<|tool_call|>' + (m.tool_calls | tojson) }}{% endif %}
{{- '<|end_of_text|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""
FALCON = """
{%- for m in messages %}{{- '' if loop.first else '\n\n' }}
{{- {'user': 'User: ', 'assistant': 'Assistant: ', 'system': ''}[m.role] + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{- '\n\nAssistant:' }}{% endif %}"""
YI = """
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{% set messages = messages[1:] %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n<|im_start|>assistant\n' }}
{%- elif m.role == 'assistant' %}{{- m.content + '<|im_end|>' + '\n' }}{% endif %}
{%- endfor %}"""
KIMI = """
{%- if tools %}{{- '<|im_system|>tool_declare<|im_middle|>' + (tools | tojson) + '<|im_end|>' }}{% endif %}
{%- for m in messages %}
{{- '<|im_' + (m.role if m.role in ('user', 'assistant') else 'system') + '|>' + m.role + '<|im_middle|>'
  + (m.content or '') }}
{%- if m.tool_calls %}{{- '<|tool_calls_section_begin|>' }}
{%- for c in m.tool_calls %}
{{- '<|tool_call_begin|>' + c.function.name + '<|tool_call_argument_begin|>'
  + (c.function.arguments | tojson) + '<|tool_call_end|>' }}{% endfor %}
{{- '<|tool_calls_section_end|>' }}{% endif %}
{{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}"""
MINIMAX = (
    """
{{- ']~!b[' }}"""
    + FIND_LAST
    + """
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{- ']~b]ai\n' }}
{%- if m.reasoning_content and loop.index0 > ns.asked %}
{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}
{{- m.content or '' }}
{%- for c in m.tool_calls or [] %}
{{- '\n<minimax:tool_call>\n' + c.function.name + (c.function.arguments | tojson)
  + '\n</minimax:tool_call>' }}{% endfor %}
{{- '[e~[\n' }}
{%- else %}{{- ']~b]' + m.role + '\n' + m.content + '[e~[\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- ']~b]ai\n<think>\n' }}{% endif %}"""
)


@dataclass(frozen=True)
class Family:
    """A template, the tokens of its tokenizer, and what is known of it.

    Attributes:
        end: ends a turn; "" where the template writes no such.
        behind: what the template writes behind the end of the last turn.
        ends: all tokens that end a turn.
        rewrites: conversations of several turns whose earlier ones are rendered otherwise once more follow.
        refuses: conversations that it refuses.
        metaspace: words of the tokenizer begin with a mark for the space before them, as in Llama 2.
    """

    template: str
    special: tuple
    end: str
    behind: str = ""
    ends: tuple = ()
    eos: str = "<|endoftext|>"
    bos: str | None = None
    added: tuple = ()
    rewrites: tuple = ()
    refuses: tuple = ()
    metaspace: bool = False


IM = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
H3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
INST = {"special": (), "end": "</s>", "eos": "</s>", "bos": "<s>", "metaspace": True}
GEMMA = {
    "special": ("<start_of_turn>", "<end_of_turn>"),
    "end": "<end_of_turn>",
    "behind": "\n",
    "eos": "<eos>",
    "bos": "<bos>",
    "metaspace": True,
}
DEEP = {
    "special": (
        "<|User|>",
        "<|Assistant|>",
        "<|tool_calls_begin|>",
        "<|tool_calls_end|>",
        "<|tool_call_end|>",
        "<|tool_sep|>",
        "<|tool_outputs_begin|>",
        "<|tool_outputs_end|>",
    ),
    "end": "<|eos|>",
    "eos": "<|eos|>",
    "bos": "<|bos|>",
    "added": ("<think>", "</think>"),
}
FAMILIES = {
    "chatml": Family(CHATML, IM, "<|im_end|>", "\n", refuses=("tools",)),
    "qwen2.5": Family(QWEN25, IM, "<|im_end|>", "\n", added=THINK[2:4]),
    "qwen3": Family(QWEN3, IM, "<|im_end|>", "\n", added=THINK, rewrites=("several", "system", "tools", "reasoning")),
    "qwen3.5": Family(QWEN35, IM, "<|im_end|>", "\n", added=THINK, rewrites=("several", "system", "reasoning")),
    "llama-2": Family(LLAMA2, **INST, refuses=("tools",)),
    "llama-3": Family(LLAMA3, H3, "<|eot_id|>", bos="<|bos|>", refuses=("tools",)),
    "llama-3.1": Family(LLAMA31, H3, "<|eot_id|>", bos="<|bos|>", ends=("<|eot_id|>", "<|eom_id|>")),
    "mistral-1": Family(MISTRAL1, **INST, refuses=("system", "tools")),
    "mistral-3": Family(
        MISTRAL3,
        **{
            **INST,
            "special": (
                "[INST]",
                "[/INST]",
                "[TOOL_CALLS]",
                "[AVAILABLE_TOOLS]",
                "[/AVAILABLE_TOOLS]",
                "[TOOL_RESULTS]",
                "[/TOOL_RESULTS]",
            ),
        },
        rewrites=("system",),
    ),
    "mistral-7": Family(
        MISTRAL7,
        (
            "[INST]",
            "[/INST]",
            "[SYSTEM_PROMPT]",
            "[/SYSTEM_PROMPT]",
            "[TOOL_CALLS]",
            "[ARGS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ),
        "</s>",
        eos="</s>",
        bos="<s>",
    ),
    "gemma-2": Family(GEMMA2, **GEMMA, refuses=("system", "tools")),
    "gemma-3": Family(GEMMA3, **GEMMA, refuses=("tools",)),
    "phi-3": Family(
        PHI3, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), "<|end|>", "\n<|endoftext|>", refuses=("tools",)
    ),
    "phi-4": Family(PHI4, (*IM, "<|im_sep|>"), "<|im_end|>", refuses=("tools",)),
    "deepseek-r1": Family(R1, **DEEP),
    "deepseek-v3.1": Family(V31, **DEEP),
    "glm-4.5": Family(
        GLM45,
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"),
        "",
        ends=("<|user|>",),
        added=THINK,
        rewrites=("reasoning",),
    ),
    "gpt-oss": Family(
        GPT_OSS,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        "<|return|>",
        ends=("<|return|>", "<|call|>"),
        rewrites=("several", "system", "reasoning"),
    ),
    "zephyr": Family(ZEPHYR, (), "</s>", "\n", eos="</s>", metaspace=True, refuses=("tools",)),
    "vicuna": Family(VICUNA, (), "</s>", eos="</s>", bos="<s>", metaspace=True, refuses=("tools",)),
    "tulu": Family(TULU, (), "<|eos|>", eos="<|eos|>", refuses=("tools",)),
    "olmo-2": Family(OLMO2, (), "<|endoftext|>", bos="<|bos|>", refuses=("tools",)),
    "smollm3": Family(SMOLLM3, IM, "<|im_end|>", "\n", added=THINK),
    "command-r": Family(
        COMMAND_R,
        ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        "<|END_OF_TURN_TOKEN|>",
        bos="<BOS>",
        refuses=("tools",),
    ),
    "granite": Family(
        GRANITE,
        ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        "<|end_of_text|>",
        "\n",
        eos="<|end_of_text|>",
    ),
    "falcon": Family(FALCON, (), "", refuses=("tools",)),
    "yi": Family(YI, IM, "<|im_end|>", "\n", refuses=("tools",)),
    "kimi": Family(
        KIMI,
        (
            "<|im_user|>",
            "<|im_assistant|>",
            "<|im_system|>",
            "<|im_middle|>",
            "<|im_end|>",
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            "<|tool_call_begin|>",
            "<|tool_call_end|>",
            "<|tool_call_argument_begin|>",
        ),
        "<|im_end|>",
    ),
    "minimax": Family(
        MINIMAX, ("]~!b[", "]~b]", "[e~["), "[e~[", "\n", added=("<think>", "</think>"), rewrites=("reasoning",)
    ),
}
TEXTS = [
    "Name a flower.",
    "A rose, I should say.\n\nOr a lily.",
    "assistant\n\nuser: one  two",
    "ASSISTANT: [INST] yes",
] * 4


@cache
def tokenizer_of(name):
    """A tokenizer of a family: a small BPE, of bytes or of marked words, with the family's tokens and template."""
    family = FAMILIES[name]
    backend = Tokenizer(models.BPE(byte_fallback=family.metaspace, unk_token="<unk>" if family.metaspace else None))
    special = [token for token in ("<unk>", family.bos, family.eos, "<pad>") if token]
    if family.metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [chr(code) for code in (10, *range(33, 127))]
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    backend.train_from_iterator(TEXTS, trainer)
    if family.bos:
        single = f"{family.bos} $A"
        ids = [(family.bos, backend.token_to_id(family.bos))]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.special)})
    tokenizer.add_tokens(list(family.added))
    tokenizer.chat_template = family.template
    return tokenizer


def message(role, content, **more):
    return {"role": role, "content": content, **more}


FIND = {
    "type": "function",
    "function": {"name": "find", "description": "Finds.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "callnumb1", "type": "function", "function": {"name": "find", "arguments": {"what": "flower"}}}
ASK, TELL = message("user", "Name a flower."), message("assistant", "A rose, I should say.\n\nOr a lily.")
CONVERSATIONS = {  # name: (prompt, completion, tools, template_kwargs)
    "single": ([ASK], [TELL], None, None),
    "several": (
        [ASK],
        [TELL, message("user", "And a bird?"), message("assistant", "An owl."), ASK, message("assistant", "Mud, no.")],
        None,
        None,
    ),
    "system": (
        [message("system", "Be brief."), ASK],
        [TELL, message("user", "And a bird?"), message("assistant", "An owl.")],
        None,
        None,
    ),
    "tools": (
        [ASK],
        [
            message("assistant", "", tool_calls=[CALL]),
            message("tool", "rose", tool_call_id="callnumb1", name="find"),
            message("assistant", "A rose."),
        ],
        [FIND],
        None,
    ),
    "reasoning": (
        [ASK],
        [
            {**TELL, "reasoning_content": "Let me see."},
            message("user", "And a bird?"),
            message("assistant", "An owl.", reasoning_content="It flies."),
        ],
        None,
        None,
    ),
    "kwargs": ([ASK], [TELL], None, {"enable_thinking": False, "thinking": True, "reasoning_effort": "low"}),
    "prefill": ([ASK, message("assistant", "A rose")], [message("assistant", ", I should say.")], None, None),
}
