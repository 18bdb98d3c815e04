"""lm-eval's own client: its requests as text score as its requests as token ids do, special tokens included."""

from __future__ import annotations

import pytest

PAIRS = [
    ("<|im_start|>user\nOnce upon a time<|im_end|>\n<|im_start|>assistant\n", "there was a fox"),
    ("Once upon a time", " there was a brave bear who lived in a cave."),
    ("The <|im_end|> of", " a <|im_start|> story"),
]


def scores(server, model: str, monkeypatch, **options) -> list[tuple[float, bool]]:
    """What lm-eval makes of the server's answers."""
    pytest.importorskip("tenacity", reason="lm-eval[api] is not installed")
    models = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    class Client(models.LocalCompletionsAPI):
        def _create_payload(self, *args, **kwargs):
            asked = super()._create_payload(*args, **kwargs)
            return {**asked, **({} if options["tokenized_requests"] else {"parse_special": True})}

    monkeypatch.setenv("OPENAI_API_KEY", server.key)
    client = Client(
        base_url=f"{server.url}/v1/completions", model=server.get("/v1/models").json()["data"][0]["id"],
        tokenizer=model, tokenizer_backend="huggingface", max_length=512, **options,
    )  # fmt: skip
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    return client.loglikelihood(asked)


def test_text_scores_as_ids(server, chat_model, monkeypatch):
    ids = scores(server, str(chat_model), monkeypatch, tokenized_requests=True)
    text = scores(server, str(chat_model), monkeypatch, tokenized_requests=False)
    assert [greedy for _, greedy in text] == [greedy for _, greedy in ids]
    assert [score for score, _ in text] == pytest.approx([score for score, _ in ids], abs=1e-9)
