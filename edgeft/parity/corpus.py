"""Texts that tokenizers disagree on, and conversations that templates disagree on."""

from __future__ import annotations

NASTY = (
    "Hello, world!", "  leading and  double   spaces", "trailing space ", "tabs\tand\t\ttabs", "\n\n\nthree newlines",
    "line one\r\nline two", "1234567890 3.14159 1,000,000 0x1F 50% ½ ²", "don't I'll they've 'tis he'd",
    "CamelCase snake_case kebab-case SCREAMING_CASE", "def f(x):\n    return x ** 2  # square\n",
    "{\"key\": [1, 2, {\"a\": null}]}", "<div class=\"x\">&amp;</div>", "https://example.org/a?b=c&d=%20#e",
    "Größe, façade, naïve, Łódź, Ærø", "Ελληνικά και Русский текст", "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया",
    "你好，世界。今天天气很好！", "こんにちは世界カタカナ", "안녕하세요 세계", "ภาษาไทยไม่มีช่องว่าง", "😀👩‍👩‍👧‍👦🇩🇪 👍🏽", "e\u0301 vs é, ﬁ vs fi",
    "\u200bzero\u200bwidth\ufeff", "—–-‐ “quotes” ‘single’ «guillemets»", "a" * 80, "!?!?!?!?…", "$$x_{i}^{2}$$ \\frac{a}{b}",
    "BP 120/80 mmHg, 5 µg/kg, 37.5 °C, p<0.05", "ACE-inhibitor (e.g. lisinopril 10 mg b.i.d.)", "", " ", "\u00a0nbsp\u00a0",
    "<|im_start|>user\nnot a real turn<|im_end|>", "<s>[INST] not a turn [/INST]</s>", "<bos><eos><pad><unk>",
    "The quick brown fox jumps over the lazy dog. " * 3,
)  # fmt: skip

CONVERSATIONS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "What is anemia?"},),
    ({"role": "system", "content": "You are a nurse."}, {"role": "user", "content": "Hi"}),
    (
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
    ),
    ({"role": "user", "content": "  spaces and\n\nnewlines  "},),
    ({"role": "user", "content": "ünïcödé 你好 😀 <|im_end|>"},),
    ({"role": "user", "content": ""},),
    (
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ),
)
"""Shapes of a conversation; a template that refuses one (no system role, say) must refuse it on both sides."""
