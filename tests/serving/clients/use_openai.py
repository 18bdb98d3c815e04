"""openai for Python: completions, chat, streams, parse, tools and responses."""

import json

from openai import OpenAI, pydantic_function_tool
from shared import KEY, MODEL, QUESTION, URL, Animal

client = OpenAI(base_url=URL, api_key=KEY, max_retries=0)
assert client.models.list().data[0].id == MODEL
text = client.completions.create(model=MODEL, prompt="Once", max_tokens=8, seed=1).choices[0].text
parts = client.completions.create(model=MODEL, prompt="Once", max_tokens=8, seed=1, stream=True)
assert text and "".join(part.choices[0].text for part in parts) == text
messages = [{"role": "user", "content": QUESTION}]
found = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Animal)
assert isinstance(found.choices[0].message.parsed, Animal)
tools = [pydantic_function_tool(Animal)]
called = client.chat.completions.create(model=MODEL, messages=messages, tools=tools, tool_choice="required")
for call in called.choices[0].message.tool_calls:
    Animal(**json.loads(call.function.arguments))
with client.chat.completions.stream(model=MODEL, messages=messages, response_format=Animal) as stream:
    assert isinstance(stream.get_final_completion().choices[0].message.parsed, Animal)
assert isinstance(client.responses.parse(model=MODEL, input=QUESTION, text_format=Animal).output_parsed, Animal)
with client.responses.stream(model=MODEL, input=QUESTION, text_format=Animal) as stream:
    assert isinstance(stream.get_final_response().output_parsed, Animal)
print("ok")
