"""llm (Simon Willison's): a model of extra-openai-models.yaml answers, streams, and gives JSON of a schema."""

import os
import tempfile
from pathlib import Path

from shared import KEY, MODEL, QUESTION, URL, Animal

folder = tempfile.mkdtemp()
os.environ["LLM_USER_PATH"] = folder
models = f"- model_id: local\n  model_name: {MODEL}\n  api_base: {URL}\n  supports_schema: true\n"
(Path(folder) / "extra-openai-models.yaml").write_text(models)

import llm  # noqa: E402

model = llm.get_model("local")
model.key = KEY
whole = model.prompt(QUESTION, stream=False, max_tokens=8, seed=1).text()
assert whole and "".join(model.prompt(QUESTION, max_tokens=8, seed=1)) == whole
Animal.model_validate_json(model.prompt(QUESTION, schema=Animal, stream=False).text())
print("ok")
