"""litellm: chat, a stream, JSON of a schema and tools."""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm
from shared import KEY, MODEL, QUESTION, URL, Animal

asked = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY, "num_retries": 0}
messages = [{"role": "user", "content": QUESTION}]
whole = litellm.completion(**asked, messages=messages, max_tokens=8, seed=1).choices[0].message.content
parts = litellm.completion(**asked, messages=messages, max_tokens=8, seed=1, stream=True)
assert whole and "".join(part.choices[0].delta.content or "" for part in parts) == whole
schema = {"type": "json_schema", "json_schema": {"name": "animal", "schema": Animal.model_json_schema()}}
found = litellm.completion(**asked, messages=messages, response_format=schema)
Animal.model_validate_json(found.choices[0].message.content)
tools = [{"type": "function", "function": {"name": "Animal", "parameters": Animal.model_json_schema()}}]
called = litellm.completion(**asked, messages=messages, tools=tools, tool_choice="required")
for call in called.choices[0].message.tool_calls:
    Animal(**json.loads(call.function.arguments))
print("ok")
