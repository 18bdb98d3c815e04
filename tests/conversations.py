"""Fifty conversations that the genuine SmolLM2-135M-Instruct is asked to continue: by chat, the API and the page."""

from __future__ import annotations

QUESTIONS = [
    "What is the capital of France?", "Who wrote Hamlet?", "What is 2 + 2?", "Name three colours.", "Hello!", "Tell me a joke.",
    "What is photosynthesis?", "Translate 'good morning' to French.", "Why is the sky blue?", "What is the largest planet?",
    "Write a haiku about rain.", "List the first five prime numbers.", "What does DNA stand for?", "Is water wet?",
    "Give me a recipe for pancakes.", "Explain gravity to a child.", "What is a noun?", "How many days are in a week?",
    "Write a Python function that reverses a string.", "What does `len([1, 2, 3])` return in Python?",
    "Fix this: for i in range(10) print(i)", "Write SQL that counts the rows of a table t.", "def add(a, b):",
    "Write hello world in C.", "What is a hash table?", "Explain recursion with an example.", "x" * 200, "?", "42",
    "¿Cuál es la capital de España?", "Was ist die Hauptstadt von Deutschland?", "日本の首都はどこですか？", "Привет!", "مرحبا",
    "🙂🙂🙂", "naïve café", "1,000,000 / 7 = ?", "  spaces   and\n\nnewlines  ", "What is <|im_end|> for?", "\t\ttabs",
]  # fmt: skip
SYSTEMS = [
    "You are a pirate.",
    "Answer in one word.",
    "You are a helpful assistant.",
    "Antworte auf Deutsch.",
    "Réponds en français.",
]
TURNS = [
    ["My name is Ada.", "Nice to meet you, Ada.", "What is my name?"],
    ["Count to three.", "One, two, three.", "And on to five."],
    ["I like cats.", "Cats are great.", "What do I like?", "You like cats.", "Why?"],
    ["def f(x): return x", "This is the identity.", "Make it double x."],
    ["Hi", "Hello! How can I help?", "Name a city in Italy.", "Rome.", "Another one."],
]
CASES = [
    *([{"role": "user", "content": question}] for question in QUESTIONS),
    *([{"role": "system", "content": system}, {"role": "user", "content": "Who are you?"}] for system in SYSTEMS),
    *(
        [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(turns)]
        for turns in TURNS
    ),
]
LENGTH = 24  # tokens of an answer, at most
