"""pydantic-ai: text, a class by calls of tools and by JSON schema, over chat and over responses."""

from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from shared import KEY, MODEL, QUESTION, URL, Animal

provider = OpenAIProvider(base_url=URL, api_key=KEY)
for kind in (OpenAIChatModel, OpenAIResponsesModel):
    model = kind(MODEL, provider=provider)
    assert Agent(model).run_sync(QUESTION, model_settings={"max_tokens": 8}).output
    for output in (NativeOutput(Animal), ToolOutput(Animal)):
        found = Agent(model, output_type=output, retries=0).run_sync(QUESTION)
        assert isinstance(found.output, Animal), (kind, output)
print("ok")
