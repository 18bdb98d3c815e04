"""langchain-openai: chat, a stream, and with_structured_output by JSON schema, by function calls and through responses."""

from langchain_openai import ChatOpenAI
from shared import KEY, MODEL, QUESTION, URL, Animal

options = {"base_url": URL, "api_key": KEY, "model": MODEL, "max_retries": 0}
chat = ChatOpenAI(**options, max_tokens=8, seed=1)
whole = chat.invoke(QUESTION).content
assert whole and "".join(part.content for part in chat.stream(QUESTION)) == whole
for method in ("json_schema", "function_calling"):
    found = ChatOpenAI(**options).with_structured_output(Animal, method=method).invoke(QUESTION)
    assert isinstance(found, Animal), method
through = ChatOpenAI(**options, use_responses_api=True).with_structured_output(Animal, method="json_schema")
assert isinstance(through.invoke(QUESTION), Animal)
called = ChatOpenAI(**options).bind_tools([Animal], tool_choice="required").invoke(QUESTION)
for call in called.tool_calls:
    Animal(**call["args"])
assert called.tool_calls
print("ok")
