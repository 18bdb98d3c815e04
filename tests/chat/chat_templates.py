"""Chat templates as models ship them, each next to the same with transformers' markers around what the assistant writes.

The second is the oracle: transformers reads the markers, smolforge is given the first, which has none.
"""

SMOLLM2 = (
    r"""{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"""
    r"""{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"""
    r"""{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"""
    r"""{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
)
_SMOLLM2_TURN = r"""{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"""
_CHATML_MARKED_TURN = (
    r"""{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"""
    r"""{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"""
    r"""{% endif %}{{ '\n' }}"""
)
CHATML = r"""{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}"""
_CHATML_TURN = r"""{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"""
LLAMA3 = (
    r"""{% set loop_messages = messages %}{% for message in loop_messages %}"""
    r"""{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"""
    r""" + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"""
    r"""{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
)
LLAMA3_MARKED = (
    r"""{% for message in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}"""
    r"""{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}{% if message['role'] == 'assistant' %}"""
    r"""{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}"""
    r"""{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"""
)
MISTRAL = (
    r"""{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"""
    r"""{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"""
    r"""{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"""
    r"""{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"""
    r"""{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
)
_MISTRAL_ANSWER = r"""{{ message['content'] + eos_token}}"""
GEMMA = (
    r"""{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"""
    r"""{% endif %}{% for message in messages %}"""
    r"""{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"""
    r"""{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"""
    r"""{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"""
    r"""{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"""
    r"""{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
)
_GEMMA_TURN = r"""{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"""
_GEMMA_MARKED_TURN = (
    r"""{{ '<start_of_turn>' + role + '\n' }}{% if role == 'model' %}{% generation %}"""
    r"""{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{% else %}"""
    r"""{{ message['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}"""
)
ZEPHYR = r"""{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
_ZEPHYR_ANSWER = r"""{{ '<|assistant|>\n'  + message['content'] + eos_token }}"""
# Of Qwen 3: what the assistant thought is left out of every turn but the last.
FORGETFUL = (
    r"""{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"""
    r"""{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}"""
    r"""{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
)
ENDLESS = r"""{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"""


def _marked(template: str, turn: str, marked: str) -> str:
    assert turn in template
    return template.replace(turn, marked)


# Name: the template as it is, and with markers; the roles that it takes besides user and assistant.
TEMPLATES = {
    "smollm2": (SMOLLM2, _marked(SMOLLM2, _SMOLLM2_TURN, _CHATML_MARKED_TURN), True),
    "chatml": (CHATML, _marked(CHATML, _CHATML_TURN, _CHATML_MARKED_TURN.replace("{{", "{{-")), True),
    "llama3": (LLAMA3, LLAMA3_MARKED, True),
    "mistral": (
        MISTRAL,
        _marked(MISTRAL, _MISTRAL_ANSWER, "{% generation %}" + _MISTRAL_ANSWER + "{% endgeneration %}"),
        False,
    ),
    "gemma": (GEMMA, _marked(GEMMA, _GEMMA_TURN, _GEMMA_MARKED_TURN), False),
    "zephyr": (
        ZEPHYR,
        _marked(
            ZEPHYR,
            _ZEPHYR_ANSWER,
            r"{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '' }}",
        ),
        True,
    ),
}
SPECIALS = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "</s>", "<s>",
]  # fmt: skip
EOS = {"smollm2": "<|im_end|>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
EOS |= dict.fromkeys(("mistral", "zephyr"), "</s>")
