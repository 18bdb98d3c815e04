"""instructor: a class by calls of tools, by JSON schema, and as a stream of partial objects."""

import instructor
from openai import OpenAI
from shared import KEY, MODEL, QUESTION, URL, Animal

messages = [{"role": "user", "content": QUESTION}]
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=URL, api_key=KEY, max_retries=0), mode=mode)
    found = client.chat.completions.create(model=MODEL, messages=messages, response_model=Animal, max_retries=0)
    assert isinstance(found, Animal), mode
last = None
for part in client.chat.completions.create_partial(
    model=MODEL, messages=messages, response_model=Animal, max_retries=0
):
    last = part
assert last is not None and last.kind
print("ok")
