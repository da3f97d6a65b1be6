"""Chat templates by name, for models whose file has none or a wrong one.

Each follows the format its family was trained on. A family without a turn for tools shows a
tool's answer to the model as the user's.
"""

from __future__ import annotations

__all__ = ["BUILTIN", "MARKERS"]

_GENERATION = "{% if add_generation_prompt %}"

# Families without a system turn put the system prompt in front of the first user message.
_SYSTEM_FIRST = (
    "{%- if messages and messages[0]['role'] in ('system', 'developer') -%}"
    "{%- set system = messages[0]['content'] -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set system = '' -%}{%- set rest = messages -%}{%- endif -%}"
)

_ALPACA = (
    _SYSTEM_FIRST + "{{ system or 'Below is an instruction that describes a task. Write a response"
    " that appropriately completes the request.' }}\n\n"
    "{% for message in rest %}{% if message['role'] == 'assistant' %}"
    "{{ '### Response:\n' + message['content'] + '\n\n' }}{% else %}"
    "{{ '### Instruction:\n' + message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    + _GENERATION
    + "{{ '### Response:\n' }}{% endif %}"
)

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}" + _GENERATION + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_GEMMA = (
    _SYSTEM_FIRST + "{{ bos_token }}{% for message in rest %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' }}"
    "{% if loop.first and system %}{{ system + '\n\n' }}{% endif %}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    + _GENERATION
    + "{{ '<start_of_turn>model\n' }}{% endif %}"
)

_LLAMA2 = (
    _SYSTEM_FIRST + "{% for message in rest %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% else %}"
    "{{ bos_token + '[INST] ' }}{% if loop.first and system %}"
    "{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ message['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)

_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if message['role'] == 'tool' else message['role'])"
    " + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    + _GENERATION
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

_MISTRAL = (
    _SYSTEM_FIRST + "{{ bos_token }}{% for message in rest %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ '[INST] ' }}{% if loop.first and system %}{{ system + '\n\n' }}{% endif %}"
    "{{ message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)

_PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + ('user' if message['role'] == 'tool' else message['role']) + '|>\n'"
    " + message['content'] + '<|end|>\n' }}{% endfor %}"
    + _GENERATION
    + "{{ '<|assistant|>\n' }}{% endif %}"
)

_PLAIN = (
    _SYSTEM_FIRST + "{{ bos_token }}{% if system %}{{ system + '\n\n' }}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] | trim + '\n' }}{% else %}"
    "{{ 'User: ' + message['content'] | trim + '\n' }}{% endif %}{% endfor %}"
    + _GENERATION
    + "{{ 'Assistant:' }}{% endif %}"
)

_VICUNA = (
    _SYSTEM_FIRST + "{{ bos_token }}{{ system or 'A chat between a curious user and an artificial"
    " intelligence assistant. The assistant gives helpful, detailed, and polite answers to the"
    " user\\'s questions.' }}{% for message in rest %}{% if message['role'] == 'assistant' %}"
    "{{ ' ASSISTANT: ' + message['content'] | trim + eos_token }}{% else %}"
    "{{ ' USER: ' + message['content'] | trim }}{% endif %}{% endfor %}"
    + _GENERATION
    + "{{ ' ASSISTANT:' }}{% endif %}"
)

_ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + ('user' if message['role'] == 'tool' else message['role']) + '|>\n'"
    " + message['content'] + eos_token + '\n' }}{% endfor %}"
    + _GENERATION
    + "{{ '<|assistant|>\n' }}{% endif %}"
)

BUILTIN: dict[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "gemma": _GEMMA,
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "phi3": _PHI3,
    "plain": _PLAIN,
    "vicuna": _VICUNA,
    "zephyr": _ZEPHYR,
}
"""Name to Jinja source."""

MARKERS: dict[str, tuple[str, ...]] = {
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "mistral": ("[INST]", "[/INST]"),
}
"""A vocabulary that has all of these as special tokens was made for that format."""
