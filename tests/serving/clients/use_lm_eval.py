"""lm-eval: all tasks of a folder by local-completions, those that are only written by local-chat-completions as well.

The command line goes on with the model's directory, for its tokenizer, and the folder. The last line is the results.
"""

import json
import os
import sys

directory, folder = sys.argv[3:5]
os.environ.update({"HF_DATASETS_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"})

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from shared import MODEL, URL  # noqa: E402

manager = TaskManager(include_path=folder, include_defaults=False)
found = {}
for kind, path, tasks, more, options in (
    ("local-completions", "completions", manager.all_tasks, f",tokenizer={directory}", {}),
    ("local-chat-completions", "chat/completions", ["written"], "", {"apply_chat_template": True}),
):
    arguments = f"model={MODEL},num_concurrent=2,max_retries=1,base_url={URL}/{path}{more}"
    answer = lm_eval.simple_evaluate(
        model=kind, model_args=arguments, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options
    )
    found[kind] = {
        task: {key.split(",")[0]: value for key, value in values.items() if isinstance(value, float)}
        for task, values in answer["results"].items()
    }
print(json.dumps(found))
