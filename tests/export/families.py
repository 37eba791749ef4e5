"""Chat templates of the kinds that fine-tunes are made with, written for these tests."""

ALTERNATE = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"

CHATML = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA_2 = (
    "{% set system = messages[0].content if messages[0].role == 'system' else false %}"
    "{% for m in (messages[1:] if system is not false else messages) %}" + ALTERNATE +
    "{% set c = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content if loop.first and system is not false else m.content %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + c.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + c.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip

LLAMA_3 = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' %}"
    "{{ bos_token + c if loop.first else c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + ALTERNATE +
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)  # fmt: skip

MISTRAL = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
    "{% for m in (messages[1:] if messages[0].role == 'system' else messages) %}" + ALTERNATE +
    "{% if m.role == 'user' %}{{ '[INST] ' + (s + '\\n\\n' if loop.last and s else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip

BRACES = (
    "{% for m in messages %}{{ '{{' + m.role + '}} ' + m.content + '\\n' }}{% endfor %}{{ '{{assistant}} ' }}"
)

FAMILIES = {
    "chatml": CHATML, "llama-2": LLAMA_2, "llama-3": LLAMA_3, "gemma": GEMMA, "mistral": MISTRAL, "braces": BRACES,
}  # fmt: skip

REFUSED = {
    "the date of the day": "{{ strftime_now('%d %b %Y') }}" + CHATML,
    "depends on where they stand": "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",
    "write every message once": "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}",
    "the translation": "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}\n{% endfor %}<assistant>",
    "changes the order": "{% for m in messages | reverse %}<{{ m.role }}>{{ m.content }}\n{% endfor %}",
    "refuses a chat of": "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ messages[0].content }}",
}  # fmt: skip
